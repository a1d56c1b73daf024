//! The AsyncAPI 3.0 description of the socket's rpc methods, generated from the types that they are parsed into.

use patchbay_protocol::command::{
    AddNote, AssignConversation, DeleteMessage, EditMessage, Empty, ReactMessage, ReadConversation,
    SendMessage, SendReply, SetTyping, SnoozeConversation, StateReply, TagConversation,
};
use patchbay_protocol::summary::Summary;
use serde_json::{Map, Value, json};
use utoipa::PartialSchema;

use super::commands::METHODS;

fn schema<T: PartialSchema>() -> Value {
    serde_json::to_value(T::schema()).unwrap_or_default()
}

/// The data and the answer of a method, without `conversation`.
fn shapes(method: &str) -> (Value, Value) {
    match method {
        "message.send" => (schema::<SendMessage>(), schema::<SendReply>()),
        "message.edit" => (schema::<EditMessage>(), schema::<StateReply>()),
        "message.delete" => (schema::<DeleteMessage>(), schema::<StateReply>()),
        "message.react" => (schema::<ReactMessage>(), schema::<StateReply>()),
        "conversation.read" => (schema::<ReadConversation>(), schema::<StateReply>()),
        "conversation.assign" => (schema::<AssignConversation>(), schema::<StateReply>()),
        "conversation.resolve" | "conversation.reopen" | "conversation.pending" => {
            (schema::<Empty>(), schema::<StateReply>())
        }
        "conversation.snooze" => (schema::<SnoozeConversation>(), schema::<StateReply>()),
        "conversation.tag" => (schema::<TagConversation>(), schema::<StateReply>()),
        "conversation.get" => (schema::<Empty>(), schema::<Summary>()),
        "note.add" => (schema::<AddNote>(), schema::<SendReply>()),
        "typing.set" => (schema::<SetTyping>(), schema::<Empty>()),
        // Lists and presence have shapes of their own.
        _ => (json!({"type": "object"}), json!({"type": "object"})),
    }
}

/// Whether a method names a conversation.
fn names_conversation(method: &str) -> bool {
    !matches!(method, "conversation.list" | "presence.set" | "presence.get")
}

fn with_conversation(method: &str, mut data: Value) -> Value {
    if names_conversation(method) {
        data["properties"]["conversation"] =
            json!({"type": "string", "description": "The conversation's id."});
        match data["required"].as_array_mut() {
            Some(required) => required.insert(0, json!("conversation")),
            None => data["required"] = json!(["conversation"]),
        }
    }
    data
}

/// The description as JSON.
pub fn description() -> String {
    let (mut operations, mut messages) = (Map::new(), Map::new());
    for method in METHODS {
        let (data, answer) = shapes(method);
        let (request, reply) = (format!("{method}.request"), format!("{method}.reply"));
        messages
            .insert(request.clone(), json!({"name": request, "payload": with_conversation(method, data)}));
        messages.insert(reply.clone(), json!({"name": reply, "payload": answer}));
        let at = |name: &str| json!({"$ref": format!("#/channels/rpc/messages/{name}")});
        let operation = json!({
            "action": "receive",
            "channel": {"$ref": "#/channels/rpc"},
            "messages": [at(&request)],
            "reply": {"channel": {"$ref": "#/channels/rpc"}, "messages": [at(&reply)]},
        });
        operations.insert(method.to_owned(), operation);
    }
    let description = json!({
        "asyncapi": "3.0.0",
        "info": {"title": "Patchbay rpc", "version": env!("CARGO_PKG_VERSION"), "description": "The data of rpc methods inside the Centrifuge client protocol."},
        "channels": {"rpc": {"address": "/connection/websocket", "messages": messages}},
        "operations": operations,
    });
    serde_json::to_string_pretty(&description).unwrap_or_default() + "\n"
}
