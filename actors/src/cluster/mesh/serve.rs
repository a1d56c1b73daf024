//! The other end of lanes: requests and registrations in, answers and publications out.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream, FuturesUnordered};
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::{Request as Call, Response, Status, Streaming};

use super::network::Network;
use super::outlet::Outlet;
use super::proto::envelope::Kind as Envelopes;
use super::proto::mesh_server::{Mesh, MeshServer};
use super::proto::{Answer, Batch, Beat, Envelope, Hello, Request, answer};
use super::tls::{MeshTls, Socket};
use super::wire;
use super::{ENVELOPES_MAX, FRAME_BYTES, Here, Identity, MESSAGE_BYTES_MAX, UNANSWERED_MAX, WINDOW_BYTES};
use crate::fanout::Outlet as _;
use crate::node::Counters;
use crate::shard::reply::{Round, Rounds};

/// A caller says who it is within this.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Callers that are saying who they are.
const HANDSHAKES_MAX: usize = 64;
/// Between two words to a caller that hears nothing else.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Between two tries to accept after an error, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves other nodes until it is dropped.
pub(super) async fn serve(
    identity: Identity,
    network: Arc<dyn Network>,
    here: Weak<dyn Here>,
    versions: watch::Receiver<u64>,
) {
    let service = MeshServer::new(Service { identity: identity.clone(), here, versions })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (accepted, mut sockets) = mpsc::channel(HANDSHAKES_MAX);
    let incoming = stream::poll_fn(move |cx| sockets.poll_recv(cx));
    let accepts = accept(network, identity.tls, accepted);
    let serves = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .add_service(service)
        .serve_with_incoming(incoming);
    tokio::select! {
        served = serves => {
            if let Err(error) = served {
                tracing::error!(%error, "other nodes are not served any more");
            }
        }
        () = accepts => {}
    }
}

/// Lets nodes in that prove who they are.
async fn accept(
    network: Arc<dyn Network>,
    tls: Option<MeshTls>,
    accepted: mpsc::Sender<Result<Socket, std::io::Error>>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let socket = match network.accept().await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "no node can be let in");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(HELLO_TIMEOUT, Socket::accept(socket, tls.as_ref())).await {
                // Whoever takes them is gone when this node is.
                Ok(Ok(socket)) => drop(accepted.send(Ok(socket)).await),
                Ok(Err(error)) => tracing::warn!(%error, "somebody who is no node of this cluster called"),
                Err(_) => tracing::warn!("somebody called and did not say who it is"),
            }
        });
    }
}

struct Service {
    identity: Identity,
    here: Weak<dyn Here>,
    versions: watch::Receiver<u64>,
}

#[tonic::async_trait]
impl Mesh for Service {
    type LinkStream = BoxStream<'static, Result<Batch, Status>>;

    async fn link(&self, call: Call<Streaming<Batch>>) -> Result<Response<Self::LinkStream>, Status> {
        let mut incoming = call.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("who is it?"))??;
        let Some(Envelopes::Hello(hello)) = first.and_then(|b| b.envelopes.into_iter().next()?.kind) else {
            return Err(Status::invalid_argument("the first envelope is not a hello"));
        };
        let here = self.here.upgrade().ok_or_else(|| Status::unavailable("the node ends"))?;
        self.check(&hello, &*here)?;
        let version = self.identity.version.min(hello.version);
        let answer = Hello {
            version,
            cluster: self.identity.cluster.clone(),
            incarnation: here.incarnation(),
            to: hello.incarnation,
            lane: hello.lane,
            shards: self.identity.shards,
        };
        let answer = Envelope { kind: Some(Envelopes::Hello(answer)) };
        let (answers, answering) = mpsc::channel(UNANSWERED_MAX);
        let outlet = Arc::new(Outlet::new(version));
        let (here, versions) = (self.here.clone(), self.versions.clone());
        let reads = Reads {
            here,
            answers,
            from: hello.incarnation,
            to: hello.to,
            rounds: Arc::default(),
            outlet: outlet.clone(),
            versions,
        };
        tokio::spawn(reads.run(incoming));
        Ok(Response::new(answers_of(answer, answering, outlet, self.here.clone())))
    }
}

impl Service {
    fn check(&self, hello: &Hello, here: &dyn Here) -> Result<(), Status> {
        let (ours, theirs) = (&self.identity, hello);
        if theirs.version == 0 {
            return Err(Status::failed_precondition("no version"));
        }
        if theirs.cluster != ours.cluster || theirs.shards != ours.shards {
            let why = format!("this is {} with {} shards", ours.cluster, ours.shards);
            return Err(Status::failed_precondition(why));
        }
        if theirs.to != here.incarnation() {
            return Err(Status::failed_precondition(format!("this is incarnation {}", here.incarnation())));
        }
        Ok(())
    }
}

type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// What goes back: the hello, and then answers and publications as they come, those together that are there together.
fn answers_of(
    hello: Envelope,
    mut coming: mpsc::Receiver<Answering>,
    outlet: Arc<Outlet>,
    here: Weak<dyn Here>,
) -> BoxStream<'static, Result<Batch, Status>> {
    let mut answering: FuturesUnordered<Answering> = FuturesUnordered::new();
    let (mut hello, mut more, mut published) = (Some(hello), Vec::new(), Vec::new());
    let mut beat = tokio::time::interval(BEAT_EVERY);
    let answers = stream::poll_fn(move |cx| {
        let mut envelopes: Vec<Envelope> = hello.take().into_iter().collect();
        let room = UNANSWERED_MAX.saturating_sub(answering.len()).min(ENVELOPES_MAX);
        // Nobody reads any more: whoever called makes another lane.
        if room > 0 && coming.poll_recv_many(cx, &mut more, room) == Poll::Ready(0) {
            return Poll::Ready(None);
        }
        answering.extend(more.drain(..));
        while envelopes.len() < ENVELOPES_MAX
            && let Poll::Ready(Some(answer)) = answering.poll_next_unpin(cx)
        {
            envelopes.push(Envelope { kind: Some(Envelopes::Answer(answer)) });
        }
        if outlet.poll_take(cx, ENVELOPES_MAX, &mut published).is_ready() {
            envelopes.extend(published.drain(..).map(|kind| Envelope { kind: Some(kind) }));
        }
        if beat.poll_tick(cx).is_ready() {
            let Some(here) = here.upgrade() else { return Poll::Ready(None) };
            let beat = Beat { map_version: here.map_version(), ..Beat::default() };
            envelopes.push(Envelope { kind: Some(Envelopes::Beat(beat)) });
        }
        // Whoever takes a batch asks again, and that registers with whatever has no more.
        if envelopes.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(Batch { envelopes }))) }
    });
    answers.boxed()
}

struct Reads {
    here: Weak<dyn Here>,
    answers: mpsc::Sender<Answering>,
    /// Who calls, and whom it means to speak to.
    from: u32,
    to: u32,
    /// Which of its rounds are over.
    rounds: Arc<Rounds>,
    outlet: Arc<Outlet>,
    versions: watch::Receiver<u64>,
}

impl Drop for Reads {
    fn drop(&mut self) {
        if let Some(here) = self.here.upgrade() {
            here.interest().forget(self.outlet.number());
        }
    }
}

impl Reads {
    async fn run(mut self, mut incoming: Streaming<Batch>) {
        loop {
            let batch = tokio::select! {
                batch = incoming.message() => match batch {
                    Ok(Some(batch)) => batch,
                    Ok(None) | Err(_) => return,
                },
                Ok(()) = self.versions.changed() => {
                    let map_version = *self.versions.borrow_and_update();
                    self.outlet.say(Envelopes::Beat(Beat { map_version, ..Beat::default() }));
                    continue;
                }
            };
            for envelope in batch.envelopes {
                // The lane may be for somebody who is no more.
                let Some(here) = self.here.upgrade().filter(|here| here.incarnation() == self.to) else {
                    return;
                };
                let Some(kind) = envelope.kind else { continue };
                let Some(answering) = self.heard(&*here, kind) else { continue };
                drop(here);
                // A caller with too much unanswered is not read any more: its stream fills up.
                if self.answers.send(answering).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Takes a word of the caller; what there is to answer to a request.
    fn heard(&self, here: &dyn Here, word: Envelopes) -> Option<Answering> {
        match word {
            Envelopes::Request(request) => return Some(self.hand(here, request)),
            Envelopes::Beat(Beat { map_version, connections, active, waiting }) => {
                here.heard(map_version);
                here.counted(self.from, Counters { connections, active, waiting });
            }
            Envelopes::Watch(watch) => {
                let topic = watch.topic.and_then(wire::read_topic)?;
                here.watch(topic, watch.epoch, watch.check, self.outlet.clone());
            }
            Envelopes::Unwatch(unwatch) => {
                let topic = unwatch.topic.and_then(wire::read_topic)?;
                here.interest().remove(&topic, self.outlet.number());
            }
            Envelopes::Aside(aside) => {
                let (topic, aside) = wire::read_aside(aside)?;
                here.publisher().aside(&topic, &aside);
                here.interest().aside(&topic, &aside, Some(self.outlet.number()));
            }
            Envelopes::Present(present) => here.interest().present(present.number, present.who),
            Envelopes::Changed(changed) => here.changed(changed.tenant.parse().ok()?),
            // Of a later version, or nothing to us.
            Envelopes::Hello(_)
            | Envelopes::Answer(_)
            | Envelopes::Watched(_)
            | Envelopes::Published(_)
            | Envelopes::Run(_)
            | Envelopes::Missed(_)
            | Envelopes::Who(_) => {}
        }
        None
    }

    /// Hands a command to an entity here; what comes back at once says that it is not here, or cannot be read.
    fn hand(&self, here: &dyn Here, request: Request) -> Answering {
        self.try_hand(here, request).unwrap_or_else(|answer| Box::pin(std::future::ready(answer)))
    }

    fn try_hand(&self, here: &dyn Here, request: Request) -> Result<Answering, Answer> {
        let id = request.id;
        let unreadable = || {
            let error = patchbay_protocol::CommandError::invalid("a command that this version does not know");
            wire::answered(id, answer::Outcome::Refused(wire::refusal(&error)))
        };
        let round = Round { shard: request.shard, number: request.round, rounds: self.rounds.clone() };
        let not_owner = || wire::answered(id, answer::Outcome::NotOwner(here.map_version()));
        if self.rounds.is_over(round.shard, round.number) {
            return Err(not_owner());
        }
        let until = wire::until(request.within_ms);
        let (waits, outcome) = wire::receive(request.kind(), round.clone(), until).ok_or_else(unreadable)?;
        let parcel = wire::decode(&request, waits).map_err(|_| unreadable())?;
        if here.take(parcel).is_err() {
            round.ends();
            return Err(not_owner());
        }
        let here = self.here.clone();
        Ok(Box::pin(async move {
            let elsewhere = || answer::Outcome::NotOwner(here.upgrade().map_or(0, |here| here.map_version()));
            wire::answered(id, outcome.await.unwrap_or_else(elsewhere))
        }))
    }
}
