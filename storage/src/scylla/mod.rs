//! ScyllaDB or Apache Cassandra, by one driver and one schema.
//!
//! **Rows** are written with their stamp as write timestamp, prepared, token-aware, at [`Level::LocalQuorum`], and are
//! idempotent: the same bytes under the same stamp, however often and on however many nodes. So a node that does not
//! answer costs [`SPECULATE_AFTER`], not a deadline. The session's own timestamps are all 1: a statement that forgot
//! its stamp loses to everything. **Documents** are written by conditional writes alone (`documents.rs`).
//!
//! Invariant: a write that may have left the node twice is refused by nobody (`outcome.rs`).
//! Invariant: at most [`ScyllaConfig::writes_max`] writes and [`ScyllaConfig::reads_max`] reads are under way for each
//! node of the store, fewer while it says that it has too much to do (`pressure.rs`).

mod documents;
pub mod examine;
mod outcome;
mod pressure;
mod rows;
mod schema;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use scylla::errors::{ExecutionError, NewSessionError};
use scylla::policies::load_balancing::DefaultPolicy;
use scylla::policies::retry::{DefaultRetryPolicy, FallthroughRetryPolicy};
use scylla::policies::speculative_execution::SimpleSpeculativeExecutionPolicy;
use scylla::policies::timestamp_generator::TimestampGenerator;
use scylla::response::query_result::QueryResult;
use scylla::response::{PagingState, PagingStateResponse};
use scylla::serialize::row::SerializeRow;
use scylla::statement::batch::{Batch as CqlBatch, BatchType};
use scylla::statement::prepared::PreparedStatement;
use scylla::statement::{Consistency, SerialConsistency};
use serde::{Deserialize, Serialize};

use crate::engine::{
    Batch, CasOutcome, Cell, Document, DocumentKey, Engine, ReadError, Row, RowWrite, Scan, Table, WriteError,
};
use crate::stamp::Stamp;
use documents::Documents;
use outcome::Attempts;
use pressure::Pressure;
use rows::{ScanValues, Statements, WriteValues};
pub use tls::TlsConfig;
use tls::Tunnel;

/// A request that one node has not answered by then is asked of the next as well.
pub const SPECULATE_AFTER: Duration = Duration::from_millis(150);
/// Nodes that one request is asked of beside the first.
const SPECULATIONS_MAX: usize = 2;
/// A plain request that nobody has answered by then has failed.
pub const REQUEST_TIMEOUT: Duration = Duration::from_millis(2500);
/// A try of a conditional write; the next one goes to another node.
pub const CONDITIONAL_TIMEOUT: Duration = Duration::from_millis(2500);
/// A node that answers nothing for this long is asked no more until it does.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(1500);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1500);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What a quorum is taken of. Nothing less is offered: what one replica has it can lose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The replicas of the data centre; conditional writes at LOCAL_SERIAL.
    #[default]
    LocalQuorum,
    /// All replicas; conditional writes at SERIAL.
    Quorum,
}

impl From<Level> for Consistency {
    fn from(level: Level) -> Self {
        match level {
            Level::LocalQuorum => Self::LocalQuorum,
            Level::Quorum => Self::Quorum,
        }
    }
}

impl From<Level> for SerialConsistency {
    fn from(level: Level) -> Self {
        match level {
            Level::LocalQuorum => Self::LocalSerial,
            Level::Quorum => Self::Serial,
        }
    }
}

/// How the store is reached.
#[derive(Clone)]
pub struct ScyllaConfig {
    /// Addresses of some of its nodes; the others are learnt from them.
    pub nodes: Vec<String>,
    /// Its one data centre.
    pub datacenter: String,
    /// The keyspace.
    pub keyspace: String,
    /// Copies of each row, for a keyspace that is to be made.
    pub replication: u32,
    /// User and password.
    pub credentials: Option<(String, String)>,
    /// TLS towards its nodes.
    pub tls: Option<TlsConfig>,
    /// What a quorum is taken of.
    pub consistency: Level,
    /// Whether what is missing of the schema is made.
    pub migrate: bool,
    /// Writes under way for each node of the store.
    pub writes_max: usize,
    /// Reads under way for each node of the store.
    pub reads_max: usize,
}

impl ScyllaConfig {
    /// One keyspace behind some nodes, with the defaults of everything else.
    pub fn new(nodes: Vec<String>, datacenter: &str, keyspace: &str) -> Self {
        Self {
            nodes,
            datacenter: datacenter.to_owned(),
            keyspace: keyspace.to_owned(),
            replication: 3,
            credentials: None,
            tls: None,
            consistency: Level::default(),
            migrate: true,
            writes_max: 256,
            reads_max: 128,
        }
    }
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers: it may come.
    #[error("it does not answer: {0}")]
    Unreachable(String),
    /// It does not take user and password.
    #[error("it does not take the user and password")]
    Credentials,
    /// The schema is not there, and may not or cannot be made.
    #[error("schema: {0}")]
    Schema(String),
    /// The schema was made by a newer version.
    #[error("the schema has version {version}, this program knows up to {newest}: use a newer patchbay")]
    Newer {
        /// Found.
        version: i32,
        /// Known.
        newest: i32,
    },
    /// It is not one data centre of the configured name.
    #[error("a cluster lives in one data centre, `{wanted}` by configuration; the store has {found}")]
    Datacenters {
        /// Configured.
        wanted: String,
        /// Found.
        found: String,
    },
}

impl ConnectError {
    /// Whether waiting may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Credentials | Self::Schema(_) => true,
            Self::Newer { .. } | Self::Datacenters { .. } => false,
        }
    }

    fn of(error: &ExecutionError) -> Self {
        use scylla::errors::{DbError, RequestAttemptError};
        match error {
            ExecutionError::LastAttemptError(RequestAttemptError::DbError(
                DbError::Unauthorized | DbError::AuthenticationError,
                _,
            )) => Self::Credentials,
            ExecutionError::LastAttemptError(RequestAttemptError::DbError(
                DbError::SyntaxError | DbError::Invalid | DbError::ConfigError,
                why,
            )) => Self::Schema(why.clone()),
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// What was said while no connection came about.
fn of_session(error: &NewSessionError) -> ConnectError {
    let said = format!("{error:?}");
    if said.contains("AuthenticationError") {
        ConnectError::Credentials
    } else {
        ConnectError::Unreachable(error.to_string())
    }
}

/// Whatever forgets its stamp loses.
struct Forgotten;

impl TimestampGenerator for Forgotten {
    fn next_timestamp(&self) -> i64 {
        1
    }
}

/// A session and how requests are tried on it.
pub(crate) struct Tries {
    session: Session,
    writes: Arc<Pressure>,
    reads: Arc<Pressure>,
}

// The driver's errors are large, and passed on once.
#[allow(clippy::result_large_err)]
impl Tries {
    fn judge<T>(pressure: &Pressure, answer: Result<T, ExecutionError>) -> Result<T, ExecutionError> {
        match &answer {
            Ok(_) => pressure.answered(),
            Err(error) if outcome::is_overload(error) => pressure.overloaded(),
            Err(_) => {}
        }
        answer.inspect_err(|error| {
            tracing::debug!(%error, "a request to the store failed");
            metrics::counter!("patchbay_storage_errors_total").increment(1);
        })
    }

    /// A read that at most one page answers.
    async fn read(
        &self,
        statement: &PreparedStatement,
        values: impl SerializeRow,
    ) -> Result<QueryResult, ReadError> {
        let _place = self.reads.place().await;
        let answer = self.session.execute_unpaged(statement, values).await;
        Self::judge(&self.reads, answer).map_err(|_| ReadError::Unavailable)
    }

    /// A read page by page: no partition is ever in memory as a whole because of it.
    fn pages<'a, V: SerializeRow>(&'a self, statement: &'a PreparedStatement, values: V) -> Pages<'a, V> {
        Pages { tries: self, statement, values, next: Some(PagingState::start()) }
    }

    /// A write, which notes its attempts; an error comes with the number of them that have left the node.
    async fn write(
        &self,
        send: impl AsyncFnOnce(Arc<Attempts>) -> Result<QueryResult, ExecutionError>,
    ) -> Result<QueryResult, (ExecutionError, usize)> {
        let _place = self.writes.place().await;
        let attempts = Arc::new(Attempts::default());
        let answer = send(attempts.clone()).await;
        Self::judge(&self.writes, answer).map_err(|e| (e, attempts.count()))
    }

    /// A plain write: what is not known of it was perhaps applied.
    async fn plain(
        &self,
        send: impl AsyncFnOnce(Arc<Attempts>) -> Result<QueryResult, ExecutionError>,
    ) -> Result<(), WriteError> {
        self.write(send).await.map(drop).map_err(|(e, attempts)| outcome::of_write(&e, attempts))
    }

    /// One try of a conditional write.
    async fn conditional(
        &self,
        statement: &PreparedStatement,
        values: impl SerializeRow,
    ) -> Result<QueryResult, (ExecutionError, usize)> {
        let mut statement = statement.clone();
        statement.set_request_timeout(Some(CONDITIONAL_TIMEOUT));
        self.write(async |attempts| {
            statement.set_history_listener(attempts);
            self.session.execute_unpaged(&statement, values).await
        })
        .await
    }

    /// A write of one row; tries are made by speculation alone.
    async fn row(
        &self,
        mut statement: PreparedStatement,
        values: impl SerializeRow,
    ) -> Result<(), WriteError> {
        statement.set_retry_policy(Some(Arc::new(FallthroughRetryPolicy)));
        self.plain(async |attempts| {
            statement.set_history_listener(attempts);
            self.session.execute_unpaged(&statement, values).await
        })
        .await
    }

    /// A write of rows of one partition: there or not, as a whole.
    async fn rows(&self, mut batch: CqlBatch, values: Vec<WriteValues<'_>>) -> Result<(), WriteError> {
        batch.set_is_idempotent(true);
        batch.set_retry_policy(Some(Arc::new(FallthroughRetryPolicy)));
        self.plain(async |attempts| {
            batch.set_history_listener(attempts);
            self.session.batch(&batch, values).await
        })
        .await
    }
}

/// The pages of a read.
pub(crate) struct Pages<'a, V> {
    tries: &'a Tries,
    statement: &'a PreparedStatement,
    values: V,
    next: Option<PagingState>,
}

impl<V: SerializeRow> Pages<'_, V> {
    /// The next page; none: that was all.
    pub(crate) async fn next(&mut self) -> Result<Option<QueryResult>, ReadError> {
        let Some(state) = self.next.take() else { return Ok(None) };
        let _place = self.tries.reads.place().await;
        let answer = self.tries.session.execute_single_page(self.statement, &self.values, state).await;
        let (page, more) = Tries::judge(&self.tries.reads, answer).map_err(|_| ReadError::Unavailable)?;
        self.next = match more {
            PagingStateResponse::HasMorePages { state } => Some(state),
            PagingStateResponse::NoMorePages => None,
        };
        Ok(Some(page))
    }
}

/// A keyspace of the store.
pub struct Scylla {
    tries: Tries,
    rows: Statements,
    documents: documents::Statements,
}

/// A session, without a look at what it leads to.
async fn connect(config: &ScyllaConfig) -> Result<Session, ConnectError> {
    let mut balancing = DefaultPolicy::builder().token_aware(true);
    if config.consistency == Level::LocalQuorum {
        balancing = balancing.prefer_datacenter(config.datacenter.clone());
    }
    let profile = ExecutionProfile::builder()
        .consistency(config.consistency.into())
        .serial_consistency(Some(config.consistency.into()))
        .request_timeout(Some(REQUEST_TIMEOUT))
        .load_balancing_policy(balancing.build())
        .retry_policy(Arc::new(DefaultRetryPolicy::new()))
        .speculative_execution_policy(Some(Arc::new(SimpleSpeculativeExecutionPolicy {
            max_retry_count: SPECULATIONS_MAX,
            retry_interval: SPECULATE_AFTER,
        })))
        .build();
    let mut builder = SessionBuilder::new()
        .default_execution_profile_handle(profile.into_handle())
        .timestamp_generator(Arc::new(Forgotten))
        .keepalive_interval(KEEPALIVE_INTERVAL)
        .keepalive_timeout(KEEPALIVE_TIMEOUT)
        .connection_timeout(CONNECT_TIMEOUT)
        .keyspaces_to_fetch([config.keyspace.as_str()]);
    builder = match &config.tls {
        None => builder.known_nodes(&config.nodes),
        Some(tls) => through_tls(builder, config, tls).await?,
    };
    if let Some((user, password)) = &config.credentials {
        builder = builder.user(user, password);
    }
    builder.build().await.map_err(|e| of_session(&e))
}

/// The same nodes, each behind a port of this process.
async fn through_tls(
    builder: SessionBuilder,
    config: &ScyllaConfig,
    tls: &TlsConfig,
) -> Result<SessionBuilder, ConnectError> {
    let unreachable = |e: std::io::Error| ConnectError::Unreachable(e.to_string());
    let (mut known, mut port, mut why) = (Vec::new(), None, None);
    for node in &config.nodes {
        match tokio::net::lookup_host(node).await {
            Ok(found) => known.extend(found.inspect(|at| port = port.or(Some(at.port())))),
            Err(e) => why = Some(e),
        }
    }
    let Some(port) = port else {
        return Err(unreachable(why.unwrap_or_else(|| std::io::ErrorKind::NotFound.into())));
    };
    let tunnel = Arc::new(Tunnel::new(tls, port).map_err(ConnectError::Schema)?);
    let mut builder = builder.address_translator(tunnel.clone());
    for node in known {
        builder = builder.known_node_addr(tunnel.local(node.ip()).map_err(unreachable)?);
    }
    Ok(builder)
}

fn check_datacenter(session: &Session, config: &ScyllaConfig) -> Result<(), ConnectError> {
    let state = session.get_cluster_state();
    let mut found: Vec<&str> =
        state.get_nodes_info().iter().filter_map(|n| n.datacenter.as_deref()).collect();
    found.sort_unstable();
    found.dedup();
    if found == [config.datacenter.as_str()] {
        return Ok(());
    }
    Err(ConnectError::Datacenters {
        wanted: config.datacenter.clone(),
        found: format!("`{}`", found.join("`, `")),
    })
}

impl Scylla {
    /// Connects, makes what is missing of the schema, prepares every statement.
    pub async fn connect(config: &ScyllaConfig) -> Result<Self, ConnectError> {
        let session = connect(config).await?;
        check_datacenter(&session, config)?;
        schema::migrate(&session, config).await?;
        let unprepared = |e: scylla::errors::PrepareError| ConnectError::Schema(e.to_string());
        let rows = Statements::prepare(&session, &config.keyspace).await.map_err(unprepared)?;
        let documents = documents::Statements::prepare(&session, config).await.map_err(unprepared)?;
        let nodes = session.get_cluster_state().get_nodes_info().len().max(1);
        let tries = Tries {
            session,
            writes: Pressure::new(config.writes_max * nodes),
            reads: Pressure::new(config.reads_max * nodes),
        };
        Ok(Self { tries, rows, documents })
    }

    /// Why nothing can be written, if so: no node of it answers.
    pub fn refuses(&self) -> Option<&'static str> {
        let state = self.tries.session.get_cluster_state();
        let answers = state.get_nodes_info().iter().any(|n| n.is_connected());
        (!answers).then_some("no node of the store answers")
    }

    fn documents(&self) -> Documents<'_> {
        Documents { tries: &self.tries, statements: &self.documents }
    }

    fn statement(&self, table: Table, row: &RowWrite) -> PreparedStatement {
        match row.cell {
            Cell::Put(_) => self.rows.put(table),
            Cell::Delete => self.rows.delete(table),
        }
    }
}

fn values<'a>(partition: &'a [u8], row: &'a RowWrite) -> WriteValues<'a> {
    match &row.cell {
        Cell::Put(value) => WriteValues::Put { partition, place: &row.clustering, value, stamp: row.stamp },
        Cell::Delete => WriteValues::Delete { partition, place: &row.clustering, stamp: row.stamp },
    }
}

#[async_trait]
impl Engine for Scylla {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        if let [row] = batch.rows.as_slice() {
            return self.tries.row(self.statement(batch.table, row), values(&batch.partition, row)).await;
        }
        let mut together = CqlBatch::new(BatchType::Unlogged);
        for row in &batch.rows {
            together.append_statement(self.statement(batch.table, row));
        }
        let values = batch.rows.iter().map(|r| values(&batch.partition, r)).collect();
        self.tries.rows(together, values).await
    }

    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError> {
        let answer = self.tries.read(self.rows.get(table), (&partition[..], &clustering[..])).await?;
        rows::row(answer, clustering)
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        let statement =
            self.rows.scan(&self.tries.session, &scan).await.map_err(|_| ReadError::Unavailable)?;
        let mut found = Vec::new();
        let mut pages = self.tries.pages(&statement, ScanValues(&scan));
        while let Some(page) = pages.next().await? {
            rows::rows(page, &mut found)?;
        }
        Ok(found)
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError> {
        self.tries.row(self.rows.drop(table), (rows::timestamp(stamp), &partition[..])).await
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        self.documents().get(key).await
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        self.documents().compare_and_set(&key, expected, value.as_ref()).await
    }

    async fn try_compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
        patience: Duration,
    ) -> Result<CasOutcome, WriteError> {
        self.documents().try_once(&key, expected, value.as_ref(), patience).await
    }

    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        self.documents().list(scope, kind, after, limit).await
    }
}
