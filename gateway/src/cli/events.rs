//! `patchbay events`: shows events as they come, and publishes what the store holds again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use patchbay_actors::directory::Directory;
use patchbay_actors::node::note_events_begun;
use patchbay_protocol::event::{Event, Origin};
use patchbay_protocol::ids::{AccountId, ConversationId, InboxId, TenantId};
use patchbay_protocol::{CommandError, Entry, Timestamp};
use patchbay_storage::events::{Delivered, SendError, Sink, Source as _, Start};
use patchbay_storage::log::{LogKey, Logs};
use patchbay_storage::tables::{INBOX_PARTS, Set, Tables};
use serde_json::{Value, json};

use super::run::Stop;
use super::{ConfigArgs, Failure, runtime, start_logs};
use crate::config::Config;
use crate::engines::{self, Store};
use crate::health::Health;

/// Entries that one read brings, and bytes.
const READ_ROWS: usize = 1000;
const READ_BYTES: usize = 4 << 20;
/// Conversations that one read brings.
const PAGE: usize = 1000;
/// Events under way.
const WINDOW: usize = 4096;
/// A sink that takes nothing is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(5);

/// Events: what is published of the entries.
#[derive(Args)]
pub(crate) struct EventsCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Prints events as they come.
    ///
    /// Example: patchbay events tail --from-start --json
    Tail(Tail),
    /// Publishes what the store holds again, each conversation in its order. With the embedded store the node must be
    /// stopped; on ScyllaDB or Cassandra it may run.
    ///
    /// Example: patchbay events replay --from start --topic patchbay.events.v2
    Replay(Replay),
}

impl EventsCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::Tail(tail) => tail.run(),
            Action::Replay(replay) => replay.run(),
        }
    }
}

#[derive(Args)]
struct Tail {
    #[command(flatten)]
    config: ConfigArgs,
    /// From the first event that there is, not from now on.
    #[arg(long)]
    from_start: bool,
    /// Of this tenant only.
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Of this conversation only.
    #[arg(long)]
    conversation: Option<ConversationId>,
    /// Ends after so many.
    #[arg(long)]
    count: Option<u64>,
    /// Prints a JSON object a line: `{"key","headers","value"}`.
    #[arg(long)]
    json: bool,
}

impl Tail {
    fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        start_logs(&config.log);
        runtime()?.block_on(async {
            let mut stop = Stop::new()?;
            let group = format!("tail-{:016x}", rand::random::<u64>());
            let start = if self.from_start { Start::Earliest } else { Start::Latest };
            let mut source = engines::source(&config, &group, start).map_err(Failure::of_start)?;
            let mut left = self.count.unwrap_or(u64::MAX);
            while left > 0 {
                let received = tokio::select! {
                    received = source.next() => received,
                    () = stop.first() => break,
                };
                let received = match received {
                    Ok(received) => received,
                    Err(e) => {
                        tracing::warn!(why = %e, "events cannot be read");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                };
                let envelope = received.envelope;
                let key = envelope.key.split_once('/').unwrap_or_default();
                let wanted = self.tenant.as_ref().is_none_or(|t| t.as_str() == key.0)
                    && self.conversation.is_none_or(|c| c.to_string() == key.1);
                if !wanted {
                    continue;
                }
                left -= 1;
                let value: Value = serde_json::from_slice(&envelope.value).unwrap_or(Value::Null);
                if self.json {
                    let headers: HashMap<_, _> = envelope.headers.into_iter().collect();
                    println!("{}", json!({"key": envelope.key, "headers": headers, "value": value}));
                } else {
                    println!("{} {} {} {}", value["at"], envelope.key, value["seq"], value["type"]);
                }
            }
            engines::forget_group(&config, &group);
            Ok(())
        })
    }
}

/// From where on.
#[derive(Clone, Copy, Debug)]
enum From {
    Start,
    At(Timestamp),
}

fn parse_from(text: &str) -> Result<From, String> {
    match text {
        "start" => Ok(From::Start),
        text => Timestamp::parse(text)
            .map(From::At)
            .ok_or_else(|| "`start`, or an instant such as 2026-11-21T09:00:00Z".into()),
    }
}

#[derive(Args)]
struct Replay {
    #[command(flatten)]
    config: ConfigArgs,
    /// `start`, or an instant: each conversation's entries from the first that was made then or later.
    #[arg(long, value_parser = parse_from)]
    from: From,
    /// Of this tenant only.
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Of this conversation only.
    #[arg(long)]
    conversation: Option<ConversationId>,
    /// Into this topic instead of the configured one (Kafka only).
    #[arg(long)]
    topic: Option<String>,
    /// Prints `{"conversations","events"}`.
    #[arg(long)]
    json: bool,
}

impl Replay {
    fn run(self) -> Result<(), Failure> {
        let mut config = self.config.load().map_err(Failure::Config)?;
        start_logs(&config.log);
        let whole = matches!(self.from, From::Start)
            && self.tenant.is_none()
            && self.conversation.is_none()
            && self.topic.is_none();
        if let Some(topic) = &self.topic {
            config.events.kafka.topic.clone_from(topic);
        }
        runtime()?.block_on(async {
            let store = Store::open(&config, &Health::default()).await.map_err(Failure::of_start)?;
            let mut replaying = Replaying::new(&config, &store, self.from).await?;
            let directory = Directory::new(store.engine());
            for tenant in tenants(&directory, self.tenant.as_ref()).await? {
                for (account, inbox) in accounts(&directory, &tenant).await? {
                    replaying.account(&tenant, &account, &inbox, self.conversation).await?;
                }
            }
            replaying.settle(0).await?;
            replaying.bar.finish_and_clear();
            if whole {
                // Every entry of before is published: the outbox may begin.
                note_events_begun(&Tables::new(store.engine()))
                    .await
                    .map_err(|e| Failure::Other(format!("the replay cannot be noted: {e}")))?;
            }
            if self.json {
                println!("{}", json!({"conversations": replaying.conversations, "events": replaying.events}));
            }
            Ok(())
        })
    }
}

fn failed(error: &CommandError) -> Failure {
    Failure::Other(format!("the store: {}", error.message()))
}

async fn tenants(directory: &Directory, only: Option<&TenantId>) -> Result<Vec<TenantId>, Failure> {
    if let Some(only) = only {
        return Ok(vec![only.clone()]);
    }
    let mut found: Vec<TenantId> = Vec::new();
    loop {
        let after = found.last().map(ToString::to_string).unwrap_or_default();
        let page = directory.tenants(&after, PAGE).await.map_err(|e| failed(&e))?;
        if page.is_empty() {
            return Ok(found);
        }
        found.extend(page.iter().filter_map(|(id, _)| id.parse().ok()));
    }
}

async fn accounts(directory: &Directory, tenant: &TenantId) -> Result<Vec<(AccountId, InboxId)>, Failure> {
    let mut found: Vec<(AccountId, InboxId)> = Vec::new();
    loop {
        let after = found.last().map(|(id, _)| id.to_string()).unwrap_or_default();
        let page = directory.accounts(tenant, &after, PAGE).await.map_err(|e| failed(&e))?;
        if page.is_empty() {
            return Ok(found);
        }
        found.extend(page.into_iter().filter_map(|(id, a)| Some((id.parse().ok()?, a.inbox))));
    }
}

/// A replay that is under way.
struct Replaying {
    tables: Tables,
    logs: Logs,
    shards: u32,
    from: From,
    sink: Arc<dyn Sink>,
    delivered: Delivered,
    in_flight: usize,
    conversations: u64,
    events: u64,
    bar: ProgressBar,
}

impl Replaying {
    async fn new(config: &Config, store: &Store, from: From) -> Result<Self, Failure> {
        let (deliveries, delivered) = patchbay_storage::events::deliveries();
        let sink = engines::sink(config, deliveries).map_err(Failure::of_start)?;
        sink.open(0).await.map_err(|why| Failure::Other(format!("events: {why}")))?;
        let style = ProgressStyle::with_template("{spinner} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        Ok(Self {
            tables: Tables::new(store.engine()),
            logs: Logs::new(store.engine()),
            shards: config.cluster.shards,
            from,
            sink,
            delivered,
            in_flight: 0,
            conversations: 0,
            events: 0,
            bar: ProgressBar::new_spinner().with_style(style),
        })
    }

    async fn account(
        &mut self,
        tenant: &TenantId,
        account: &AccountId,
        inbox: &InboxId,
        only: Option<ConversationId>,
    ) -> Result<(), Failure> {
        let broken = |e| Failure::Other(format!("the store: {e}"));
        if let Some(id) = only {
            let summary = self.tables.summary(tenant, account, id).await.map_err(broken)?;
            return match summary {
                Some(summary) => self.conversation(tenant, account, inbox, id, summary.last_seq).await,
                None => Ok(()),
            };
        }
        let parts =
            [Set::Open, Set::Past].into_iter().flat_map(|set| (0..INBOX_PARTS).map(move |part| (set, part)));
        for (set, part) in parts {
            let mut after = None;
            loop {
                let page = self.tables.summaries_page(tenant, account, set, part, after, PAGE).await;
                let page = page.map_err(broken)?;
                let Some(last) = page.last() else { break };
                after = Some(last.id);
                for summary in page {
                    let newest = self.tables.summary(tenant, account, summary.id).await.map_err(broken)?;
                    if newest.is_some_and(|newest| newest.last_seq == summary.last_seq) {
                        self.conversation(tenant, account, inbox, summary.id, summary.last_seq).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What its owner had shown of it when its summary was written, and whatever stands behind that without a gap.
    async fn conversation(
        &mut self,
        tenant: &TenantId,
        account: &AccountId,
        inbox: &InboxId,
        id: ConversationId,
        tip: u64,
    ) -> Result<(), Failure> {
        let key = LogKey { entity: *id.as_bytes(), shard: id.shard(self.shards) };
        let origin = Arc::new(Origin { tenant: tenant.clone(), account: account.clone(), conversation: id });
        let (mut after, mut begun) = (0, matches!(self.from, From::Start));
        while after < tip {
            let rows = self.logs.forward(key, after, tip, READ_ROWS, READ_BYTES).await;
            let rows = rows.map_err(|e| Failure::Other(format!("{id} behind {after}: {e}")))?;
            for row in rows {
                after = row.seq;
                if let From::At(at) = self.from {
                    begun = begun
                        || serde_json::from_slice::<Entry>(&row.payload).is_ok_and(|entry| entry.at >= at);
                }
                if begun {
                    let event = Event {
                        origin: origin.clone(),
                        inbox: inbox.clone(),
                        seq: row.seq,
                        entry: row.payload,
                    };
                    self.send(&event).await?;
                }
            }
        }
        self.conversations += 1;
        self.bar.set_message(format!("{} conversations, {} events", self.conversations, self.events));
        self.bar.tick();
        Ok(())
    }

    async fn send(&mut self, event: &Event) -> Result<(), Failure> {
        loop {
            match self.sink.send(event) {
                Ok(()) => break,
                Err(SendError::Full) => tokio::time::sleep(FULL_PAUSE).await,
                Err(SendError::Fault(fault)) => return Err(Failure::Other(format!("events: {fault:?}"))),
            }
        }
        self.in_flight += 1;
        self.events += 1;
        if self.in_flight >= WINDOW { self.settle(WINDOW / 2).await } else { Ok(()) }
    }

    /// Waits until at most `left` are under way.
    async fn settle(&mut self, left: usize) -> Result<(), Failure> {
        while self.in_flight > left {
            let Some(told) = self.delivered.recv().await else { break };
            self.in_flight -= 1;
            if let Err(fault) = told.outcome {
                return Err(Failure::Other(format!("events: {}-{}: {fault:?}", told.conversation, told.seq)));
            }
        }
        Ok(())
    }
}
