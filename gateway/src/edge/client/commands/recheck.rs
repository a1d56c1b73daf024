//! The documents have changed: an agent may have lost an inbox, or its tokens.

use std::sync::Arc;

use patchbay_protocol::Disconnect;

use super::super::Sockets;
use super::super::connection::{Change, Connection, Done, unsubscribe_push};
use super::super::lanes::{Half, Later};
use super::super::session::Session;
use crate::auth::{Claims, Peer, Refusal};
use crate::hub::Topic;

/// The code that ends a subscription for good.
const UNSUBSCRIBED_BY_SERVER: u32 = 2000;

/// What the documents say now.
pub struct Rechecked {
    peer: Peer,
    /// Topics that it may no longer have.
    lost: Vec<Topic>,
}

pub(crate) fn run(sockets: Arc<Sockets>, claims: Arc<Claims>, topics: Vec<Topic>) -> Later<Half<Done>> {
    Box::pin(async move {
        let change = match sockets.auth.peer(&claims).await {
            Ok(peer) => {
                let mut lost = Vec::new();
                for topic in topics {
                    let now = super::topic(&sockets, &peer, &topic.channel()).await;
                    match now {
                        Err(e) if e.code.is_temporary() => {
                            return Half::Done(Done { id: 0, reply: None, change: Change::RecheckLater });
                        }
                        Err(_) => lost.push(topic),
                        Ok(_) => {}
                    }
                }
                Change::Rechecked(Box::new(Rechecked { peer, lost }))
            }
            Err(Refusal::Unavailable) => Change::RecheckLater,
            Err(Refusal::Revoked | Refusal::Invalid | Refusal::Expired | Refusal::NotAvailable) => {
                Change::Close(Disconnect::ForceNoReconnect)
            }
        };
        Half::Done(Done { id: 0, reply: None, change })
    })
}

pub(crate) fn apply(connection: &mut Connection, rechecked: Rechecked) {
    let Session::Live(live) = &mut connection.session else { return };
    live.peer = rechecked.peer;
    for topic in rechecked.lost {
        let Some(subscription) = live.subscriptions.remove(&topic.channel()) else { continue };
        if connection.sockets.hub.leave(&topic, connection.client) {
            connection.outbound.reply(&unsubscribe_push(
                topic.channel(),
                UNSUBSCRIBED_BY_SERVER,
                "permission denied",
            ));
            if subscription.announced {
                connection.sockets.hub.announce(&topic, false, &live.info);
            }
        }
    }
}
