//! What concerns the service as a whole: its agents, and its connection pool.

use borsh::{BorshDeserialize, BorshSerialize};
use std::collections::VecDeque;

use super::{
    group::Group,
    outcome::{State, Unit, UnitReport},
    sla::Sla,
    track::{Arms, Bars, POOLS, Piece, Reading, Seen, Track},
};
use crate::{
    budget::Metric,
    eprocess::{Ceiling, Counts, LIVES, LiveTest, Onset, Safety},
    evidence::{Coverage, Pool, Window},
    fixed::{Bits, OutOfRange},
    policy::{Policy, Requirement},
    quantity::{percent, percent_of},
    threshold::Thresholds,
};
use coalmine_proto::names::Arm;

/// After so many windows in a row without canary requests, or without a comparison, there is no data.
pub(super) const NODATA_WINDOWS: u32 = 12;

/// Over so many windows the agents' reports are held against the policy's minimum.
const COVERAGE_WINDOWS: usize = 10;

/// After so many windows in a row with every connection in use a pool is said to be full.
const FULL_WINDOWS: u32 = 3;

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

/// The connection pool, against the baseline's and against the limit on waits.
#[derive(Debug, Clone)]
struct PoolTracks {
    waits: LiveTest,
    timeouts: LiveTest,
    live: Track<POOLS, PoolCounts>,
    ceiling: Ceiling,
    safety: Safety,
    limit: Sla,
    /// Windows in a row without an acquire on the canary.
    unmeasured: u32,
    /// Windows in a row in which the canary's pool was full and the baseline's was not.
    full: u32,
    last: [PoolSum; 2],
}

/// What was counted at the pools of both arms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct PoolCounts {
    pub(super) waits: Arms,
    pub(super) timeouts: Arms,
}

impl Seen for PoolCounts {
    fn add(&mut self, other: &Self) {
        self.waits.add(&other.waits);
        self.timeouts.add(&other.timeouts);
    }
}

/// The pools of one arm in one window.
#[derive(Debug, Clone, Copy, Default, BorshSerialize, BorshDeserialize)]
struct PoolSum {
    acquires: u64,
    waits: u64,
    timeouts: u64,
    used: u64,
    max: u64,
}

impl PoolSum {
    fn of(pools: &[Pool], arm: Arm) -> Self {
        let mut sum = Self::default();
        for pool in pools.iter().filter(|pool| pool.arm == arm) {
            sum.acquires = sum.acquires.saturating_add(pool.acquires);
            sum.waits = sum.waits.saturating_add(pool.waits);
            sum.timeouts = sum.timeouts.saturating_add(pool.timeouts);
            sum.used = sum.used.saturating_add(pool.used);
            sum.max = sum.max.saturating_add(pool.max);
        }
        sum
    }

    fn is_full(&self) -> bool {
        self.max > 0 && self.used >= self.max
    }

    fn counts(&self, events: u64) -> Counts {
        Counts {
            requests: self.acquires,
            events,
        }
    }
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
        let pool = policy.defaults.pool.map(|pool| {
            Ok(PoolTracks {
                waits: LiveTest::new(pool.max_ratio.milli, pool.max_increase.ppb)?,
                timeouts: LiveTest::new(limits.max_ratio_milli, limits.max_increase_ppb)?,
                live: Track::default(),
                ceiling: Ceiling::above(pool.max_wait_rate.ppb)?,
                safety: Safety::below(pool.max_wait_rate.ppb)?,
                limit: Sla::default(),
                unmeasured: 0,
                full: 0,
                last: Default::default(),
            })
        });
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
        let pool = self.pool.as_ref();
        let pool = pool.map(|pool| (&pool.live, &pool.limit, pool.unmeasured, pool.full, pool.last));
        pool.serialize(out)
    }

    /// Reads the same; says whether it is of such a policy.
    pub(super) fn restore(&mut self, saved: &mut &[u8]) -> std::io::Result<bool> {
        (self.agents, self.gaps) = BorshDeserialize::deserialize(saved)?;
        match (&mut self.pool, BorshDeserialize::deserialize(saved)?) {
            (None, None) => Ok(true),
            (Some(pool), Some(saved)) => {
                (pool.live, pool.limit, pool.unmeasured, pool.full, pool.last) = saved;
                Ok(true)
            }
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
        self.pool.as_ref().is_some_and(|pool| pool.limit.is_proven())
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
            let pool_counted = self
                .pool
                .as_ref()
                .is_some_and(|pool| pool.is_begun() && !idle(pool.unmeasured));
            let measured = fleet.slow.requests > 0 && !idle(fleet.slow.unmeasured);
            let latency = (required(Requirement::Latency) && !measured).then_some((
                Metric::LatencySla,
                "no latency is measured, and the policy requires it",
            ));
            let pool = (required(Requirement::Pool) && !pool_counted).then_some((
                Metric::Pool,
                "no connection pool is measured, and the policy requires it",
            ));
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
        self.require_agents(window, policy.rollout.min_coverage.agents.ppm, &mut found);
        found
    }

    /// Enough agents must have reported, now and over the last windows.
    fn require_agents(&self, window: &Window, minimum_ppm: u32, found: &mut Shortfalls) {
        let is_short = |reported: u64, expected: u64| {
            expected > 0 && u128::from(reported) * 1_000_000 < u128::from(expected) * u128::from(minimum_ppm)
        };
        let mut gaps = Vec::new();
        for (index, (arm, now)) in [("canary", window.canary), ("baseline", window.baseline)]
            .into_iter()
            .enumerate()
        {
            if now.expected == 0 && minimum_ppm > 0 {
                gaps.push(format!("no {arm} agent is known"));
                continue;
            }
            if is_short(now.reported.into(), now.expected.into()) {
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
            if is_short(reported, expected) {
                found.missing.push(format!(
                    "only {} of the {arm} agents' windows arrived in the last {COVERAGE_WINDOWS} windows",
                    percent_of(reported, expected)
                ));
            }
        }
        if !gaps.is_empty() {
            let seen = gaps.join(", ");
            found
                .units
                .push(without_evidence(Metric::Gaps, State::Gap, &seen));
            found.missing.push(seen);
        }
    }
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

impl PoolTracks {
    fn take(&mut self, window: &Window, onset: Onset, bars: &Bars, proven: Bits) {
        let [canary, baseline] = [Arm::Canary, Arm::Baseline].map(|arm| PoolSum::of(&window.pool, arm));
        let counts = PoolCounts {
            waits: Arms {
                canary: canary.counts(canary.waits),
                baseline: baseline.counts(baseline.waits),
            },
            timeouts: Arms {
                canary: canary.counts(canary.timeouts),
                baseline: baseline.counts(baseline.timeouts),
            },
        };
        self.full = if canary.is_full() && !baseline.is_full() {
            self.full.saturating_add(1)
        } else {
            0
        };
        self.unmeasured = if canary.acquires == 0 {
            self.unmeasured.saturating_add(1)
        } else {
            0
        };
        self.last = [canary, baseline];
        if canary.acquires > 0 && baseline.acquires > 0 {
            self.live.take(&self.evidence(counts), onset, &bars.pool_live);
        }
        self.live.settle(&bars.pool_live, false);
        let waits = counts.waits;
        self.limit.take(
            waits,
            waits.canary,
            (&self.ceiling, &self.safety),
            onset,
            (&bars.pool, &bars.repeats),
        );
        self.limit.settle(&bars.pool, proven);
    }

    fn evidence(&self, counts: PoolCounts) -> Piece<POOLS, PoolCounts> {
        let mut bits = [0; POOLS];
        let (waits, timeouts) = (counts.waits, counts.timeouts);
        bits[..LIVES].copy_from_slice(&self.waits.evidence(waits.canary, waits.baseline)?);
        bits[LIVES..].copy_from_slice(&self.timeouts.evidence(timeouts.canary, timeouts.baseline)?);
        Ok(Some((bits, counts)))
    }

    fn is_begun(&self) -> bool {
        self.live.blocks() > 0 || self.limit.is_begun()
    }

    fn is_live_worse(&self) -> bool {
        let rank = |state: State, bits: Bits| (state.severity(), bits);
        rank(self.live.state(), self.live.bits()) > rank(self.limit.canary.state(), self.limit.canary.bits())
    }

    /// The more serious of the two questions; a pool that stays full is suspect in any case.
    fn reading(&self, budget: Bits) -> Reading {
        let mut reading = if self.is_live_worse() {
            self.live.reading(Metric::Pool, budget)
        } else {
            self.limit.reading(Metric::Pool, budget)
        };
        if self.is_full() && !reading.state.is_trouble() {
            reading.state = State::Suspect;
        }
        reading
    }

    fn is_full(&self) -> bool {
        self.full >= FULL_WINDOWS
    }

    fn seen(&self) -> String {
        let [canary, baseline] = &self.last;
        let seen = if self.is_live_worse() {
            let counts = self.live.episode();
            // The first alternatives are about waits.
            let (events, what) = if self.live.best_alternative() < LIVES {
                (counts.waits, "had to wait")
            } else {
                (counts.timeouts, "timed out")
            };
            format!(
                "{} of {} acquires of a connection {what} on the canary ({}), {} of {} on the baseline ({})",
                events.canary.events,
                events.canary.requests,
                percent_of(events.canary.events, events.canary.requests),
                events.baseline.events,
                events.baseline.requests,
                percent_of(events.baseline.events, events.baseline.requests),
            )
        } else {
            let waits = self.limit.canary.episode().canary;
            format!(
                "{} of {} acquires of a connection had to wait on the canary ({})",
                waits.events,
                waits.requests,
                percent_of(waits.events, waits.requests)
            )
        };
        if self.is_full() {
            return format!(
                "{seen}; its pool has been full for {} windows ({} of {} connections in use, on the baseline {} of {})",
                self.full, canary.used, canary.max, baseline.used, baseline.max
            );
        }
        seen
    }
}
