//! Membership at work: real requests and a real clock around [`super::member`].
//!
//! One task asks and is answered, on a thread of its own where there is one ([`Apart`]); what leaves the node is guarded by
//! [`Membership::standing`], which reads the clock.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use patchbay_storage::{Engine, WriteError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};

use super::host::Action;
use super::lease::{Beat, Lease, Standing, Tick};
use super::map::{Incarnation, Member, ShardMap};
use super::member::{Ask, Node, Told};
use super::mesh::{self, MeshTls};
use super::store::Store;
use super::ticks::Ticks;

/// Between two looks whether there is something to ask.
const LOOK_MIN: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_secs(60);
/// What happened to shards and was not heard yet: three words of each, in a cluster of many.
const TOLD_MAX: usize = 65_536;
/// What is to be done about shards and was not begun yet. A node that is further behind ends its incarnation.
const ACTIONS_MAX: usize = 65_536;
/// Between two tries to come into the cluster.
const JOIN_PAUSE: Duration = Duration::from_millis(200);

/// Where a lease is kept when it is not to wait for whatever else its node does.
#[derive(Clone)]
pub struct Apart {
    /// A way to the store of its own.
    pub engine: Arc<dyn Engine>,
    /// Of a thread of its own, where that way's tasks live as well.
    pub runtime: Handle,
}

impl std::fmt::Debug for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Apart").finish_non_exhaustive()
    }
}

/// What a node brings into its cluster.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The cluster's name.
    pub name: String,
    /// How its nodes are known to each other.
    pub tls: Option<MeshTls>,
    /// Itself.
    pub member: Member,
    /// How long a lease lives that is not renewed.
    pub ttl: Duration,
    /// Shards on the move at once.
    pub moves_max: usize,
    /// What time it is, for leases.
    pub ticks: Ticks,
    /// The highest version of the mesh's protocol that it speaks.
    pub speaks: u32,
    /// Where its lease is kept; none: where everything else is.
    pub apart: Option<Apart>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            name: "patchbay".into(),
            tls: None,
            member: Member { name: "node".into(), mesh: None, capacity: 1, draining: false },
            ttl: Duration::from_millis(2500),
            moves_max: 16,
            ticks: Ticks::Boot,
            speaks: mesh::VERSION,
            apart: None,
        }
    }
}

/// A node's membership in its cluster.
pub struct Membership {
    incarnation: Incarnation,
    store: Arc<Store>,
    ticks: Ticks,
    /// Nanoseconds of the clock until when the lease is held.
    until: AtomicU64,
    fenced: AtomicBool,
    told: mpsc::Sender<Told>,
    map: watch::Receiver<(u64, Arc<ShardMap>)>,
    /// Changes whenever a lease that had lapsed is renewed, or has ended.
    stands: watch::Sender<u64>,
    leaves: Arc<Notify>,
    ended: watch::Receiver<bool>,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership")
            .field("incarnation", &self.incarnation)
            .field("standing", &self.standing())
            .finish_non_exhaustive()
    }
}

fn nanos(tick: Tick) -> u64 {
    u64::try_from(tick.as_nanos()).unwrap_or(u64::MAX)
}

impl Membership {
    /// Comes into the cluster as a new incarnation. What is to be done about shards comes by the channel, in order.
    pub async fn join(
        incarnation: Incarnation,
        config: &ClusterConfig,
        store: Store,
        first: ShardMap,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Action>), WriteError> {
        let ticks = config.ticks;
        let beat = Beat { writer: rand::random(), n: 1 };
        let sent = ticks.now();
        store.begin(incarnation, beat).await?;
        let map = loop {
            match store.map(|| first.clone()).await {
                Some(map) => break map,
                None => tokio::time::sleep(JOIN_PAUSE).await,
            }
        };
        // Nobody can take over from whoever is alone.
        let ttl = if store.is_alone() { Duration::from_secs(u64::from(u32::MAX)) } else { config.ttl };
        let lease = Lease::new(ttl, beat, sent);
        let (told, hears) = mpsc::channel(TOLD_MAX);
        let (actions, acts) = mpsc::channel(ACTIONS_MAX);
        let (shows, shown) = watch::channel((map.0, Arc::new(map.1.clone())));
        let leaves = Arc::<Notify>::default();
        let (ends, ended) = watch::channel(false);
        let store = Arc::new(store);
        let membership = Arc::new(Self {
            incarnation,
            store: store.clone(),
            ticks,
            until: AtomicU64::new(nanos(lease.until())),
            fenced: AtomicBool::new(false),
            told,
            map: shown,
            stands: watch::Sender::new(0),
            leaves: leaves.clone(),
            ended,
        });
        let node =
            Node::new((incarnation, config.member.clone()), lease, map, ttl, config.moves_max, ticks.now());
        let runs = Runs {
            membership: Arc::downgrade(&membership),
            store,
            node,
            ticks,
            first,
            hears,
            actions,
            shows,
            leaves,
            asks: FuturesUnordered::new(),
        };
        let kept = config.apart.as_ref().map_or_else(Handle::current, |apart| apart.runtime.clone());
        kept.spawn(async move {
            runs.run().await;
            ends.send_replace(true);
        });
        Ok((membership, acts))
    }

    /// This start's number.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// How the node stands at this instant.
    pub fn standing(&self) -> Standing {
        if self.fenced.load(Ordering::Acquire) {
            Standing::Fenced
        } else if nanos(self.ticks.now()) < self.until.load(Ordering::Acquire) {
            Standing::Held
        } else {
            Standing::Suspended
        }
    }

    /// Waits while the node is suspended. False: it is fenced.
    pub async fn is_held(&self) -> bool {
        loop {
            let mut stands = self.stands.subscribe();
            match self.standing() {
                Standing::Held => return true,
                Standing::Fenced => return false,
                // It ends with this.
                Standing::Suspended => stands.changed().await.unwrap_or_default(),
            }
        }
    }

    /// Whether an incarnation is marked dead, which it is for ever. False also when the store does not answer.
    pub async fn is_dead(&self, who: Incarnation) -> bool {
        who != self.incarnation && self.store.is_dead(who).await
    }

    /// The map as it is known here, with its version.
    pub fn map(&self) -> (u64, Arc<ShardMap>) {
        self.map.borrow().clone()
    }

    /// Tells of every map that is known from here on.
    pub fn maps(&self) -> watch::Receiver<(u64, Arc<ShardMap>)> {
        self.map.clone()
    }

    /// Tells it what has happened.
    pub async fn tell(&self, told: Told) {
        // One that has ended needs to know nothing any more.
        let _ = self.told.send(told).await;
    }

    /// A newer version of the map was heard of. What is not heard now is heard with the next beat.
    pub fn hear(&self, version: u64) {
        let _ = self.told.try_send(Told::Heard(version));
    }

    /// Ends the lease, so that others need not wait for it to lapse. Nothing may be under way any more.
    pub async fn leave(&self) {
        self.fenced.store(true, Ordering::Release);
        self.stands.send_modify(|n| *n += 1);
        self.leaves.notify_one();
        let mut ended = self.ended.clone();
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

type Asking = Pin<Box<dyn Future<Output = Told> + Send>>;

struct Runs {
    membership: Weak<Membership>,
    store: Arc<Store>,
    node: Node,
    ticks: Ticks,
    first: ShardMap,
    hears: mpsc::Receiver<Told>,
    actions: mpsc::Sender<Action>,
    shows: watch::Sender<(u64, Arc<ShardMap>)>,
    leaves: Arc<Notify>,
    asks: FuturesUnordered<Asking>,
}

impl Runs {
    async fn run(mut self) {
        loop {
            let Some(membership) = self.membership.upgrade() else { return };
            if membership.fenced.load(Ordering::Acquire) {
                break;
            }
            drop(membership);
            for ask in self.node.poll(self.ticks.now()) {
                let asking = self.ask(ask);
                self.asks.push(asking);
            }
            let now = self.ticks.now();
            let wait = self.node.next(now).saturating_sub(now).clamp(LOOK_MIN, LOOK_MAX);
            let told = tokio::select! {
                Some(told) = self.asks.next() => told,
                told = self.hears.recv() => match told {
                    Some(told) => told,
                    // Nobody holds it any more: the node was dropped.
                    None => return,
                },
                () = self.leaves.notified() => continue,
                () = tokio::time::sleep(wait) => continue,
            };
            self.hear(told);
            // What was told together is taken together.
            while let Ok(told) = self.hears.try_recv() {
                self.hear(told);
            }
        }
        if self.node.standing(self.ticks.now()) != Standing::Fenced {
            let (me, beat) = self.node.beat();
            self.store.mark(me, beat).await;
        }
    }

    fn hear(&mut self, told: Told) {
        let version = self.node.map().0;
        for action in self.node.told(self.ticks.now(), told) {
            if self.actions.try_send(action).is_err() {
                tracing::error!("the shards of this node are not kept any more: its incarnation ends");
                if let Some(membership) = self.membership.upgrade() {
                    membership.fenced.store(true, Ordering::Release);
                }
            }
        }
        let (now, map) = self.node.map();
        if now != version {
            self.store.keep(|who| map.members.contains_key(&who));
            self.shows.send_replace((now, Arc::new(map.clone())));
        }
        let Some(membership) = self.membership.upgrade() else { return };
        let was = membership.standing();
        membership.until.store(nanos(self.node.held_until()), Ordering::Release);
        if self.node.standing(self.ticks.now()) == Standing::Fenced {
            membership.fenced.store(true, Ordering::Release);
        }
        if was != membership.standing() {
            membership.stands.send_modify(|n| *n += 1);
        }
    }

    fn ask(&self, ask: Ask) -> Asking {
        let (store, me, sent) = (self.store.clone(), self.node.beat().0, self.ticks.now());
        let first = matches!(ask, Ask::ReadMap).then(|| self.first.clone());
        Box::pin(async move {
            match ask {
                Ask::Renew(renewal, version) => {
                    Told::Renewed(renewal, store.renew(me, renewal, version).await)
                }
                Ask::ReadOwn => Told::Own(store.lease(me).await.map(|(row, _)| row)),
                Ask::Watch(who) => Told::Watched(who, sent, store.lease(who).await),
                Ask::Mark(who, beat) => Told::Marked(who, store.mark(who, beat).await),
                Ask::ReadMap => {
                    Told::Map(store.map(|| first.unwrap_or_else(|| ShardMap::new(0, 0, 0))).await)
                }
                Ask::PutMap { expected, map } => Told::Put(store.put_map(expected, &map).await),
            }
        })
    }
}
