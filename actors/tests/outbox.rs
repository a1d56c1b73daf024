//! The outbox on the model engine and a topic that fails as it is told: whatever happens, each conversation's events are
//! in the topic, and the first time that each of them is there nothing under it is missing.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use common::{World, account, id, tenant, until};
use patchbay_actors::clock::Clock;
use patchbay_actors::directory::Inbox;
use patchbay_actors::node::Events;
use patchbay_protocol::event::Event;
use patchbay_protocol::{ConversationId, Timestamp};
use patchbay_storage::events::{Deliveries, Delivery, Fault, SendError, Sink};
use patchbay_storage::model::Model;
use patchbay_storage::tables::Tables;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// What happens to events on their way.
#[derive(Clone, Default)]
struct Weather {
    /// Of a hundred, so many fail, and everything behind them until the sink is opened again.
    fails: u32,
    /// Of a hundred failures, so many were in the topic all the same.
    lies: u32,
    /// Nothing is delivered and nothing opened.
    away: bool,
    /// Events that are never taken, and refuse whatever is sent in the same moment.
    poison: HashSet<(ConversationId, u64)>,
}

struct Inner {
    events: Vec<(ConversationId, u64)>,
    weather: Weather,
    random: StdRng,
    broken: bool,
    generation: u32,
    /// Nodes that have been; the last one alone is alive.
    nodes: u32,
    /// Sent and not delivered.
    waiting: Vec<(ConversationId, u64)>,
}

/// A topic in memory that outlives its nodes.
#[derive(Clone)]
struct Topic(Arc<Mutex<Inner>>);

struct TopicSink {
    topic: Topic,
    node: u32,
}

impl Topic {
    fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            events: Vec::new(),
            weather: Weather::default(),
            random: StdRng::seed_from_u64(seed),
            broken: true,
            generation: 0,
            nodes: 0,
            waiting: Vec::new(),
        })))
    }

    fn weather(&self, weather: Weather) {
        self.0.lock().unwrap().weather = weather;
    }

    fn events(&self, lanes_max: usize) -> Events {
        let (deliveries, delivered) = patchbay_storage::events::deliveries();
        let node = {
            let mut inner = self.0.lock().unwrap();
            inner.nodes += 1;
            inner.waiting.clear();
            inner.broken = true;
            inner.nodes
        };
        let sink = TopicSink { topic: self.clone(), node };
        let topic = self.clone();
        tokio::spawn(async move {
            while topic.0.lock().unwrap().nodes == node {
                tokio::time::sleep(Duration::from_millis(3)).await;
                topic.deliver(node, &deliveries);
            }
        });
        Events { lanes_max, ..Events::new(Arc::new(sink), delivered) }
    }

    /// Settles what was sent since the last time: one batch, as brokers see it.
    fn deliver(&self, node: u32, to: &Deliveries) {
        let mut inner = self.0.lock().unwrap();
        if inner.weather.away || inner.nodes != node {
            return;
        }
        let batch = std::mem::take(&mut inner.waiting);
        let poisoned = batch.iter().any(|event| inner.weather.poison.contains(event));
        for (conversation, seq) in batch {
            let fails = inner.broken || poisoned || inner.random.random_range(0..100) < inner.weather.fails;
            let lies =
                fails && !inner.broken && !poisoned && inner.random.random_range(0..100) < inner.weather.lies;
            let outcome = if !fails {
                Ok(())
            } else if poisoned {
                Err(Fault::Event("too large".into()))
            } else {
                Err(Fault::Passing("broken".into()))
            };
            if !fails || lies {
                inner.events.push((conversation, seq));
            }
            inner.broken |= fails;
            let generation = inner.generation;
            let _ = to.try_send(Delivery { conversation, seq, generation, outcome });
        }
    }

    /// Each conversation's highest seq in the topic; panics when an event is there before one under it.
    fn check(&self) -> BTreeMap<ConversationId, u64> {
        let mut highest: BTreeMap<ConversationId, u64> = BTreeMap::new();
        for (conversation, seq) in &self.0.lock().unwrap().events {
            let last = highest.entry(*conversation).or_default();
            assert!(*seq <= *last + 1, "{conversation}: {seq} behind {last}");
            *last = (*last).max(*seq);
        }
        highest
    }

    fn highest(&self, thread: &str) -> u64 {
        self.check().get(&id(thread)).copied().unwrap_or(0)
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }
}

#[async_trait]
impl Sink for TopicSink {
    async fn open(&self, generation: u32) -> Result<(), String> {
        let mut inner = self.topic.0.lock().unwrap();
        if inner.weather.away || inner.nodes != self.node {
            return Err("away".into());
        }
        inner.waiting.clear();
        (inner.broken, inner.generation) = (false, generation);
        Ok(())
    }

    fn send(&self, event: &Event) -> Result<(), SendError> {
        let mut inner = self.topic.0.lock().unwrap();
        if inner.nodes == self.node {
            inner.waiting.push((event.origin.conversation, event.seq));
        }
        Ok(())
    }
}

async fn node(model: Model, topic: &Topic, lanes_max: usize) -> World {
    let clock = Clock::from(Timestamp::parse("2026-11-21T09:00:00Z").unwrap());
    World::with_events(model, clock, Some(topic.events(lanes_max))).await
}

async fn fresh(topic: &Topic, lanes_max: usize) -> World {
    let world = node(Model::new(), topic, lanes_max).await;
    let directory = world.node.directory();
    directory.put_inbox(&tenant(), &"main".parse().unwrap(), &Inbox { name: "Main".into() }).await.unwrap();
    world.put_account("wa", "main").await;
    let _ = account();
    world
}

async fn all_published(world: &World, topic: &Topic, threads: &[String]) {
    for thread in threads {
        let wanted = world.entries(thread).await.len() as u64;
        let published = async {
            while topic.highest(thread) < wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(600), published).await;
        assert!(waited.is_ok(), "{} of {wanted}: {:?}", topic.highest(thread), world.node.outbox());
    }
    topic.check();
}

fn threads(n: usize) -> Vec<String> {
    (0..n).map(|n| format!("346{n:05}")).collect()
}

#[tokio::test(start_paused = true)]
async fn every_entry_becomes_one_event_and_its_bucket_is_settled() {
    let topic = Topic::new(1);
    let world = fresh(&topic, 1000).await;
    let threads = threads(20);
    for round in 0..5 {
        for thread in &threads {
            world.writes(thread, &format!("{thread}-{round}")).await;
        }
    }
    all_published(&world, &topic, &threads).await;
    assert_eq!(topic.count(), 20 * 6, "opened, and five messages; none twice");
    assert_eq!(world.node.outbox().unwrap().lagging(), 0);
    // Later activity moves the mark over what is settled.
    tokio::time::sleep(Duration::from_secs(11)).await;
    for thread in &threads {
        world.writes(thread, &format!("{thread}-later")).await;
    }
    let tables = Tables::new(Arc::new(world.model.clone()));
    until("a mark moves", async || tables.marks(0).await.unwrap().settled).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_holds_nobody_up_and_its_marks() {
    let topic = Topic::new(2);
    let world = fresh(&topic, 1000).await;
    let threads = threads(10);
    topic.weather(Weather { away: true, ..Weather::default() });
    for round in 0..20 {
        for thread in &threads {
            world.writes(thread, &format!("{thread}-{round}")).await;
        }
        tokio::time::sleep(Duration::from_secs(7)).await;
    }
    let tables = Tables::new(Arc::new(world.model.clone()));
    let published = topic.count();
    for shard in 0..4 {
        assert!(
            tables.marks(shard).await.unwrap().settled.is_none_or(|m| m.bucket <= 1),
            "nothing unpublished is settled"
        );
    }
    // The node that was there is lost in the middle of it; the next one finds everything by its activity rows.
    let model = world.model.fork();
    world.model.stop_after(0);
    let world = node(model, &topic, 1000).await;
    world.writes(&threads[0], "later").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(topic.count(), published, "still away");
    topic.weather(Weather::default());
    all_published(&world, &topic, &threads).await;
    until("earlier incarnations are done with", async || world.node.shards().are_swept().then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn more_conversations_than_are_told_apart_are_found_in_the_store_again() {
    let topic = Topic::new(3);
    let world = fresh(&topic, 8).await;
    let threads = threads(100);
    topic.weather(Weather { away: true, ..Weather::default() });
    for round in 0..3 {
        for thread in &threads {
            world.writes(thread, &format!("{thread}-{round}")).await;
        }
    }
    assert!(world.node.outbox().unwrap().lagging() <= 8, "bounded");
    topic.weather(Weather::default());
    all_published(&world, &topic, &threads).await;
    for thread in &threads {
        world.writes(thread, &format!("{thread}-after")).await;
    }
    all_published(&world, &topic, &threads).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    for thread in &threads {
        world.writes(thread, &format!("{thread}-last")).await;
    }
    let tables = Tables::new(Arc::new(world.model.clone()));
    until("what fell behind is settled too", async || tables.marks(1).await.unwrap().settled).await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_never_taken_parks_its_conversation_and_nobody_else() {
    let topic = Topic::new(4);
    let world = fresh(&topic, 1000).await;
    let threads = threads(10);
    let bad = (id(&threads[3]), 4);
    topic.weather(Weather { poison: HashSet::from([bad]), ..Weather::default() });
    for round in 0..6 {
        for thread in &threads {
            world.writes(thread, &format!("{thread}-{round}")).await;
        }
    }
    let outbox = world.node.outbox().unwrap();
    until("it is parked by name", async || (outbox.parked() == [bad]).then_some(())).await;
    for thread in threads.iter().filter(|t| **t != threads[3]) {
        until("the others go on", async || (topic.highest(thread) == 7).then_some(())).await;
    }
    assert_eq!(topic.highest(&threads[3]), 3, "nothing is passed over");
    let tables = Tables::new(Arc::new(world.model.clone()));
    let shard = bad.0.shard(4);
    assert_eq!(tables.marks(shard).await.unwrap().parked_outboxes, [bad]);
    // A restart tries again; it is as bad as before, and what came meanwhile is not lost.
    world.writes(&threads[3], "meanwhile").await;
    let world = node(world.model.fork(), &topic, 1000).await;
    let outbox = world.node.outbox().unwrap();
    until("it is parked again", async || (outbox.parked() == [bad]).then_some(())).await;
    // Somebody has seen to it.
    topic.weather(Weather::default());
    tokio::time::sleep(Duration::from_secs(300)).await;
    until("it goes on by itself", async || (topic.highest(&threads[3]) == 8).then_some(())).await;
    until("its row is gone", async || {
        tables_of(&world).marks(shard).await.unwrap().parked_outboxes.is_empty().then_some(())
    })
    .await;
}

fn tables_of(world: &World) -> Tables {
    Tables::new(Arc::new(world.model.clone()))
}

#[tokio::test(start_paused = true)]
async fn a_store_of_before_events_waits_for_its_replay() {
    let world = World::new().await;
    world.writes("34600", "a").await;
    let topic = Topic::new(5);
    let world = node(world.model.fork(), &topic, 1000).await;
    world.writes("34600", "b").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(topic.count(), 0);
    assert!(world.node.outbox().unwrap().waits_for_replay());
    patchbay_actors::node::note_events_begun(&tables_of(&world)).await.unwrap();
    until("the outbox begins behind it", async || (topic.count() > 0).then_some(())).await;
}

/// Seeded schedules of writes, failures, lies, outages and crashes.
#[tokio::test(start_paused = true)]
async fn whatever_happens_nothing_is_missing_and_nothing_is_early() {
    for seed in 0..12 {
        let topic = Topic::new(seed);
        let mut random = StdRng::seed_from_u64(seed);
        let lanes_max = [6, 1000][random.random_range(0..2)];
        let mut world = fresh(&topic, lanes_max).await;
        let threads = threads(24);
        for step in 0..60 {
            match random.random_range(0..12) {
                0 => topic.weather(Weather { fails: 20, lies: 50, ..Weather::default() }),
                1 => topic.weather(Weather { away: true, ..Weather::default() }),
                2..=4 => topic.weather(Weather::default()),
                5 => {
                    let model = world.model.fork();
                    world.model.stop_after(0);
                    world = node(model, &topic, lanes_max).await;
                }
                6 => tokio::time::sleep(Duration::from_secs(random.random_range(1..20))).await,
                _ => {}
            }
            for n in 0..random.random_range(1..12) {
                let thread = &threads[random.random_range(0..threads.len())];
                world.writes(thread, &format!("{seed}-{step}-{n}")).await;
            }
        }
        topic.weather(Weather::default());
        all_published(&world, &topic, &threads).await;
        println!("seed {seed}: {} events", topic.count());
    }
}
