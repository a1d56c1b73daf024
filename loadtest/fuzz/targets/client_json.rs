//! Text frames: whatever decodes is written back and decodes to the same.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use patchbay_protocol::client::{COMMANDS_PER_FRAME_MAX, Encoding, json};

fuzz_target!(|data: &[u8]| {
    if let Ok(commands) = Encoding::Json.decode_commands(&Bytes::copy_from_slice(data)) {
        assert!((1..=COMMANDS_PER_FRAME_MAX).contains(&commands.len()));
        for command in commands {
            let written = json::encode_command(&command).expect("what was JSON stays JSON");
            assert_eq!(json::decode_commands(&written), Ok(vec![command]));
        }
    }
    if let Ok(replies) = json::decode_replies(data) {
        for reply in replies {
            let written = json::encode_reply(&reply).expect("what was JSON stays JSON");
            assert_eq!(json::decode_replies(&written), Ok(vec![reply]));
        }
    }
});
