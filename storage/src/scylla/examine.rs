//! What `patchbay doctor` asks of the store. Nothing is changed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use scylla::client::session::Session;
use scylla::value::{CqlTimestamp, CqlValue, Row};

use super::schema::{self, MIGRATIONS};
use super::{ConnectError, ScyllaConfig, check_datacenter, connect};
use crate::engine::Table;

/// A clock that is further off is told.
const SKEW_MAX: Duration = Duration::from_secs(1);

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As it should be.
    Good,
    /// It works, and loses something.
    Doubtful,
    /// It stands in the way.
    Bad,
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What was found.
    pub detail: String,
}

fn finding(name: &'static str, standing: Standing, detail: impl Into<String>) -> Finding {
    Finding { name, standing, detail: detail.into() }
}

/// Looks at a store that may or may not have a schema yet.
pub async fn examine(config: &ScyllaConfig) -> Vec<Finding> {
    let session = match connect(config).await {
        Ok(session) => session,
        Err(e) => return vec![finding("store", Standing::Bad, e.to_string())],
    };
    let mut found = vec![nodes(&session), datacenter(&session, config)];
    found.extend(replication(&session, config).await);
    found.push(schema(&session, config).await);
    found.push(commit_log(&session, config).await);
    found.push(paxos(&session).await);
    found.push(clock(&session).await);
    found
}

fn nodes(session: &Session) -> Finding {
    let state = session.get_cluster_state();
    let all = state.get_nodes_info().len();
    let answering = state.get_nodes_info().iter().filter(|n| n.is_connected()).count();
    let standing = if answering == all { Standing::Good } else { Standing::Doubtful };
    finding("store", standing, format!("{answering} of {all} nodes answer"))
}

fn datacenter(session: &Session, config: &ScyllaConfig) -> Finding {
    match check_datacenter(session, config) {
        Ok(()) => finding("data centre", Standing::Good, format!("`{}`, and no other", config.datacenter)),
        Err(e) => finding("data centre", Standing::Bad, e.to_string()),
    }
}

/// The rows of a question; none: this store has no such table or column.
async fn rows(session: &Session, question: &str, keyspace: Option<&str>) -> Option<Vec<Row>> {
    let answer = match keyspace {
        Some(keyspace) => session.query_unpaged(question, (keyspace,)).await,
        None => session.query_unpaged(question, &[]).await,
    };
    let answer = answer.ok()?.into_rows_result().ok()?;
    answer.rows::<Row>().ok()?.collect::<Result<Vec<Row>, _>>().ok()
}

fn text(value: Option<&Option<CqlValue>>) -> String {
    match value {
        Some(Some(CqlValue::Text(text) | CqlValue::Ascii(text))) => text.clone(),
        Some(Some(CqlValue::Int(n))) => n.to_string(),
        Some(Some(other)) => format!("{other:?}"),
        _ => String::new(),
    }
}

fn map(value: Option<&Option<CqlValue>>) -> Vec<(String, String)> {
    match value {
        Some(Some(CqlValue::Map(pairs))) => {
            pairs.iter().map(|(k, v)| (text(Some(&Some(k.clone()))), text(Some(&Some(v.clone()))))).collect()
        }
        _ => Vec::new(),
    }
}

async fn replication(session: &Session, config: &ScyllaConfig) -> Option<Finding> {
    let question = "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = ?";
    let found = rows(session, question, Some(&config.keyspace)).await?;
    let Some(row) = found.first() else {
        return Some(finding(
            "replication",
            Standing::Good,
            "the keyspace is not there yet: the first node makes it",
        ));
    };
    let options = map(row.columns.first());
    let copies = options.iter().find(|(name, _)| *name == config.datacenter).map(|(_, n)| n.clone());
    Some(match copies {
        None => finding(
            "replication",
            Standing::Bad,
            format!("no copies in `{}`: {options:?}", config.datacenter),
        ),
        Some(n) if n != config.replication.to_string() => finding(
            "replication",
            Standing::Doubtful,
            format!("{n} copies of each row, the configuration says {}", config.replication),
        ),
        Some(n) if n == "1" => {
            finding("replication", Standing::Doubtful, "1 copy of each row: what its node loses is lost")
        }
        Some(n) => finding("replication", Standing::Good, format!("{n} copies of each row")),
    })
}

async fn schema(session: &Session, config: &ScyllaConfig) -> Finding {
    let newest = MIGRATIONS.last().map_or(0, |m| m.version);
    match schema::applied(session, &config.keyspace).await {
        Ok(Some(version)) if version == newest => {}
        Ok(None) if config.migrate => {
            return finding("schema", Standing::Good, "not there yet: the first node makes it");
        }
        Ok(found) => {
            let found = found.map_or_else(|| "none".to_owned(), |v| v.to_string());
            return finding("schema", Standing::Bad, format!("version {found}, wanted {newest}"));
        }
        Err(e @ ConnectError::Newer { .. }) => return finding("schema", Standing::Bad, e.to_string()),
        Err(e) => return finding("schema", Standing::Bad, e.to_string()),
    }
    let mut wrong = Vec::new();
    let names = Table::ALL.into_iter().map(|t| (schema::name(t), schema::compaction(t).class()));
    for (table, compaction) in names.chain([("documents", "LeveledCompactionStrategy")]) {
        compare(session, &config.keyspace, table, compaction, &mut wrong).await;
    }
    match wrong.as_slice() {
        [] => finding("schema", Standing::Good, format!("version {newest}, every table as it should be")),
        wrong => finding("schema", Standing::Bad, wrong.join("; ")),
    }
}

/// A table as it is against as it should be.
async fn compare(session: &Session, keyspace: &str, table: &str, compaction: &str, wrong: &mut Vec<String>) {
    let question = format!(
        "SELECT column_name, type FROM system_schema.columns WHERE keyspace_name = ? AND table_name = '{table}'"
    );
    let found = rows(session, &question, Some(keyspace)).await.unwrap_or_default();
    let columns: Vec<(String, String)> =
        found.iter().map(|r| (text(r.columns.first()), text(r.columns.get(1)))).collect();
    let lacks = schema::columns(table)
        .iter()
        .filter(|(name, kind)| !columns.iter().any(|(n, k)| n == name && k == kind));
    wrong.extend(lacks.map(|(name, kind)| format!("{table} lacks {name} {kind}")));
    let question = format!(
        "SELECT compaction, default_time_to_live FROM system_schema.tables WHERE keyspace_name = ? AND table_name = '{table}'"
    );
    let Some(row) = rows(session, &question, Some(keyspace)).await.and_then(|r| r.into_iter().next()) else {
        return;
    };
    let class = map(row.columns.first()).into_iter().find(|(name, _)| name == "class").map(|(_, v)| v);
    let class = class.unwrap_or_default();
    if !class.ends_with(compaction) && !class.ends_with("UnifiedCompactionStrategy") {
        wrong.push(format!("{table} is compacted by {class}, wanted {compaction}"));
    }
    if text(row.columns.get(1)) != "0" {
        wrong.push(format!("{table} forgets its rows by itself"));
    }
    // A quorum read that has seen a row must not be followed by one that has not. ScyllaDB does it always.
    let question = format!(
        "SELECT read_repair FROM system_schema.tables WHERE keyspace_name = ? AND table_name = '{table}'"
    );
    if let Some(row) = rows(session, &question, Some(keyspace)).await.and_then(|r| r.into_iter().next()) {
        let repair = text(row.columns.first());
        if !repair.eq_ignore_ascii_case("blocking") {
            wrong.push(format!("{table} has read_repair {repair}, wanted BLOCKING"));
        }
    }
}

/// A live setting, by either store's way to ask for it.
async fn setting(session: &Session, name: &str) -> Option<String> {
    for table in ["system_views.settings", "system.config"] {
        let question = format!("SELECT value FROM {table} WHERE name = '{name}'");
        if let Some(row) = rows(session, &question, None).await.and_then(|r| r.into_iter().next()) {
            return Some(text(row.columns.first()).trim_matches('"').to_owned());
        }
    }
    None
}

async fn commit_log(session: &Session, config: &ScyllaConfig) -> Finding {
    match setting(session, "commitlog_sync").await {
        Some(mode) if mode == "batch" || mode == "group" => {
            finding("commit log", Standing::Good, format!("`{mode}`: what is acked is synced"))
        }
        Some(mode) => {
            let what = if config.replication == 1 {
                "a node that crashes takes acked entries back"
            } else {
                "a replica that crashes forgets what it had acked, and enough of them take it back"
            };
            finding("commit log", Standing::Doubtful, format!("`{mode}`: {what}; set commitlog_sync: batch"))
        }
        None => finding("commit log", Standing::Doubtful, "the store does not say how it syncs"),
    }
}

async fn paxos(session: &Session) -> Finding {
    match setting(session, "paxos_variant").await {
        Some(variant) => finding("conditional writes", Standing::Good, format!("paxos_variant {variant}")),
        None => finding("conditional writes", Standing::Good, "the store's own"),
    }
}

async fn clock(session: &Session) -> Finding {
    let asked = SystemTime::now();
    let answer = async {
        let answer = session.query_unpaged("SELECT totimestamp(now()) FROM system.local", &[]).await.ok()?;
        let (at,) = answer.into_rows_result().ok()?.first_row::<(CqlTimestamp,)>().ok()?;
        Some(at.0)
    };
    let Some(theirs) = answer.await else {
        return finding("clock", Standing::Doubtful, "the store does not tell the time");
    };
    let ours = asked.duration_since(UNIX_EPOCH).unwrap_or_default();
    let skew = (i128::from(theirs) - ours.as_millis() as i128).unsigned_abs();
    if skew <= SKEW_MAX.as_millis() + asked.elapsed().unwrap_or_default().as_millis() {
        finding("clock", Standing::Good, "the store's is ours")
    } else {
        // Stamps are no times, so nothing is lost by it.
        finding("clock", Standing::Doubtful, format!("the store's is {skew} ms off ours"))
    }
}
