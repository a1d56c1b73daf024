//! What a newcomer sees: one conversation, hop by hop, with the latency of each; then what to try next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use patchbay_loadtest::simulator::{Customer, Simulator};
use patchbay_protocol::ConversationId;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Failure;
use super::chat::{Client, line};
use super::dev::{Demo, PHONE_NUMBER_ID};
use crate::server::Server;

const CUSTOMER: &str = "34600000001";

/// What runs where, and what to try.
pub(super) fn introduce(server: &Server, simulator: &Simulator, demo: &Demo) {
    let (public, ops, sim) = (server.public, server.ops, simulator.address());
    let Demo { tenant, inbox, account, agent, key, token } = demo;
    println!(
        "patchbay is ready.

  clients    ws://{public}/connection/websocket
  webhooks   http://{public}/webhooks/{tenant}/{account}
  admin API  http://{public}/api/v1   (http://{public}/api/v1/openapi.json)
  metrics    http://{ops}/metrics
  simulator  http://{sim}/sim/record

  tenant {tenant}, inbox {inbox}, account {account} (whatsapp), agent {agent}
  API key      {key}
  agent token  {token}

Try:
  curl -s http://{public}/api/v1/conversations -H 'Authorization: Bearer {key}'
  curl -s http://{sim}/sim/numbers/{PHONE_NUMBER_ID}/customers -H 'content-type: application/json' -d '{{\"from\":\"34600111222\",\"name\":\"Luz\",\"text\":\"hola\"}}'
  patchbay chat --url ws://{public}/connection/websocket --token {token}
"
    );
}

/// Plays the demo conversation through every hop.
pub(super) async fn play(public: SocketAddr, simulator: Arc<Simulator>, demo: Demo) {
    if let Err(Failure::Other(error)) = transcript(public, &simulator, &demo).await {
        println!("the demo conversation ended early: {error}");
    }
}

async fn transcript(public: SocketAddr, simulator: &Simulator, demo: &Demo) -> Result<(), Failure> {
    let id = ConversationId::derive(&demo.tenant, &demo.account, CUSTOMER);
    let mut anna = Client::connect(&format!("ws://{public}/connection/websocket"), &demo.token).await?;
    println!("A customer writes on WhatsApp (simulated), Anna answers on her socket:\n");
    anna.subscribe(&format!("inbox:{}", demo.inbox)).await?;
    let wrote = Instant::now();
    simulator.customer_writes(
        PHONE_NUMBER_ID,
        &Customer { from: CUSTOMER.into(), name: "Luz".into(), text: "Hola, is my order on its way?".into() },
    );
    wait(&mut anna, |push| push["push"]["pub"]["data"]["conversation"]["id"] == json!(id.to_string()))
        .await?;
    hop("customer -> webhook -> log -> inbox of the agent", wrote);
    let subscribed = anna.subscribe(&format!("conversation:{id}")).await?;
    let history = anna
        .call(json!({"history": {"channel": format!("conversation:{id}"), "limit": 2, "reverse": true}}))
        .await?;
    for publication in history["history"]["publications"].as_array().into_iter().flatten().rev() {
        println!("   {}", line(&publication["data"]));
    }
    let tip = subscribed["subscribe"]["offset"].as_u64().unwrap_or(0);
    let sent = Instant::now();
    let client_id = format!("demo-{tip}");
    let message = json!({"conversation": id, "client_id": client_id, "content": {"type": "text", "text": "It left this morning. It arrives tomorrow."}});
    let reply = anna.rpc("message.send", message).await?;
    hop("agent -> log, durable", sent);
    for status in ["sent", "delivered", "read"] {
        let entry = wait(&mut anna, |push| {
            let data = &push["push"]["pub"]["data"];
            data["type"] == "message.status"
                && data["data"]["message_seq"] == reply["seq"]
                && data["data"]["status"] == status
        })
        .await?;
        println!("   {}", line(&entry["push"]["pub"]["data"]));
        hop(&format!("log -> provider -> receipt `{status}` -> socket"), sent);
    }
    println!("\nThe conversation is {id}. Ctrl-C stops the node.");
    Ok(())
}

async fn wait(client: &mut Client, wanted: impl Fn(&Value) -> bool) -> Result<Value, Failure> {
    let found = async {
        loop {
            let push = client.push().await?;
            if wanted(&push) {
                return Ok(push);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found)
        .await
        .unwrap_or_else(|_| Err(Failure::Other("nothing came for 20 s".into())))
}

fn hop(what: &str, since: Instant) {
    println!("   {:>8.1} ms  {what}", since.elapsed().as_secs_f64() * 1000.0);
}
