//! The WhatsApp connector against a server that answers only what Graph documents, and a provider's day from a file.
#![allow(missing_docs, clippy::unwrap_used)]

use patchbay_connectors::{Connector as _, whatsapp::WhatsApp};
use patchbay_loadtest::simulator::{Faults, Number, Scenario, Simulator};
use patchbay_protocol::Content;
use patchbay_protocol::inbound::{AddressKind, ItemKind};
use patchbay_protocol::outbound::{Backoff, Call, CallResult, Lane, Outbound, Payload, Recipient, Verdict};
use patchbay_protocol::timestamp::Timestamp;
use serde_json::{Value, json};

async fn simulator() -> Simulator {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Simulator::start("127.0.0.1:0".parse().unwrap(), 1, Faults { delay_ms: 0, ..Faults::default() })
        .await
        .unwrap()
}

fn message(recipient: Recipient, payload: Payload) -> Outbound {
    Outbound {
        entry: "117hm6cewq8ptd8sg97y11y4xd-7".parse().unwrap(),
        at: Timestamp::from_seconds(1),
        thread: "34600111222".into(),
        recipient,
        payload,
        reply_to: None,
        lane: Lane::Agent,
    }
}

fn number(to: &str) -> Recipient {
    Recipient { address: to.into(), user_id: None }
}

async fn call(simulator: &Simulator, call: Call) -> CallResult {
    let url = format!("http://{}/v23.0/{}", simulator.address(), call.path);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let answer = client.post(url).bearer_auth("token").body(call.body).send().await.unwrap();
    let status = answer.status().as_u16();
    CallResult::Answered { status, retry_after: None, body: answer.bytes().await.unwrap() }
}

async fn send(simulator: &Simulator, outbound: &Outbound) -> Verdict {
    WhatsApp.classify(&call(simulator, WhatsApp.render("1001", outbound).unwrap()).await)
}

fn text() -> Payload {
    Payload::Message(Content::Text { text: "hola".into() })
}

fn file(kind: &str, caption: bool) -> Value {
    let mut value =
        json!({"type": kind, "media": {"id": "M1", "mime": "application/pdf", "name": "a.pdf", "bytes": 3}});
    if caption {
        value["caption"] = json!("a caption");
    }
    value
}

#[tokio::test]
async fn everything_that_can_be_sent_is_what_graph_documents() {
    let simulator = simulator().await;
    let choices = json!([{"id": "1", "title": "One", "description": "d"}]);
    let contents = [
        json!({"type": "text", "text": "hola"}),
        file("image", true),
        file("video", true),
        file("audio", false),
        file("voice", false),
        file("document", true),
        file("sticker", false),
        json!({"type": "location", "latitude": 1.5, "longitude": 2.5, "name": "n", "address": "a"}),
        json!({"type": "contacts", "contacts": [{"name": {"formatted_name": "A"}, "phones": [{"phone": "1"}]}]}),
        json!({"type": "template", "name": "t", "language": "es", "components": [{"type": "body", "parameters": [{"type": "text", "text": "x"}]}]}),
        json!({"type": "interactive", "kind": "buttons", "body": "b", "header": "h", "footer": "f", "buttons": [{"id": "1", "title": "One"}]}),
        json!({"type": "interactive", "kind": "list", "body": "b", "button": "choose", "sections": [{"title": "s", "rows": choices}]}),
        json!({"type": "interactive", "kind": "location_request", "body": "b"}),
        json!({"type": "interactive", "kind": "cta_url", "body": "b", "display_text": "go", "url": "https://x.example"}),
    ];
    for content in contents {
        let content: Content =
            serde_json::from_value(content.clone()).unwrap_or_else(|e| panic!("{content}: {e}"));
        WhatsApp.check(&content).unwrap_or_else(|e| panic!("{content:?}: {e:?}"));
        let kind = content.kind();
        for recipient in
            [number("34600111222"), Recipient { address: String::new(), user_id: Some("ES.1".into()) }]
        {
            let mut outbound = message(recipient, Payload::Message(content.clone()));
            outbound.reply_to = Some("wamid.0".into());
            let verdict = send(&simulator, &outbound).await;
            assert!(matches!(verdict, Verdict::Accepted { .. }), "{kind}: {verdict:?}");
        }
    }
    let reaction = Payload::Reaction { reaction_to: "wamid.0".into(), emoji: String::new() };
    assert!(matches!(send(&simulator, &message(number("346"), reaction)).await, Verdict::Accepted { .. }));
    let taken = simulator.record().calls.iter().filter(|c| c.taken).count();
    assert_eq!(taken, 29, "business-scoped ids stood where they belong: none was dropped");
}

#[tokio::test]
async fn what_graph_does_not_document_is_refused() {
    let simulator = simulator().await;
    let good = json!({"messaging_product": "whatsapp", "recipient_type": "individual", "to": "346", "type": "text", "text": {"body": "x"}});
    for (what, path, value) in [
        ("an unknown field", "/surprise", json!(1)),
        ("an unknown field within", "/text/surprise", json!(1)),
        ("an empty text", "/text/body", json!("")),
        ("a type without its object", "/type", json!("image")),
        ("a type that is none", "/type", json!("hologram")),
        ("another product", "/messaging_product", json!("telegram")),
        ("nobody", "/to", json!("")),
        ("a name for a number", "/to", json!("Luz")),
        ("a recipient that is none", "/to", json!(346)),
    ] {
        let mut frame = good.clone();
        let (parent, name) = path.rsplit_once('/').unwrap();
        frame.pointer_mut(parent).unwrap()[name] = value;
        let answer =
            call(&simulator, Call { path: "1001/messages".into(), body: frame.to_string().into() }).await;
        assert!(matches!(&answer, CallResult::Answered { status: 400, .. }), "{what}: {answer:?}");
        assert!(matches!(WhatsApp.classify(&answer), Verdict::Refused { .. }), "{what}");
    }
    let captioned = |caption: Value| json!({"messaging_product": "whatsapp", "to": "346", "type": "image", "image": {"link": "https://x/y.png", "caption": caption}});
    for (caption, wanted) in [(json!("x".repeat(1024)), 200), (json!("x".repeat(1025)), 400), (json!(7), 400)]
    {
        let body = captioned(caption).to_string().into();
        let answer = call(&simulator, Call { path: "1001/messages".into(), body }).await;
        assert!(matches!(&answer, CallResult::Answered { status, .. } if *status == wanted), "{answer:?}");
    }
}

#[tokio::test]
async fn an_address_that_the_provider_knows_otherwise_and_one_that_it_drops() {
    let simulator = simulator().await;
    let aliases = [("5511987654321".to_owned(), "551187654321".to_owned())].into();
    simulator.play(Scenario {
        faults: Faults { delay_ms: 0, ..Faults::default() },
        aliases,
        ..Scenario::default()
    });
    let Verdict::Accepted { aliases, .. } = send(&simulator, &message(number("5511987654321"), text())).await
    else {
        panic!()
    };
    assert!(
        aliases.iter().any(|a| a.kind == AddressKind::WaId && a.value == "551187654321"),
        "the customer will write from there: {aliases:?}"
    );
    // A business-scoped id in `to` is answered 200 and dropped: the connector never puts it there.
    let dropped =
        json!({"messaging_product": "whatsapp", "to": "ES.1", "type": "text", "text": {"body": "x"}});
    call(&simulator, Call { path: "1001/messages".into(), body: dropped.to_string().into() }).await;
    assert!(!simulator.record().calls.last().unwrap().taken);
    let rendered = WhatsApp
        .render("1001", &message(Recipient { address: String::new(), user_id: Some("ES.1".into()) }, text()));
    let body: Value = serde_json::from_slice(&rendered.unwrap().body).unwrap();
    assert!(body.get("to").is_none() && body["recipient"] == "ES.1", "{body}");
}

#[tokio::test]
async fn a_gateway_that_answers_without_a_body_leaves_the_outcome_open() {
    let simulator = simulator().await;
    simulator.set_faults(Faults { bad_gateways: 1000, delay_ms: 0, ..Faults::default() });
    assert_eq!(send(&simulator, &message(number("346"), text())).await, Verdict::Unknown);
    assert!(simulator.record().calls[0].taken, "it may well have been taken");
}

#[tokio::test]
async fn limits_and_tiers_are_refused_with_the_providers_codes() {
    let simulator = simulator().await;
    let play = |scenario: Value| simulator.play(serde_json::from_value(scenario).unwrap());
    let template = || {
        Payload::Message(
            serde_json::from_value(
                json!({"type": "template", "name": "t", "language": "es", "components": []}),
            )
            .unwrap(),
        )
    };
    let faults = json!({"delay_ms": 0});
    play(json!({"faults": faults, "limits": {"pair_burst": 2, "pair_per_second": 0.001}}));
    let mut verdicts = Vec::new();
    for _ in 0..3 {
        verdicts.push(send(&simulator, &message(number("346"), text())).await);
    }
    assert!(matches!(verdicts[1], Verdict::Accepted { .. }));
    assert!(
        matches!(&verdicts[2], Verdict::Retry { error, scope: Backoff::Pair, .. } if error.code == "131056"),
        "{verdicts:?}"
    );
    assert!(
        matches!(send(&simulator, &message(number("347"), text())).await, Verdict::Accepted { .. }),
        "another pair"
    );
    play(json!({"faults": faults, "limits": {"per_second": 1}}));
    send(&simulator, &message(number("348"), text())).await;
    let limited = send(&simulator, &message(number("349"), text())).await;
    assert!(
        matches!(&limited, Verdict::Retry { error, scope: Backoff::Account, .. } if error.code == "130429"),
        "{limited:?}"
    );
    play(json!({"faults": faults, "limits": {"tier": 1}}));
    assert!(matches!(send(&simulator, &message(number("350"), template())).await, Verdict::Accepted { .. }));
    assert!(
        matches!(send(&simulator, &message(number("350"), template())).await, Verdict::Accepted { .. }),
        "reached already"
    );
    let past = send(&simulator, &message(number("351"), template())).await;
    assert!(!matches!(past, Verdict::Accepted { .. } | Verdict::Unknown), "{past:?}");
}

#[tokio::test]
async fn an_outage_passes_and_a_change_of_quality_is_told() {
    let simulator = simulator().await;
    let (heard, mut webhooks) = tokio::sync::mpsc::channel::<Value>(16);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let webhook_url = format!("http://{}/", listener.local_addr().unwrap());
    let app = axum::Router::new().fallback(move |body: axum::body::Bytes| {
        let heard = heard.clone();
        async move {
            heard.send(serde_json::from_slice(&body).unwrap()).await.unwrap();
        }
    });
    let door = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    simulator.add_number("1001", Number { webhook_url, app_secret: "s".into() });
    let scenario = json!({
        "faults": {"delay_ms": 0, "receipt_delay_ms": 0},
        "steps": [
            {"after_ms": 0, "outage_ms": 300},
            {"after_ms": 400, "quality": {"event": "FLAGGED", "current_limit": "TIER_1K"}},
        ],
    });
    simulator.play(serde_json::from_value(scenario).unwrap());
    tokio::task::yield_now().await;
    let mut refused = 0;
    let taken = loop {
        match send(&simulator, &message(number("346"), text())).await {
            Verdict::Accepted { .. } => break true,
            // 503 without a body: nobody knows.
            _ => refused += 1,
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert!(taken && refused > 0, "down, and up again: {refused}");
    loop {
        let said = webhooks.recv().await.unwrap();
        let change = &said["entry"][0]["changes"][0];
        if change["field"] == "phone_number_quality_update" {
            assert_eq!(change["value"]["event"], "FLAGGED");
            let items = WhatsApp.parse(said.to_string().as_bytes()).unwrap();
            assert!(matches!(items[0].kind, ItemKind::Account(_)), "{items:?}");
            break;
        }
    }
    door.abort();
}
