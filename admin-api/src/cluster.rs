//! The cluster as the operator sees it: its nodes, who holds which shard and why, and what is to move.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use patchbay_actors::cluster::map::{ShardMap, Slot};
use patchbay_actors::cluster::member::Told;
use patchbay_actors::cluster::runtime::Membership;
use patchbay_protocol::command::parse;
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Api;
use crate::extract::Operator;
use crate::problem::Failure;

/// A node.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterNode {
    /// This start's number.
    incarnation: u32,
    /// Its name, which outlives its starts.
    name: String,
    /// `serving`, or `draining` when it is to give away what it has.
    status: String,
    /// Where other nodes reach it.
    mesh: Option<String>,
    /// How much it takes beside the others.
    capacity: u32,
    /// Shards that it holds.
    shards: usize,
    /// Whether it is the one that answers.
    here: bool,
    /// Open sockets, entities in memory, and commands that wait for their shard to be somewhere, as it last said; null: it
    /// is not heard.
    connections: Option<u64>,
    active: Option<u64>,
    waiting: Option<u64>,
    /// How long ago it said so, in milliseconds: one to two seconds at most while it is heard.
    heard_ms_ago: Option<u64>,
}

/// The nodes.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterNodes {
    /// The version of the map that this is of.
    version: u64,
    nodes: Vec<ClusterNode>,
}

/// A shard.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterShard {
    shard: u32,
    /// The incarnation that holds it: the last that may write.
    holder: u32,
    /// That node's name.
    node: Option<String>,
    /// Its epoch: every change of its holder raises it.
    epoch: u32,
    /// The incarnation that is to have it next.
    wish: Option<u32>,
}

/// The shards.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterShards {
    /// The version of the map that this is of.
    version: u64,
    shards: Vec<ClusterShard>,
}

/// A shard, and why it is where it is.
#[derive(Serialize, ToSchema)]
pub(crate) struct ShardWhy {
    #[serde(flatten)]
    shard: ClusterShard,
    /// Why, in words.
    reason: String,
    /// The node that an operator wants it at.
    pinned: Option<String>,
    /// Commands that wait for it at the node that answers.
    waiting: usize,
    /// Of the node that answers, if it serves the shard: since when, and how long its opening took.
    serving: Option<Serving>,
}

/// How a shard is served here.
#[derive(Serialize, ToSchema)]
pub(crate) struct Serving {
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    since: Timestamp,
    /// From when the map named this node until it served.
    opened_in_ms: u64,
    /// Whether everything that earlier owners left is in hand.
    caught_up: bool,
}

/// A move that is planned or under way.
#[derive(Serialize, ToSchema)]
pub(crate) struct ShardMove {
    shard: u32,
    /// The incarnation that holds it.
    from: u32,
    /// The one that is to have it.
    to: u32,
}

/// What is to move.
#[derive(Serialize, ToSchema)]
pub(crate) struct ShardPlan {
    /// The version of the map that this is of.
    version: u64,
    /// Moves under way: at most so many at once as the cluster is configured for.
    moving: Vec<ShardMove>,
    /// All that the plan wants, those included.
    planned: Vec<ShardMove>,
}

/// Where an operator wants a shard.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MoveShard {
    /// A node's name; null: wherever the plan wants it.
    #[serde(deserialize_with = "Option::deserialize")]
    to: Option<String>,
}

fn membership(api: &Api) -> Result<Arc<Membership>, Failure> {
    api.desk.node().membership().ok_or_else(|| CommandError::unavailable().into())
}

fn shard_of(map: &ShardMap, shard: u32, slot: &Slot) -> Option<ClusterShard> {
    let holder = slot.holder?;
    let node = map.members.get(&holder).map(|m| m.name.clone());
    Some(ClusterShard { shard, holder, node, epoch: slot.epoch, wish: slot.wish })
}

/// The nodes.
#[utoipa::path(get, path = "/api/v1/cluster/nodes", responses((status = 200, body = ClusterNodes)), security(("key" = [])))]
pub(crate) async fn nodes(State(api): State<Arc<Api>>, _: Operator) -> Result<Json<ClusterNodes>, Failure> {
    let node = api.desk.node();
    let (version, nodes) = node.nodes().ok_or_else(CommandError::unavailable)?;
    let nodes = nodes.into_iter().map(|state| {
        let said = state.said.map(|(counters, _)| counters);
        ClusterNode {
            incarnation: state.incarnation,
            status: state.status().to_owned(),
            heard_ms_ago: state.heard_ms_ago(),
            name: state.member.name,
            mesh: state.member.mesh,
            capacity: state.member.capacity,
            shards: state.shards,
            here: state.incarnation == node.incarnation(),
            connections: said.map(|counters| counters.connections),
            active: said.map(|counters| counters.active),
            waiting: said.map(|counters| counters.waiting),
        }
    });
    Ok(Json(ClusterNodes { version, nodes: nodes.collect() }))
}

/// The shards.
#[utoipa::path(get, path = "/api/v1/cluster/shards", responses((status = 200, body = ClusterShards)), security(("key" = [])))]
pub(crate) async fn shards(State(api): State<Arc<Api>>, _: Operator) -> Result<Json<ClusterShards>, Failure> {
    let (version, map) = membership(&api)?.map();
    let shards = (0u32..).zip(&map.shards).filter_map(|(shard, slot)| shard_of(&map, shard, slot));
    Ok(Json(ClusterShards { version, shards: shards.collect() }))
}

/// A shard, and why it is where it is.
#[utoipa::path(get, path = "/api/v1/cluster/shards/{shard}", params(("shard" = u32, Path)), responses((status = 200, body = ShardWhy), (status = 404)), security(("key" = [])))]
pub(crate) async fn why(
    State(api): State<Arc<Api>>,
    _: Operator,
    Path(shard): Path<u32>,
) -> Result<Json<ShardWhy>, Failure> {
    let (node, me) = (api.desk.node(), membership(&api)?);
    let (_, map) = me.map();
    let of = map.shards.get(shard as usize).and_then(|slot| shard_of(&map, shard, slot));
    let of = of.ok_or_else(|| Failure::from(ErrorCode::NotFound))?;
    let pinned = map.pins.get(&shard).cloned();
    let name = |incarnation: u32| map.members.get(&incarnation).map_or("a node that is gone", |m| &m.name);
    let planned = map.plan().into_iter().find(|(s, ..)| *s == shard);
    let reason = match (map.members.get(&of.holder), of.wish, planned, &pinned) {
        (None, ..) => "its holder is marked dead: whoever the plan names takes it over".to_owned(),
        (Some(_), Some(wish), ..) => {
            format!("it is on its way from {} to {}", name(of.holder), name(wish))
        }
        (Some(_), None, Some((_, _, to)), _) => {
            format!("it will move to {}, when fewer shards are on the move", name(to))
        }
        (Some(m), None, None, Some(pin)) if *pin == m.name => "an operator wants it here".to_owned(),
        (Some(_), None, None, Some(pin)) => format!("an operator wants it at {pin}, which takes none now"),
        (Some(m), None, None, None) if m.draining => {
            "its node drains, and nobody else takes shards".to_owned()
        }
        (Some(_), None, None, None) => "it is well placed: its node holds its share".to_owned(),
    };
    let serving = node.shards().reign(shard).map(|reign| Serving {
        since: reign.since,
        opened_in_ms: u64::try_from(reign.opening().as_millis()).unwrap_or(u64::MAX),
        caught_up: reign.is_swept(),
    });
    let waiting = node.switch().waiting_for(shard);
    Ok(Json(ShardWhy { shard: of, reason, pinned, waiting, serving }))
}

/// What is to move, and what moves.
#[utoipa::path(get, path = "/api/v1/cluster/plan", responses((status = 200, body = ShardPlan)), security(("key" = [])))]
pub(crate) async fn plan(State(api): State<Arc<Api>>, _: Operator) -> Result<Json<ShardPlan>, Failure> {
    let (version, map) = membership(&api)?.map();
    let moves = |all: Vec<(u32, u32, u32)>| {
        all.into_iter().map(|(shard, from, to)| ShardMove { shard, from, to }).collect()
    };
    Ok(Json(ShardPlan { version, moving: moves(map.moves().collect()), planned: moves(map.plan()) }))
}

/// Wants a shard at a node, or wherever the plan wants it. It moves as every other: when few enough are on the move.
#[utoipa::path(post, path = "/api/v1/cluster/shards/{shard}/move", params(("shard" = u32, Path)), request_body = MoveShard, responses((status = 202), (status = 404), (status = 422)), security(("key" = [])))]
pub(crate) async fn move_shard(
    State(api): State<Arc<Api>>,
    _: Operator,
    Path(shard): Path<u32>,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    let MoveShard { to } = parse(&body)?;
    let me = membership(&api)?;
    let (_, map) = me.map();
    if map.shards.get(shard as usize).is_none() {
        return Err(ErrorCode::NotFound.into());
    }
    if let Some(name) = to.as_deref().filter(|name| map.named(name).is_none()) {
        return Err(CommandError::invalid(format!("to: no node is called {name}")).into());
    }
    me.tell(Told::Pin(shard, to)).await;
    Ok(StatusCode::ACCEPTED)
}

/// The node that answers gives away its shards, and goes on serving what nobody takes.
#[utoipa::path(put, path = "/api/v1/cluster/drain", responses((status = 202), (status = 409)), security(("key" = [])))]
pub(crate) async fn drain(State(api): State<Arc<Api>>, _: Operator) -> Result<StatusCode, Failure> {
    let me = membership(&api)?;
    let (_, map) = me.map();
    if !map.others_take(me.incarnation()) {
        let detail = serde_json::json!({"detail": "no other node takes shards"});
        return Err(CommandError::with(ErrorCode::NotSupported, detail).into());
    }
    api.desk.node().wants_drain(true).await;
    Ok(StatusCode::ACCEPTED)
}

/// It takes shards again.
#[utoipa::path(delete, path = "/api/v1/cluster/drain", responses((status = 202)), security(("key" = [])))]
pub(crate) async fn undrain(State(api): State<Arc<Api>>, _: Operator) -> Result<StatusCode, Failure> {
    api.desk.node().wants_drain(false).await;
    Ok(StatusCode::ACCEPTED)
}

/// A backup of this moment: every row and every file, with a digest at its end.
#[utoipa::path(get, path = "/api/v1/cluster/backup", responses((status = 200, content_type = "application/octet-stream")), security(("key" = [])))]
pub(crate) async fn backup(State(api): State<Arc<Api>>, _: Operator) -> Response {
    let Some(parts) = api.backups.backup() else {
        let detail = serde_json::json!({"detail": "this node's store is backed up by its own means"});
        return Failure::from(CommandError::with(ErrorCode::NotSupported, detail)).into_response();
    };
    let parts = parts.map(|part| part.map_err(|()| std::io::Error::other("it broke off")));
    ([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(parts)).into_response()
}
