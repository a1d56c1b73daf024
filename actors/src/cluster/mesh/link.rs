//! One lane to a peer: requests out, answers back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use futures_util::stream;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::proto::envelope::Kind as Envelopes;
use super::proto::mesh_client::MeshClient;
use super::proto::{Answer, Batch, Beat, Envelope, Hello, Request, answer};
use super::tls::Socket;
use super::wire::{self, Waits};
use super::{ENVELOPES_MAX, Here, Identity, LANE_QUEUE_MAX, MESSAGE_BYTES_MAX, UNANSWERED_MAX, VERSION};
use crate::cluster::map::Incarnation;
use crate::cluster::switch::{Parcel, Switch};

/// Between two tries to reach a peer, at first and at most.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A peer that does not answer for so long is not reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two words of a lane that has nothing else to say.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// A lane that hears nothing for so long has broken.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Words beside requests that wait for the stream to take them.
const WORDS_MAX: usize = 4;

/// Where a lane leads.
#[derive(Clone, Debug)]
pub(super) struct To {
    pub(super) incarnation: Incarnation,
    pub(super) address: String,
    pub(super) lane: u32,
}

/// A request that is not answered.
struct Unanswered {
    shard: u32,
    request: Request,
    waits: Waits,
}

#[derive(Default)]
struct State {
    next: u64,
    unanswered: BTreeMap<u64, Unanswered>,
    /// Somebody was turned away.
    was_full: bool,
}

/// A lane.
pub(super) struct Lane {
    queue: mpsc::Sender<Request>,
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
    pub(super) fn start(identity: Identity, to: To, switch: Arc<Switch>, here: Weak<dyn Here>) -> Arc<Self> {
        let (queue, requests) = mpsc::channel(LANE_QUEUE_MAX);
        let lane = Arc::new(Self {
            queue,
            state: Mutex::default(),
            up: AtomicBool::new(false),
            switch,
            task: Mutex::default(),
        });
        let requests = Arc::new(Mutex::new(requests));
        let runs = Runs { lane: Arc::downgrade(&lane), identity, to, here, requests };
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
    pub(super) fn send(&self, shard: u32, parcel: Parcel) -> Result<(), Parcel> {
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
        let (request, waits) = wire::encode(id, parcel);
        place.send(request.clone());
        state.unanswered.insert(id, Unanswered { shard, request, waits });
        Ok(())
    }

    /// What came of a request.
    fn answered(&self, answer: Answer, here: &dyn Here) {
        let (found, had_no_room) = {
            let mut state = self.lock();
            let found = state.unanswered.remove(&answer.id);
            let room = state.unanswered.len() < UNANSWERED_MAX / 2;
            (found, room && std::mem::take(&mut state.was_full))
        };
        let Some(Unanswered { shard, request, waits }) = found else { return };
        match answer.outcome {
            Some(answer::Outcome::NotOwner(version)) => {
                here.heard(version);
                match wire::decode(&request, waits) {
                    Ok(parcel) => self.switch.not_owner(parcel, version),
                    Err((_, waits)) => waits.lose(),
                }
            }
            Some(outcome) => waits.answer(outcome),
            None => waits.lose(),
        }
        self.switch.settled(shard);
        if had_no_room {
            self.switch.all_moved();
        }
    }

    /// The lane has broken: whatever was not answered may or may not have been done. It goes on under its own id.
    fn give_back(&self) {
        let unanswered = {
            let mut state = self.lock();
            self.up.store(false, Ordering::Release);
            std::mem::take(&mut state.unanswered)
        };
        let mut shards = Vec::with_capacity(unanswered.len());
        for (_, Unanswered { shard, request, waits }) in unanswered {
            shards.push(shard);
            match wire::decode(&request, waits) {
                Ok(parcel) => self.switch.returned(parcel),
                Err((_, waits)) => waits.lose(),
            }
        }
        shards.into_iter().for_each(|shard| self.switch.settled(shard));
    }
}

struct Runs {
    lane: Weak<Lane>,
    identity: Identity,
    to: To,
    here: Weak<dyn Here>,
    /// Of the stream that is there.
    requests: Arc<Mutex<mpsc::Receiver<Request>>>,
}

/// Why a lane is not there, for a log.
type Broken = Box<dyn std::error::Error + Send + Sync>;

impl Runs {
    async fn run(self) {
        let mut pause = RECONNECT_PAUSE;
        loop {
            let began = tokio::time::Instant::now();
            let broken = self.speak().await;
            let Some(lane) = self.lane.upgrade() else { return };
            let was_up = lane.is_up();
            lane.give_back();
            // What waited to go out was among them.
            self.forget_requests();
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

    fn forget_requests(&self) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        while requests.try_recv().is_ok() {}
    }

    fn hello(&self, here: &dyn Here) -> Envelope {
        let hello = Hello {
            version: VERSION,
            cluster: self.identity.cluster.clone(),
            incarnation: here.incarnation(),
            to: self.to.incarnation,
            lane: self.to.lane,
            shards: self.identity.shards,
        };
        Envelope { kind: Some(Envelopes::Hello(hello)) }
    }

    /// Reaches the peer, and speaks with it until the lane breaks.
    async fn speak(&self) -> Result<(), Broken> {
        let (address, tls) = (self.to.address.clone(), self.identity.tls.clone());
        let channel = Endpoint::from_shared(format!("http://{}", self.to.address))?
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector(tower::service_fn(move |_| {
                let (address, tls) = (address.clone(), tls.clone());
                async move { Socket::connect(&address, tls.as_ref()).await.map(TokioIo::new) }
            }))
            .await?;
        let mut client = MeshClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let here = self.here.upgrade().ok_or("the node is gone")?;
        let (words, mut says) = mpsc::channel::<Envelope>(WORDS_MAX);
        words.try_send(self.hello(&*here))?;
        drop(here);
        // The stream takes what is there whenever it has room. Nobody who has to hear answers waits for that.
        let (requests, mut ready) = (self.requests.clone(), Vec::with_capacity(ENVELOPES_MAX));
        let outgoing = stream::poll_fn(move |cx| {
            let mut envelopes = Vec::new();
            while let Poll::Ready(Some(word)) = says.poll_recv(cx) {
                envelopes.push(word);
            }
            let mut requests = requests.lock().unwrap_or_else(PoisonError::into_inner);
            if let Poll::Ready(0) = requests.poll_recv_many(cx, &mut ready, ENVELOPES_MAX) {
                return Poll::Ready(None);
            }
            envelopes.extend(ready.drain(..).map(|r| Envelope { kind: Some(Envelopes::Request(r)) }));
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
        }
        tracing::info!(to = self.to.incarnation, lane = self.to.lane, "a node is reached");
        let mut beat = tokio::time::interval(BEAT_EVERY);
        let mut heard = tokio::time::Instant::now();
        loop {
            tokio::select! {
                batch = incoming.message() => {
                    let Some(batch) = batch? else { return Err("its peer has ended it".into()) };
                    heard = tokio::time::Instant::now();
                    self.hear(batch)?;
                }
                _ = beat.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err("its peer says nothing".into());
                    }
                    let here = self.here.upgrade().ok_or("the node is gone")?;
                    let beat = Beat { map_version: here.map_version() };
                    // A stream that has no room has not said the last one yet.
                    let _ = words.try_send(Envelope { kind: Some(Envelopes::Beat(beat)) });
                }
            }
        }
    }

    fn hear(&self, batch: Batch) -> Result<(), Broken> {
        let here = self.here.upgrade().ok_or("the node is gone")?;
        let lane = self.lane.upgrade().ok_or("nobody wants it")?;
        for envelope in batch.envelopes {
            match envelope.kind {
                Some(Envelopes::Answer(answer)) => lane.answered(answer, &*here),
                Some(Envelopes::Beat(beat)) => here.heard(beat.map_version),
                // Of a later version, or nothing to us.
                Some(Envelopes::Hello(_) | Envelopes::Request(_)) | None => {}
            }
        }
        Ok(())
    }
}
