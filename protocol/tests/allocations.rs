//! Decoders never allocate more than a small multiple of their input, whatever that is.
#![allow(clippy::unwrap_used, missing_docs)]

use allocation_counter::measure;
use bytes::Bytes;
use patchbay_protocol::client::{COMMANDS_PER_FRAME_MAX, Encoding, FRAME_BYTES_MAX};
use patchbay_protocol::{Content, Entry};

/// Bytes held at the worst moment for each byte of a frame: a command of three bytes is one of about 300 in memory.
const FRAME_MULTIPLE: u64 = 128;
/// The same of a JSON value: an element of two bytes is one of 32 in memory, held twice while its list grows and
/// twice again while its type is found out.
const VALUE_MULTIPLE: u64 = 100;
/// What a decoder may hold in any case.
const ALWAYS: u64 = 16 * 1024;

fn check(what: &str, multiple: u64, input: &Bytes, decode: impl FnOnce(&Bytes)) {
    let held = measure(|| decode(input)).bytes_max;
    let bound = input.len() as u64 * multiple + ALWAYS;
    assert!(held <= bound, "{what}: {held} bytes for {} of input", input.len());
}

fn frame(bytes: impl Into<Vec<u8>>) -> Bytes {
    Bytes::from(bytes.into())
}

#[test]
fn a_frame_costs_a_small_multiple_of_its_size() {
    let n = COMMANDS_PER_FRAME_MAX;
    let subs: Vec<String> = (0..20_000).map(|n| format!("\"{n}\":{{}}")).collect();
    let json = [
        ("pings", "{}\n".repeat(n)),
        ("too many pings", "{}\n".repeat(n * 4)),
        ("small commands", "{\"id\":1,\"ping\":{}}\n".repeat(n)),
        ("connects", "{\"connect\":{}}\n".repeat(n)),
        ("subscriptions in a connect", format!("{{\"connect\":{{\"subs\":{{{}}}}}}}", subs.join(","))),
        ("open arrays", "[".repeat(FRAME_BYTES_MAX)),
        ("nested data", format!("{{\"rpc\":{{\"data\":{}}}}}", "[".repeat(60_000))),
        ("numbers", format!("{{\"rpc\":{{\"data\":[{}0]}}}}", "0,".repeat(30_000))),
        ("unknown fields", format!("{{\"x\":[{}0]}}", "{},".repeat(20_000))),
        ("a long string", format!("{{\"connect\":{{\"token\":\"{}\"}}}}", "\\u0041".repeat(10_000))),
        ("blank lines", "\n".repeat(FRAME_BYTES_MAX)),
    ];
    for (what, text) in json {
        check(what, FRAME_MULTIPLE, &frame(text), |f| drop(Encoding::Json.decode_commands(f)));
    }
    // Lengths that promise more than there is, and nothing but small parts.
    let claim = [&[0x8a, 0x80, 0x04][..], &[0x22, 0xff, 0xff, 0x03]].concat();
    let sub = [3, 0x22, 1, 0x1a];
    let protobuf = [
        ("pings", vec![0; n]),
        ("too many pings", vec![0; FRAME_BYTES_MAX]),
        ("empty connects", [2, 0x22, 0].repeat(n)),
        ("maps of nothing", sub.repeat(n)),
        ("a promised length", claim),
        ("a promised frame", vec![0xff, 0xff, 0xff, 0xff, 0x0f]),
        ("entries of a map", {
            let entries = [0x1a, 2, 0x12, 0].repeat(10_000);
            let connect = [&[0x22][..], &varint(entries.len()), &entries].concat();
            [&varint(connect.len())[..], &connect].concat()
        }),
    ];
    for (what, bytes) in protobuf {
        check(what, FRAME_MULTIPLE, &frame(bytes), |f| drop(Encoding::Protobuf.decode_commands(f)));
    }
}

fn varint(mut n: usize) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(u8::try_from(n & 0x7f).unwrap() | 0x80);
        n >>= 7;
    }
    out.push(u8::try_from(n).unwrap());
    out
}

#[test]
fn contents_and_entries_cost_a_small_multiple_of_their_size() {
    let contents = [
        (
            "components",
            format!(
                r#"{{"type":"template","name":"a","language":"en","components":[{}0]}}"#,
                "0,".repeat(20_000)
            ),
        ),
        ("contacts", format!(r#"{{"type":"contacts","contacts":[{}{{}}]}}"#, "{},".repeat(20_000))),
        ("depth", format!(r#"{{"type":"contacts","contacts":{}}}"#, "[".repeat(60_000))),
    ];
    for (what, text) in contents {
        check(what, VALUE_MULTIPLE, &frame(text), |f| drop(serde_json::from_slice::<Content>(f)));
    }
    let entry = format!(
        r#"{{"seq":1,"at":"2026-11-21T09:00:00Z","type":"message.received","actor":{{"type":"contact","id":"1"}},"data":{{"provider_id":"w","sent_at":"2026-11-21T09:00:00Z","content":{{"type":"text","text":"x"}},"referral":[{}0]}}}}"#,
        "0,".repeat(20_000)
    );
    check("an entry", VALUE_MULTIPLE, &frame(entry), |f| drop(serde_json::from_slice::<Entry>(f)));
}
