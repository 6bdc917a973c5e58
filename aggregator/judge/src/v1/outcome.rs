//! What a step says: the outcome, and its bytes.

use borsh::{BorshDeserialize, BorshSerialize};
use std::fmt;

use coalmine_proto::names::TenantName;
use serde::Serialize;

use crate::{budget::Metric, fixed::Bits, policy::OnDeadline};

/// What to do with the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// No suspicion, and safety is proven: go on.
    Approve,
    /// Not yet: wait.
    Hold,
    /// Harm is proven: go back. Stays.
    Rollback,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 3] = [Self::Approve, Self::Hold, Self::Rollback];

    /// The verdict as it is written everywhere.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Approve => "APPROVE",
            Self::Hold => "HOLD",
            Self::Rollback => "ROLLBACK",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is judged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// All tenants together.
    Fleet,
    /// Some tenants together: `tier:gold`, `region:eu`, `tail`.
    Cohort(String),
    /// One tenant.
    Tenant(TenantName),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fleet => f.write_str("fleet"),
            Self::Cohort(name) => write!(f, "cohort:{name}"),
            Self::Tenant(name) => write!(f, "tenant:{name}"),
        }
    }
}

/// What is found about a unit on a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, BorshSerialize, BorshDeserialize)]
pub enum State {
    /// Less than half of the evidence that halts.
    Clear,
    /// Clear, and proven to be within the limit.
    Proven,
    /// At least half of the evidence that halts.
    Suspect,
    /// Harm is proven.
    Breach,
    /// The limit is broken, and the live baseline breaks it too.
    Shared,
    /// Nothing was received.
    NoData,
    /// Too few agents reported.
    Gap,
    /// The arithmetic left its range.
    Error,
}

impl State {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Clear,
        Self::Proven,
        Self::Suspect,
        Self::Breach,
        Self::Shared,
        Self::NoData,
        Self::Gap,
        Self::Error,
    ];

    /// The state as it is written everywhere.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "CLEAR",
            Self::Proven => "PROVEN",
            Self::Suspect => "SUSPECT",
            Self::Breach => "BREACH",
            Self::Shared => "SHARED",
            Self::NoData => "NODATA",
            Self::Gap => "GAP",
            Self::Error => "ERROR",
        }
    }

    /// The order in which states count when a tenant is put under one of them: the most serious last.
    pub(super) const fn severity(self) -> u8 {
        match self {
            Self::Proven => 0,
            Self::Clear => 1,
            Self::NoData | Self::Gap => 2,
            Self::Suspect => 3,
            Self::Shared => 4,
            Self::Error => 5,
            Self::Breach => 6,
        }
    }

    /// Whether the unit is not in order.
    pub const fn is_trouble(self) -> bool {
        !matches!(self, Self::Clear | Self::Proven)
    }
}

/// A unit, a metric, and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitReport {
    /// The unit.
    pub unit: Unit,
    /// The metric.
    pub metric: Metric,
    /// What was found.
    pub state: State,
    /// Evidence of harm, in bits with 32 fractional bits.
    pub bits: Bits,
    /// Evidence at which the unit halts the rollout.
    pub budget: Bits,
    /// The unit's health score on the metric, in parts per million.
    pub score_ppm: u32,
    /// What was seen, in one clause; only where something is not in order.
    pub seen: String,
    /// The thresholds that it was judged by, and where they come from; where something is said.
    pub limits: String,
}

/// What one step says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Number of the window.
    pub window: u64,
    /// The verdict.
    pub verdict: Verdict,
    /// The rollout's health score, in parts per million.
    pub score_ppm: u32,
    /// Whether the rollout is over: harm was proven, or the hold deadline has ended it.
    pub halted: bool,
    /// All that is not CLEAR: the fleet first, then cohorts and tenants by name; metrics in a fixed order.
    pub units: Vec<UnitReport>,
    /// What is CLEAR with at least a quarter of the evidence that halts, in the same order, at most twenty.
    pub watched: Vec<UnitReport>,
    /// The hold deadline, in the window in which it takes effect.
    pub deadline: Option<Deadline>,
    /// Why, in one sentence.
    pub reason: String,
    /// What stands in the way of APPROVE besides what `units` lists, most important first.
    pub missing: Vec<String>,
    /// The unit with the lowest score, if any is suspected.
    pub worst: Option<UnitReport>,
    /// The tenant with the lowest score, if anything is suspected: the one to look at, also when it is the fleet
    /// that is in breach.
    pub worst_tenant: Option<TenantName>,
    /// The tenants with the lowest scores below 1, worst first, at most ten.
    pub worst_tenants: Vec<(TenantName, u32)>,
    /// Probability that the verdict is right, in parts per million; none for HOLD.
    pub confidence_ppm: Option<u32>,
    /// Share of the canary's requests whose tenants are judged and not suspected, in parts per million.
    pub traffic_ppm: u32,
    /// Share of the tenants with canary requests that are judged and not suspected, in parts per million.
    pub tenants_ppm: u32,
    /// Share of the expected agents that reported this window, in parts per million.
    pub agents_ppm: u32,
    /// How many tenants are in each state: the worst of their metrics.
    pub tenants: TenantStates,
}

/// A HOLD that has lasted as long as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// How long it has lasted, in milliseconds.
    pub held_ms: u64,
    /// What the policy does then.
    pub action: OnDeadline,
}

/// How many tenants are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantStates([u64; State::ALL.len()]);

impl TenantStates {
    pub(super) fn count(&mut self, state: State) {
        self.0[state as usize] += 1;
    }

    pub(super) fn discount(&mut self, state: State) {
        self.0[state as usize] = self.0[state as usize].saturating_sub(1);
    }

    /// How many tenants are in `state`.
    pub fn get(&self, state: State) -> u64 {
        self.0[state as usize]
    }

    /// How many tenants there are.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[derive(Serialize)]
struct Line<'a> {
    window: u64,
    verdict: &'a str,
    score_ppm: u32,
    halted: bool,
    units: Vec<LineUnit<'a>>,
}

#[derive(Serialize)]
struct LineUnit<'a> {
    unit: String,
    metric: &'a str,
    state: &'a str,
    bits_q32: i64,
    budget_q32: i64,
}

impl Outcome {
    /// The outcome's bytes: what is hashed, recorded and compared in a replay. Without a newline.
    pub fn to_json(&self) -> String {
        let line = Line {
            window: self.window,
            verdict: self.verdict.as_str(),
            score_ppm: self.score_ppm,
            halted: self.halted,
            units: self
                .units
                .iter()
                .map(|report| LineUnit {
                    unit: report.unit.to_string(),
                    metric: report.metric.as_str(),
                    state: report.state.as_str(),
                    bits_q32: report.bits,
                    budget_q32: report.budget,
                })
                .collect(),
        };
        // Integers and strings always serialise.
        serde_json::to_string(&line).unwrap_or_default()
    }
}
