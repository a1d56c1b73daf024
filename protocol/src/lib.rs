//! Every format of ours that crosses a wire or reaches a disk.
//!
//! **Lives here:** identities and how they are derived ([`ids`]), entries and contents of a conversation
//! ([`entry`], [`content`]), commands with one request and one reply type each ([`command`]), error and disconnect
//! codes in one table ([`codes`]), entries as they are published ([`event`]), the Centrifuge client protocol in JSON and Protobuf ([`client`]), who is asking
//! ([`principal`]).
//!
//! **Does not live here:** I/O, async code, actors, clocks, random numbers, provider formats (see `connectors/`).
//!
//! Invariant: decoding never panics and never allocates more than a small multiple of its input.
//! Invariant: what one version wrote, the same version reads back unchanged (`tests/`).
//! Invariant: unknown fields of protocol frames are ignored; unknown fields of our own commands are refused by name.

/// The JSON Schema of a type that travels as text.
macro_rules! text_schema {
    ($type:ident, $schema:tt) => {
        impl schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!($schema)
            }
        }
    };
}
pub(crate) use text_schema;

pub mod client;
pub mod codes;
pub mod command;
pub mod content;
pub mod entry;
pub mod event;
pub mod ids;
pub mod inbound;
pub mod outbound;
pub mod principal;
pub mod receipt;
pub mod summary;
pub mod timestamp;

pub use codes::{CommandError, Disconnect, ErrorCode};
pub use content::Content;
pub use entry::{Actor, ActorType, Body, Entry};
pub use ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};
pub use timestamp::Timestamp;
