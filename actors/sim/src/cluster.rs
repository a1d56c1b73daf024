//! Whole clusters: nodes as they are, over a store of three replicas, a network, a provider and clocks that misbehave, with
//! customers, agents and viewers who come back whatever happens.
//!
//! After every step: of each shard at most one node holds a reign under a lease that it holds by its own clock; an epoch
//! has one writer for ever; what anybody was shown stands; what was acked stays where it was acked; the provider is called
//! for a message at most once. In the end, when nothing more goes wrong: every shard is served and the load is balanced,
//! every log is gap-free and has everything that was acked once, in the order in which its sender said it; receipts climb;
//! every message that went out was sent, failed or is unknown; every entry is published, and every viewer was shown all.
//! Where nothing goes wrong but that the store stands still, nobody loses its incarnation.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};

use patchbay_actors::account::AccountCommand;
use patchbay_actors::agent::AgentCommand;
use patchbay_actors::desk::{Desk, Page, Who};
use patchbay_actors::directory::{Account, Inbox, Settings};
use patchbay_actors::fanout::Topic;
use patchbay_actors::inbox::Filter;
use patchbay_actors::router::Router as _;
use patchbay_connectors::Connector as _;
use patchbay_protocol::command::{AddNote, Reply, Request, SendMessage, SnoozeConversation};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::{CommandError, Content, ConversationId, ErrorCode, Timestamp};
use serde_json::{Value, json};

use crate::network::Net;
use crate::outside::{Events, Judge, Phone};
use crate::process::{Around, Process, SHARDS, Up, Viewer};
use crate::replicas::Replicas;
use crate::world::{World, lock};

/// Between two steps, in milliseconds: nothing happens faster.
const STEP: u64 = 5;
/// Faults end here; what is under way has so long to end; then shards move once more, and everything is looked at.
const FAULTS_UNTIL: u64 = 14_000;
const ENDS_WITHIN: u64 = 45_000;
/// A client gives an answer up after so long.
const PATIENCE: u64 = 6_000;
/// When nothing is wrong whatever is written is shown everywhere within this.
const SHOWN_WITHIN: u64 = 3_000;

const CONVERSATIONS: usize = 5;
const VIEWERS: usize = 3;

fn tenant() -> patchbay_protocol::ids::TenantId {
    "t".parse().unwrap_or_else(|_| unreachable!())
}

fn account() -> patchbay_protocol::ids::AccountId {
    "wa".parse().unwrap_or_else(|_| unreachable!())
}

fn thread(n: usize) -> String {
    format!("3460000{n:04}")
}

fn customer_of(id: ConversationId) -> usize {
    (0..CONVERSATIONS).find(|n| conversation(*n) == id).unwrap_or(CONVERSATIONS)
}

fn conversation(n: usize) -> ConversationId {
    ConversationId::derive(&tenant(), &account(), &thread(n))
}

/// What happened in a run.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Report {
    acked: u64,
    entries: u64,
    calls: u64,
    crashes: u64,
    pauses: u64,
    cuts: u64,
    drains: u64,
    reigns: u64,
}

impl Report {
    fn fields(&mut self) -> [(&'static str, &mut u64); 8] {
        [
            ("commands acked", &mut self.acked),
            ("entries", &mut self.entries),
            ("provider calls", &mut self.calls),
            ("crashes", &mut self.crashes),
            ("pauses", &mut self.pauses),
            ("cuts", &mut self.cuts),
            ("drains", &mut self.drains),
            ("reigns", &mut self.reigns),
        ]
    }

    pub(crate) fn line(mut self) -> String {
        self.fields().map(|(_, n)| n.to_string()).join(" ")
    }

    /// Adds what [`Self::line`] has told of another run.
    pub(crate) fn add(&mut self, line: &str) {
        let more = line.split(' ').filter_map(|n| n.parse::<u64>().ok());
        self.fields().into_iter().zip(more).for_each(|((_, field), n)| *field += n);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&{ *self }.fields().map(|(name, n)| format!("{n} {name}")).join(", "))
    }
}

/// What a client waits for: filled by a task in some process, or never.
type Slot<T> = Arc<Mutex<Option<T>>>;

struct Waits<T> {
    slot: Slot<T>,
    since: u64,
    at: usize,
}

/// What is said to a conversation under an id of the client's.
#[derive(Clone, Debug)]
struct Saying {
    client_id: String,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Send,
    Note,
    /// Which has no id of the client's: it is said once, whatever comes of it.
    Snooze(Timestamp),
}

/// What was not answered, and in the order in which it was said where the rest stands.
type Heard = (Vec<Saying>, Vec<u64>);

/// An agent: says some things at once, in order, and says again what was not answered.
struct Agent {
    conversation: usize,
    said: u64,
    left: Vec<Saying>,
    /// Nothing of what is left was said before.
    is_new: bool,
    waits: Option<Waits<Heard>>,
    next_at: u64,
}

/// Somebody who posts webhooks until they are taken: a customer's messages one after another, or the provider's receipts.
struct Poster {
    body: Option<Vec<u8>>,
    waits: Option<Waits<bool>>,
    next_at: u64,
    customer: Option<(usize, u64)>,
}

struct Sim {
    around: Around,
    processes: Vec<Process>,
    agents: Vec<Agent>,
    posters: Vec<Poster>,
    viewers: Vec<(Arc<Viewer>, usize, Option<Waits<()>>)>,
    /// Nobody says anything new.
    over: bool,
    ready: bool,
    /// Which incarnation has served an epoch of a shard.
    reigns: HashMap<(u32, u32), u32>,
    report: Report,
    /// Nothing goes wrong but that the store stands still for everybody: until then, and who was there before.
    frost: Option<(u64, Vec<Option<u32>>)>,
    /// Held by every drain that is under way.
    draining: Arc<()>,
}

fn webhook(messages: &[Value], statuses: &[Value]) -> Vec<u8> {
    let value = json!({"metadata": {"phone_number_id": "1"}, "contacts": [], "messages": messages, "statuses": statuses});
    json!({"entry": [{"changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

async fn post(up: &Up, body: &[u8]) -> bool {
    // One that cannot be read is never taken.
    let Ok(items) = patchbay_connectors::whatsapp::WhatsApp.parse(body) else { return false };
    let Ok(Some(document)) = up.node.directory().account(&tenant(), &account()).await else { return false };
    up.intake.take(&tenant(), &account(), &document, items).await.is_ok()
}

/// What a client hears of its command; an error that is for ever is a fault of the world.
fn heard(
    judge: &Judge,
    id: ConversationId,
    saying: &Saying,
    was_there: bool,
    answer: Result<Reply, CommandError>,
) -> Option<u64> {
    match answer {
        Ok(Reply::Sent(sent)) => {
            judge.acked(id, &saying.client_id, sent.seq);
            Some(sent.seq)
        }
        Ok(Reply::State(_)) if matches!(saying.what, What::Snooze(_)) => None,
        Ok(other) => {
            judge.world.fail(|| format!("{saying:?} is answered by {other:?}"));
            None
        }
        Err(error) => {
            let fits = match error.code {
                ErrorCode::Internal => false,
                ErrorCode::NotFound => !was_there,
                code => code.is_temporary(),
            };
            if !fits {
                judge.world.fail(|| format!("{saying:?} is answered by {error:?}"));
            }
            None
        }
    }
}

/// Says all of it at once and in order; what was not answered is left.
async fn say(up: Up, judge: Judge, id: ConversationId, all: Vec<Saying>) -> Heard {
    let who = Who::Api(tenant());
    let was_there = judge.truth().shown.contains_key(&(id, 1));
    let mut under_way = Vec::new();
    let mut left = Vec::new();
    for saying in all {
        let client_id = saying.client_id.clone();
        let request = match saying.what {
            What::Send => {
                let content = Content::Text { text: client_id.clone() };
                Desk::send_request(&who, SendMessage { client_id, content, reply_to: None, if_seq: None })
            }
            What::Note => Request::Note(AddNote { client_id: client_id.clone(), text: client_id }),
            What::Snooze(until) => Request::Snooze(SnoozeConversation { until }),
        };
        match up.desk.submit(&who, id, request).await {
            Ok(answer) => under_way.push((saying, answer)),
            Err(error) => {
                heard(&judge, id, &saying, was_there, Err(error));
                left.push(saying);
            }
        }
    }
    let mut stand = Vec::new();
    for (saying, answer) in under_way {
        match heard(&judge, id, &saying, was_there, answer.wait().await) {
            Some(seq) => stand.push(seq),
            None => left.push(saying),
        }
    }
    (left, stand)
}

async fn catch_up(up: &Up, viewer: &Viewer) {
    for id in viewer.behind() {
        // What comes while it is read may leave it behind again.
        viewer.set_behind(id, false);
        match up.desk.entries(&tenant(), id, Page::After(viewer.len(id)), 1000).await {
            Ok(page) => {
                page.entries.iter().for_each(|(seq, entry)| viewer.take(id, *seq, entry));
                if viewer.len(id) < page.tip {
                    viewer.set_behind(id, true);
                }
            }
            Err(error) if error.code == ErrorCode::NotFound && viewer.len(id) == 0 => {}
            Err(_) => viewer.set_behind(id, true),
        }
    }
}

/// A viewer is an agent, too, who is there for as long as its socket is open.
fn agent_of(viewer: &Viewer) -> patchbay_protocol::ids::AgentId {
    viewer.name.replace(' ', "-").parse().unwrap_or_else(|_| unreachable!())
}

/// Its socket closes. Whoever has to be told of it hears it later, should it not hear it now.
async fn leave(up: &Up, viewer: &Arc<Viewer>) {
    if let Some(connection) = up.screen.remove(viewer) {
        up.node.agent_disconnected(&tenant(), &agent_of(viewer), connection).await;
    }
}

async fn connect(up: &Up, viewer: &Arc<Viewer>) {
    let connection = up.screen.add(viewer.clone());
    if up.node.agent_connected(&tenant(), &agent_of(viewer), connection).await.is_err() {
        // It comes back.
        return leave(up, viewer).await;
    }
    let is_first = up.screen.begins();
    for id in viewer.conversations() {
        let topic = Topic::Conversation(id);
        if is_first {
            up.node.watches().begin(&topic);
        }
        // One that is not ready in time is told later how far it reaches, as every other.
        drop(up.node.watches().ready(&topic).await);
        viewer.set_behind(id, true);
    }
}

impl Sim {
    fn new(seed: u64, tells: bool) -> Self {
        let world = World::new(seed, tells);
        let judge = Judge::new(world.clone());
        let around = Around {
            store: Replicas::new(world.clone()),
            net: Net::new(world.clone()),
            phone: Phone::new(world.clone()),
            events: Events::new(judge.clone()),
            judge: judge.clone(),
            started: Arc::default(),
            world: world.clone(),
        };
        let nodes = 3 + usize::from(world.chance(200));
        let processes = (0..nodes).map(|n| Process::new(n, around.clone())).collect();
        let agents = (0..CONVERSATIONS + 2).map(|n| Agent {
            conversation: n % CONVERSATIONS,
            said: 0,
            left: Vec::new(),
            is_new: true,
            waits: None,
            next_at: 3_000,
        });
        let customers = (0..CONVERSATIONS).map(|n| Some((n, 0)));
        let posters = customers.chain([None, None, None]).map(|customer| Poster {
            body: None,
            waits: None,
            next_at: 0,
            customer,
        });
        let viewers = (0..VIEWERS).map(|n| {
            let all = (0..CONVERSATIONS).map(conversation);
            (Viewer::new(format!("viewer {n}"), judge.clone(), all), n, None)
        });
        Self {
            processes,
            agents: agents.collect(),
            posters: posters.collect(),
            viewers: viewers.collect(),
            over: false,
            ready: false,
            reigns: HashMap::new(),
            report: Report::default(),
            frost: None,
            draining: Arc::default(),
            around,
        }
    }

    fn world(&self) -> &World {
        &self.around.world
    }

    /// Some process that serves.
    fn any(&self) -> Option<(usize, Up)> {
        let up: Vec<usize> = (0..self.processes.len()).filter(|n| self.processes[*n].is_up()).collect();
        let n = *up.get(self.world().between(0, up.len().max(1) as u64) as usize)?;
        Some((n, self.processes[n].up()?))
    }

    /// One step of the world, and everything that must hold after it.
    fn step(&mut self) -> Result<(), String> {
        let now = self.world().now() + STEP;
        self.world().advance(now);
        for process in &mut self.processes {
            if process.has_ended() {
                // Somebody starts it again.
                process.crash(self.around.world.between(10, 1_000), false);
            }
            if process.back_at.is_some_and(|at| now >= at) {
                process.start();
            }
            process.step();
        }
        if self.ready {
            self.clients(now);
        }
        self.look();
        self.world().failure().map_or(Ok(()), Err)
    }

    fn clients(&mut self, now: u64) {
        for n in 0..self.posters.len() {
            self.drive_poster(n, now);
        }
        for n in 0..self.agents.len() {
            self.drive_agent(n, now);
        }
        for n in 0..self.viewers.len() {
            self.drive_viewer(n, now);
        }
    }

    /// Whether what is waited for at a process will not come any more.
    fn is_lost<T>(&self, waits: &Waits<T>, now: u64) -> bool {
        now - waits.since > PATIENCE || !self.processes[waits.at].is_running()
    }

    fn drive_poster(&mut self, n: usize, now: u64) {
        let world = self.world().clone();
        if let Some(waits) = &self.posters[n].waits {
            let answered = lock(&waits.slot).take();
            let lost = self.is_lost(waits, now);
            if answered.is_none() && !lost {
                return;
            }
            let poster = &mut self.posters[n];
            poster.waits = None;
            if answered == Some(true) {
                poster.body = None;
                if let Some((_, said)) = &mut poster.customer {
                    *said += 1;
                }
                poster.next_at = now + if poster.customer.is_some() { world.between(200, 1_500) } else { 0 };
            } else {
                poster.next_at = now + world.between(50, 400);
            }
        }
        if now < self.posters[n].next_at {
            return;
        }
        if self.posters[n].body.is_none() {
            let body = match self.posters[n].customer {
                Some(_) if self.over => return,
                Some((customer, said)) => {
                    let message = json!({"from": thread(customer), "id": format!("in.{customer}.{said}"), "timestamp": "1795300000",
                        "type": "text", "text": {"body": "x"}});
                    webhook(&[message], &[])
                }
                None => match self.around.phone.webhook() {
                    Some(receipt) => webhook(&[], &[receipt]),
                    None => return,
                },
            };
            self.posters[n].body = Some(body);
        }
        let Some((at, up)) = self.any() else { return };
        let (slot, body) = (Slot::default(), self.posters[n].body.clone().unwrap_or_default());
        self.posters[n].waits = Some(Waits { slot: slot.clone(), since: now, at });
        self.processes[at].spawn(async move {
            let taken = post(&up, &body).await;
            *lock(&slot) = Some(taken);
        });
    }

    fn drive_agent(&mut self, n: usize, now: u64) {
        let world = self.world().clone();
        if let Some(waits) = &self.agents[n].waits {
            let answered = lock(&waits.slot).take();
            let lost = self.is_lost(waits, now);
            match answered {
                Some((left, stand)) => {
                    // What is said again may have been done before, in another order.
                    if self.agents[n].is_new && !stand.is_sorted_by(|a, b| a < b) {
                        world.fail(|| format!("{:?} stand at {stand:?}", self.agents[n].left));
                    }
                    self.report.acked += (self.agents[n].left.len() - left.len()) as u64;
                    self.agents[n].left = left;
                }
                None if lost => {}
                None => return,
            }
            self.agents[n].waits = None;
            self.agents[n].left.retain(|saying| !matches!(saying.what, What::Snooze(_)));
            self.agents[n].is_new = self.agents[n].left.is_empty();
            let pause =
                if self.agents[n].left.is_empty() { world.between(100, 900) } else { world.between(50, 400) };
            self.agents[n].next_at = now + pause;
        }
        if now < self.agents[n].next_at {
            return;
        }
        let agent = &mut self.agents[n];
        if agent.left.is_empty() {
            if self.over {
                return;
            }
            for _ in 0..world.between(1, 4) {
                let client_id = format!("{n}.{}", agent.said);
                // For ever, and nobody else until then.
                let until =
                    Timestamp::from_seconds(4_000_000_000 + (1_000_000 * n as i64) + agent.said as i64);
                agent.said += 1;
                let what = if world.chance(200) {
                    What::Send
                } else if world.chance(200) {
                    What::Snooze(until)
                } else {
                    What::Note
                };
                agent.left.push(Saying { client_id, what });
            }
        }
        let (id, left) = (conversation(agent.conversation), agent.left.clone());
        let Some((at, up)) = self.any() else { return };
        let (slot, judge) = (Slot::default(), self.around.judge.clone());
        self.agents[n].waits = Some(Waits { slot: slot.clone(), since: now, at });
        self.processes[at].spawn(async move {
            let heard = say(up, judge, id, left).await;
            *lock(&slot) = Some(heard);
        });
    }

    fn drive_viewer(&mut self, n: usize, now: u64) {
        let (viewer, at, waits) = &mut self.viewers[n];
        if let Some(w) = waits {
            let lost = !self.processes[w.at].is_running();
            if lock(&w.slot).take().is_none() && !lost {
                return;
            }
            *waits = None;
        }
        let mut up = self.processes[*at].up();
        if up.is_none() {
            // It connects to whoever is there.
            let there = (0..self.processes.len()).find(|p| self.processes[*p].is_up());
            let Some(there) = there else { return };
            *at = there;
            up = self.processes[there].up();
        }
        let Some(up) = up else { return };
        let connected = up.screen.has(viewer);
        let leaves = connected && !self.over && self.around.world.mishap(1);
        if connected && viewer.behind().is_empty() && !leaves {
            return;
        }
        let (slot, viewer) = (Slot::default(), viewer.clone());
        *waits = Some(Waits { slot: slot.clone(), since: now, at: *at });
        self.processes[*at].spawn(async move {
            if leaves {
                leave(&up, &viewer).await;
            } else if connected {
                catch_up(&up, &viewer).await;
            } else {
                connect(&up, &viewer).await;
            }
            *lock(&slot) = Some(());
        });
    }

    /// What holds at every instant.
    fn look(&mut self) {
        let mut held: HashMap<u32, usize> = HashMap::new();
        // One that stands still does nothing, and its clock says nothing.
        for process in self.processes.iter().filter(|process| !process.is_paused()) {
            let n = process.n;
            let reigns = process.look(|up| {
                let incarnation = up.node.incarnation();
                let reigns = up.node.shards().reigns().filter(|reign| reign.is_held_now());
                reigns.map(|reign| (reign.shard, reign.epoch(), incarnation)).collect::<Vec<_>>()
            });
            for (shard, epoch, incarnation) in reigns.unwrap_or_default() {
                if let Some(other) = held.insert(shard, n) {
                    self.around.world.fail(|| format!("shard {shard} is held by processes {other} and {n}"));
                }
                let first = *self.reigns.entry((shard, epoch)).or_insert(incarnation);
                if first != incarnation {
                    self.around.world.fail(|| {
                        format!("epoch {epoch} of shard {shard} is served by incarnations {first} and {incarnation}")
                    });
                }
            }
        }
    }

    fn incarnations(&self) -> Vec<Option<u32>> {
        self.processes.iter().map(|process| process.look(|up| up.node.incarnation())).collect()
    }

    /// The store stands still for everybody, now and then.
    fn frosts(&mut self) {
        let now = self.world().now();
        let Some((until, _)) = self.frost.as_mut().filter(|(until, _)| *until <= now) else { return };
        let ms = self.around.world.between(300, 6_000);
        self.around.world.tell(|| format!("the store stands still for {ms} ms"));
        (0..3).for_each(|replica| self.around.store.freezes(replica, ms));
        *until = now + ms + self.around.world.between(2_000, 5_000);
    }

    /// A store that stands still for everybody costs nobody its incarnation.
    fn judge_frost(&mut self) -> Result<(), String> {
        let now = self.incarnations();
        match self.frost.take() {
            Some((_, before)) if before != now => {
                Err(format!("a store that stood still has cost incarnations: {before:?}, {now:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Something goes wrong, maybe.
    fn mishaps(&mut self) {
        if self.frost.is_some() {
            return self.frosts();
        }
        let world = self.world().clone();
        let n = world.between(0, self.processes.len() as u64) as usize;
        let ms = || if world.chance(500) { world.between(50, 1_500) } else { world.between(1_500, 7_000) };
        match world.between(0, 100) {
            0..=13 if self.processes[n].is_running() => {
                self.report.crashes += 1;
                self.processes[n].crash(world.between(10, 5_000), world.chance(400));
            }
            14..=23 if self.processes[n].is_running() => {
                self.report.pauses += 1;
                self.processes[n].pause(ms());
            }
            24..=35 => {
                self.report.cuts += 1;
                self.processes[n].cut(ms());
            }
            36..=53 => {
                let other = (n + 1 + world.between(0, self.processes.len() as u64 - 1) as usize)
                    % self.processes.len();
                let ms = ms();
                self.report.cuts += 1;
                world.tell(|| format!("nothing passes from {n} to {other} for {ms} ms"));
                self.around.net.cut((n, other), ms);
                if world.chance(600) {
                    self.around.net.cut((other, n), ms);
                }
            }
            54..=65 => {
                let (replica, ms) = (world.between(0, 3) as usize, ms());
                world.tell(|| format!("replica {replica} is away for {ms} ms"));
                self.around.store.goes(replica, ms);
            }
            66..=74 => {
                let (replica, ms) = (world.between(0, 3) as usize, ms());
                world.tell(|| format!("replica {replica} stands still for {ms} ms"));
                self.around.store.freezes(replica, ms);
            }
            75..=77 => {
                let ms = ms();
                world.tell(|| format!("the store stands still for {ms} ms"));
                (0..3).for_each(|replica| self.around.store.freezes(replica, ms));
            }
            78..=82 => self.processes[n].jump(world.between(0, 30_000).cast_signed() - 15_000),
            83..=93 => {
                self.report.drains += 1;
                self.drains(n, world.chance(500));
            }
            _ => {}
        }
    }

    /// A node gives away what it has, and takes shards again a while later; or ends in order and starts anew.
    fn drains(&mut self, n: usize, ends: bool) {
        let Some(up) = self.processes[n].up() else { return };
        self.world().tell(|| format!("process {n} {}", if ends { "ends in order" } else { "drains" }));
        if ends {
            return self.processes[n].finish();
        }
        let (pause, under_way) = (self.world().between(200, 2_000), self.draining.clone());
        self.processes[n].spawn(async move {
            let _under_way = under_way;
            up.node.drain(std::time::Duration::from_secs(5)).await;
            tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
            up.node.wants_drain(false).await;
        });
    }

    /// Steps until something holds, or for too long.
    fn until(
        &mut self,
        what: &str,
        within: u64,
        mut holds: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), String> {
        let ends = self.world().now() + within;
        while !holds(self) {
            if self.world().now() > ends {
                let (now, served) = (self.world().now(), self.served());
                let drains = self.processes.iter().map(|p| p.look(|up| up.node.nodes()).flatten());
                let nodes = drains.flatten().map(|(version, nodes)| {
                    let nodes =
                        nodes.iter().map(|n| (n.incarnation, n.status(), n.shards)).collect::<Vec<_>>();
                    (version, nodes)
                });
                let nodes = nodes.collect::<Vec<_>>();
                return Err(format!("{now} ms: it never came: {what}; served {served:?}, known {nodes:?}"));
            }
            self.step()?;
        }
        Ok(())
    }

    /// Asks one node something, until it is answered.
    fn ask<T: Send + 'static, F>(&mut self, what: &str, asks: impl Fn(Up) -> F) -> Result<T, String>
    where
        F: Future<Output = Option<T>> + Send + 'static,
    {
        let mut waits: Option<(Slot<Option<T>>, usize)> = None;
        let mut found = None;
        self.until(what, ENDS_WITHIN, |sim| {
            match &waits {
                Some((slot, at)) if sim.processes[*at].is_running() => match lock(slot).take() {
                    Some(Some(answer)) => {
                        found = Some(answer);
                        return true;
                    }
                    Some(None) => {}
                    None => return false,
                },
                _ => {}
            }
            let Some((at, up)) = sim.any() else { return false };
            let slot: Slot<Option<T>> = Slot::default();
            let (says, asking) = (slot.clone(), asks(up));
            sim.processes[at].spawn(async move {
                let answer = asking.await;
                *lock(&says) = Some(answer);
            });
            waits = Some((slot, at));
            false
        })?;
        found.ok_or_else(|| format!("{what}: no answer"))
    }

    fn prepares(&mut self) -> Result<(), String> {
        self.ask("the tenant is made", |up| async move {
            let directory = up.node.directory();
            let inbox: patchbay_protocol::ids::InboxId = "main".parse().ok()?;
            directory.put_inbox(&tenant(), &inbox, &Inbox { name: "main".into() }).await.ok()?;
            let document = Account {
                connector: "whatsapp".into(),
                inbox,
                name: "WA".into(),
                external_id: "1".into(),
                credentials: json!({"app_secret": "s", "verify_token": "v", "access_token": "a"}),
                settings: Settings::default(),
            };
            directory.put_account(&tenant(), &account(), &document).await.ok()?;
            Some(())
        })
    }

    fn served(&self) -> Vec<usize> {
        let held = |process: &Process| {
            process
                .look(|up| up.node.shards().reigns().filter(|reign| reign.is_held_now()).count())
                .unwrap_or(0)
        };
        self.processes.iter().map(held).collect()
    }

    fn is_balanced(&self) -> bool {
        let served = self.served();
        let (most, least) =
            (served.iter().max().copied().unwrap_or(0), served.iter().min().copied().unwrap_or(0));
        served.iter().sum::<usize>() == SHARDS as usize && most - least <= 2
    }

    /// The whole log of a conversation.
    fn log(&mut self, n: usize) -> Result<Vec<(u64, bytes::Bytes)>, String> {
        let id = conversation(n);
        self.ask("a log is read", move |up| async move {
            let mut all = Vec::new();
            loop {
                match up.desk.entries(&tenant(), id, Page::After(all.len() as u64), 1000).await {
                    Ok(page) => {
                        let is_all = page.entries.is_empty()
                            || all.len() as u64 + page.entries.len() as u64 >= page.tip;
                        all.extend(page.entries);
                        if is_all {
                            return Some(all);
                        }
                    }
                    Err(error) if error.code == ErrorCode::NotFound => return Some(all),
                    Err(_) => return None,
                }
            }
        })
    }

    fn run(&mut self) -> Result<(), String> {
        self.until("the cluster is there", ENDS_WITHIN, |sim| {
            sim.served().iter().sum::<usize>() == SHARDS as usize
        })?;
        self.prepares()?;
        self.ready = true;
        let (began, quick) = (self.world().now(), self.world().between(60, 400));
        if self.world().chance(60) {
            self.world().tell(|| "nothing goes wrong but the store".into());
            self.world().calm();
            self.until("the cluster is at rest", ENDS_WITHIN, |sim| {
                sim.is_balanced() && sim.incarnations().iter().all(Option::is_some)
            })?;
            self.frost = Some((self.world().now(), self.incarnations()));
        }
        let mut next = began;
        while self.world().now() < began + FAULTS_UNTIL {
            if self.world().now() >= next {
                self.mishaps();
                next = self.world().now() + self.world().between(quick, quick * 4);
            }
            self.step()?;
        }
        self.calms();
        self.until("the cluster is whole again", ENDS_WITHIN, |sim| {
            // Somebody who is asked to end comes back.
            Arc::strong_count(&sim.draining) == 1
                && sim.is_balanced()
                && sim.processes.iter().all(Process::is_up)
        })?;
        self.judge_frost()?;
        // Shards move once more while everybody talks and nothing is wrong: nobody is left in the dark.
        let moves = self.world().between(0, self.processes.len() as u64) as usize;
        if let Some(up) = self.processes[moves].up() {
            self.world().tell(|| format!("process {moves} drains, and nothing else happens"));
            self.processes[moves].spawn(async move {
                up.node.drain(std::time::Duration::from_secs(10)).await;
            });
        }
        self.until("what it had is served elsewhere", ENDS_WITHIN, |sim| {
            let served = sim.served();
            served[moves] == 0 && served.iter().sum::<usize>() == SHARDS as usize
        })?;
        self.goes_on(1_000)?;
        self.over = true;
        self.until("everybody has an answer", ENDS_WITHIN, |sim| {
            let quiet = sim.agents.iter().all(|agent| agent.left.is_empty() && agent.waits.is_none());
            quiet && sim.posters.iter().all(|poster| poster.body.is_none() || poster.customer.is_none())
        })?;
        self.judge_views()?;
        self.judge_logs()?;
        self.judge_inbox()?;
        self.judge_presence()
    }

    fn calms(&mut self) {
        self.world().tell(|| "nothing goes wrong any more".into());
        self.world().calm();
        self.around.store.heal();
        self.around.net.heal();
        for process in &mut self.processes {
            process.resume();
        }
    }

    fn judge_views(&mut self) -> Result<(), String> {
        let tips: BTreeMap<ConversationId, u64> = self.tips()?;
        let all = |sim: &Self| {
            sim.viewers.iter().all(|(viewer, ..)| tips.iter().all(|(id, tip)| viewer.len(*id) >= *tip))
        };
        let shown = self.until("every viewer is shown everything", SHOWN_WITHIN, |sim| all(sim));
        shown.map_err(|error| {
            let views = self.viewers.iter().map(|(viewer, at, waits)| {
                let behind = tips.iter().filter(|(id, tip)| viewer.len(**id) < **tip);
                let behind: Vec<String> =
                    behind.map(|(id, tip)| format!("{id}: {} of {tip}", viewer.len(*id))).collect();
                let reads = if waits.is_some() { "reads" } else { "waits" };
                format!(
                    "{} at process {at} {reads}: {} ({} known)",
                    viewer.name,
                    behind.join(", "),
                    viewer.behind().len()
                )
            });
            format!("{error}: {}", views.collect::<Vec<_>>().join("; "))
        })
    }

    fn tips(&mut self) -> Result<BTreeMap<ConversationId, u64>, String> {
        let all = (0..CONVERSATIONS).map(|n| Ok((conversation(n), self.log(n)?.len() as u64)));
        let all: BTreeMap<ConversationId, u64> = all.collect::<Result<_, String>>()?;
        Ok(all.into_iter().filter(|(_, tip)| *tip > 0).collect())
    }

    fn judge_logs(&mut self) -> Result<(), String> {
        // What was sent has its outcome once every receipt is in, and what is kept is tried again.
        let mut last = String::new();
        let settled = self.until("every message has its outcome", 300_000, |sim| {
            let Ok(logs) = (0..CONVERSATIONS).map(|n| sim.log(n)).collect::<Result<Vec<_>, _>>() else {
                return true;
            };
            let open: Vec<String> = logs.iter().flat_map(|log| unsettled(log)).collect();
            last = open.join(", ");
            open.is_empty() || sim.goes_on(500).is_err()
        });
        if let Err(error) = settled {
            let status = self.ask("the account says how it is", |up| async move {
                let status = up.node.account(&tenant(), &account(), AccountCommand::Status);
                Some(format!("{:?}", status.ok()?.wait().await))
            })?;
            return Err(format!("{error}: {last}; the account: {status}"));
        }
        let taken = self.around.phone.taken();
        self.report.calls = taken.values().map(|n| u64::from(*n)).sum();
        let mut published = self.around.events.highest();
        let ends = self.world().now() + 20_000;
        for n in 0..CONVERSATIONS {
            let id = conversation(n);
            let views: Vec<_> = self.viewers.iter().map(|(v, ..)| (v.name.clone(), v.shows(id))).collect();
            let log = self.log(n)?;
            self.report.entries += log.len() as u64;
            let written = self.posters.iter().filter_map(|poster| poster.customer).find(|(of, _)| *of == n);
            let received = log.iter().filter(|(_, entry)| has_type(entry, "message.received")).count() as u64;
            if received < written.map_or(0, |(_, said)| said) {
                return Err(format!(
                    "{id}: {received} of {written:?} that its customer wrote and was told of"
                ));
            }
            judge_log(&self.around.judge, id, &log, &taken)?;
            while published.get(&id).copied().unwrap_or(0) < log.len() as u64 {
                if self.world().now() > ends {
                    let at = published.get(&id).copied().unwrap_or(0);
                    return Err(format!("{id}: published up to {at} of {}", log.len()));
                }
                self.step()?;
                published = self.around.events.highest();
            }
            for (name, shows) in views {
                let same = log.iter().zip(&shows).all(|((_, entry), shown)| blake3::hash(entry) == *shown);
                if !same || shows.len() > log.len() {
                    return Err(format!(
                        "{} was shown {} of {id}, which has {}",
                        name,
                        shows.len(),
                        log.len()
                    ));
                }
            }
        }
        self.report.reigns = self.reigns.len() as u64;
        Ok(())
    }

    /// The list of the inbox has every conversation as it is.
    fn judge_inbox(&mut self) -> Result<(), String> {
        let ends = self.world().now() + 20_000;
        loop {
            let (tips, listed) = (self.tips()?, self.listed()?);
            if tips == listed {
                return Ok(());
            }
            if self.world().now() > ends {
                return Err(format!("the inbox lists {listed:?} of {tips:?}"));
            }
            self.goes_on(200)?;
        }
    }

    /// Every agent is there over the one socket that it has, whatever became of those before it.
    fn judge_presence(&mut self) -> Result<(), String> {
        let ends = self.world().now() + 20_000;
        let agents: Vec<_> = self.viewers.iter().map(|(viewer, ..)| agent_of(viewer)).collect();
        loop {
            let mut sessions = Vec::new();
            for agent in agents.clone() {
                sessions.push(self.ask("an agent says how it is", move |up| {
                    let agent = agent.clone();
                    async move {
                        let asked = up.node.agent(&tenant(), &agent, AgentCommand::Get).ok()?;
                        asked.wait().await.ok().map(|reply| reply.sessions)
                    }
                })?);
            }
            if sessions.iter().all(|n| *n == 1) {
                return Ok(());
            }
            if self.world().now() > ends {
                let at: Vec<_> = self
                    .viewers
                    .iter()
                    .map(|(v, at, waits)| {
                        let has = self.processes[*at].up().is_some_and(|up| up.screen.has(v));
                        format!("{} at process {at}: {has}, waits {}", v.name, waits.is_some())
                    })
                    .collect();
                return Err(format!(
                    "{agents:?} are there over {sessions:?} sockets: {at:?} {:?}",
                    self.incarnations()
                ));
            }
            self.goes_on(200)?;
        }
    }

    fn listed(&mut self) -> Result<BTreeMap<ConversationId, u64>, String> {
        let list = self.ask("the inbox is listed", |up| async move {
            let who = Who::Api(tenant());
            up.desk.list(&who, None, &Filter::default(), None, 100).await.ok()
        })?;
        Ok(list.iter().map(|summary| (summary.id, summary.last_seq)).collect())
    }

    fn goes_on(&mut self, ms: u64) -> Result<(), String> {
        let until = self.world().now() + ms;
        while self.world().now() < until {
            self.step()?;
        }
        Ok(())
    }
}

fn has_type(entry: &[u8], wanted: &str) -> bool {
    serde_json::from_slice::<Value>(entry).is_ok_and(|entry| entry["type"] == wanted)
}

/// Messages that went out and have no outcome.
fn unsettled(log: &[(u64, bytes::Bytes)]) -> Vec<String> {
    let mut open: BTreeMap<u64, String> = BTreeMap::new();
    for (seq, entry) in log {
        let Ok(entry) = serde_json::from_slice::<Value>(entry) else { continue };
        match entry["type"].as_str() {
            Some("message.sent") => {
                open.insert(*seq, entry["data"]["client_id"].as_str().unwrap_or("").to_owned());
            }
            Some("message.status") if entry["data"]["status"] != "pending" => {
                open.remove(&entry["data"]["message_seq"].as_u64().unwrap_or(0));
            }
            _ => {}
        }
    }
    open.into_iter().map(|(seq, client_id)| format!("{client_id} at {seq}")).collect()
}

/// What holds of a log for ever.
fn judge_log(
    judge: &Judge,
    id: ConversationId,
    log: &[(u64, bytes::Bytes)],
    taken: &BTreeMap<String, u32>,
) -> Result<(), String> {
    let mut said: HashMap<String, u64> = HashMap::new();
    let mut snoozed: HashSet<String> = HashSet::new();
    let mut received: Vec<String> = Vec::new();
    let mut statuses: BTreeMap<u64, MessageStatus> = BTreeMap::new();
    for (at, (seq, entry)) in log.iter().enumerate() {
        if *seq != at as u64 + 1 {
            return Err(format!("{id}: entry {seq} stands at {}", at + 1));
        }
        judge.saw("whoever reads in the end", id, *seq, entry);
        let entry: Value = serde_json::from_slice(entry).map_err(|error| format!("{id}.{seq}: {error}"))?;
        let data = &entry["data"];
        if let Some(client_id) = data["client_id"].as_str()
            && let Some(first) = said.insert(client_id.to_owned(), *seq)
        {
            return Err(format!("{id}: {client_id} stands at {first} and at {seq}"));
        }
        if let Some(until) = data["until"].as_str()
            && !snoozed.insert(until.to_owned())
        {
            return Err(format!("{id}: it is snoozed until {until} by one command twice"));
        }
        if let Some(external) = data["provider_id"].as_str().filter(|_| entry["type"] == "message.received") {
            received.push(external.to_owned());
        }
        if entry["type"] == "message.status" {
            let message = data["message_seq"].as_u64().unwrap_or(0);
            let status = serde_json::from_value::<MessageStatus>(data["status"].clone());
            let status = status.map_err(|error| format!("{id}.{seq}: {error}"))?;
            if let Some(was) = statuses.insert(message, status)
                && status <= was
            {
                return Err(format!("{id}: {status:?} of {message} comes behind {was:?}"));
            }
        }
    }
    for (message, status) in statuses {
        let was_taken = taken.contains_key(&format!("{id}-{message}"));
        let fits = match status {
            MessageStatus::Sent | MessageStatus::Delivered | MessageStatus::Read => was_taken,
            MessageStatus::Failed => !was_taken,
            _ => true,
        };
        if !fits {
            return Err(format!("{id}: {message} is {status:?}, and the provider has taken it: {was_taken}"));
        }
    }
    let sent = (0..received.len()).map(|n| format!("in.{}.{n}", customer_of(id)));
    if !received.iter().cloned().eq(sent) {
        return Err(format!("{id}: what its customer wrote stands as {received:?}"));
    }
    for ((of, client_id), seq) in judge.truth().acked.iter().filter(|((of, _), _)| *of == id) {
        if said.get(client_id) != Some(seq) {
            return Err(format!(
                "{client_id} of {of} was acked at {seq}, and stands at {:?}",
                said.get(client_id)
            ));
        }
    }
    Ok(())
}

/// Runs one seed; its report, and a print of its story.
pub(crate) fn run(seed: u64, tells: bool) -> Result<(Report, String), String> {
    let mut sim = Sim::new(seed, tells);
    let ran = sim.run();
    let print = sim.world().print();
    let failed = sim.world().failure();
    failed.map_or(ran, Err).map(|()| (sim.report, print))
}
