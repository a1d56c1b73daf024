//! The Graph API: `POST /{version}/{phone_number_id}/messages`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use super::faults::{Fate, up_to};
use super::record::SendCall;
use super::{Sim, lock, strict, webhooks};

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Counts a call as under way.
struct Open(Arc<Sim>);

impl Open {
    fn new(sim: &Arc<Sim>) -> Self {
        lock(&sim.record).calls_open += 1;
        Self(sim.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.0.record).calls_open -= 1;
    }
}

pub(crate) fn error(status: u16, code: i64, message: &str) -> Response {
    let body = json!({"error": {"message": format!("(#{code}) {message}"), "type": "OAuthException", "code": code, "error_data": {"messaging_product": "whatsapp", "details": message}, "fbtrace_id": "sim"}});
    (StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST), Json(body)).into_response()
}

pub(crate) async fn messages(
    State(sim): State<Arc<Sim>>,
    Path((_version, number)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let _open = Open::new(&sim);
    if lock(&sim.pace).is_down() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if !headers
        .get("authorization")
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.starts_with("Bearer ") && v.len() > 7)
    {
        return error(401, 190, "Invalid OAuth access token");
    }
    let Ok(frame) = serde_json::from_slice::<Value>(&body) else {
        return error(400, 100, "Invalid parameter");
    };
    if frame["messaging_product"] != "whatsapp" {
        return error(400, 100, "messaging_product is required");
    }
    if frame["status"] == "read" {
        return signal(&sim, &frame);
    }
    send(&sim, &number, &frame).await
}

fn signal(sim: &Sim, frame: &Value) -> Response {
    let id = frame["message_id"].as_str().unwrap_or("").to_owned();
    let mut record = lock(&sim.record);
    if frame["typing_indicator"].is_object() {
        record.typing.push(id);
    } else {
        record.read.push(id);
    }
    Json(json!({"success": true})).into_response()
}

async fn send(sim: &Arc<Sim>, number: &str, frame: &Value) -> Response {
    let text_of = |v: &Value| v.as_str().unwrap_or("").to_owned();
    let (to, recipient) = (text_of(&frame["to"]), text_of(&frame["recipient"]));
    if to.is_empty() && recipient.is_empty() {
        return error(400, 100, "The parameter to is required");
    }
    let kind = text_of(&frame["type"]);
    if let Some(fault) = strict::fault(frame) {
        return error(400, 100, &format!("Invalid parameter: {fault}"));
    }
    let address = if to.is_empty() { recipient.clone() } else { to.clone() };
    let refused = lock(&sim.pace).refuses(number, &address, &kind);
    if let Some((code, message)) = refused {
        lock(&sim.record).calls.push(SendCall {
            phone_number_id: number.to_owned(),
            to: address,
            text: text_of(&frame["text"]["body"]),
            media: text_of(&frame[&kind]["id"]),
            callback: text_of(&frame["biz_opaque_callback_data"]),
            kind,
            taken: false,
            answer: code.to_string(),
            wamid: String::new(),
            at_ms: now_ms(),
        });
        return error(if code == 130_429 { 429 } else { 400 }, code, message);
    }
    let faults = *lock(&sim.faults);
    let (fate, delay) = {
        let mut random = lock(&sim.random);
        (faults.call(&mut random), up_to(&mut random, faults.delay_ms))
    };
    tokio::time::sleep(delay).await;
    let dropped = to.contains('.');
    let taken = matches!(fate, Fate::Work | Fate::LostAnswer | Fate::BadGateway) && !dropped;
    let wamid = format!("wamid.{:032x}", rand::random::<u128>());
    let answer = match fate {
        Fate::Work => "ok",
        Fate::LostAnswer => "lost",
        Fate::Throttle => "429",
        Fate::RetryableError => "131000",
        Fate::FinalError => "131026",
        Fate::BadGateway => "502",
    };
    let callback = text_of(&frame["biz_opaque_callback_data"]);
    let known = lock(&sim.pace).aliases.get(&address).cloned().unwrap_or_else(|| address.clone());
    let call = SendCall {
        phone_number_id: number.to_owned(),
        to: address.clone(),
        kind: kind.clone(),
        text: text_of(&frame["text"]["body"]),
        media: text_of(&frame[&kind]["id"]),
        callback: callback.clone(),
        taken,
        answer: answer.to_owned(),
        wamid: if taken { wamid.clone() } else { String::new() },
        at_ms: now_ms(),
    };
    lock(&sim.record).calls.push(call);
    if taken {
        webhooks::receipts(sim, number, &wamid, &known, &callback);
    }
    match fate {
        Fate::Work => Json(json!({
            "messaging_product": "whatsapp",
            "contacts": [{"input": address, "wa_id": known}],
            "messages": [{"id": wamid}],
        }))
        .into_response(),
        Fate::LostAnswer => {
            tokio::time::sleep(Duration::from_millis(faults.hold_ms)).await;
            StatusCode::GATEWAY_TIMEOUT.into_response()
        }
        Fate::Throttle => {
            let mut response = error(429, 130_429, "Rate limit hit");
            response.headers_mut().insert("retry-after", axum::http::HeaderValue::from_static("1"));
            response
        }
        Fate::RetryableError => error(500, 131_000, "Something went wrong"),
        Fate::FinalError => error(400, 131_026, "Message undeliverable"),
        Fate::BadGateway => StatusCode::BAD_GATEWAY.into_response(),
    }
}
