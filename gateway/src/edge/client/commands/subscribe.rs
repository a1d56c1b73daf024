//! `subscribe`: registers first, asks the owner for its tip, reads the log after, and joins the two by seq (G3).

use std::sync::Arc;

use patchbay_actors::desk::{PAGE_BYTES_MAX, Page};
use patchbay_protocol::client::reply::{Publication, Reply, SubscribeResult};
use patchbay_protocol::client::request::SubscribeRequest;
use patchbay_protocol::ids::{ConversationId, TenantId};
use patchbay_protocol::{CommandError, ErrorCode};

use super::super::Sockets;
use super::super::connection::{Change, Connection, Done};
use super::super::lanes::{Half, Later};
use super::super::session::{Session, Subscription};
use super::reading::Reading;
use crate::auth::{Claims, Peer, Refusal};
use crate::hub::{Topic, View};

/// Publications that a recovery brings; past it the client pages by `history`.
pub(super) const RECOVERY_MAX_PUBLICATIONS: usize = 300;
/// The flag that asks for an error instead of `recovered: false`.
const FLAG_ERROR_IF_UNRECOVERED: i64 = 2;

pub(super) fn run(connection: &mut Connection, id: u32, request: SubscribeRequest) -> Later<Half<Done>> {
    let Session::Live(live) = &mut connection.session else {
        return super::done(id, Err(ErrorCode::BadRequest.into()));
    };
    if request.channel.is_empty() || request.channel.len() > 255 {
        return super::done(id, Err(ErrorCode::BadRequest.into()));
    }
    if !request.token.is_empty() {
        // No channel of this version takes a token of its own; one that has expired is fetched anew all the same.
        let now = connection.sockets.desk.node().shards().clock.now();
        let refused = match connection.sockets.auth.keys().verify(&request.token, now) {
            Err(Refusal::Expired) => ErrorCode::TokenExpired,
            _ => ErrorCode::PermissionDenied,
        };
        return super::done(id, Err(refused.into()));
    }
    let claims = live.claims.clone();
    let (sockets, client, outbound, info) =
        (connection.sockets.clone(), connection.client, connection.outbound.clone(), live.info.clone());
    Box::pin(async move {
        let channel = request.channel.clone();
        let refused = |error, change| Half::Done(Done { id, reply: Some(Err(error)), change });
        let (peer, topic) = match admitted(&sockets, &claims, &request.channel).await {
            Ok(found) => found,
            Err(error) => return refused(error, Change::None),
        };
        let reader = match (&topic, super::reader(&peer)) {
            // Of no tenant, as its reader is.
            (Topic::Cluster, _) => None,
            (_, Ok(reader)) => Some(reader),
            (_, Err(error)) => return refused(error, Change::None),
        };
        let view = reader.as_ref().map_or(View::Whole, |(_, view)| view.clone());
        // A visitor is told of nobody's coming and going.
        let join_leave = request.join_leave && view == View::Whole;
        if let Err(code) = sockets.hub.join(&topic, client, &outbound, &info, join_leave, view.clone()) {
            return refused(code.into(), Change::None);
        }
        let ready = sockets.hub.ready(&topic).await;
        let _turn = if request.recover { outbound.recovery_turn().await } else { None };
        let past = match (&topic, reader, ready) {
            (_, _, Err(error)) => Err(error),
            (Topic::Conversation(conversation), Some((tenant, view)), Ok(())) => {
                past(&sockets, tenant, &view, *conversation, &request).await
            }
            (_, _, Ok(())) => {
                Ok((SubscribeResult { was_recovering: request.recover, ..SubscribeResult::default() }, 0))
            }
        };
        match past {
            Ok((result, read)) => {
                let reply = Reply { id, subscribe: Some(result), ..Reply::default() };
                outbound.joined(&topic, Some(&reply), read);
                let announced = matches!(topic, Topic::Conversation(_));
                if announced {
                    sockets.hub.announce(&topic, true, &info);
                }
                Half::Done(Done {
                    id,
                    reply: None,
                    change: Change::Subscribed(request.channel, Subscription { topic, announced }),
                })
            }
            Err(error) => {
                sockets.hub.leave(&topic, client);
                refused(error, Change::Unsubscribed(channel))
            }
        }
    })
}

async fn admitted(
    sockets: &Arc<Sockets>,
    claims: &Claims,
    channel: &str,
) -> Result<(Peer, Topic), CommandError> {
    let peer = super::fresh(sockets, claims).await?;
    let topic = super::topic(sockets, &peer, channel).await?;
    Ok((peer, topic))
}

/// The subscribe result, and the seq up to which it covers the log.
async fn past(
    sockets: &Sockets,
    tenant: &TenantId,
    view: &View,
    id: ConversationId,
    request: &SubscribeRequest,
) -> Result<(SubscribeResult, u64), CommandError> {
    let tip = sockets.desk.tip(tenant, id).await?.seq;
    let epoch = sockets.desk.node().epoch_of(id);
    let mut result = SubscribeResult {
        recoverable: true,
        positioned: true,
        epoch: epoch.clone(),
        offset: tip,
        was_recovering: request.recover,
        ..SubscribeResult::default()
    };
    if !request.recover {
        return Ok((result, tip));
    }
    let same_log = request.epoch.is_empty() || request.epoch == epoch;
    let reading = Reading { sockets, id, view };
    let recovered = if same_log && request.offset <= tip {
        missed_entries(&reading, request.offset, tip).await?
    } else {
        None
    };
    match recovered {
        Some(publications) => {
            result.recovered = true;
            result.offset = request.offset;
            result.publications = publications;
            Ok((result, tip))
        }
        None if request.flag & FLAG_ERROR_IF_UNRECOVERED != 0 => Err(ErrorCode::UnrecoverablePosition.into()),
        None => Ok((result, tip)),
    }
}

/// Everything after `after` up to the tip; `None` when it is too much for one reply.
async fn missed_entries(
    reading: &Reading<'_>,
    after: u64,
    tip: u64,
) -> Result<Option<Vec<Publication>>, CommandError> {
    if reading.view == &View::Whole && tip - after > RECOVERY_MAX_PUBLICATIONS as u64 {
        return Ok(None);
    }
    // Less than a frame's bound: data grows when it is wrapped.
    let page = Page::After(after);
    let found = reading.page(page, tip, RECOVERY_MAX_PUBLICATIONS, PAGE_BYTES_MAX * 9 / 10).await?;
    Ok((found.covered == tip).then(|| {
        found
            .entries
            .into_iter()
            .map(|(offset, data)| Publication { data, offset, ..Publication::default() })
            .collect()
    }))
}
