//! The schema, the same on ScyllaDB and Cassandra: versioned, only ever added to, made under a lock.
//!
//! Every entity table has one shape: a partition, a place in it and one value cell, written with a stamp. What differs
//! is how a table ages, so that is what its options say. `documents` alone is written by conditional writes, and by
//! nothing else.

use std::time::Duration;

use scylla::client::session::Session;
use scylla::statement::unprepared::Statement;

use super::{ConnectError, ScyllaConfig};
use crate::engine::Table;

/// How a table is compacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compaction {
    /// Written once, or dropped as whole partitions: rows of a partition lie in few files without more work.
    SizeTiered,
    /// Rewritten in place and read by key: old versions go soon, and a read looks into few files.
    Levelled,
}

impl Compaction {
    /// The name that the store's own tables give it.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::SizeTiered => "SizeTieredCompactionStrategy",
            Self::Levelled => "LeveledCompactionStrategy",
        }
    }
}

/// How long the store keeps a deletion so that every replica has heard of it: its own default, ten days.
const GRACE: Duration = Duration::from_secs(864_000);

/// A table's name in the keyspace: `entries` is a word of Cassandra's own.
pub(super) fn name(table: Table) -> &'static str {
    match table {
        Table::Entries => "log_entries",
        table => table.name(),
    }
}

/// How a table ages.
pub(super) fn compaction(table: Table) -> Compaction {
    match table {
        Table::Entries
        | Table::References
        | Table::DeadLetters
        | Table::Activity
        | Table::Timers
        | Table::Files => Compaction::SizeTiered,
        Table::Snapshots | Table::Marks | Table::Inbox | Table::Sessions => Compaction::Levelled,
    }
}

/// One step of the schema's history.
pub(super) struct Migration {
    /// From 1, without a gap.
    pub(super) version: i32,
    /// What it brings.
    pub(super) name: &'static str,
    /// `{ks}` stands for the keyspace. Each may run again when a node died in between.
    pub(super) statements: fn() -> Vec<String>,
}

/// The schema's history. What stands here is never changed, only added to.
pub(super) const MIGRATIONS: &[Migration] = &[
    Migration { version: 1, name: "entity tables and documents", statements: first },
    Migration { version: 2, name: "files", statements: second },
];

fn entity(table: Table) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS {{ks}}.{} (partition blob, place blob, value blob, PRIMARY KEY (partition, place)) WITH compaction = {{'class': '{}'}} AND gc_grace_seconds = {} AND default_time_to_live = 0",
        name(table),
        compaction(table).class(),
        GRACE.as_secs(),
    )
}

fn first() -> Vec<String> {
    let tables = Table::ALL.into_iter().filter(|table| *table != Table::Files);
    let documents = "CREATE TABLE IF NOT EXISTS {ks}.documents (scope text, kind text, part int, id text, version bigint, live boolean, value blob, writer blob, PRIMARY KEY ((scope, kind, part), id)) WITH compaction = {'class': 'LeveledCompactionStrategy'} AND gc_grace_seconds = 864000 AND default_time_to_live = 0";
    tables.map(entity).chain([documents.to_owned()]).collect()
}

fn second() -> Vec<String> {
    vec![entity(Table::Files)]
}

/// The columns that a table of ours must have, in the order of their names.
pub(super) fn columns(table: &str) -> &'static [(&'static str, &'static str)] {
    match table {
        "documents" => &[
            ("id", "text"),
            ("kind", "text"),
            ("live", "boolean"),
            ("part", "int"),
            ("scope", "text"),
            ("value", "blob"),
            ("version", "bigint"),
            ("writer", "blob"),
        ],
        _ => &[("partition", "blob"), ("place", "blob"), ("value", "blob")],
    }
}

/// How long a node that makes the schema may hold its lock; longer than every statement of it takes.
const LOCK_TTL_S: i32 = 120;
const LOCK_LOOK: Duration = Duration::from_millis(250);

/// Makes what is missing. Refuses a schema of a newer version.
pub(super) async fn migrate(session: &Session, config: &ScyllaConfig) -> Result<(), ConnectError> {
    let keyspace = &config.keyspace;
    let newest = MIGRATIONS.last().map_or(0, |m| m.version);
    if applied(session, keyspace).await? == Some(newest) {
        return Ok(());
    }
    if !config.migrate {
        return Err(ConnectError::Schema(format!(
            "keyspace {keyspace} lacks version {newest} of the schema"
        )));
    }
    let replicas = config.replication;
    let datacenter = &config.datacenter;
    let create = format!(
        "CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = {{'class': 'NetworkTopologyStrategy', '{datacenter}': {replicas}}} AND durable_writes = true"
    );
    run(session, create).await?;
    run(
        session,
        format!("CREATE TABLE IF NOT EXISTS {keyspace}.migrations (part int, version int, name text, holder blob, PRIMARY KEY (part, version))"),
    )
    .await?;
    let holder: [u8; 16] = rand::random();
    while !lock(session, keyspace, &holder).await? {
        tokio::time::sleep(LOCK_LOOK).await;
    }
    let outcome = apply(session, keyspace).await;
    let unlock = format!("DELETE FROM {keyspace}.migrations WHERE part = 1 AND version = 0 IF holder = ?");
    // One that is not let go of ends by itself.
    let _ = session.query_unpaged(statement(unlock), (&holder[..],)).await;
    outcome
}

fn statement(text: String) -> Statement {
    let mut statement = Statement::new(text);
    statement.set_request_timeout(Some(Duration::from_secs(60)));
    statement
}

async fn run(session: &Session, text: String) -> Result<(), ConnectError> {
    session.query_unpaged(statement(text), &[]).await.map_err(|e| ConnectError::of(&e))?;
    Ok(())
}

async fn lock(session: &Session, keyspace: &str, holder: &[u8]) -> Result<bool, ConnectError> {
    let text = format!(
        "INSERT INTO {keyspace}.migrations (part, version, name, holder) VALUES (1, 0, 'lock', ?) IF NOT EXISTS USING TTL {LOCK_TTL_S}"
    );
    let answer = session.query_unpaged(statement(text), (holder,)).await.map_err(|e| ConnectError::of(&e))?;
    super::rows::applied(answer).map_err(|_| ConnectError::Schema("the lock cannot be read".into()))
}

async fn apply(session: &Session, keyspace: &str) -> Result<(), ConnectError> {
    let done = applied(session, keyspace).await?.unwrap_or(0);
    for migration in MIGRATIONS.iter().filter(|m| m.version > done) {
        tracing::info!(version = migration.version, name = migration.name, "the schema is being made");
        for text in (migration.statements)() {
            run(session, text.replace("{ks}", keyspace)).await?;
        }
        let note =
            format!("INSERT INTO {keyspace}.migrations (part, version, name) VALUES (0, ?, ?) IF NOT EXISTS");
        session
            .query_unpaged(statement(note), (migration.version, migration.name))
            .await
            .map_err(|e| ConnectError::of(&e))?;
    }
    Ok(())
}

/// The schema's version; none: nobody has made it.
pub(super) async fn applied(session: &Session, keyspace: &str) -> Result<Option<i32>, ConnectError> {
    let there =
        "SELECT table_name FROM system_schema.tables WHERE keyspace_name = ? AND table_name = 'migrations'";
    let answer = session.query_unpaged(there, (keyspace,)).await.map_err(|e| ConnectError::of(&e))?;
    let damaged = |_| ConnectError::Schema("the store's own tables cannot be read".into());
    if answer.into_rows_result().map_err(|e| damaged(e.to_string()))?.rows_num() == 0 {
        return Ok(None);
    }
    let text = format!("SELECT version FROM {keyspace}.migrations WHERE part = 0");
    let answer = session.query_unpaged(text, &[]).await.map_err(|e| ConnectError::of(&e))?;
    let rows = answer.into_rows_result().map_err(|e| damaged(e.to_string()))?;
    let mut highest = None;
    for row in rows.rows::<(i32,)>().map_err(|e| damaged(e.to_string()))? {
        let (version,) = row.map_err(|e| damaged(e.to_string()))?;
        highest = highest.max(Some(version));
    }
    let newest = MIGRATIONS.last().map_or(0, |m| m.version);
    match highest {
        Some(version) if version > newest => Err(ConnectError::Newer { version, newest }),
        highest => Ok(highest),
    }
}
