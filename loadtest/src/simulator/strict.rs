//! What Graph documents of a message, and nothing else: a field that it does not know, or lacks, is refused.

use serde_json::Value;

const ENVELOPE: [&str; 7] =
    ["messaging_product", "recipient_type", "to", "recipient", "type", "context", "biz_opaque_callback_data"];

/// An object's fields: (name, whether it must be there).
type Shape = &'static [(&'static str, bool)];

fn shape(kind: &str) -> Option<Shape> {
    Some(match kind {
        "text" => &[("body", true), ("preview_url", false)],
        "image" | "video" => &[("id", false), ("link", false), ("caption", false)],
        "audio" | "sticker" => &[("id", false), ("link", false)],
        "document" => &[("id", false), ("link", false), ("caption", false), ("filename", false)],
        "location" => &[("latitude", true), ("longitude", true), ("name", false), ("address", false)],
        "reaction" => &[("message_id", true), ("emoji", true)],
        "template" => &[("name", true), ("language", true), ("components", false)],
        "interactive" => {
            &[("type", true), ("header", false), ("body", true), ("footer", false), ("action", true)]
        }
        _ => return None,
    })
}

fn fits(at: &str, value: &Value, shape: Shape) -> Result<(), String> {
    let object = value.as_object().ok_or_else(|| format!("{at} must be an object"))?;
    if let Some(unknown) = object.keys().find(|k| !shape.iter().any(|(name, _)| name == k)) {
        return Err(format!("{at}.{unknown} is not a parameter"));
    }
    match shape.iter().find(|(name, needed)| *needed && object.get(*name).is_none_or(Value::is_null)) {
        Some((name, _)) => Err(format!("{at}.{name} is required")),
        None => Ok(()),
    }
}

/// The longest caption, in characters.
const CAPTION_MAX: usize = 1024;

fn media(kind: &str, value: &Value) -> Result<(), String> {
    let caption = &value["caption"];
    if !caption.is_null() && caption.as_str().is_none_or(|c| c.chars().count() > CAPTION_MAX) {
        return Err(format!("{kind}.caption must be a string of at most {CAPTION_MAX} characters"));
    }
    match (value["id"].as_str(), value["link"].as_str()) {
        (Some(id), None) if !id.is_empty() => Ok(()),
        (None, Some(link)) if link.starts_with("https://") => Ok(()),
        _ => Err(format!("{kind} must have either an id or a link")),
    }
}

fn interactive(value: &Value) -> Result<(), String> {
    fits("interactive.body", &value["body"], &[("text", true)])?;
    let action = &value["action"];
    match value["type"].as_str() {
        Some("button") => {
            let buttons = action["buttons"].as_array().ok_or("interactive.action.buttons is required")?;
            let good = buttons.iter().all(|b| {
                b["type"] == "reply"
                    && b["reply"]["id"].is_string()
                    && b["reply"]["title"].as_str().is_some_and(|t| (1..=20).contains(&t.chars().count()))
            });
            if (1..=3).contains(&buttons.len()) && good {
                Ok(())
            } else {
                Err("interactive.action.buttons".into())
            }
        }
        Some("list") => {
            let sections = action["sections"].as_array().ok_or("interactive.action.sections is required")?;
            let rows: usize = sections.iter().map(|s| s["rows"].as_array().map_or(0, Vec::len)).sum();
            let named = action["button"].as_str().is_some_and(|b| !b.is_empty());
            if (1..=10).contains(&rows) && named { Ok(()) } else { Err("interactive.action".into()) }
        }
        Some("cta_url") => fits(
            "interactive.action.parameters",
            &action["parameters"],
            &[("display_text", true), ("url", true)],
        ),
        Some("location_request_message") if action["name"] == "send_location" => Ok(()),
        Some("flow") if action["name"] == "flow" && action["parameters"].is_object() => Ok(()),
        _ => Err("interactive.type or its action".into()),
    }
}

/// What Graph would say against this message.
pub(crate) fn fault(frame: &Value) -> Option<String> {
    check(frame).err()
}

fn check(frame: &Value) -> Result<(), String> {
    let object = frame.as_object().ok_or("the body must be an object")?;
    let kind = frame["type"].as_str().ok_or("type is required")?;
    if let Some(unknown) = object.keys().find(|k| !ENVELOPE.contains(&k.as_str()) && k.as_str() != kind) {
        return Err(format!("{unknown} is not a parameter"));
    }
    if !matches!(frame["recipient_type"].as_str(), None | Some("individual" | "group")) {
        return Err("recipient_type".into());
    }
    let number = |to: &str| {
        let digits = to.strip_prefix('+').unwrap_or(to);
        // A business-scoped id is taken here as well, and goes nowhere.
        let scoped = to.contains('.') && to.len() <= 128;
        scoped || (1..=20).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
    };
    match (frame["recipient_type"].as_str(), &frame["to"], &frame["recipient"]) {
        (Some("group"), Value::String(to), Value::Null) if !to.is_empty() => {}
        (_, Value::String(to), Value::Null) if number(to) => {}
        (_, Value::Null, Value::String(user)) if !user.is_empty() => {}
        (_, Value::String(to), Value::String(user)) if number(to) && !user.is_empty() => {}
        _ => return Err("to".into()),
    }
    let callback = &frame["biz_opaque_callback_data"];
    if !callback.is_null() && callback.as_str().is_none_or(|c| c.len() > 512) {
        return Err("biz_opaque_callback_data".into());
    }
    if !frame["context"].is_null() {
        fits("context", &frame["context"], &[("message_id", true)])?;
    }
    let value = &frame[kind];
    match (kind, shape(kind)) {
        ("contacts", _) => {
            let named = |c: &Value| c["name"]["formatted_name"].is_string();
            if value.as_array().is_some_and(|c| !c.is_empty() && c.iter().all(named)) {
                Ok(())
            } else {
                Err("contacts".into())
            }
        }
        (_, None) => Err(format!("{kind} is not a type")),
        (_, Some(shape)) => {
            fits(kind, value, shape)?;
            match kind {
                "image" | "video" | "audio" | "sticker" | "document" => media(kind, value),
                "text" if value["body"].as_str().is_none_or(|b| b.is_empty() || b.chars().count() > 4096) => {
                    Err("text.body must have 1 to 4096 characters".into())
                }
                "template" => {
                    fits("template.language", &value["language"], &[("code", true), ("policy", false)])
                }
                "interactive" => interactive(value),
                _ => Ok(()),
            }
        }
    }
}
