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
//! What has a number cannot be made smaller any more. So a window gets one only while all that have one stay within
//! the limit, or when none has, however large it is. The ring takes no more than its limit and one window, or two
//! windows where one is larger than the limit.
//!
//! All that has a number was measured as one [`Build`]. Windows of another wait at the *turn*, until
//! everything before them is durable; then numbers and totals begin anew. So no two builds are in one
//! row of numbers, none of their windows become one, and a gap is declared by a batch of the build that
//! has it: the last window that a build has before a turn is not dropped, but loses its rows.
//!
//! Invariant ("conservation"): the sums of all rows of all batches since the last turn up to a number,
//! and of all gaps that they declare, are the cumulative totals of the batch with that number.

use std::{collections::VecDeque, sync::Arc};

use coalmine_proto::v1;

use crate::window::{Build, Row, Sums, Window};

/// Windows are not merged into longer ones than this: a longer one would hide when things happened.
pub const MAX_MERGED_MS: u32 = 60_000;

/// So many turns may wait. Labels change seldom; should they change each second while there is no
/// aggregator, what cannot be dropped any more must not grow without bound.
const MAX_TURNS: usize = 64;

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

/// A window without a number.
#[derive(Debug)]
struct Unsent {
    window: Window,
    /// What it was measured as.
    build: Arc<Build>,
    /// What was dropped of the same build since the window before; its batch declares it.
    gap: Option<v1::Gap>,
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    limit_bytes: usize,
    bytes: usize,
    /// Of these, what the batches take that have a number.
    sent_bytes: usize,
    /// What everything that has a number was measured as.
    build: Arc<Build>,
    sent: VecDeque<Batch>,
    unsent: VecDeque<Unsent>,
    next_seq: u64,
    /// The number of the next batch to send in this session.
    cursor: u64,
    durable: u64,
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
    /// An empty ring that may take this many bytes; the first windows will be measured as this build.
    pub fn new(limit_bytes: usize, build: Arc<Build>) -> Self {
        Self {
            limit_bytes,
            bytes: 0,
            sent_bytes: 0,
            build,
            sent: VecDeque::new(),
            unsent: VecDeque::new(),
            next_seq: 1,
            cursor: 1,
            durable: 0,
            totals: v1::Totals::default(),
            stats: Stats::default(),
        }
    }

    /// Adds a closed window, and what it was measured as.
    pub fn push(&mut self, window: Window, build: Arc<Build>) {
        self.bytes += window.bytes();
        let is_turn = self.unsent.back().is_some_and(|last| last.build != build);
        self.unsent.push_back(Unsent {
            window,
            build,
            gap: None,
        });
        if is_turn && self.turns() > MAX_TURNS {
            self.forget_oldest_turn();
        }
        while self.bytes > self.limit_bytes && self.shrink() {}
    }

    /// What everything that has a number was measured as, and the next to get one until the next turn.
    pub fn build(&self) -> &Build {
        &self.build
    }

    /// Whether nothing can be numbered, and all that was is durable, because the next window is of another
    /// build.
    pub fn is_at_turn(&self) -> bool {
        self.sent.is_empty() && self.unsent.front().is_some_and(|next| next.build != self.build)
    }

    /// At a turn, begins anew with number 1 and the build of the next window; says whether it was one.
    pub fn turn(&mut self) -> bool {
        let next = self.unsent.front().filter(|_| self.is_at_turn());
        let Some(build) = next.map(|next| Arc::clone(&next.build)) else {
            return false;
        };
        self.build = build;
        (self.next_seq, self.cursor, self.durable) = (1, 1, 0);
        self.totals = v1::Totals::default();
        true
    }

    /// What all batches and windows take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Batches and windows that are not durable.
    pub fn len(&self) -> usize {
        self.sent.len() + self.unsent.len()
    }

    /// Whether everything is durable.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Requests in what is not durable.
    pub fn requests(&self) -> u64 {
        let sent = self.sent.iter().map(|batch| batch.window.sums());
        let unsent = self.unsent.iter().map(|unsent| unsent.window.sums());
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
                let bytes = batch.window.bytes();
                self.bytes -= bytes;
                self.sent_bytes -= bytes;
            }
        }
        self.durable = self.durable.max(durable);
        Ok(())
    }

    /// The next batch to send; numbers the oldest unsent window if all others were sent. None before a turn, and
    /// while what was sent leaves no room.
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
        let oldest = self.unsent.front().filter(|oldest| oldest.build == self.build)?;
        let fitting = rows_that_fit(&oldest.window, max_bytes);
        let together = self.sent_bytes + bytes_before(&oldest.window, fitting);
        if together > self.limit_bytes && !self.sent.is_empty() {
            return None;
        }
        let Unsent {
            mut window,
            build,
            gap,
        } = self.unsent.pop_front()?;
        let bytes = window.bytes();
        if fitting < window.rows.len() {
            let rest = window.split_off(fitting);
            // The remainder is a window of its own, with a frame of its own.
            self.bytes += window.bytes() + rest.bytes() - bytes;
            self.unsent.push_front(Unsent {
                window: rest,
                build,
                gap: None,
            });
        }
        let sums = window.sums();
        self.totals.requests = self.totals.requests.saturating_add(sums.requests);
        self.totals.errors = self.totals.errors.saturating_add(sums.errors);
        if let Some(gap) = &gap {
            self.totals.requests = self.totals.requests.saturating_add(gap.requests);
            self.totals.errors = self.totals.errors.saturating_add(gap.errors);
            self.totals.gap_requests = self.totals.gap_requests.saturating_add(gap.requests);
        }
        self.sent_bytes += window.bytes();
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

    /// Each unsent window with the one that follows it.
    fn pairs(&self) -> impl Iterator<Item = (&Unsent, &Unsent)> {
        self.unsent.iter().zip(self.unsent.iter().skip(1))
    }

    /// The oldest of the pairs of neighbours that are shortest together, if it is not too long.
    fn shortest_pair(&self) -> Option<usize> {
        self.pairs()
            .enumerate()
            .filter(|(_, (one, next))| one.build == next.build)
            .map(|(at, (one, next))| (at, one.window.length_ms.saturating_add(next.window.length_ms)))
            .filter(|(_, together)| *together <= MAX_MERGED_MS)
            .min_by_key(|(_, together)| *together)
            .map(|(at, _)| at)
    }

    fn merge(&mut self, at: usize) -> bool {
        let Some(next) = self.unsent.remove(at + 1) else {
            return false;
        };
        if let Some(Unsent { window, gap, .. }) = self.unsent.get_mut(at) {
            self.bytes -= window.bytes() + next.window.bytes();
            window.merge(next.window);
            self.bytes += window.bytes();
            *gap = joined(gap.take(), next.gap);
            self.stats.merged_windows += 1;
        }
        true
    }

    /// Drops the rows of the oldest window that has any to give up, and the window too unless it is the last of
    /// its build before a turn. The newest of all stays, whatever it takes.
    fn drop_oldest(&mut self) -> bool {
        let oldest = self.pairs().enumerate().find_map(|(at, (one, next))| {
            let is_followed = one.build == next.build;
            let has_more_than_time = !(one.window.rows.is_empty() && one.window.pools.is_empty());
            (is_followed || has_more_than_time).then_some((at, is_followed))
        });
        let Some((at, is_followed)) = oldest else {
            return false;
        };
        let Some(dropped) = self.unsent.get_mut(at) else {
            return false;
        };
        let before = dropped.window.bytes();
        let gap = dropped.give_up();
        self.stats.gap_requests = self.stats.gap_requests.saturating_add(gap.requests);
        let gap = joined(dropped.gap.take(), Some(gap));
        if is_followed {
            self.bytes -= before;
            drop(self.unsent.remove(at));
            // The window that followed has its place now.
            if let Some(next) = self.unsent.get_mut(at) {
                next.gap = joined(gap, next.gap.take());
            }
        } else {
            self.bytes -= before - dropped.window.bytes();
            dropped.gap = gap;
        }
        true
    }

    /// How many turns wait.
    fn turns(&self) -> usize {
        self.pairs().filter(|(one, next)| one.build != next.build).count()
    }

    /// Drops everything before the oldest turn. There is no batch of its build left that could declare it.
    fn forget_oldest_turn(&mut self) {
        let Some(build) = self.unsent.front().map(|oldest| Arc::clone(&oldest.build)) else {
            return;
        };
        let mut requests = 0_u64;
        while self.unsent.front().is_some_and(|oldest| oldest.build == build) {
            if let Some(Unsent { window, .. }) = self.unsent.pop_front() {
                self.bytes -= window.bytes();
                requests = requests.saturating_add(window.sums().requests);
            }
        }
        self.stats.gap_requests = self.stats.gap_requests.saturating_add(requests);
        tracing::error!(
            requests,
            arm = %build.arm,
            version = build.version,
            "arm or version have changed too often without an aggregator; the oldest windows are lost"
        );
    }
}

impl Unsent {
    /// Gives up all but its time; gives what is missing then.
    fn give_up(&mut self) -> v1::Gap {
        let window = &mut self.window;
        let sums = window.sums();
        // Not cleared: their memory goes too.
        window.rows = Vec::new();
        window.pools = Vec::new();
        v1::Gap {
            windows: 1,
            requests: sums.requests,
            errors: sums.errors,
            start_unix_ms: window.start_unix_ms,
            end_unix_ms: window.end_unix_ms(),
        }
    }
}

/// Two gaps as one.
fn joined(earlier: Option<v1::Gap>, later: Option<v1::Gap>) -> Option<v1::Gap> {
    let (Some(one), Some(next)) = (earlier, later) else {
        return earlier.or(later);
    };
    Some(v1::Gap {
        windows: one.windows.saturating_add(next.windows),
        requests: one.requests.saturating_add(next.requests),
        errors: one.errors.saturating_add(next.errors),
        start_unix_ms: one.start_unix_ms,
        end_unix_ms: next.end_unix_ms,
    })
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

/// What the window takes without the rows from this one on.
fn bytes_before(window: &Window, at: usize) -> usize {
    let rest = window.rows.iter().skip(at).map(Row::bytes);
    window.bytes() - rest.sum::<usize>()
}

#[cfg(test)]
mod tests;
