//! A subscription that was behind goes on from the log, now that its socket has drained. Too far behind for one page:
//! the SDK is told to come back with its position.

use patchbay_actors::desk::{PAGE_BYTES_MAX, Page};
use patchbay_protocol::CommandError;
use patchbay_protocol::ids::ConversationId;

use super::super::Sockets;
use super::super::connection::{Change, Connection, Done, unsubscribe_push};
use super::super::lanes::{Half, Later};
use super::reading::Reading;
use super::subscribe::RECOVERY_MAX_PUBLICATIONS;
use crate::auth::Peer;
use crate::hub::Topic;
use crate::hub::outbound::{Frames, GoOn, Outbound};

/// The code that makes an SDK subscribe again with its position.
const INSUFFICIENT_STATE: u32 = 2500;

pub(crate) fn run(connection: &Connection, from: GoOn) -> Later<Half<Done>> {
    let (sockets, outbound, client) =
        (connection.sockets.clone(), connection.outbound.clone(), connection.client);
    let (info, peer) = (super::info(connection), super::peer(connection));
    Box::pin(async move {
        let caught_up = match (from.topic.clone(), peer) {
            _ if from.lost => false,
            (Topic::Conversation(id), Some(peer)) => {
                caught_up(&sockets, &outbound, &peer, &from, id).await.unwrap_or(false)
            }
            // These have no past to go on from: the client subscribes anew and lists.
            (Topic::Inbox(..) | Topic::Agent(..) | Topic::Cluster, _) | (Topic::Conversation(_), None) => {
                false
            }
        };
        let mut change = Change::None;
        if !caught_up && outbound.is_still(&from) {
            let channel = from.topic.channel();
            super::leave(&sockets, &from.topic, client, info.as_deref());
            outbound.reply(&unsubscribe_push(channel.clone(), INSUFFICIENT_STATE, "insufficient state"));
            change = Change::Unsubscribed(channel);
        }
        Half::Done(Done { id: 0, reply: None, change })
    })
}

async fn caught_up(
    sockets: &Sockets,
    outbound: &Outbound,
    peer: &Peer,
    from: &GoOn,
    id: ConversationId,
) -> Result<bool, CommandError> {
    let (tenant, view) = super::reader(peer)?;
    let tip = sockets.desk.tip(tenant, id).await?.seq;
    let reading = Reading { sockets, id, view: &view };
    let page = Page::After(from.after);
    let found = reading.page(page, tip, RECOVERY_MAX_PUBLICATIONS, PAGE_BYTES_MAX).await?;
    if found.covered < tip {
        return Ok(false);
    }
    let encoding = outbound.encoding();
    let frames = found
        .entries
        .into_iter()
        .map(|(seq, data)| Frames::new(from.topic.channel(), data, seq).encoded(encoding))
        .collect();
    outbound.caught_up(from, frames, tip);
    Ok(true)
}
