//! Options: typed, documented, with their defaults in one place. TOML file < environment < flags; unknown keys are
//! errors that name the nearest known key.

pub mod load;
mod text;

use patchbay_actors::cluster::mesh::MeshTls;
use std::path::PathBuf;
use std::time::Duration;

use patchbay_storage::kafka::KafkaConfig;
use patchbay_storage::scylla::{Level, ScyllaConfig, TlsConfig};
use serde::{Deserialize, Serialize};

use crate::proxies::Proxies;
use crate::tls::Identity;

pub use load::{ConfigError, load};
pub use text::{Secret, Size};

/// A secret that may stand in a file of its own.
fn secret(value: Option<&Secret>) -> Result<Option<String>, String> {
    value.map(Secret::read).transpose()
}

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Clients, webhooks, admin API.
    pub public: Public,
    /// QUIC clients (a later version).
    pub quic: Quic,
    /// Between nodes (a later version).
    pub mesh: Mesh,
    /// Metrics and health.
    pub ops: Ops,
    /// The cluster.
    pub cluster: Cluster,
    /// What survives.
    pub storage: Storage,
    /// Events.
    pub events: Events,
    /// Redis.
    pub redis: Redis,
    /// Keys.
    pub auth: AuthConfig,
    /// Bounds.
    pub limits: Limits,
    /// Where providers are.
    pub providers: Providers,
    /// What goes out.
    pub outbound: Outbound,
    /// Files.
    pub media: Media,
    /// Live topics (a later version).
    pub live: Live,
    /// Draining.
    pub drain: Drain,
    /// Logs.
    pub log: Log,
}

macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $(#[doc = $field_doc:literal] $(#[serde($($serde:tt)*)])? $field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name { $(#[doc = $field_doc] $(#[serde($($serde)*)])? pub $field: $type,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $name {
            const DOCS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), $field_doc),)*];
        }
    };
}

section! {
    /// `[public]`
    Public {
        /// Where clients, webhooks and the admin API are served.
        listen: String = "127.0.0.1:8000".into(),
        /// Origins that browsers may come from, besides the node's own host; empty: every one (`dev`: the own host only).
        allowed_origins: Vec<String> = Vec::new(),
        /// What stands before a path that clients are told, such as `https://chat.example`; none: the host they asked.
        url: Option<String> = None,
        /// Proxies, as addresses and ranges (`10.0.0.0/8`): whom they speak for is believed of `X-Forwarded-For`.
        proxies: Vec<String> = Vec::new(),
        /// Whether they say so by the PROXY protocol, version 2: then nobody else is let in.
        proxy_protocol: bool = false,
        /// Certificate file (PEM), its own first: then clients come by TLS alone. Read again when it changes.
        cert: Option<PathBuf> = None,
        /// Its key.
        key: Option<PathBuf> = None,
    }
}

impl Public {
    /// The proxies that are believed.
    ///
    /// # Errors
    /// The range that is none.
    pub fn proxies(&self) -> Result<Proxies, String> {
        Proxies::new(&self.proxies, self.proxy_protocol)
    }

    /// What clients are shown; none: there is no TLS.
    pub fn identity(&self) -> Option<Identity> {
        Identity::of(self.cert.as_ref(), self.key.as_ref())
    }
}

fn certificate_faults(section: &str, cert: Option<&PathBuf>, key: Option<&PathBuf>) -> Option<String> {
    match Identity::of(cert, key) {
        Some(identity) => identity.server(&[]).err().map(|fault| format!("{section}: {fault}")),
        None if cert.or(key).is_none() => None,
        None => Some(format!("{section}: a certificate needs both `cert` and `key`")),
    }
}

section! {
    /// `[quic]`
    Quic {
        /// Where QUIC clients are served (UDP); with a certificate and without this at the number of `public.listen`.
        listen: Option<String> = None,
        /// Certificate file (PEM), its own first. Read again when it changes. `dev` makes one.
        cert: Option<PathBuf> = None,
        /// Its key.
        key: Option<PathBuf> = None,
    }
}

impl Quic {
    /// What clients are shown; none: there is no QUIC.
    pub fn identity(&self) -> Option<Identity> {
        Identity::of(self.cert.as_ref(), self.key.as_ref())
    }

    fn faults(&self, faults: &mut Vec<String>) {
        if let Some(listen) = &self.listen
            && listen.parse::<std::net::SocketAddr>().is_err()
        {
            faults.push(format!("quic.listen: `{listen}` is no address and port"));
        }
        faults.extend(certificate_faults("quic", self.cert.as_ref(), self.key.as_ref()));
    }
}

section! {
    /// `[mesh]`
    Mesh {
        /// Where other nodes connect. Without certificates only on loopback.
        listen: Option<String> = None,
        /// Where they are told to connect, as host and port; what is listened at otherwise.
        advertise: Option<String> = None,
        /// Certificate file (PEM), with the name or address of `advertise`. Read at every handshake.
        cert: Option<PathBuf> = None,
        /// Its key.
        key: Option<PathBuf> = None,
        /// Authorities that other nodes' certificates are checked with.
        ca: Option<PathBuf> = None,
    }
}

impl Mesh {
    /// How nodes know each other; none: whoever can connect is one.
    pub fn tls(&self) -> Option<MeshTls> {
        let (cert, key, ca) = (self.cert.clone()?, self.key.clone()?, self.ca.clone()?);
        Some(MeshTls { cert, key, ca })
    }

    fn faults(&self, faults: &mut Vec<String>) {
        let Some(listen) = &self.listen else { return };
        let Ok(address) = listen.parse::<std::net::SocketAddr>() else {
            return faults.push(format!("mesh.listen: `{listen}` is no address and port"));
        };
        match self.tls() {
            Some(tls) => faults.extend(tls.fault().map(|fault| format!("mesh: {fault}"))),
            None if self.cert.is_some() || self.key.is_some() || self.ca.is_some() => {
                faults.push("mesh: `cert`, `key` and `ca` go together".into());
            }
            None if !address.ip().is_loopback() => {
                faults.push(
                    "mesh.listen: without certificates only on loopback: see `patchbay dev-cert`".into(),
                );
            }
            None => {}
        }
        if self.advertise.is_none() && address.ip().is_unspecified() {
            faults.push("mesh.advertise: other nodes must be told an address".into());
        }
        if let Some(advertise) = self.advertise.as_ref().filter(|a| !a.contains(':')) {
            faults.push(format!("mesh.advertise: `{advertise}` has no port"));
        }
    }
}

section! {
    /// `[ops]`
    Ops {
        /// Where `/metrics`, `/healthz` and `/readyz` are served.
        listen: String = "127.0.0.1:9100".into(),
    }
}

section! {
    /// `[cluster]`
    Cluster {
        /// The cluster's name.
        name: String = "patchbay".into(),
        /// How many shards: a power of two, for ever.
        shards: u32 = 1024,
        /// How many shards this node takes, in proportion to the others (1 to 1000).
        capacity: u32 = 1,
        /// How many shards are on the move at once (1 to 1024), where this node plans.
        moves: u32 = 16,
        /// How long a node's lease lasts that is not renewed: no sooner is it replaced.
        #[serde(with = "text::duration")]
        lease_ttl: Duration = Duration::from_millis(2500),
    }
}

/// What survives, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageEngine {
    /// In the data directory.
    #[default]
    Embedded,
    /// On ScyllaDB or Apache Cassandra.
    Scylla,
}

/// Where events go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventsEngine {
    /// Into log files of the node's own.
    #[default]
    Embedded,
    /// To Kafka.
    Kafka,
}

section! {
    /// `[storage]`
    Storage {
        /// `embedded`, or `scylla` (ScyllaDB and Apache Cassandra).
        engine: StorageEngine = StorageEngine::Embedded,
        /// Where the embedded engine keeps its files, and every engine the media.
        data_dir: PathBuf = PathBuf::from("./patchbay-data"),
        /// Settings of ScyllaDB or Cassandra.
        scylla: Scylla = Scylla::default(),
        /// Free space on the disk under which writes are refused; none: a twentieth of it, 8 to 256 MiB.
        min_free: Option<Size> = None,
    }
}

section! {
    /// `[storage.scylla]`
    Scylla {
        /// Addresses (`host:port`) of some nodes of the store; the others are learnt from them.
        nodes: Vec<String> = Vec::new(),
        /// The store's one data centre, by its name there.
        datacenter: Option<String> = None,
        /// Keyspace: `[a-z][a-z0-9_]{0,47}`.
        keyspace: String = "patchbay".into(),
        /// Copies of each row, for a keyspace that the node makes.
        replication: u32 = 3,
        /// `local_quorum`, or `quorum`; nothing less is offered, since one replica alone can lose what it has.
        consistency: Level = Level::LocalQuorum,
        /// Whether the node makes what is missing of the schema.
        migrate: bool = true,
        /// User; none: the store asks nobody.
        username: Option<String> = None,
        /// Password.
        password: Option<Secret> = None,
        /// Whether to use TLS.
        tls: bool = false,
        /// File of the authorities (PEM) that the store's certificates are checked with; needed with `tls`.
        ca: Option<PathBuf> = None,
        /// File of this node's certificate (PEM), where the store asks for one.
        cert: Option<PathBuf> = None,
        /// File of its key (PEM).
        key: Option<PathBuf> = None,
        /// The name in the store's certificates; none: the address of each node.
        server_name: Option<String> = None,
        /// Writes under way for each node of the store; past it they wait.
        writes_max: usize = 256,
        /// Reads under way for each node of the store; past it they wait.
        reads_max: usize = 128,
    }
}

section! {
    /// `[events]`
    Events {
        /// `embedded`, or `kafka`.
        engine: EventsEngine = EventsEngine::Embedded,
        /// Settings of Kafka.
        kafka: Kafka = Kafka::default(),
        /// What the embedded log files may hold together; past it the oldest go.
        retention: Size = Size(1 << 30),
    }
}

section! {
    /// `[events.kafka]`
    Kafka {
        /// Addresses (`host:port`) of some brokers; the others are learnt from them.
        brokers: Vec<String> = Vec::new(),
        /// Topic; made if it is not there.
        topic: String = "patchbay.events".into(),
        /// Partitions of the topic, for ever: the order of a conversation is kept by its key.
        partitions: u32 = 12,
        /// Copies of each partition, of a topic that the node makes; none: the brokers' default.
        replication: Option<u32> = None,
        /// How long to gather before sending.
        #[serde(with = "text::duration")]
        linger: Duration = Duration::from_millis(5),
        /// More settings of the client by librdkafka's names, such as `security.protocol` and `sasl.username`.
        settings: Option<toml::Table> = None,
    }
}

impl Redis {
    /// The server's address.
    pub fn url(&self) -> Result<Option<String>, String> {
        secret(self.url.as_ref()).map_err(|e| format!("redis.url: {e}"))
    }
}

impl Scylla {
    /// How the store is reached.
    pub fn connection(&self) -> Result<ScyllaConfig, String> {
        let password = secret(self.password.as_ref()).map_err(|e| format!("storage.scylla.password: {e}"))?;
        let credentials = match (&self.username, password) {
            (Some(user), Some(password)) => Some((user.clone(), password)),
            (None, None) => None,
            _ => return Err("storage.scylla.username: user and password go together".into()),
        };
        let datacenter = self.datacenter.as_deref().unwrap_or_default();
        let tls = if self.tls { Some(self.tls_config()?) } else { None };
        Ok(ScyllaConfig {
            tls,
            replication: self.replication,
            credentials,
            consistency: self.consistency,
            migrate: self.migrate,
            writes_max: self.writes_max,
            reads_max: self.reads_max,
            ..ScyllaConfig::new(self.nodes.clone(), datacenter, &self.keyspace)
        })
    }

    fn tls_config(&self) -> Result<TlsConfig, String> {
        let ca = self.ca.clone().ok_or("storage.scylla.ca: the store's authorities must be given")?;
        let identity = match (self.cert.clone(), self.key.clone()) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err("storage.scylla.cert: certificate and key go together".into()),
        };
        let tls = TlsConfig { ca, identity, server_name: self.server_name.clone() };
        tls.fault().map_or(Ok(tls), |fault| Err(format!("storage.scylla.tls: {fault}")))
    }

    fn faults(&self, faults: &mut Vec<String>) {
        if self.nodes.is_empty() {
            faults.push("storage.scylla.nodes: at least one address is needed".into());
        }
        if self.datacenter.as_deref().unwrap_or_default().is_empty() {
            faults.push("storage.scylla.datacenter: the store's data centre must be named".into());
        }
        let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let name = self.keyspace.as_bytes();
        if !(name.first().is_some_and(u8::is_ascii_lowercase)
            && name.len() <= 48
            && name.iter().all(|b| letters(*b)))
        {
            faults.push("storage.scylla.keyspace: must match [a-z][a-z0-9_]{0,47}".into());
        }
        for (key, n) in [
            ("writes_max", self.writes_max),
            ("reads_max", self.reads_max),
            ("replication", self.replication as usize),
        ] {
            if n == 0 {
                faults.push(format!("storage.scylla.{key}: must be at least 1"));
            }
        }
        faults.extend(self.connection().err());
    }
}

impl Kafka {
    /// How brokers are reached.
    pub fn connection(&self) -> Result<KafkaConfig, String> {
        let text = |value: &toml::Value| match value {
            toml::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let settings = self.settings.iter().flatten().map(|(name, value)| (name.clone(), text(value)));
        let number = |key: &str, n: u32| {
            i32::try_from(n).ok().filter(|n| *n > 0).ok_or(format!("events.kafka.{key}: must be at least 1"))
        };
        Ok(KafkaConfig {
            partitions: number("partitions", self.partitions)?,
            replication: self.replication.map(|n| number("replication", n)).transpose()?,
            linger: self.linger,
            settings: settings.collect(),
            ..KafkaConfig::new(&self.brokers.join(","), &self.topic)
        })
    }

    fn faults(&self, faults: &mut Vec<String>) {
        if self.brokers.is_empty() {
            faults.push("events.kafka.brokers: at least one address is needed".into());
        }
        match self.connection() {
            Ok(connection) => {
                faults.extend(connection.fault().map(|e| format!("events.kafka.settings: {e}")))
            }
            Err(fault) => faults.push(fault),
        }
    }
}

section! {
    /// `[redis]`
    Redis {
        /// Address (`redis://user:password@host:port/database`; `rediss://` for TLS); none: nodes share nothing but the store.
        url: Option<Secret> = None,
    }
}

section! {
    /// `[auth]`
    AuthConfig {
        /// The operator's API key; without one nobody is the operator.
        operator_key: Option<Secret> = None,
        /// Keys that verify tokens: `id`, `algorithm` (`HS256`, `EdDSA`, `ES256`, `RS256`), `secret` or `public_key` (PEM), `tenants`.
        keys: Vec<TokenKeyConfig> = Vec::new(),
        /// The node's own secret (HS256, every tenant), with which it also issues tokens.
        hmac_secret_key: Option<Secret> = None,
    }
}

section! {
    /// One of `auth.keys`.
    TokenKeyConfig {
        /// The header's `kid`.
        id: Option<String> = None,
        /// `HS256`, `EdDSA`, `ES256` or `RS256`.
        algorithm: String = "HS256".into(),
        /// The shared secret of HS256.
        secret: Option<Secret> = None,
        /// The public key of the others, as PEM.
        public_key: Option<Secret> = None,
        /// Tenants that it may speak for.
        tenants: Vec<String> = Vec::new(),
    }
}

section! {
    /// `[limits]`
    Limits {
        /// Sockets at once.
        connections: usize = 100_000,
        /// Sockets that have not sent `connect` yet, at once.
        unconnected: usize = 1_000,
        /// New sockets a second of this node, as after the loss of another one: those that come faster wait their turn, and past five seconds of it are told to come again; 0: no limit.
        connects_per_second: u32 = 2_000,
        /// API requests a second of one key (not below 2,000 from loopback in `dev`); 0: no limit, as for all of these.
        requests_per_second: u32 = 1_000,
        /// API requests a second that are refused for want of a key, of one address.
        strangers_per_second: u32 = 1_000,
        /// Commands a second of one connection.
        connection_per_second: u32 = 20_000,
        /// Commands a second of one agent, on all its sockets.
        agent_per_second: u32 = 20_000,
        /// Commands and requests a second of one tenant.
        tenant_per_second: u32 = 50_000,
        /// Webhook bodies a second of one account.
        webhooks_per_second: u32 = 5_000,
        /// Memory that the process may hold, such as `"2GiB"`: from three quarters of it on caches are emptied and whoever has nothing to do is forgotten; none: three quarters of the machine or its control group.
        memory: Option<Size> = None,
        /// After how long an entity that nobody asks is forgotten until its next command.
        #[serde(with = "text::duration")]
        idle_after: Duration = Duration::from_secs(120),
    }
}

section! {
    /// `[providers]`
    Providers {
        /// Hosts that calls may go to, over https.
        allowed_hosts: Vec<String> = vec!["graph.facebook.com".into()],
        /// Hosts that media may be fetched from with the account's key.
        media_hosts: Vec<String> = vec!["lookaside.fbsbx.com".into()],
        /// How long a call may take.
        #[serde(with = "text::duration")]
        timeout: Duration = Duration::from_secs(15),
    }
}

section! {
    /// `[outbound]`
    Outbound {
        /// Unsettled messages of one account; past it new ones are refused with `overloaded`.
        queue_max: usize = 50_000,
        /// How long a message may stay pending; then it fails with `expired`.
        #[serde(with = "text::duration")]
        max_age: Duration = Duration::from_secs(24 * 3600),
    }
}

section! {
    /// `[media]`
    Media {
        /// The largest file.
        size_max: Size = Size(100 << 20),
        /// The largest image.
        image_max: Size = Size(5 << 20),
        /// The largest audio or video file.
        audio_video_max: Size = Size(16 << 20),
        /// What the files of one tenant may hold together.
        quota: Size = Size(10 << 30),
        /// How long a signed address of a file is good; at most 5 minutes.
        #[serde(with = "text::duration")]
        url_ttl: Duration = Duration::from_secs(300),
    }
}

section! {
    /// `[live]`
    Live {
        /// Whether sockets need no token; not used in this version.
        insecure: bool = false,
        /// Options of channels without a namespace, by Centrifugo's names; not used in this version.
        without_namespace: Option<toml::Table> = None,
        /// Options of namespaces, by Centrifugo's names; not used in this version.
        namespaces: Option<toml::Table> = None,
        /// Tenant of tokens that name none; not used in this version.
        default_tenant: Option<String> = None,
        /// Whether `#<sub>` is subscribed; not used in this version.
        personal_channel: bool = false,
        /// Key of the `/api` door; not used in this version.
        api_key: Option<Secret> = None,
    }
}

section! {
    /// `[drain]`
    Drain {
        /// How long a stop may take.
        #[serde(with = "text::duration")]
        deadline: Duration = Duration::from_secs(30),
    }
}

section! {
    /// `[log]`
    Log {
        /// `error`, `warn`, `info`, `debug`, or directives such as `info,patchbay=debug`.
        level: String = "info".into(),
        /// `json`, `text`, or `auto`: text on a terminal.
        format: String = "auto".into(),
    }
}

impl Config {
    /// The sections with their fields' descriptions.
    fn docs() -> Vec<(&'static str, &'static [(&'static str, &'static str)])> {
        vec![
            ("public", Public::DOCS),
            ("quic", Quic::DOCS),
            ("mesh", Mesh::DOCS),
            ("ops", Ops::DOCS),
            ("cluster", Cluster::DOCS),
            ("storage", Storage::DOCS),
            ("storage.scylla", Scylla::DOCS),
            ("events", Events::DOCS),
            ("events.kafka", Kafka::DOCS),
            ("redis", Redis::DOCS),
            ("auth", AuthConfig::DOCS),
            ("auth.keys", TokenKeyConfig::DOCS),
            ("limits", Limits::DOCS),
            ("providers", Providers::DOCS),
            ("outbound", Outbound::DOCS),
            ("media", Media::DOCS),
            ("live", Live::DOCS),
            ("drain", Drain::DOCS),
            ("log", Log::DOCS),
        ]
    }

    /// Every key with its description: what is known, whether set or not.
    pub(crate) fn known_keys() -> Vec<(String, &'static str)> {
        let sections = Self::docs();
        let all = sections.iter().flat_map(|(section, fields)| {
            fields.iter().map(move |(field, doc)| (format!("{section}.{field}"), doc.trim()))
        });
        all.filter(|(key, _)| !sections.iter().any(|(section, _)| section == key)).collect()
    }

    /// The page in docs/ that lists every key.
    pub fn documentation() -> String {
        let defaults = toml::Table::try_from(Self::default()).unwrap_or_default();
        let mut page = String::from(
            "# Configuration\n\nGenerated by `patchbay config doc`; a test fails when this page is stale.\n\nA TOML file, then the environment (`PATCHBAY__SECTION__KEY`), then flags: the later wins. Durations are text\n(`\"300s\"`, `\"2500ms\"`), sizes too (`\"4MiB\"`). A secret may be given as `{ file = \"…\" }`.\n\n| key | default | what |\n|---|---|---|\n",
        );
        for (key, doc) in Self::known_keys() {
            let mut at = Some(&defaults);
            let mut found = None;
            for part in key.split('.') {
                found = at.and_then(|t| t.get(part));
                at = found.and_then(toml::Value::as_table);
            }
            let default = found.map_or_else(|| "–".to_owned(), |v| format!("`{v}`"));
            page += &format!("| `{key}` | {default} | {doc} |\n");
        }
        page
    }

    /// What is wrong with the values, a line each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (key, listen) in [("public.listen", &self.public.listen), ("ops.listen", &self.ops.listen)] {
            if listen.parse::<std::net::SocketAddr>().is_err() {
                faults.push(format!("{key}: `{listen}` is no address and port"));
            }
        }
        if !self.cluster.shards.is_power_of_two() || self.cluster.shards > 1 << 16 {
            faults.push("cluster.shards: must be a power of two, at most 65536".into());
        }
        if !(1..=1024).contains(&self.cluster.moves) {
            faults.push("cluster.moves: must be 1 to 1024".into());
        }
        if !(1..=1000).contains(&self.cluster.capacity) {
            faults.push("cluster.capacity: must be 1 to 1000".into());
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(&self.cluster.lease_ttl) {
            faults.push("cluster.lease_ttl: must be 1s to 60s".into());
        }
        self.mesh.faults(&mut faults);
        self.quic.faults(&mut faults);
        let public = &self.public;
        faults.extend(public.proxies().err().map(|fault| format!("public.proxies: {fault}")));
        faults.extend(certificate_faults("public", public.cert.as_ref(), public.key.as_ref()));
        if self.storage.engine == StorageEngine::Scylla {
            self.storage.scylla.faults(&mut faults);
        }
        if self.events.engine == EventsEngine::Kafka {
            self.events.kafka.faults(&mut faults);
        }
        if !matches!(self.log.format.as_str(), "json" | "text" | "auto") {
            faults.push("log.format: must be json, text or auto".into());
        }
        if self.media.url_ttl.is_zero() || self.media.url_ttl > Duration::from_secs(300) {
            faults.push("media.url_ttl: must be at most 300s".into());
        }
        if self.outbound.queue_max == 0 {
            faults.push("outbound.queue_max: must be at least 1".into());
        }
        faults.extend(self.redis.url().err());
        faults.extend(self.token_keys().err());
        faults.extend(self.operator_key().err());
        faults
    }

    /// The operator's key.
    pub fn operator_key(&self) -> Result<Option<String>, String> {
        secret(self.auth.operator_key.as_ref()).map_err(|e| format!("auth.operator_key: {e}"))
    }

    /// The keys that tokens are verified with.
    pub fn token_keys(&self) -> Result<crate::auth::TokenKeys, String> {
        let own =
            secret(self.auth.hmac_secret_key.as_ref()).map_err(|e| format!("auth.hmac_secret_key: {e}"))?;
        let keys = self
            .auth
            .keys
            .iter()
            .enumerate()
            .map(|(n, k)| k.key().map_err(|e| format!("auth.keys[{n}]: {e}")));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        Ok(crate::auth::TokenKeys::new(keys, own.as_deref().filter(|s| !s.is_empty()).map(str::as_bytes)))
    }
}

impl TokenKeyConfig {
    fn key(&self) -> Result<crate::auth::token::TokenKey, String> {
        use jsonwebtoken::{Algorithm, DecodingKey};
        let (algorithm, key) = match self.algorithm.as_str() {
            "HS256" => {
                let secret =
                    secret(self.secret.as_ref())?.filter(|s| !s.is_empty()).ok_or("secret is missing")?;
                (Algorithm::HS256, DecodingKey::from_secret(secret.as_bytes()))
            }
            public @ ("EdDSA" | "ES256" | "RS256") => {
                let pem = secret(self.public_key.as_ref())?.ok_or("public_key is missing")?;
                let (algorithm, key) = match public {
                    "EdDSA" => (Algorithm::EdDSA, DecodingKey::from_ed_pem(pem.as_bytes())),
                    "ES256" => (Algorithm::ES256, DecodingKey::from_ec_pem(pem.as_bytes())),
                    _ => (Algorithm::RS256, DecodingKey::from_rsa_pem(pem.as_bytes())),
                };
                (algorithm, key.map_err(|e| format!("public_key: {e}"))?)
            }
            other => {
                return Err(format!("algorithm `{other}` is not known; use HS256, EdDSA, ES256 or RS256"));
            }
        };
        if self.tenants.is_empty() {
            return Err("tenants is empty: a key must name the tenants that it may speak for".into());
        }
        let speaks = crate::auth::token::Speaks::Tenants(self.tenants.iter().cloned().collect());
        Ok(crate::auth::token::TokenKey { id: self.id.clone(), algorithm, key, speaks })
    }
}
