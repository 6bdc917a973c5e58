//! Fixes the forms that leave the process, byte by byte, and every way in which one is refused.

use bytes::Bytes;
use coalmine_proto::{
    histogram::{
        Bounds, DecodeError, Histogram, MAX_COUNT, OtelExponentialHistogram, PrometheusNativeHistogram, Span,
    },
    v1,
};
use prost::Message;

/// 1 ms twice, 1 s, what is too small three times and what is too large once.
fn sample() -> Histogram {
    let mut sample = Histogram::new();
    for ns in [1_000_000, 1_000_000, 1_000_000_000, 0, 1, 995, 200_000_000_000] {
        sample.record(ns);
    }
    sample
}

fn message(offset: i32, counts: &[u8]) -> v1::Histogram {
    v1::Histogram {
        offset,
        counts: Bytes::copy_from_slice(counts),
        ..v1::Histogram::default()
    }
}

#[test]
fn a_message_has_these_bytes() {
    let few = Histogram::from_parts(-3, &[1, 0, 300], 4, 0, 5).unwrap();
    let bytes = few.to_wire().encode_to_vec();
    let expected = [
        0x08, 0x05, // offset: -3, zigzag
        0x12, 0x04, 0x01, 0x00, 0xac, 0x02, // counts: 1, 0, 300
        0x18, 0x04, // underflow
        0x28, 0x05, // sum
    ];
    assert_eq!(bytes, expected);
    let decoded = v1::Histogram::decode(&bytes[..]).unwrap();
    assert_eq!(Histogram::from_wire(&decoded), Ok(few));
    assert_eq!(Histogram::new().to_wire(), v1::Histogram::default());
    assert_eq!(
        Histogram::from_wire(&v1::Histogram::default()),
        Ok(Histogram::new())
    );
}

#[test]
fn counts_are_read_up_to_the_limit() {
    let most = MAX_COUNT.to_be_bytes();
    assert_eq!(most, [0, 1, 0, 0, 0, 0, 0, 0]);
    let wire = message(0, &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40]);
    let read = Histogram::from_wire(&wire).unwrap();
    assert_eq!(read.contiguous(), (0, &[MAX_COUNT][..]));
    assert_eq!(read.to_wire(), wire);

    let everywhere = message(-319, &[1; 431]);
    let read = Histogram::from_wire(&everywhere).unwrap();
    assert_eq!(read.count(), 431);
    assert_eq!(read.to_wire(), everywhere);
}

#[test]
fn bad_messages_are_refused_and_change_nothing() {
    use DecodeError::*;
    let out_of_range = |offset, counts| OutOfRange { offset, counts };
    let ten = |last: u8| [&[0xff; 9][..], &[last]].concat();
    let cases = [
        (
            "too many short counts",
            message(-319, &[0; 432]),
            TooManyCounts(432),
        ),
        (
            "too many long counts",
            message(-319, &[0x80, 0x01].repeat(432)),
            TooManyCounts(432),
        ),
        ("below the range", message(-320, &[1]), out_of_range(-320, 1)),
        (
            "far below the range",
            message(i32::MIN, &[1]),
            out_of_range(i32::MIN, 1),
        ),
        ("above the range", message(112, &[1]), out_of_range(112, 1)),
        (
            "far above the range",
            message(i32::MAX, &[0, 0]),
            out_of_range(i32::MAX, 2),
        ),
        ("past the end", message(111, &[1, 0]), out_of_range(111, 2)),
        (
            "long, past the end",
            message(110, &[1, 0x80, 0x01, 1]),
            out_of_range(110, 3),
        ),
        ("cut off", message(0, &[0x80]), TruncatedVarint),
        ("cut off later", message(0, &[1, 2, 0xff, 0xff]), TruncatedVarint),
        ("needless byte", message(0, &[0x80, 0x00]), OverlongVarint),
        (
            "needless third byte",
            message(0, &[0x81, 0x80, 0x00, 1]),
            OverlongVarint,
        ),
        ("65 bits", message(0, &ten(0x02)), OverlongVarint),
        (
            "eleven bytes",
            message(0, &[&[0x80; 10][..], &[1]].concat()),
            OverlongVarint,
        ),
        ("no end for long", message(0, &[0x80; 50]), OverlongVarint),
        ("64 bits", message(0, &ten(0x01)), CountAboveLimit),
        (
            "2^48 + 1",
            message(0, &[0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40]),
            CountAboveLimit,
        ),
        (
            "2^48 and 1",
            message(0, &[1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40]),
            CountAboveLimit,
        ),
        (
            "underflow",
            v1::Histogram {
                underflow: MAX_COUNT + 1,
                ..message(0, &[])
            },
            CountAboveLimit,
        ),
        (
            "overflow",
            v1::Histogram {
                overflow: u64::MAX,
                underflow: u64::MAX,
                ..message(0, &[1])
            },
            CountAboveLimit,
        ),
    ];
    for (what, wire, error) in cases {
        assert_eq!(Histogram::from_wire(&wire), Err(error), "{what}");
        let mut changed = sample();
        assert_eq!(changed.merge_wire(&wire), Err(error), "{what}");
        assert_eq!(changed, sample(), "{what}");
    }
}

#[test]
fn merging_messages_stays_within_what_can_be_read_again() {
    let mut full = Histogram::from_parts(0, &[MAX_COUNT - 1], 0, 0, u64::MAX - 1).unwrap();
    let one = v1::Histogram {
        sum_ns: 1,
        ..message(0, &[1])
    };
    let two = message(0, &[2]);
    assert_eq!(full.merge_wire(&two), Err(DecodeError::CountAboveLimit));
    full.merge_wire(&one).unwrap();
    let only_sum = v1::Histogram {
        sum_ns: 1,
        ..message(0, &[])
    };
    assert_eq!(full.merge_wire(&only_sum), Err(DecodeError::SumOverflow));
    assert_eq!(full.contiguous(), (0, &[MAX_COUNT][..]));
    assert_eq!(full.sum_ns(), u64::MAX);
    assert_eq!(Histogram::from_wire(&full.to_wire()), Ok(full));
}

#[test]
fn parts_have_the_same_limits() {
    let parts = |offset, counts: &[u64]| Histogram::from_parts(offset, counts, 0, 0, 0);
    assert_eq!(
        parts(-320, &[1]),
        Err(DecodeError::OutOfRange {
            offset: -320,
            counts: 1
        })
    );
    assert_eq!(
        parts(112, &[0]),
        Err(DecodeError::OutOfRange {
            offset: 112,
            counts: 1
        })
    );
    assert_eq!(parts(0, &[0; 432]), Err(DecodeError::TooManyCounts(432)));
    assert_eq!(parts(0, &[u64::MAX, 2]), Err(DecodeError::CountAboveLimit));
    assert_eq!(parts(i32::MAX, &[]), Ok(Histogram::new()));
}

#[test]
fn errors_say_what_is_wrong_and_what_is_allowed() {
    let cases = [
        (
            DecodeError::TooManyCounts(500),
            "500 counts are given; at most 431 are allowed",
        ),
        (
            DecodeError::OutOfRange {
                offset: 111,
                counts: 2,
            },
            "2 counts from bucket 111 on leave the range, 431 buckets from -319 on",
        ),
        (
            DecodeError::CountAboveLimit,
            "counts more than 281474976710656 values",
        ),
        (
            DecodeError::Scale(3),
            "the scale is 3; only 4 can be read without loss",
        ),
    ];
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_midpoint_is_between_its_bounds() {
    let cases = [
        (0, 0, 0),
        (0, 995, 0),
        (995, 1039, 1016),
        (1_000_000_000, 1_044_273_782, 1_021_657_462),
        (128_000_000_000, u64::MAX, 255_999_998_223),
        (u64::MAX, u64::MAX, u64::MAX),
    ];
    for (lower_ns, upper_ns, midpoint) in cases {
        assert_eq!(
            Bounds { lower_ns, upper_ns }.midpoint_ns(),
            midpoint,
            "{lower_ns} {upper_ns}"
        );
    }
}

#[test]
fn the_otel_form_is_dense_and_carries_the_overflow_above_the_range() {
    let otel = sample().to_otel();
    assert_eq!((otel.scale, otel.offset, otel.count), (4, -160, 7));
    assert_eq!((otel.zero_count, otel.zero_threshold_ns), (3, 995));
    assert_eq!(otel.sum_ns, 201_002_000_996);
    // From bucket -160, which has 1 ms, to 112; 1 s is the upper bound of bucket -1.
    assert_eq!(otel.bucket_counts.len(), 273);
    assert_eq!(otel.bucket_counts[0], 2);
    assert_eq!(otel.bucket_counts[159], 1);
    assert_eq!(otel.bucket_counts[272], 1);
    assert_eq!(Histogram::from_otel(&otel), Ok(sample()));

    let only_overflow = Histogram::from_parts(0, &[], 0, 9, 0).unwrap().to_otel();
    assert_eq!(
        (only_overflow.offset, only_overflow.bucket_counts),
        (112, vec![9])
    );
    assert_eq!(Histogram::new().to_otel().bucket_counts, Vec::<u64>::new());
}

#[test]
fn the_prometheus_form_is_sparse_and_carries_the_overflow_above_the_range() {
    let native = sample().to_prometheus();
    assert_eq!((native.schema, native.count), (4, 7));
    assert_eq!((native.zero_count, native.zero_threshold_ns), (3, 995));
    let span = |offset, length| Span { offset, length };
    // Buckets -159, 0 and 113.
    assert_eq!(native.positive_spans, [span(-159, 1), span(158, 1), span(112, 1)]);
    assert_eq!(native.positive_deltas, [2, -1, 0]);
    assert_eq!(Histogram::from_prometheus(&native), Ok(sample()));
}

#[test]
fn the_example_of_the_prometheus_specification_reads_and_writes() {
    // -2: 3, -1: 5, 2: 1, 4: 3, 5: 2. The specification writes the gap of two as a span and the gap of
    // one as an empty bucket, in its second form; we write both as empty buckets, its third form.
    let of = |positive_spans, positive_deltas| PrometheusNativeHistogram {
        schema: 4,
        zero_count: 0,
        zero_threshold_ns: 995,
        positive_spans,
        positive_deltas,
        count: 14,
        sum_ns: 0,
    };
    let span = |offset, length| Span { offset, length };
    let first = of(vec![span(-2, 2), span(2, 1), span(1, 2)], vec![3, 2, -4, 2, -1]);
    let second = of(vec![span(-2, 2), span(2, 4)], vec![3, 2, -4, -1, 3, -1]);
    let third = of(vec![span(-2, 8)], vec![3, 2, -5, 0, 1, -1, 3, -1]);
    let expected = Histogram::from_parts(-3, &[3, 5, 0, 0, 1, 0, 3, 2], 0, 0, 0).unwrap();
    for form in [&first, &second, &third] {
        assert_eq!(Histogram::from_prometheus(form), Ok(expected.clone()));
    }
    assert_eq!(expected.to_prometheus(), third);
}

#[test]
fn buckets_outside_the_range_belong_to_its_ends() {
    let otel = OtelExponentialHistogram {
        offset: -321,
        bucket_counts: vec![1, 2, 4],
        count: 10,
        ..sample().to_otel()
    };
    let read = Histogram::from_otel(&otel).unwrap();
    assert_eq!((read.underflow(), read.contiguous()), (6, (-319, &[4][..])));

    for offset in [112, 5000, i32::MAX] {
        let otel = OtelExponentialHistogram {
            offset,
            ..otel.clone()
        };
        assert_eq!(Histogram::from_otel(&otel).unwrap().overflow(), 7);
    }
}

#[test]
fn other_histograms_are_refused() {
    use DecodeError::*;
    let good = sample().to_otel();
    let change = |change: fn(&mut OtelExponentialHistogram)| {
        let mut bad = good.clone();
        change(&mut bad);
        Histogram::from_otel(&bad)
    };
    assert_eq!(change(|bad| bad.scale = 3), Err(Scale(3)));
    assert_eq!(change(|bad| bad.zero_threshold_ns = 996), Err(ZeroThreshold(996)));
    assert_eq!(
        change(|bad| bad.count = 8),
        Err(CountMismatch {
            declared: 8,
            found: 7
        })
    );
    assert_eq!(change(|bad| bad.zero_count = u64::MAX), Err(CountAboveLimit));
    assert_eq!(change(|bad| bad.zero_threshold_ns = 0), Ok(sample()));

    let good = sample().to_prometheus();
    let change = |change: fn(&mut PrometheusNativeHistogram)| {
        let mut bad = good.clone();
        change(&mut bad);
        Histogram::from_prometheus(&bad)
    };
    assert_eq!(change(|bad| bad.schema = -53), Err(Scale(-53)));
    assert_eq!(
        change(|bad| bad.zero_threshold_ns = 2000),
        Err(ZeroThreshold(2000))
    );
    assert_eq!(
        change(|bad| bad.count = 0),
        Err(CountMismatch {
            declared: 0,
            found: 7
        })
    );
    assert_eq!(
        change(|bad| bad.positive_spans[1].offset = -1),
        Err(NegativeGap(-1))
    );
    assert_eq!(
        change(|bad| bad.positive_spans[0].length = u32::MAX),
        Err(SpanMismatch {
            spanned: u64::from(u32::MAX) + 2,
            given: 3
        })
    );
    assert_eq!(
        change(|bad| bad.positive_deltas.push(1)),
        Err(SpanMismatch { spanned: 3, given: 4 })
    );
    assert_eq!(change(|bad| bad.positive_deltas[1] = -3), Err(BadDelta));
    assert_eq!(change(|bad| bad.positive_deltas[1] = i64::MAX), Err(BadDelta));
    assert_eq!(
        change(|bad| bad.positive_deltas[0] = i64::MAX - 5),
        Err(CountAboveLimit)
    );
}
