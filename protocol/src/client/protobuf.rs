//! The Protobuf encoding: each command and reply preceded by its length as a varint, several a frame.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

use super::reply::{Publication, Push};
use super::{
    COMMAND_BYTES_MAX, COMMANDS_PER_FRAME_MAX, CONNECT_HEADERS_MAX, CONNECT_SUBS_MAX, Command, DecodeError,
    Reply,
};

/// Decodes the commands of a binary frame.
pub fn decode_commands(frame: &Bytes) -> Result<Vec<Command>, DecodeError> {
    let mut commands = Vec::new();
    split(frame, |part| {
        if part.len() > COMMAND_BYTES_MAX {
            return Err(DecodeError::TooLarge);
        }
        if part.is_empty() && commands.last().is_some_and(Command::is_pong) {
            // Pings' answers by the thousand say no more than one.
            return Ok(());
        }
        if commands.len() == COMMANDS_PER_FRAME_MAX {
            return Err(DecodeError::TooMany);
        }
        check_counts(&part)?;
        commands.push(Command::decode(part).map_err(|_| DecodeError::Malformed)?);
        Ok(())
    })?;
    if commands.is_empty() { Err(DecodeError::Malformed) } else { Ok(commands) }
}

/// Decodes the replies of a binary frame, as a client does.
pub fn decode_replies(frame: &Bytes) -> Result<Vec<Reply>, DecodeError> {
    let mut replies = Vec::new();
    split(frame, |part| {
        replies.push(Reply::decode(part).map_err(|_| DecodeError::Malformed)?);
        Ok(())
    })?;
    Ok(replies)
}

/// Encodes one command with its length, as a client does.
pub fn encode_command(command: &Command) -> Bytes {
    command.encode_length_delimited_to_vec().into()
}

/// Encodes one reply with its length.
pub fn encode_reply(reply: &Reply) -> Bytes {
    reply.encode_length_delimited_to_vec().into()
}

/// Encodes a publication push with its length.
pub fn encode_publication(channel: &str, data: &Bytes, offset: u64) -> Bytes {
    let publication = Publication { data: data.clone(), offset, ..Publication::default() };
    let push = Push { channel: channel.to_owned(), publication: Some(publication), ..Push::default() };
    let reply = Reply { push: Some(push), ..Reply::default() };
    let mut out = BytesMut::with_capacity(reply.encoded_len() + 4);
    // Only a buffer that cannot grow fails here.
    let _ = reply.encode_length_delimited(&mut out);
    out.freeze()
}

/// Cuts a frame at its lengths.
fn split(frame: &Bytes, mut each: impl FnMut(Bytes) -> Result<(), DecodeError>) -> Result<(), DecodeError> {
    let mut rest = frame.clone();
    while rest.has_remaining() {
        let length = varint(&mut rest).ok_or(DecodeError::Malformed)?;
        let length = usize::try_from(length).map_err(|_| DecodeError::TooLarge)?;
        if length > rest.len() {
            return Err(DecodeError::Malformed);
        }
        each(rest.split_to(length))?;
    }
    Ok(())
}

/// Counts the map entries of a `connect` before anything is allocated for them.
fn check_counts(command: &Bytes) -> Result<(), DecodeError> {
    const CONNECT: u64 = 4;
    const SUBS: u64 = 3;
    const HEADERS: u64 = 6;
    let (mut subs, mut headers) = (0usize, 0usize);
    walk(command.clone(), |field, part| {
        if field != CONNECT {
            return Ok(());
        }
        walk(part, |field, _| {
            subs += usize::from(field == SUBS);
            headers += usize::from(field == HEADERS);
            if subs > CONNECT_SUBS_MAX || headers > CONNECT_HEADERS_MAX {
                Err(DecodeError::TooMany)
            } else {
                Ok(())
            }
        })
    })
}

/// Visits the length-delimited fields of a message, one level deep.
fn walk(
    mut message: Bytes,
    mut each: impl FnMut(u64, Bytes) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    while message.has_remaining() {
        let tag = varint(&mut message).ok_or(DecodeError::Malformed)?;
        let skip = match tag & 7 {
            0 => {
                varint(&mut message).ok_or(DecodeError::Malformed)?;
                0
            }
            1 => 8,
            2 => {
                let n = varint(&mut message)
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or(DecodeError::Malformed)?;
                if n > message.len() {
                    return Err(DecodeError::Malformed);
                }
                each(tag >> 3, message.split_to(n))?;
                0
            }
            5 => 4,
            // Groups are no part of this protocol.
            _ => return Err(DecodeError::Malformed),
        };
        if skip > message.len() {
            return Err(DecodeError::Malformed);
        }
        message.advance(skip);
    }
    Ok(())
}

fn varint(buf: &mut Bytes) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        if !buf.has_remaining() {
            return None;
        }
        let byte = buf.get_u8();
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
