//! What an account does: calls the provider, tells conversations, places receipts.

use std::borrow::Cow;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use patchbay_protocol::command::{Reply, Request, Scope};
use patchbay_protocol::content::Media;
use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::ids::{AccountId, ConversationId, EntryId, InboxId, TenantId};
use patchbay_protocol::inbound::StatusUpdate;
use patchbay_protocol::outbound::{Backoff, CallResult, Outbound, Payload, Signal, Verdict};

use super::commands::{self, AccountCommand, KeptReceipt};
use super::entity::{Account, Effect};
use super::state::Kept;
use crate::directory::Account as Document;
use crate::ports::FileError;
use crate::router::command_id;
use crate::shard::log_actor::Handle;

/// The longest pause between two tries to tell a conversation.
const TELL_PAUSE_MAX: Duration = Duration::from_secs(2);

pub(super) async fn act(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    effect: Effect,
    me: &Handle<Account>,
) {
    match effect {
        Effect::Call(outbound) => {
            // Whatever fails on our side after this point, nobody knows whether the provider has seen it.
            let verdict = AssertUnwindSafe(call(shared, tenant, account, &outbound, me))
                .catch_unwind()
                .await
                .unwrap_or(Verdict::Unknown);
            me.tell(AccountCommand::Called { entry: outbound.entry, verdict, jitter: rand::random() });
        }
        Effect::Tell { entry, update } => {
            tell(shared, tenant, account, entry, *update).await;
            me.tell(AccountCommand::Told { entry });
        }
        Effect::Place { kept, receipt } => {
            if place(shared, tenant, account, &receipt).await {
                me.tell(AccountCommand::Placed { kept });
            }
        }
        Effect::Bury { seq, kept } => me.tell(bury(tenant, account, seq, &kept)),
        Effect::Signal(signal) => {
            // Not worth repeating, nor waiting for: the next one tells more.
            if let Ok(_place) = shared.signals.try_acquire() {
                send_signal(shared, tenant, account, &signal, me).await;
            }
        }
    }
}

fn not_ready(title: &str) -> Verdict {
    let error =
        ProviderError { code: super::commands::NOT_SENT.into(), title: title.into(), retryable: true };
    Verdict::Retry { error, after_ms: Some(1000), scope: Backoff::Account }
}

async fn call(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    outbound: &Outbound,
    me: &Handle<Account>,
) -> Verdict {
    const GOES: &str = "its shard goes to another node";
    if !me.may_begin() {
        return not_ready(GOES);
    }
    let document = match shared.directory.account(tenant, account).await {
        Ok(Some(document)) => document,
        Ok(None) => {
            let error = ProviderError {
                code: "account_deleted".into(),
                title: "the account is no more".into(),
                retryable: false,
            };
            return Verdict::Refused { error, closes_window: false };
        }
        Err(_) => return not_ready("the account cannot be read"),
    };
    let Some(connector) = patchbay_connectors::by_name(&document.connector) else {
        return not_ready("the connector is not there");
    };
    let ready = match with_file(shared, tenant, account, &document, outbound).await {
        Ok(ready) => ready,
        Err(verdict) => return verdict,
    };
    let call = match connector.render(&document.external_id, &ready) {
        Ok(call) => call,
        Err(error) => return Verdict::Refused { error, closes_window: false },
    };
    // The attempt is on record; the lease is asked last, whatever the account and the file have taken.
    if !me.may_begin() {
        return not_ready(GOES);
    }
    let started = tokio::time::Instant::now();
    let result = shared.provider.call(&document, call).await;
    let outcome = match &result {
        CallResult::Answered { .. } => "answered",
        CallResult::NotSent => "not_sent",
        CallResult::Lost => "lost",
    };
    metrics::histogram!("patchbay_outbound_call_seconds", "outcome" => outcome)
        .record(started.elapsed().as_secs_f64());
    connector.classify(&result)
}

/// The message with its file by the provider's id. Nothing of the message has left before that.
async fn with_file<'a>(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    document: &Document,
    outbound: &'a Outbound,
) -> Result<Cow<'a, Outbound>, Verdict> {
    let Payload::Message(content) = &outbound.payload else { return Ok(Cow::Borrowed(outbound)) };
    let Some(media) = content.media() else { return Ok(Cow::Borrowed(outbound)) };
    match shared.provider.file(tenant, account, document, media).await {
        Ok(id) => {
            let media = Media { id, ..media.clone() };
            let payload = Payload::Message(content.clone().with_media(media));
            Ok(Cow::Owned(Outbound { payload, ..outbound.clone() }))
        }
        Err(FileError::Held(verdict)) => Err(verdict),
        Err(FileError::NotOurs) => Ok(Cow::Borrowed(outbound)),
        Err(FileError::Later) => {
            let error = ProviderError {
                code: "media".into(),
                title: "the file was not taken".into(),
                retryable: true,
            };
            Err(Verdict::Retry { error, after_ms: None, scope: Backoff::Message })
        }
        Err(FileError::Final(title)) => {
            let error = ProviderError { code: "media".into(), title, retryable: false };
            Err(Verdict::Refused { error, closes_window: false })
        }
    }
}

async fn send_signal(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    signal: &Signal,
    me: &Handle<Account>,
) {
    let Ok(Some(document)) = shared.directory.account(tenant, account).await else { return };
    let call = patchbay_connectors::by_name(&document.connector)
        .and_then(|c| c.signal(&document.external_id, signal));
    if let Some(call) = call.filter(|_| me.may_begin()) {
        shared.provider.call(&document, call).await;
    }
}

/// A command of the account to one of its conversations.
async fn ask(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    id: ConversationId,
    request: Request,
) -> Option<Reply> {
    let router = shared.router.get()?.upgrade()?;
    let scope = match shared.directory.scope(tenant, account).await.ok()? {
        Some(scope) => scope,
        // The account is gone; its conversations are still told.
        None => Scope {
            tenant: tenant.clone(),
            account: account.clone(),
            inbox: InboxId::nobody(),
            channel: crate::router::no_channel(),
        },
    };
    let command = patchbay_protocol::command::Command {
        id: command_id(),
        scope,
        actor: patchbay_protocol::Actor::system(),
        caused_by: None,
        request,
    };
    router.conversation(id, command).ok()?.wait().await.ok()
}

async fn tell(
    shared: &Account,
    tenant: &TenantId,
    account: &AccountId,
    entry: EntryId,
    update: StatusUpdate,
) {
    let mut pause = Duration::from_millis(20);
    loop {
        let request = Request::Outcome { message_seq: entry.seq, update: update.clone() };
        if ask(shared, tenant, account, entry.conversation, request).await.is_some() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(TELL_PAUSE_MAX);
    }
}

async fn place(shared: &Account, tenant: &TenantId, account: &AccountId, receipt: &KeptReceipt) -> bool {
    let Some(id) = receipt.conversation else { return false };
    let request = Request::Receipt { message_seq: receipt.message_seq, update: receipt.update.clone() };
    matches!(ask(shared, tenant, account, id, request).await, Some(Reply::Taken))
}

fn bury(tenant: &TenantId, account: &AccountId, seq: u64, kept: &Kept) -> AccountCommand {
    let reason = "a receipt that matched no message for 24 hours";
    let letter = commands::receipt_letter(account, &seq.to_string(), kept.at, &kept.update, reason);
    AccountCommand::DeadLetter { tenant: tenant.clone(), letter: Box::new(letter), kept: Some(seq) }
}
