//! What can be asked of an account, and what it decides. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use patchbay_protocol::CommandError;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::ids::{AccountId, ConversationId, EntryId, TenantId};
use patchbay_protocol::inbound::{AccountEvent, Address, AddressKind, StatusUpdate};
use patchbay_protocol::outbound::{Outbound, Signal, Verdict};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::timestamp::Timestamp;
use patchbay_storage::tables::{DeadLetter, Tables};
use serde::{Deserialize, Serialize};

use super::entity::{Account, Effect};
use super::log::{AccountEntry, Record, address_id, send_id};
use super::pacing;
use super::state::{Phase, State};
use crate::shard::entity::{Decision, Found, Lookup, Now};

/// Calls in flight of one account.
pub const IN_FLIGHT_MAX: usize = 64;
/// Sends that one decision begins.
const CHOSEN_MAX: usize = 32;
/// Receipts that one account keeps.
const KEPT_MAX: usize = 10_000;
/// How long a receipt is kept.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);
/// Our code for a call that made no connection.
pub const NOT_SENT: &str = "not_sent";

/// What can be asked of an account.
#[derive(Debug, Serialize, Deserialize)]
pub enum AccountCommand {
    /// Whose thread these addresses are; all of them become aliases of it.
    Resolve {
        /// The addresses; the first would become the thread key.
        addresses: Vec<Address>,
    },
    /// Whose thread this address is, if anybody's. Writes nothing.
    Find {
        /// The addresses.
        addresses: Vec<Address>,
    },
    /// A conversation hands over a message.
    Enqueue(Box<Outbound>),
    /// A receipt that its conversation does not know.
    Keep {
        /// Whose.
        tenant: TenantId,
        /// Whose.
        account: AccountId,
        /// The receipt.
        receipt: Box<KeptReceipt>,
    },
    /// Something about the account as a whole.
    Event(Box<AccountEvent>),
    /// An item that could not be taken.
    DeadLetter {
        /// Whose.
        tenant: TenantId,
        /// The item.
        letter: Box<DeadLetter>,
        /// The seq that kept it, when it is a receipt whose day is over.
        kept: Option<u64>,
    },
    /// Somebody has looked at an item and lets go of it.
    DropDeadLetter {
        /// Whose.
        tenant: TenantId,
        /// Which.
        id: String,
    },
    /// A signal to the customer; not retried.
    Signal(Signal),
    /// Somebody has acted: calls may go on.
    Resume,
    /// How it is. Writes nothing.
    Status,
    /// The tip of its log. Writes nothing.
    Tip,
    /// A call was answered (or not).
    Called {
        /// Which.
        entry: EntryId,
        /// What it means.
        verdict: Verdict,
        /// 0 to 1.
        jitter: f64,
    },
    /// The conversation has the outcome.
    Told {
        /// Which.
        entry: EntryId,
    },
    /// A kept receipt has found its message.
    Placed {
        /// The seq that kept it.
        kept: u64,
    },
    /// The account was loaded: what was called and not answered is unknown.
    Loaded,
    /// Time has passed.
    Wake,
}

/// A receipt to be kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptReceipt {
    /// The conversation, where that is known.
    pub conversation: Option<ConversationId>,
    /// The message's seq, where that is known.
    pub message_seq: Option<u64>,
    /// The receipt.
    pub update: StatusUpdate,
}

/// Whose thread addresses are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadReply {
    /// The thread key.
    pub thread: String,
    /// Another thread that the same addresses lead to.
    pub other: Option<String>,
}

/// What an account answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AccountReply {
    /// Durable.
    Taken,
    /// To [`AccountCommand::Resolve`] and [`AccountCommand::Find`].
    Thread(Option<ThreadReply>),
    /// To [`AccountCommand::Tip`].
    Tip(u64),
    /// To [`AccountCommand::Status`].
    Status {
        /// Why nothing is called, if so.
        paused: Option<String>,
        /// Unsettled sends.
        unsettled: usize,
        /// Those of them that are being called, or whose outcome is being told.
        under_way: usize,
        /// Messages that the provider's limit lets go at once now.
        left: u32,
        /// Messages a second that it lets go in the long run.
        per_second: u32,
    },
}

type Outcome = Result<Decision<Account>, CommandError>;

pub(super) fn lookups(found: &Found<Record>, command: &AccountCommand) -> Vec<Lookup> {
    match command {
        AccountCommand::Resolve { addresses } | AccountCommand::Find { addresses } => {
            let mut wanted: Vec<Lookup> = addresses.iter().map(|a| Lookup::Id(address_id(a))).collect();
            // Where they disagree, the threads' ages decide.
            let known: BTreeSet<&str> = addresses.iter().filter_map(|a| thread_of(found, a)).collect();
            if known.len() > 1 {
                wanted
                    .extend(known.into_iter().flat_map(first_addresses).map(|a| Lookup::Id(address_id(&a))));
            }
            wanted
        }
        AccountCommand::Called { verdict: Verdict::Accepted { aliases, .. }, .. } => {
            aliases.iter().map(|a| Lookup::Id(address_id(a))).collect()
        }
        AccountCommand::Enqueue(outbound) => vec![Lookup::Id(send_id(outbound.entry))],
        _ => vec![],
    }
}

pub(super) fn decide(state: &State, found: &Found<Record>, command: &AccountCommand, now: &Now) -> Outcome {
    match command {
        AccountCommand::Resolve { addresses } => resolve(found, addresses, now),
        AccountCommand::Find { addresses } => {
            Ok(Decision::reply(AccountReply::Thread(threads(found, addresses))))
        }
        AccountCommand::Enqueue(outbound) => enqueue(state, found, outbound, now),
        AccountCommand::Keep { tenant, account, receipt } => Ok(keep(state, tenant, account, receipt, now)),
        AccountCommand::Event(event) => Ok(entries(now, [AccountEntry::Event((**event).clone())])),
        AccountCommand::DeadLetter { tenant, letter, kept } => {
            Ok(dead_letter(state, tenant, letter, *kept, now))
        }
        AccountCommand::DropDeadLetter { tenant, id } => {
            let (tenant, id) = (tenant.clone(), id.clone());
            let mut decision = Decision::reply(AccountReply::Taken);
            decision
                .writes
                .push(Box::new(move |key, stamp| Tables::dead_letter_delete(key.shard, stamp, &tenant, &id)));
            Ok(decision)
        }
        AccountCommand::Signal(signal) => {
            Ok(Decision::reply(AccountReply::Taken).effect(Effect::Signal(signal.clone())))
        }
        AccountCommand::Resume if state.paused.is_some() => Ok(entries(now, [AccountEntry::Resumed {}])),
        AccountCommand::Resume => Ok(Decision::reply(AccountReply::Taken)),
        AccountCommand::Status => Ok(Decision::reply(state.status(now.at))),
        AccountCommand::Tip => Ok(Decision::reply(AccountReply::Tip(now.next_seq - 1))),
        AccountCommand::Called { entry, verdict, jitter } => {
            called(state, found, *entry, verdict, *jitter, now)
        }
        AccountCommand::Told { entry } => Ok(told(state, *entry, now)),
        AccountCommand::Placed { kept } => {
            let there = state.kept.contains_key(kept);
            Ok(entries(now, there.then_some(AccountEntry::Released { kept: *kept })))
        }
        AccountCommand::Loaded => Ok(loaded(state, now)),
        AccountCommand::Wake => wake(state, now),
    }
}

fn record(now: &Now, body: AccountEntry) -> Record {
    Record { at: now.at, body }
}

fn entries(now: &Now, bodies: impl IntoIterator<Item = AccountEntry>) -> Decision<Account> {
    Decision::entries(bodies.into_iter().map(|b| record(now, b)).collect(), AccountReply::Taken)
}

fn alias<'a>(found: &'a Found<Record>, address: &Address) -> Option<(u64, &'a str)> {
    match found.id(address_id(address))? {
        (seq, Record { body: AccountEntry::AliasAdded { thread, .. }, .. }) => Some((seq, thread)),
        _ => None,
    }
}

fn thread_of<'a>(found: &'a Found<Record>, address: &Address) -> Option<&'a str> {
    alias(found, address).map(|(_, thread)| thread)
}

/// The address that a thread's key was, whatever kind it is of: its alias is as old as the thread.
fn first_addresses(thread: &str) -> impl Iterator<Item = Address> {
    let kinds = [AddressKind::WaId, AddressKind::UserId, AddressKind::ParentUserId, AddressKind::Group];
    kinds.into_iter().map(move |kind| Address { kind, value: thread.to_owned() })
}

/// Where known addresses lead: to the oldest thread, and to another one if they disagree.
fn threads(found: &Found<Record>, addresses: &[Address]) -> Option<ThreadReply> {
    let known: BTreeMap<&str, u64> =
        addresses.iter().filter_map(|a| alias(found, a)).map(|(seq, thread)| (thread, seq)).collect();
    let age = |thread: &str, seq: u64| {
        let first = first_addresses(thread).filter_map(|a| alias(found, &a)).filter(|(_, t)| *t == thread);
        first.map(|(seq, _)| seq).min().unwrap_or(seq)
    };
    let mut by_age: Vec<(u64, &str)> =
        known.into_iter().map(|(thread, seq)| (age(thread, seq), thread)).collect();
    by_age.sort_unstable();
    let mut threads = by_age.into_iter().map(|(_, thread)| thread.to_owned());
    Some(ThreadReply { thread: threads.next()?, other: threads.next() })
}

fn unknown(found: &Found<Record>, addresses: &[Address]) -> Vec<Address> {
    addresses.iter().filter(|a| found.id(address_id(a)).is_none()).cloned().collect()
}

fn resolve(found: &Found<Record>, addresses: &[Address], now: &Now) -> Outcome {
    let first = addresses.first().ok_or_else(|| CommandError::invalid("no address"))?;
    let reply =
        threads(found, addresses).unwrap_or_else(|| ThreadReply { thread: first.value.clone(), other: None });
    let new = unknown(found, addresses);
    let added = (!new.is_empty())
        .then(|| record(now, AccountEntry::AliasAdded { addresses: new, thread: reply.thread.clone() }));
    Ok(Decision::entries(added.into_iter().collect(), AccountReply::Thread(Some(reply))))
}

/// A message is queued once, for ever: a hand-on that is late or repeated finds it.
fn enqueue(state: &State, found: &Found<Record>, outbound: &Outbound, now: &Now) -> Outcome {
    if state.sends.contains_key(&outbound.entry) || found.id(send_id(outbound.entry)).is_some() {
        return Ok(Decision::reply(AccountReply::Taken));
    }
    let attempted = state.may_call_at_once(outbound, now.at, IN_FLIGHT_MAX);
    let mut decision =
        entries(now, [AccountEntry::Queued { outbound: Box::new(outbound.clone()), attempted }]);
    if attempted {
        decision.effects.push(Effect::Call(Box::new(outbound.clone())));
    }
    Ok(decision)
}

fn wake(state: &State, now: &Now) -> Outcome {
    let mut bodies = Vec::new();
    let mut effects = Vec::new();
    for entry in state.expired(now.at, CHOSEN_MAX / 2) {
        let mut update = StatusUpdate::bare(MessageStatus::Failed);
        update.error = Some(ProviderError {
            code: "expired".into(),
            title: "pending for too long".into(),
            retryable: false,
        });
        bodies.push(AccountEntry::Outcome { entry, update: Box::new(update.clone()) });
        effects.push(Effect::Tell { entry, update: Box::new(update) });
    }
    if bodies.is_empty() {
        for entry in state.choose(now.at, IN_FLIGHT_MAX, CHOSEN_MAX) {
            bodies.push(AccountEntry::Attempted { entry });
            effects.extend(state.sends.get(&entry).map(|s| Effect::Call(Box::new(s.outbound.clone()))));
        }
    }
    let room = CHOSEN_MAX.saturating_sub(bodies.len());
    let over = state.kept.iter().filter(|(_, k)| now.at.since(k.at) >= KEPT_FOR).take(room);
    effects.extend(over.map(|(seq, kept)| Effect::Bury { seq: *seq, kept: Box::new(kept.clone()) }));
    effects.extend(placeable(state, now));
    let mut decision = entries(now, bodies);
    decision.effects = effects;
    Ok(decision)
}

fn keep(
    state: &State,
    tenant: &TenantId,
    account: &AccountId,
    receipt: &KeptReceipt,
    now: &Now,
) -> Decision<Account> {
    if state.keeps(&receipt.update) {
        return Decision::reply(AccountReply::Taken);
    }
    if state.kept.len() >= KEPT_MAX {
        // Nobody waits behind those that fit nowhere: what is over goes where they all go in the end.
        let id = blake3::hash(receipt.update.provider_id.as_deref().unwrap_or("").as_bytes()).to_hex();
        let letter = receipt_letter(account, &id[..16], now.at, &receipt.update, "too many receipts wait");
        return dead_letter(state, tenant, &letter, None, now);
    }
    let id = receipt.update.provider_id.as_deref().unwrap_or("");
    let settled = state.conversation_of(id);
    let in_flight = state.sends.values().find_map(|s| {
        matches!(&s.phase, Phase::Known(u) if u.provider_id.as_deref() == Some(id))
            .then_some(s.outbound.entry.conversation)
    });
    let conversation = receipt.conversation.or(settled).or(in_flight);
    let body = AccountEntry::Kept {
        conversation,
        message_seq: receipt.message_seq,
        update: Box::new(receipt.update.clone()),
    };
    let decision = entries(now, [body]);
    let effect = Effect::Place {
        kept: now.next_seq,
        receipt: Box::new(KeptReceipt { conversation, ..receipt.clone() }),
    };
    // Its message was told while it was on its way here: it finds it at once.
    if settled.is_some() { decision.effect(effect) } else { decision }
}

/// A receipt as a dead letter; `own` tells it from others of the same instant.
pub(super) fn receipt_letter(
    account: &AccountId,
    own: &str,
    since: Timestamp,
    update: &StatusUpdate,
    reason: &str,
) -> DeadLetter {
    DeadLetter {
        id: format!("{:012x}{account}-{own}", since.as_millis().max(0)),
        account: account.to_string(),
        external_id: String::new(),
        reason: reason.to_owned(),
        received_at: since,
        item: serde_json::to_value(update).unwrap_or_default(),
    }
}

fn dead_letter(
    state: &State,
    tenant: &TenantId,
    letter: &DeadLetter,
    kept: Option<u64>,
    now: &Now,
) -> Decision<Account> {
    let (tenant, letter) = (tenant.clone(), letter.clone());
    let released =
        kept.filter(|seq| state.kept.contains_key(seq)).map(|kept| AccountEntry::Released { kept });
    let mut decision = entries(now, released);
    decision
        .writes
        .push(Box::new(move |key, stamp| Tables::dead_letter_write(key.shard, stamp, &tenant, &letter)));
    decision
}

fn called(
    state: &State,
    found: &Found<Record>,
    entry: EntryId,
    verdict: &Verdict,
    jitter: f64,
    now: &Now,
) -> Outcome {
    let Some(send) = state.sends.get(&entry).filter(|s| s.phase == Phase::Attempted) else {
        return Ok(late(entry, verdict));
    };
    let outcome = |update: StatusUpdate| AccountEntry::Outcome { entry, update: Box::new(update) };
    let bodies = match verdict {
        Verdict::Accepted { provider_id, aliases } => {
            let mut update = StatusUpdate::bare(MessageStatus::Sent);
            update.provider_id = Some(provider_id.clone());
            // The customer writes from the address that the answer names: it leads to the same thread from now on.
            let new = unknown(found, aliases);
            let learnt = (!new.is_empty() && !send.outbound.thread.is_empty())
                .then(|| AccountEntry::AliasAdded { addresses: new, thread: send.outbound.thread.clone() });
            learnt.into_iter().chain([outcome(update)]).collect()
        }
        Verdict::Unknown => vec![outcome(StatusUpdate::bare(MessageStatus::Unknown))],
        Verdict::Refused { error, closes_window } => {
            let mut update = StatusUpdate::bare(MessageStatus::Failed);
            update.error = Some(error.clone());
            update.closes_window = *closes_window;
            vec![outcome(update)]
        }
        Verdict::Retry { error, after_ms, scope } => {
            let pause =
                pacing::backoff(send.attempts, jitter).max(Duration::from_millis(after_ms.unwrap_or(0)));
            vec![AccountEntry::Retried {
                entry,
                error: error.clone(),
                not_before: now.at.plus(pause),
                scope: *scope,
            }]
        }
        Verdict::Paused { error } => {
            let back = AccountEntry::Retried {
                entry,
                error: error.clone(),
                not_before: now.at,
                scope: patchbay_protocol::outbound::Backoff::Message,
            };
            vec![back, AccountEntry::Paused { reason: format!("error {}", error.code) }]
        }
    };
    let told: Vec<Effect> = bodies
        .iter()
        .filter_map(|b| match b {
            AccountEntry::Outcome { entry, update } => {
                Some(Effect::Tell { entry: *entry, update: update.clone() })
            }
            _ => None,
        })
        .collect();
    let mut decision = entries(now, bodies);
    decision.effects = told;
    Ok(decision)
}

/// An answer that came after the call was given up (the account was loaded anew meanwhile): it can only climb.
fn late(entry: EntryId, verdict: &Verdict) -> Decision<Account> {
    let decision = Decision::reply(AccountReply::Taken);
    let update = match verdict {
        Verdict::Accepted { provider_id, .. } => {
            let mut update = StatusUpdate::bare(MessageStatus::Sent);
            update.provider_id = Some(provider_id.clone());
            update
        }
        // It was not taken, and it is `unknown` by now: it is not sent again, and no longer unknown.
        Verdict::Refused { error, .. } | Verdict::Retry { error, .. } | Verdict::Paused { error } => {
            let mut update = StatusUpdate::bare(MessageStatus::Failed);
            update.error = Some(error.clone());
            update
        }
        Verdict::Unknown => return decision,
    };
    decision.effect(Effect::Tell { entry, update: Box::new(update) })
}

fn told(state: &State, entry: EntryId, now: &Now) -> Decision<Account> {
    let Some(send) = state.sends.get(&entry) else { return Decision::reply(AccountReply::Taken) };
    let Phase::Known(update) = &send.phase else { return Decision::reply(AccountReply::Taken) };
    let mut decision = entries(now, [AccountEntry::Settled { entry }]);
    if let Some(id) = &update.provider_id {
        let same = state.kept.iter().filter(|(_, k)| k.update.provider_id.as_ref() == Some(id));
        decision.effects = same
            .map(|(seq, k)| {
                let receipt = KeptReceipt {
                    conversation: Some(entry.conversation),
                    message_seq: Some(entry.seq),
                    update: k.update.clone(),
                };
                Effect::Place { kept: *seq, receipt: Box::new(receipt) }
            })
            .collect();
    }
    decision
}

fn loaded(state: &State, now: &Now) -> Decision<Account> {
    let mut bodies = Vec::new();
    let mut effects = Vec::new();
    for send in state.sends.values() {
        match &send.phase {
            Phase::Waiting => {}
            Phase::Attempted => {
                let update = Box::new(StatusUpdate::bare(MessageStatus::Unknown));
                bodies.push(AccountEntry::Outcome { entry: send.outbound.entry, update: update.clone() });
                effects.push(Effect::Tell { entry: send.outbound.entry, update });
            }
            Phase::Known(update) => {
                effects.push(Effect::Tell { entry: send.outbound.entry, update: update.clone() })
            }
        }
    }
    effects.extend(placeable(state, now));
    let mut decision = entries(now, bodies);
    decision.effects = effects;
    decision
}

/// Kept receipts whose conversation is known by now, to be tried again: a turn of them at a time, so that those that
/// fit nowhere do not starve the rest.
fn placeable(state: &State, now: &Now) -> Vec<Effect> {
    const AT_ONCE: u64 = 16;
    let turns = (state.kept.len() as u64).div_ceil(AT_ONCE).max(1);
    let turn = usize::try_from(now.at.as_millis().unsigned_abs() / 1000 % turns * AT_ONCE).unwrap_or(0);
    let next = state.kept.iter().skip(turn).take(usize::try_from(AT_ONCE).unwrap_or(1));
    next.filter_map(|(seq, k)| {
        let conversation =
            k.conversation.or_else(|| state.conversation_of(k.update.provider_id.as_deref()?))?;
        let receipt = KeptReceipt {
            conversation: Some(conversation),
            message_seq: k.message_seq,
            update: k.update.clone(),
        };
        Some(Effect::Place { kept: *seq, receipt: Box::new(receipt) })
    })
    .collect()
}

/// When the durable timer of an account must be armed: while anything is unsettled, within 5 s.
pub(super) fn timer(state: &State, armed: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
    const WITHIN: Duration = Duration::from_secs(5);
    if state.sends.is_empty() && state.kept.is_empty() {
        return None;
    }
    Some(armed.filter(|at| *at > now).unwrap_or_else(|| now.plus(WITHIN)))
}
