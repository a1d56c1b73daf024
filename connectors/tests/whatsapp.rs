//! WhatsApp: every inbound kind, every outbound kind, and bodies that nobody should send.
#![allow(missing_docs, clippy::unwrap_used)]

use patchbay_connectors::Connector;
use patchbay_connectors::whatsapp::WhatsApp;
use patchbay_protocol::content::{Content, Interactive};
use patchbay_protocol::inbound::{AddressKind, Item, ItemKind, ThreadEvent};
use patchbay_protocol::outbound::{Lane, Outbound, Payload, Recipient};
use patchbay_protocol::receipt::MessageStatus;
use proptest::prelude::*;
use serde_json::{Value, json};

fn body(value: Value) -> Vec<u8> {
    json!({"object": "whatsapp_business_account", "entry": [{"id": "W", "changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

fn message(mut message: Value) -> Item {
    for (name, value) in
        [("from", json!("34600111222")), ("id", json!("wamid.1")), ("timestamp", json!("1700000000"))]
    {
        if message.get(name).is_none() {
            message[name] = value;
        }
    }
    let value = json!({"metadata": {"phone_number_id": "1"}, "contacts": [{"profile": {"name": "Luz", "username": "luz"}, "wa_id": "34600111222", "user_id": "ES.1", "parent_user_id": "ES.P"}], "messages": [message]});
    let mut items = WhatsApp.parse(&body(value)).unwrap();
    assert_eq!(items.len(), 1);
    items.remove(0)
}

fn content(m: Value) -> Content {
    match message(m).kind {
        ItemKind::Thread(t) => match t.event {
            ThreadEvent::Message(m) => m.content,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_inbound_kind() {
    assert_eq!(content(json!({"type": "text", "text": {"body": "hi"}})), Content::Text { text: "hi".into() });
    for (kind, name) in [
        ("image", "image"),
        ("video", "video"),
        ("audio", "audio"),
        ("document", "document"),
        ("sticker", "sticker"),
    ] {
        let c = content(
            json!({"type": kind, kind: {"id": "M", "mime_type": "x/y", "sha256": "s", "caption": "c", "filename": "f"}}),
        );
        assert_eq!(c.kind(), name);
    }
    assert_eq!(
        content(json!({"type": "audio", "audio": {"id": "M", "mime_type": "audio/ogg", "voice": true}}))
            .kind(),
        "voice"
    );
    let c =
        content(json!({"type": "location", "location": {"latitude": 1.5, "longitude": "2.5", "name": "N"}}));
    assert!(
        matches!(c, Content::Location { latitude, longitude, .. } if (latitude, longitude) == (1.5, 2.5))
    );
    assert_eq!(
        content(json!({"type": "contacts", "contacts": [{"name": {"formatted_name": "A"}}]})).kind(),
        "contacts"
    );
    let c = content(
        json!({"type": "interactive", "interactive": {"type": "list_reply", "list_reply": {"id": "r1", "title": "One", "description": "d"}}}),
    );
    assert_eq!(c, Content::Button { id: "r1".into(), title: "One".into(), description: Some("d".into()) });
    let c = content(json!({"type": "button", "button": {"payload": "P", "text": "Yes"}}));
    assert_eq!(c, Content::Button { id: "P".into(), title: "Yes".into(), description: None });
    let c = content(
        json!({"type": "interactive", "interactive": {"type": "nfm_reply", "nfm_reply": {"name": "flow", "body": "Sent", "response_json": "{\"a\":1}"}}}),
    );
    assert!(
        matches!(c, Content::Interactive(Interactive::Flow { parameters, .. }) if parameters == json!({"a": 1}))
    );
    assert_eq!(content(json!({"type": "order", "order": {"catalog_id": "c"}})).kind(), "order");
    for odd in [
        json!({"type": "unsupported", "errors": [{"code": 131_051}]}),
        json!({"type": "interactive"}),
        json!({"type": "hologram", "hologram": {}}),
        json!({"type": "image", "image": {}}),
        json!({}),
    ] {
        assert_eq!(content(odd.clone()).kind(), "unsupported", "{odd}");
    }
    let ItemKind::Thread(t) = message(json!({"type": "text", "text": {"body": "x"}, "context": {"id": "wamid.0", "forwarded": true}, "referral": {"source_id": "ad"}, "errors": [{"code": 1, "title": "t"}]})).kind else { panic!() };
    let ThreadEvent::Message(m) = t.event else { panic!() };
    assert_eq!(
        (m.reply_to.as_deref(), m.forwarded, m.referral.is_some(), m.errors.len()),
        (Some("wamid.0"), true, true, 1)
    );
    assert_eq!(
        t.addresses.iter().map(|a| a.kind).collect::<Vec<_>>(),
        [AddressKind::WaId, AddressKind::UserId, AddressKind::ParentUserId]
    );
    assert_eq!((t.contact.name.as_str(), t.contact.username.as_deref()), ("Luz", Some("luz")));
}

#[test]
fn reactions_edits_deletions_system_and_groups() {
    let event = |m: Value| match message(m).kind {
        ItemKind::Thread(t) => t.event,
        other => panic!("{other:?}"),
    };
    assert!(
        matches!(event(json!({"type": "reaction", "reaction": {"message_id": "w", "emoji": "x"}})), ThreadEvent::Reaction { emoji, .. } if emoji == "x")
    );
    assert!(
        matches!(event(json!({"type": "reaction", "reaction": {"message_id": "w"}})), ThreadEvent::Reaction { emoji, .. } if emoji.is_empty())
    );
    assert!(matches!(
        event(
            json!({"type": "edit", "edit": {"original_message_id": "w", "message": {"type": "text", "text": {"body": "n"}}}})
        ),
        ThreadEvent::Edit { .. }
    ));
    assert!(matches!(
        event(json!({"type": "revoke", "revoke": {"original_message_id": "w"}})),
        ThreadEvent::Delete { .. }
    ));
    let ItemKind::Thread(t) = message(
        json!({"type": "system", "system": {"type": "user_changed_number", "wa_id": "34699", "body": "b"}}),
    )
    .kind
    else {
        panic!()
    };
    assert_eq!(t.contact.address, "34699");
    assert!(
        matches!(t.event, ThreadEvent::ContactChanged { new_addresses, .. } if new_addresses[0].value == "34699")
    );
    assert!(matches!(message(json!({"type": "system", "system": {"body": "b"}})).kind, ItemKind::Account(_)));
    let ItemKind::Thread(t) = message(json!({"type": "text", "text": {"body": "x"}, "group_id": "G1"})).kind
    else {
        panic!()
    };
    assert_eq!((t.addresses.len(), t.addresses[0].value.as_str(), t.contact.name.as_str()), (1, "G1", ""));
    assert!(matches!(t.event, ThreadEvent::Message(m) if m.participant.as_deref() == Some("34600111222")));
}

#[test]
fn a_business_scoped_sender_has_no_number() {
    let value = json!({"metadata": {"phone_number_id": "1"}, "messages": [{"from_user_id": "ES.9", "id": "w", "timestamp": "1", "type": "text", "text": {"body": "x"}}]});
    let ItemKind::Thread(t) = WhatsApp.parse(&body(value)).unwrap().remove(0).kind else { panic!() };
    assert_eq!(
        (t.addresses[0].kind, t.contact.address.as_str(), t.contact.user_id.as_deref()),
        (AddressKind::UserId, "", Some("ES.9"))
    );
}

#[test]
fn statuses_with_everything() {
    let id = "117hm6cewq8ptd8sg97y11y4xd-7";
    let statuses = json!([
        {"id": "w", "status": "delivered", "timestamp": "1700000000", "recipient_id": "34600", "biz_opaque_callback_data": id, "pricing": {"billable": true}},
        {"id": "w", "status": "played", "timestamp": 1_700_000_000, "recipient_id": "ES.1"},
        {"id": "w", "status": "failed", "errors": [{"code": 131_047, "title": "Re-engagement"}]},
        {"id": "w", "status": "read", "recipient_type": "group", "recipient_id": "G", "recipient_participant_id": "34611"},
        {"id": "w", "status": "vanished"},
        {"status": "read"},
    ]);
    let items =
        WhatsApp.parse(&body(json!({"metadata": {"phone_number_id": "1"}, "statuses": statuses}))).unwrap();
    let status = |n: usize| match &items[n].kind {
        ItemKind::Status(s) => s.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        (status(0).callback.unwrap().to_string().as_str(), status(0).update.status),
        (id, MessageStatus::Delivered)
    );
    assert_eq!(
        (status(1).update.status, status(1).recipient[0].kind),
        (MessageStatus::Read, AddressKind::UserId)
    );
    assert!(status(2).update.closes_window);
    assert_eq!(
        (status(3).update.participant.as_deref(), status(3).recipient[0].kind),
        (Some("34611"), AddressKind::Group)
    );
    assert!(
        matches!(items[4].kind, ItemKind::Broken { .. }) && matches!(items[5].kind, ItemKind::Broken { .. })
    );
}

#[test]
fn account_items_and_echoes() {
    let field = |field: &str, value: Value| {
        WhatsApp
            .parse(
                &json!({"entry": [{"changes": [{"field": field, "value": value}]}]}).to_string().into_bytes(),
            )
            .unwrap()
            .remove(0)
            .kind
    };
    let paused = |kind: ItemKind| matches!(kind, ItemKind::Account(e) if e.pauses.is_some());
    assert!(!paused(field("message_template_status_update", json!({"event": "APPROVED"}))));
    assert!(paused(field(
        "account_update",
        json!({"event": "DISABLED_UPDATE", "ban_info": {"waba_ban_state": "DISABLE"}})
    )));
    assert!(!paused(field(
        "account_update",
        json!({"event": "DISABLED_UPDATE", "ban_info": {"waba_ban_state": "REINSTATE"}})
    )));
    assert!(paused(field("messages", json!({"errors": [{"code": 131_042}]}))));
    let echo = field(
        "smb_message_echoes",
        json!({"message_echoes": [{"to": "34600", "id": "w", "timestamp": "1", "type": "text", "text": {"body": "x"}}]}),
    );
    assert!(matches!(echo, ItemKind::Thread(t) if matches!(t.event, ThreadEvent::Echo { .. })));
}

#[test]
fn nothing_signed_is_dropped_silently() {
    for odd in [
        json!({}),
        json!([]),
        json!({"entry": []}),
        json!({"entry": [{}]}),
        json!({"entry": [{"changes": [{"field": "messages", "value": {}}]}]}),
    ] {
        let items = WhatsApp.parse(odd.to_string().as_bytes()).unwrap();
        assert!(matches!(items[0].kind, ItemKind::Broken { .. }), "{odd}");
    }
    assert!(WhatsApp.parse(b"not json").is_err());
}

fn outbound(content: Content, recipient: Recipient) -> Value {
    let entry = "117hm6cewq8ptd8sg97y11y4xd-7".parse().unwrap();
    let at = patchbay_protocol::Timestamp::from_seconds(1);
    let message = Outbound {
        entry,
        at,
        thread: "34600".into(),
        recipient,
        payload: Payload::Message(content),
        reply_to: Some("wamid.0".into()),
        lane: Lane::Agent,
    };
    let call = WhatsApp.render("1", &message).unwrap();
    assert_eq!(call.path, "1/messages");
    serde_json::from_slice(&call.body).unwrap()
}

#[test]
fn every_outbound_kind_renders() {
    let to = || Recipient { address: "34600".into(), user_id: Some("ES.1".into()) };
    let media = json!({"id": "M", "mime": "x/y", "name": "f"});
    let cases = [
        (json!({"type": "text", "text": "hi"}), "text"),
        (json!({"type": "image", "media": media, "caption": "c"}), "image"),
        (json!({"type": "video", "media": media}), "video"),
        (json!({"type": "audio", "media": media}), "audio"),
        (json!({"type": "voice", "media": media}), "audio"),
        (json!({"type": "document", "media": media}), "document"),
        (json!({"type": "sticker", "media": media}), "sticker"),
        (json!({"type": "location", "latitude": 1.0, "longitude": 2.0}), "location"),
        (json!({"type": "contacts", "contacts": [{"name": {"formatted_name": "A"}}]}), "contacts"),
        (json!({"type": "template", "name": "t", "language": "en", "components": []}), "template"),
        (
            json!({"type": "interactive", "kind": "buttons", "body": "b", "buttons": [{"id": "1", "title": "One"}]}),
            "interactive",
        ),
        (
            json!({"type": "interactive", "kind": "list", "body": "b", "button": "Open", "sections": [{"title": "S", "rows": [{"id": "1", "title": "One"}]}]}),
            "interactive",
        ),
        (
            json!({"type": "interactive", "kind": "cta_url", "body": "b", "display_text": "Go", "url": "https://e.x"}),
            "interactive",
        ),
        (json!({"type": "interactive", "kind": "location_request", "body": "b"}), "interactive"),
        (
            json!({"type": "interactive", "kind": "flow", "body": "b", "parameters": {"flow_id": "1"}}),
            "interactive",
        ),
    ];
    for (value, kind) in cases {
        let content: Content = serde_json::from_value(value.clone()).unwrap();
        WhatsApp.check(&content).unwrap();
        let frame = outbound(content, to());
        assert_eq!((frame["type"].as_str(), frame[kind].is_null()), (Some(kind), false), "{value}");
        assert_eq!(
            (frame["to"].as_str(), frame["biz_opaque_callback_data"].as_str()),
            (Some("34600"), Some("117hm6cewq8ptd8sg97y11y4xd-7"))
        );
        assert_eq!(frame["context"]["message_id"], "wamid.0");
    }
    let frame = outbound(
        Content::Text { text: "x".into() },
        Recipient { address: String::new(), user_id: Some("ES.1".into()) },
    );
    assert_eq!(
        (frame["recipient"].as_str(), frame.get("to")),
        (Some("ES.1"), None),
        "a business-scoped id never goes into `to`"
    );
    for refused in [
        json!({"type": "text", "text": ""}),
        json!({"type": "button", "id": "1", "title": "x"}),
        json!({"type": "audio", "media": media, "caption": "c"}),
        json!({"type": "interactive", "kind": "buttons", "body": "b", "buttons": []}),
    ] {
        assert!(WhatsApp.check(&serde_json::from_value(refused.clone()).unwrap()).is_err(), "{refused}");
    }
}

proptest! {
    #[test]
    fn no_mutation_of_a_good_body_does(at in any::<usize>(), with in any::<u8>(), cut in any::<usize>()) {
        let value = json!({"metadata": {"phone_number_id": "1"}, "contacts": [{"wa_id": "1"}], "messages": [{"from": "34600", "id": "w", "timestamp": "1", "type": "image", "image": {"id": "M"}}], "statuses": [{"id": "w", "status": "read"}]});
        let mut bytes = body(value);
        let n = bytes.len();
        bytes[at % n] = with;
        bytes.truncate(cut % (n + 1));
        let _ = WhatsApp.parse(&bytes);
    }
}
