//! What a visitor of a web chat sees of its conversation: messages and media, their authors by kind and display name
//! alone (contract §5). Everything else is for the business.

use bytes::Bytes;
use patchbay_protocol::AgentId;
use serde_json::{Map, Value, json};

/// Whether a visitor sees entries of this type.
fn is_shown(kind: &str) -> bool {
    kind.starts_with("message.") || kind.starts_with("media.")
}

/// The agent who made an entry that a visitor sees.
pub fn agent_of(entry: &[u8]) -> Option<AgentId> {
    let entry: Value = serde_json::from_slice(entry).ok()?;
    let agent = entry["actor"]["type"] == "agent" && entry["type"].as_str().is_some_and(is_shown);
    if agent { entry["actor"]["id"].as_str()?.parse().ok() } else { None }
}

/// An entry as a visitor sees it; `None` when it does not. `name` tells how an agent is called.
pub fn for_contact(entry: &[u8], name: impl Fn(&AgentId) -> Option<String>) -> Option<Bytes> {
    let mut entry: Map<String, Value> = serde_json::from_slice(entry).ok()?;
    if !entry.get("type").and_then(Value::as_str).is_some_and(is_shown) {
        return None;
    }
    let actor = reduced(entry.get("actor")?, name);
    entry.insert("actor".into(), actor);
    entry.remove("caused_by");
    Some(Value::Object(entry).to_string().into())
}

/// An actor without its id.
fn reduced(actor: &Value, name: impl Fn(&AgentId) -> Option<String>) -> Value {
    let kind = &actor["type"];
    let id = actor["id"].as_str().unwrap_or("");
    let name = if kind == "agent" { id.parse().ok().and_then(|id| name(&id)) } else { None };
    match name {
        Some(name) => json!({"type": kind, "name": name}),
        None => json!({"type": kind}),
    }
}

/// That somebody is writing, as a visitor sees it.
pub fn typing_for_contact(publication: &[u8], name: impl Fn(&AgentId) -> Option<String>) -> Option<Bytes> {
    let mut typing: Map<String, Value> = serde_json::from_slice(publication).ok()?;
    let actor = reduced(typing.get("actor")?, name);
    typing.insert("actor".into(), actor);
    Some(Value::Object(typing).to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, actor: Value) -> Vec<u8> {
        json!({"seq": 7, "at": "2026-11-21T09:00:00Z", "type": kind, "actor": actor, "data": {"x": 1}, "caused_by": {"event": "e-1", "depth": 1}})
            .to_string()
            .into_bytes()
    }

    fn seen(kind: &str, actor: Value) -> Option<Value> {
        let name = |id: &AgentId| (id.as_str() == "anna").then(|| "Anna".to_owned());
        for_contact(&entry(kind, actor), name).map(|e| serde_json::from_slice(&e).unwrap())
    }

    #[test]
    fn a_visitor_sees_messages_and_media_and_nobodys_id() {
        let agent = || json!({"type": "agent", "id": "anna"});
        for kind in ["message.sent", "message.received", "message.status", "message.edited", "media.stored"] {
            let seen = seen(kind, agent()).unwrap();
            assert_eq!(seen["actor"], json!({"type": "agent", "name": "Anna"}));
            assert_eq!((seen["seq"].as_u64(), seen.get("caused_by")), (Some(7), None));
        }
        assert_eq!(
            seen("message.sent", json!({"type": "agent", "id": "gone"})).unwrap()["actor"],
            json!({"type": "agent"})
        );
        assert_eq!(
            seen("message.sent", json!({"type": "api", "id": "acme"})).unwrap()["actor"],
            json!({"type": "api"})
        );
        for kind in [
            "note.added",
            "conversation.assigned",
            "conversation.opened",
            "tag.added",
            "contact.updated",
            "conversation.read",
        ] {
            assert_eq!(seen(kind, agent()), None, "{kind}");
        }
    }
}
