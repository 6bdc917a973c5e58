//! Converts histograms to OpenTelemetry's and Prometheus' forms and back, without loss.
//!
//! | here | OpenTelemetry exponential histogram | Prometheus native histogram |
//! |---|---|---|
//! | bucket `i` | bucket `i` | bucket `i + 1` |
//! | underflow | zero count, threshold 995 ns | zero bucket, threshold 995 ns |
//! | overflow | bucket 112, just above the range | bucket 113, just above the range |
//!
//! Neither form has a bucket for all that is large, so the overflow is written as if it were just above
//! 128 s, in (128 s, 133.7 s], and a reader of that form sees it there. Reading turns it back, as no
//! value of ours is ever counted there. Reading accepts buckets of any index: what is below the range
//! belongs to the underflow and what is above it to the overflow, and both are exact.
//!
//! Sources: "ExponentialHistogram" in the OpenTelemetry metrics data model
//! (opentelemetry-specification, `specification/metrics/data-model.md`), and "Schema", "Buckets", "Zero
//! bucket" and "OpenTelemetry interoperability" in the Prometheus specification of native histograms
//! (prometheus/docs, `docs/specs/native_histograms.md`).

use super::{DecodeError, Histogram, MAX_COUNT, MIN_OTEL_INDEX, OVERFLOW, SCALE, UPPER_NS};

/// The threshold of the zero bucket, which takes the underflow: the largest value in it, in nanoseconds.
pub const ZERO_THRESHOLD_NS: u64 = UPPER_NS[0];

/// The threshold in seconds for formats that want a float: the double nearest to the boundary `2^(-319/16)`.
///
/// Prometheus asks that the threshold be a boundary of a bucket, and 995 ns in seconds is a little less.
/// No whole number of nanoseconds is between the two.
pub const ZERO_THRESHOLD_SECONDS: f64 = 9.958_970_855_974_329e-7;

/// OpenTelemetry's index of the bucket that carries the overflow.
const OTEL_OVERFLOW: i32 = MIN_OTEL_INDEX - 1 + OVERFLOW as i32;

/// How much higher than OpenTelemetry Prometheus numbers the same bucket.
const PROMETHEUS_SHIFT: i32 = 1;

/// The most empty buckets in a row that are written as such; a new span would take more bytes.
const MAX_FILLED_GAP: i32 = 2;

/// A data point of OpenTelemetry's `ExponentialHistogram`, with durations in whole nanoseconds.
///
/// `bucket_counts` are the positive buckets; there are no negative ones. In OTLP the sum and the
/// threshold are doubles in seconds: see [`ZERO_THRESHOLD_SECONDS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtelExponentialHistogram {
    /// Buckets have the ratio `2^(2^-scale)`.
    pub scale: i32,
    /// Values at or below the threshold.
    pub zero_count: u64,
    /// The largest value, in nanoseconds, that counts as zero.
    pub zero_threshold_ns: u64,
    /// Index of the first of the buckets.
    pub offset: i32,
    /// Counts of consecutive buckets.
    pub bucket_counts: Vec<u64>,
    /// All values, those that count as zero included.
    pub count: u64,
    /// The sum of all values, in nanoseconds.
    pub sum_ns: u64,
}

/// A native histogram of Prometheus with integer counts, with durations in whole nanoseconds.
///
/// There are no negative buckets. On exposition the sum and the threshold are doubles in seconds: see
/// [`ZERO_THRESHOLD_SECONDS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrometheusNativeHistogram {
    /// Buckets have the ratio `2^(2^-schema)`.
    pub schema: i32,
    /// Values at or below the threshold.
    pub zero_count: u64,
    /// The largest value, in nanoseconds, that counts as zero.
    pub zero_threshold_ns: u64,
    /// Where the positive buckets are.
    pub positive_spans: Vec<Span>,
    /// The count of each bucket, less that of the bucket written before it.
    pub positive_deltas: Vec<i64>,
    /// All values, those that count as zero included.
    pub count: u64,
    /// The sum of all values, in nanoseconds.
    pub sum_ns: u64,
}

/// Some consecutive buckets of a [`PrometheusNativeHistogram`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// For the first span the index of its first bucket, for others the number of buckets left out before it.
    pub offset: i32,
    /// How many buckets there are.
    pub length: u32,
}

impl Histogram {
    /// Converts to OpenTelemetry's exponential histogram of scale 4.
    pub fn to_otel(&self) -> OtelExponentialHistogram {
        let (mut offset, counts) = self.contiguous();
        let mut bucket_counts = counts.to_vec();
        if self.overflow > 0 {
            if counts.is_empty() {
                offset = OTEL_OVERFLOW;
            }
            bucket_counts.resize(OTEL_OVERFLOW.abs_diff(offset) as usize, 0);
            bucket_counts.push(self.overflow);
        }
        OtelExponentialHistogram {
            scale: SCALE,
            zero_count: self.underflow,
            zero_threshold_ns: ZERO_THRESHOLD_NS,
            offset,
            bucket_counts,
            count: self.count,
            sum_ns: self.sum_ns,
        }
    }

    /// Reads OpenTelemetry's exponential histogram; refuses another scale and what would lose values.
    pub fn from_otel(otel: &OtelExponentialHistogram) -> Result<Self, DecodeError> {
        check_scale(otel.scale)?;
        let mut new = Self::of_zero_bucket(otel.zero_count, otel.zero_threshold_ns, otel.sum_ns)?;
        let indices = i64::from(otel.offset)..;
        for (index, &count) in indices.zip(&otel.bucket_counts) {
            new.add_bucket(index, count);
        }
        new.check_total(otel.count)
    }

    /// Converts to Prometheus' native histogram of schema 4.
    ///
    /// A count above `i64::MAX`, which the form cannot hold, becomes that.
    pub fn to_prometheus(&self) -> PrometheusNativeHistogram {
        let overflow = Some((OTEL_OVERFLOW, self.overflow)).filter(|(_, count)| *count > 0);
        let (positive_spans, positive_deltas) = spans(
            self.buckets()
                .chain(overflow)
                .map(|(index, count)| (index + PROMETHEUS_SHIFT, count)),
        );
        PrometheusNativeHistogram {
            schema: SCALE,
            zero_count: self.underflow,
            zero_threshold_ns: ZERO_THRESHOLD_NS,
            positive_spans,
            positive_deltas,
            count: self.count,
            sum_ns: self.sum_ns,
        }
    }

    /// Reads Prometheus' native histogram; refuses another schema, what would lose values and bad spans.
    pub fn from_prometheus(native: &PrometheusNativeHistogram) -> Result<Self, DecodeError> {
        check_scale(native.schema)?;
        check_spans(native)?;
        let mut new = Self::of_zero_bucket(native.zero_count, native.zero_threshold_ns, native.sum_ns)?;
        let mut deltas = native.positive_deltas.iter();
        let mut index = -i64::from(PROMETHEUS_SHIFT);
        let mut count = 0_i64;
        for span in &native.positive_spans {
            index += i64::from(span.offset);
            for delta in deltas.by_ref().take(span.length as usize) {
                count = count.checked_add(*delta).ok_or(DecodeError::BadDelta)?;
                new.add_bucket(index, u64::try_from(count).map_err(|_| DecodeError::BadDelta)?);
                index += 1;
            }
        }
        new.check_total(native.count)
    }

    fn of_zero_bucket(count: u64, threshold_ns: u64, sum_ns: u64) -> Result<Self, DecodeError> {
        if count > 0 && threshold_ns > ZERO_THRESHOLD_NS {
            return Err(DecodeError::ZeroThreshold(threshold_ns));
        }
        Ok(Self {
            underflow: count,
            count,
            sum_ns,
            ..Self::new()
        })
    }

    /// Counts in the bucket with this OpenTelemetry index, which may be outside the range.
    fn add_bucket(&mut self, otel_index: i64, count: u64) {
        if count == 0 {
            return;
        }
        let position = (otel_index - i64::from(MIN_OTEL_INDEX - 1)).clamp(0, OVERFLOW as i64);
        self.add_outside(position as usize, count);
        self.count = self.count.saturating_add(count);
    }

    fn check_total(self, declared: u64) -> Result<Self, DecodeError> {
        let found = self.count;
        if found > MAX_COUNT {
            return Err(DecodeError::CountAboveLimit);
        }
        if found != declared {
            return Err(DecodeError::CountMismatch { declared, found });
        }
        Ok(self)
    }
}

fn check_scale(scale: i32) -> Result<(), DecodeError> {
    if scale == SCALE {
        Ok(())
    } else {
        Err(DecodeError::Scale(scale))
    }
}

fn check_spans(native: &PrometheusNativeHistogram) -> Result<(), DecodeError> {
    let spans = &native.positive_spans;
    if let Some(span) = spans.iter().skip(1).find(|span| span.offset < 0) {
        return Err(DecodeError::NegativeGap(span.offset));
    }
    let given = native.positive_deltas.len();
    let spanned = spans.iter().map(|span| u64::from(span.length)).sum();
    if spanned == given as u64 {
        Ok(())
    } else {
        Err(DecodeError::SpanMismatch { spanned, given })
    }
}

/// The spans and deltas of some buckets, whose indices ascend.
fn spans(buckets: impl Iterator<Item = (i32, u64)>) -> (Vec<Span>, Vec<i64>) {
    let mut spans: Vec<Span> = Vec::new();
    let mut deltas = Vec::new();
    let mut last = 0;
    let mut next_index = 0;
    for (index, count) in buckets {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let gap = index - next_index;
        match spans.last_mut() {
            Some(span) if gap <= MAX_FILLED_GAP => {
                for _ in 0..gap {
                    deltas.push(-last);
                    last = 0;
                }
                span.length += gap.unsigned_abs() + 1;
            }
            _ => spans.push(Span {
                offset: gap,
                length: 1,
            }),
        }
        deltas.push(count - last);
        last = count;
        next_index = index + 1;
    }
    (spans, deltas)
}
