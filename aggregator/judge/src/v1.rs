//! Version 1 of the judge, `judge-fx/1`: one step for each window, `step(state, window) -> outcome`.
//!
//! For every tenant it keeps evidence of harm and proofs of safety ([`tenant`]); fleet and cohorts add their tenants'
//! evidence up ([`group`]); agents and the connection pool belong to the service ([`service`]). [`findings`] reads the
//! verdict, the score and the reason off the state, and [`explain`] prints how they come about.
//!
//! The cost of a window grows with the tenants that have traffic in it: what a silent tenant was found to be is kept
//! in running totals, and only what is not CLEAR is looked at again.
//!
//! A published version never changes: the golden vectors of `tests/golden` hold it to its bytes. Whatever would change
//! an outcome is a new module with a new [`ID`].

mod explain;
mod findings;
mod group;
mod outcome;
mod past;
mod roster;
mod saved;
mod service;
mod sla;
mod tenant;
mod track;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use borsh::{BorshDeserialize, BorshSerialize};
use coalmine_proto::names::TenantName;

pub use self::outcome::{Deadline, Outcome, State, TenantStates, Unit, UnitReport, Verdict};
use self::{
    findings::Findings,
    group::Group,
    roster::Roster,
    service::Service,
    tenant::{Shared, Tenant, Tests},
    track::Bars,
};
use crate::{
    budget::{Grant, Ledger},
    eprocess::{Ceiling, Onset, Safety, TailTest},
    evidence::{TenantWindow, Window},
    fixed::{Bits, OutOfRange, log2_ceil},
    history::History,
    policy::Policy,
    threshold::Thresholds,
};

/// Name of this version, in every record.
pub const ID: &str = "judge-fx/1";

/// The share of slow requests that a p99 limit allows, in parts per billion.
const SLOW_SHARE_PPB: u64 = 10_000_000;

/// A tenant's proof of safety holds with probability 1 - 1/20, for the information of the reader.
const TENANT_PROOF_ODDS: u128 = 20;

/// Name of the cohort of tenants with less than one canary request a window.
const TAIL: &str = "tail";

/// Why a window cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// Windows come in order.
    #[error("window {got} comes after window {last}; windows must have growing numbers")]
    Order {
        /// The window that was given.
        got: u64,
        /// The last one taken.
        last: u64,
    },
    /// Windows follow each other in time.
    #[error(
        "window {got} begins at {got_ms} ms, before the window ahead of it, which begins at {last_ms} ms"
    )]
    Time {
        /// The window that was given.
        got: u64,
        /// When it begins.
        got_ms: u64,
        /// When the last one began.
        last_ms: u64,
    },
    /// Rows come in the order of tenants, each once.
    #[error(
        "row {0} is not after the row before; rows must be in the order of their tenants' names, one for each tenant"
    )]
    Rows(usize),
    /// The policy has a limit that the arithmetic cannot express.
    #[error("the policy's limits are out of range")]
    Limits,
}

impl From<OutOfRange> for StepError {
    fn from(_: OutOfRange) -> Self {
        Self::Limits
    }
}

/// The state of one rollout's judgement.
#[derive(Debug, Clone)]
pub struct Judge {
    policy: Policy,
    history: Option<Arc<History>>,
    shared: Shared,
    ledger: Ledger,
    /// Tests and bars, which tenants refer to by position.
    tests: Vec<Tests>,
    bars: Vec<Bars>,
    tests_by_thresholds: BTreeMap<Thresholds, u32>,
    /// Who is judged, and what is kept of them by number.
    roster: Roster,
    tenants: Vec<Tenant>,
    /// How many tenants were admitted together, each time.
    groups_admitted: Vec<u32>,
    /// Blocks that wait to be closed: the window in which that is, the tenant, the block's number.
    due: VecDeque<(u32, u32, u32)>,
    tally: Tally,
    /// The fleet, then the cohorts by name.
    groups: Vec<Group>,
    /// The limits of a tenant that nothing is said about, from which the tolerance of fleet and cohorts follows.
    limits: Thresholds,
    service: Service,
    /// Evidence that proves the fleet's safety on one required metric.
    proof: Bits,
    clock: Clock,
}

/// How far the rollout is, and what was said of it.
#[derive(Debug, Clone, Default, BorshSerialize, BorshDeserialize)]
struct Clock {
    /// Windows judged.
    windows: u32,
    last: Option<u64>,
    last_ms: u64,
    /// When the first window began, and the HOLD that lasts.
    begun_ms: Option<u64>,
    held_since_ms: Option<u64>,
    deadline_told: bool,
    approved_late: bool,
    halted: bool,
    /// Why, when the hold deadline ended the rollout.
    expired: Option<String>,
}

/// Totals over all tenants.
#[derive(Debug, Clone, Default)]
struct Tally {
    states: TenantStates,
    canary_requests: u128,
    judged_requests: u128,
    tenants: u64,
    judged_tenants: u64,
}

impl Tally {
    /// What one tenant adds to the totals.
    fn parts(tenant: &Tenant, min_requests: u64) -> (u64, bool) {
        let requests = tenant.canary_requests;
        (requests, requests >= min_requests && !tenant.summary.suspected)
    }

    fn add(&mut self, tenant: &Tenant, min_requests: u64) {
        let (requests, judged) = Self::parts(tenant, min_requests);
        self.states.count(tenant.summary.state);
        self.canary_requests += u128::from(requests);
        self.tenants += u64::from(requests > 0);
        if judged {
            self.judged_requests += u128::from(requests);
            self.judged_tenants += u64::from(requests > 0);
        }
    }

    fn remove(&mut self, tenant: &Tenant, min_requests: u64) {
        let (requests, judged) = Self::parts(tenant, min_requests);
        self.states.discount(tenant.summary.state);
        self.canary_requests -= u128::from(requests);
        self.tenants -= u64::from(requests > 0);
        if judged {
            self.judged_requests -= u128::from(requests);
            self.judged_tenants -= u64::from(requests > 0);
        }
    }
}

impl Judge {
    /// Begins a rollout, with the digest of earlier rollouts if thresholds are to follow it. `max_windows` is the
    /// planned length; by default what fits before the hold deadline.
    pub fn new(
        policy: Policy,
        history: Option<Arc<History>>,
        max_windows: Option<u32>,
    ) -> Result<Self, StepError> {
        let limits = Thresholds::default_of(&policy, history.as_deref());
        let cohorts = policy.cohorts();
        let tail = policy.has_tail().then(|| TAIL.to_owned());
        let names: Vec<String> = cohorts.into_iter().chain(tail).collect();
        let mut ledger = Ledger::new(policy.rollout.alpha.ppb, names.len());
        let mut groups = vec![Group::new(Unit::Fleet, Bars::new(&ledger.fleet()?)?)];
        if !names.is_empty() {
            let bars = Bars::new(&ledger.cohorts()?)?;
            groups.extend(names.into_iter().map(|name| Group::new(Unit::Cohort(name), bars)));
        }
        // Each required metric may be wrongly proven with an equal part of alpha.
        let parts = policy.rollout.alpha.ppb / policy.defaults.required.len().max(1) as u64;
        Ok(Self {
            shared: Shared {
                onset: Onset::new(max_windows.unwrap_or_else(|| policy.planned_windows()))?,
                tail: TailTest::new()?,
                slow: Ceiling::above(SLOW_SHARE_PPB)?,
                fast: Safety::below(SLOW_SHARE_PPB)?,
                proof: log2_ceil(TENANT_PROOF_ODDS, 1)?,
            },
            ledger,
            tests: Vec::new(),
            bars: Vec::new(),
            tests_by_thresholds: BTreeMap::new(),
            roster: Roster::default(),
            tenants: Vec::new(),
            groups_admitted: Vec::new(),
            due: VecDeque::new(),
            tally: Tally::default(),
            groups,
            service: Service::new(&policy, limits)?,
            limits,
            proof: log2_ceil(1_000_000_000, u128::from(parts.max(1)))?,
            clock: Clock::default(),
            policy,
            history,
        })
    }

    /// The policy that is judged by.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The number of the last window taken.
    pub fn last_window(&self) -> Option<u64> {
        self.clock.last
    }

    /// The bytes of memory that are kept for tenants, with their places in the indexes; the text of their names is shared
    /// with the evidence.
    pub fn memory_bytes(&self) -> usize {
        let tenants: usize = self.tenants.iter().map(Tenant::memory_bytes).sum();
        let shared = self.tests.len() * size_of::<Tests>() + self.bars.len() * size_of::<Bars>();
        tenants + self.roster.memory_bytes() + shared
    }

    /// Takes one window and says what follows.
    pub fn step(&mut self, window: &Window) -> Result<Outcome, StepError> {
        if let Some(last) = self.clock.last
            && window.number <= last
        {
            return Err(StepError::Order {
                got: window.number,
                last,
            });
        }
        if window.start_ms < self.clock.last_ms {
            return Err(StepError::Time {
                got: window.number,
                got_ms: window.start_ms,
                last_ms: self.clock.last_ms,
            });
        }
        let follows = |pair: &[TenantWindow]| matches!(pair, [a, b] if a.tenant < b.tenant);
        if let Some(place) = window.rows.windows(2).position(|pair| !follows(pair)) {
            return Err(StepError::Rows(place + 1));
        }
        self.admit(window)?;
        if let Some(last) = self.clock.last.replace(window.number) {
            self.service.miss(window.number - last - 1);
        }
        self.clock.last_ms = window.start_ms;
        let begun_ms = *self.clock.begun_ms.get_or_insert(window.start_ms);
        if self.is_warming_up(window, begun_ms) {
            self.observe(window);
        } else {
            self.clock.windows = self.clock.windows.saturating_add(1);
            self.take(window);
        }
        Ok(self.conclude(window))
    }

    fn is_warming_up(&self, window: &Window, begun_ms: u64) -> bool {
        let warm_up = self.policy.rollout.warm_up;
        warm_up.is_some_and(|span| window.start_ms.saturating_sub(begun_ms) < span.micros / 1_000)
    }

    /// A window of the warm-up: its requests are no evidence; where the baseline's latencies are is learned from it.
    fn observe(&mut self, window: &Window) {
        let mut from = 0;
        for row in &window.rows {
            if let Some(number) = self.roster.find_from(&mut from, &row.tenant) {
                self.tenants[number as usize].observe(row);
            }
        }
        self.service.observe(window);
    }

    fn take(&mut self, window: &Window) {
        let mut from = 0;
        for row in &window.rows {
            // A row without requests of a tenant that was never seen has no number.
            if let Some(number) = self.roster.find_from(&mut from, &row.tenant) {
                self.take_tenant(number, Some(row));
            }
        }
        while let Some((_, id, serial)) = self.due.pop_front_if(|(due, ..)| *due <= self.clock.windows) {
            let open = self.tenants[id as usize].open_block();
            if open.is_some_and(|(open, _)| open == serial) {
                self.take_tenant(id, None);
            }
        }
        let onset = self.shared.onset;
        for group in &mut self.groups {
            group.close_window(onset);
        }
        self.relax_the_silent();
        self.service.take(window, onset, &self.groups[0].bars, self.proof);
    }

    /// A tenant that is suspected and has gone holds the rollout for a while, and then no longer.
    fn relax_the_silent(&mut self) {
        let silent = |number: &u32| {
            let tenant = &self.tenants[*number as usize];
            tenant.is_left_suspected(self.clock.windows, service::NODATA_WINDOWS)
        };
        let left: Vec<u32> = self
            .roster
            .notable()
            .map(|(_, number)| number)
            .filter(silent)
            .collect();
        for number in left {
            let tenant = &mut self.tenants[number as usize];
            let bars = &self.bars[tenant.bars as usize];
            tenant.relax(bars);
            self.summarise(number);
        }
    }

    /// Draws up what the verdict needs of a tenant, and keeps the totals.
    fn summarise(&mut self, number: u32) {
        let rollout = &self.policy.rollout;
        let tenant = &mut self.tenants[number as usize];
        let bars = &self.bars[tenant.bars as usize];
        let summary = findings::summary(&tenant.readings(bars), rollout.rollback_threshold.ppm);
        self.tally.remove(tenant, rollout.min_coverage.requests);
        tenant.summary = summary;
        self.tally.add(tenant, rollout.min_coverage.requests);
        self.roster.note(number, summary.notable);
    }

    fn take_tenant(&mut self, id: u32, row: Option<&TenantWindow>) {
        let tenant = &mut self.tenants[id as usize];
        let min_requests = self.policy.rollout.min_coverage.requests;
        self.tally.remove(tenant, min_requests);
        let before = tenant.open_block();
        let small = self.policy.has_tail() && tenant.is_small(self.clock.windows);
        let (tests, bars) = (
            &self.tests[tenant.tests as usize],
            &self.bars[tenant.bars as usize],
        );
        let step = tenant.take(row, self.clock.windows, &self.shared, tests, bars);
        self.tally.add(tenant, min_requests);
        if let Some((serial, due)) = tenant.open_block()
            && before.is_none_or(|(before, _)| before != serial)
        {
            self.due.push_back((due, id, serial));
        }
        self.groups[0].add(&step);
        for cohort in &tenant.cohorts {
            self.groups[*cohort as usize].add(&step);
        }
        if small && let Some(tail) = self.groups.last_mut() {
            tail.add(&step);
        }
        self.summarise(id);
    }

    /// Gives tenants that appear for the first time their share of the error probability.
    fn admit(&mut self, window: &Window) -> Result<(), StepError> {
        let mut from = 0;
        let mut newcomers: Vec<&TenantName> = window
            .rows
            .iter()
            .filter(|row| !row.canary.is_idle() || !row.baseline.is_idle())
            .map(|row| &row.tenant)
            .filter(|tenant| self.roster.find_from(&mut from, tenant).is_none())
            .collect();
        if newcomers.is_empty() {
            return Ok(());
        }
        if self.roster.is_empty() {
            newcomers.extend(self.policy.tenants.keys());
            newcomers.sort();
            newcomers.dedup();
        }
        let new = |name: &TenantName| (name.clone(), Tenant::new(self.clock.windows));
        let newcomers = newcomers.into_iter().map(new).collect();
        Ok(self.admit_group(newcomers)?)
    }

    /// Admits tenants that appear together, with what is kept of each.
    fn admit_group(&mut self, newcomers: Vec<(TenantName, Tenant)>) -> Result<(), OutOfRange> {
        let grant: Grant = if self.roster.is_empty() {
            self.ledger.known(newcomers.len())?
        } else {
            self.ledger.newcomers(newcomers.len())?
        };
        let bars = self.bars.len() as u32;
        self.bars.push(Bars::new(&grant)?);
        self.groups_admitted.push(newcomers.len() as u32);
        let mut names = Vec::with_capacity(newcomers.len());
        for (name, tenant) in newcomers {
            let thresholds = Thresholds::of(&self.policy, self.history.as_deref(), &name);
            let tests = match self.tests_by_thresholds.get(&thresholds) {
                Some(tests) => *tests,
                None => {
                    let tests = self.tests.len() as u32;
                    self.tests.push(Tests::new(thresholds)?);
                    self.tests_by_thresholds.insert(thresholds, tests);
                    tests
                }
            };
            let tenant = tenant.with(tests, bars, self.cohorts_of(&name));
            self.tally.add(&tenant, self.policy.rollout.min_coverage.requests);
            self.tenants.push(tenant);
            names.push(name);
        }
        self.roster.admit(names);
        Ok(())
    }

    /// Positions among the groups of a tenant's cohorts.
    fn cohorts_of(&self, tenant: &TenantName) -> Vec<u32> {
        let names = self.policy.cohorts_of(tenant);
        let position = |name: String| {
            let unit = Unit::Cohort(name);
            self.groups.iter().position(|group| group.unit == unit)
        };
        names
            .into_iter()
            .filter_map(position)
            .map(|at| at as u32)
            .collect()
    }

    /// Reads the verdict off the state.
    fn conclude(&mut self, window: &Window) -> Outcome {
        let mut findings = Findings::new(self);
        let begun_ms = self.clock.begun_ms.unwrap_or(window.start_ms);
        if self.is_warming_up(window, begun_ms) {
            findings.warm_up(self.policy.rollout.warm_up);
        }
        findings.service(self, window);
        for group in &self.groups {
            findings.group(self, group);
        }
        for (name, number) in self.roster.notable() {
            findings.tenant(self, name, &self.tenants[number as usize]);
        }
        findings.require_critical(self);
        self.clock.halted |= findings.has_breach();
        let mut outcome = findings.conclude(self, window);
        self.watch_the_clock(window, &mut outcome);
        outcome
    }

    /// Ends a HOLD that has lasted too long, as the policy says.
    fn watch_the_clock(&mut self, window: &Window, outcome: &mut Outcome) {
        if self.clock.expired.is_some() {
            return;
        }
        if outcome.verdict != Verdict::Hold {
            self.clock.held_since_ms = None;
            self.clock.deadline_told = false;
            self.clock.approved_late = false;
            return;
        }
        let trouble = outcome.units.iter().any(|report| report.state.is_trouble());
        // After an approval by the deadline, trouble is a new HOLD.
        if self.clock.approved_late && trouble {
            self.clock.approved_late = false;
            self.clock.deadline_told = false;
            self.clock.held_since_ms = None;
        }
        let since = *self.clock.held_since_ms.get_or_insert(window.start_ms);
        let held_ms = window
            .start_ms
            .saturating_add(window.len_ms)
            .saturating_sub(since);
        if held_ms < self.policy.defaults.hold_deadline.micros / 1_000 {
            return;
        }
        let action = self.policy.defaults.on_deadline;
        let deadline = Deadline { held_ms, action };
        let is_compared = self.groups[0].live_blocks() > 0;
        let expired = findings::expire(
            outcome,
            deadline,
            self.policy.defaults.hold_deadline.micros,
            is_compared,
        );
        self.clock.approved_late = expired == Verdict::Approve;
        if expired == Verdict::Rollback {
            self.clock.halted = true;
            self.clock.expired = Some(outcome.reason.clone());
        }
        if !self.clock.deadline_told {
            self.clock.deadline_told = true;
            outcome.deadline = Some(deadline);
        }
    }
}
