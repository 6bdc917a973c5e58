//! One service: its tenants, slots, totals and agents.

use std::collections::{BTreeMap, BTreeSet};

use coalmine_judge::evidence::{Coverage, Pool, TenantWindow, Window};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, OVERFLOW_TENANT, Outcomes, TenantName},
    v1::Totals,
};
use foldhash::HashMap;

use super::{
    Agent, Applied, Batch, BookError, Build, Comparison, DEFAULT_SLOT_MS, MAX_TENANTS, REMEMBER_GONE_MS,
    REMEMBER_SILENT_MS,
    cell::{Cell, latency_of},
    image::{Journal, Part},
    pool::{self, PoolEvents, SlotPools},
    roster::Roster,
};

/// What is known of one service.
#[derive(Debug)]
pub struct Service {
    pub(super) slot_ms: u64,
    pub(super) names: HashMap<TenantName, u32>,
    pub(super) tenants: Vec<TenantName>,
    /// Tenants that the policy lists: places are kept for them.
    listed: BTreeSet<TenantName>,
    /// How many of `tenants` it does not list.
    unlisted: usize,
    /// Tenants in the order of their names; rebuilt when there are new ones.
    pub(super) sorted: Vec<u32>,
    pub(super) slots: BTreeMap<u64, BTreeMap<Build, Vec<Cell>>>,
    /// What agents reported of their pools in the same slots.
    pub(super) pools: BTreeMap<u64, BTreeMap<Build, SlotPools>>,
    /// Per build, what happened at the pools since the beginning.
    pub(super) pool_events: BTreeMap<Build, PoolEvents>,
    /// Per build, what was counted since the beginning, by tenant.
    pub(super) totals: BTreeMap<Build, Vec<Outcomes>>,
    /// Per arm, the latency of all requests since the beginning that are in no slot any more.
    pub(super) latency: BTreeMap<Arm, Histogram>,
    pub(super) agents: BTreeMap<String, Agent>,
    /// Slots that start before this were judged.
    pub(super) judged_until_ms: u64,
    /// Slots that start before this are not kept: nobody will judge them.
    pub(super) keep_from_ms: u64,
    /// Per arm: requests in declared gaps, and requests that are in no slot's evidence, because they came after it was
    /// judged or because nobody knows when they were.
    pub(super) gaps: BTreeMap<Arm, u64>,
    pub(super) late: BTreeMap<Arm, u64>,
    pub(super) windows: u64,
    pub(super) tenant_windows: u64,
    pub(super) duplicates: u64,
    /// What changed, where that is asked for.
    pub(super) journal: Option<Journal>,
}

impl Service {
    pub(super) fn new() -> Self {
        Self {
            slot_ms: DEFAULT_SLOT_MS,
            names: HashMap::default(),
            tenants: Vec::new(),
            listed: BTreeSet::new(),
            unlisted: 0,
            sorted: Vec::new(),
            slots: BTreeMap::new(),
            pools: BTreeMap::new(),
            pool_events: BTreeMap::new(),
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
            journal: None,
        }
    }

    /// Notes that something of the agents has changed.
    pub(super) fn note_agents(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.note(Part::Agents);
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

    /// Lets go of the slots before `keep_ms`.
    pub(super) fn evict(&mut self, keep_ms: u64) {
        self.keep_from_ms = self.keep_from_ms.max(keep_ms);
        let kept = self.slots.split_off(&self.keep_from_ms);
        for (slot, builds) in std::mem::replace(&mut self.slots, kept) {
            for (build, cells) in builds {
                let merged = self.latency.entry(build.arm).or_default();
                cells.iter().for_each(|cell| merged.merge(&cell.latency));
                if let Some(journal) = &mut self.journal {
                    journal.forget_slot(slot, &build, cells.len());
                    journal.note(Part::Counts);
                }
            }
        }
        let kept = self.pools.split_off(&self.keep_from_ms);
        for (slot, builds) in std::mem::replace(&mut self.pools, kept) {
            for (build, pools) in builds {
                if let Some(journal) = &mut self.journal {
                    journal.forget_pools(slot, &build, &pools);
                }
            }
        }
    }

    /// Lets go of agents that will not come back.
    pub(super) fn forget_agents(&mut self, now_ms: u64) {
        let before = self.agents.len();
        self.agents.retain(|_, agent| {
            let patience = if agent.gone {
                REMEMBER_GONE_MS
            } else {
                REMEMBER_SILENT_MS
            };
            agent.connected || agent.last_seen_ms.saturating_add(patience) >= now_ms
        });
        if self.agents.len() < before {
            self.note_agents();
        }
    }

    /// The latency of an arm's requests since the beginning.
    pub fn latency(&self, arm: Arm) -> Histogram {
        let mut sum = self.latency.get(&arm).cloned().unwrap_or_default();
        let builds = self
            .slots
            .values()
            .flatten()
            .filter(|(build, _)| build.arm == arm);
        builds
            .flat_map(|(_, cells)| cells)
            .for_each(|cell| sum.merge(&cell.latency));
        sum
    }

    /// The sums of an arm: outcomes, requests in declared gaps, requests that came too late.
    pub fn arm_totals(&self, arm: Arm) -> (Outcomes, u64, u64) {
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
        (sum, at(&self.gaps), at(&self.late))
    }

    /// Windows, tenant windows and duplicates received.
    pub fn received(&self) -> (u64, u64, u64) {
        (self.windows, self.tenant_windows, self.duplicates)
    }

    /// Keeps places for tenants. Who has a place depends on these and on the order in which names came, and on nothing
    /// else: windows that are read again give the same numbers.
    pub(super) fn list(&mut self, listed: BTreeSet<TenantName>) {
        self.listed = listed;
        let is_unlisted = |tenant: &&TenantName| !self.listed.contains(*tenant);
        self.unlisted = self.tenants.iter().filter(is_unlisted).count();
    }

    pub(super) fn intern(&mut self, tenant: &TenantName) -> u32 {
        if let Some(number) = self.names.get(tenant) {
            return *number;
        }
        if self.tenants.is_empty() {
            // There is always a place for those beyond the limit: number 0.
            self.add_tenant(&TenantName::overflow());
            return self.intern(tenant);
        }
        if !self.has_place_for(tenant) {
            return self.names.get(OVERFLOW_TENANT).copied().unwrap_or_default();
        }
        self.add_tenant(tenant)
    }

    /// Whether a new tenant gets a number. Names come from requests and are never given up, so those that anybody can
    /// make up must leave room for those that the policy lists.
    fn has_place_for(&self, tenant: &TenantName) -> bool {
        let kept = self.listed.len().min(MAX_TENANTS / 2);
        self.tenants.len() < MAX_TENANTS
            && (self.unlisted < MAX_TENANTS - kept || self.listed.contains(tenant))
    }

    pub(super) fn add_tenant(&mut self, tenant: &TenantName) -> u32 {
        // MAX_TENANTS fits.
        let number = u32::try_from(self.tenants.len()).unwrap_or(u32::MAX);
        self.tenants.push(tenant.clone());
        self.unlisted += usize::from(!self.listed.contains(tenant));
        self.names.insert(tenant.clone(), number);
        if let Some(journal) = &mut self.journal {
            journal.note_name(number);
        }
        number
    }

    pub(super) fn apply(
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
            agent.recognise(batch)?;
            self.duplicates += 1;
            if let Some(journal) = &mut self.journal {
                journal.note(Part::Counts);
            }
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
        pool::check(batch.pools)?;
        let gap = batch.gap.unwrap_or_default();
        let said = batch.cumulative;
        let (mut gap_requests, mut gap_errors) = (agent.gap_requests, agent.gap_errors);
        if !agent.based {
            // What the agent sent and this book never had is a gap.
            let missing = |said: u64, parts: [u64; 4]| {
                said.saturating_sub(parts.into_iter().fold(0_u64, u64::saturating_add))
            };
            let parts = [agent.applied.requests, gap_requests, requests, gap.requests];
            gap_requests = gap_requests.saturating_add(missing(said.requests, parts));
            let parts = [agent.applied.errors, gap_errors, errors, gap.errors];
            gap_errors = gap_errors.saturating_add(missing(said.errors, parts));
        }
        let applied = Totals {
            requests: agent.applied.requests.saturating_add(requests),
            errors: agent.applied.errors.saturating_add(errors),
            gap_requests: gap_requests.saturating_add(gap.requests),
        };
        let gap_errors = gap_errors.saturating_add(gap.errors);
        for (what, said, applied, gaps) in [
            ("requests", said.requests, applied.requests, applied.gap_requests),
            ("errors", said.errors, applied.errors, gap_errors),
        ] {
            if said != applied.saturating_add(gaps) {
                return Err(BookError::Totals {
                    what,
                    said,
                    applied,
                    gaps,
                });
            }
        }
        let declared = applied.gap_requests.saturating_sub(agent.gap_requests);
        agent.remember(batch);
        agent.reach(batch);
        agent.based = true;
        agent.applied_seq = batch.seq;
        agent.applied = applied;
        agent.gap_requests = applied.gap_requests;
        agent.gap_errors = gap_errors;
        let build = agent.build.clone();
        self.count(&build, batch, latencies, declared);
        self.count_pools(instance, &build, batch);
        Ok(Applied::Now)
    }

    /// The slot of a batch, if it has one that is kept: it is neither judged nor let go.
    fn kept_slot(&self, batch: &Batch<'_>) -> Option<u64> {
        if batch.is_undated() {
            return None;
        }
        let slot = batch.start_ms / self.slot_ms * self.slot_ms;
        (slot >= self.judged_until_ms && slot >= self.keep_from_ms).then_some(slot)
    }

    fn count_pools(&mut self, instance: &str, build: &Build, batch: &Batch<'_>) {
        if batch.pools.is_empty() {
            return;
        }
        // That the counts have changed is noted already.
        self.pool_events
            .entry(build.clone())
            .or_default()
            .take(batch.pools);
        let Some(slot) = self.kept_slot(batch) else {
            return;
        };
        let builds = self.pools.entry(slot).or_default();
        builds
            .entry(build.clone())
            .or_default()
            .take(instance, batch.pools);
        if let Some(journal) = &mut self.journal {
            journal.note(Part::Pools(slot, build.clone(), pool::shard_of(instance)));
        }
    }

    pub(super) fn count(
        &mut self,
        build: &Build,
        batch: &Batch<'_>,
        latencies: Vec<Option<Histogram>>,
        gap: u64,
    ) {
        self.windows += 1;
        self.tenant_windows += batch.rows.len() as u64;
        let raise = |counts: &mut BTreeMap<Arm, u64>, by: u64| {
            let count = counts.entry(build.arm).or_default();
            *count = count.saturating_add(by);
        };
        if gap > 0 {
            raise(&mut self.gaps, gap);
        }
        if let Some(journal) = &mut self.journal {
            journal.note(Part::Agents);
            journal.note(Part::Counts);
        }
        if batch.rows.is_empty() {
            return;
        }
        let totals = self.totals.entry(build.clone()).or_default();
        if totals.len() < self.tenants.len() {
            totals.resize(self.tenants.len(), Outcomes::default());
        }
        let mut seen = 0_u64;
        for row in &batch.rows {
            seen = seen.saturating_add(row.outcomes.seen());
            if let Some(totals) = totals.get_mut(row.tenant as usize) {
                totals.add(&row.outcomes);
            }
        }
        let slot = batch.start_ms / self.slot_ms * self.slot_ms;
        let late = batch.is_undated() || slot < self.judged_until_ms;
        let kept = self.kept_slot(batch);
        if let Some(journal) = &mut self.journal {
            journal.note_rows(build, kept, batch.rows.iter().map(|row| row.tenant));
        }
        if late {
            raise(&mut self.late, seen);
        }
        if kept.is_none() {
            let merged = self.latency.entry(build.arm).or_default();
            latencies
                .iter()
                .flatten()
                .for_each(|latency| merged.merge(latency));
        } else {
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

    /// Whether an agent should report a slot.
    fn is_expected(
        &self,
        agent: &Agent,
        comparison: &Comparison,
        start_ms: u64,
        now_ms: u64,
        forget_ms: u64,
    ) -> bool {
        let end_ms = start_ms + self.slot_ms;
        let begun =
            agent.first_start_ms == 0 || agent.first_start_ms < end_ms || agent.has_hole(start_ms, end_ms);
        let ended = agent.gone && agent.sealed_until_ms <= start_ms;
        let forgotten = !agent.connected && agent.last_seen_ms.saturating_add(forget_ms) < now_ms;
        comparison.covers(&agent.build) && begun && !ended && !forgotten
    }

    /// The agents that should report a slot.
    pub(super) fn expected<'a>(
        &'a self,
        comparison: &'a Comparison,
        start_ms: u64,
        now_ms: u64,
        forget_ms: u64,
    ) -> impl Iterator<Item = &'a Agent> {
        let agents = self.agents.values();
        agents.filter(move |agent| self.is_expected(agent, comparison, start_ms, now_ms, forget_ms))
    }

    /// Of each arm, how many pods should have an agent that reports a slot, and have none that is expected to.
    pub(super) fn silent(
        &self,
        comparison: &Comparison,
        start_ms: u64,
        now_ms: u64,
        forget_ms: u64,
        roster: Option<&Roster>,
    ) -> [u32; 2] {
        let is_expected = |uid: &str| {
            let agent = self.agents.get(uid);
            agent.is_some_and(|agent| self.is_expected(agent, comparison, start_ms, now_ms, forget_ms))
        };
        roster.map_or([0; 2], |roster| roster.silent(comparison, start_ms, is_expected))
    }

    /// What the pools did in a slot: a sum for each arm that has any.
    fn pool_evidence(&self, comparison: &Comparison, start_ms: u64) -> Vec<Pool> {
        let builds = self.pools.get(&start_ms);
        let of_arm = |arm: Arm| {
            let builds = builds.into_iter().flatten();
            let chosen = builds.filter(move |(build, _)| build.arm == arm && comparison.covers(build));
            pool::evidence_of(arm, chosen.map(|(_, pools)| pools))
        };
        Arm::ALL.into_iter().filter_map(of_arm).collect()
    }

    pub(super) fn freeze(
        &mut self,
        comparison: &Comparison,
        start_ms: u64,
        number: u64,
        now_ms: u64,
        forget_ms: u64,
        roster: Option<&Roster>,
    ) -> Window {
        let end_ms = start_ms + self.slot_ms;
        let silent = self.silent(comparison, start_ms, now_ms, forget_ms, roster);
        let mut coverage = silent.map(|expected| Coverage {
            expected,
            reported: 0,
        });
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
        if let Some(journal) = &mut self.journal {
            journal.note(Part::Counts);
        }
        let [canary, baseline] = coverage;
        Window {
            number,
            start_ms,
            len_ms: self.slot_ms,
            canary,
            baseline,
            rows,
            pool: self.pool_evidence(comparison, start_ms),
            pods: roster.map(|roster| roster.pods(comparison)),
        }
    }
}
