//! What a node makes of another's lease, decided purely.
//!
//! A beat that has not changed for the whole TTL is judged, by the observer's own clock alone: never by comparing wall
//! clocks, never by a connection that broke. Whoever is judged is marked dead by a write conditional on the very beat, so
//! that one who has renewed meanwhile lives on.
//!
//! Guarantee: silence is counted only over answered reads that are close to each other: an observer that slept, or a
//! store that did, starts the count again, and so a store that freezes for everybody costs nobody its lease.

use std::time::Duration;

use super::lease::{Beat, Row, Tick};

/// Reads that are further apart start the count again.
pub const HOLE: Duration = Duration::from_secs(1);

/// What is known of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may live.
    Alive,
    /// Its beat has not changed for the whole TTL: it may be marked dead if it still shows this, by an observer that has
    /// renewed its own lease since then.
    Silent {
        /// The beat that was judged.
        beat: Beat,
        /// When it was.
        at: Tick,
    },
    /// Somebody has marked it.
    Dead,
}

/// An observer's count of one node.
#[derive(Debug)]
pub struct Watch {
    ttl: Duration,
    seen: Option<Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    beat: Beat,
    /// When the first read that showed it was answered.
    first: Tick,
    /// When the last one was.
    last: Tick,
}

impl Watch {
    /// Nothing was read yet.
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, seen: None }
    }

    /// A read that was sent at `asked` and answered at `answered`. One that is not answered is told by its absence.
    pub fn read(&mut self, asked: Tick, answered: Tick, row: Row) -> Verdict {
        let Row::Live(beat) = row else { return Verdict::Dead };
        match &mut self.seen {
            Some(seen) if seen.beat == beat && asked <= seen.last + HOLE => {
                seen.last = answered;
                // It shows at some instant after it was asked what it showed when the first was answered.
                if asked >= seen.first + self.ttl {
                    return Verdict::Silent { beat, at: asked };
                }
            }
            Some(_) | None => self.seen = Some(Seen { beat, first: answered, last: answered }),
        }
        Verdict::Alive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_millis(2500);

    fn at(ms: u64) -> Tick {
        Duration::from_millis(ms)
    }

    fn live(n: u64) -> Row {
        Row::Live(Beat { writer: 1, n })
    }

    #[test]
    fn it_is_judged_when_a_whole_ttl_lies_between_an_answer_and_a_question() {
        let mut watch = Watch::new(TTL);
        for (asked, answered) in
            [(0, 400), (500, 900), (1000, 1100), (1500, 1600), (2000, 2100), (2899, 3100)]
        {
            assert_eq!(watch.read(at(asked), at(answered), live(1)), Verdict::Alive, "{asked}");
        }
        let verdict = watch.read(at(3300), at(3400), live(1));
        assert_eq!(verdict, Verdict::Silent { beat: Beat { writer: 1, n: 1 }, at: at(3300) });
        assert_eq!(watch.read(at(3500), at(3600), live(2)), Verdict::Alive, "it has renewed after all");
        assert_eq!(watch.read(at(3700), at(3800), Row::Dead), Verdict::Dead);
    }

    #[test]
    fn a_hole_between_answered_reads_starts_the_count_again() {
        let mut watch = Watch::new(TTL);
        assert_eq!(watch.read(at(0), at(10), live(1)), Verdict::Alive);
        assert_eq!(watch.read(at(500), at(510), live(1)), Verdict::Alive);
        // The store was frozen, or this process was.
        assert_eq!(watch.read(at(5000), at(5010), live(1)), Verdict::Alive);
        for asked in (5500..7500).step_by(500) {
            assert_eq!(watch.read(at(asked), at(asked + 10), live(1)), Verdict::Alive, "{asked}");
        }
        assert!(matches!(watch.read(at(7600), at(7610), live(1)), Verdict::Silent { .. }));
    }
}
