//! `refresh`: a new token on the live socket. SDKs take an error here as final, so an expired one is a disconnect
//! that makes them come back.

use patchbay_protocol::client::reply::{RefreshResult, Reply};
use patchbay_protocol::client::request::RefreshRequest;
use patchbay_protocol::{CommandError, Disconnect};

use super::super::connection::{Change, Connection, Done};
use super::super::lanes::{Half, Later};
use crate::auth::Refusal;

pub(super) fn run(connection: &Connection, id: u32, request: RefreshRequest) -> Later<Half<Done>> {
    let (sockets, client) = (connection.sockets.clone(), connection.client);
    let Some(before) = super::claims(connection) else { return super::close(id, Disconnect::BadRequest) };
    Box::pin(async move {
        let now = sockets.desk.node().shards().clock.now();
        let admitted = sockets.auth.admit(&request.token, now).await;
        let (reply, change) = match admitted {
            Ok((_, claims))
                if (&claims.tenant, &claims.sub, claims.role, &claims.account)
                    != (&before.tenant, &before.sub, before.role, &before.account) =>
            {
                (None, Change::Close(Disconnect::InvalidToken))
            }
            Ok((peer, claims)) => {
                let (expires, ttl) = super::connect::ttl(&claims, now);
                let result = RefreshResult {
                    client: client.to_string(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    expires,
                    ttl,
                };
                (
                    Some(Ok(Reply { refresh: Some(result), ..Reply::default() })),
                    Change::Refreshed(Box::new((peer, claims))),
                )
            }
            Err(Refusal::Expired) => (None, Change::Close(Disconnect::Expired)),
            Err(Refusal::Revoked) => (None, Change::Close(Disconnect::ForceNoReconnect)),
            Err(Refusal::Invalid | Refusal::NotAvailable) => (None, Change::Close(Disconnect::InvalidToken)),
            Err(Refusal::Unavailable) => (Some(Err(CommandError::unavailable())), Change::None),
        };
        Half::Done(Done { id, reply, change })
    })
}
