//! Configuration documents of tenants, kept at hand: tenants, keys, inboxes, accounts, agents. Written only by
//! compare-and-set; every write through here is seen here at once.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use patchbay_connectors::Connector;
use patchbay_protocol::command::Scope;
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::principal::Role;
use patchbay_protocol::timestamp::Timestamp;
use patchbay_protocol::{CommandError, ErrorCode};
use patchbay_storage::tables::Tables;
use patchbay_storage::{CasOutcome, DocumentKey, Engine, WriteError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::watch;

use crate::conversation::state::Home;

/// A tenant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tenant {
    /// Its display name.
    pub name: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyScope {
    /// Everything of its tenant.
    #[default]
    #[serde(alias = "tenant", alias = "admin", alias = "write")]
    Full,
    /// Reads only.
    Read,
}

/// An API key of a tenant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// What it is called.
    pub name: String,
    /// What it may do.
    pub scope: KeyScope,
    /// The start of the secret, to be recognised by.
    pub prefix: String,
    /// A hash of the secret.
    pub hash: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last used, to within [`USED_PAUSE`].
    pub last_used_at: Option<Timestamp>,
}

/// Whose key a secret is, by its hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeyOwner {
    /// The tenant.
    pub tenant: TenantId,
    /// The key's id.
    pub id: String,
    /// What it may do.
    pub scope: KeyScope,
}

/// The use of a key is noted at most this often.
pub const USED_PAUSE: Duration = Duration::from_secs(60);

/// An inbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inbox {
    /// Its display name.
    pub name: String,
}

/// What an account does beside messages, and where its provider is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Base address of the provider's API; empty: the connector's own.
    pub api_base: String,
    /// The API's version; empty: the connector's own.
    pub api_version: String,
    /// Whether `conversation.read` reaches the customer.
    pub mark_read: bool,
    /// Whether `typing.set` reaches the customer.
    pub typing: bool,
}

/// A channel account.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Which connector speaks for it.
    pub connector: String,
    /// Where its conversations are shown.
    pub inbox: InboxId,
    /// Its display name.
    pub name: String,
    /// The provider's id of it.
    pub external_id: String,
    /// Its secrets.
    pub credentials: Value,
    /// What else it does.
    pub settings: Settings,
}

/// An agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    /// Its display name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Where it works.
    pub inboxes: Vec<InboxId>,
    /// Tokens issued before this are void.
    #[serde(default)]
    pub not_before: Option<Timestamp>,
}

/// How far a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MediaState {
    /// On its way.
    Pending,
    /// Here.
    Ready,
    /// Not to be had.
    Failed,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MediaRecord {
    /// How far it is.
    pub state: MediaState,
    /// Its verified type.
    pub mime: String,
    /// Its size.
    pub bytes: Option<u64>,
    /// SHA-256 of it, hexadecimal.
    pub sha256: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Since when.
    pub created_at: Timestamp,
    /// Conversations that it is in; a visitor sees it in its own.
    #[serde(default)]
    pub conversations: BTreeSet<ConversationId>,
    /// Whether agents see it only with the conversations that it is in.
    #[serde(default)]
    pub private: bool,
    /// Ids at providers, by account: (id, until when it is good).
    #[serde(default)]
    pub uploads: BTreeMap<AccountId, (String, Timestamp)>,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Conversations that one file is known to be in; past it the oldest ids are forgotten.
const MEDIA_CONVERSATIONS_MAX: usize = 256;

/// What a tenant's files hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct MediaUsage {
    /// Files that are stored.
    bytes: u64,
    /// Of them, those that visitors have sent.
    visitors: u64,
    /// Files that are being stored.
    open: BTreeMap<String, Storing>,
}

/// A file that is being stored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Storing {
    bytes: u64,
    at: Timestamp,
    /// Whether a visitor sends it.
    visitors: bool,
}

impl MediaUsage {
    fn all(&self) -> u64 {
        self.open.values().fold(self.bytes, |all, storing| all.saturating_add(storing.bytes))
    }

    fn of_visitors(&self) -> u64 {
        let open = self.open.values().filter(|storing| storing.visitors);
        open.fold(self.visitors, |all, storing| all.saturating_add(storing.bytes))
    }
}

fn media_usage(tenant: &TenantId) -> DocumentKey {
    key(tenant.as_str(), "media_usage", "now")
}

/// A document as what its kind is read as, or that there is none.
type Stored = Option<Arc<dyn Any + Send + Sync>>;
/// An account, or that there is none.
type Known = Option<Arc<Account>>;

/// The documents of tenants.
pub struct Directory {
    tables: Tables,
    cache: Mutex<HashMap<DocumentKey, Stored>>,
    accounts: Mutex<HashMap<(TenantId, AccountId), Known>>,
    /// Of each tenant that somebody watches.
    changes: Mutex<HashMap<TenantId, watch::Sender<u64>>>,
    keys_used: Mutex<HashMap<(TenantId, String), Timestamp>>,
    /// Rises with every write: what was read before one is not kept after it.
    writes: AtomicU64,
    /// Who tells other nodes of a change.
    announces: Mutex<Vec<Announce>>,
    /// How far accounts that nobody watches have been read again.
    refreshed: AtomicUsize,
}

/// What may not be as it is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale<'a> {
    /// Documents of this tenant: another node has said so.
    Of(&'a TenantId),
    /// Anything: some word may have been missed.
    Everything,
    /// Nobody says anything, and other nodes may write.
    Perhaps,
}

/// Accounts that are read again at once, and those that nobody watches, of one look.
const REFRESH_AT_ONCE: usize = 16;
const REFRESH_TURN: usize = 256;

/// Tells other nodes that documents of a tenant have changed.
pub type Announce = Box<dyn Fn(&TenantId) + Send + Sync>;

/// Documents kept at hand; past it all are read again.
pub const CACHE_MAX: usize = 100_000;
/// Past so many tenants those that nobody watches are let go of.
const WATCHED_LOOK: usize = 1024;
/// What callers are told to wait for a disk that is full.
const FULL_RETRY_MS: u64 = 1000;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A write that did not happen.
fn unwritten(why: WriteError) -> CommandError {
    match why {
        WriteError::Full => CommandError::overloaded(FULL_RETRY_MS),
        WriteError::Refused | WriteError::Unknown => CommandError::unavailable(),
    }
}

fn key(scope: &str, kind: &'static str, id: &str) -> DocumentKey {
    DocumentKey { scope: scope.to_owned(), kind, id: id.to_owned() }
}

impl crate::memory::Cache for Directory {
    /// Accounts stay: what is shown of a conversation looks at them without a read.
    fn shrink(&self) {
        *lock(&self.cache) = HashMap::new();
        *lock(&self.keys_used) = HashMap::new();
    }
}

impl Directory {
    /// The documents of `engine`.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self {
            tables: Tables::new(engine),
            cache: Mutex::default(),
            accounts: Mutex::default(),
            changes: Mutex::default(),
            keys_used: Mutex::default(),
            writes: AtomicU64::new(0),
            announces: Mutex::default(),
            refreshed: AtomicUsize::new(0),
        }
    }

    /// Says who tells other nodes as well.
    pub fn add_announce(&self, announce: Announce) {
        lock(&self.announces).push(announce);
    }

    /// Other nodes have changed documents, or may have: what is known of them is read again, and whoever holds a
    /// permission asks again. Accounts are read before they are replaced, since what is shown of a conversation looks at
    /// them without a read.
    pub async fn heard_of_change(&self, what: Stale<'_>) {
        {
            let mut cache = lock(&self.cache);
            self.writes.fetch_add(1, Ordering::AcqRel);
            match what {
                // A tenant's own documents, and those of the cluster that name it.
                Stale::Of(tenant) => {
                    cache.retain(|key, _| key.scope != tenant.as_str() && !key.scope.is_empty())
                }
                Stale::Everything | Stale::Perhaps => cache.clear(),
            }
        }
        let accounts = self.stale_accounts(what);
        futures_util::stream::iter(accounts)
            .for_each_concurrent(REFRESH_AT_ONCE, |(tenant, id)| async move {
                self.refresh_account(&tenant, &id).await;
            })
            .await;
        for (of, change) in lock(&self.changes).iter() {
            if !matches!(what, Stale::Of(tenant) if tenant != of) {
                change.send_modify(|n| *n += 1);
            }
        }
    }

    /// Accounts at hand that have to be read again. When nobody has said anything: those of tenants that somebody
    /// watches, and some of the others in their turn.
    fn stale_accounts(&self, what: Stale<'_>) -> Vec<(TenantId, AccountId)> {
        let watched: HashSet<TenantId> = match what {
            Stale::Perhaps => {
                let changes = lock(&self.changes);
                changes.iter().filter(|(_, c)| c.receiver_count() > 0).map(|(t, _)| t.clone()).collect()
            }
            Stale::Of(_) | Stale::Everything => HashSet::new(),
        };
        let accounts = lock(&self.accounts);
        let turn = match what {
            Stale::Perhaps => {
                let from = self.refreshed.fetch_add(REFRESH_TURN, Ordering::Relaxed);
                let from = if accounts.is_empty() { 0 } else { from % accounts.len() };
                from..from + REFRESH_TURN
            }
            Stale::Of(_) | Stale::Everything => 0..0,
        };
        let is_stale = |(n, (tenant, _)): &(usize, &(TenantId, AccountId))| match what {
            Stale::Of(of) => of == tenant,
            Stale::Everything => true,
            Stale::Perhaps => turn.contains(n) || watched.contains(tenant),
        };
        accounts.keys().enumerate().filter(is_stale).map(|(_, at)| at.clone()).collect()
    }

    async fn refresh_account(&self, tenant: &TenantId, id: &AccountId) {
        let writes = self.writes.load(Ordering::Acquire);
        let read = self.tables.document::<Account>(&key(tenant.as_str(), "account", id.as_str())).await;
        // What cannot be read stays as it was until it can.
        let Ok(found) = read else { return };
        let mut accounts = lock(&self.accounts);
        if self.writes.load(Ordering::Acquire) == writes {
            let at = (tenant.clone(), id.clone());
            match found {
                Some((_, account)) => drop(accounts.insert(at, Some(Arc::new(account)))),
                None => drop(accounts.remove(&at)),
            }
        }
    }

    /// Rises with every change of an account, inbox or agent of a tenant: whoever holds a permission asks again.
    pub fn changes(&self, tenant: &TenantId) -> watch::Receiver<u64> {
        let mut changes = lock(&self.changes);
        if changes.len() >= WATCHED_LOOK {
            changes.retain(|_, change| change.receiver_count() > 0);
        }
        changes.entry(tenant.clone()).or_default().subscribe()
    }

    fn changed(&self, tenant: &TenantId) {
        lock(&self.announces).iter().for_each(|announce| announce(tenant));
        if let Some(change) = lock(&self.changes).get(tenant) {
            change.send_modify(|n| *n += 1);
        }
    }

    /// The tables beside them.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// A kind of document is always read as the same type.
    async fn read<T>(&self, key: DocumentKey) -> Result<Option<T>, CommandError>
    where
        T: DeserializeOwned + Clone + Send + Sync + 'static,
    {
        let cached = lock(&self.cache).get(&key).cloned();
        if let Some(found) = cached {
            return Ok(found.and_then(|record| record.downcast_ref().cloned()));
        }
        let writes = self.writes.load(Ordering::Acquire);
        let found = self.tables.document::<Value>(&key).await.map_err(|_| CommandError::unavailable())?;
        let record: Option<T> = found.and_then(|(_, value)| serde_json::from_value(value).ok());
        let stored: Stored = record.clone().map(|record| Arc::new(record) as _);
        let mut cache = lock(&self.cache);
        if cache.len() >= CACHE_MAX {
            cache.clear();
        }
        if self.writes.load(Ordering::Acquire) == writes {
            cache.insert(key, stored);
        }
        Ok(record)
    }

    /// Writes a document whatever it was before; tells whether it is new.
    async fn put<T: Serialize>(&self, key: DocumentKey, record: &T) -> Result<bool, CommandError> {
        loop {
            let before =
                self.tables.document::<Value>(&key).await.map_err(|_| CommandError::unavailable())?;
            let expected = before.map(|(version, _)| version);
            let outcome = self.tables.put_document(key.clone(), expected, record).await;
            self.forget(&key);
            match outcome {
                Ok(CasOutcome::Applied) => return Ok(expected.is_none()),
                Ok(CasOutcome::Refused(_)) => {}
                Err(why) => return Err(unwritten(why)),
            }
        }
    }

    /// Makes a document of what was there; tells whether it is new. Nobody else's change is lost.
    async fn update<T: Serialize + DeserializeOwned>(
        &self,
        key: DocumentKey,
        change: impl Fn(Option<T>) -> Option<T>,
    ) -> Result<Option<bool>, CommandError> {
        loop {
            let before = self.tables.document::<T>(&key).await.map_err(|_| CommandError::unavailable())?;
            let (expected, before) =
                before.map_or((None, None), |(version, record)| (Some(version), Some(record)));
            let Some(after) = change(before) else { return Ok(None) };
            let outcome = self.tables.put_document(key.clone(), expected, &after).await;
            self.forget(&key);
            match outcome {
                Ok(CasOutcome::Applied) => return Ok(Some(expected.is_none())),
                Ok(CasOutcome::Refused(_)) => {}
                Err(why) => return Err(unwritten(why)),
            }
        }
    }

    /// Writes a document that must not be there.
    async fn create<T: Serialize>(&self, key: DocumentKey, record: &T) -> Result<(), CommandError> {
        let outcome = self.tables.put_document(key.clone(), None, record).await;
        self.forget(&key);
        match outcome {
            Ok(CasOutcome::Applied) => Ok(()),
            Ok(CasOutcome::Refused(_)) => Err(ErrorCode::Conflict.into()),
            Err(why) => Err(unwritten(why)),
        }
    }

    async fn delete(&self, key: DocumentKey) -> Result<bool, CommandError> {
        loop {
            let before =
                self.tables.document::<Value>(&key).await.map_err(|_| CommandError::unavailable())?;
            let Some((version, _)) = before else { return Ok(false) };
            let outcome = self.tables.engine().compare_and_set(key.clone(), Some(version), None).await;
            self.forget(&key);
            match outcome {
                Ok(CasOutcome::Applied) => return Ok(true),
                Ok(CasOutcome::Refused(_)) => {}
                Err(why) => return Err(unwritten(why)),
            }
        }
    }

    fn forget(&self, key: &DocumentKey) {
        let mut cache = lock(&self.cache);
        self.writes.fetch_add(1, Ordering::AcqRel);
        cache.remove(key);
    }

    fn forget_account(&self, tenant: &TenantId, id: &AccountId) {
        let mut accounts = lock(&self.accounts);
        self.writes.fetch_add(1, Ordering::AcqRel);
        accounts.remove(&(tenant.clone(), id.clone()));
    }

    async fn list<T: DeserializeOwned>(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, T)>, CommandError> {
        self.tables.documents(scope, kind, after, limit).await.map_err(|_| CommandError::unavailable())
    }

    /// Makes a tenant; `conflict` when it is there.
    pub async fn create_tenant(&self, id: &TenantId, tenant: &Tenant) -> Result<(), CommandError> {
        self.create(key("", "tenant", id.as_str()), tenant).await
    }

    /// A tenant.
    pub async fn tenant(&self, id: &TenantId) -> Result<Option<Tenant>, CommandError> {
        self.read(key("", "tenant", id.as_str())).await
    }

    /// Whether a tenant was made and nothing has been made in it.
    pub async fn is_untouched(&self, id: &TenantId) -> Result<bool, CommandError> {
        let none = |found: Vec<(String, Value)>| found.is_empty();
        Ok(none(self.list(id.as_str(), "inbox", "", 1).await?)
            && none(self.list(id.as_str(), "account", "", 1).await?)
            && none(self.list(id.as_str(), "agent", "", 1).await?))
    }

    /// Tenants after `after`.
    pub async fn tenants(&self, after: &str, limit: usize) -> Result<Vec<(String, Tenant)>, CommandError> {
        self.list("", "tenant", after, limit).await
    }

    /// Stores a key. It opens the door when both its documents are there, so that one that is not listed opens none.
    pub async fn put_key(&self, tenant: &TenantId, id: &str, record: &Key) -> Result<(), CommandError> {
        self.put(key(tenant.as_str(), "key", id), record).await?;
        let owner = KeyOwner { tenant: tenant.clone(), id: id.to_owned(), scope: record.scope };
        self.put(key("", "key_owner", &record.hash), &owner).await.map(|_| ())
    }

    /// Whose key has that hash.
    pub async fn key_owner(&self, hash: &str) -> Result<Option<KeyOwner>, CommandError> {
        self.read(key("", "key_owner", hash)).await
    }

    /// Keys after `after`.
    pub async fn keys(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Key)>, CommandError> {
        self.list(tenant.as_str(), "key", after, limit).await
    }

    /// Removes a key; tells whether it was there. It opens no door from here on.
    pub async fn delete_key(&self, tenant: &TenantId, id: &str) -> Result<bool, CommandError> {
        let Some(record) = self.read::<Key>(key(tenant.as_str(), "key", id)).await? else { return Ok(false) };
        self.delete(key("", "key_owner", &record.hash)).await?;
        let deleted = self.delete(key(tenant.as_str(), "key", id)).await;
        self.changed(tenant);
        deleted
    }

    /// Notes that a key is used now; seldom a write.
    pub async fn key_used(&self, owner: &KeyOwner, now: Timestamp) -> Result<(), CommandError> {
        {
            let mut used = lock(&self.keys_used);
            let at = (owner.tenant.clone(), owner.id.clone());
            if used.get(&at).is_some_and(|last| now.since(*last) < USED_PAUSE) {
                return Ok(());
            }
            if used.len() >= CACHE_MAX {
                used.clear();
            }
            used.insert(at, now);
        }
        let change = |before: Option<Key>| before.map(|k| Key { last_used_at: Some(now), ..k });
        self.update(key(owner.tenant.as_str(), "key", &owner.id), change).await.map(|_| ())
    }

    /// Writes an inbox; tells whether it is new.
    pub async fn put_inbox(
        &self,
        tenant: &TenantId,
        id: &InboxId,
        inbox: &Inbox,
    ) -> Result<bool, CommandError> {
        self.put(key(tenant.as_str(), "inbox", id.as_str()), inbox).await
    }

    /// An inbox.
    pub async fn inbox(&self, tenant: &TenantId, id: &InboxId) -> Result<Option<Inbox>, CommandError> {
        self.read(key(tenant.as_str(), "inbox", id.as_str())).await
    }

    /// Inboxes after `after`.
    pub async fn inboxes(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Inbox)>, CommandError> {
        self.list(tenant.as_str(), "inbox", after, limit).await
    }

    /// Removes an inbox; tells whether it was there.
    pub async fn delete_inbox(&self, tenant: &TenantId, id: &InboxId) -> Result<bool, CommandError> {
        let gone = self.delete(key(tenant.as_str(), "inbox", id.as_str())).await;
        self.changed(tenant);
        gone
    }

    /// Writes an account; tells whether it is new.
    pub async fn put_account(
        &self,
        tenant: &TenantId,
        id: &AccountId,
        account: &Account,
    ) -> Result<bool, CommandError> {
        let new = self.put(key(tenant.as_str(), "account", id.as_str()), account).await;
        self.forget_account(tenant, id);
        // At hand for whoever only looks: see `presentation`.
        let _ = self.account(tenant, id).await;
        self.changed(tenant);
        new
    }

    /// An account.
    pub async fn account(
        &self,
        tenant: &TenantId,
        id: &AccountId,
    ) -> Result<Option<Arc<Account>>, CommandError> {
        let at = (tenant.clone(), id.clone());
        let cached = lock(&self.accounts).get(&at).cloned();
        if let Some(found) = cached {
            return Ok(found);
        }
        let writes = self.writes.load(Ordering::Acquire);
        let found: Option<Account> = self.read(key(tenant.as_str(), "account", id.as_str())).await?;
        let found = found.map(Arc::new);
        let mut accounts = lock(&self.accounts);
        if accounts.len() >= CACHE_MAX {
            accounts.clear();
        }
        // Only what is there: strangers may ask for as many names as they like.
        if self.writes.load(Ordering::Acquire) == writes && found.is_some() {
            accounts.insert(at, found.clone());
        }
        Ok(found)
    }

    /// Accounts after `after`.
    pub async fn accounts(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Account)>, CommandError> {
        self.list(tenant.as_str(), "account", after, limit).await
    }

    /// Removes an account; tells whether it was there.
    pub async fn delete_account(&self, tenant: &TenantId, id: &AccountId) -> Result<bool, CommandError> {
        let gone = self.delete(key(tenant.as_str(), "account", id.as_str())).await;
        self.forget_account(tenant, id);
        self.changed(tenant);
        gone
    }

    /// Writes an agent; tells whether it is new. Tokens that were void stay void, whatever `agent` says.
    pub async fn put_agent(
        &self,
        tenant: &TenantId,
        id: &AgentId,
        agent: &Agent,
    ) -> Result<bool, CommandError> {
        let removed = self.removed_agent(tenant, id).await?;
        let change = |before: Option<Agent>| {
            let void = before.map_or(removed, |b| b.not_before);
            Some(Agent { not_before: void.max(agent.not_before), ..agent.clone() })
        };
        let new = self.update(key(tenant.as_str(), "agent", id.as_str()), change).await;
        self.changed(tenant);
        new.map(|new| new.unwrap_or(false))
    }

    /// Makes an agent's tokens that were issued before `at` void; tells whether there is such an agent.
    pub async fn void_tokens(
        &self,
        tenant: &TenantId,
        id: &AgentId,
        at: Timestamp,
    ) -> Result<bool, CommandError> {
        let change =
            |before: Option<Agent>| before.map(|b| Agent { not_before: b.not_before.max(Some(at)), ..b });
        let done = self.update(key(tenant.as_str(), "agent", id.as_str()), change).await;
        self.changed(tenant);
        done.map(|done| done.is_some())
    }

    /// An agent's display name, where its document is at hand.
    pub fn agent_name(&self, tenant: &TenantId, id: &AgentId) -> Option<String> {
        let found = lock(&self.cache).get(&key(tenant.as_str(), "agent", id.as_str())).cloned()??;
        found.downcast_ref::<Agent>().map(|a| a.name.clone())
    }

    /// An agent.
    pub async fn agent(&self, tenant: &TenantId, id: &AgentId) -> Result<Option<Agent>, CommandError> {
        self.read(key(tenant.as_str(), "agent", id.as_str())).await
    }

    /// Agents after `after`.
    pub async fn agents(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Agent)>, CommandError> {
        self.list(tenant.as_str(), "agent", after, limit).await
    }

    /// From when on tokens of a removed agent's name are good again.
    async fn removed_agent(
        &self,
        tenant: &TenantId,
        id: &AgentId,
    ) -> Result<Option<Timestamp>, CommandError> {
        self.read(key(tenant.as_str(), "removed_agent", id.as_str())).await
    }

    /// Removes an agent; tells whether it was there.
    /// Tokens issued before `void_from` stay void if the name is given again.
    pub async fn delete_agent(
        &self,
        tenant: &TenantId,
        id: &AgentId,
        void_from: Timestamp,
    ) -> Result<bool, CommandError> {
        if self.agent(tenant, id).await?.is_some() {
            self.put(key(tenant.as_str(), "removed_agent", id.as_str()), &void_from).await?;
        }
        let gone = self.delete(key(tenant.as_str(), "agent", id.as_str())).await;
        self.changed(tenant);
        gone
    }

    /// A file.
    pub async fn media(&self, tenant: &TenantId, id: &str) -> Result<Option<MediaRecord>, CommandError> {
        self.read(key(tenant.as_str(), "media", id)).await
    }

    /// Writes a file's record.
    pub async fn put_media(
        &self,
        tenant: &TenantId,
        id: &str,
        record: &MediaRecord,
    ) -> Result<bool, CommandError> {
        self.put(key(tenant.as_str(), "media", id), record).await
    }

    /// Changes a file's record, if it is there.
    pub async fn update_media(
        &self,
        tenant: &TenantId,
        id: &str,
        change: impl Fn(&mut MediaRecord),
    ) -> Result<bool, CommandError> {
        let changed = |before: Option<MediaRecord>| {
            let mut record = before?;
            change(&mut record);
            Some(record)
        };
        self.update(key(tenant.as_str(), "media", id), changed).await.map(|done| done.is_some())
    }

    /// Notes that a file is in a conversation. Past the bound one of the others is let go of.
    pub async fn share_media(
        &self,
        tenant: &TenantId,
        id: &str,
        conversation: ConversationId,
    ) -> Result<bool, CommandError> {
        self.update_media(tenant, id, |record| {
            record.conversations.insert(conversation);
            while record.conversations.len() > MEDIA_CONVERSATIONS_MAX {
                let other = record.conversations.iter().find(|c| **c != conversation).copied();
                other.map(|c| record.conversations.remove(&c));
            }
        })
        .await
    }

    /// A secret of the node's own, made when it is first asked for.
    pub async fn own_secret(&self, name: &str) -> Result<[u8; 32], CommandError> {
        let at = key("", "own_secret", name);
        loop {
            if let Some(secret) = self.read::<[u8; 32]>(at.clone()).await? {
                return Ok(secret);
            }
            match self.create(at.clone(), &rand::random::<[u8; 32]>()).await {
                Err(e) if e.code != ErrorCode::Conflict => return Err(e),
                _ => {}
            }
        }
    }

    /// Takes room for a file that is about to be stored, if a tenant's files stay within `quota` with it; tells whether
    /// they do. It is held until [`Self::settle_media`].
    pub async fn reserve_media(
        &self,
        tenant: &TenantId,
        id: &str,
        bytes: u64,
        now: Timestamp,
        quota: u64,
        visitors: bool,
    ) -> Result<bool, CommandError> {
        let change = |before: Option<MediaUsage>| {
            let mut usage = before.unwrap_or_default();
            usage.open.insert(id.to_owned(), Storing { bytes, at: now, visitors });
            // Visitors leave half of it to everybody else.
            let fits = usage.all() <= quota && (!visitors || usage.of_visitors() <= quota / 2);
            fits.then_some(usage)
        };
        self.update(media_usage(tenant), change).await.map(|done| done.is_some())
    }

    /// A file that room was taken for is stored, or will not be.
    pub async fn settle_media(&self, tenant: &TenantId, id: &str, stored: bool) -> Result<(), CommandError> {
        let change = |before: Option<MediaUsage>| {
            let mut usage = before?;
            let storing = usage.open.remove(id)?;
            if stored {
                usage.bytes += storing.bytes;
                usage.visitors += if storing.visitors { storing.bytes } else { 0 };
            }
            Some(usage)
        };
        self.update(media_usage(tenant), change).await.map(|_| ())
    }

    /// Files that room was taken for before `then` and of which nothing was heard since.
    pub async fn forgotten_media(
        &self,
        tenant: &TenantId,
        then: Timestamp,
    ) -> Result<Vec<String>, CommandError> {
        let usage: Option<MediaUsage> = self.read(media_usage(tenant)).await?;
        let open = usage.map(|u| u.open).unwrap_or_default();
        Ok(open.into_iter().filter(|(_, storing)| storing.at < then).map(|(id, _)| id).collect())
    }

    /// The scope of commands to conversations of an account; `None` when there is no such account.
    pub async fn scope(&self, tenant: &TenantId, id: &AccountId) -> Result<Option<Scope>, CommandError> {
        let Some(account) = self.account(tenant, id).await? else { return Ok(None) };
        let Some(connector) = patchbay_connectors::by_name(&account.connector) else { return Ok(None) };
        Ok(Some(Scope {
            tenant: tenant.clone(),
            account: id.clone(),
            inbox: account.inbox.clone(),
            channel: connector.channel(),
        }))
    }

    /// The account's present inbox and its channel's window, as summaries show them: what is at hand, else what the
    /// conversation was opened with.
    pub fn presentation(&self, home: &Home) -> (InboxId, Option<Duration>) {
        let account =
            lock(&self.accounts).get(&(home.tenant.clone(), home.account.clone())).cloned().flatten();
        match account {
            Some(account) => (
                account.inbox.clone(),
                patchbay_connectors::by_name(&account.connector).and_then(|c| c.channel().window),
            ),
            None => (home.inbox.clone(), patchbay_connectors::whatsapp::WhatsApp.channel().window),
        }
    }
}
