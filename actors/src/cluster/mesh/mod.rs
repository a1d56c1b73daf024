//! The mesh: what nodes of a cluster say to each other, over gRPC streams.
//!
//! Every node calls every other: its requests go one way of the stream and their answers the other. There are [`LANES`]
//! lanes to a peer, each a connection of its own, picked by shard, so that one shard that is slow holds back only its own
//! callers. Envelopes that are ready together go out together. A lane that breaks gives back whatever was not answered,
//! in order, and is made again for as long as the map names its peer.
//!
//! Bound: [`LANE_QUEUE_MAX`] requests of a lane wait to go out and [`UNANSWERED_MAX`] to be answered; past that commands wait in
//! the [`Switch`], which has bounds of its own.

mod link;
mod serve;
mod tls;
mod wire;

#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod proto {
    tonic::include_proto!("patchbay.mesh.v1");
}

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use super::map::{Incarnation, ShardMap};
use super::switch::{Local, Parcel, Switch, Transport};
use link::Lane;

/// Lanes to a peer.
pub const LANES: u32 = 2;
/// Requests of a lane that wait to go out.
pub const LANE_QUEUE_MAX: usize = 4_096;
/// Requests of a lane that are not answered.
pub const UNANSWERED_MAX: usize = 16_384;
/// The version of the protocol that is spoken here. A peer of another one is spoken to by the lower of both.
const VERSION: u32 = 1;
/// Envelopes that go out together.
const ENVELOPES_MAX: usize = 256;
/// The largest message of the stream.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

pub use tls::MeshTls;

/// Who speaks, and to whom.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster's name.
    pub cluster: String,
    /// How many shards it has.
    pub shards: u32,
    /// How its nodes are known; none: whoever can connect is one.
    pub tls: Option<MeshTls>,
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
}

/// The links of a node.
pub struct Mesh {
    identity: Identity,
    switch: Arc<Switch>,
    here: Weak<dyn Here>,
    peers: Mutex<HashMap<Incarnation, Peer>>,
    serving: Mutex<Option<AbortHandle>>,
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
    /// Serves other nodes at `listener`, and reaches them as the map names them.
    pub fn start(
        identity: Identity,
        listener: TcpListener,
        switch: Arc<Switch>,
        here: Weak<dyn Here>,
    ) -> Arc<Self> {
        let serving = tokio::spawn(serve::serve(identity.clone(), listener, here.clone()));
        let serving = Mutex::new(Some(serving.abort_handle()));
        Arc::new(Self { identity, switch, here, peers: Mutex::default(), serving })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Incarnation, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaches whoever this map names, and nobody else any more.
    pub fn follow(&self, map: &ShardMap) {
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
                        Lane::start(self.identity.clone(), to, self.switch.clone(), self.here.clone())
                    })
                    .collect(),
            });
        }
        drop(peers);
        gone.iter().flat_map(|peer| &peer.lanes).for_each(|lane| lane.end());
    }

    /// Peers whose every lane is up.
    pub fn connected(&self) -> usize {
        self.lock().values().filter(|peer| peer.lanes.iter().all(|lane| lane.is_up())).count()
    }
}

impl Transport for Mesh {
    fn send(&self, to: Incarnation, parcel: Parcel) -> Result<(), Parcel> {
        let shard = parcel.entity().shard(self.identity.shards);
        let lane = self.lock().get(&to).and_then(|peer| peer.lanes.get((shard % LANES) as usize).cloned());
        match lane {
            Some(lane) => lane.send(shard, parcel),
            None => Err(parcel),
        }
    }
}
