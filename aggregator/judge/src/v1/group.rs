//! The fleet and its cohorts: the evidence of their tenants, added up.

use super::{
    outcome::{State, Unit},
    past::Marks,
    sla::{SlaStep, is_over},
    tenant::{Episode, Step},
    track::{Arms, Bar, Bars, Reading, Seen, Sum, Track},
};
use crate::{
    budget::Metric,
    eprocess::{
        CEILINGS, Counts, Evidence, LIVES, ODDS, Onset, Prior, Proof, REPEATS, Safety, TAILS, TailCounts,
    },
    fixed::{Bits, OutOfRange},
};
use borsh::{BorshDeserialize, BorshSerialize};

/// Some tenants together.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) unit: Unit,
    pub(super) bars: Bars,
    live: (Track<LIVES, Arms>, Sum<LIVES, Arms>),
    tail: (Track<TAILS, TailCounts>, Sum<TAILS, TailCounts>),
    pub(super) errors: GroupSla,
    pub(super) slow: GroupSla,
    probes_live: (Track<LIVES, Arms>, Sum<LIVES, Arms>),
    probes: GroupSla,
    pub(super) totals: Arms,
    /// What this window has added so far.
    window: Arms,
    /// Windows in a row without canary requests, and without a comparison with the baseline.
    pub(super) without_canary: u32,
    pub(super) without_live: u32,
}

/// Tenants against a limit: the sums of their evidence on both arms, and safety on pooled counts.
#[derive(Debug, Clone, Default, BorshSerialize, BorshDeserialize)]
pub(super) struct GroupSla {
    canary: Track<CEILINGS, Arms>,
    sum: Sum<CEILINGS, Arms>,
    baseline: Evidence<REPEATS>,
    baseline_blocks: u32,
    baseline_sum: Sum<REPEATS, ()>,
    proof: Proof,
    safety: Counts,
    /// The sum of the limits of the requests in `safety`.
    limits: u128,
    /// Windows in a row in which the canary had requests and none was measured.
    pub(super) unmeasured: u32,
    /// Canary requests on which the proof rests.
    pub(super) requests: u64,
}

impl Group {
    pub(super) fn new(unit: Unit, bars: Bars) -> Self {
        Self {
            unit,
            bars,
            live: Default::default(),
            tail: Default::default(),
            errors: GroupSla::default(),
            slow: GroupSla::default(),
            probes_live: Default::default(),
            probes: GroupSla::default(),
            totals: Arms::default(),
            window: Arms::default(),
            without_canary: 0,
            without_live: 0,
        }
    }

    /// Writes what a rollout has made of it; who it is and its bars follow from the policy.
    pub(super) fn save(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        let evidence = (
            &self.live,
            &self.tail,
            &self.errors,
            &self.slow,
            &self.probes_live,
            &self.probes,
        );
        evidence.serialize(out)?;
        (&self.totals, &self.window, self.without_canary, self.without_live).serialize(out)
    }

    /// Reads the same.
    pub(super) fn restore(&mut self, saved: &mut &[u8]) -> std::io::Result<()> {
        (
            self.live,
            self.tail,
            self.errors,
            self.slow,
            self.probes_live,
            self.probes,
        ) = BorshDeserialize::deserialize(saved)?;
        (self.totals, self.window, self.without_canary, self.without_live) =
            BorshDeserialize::deserialize(saved)?;
        Ok(())
    }

    /// Adds what one tenant brings.
    pub(super) fn add(&mut self, step: &Step) {
        self.window.add(&step.arms);
        self.live.1.add(&step.live);
        self.tail.1.add(&step.tail);
        self.errors.add(&step.errors);
        self.slow.add(&step.slow);
        self.probes_live.1.add(&step.probes_live);
        self.probes.add(&step.probes);
    }

    /// Takes what the window has added up to.
    pub(super) fn close_window(&mut self, onset: Onset) {
        let live = self.live.1.take();
        let count = |idle: u32, is_there: bool| if is_there { 0 } else { idle.saturating_add(1) };
        let window = std::mem::take(&mut self.window);
        self.totals.add(&window);
        self.without_canary = count(self.without_canary, window.canary.requests > 0);
        self.without_live = count(self.without_live, live.0.is_some());
        let bars = &self.bars;
        take(&mut self.live.0, live, onset, &bars.live);
        take(&mut self.tail.0, self.tail.1.take(), onset, &bars.tail);
        take(
            &mut self.probes_live.0,
            self.probes_live.1.take(),
            onset,
            &bars.probes_live,
        );
        let has_canary = window.canary.requests > 0;
        self.errors
            .close_window(onset, (&bars.errors, &bars.repeats), has_canary);
        self.slow
            .close_window(onset, (&bars.slow, &bars.repeats), has_canary);
        self.probes
            .close_window(onset, (&bars.probes, &bars.repeats), false);
    }

    /// Blocks in which tenants were compared with the live baseline.
    pub(super) fn live_blocks(&self) -> u32 {
        self.live.0.blocks()
    }

    /// What is found, metric by metric; only where there is evidence. `proven` says from which evidence on safety
    /// counts as proven.
    pub(super) fn readings(&self, proven: Bits) -> [Option<Reading>; 5] {
        let bars = &self.bars;
        let slow = self.slow.canary.blocks() > 0 || self.slow.baseline_blocks > 0;
        let probes_live = self.probes_live.0.blocks() > 0;
        let probes = probes_live || self.probes.canary.blocks() > 0;
        [
            Some(self.live.0.reading(Metric::ErrorsLive, bars.live.budget)),
            Some(self.errors.reading(Metric::ErrorsSla, bars.errors.budget, proven)),
            (self.tail.0.blocks() > 0).then(|| self.tail.0.reading(Metric::LatencyLive, bars.tail.budget)),
            slow.then(|| self.slow.reading(Metric::LatencySla, bars.slow.budget, proven)),
            probes.then(|| {
                let budget = bars.probes.budget;
                if self.is_live_probe_worse() {
                    self.probes_live.0.reading(Metric::Probes, budget)
                } else {
                    self.probes.reading(Metric::Probes, budget, proven)
                }
            }),
        ]
    }

    /// The counts behind a reading.
    pub(super) fn episode(&self, metric: Metric) -> Episode {
        match metric {
            Metric::ErrorsSla => Episode::Limit(*self.errors.canary.episode()),
            Metric::LatencySla => Episode::Limit(*self.slow.canary.episode()),
            Metric::LatencyLive => {
                let track = &self.tail.0;
                Episode::Tail(
                    *track.episode(),
                    track.best_alternative() / ODDS,
                    Marks::default(),
                )
            }
            Metric::Probes if self.is_live_probe_worse() => Episode::Live(*self.probes_live.0.episode()),
            Metric::Probes => Episode::Limit(*self.probes.canary.episode()),
            Metric::ErrorsLive | Metric::Pool | Metric::Gaps => Episode::Live(*self.live.0.episode()),
        }
    }

    fn is_live_probe_worse(&self) -> bool {
        let rank = |state: State, bits: Bits| (state.severity(), bits);
        let (live, limit) = (&self.probes_live.0, &self.probes.canary);
        rank(live.state(), live.bits()) > rank(limit.state(), limit.bits())
    }
}

fn take<const K: usize, S: Seen>(
    track: &mut Track<K, S>,
    (sum, failed): (Option<([Bits; K], S)>, bool),
    onset: Onset,
    bar: &Bar<K>,
) {
    track.take(&Ok(sum), onset, bar);
    if failed {
        track.miss();
    }
    track.settle(bar, false);
}

impl GroupSla {
    fn add(&mut self, step: &SlaStep) {
        self.sum.add(&step.canary);
        self.baseline_sum.add(&step.baseline);
        self.safety.add(step.safety);
        self.limits = self
            .limits
            .saturating_add(u128::from(step.safety.requests) * u128::from(step.limit_ppb));
    }

    fn close_window(
        &mut self,
        onset: Onset,
        (bar, repeats): (&Bar<CEILINGS>, &Prior<REPEATS>),
        has_canary: bool,
    ) {
        let (canary, failed) = self.sum.take();
        let pooled = std::mem::take(&mut self.safety);
        let limits = std::mem::take(&mut self.limits);
        let (baseline, baseline_failed) = self.baseline_sum.take();
        let repeated = self.repeat(baseline.map(|(bits, ())| bits), onset, bar.cap, repeats);
        let proof = self.prove(pooled, limits);
        self.unmeasured = if has_canary && pooled.requests == 0 {
            self.unmeasured.saturating_add(1)
        } else {
            0
        };
        self.canary.take(&Ok(canary), onset, bar);
        if failed || baseline_failed || repeated.and(proof).is_err() {
            self.canary.miss();
        }
        self.canary.settle(bar, is_over(&self.baseline));
    }

    fn repeat(
        &mut self,
        bits: Option<[Bits; REPEATS]>,
        onset: Onset,
        cap: Bits,
        prior: &Prior<REPEATS>,
    ) -> Result<(), OutOfRange> {
        let Some(bits) = bits else { return Ok(()) };
        self.baseline_blocks = self.baseline_blocks.saturating_add(1);
        let start = onset.weight(self.baseline_blocks)?;
        self.baseline.add(&bits, prior, start, cap)?;
        if self.baseline.is_above(cap)? {
            self.baseline.lower_to(cap)?;
        }
        Ok(())
    }

    /// Adds to the proof that the mean rate is below the mean of the limits.
    fn prove(&mut self, pooled: Counts, limits: u128) -> Result<(), OutOfRange> {
        if pooled.requests == 0 {
            return Ok(());
        }
        self.requests = self.requests.saturating_add(pooled.requests);
        let limit = u64::try_from(limits / u128::from(pooled.requests)).map_err(|_| OutOfRange)?;
        let bits = Safety::below(limit)?.evidence(pooled)?;
        self.proof.add(&bits)
    }

    /// Whether safety is proven with this much evidence.
    pub(super) fn is_proven(&self, needed: Bits) -> bool {
        self.requests > 0 && self.proof.reaches(needed)
    }

    fn reading(&self, metric: Metric, budget: Bits, proven: Bits) -> Reading {
        let mut reading = self.canary.reading(metric, budget);
        if reading.state == State::Clear && self.is_proven(proven) {
            reading.state = State::Proven;
        }
        reading
    }
}
