//! Whoever sends again as soon as he is answered goes out with the others.
//!
//! Of several senders who each wait for their answer the first one back would start the next append alone, and the others
//! would wait for it: every second append would carry one command, and everybody would wait for two. So behind an append
//! that took long and answered several, as many are waited for as there were, for a small part of what it took.

use std::time::Duration;

/// Appends that are answered sooner are waited for by nobody: that costs less than a timer.
const SLOW: Duration = Duration::from_millis(16);
/// Of what an append took, this part is waited at most, and never longer than that.
const PART: u32 = 8;
const GATHER_PATIENCE: Duration = Duration::from_millis(8);

/// Who is waited for before the next append.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Gather {
    /// Nobody.
    #[default]
    Nobody,
    /// Until so many commands are there.
    Until(usize),
}

impl Gather {
    /// An append has answered so many, while others have come: how long to wait for those to come back, if at all.
    pub(super) fn begin(&mut self, answered: usize, waiting: usize, took: Duration) -> Option<Duration> {
        if answered + waiting < 2 || took < SLOW {
            return None;
        }
        *self = Self::Until(answered + waiting);
        Some((took / PART).min(GATHER_PATIENCE))
    }

    /// Whether more than these are waited for.
    pub(super) fn waits(&mut self, queued: usize) -> bool {
        match *self {
            Self::Until(wanted) if queued < wanted => true,
            Self::Until(_) | Self::Nobody => {
                self.ends();
                false
            }
        }
    }

    /// Nobody is waited for any longer.
    pub(super) fn ends(&mut self) {
        *self = Self::Nobody;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_waited_for_as_there_were_and_not_for_long() {
        let mut gather = Gather::default();
        assert_eq!(gather.begin(1, 0, Duration::from_secs(1)), None, "one sender waits for nobody");
        assert_eq!(gather.begin(3, 1, Duration::from_millis(3)), None, "nor does anybody where it goes fast");
        assert_eq!(gather.begin(3, 1, Duration::from_millis(40)), Some(Duration::from_millis(5)));
        assert!(gather.waits(1) && gather.waits(3));
        assert!(!gather.waits(4), "everybody is back");
        assert!(!gather.waits(1), "and what comes now goes at once");
        assert_eq!(gather.begin(2, 0, Duration::from_secs(3)), Some(GATHER_PATIENCE));
        gather.ends();
        assert!(!gather.waits(1));
    }
}
