//! What was made, as the clients know it, and what was stored, as an outsider reads it off the frames.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use coalmine_agent::{metrics::Metrics, ring::MAX_MERGED_MS};
use coalmine_aggregator::store::{self, Entry};
use coalmine_proto::{
    names::{Arm, Outcomes},
    v1::{Hello, WindowBatch},
};
use tokio::sync::watch;

use crate::agent::{EVERYONE, Stage};

/// One life of an agent's process.
pub(crate) struct Life {
    /// The number of the agent.
    pub(crate) agent: usize,
    /// Its arm; the version follows from it.
    pub(crate) arm: Arm,
    /// The life's own number on the wire.
    pub(crate) epoch: u64,
    /// The agent's metrics, as they were last.
    pub(crate) metrics: Metrics,
    /// Tells it what to do.
    pub(crate) stage: watch::Sender<Stage>,
    /// Limit of its ring, in bytes.
    pub(crate) ring_bytes: usize,
    /// When each of its windows ended, and what it takes of the ring.
    pub(crate) windows: Vec<(u64, usize)>,
    /// The requests that ended in it, by burst. A burst has a tenant of its own, which is its name.
    pub(crate) made: BTreeMap<String, Burst>,
    /// Whether it ended by itself, after it was told to.
    pub(crate) has_ended: bool,
}

/// Requests that ended at the same moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Burst {
    /// Those of the tenant that only this burst has.
    pub(crate) own: Outcomes,
    /// Those of the tenant that all have.
    pub(crate) shared: Outcomes,
}

/// All lives of all agents. Cloning gives another handle to the same ones.
pub(crate) type Lives = Arc<Mutex<Vec<Life>>>;

/// What was stored.
#[derive(Debug, Default)]
pub(crate) struct Account {
    sessions: BTreeMap<u64, Session>,
    /// By epoch.
    pub(crate) lives: BTreeMap<u64, Stored>,
    /// How many batches were stored once more.
    pub(crate) again: u64,
    /// What should not have happened.
    pub(crate) problems: Vec<String>,
}

#[derive(Debug)]
struct Session {
    epoch: u64,
    names: BTreeMap<u32, String>,
}

/// What was stored of one life.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// The batches, by number.
    pub(crate) batches: BTreeMap<u64, Batch>,
    /// The last batch that the aggregator may have called durable.
    pub(crate) promised: u64,
}

/// A batch that was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    /// What it counts, by tenant.
    pub(crate) rows: BTreeMap<String, Outcomes>,
    /// Requests that it declares lost.
    pub(crate) gap: u64,
}

impl Life {
    /// The value of one of the agent's metrics.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.metrics.text().unwrap();
        let value = text.lines().find_map(|line| {
            let (series, value) = line.split_once(' ')?;
            (series.strip_prefix("coalmine_agent_") == Some(name)).then_some(value)
        });
        let value = value.unwrap_or_else(|| panic!("the agent has no metric {name}"));
        value.trim().parse().unwrap()
    }

    /// What the ring may take at most: its limit, and one window of windows that were merged into it.
    pub(crate) fn ring_bound(&self) -> usize {
        let (mut widest, mut together, mut first) = (0, 0, 0);
        for (end_ms, bytes) in &self.windows {
            together += bytes;
            while self.windows[first].0 + u64::from(MAX_MERGED_MS) < *end_ms {
                together -= self.windows[first].1;
                first += 1;
            }
            widest = widest.max(together);
        }
        self.ring_bytes + widest
    }

    /// Whether everything was delivered: it ended in order, and nothing was left.
    pub(crate) fn is_complete(&self) -> bool {
        self.has_ended && self.metric("ring_bytes") == 0
    }
}

impl Burst {
    /// How many requests it has.
    pub(crate) fn requests(&self) -> u64 {
        self.own.seen() + self.shared.seen()
    }
}

impl Batch {
    /// The bursts in it.
    pub(crate) fn bursts(&self) -> impl Iterator<Item = (&String, &Outcomes)> {
        self.rows.iter().filter(|(tenant, _)| *tenant != EVERYONE)
    }

    /// How many requests it counts.
    pub(crate) fn requests(&self) -> u64 {
        self.rows.values().map(Outcomes::seen).sum()
    }
}

impl Account {
    /// Reads a frame that the store has given out; says which batch it is of which epoch, if it is one.
    pub(crate) fn read(&mut self, frame: &[u8]) -> Option<(u64, u64)> {
        let mut batch = None;
        let read = store::entries(frame, |entry| batch = self.take(&entry));
        if read != Ok(frame.len() as u64) {
            let problem = format!("a frame of {} bytes reads as {read:?}", frame.len());
            self.problems.push(problem);
        }
        batch
    }

    /// Takes an entry; says which batch it is of which epoch, if it is one.
    pub(crate) fn take(&mut self, entry: &Entry) -> Option<(u64, u64)> {
        if let Entry::Hello(session, hello) = entry {
            self.open(*session, hello);
        }
        let Entry::Batch(session, batch) = entry else {
            return None;
        };
        let Some(session) = self.sessions.get_mut(session) else {
            let problem = format!("batch {} of session {session}, which has no Hello", batch.seq);
            self.problems.push(problem);
            return None;
        };
        let epoch = session.epoch;
        match session.batch(batch) {
            Ok(content) => self.keep(epoch, batch.seq, content),
            Err(problem) => self.problems.push(problem),
        }
        Some((epoch, batch.seq))
    }

    fn open(&mut self, session: u64, hello: &Hello) {
        // A crash may have lost a session, whose number is then given again.
        let opened = Session {
            epoch: hello.epoch,
            names: BTreeMap::new(),
        };
        self.sessions.insert(session, opened);
    }

    fn keep(&mut self, epoch: u64, seq: u64, content: Batch) {
        let batches = &mut self.lives.entry(epoch).or_default().batches;
        match batches.get(&seq) {
            None => {
                batches.insert(seq, content);
            }
            Some(before) => {
                self.again += 1;
                // The counts of a batch that was known are not stored a second time.
                if !content.rows.is_empty() && *before != content {
                    let problem = format!("batch {seq} of {epoch:x} was {before:?} and is now {content:?}");
                    self.problems.push(problem);
                }
            }
        }
    }

    /// Notes that the aggregator may say from now on that a batch is durable.
    pub(crate) fn promise(&mut self, epoch: u64, seq: u64) {
        let stored = self.lives.entry(epoch).or_default();
        stored.promised = stored.promised.max(seq);
    }

    /// The same for all batches of another account.
    pub(crate) fn promise_all(&mut self, kept: &Self) {
        for (epoch, stored) in &kept.lives {
            if let Some(last) = stored.batches.keys().next_back() {
                self.promise(*epoch, *last);
            }
        }
    }
}

impl Session {
    fn batch(&mut self, batch: &WindowBatch) -> Result<Batch, String> {
        for name in &batch.names {
            self.names.insert(name.r#ref, name.name.clone());
        }
        let mut rows = BTreeMap::new();
        for row in &batch.rows {
            let Some(name) = self.names.get(&row.tenant) else {
                return Err(format!("batch {} has a row for nobody", batch.seq));
            };
            if rows.insert(name.clone(), Outcomes::from_row(row)).is_some() {
                return Err(format!("batch {} has two rows for {name}", batch.seq));
            }
        }
        Ok(Batch {
            rows,
            gap: batch.gap.map_or(0, |gap| gap.requests),
        })
    }
}
