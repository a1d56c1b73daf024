//! What a visitor of a web chat may ask: to write, to be shown writing, to say what was read. Its own conversation only.

use std::sync::Arc;

use bytes::Bytes;
use patchbay_actors::router::Answer;
use patchbay_protocol::command::{
    Empty, ReadConversation, Reply, Request, SendMessage, SetTyping, check_client_id,
};
use patchbay_protocol::ids::{ConversationId, EntryId};
use patchbay_protocol::inbound::{InboundMessage, ThreadEvent};
use patchbay_protocol::principal::ContactPrincipal;
use patchbay_protocol::summary::Contact;
use patchbay_protocol::{CommandError, ErrorCode};
use serde_json::{Map, Value, json};

use super::super::Sockets;
use super::rpc::{TYPING_FOR, parse};

/// What a visitor's command comes to.
pub(super) enum Pending {
    /// It is done.
    Done(Value),
    /// It is handed over.
    Handed(Answer<Reply>),
}

/// The first half of a visitor's command.
pub(super) async fn first_half(
    sockets: &Arc<Sockets>,
    contact: &ContactPrincipal,
    method: &str,
    mut data: Map<String, Value>,
) -> Result<Pending, CommandError> {
    let own = contact.conversation();
    let named = data.remove("conversation");
    let is_own = match &named {
        // There is only one that it can mean.
        None => true,
        Some(Value::String(id)) => id.parse::<ConversationId>() == Ok(own),
        Some(_) => return Err(CommandError::invalid("conversation is not a string")),
    };
    if !is_own {
        return Err(ErrorCode::NotFound.into());
    }
    match method {
        "message.send" => {
            let request = received(sockets, contact, parse(data)?)?;
            sockets.desk.submit_contact(contact, request).await.map(Pending::Handed)
        }
        "conversation.read" => {
            let read: ReadConversation = parse(data)?;
            sockets.desk.submit_contact(contact, Request::ContactRead(read)).await.map(Pending::Handed)
        }
        "typing.set" => {
            let set: SetTyping = parse(data)?;
            let expires_at = sockets.desk.node().shards().clock.now().plus(TYPING_FOR);
            let actor = json!({"type": "contact", "id": contact.visitor});
            let push = json!({"type": "typing", "actor": actor, "on": set.on, "expires_at": expires_at});
            sockets.hub.typing(own, &contact.visitor, Bytes::from(push.to_string()));
            Ok(Pending::Done(serde_json::to_value(Empty {}).unwrap_or_default()))
        }
        _ => Err(ErrorCode::PermissionDenied.into()),
    }
}

/// What a visitor writes is a message of the customer, whose id is the visitor's own.
fn received(
    sockets: &Sockets,
    contact: &ContactPrincipal,
    message: SendMessage,
) -> Result<Request, CommandError> {
    check_client_id(&message.client_id)?;
    if message.if_seq.is_some() {
        return Err(CommandError::invalid("if_seq: a visitor writes whatever was written meanwhile"));
    }
    patchbay_connectors::webchat::check_inbound(&message.content)?;
    patchbay_actors::desk::check_size(&message.content)?;
    let conversation = contact.conversation();
    let event = InboundMessage {
        provider_id: message.client_id,
        content: message.content,
        sent_at: sockets.desk.node().shards().clock.now(),
        reply_to: message.reply_to.map(|seq| EntryId { conversation, seq }.to_string()),
        referral: None,
        forwarded: false,
        participant: None,
        errors: Vec::new(),
    };
    let shown = Contact {
        address: contact.visitor.clone(),
        name: contact.name.clone().unwrap_or_default(),
        ..Contact::default()
    };
    let opening = patchbay_protocol::command::Opening { thread: contact.visitor.clone(), contact: shown };
    Ok(Request::Receive { opening, event: ThreadEvent::Message(Box::new(event)) })
}
