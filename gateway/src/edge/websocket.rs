//! WebSocket: the handshake, and a [`Wire`] over its frames.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Sink, Stream, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use patchbay_protocol::Disconnect;
use patchbay_protocol::client::{Encoding, FRAME_BYTES_MAX};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message, Utf8Bytes, error::ProtocolError};

use super::client::wire::{Gone, Read, Wire};
use super::client::{Sockets, connection};

/// How long a close may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// `GET /connection/websocket`
pub async fn upgrade(State(sockets): State<Arc<Sockets>>, mut request: Request) -> Response {
    if let Err(refused) = sockets.admit(request.headers()).await {
        return refused;
    }
    let encoding = wanted_encoding(&request);
    let Ok(mut response) = create_response_with_body(&strip_body(&request), Body::empty) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    if encoding == Encoding::Protobuf {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOBUF));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let tasks = sockets.tasks.clone();
    tasks.spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            connection::run(sockets, socket(upgraded).await, encoding).await;
        }
    });
    response
}

/// A socket with our bounds, on a connection that was upgraded.
pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

impl Wire for Socket {
    fn poll_read(&mut self, encoding: Encoding, cx: &mut Context<'_>) -> Poll<Read> {
        loop {
            let read = match ready!(Pin::new(&mut *self).poll_next(cx)) {
                None => Read::Gone,
                Some(Err(error)) => broken(&error),
                Some(Ok(message)) => match (message, encoding) {
                    (Message::Text(text), Encoding::Json) => Read::Frame(Bytes::from(text)),
                    (Message::Binary(data), Encoding::Protobuf) => Read::Frame(data),
                    (Message::Text(_) | Message::Binary(_), _) => Read::Broken(Disconnect::BadRequest),
                    (Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_), _) => {
                        continue;
                    }
                },
            };
            return Poll::Ready(read);
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        Sink::poll_ready(Pin::new(self), cx).map_err(|_| Gone)
    }

    fn send(&mut self, encoding: Encoding, frame: Bytes) -> Result<(), Gone> {
        let message = match encoding {
            // Frames of ours are JSON, which is UTF-8; what is not would be a fault of ours and is shown as nothing.
            Encoding::Json => Message::Text(Utf8Bytes::try_from(frame).unwrap_or_default()),
            Encoding::Protobuf => Message::Binary(frame),
        };
        Pin::new(self).start_send(message).map_err(|_| Gone)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        Sink::poll_flush(Pin::new(self), cx).map_err(|_| Gone)
    }

    async fn close(&mut self, _: Encoding, why: Disconnect) {
        let frame = CloseFrame { code: why.code().into(), reason: Utf8Bytes::from_static(why.reason()) };
        // A peer that does not answer the close is left.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, async {
            if WebSocketStream::close(self, Some(frame)).await.is_ok() {
                while let Some(Ok(_)) = self.next().await {}
            }
        })
        .await;
    }
}

fn broken(error: &tungstenite::Error) -> Read {
    match error {
        tungstenite::Error::Capacity(_) => Read::Broken(Disconnect::TooLarge),
        // It went without a word.
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Read::Gone,
        tungstenite::Error::Protocol(_) | tungstenite::Error::Utf8(_) | tungstenite::Error::AttackAttempt => {
            Read::Broken(Disconnect::BadRequest)
        }
        _ => Read::Gone,
    }
}

/// The same, made of it.
pub async fn socket(upgraded: Upgraded) -> Socket {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(4096)
        .max_write_buffer_size(1 << 20)
        .max_message_size(Some(FRAME_BYTES_MAX))
        .max_frame_size(Some(FRAME_BYTES_MAX));
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await
}

/// What a socket reads into at once; held for as long as it is open.
const READ_BUFFER_BYTES: usize = 1024;
const PROTOBUF: &str = "centrifuge-protobuf";

fn strip_body(request: &Request) -> axum::http::Request<()> {
    let mut bare = axum::http::Request::new(());
    *bare.method_mut() = request.method().clone();
    *bare.uri_mut() = request.uri().clone();
    *bare.version_mut() = request.version();
    bare.headers_mut().clone_from(request.headers());
    bare
}

fn wanted_encoding(request: &Request) -> Encoding {
    let offered = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let protobuf =
        offered.filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).any(|p| p.trim() == PROTOBUF);
    if protobuf { Encoding::Protobuf } else { Encoding::Json }
}
