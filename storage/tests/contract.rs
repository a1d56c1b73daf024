//! One contract suite, written against the traits, run on every engine alike.
#![allow(missing_docs, clippy::unwrap_used)]

mod servers;

use std::sync::Arc;

use bytes::Bytes;
use patchbay_protocol::ids::{CommandId, ConversationId, EntityId};
use patchbay_protocol::summary::{Contact, Status, Summary};
use patchbay_protocol::timestamp::Timestamp;
use patchbay_storage::embedded::Embedded;
use patchbay_storage::log::{AdoptError, Append, BUCKET_ROWS, LogKey, Logs, Snapshot, Tail, entry_hash};
use patchbay_storage::model::Model;
use patchbay_storage::scylla::{Scylla, ScyllaConfig};
use patchbay_storage::tables::{Activity, DeadLetter, IdKey, Mark, Session, Set, Tables, Timer, hour_of};
use patchbay_storage::{
    Batch, CasOutcome, Cell, DocumentKey, Engine, ReadError, RowWrite, Scan, Stamp, Table,
};

fn key() -> LogKey {
    LogKey { entity: [7; 16], shard: 3 }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn payloads(from: u64, n: u64) -> Vec<(CommandId, Bytes)> {
    (from..from + n).map(|s| (CommandId([1; 16]), bytes(&format!("{{\"seq\":{s}}}")))).collect()
}

async fn append(logs: &Logs, stamp: Stamp, first: u64, confirmed: u64, n: u64) {
    logs.append(Append::new(key(), stamp, first, confirmed, &payloads(first, n))).await.unwrap();
}

async fn rows_and_scans(engine: Arc<dyn Engine>) {
    let partition = bytes("p");
    let row = |c: &str, stamp, value: Option<&str>| RowWrite {
        clustering: bytes(c),
        stamp,
        cell: value.map_or(Cell::Delete, |v| Cell::Put(bytes(v))),
    };
    let write = |rows| Batch { shard: 1, table: Table::Sessions, partition: partition.clone(), rows };
    let stamp = |n| Stamp::new(1, n);
    let first =
        vec![row("a", stamp(1), Some("1")), row("b", stamp(1), Some("2")), row("c", stamp(1), Some("3"))];
    engine.write(write(first)).await.unwrap();
    engine.write(write(vec![row("b", stamp(2), Some("two")), row("c", stamp(2), None)])).await.unwrap();
    let all = engine.scan(Scan::all(Table::Sessions, partition.clone(), 10)).await.unwrap();
    let seen: Vec<(&[u8], &[u8])> = all.iter().map(|r| (&r.clustering[..], &r.value[..])).collect();
    assert_eq!(seen, [(&b"a"[..], &b"1"[..]), (b"b", b"two")]);
    let last = engine
        .scan(Scan { reverse: true, ..Scan::all(Table::Sessions, partition.clone(), 1) })
        .await
        .unwrap();
    assert_eq!((last.len(), &last[0].clustering[..]), (1, &b"b"[..]));
    // A later reign beats an earlier one's late write.
    engine.write(write(vec![row("a", Stamp::new(2, 1), Some("new"))])).await.unwrap();
    engine.write(write(vec![row("a", Stamp::new(1, 99), Some("zombie"))])).await.unwrap();
    assert_eq!(engine.get(Table::Sessions, &partition, &bytes("a")).await.unwrap().unwrap().value, "new");
    engine.drop_partition(Table::Sessions, partition.clone(), Stamp::new(2, 2)).await.unwrap();
    assert!(engine.scan(Scan::all(Table::Sessions, partition, 10)).await.unwrap().is_empty());
}

async fn documents(engine: Arc<dyn Engine>) {
    let key = |id: &str| DocumentKey { scope: "t".into(), kind: "k", id: id.into() };
    let set = async |id: &str, expected, value: Option<&str>| {
        engine.compare_and_set(key(id), expected, value.map(bytes)).await.unwrap()
    };
    assert_eq!(set("a", None, Some("1")).await, CasOutcome::Applied);
    let CasOutcome::Refused(Some(found)) = set("a", None, Some("2")).await else { panic!("a second create") };
    assert_eq!((found.version, &found.value[..]), (1, &b"1"[..]));
    assert_eq!(set("a", Some(1), Some("2")).await, CasOutcome::Applied);
    assert_eq!(set("a", Some(2), None).await, CasOutcome::Applied);
    assert_eq!(engine.document(&key("a")).await.unwrap(), None);
    assert_eq!(set("a", None, Some("3")).await, CasOutcome::Applied);
    assert_eq!(engine.document(&key("a")).await.unwrap().unwrap().version, 4, "versions never repeat");
    set("b", None, Some("b")).await;
    let other = DocumentKey { scope: "u".into(), kind: "k", id: "c".into() };
    engine.compare_and_set(other, None, Some(bytes("c"))).await.unwrap();
    let list = engine.documents("t", "k", "", 10).await.unwrap();
    assert_eq!(list.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(engine.documents("t", "k", "a", 10).await.unwrap().len(), 1);
}

async fn logs_page_both_ways(engine: Arc<dyn Engine>) {
    let logs = Logs::new(engine);
    let mut next = 1;
    while next < BUCKET_ROWS + 100 {
        append(&logs, Stamp::new(1, u32::try_from(next).unwrap()), next, next - 1, 50).await;
        next += 50;
    }
    let (tip, edge) = (next - 1, BUCKET_ROWS);
    let forward = logs.forward(key(), edge - 3, tip, 6, usize::MAX).await.unwrap();
    assert_eq!(forward.iter().map(|r| r.seq).collect::<Vec<_>>(), (edge - 2..edge + 4).collect::<Vec<_>>());
    let backward = logs.backward(key(), edge + 2, 4, usize::MAX).await.unwrap();
    assert_eq!(backward.iter().map(|r| r.seq).collect::<Vec<_>>(), [edge + 1, edge, edge - 1, edge - 2]);
    assert_eq!(logs.forward(key(), 0, tip, 1000, 99).await.unwrap().len(), 10, "bounded in bytes");
    assert_eq!(logs.backward(key(), 3, 100, usize::MAX).await.unwrap().len(), 2);
    assert_eq!(
        logs.forward(key(), tip, tip + 1, 10, usize::MAX).await,
        Err(ReadError::Damaged),
        "no hole below a tip"
    );
    let tail = logs.tail(key(), 0).await.unwrap();
    assert_eq!((tail.rows.len() as u64, tail.confirmed), (tip, tip - 50));
}

async fn adoption(engine: Arc<dyn Engine>) {
    let logs = Logs::new(engine.clone());
    append(&logs, Stamp::new(1, 1), 1, 0, 3).await;
    append(&logs, Stamp::new(1, 2), 4, 3, 2).await;
    // An append of which one row is missing.
    let mut half = Append::new(key(), Stamp::new(1, 3), 6, 5, &payloads(6, 3));
    half.batches[0].rows.remove(1);
    engine.write(half.batches.remove(0)).await.unwrap();
    let tail = logs.tail(key(), 0).await.unwrap();
    assert_eq!((tail.rows.len(), tail.confirmed), (5, 5), "half an append is dropped");
    append(&logs, Stamp::new(2, 1), 6, 5, 2).await;
    append(&logs, Stamp::new(2, 2), 8, 5, 1).await;
    let tail = logs.tail(key(), 0).await.unwrap();
    assert_eq!((tail.rows.len(), tail.confirmed), (8, 5));
    logs.rewrite(key(), Stamp::new(3, 1), &tail).await.unwrap();
    let again = logs.tail(key(), 0).await.unwrap();
    assert_eq!(again.rows.len(), 8);
    assert!(
        again.rows[5..].iter().all(|r| r.stamp == Stamp::new(3, 1))
            && again.rows[5].origin == Stamp::new(2, 1)
    );
    // A confirmed row that is missing is damage, never overwritten.
    let partition = Append::new(key(), Stamp::new(1, 1), 2, 0, &payloads(2, 1)).batches[0].partition.clone();
    let gone = Batch::delete(
        3,
        Table::Entries,
        partition,
        Bytes::copy_from_slice(&2u64.to_be_bytes()),
        Stamp::new(4, 1),
    );
    engine.write(gone).await.unwrap();
    assert_eq!(logs.tail(key(), 0).await, Err(AdoptError::Damaged(2)));
}

async fn an_append_across_a_bucket_edge(engine: Arc<dyn Engine>) {
    let logs = Logs::new(engine.clone());
    let mut next = 1;
    while next + 40 < BUCKET_ROWS {
        append(&logs, Stamp::new(1, u32::try_from(next).unwrap()), next, next - 1, 40).await;
        next += 40;
    }
    let mut edge = Append::new(key(), Stamp::new(1, 9_999), next, next - 1, &payloads(next, 64));
    assert_eq!(edge.batches.len(), 2);
    engine.write(edge.batches.pop().unwrap()).await.unwrap();
    assert_eq!(
        logs.tail(key(), 0).await.unwrap().rows.len() as u64,
        next - 1,
        "only its second half is there"
    );
    engine.write(edge.batches.pop().unwrap()).await.unwrap();
    let tail = logs.tail(key(), 0).await.unwrap();
    assert_eq!(tail.rows.len() as u64, next + 63);
    // An adoption that crashed between the buckets has rewritten the newest only.
    let newest: Vec<_> = tail.rows.iter().filter(|r| r.seq >= BUCKET_ROWS).cloned().collect();
    let part = Tail { rows: newest, confirmed: BUCKET_ROWS - 1, stamp_max: None };
    logs.rewrite(key(), Stamp::new(2, 1), &part).await.unwrap();
    assert_eq!(logs.tail(key(), 0).await.unwrap().rows.len() as u64, next + 63, "stamps that rise stand");
}

/// Late, again and out of order: the highest stamp of a row is what is read, also of rows that are gone.
async fn stamps_decide(engine: Arc<dyn Engine>) {
    let partition = bytes("stamps");
    let one = |c: &str, stamp: Stamp, cell: Cell| Batch {
        shard: 1,
        table: Table::Inbox,
        partition: partition.clone(),
        rows: vec![RowWrite { clustering: bytes(c), stamp, cell }],
    };
    let put = |value: &str| Cell::Put(bytes(value));
    let read = async |c: &str| {
        engine.get(Table::Inbox, &partition, &bytes(c)).await.unwrap().map(|r| (r.stamp, r.value))
    };
    let (first, second) = (Stamp::new(1, 7), Stamp::new(1, 8));
    // A rewrite within one reign, and a narrower row over a wider one.
    engine.write(one("a", first, put("a wide value"))).await.unwrap();
    engine.write(one("a", second, put("b"))).await.unwrap();
    assert_eq!(read("a").await, Some((second, bytes("b"))));
    // Deleted, then there again.
    engine.write(one("a", Stamp::new(1, 9), Cell::Delete)).await.unwrap();
    assert_eq!(read("a").await, None);
    engine.write(one("a", Stamp::new(1, 10), put("again"))).await.unwrap();
    assert_eq!(read("a").await, Some((Stamp::new(1, 10), bytes("again"))));
    // A later reign; then what an earlier owner still had on its way: a row, and a deletion.
    engine.write(one("a", Stamp::new(2, 1), put("new"))).await.unwrap();
    engine.write(one("a", Stamp::new(1, 11), put("zombie"))).await.unwrap();
    engine.write(one("a", Stamp::new(1, 12), Cell::Delete)).await.unwrap();
    assert_eq!(read("a").await, Some((Stamp::new(2, 1), bytes("new"))));
    // A ghost that was never seen, wider than what the next owner wrote in its place.
    engine.write(one("g", Stamp::new(3, 1), put("n"))).await.unwrap();
    engine.write(one("g", Stamp::new(2, 9), put("a much wider ghost"))).await.unwrap();
    assert_eq!(read("g").await, Some((Stamp::new(3, 1), bytes("n"))));
    // The last reign that there can be.
    let last = Stamp::new(patchbay_storage::stamp::EPOCH_MAX, u32::MAX);
    engine.write(one("z", last, put("last"))).await.unwrap();
    assert_eq!(read("z").await, Some((last, bytes("last"))));
}

/// An actor ended with an append on its way: the same bytes under the same stamp change nothing, whenever they come.
async fn an_append_that_comes_again(engine: Arc<dyn Engine>) {
    let logs = Logs::new(engine.clone());
    append(&logs, Stamp::new(1, 1), 1, 0, 3).await;
    let on_its_way = Append::new(key(), Stamp::new(1, 2), 4, 3, &payloads(4, 2));
    for batch in on_its_way.batches.iter().chain(&on_its_way.batches) {
        engine.write(batch.clone()).await.unwrap();
    }
    let tail = logs.tail(key(), 0).await.unwrap();
    assert_eq!((tail.rows.len(), tail.confirmed), (5, 3));
    // The next owner adopts; then the first one's twin arrives after all.
    logs.rewrite(key(), Stamp::new(2, 1), &tail).await.unwrap();
    append(&logs, Stamp::new(2, 2), 6, 5, 1).await;
    for batch in on_its_way.batches {
        engine.write(batch).await.unwrap();
    }
    let after = logs.tail(key(), 0).await.unwrap();
    assert_eq!(after.rows.iter().map(|r| r.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert!(after.rows[3..5].iter().all(|r| r.stamp == Stamp::new(2, 1)), "the adoption stands");
}

/// A reference is a hint: one whose row is not there finds nothing. A snapshot that is ahead of its log is damage.
async fn what_points_at_nothing(engine: Arc<dyn Engine>) {
    let (logs, tables) = (Logs::new(engine.clone()), Tables::new(engine.clone()));
    append(&logs, Stamp::new(1, 1), 1, 0, 2).await;
    let id = IdKey::of(["client", "x"]);
    for batch in Tables::reference_writes(key(), Stamp::new(1, 2), &[(id, 9)]) {
        engine.write(batch).await.unwrap();
    }
    let named = tables.reference(key(), id).await.unwrap().unwrap();
    assert_eq!((named, logs.row(key(), named).await.unwrap()), (9, None));
    let ahead = Snapshot { seq: 9, entry_hash: [0; 16], state: bytes("state") };
    engine.write(Logs::snapshot_write(key(), Stamp::new(1, 3), &ahead)).await.unwrap();
    assert_eq!(logs.snapshot(key()).await, Err(AdoptError::Damaged(9)));
}

/// A dropped partition is gone up to its stamp, and read as if it had never been.
async fn partitions_are_dropped(engine: Arc<dyn Engine>) {
    let tables = Tables::new(engine.clone());
    let entity = EntityId::Account("t".parse().unwrap(), "a".parse().unwrap());
    for (bucket, n) in [(0, 1), (1, 2)] {
        let mark = Mark { epoch: 1, bucket };
        let row = Activity { entity: entity.clone(), lowest: 1 };
        engine.write(Tables::activity_write(4, mark, Stamp::new(1, n), &row)).await.unwrap();
    }
    tables.drop_activity(4, Mark { epoch: 1, bucket: 0 }, Stamp::new(1, 3)).await.unwrap();
    assert!(tables.activity(4, Mark { epoch: 1, bucket: 0 }).await.unwrap().is_empty());
    assert_eq!(
        tables.activity(4, Mark { epoch: 1, bucket: 1 }).await.unwrap().len(),
        1,
        "its neighbour stays"
    );
}

/// More rows than one answer of a store brings, both ways, and with a bound.
async fn scans_page(engine: Arc<dyn Engine>) {
    let partition = bytes("paged");
    for from in (0..2500u32).step_by(100) {
        let rows = (from..from + 100).map(|n| RowWrite {
            clustering: Bytes::copy_from_slice(&n.to_be_bytes()),
            stamp: Stamp::new(1, n + 1),
            cell: Cell::Put(bytes("v")),
        });
        let batch =
            Batch { shard: 1, table: Table::DeadLetters, partition: partition.clone(), rows: rows.collect() };
        engine.write(batch).await.unwrap();
    }
    let number = |row: &patchbay_storage::Row| u32::from_be_bytes(row.clustering[..].try_into().unwrap());
    let all = engine.scan(Scan::all(Table::DeadLetters, partition.clone(), usize::MAX)).await.unwrap();
    assert_eq!(all.iter().map(number).collect::<Vec<_>>(), (0..2500).collect::<Vec<_>>());
    let place = |n: u32| Bytes::copy_from_slice(&n.to_be_bytes());
    let scan = Scan {
        from: std::ops::Bound::Excluded(place(9)),
        to: std::ops::Bound::Included(place(2000)),
        reverse: true,
        ..Scan::all(Table::DeadLetters, partition, 1500)
    };
    let some = engine.scan(scan).await.unwrap();
    assert_eq!(some.iter().map(number).collect::<Vec<_>>(), (501..=2000).rev().collect::<Vec<_>>());
}

async fn snapshots_and_references(engine: Arc<dyn Engine>) {
    let logs = Logs::new(engine.clone());
    let tables = Tables::new(engine.clone());
    append(&logs, Stamp::new(1, 1), 1, 0, 4).await;
    let row = logs.row(key(), 4).await.unwrap().unwrap();
    let snapshot = Snapshot { seq: 4, entry_hash: entry_hash(&row.payload), state: bytes("state") };
    engine.write(Logs::snapshot_write(key(), Stamp::new(1, 2), &snapshot)).await.unwrap();
    assert_eq!(logs.snapshot(key()).await.unwrap(), Some((Stamp::new(1, 2), snapshot.clone())));
    assert_eq!(logs.tail(key(), 4).await.unwrap().rows.len(), 0);
    let wrong = Snapshot { entry_hash: [0; 16], ..snapshot };
    engine.write(Logs::snapshot_write(key(), Stamp::new(1, 3), &wrong)).await.unwrap();
    assert_eq!(logs.snapshot(key()).await, Err(AdoptError::Damaged(4)), "a snapshot of another log");
    let ids: Vec<(IdKey, u64)> = (0..100u64).map(|n| (IdKey::of(["x", &n.to_string()]), n)).collect();
    for batch in Tables::reference_writes(key(), Stamp::new(1, 4), &ids) {
        engine.write(batch).await.unwrap();
    }
    for (id, seq) in ids {
        assert_eq!(tables.reference(key(), id).await.unwrap(), Some(seq));
    }
    assert_eq!(tables.reference(key(), IdKey::of(["y"])).await.unwrap(), None);
}

async fn activity_marks_and_timers(engine: Arc<dyn Engine>) {
    let tables = Tables::new(engine.clone());
    let entity = EntityId::Account("t".parse().unwrap(), "a".parse().unwrap());
    let (bucket, stamp) = (Mark { epoch: 1, bucket: 0 }, Stamp::new(1, 1));
    let activity = Activity { entity: entity.clone(), lowest: 5 };
    engine.write(Tables::activity_write(9, bucket, stamp, &activity)).await.unwrap();
    assert_eq!(tables.activity(9, bucket).await.unwrap(), [activity]);
    engine.write(Tables::mark_write(9, stamp, Mark { epoch: 1, bucket: 3 })).await.unwrap();
    assert_eq!(tables.marks(9).await.unwrap().settled, Some(Mark { epoch: 1, bucket: 3 }));
    engine.write(Tables::park_write(9, stamp, &entity, "why")).await.unwrap();
    assert_eq!(tables.marks(9).await.unwrap().parked, [(entity.clone(), "why".to_owned())]);
    tables.drop_activity(9, bucket, Stamp::new(1, 2)).await.unwrap();
    assert!(tables.activity(9, bucket).await.unwrap().is_empty());
    let due = Timestamp::parse("2026-11-21T10:30:00Z").unwrap();
    let timer = Timer { entity, due };
    engine.write(Tables::timer_write(9, stamp, &timer, 0)).await.unwrap();
    assert_eq!(tables.timers(9, hour_of(due)).await.unwrap().first(), Some(&timer));
    engine.write(Tables::timer_write(9, stamp, &timer, hour_of(due) + 2)).await.unwrap();
    assert_eq!(
        tables.timers(9, hour_of(due) + 2).await.unwrap(),
        [timer],
        "one due before the mark's hour lies in it"
    );
}

async fn sessions_and_when_an_agent_was_last_seen(engine: Arc<dyn Engine>) {
    let tables = Tables::new(engine.clone());
    let at = |s| Timestamp::from_seconds(s);
    let session = |connection: &str, s| Session {
        connection: connection.into(),
        incarnation: 3,
        since: at(s),
        said: None,
    };
    assert_eq!(tables.sessions(key()).await.unwrap(), (vec![], None));
    for (n, connection) in [(1, "aa"), (2, "bb")] {
        let write = Tables::session_write(key(), Stamp::new(1, n), &session(connection, n.into()));
        engine.write(write).await.unwrap();
    }
    let (open, seen) = tables.sessions(key()).await.unwrap();
    assert_eq!((open, seen), (vec![session("aa", 1), session("bb", 2)], None));
    engine.write(Tables::session_delete(key(), Stamp::new(1, 3), "aa", at(9))).await.unwrap();
    let (open, seen) = tables.sessions(key()).await.unwrap();
    assert_eq!((open, seen), (vec![session("bb", 2)], Some(at(9))));
    let other = LogKey { entity: [8; 16], shard: 3 };
    assert_eq!(tables.sessions(other).await.unwrap(), (vec![], None), "another agent's are not seen");
}

async fn dead_letters_in_order_and_by_tenant(engine: Arc<dyn Engine>) {
    let tables = Tables::new(engine.clone());
    let (one, two) = ("t".parse().unwrap(), "u".parse().unwrap());
    let letter = |id: &str| DeadLetter {
        external_id: String::new(),
        id: id.into(),
        account: "wa".into(),
        reason: "why".into(),
        received_at: Timestamp::from_seconds(1),
        item: serde_json::json!({"a": [1]}),
    };
    for (n, id) in [(1, "b"), (2, "a"), (3, "c")] {
        engine.write(Tables::dead_letter_write(3, Stamp::new(1, n), &one, &letter(id))).await.unwrap();
    }
    let ids = |found: Vec<DeadLetter>| found.into_iter().map(|l| l.id).collect::<Vec<_>>();
    assert_eq!(ids(tables.dead_letters(&one, "", 10).await.unwrap()), ["a", "b", "c"]);
    assert_eq!(ids(tables.dead_letters(&one, "a", 1).await.unwrap()), ["b"]);
    assert!(tables.dead_letters(&two, "", 10).await.unwrap().is_empty());
    assert_eq!(tables.dead_letter(&one, "b").await.unwrap(), Some(letter("b")));
    assert_eq!(tables.dead_letter(&two, "b").await.unwrap(), None);
    engine.write(Tables::dead_letter_delete(3, Stamp::new(1, 4), &one, "b")).await.unwrap();
    assert_eq!(ids(tables.dead_letters(&one, "", 10).await.unwrap()), ["a", "c"]);
}

async fn inbox_rows_of_two_sets(engine: Arc<dyn Engine>) {
    let tables = Tables::new(engine.clone());
    let (tenant, account) = ("t".parse().unwrap(), "wa".parse().unwrap());
    let summary = |thread: &str, last_seq, status| Summary {
        id: ConversationId::derive(&tenant, &account, thread),
        account: account.clone(),
        inbox: "main".parse().unwrap(),
        contact: Contact::default(),
        status,
        assignee: None,
        last_seq,
        preview: String::new(),
        unread: 0,
        waiting_since: None,
        window_until: None,
        episode: 1,
        updated_at: Timestamp::from_seconds(1),
    };
    let write = async |n, summary: &Summary| {
        let key = LogKey { entity: *summary.id.as_bytes(), shard: 3 };
        for batch in Tables::inbox_writes(key, Stamp::new(1, n), &tenant, summary) {
            engine.write(batch).await.unwrap();
        }
    };
    let count = async || tables.summaries(&tenant, &account).await.unwrap().len();
    let part = |id: ConversationId| id.as_bytes()[0] % patchbay_storage::tables::INBOX_PARTS;
    let stands = async |set, id: ConversationId| {
        let page = tables.summaries_page(&tenant, &account, set, part(id), None, 1000).await.unwrap();
        page.iter().any(|s| s.id == id)
    };
    for n in 0..40 {
        write(n + 1, &summary(&n.to_string(), 1, Status::Open)).await;
    }
    assert_eq!(count().await, 40);
    let resolved = summary("7", 2, Status::Resolved);
    assert!(stands(Set::Open, resolved.id).await && !stands(Set::Past, resolved.id).await);
    write(50, &resolved).await;
    assert!(!stands(Set::Open, resolved.id).await && stands(Set::Past, resolved.id).await);
    assert_eq!(count().await, 40);
    assert_eq!(tables.summary(&tenant, &account, resolved.id).await.unwrap(), Some(resolved.clone()));
    let again = Summary { status: Status::Open, last_seq: 3, ..resolved };
    write(51, &again).await;
    assert!(stands(Set::Open, again.id).await);
    assert_eq!(count().await, 40);
    assert_eq!(
        tables.summary(&tenant, &account, again.id).await.unwrap(),
        Some(again.clone()),
        "the newer one"
    );
    let other = "u".parse().unwrap();
    assert!(tables.summaries(&other, &account).await.unwrap().is_empty());
}

macro_rules! suite {
    ($engine:ident, $make:path) => {
        suite!(@ $engine, $make, rows_and_scans documents logs_page_both_ways adoption an_append_across_a_bucket_edge
            snapshots_and_references activity_marks_and_timers sessions_and_when_an_agent_was_last_seen
            dead_letters_in_order_and_by_tenant inbox_rows_of_two_sets stamps_decide an_append_that_comes_again
            what_points_at_nothing partitions_are_dropped scans_page);
    };
    (@ $engine:ident, $make:path, $($test:ident)*) => {
        mod $engine {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let Some((engine, _dir)) = $make().await else { return };
                super::$test(engine).await;
            })*
        }
    };
}

/// An engine, with what it lies in. None: this run has no servers.
type Made = Option<(Arc<dyn Engine>, Option<tempfile::TempDir>)>;

async fn model() -> Made {
    Some((Arc::new(Model::new()), None))
}

async fn embedded() -> Made {
    let dir = tempfile::tempdir().unwrap();
    Some((Arc::new(Embedded::open(&dir.path().join("data")).unwrap()), Some(dir)))
}

async fn cassandra() -> Made {
    if servers::quick() {
        return None;
    }
    let config = ScyllaConfig {
        replication: 1,
        ..ScyllaConfig::new(servers::cassandra(), "datacenter1", &servers::fresh("contract"))
    };
    Some((Arc::new(Scylla::connect(&config).await.unwrap()), None))
}

suite!(on_model, super::model);
suite!(on_embedded, super::embedded);
suite!(on_cassandra, super::cassandra);
