//! What a file is, by its bytes and not by its claim.

use file_format::{FileFormat, Kind};

/// Bytes of a file's start that are looked at.
pub const HEAD_BYTES: usize = 8 * 1024;

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// A picture.
    Image,
    /// Sound or moving pictures.
    AudioVideo,
    /// Anything else.
    Document,
    /// Something that runs: not taken.
    Executable,
}

/// The type of a file that starts so. A claim only chooses among what the bytes may be: a container says nothing of
/// what is packed into it, and text nothing of its language.
pub fn mime(head: &[u8], claimed: Option<&str>) -> String {
    let found = FileFormat::from_bytes(head);
    let claimed = claimed.map(|c| c.split(';').next().unwrap_or("").trim().to_ascii_lowercase());
    let claimed = claimed.as_deref().unwrap_or("");
    let refined = match found.media_type() {
        "application/zip" => claimed.starts_with("application/vnd.") || claimed == "application/epub+zip",
        "application/x-cfb" => matches!(
            claimed,
            "application/msword"
                | "application/vnd.ms-excel"
                | "application/vnd.ms-powerpoint"
                | "application/vnd.ms-outlook"
        ),
        "application/mp4" | "video/mp4" | "audio/mp4" | "application/ogg" => {
            matches!(
                claimed,
                "video/mp4" | "audio/mp4" | "video/3gpp" | "audio/ogg" | "video/ogg" | "audio/opus"
            )
        }
        _ => false,
    };
    if refined {
        return claimed.to_owned();
    }
    match found.media_type() {
        "application/octet-stream" | "text/plain" if is_text(head) => text(claimed),
        "application/mp4" => "video/mp4".into(),
        // A voice note: providers know the container and not what is in it.
        "application/ogg" | "audio/opus" => "audio/ogg".into(),
        "application/x-id3v2" => "audio/mpeg".into(),
        found => found.to_owned(),
    }
}

fn is_text(head: &[u8]) -> bool {
    let whole = match std::str::from_utf8(head) {
        Ok(_) => true,
        // A character may be cut at the end of what is looked at.
        Err(e) => e.error_len().is_none() && head.len() == HEAD_BYTES,
    };
    whole && !head.is_empty() && !head.iter().any(|b| matches!(b, 0..=8 | 14..=31))
}

fn text(claimed: &str) -> String {
    match claimed {
        "text/csv" | "text/markdown" | "application/json" | "text/vcard" | "text/calendar" => {
            claimed.to_owned()
        }
        _ => "text/plain".into(),
    }
}

/// What a file that starts so is for.
pub fn sort(head: &[u8], mime: &str) -> Sort {
    // Speech in AMR begins as a script does.
    let script = head.starts_with(b"#!") && !mime.starts_with("audio/amr");
    if FileFormat::from_bytes(head).kind() == Kind::Executable || script {
        return Sort::Executable;
    }
    match mime.split('/').next() {
        // A drawing that can carry a script is a document.
        Some("image") if mime != "image/svg+xml" => Sort::Image,
        Some("audio" | "video") => Sort::AudioVideo,
        _ => Sort::Document,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";
    const OPUS: &[u8] = b"OggS\0\x02\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x9a\x1b\xc5\x30\x01\x13OpusHead\x01\x01\x38\x01\x80\xbb\0\0\0\0\0";
    const JPEG: &[u8] = b"\xff\xd8\xff\xe0\0\x10JFIF\0";

    #[test]
    fn the_bytes_decide_and_a_claim_only_refines() {
        for (head, claimed, expected) in [
            (PNG, Some("text/html"), "image/png"),
            (JPEG, None, "image/jpeg"),
            (b"RIFF\x10\0\0\0WEBPVP8 ", None, "image/webp"),
            (b"%PDF-1.7\n", Some("image/png"), "application/pdf"),
            (b"OggS\0\x02", Some("audio/ogg; codecs=opus"), "audio/ogg"),
            (b"#!AMR\n", None, "audio/amr"),
            (OPUS, Some("audio/ogg; codecs=opus"), "audio/ogg"),
            (OPUS, None, "audio/ogg"),
            (
                b"PK\x03\x04\x14\0",
                Some("application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
                "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
            ),
            (b"PK\x03\x04\x14\0", Some("text/html"), "application/zip"),
            ("hola señora".as_bytes(), None, "text/plain"),
            (b"a,b\n1,2\n", Some("text/csv"), "text/csv"),
            (b"just words", Some("image/png"), "text/plain"),
            (b"\x01\x02\x03\x04", Some("image/png"), "application/octet-stream"),
        ] {
            assert_eq!(mime(head, claimed), expected, "{claimed:?}");
        }
    }

    #[test]
    fn what_runs_is_told_apart_and_a_drawing_is_no_picture() {
        assert_eq!(sort(b"\x7fELF\x02\x01\x01", "application/x-executable"), Sort::Executable);
        assert_eq!(sort(b"MZ\x90\0", "x"), Sort::Executable);
        assert_eq!(sort(b"#!/bin/sh\n", "text/plain"), Sort::Executable);
        assert_eq!(sort(b"#!AMR\n", "audio/amr"), Sort::AudioVideo);
        assert_eq!(sort(b"#!AMR-WB\n", &mime(b"#!AMR-WB\n", None)), Sort::AudioVideo);
        assert_eq!(sort(PNG, "image/png"), Sort::Image);
        assert_eq!(sort(b"<svg", "image/svg+xml"), Sort::Document);
        assert_eq!(sort(b"x", "audio/ogg"), Sort::AudioVideo);
    }
}
