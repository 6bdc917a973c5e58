//! Version 1 of the judge, `judge-fx/1`: one step for each window, `step(state, window) -> outcome`.
//!
//! For every tenant and for the fleet it keeps evidence of harm on three metrics, and proofs of safety.
//! The fleet's evidence of harm is the sum of its tenants' (a product of e-processes, so a change of mix
//! cannot fool it); its proof of safety is on pooled requests of the canary (see
//! [`eprocess`](crate::eprocess)).
//!
//! A published version never changes: the golden vectors of `tests/golden` hold it to its bytes. Whatever
//! would change an outcome is a new module with a new [`ID`].

mod explain;
mod outcome;
mod track;

use std::collections::{BTreeMap, VecDeque};

use coalmine_proto::names::TenantName;

pub use self::outcome::{Outcome, State, TenantStates, Unit, UnitReport, Verdict};
use self::{
    explain::Findings,
    track::{Arms, Track},
};
use crate::{
    budget::{Metric, Share, budget},
    eprocess::{Ceiling, Counts, GRID, LiveTest, Onset, Proof, Safety},
    evidence::{ArmCounts, Coverage, Latency, TenantWindow, Window},
    fixed::{Bits, OutOfRange, log2_ceil},
    policy::{Policy, Requirement},
    threshold::Thresholds,
};

/// Name of this version, in every record.
pub const ID: &str = "judge-fx/1";

/// The share of slow requests that a p99 limit allows, in parts per billion.
const SLOW_SHARE_PPB: u64 = 10_000_000;

/// The fleet is held to a tighter margin than its tenants, since a diffuse rise is seen there or nowhere: to 2/5
/// of the tolerated ratio above 1, and to 1/5 of the tolerated increase. The defaults give 1.1 and 0.02 points.
const FLEET_RATIO_FIFTHS: u64 = 2;
const FLEET_INCREASE_PARTS: u64 = 5;

/// Requests on each arm from which a block is closed.
const BLOCK_REQUESTS: u64 = 5;

/// Windows after which a block is closed in any case.
const BLOCK_WINDOWS: u32 = 6;

/// After so many windows in a row without canary requests, or without a comparison, there is no data.
const NODATA_WINDOWS: u32 = 2 * BLOCK_WINDOWS;

/// Over so many windows the agents' reports are held against the policy's minimum.
const COVERAGE_WINDOWS: usize = 10;

/// A tenant's proof of safety holds with probability 1 - 1/20, for the information of the reader.
const TENANT_PROOF_ODDS: u128 = 20;

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
    onset: Onset,
    tenants: BTreeMap<TenantName, Tenant>,
    fleet: Fleet,
    /// Whether the tenants known at the start have their share.
    begun: bool,
    /// Groups of newcomers so far.
    groups: u32,
    /// Windows taken.
    windows: u32,
    last: Option<u64>,
    halted: bool,
    /// Agents of the last windows, canary and baseline.
    agents: VecDeque<[Coverage; 2]>,
}

/// What is kept of one tenant.
#[derive(Debug, Clone)]
struct Tenant {
    thresholds: Thresholds,
    open: Block,
    live: Track,
    errors: SlaTrack,
    latency: Option<SlaTrack>,
    totals: Arms,
}

/// Windows that wait until they are enough to be one piece of evidence.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    canary: Counts,
    baseline: Counts,
    age: u32,
}

/// A metric that is held against the SLA: harm on the canary, the same on the baseline, and safety.
#[derive(Debug, Clone)]
struct SlaTrack {
    ceiling: Ceiling,
    safety: Safety,
    canary: Track,
    baseline: Track,
    proof: Proof,
}

#[derive(Debug, Clone)]
struct Fleet {
    live: Track,
    errors: FleetSla,
    latency: FleetSla,
    totals: Arms,
    /// Windows in a row without canary requests, and without a comparison with the baseline.
    without_canary: u32,
    without_live: u32,
}

/// The fleet against the SLA: the sums of the tenants' evidence on both arms, and safety on pooled counts.
#[derive(Debug, Clone)]
struct FleetSla {
    canary: Track,
    baseline: Track,
    safety: Safety,
    proof: Proof,
    requests: u64,
}

/// What the tenants of one window add up to.
#[derive(Debug, Default)]
struct FleetWindow {
    live: [Bits; GRID],
    live_blocks: bool,
    live_counts: Arms,
    errors: SlaSum,
    latency: SlaSum,
    arms: Arms,
}

/// The tenants' evidence against the SLA in one window.
#[derive(Debug, Default)]
struct SlaSum {
    canary: [Bits; GRID],
    baseline: [Bits; GRID],
    counts: Arms,
    /// The canary's, where as many are counted as slow as could have been.
    safety: Counts,
}

impl Judge {
    /// Begins a rollout. `max_windows` is the planned length; by default what fits before the hold deadline.
    pub fn new(policy: Policy, max_windows: Option<u32>) -> Result<Self, StepError> {
        let onset = Onset::new(max_windows.unwrap_or_else(|| policy.planned_windows()))?;
        let fleet = Fleet::new(&policy)?;
        Ok(Self {
            policy,
            onset,
            tenants: BTreeMap::new(),
            fleet,
            begun: false,
            groups: 0,
            windows: 0,
            last: None,
            halted: false,
            agents: VecDeque::new(),
        })
    }

    /// The policy that is judged by.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The number of the last window taken.
    pub fn last_window(&self) -> Option<u64> {
        self.last
    }

    /// The limits in force for a tenant that was seen.
    pub fn thresholds(&self, tenant: &str) -> Option<Thresholds> {
        self.tenants.get(tenant).map(|tenant| tenant.thresholds)
    }

    /// Takes one window and says what follows.
    pub fn step(&mut self, window: &Window) -> Result<Outcome, StepError> {
        if let Some(last) = self.last
            && window.number <= last
        {
            return Err(StepError::Order {
                got: window.number,
                last,
            });
        }
        self.admit(window)?;
        self.last = Some(window.number);
        self.windows = self.windows.saturating_add(1);
        self.agents.push_back([window.canary, window.baseline]);
        if self.agents.len() > COVERAGE_WINDOWS {
            self.agents.pop_front();
        }

        let mut sum = FleetWindow::default();
        let mut fleet_error = None;
        let mut rows = window.rows.iter().peekable();
        for (name, tenant) in &mut self.tenants {
            while rows.peek().is_some_and(|row| row.tenant < *name) {
                rows.next();
            }
            let row = rows.next_if(|row| row.tenant == *name);
            if let Err(error) = tenant.take(row, self.onset, &mut sum) {
                fleet_error = Some(error);
            }
        }
        self.fleet.take(&sum, fleet_error, self.onset);
        Ok(self.conclude(window))
    }

    /// Gives tenants that appear for the first time their share of the error probability.
    fn admit(&mut self, window: &Window) -> Result<(), StepError> {
        let first = !self.begun;
        let mut newcomers: Vec<&TenantName> = window
            .rows
            .iter()
            .filter(|row| row.canary.requests > 0 || row.baseline.requests > 0)
            .map(|row| &row.tenant)
            .filter(|tenant| !self.tenants.contains_key(*tenant))
            .collect();
        if newcomers.is_empty() {
            return Ok(());
        }
        if first {
            self.begun = true;
            newcomers.extend(self.policy.tenants.keys());
            newcomers.sort();
            newcomers.dedup();
        }
        let share = if first {
            Share::of_known(newcomers.len())
        } else {
            self.groups = self.groups.saturating_add(1);
            Share::of_newcomers(self.groups, newcomers.len())
        };
        let admitted: Vec<_> = newcomers
            .into_iter()
            .map(|name| Tenant::new(&self.policy, name, share).map(|tenant| (name.clone(), tenant)))
            .collect::<Result<_, _>>()?;
        self.tenants.extend(admitted);
        Ok(())
    }

    /// Reads the verdict off the state.
    fn conclude(&mut self, window: &Window) -> Outcome {
        let mut findings = Findings::new(window, &self.policy, self.fleet.totals);
        findings.require_data(window, &self.fleet, &self.agents);
        self.fleet.report(&self.policy, &mut findings);
        for (name, tenant) in &mut self.tenants {
            tenant.report(name, &mut findings);
        }
        findings.require_critical(&self.tenants);
        self.halted |= findings.has_breach();
        findings.conclude(self.halted, self.windows)
    }
}

fn errors(counts: &ArmCounts) -> Counts {
    Counts {
        requests: counts.requests,
        events: counts.errors,
    }
}

fn slow(counts: &ArmCounts, over: impl Fn(&Latency) -> u64) -> Counts {
    counts
        .latency
        .as_ref()
        .map_or_else(Counts::default, |latency| Counts {
            requests: latency.histogram.count(),
            events: over(latency),
        })
}

fn add(sum: &mut [Bits; GRID], bits: [Bits; GRID]) -> Result<(), OutOfRange> {
    for (sum, bits) in sum.iter_mut().zip(bits) {
        *sum = sum.checked_add(bits).ok_or(OutOfRange)?;
    }
    Ok(())
}

impl Tenant {
    fn new(policy: &Policy, name: &TenantName, share: Share) -> Result<Self, StepError> {
        let thresholds = Thresholds::of(policy, name);
        let alpha = policy.rollout.alpha.ppb;
        let latency = match thresholds.p99_us {
            Some(_) => Some(SlaTrack::new(
                SLOW_SHARE_PPB,
                budget(alpha, share, Metric::LatencySla)?,
            )?),
            None => None,
        };
        Ok(Self {
            thresholds,
            open: Block::default(),
            live: Track::new(budget(alpha, share, Metric::ErrorsLive)?)?,
            errors: SlaTrack::new(thresholds.max_rate_ppb, budget(alpha, share, Metric::ErrorsSla)?)?,
            latency,
            totals: Arms::default(),
        })
    }

    fn take(
        &mut self,
        row: Option<&TenantWindow>,
        onset: Onset,
        fleet: &mut FleetWindow,
    ) -> Result<(), OutOfRange> {
        let arms = row.map_or_else(Arms::default, |row| Arms {
            canary: errors(&row.canary),
            baseline: errors(&row.baseline),
        });
        self.totals.add(arms);
        fleet.arms.add(arms);
        let live = self.take_live(arms, onset, fleet);
        let errors = self.errors.take(arms, arms.canary, onset, &mut fleet.errors);
        let latency = match (&mut self.latency, self.thresholds.p99_us, row) {
            (Some(track), Some(limit), Some(row)) => {
                let surely = |latency: &Latency| latency.over(limit);
                let arms = Arms {
                    canary: slow(&row.canary, surely),
                    baseline: slow(&row.baseline, surely),
                };
                let possibly = slow(&row.canary, |latency| latency.over_at_most(limit));
                track.take(arms, possibly, onset, &mut fleet.latency)
            }
            _ => Ok(()),
        };
        live.and(errors).and(latency)
    }

    /// Adds a window to the open block, and takes the block as evidence when it is large or old enough.
    fn take_live(&mut self, arms: Arms, onset: Onset, fleet: &mut FleetWindow) -> Result<(), OutOfRange> {
        if self.open.age == 0 && arms.is_empty() {
            return Ok(());
        }
        self.open.canary.add(arms.canary);
        self.open.baseline.add(arms.baseline);
        self.open.age += 1;
        let large =
            self.open.canary.requests >= BLOCK_REQUESTS && self.open.baseline.requests >= BLOCK_REQUESTS;
        if !large && self.open.age < BLOCK_WINDOWS {
            return Ok(());
        }
        let block = std::mem::take(&mut self.open);
        if block.canary.requests == 0 || block.baseline.requests == 0 {
            return Ok(());
        }
        let arms = Arms {
            canary: block.canary,
            baseline: block.baseline,
        };
        let test = LiveTest {
            max_ratio_milli: self.thresholds.max_ratio_milli,
            max_increase_ppb: self.thresholds.max_increase_ppb,
        };
        self.live
            .take(test.evidence(arms.canary, arms.baseline), arms, onset)?;
        fleet.live_blocks = true;
        fleet.live_counts.add(arms);
        add(
            &mut fleet.live,
            fleet_live(self.thresholds).evidence(arms.canary, arms.baseline)?,
        )
    }

    fn report(&mut self, name: &TenantName, findings: &mut Findings) {
        let unit = Unit::Tenant(name.clone());
        let thresholds = self.thresholds;
        let mut suspected = findings.live(&unit, &mut self.live, thresholds);
        let (state, proven) = (self.errors.state(), self.errors.is_proven());
        suspected |= findings.sla(
            &unit,
            Metric::ErrorsSla,
            &self.errors.canary,
            state,
            proven,
            thresholds,
        );
        if let Some(latency) = &mut self.latency {
            let (state, proven) = (latency.state(), latency.is_proven());
            suspected |= findings.sla(
                &unit,
                Metric::LatencySla,
                &latency.canary,
                state,
                proven,
                thresholds,
            );
        }
        findings.tenant_judged(name, self.totals.canary.requests, suspected);
    }
}

impl SlaTrack {
    fn new(limit_ppb: u64, budget: Bits) -> Result<Self, OutOfRange> {
        Ok(Self {
            ceiling: Ceiling::above(limit_ppb)?,
            safety: Safety::below(limit_ppb)?,
            canary: Track::new(budget)?,
            baseline: Track::new(budget)?,
            proof: Proof::default(),
        })
    }

    /// Adds a window, to the tenant and to the fleet's sum. `possibly` counts as many events as there can have been.
    fn take(
        &mut self,
        arms: Arms,
        possibly: Counts,
        onset: Onset,
        fleet: &mut SlaSum,
    ) -> Result<(), OutOfRange> {
        let result = self.try_take(arms, possibly, onset, fleet);
        if result.is_err() {
            self.canary.fail();
        }
        result
    }

    fn try_take(
        &mut self,
        arms: Arms,
        possibly: Counts,
        onset: Onset,
        fleet: &mut SlaSum,
    ) -> Result<(), OutOfRange> {
        fleet.counts.add(arms);
        if arms.baseline.requests > 0 {
            let bits = self.ceiling.evidence(arms.baseline)?;
            self.baseline
                .take(Ok(bits), Arms::of_canary(arms.baseline), onset)?;
            add(&mut fleet.baseline, bits)?;
        }
        if arms.canary.requests > 0 {
            let bits = self.ceiling.evidence(arms.canary)?;
            self.canary.take(Ok(bits), arms, onset)?;
            self.proof.add(self.safety.evidence(possibly)?)?;
            fleet.safety.add(possibly);
            add(&mut fleet.canary, bits)?;
        }
        Ok(())
    }

    /// Whether the proof of safety stands.
    fn is_proven(&self) -> bool {
        let needed = log2_ceil(TENANT_PROOF_ODDS, 1);
        matches!((self.proof.bits(), needed), (Ok(bits), Ok(needed)) if bits >= needed)
    }

    /// The state of the canary against the limit, which the baseline may break too.
    fn state(&mut self) -> State {
        shared_state(&mut self.canary, &self.baseline)
    }
}

/// The state of a canary whose baseline is held against the same limit. While the baseline is over it too, the
/// canary's evidence says nothing about the new version: it is given up down to half of the budget, so that
/// nothing is left over to halt the rollout when the trouble ends.
fn shared_state(canary: &mut Track, baseline: &Track) -> State {
    let is_shared = baseline.blocks() > 0 && baseline.bits().is_ok_and(|bits| bits >= 0);
    if is_shared {
        canary.excuse()
    } else {
        canary.state()
    }
}

/// The fleet's tolerance, from a tenant's.
fn fleet_live(thresholds: Thresholds) -> LiveTest {
    LiveTest {
        max_ratio_milli: 1_000 + (thresholds.max_ratio_milli - 1_000) * FLEET_RATIO_FIFTHS / 5,
        max_increase_ppb: thresholds.max_increase_ppb / FLEET_INCREASE_PARTS,
    }
}

impl FleetSla {
    fn new(limit_ppb: u64, budget: Bits) -> Result<Self, OutOfRange> {
        Ok(Self {
            canary: Track::new(budget)?,
            baseline: Track::new(budget)?,
            safety: Safety::below(limit_ppb)?,
            proof: Proof::default(),
            requests: 0,
        })
    }

    fn take(&mut self, sum: &SlaSum, error: Option<OutOfRange>, onset: Onset) {
        let result = error.map_or(Ok(()), Err).and_then(|()| self.try_take(sum, onset));
        if result.is_err() {
            self.canary.fail();
        }
    }

    fn try_take(&mut self, sum: &SlaSum, onset: Onset) -> Result<(), OutOfRange> {
        if sum.counts.baseline.requests > 0 {
            self.baseline
                .take(Ok(sum.baseline), Arms::of_canary(sum.counts.baseline), onset)?;
        }
        if sum.counts.canary.requests > 0 {
            self.requests = self.requests.saturating_add(sum.counts.canary.requests);
            self.canary.take(Ok(sum.canary), sum.counts, onset)?;
            self.proof.add(self.safety.evidence(sum.safety)?)?;
        }
        Ok(())
    }
}

impl Fleet {
    fn new(policy: &Policy) -> Result<Self, StepError> {
        let budget = |metric| budget(policy.rollout.alpha.ppb, Share::FLEET, metric);
        let limits = Thresholds::default_of(policy);
        Ok(Self {
            live: Track::new(budget(Metric::ErrorsLive)?)?,
            errors: FleetSla::new(limits.max_rate_ppb, budget(Metric::ErrorsSla)?)?,
            latency: FleetSla::new(SLOW_SHARE_PPB, budget(Metric::LatencySla)?)?,
            totals: Arms::default(),
            without_canary: 0,
            without_live: 0,
        })
    }

    fn take(&mut self, sum: &FleetWindow, error: Option<OutOfRange>, onset: Onset) {
        let count = |idle: u32, is_there: bool| if is_there { 0 } else { idle.saturating_add(1) };
        self.without_canary = count(self.without_canary, sum.arms.canary.requests > 0);
        self.without_live = count(self.without_live, sum.live_blocks);
        self.totals.add(sum.arms);
        if sum.live_blocks || error.is_some() {
            self.live
                .take_or_fail(error.map_or(Ok(sum.live), Err), sum.live_counts, onset);
        }
        self.errors.take(&sum.errors, error, onset);
        self.latency.take(&sum.latency, error, onset);
    }

    fn report(&mut self, policy: &Policy, findings: &mut Findings) {
        let limits = Thresholds::default_of(policy);
        // Each required metric may be wrongly proven with an equal part of alpha.
        let parts = policy.rollout.alpha.ppb / policy.defaults.required.len().max(1) as u64;
        let needed = log2_ceil(1_000_000_000, u128::from(parts.max(1)));
        let proven =
            |proof: &Proof| matches!((proof.bits(), needed), (Ok(bits), Ok(needed)) if bits >= needed);
        let live = fleet_live(limits);
        findings.live(
            &Unit::Fleet,
            &mut self.live,
            Thresholds {
                max_ratio_milli: live.max_ratio_milli,
                max_increase_ppb: live.max_increase_ppb,
                ..limits
            },
        );
        for (metric, requirement, sla) in [
            (Metric::ErrorsSla, Requirement::Errors, &mut self.errors),
            (Metric::LatencySla, Requirement::Latency, &mut self.latency),
        ] {
            let state = shared_state(&mut sla.canary, &sla.baseline);
            let proven = proven(&sla.proof);
            findings.sla(&Unit::Fleet, metric, &sla.canary, state, proven, limits);
            findings.require_proof(requirement, proven);
        }
    }
}
