//! How rows and documents lie in fjall: the partition's length, the partition, the clustering; the stamp before the
//! value.

use std::ops::Bound;

use bytes::{BufMut, Bytes};
use fjall::Slice;

use crate::engine::{Document, DocumentKey, ReadError, Row, Scan};
use crate::stamp::Stamp;

pub(super) fn prefix(partition: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(2 + partition.len() + 32);
    key.put_u16(u16::try_from(partition.len()).unwrap_or(u16::MAX));
    key.put_slice(partition);
    key
}

pub(super) fn row(partition: &[u8], clustering: &[u8]) -> Vec<u8> {
    let mut key = prefix(partition);
    key.put_slice(clustering);
    key
}

/// A row, made in `room`, which serves one row after the other.
pub(super) fn slices(
    room: &mut Vec<u8>,
    partition: &[u8],
    clustering: &[u8],
    stamp: Stamp,
    value: &[u8],
) -> (Slice, Slice) {
    room.clear();
    room.put_u16(u16::try_from(partition.len()).unwrap_or(u16::MAX));
    room.put_slice(partition);
    room.put_slice(clustering);
    let key = Slice::from(room.as_slice());
    room.clear();
    room.put_u64(stamp.as_u64());
    room.put_slice(value);
    (key, Slice::from(room.as_slice()))
}

pub(super) fn decode(clustering: Bytes, stored: &[u8]) -> Result<Row, ReadError> {
    let (stamp, value) = stored.split_first_chunk::<8>().ok_or(ReadError::Damaged)?;
    Ok(Row {
        clustering,
        stamp: Stamp::from_u64(u64::from_be_bytes(*stamp)),
        value: Bytes::copy_from_slice(value),
    })
}

pub(super) fn range(scan: &Scan) -> (Bound<Vec<u8>>, Bound<Vec<u8>>) {
    let place = |b: &Bound<Bytes>| match b {
        Bound::Included(c) => Some(Bound::Included(row(&scan.partition, c))),
        Bound::Excluded(c) => Some(Bound::Excluded(row(&scan.partition, c))),
        Bound::Unbounded => None,
    };
    let low = place(&scan.from).unwrap_or_else(|| Bound::Included(prefix(&scan.partition)));
    let high = place(&scan.to).unwrap_or_else(|| after(prefix(&scan.partition)));
    (low, high)
}

/// The first key behind everything that begins with `prefix`.
pub(super) fn after(mut prefix: Vec<u8>) -> Bound<Vec<u8>> {
    while let Some(last) = prefix.pop() {
        if last < u8::MAX {
            prefix.push(last + 1);
            return Bound::Excluded(prefix);
        }
    }
    Bound::Unbounded
}

pub(super) fn document_prefix(scope: &str, kind: &str) -> Vec<u8> {
    [scope.as_bytes(), &[0], kind.as_bytes(), &[0]].concat()
}

pub(super) fn document(key: &DocumentKey) -> Vec<u8> {
    let mut out = document_prefix(&key.scope, key.kind);
    out.put_slice(key.id.as_bytes());
    out
}

/// A deleted document keeps its version, so that versions never repeat.
pub(super) fn encode_document(version: u64, value: Option<&Bytes>) -> Vec<u8> {
    let mut out = Vec::with_capacity(9 + value.map_or(0, Bytes::len));
    out.put_u64(version);
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        out.put_slice(value);
    }
    out
}

pub(super) fn decode_document(stored: &[u8]) -> Option<(u64, Option<Document>)> {
    let (version, rest) = stored.split_first_chunk::<8>()?;
    let version = u64::from_be_bytes(*version);
    let (&there, value) = rest.split_first()?;
    Some((version, (there == 1).then(|| Document { version, value: Bytes::copy_from_slice(value) })))
}
