//! Receipts that come early, late, for nobody and for groups; agents on several sockets; inboxes. Time is paused.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use common::{World, anna, id, tenant, until};
use patchbay_actors::agent::{AgentCommand, Presence};
use patchbay_actors::clock::Clock;
use patchbay_actors::desk::Who;
use patchbay_actors::inbox::{Filter, InboxCommand, Position, SHOW_PAUSE};
use patchbay_actors::router::Router as _;
use patchbay_protocol::Timestamp;
use patchbay_protocol::command::{ReadConversation, Request, SnoozeConversation};
use patchbay_protocol::outbound::CallResult;
use patchbay_protocol::summary::Status;
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_secs(3600);
const LUZ: &str = "34600111222";

fn receipt(wamid: &str, status: &str) -> Value {
    json!({"id": wamid, "status": status, "timestamp": "1763715600", "recipient_id": LUZ})
}

async fn letters(w: &World) -> Vec<patchbay_storage::tables::DeadLetter> {
    w.node.shards().tables.dead_letters(&tenant(), "", 100).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_receipt_that_overtakes_the_answer_finds_its_message_when_that_is_known() {
    let w = World::new().await;
    w.writes(LUZ, "in.1").await;
    let gate = w.graph.gate.lock().await;
    let seq = w.send(LUZ, "c1").await.unwrap();
    until("the call is made", async || (w.graph.calls.lock().unwrap().len() == 1).then_some(())).await;
    // By the provider's id alone, which nobody here knows yet.
    w.receipt(receipt("wamid.1", "delivered")).await;
    assert!(w.statuses(LUZ, seq).await.is_empty());
    drop(gate);
    let told = until("the receipt is placed", async || {
        let told = w.statuses(LUZ, seq).await;
        (told.len() == 2).then_some(told)
    })
    .await;
    assert_eq!(told, ["sent", "delivered"]);
    // By the callback data it needs no answer at all.
    w.graph.answers.lock().unwrap().push_back(CallResult::Lost);
    let seq = w.send(LUZ, "c2").await.unwrap();
    until("it is unknown", async || (w.statuses(LUZ, seq).await == ["unknown"]).then_some(())).await;
    let mut early = receipt("wamid.2", "read");
    early["biz_opaque_callback_data"] = json!(format!("{}-{seq}", id(LUZ)));
    w.receipt(early).await;
    assert_eq!(w.statuses(LUZ, seq).await, ["unknown", "read"]);
    // Callback data of nobody's message: it waits like any other that is not known yet.
    for seq in [0, u64::MAX - 1, u64::MAX] {
        let mut nobodys = receipt(&format!("wamid.far.{seq}"), "read");
        nobodys["biz_opaque_callback_data"] = json!(format!("{}-{seq}", id(LUZ)));
        w.receipt(nobodys).await;
    }
    assert_eq!(w.statuses(LUZ, seq).await, ["unknown", "read"]);
    tokio::time::sleep(25 * HOUR).await;
    let letters = letters(&w).await;
    let far = letters.iter().filter(|l| l.item.to_string().contains("wamid.far"));
    assert_eq!((far.count(), letters.len()), (3, 3), "whoever found its message is not buried");
}

#[tokio::test(start_paused = true)]
async fn a_receipt_for_nobody_is_kept_for_a_day_and_then_dead_lettered_also_across_a_crash() {
    let w = World::new().await;
    w.writes(LUZ, "in.1").await;
    w.receipt(receipt("wamid.elsewhere", "delivered")).await;
    tokio::time::sleep(12 * HOUR).await;
    let w = w.crash().await;
    tokio::time::sleep(11 * HOUR).await;
    assert!(letters(&w).await.is_empty(), "its day is not over");
    tokio::time::sleep(2 * HOUR).await;
    let letters = until("it is buried", async || {
        let found = letters(&w).await;
        (!found.is_empty()).then_some(found)
    })
    .await;
    assert_eq!(letters.len(), 1, "once");
    assert_eq!(letters[0].account, "wa");
    assert!(letters[0].reason.contains("24 hours"), "{}", letters[0].reason);
    assert_eq!(letters[0].item["provider_id"], "wamid.elsewhere");
    tokio::time::sleep(48 * HOUR).await;
    assert_eq!(self::letters(&w).await.len(), 1, "and not again");
    assert_eq!(w.entries(LUZ).await.len(), 2, "nothing came of it in the thread");
}

#[tokio::test(start_paused = true)]
async fn in_a_group_each_participant_climbs_for_itself_and_sends_go_to_the_group() {
    let w = World::new().await;
    let at = (w.clock.now().as_millis() / 1000).to_string();
    let message = json!({"from": "34611", "group_id": "G-7", "id": "g.1", "timestamp": at, "type": "text", "text": {"body": "x"}});
    w.webhook(&common::body(&[message], &[])).await;
    let seq = w.send("G-7", "c1").await.unwrap();
    until("it is sent", async || (w.statuses("G-7", seq).await == ["sent"]).then_some(())).await;
    let call = w.graph.calls.lock().unwrap()[0].clone();
    assert_eq!((&call["recipient_type"], &call["to"]), (&json!("group"), &json!("G-7")));
    let of = |who: &str, status: &str| json!({"id": "wamid.1", "status": status, "timestamp": at, "recipient_type": "group", "recipient_id": "G-7", "recipient_participant_id": who});
    for status in [
        of("34611", "read"),
        of("34622", "delivered"),
        of("34611", "delivered"),
        of("34622", "played"),
        of("34622", "read"),
    ] {
        w.receipt(status).await;
    }
    let entries = w.entries("G-7").await;
    let told: Vec<(&str, &str)> = entries
        .iter()
        .filter(|e| e["data"]["participant"].is_string() && e["type"] == "message.status")
        .map(|e| (e["data"]["participant"].as_str().unwrap(), e["data"]["status"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [("34611", "read"), ("34622", "delivered"), ("34622", "read")]);
}

#[tokio::test(start_paused = true)]
async fn an_agent_is_there_while_any_of_its_sockets_is_and_is_last_seen_when_the_last_one_closed() {
    let w = World::new().await;
    let on = |c: &str| AgentCommand::Connected { connection: c.into(), incarnation: w.node.incarnation() };
    let off = |c: &str| AgentCommand::Disconnected { connection: c.into() };
    let never = w.agent(AgentCommand::Get).await;
    assert_eq!((never.state, never.sessions, never.last_seen), (Presence::Offline, 0, None));
    w.agent(on("aa")).await;
    assert_eq!(w.agent(on("bb")).await.sessions, 2);
    w.agent(AgentCommand::Set(Presence::Away)).await;
    assert_eq!(w.agent(off("aa")).await.state, Presence::Away, "one is left");
    // A word about a socket that is gone already changes nothing.
    assert_eq!(w.agent(off("aa")).await.sessions, 1);
    tokio::time::sleep(HOUR).await;
    let gone = w.agent(off("bb")).await;
    assert_eq!((gone.state, gone.last_seen), (Presence::Offline, Some(w.clock.now())));
    let shown: Vec<(String, u64)> = w.shown.agent.lock().unwrap()[&anna()]
        .iter()
        .map(|p| (p["state"].as_str().unwrap().to_owned(), p["sessions"].as_u64().unwrap()))
        .collect();
    let states = [("online", 1), ("online", 2), ("away", 2), ("away", 1), ("offline", 0)];
    assert_eq!(shown, states.map(|(s, n)| (s.to_owned(), n)), "every change is shown once");
    // It is forgotten, and known again.
    let seen = gone.last_seen;
    w.node.passivate_idle(Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(w.agent(AgentCommand::Get).await.last_seen, seen);
    // Sockets of a node that is gone end with it, once.
    tokio::time::sleep(HOUR).await;
    w.agent(on("cc")).await;
    let since = w.clock.now();
    let w = w.crash().await;
    let after = w.agent(AgentCommand::Get).await;
    assert_eq!((after.state, after.sessions, after.last_seen), (Presence::Offline, 0, Some(since)));
    let w = w.crash().await;
    assert_eq!(w.agent(AgentCommand::Get).await.last_seen, Some(since));
}

async fn list(
    w: &World,
    filter: Filter,
    after: Option<Position>,
    limit: usize,
) -> Vec<(String, u64, Status)> {
    let found = w
        .desk
        .list(&Who::Api(tenant()), Some(&"main".parse().unwrap()), &filter, after, limit)
        .await
        .unwrap();
    found.into_iter().map(|s| (s.contact.address, s.unread, s.status)).collect()
}

#[tokio::test(start_paused = true)]
async fn an_inbox_lists_what_is_newest_first_with_its_counts_and_shows_changes_conflated() {
    let w = World::new().await;
    for (n, from) in ["34601", "34602", "34603"].into_iter().enumerate() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for m in 0..=n {
            w.writes(from, &format!("{from}.{m}")).await;
        }
    }
    let open = Status::Open;
    let newest_first =
        [("34603".to_owned(), 3, open), ("34602".to_owned(), 2, open), ("34601".to_owned(), 1, open)];
    assert_eq!(list(&w, Filter::default(), None, 10).await, newest_first);
    w.ask("34602", Request::Read(ReadConversation { up_to_seq: 99 })).await.unwrap();
    w.ask("34601", Request::Resolve).await.unwrap();
    let resolved = Filter { status: Some(Status::Resolved), ..Filter::default() };
    let found = until("it is listed", async || {
        let found = list(&w, resolved.clone(), None, 10).await;
        (!found.is_empty()).then_some(found)
    })
    .await;
    assert_eq!(found, [("34601".to_owned(), 1, Status::Resolved)]);
    assert_eq!(
        list(&w, Filter { contact: Some("34602".into()), ..Filter::default() }, None, 10).await[0].1,
        0
    );
    // Paging: every conversation once.
    let first = w.desk.list(&Who::Api(tenant()), None, &Filter::default(), None, 2).await.unwrap();
    let last = first.last().unwrap();
    let after = Position(std::cmp::Reverse(last.updated_at), last.id);
    let second = w.desk.list(&Who::Api(tenant()), None, &Filter::default(), Some(after), 2).await.unwrap();
    let mut all: Vec<String> = first.iter().chain(&second).map(|s| s.contact.address.clone()).collect();
    all.sort();
    assert_eq!(all, ["34601", "34602", "34603"]);
    // A burst is shown at once and then as its latest state, not entry by entry.
    tokio::time::sleep(Duration::from_secs(5)).await;
    w.shown.inbox.lock().unwrap().clear();
    for n in 0..50 {
        w.writes("34603", &format!("burst.{n}")).await;
    }
    tokio::time::sleep(SHOW_PAUSE * 4).await;
    let shown = w.shown.inbox.lock().unwrap().clone();
    assert!((2..=8).contains(&shown.len()), "{} publications of 50 messages", shown.len());
    assert_eq!(shown.last().unwrap()["conversation"]["unread"], 53);
    assert_eq!(shown.last().unwrap()["type"], "conversation.changed");
    // After a crash the list is the same.
    let before = list(&w, Filter::default(), None, 10).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let w = w.crash().await;
    let after = until("all is listed", async || {
        let found = list(&w, Filter::default(), None, 10).await;
        (found.len() == 3).then_some(found)
    })
    .await;
    assert_eq!(after, before);
}

#[tokio::test(start_paused = true)]
async fn an_account_that_moves_takes_its_conversations_along() {
    let w = World::new().await;
    w.writes(LUZ, "in.1").await;
    assert_eq!(list(&w, Filter::default(), None, 10).await.len(), 1);
    w.put_account("wa", "other").await;
    let (main, other) = ("main".parse().unwrap(), "other".parse().unwrap());
    for inbox in [&main, &other] {
        w.node.inbox(&tenant(), inbox, InboxCommand::Reload).unwrap().wait().await.unwrap();
    }
    let all = until("it is listed there", async || {
        let all = w.desk.list(&Who::Api(tenant()), Some(&other), &Filter::default(), None, 10).await.unwrap();
        (!all.is_empty()).then_some(all)
    })
    .await;
    assert_eq!((all.len(), &all[0].inbox), (1, &other));
    assert!(list(&w, Filter::default(), None, 10).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_changes_no_order_and_fires_no_timer_twice() {
    static SET: AtomicI64 = AtomicI64::new(0);
    let jump = |hours: i64| {
        SET.fetch_add(hours * 3_600_000, Ordering::Relaxed);
    };
    let w = World::at(Clock::settable(Timestamp::parse("2026-11-21T09:00:00Z").unwrap(), &SET)).await;
    let snooze = async |w: &World, minutes: u64| {
        let until = w.clock.now().plus(Duration::from_secs(minutes * 60));
        w.ask(LUZ, Request::Snooze(SnoozeConversation { until })).await.unwrap();
    };
    let reopened = async |w: &World| {
        w.entries(LUZ).await.iter().filter(|e| e["type"] == "conversation.reopened").count()
    };
    w.writes(LUZ, "in.1").await;
    snooze(&w, 30).await;
    jump(-5);
    w.writes(LUZ, "in.2").await;
    assert_eq!(reopened(&w).await, 1, "by the customer");
    // The conversation's own time never goes back: what is in the future is so by that.
    snooze(&w, 6 * 60).await;
    jump(7);
    until("it fires, if early", async || (reopened(&w).await == 2).then_some(())).await;
    jump(-6);
    // Its hour comes again, and passes again.
    tokio::time::sleep(9 * HOUR).await;
    assert_eq!(reopened(&w).await, 2, "once");
    snooze(&w, 12 * 60).await;
    jump(-3);
    // A crash while the clock is behind: whoever comes after finds the timer, and fires it once.
    let w = w.crash().await;
    tokio::time::sleep(24 * HOUR).await;
    assert_eq!(reopened(&w).await, 3);
    jump(-9);
    let w = w.crash().await;
    tokio::time::sleep(24 * HOUR).await;
    assert_eq!(reopened(&w).await, 3, "and not again");
    let entries = w.entries(LUZ).await;
    assert!(entries.iter().enumerate().all(|(n, e)| e["seq"] == json!(n + 1)));
    let at: Vec<&str> = entries.iter().map(|e| e["at"].as_str().unwrap()).collect();
    assert!(at.windows(2).all(|a| a[0] <= a[1]), "an entry is never older than the one before: {at:?}");
}

#[tokio::test]
async fn after_an_end_in_order_nobody_is_woken() {
    let w = World::new().await;
    for n in 0..20 {
        w.writes(&format!("3460000{n:04}"), &format!("wamid.{n}")).await;
    }
    until("what was there is in hand", async || w.node.shards().are_swept().then_some(())).await;
    w.node.finish().await;
    assert_eq!(w.node.active_count(), 0);
    let (model, clock) = (w.model.clone(), w.clock);
    let w = World::on(model, clock).await;
    until("the next one has looked", async || w.node.shards().are_swept().then_some(())).await;
    assert_eq!(w.node.active_count(), 0, "nothing was left to do");
    assert_eq!(w.entries("34600000003").await.len(), 2, "and everything is there");
}
