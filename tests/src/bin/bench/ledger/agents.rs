//! Made-up agents, as the store and the book see them: each reports one window after the other.

use std::sync::{
    Arc,
    mpsc::{self, Receiver, Sender},
};

use anyhow::Context as _;
use coalmine_aggregator::store::{Entry, Store};
use coalmine_proto::{
    PROTOCOL,
    names::Arm,
    v1::{Hello, TenantName, TenantRow, Totals, WindowBatch},
};

use crate::{
    aggregator::SERVICE,
    decide::counts,
    sample::{Traffic, tenant},
};

/// When the first window starts: at the start of a slot.
pub(super) const START_MS: u64 = 1_700_000_000_000;

/// The limit that requests are counted against.
const LIMIT_US: u64 = 350_000;

/// Batches that may be on their way into the store.
const AHEAD: usize = 4_096;

/// A window without its number and time.
#[derive(Debug)]
pub(super) struct Made {
    rows: Vec<TenantRow>,
    sums: Totals,
}

/// An agent with a session.
#[derive(Debug)]
pub(super) struct Agent {
    session: u64,
    arm: Arm,
    window_ms: u32,
    made: Arc<[Made]>,
    /// Of how many tenants there are, and the first that this agent serves.
    tenants: usize,
    first: usize,
    seq: u64,
    sums: Totals,
}

/// Puts entries into a store as fast as it takes them.
pub(super) struct Filler {
    store: Store,
    tell: Sender<()>,
    told: Receiver<()>,
    waiting: usize,
}

impl Made {
    /// So many windows of so many tenants, with as many requests of a typical one.
    pub(super) fn several(windows: usize, tenants: usize, requests: f64) -> Arc<[Self]> {
        let mut traffic = Traffic::new(9, 20.0, 0.45);
        (0..windows)
            .map(|_| Self::new(&mut traffic, tenants, requests))
            .collect()
    }

    fn new(traffic: &mut Traffic, tenants: usize, requests: f64) -> Self {
        let mut sums = Totals::default();
        let mut rows = Vec::with_capacity(tenants);
        for tenant in 0..tenants {
            let (outcomes, latency, over) = counts(traffic, requests, LIMIT_US);
            sums.requests += outcomes.seen();
            sums.errors += outcomes.errors();
            let mut row = TenantRow {
                tenant: tenant as u32,
                latency: Some(latency),
                limit_us: LIMIT_US,
                over_limit: over,
                ..TenantRow::default()
            };
            outcomes.to_row(&mut row);
            rows.push(row);
        }
        Self { rows, sums }
    }
}

impl Agent {
    /// So many agents, on both arms in turn. Together they serve so many tenants.
    pub(super) fn several(count: usize, tenants: usize, window_ms: u32, made: &Arc<[Made]>) -> Vec<Self> {
        let agent = |number: usize| Self {
            session: 1 + number as u64,
            arm: Arm::ALL[number % 2],
            window_ms,
            made: Arc::clone(made),
            tenants,
            // Both arms serve all tenants.
            first: number / 2 * made[0].rows.len(),
            seq: 0,
            sums: Totals::default(),
        };
        (0..count).map(agent).collect()
    }

    /// What the agent says first.
    pub(super) fn hello(&self) -> Entry {
        let hello = Hello {
            protocol: PROTOCOL,
            instance: format!("agent-{}", self.session),
            epoch: 1,
            service: SERVICE.to_owned(),
            version: format!("{}-1", self.arm),
            arm: self.arm.to_wire().into(),
            next_seq: 1,
            window_ms: self.window_ms,
            now_unix_ms: START_MS,
            ..Hello::default()
        };
        Entry::Hello(self.session, hello)
    }

    /// The next window.
    pub(super) fn window(&mut self) -> WindowBatch {
        let made = &self.made[(self.session + self.seq) as usize % self.made.len()];
        let name = |number: usize| TenantName {
            r#ref: number as u32,
            name: tenant((self.first + number) % self.tenants),
        };
        let names = match self.seq {
            0 => (0..made.rows.len()).map(name).collect(),
            _ => Vec::new(),
        };
        let start_unix_ms = START_MS + self.seq * u64::from(self.window_ms);
        self.seq += 1;
        self.sums.requests += made.sums.requests;
        self.sums.errors += made.sums.errors;
        WindowBatch {
            seq: self.seq,
            start_unix_ms,
            length_ms: self.window_ms,
            names,
            rows: made.rows.clone(),
            cumulative: Some(self.sums),
            ..WindowBatch::default()
        }
    }

    /// The next window, as the store takes it.
    pub(super) fn batch(&mut self) -> Entry {
        Entry::Batch(self.session, self.window())
    }
}

impl Filler {
    pub(super) fn new(store: Store) -> Self {
        let (tell, told) = mpsc::channel();
        Self {
            store,
            tell,
            told,
            waiting: 0,
        }
    }

    pub(super) fn put(&mut self, entry: Entry) -> anyhow::Result<()> {
        if self.waiting == AHEAD {
            self.hear()?;
        }
        let tell = self.tell.clone();
        self.store.append(entry, move || {
            // Whoever waits may have given up.
            tell.send(()).ok();
        });
        self.waiting += 1;
        Ok(())
    }

    /// Waits until all is durable.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        while self.waiting > 0 {
            self.hear()?;
        }
        Ok(())
    }

    fn hear(&mut self) -> anyhow::Result<()> {
        self.told.recv().context("the store has stopped")?;
        self.waiting -= 1;
        Ok(())
    }
}
