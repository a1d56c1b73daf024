//! Documents: written by conditional writes only, so that a plain write behind the store's own clock cannot be lost
//! between them.
//!
//! Every try carries a fresh name of its writer. What became of one that was not answered is known only from a read
//! that shows that name, or from a later try of the same change that the store decides: a serial read that does not
//! show it proves nothing, since it may still be queued.

use std::time::Duration;

use bytes::Bytes;
use scylla::client::session::Session;
use scylla::errors::PrepareError;
use scylla::statement::prepared::PreparedStatement;
use scylla::statement::{Consistency, SerialConsistency};
use tokio::time::Instant;

use super::outcome;
use super::rows::applied;
use super::{ScyllaConfig, Tries};
use crate::engine::{CasOutcome, Document, DocumentKey, ReadError, WriteError};

/// How long an unanswered change is settled before its caller is told that nobody knows.
const SETTLE_FOR: Duration = Duration::from_secs(10);
const SETTLE_PAUSE: Duration = Duration::from_millis(50);
const SETTLE_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Kinds of which a tenant may have millions, and the partitions that they are spread over.
const SPREAD: [&str; 1] = ["media"];
const PARTS: i32 = 64;

/// The partitions of a kind.
pub(super) fn parts(kind: &str) -> i32 {
    if SPREAD.contains(&kind) { PARTS } else { 1 }
}

fn part(key: &DocumentKey) -> i32 {
    match parts(key.kind) {
        1 => 0,
        parts => i32::from(blake3::hash(key.id.as_bytes()).as_bytes()[0]) % parts,
    }
}

/// A document with what it takes to settle a change.
struct Stored {
    version: i64,
    live: bool,
    value: Bytes,
    writer: Bytes,
}

impl Stored {
    fn document(self) -> Option<Document> {
        self.live.then(|| Document { version: self.version.unsigned_abs(), value: self.value })
    }
}

pub(super) struct Statements {
    get: PreparedStatement,
    serial: PreparedStatement,
    list: PreparedStatement,
    insert: PreparedStatement,
    update: PreparedStatement,
}

impl Statements {
    pub(super) async fn prepare(session: &Session, config: &ScyllaConfig) -> Result<Self, PrepareError> {
        let name = format!("{}.documents", config.keyspace);
        let read = format!(
            "SELECT version, live, value, writer FROM {name} WHERE scope = ? AND kind = ? AND part = ? AND id = ?"
        );
        let idempotent = |mut prepared: PreparedStatement| {
            prepared.set_is_idempotent(true);
            prepared
        };
        let conditional = |mut prepared: PreparedStatement| {
            prepared.set_serial_consistency(Some(SerialConsistency::from(config.consistency)));
            prepared
        };
        let mut serial = session.prepare(read.as_str()).await?;
        serial.set_consistency(match config.consistency {
            super::Level::LocalQuorum => Consistency::LocalSerial,
            super::Level::Quorum => Consistency::Serial,
        });
        let list = format!(
            "SELECT id, version, live, value FROM {name} WHERE scope = ? AND kind = ? AND part = ? AND id > ? ORDER BY id ASC"
        );
        let mut list = session.prepare(list).await?;
        list.set_page_size(super::rows::PAGE_ROWS as i32);
        let insert = format!(
            "INSERT INTO {name} (scope, kind, part, id, version, live, value, writer) VALUES (?, ?, ?, ?, 1, true, ?, ?) IF NOT EXISTS"
        );
        let update = format!(
            "UPDATE {name} SET version = ?, live = ?, value = ?, writer = ? WHERE scope = ? AND kind = ? AND part = ? AND id = ? IF version = ?"
        );
        Ok(Self {
            get: idempotent(session.prepare(read).await?),
            serial: idempotent(serial),
            list: idempotent(list),
            insert: conditional(session.prepare(insert).await?),
            update: conditional(session.prepare(update).await?),
        })
    }
}

/// What one try came to.
enum Try {
    Applied,
    /// It is not as expected.
    Refused(Option<Stored>),
    /// It never began.
    NotBegun,
    Unknown,
}

/// The documents of a keyspace.
pub(super) struct Documents<'a> {
    pub(super) tries: &'a Tries,
    pub(super) statements: &'a Statements,
}

impl Documents<'_> {
    pub(super) async fn get(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        Ok(self.read(&self.statements.get, key).await?.and_then(Stored::document))
    }

    async fn read(
        &self,
        statement: &PreparedStatement,
        key: &DocumentKey,
    ) -> Result<Option<Stored>, ReadError> {
        let values = (key.scope.as_str(), key.kind, part(key), key.id.as_str());
        let answer = self.tries.read(statement, values).await?;
        let answer = answer.into_rows_result().map_err(|_| ReadError::Damaged)?;
        let found = answer
            .maybe_first_row::<(i64, bool, Option<Bytes>, Option<Bytes>)>()
            .map_err(|_| ReadError::Damaged)?;
        Ok(found.map(|(version, live, value, writer)| Stored {
            version,
            live,
            value: value.unwrap_or_default(),
            writer: writer.unwrap_or_default(),
        }))
    }

    pub(super) async fn compare_and_set(
        &self,
        key: &DocumentKey,
        expected: Option<u64>,
        value: Option<&Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        let writer: [u8; 16] = rand::random();
        let ends = Instant::now() + SETTLE_FOR;
        let mut pause = SETTLE_PAUSE;
        // Whether some try may still be applied.
        let mut open = false;
        loop {
            match self.attempt(key, expected, value, &writer).await {
                Try::Applied => return Ok(CasOutcome::Applied),
                Try::Refused(found) => {
                    let ours = found.as_ref().is_some_and(|f| f.writer == writer[..]);
                    if open && ours {
                        return Ok(CasOutcome::Applied);
                    }
                    // The version that ours would have made has passed by: it may have been ours.
                    let made = expected.map_or(1, |v| v + 1);
                    let passed = found.as_ref().is_some_and(|f| f.version.unsigned_abs() > made);
                    if open && passed {
                        return Err(WriteError::Unknown);
                    }
                    return Ok(CasOutcome::Refused(found.and_then(Stored::document)));
                }
                Try::NotBegun if !open => return Err(WriteError::Refused),
                Try::NotBegun => {}
                Try::Unknown => {
                    metrics::counter!("patchbay_storage_unsettled_total").increment(1);
                    open = true;
                    let shown = self.read(&self.statements.serial, key).await;
                    if shown.is_ok_and(|found| found.is_some_and(|f| f.writer == writer[..])) {
                        return Ok(CasOutcome::Applied);
                    }
                }
            }
            if Instant::now() >= ends {
                return Err(WriteError::Unknown);
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(SETTLE_PAUSE_MAX);
        }
    }

    /// One try, which is waited for no longer than `patience`.
    pub(super) async fn try_once(
        &self,
        key: &DocumentKey,
        expected: Option<u64>,
        value: Option<&Bytes>,
        patience: Duration,
    ) -> Result<CasOutcome, WriteError> {
        let writer: [u8; 16] = rand::random();
        let tried = tokio::time::timeout(patience, self.attempt(key, expected, value, &writer)).await;
        match tried.unwrap_or(Try::Unknown) {
            Try::Applied => Ok(CasOutcome::Applied),
            Try::Refused(found) if found.as_ref().is_some_and(|f| f.writer == writer[..]) => {
                Ok(CasOutcome::Applied)
            }
            Try::Refused(found) => Ok(CasOutcome::Refused(found.and_then(Stored::document))),
            Try::NotBegun => Err(WriteError::Refused),
            Try::Unknown => Err(WriteError::Unknown),
        }
    }

    async fn attempt(
        &self,
        key: &DocumentKey,
        expected: Option<u64>,
        value: Option<&Bytes>,
        writer: &[u8],
    ) -> Try {
        let live = value.is_some();
        let value = value.map_or(&[][..], |v| &v[..]);
        let at = (key.scope.as_str(), key.kind, part(key), key.id.as_str());
        let mut expected = expected.map(|v| i64::try_from(v).unwrap_or(i64::MAX));
        if expected.is_none() {
            if !live {
                return match self.read(&self.statements.serial, key).await {
                    Ok(None) => Try::Applied,
                    Ok(found) => Try::Refused(found),
                    Err(_) => Try::NotBegun,
                };
            }
            let values = (at.0, at.1, at.2, at.3, value, writer);
            match self.conditional(&self.statements.insert, values).await {
                Ok(true) => return Try::Applied,
                Err(error) => return error,
                Ok(false) => {}
            }
            // There is one, or there was: what was deleted keeps its version.
            match self.read(&self.statements.serial, key).await {
                Ok(Some(found)) if !found.live => expected = Some(found.version),
                Ok(found) => return Try::Refused(found),
                Err(_) => return Try::Unknown,
            }
        }
        let version = expected.unwrap_or_default();
        let values = (version.saturating_add(1), live, value, writer, at.0, at.1, at.2, at.3, version);
        match self.conditional(&self.statements.update, values).await {
            Ok(true) => Try::Applied,
            Err(error) => error,
            Ok(false) => match self.read(&self.statements.serial, key).await {
                Ok(found) => Try::Refused(found),
                Err(_) => Try::Unknown,
            },
        }
    }

    async fn conditional(
        &self,
        statement: &PreparedStatement,
        values: impl scylla::serialize::row::SerializeRow,
    ) -> Result<bool, Try> {
        match self.tries.conditional(statement, values).await {
            Ok(answer) => applied(answer).map_err(|_| Try::Unknown),
            Err((error, attempts)) => Err(match outcome::of_write(&error, attempts) {
                WriteError::Refused | WriteError::Full => Try::NotBegun,
                WriteError::Unknown => Try::Unknown,
            }),
        }
    }

    pub(super) async fn list(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        let mut found = Vec::new();
        for part in 0..parts(kind) {
            self.list_part((scope, kind, part, after), limit, &mut found).await?;
        }
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        found.truncate(limit);
        Ok(found)
    }

    /// The first `limit` of one part; deleted ones are passed over, page by page.
    async fn list_part(
        &self,
        values: (&str, &str, i32, &str),
        limit: usize,
        into: &mut Vec<(String, Document)>,
    ) -> Result<(), ReadError> {
        let mut left = limit;
        let mut pages = self.tries.pages(&self.statements.list, values);
        while left > 0
            && let Some(answer) = pages.next().await?
        {
            let answer = answer.into_rows_result().map_err(|_| ReadError::Damaged)?;
            let rows = answer.rows::<(String, i64, bool, Option<Bytes>)>().map_err(|_| ReadError::Damaged)?;
            for row in rows {
                let (id, version, live, value) = row.map_err(|_| ReadError::Damaged)?;
                if live && left > 0 {
                    let version = version.unsigned_abs();
                    into.push((id, Document { version, value: value.unwrap_or_default() }));
                    left -= 1;
                }
            }
        }
        Ok(())
    }
}
