//! What agents and the API do: finds the conversation, asks whether this principal may, checks the content against
//! the channel, hands the command over.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::command::{Command, Opening, Reply, Request, Scope, SendMessage, SendReply, Tip};
use patchbay_protocol::content::Media;
use patchbay_protocol::entry::{Actor, ActorType, CausedBy};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use patchbay_protocol::inbound::{AccountEvent, Address, AddressKind, ThreadEvent};
use patchbay_protocol::outbound::Lane;
use patchbay_protocol::principal::{AgentPrincipal, ContactPrincipal};
use patchbay_protocol::summary::{Contact, Summary};
use patchbay_protocol::{CommandError, Content, ErrorCode, Timestamp};
use patchbay_storage::ReadError;
use patchbay_storage::log::LogKey;
use tokio::time::Instant;

use crate::account::{AccountCommand, AccountReply};
use crate::conversation::window_closed;
use crate::directory::{Account, MediaState};
use crate::inbox::{Filter, InboxCommand, InboxReply, Position};
use crate::node::Node;
use crate::router::{Answer, Router, command_id};

/// A page of entries.
pub const PAGE_ENTRIES_MAX: usize = 1000;
/// Its size, about.
pub const PAGE_BYTES_MAX: usize = 512 * 1024;
/// The content of one message that is sent, as JSON.
pub const CONTENT_BYTES_MAX: usize = 64 * 1024;
/// A customer is shown typing at most this often.
const TYPING_PAUSE: Duration = Duration::from_secs(20);
/// Records of an account's log that one request looks at.
const EVENT_RECORDS_MAX: u64 = 20_000;
/// Conversations whose account is remembered.
const PLACES_MAX: usize = 200_000;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// An agent on a socket.
    Agent(AgentPrincipal),
    /// A tenant's API key.
    Api(TenantId),
}

impl Who {
    /// The tenant.
    pub fn tenant(&self) -> &TenantId {
        match self {
            Self::Agent(a) => &a.tenant,
            Self::Api(t) => t,
        }
    }

    fn actor(&self) -> Actor {
        match self {
            Self::Agent(a) => Actor::new(ActorType::Agent, a.agent.as_str()),
            Self::Api(t) => Actor::new(ActorType::Api, t.as_str()),
        }
    }

    fn lane(&self) -> Lane {
        match self {
            Self::Agent(_) => Lane::Agent,
            Self::Api(_) => Lane::Automation,
        }
    }

    fn may_see(&self, inbox: &InboxId) -> bool {
        match self {
            Self::Agent(a) => a.may_see(inbox),
            Self::Api(_) => true,
        }
    }
}

/// A conversation that the asker may see.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where commands to it act.
    pub scope: Scope,
    /// Its account.
    pub account: Arc<Account>,
}

/// Which entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// After this seq, ascending.
    After(u64),
    /// Before this seq, descending; `None`: from the tip.
    Before(Option<u64>),
}

/// What happened to an account as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct AccountEvents {
    /// (seq, when, what), ascending.
    pub events: Vec<(u64, Timestamp, AccountEvent)>,
    /// Where to go on.
    pub next: Option<u64>,
}

/// Entries with the tip that bounds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entries {
    /// (seq, entry as JSON), in the page's order.
    pub entries: Vec<(u64, Bytes)>,
    /// The owner's confirmed tip.
    pub tip: u64,
}

/// Whether a message's content fits: a whole entry fits into a frame with room to spare.
pub fn check_size(content: &Content) -> Result<(), CommandError> {
    let bytes = serde_json::to_vec(content).map_or(usize::MAX, |c| c.len());
    if bytes <= CONTENT_BYTES_MAX { Ok(()) } else { Err(ErrorCode::TooLarge.into()) }
}

/// Whether the account's channel can carry it.
fn check_content(account: &Account, content: &Content) -> Result<(), CommandError> {
    check_size(content)?;
    patchbay_connectors::by_name(&account.connector).ok_or(ErrorCode::NotFound)?.check(content)
}

/// Whether a file's type is what the content says.
fn fits(content: &Content, mime: &str) -> bool {
    match content {
        Content::Image(_) => mime.starts_with("image/"),
        Content::Sticker(_) => mime == "image/webp",
        Content::Video(_) => mime.starts_with("video/"),
        // One container holds either.
        Content::Audio(_) | Content::Voice(_) => mime.starts_with("audio/") || mime == "video/mp4",
        _ => true,
    }
}

/// The desk of a node.
pub struct Desk {
    node: Arc<Node>,
    places: Mutex<HashMap<ConversationId, (TenantId, AccountId)>>,
    typing: Mutex<HashMap<ConversationId, Instant>>,
}

impl crate::memory::Cache for Desk {
    fn shrink(&self) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = HashMap::new();
        self.typing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, at| at.elapsed() < TYPING_PAUSE);
    }
}

impl Desk {
    /// The desk of `node`.
    pub fn new(node: Arc<Node>) -> Arc<Self> {
        let desk = Arc::new(Self { node, places: Mutex::default(), typing: Mutex::default() });
        desk.node.caches().add(&desk);
        desk
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    fn command(scope: &Scope, actor: Actor, request: Request) -> Command {
        Command { id: command_id(), scope: scope.clone(), actor, caused_by: None::<CausedBy>, request }
    }

    /// The confirmed tip of a conversation of this tenant; seq 0 when there is none.
    pub async fn tip(&self, tenant: &TenantId, id: ConversationId) -> Result<Tip, CommandError> {
        let mut command = crate::router::system_command(Request::Tip);
        command.scope.tenant = tenant.clone();
        match self.node.conversation(id, command)?.wait().await? {
            Reply::Tip(tip) => Ok(tip),
            _ => Err(ErrorCode::Internal.into()),
        }
    }

    /// The confirmed tip of a conversation that was found to be visible before.
    pub async fn tip_of(&self, id: ConversationId) -> Result<u64, CommandError> {
        let known = self.places.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let (tenant, _) = known.ok_or_else(CommandError::unavailable)?;
        self.tip(&tenant, id).await.map(|t| t.seq)
    }

    /// `not_found`, after the work that an id costs which is nobody's: the time of an answer tells nothing.
    async fn nobodys(&self, tenant: &TenantId, id: ConversationId) -> CommandError {
        let mut other = *id.as_bytes();
        other.iter_mut().for_each(|b| *b = !*b);
        match self.tip(tenant, ConversationId::from_bytes(other)).await {
            Err(error) if error.code.is_temporary() => error,
            _ => ErrorCode::NotFound.into(),
        }
    }

    /// Where a conversation is, if this tenant has it and its account is still there.
    pub async fn place(&self, tenant: &TenantId, id: ConversationId) -> Result<Place, CommandError> {
        let known = self.places.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let account = match known {
            Some((t, account)) if t == *tenant => account,
            Some(_) => return Err(self.nobodys(tenant, id).await),
            None => {
                let was_active = self.node.is_active(id);
                let account = match self.tip(tenant, id).await?.account {
                    Some(account) => account,
                    // What is in memory answers sooner than what is not there.
                    None if was_active => return Err(self.nobodys(tenant, id).await),
                    None => return Err(ErrorCode::NotFound.into()),
                };
                let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
                if places.len() >= PLACES_MAX {
                    places.clear();
                }
                places.insert(id, (tenant.clone(), account.clone()));
                account
            }
        };
        let directory = self.node.directory();
        let scope = directory.scope(tenant, &account).await?.ok_or(ErrorCode::NotFound)?;
        let account = directory.account(tenant, &account).await?.ok_or(ErrorCode::NotFound)?;
        Ok(Place { scope, account })
    }

    /// Where a conversation is, if `who` may see it: its account's present inbox decides.
    pub async fn visible(&self, who: &Who, id: ConversationId) -> Result<Place, CommandError> {
        let place = self.place(who.tenant(), id).await?;
        if who.may_see(&place.scope.inbox) { Ok(place) } else { Err(ErrorCode::NotFound.into()) }
    }

    /// Hands a command over. Returns when it is in the conversation's mailbox, in order with what the same caller
    /// handed over before.
    pub async fn submit(
        &self,
        who: &Who,
        id: ConversationId,
        request: Request,
    ) -> Result<Answer<Reply>, CommandError> {
        let place = self.visible(who, id).await?;
        if let (Request::Assign(to), Who::Agent(agent)) = (&request, who)
            && !agent.may_assign(to.agent.as_ref())
        {
            return Err(ErrorCode::PermissionDenied.into());
        }
        if let Request::Assign(to) = &request {
            self.check_assignee(who.tenant(), to.agent.as_ref()).await?;
        }
        if let Request::Send { message, .. } = &request {
            self.check_send(&place.scope, &place.account, message)?;
            self.check_file(&place.scope, id, &message.content).await?;
        }
        if let Request::Edit(edit) = &request
            && place.scope.channel.can_edit
        {
            check_content(&place.account, &edit.content)?;
            self.check_file(&place.scope, id, &edit.content).await?;
        }
        self.node.conversation(id, Self::command(&place.scope, who.actor(), request))
    }

    /// Hands a visitor's command over to its own conversation.
    pub async fn submit_contact(
        &self,
        contact: &ContactPrincipal,
        mut request: Request,
    ) -> Result<Answer<Reply>, CommandError> {
        let scope = self.node.directory().scope(&contact.tenant, &contact.account).await?;
        let scope = scope.ok_or(ErrorCode::NotFound)?;
        if let Request::Receive { event: ThreadEvent::Message(message), .. } = &mut request
            && let Some(media) = message.content.media()
        {
            // A visitor sends what it has put here itself, and what it is its bytes say.
            let own = self.node.directory().media(&contact.tenant, &media.id).await?;
            let Some(record) = own.filter(|r| r.conversations.contains(&contact.conversation())) else {
                return Err(CommandError::invalid("content.media.id: there is no such file"));
            };
            let known = Media {
                id: media.id.clone(),
                mime: record.mime,
                name: record.name,
                sha256: record.sha256,
                bytes: record.bytes,
            };
            message.content = message.content.clone().with_media(known);
            self.check_file(&scope, contact.conversation(), &message.content).await?;
        }
        let actor = Actor::new(ActorType::Contact, &contact.visitor);
        self.node.conversation(contact.conversation(), Self::command(&scope, actor, request))
    }

    /// A file of ours must be here and be what the message says it is. On our own channel there are no others.
    async fn check_file(
        &self,
        scope: &Scope,
        id: ConversationId,
        content: &Content,
    ) -> Result<(), CommandError> {
        let Some(media) = content.media() else { return Ok(()) };
        let refused = |why: &str| Err(CommandError::invalid(format!("content.media.id: {why}")));
        match self.node.directory().media(&scope.tenant, &media.id).await? {
            None if scope.channel.direct => return refused("there is no such file"),
            // It may be the provider's.
            None => return Ok(()),
            Some(record) if record.state != MediaState::Ready => return refused("the file is not ready"),
            Some(record) if !fits(content, &record.mime) => {
                return refused(&format!("{} is no {}", record.mime, content.kind()));
            }
            Some(_) => {}
        }
        if scope.channel.direct {
            self.node.directory().share_media(&scope.tenant, &media.id, id).await?;
        }
        Ok(())
    }

    async fn check_assignee(&self, tenant: &TenantId, agent: Option<&AgentId>) -> Result<(), CommandError> {
        match agent {
            Some(agent) if self.node.directory().agent(tenant, agent).await?.is_none() => {
                Err(CommandError::invalid("agent: there is no such agent"))
            }
            _ => Ok(()),
        }
    }

    fn check_send(
        &self,
        scope: &Scope,
        account: &Account,
        message: &SendMessage,
    ) -> Result<(), CommandError> {
        check_content(account, &message.content)?;
        if self.node.is_full(&scope.tenant, &scope.account) {
            Err(CommandError::overloaded(1000))
        } else {
            Ok(())
        }
    }

    /// A request to send, with the asker's lane.
    pub fn send_request(who: &Who, message: SendMessage) -> Request {
        Request::Send { message, lane: who.lane(), opening: None }
    }

    /// Sends to an address, in whosever thread it is; opens the conversation if there is none.
    pub async fn send_to(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        to: &str,
        message: SendMessage,
    ) -> Result<(ConversationId, SendReply), CommandError> {
        let who = Who::Api(tenant.clone());
        let directory = self.node.directory();
        let document = directory.account(tenant, account).await?.ok_or(ErrorCode::NotFound)?;
        let scope = directory.scope(tenant, account).await?.ok_or(ErrorCode::NotFound)?;
        let connector = patchbay_connectors::by_name(&document.connector).ok_or(ErrorCode::NotFound)?;
        let address = connector.recipient(to)?;
        self.check_send(&scope, &document, &message)?;
        self.check_file(&scope, ConversationId::derive(tenant, account, &address), &message.content).await?;
        if scope.channel.direct {
            // The visitor's id is the thread key.
            return self.open_with(&who, scope, address.clone(), address, message).await;
        }
        let addresses = vec![Address { kind: AddressKind::WaId, value: address.clone() }];
        let find = AccountCommand::Find { addresses: addresses.clone() };
        let thread = match self.node.account(tenant, account, find)?.wait().await? {
            AccountReply::Thread(Some(thread)) => thread,
            // Nobody has written yet, so no window is open; what would be refused leaves no alias behind.
            _ if scope.channel.window.is_some() && !matches!(message.content, Content::Template { .. }) => {
                return Err(window_closed(None));
            }
            _ => {
                let resolve = AccountCommand::Resolve { addresses };
                match self.node.account(tenant, account, resolve)?.wait().await? {
                    AccountReply::Thread(Some(thread)) => thread,
                    _ => return Err(ErrorCode::Internal.into()),
                }
            }
        };
        self.open_with(&who, scope, thread.thread, address, message).await
    }

    /// Sends into a thread, opening its conversation if there is none.
    async fn open_with(
        &self,
        who: &Who,
        scope: Scope,
        thread: String,
        address: String,
        message: SendMessage,
    ) -> Result<(ConversationId, SendReply), CommandError> {
        let id = ConversationId::derive(&scope.tenant, &scope.account, &thread);
        let contact = Contact { address, ..Contact::default() };
        let opening = Some(Opening { thread, contact });
        let request = Request::Send { message, lane: who.lane(), opening };
        match self.node.conversation(id, Self::command(&scope, who.actor(), request))?.wait().await? {
            Reply::Sent(reply) => Ok((id, reply)),
            _ => Err(ErrorCode::Internal.into()),
        }
    }

    /// A conversation in one line.
    pub async fn summary(&self, who: &Who, id: ConversationId) -> Result<Summary, CommandError> {
        match self.submit(who, id, Request::Get).await?.wait().await? {
            Reply::Summary(summary) => Ok(*summary),
            _ => Err(ErrorCode::Internal.into()),
        }
    }

    /// A page of a log, bounded by the owner's word.
    pub async fn entries(
        &self,
        tenant: &TenantId,
        id: ConversationId,
        page: Page,
        limit: usize,
    ) -> Result<Entries, CommandError> {
        self.entries_within(tenant, id, page, limit, PAGE_BYTES_MAX).await
    }

    /// A page of a log of at most about `bytes_max`.
    pub async fn entries_within(
        &self,
        tenant: &TenantId,
        id: ConversationId,
        page: Page,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Entries, CommandError> {
        let tip = self.tip(tenant, id).await?.seq;
        self.read(id, page, tip, limit.min(PAGE_ENTRIES_MAX), bytes_max)
            .await
            .map_err(|_| CommandError::unavailable())
    }

    /// Reads up to a tip that the owner has said.
    pub async fn read(
        &self,
        id: ConversationId,
        page: Page,
        tip: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Entries, ReadError> {
        let logs = &self.node.shards().logs;
        let key = LogKey { entity: *id.as_bytes(), shard: id.shard(self.node.shards().count) };
        let rows = match page {
            Page::After(seq) if limit > 0 && seq < tip => {
                logs.forward(key, seq, tip, limit, bytes_max).await?
            }
            Page::Before(seq) if limit > 0 => {
                logs.backward(key, seq.unwrap_or(u64::MAX).min(tip + 1), limit, bytes_max).await?
            }
            Page::After(_) | Page::Before(_) => Vec::new(),
        };
        Ok(Entries { entries: rows.into_iter().map(|r| (r.seq, r.payload)).collect(), tip })
    }

    /// Shows the customer that somebody is writing, where the account wants that; at most once in 20 s.
    pub async fn typing(&self, who: &Who, id: ConversationId, on: bool) -> Result<(), CommandError> {
        let place = self.visible(who, id).await?;
        if !on || !place.account.settings.typing {
            return Ok(());
        }
        {
            let mut typing = self.typing.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            if typing.get(&id).is_some_and(|at| now.duration_since(*at) < TYPING_PAUSE) {
                return Ok(());
            }
            if typing.len() >= PLACES_MAX {
                typing.retain(|_, at| now.duration_since(*at) < TYPING_PAUSE);
            }
            typing.insert(id, now);
        }
        self.node
            .conversation(id, Self::command(&place.scope, who.actor(), Request::Typing))?
            .wait()
            .await
            .map(|_| ())
    }

    /// What happened to an account as a whole, after `after`. Looks at so many records only: a page may hold less than
    /// `limit` and still have a next one.
    pub async fn account_events(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        after: u64,
        limit: usize,
    ) -> Result<AccountEvents, CommandError> {
        let id = EntityId::Account(tenant.clone(), account.clone());
        let AccountReply::Tip(tip) = self.node.account(tenant, account, AccountCommand::Tip)?.wait().await?
        else {
            return Err(ErrorCode::Internal.into());
        };
        let key = LogKey { entity: id.key(), shard: id.shard(self.node.shards().count) };
        let (mut events, mut seen, mut bytes) = (Vec::new(), after, 0);
        while seen < tip && seen - after < EVENT_RECORDS_MAX && events.len() < limit && bytes < PAGE_BYTES_MAX
        {
            let rows =
                self.node.shards().logs.forward(key, seen, tip, PAGE_ENTRIES_MAX, PAGE_BYTES_MAX).await;
            for row in rows.map_err(|_| CommandError::unavailable())? {
                if events.len() == limit || bytes >= PAGE_BYTES_MAX {
                    break;
                }
                seen = row.seq;
                if let Some(event) = crate::account::event_of(&row.payload) {
                    bytes += row.payload.len();
                    events.push((row.seq, event.0, event.1));
                }
            }
        }
        Ok(AccountEvents { events, next: (seen < tip).then_some(seen) })
    }

    /// A page of conversations, newest first; of one inbox, or of every inbox that `who` may see.
    pub async fn list(
        &self,
        who: &Who,
        inbox: Option<&InboxId>,
        filter: &Filter,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Vec<Summary>, CommandError> {
        let tenant = who.tenant();
        let inboxes: Vec<InboxId> = match inbox {
            Some(inbox) => vec![inbox.clone()],
            None => self
                .node
                .directory()
                .inboxes(tenant, "", 1000)
                .await?
                .into_iter()
                .filter_map(|(id, _)| id.parse().ok())
                .collect(),
        };
        let mut found = Vec::new();
        for inbox in inboxes.iter().filter(|i| who.may_see(i)) {
            let list = InboxCommand::List { filter: filter.clone(), after, limit };
            if let InboxReply::List(page) = self.node.inbox(tenant, inbox, list)?.wait().await? {
                found.extend(page);
            }
        }
        found.sort_by_key(|s| Position(std::cmp::Reverse(s.updated_at), s.id));
        found.truncate(limit);
        Ok(found)
    }
}
