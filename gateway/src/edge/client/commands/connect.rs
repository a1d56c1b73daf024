//! `connect`: who is there. Subscribes its own agent channel.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use patchbay_protocol::client::reply::{ClientInfo, ConnectResult, Reply, SubscribeResult};
use patchbay_protocol::client::request::ConnectRequest;
use patchbay_protocol::{AgentId, CommandError, Disconnect, ErrorCode, TenantId, Timestamp};
use serde_json::json;

use super::super::Sockets;
use super::super::connection::{Change, Connection, Done};
use super::super::lanes::{Half, Later};
use super::super::session::{Live, Subscription};
use crate::auth::{Claims, Peer, Refusal};
use crate::hub::outbound::Outbound;
use crate::hub::{ClientId, Topic, View};

pub(crate) fn run(connection: &Connection, id: u32, request: ConnectRequest) -> Later<Half<Done>> {
    let (sockets, client, outbound, present) = (
        connection.sockets.clone(),
        connection.client,
        connection.outbound.clone(),
        connection.present.clone(),
    );
    let session = connection.emulated.clone();
    Box::pin(async move {
        let (reply, change) = match connect(&sockets, client, &outbound, &present, &request).await {
            Ok((result, live)) => (
                Some(Ok(Reply {
                    connect: Some(ConnectResult { session: session.unwrap_or_default(), ..result }),
                    ..Reply::default()
                })),
                Change::Connected(Box::new(live)),
            ),
            Err(Refused::Error(error)) => (Some(Err(error)), Change::Refused),
            Err(Refused::Close(why)) => (None, Change::Close(why)),
        };
        Half::Done(Done { id, reply, change })
    })
}

enum Refused {
    Error(CommandError),
    Close(Disconnect),
}

/// What a refused token comes to at the door.
impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Expired => Self::Error(ErrorCode::TokenExpired.into()),
            Refusal::Invalid | Refusal::Revoked => Self::Close(Disconnect::InvalidToken),
            Refusal::NotAvailable => Self::Error(ErrorCode::NotAvailable.into()),
            Refusal::Unavailable => Self::Error(CommandError::unavailable()),
        }
    }
}

async fn connect(
    sockets: &Arc<Sockets>,
    client: ClientId,
    outbound: &Arc<Outbound>,
    present: &OnceLock<(TenantId, AgentId)>,
    request: &ConnectRequest,
) -> Result<(ConnectResult, Live), Refused> {
    let now = sockets.desk.node().shards().clock.now();
    let (peer, claims) = sockets.auth.admit(&request.token, now).await?;
    let tenant = peer.tenant();
    let changes = tenant.map(|tenant| sockets.desk.node().directory().changes(tenant));
    // What has changed since it was asked, and before anybody watched, is seen now.
    let peer = if changes.is_some() { sockets.auth.peer(&claims).await? } else { peer };
    let place = match &peer {
        Peer::Contact(contact) => {
            let visitor = (contact.tenant.clone(), contact.account.clone(), contact.visitor.clone());
            let place = sockets.visitors.take(visitor);
            Some(place.ok_or_else(|| Refused::Error(CommandError::overloaded(1000)))?)
        }
        Peer::Agent(_) | Peer::Operator | Peer::Plain(_) => None,
    };
    if wants_datagrams(&request.data) {
        outbound.takes_datagrams();
    }
    let mut result = ConnectResult {
        client: client.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ping: u32::try_from(sockets.limits.ping.as_secs()).unwrap_or(u32::MAX).max(1),
        pong: true,
        node: sockets.node.clone(),
        ..ConnectResult::default()
    };
    (result.expires, result.ttl) = ttl(&claims, now);
    let info = Arc::new(info(&peer, client));
    let mut subscriptions = HashMap::new();
    if let Peer::Agent(agent) = &peer {
        // From here on the connection's end is told as well, whatever becomes of it.
        let _ = present.set((agent.tenant.clone(), agent.agent.clone()));
        let connected = sockets.desk.node().agent_connected(&agent.tenant, &agent.agent, client.to_string());
        connected.await.map_err(Refused::Error)?;
        let topic = Topic::Agent(agent.tenant.clone(), agent.agent.clone());
        sockets
            .hub
            .join(&topic, client, outbound, &info, false, View::Whole)
            .map_err(|code| Refused::Error(code.into()))?;
        sockets.hub.ready(&topic).await.map_err(Refused::Error)?;
        // Its own channel cannot be resumed, and says so.
        let was_recovering = request.subs.get(&topic.channel()).is_some_and(|s| s.recover);
        // An epoch all the same: Protobuf leaves out an empty map value, which the JavaScript SDK takes for a fault.
        let epoch = format!("{:08x}", sockets.desk.node().incarnation());
        result
            .subs
            .insert(topic.channel(), SubscribeResult { was_recovering, epoch, ..SubscribeResult::default() });
        subscriptions.insert(topic.channel(), Subscription { topic, announced: false });
    }
    Ok((result, Live { peer, claims: Arc::new(claims), info, changes, place, subscriptions }))
}

/// Whether a client asks for what does not matter for long by datagram, where its transport has any.
fn wants_datagrams(data: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(data).is_ok_and(|data| data["datagrams"] == true)
}

/// Whether the connection expires, and in how many whole seconds, rounded up.
pub(super) fn ttl(claims: &Claims, now: Timestamp) -> (bool, u32) {
    let Some(exp) = claims.exp else { return (false, 0) };
    let left = Timestamp::from_seconds(exp).since(now).as_millis().div_ceil(1000);
    (true, u32::try_from(left).unwrap_or(u32::MAX).max(1))
}

fn info(peer: &Peer, client: ClientId) -> ClientInfo {
    let (user, conn_info) = match peer {
        Peer::Agent(a) => (a.agent.to_string(), json!({"name": a.name, "role": a.role.as_str()}).to_string()),
        Peer::Contact(c) => {
            let name = c.name.as_deref().unwrap_or(&c.visitor);
            (c.visitor.clone(), json!({"name": name, "role": "contact"}).to_string())
        }
        Peer::Operator => ("operator".to_owned(), String::new()),
        Peer::Plain(sub) => (sub.clone(), String::new()),
    };
    ClientInfo { user, client: client.to_string(), conn_info: conn_info.into(), ..ClientInfo::default() }
}
