//! What nodes share for a while, on a real server: one bucket for all, one reply for all, and what becomes of it when the
//! server is killed, flushed or slow.
#![allow(missing_docs, clippy::unwrap_used)]

mod servers;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use patchbay_storage::redis::{Away, Change, Kept, Redis};

async fn two() -> Option<(Arc<Redis>, Arc<Redis>)> {
    if servers::quick() {
        return None;
    }
    Some(pair(&servers::redis()).await)
}

async fn pair(address: &str) -> (Arc<Redis>, Arc<Redis>) {
    let cluster = servers::fresh("c");
    let connect = || Arc::new(Redis::connect(&format!("redis://{address}"), &cluster).unwrap());
    let pair = (connect(), connect());
    answers(&pair.0).await;
    answers(&pair.1).await;
    pair
}

async fn answers(redis: &Redis) {
    for _ in 0..500 {
        if redis.ping().await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it does not answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_one_bucket_on_all_nodes() {
    let Some((a, b)) = two().await else { return };
    let mut taken = 0;
    // A burst of 100 that fills by one in 1,000 seconds.
    for n in 0..300 {
        let node = if n % 2 == 0 { &a } else { &b };
        match node.take(b"key", 0.001, 100.0).await.unwrap() {
            Ok(()) => taken += 1,
            Err(wait) => assert!(wait > 900_000, "{wait} ms"),
        }
    }
    assert_eq!(taken, 100);
    assert_eq!(b.take(b"other", 0.001, 1.0).await.unwrap(), Ok(()), "another caller's is full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_answered_once_on_all_nodes() {
    let Some((a, b)) = two().await else { return };
    let (request, body) = ([7; 32], [1; 32]);
    assert_eq!(a.begin(&request, body).await.unwrap(), Kept::Ours);
    assert_eq!(b.begin(&request, body).await.unwrap(), Kept::Running { body });
    let answer = Kept::Answered {
        body,
        status: 201,
        content_type: Bytes::from_static(b"application/json"),
        reply: Bytes::from_static(b"{}"),
    };
    a.end(&request, Some(&answer), Duration::from_secs(60)).await.unwrap();
    assert_eq!(b.begin(&request, body).await.unwrap(), answer);
    a.end(&request, None, Duration::ZERO).await.unwrap();
    assert_eq!(b.begin(&request, body).await.unwrap(), Kept::Ours, "it may be tried again");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_and_hints_reach_other_nodes() {
    let Some((a, b)) = two().await else { return };
    let tenant = "acme".parse().unwrap();
    let mut changes = b.changes();
    let heard = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            // The subscription may still be on its way.
            a.tell_change(&tenant).await.unwrap();
            let next = tokio::time::timeout(Duration::from_millis(100), changes.recv()).await;
            if let Ok(Some(Change::Of(heard))) = next {
                return heard;
            }
        }
    });
    assert_eq!(heard.await.unwrap(), tenant);
    a.hint_presence(&tenant, "anna", "online", Duration::from_secs(60)).await.unwrap();
    let hints = b.presence_hints(&tenant, &["ben", "anna"]).await.unwrap();
    assert_eq!(hints, [None, Some("online".to_owned())]);
    assert_eq!(b.presence_hints(&"other".parse().unwrap(), &["anna"]).await.unwrap(), [None]);
    assert_eq!(b.presence_hints(&tenant, &[]).await.unwrap(), Vec::<Option<String>>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_flushed_and_slow() {
    if servers::quick() {
        return;
    }
    let mut server = servers::Server::start("redis", 1, &[]);
    let (a, b) = pair(&server.addresses).await;
    assert_eq!(a.take(b"key", 1.0, 1.0).await.unwrap(), Ok(()));
    assert!(a.take(b"key", 1.0, 1.0).await.unwrap().is_err());
    let mut changes = b.changes();
    server.kill(1);
    assert_eq!(a.take(b"key", 1.0, 1.0).await, Err(Away));
    assert!(a.is_away());
    server.restart(1);
    answers(&a).await;
    assert!(!a.is_away());
    // It has forgotten everything, also the script.
    assert_eq!(a.take(b"key", 0.001, 1.0).await.unwrap(), Ok(()));
    let heard = tokio::time::timeout(Duration::from_secs(20), changes.recv()).await.unwrap();
    assert_eq!(heard, Some(Change::Unknown), "word may have been missed");
    // Slow: one request waits for it, and no other for a while.
    server.freeze(1);
    assert_eq!(a.ping().await, Err(Away));
    assert_eq!(a.take(b"key", 1.0, 1.0).await, Err(Away));
    server.thaw(1);
    answers(&a).await;
    answers(&b).await;
}
