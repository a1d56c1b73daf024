//! Error and disconnect codes: one table each, from which the documentation page is generated.
//!
//! The number tells the client what to do. Errors 100-113 mean what they mean in Centrifugo; ours begin at 400.
//! Disconnects 3000-3499 and 4000-4499 make an SDK come back, 3500-3999 and 4500-4999 do not. A number once used
//! is never used for something else.

use serde_json::{Value, json};

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal $temporary:literal $http:literal $means:literal;)*) => {
        /// Why a command was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $(#[doc = $means] $name,)* }

        impl ErrorCode {
            /// Every code, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number on the wire.
            pub fn code(self) -> u32 { match self { $(Self::$name => $code,)* } }

            /// The name: the first word of `message`, and `code` in problem documents.
            pub fn name(self) -> &'static str { match self { $(Self::$name => $text,)* } }

            /// Whether the same command may succeed later without any change.
            pub fn is_temporary(self) -> bool { match self { $(Self::$name => $temporary,)* } }

            /// The HTTP status that says the same.
            pub fn http_status(self) -> u16 { match self { $(Self::$name => $http,)* } }

            /// What it means and what to do.
            pub fn meaning(self) -> &'static str { match self { $(Self::$name => $means,)* } }
        }
    };
}

errors! {
    Internal = 100 "internal" true 500 "A fault of ours. Try again; it is counted and logged with the command's name.";
    Unauthorized = 101 "unauthorized" false 401 "No valid key or token.";
    UnknownChannel = 102 "unknown_channel" false 404 "The channel's namespace does not exist.";
    PermissionDenied = 103 "permission_denied" false 403 "The channel or conversation does not exist, is another tenant's, or is not allowed: nobody is told which.";
    MethodNotFound = 104 "method_not_found" false 404 "There is no such method.";
    AlreadySubscribed = 105 "already_subscribed" false 409 "This connection is subscribed to that channel.";
    LimitExceeded = 106 "limit_exceeded" false 429 "A limit of this connection is reached, such as 512 subscriptions.";
    BadRequest = 107 "bad_request" false 400 "The command is malformed.";
    NotAvailable = 108 "not_available" false 404 "The feature is off or does not exist for this channel or token.";
    TokenExpired = 109 "token_expired" false 401 "Fetch a new token and connect again.";
    Expired = 110 "expired" false 401 "The connection has expired.";
    TooManyRequests = 111 "too_many_requests" true 429 "Slow down and try again.";
    UnrecoverablePosition = 112 "unrecoverable_position" false 409 "The position is of another epoch or past the tip: read the state anew.";
    InvalidRequest = 400 "invalid_request" false 422 "The data is not what the method takes; `detail` names the field.";
    NotFound = 404 "not_found" false 404 "There is no such thing in this tenant.";
    Conflict = 409 "conflict" false 409 "The same id with other content, or something newer than what the sender had seen.";
    TooLarge = 413 "too_large" false 413 "Larger than the documented bound.";
    WindowClosed = 420 "window_closed" false 409 "The channel's reply window is closed: only templates may be sent.";
    NotSupported = 421 "not_supported" false 409 "The channel cannot do this.";
    RateLimited = 429 "rate_limited" true 429 "A rate limit is reached; try again after `retry_after_ms`.";
    Overloaded = 430 "overloaded" true 503 "A bound on work in flight is reached; nothing was done. Try again after `retry_after_ms`.";
    Unavailable = 431 "unavailable" true 503 "The store did not answer. Repeating with the same `client_id` is safe.";
}

/// A refused command: what to tell whoever sent it.
#[derive(Clone, Debug, PartialEq)]
pub struct CommandError {
    /// What went wrong.
    pub code: ErrorCode,
    /// More about it, as one JSON object (`retry_after_ms`, `last_seq`, `detail`).
    pub detail: Option<Value>,
}

impl CommandError {
    /// With an object of details.
    pub fn with(code: ErrorCode, detail: Value) -> Self {
        Self { code, detail: Some(detail) }
    }

    /// `invalid_request` naming what is wrong.
    pub fn invalid(detail: impl std::fmt::Display) -> Self {
        Self::with(ErrorCode::InvalidRequest, json!({"detail": detail.to_string()}))
    }

    /// `overloaded` with when to try again.
    pub fn overloaded(retry_after_ms: u64) -> Self {
        Self::with(ErrorCode::Overloaded, json!({"retry_after_ms": retry_after_ms}))
    }

    /// `rate_limited` with when to try again.
    pub fn rate_limited(retry_after_ms: u64) -> Self {
        Self::with(ErrorCode::RateLimited, json!({"retry_after_ms": retry_after_ms}))
    }

    /// `unavailable`: the store did not answer.
    pub fn unavailable() -> Self {
        Self::with(ErrorCode::Unavailable, json!({"retry_after_ms": 500}))
    }

    /// The wire's `message`: the name, then optionally a space and one JSON object.
    pub fn message(&self) -> String {
        match &self.detail {
            None => self.code.name().to_owned(),
            Some(detail) => format!("{} {detail}", self.code.name()),
        }
    }

    /// When to try again, where that is known.
    pub fn retry_after_ms(&self) -> Option<u64> {
        self.detail.as_ref()?.get("retry_after_ms")?.as_u64()
    }
}

impl From<ErrorCode> for CommandError {
    fn from(code: ErrorCode) -> Self {
        Self { code, detail: None }
    }
}

impl std::fmt::Display for CommandError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message())
    }
}

impl std::error::Error for CommandError {}

macro_rules! disconnects {
    ($($name:ident = $code:literal $reason:literal $means:literal;)*) => {
        /// Why the server ends a connection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Disconnect { $(#[doc = $means] $name,)* }

        impl Disconnect {
            /// Every code, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The close code.
            pub fn code(self) -> u16 { match self { $(Self::$name => $code,)* } }

            /// The close reason.
            pub fn reason(self) -> &'static str { match self { $(Self::$name => $reason,)* } }

            /// What it means and what to do.
            pub fn meaning(self) -> &'static str { match self { $(Self::$name => $means,)* } }
        }
    };
}

disconnects! {
    TooLarge = 1009 "message too big" "A frame over 512 KiB or a command over 64 KiB. SDKs come back.";
    ConnectionClosed = 3000 "connection closed" "Nothing special; come back.";
    Shutdown = 3001 "shutdown" "The node stops; come back, another one answers.";
    ServerError = 3004 "internal server error" "A fault of ours; come back.";
    Expired = 3005 "connection expired" "The token has expired and was not renewed in time; come back with a new one.";
    Slow = 3008 "slow" "The client did not read in time and the outbound bound is reached; come back with the positions.";
    InsufficientState = 3010 "insufficient state" "A subscription made by the server could not go on without a gap; come back with its position.";
    ForceReconnect = 3011 "force reconnect" "The operator moves this connection; come back.";
    NoPong = 3012 "no pong" "No pong within 10 s of a ping; come back.";
    TooManyRequests = 3013 "too many requests" "Too many sockets, or too many that have not connected; come back later.";
    InvalidToken = 3500 "invalid token" "The token is not valid here; do not come back with it.";
    BadRequest = 3501 "bad request" "A broken frame, a first command other than connect, or a second connect.";
    Stale = 3502 "stale" "Not connected within 10 s.";
    ForceNoReconnect = 3503 "force disconnect" "The token was revoked.";
    ConnectionLimit = 3504 "connection limit" "Too many connections.";
    InappropriateProtocol = 3506 "inappropriate protocol" "Data that is not JSON was due to a client that speaks JSON.";
    PermissionDenied = 3507 "permission denied" "This connection is not allowed.";
}

impl Disconnect {
    /// Whether an SDK comes back after it.
    pub fn reconnects(self) -> bool {
        let code = self.code();
        code < 3500 || (4000..4500).contains(&code)
    }
}

/// The page in docs/ that lists every code.
pub fn documentation() -> String {
    let mut page = String::from(
        "# Error and disconnect codes\n\nGenerated from `protocol/src/codes.rs`; a test fails when this page is stale.\n\n## Errors\n\n| code | name | temporary | HTTP | meaning |\n|---|---|---|---|---|\n",
    );
    for e in ErrorCode::ALL {
        let temporary = if e.is_temporary() { "yes" } else { "no" };
        page += &format!(
            "| {} | `{}` | {} | {} | {} |\n",
            e.code(),
            e.name(),
            temporary,
            e.http_status(),
            e.meaning()
        );
    }
    page += "\n`message` is the name, then optionally a space and one JSON object: `overloaded {\"retry_after_ms\":250}`.\n\n## Disconnects\n\n| code | reason | SDK comes back | meaning |\n|---|---|---|---|\n";
    for d in Disconnect::ALL {
        let back = if d.reconnects() { "yes" } else { "no" };
        page += &format!("| {} | {} | {} | {} |\n", d.code(), d.reason(), back, d.meaning());
    }
    page += "\n## Unsubscribes\n\n| code | meaning |\n|---|---|\n| 2500 | The subscription could not go on without a gap; the SDK subscribes again with its position. |\n| 2501 | A fault on this subscription that may pass by itself; the SDK subscribes again. |\n| 2000 | The server ended the subscription, for example since the inbox was taken away; the SDK does not subscribe again. |\n";
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_ascending_and_never_empty() {
        let codes: Vec<u32> = ErrorCode::ALL.iter().map(|e| e.code()).collect();
        assert!(codes.windows(2).all(|w| w[0] < w[1]), "{codes:?}");
        let codes: Vec<u16> = Disconnect::ALL.iter().map(|e| e.code()).collect();
        assert!(codes.windows(2).all(|w| w[0] < w[1]), "{codes:?}");
        assert!(ErrorCode::ALL.iter().all(|e| !e.name().is_empty() && !e.meaning().is_empty()));
        assert!(Disconnect::ALL.iter().all(|e| !e.reason().is_empty()));
    }

    #[test]
    fn a_message_is_the_name_and_one_object() {
        assert_eq!(CommandError::overloaded(250).message(), r#"overloaded {"retry_after_ms":250}"#);
        assert_eq!(CommandError::from(ErrorCode::Conflict).message(), "conflict");
    }
}
