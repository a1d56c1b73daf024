//! The shard map: who holds each shard, under which epoch, and who should. One document, replaced by compare-and-set.
//!
//! Invariant: a holder is changed only by its live owner, after it has stopped and finished (that change is the
//! release), or by anyone once that incarnation is marked dead. So the entry always names the last node that may still
//! write.
//! Invariant: each change of a holder, or of what it may write under, raises the epoch.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::placement::{Candidate, plan};

/// A node's start: rising over the cluster, given once.
pub type Incarnation = u32;

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name, which outlives its incarnations.
    pub name: String,
    /// Where other nodes reach it; none: nowhere.
    #[serde(default)]
    pub mesh: Option<String>,
    /// How much it takes beside the others.
    pub capacity: u32,
    /// Whether it is to hold nothing any more.
    #[serde(default)]
    pub draining: bool,
}

/// A shard's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Entry", into = "Entry")]
pub struct Slot {
    /// The last incarnation that may write; none: there never was one.
    pub holder: Option<Incarnation>,
    /// What it writes under.
    pub epoch: u32,
    /// Who should own it next, where that is another.
    pub wish: Option<Incarnation>,
    /// Of reigns up to this epoch nothing is left to do: whoever comes next looks for nothing there.
    pub settled: u32,
}

/// As it is stored: short, since there are a thousand of them.
#[derive(Serialize, Deserialize)]
struct Entry(Option<Incarnation>, u32, Option<Incarnation>, u32);

impl From<Entry> for Slot {
    fn from(Entry(holder, epoch, wish, settled): Entry) -> Self {
        Self { holder, epoch, wish, settled }
    }
}

impl From<Slot> for Entry {
    fn from(slot: Slot) -> Self {
        Self(slot.holder, slot.epoch, slot.wish, slot.settled)
    }
}

/// The map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMap {
    /// Nodes that may be alive, or still hold something.
    pub members: BTreeMap<Incarnation, Member>,
    /// Every shard.
    pub shards: Vec<Slot>,
    /// Shards that an operator wants at the node of this name, whenever it takes any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pins: BTreeMap<u32, String>,
}

/// A change of the map. Each is checked against the map that it meets: one that does not fit it changes nothing there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node comes.
    Join(Incarnation, Member),
    /// It is to hold nothing any more, or is again.
    Drain(Incarnation, bool),
    /// A node that holds nothing goes.
    Leave(Incarnation),
    /// An incarnation that is marked dead is replaced wherever it holds something.
    Replace(Incarnation),
    /// Who should own what, by the plan, at most so many shards on the move at once.
    Plan {
        /// Moves under way at once.
        moves_max: usize,
    },
    /// Its holder has stopped these, under these epochs: whoever is wished for has them now. Where nobody is, or nobody
    /// who lives, the holder takes them up again, under another epoch.
    Release(Incarnation, Vec<(u32, u32)>),
    /// An operator wants a shard at the node of this name; or wherever the plan wants it.
    Pin(u32, Option<String>),
    /// Of these, which it holds, nothing is left to do of reigns up to these epochs.
    Settle(Incarnation, Vec<(u32, u32)>),
}

impl Slot {
    /// Held by another now, under the next epoch.
    fn given(self, holder: Incarnation) -> Self {
        Self { holder: Some(holder), epoch: self.epoch + 1, wish: None, ..self }
    }
}

impl ShardMap {
    /// Shards that nobody holds, in a store where epochs up to `epoch` were used and nothing is left to do of those up to
    /// `settled`.
    pub fn new(shards: u32, epoch: u32, settled: u32) -> Self {
        let fresh = Slot { holder: None, epoch, wish: None, settled };
        Self { members: BTreeMap::new(), shards: vec![fresh; shards as usize], pins: BTreeMap::new() }
    }

    /// The map with a change; none: nothing of it fits any more, or it is so already.
    pub fn with(&self, change: &Change) -> Option<Self> {
        let mut map = self.clone();
        match change {
            Change::Join(incarnation, member) => {
                map.members.insert(*incarnation, member.clone());
            }
            Change::Drain(incarnation, draining) => map.members.get_mut(incarnation)?.draining = *draining,
            Change::Leave(incarnation) => {
                if map.shards.iter().any(|s| s.holder == Some(*incarnation)) {
                    return None;
                }
                map.forget(*incarnation);
            }
            Change::Replace(dead) => map.replace(*dead),
            Change::Plan { moves_max } => map.wish(*moves_max),
            Change::Release(owner, shards) => map.release(*owner, shards),
            Change::Settle(owner, shards) => map.settle(*owner, shards),
            Change::Pin(shard, Some(name)) => drop(map.pins.insert(*shard, name.clone())),
            Change::Pin(shard, None) => drop(map.pins.remove(shard)),
        }
        (map != *self).then_some(map)
    }

    /// Whether an incarnation may be given shards.
    fn takes(&self, incarnation: Incarnation) -> bool {
        self.members.get(&incarnation).is_some_and(|m| !m.draining)
    }

    /// Whether anybody but this one may be given shards.
    pub fn others_take(&self, me: Incarnation) -> bool {
        self.members.keys().any(|n| *n != me && self.takes(*n))
    }

    fn forget(&mut self, incarnation: Incarnation) {
        self.members.remove(&incarnation);
        for slot in self.shards.iter_mut().filter(|s| s.wish == Some(incarnation)) {
            slot.wish = None;
        }
    }

    fn release(&mut self, owner: Incarnation, shards: &[(u32, u32)]) {
        for (shard, epoch) in shards {
            let Some(slot) = self.shards.get(*shard as usize).copied() else { continue };
            if slot.holder != Some(owner) || slot.epoch != *epoch {
                continue;
            }
            let next = slot.wish.filter(|w| self.members.contains_key(w)).unwrap_or(owner);
            self.shards[*shard as usize] = slot.given(next);
        }
    }

    fn settle(&mut self, owner: Incarnation, shards: &[(u32, u32)]) {
        for (shard, settled) in shards {
            if let Some(slot) = self.shards.get_mut(*shard as usize).filter(|s| s.holder == Some(owner)) {
                slot.settled = slot.settled.max(*settled).min(slot.epoch);
            }
        }
    }

    fn replace(&mut self, dead: Incarnation) {
        self.forget(dead);
        let targets = self.targets(|slot| slot.holder.filter(|h| *h != dead));
        for (slot, target) in self.shards.iter_mut().zip(targets) {
            if slot.holder == Some(dead) {
                // Nobody is left: it stays named until somebody comes.
                let Some(next) = slot.wish.or(target) else { continue };
                *slot = slot.given(next);
            }
        }
    }

    fn wish(&mut self, moves_max: usize) {
        let targets = self.targets(|slot| slot.holder);
        let mut moving = 0;
        for (slot, target) in self.shards.iter_mut().zip(targets) {
            // A member goes when it holds nothing, or is marked dead.
            slot.wish = match (slot.holder.filter(|h| self.members.contains_key(h)), target) {
                // Nobody has to stop.
                (None, Some(first)) => {
                    *slot = slot.given(first);
                    continue;
                }
                (Some(holder), Some(target)) if holder != target && moving < moves_max => {
                    moving += 1;
                    Some(target)
                }
                (Some(_) | None, _) => None,
            };
        }
    }

    /// Who should hold each shard, where `stays` says who of those that may holds it.
    fn targets(&self, stays: impl Fn(&Slot) -> Option<Incarnation>) -> Vec<Option<Incarnation>> {
        let takers: Vec<Incarnation> = self.members.keys().copied().filter(|n| self.takes(*n)).collect();
        let candidate = |n: &Incarnation| {
            self.members.get(n).map(|m| Candidate { name: m.name.clone(), capacity: m.capacity })
        };
        let candidates: Vec<Candidate> = takers.iter().filter_map(candidate).collect();
        let place = |n: Incarnation| takers.iter().position(|t| *t == n);
        let pinned = |shard: u32| {
            let name = self.pins.get(&shard)?;
            candidates.iter().position(|c| c.name == *name)
        };
        let holders: Vec<Option<usize>> = (0u32..)
            .zip(&self.shards)
            .map(|(shard, slot)| pinned(shard).or_else(|| stays(slot).and_then(place)))
            .collect();
        let planned = plan(&candidates, &holders);
        (0u32..).zip(planned).map(|(shard, p)| pinned(shard).or(p).map(|p| takers[p])).collect()
    }

    /// What the plan would move if it could at once: (shard, from, to).
    pub fn plan(&self) -> Vec<(u32, Incarnation, Incarnation)> {
        let planned = self.with(&Change::Plan { moves_max: usize::MAX });
        planned.as_ref().unwrap_or(self).moves().collect()
    }

    /// The incarnation of the node of this name.
    pub fn named(&self, name: &str) -> Option<Incarnation> {
        self.members.iter().rev().find(|(_, member)| member.name == name).map(|(n, _)| *n)
    }

    /// Shards that are to move: (shard, from, to).
    pub fn moves(&self) -> impl Iterator<Item = (u32, Incarnation, Incarnation)> {
        let of = |(n, s): (usize, &Slot)| Some((u32::try_from(n).ok()?, s.holder?, s.wish?));
        self.shards.iter().enumerate().filter_map(of)
    }

    /// Shards that an incarnation holds, with their epochs.
    pub fn held_by(&self, incarnation: Incarnation) -> impl Iterator<Item = (u32, u32)> {
        let of = move |(n, s): (usize, &Slot)| {
            (s.holder == Some(incarnation)).then_some((u32::try_from(n).ok()?, s.epoch))
        };
        self.shards.iter().enumerate().filter_map(of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str) -> Member {
        Member { name: name.to_owned(), mesh: None, capacity: 1, draining: false }
    }

    fn with(map: &ShardMap, changes: &[Change]) -> ShardMap {
        changes.iter().fold(map.clone(), |map, change| map.with(change).unwrap_or(map))
    }

    fn plan_all() -> Change {
        Change::Plan { moves_max: usize::MAX }
    }

    fn two() -> ShardMap {
        let first = [Change::Join(1, member("a")), plan_all()];
        let map = with(&ShardMap::new(16, 0, 0), &first);
        assert_eq!(map.held_by(1).count(), 16);
        with(&map, &[Change::Join(2, member("b")), plan_all()])
    }

    #[test]
    fn a_wish_is_no_holder_until_the_owner_releases() {
        let map = two();
        assert_eq!((map.held_by(1).count(), map.moves().count()), (16, 8));
        let (shard, from, to) = map.moves().next().unwrap();
        assert_eq!((from, to), (1, 2));
        let release = Change::Release(1, vec![(shard, 1)]);
        let after = map.with(&release).unwrap();
        assert_eq!(after.shards[shard as usize], Slot { holder: Some(2), epoch: 2, wish: None, settled: 0 });
        assert_eq!(after.with(&release), None, "sent again it changes nothing");
        assert_eq!(map.with(&Change::Release(2, vec![(shard, 1)])), None, "nobody releases for another");
        assert_eq!(map.with(&Change::Release(1, vec![(shard, 0)])), None, "nor under another epoch");
    }

    #[test]
    fn what_was_stopped_and_is_wanted_by_nobody_goes_on_under_another_epoch() {
        let map = two();
        let (shard, ..) = map.moves().next().unwrap();
        // Whoever was to have it went away meanwhile.
        let alone = with(&map, &[Change::Replace(2)]);
        let after = with(&alone, &[Change::Release(1, vec![(shard, 1)])]);
        assert_eq!(after.shards[shard as usize], Slot { holder: Some(1), epoch: 2, wish: None, settled: 0 });
    }

    #[test]
    fn of_the_dead_everything_is_taken_over_and_nothing_else_moves() {
        let map = two();
        let moves: Vec<_> = map.moves().map(|(shard, ..)| shard).collect();
        let released = moves.iter().map(|s| (*s, map.shards[*s as usize].epoch)).collect();
        let map = with(&map, &[Change::Release(1, released)]);
        assert_eq!((map.held_by(1).count(), map.held_by(2).count()), (8, 8));
        let after = with(&map, &[Change::Replace(2)]);
        assert_eq!(after.held_by(1).count(), 16);
        for (before, after) in map.shards.iter().zip(&after.shards) {
            assert_eq!(after.epoch - before.epoch, u32::from(before.holder == Some(2)));
        }
        assert!(!after.members.contains_key(&2));
        let nobody = with(&after, &[Change::Replace(1)]);
        assert_eq!(nobody.held_by(1).count(), 16, "the last that may have written stays named");
        let next = with(&nobody, &[Change::Join(3, member("c")), plan_all()]);
        assert_eq!((next.held_by(3).count(), next.shards[0].epoch), (16, nobody.shards[0].epoch + 1));
    }

    #[test]
    fn whoever_drains_is_given_nothing_and_goes_when_nothing_is_left() {
        let map = with(&two(), &[Change::Drain(1, true), plan_all()]);
        assert_eq!(map.moves().count(), 16);
        assert_eq!(map.with(&Change::Leave(1)), None, "it still holds something");
        let all: Vec<_> = map.held_by(1).collect();
        let map = with(&map, &[Change::Release(1, all), Change::Leave(1)]);
        assert_eq!((map.members.len(), map.held_by(2).count()), (1, 16));
        let back = with(&two(), &[Change::Drain(1, true), plan_all(), Change::Drain(1, false), plan_all()]);
        assert_eq!(back, two(), "a drain that is called off leaves no trace");
    }

    #[test]
    fn only_its_holder_says_that_nothing_is_left_to_do_and_never_of_what_is_to_come() {
        let map = two();
        let after = map.with(&Change::Settle(1, vec![(0, 1), (1, 9)])).unwrap();
        assert_eq!((after.shards[0].settled, after.shards[1].settled), (1, 1));
        assert_eq!(after.with(&Change::Settle(2, vec![(2, 1)])), None);
        assert_eq!(after.with(&Change::Settle(1, vec![(0, 0)])), None, "nor does it go back");
    }

    #[test]
    fn a_shard_stays_where_an_operator_wants_it_as_long_as_that_node_takes_any() {
        let map = two();
        let moves: Vec<_> = map.moves().map(|(shard, ..)| shard).collect();
        let released = moves.iter().map(|s| (*s, map.shards[*s as usize].epoch)).collect();
        let map = with(&map, &[Change::Release(1, released)]);
        let (shard, _) = map.held_by(1).next().unwrap();
        let map = with(&map, &[Change::Pin(shard, Some("b".into())), plan_all()]);
        assert!(map.moves().any(|moved| moved == (shard, 1, 2)), "{:?}", map.moves().collect::<Vec<_>>());
        let all = map.moves().map(|(s, ..)| (s, map.shards[s as usize].epoch));
        let (mine, theirs): (Vec<_>, Vec<_>) =
            all.partition(|(s, _)| map.shards[*s as usize].holder == Some(1));
        let map = with(&map, &[Change::Release(1, mine), Change::Release(2, theirs)]);
        assert_eq!(map.shards[shard as usize].holder, Some(2));
        assert_eq!(map.with(&plan_all()), None, "and the plan is at rest");
        let alone = with(&map, &[Change::Replace(2), plan_all()]);
        assert_eq!(alone.shards[shard as usize].holder, Some(1), "a pin holds nobody up");
        let free = with(&map, &[Change::Pin(shard, None)]);
        assert!(free.pins.is_empty());
    }

    #[test]
    fn moves_are_limited() {
        let map = with(&ShardMap::new(64, 0, 0), &[Change::Join(1, member("a")), plan_all()]);
        let map = with(&map, &[Change::Join(2, member("b")), Change::Plan { moves_max: 5 }]);
        assert_eq!(map.moves().count(), 5);
        assert_eq!(map.with(&Change::Plan { moves_max: 5 }), None, "and the plan rests until they are done");
    }

    #[test]
    fn it_is_short_when_stored_and_reads_back() {
        let map = with(&ShardMap::new(1024, 0, 0), &[Change::Join(1, member("a")), plan_all()]);
        let text = serde_json::to_string(&map).unwrap();
        assert!(text.len() < 16 * 1024, "{}", text.len());
        assert_eq!(serde_json::from_str::<ShardMap>(&text).unwrap(), map);
    }
}
