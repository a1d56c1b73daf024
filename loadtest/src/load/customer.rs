//! Customers who write: signed webhooks, each at its instant.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use serde_json::json;
use sha2::Sha256;
use tokio::sync::{Semaphore, watch};

use super::setup::{APP_SECRET, Error, NUMBER, Target, World};
use super::{Plan, Shared, Ticks, count};

/// Webhooks under way at once: past it the node cannot keep up, and the rest is late.
const UNDER_WAY_MAX: usize = 512;

/// A body with one message.
pub(super) fn body(from: &str, id: &str, text: &str) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let message =
        json!({"from": from, "id": id, "timestamp": now.to_string(), "type": "text", "text": {"body": text}});
    let value = json!({"messaging_product": "whatsapp", "metadata": {"phone_number_id": NUMBER}, "contacts": [{"wa_id": from, "profile": {"name": "L"}}], "messages": [message]});
    let body = json!({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [{"field": "messages", "value": value}]}]});
    body.to_string().into_bytes()
}

/// The header that signs a body.
pub fn signature(body: &[u8]) -> String {
    // An HMAC takes a key of any length.
    let mut mac =
        Hmac::<Sha256>::new_from_slice(APP_SECRET.as_bytes()).unwrap_or_else(|_| unreachable!("any length"));
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256={hex}")
}

pub(super) async fn post(target: &Target, tenant: &str, body: Vec<u8>) -> Result<(), Error> {
    let url = format!("http://{}/webhooks/{tenant}/wa", target.public);
    let request = target.http.post(url).header("x-hub-signature-256", signature(&body)).body(body);
    let answer = request.send().await?;
    let status = answer.status();
    // The connection is used again only when its answer was read.
    answer.bytes().await?;
    match status.as_u16() {
        200..300 => Ok(()),
        429 | 503 => Err(Error::Again),
        _ => Err(Error::Refused(format!("a webhook was answered {status}"))),
    }
}

/// Customers write until it is over.
pub(super) async fn write(
    target: Target,
    world: World,
    plan: Plan,
    shared: Shared,
    over: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
    let mut ticks = Ticks::new(plan.customer_rate);
    while !*over.borrow() {
        let (n, meant_ns) = ticks.next().await;
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (from, _) = &world.customers[usize::try_from(n).unwrap_or(0) % world.customers.len()];
        let body = body(from, &format!("{}-{n}", world.tenant), &format!("@{meant_ns}"));
        let (target, tenant, shared) = (target.clone(), world.tenant.clone(), shared.clone());
        count(&shared.counts.meant);
        tokio::spawn(async move {
            match post(&target, &tenant, body).await {
                Ok(()) => count(&shared.counts.acked),
                Err(Error::Again) => count(&shared.counts.refused),
                Err(_) => count(&shared.counts.failed),
            }
            drop(place);
        });
    }
    // What is under way ends.
    let _ = places.acquire_many(u32::try_from(UNDER_WAY_MAX).unwrap_or(u32::MAX)).await;
}
