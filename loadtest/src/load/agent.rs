//! One agent's socket, in JSON or Protobuf: subscribed to its share of the conversations, checks every seq, writes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use patchbay_protocol::ConversationId;
use patchbay_protocol::client::request::{ConnectRequest, HistoryRequest, RpcRequest, SubscribeRequest};
use patchbay_protocol::client::{Command, Encoding, Reply, json, protobuf};
use serde_json::json as value;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::setup::{Error, Target, World, encoding};
use super::{Plan, Shared, Ticks, count, now_ns};

/// A socket that speaks our protocol.
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    encoding: Encoding,
    id: u32,
}

fn broken(e: tokio_tungstenite::tungstenite::Error) -> Error {
    Error::Socket(Box::new(e))
}

impl Client {
    /// Opens a socket and connects.
    pub async fn connect(public: &str, token: &str, encoding: Encoding) -> Result<Self, Error> {
        let url = format!("ws://{public}/connection/websocket");
        let mut request = url.into_client_request().map_err(broken)?;
        if encoding == Encoding::Protobuf {
            let protocol = HeaderValue::from_static("centrifuge-protobuf");
            request.headers_mut().insert("sec-websocket-protocol", protocol);
        }
        let (socket, _) = connect_async(request).await.map_err(broken)?;
        let mut client = Self { socket, encoding, id: 0 };
        let connect = ConnectRequest { token: token.to_owned(), ..ConnectRequest::default() };
        client.call(Command { connect: Some(Box::new(connect)), ..Command::default() }).await?;
        Ok(client)
    }

    /// Queues a command without sending it yet; its id.
    pub async fn feed(&mut self, command: Command) -> Result<u32, Error> {
        self.id += 1;
        let command = Command { id: self.id, ..command };
        let message = self.message(&command);
        self.socket.feed(message).await.map_err(broken)?;
        Ok(self.id)
    }

    fn message(&self, command: &Command) -> Message {
        match self.encoding {
            Encoding::Json => {
                let text = json::encode_command(command).unwrap_or_default();
                Message::Text(text.try_into().unwrap_or_default())
            }
            Encoding::Protobuf => Message::Binary(protobuf::encode_command(command)),
        }
    }

    /// Sends what is queued.
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.socket.flush().await.map_err(broken)
    }

    /// The next replies and pushes; pings are answered.
    pub async fn read(&mut self) -> Result<Vec<Reply>, Error> {
        let frame = match self.socket.next().await {
            Some(Ok(Message::Text(text))) => Bytes::from(text),
            Some(Ok(Message::Binary(data))) => data,
            Some(Ok(Message::Close(frame))) => {
                return Err(Error::Refused(format!("the node closed a socket: {frame:?}")));
            }
            Some(Ok(_)) => return Ok(vec![]),
            Some(Err(e)) => return Err(broken(e)),
            None => return Err(Error::Refused("a socket has ended".into())),
        };
        let decoded = match self.encoding {
            Encoding::Json => json::decode_replies(&frame),
            Encoding::Protobuf => protobuf::decode_replies(&frame),
        };
        let mut replies = decoded.map_err(|e| Error::Refused(e.to_string()))?;
        if replies.iter().any(|r| *r == Reply::default()) {
            replies.retain(|r| *r != Reply::default());
            let pong = self.message(&Command::default());
            self.socket.send(pong).await.map_err(broken)?;
        }
        Ok(replies)
    }

    /// Sends a command and waits for its reply; what is pushed meanwhile is dropped.
    pub async fn call(&mut self, command: Command) -> Result<Reply, Error> {
        let id = self.feed(command).await?;
        self.flush().await?;
        loop {
            for reply in self.read().await? {
                if reply.id == id {
                    return match &reply.error {
                        Some(error) => Err(Error::Refused(error.message.clone())),
                        None => Ok(reply),
                    };
                }
            }
        }
    }

    /// Subscribes to a conversation; its tip.
    pub async fn subscribe(&mut self, id: ConversationId) -> Result<u64, Error> {
        let subscribe =
            SubscribeRequest { channel: format!("conversation:{id}"), ..SubscribeRequest::default() };
        let reply = self.call(Command { subscribe: Some(Box::new(subscribe)), ..Command::default() }).await?;
        Ok(reply.subscribe.map_or(0, |s| s.offset))
    }
}

/// A send, as a command.
pub fn send(id: ConversationId, client_id: &str, text: &str) -> Command {
    let data =
        value!({"conversation": id, "client_id": client_id, "content": {"type": "text", "text": text}});
    let rpc = RpcRequest { method: "message.send".into(), data: Bytes::from(data.to_string()) };
    Command { rpc: Some(Box::new(rpc)), ..Command::default() }
}

struct Watched {
    last: u64,
}

/// A running agent.
pub(super) struct Agent {
    task: JoinHandle<()>,
    shared: Shared,
}

impl Agent {
    pub(super) async fn start(
        target: &Target,
        world: &World,
        plan: &Plan,
        n: usize,
        shared: Shared,
        over: watch::Receiver<bool>,
    ) -> Result<Self, Error> {
        let mut client = Client::connect(&target.public, &world.tokens[n], encoding(plan, n)).await?;
        let own = |i: &usize| i % plan.agents == n;
        let visitors: Vec<ConversationId> =
            world.visitors.iter().enumerate().filter(|(i, _)| own(i)).map(|(_, id)| *id).collect();
        let customers = world.customers.iter().enumerate().filter(|(i, _)| own(i)).map(|(_, (_, id))| *id);
        let mut watched = HashMap::new();
        for id in visitors.iter().copied().chain(customers) {
            let last = client.subscribe(id).await?;
            watched.insert(format!("conversation:{id}"), Watched { last });
        }
        let after = shared.clone();
        let mut running = Running {
            client,
            watched,
            visitors,
            waiting: HashMap::new(),
            sent: 0,
            shared,
            rate: plan.agent_rate / plan.agents as f64,
            in_flight: plan.in_flight,
            own: format!("{}-{n}", world.tenant),
        };
        let task = tokio::spawn(async move {
            if let Err(error) = running.run(over).await {
                // What it would have seen nobody has checked: that is never clean.
                let unanswered = running.waiting.len().max(1) as u64;
                running.shared.counts.failed.fetch_add(unanswered, Ordering::Relaxed);
                tracing::warn!(%error, agent = n, "an agent's socket ended");
            }
        });
        Ok(Self { task, shared: after })
    }

    pub(super) async fn finish(mut self, patience: Duration) {
        match tokio::time::timeout(patience, &mut self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => count(&self.shared.counts.failed),
            Err(_) => {
                self.task.abort();
                count(&self.shared.counts.failed);
            }
        }
    }
}

struct Running {
    client: Client,
    watched: HashMap<String, Watched>,
    visitors: Vec<ConversationId>,
    /// Sends that are not answered: which conversation, and when they were meant.
    waiting: HashMap<u32, (usize, u64)>,
    sent: u64,
    shared: Shared,
    rate: f64,
    in_flight: usize,
    own: String,
}

impl Running {
    async fn run(&mut self, mut over: watch::Receiver<bool>) -> Result<(), Error> {
        for at in 0..self.visitors.len() {
            for _ in 0..self.in_flight {
                self.write(at, now_ns()).await?;
            }
        }
        self.client.flush().await?;
        let open = self.in_flight == 0 && self.rate > 0.0 && !self.visitors.is_empty();
        let mut ticks = Ticks::new(if open { self.rate } else { 1.0 });
        while !*over.borrow() {
            tokio::select! {
                replies = self.client.read() => self.see(replies?, true).await?,
                (n, meant) = ticks.next(), if open => {
                    self.write(usize::try_from(n).unwrap_or(0) % self.visitors.len(), meant).await?;
                    self.client.flush().await?;
                }
                _ = over.changed() => {}
            }
        }
        // What is under way is answered, and then the tips are compared with what was seen.
        while !self.waiting.is_empty() {
            let replies = self.client.read().await?;
            self.see(replies, false).await?;
        }
        self.compare().await
    }

    async fn write(&mut self, at: usize, meant: u64) -> Result<(), Error> {
        self.sent += 1;
        count(&self.shared.counts.meant);
        let text = format!("a message of an ordinary length, number {}", self.sent);
        let command = send(self.visitors[at], &format!("{}-{}", self.own, self.sent), &text);
        let id = self.client.feed(command).await?;
        self.waiting.insert(id, (at, meant));
        Ok(())
    }

    async fn see(&mut self, replies: Vec<Reply>, again: bool) -> Result<(), Error> {
        let now = now_ns();
        let mut next = Vec::new();
        for reply in replies {
            if let Some((at, meant)) = self.waiting.remove(&reply.id) {
                match &reply.error {
                    None => {
                        count(&self.shared.counts.acked);
                        self.shared.sends.note(Duration::from_nanos(now.saturating_sub(meant)));
                    }
                    Some(error) if error.temporary => count(&self.shared.counts.refused),
                    Some(_) => count(&self.shared.counts.failed),
                }
                if self.in_flight > 0 && again {
                    next.push(at);
                }
            }
            if let Some(push) = reply.push
                && let Some(publication) = push.publication
                && publication.offset > 0
            {
                self.entry(&push.channel, publication.offset, &publication.data, now);
            }
        }
        for at in &next {
            self.write(*at, now_ns()).await?;
        }
        if !next.is_empty() {
            self.client.flush().await?;
        }
        Ok(())
    }

    fn entry(&mut self, channel: &str, offset: u64, data: &[u8], now: u64) {
        let Some(watched) = self.watched.get_mut(channel) else { return };
        let counts = &self.shared.counts;
        count(&counts.seen);
        if offset == watched.last + 1 {
            watched.last = offset;
        } else if offset == watched.last {
            count(&counts.doubled);
        } else if offset < watched.last {
            count(&counts.reordered);
        } else {
            counts.lost.fetch_add(offset - watched.last - 1, Ordering::Relaxed);
            watched.last = offset;
        }
        if let Some(meant) = meant_of(data) {
            self.shared.arrivals.note(Duration::from_nanos(now.saturating_sub(meant)));
        }
    }

    /// Whatever stands in the logs must have been seen.
    async fn compare(&mut self) -> Result<(), Error> {
        let until = Instant::now() + Duration::from_secs(5);
        let channels: Vec<String> = self.watched.keys().cloned().collect();
        for channel in channels {
            let history = HistoryRequest { channel: channel.clone(), ..HistoryRequest::default() };
            let id =
                self.client.feed(Command { history: Some(Box::new(history)), ..Command::default() }).await?;
            self.client.flush().await?;
            let mut tip = None;
            while tip.is_none() {
                let replies = self.client.read().await?;
                if let Some(reply) = replies.iter().find(|r| r.id == id) {
                    let known = reply.history.as_ref().map(|h| h.offset);
                    tip = Some(known.ok_or_else(|| Error::Refused(format!("no history of {channel}")))?);
                }
                self.see(replies, false).await?;
            }
            let tip = tip.unwrap_or(0);
            while self.watched.get(&channel).is_some_and(|w| w.last < tip) && Instant::now() < until {
                match tokio::time::timeout_at(until, self.client.read()).await {
                    Ok(replies) => self.see(replies?, false).await?,
                    Err(_) => break,
                }
            }
            let last = self.watched.get(&channel).map_or(tip, |w| w.last);
            self.shared.counts.lost.fetch_add(tip.saturating_sub(last), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// When a customer's message was meant, by its text.
fn meant_of(data: &[u8]) -> Option<u64> {
    let at = data.windows(10).position(|w| w == b"\"text\":\"@1".as_slice())? + 9;
    let digits = data[at..].iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&data[at..at + digits]).ok()?.parse().ok()
}
