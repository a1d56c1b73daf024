//! The conversation as an entity: how it is stored, shown and handed on.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::command::{Command, Reply, Request, Tip};
use patchbay_protocol::content::Media;
use patchbay_protocol::entry::{Body, Entry};
use patchbay_protocol::event::Origin;
use patchbay_protocol::ids::{AgentId, CommandId, ConversationId, EntityId, EntryId, TenantId};
use patchbay_protocol::outbound::{Lane, Outbound, Payload, Recipient, Signal};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::Stamp;
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{IdKey, Mark, Tables};

use super::{commands, ids, state::State};
use crate::account::AccountCommand;
use crate::agent::AgentCommand;
use crate::directory::Directory;
use crate::inbox::InboxCommand;
use crate::outbox::Outbox;
use crate::ports::{FetchError, MediaFetcher, MediaSource, Publisher};
use crate::router::Router;
use crate::shard::entity::{Decision, Derived, Found, LogEntity, Lookup, Now, Then};
use crate::shard::log_actor::Handle;

/// What a conversation does about its entries.
pub enum Effect {
    /// Hands a message to the Account, and repeats until the Account answers.
    HandOn {
        /// The message.
        seq: u64,
        /// How urgent.
        lane: Lane,
    },
    /// Fetches the file of a customer's message.
    Fetch {
        /// The message.
        seq: u64,
        /// Since when it is wanted.
        since: Timestamp,
    },
    /// Tells the customer that the business has read.
    MarkRead {
        /// The provider's id of the last message.
        provider_id: String,
    },
    /// Tells the customer that the business is writing.
    Typing {
        /// The provider's id of the last message.
        provider_id: String,
    },
    /// Tells an agent that a conversation is now theirs.
    Assigned {
        /// Who.
        agent: AgentId,
        /// By which entry.
        seq: u64,
    },
}

/// Tries of one file in a row, and the pause behind the first.
const FETCH_TRIES: u32 = 5;
const FETCH_PAUSE: Duration = Duration::from_secs(1);
/// A file that is not here is asked for again after this.
const FETCH_AGAIN: Duration = Duration::from_secs(60);
/// How long it is asked for.
const FETCH_FOR: Duration = Duration::from_secs(24 * 3600);

fn fetched(message_seq: u64, outcome: Result<Media, String>) -> Command {
    crate::router::system_command(Request::MediaFetched { message_seq, outcome })
}

/// Whoever fetches a file is the only one.
struct Turn<'a>(&'a Mutex<HashSet<EntryId>>, EntryId);

impl<'a> Turn<'a> {
    fn take(all: &'a Mutex<HashSet<EntryId>>, entry: EntryId) -> Option<Self> {
        all.lock().unwrap_or_else(PoisonError::into_inner).insert(entry).then_some(Self(all, entry))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// What all conversations of a node share.
pub struct Conversation {
    publisher: Arc<dyn Publisher>,
    directory: Arc<Directory>,
    media: Arc<dyn MediaFetcher>,
    /// Files that are being fetched.
    fetching: Mutex<HashSet<EntryId>>,
    router: OnceLock<Weak<dyn Router>>,
    outbox: Option<Arc<Outbox>>,
}

impl Conversation {
    /// Conversations that are shown by `publisher`, whose files come by `media` and whose events go to `outbox`.
    pub fn new(
        publisher: Arc<dyn Publisher>,
        directory: Arc<Directory>,
        media: Arc<dyn MediaFetcher>,
        outbox: Option<Arc<Outbox>>,
    ) -> Self {
        Self { publisher, directory, media, fetching: Mutex::default(), router: OnceLock::new(), outbox }
    }

    /// Says how to reach other entities; once.
    pub fn set_router(&self, router: Weak<dyn Router>) {
        let _ = self.router.set(router);
    }

    fn router(&self) -> Option<Arc<dyn Router>> {
        self.router.get()?.upgrade()
    }

    async fn hand_on(&self, me: &Handle<Self>, id: ConversationId, seq: u64, lane: Lane) {
        let mut pause = Duration::from_millis(20);
        loop {
            if self.try_hand_on(me, id, seq, lane).await.is_some() || me.has_ended() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// `None`: not answered, to be repeated.
    async fn try_hand_on(&self, me: &Handle<Self>, id: ConversationId, seq: u64, lane: Lane) -> Option<()> {
        let logs = &me.shards().logs;
        let entry: Entry = Self::decode(&logs.row(me.key(), seq).await.ok()??.payload)?;
        let (payload, reply_to) = match entry.body {
            Body::Sent(sent) => (Payload::Message(sent.content), sent.reply_to),
            Body::Reacted { target, emoji, provider_id: None, .. } => {
                (Payload::Reaction { reaction_to: target.provider_id, emoji }, None)
            }
            _ => return Some(()),
        };
        let (opened, pending) = self.home(me, seq).await?;
        if !pending {
            // Its outcome is known by now.
            return Some(());
        }
        let reply_to = match reply_to {
            Some(target) => provider_id_of(me, target).await?,
            None => None,
        };
        let outbound = Outbound {
            entry: EntryId { conversation: id, seq },
            at: entry.at,
            thread: opened.thread.clone(),
            recipient: Recipient {
                address: opened.contact.address.clone(),
                user_id: opened.contact.user_id.clone(),
            },
            payload,
            reply_to,
            lane,
        };
        let answer = self
            .router()?
            .account(&opened.tenant, &opened.account, AccountCommand::Enqueue(Box::new(outbound)))
            .ok()?;
        answer.wait().await.ok().map(|_| ())
    }

    /// Where the conversation is at home now, and whether message `seq` is still pending: told by itself.
    async fn home(&self, me: &Handle<Self>, seq: u64) -> Option<(super::state::Home, bool)> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        me.peek(move |state: &State| {
            drop(reply.send(state.home.clone().map(|h| (h, state.pending.contains(&seq)))))
        });
        answer.await.ok()?
    }

    /// Fetches a file until it is here, or cannot be had; what cannot be had now is asked for by the next timer.
    async fn fetch(&self, me: &Handle<Self>, id: ConversationId, seq: u64, since: Timestamp) {
        let entry = EntryId { conversation: id, seq };
        let Some(_turn) = Turn::take(&self.fetching, entry) else { return };
        let mut pause = FETCH_PAUSE;
        for _ in 0..FETCH_TRIES {
            match self.try_fetch(me, id, seq).await {
                Some(Ok(media)) => return me.tell(fetched(seq, Ok(media))),
                Some(Err(FetchError::Final(reason))) => return me.tell(fetched(seq, Err(reason))),
                Some(Err(FetchError::Later)) | None => {}
            }
            if me.has_ended() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        if me.shards().clock.now().since(since) >= FETCH_FOR {
            me.tell(fetched(seq, Err("the provider did not give it".into())));
        }
    }

    /// `None`: the store or the entity did not answer.
    async fn try_fetch(
        &self,
        me: &Handle<Self>,
        id: ConversationId,
        seq: u64,
    ) -> Option<Result<Media, FetchError>> {
        let entry: Entry = Self::decode(&me.shards().logs.row(me.key(), seq).await.ok()??.payload)?;
        let Body::Received(received) = &entry.body else {
            return Some(Err(FetchError::Final("the message carries no file".into())));
        };
        let wanted = received.content.media()?;
        let (home, _) = self.home(me, 0).await?;
        let account = match self.directory.account(&home.tenant, &home.account).await.ok()? {
            Some(account) => account,
            None => return Some(Err(FetchError::Final("the account is no more".into()))),
        };
        let source = MediaSource { tenant: home.tenant, account: home.account, conversation: id };
        Some(self.media.fetch(&source, &account, wanted).await)
    }

    async fn signal(&self, me: &Handle<Self>, signal: Signal) {
        let Some((home, _)) = self.home(me, 0).await else { return };
        let Some(router) = self.router() else { return };
        // A signal that cannot be handed over now is not worth repeating.
        if let Ok(answer) = router.account(&home.tenant, &home.account, AccountCommand::Signal(signal)) {
            let _ = answer.wait().await;
        }
    }
}

/// The provider's id of a message, by its own entry or by the last word on its status; the outer `None`: the store did
/// not answer.
async fn provider_id_of(me: &Handle<Conversation>, seq: u64) -> Option<Option<String>> {
    let (logs, tables) = (&me.shards().logs, &me.shards().tables);
    let Some(row) = logs.row(me.key(), seq).await.ok()? else { return Some(None) };
    let sent = match Conversation::decode(&row.payload).map(|e| e.body) {
        Some(Body::Received(m)) => return Some(Some(m.provider_id)),
        Some(Body::Sent(m)) => m,
        _ => return Some(None),
    };
    if sent.provider_id.is_some() {
        return Some(sent.provider_id);
    }
    // The first word on what we carry ourselves stands right behind it.
    let status =
        tables.reference(me.key(), ids::status(seq, None)).await.ok()?.unwrap_or(seq.saturating_add(1));
    let Some(row) = logs.row(me.key(), status).await.ok()? else { return Some(None) };
    Some(match Conversation::decode(&row.payload).map(|e| e.body) {
        Some(Body::Status(s)) if s.message_seq == seq => s.provider_id,
        _ => None,
    })
}

impl LogEntity for Conversation {
    type State = State;
    type Entry = Entry;
    type Command = Command;
    type Reply = Reply;
    type Effect = Effect;

    fn fresh(&self, id: &EntityId) -> State {
        State::fresh(ConversationId::from_bytes(id.key()))
    }

    fn name(command: &Command) -> &'static str {
        command.request.name()
    }

    fn command_id(command: &Command) -> CommandId {
        command.id
    }

    fn lookups(state: &State, found: &Found<Entry>, command: &Command) -> Vec<Lookup> {
        commands::lookups(state, found, command)
    }

    fn decide(
        state: &State,
        found: &Found<Entry>,
        command: &Command,
        now: &Now,
    ) -> Result<Decision<Self>, CommandError> {
        commands::decide(state, found, command, now)
    }

    fn apply(state: &mut State, _: u64, command: CommandId, entry: &Entry) {
        state.apply(entry);
        state.done.apply(command, entry);
    }

    fn at(entry: &Entry) -> Timestamp {
        entry.at
    }

    fn ids(entry: &Entry, _: u64) -> Vec<IdKey> {
        ids::of(entry)
    }

    fn encode(entry: &Entry, _: u64) -> Bytes {
        // An entry is a map with text keys: writing it cannot fail.
        serde_json::to_vec(entry).unwrap_or_default().into()
    }

    fn decode(payload: &[u8]) -> Option<Entry> {
        serde_json::from_slice(payload).ok()
    }

    fn freeze(state: &State) -> Bytes {
        serde_json::to_vec(state).unwrap_or_default().into()
    }

    fn thaw(&self, id: &EntityId, snapshot: &[u8]) -> Option<State> {
        let state: State = serde_json::from_slice(snapshot).ok()?;
        (state.id.as_bytes() == &id.key()).then_some(state)
    }

    fn publish(&self, _: &EntityId, state: &State, entries: &[(u64, Bytes)]) {
        self.publisher.entries(state.id, entries);
        let Some(home) = &state.home else { return };
        let (inbox, window) = self.directory.presentation(home);
        let Some(summary) = state.summary(inbox.clone(), window, state.updated_at) else { return };
        if let Some(router) = self.router() {
            // The row that is derived later tells an inbox that was not there to hear it.
            let _ = router.inbox(&home.tenant, &inbox, InboxCommand::Changed(Box::new(summary)));
        }
    }

    fn publishes(&self) -> bool {
        self.outbox.is_some()
    }

    fn events(&self, state: &State, key: LogKey, bucket: Mark, rows: &[(u64, Bytes)]) {
        let (Some(outbox), Some(home)) = (&self.outbox, &state.home) else { return };
        let (inbox, _) = self.directory.presentation(home);
        let (tenant, account) = (home.tenant.clone(), home.account.clone());
        let origin = Arc::new(Origin { tenant, account, conversation: state.id });
        outbox.offer(&origin, &inbox, key.shard, bucket, rows);
    }

    fn derived(&self, state: &State, key: LogKey, stamp: Stamp) -> Derived {
        let Some(home) = &state.home else { return Derived::default() };
        let (inbox, window) = self.directory.presentation(home);
        let Some(mut summary) = state.summary(inbox.clone(), window, Timestamp::default()) else {
            return Derived::default();
        };
        // Rows keep the end of the window, past or not: whoever reads them knows the time.
        summary.window_until = state.window_until(window);
        let rows = Tables::inbox_writes(key, stamp, &home.tenant, &summary);
        let (router, tenant) = (self.router.get().cloned(), home.tenant.clone());
        let then: Then = Box::new(move || {
            if let Some(router) = router.as_ref().and_then(Weak::upgrade) {
                // An inbox that was loaded before the row was there learns of it now.
                let _ = router.inbox(&tenant, &inbox, InboxCommand::Stored(Box::new(summary.clone())));
            }
        });
        Derived { rows, then: Some(then) }
    }

    async fn prepare(&self, state: &State) {
        if let Some(home) = &state.home {
            // Its inbox and channel; without them it is shown as it was opened.
            let _ = self.directory.account(&home.tenant, &home.account).await;
        }
    }

    fn replay(state: &State, seq: u64, entry: &Entry) -> Option<Effect> {
        let ours = match &entry.body {
            Body::Sent(sent) => sent.provider_id.is_none(),
            Body::Reacted { provider_id, .. } => provider_id.is_none(),
            _ => false,
        };
        let pending = ours
            && state.pending.contains(&seq)
            && state.status_of(seq).is_none_or(|s| s == MessageStatus::Pending);
        pending.then(|| Effect::HandOn { seq, lane: Lane::of(&entry.actor) })
    }

    fn on_load(&self, _: &State) -> Option<Command> {
        None
    }

    fn timer(state: &State, armed: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
        // While a file is not here somebody asks for it, whoever owns the conversation then.
        let fetch = (!state.fetching.is_empty())
            .then(|| armed.filter(|at| *at > now).unwrap_or_else(|| now.plus(FETCH_AGAIN)));
        match (state.snoozed_until, fetch) {
            (Some(snoozed), Some(fetch)) => Some(snoozed.min(fetch)),
            (snoozed, fetch) => snoozed.or(fetch),
        }
    }

    fn wake_at(_: &State, _: Timestamp) -> Option<Timestamp> {
        None
    }

    fn wake() -> Command {
        crate::router::system_command(Request::TimerDue)
    }

    fn reaches(command: &Command, seq: u64) -> Option<Reply> {
        // A tenant's has to be its own.
        let by_a_node = command.scope.tenant == TenantId::nobody();
        (by_a_node && matches!(command.request, Request::Tip))
            .then_some(Reply::Tip(Tip { seq, account: None }))
    }

    fn is_wake(command: &Command) -> bool {
        matches!(command.request, Request::TimerDue)
    }

    fn may_passivate(_: &State) -> bool {
        true
    }

    fn is_handed_on(effect: &Effect) -> bool {
        matches!(effect, Effect::HandOn { .. })
    }

    async fn act(&self, id: &EntityId, effect: Effect, me: Handle<Self>) {
        let conversation = ConversationId::from_bytes(id.key());
        match effect {
            Effect::HandOn { seq, lane } => self.hand_on(&me, conversation, seq, lane).await,
            Effect::Fetch { seq, since } => self.fetch(&me, conversation, seq, since).await,
            Effect::MarkRead { provider_id } => {
                let marks = match self.home(&me, 0).await {
                    Some((home, _)) => self
                        .directory
                        .account(&home.tenant, &home.account)
                        .await
                        .ok()
                        .flatten()
                        .is_some_and(|a| a.settings.mark_read),
                    None => false,
                };
                if marks {
                    self.signal(&me, Signal::Read { provider_id }).await;
                }
            }
            Effect::Typing { provider_id } => self.signal(&me, Signal::Typing { provider_id }).await,
            Effect::Assigned { agent, seq } => {
                let Some((home, _)) = self.home(&me, 0).await else { return };
                let Some(router) = self.router() else { return };
                // Its sockets may be anywhere: whoever owns it shows it to all of them. It hears of it otherwise as well.
                if let Ok(shown) =
                    router.agent(&home.tenant, &agent, AgentCommand::Assigned { conversation, seq })
                {
                    drop(shown.wait().await);
                }
            }
        }
    }
}
