//! What webhooks bring: every item finds its thread, and is durable or dead-lettered with a reason before the
//! provider is told 200. One bad item never costs its neighbours.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use patchbay_protocol::command::{Command, Opening, Reply, Request, Scope};
use patchbay_protocol::content::Content;
use patchbay_protocol::entry::Actor;
use patchbay_protocol::ids::{AccountId, ConversationId, TenantId};
use patchbay_protocol::inbound::{
    Address, Item, ItemKind, StatusItem, StatusUpdate, ThreadEvent, ThreadItem,
};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use patchbay_storage::tables::DeadLetter;
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::account::{AccountCommand, AccountReply, KeptReceipt, ThreadReply};
use crate::directory::Account;
use crate::node::Node;
use crate::router::{Answer, Router, command_id};
use crate::shares::Shares;

/// Items of a body that are under way at once.
const CHUNK_ITEMS: usize = 128;
/// Items under way at once of all bodies for one account, below what an entity admits.
pub const ACCOUNT_ITEMS_MAX: usize = 384;
/// How long a body waits for that, before the provider is told to send it again.
const PATIENCE: Duration = Duration::from_secs(8);
/// Address-to-thread hits that are remembered: they are final.
const ALIASES_MAX: usize = 200_000;

/// The intake of a node.
pub struct Intake {
    node: Arc<Node>,
    aliases: Mutex<HashMap<(TenantId, AccountId, Address), String>>,
    /// The places of each account's items.
    rooms: Shares<(TenantId, AccountId)>,
}

/// What becomes of an item that cannot be taken for good.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unfit {
    /// It goes to the dead letters.
    Bury,
    /// It is there already: whoever asked is told why.
    Refuse,
}

impl crate::memory::Cache for Intake {
    fn shrink(&self) {
        *self.aliases.lock().unwrap_or_else(PoisonError::into_inner) = HashMap::new();
    }
}

/// Where an item's account is.
struct Target {
    account: AccountId,
    scope: Scope,
}

/// An item on its way.
enum Under<'a> {
    /// Its conversation has it.
    Thread(Result<Answer<Reply>, CommandError>),
    /// Its account has it.
    Account(Result<Answer<AccountReply>, CommandError>),
    /// A receipt that waits for its conversation.
    Status(&'a StatusItem, Option<(ConversationId, Answer<Reply>)>),
}

impl Intake {
    /// The intake of `node`.
    pub fn new(node: Arc<Node>) -> Arc<Self> {
        let rooms = Shares::new(|| Semaphore::new(ACCOUNT_ITEMS_MAX));
        let intake = Arc::new(Self { node, aliases: Mutex::default(), rooms });
        intake.node.caches().add(&intake);
        intake
    }

    /// Takes every item of a body that came to `account`. `Ok`: all are durable or dead-lettered; an error is
    /// temporary, and the provider shall send the body again.
    pub async fn take(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        document: &Account,
        items: Vec<Item>,
    ) -> Result<(), CommandError> {
        self.take_all(tenant, account, document, items, Unfit::Bury).await
    }

    async fn take_all(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        document: &Account,
        items: Vec<Item>,
        unfit: Unfit,
    ) -> Result<(), CommandError> {
        let items: Vec<Item> = items.into_iter().map(Item::bounded).collect();
        // As many at once as one entity is sure to admit.
        let room = self.rooms.of((tenant.clone(), account.clone()));
        for chunk in items.chunks(CHUNK_ITEMS) {
            let places = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            // Many bodies at once for one account wait for one another, so that it is not asked for more than it admits.
            let Ok(Ok(_places)) = tokio::time::timeout(PATIENCE, room.acquire_many(places)).await else {
                return Err(CommandError::overloaded(1000));
            };
            self.take_chunk(tenant, account, document, chunk, unfit).await?;
        }
        Ok(())
    }

    /// Takes a dead letter again. An error that is not temporary says why it cannot be taken now either; then nothing
    /// has changed.
    pub async fn replay(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        letter: &DeadLetter,
    ) -> Result<(), CommandError> {
        let document = self.node.directory().account(tenant, account).await?.ok_or(ErrorCode::NotFound)?;
        let connector = patchbay_connectors::by_name(&document.connector).ok_or(ErrorCode::NotFound)?;
        let items = match kept_receipt(&letter.item) {
            // A receipt is kept as we understood it.
            Some(update) => {
                let status = StatusItem { callback: None, recipient: vec![], update };
                let kind = ItemKind::Status(status);
                vec![Item { external_id: document.external_id.clone(), kind, raw: letter.item.clone() }]
            }
            None => {
                let named = Some(&letter.external_id).filter(|id| !id.is_empty());
                connector.replay(named.unwrap_or(&document.external_id), &letter.item)
            }
        };
        if items.is_empty() {
            return Err(CommandError::invalid("this channel has no webhooks"));
        }
        // As they will be taken: what is too large for a conversation is unsupported as well.
        let items: Vec<Item> = items.into_iter().map(Item::bounded).collect();
        for item in &items {
            match &item.kind {
                ItemKind::Broken { reason } => return Err(CommandError::invalid(reason)),
                ItemKind::Thread(thread) if unsupported(&thread.event).is_some() => {
                    return Err(CommandError::invalid("it is not supported yet"));
                }
                _ => {}
            }
        }
        self.take_all(tenant, account, &document, items, Unfit::Refuse).await
    }

    async fn take_chunk(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        document: &Account,
        items: &[Item],
        unfit: Unfit,
    ) -> Result<(), CommandError> {
        let targets = self.targets(tenant, account, document, items).await?;
        let threads = self.threads(tenant, &targets, items).await?;
        let mut under = Vec::with_capacity(items.len());
        for ((item, target), thread) in items.iter().zip(&targets).zip(threads) {
            let Some(target) = target else {
                self.unfit(tenant, account, "no account has this external id", item, unfit).await?;
                continue;
            };
            under.push((item, target, self.hand_over(tenant, target, item, thread).await?));
        }
        for (item, target, state) in under {
            self.finish(tenant, target, item, state, unfit).await?;
        }
        Ok(())
    }

    /// The account of each item: the one that the webhook came to, or a sibling with the same connector and secret.
    async fn targets(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        document: &Account,
        items: &[Item],
    ) -> Result<Vec<Option<Target>>, CommandError> {
        let directory = self.node.directory();
        let mut known: HashMap<&str, Option<AccountId>> = HashMap::new();
        let mut targets = Vec::with_capacity(items.len());
        for item in items {
            let external = item.external_id.as_str();
            let own = external.is_empty() || external == document.external_id;
            let id = if own {
                Some(account.clone())
            } else if let Some(found) = known.get(external) {
                found.clone()
            } else {
                let found = self.sibling(tenant, document, external).await?;
                known.insert(external, found.clone());
                found
            };
            targets.push(match id {
                Some(id) => directory.scope(tenant, &id).await?.map(|scope| Target { account: id, scope }),
                None => None,
            });
        }
        Ok(targets)
    }

    async fn sibling(
        &self,
        tenant: &TenantId,
        document: &Account,
        external: &str,
    ) -> Result<Option<AccountId>, CommandError> {
        // While a secret is rotated either may have signed.
        let secrets = |a: &Account| -> Vec<Value> {
            ["app_secret", "app_secret_previous"]
                .iter()
                .filter_map(|n| a.credentials.get(n).cloned())
                .collect()
        };
        let own = secrets(document);
        let mut after = String::new();
        loop {
            let page = self.node.directory().accounts(tenant, &after, 1000).await?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            let found = page.iter().find(|(_, a)| {
                a.external_id == external
                    && a.connector == document.connector
                    && secrets(a).iter().any(|s| own.contains(s))
            });
            if let Some((id, _)) = found {
                return Ok(id.parse().ok());
            }
            after.clone_from(last);
        }
    }

    fn alias(&self, tenant: &TenantId, account: &AccountId, address: &Address) -> Option<String> {
        let aliases = self.aliases.lock().unwrap_or_else(PoisonError::into_inner);
        aliases.get(&(tenant.clone(), account.clone(), address.clone())).cloned()
    }

    fn remember(&self, tenant: &TenantId, account: &AccountId, addresses: &[Address], thread: &str) {
        let mut aliases = self.aliases.lock().unwrap_or_else(PoisonError::into_inner);
        if aliases.len() >= ALIASES_MAX {
            aliases.clear();
        }
        for address in addresses {
            aliases.insert((tenant.clone(), account.clone(), address.clone()), thread.to_owned());
        }
    }

    /// Whose thread each item is: asks the accounts where addresses are unknown or disagree, all at once, in the
    /// items' order.
    async fn threads(
        &self,
        tenant: &TenantId,
        targets: &[Option<Target>],
        items: &[Item],
    ) -> Result<Vec<Option<String>>, CommandError> {
        let mut threads: Vec<Option<String>> = vec![None; items.len()];
        let mut asked = Vec::new();
        for (at, (item, target)) in items.iter().zip(targets).enumerate() {
            let (ItemKind::Thread(thread), Some(target)) = (&item.kind, target) else { continue };
            let addresses = all_addresses(thread);
            let known: Vec<Option<String>> =
                addresses.iter().map(|a| self.alias(tenant, &target.account, a)).collect();
            if let Some(Some(first)) = known.first()
                && known.iter().all(|k| k.as_ref() == Some(first))
            {
                threads[at] = Some(first.clone());
                continue;
            }
            let resolve = AccountCommand::Resolve { addresses: addresses.clone() };
            asked.push((at, target, addresses, self.node.account(tenant, &target.account, resolve)?));
        }
        for (at, target, addresses, answer) in asked {
            let reply = match answer.wait().await {
                Ok(AccountReply::Thread(Some(reply))) => reply,
                // Found out below: an item without a thread goes to the dead letters.
                Ok(_) => continue,
                Err(e) if e.code.is_temporary() && e.code != ErrorCode::Internal => return Err(e),
                Err(_) => continue,
            };
            self.link(tenant, target, &reply).await?;
            if reply.other.is_none() {
                self.remember(tenant, &target.account, &addresses, &reply.thread);
            }
            threads[at] = Some(reply.thread);
        }
        Ok(threads)
    }

    /// Addresses that lead to two conversations: both are told.
    async fn link(
        &self,
        tenant: &TenantId,
        target: &Target,
        reply: &ThreadReply,
    ) -> Result<(), CommandError> {
        let Some(other) = &reply.other else { return Ok(()) };
        let ids =
            [&reply.thread, other].map(|thread| ConversationId::derive(tenant, &target.account, thread));
        for (id, other) in [(ids[0], ids[1]), (ids[1], ids[0])] {
            let request = Request::Link { other };
            // A thread that has aliases but no entry yet has nobody to be told.
            match self.node.conversation(id, command(target, request))?.wait().await {
                Err(e) if e.code.is_temporary() => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Hands an item to whoever it is for, without waiting for its answer.
    async fn hand_over<'a>(
        &self,
        tenant: &TenantId,
        target: &Target,
        item: &'a Item,
        key: Option<String>,
    ) -> Result<Under<'a>, CommandError> {
        Ok(match &item.kind {
            ItemKind::Thread(thread) => {
                let Some(key) = key else {
                    return Ok(Under::Account(self.dead_letter(
                        tenant,
                        &target.account,
                        "its thread cannot be told",
                        item,
                    )));
                };
                let id = ConversationId::derive(tenant, &target.account, &key);
                let opening = Opening { thread: key, contact: thread.contact.clone() };
                let request = Request::Receive { opening, event: thread.event.clone() };
                Under::Thread(self.node.conversation(id, command(target, request)))
            }
            ItemKind::Status(status) => {
                let id = match status.callback {
                    Some(entry) => Some(entry.conversation),
                    None => self.find(tenant, target, &status.recipient).await?,
                };
                let asked = match id {
                    Some(id) => {
                        let request = Request::Receipt {
                            message_seq: status.callback.map(|e| e.seq),
                            update: status.update.clone(),
                        };
                        Some((id, self.node.conversation(id, command(target, request))?))
                    }
                    None => None,
                };
                Under::Status(status, asked)
            }
            ItemKind::Account(event) => Under::Account(self.node.account(
                tenant,
                &target.account,
                AccountCommand::Event(Box::new(event.clone())),
            )),
            ItemKind::Broken { reason } => {
                Under::Account(self.dead_letter(tenant, &target.account, reason, item))
            }
        })
    }

    /// The conversation of a known address. Statuses never create aliases.
    async fn find(
        &self,
        tenant: &TenantId,
        target: &Target,
        addresses: &[Address],
    ) -> Result<Option<ConversationId>, CommandError> {
        if addresses.is_empty() {
            return Ok(None);
        }
        let cached = addresses.iter().find_map(|a| self.alias(tenant, &target.account, a));
        let thread = match cached {
            Some(thread) => Some(thread),
            None => {
                let find = AccountCommand::Find { addresses: addresses.to_vec() };
                match self.node.account(tenant, &target.account, find)?.wait().await? {
                    AccountReply::Thread(found) => found.map(|f| f.thread),
                    _ => None,
                }
            }
        };
        Ok(thread.map(|t| ConversationId::derive(tenant, &target.account, &t)))
    }

    async fn finish(
        &self,
        tenant: &TenantId,
        target: &Target,
        item: &Item,
        state: Under<'_>,
        unfit: Unfit,
    ) -> Result<(), CommandError> {
        match state {
            Under::Thread(handed) => {
                let outcome = match handed {
                    Ok(answer) => answer.wait().await,
                    Err(e) => Err(e),
                };
                match outcome {
                    Ok(_) => self.keep_raw_if_unsupported(tenant, target, item).await,
                    // `internal` is a parked command: it would fail every time.
                    Err(e) if e.code.is_temporary() && e.code != ErrorCode::Internal => Err(e),
                    Err(e) => self.unfit(tenant, &target.account, e.code.name(), item, unfit).await,
                }
            }
            Under::Account(handed) => match handed?.wait().await {
                Err(e) if e.code == ErrorCode::Internal => {
                    self.unfit(tenant, &target.account, e.code.name(), item, unfit).await
                }
                outcome => outcome.map(|_| ()),
            },
            Under::Status(status, asked) => {
                let conversation = match asked {
                    Some((id, answer)) => match answer.wait().await {
                        Ok(Reply::Unmatched) => Some(id),
                        Ok(_) => return Ok(()),
                        Err(e) if e.code.is_temporary() && e.code != ErrorCode::Internal => return Err(e),
                        Err(e) => {
                            return self.unfit(tenant, &target.account, e.code.name(), item, unfit).await;
                        }
                    },
                    None => None,
                };
                let kept = KeptReceipt {
                    conversation,
                    message_seq: status.callback.map(|e| e.seq),
                    update: status.update.clone(),
                };
                let keep = AccountCommand::Keep {
                    tenant: tenant.clone(),
                    account: target.account.clone(),
                    receipt: Box::new(kept),
                };
                self.node.account(tenant, &target.account, keep)?.wait().await.map(|_| ())
            }
        }
    }

    async fn keep_raw_if_unsupported(
        &self,
        tenant: &TenantId,
        target: &Target,
        item: &Item,
    ) -> Result<(), CommandError> {
        let ItemKind::Thread(ThreadItem { event, .. }) = &item.kind else { return Ok(()) };
        let Some(reason) = unsupported(event) else { return Ok(()) };
        self.bury(tenant, &target.account, &format!("unsupported: {reason}"), item).await
    }

    fn dead_letter(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        reason: &str,
        item: &Item,
    ) -> Result<Answer<AccountReply>, CommandError> {
        let now = self.node.shards().clock.now();
        let letter = DeadLetter {
            id: stable_id(now, tenant, account, &item.raw),
            account: account.to_string(),
            external_id: item.external_id.clone(),
            reason: reason.to_owned(),
            received_at: now,
            item: item.raw.clone(),
        };
        metrics::counter!("patchbay_intake_dead_letters_total").increment(1);
        self.node.account(
            tenant,
            account,
            AccountCommand::DeadLetter { tenant: tenant.clone(), letter: Box::new(letter), kept: None },
        )
    }

    /// What cannot be taken for good.
    async fn unfit(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        reason: &str,
        item: &Item,
        unfit: Unfit,
    ) -> Result<(), CommandError> {
        match unfit {
            Unfit::Bury => self.bury(tenant, account, reason, item).await,
            Unfit::Refuse => Err(CommandError::invalid(reason)),
        }
    }

    /// Puts an item into the dead letters.
    pub async fn bury(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        reason: &str,
        item: &Item,
    ) -> Result<(), CommandError> {
        self.dead_letter(tenant, account, reason, item)?.wait().await.map(|_| ())
    }
}

/// Why an item's content is not what it came as.
fn unsupported(event: &ThreadEvent) -> Option<&str> {
    let content = match event {
        ThreadEvent::Message(m) => &m.content,
        ThreadEvent::Edit { content, .. } | ThreadEvent::Echo { content, .. } => content,
        ThreadEvent::Reaction { .. } | ThreadEvent::Delete { .. } | ThreadEvent::ContactChanged { .. } => {
            return None;
        }
    };
    if let Content::Unsupported { reason } = content { Some(reason) } else { None }
}

/// A receipt that matched nothing, if that is what this is.
fn kept_receipt(item: &Value) -> Option<StatusUpdate> {
    let ours = item.get("closes_window").is_some_and(Value::is_boolean);
    if ours { serde_json::from_value(item.clone()).ok() } else { None }
}

/// A body that is sent again within the same hour makes no second letter.
fn stable_id(now: Timestamp, tenant: &TenantId, account: &AccountId, raw: &Value) -> String {
    let hour = now.as_millis().max(0) / 3_600_000 * 3_600_000;
    let hash = blake3::hash(format!("{tenant}/{account}/{raw}").as_bytes()).to_hex();
    format!("{hour:012x}{}", &hash[..16])
}

fn command(target: &Target, request: Request) -> Command {
    Command {
        id: command_id(),
        scope: target.scope.clone(),
        actor: Actor::system(),
        caused_by: None,
        request,
    }
}

/// The item's addresses, with those that it says are new.
fn all_addresses(thread: &ThreadItem) -> Vec<Address> {
    let mut all = thread.addresses.clone();
    if let ThreadEvent::ContactChanged { new_addresses, .. } = &thread.event {
        all.extend(new_addresses.iter().filter(|a| !thread.addresses.contains(a)).cloned());
    }
    all
}
