//! Web chat: the visitor is on our own socket. Nothing is called and nothing is posted: what a visitor writes comes in
//! as a command, what the business writes is on the visitor's subscription.

use patchbay_protocol::command::Channel;
use patchbay_protocol::content::MediaContent;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::inbound::Item;
use patchbay_protocol::outbound::{Call, CallResult, Outbound, Signal, Verdict};
use patchbay_protocol::{CommandError, Content, ErrorCode};
use serde_json::{Value, json};

use crate::{Connector, Headers, NotUnderstood, Refused, SendLimits};

/// The longest text, in characters.
const TEXT_MAX: usize = 8192;
/// The longest visitor id.
const VISITOR_MAX: usize = 128;

/// The connector.
pub struct WebChat;

fn not_supported(content: &Content) -> CommandError {
    CommandError::with(
        ErrorCode::NotSupported,
        json!({"detail": format!("a web chat carries no {}", content.kind())}),
    )
}

fn text(field: &str, text: &str) -> Result<(), CommandError> {
    let n = text.chars().count();
    if (1..=TEXT_MAX).contains(&n) {
        Ok(())
    } else {
        Err(CommandError::invalid(format!("{field} must have 1 to {TEXT_MAX} characters")))
    }
}

fn media(m: &MediaContent) -> Result<(), CommandError> {
    m.caption.as_deref().filter(|c| !c.is_empty()).map_or(Ok(()), |c| text("content.caption", c))
}

/// What a visitor may write.
pub fn check_inbound(content: &Content) -> Result<(), CommandError> {
    match content {
        Content::Text { text: t } => text("content.text", t),
        Content::Image(m)
        | Content::Video(m)
        | Content::Audio(m)
        | Content::Voice(m)
        | Content::Document(m) => media(m),
        Content::Location { .. } | Content::Button { .. } => Ok(()),
        Content::Sticker(_)
        | Content::Contacts { .. }
        | Content::Template { .. }
        | Content::Interactive(_)
        | Content::Order { .. }
        | Content::Unsupported { .. } => Err(not_supported(content)),
    }
}

impl Connector for WebChat {
    fn name(&self) -> &'static str {
        "webchat"
    }

    fn channel(&self) -> Channel {
        Channel { window: None, can_edit: true, can_delete: true, can_react: true, direct: true }
    }

    fn limits(&self) -> SendLimits {
        // Nobody is called.
        SendLimits { account_per_second: 1000.0, pair_burst: 1000.0, pair_per_second: 1000.0 }
    }

    fn check_credentials(&self, credentials: &Value) -> Result<(), CommandError> {
        match credentials.as_object() {
            Some(none) if none.is_empty() => Ok(()),
            _ => Err(CommandError::invalid("credentials: a web chat has none, {} is expected")),
        }
    }

    fn challenge(&self, _: &Value, _: &[(String, String)]) -> Result<String, Refused> {
        Err(Refused)
    }

    fn verify(&self, _: &Value, _: Headers<'_>, _: &[u8]) -> bool {
        false
    }

    fn parse(&self, _: &[u8]) -> Result<Vec<Item>, NotUnderstood> {
        Err(NotUnderstood)
    }

    fn replay(&self, _: &str, _: &Value) -> Vec<Item> {
        Vec::new()
    }

    fn check(&self, content: &Content) -> Result<(), CommandError> {
        match content {
            Content::Text { text: t } => text("content.text", t),
            Content::Image(m)
            | Content::Video(m)
            | Content::Audio(m)
            | Content::Voice(m)
            | Content::Document(m)
            | Content::Sticker(m) => media(m),
            Content::Location { .. } | Content::Contacts { .. } | Content::Interactive(_) => Ok(()),
            Content::Template { .. }
            | Content::Button { .. }
            | Content::Order { .. }
            | Content::Unsupported { .. } => Err(not_supported(content)),
        }
    }

    fn recipient(&self, to: &str) -> Result<String, CommandError> {
        let fits = (1..=VISITOR_MAX).contains(&to.len())
            && to.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:@-".contains(&b));
        if fits {
            Ok(to.to_owned())
        } else {
            let rule =
                format!("a visitor's id has 1 to {VISITOR_MAX} letters, digits, `.`, `_`, `:`, `@` or `-`");
            Err(CommandError::invalid(rule))
        }
    }

    fn render(&self, _: &str, _: &Outbound) -> Result<Call, ProviderError> {
        Err(ProviderError {
            code: "not_supported".into(),
            title: "nobody is called".into(),
            retryable: false,
        })
    }

    fn signal(&self, _: &str, _: &Signal) -> Option<Call> {
        None
    }

    fn classify(&self, _: &CallResult) -> Verdict {
        Verdict::Unknown
    }
}
