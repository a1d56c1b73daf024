//! A node's lease, decided purely: when to renew it, what an answer means, and until when it runs.
//!
//! The lease is a row that only its node renews, by writes conditional on the row's present beat, and that anyone may
//! mark dead by a write conditional on the very beat that was judged. Every renewal has a fresh beat, so that whatever
//! the row shows says which renewal made it.
//!
//! Guarantee: a lease runs from the instant before the renewal that made its beat was first sent, however and whenever
//! that is learnt; so it ends here before its observers, who count from later, may judge it.
//! Guarantee: whether it is held is asked of the clock at the point of use; nothing here is a flag that a timer sets.
//! Guarantee: a beat that this process did not write ends it for good.

use std::collections::VecDeque;
use std::time::Duration;

/// An instant of this process's own clock, which counts suspend: since it was started.
pub type Tick = Duration;

/// A value that only one renewal ever writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Beat {
    /// The process that writes it: a random number of its own.
    pub writer: u64,
    /// Rises with each of its renewals.
    pub n: u64,
}

/// What a node counts for itself of the TTL that its observers wait for: what clocks may differ by is in between.
const OWN_TENTHS: u32 = 9;

/// What a lease row shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Row {
    /// Its node lives, as of this beat.
    Live(Beat),
    /// Somebody judged it and may have taken over.
    Dead,
}

/// A conditional write of the row: to `next`, if it shows `expected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// What must stand there.
    pub expected: Beat,
    /// What is written.
    pub next: Beat,
}

/// What came of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It stands there now.
    Applied,
    /// Something else stands there.
    Refused(Row),
    /// Nobody knows: it may have been applied, or be applied later.
    Unknown,
}

/// How a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// What leaves it now, leaves it under its lease.
    Held,
    /// Its lease has lapsed: nothing of its shards may leave it, and it goes on trying to renew.
    Suspended,
    /// This incarnation has ended.
    Fenced,
}

/// The lease of this incarnation.
#[derive(Debug)]
pub struct Lease {
    ttl: Duration,
    /// What the row is known to have shown last.
    shown: Beat,
    /// When the renewal that wrote it was first sent.
    from: Tick,
    /// The last beat that was made, and renewals from `shown` on whose outcome is not known: when each was first sent.
    last: u64,
    unsettled: VecDeque<(u64, Tick)>,
    fenced: bool,
}

/// Renewals of one beat whose outcome is not known. Past it the oldest is forgotten: should that one have been applied,
/// the lease has lapsed long since, and its beat is known as ours all the same.
const UNSETTLED_MAX: usize = 64;

impl Lease {
    /// A lease whose row was made with `first` by a write that was first sent at `sent`.
    pub fn new(ttl: Duration, first: Beat, sent: Tick) -> Self {
        Self { ttl, shown: first, from: sent, last: first.n, unsettled: VecDeque::new(), fenced: false }
    }

    /// Until when it is held, if nothing more is learnt.
    pub fn until(&self) -> Tick {
        self.from + self.ttl * OWN_TENTHS / 10
    }

    /// From when it runs: when the renewal that the row shows was first sent.
    pub fn from(&self) -> Tick {
        self.from
    }

    /// What its row is known to have shown last.
    pub fn shown(&self) -> Beat {
        self.shown
    }

    /// How the node stands at this instant.
    pub fn standing(&self, now: Tick) -> Standing {
        if self.fenced {
            Standing::Fenced
        } else if now < self.until() {
            Standing::Held
        } else {
            Standing::Suspended
        }
    }

    /// The next renewal, to be sent at `now`. None: the lease has ended.
    pub fn renew(&mut self, now: Tick) -> Option<Renewal> {
        if self.fenced {
            return None;
        }
        self.last += 1;
        if self.unsettled.len() == UNSETTLED_MAX {
            self.unsettled.pop_front();
        }
        self.unsettled.push_back((self.last, now));
        Some(Renewal { expected: self.shown, next: Beat { n: self.last, ..self.shown } })
    }

    /// Learns what came of a renewal.
    pub fn answered(&mut self, renewal: Renewal, answer: Answer) {
        match answer {
            Answer::Applied => self.shows(Row::Live(renewal.next)),
            Answer::Refused(row) => self.shows(row),
            // A read that does not show it proves nothing: it may still be applied.
            Answer::Unknown => {}
        }
    }

    /// Learns what the row showed, at some instant since the last question was sent.
    pub fn shows(&mut self, row: Row) {
        match row {
            Row::Dead => self.fenced = true,
            Row::Live(beat) if beat.writer != self.shown.writer => self.fenced = true,
            // Of before.
            Row::Live(beat) if beat.n <= self.shown.n => {}
            Row::Live(beat) => {
                let sent = self.unsettled.iter().find(|(n, _)| *n == beat.n).map(|(_, sent)| *sent);
                self.from = sent.map_or(self.from, |sent| self.from.max(sent));
                self.shown = beat;
                // Whatever else is under way expects an older beat: it is never applied any more.
                self.unsettled.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_millis(2500);

    fn at(ms: u64) -> Tick {
        Duration::from_millis(ms)
    }

    fn beat(n: u64) -> Beat {
        Beat { writer: 7, n }
    }

    fn lease() -> Lease {
        Lease::new(TTL, beat(1), at(0))
    }

    #[test]
    fn it_runs_from_before_the_renewal_was_sent_however_late_that_is_learnt() {
        let mut lease = lease();
        let renewal = lease.renew(at(1000)).unwrap();
        assert_eq!(renewal, Renewal { expected: beat(1), next: beat(2) });
        lease.answered(renewal, Answer::Unknown);
        lease.shows(Row::Live(beat(1)));
        assert_eq!(lease.until(), at(2250), "nothing is learnt of it");
        assert_eq!(lease.standing(at(2300)), Standing::Suspended);
        // A read shows it long after: it counts from when it was sent.
        lease.shows(Row::Live(beat(2)));
        assert_eq!(lease.until(), at(3250));
        assert_eq!(lease.standing(at(2300)), Standing::Held, "nobody can have taken over: it resumes");
        assert_eq!(lease.standing(at(3250)), Standing::Suspended);
    }

    #[test]
    fn a_refusal_by_an_earlier_beat_of_ours_says_that_that_was_applied() {
        let mut lease = lease();
        let lost = lease.renew(at(1000)).unwrap();
        lease.answered(lost, Answer::Unknown);
        let next = lease.renew(at(1500)).unwrap();
        assert_eq!(next.expected, beat(1), "the row is not known to show anything else");
        lease.answered(next, Answer::Refused(Row::Live(beat(2))));
        assert_eq!((lease.until(), lease.standing(at(1600))), (at(3250), Standing::Held));
        let next = lease.renew(at(1600)).unwrap();
        assert_eq!((next.expected, next.next), (beat(2), beat(4)));
        lease.answered(next, Answer::Applied);
        assert_eq!(lease.until(), at(3850));
    }

    #[test]
    fn what_it_did_not_write_ends_it() {
        for row in [Row::Dead, Row::Live(Beat { writer: 8, n: 2 })] {
            let mut lease = lease();
            let renewal = lease.renew(at(1000)).unwrap();
            lease.answered(renewal, Answer::Refused(row));
            assert_eq!(lease.standing(at(1001)), Standing::Fenced, "{row:?}");
            assert_eq!(lease.renew(at(1002)), None);
            lease.shows(Row::Live(beat(1)));
            assert_eq!(lease.standing(at(1003)), Standing::Fenced, "for good");
        }
    }

    #[test]
    fn a_store_that_is_away_for_long_costs_no_memory_and_no_lease() {
        let mut lease = lease();
        for n in 0..1000u64 {
            let renewal = lease.renew(at(1000 * n)).unwrap();
            lease.answered(renewal, Answer::Unknown);
        }
        assert_eq!(lease.unsettled.len(), UNSETTLED_MAX);
        // One of the first had been applied, which says nothing of now.
        lease.shows(Row::Live(beat(3)));
        assert_eq!(lease.standing(at(1_000_000)), Standing::Suspended);
        let renewal = lease.renew(at(1_000_000)).unwrap();
        lease.answered(renewal, Answer::Applied);
        assert_eq!(lease.standing(at(1_000_001)), Standing::Held);
    }
}
