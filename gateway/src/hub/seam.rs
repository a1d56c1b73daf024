//! Where a subscription's past meets its present: no gap and no double, also while entries pour in. Code without I/O.
//!
//! A subscription registers first and reads the log after; publications that arrive meanwhile are held. When the read
//! is done, what it did not cover follows from what was held. From then on the next seq is pushed, a lower one is
//! known, and a higher one (or no room) means: behind, go on from the log. `super::schedules` tries every order.

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
        /// How far the log is known to reach beyond what is held.
        reach: u64,
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
        Self::Reading { held: BTreeMap::new(), reach: 0 }
    }

    /// A publication arrives. `room`: whether the socket's queue takes it.
    pub fn offer(&mut self, seq: u64, publication: impl FnOnce() -> T, room: bool) -> Verdict {
        match self {
            Self::Reading { held, reach } => {
                if held.len() < HELD_MAX {
                    held.insert(seq, publication());
                } else {
                    *reach = seq.max(*reach);
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

    /// The log is known to reach `seq`, which may not have been offered.
    pub fn reaches(&mut self, seq: u64) {
        match self {
            Self::Reading { reach, .. } => *reach = seq.max(*reach),
            Self::Live { last } if seq > *last => *self = Self::Behind { last: *last },
            Self::Live { .. } | Self::Behind { .. } => {}
        }
    }

    /// The log was read and pushed up to `read`: what was held and follows it without a gap is to be pushed now.
    pub fn joined(&mut self, read: u64) -> Vec<T> {
        let before = std::mem::replace(self, Self::Live { last: read });
        let Self::Reading { held, reach } = before else {
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
        *self = if last < reach { Self::Behind { last } } else { Self::Live { last } };
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

    #[test]
    fn whoever_was_not_offered_what_there_is_goes_on_from_the_log() {
        let mut live = Seam::<u64>::Live { last: 4 };
        live.reaches(4);
        assert_eq!(live, Seam::Live { last: 4 });
        live.reaches(6);
        assert_eq!(live.go_on(), Some(4));
        live.reaches(9);
        live.offer(7, || 7, true);
        assert_eq!((live.joined(6), live.go_on()), (vec![7], Some(7)));
        let mut enough = Seam::<u64>::reading();
        enough.reaches(3);
        assert_eq!((enough.joined(3), enough.go_on()), (vec![], None));
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
