//! The loop around a handler.

use std::time::Duration;

use async_trait::async_trait;
use patchbay_storage::events::{Lag, Received, Source, SourceError};
use tokio::sync::watch;

use crate::Event;
use crate::dead_letters::DeadLetters;
use crate::sequence::{CONVERSATIONS_MAX, Place, Sequences};

/// Lag is measured this often.
const LAG_LOOK: Duration = Duration::from_secs(5);
/// Between two tries of a source that does not answer.
const SOURCE_PAUSE: Duration = Duration::from_millis(500);

/// Why an event had no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It may have one later: why.
    Again(String),
    /// It never will: why.
    Never(String),
}

/// What is done about events.
#[async_trait]
pub trait Handler: Send + 'static {
    /// Has the event's effect. Called again for the same event after [`Failure::Again`], and after a crash.
    async fn handle(&mut self, event: &Event) -> Result<(), Failure>;

    /// So many events of its conversation are missing before `event`. They are reported, not waited for.
    async fn gap(&mut self, _event: &Event, _missing: u64) {}
}

/// How a consumer goes about it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The group's name, in metrics and logs.
    pub group: String,
    /// Tries of one event; past them it goes to the dead letters. All together they must take less than the brokers wait
    /// for a member (five minutes).
    pub tries: u32,
    /// The pause behind the first try; it doubles up to `pause_max`, with jitter.
    pub pause: Duration,
    /// The longest pause.
    pub pause_max: Duration,
}

impl Options {
    /// Eight tries within about a minute.
    pub fn new(group: &str) -> Self {
        let (pause, pause_max) = (Duration::from_millis(100), Duration::from_secs(20));
        Self { group: group.to_owned(), tries: 8, pause, pause_max }
    }
}

/// Whether a consumer is to go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Run {
    /// Events are handled.
    #[default]
    On,
    /// Nothing is handled; the group's place is kept.
    Paused,
    /// It ends, behind the event that is being handled.
    Stop,
}

/// A member of a group with a handler.
pub struct Consumer<S, H, D> {
    source: S,
    handler: H,
    dead: D,
    options: Options,
    seen: Sequences,
}

impl<S: Source, H: Handler, D: DeadLetters> Consumer<S, H, D> {
    /// Reads `source` for `handler`; what cannot be handled goes to `dead`.
    pub fn new(source: S, handler: H, dead: D, options: Options) -> Self {
        Self { source, handler, dead, options, seen: Sequences::new(CONVERSATIONS_MAX) }
    }

    fn count(&self, name: &'static str, n: u64) {
        metrics::counter!(name, "group" => self.options.group.clone()).increment(n);
    }

    /// Runs until it is told to stop, or until dead letters cannot be kept.
    pub async fn run(mut self, mut told: watch::Receiver<Run>) -> Result<H, std::io::Error> {
        let mut looks = tokio::time::interval(LAG_LOOK);
        let mut paused = false;
        loop {
            let run = *told.borrow_and_update();
            match run {
                Run::Stop => return Ok(self.handler),
                Run::Paused if !paused => paused = self.source.pause().is_ok(),
                Run::On if paused => paused = self.source.resume().is_err(),
                Run::On | Run::Paused => {}
            }
            tokio::select! {
                changed = told.changed() => {
                    if changed.is_err() {
                        return Ok(self.handler);
                    }
                }
                _ = looks.tick() => self.tell_lag().await,
                next = self.source.next() => match next {
                    // What was on its way when the pause came.
                    Ok(received) if paused => {
                        let _ = self.source.seek(received.partition, received.offset);
                    }
                    Ok(received) => self.take(received, &mut told).await?,
                    Err(SourceError(why)) => {
                        tracing::warn!(group = self.options.group, why, "events cannot be read");
                        self.count("patchbay_consumer_source_errors_total", 1);
                        tokio::time::sleep(SOURCE_PAUSE).await;
                    }
                },
            }
        }
    }

    async fn tell_lag(&mut self) {
        if let Ok(Lag { events }) = self.source.lag().await {
            metrics::gauge!("patchbay_consumer_lag_events", "group" => self.options.group.clone())
                .set(events as f64);
        }
    }

    async fn take(&mut self, received: Received, told: &mut watch::Receiver<Run>) -> std::io::Result<()> {
        let event = match Event::decode(&received.envelope) {
            Ok(event) => event,
            Err(e) => {
                self.bury(&received, &e.to_string()).await?;
                return Ok(());
            }
        };
        match self.seen.place(&event.tenant, event.conversation, event.seq) {
            Place::Next => {}
            Place::Repeat => {
                self.count("patchbay_consumer_repeats_total", 1);
                self.commit(&received).await;
                return Ok(());
            }
            Place::Gap(missing) => {
                tracing::warn!(event = event.id, missing, "events are missing before this one");
                self.count("patchbay_consumer_gaps_total", 1);
                self.handler.gap(&event, missing).await;
            }
        }
        match self.try_it(&event, told).await {
            Some(Ok(())) => {
                self.count("patchbay_consumer_events_total", 1);
                self.commit(&received).await;
            }
            Some(Err(why)) => self.bury(&received, &why).await?,
            // Whoever takes over begins with it.
            None => return Ok(()),
        }
        self.seen.note(&event.tenant, event.conversation, event.seq);
        Ok(())
    }

    /// Tries until there is an outcome. None: it was told to stop.
    async fn try_it(&mut self, event: &Event, told: &mut watch::Receiver<Run>) -> Option<Result<(), String>> {
        let mut pause = self.options.pause;
        for n in 1.. {
            let why = match self.handler.handle(event).await {
                Ok(()) => return Some(Ok(())),
                Err(Failure::Never(why)) => return Some(Err(why)),
                Err(Failure::Again(why)) => why,
            };
            if n >= self.options.tries {
                return Some(Err(why));
            }
            self.count("patchbay_consumer_retries_total", 1);
            let wait = pause.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                stopped = told.wait_for(|run| *run == Run::Stop) => {
                    drop(stopped);
                    return None;
                }
            }
            pause = (pause * 2).min(self.options.pause_max);
        }
        None
    }

    async fn bury(&mut self, received: &Received, why: &str) -> std::io::Result<()> {
        tracing::warn!(
            group = self.options.group,
            partition = received.partition,
            offset = received.offset,
            "a dead letter"
        );
        self.dead.keep(received, why).await?;
        self.count("patchbay_consumer_dead_letters_total", 1);
        self.commit(received).await;
        Ok(())
    }

    async fn commit(&mut self, received: &Received) {
        // One that is not kept is read again.
        if let Err(SourceError(why)) = self.source.commit(received.partition, received.offset).await {
            tracing::warn!(group = self.options.group, why, "the group's place is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use patchbay_protocol::event::{self, Origin};
    use patchbay_protocol::ids::ConversationId;

    use super::*;

    /// Events that are there already, and the places that were kept.
    struct Given {
        events: Vec<Received>,
        next: usize,
        paused: bool,
        kept: Arc<Mutex<Vec<i64>>>,
    }

    #[async_trait]
    impl Source for Given {
        async fn next(&mut self) -> Result<Received, SourceError> {
            let Some(event) = self.events.get(self.next).filter(|_| !self.paused).cloned() else {
                return std::future::pending().await;
            };
            self.next += 1;
            Ok(event)
        }
        async fn commit(&mut self, _: i32, offset: i64) -> Result<(), SourceError> {
            self.kept.lock().unwrap().push(offset);
            Ok(())
        }
        fn seek(&mut self, _: i32, offset: i64) -> Result<(), SourceError> {
            self.next = usize::try_from(offset).unwrap();
            Ok(())
        }
        fn pause(&mut self) -> Result<(), SourceError> {
            self.paused = true;
            Ok(())
        }
        fn resume(&mut self) -> Result<(), SourceError> {
            self.paused = false;
            Ok(())
        }
        async fn lag(&mut self) -> Result<Lag, SourceError> {
            Ok(Lag { events: (self.events.len() - self.next) as u64 })
        }
    }

    /// Says what it did; fails as it is told.
    struct Says {
        said: Arc<Mutex<Vec<String>>>,
        /// Fails so many times at seq 2, and always at seq 4.
        fails: u32,
    }

    #[async_trait]
    impl Handler for Says {
        async fn handle(&mut self, event: &Event) -> Result<(), Failure> {
            if event.seq == 2 && self.fails > 0 {
                self.fails -= 1;
                return Err(Failure::Again("later".into()));
            }
            if event.seq == 4 {
                return Err(Failure::Never("no".into()));
            }
            self.said.lock().unwrap().push(format!("{}", event.seq));
            Ok(())
        }
        async fn gap(&mut self, event: &Event, missing: u64) {
            self.said.lock().unwrap().push(format!("{missing} before {}", event.seq));
        }
    }

    struct Dead(Arc<Mutex<Vec<(i64, String)>>>);

    #[async_trait]
    impl DeadLetters for Dead {
        async fn keep(&mut self, event: &Received, why: &str) -> io::Result<()> {
            self.0.lock().unwrap().push((event.offset, why.to_owned()));
            Ok(())
        }
    }

    fn received(offset: i64, seq: u64) -> Received {
        let origin = Origin {
            tenant: "t".parse().unwrap(),
            account: "wa".parse().unwrap(),
            conversation: ConversationId::from_bytes([1; 16]),
        };
        let entry = format!("{{\"seq\":{seq},\"at\":\"2026-11-21T09:00:00Z\",\"type\":\"note.added\"}}");
        let event = event::Event {
            origin: Arc::new(origin),
            inbox: "main".parse().unwrap(),
            seq,
            entry: entry.into(),
        };
        Received { partition: 0, offset, envelope: event.envelope().unwrap() }
    }

    #[tokio::test(start_paused = true)]
    async fn effects_come_in_order_once_and_places_behind_them() {
        let mut foreign = received(7, 9);
        foreign.envelope.headers.clear();
        let events = [1, 2, 2, 3, 4, 8].into_iter().zip(0..).map(|(seq, offset)| received(offset, seq));
        let events: Vec<Received> = events.chain([foreign]).collect();
        let (kept, said, dead) = (Arc::default(), Arc::default(), Arc::default());
        let source = Given { events, next: 0, paused: false, kept: Arc::clone(&kept) };
        let handler = Says { said: Arc::clone(&said), fails: 3 };
        let consumer = Consumer::new(source, handler, Dead(Arc::clone(&dead)), Options::new("g"));
        let (tell, told) = watch::channel(Run::On);
        let running = tokio::spawn(consumer.run(told));
        while kept.lock().unwrap().len() < 7 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tell.send(Run::Stop).unwrap();
        running.await.unwrap().unwrap();
        assert_eq!(*said.lock().unwrap(), ["1", "2", "3", "3 before 8", "8"]);
        assert_eq!(*kept.lock().unwrap(), [0, 1, 2, 3, 4, 5, 7]);
        let dead = dead.lock().unwrap();
        assert_eq!(dead[0], (4, "no".into()));
        assert_eq!((dead.len(), dead[1].0), (2, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_told_to_stop_in_the_middle_keeps_no_place() {
        let (kept, said, dead) = (Arc::default(), Arc::default(), Arc::default());
        let source = Given { events: vec![received(0, 2)], next: 0, paused: false, kept: Arc::clone(&kept) };
        let handler = Says { said: Arc::clone(&said), fails: 1000 };
        let options = Options { tries: 1000, ..Options::new("g") };
        let (tell, told) = watch::channel(Run::On);
        let running = tokio::spawn(Consumer::new(source, handler, Dead(dead), options).run(told));
        tokio::time::sleep(Duration::from_secs(30)).await;
        tell.send(Run::Stop).unwrap();
        running.await.unwrap().unwrap();
        assert!(kept.lock().unwrap().is_empty() && said.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_one_goes_on_where_it_was() {
        let (kept, said, dead) = (Arc::default(), Arc::default(), Arc::default());
        let source = Given { events: vec![received(0, 1)], next: 0, paused: false, kept: Arc::clone(&kept) };
        let handler = Says { said: Arc::clone(&said), fails: 0 };
        let (tell, told) = watch::channel(Run::Paused);
        let running = tokio::spawn(Consumer::new(source, handler, Dead(dead), Options::new("g")).run(told));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(said.lock().unwrap().is_empty());
        tell.send(Run::On).unwrap();
        while kept.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(*said.lock().unwrap(), ["1"]);
        tell.send(Run::Stop).unwrap();
        running.await.unwrap().unwrap();
    }
}
