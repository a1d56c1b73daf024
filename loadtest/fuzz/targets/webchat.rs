//! What a visitor may write, and what the business may write to one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use patchbay_connectors::{Connector as _, webchat};
use patchbay_protocol::Content;

fuzz_target!(|data: &[u8]| {
    if let Ok(content) = serde_json::from_slice::<Content>(data) {
        if webchat::check_inbound(&content).is_ok() {
            assert!(serde_json::to_vec(&content).is_ok());
        }
        let _ = webchat::WebChat.check(&content);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(visitor) = webchat::WebChat.recipient(text)
    {
        assert_eq!(visitor, text);
    }
});
