//! Bodies of rpc methods and of the admin API: refused with a reason, or read and written back unchanged.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use patchbay_protocol::command::{
    AddNote, AssignConversation, DeleteMessage, EditMessage, ReactMessage, ReadConversation, SendMessage,
    SetTyping, SnoozeConversation, TagConversation, parse,
};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, TenantId};
use patchbay_protocol::timestamp::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn both_ways<T: DeserializeOwned + Serialize + PartialEq + Debug>(data: &[u8]) {
    match parse::<T>(data) {
        Ok(value) => {
            let written = serde_json::to_vec(&value).expect("a command is JSON");
            assert_eq!(parse::<T>(&written).expect("what was written is read"), value);
        }
        Err(refused) => assert!(!format!("{refused:?}").is_empty()),
    }
}

fuzz_target!(|data: &[u8]| {
    both_ways::<SendMessage>(data);
    both_ways::<EditMessage>(data);
    both_ways::<DeleteMessage>(data);
    both_ways::<ReactMessage>(data);
    both_ways::<ReadConversation>(data);
    both_ways::<AssignConversation>(data);
    both_ways::<SnoozeConversation>(data);
    both_ways::<TagConversation>(data);
    both_ways::<AddNote>(data);
    both_ways::<SetTyping>(data);
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<ConversationId>() {
        assert_eq!(id.to_string().parse::<ConversationId>().ok(), Some(id));
    }
    if let Ok(id) = text.parse::<TenantId>() {
        assert_eq!(id.to_string(), text);
    }
    let _ = text.parse::<AccountId>();
    let _ = text.parse::<AgentId>();
    if let Some(at) = Timestamp::parse(text) {
        assert_eq!(Timestamp::parse(&at.to_string()), Some(at));
    }
});
