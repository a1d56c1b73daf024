//! A way to a client: frames of commands come in, frames of replies go out.

use std::task::{Context, Poll};

use bytes::Bytes;
use patchbay_protocol::Disconnect;
use patchbay_protocol::client::Encoding;
use patchbay_protocol::client::reply::{DisconnectPush, Push, Reply};

/// The client is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// What has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// A frame of commands.
    Frame(Bytes),
    /// What the protocol does not allow, and how the connection ends.
    Broken(Disconnect),
    /// Nothing more: the client is gone.
    Gone,
}

/// A way to a client.
///
/// Bound: a wire takes frames as long as what it holds of them is less than a few of them; then [`Wire::poll_ready`] waits,
/// and what waits is bounded by the connection's own queue.
pub trait Wire: Send {
    /// What has come.
    fn poll_read(&mut self, encoding: Encoding, cx: &mut Context<'_>) -> Poll<Read>;

    /// Whether it takes another frame.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;

    /// Takes a frame, which goes out with the next flush at the latest.
    fn send(&mut self, encoding: Encoding, frame: Bytes) -> Result<(), Gone>;

    /// The same of what does not matter for long, and may be lost.
    fn send_beside(&mut self, encoding: Encoding, frame: Bytes) -> Result<(), Gone> {
        self.send(encoding, frame)
    }

    /// Whether everything that it took is on its way.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;

    /// Ends it, and says why. It takes no longer than a client may take to answer.
    fn close(&mut self, encoding: Encoding, why: Disconnect) -> impl Future<Output = ()> + Send;

    /// What whoever has no socket of its own must show to send commands: the word for it in the answer to `connect`.
    fn session(&self) -> Option<String> {
        None
    }
}

/// Why a connection ends, for a client whose transport has no word for that.
pub fn last_word(encoding: Encoding, why: Disconnect) -> Bytes {
    let disconnect = DisconnectPush {
        code: why.code().into(),
        reason: why.reason().to_owned(),
        reconnect: why.reconnects(),
    };
    let push = Push { disconnect: Some(disconnect), ..Push::default() };
    // It holds no data of anybody's, which is all that an encoding may refuse.
    encoding.encode_reply(&Reply { push: Some(push), ..Reply::default() }).unwrap_or_default()
}
