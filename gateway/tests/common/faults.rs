//! Load under faults, and what must hold after them: every acked webhook is in the log once, every entry is in the topic,
//! each conversation's in order.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use patchbay_consumers::Event;
use patchbay_storage::events::Source;
use tokio::task::JoinHandle;

use super::{APP_SECRET, Node, conversation, sign, text_item, webhook_body};

/// Tests that end servers have the machine to themselves, one after another.
pub static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub const NUMBER: &str = "1001";

/// Customers who write all the time; what is not acked is repeated with the same id.
pub struct Load {
    public: Arc<Mutex<String>>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
    /// Acked messages by customer.
    pub acked: Arc<Vec<AtomicU64>>,
    pub refused: Arc<AtomicUsize>,
    /// How long each acked one took.
    pub latencies: Arc<Mutex<Vec<(Instant, Duration)>>>,
}

pub fn customer(n: usize) -> String {
    format!("346{n:08}")
}

impl Load {
    pub fn start(node: &Node, customers: usize, pause: Duration) -> Self {
        let public = Arc::new(Mutex::new(node.public().to_owned()));
        let stop = Arc::new(AtomicBool::new(false));
        let acked: Arc<Vec<AtomicU64>> = Arc::new((0..customers).map(|_| AtomicU64::new(0)).collect());
        let (refused, latencies) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(64)
            .timeout(Duration::from_secs(10))
            .build()
            .unwrap();
        let writers = (0..customers)
            .map(|n| {
                let (public, stop, acked, refused) =
                    (public.clone(), stop.clone(), acked.clone(), refused.clone());
                let (latencies, http) = (latencies.clone(), http.clone());
                tokio::spawn(async move {
                    let from = customer(n);
                    while !stop.load(Ordering::Relaxed) {
                        let id = format!("{n}-{}", acked[n].load(Ordering::Relaxed));
                        let body = webhook_body(NUMBER, &[text_item(&from, &id, &id)], &[]);
                        let began = Instant::now();
                        let url = format!("http://{}/webhooks/acme/wa", public.lock().unwrap());
                        let request =
                            http.post(url).header("x-hub-signature-256", sign(APP_SECRET, &body)).body(body);
                        match request.send().await {
                            Ok(answer) if answer.status().is_success() => {
                                acked[n].fetch_add(1, Ordering::Relaxed);
                                latencies.lock().unwrap().push((began, began.elapsed()));
                            }
                            _ => {
                                refused.fetch_add(1, Ordering::Relaxed);
                                tokio::time::sleep(Duration::from_millis(50)).await;
                            }
                        }
                        tokio::time::sleep(pause).await;
                    }
                })
            })
            .collect();
        Self { public, stop, writers, acked, refused, latencies }
    }

    /// The node has come back elsewhere.
    pub fn moves_to(&self, node: &Node) {
        *self.public.lock().unwrap() = node.public().to_owned();
    }

    /// From here on through what stands before the nodes.
    pub fn goes_through(&self, address: &str) {
        address.clone_into(&mut self.public.lock().unwrap());
    }

    pub fn total(&self) -> u64 {
        self.acked.iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    /// Waits until so many more are acked, for as long as any are.
    pub async fn goes_on(&self, more: u64) {
        let wanted = self.total() + more;
        while self.total() < wanted {
            let at = self.total();
            super::until("sends are acked", async || (self.total() > at).then_some(())).await;
        }
    }

    /// How long each took that was begun since.
    pub fn latencies_since(&self, since: Instant) -> Vec<Duration> {
        let all = self.latencies.lock().unwrap();
        all.iter().filter(|(began, _)| *began >= since).map(|(_, took)| *took).collect()
    }

    pub async fn end(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            writer.await.unwrap();
        }
        self.acked.iter().map(|n| n.load(Ordering::Relaxed)).collect()
    }
}

/// Every acked message is in its log, once, and the log has no hole. Returns the tips.
pub async fn logs_are_whole(node: &Node, key: &str, acked: &[u64]) -> BTreeMap<String, u64> {
    let mut tips = BTreeMap::new();
    for (n, acked) in acked.iter().enumerate() {
        let id = conversation("acme", "wa", &customer(n));
        let entries = node.entries(key, id).await;
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (entry, seq) in entries.iter().zip(1u64..) {
            assert_eq!(entry["seq"].as_u64(), Some(seq));
            if let Some(id) = entry["data"]["provider_id"].as_str() {
                *seen.entry(id).or_default() += 1;
            }
        }
        for k in 0..*acked {
            assert_eq!(seen.get(format!("{n}-{k}").as_str()), Some(&1), "{n}-{k}: lost or doubled");
        }
        tips.insert(id.to_string(), entries.len() as u64);
    }
    tips
}

/// Reads the topic until every conversation's tip is there. Of each the first time that an event is seen nothing under it
/// is missing. Returns how many came twice.
pub async fn topic_is_whole(mut source: impl Source, tips: &BTreeMap<String, u64>) -> u64 {
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let (mut repeats, mut waiting) = (0, Instant::now());
    while tips.iter().any(|(id, tip)| seen.get(id).copied().unwrap_or(0) < *tip) {
        let next = tokio::time::timeout(Duration::from_secs(5), source.next()).await;
        let Ok(Ok(received)) = next else {
            assert!(waiting.elapsed() < Duration::from_secs(60), "nothing more comes: {seen:?} of {tips:?}");
            continue;
        };
        waiting = Instant::now();
        let event = Event::decode(&received.envelope).unwrap();
        assert_eq!(event.value["seq"], event.seq);
        let last = seen.entry(event.conversation.to_string()).or_default();
        assert!(event.seq <= *last + 1, "{}: a gap behind {last}", event.id);
        repeats += u64::from(event.seq <= *last);
        *last = event.seq.max(*last);
    }
    repeats
}

/// A figure of a node's metrics.
pub async fn metric(node: &Node, name: &str) -> f64 {
    let text = node.metrics().await;
    let line = text.lines().find(|l| l.starts_with(name) && !l.starts_with('#'));
    line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
}

pub async fn readyz(node: &Node) -> (u16, String) {
    let url = format!("http://{}/readyz", node.ready["ops"].as_str().unwrap());
    let answer = node.http.get(url).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}
