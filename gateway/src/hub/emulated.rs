//! Sessions of clients without a socket of their own: what they send finds them by a word that only they know.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use patchbay_protocol::{CommandError, ErrorCode};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

/// What whoever sends too fast is told to wait.
const RETRY_AFTER_MS: u64 = 1000;

/// Every session here, and where its commands go.
#[derive(Default)]
pub struct EmulatedSessions(Mutex<HashMap<String, Sender<Bytes>>>);

/// A session, for as long as this is kept.
pub struct Registered {
    name: String,
    sessions: Arc<EmulatedSessions>,
}

impl Registered {
    /// The word for it: 128 random bits.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.sessions.lock().remove(&self.name);
    }
}

impl EmulatedSessions {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Sender<Bytes>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one.
    pub fn register(self: &Arc<Self>, commands: Sender<Bytes>) -> Registered {
        let name = format!("{:032x}", rand::random::<u128>());
        self.lock().insert(name.clone(), commands);
        Registered { name, sessions: self.clone() }
    }

    /// Hands a session a frame of commands.
    ///
    /// # Errors
    /// `not_found` when there is none, or none any more; `overloaded` when it has too much unread.
    pub fn hand(&self, name: &str, frame: Bytes) -> Result<(), CommandError> {
        let found = self.lock().get(name).map(|to| to.try_send(frame));
        match found {
            Some(Ok(())) => Ok(()),
            Some(Err(TrySendError::Full(_))) => Err(CommandError::overloaded(RETRY_AFTER_MS)),
            Some(Err(TrySendError::Closed(_))) | None => Err(ErrorCode::NotFound.into()),
        }
    }
}
