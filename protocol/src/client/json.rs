//! The JSON encoding: one value a line, several lines a frame.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    COMMAND_BYTES_MAX, COMMANDS_PER_FRAME_MAX, CONNECT_HEADERS_MAX, CONNECT_SUBS_MAX, Command, DecodeError,
    EncodeError, Reply,
};

/// Decodes the commands of a text frame. Blank lines are skipped; an empty frame is malformed.
pub fn decode_commands(frame: &[u8]) -> Result<Vec<Command>, DecodeError> {
    let mut commands = Vec::new();
    for line in frame.split(|b| *b == b'\n') {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if line.len() > COMMAND_BYTES_MAX {
            return Err(DecodeError::TooLarge);
        }
        if commands.len() == COMMANDS_PER_FRAME_MAX {
            return Err(DecodeError::TooMany);
        }
        let command: Command = serde_json::from_slice(line).map_err(|_| DecodeError::Malformed)?;
        if command
            .connect
            .as_ref()
            .is_some_and(|c| c.subs.len() > CONNECT_SUBS_MAX || c.headers.len() > CONNECT_HEADERS_MAX)
        {
            return Err(DecodeError::TooMany);
        }
        commands.push(command);
    }
    if commands.is_empty() { Err(DecodeError::Malformed) } else { Ok(commands) }
}

/// Encodes one command, as a client does.
pub fn encode_command(command: &Command) -> Result<Bytes, EncodeError> {
    serde_json::to_vec(command).map(Bytes::from).map_err(|_| EncodeError)
}

/// Encodes one reply, without a newline.
pub fn encode_reply(reply: &Reply) -> Result<Bytes, EncodeError> {
    serde_json::to_vec(reply).map(Bytes::from).map_err(|_| EncodeError)
}

/// Decodes the replies of a text frame, as a client does.
pub fn decode_replies(frame: &[u8]) -> Result<Vec<Reply>, DecodeError> {
    let lines = frame.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(|_| DecodeError::Malformed)).collect()
}

/// Encodes a publication push without building a [`Reply`]: `data` must be one JSON value on one line.
pub fn encode_publication(channel: &str, data: &[u8], offset: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(data.len() + channel.len() + 64);
    out.put_slice(br#"{"push":{"channel":"#);
    // A channel name is text: writing it as a JSON string cannot fail.
    out.put_slice(serde_json::to_string(channel).unwrap_or_default().as_bytes());
    out.put_slice(br#","pub":{"data":"#);
    out.put_slice(data);
    if offset > 0 {
        out.put_slice(br#","offset":"#);
        out.put_slice(offset.to_string().as_bytes());
    }
    out.put_slice(b"}}}");
    out.freeze()
}
