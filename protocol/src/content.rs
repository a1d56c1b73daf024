//! What a message says, in one shape for every channel (contract §4).

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A file that a message carries, by our media id or the provider's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Media {
    /// Our id of an uploaded file, or the provider's id of an inbound one.
    pub id: String,
    /// The media type, such as `image/jpeg`.
    pub mime: String,
    /// The file's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// SHA-256 of the bytes as the provider states it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// A media file with an optional caption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MediaContent {
    /// The file.
    pub media: Media,
    /// Text below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
}

impl Content {
    /// The file that it carries, if it is one.
    pub fn media(&self) -> Option<&Media> {
        match self {
            Self::Image(m)
            | Self::Video(m)
            | Self::Audio(m)
            | Self::Voice(m)
            | Self::Document(m)
            | Self::Sticker(m) => Some(&m.media),
            Self::Text { .. }
            | Self::Location { .. }
            | Self::Contacts { .. }
            | Self::Template { .. }
            | Self::Interactive(_)
            | Self::Button { .. }
            | Self::Order { .. }
            | Self::Unsupported { .. } => None,
        }
    }

    /// The same with another file.
    #[must_use]
    pub fn with_media(mut self, media: Media) -> Self {
        if let Self::Image(m)
        | Self::Video(m)
        | Self::Audio(m)
        | Self::Voice(m)
        | Self::Document(m)
        | Self::Sticker(m) = &mut self
        {
            m.media = media;
        }
        self
    }
}

/// One reply button.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Comes back as `button.id` when chosen.
    pub id: String,
    /// What the customer reads.
    pub title: String,
    /// A second line (list rows only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// A titled part of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// The part's title.
    pub title: String,
    /// Its rows.
    pub rows: Vec<Choice>,
}

/// A message that asks for a choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Interactive {
    /// Up to three reply buttons.
    Buttons {
        /// Text of the message.
        body: String,
        /// Text above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        header: Option<String>,
        /// Small text below.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        footer: Option<String>,
        /// The buttons.
        buttons: Vec<Choice>,
    },
    /// A menu of up to ten rows.
    List {
        /// Text of the message.
        body: String,
        /// Text above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        header: Option<String>,
        /// Small text below.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        footer: Option<String>,
        /// Label of the button that opens the menu.
        button: String,
        /// The menu.
        sections: Vec<Section>,
    },
    /// A form of the channel: outbound it opens one, inbound it brings what was filled in.
    Flow {
        /// Text of the message.
        body: String,
        /// The provider's parameters (outbound) or the answers (inbound).
        parameters: Value,
        /// The form's name, inbound.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Asks where the customer is.
    LocationRequest {
        /// Text of the message.
        body: String,
    },
    /// A button that opens a page.
    CtaUrl {
        /// Text of the message.
        body: String,
        /// The button's label.
        display_text: String,
        /// The page.
        url: String,
    },
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Content {
    /// Plain text.
    Text {
        /// The text.
        text: String,
    },
    /// A picture.
    Image(MediaContent),
    /// A film.
    Video(MediaContent),
    /// A sound file.
    Audio(MediaContent),
    /// A recorded voice message.
    Voice(MediaContent),
    /// A file.
    Document(MediaContent),
    /// A sticker.
    Sticker(MediaContent),
    /// A place.
    Location {
        /// Degrees north.
        latitude: f64,
        /// Degrees east.
        longitude: f64,
        /// The place's name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Its address.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<String>,
    },
    /// Contact cards, in WhatsApp's shape.
    Contacts {
        /// The cards.
        contacts: Value,
    },
    /// A message template that the provider has approved; the only content outside the channel's window.
    Template {
        /// The template's name.
        name: String,
        /// Its language, such as `en_US`.
        language: String,
        /// Its parameters, in WhatsApp's shape.
        #[serde(default, skip_serializing_if = "Value::is_null")]
        components: Value,
    },
    /// A message that asks for a choice.
    Interactive(Interactive),
    /// The customer's choice: a button's, a list row's or a template's.
    Button {
        /// The chosen id.
        id: String,
        /// What the customer read.
        title: String,
        /// The row's second line.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        description: Option<String>,
    },
    /// A shopping cart, in WhatsApp's shape.
    Order {
        /// The cart.
        order: Value,
    },
    /// Something the channel or this connector cannot show; the raw item is in the dead letters.
    Unsupported {
        /// Why.
        reason: String,
    },
}

impl Content {
    /// The tag, as in JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text { .. } => "text",
            Self::Image(_) => "image",
            Self::Video(_) => "video",
            Self::Audio(_) => "audio",
            Self::Voice(_) => "voice",
            Self::Document(_) => "document",
            Self::Sticker(_) => "sticker",
            Self::Location { .. } => "location",
            Self::Contacts { .. } => "contacts",
            Self::Template { .. } => "template",
            Self::Interactive(_) => "interactive",
            Self::Button { .. } => "button",
            Self::Order { .. } => "order",
            Self::Unsupported { .. } => "unsupported",
        }
    }

    /// One line for lists: at most 100 characters of the text, or the kind in brackets.
    pub fn preview(&self) -> String {
        let text = match self {
            Self::Text { text } => text.as_str(),
            Self::Image(m)
            | Self::Video(m)
            | Self::Audio(m)
            | Self::Voice(m)
            | Self::Document(m)
            | Self::Sticker(m) => m.caption.as_deref().unwrap_or(""),
            Self::Button { title, .. } => title,
            Self::Interactive(
                Interactive::Buttons { body, .. }
                | Interactive::List { body, .. }
                | Interactive::Flow { body, .. }
                | Interactive::LocationRequest { body }
                | Interactive::CtaUrl { body, .. },
            ) => body,
            Self::Template { name, .. } => name,
            Self::Location { .. } | Self::Contacts { .. } | Self::Order { .. } | Self::Unsupported { .. } => {
                ""
            }
        };
        if text.is_empty() { format!("[{}]", self.kind()) } else { text.chars().take(100).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_tagged_by_type_and_strict() {
        let text: Content = serde_json::from_str(r#"{"type":"text","text":"hi"}"#).unwrap();
        assert_eq!(serde_json::to_string(&text).unwrap(), r#"{"type":"text","text":"hi"}"#);
        let e =
            serde_json::from_str::<Content>(r#"{"type":"text","text":"hi","x":1}"#).unwrap_err().to_string();
        assert!(e.contains("unknown field `x`"), "{e}");
        let e = serde_json::from_str::<Content>(
            r#"{"type":"image","media":{"id":"1","mime":"image/png"},"x":1}"#,
        );
        assert!(e.is_err());
        let list = r#"{"type":"interactive","kind":"location_request","body":"where?"}"#;
        let list: Content = serde_json::from_str(list).unwrap();
        assert_eq!(list.preview(), "where?");
    }
}
