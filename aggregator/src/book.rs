//! The book: what agents counted, by service, time, arm and version, and tenant.
//!
//! Synchronous and without I/O. Time comes as an argument. A window of an agent belongs to the slot (one
//! window of the judge) in which it starts. Each batch is applied exactly once: batches of one life of an
//! agent (an epoch) have contiguous numbers, and the agent's running totals are held against ours.

use std::collections::BTreeMap;

use coalmine_judge::evidence::{ArmCounts, Coverage, Latency, OverSla, TenantWindow, Window};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, OVERFLOW_TENANT, Outcomes, TenantName},
    v1::{Gap, Histogram as WireHistogram, Totals},
};
use foldhash::HashMap;

/// Length of a slot of a service without a policy.
pub const DEFAULT_SLOT_MS: u64 = 10_000;

/// How long a slot is kept after its end when no rollout waits for it.
const KEEP_SLOTS_MS: u64 = 60_000;

/// Most tenants of a service; agents fold beyond their own, lower limit.
pub const MAX_TENANTS: usize = 200_000;

/// How long to wait for agents, and when to give them up.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long after a slot's end its agents may still report before it is judged without them.
    pub grace_ms: u64,
    /// After a start of the aggregator: how long agents may take to come back.
    pub return_ms: u64,
    /// After how long without a sign an agent is no longer expected.
    pub forget_ms: u64,
}

impl Default for Patience {
    fn default() -> Self {
        // An agent's longest pause between two attempts to connect is 30 s.
        Self {
            grace_ms: 10_000,
            return_ms: 35_000,
            forget_ms: 60_000,
        }
    }
}

/// What is measured: an arm and a version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Build {
    /// The arm.
    pub arm: Arm,
    /// The version.
    pub version: String,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    services: BTreeMap<String, Service>,
    patience: Patience,
    /// When this process began, on the same clock as all other times here.
    started_ms: u64,
}

/// What is known of one service.
#[derive(Debug)]
pub struct Service {
    slot_ms: u64,
    names: HashMap<TenantName, u32>,
    tenants: Vec<TenantName>,
    /// Tenants in the order of their names; rebuilt when there are new ones.
    sorted: Vec<u32>,
    slots: BTreeMap<u64, BTreeMap<Build, Vec<Cell>>>,
    /// Per build, what was counted since the beginning, by tenant.
    totals: BTreeMap<Build, Vec<Outcomes>>,
    /// Per arm, the latency of all requests since the beginning.
    latency: BTreeMap<Arm, Histogram>,
    agents: BTreeMap<String, Agent>,
    /// Slots that start before this were judged.
    judged_until_ms: u64,
    /// Slots that start before this are not kept: nobody will judge them.
    keep_from_ms: u64,
    /// Per arm: requests in declared gaps, and requests that came after their slot was judged.
    gaps: BTreeMap<Arm, u64>,
    late: BTreeMap<Arm, u64>,
    windows: u64,
    tenant_windows: u64,
    duplicates: u64,
}

/// One tenant in one slot.
#[derive(Debug, Clone, Default)]
struct Cell {
    outcomes: Outcomes,
    latency: Histogram,
    limit: Limit,
    over: u64,
}

/// The latency limit that `over` was counted against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Limit {
    /// Nothing was counted yet.
    #[default]
    Fresh,
    /// All agents counted against the same limit.
    Same(u64),
    /// Some agents did not know the limit, or knew another: only the histogram says.
    Mixed,
}

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
    first_start_ms: u64,
    sealed_until_ms: u64,
    /// Between the last window of an earlier life that ended without Bye and the first of this one: what was
    /// counted there and not sent is lost.
    hole: Option<(u64, u64)>,
    last_seen_ms: u64,
    /// Whether what this epoch sent to an earlier data directory is known: not so at first if it had sent any.
    based: bool,
    applied: Totals,
    gap_requests: u64,
}

/// Who an agent says it is.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The service.
    pub service: String,
    /// The pod.
    pub instance: String,
    /// What it measures.
    pub build: Build,
    /// The life of its process.
    pub epoch: u64,
    /// The first batch that it can still send.
    pub first_seq: u64,
}

/// A batch, with the names of its tenants resolved.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Its number.
    pub seq: u64,
    /// Start of the window.
    pub start_ms: u64,
    /// Length of the window.
    pub length_ms: u32,
    /// The rows.
    pub rows: Vec<Row<'a>>,
    /// The agent's totals at the end of the window.
    pub cumulative: Totals,
    /// Windows that the agent dropped.
    pub gap: Option<Gap>,
}

/// A row of a batch.
#[derive(Debug)]
pub struct Row<'a> {
    /// The tenant, as the book numbers it.
    pub tenant: u32,
    /// Requests by outcome.
    pub outcomes: Outcomes,
    /// Their latency.
    pub latency: Option<&'a WireHistogram>,
    /// The limit that `over` counts against; 0 for none.
    pub limit_us: u64,
    /// Requests over the limit.
    pub over: u64,
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It counts.
    Now,
    /// It had been applied before.
    Before,
}

/// Why a batch is refused. The stream is closed; the agent begins again after the last durable batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BookError {
    /// A batch is missing.
    #[error("batch {got} came after batch {last}; batches must be contiguous")]
    Order {
        /// The batch that came.
        got: u64,
        /// The last one applied.
        last: u64,
    },
    /// A newer session of the same agent took over.
    #[error("a newer session of this agent is open")]
    Superseded,
    /// The histogram is not valid.
    #[error("the latency of tenant {tenant} is refused: {problem}")]
    Latency {
        /// The tenant.
        tenant: TenantName,
        /// Why.
        problem: String,
    },
    /// The agent's own totals differ from what it sent.
    #[error(
        "the agent's totals say {said} requests, {applied} were received and {gaps} are declared as gaps; \
         windows were lost or doubled"
    )]
    Totals {
        /// The agent's count.
        said: u64,
        /// Ours.
        applied: u64,
        /// Declared.
        gaps: u64,
    },
    /// A row contradicts itself.
    #[error("the row of tenant {tenant} is refused: {problem}")]
    Row {
        /// The tenant.
        tenant: TenantName,
        /// Why.
        problem: &'static str,
    },
    /// The service is not known; an introduction is missing.
    #[error("nothing is known of this agent")]
    Unknown,
}

/// What a rollout compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with; none for all of the baseline arm.
    pub baseline_version: Option<String>,
}

impl Comparison {
    fn covers(&self, build: &Build) -> bool {
        match build.arm {
            Arm::Canary => build.version == self.canary_version,
            Arm::Baseline => self
                .baseline_version
                .as_ref()
                .is_none_or(|version| *version == build.version),
        }
    }
}

impl Book {
    /// An empty book.
    pub fn new(patience: Patience, started_ms: u64) -> Self {
        Self {
            services: BTreeMap::new(),
            patience,
            started_ms,
        }
    }

    /// Sets the length of a service's slots; before its first window.
    pub fn set_slot(&mut self, service: &str, slot_ms: u64) {
        self.service(service).slot_ms = slot_ms;
    }

    fn service(&mut self, name: &str) -> &mut Service {
        self.services.entry(name.to_owned()).or_insert_with(Service::new)
    }

    /// The services, by name.
    pub fn services(&self) -> impl Iterator<Item = (&str, &Service)> {
        self.services
            .iter()
            .map(|(name, service)| (name.as_str(), service))
    }

    /// One service.
    pub fn get(&self, service: &str) -> Option<&Service> {
        self.services.get(service)
    }

    /// Opens a session of an agent; says which batch is the last durable one of its epoch.
    pub fn introduce(&mut self, who: &Introduction, session: u64, now_ms: u64) -> u64 {
        let service = self.service(&who.service);
        let agent = service
            .agents
            .entry(who.instance.clone())
            .or_insert_with(|| Agent::new(who));
        if agent.epoch != who.epoch || agent.build != who.build {
            let hole = (!agent.gone && agent.build == who.build).then_some((agent.sealed_until_ms, u64::MAX));
            *agent = Agent {
                hole: hole.filter(|(from, _)| *from > 0),
                ..Agent::new(who)
            };
        }
        agent.session = session;
        agent.connected = true;
        agent.gone = false;
        agent.last_seen_ms = now_ms;
        // What was applied and is not durable yet comes again, and is then known.
        agent.durable_seq
    }

    /// Gives a tenant its number. Beyond [`MAX_TENANTS`] the rest is one tenant, [`TenantName::overflow`].
    pub fn intern(&mut self, service: &str, tenant: &TenantName) -> u32 {
        self.service(service).intern(tenant)
    }

    /// Applies a batch.
    pub fn apply(
        &mut self,
        service: &str,
        instance: &str,
        session: u64,
        batch: &Batch<'_>,
        now_ms: u64,
    ) -> Result<Applied, BookError> {
        let service = self.services.get_mut(service).ok_or(BookError::Unknown)?;
        service.apply(instance, session, batch, now_ms)
    }

    /// Notes that batches up to `seq` are on disk.
    pub fn durable(&mut self, service: &str, instance: &str, epoch: u64, seq: u64) {
        if let Some(agent) = self.agent(service, instance)
            && agent.epoch == epoch
        {
            agent.durable_seq = agent.durable_seq.max(seq);
        }
    }

    /// Notes that a session's stream has ended.
    pub fn disconnect(&mut self, service: &str, instance: &str, session: u64, gone: bool, now_ms: u64) {
        if let Some(agent) = self.agent(service, instance)
            && agent.session == session
        {
            agent.connected = false;
            agent.gone |= gone;
            agent.last_seen_ms = now_ms;
        }
    }

    fn agent(&mut self, service: &str, instance: &str) -> Option<&mut Agent> {
        self.services.get_mut(service)?.agents.get_mut(instance)
    }

    /// The first slot that starts at or after `now_ms`.
    pub fn next_slot(&self, service: &str, now_ms: u64) -> u64 {
        let slot = self
            .services
            .get(service)
            .map_or(DEFAULT_SLOT_MS, |service| service.slot_ms);
        now_ms.div_ceil(slot) * slot
    }

    /// Whether every agent that is expected has reported the slot, or waiting any longer is no use.
    pub fn is_ready(&self, comparison: &Comparison, start_ms: u64, now_ms: u64) -> bool {
        let Some(service) = self.services.get(&comparison.service) else {
            return now_ms >= start_ms + DEFAULT_SLOT_MS + self.patience.grace_ms;
        };
        let end_ms = start_ms + service.slot_ms;
        if now_ms < end_ms {
            return false;
        }
        let returned_ms = self.started_ms.saturating_add(self.patience.return_ms);
        let deadline = end_ms.saturating_add(self.patience.grace_ms).max(returned_ms);
        let mut expected = [false; 2];
        let mut waiting = false;
        for agent in service.expected(comparison, start_ms, now_ms, self.patience.forget_ms) {
            expected[agent.build.arm as usize] = true;
            waiting |= !agent.has_reported(end_ms);
        }
        // Without agents on both arms there may be some on their way.
        (!waiting && expected == [true; 2]) || now_ms >= deadline
    }

    /// Freezes a slot into evidence. Windows that come later are counted, and judged no more.
    pub fn freeze(&mut self, comparison: &Comparison, start_ms: u64, number: u64, now_ms: u64) -> Window {
        let patience = self.patience;
        let service = self.service(&comparison.service);
        service.freeze(comparison, start_ms, number, now_ms, patience.forget_ms)
    }

    /// Before stored windows are read again: slots that nobody waits for get no place.
    pub fn keep_only(&mut self, now_ms: u64, waiting: &BTreeMap<String, u64>) {
        self.evict(now_ms, |_| None);
        for (name, slot) in waiting {
            self.service(name).keep_from_ms = *slot;
        }
    }

    /// After they were read: what comes from now on for a slot that was judged comes too late.
    pub fn judged(&mut self, waiting: &BTreeMap<String, u64>) {
        for (name, slot) in waiting {
            self.service(name).judged_until_ms = *slot;
        }
    }

    /// Lets go of slots that nobody waits for.
    pub fn evict(&mut self, now_ms: u64, waited_for: impl Fn(&str) -> Option<u64>) {
        for (name, service) in &mut self.services {
            let old = now_ms.saturating_sub(KEEP_SLOTS_MS + service.slot_ms);
            let keep = waited_for(name).map_or(old, |slot| slot.min(old));
            service.keep_from_ms = service.keep_from_ms.max(keep);
            service.slots = service.slots.split_off(&keep);
        }
    }
}

impl Service {
    fn new() -> Self {
        Self {
            slot_ms: DEFAULT_SLOT_MS,
            names: HashMap::default(),
            tenants: Vec::new(),
            sorted: Vec::new(),
            slots: BTreeMap::new(),
            totals: BTreeMap::new(),
            latency: BTreeMap::new(),
            agents: BTreeMap::new(),
            judged_until_ms: 0,
            keep_from_ms: 0,
            gaps: BTreeMap::new(),
            late: BTreeMap::new(),
            windows: 0,
            tenant_windows: 0,
            duplicates: 0,
        }
    }

    /// Length of a slot.
    pub fn slot_ms(&self) -> u64 {
        self.slot_ms
    }

    /// The agents, by instance.
    pub fn agents(&self) -> impl Iterator<Item = (&str, &Agent)> {
        self.agents
            .iter()
            .map(|(instance, agent)| (instance.as_str(), agent))
    }

    /// All that was counted since the beginning: build, tenant, outcomes.
    pub fn totals(&self) -> impl Iterator<Item = (&Build, &TenantName, &Outcomes)> {
        self.totals.iter().flat_map(|(build, totals)| {
            self.tenants
                .iter()
                .zip(totals)
                .map(move |(tenant, outcomes)| (build, tenant, outcomes))
        })
    }

    /// The sums of an arm: outcomes, latency, requests in declared gaps, requests that came too late.
    pub fn arm_totals(&self, arm: Arm) -> (Outcomes, Option<&Histogram>, u64, u64) {
        let mut sum = Outcomes::default();
        for totals in self
            .totals
            .iter()
            .filter(|(build, _)| build.arm == arm)
            .map(|(_, totals)| totals)
        {
            totals.iter().for_each(|outcomes| sum.add(outcomes));
        }
        let at = |counts: &BTreeMap<Arm, u64>| counts.get(&arm).copied().unwrap_or(0);
        (sum, self.latency.get(&arm), at(&self.gaps), at(&self.late))
    }

    /// Windows, tenant windows and duplicates received.
    pub fn received(&self) -> (u64, u64, u64) {
        (self.windows, self.tenant_windows, self.duplicates)
    }

    fn intern(&mut self, tenant: &TenantName) -> u32 {
        if let Some(number) = self.names.get(tenant) {
            return *number;
        }
        if self.tenants.len() >= MAX_TENANTS {
            return self.names.get(OVERFLOW_TENANT).copied().unwrap_or_default();
        }
        if self.tenants.is_empty() {
            // There is always a place for those beyond the limit: number 0.
            self.add_tenant(&TenantName::overflow());
            return self.intern(tenant);
        }
        self.add_tenant(tenant)
    }

    fn add_tenant(&mut self, tenant: &TenantName) -> u32 {
        // MAX_TENANTS fits.
        let number = u32::try_from(self.tenants.len()).unwrap_or(u32::MAX);
        self.tenants.push(tenant.clone());
        self.names.insert(tenant.clone(), number);
        number
    }

    fn apply(
        &mut self,
        instance: &str,
        session: u64,
        batch: &Batch<'_>,
        now_ms: u64,
    ) -> Result<Applied, BookError> {
        let agent = self.agents.get_mut(instance).ok_or(BookError::Unknown)?;
        if agent.session != session {
            return Err(BookError::Superseded);
        }
        agent.last_seen_ms = now_ms;
        if batch.seq <= agent.applied_seq {
            self.duplicates += 1;
            return Ok(Applied::Before);
        }
        if batch.seq != agent.applied_seq + 1 {
            return Err(BookError::Order {
                got: batch.seq,
                last: agent.applied_seq,
            });
        }
        // Everything is checked before anything is counted: a batch counts whole or not at all.
        let mut latencies = Vec::with_capacity(batch.rows.len());
        let (mut requests, mut errors) = (0_u64, 0_u64);
        for row in &batch.rows {
            requests = requests.saturating_add(row.outcomes.seen());
            errors = errors.saturating_add(row.outcomes.errors());
            latencies.push(latency_of(row, &self.tenants)?);
        }
        let gap = batch.gap.as_ref().map_or(0, |gap| gap.requests);
        let before = if agent.based {
            (agent.applied, agent.gap_requests)
        } else {
            // What the agent sent before this data directory was begun is a gap here.
            let missing = batch
                .cumulative
                .requests
                .saturating_sub(requests)
                .saturating_sub(gap);
            (Totals::default(), missing)
        };
        let requests = before.0.requests.saturating_add(requests);
        let gaps = before.1.saturating_add(gap);
        if batch.cumulative.requests != requests.saturating_add(gaps) {
            return Err(BookError::Totals {
                said: batch.cumulative.requests,
                applied: requests,
                gaps,
            });
        }
        let declared = gaps.saturating_sub(agent.gap_requests);
        agent.based = true;
        agent.applied_seq = batch.seq;
        agent.applied = Totals {
            requests,
            errors: before.0.errors.saturating_add(errors),
            gap_requests: gaps,
        };
        agent.gap_requests = gaps;
        if agent.first_start_ms == 0 {
            agent.first_start_ms = batch.start_ms;
            agent.hole = agent
                .hole
                .map(|(from, _)| (from, batch.start_ms))
                .filter(|(from, to)| from < to);
        }
        let end_ms = batch.start_ms.saturating_add(u64::from(batch.length_ms));
        agent.sealed_until_ms = agent.sealed_until_ms.max(end_ms);
        let build = agent.build.clone();
        self.count(&build, batch, latencies, declared);
        Ok(Applied::Now)
    }

    fn count(&mut self, build: &Build, batch: &Batch<'_>, latencies: Vec<Option<Histogram>>, gap: u64) {
        self.windows += 1;
        self.tenant_windows += batch.rows.len() as u64;
        let raise = |counts: &mut BTreeMap<Arm, u64>, by: u64| {
            let count = counts.entry(build.arm).or_default();
            *count = count.saturating_add(by);
        };
        if gap > 0 {
            raise(&mut self.gaps, gap);
        }
        if batch.rows.is_empty() {
            return;
        }
        let totals = self.totals.entry(build.clone()).or_default();
        if totals.len() < self.tenants.len() {
            totals.resize(self.tenants.len(), Outcomes::default());
        }
        let merged = self.latency.entry(build.arm).or_default();
        let mut seen = 0_u64;
        for (row, latency) in batch.rows.iter().zip(&latencies) {
            seen = seen.saturating_add(row.outcomes.seen());
            if let Some(totals) = totals.get_mut(row.tenant as usize) {
                totals.add(&row.outcomes);
            }
            if let Some(latency) = latency {
                merged.merge(latency);
            }
        }
        let slot = batch.start_ms / self.slot_ms * self.slot_ms;
        if slot < self.judged_until_ms {
            raise(&mut self.late, seen);
        } else if slot >= self.keep_from_ms {
            let cells = self
                .slots
                .entry(slot)
                .or_default()
                .entry(build.clone())
                .or_default();
            if cells.len() < self.tenants.len() {
                cells.resize_with(self.tenants.len(), Cell::default);
            }
            for (row, latency) in batch.rows.iter().zip(latencies) {
                if let Some(cell) = cells.get_mut(row.tenant as usize) {
                    cell.add(row, latency);
                }
            }
        }
    }

    /// The agents that should report a slot.
    fn expected<'a>(
        &'a self,
        comparison: &'a Comparison,
        start_ms: u64,
        now_ms: u64,
        forget_ms: u64,
    ) -> impl Iterator<Item = &'a Agent> {
        let end_ms = start_ms + self.slot_ms;
        self.agents.values().filter(move |agent| {
            let begun = agent.first_start_ms == 0
                || agent.first_start_ms < end_ms
                || agent.has_hole(start_ms, end_ms);
            let ended = agent.gone && agent.sealed_until_ms <= start_ms;
            let forgotten = !agent.connected && agent.last_seen_ms.saturating_add(forget_ms) < now_ms;
            comparison.covers(&agent.build) && begun && !ended && !forgotten
        })
    }

    fn freeze(
        &mut self,
        comparison: &Comparison,
        start_ms: u64,
        number: u64,
        now_ms: u64,
        forget_ms: u64,
    ) -> Window {
        let end_ms = start_ms + self.slot_ms;
        let mut coverage = [Coverage::default(); 2];
        for agent in self.expected(comparison, start_ms, now_ms, forget_ms) {
            let coverage = &mut coverage[agent.build.arm as usize];
            coverage.expected += 1;
            coverage.reported += u32::from(agent.has_reported(end_ms) && !agent.has_hole(start_ms, end_ms));
        }
        if self.sorted.len() < self.tenants.len() {
            self.sorted = (0..u32::try_from(self.tenants.len()).unwrap_or(u32::MAX)).collect();
            let tenants = &self.tenants;
            self.sorted
                .sort_unstable_by_key(|tenant| tenants.get(*tenant as usize));
        }
        let mut rows = Vec::new();
        if let Some(builds) = self.slots.get(&start_ms) {
            let chosen: Vec<_> = builds
                .iter()
                .filter(|(build, _)| comparison.covers(build))
                .collect();
            for tenant in &self.sorted {
                let mut arms = [Cell::default(), Cell::default()];
                for (build, cells) in &chosen {
                    if let Some(cell) = cells.get(*tenant as usize)
                        && !cell.outcomes.is_empty()
                    {
                        arms[build.arm as usize].merge(cell);
                    }
                }
                let [canary, baseline] = arms.map(Cell::into_counts);
                if !(canary.is_empty() && baseline.is_empty())
                    && let Some(tenant) = self.tenants.get(*tenant as usize)
                {
                    rows.push(TenantWindow {
                        tenant: tenant.clone(),
                        canary,
                        baseline,
                    });
                }
            }
        }
        self.judged_until_ms = self.judged_until_ms.max(end_ms);
        let [canary, baseline] = coverage;
        Window {
            number,
            start_ms,
            len_ms: self.slot_ms,
            canary,
            baseline,
            rows,
            pool: Vec::new(),
        }
    }
}

/// Most requests of one row that are believed: more than any pod can answer in a window.
const MAX_ROW_REQUESTS: u64 = 1 << 32;

/// The latency of a row, if the row makes sense.
fn latency_of(row: &Row<'_>, tenants: &[TenantName]) -> Result<Option<Histogram>, BookError> {
    let tenant = || {
        tenants
            .get(row.tenant as usize)
            .cloned()
            .unwrap_or_else(TenantName::none)
    };
    let refuse = |problem: &'static str| {
        Err(BookError::Row {
            tenant: tenant(),
            problem,
        })
    };
    if row.outcomes.seen() > MAX_ROW_REQUESTS {
        return refuse("more requests than a window can hold");
    }
    let latency = row
        .latency
        .map(Histogram::from_wire)
        .transpose()
        .map_err(|error| BookError::Latency {
            tenant: tenant(),
            problem: error.to_string(),
        })?;
    let count = latency.as_ref().map_or(0, Histogram::count);
    if count > row.outcomes.requests() {
        return refuse("more latencies than requests");
    }
    if row.over > count {
        return refuse("more requests over the limit than latencies");
    }
    Ok(latency)
}

impl Cell {
    fn add(&mut self, row: &Row<'_>, latency: Option<Histogram>) {
        self.outcomes.add(&row.outcomes);
        if let Some(latency) = latency {
            let known = if row.limit_us == 0 {
                Limit::Mixed
            } else {
                Limit::Same(row.limit_us)
            };
            self.limit = self.limit.with(known);
            self.over = self.over.saturating_add(row.over);
            if self.latency.is_empty() {
                self.latency = latency;
            } else {
                self.latency.merge(&latency);
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.outcomes.add(&other.outcomes);
        if other.limit != Limit::Fresh {
            self.limit = self.limit.with(other.limit);
            self.over = self.over.saturating_add(other.over);
            self.latency.merge(&other.latency);
        }
    }

    fn into_counts(self) -> ArmCounts {
        let over_sla = match self.limit {
            Limit::Same(limit_us) => Some(OverSla {
                limit_us,
                count: self.over,
            }),
            Limit::Fresh | Limit::Mixed => None,
        };
        let measured = !self.latency.is_empty();
        ArmCounts {
            requests: self.outcomes.requests(),
            errors: self.outcomes.errors(),
            latency: measured.then_some(Latency {
                histogram: self.latency,
                over_sla,
            }),
        }
    }
}

impl Limit {
    fn with(self, other: Self) -> Self {
        if self == Self::Fresh || self == other {
            other
        } else {
            Self::Mixed
        }
    }
}

impl Agent {
    fn new(who: &Introduction) -> Self {
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
        }
    }

    /// Whether its stream is open and it spoke within the last `silent_ms`.
    pub fn is_alive(&self, now_ms: u64, silent_ms: u64) -> bool {
        self.connected && self.last_seen_ms + silent_ms >= now_ms
    }

    /// Whether what an earlier life of the agent counted in a slot may be lost.
    fn has_hole(&self, start_ms: u64, end_ms: u64) -> bool {
        self.hole.is_some_and(|(from, to)| from < end_ms && start_ms < to)
    }

    /// Whether all that the agent will say about a slot that ends at `end_ms` is here.
    fn has_reported(&self, end_ms: u64) -> bool {
        self.gone || self.sealed_until_ms >= end_ms
    }
}
