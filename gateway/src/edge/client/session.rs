//! What a connection is: not connected, live, or refused. Transitions name every state.

use std::collections::HashMap;
use std::sync::Arc;

use patchbay_protocol::Timestamp;
use patchbay_protocol::client::reply::ClientInfo;
use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::auth::{Claims, Peer};
use crate::hub::Topic;

/// A connection's life.
pub enum Session {
    /// Waits for `connect`.
    New,
    /// `connect` is being decided; what came behind it waits.
    Connecting,
    /// Connected.
    Live(Box<Live>),
    /// `connect` was refused; everything is ignored until the client goes.
    Refused,
}

/// A connected client.
pub struct Live {
    /// Who, by the documents as they were when it was last asked.
    pub peer: Peer,
    /// The token that it connected or refreshed with.
    pub claims: Arc<Claims>,
    /// What others see of it.
    pub info: Arc<ClientInfo>,
    /// Rises with its tenant's documents; whoever serves the connection takes it.
    pub changes: Option<watch::Receiver<u64>>,
    /// A visitor's place among its sockets.
    pub place: Option<OwnedSemaphorePermit>,
    /// Subscriptions by channel.
    pub subscriptions: HashMap<String, Subscription>,
}

/// A subscription.
#[derive(Clone)]
pub struct Subscription {
    /// Of what.
    pub topic: Topic,
    /// Whether others were told that it came.
    pub announced: bool,
}

impl Live {
    /// When the connection must have been refreshed.
    pub fn expires(&self) -> Option<Timestamp> {
        self.claims.exp.map(Timestamp::from_seconds)
    }
}
