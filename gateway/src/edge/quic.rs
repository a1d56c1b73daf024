//! QUIC (ALPN `patchbay/1`): the Protobuf stream on the one bidirectional stream that a client opens, and datagrams for what
//! does not matter for long, where the client asks for them.
//!
//! A connection keeps through a change of its client's address. There is no early data: a command cannot be replayed.
//!
//! Bound: [`HANDSHAKES_MAX`] connections have no stream yet, past that they are refused; from `RETRY_FROM` on a client must
//! show first that it is where it says. A client may open one stream, and has what `transport` says under way.

use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use patchbay_protocol::Disconnect;
use patchbay_protocol::client::{COMMAND_BYTES_MAX, Encoding};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, RecvStream, SendStream, ServerConfig,
    TokioRuntime, TransportConfig, VarInt,
};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::client::wire::{Gone, Read, Wire, last_word};
use super::client::{Sockets, connection};
use crate::health::Phase;
use crate::tls::Identity;

/// What both sides speak.
pub const ALPN: &[u8] = b"patchbay/1";
/// Connections that have no stream yet.
pub const HANDSHAKES_MAX: usize = 256;
/// From so many on, whoever comes must show that it is where it says.
const RETRY_FROM: usize = 32;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that is not heard of for so long is gone: a ping and its answer, and something over.
const IDLE_MAX: Duration = Duration::from_secs(45);
/// How long the last word to a client may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of replies that go out together.
const BUFFER_BYTES: usize = 16 * 1024;
/// Bytes that are read at once.
const READ_BYTES: usize = 4 * 1024;

/// Listens.
///
/// # Errors
/// What is wrong with the certificate or the address.
pub fn bind(identity: &Identity, address: SocketAddr) -> std::io::Result<Endpoint> {
    let config = config(identity.server(&[ALPN]).map_err(std::io::Error::other)?)?;
    let socket = UdpSocket::bind(address)?;
    Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))
}

fn config(tls: rustls::ServerConfig) -> std::io::Result<ServerConfig> {
    let crypto = QuicServerConfig::try_from(tls).map_err(std::io::Error::other)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

/// What one connection may have under way. A slot for a stream costs memory whether it is used or not.
fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(64 * 1024))
        .receive_window(VarInt::from_u32(128 * 1024))
        .send_window(256 * 1024)
        // Whoever receives none may send none. What a client sends is not read, and the oldest of it is dropped.
        .datagram_receive_buffer_size(Some(1024))
        .datagram_send_buffer_size(64 * 1024)
        .crypto_buffer_size(4 * 1024)
        .mtu_discovery_config(None)
        .max_idle_timeout(IdleTimeout::try_from(IDLE_MAX).ok());
    transport
}

/// Serves clients until the node ends.
pub(crate) async fn serve(
    endpoint: Endpoint,
    identity: Identity,
    sockets: Arc<Sockets>,
    mut phase: watch::Receiver<Phase>,
) {
    let renewed = endpoint.clone();
    let follows = identity.follow(&[ALPN], move |tls| match config(tls) {
        Ok(config) => renewed.set_server_config(Some(config)),
        Err(error) => tracing::warn!(%error, "the certificate is of no use for QUIC"),
    });
    let accepts = async {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        while let Some(incoming) = endpoint.accept().await {
            let waiting = HANDSHAKES_MAX - places.available_permits();
            if waiting >= RETRY_FROM && !incoming.remote_address_validated() {
                // One that may not be asked so has been asked before.
                let _ = incoming.retry();
                continue;
            }
            let Ok(place) = places.clone().try_acquire_owned() else {
                metrics::counter!("patchbay_limits_reached_total", "which" => "handshakes").increment(1);
                incoming.refuse();
                continue;
            };
            let sockets = sockets.clone();
            sockets.tasks.clone().spawn(admit(sockets, incoming, place));
        }
    };
    tokio::select! {
        () = accepts => {}
        () = follows => {}
        _ = phase.wait_for(|phase| *phase == Phase::Ending) => {}
    }
    // Whoever is connected is told to go by its own connection.
    endpoint.set_server_config(None);
    endpoint.wait_idle().await;
}

fn close(connection: &Connection, why: Disconnect) {
    connection.close(VarInt::from_u32(why.code().into()), why.reason().as_bytes());
}

async fn admit(sockets: Arc<Sockets>, incoming: Incoming, place: OwnedSemaphorePermit) {
    let Ok(connecting) = incoming.accept() else { return };
    // A peer that does not keep to the protocol is its own affair.
    let Ok(Ok(connection)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await else { return };
    if *sockets.phase.borrow() != Phase::Serving {
        return close(&connection, Disconnect::Shutdown);
    }
    if sockets.rates.admit().await.is_err() {
        return close(&connection, Disconnect::TooManyRequests);
    }
    let (send, receive) = match tokio::time::timeout(sockets.limits.connect, connection.accept_bi()).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) => return,
        Err(_) => return close(&connection, Disconnect::Stale),
    };
    drop(place);
    let wire = Quic { connection, send, receive, outgoing: BytesMut::new(), incoming: BytesMut::new() };
    connection::run(sockets, wire, Encoding::Protobuf).await;
}

/// A client's stream.
struct Quic {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    outgoing: BytesMut,
    /// The beginning of a command whose end has not come.
    incoming: BytesMut,
}

/// How long the whole commands at the beginning of `bytes` are together.
fn whole(bytes: &[u8]) -> Result<usize, Disconnect> {
    let mut at = 0;
    loop {
        let (mut length, mut shift, mut head) = (0usize, 0u32, at);
        let length = loop {
            let Some(byte) = bytes.get(head) else { return Ok(at) };
            head += 1;
            length |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break length;
            }
            shift += 7;
            if shift > 28 {
                return Err(Disconnect::BadRequest);
            }
        };
        if length > COMMAND_BYTES_MAX {
            return Err(Disconnect::TooLarge);
        }
        if bytes.len() < head + length {
            return Ok(at);
        }
        at = head + length;
    }
}

impl Wire for Quic {
    fn poll_read(&mut self, _: Encoding, cx: &mut Context<'_>) -> Poll<Read> {
        loop {
            let mut space = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut space);
            if ready!(Pin::new(&mut self.receive).poll_read(cx, &mut read)).is_err()
                || read.filled().is_empty()
            {
                return Poll::Ready(Read::Gone);
            }
            self.incoming.extend_from_slice(read.filled());
            let length = match whole(&self.incoming) {
                Ok(length) => length,
                Err(why) => return Poll::Ready(Read::Broken(why)),
            };
            if length > 0 {
                let frame = self.incoming.split_to(length).freeze();
                if self.incoming.is_empty() {
                    // An idle client holds no room for what it may say.
                    self.incoming = BytesMut::new();
                }
                return Poll::Ready(Read::Frame(frame));
            }
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.outgoing.len() < BUFFER_BYTES { Poll::Ready(Ok(())) } else { self.poll_flush(cx) }
    }

    fn send(&mut self, _: Encoding, frame: Bytes) -> Result<(), Gone> {
        self.outgoing.extend_from_slice(&frame);
        Ok(())
    }

    fn send_beside(&mut self, encoding: Encoding, frame: Bytes) -> Result<(), Gone> {
        let mut reply = frame.clone();
        // A datagram is as long as it is.
        while reply.has_remaining() && reply.get_u8() & 0x80 != 0 {}
        let fits = self.connection.max_datagram_size().is_some_and(|most| reply.len() <= most);
        if fits && self.connection.send_datagram(reply).is_ok() { Ok(()) } else { self.send(encoding, frame) }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        while !self.outgoing.is_empty() {
            match ready!(Pin::new(&mut self.send).poll_write(cx, &self.outgoing)) {
                Ok(written) => self.outgoing.advance(written),
                Err(_) => return Poll::Ready(Err(Gone)),
            }
        }
        self.outgoing = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    async fn close(&mut self, encoding: Encoding, why: Disconnect) {
        let told = async {
            if self.send(encoding, last_word(encoding, why)).is_ok()
                && std::future::poll_fn(|cx| self.poll_flush(cx)).await.is_ok()
                && self.send.finish().is_ok()
            {
                // Until it has all of it, or is gone.
                let _ = self.send.stopped().await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, told).await;
        close(&self.connection, why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_commands_are_taken_and_what_is_too_large_ends_it() {
        let mut bytes = vec![0, 2, 1, 1];
        bytes.extend([0x80, 1]);
        bytes.extend([7; 128]);
        for cut in 0..bytes.len() {
            let wanted = [0, 1, 4].into_iter().rfind(|end| *end <= cut).unwrap_or(0);
            assert_eq!(whole(&bytes[..cut]), Ok(wanted), "{cut}");
        }
        assert_eq!(whole(&bytes), Ok(bytes.len()));
        assert_eq!(whole(&[0xff, 0xff, 0x7f]), Err(Disconnect::TooLarge));
        assert_eq!(whole(&[0xff; 6]), Err(Disconnect::BadRequest));
        assert_eq!(whole(&[]), Ok(0));
    }
}
