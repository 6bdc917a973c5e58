//! Carries histograms in messages.
//!
//! Messages come from the network, so everything in them is checked before anything is changed.

use super::{BUCKETS, Histogram, MAX_COUNT, MIN_OTEL_INDEX, SCALE, ZERO_THRESHOLD_NS};
use crate::v1;

/// Bit of a varint's byte that says that another byte follows.
const MORE: u8 = 0x80;

/// Bytes of the longest varint of 64 bits.
const MAX_VARINT_BYTES: usize = 10;

/// Why a histogram is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There are more counts than buckets.
    #[error("{0} counts are given; at most {BUCKETS} are allowed")]
    TooManyCounts(usize),
    /// The counts begin below the lowest bucket or end above the highest.
    #[error(
        "{counts} counts from bucket {offset} on leave the range, {BUCKETS} buckets from {MIN_OTEL_INDEX} on"
    )]
    OutOfRange {
        /// OpenTelemetry index of the first count.
        offset: i32,
        /// How many counts there are.
        counts: usize,
    },
    /// The histogram, alone or with what it is merged into, counts more than [`MAX_COUNT`] values.
    #[error("counts more than {MAX_COUNT} values")]
    CountAboveLimit,
    /// The sum, with that of what it is merged into, does not fit into 64 bits.
    #[error("the sum of nanoseconds does not fit into 64 bits")]
    SumOverflow,
    /// The bytes end within a count.
    #[error("the last count is cut off")]
    TruncatedVarint,
    /// A count has more bytes than its value needs, or than 64 bits need.
    #[error("a count has more bytes than its value needs, or more than 64 bits")]
    OverlongVarint,
    /// The scale or schema is another.
    #[error("the scale is {0}; only {SCALE} can be read without loss")]
    Scale(i32),
    /// Values in the zero bucket may belong into a bucket.
    #[error("the zero threshold is {0} ns; at most {ZERO_THRESHOLD_NS} can be read without loss")]
    ZeroThreshold(u64),
    /// The total is not what the buckets add up to.
    #[error("{declared} values are declared, but the buckets count {found}")]
    CountMismatch {
        /// The total that is declared.
        declared: u64,
        /// The sum over all buckets.
        found: u64,
    },
    /// The spans describe more or fewer buckets than there are.
    #[error("the spans describe {spanned} buckets, but {given} are given")]
    SpanMismatch {
        /// The sum of the lengths of the spans.
        spanned: u64,
        /// How many deltas there are.
        given: usize,
    },
    /// A span other than the first lies behind the end of the one before it.
    #[error("a span after the first has the negative offset {0}")]
    NegativeGap(i32),
    /// The deltas add up to less than nothing, or to more than 63 bits.
    #[error("the deltas add up to a count below 0 or above 63 bits")]
    BadDelta,
}

impl Histogram {
    /// Writes the histogram into a message, in the one form that it has there.
    ///
    /// What counts more than [`MAX_COUNT`] values can be written, but not read.
    pub fn to_wire(&self) -> v1::Histogram {
        let (offset, counts) = self.contiguous();
        let bytes: Vec<u8> = if counts.iter().all(|count| *count < u64::from(MORE)) {
            counts.iter().map(|count| *count as u8).collect()
        } else {
            let len = counts.iter().map(|count| varint_bytes(*count)).sum();
            let mut bytes = Vec::with_capacity(len);
            counts.iter().for_each(|count| push_varint(&mut bytes, *count));
            bytes
        };
        v1::Histogram {
            offset,
            counts: bytes.into(),
            underflow: self.underflow,
            overflow: self.overflow,
            sum_ns: self.sum_ns,
        }
    }

    /// Reads a histogram from a message.
    pub fn from_wire(wire: &v1::Histogram) -> Result<Self, DecodeError> {
        let mut new = Self::new();
        new.merge_wire(wire)?;
        Ok(new)
    }

    /// Adds the histogram in a message, without building it first. On an error nothing is changed.
    ///
    /// Unlike [`Histogram::merge`] it refuses what would pass [`MAX_COUNT`] or a sum of 64 bits, so that
    /// what was merged from messages can be written and read again.
    pub fn merge_wire(&mut self, wire: &v1::Histogram) -> Result<(), DecodeError> {
        let bytes: &[u8] = &wire.counts;
        let all_short = bytes.iter().fold(0, |bits, byte| bits | byte) < MORE;
        let len = if all_short {
            bytes.len()
        } else {
            bytes.iter().filter(|byte| **byte < MORE).count()
        };
        let start = start_of_run(wire.offset, len)?;

        let in_run = if all_short {
            u64::from(sum_of_short(bytes))
        } else {
            Varints(bytes).try_fold(0, |sum: u64, count| Ok(sum.saturating_add(count?)))?
        };
        self.admit(in_run, wire.underflow, wire.overflow, wire.sum_ns)?;
        if len == 0 {
            return Ok(());
        }

        // Nothing is refused from here on, and no count wraps: none is above the whole, which fits.
        let run = self.cover(start, len).iter_mut();
        if all_short {
            run.zip(bytes)
                .for_each(|(count, byte)| *count = count.wrapping_add(u64::from(*byte)));
        } else {
            run.zip(Varints(bytes).flatten())
                .for_each(|(count, added)| *count = count.wrapping_add(added));
        }
        Ok(())
    }

    /// Adds everything but the buckets, of which there are `in_run` values, or refuses and changes nothing.
    ///
    /// Afterwards adding to a bucket cannot overflow: no bucket counts more than the whole.
    pub(super) fn admit(
        &mut self,
        in_run: u64,
        underflow: u64,
        overflow: u64,
        sum_ns: u64,
    ) -> Result<(), DecodeError> {
        let count = [in_run, underflow, overflow]
            .into_iter()
            .fold(self.count, u64::saturating_add);
        if count > MAX_COUNT {
            return Err(DecodeError::CountAboveLimit);
        }
        self.sum_ns = self.sum_ns.checked_add(sum_ns).ok_or(DecodeError::SumOverflow)?;
        self.count = count;
        self.underflow += underflow;
        self.overflow += overflow;
        Ok(())
    }
}

/// The position of the first of `len` counts; all of them must be buckets.
pub(super) fn start_of_run(offset: i32, len: usize) -> Result<usize, DecodeError> {
    if len > BUCKETS {
        return Err(DecodeError::TooManyCounts(len));
    }
    if len == 0 {
        return Ok(1);
    }
    let skipped = i64::from(offset) - i64::from(MIN_OTEL_INDEX);
    match usize::try_from(skipped) {
        Ok(skipped) if skipped <= BUCKETS - len => Ok(skipped + 1),
        _ => Err(DecodeError::OutOfRange { offset, counts: len }),
    }
}

/// The sum of at most [`BUCKETS`] varints of one byte, which fits into 16 bits.
///
/// Never checking for overflow, and in the narrowest type, it takes eight counts in one instruction.
fn sum_of_short(bytes: &[u8]) -> u16 {
    const { assert!(BUCKETS * (MORE as usize - 1) <= u16::MAX as usize) };
    bytes
        .iter()
        .fold(0, |sum: u16, byte| sum.wrapping_add(u16::from(*byte)))
}

/// The varints in some bytes.
struct Varints<'a>(&'a [u8]);

impl Iterator for Varints<'_> {
    type Item = Result<u64, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (value, rest) = match *self.0 {
            [] => return None,
            [only, ref rest @ ..] if only < MORE => (u64::from(only), rest),
            [low, high, ref rest @ ..] if high < MORE && high > 0 => {
                (u64::from(low & !MORE) | u64::from(high) << 7, rest)
            }
            _ => match long_varint(self.0) {
                Ok(read) => read,
                Err(error) => {
                    self.0 = &[];
                    return Some(Err(error));
                }
            },
        };
        self.0 = rest;
        Some(Ok(value))
    }
}

#[cold]
fn long_varint(bytes: &[u8]) -> Result<(u64, &[u8]), DecodeError> {
    let mut value = 0;
    for (place, &byte) in bytes.iter().enumerate().take(MAX_VARINT_BYTES) {
        value |= u64::from(byte & !MORE) << (7 * place);
        if byte < MORE {
            let past_64_bits = place == MAX_VARINT_BYTES - 1 && byte > 1;
            let needless = place > 0 && byte == 0;
            if past_64_bits || needless {
                return Err(DecodeError::OverlongVarint);
            }
            return Ok((value, &bytes[place + 1..]));
        }
    }
    Err(if bytes.len() < MAX_VARINT_BYTES {
        DecodeError::TruncatedVarint
    } else {
        DecodeError::OverlongVarint
    })
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= u64::from(MORE) {
        bytes.push(value as u8 | MORE);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// How many bytes a value has as a varint.
fn varint_bytes(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}
