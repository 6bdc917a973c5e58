//! What concerns the service as a whole: its agents, and its connection pool.

mod pool;

use borsh::{BorshDeserialize, BorshSerialize};
use std::collections::VecDeque;

use self::pool::{NOT_MEASURED, PoolTracks};
use super::{
    group::Group,
    outcome::{State, Unit, UnitReport},
    track::{Arms, Bars, Reading, Track},
};
use crate::{
    budget::Metric,
    eprocess::{Counts, LIVES, LiveTest, Onset},
    evidence::{Coverage, Pods, Window},
    fixed::{Bits, OutOfRange},
    policy::{Policy, Requirement},
    quantity::{percent, percent_of},
    threshold::Thresholds,
};

/// After so many windows in a row without canary requests, or without a comparison, there is no data.
pub(super) const NODATA_WINDOWS: u32 = 12;

/// Over so many windows the agents' reports are held against the policy's minimum.
const COVERAGE_WINDOWS: usize = 10;

/// How much more often than the baseline's the canary's agents may fall silent: ratio and difference of the shares
/// of agents that do so in one window.
const SILENT_RATIO_MILLI: u64 = 1_250;
const SILENT_INCREASE_PPB: u64 = 10_000_000;

/// Agents and pool.
#[derive(Debug, Clone)]
pub(super) struct Service {
    /// Agents of the last windows, canary and baseline.
    agents: VecDeque<[Coverage; 2]>,
    silent: LiveTest,
    gaps: Track<LIVES, Arms>,
    pool: Option<PoolTracks>,
}

/// What stands in the way of APPROVE, and what is reported of it.
#[derive(Debug, Default)]
pub(super) struct Shortfalls {
    pub(super) units: Vec<UnitReport>,
    /// In the order of importance.
    pub(super) missing: Vec<String>,
}

impl Service {
    pub(super) fn new(policy: &Policy, limits: Thresholds) -> Result<Self, OutOfRange> {
        let pool = policy.defaults.pool.map(|pool| PoolTracks::new(pool, limits));
        Ok(Self {
            agents: VecDeque::new(),
            silent: LiveTest::new(SILENT_RATIO_MILLI, SILENT_INCREASE_PPB)?,
            gaps: Track::default(),
            pool: pool.transpose()?,
        })
    }

    /// Writes what a rollout has made of it; its tests follow from the policy.
    pub(super) fn save(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        (&self.agents, &self.gaps).serialize(out)?;
        self.pool.is_some().serialize(out)?;
        match &self.pool {
            Some(pool) => pool.save(out),
            None => Ok(()),
        }
    }

    /// Reads the same; says whether it is of such a policy.
    pub(super) fn restore(&mut self, saved: &mut &[u8]) -> std::io::Result<bool> {
        (self.agents, self.gaps) = BorshDeserialize::deserialize(saved)?;
        match (&mut self.pool, bool::deserialize(saved)?) {
            (None, false) => Ok(true),
            (Some(pool), true) => pool.restore(saved).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Takes a window that is not judged.
    pub(super) fn observe(&mut self, window: &Window) {
        self.agents.push_back([window.canary, window.baseline]);
        if self.agents.len() > COVERAGE_WINDOWS {
            self.agents.pop_front();
        }
    }

    /// Remembers windows that never came.
    pub(super) fn miss(&mut self, windows: u64) {
        let Some(mut last) = self.agents.back().copied() else {
            return;
        };
        for coverage in &mut last {
            coverage.reported = 0;
        }
        for _ in 0..windows.min(COVERAGE_WINDOWS as u64) {
            self.agents.push_back(last);
            if self.agents.len() > COVERAGE_WINDOWS {
                self.agents.pop_front();
            }
        }
    }

    /// Takes a window. `proven` is the evidence from which safety counts as proven.
    pub(super) fn take(&mut self, window: &Window, onset: Onset, bars: &Bars, proven: Bits) {
        if let Some(before) = self.agents.back() {
            let arms = Arms {
                canary: fell_silent(before[0], window.canary),
                baseline: fell_silent(before[1], window.baseline),
            };
            let both = arms.canary.requests > 0 && arms.baseline.requests > 0;
            let evidence = self.silent.evidence(arms.canary, arms.baseline);
            let piece = evidence.map(|bits| both.then_some((bits, arms)));
            self.gaps.take(&piece, onset, &bars.gaps);
            self.gaps.settle(&bars.gaps, false);
        }
        self.observe(window);
        if let Some(pool) = &mut self.pool {
            pool.take(window, onset, bars, proven);
        }
    }

    /// What is found; only where there is evidence.
    pub(super) fn readings(&self, bars: &Bars) -> [Option<Reading>; 2] {
        let gaps = (self.gaps.blocks() > 0).then(|| self.gaps.reading(Metric::Gaps, bars.gaps.budget));
        let pool = self.pool.as_ref().filter(|pool| pool.is_begun());
        [pool.map(|pool| pool.reading(bars.pool.budget)), gaps]
    }

    /// What was seen, in one clause.
    pub(super) fn seen(&self, metric: Metric) -> String {
        match (metric, &self.pool) {
            (Metric::Pool, Some(pool)) => pool.seen(),
            _ => {
                let Arms { canary, baseline } = self.gaps.episode();
                format!(
                    "agents fell silent {} times on the canary (in {} reports) and {} times on the baseline (in {})",
                    canary.events, canary.requests, baseline.events, baseline.requests
                )
            }
        }
    }

    /// Whether the pool is proven to be within its limit.
    pub(super) fn is_pool_proven(&self) -> bool {
        self.pool.as_ref().is_some_and(PoolTracks::is_proven)
    }

    /// Why more evidence does not prove that it is, if that is so.
    pub(super) fn pool_obstacle(&self) -> Option<&'static str> {
        self.pool.as_ref().and_then(PoolTracks::obstacle)
    }

    /// Agents and data that must be there.
    pub(super) fn shortfalls(&self, window: &Window, fleet: &Group, policy: &Policy) -> Shortfalls {
        let mut found = Shortfalls::default();
        let required = |requirement| policy.defaults.required.contains(&requirement);
        let idle = |windows: u32| windows >= NODATA_WINDOWS;
        let all = [Metric::ErrorsLive, Metric::ErrorsSla, Metric::LatencySla];
        let arms_missing = if window.canary.reported == 0 {
            Some((&all[..], "no canary agent reported".to_owned()))
        } else if idle(fleet.without_canary) {
            let seen = format!("no canary request in the last {} windows", fleet.without_canary);
            Some((&all[..], seen))
        } else if window.baseline.reported == 0 {
            let seen = "no baseline agent reported, so there is nothing to compare with".to_owned();
            Some((&all[..1], seen))
        } else if idle(fleet.without_live) {
            let seen = format!(
                "in the last {} windows no tenant had requests on both arms to compare",
                fleet.without_live
            );
            Some((&all[..1], seen))
        } else {
            None
        };
        if let Some((metrics, seen)) = arms_missing {
            for metric in metrics {
                found.units.push(without_evidence(*metric, State::NoData, &seen));
            }
            found.missing.push(seen);
        } else if fleet.live_blocks() == 0 {
            let seen = "no tenant has had requests on both arms to compare yet";
            found.missing.push(seen.to_owned());
        }
        if fleet.totals.canary.requests > 0 && window.canary.reported > 0 {
            let unmeasured = self
                .pool
                .as_ref()
                .map_or(Some(NOT_MEASURED), PoolTracks::unmeasured);
            let measured = fleet.slow.requests > 0 && !idle(fleet.slow.unmeasured);
            let latency = (required(Requirement::Latency) && !measured).then_some((
                Metric::LatencySla,
                "no latency is measured, and the policy requires it",
            ));
            let unmeasured = unmeasured.filter(|_| required(Requirement::Pool));
            let pool = unmeasured.map(|seen| (Metric::Pool, seen));
            for (metric, seen) in latency.into_iter().chain(pool) {
                found.missing.push(seen.to_owned());
                found.units.push(without_evidence(metric, State::NoData, seen));
            }
        }
        let answered = fleet
            .totals
            .canary
            .requests
            .saturating_sub(fleet.totals.canary.events);
        let least = u128::from(policy.rollout.min_coverage.traffic.ppm);
        if required(Requirement::Latency)
            && u128::from(fleet.slow.requests) * 1_000_000 < u128::from(answered) * least
        {
            found.missing.push(format!(
                "the latency of only {} of the canary's requests is measured",
                percent_of(fleet.slow.requests, answered)
            ));
        }
        let least_agents = policy.rollout.min_coverage.agents.ppm;
        if required(Requirement::Pool) {
            self.require_pools(least_agents, &mut found);
        }
        self.require_agents(window, least_agents, &mut found);
        found
    }

    /// Enough of the agents that reported must have read a pool over the last windows.
    fn require_pools(&self, minimum_ppm: u32, found: &mut Shortfalls) {
        let short = self.pool.as_ref().map(|pool| pool.short_of_agents(minimum_ppm));
        let short = short.unwrap_or_default();
        if !short.is_empty() {
            let seen = short.join(", ");
            found
                .units
                .push(without_evidence(Metric::Pool, State::Gap, &seen));
            found.missing.push(seen);
        }
    }

    /// Enough agents must have reported, now and over the last windows.
    fn require_agents(&self, window: &Window, minimum_ppm: u32, found: &mut Shortfalls) {
        let mut gaps = Vec::new();
        for (index, (arm, now)) in [("canary", window.canary), ("baseline", window.baseline)]
            .into_iter()
            .enumerate()
        {
            if now.expected == 0 && minimum_ppm > 0 {
                gaps.push(format!("no {arm} agent is known"));
                continue;
            }
            if is_short(now.reported.into(), now.expected.into(), minimum_ppm) {
                gaps.push(format!(
                    "{} of {} {arm} agents reported, and {} are needed",
                    now.reported,
                    now.expected,
                    percent(u128::from(minimum_ppm) * 1_000)
                ));
                continue;
            }
            let sum = |count: fn(&Coverage) -> u32| {
                self.agents
                    .iter()
                    .map(|arms| u64::from(count(&arms[index])))
                    .sum::<u64>()
            };
            let (reported, expected) = (sum(|arm| arm.reported), sum(|arm| arm.expected));
            if is_short(reported, expected, minimum_ppm) {
                found.missing.push(format!(
                    "only {} of the {arm} agents' windows arrived in the last {COVERAGE_WINDOWS} windows",
                    percent_of(reported, expected)
                ));
            }
        }
        gaps.extend(unseen(window));
        if !gaps.is_empty() {
            let seen = gaps.join(", ");
            found
                .units
                .push(without_evidence(Metric::Gaps, State::Gap, &seen));
            found.missing.push(seen);
        }
    }
}

/// What of the canary nobody sees, whatever share of the agents must report: it may be what fails.
fn unseen(window: &Window) -> Option<String> {
    let Pods {
        canary,
        unobserved,
        stale,
    } = window.pods?;
    match unobserved {
        0 if stale => Some("the cluster does not say at present which pods the canary has".to_owned()),
        0 => None,
        1 => Some(format!("1 of {canary} canary pods has no agent")),
        _ => Some(format!("{unobserved} of {canary} canary pods have no agent")),
    }
}

/// Whether fewer reported than are needed of those that were expected.
fn is_short(reported: u64, expected: u64, minimum_ppm: u32) -> bool {
    expected > 0 && u128::from(reported) * 1_000_000 < u128::from(expected) * u128::from(minimum_ppm)
}

/// Agents that reported the window before, and those of them that do not report this one. Only the window in which
/// an agent falls silent is an event: that it stays silent is no news, and would make one event look like many.
fn fell_silent(before: Coverage, now: Coverage) -> Counts {
    // Those who left are not expected, and those who have just come did not report before.
    let missed = now.expected.saturating_sub(now.reported);
    let fewer = before.reported.saturating_sub(now.reported);
    Counts {
        requests: before.reported.into(),
        events: fewer.min(missed).into(),
    }
}

fn without_evidence(metric: Metric, state: State, seen: &str) -> UnitReport {
    UnitReport {
        unit: Unit::Fleet,
        metric,
        state,
        bits: 0,
        budget: 0,
        score_ppm: 1_000_000,
        seen: seen.to_owned(),
        limits: String::new(),
    }
}
