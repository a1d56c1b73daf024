//! Which node should hold which shard: rendezvous hashing, weighted by capacity, with quotas.
//!
//! Plain rendezvous hashing moves little and balances badly when there are few shards for each node. So every node has a
//! quota, its share of the shards rounded down or up, and hashing decides only who goes where within the quotas. What is
//! well placed stays where it is: a plan moves no shard that the quotas do not force to move.

use patchbay_protocol::ids::derived;

/// A node that may hold shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name, which outlives its incarnations: a node that comes back is given what it had.
    pub name: String,
    /// How much it takes beside the others; at least 1.
    pub capacity: u32,
}

/// The place of a candidate in the list.
pub type Place = usize;

/// Who should hold each shard, as far as `holders` (none: nobody who is alive) may change: no candidate, no plan.
pub fn plan(candidates: &[Candidate], holders: &[Option<Place>]) -> Vec<Option<Place>> {
    if candidates.is_empty() {
        return vec![None; holders.len()];
    }
    let mut held = vec![0usize; candidates.len()];
    for place in holders.iter().flatten() {
        held[*place] += 1;
    }
    let targets = targets(candidates, &held, holders.len());
    let mut wishes = holders.to_vec();
    // Whoever has nobody comes first: what is well placed need not make room twice.
    let orphans = |wish: Option<Place>, _: &[usize]| wish.is_none();
    let surplus = |wish: Option<Place>, held: &[usize]| wish.is_some_and(|p| held[p] > targets[p]);
    give(candidates, &targets, &mut held, &mut wishes, orphans);
    give(candidates, &targets, &mut held, &mut wishes, surplus);
    wishes
}

/// Gives shards that are `free` to whoever has too few, the pairs that hash highest first.
fn give(
    candidates: &[Candidate],
    targets: &[usize],
    held: &mut [usize],
    wishes: &mut [Option<Place>],
    free: impl Fn(Option<Place>, &[usize]) -> bool,
) {
    let poor: Vec<Place> = (0..candidates.len()).filter(|p| held[*p] < targets[*p]).collect();
    let mut pairs: Vec<(f64, usize, Place)> = Vec::new();
    for (shard, wish) in wishes.iter().enumerate().filter(|(_, wish)| free(**wish, held)) {
        debug_assert!(wish.is_none_or(|p| !poor.contains(&p)));
        pairs.extend(poor.iter().map(|p| (score(&candidates[*p], shard), shard, *p)));
    }
    pairs.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, shard, place) in pairs {
        if held[place] < targets[place] && wishes[shard] != Some(place) && free(wishes[shard], held) {
            if let Some(before) = wishes[shard].replace(place) {
                held[before] -= 1;
            }
            held[place] += 1;
        }
    }
}

/// How many shards each candidate should hold: its share rounded down, or up for those that have more than that
/// already, and then for whoever the hash prefers.
fn targets(candidates: &[Candidate], held: &[usize], shards: usize) -> Vec<usize> {
    let all: u64 = candidates.iter().map(|c| u64::from(c.capacity.max(1))).sum();
    let share = |c: &Candidate| shards as u64 * u64::from(c.capacity.max(1));
    let mut targets: Vec<usize> =
        candidates.iter().map(|c| usize::try_from(share(c) / all).unwrap_or(0)).collect();
    let left = shards - targets.iter().sum::<usize>();
    let mut order: Vec<Place> = (0..candidates.len()).filter(|p| share(&candidates[*p]) % all != 0).collect();
    order.sort_unstable_by(|a, b| {
        let keeps = |p: &Place| held[*p] > targets[*p];
        keeps(b)
            .cmp(&keeps(a))
            .then(score(&candidates[*b], shards).total_cmp(&score(&candidates[*a], shards)))
    });
    order.into_iter().take(left).for_each(|p| targets[p] += 1);
    targets
}

/// How much a candidate wants a shard: the highest wins it in proportion to its capacity.
fn score(candidate: &Candidate, shard: usize) -> f64 {
    let hash = derived([candidate.name.as_str(), &shard.to_string()]);
    let bits = hash[..8].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    // Between 0 and 1, neither included.
    let even = ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -f64::from(candidate.capacity.max(1)) / even.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARDS: usize = 1024;

    fn nodes(capacities: &[u32]) -> Vec<Candidate> {
        let named =
            |(n, capacity): (usize, &u32)| Candidate { name: format!("node-{n}"), capacity: *capacity };
        capacities.iter().enumerate().map(named).collect()
    }

    fn counts(candidates: &[Candidate], wishes: &[Option<Place>]) -> Vec<usize> {
        let mut counts = vec![0; candidates.len()];
        wishes.iter().for_each(|w| counts[w.unwrap()] += 1);
        counts
    }

    fn moved(before: &[Option<Place>], after: &[Option<Place>]) -> usize {
        before.iter().zip(after).filter(|(b, a)| b != a).count()
    }

    #[test]
    fn every_number_of_nodes_is_balanced_and_a_join_or_leave_moves_only_what_it_must() {
        let mut before: Vec<Option<Place>> = vec![None; SHARDS];
        for count in 1..=100 {
            let candidates = nodes(&vec![1; count]);
            let after = plan(&candidates, &before);
            let held = counts(&candidates, &after);
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            assert!(most - least <= 1, "{count} nodes: {least} to {most}");
            let fair = SHARDS as f64 / count as f64;
            assert!(*most as f64 <= fair * 1.1 && *least as f64 >= fair * 0.9, "{count}: {least} to {most}");
            if count > 1 {
                // The newcomer's share, and nothing else.
                assert_eq!(moved(&before, &after), held[count - 1], "{count} nodes");
            }
            assert_eq!(plan(&candidates, &after), after, "{count}: a plan that is fulfilled is at rest");
            before = after;
        }
        // One after the other they leave again.
        for count in (1..100).rev() {
            let orphaned: Vec<_> = before.iter().map(|p| p.filter(|p| *p < count)).collect();
            let after = plan(&nodes(&vec![1; count]), &orphaned);
            let orphans = orphaned.iter().filter(|p| p.is_none()).count();
            assert_eq!(moved(&orphaned, &after), orphans, "{count} nodes: only what was orphaned moves");
            before = after;
        }
    }

    #[test]
    fn capacity_is_a_share() {
        for (capacities, wanted) in [
            (vec![1, 1, 2], vec![256, 256, 512]),
            (vec![1, 3], vec![256, 768]),
            (vec![5, 5, 5, 1], vec![320, 320, 320, 64]),
            (vec![0, 1], vec![512, 512]),
        ] {
            let candidates = nodes(&capacities);
            let found = plan(&candidates, &vec![None; SHARDS]);
            assert_eq!(counts(&candidates, &found), wanted, "{capacities:?}");
        }
    }

    #[test]
    fn a_node_that_comes_back_is_given_much_of_what_it_had() {
        let candidates = nodes(&[1; 5]);
        let before = plan(&candidates, &vec![None; SHARDS]);
        let without: Vec<_> = before.iter().map(|p| p.filter(|p| *p != 4)).collect();
        let away = plan(&candidates[..4], &without);
        let back = plan(&candidates, &away);
        let (had, again) = (
            before.iter().filter(|p| **p == Some(4)).count(),
            before.iter().zip(&back).filter(|(b, a)| **b == Some(4) && b == a).count(),
        );
        assert!(again * 2 > had, "{again} of {had}");
        assert_eq!(plan(&[], &before), vec![None; SHARDS], "nobody is there");
    }

    #[test]
    fn more_nodes_than_shards_leave_some_with_nothing() {
        let candidates = nodes(&[1; 10]);
        let found = plan(&candidates, &[None; 4]);
        let held = counts(&candidates, &found);
        assert_eq!((held.iter().sum::<usize>(), *held.iter().max().unwrap()), (4, 1));
    }
}
