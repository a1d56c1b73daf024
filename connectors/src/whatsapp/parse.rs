//! Webhook bodies: every change of every entry, every message and status of every change.

use patchbay_protocol::content::{Content, Interactive, Media, MediaContent};
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::inbound::{
    AccountEvent, Address, AddressKind, InboundMessage, Item, ItemKind, StatusItem, StatusUpdate,
    ThreadEvent, ThreadItem,
};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::summary::Contact;
use patchbay_protocol::timestamp::Timestamp;
use serde_json::{Value, json};

use super::classify;
use crate::NotUnderstood;

/// Items of one body; the provider batches up to a thousand. One with more is kept whole.
const BODY_ITEMS_MAX: usize = 10_000;

/// Account updates after which nothing can be sent until somebody acts.
const PAUSING_EVENTS: [&str; 3] = ["DISABLED_UPDATE", "ACCOUNT_RESTRICTION", "ACCOUNT_DELETED"];

pub(super) fn items(body: &[u8]) -> Result<Vec<Item>, NotUnderstood> {
    let body: Value = serde_json::from_slice(body).map_err(|_| NotUnderstood)?;
    if count(&body) > BODY_ITEMS_MAX {
        return Ok(vec![broken(&body, "more items than a body may have")]);
    }
    let mut items = Vec::new();
    for entry in list(&body["entry"]) {
        for change in list(&entry["changes"]) {
            let before = items.len();
            let field = change["field"].as_str().unwrap_or("");
            match field {
                "messages" => messages(&change["value"], &mut items),
                "smb_message_echoes" => echoes(&change["value"], &mut items),
                _ => items.push(account_item(field, &change["value"])),
            }
            if items.len() == before {
                items.push(broken(change, "a change without items"));
            }
        }
        if list(&entry["changes"]).is_empty() {
            items.push(broken(entry, "an entry without changes"));
        }
    }
    if items.is_empty() {
        items.push(broken(&body, "a body without entries"));
    }
    Ok(items)
}

/// How many items a body makes, about.
fn count(body: &Value) -> usize {
    let in_change = |change: &Value| {
        let value = &change["value"];
        ["messages", "statuses", "message_echoes", "errors"]
            .iter()
            .map(|of| list(&value[of]).len())
            .sum::<usize>()
            + 1
    };
    let in_entry = |entry: &Value| list(&entry["changes"]).iter().map(in_change).sum::<usize>() + 1;
    list(&body["entry"]).iter().map(in_entry).sum()
}

/// An item of its own, as it stands in the dead letters, in the envelope that it came in.
pub(super) fn replay(external_id: &str, raw: &Value) -> Vec<Item> {
    if let Value::String(body) = raw {
        return items(body.as_bytes()).unwrap_or_else(|_| vec![broken(raw, "not a body of this provider")]);
    }
    let metadata = json!({"phone_number_id": external_id});
    let contact = raw["from"].as_str().map(|from| json!({"wa_id": from})).into_iter().collect::<Vec<_>>();
    let mut found = Vec::new();
    if raw["status"].is_string() && !raw["type"].is_string() {
        messages(&json!({"metadata": metadata, "statuses": [raw]}), &mut found);
    } else if raw["to"].is_string() || raw["to_user_id"].is_string() {
        echoes(&json!({"metadata": metadata, "message_echoes": [raw]}), &mut found);
    } else {
        messages(&json!({"metadata": metadata, "contacts": contact, "messages": [raw]}), &mut found);
    }
    found
}

fn broken(raw: &Value, reason: &str) -> Item {
    Item {
        external_id: String::new(),
        kind: ItemKind::Broken { reason: reason.to_owned() },
        raw: raw.clone(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(s) if !s.is_empty() => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

fn external_id(value: &Value) -> String {
    text(&value["metadata"]["phone_number_id"]).unwrap_or_default()
}

fn seconds(value: &Value) -> Option<Timestamp> {
    let n = match value {
        Value::String(s) => s.parse().ok()?,
        Value::Number(n) => n.as_i64()?,
        _ => return None,
    };
    Some(Timestamp::from_seconds(n))
}

fn account_item(field: &str, value: &Value) -> Item {
    let event = value["event"].as_str().unwrap_or("");
    let reinstated = value["ban_info"]["waba_ban_state"] == json!("REINSTATE");
    let banned = value["ban_info"].is_object() || PAUSING_EVENTS.contains(&event);
    let pauses = (field == "account_update" && banned && !reinstated).then(|| format!("{field} {event}"));
    let kind = if field.is_empty() { "unknown" } else { field };
    let event = AccountEvent { kind: kind.to_owned(), data: value.clone(), pauses };
    Item { external_id: external_id(value), kind: ItemKind::Account(event), raw: value.clone() }
}

fn messages(value: &Value, items: &mut Vec<Item>) {
    let external_id = external_id(value);
    let contacts = list(&value["contacts"]);
    for message in list(&value["messages"]) {
        let kind = match thread_item(message, contacts) {
            // A notice of the channel that changes nobody's address is no message of the customer.
            Ok(item)
                if message["type"] == "system"
                    && !matches!(item.event, ThreadEvent::ContactChanged { .. }) =>
            {
                ItemKind::Account(AccountEvent { kind: "system".into(), data: message.clone(), pauses: None })
            }
            Ok(item) => ItemKind::Thread(item),
            Err(reason) => ItemKind::Broken { reason },
        };
        items.push(Item { external_id: external_id.clone(), kind, raw: message.clone() });
    }
    for status in list(&value["statuses"]) {
        let kind = status_item(status).map_or_else(|reason| ItemKind::Broken { reason }, ItemKind::Status);
        items.push(Item { external_id: external_id.clone(), kind, raw: status.clone() });
        // Authorisation, billing and bans show in receipts as well.
        if let Some(code) =
            list(&status["errors"]).iter().filter_map(code_of).find(|c| classify::pauses_account(*c))
        {
            let event = AccountEvent {
                kind: "error".into(),
                data: status["errors"].clone(),
                pauses: Some(format!("error {code}")),
            };
            items.push(Item {
                external_id: external_id.clone(),
                kind: ItemKind::Account(event),
                raw: status.clone(),
            });
        }
    }
    for error in list(&value["errors"]) {
        let pauses = code_of(error).filter(|c| classify::pauses_account(*c)).map(|c| format!("error {c}"));
        let event = AccountEvent { kind: "error".into(), data: error.clone(), pauses };
        items.push(Item {
            external_id: external_id.clone(),
            kind: ItemKind::Account(event),
            raw: error.clone(),
        });
    }
}

fn echoes(value: &Value, items: &mut Vec<Item>) {
    let external_id = external_id(value);
    for message in list(&value["message_echoes"]) {
        let kind = echo_item(message).map_or_else(|reason| ItemKind::Broken { reason }, ItemKind::Thread);
        items.push(Item { external_id: external_id.clone(), kind, raw: message.clone() });
    }
}

fn digits(value: &Value) -> Option<String> {
    let plain: String = text(value)?.chars().filter(|c| *c != '+' && *c != ' ').collect();
    (!plain.is_empty() && plain.len() <= 20 && plain.bytes().all(|b| b.is_ascii_digit())).then_some(plain)
}

fn push(addresses: &mut Vec<Address>, kind: AddressKind, value: Option<String>) {
    if let Some(value) = value.filter(|v| v.len() <= 256) {
        let address = Address { kind, value };
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
}

fn echo_item(message: &Value) -> Result<ThreadItem, String> {
    let mut addresses = Vec::new();
    push(&mut addresses, AddressKind::WaId, digits(&message["to"]));
    push(&mut addresses, AddressKind::UserId, text(&message["to_user_id"]));
    if addresses.is_empty() {
        return Err("an echo without a recipient".into());
    }
    let contact = contact_of(&addresses, &Value::Null);
    let provider_id = text(&message["id"]).ok_or("an echo without an id")?;
    let sent_at = seconds(&message["timestamp"]).ok_or("an echo without a timestamp")?;
    let reply_to = text(&message["context"]["id"]);
    let event = ThreadEvent::Echo { provider_id, content: content(message), sent_at, reply_to };
    Ok(ThreadItem { addresses, contact, event })
}

fn contact_of(addresses: &[Address], profile: &Value) -> Contact {
    let find = |kind| addresses.iter().find(|a| a.kind == kind).map(|a| a.value.clone());
    Contact {
        address: find(AddressKind::WaId).unwrap_or_default(),
        name: text(&profile["name"]).unwrap_or_default(),
        user_id: find(AddressKind::UserId),
        username: text(&profile["username"]),
    }
}

fn thread_item(message: &Value, contacts: &[Value]) -> Result<ThreadItem, String> {
    let provider_id = text(&message["id"]).ok_or("a message without an id")?;
    let from = digits(&message["from"]);
    let from_user = text(&message["from_user_id"]);
    // The contact card of this sender; with one sender in the change, the only one there.
    let card = contacts
        .iter()
        .find(|c| {
            (from.is_some() && digits(&c["wa_id"]) == from)
                || (from_user.is_some() && text(&c["user_id"]) == from_user)
        })
        .or_else(|| {
            if contacts.len() == 1 && from.is_none() && from_user.is_none() { contacts.first() } else { None }
        })
        .unwrap_or(&Value::Null);
    let group = text(&message["group_id"]);
    let mut addresses = Vec::new();
    push(&mut addresses, AddressKind::Group, group.clone());
    if group.is_none() {
        push(&mut addresses, AddressKind::WaId, from.clone().or_else(|| digits(&card["wa_id"])));
        push(&mut addresses, AddressKind::UserId, from_user.clone().or_else(|| text(&card["user_id"])));
        push(
            &mut addresses,
            AddressKind::ParentUserId,
            text(&message["from_parent_user_id"]).or_else(|| text(&card["parent_user_id"])),
        );
    }
    if addresses.is_empty() {
        return Err("a message without a sender".into());
    }
    // In a group the card is the speaker's, not the group's.
    let mut contact = contact_of(&addresses, if group.is_some() { &Value::Null } else { &card["profile"] });
    if let Some(group) = &group {
        contact.address.clone_from(group);
    }
    let participant = group.and(from.or(from_user));
    let event = event(message, provider_id, participant)?;
    let mut item = ThreadItem { addresses, contact, event };
    if message["type"] == "system" {
        changed_number(message, &mut item);
    }
    Ok(item)
}

/// A contact that changed its number or id: the item's new addresses become aliases of the same thread.
fn changed_number(message: &Value, item: &mut ThreadItem) {
    let system = &message["system"];
    let mut new = Vec::new();
    push(&mut new, AddressKind::WaId, digits(&system["wa_id"]).or_else(|| digits(&system["new_wa_id"])));
    push(&mut new, AddressKind::UserId, text(&system["user_id"]));
    push(&mut new, AddressKind::ParentUserId, text(&system["parent_user_id"]));
    if new.is_empty() {
        return;
    }
    for address in &new {
        match address.kind {
            AddressKind::WaId => item.contact.address.clone_from(&address.value),
            AddressKind::UserId => item.contact.user_id = Some(address.value.clone()),
            AddressKind::ParentUserId | AddressKind::Group => {}
        }
    }
    item.event =
        ThreadEvent::ContactChanged { provider_id: item.event.provider_id().to_owned(), new_addresses: new };
}

fn event(message: &Value, provider_id: String, participant: Option<String>) -> Result<ThreadEvent, String> {
    match message["type"].as_str().unwrap_or("") {
        "reaction" => {
            let target = text(&message["reaction"]["message_id"]).ok_or("a reaction without a target")?;
            Ok(ThreadEvent::Reaction {
                provider_id,
                target,
                emoji: text(&message["reaction"]["emoji"]).unwrap_or_default(),
                participant,
            })
        }
        "edit" => {
            let target = text(&message["edit"]["original_message_id"]).ok_or("an edit without a target")?;
            let content = content(&message["edit"]["message"]);
            Ok(ThreadEvent::Edit { provider_id, target, content, participant })
        }
        "revoke" => {
            let target =
                text(&message["revoke"]["original_message_id"]).ok_or("a revoke without a target")?;
            Ok(ThreadEvent::Delete { provider_id, target, participant })
        }
        _ => {
            let context = &message["context"];
            let forwarded =
                context["forwarded"] == json!(true) || context["frequently_forwarded"] == json!(true);
            Ok(ThreadEvent::Message(Box::new(InboundMessage {
                provider_id,
                content: content(message),
                sent_at: seconds(&message["timestamp"]).ok_or("a message without a timestamp")?,
                reply_to: text(&context["id"]),
                referral: message.get("referral").filter(|r| r.is_object()).cloned(),
                forwarded,
                participant,
                errors: list(&message["errors"]).iter().map(error).collect(),
            })))
        }
    }
}

fn code_of(error: &Value) -> Option<i64> {
    error["code"].as_i64().or_else(|| error["code"].as_str()?.parse().ok())
}

fn error(error: &Value) -> ProviderError {
    let code = code_of(error).unwrap_or(0);
    let title = text(&error["title"]).or_else(|| text(&error["message"])).unwrap_or_default();
    ProviderError { code: code.to_string(), title, retryable: classify::is_retryable(code) }
}

/// The content of a message. What is not known, or lacks what its type needs, is `unsupported`.
fn content(message: &Value) -> Content {
    let kind = message["type"].as_str().unwrap_or("");
    let inner = &message[kind];
    let found = match kind {
        "text" => inner["body"].as_str().map(|body| Content::Text { text: body.to_owned() }),
        "image" => media(inner).map(Content::Image),
        "video" => media(inner).map(Content::Video),
        "audio" if inner["voice"] == json!(true) => media(inner).map(Content::Voice),
        "audio" => media(inner).map(Content::Audio),
        "document" => media(inner).map(Content::Document),
        "sticker" => media(inner).map(Content::Sticker),
        "location" => location(inner),
        "contacts" => inner.is_array().then(|| Content::Contacts { contacts: inner.clone() }),
        "button" => text(&inner["text"]).map(|title| Content::Button {
            id: text(&inner["payload"]).unwrap_or_else(|| title.clone()),
            title,
            description: None,
        }),
        "interactive" => interactive(inner),
        "order" => inner.is_object().then(|| Content::Order { order: inner.clone() }),
        "system" => text(&inner["body"]).map(|body| Content::Text { text: body }),
        _ => None,
    };
    found.unwrap_or_else(|| Content::Unsupported { reason: unsupported_reason(message, kind) })
}

fn unsupported_reason(message: &Value, kind: &str) -> String {
    let code = list(&message["errors"]).first().and_then(code_of);
    match (kind, code) {
        ("unsupported", Some(code)) => format!("the channel cannot show it ({code})"),
        ("unsupported", None) => "the channel cannot show it".into(),
        ("", _) => "a message without a type".into(),
        (kind, _) => format!("type {}", kind.chars().take(40).collect::<String>()),
    }
}

fn media(inner: &Value) -> Option<MediaContent> {
    let media = Media {
        id: text(&inner["id"])?,
        mime: text(&inner["mime_type"]).unwrap_or_else(|| "application/octet-stream".into()),
        name: text(&inner["filename"]),
        sha256: text(&inner["sha256"]),
        bytes: inner["file_size"].as_u64(),
    };
    Some(MediaContent { media, caption: text(&inner["caption"]) })
}

fn location(inner: &Value) -> Option<Content> {
    let degrees = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok()).filter(|d| d.is_finite());
    Some(Content::Location {
        latitude: degrees(&inner["latitude"])?,
        longitude: degrees(&inner["longitude"])?,
        name: text(&inner["name"]),
        address: text(&inner["address"]),
    })
}

fn interactive(inner: &Value) -> Option<Content> {
    let kind = inner["type"].as_str()?;
    let reply = &inner[kind];
    match kind {
        "button_reply" | "list_reply" => Some(Content::Button {
            id: text(&reply["id"])?,
            title: text(&reply["title"]).unwrap_or_default(),
            description: text(&reply["description"]),
        }),
        "nfm_reply" => {
            let answers = reply["response_json"].as_str().and_then(|s| serde_json::from_str(s).ok());
            let parameters = answers.unwrap_or_else(|| reply["response_json"].clone());
            Some(Content::Interactive(Interactive::Flow {
                body: text(&reply["body"]).unwrap_or_default(),
                parameters,
                name: text(&reply["name"]),
            }))
        }
        _ => None,
    }
}

fn status_item(status: &Value) -> Result<StatusItem, String> {
    let provider_id = text(&status["id"]).ok_or("a status without an id")?;
    let level = match status["status"].as_str().unwrap_or("") {
        "sent" => MessageStatus::Sent,
        "delivered" => MessageStatus::Delivered,
        "read" | "played" => MessageStatus::Read,
        "failed" => MessageStatus::Failed,
        other => return Err(format!("status {}", other.chars().take(40).collect::<String>())),
    };
    let group = status["recipient_type"] == json!("group");
    let mut recipient = Vec::new();
    if group {
        push(&mut recipient, AddressKind::Group, text(&status["recipient_id"]));
    } else {
        match digits(&status["recipient_id"]) {
            Some(number) => push(&mut recipient, AddressKind::WaId, Some(number)),
            None => push(&mut recipient, AddressKind::UserId, text(&status["recipient_id"])),
        }
        push(&mut recipient, AddressKind::UserId, text(&status["recipient_user_id"]));
    }
    let participant = ["recipient_participant_id", "recipient_participant_user_id"]
        .iter()
        .find_map(|name| text(&status[*name]));
    let first_error = list(&status["errors"]).first();
    let update = StatusUpdate {
        provider_id: Some(provider_id),
        status: level,
        provider_at: seconds(&status["timestamp"]),
        pricing: status.get("pricing").filter(|p| p.is_object()).cloned(),
        participant: if group { participant } else { None },
        error: first_error.map(error),
        closes_window: first_error.and_then(code_of).is_some_and(classify::closes_window),
    };
    Ok(StatusItem {
        callback: status["biz_opaque_callback_data"].as_str().and_then(|s| s.parse().ok()),
        recipient,
        update,
    })
}
