//! What every connector must do, whichever it is.
#![allow(missing_docs, clippy::unwrap_used)]

use patchbay_connectors::{Connector, NAMES, by_name};
use patchbay_protocol::inbound::{ItemKind, ThreadEvent};
use patchbay_protocol::outbound::{CallResult, Lane, Outbound, Payload, Recipient, Signal, Verdict};
use patchbay_protocol::{Content, Timestamp};
use proptest::prelude::*;
use serde_json::{Value, json};

fn all() -> impl Iterator<Item = &'static dyn Connector> {
    NAMES.iter().map(|name| by_name(name).unwrap())
}

fn text(text: &str) -> Content {
    Content::Text { text: text.into() }
}

#[test]
fn it_is_found_by_its_name_and_nobody_else_is() {
    for name in NAMES {
        assert_eq!(by_name(name).unwrap().name(), name);
    }
    assert!(by_name("pigeon").is_none());
}

#[test]
fn nothing_is_verified_without_a_secret_and_bad_credentials_are_refused() {
    for c in all() {
        let name = c.name();
        for credentials in [json!({}), json!(null), json!([]), json!({"app_secret": ""})] {
            let verified = c.verify(&credentials, &|_| Some(b"sha256=00".to_vec()), b"{}");
            assert!(!verified, "{name}: {credentials}");
            assert!(c.challenge(&credentials, &[]).is_err(), "{name}");
        }
        for wrong in [json!({"unknown": 1}), json!(null), json!("x")] {
            assert!(c.check_credentials(&wrong).is_err(), "{name}: {wrong}");
        }
        // A channel with a provider behind it has a secret.
        assert_eq!(c.check_credentials(&json!({})).is_ok(), c.channel().direct, "{name}");
    }
}

#[test]
fn it_checks_what_it_is_asked_to_carry() {
    for c in all() {
        let name = c.name();
        c.check(&text("x")).unwrap();
        assert!(c.check(&text("")).is_err(), "{name}: an empty text");
        assert!(c.check(&text(&"x".repeat(100_000))).is_err(), "{name}: a text without end");
        assert!(c.check(&Content::Unsupported { reason: "x".into() }).is_err(), "{name}");
        for bad in ["", "a b", "\n", "x\u{0}", &"9".repeat(500)] {
            assert!(c.recipient(bad).is_err(), "{name}: {bad:?}");
        }
        let good = c.recipient("34600111222").unwrap();
        assert_eq!(c.recipient(&good).unwrap(), good, "{name}: an address is its own address");
    }
}

#[test]
fn it_renders_what_it_carries_and_names_the_entry() {
    for c in all() {
        let limits = c.limits();
        assert!(limits.account_per_second > 0.0 && limits.pair_burst >= 1.0 && limits.pair_per_second > 0.0);
        let message = Outbound {
            entry: "117hm6cewq8ptd8sg97y11y4xd-7".parse().unwrap(),
            at: Timestamp::from_seconds(1),
            thread: "34600111222".into(),
            recipient: Recipient { address: "34600111222".into(), user_id: None },
            payload: Payload::Message(text("x")),
            reply_to: None,
            lane: Lane::Agent,
        };
        let rendered = c.render("1", &message);
        assert_eq!(rendered.is_err(), c.channel().direct, "{}: a provider is called, or nobody is", c.name());
        if let Ok(call) = rendered {
            let body: Value = serde_json::from_slice(&call.body).unwrap();
            assert!(body.to_string().contains("117hm6cewq8ptd8sg97y11y4xd-7"), "{}: {body}", c.name());
        }
        if let Some(call) = c.signal("1", &Signal::Read { provider_id: "x".into() }) {
            assert!(serde_json::from_slice::<Value>(&call.body).is_ok());
        }
    }
}

#[test]
fn a_call_whose_fate_is_not_known_is_never_sent_again_blindly() {
    for c in all() {
        assert_eq!(c.classify(&CallResult::Lost), Verdict::Unknown, "{}", c.name());
        for status in [200u16, 408, 500, 502, 503, 504] {
            let blank = CallResult::Answered { status, retry_after: None, body: "".into() };
            assert_eq!(c.classify(&blank), Verdict::Unknown, "{}: {status} without a body", c.name());
        }
    }
}

/// What stands in the dead letters can be taken again, and what cannot says why.
#[test]
fn what_was_kept_as_it_came_can_be_replayed() {
    for c in all().filter(|c| !c.channel().direct) {
        let broken = c.replay("1", &json!({"type": "text", "text": {"body": "no id"}}));
        assert!(
            matches!(broken[..], [ref item] if matches!(item.kind, ItemKind::Broken { .. })),
            "{}",
            c.name()
        );
        let whole = c.replay("1", &json!("not json at all"));
        assert!(matches!(whole[..], [ref item] if matches!(item.kind, ItemKind::Broken { .. })));
    }
    let raw = json!({"from": "34600", "id": "w", "timestamp": "1", "type": "text", "text": {"body": "x"}});
    let items = by_name("whatsapp").unwrap().replay("1", &raw);
    assert_eq!((items.len(), items[0].external_id.as_str()), (1, "1"));
    let ItemKind::Thread(thread) = &items[0].kind else { panic!("{:?}", items[0]) };
    assert!(matches!(&thread.event, ThreadEvent::Message(m) if m.content == text("x")));
    assert_eq!(thread.addresses[0].value, "34600");
}

proptest! {
    #[test]
    fn no_body_makes_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        for c in all() {
            let _ = c.parse(&bytes);
            let _ = c.replay("1", &Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
}
