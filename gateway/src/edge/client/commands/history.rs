//! `history`: pages the durable log both ways, bounded by the owner's tip.

use patchbay_actors::desk::{PAGE_BYTES_MAX, PAGE_ENTRIES_MAX, Page};
use patchbay_protocol::client::reply::{HistoryResult, Publication, Reply};
use patchbay_protocol::client::request::HistoryRequest;
use patchbay_protocol::{CommandError, ErrorCode};

use super::super::Sockets;
use super::super::connection::{Connection, Done};
use super::super::lanes::{Half, Later};
use super::reading::Reading;
use crate::auth::Peer;
use crate::hub::Topic;
use std::sync::Arc;

/// What a page's entries are wrapped in counts as well: a message has at most 512 KiB.
const WRAPPING_BYTES: usize = 1024 + 64 * PAGE_ENTRIES_MAX;

pub(super) fn run(connection: &Connection, id: u32, request: HistoryRequest) -> Later<Half<Done>> {
    let Some(claims) = super::claims(connection) else {
        return super::done(id, Err(ErrorCode::BadRequest.into()));
    };
    let sockets = connection.sockets.clone();
    super::replies(id, async move {
        let peer = super::fresh(&sockets, &claims).await?;
        let result = history(&sockets, &peer, &request).await?;
        Ok(Reply { history: Some(result), ..Reply::default() })
    })
}

async fn history(
    sockets: &Arc<Sockets>,
    peer: &Peer,
    request: &HistoryRequest,
) -> Result<HistoryResult, CommandError> {
    let topic = super::topic(sockets, peer, &request.channel).await?;
    let Topic::Conversation(id) = topic else { return Err(ErrorCode::NotAvailable.into()) };
    let (tenant, view) = super::reader(peer)?;
    let epoch = sockets.desk.node().epoch_of(id);
    let since = request.since.as_ref();
    if since.is_some_and(|s| !s.epoch.is_empty() && s.epoch != epoch) {
        return Err(ErrorCode::UnrecoverablePosition.into());
    }
    let page = match (since, request.reverse) {
        (None, false) => Page::After(0),
        (Some(s), false) => Page::After(s.offset),
        (None, true) => Page::Before(None),
        (Some(s), true) => Page::Before(Some(s.offset)),
    };
    let limit = usize::try_from(request.limit).unwrap_or(PAGE_ENTRIES_MAX).min(PAGE_ENTRIES_MAX);
    let tip = sockets.desk.tip(tenant, id).await?.seq;
    let reading = Reading { sockets, id, view: &view };
    let found = reading.page(page, tip, limit, PAGE_BYTES_MAX - WRAPPING_BYTES).await?;
    let publications = found
        .entries
        .into_iter()
        .map(|(offset, data)| Publication { data, offset, ..Publication::default() })
        .collect();
    Ok(HistoryResult { publications, epoch, offset: tip })
}
