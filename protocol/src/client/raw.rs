//! `data` fields: any JSON value embedded as it stands in the JSON encoding, bytes in Protobuf.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub(super) fn serialize<S: Serializer>(data: &Bytes, s: S) -> Result<S::Ok, S::Error> {
    let text = std::str::from_utf8(data).map_err(serde::ser::Error::custom)?;
    if text.contains('\n') {
        // Newline separates replies: what came pretty-printed is compacted first.
        let value: serde_json::Value = serde_json::from_str(text).map_err(serde::ser::Error::custom)?;
        return value.serialize(s);
    }
    let raw: &RawValue = serde_json::from_str(text).map_err(serde::ser::Error::custom)?;
    raw.serialize(s)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Bytes, D::Error> {
    let raw = Box::<RawValue>::deserialize(d)?;
    Ok(if raw.get() == "null" { Bytes::new() } else { Bytes::from(Box::<str>::from(raw).into_string()) })
}

pub(super) fn is_empty(data: &Bytes) -> bool {
    data.is_empty()
}
