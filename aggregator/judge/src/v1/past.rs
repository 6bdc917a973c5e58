//! The baseline's latencies of earlier windows, and the marks that are set by them.

use borsh::{BorshDeserialize, BorshSerialize};
use coalmine_proto::histogram::{BUCKETS, Histogram, MIN_OTEL_INDEX, upper_bound_ns};

use crate::eprocess::{QUANTILE_PPM, QUANTILES, Share, TailCounts, TailTest};

/// Requests of the baseline that must have been seen before marks are set.
const ENOUGH: u32 = 20;

/// What the baseline's latencies were: a histogram in 16 bits a bucket. When a bucket is full all are halved, so
/// that what is old fades. It only decides where marks are set, so what is lost to halving costs nothing but power.
#[derive(Debug, Clone, Default, BorshSerialize, BorshDeserialize)]
pub(super) struct Past {
    /// Position of the first count, in buckets from the lowest.
    first: u16,
    counts: Box<[u16]>,
    /// Counts stand for so many doublings.
    halvings: u8,
    /// Counts below and above the range.
    under: u32,
    over: u32,
}

/// Where requests begin to be slow, by quantile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, BorshSerialize, BorshDeserialize)]
pub(super) struct Marks {
    /// The bucket whose upper bound it is, or `NONE`.
    positions: [u16; QUANTILES],
    /// The share of the baseline that was above it.
    shares: [Share; QUANTILES],
}

/// No mark.
const NONE: u16 = u16::MAX;

impl Default for Marks {
    fn default() -> Self {
        Self {
            positions: [NONE; QUANTILES],
            shares: [Share::default(); QUANTILES],
        }
    }
}

impl Past {
    /// Whether all counts have a place, and their sums are what `add` leaves.
    pub(super) fn is_sound(&self) -> bool {
        usize::from(self.first) + self.counts.len() <= BUCKETS
            && self.under.max(self.over) <= u32::MAX / 4
            && u32::from(self.halvings) <= u64::BITS
    }

    /// Adds a window of the baseline.
    pub(super) fn add(&mut self, window: &Histogram) {
        let (offset, counts) = window.contiguous();
        let start = usize::try_from(offset.saturating_sub(MIN_OTEL_INDEX)).unwrap_or(0);
        if !counts.is_empty() {
            self.cover(start, counts.len());
        }
        let first = usize::from(self.first);
        for (position, count) in (start..).zip(counts) {
            let mut count = count.checked_shr(self.halvings.into()).unwrap_or(0);
            while count.saturating_add(self.counts[position - first].into()) > u64::from(u16::MAX) {
                self.halve();
                count >>= 1;
            }
            // Checked by the loop.
            self.counts[position - first] += count as u16;
        }
        let outside = |count: u64| {
            u32::try_from(count.checked_shr(self.halvings.into()).unwrap_or(0)).unwrap_or(u32::MAX / 4)
        };
        let (under, over) = (outside(window.underflow()), outside(window.overflow()));
        self.under = self.under.saturating_add(under);
        self.over = self.over.saturating_add(over);
        while self.under.max(self.over) > u32::MAX / 4 {
            self.halve();
        }
    }

    /// Sets the marks, as far as enough is known. A mark with nothing but the overflow above it is none.
    pub(super) fn marks(&self) -> Marks {
        let inside: u32 = self.counts.iter().map(|count| u32::from(*count)).sum();
        let total = self.under + inside + self.over;
        let mut marks = Marks::default();
        if total < ENOUGH {
            return marks;
        }
        for (q, ppm) in QUANTILE_PPM.into_iter().enumerate() {
            // The rank of the quantile, from 1.
            let rank = (u64::from(total) * u64::from(ppm)).div_ceil(1_000_000);
            let mut seen = u64::from(self.under);
            if seen >= rank {
                continue;
            }
            let found = self.counts.iter().zip(self.first..).find(|(count, _)| {
                seen += u64::from(**count);
                seen >= rank
            });
            if let Some((_, position)) = found {
                marks.positions[q] = position;
                marks.shares[q] = TailTest::share(u64::from(total) - seen, total.into());
            }
        }
        marks
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.counts.len() * size_of::<u16>()
    }

    fn halve(&mut self) {
        self.halvings += 1;
        for count in &mut *self.counts {
            *count /= 2;
        }
        self.under /= 2;
        self.over /= 2;
    }

    /// Makes room for `len` counts from `start`.
    fn cover(&mut self, start: usize, len: usize) {
        let old = usize::from(self.first)..usize::from(self.first) + self.counts.len();
        if self.counts.is_empty() {
            self.counts = vec![0; len].into();
            self.first = start as u16;
        } else if start < old.start || start + len > old.end {
            let new = start.min(old.start)..(start + len).max(old.end);
            let mut counts = Vec::with_capacity(new.len());
            counts.resize(old.start - new.start, 0);
            counts.extend_from_slice(&self.counts);
            counts.resize(new.len(), 0);
            self.counts = counts.into();
            self.first = new.start as u16;
        }
    }
}

impl Marks {
    /// Whether all marks are in the range of latencies.
    pub(super) fn is_sound(&self) -> bool {
        let is_mark = |position: &u16| *position == NONE || usize::from(*position) < BUCKETS;
        self.positions.iter().all(is_mark)
    }

    /// Whether there is any.
    pub(super) fn is_set(&self) -> bool {
        self.positions.iter().any(|position| *position != NONE)
    }

    /// The share of the baseline above the mark of quantile `q`.
    pub(super) fn share(&self, q: usize) -> Option<Share> {
        (self.positions[q] != NONE).then_some(self.shares[q])
    }

    /// The baseline's mark and, `margin` buckets higher, the canary's, in nanoseconds. None where a mark is missing or
    /// out of the histogram's range.
    pub(super) fn limits_ns(&self, q: usize, margin: u32) -> Option<(u64, u64)> {
        let bound = |position: u32| upper_bound_ns(i32::try_from(position).ok()? + MIN_OTEL_INDEX);
        let position = u32::from(self.positions[q]);
        if position == u32::from(NONE) {
            return None;
        }
        Some((bound(position)?, bound(position.checked_add(margin)?)?))
    }

    /// Counts both arms' requests against the marks.
    pub(super) fn count(&self, canary: &Histogram, baseline: &Histogram, margin: u32) -> TailCounts {
        let small = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let mut counts = TailCounts {
            canary: small(canary.count()),
            baseline: small(baseline.count()),
            ..TailCounts::default()
        };
        for q in 0..QUANTILES {
            if let Some((tau, with_margin)) = self.limits_ns(q, margin) {
                counts.canary_over[q] = small(canary.count_above(with_margin).at_least);
                counts.baseline_over[q] = small(baseline.count_above(tau).at_least);
            }
        }
        counts
    }
}

const _: () = assert!(BUCKETS < u16::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(values: impl IntoIterator<Item = (u64, u64)>) -> Histogram {
        let mut histogram = Histogram::new();
        for (ms, count) in values {
            (0..count).for_each(|_| histogram.record(ms * 1_000_000));
        }
        histogram
    }

    #[test]
    fn marks_are_the_upper_bounds_of_the_quantiles_buckets() {
        let mut past = Past::default();
        assert!(!past.marks().is_set());
        past.add(&histogram([(10, 10)]));
        assert!(!past.marks().is_set(), "ten requests are not enough");
        past.add(&histogram((1..=100).map(|ms| (ms, 1))));
        let marks = past.marks();
        for (q, ms) in [(0, 46), (1, 89), (2, 99)] {
            let (tau, with_margin) = marks.limits_ns(q, 2).unwrap();
            assert!((ms * 1_000_000..ms * 1_045_000).contains(&tau), "{q}: {tau}");
            let ratio = with_margin * 10_000 / tau;
            assert!((10_904..10_906).contains(&ratio), "{ratio}");
        }
        let counts = marks.count(
            &histogram([(48, 7), (60, 5), (200, 3)]),
            &histogram([(48, 7), (60, 5)]),
            2,
        );
        assert_eq!((counts.canary, counts.baseline), (15, 12));
        assert_eq!(counts.canary_over, [8, 3, 3]);
        assert_eq!(counts.baseline_over, [12, 0, 0]);
    }

    #[test]
    fn full_buckets_halve_all_and_keep_the_shape() {
        let mut past = Past::default();
        let window = histogram([(10, 9_000), (20, 1_000)]);
        for _ in 0..100 {
            past.add(&window);
        }
        assert!(past.halvings > 0);
        let (ten, _) = past.marks().limits_ns(0, 0).unwrap();
        let (twenty, _) = past.marks().limits_ns(2, 0).unwrap();
        assert!(ten < 10_500_000 && (20_000_000..21_000_000).contains(&twenty));
        assert!(past.memory_bytes() < 100);
    }

    #[test]
    fn values_out_of_range_set_no_mark_and_break_nothing() {
        let mut slow = Past::default();
        slow.add(&histogram([(200_000, 30)]));
        assert_eq!(slow.marks(), Marks::default());
        let mut fast = Past::default();
        let mut histogram = Histogram::new();
        (0..30).for_each(|_| histogram.record(5));
        fast.add(&histogram);
        assert!(!fast.marks().is_set());
        let many = Histogram::from_parts(0, &[1 << 47], 1 << 46, 1 << 46, 0).unwrap();
        for _ in 0..3 {
            fast.add(&many);
        }
        assert!(fast.marks().share(0).is_some());
        // A mark at the upper end leaves no room for the margin.
        let mut high = Past::default();
        high.add(&Histogram::from_parts(111, &[30], 0, 0, 0).unwrap());
        assert!(high.marks().limits_ns(0, 0).is_some() && high.marks().limits_ns(0, 1).is_none());
        assert_eq!(high.marks().count(&many, &many, 1).canary_over, [0; 3]);
    }
}
