//! What an error says of a write: not applied, or unknown. And which errors say that the store has too much to do.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use scylla::errors::{DbError, ExecutionError, RequestAttemptError, RequestError};
use scylla::observability::history::{AttemptId, HistoryListener, RequestId, SpeculativeId};
use scylla::policies::retry::RetryDecision;

use crate::engine::WriteError;

/// Counts what leaves the node for one request: a refusal proves something only of the attempt that it answers.
#[derive(Debug, Default)]
pub(super) struct Attempts(AtomicUsize);

impl Attempts {
    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl HistoryListener for Attempts {
    fn log_request_start(&self) -> RequestId {
        RequestId(0)
    }

    fn log_request_success(&self, _: RequestId) {}

    fn log_request_error(&self, _: RequestId, _: &RequestError) {}

    fn log_new_speculative_fiber(&self, _: RequestId) -> SpeculativeId {
        metrics::counter!("patchbay_storage_speculations_total").increment(1);
        SpeculativeId(0)
    }

    fn log_attempt_start(&self, _: RequestId, _: Option<SpeculativeId>, _: SocketAddr) -> AttemptId {
        AttemptId(self.0.fetch_add(1, Ordering::AcqRel))
    }

    fn log_attempt_success(&self, _: AttemptId) {}

    fn log_attempt_error(&self, _: AttemptId, _: &RequestAttemptError, _: &RetryDecision) {}
}

/// What a failed write means when `attempts` have left the node for it.
pub(super) fn of_write(error: &ExecutionError, attempts: usize) -> WriteError {
    let refused = match attempts {
        0 => !matches!(error, ExecutionError::RequestTimeout(_)),
        // A twin that was refused says nothing of the other.
        1 => matches!(error, ExecutionError::LastAttemptError(e) if is_refusal(e)),
        _ => false,
    };
    if refused { WriteError::Refused } else { WriteError::Unknown }
}

/// Whether the coordinator says that it has not begun.
fn is_refusal(error: &RequestAttemptError) -> bool {
    match error {
        RequestAttemptError::SerializationError(_)
        | RequestAttemptError::CqlRequestSerialization(_)
        | RequestAttemptError::UnableToAllocStreamId => true,
        RequestAttemptError::DbError(error, _) => matches!(
            error,
            DbError::SyntaxError
                | DbError::Invalid
                | DbError::Unauthorized
                | DbError::ConfigError
                | DbError::Unavailable { .. }
                | DbError::IsBootstrapping
        ),
        _ => false,
    }
}

/// Whether the store has too much to do, or gave no answer in time.
pub(super) fn is_overload(error: &ExecutionError) -> bool {
    match error {
        ExecutionError::RequestTimeout(_) => true,
        ExecutionError::LastAttemptError(RequestAttemptError::DbError(error, _)) => matches!(
            error,
            DbError::Overloaded
                | DbError::WriteTimeout { .. }
                | DbError::ReadTimeout { .. }
                | DbError::RateLimitReached { .. }
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use scylla::statement::Consistency;

    use super::*;

    fn answered(error: DbError) -> ExecutionError {
        ExecutionError::LastAttemptError(RequestAttemptError::DbError(error, String::new()))
    }

    fn unavailable() -> DbError {
        DbError::Unavailable { consistency: Consistency::LocalQuorum, required: 2, alive: 1 }
    }

    #[test]
    fn a_refusal_proves_something_only_of_a_lone_attempt() {
        assert_eq!(of_write(&answered(unavailable()), 1), WriteError::Refused);
        assert_eq!(of_write(&answered(unavailable()), 2), WriteError::Unknown, "its twin may be applied");
        assert_eq!(
            of_write(&answered(DbError::Overloaded), 1),
            WriteError::Unknown,
            "some replica may have it"
        );
        assert_eq!(of_write(&answered(DbError::ServerError), 1), WriteError::Unknown);
        let late = ExecutionError::RequestTimeout(std::time::Duration::from_secs(1));
        assert_eq!((of_write(&late, 0), of_write(&late, 1)), (WriteError::Unknown, WriteError::Unknown));
        assert_eq!(of_write(&ExecutionError::EmptyPlan, 0), WriteError::Refused, "nothing has left");
        assert!(is_overload(&late) && is_overload(&answered(DbError::Overloaded)));
        assert!(!is_overload(&answered(unavailable())));
    }
}
