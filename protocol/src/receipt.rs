//! Receipts only climb (G6).
//!
//! `pending < unknown < sent < failed < delivered < read`: `failed` beats what came before the provider spoke of
//! delivery, and a proof of delivery beats `failed`. It is a total order, so the state of a message is the maximum
//! of all it was ever told: early, repeated, reordered and omitted receipts give the same state.

use serde::{Deserialize, Serialize};

/// How far a message has come on its way to the customer.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
    Default,
)]
#[serde(rename_all = "lowercase")]
pub enum MessageStatus {
    /// Accepted by us.
    #[default]
    Pending,
    /// Handed to the provider, whose answer we do not know; never sent again blindly (G7).
    Unknown,
    /// Taken by the provider.
    Sent,
    /// Refused, expired or undeliverable.
    Failed,
    /// On the customer's device.
    Delivered,
    /// Seen (or played) by the customer.
    Read,
}

impl MessageStatus {
    /// The state after being told `next`: `Some` when that is news, `None` when it adds nothing.
    #[must_use]
    pub fn climb(self, next: Self) -> Option<Self> {
        (next > self).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::MessageStatus::{self, *};
    use proptest::prelude::*;

    #[test]
    fn every_pair_of_the_guarantee() {
        for (from, to, climbs) in [
            (Pending, Unknown, true),
            (Unknown, Sent, true),
            (Sent, Delivered, true),
            (Delivered, Read, true),
            (Pending, Failed, true),
            (Unknown, Failed, true),
            (Sent, Failed, true),
            (Failed, Delivered, true),
            (Failed, Read, true),
            (Failed, Sent, false),
            (Failed, Unknown, false),
            (Delivered, Failed, false),
            (Read, Failed, false),
            (Read, Delivered, false),
            (Sent, Sent, false),
            (Sent, Unknown, false),
        ] {
            assert_eq!(from.climb(to).is_some(), climbs, "{from:?} -> {to:?}");
        }
    }

    fn any_status() -> impl Strategy<Value = MessageStatus> {
        prop_oneof![Just(Pending), Just(Unknown), Just(Sent), Just(Failed), Just(Delivered), Just(Read)]
    }

    proptest! {
        #[test]
        fn any_order_repetition_and_omission_gives_the_highest(mut told in prop::collection::vec(any_status(), 0..12), seed in any::<u64>()) {
            let fold = |v: &[MessageStatus]| v.iter().fold(Pending, |s, n| s.climb(*n).unwrap_or(s));
            let first = fold(&told);
            prop_assert_eq!(first, told.iter().copied().max().unwrap_or(Pending));
            let half = told.clone();
            told.extend(half);
            let n = told.len().max(1);
            told.rotate_left((seed as usize) % n);
            prop_assert_eq!(fold(&told), first);
        }
    }
}
