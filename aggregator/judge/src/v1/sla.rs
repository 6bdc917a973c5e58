//! A rate against a fixed limit, on both arms.

use super::{
    outcome::State,
    track::{Arms, Bar, Piece, Reading, Track},
};
use crate::{
    budget::Metric,
    eprocess::{CEILINGS, Ceiling, Counts, Evidence, Onset, Prior, Proof, REPEATS, Safety},
    fixed::{Bits, OutOfRange},
};
use borsh::{BorshDeserialize, BorshSerialize};

/// A metric that is held against a limit: harm on the canary, the same on the baseline, and safety.
#[derive(Debug, Clone, Default, BorshSerialize, BorshDeserialize)]
pub(super) struct Sla {
    pub(super) canary: Track<CEILINGS, Arms>,
    baseline: Evidence<REPEATS>,
    proof: Proof,
    baseline_blocks: u32,
    proven: bool,
}

/// What one window of a tenant adds to the same metric of fleet and cohorts.
#[derive(Debug)]
pub(super) struct SlaStep {
    pub(super) canary: Piece<CEILINGS, Arms>,
    pub(super) baseline: Piece<REPEATS, ()>,
    /// The canary's requests, as many of them counted as bad as can have been, and the limit on their rate.
    pub(super) safety: Counts,
    pub(super) limit_ppb: u64,
}

impl Default for SlaStep {
    fn default() -> Self {
        Self {
            canary: Ok(None),
            baseline: Ok(None),
            safety: Counts::default(),
            limit_ppb: 0,
        }
    }
}

impl Sla {
    /// Adds a window. `possibly` counts as many events as there can have been.
    pub(super) fn take(
        &mut self,
        arms: Arms,
        possibly: Counts,
        (ceiling, safety): (&Ceiling, &Safety),
        onset: Onset,
        (bar, repeats): (&Bar<CEILINGS>, &Prior<REPEATS>),
    ) -> SlaStep {
        let mut step = SlaStep {
            safety: possibly,
            limit_ppb: safety.limit_ppb(),
            ..SlaStep::default()
        };
        if arms.baseline.requests > 0 {
            let taken = ceiling.repeated(arms.baseline).and_then(|bits| {
                self.baseline_blocks = self.baseline_blocks.saturating_add(1);
                let start = onset.weight(self.baseline_blocks)?;
                self.baseline.add(&bits, repeats, start, bar.cap)?;
                // No more than one block's worth, so that an incident that is over is soon forgotten.
                if self.baseline.is_above(bar.cap)? {
                    self.baseline.lower_to(bar.cap)?;
                }
                Ok(Some((bits, ())))
            });
            step.baseline = taken;
        }
        if arms.canary.requests > 0 {
            let proof = safety.evidence(possibly).and_then(|bits| self.proof.add(&bits));
            step.canary = proof.and_then(|()| Ok(Some((ceiling.evidence(arms.canary)?, arms))));
        }
        if step.baseline.is_err() {
            step.canary = Err(OutOfRange);
        }
        self.canary.take(&step.canary, onset, bar);
        step
    }

    pub(super) fn settle(&mut self, bar: &Bar<CEILINGS>, needed: Bits) {
        self.canary.settle(bar, is_over(&self.baseline));
        self.proven = self.proof.reaches(needed);
    }

    /// Whether anything was counted.
    pub(super) fn is_begun(&self) -> bool {
        self.canary.blocks() > 0 || self.baseline_blocks > 0
    }

    /// Whether safety is proven.
    pub(super) fn is_proven(&self) -> bool {
        self.proven
    }

    pub(super) fn reading(&self, metric: Metric, budget: Bits) -> Reading {
        let mut reading = self.canary.reading(metric, budget);
        if reading.state == State::Clear && self.proven {
            reading.state = State::Proven;
        }
        reading
    }
}

/// Whether the baseline is over the limit too, as far as its evidence says.
pub(super) fn is_over(baseline: &Evidence<REPEATS>) -> bool {
    baseline.is_above(-1).unwrap_or(false)
}
