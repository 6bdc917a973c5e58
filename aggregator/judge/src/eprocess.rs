//! E-processes on counts: evidence that may be looked at after every window.
//!
//! An e-process E is a nonnegative process with E[E_tau] <= 1 at every stopping time tau while the null
//! hypothesis holds. Ville's inequality (Ville 1939; Ramdas, Grünwald, Vovk, Shafer, Statistical Science 2023, arXiv
//! 2210.01948): P(E ever reaches 1/a) <= a. So one may look as often as one likes and stop when one likes. Evidence
//! here is log2 E, in bits, rounded down.
//!
//! One block of counts gives the evidence l of each *alternative*, a size of the fault that is looked for:
//! [`LiveTest`] for two arms' rates of failure, [`TailTest`] for two arms' latencies, [`Ceiling`] for a rate against a
//! fixed limit, and [`Safety`] for the opposite, that a rate is below its limit. Each has its proof beside it. What all
//! of them need is said here.
//!
//! # What is assumed
//!
//! Given the requests and the rates of a block, requests fail (or are slow) independently of each other. Rates may
//! move from block to block in any way, also depending on what happened before; that both arms share the movement
//! is what a comparison with the live baseline is for. Which requests go to which arm, and how many, may depend on
//! everything up to the block's start and on nothing in it; retries after an error, counted as requests, are the case to
//! think of. A tenant's rates within an open block do not depend on what other tenants see. Where this fails, by bursts or by lasting differences
//! between equal machines, the cap and the margins below keep the promise in practice; the simulator measures it.
//!
//! # Many blocks
//!
//! Given the past, E[exp l] <= 1 for each block, so the product over blocks is an e-process (its conditional
//! expectations multiply, by the tower rule). The same holds for a sum of l over tenants within a block when
//! tenants are independent given the rates: fleets and cohorts add evidence up and never pool counts, so that a
//! change of mix cannot fool them (Simpson's paradox; the tests have the textbook case).
//!
//! # Many alternatives, unknown onset: [`Evidence`]
//!
//! The fault's size and start are not known. Over the alternatives take a mean with weights, a [`Prior`]: a mean of
//! e-processes is one. Severe faults have the larger weights, so that they are found with the fewest requests; a mild one
//! needs some bits more, and a small lasting difference between healthy arms rarely gets that far. Over starts t = 1, 2, ... take weights that add up to at most 1: w_1 = 1/2; w_t = 3/8/(N-1) up to the planned number N of
//! blocks; then w_t = 1/8 N/(t(t-1)), whose sum over t > N telescopes to 1/8, so that a rollout which outlives its
//! plan is not judged blindly. Keep for each alternative k of weight v_k one number
//!
//! ```text
//! L <- max(L, ln(v_k w_t)) + l_t        evidence = ln(exp L_1 + ... + exp L_K)
//! ```
//!
//! Claim: exp L_t <= v_k sum over j <= t of w_j exp(l_j + ... + l_t). For t = 1 it is an equality. If it holds for t - 1,
//! then exp L_t = max(exp L_(t-1), v_k w_t) exp l_t <= (exp L_(t-1) + v_k w_t) exp l_t, and that is the sum for t. The
//! sums over all k plus the weight of the starts still to come are a mixture of e-processes; leaving weight out only
//! lowers it. QED. (It is a
//! CUSUM with a reflecting barrier, Page 1954; the weights make it an e-process instead of an alarm with a run length.)
//!
//! # Cap
//!
//! l_t <- min(l_t, c) can only lower E. With c = (budget + 1 - log2 v) / 3 for the largest weight v (the 1 is -log2 w_1)
//! that alternative alone needs three blocks at the cap; and two blocks never reach the budget whatever the
//! alternatives share, since their weights add up to 1: -1 + 2c <= budget, which [`cap`] sees to. So from nothing
//! a burst in one window, or in two, is no verdict; a unit that is suspected already may need but two.
//!
//! # Giving up evidence
//!
//! Evidence may be lowered at any time, for any reason: an e-process that is made smaller stays one.

mod ceiling;
mod live;
mod tail;

pub use self::{
    ceiling::{CEILING_WEIGHTS, CEILINGS, Ceiling, Coefficients, REPEATS, SAFETIES, Safety},
    live::{LIVE_WEIGHTS, LIVES, LiveTest},
    tail::{ODDS, Odds, QUANTILE_PPM, QUANTILES, Share, TAIL_WEIGHTS, TAILS, TailCounts, TailTest},
};
use crate::fixed::{Bits, ONE, OutOfRange, log2_floor, log2_sum, log2_upper, plus};
use borsh::{BorshDeserialize, BorshSerialize};

/// One, in parts per billion.
pub const BILLION: u64 = 1_000_000_000;

/// Most requests of one arm in one block; more is out of range. So is evidence of more than 2^31 bits, which takes
/// some hundred million requests in a block.
pub const MAX_BLOCK_REQUESTS: u64 = 1 << 40;

/// Requests and failures of one arm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Of these, how many failed (or were slow).
    pub events: u64,
}

impl Counts {
    /// Adds the counts of another window.
    pub fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.events = self.events.saturating_add(other.events);
    }

    /// The successes; out of range if there are more failures than requests, or too many to compute with.
    fn others(self) -> Result<u64, OutOfRange> {
        if self.requests > MAX_BLOCK_REQUESTS {
            return Err(OutOfRange);
        }
        self.requests.checked_sub(self.events).ok_or(OutOfRange)
    }
}

/// Weights of the starts, for a planned number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Onset {
    planned: u32,
    later: Bits,
}

impl Onset {
    /// Plans for `planned` blocks, at least 2.
    pub fn new(planned: u32) -> Result<Self, OutOfRange> {
        let planned = planned.max(2);
        // 3/8/(N-1)
        let later = log2_floor(3, 8 * u128::from(planned - 1))?;
        Ok(Self { planned, later })
    }

    /// log2 w_t, rounded down, for the `block`-th block, from 1.
    pub fn weight(self, block: u32) -> Result<Bits, OutOfRange> {
        let t = u128::from(block);
        match block {
            1 => Ok(-ONE),
            _ if block <= self.planned => Ok(self.later),
            _ => log2_floor(u128::from(self.planned), 8 * t * (t - 1)),
        }
    }
}

/// Below this a level is held, so that it cannot leave the range: as if starts of weight 2^-(2^28) were added.
const LOWEST_LEVEL: Bits = -(1 << 60);

/// log2 of the alternatives' weights, rounded down; the weights add up to at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prior<const K: usize>([Bits; K]);

impl<const K: usize> Prior<K> {
    /// The prior of these weights, as parts of their sum.
    pub fn new(weights: [u64; K]) -> Result<Self, OutOfRange> {
        let whole = weights.into_iter().map(u128::from).sum();
        let mut logs = [0; K];
        for (log, weight) in logs.iter_mut().zip(weights) {
            *log = log2_floor(weight.into(), whole)?;
        }
        Ok(Self(logs))
    }

    /// Equal weights.
    pub fn equal() -> Result<Self, OutOfRange> {
        Self::new([1; K])
    }

    /// The most that one block may add when a unit halts at `budget`.
    pub fn cap(&self, budget: Bits) -> Result<Bits, OutOfRange> {
        let largest = self.0.into_iter().max().ok_or(OutOfRange)?;
        let reach = plus(budget, ONE)?;
        // Rounded up by one unit, so that three blocks at the cap are over the budget.
        Ok((plus(reach, -largest)? / 3 + 1).min(reach / 2))
    }
}

/// Evidence for a fault of one of `K` sizes and of unknown onset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct Evidence<const K: usize> {
    levels: [Bits; K],
}

impl<const K: usize> Default for Evidence<K> {
    fn default() -> Self {
        Self {
            levels: [LOWEST_LEVEL; K],
        }
    }
}

impl<const K: usize> Evidence<K> {
    /// Adds a block that weighs `start`, as a start, no more than `cap` of it for each alternative. Says from which
    /// level the best alternative went on: when that was never lower, a change would have begun with this block.
    pub fn add(
        &mut self,
        block: &[Bits; K],
        prior: &Prior<K>,
        start: Bits,
        cap: Bits,
    ) -> Result<Bits, OutOfRange> {
        let mut from = LOWEST_LEVEL;
        for ((level, bits), weight) in self.levels.iter_mut().zip(block).zip(prior.0) {
            let begin = plus(start, weight)?.max(*level);
            from = from.max(begin);
            *level = plus(begin, (*bits).min(cap))?.max(LOWEST_LEVEL);
        }
        Ok(from)
    }

    /// Gives up what is above `bits`.
    pub fn lower_to(&mut self, bits: Bits) -> Result<(), OutOfRange> {
        let excess = plus(self.bits()?, -bits)?;
        if excess > 0 {
            for level in &mut self.levels {
                *level = plus(*level, -excess)?;
            }
        }
        Ok(())
    }

    fn best(&self) -> Bits {
        self.levels.into_iter().max().unwrap_or(LOWEST_LEVEL)
    }

    /// The alternative that fits best, from 0.
    pub fn best_alternative(&self) -> usize {
        let best = self.best();
        self.levels.iter().position(|level| *level == best).unwrap_or(0)
    }

    /// log2 of the e-process; next to nothing before the first block.
    pub fn bits(&self) -> Result<Bits, OutOfRange> {
        log2_sum(&self.levels)
    }

    /// Whether the evidence is above `bits`; cheaper than to ask how much there is.
    pub fn is_above(&self, bits: Bits) -> Result<bool, OutOfRange> {
        // The sum of K is at most K times the largest, and K is below 2^4.
        const { assert!(K <= 16) };
        Ok(plus(self.best(), 4 * ONE)? >= bits && self.bits()? > bits)
    }
}

/// Evidence that a rate is below a limit. It has no onset: it is about the whole rollout so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct Proof {
    levels: [Bits; SAFETIES],
}

impl Proof {
    /// Adds some requests.
    pub fn add(&mut self, block: &[Bits; SAFETIES]) -> Result<(), OutOfRange> {
        for (level, bits) in self.levels.iter_mut().zip(block) {
            *level = plus(*level, *bits)?.max(LOWEST_LEVEL);
        }
        Ok(())
    }

    /// log2 of the e-process.
    pub fn bits(&self) -> Result<Bits, OutOfRange> {
        plus(
            log2_sum(&self.levels)?,
            -(log2_upper(SAFETIES as u128)? >> 24) - 1,
        )
    }

    /// Whether the evidence is at least `needed`.
    pub fn reaches(&self, needed: Bits) -> bool {
        // The mean of equal parts is at most the largest.
        self.levels.iter().any(|level| *level >= needed) && self.bits().is_ok_and(|bits| bits >= needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_blocks_at_the_cap_cross_and_two_do_not() {
        let onset = Onset::new(180).unwrap();
        let priors = [
            Prior::equal(),
            Prior::new([600, 1, 1, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 350]),
        ];
        for (prior, budget) in priors.into_iter().zip([7 * ONE, 18 * ONE + 12_345]) {
            let prior = prior.unwrap();
            let cap = prior.cap(budget).unwrap();
            // However the alternatives share the evidence: one alone, or all of them.
            for shared in [1, 15] {
                let mut block = [-1_000 * ONE; 15];
                block[..shared].fill(1_000 * ONE);
                let mut evidence = Evidence::default();
                let mut crossed = Vec::new();
                for block_number in 1..=3 {
                    let start = onset.weight(block_number).unwrap();
                    evidence.add(&block, &prior, start, cap).unwrap();
                    crossed.push(evidence.is_above(budget).unwrap());
                }
                assert_eq!(crossed, [false, false, true], "{budget} {shared}");
            }
        }
    }

    #[test]
    fn a_late_fault_costs_only_the_weight_of_its_start() {
        let onset = Onset::new(180).unwrap();
        let prior = Prior::equal().unwrap();
        let mut evidence = Evidence::default();
        for block in 1..=90 {
            let start = onset.weight(block).unwrap();
            evidence.add(&[-5 * ONE; 7], &prior, start, 100 * ONE).unwrap();
        }
        let start = onset.weight(91).unwrap();
        let from = evidence.add(&[10 * ONE; 7], &prior, start, 100 * ONE).unwrap();
        assert!(from < start, "it begins with this block");
        // 10 bits, less log2(8 * 179 / 3) = 8.8989 for the start; all sizes agree, so their number costs nothing.
        assert_eq!(evidence.bits().unwrap() * 100 / ONE, 110);
        // Long after the planned end a start still costs only some bits more.
        let mut late = Evidence {
            levels: [-500 * ONE; 7],
        };
        let start = onset.weight(720).unwrap();
        late.add(&[40 * ONE; 7], &prior, start, 100 * ONE).unwrap();
        assert_eq!(late.bits().unwrap() * 10 / ONE, 255);
    }

    #[test]
    fn evidence_is_the_weighed_mean_over_the_alternatives_and_names_the_best() {
        let onset = Onset::new(10).unwrap();
        let prior = Prior::new([1, 2, 1]).unwrap();
        let mut evidence = Evidence::default();
        assert_eq!(evidence.is_above(-ONE), Ok(false));
        let first = onset.weight(1).unwrap();
        evidence
            .add(&[ONE, 9 * ONE, -ONE], &prior, first, 20 * ONE)
            .unwrap();
        assert_eq!(evidence.best_alternative(), 1);
        // (2^1 / 4 + 2^9 / 2 + 2^-1 / 4) / 2 = 128.3125: 7.003518...
        assert_eq!(evidence.bits().unwrap() * 100_000 / ONE, 700_351);
        assert_eq!(
            (evidence.is_above(7 * ONE), evidence.is_above(8 * ONE)),
            (Ok(true), Ok(false))
        );
        evidence.lower_to(2 * ONE).unwrap();
        assert_eq!(evidence.best_alternative(), 1);
        let lowered = 2 * ONE - evidence.bits().unwrap();
        assert!((0..=2).contains(&lowered), "{lowered}");
        evidence.lower_to(3 * ONE).unwrap();
        assert!(evidence.bits().unwrap() <= 2 * ONE);
        // On the way up it goes on from where it was.
        let second = onset.weight(2).unwrap();
        assert!(evidence.add(&[ONE; 3], &prior, second, 20 * ONE).unwrap() > ONE);
        assert_eq!(
            evidence.add(&[i64::MIN; 3], &prior, second, 20 * ONE),
            Err(OutOfRange)
        );
    }

    #[test]
    fn the_cap_is_a_third_of_the_way_and_never_more_than_half() {
        // (17 + 1 - log2 1) / 3, and one unit.
        assert_eq!(Prior::new([1]).unwrap().cap(17 * ONE), Ok(6 * ONE + 1));
        // (5 + 1 + log2 15) / 3 would be 3.3.
        assert_eq!(Prior::<15>::equal().unwrap().cap(5 * ONE), Ok(3 * ONE));
        assert_eq!(Prior::<2>::equal().unwrap().cap(i64::MAX), Err(OutOfRange));
    }

    #[test]
    fn a_proof_is_the_mean_over_its_alternatives() {
        let mut proof = Proof::default();
        let near = |got: Result<Bits, OutOfRange>, want: Bits| {
            let low = want - got.unwrap();
            assert!((0..=4).contains(&low), "{low}");
        };
        near(proof.bits(), 0);
        proof.add(&[5 * ONE; SAFETIES]).unwrap();
        near(proof.bits(), 5 * ONE);
        assert!(proof.reaches(5 * ONE - 4) && !proof.reaches(5 * ONE + 1));
        proof
            .add(&[-90 * ONE, -90 * ONE, -90 * ONE, 5 * ONE, -90 * ONE])
            .unwrap();
        // 2^10 / 5: 7.678071905...
        assert_eq!(proof.bits().unwrap() * 100_000 / ONE, 767_807);
        proof.add(&[-(1 << 61); SAFETIES]).unwrap();
        assert_eq!(proof.levels, [LOWEST_LEVEL; SAFETIES]);
    }

    #[test]
    fn the_weights_of_a_prior_add_up_to_at_most_one() {
        let prior = Prior::new([8, 48, 128, 240, 320, 280]).unwrap();
        let sum = log2_sum(&prior.0).unwrap();
        assert!((-8..=0).contains(&sum), "{sum}");
        assert!(Prior::new([0, 1]).is_err());
    }

    #[test]
    fn the_weights_of_the_starts_add_up_to_at_most_one() {
        for planned in [2, 7, 180] {
            let onset = Onset::new(planned).unwrap();
            // 2^bits from above, in units of 2^-40.
            let upper = |bits: Bits| {
                let (whole, fraction) = (bits >> 32, bits & (ONE - 1));
                // 2^f <= 1 + f for f in [0, 1].
                (((1_i128 << 40) * i128::from(ONE + fraction)) >> 32) >> (-whole)
            };
            let sum: i128 = (1..20_000).map(|block| upper(onset.weight(block).unwrap())).sum();
            // The bound 1 + f is at most 8.7 % too large, and exact for the first start, a half.
            assert!(sum * 1_000 < (1_i128 << 40) * 1_045, "{planned}: {sum}");
            assert!(sum * 1_000 > (1_i128 << 40) * 990, "{planned}: {sum}");
        }
    }
}
