//! Answers questions about the values that a histogram counted.

use super::{
    Histogram,
    index::{self, OVERFLOW, UNDERFLOW},
    table::UPPER_NS,
};

/// One whole in parts per million.
const WHOLE_PPM: u32 = 1_000_000;

/// Two bounds of a sample, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The sample is above this; in the underflow it may also be equal (both can be 0).
    pub lower_ns: u64,
    /// The sample is at most this; `u64::MAX` in the overflow.
    pub upper_ns: u64,
}

impl Bounds {
    /// The harmonic midpoint `2 lo hi / (lo + hi)`, rounded down: the guess with the least relative error.
    ///
    /// It is within 2.17 %, `(r - 1) / (r + 1)` with `r = 2^(1/16)`, and two nanoseconds of the sample,
    /// except in the underflow, where it is 0, and in the overflow, where it is about 256 s.
    pub fn midpoint_ns(&self) -> u64 {
        let (low, high) = (u128::from(self.lower_ns), u128::from(self.upper_ns));
        let (product, sum) = (low * high, low + high);
        if sum == 0 {
            return 0;
        }
        // Doubling the product could pass 128 bits; the result is at most the higher bound.
        let midpoint = 2 * (product / sum) + 2 * (product % sum) / sum;
        u64::try_from(midpoint).unwrap_or(self.upper_ns)
    }
}

/// How many values are above a limit that need not be a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Above {
    /// Values in buckets that are above the limit as a whole.
    pub at_least: u64,
    /// The same and the values in the bucket that the limit cuts.
    pub at_most: u64,
}

impl Histogram {
    /// The bounds of the sample of rank `ceil(q * count)`, the smallest having rank 1; none if there is no value.
    ///
    /// `q` is in parts per million. 0 gives the smallest sample, and more than a million the largest.
    pub fn quantile(&self, q_ppm: u32) -> Option<Bounds> {
        if self.is_empty() {
            return None;
        }
        let parts = u128::from(q_ppm.min(WHOLE_PPM)) * u128::from(self.count);
        let rank = parts.div_ceil(u128::from(WHOLE_PPM)).max(1);
        let mut seen = 0;
        let found = self.positions().find(|(_, count)| {
            seen += u128::from(*count);
            seen >= rank
        });
        // The counts add up to at least `count`, so the rank is always found.
        found.map(|(position, _)| bounds(position))
    }

    /// Counts the values above `ns`, as closely as the buckets allow.
    pub fn count_above(&self, ns: u64) -> Above {
        let limit = index::position(ns);
        let (cut, overflow) = match limit {
            UNDERFLOW => (self.underflow, self.overflow),
            OVERFLOW => (self.overflow, 0),
            bucket => {
                let in_run = self.run.get(bucket.wrapping_sub(self.first));
                (in_run.copied().unwrap_or(0), self.overflow)
            }
        };
        let run_until_limit = (limit + 1).saturating_sub(self.first).min(self.run.len());
        let at_least = self.run[run_until_limit..]
            .iter()
            .fold(overflow, |sum, count| sum.saturating_add(*count));
        // A limit on a bucket's upper bound, which belongs to the bucket, cuts nothing.
        let cut = if ns < bounds(limit).upper_ns { cut } else { 0 };
        Above {
            at_least,
            at_most: at_least.saturating_add(cut),
        }
    }

    /// All positions that may have counted something, in ascending order.
    fn positions(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let buckets = (self.first..).zip(self.run.iter().copied());
        std::iter::once((UNDERFLOW, self.underflow))
            .chain(buckets)
            .chain(std::iter::once((OVERFLOW, self.overflow)))
    }
}

/// The bounds of the values at a position.
fn bounds(position: usize) -> Bounds {
    let below = position.checked_sub(1).and_then(|below| UPPER_NS.get(below));
    Bounds {
        lower_ns: below.copied().unwrap_or(0),
        upper_ns: UPPER_NS.get(position).copied().unwrap_or(u64::MAX),
    }
}
