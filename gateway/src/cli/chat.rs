//! `patchbay chat`: a terminal client for an agent.

use clap::Args;
use futures_util::{SinkExt as _, StreamExt as _};
use patchbay_protocol::ConversationId;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::{Failure, runtime};

/// A terminal client for an agent.
#[derive(Args)]
pub(crate) struct Chat {
    /// The node.
    #[arg(long, default_value = "ws://127.0.0.1:8000/connection/websocket")]
    url: String,
    /// An agent's token.
    #[arg(long, env = "PATCHBAY_TOKEN", hide_env_values = true)]
    token: String,
    /// The conversation; without one the newest are listed.
    #[arg(long)]
    conversation: Option<ConversationId>,
}

/// A small client of our own protocol, in JSON.
pub(super) struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    id: u32,
    /// Pushes that came while a reply was waited for.
    pushes: std::collections::VecDeque<Value>,
}

impl Client {
    pub(super) async fn connect(url: &str, token: &str) -> Result<Self, Failure> {
        let (socket, _) = connect_async(url).await?;
        let mut client = Self { socket, id: 0, pushes: Default::default() };
        client.call(json!({"connect": {"token": token, "name": "patchbay"}})).await?;
        Ok(client)
    }

    /// Sends a command and waits for its result.
    pub(super) async fn call(&mut self, mut command: Value) -> Result<Value, Failure> {
        self.id += 1;
        command["id"] = json!(self.id);
        self.socket.send(Message::text(command.to_string())).await?;
        loop {
            for reply in self.read().await? {
                if reply["id"] != json!(self.id) {
                    self.pushes.push_back(reply);
                } else if reply["error"].is_object() {
                    return Err(Failure::Other(
                        reply["error"]["message"].as_str().unwrap_or("refused").to_owned(),
                    ));
                } else {
                    return Ok(reply);
                }
            }
        }
    }

    /// The next push.
    pub(super) async fn push(&mut self) -> Result<Value, Failure> {
        loop {
            if let Some(push) = self.pushes.pop_front() {
                return Ok(push);
            }
            let read = self.read().await?;
            self.pushes.extend(read);
        }
    }

    async fn read(&mut self) -> Result<Vec<Value>, Failure> {
        match self.socket.next().await {
            Some(Ok(Message::Text(text))) => {
                let replies = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
                let mut found = Vec::new();
                for reply in replies {
                    if reply.as_object().is_some_and(serde_json::Map::is_empty) {
                        self.socket.send(Message::text("{}")).await?;
                    } else {
                        found.push(reply);
                    }
                }
                Ok(found)
            }
            Some(Ok(Message::Close(frame))) => {
                let why = frame.map_or_else(String::new, |f| format!("{} {}", u16::from(f.code), f.reason));
                Err(Failure::Other(format!("the node closed the connection: {why}")))
            }
            Some(Ok(_)) => Ok(vec![]),
            Some(Err(e)) => Err(e.into()),
            None => Err(Failure::Other("the connection has ended".into())),
        }
    }

    pub(super) async fn subscribe(&mut self, channel: &str) -> Result<Value, Failure> {
        self.call(json!({"subscribe": {"channel": channel}})).await
    }

    pub(super) async fn rpc(&mut self, method: &str, data: Value) -> Result<Value, Failure> {
        Ok(self.call(json!({"rpc": {"method": method, "data": data}})).await?["rpc"]["data"].take())
    }
}

/// An entry in one line.
pub(super) fn line(entry: &Value) -> String {
    let data = &entry["data"];
    let who = format!(
        "{} {}",
        entry["actor"]["type"].as_str().unwrap_or(""),
        entry["actor"]["id"].as_str().unwrap_or("")
    );
    let what = match entry["type"].as_str().unwrap_or("") {
        "message.received" | "message.sent" => data["content"]["text"]
            .as_str()
            .map_or_else(|| format!("[{}]", data["content"]["type"].as_str().unwrap_or("")), str::to_owned),
        "message.status" => format!("#{} is {}", data["message_seq"], data["status"].as_str().unwrap_or("")),
        "note.added" => format!("(note) {}", data["text"].as_str().unwrap_or("")),
        other => other.to_owned(),
    };
    format!("#{:<4} {:<24} {what}", entry["seq"], who)
}

impl Chat {
    pub(crate) fn run(self) -> Result<(), Failure> {
        runtime()?.block_on(async {
            let mut client = Client::connect(&self.url, &self.token).await?;
            let Some(id) = self.conversation else { return list(&mut client).await };
            let channel = format!("conversation:{id}");
            client.subscribe(&channel).await?;
            let mut history =
                client.call(json!({"history": {"channel": channel, "limit": 30, "reverse": true}})).await?;
            if let Some(publications) = history["history"]["publications"].as_array_mut() {
                publications.reverse();
                publications.iter().for_each(|p| println!("{}", line(&p["data"])));
            }
            println!("-- write and press enter; Ctrl-D ends");
            talk(&mut client, id).await
        })
    }
}

async fn list(client: &mut Client) -> Result<(), Failure> {
    let found = client.rpc("conversation.list", json!({"limit": 20})).await?;
    for c in found["conversations"].as_array().into_iter().flatten() {
        let field = |name: &str| c[name].as_str().unwrap_or("").to_owned();
        println!(
            "{}  {:<9} {:<16} {}",
            field("id"),
            field("status"),
            c["contact"]["address"].as_str().unwrap_or(""),
            field("preview")
        );
    }
    Ok(())
}

async fn talk(client: &mut Client, id: ConversationId) -> Result<(), Failure> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            push = client.push() => {
                let data = &push?["push"]["pub"]["data"];
                if data["seq"].is_u64() {
                    println!("{}", line(data));
                }
            }
            typed = lines.next_line() => {
                let Some(text) = typed? else { return Ok(()) };
                if text.trim().is_empty() {
                    continue;
                }
                let client_id = format!("{:032x}", rand::random::<u128>());
                let data = json!({"conversation": id, "client_id": client_id, "content": {"type": "text", "text": text}});
                if let Err(Failure::Other(error)) = client.rpc("message.send", data).await {
                    println!("!! {error}");
                }
            }
        }
    }
}
