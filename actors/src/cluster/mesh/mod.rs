//! The mesh: what nodes of a cluster say to each other, over gRPC streams.
//!
//! Every node calls every other: its requests go one way of the stream and their answers the other. There are [`LANES`]
//! lanes to a peer, each a connection of its own, picked by shard, so that one shard that is slow holds back only its own
//! callers. Envelopes that are ready together go out together. A lane that breaks gives back whatever was not answered,
//! in order, and is made again for as long as the map names its peer.
//!
//! What a peer waits for is registered over its own lane, and is published back over it, in order; it is forgotten with
//! the lane, so that a lane that was made again is registered over anew.
//!
//! Bound: [`LANE_QUEUE_MAX`] requests of a lane wait to go out and [`UNANSWERED_MAX`] to be answered; past that commands wait in
//! the [`Switch`], which has bounds of its own. [`WINDOW`] registrations of a lane are not answered, and [`OUTLET_BYTES_MAX`] of
//! publications wait for it; past that its peer is told how far their topics reach.

mod link;
mod network;
mod outlet;
mod serve;
mod tls;
mod wire;

#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod proto {
    tonic::include_proto!("patchbay.mesh.v1");
}

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::future::join_all;
use patchbay_protocol::ids::TenantId;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::map::{Incarnation, ShardMap};
use super::switch::{Local, Parcel, Switch, Transport, Turn};
use crate::fanout::{Aside, Home, Interest, Outlet, Topic, Watches};
use crate::node::Counters;
use crate::ports::Publisher;
use link::Lane;

/// Lanes to a peer.
pub const LANES: u32 = 2;
/// Requests of a lane that wait to go out.
pub const LANE_QUEUE_MAX: usize = 4_096;
/// Requests of a lane that are not answered.
pub const UNANSWERED_MAX: usize = 16_384;
/// The version of the protocol that is spoken here. A peer of another one is spoken to by the lower of both.
pub const VERSION: u32 = 3;
/// The version since which publications travel as runs.
const RUNS_SINCE: u32 = 2;
/// Registrations of a lane that are not answered.
pub const WINDOW: usize = 256;
/// Envelopes that go out together.
const ENVELOPES_MAX: usize = 256;
/// The largest message of the stream.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Nodes that a node asks whether it is one of them, before it is given shards.
const ASKED_MAX: usize = 8;
/// What may be under way to whoever does not read: of a stream and of its connection; and what goes in one frame.
const WINDOW_BYTES: u32 = 4 << 20;
const FRAME_BYTES: u32 = 1 << 20;

pub use link::WORDS_MAX;
pub use network::{Connection, Network, Stream, Tcp};
pub use outlet::OUTLET_BYTES_MAX;
pub use tls::MeshTls;

/// Who speaks, and to whom.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster's name.
    pub cluster: String,
    /// How many shards it has.
    pub shards: u32,
    /// The highest version of the protocol that is spoken.
    pub version: u32,
    /// How its nodes are known; none: whoever can connect is one.
    pub tls: Option<MeshTls>,
}

impl Identity {
    /// Why a node that others reach by `address` has no place among them, if so. Those that are not reached are not asked.
    pub async fn stranger(&self, network: &dyn Network, address: &str, others: &[String]) -> Option<String> {
        let tls = self.tls.as_ref()?;
        if let Some(why) = tls.stranger(address).await {
            return Some(why);
        }
        let asked = others.iter().take(ASKED_MAX).map(|other| tls.is_taken(network, other));
        let answers: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
        // One that takes it is enough: others may have been given new files at another moment.
        if answers.iter().any(Result::is_ok) { None } else { answers.into_iter().find_map(Result::err) }
    }
}

/// What the mesh has to know of its node.
pub trait Here: Local {
    /// Which incarnation this is, at present.
    fn incarnation(&self) -> Incarnation;

    /// Takes a command that came from another node: for an entity here, or one whose shard is about to be opened here. It
    /// comes back when it is neither.
    fn take(&self, parcel: Parcel) -> Result<(), Parcel>;

    /// A peer knows a newer version of the map.
    fn heard(&self, version: u64);

    /// Which nodes wait for what is published here.
    fn interest(&self) -> &Arc<Interest>;

    /// What this node's sockets wait for.
    fn watches(&self) -> &Arc<Watches>;

    /// A node waits for a topic under an epoch; `check`: it is told how far the topic reaches.
    fn watch(&self, topic: Topic, epoch: u32, check: bool, outlet: Arc<dyn Outlet>);

    /// How busy this node is.
    fn counters(&self) -> Counters;

    /// How busy another one says that it is.
    fn counted(&self, who: Incarnation, counters: Counters);

    /// Shows what is published elsewhere.
    fn publisher(&self) -> &dyn Publisher;

    /// The documents of a tenant have changed.
    fn changed(&self, tenant: TenantId);
}

/// The links of a node.
pub struct Mesh {
    identity: Identity,
    network: Arc<dyn Network>,
    switch: Arc<Switch>,
    here: Weak<dyn Here>,
    peers: Mutex<HashMap<Incarnation, Peer>>,
    serving: Mutex<Option<AbortHandle>>,
    /// Changes with every version of the map that is known here.
    versions: watch::Sender<u64>,
}

struct Peer {
    address: String,
    lanes: Vec<Arc<Lane>>,
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mesh").field("peers", &self.lock().len()).finish_non_exhaustive()
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take();
        serving.inspect(AbortHandle::abort);
    }
}

impl Mesh {
    /// Serves other nodes over `network`, and reaches them as the map names them.
    pub fn start(
        identity: Identity,
        network: Arc<dyn Network>,
        switch: Arc<Switch>,
        here: Weak<dyn Here>,
    ) -> Arc<Self> {
        let versions = watch::Sender::new(0);
        let serves = serve::serve(identity.clone(), network.clone(), here.clone(), versions.subscribe());
        let serving = Mutex::new(Some(tokio::spawn(serves).abort_handle()));
        Arc::new(Self { identity, network, switch, here, peers: Mutex::default(), serving, versions })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Incarnation, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaches whoever this map names, and nobody else any more; and tells them which version is known here.
    pub fn follow(&self, version: u64, map: &ShardMap) {
        self.versions.send_replace(version);
        let Some(me) = self.here.upgrade().map(|here| here.incarnation()) else { return };
        let mut peers = self.lock();
        let gone = |(incarnation, peer): (&Incarnation, &Peer)| {
            let member = map.members.get(incarnation);
            (member.and_then(|m| m.mesh.as_ref()) != Some(&peer.address)).then_some(*incarnation)
        };
        let gone: Vec<Incarnation> = peers.iter().filter_map(gone).collect();
        let gone: Vec<Peer> = gone.iter().filter_map(|incarnation| peers.remove(incarnation)).collect();
        for (incarnation, member) in map.members.iter().filter(|(n, _)| **n != me) {
            let Some(address) = &member.mesh else { continue };
            peers.entry(*incarnation).or_insert_with(|| Peer {
                address: address.clone(),
                lanes: (0..LANES)
                    .map(|lane| {
                        let to = link::To { incarnation: *incarnation, address: address.clone(), lane };
                        let versions = self.versions.subscribe();
                        Lane::start(
                            self.identity.clone(),
                            self.network.clone(),
                            to,
                            self.switch.clone(),
                            self.here.clone(),
                            versions,
                        )
                    })
                    .collect(),
            });
        }
        drop(peers);
        gone.iter().flat_map(|peer| &peer.lanes).for_each(|lane| lane.end());
    }

    fn lane(&self, to: Incarnation, shard: u32) -> Option<Arc<Lane>> {
        self.lock().get(&to).and_then(|peer| peer.lanes.get((shard % LANES) as usize).cloned())
    }

    /// Registers with a peer. False: it cannot be told now.
    pub(crate) fn register(&self, at: Home, shard: u32, topic: &Topic, check: bool) -> bool {
        self.lane(at.who, shard).is_some_and(|lane| lane.register(topic, at.epoch, check))
    }

    /// Takes a registration back, if the peer can be told.
    pub(crate) fn withdraw(&self, at: Incarnation, shard: u32, topic: &Topic) {
        self.lane(at, shard).inspect(|lane| lane.withdraw(topic));
    }

    /// Tells the owner of a topic something beside its order, if it can be told.
    pub(crate) fn aside(&self, to: Incarnation, shard: u32, topic: &Topic, aside: &Aside) {
        self.lane(to, shard).inspect(|lane| lane.aside(topic, aside));
    }

    /// Tells every peer that a tenant's documents have changed. One that cannot be told looks by itself.
    pub fn tell_changed(&self, tenant: &TenantId) {
        let peers = self.lock();
        peers.values().filter_map(|peer| peer.lanes.first()).for_each(|lane| lane.changed(tenant));
    }

    /// Asks a peer something that no other node could answer; what is asked of one lane is handed over there in order. It
    /// comes back when there is no such peer, or it cannot be told now.
    pub(crate) fn ask(&self, to: Incarnation, parcel: Parcel) -> Result<(), Parcel> {
        match self.lane(to, parcel.shard(self.identity.shards)) {
            Some(lane) => lane.send(parcel, None),
            None => Err(parcel),
        }
    }

    /// Peers whose every lane is up.
    pub fn connected(&self) -> usize {
        self.lock().values().filter(|peer| peer.lanes.iter().all(|lane| lane.is_up())).count()
    }
}

impl Transport for Mesh {
    fn send(&self, to: Incarnation, parcel: Parcel, turn: Turn) -> Result<(), Parcel> {
        let shard = parcel.shard(self.identity.shards);
        match self.lane(to, shard) {
            Some(lane) => lane.send(parcel, Some((shard, turn))),
            None => Err(parcel),
        }
    }
}
