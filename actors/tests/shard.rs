//! The shard host by itself, around an entity of three lines: admission, poison, supervision, passivation, damage,
//! and an owner that has been succeeded. Time is paused.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use patchbay_actors::clock::Clock;
use patchbay_actors::shard::entity::{Decision, Derived, Found, LogEntity, Lookup, Now};
use patchbay_actors::shard::log_actor::Handle;
use patchbay_actors::shard::reply::Answer;
use patchbay_actors::shard::slots::{
    ENTITY_IN_FLIGHT_MAX, FAILURES_MAX, LONG_PAUSE, SHARD_IN_FLIGHT_MAX, Slots,
};
use patchbay_actors::shard::{Reign, Shards};
use patchbay_protocol::ids::{CommandId, EntityId};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use patchbay_storage::log::{Append, LogKey};
use patchbay_storage::model::{Faults, Model};
use patchbay_storage::tables::{IdKey, Tables};
use patchbay_storage::{Batch, Cell, Engine as _, RowWrite, Stamp, Table};

const SHARDS: u32 = 4;

/// A list of words. Its commands say how they go wrong.
#[derive(Default)]
struct Words {
    /// So many publications make their actor fail.
    fails: AtomicU32,
}

#[derive(Debug)]
enum Say {
    Word(&'static str),
    /// Panics in `decide`, every time.
    Poison,
    Count,
    Wake,
}

impl LogEntity for Words {
    type State = Vec<String>;
    type Entry = String;
    type Command = Say;
    type Reply = usize;
    type Effect = ();

    fn fresh(&self, _: &EntityId) -> Vec<String> {
        Vec::new()
    }
    fn name(command: &Say) -> &'static str {
        match command {
            Say::Word(_) => "words.word",
            Say::Poison => "words.poison",
            Say::Count => "words.count",
            Say::Wake => "words.wake",
        }
    }
    fn command_id(_: &Say) -> CommandId {
        CommandId(rand::random())
    }
    fn lookups(_: &Vec<String>, _: &Found<String>, command: &Say) -> Vec<Lookup> {
        match command {
            Say::Word(word) => vec![Lookup::Id(IdKey::of([word]))],
            Say::Poison | Say::Count | Say::Wake => vec![],
        }
    }
    fn decide(
        state: &Vec<String>,
        found: &Found<String>,
        command: &Say,
        _: &Now,
    ) -> Result<Decision<Self>, CommandError> {
        match command {
            Say::Word(word) if found.id(IdKey::of([word])).is_some() => Ok(Decision::reply(state.len())),
            Say::Word(word) => Ok(Decision::entries(vec![(*word).to_owned()], state.len() + 1)),
            Say::Poison => panic!("poison"),
            Say::Count | Say::Wake => Ok(Decision::reply(state.len())),
        }
    }
    fn apply(state: &mut Vec<String>, _: u64, _: CommandId, entry: &String) {
        state.push(entry.clone());
    }
    fn at(_: &String) -> Timestamp {
        Timestamp::default()
    }
    fn ids(entry: &String, _: u64) -> Vec<IdKey> {
        vec![IdKey::of([entry.as_str()])]
    }
    fn encode(entry: &String, _: u64) -> Bytes {
        Bytes::copy_from_slice(entry.as_bytes())
    }
    fn decode(payload: &[u8]) -> Option<String> {
        String::from_utf8(payload.to_vec()).ok()
    }
    fn freeze(state: &Vec<String>) -> Bytes {
        Bytes::from(state.join(","))
    }
    fn thaw(&self, _: &EntityId, snapshot: &[u8]) -> Option<Vec<String>> {
        let text = std::str::from_utf8(snapshot).ok()?;
        Some(text.split(',').filter(|w| !w.is_empty()).map(str::to_owned).collect())
    }
    fn publish(&self, _: &EntityId, _: &Vec<String>, _: &[(u64, Bytes)]) {
        let left = self.fails.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        assert!(left.is_err(), "this actor fails");
    }
    fn derived(&self, _: &Vec<String>, _: LogKey, _: Stamp) -> Derived {
        Derived::default()
    }
    fn replay(_: &Vec<String>, _: u64, _: &String) -> Option<()> {
        None
    }
    fn on_load(&self, _: &Vec<String>) -> Option<Say> {
        None
    }
    fn timer(_: &Vec<String>, _: Option<Timestamp>, _: Timestamp) -> Option<Timestamp> {
        None
    }
    fn wake_at(_: &Vec<String>, _: Timestamp) -> Option<Timestamp> {
        None
    }
    fn wake() -> Say {
        Say::Wake
    }
    fn is_wake(command: &Say) -> bool {
        matches!(command, Say::Wake)
    }
    fn may_passivate(_: &Vec<String>) -> bool {
        true
    }
    fn is_handed_on((): &()) -> bool {
        false
    }
    async fn act(&self, _: &EntityId, (): (), _: Handle<Self>) {}
}

struct World {
    slots: Arc<Slots<Words>>,
    shards: Arc<Shards>,
    model: Model,
}

async fn world_on(model: Model, epoch: u32, words: Words) -> World {
    let clock = Clock::from(Timestamp::from_seconds(1_000_000));
    let shards = Shards::new(SHARDS, epoch, Tables::new(Arc::new(model.clone())), clock);
    (0..SHARDS).for_each(|shard| drop(shards.begin(Reign::new(shard, epoch, 0, clock))));
    World { slots: Slots::start(words, shards.clone()).await.unwrap(), shards, model }
}

async fn world() -> World {
    world_on(Model::new(), 1, Words::default()).await
}

/// The `n`th entity of a shard.
fn id(shard: u32, n: usize) -> EntityId {
    let all = (0..).map(|n| EntityId::Account("t".parse().unwrap(), format!("a{n}").parse().unwrap()));
    all.filter(|id| id.shard(SHARDS) == shard).nth(n).unwrap()
}

impl World {
    fn send(&self, id: &EntityId, say: Say) -> Result<Answer<usize>, CommandError> {
        self.slots.send(id, say)
    }

    async fn ask(&self, id: &EntityId, say: Say) -> Result<usize, CommandError> {
        self.send(id, say)?.wait().await
    }

    fn key(&self, id: &EntityId) -> LogKey {
        LogKey { entity: id.key(), shard: id.shard(SHARDS) }
    }

    /// Waits until nothing is active any more.
    async fn passivated(&self) {
        while self.slots.active_count() > 0 {
            self.slots.passivate_idle(Duration::ZERO);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn retry_after(error: &CommandError) -> u64 {
    let message = error.message();
    let object = message.split_once(' ').map(|(_, o)| o).unwrap_or("{}");
    serde_json::from_str::<serde_json::Value>(object).unwrap()["retry_after_ms"].as_u64().unwrap()
}

fn is_overloaded<T>(outcome: Result<T, CommandError>) -> u64 {
    let Err(error) = outcome else { panic!("taken") };
    assert_eq!(error.code, ErrorCode::Overloaded);
    retry_after(&error)
}

#[tokio::test(start_paused = true)]
async fn an_entity_takes_so_many_commands_at_once_and_says_when_to_come_back() {
    let w = world().await;
    let (one, other) = (id(0, 0), id(0, 1));
    let taken: Vec<_> = (0..ENTITY_IN_FLIGHT_MAX).map(|_| w.send(&one, Say::Count).unwrap()).collect();
    assert!(is_overloaded(w.send(&one, Say::Count)) > 0);
    assert_eq!(w.ask(&other, Say::Word("x")).await, Ok(1), "a neighbour on the shard does not notice");
    for answer in taken {
        assert_eq!(answer.wait().await, Ok(0));
    }
    assert_eq!(w.ask(&one, Say::Count).await, Ok(0), "a place that is given back can be taken");
}

#[tokio::test(start_paused = true)]
async fn a_shard_takes_so_many_commands_at_once() {
    let w = world().await;
    let mut taken = Vec::new();
    for n in 0..(SHARD_IN_FLIGHT_MAX / ENTITY_IN_FLIGHT_MAX) as usize {
        let one = id(1, n);
        taken.extend((0..ENTITY_IN_FLIGHT_MAX).map(|_| w.send(&one, Say::Count).unwrap()));
    }
    assert!(is_overloaded(w.send(&id(1, 99), Say::Count)) > 0);
    assert_eq!(w.ask(&id(2, 0), Say::Count).await, Ok(0), "another shard does not notice");
    for answer in taken {
        answer.wait().await.unwrap();
    }
    assert_eq!(w.ask(&id(1, 99), Say::Count).await, Ok(0));
}

#[tokio::test(start_paused = true)]
async fn a_poison_command_is_parked_by_name_and_its_neighbours_stand() {
    let w = world().await;
    let one = id(0, 0);
    // All in one batch: those before and those behind it.
    let before = w.send(&one, Say::Word("a")).unwrap();
    let poison = w.send(&one, Say::Poison).unwrap();
    let behind = w.send(&one, Say::Word("b")).unwrap();
    assert_eq!(before.wait().await, Ok(1));
    let error = poison.wait().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal);
    assert!(error.message().contains("words.poison"), "{}", error.message());
    assert_eq!(behind.wait().await, Ok(2));
    assert_eq!(w.ask(&one, Say::Count).await, Ok(2), "the actor goes on");
}

#[tokio::test(start_paused = true)]
async fn an_actor_that_fails_rests_longer_each_time_and_comes_back_with_what_was_durable() {
    let words = Words::default();
    words.fails.store(FAILURES_MAX, Ordering::Relaxed);
    let w = world_on(Model::new(), 1, words).await;
    let one = id(0, 0);
    let mut rests = Vec::new();
    for n in 0..FAILURES_MAX {
        let word = ["a", "b", "c", "d", "e"][n as usize];
        // It is durable, and its actor fails before it can say so.
        assert_eq!(w.ask(&one, Say::Word(word)).await.unwrap_err().code, ErrorCode::Unavailable);
        tokio::time::sleep(Duration::from_millis(1)).await;
        let rest = is_overloaded(w.send(&one, Say::Count));
        assert_eq!(w.ask(&id(0, 1), Say::Count).await, Ok(0), "the rest of the shard does not notice");
        rests.push(rest);
        tokio::time::sleep(Duration::from_millis(rest + 1)).await;
        assert_eq!(w.ask(&one, Say::Word(word)).await, Ok(n as usize + 1), "a repeat finds it");
    }
    assert!(rests.windows(2).all(|r| r[0] < r[1]), "{rests:?}");
    let long = u64::try_from(LONG_PAUSE.as_millis()).unwrap();
    assert!(
        (long - 1000..=long).contains(rests.last().unwrap()),
        "past the limit it is left alone: {rests:?}"
    );
    // An activation that lasts has a clean record.
    tokio::time::sleep(LONG_PAUSE).await;
    w.slots.entity().fails.store(1, Ordering::Relaxed);
    assert!(w.ask(&one, Say::Word("f")).await.is_err());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(is_overloaded(w.send(&one, Say::Count)) < 1000);
}

#[tokio::test(start_paused = true)]
async fn an_idle_entity_is_forgotten_and_costs_one_read_to_come_back() {
    let w = world().await;
    let one = id(3, 0);
    for word in ["a", "b", "c"] {
        w.ask(&one, Say::Word(word)).await.unwrap();
    }
    w.passivated().await;
    assert_eq!(w.model.writes_to(Table::Snapshots), 1, "a clean passivation leaves a snapshot");
    assert_eq!(w.ask(&one, Say::Count).await, Ok(3));
    assert_eq!(w.ask(&one, Say::Word("b")).await, Ok(3), "ids are known without the log");
    // Nothing that is asked while it is being forgotten is lost.
    for word in ["d", "e", "f", "g"] {
        w.slots.passivate_idle(Duration::ZERO);
        w.ask(&one, Say::Word(word)).await.unwrap();
    }
    assert_eq!(w.ask(&one, Say::Count).await, Ok(7));
}

#[tokio::test(start_paused = true)]
async fn a_busy_entity_is_not_forgotten() {
    let model = Model::with_faults(1, Faults { delay: Duration::from_secs(5), ..Faults::default() });
    let w = world_on(model, 1, Words::default()).await;
    let one = id(0, 0);
    let answer = w.send(&one, Say::Word("a")).unwrap();
    w.slots.passivate_idle(Duration::ZERO);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(w.slots.active_count(), 1);
    assert_eq!(answer.wait().await, Ok(1));
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_finds_a_later_ones_stamp_stops_and_writes_nothing() {
    let w = world().await;
    let one = id(0, 0);
    w.ask(&one, Say::Word("a")).await.unwrap();
    w.passivated().await;
    let payload = [(CommandId([1; 16]), Bytes::from_static(b"theirs"))];
    let theirs = Append::new(w.key(&one), Stamp::new(2, 1), 2, 1, &payload);
    w.shards.logs.append(theirs).await.unwrap();
    let rows = w.model.writes_to(Table::Entries);
    let error = w.ask(&one, Say::Word("mine")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message().contains("later owner"), "{}", error.message());
    assert_eq!(w.model.writes_to(Table::Entries), rows, "nothing is overwritten");
    assert_eq!(w.ask(&id(0, 1), Say::Word("x")).await, Ok(1));
    // The later owner goes on where its row stands.
    let later = world_on(w.model.fork(), 2, Words::default()).await;
    assert_eq!(later.ask(&one, Say::Word("b")).await, Ok(3));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_log_is_parked_by_name_and_nothing_is_overwritten() {
    let w = world().await;
    let one = id(0, 0);
    for word in ["a", "b", "c"] {
        w.ask(&one, Say::Word(word)).await.unwrap();
    }
    // What was confirmed is gone.
    let broken = w.model.fork();
    let partition = [one.key().as_slice(), &0u64.to_be_bytes()].concat();
    let row = RowWrite {
        clustering: Bytes::copy_from_slice(&2u64.to_be_bytes()),
        stamp: Stamp::new(1, u32::MAX),
        cell: Cell::Delete,
    };
    let gone = Batch { shard: 0, table: Table::Entries, partition: partition.into(), rows: vec![row] };
    broken.write(gone).await.unwrap();
    let next = world_on(broken, 2, Words::default()).await;
    let rows = next.model.writes_to(Table::Entries);
    let error = next.ask(&one, Say::Word("d")).await.unwrap_err();
    assert!(error.message().contains("damaged at seq 2"), "{}", error.message());
    let parked: BTreeSet<EntityId> =
        next.shards.tables.marks(0).await.unwrap().parked.into_iter().map(|(id, _)| id).collect();
    assert_eq!(parked, BTreeSet::from([one]));
    assert_eq!(next.model.writes_to(Table::Entries), rows);
}
