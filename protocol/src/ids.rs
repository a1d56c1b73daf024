//! Identities (contract §2): names chosen by users, and ids derived from them so that nobody has to find-or-create.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A name was not of the form `[a-z0-9][a-z0-9_-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must match [a-z0-9][a-z0-9_-]{{0,62}}")]
pub struct InvalidName;

/// Whether `text` may name a tenant, account, agent or inbox.
pub fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    matches!(bytes.len(), 1..=63)
        && first(bytes[0])
        && bytes[1..].iter().all(|&b| first(b) || b == b'_' || b == b'-')
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// A name for what has none: `-`, which nobody can choose.
            pub fn nobody() -> Self {
                Self("-".into())
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                if is_name(text) { Ok(Self(text.into())) } else { Err(InvalidName) }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        crate::text_schema!($type, {"type": "string", "pattern": "^([a-z0-9][a-z0-9_-]{0,62}|-)$"});

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A business that uses the cluster; unique in the cluster. A tenant is a wall (G9).
    TenantId
);
name!(
    /// A channel account (one WhatsApp number, one page, one bot); unique in its tenant.
    AccountId
);
name!(
    /// A person or program that answers customers; unique in its tenant.
    AgentId
);
name!(
    /// A list of conversations that a group of agents works on; unique in its tenant.
    InboxId
);

/// The thread between one contact and one account: 128 bits of BLAKE3 over tenant, account and thread key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConversationId([u8; 16]);

/// Text that is no conversation id: 26 digits of lower-case Crockford base32, the first at most `7`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a conversation id")]
pub struct InvalidConversationId;

const CROCKFORD: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

impl ConversationId {
    /// The id of the thread `thread_key` on `account` of `tenant`.
    ///
    /// ```
    /// # use patchbay_protocol::ids::ConversationId;
    /// let id = ConversationId::derive(&"demo".parse().unwrap(), &"wa".parse().unwrap(), "34600111222");
    /// assert_eq!(id.to_string(), "117hm6cewq8ptd8sg97y11y4xd");
    /// assert_eq!(id.shard(1024), 132);
    /// ```
    pub fn derive(tenant: &TenantId, account: &AccountId, thread_key: &str) -> Self {
        Self(derived([tenant.as_str(), account.as_str(), thread_key]))
    }

    /// The id with these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The id as 16 bytes, big-endian.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The shard out of `shards` (a power of two): the id's first bits.
    pub fn shard(&self, shards: u32) -> u32 {
        first_bits(&self.0, shards)
    }
}

/// First 128 bits of BLAKE3 over the parts, each preceded by its length as u32 big-endian.
pub fn derived<const N: usize>(parts: [&str; N]) -> [u8; 16] {
    // Nearly all are short, and are hashed at once where they were joined.
    let mut joined = [0; 256];
    let mut used = 0;
    let mut long = None;
    for part in parts {
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes();
        for bytes in [&length, part.as_bytes()] {
            match joined.get_mut(used..used + bytes.len()) {
                Some(room) if long.is_none() => {
                    room.copy_from_slice(bytes);
                    used += bytes.len();
                }
                _ => {
                    let hash = long.get_or_insert_with(|| {
                        let mut hash = blake3::Hasher::new();
                        hash.update(&joined[..used]);
                        hash
                    });
                    hash.update(bytes);
                }
            }
        }
    }
    let hash = long.map_or_else(|| blake3::hash(&joined[..used]), |hash| hash.finalize());
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

/// The first `log2(shards)` bits of `id` as a number.
pub fn first_bits(id: &[u8; 16], shards: u32) -> u32 {
    let bits = shards.trailing_zeros();
    if bits == 0 { 0 } else { u32::from_be_bytes([id[0], id[1], id[2], id[3]]) >> (32 - bits) }
}

impl fmt::Display for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut n = u128::from_be_bytes(self.0);
        let mut digits = [0u8; 26];
        for digit in digits.iter_mut().rev() {
            *digit = CROCKFORD[(n & 31) as usize];
            n >>= 5;
        }
        f.write_str(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ConversationId {
    type Err = InvalidConversationId;
    fn from_str(text: &str) -> Result<Self, InvalidConversationId> {
        let bytes = text.as_bytes();
        if bytes.len() != 26 || bytes[0] > b'7' {
            return Err(InvalidConversationId);
        }
        let mut n: u128 = 0;
        for b in bytes {
            let digit = CROCKFORD.iter().position(|c| c == b).ok_or(InvalidConversationId)?;
            n = n << 5 | digit as u128;
        }
        Ok(Self(n.to_be_bytes()))
    }
}

crate::text_schema!(ConversationId, {"type": "string", "pattern": "^[0-7][0-9abcdefghjkmnpqrstvwxyz]{25}$"});

impl Serialize for ConversationId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConversationId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The id that a command is given at the door; its entries keep it, so that a repeat is recognised.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct CommandId(pub [u8; 16]);

/// `<conversation>-<seq>`: the name of an entry, also the opaque callback data of a send.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct EntryId {
    /// The conversation.
    pub conversation: ConversationId,
    /// Its `seq`.
    pub seq: u64,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.conversation, self.seq)
    }
}

impl FromStr for EntryId {
    type Err = InvalidConversationId;
    fn from_str(text: &str) -> Result<Self, InvalidConversationId> {
        let (conversation, seq) = text.split_once('-').ok_or(InvalidConversationId)?;
        let canonical = !seq.is_empty() && seq.bytes().all(|b| b.is_ascii_digit()) && !seq.starts_with('0');
        let seq = if canonical { seq.parse().ok() } else { None };
        Ok(Self { conversation: conversation.parse()?, seq: seq.ok_or(InvalidConversationId)? })
    }
}

crate::text_schema!(EntryId, {"type": "string", "pattern": "^[0-7][0-9abcdefghjkmnpqrstvwxyz]{25}-[0-9]+$"});

impl Serialize for EntryId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EntryId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A virtual actor's name: what kind it is and which one.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum EntityId {
    /// One thread.
    Conversation(ConversationId),
    /// A channel account with its outbound queue.
    Account(TenantId, AccountId),
    /// An agent with its sessions.
    Agent(TenantId, AgentId),
    /// A live list of open conversations.
    Inbox(TenantId, InboxId),
}

impl EntityId {
    /// 16 bytes that name the entity in storage keys and place it on a shard.
    pub fn key(&self) -> [u8; 16] {
        match self {
            Self::Conversation(id) => *id.as_bytes(),
            Self::Account(t, a) => derived(["account", t.as_str(), a.as_str()]),
            Self::Agent(t, a) => derived(["agent", t.as_str(), a.as_str()]),
            Self::Inbox(t, i) => derived(["inbox", t.as_str(), i.as_str()]),
        }
    }

    /// The shard out of `shards` (a power of two).
    pub fn shard(&self, shards: u32) -> u32 {
        first_bits(&self.key(), shards)
    }

    /// The kind, as it stands in metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Conversation(_) => "conversation",
            Self::Account(..) => "account",
            Self::Agent(..) => "agent",
            Self::Inbox(..) => "inbox",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversation_id_is_the_contract_vector_and_round_trips() {
        let id = ConversationId::derive(&"demo".parse().unwrap(), &"wa".parse().unwrap(), "34600111222");
        assert_eq!(id.to_string(), "117hm6cewq8ptd8sg97y11y4xd");
        assert_eq!(id.shard(1024), 132);
        assert_eq!(id.shard(1), 0);
        assert_eq!("117hm6cewq8ptd8sg97y11y4xd".parse(), Ok(id));
    }

    #[test]
    fn a_non_canonical_id_is_refused() {
        for bad in [
            "",
            "117HM6CEWQ8PTD8SG97Y11Y4XD",
            "817hm6cewq8ptd8sg97y11y4xd",
            "117hm6cewq8ptd8sg97y11y4x",
            "i17hm6cewq8ptd8sg97y11y4xd",
        ] {
            assert!(bad.parse::<ConversationId>().is_err(), "{bad}");
        }
        for bad in [
            "117hm6cewq8ptd8sg97y11y4xd-",
            "117hm6cewq8ptd8sg97y11y4xd-01",
            "117hm6cewq8ptd8sg97y11y4xd-+1",
            "x-1",
        ] {
            assert!(bad.parse::<EntryId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_have_one_form() {
        for good in ["a", "0", "wa-1_x", &"a".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "_a", "A", "a.b", "ä", "a b", &"a".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
