//! The connection pool: waits and timeouts as events, against the baseline's and against the limit on waits.
//!
//! What an application does not count is not made up. Where waits are not all counted, those that are can show harm;
//! each other acquire may have been a wait, so that nothing is proven. Where acquires are not counted, requests stand
//! for them, of which there may be more or fewer: no share of waits is held against the limit then, and the arms are
//! compared only if both are estimated so.

use borsh::{BorshDeserialize, BorshSerialize};
use std::collections::VecDeque;

use super::{COVERAGE_WINDOWS, NODATA_WINDOWS, is_short};
use crate::{
    budget::Metric,
    eprocess::{Ceiling, Counts, LIVES, LiveTest, Onset, Safety},
    evidence::{Coverage, Pool, Window},
    fixed::{Bits, OutOfRange},
    policy::PoolLimits,
    quantity::{percent, percent_of},
    threshold::Thresholds,
    v1::{
        outcome::State,
        sla::Sla,
        track::{Arms, Bars, POOLS, Piece, Reading, Seen, Track},
    },
};
use coalmine_proto::names::Arm;

/// After this many windows in a row with every connection in use a pool is said to be full.
const FULL_WINDOWS: u32 = 3;

/// Nobody has said anything about a pool.
pub(super) const NOT_MEASURED: &str = "no connection pool is measured, and the policy requires it";

/// Why the limit says nothing about a pool whose acquires are estimated, and what to do.
const ACQUIRES_NOT_COUNTED: &str = "acquires of a connection are not counted, and requests do not tell which share of \
    them waits, so that pool.max_wait_rate is not judged, and the policy requires it; expose a pool metric that counts \
    acquires (the agent's --pool-metric acquires=NAME)";

/// Why nothing is proven where waits are a lower bound, and what to do.
const WAITS_NOT_COUNTED: &str =
    "waits are not all counted; expose a pool metric that counts them (the agent's --pool-metric waits=NAME)";

/// The connection pool, against the baseline's and against the limit on waits.
#[derive(Debug, Clone)]
pub(super) struct PoolTracks {
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
    /// The pools of the last window, canary and baseline.
    last: [PoolSum; 2],
    /// What was not counted when a pool was last reported, on the canary and on the baseline.
    uncounted: [Uncounted; 2],
    /// Agents of the last windows, canary and baseline: those that reported, and of these those that reported a pool.
    agents: VecDeque<[Coverage; 2]>,
}

/// What was counted at the pools of both arms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
struct PoolCounts {
    waits: Arms,
    timeouts: Arms,
}

/// The pools of one arm in one window.
#[derive(Debug, Clone, Copy, Default, BorshSerialize, BorshDeserialize)]
struct PoolSum {
    acquires: u64,
    waits: u64,
    timeouts: u64,
    used: u64,
    max: u64,
    /// Whether there is one.
    is_reported: bool,
    uncounted: Uncounted,
    agents: Option<u32>,
}

/// What is not counted at the pools of an arm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
struct Uncounted {
    /// Some of the waits.
    waits: bool,
    /// The acquires, for which requests stand.
    acquires: bool,
}

impl Seen for PoolCounts {
    fn add(&mut self, other: &Self) {
        self.waits.add(&other.waits);
        self.timeouts.add(&other.timeouts);
    }
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
            sum.is_reported = true;
            sum.uncounted.waits |= pool.at_least;
            sum.uncounted.acquires |= pool.estimated;
            // Of several pools the agents may be the same.
            sum.agents = sum.agents.max(pool.agents);
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

    /// As many waits as there can have been.
    fn possible_waits(&self) -> Counts {
        self.counts(if self.uncounted.waits {
            self.acquires
        } else {
            self.waits
        })
    }
}

impl PoolTracks {
    pub(super) fn new(pool: PoolLimits, limits: Thresholds) -> Result<Self, OutOfRange> {
        Ok(Self {
            waits: LiveTest::new(pool.max_ratio.milli, pool.max_increase.ppb)?,
            timeouts: LiveTest::new(limits.max_ratio_milli, limits.max_increase_ppb)?,
            live: Track::default(),
            ceiling: Ceiling::above(pool.max_wait_rate.ppb)?,
            safety: Safety::below(pool.max_wait_rate.ppb)?,
            limit: Sla::default(),
            unmeasured: 0,
            full: 0,
            last: Default::default(),
            uncounted: Default::default(),
            agents: VecDeque::new(),
        })
    }

    /// Writes what a rollout has made of it; its tests follow from the policy.
    pub(super) fn save(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        (&self.live, &self.limit, self.unmeasured, self.full).serialize(out)?;
        (self.last, self.uncounted, &self.agents).serialize(out)
    }

    /// Reads the same.
    pub(super) fn restore(&mut self, saved: &mut &[u8]) -> std::io::Result<()> {
        (self.live, self.limit, self.unmeasured, self.full) = BorshDeserialize::deserialize(saved)?;
        (self.last, self.uncounted, self.agents) = BorshDeserialize::deserialize(saved)?;
        Ok(())
    }

    pub(super) fn take(&mut self, window: &Window, onset: Onset, bars: &Bars, proven: Bits) {
        let sums = [Arm::Canary, Arm::Baseline].map(|arm| PoolSum::of(&window.pool, arm));
        self.remember(window, &sums);
        let [canary, baseline] = &sums;
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
        let is_same_kind = canary.uncounted.acquires == baseline.uncounted.acquires;
        if canary.acquires > 0 && baseline.acquires > 0 && is_same_kind {
            // Against a baseline that has more waits than are known, nobody could say that the canary has more.
            let has_waits = canary.uncounted.waits || !baseline.uncounted.waits;
            self.live
                .take(&self.evidence(counts, has_waits), onset, &bars.pool_live);
        }
        self.live.settle(&bars.pool_live, false);
        if !canary.uncounted.acquires {
            let mut waits = counts.waits;
            if baseline.uncounted.acquires {
                waits.baseline = Counts::default();
            }
            self.limit.take(
                waits,
                canary.possible_waits(),
                (&self.ceiling, &self.safety),
                onset,
                (&bars.pool, &bars.repeats),
            );
        }
        self.limit.settle(&bars.pool, proven);
    }

    fn remember(&mut self, window: &Window, sums: &[PoolSum; 2]) {
        let [canary, baseline] = sums;
        let count = |before: u32, is_so: bool| if is_so { before.saturating_add(1) } else { 0 };
        self.full = count(self.full, canary.is_full() && !baseline.is_full());
        self.unmeasured = count(self.unmeasured, canary.acquires == 0);
        self.last = *sums;
        let mut agents = [Coverage::default(); 2];
        let coverage = [window.canary, window.baseline];
        for (index, (sum, coverage)) in sums.iter().zip(coverage).enumerate() {
            if sum.is_reported {
                self.uncounted[index] = sum.uncounted;
            }
            // Where agents were counted, and now there is no pool, none of them reports one.
            let was_counted = self.agents.iter().any(|arms| arms[index].expected > 0);
            if sum.agents.is_some() || (!sum.is_reported && was_counted) {
                agents[index] = Coverage {
                    expected: coverage.reported,
                    reported: sum.agents.unwrap_or(0).min(coverage.reported),
                };
            }
        }
        self.agents.push_back(agents);
        if self.agents.len() > COVERAGE_WINDOWS {
            self.agents.pop_front();
        }
    }

    fn evidence(&self, counts: PoolCounts, has_waits: bool) -> Piece<POOLS, PoolCounts> {
        let mut bits = [0; POOLS];
        let (waits, timeouts) = (counts.waits, counts.timeouts);
        if has_waits {
            bits[..LIVES].copy_from_slice(&self.waits.evidence(waits.canary, waits.baseline)?);
        }
        bits[LIVES..].copy_from_slice(&self.timeouts.evidence(timeouts.canary, timeouts.baseline)?);
        Ok(Some((bits, counts)))
    }

    pub(super) fn is_begun(&self) -> bool {
        self.live.blocks() > 0 || self.limit.is_begun()
    }

    /// Whether it is proven to be within its limit.
    pub(super) fn is_proven(&self) -> bool {
        self.limit.is_proven() && !self.is_estimated()
    }

    /// Whether the canary's acquires are estimated.
    fn is_estimated(&self) -> bool {
        self.uncounted[0].acquires
    }

    /// Why what the policy requires is not judged, if it is not.
    pub(super) fn unmeasured(&self) -> Option<&'static str> {
        if self.unmeasured >= NODATA_WINDOWS {
            Some(NOT_MEASURED)
        } else if self.is_estimated() {
            Some(ACQUIRES_NOT_COUNTED)
        } else if self.is_begun() {
            None
        } else {
            Some(NOT_MEASURED)
        }
    }

    /// Why more evidence proves nothing, if that is so.
    pub(super) fn obstacle(&self) -> Option<&'static str> {
        self.uncounted[0].waits.then_some(WAITS_NOT_COUNTED)
    }

    /// The arms on which too few of the agents that reported have read a pool in the last windows. A scrape that
    /// failed has its events in the next, so what counts is not one window.
    pub(super) fn short_of_agents(&self, minimum_ppm: u32) -> Vec<String> {
        let mut short = Vec::new();
        for (index, arm) in ["canary", "baseline"].into_iter().enumerate() {
            let sum = |count: fn(&Coverage) -> u32| {
                let counts = self.agents.iter().map(|arms| u64::from(count(&arms[index])));
                counts.sum::<u64>()
            };
            let (read, reported) = (sum(|arm| arm.reported), sum(|arm| arm.expected));
            if is_short(read, reported, minimum_ppm) {
                short.push(format!(
                    "a connection pool was read in only {} of the {arm} agents' reports of the last \
                     {COVERAGE_WINDOWS} windows, and {} are needed (the agents' logs say why)",
                    percent_of(read, reported),
                    percent(u128::from(minimum_ppm) * 1_000)
                ));
            }
        }
        short
    }

    fn is_live_worse(&self) -> bool {
        let rank = |state: State, bits: Bits| (state.severity(), bits);
        let limit = &self.limit.canary;
        // The limit says nothing where it was never asked.
        let bits = if self.limit.is_begun() {
            limit.bits()
        } else {
            Bits::MIN
        };
        rank(self.live.state(), self.live.bits()) > rank(limit.state(), bits)
    }

    /// The more serious of the two questions; a pool that stays full is suspect in any case.
    pub(super) fn reading(&self, budget: Bits) -> Reading {
        let mut reading = if self.is_live_worse() {
            self.live.reading(Metric::Pool, budget)
        } else {
            self.limit.reading(Metric::Pool, budget)
        };
        // Whichever question is the more serious, safety is shown by the limit alone.
        if matches!(reading.state, State::Clear | State::Proven) {
            reading.state = if self.is_proven() {
                State::Proven
            } else {
                State::Clear
            };
        }
        if self.is_full() && !reading.state.is_trouble() {
            reading.state = State::Suspect;
        }
        reading
    }

    fn is_full(&self) -> bool {
        self.full >= FULL_WINDOWS
    }

    /// What was seen, in one clause.
    pub(super) fn seen(&self) -> String {
        let is_live = self.live.blocks() > 0 && self.is_live_worse();
        let mut seen = if is_live {
            self.seen_live()
        } else {
            let waits = self.limit.canary.episode().canary;
            format!(
                "{} of {} acquires of a connection had to wait on the canary ({})",
                waits.events,
                waits.requests,
                percent_of(waits.events, waits.requests)
            )
        };
        let [canary, baseline] = &self.uncounted;
        if canary.waits || (is_live && baseline.waits) {
            seen.push_str("; waits are not all counted");
        }
        if self.is_full() {
            let [canary, baseline] = &self.last;
            return format!(
                "{seen}; its pool has been full for {} windows ({} of {} connections in use, on the baseline {} of {})",
                self.full, canary.used, canary.max, baseline.used, baseline.max
            );
        }
        seen
    }

    fn seen_live(&self) -> String {
        let counts = self.live.episode();
        // The first alternatives are about waits.
        let (events, what) = if self.live.best_alternative() < LIVES {
            (counts.waits, "had to wait")
        } else {
            (counts.timeouts, "timed out")
        };
        let estimated = if self.is_estimated() {
            " (estimated by the requests)"
        } else {
            ""
        };
        format!(
            "{} of {} acquires of a connection{estimated} {what} on the canary ({}), {} of {} on the baseline ({})",
            events.canary.events,
            events.canary.requests,
            percent_of(events.canary.events, events.canary.requests),
            events.baseline.events,
            events.baseline.requests,
            percent_of(events.baseline.events, events.baseline.requests),
        )
    }
}
