//! The real engines: durable sends on Cassandra over a bare loop of its driver, events over a bare producer, what a crash
//! leaves behind, pages of a long history, a node of the store that freezes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::servers::{self, Server};
use bytes::Bytes;
use patchbay_actors::clock::Clock;
use patchbay_actors::outbox::{LANES_MAX, Outbox};
use patchbay_actors::router::Router;
use patchbay_actors::shard::{Reign, Shards};
use patchbay_loadtest::load::report::Quantiles;
use patchbay_loadtest::load::{self, Latencies, Plan};
use patchbay_protocol::client::Encoding;
use patchbay_protocol::event::{Event, Origin};
use patchbay_protocol::ids::{CommandId, ConversationId};
use patchbay_storage::events::{Source as _, Start};
use patchbay_storage::kafka::{KafkaConfig, KafkaSink, KafkaSource};
use patchbay_storage::log::{Append, LogKey, Logs};
use patchbay_storage::model::Model;
use patchbay_storage::scylla::{Scylla, ScyllaConfig};
use patchbay_storage::tables::{Mark, Tables};
use patchbay_storage::{Batch, Cell, Engine as _, RowWrite, Stamp, Table};
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use scylla::statement::batch::{Batch as CqlBatch, BatchType};

use crate::node::Node;
use crate::results::{Goal, Results};

const CONVERSATIONS: usize = 64;
const IN_FLIGHT: usize = 4;
/// Two rows of one append, as in [`crate::sends`].
const ROWS: [usize; 2] = [330, 300];

fn list(addresses: &str) -> String {
    format!("[\"{}\"]", addresses.replace(',', "\",\""))
}

/// How often the references of one conversation are written, as the node does it.
const GATHER: Duration = Duration::from_secs(3);
/// Partitions of a conversation's references.
const PARTS: usize = 16;

/// Which rows the driver alone writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// All that a send writes: before the ack those of the log; behind it, gathered, its reference.
    All,
    /// Those of the log alone.
    Log,
}

/// Writes what was gathered of a conversation, a batch for each partition, until nobody adds to it any more.
async fn references(
    session: Arc<scylla::client::session::Session>,
    insert: scylla::statement::prepared::PreparedStatement,
    (conversation, gathered): (usize, Weak<Mutex<Vec<[u8; 16]>>>),
) {
    loop {
        tokio::time::sleep(GATHER).await;
        let Some(gathered) = gathered.upgrade() else { return };
        let ids = std::mem::take(&mut *gathered.lock().unwrap());
        let writes = (0..PARTS).map(|part| {
            let of_part: Vec<_> = ids.iter().filter(|id| usize::from(id[0]) % PARTS == part).collect();
            let mut batch = CqlBatch::new(BatchType::Unlogged);
            let partition = format!("{conversation:016}{part}").into_bytes();
            let rows: Vec<_> = of_part
                .iter()
                .map(|id| {
                    batch.append_statement(insert.clone());
                    (partition.clone(), id.to_vec(), vec![0u8; 10], 1i64)
                })
                .collect();
            let session = session.clone();
            async move {
                if !rows.is_empty() {
                    session.batch(&batch, rows).await.unwrap();
                }
            }
        });
        futures_util::future::join_all(writes).await;
    }
}

/// Acks a second and latencies of the driver alone: the same rows, as many in flight, prepared, in batches.
async fn driver(addresses: &str, keyspace: &str, time: Duration, written: Rows) -> (f64, Quantiles) {
    let session = Arc::new(servers::session(addresses).await);
    let insert = format!(
        "INSERT INTO {keyspace}.log_entries (partition, place, value) VALUES (?, ?, ?) USING TIMESTAMP ?"
    );
    let mut insert = session.prepare(insert).await.unwrap();
    insert.set_is_idempotent(true);
    let reference =
        format!("INSERT INTO {keyspace}.refs (partition, place, value) VALUES (?, ?, ?) USING TIMESTAMP ?");
    let reference = session.prepare(reference).await.unwrap();
    let gathered: Vec<Arc<Mutex<Vec<[u8; 16]>>>> = (0..CONVERSATIONS).map(|_| Arc::default()).collect();
    for of in gathered.iter().map(Arc::downgrade).enumerate() {
        tokio::spawn(references(session.clone(), reference.clone(), of));
    }
    let (acks, latencies, started) = (Arc::new(AtomicU64::new(0)), Latencies::default(), Instant::now());
    let mut tasks = Vec::new();
    for slot in 0..CONVERSATIONS * IN_FLIGHT {
        let (session, insert, acks, latencies) =
            (session.clone(), insert.clone(), acks.clone(), latencies.clone());
        let gathered = gathered[slot / IN_FLIGHT].clone();
        tasks.push(tokio::spawn(async move {
            let partition = format!("{:024}", slot / IN_FLIGHT).into_bytes();
            let values = ROWS.map(|bytes| vec![b'x'; bytes]);
            let mut n: u64 = 0;
            while started.elapsed() < time {
                let mut batch = CqlBatch::new(BatchType::Unlogged);
                let place = |i: u64| (((slot as u64) << 40) | (n * 2 + i)).to_be_bytes().to_vec();
                let rows = [0, 1].map(|i| {
                    batch.append_statement(insert.clone());
                    (&partition[..], place(i), &values[i as usize][..], 1i64)
                });
                let sent = Instant::now();
                session.batch(&batch, rows.to_vec()).await.unwrap();
                latencies.note(sent.elapsed());
                acks.fetch_add(1, Ordering::Relaxed);
                if written == Rows::All {
                    let mut id = (n << 16 | slot as u64).to_be_bytes().repeat(2);
                    id[0] = (n % PARTS as u64) as u8;
                    gathered.lock().unwrap().push(id.try_into().unwrap());
                }
                n += 1;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    (acks.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64(), Quantiles::of(&latencies))
}

fn scylla(addresses: &str, keyspace: &str) -> ScyllaConfig {
    let nodes = addresses.split(',').map(str::to_owned).collect();
    ScyllaConfig { replication: 1, ..ScyllaConfig::new(nodes, "datacenter1", keyspace) }
}

/// Durable sends on Cassandra, and pages of a long history there.
pub async fn cassandra(results: &mut Results) {
    let time = Duration::from_secs(if results.quick { 8 } else { 20 });
    let server = Server::start("cassandra", 1, &["--heap", "1g"]);
    let engine = Arc::new(Scylla::connect(&scylla(&server.addresses, "bench")).await.unwrap());
    // The server's own code is slow until it has run for a while.
    let alone = async |written| driver(&server.addresses, "bench", time, written).await;
    alone(Rows::Log).await;
    let log_before = alone(Rows::Log).await;
    let before = alone(Rows::All).await;
    let dir = tempfile::tempdir().unwrap();
    let nodes = list(&server.addresses);
    let env = [
        ("PATCHBAY__STORAGE__ENGINE", "scylla"),
        ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes.as_str()),
        ("PATCHBAY__STORAGE__SCYLLA__DATACENTER", "datacenter1"),
        ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", "bench_node"),
        ("PATCHBAY__STORAGE__SCYLLA__REPLICATION", "1"),
    ];
    let node = Node::start(dir.path(), &env).await;
    let plan = Plan {
        conversations: CONVERSATIONS,
        agents: 4,
        encodings: vec![Encoding::Protobuf],
        customer_rate: 0.0,
        agent_rate: 0.0,
        in_flight: IN_FLIGHT,
        time,
    };
    let report = load::run(&node.target, &plan, |_, _| {}).await.unwrap();
    assert!(report.is_clean(), "{report}");
    node.stop().await;
    let after = alone(Rows::All).await;
    let log_after = alone(Rows::Log).await;
    let rate = f64::midpoint(before.0, after.0);
    let p99 = f64::midpoint(before.1.p99_ms, after.1.p99_ms);
    let conditions = format!(
        "one Cassandra node (commitlog_sync: batch), {CONVERSATIONS} conversations x {IN_FLIGHT} in flight on 4 sockets (webchat, Protobuf), {} s; node {:.0}/s p99 {:.1} ms, the driver alone with the same rows (two of the log, and a reference, gathered as the node does) {:.0}/s before and {:.0}/s after, p99 {:.1} and {:.1} ms; with the two of the log alone {:.0}/s and {:.0}/s, p99 {:.1} and {:.1} ms; everything on two cores",
        time.as_secs(),
        report.acked_per_second,
        report.sends.p99_ms,
        before.0,
        after.0,
        before.1.p99_ms,
        after.1.p99_ms,
        log_before.0,
        log_after.0,
        log_before.1.p99_ms,
        log_after.1.p99_ms
    );
    let ratio = report.acked_per_second / rate;
    results.note("cassandra_send_throughput_ratio", ratio, "ratio", Goal::AtLeast(0.7), &conditions, None);
    let ratio = report.sends.p99_ms / p99;
    results.note("cassandra_send_p99_ratio", ratio, "ratio", Goal::AtMost(1.5), &conditions, None);
    history(results, engine).await;
}

/// The newest 50 entries of a long conversation over those of a short one.
async fn history(results: &mut Results, engine: Arc<Scylla>) {
    let (long, short) = (if results.quick { 100_000u64 } else { 1_000_000 }, 1_000u64);
    let logs = Logs::new(engine);
    let key = |n: u8| LogKey { entity: [n; 16], shard: 1 };
    for (n, entries) in [(1, long), (2, short)] {
        let appends = (0..entries / 50).map(|at| {
            let logs = logs.clone();
            async move {
                let payload = (CommandId([1; 16]), Bytes::from(vec![b'x'; 300]));
                let stamp = Stamp::new(1, u32::try_from(at + 1).unwrap());
                logs.append(Append::new(key(n), stamp, at * 50 + 1, at * 50, &vec![payload; 50]))
                    .await
                    .unwrap();
            }
        });
        futures_util::StreamExt::for_each(
            futures_util::StreamExt::buffer_unordered(futures_util::stream::iter(appends), 32),
            |()| std::future::ready(()),
        )
        .await;
    }
    let mut taken: [Vec<Duration>; 2] = Default::default();
    for round in 0..600 {
        for (n, tip) in [(1, long), (2, short)] {
            let began = Instant::now();
            let page = logs.backward(key(n), tip + 1, 50, usize::MAX).await.unwrap();
            assert_eq!(page.len(), 50);
            if round >= 100 {
                taken[usize::from(n) - 1].push(began.elapsed());
            }
        }
    }
    let median = |all: &mut Vec<Duration>| {
        all.sort_unstable();
        all[all.len() / 2].as_secs_f64() * 1000.0
    };
    let [mut of_long, mut of_short] = taken;
    let (of_long, of_short) = (median(&mut of_long), median(&mut of_short));
    let conditions = format!(
        "newest 50 of a conversation of {long} entries: {of_long:.2} ms at the median of 500, of one of {short}: {of_short:.2} ms, in turns"
    );
    results.note("history_page_ratio", of_long / of_short, "ratio", Goal::AtMost(1.5), &conditions, None);
}

/// Counts deliveries of a bare producer.
struct Counts(Arc<AtomicU64>);

impl rdkafka::client::ClientContext for Counts {}

impl ProducerContext for Counts {
    type DeliveryOpaque = ();
    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok());
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn origin(n: usize) -> Arc<Origin> {
    let (tenant, account) = ("bench".parse().unwrap(), "wa".parse().unwrap());
    let conversation = ConversationId::derive(&tenant, &account, &n.to_string());
    Arc::new(Origin { tenant, account, conversation })
}

fn entry(seq: u64) -> Bytes {
    let entry = format!(
        "{{\"seq\":{seq},\"at\":\"2026-11-21T09:00:00.123Z\",\"type\":\"message.received\",\"data\":{{\"provider_id\":\"wamid.{seq:032}\",\"content\":{{\"type\":\"text\",\"text\":\"hola, a message of an ordinary length\"}},\"sent_at\":\"2026-11-21T09:00:00.000Z\"}},\"actor\":{{\"type\":\"contact\",\"id\":\"34600111222\"}}}}"
    );
    entry.into()
}

const STREAMS: usize = 1_000;

/// Events a second of a bare idempotent producer, with as many under way.
async fn bare(config: &KafkaConfig, events: u64) -> f64 {
    let delivered = Arc::new(AtomicU64::new(0));
    let producer =
        ThreadedProducer::from_config_and_context(&config.producer(), Counts(delivered.clone())).unwrap();
    let inbox: patchbay_protocol::InboxId = "main".parse().unwrap();
    let envelopes: Vec<_> = (0..STREAMS)
        .map(|n| {
            Event { origin: origin(n), inbox: inbox.clone(), seq: 1, entry: entry(1) }.envelope().unwrap()
        })
        .collect();
    let send = |n: u64| {
        let envelope = &envelopes[n as usize % STREAMS];
        let mut headers = OwnedHeaders::new_with_capacity(envelope.headers.len());
        for (key, value) in &envelope.headers {
            headers = headers.insert(Header { key, value: Some(value.as_str()) });
        }
        let record = BaseRecord::to(&config.topic).key(envelope.key.as_str()).payload(&envelope.value[..]);
        producer.send(record.headers(headers)).unwrap();
    };
    // Its first send waits for its identity.
    send(0);
    while delivered.load(Ordering::Relaxed) < 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let started = Instant::now();
    for n in 1..events {
        while n - delivered.load(Ordering::Relaxed) >= patchbay_actors::outbox::WINDOW as u64 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        send(n);
    }
    while delivered.load(Ordering::Relaxed) < events {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    events as f64 / started.elapsed().as_secs_f64()
}

/// Events a second through the outbox, from confirmed entries to their delivery.
async fn outbox(config: &KafkaConfig, events: u64) -> f64 {
    let shards = Shards::new(64, 1, Tables::new(Arc::new(Model::new())), Clock::System);
    let (deliveries, delivered) = patchbay_storage::events::deliveries();
    let sink = Arc::new(KafkaSink::new(config.clone(), deliveries));
    let outbox = Outbox::new(shards.clone(), sink, LANES_MAX);
    let router: Weak<dyn Router> = Weak::<patchbay_actors::node::Node>::new();
    outbox.begin(router, delivered);
    for shard in 0..shards.count {
        shards.begin(Reign::new(shard, 1, 0, Clock::System));
        outbox.open(shard, 1);
    }
    while outbox.trouble().is_some() || !(0..shards.count).all(|shard| outbox.has_caught_up(shard)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (origins, inbox): (Vec<_>, patchbay_protocol::InboxId) =
        ((0..STREAMS).map(origin).collect(), "main".parse().unwrap());
    let offer = |n: u64| {
        let (stream, seq) = (n as usize % STREAMS, n / STREAMS as u64 + 1);
        let shard = origins[stream].conversation.shard(64);
        let bucket = Mark { epoch: 1, bucket: 0 };
        shards.reign(shard).unwrap().activity.hold(bucket.bucket);
        outbox.offer(&origins[stream], &inbox, shard, bucket, &[(seq, entry(seq))]);
    };
    let done = || outbox.published();
    offer(0);
    while done() < 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let started = Instant::now();
    for n in 1..events {
        // As owners do: some appends, then others have their turn. What is at hand stays bounded.
        if n % 64 == 0 {
            tokio::task::yield_now().await;
            while n - done() >= 2 * patchbay_actors::outbox::WINDOW as u64 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
        offer(n);
    }
    while done() < events {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    events as f64 / started.elapsed().as_secs_f64()
}

fn kafka_env<'a>(brokers: &'a str, topic: &'a str) -> [(&'a str, &'a str); 3] {
    [
        ("PATCHBAY__EVENTS__ENGINE", "kafka"),
        ("PATCHBAY__EVENTS__KAFKA__BROKERS", brokers),
        ("PATCHBAY__EVENTS__KAFKA__TOPIC", topic),
    ]
}

/// The outbox: its throughput and its latency.
pub async fn kafka(results: &mut Results) {
    let server = Server::start("kafka", 1, &["--heap", "512m"]);
    let events: u64 = if results.quick { 300_000 } else { 1_000_000 };
    let config = |topic: &str| KafkaConfig::new(&server.addresses, topic);
    for topic in ["warm", "before", "after"] {
        patchbay_storage::kafka::ensure_topic(&config(topic)).await.unwrap();
    }
    bare(&config("warm"), events).await;
    let before = bare(&config("before"), events).await;
    let through = outbox(&config("outbox"), events).await;
    let after = bare(&config("after"), events).await;
    let conditions = format!(
        "{events} events of {} bytes and nine headers, {STREAMS} conversations, {} under way: {through:.0}/s through the outbox, a bare idempotent producer with the same messages made beforehand {before:.0}/s before and {after:.0}/s after; one broker, everything on two cores",
        entry(1).len(),
        patchbay_actors::outbox::WINDOW
    );
    let ratio = through / f64::midpoint(before, after);
    results.note("kafka_publish_throughput_ratio", ratio, "ratio", Goal::AtLeast(0.6), &conditions, None);
    latency(results, &server).await;
}

/// From an entry to a consumer.
async fn latency(results: &mut Results, server: &Server) {
    let (dir, brokers) = (tempfile::tempdir().unwrap(), list(&server.addresses));
    let node = Node::start(dir.path(), &kafka_env(&brokers, "latency")).await;
    node.tenant("bench").await;
    let mut source =
        KafkaSource::join(&KafkaConfig::new(&server.addresses, "latency"), "latency", Start::Earliest)
            .unwrap();
    let count = if results.quick { 2_000 } else { 10_000 };
    let reads = tokio::spawn(async move {
        let mut taken = Vec::new();
        while taken.len() < count {
            let received = source.next().await.unwrap();
            let now = patchbay_actors::clock::Clock::System.now().as_millis();
            let at = received.envelope.headers.iter().find(|(n, _)| *n == "ce_time").unwrap().1.clone();
            taken.push(now - patchbay_protocol::Timestamp::parse(&at).unwrap().as_millis());
        }
        // The group's beginning is no latency.
        let mut taken = taken.split_off(count / 5);
        taken.sort_unstable();
        (taken[taken.len() / 2], taken[taken.len() * 99 / 100])
    });
    let mut tick = tokio::time::interval(Duration::from_millis(2));
    let mut n = 0;
    while !reads.is_finished() {
        tick.tick().await;
        node.write_again("bench", &[n % 50], n).await;
        n += 1;
    }
    let (p50, p99) = reads.await.unwrap();
    node.stop().await;
    let linger = 5.0;
    let conditions = format!(
        "{count} events of webhooks one after another on the embedded store; from the instant in the entry, before it is durable, to a consumer of a group: p50 {p50} ms, p99 {p99} ms, of which {linger} ms is the linger (whole milliseconds)"
    );
    results.note(
        "kafka_entry_to_consumer_p50_ms",
        p50 as f64 - linger,
        "ms",
        Goal::AtMost(5.0),
        &conditions,
        None,
    );
}

/// Seconds that a node needs to publish what a crash has left, over conversations with so much history.
async fn leftovers(server: &Server, conversations: usize, history: usize, left: usize) -> f64 {
    let (dir, brokers, topic) =
        (tempfile::tempdir().unwrap(), list(&server.addresses), servers::fresh("left"));
    let env = kafka_env(&brokers, &topic);
    let everybody: Vec<usize> = (0..conversations).collect();
    let node = Node::start(dir.path(), &env).await;
    node.tenant("bench").await;
    for round in 0..history {
        node.write_again("bench", &everybody, round).await;
    }
    node.stop().await;
    // Nobody takes events; then the node is lost.
    let away = kafka_env("[\"127.0.0.1:1\"]", &topic);
    let mut node = Node::start(dir.path(), &away).await;
    for round in history..history + left {
        node.write_again("bench", &everybody, round).await;
    }
    node.child.kill().await.unwrap();
    let node = Node::start(dir.path(), &env).await;
    let began = Instant::now();
    let wanted = (conversations * left) as f64;
    loop {
        let text = node.metrics().await;
        let figure = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name));
            line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0)
        };
        if figure("patchbay_outbox_published_total") >= wanted
            && figure("patchbay_outbox_lagging_conversations") == 0.0
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let taken = began.elapsed().as_secs_f64();
    node.stop().await;
    taken
}

/// What a crash leaves to the outbox, by how much was stored before.
pub async fn recovery(results: &mut Results) {
    let server = Server::start("kafka", 1, &["--heap", "512m"]);
    let (conversations, left) = if results.quick { (2_000, 10) } else { (10_000, 10) };
    let (short, long) = (10, 100);
    // Each twice, in turns: what the machine does meanwhile moves one by a fifth.
    let (mut of_short, mut of_long) = (0.0, 0.0);
    for history in [short, long, long, short] {
        let taken = leftovers(&server, conversations, history, left).await;
        *(if history == short { &mut of_short } else { &mut of_long }) += taken / 2.0;
    }
    let conditions = format!(
        "{} entries of {conversations} conversations left by a SIGKILL: published in {of_long:.2} s where each has {long} earlier ones, in {of_short:.2} s where it has {short} (means of two)",
        conversations * left
    );
    results.note("outbox_recovery_ratio", of_long / of_short, "ratio", Goal::AtMost(1.2), &conditions, None);
}

/// Writes while one of three nodes of the store is frozen: ours over the driver as it comes.
pub async fn frozen(results: &mut Results) {
    let server = Server::start("cassandra", 3, &["--heap", "384m"]);
    let config = ScyllaConfig { replication: 3, ..scylla(&server.addresses, "frozen") };
    let engine = Arc::new(Scylla::connect(&config).await.unwrap());
    let session = Arc::new(servers::session(&server.addresses).await);
    let insert =
        "INSERT INTO frozen.log_entries (partition, place, value) VALUES (?, ?, ?) USING TIMESTAMP ?";
    let insert = session.prepare(insert).await.unwrap();
    let freeze = Duration::from_secs(6);
    let (mut p99, mut most) = ([0.0; 2], [0; 2]);
    for (which, at) in [("ours", 0), ("driver", 1)] {
        let (latencies, started) = (Latencies::default(), Instant::now());
        let longest = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..12u64)
            .map(|slot| {
                let (engine, session, insert, latencies) =
                    (engine.clone(), session.clone(), insert.clone(), latencies.clone());
                let longest = longest.clone();
                tokio::spawn(async move {
                    let mut n = 0u64;
                    while started.elapsed() < freeze + Duration::from_secs(6) {
                        let place = Bytes::copy_from_slice(&n.to_be_bytes());
                        let partition = Bytes::from(format!("{which}{slot}{}", n % 100));
                        let began = Instant::now();
                        let meanwhile = (3..9).contains(&started.elapsed().as_secs());
                        if which == "ours" {
                            let cell = Cell::Put(Bytes::from_static(b"x"));
                            let rows = vec![RowWrite { clustering: place, stamp: Stamp::new(1, 1), cell }];
                            let batch = Batch { shard: 0, table: Table::Entries, partition, rows };
                            while engine.write(batch.clone()).await.is_err() {}
                        } else {
                            let values = (&partition[..], &place[..], &b"x"[..], 1i64);
                            while session.execute_unpaged(&insert, values).await.is_err() {}
                        }
                        if meanwhile {
                            latencies.note(began.elapsed());
                            longest.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                        }
                        n += 1;
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(3)).await;
        server.freeze(3);
        tokio::time::sleep(freeze).await;
        server.thaw(3);
        for task in tasks {
            task.await.unwrap();
        }
        p99[at] = Quantiles::of(&latencies).p99_ms;
        most[at] = longest.load(Ordering::Relaxed);
    }
    let conditions = format!(
        "three Cassandra nodes, RF 3, 12 writers, one node frozen for 6 s: p99 of writes begun meanwhile {:.0} ms and the longest {} ms, with the driver's defaults {:.0} and {} ms",
        p99[0], most[0], p99[1], most[1]
    );
    results.note("frozen_store_node_p99_ms", p99[0], "ms", Goal::AtMost(1500.0), &conditions, None);
}
