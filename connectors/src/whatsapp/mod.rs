//! WhatsApp Cloud API. Wire facts: the provider's public documentation, as collected in the project's design notes;
//! the fixtures in the tests were written from those shapes.

mod classify;
mod media;
mod parse;
mod render;
mod verify;

use std::time::Duration;

use patchbay_protocol::command::Channel;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::inbound::Item;
use patchbay_protocol::outbound::{Call, CallResult, Outbound, Signal, Verdict};
use patchbay_protocol::{CommandError, Content};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Connector, Headers, MediaLocation, NotUnderstood, Refused, SendLimits, UploadForm};

/// An account's secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Signs webhooks.
    pub app_secret: String,
    /// Signed them until lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_secret_previous: Option<String>,
    /// Answers the handshake.
    pub verify_token: String,
    /// Authorises calls.
    pub access_token: String,
}

impl Credentials {
    fn read(value: &Value) -> Result<Self, CommandError> {
        let c: Self =
            Self::deserialize(value).map_err(|e| CommandError::invalid(format!("credentials: {e}")))?;
        for (name, secret) in [
            ("app_secret", &c.app_secret),
            ("verify_token", &c.verify_token),
            ("access_token", &c.access_token),
        ] {
            if secret.is_empty() {
                return Err(CommandError::invalid(format!("credentials.{name} is empty")));
            }
        }
        if c.app_secret_previous.as_deref() == Some("") {
            return Err(CommandError::invalid("credentials.app_secret_previous is empty"));
        }
        Ok(c)
    }
}

/// The connector.
pub struct WhatsApp;

impl Connector for WhatsApp {
    fn name(&self) -> &'static str {
        "whatsapp"
    }

    fn channel(&self) -> Channel {
        Channel {
            window: Some(Duration::from_secs(24 * 3600)),
            can_edit: false,
            can_delete: false,
            can_react: true,
            direct: false,
        }
    }

    fn limits(&self) -> SendLimits {
        // 80 messages a second a number; to one recipient 1 in 6 s, of which 45 may be drawn in advance.
        SendLimits { account_per_second: 80.0, pair_burst: 45.0, pair_per_second: 1.0 / 6.0 }
    }

    fn check_credentials(&self, credentials: &Value) -> Result<(), CommandError> {
        Credentials::read(credentials).map(|_| ())
    }

    fn challenge(&self, credentials: &Value, query: &[(String, String)]) -> Result<String, Refused> {
        verify::challenge(&Credentials::read(credentials).map_err(|_| Refused)?, query)
    }

    fn verify(&self, credentials: &Value, headers: Headers<'_>, body: &[u8]) -> bool {
        // Without readable credentials the same work is done with a key that nobody has.
        let credentials = Credentials::read(credentials).ok();
        verify::signature(credentials.as_ref(), headers, body)
    }

    fn parse(&self, body: &[u8]) -> Result<Vec<Item>, NotUnderstood> {
        parse::items(body)
    }

    fn replay(&self, external_id: &str, raw: &Value) -> Vec<Item> {
        parse::replay(external_id, raw)
    }

    fn check(&self, content: &Content) -> Result<(), CommandError> {
        render::check(content)
    }

    fn recipient(&self, to: &str) -> Result<String, CommandError> {
        let digits = to.strip_prefix('+').unwrap_or(to);
        let valid = (5..=20).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        if valid {
            Ok(digits.to_owned())
        } else {
            Err(CommandError::invalid("to must be a phone number: digits only, with the country code"))
        }
    }

    fn render(&self, external_id: &str, message: &Outbound) -> Result<Call, ProviderError> {
        render::message(external_id, message)
    }

    fn signal(&self, external_id: &str, signal: &Signal) -> Option<Call> {
        Some(render::signal(external_id, signal))
    }

    fn media_path(&self, id: &str) -> Option<String> {
        media::path(id)
    }

    fn media_location(&self, answer: &[u8]) -> Option<MediaLocation> {
        media::location(answer)
    }

    fn upload_form(&self, external_id: &str, mime: &str) -> Option<UploadForm> {
        Some(media::upload(external_id, mime))
    }

    fn uploaded(&self, answer: &[u8]) -> Option<(String, Duration)> {
        media::uploaded(answer)
    }

    fn classify(&self, result: &CallResult) -> Verdict {
        classify::verdict(result)
    }
}
