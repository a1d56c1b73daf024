//! One folder a channel or event source: verify, parse, render, classify.
//!
//! **Lives here:** the [`Connector`] trait and its implementations. Pure: bytes in, values out.
//!
//! **Does not live here:** I/O, clocks, retries, routing. Who calls a provider, when and how often, is the Account's
//! business (`actors/`); where a call goes and with which key, the gateway's guarded client's.
//!
//! Invariant: verification works on the raw bytes and in constant time.
//! Invariant: one bad item never costs its neighbours: it becomes [`ItemKind::Broken`], the rest stands.
//! Invariant: a shape that is not known becomes `unsupported`, never an error to the provider.
//!
//! [`ItemKind::Broken`]: patchbay_protocol::inbound::ItemKind::Broken

use std::time::Duration;

use patchbay_protocol::command::Channel;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::inbound::Item;
use patchbay_protocol::outbound::{Call, CallResult, Outbound, Signal, Verdict};
use patchbay_protocol::{CommandError, Content};
use serde_json::Value;

pub mod webchat;
pub mod whatsapp;

/// A webhook that is not the provider's, or not for this account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused")]
pub struct Refused;

/// A signed body that is not of the provider's outermost shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a body of this provider")]
pub struct NotUnderstood;

/// How fast a provider takes messages of one account.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SendLimits {
    /// Messages a second of the account.
    pub account_per_second: f64,
    /// Messages to one recipient that may go at once.
    pub pair_burst: f64,
    /// Messages a second to one recipient in the long run.
    pub pair_per_second: f64,
}

/// A request's header by its lower-case name.
pub type Headers<'a> = &'a dyn Fn(&str) -> Option<Vec<u8>>;

/// Where a provider's file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaLocation {
    /// Good for minutes.
    pub url: String,
    /// Its type, by the provider's word.
    pub mime: Option<String>,
    /// SHA-256, hexadecimal or base64.
    pub sha256: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
}

/// A multipart form that puts a file at a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadForm {
    /// The path below the API's version.
    pub path: String,
    /// Fields beside the file.
    pub fields: Vec<(&'static str, String)>,
    /// The file's field.
    pub file_field: &'static str,
}

/// A channel or event source.
pub trait Connector: Send + Sync + 'static {
    /// The name, as in an account's `connector`.
    fn name(&self) -> &'static str;

    /// What the channel can do.
    fn channel(&self) -> Channel;

    /// How fast it takes messages.
    fn limits(&self) -> SendLimits;

    /// Checks an account's credentials when it is written; the message names the field.
    fn check_credentials(&self, credentials: &Value) -> Result<(), CommandError>;

    /// Answers the provider's handshake from the query's parameters.
    fn challenge(&self, credentials: &Value, query: &[(String, String)]) -> Result<String, Refused>;

    /// Whether the provider signed these very bytes.
    fn verify(&self, credentials: &Value, headers: Headers<'_>, body: &[u8]) -> bool;

    /// Every item of a body, in order.
    fn parse(&self, body: &[u8]) -> Result<Vec<Item>, NotUnderstood>;

    /// The items of one item that was kept as it came (or of a whole body, as text), to be taken again.
    fn replay(&self, external_id: &str, raw: &Value) -> Vec<Item>;

    /// Refuses content that the channel cannot carry, before anything is stored.
    fn check(&self, content: &Content) -> Result<(), CommandError>;

    /// The address of a recipient as the channel writes it, or why `to` is none. Where the channel is
    /// [`Channel::direct`] it is the thread key as well, and there are no aliases.
    fn recipient(&self, to: &str) -> Result<String, CommandError>;

    /// The call that sends a message.
    fn render(&self, external_id: &str, message: &Outbound) -> Result<Call, ProviderError>;

    /// The call that tells the customer something that is no message; `None` where the channel cannot.
    fn signal(&self, external_id: &str, signal: &Signal) -> Option<Call>;

    /// Where the provider tells about one of its files (below the API's version); `None`: it has none.
    fn media_path(&self, _id: &str) -> Option<String> {
        None
    }

    /// Where the file itself is, by the provider's word.
    fn media_location(&self, _answer: &[u8]) -> Option<MediaLocation> {
        None
    }

    /// Where a file is put, and the fields that go with it; `None`: the channel takes none.
    fn upload_form(&self, _external_id: &str, _mime: &str) -> Option<UploadForm> {
        None
    }

    /// The provider's id of a file that was put there, and for how long it is good.
    fn uploaded(&self, _answer: &[u8]) -> Option<(String, Duration)> {
        None
    }

    /// What came of a call (G7).
    fn classify(&self, result: &CallResult) -> Verdict;
}

/// The connector of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Connector> {
    match name {
        "whatsapp" => Some(&whatsapp::WhatsApp),
        "webchat" => Some(&webchat::WebChat),
        _ => None,
    }
}

/// The names that [`by_name`] knows.
pub const NAMES: [&str; 2] = ["whatsapp", "webchat"];
