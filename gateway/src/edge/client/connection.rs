//! One connection: one task that polls its socket both ways, its commands and its clock. Nothing in it waits for
//! anything else in it.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::client::reply::{Error, Push};
use patchbay_protocol::client::{Command, DecodeError, Encoding, Reply};
use patchbay_protocol::{AgentId, CommandError, Disconnect, TenantId};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

use super::commands;
use super::lanes::Lanes;
use super::session::Session;
use super::wire::{Gone, Read, Wire};
use super::{Counted, Sockets};
use crate::auth::Peer;
use crate::health::Phase;
use crate::hub::outbound::{Next, Outbound};
use crate::hub::{ClientId, Topic};
use crate::limits::Bucket;

/// Commands of one connection under way; past it the socket is not read.
const COMMANDS_MAX: usize = 512;
/// Events that are worked on between two writes.
const UNWRITTEN_MAX: usize = 64;
/// How long what was taken may take to be answered and flushed before a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Sockets that are being told that there is no place; and for how long each is.
const CLOSING_MAX: usize = 1024;
const REFUSE_TIMEOUT: Duration = Duration::from_secs(1);
/// What is under way when a token is revoked may still be answered, for so long.
const REVOKE_TIMEOUT: Duration = Duration::from_millis(500);
/// Permissions that could not be asked are asked again after this.
const RECHECK_PAUSE: Duration = Duration::from_millis(500);
/// Ticks are at least this far apart.
const TICK_MIN: Duration = Duration::from_millis(5);
/// Past `exp` a connection has this long to refresh.
const REFRESH_GRACE: Duration = Duration::from_secs(25);

/// What a command comes to: a change of the session, and what to reply.
pub struct Done {
    /// The command's id; 0 wants no reply.
    pub id: u32,
    /// The reply, or nothing when it was sent already.
    pub reply: Option<Result<Reply, CommandError>>,
    /// What becomes of the session.
    pub change: Change,
}

/// What becomes of the session.
pub enum Change {
    /// Nothing.
    None,
    /// `connect` was decided.
    Connected(Box<super::session::Live>),
    /// `connect` was refused.
    Refused,
    /// A subscription stands; whether others are told.
    Subscribed(String, super::session::Subscription),
    /// A subscription was not made.
    Unsubscribed(String),
    /// A new token.
    Refreshed(Box<(Peer, crate::auth::Claims)>),
    /// The documents were asked again.
    Rechecked(Box<commands::recheck::Rechecked>),
    /// They could not be asked.
    RecheckLater,
    /// The connection ends.
    Close(Disconnect),
}

/// A connection.
pub struct Connection {
    pub(super) sockets: Arc<Sockets>,
    pub(super) client: ClientId,
    pub(super) outbound: Arc<Outbound>,
    pub(super) session: Session,
    /// The word by which commands of a client without a socket of its own are let in.
    pub(super) emulated: Option<String>,
    pub(super) lanes: Lanes<Done>,
    /// The agent that was told of this connection.
    pub(super) present: Arc<OnceLock<(TenantId, AgentId)>>,
    /// Commands that wait for `connect`, or for room.
    backlog: VecDeque<Command>,
    clock: Clock,
    /// Ends when what is under way is answered: nothing more is read.
    closing: Option<Disconnect>,
    recheck: Recheck,
    /// The documents changed while something was under way that had asked them before.
    changed_since: bool,
    /// The socket takes nothing more for now.
    stalled: bool,
    /// Events since the last write.
    unwritten: usize,
    /// Commands that it may send.
    rate: Bucket,
}

/// Whether permissions are being asked again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Recheck {
    Idle,
    Running,
    /// The documents changed meanwhile.
    Again,
}

/// When something is due on a connection.
struct Clock {
    sleep: Pin<Box<Sleep>>,
    opened: Instant,
    next_ping: Option<Instant>,
    pong_due: Option<Instant>,
    expires: Option<Instant>,
    recheck: Option<Instant>,
    drain: Option<Instant>,
    /// A connection that ends has until then to be answered and flushed.
    close_by: Option<Instant>,
}

enum Event {
    Read(Read),
    Done(Box<Done>),
    Gone,
    Close(Disconnect),
    Tick,
    Draining,
    Changed,
}

/// Serves a socket until it ends.
pub async fn run<W: Wire>(sockets: Arc<Sockets>, mut wire: W, encoding: Encoding) {
    let shared = sockets.clone();
    let Some(_open) = Counted::take(shared.hub.open(), shared.limits.connections_max) else {
        return Box::pin(turn_away(&shared, &mut wire, encoding)).await;
    };
    let Some(mut unconnected) = Counted::take(&shared.unconnected, shared.limits.unconnected_max).map(Some)
    else {
        return Box::pin(turn_away(&shared, &mut wire, encoding)).await;
    };
    metrics::gauge!("patchbay_edge_connections").increment(1.0);
    let mut phase = sockets.phase.clone();
    let mut changes = None;
    let mut connection = Connection::new(sockets, encoding, wire.session());
    loop {
        if let Session::Live(live) = &mut connection.session
            && unconnected.is_some()
        {
            unconnected = None;
            changes = live.changes.take();
        }
        let event = connection.next(&mut wire, &mut phase, &mut changes).await;
        match connection.on(event) {
            On::Continue => {}
            On::Close(why) => {
                metrics::counter!("patchbay_edge_disconnects_total", "code" => why.code().to_string())
                    .increment(1);
                // Rare, and large while they last: they do not lie in every socket's task.
                Box::pin(wire.close(encoding, why)).await;
                break;
            }
            On::Gone => break,
        }
    }
    drop(unconnected);
    Box::pin(connection.end()).await;
    metrics::gauge!("patchbay_edge_connections").decrement(1.0);
}

/// There is no place. It may pass by itself, so an SDK must come back.
async fn turn_away(sockets: &Sockets, wire: &mut impl Wire, encoding: Encoding) {
    let why = Disconnect::TooManyRequests;
    metrics::counter!("patchbay_edge_disconnects_total", "code" => why.code().to_string()).increment(1);
    // Past this nobody is told: whoever is turned away must not be a crowd of its own.
    if let Some(_place) = Counted::take(&sockets.closing, CLOSING_MAX) {
        let _ = tokio::time::timeout(REFUSE_TIMEOUT, wire.close(encoding, why)).await;
    }
}

enum On {
    Continue,
    Close(Disconnect),
    Gone,
}

impl Connection {
    fn new(sockets: Arc<Sockets>, encoding: Encoding, emulated: Option<String>) -> Self {
        let opened = Instant::now();
        let sleep = Box::pin(tokio::time::sleep_until(opened + sockets.limits.connect));
        Self {
            client: ClientId(rand::random()),
            outbound: Outbound::new(encoding, sockets.hub.queued().clone()),
            session: Session::New,
            emulated,
            lanes: Lanes::default(),
            present: Arc::default(),
            backlog: VecDeque::new(),
            clock: Clock {
                sleep,
                opened,
                next_ping: None,
                pong_due: None,
                expires: None,
                recheck: None,
                drain: None,
                close_by: None,
            },
            closing: None,
            recheck: Recheck::Idle,
            changed_since: false,
            stalled: false,
            unwritten: 0,
            rate: sockets.rates.connection.bucket(),
            sockets,
        }
    }

    async fn next(
        &mut self,
        wire: &mut impl Wire,
        phase: &mut watch::Receiver<Phase>,
        changes: &mut Option<watch::Receiver<u64>>,
    ) -> Event {
        let mut drain = std::pin::pin!(phase.changed());
        let mut change = std::pin::pin!(async {
            // Nobody is there yet whose permissions could change.
            let Some(changes) = changes else { return std::future::pending().await };
            changes.changed().await
        });
        poll_fn(move |cx| {
            loop {
                if let Poll::Ready(why) = self.outbound.poll_slow(cx.waker()) {
                    return Poll::Ready(Event::Close(why));
                }
                // What is ready is worked on before anything is written, so that what it comes to goes out in one write.
                let full = self.unwritten >= UNWRITTEN_MAX;
                if !full && let Poll::Ready(event) = self.poll_ready(wire, cx) {
                    self.unwritten += 1;
                    return Poll::Ready(event);
                }
                self.unwritten = 0;
                if let Poll::Ready(event) = self.poll_write(wire, cx) {
                    return Poll::Ready(event);
                }
                if self.clock.sleep.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Tick);
                }
                if drain.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Draining);
                }
                if change.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Changed);
                }
                // A catch-up that begins now has not been polled yet.
                let begun = !self.stalled && self.go_on();
                if !full && !begun {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// What was answered, and what has come.
    fn poll_ready(&mut self, wire: &mut impl Wire, cx: &mut Context<'_>) -> Poll<Event> {
        if let Poll::Ready(done) = self.lanes.poll_next(cx) {
            return Poll::Ready(Event::Done(Box::new(done)));
        }
        if self.may_read() {
            return wire.poll_read(self.outbound.encoding(), cx).map(Event::Read);
        }
        Poll::Pending
    }

    fn may_read(&self) -> bool {
        self.closing.is_none() && self.backlog.is_empty() && self.lanes.len() < COMMANDS_MAX
    }

    /// Writes what is queued and flushes once: frames that are queued together go out in one write.
    fn poll_write(&mut self, wire: &mut impl Wire, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            match wire.poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(Gone)) => return Poll::Ready(Event::Gone),
                Poll::Pending => {
                    self.stalled = true;
                    return Poll::Pending;
                }
            }
            match self.outbound.poll_next(cx.waker()) {
                Poll::Ready(Next::Frame(frame)) => {
                    if wire.send(self.outbound.encoding(), frame).is_err() {
                        return Poll::Ready(Event::Gone);
                    }
                }
                Poll::Ready(Next::Beside(frame)) => {
                    if wire.send_beside(self.outbound.encoding(), frame).is_err() {
                        return Poll::Ready(Event::Gone);
                    }
                }
                Poll::Ready(Next::Close(why)) => return Poll::Ready(Event::Close(why)),
                Poll::Pending => break,
            }
        }
        match wire.poll_flush(cx) {
            Poll::Ready(Err(Gone)) => Poll::Ready(Event::Gone),
            Poll::Ready(Ok(())) => {
                self.stalled = false;
                Poll::Pending
            }
            Poll::Pending => {
                self.stalled = true;
                Poll::Pending
            }
        }
    }

    /// Subscriptions that were behind go on from the log, now that the socket has drained; whether one begins.
    fn go_on(&mut self) -> bool {
        if self.closing.is_some() {
            return false;
        }
        let Some(from) = self.outbound.go_on() else { return false };
        let lane = Some(from.topic.channel());
        self.lanes.start(lane, commands::catch_up::run(self, from));
        true
    }

    fn on(&mut self, event: Event) -> On {
        match event {
            Event::Read(Read::Frame(frame)) => self.received(&frame),
            Event::Read(Read::Broken(why)) => self.close_after_replies(why),
            Event::Read(Read::Gone) | Event::Gone => On::Gone,
            Event::Done(done) => self.done(*done),
            Event::Close(why) => On::Close(why),
            Event::Tick => self.tick(),
            Event::Draining => {
                let goes = *self.sockets.phase.borrow() != Phase::Serving;
                self.clock.drain = goes.then(|| Instant::now() + self.sockets.leaves_in());
                self.clock.arm(self.sockets.limits.connect);
                On::Continue
            }
            Event::Changed => {
                self.recheck();
                On::Continue
            }
        }
    }

    /// Closes once everything that was taken is answered and flushed.
    fn close_after_replies(&mut self, why: Disconnect) -> On {
        self.backlog.clear();
        let why = *self.closing.get_or_insert(why);
        let mut patience = CLOSE_TIMEOUT;
        if why == Disconnect::ForceNoReconnect {
            // From here on it hears nothing more, whether it reads or not.
            self.leave_all();
            self.outbound.hush();
            patience = REVOKE_TIMEOUT;
        }
        if self.clock.close_by.is_none() {
            self.clock.close_by = Some(Instant::now() + patience);
            self.clock.arm(self.sockets.limits.connect);
        }
        if self.lanes.is_empty() {
            self.outbound.close(why);
        }
        On::Continue
    }

    fn received(&mut self, frame: &Bytes) -> On {
        if let Session::Refused = self.session {
            return On::Continue;
        }
        match self.outbound.encoding().decode_commands(frame) {
            Ok(commands) => {
                self.backlog.extend(commands);
                self.accept()
            }
            Err(DecodeError::TooLarge) => self.close_after_replies(Disconnect::TooLarge),
            Err(DecodeError::Malformed | DecodeError::TooMany) => {
                self.close_after_replies(Disconnect::BadRequest)
            }
        }
    }

    /// Starts what waits, as far as the session and the bound allow.
    fn accept(&mut self) -> On {
        while self.lanes.len() < COMMANDS_MAX {
            let Some(command) = self.backlog.pop_front() else { return On::Continue };
            match &mut self.session {
                Session::New if command.is_pong() => {}
                Session::New => {
                    let Some(connect) = command.connect else {
                        return self.close_after_replies(Disconnect::BadRequest);
                    };
                    self.session = Session::Connecting;
                    self.lanes.start(None, commands::connect::run(self, command.id, *connect));
                }
                Session::Connecting => {
                    self.backlog.push_front(command);
                    return On::Continue;
                }
                Session::Live(_) if command.is_pong() => self.clock.pong_due = None,
                Session::Live(_) if command.connect.is_some() => {
                    return self.close_after_replies(Disconnect::BadRequest);
                }
                Session::Live(_) => {
                    if let Err(error) = self.sockets.rates.connection(&mut self.rate) {
                        if command.id > 0 {
                            self.outbound.reply(&refusal(command.id, &error));
                        }
                        continue;
                    }
                    commands::start(self, command);
                }
                Session::Refused => {}
            }
        }
        On::Continue
    }

    fn done(&mut self, done: Done) -> On {
        let connected = matches!(done.change, Change::Connected(_));
        let closes = match done.change {
            Change::Close(why) => Some(why),
            change => {
                self.change(change);
                None
            }
        };
        match done.reply {
            Some(Ok(reply)) if done.id > 0 => self.outbound.reply(&Reply { id: done.id, ..reply }),
            Some(Err(error)) if done.id > 0 => self.outbound.reply(&refusal(done.id, &error)),
            _ => {}
        }
        if let (true, Session::Live(live)) = (connected, &self.session) {
            // The first reply is out: what the server subscribed begins.
            for subscription in live.subscriptions.values() {
                self.outbound.joined(&subscription.topic, None, 0);
            }
        }
        if let Some(why) = closes {
            return self.close_after_replies(why);
        }
        if let (Some(why), true) = (self.closing, self.lanes.is_empty()) {
            self.outbound.close(why);
        }
        self.accept()
    }

    fn change(&mut self, change: Change) {
        match (change, &mut self.session) {
            (Change::Connected(live), Session::Connecting) => {
                self.clock.live(&self.sockets, live.expires());
                self.session = Session::Live(live);
                self.recheck_if_changed();
            }
            (Change::Refused, Session::Connecting) => self.session = Session::Refused,
            (Change::Subscribed(channel, subscription), Session::Live(live)) => {
                live.subscriptions.insert(channel, subscription);
                self.recheck_if_changed();
            }
            (Change::Unsubscribed(channel), Session::Live(live)) => {
                live.subscriptions.remove(&channel);
            }
            (Change::Refreshed(new), Session::Live(live)) => {
                let (peer, claims) = *new;
                (live.peer, live.claims) = (peer, Arc::new(claims));
                let expires = live.expires();
                self.clock.live(&self.sockets, expires);
            }
            (Change::Rechecked(rechecked), Session::Live(_)) => {
                commands::recheck::apply(self, *rechecked);
                self.rechecked(false);
            }
            (Change::RecheckLater, Session::Live(_)) => self.rechecked(true),
            // What was decided for a session that has ended since.
            (_, Session::New | Session::Connecting | Session::Live(_) | Session::Refused) => {}
        }
    }

    /// What was admitted while the documents changed is asked again.
    fn recheck_if_changed(&mut self) {
        if self.changed_since {
            self.changed_since = !self.lanes.is_empty();
            self.recheck();
        }
    }

    fn rechecked(&mut self, failed: bool) {
        let again = std::mem::replace(&mut self.recheck, Recheck::Idle) == Recheck::Again;
        if failed {
            self.clock.recheck = Some(Instant::now() + RECHECK_PAUSE);
            self.clock.arm(self.sockets.limits.connect);
        } else if again {
            self.recheck();
        }
    }

    fn recheck(&mut self) {
        self.changed_since |= !self.lanes.is_empty() || !matches!(self.session, Session::Live(_));
        if self.recheck != Recheck::Idle {
            self.recheck = Recheck::Again;
            return;
        }
        if let Session::Live(live) = &self.session {
            self.recheck = Recheck::Running;
            let job = commands::recheck::run(
                self.sockets.clone(),
                live.claims.clone(),
                live.subscriptions.values().map(|s| s.topic.clone()).collect(),
            );
            self.lanes.start(None, job);
        }
    }

    fn tick(&mut self) -> On {
        let now = Instant::now();
        if let (Some(why), true) = (self.closing, self.clock.close_by.is_some_and(|at| now >= at)) {
            return On::Close(why);
        }
        if self.clock.drain.is_some_and(|at| now >= at) {
            self.clock.drain = None;
            return self.close_after_replies(Disconnect::Shutdown);
        }
        if self.clock.recheck.is_some_and(|at| now >= at) {
            self.clock.recheck = None;
            self.recheck();
        }
        match &self.session {
            // It has said who it is: that we have no answer for it is no fault of its own.
            Session::Connecting if now >= self.clock.opened + self.sockets.limits.connect => {
                return On::Close(Disconnect::ServerError);
            }
            Session::New | Session::Connecting | Session::Refused => {
                if now >= self.clock.opened + self.sockets.limits.connect {
                    return On::Close(Disconnect::Stale);
                }
            }
            Session::Live(_) => {
                if self.clock.pong_due.is_some_and(|at| now >= at) {
                    if self.may_read() {
                        return On::Close(Disconnect::NoPong);
                    }
                    // Its answer may lie unread behind our own work; a socket that takes nothing is slow all the same.
                    if self.stalled {
                        return On::Close(Disconnect::Slow);
                    }
                    self.clock.pong_due = Some(now + self.sockets.limits.pong);
                }
                if self.clock.expires.is_some_and(|at| now >= at) {
                    return On::Close(Disconnect::Expired);
                }
                if self.clock.next_ping.is_some_and(|at| now >= at) {
                    self.outbound.reply(&Reply::default());
                    self.clock.pong_due = Some(now + self.sockets.limits.pong);
                    self.clock.next_ping = Some(now + self.sockets.limits.ping);
                }
            }
        }
        self.clock.arm(self.sockets.limits.connect);
        On::Continue
    }

    /// Takes the connection out of every topic.
    fn leave_all(&self) {
        for topic in self.outbound.end() {
            let was = self.sockets.hub.leave(&topic, self.client);
            if let (true, Session::Live(live), Topic::Conversation(_)) = (was, &self.session, &topic) {
                self.sockets.hub.announce(&topic, false, &live.info);
            }
        }
    }

    /// Takes the connection out of everything that it was part of.
    async fn end(mut self) {
        // What is under way is dropped first, so that it joins nothing more.
        self.lanes = Lanes::default();
        self.leave_all();
        if let Some((tenant, agent)) = self.present.get() {
            let node = self.sockets.desk.node();
            node.agent_disconnected(tenant, agent, self.client.to_string()).await;
        }
    }
}

impl Clock {
    fn live(&mut self, sockets: &Sockets, expires: Option<patchbay_protocol::Timestamp>) {
        let now = Instant::now();
        self.next_ping.get_or_insert(now + sockets.limits.ping);
        let wall = sockets.desk.node().shards().clock.now();
        self.expires = expires.map(|at| now + at.since(wall) + REFRESH_GRACE);
        self.arm(sockets.limits.connect);
    }

    fn arm(&mut self, connect: Duration) {
        let connect = self.next_ping.is_none().then(|| self.opened + connect);
        let all =
            [self.next_ping, self.pong_due, self.expires, self.recheck, self.drain, self.close_by, connect];
        let soon = Instant::now() + TICK_MIN;
        let next = all.into_iter().flatten().min().unwrap_or(soon).max(soon);
        self.sleep.as_mut().reset(next);
    }
}

/// An error in place of a result.
pub(super) fn refusal(id: u32, error: &CommandError) -> Reply {
    let error =
        Error { code: error.code.code(), message: error.message(), temporary: error.code.is_temporary() };
    Reply { id, error: Some(error), ..Reply::default() }
}

/// The push that ends a subscription.
pub(super) fn unsubscribe_push(channel: String, code: u32, reason: &str) -> Reply {
    let unsubscribe = patchbay_protocol::client::reply::Unsubscribe { code, reason: reason.to_owned() };
    Reply {
        push: Some(Push { channel, unsubscribe: Some(unsubscribe), ..Push::default() }),
        ..Reply::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::websocket::Socket;

    fn size<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn what_an_idle_socket_holds_is_small() {
        let (task, connection, socket) = (size(run::<Socket>), size_of::<Connection>(), size_of::<Socket>());
        assert!(
            task <= 1536,
            "{task} {connection} {socket} {} {} {}",
            size_of::<Outbound>(),
            size_of::<super::super::session::Live>(),
            size_of::<Event>()
        );
    }
}
