//! Where a subscription's past meets its present: no gap and no double, also while entries pour in. Code without I/O.
//!
//! A subscription registers first and reads the log after; publications that arrive meanwhile are held. When the read
//! is done, what it did not cover follows from what was held. From then on the next seq is pushed, a lower one is
//! known, and a higher one (or no room) means: behind, go on from the log.

use std::collections::BTreeMap;

/// Publications held while the log is read; past it the subscription is behind.
pub const HELD_MAX: usize = 256;

/// What to do with a publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Push it now.
    Push,
    /// It is held, or known, or will be read from the log.
    Keep,
}

/// A subscription's place in a conversation's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seam<T> {
    /// The log is being read; publications are held.
    Reading {
        /// By seq.
        held: BTreeMap<u64, T>,
        /// More came than can be held.
        overflowed: bool,
    },
    /// Everything up to `last` was pushed.
    Live {
        /// The last seq.
        last: u64,
    },
    /// Everything up to `last` was pushed; the rest is in the log.
    Behind {
        /// The last seq.
        last: u64,
    },
}

impl<T> Seam<T> {
    /// A subscription that has registered and not read yet.
    pub fn reading() -> Self {
        Self::Reading { held: BTreeMap::new(), overflowed: false }
    }

    /// A publication arrives. `room`: whether the socket's queue takes it.
    pub fn offer(&mut self, seq: u64, publication: impl FnOnce() -> T, room: bool) -> Verdict {
        match self {
            Self::Reading { held, overflowed } => {
                if held.len() < HELD_MAX {
                    held.insert(seq, publication());
                } else {
                    *overflowed = true;
                }
                Verdict::Keep
            }
            Self::Live { last } if seq <= *last => Verdict::Keep,
            Self::Live { last } if seq == *last + 1 && room => {
                *last = seq;
                Verdict::Push
            }
            Self::Live { last } => {
                *self = Self::Behind { last: *last };
                Verdict::Keep
            }
            Self::Behind { .. } => Verdict::Keep,
        }
    }

    /// The log was read and pushed up to `read`: what was held and follows it without a gap is to be pushed now.
    pub fn joined(&mut self, read: u64) -> Vec<T> {
        let before = std::mem::replace(self, Self::Live { last: read });
        let Self::Reading { held, overflowed } = before else {
            *self = before;
            return Vec::new();
        };
        let mut last = read;
        let mut push = Vec::new();
        for (seq, publication) in held {
            if seq <= last {
                continue;
            }
            if seq != last + 1 {
                *self = Self::Behind { last };
                return push;
            }
            last = seq;
            push.push(publication);
        }
        *self = if overflowed { Self::Behind { last } } else { Self::Live { last } };
        push
    }

    /// Goes on from the log: the place to read after, if it is behind.
    pub fn go_on(&mut self) -> Option<u64> {
        let Self::Behind { last } = *self else { return None };
        *self = Self::reading();
        Some(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One step of a schedule against a log that grows: what the socket saw must be an unbroken run at every step.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Append,
        Deliver,
        ReadLog,
        FinishRead,
        Slow,
        Fast,
        Resubscribe,
        Crash,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Append),
            4 => Just(Step::Deliver),
            2 => Just(Step::ReadLog),
            2 => Just(Step::FinishRead),
            1 => Just(Step::Slow),
            1 => Just(Step::Fast),
            1 => Just(Step::Resubscribe),
            1 => Just(Step::Crash),
        ]
    }

    struct World {
        log: u64,
        /// Publications confirmed but not yet offered to this socket, in order.
        wire: std::collections::VecDeque<u64>,
        seam: Seam<u64>,
        seen: Vec<u64>,
        /// A read of the log in progress: (after, tip when it was asked).
        read: Option<(u64, u64)>,
        room: bool,
    }

    impl World {
        fn see(&mut self, seq: u64) {
            let expected = self.seen.last().map_or(seq, |l| l + 1);
            assert_eq!(seq, expected, "a gap, a double or a step back: {:?}", self.seen);
            self.seen.push(seq);
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Append => {
                    self.log += 1;
                    self.wire.push_back(self.log);
                }
                Step::Deliver => {
                    if let Some(seq) = self.wire.pop_front()
                        && self.seam.offer(seq, || seq, self.room) == Verdict::Push
                    {
                        self.see(seq);
                    }
                }
                Step::ReadLog => {
                    if self.read.is_none() {
                        let after = match &self.seam {
                            Seam::Reading { .. } => Some(self.seen.last().copied().unwrap_or(0)),
                            Seam::Behind { .. } if self.room => self.seam.go_on(),
                            _ => None,
                        };
                        // The owner answers the tip in order with its publications: all up to it are on the wire or past.
                        self.read = after.map(|a| (a, self.log));
                    }
                }
                Step::FinishRead => {
                    if let Some((after, tip)) = self.read.take() {
                        (after + 1..=tip).for_each(|s| self.see(s));
                        let held = self.seam.joined(tip.max(after));
                        held.into_iter().for_each(|s| self.see(s));
                    }
                }
                Step::Slow => self.room = false,
                Step::Fast => self.room = true,
                // A new socket with the position of the old one; the old one's queue is dropped.
                Step::Resubscribe | Step::Crash => {
                    self.seam = Seam::reading();
                    self.read = None;
                    if matches!(step, Step::Crash) {
                        self.wire.clear();
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_schedule_sees_every_seq_once_and_in_order(steps in prop::collection::vec(any_step(), 1..120)) {
            let mut world = World { log: 3, wire: Default::default(), seam: Seam::reading(), seen: vec![], read: None, room: true };
            for step in steps {
                world.step(step);
            }
            // And in the end everything arrives, once the socket is fast again.
            world.room = true;
            for _ in 0..4 {
                world.step(Step::ReadLog);
                world.step(Step::FinishRead);
                while !world.wire.is_empty() {
                    world.step(Step::Deliver);
                }
            }
            prop_assert_eq!(world.seen.last().copied().unwrap_or(0), world.log);
        }
    }

    #[test]
    fn what_cannot_be_held_is_read_later() {
        let mut seam = Seam::reading();
        for seq in 1..=HELD_MAX as u64 + 10 {
            seam.offer(seq, || seq, true);
        }
        let pushed = seam.joined(0);
        assert_eq!(pushed.len(), HELD_MAX);
        assert_eq!(seam.go_on(), Some(HELD_MAX as u64));
    }
}
