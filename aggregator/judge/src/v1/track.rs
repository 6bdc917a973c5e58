//! Evidence on one question about one unit, against its budget.

use super::outcome::State;
use crate::{
    budget::{Grant, Metric},
    eprocess::{
        CEILING_WEIGHTS, CEILINGS, Counts, Evidence, LIVE_WEIGHTS, LIVES, Onset, Prior, REPEATS,
        TAIL_WEIGHTS, TAILS, TailCounts,
    },
    fixed::{Bits, OutOfRange},
};
use borsh::{BorshDeserialize, BorshSerialize};

/// What adds up over windows.
pub(super) trait Seen: Clone + Default {
    fn add(&mut self, other: &Self);
}

/// Counts of both arms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct Arms {
    pub(super) canary: Counts,
    pub(super) baseline: Counts,
}

impl Seen for Arms {
    fn add(&mut self, other: &Self) {
        self.canary.add(other.canary);
        self.baseline.add(other.baseline);
    }
}

impl Seen for TailCounts {
    fn add(&mut self, other: &Self) {
        Self::add(self, other);
    }
}

impl Seen for () {
    fn add(&mut self, (): &Self) {}
}

/// Evidence that halts, the most that one block may add to it, and the weights of the alternatives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bar<const K: usize> {
    pub(super) budget: Bits,
    pub(super) cap: Bits,
    pub(super) prior: Prior<K>,
}

impl<const K: usize> Bar<K> {
    fn new(grant: &Grant, metric: Metric, weights: [u64; K]) -> Result<Self, OutOfRange> {
        let prior = Prior::new(weights)?;
        let budget = grant.budget(metric);
        let cap = if budget == Bits::MAX {
            0
        } else {
            prior.cap(budget)?
        };
        Ok(Self { budget, cap, prior })
    }
}

/// Waits and timeouts, each with all sizes of fault.
pub(super) const POOLS: usize = 2 * LIVES;

/// The bars of a unit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bars {
    pub(super) live: Bar<LIVES>,
    pub(super) errors: Bar<CEILINGS>,
    pub(super) tail: Bar<TAILS>,
    pub(super) slow: Bar<CEILINGS>,
    pub(super) probes_live: Bar<LIVES>,
    pub(super) probes: Bar<CEILINGS>,
    pub(super) pool_live: Bar<POOLS>,
    pub(super) pool: Bar<CEILINGS>,
    pub(super) gaps: Bar<LIVES>,
    /// Whether the baseline repeats the canary's trouble is asked of few sizes, with equal weights.
    pub(super) repeats: Prior<REPEATS>,
}

impl Bars {
    pub(super) fn new(grant: &Grant) -> Result<Self, OutOfRange> {
        let mut pool_weights = [0; POOLS];
        pool_weights[..LIVES].copy_from_slice(&LIVE_WEIGHTS);
        pool_weights[LIVES..].copy_from_slice(&LIVE_WEIGHTS);
        Ok(Self {
            live: Bar::new(grant, Metric::ErrorsLive, LIVE_WEIGHTS)?,
            errors: Bar::new(grant, Metric::ErrorsSla, CEILING_WEIGHTS)?,
            tail: Bar::new(grant, Metric::LatencyLive, TAIL_WEIGHTS)?,
            slow: Bar::new(grant, Metric::LatencySla, CEILING_WEIGHTS)?,
            probes_live: Bar::new(grant, Metric::Probes, LIVE_WEIGHTS)?,
            probes: Bar::new(grant, Metric::Probes, CEILING_WEIGHTS)?,
            pool_live: Bar::new(grant, Metric::Pool, pool_weights)?,
            pool: Bar::new(grant, Metric::Pool, CEILING_WEIGHTS)?,
            gaps: Bar::new(grant, Metric::Gaps, LIVE_WEIGHTS)?,
            repeats: Prior::equal()?,
        })
    }
}

/// What one window brings to a question: nothing, evidence with the counts that it is from, or a failure.
pub(super) type Piece<const K: usize, S> = Result<Option<([Bits; K], S)>, OutOfRange>;

/// What is found about a unit on a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) metric: Metric,
    pub(super) state: State,
    pub(super) bits: Bits,
    pub(super) budget: Bits,
}

/// Pieces of several tenants, added up. One that failed is left out, and said to be missing.
#[derive(Debug, Clone, BorshSerialize, BorshDeserialize)]
pub(super) struct Sum<const K: usize, S> {
    sum: Option<([Bits; K], S)>,
    failed: bool,
}

impl<const K: usize, S> Default for Sum<K, S> {
    fn default() -> Self {
        Self {
            sum: None,
            failed: false,
        }
    }
}

impl<const K: usize, S: Seen> Sum<K, S> {
    pub(super) fn add(&mut self, piece: &Piece<K, S>) {
        match (&mut self.sum, piece) {
            (_, Ok(None)) => {}
            (_, Err(OutOfRange)) => self.failed = true,
            (None, Ok(Some(first))) => self.sum = Some(first.clone()),
            (Some((sum, seen)), Ok(Some((bits, more)))) => {
                let mut added = *sum;
                for (sum, bits) in added.iter_mut().zip(bits) {
                    match sum.checked_add(*bits) {
                        Some(both) => *sum = both,
                        None => return self.failed = true,
                    }
                }
                *sum = added;
                seen.add(more);
            }
        }
    }

    /// What was added up, and whether something is missing; the sum begins anew.
    pub(super) fn take(&mut self) -> (Option<([Bits; K], S)>, bool) {
        (self.sum.take(), std::mem::take(&mut self.failed))
    }
}

/// Evidence of harm on one question, and what was seen since it began to grow.
#[derive(Debug, Clone, BorshSerialize, BorshDeserialize)]
pub(super) struct Track<const K: usize, S> {
    evidence: Evidence<K>,
    /// The lowest that the best alternative ever was: where a change would have begun.
    lowest: Bits,
    /// The evidence at which the track was found in breach; the finding stays.
    breached_at: Bits,
    /// What was counted since the evidence last began anew.
    episode: S,
    blocks: u32,
    state: State,
    failed: bool,
}

impl<const K: usize, S: Seen> Default for Track<K, S> {
    fn default() -> Self {
        Self {
            evidence: Evidence::default(),
            lowest: Bits::MAX,
            breached_at: Bits::MIN,
            episode: S::default(),
            blocks: 0,
            state: State::Clear,
            failed: false,
        }
    }
}

impl<const K: usize, S: Seen> Track<K, S> {
    /// Adds what a window brings. A failure is kept and reported.
    pub(super) fn take(&mut self, piece: &Piece<K, S>, onset: Onset, bar: &Bar<K>) {
        match piece {
            Ok(None) => {}
            Ok(Some((bits, seen))) => {
                if self.add(bits, seen, onset, bar).is_err() {
                    self.fail();
                }
            }
            Err(OutOfRange) => self.fail(),
        }
    }

    /// Gives up the evidence, which is always allowed, and remembers it. What comes later can still show harm.
    fn fail(&mut self) {
        self.failed = true;
        self.evidence = Evidence::default();
        self.episode = S::default();
    }

    /// Remembers that something is missing.
    pub(super) fn miss(&mut self) {
        self.failed = true;
    }

    /// Gives up what is above half of the budget.
    pub(super) fn relax(&mut self, bar: &Bar<K>) {
        if self.state == State::Suspect && self.evidence.lower_to(bar.budget / 2).is_err() {
            self.fail();
        }
        self.settle(bar, false);
    }

    fn add(&mut self, bits: &[Bits; K], seen: &S, onset: Onset, bar: &Bar<K>) -> Result<(), OutOfRange> {
        self.blocks = self.blocks.saturating_add(1);
        let start = onset.weight(self.blocks)?;
        let from = self.evidence.add(bits, &bar.prior, start, bar.cap)?;
        if from <= self.lowest {
            self.lowest = from;
            self.episode = S::default();
        }
        self.episode.add(seen);
        Ok(())
    }

    /// Draws the conclusion from the evidence. While the trouble is `shared` with the baseline the canary's evidence
    /// says nothing about the new version: it is given up down to half of the budget, so that nothing is left over
    /// to halt the rollout when the trouble ends.
    pub(super) fn settle(&mut self, bar: &Bar<K>, shared: bool) {
        self.state = if self.breached_at > Bits::MIN {
            State::Breach
        } else {
            match self.conclude(bar, shared) {
                Ok(State::Breach) => State::Breach,
                Ok(state) if !self.failed => state,
                Ok(_) | Err(OutOfRange) => State::Error,
            }
        };
    }

    fn conclude(&mut self, bar: &Bar<K>, shared: bool) -> Result<State, OutOfRange> {
        let half = bar.budget / 2;
        if !self.evidence.is_above(half)? {
            return Ok(State::Clear);
        }
        if shared {
            // A little above half, so that it stays shared until something new is counted.
            self.evidence.lower_to(half + 16)?;
            return Ok(State::Shared);
        }
        if !self.evidence.is_above(bar.budget)? {
            return Ok(State::Suspect);
        }
        self.breached_at = self.evidence.bits()?;
        Ok(State::Breach)
    }

    /// The conclusion that was drawn last.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The evidence now; after a breach never less than it was then.
    pub(super) fn bits(&self) -> Bits {
        if self.blocks == 0 {
            return 0;
        }
        self.evidence.bits().unwrap_or(0).max(self.breached_at)
    }

    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// What is found on `metric`.
    pub(super) fn reading(&self, metric: Metric, budget: Bits) -> Reading {
        Reading {
            metric,
            state: self.state,
            bits: self.bits(),
            budget,
        }
    }

    pub(super) fn episode(&self) -> &S {
        &self.episode
    }

    /// The alternative that fits best.
    pub(super) fn best_alternative(&self) -> usize {
        self.evidence.best_alternative()
    }
}
