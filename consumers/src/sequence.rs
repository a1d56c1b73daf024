//! What was seen of each conversation, so that a repeat is passed over and a gap is said.

use std::collections::{HashMap, VecDeque};

use patchbay_protocol::ids::{ConversationId, TenantId};

/// Conversations that are remembered; past it the one that was first seen is forgotten, and begins anew.
pub const CONVERSATIONS_MAX: usize = 200_000;

/// How an event stands to what was seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The next one, or the first that is seen of its conversation.
    Next,
    /// It was seen before.
    Repeat,
    /// So many are missing before it.
    Gap(u64),
}

/// The highest seq that was seen of each conversation.
#[derive(Debug, Default)]
pub struct Sequences {
    seen: HashMap<(TenantId, ConversationId), u64>,
    order: VecDeque<(TenantId, ConversationId)>,
    max: usize,
}

impl Sequences {
    /// Remembers at most so many conversations.
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), ..Self::default() }
    }

    /// How an event stands to what was seen.
    pub fn place(&self, tenant: &TenantId, conversation: ConversationId, seq: u64) -> Place {
        match self.seen.get(&(tenant.clone(), conversation)) {
            None => Place::Next,
            Some(last) if seq <= *last => Place::Repeat,
            Some(last) if seq == last + 1 => Place::Next,
            Some(last) => Place::Gap(seq - last - 1),
        }
    }

    /// It had its effect.
    pub fn note(&mut self, tenant: &TenantId, conversation: ConversationId, seq: u64) {
        let key = (tenant.clone(), conversation);
        if let Some(last) = self.seen.get_mut(&key) {
            *last = seq.max(*last);
            return;
        }
        if self.seen.len() >= self.max
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        self.order.push_back(key.clone());
        self.seen.insert(key, seq);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_repeats_are_told_by_conversation_and_seq() {
        let mut seen = Sequences::new(2);
        let tenant: TenantId = "t".parse().unwrap();
        let (a, b, c) = ([1; 16], [2; 16], [3; 16]);
        let id = ConversationId::from_bytes;
        assert_eq!(seen.place(&tenant, id(a), 5), Place::Next, "nobody knows what was before");
        seen.note(&tenant, id(a), 5);
        assert_eq!(seen.place(&tenant, id(a), 6), Place::Next);
        assert_eq!(seen.place(&tenant, id(a), 5), Place::Repeat);
        assert_eq!(seen.place(&tenant, id(a), 9), Place::Gap(3));
        seen.note(&tenant, id(b), 1);
        seen.note(&tenant, id(c), 1);
        assert_eq!(seen.place(&tenant, id(a), 5), Place::Next, "forgotten");
        assert_eq!(seen.place(&"u".parse().unwrap(), id(b), 1), Place::Next, "another tenant's");
    }
}
