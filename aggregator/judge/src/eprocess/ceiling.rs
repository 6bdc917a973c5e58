//! One arm's rate against a fixed limit: harm, and the proof of safety.
//!
//! # Harm: [`Ceiling`]
//!
//! Null: p <= p0 in every window. l = x ln(p1/p0) + (n - x) ln((1-p1)/(1-p0)) for a p1 > p0: the likelihood ratio
//! (Wald 1945). For one request E[exp l] = p p1/p0 + (1-p) (1-p1)/(1-p0), which is 1 at p = p0 and grows with p. It also
//! holds for requests of different rates whose mean is at most p0: with f linear in p, the sum of ln f(p_i) is at most
//! n ln f(mean p) by concavity of ln. QED. Both coefficients are constants, rounded down.
//!
//! # Safety: [`Safety`]
//!
//! The same with p1 < p0: null p >= p0, f falls with p. Rejecting it shows that the rate is below p0. Pooled counts are
//! allowed here, by the concavity above: what is shown is that the mean rate over the pooled requests is below p0.
//!
//! One may look after every window, although the rate moves: with p_s the rate of window s and f_s(p) = p p1/p0 + (1-p)
//! (1-p1)/(1-p0), M_t = product over s <= t of exp(l_s) / f_s(p_s)^n_s is a martingale of mean 1. Whenever the mean rate
//! over the windows so far is at least p0, the product of f_s(p_s)^n_s is at most 1 by concavity, so E_t <= M_t. Hence the
//! probability that E ever reaches 1/a at a time when the mean rate so far is not below p0 is at most a. It says nothing of
//! the last windows alone; that is what the tests for harm are for. Where tenants have limits p0_i of their own, p0 of a
//! window is their mean, weighed with the window's requests: what is shown is that the mean rate is below the mean limit.

use super::{BILLION, Counts};
use crate::fixed::{Bits, Log, OutOfRange, log2_lower, log2_upper, weighed};

/// Sizes of harm that are looked for.
pub const CEILINGS: usize = 7;

/// p1/p0 of the test for harm, in thousandths.
const CEILING_MILLI: [u64; CEILINGS] = [1_500, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000];

/// Their weights, of 1024.
pub const CEILING_WEIGHTS: [u64; CEILINGS] = [16, 48, 128, 192, 256, 256, 128];

/// Sizes of harm that the baseline is held against, to see whether it shares the trouble.
pub const REPEATS: usize = 3;

/// Which of [`CEILING_MILLI`] they are.
const REPEATED: [usize; REPEATS] = [0, 2, 4];

/// Sizes of safety that are looked for.
pub const SAFETIES: usize = 5;

/// p1/p0 of the proof of safety, as fractions. The last two find rates that are within the limit, but not far.
const SAFETY_FRACTIONS: [(u64, u64); SAFETIES] = [(1, 30), (1, 10), (1, 3), (2, 3), (9, 10)];

/// Evidence of a failure and of a success, for each of `K` alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coefficients<const K: usize> {
    limit_ppb: u64,
    event: [Log; K],
    other: [Log; K],
}

/// The test of one arm against a ceiling on its rate.
pub type Ceiling = Coefficients<CEILINGS>;

/// The proof that one arm's rate is below a limit.
pub type Safety = Coefficients<SAFETIES>;

impl<const K: usize> Coefficients<K> {
    fn new(p0: u64, alternatives: [u64; K]) -> Result<Self, OutOfRange> {
        if p0 == 0 || p0 >= BILLION {
            return Err(OutOfRange);
        }
        let ratio = |part: u64, whole: u64| Ok(log2_lower(part.into())? - log2_upper(whole.into())?);
        let mut both = Self {
            limit_ppb: p0,
            event: [0; K],
            other: [0; K],
        };
        for (k, p1) in alternatives.into_iter().enumerate() {
            both.event[k] = ratio(p1, p0)?;
            both.other[k] = ratio(BILLION - p1, BILLION - p0)?;
        }
        Ok(both)
    }

    /// p0, in parts per billion.
    pub const fn limit_ppb(&self) -> u64 {
        self.limit_ppb
    }

    /// Evidence of some requests, rounded down.
    pub fn evidence(&self, counts: Counts) -> Result<[Bits; K], OutOfRange> {
        let others = counts.others()?;
        let mut evidence = [0; K];
        for (k, bits) in evidence.iter_mut().enumerate() {
            *bits = self.one(k, counts.events, others)?;
        }
        Ok(evidence)
    }

    fn one(&self, k: usize, events: u64, others: u64) -> Result<Bits, OutOfRange> {
        weighed(
            i128::from(events) * i128::from(self.event[k]) + i128::from(others) * i128::from(self.other[k]),
        )
    }
}

impl Ceiling {
    /// The test of p <= `p0_ppb`. An alternative never goes more than half the way from p0 to 1.
    pub fn above(p0_ppb: u64) -> Result<Self, OutOfRange> {
        let highest = p0_ppb + BILLION.saturating_sub(p0_ppb) / 2;
        Self::new(
            p0_ppb,
            CEILING_MILLI.map(|milli| (p0_ppb.saturating_mul(milli) / 1_000).min(highest)),
        )
    }

    /// The same for a few of the sizes.
    pub fn repeated(&self, counts: Counts) -> Result<[Bits; REPEATS], OutOfRange> {
        let others = counts.others()?;
        let mut evidence = [0; REPEATS];
        for (bits, k) in evidence.iter_mut().zip(REPEATED) {
            *bits = self.one(k, counts.events, others)?;
        }
        Ok(evidence)
    }
}

impl Safety {
    /// The proof of p < `p0_ppb`.
    pub fn below(p0_ppb: u64) -> Result<Self, OutOfRange> {
        Self::new(
            p0_ppb,
            SAFETY_FRACTIONS.map(|(part, whole)| (p0_ppb.saturating_mul(part) / whole).max(1)),
        )
    }
}

#[cfg(test)]
#[allow(
    clippy::float_arithmetic,
    reason = "checks of the integers, not a part of them"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two logarithms' worth of a [`Log`].
    fn exact(p: f64) -> f64 {
        p / (1_u64 << 56) as f64
    }

    #[test]
    fn the_ceiling_and_the_safety_test_are_e_variables_at_their_limit() {
        for p0 in [1_000, 5_000_000, 10_000_000, 300_000_000, 900_000_000] {
            let p = p0 as f64 / 1e9;
            let mean = |event: Log, other: Log| {
                p * exact(event as f64).exp2() + (1.0 - p) * exact(other as f64).exp2()
            };
            let ceiling = Ceiling::above(p0).unwrap();
            let safety = Safety::below(p0).unwrap();
            for k in 0..CEILINGS {
                assert!(
                    mean(ceiling.event[k], ceiling.other[k]) <= 1.0 + 1e-12,
                    "{p0} {k}"
                );
                assert!(ceiling.event[k] > 0 && ceiling.other[k] < 0, "{p0} {k}");
            }
            for k in 0..SAFETIES {
                assert!(mean(safety.event[k], safety.other[k]) <= 1.0 + 1e-12, "{p0} {k}");
                assert!(safety.event[k] < 0 && safety.other[k] > 0, "{p0} {k}");
            }
        }
    }

    #[test]
    fn limits_and_counts_out_of_range_are_refused() {
        assert!(Ceiling::above(0).is_err() && Ceiling::above(BILLION).is_err());
        assert!(Safety::below(0).is_err() && Safety::below(BILLION).is_err());
        let ceiling = Ceiling::above(10_000_000).unwrap();
        let counts = |requests, events| Counts { requests, events };
        for bad in [
            counts(1, 2),
            counts(super::super::MAX_BLOCK_REQUESTS + 1, 0),
            counts(u64::MAX, u64::MAX),
        ] {
            assert!(ceiling.evidence(bad).is_err() && ceiling.repeated(bad).is_err());
        }
        assert!(ceiling.evidence(counts(1 << 28, 1 << 28)).is_ok());
        assert!(ceiling.evidence(counts(1 << 40, 1 << 40)).is_err());
    }

    #[test]
    fn the_baseline_is_held_against_some_of_the_same_sizes() {
        let ceiling = Ceiling::above(10_000_000).unwrap();
        let counts = Counts {
            requests: 1_000,
            events: 31,
        };
        let all = ceiling.evidence(counts).unwrap();
        assert_eq!(ceiling.repeated(counts).unwrap(), [all[0], all[2], all[4]]);
        // 31 of 1,000 is 3.1 %: three times the limit fits best.
        assert_eq!(all.iter().max(), Some(&all[2]));
    }

    proptest! {
        #[test]
        fn evidence_is_within_a_millionth_of_a_bit_of_the_reals_and_never_above(
            p0 in 1_000_u64..900_000_000, requests in 0_u64..1_000_000, part in 0_u64..=1_000,
        ) {
            let counts = Counts { requests, events: requests * part / 1_000 };
            let (n, x) = (counts.requests as f64, counts.events as f64);
            let highest = p0 + (BILLION - p0) / 2;
            let got = Ceiling::above(p0).unwrap().evidence(counts).unwrap();
            let p1 = CEILING_MILLI.map(|milli| (p0 * milli / 1_000).min(highest));
            let safe = Safety::below(p0).unwrap().evidence(counts).unwrap();
            let p2 = SAFETY_FRACTIONS.map(|(part, whole)| (p0 * part / whole).max(1));
            for (got, p1) in got.into_iter().zip(p1).chain(safe.into_iter().zip(p2)) {
                let other = ((BILLION - p1) as f64 / (BILLION - p0) as f64).log2();
                let want = x * (p1 as f64 / p0 as f64).log2() + (n - x) * other;
                // The float's own error, some 2^-50 of its terms, is allowed for on the lower side.
                let own = 1e-9 + want.abs() * 1e-14 + (n * other).abs() * 1e-14;
                let low = want - got as f64 / (1_u64 << 32) as f64;
                prop_assert!((-own..1e-6 + own).contains(&low), "{low}");
            }
        }
    }
}
