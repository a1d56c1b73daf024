//! Entries as they are stored and pushed: read, written and read again, the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use patchbay_protocol::entry::Entry;

fuzz_target!(|data: &[u8]| {
    let Ok(entry) = serde_json::from_slice::<Entry>(data) else { return };
    let written = serde_json::to_vec(&entry).expect("an entry is JSON");
    let again: Entry = serde_json::from_slice(&written).expect("what was written is read");
    assert_eq!(again, entry);
});
