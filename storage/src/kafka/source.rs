//! A member of a consumer group.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_protocol::event::{Envelope, HEADERS};
use rdkafka::config::FromClientConfig as _;
use rdkafka::consumer::{Consumer as _, StreamConsumer};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::topic_partition_list::Offset;

use super::{KafkaConfig, why};
use crate::events::{Lag, Received, Source, SourceError, Start};

/// A question about a partition's end that was not answered by then has failed.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Places of effects that were had are told to the brokers this often, and when the member leaves.
const COMMIT_EVERY: Duration = Duration::from_millis(500);

/// A member of a group of readers of the topic.
pub struct KafkaSource {
    consumer: Arc<StreamConsumer>,
    topic: String,
}

fn failed(error: &rdkafka::error::KafkaError) -> SourceError {
    SourceError(why(error))
}

impl KafkaSource {
    /// Joins a group.
    pub fn join(config: &KafkaConfig, group: &str, start: Start) -> Result<Self, SourceError> {
        let reset = match start {
            Start::Earliest => "earliest",
            Start::Latest => "latest",
        };
        let mut client = config.client();
        client
            .set("group.id", group)
            .set("auto.offset.reset", reset)
            // A place is told once its effect was had, and not before.
            .set("enable.auto.offset.store", "false")
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", COMMIT_EVERY.as_millis().to_string())
            .set("session.timeout.ms", "10000")
            .set("fetch.wait.max.ms", "100")
            .set("queued.max.messages.kbytes", "16384")
            .set("partition.assignment.strategy", "cooperative-sticky");
        let consumer = StreamConsumer::from_config(&client).map_err(|e| failed(&e))?;
        consumer.subscribe(&[&config.topic]).map_err(|e| failed(&e))?;
        Ok(Self { consumer: Arc::new(consumer), topic: config.topic.clone() })
    }
}

fn received(message: &BorrowedMessage<'_>) -> Received {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    let mut headers = Vec::with_capacity(HEADERS.len());
    for header in message.headers().iter().flat_map(|h| h.iter()) {
        // Others are none of ours.
        if let Some(name) = HEADERS.into_iter().find(|name| *name == header.key) {
            headers.push((name, text(header.value)));
        }
    }
    let value = Bytes::copy_from_slice(message.payload().unwrap_or_default());
    Received {
        partition: message.partition(),
        offset: message.offset(),
        envelope: Envelope { key: text(message.key()), headers, value },
    }
}

#[async_trait]
impl Source for KafkaSource {
    async fn next(&mut self) -> Result<Received, SourceError> {
        let message = self.consumer.recv().await.map_err(|e| failed(&e))?;
        Ok(received(&message))
    }

    async fn commit(&mut self, partition: i32, offset: i64) -> Result<(), SourceError> {
        // One that was taken away meanwhile is read again by whoever has it now.
        match self.consumer.store_offset(&self.topic, partition, offset) {
            Ok(()) => Ok(()),
            Err(e) if e.rdkafka_error_code() == Some(rdkafka::error::RDKafkaErrorCode::State) => Ok(()),
            Err(e) => Err(failed(&e)),
        }
    }

    fn seek(&mut self, partition: i32, offset: i64) -> Result<(), SourceError> {
        self.consumer
            .seek(&self.topic, partition, Offset::Offset(offset), ASK_TIMEOUT)
            .map_err(|e| failed(&e))
    }

    fn pause(&mut self) -> Result<(), SourceError> {
        let assigned = self.consumer.assignment().map_err(|e| failed(&e))?;
        self.consumer.pause(&assigned).map_err(|e| failed(&e))
    }

    fn resume(&mut self) -> Result<(), SourceError> {
        let assigned = self.consumer.assignment().map_err(|e| failed(&e))?;
        self.consumer.resume(&assigned).map_err(|e| failed(&e))
    }

    async fn lag(&mut self) -> Result<Lag, SourceError> {
        let (consumer, topic) = (self.consumer.clone(), self.topic.clone());
        let asked = tokio::task::spawn_blocking(move || {
            let mut events = 0;
            let positions = consumer.position()?;
            for at in positions.elements() {
                let (low, high) = consumer.fetch_watermarks(&topic, at.partition(), ASK_TIMEOUT)?;
                let position = at.offset().to_raw().filter(|p| *p >= 0).unwrap_or(low);
                events += u64::try_from(high - position).unwrap_or_default();
            }
            Ok::<_, rdkafka::error::KafkaError>(Lag { events })
        });
        asked.await.map_err(|e| SourceError(e.to_string()))?.map_err(|e| failed(&e))
    }
}
