//! Two arms' latencies against each other, by how many requests are slow.
//!
//! For a quantile q of 50 %, 90 % and 99 % let tau be the upper bound of the histogram's bucket in which the
//! baseline's q-quantile was in *earlier* blocks, and m >= 1 the tolerated ratio, a whole number of buckets. In the
//! block, x_c of the canary's n_c requests took longer than m tau, and x_b of the baseline's n_b longer than tau.
//!
//! Null: the canary's latency divided by m is stochastically at most the baseline's, in every block. Then the share p_c
//! of the canary above m tau is at most the share p_b of the baseline above tau, whatever tau is; and tau is known
//! before the block. For an odds ratio w > 1 and any t_b in (0, 1), let t_c = w t_b / (1 - t_b + w t_b) and
//! t_0 = (n_c t_c + n_b t_b) / (n_c + n_b):
//!
//! ```text
//! l = x_c ln(t_c/t_0) + (n_c - x_c) ln((1-t_c)/(1-t_0)) + x_b ln(t_b/t_0) + (n_b - x_b) ln((1-t_b)/(1-t_0))
//! ```
//!
//! (Turner, Ly, Grünwald, JSPI 2024, arXiv 2106.02693, section 2.) Proof that E[exp l] <= 1 given n_c and n_b. With A, B
//! the two ratios of the canary and C, D those of the baseline, E[exp l] = (p_c A + (1-p_c) B)^n_c (p_b C + (1-p_b)
//! D)^n_b. As A > 1 > B the first factor grows with p_c, so take p_c = p_b = p. Then ln E = n_c ln(p A + (1-p) B) + n_b
//! ln(p C + (1-p) D), at most n ln of the weighted mean p (n_c A + n_b C)/n + (1-p) (n_c B + n_b D)/n by concavity, and
//! both of these means are 1 by the choice of t_0. QED. For requests of different p_i the same concavity serves arm by arm.
//!
//! Of blocks of several windows the same holds as for rates of failure; `live.rs` has the conditions.
//!
//! So t_b and tau only decide how much is found, never whether it is true: t_b is the share of the baseline that
//! was above tau in earlier blocks, on a grid of 1/16 of an octave, so that its logarithms come from a table.

use crate::fixed::{Bits, Log, OutOfRange, log2_lower, log2_upper, power_lower, weighed};
use borsh::{BorshDeserialize, BorshSerialize};

/// Quantiles that are compared.
pub const QUANTILES: usize = 3;

/// The quantiles, in parts per million.
pub const QUANTILE_PPM: [u32; QUANTILES] = [500_000, 900_000, 990_000];

/// Odds ratios that are looked for.
pub const ODDS: usize = 5;

/// Alternatives in all: each quantile with each odds ratio.
pub const TAILS: usize = QUANTILES * ODDS;

/// The odds ratios w, in thousandths.
pub type Odds = [u64; ODDS];
const ODDS_MILLI: Odds = [1_250, 1_500, 2_000, 3_000, 6_000];

/// The weights of the alternatives, quantile by quantile.
pub const TAIL_WEIGHTS: [u64; TAILS] = [1, 5, 4, 3, 3, 1, 5, 4, 3, 3, 1, 5, 4, 3, 3];

/// Shares have 40 fractional bits.
const WHOLE: u64 = 1 << 40;

/// t_b is 2^(-j/16), for j from 16, a half, to 192, one in 4,096.
const SHARES: std::ops::Range<u32> = 16..193;

/// A share of the baseline on the grid.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct Share(u8);

/// Requests of both arms, and how many were above each mark. A count that would pass 32 bits stays there, and is refused
/// as evidence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub struct TailCounts {
    /// Requests of the canary whose latency is known.
    pub canary: u32,
    /// The same of the baseline.
    pub baseline: u32,
    /// Of the canary, how many took longer than m tau, by quantile.
    pub canary_over: [u32; QUANTILES],
    /// Of the baseline, how many took longer than tau.
    pub baseline_over: [u32; QUANTILES],
}

impl TailCounts {
    /// Adds the counts of another window.
    pub fn add(&mut self, other: &Self) {
        let add = |mine: &mut u32, theirs: u32| *mine = mine.saturating_add(theirs);
        add(&mut self.canary, other.canary);
        add(&mut self.baseline, other.baseline);
        for q in 0..QUANTILES {
            add(&mut self.canary_over[q], other.canary_over[q]);
            add(&mut self.baseline_over[q], other.baseline_over[q]);
        }
    }
}

/// The test of two arms' latencies: its logarithms for every share of the grid.
#[derive(Debug, Clone)]
pub struct TailTest {
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Row {
    baseline: Point,
    canary: [Point; ODDS],
}

/// A share t, and log2 t and log2(1 - t), rounded down.
#[derive(Debug, Clone, Copy, Default)]
struct Point {
    share: u64,
    over: Log,
    under: Log,
}

impl Point {
    fn new(share: u64) -> Result<Self, OutOfRange> {
        Ok(Self {
            share,
            over: log2_lower(share.into())? - (40 << 56),
            under: log2_lower((WHOLE - share).into())? - (40 << 56),
        })
    }
}

impl TailTest {
    /// Computes the table.
    pub fn new() -> Result<Self, OutOfRange> {
        let row = |j: u32| {
            let share = power_lower(i128::from(j) << 28) >> 23;
            let mut row = Row {
                baseline: Point::new(share)?,
                ..Row::default()
            };
            for (point, milli) in row.canary.iter_mut().zip(ODDS_MILLI) {
                let (t, w) = (u128::from(share), u128::from(milli));
                let odds = w * t;
                let shared = odds * u128::from(WHOLE) / (1_000 * (u128::from(WHOLE) - t) + odds);
                *point = Point::new(u64::try_from(shared).map_err(|_| OutOfRange)?)?;
            }
            Ok(row)
        };
        Ok(Self {
            rows: SHARES.map(row).collect::<Result<_, _>>()?,
        })
    }

    /// The share of the grid that is nearest to `over` of `count` (in the logarithm).
    pub fn share(over: u64, count: u64) -> Share {
        let steps = match (log2_lower(over.into()), log2_lower(count.into())) {
            // -16 log2(over / count), rounded to the nearest.
            (Ok(over), Ok(count)) => (((count - over) >> 51) + 1) >> 1,
            _ => i64::MAX,
        };
        let last = i64::from(SHARES.end - 1);
        let step = steps.clamp(i64::from(SHARES.start), last) - i64::from(SHARES.start);
        Share(u8::try_from(step).unwrap_or(u8::MAX))
    }

    /// Evidence of one block at quantile `q`, where `share` of the baseline was above tau before, for each odds ratio,
    /// rounded down. A block without requests on one arm says nothing.
    pub fn evidence(&self, counts: &TailCounts, q: usize, share: Share) -> Result<[Bits; ODDS], OutOfRange> {
        let mut evidence = [0; ODDS];
        if counts.canary.max(counts.baseline) == u32::MAX {
            return Err(OutOfRange);
        }
        let (n_c, n_b) = (u64::from(counts.canary), u64::from(counts.baseline));
        let (x_c, x_b) = (
            u64::from(counts.canary_over[q]),
            u64::from(counts.baseline_over[q]),
        );
        let y_c = n_c.checked_sub(x_c).ok_or(OutOfRange)?;
        let y_b = n_b.checked_sub(x_b).ok_or(OutOfRange)?;
        if n_c == 0 || n_b == 0 {
            return Ok(evidence);
        }
        let row = self.rows.get(usize::from(share.0)).ok_or(OutOfRange)?;
        let n = u128::from(n_c + n_b) << 40;
        let log_n = i128::from(log2_lower(n)?);
        let wide = |count: u64, log: Log| i128::from(count) * i128::from(log);
        let baseline = wide(x_b, row.baseline.over) + wide(y_b, row.baseline.under);
        let all = i128::from(n_c + n_b) * log_n;
        for (bits, point) in evidence.iter_mut().zip(&row.canary) {
            // n t_0, with 40 fractional bits.
            let over =
                u128::from(n_c) * u128::from(point.share) + u128::from(n_b) * u128::from(row.baseline.share);
            let canary = wide(x_c, point.over) + wide(y_c, point.under);
            let null = wide(x_c + x_b, log2_upper(over)?) + wide(y_c + y_b, log2_upper(n - over)?);
            *bits = weighed(canary + baseline - null + all)?;
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

    use super::*;
    use crate::fixed::ONE;

    fn counts(n_c: u32, x_c: u32, n_b: u32, x_b: u32) -> TailCounts {
        TailCounts {
            canary: n_c,
            baseline: n_b,
            canary_over: [x_c; QUANTILES],
            baseline_over: [x_b; QUANTILES],
        }
    }

    #[test]
    fn a_share_is_the_nearest_of_the_grid() {
        let near = |over, count| 16 + u32::from(TailTest::share(over, count).0);
        assert_eq!(near(1, 2), 16);
        assert_eq!(near(9, 10), 16);
        assert_eq!(near(1, 4), 32);
        // 16 log2(100) = 106.3, 16 log2(10) = 53.15.
        assert_eq!(near(1, 100), 106);
        assert_eq!(near(1, 10), 53);
        assert_eq!(near(1, 1 << 20), 192);
        assert_eq!(near(0, 5), 192);
        assert_eq!(near(0, 0), 192);
        let table = TailTest::new().unwrap();
        assert_eq!(table.rows.len(), 177);
        assert_eq!(table.rows[0].baseline.share, WHOLE / 2);
        assert_eq!(table.rows[176].baseline.share, WHOLE / 4_096);
        // Odds of 1 : 1 times 6 are 6/7.
        assert_eq!(table.rows[0].canary[4].share, WHOLE * 6 / 7);
    }

    #[test]
    fn it_is_an_e_variable_for_every_common_share() {
        let test = TailTest::new().unwrap();
        let binomial = |n: u32, x: u32, p: f64| {
            let choose = (0..x).fold(1.0, |product, i| product * f64::from(n - i) / f64::from(i + 1));
            choose * p.powi(x.cast_signed()) * (1.0 - p).powi((n - x).cast_signed())
        };
        for (n_c, n_b) in [(1, 1), (5, 5), (4, 30), (20, 7)] {
            for p in [0.001, 0.01, 0.1, 0.5, 0.9] {
                for share in [
                    TailTest::share(1, 2),
                    TailTest::share(1, 10),
                    TailTest::share(1, 100),
                ] {
                    let mut sums = [0.0; ODDS];
                    for x_c in 0..=n_c {
                        for x_b in 0..=n_b {
                            let bits = test.evidence(&counts(n_c, x_c, n_b, x_b), 1, share).unwrap();
                            let weight = binomial(n_c, x_c, p) * binomial(n_b, x_b, p);
                            for (sum, bits) in sums.iter_mut().zip(bits) {
                                *sum += weight * (bits as f64 / ONE as f64).exp2();
                            }
                        }
                    }
                    for (k, mean) in sums.into_iter().enumerate() {
                        assert!(mean <= 1.0 + 1e-9, "{n_c} {n_b} {p} {share:?} {k}: {mean}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_slow_requests_on_the_canary_are_more_evidence_and_on_the_baseline_less() {
        let test = TailTest::new().unwrap();
        let at = |x_c, x_b| {
            test.evidence(&counts(100, x_c, 900, x_b), 0, TailTest::share(1, 10))
                .unwrap()
        };
        for k in 0..ODDS {
            assert!(at(11, 90)[k] > at(10, 90)[k]);
            assert!(at(10, 91)[k] < at(10, 90)[k]);
        }
        assert!(at(20, 90)[1] > 4 * ONE && at(10, 90)[1] < 0);
    }

    #[test]
    fn one_arm_alone_says_nothing_and_impossible_counts_are_refused() {
        let test = TailTest::new().unwrap();
        let share = TailTest::share(1, 2);
        for counts in [counts(0, 0, 5, 5), counts(5, 5, 0, 0), TailCounts::default()] {
            assert_eq!(test.evidence(&counts, 2, share), Ok([0; ODDS]));
        }
        for counts in [
            counts(1, 2, 5, 0),
            counts(1, 0, 5, 6),
            counts(u32::MAX, 0, 5, 0),
            counts(5, 0, u32::MAX, 0),
        ] {
            assert_eq!(test.evidence(&counts, 2, share), Err(OutOfRange));
        }
        let many = counts(1 << 26, 1 << 26, 1 << 26, 0);
        assert!(test.evidence(&many, 2, share).is_ok());
        let most = counts(u32::MAX - 1, u32::MAX - 1, u32::MAX - 1, 0);
        assert_eq!(test.evidence(&most, 2, share), Err(OutOfRange));
        assert_eq!(test.evidence(&counts(1, 0, 1, 0), 0, Share(255)), Err(OutOfRange));
    }

    #[test]
    fn counts_add_up() {
        let mut sum = counts(1, 2, 3, 4);
        sum.add(&counts(10, 20, 30, 40));
        assert_eq!(sum, counts(11, 22, 33, 44));
    }

    proptest! {
        #[test]
        fn evidence_is_within_a_millionth_of_a_bit_of_the_reals_and_never_above(
            n_c in 1_u32..100_000, n_b in 1_u32..1_000_000, x in 0_u32..=1_000, y in 0_u32..=1_000, j in 0_u8..177,
        ) {
            let (x_c, x_b) = (n_c * x / 1_000, n_b * y / 1_000);
            let test = TailTest::new().unwrap();
            let got = test.evidence(&counts(n_c, x_c, n_b, x_b), 0, Share(j)).unwrap();
            let row = test.rows[usize::from(j)];
            let part = |share: u64| share as f64 / WHOLE as f64;
            let t_b = part(row.baseline.share);
            let [n_c, n_b, x_c, x_b] = [n_c, n_b, x_c, x_b].map(f64::from);
            for (got, point) in got.into_iter().zip(row.canary) {
                let t_c = part(point.share);
                let t_0 = (n_c * t_c + n_b * t_b) / (n_c + n_b);
                let terms = [
                    x_c * (t_c / t_0).log2(),
                    (n_c - x_c) * ((1.0 - t_c) / (1.0 - t_0)).log2(),
                    x_b * (t_b / t_0).log2(),
                    (n_b - x_b) * ((1.0 - t_b) / (1.0 - t_0)).log2(),
                ];
                let want: f64 = terms.iter().sum();
                let own = 1e-9 + terms.iter().map(|term| term.abs()).sum::<f64>() * 1e-14 + (n_c + n_b) * 1e-15;
                let low = want - got as f64 / ONE as f64;
                prop_assert!((-own..1e-6 + own).contains(&low), "{low} {own}");
            }
        }
    }
}
