//! `presence` and `presence_stats`: who is looking at a conversation.

use std::collections::HashSet;

use patchbay_protocol::ErrorCode;
use patchbay_protocol::client::reply::{PresenceResult, PresenceStatsResult, Reply};

use super::super::connection::{Connection, Done};
use super::super::lanes::{Half, Later};
use crate::auth::Peer;
use crate::hub::Topic;

/// Connections that one reply shows.
const SHOWN_MAX: usize = 1000;

pub(super) fn run(connection: &Connection, id: u32, channel: String, stats: bool) -> Later<Half<Done>> {
    let Some(claims) = super::claims(connection) else {
        return super::done(id, Err(ErrorCode::BadRequest.into()));
    };
    let sockets = connection.sockets.clone();
    super::replies(id, async move {
        let peer = super::fresh(&sockets, &claims).await?;
        let topic = super::topic(&sockets, &peer, &channel).await?;
        if !matches!(topic, Topic::Conversation(_)) || matches!(peer, Peer::Contact(_)) {
            return Err(ErrorCode::NotAvailable.into());
        }
        let mut there = sockets.hub.presence(&topic).await?;
        // A reply is one message; nobody looks at so many names.
        if !stats {
            there.truncate(SHOWN_MAX);
        }
        if stats {
            let users: HashSet<&str> = there.iter().map(|info| info.user.as_str()).collect();
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let result =
                PresenceStatsResult { num_clients: count(there.len()), num_users: count(users.len()) };
            return Ok(Reply { presence_stats: Some(result), ..Reply::default() });
        }
        let presence = there.into_iter().map(|info| (info.client.clone(), info)).collect();
        Ok(Reply { presence: Some(PresenceResult { presence }), ..Reply::default() })
    })
}
