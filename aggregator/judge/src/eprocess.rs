//! E-processes on counts: evidence that may be looked at after every window.
//!
//! An e-process E is a nonnegative process with E[E_tau] <= 1 at every stopping time tau while the null
//! hypothesis holds. Ville's inequality: P(E ever reaches 1/a) <= a. So one may look as often as one
//! likes and stop when one likes. Evidence here is log2 E, in bits, rounded down.
//!
//! # Against the live baseline: [`LiveTest`]
//!
//! Null: p_c <= r p_b + d in every block, where p_c and p_b are the failure rates of the canary and of the
//! baseline in the block (they may move from block to block), r the tolerated ratio, d the tolerated
//! difference. For R = r rho, rho > 1, and the block's request counts n_c, n_b:
//!
//! ```text
//! b = (r n_c + n_b) / (R n_c + n_b)      a = rho b
//! l = x_c ln a + x_b ln b - n_c d (a - 1)
//! ```
//!
//! Proof that E[exp l] <= 1 given the counts. The failures are independent given the rates, so
//! E[a^x_c] = (1 + p_c (a - 1))^n_c <= exp(n_c p_c (a - 1)) and E[b^x_b] <= exp(-n_b p_b (1 - b)), by
//! 1 + z <= exp z. The first grows with p_c because a >= 1, so take p_c = r p_b + d. The exponent is
//! p_b (r n_c (a - 1) - n_b (1 - b)) + n_c d (a - 1) - n_c d (a - 1). With D = R n_c + n_b,
//! a - 1 = n_b (rho - 1) / D and 1 - b = r (rho - 1) n_c / D, so the bracket is 0. QED. (It is the
//! two-stream e-variable of Turner, Ly and Grünwald, arXiv 2106.02693, in Poisson form.)
//!
//! # Against a fixed ceiling: [`Ceiling`]
//!
//! Null: p <= p0 in every window. l = x ln(p1/p0) + (n - x) ln((1-p1)/(1-p0)) for a p1 > p0. For one
//! request E[exp l] = p p1/p0 + (1-p) (1-p1)/(1-p0), which is 1 at p = p0 and grows with p. QED. It also
//! holds for requests of different rates whose mean is at most p0: with f linear in p, the sum of
//! ln f(p_i) is at most n ln f(mean p) by concavity. Both coefficients are constants and rounded down.
//!
//! # Proof of safety: [`Safety`]
//!
//! The same with p1 < p0: null p >= p0, f falls with p. Rejecting it shows that the rate is below p0.
//! Pooled counts are allowed here, by the concavity above: what is shown is that the mean rate over the
//! pooled requests is below p0.
//!
//! # Many alternatives, unknown onset: [`Evidence`]
//!
//! The fault's size and start are not known. Over K sizes (the grid) take the mean; over starts t = 1, 2, ...
//! take weights that add up to 1: w_1 = 1/2; w_t = 3/8/(N-1) up to the planned number N of blocks; then
//! w_t = 1/8 N/(t(t-1)), whose sum over t > N telescopes to 1/8, so that a rollout which outlives its plan is
//! not judged blindly. Keep for each size one number
//! L <- max(L, ln w_t) + l_t, and report max over the sizes minus ln K. By induction exp L <= the sum over
//! j <= t of w_j exp(l_j + ... + l_t), a mixture of e-processes with weights that add up to at most 1, and
//! the largest of K nonnegative numbers over K is at most their mean. QED.
//!
//! The live null is about each block as a whole: where the split of traffic moves within one block of several
//! windows while the shared rate moves too, the block's average can differ between equal arms. Blocks of
//! more than one window are only formed by tenants with fewer than five requests a window.
//!
//! # Cap
//!
//! l_t <- min(l_t, c) can only lower E. With c = (budget + 1 + log2 K) / 3 (the 1 is -log2 w_1) no two
//! blocks reach the budget: at least three must agree, so that a burst in one window is not a verdict.

use crate::fixed::{Bits, LOG2_E_CEIL, ONE, OutOfRange, log2_floor, plus, times};

/// Sizes of fault that are looked for.
pub const GRID: usize = 7;

/// rho of the live test, in thousandths.
const LIVE_GRID_MILLI: [u64; GRID] = [1_500, 2_000, 3_000, 5_000, 10_000, 30_000, 100_000];

/// log2 rho, rounded down; a test computes them again.
const LOG2_LIVE_GRID: [Bits; GRID] = [
    2_512_394_809,
    4_294_967_296,
    6_807_362_105,
    9_972_605_231,
    14_267_572_527,
    21_074_934_633,
    28_535_145_054,
];

/// log2 K of the two grids, rounded up.
const LOG2_GRID_CEIL: Bits = 12_057_497_579;
const LOG2_SAFETY_GRID_CEIL: Bits = 9_972_605_232;

/// p1/p0 of the ceiling test, in thousandths.
const CEILING_GRID_MILLI: [u64; GRID] = [1_500, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000];

/// Sizes of safety that are looked for.
pub const SAFETY_GRID: usize = 5;

/// p1/p0 of the proof of safety, as fractions. The last two find rates that are within the limit, but not far.
const SAFETY_FRACTIONS: [(u64, u64); SAFETY_GRID] = [(1, 30), (1, 10), (1, 3), (2, 3), (9, 10)];

/// One, in parts per billion.
const BILLION: u64 = 1_000_000_000;

/// Most requests of one arm in one block; more is out of range.
const MAX_BLOCK_REQUESTS: u64 = 1 << 31;

/// Requests and failures of one arm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
}

/// The test of two arms against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveTest {
    /// r, in thousandths.
    pub max_ratio_milli: u64,
    /// d, in parts per billion.
    pub max_increase_ppb: u64,
}

impl LiveTest {
    /// Evidence of one block for each size of fault, rounded down. A block without requests on one arm says nothing.
    pub fn evidence(&self, canary: Counts, baseline: Counts) -> Result<[Bits; GRID], OutOfRange> {
        let mut evidence = [0; GRID];
        if canary.requests == 0 || baseline.requests == 0 {
            return Ok(evidence);
        }
        if canary.requests.max(baseline.requests) > MAX_BLOCK_REQUESTS {
            return Err(OutOfRange);
        }
        let n_c = u128::from(canary.requests);
        let n_b = u128::from(baseline.requests);
        let r = u128::from(self.max_ratio_milli);
        let grid = LIVE_GRID_MILLI.map(u128::from).into_iter().zip(LOG2_LIVE_GRID);
        for (bits, (rho, log2_rho)) in evidence.iter_mut().zip(grid) {
            // D = R n_c + n_b, in millionths.
            let d_micro = r * rho * n_c + 1_000_000 * n_b;
            if canary.events > 0 || baseline.events > 0 {
                let ln_b = log2_floor(r * 1_000 * n_c + 1_000_000 * n_b, d_micro)?;
                let ln_a = plus(log2_rho, ln_b)?;
                *bits = plus(times(canary.events, ln_a)?, times(baseline.events, ln_b)?)?;
            }
            // n_c (a - 1) = n_c n_b (rho - 1) / D, with 32 fractional bits, rounded up; below 2^64, as it is at most n_b / r.
            let growth = ((n_c * n_b * (rho - 1_000) * 1_000) << 32).div_ceil(d_micro);
            let allowance = (growth * u128::from(self.max_increase_ppb) * LOG2_E_CEIL)
                .div_ceil(u128::from(BILLION) << 32);
            *bits = plus(*bits, -i64::try_from(allowance).map_err(|_| OutOfRange)?)?;
        }
        Ok(evidence)
    }
}

/// Evidence of a failure and of a success, for each of `K` alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coefficients<const K: usize> {
    event: [Bits; K],
    other: [Bits; K],
}

/// The test of one arm against a ceiling on its rate.
pub type Ceiling = Coefficients<GRID>;

/// The proof that one arm's rate is below a limit.
pub type Safety = Coefficients<SAFETY_GRID>;

impl<const K: usize> Coefficients<K> {
    fn new(p0: u64, alternatives: [u64; K]) -> Result<Self, OutOfRange> {
        let mut both = Self {
            event: [0; K],
            other: [0; K],
        };
        for (k, p1) in alternatives.into_iter().enumerate() {
            both.event[k] = log2_floor(u128::from(p1), u128::from(p0))?;
            both.other[k] = log2_floor(u128::from(BILLION - p1), u128::from(BILLION - p0))?;
        }
        Ok(both)
    }

    /// Evidence of some requests, rounded down.
    pub fn evidence(&self, counts: Counts) -> Result<[Bits; K], OutOfRange> {
        let others = counts.requests.checked_sub(counts.events).ok_or(OutOfRange)?;
        let mut evidence = [0; K];
        for (k, bits) in evidence.iter_mut().enumerate() {
            *bits = plus(
                times(counts.events, self.event[k])?,
                times(others, self.other[k])?,
            )?;
        }
        Ok(evidence)
    }
}

impl Ceiling {
    /// The test of p <= `p0_ppb`. An alternative never goes more than half the way from p0 to 1.
    pub fn above(p0_ppb: u64) -> Result<Self, OutOfRange> {
        if p0_ppb == 0 || p0_ppb >= BILLION {
            return Err(OutOfRange);
        }
        let highest = p0_ppb + (BILLION - p0_ppb) / 2;
        Self::new(
            p0_ppb,
            CEILING_GRID_MILLI.map(|milli| (p0_ppb.saturating_mul(milli) / 1_000).min(highest)),
        )
    }
}

impl Safety {
    /// The proof of p < `p0_ppb`.
    pub fn below(p0_ppb: u64) -> Result<Self, OutOfRange> {
        if p0_ppb == 0 || p0_ppb >= BILLION {
            return Err(OutOfRange);
        }
        Self::new(
            p0_ppb,
            SAFETY_FRACTIONS.map(|(part, whole)| (p0_ppb * part / whole).max(1)),
        )
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
    fn weight(self, block: u32) -> Result<Bits, OutOfRange> {
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

/// Evidence for a fault of unknown size and onset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    levels: [Bits; GRID],
    blocks: u32,
    /// The lowest that the best level ever was: where a change would have begun.
    lowest: Bits,
}

impl Default for Evidence {
    fn default() -> Self {
        Self {
            levels: [LOWEST_LEVEL; GRID],
            blocks: 0,
            lowest: Bits::MAX,
        }
    }
}

impl Evidence {
    /// Adds a block, no more than `cap` of it for each size. Says whether there was nothing before it: the
    /// evidence had never been lower, so that a change would have begun with this block.
    pub fn add(&mut self, block: [Bits; GRID], onset: Onset, cap: Bits) -> Result<bool, OutOfRange> {
        self.blocks = self.blocks.checked_add(1).ok_or(OutOfRange)?;
        let start = onset.weight(self.blocks)?;
        let from = self.best().max(start);
        let begins = from <= self.lowest;
        if begins {
            self.lowest = from;
        }
        for (level, bits) in self.levels.iter_mut().zip(block) {
            *level = plus(start.max(*level), bits.min(cap))?.max(LOWEST_LEVEL);
        }
        Ok(begins)
    }

    /// Gives up what is above `bits`. It only lowers the evidence, so it is always allowed.
    pub fn lower_to(&mut self, bits: Bits) -> Result<(), OutOfRange> {
        let highest = plus(bits, LOG2_GRID_CEIL)?;
        for level in &mut self.levels {
            *level = highest.min(*level);
        }
        Ok(())
    }

    fn best(&self) -> Bits {
        self.levels.into_iter().max().unwrap_or(LOWEST_LEVEL)
    }

    /// log2 of the e-process; 0 before the first block.
    pub fn bits(&self) -> Result<Bits, OutOfRange> {
        if self.blocks == 0 {
            return Ok(0);
        }
        plus(self.best(), -LOG2_GRID_CEIL)
    }

    /// How many blocks were added.
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }
}

/// The most that one block may add when a unit halts at `budget`: three are needed.
pub fn cap(budget: Bits) -> Result<Bits, OutOfRange> {
    // Rounded up by one unit, so that three blocks at the cap are over the budget.
    Ok(plus(plus(budget, ONE)?, LOG2_GRID_CEIL)? / 3 + 1)
}

/// Evidence that a rate is below a limit. It has no onset: it is about the whole rollout so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Proof {
    levels: [Bits; SAFETY_GRID],
}

impl Proof {
    /// Adds some requests.
    pub fn add(&mut self, block: [Bits; SAFETY_GRID]) -> Result<(), OutOfRange> {
        for (level, bits) in self.levels.iter_mut().zip(block) {
            *level = plus(*level, bits)?.max(LOWEST_LEVEL);
        }
        Ok(())
    }

    /// log2 of the e-process.
    pub fn bits(&self) -> Result<Bits, OutOfRange> {
        let best = self.levels.into_iter().max().unwrap_or(0);
        plus(best, -LOG2_SAFETY_GRID_CEIL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixed::log2_ceil;

    const LIVE: LiveTest = LiveTest {
        max_ratio_milli: 1_250,
        max_increase_ppb: 1_000_000,
    };

    fn counts(requests: u64, events: u64) -> Counts {
        Counts { requests, events }
    }

    /// The expectation of 2^l under the worst null, summed over all outcomes of a small block. Floats only check.
    #[allow(
        clippy::float_arithmetic,
        reason = "a check of the integers, not a part of them"
    )]
    fn expectation(n_c: u64, n_b: u64, p_b: f64) -> [f64; GRID] {
        let p_c = 1.25 * p_b + 0.001;
        let binomial = |n: u64, x: u64, p: f64| {
            let choose = (0..x).fold(1.0, |product, i| product * (n - i) as f64 / (i + 1) as f64);
            choose * p.powi(i32::try_from(x).unwrap()) * (1.0 - p).powi(i32::try_from(n - x).unwrap())
        };
        let mut sums = [0.0; GRID];
        for x_c in 0..=n_c {
            for x_b in 0..=n_b {
                let bits = LIVE.evidence(counts(n_c, x_c), counts(n_b, x_b)).unwrap();
                let weight = binomial(n_c, x_c, p_c) * binomial(n_b, x_b, p_b);
                for (sum, bits) in sums.iter_mut().zip(bits) {
                    *sum += weight * (bits as f64 / ONE as f64).exp2();
                }
            }
        }
        sums
    }

    #[test]
    #[allow(
        clippy::float_arithmetic,
        reason = "a check of the integers, not a part of them"
    )]
    fn the_live_test_is_an_e_variable_at_the_worst_null() {
        for (n_c, n_b) in [(1, 1), (5, 5), (6, 50), (20, 9), (3, 40)] {
            for p_b in [0.0, 0.001, 0.01, 0.1, 0.5] {
                for (k, mean) in expectation(n_c, n_b, p_b).into_iter().enumerate() {
                    assert!(mean <= 1.0 + 1e-9, "{n_c} {n_b} {p_b} size {k}: {mean}");
                }
            }
        }
    }

    #[test]
    fn evidence_grows_with_canary_errors_and_falls_with_baseline_errors() {
        let at = |x_c, x_b| LIVE.evidence(counts(50, x_c), counts(450, x_b)).unwrap();
        for k in 0..GRID {
            assert!(at(5, 1)[k] < at(6, 1)[k]);
            assert!(at(5, 1)[k] > at(5, 2)[k]);
        }
        assert_eq!(LIVE.evidence(counts(0, 0), counts(9, 9)).unwrap(), [0; GRID]);
        assert!(LIVE.evidence(counts(u64::MAX, 0), counts(1, 0)).is_err());
    }

    #[test]
    #[allow(
        clippy::float_arithmetic,
        reason = "a check of the integers, not a part of them"
    )]
    fn the_ceiling_and_the_safety_test_are_e_variables_at_their_limit() {
        for p0 in [1_000, 5_000_000, 10_000_000, 300_000_000, 900_000_000] {
            let p = p0 as f64 / 1e9;
            let mean = |event: Bits, other: Bits| {
                p * (event as f64 / ONE as f64).exp2() + (1.0 - p) * (other as f64 / ONE as f64).exp2()
            };
            let ceiling = Ceiling::above(p0).unwrap();
            let safety = Safety::below(p0).unwrap();
            for k in 0..GRID {
                assert!(mean(ceiling.event[k], ceiling.other[k]) <= 1.0 + 1e-9, "{p0} {k}");
                assert!(ceiling.event[k] > 0 && ceiling.other[k] < 0, "{p0} {k}");
            }
            for k in 0..SAFETY_GRID {
                assert!(mean(safety.event[k], safety.other[k]) <= 1.0 + 1e-9, "{p0} {k}");
                assert!(safety.event[k] < 0 && safety.other[k] > 0, "{p0} {k}");
            }
        }
        assert!(Ceiling::above(0).is_err() && Ceiling::above(BILLION).is_err());
    }

    #[test]
    fn three_blocks_at_the_cap_cross_and_two_do_not() {
        let budget = 18 * ONE + 12_345;
        let onset = Onset::new(180).unwrap();
        let cap = cap(budget).unwrap();
        let mut evidence = Evidence::default();
        let mut crossed = Vec::new();
        for _ in 0..3 {
            evidence.add([1_000 * ONE; GRID], onset, cap).unwrap();
            crossed.push(evidence.bits().unwrap() > budget);
        }
        assert_eq!(crossed, [false, false, true]);
    }

    #[test]
    fn a_late_fault_costs_only_the_weight_of_its_start() {
        let onset = Onset::new(180).unwrap();
        let mut evidence = Evidence::default();
        for _ in 0..90 {
            evidence.add([-5 * ONE; GRID], onset, 100 * ONE).unwrap();
        }
        let begins = evidence.add([10 * ONE; GRID], onset, 100 * ONE).unwrap();
        assert!(begins);
        // 10 bits, less log2(8 * 179 / 3) for the start and log2(7) for the grid.
        assert_eq!(evidence.bits().unwrap() * 100 / ONE, -170);
        // Long after the planned end a start still costs only some bits more.
        let mut late = Evidence {
            levels: [-500 * ONE; GRID],
            blocks: 719,
            lowest: -500 * ONE,
        };
        late.add([40 * ONE; GRID], onset, 100 * ONE).unwrap();
        assert_eq!(late.bits().unwrap() * 10 / ONE, 227);
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

    #[test]
    fn the_constants_are_logarithms() {
        for (rho, bits) in LIVE_GRID_MILLI.into_iter().zip(LOG2_LIVE_GRID) {
            let computed = log2_floor(u128::from(rho), 1_000).unwrap();
            assert!(
                (0..=2).contains(&(bits - computed)),
                "log2({rho}/1000): {computed}, not {bits}"
            );
        }
        for (size, bits) in [(GRID, LOG2_GRID_CEIL), (SAFETY_GRID, LOG2_SAFETY_GRID_CEIL)] {
            let computed = log2_ceil(size as u128, 1).unwrap();
            assert!(
                (0..=2).contains(&(computed - bits)),
                "log2({size}): {computed}, not {bits}"
            );
        }
    }
}
