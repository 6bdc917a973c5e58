//! What is kept of one tenant, and what a window adds to it.

use borsh::{BorshDeserialize, BorshSerialize};
use coalmine_proto::histogram::Histogram;

use super::{
    outcome::State,
    past::{Marks, Past},
    sla::{Sla, SlaStep},
    track::{Arms, Bars, Piece, Reading, Seen as _, Track},
};
use crate::{
    budget::Metric,
    eprocess::{
        Ceiling, Counts, LIVES, LiveTest, ODDS, Onset, QUANTILES, Safety, TAILS, TailCounts, TailTest,
    },
    evidence::{ArmCounts, Latency, TenantWindow},
    fixed::{Bits, OutOfRange},
    threshold::Thresholds,
};

/// Requests on each arm from which a block is closed.
const BLOCK_REQUESTS: u64 = 5;

/// Windows after which a block is closed in any case.
pub(super) const BLOCK_WINDOWS: u32 = 6;

/// Marks are set anew after each of the first blocks, and then after each sixth.
const EARLY_BLOCKS: u32 = 3;
const BLOCKS_BETWEEN_MARKS: u32 = 6;

/// The fleet and its cohorts are held to a tighter margin than tenants, since a diffuse rise is seen there or nowhere:
/// to 2/5 of the tolerated ratio above 1, and to 1/5 of the tolerated increase. The defaults give 1.1 and 0.02 points.
const FLEET_RATIO_FIFTHS: u64 = 2;
const FLEET_INCREASE_PARTS: u64 = 5;

/// The tests that follow from a tenant's thresholds. Tenants with the same thresholds share them.
#[derive(Debug, Clone)]
pub(super) struct Tests {
    pub(super) thresholds: Thresholds,
    live: LiveTest,
    /// With the tolerance of fleet and cohorts.
    fleet: LiveTest,
    ceiling: Ceiling,
    safety: Safety,
}

impl Tests {
    pub(super) fn new(thresholds: Thresholds) -> Result<Self, OutOfRange> {
        let fleet = fleet_tolerance(thresholds);
        let live = |limits: Thresholds| LiveTest::new(limits.max_ratio_milli, limits.max_increase_ppb);
        Ok(Self {
            thresholds,
            live: live(thresholds)?,
            fleet: live(fleet)?,
            ceiling: Ceiling::above(thresholds.max_rate_ppb)?,
            safety: Safety::below(thresholds.max_rate_ppb)?,
        })
    }
}

/// The tolerance of fleet and cohorts, from a tenant's.
pub(super) fn fleet_tolerance(thresholds: Thresholds) -> Thresholds {
    Thresholds {
        max_ratio_milli: 1_000 + thresholds.max_ratio_milli.saturating_sub(1_000) * FLEET_RATIO_FIFTHS / 5,
        max_increase_ppb: thresholds.max_increase_ppb / FLEET_INCREASE_PARTS,
        ..thresholds
    }
}

/// What all tenants have in common.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) onset: Onset,
    pub(super) tail: TailTest,
    /// Against the p99 limit: at most one request in a hundred.
    pub(super) slow: Ceiling,
    pub(super) fast: Safety,
    /// Evidence that proves one tenant's safety.
    pub(super) proof: Bits,
}

/// Windows that wait until they are enough to be one piece of evidence.
#[derive(Debug, Clone, Copy, Default, BorshSerialize, BorshDeserialize)]
struct Block {
    arms: Arms,
    tail: TailCounts,
    /// The window of the rollout with which it began, from 1; 0 while there is none.
    opened: u32,
}

impl Block {
    /// Whether there is nothing to compare yet.
    fn is_one_sided(&self) -> bool {
        self.arms.canary.requests == 0 || self.arms.baseline.requests == 0
    }
}

/// One tenant.
#[derive(Debug, Clone, BorshSerialize, BorshDeserialize)]
pub(super) struct Tenant {
    /// Which of the judge's tests and bars are this tenant's.
    #[borsh(skip)]
    pub(super) tests: u32,
    #[borsh(skip)]
    pub(super) bars: u32,
    /// Which cohorts it belongs to.
    #[borsh(skip)]
    pub(super) cohorts: Box<[u32]>,
    block: Block,
    /// Number of the block, so that a deadline is known to be this block's.
    serial: u32,
    past: Past,
    marks: Marks,
    live: Track<LIVES, Arms>,
    errors: Sla,
    tail: Track<TAILS, TailCounts>,
    slow: Sla,
    probes: Option<Box<Probes>>,
    /// Requests so far, the warm-up's not counted.
    pub(super) canary_requests: u64,
    pub(super) baseline_requests: u64,
    /// Windows of the rollout before it was first seen, and until it was last seen.
    admitted: u32,
    seen: u32,
    pub(super) summary: Summary,
}

/// Active checks, against the baseline's and against the limit on errors.
#[derive(Debug, Clone, Default, BorshSerialize, BorshDeserialize)]
struct Probes {
    live: Track<LIVES, Arms>,
    limit: Sla,
}

/// What the verdict needs of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct Summary {
    pub(super) state: State,
    pub(super) score_ppm: u32,
    pub(super) suspected: bool,
    /// Whether anything is to be said: a metric that is not CLEAR, or a score below 1.
    pub(super) notable: bool,
}

impl Default for Summary {
    fn default() -> Self {
        Self {
            state: State::Clear,
            score_ppm: 1_000_000,
            suspected: false,
            notable: false,
        }
    }
}

/// What a tenant adds to fleet and cohorts in one window.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) arms: Arms,
    pub(super) live: Piece<LIVES, Arms>,
    pub(super) tail: Piece<TAILS, TailCounts>,
    pub(super) errors: SlaStep,
    pub(super) slow: SlaStep,
    pub(super) probes_live: Piece<LIVES, Arms>,
    pub(super) probes: SlaStep,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            arms: Arms::default(),
            live: Ok(None),
            tail: Ok(None),
            errors: SlaStep::default(),
            slow: SlaStep::default(),
            probes_live: Ok(None),
            probes: SlaStep::default(),
        }
    }
}

/// Requests and errors of both arms.
pub(super) fn arms_of(row: &TenantWindow) -> Arms {
    let errors = |counts: &ArmCounts| Counts {
        requests: counts.requests,
        events: counts.errors,
    };
    Arms {
        canary: errors(&row.canary),
        baseline: errors(&row.baseline),
    }
}

fn probes_of(row: &TenantWindow) -> Arms {
    let failed = |counts: &ArmCounts| Counts {
        requests: counts.probes.checks,
        events: counts.probes.failed,
    };
    Arms {
        canary: failed(&row.canary),
        baseline: failed(&row.baseline),
    }
}

/// The latencies of one arm: none of no requests; unknown if there were requests and nothing was measured.
fn latencies<'a>(counts: &'a ArmCounts, none: &'a Histogram) -> Option<&'a Histogram> {
    match &counts.latency {
        Some(latency) => Some(&latency.histogram),
        None => (counts.requests == 0).then_some(none),
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

impl Tenant {
    /// A tenant that nothing is known of, after so many windows of the rollout.
    pub(super) fn new(admitted: u32) -> Self {
        Self {
            tests: 0,
            bars: 0,
            cohorts: Box::default(),
            block: Block::default(),
            serial: 0,
            past: Past::default(),
            marks: Marks::default(),
            live: Track::default(),
            errors: Sla::default(),
            tail: Track::default(),
            slow: Sla::default(),
            probes: None,
            canary_requests: 0,
            baseline_requests: 0,
            admitted,
            seen: admitted,
            summary: Summary::default(),
        }
    }

    /// The same with the judge's tests and bars that are its own, and its cohorts.
    pub(super) fn with(self, tests: u32, bars: u32, cohorts: Vec<u32>) -> Self {
        Self {
            tests,
            bars,
            cohorts: cohorts.into(),
            ..self
        }
    }

    /// Whether it had less than one canary request a window so far: what is wrong with it is seen, if at all, where
    /// many such tenants are added up. It depends on counts of requests in earlier windows only.
    pub(super) fn is_small(&self, window: u32) -> bool {
        let before = window.saturating_sub(self.admitted + 1);
        self.canary_requests < u64::from(before)
    }

    /// Takes the baseline's latencies of a window that is not judged.
    pub(super) fn observe(&mut self, row: &TenantWindow) {
        self.learn(row);
    }

    /// Takes a window's row, if it has one, and closes the open block if it is time.
    pub(super) fn take(
        &mut self,
        row: Option<&TenantWindow>,
        windows: u32,
        shared: &Shared,
        tests: &Tests,
        bars: &Bars,
    ) -> Step {
        let mut step = Step::default();
        if let Some(row) = row {
            self.seen = windows;
            self.take_row(row, windows, shared, tests, bars, &mut step);
        }
        self.close_block(windows, shared, tests, bars, &mut step);
        if let Some(row) = row {
            self.learn(row);
        }
        if self.block.is_one_sided() && (!self.marks.is_set() || self.is_time_for_marks()) {
            self.marks = self.past.marks();
        }
        self.settle(shared, bars);
        step
    }

    /// Whether it is suspected and has been silent for so many windows.
    pub(super) fn is_left_suspected(&self, windows: u32, silent: u32) -> bool {
        self.summary.suspected && windows - self.seen >= silent
    }

    /// Gives up what is above half of the evidence that halts: nothing more can be learned of a tenant that is gone.
    pub(super) fn relax(&mut self, bars: &Bars) {
        self.live.relax(&bars.live);
        self.tail.relax(&bars.tail);
        self.errors.canary.relax(&bars.errors);
        self.slow.canary.relax(&bars.slow);
        if let Some(probes) = &mut self.probes {
            probes.live.relax(&bars.probes_live);
            probes.limit.canary.relax(&bars.probes);
        }
    }

    fn is_time_for_marks(&self) -> bool {
        let blocks = self.live.blocks();
        blocks <= EARLY_BLOCKS || blocks.is_multiple_of(BLOCKS_BETWEEN_MARKS)
    }

    fn learn(&mut self, row: &TenantWindow) {
        if let Some(latency) = &row.baseline.latency {
            self.past.add(&latency.histogram);
        }
    }

    fn take_row(
        &mut self,
        row: &TenantWindow,
        windows: u32,
        shared: &Shared,
        tests: &Tests,
        bars: &Bars,
        step: &mut Step,
    ) {
        let arms = arms_of(row);
        step.arms = arms;
        self.canary_requests = self.canary_requests.saturating_add(arms.canary.requests);
        self.baseline_requests = self.baseline_requests.saturating_add(arms.baseline.requests);
        if arms.canary.requests > 0 || arms.baseline.requests > 0 {
            // While one arm was silent there is nothing to compare: the block begins when both have requests.
            if self.block.is_one_sided() {
                self.serial = self.serial.saturating_add(1);
                self.block = Block {
                    opened: windows,
                    ..Block::default()
                };
            }
            self.block.arms.add(&arms);
            let none = Histogram::new();
            if let (Some(canary), Some(baseline)) =
                (latencies(&row.canary, &none), latencies(&row.baseline, &none))
                && self.marks.is_set()
            {
                let margin = tests.thresholds.margin_buckets;
                self.block.tail.add(&self.marks.count(canary, baseline, margin));
            }
        }
        let onset = shared.onset;
        let limit = (&tests.ceiling, &tests.safety);
        step.errors = self
            .errors
            .take(arms, arms.canary, limit, onset, (&bars.errors, &bars.repeats));
        if let Some(limit) = tests.thresholds.p99_us {
            let surely = |latency: &Latency| latency.over(limit);
            let arms = Arms {
                canary: slow(&row.canary, surely),
                baseline: slow(&row.baseline, surely),
            };
            let possibly = slow(&row.canary, |latency| latency.over_at_most(limit));
            step.slow = self.slow.take(
                arms,
                possibly,
                (&shared.slow, &shared.fast),
                onset,
                (&bars.slow, &bars.repeats),
            );
        }
        let checks = probes_of(row);
        if checks != Arms::default() {
            let probes = self.probes.get_or_insert_default();
            let both = checks.canary.requests > 0 && checks.baseline.requests > 0;
            let evidence = |test: &LiveTest| {
                let bits = test.evidence(checks.canary, checks.baseline)?;
                Ok(both.then_some((bits, checks)))
            };
            probes.live.take(&evidence(&tests.live), onset, &bars.probes_live);
            step.probes_live = evidence(&tests.fleet);
            step.probes =
                probes
                    .limit
                    .take(checks, checks.canary, limit, onset, (&bars.probes, &bars.repeats));
        }
    }

    /// Takes the open block as evidence when it is large or old enough.
    fn close_block(&mut self, windows: u32, shared: &Shared, tests: &Tests, bars: &Bars, step: &mut Step) {
        let Arms { canary, baseline } = self.block.arms;
        let large = canary.requests >= BLOCK_REQUESTS && baseline.requests >= BLOCK_REQUESTS;
        if self.block.opened == 0 || (!large && !self.is_due(windows)) {
            return;
        }
        let block = std::mem::take(&mut self.block);
        if canary.requests == 0 || baseline.requests == 0 {
            return;
        }
        let evidence = |test: &LiveTest| Ok(Some((test.evidence(canary, baseline)?, block.arms)));
        self.live.take(&evidence(&tests.live), shared.onset, &bars.live);
        step.live = evidence(&tests.fleet);
        if block.tail.canary > 0 && block.tail.baseline > 0 {
            step.tail = self.tail_evidence(&block.tail, &shared.tail, tests.thresholds.margin_buckets);
            self.tail.take(&step.tail, shared.onset, &bars.tail);
        }
    }

    fn tail_evidence(&self, counts: &TailCounts, test: &TailTest, margin: u32) -> Piece<TAILS, TailCounts> {
        let mut bits = [0; TAILS];
        for q in 0..QUANTILES {
            let (Some(share), Some(_)) = (self.marks.share(q), self.marks.limits_ns(q, margin)) else {
                continue;
            };
            bits[q * ODDS..][..ODDS].copy_from_slice(&test.evidence(counts, q, share)?);
        }
        Ok(Some((bits, *counts)))
    }

    /// Whether a block is open that has lasted long enough. Windows of the rollout are counted, also those in which the tenant was silent.
    fn is_due(&self, windows: u32) -> bool {
        self.block.opened > 0 && windows - self.block.opened + 1 >= BLOCK_WINDOWS
    }

    /// The open block's number and the window in which it has to be closed.
    pub(super) fn open_block(&self) -> Option<(u32, u32)> {
        (self.block.opened > 0).then(|| (self.serial, self.block.opened + BLOCK_WINDOWS - 1))
    }

    fn settle(&mut self, shared: &Shared, bars: &Bars) {
        self.live.settle(&bars.live, false);
        self.tail.settle(&bars.tail, false);
        self.errors.settle(&bars.errors, shared.proof);
        self.slow.settle(&bars.slow, shared.proof);
        if let Some(probes) = &mut self.probes {
            probes.live.settle(&bars.probes_live, false);
            probes.limit.settle(&bars.probes, shared.proof);
        }
    }

    /// What is found, metric by metric; only where there is evidence.
    pub(super) fn readings(&self, bars: &Bars) -> [Option<Reading>; 5] {
        let probes = self.probes.as_ref();
        [
            Some(self.live.reading(Metric::ErrorsLive, bars.live.budget)),
            Some(self.errors.reading(Metric::ErrorsSla, bars.errors.budget)),
            (self.tail.blocks() > 0).then(|| self.tail.reading(Metric::LatencyLive, bars.tail.budget)),
            self.slow
                .is_begun()
                .then(|| self.slow.reading(Metric::LatencySla, bars.slow.budget)),
            probes.map(|probes| probes.reading(bars.probes.budget)),
        ]
    }

    /// The counts behind a reading.
    pub(super) fn episode(&self, metric: Metric) -> Episode {
        match metric {
            Metric::ErrorsSla => Episode::Limit(*self.errors.canary.episode()),
            Metric::LatencySla => Episode::Limit(*self.slow.canary.episode()),
            Metric::LatencyLive => {
                let q = self.tail.best_alternative() / ODDS;
                Episode::Tail(*self.tail.episode(), q, self.marks)
            }
            Metric::Probes => self
                .probes
                .as_ref()
                .map_or(Episode::Live(Arms::default()), |probes| probes.episode()),
            Metric::ErrorsLive | Metric::Pool | Metric::Gaps => Episode::Live(*self.live.episode()),
        }
    }

    /// Whether what was read as a tenant can be one after so many windows: what stands for places is within its tables,
    /// and nothing has happened later than now.
    pub(super) fn is_sound(&self, windows: u32) -> bool {
        let latest = self.seen.max(self.admitted).max(self.block.opened);
        latest <= windows && self.past.is_sound() && self.marks.is_sound()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.past.memory_bytes()
            + size_of_val(&*self.cohorts)
            + self.probes.as_ref().map_or(0, |_| size_of::<Probes>())
    }
}

/// What was counted since evidence began to grow.
#[derive(Debug, Clone, Copy)]
pub(super) enum Episode {
    /// Against the baseline.
    Live(Arms),
    /// Against a limit.
    Limit(Arms),
    /// Slow requests against the baseline's quantile number q, with the marks of now.
    Tail(TailCounts, usize, Marks),
}

impl Probes {
    /// The more serious of the two questions.
    fn reading(&self, budget: Bits) -> Reading {
        let live = self.live.reading(Metric::Probes, budget);
        let limit = self.limit.reading(Metric::Probes, budget);
        if self.is_live_worse() { live } else { limit }
    }

    fn is_live_worse(&self) -> bool {
        let rank = |state: State, bits: Bits| (state.severity(), bits);
        rank(self.live.state(), self.live.bits()) > rank(self.limit.canary.state(), self.limit.canary.bits())
    }

    fn episode(&self) -> Episode {
        if self.is_live_worse() {
            Episode::Live(*self.live.episode())
        } else {
            Episode::Limit(*self.limit.canary.episode())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_fits_into_a_kibibyte_with_its_baseline() {
        // Most latencies of a tenant are within some eighty buckets of two bytes each; its name and places take 21 bytes.
        let usual = size_of::<Tenant>() + 2 * 80 + 21;
        assert!(usual <= 1_024, "{usual}");
    }
}
