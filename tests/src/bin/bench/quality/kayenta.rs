//! A peer: what Kayenta's `NetflixACAJudge` does with one pair of time series, from its documented semantics.
//!
//! A point is a window's value. Each look takes all points so far and asks for a confidence interval of the shift
//! between the arms (Mann-Whitney, confidence 0.98): for a shift `m`, `W(m)` is the standardised rank sum of
//! `{x - m}` among the baseline's `y`, with ties averaged and a correction of 1/2 towards 0. The interval ends where
//! `W` crosses +2.3263, and the estimate is where it crosses 0, each found by Brent's method (1973) to an absolute
//! tolerance of 1e-4. The pair is High when the interval's low end is above 1/4 of the estimate's size, and the mean
//! ratio is at least 1 or cannot be told.
//!
//! Left out: Kayenta adds noise of 1e-5 of the value when each arm has a single distinct value. Here such a pair is
//! High when the canary's value is the higher one, which is what the noise amounts to.

use std::cmp::Ordering;

/// Where `W` ends an interval of 98 %.
const QUANTILE: f64 = 2.326_347_874_040_841;

/// Share of the estimate that the interval's end must pass.
const TOLERANCE: f64 = 0.25;

/// To which a root is found.
const ROOT_TOLERANCE: f64 = 1e-4;

/// Evaluations after which a root is taken as it is.
const MAX_EVALUATIONS: usize = 1_000;

/// Points of one arm, sorted.
#[derive(Debug, Clone, Default)]
pub(super) struct Points {
    sorted: Vec<f64>,
    sum: f64,
}

/// Both arms of a metric.
#[derive(Debug, Clone, Default)]
pub(super) struct Pair {
    pub(super) canary: Points,
    pub(super) baseline: Points,
}

// === impl Points ===

impl Points {
    pub(super) fn add(&mut self, value: f64) {
        let at = self.sorted.partition_point(|point| *point < value);
        self.sorted.insert(at, value);
        self.sum += value;
    }

    fn range(&self) -> Option<(f64, f64)> {
        Some((*self.sorted.first()?, *self.sorted.last()?))
    }

    fn mean(&self) -> f64 {
        self.sum / self.sorted.len() as f64
    }
}

// === impl Pair ===

impl Pair {
    /// Whether the canary is classified as High.
    pub(super) fn is_high(&self) -> bool {
        let (Some((low_x, high_x)), Some((low_y, high_y))) = (self.canary.range(), self.baseline.range())
        else {
            return false;
        };
        if self.canary.sorted == self.baseline.sorted {
            return false;
        }
        let (canary, baseline) = (self.canary.mean(), self.baseline.mean());
        // The effect's size cannot be told when a mean is 0; then it is not looked at.
        if canary != 0.0 && baseline != 0.0 && canary / baseline < 1.0 {
            return false;
        }
        if low_x == high_x && low_y == high_y {
            // A single point that all of a baseline of zeros ties with ends in an error, which Kayenta ignores.
            let fails = self.canary.sorted.len() == 1 && low_y == 0.0;
            return low_x > low_y && !fails;
        }
        let bracket = (low_x - high_y, high_x - low_y);
        // The low end is within the tolerance of the true crossing, so that one that is surely below 0 need not be
        // found. Where the arms do not overlap, the end of the bracket may be the answer.
        if bracket.0 <= 0.0 && self.rank_sum(-3.0 * ROOT_TOLERANCE) < QUANTILE {
            return false;
        }
        let low_end = self.root(bracket, QUANTILE);
        low_end > 0.0 && low_end > TOLERANCE * self.root(bracket, 0.0).abs()
    }

    /// Where `W` crosses a value; an end of the bracket if it does not.
    fn root(&self, (low, high): (f64, f64), value: f64) -> f64 {
        let at = |shift| self.rank_sum(shift) - value;
        let (at_low, at_high) = (at(low), at(high));
        if at_low <= 0.0 {
            low
        } else if at_high >= 0.0 {
            high
        } else {
            brent((low, at_low), (high, at_high), at)
        }
    }

    /// `W(shift)`: the standardised rank sum of the canary's points less a shift.
    fn rank_sum(&self, shift: f64) -> f64 {
        let (xs, ys) = (&self.canary.sorted, &self.baseline.sorted);
        let (mut x_at, mut y_at, mut below) = (0, 0, 0.0);
        let (mut ranks, mut ties) = (0.0, 0.0);
        let take = |points: &[f64], at: &mut usize, shift: f64, value: f64| {
            let begun = *at;
            while points.get(*at).is_some_and(|point| point - shift == value) {
                *at += 1;
            }
            (*at - begun) as f64
        };
        loop {
            let (x, y) = (xs.get(x_at).map(|x| x - shift), ys.get(y_at).copied());
            let value = match (x, y) {
                (None, None) => break,
                (Some(x), None) => x,
                (None, Some(y)) => y,
                (Some(x), Some(y)) => match x.total_cmp(&y) {
                    Ordering::Less => x,
                    _ if x == y => x,
                    _ => y,
                },
            };
            let of_x = take(xs, &mut x_at, shift, value);
            let tied = of_x + take(ys, &mut y_at, 0.0, value);
            ranks += of_x * (below + (tied + 1.0) / 2.0);
            ties += tied * tied * tied - tied;
            below += tied;
        }
        let (n_x, n_y) = (xs.len() as f64, ys.len() as f64);
        let n = n_x + n_y;
        let difference = ranks - n_x * (n_x + 1.0) / 2.0 - n_x * n_y / 2.0;
        let correction = if difference == 0.0 {
            0.0
        } else {
            0.5_f64.copysign(difference)
        };
        let variance = n_x * n_y / 12.0 * ((n + 1.0) - ties / (n * (n - 1.0)));
        (difference - correction) / variance.sqrt()
    }
}

/// A root between two points of opposite sign, by Brent's method as R's `zeroin` and Kayenta have it.
fn brent(low: (f64, f64), high: (f64, f64), at: impl Fn(f64) -> f64) -> f64 {
    let ((mut a, mut fa), (mut b, mut fb)) = (low, high);
    let (mut c, mut fc) = (a, fa);
    for _ in 0..MAX_EVALUATIONS {
        let previous = b - a;
        if fc.abs() < fb.abs() {
            ((a, fa), (b, fb), (c, fc)) = ((b, fb), (c, fc), (b, fb));
        }
        let tolerance = 2.0 * f64::EPSILON * b.abs() + ROOT_TOLERANCE / 2.0;
        let half = (c - b) / 2.0;
        if half.abs() <= tolerance || fb == 0.0 {
            return b;
        }
        let mut step = half;
        if previous.abs() >= tolerance && fa.abs() > fb.abs() {
            let wide = c - b;
            let (mut p, mut q) = if a == c {
                let t = fb / fa;
                (wide * t, 1.0 - t)
            } else {
                let (q, t, s) = (fa / fc, fb / fc, fb / fa);
                let p = s * (wide * q * (q - t) - (b - a) * (t - 1.0));
                (p, (q - 1.0) * (t - 1.0) * (s - 1.0))
            };
            if p > 0.0 {
                q = -q;
            } else {
                p = -p;
            }
            if p < 0.75 * wide * q - (tolerance * q).abs() / 2.0 && p < (previous * q / 2.0).abs() {
                step = p / q;
            }
        }
        if step.abs() < tolerance {
            step = tolerance.copysign(step);
        }
        (a, fa) = (b, fb);
        b += step;
        fb = at(b);
        if (fb > 0.0) == (fc > 0.0) {
            (c, fc) = (a, fa);
        }
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(canary: &[f64], baseline: &[f64]) -> Pair {
        let mut pair = Pair::default();
        canary.iter().for_each(|value| pair.canary.add(*value));
        baseline.iter().for_each(|value| pair.baseline.add(*value));
        pair
    }

    #[test]
    fn equal_points_pass() {
        assert!(!pair(&[], &[1.0]).is_high());
        assert!(!pair(&[1.0, 2.0, 3.0], &[3.0, 1.0, 2.0]).is_high());
        assert!(!pair(&[0.0; 6], &[0.0; 5]).is_high());
        assert!(!pair(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.1, 2.1, 2.9, 4.0, 5.1, 5.9]).is_high());
    }

    #[test]
    fn a_clear_shift_is_high_and_its_opposite_is_not() {
        let low: Vec<f64> = (0..12).map(|n| 10.0 + 0.1 * f64::from(n)).collect();
        let high: Vec<f64> = (0..12).map(|n| 15.0 + 0.1 * f64::from(n)).collect();
        assert!(pair(&high, &low).is_high());
        assert!(!pair(&low, &high).is_high());
        assert!(pair(&[2.0, 2.0], &[1.0, 1.0]).is_high());
        assert!(!pair(&[1.0], &[0.0, 0.0]).is_high());
    }

    #[test]
    fn the_rank_sum_is_that_of_the_textbook() {
        // Ranks of x are 5 to 8: 26 - 10 - 8 = 8, less 1/2, over sqrt(16 / 12 * 9) = 3.4641.
        let apart = pair(&[10.0, 20.0, 30.0, 40.0], &[1.0, 2.0, 3.0, 4.0]);
        assert!((apart.rank_sum(0.0) - 7.5 / 12_f64.sqrt()).abs() < 1e-12);
        assert!((apart.rank_sum(100.0) + 7.5 / 12_f64.sqrt()).abs() < 1e-12);
        // x = {1, 2}, y = {1, 3}: ranks 1.5 and 3, 4.5 - 3 - 2 = -1/2, plus 1/2: 0.
        assert_eq!(pair(&[1.0, 2.0], &[1.0, 3.0]).rank_sum(0.0), 0.0);
        // x = {1, 1, 2}, y = {0, 1}: ranks 3, 3, 5, so 11 - 6 - 3 = 2, less 1/2; ties of three take 24 / 20.
        let tied = pair(&[1.0, 1.0, 2.0], &[0.0, 1.0]).rank_sum(0.0);
        assert!(
            (tied - 1.5 / (0.5 * (6.0 - 1.2_f64)).sqrt()).abs() < 1e-12,
            "{tied}"
        );
    }

    #[test]
    fn the_estimate_lies_between_the_arms() {
        // By symmetry the shift of the second pair is 10.
        let even = pair(&[11.0, 12.0, 13.0, 14.0], &[1.0, 2.0, 3.0, 4.0]);
        assert!((even.root((7.0, 13.0), 0.0) - 10.0).abs() <= 1.0);
        // W never passes 2.17 with four points on each arm, so that the end of the bracket is the answer.
        assert_eq!(even.root((7.0, 13.0), QUANTILE), 7.0);
    }
}
