//! Events on Kafka: an idempotent producer that never gives up by itself, and members of consumer groups.
//!
//! A timeout of a message would let a later one pass it (one expires, two is delivered, one comes again), so there is
//! none; what is under way is bounded by whoever sends. Order is kept by the key, so the number of partitions is
//! fixed: a topic with another number than configured is refused, and changed by a replay into a new one.

mod source;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use patchbay_protocol::event::Event;
use patchbay_protocol::ids::ConversationId;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer};

use crate::events::{Deliveries, Delivery, Fault, SendError, Sink};
pub use source::KafkaSource;

/// A broker that has not answered a question about its topics by then is waited for.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that the client queues; far more than are ever under way.
const QUEUE_MESSAGES_MAX: u32 = 100_000;

/// How brokers are reached, and which topic holds the events.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// Addresses of some brokers, separated by commas.
    pub brokers: String,
    /// The topic.
    pub topic: String,
    /// Its partitions: as many for ever.
    pub partitions: i32,
    /// Copies of each partition of a topic that is to be made; none: the brokers' default.
    pub replication: Option<i32>,
    /// How long to gather before sending.
    pub linger: Duration,
    /// More settings of the client, by its own names (`security.protocol`, `sasl.username` …).
    pub settings: Vec<(String, String)>,
}

impl KafkaConfig {
    /// A topic with the defaults of everything else.
    pub fn new(brokers: &str, topic: &str) -> Self {
        Self {
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
            partitions: 12,
            replication: None,
            linger: Duration::from_millis(5),
            settings: Vec::new(),
        }
    }

    /// What is wrong with the settings, if anything.
    pub fn fault(&self) -> Option<String> {
        self.producer().create_native_config().err().map(|e| e.to_string())
    }

    fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "patchbay")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.keepalive.enable", "true");
        for (name, value) in &self.settings {
            client.set(name, value);
        }
        client
    }

    /// The producer that keeps order whatever happens.
    pub fn producer(&self) -> ClientConfig {
        let mut client = self.client();
        client
            .set("enable.idempotence", "true")
            // Without it a batch that is refused for ever lets the next one pass: a gap.
            .set("enable.gapless.guarantee", "true")
            .set("message.timeout.ms", "0")
            .set("request.timeout.ms", "5000")
            .set("socket.timeout.ms", "10000")
            .set("partitioner", "murmur2_random")
            .set("linger.ms", self.linger.as_millis().to_string())
            .set("queue.buffering.max.messages", QUEUE_MESSAGES_MAX.to_string());
        client
    }
}

/// Why brokers do not take what they were asked, in their words.
fn why(error: &KafkaError) -> String {
    error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| code.to_string())
}

/// Tells deliveries.
struct Told {
    deliveries: Deliveries,
    generation: u32,
}

impl ClientContext for Told {
    fn error(&self, error: KafkaError, _: &str) {
        tracing::debug!(why = why(&error), "kafka");
    }
}

/// Which event it was.
type Opaque = Box<(ConversationId, u64)>;

impl ProducerContext for Told {
    type DeliveryOpaque = Opaque;

    fn delivery(&self, result: &DeliveryResult<'_>, event: Opaque) {
        let (conversation, seq) = *event;
        let outcome = match result {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(fault(error)),
        };
        // Whoever sent it has gone with the node.
        let _ = self.deliveries.blocking_send(Delivery {
            conversation,
            seq,
            generation: self.generation,
            outcome,
        });
    }
}

/// Whose fault a refusal is.
fn fault(error: &KafkaError) -> Fault {
    match error.rdkafka_error_code() {
        Some(
            RDKafkaErrorCode::MessageSizeTooLarge
            | RDKafkaErrorCode::InvalidMessage
            | RDKafkaErrorCode::InvalidMessageSize
            | RDKafkaErrorCode::InvalidRecord
            | RDKafkaErrorCode::InvalidTimestamp
            | RDKafkaErrorCode::PolicyViolation,
        ) => Fault::Event(why(error)),
        _ => Fault::Passing(why(error)),
    }
}

type Producer = ThreadedProducer<Told>;
type Admin = AdminClient<DefaultClientContext>;

/// Publishes to a topic.
pub struct KafkaSink {
    config: KafkaConfig,
    deliveries: Deliveries,
    producer: Mutex<Option<Producer>>,
}

impl KafkaSink {
    /// Publishes to a topic; [`Sink::open`] connects.
    pub fn new(config: KafkaConfig, deliveries: Deliveries) -> Self {
        Self { config, deliveries, producer: Mutex::default() }
    }

    fn producer(&self) -> std::sync::MutexGuard<'_, Option<Producer>> {
        self.producer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the topic if it is not there; refuses one with another number of partitions.
pub async fn ensure_topic(config: &KafkaConfig) -> Result<(), String> {
    let admin: Arc<Admin> = Arc::new(config.client().create().map_err(|e| why(&e))?);
    for made in [false, true] {
        let found = partitions(&admin, &config.topic).await?;
        match found {
            Some(n) if n == config.partitions => return Ok(()),
            Some(n) => {
                return Err(format!(
                    "topic {} has {n} partitions, the configuration says {}: replay into a new topic instead",
                    config.topic, config.partitions
                ));
            }
            None if made => break,
            None => {}
        }
        let copies = TopicReplication::Fixed(config.replication.unwrap_or(-1));
        let topic = NewTopic::new(&config.topic, config.partitions, copies);
        let options =
            AdminOptions::new().request_timeout(Some(ASK_TIMEOUT)).operation_timeout(Some(ASK_TIMEOUT));
        let answers = admin.create_topics([&topic], &options).await.map_err(|e| why(&e))?;
        for answer in answers {
            match answer {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(format!("topic {topic} cannot be made: {code}")),
            }
        }
    }
    Err(format!("topic {} is not there yet", config.topic))
}

/// The partitions of a topic; none: it is not there.
async fn partitions(admin: &Arc<Admin>, topic: &str) -> Result<Option<i32>, String> {
    let (admin, topic) = (admin.clone(), topic.to_owned());
    let asked = tokio::task::spawn_blocking(move || {
        // The metadata of all topics: asking for one that is not there would make brokers make it.
        let metadata = admin.inner().fetch_metadata(None, ASK_TIMEOUT)?;
        let found = metadata.topics().iter().find(|t| t.name() == topic && !t.partitions().is_empty());
        Ok(found.map(|t| t.partitions().len() as i32))
    });
    asked.await.map_err(|e| e.to_string())?.map_err(|e: KafkaError| why(&e))
}

#[async_trait]
impl Sink for KafkaSink {
    async fn open(&self, generation: u32) -> Result<(), String> {
        // What was under way is purged with its producer.
        let old = self.producer().take();
        let _ = tokio::task::spawn_blocking(move || drop(old)).await;
        ensure_topic(&self.config).await?;
        let told = Told { deliveries: self.deliveries.clone(), generation };
        let producer =
            Producer::from_config_and_context(&self.config.producer(), told).map_err(|e| why(&e))?;
        let topic = self.config.topic.clone();
        let warmed = tokio::task::spawn_blocking(move || {
            // Connections, and with them the producer's identity, before the first event waits for them.
            let known = producer.client().fetch_metadata(Some(&topic), ASK_TIMEOUT);
            known.map(|_| producer).map_err(|e| why(&e))
        });
        *self.producer() = Some(warmed.await.map_err(|e| e.to_string())??);
        Ok(())
    }

    fn send(&self, event: &Event) -> Result<(), SendError> {
        let producer = self.producer();
        let Some(producer) = producer.as_ref() else {
            return Err(SendError::Fault(Fault::Passing("no connection".into())));
        };
        let Some(envelope) = event.envelope() else {
            return Err(SendError::Fault(Fault::Event("it is no entry".into())));
        };
        let mut headers = OwnedHeaders::new_with_capacity(envelope.headers.len());
        for (key, value) in &envelope.headers {
            headers = headers.insert(Header { key, value: Some(value.as_str()) });
        }
        let opaque = Box::new((event.origin.conversation, event.seq));
        let record = BaseRecord::with_opaque_to(&self.config.topic, opaque)
            .key(envelope.key.as_str())
            .payload(&envelope.value[..])
            .headers(headers);
        match producer.send(record) {
            Ok(()) => Ok(()),
            Err((error, _)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                Err(SendError::Full)
            }
            Err((error, _)) => Err(SendError::Fault(fault(&error))),
        }
    }
}
