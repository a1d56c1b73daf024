//! Every stored value begins with a format version and a key id (0: plain), so that encryption at rest comes later
//! without a second format.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::engine::ReadError;

const FORMAT: u8 = 1;
const PLAIN: u32 = 0;

/// Puts the header before what `fill` writes.
pub(crate) fn seal(capacity: usize, fill: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(5 + capacity);
    out.put_u8(FORMAT);
    out.put_u32(PLAIN);
    fill(&mut out);
    out.freeze()
}

/// Takes the header off.
pub(crate) fn open(value: &Bytes) -> Result<Bytes, ReadError> {
    let mut rest = value.clone();
    if rest.len() < 5 || rest.get_u8() != FORMAT || rest.get_u32() != PLAIN {
        return Err(ReadError::Damaged);
    }
    Ok(rest)
}
