//! `rpc`: our own commands, by method. The data is the admin API's body plus `conversation`; unknown fields are
//! refused by name.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use patchbay_actors::agent::{AgentCommand, SetPresence};
use patchbay_actors::desk::{Desk, Who};
use patchbay_actors::inbox::Filter;
use patchbay_actors::router::Router as _;
use patchbay_protocol::client::reply::{Reply, RpcResult};
use patchbay_protocol::client::request::RpcRequest;
use patchbay_protocol::command::{Empty, Reply as Answered, Request, SetTyping};
use patchbay_protocol::ids::{ConversationId, InboxId};
use patchbay_protocol::principal::AgentPrincipal;
use patchbay_protocol::summary::Status;
use patchbay_protocol::{CommandError, ErrorCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::Sockets;
use super::super::connection::{Change, Connection, Done};
use super::super::lanes::{Half, Later};
use super::contact::Pending;
use crate::auth::Peer;

/// Summaries of one reply, in bytes.
const LIST_BYTES_MAX: usize = 448 * 1024;
/// How long a customer or colleague is shown as typing.
pub(super) const TYPING_FOR: Duration = Duration::from_secs(6);

/// Every method that there is.
pub(in crate::edge::client) const METHODS: [&str; 17] = [
    "message.send",
    "message.edit",
    "message.delete",
    "message.react",
    "conversation.read",
    "conversation.assign",
    "conversation.resolve",
    "conversation.reopen",
    "conversation.pending",
    "conversation.snooze",
    "conversation.tag",
    "conversation.get",
    "conversation.list",
    "note.add",
    "typing.set",
    "presence.set",
    "presence.get",
];

/// The lane of a command: its conversation, or none.
pub(super) fn lane(request: &RpcRequest) -> Option<String> {
    #[derive(Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        conversation: Option<std::borrow::Cow<'a, str>>,
    }
    let named: Named<'_> = serde_json::from_slice(&request.data).ok()?;
    Some(format!("conversation:{}", named.conversation?))
}

pub(super) fn run(connection: &Connection, id: u32, request: RpcRequest) -> Later<Half<Done>> {
    let (Some(claims), Some(peer)) = (super::claims(connection), super::peer(connection)) else {
        return super::done(id, Err(ErrorCode::BadRequest.into()));
    };
    let later = request.method.starts_with("offer.");
    if !matches!(peer, Peer::Agent(_) | Peer::Contact(_)) || later {
        return super::done(id, Err(ErrorCode::NotAvailable.into()));
    }
    if !METHODS.contains(&request.method.as_str()) {
        return super::done(id, Err(ErrorCode::MethodNotFound.into()));
    }
    let sockets = connection.sockets.clone();
    Box::pin(async move {
        let started = tokio::time::Instant::now();
        let method = METHODS.iter().find(|m| **m == request.method).copied().unwrap_or("");
        let first = match super::fresh(&sockets, &claims).await {
            Ok(Peer::Agent(agent)) => first_half(sockets, agent, &request).await,
            Ok(Peer::Contact(contact)) => match object(&request.data) {
                Ok(data) => super::contact::first_half(&sockets, &contact, method, data).await,
                Err(e) => Err(e),
            },
            Ok(_) => Err(ErrorCode::NotAvailable.into()),
            Err(e) => Err(e),
        };
        let finish = move |outcome: Result<Vec<u8>, CommandError>| {
            metrics::histogram!("patchbay_edge_rpc_seconds", "method" => method)
                .record(started.elapsed().as_secs_f64());
            let reply = outcome
                .map(|data| Reply { rpc: Some(RpcResult { data: Bytes::from(data) }), ..Reply::default() });
            Done { id, reply: Some(reply), change: Change::None }
        };
        match first {
            Ok(Pending::Done(value)) => Half::Done(finish(Ok(written(&value)))),
            Ok(Pending::Handed(answer)) => {
                Half::Handed(Box::pin(async move { finish(answer.wait().await.map(|r| answered(&r))) }))
            }
            Err(error) => Half::Done(finish(Err(error))),
        }
    })
}

fn answered(reply: &Answered) -> Vec<u8> {
    match reply {
        Answered::Sent(r) => written(r),
        Answered::State(r) => written(r),
        Answered::Summary(s) => written(s),
        Answered::Taken | Answered::Unmatched | Answered::Tip(_) | Answered::Home(_) => b"{}".to_vec(),
    }
}

/// Replies are maps with text keys: writing them cannot fail.
fn written(reply: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(reply).unwrap_or_default()
}

async fn first_half(
    sockets: Arc<Sockets>,
    agent: AgentPrincipal,
    request: &RpcRequest,
) -> Result<Pending, CommandError> {
    let mut data = object(&request.data)?;
    match request.method.as_str() {
        "conversation.list" => {
            return list(&sockets, &Who::Agent(agent), data).await.map(Pending::Done);
        }
        "presence.set" => {
            let set: SetPresence = parse(data)?;
            let answer =
                sockets.desk.node().agent(&agent.tenant, &agent.agent, AgentCommand::Set(set.state))?;
            return Ok(Pending::Done(serde_json::to_value(answer.wait().await?).unwrap_or_default()));
        }
        "presence.get" => {
            let answer = sockets.desk.node().agent(&agent.tenant, &agent.agent, AgentCommand::Get)?;
            return Ok(Pending::Done(serde_json::to_value(answer.wait().await?).unwrap_or_default()));
        }
        _ => {}
    }
    let id = conversation(&mut data)?;
    let who = Who::Agent(agent);
    if request.method == "typing.set" {
        return typing(&sockets, &who, id, &parse::<SetTyping>(data)?).await.map(Pending::Done);
    }
    let request = command(&request.method, data, &who)?;
    sockets.desk.submit(&who, id, request).await.map(Pending::Handed)
}

/// The command of a method.
fn command(method: &str, data: Map<String, Value>, who: &Who) -> Result<Request, CommandError> {
    Ok(match method {
        "message.send" => Desk::send_request(who, parse(data)?),
        "message.edit" => Request::Edit(parse(data)?),
        "message.delete" => Request::Delete(parse(data)?),
        "message.react" => Request::React(parse(data)?),
        "conversation.read" => Request::Read(parse(data)?),
        "conversation.assign" => Request::Assign(parse(data)?),
        "conversation.resolve" => parse::<Empty>(data).map(|_| Request::Resolve)?,
        "conversation.reopen" => parse::<Empty>(data).map(|_| Request::Reopen)?,
        "conversation.pending" => parse::<Empty>(data).map(|_| Request::Pending)?,
        "conversation.snooze" => Request::Snooze(parse(data)?),
        "conversation.tag" => Request::Tag(parse(data)?),
        "conversation.get" => parse::<Empty>(data).map(|_| Request::Get)?,
        "note.add" => Request::Note(parse(data)?),
        _ => return Err(ErrorCode::MethodNotFound.into()),
    })
}

fn object(data: &[u8]) -> Result<Map<String, Value>, CommandError> {
    if data.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(data).map_err(|e| CommandError::invalid(format!("data is not a JSON object: {e}")))
}

pub(super) fn parse<T: DeserializeOwned>(data: Map<String, Value>) -> Result<T, CommandError> {
    patchbay_protocol::command::parse_value(Value::Object(data))
}

fn conversation(data: &mut Map<String, Value>) -> Result<ConversationId, CommandError> {
    match data.remove("conversation") {
        Some(Value::String(id)) => id.parse().map_err(|_| ErrorCode::NotFound.into()),
        Some(_) => Err(CommandError::invalid("conversation is not a string")),
        None => Err(CommandError::invalid("missing field `conversation`")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    inbox: Option<InboxId>,
    status: Option<Status>,
    assignee: Option<patchbay_protocol::AgentId>,
    contact: Option<String>,
    limit: Option<usize>,
    after: Option<String>,
}

async fn list(sockets: &Sockets, who: &Who, data: Map<String, Value>) -> Result<Value, CommandError> {
    let list: List = parse(data)?;
    let limit = list.limit.unwrap_or(100).clamp(1, 1000);
    let filter = Filter { status: list.status, assignee: list.assignee, contact: list.contact };
    let after = list.after.as_deref().map(patchbay_admin_api::position).transpose()?;
    if let (Some(inbox), Who::Agent(agent)) = (&list.inbox, who)
        && !agent.may_see(inbox)
    {
        return Err(ErrorCode::NotFound.into());
    }
    let mut found = sockets.desk.list(who, list.inbox.as_ref(), &filter, after, limit).await?;
    // A reply is one message: what does not fit stands on the next page.
    let mut bytes = 0;
    let fits = found.iter().take_while(|summary| {
        bytes += serde_json::to_vec(summary).map_or(0, |s| s.len() + 1);
        bytes <= LIST_BYTES_MAX
    });
    let fits = fits.count();
    let limit = limit.min(fits.max(1));
    found.truncate(limit);
    let next = (found.len() == limit).then(|| found.last().map(patchbay_admin_api::cursor)).flatten();
    Ok(json!({"conversations": found, "next": next}))
}

async fn typing(
    sockets: &Sockets,
    who: &Who,
    id: ConversationId,
    set: &SetTyping,
) -> Result<Value, CommandError> {
    sockets.desk.visible(who, id).await?;
    if let Who::Agent(agent) = who {
        let expires_at = sockets.desk.node().shards().clock.now().plus(TYPING_FOR);
        let actor = json!({"type": "agent", "id": agent.agent});
        let push = json!({"type": "typing", "actor": actor, "on": set.on, "expires_at": expires_at});
        sockets.hub.typing(id, agent.agent.as_str(), Bytes::from(push.to_string()));
    }
    sockets.desk.typing(who, id, set.on).await?;
    Ok(json!({}))
}
