//! What an answer means (G7). Matched on the code, never on the title.

use std::time::Duration;

use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::inbound::{Address, AddressKind};
use patchbay_protocol::outbound::{Backoff, CallResult, Verdict};
use serde_json::{Value, json};

/// The reply window is closed.
const WINDOW_CLOSED: i64 = 131_047;
/// Not delivered, to keep the channel healthy; not to be tried for a day.
const HELD_FOR_A_DAY: i64 = 131_049;
/// Too many messages to this recipient.
const PAIR_LIMIT: i64 = 131_056;

/// Errors after which the same message may succeed later.
pub(super) fn is_retryable(code: i64) -> bool {
    matches!(code, 1 | 2 | 4 | 80_007 | 130_429 | PAIR_LIMIT | 131_000 | 131_016 | 131_057)
}

/// Errors that hold back the whole account for a while.
fn throttles_account(code: i64) -> bool {
    matches!(code, 4 | 80_007 | 130_429 | 131_057)
}

/// Errors after which nothing can be sent until somebody acts: authorisation, billing, bans.
pub(super) fn pauses_account(code: i64) -> bool {
    matches!(code, 0 | 190 | 368 | 131_031 | 131_042)
}

/// Errors that say that the reply window is closed.
pub(super) fn closes_window(code: i64) -> bool {
    code == WINDOW_CLOSED
}

/// Not sent, and retried by class: no connection made, or a Graph error body. Unknown: the request was written and
/// then anything else than an answer that Graph documents.
pub(super) fn verdict(result: &CallResult) -> Verdict {
    match result {
        CallResult::NotSent => Verdict::Retry {
            error: ours("not_sent", "no connection"),
            after_ms: None,
            scope: Backoff::Account,
        },
        CallResult::Lost => Verdict::Unknown,
        CallResult::Answered { status, retry_after, body } => answered(*status, *retry_after, body),
    }
}

fn ours(code: &str, title: &str) -> ProviderError {
    ProviderError { code: code.into(), title: title.into(), retryable: true }
}

fn answered(status: u16, retry_after: Option<Duration>, body: &[u8]) -> Verdict {
    let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    if body["error"].is_object() {
        return refused(status, retry_after, &body["error"]);
    }
    if (200..300).contains(&status) {
        return accepted(&body);
    }
    Verdict::Unknown
}

fn accepted(body: &Value) -> Verdict {
    let Some(provider_id) = body["messages"][0]["id"].as_str().filter(|id| !id.is_empty()) else {
        return Verdict::Unknown;
    };
    let contact = &body["contacts"][0];
    let mut aliases = Vec::new();
    if let Some(wa_id) =
        contact["wa_id"].as_str().filter(|w| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit()))
    {
        aliases.push(Address { kind: AddressKind::WaId, value: wa_id.into() });
    }
    if let Some(user_id) = contact["user_id"].as_str().filter(|u| !u.is_empty()) {
        aliases.push(Address { kind: AddressKind::UserId, value: user_id.into() });
    }
    Verdict::Accepted { provider_id: provider_id.into(), aliases }
}

fn refused(status: u16, retry_after: Option<Duration>, error: &Value) -> Verdict {
    let code = error["code"].as_i64().unwrap_or(-1);
    let transient = error["is_transient"] == json!(true);
    let retryable =
        transient || is_retryable(code) || status == 429 || (status >= 500 && !pauses_account(code));
    // Held back for the customer's sake for a day at least: longer than a message may wait, so it fails, and may be
    // sent anew later.
    let held = code == HELD_FOR_A_DAY;
    let title =
        error["error_user_title"].as_str().or_else(|| error["type"].as_str()).unwrap_or("").to_owned();
    let error = ProviderError { code: code.to_string(), title, retryable: retryable || held };
    if pauses_account(code) {
        return Verdict::Paused { error };
    }
    if !retryable {
        return Verdict::Refused { error, closes_window: closes_window(code) };
    }
    let scope = match code {
        PAIR_LIMIT => Backoff::Pair,
        c if throttles_account(c) || status == 429 => Backoff::Account,
        _ => Backoff::Message,
    };
    Verdict::Retry { error, after_ms: millis(retry_after), scope }
}

fn millis(d: Option<Duration>) -> Option<u64> {
    d.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn answer(status: u16, body: &str) -> Verdict {
        verdict(&CallResult::Answered {
            status,
            retry_after: None,
            body: Bytes::copy_from_slice(body.as_bytes()),
        })
    }

    #[test]
    fn only_what_graph_documents_is_an_answer() {
        assert_eq!(verdict(&CallResult::Lost), Verdict::Unknown);
        assert!(matches!(verdict(&CallResult::NotSent), Verdict::Retry { .. }));
        for (status, body) in [
            (200, ""),
            (200, "{}"),
            (200, r#"{"messages":[]}"#),
            (408, ""),
            (500, "oops"),
            (502, ""),
            (302, ""),
            (404, "<html>"),
            (429, ""),
        ] {
            assert_eq!(answer(status, body), Verdict::Unknown, "{status} {body}");
        }
        let ok = answer(
            200,
            r#"{"contacts":[{"input":"5511","wa_id":"55911","user_id":"BR.1"}],"messages":[{"id":"wamid.X"}]}"#,
        );
        let Verdict::Accepted { provider_id, aliases } = ok else { panic!("{ok:?}") };
        assert_eq!((provider_id.as_str(), aliases.len()), ("wamid.X", 2));
    }

    #[test]
    fn codes_decide() {
        let error = |status, code: i64| {
            answer(status, &format!(r#"{{"error":{{"code":{code},"type":"T","message":"m"}}}}"#))
        };
        for code in [1, 2, 4, 80_007, 130_429, 131_056, 131_000, 131_016, 131_057] {
            assert!(matches!(error(400, code), Verdict::Retry { .. }), "{code}");
        }
        for code in [131_026, 132_000, 131_051, 131_009, 100] {
            assert!(matches!(error(400, code), Verdict::Refused { closes_window: false, .. }), "{code}");
        }
        assert!(matches!(error(400, 131_047), Verdict::Refused { closes_window: true, .. }));
        for code in [190, 368, 131_031, 131_042] {
            assert!(matches!(error(401, code), Verdict::Paused { .. }), "{code}");
        }
        assert!(matches!(error(400, 131_056), Verdict::Retry { scope: Backoff::Pair, .. }));
        assert!(matches!(error(429, 130_429), Verdict::Retry { scope: Backoff::Account, .. }));
        assert!(matches!(error(503, 131_026), Verdict::Retry { .. }), "a 5xx with a Graph error body");
        assert!(matches!(answer(400, r#"{"error":{"code":5,"is_transient":true}}"#), Verdict::Retry { .. }));
    }
}
