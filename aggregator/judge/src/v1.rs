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

use std::collections::BTreeMap;

use coalmine_proto::names::TenantName;

pub use self::outcome::{Outcome, State, TenantStates, Unit, UnitReport, Verdict};
use self::{
    explain::{Arms, Findings},
    track::Track,
};
use crate::{
    budget::{Metric, Share, budget},
    eprocess::{Ceiling, Counts, GRID, LiveTest, Onset, Proof, Safety},
    evidence::{ArmCounts, TenantWindow, Window},
    fixed::{Bits, OutOfRange, log2_ceil},
    policy::{Policy, Requirement},
    threshold::Thresholds,
};

/// Name of this version, in every record.
pub const ID: &str = "judge-fx/1";

/// The share of slow requests that a p99 limit allows, in parts per billion.
const SLOW_SHARE_PPB: u64 = 10_000_000;

/// The fleet is held to a tighter margin than a tenant, since a diffuse rise is seen there or nowhere.
const FLEET_LIVE: LiveTest = LiveTest {
    max_ratio_milli: 1_100,
    max_increase_ppb: 200_000,
};

/// Requests on each arm from which a block is closed.
const BLOCK_REQUESTS: u64 = 5;

/// Windows after which a block is closed in any case.
const BLOCK_WINDOWS: u32 = 6;

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
    /// Groups of newcomers so far.
    groups: u32,
    /// Windows taken.
    windows: u32,
    last: Option<u64>,
    halted: bool,
    agents: AgentTotals,
}

#[derive(Debug, Clone, Copy, Default)]
struct AgentTotals {
    canary_expected: u64,
    canary_reported: u64,
    baseline_expected: u64,
    baseline_reported: u64,
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
    errors: Track,
    latency: Track,
    errors_safety: Safety,
    errors_proof: Proof,
    latency_safety: Safety,
    latency_proof: Proof,
    totals: Arms,
    slow: Counts,
}

/// What the tenants of one window add up to.
#[derive(Debug, Default)]
struct FleetWindow {
    live: [Bits; GRID],
    live_blocks: bool,
    live_counts: Arms,
    errors: [Bits; GRID],
    errors_counts: Counts,
    latency: [Bits; GRID],
    latency_counts: Counts,
    arms: Arms,
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
            groups: 0,
            windows: 0,
            last: None,
            halted: false,
            agents: AgentTotals::default(),
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
        self.agents.add(window);

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
        let first = self.last.is_none();
        let mut newcomers: Vec<&TenantName> = window
            .rows
            .iter()
            .filter(|row| row.canary.requests > 0 || row.baseline.requests > 0)
            .map(|row| &row.tenant)
            .filter(|tenant| !self.tenants.contains_key(*tenant))
            .collect();
        if first {
            newcomers.extend(self.policy.tenants.keys());
            newcomers.sort();
            newcomers.dedup();
        }
        if newcomers.is_empty() {
            return Ok(());
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
        findings.require_data(window, &self.fleet, self.agents);
        self.fleet.report(&self.policy, &mut findings);
        for (name, tenant) in &mut self.tenants {
            tenant.report(name, &mut findings);
        }
        findings.require_critical(&self.tenants);
        self.halted |= findings.has_breach();
        findings.conclude(self.halted, self.windows)
    }
}

impl AgentTotals {
    fn add(&mut self, window: &Window) {
        self.canary_expected += u64::from(window.canary.expected);
        self.canary_reported += u64::from(window.canary.reported);
        self.baseline_expected += u64::from(window.baseline.expected);
        self.baseline_reported += u64::from(window.baseline.reported);
    }
}

fn errors(counts: &ArmCounts) -> Counts {
    Counts {
        requests: counts.requests,
        events: counts.errors,
    }
}

fn slow(counts: &ArmCounts, limit_us: u64) -> Counts {
    counts
        .latency
        .as_ref()
        .map_or_else(Counts::default, |latency| Counts {
            requests: latency.histogram.count(),
            events: latency.over(limit_us),
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
        let errors = self.errors.take(arms, onset).and_then(|bits| {
            fleet.errors_counts.add(arms.canary);
            add(&mut fleet.errors, bits)
        });
        let latency = match (&mut self.latency, self.thresholds.p99_us, row) {
            (Some(track), Some(limit), Some(row)) => {
                let arms = Arms {
                    canary: slow(&row.canary, limit),
                    baseline: slow(&row.baseline, limit),
                };
                track.take(arms, onset).and_then(|bits| {
                    fleet.latency_counts.add(arms.canary);
                    add(&mut fleet.latency, bits)
                })
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
        add(&mut fleet.live, FLEET_LIVE.evidence(arms.canary, arms.baseline)?)
    }

    fn report(&mut self, name: &TenantName, findings: &mut Findings) {
        let unit = Unit::Tenant(name.clone());
        let thresholds = self.thresholds;
        let mut suspected = findings.live(&unit, &mut self.live, thresholds);
        suspected |= findings.sla(&unit, Metric::ErrorsSla, &mut self.errors, thresholds);
        if let Some(latency) = &mut self.latency {
            suspected |= findings.sla(&unit, Metric::LatencySla, latency, thresholds);
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

    /// Adds a window; gives the canary's evidence of harm.
    fn take(&mut self, arms: Arms, onset: Onset) -> Result<[Bits; GRID], OutOfRange> {
        if arms.baseline.requests > 0 {
            let only = Arms {
                canary: arms.baseline,
                baseline: Counts::default(),
            };
            self.baseline
                .take(self.ceiling.evidence(arms.baseline), only, onset)?;
        }
        if arms.canary.requests == 0 {
            return Ok([0; GRID]);
        }
        let bits = self.ceiling.evidence(arms.canary)?;
        self.canary.take(Ok(bits), arms, onset)?;
        self.proof.add(self.safety.evidence(arms.canary)?)?;
        Ok(bits)
    }

    /// Whether the proof of safety stands.
    fn is_proven(&self) -> bool {
        let needed = log2_ceil(TENANT_PROOF_ODDS, 1);
        matches!((self.proof.bits(), needed), (Ok(bits), Ok(needed)) if bits >= needed)
    }

    /// Whether the baseline is over the limit too, as far as can be said.
    fn is_shared(&self) -> bool {
        self.baseline.blocks() > 0 && self.baseline.bits().is_ok_and(|bits| bits >= 0)
    }
}

impl Fleet {
    fn new(policy: &Policy) -> Result<Self, StepError> {
        let track = |metric| {
            Ok::<_, StepError>(Track::new(budget(
                policy.rollout.alpha.ppb,
                Share::FLEET,
                metric,
            )?)?)
        };
        let limits = Thresholds::default_of(policy);
        Ok(Self {
            live: track(Metric::ErrorsLive)?,
            errors: track(Metric::ErrorsSla)?,
            latency: track(Metric::LatencySla)?,
            errors_safety: Safety::below(limits.max_rate_ppb)?,
            errors_proof: Proof::default(),
            latency_safety: Safety::below(SLOW_SHARE_PPB)?,
            latency_proof: Proof::default(),
            totals: Arms::default(),
            slow: Counts::default(),
        })
    }

    fn take(&mut self, sum: &FleetWindow, error: Option<OutOfRange>, onset: Onset) {
        let canary_only = |counts| Arms {
            canary: counts,
            baseline: Counts::default(),
        };
        let bits = |bits| error.map_or(Ok(bits), Err);
        self.totals.add(sum.arms);
        self.slow.add(sum.latency_counts);
        if sum.live_blocks || error.is_some() {
            self.live.take_or_fail(bits(sum.live), sum.live_counts, onset);
        }
        if sum.errors_counts.requests > 0 || error.is_some() {
            self.errors
                .take_or_fail(bits(sum.errors), canary_only(sum.errors_counts), onset);
            let proof = self.errors_safety.evidence(sum.errors_counts);
            if proof.and_then(|bits| self.errors_proof.add(bits)).is_err() {
                self.errors.fail();
            }
        }
        if sum.latency_counts.requests > 0 || error.is_some() {
            self.latency
                .take_or_fail(bits(sum.latency), canary_only(sum.latency_counts), onset);
            let proof = self.latency_safety.evidence(sum.latency_counts);
            if proof.and_then(|bits| self.latency_proof.add(bits)).is_err() {
                self.latency.fail();
            }
        }
    }

    fn report(&mut self, policy: &Policy, findings: &mut Findings) {
        let limits = Thresholds::default_of(policy);
        // Each required metric may be wrongly proven with an equal part of alpha.
        let parts = policy.rollout.alpha.ppb / policy.defaults.required.len().max(1) as u64;
        let needed = log2_ceil(1_000_000_000, u128::from(parts.max(1)));
        let proven =
            |proof: &Proof| matches!((proof.bits(), needed), (Ok(bits), Ok(needed)) if bits >= needed);
        findings.live(
            &Unit::Fleet,
            &mut self.live,
            Thresholds {
                max_ratio_milli: FLEET_LIVE.max_ratio_milli,
                max_increase_ppb: FLEET_LIVE.max_increase_ppb,
                ..limits
            },
        );
        let errors = proven(&self.errors_proof);
        findings.fleet_sla(Metric::ErrorsSla, &mut self.errors, limits, errors);
        findings.require_proof(Requirement::Errors, errors);
        let latency = proven(&self.latency_proof);
        findings.fleet_sla(Metric::LatencySla, &mut self.latency, limits, latency);
        findings.require_proof(Requirement::Latency, latency);
    }
}
