//! What a client without a socket of its own sends beside its stream.

use bytes::Bytes;
use prost::Message as _;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{DecodeError, Encoding, FRAME_BYTES_MAX};

/// The largest body of one: its commands may stand in a text, which is longer than they are.
pub const EMULATION_BYTES_MAX: usize = 2 * FRAME_BYTES_MAX + 1024;

/// A frame of commands, and whose it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EmulationRequest {
    /// The node that the answer to `connect` named.
    #[prost(string, tag = "1")]
    pub node: String,
    /// The session that it named: the only credential.
    #[prost(string, tag = "2")]
    pub session: String,
    /// The commands.
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

/// The same as JSON: the commands are a text, as the SDKs write them, or stand there as they are.
#[derive(Deserialize)]
struct Json<'a> {
    #[serde(default)]
    node: String,
    session: String,
    #[serde(borrow)]
    data: &'a RawValue,
}

impl EmulationRequest {
    /// Reads one.
    pub fn decode_as(encoding: Encoding, body: &Bytes) -> Result<Self, DecodeError> {
        if body.len() > EMULATION_BYTES_MAX {
            return Err(DecodeError::TooLarge);
        }
        match encoding {
            Encoding::Protobuf => Self::decode(body.clone()).map_err(|_| DecodeError::Malformed),
            Encoding::Json => {
                let Json { node, session, data } =
                    serde_json::from_slice(body).map_err(|_| DecodeError::Malformed)?;
                let data = match serde_json::from_str::<String>(data.get()) {
                    Ok(text) => Bytes::from(text),
                    Err(_) => Bytes::copy_from_slice(data.get().as_bytes()),
                };
                Ok(Self { node, session, data })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_come_as_a_text_as_they_are_or_as_bytes() {
        let wanted = EmulationRequest {
            node: "n-7".into(),
            session: "s".into(),
            data: Bytes::from_static(b"{\"id\":2}"),
        };
        for body in [
            r#"{"node":"n-7","session":"s","data":"{\"id\":2}"}"#,
            r#"{"node":"n-7","session":"s","data":{"id":2},"later":1}"#,
        ] {
            let body = Bytes::from(body);
            assert_eq!(EmulationRequest::decode_as(Encoding::Json, &body), Ok(wanted.clone()));
        }
        let body = Bytes::from(wanted.encode_to_vec());
        assert_eq!(EmulationRequest::decode_as(Encoding::Protobuf, &body), Ok(wanted));
        for body in ["", "{}", "[]", r#"{"session":"s"}"#, r#"{"data":"x"}"#] {
            let read = EmulationRequest::decode_as(Encoding::Json, &Bytes::from(body));
            assert_eq!(read, Err(DecodeError::Malformed), "{body}");
        }
        let large = Bytes::from(vec![b' '; EMULATION_BYTES_MAX + 1]);
        assert_eq!(EmulationRequest::decode_as(Encoding::Json, &large), Err(DecodeError::TooLarge));
    }
}
