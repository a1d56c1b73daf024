//! Every order in which a conversation's entries, a client's commands, its slow socket and a crash can meet: the real
//! hub and the real queue, with the log, the lane and the socket played by hand. What comes over the wire must be
//! unbroken at every step (G2, G3).

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Poll, Waker};

use bytes::Bytes;
use patchbay_actors::ports::Publisher as _;
use patchbay_protocol::ConversationId;
use patchbay_protocol::client::Encoding;
use patchbay_protocol::client::reply::Push;
use patchbay_protocol::client::reply::{ClientInfo, Publication, Reply, SubscribeResult, Unsubscribe};
use proptest::prelude::*;
use serde_json::Value;

use super::outbound::{Frames, GoOn, Next, Outbound};
use super::{ClientId, Hub, Topic, View};

/// Bytes of the queue past which publications wait in the log: a few entries.
const ROOM: usize = 1500;
/// Entries that one recovery brings.
const PAGE: u64 = 12;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The owner confirms an entry; its publication is on its way to the hub.
    Append,
    /// The hub gets the next publication.
    Deliver,
    /// The client sends `subscribe` with its position.
    Subscribe,
    /// The client sends `unsubscribe`.
    Unsubscribe,
    /// The job in front of the conversation's lane goes on by one step.
    Work,
    /// The socket takes a frame.
    Read,
    /// The socket takes everything.
    Drain,
    /// The node dies with everything in it; the client comes back with its position.
    Crash,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Append),
        6 => Just(Step::Deliver),
        2 => Just(Step::Subscribe),
        1 => Just(Step::Unsubscribe),
        6 => Just(Step::Work),
        3 => Just(Step::Read),
        1 => Just(Step::Drain),
        1 => Just(Step::Crash),
    ]
}

/// What a lane does, step by step.
enum Job {
    Subscribe { from: u64, joined: bool, tip: Option<u64> },
    Unsubscribe,
    CatchUp { from: GoOn, tip: Option<u64> },
}

struct World {
    log: u64,
    /// Confirmed publications that have not reached the hub yet, in order.
    wire: VecDeque<u64>,
    hub: Hub,
    outbound: Arc<Outbound>,
    client: ClientId,
    lane: VecDeque<Job>,
    /// What the client has asked for.
    wanted: bool,
    /// Subscriptions that it has asked for and was not answered.
    asked: usize,
    /// Where the client is, and whether its subscription stands by what came over the wire.
    position: u64,
    subscribed: bool,
    /// Recoveries that said that they could not be whole.
    told: usize,
}

fn id() -> ConversationId {
    ConversationId::derive(&"t".parse().unwrap(), &"wa".parse().unwrap(), "34600")
}

fn topic() -> Topic {
    Topic::Conversation(id())
}

fn entry(seq: u64) -> Bytes {
    Bytes::from(format!("{{\"seq\":{seq},\"text\":\"{}\"}}", "x".repeat(120)))
}

impl World {
    fn new() -> Self {
        Self {
            log: 3,
            wire: VecDeque::new(),
            hub: Hub::default(),
            outbound: Outbound::with_bound(Encoding::Json, ROOM, Arc::default()),
            client: ClientId(1),
            lane: VecDeque::new(),
            wanted: false,
            asked: 0,
            position: 0,
            subscribed: false,
            told: 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Append => {
                self.log += 1;
                self.wire.push_back(self.log);
            }
            Step::Deliver => {
                if let Some(seq) = self.wire.pop_front() {
                    self.hub.entries(id(), &[(seq, entry(seq))]);
                }
            }
            Step::Subscribe => {
                if !std::mem::replace(&mut self.wanted, true) {
                    self.asked += 1;
                    self.lane.push_back(Job::Subscribe { from: self.position, joined: false, tip: None });
                }
            }
            Step::Unsubscribe => {
                if std::mem::replace(&mut self.wanted, false) {
                    self.lane.push_back(Job::Unsubscribe);
                }
            }
            Step::Work => self.work(),
            Step::Read => {
                self.read();
            }
            Step::Drain => {
                while self.read() {}
                // A flushed socket lets what is behind go on.
                if let Some(from) = self.outbound.go_on() {
                    self.lane.push_back(Job::CatchUp { from, tip: None });
                }
            }
            Step::Crash => {
                self.hub = Hub::default();
                self.outbound = Outbound::with_bound(Encoding::Json, ROOM, Arc::default());
                self.client = ClientId(self.client.0 + 1);
                self.lane.clear();
                // Nobody shows again what a dead node had confirmed.
                self.wire.clear();
                (self.wanted, self.subscribed, self.asked) = (false, false, 0);
            }
        }
    }

    fn work(&mut self) {
        let Some(job) = self.lane.pop_front() else { return };
        let again = match job {
            Job::Subscribe { from, joined: false, .. } => {
                let info = Arc::new(ClientInfo::default());
                self.hub
                    .join(&topic(), self.client, &self.outbound, &info, false, View::Whole)
                    .expect("lanes keep order");
                Some(Job::Subscribe { from, joined: true, tip: None })
            }
            // The owner answers the tip in order with its publications: all up to it are on the wire or past.
            Job::Subscribe { from, joined, tip: None } => {
                Some(Job::Subscribe { from, joined, tip: Some(self.log) })
            }
            Job::Subscribe { from, tip: Some(tip), .. } => {
                let recovered = tip - from <= PAGE;
                let page = (from + 1..=tip).filter(|_| recovered);
                let publications = page
                    .map(|offset| Publication { data: entry(offset), offset, ..Publication::default() })
                    .collect();
                let offset = if recovered { from } else { tip };
                let result =
                    SubscribeResult { recovered, offset, publications, ..SubscribeResult::default() };
                let reply = Reply { id: 1, subscribe: Some(result), ..Reply::default() };
                self.outbound.joined(&topic(), Some(&reply), tip);
                None
            }
            Job::Unsubscribe => {
                self.hub.leave(&topic(), self.client);
                let unsubscribe = Some(Default::default());
                self.outbound.reply(&Reply { id: 2, unsubscribe, ..Reply::default() });
                None
            }
            Job::CatchUp { from, tip: None } => Some(Job::CatchUp { from, tip: Some(self.log) }),
            Job::CatchUp { from, tip: Some(tip) } => {
                self.catch_up(&from, tip);
                None
            }
        };
        if let Some(job) = again {
            self.lane.push_front(job);
        }
    }

    fn catch_up(&mut self, from: &GoOn, tip: u64) {
        if tip - from.after <= PAGE {
            let encoded = |seq| Frames::new(from.topic.channel(), entry(seq), seq).encoded(Encoding::Json);
            self.outbound.caught_up(from, (from.after + 1..=tip).map(encoded).collect(), tip);
        } else if self.outbound.is_still(from) {
            self.hub.leave(&from.topic, self.client);
            let unsubscribe = Some(Unsubscribe { code: 2500, reason: "insufficient state".into() });
            let push = Push { channel: from.topic.channel(), unsubscribe, ..Push::default() };
            self.outbound.reply(&Reply { push: Some(push), ..Reply::default() });
        }
    }

    /// The socket takes a frame, and the client looks at it.
    fn read(&mut self) -> bool {
        match self.outbound.poll_next(Waker::noop()) {
            Poll::Ready(Next::Frame(frame) | Next::Beside(frame)) => {
                let reply: Value = serde_json::from_slice(&frame).unwrap();
                self.see(&reply);
                true
            }
            Poll::Ready(Next::Close(why)) => panic!("closed: {why:?}"),
            Poll::Pending => false,
        }
    }

    fn see(&mut self, reply: &Value) {
        if reply["subscribe"].is_object() {
            assert!(!self.subscribed, "a second subscription without an end of the first");
            self.subscribed = true;
            self.asked -= 1;
            let result = &reply["subscribe"];
            self.position = result["offset"].as_u64().unwrap_or(0);
            self.told += usize::from(!result["recovered"].as_bool().unwrap_or(false));
            for publication in result["publications"].as_array().into_iter().flatten() {
                self.next(publication["offset"].as_u64().unwrap());
            }
        } else if reply["unsubscribe"].is_object() {
            self.subscribed = false;
        } else if reply["push"]["unsubscribe"].is_object() {
            assert!(self.subscribed, "an end without a subscription");
            // It has asked again since, perhaps.
            (self.subscribed, self.wanted) = (false, self.asked > 0);
        } else {
            let offset = reply["push"]["pub"]["offset"].as_u64().unwrap();
            assert!(self.subscribed, "{offset} without a subscription");
            self.next(offset);
        }
    }

    fn next(&mut self, offset: u64) {
        assert_eq!(offset, self.position + 1, "a gap, a double or a step back");
        self.position = offset;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn every_schedule_sees_every_seq_once_and_in_order(steps in prop::collection::vec(any_step(), 1..160)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        // In the end everything arrives at a socket that reads.
        for _ in 0..20 {
            world.step(Step::Subscribe);
            (0..8).for_each(|_| world.step(Step::Work));
            while !world.wire.is_empty() {
                world.step(Step::Deliver);
                world.step(Step::Drain);
            }
            world.step(Step::Drain);
        }
        prop_assert!(world.subscribed && world.lane.is_empty());
        prop_assert_eq!(world.position, world.log);
    }
}

/// A catch-up that was begun for a subscription that has ended since must not speak into the next one.
#[test]
fn a_late_catch_up_leaves_the_next_subscription_alone() {
    let mut world = World::new();
    let subscribe = [Step::Subscribe, Step::Work, Step::Work, Step::Work, Step::Drain];
    let burst = [Step::Append, Step::Deliver].repeat(12);
    subscribe.into_iter().chain(burst.clone()).for_each(|s| world.step(s));
    // The client leaves and comes back while the catch-up waits behind both.
    [Step::Unsubscribe, Step::Subscribe, Step::Drain].into_iter().for_each(|s| world.step(s));
    assert!(matches!(world.lane.back(), Some(Job::CatchUp { .. })), "it is behind");
    (0..4).for_each(|_| world.step(Step::Work));
    world.step(Step::Drain);
    // The new one is behind as well, and asks to go on, before the old catch-up has read.
    burst.into_iter().chain([Step::Drain]).for_each(|s| world.step(s));
    (0..8).for_each(|_| world.step(Step::Work));
    world.step(Step::Drain);
    assert_eq!(world.position, world.log);
}
