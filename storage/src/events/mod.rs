//! Where events go, and where they are read: [`Sink`] and [`Source`], each on Kafka ([`crate::kafka`]) and on log
//! files of the node's own ([`embedded`]).

pub mod embedded;

use async_trait::async_trait;
use patchbay_protocol::event::{Envelope, Event};
use patchbay_protocol::ids::ConversationId;
use tokio::sync::mpsc;

/// Why an event is not in the topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is never taken: why. Others are.
    Event(String),
    /// Nothing is taken now: why.
    Passing(String),
}

/// What became of an event that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Of which conversation.
    pub conversation: ConversationId,
    /// Its place there.
    pub seq: u64,
    /// What the sink was opened as when it was sent.
    pub generation: u32,
    /// Durable, or not there.
    pub outcome: Result<(), Fault>,
}

/// Why an event was not taken for sending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendError {
    /// There is too much under way; try again when something was delivered.
    Full,
    /// As [`Fault`], said at once.
    Fault(Fault),
}

/// Deliveries that are told and not heard. What is under way is bounded by whoever sends, so that these are enough also
/// when all of it is given up and sent again; past it the sink waits.
pub const DELIVERIES_MAX: usize = 65_536;

/// Where deliveries are told.
pub type Deliveries = mpsc::Sender<Delivery>;
/// Where they are heard.
pub type Delivered = mpsc::Receiver<Delivery>;

/// Both ends.
pub fn deliveries() -> (Deliveries, Delivered) {
    mpsc::channel(DELIVERIES_MAX)
}

/// Takes events, keeps their order by conversation, and makes them durable.
///
/// Guarantee: of one conversation nothing that was sent later is in the topic while something sent earlier, since the
/// last [`Sink::open`], is not.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// Makes ready, or ready again after a failure: what was under way is given up, and its deliveries are of an older
    /// generation. An error says who is waited for.
    async fn open(&self, generation: u32) -> Result<(), String>;

    /// Sends an event. Never waits.
    fn send(&self, event: &Event) -> Result<(), SendError>;
}

/// An event as it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Which part of the topic.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// The event.
    pub envelope: Envelope,
}

/// A read or a commit that was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// Where a group without a place begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first event that is kept.
    Earliest,
    /// Behind the last.
    Latest,
}

/// How far a reader is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Events that it has not read yet.
    pub events: u64,
}

/// A member of a group of readers: together they get every event at least once, each partition in order.
#[async_trait]
pub trait Source: Send + 'static {
    /// The next event; waits for one. Cancel-safe.
    async fn next(&mut self) -> Result<Received, SourceError>;

    /// Everything of a partition up to and including `offset` has had its effect: the group goes on behind it.
    async fn commit(&mut self, partition: i32, offset: i64) -> Result<(), SourceError>;

    /// Reads a partition again from `offset` on.
    fn seek(&mut self, partition: i32, offset: i64) -> Result<(), SourceError>;

    /// Brings no more of anything until [`Self::resume`]; the group's place is kept.
    fn pause(&mut self) -> Result<(), SourceError>;

    /// Brings events again.
    fn resume(&mut self) -> Result<(), SourceError>;

    /// How far behind it is.
    async fn lag(&mut self) -> Result<Lag, SourceError>;
}

#[async_trait]
impl Source for Box<dyn Source> {
    async fn next(&mut self) -> Result<Received, SourceError> {
        (**self).next().await
    }

    async fn commit(&mut self, partition: i32, offset: i64) -> Result<(), SourceError> {
        (**self).commit(partition, offset).await
    }

    fn seek(&mut self, partition: i32, offset: i64) -> Result<(), SourceError> {
        (**self).seek(partition, offset)
    }

    fn pause(&mut self) -> Result<(), SourceError> {
        (**self).pause()
    }

    fn resume(&mut self) -> Result<(), SourceError> {
        (**self).resume()
    }

    async fn lag(&mut self) -> Result<Lag, SourceError> {
        (**self).lag().await
    }
}
