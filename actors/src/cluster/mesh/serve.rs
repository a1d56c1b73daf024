//! The other end of lanes: requests in, answers out.

use std::sync::Weak;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, FuturesUnordered};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::{Request as Call, Response, Status, Streaming};

use super::proto::envelope::Kind as Envelopes;
use super::proto::mesh_server::{Mesh, MeshServer};
use super::proto::{Answer, Batch, Beat, Envelope, Hello, Request, answer};
use super::wire;
use super::{ENVELOPES_MAX, Here, Identity, MESSAGE_BYTES_MAX, UNANSWERED_MAX, VERSION};

/// A caller says who it is within this.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two words to a caller that hears nothing else.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Batches that wait for the stream to take them.
const BATCHES_MAX: usize = 4;
/// Between two tries to accept after an error, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves other nodes until it is dropped.
pub(super) async fn serve(identity: Identity, listener: TcpListener, here: Weak<dyn Here>) {
    let service = MeshServer::new(Service { identity, here })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let incoming = stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => {
                    // A socket that has ended already is found out by its first read.
                    let _ = socket.set_nodelay(true);
                    return Some((Ok::<_, std::io::Error>(socket), listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "no node can be let in");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    let served = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await;
    if let Err(error) = served {
        tracing::error!(%error, "other nodes are not served any more");
    }
}

struct Service {
    identity: Identity,
    here: Weak<dyn Here>,
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
        let (batches, mut outgoing) = mpsc::channel(BATCHES_MAX);
        let answer = Hello {
            version: VERSION.min(hello.version),
            cluster: self.identity.cluster.clone(),
            incarnation: here.incarnation(),
            to: hello.incarnation,
            lane: hello.lane,
            shards: self.identity.shards,
        };
        let answer = Envelope { kind: Some(Envelopes::Hello(answer)) };
        // There is room: it was just made.
        let _ = batches.try_send(Ok(Batch { envelopes: vec![answer] }));
        let lane = Lane { here: self.here.clone(), batches, to: hello.to };
        tokio::spawn(lane.run(incoming));
        Ok(Response::new(stream::poll_fn(move |cx| outgoing.poll_recv(cx)).boxed()))
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

type Answering = std::pin::Pin<Box<dyn Future<Output = Answer> + Send>>;

struct Lane {
    here: Weak<dyn Here>,
    batches: mpsc::Sender<Result<Batch, Status>>,
    /// Whom the caller means to speak to.
    to: u32,
}

impl Lane {
    async fn run(self, mut incoming: Streaming<Batch>) {
        let mut answering: FuturesUnordered<Answering> = FuturesUnordered::new();
        let mut beat = tokio::time::interval(BEAT_EVERY);
        loop {
            let mut envelopes = Vec::new();
            tokio::select! {
                // A caller that has too much unanswered is not read any more: its stream fills up.
                batch = incoming.message(), if answering.len() < UNANSWERED_MAX => {
                    let Ok(Some(batch)) = batch else { return };
                    if self.take(batch, &mut answering, &mut envelopes).is_none() {
                        return;
                    }
                }
                Some(answer) = answering.next() => envelopes.push(Envelope { kind: Some(Envelopes::Answer(answer)) }),
                _ = beat.tick() => {
                    let Some(here) = self.here.upgrade() else { return };
                    let beat = Beat { map_version: here.map_version() };
                    envelopes.push(Envelope { kind: Some(Envelopes::Beat(beat)) });
                }
            }
            // What is answered by now goes with it.
            while envelopes.len() < ENVELOPES_MAX
                && let Some(Some(answer)) = answering.next().now_or_never()
            {
                envelopes.push(Envelope { kind: Some(Envelopes::Answer(answer)) });
            }
            if !envelopes.is_empty() && self.batches.send(Ok(Batch { envelopes })).await.is_err() {
                return;
            }
        }
    }

    /// Hands what came to whom it is for. None: the lane is for somebody who is no more.
    fn take(
        &self,
        batch: Batch,
        answering: &mut FuturesUnordered<Answering>,
        envelopes: &mut Vec<Envelope>,
    ) -> Option<()> {
        let here = self.here.upgrade().filter(|here| here.incarnation() == self.to)?;
        for envelope in batch.envelopes {
            match envelope.kind {
                Some(Envelopes::Request(request)) => match hand(&*here, request) {
                    Ok(answer) => answering.push(answer),
                    Err(answer) => envelopes.push(Envelope { kind: Some(Envelopes::Answer(answer)) }),
                },
                Some(Envelopes::Beat(beat)) => here.heard(beat.map_version),
                // Of a later version, or nothing to us.
                Some(Envelopes::Hello(_) | Envelopes::Answer(_)) | None => {}
            }
        }
        Some(())
    }
}

/// Hands a command to an entity here; or says at once that it is not here, or cannot be read.
fn hand(here: &dyn Here, request: Request) -> Result<Answering, Answer> {
    let id = request.id;
    let unreadable = || {
        let error = patchbay_protocol::CommandError::invalid("a command that this version does not know");
        wire::answered(id, answer::Outcome::Refused(wire::refusal(&error)))
    };
    let (waits, answering) = wire::receive(request.kind()).ok_or_else(unreadable)?;
    let parcel = wire::decode(&request, waits).map_err(|_| unreadable())?;
    match here.take(parcel) {
        Ok(()) => Ok(Box::pin(async move { wire::answered(id, answering.wait().await) })),
        Err(_) => Err(wire::answered(id, answer::Outcome::NotOwner(here.map_version()))),
    }
}
