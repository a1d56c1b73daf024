//! What a node does with each shard, decided purely: opens what the map gives it, stops what is wished elsewhere,
//! releases what has stopped, lets go of what it has lost. The runtime and the simulator drive the same machine.
//!
//! ```text
//!              map names us                opened
//!  Elsewhere ────────────────► Opening ────────────► Serving
//!      ▲  ▲                       │ wish                │ wish
//!      │  │                       ▼                     ▼
//!      │  └── map names another ─ Stopping ◄────────────┘
//!      │                          │ stopped
//!      │      map names another   ▼
//!      └───────────────────────  Released ── map names us, higher epoch ──► Opening
//! ```
//!
//! Invariant: a shard that was stopped is never served again under that epoch, whatever became of its release: only a
//! map that names us under a higher one opens it.

use std::collections::BTreeMap;

use super::map::{Change, Incarnation, ShardMap, Slot};

/// Where a shard stands at this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Another node has it, or nobody.
    Elsewhere,
    /// It is ours, and what is needed to serve it is being read.
    Opening {
        /// Under which epoch.
        epoch: u32,
    },
    /// It is served.
    Serving {
        /// Under which epoch.
        epoch: u32,
    },
    /// It takes nothing new; what is under way ends, and snapshots are written.
    Stopping {
        /// Under which epoch.
        epoch: u32,
    },
    /// It has stopped. Its release may have been sent, and its outcome may be unknown.
    Released {
        /// Under which epoch it was served.
        epoch: u32,
    },
}

/// What is to be done about a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read what is needed, and serve it: the shard, under which epoch, and up to which nothing is left to do.
    Open(u32, u32, u32),
    /// Take nothing new, let what is under way end, and say when that is so.
    Stop(u32),
    /// It is another's: forget everything of it, at once.
    Abandon(u32),
}

/// Every shard, at one node.
#[derive(Debug)]
pub struct Host {
    me: Incarnation,
    shards: Vec<State>,
    /// Up to which epoch nothing is left to do of a shard, where the map does not say so yet.
    settled: BTreeMap<u32, u32>,
}

impl Host {
    /// A node that has nothing yet.
    pub fn new(me: Incarnation, shards: u32) -> Self {
        Self { me, shards: vec![State::Elsewhere; shards as usize], settled: BTreeMap::new() }
    }

    /// Where a shard stands.
    pub fn state(&self, shard: u32) -> State {
        self.shards.get(shard as usize).copied().unwrap_or(State::Elsewhere)
    }

    /// A newer map was read.
    pub fn map(&mut self, map: &ShardMap) -> Vec<Action> {
        let mut actions = Vec::new();
        for (shard, slot) in (0u32..).zip(&map.shards) {
            let Some(state) = self.shards.get_mut(shard as usize) else { break };
            let (next, action) = step(*state, *slot, self.me, shard);
            *state = next;
            actions.extend(action);
            let told = self.settled.get(&shard).is_some_and(|s| *s <= slot.settled);
            if told || next == State::Elsewhere {
                self.settled.remove(&shard);
            }
        }
        actions
    }

    /// A shard that was opened can be served.
    pub fn opened(&mut self, shard: u32, under: u32) {
        if let Some(state) = self.shards.get_mut(shard as usize)
            && *state == (State::Opening { epoch: under })
        {
            *state = State::Serving { epoch: under };
        }
    }

    /// A shard has stopped and finished.
    pub fn stopped(&mut self, shard: u32, under: u32) {
        if let Some(state) = self.shards.get_mut(shard as usize)
            && *state == (State::Stopping { epoch: under })
        {
            *state = State::Released { epoch: under };
        }
    }

    /// Of a shard that is ours nothing is left to do of reigns up to this epoch.
    pub fn settled(&mut self, shard: u32, epoch: u32) {
        if self.state(shard) != State::Elsewhere {
            self.settled.insert(shard, epoch);
        }
    }

    /// The change that says so, where the map does not yet.
    pub fn settle(&self) -> Option<Change> {
        let all: Vec<(u32, u32)> = self.settled.iter().map(|(shard, epoch)| (*shard, *epoch)).collect();
        (!all.is_empty()).then_some(Change::Settle(self.me, all))
    }

    /// The change that releases everything that has stopped, if anything has. Sent again until the map shows it.
    pub fn release(&self) -> Option<Change> {
        let of = |(shard, state): (u32, &State)| match state {
            State::Released { epoch } => Some((shard, *epoch)),
            State::Elsewhere | State::Opening { .. } | State::Serving { .. } | State::Stopping { .. } => None,
        };
        let stopped: Vec<(u32, u32)> = (0u32..).zip(&self.shards).filter_map(of).collect();
        (!stopped.is_empty()).then_some(Change::Release(self.me, stopped))
    }

    /// This incarnation has ended: everything is another's, whoever that is.
    pub fn fenced(&mut self) -> Vec<Action> {
        let ours = |state: &State| *state != State::Elsewhere;
        let all =
            (0u32..).zip(&self.shards).filter(|(_, s)| ours(s)).map(|(n, _)| Action::Abandon(n)).collect();
        self.shards.fill(State::Elsewhere);
        self.settled.clear();
        all
    }
}

/// What a map's entry makes of a shard.
fn step(state: State, slot: Slot, me: Incarnation, shard: u32) -> (State, Option<Action>) {
    let ours = slot.holder == Some(me);
    let wanted = slot.wish.is_none_or(|w| w == me);
    let open = if wanted {
        (State::Opening { epoch: slot.epoch }, Some(Action::Open(shard, slot.epoch, slot.settled)))
    } else {
        // Nothing of it was begun under this epoch: it goes on to whoever is to have it.
        (State::Released { epoch: slot.epoch }, (state != State::Elsewhere).then_some(Action::Abandon(shard)))
    };
    match state {
        State::Elsewhere if ours => open,
        State::Elsewhere => (State::Elsewhere, None),
        State::Opening { .. } | State::Serving { .. } | State::Stopping { .. } | State::Released { .. }
            if !ours =>
        {
            (State::Elsewhere, Some(Action::Abandon(shard)))
        }
        State::Opening { epoch } | State::Serving { epoch } if epoch == slot.epoch => {
            if wanted {
                (state, None)
            } else {
                (State::Stopping { epoch }, Some(Action::Stop(shard)))
            }
        }
        // It is ours again under another epoch, which only we could have asked for, or whoever replaced us by ourselves.
        State::Opening { .. } | State::Serving { .. } => open,
        State::Stopping { epoch } | State::Released { epoch } if epoch == slot.epoch => (state, None),
        State::Stopping { .. } | State::Released { .. } => open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Incarnation = 7;

    fn slot(holder: Incarnation, epoch: u32, wish: Option<Incarnation>) -> Slot {
        Slot { holder: Some(holder), epoch, wish, settled: 0 }
    }

    #[test]
    fn every_state_meets_every_entry() {
        use State::{Elsewhere, Opening, Released, Serving, Stopping};
        let epoch = 3;
        let (ours, leaves, theirs, again) =
            (slot(ME, 3, None), slot(ME, 3, Some(8)), slot(8, 4, None), slot(ME, 5, None));
        for (state, on_ours, on_leaves, on_theirs, on_again) in [
            (Elsewhere, Opening { epoch }, Released { epoch }, Elsewhere, Opening { epoch: 5 }),
            (Opening { epoch }, Opening { epoch }, Stopping { epoch }, Elsewhere, Opening { epoch: 5 }),
            (Serving { epoch }, Serving { epoch }, Stopping { epoch }, Elsewhere, Opening { epoch: 5 }),
            (Stopping { epoch }, Stopping { epoch }, Stopping { epoch }, Elsewhere, Opening { epoch: 5 }),
            (Released { epoch }, Released { epoch }, Released { epoch }, Elsewhere, Opening { epoch: 5 }),
        ] {
            for (entry, next) in
                [(ours, on_ours), (leaves, on_leaves), (theirs, on_theirs), (again, on_again)]
            {
                let (found, action) = step(state, entry, ME, 0);
                assert_eq!(found, next, "{state:?} meets {entry:?}");
                let wanted = match (state, next) {
                    (_, Opening { epoch }) if state != next => Some(Action::Open(0, epoch, 0)),
                    (Opening { .. } | Serving { .. }, Stopping { .. }) => Some(Action::Stop(0)),
                    (Opening { .. } | Serving { .. } | Stopping { .. } | Released { .. }, Elsewhere) => {
                        Some(Action::Abandon(0))
                    }
                    _ => None,
                };
                assert_eq!(action, wanted, "{state:?} meets {entry:?}");
            }
        }
    }

    #[test]
    fn what_has_stopped_is_released_until_the_map_shows_it() {
        let mut host = Host::new(ME, 2);
        let mut map = ShardMap::new(2, 0, 0);
        map.shards = vec![slot(ME, 1, None), slot(ME, 1, None)];
        assert_eq!(host.map(&map), [Action::Open(0, 1, 0), Action::Open(1, 1, 0)]);
        host.opened(0, 1);
        host.opened(1, 9);
        assert_eq!(
            (host.state(0), host.state(1)),
            (State::Serving { epoch: 1 }, State::Opening { epoch: 1 })
        );
        map.shards[0].wish = Some(8);
        assert_eq!(host.map(&map), [Action::Stop(0)]);
        assert_eq!(host.release(), None);
        host.stopped(0, 1);
        let release = Change::Release(ME, vec![(0, 1)]);
        assert_eq!(host.release(), Some(release.clone()));
        // The wish was withdrawn: stopped is stopped, until the map names us anew.
        map.shards[0].wish = None;
        assert_eq!(host.map(&map), []);
        assert_eq!(host.release(), Some(release.clone()));
        let map = map.with(&release).unwrap();
        assert_eq!(host.map(&map), [Action::Open(0, 2, 0)]);
        assert_eq!(host.fenced(), [Action::Abandon(0), Action::Abandon(1)]);
        assert_eq!(host.state(0), State::Elsewhere);
    }
}
