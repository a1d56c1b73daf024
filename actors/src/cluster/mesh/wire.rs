//! Commands and their answers as they travel between nodes.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use patchbay_protocol::ids::ConversationId;
use patchbay_protocol::{CommandError, ErrorCode};
use prost::Message as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::proto::{self, Answer, Kind, Request, answer, topic, watched};
use crate::cluster::json;
use crate::cluster::switch::Parcel;
use crate::fanout::{Aside, Topic, Watched};
use crate::shard::reply::{PATIENCE, ReplyTo, Round, Told};

/// An error as it travels. A code that a later version has is told as `internal`.
#[derive(Serialize, Deserialize)]
struct Refusal {
    code: u32,
    #[serde(default)]
    detail: Option<Value>,
}

/// Whom to answer, by what was asked.
#[derive(Debug)]
pub(super) enum Waits {
    Conversation(ReplyTo<patchbay_protocol::command::Reply>),
    Account(ReplyTo<crate::account::AccountReply>),
    Agent(ReplyTo<crate::agent::AgentReply>),
    Inbox(ReplyTo<crate::inbox::InboxReply>),
    Who(ReplyTo<Vec<String>>),
    Session(ReplyTo<()>),
}

/// A command as it travels, and who waits for its answer.
pub(super) fn encode(id: u64, parcel: Parcel) -> (Request, Waits) {
    let request = |kind: Kind, entity: Bytes, command: Bytes| Request {
        id,
        kind: kind.into(),
        entity,
        command,
        ..Request::default()
    };
    match parcel {
        Parcel::Conversation(of, command, reply) => {
            (request(Kind::Conversation, json(&of), json(&command)), Waits::Conversation(reply))
        }
        Parcel::Account(tenant, account, command, reply) => {
            (request(Kind::Account, json(&(tenant, account)), json(&command)), Waits::Account(reply))
        }
        Parcel::Agent(tenant, agent, command, reply) => {
            (request(Kind::Agent, json(&(tenant, agent)), json(&command)), Waits::Agent(reply))
        }
        Parcel::Inbox(tenant, inbox, command, reply) => {
            (request(Kind::Inbox, json(&(tenant, inbox)), json(&command)), Waits::Inbox(reply))
        }
        Parcel::Who(topic, reply) => {
            (request(Kind::Who, topic_bytes(&topic), Bytes::new()), Waits::Who(reply))
        }
        Parcel::Session(session, data, reply) => {
            (request(Kind::Session, session.into(), data), Waits::Session(reply))
        }
    }
}

/// Something that cannot be read: of a later version, or broken.
struct Unreadable;

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    serde_json::from_slice(bytes).map_err(|error| {
        tracing::warn!(%error, "what another node says cannot be read");
        Unreadable
    })
}

/// The command again, for whoever waits; they come back when it cannot be read.
pub(super) fn decode(request: &Request, waits: Waits) -> Result<Parcel, Waits> {
    fn open<E: DeserializeOwned, C: DeserializeOwned>(request: &Request) -> Result<(E, C), Unreadable> {
        Ok((read(&request.entity)?, read(&request.command)?))
    }
    match waits {
        Waits::Conversation(reply) => match open(request) {
            Ok((id, command)) => Ok(Parcel::Conversation(id, command, reply)),
            Err(Unreadable) => Err(Waits::Conversation(reply)),
        },
        Waits::Account(reply) => match open(request) {
            Ok(((tenant, account), command)) => Ok(Parcel::Account(tenant, account, command, reply)),
            Err(Unreadable) => Err(Waits::Account(reply)),
        },
        Waits::Agent(reply) => match open(request) {
            Ok(((tenant, agent), command)) => Ok(Parcel::Agent(tenant, agent, command, reply)),
            Err(Unreadable) => Err(Waits::Agent(reply)),
        },
        Waits::Inbox(reply) => match open(request) {
            Ok(((tenant, inbox), command)) => Ok(Parcel::Inbox(tenant, inbox, command, reply)),
            Err(Unreadable) => Err(Waits::Inbox(reply)),
        },
        Waits::Who(reply) => match read_topic_bytes(&request.entity) {
            Some(topic) => Ok(Parcel::Who(topic, reply)),
            None => Err(Waits::Who(reply)),
        },
        Waits::Session(reply) => match String::from_utf8(request.entity.to_vec()) {
            Ok(session) => Ok(Parcel::Session(session, request.command.clone(), reply)),
            Err(_) => Err(Waits::Session(reply)),
        },
    }
}

/// What came of a command, once that is known.
pub(super) type Outcome = BoxFuture<'static, Option<answer::Outcome>>;

/// For how long from now somebody waits, as it travels: what is late already is so there too.
pub(super) fn within_ms(until: Instant) -> u32 {
    let left = until.saturating_duration_since(Instant::now()).as_millis();
    u32::try_from(left).unwrap_or(u32::MAX).max(1)
}

/// Until when somebody waits for what was asked here now.
pub(super) fn until(within_ms: u32) -> Instant {
    let within =
        if within_ms == 0 { PATIENCE } else { Duration::from_millis(within_ms.into()).min(PATIENCE) };
    Instant::now() + within
}

/// Who waits until then, where a command arrives in a round; and what is sent back when they are answered, none when it
/// was not begun here.
pub(super) fn receive(kind: Kind, round: Round, until: Instant) -> Option<(Waits, Outcome)> {
    type Pair = (Waits, Outcome);
    fn pair<T>(waits: fn(ReplyTo<T>) -> Waits, round: Round, until: Instant) -> Pair
    where
        T: Serialize + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        (waits(ReplyTo::far(reply, round, until)), Box::pin(outcome(answer)))
    }
    match kind {
        Kind::Unspecified => None,
        Kind::Conversation => Some(pair(Waits::Conversation, round, until)),
        Kind::Account => Some(pair(Waits::Account, round, until)),
        Kind::Agent => Some(pair(Waits::Agent, round, until)),
        Kind::Inbox => Some(pair(Waits::Inbox, round, until)),
        Kind::Who => Some(pair(Waits::Who, round, until)),
        Kind::Session => Some(pair(Waits::Session, round, until)),
    }
}

async fn outcome<T: Serialize>(answer: oneshot::Receiver<Told<T>>) -> Option<answer::Outcome> {
    Some(match answer.await {
        Ok(Told::Answer(Ok(reply))) => answer::Outcome::Done(json(&reply)),
        Ok(Told::Answer(Err(error))) => answer::Outcome::Refused(refusal(&error)),
        Ok(Told::Elsewhere) => return None,
        // Its actor was lost: nobody knows.
        Err(_) => answer::Outcome::Refused(refusal(&CommandError::unavailable())),
    })
}

pub(super) fn refusal(error: &CommandError) -> Bytes {
    json(&Refusal { code: error.code.code(), detail: error.detail.clone() })
}

fn refused(bytes: &[u8]) -> CommandError {
    let Ok(refusal) = read::<Refusal>(bytes) else { return CommandError::unavailable() };
    let code = ErrorCode::ALL.iter().copied().find(|c| c.code() == refusal.code);
    CommandError { code: code.unwrap_or(ErrorCode::Internal), detail: refusal.detail }
}

impl Waits {
    /// Tells who waits. Whoever has stopped waiting repeats with the same ids.
    pub(super) fn answer(self, outcome: answer::Outcome) {
        fn tell<T: DeserializeOwned>(reply: ReplyTo<T>, outcome: answer::Outcome) {
            let told = match outcome {
                answer::Outcome::Done(bytes) => {
                    read(&bytes).map_err(|Unreadable| CommandError::unavailable())
                }
                answer::Outcome::Refused(bytes) => Err(refused(&bytes)),
                answer::Outcome::NotOwner(_) => Err(CommandError::unavailable()),
            };
            let _ = reply.send(told);
        }
        match self {
            Self::Conversation(reply) => tell(reply, outcome),
            Self::Account(reply) => tell(reply, outcome),
            Self::Agent(reply) => tell(reply, outcome),
            Self::Inbox(reply) => tell(reply, outcome),
            Self::Who(reply) => tell(reply, outcome),
            Self::Session(reply) => tell(reply, outcome),
        }
    }

    /// Tells who waits that nobody knows.
    pub(super) fn lose(self) {
        self.answer(answer::Outcome::Refused(refusal(&CommandError::unavailable())));
    }
}

/// An answer as it travels.
pub(super) fn answered(id: u64, outcome: answer::Outcome) -> Answer {
    Answer { id, outcome: Some(outcome) }
}

/// A topic as it travels.
pub(super) fn write_topic(topic: &Topic) -> proto::Topic {
    let named = |tenant: &dyn ToString, id: &dyn ToString| proto::Named {
        tenant: tenant.to_string(),
        id: id.to_string(),
    };
    let kind = match topic {
        Topic::Conversation(id) => topic::Kind::Conversation(Bytes::copy_from_slice(id.as_bytes())),
        Topic::Inbox(tenant, inbox) => topic::Kind::Inbox(named(tenant, inbox)),
        Topic::Agent(tenant, agent) => topic::Kind::Agent(named(tenant, agent)),
        Topic::Cluster => topic::Kind::Cluster(true),
    };
    proto::Topic { kind: Some(kind) }
}

/// The same as bytes.
pub(super) fn topic_bytes(topic: &Topic) -> Bytes {
    write_topic(topic).encode_to_vec().into()
}

/// A topic that has come as bytes.
pub(super) fn read_topic_bytes(bytes: &[u8]) -> Option<Topic> {
    match bytes {
        // A conversation, as nearly all are: field 1, 16 bytes.
        [0x0a, 16, id @ ..] if id.len() == 16 => {
            Some(Topic::Conversation(ConversationId::from_bytes(id.try_into().ok()?)))
        }
        _ => proto::Topic::decode(bytes).ok().and_then(read_topic),
    }
}

/// What a publication is in a run beside its topic and its data.
const PACKED: usize = 2 + 8 + 4;

/// How long a publication is in a run.
pub(super) fn packed_len(topic: &Bytes, data: &Bytes) -> usize {
    PACKED + topic.len() + data.len()
}

/// Adds a publication to a run. Neither topics nor publications are longer than their lengths can say.
pub(super) fn pack(run: &mut BytesMut, topic: &Bytes, seq: u64, data: &Bytes) {
    run.put_u16(u16::try_from(topic.len()).unwrap_or_default());
    run.put_slice(topic);
    run.put_u64(seq);
    run.put_u32(u32::try_from(data.len()).unwrap_or_default());
    run.put_slice(data);
}

/// Reads a run; entries of one log that follow each other are shown together. Which topic came last. What is broken
/// ends it: the lane's registrations are renewed, and whatever was missed is read from the log.
pub(super) fn unpack(mut run: Bytes, mut show: impl FnMut(&Topic, &[(u64, Bytes)])) -> Option<Topic> {
    let mut last: Option<(Bytes, Topic)> = None;
    let mut together: Vec<(u64, Bytes)> = Vec::new();
    while let Ok(length) = run.try_get_u16() {
        let length = usize::from(length);
        let is_same = last.as_ref().is_some_and(|(bytes, _)| run.starts_with(bytes) && bytes.len() == length);
        if run.len() < length + PACKED - 2 {
            tracing::warn!("a run of publications breaks off");
            break;
        }
        let fresh = (!is_same).then(|| run.slice(..length));
        run.advance(length);
        let (seq, length) = (run.get_u64(), run.get_u32() as usize);
        if run.len() < length {
            tracing::warn!("a run of publications breaks off");
            break;
        }
        let data = run.split_to(length);
        let follows = is_same && seq > 0 && together.last().is_some_and(|(before, _)| before + 1 == seq);
        if !follows && let Some((_, topic)) = last.as_ref().filter(|_| !together.is_empty()) {
            show(topic, &together);
            together.clear();
        }
        if let Some(bytes) = fresh {
            // One of a kind that this version does not know is left out.
            let Some(topic) = read_topic_bytes(&bytes) else {
                last = None;
                continue;
            };
            last = Some((bytes, topic));
        }
        together.push((seq, data));
    }
    let (_, topic) = last?;
    if !together.is_empty() {
        show(&topic, &together);
    }
    Some(topic)
}

/// A topic that has come; none: it is of a kind that this version does not know.
pub(super) fn read_topic(topic: proto::Topic) -> Option<Topic> {
    Some(match topic.kind? {
        topic::Kind::Conversation(id) => {
            Topic::Conversation(ConversationId::from_bytes(id[..].try_into().ok()?))
        }
        topic::Kind::Inbox(named) => Topic::Inbox(named.tenant.parse().ok()?, named.id.parse().ok()?),
        topic::Kind::Agent(named) => Topic::Agent(named.tenant.parse().ok()?, named.id.parse().ok()?),
        topic::Kind::Cluster(_) => Topic::Cluster,
    })
}

pub(super) fn write_watched(topic: &Topic, epoch: u32, outcome: Watched) -> proto::Watched {
    let outcome = match outcome {
        Watched::Live(tip) => watched::Outcome::Live(tip),
        Watched::NotOwner(version) => watched::Outcome::NotOwner(version),
        Watched::Later => watched::Outcome::Later(true),
    };
    proto::Watched { topic: Some(write_topic(topic)), epoch, outcome: Some(outcome) }
}

pub(super) fn read_watched(outcome: Option<watched::Outcome>) -> Watched {
    match outcome {
        Some(watched::Outcome::Live(tip)) => Watched::Live(tip),
        Some(watched::Outcome::NotOwner(version)) => Watched::NotOwner(version),
        Some(watched::Outcome::Later(_)) | None => Watched::Later,
    }
}

pub(super) fn write_aside(topic: &Topic, aside: &Aside) -> proto::Aside {
    let Aside { kind, key, data } = aside.clone();
    proto::Aside { topic: Some(write_topic(topic)), kind, key, data }
}

pub(super) fn read_aside(aside: proto::Aside) -> Option<(Topic, Aside)> {
    let proto::Aside { topic, kind, key, data } = aside;
    Some((read_topic(topic?)?, Aside { kind, key, data }))
}

#[cfg(test)]
mod tests {
    use super::proto::envelope::Kind as Envelopes;
    use super::proto::{
        Batch, Beat, Changed, Envelope, Hello, Missed, Present, Published, Run, Unwatch, Watch, Who,
    };
    use super::*;
    use patchbay_protocol::command::Request as Asked;
    use patchbay_protocol::ids::CommandId;

    const GOLDEN_1: &str = include_str!("../../../../protocol/fixtures/mesh-1.txt");
    const GOLDEN_2: &str = include_str!("../../../../protocol/fixtures/mesh-2.txt");
    const GOLDEN_3: &str = include_str!("../../../../protocol/fixtures/mesh-3.txt");

    /// One of everything that version 1 says.
    fn words() -> Vec<(&'static str, Envelopes)> {
        let conversation = Topic::Conversation(ConversationId::from_bytes([7; 16]));
        let inbox = Topic::Inbox("acme".parse().unwrap(), "main".parse().unwrap());
        let agent = Topic::Agent("acme".parse().unwrap(), "anna".parse().unwrap());
        let (reply, _answer) = oneshot::channel();
        let mut command = crate::router::system_command(Asked::Tip);
        command.id = CommandId([3; 16]);
        let parcel =
            Parcel::Conversation(ConversationId::from_bytes([7; 16]), Box::new(command), reply.into());
        let (request, _) = encode(9, parcel);
        let (reply, _answer) = oneshot::channel();
        let (who_request, _) = encode(10, Parcel::Who(agent.clone(), reply.into()));
        let error = CommandError::overloaded(250);
        let hello =
            Hello { version: 1, cluster: "patchbay".into(), incarnation: 4, to: 5, lane: 1, shards: 1024 };
        let aside = Aside { kind: "typing".into(), key: "anna".into(), data: Bytes::from_static(b"{}") };
        let topic = Some(write_topic(&conversation));
        vec![
            ("hello", Envelopes::Hello(hello)),
            ("request", Envelopes::Request(request)),
            ("request who", Envelopes::Request(who_request)),
            ("answer done", Envelopes::Answer(answered(9, answer::Outcome::Done(Bytes::from_static(b"{}"))))),
            ("answer refused", Envelopes::Answer(answered(9, answer::Outcome::Refused(refusal(&error))))),
            ("answer not owner", Envelopes::Answer(answered(9, answer::Outcome::NotOwner(17)))),
            ("beat", Envelopes::Beat(Beat { map_version: 17, connections: 3, active: 2, waiting: 1 })),
            ("watch", Envelopes::Watch(Watch { topic: topic.clone(), epoch: 6, check: true })),
            ("unwatch", Envelopes::Unwatch(Unwatch { topic: Some(write_topic(&inbox)) })),
            ("watched", Envelopes::Watched(write_watched(&conversation, 6, Watched::Live(12)))),
            ("watched not owner", Envelopes::Watched(write_watched(&conversation, 6, Watched::NotOwner(17)))),
            ("watched later", Envelopes::Watched(write_watched(&Topic::Cluster, 6, Watched::Later))),
            (
                "published",
                Envelopes::Published(Published {
                    topic: topic_bytes(&conversation),
                    seq: 12,
                    data: vec![Bytes::from_static(b"{\"seq\":12}"), Bytes::from_static(b"{\"seq\":13}")],
                }),
            ),
            ("missed", Envelopes::Missed(Missed { topic, seq: 13 })),
            ("who", Envelopes::Who(Who { number: 2, topic: Some(write_topic(&agent)) })),
            ("present", Envelopes::Present(Present { number: 2, who: "[]".into() })),
            ("aside", Envelopes::Aside(write_aside(&conversation, &aside))),
            ("changed", Envelopes::Changed(Changed { tenant: "acme".into() })),
        ]
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// What version 2 says beside that.
    fn words_since_2() -> Vec<(&'static str, Envelopes)> {
        vec![("run", Envelopes::Run(Run { packed: run() }))]
    }

    /// And version 3: a request of a round, with its caller's patience.
    fn words_since_3() -> Vec<(&'static str, Envelopes)> {
        let Some((_, Envelopes::Request(request))) = words().into_iter().find(|(name, _)| *name == "request")
        else {
            panic!("version 1 has requests");
        };
        let (reply, _answer) = oneshot::channel();
        let (session, _) =
            encode(11, Parcel::Session("5e55".into(), Bytes::from_static(b"{}"), reply.into()));
        vec![
            ("request", Envelopes::Request(Request { shard: 5, round: 7, within_ms: 30_000, ..request })),
            ("request session", Envelopes::Request(Request { within_ms: 30_000, ..session })),
        ]
    }

    fn run() -> Bytes {
        let mut run = BytesMut::new();
        let log = topic_bytes(&Topic::Conversation(ConversationId::from_bytes([7; 16])));
        let inbox = topic_bytes(&Topic::Inbox("acme".parse().unwrap(), "main".parse().unwrap()));
        let texts: Vec<Bytes> = (0..6).map(|n| format!("{{\"n\":{n}}}").into()).collect();
        let publications = [(&log, 12), (&log, 13), (&inbox, 0), (&inbox, 0), (&log, 14), (&log, 16)];
        for ((topic, seq), data) in publications.into_iter().zip(&texts) {
            pack(&mut run, topic, seq, data);
        }
        run.freeze()
    }

    fn stays(words: Vec<(&'static str, Envelopes)>, file: &str, golden: &str) {
        let said: String = words
            .into_iter()
            .map(|(name, kind)| {
                let batch = Batch { envelopes: vec![Envelope { kind: Some(kind) }] };
                let bytes = batch.encode_to_vec();
                assert_eq!(Batch::decode(&bytes[..]).unwrap(), batch, "{name}");
                format!("{name}: {}\n", hex(&bytes))
            })
            .collect();
        if std::env::var_os("PATCHBAY_WRITE_FIXTURES").is_some() {
            std::fs::write(format!("../protocol/fixtures/{file}"), &said).unwrap();
        }
        assert_eq!(said, golden);
    }

    #[test]
    fn what_each_version_says_stays_as_it_is() {
        stays(words(), "mesh-1.txt", GOLDEN_1);
        stays(words_since_2(), "mesh-2.txt", GOLDEN_2);
        stays(words_since_3(), "mesh-3.txt", GOLDEN_3);
    }

    fn unpacked(run: Bytes) -> (Vec<(Topic, Vec<u64>)>, Option<Topic>) {
        let mut shown = Vec::new();
        let last = unpack(run, |topic, publications| {
            shown.push((topic.clone(), publications.iter().map(|(seq, _)| *seq).collect()));
        });
        (shown, last)
    }

    #[test]
    fn a_run_is_read_as_it_was_published_and_only_what_follows_is_shown_together() {
        let log = Topic::Conversation(ConversationId::from_bytes([7; 16]));
        let inbox = Topic::Inbox("acme".parse().unwrap(), "main".parse().unwrap());
        let all = vec![
            (log.clone(), vec![12, 13]),
            (inbox.clone(), vec![0]),
            (inbox.clone(), vec![0]),
            (log.clone(), vec![14]),
            (log.clone(), vec![16]),
        ];
        assert_eq!(unpacked(run()), (all.clone(), Some(log.clone())));
        // Wherever it breaks off, what came before is shown.
        let mut most = 0;
        for length in 0..run().len() {
            let (shown, _) = unpacked(run().slice(..length));
            let count: usize = shown.iter().map(|(_, seqs)| seqs.len()).sum();
            assert!(count >= most && count < 6, "{length}");
            most = count;
        }
        assert_eq!(most, 5);
        // A topic of a kind that nobody knows is left out, and what follows it is not.
        let mut run = BytesMut::new();
        for topic in [&Bytes::from_static(&[0x4a, 1, 1]), &topic_bytes(&inbox)] {
            pack(&mut run, topic, 0, &Bytes::from_static(b"{}"));
        }
        assert_eq!(unpacked(run.freeze()), (vec![(inbox.clone(), vec![0])], Some(inbox)));
    }

    #[test]
    fn what_a_later_version_adds_is_left_out() {
        // A word of a kind that nobody knows, and a beat with a field that nobody knows.
        let later = [0x0a, 5, 0xfa, 0x06, 2, 8, 1, 0x0a, 7, 0x22, 5, 8, 17, 0xa0, 6, 1];
        let batch = Batch::decode(&later[..]).unwrap();
        assert_eq!(batch.envelopes[0].kind, None);
        let beat = Beat { map_version: 17, ..Beat::default() };
        assert_eq!(batch.envelopes[1].kind, Some(Envelopes::Beat(beat)));
        // A topic of another kind, and what is no topic at all.
        assert_eq!(read_topic_bytes(&[0x4a, 1, 1]), None);
        assert_eq!(read_topic_bytes(&[0x0a, 3, 1, 2, 3]), None);
        assert_eq!(read_topic_bytes(b"\xff\xff"), None);
    }
}
