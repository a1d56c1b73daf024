//! The cluster as the operator sees it: one node in this version, which holds every shard.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use serde::Serialize;
use utoipa::ToSchema;

use patchbay_actors::cluster::map::Slot;
use patchbay_protocol::{CommandError, ErrorCode};

use crate::Api;
use crate::extract::Operator;
use crate::problem::Failure;

/// A node.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterNode {
    /// This start's number.
    incarnation: u32,
    /// Whether it serves.
    status: String,
    /// Shards that it holds.
    shards: u32,
    /// Entities in memory.
    active: usize,
}

/// The nodes.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterNodes {
    nodes: Vec<ClusterNode>,
}

/// A shard.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterShard {
    shard: u32,
    /// The incarnation that holds it.
    holder: u32,
    /// Its epoch.
    epoch: u32,
}

/// The shards.
#[derive(Serialize, ToSchema)]
pub(crate) struct ClusterShards {
    shards: Vec<ClusterShard>,
}

/// The nodes.
#[utoipa::path(get, path = "/api/v1/cluster/nodes", responses((status = 200, body = ClusterNodes)), security(("key" = [])))]
pub(crate) async fn nodes(State(api): State<Arc<Api>>, _: Operator) -> Result<Json<ClusterNodes>, Failure> {
    let node = api.desk.node();
    let this = ClusterNode {
        incarnation: node.incarnation(),
        status: "serving".into(),
        shards: node.shards().count,
        active: node.active_count(),
    };
    Ok(Json(ClusterNodes { nodes: vec![this] }))
}

/// The shards.
#[utoipa::path(get, path = "/api/v1/cluster/shards", responses((status = 200, body = ClusterShards)), security(("key" = [])))]
pub(crate) async fn shards(State(api): State<Arc<Api>>, _: Operator) -> Result<Json<ClusterShards>, Failure> {
    let node = api.desk.node();
    let Some(membership) = node.membership() else { return Ok(Json(ClusterShards { shards: Vec::new() })) };
    let (_, map) = membership.map();
    let shard =
        |(shard, slot): (u32, &Slot)| Some(ClusterShard { shard, holder: slot.holder?, epoch: slot.epoch });
    Ok(Json(ClusterShards { shards: (0u32..).zip(&map.shards).filter_map(shard).collect() }))
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
