//! Counts latencies in exponential buckets that add up exactly, whoever adds them and in whichever order.
//!
//! # Buckets
//!
//! The histogram is the base-2 exponential one of the OpenTelemetry metrics data model, which is also
//! Prometheus' native histogram. With the ratio `r = 2^(1/16)` (scale 4), bucket `i` holds the values in
//! `(r^i, r^(i+1)]` **seconds**; the upper bound belongs to the bucket. `i` is the index as OpenTelemetry
//! counts; Prometheus calls the same bucket `i + 1`.
//!
//! ```text
//!   position     0            1         2       ...      430         431           432
//!   OTel index   -         -319      -318       ...      110         111             -
//!   Prometheus   -         -318      -317       ...      111         112             -
//!   values   underflow  (995, 1039] (1039, 1086]   (117.4 s, 122.6 s] (122.6 s, 128 s]  overflow
//!            [0, 995 ns]    ns          ns                                         (128 s, ...)
//! ```
//!
//! Values are whole nanoseconds, so a bound counts as `floor(r^i * 10^9)` ns without any loss: a whole
//! number is at most a bound exactly when it is at most the bound rounded down. The index is found with
//! integers alone (`histogram/index.rs`: a table and one compare), so that it is the same on every machine.
//!
//! Why **scale 4**: it knows a quantile within 2.17 % (below) for some 70 to 90 bytes of counts in a window
//! of 100 to 1000 requests; scale 3 doubles the error, and 5 the bytes. Why **seconds**: OpenTelemetry and
//! Prometheus count in seconds, and `log2(10^9)` is no multiple of 1/16, so that bounds which were powers of
//! the ratio in nanoseconds would not be bounds there, and no conversion could be exact. Why the scale is
//! **fixed**: all windows stay comparable, and merging never changes the resolution.
//!
//! # Error
//!
//! A quantile is a bucket's bounds. Their harmonic midpoint `2 lo hi / (lo + hi)` is off by at most
//! `(r - 1) / (r + 1)` = 2.17 % of the true sample, plus two nanoseconds for rounding. In the underflow
//! and the overflow there is no such limit.
//!
//! # Wire
//!
//! ```text
//!   coalmine.v1.Histogram
//!     1  offset     sint32    OTel index of the first count; not looked at when there are no counts
//!     2  counts     bytes     | varint | varint | ...   one per bucket, contiguous, at most 431
//!     3  underflow  uint64    values of at most 995 ns
//!     4  overflow   uint64    values above 128 s
//!     5  sum_ns     uint64    the sum of all values
//!
//!   varint: base 128, least significant group first, bit 7 set on all bytes but the last, in the
//!   fewest bytes possible. The field has the bytes of a packed `repeated uint64`.
//! ```
//!
//! Limits on what is decoded: 431 counts, and [`MAX_COUNT`] values in all.

mod convert;
mod index;
mod query;
mod table;
mod wire;

pub use convert::{
    OtelExponentialHistogram, PrometheusNativeHistogram, Span, ZERO_THRESHOLD_NS, ZERO_THRESHOLD_SECONDS,
};
pub use query::{Above, Bounds};
pub use wire::DecodeError;

use index::OVERFLOW;
use table::UPPER_NS;

/// The scale (OpenTelemetry) or schema (Prometheus) of every histogram: 2^4 buckets a doubling.
pub const SCALE: i32 = 4;

/// How many buckets there are between the underflow and the overflow.
pub const BUCKETS: usize = 431;

/// OpenTelemetry's index of the lowest bucket, whose values are above 995 ns.
pub const MIN_OTEL_INDEX: i32 = -319;

/// The most values that a decoded histogram may count: 2^48, nine years of a million a second.
pub const MAX_COUNT: u64 = 1 << 48;

/// Buckets are allocated in multiples of this many: a cache line of counts.
const BLOCK: usize = 8;

/// The largest value, in nanoseconds, that the bucket with this OpenTelemetry index holds.
///
/// None if the index is outside `MIN_OTEL_INDEX..MIN_OTEL_INDEX + BUCKETS`.
pub fn upper_bound_ns(otel_index: i32) -> Option<u64> {
    let position = usize::try_from(otel_index.checked_sub(MIN_OTEL_INDEX - 1)?).ok()?;
    if position == index::UNDERFLOW {
        return None;
    }
    UPPER_NS.get(position).copied()
}

/// A latency histogram.
///
/// Two are equal when their counts and sums are, whatever happened to them before. A count or sum that
/// would pass `u64::MAX` stays there.
///
/// ```
/// use coalmine_proto::histogram::Histogram;
///
/// let mut latency = Histogram::new();
/// for ms in 1..=100 {
///     latency.record(ms * 1_000_000);
/// }
/// let p99 = latency.quantile(990_000).unwrap();
/// assert!(p99.lower_ns < 99_000_000 && 99_000_000 <= p99.upper_ns);
/// assert_eq!(latency.sum_ns(), 5_050_000_000);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Histogram {
    /// Position of the run's first count; at least 1 once there is a run.
    first: usize,
    /// Counts of neighbouring buckets; every bucket outside is empty.
    run: Vec<u64>,
    underflow: u64,
    overflow: u64,
    /// All of the above added up, so never below any of them.
    count: u64,
    sum_ns: u64,
}

impl Histogram {
    /// An empty histogram, which has allocated nothing.
    pub const fn new() -> Self {
        Self {
            first: 0,
            run: Vec::new(),
            underflow: 0,
            overflow: 0,
            count: 0,
            sum_ns: 0,
        }
    }

    /// Builds a histogram from counts of neighbouring buckets, the first of which has this OpenTelemetry index.
    ///
    /// The counterpart of [`Histogram::contiguous`], with the limits of a decoded message.
    pub fn from_parts(
        otel_offset: i32,
        counts: &[u64],
        underflow: u64,
        overflow: u64,
        sum_ns: u64,
    ) -> Result<Self, DecodeError> {
        let start = wire::start_of_run(otel_offset, counts.len())?;
        let in_run = counts.iter().fold(0, |sum: u64, n| sum.saturating_add(*n));
        let mut new = Self::new();
        new.admit(in_run, underflow, overflow, sum_ns)?;
        if !counts.is_empty() {
            new.cover(start, counts.len()).copy_from_slice(counts);
        }
        Ok(new)
    }

    /// Counts one value. Allocates only when no value of about this size was counted before.
    #[inline]
    pub fn record(&mut self, ns: u64) {
        self.count = self.count.saturating_add(1);
        self.sum_ns = self.sum_ns.saturating_add(ns);
        let position = index::position(ns);
        // The run never holds the underflow (position 0) nor the overflow, so these also go outside.
        match self.run.get_mut(position.wrapping_sub(self.first)) {
            Some(count) => *count = count.saturating_add(1),
            None => self.add_outside(position, 1),
        }
    }

    /// Adds the values of another histogram; exact, and the same in any order and grouping.
    pub fn merge(&mut self, other: &Self) {
        let (start, theirs) = other.occupied();
        let may_saturate = self.count.checked_add(other.count).is_none();
        if !theirs.is_empty() {
            let mine = self.cover(start, theirs.len()).iter_mut().zip(theirs);
            if may_saturate {
                mine.for_each(|(mine, theirs)| *mine = mine.saturating_add(*theirs));
            } else {
                // No bucket counts more than the whole, which fits.
                mine.for_each(|(mine, theirs)| *mine = mine.wrapping_add(*theirs));
            }
        }
        self.underflow = self.underflow.saturating_add(other.underflow);
        self.overflow = self.overflow.saturating_add(other.overflow);
        self.count = self.count.saturating_add(other.count);
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    /// Forgets all values and keeps the memory.
    pub fn clear(&mut self) {
        self.run.fill(0);
        self.underflow = 0;
        self.overflow = 0;
        self.count = 0;
        self.sum_ns = 0;
    }

    /// How many values were counted, those outside the range included.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of all values, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many values were at most 995 ns.
    pub fn underflow(&self) -> u64 {
        self.underflow
    }

    /// How many values were above 128 s.
    pub fn overflow(&self) -> u64 {
        self.overflow
    }

    /// Whether no value was counted.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The OpenTelemetry index and count of each bucket that is not empty, in ascending order.
    pub fn buckets(&self) -> impl Iterator<Item = (i32, u64)> + '_ {
        let (first, counts) = self.contiguous();
        (first..)
            .zip(counts.iter().copied())
            .filter(|(_, count)| *count > 0)
    }

    /// The counts from the first bucket that is not empty to the last, and the OpenTelemetry index of the first.
    ///
    /// `(0, [])` if all buckets are empty.
    pub fn contiguous(&self) -> (i32, &[u64]) {
        let (start, counts) = self.occupied();
        if counts.is_empty() {
            return (0, counts);
        }
        (index::otel_index(start), counts)
    }

    /// The bytes of memory that the histogram holds, itself included.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.run.capacity() * size_of::<u64>()
    }

    /// The run without the empty buckets at its ends, and the position of its first.
    fn occupied(&self) -> (usize, &[u64]) {
        let Some(skipped) = self.run.iter().position(|count| *count > 0) else {
            return (self.first, &[]);
        };
        let end = self.run.iter().rposition(|count| *count > 0);
        let end = end.map_or(skipped, |last| last + 1);
        (self.first + skipped, &self.run[skipped..end])
    }

    /// Counts in a position that the run does not cover; the total is the caller's.
    #[cold]
    fn add_outside(&mut self, position: usize, count: u64) {
        let counter = match position {
            index::UNDERFLOW => &mut self.underflow,
            OVERFLOW => &mut self.overflow,
            bucket => &mut self.cover(bucket, 1)[0],
        };
        *counter = counter.saturating_add(count);
    }

    /// The counts of `len` positions (at least one) from `start`, all of them buckets.
    fn cover(&mut self, start: usize, len: usize) -> &mut [u64] {
        let end = start + len;
        debug_assert!(index::UNDERFLOW < start && start < end && end <= OVERFLOW);
        if start < self.first || self.first + self.run.len() < end {
            self.grow(start, end);
        }
        &mut self.run[start - self.first..end - self.first]
    }

    #[cold]
    fn grow(&mut self, mut start: usize, mut end: usize) {
        if !self.run.is_empty() {
            start = start.min(self.first);
            end = end.max(self.first + self.run.len());
        }
        start = (start - start % BLOCK).max(index::UNDERFLOW + 1);
        end = end.next_multiple_of(BLOCK).min(OVERFLOW);

        let mut run = vec![0; end - start];
        if !self.run.is_empty() {
            run[self.first - start..][..self.run.len()].copy_from_slice(&self.run);
        }
        self.first = start;
        self.run = run;
    }
}

impl PartialEq for Histogram {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count
            && self.sum_ns == other.sum_ns
            && self.underflow == other.underflow
            && self.overflow == other.overflow
            && self.contiguous() == other.contiguous()
    }
}

impl Eq for Histogram {}
