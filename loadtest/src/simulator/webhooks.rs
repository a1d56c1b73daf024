//! Webhooks: signed, batched, repeated until they are taken, as the provider does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::sync::oneshot;

use super::faults::{happens, up_to};
use super::graph::now_ms;
use super::record::Inbound;
use super::{Customer, Number, Sim, lock};

/// Items wait this long for company.
const BATCH_PAUSE: Duration = Duration::from_millis(5);
/// The most items of one webhook.
const BATCH_MAX: usize = 50;
/// The longest pause between two tries.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long a webhook may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Items on their way, by number. A number that is there has a task that posts them.
#[derive(Default)]
pub(crate) struct Outbox(Mutex<HashMap<String, Vec<Item>>>);

enum Item {
    Message { value: Value, contact: Value, id: String },
    Status { value: Value, taken: oneshot::Sender<()> },
}

fn put(sim: &Arc<Sim>, number: &str, item: Item) {
    let mut outbox = lock(&sim.outbox.0);
    let waiting = outbox.entry(number.to_owned()).or_default();
    waiting.push(item);
    if waiting.len() == 1 {
        let (sim, number) = (sim.clone(), number.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(BATCH_PAUSE).await;
            let mut items = lock(&sim.outbox.0).remove(&number).unwrap_or_default();
            while !items.is_empty() {
                let rest = items.split_off(items.len().min(BATCH_MAX));
                let (sim, number) = (sim.clone(), number.clone());
                tokio::spawn(async move { deliver(&sim, &number, items).await });
                items = rest;
            }
        });
    }
}

/// A customer writes; returns the message's id.
pub(crate) fn customer_writes(sim: &Arc<Sim>, number: &str, customer: &Customer) -> String {
    let said = json!({"type": "text", "text": {"body": customer.text}});
    says(sim, number, customer, said)
}

/// A customer sends a file that is there; returns the message's id.
pub(crate) fn customer_sends(
    sim: &Arc<Sim>,
    number: &str,
    from: &str,
    kind: &str,
    file: &str,
    mime: &str,
) -> String {
    let customer = Customer { from: from.to_owned(), name: String::new(), text: String::new() };
    let mut said = json!({"type": kind});
    said[kind] = json!({"id": file, "mime_type": mime});
    says(sim, number, &customer, said)
}

/// A change that is about a number and no thread.
pub(crate) fn tells(sim: &Arc<Sim>, number: &str, field: &str, value: Value) {
    let change = json!({"object": "whatsapp_business_account", "entry": [{"id": "1000", "changes": [{"field": field, "value": value}]}]});
    let (sim, number) = (sim.clone(), number.to_owned());
    tokio::spawn(async move {
        let to = lock(&sim.numbers).get(&number).cloned();
        if let Some(to) = to {
            post_until_taken(&sim, &number, to, change.to_string().as_bytes()).await;
        }
    });
}

fn says(sim: &Arc<Sim>, number: &str, customer: &Customer, mut value: Value) -> String {
    let id = format!("wamid.{:032x}", rand::random::<u128>());
    value["from"] = json!(customer.from);
    value["id"] = json!(id);
    value["timestamp"] = json!((now_ms() / 1000).to_string());
    let contact = json!({"profile": {"name": customer.name}, "wa_id": customer.from});
    lock(&sim.record).inbound.push(Inbound {
        id: id.clone(),
        from: customer.from.clone(),
        text: customer.text.clone(),
        acked: false,
    });
    put(sim, number, Item::Message { value, contact, id: id.clone() });
    id
}

/// The receipts of a message that was taken: sent, delivered, read; some late, twice, or never. Each is told when the
/// one before it was taken, but for those that are to overtake.
pub(crate) fn receipts(sim: &Arc<Sim>, number: &str, wamid: &str, to: &str, callback: &str) {
    let faults = *lock(&sim.faults);
    let told = |status: &str| {
        let mut value = json!({"id": wamid, "status": status, "recipient_id": to});
        if !callback.is_empty() {
            value["biz_opaque_callback_data"] = json!(callback);
        }
        value
    };
    let mut in_order = Vec::new();
    for status in ["sent", "delivered", "read"] {
        let (missing, twice, overtakes, pause) = {
            let mut random = lock(&sim.random);
            (
                happens(&mut random, faults.missing_receipts),
                happens(&mut random, faults.duplicate_receipts),
                happens(&mut random, faults.reordered_receipts),
                up_to(&mut random, faults.receipt_delay_ms),
            )
        };
        if missing {
            continue;
        }
        for _ in 0..=usize::from(twice) {
            if overtakes {
                drop(put_status(sim, number, told(status)));
            } else {
                in_order.push((pause, told(status)));
            }
        }
    }
    let (sim, number) = (sim.clone(), number.to_owned());
    tokio::spawn(async move {
        for (pause, value) in in_order {
            tokio::time::sleep(pause).await;
            // Dropped with a number that is gone: nobody waits for the rest.
            if put_status(&sim, &number, value).await.is_err() {
                return;
            }
        }
    });
}

/// Puts a receipt among what is to be told; resolves when it was taken.
fn put_status(sim: &Arc<Sim>, number: &str, mut value: Value) -> oneshot::Receiver<()> {
    value["timestamp"] = json!((now_ms() / 1000).to_string());
    let (taken, was_taken) = oneshot::channel();
    put(sim, number, Item::Status { value, taken });
    was_taken
}

fn body(number: &str, items: &[Item]) -> Vec<u8> {
    let (mut contacts, mut messages, mut statuses) = (Vec::new(), Vec::new(), Vec::new());
    for item in items {
        match item {
            Item::Message { value, contact, .. } => {
                contacts.push(contact.clone());
                messages.push(value.clone());
            }
            Item::Status { value, .. } => statuses.push(value.clone()),
        }
    }
    let mut value = json!({"messaging_product": "whatsapp", "metadata": {"display_phone_number": "15550000000", "phone_number_id": number}});
    for (name, list) in [("contacts", contacts), ("messages", messages), ("statuses", statuses)] {
        if !list.is_empty() {
            value[name] = json!(list);
        }
    }
    json!({"object": "whatsapp_business_account", "entry": [{"id": "1000", "changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

fn sign(secret: &str, body: &[u8]) -> String {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else { return String::new() };
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256={hex}")
}

async fn deliver(sim: &Arc<Sim>, number: &str, items: Vec<Item>) {
    let Some(to) = lock(&sim.numbers).get(number).cloned() else { return };
    let body = body(number, &items);
    let repeats = {
        let faults = *lock(&sim.faults);
        happens(&mut lock(&sim.random), faults.repeated_webhooks)
    };
    lock(&sim.record).webhooks_open += 1;
    post_until_taken(sim, number, to, &body).await;
    {
        let mut record = lock(&sim.record);
        record.webhooks_open -= 1;
        for item in items {
            match item {
                Item::Message { id, .. } => {
                    if let Some(inbound) = record.inbound.iter_mut().rev().find(|i| i.id == id) {
                        inbound.acked = true;
                    }
                }
                Item::Status { value, taken } => {
                    let said = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
                    record.receipts.push((said("id"), said("status")));
                    // Nobody waits for one that overtakes.
                    let _ = taken.send(());
                }
            }
        }
    }
    let again = if repeats { lock(&sim.numbers).get(number).cloned() } else { None };
    if let Some(to) = again {
        post(&sim.client, &to, &body).await;
    }
}

async fn post_until_taken(sim: &Arc<Sim>, number: &str, mut to: Number, body: &[u8]) {
    let mut pause = Duration::from_millis(50);
    while lock(&sim.pace).is_down() {
        tokio::time::sleep(pause).await;
    }
    while !post(&sim.client, &to, body).await {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
        // The business may have moved meanwhile.
        if let Some(now) = lock(&sim.numbers).get(number).cloned() {
            to = now;
        }
    }
}

async fn post(client: &reqwest::Client, to: &Number, body: &[u8]) -> bool {
    let request = client
        .post(&to.webhook_url)
        .header("content-type", "application/json")
        .header("x-hub-signature-256", sign(&to.app_secret, body))
        .timeout(TIMEOUT)
        .body(body.to_vec());
    matches!(request.send().await, Ok(answer) if answer.status().is_success())
}
