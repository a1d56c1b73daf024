//! `unsubscribe`: nothing queued for the old subscription is sent after. Unknown channels are fine: the SDKs take an
//! error here as a reason to reconnect.

use patchbay_protocol::client::reply::Reply;
use patchbay_protocol::client::request::ChannelRequest;

use super::super::connection::{Change, Connection, Done};
use super::super::lanes::{Half, Later};
use crate::hub::Topic;

pub(super) fn run(connection: &mut Connection, id: u32, request: ChannelRequest) -> Later<Half<Done>> {
    let (sockets, client) = (connection.sockets.clone(), connection.client);
    let info = super::info(connection);
    // The topic follows from the name once the lane is reached: a subscribe before it may still be under way.
    let peer = super::peer(connection);
    let tenant = peer.and_then(|peer| super::reader(&peer).ok().map(|(tenant, _)| tenant.clone()));
    Box::pin(async move {
        if let Some(topic) = named(tenant.as_ref(), &request.channel) {
            super::leave(&sockets, &topic, client, info.as_deref());
        }
        let reply = Reply { unsubscribe: Some(Default::default()), ..Reply::default() };
        Half::Done(Done { id, reply: Some(Ok(reply)), change: Change::Unsubscribed(request.channel) })
    })
}

/// What a channel was, if it was any: whoever is not subscribed to it leaves nothing.
fn named(tenant: Option<&patchbay_protocol::TenantId>, channel: &str) -> Option<Topic> {
    if channel == "cluster" {
        return Some(Topic::Cluster);
    }
    let tenant = tenant?;
    let (namespace, name) = channel.split_once(':')?;
    match namespace {
        "conversation" => name.parse().ok().map(Topic::Conversation),
        "inbox" => name.parse().ok().map(|id| Topic::Inbox(tenant.clone(), id)),
        "agent" => name.parse().ok().map(|id| Topic::Agent(tenant.clone(), id)),
        _ => None,
    }
}
