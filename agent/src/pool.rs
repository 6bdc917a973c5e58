//! The application's connection pools, by scraping the metrics that it exposes.
//!
//! No change of the application is needed where one of the libraries of `pool/sources.rs` speaks for its
//! pools; for others, `--pool-metric` names the metrics. Waits and timeouts are events, which the judge can
//! use like errors; the rest is the state at the time of the scrape.
//!
//! The way of a number: `scraper` (asks, with all limits), `exposition` (lines to samples), `mapping` with
//! `sources` (which samples say what), `reading` (numbers of one scrape), `counters` (what happened since the
//! scrape before), [`Pools`] (what happened since the window before).
//!
//! It is never the cause of trouble: one request at a time, over one connection that is kept; an application
//! that is slow is given up in time, and whatever it answers, memory is bounded.

mod counters;
mod exposition;
mod mapping;
mod reading;
mod scraper;
mod sources;
mod url;

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use coalmine_proto::{
    pool::{MAX_COUNT, MAX_POOLS, MAX_WAIT_NS},
    v1,
};

pub use mapping::{CustomMetric, Quantity, Source};
pub use reading::Reading;
pub use scraper::Scraper;
pub use url::ScrapeUrl;

use counters::Counters;
use mapping::Mapping;
use reading::Collector;

/// What one pool did in one window, and its state at the end of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// As the application calls it; empty where it has no name.
    pub name: String,
    /// Connections that were asked for; none where the application does not count them and nothing stands for
    /// them yet.
    pub acquires: Option<u64>,
    /// Whether the application does not count its acquires, so that requests that ended stand for them.
    pub acquires_estimated: bool,
    /// Of the acquires, how many had to wait.
    pub waits: u64,
    /// Whether there may have been more waits, because the application does not count them all.
    pub waits_at_least: bool,
    /// Of these, how many gave up.
    pub timeouts: u64,
    /// Nanoseconds that were waited.
    pub wait_ns: u64,
    /// Connections in use.
    pub used: u64,
    /// Connections that are open and not in use.
    pub idle: u64,
    /// Most connections that the pool may open; 0 where it is not known.
    pub max: u64,
    /// Callers that wait for a connection.
    pub waiters: u64,
}

/// What was scraped since the window before, between the one who scrapes and the one who closes windows.
#[derive(Debug, Default)]
pub struct Pools {
    state: Mutex<State>,
    scrapes: AtomicU64,
    failed_scrapes: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    counters: Counters,
    rows: Vec<PoolRow>,
}

/// What an exposition says about pools.
pub fn read(bytes: &[u8], custom: &[CustomMetric]) -> Vec<Reading> {
    let mapping = Mapping::new(custom);
    let mut collector = Collector::new(&mapping);
    let mut reader = exposition::Reader::default();
    reader.feed(bytes, &mut collector);
    reader.finish();
    collector.finish()
}

/// Adds the pools of the window that follows to those of the same names. The aggregator takes so many pools of
/// a window and no more: what happened at further ones is added to the last.
pub(crate) fn merge_pools(mine: &mut Vec<PoolRow>, next: Vec<PoolRow>) {
    for pool in next {
        let has_room = mine.len() < MAX_POOLS;
        if let Some(same) = mine.iter_mut().find(|same| same.name == pool.name) {
            same.add(&pool);
        } else if has_room {
            mine.push(pool);
        } else if let Some(last) = mine.last_mut() {
            last.add_events(&pool);
        }
    }
}

// === impl PoolRow ===

impl PoolRow {
    /// Adds what the pool did in the time that follows; the state is the later one.
    pub fn add(&mut self, next: &Self) {
        (self.used, self.idle) = (next.used, next.idle);
        (self.max, self.waiters) = (next.max, next.waiters);
        self.add_events(next);
    }

    /// Adds what happened at another pool, or at another time. A sum of acquires of which one part is not known
    /// is not known, and what is not all counted in one part is not all counted.
    pub(crate) fn add_events(&mut self, other: &Self) {
        let acquires = self.acquires.zip(other.acquires);
        self.acquires = acquires.map(|(mine, others)| mine.saturating_add(others));
        self.acquires_estimated |= other.acquires_estimated;
        self.waits = self.waits.saturating_add(other.waits);
        self.waits_at_least |= other.waits_at_least;
        self.timeouts = self.timeouts.saturating_add(other.timeouts);
        self.wait_ns = self.wait_ns.saturating_add(other.wait_ns);
        self.make_plausible();
    }

    /// Lets requests stand for acquires that are not known.
    pub(crate) fn estimate(&mut self, requests: u64) {
        if self.acquires.is_none() {
            self.acquires = Some(requests);
            self.acquires_estimated = true;
            self.make_plausible();
        }
    }

    /// What the row takes of the ring, in bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.name.len()
    }

    /// The row as it is sent: no number is beyond what the aggregator takes, since a batch that it refuses
    /// would be sent for ever.
    pub fn to_wire(&self) -> v1::Pool {
        let mut row = self.clone();
        row.estimate(0);
        row.make_plausible();
        v1::Pool {
            name: row.name,
            acquires: row.acquires.unwrap_or(row.waits),
            waits: row.waits,
            timeouts: row.timeouts,
            wait_ns: row.wait_ns,
            used: row.used,
            idle: row.idle,
            max: row.max,
            waiters: row.waiters,
            waits_at_least: row.waits_at_least,
            acquires_estimated: row.acquires_estimated,
        }
    }

    /// Makes the numbers agree. Counters of one scrape are not read at one moment, and a call that waits at
    /// the time of the scrape began before it and ends after it. Who gave up has waited, and who has waited
    /// has asked: the smaller number is raised, never the larger lowered.
    fn make_plausible(&mut self) {
        self.timeouts = self.timeouts.min(MAX_COUNT);
        self.waits = self.waits.max(self.timeouts).min(MAX_COUNT);
        self.acquires = self
            .acquires
            .map(|acquires| acquires.max(self.waits).min(MAX_COUNT));
        self.wait_ns = self.wait_ns.min(MAX_WAIT_NS);
        for state in [&mut self.used, &mut self.idle, &mut self.max, &mut self.waiters] {
            *state = (*state).min(MAX_COUNT);
        }
    }
}

// === impl Pools ===

impl Pools {
    /// What happened since it was last taken, pool by pool, with the state of the last scrape; nothing if there
    /// was no scrape since.
    pub fn take(&self) -> Vec<PoolRow> {
        std::mem::take(&mut self.state().rows)
    }

    /// Scrapes that were tried.
    pub fn scrapes(&self) -> u64 {
        self.scrapes.load(Ordering::Relaxed)
    }

    /// Of these, how many failed.
    pub fn failed_scrapes(&self) -> u64 {
        self.failed_scrapes.load(Ordering::Relaxed)
    }

    /// A scrape has succeeded. There are at most 64 pools, whatever names come and go until they are taken:
    /// what happened at further ones is added to the last.
    pub(crate) fn add(&self, readings: &[Reading]) {
        self.scrapes.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        let State { counters, rows } = &mut *state;
        // A pool that is not there any more has no connections.
        for row in rows.iter_mut() {
            (row.used, row.idle, row.max, row.waiters) = (0, 0, 0, 0);
        }
        merge_pools(rows, counters.next(readings));
    }

    /// A scrape has failed. What it missed is in the next.
    fn fail(&self) {
        self.scrapes.fetch_add(1, Ordering::Relaxed);
        self.failed_scrapes.fetch_add(1, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
