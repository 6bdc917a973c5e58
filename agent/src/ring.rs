//! Keeps closed windows until the aggregator has them on disk, in a bounded number of bytes.
//!
//! ```text
//!        freed            sent (numbered)              unsent (no number yet)
//!   ... | durable |  seq 7 | seq 8 | seq 9 |  window | window | window | <- push
//!                     ^ cursor: the next to send in this session
//! ```
//!
//! A window gets its sequence number when it is first sent, and does not change after that. What is
//! unsent may still change: when the ring is over its limit, the pair of unsent neighbours that is
//! shortest together becomes one longer window, oldest first; nothing is lost but resolution. Only when
//! each pair would be longer than [`MAX_MERGED_MS`] is the oldest unsent window dropped, and the next
//! batch declares the gap.
//!
//! Invariant ("conservation"): the sums of all rows of all batches up to a number, and of all gaps that
//! they declare, are the cumulative totals of the batch with that number.

use std::collections::VecDeque;

use coalmine_proto::v1;

use crate::window::{Sums, Window};

/// Windows are not merged into longer ones than this: a longer one would hide when things happened.
pub const MAX_MERGED_MS: u32 = 60_000;

/// A window with its number, which does not change any more.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The sequence number.
    pub seq: u64,
    /// The window, or a part of it when it was too large for a message.
    pub window: Window,
    /// Sums of everything up to the end of this batch.
    pub cumulative: v1::Totals,
    /// What was dropped since the batch before.
    pub gap: Option<v1::Gap>,
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    limit_bytes: usize,
    bytes: usize,
    sent: VecDeque<Batch>,
    unsent: VecDeque<Window>,
    next_seq: u64,
    /// The number of the next batch to send in this session.
    cursor: u64,
    durable: u64,
    gap: Option<v1::Gap>,
    totals: v1::Totals,
    stats: Stats,
}

/// What the ring did, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Windows that were merged into their neighbour.
    pub merged_windows: u64,
    /// Requests in windows that were dropped.
    pub gap_requests: u64,
}

/// The aggregator acknowledged what it cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the aggregator acknowledged batch {acknowledged}, but only {sent} were sent; is another agent using the same --instance?"
)]
pub struct BadAck {
    acknowledged: u64,
    sent: u64,
}

impl Ring {
    /// An empty ring that may take this many bytes.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            bytes: 0,
            sent: VecDeque::new(),
            unsent: VecDeque::new(),
            next_seq: 1,
            cursor: 1,
            durable: 0,
            gap: None,
            totals: v1::Totals::default(),
            stats: Stats::default(),
        }
    }

    /// Adds a closed window.
    pub fn push(&mut self, window: Window) {
        self.bytes += window.bytes();
        self.unsent.push_back(window);
        while self.bytes > self.limit_bytes && self.shrink() {}
    }

    /// What all batches and windows take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Batches and windows that are not durable.
    pub fn len(&self) -> usize {
        self.sent.len() + self.unsent.len()
    }

    /// Whether everything is durable. A gap that no batch has declared yet does not count.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Requests in what is not durable.
    pub fn requests(&self) -> u64 {
        let sent = self.sent.iter().map(|batch| batch.window.sums());
        let unsent = self.unsent.iter().map(Window::sums);
        sent.chain(unsent).fold(Sums::default(), Sums::plus).requests
    }

    /// What the ring did.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Number of the last batch that the aggregator has on disk.
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// Number of the oldest batch that is held; 0 when none is.
    pub fn oldest_seq(&self) -> u64 {
        self.sent.front().map_or(0, |batch| batch.seq)
    }

    /// The number that the next new batch gets.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Batches that were sent in this session and are not durable.
    pub fn in_flight(&self) -> u64 {
        self.cursor - 1 - self.durable
    }

    /// Begins a session in which everything up to `durable` need not be sent again.
    pub fn resume(&mut self, durable: u64) -> Result<(), BadAck> {
        self.cursor = self.next_seq;
        self.acknowledge(durable)?;
        self.cursor = self.durable + 1;
        Ok(())
    }

    /// Frees everything up to `durable`.
    pub fn acknowledge(&mut self, durable: u64) -> Result<(), BadAck> {
        if durable >= self.cursor {
            return Err(BadAck {
                acknowledged: durable,
                sent: self.cursor - 1,
            });
        }
        while self.sent.front().is_some_and(|batch| batch.seq <= durable) {
            if let Some(batch) = self.sent.pop_front() {
                self.bytes -= batch.window.bytes();
            }
        }
        self.durable = self.durable.max(durable);
        Ok(())
    }

    /// The next batch to send; numbers the oldest unsent window if all others were sent.
    ///
    /// A window of more than `max_bytes` is sent in parts, each a batch of its own; the last reaches to its end.
    pub fn next(&mut self, max_bytes: usize) -> Option<&Batch> {
        if self.cursor == self.next_seq {
            self.number_oldest(max_bytes)?;
        }
        let first = self.sent.front()?.seq;
        let at = usize::try_from(self.cursor.checked_sub(first)?).ok()?;
        let batch = self.sent.get(at)?;
        self.cursor += 1;
        Some(batch)
    }

    fn number_oldest(&mut self, max_bytes: usize) -> Option<()> {
        let mut window = self.unsent.pop_front()?;
        let bytes = window.bytes();
        let fitting = rows_that_fit(&window, max_bytes);
        if fitting < window.rows.len() {
            let rest = window.split_off(fitting);
            self.unsent.push_front(rest);
            // The remainder is a window of its own, with a frame of its own.
            self.bytes += window.bytes() + self.unsent.front().map_or(0, Window::bytes) - bytes;
        }
        let sums = window.sums();
        self.totals.requests = self.totals.requests.saturating_add(sums.requests);
        self.totals.errors = self.totals.errors.saturating_add(sums.errors);
        let gap = self.gap.take();
        if let Some(gap) = &gap {
            self.totals.requests = self.totals.requests.saturating_add(gap.requests);
            self.totals.errors = self.totals.errors.saturating_add(gap.errors);
            self.totals.gap_requests = self.totals.gap_requests.saturating_add(gap.requests);
        }
        self.sent.push_back(Batch {
            seq: self.next_seq,
            window,
            cumulative: self.totals,
            gap,
        });
        self.next_seq += 1;
        Some(())
    }

    /// Makes the ring smaller; false if nothing can be done, because everything has a number.
    fn shrink(&mut self) -> bool {
        match self.shortest_pair() {
            Some(at) => self.merge(at),
            None => self.drop_oldest(),
        }
    }

    /// The oldest of the pairs of neighbours that are shortest together, if it is not too long.
    fn shortest_pair(&self) -> Option<usize> {
        let lengths = self.unsent.iter().zip(self.unsent.iter().skip(1));
        lengths
            .map(|(one, next)| one.length_ms.saturating_add(next.length_ms))
            .enumerate()
            .filter(|(_, together)| *together <= MAX_MERGED_MS)
            .min_by_key(|(_, together)| *together)
            .map(|(at, _)| at)
    }

    fn merge(&mut self, at: usize) -> bool {
        let Some(next) = self.unsent.remove(at + 1) else {
            return false;
        };
        if let Some(window) = self.unsent.get_mut(at) {
            self.bytes -= window.bytes() + next.bytes();
            window.merge(next);
            self.bytes += window.bytes();
            self.stats.merged_windows += 1;
        }
        true
    }

    fn drop_oldest(&mut self) -> bool {
        // The newest stays, whatever it takes: it is what declares the gap.
        if self.unsent.len() < 2 {
            return false;
        }
        let Some(window) = self.unsent.pop_front() else {
            return false;
        };
        self.bytes -= window.bytes();
        let sums = window.sums();
        self.stats.gap_requests = self.stats.gap_requests.saturating_add(sums.requests);
        let gap = self.gap.get_or_insert(v1::Gap {
            start_unix_ms: window.start_unix_ms,
            ..v1::Gap::default()
        });
        gap.windows += 1;
        gap.requests = gap.requests.saturating_add(sums.requests);
        gap.errors = gap.errors.saturating_add(sums.errors);
        gap.end_unix_ms = window.end_unix_ms();
        true
    }
}

/// How many of the rows fit into one message; at least one.
fn rows_that_fit(window: &Window, max_bytes: usize) -> usize {
    let mut left = max_bytes.saturating_sub(window.frame_bytes());
    let fits = window.rows.iter().take_while(|row| {
        let bytes = row.wire_bytes();
        let fits = bytes <= left;
        left = left.saturating_sub(bytes);
        fits
    });
    fits.count().max(1)
}

#[cfg(test)]
mod tests;
