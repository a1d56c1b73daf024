//! Events: entries as they are published (contract §7), in CloudEvents 1.0 binary mode. The attributes are headers; the
//! value is the entry with `conversation`, `account` and `inbox` added.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;

use crate::entry::Entry;
use crate::ids::{AccountId, ConversationId, InboxId, TenantId};

/// What every event type begins with, before the entry's own type.
pub const TYPE_PREFIX: &str = "patchbay.";
/// The version of CloudEvents.
pub const SPEC_VERSION: &str = "1.0";
/// What the value is.
pub const CONTENT_TYPE: &str = "application/json";

/// Where an event comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// The tenant.
    pub tenant: TenantId,
    /// The channel account.
    pub account: AccountId,
    /// The conversation.
    pub conversation: ConversationId,
}

/// An entry on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it comes from.
    pub origin: Arc<Origin>,
    /// The account's inbox when it was published.
    pub inbox: InboxId,
    /// Its place in the conversation.
    pub seq: u64,
    /// The entry, as JSON.
    pub entry: Bytes,
}

/// The JSON Schema (2020-12) of every event's value, told apart by `type`.
pub fn schema() -> serde_json::Value {
    let settings = schemars::generate::SchemaSettings::draft2020_12().for_serialize();
    let mut schema = settings.into_generator().into_root_schema_for::<Entry>().to_value();
    schema["title"] = "Patchbay event".into();
    for (name, kind) in [("conversation", "ConversationId"), ("account", "AccountId"), ("inbox", "InboxId")] {
        schema["properties"][name] = serde_json::json!({"type": "string", "description": kind});
        if let Some(required) = schema["required"].as_array_mut() {
            required.push(name.into());
        }
    }
    schema
}

/// What an event's headers say of its entry.
#[derive(Deserialize)]
struct Head<'a> {
    at: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
}

/// An event as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// `tenant/conversation`: what its order is kept by.
    pub key: String,
    /// Names and values, in this order.
    pub headers: Vec<(&'static str, String)>,
    /// The entry with where it comes from.
    pub value: Bytes,
}

/// The headers of an event, in the order in which they are written.
pub const HEADERS: [&str; 9] = [
    "ce_specversion",
    "ce_id",
    "ce_type",
    "ce_source",
    "ce_time",
    "ce_sequence",
    "ce_tenant",
    "content-type",
    "ce_subject",
];

impl Event {
    /// The event as it travels; none: its entry is no entry of ours.
    pub fn envelope(&self) -> Option<Envelope> {
        let head: Head<'_> = serde_json::from_slice(&self.entry).ok()?;
        let Origin { tenant, account, conversation } = &*self.origin;
        let subject = conversation.to_string();
        let values = [
            SPEC_VERSION.to_owned(),
            format!("{subject}-{}", self.seq),
            [TYPE_PREFIX, head.kind].concat(),
            format!("/tenants/{tenant}/accounts/{account}"),
            head.at.to_owned(),
            self.seq.to_string(),
            tenant.to_string(),
            CONTENT_TYPE.to_owned(),
            subject.clone(),
        ];
        let headers = HEADERS.into_iter().zip(values).collect();
        let key = format!("{tenant}/{subject}");
        Some(Envelope { key, headers, value: self.value(&subject)? })
    }

    fn value(&self, conversation: &str) -> Option<Bytes> {
        // Names and ids need no escape; the entry is a map that is not empty.
        let open = self.entry.strip_suffix(b"}")?;
        let mut out = BytesMut::with_capacity(self.entry.len() + 128);
        out.put_slice(open);
        for (name, value) in [
            ("conversation", conversation),
            ("account", self.origin.account.as_str()),
            ("inbox", self.inbox.as_str()),
        ] {
            out.put_slice(b",\"");
            out.put_slice(name.as_bytes());
            out.put_slice(b"\":\"");
            out.put_slice(value.as_bytes());
            out.put_u8(b'"');
        }
        out.put_u8(b'}');
        Some(out.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_the_contracts_shape() {
        let (tenant, account): (TenantId, AccountId) = ("demo".parse().unwrap(), "wa".parse().unwrap());
        let conversation = ConversationId::derive(&tenant, &account, "34600111222");
        let entry = br#"{"seq":7,"at":"2026-11-21T09:00:00.123Z","type":"note.added","data":{"text":"x"},"actor":{"type":"agent","id":"anna"}}"#;
        let origin = Arc::new(Origin { tenant, account, conversation });
        let event =
            Event { origin, inbox: "main".parse().unwrap(), seq: 7, entry: Bytes::from_static(entry) };
        let envelope = event.envelope().unwrap();
        assert_eq!(envelope.key, "demo/117hm6cewq8ptd8sg97y11y4xd");
        let header = |name: &str| envelope.headers.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
        assert_eq!(header("ce_id"), Some("117hm6cewq8ptd8sg97y11y4xd-7"));
        assert_eq!(header("ce_type"), Some("patchbay.note.added"));
        assert_eq!(header("ce_source"), Some("/tenants/demo/accounts/wa"));
        assert_eq!(header("ce_subject"), Some("117hm6cewq8ptd8sg97y11y4xd"));
        assert_eq!((header("ce_time"), header("ce_sequence")), (Some("2026-11-21T09:00:00.123Z"), Some("7")));
        assert_eq!((header("ce_tenant"), header("ce_specversion")), (Some("demo"), Some("1.0")));
        let value: serde_json::Value = serde_json::from_slice(&envelope.value).unwrap();
        assert_eq!(value["conversation"], "117hm6cewq8ptd8sg97y11y4xd");
        assert_eq!((&value["account"], &value["inbox"]), (&"wa".into(), &"main".into()));
        assert_eq!((&value["seq"], &value["data"]["text"]), (&7.into(), &"x".into()));
        let broken = Event { entry: Bytes::from_static(b"x"), ..event };
        assert_eq!(broken.envelope(), None);
    }
}
