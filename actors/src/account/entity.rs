//! The account as an entity.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use patchbay_connectors::SendLimits;
use patchbay_protocol::ids::{CommandId, EntityId, EntryId};
use patchbay_protocol::inbound::StatusUpdate;
use patchbay_protocol::outbound::{Outbound, Signal};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::Stamp;
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::IdKey;
use tokio::sync::Semaphore;

use super::commands::{self, AccountCommand, AccountReply, IN_FLIGHT_MAX, KeptReceipt};
use super::log::{AccountEntry, Record, address_id, send_id};
use super::state::{Frozen, Kept, State};
use crate::directory::Directory;
use crate::ports::Provider;
use crate::router::{Router, command_id};
use crate::shard::entity::{Decision, Derived, Found, LogEntity, Lookup, Now};
use crate::shard::log_actor::Handle;

/// Signals (read, typing) to providers under way, of all accounts; past it they are dropped.
pub const SIGNALS_MAX: usize = 256;

/// Bounds of what goes out.
#[derive(Clone, Copy, Debug)]
pub struct OutboundConfig {
    /// Unsettled sends of one account; past it new sends are refused.
    pub queue_max: usize,
    /// How long a message may stay pending.
    pub max_age: Duration,
}

impl Default for OutboundConfig {
    fn default() -> Self {
        Self { queue_max: 50_000, max_age: Duration::from_secs(24 * 3600) }
    }
}

/// What an account does about its entries.
pub enum Effect {
    /// Calls the provider. The attempt is on record.
    Call(Box<Outbound>),
    /// Tells a conversation what came of its send, until it answers.
    Tell {
        /// Which.
        entry: EntryId,
        /// What.
        update: Box<StatusUpdate>,
    },
    /// Tries whether a kept receipt finds its message now.
    Place {
        /// The seq that kept it.
        kept: u64,
        /// The receipt.
        receipt: Box<KeptReceipt>,
    },
    /// A kept receipt whose day is over goes to the dead letters.
    Bury {
        /// The seq that kept it.
        seq: u64,
        /// The receipt.
        kept: Box<Kept>,
    },
    /// A signal to the customer.
    Signal(Signal),
}

/// What all accounts of a node share.
pub struct Account {
    pub(super) config: OutboundConfig,
    pub(super) directory: Arc<Directory>,
    pub(super) provider: Arc<dyn Provider>,
    pub(super) router: OnceLock<Weak<dyn Router>>,
    /// Places of signals under way.
    pub(super) signals: Semaphore,
    full: Mutex<HashSet<[u8; 16]>>,
}

impl Account {
    /// Accounts that call through `provider`.
    pub fn new(config: OutboundConfig, directory: Arc<Directory>, provider: Arc<dyn Provider>) -> Self {
        Self {
            config,
            directory,
            provider,
            router: OnceLock::new(),
            signals: Semaphore::new(SIGNALS_MAX),
            full: Mutex::default(),
        }
    }

    /// Says how to reach other entities; once.
    pub fn set_router(&self, router: Weak<dyn Router>) {
        let _ = self.router.set(router);
    }

    /// Whether an account holds as much as it may.
    pub fn is_full(&self, key: [u8; 16]) -> bool {
        self.full.lock().unwrap_or_else(PoisonError::into_inner).contains(&key)
    }

    fn limits(&self) -> SendLimits {
        use patchbay_connectors::Connector as _;
        // The only channel with an outbound queue so far.
        patchbay_connectors::whatsapp::WhatsApp.limits()
    }
}

impl LogEntity for Account {
    type State = State;
    type Entry = Record;
    type Command = AccountCommand;
    type Reply = AccountReply;
    type Effect = Effect;

    fn fresh(&self, _: &EntityId) -> State {
        State::fresh(self.limits(), self.config.max_age)
    }

    fn name(command: &AccountCommand) -> &'static str {
        match command {
            AccountCommand::Resolve { .. } => "account.resolve",
            AccountCommand::Find { .. } => "account.find",
            AccountCommand::Enqueue(_) => "account.enqueue",
            AccountCommand::Keep { .. } => "account.keep",
            AccountCommand::Event(_) => "account.event",
            AccountCommand::DeadLetter { .. } => "account.dead_letter",
            AccountCommand::DropDeadLetter { .. } => "account.drop_dead_letter",
            AccountCommand::Signal(_) => "account.signal",
            AccountCommand::Resume => "account.resume",
            AccountCommand::Status => "account.status",
            AccountCommand::Tip => "account.tip",
            AccountCommand::Called { .. } => "account.called",
            AccountCommand::Told { .. } => "account.told",
            AccountCommand::Placed { .. } => "account.placed",
            AccountCommand::Loaded => "account.loaded",
            AccountCommand::Wake => "account.wake",
        }
    }

    fn command_id(_: &AccountCommand) -> CommandId {
        command_id()
    }

    fn lookups(_: &State, found: &Found<Record>, command: &AccountCommand) -> Vec<Lookup> {
        commands::lookups(found, command)
    }

    fn decide(
        state: &State,
        found: &Found<Record>,
        command: &AccountCommand,
        now: &Now,
    ) -> Result<Decision<Self>, CommandError> {
        commands::decide(state, found, command, now)
    }

    fn apply(state: &mut State, seq: u64, _: CommandId, entry: &Record) {
        state.apply(seq, entry);
    }

    fn at(entry: &Record) -> Timestamp {
        entry.at
    }

    fn ids(entry: &Record, _: u64) -> Vec<IdKey> {
        match &entry.body {
            AccountEntry::AliasAdded { addresses, .. } => addresses.iter().map(address_id).collect(),
            AccountEntry::Queued { outbound, .. } => vec![send_id(outbound.entry)],
            _ => vec![],
        }
    }

    fn encode(entry: &Record, _: u64) -> Bytes {
        // A record is a map with text keys: writing it cannot fail.
        serde_json::to_vec(entry).unwrap_or_default().into()
    }

    fn decode(payload: &[u8]) -> Option<Record> {
        serde_json::from_slice(payload).ok()
    }

    fn freeze(state: &State) -> Bytes {
        serde_json::to_vec(&state.freeze()).unwrap_or_default().into()
    }

    fn thaw(&self, _: &EntityId, snapshot: &[u8]) -> Option<State> {
        let frozen: Frozen = serde_json::from_slice(snapshot).ok()?;
        Some(State::thaw(frozen, self.limits(), self.config.max_age))
    }

    fn publish(&self, id: &EntityId, state: &State, _: &[(u64, Bytes)]) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        if state.sends.len() >= self.config.queue_max {
            full.insert(id.key());
        } else {
            full.remove(&id.key());
        }
    }

    fn derived(&self, _: &State, _: LogKey, _: Stamp) -> Derived {
        Derived::default()
    }

    fn replay(_: &State, _: u64, _: &Record) -> Option<Effect> {
        None
    }

    fn on_load(&self, state: &State) -> Option<AccountCommand> {
        (!state.sends.is_empty() || !state.kept.is_empty()).then_some(AccountCommand::Loaded)
    }

    fn timer(state: &State, armed: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
        commands::timer(state, armed, now)
    }

    fn wake_at(state: &State, now: Timestamp) -> Option<Timestamp> {
        state.next_due(now, IN_FLIGHT_MAX)
    }

    fn wake() -> AccountCommand {
        AccountCommand::Wake
    }

    fn is_wake(command: &AccountCommand) -> bool {
        matches!(command, AccountCommand::Wake | AccountCommand::Loaded)
    }

    fn may_passivate(state: &State) -> bool {
        state.sends.is_empty() && state.kept.is_empty()
    }

    fn may_leave(state: &State) -> bool {
        state.calling == 0
    }

    fn is_handed_on(_: &Effect) -> bool {
        false
    }

    async fn act(&self, id: &EntityId, effect: Effect, me: Handle<Self>) {
        if let EntityId::Account(tenant, account) = id {
            super::act::act(self, tenant, account, effect, &me).await;
        }
    }
}
