//! The Centrifuge client protocol, version 2, as the public SDKs speak it. Field numbers and names are the
//! protocol's; the types are ours. One set of types serves both encodings: [`json`] (newline-delimited, several
//! commands a frame, `{}` is a ping) and [`protobuf`] (varint-length-delimited).
//!
//! Unknown fields are ignored: new SDKs send `flag`, `tf`, `type`, `profile`, `dict`.

pub mod emulation;
pub mod json;
pub mod protobuf;
mod raw;
pub mod reply;
pub mod request;

pub use reply::{Push, Reply};
pub use request::Command;

/// The largest command, in bytes.
pub const COMMAND_BYTES_MAX: usize = 64 * 1024;
/// The largest inbound frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 512 * 1024;
/// The most commands in one frame.
pub const COMMANDS_PER_FRAME_MAX: usize = 4096;
/// The most server-side subscriptions that a `connect` may name.
pub const CONNECT_SUBS_MAX: usize = 64;
/// The most headers that a `connect` may carry.
pub const CONNECT_HEADERS_MAX: usize = 64;

/// A frame that is not what the protocol allows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not JSON or Protobuf of the protocol's shape.
    #[error("malformed frame")]
    Malformed,
    /// A command or frame over its bound.
    #[error("frame or command too large")]
    TooLarge,
    /// More commands, subscriptions or headers than their bound.
    #[error("too many parts")]
    TooMany,
}

/// The two encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Text frames.
    Json,
    /// Binary frames.
    Protobuf,
}

impl Encoding {
    /// Decodes a frame into its commands.
    pub fn decode_commands(self, frame: &bytes::Bytes) -> Result<Vec<Command>, DecodeError> {
        if frame.len() > FRAME_BYTES_MAX {
            return Err(DecodeError::TooLarge);
        }
        match self {
            Self::Json => json::decode_commands(frame),
            Self::Protobuf => protobuf::decode_commands(frame),
        }
    }

    /// Encodes one reply, without its delimiter in JSON and with it in Protobuf.
    pub fn encode_reply(self, reply: &Reply) -> Result<bytes::Bytes, EncodeError> {
        match self {
            Self::Json => json::encode_reply(reply),
            Self::Protobuf => Ok(protobuf::encode_reply(reply)),
        }
    }
}

/// Data that is not JSON was due to a client that speaks JSON (disconnect 3506).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("data is not JSON")]
pub struct EncodeError;
