//! A signed body may still hold anything; so may an answer of the provider.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use patchbay_connectors::{Connector as _, whatsapp::WhatsApp};
use patchbay_protocol::inbound::{ITEM_BYTES_MAX, ItemKind};
use patchbay_protocol::outbound::{CallResult, Verdict};

fuzz_target!(|data: &[u8]| {
    let none = |_: &str| None;
    let credentials = serde_json::json!({"app_secret": "s", "verify_token": "v", "access_token": "t"});
    assert!(!WhatsApp.verify(&credentials, &none, data), "nobody signed this");
    if let Ok(items) = WhatsApp.parse(data) {
        assert!(!items.is_empty(), "every body is accounted for");
        for item in items.into_iter().take(8) {
            if let ItemKind::Broken { .. } = item.kind {
                // What was kept as it came can be taken again.
                let _ = WhatsApp.replay("1001", &item.raw);
            }
            if let ItemKind::Thread(thread) = item.bounded().kind {
                assert!(!thread.addresses.is_empty(), "a thread has somebody in it");
                assert!(serde_json::to_vec(&thread.event).expect("JSON").len() <= ITEM_BYTES_MAX);
            }
        }
    }
    for status in [200, 400, 429, 500] {
        let answer = CallResult::Answered { status, retry_after: None, body: Bytes::copy_from_slice(data) };
        if let Verdict::Accepted { provider_id, .. } = WhatsApp.classify(&answer) {
            assert!(status == 200 && !provider_id.is_empty(), "taken without an id");
        }
    }
    let _ = WhatsApp.media_location(data);
    let _ = WhatsApp.uploaded(data);
    if let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) {
        let _ = WhatsApp.check_credentials(&value);
        let _ = WhatsApp.challenge(&value, &[("hub.mode".into(), "subscribe".into())]);
    }
});
