//! Outbound messages as calls.

use bytes::Bytes;
use patchbay_protocol::content::{Choice, Interactive, MediaContent};
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::outbound::{Call, Outbound, Payload, Recipient, Signal};
use patchbay_protocol::{CommandError, Content, ErrorCode};
use serde_json::{Value, json};

/// Bounds of the channel, in characters or pieces.
const TEXT_MAX: usize = 4096;
const CAPTION_MAX: usize = 1024;
const BUTTONS_MAX: usize = 3;
const BUTTON_TITLE_MAX: usize = 20;
const ROWS_MAX: usize = 10;
const ROW_TITLE_MAX: usize = 24;
const ROW_DESCRIPTION_MAX: usize = 72;

/// Refuses what the channel cannot carry, before anything is stored.
pub(super) fn check(content: &Content) -> Result<(), CommandError> {
    match content {
        Content::Text { text } => length("content.text", text, 1, TEXT_MAX),
        Content::Image(m) | Content::Video(m) | Content::Document(m) => {
            caption(m, true).and_then(|()| length("content.media.id", &m.media.id, 1, 512))
        }
        Content::Audio(m) | Content::Voice(m) | Content::Sticker(m) => {
            caption(m, false).and_then(|()| length("content.media.id", &m.media.id, 1, 512))
        }
        Content::Location { latitude, longitude, .. } => {
            let inside = (-90.0..=90.0).contains(latitude) && (-180.0..=180.0).contains(longitude);
            if inside {
                Ok(())
            } else {
                Err(CommandError::invalid("content.latitude or content.longitude is out of range"))
            }
        }
        Content::Contacts { contacts } => match contacts.as_array() {
            Some(cards) if !cards.is_empty() => Ok(()),
            _ => Err(CommandError::invalid("content.contacts must be a list of at least one card")),
        },
        Content::Template { name, language, components } => {
            length("content.name", name, 1, 512)?;
            length("content.language", language, 1, 16)?;
            if components.is_null() || components.is_array() {
                Ok(())
            } else {
                Err(CommandError::invalid("content.components must be a list"))
            }
        }
        Content::Interactive(i) => interactive_fits(i),
        Content::Button { .. } | Content::Order { .. } | Content::Unsupported { .. } => {
            Err(CommandError::with(
                ErrorCode::NotSupported,
                json!({"detail": format!("{} cannot be sent on whatsapp", content.kind())}),
            ))
        }
    }
}

fn length(field: &str, text: &str, min: usize, max: usize) -> Result<(), CommandError> {
    let n = text.chars().count();
    if (min..=max).contains(&n) {
        Ok(())
    } else {
        Err(CommandError::invalid(format!("{field} must have {min} to {max} characters")))
    }
}

fn caption(m: &MediaContent, allowed: bool) -> Result<(), CommandError> {
    match &m.caption {
        None => Ok(()),
        Some(_) if !allowed => Err(CommandError::with(
            ErrorCode::NotSupported,
            json!({"detail": "this kind of media takes no caption on whatsapp"}),
        )),
        Some(caption) => length("content.caption", caption, 0, CAPTION_MAX),
    }
}

fn interactive_fits(i: &Interactive) -> Result<(), CommandError> {
    match i {
        Interactive::Buttons { body, buttons, .. } => {
            length("content.body", body, 1, CAPTION_MAX)?;
            if buttons.is_empty() || buttons.len() > BUTTONS_MAX {
                return Err(CommandError::invalid(format!(
                    "content.buttons must have 1 to {BUTTONS_MAX} buttons"
                )));
            }
            buttons.iter().try_for_each(|b| {
                length("content.buttons.title", &b.title, 1, BUTTON_TITLE_MAX)
                    .and_then(|()| length("content.buttons.id", &b.id, 1, 256))
            })
        }
        Interactive::List { body, button, sections, .. } => {
            length("content.body", body, 1, TEXT_MAX)?;
            length("content.button", button, 1, BUTTON_TITLE_MAX)?;
            let rows: Vec<&Choice> = sections.iter().flat_map(|s| &s.rows).collect();
            if rows.is_empty() || rows.len() > ROWS_MAX {
                return Err(CommandError::invalid(format!(
                    "content.sections must have 1 to {ROWS_MAX} rows in all"
                )));
            }
            rows.iter().try_for_each(|r| {
                length("content.sections.rows.title", &r.title, 1, ROW_TITLE_MAX)?;
                length("content.sections.rows.id", &r.id, 1, 200)?;
                length(
                    "content.sections.rows.description",
                    r.description.as_deref().unwrap_or(""),
                    0,
                    ROW_DESCRIPTION_MAX,
                )
            })
        }
        Interactive::Flow { body, parameters, .. } => {
            length("content.body", body, 1, CAPTION_MAX)?;
            if parameters.is_object() {
                Ok(())
            } else {
                Err(CommandError::invalid("content.parameters must be an object"))
            }
        }
        Interactive::LocationRequest { body } => length("content.body", body, 1, CAPTION_MAX),
        Interactive::CtaUrl { body, display_text, url } => {
            length("content.body", body, 1, CAPTION_MAX)?;
            length("content.display_text", display_text, 1, BUTTON_TITLE_MAX)?;
            if url.starts_with("https://") || url.starts_with("http://") {
                Ok(())
            } else {
                Err(CommandError::invalid("content.url must be an http or https address"))
            }
        }
    }
}

/// The call that sends `message`. A business-scoped id goes into `recipient`, never into `to`, where the provider
/// answers 200 and drops it.
pub(super) fn message(external_id: &str, message: &Outbound) -> Result<Call, ProviderError> {
    let (kind, value) = match &message.payload {
        Payload::Reaction { reaction_to, emoji } => {
            ("reaction", json!({"message_id": reaction_to, "emoji": emoji}))
        }
        Payload::Message(content) => body(content).ok_or_else(|| ProviderError {
            code: "not_supported".into(),
            title: content.kind().into(),
            retryable: false,
        })?,
    };
    let mut frame = envelope(kind, value, &message.recipient);
    frame["biz_opaque_callback_data"] = json!(message.entry.to_string());
    if let Some(id) = &message.reply_to {
        frame["context"] = json!({"message_id": id});
    }
    Ok(call(external_id, &frame))
}

fn envelope(kind: &str, value: Value, recipient: &Recipient) -> Value {
    // Numbers are digits; anything else that stands in the address is a group's id.
    let group = recipient.address.bytes().any(|b| !b.is_ascii_digit());
    let to_whom = if group { "group" } else { "individual" };
    let mut frame = json!({"messaging_product": "whatsapp", "recipient_type": to_whom, "type": kind});
    frame[kind] = value;
    if !recipient.address.is_empty() {
        frame["to"] = json!(recipient.address);
    } else if let Some(user_id) = &recipient.user_id {
        frame["recipient"] = json!(user_id);
    }
    frame
}

fn call(external_id: &str, frame: &Value) -> Call {
    Call { path: format!("{external_id}/messages"), body: Bytes::from(frame.to_string()) }
}

fn body(content: &Content) -> Option<(&'static str, Value)> {
    Some(match content {
        Content::Text { text } => ("text", json!({"body": text, "preview_url": false})),
        Content::Image(m) => ("image", media(m)),
        Content::Video(m) => ("video", media(m)),
        Content::Audio(m) | Content::Voice(m) => ("audio", media(m)),
        Content::Document(m) => ("document", document(m)),
        Content::Sticker(m) => ("sticker", media(m)),
        Content::Location { latitude, longitude, name, address } => (
            "location",
            compact(json!({"latitude": latitude, "longitude": longitude, "name": name, "address": address})),
        ),
        Content::Contacts { contacts } => ("contacts", contacts.clone()),
        Content::Template { name, language, components } => (
            "template",
            compact(json!({"name": name, "language": {"code": language}, "components": components})),
        ),
        Content::Interactive(i) => ("interactive", interactive(i)),
        Content::Button { .. } | Content::Order { .. } | Content::Unsupported { .. } => return None,
    })
}

/// Without the fields that are null.
fn compact(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.retain(|_, v| !v.is_null());
    }
    value
}

fn media(m: &MediaContent) -> Value {
    compact(json!({"id": m.media.id, "caption": m.caption}))
}

/// Only documents have a name there.
fn document(m: &MediaContent) -> Value {
    compact(json!({"id": m.media.id, "caption": m.caption, "filename": m.media.name}))
}

fn interactive(i: &Interactive) -> Value {
    let frame = |kind: &str, body: &str, header: Option<&String>, footer: Option<&String>, action: Value| {
        compact(json!({
            "type": kind,
            "header": header.map(|h| json!({"type": "text", "text": h})),
            "body": {"text": body},
            "footer": footer.map(|f| json!({"text": f})),
            "action": action,
        }))
    };
    match i {
        Interactive::Buttons { body, header, footer, buttons } => {
            let buttons: Vec<Value> = buttons
                .iter()
                .map(|b| json!({"type": "reply", "reply": {"id": b.id, "title": b.title}}))
                .collect();
            frame("button", body, header.as_ref(), footer.as_ref(), json!({"buttons": buttons}))
        }
        Interactive::List { body, header, footer, button, sections } => {
            let row =
                |r: &Choice| compact(json!({"id": r.id, "title": r.title, "description": r.description}));
            let sections: Vec<Value> = sections
                .iter()
                .map(|s| json!({"title": s.title, "rows": s.rows.iter().map(row).collect::<Vec<_>>()}))
                .collect();
            frame(
                "list",
                body,
                header.as_ref(),
                footer.as_ref(),
                json!({"button": button, "sections": sections}),
            )
        }
        Interactive::Flow { body, parameters, .. } => {
            frame("flow", body, None, None, json!({"name": "flow", "parameters": parameters}))
        }
        Interactive::LocationRequest { body } => {
            frame("location_request_message", body, None, None, json!({"name": "send_location"}))
        }
        Interactive::CtaUrl { body, display_text, url } => frame(
            "cta_url",
            body,
            None,
            None,
            json!({"name": "cta_url", "parameters": {"display_text": display_text, "url": url}}),
        ),
    }
}

/// Read and typing: the same path. Typing also marks read.
pub(super) fn signal(external_id: &str, signal: &Signal) -> Call {
    let frame = match signal {
        Signal::Read { provider_id } => {
            json!({"messaging_product": "whatsapp", "status": "read", "message_id": provider_id})
        }
        Signal::Typing { provider_id } => {
            json!({"messaging_product": "whatsapp", "status": "read", "message_id": provider_id, "typing_indicator": {"type": "text"}})
        }
    };
    call(external_id, &frame)
}
