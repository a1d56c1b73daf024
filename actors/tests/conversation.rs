//! A conversation on a store without faults: ids that dedupe for ever, snapshots, replay.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::World;
use patchbay_actors::conversation::State;
use patchbay_actors::desk::Who;
use patchbay_protocol::command::{AddNote, Reply, Request, SendMessage};
use patchbay_protocol::entry::{Actor, ActorType, Body, Cause, Entry, Opened, Received, Sent, StatusChanged};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::summary::Contact;
use patchbay_protocol::{Content, ConversationId, Timestamp};
use patchbay_storage::Table;
use proptest::prelude::*;

fn id() -> ConversationId {
    ConversationId::derive(&"t".parse().unwrap(), &"wa".parse().unwrap(), "34600")
}

fn opened() -> Body {
    Body::Opened(Opened {
        episode: 1,
        cause: Cause::CustomerMessage,
        tenant: "t".parse().unwrap(),
        account: "wa".parse().unwrap(),
        inbox: "main".parse().unwrap(),
        contact: Contact { address: "34600".into(), ..Contact::default() },
        thread: "34600".into(),
    })
}

fn any_body() -> impl Strategy<Value = Body> {
    let text = || Content::Text { text: "x".into() };
    let status = prop_oneof![
        Just(MessageStatus::Sent),
        Just(MessageStatus::Delivered),
        Just(MessageStatus::Read),
        Just(MessageStatus::Failed),
        Just(MessageStatus::Unknown)
    ];
    prop_oneof![
        4 => (0..1000i64).prop_map(move |s| Body::Received(Received {
            provider_id: format!("p{s}"), content: text(), sent_at: Timestamp::from_seconds(s), reply_to: None,
            referral: None, forwarded: false, participant: None, errors: vec![],
        })),
        4 => "[a-z]{3}".prop_map(move |client_id| Body::Sent(Sent { client_id, content: text(), reply_to: None, provider_id: None, sent_at: None })),
        4 => (1..60u64, status).prop_map(|(message_seq, status)| Body::Status(StatusChanged {
            message_seq, status, provider_id: None, provider_at: None, pricing: None, participant: None, error: None,
        })),
        1 => (1..60u64).prop_map(|up_to_seq| Body::Read { up_to_seq }),
        1 => Just(Body::Resolved { episode: 1, cause: Cause::Command }),
        1 => Just(Body::Snoozed { episode: 1, cause: Cause::Command, until: Timestamp::from_seconds(5000) }),
        1 => "[a-z]".prop_map(|tag| Body::TagAdded { tag }),
        1 => "[a-z]".prop_map(|tag| Body::TagRemoved { tag }),
    ]
}

fn entries(bodies: Vec<Body>) -> Vec<Entry> {
    let actor = |b: &Body| match b {
        Body::Received(_) => Actor::new(ActorType::Contact, "34600"),
        _ => Actor::new(ActorType::Agent, "anna"),
    };
    let all = std::iter::once(opened()).chain(bodies).enumerate();
    // Nobody reads what is not there yet: the command is cut at the tip.
    let cut = |n: usize, body: Body| match body {
        Body::Read { up_to_seq } => Body::Read { up_to_seq: up_to_seq.min(n as u64) },
        body => body,
    };
    all.map(|(n, body)| (n, cut(n, body)))
        .map(|(n, body)| Entry {
            seq: n as u64 + 1,
            at: Timestamp::from_seconds(n as i64),
            actor: actor(&body),
            body,
            caused_by: None,
        })
        .collect()
}

proptest! {
    #[test]
    fn replaying_from_the_start_and_from_any_snapshot_gives_the_same_state(bodies in prop::collection::vec(any_body(), 0..150), at in any::<prop::sample::Index>()) {
        let log = entries(bodies);
        let mut whole = State::fresh(id());
        log.iter().for_each(|e| whole.apply(e));
        let cut = at.index(log.len());
        let mut first = State::fresh(id());
        log[..cut].iter().for_each(|e| first.apply(e));
        let stored = Bytes::from(serde_json::to_vec(&first).unwrap());
        let mut second: State = serde_json::from_slice(&stored).unwrap();
        log[cut..].iter().for_each(|e| second.apply(e));
        prop_assert_eq!(&whole, &second);
        let unread = log.iter().filter(|e| matches!(e.body, Body::Received(_)) && e.seq > whole.read_up_to).count() as u64;
        prop_assert_eq!(whole.unread(), unread);
    }
}

#[tokio::test(start_paused = true)]
async fn ids_dedupe_after_a_hundred_thousand_more_two_snapshots_and_a_restart() {
    let first = World::new().await;
    let template =
        || Content::Template { name: "t".into(), language: "en".into(), components: serde_json::Value::Null };
    let message =
        || SendMessage { client_id: "the first".into(), content: template(), reply_to: None, if_seq: None };
    let (tenant, account) = (common::tenant(), common::account());
    let (id, sent) = first.desk.send_to(&tenant, &account, "34600111222", message()).await.unwrap();
    assert!(!sent.duplicate);
    let who = Who::Api(tenant.clone());
    for round in 0..400u32 {
        let mut answers = Vec::with_capacity(250);
        for n in 0..250u32 {
            let note = AddNote { client_id: format!("{round}.{n}"), text: "x".into() };
            answers.push(first.desk.submit(&who, id, Request::Note(note)).await.unwrap());
        }
        for answer in answers {
            assert!(matches!(answer.wait().await, Ok(Reply::Sent(_))));
        }
        // Time passes: derived rows and snapshots are written.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let snapshots = first.model.writes_to(Table::Snapshots);
    assert!(snapshots >= 2, "{snapshots} snapshots");
    let second = first.crash().await;
    let (_, again) = second.desk.send_to(&tenant, &account, "34600111222", message()).await.unwrap();
    assert_eq!((again.seq, again.duplicate), (sent.seq, true));
    let note = AddNote { client_id: "7.7".into(), text: "x".into() };
    let answer = second.desk.submit(&who, id, Request::Note(note)).await.unwrap().wait().await;
    let Ok(Reply::Sent(again)) = answer else { panic!("refused") };
    assert!(again.duplicate);
}
