//! An agent as the book knows it.

use std::{collections::VecDeque, hash::BuildHasher as _};

use coalmine_proto::v1::Totals;

use super::{Batch, BookError, Build, Introduction, context::Said};

/// So many batches of an agent are known well enough to notice that one comes again with another content.
const RECENT: usize = 64;

/// An agent, from its first Hello on.
#[derive(Debug, Clone)]
pub struct Agent {
    /// What it measures.
    pub build: Build,
    /// The life of its process.
    pub epoch: u64,
    /// The last batch that was applied.
    pub applied_seq: u64,
    /// The last batch that is on disk.
    pub durable_seq: u64,
    /// The session that may send; an older one is superseded.
    pub session: u64,
    /// Whether the session's stream is open.
    pub connected: bool,
    /// Whether it said Bye.
    pub gone: bool,
    pub(super) first_start_ms: u64,
    pub(super) sealed_until_ms: u64,
    /// A time of which not all is here. Between the last window of an earlier life that ended without Bye and the first
    /// of this one, what was counted and not sent is lost; and what is in windows without a time is in no slot.
    pub(super) hole: Option<(u64, u64)>,
    pub(super) last_seen_ms: u64,
    /// Whether what this epoch sent to an earlier data directory is known: not so at first if it had sent any.
    pub(super) based: bool,
    pub(super) applied: Totals,
    pub(super) gap_requests: u64,
    pub(super) gap_errors: u64,
    /// The last batches: number and a hash of the content.
    pub(super) recent: VecDeque<(u64, u64)>,
    /// What it said last of its pod and its pools.
    pub(super) said: Said,
}

impl Agent {
    pub(super) fn new(who: &Introduction) -> Self {
        Self {
            build: who.build.clone(),
            epoch: who.epoch,
            applied_seq: who.first_seq.saturating_sub(1),
            durable_seq: who.first_seq.saturating_sub(1),
            session: 0,
            connected: false,
            gone: false,
            first_start_ms: 0,
            sealed_until_ms: 0,
            hole: None,
            last_seen_ms: 0,
            based: who.first_seq <= 1,
            applied: Totals::default(),
            gap_requests: 0,
            gap_errors: 0,
            recent: VecDeque::new(),
            said: Said::default(),
        }
    }

    /// Remembers a batch that was applied.
    pub(super) fn remember(&mut self, batch: &Batch<'_>) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((batch.seq, content_hash(batch)));
    }

    /// Takes note of the time of a batch that was applied.
    pub(super) fn reach(&mut self, batch: &Batch<'_>) {
        if batch.is_undated() {
            return self.lose_track();
        }
        self.said.hear(batch);
        if self.first_start_ms == 0 {
            self.first_start_ms = batch.start_ms;
        }
        if let Some((from, u64::MAX)) = self.hole {
            self.hole = (from < batch.start_ms).then_some((from, batch.start_ms));
        }
        let end_ms = batch.start_ms.saturating_add(u64::from(batch.length_ms));
        self.sealed_until_ms = self.sealed_until_ms.max(end_ms);
    }

    /// From the end of the last window that has a time to the start of the next, the slots have not all of this agent.
    /// A hole that is there already becomes longer: it may not be judged yet.
    fn lose_track(&mut self) {
        if self.sealed_until_ms > 0 {
            let from = self.hole.map_or(self.sealed_until_ms, |(from, _)| from);
            self.hole = Some((from, u64::MAX));
        }
    }

    /// Refuses a batch that was applied before with another content, as far as that is known.
    pub(super) fn recognise(&self, batch: &Batch<'_>) -> Result<(), BookError> {
        if batch.rows.is_empty() && batch.pools.is_empty() {
            // As it is stored again, for the names that it brings.
            return Ok(());
        }
        let before = self.recent.iter().find(|(seq, _)| *seq == batch.seq);
        match before {
            Some((seq, hash)) if *hash != content_hash(batch) => Err(BookError::Changed(*seq)),
            _ => Ok(()),
        }
    }

    /// Whether its stream is open and it spoke within the last `silent_ms`.
    pub fn is_alive(&self, now_ms: u64, silent_ms: u64) -> bool {
        self.connected && self.last_seen_ms + silent_ms >= now_ms
    }

    /// Whether something that the agent counted in a slot may not be in it.
    pub(super) fn has_hole(&self, start_ms: u64, end_ms: u64) -> bool {
        self.hole.is_some_and(|(from, to)| from < end_ms && start_ms < to)
    }

    /// Whether all that the agent will say about a slot that ends at `end_ms` is here.
    pub(super) fn has_reported(&self, end_ms: u64) -> bool {
        self.gone || self.sealed_until_ms >= end_ms
    }
}

/// A hash of what a batch says, the same in this process for the same content. The length is not in it: whether the
/// window has a time may be decided otherwise when it comes again.
fn content_hash(batch: &Batch<'_>) -> u64 {
    let rows = batch.rows.iter().map(|row| {
        let latency = row.latency.map(|latency| {
            (
                latency.offset,
                &latency.counts,
                latency.underflow,
                latency.overflow,
                latency.sum_ns,
            )
        });
        (row.tenant, row.outcomes.0, latency, row.limit_us, row.over)
    });
    let rows: Vec<_> = rows.collect();
    foldhash::fast::FixedState::default().hash_one((batch.start_ms, rows, batch.pools))
}
