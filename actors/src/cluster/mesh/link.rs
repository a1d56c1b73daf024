//! One lane to a peer: requests out, answers back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use hyper_util::rt::TokioIo;
use patchbay_protocol::ids::TenantId;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::network::Network;
use super::proto::envelope::Kind as Envelopes;
use super::proto::mesh_client::MeshClient;
use super::proto::{
    Answer, Batch, Beat, Changed, Envelope, Hello, Present, Published, Request, Unwatch, Watch, answer,
};
use super::tls::Socket;
use super::wire::{self, Waits};
use super::{
    ENVELOPES_MAX, FRAME_BYTES, Here, Identity, LANE_QUEUE_MAX, LANES, MESSAGE_BYTES_MAX, UNANSWERED_MAX,
    WINDOW, WINDOW_BYTES,
};
use crate::cluster::map::Incarnation;
use crate::cluster::switch::{Parcel, Switch, Turn};
use crate::fanout::{Aside, Home, Topic};
use crate::node::Counters;

/// Between two tries to reach a peer, at first and at most.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A peer that does not answer for so long is not reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two words of a lane that has nothing else to say.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// A lane that hears nothing for so long has broken.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A peer that speaks and has not answered so long after its caller's patience has ended does not answer any more.
const LATE_GRACE: Duration = Duration::from_secs(5);
/// Words beside requests that wait for the stream to take them; past it they are lost, which is made up for: those that
/// matter are said again.
pub const WORDS_MAX: usize = 1_024;

/// Where a lane leads.
#[derive(Clone, Debug)]
pub(super) struct To {
    pub(super) incarnation: Incarnation,
    pub(super) address: String,
    pub(super) lane: u32,
}

/// A request that is not answered.
struct Unanswered {
    /// Its shard, and its place in what the switch sends there; none: the switch knows nothing of it.
    of: Option<(u32, Turn)>,
    /// Until when somebody waits for its answer.
    until: Instant,
    request: Request,
    waits: Waits,
}

#[derive(Default)]
struct State {
    next: u64,
    unanswered: BTreeMap<u64, Unanswered>,
    /// Somebody was turned away.
    was_full: bool,
    /// Registrations that are not answered.
    registering: usize,
}

/// A lane.
pub(super) struct Lane {
    to: To,
    queue: mpsc::Sender<Request>,
    words: mpsc::Sender<Envelopes>,
    here: Weak<dyn Here>,
    state: Mutex<State>,
    up: AtomicBool,
    switch: Arc<Switch>,
    task: Mutex<Option<AbortHandle>>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.lock().unwrap_or_else(PoisonError::into_inner).take().inspect(AbortHandle::abort);
    }
}

impl Lane {
    pub(super) fn start(
        identity: Identity,
        network: Arc<dyn Network>,
        to: To,
        switch: Arc<Switch>,
        here: Weak<dyn Here>,
        versions: watch::Receiver<u64>,
    ) -> Arc<Self> {
        let (queue, requests) = mpsc::channel(LANE_QUEUE_MAX);
        let (words, says) = mpsc::channel(WORDS_MAX);
        let lane = Arc::new(Self {
            to: to.clone(),
            queue,
            words,
            here: here.clone(),
            state: Mutex::default(),
            up: AtomicBool::new(false),
            switch,
            task: Mutex::default(),
        });
        let queues = Arc::new(Mutex::new((requests, says)));
        let runs = Runs { lane: Arc::downgrade(&lane), identity, network, to, here, queues, versions };
        let task = tokio::spawn(runs.run()).abort_handle();
        *lane.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        lane
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Its peer is no more. What was not answered goes on elsewhere: nothing may be locked that this needs.
    pub(super) fn end(&self) {
        self.task.lock().unwrap_or_else(PoisonError::into_inner).take().inspect(AbortHandle::abort);
        self.give_back();
    }

    /// Takes a request, if the peer is reached and there is room.
    pub(super) fn send(&self, parcel: Parcel, of: Option<(u32, Turn)>) -> Result<(), Parcel> {
        let mut state = self.lock();
        if !self.is_up() {
            return Err(parcel);
        }
        if state.unanswered.len() >= UNANSWERED_MAX {
            state.was_full = true;
            return Err(parcel);
        }
        let Ok(place) = self.queue.try_reserve() else {
            state.was_full = true;
            return Err(parcel);
        };
        state.next += 1;
        let id = state.next;
        let until = parcel.until();
        let (mut request, waits) = wire::encode(id, parcel);
        if let Some((shard, turn)) = of {
            (request.shard, request.round) = (shard, turn.round);
        }
        request.within_ms = wire::within_ms(until);
        place.send(request.clone());
        state.unanswered.insert(id, Unanswered { of, until, request, waits });
        Ok(())
    }

    fn say(&self, word: Envelopes) -> bool {
        self.is_up() && self.words.try_send(word).is_ok()
    }

    /// Registers a topic with the peer. False: it cannot be told now.
    pub(super) fn register(&self, topic: &Topic, epoch: u32, check: bool) -> bool {
        let mut state = self.lock();
        if state.registering >= WINDOW {
            return false;
        }
        let watch = Watch { topic: Some(wire::write_topic(topic)), epoch, check };
        let told = self.say(Envelopes::Watch(watch));
        state.registering += usize::from(told);
        told
    }

    /// A registration was answered: there is room for another one.
    fn registered(&self) {
        let mut state = self.lock();
        state.registering = state.registering.saturating_sub(1);
    }

    pub(super) fn withdraw(&self, topic: &Topic) {
        // What goes on being published is withdrawn again.
        self.say(Envelopes::Unwatch(Unwatch { topic: Some(wire::write_topic(topic)) }));
    }

    pub(super) fn aside(&self, topic: &Topic, aside: &Aside) {
        // It does not matter for long.
        self.say(Envelopes::Aside(wire::write_aside(topic, aside)));
    }

    pub(super) fn changed(&self, tenant: &TenantId) {
        // Whoever is not told looks by itself.
        self.say(Envelopes::Changed(Changed { tenant: tenant.to_string() }));
    }

    /// What came of a request.
    fn answered(&self, answer: Answer, here: &dyn Here) {
        let (found, had_no_room) = {
            let mut state = self.lock();
            let found = state.unanswered.remove(&answer.id);
            let room = state.unanswered.len() < UNANSWERED_MAX / 2;
            (found, room && std::mem::take(&mut state.was_full))
        };
        let Some(Unanswered { of, request, waits, .. }) = found else { return };
        match (answer.outcome, of) {
            (Some(answer::Outcome::NotOwner(version)), Some((_, turn))) => {
                here.heard(version);
                match wire::decode(&request, waits) {
                    Ok(parcel) => self.switch.not_owner(parcel, turn, self.to.incarnation, version),
                    Err(waits) => waits.lose(),
                }
            }
            (Some(outcome), _) => waits.answer(outcome),
            (None, _) => waits.lose(),
        }
        if let Some((shard, _)) = of {
            self.switch.settled(shard);
        }
        if had_no_room {
            self.switch.all_moved();
        }
    }

    /// Stops to wait for what its peer should have answered long ago: whoever asked has been told that nobody knows.
    fn lose_the_late(&self) {
        let late: Vec<Unanswered> = {
            let (mut state, now) = (self.lock(), Instant::now());
            let is_late = |of: &Unanswered| of.until + LATE_GRACE < now;
            // Those that were sent first were asked first, but for a few.
            if !state.unanswered.values().next().is_some_and(is_late) {
                return;
            }
            state.unanswered.extract_if(.., |_, of| is_late(of)).map(|(_, of)| of).collect()
        };
        metrics::counter!("patchbay_mesh_unanswered_total").increment(late.len() as u64);
        tracing::warn!(to = self.to.incarnation, lane = self.to.lane, count = late.len(), "not answered");
        for Unanswered { of, waits, .. } in late {
            waits.lose();
            if let Some((shard, _)) = of {
                self.switch.settled(shard);
            }
        }
    }

    /// The lane has broken: whatever was not answered may or may not have been done. It goes on under its own id.
    fn give_back(&self) {
        let unanswered = {
            let mut state = self.lock();
            self.up.store(false, Ordering::Release);
            state.registering = 0;
            std::mem::take(&mut state.unanswered)
        };
        if let Some(here) = self.here.upgrade() {
            here.watches().cut(self.to.incarnation, |shard| shard % LANES == self.to.lane);
        }
        let mut shards = Vec::with_capacity(unanswered.len());
        for (_, Unanswered { of, request, waits, .. }) in unanswered {
            let Some((shard, turn)) = of else {
                waits.lose();
                continue;
            };
            shards.push(shard);
            match wire::decode(&request, waits) {
                Ok(parcel) => self.switch.came_back(parcel, turn),
                Err(waits) => waits.lose(),
            }
        }
        shards.into_iter().for_each(|shard| self.switch.settled(shard));
    }
}

struct Runs {
    lane: Weak<Lane>,
    identity: Identity,
    network: Arc<dyn Network>,
    to: To,
    here: Weak<dyn Here>,
    /// Of the stream that is there: requests, and words beside them.
    queues: Arc<Mutex<(mpsc::Receiver<Request>, mpsc::Receiver<Envelopes>)>>,
    /// Which version of the map is known here.
    versions: watch::Receiver<u64>,
}

fn envelope(kind: Envelopes) -> Envelope {
    Envelope { kind: Some(kind) }
}

/// Why a lane is not there, for a log.
type Broken = Box<dyn std::error::Error + Send + Sync>;

impl Runs {
    async fn run(self) {
        let mut pause = RECONNECT_PAUSE;
        loop {
            let began = Instant::now();
            let broken = self.speak().await;
            let Some(lane) = self.lane.upgrade() else { return };
            let was_up = lane.is_up();
            lane.give_back();
            // What waited to go out was among them.
            self.forget_queued();
            drop(lane);
            if let Err(error) = broken {
                let (to, lane) = (self.to.incarnation, self.to.lane);
                if was_up {
                    tracing::warn!(%error, to, lane, "a link has broken");
                } else {
                    tracing::debug!(%error, to, lane, "a node is not reached");
                }
            }
            if was_up && began.elapsed() > RECONNECT_PAUSE_MAX {
                pause = RECONNECT_PAUSE;
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
        }
    }

    fn forget_queued(&self) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        while queues.0.try_recv().is_ok() {}
        while queues.1.try_recv().is_ok() {}
    }

    fn hello(&self, here: &dyn Here) -> Envelope {
        let hello = Hello {
            version: self.identity.version,
            cluster: self.identity.cluster.clone(),
            incarnation: here.incarnation(),
            to: self.to.incarnation,
            lane: self.to.lane,
            shards: self.identity.shards,
        };
        envelope(Envelopes::Hello(hello))
    }

    /// Reaches the peer, and speaks with it until the lane breaks.
    async fn speak(&self) -> Result<(), Broken> {
        let (address, tls) = (self.to.address.clone(), self.identity.tls.clone());
        let network = self.network.clone();
        let channel = Endpoint::from_shared(format!("http://{}", self.to.address))?
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .connect_with_connector(tower::service_fn(move |_| {
                let (network, address, tls) = (network.clone(), address.clone(), tls.clone());
                async move { Socket::connect(&*network, &address, tls.as_ref()).await.map(TokioIo::new) }
            }))
            .await?;
        let mut client = MeshClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let here = self.here.upgrade().ok_or("the node is gone")?;
        let (beats, mut beat) = mpsc::channel::<Beat>(1);
        let mut hello = Some(self.hello(&*here));
        drop(here);
        // The stream takes what is there whenever it has room. Nobody who has to hear answers waits for that.
        let (queues, mut ready, mut said) =
            (self.queues.clone(), Vec::with_capacity(ENVELOPES_MAX), Vec::with_capacity(ENVELOPES_MAX));
        let outgoing = stream::poll_fn(move |cx| {
            let mut envelopes: Vec<Envelope> = hello.take().into_iter().collect();
            if let Poll::Ready(Some(beat)) = beat.poll_recv(cx) {
                envelopes.push(envelope(Envelopes::Beat(beat)));
            }
            let mut queues = queues.lock().unwrap_or_else(PoisonError::into_inner);
            if let Poll::Ready(0) = queues.0.poll_recv_many(cx, &mut ready, ENVELOPES_MAX) {
                return Poll::Ready(None);
            }
            // The other end of it goes with that of the requests.
            let _ = queues.1.poll_recv_many(cx, &mut said, ENVELOPES_MAX);
            envelopes.extend(ready.drain(..).map(|request| envelope(Envelopes::Request(request))));
            envelopes.extend(said.drain(..).map(envelope));
            if envelopes.is_empty() { Poll::Pending } else { Poll::Ready(Some(Batch { envelopes })) }
        });
        let answered = tokio::time::timeout(CONNECT_TIMEOUT, client.link(outgoing)).await??;
        let mut incoming: Streaming<Batch> = answered.into_inner();
        let first = tokio::time::timeout(CONNECT_TIMEOUT, incoming.message()).await??;
        match first.and_then(|batch| batch.envelopes.into_iter().next()?.kind) {
            Some(Envelopes::Hello(hello)) if hello.incarnation == self.to.incarnation => {}
            other => return Err(format!("it answered {other:?}").into()),
        }
        {
            let lane = self.lane.upgrade().ok_or("nobody wants it")?;
            lane.up.store(true, Ordering::Release);
            lane.switch.all_moved();
            if let Some(here) = self.here.upgrade() {
                here.watches().reached();
            }
        }
        tracing::info!(to = self.to.incarnation, lane = self.to.lane, "a node is reached");
        let mut beat = tokio::time::interval(BEAT_EVERY);
        let mut versions = self.versions.clone();
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                Ok(()) = versions.changed() => self.beat(&beats)?,
                batch = incoming.message() => {
                    let Some(batch) = batch? else { return Err("its peer has ended it".into()) };
                    heard = Instant::now();
                    self.hear(batch)?;
                }
                _ = beat.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err("its peer says nothing".into());
                    }
                    self.lane.upgrade().inspect(|lane| lane.lose_the_late());
                    self.beat(&beats)?;
                }
            }
        }
    }

    fn beat(&self, beats: &mpsc::Sender<Beat>) -> Result<(), Broken> {
        let here = self.here.upgrade().ok_or("the node is gone")?;
        // A stream that has no room has not said the last one yet.
        let Counters { connections, active, waiting } = here.counters();
        let _ = beats.try_send(Beat { map_version: here.map_version(), connections, active, waiting });
        Ok(())
    }

    fn hear(&self, batch: Batch) -> Result<(), Broken> {
        let here = self.here.upgrade().ok_or("the node is gone")?;
        let lane = self.lane.upgrade().ok_or("nobody wants it")?;
        let mut last = None;
        for envelope in batch.envelopes {
            match envelope.kind {
                Some(Envelopes::Answer(answer)) => lane.answered(answer, &*here),
                Some(Envelopes::Beat(beat)) => here.heard(beat.map_version),
                Some(Envelopes::Watched(watched)) => {
                    lane.registered();
                    let home = Home { who: self.to.incarnation, epoch: watched.epoch };
                    if let Some(topic) = watched.topic.and_then(wire::read_topic) {
                        here.watches().watched(home, &topic, wire::read_watched(watched.outcome));
                    }
                }
                Some(Envelopes::Published(Published { topic, seq, data })) => {
                    let publications: Vec<(u64, Bytes)> = if seq == 0 {
                        data.into_iter().map(|d| (0, d)).collect()
                    } else {
                        (seq..).zip(data).collect()
                    };
                    if let Some(topic) = wire::read_topic_bytes(&topic) {
                        show(&*here, &topic, &publications);
                        last = Some(topic);
                    }
                }
                Some(Envelopes::Run(run)) => {
                    last = wire::unpack(run.packed, |t, p| show(&*here, t, p)).or(last)
                }
                Some(Envelopes::Missed(missed)) => match missed.topic.and_then(wire::read_topic) {
                    Some(Topic::Conversation(id)) => here.publisher().reaches(id, missed.seq),
                    Some(topic) => here.publisher().lost(&topic),
                    None => {}
                },
                Some(Envelopes::Aside(aside)) => {
                    if let Some((topic, aside)) = wire::read_aside(aside) {
                        here.publisher().aside(&topic, &aside);
                    }
                }
                Some(Envelopes::Who(who)) => {
                    if let Some(topic) = who.topic.and_then(wire::read_topic) {
                        let present = here.publisher().present(&topic);
                        // Whoever asks does not wait for long.
                        lane.say(Envelopes::Present(Present { number: who.number, who: present }));
                    }
                }
                // Of a later version, or nothing to us.
                Some(
                    Envelopes::Hello(_)
                    | Envelopes::Request(_)
                    | Envelopes::Watch(_)
                    | Envelopes::Unwatch(_)
                    | Envelopes::Present(_)
                    | Envelopes::Changed(_),
                )
                | None => {}
            }
        }
        // One of each batch is enough to find out what is published for nobody.
        if let Some(topic) = last {
            here.watches().check_wanted(self.to.incarnation, &topic);
        }
        Ok(())
    }
}

/// Shows publications of a topic: entries that follow each other, or what has no order.
fn show(here: &dyn Here, topic: &Topic, publications: &[(u64, Bytes)]) {
    let publisher = here.publisher();
    if let Topic::Conversation(id) = topic {
        publisher.entries(*id, publications);
        return;
    }
    for (_, data) in publications {
        match topic {
            Topic::Conversation(_) => {}
            Topic::Inbox(tenant, inbox) => publisher.inbox(tenant, inbox, data.clone()),
            Topic::Agent(tenant, agent) => publisher.agent(tenant, agent, data.clone()),
            Topic::Cluster => publisher.cluster(data.clone()),
        }
    }
}
