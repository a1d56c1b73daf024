//! One file per client command. The dispatcher is a plain match.

pub mod catch_up;
pub mod connect;
mod contact;
mod history;
mod presence;
mod reading;
pub mod recheck;
mod refresh;
mod rpc;
mod subscribe;
mod unsubscribe;

use std::sync::Arc;

use patchbay_protocol::client::reply::{ClientInfo, Reply};
use patchbay_protocol::client::request::Command;
use patchbay_protocol::ids::{ConversationId, TenantId};
use patchbay_protocol::{CommandError, Disconnect, ErrorCode};

pub(super) use rpc::METHODS;

use super::Sockets;
use super::connection::{Change, Connection, Done};
use super::lanes::{Half, Later};
use super::session::Session;
use crate::auth::Peer;
use crate::hub::{ClientId, Topic, View};

/// A visitor that names no conversation means its own.
fn own_lane(connection: &Connection) -> Option<String> {
    match &connection.session {
        Session::Live(live) => match &live.peer {
            Peer::Contact(contact) => Some(format!("conversation:{}", contact.conversation())),
            Peer::Agent(_) | Peer::Operator | Peer::Plain(_) => None,
        },
        Session::New | Session::Connecting | Session::Refused => None,
    }
}

/// Starts a command of a connected client in its lane.
pub(super) fn start(connection: &mut Connection, command: Command) {
    let id = command.id;
    let counts = command.unsubscribe.is_none() && command.ping.is_none() && command.refresh.is_none();
    if counts && let (Session::Live(live), sockets) = (&connection.session, &connection.sockets) {
        let limited = match &live.peer {
            Peer::Agent(agent) => sockets.rates.agent(&agent.tenant, &agent.agent),
            Peer::Contact(contact) => sockets.rates.tenant(&contact.tenant),
            Peer::Operator | Peer::Plain(_) => Ok(()),
        };
        if let Err(error) = limited {
            if id > 0 {
                connection.outbound.reply(&super::connection::refusal(id, &error));
            }
            return;
        }
    }
    let (lane, first) = if let Some(r) = command.subscribe {
        (Some(r.channel.clone()), subscribe::run(connection, id, *r))
    } else if let Some(r) = command.unsubscribe {
        (Some(r.channel.clone()), unsubscribe::run(connection, id, *r))
    } else if let Some(r) = command.history {
        (Some(r.channel.clone()), history::run(connection, id, *r))
    } else if let Some(r) = command.presence {
        (Some(r.channel.clone()), presence::run(connection, id, r.channel, false))
    } else if let Some(r) = command.presence_stats {
        (Some(r.channel.clone()), presence::run(connection, id, r.channel, true))
    } else if let Some(r) = command.rpc {
        (rpc::lane(&r).or_else(|| own_lane(connection)), rpc::run(connection, id, *r))
    } else if let Some(r) = command.refresh {
        (None, refresh::run(connection, id, *r))
    } else if command.ping.is_some() {
        (None, done(id, Ok(Reply { ping: Some(Default::default()), ..Reply::default() })))
    } else if command.publish.is_some() || command.sub_refresh.is_some() {
        (None, done(id, Err(ErrorCode::NotAvailable.into())))
    } else if command.send.is_some() {
        // A message without an answer, for which there is no use yet.
        return;
    } else {
        (None, close(id, Disconnect::BadRequest))
    };
    connection.lanes.start(lane, first);
}

/// A command that needs no waiting.
fn done(id: u32, reply: Result<Reply, CommandError>) -> Later<Half<Done>> {
    Box::pin(async move { Half::Done(Done { id, reply: Some(reply), change: Change::None }) })
}

/// A command that ends the connection.
fn close(id: u32, why: Disconnect) -> Later<Half<Done>> {
    Box::pin(async move { Half::Done(Done { id, reply: None, change: Change::Close(why) }) })
}

/// A command that is done when this is.
fn replies(
    id: u32,
    work: impl Future<Output = Result<Reply, CommandError>> + Send + 'static,
) -> Later<Half<Done>> {
    Box::pin(async move { Half::Done(Done { id, reply: Some(work.await), change: Change::None }) })
}

/// Who is on a live connection.
fn peer(connection: &Connection) -> Option<Peer> {
    match &connection.session {
        Session::Live(live) => Some(live.peer.clone()),
        Session::New | Session::Connecting | Session::Refused => None,
    }
}

/// What others see of a live connection.
fn info(connection: &Connection) -> Option<Arc<ClientInfo>> {
    match &connection.session {
        Session::Live(live) => Some(live.info.clone()),
        Session::New | Session::Connecting | Session::Refused => None,
    }
}

/// Takes a connection out of a topic, and tells whoever asked to know who looks at a conversation.
fn leave(sockets: &Sockets, topic: &Topic, client: ClientId, info: Option<&ClientInfo>) {
    let was = sockets.hub.leave(topic, client);
    if let (true, Topic::Conversation(_), Some(info)) = (was, topic, info) {
        sockets.hub.announce(topic, false, info);
    }
}

/// What a channel name stands for, if this peer may have it now. One that does not exist, is another tenant's or is
/// not allowed: the same `permission_denied`; an unknown namespace says so.
async fn topic(sockets: &Sockets, peer: &Peer, channel: &str) -> Result<Topic, CommandError> {
    let denied = || CommandError::from(ErrorCode::PermissionDenied);
    let (namespace, name) = match channel {
        "cluster" => (channel, ""),
        _ => channel.split_once(':').ok_or(ErrorCode::UnknownChannel)?,
    };
    if !matches!(namespace, "conversation" | "inbox" | "agent" | "broadcast" | "cluster") {
        return Err(ErrorCode::UnknownChannel.into());
    }
    let agent = match peer {
        Peer::Agent(agent) => agent,
        Peer::Operator if channel == "cluster" => return Ok(Topic::Cluster),
        // Its own conversation, also before its first message.
        Peer::Contact(contact) => {
            let own = contact.conversation();
            let is_own = namespace == "conversation" && name.parse() == Ok(own);
            return if is_own { Ok(Topic::Conversation(own)) } else { Err(denied()) };
        }
        Peer::Operator | Peer::Plain(_) => return Err(denied()),
    };
    match namespace {
        "conversation" => {
            let id: ConversationId = name.parse().map_err(|_| denied())?;
            let who = patchbay_actors::desk::Who::Agent(agent.clone());
            match sockets.desk.visible(&who, id).await {
                Ok(_) => Ok(Topic::Conversation(id)),
                Err(e) if e.code.is_temporary() => Err(e),
                Err(_) => Err(denied()),
            }
        }
        "inbox" => {
            let id = name.parse().map_err(|_| denied())?;
            let there = sockets.desk.node().directory().inbox(&agent.tenant, &id).await?.is_some();
            if there && agent.may_see(&id) {
                Ok(Topic::Inbox(agent.tenant.clone(), id))
            } else {
                Err(denied())
            }
        }
        "agent" if name == agent.agent.as_str() => {
            Ok(Topic::Agent(agent.tenant.clone(), agent.agent.clone()))
        }
        _ => Err(denied()),
    }
}

/// Whose conversations a peer reads, and how it sees them.
fn reader(peer: &Peer) -> Result<(&TenantId, View), CommandError> {
    match peer {
        Peer::Agent(agent) => Ok((&agent.tenant, View::Whole)),
        Peer::Contact(contact) => Ok((&contact.tenant, View::Contact(contact.tenant.clone()))),
        Peer::Operator | Peer::Plain(_) => Err(ErrorCode::PermissionDenied.into()),
    }
}

/// The peer as the documents say now, for a permission that is asked at every command.
async fn fresh(
    sockets: &Arc<Sockets>,
    connection_claims: &crate::auth::Claims,
) -> Result<Peer, CommandError> {
    sockets.auth.peer(connection_claims).await.map_err(|r| match r {
        crate::auth::Refusal::Unavailable => CommandError::unavailable(),
        _ => ErrorCode::PermissionDenied.into(),
    })
}

/// The claims of a live connection.
fn claims(connection: &Connection) -> Option<Arc<crate::auth::Claims>> {
    match &connection.session {
        Session::Live(live) => Some(live.claims.clone()),
        Session::New | Session::Connecting | Session::Refused => None,
    }
}
