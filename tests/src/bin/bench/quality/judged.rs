//! What the simulator knows of the judge: how it is made, what it is given, what it says. Nothing else here
//! depends on the judge's interface.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context as _;
use coalmine_judge::{
    evidence::{Coverage, TenantWindow, Window},
    history::History,
    policy::Policy,
    threshold::Thresholds,
    v1::{Judge, Outcome, State, Verdict},
};
use coalmine_proto::names::TenantName;

use super::model::usual_limits_us;
use crate::sample::tenant;

/// Tolerated slowdown where the policy does not say another.
const USUAL_MARGIN: f64 = 0.1;

/// The simulated service.
pub(super) const SERVICE: &str = "simulated";

/// Start of the first window.
const START_MS: u64 = 1_700_000_000_000;

/// A rollout before the judge.
#[derive(Debug)]
pub(super) struct Judged(Judge);

/// What the judge says after a window.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) approves: bool,
    pub(super) halted: bool,
    /// Unit and metric of all that is in breach.
    pub(super) breaches: Vec<(String, &'static str)>,
}

/// What a policy tolerates between canary and baseline.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tolerance {
    pub(super) max_rate: f64,
    pub(super) max_ratio: f64,
    pub(super) max_increase: f64,
    pub(super) margin: f64,
}

impl Judged {
    /// Begins a rollout of so many windows.
    pub(super) fn begin(
        policy: &Policy,
        history: Option<Arc<History>>,
        windows: u32,
    ) -> anyhow::Result<Self> {
        Judge::new(policy.clone(), history, Some(windows))
            .map(Self)
            .context("the judge refuses the policy")
    }

    /// Judges a window.
    pub(super) fn step(&mut self, window: &Window) -> anyhow::Result<Said> {
        let outcome = self.outcome(window)?;
        let breaches = outcome
            .units
            .iter()
            .filter(|report| report.state == State::Breach);
        Ok(Said {
            approves: outcome.verdict == Verdict::Approve,
            halted: outcome.halted || outcome.verdict == Verdict::Rollback,
            breaches: breaches
                .map(|report| (report.unit.to_string(), report.metric.as_str()))
                .collect(),
        })
    }

    /// Bits at which a tenant halts the rollout, by metric. Only of metrics that the last window put in doubt.
    pub(super) fn budgets(
        &mut self,
        window: &Window,
        name: &TenantName,
    ) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        let outcome = self.outcome(window)?;
        let unit = unit_of(name);
        let reports = outcome
            .units
            .iter()
            .filter(|report| report.unit.to_string() == unit);
        let budgets = reports.map(|report| {
            (
                report.metric.as_str(),
                report.budget as f64 / (1_u64 << 32) as f64,
            )
        });
        Ok(budgets.collect())
    }

    fn outcome(&mut self, window: &Window) -> anyhow::Result<Outcome> {
        self.0.step(window).context("the judge refuses a window")
    }
}

/// A window that all agents reported, from its rows in the order of tenants.
pub(super) fn window(number: u32, seconds: u32, rows: Vec<TenantWindow>) -> Window {
    let len_ms = u64::from(seconds) * 1_000;
    let agents = |count| Coverage {
        expected: count,
        reported: count,
    };
    Window {
        number: u64::from(number),
        start_ms: START_MS + u64::from(number) * len_ms,
        len_ms,
        canary: agents(1),
        baseline: agents(9),
        rows,
        pool: Vec::new(),
        pods: None,
    }
}

/// A tenant as a unit of the judge.
pub(super) fn unit_of(name: &TenantName) -> String {
    format!("tenant:{name}")
}

/// A tenant's latency limit, in microseconds.
pub(super) fn limit_us(policy: &Policy, name: &TenantName) -> Option<u64> {
    Thresholds::of(policy, None, name).p99_us
}

/// What the policy tolerates from a tenant.
pub(super) fn tolerance(policy: &Policy, name: &TenantName) -> Tolerance {
    let limits = Thresholds::of(policy, None, name);
    let margin = policy.defaults.latency.margin;
    Tolerance {
        max_rate: limits.max_rate_ppb as f64 / 1e9,
        max_ratio: limits.max_ratio_milli as f64 / 1e3,
        max_increase: limits.max_increase_ppb as f64 / 1e9,
        margin: margin.map_or(USUAL_MARGIN, |share| f64::from(share.ppm) / 1e6),
    }
}

/// The policy of the model: a limit of 1 % errors, and each tenant's own limit on p99.
pub(super) fn usual_policy(
    tenants: usize,
    window_seconds: u32,
    windows: u32,
    margin: &str,
    adjust: &str,
) -> anyhow::Result<Policy> {
    let limits = usual_limits_us(tenants);
    let seconds = u64::from(window_seconds) * u64::from(windows.max(2));
    let mut text = format!(
        "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: {SERVICE}
defaults:
  errors:  {{ max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }}
  latency: {{ p99: 400ms, margin: {margin} }}
  judge_window: {window_seconds}s
  hold_deadline: {seconds}s
{adjust}
tenants:
"
    );
    for (limit_us, rank) in limits.iter().zip(1..) {
        text += &format!("  {}: {{ latency: {{ p99: {limit_us}us }} }}\n", tenant(rank));
    }
    Policy::parse(&text).context("the simulator's own policy")
}
