//! What a node does for the shards that it holds, beside their entities: opens them, wakes what earlier reigns left,
//! fires timers, moves marks, and lets them go.
//!
//! Guarantee: of a shard that is let go nothing is written under the reign that has ended, and whatever was asked of it
//! and not answered is handed back.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::ReadError;
use patchbay_storage::tables::{Mark, Tables, Timer, hour_of};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::cluster::host::Action;
use crate::cluster::map::{Incarnation, ShardMap};
use crate::cluster::member::Told;
use crate::cluster::runtime::Membership;
use crate::node::{Node, WAKE_AT_ONCE};
use crate::shard::activity::unsettled;
use crate::shard::{Reign, Shards};

/// Shards read at once.
const SHARDS_READ_AT_ONCE: usize = 64;
/// Between two moves of the marks over what is settled: a mark that moved with every bucket would be a row for each
/// message of a quiet shard.
const SETTLE_LOOK: Duration = Duration::from_secs(20);
/// Between two looks whether what earlier reigns left is published.
const PUBLISHED_LOOK: Duration = Duration::from_millis(250);
/// Between two words of how the cluster is.
const SHOW_CLUSTER_EVERY: Duration = Duration::from_secs(1);
/// Between two tries of what the store or an entity did not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// The same of a shard that is to be opened.
const OPEN_PAUSE: Duration = Duration::from_millis(200);
/// Timers are looked at least this often.
const TIMER_LOOK: Duration = Duration::from_secs(60);
/// A shard that is to go is made ready for that for so long, while it is served; and looked at so often meanwhile.
const PREPARE_PATIENCE: Duration = Duration::from_millis(500);
const PREPARE_LOOK: Duration = Duration::from_millis(25);
/// What was used within this is in use.
const PREPARE_QUIET: Duration = Duration::from_millis(500);
/// Calls to providers that were begun are waited for so long, while the shard is served; what is left then is `unknown` to its
/// next owner.
const CALLS_PATIENCE: Duration = Duration::from_secs(5);
/// A shard that is to go waits this long for what is under way; what is left then is its successor's.
const STOP_PATIENCE: Duration = Duration::from_millis(100);
/// Shards that are ready to go, and go together.
const LEAVING_MAX: usize = 1_024;
/// Between two looks whether that has ended.
const STOP_LOOK: Duration = Duration::from_millis(2);
/// A node that ends waits this long for the map to say that nothing is left to do.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

/// What is wanted of shards, and who waits for it.
#[derive(Default)]
struct Wanted {
    /// Shards that are to be open, and under which epoch.
    open: Mutex<HashMap<u32, u32>>,
    /// Changes with every reign that begins.
    begun: watch::Sender<u64>,
}

impl Wanted {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, u32>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins to keep the shards of a node. Whoever is alone has all of them when this returns.
pub(crate) async fn start(node: &Arc<Node>, actions: mpsc::Receiver<Action>) {
    let hour = hour_of(node.shards().clock.now());
    node.shards().timers.reads_up_to(hour + 1);
    let wanted = Arc::<Wanted>::default();
    tokio::spawn(follow(Arc::downgrade(node)));
    tokio::spawn(keep(Arc::downgrade(node), actions, wanted.clone()));
    tokio::spawn(sweep(Arc::downgrade(node), wanted.clone()));
    tokio::spawn(move_settled(Arc::downgrade(node)));
    tokio::spawn(run_timers(Arc::downgrade(node), hour));
    tokio::spawn(tell_of_sockets(Arc::downgrade(node)));
    tokio::spawn(show_cluster(Arc::downgrade(node)));
    if node.is_alone() {
        let all = node.shards().count as usize;
        let mut begun = wanted.begun.subscribe();
        // It ends with this node.
        let _ = begun.wait_for(|_| node.shards().reigns().count() >= all).await;
    }
}

/// Does what the map says, until this incarnation ends; then the node comes into the cluster as another one.
async fn keep(node: Weak<Node>, mut actions: mpsc::Receiver<Action>, wanted: Arc<Wanted>) {
    let places = Arc::new(Semaphore::new(SHARDS_READ_AT_ONCE));
    loop {
        let Some(membership) = node.upgrade().and_then(|n| n.membership()) else { return };
        let (leaves, leaving) = mpsc::channel(LEAVING_MAX);
        tokio::spawn(release(node.clone(), membership.clone(), leaving));
        while let Some(action) = actions.recv().await {
            let Some(strong) = node.upgrade() else { return };
            match action {
                Action::Open(shard, epoch, settled) => {
                    wanted.lock().insert(shard, epoch);
                    let reign = Reign::new(shard, epoch, settled, strong.shards().clock);
                    let reign = reign.under(membership.clone());
                    let (node, wanted, places) = (node.clone(), wanted.clone(), places.clone());
                    tokio::spawn(open(node, membership.clone(), reign, wanted, places));
                }
                Action::Stop(shard) => {
                    let Some(epoch) = wanted.lock().remove(&shard) else { continue };
                    let (membership, leaves) = (membership.clone(), leaves.clone());
                    tokio::spawn(async move {
                        let Some(reign) = strong.shards().reign(shard).filter(|r| r.epoch() == epoch) else {
                            // Nothing of it was begun.
                            membership.tell(Told::Stopped(vec![(shard, epoch)])).await;
                            return;
                        };
                        let asked = Instant::now();
                        prepare(&strong, &reign).await;
                        took("prepare", asked);
                        // It ends with this incarnation.
                        let _ = leaves.send(reign).await;
                    });
                }
                Action::Abandon(shard) => {
                    wanted.lock().remove(&shard);
                    let_go(&strong, shard);
                }
            }
        }
        let Some(strong) = node.upgrade() else { return };
        wanted.lock().clear();
        (0..strong.shards().count).for_each(|shard| let_go(&strong, shard));
        // Whoever leaves does not come back.
        if strong.is_leaving() {
            return;
        }
        tracing::warn!(incarnation = membership.incarnation(), "the cluster went on without this node");
        actions = loop {
            match strong.join().await {
                Ok(actions) => break actions,
                Err(error) => tracing::warn!(%error, "the node cannot come back yet"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        };
        let again = node.clone();
        tokio::spawn(async move {
            if let Some(strong) = again.upgrade() {
                strong.tell_all_open().await;
            }
        });
    }
}

/// Shows operators how the cluster is.
async fn show_cluster(node: Weak<Node>) {
    loop {
        tokio::time::sleep(SHOW_CLUSTER_EVERY).await;
        let Some(strong) = node.upgrade() else { return };
        strong.show_cluster();
    }
}

/// Tells of agents' sockets of which their owners could not be told when they closed, or when this node became another
/// incarnation.
async fn tell_of_sockets(node: Weak<Node>) {
    loop {
        tokio::time::sleep(RETRY_PAUSE).await;
        let Some(strong) = node.upgrade() else { return };
        strong.tell_all_closed().await;
        strong.tell_unknown().await;
    }
}

/// Sends on what waits whenever the map says something new.
async fn follow(node: Weak<Node>) {
    loop {
        let Some(mut maps) = node.upgrade().and_then(|n| n.membership()).map(|m| m.maps()) else { return };
        maps.mark_changed();
        let mut members = HashSet::new();
        while maps.changed().await.is_ok() {
            let Some(strong) = node.upgrade() else { return };
            let (version, map) = maps.borrow_and_update().clone();
            let now: HashSet<Incarnation> = map.members.keys().copied().collect();
            if std::mem::replace(&mut members, now).iter().any(|n| !map.members.contains_key(n)) {
                strong.look_at_agents();
            }
            if let Some(mesh) = strong.mesh() {
                mesh.follow(version, &map);
            }
            strong.switch().all_moved();
            strong.watches().moved();
        }
        // This incarnation has ended; another one follows.
        tokio::time::sleep(OPEN_PAUSE).await;
    }
}

/// Reads what is needed of a shard, and begins to serve it.
async fn open(
    node: Weak<Node>,
    membership: Arc<Membership>,
    mut reign: Reign,
    wanted: Arc<Wanted>,
    places: Arc<Semaphore>,
) {
    let (shard, epoch) = (reign.shard, reign.epoch());
    let named = Instant::now();
    loop {
        let Ok(_place) = places.acquire().await else { return };
        let Some(strong) = node.upgrade() else { return };
        if wanted.lock().get(&shard) != Some(&epoch) {
            return;
        }
        if read(strong.shards(), &mut reign).await.is_ok() {
            reign.opened_in(named.elapsed());
            took("open", named);
            if begin(&strong, reign, &wanted) {
                strong.switch().moved([shard]);
                strong.watches().moved();
                wanted.begun.send_modify(|n| *n += 1);
                membership.tell(Told::Opened(shard, epoch)).await;
            }
            return;
        }
        drop(strong);
        tokio::time::sleep(OPEN_PAUSE).await;
    }
}

/// Begins a reign, if it is still wanted.
fn begin(node: &Node, reign: Reign, wanted: &Wanted) -> bool {
    let (shard, epoch) = (reign.shard, reign.epoch());
    let open = wanted.lock();
    if open.get(&shard) != Some(&epoch) {
        return false;
    }
    // Whoever asks finds nobody of before, and nobody is asked before there is a reign.
    node.conversations().reopen(shard);
    node.accounts().reopen(shard);
    node.shards().begin(reign);
    if let Some(outbox) = node.outbox() {
        outbox.open(shard, epoch);
    }
    true
}

/// Writes what a shard's successor would have to write or to read again, while the shard is still served.
async fn prepare(node: &Arc<Node>, reign: &Reign) {
    // No call to a provider is left without its outcome; what is to be sent is taken meanwhile, and waits.
    reign.winds_up();
    let accounts = node.accounts().ids_in(reign.shard);
    let calls = join_all(accounts.iter().map(|id| node.calls_end(id)));
    let _ = tokio::time::timeout(CALLS_PATIENCE, calls).await;
    let until = Instant::now() + PREPARE_PATIENCE;
    // Whoever was asked writes first what is derived of it, and then its snapshot. Whoever is in use would be back at once,
    // and its next caller would have waited for that: how far it was confirmed is said when it stops.
    let asks = || {
        let conversations = node.conversations().passivate_in(reign.shard, PREPARE_QUIET);
        conversations + node.accounts().passivate_in(reign.shard, PREPARE_QUIET) > 0
    };
    while asks() && Instant::now() < until {
        tokio::time::sleep(PREPARE_LOOK).await;
    }
    if reign.is_swept()
        && let Some((from, mark)) = reign.activity.newly_settled()
    {
        settle(node, reign, from, mark).await;
    }
}

/// Lets shards go that are ready for it, all that are ready together: one change of the map releases them, and those
/// that are ready meanwhile are served until it is there.
async fn release(node: Weak<Node>, membership: Arc<Membership>, mut leaving: mpsc::Receiver<Arc<Reign>>) {
    let mut wave = Vec::new();
    while leaving.recv_many(&mut wave, LEAVING_MAX).await > 0 {
        let Some(strong) = node.upgrade() else { return };
        let is_there = |reign: &Arc<Reign>| {
            strong.shards().reign(reign.shard).is_some_and(|there| there.epoch() == reign.epoch())
        };
        wave.retain(is_there);
        let began = Instant::now();
        stop(&strong, &membership, &wave).await;
        took("stop", began);
        drop(strong);
        let stopped = Instant::now();
        let all: Vec<(u32, u32)> = wave.drain(..).map(|reign| (reign.shard, reign.epoch())).collect();
        let mut maps = membership.maps();
        membership.tell(Told::Stopped(all.clone())).await;
        let is_another = |map: &ShardMap, (shard, epoch): &(u32, u32)| {
            map.shards.get(*shard as usize).is_none_or(|slot| slot.epoch != *epoch)
        };
        // It ends with this incarnation.
        if maps.wait_for(|(_, map)| all.iter().all(|of| is_another(map, of))).await.is_err() {
            return;
        }
        took("release", stopped);
    }
}

/// Lets what is under way in shards end, and lets them go.
async fn stop(node: &Arc<Node>, membership: &Membership, wave: &[Arc<Reign>]) {
    for reign in wave {
        reign.leaves();
        node.conversations().close(reign.shard);
        node.accounts().close(reign.shard);
    }
    let until = Instant::now() + STOP_PATIENCE;
    // Whoever has nothing under way but what is derived of it leaves that to its successor.
    let acts = |reign: &Reign| node.conversations().acts_in(reign) || node.accounts().acts_in(reign);
    while wave.iter().any(|reign| acts(reign)) && Instant::now() < until {
        tokio::time::sleep(STOP_LOOK).await;
    }
    wave.iter().for_each(|reign| say_tips(node, reign));
    let is_left = |reign: &Reign| {
        node.conversations().active_in(reign.shard) + node.accounts().active_in(reign.shard) == 0
    };
    let ends = futures_util::stream::iter(wave.iter().filter(|reign| is_left(reign))).for_each_concurrent(
        WAKE_AT_ONCE,
        |reign| async move {
            if is_done(node, reign).await {
                membership.tell(Told::Settled(reign.shard, reign.epoch())).await;
            }
        },
    );
    // Where the store does not answer, the successor looks what is left to do.
    let _ = tokio::time::timeout_at(until, ends).await;
    for reign in wave {
        // It may be open again, under another incarnation of this node.
        if node.shards().reign(reign.shard).is_some_and(|there| there.epoch() == reign.epoch()) {
            let_go(node, reign.shard);
        }
    }
}

/// Writes how far logs are confirmed that were written until now, so that nobody writes them again. Whoever opens the shard
/// before it is there does.
fn say_tips(node: &Node, reign: &Reign) {
    let (tips, logs) = (reign.tips(), node.shards().logs.clone());
    if let (false, Ok(stamp)) = (tips.is_empty(), reign.stamp()) {
        let write = Tables::tips_write(reign.shard, stamp, &tips);
        tokio::spawn(async move { logs.write_if_room(write).await });
    }
}

/// What a part of a shard's move took.
fn took(step: &'static str, since: Instant) {
    metrics::histogram!("patchbay_shard_move_seconds", "step" => step).record(since.elapsed());
}

/// Whether nothing is left to do of a reign under which nobody acts any more.
async fn is_done(node: &Node, reign: &Reign) -> bool {
    if !reign.is_swept() {
        return false;
    }
    if let Some((from, mark)) = reign.activity.close() {
        settle(node, reign, from, mark).await;
    }
    reign.activity.is_settled()
}

/// Forgets everything of a shard, at once.
fn let_go(node: &Arc<Node>, shard: u32) {
    if node.shards().end(shard).is_none() {
        return;
    }
    node.conversations().close(shard);
    node.accounts().close(shard);
    node.close_soft(shard);
    node.interest().close(|topic| topic.shard(node.shards().count) == shard);
    node.shards().timers.forget(shard, node.shards().count);
    if let Some(outbox) = node.outbox() {
        outbox.close(shard);
    }
}

/// Ends every reign in order: whoever comes next has nobody to wake where nothing is left to do.
pub(crate) async fn finish(node: &Arc<Node>) {
    let Some(membership) = node.membership() else { return };
    node.conversations().close_all();
    node.accounts().close_all();
    let until = Instant::now() + STOP_PATIENCE;
    while node.active_count() > 0 && Instant::now() < until {
        tokio::time::sleep(STOP_LOOK).await;
    }
    let acts = |shard| node.conversations().active_in(shard) + node.accounts().active_in(shard) > 0;
    let quiet: Vec<Arc<Reign>> = node.shards().reigns().filter(|reign| !acts(reign.shard)).collect();
    let done: Vec<(u32, u32)> = futures_util::stream::iter(quiet)
        .map(|reign| async move { is_done(node, &reign).await.then_some((reign.shard, reign.epoch())) })
        .buffer_unordered(WAKE_AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    for (shard, epoch) in &done {
        membership.tell(Told::Settled(*shard, *epoch)).await;
    }
    let mut maps = membership.maps();
    let shown = maps.wait_for(|(_, map)| {
        done.iter().all(|(shard, epoch)| map.shards.get(*shard as usize).is_none_or(|s| s.settled >= *epoch))
    });
    // What the map does not say is looked for by whoever comes next.
    let _ = tokio::time::timeout(LEAVE_PATIENCE, shown).await;
    // Whatever waits here for where it is to go goes there while the map can still be followed.
    let until = Instant::now() + LEAVE_PATIENCE;
    while !node.switch().is_quiet() && Instant::now() < until {
        tokio::time::sleep(STOP_LOOK).await;
    }
    membership.leave().await;
}

/// Moves a shard's mark, and drops the buckets that it leaves.
async fn settle(node: &Node, reign: &Reign, from: u64, mark: Mark) {
    let Ok(stamp) = reign.stamp() else { return };
    let shards = node.shards();
    if shards.logs.write_if_room(Tables::mark_write(reign.shard, stamp, mark)).await.is_ok() {
        for bucket in from..mark.bucket {
            // What a lost drop leaves is read and found settled by the next sweep.
            let _ = shards.tables.drop_activity(reign.shard, Mark { bucket, ..mark }, stamp).await;
        }
    }
}

/// Moves the marks of shards whose buckets are settled, once everything of earlier reigns is in hand.
async fn move_settled(node: Weak<Node>) {
    loop {
        tokio::time::sleep(SETTLE_LOOK).await;
        let Some(strong) = node.upgrade() else { return };
        let moved: Vec<_> = strong
            .shards()
            .reigns()
            .filter(|reign| reign.is_swept() && reign.is_held_now())
            .filter_map(|reign| reign.activity.newly_settled().map(|(from, mark)| (reign, from, mark)))
            .collect();
        futures_util::stream::iter(&moved)
            .for_each_concurrent(WAKE_AT_ONCE, |(reign, from, mark)| settle(&strong, reign, *from, *mark))
            .await;
    }
}

/// A reign, and which entities of earlier ones have not answered yet; none: that is not known.
type Unswept = (Arc<Reign>, Option<HashSet<EntityId>>);

/// Wakes every entity that an earlier reign may have left with something to derive or hand on, until all have
/// answered; only then may marks of this one be written.
async fn sweep(node: Weak<Node>, wanted: Arc<Wanted>) {
    let mut left: HashMap<u32, Unswept> = HashMap::new();
    let mut begun = wanted.begun.subscribe();
    loop {
        begun.mark_unchanged();
        {
            let Some(strong) = node.upgrade() else { return };
            for reign in strong.shards().reigns().filter(|r| !r.is_swept()) {
                let is_new = left.get(&reign.shard).is_none_or(|(of, _)| of.epoch() != reign.epoch());
                if is_new {
                    left.insert(reign.shard, (reign, None));
                }
            }
            left.retain(|_, (reign, _)| reign.is_held_now());
            look(&strong, &mut left).await;
            wake(&strong, &mut left).await;
            end(&strong, &mut left).await;
        }
        let unanswered = left.values().any(|(_, l)| l.as_ref().is_none_or(|l| !l.is_empty()));
        let pause = if unanswered { RETRY_PAUSE } else { PUBLISHED_LOOK };
        let more = begun.changed();
        if left.is_empty() {
            // A node that is gone is noticed by the next look.
            let _ = tokio::time::timeout(RETRY_PAUSE, more).await;
        } else {
            let _ = tokio::time::timeout(pause, more).await;
        }
    }
}

/// Reads which entities of earlier reigns have activity that is not settled.
async fn look(node: &Node, left: &mut HashMap<u32, Unswept>) {
    let tables = &node.shards().tables;
    let unread: Vec<Arc<Reign>> =
        left.values().filter(|(_, l)| l.is_none()).map(|(r, _)| r.clone()).collect();
    let mut looks = futures_util::stream::iter(unread)
        .map(|reign| async move {
            let found = if reign.before().is_empty() {
                Ok(HashMap::new())
            } else {
                unsettled(tables, &reign, reign.mark, reign.before()).await
            };
            (reign.shard, found)
        })
        .buffer_unordered(SHARDS_READ_AT_ONCE);
    let mut entities = 0;
    while let Some((shard, found)) = looks.next().await {
        if let (Ok(found), Some((_, of))) = (found, left.get_mut(&shard)) {
            entities += found.len();
            *of = Some(found.into_keys().collect());
        }
    }
    if entities > 0 {
        tracing::info!(entities, "waking what an earlier reign left");
    }
}

async fn wake(node: &Node, left: &mut HashMap<u32, Unswept>) {
    let count = node.shards().count;
    let all: Vec<EntityId> =
        left.values_mut().filter_map(|(_, l)| l.as_mut()).flat_map(std::mem::take).collect();
    for id in node.wake_all(all).await {
        if let Some((_, Some(of))) = left.get_mut(&id.shard(count)) {
            of.insert(id);
        }
    }
}

/// Notes of whom everything earlier is in hand: woken entities have activity of this reign, which covers what they have
/// still to do.
async fn end(node: &Node, left: &mut HashMap<u32, Unswept>) {
    let Some(membership) = node.membership() else { return };
    let mut settled = Vec::new();
    left.retain(|shard, (reign, l)| {
        let woken = l.as_ref().is_some_and(HashSet::is_empty);
        let published = node.outbox().is_none_or(|outbox| outbox.has_caught_up(*shard));
        let done = woken && published;
        if done {
            reign.has_swept();
            if !reign.before().is_empty() {
                settled.push(Told::Settled(*shard, reign.epoch() - 1));
            }
        }
        !done
    });
    for told in settled {
        membership.tell(told).await;
    }
}

/// Fires timers. What fires looks, and does nothing when it has moved. One that is not answered fires again.
async fn run_timers(node: Weak<Node>, mut hour: i64) {
    let places = Arc::new(Semaphore::new(WAKE_AT_ONCE));
    loop {
        let Some(strong) = node.upgrade() else { return };
        let shards = strong.shards().clone();
        let timers = shards.timers.clone();
        let now = shards.clock.now();
        for Timer { entity, due } in timers.take_due(now) {
            let shard = entity.shard(shards.count);
            let (_, hold) = timers.hold(shard, due, now);
            let (node, places) = (Arc::downgrade(&strong), places.clone());
            tokio::spawn(async move {
                // Until it is acked its row is one that whoever comes after us reads.
                while let Some(strong) = node.upgrade().filter(|n| n.shards().reign(shard).is_some()) {
                    let Ok(place) = places.acquire().await else { break };
                    let woken = strong.wake(&entity).await;
                    drop((place, strong));
                    if woken {
                        break;
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                drop(hold);
            });
        }
        if hour_of(now) > hour {
            match read_hours(&shards, hour + 2, hour_of(now) + 1).await {
                Ok(()) => hour = hour_of(now),
                Err(_) => tracing::warn!("timers of the next hour cannot be read yet"),
            }
        }
        move_marks(&shards, hour).await;
        drop(strong);
        let next = timers.next_due().map_or(TIMER_LOOK, |at| at.since(shards.clock.now())).min(TIMER_LOOK);
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            () = timers.changed() => {}
        }
    }
}

/// Reads the mark that earlier reigns of a shard left, and its timers in every hour that has not been left. Before any of
/// its entities can arm another.
async fn read(shards: &Shards, reign: &mut Reign) -> Result<(), ReadError> {
    let (tables, timers, shard) = (&shards.tables, &shards.timers, reign.shard);
    let marks = tables.marks(shard).await?;
    reign.mark = marks.settled;
    reign.told = marks.tips.into_iter().collect();
    let Some(from) = marks.fired_until else { return Ok(()) };
    timers.marked(shard, from);
    // Whoever reads further hours now reads them of this shard as well.
    let now = shards.clock.now();
    for hour in from..=timers.read_up_to() {
        for timer in tables.timers(shard, hour).await? {
            if let EntityId::Agent(..) = timer.entity {
                // Whoever it is on may be gone with its owner before.
                timers.arm(Timer { entity: timer.entity.clone(), due: timer.due.min(now) });
            }
            timers.arm(timer);
        }
    }
    Ok(())
}

/// Reads the timers of hours that have come near.
async fn read_hours(shards: &Shards, from: i64, to: i64) -> Result<(), ReadError> {
    let (tables, timers) = (&shards.tables, &shards.timers);
    timers.reads_up_to(to);
    for shard in timers.marked_shards() {
        for hour in from..=to {
            for timer in tables.timers(shard, hour).await? {
                timers.arm(timer);
            }
        }
    }
    Ok(())
}

/// Leaves the hours in which nothing is under way any more.
async fn move_marks(shards: &Shards, present: i64) {
    let (tables, timers) = (&shards.tables, &shards.timers);
    for (shard, from, to) in timers.movable(present) {
        let Some(reign) = shards.reign(shard).filter(|r| r.is_held_now()) else { continue };
        let Ok(stamp) = reign.stamp() else { continue };
        shards.logs.write_until_answered(Tables::fired_write(shard, stamp, to)).await;
        timers.marked(shard, to);
        for hour in from..to {
            // What a lost drop leaves is never read again.
            let _ = tables.drop_timers(shard, hour, stamp).await;
        }
    }
}
