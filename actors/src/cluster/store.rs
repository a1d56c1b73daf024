//! Leases and the shard map as documents of the store.
//!
//! A lease is a document of its own partition; every renewal writes a fresh beat and so makes another version of it:
//! "if it shows this beat" is asked as "if it is still the version that showed it". The map is one document.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use patchbay_storage::{CLUSTER, CasOutcome, Document, DocumentKey, Engine, ReadError, WriteError};
use serde::{Deserialize, Serialize};

use super::json;
use super::lease::{Answer, Beat, Renewal, Row};
use super::map::{Incarnation, ShardMap};

/// A lease as it is stored: what it shows, and which version of the map its node knows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stored {
    row: Row,
    map: u64,
}

/// Where the cluster agrees.
pub struct Store {
    engine: Arc<dyn Engine>,
    /// How long a request is waited for.
    patience: Duration,
    /// Nobody else can write while this process lives: nobody has to be asked who is alive.
    alone: bool,
    /// Which version of its document showed what, of every lease that was looked at.
    seen: Mutex<HashMap<Incarnation, (u64, Row)>>,
}

fn lease_of(who: Incarnation) -> DocumentKey {
    DocumentKey { scope: format!("lease.{who}"), kind: CLUSTER, id: "lease".to_owned() }
}

fn map_key() -> DocumentKey {
    DocumentKey { scope: "map".to_owned(), kind: CLUSTER, id: "map".to_owned() }
}

impl Store {
    /// In `engine`; a request is waited for under a quarter of the TTL.
    pub fn new(engine: Arc<dyn Engine>, ttl: Duration) -> Self {
        let alone = engine.is_exclusive();
        Self { engine, patience: ttl * 24 / 100, alone, seen: Mutex::default() }
    }

    /// Whether nobody else can be there.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    fn note(&self, who: Incarnation, version: u64, row: Row) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(who, (version, row));
    }

    fn version_of(&self, who: Incarnation, row: Row) -> Option<u64> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&who).filter(|(_, shown)| *shown == row).map(|(version, _)| *version)
    }

    /// Leases of nodes that are looked at no more.
    pub fn keep(&self, wanted: impl Fn(Incarnation) -> bool) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).retain(|who, _| wanted(*who));
    }

    async fn read(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        let read = tokio::time::timeout(self.patience, self.engine.document(key));
        read.await.unwrap_or(Err(ReadError::Unavailable))
    }

    fn shown(&self, who: Incarnation, document: Option<Document>) -> Option<(Row, u64)> {
        let Some(document) = document else {
            // There was never one, or it is long gone: nobody renews it any more.
            return Some((Row::Dead, 0));
        };
        let stored: Stored = serde_json::from_slice(&document.value).ok()?;
        self.note(who, document.version, stored.row);
        Some((stored.row, stored.map))
    }

    /// Makes the lease of a new incarnation.
    pub async fn begin(&self, who: Incarnation, first: Beat) -> Result<(), WriteError> {
        if self.alone {
            return Ok(());
        }
        let row = Row::Live(first);
        let written =
            self.engine.compare_and_set(lease_of(who), None, Some(json(&Stored { row, map: 0 }))).await?;
        if written != CasOutcome::Applied {
            return Err(WriteError::Refused);
        }
        self.note(who, 1, row);
        Ok(())
    }

    /// What a lease shows, and which version of the map its node knows. None: not answered.
    pub async fn lease(&self, who: Incarnation) -> Option<(Row, u64)> {
        if self.alone {
            return Some((Row::Dead, 0));
        }
        let read = self.read(&lease_of(who)).await.ok()?;
        self.shown(who, read)
    }

    /// Whether an incarnation is marked dead, which it is for ever: its lease is never removed. False also when that is
    /// not answered.
    pub async fn is_dead(&self, who: Incarnation) -> bool {
        if self.alone {
            return true;
        }
        let Ok(Some(found)) = self.read(&lease_of(who)).await else { return false };
        serde_json::from_slice(&found.value).is_ok_and(|stored: Stored| stored.row == Row::Dead)
    }

    async fn change(&self, who: Incarnation, expected: Row, next: Row, map: u64) -> Answer {
        let Some(version) = self.version_of(who, expected) else {
            // What stands there was never seen, or was replaced by what has been seen since.
            return match self.lease(who).await {
                Some((row, _)) if row == expected => Answer::Unknown,
                Some((row, _)) => Answer::Refused(row),
                None => Answer::Unknown,
            };
        };
        let value = json(&Stored { row: next, map });
        let tried = self.engine.try_compare_and_set(lease_of(who), Some(version), Some(value), self.patience);
        match tried.await {
            Ok(CasOutcome::Applied) => {
                self.note(who, version + 1, next);
                Answer::Applied
            }
            Ok(CasOutcome::Refused(found)) => match self.shown(who, found) {
                Some((row, _)) => Answer::Refused(row),
                None => Answer::Unknown,
            },
            Err(WriteError::Refused | WriteError::Full | WriteError::Unknown) => Answer::Unknown,
        }
    }

    /// Renews our lease, noting which version of the map we know.
    pub async fn renew(&self, who: Incarnation, renewal: Renewal, map: u64) -> Answer {
        if self.alone {
            return Answer::Applied;
        }
        self.change(who, Row::Live(renewal.expected), Row::Live(renewal.next), map).await
    }

    /// Marks an incarnation dead, if its lease still shows this beat.
    pub async fn mark(&self, who: Incarnation, judged: Beat) -> Answer {
        if self.alone {
            return Answer::Applied;
        }
        self.change(who, Row::Live(judged), Row::Dead, 0).await
    }

    /// The map with its version; one that nobody has made yet is `first`. None: not answered.
    pub async fn map(&self, first: impl FnOnce() -> ShardMap) -> Option<(u64, ShardMap)> {
        match self.read(&map_key()).await.ok()? {
            Some(document) => Some((document.version, serde_json::from_slice(&document.value).ok()?)),
            None => Some((0, first())),
        }
    }

    /// Replaces the map, if it has this version. None: nobody knows.
    pub async fn put_map(&self, expected: u64, map: &ShardMap) -> Option<bool> {
        let expected = (expected > 0).then_some(expected);
        let tried = self.engine.try_compare_and_set(map_key(), expected, Some(json(map)), self.patience);
        match tried.await {
            Ok(CasOutcome::Applied) => Some(true),
            Ok(CasOutcome::Refused(_)) => Some(false),
            Err(WriteError::Refused | WriteError::Full) => Some(false),
            Err(WriteError::Unknown) => None,
        }
    }
}
