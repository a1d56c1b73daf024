//! `GET /m/{signed}`: a file for whoever holds its address. Ranges are served; nothing of the address is logged.

use std::io::SeekFrom;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use patchbay_actors::directory::{MediaRecord, MediaState};
use tokio::io::AsyncSeekExt as _;

use super::Media;
use super::exchange::bytes_of;
use super::link::{Disposition, Link};

/// Serves a file.
pub async fn get(
    State(media): State<Arc<Media>>,
    Path(signed): Path<String>,
    headers: HeaderMap,
) -> Response {
    let mut response = match serve(&media, &signed, &headers).await {
        Ok(response) => response,
        // One that has expired and one that was never ours look alike.
        Err(status) => (status, [(header::CACHE_CONTROL, "private, no-store")]).into_response(),
    };
    let out = response.headers_mut();
    out.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    out.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    out.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("private"));
    response
}

async fn serve(media: &Media, signed: &str, headers: &HeaderMap) -> Result<Response, StatusCode> {
    let again = |_| StatusCode::SERVICE_UNAVAILABLE;
    let known = media.known().map_err(again)?;
    let link = Link::verify(signed, &known.key, media.clock.now()).map_err(|_| StatusCode::NOT_FOUND)?;
    let record = known.directory.media(&link.tenant, &link.id).await.map_err(again)?;
    let record = record.filter(|r| r.state == MediaState::Ready).ok_or(StatusCode::NOT_FOUND)?;
    let blob = media.blobs.open(&link.tenant, &link.id).await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let blob = blob.ok_or(StatusCode::NOT_FOUND)?;
    let (status, from, to) = match range(headers, blob.bytes) {
        Wanted::All => (StatusCode::OK, 0, blob.bytes),
        Wanted::Part(from, to) => (StatusCode::PARTIAL_CONTENT, from, to),
        Wanted::Nothing => return Ok(not_satisfiable(blob.bytes)),
    };
    let mut file = blob.file;
    file.seek(SeekFrom::Start(from)).await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let mut response = (status, Body::from_stream(bytes_of(file, to - from))).into_response();
    let out = response.headers_mut();
    let mut set = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            out.insert(name, value);
        }
    };
    set(header::CONTENT_TYPE, &record.mime);
    set(header::CONTENT_LENGTH, &(to - from).to_string());
    set(header::CONTENT_DISPOSITION, &disposition(&record, link.disposition));
    set(header::ACCEPT_RANGES, "bytes");
    if status == StatusCode::PARTIAL_CONTENT {
        set(header::CONTENT_RANGE, &format!("bytes {from}-{}/{}", to - 1, blob.bytes));
    }
    Ok(response)
}

fn not_satisfiable(bytes: u64) -> Response {
    let range = format!("bytes */{bytes}");
    (StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, range)]).into_response()
}

fn disposition(record: &MediaRecord, how: Disposition) -> String {
    let how = match how {
        Disposition::Inline => "inline",
        Disposition::Attachment => "attachment",
    };
    let Some(name) = &record.name else { return how.to_owned() };
    let encoded: String = name
        .bytes()
        .map(|b| {
            let plain = b.is_ascii_alphanumeric() || b"-._~".contains(&b);
            if plain { char::from(b).to_string() } else { format!("%{b:02X}") }
        })
        .collect();
    format!("{how}; filename*=UTF-8''{encoded}")
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    /// From here up to there.
    Part(u64, u64),
    Nothing,
}

/// The part that is asked for; several at once are answered with everything.
fn range(headers: &HeaderMap, bytes: u64) -> Wanted {
    let wanted =
        headers.get(header::RANGE).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("bytes="));
    let Some((from, to)) = wanted.filter(|w| !w.contains(',')).and_then(|w| w.split_once('-')) else {
        return Wanted::All;
    };
    let (from, to) = match (from.trim().parse::<u64>(), to.trim().parse::<u64>()) {
        (Ok(from), Ok(to)) => (from, to.saturating_add(1).min(bytes)),
        (Ok(from), Err(_)) if to.trim().is_empty() => (from, bytes),
        (Err(_), Ok(last)) if from.trim().is_empty() => (bytes.saturating_sub(last), bytes),
        _ => return Wanted::All,
    };
    if from < to { Wanted::Part(from, to) } else { Wanted::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_served() {
        let asked = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_static(text));
            range(&headers, 100)
        };
        assert_eq!(range(&HeaderMap::new(), 100), Wanted::All);
        assert_eq!(asked("bytes=0-9"), Wanted::Part(0, 10));
        assert_eq!(asked("bytes=90-"), Wanted::Part(90, 100));
        assert_eq!(asked("bytes=-10"), Wanted::Part(90, 100));
        assert_eq!(asked("bytes=90-999"), Wanted::Part(90, 100));
        assert_eq!(asked("bytes=100-"), Wanted::Nothing);
        assert_eq!(asked("bytes=9-1"), Wanted::Nothing);
        assert_eq!(asked("bytes=0-1,5-6"), Wanted::All);
        assert_eq!(asked("lines=0-1"), Wanted::All);
        assert_eq!(asked("bytes=x-y"), Wanted::All);
    }
}
