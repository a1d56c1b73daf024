//! What only a wide-column store can get wrong, on a real one: cells without a stamp, racing conditional writes, levels
//! that are too low, a schema that is not ours.
#![allow(missing_docs, clippy::unwrap_used)]

mod servers;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use patchbay_protocol::ids::{CommandId, EntityId};
use patchbay_storage::log::{Append, LogKey, Logs, Snapshot};
use patchbay_storage::scylla::examine::{Standing, examine};
use patchbay_storage::scylla::{ConnectError, Scylla, ScyllaConfig, TlsConfig};
use patchbay_storage::tables::{Activity, DeadLetter, IdKey, Mark, Session, Tables, Timer};
use patchbay_storage::{CasOutcome, DocumentKey, Engine, Stamp, Stamps};

async fn keyspace() -> Option<(Arc<Scylla>, ScyllaConfig)> {
    if servers::quick() {
        return None;
    }
    let config = ScyllaConfig {
        replication: 1,
        ..ScyllaConfig::new(servers::cassandra(), "datacenter1", &servers::fresh("scylla"))
    };
    Some((Arc::new(Scylla::connect(&config).await.unwrap()), config))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cell_carries_its_writers_stamp() {
    let Some((engine, config)) = keyspace().await else { return };
    let (stamps, key) = (Stamps::new(77), LogKey { entity: [3; 16], shard: 5 });
    let (logs, next) = (Logs::new(engine.clone()), || stamps.next().unwrap());
    let payload = |n: u64| (CommandId([1; 16]), Bytes::from(format!("{{\"n\":{n}}}")));
    for first in (1..200).step_by(4) {
        let rows: Vec<_> = (first..first + 4).map(payload).collect();
        logs.append(Append::new(key, next(), first, first - 1, &rows)).await.unwrap();
    }
    let at = patchbay_protocol::Timestamp::from_seconds(1);
    let entity = EntityId::Account("t".parse().unwrap(), "a".parse().unwrap());
    let tenant = "t".parse().unwrap();
    let letter = DeadLetter {
        id: "1".into(),
        account: "a".into(),
        external_id: String::new(),
        reason: String::new(),
        received_at: at,
        item: serde_json::Value::Null,
    };
    let session = Session { connection: "aa".into(), incarnation: 1, since: at, said: None };
    let mut writes = Tables::reference_writes(key, next(), &[(IdKey::of(["x"]), 1)]);
    writes.push(Tables::activity_write(
        5,
        Mark::default(),
        next(),
        &Activity { entity: entity.clone(), lowest: 1 },
    ));
    writes.push(Tables::mark_write(5, next(), Mark::default()));
    writes.push(Tables::timer_write(5, next(), &Timer { entity, due: at }, 0));
    writes.push(Tables::session_write(key, next(), &session));
    writes.push(Tables::session_delete(key, next(), "aa", at));
    writes.push(Tables::dead_letter_write(5, next(), &tenant, &letter));
    let snapshot = Snapshot { seq: 1, entry_hash: [0; 16], state: Bytes::from_static(b"s") };
    writes.push(Logs::snapshot_write(key, next(), &snapshot));
    for write in writes {
        engine.write(write).await.unwrap();
    }
    let session = servers::session(&config.nodes.join(",")).await;
    let mut looked = 0;
    for table in
        ["log_entries", "snapshots", "refs", "activity", "marks", "timers", "sessions", "dead_letters"]
    {
        let question = format!("SELECT WRITETIME(value) FROM {}.{table}", config.keyspace);
        let answer = session.query_unpaged(question, &[]).await.unwrap().into_rows_result().unwrap();
        let stamps: BTreeSet<i64> = answer.rows::<(i64,)>().unwrap().map(|r| r.unwrap().0).collect();
        assert!(!stamps.is_empty(), "{table}");
        for stamp in stamps {
            looked += 1;
            let stamp = Stamp::from_u64(u64::try_from(stamp).unwrap());
            assert_eq!(stamp.epoch(), 77, "{table}: {stamp}");
            assert!(stamp.as_u64() < 1 << 50);
        }
    }
    assert!(looked > 55, "{looked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_change_a_document_at_once_each_change_is_made_once() {
    let Some((engine, _)) = keyspace().await else { return };
    let key = || DocumentKey { scope: "t".into(), kind: "count", id: "x".into() };
    let add = |engine: Arc<Scylla>| async move {
        for _ in 0..20 {
            loop {
                let before = engine.document(&key()).await.unwrap();
                let n: u64 =
                    before.as_ref().map_or(0, |d| String::from_utf8_lossy(&d.value).parse().unwrap());
                let value = Bytes::from((n + 1).to_string());
                match engine.compare_and_set(key(), before.map(|d| d.version), Some(value)).await.unwrap() {
                    CasOutcome::Applied => break,
                    CasOutcome::Refused(_) => {}
                }
            }
        }
    };
    let writers: Vec<_> = (0..5).map(|_| tokio::spawn(add(engine.clone()))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let end = engine.document(&key()).await.unwrap().unwrap();
    assert_eq!((end.version, &end.value[..]), (100, &b"100"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_tells_what_is_wrong_with_a_schema() {
    let Some((_, config)) = keyspace().await else { return };
    let standing = async |name: &str| {
        let found = examine(&config).await;
        found.into_iter().find(|f| f.name == name).map(|f| (f.standing, f.detail)).unwrap()
    };
    assert_eq!(standing("schema").await.0, Standing::Good);
    assert_eq!(standing("commit log").await.0, Standing::Good);
    assert_eq!(standing("replication").await.0, Standing::Doubtful, "one copy");
    let session = servers::session(&config.nodes.join(",")).await;
    let alter = async |text: String| {
        session.query_unpaged(text, &[]).await.unwrap();
    };
    let table = format!("{}.marks", config.keyspace);
    alter(format!("ALTER TABLE {table} WITH default_time_to_live = 60 AND read_repair = 'NONE'")).await;
    let (bad, detail) = standing("schema").await;
    assert!(bad == Standing::Bad && detail.contains("forgets") && detail.contains("BLOCKING"), "{detail}");
    alter(format!("DROP TABLE {table}")).await;
    let (bad, detail) = standing("schema").await;
    assert!(bad == Standing::Bad && detail.contains("marks lacks value"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_that_start_at_once_make_one_schema() {
    if servers::quick() {
        return;
    }
    let config = ScyllaConfig {
        replication: 1,
        ..ScyllaConfig::new(servers::cassandra(), "datacenter1", &servers::fresh("race"))
    };
    let (a, b) = tokio::join!(Scylla::connect(&config), Scylla::connect(&config));
    let key = DocumentKey { scope: String::new(), kind: "k", id: "x".into() };
    a.unwrap().compare_and_set(key.clone(), None, Some(Bytes::from_static(b"v"))).await.unwrap();
    assert_eq!(b.unwrap().document(&key).await.unwrap().unwrap().version, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_and_with_a_password() {
    if servers::quick() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, ca) = (dir.path().join("node.p12"), dir.path().join("ca.pem"));
    let keytool = |args: &[&str]| {
        let done = std::process::Command::new("keytool")
            .args(args)
            .args(["-alias", "node", "-storetype", "PKCS12", "-storepass", "patchbay", "-keystore"])
            .arg(&store)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        done.stdout
    };
    let subject = ["-dname", "CN=store", "-ext", "san=ip:127.0.0.1", "-validity", "2", "-keyalg", "RSA"];
    keytool(&[&["-genkeypair"], &subject[..]].concat());
    std::fs::write(&ca, keytool(&["-exportcert", "-rfc"])).unwrap();
    let encryption = format!(
        "client_encryption_options: {{enabled: true, optional: false, keystore: {}, keystore_password: patchbay, store_type: PKCS12}}",
        store.display()
    );
    let settings = ["--set", &encryption, "--set", "authenticator: PasswordAuthenticator"];
    let server = servers::Server::start("cassandra", 1, &settings);
    let config = ScyllaConfig {
        replication: 1,
        credentials: Some(("cassandra".into(), "cassandra".into())),
        tls: Some(TlsConfig { ca, identity: None, server_name: None }),
        ..ScyllaConfig::new(server.nodes(), "datacenter1", "tls")
    };
    let engine = Scylla::connect(&config).await.unwrap();
    let key = DocumentKey { scope: String::new(), kind: "k", id: "x".into() };
    engine.compare_and_set(key.clone(), None, Some(Bytes::from_static(b"secret"))).await.unwrap();
    assert_eq!(&engine.document(&key).await.unwrap().unwrap().value[..], b"secret");
    // A certificate of another name is nobody's, and without TLS nobody answers.
    let other = TlsConfig { server_name: Some("elsewhere".into()), ..config.tls.clone().unwrap() };
    let wrong = ScyllaConfig { tls: Some(other), ..config.clone() };
    assert!(matches!(Scylla::connect(&wrong).await, Err(ConnectError::Unreachable(_))));
    let plain = ScyllaConfig { tls: None, ..config };
    assert!(matches!(Scylla::connect(&plain).await, Err(ConnectError::Unreachable(_))));
}
