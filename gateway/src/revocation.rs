//! Word of changed documents between nodes: a revoked token, a key that was deleted, an agent that lost an inbox.
//!
//! It is told over the mesh, and pushed through Redis. Without Redis, or while that is away, a node that shares its store
//! with others also looks at the store again every second; so a revocation reaches every socket within two, either way.

use std::sync::Arc;
use std::time::Duration;

use patchbay_actors::directory::{Directory, Stale};
use patchbay_storage::redis::{Change, Redis};
use tokio::sync::mpsc;

/// How often the store is looked at while nobody tells.
const LOOK: Duration = Duration::from_secs(1);
/// How often a server that is away is asked whether it is back.
const PING: Duration = Duration::from_millis(500);
/// Words that wait to be told; past it others hear of it by their own look.
const TOLD_MAX: usize = 1_024;

/// Tells other nodes of changes here, and hears of theirs. `shares_store`: there may be other nodes.
pub(crate) fn start(directory: &Arc<Directory>, redis: Option<Arc<Redis>>, shares_store: bool) {
    match redis {
        Some(redis) => {
            tell(directory, redis.clone());
            tokio::spawn(hear(directory.clone(), redis, shares_store));
        }
        None if shares_store => drop(tokio::spawn(look(directory.clone()))),
        None => {}
    }
}

fn tell(directory: &Directory, redis: Arc<Redis>) {
    let (to, mut words) = mpsc::channel(TOLD_MAX);
    tokio::spawn(async move {
        while let Some(tenant) = words.recv().await {
            // Whoever does not hear it looks by itself: it knows that the server is away.
            let _ = redis.tell_change(&tenant).await;
        }
    });
    directory.add_announce(Box::new(move |tenant| drop(to.try_send(tenant.clone()))));
}

async fn hear(directory: Arc<Directory>, redis: Arc<Redis>, shares_store: bool) {
    let mut changes = redis.changes();
    let mut asks = tokio::time::interval(PING);
    let mut looks = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                Some(Change::Of(tenant)) => directory.heard_of_change(Stale::Of(&tenant)).await,
                Some(Change::Unknown) => directory.heard_of_change(Stale::Everything).await,
                None => return,
            },
            _ = asks.tick() => drop(redis.ping().await),
            _ = looks.tick() => {
                if shares_store && redis.is_away() {
                    directory.heard_of_change(Stale::Perhaps).await;
                }
            }
        }
    }
}

async fn look(directory: Arc<Directory>) {
    loop {
        tokio::time::sleep(LOOK).await;
        directory.heard_of_change(Stale::Perhaps).await;
    }
}
