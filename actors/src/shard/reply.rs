//! Whom to answer, here or at another node, and until when somebody waits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use patchbay_protocol::CommandError;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A caller's patience, counted from the node at which it asked, however many nodes its command crosses. Past it nothing
/// is begun any more, the outcome is unknown to the caller, and repeating with the same ids is safe.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whom to answer.
#[derive(Debug)]
pub struct ReplyTo<T> {
    to: To<T>,
    until: Instant,
}

#[derive(Debug)]
enum To<T> {
    Near(oneshot::Sender<Result<T, CommandError>>),
    Far(oneshot::Sender<Told<T>>, Round),
}

/// What becomes of a command that came from another node.
#[derive(Debug)]
pub enum Told<T> {
    /// Its answer.
    Answer(Result<T, CommandError>),
    /// It was not begun, and will not be here: whoever sent it sends it elsewhere.
    Elsewhere,
}

impl<T> From<oneshot::Sender<Result<T, CommandError>>> for ReplyTo<T> {
    fn from(to: oneshot::Sender<Result<T, CommandError>>) -> Self {
        Self { to: To::Near(to), until: Instant::now() + PATIENCE }
    }
}

impl<T> ReplyTo<T> {
    /// Who asks is at another node, sent this in that round, and waits until then.
    pub fn far(to: oneshot::Sender<Told<T>>, round: Round, until: Instant) -> Self {
        Self { to: To::Far(to, round), until }
    }

    /// Whether who asks is at another node.
    pub fn is_far(&self) -> bool {
        matches!(self.to, To::Far(..))
    }

    /// Until when somebody waits.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Whether nobody waits any more: then it is not begun.
    pub fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Tells it. The outcome comes back when nobody waits for it any more.
    pub fn send(self, outcome: Result<T, CommandError>) -> Result<(), Result<T, CommandError>> {
        match self.to {
            To::Near(to) => to.send(outcome),
            To::Far(to, _) => to.send(Told::Answer(outcome)).map_err(|told| match told {
                Told::Answer(outcome) => outcome,
                Told::Elsewhere => Err(CommandError::unavailable()),
            }),
        }
    }

    /// Tells whoever sent it from another node to send it elsewhere, and with it whatever it has sent since; who asks here
    /// hears that it was not done.
    pub fn elsewhere(self) {
        match self.to {
            To::Near(to) => drop(to.send(Err(CommandError::unavailable()))),
            To::Far(to, round) => {
                round.ends();
                // Whoever has stopped waiting has sent it elsewhere already.
                let _ = to.send(Told::Elsewhere);
            }
        }
    }
}

/// An answer that will come.
pub struct Answer<T>(oneshot::Receiver<Result<T, CommandError>>);

impl<T> Answer<T> {
    /// Waits for it. `unavailable` when the actor was lost or 30 s have passed.
    pub async fn wait(self) -> Result<T, CommandError> {
        match tokio::time::timeout(PATIENCE, self.0).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(CommandError::unavailable()),
        }
    }
}

impl<T> From<oneshot::Receiver<Result<T, CommandError>>> for Answer<T> {
    fn from(answer: oneshot::Receiver<Result<T, CommandError>>) -> Self {
        Self(answer)
    }
}

/// Which rounds of a sender are over, by shard. A sender that hears that one command is to go elsewhere sends everything
/// since again, in order, as another round; nothing of the round before is begun here meanwhile.
#[derive(Debug, Default)]
pub struct Rounds(Mutex<HashMap<u32, u64>>);

impl Rounds {
    /// Whether something of this round was told to go elsewhere. Round 0 is of a sender that does not count them.
    pub fn is_over(&self, shard: u32, round: u64) -> bool {
        let over = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        round > 0 && over.get(&shard).is_some_and(|last| round <= *last)
    }
}

/// One round of a sender.
#[derive(Clone, Debug)]
pub struct Round {
    /// Of which shard.
    pub shard: u32,
    /// Which.
    pub number: u64,
    /// That sender's.
    pub rounds: Arc<Rounds>,
}

impl Round {
    /// Something of it was told to go elsewhere.
    pub fn ends(&self) {
        let mut over = self.rounds.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = over.entry(self.shard).or_default();
        *last = self.number.max(*last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_goes_elsewhere_ends_its_round_and_those_before_of_its_shard_alone() {
        let rounds = Arc::<Rounds>::default();
        let reply = |number| {
            let (to, told) = oneshot::channel::<Told<()>>();
            let round = Round { shard: 3, number, rounds: rounds.clone() };
            (ReplyTo::far(to, round, Instant::now() + PATIENCE), told)
        };
        let (answered, mut told) = reply(7);
        answered.send(Ok(())).unwrap();
        assert!(matches!(told.try_recv(), Ok(Told::Answer(Ok(())))));
        assert!(!rounds.is_over(3, 7));
        let (goes, mut told) = reply(7);
        goes.elsewhere();
        // It is over before anybody can have heard so.
        assert!(rounds.is_over(3, 7) && rounds.is_over(3, 6));
        assert!(matches!(told.try_recv(), Ok(Told::Elsewhere)));
        assert!(!rounds.is_over(3, 8) && !rounds.is_over(4, 7));
        // What comes late of a round before ends no later one.
        reply(5).0.elsewhere();
        assert!(rounds.is_over(3, 7) && !rounds.is_over(3, 8));
        assert!(!rounds.is_over(3, 0), "whoever counts none is not held by them");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_counts_from_where_it_was_asked() {
        let (to, _told) = oneshot::channel::<Result<(), CommandError>>();
        let reply = ReplyTo::from(to);
        tokio::time::advance(PATIENCE - std::time::Duration::from_millis(1)).await;
        assert!(!reply.is_late());
        tokio::time::advance(std::time::Duration::from_millis(1)).await;
        assert!(reply.is_late());
    }
}
