//! Two arms' rates of failure against each other.
//!
//! Null: p_c <= r p_b + d in the block, where p_c and p_b are the failure rates of the canary and of the baseline (they
//! may move from block to block), r the tolerated ratio, d the tolerated difference. For R = r rho, rho > 1, and the
//! block's request counts n_c, n_b:
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
//! a - 1 = n_b (rho - 1) / D and 1 - b = r (rho - 1) n_c / D, so the bracket is 0. QED. For requests of different rates
//! the product of 1 + p_i (a - 1) is at most exp of their sum, so p_c and p_b may be means. (It is the two-stream
//! e-variable of Turner, Ly, Grünwald, JSPI 2024, arXiv 2106.02693, in Poisson form.)
//!
//! A block of one window needs nothing more. Of several windows, added up, the null is about the averages over all of its
//! requests, and these can differ between equal arms when the split of traffic moves within the block while the shared
//! rate moves too. It holds when n_c / n_b is the same in each window of the block; and when each request is assigned to an
//! arm at random with one share for the whole block, whatever the rates do: then, given which requests would fail, x_c is
//! hypergeometric, below the binomial in convex order. A canary that has traffic in some windows only would break both;
//! so a block begins anew as long as one arm has had no request. (Blocks of several windows are formed where one arm has
//! fewer than five requests a window, and last six windows at most.)

use super::{BILLION, Counts};
use crate::fixed::{Bits, LOG2_E_Q62_CEIL, Log, OutOfRange, log2_lower, log2_upper, weighed};

/// Sizes of fault that are looked for.
pub const LIVES: usize = 6;

/// rho, in thousandths.
const RHO_MILLI: [u64; LIVES] = [2_000, 3_000, 5_000, 10_000, 30_000, 100_000];

/// Their weights, of 1024.
pub const LIVE_WEIGHTS: [u64; LIVES] = [4, 32, 128, 240, 330, 290];

/// The test of two arms against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveTest {
    /// r, in thousandths.
    max_ratio_milli: u64,
    /// d log2(e), with 64 fractional bits, rounded up.
    increase: u128,
    /// log2 rho, rounded down.
    log2_rho: [Log; LIVES],
}

impl LiveTest {
    /// The test of p_c <= r p_b + d; r from 1 to 100, d below 1.
    pub fn new(max_ratio_milli: u64, max_increase_ppb: u64) -> Result<Self, OutOfRange> {
        if !(1_000..=100_000).contains(&max_ratio_milli) || max_increase_ppb >= BILLION {
            return Err(OutOfRange);
        }
        let mut log2_rho = [0; LIVES];
        for (log, rho) in log2_rho.iter_mut().zip(RHO_MILLI) {
            *log = log2_lower(rho.into())? - log2_upper(1_000)?;
        }
        Ok(Self {
            max_ratio_milli,
            increase: (u128::from(max_increase_ppb) * LOG2_E_Q62_CEIL * 4).div_ceil(BILLION.into()),
            log2_rho,
        })
    }

    /// Evidence of one block for each size of fault, rounded down. A block without requests on one arm says nothing.
    pub fn evidence(&self, canary: Counts, baseline: Counts) -> Result<[Bits; LIVES], OutOfRange> {
        let mut evidence = [0; LIVES];
        canary.others().and(baseline.others())?;
        if canary.requests == 0 || baseline.requests == 0 {
            return Ok(evidence);
        }
        let n_c = u128::from(canary.requests);
        let n_b = u128::from(baseline.requests);
        let r_n_c = u128::from(self.max_ratio_milli) * n_c;
        let has_events = canary.events > 0 || baseline.events > 0;
        let log_null = if has_events {
            log2_lower(r_n_c * 1_000 + 1_000_000 * n_b)?
        } else {
            0
        };
        for (k, bits) in evidence.iter_mut().enumerate() {
            let rho = u128::from(RHO_MILLI[k]);
            // D = R n_c + n_b, in millionths; below 2^75.
            let d = r_n_c * rho + 1_000_000 * n_b;
            // n_c (a - 1) = n_c n_b (rho - 1) / D, with 20 fractional bits, rounded up. It is at most n_b / r <= 2^40;
            // n_c n_b <= 2^80 leaves room for what it is multiplied with, below 2^27, and for the shift.
            let growth = ((n_c * n_b * (rho - 1_000) * 1_000) << 20).div_ceil(d);
            let mut sum = -i128::try_from((growth * self.increase) >> 28).map_err(|_| OutOfRange)? - 1;
            if has_events {
                let ln_b = log_null - log2_upper(d)?;
                let ln_a = self.log2_rho[k] + ln_b;
                sum += i128::from(canary.events) * i128::from(ln_a)
                    + i128::from(baseline.events) * i128::from(ln_b);
            }
            *bits = weighed(sum)?;
        }
        Ok(evidence)
    }
}

#[cfg(test)]
#[allow(
    clippy::float_arithmetic,
    reason = "checks of the integers, not a part of them"
)]
mod tests {
    use proptest::prelude::*;

    use super::{super::MAX_BLOCK_REQUESTS, *};
    use crate::fixed::ONE;

    fn counts(requests: u64, events: u64) -> Counts {
        Counts { requests, events }
    }

    fn usual() -> LiveTest {
        LiveTest::new(1_250, 1_000_000).unwrap()
    }

    /// The expectation of 2^l under the worst null, summed over all outcomes of a small block.
    fn expectation(n_c: u64, n_b: u64, p_b: f64) -> [f64; LIVES] {
        let p_c = 1.25 * p_b + 0.001;
        let binomial = |n: u64, x: u64, p: f64| {
            let choose = (0..x).fold(1.0, |product, i| product * (n - i) as f64 / (i + 1) as f64);
            choose * p.powi(i32::try_from(x).unwrap()) * (1.0 - p).powi(i32::try_from(n - x).unwrap())
        };
        let mut sums = [0.0; LIVES];
        for x_c in 0..=n_c {
            for x_b in 0..=n_b {
                let bits = usual().evidence(counts(n_c, x_c), counts(n_b, x_b)).unwrap();
                let weight = binomial(n_c, x_c, p_c) * binomial(n_b, x_b, p_b);
                for (sum, bits) in sums.iter_mut().zip(bits) {
                    *sum += weight * (bits as f64 / ONE as f64).exp2();
                }
            }
        }
        sums
    }

    #[test]
    fn the_live_test_is_an_e_variable_at_the_worst_null() {
        for (n_c, n_b) in [(1, 1), (5, 5), (6, 50), (20, 9), (3, 40)] {
            for p_b in [0.0, 0.001, 0.01, 0.1, 0.5] {
                for (k, mean) in expectation(n_c, n_b, p_b).into_iter().enumerate() {
                    assert!(mean <= 1.0 + 1e-9, "{n_c} {n_b} {p_b} size {k}: {mean}");
                    // And not needlessly low where the baseline does not fail: only d is given away.
                    assert!(p_b > 0.0 || mean > 0.999, "{n_c} {n_b} size {k}: {mean}");
                }
            }
        }
    }

    #[test]
    fn evidence_grows_with_canary_errors_and_falls_with_baseline_errors() {
        let at = |x_c, x_b| usual().evidence(counts(50, x_c), counts(450, x_b)).unwrap();
        for k in 0..LIVES {
            assert!(at(5, 1)[k] < at(6, 1)[k]);
            assert!(at(5, 1)[k] > at(5, 2)[k]);
            assert!(at(0, 0)[k] < 0);
        }
    }

    #[test]
    fn one_arm_alone_says_nothing_and_impossible_counts_are_refused() {
        let test = usual();
        for (canary, baseline) in [(counts(0, 0), counts(9, 9)), (counts(9, 9), counts(0, 0))] {
            assert_eq!(test.evidence(canary, baseline), Ok([0; LIVES]));
        }
        for (canary, baseline) in [
            (counts(u64::MAX, 0), counts(1, 0)),
            (counts(1, 0), counts(MAX_BLOCK_REQUESTS + 1, 0)),
            (counts(1, 2), counts(1, 0)),
            (counts(0, 0), counts(1, 2)),
        ] {
            assert_eq!(test.evidence(canary, baseline), Err(OutOfRange));
        }
        let many = counts(1 << 28, 1 << 28);
        assert!(test.evidence(many, many).is_ok());
        // Whatever the counts and limits, the intermediate values fit.
        for test in [usual(), LiveTest::new(100_000, BILLION - 1).unwrap()] {
            let most = counts(MAX_BLOCK_REQUESTS, MAX_BLOCK_REQUESTS);
            let pairs = [(most, most), (most, counts(1, 0)), (counts(1, 1), most)];
            let fits = pairs.map(|(canary, baseline)| test.evidence(canary, baseline).is_ok());
            assert!(
                !fits[0],
                "a trillion failures are more evidence than there is room for"
            );
        }
        assert!(LiveTest::new(999, 0).is_err() && LiveTest::new(100_001, 0).is_err());
        assert!(LiveTest::new(1_000, BILLION).is_err());
    }

    proptest! {
        #[test]
        fn evidence_is_within_a_millionth_of_a_bit_of_the_reals_and_never_above(
            n_c in 1_u64..1_000_000, n_b in 1_u64..1_000_000, x_c in 0_u64..2_000, x_b in 0_u64..2_000,
            r in 1_000_u64..5_000, increase in 0_u64..500_000_000,
        ) {
            let (x_c, x_b) = (x_c.min(n_c), x_b.min(n_b));
            let test = LiveTest::new(r, increase).unwrap();
            let got = test.evidence(counts(n_c, x_c), counts(n_b, x_b)).unwrap();
            let (n_c, n_b, x_c, x_b) = (n_c as f64, n_b as f64, x_c as f64, x_b as f64);
            let (r, increase) = (r as f64 / 1e3, increase as f64 / 1e9);
            for (got, rho) in got.into_iter().zip(RHO_MILLI) {
                let rho = rho as f64 / 1e3;
                let b = (r * n_c + n_b) / (r * rho * n_c + n_b);
                // a - 1 without cancellation.
                let growth = n_c * n_b * (rho - 1.0) / (r * rho * n_c + n_b);
                let given = growth * increase / std::f64::consts::LN_2;
                let want = x_c * (rho * b).log2() + x_b * b.log2() - given;
                let own = 1e-9 + want.abs() * 1e-14 + given * 1e-14 + (x_c + x_b) * 1e-12;
                let low = want - got as f64 / ONE as f64;
                prop_assert!((-own..1e-6 + own).contains(&low), "{low}");
            }
        }
    }
}
