//! The network between nodes: connections that carry bytes in order, late, or not at all, each way by itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use patchbay_actors::cluster::mesh::{Connection, Network};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};

use crate::world::{World, lock};

/// Bytes that are under way past which a writer waits.
const WINDOW: usize = 256 << 10;

/// One way of a connection.
struct Pipe {
    /// From which process to which.
    way: (usize, usize),
    chunks: VecDeque<Bytes>,
    /// What was sent and has not come.
    flying: usize,
    /// Bytes on their way arrive in order: not before this.
    busy_until: u64,
    ended: bool,
    broken: bool,
    reads: Option<Waker>,
    writes: Option<Waker>,
}

impl Pipe {
    fn wake(&mut self) {
        self.reads.take().inspect(Waker::wake_by_ref);
        self.writes.take().inspect(Waker::wake_by_ref);
    }
}

type Shared = Arc<Mutex<Pipe>>;

#[derive(Default)]
struct Inner {
    /// Ways that nothing passes, until when.
    cuts: BTreeMap<(usize, usize), u64>,
    doors: HashMap<String, (usize, mpsc::UnboundedSender<Connection>)>,
    /// Whose address each was.
    addresses: HashMap<String, usize>,
    pipes: Vec<Shared>,
    /// Processes whose machine is gone: nobody hears that their connections end.
    silent: BTreeSet<usize>,
}

/// All of it.
#[derive(Clone)]
pub(crate) struct Net {
    world: World,
    inner: Arc<Mutex<Inner>>,
}

/// One end of a connection.
struct End {
    net: Net,
    reads: Shared,
    writes: Shared,
}

impl Net {
    pub(crate) fn new(world: World) -> Self {
        Self { world, inner: Arc::default() }
    }

    /// Nothing passes this way for so long; connections may break of it.
    pub(crate) fn cut(&self, way: (usize, usize), ms: u64) {
        let until = self.world.now() + ms;
        lock(&self.inner).cuts.insert(way, until);
        if self.world.chance(300) {
            let net = self.clone();
            self.world.after(self.world.between(0, ms.max(1)), move || {
                net.sever(|of| of == way || (of.1, of.0) == way);
            });
        }
    }

    /// Everything passes from here on.
    pub(crate) fn heal(&self) {
        lock(&self.inner).cuts.clear();
        // What was held up by a cut ends, rather than to wait for what would have been its end.
        let soon = self.world.now() + 100;
        self.sever_if(|pipe| pipe.busy_until > soon);
    }

    /// A process is gone, with its machine or alone.
    pub(crate) fn gone(&self, who: usize, silently: bool) {
        let mut inner = lock(&self.inner);
        inner.doors.retain(|_, (of, _)| *of != who);
        if silently {
            inner.silent.insert(who);
        }
    }

    /// It has another process, which knows nothing of what was open.
    pub(crate) fn back(&self, who: usize) {
        lock(&self.inner).silent.remove(&who);
        self.sever(|(from, to)| from == who || to == who);
    }

    fn sever(&self, which: impl Fn((usize, usize)) -> bool) {
        self.sever_if(|pipe| which(pipe.way));
    }

    fn sever_if(&self, which: impl Fn(&Pipe) -> bool) {
        let pipes = lock(&self.inner).pipes.clone();
        for pipe in pipes {
            let mut pipe = lock(&pipe);
            if which(&pipe) {
                pipe.broken = true;
                pipe.wake();
            }
        }
    }

    /// How long something is on its way; nothing passes a cut before it has healed.
    fn way(&self, way: (usize, usize)) -> u64 {
        let cut = lock(&self.inner).cuts.get(&way).copied().unwrap_or(0).saturating_sub(self.world.now());
        let late = if self.world.mishap(10) { self.world.between(20, 600) } else { 0 };
        cut + self.world.between(0, 3) + late
    }

    fn pipe(&self, way: (usize, usize)) -> Shared {
        let pipe = Arc::new(Mutex::new(Pipe {
            way,
            chunks: VecDeque::new(),
            flying: 0,
            busy_until: 0,
            ended: false,
            broken: false,
            reads: None,
            writes: None,
        }));
        let mut inner = lock(&self.inner);
        inner.pipes.retain(|p| Arc::strong_count(p) > 1);
        inner.pipes.push(pipe.clone());
        pipe
    }

    /// When what is sent now arrives, behind what was sent before.
    fn arrival(&self, pipe: &mut Pipe) -> u64 {
        let at = (self.world.now() + self.way(pipe.way)).max(pipe.busy_until);
        pipe.busy_until = at;
        at - self.world.now()
    }

    /// Where a process is called, and calls from.
    pub(crate) fn door(&self, who: usize, address: String) -> Arc<dyn Network> {
        let (calls, called) = mpsc::unbounded_channel();
        let mut inner = lock(&self.inner);
        inner.addresses.insert(address.clone(), who);
        inner.doors.insert(address, (who, calls));
        drop(inner);
        Arc::new(Door { net: self.clone(), who, called: tokio::sync::Mutex::new(called) })
    }
}

struct Door {
    net: Net,
    who: usize,
    called: tokio::sync::Mutex<mpsc::UnboundedReceiver<Connection>>,
}

#[async_trait]
impl Network for Door {
    async fn accept(&self) -> io::Result<Connection> {
        let called = self.called.lock().await.recv().await;
        called.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    async fn connect(&self, address: &str) -> io::Result<Connection> {
        let (net, me) = (self.net.clone(), self.who);
        let Some((peer, _)) = lock(&net.inner).doors.get(address).cloned() else {
            let silent = {
                let inner = lock(&net.inner);
                inner.addresses.get(address).is_some_and(|who| inner.silent.contains(who))
            };
            if silent {
                // Nobody is there who could refuse.
                return std::future::pending().await;
            }
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let (says, hears) = oneshot::channel();
        // There and back: either way may be cut.
        let (there, back, address) = (net.way((me, peer)), net.way((peer, me)), address.to_owned());
        let (far, world) = (net.clone(), net.world.clone());
        world.clone().after(there, move || {
            let door = lock(&far.inner).doors.get(&address).cloned();
            let Some((_, calls)) = door else { return };
            let (ours, theirs) = (far.pipe((me, peer)), far.pipe((peer, me)));
            let end = End { net: far.clone(), reads: ours.clone(), writes: theirs.clone() };
            if calls.send(Box::pin(end)).is_ok() {
                world.after(back, move || drop(says.send((theirs, ours))));
            }
        });
        let (reads, writes) = hears.await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(Box::pin(End { net, reads, writes }))
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut pipe = lock(&self.reads);
        if pipe.broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let Some(chunk) = pipe.chunks.front_mut() else {
            if pipe.ended {
                return Poll::Ready(Ok(()));
            }
            pipe.reads = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let n = chunk.len().min(buf.remaining());
        buf.put_slice(&chunk[..n]);
        chunk.advance(n);
        if chunk.is_empty() {
            pipe.chunks.pop_front();
        }
        pipe.flying -= n;
        pipe.writes.take().inspect(Waker::wake_by_ref);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.writes);
        if pipe.broken || pipe.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if pipe.flying >= WINDOW {
            pipe.writes = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let data = Bytes::copy_from_slice(&data[..data.len().min(WINDOW)]);
        let n = data.len();
        pipe.flying += n;
        let ms = self.net.arrival(&mut pipe);
        drop(pipe);
        let pipe = self.writes.clone();
        self.net.world.after(ms, move || {
            let mut pipe = lock(&pipe);
            pipe.chunks.push_back(data);
            pipe.reads.take().inspect(Waker::wake_by_ref);
        });
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ends();
        Poll::Ready(Ok(()))
    }
}

impl End {
    /// Nothing more comes from here; whoever reads is told when it has heard the rest.
    fn ends(&self) {
        let (way, ms) = {
            let mut pipe = lock(&self.writes);
            (pipe.way, self.net.arrival(&mut pipe))
        };
        if lock(&self.net.inner).silent.contains(&way.0) {
            return;
        }
        let pipe = self.writes.clone();
        self.net.world.after(ms, move || {
            let mut pipe = lock(&pipe);
            pipe.ended = true;
            pipe.wake();
        });
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.ends();
        let way = lock(&self.reads).way;
        if lock(&self.net.inner).silent.contains(&way.1) {
            return;
        }
        // Whoever writes to it is told so.
        let (pipe, net) = (self.reads.clone(), self.net.clone());
        let ms = self.net.way((way.1, way.0));
        net.world.after(ms, move || {
            let mut pipe = lock(&pipe);
            pipe.broken = true;
            pipe.wake();
        });
    }
}
