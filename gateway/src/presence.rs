//! Which agents are there, as hints for lists: never an agent's own word, which its actor has.
//!
//! A node knows whom it serves. Through Redis it tells the others, again and again while it lasts, so that what a lost
//! node has said ends by itself. Without Redis, or while that is away, who is not here is not known.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use patchbay_actors::agent::{AgentCommand, Presence};
use patchbay_actors::node::Node;
use patchbay_actors::router::Router as _;
use patchbay_protocol::ids::{AgentId, TenantId};
use patchbay_storage::redis::Redis;
use tokio::sync::mpsc;

/// A hint ends after this, unless it is renewed.
const HINT_LASTS: Duration = Duration::from_secs(60);
/// How long an agent elsewhere is waited for.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often hints are renewed.
const RENEW_PAUSE: Duration = Duration::from_secs(20);
/// Hints that are told and not written; past it others hear of it by the next renewal.
const HINTS_MAX: usize = 1_024;

type Who = (TenantId, AgentId);

struct Shared {
    redis: Arc<Redis>,
    told: mpsc::Sender<(Who, Presence)>,
}

/// What is known of agents. One that is not here is offline as far as this node knows.
#[derive(Default)]
pub struct Presences {
    here: Mutex<HashMap<Who, Presence>>,
    shared: OnceLock<Shared>,
    node: OnceLock<Weak<Node>>,
}

impl Presences {
    fn here(&self) -> MutexGuard<'_, HashMap<Who, Presence>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says where agents are asked that are elsewhere and that nobody has told of; once.
    pub fn set_node(&self, node: &Arc<Node>) {
        let _ = self.node.set(Arc::downgrade(node));
    }

    /// Asks agents themselves.
    async fn ask(
        &self,
        tenant: &TenantId,
        agents: &[AgentId],
        here: Vec<Option<Presence>>,
    ) -> Vec<Option<Presence>> {
        let node = self.node.get().and_then(Weak::upgrade).filter(|node| !node.is_alone());
        let Some(node) = node else {
            return here.into_iter().map(|state| Some(state.unwrap_or(Presence::Offline))).collect();
        };
        let asks = agents.iter().zip(here).map(async |(agent, here)| match here {
            Some(_) => here,
            None => {
                let answer = node.agent(tenant, agent, AgentCommand::Get).ok()?;
                // One that is not heard of soon is not known.
                let answer = tokio::time::timeout(ASK_TIMEOUT, answer.wait()).await;
                answer.ok()?.ok().map(|reply| reply.state)
            }
        });
        futures_util::future::join_all(asks).await
    }

    /// Tells other nodes, and hears of theirs; once.
    pub fn share(self: &Arc<Self>, redis: Arc<Redis>) {
        let (told, hints) = mpsc::channel(HINTS_MAX);
        if self.shared.set(Shared { redis: redis.clone(), told }).is_ok() {
            tokio::spawn(tell(self.clone(), redis, hints));
        }
    }

    /// An agent of this node came, went, or says something else.
    pub fn set(&self, tenant: &TenantId, agent: &AgentId, state: Presence) {
        let who = (tenant.clone(), agent.clone());
        match state {
            Presence::Online | Presence::Away => self.here().insert(who.clone(), state),
            Presence::Offline => self.here().remove(&who),
        };
        if let Some(shared) = self.shared.get() {
            let _ = shared.told.try_send((who, state));
        }
    }

    /// An agent is another node's now, which tells.
    pub fn forget(&self, tenant: &TenantId, agent: &AgentId) {
        self.here().remove(&(tenant.clone(), agent.clone()));
    }
}

/// Writes what is told, and everything again before it ends.
async fn tell(presences: Arc<Presences>, redis: Arc<Redis>, mut hints: mpsc::Receiver<(Who, Presence)>) {
    let mut renewals = tokio::time::interval(RENEW_PAUSE);
    loop {
        let now: Vec<(Who, Presence)> = tokio::select! {
            hint = hints.recv() => hint.into_iter().collect(),
            _ = renewals.tick() => presences.here().iter().map(|(who, state)| (who.clone(), *state)).collect(),
        };
        for ((tenant, agent), state) in now {
            // What is not written now is renewed.
            if redis.hint_presence(&tenant, agent.as_str(), state.as_str(), HINT_LASTS).await.is_err() {
                break;
            }
        }
    }
}

#[async_trait]
impl patchbay_admin_api::Presences for Presences {
    async fn hints(&self, tenant: &TenantId, agents: &[AgentId]) -> Vec<Option<Presence>> {
        let here: Vec<Option<Presence>> = {
            let here = self.here();
            agents.iter().map(|agent| here.get(&(tenant.clone(), agent.clone())).copied()).collect()
        };
        let Some(shared) = self.shared.get() else {
            return self.ask(tenant, agents, here).await;
        };
        let names: Vec<&str> = agents.iter().map(AgentId::as_str).collect();
        match shared.redis.presence_hints(tenant, &names).await {
            Ok(said) => here
                .into_iter()
                .zip(said)
                .map(|(here, said)| here.or(Some(said.as_deref().map_or(Presence::Offline, Presence::named))))
                .collect(),
            Err(_) => here,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use patchbay_admin_api::Presences as _;

    #[tokio::test]
    async fn whoever_is_not_here_is_offline_where_there_is_nobody_else_to_ask() {
        let presences = Presences::default();
        let (tenant, anna, ben): (TenantId, AgentId, AgentId) =
            ("acme".parse().unwrap(), "anna".parse().unwrap(), "ben".parse().unwrap());
        presences.set(&tenant, &anna, Presence::Away);
        let hints = |agents: [AgentId; 2]| {
            let (presences, tenant) = (&presences, &tenant);
            async move { presences.hints(tenant, &agents).await }
        };
        let both = [anna.clone(), ben];
        assert_eq!(hints(both.clone()).await, [Some(Presence::Away), Some(Presence::Offline)]);
        presences.set(&tenant, &anna, Presence::Offline);
        assert_eq!(hints(both).await, [Some(Presence::Offline); 2]);
        assert!(presences.here().is_empty());
    }
}
