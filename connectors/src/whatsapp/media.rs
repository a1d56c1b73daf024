//! Files: `GET /{media_id}` tells where one is for some minutes, `POST /{phone_number_id}/media` puts one there for
//! thirty days.

use std::time::Duration;

use serde_json::Value;

use crate::{MediaLocation, UploadForm};

/// Ids of uploads are good for 30 days; ours are used for a day less.
const UPLOAD_GOOD_FOR: Duration = Duration::from_secs(29 * 24 * 3600);

pub(super) fn path(id: &str) -> Option<String> {
    let plain =
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    (plain && !id.contains("..")).then(|| id.to_owned())
}

pub(super) fn location(answer: &[u8]) -> Option<MediaLocation> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let text = |name: &str| answer[name].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
    let bytes = answer["file_size"].as_u64().or_else(|| answer["file_size"].as_str()?.parse().ok());
    Some(MediaLocation { url: text("url")?, mime: text("mime_type"), sha256: text("sha256"), bytes })
}

pub(super) fn upload(external_id: &str, mime: &str) -> UploadForm {
    UploadForm {
        path: format!("{external_id}/media"),
        fields: vec![("messaging_product", "whatsapp".into()), ("type", mime.into())],
        file_field: "file",
    }
}

pub(super) fn uploaded(answer: &[u8]) -> Option<(String, Duration)> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let id = match &answer["id"] {
        Value::String(id) if !id.is_empty() => id.clone(),
        Value::Number(id) => id.to_string(),
        _ => return None,
    };
    Some((id, UPLOAD_GOOD_FOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_and_an_id_are_read_as_the_provider_writes_them() {
        let found = location(br#"{"messaging_product":"whatsapp","url":"https://l/x?a=1","mime_type":"image/jpeg","sha256":"00ff","file_size":"303833","id":"1"}"#).unwrap();
        assert_eq!((found.url.as_str(), found.bytes), ("https://l/x?a=1", Some(303_833)));
        assert_eq!(location(b"{}"), None);
        assert_eq!(uploaded(br#"{"id":"77"}"#).unwrap().0, "77");
        assert_eq!(uploaded(br#"{"error":{"code":1}}"#), None);
    }

    #[test]
    fn no_id_becomes_another_path() {
        assert_eq!(path("1037543291543636").as_deref(), Some("1037543291543636"));
        for bad in ["", "a/b", "..", "a..b", "?x", "a b", "%2e"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}
