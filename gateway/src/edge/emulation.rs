//! Clients behind what blocks WebSocket: replies come in the body of one long answer, commands in requests beside it.
//!
//! `POST /connection/http_stream` carries `connect` in its body and `GET /connection/sse` in `cf_connect`; what follows goes to
//! `POST /emulation`, with the `session` that the answer to `connect` named as the only credential, on whichever node: one
//! that does not have the session asks the one that does. Commands of one session run in the order in which they arrive.
//!
//! Bound: [`COMMANDS_MAX`] frames of a session wait to be read, past that `503`; a body of up to [`FRAME_BYTES_MAX`] is read
//! within `BODY_TIMEOUT`. Of replies at most `BUFFER_BYTES` and one frame wait beside the connection's own queue.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream;
use patchbay_protocol::client::emulation::{EMULATION_BYTES_MAX, EmulationRequest};
use patchbay_protocol::client::{Encoding, FRAME_BYTES_MAX};
use patchbay_protocol::{Disconnect, ErrorCode};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use super::client::wire::{Gone, Read, Wire, last_word};
use super::client::{Sockets, connection};
use crate::hub::emulated::Registered;
use crate::limits::{self, Peer};
use crate::listener::Place;

/// Frames of a session's commands that wait to be read.
pub const COMMANDS_MAX: usize = 64;
/// Bytes of replies that go out together.
const BUFFER_BYTES: usize = 16 * 1024;
/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last word to a client may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How replies stand in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// As they are: JSON by line, Protobuf by length.
    Frames,
    /// As server-sent events.
    Events,
}

/// A body that goes on, and the commands that come beside it.
struct Emulated {
    style: Style,
    session: Registered,
    commands: mpsc::Receiver<Bytes>,
    out: PollSender<Result<Bytes, Infallible>>,
    buffer: BytesMut,
    /// Ends when nobody reads the body any more.
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Wire for Emulated {
    fn poll_read(&mut self, _: Encoding, cx: &mut Context<'_>) -> Poll<Read> {
        if let Poll::Ready(Some(frame)) = self.commands.poll_recv(cx) {
            return Poll::Ready(Read::Frame(frame));
        }
        self.gone.as_mut().poll(cx).map(|()| Read::Gone)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.buffer.len() < BUFFER_BYTES { Poll::Ready(Ok(())) } else { self.poll_flush(cx) }
    }

    fn send(&mut self, encoding: Encoding, frame: Bytes) -> Result<(), Gone> {
        match (self.style, encoding) {
            (Style::Frames, Encoding::Protobuf) => self.buffer.put(frame),
            (Style::Frames, Encoding::Json) => {
                self.buffer.put(frame);
                self.buffer.put_u8(b'\n');
            }
            (Style::Events, _) => {
                self.buffer.put_slice(b"data: ");
                self.buffer.put(frame);
                self.buffer.put_slice(b"\n\n");
            }
        }
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.buffer.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if ready!(self.out.poll_reserve(cx)).is_err() {
            return Poll::Ready(Err(Gone));
        }
        let chunk = self.buffer.split().freeze();
        Poll::Ready(self.out.send_item(Ok(chunk)).map_err(|_| Gone))
    }

    async fn close(&mut self, encoding: Encoding, why: Disconnect) {
        if self.send(encoding, last_word(encoding, why)).is_ok() {
            // A client that reads no more has no use for it.
            let flush = std::future::poll_fn(|cx| self.poll_flush(cx));
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, flush).await;
        }
    }

    fn session(&self) -> Option<String> {
        Some(self.session.name().to_owned())
    }
}

fn encoding_of(headers: &HeaderMap) -> Encoding {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let binary = kind.trim().eq_ignore_ascii_case("application/octet-stream");
    if binary { Encoding::Protobuf } else { Encoding::Json }
}

async fn body_of(body: Body, most: usize) -> Result<Bytes, Response> {
    match tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, most)).await {
        Ok(Ok(body)) if body.is_empty() => Err(StatusCode::BAD_REQUEST.into_response()),
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(StatusCode::PAYLOAD_TOO_LARGE.into_response()),
        Err(_) => Err(StatusCode::REQUEST_TIMEOUT.into_response()),
    }
}

/// `POST /connection/http_stream`
pub(crate) async fn http_stream(
    State(sockets): State<Arc<Sockets>>,
    Extension(place): Extension<Place>,
    version: Version,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if let Err(refused) = sockets.admit(&headers).await {
        return refused;
    }
    let connect = match body_of(body, FRAME_BYTES_MAX).await {
        Ok(connect) => connect,
        Err(refused) => return refused,
    };
    let encoding = encoding_of(&headers);
    let kind = match encoding {
        Encoding::Protobuf => "application/octet-stream",
        Encoding::Json => "application/json; charset=utf-8",
    };
    open(sockets, (version, &place), connect, encoding, Style::Frames, kind)
}

/// What `/connection/sse` is asked with: `EventSource` has no body.
#[derive(Deserialize)]
pub(crate) struct SseQuery {
    cf_connect: String,
}

/// `GET /connection/sse`
pub(crate) async fn sse(
    State(sockets): State<Arc<Sockets>>,
    Extension(place): Extension<Place>,
    version: Version,
    headers: HeaderMap,
    query: Result<Query<SseQuery>, axum::extract::rejection::QueryRejection>,
) -> Response {
    if let Err(refused) = sockets.admit(&headers).await {
        return refused;
    }
    let Ok(Query(SseQuery { cf_connect })) = query else {
        return (StatusCode::BAD_REQUEST, "cf_connect: missing").into_response();
    };
    open(sockets, (version, &place), cf_connect.into(), Encoding::Json, Style::Events, "text/event-stream")
}

/// Begins a connection whose first frame has come.
fn open(
    sockets: Arc<Sockets>,
    (version, place): (Version, &Place),
    connect: Bytes,
    encoding: Encoding,
    style: Style,
    kind: &'static str,
) -> Response {
    if version < Version::HTTP_2 {
        // From here on it is counted among the sockets, and no longer among connections with requests.
        place.leave();
    }
    let (commands, incoming) = mpsc::channel(COMMANDS_MAX);
    // It is empty.
    let _ = commands.try_send(connect);
    let (out, mut chunks) = mpsc::channel(1);
    let reads = out.clone();
    let wire = Emulated {
        style,
        session: sockets.hub.emulated().register(commands),
        commands: incoming,
        out: PollSender::new(out),
        buffer: BytesMut::new(),
        gone: Box::pin(async move { reads.closed().await }),
    };
    let tasks = sockets.tasks.clone();
    tasks.spawn(connection::run(sockets, wire, encoding));
    let mut response = Response::new(Body::from_stream(stream::poll_fn(move |cx| chunks.poll_recv(cx))));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if version < Version::HTTP_2 {
        // It has no place for another request.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    // Proxies that keep bodies back until they are whole are asked not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// `POST /emulation`
pub(crate) async fn send(
    State(sockets): State<Arc<Sockets>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if !sockets.allows(&headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let body = match body_of(body, EMULATION_BYTES_MAX).await {
        Ok(body) => body,
        Err(refused) => return refused,
    };
    let request = EmulationRequest::decode_as(encoding_of(&headers), &body);
    let Ok(EmulationRequest { node, session, data }) = request else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let here = sockets.desk.node();
    // The node's name as clients see it ends in the incarnation of its start; another one since is the same node.
    let elsewhere = node.rsplit('-').next().and_then(|n| n.parse().ok()).filter(|_| node != sockets.node);
    let taken = match elsewhere {
        Some(at) => here.emulated(at, session, data).await,
        None => sockets.hub.emulated().hand(&session, data),
    };
    match taken {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) if error.code == ErrorCode::NotFound => match sockets.rates.stranger(Some(from)) {
            Ok(()) => StatusCode::NOT_FOUND.into_response(),
            // Whoever guesses does not go on guessing.
            Err(error) => limits::too_many(&error),
        },
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// Lets pages of other origins ask, where they may.
pub(crate) async fn cors(
    State(sockets): State<Arc<Sockets>>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let Some(origin) = origin.filter(|_| sockets.allows(request.headers())) else {
        return next.run(request).await;
    };
    let mut response = if request.method() == Method::OPTIONS {
        let mut allowed = StatusCode::NO_CONTENT.into_response();
        let headers = allowed.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("content-type"));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3600"));
        allowed
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    response
}
