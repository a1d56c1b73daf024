//! The provider's files: `POST /{version}/{phone_number_id}/media`, `GET /{version}/{media_id}`, and the place that it
//! names, which wants the key.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::graph::error;
use super::record::Upload;
use super::{Sim, lock};

/// How a file behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Behaviour {
    /// As it should.
    #[default]
    Good,
    /// Its bytes are not those of its digest.
    Spoilt,
    /// It is asked for so many times before it is there.
    Flaky(u32),
    /// It sends itself to another host.
    Elsewhere,
    /// It never ends.
    Endless,
}

#[derive(Clone)]
pub(crate) struct File {
    mime: String,
    bytes: Bytes,
    behaviour: Behaviour,
    asked: u32,
}

/// The files of a simulator.
#[derive(Default)]
pub(crate) struct Files(HashMap<String, File>);

impl Files {
    pub(crate) fn add(&mut self, id: &str, mime: &str, bytes: Bytes, behaviour: Behaviour) {
        self.0.insert(id.to_owned(), File { mime: mime.to_owned(), bytes, behaviour, asked: 0 });
    }
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

fn has_key(headers: &HeaderMap) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    bearer.is_some_and(|v| v.starts_with("Bearer ") && v.len() > 7)
}

/// Where a file is.
pub(crate) async fn tell(
    State(sim): State<Arc<Sim>>,
    Path((_, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if !has_key(&headers) {
        return error(401, 190, "Invalid OAuth access token");
    }
    let mut files = lock(&sim.files);
    let Some(file) = files.0.get_mut(&id) else { return error(404, 100, "Unsupported get request") };
    file.asked += 1;
    if matches!(file.behaviour, Behaviour::Flaky(n) if file.asked <= n) {
        return error(500, 131_000, "Something went wrong");
    }
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("");
    Json(json!({
        "messaging_product": "whatsapp", "url": format!("http://{host}/sim/media/{id}"), "mime_type": file.mime,
        "sha256": digest(&file.bytes), "file_size": file.bytes.len(), "id": id,
    }))
    .into_response()
}

/// The file itself.
pub(crate) async fn give(
    State(sim): State<Arc<Sim>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    if !has_key(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let found = lock(&sim.files).0.get(&id).cloned();
    let Some(file) = found else { return StatusCode::NOT_FOUND.into_response() };
    match file.behaviour {
        Behaviour::Good | Behaviour::Flaky(_) => file.bytes.into_response(),
        Behaviour::Spoilt => [b"spoilt".as_slice(), &file.bytes].concat().into_response(),
        Behaviour::Elsewhere => {
            (StatusCode::FOUND, [(header::LOCATION, "http://169.254.169.254/latest/meta-data")])
                .into_response()
        }
        Behaviour::Endless => {
            let chunk = Bytes::from(vec![b'x'; 1 << 20]);
            let stream = futures_util::stream::repeat_with(move || Ok::<_, std::io::Error>(chunk.clone()));
            axum::body::Body::from_stream(stream).into_response()
        }
    }
}

/// Takes a file.
pub(crate) async fn take(
    State(sim): State<Arc<Sim>>,
    Path((_, number)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if !has_key(&headers) {
        return error(401, 190, "Invalid OAuth access token");
    }
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let Some(form) = kind.split_once("boundary=").map(|(_, b)| parts(&body, b.trim_matches('"'))) else {
        return error(400, 100, "multipart/form-data is required");
    };
    let field = |name: &str| form.iter().find(|p| p.name == name);
    let text = |name: &str| field(name).map(|p| String::from_utf8_lossy(&p.bytes).into_owned());
    let (Some(file), Some("whatsapp"), Some(mime)) =
        (field("file"), text("messaging_product").as_deref(), text("type"))
    else {
        return error(400, 100, "file, type and messaging_product are required");
    };
    let id = format!("{}", rand::random::<u64>() >> 12);
    lock(&sim.files).add(&id, &mime, file.bytes.clone(), Behaviour::Good);
    lock(&sim.record).uploads.push(Upload {
        phone_number_id: number,
        id: id.clone(),
        mime,
        name: file.file_name.clone(),
        sha256: digest(&file.bytes),
    });
    Json(json!({"id": id})).into_response()
}

struct Part {
    name: String,
    file_name: String,
    bytes: Bytes,
}

fn find(within: &[u8], what: &[u8], from: usize) -> Option<usize> {
    within.get(from..)?.windows(what.len()).position(|w| w == what).map(|at| at + from)
}

/// The parts of a form.
fn parts(body: &Bytes, boundary: &str) -> Vec<Part> {
    let mark = format!("--{boundary}").into_bytes();
    let mut found = Vec::new();
    let mut at = find(body, &mark, 0);
    while let Some(start) = at {
        let start = start + mark.len() + 2;
        let Some(end) = find(body, &mark, start) else { break };
        at = Some(end);
        let Some(blank) = find(body, b"\r\n\r\n", start).filter(|b| *b < end) else { continue };
        let head = String::from_utf8_lossy(&body[start..blank]).into_owned();
        let attribute = |name: &str| {
            let (_, rest) = head.split_once(&format!(" {name}=\""))?;
            Some(rest.split('"').next().unwrap_or("").to_owned())
        };
        found.push(Part {
            name: attribute("name").unwrap_or_default(),
            file_name: attribute("filename").unwrap_or_default(),
            bytes: body.slice(blank + 4..end.saturating_sub(2).max(blank + 4)),
        });
    }
    found
}
