//! The scheduler, decided by hand: no store, no clock, no provider.

use std::time::Duration;

use patchbay_connectors::SendLimits;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::ids::{ConversationId, EntryId};
use patchbay_protocol::outbound::{Backoff, Lane, Outbound, Payload, Recipient, Verdict};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::{Content, Timestamp};

use super::commands::{self, AccountCommand};
use super::entity::Effect;
use super::state::State;
use crate::shard::entity::{Found, Now};

struct World {
    state: State,
    seq: u64,
    now: Timestamp,
}

const DAY: Duration = Duration::from_secs(24 * 3600);

fn world() -> World {
    let limits = SendLimits { account_per_second: 10.0, pair_burst: 2.0, pair_per_second: 1.0 / 6.0 };
    let now = Timestamp::parse("2026-11-21T09:00:00Z").unwrap();
    World { state: State::fresh(limits, DAY), seq: 0, now }
}

fn entry(to: &str, seq: u64) -> EntryId {
    EntryId { conversation: ConversationId::derive(&"t".parse().unwrap(), &"wa".parse().unwrap(), to), seq }
}

fn message(to: &str, seq: u64, lane: Lane, at: Timestamp) -> Box<Outbound> {
    let recipient = Recipient { address: to.into(), user_id: None };
    let payload = Payload::Message(Content::Text { text: "x".into() });
    Box::new(Outbound {
        entry: entry(to, seq),
        at,
        thread: to.into(),
        recipient,
        payload,
        reply_to: None,
        lane,
    })
}

impl World {
    /// Decides and applies; what is called, and what is told.
    fn ask(&mut self, command: AccountCommand) -> (Vec<EntryId>, Vec<(EntryId, MessageStatus)>) {
        let now = Now { at: self.now, next_seq: self.seq + 1 };
        let decision = commands::decide(&self.state, &Found::default(), &command, &now)
            .unwrap_or_else(|e| panic!("{e}"));
        for record in &decision.entries {
            self.seq += 1;
            self.state.apply(self.seq, record);
        }
        let (mut called, mut told) = (vec![], vec![]);
        for effect in decision.effects {
            match effect {
                Effect::Call(outbound) => called.push(outbound.entry),
                Effect::Tell { entry, update } => told.push((entry, update.status)),
                Effect::Place { .. } | Effect::Bury { .. } | Effect::Signal(_) => {}
            }
        }
        (called, told)
    }

    fn enqueue(&mut self, to: &str, seq: u64, lane: Lane) -> Vec<EntryId> {
        self.ask(AccountCommand::Enqueue(message(to, seq, lane, self.now))).0
    }

    fn called(&mut self, entry: EntryId, verdict: Verdict) -> Vec<(EntryId, MessageStatus)> {
        self.ask(AccountCommand::Called { entry, verdict, jitter: 1.0 }).1
    }

    fn wake(&mut self) -> Vec<EntryId> {
        self.ask(AccountCommand::Wake).0
    }

    fn accept(&mut self, entry: EntryId) {
        let told =
            self.called(entry, Verdict::Accepted { provider_id: format!("w{}", entry.seq), aliases: vec![] });
        assert_eq!(told, [(entry, MessageStatus::Sent)]);
        self.ask(AccountCommand::Told { entry });
    }

    fn later(&mut self, d: Duration) {
        self.now = self.now.plus(d);
    }
}

fn error() -> ProviderError {
    ProviderError { code: "1".into(), title: String::new(), retryable: true }
}

#[test]
fn one_recipient_is_called_one_at_a_time_in_order() {
    let mut w = world();
    assert_eq!(w.enqueue("a", 1, Lane::Agent), [entry("a", 1)], "at once where nothing makes it wait");
    assert!(w.enqueue("a", 2, Lane::Agent).is_empty());
    assert!(w.enqueue("a", 2, Lane::Agent).is_empty(), "a repeat adds nothing");
    assert!(w.wake().is_empty(), "one call in flight");
    assert_eq!(w.enqueue("b", 1, Lane::Agent), [entry("b", 1)], "another recipient does not wait");
    w.accept(entry("a", 1));
    assert_eq!(w.wake(), [entry("a", 2)]);
    w.accept(entry("a", 2));
    // The pair's burst is used up: the third waits, and holds back those behind it.
    assert!(w.enqueue("a", 3, Lane::Agent).is_empty());
    assert!(w.enqueue("a", 4, Lane::Agent).is_empty());
    assert!(w.wake().is_empty());
    w.later(Duration::from_secs(7));
    assert_eq!(w.wake(), [entry("a", 3)]);
}

#[test]
fn agents_go_before_automation_before_bulk() {
    let mut w = world();
    w.ask(AccountCommand::Event(Box::new(patchbay_protocol::inbound::AccountEvent {
        kind: "ban".into(),
        data: serde_json::Value::Null,
        pauses: Some("ban".into()),
    })));
    for (to, lane) in [("bulk", Lane::Bulk), ("auto", Lane::Automation), ("agent", Lane::Agent)] {
        assert!(w.enqueue(to, 1, lane).is_empty(), "paused: nothing is called");
    }
    assert!(w.wake().is_empty());
    w.ask(AccountCommand::Resume);
    assert_eq!(w.wake(), [entry("agent", 1), entry("auto", 1), entry("bulk", 1)]);
}

#[test]
fn the_numbers_bucket_bounds_a_second() {
    let mut w = world();
    let at_once: usize = (0..30).map(|n| w.enqueue(&format!("c{n}"), 1, Lane::Agent).len()).sum();
    assert_eq!(at_once, 10);
    assert!(w.wake().is_empty());
    w.later(Duration::from_millis(500));
    assert_eq!(w.wake().len(), 5);
}

#[test]
fn retryable_refusals_wait_by_their_scope() {
    let mut w = world();
    w.enqueue("a", 1, Lane::Agent);
    let retry = |scope, after_ms| Verdict::Retry { error: error(), after_ms: Some(after_ms), scope };
    assert!(
        w.called(entry("a", 1), retry(Backoff::Account, 60_000)).is_empty(),
        "the conversation is not told of a try"
    );
    assert!(w.enqueue("b", 1, Lane::Agent).is_empty(), "Retry-After holds back the whole account");
    w.later(Duration::from_secs(59));
    assert!(w.wake().is_empty());
    w.later(Duration::from_secs(2));
    assert_eq!(w.wake().len(), 2);
    w.called(entry("a", 1), retry(Backoff::Message, 0));
    assert!(w.wake().is_empty(), "exponential back-off without a word of the provider");
    w.later(Duration::from_secs(8));
    assert_eq!(w.wake(), [entry("a", 1)]);
}

#[test]
fn what_was_called_and_not_answered_is_unknown_to_whoever_comes_after() {
    let mut w = world();
    w.enqueue("a", 1, Lane::Agent);
    w.enqueue("a", 2, Lane::Agent);
    w.ask(AccountCommand::Event(Box::new(patchbay_protocol::inbound::AccountEvent {
        kind: "ban".into(),
        data: serde_json::Value::Null,
        pauses: Some("ban".into()),
    })));
    // A crash, an hour, and the number still paused.
    w.later(Duration::from_secs(3600));
    let frozen = serde_json::to_vec(&w.state.freeze()).unwrap();
    let limits = SendLimits { account_per_second: 10.0, pair_burst: 2.0, pair_per_second: 1.0 };
    w.state = State::thaw(serde_json::from_slice(&frozen).unwrap(), limits, DAY);
    let (called, told) = w.ask(AccountCommand::Loaded);
    assert_eq!((called, told), (vec![], vec![(entry("a", 1), MessageStatus::Unknown)]));
    w.ask(AccountCommand::Told { entry: entry("a", 1) });
    assert!(w.wake().is_empty(), "paused");
    w.ask(AccountCommand::Resume);
    assert_eq!(w.wake(), [entry("a", 2)], "what was accepted and not tried is sent, what was tried is not");
    // The answer that came too late can only climb.
    let late = w.called(entry("a", 1), Verdict::Accepted { provider_id: "w".into(), aliases: vec![] });
    assert_eq!(late, [(entry("a", 1), MessageStatus::Sent)]);
}

#[test]
fn nothing_stays_pending_for_longer_than_a_day() {
    let mut w = world();
    w.enqueue("a", 1, Lane::Agent);
    w.enqueue("a", 2, Lane::Agent);
    w.called(entry("a", 1), Verdict::Paused { error: error() });
    assert_eq!(w.state.next_due(w.now, 64), Some(w.now.plus(DAY)), "paused: only the expiry is due");
    w.later(DAY);
    let (called, mut told) = w.ask(AccountCommand::Wake);
    told.sort();
    assert!(called.is_empty());
    assert_eq!(told.iter().map(|(_, s)| *s).collect::<Vec<_>>(), [MessageStatus::Failed; 2]);
    for (entry, _) in told {
        w.ask(AccountCommand::Told { entry });
    }
    assert!(w.state.sends.is_empty());
    assert_eq!(w.state.next_due(w.now, 64), None);
}
