//! What the model engine can be told to do wrong, fault by fault, and what an append makes of each: the same bytes
//! under the same stamp, once (design §5). Time is paused.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::ids::CommandId;
use patchbay_storage::log::{Append, LogKey, Logs};
use patchbay_storage::model::{Faults, Model};
use patchbay_storage::{Batch, Engine as _, ReadError, Scan, Stamp, Table, WriteError};

/// In a thousand writes.
const ALWAYS: u32 = 1000;

fn key() -> LogKey {
    LogKey { entity: [7; 16], shard: 0 }
}

fn append(n: u32, first: u64) -> Append {
    let payload = [(CommandId([1; 16]), Bytes::from(format!("{first}")))];
    Append::new(key(), Stamp::new(1, n), first, first - 1, &payload)
}

fn batch(partition: &'static str, n: u32) -> Batch {
    let (partition, clustering) = (Bytes::from_static(partition.as_bytes()), Bytes::from_static(b"c"));
    Batch::put(0, Table::Sessions, partition, clustering, Stamp::new(1, n), Bytes::from(format!("{n}")))
}

async fn stored(model: &Model, partition: &'static str) -> Option<Bytes> {
    let partition = Bytes::from_static(partition.as_bytes());
    model.get(Table::Sessions, &partition, &Bytes::from_static(b"c")).await.unwrap().map(|r| r.value)
}

/// Begins an append while `faults` hold, lifts them after a second, and returns its outcome.
async fn through(model: &Model, faults: Faults, append: Append) -> Result<(), WriteError> {
    model.set_faults(faults);
    let logs = Logs::new(Arc::new(model.clone()));
    let under = tokio::spawn(async move { logs.append(append).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    model.set_faults(Faults::default());
    under.await.unwrap()
}

async fn seqs(model: &Model) -> Vec<(u64, u64)> {
    let tail = Logs::new(Arc::new(model.clone())).tail(key(), 0).await.unwrap();
    tail.rows.iter().map(|r| (r.seq, r.stamp.as_u64() & 0xffff_ffff)).collect()
}

#[tokio::test(start_paused = true)]
async fn an_error_before_it_is_applied_is_an_answer() {
    let model = Model::new();
    model.set_faults(Faults { refuse: ALWAYS, ..Faults::default() });
    assert_eq!(model.write(batch("p", 1)).await, Err(WriteError::Refused));
    assert_eq!(stored(&model, "p").await, None);
    let refused = through(&model, Faults { refuse: ALWAYS, ..Faults::default() }, append(1, 1)).await;
    assert_eq!(refused, Err(WriteError::Refused), "the first and only attempt: nothing is bound");
    assert_eq!(seqs(&model).await, []);
}

#[tokio::test(start_paused = true)]
async fn an_error_after_it_was_applied_is_settled_by_the_same_bytes() {
    let model = Model::new();
    model.set_faults(Faults { fail_after: ALWAYS, ..Faults::default() });
    assert_eq!(model.write(batch("p", 1)).await, Err(WriteError::Unknown));
    assert_eq!(stored(&model, "p").await.unwrap(), "1");
    let before = model.writes_to(Table::Entries);
    assert_eq!(
        through(&model, Faults { fail_after: ALWAYS, ..Faults::default() }, append(1, 1)).await,
        Ok(())
    );
    assert!(model.writes_to(Table::Entries) - before > 1, "it was repeated");
    assert_eq!(seqs(&model).await, [(1, 1)], "one row, under its first stamp");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_behind_an_unknown_attempt_is_no_answer() {
    let model = Model::new();
    model.set_faults(Faults { lose: ALWAYS, ..Faults::default() });
    let logs = Logs::new(Arc::new(model.clone()));
    let mut append = append(1, 1);
    assert_eq!(logs.attempt(&mut append, true).await, Err(WriteError::Unknown));
    model.set_faults(Faults { refuse: ALWAYS, ..Faults::default() });
    assert_eq!(logs.attempt(&mut append, false).await, Err(WriteError::Unknown));
    assert_eq!(append.batches.len(), 1, "the bytes are bound to their seqs");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_was_lost_is_repeated_until_it_is_answered() {
    let model = Model::new();
    let lost = Faults { lose: ALWAYS, ..Faults::default() };
    assert_eq!(through(&model, lost, append(1, 1)).await, Ok(()));
    assert_eq!(seqs(&model).await, [(1, 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_lands_late_does_not_undo_what_came_after() {
    let model = Model::new();
    model.set_faults(Faults { late: ALWAYS, ..Faults::default() });
    assert_eq!(model.write(batch("p", 1)).await, Err(WriteError::Unknown));
    assert_eq!(stored(&model, "p").await, None, "not yet");
    model.set_faults(Faults::default());
    model.write(batch("p", 2)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(stored(&model, "p").await.unwrap(), "2", "the lower stamp loses however late it comes");
    // And one that nobody repeats lands all the same.
    model.set_faults(Faults { late: ALWAYS, ..Faults::default() });
    assert_eq!(model.write(batch("q", 1)).await, Err(WriteError::Unknown));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(stored(&model, "q").await.unwrap(), "1");
    let late = Faults { late: ALWAYS, ..Faults::default() };
    assert_eq!(through(&model, late, append(1, 1)).await, Ok(()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(seqs(&model).await, [(1, 1)]);
}

#[tokio::test(start_paused = true)]
async fn delays_reorder_writes_of_different_partitions() {
    let model = Model::with_faults(3, Faults { delay: Duration::from_millis(100), ..Faults::default() });
    let mut overtaken = false;
    for n in 1..=20 {
        let (first, second) = tokio::join!(
            async { model.write(batch("p", n)).await.map(|()| tokio::time::Instant::now()) },
            async { model.write(batch("q", n)).await.map(|()| tokio::time::Instant::now()) },
        );
        overtaken |= second.unwrap() < first.unwrap();
    }
    assert!(overtaken, "a write was never answered before an earlier one");
}

#[tokio::test(start_paused = true)]
async fn the_store_stops_between_any_two_writes_and_goes_on_where_it_stood() {
    for stop in 0..4u64 {
        let model = Model::new();
        model.stop_after(stop);
        for n in 1..=4u32 {
            let outcome =
                Logs::new(Arc::new(model.clone())).attempt(&mut append(n, u64::from(n)), true).await;
            assert_eq!(outcome.is_ok(), u64::from(n) <= stop, "write {n} with a stop after {stop}");
        }
        assert_eq!(seqs(&model.fork()).await.len() as u64, stop, "what was answered is there, and no more");
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_that_is_not_answered_says_so() {
    let model = Model::new();
    model.write(batch("p", 1)).await.unwrap();
    model.set_faults(Faults { read: ALWAYS, ..Faults::default() });
    let partition = Bytes::from_static(b"p");
    let got = model.get(Table::Sessions, &partition, &Bytes::from_static(b"c")).await;
    assert_eq!(got, Err(ReadError::Unavailable));
    assert_eq!(model.scan(Scan::all(Table::Sessions, partition, 9)).await, Err(ReadError::Unavailable));
}
