//! A subscription that was behind goes on from the log, now that its socket has drained. Too far behind for one page:
//! the SDK is told to come back with its position.

use std::sync::Arc;

use patchbay_actors::desk::{PAGE_BYTES_MAX, Page};
use patchbay_protocol::CommandError;
use patchbay_protocol::ids::ConversationId;

use super::super::Sockets;
use super::super::connection::{Change, Done, unsubscribe_push};
use super::super::lanes::{Half, Later};
use super::subscribe::RECOVERY_MAX_PUBLICATIONS;
use crate::hub::outbound::{Frames, Outbound};
use crate::hub::{ClientId, Topic};

/// The code that makes an SDK subscribe again with its position.
const INSUFFICIENT_STATE: u32 = 2500;

pub(crate) fn run(
    sockets: Arc<Sockets>,
    outbound: Arc<Outbound>,
    client: ClientId,
    topic: Topic,
    after: u64,
) -> Later<Half<Done>> {
    Box::pin(async move {
        let channel = topic.channel();
        let change = match &topic {
            Topic::Conversation(id) => match caught_up(&sockets, &outbound, &topic, *id, after).await {
                Ok(true) => Change::None,
                Ok(false) | Err(_) => ended(&sockets, &outbound, client, &topic, channel),
            },
            // These have no past to go on from: the client subscribes anew and lists.
            Topic::Inbox(..) | Topic::Agent(..) => ended(&sockets, &outbound, client, &topic, channel),
        };
        Half::Done(Done { id: 0, reply: None, change })
    })
}

/// Ends the subscription with the push that makes an SDK come back to it.
fn ended(sockets: &Sockets, outbound: &Outbound, client: ClientId, topic: &Topic, channel: String) -> Change {
    if sockets.hub.leave(topic, client) {
        outbound.reply(&unsubscribe_push(channel.clone(), INSUFFICIENT_STATE, "insufficient state"));
    }
    Change::Unsubscribed(channel)
}

async fn caught_up(
    sockets: &Sockets,
    outbound: &Outbound,
    topic: &Topic,
    id: ConversationId,
    after: u64,
) -> Result<bool, CommandError> {
    let tip = sockets.desk.tip_of(id).await?;
    let page = sockets
        .desk
        .read(id, Page::After(after), tip, RECOVERY_MAX_PUBLICATIONS, PAGE_BYTES_MAX)
        .await
        .map_err(|_| CommandError::unavailable())?;
    let read = page.entries.last().map_or(after, |(seq, _)| *seq);
    if read < tip {
        return Ok(false);
    }
    let encoding = outbound.encoding();
    let frames = page
        .entries
        .into_iter()
        .map(|(seq, data)| Frames::new(topic.channel(), data, seq).encoded(encoding))
        .collect();
    outbound.caught_up(topic, frames, read);
    Ok(true)
}
