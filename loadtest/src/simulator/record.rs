//! The simulator's own record, for tests to compare with the log and with what sockets saw.

use serde::{Deserialize, Serialize};

/// A call to send a message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SendCall {
    /// Which number it was sent from.
    pub phone_number_id: String,
    /// `to` or `recipient`.
    pub to: String,
    /// The message's type.
    pub kind: String,
    /// The text, where it is one.
    pub text: String,
    /// The file's id, where it carries one.
    #[serde(default)]
    pub media: String,
    /// `biz_opaque_callback_data`.
    pub callback: String,
    /// Whether the message was taken (and reaches the customer), whatever was answered.
    pub taken: bool,
    /// What was answered: `ok`, `lost`, or the error.
    pub answer: String,
    /// The message's id, when it was taken.
    pub wamid: String,
    /// Milliseconds since the epoch.
    pub at_ms: u64,
}

/// A message of a customer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inbound {
    /// The message's id.
    pub id: String,
    /// Who wrote it.
    pub from: String,
    /// What.
    pub text: String,
    /// Whether a webhook that carried it was answered 200.
    pub acked: bool,
}

/// A file that was put here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Upload {
    /// For which number.
    pub phone_number_id: String,
    /// The id that was given.
    pub id: String,
    /// The type that was claimed.
    pub mime: String,
    /// Its name.
    pub name: String,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// What the simulator received and did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// Calls to send, in order.
    pub calls: Vec<SendCall>,
    /// Messages of customers, in order.
    pub inbound: Vec<Inbound>,
    /// Receipts whose webhook was answered 200: (wamid, status).
    pub receipts: Vec<(String, String)>,
    /// Marked as read: ids of customers' messages.
    pub read: Vec<String>,
    /// Shown typing: ids of customers' messages.
    pub typing: Vec<String>,
    /// Files that were put here.
    #[serde(default)]
    pub uploads: Vec<Upload>,
    /// Calls under way.
    pub calls_open: u64,
    /// Webhooks under way.
    pub webhooks_open: u64,
}
