//! Which sockets of agents are open on this node, for whoever owns those agents.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use patchbay_protocol::ids::{AgentId, TenantId};

type Which = (TenantId, AgentId, String);

/// Sockets that closed and could not be told of; past it their sessions end with this node.
const UNTOLD_MAX: usize = 100_000;

#[derive(Default)]
struct Inner {
    open: HashSet<Which>,
    /// Open, and told of under another incarnation than this node is now.
    unknown: HashSet<Which>,
    untold: HashSet<Which>,
}

/// Which sockets of agents are open on this node.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<Inner>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn opened(&self, tenant: &TenantId, agent: &AgentId, connection: &str) {
        self.lock().open.insert((tenant.clone(), agent.clone(), connection.to_owned()));
    }

    pub(crate) fn closed(&self, tenant: &TenantId, agent: &AgentId, connection: &str) {
        let which = (tenant.clone(), agent.clone(), connection.to_owned());
        let mut inner = self.lock();
        inner.open.remove(&which);
        inner.unknown.remove(&which);
        if inner.untold.len() < UNTOLD_MAX {
            inner.untold.insert(which);
        }
    }

    /// The agent's owner knows that it closed.
    pub(crate) fn told(&self, tenant: &TenantId, agent: &AgentId, connection: &str) {
        self.lock().untold.remove(&(tenant.clone(), agent.clone(), connection.to_owned()));
    }

    /// Every open socket has to be told of again.
    pub(crate) fn are_unknown(&self) {
        let inner = &mut *self.lock();
        inner.unknown.clone_from(&inner.open);
    }

    /// The agent's owner knows that it is open, and under which incarnation.
    pub(crate) fn known(&self, tenant: &TenantId, agent: &AgentId, connection: &str) {
        self.lock().unknown.remove(&(tenant.clone(), agent.clone(), connection.to_owned()));
    }

    pub(crate) fn unknown(&self) -> Vec<Which> {
        self.lock().unknown.iter().cloned().collect()
    }

    pub(crate) fn untold(&self) -> Vec<Which> {
        self.lock().untold.iter().cloned().collect()
    }
}
