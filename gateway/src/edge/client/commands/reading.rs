//! Reading a conversation's log as a subscription sees it: whole, or as a visitor does, with gaps in its offsets.

use bytes::Bytes;
use patchbay_actors::desk::{PAGE_ENTRIES_MAX, Page};
use patchbay_protocol::CommandError;
use patchbay_protocol::ids::{ConversationId, TenantId};

use super::super::Sockets;
use crate::hub::{View, view};

/// Entries that one read for a visitor looks at, seen or not.
const LOOKED_AT_MAX: u64 = 5_000;

/// A conversation as somebody sees it.
pub(super) struct Reading<'a> {
    /// Where to read.
    pub(super) sockets: &'a Sockets,
    /// What.
    pub(super) id: ConversationId,
    /// As whom.
    pub(super) view: &'a View,
}

/// Entries, and how far they cover the log in the direction that was read.
pub(super) struct Found {
    /// (seq, entry), in the order that was read.
    pub(super) entries: Vec<(u64, Bytes)>,
    /// The last seq that was looked at.
    pub(super) covered: u64,
}

impl Reading<'_> {
    /// Entries of a page, bounded by a tip that the owner has said.
    pub(super) async fn page(
        &self,
        page: Page,
        tip: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Found, CommandError> {
        let start = match page {
            Page::After(seq) => seq,
            Page::Before(seq) => seq.unwrap_or(u64::MAX).min(tip + 1),
        };
        match self.view {
            View::Whole => {
                let entries = self.read(page, tip, limit, bytes_max).await?;
                let covered = entries.last().map_or(start, |(seq, _)| *seq);
                Ok(Found { entries, covered })
            }
            View::Contact(tenant) => self.page_for_contact(tenant, page, start, tip, limit, bytes_max).await,
        }
    }

    async fn read(
        &self,
        page: Page,
        tip: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<(u64, Bytes)>, CommandError> {
        let found = self.sockets.desk.read(self.id, page, tip, limit, bytes_max).await;
        found.map(|f| f.entries).map_err(|_| CommandError::unavailable())
    }

    async fn page_for_contact(
        &self,
        tenant: &TenantId,
        page: Page,
        start: u64,
        tip: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Found, CommandError> {
        let mut found = Found { entries: Vec::new(), covered: start };
        let (mut bytes, mut looked_at) = (0, 0);
        while found.entries.len() < limit && looked_at < LOOKED_AT_MAX {
            let next = match page {
                Page::After(_) => Page::After(found.covered),
                Page::Before(_) => Page::Before(Some(found.covered)),
            };
            let rows = self.read(next, tip, PAGE_ENTRIES_MAX, bytes_max).await?;
            if rows.is_empty() {
                break;
            }
            looked_at += rows.len() as u64;
            for (seq, entry) in rows {
                let Some(seen) = self.for_contact(tenant, &entry).await? else {
                    found.covered = seq;
                    continue;
                };
                let full = found.entries.len() == limit || bytes + seen.len() > bytes_max;
                if full && !found.entries.is_empty() {
                    return Ok(found);
                }
                bytes += seen.len();
                found.covered = seq;
                found.entries.push((seq, seen));
            }
        }
        Ok(found)
    }

    async fn for_contact(&self, tenant: &TenantId, entry: &[u8]) -> Result<Option<Bytes>, CommandError> {
        if let Some(agent) = view::agent_of(entry) {
            // From here on its name is at hand.
            self.sockets.desk.node().directory().agent(tenant, &agent).await?;
        }
        Ok(view::for_contact(entry, |agent| self.sockets.hub.name(tenant, agent)))
    }
}
