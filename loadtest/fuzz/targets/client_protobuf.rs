//! Binary frames: whatever decodes is written back and decodes to the same.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use patchbay_protocol::client::{COMMANDS_PER_FRAME_MAX, Encoding, protobuf};

fuzz_target!(|data: &[u8]| {
    let frame = Bytes::copy_from_slice(data);
    if let Ok(commands) = Encoding::Protobuf.decode_commands(&frame) {
        assert!((1..=COMMANDS_PER_FRAME_MAX).contains(&commands.len()));
        for command in commands {
            let written = protobuf::encode_command(&command);
            assert_eq!(protobuf::decode_commands(&written), Ok(vec![command]));
        }
    }
    if let Ok(replies) = protobuf::decode_replies(&frame) {
        for reply in replies {
            assert_eq!(protobuf::decode_replies(&protobuf::encode_reply(&reply)), Ok(vec![reply]));
        }
    }
});
