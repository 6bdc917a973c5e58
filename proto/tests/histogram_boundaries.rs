//! Proves every bucket boundary with exact integers, and the index at and around each of them.

use coalmine_proto::histogram::{
    BUCKETS, Bounds, Histogram, MIN_OTEL_INDEX, SCALE, ZERO_THRESHOLD_NS, ZERO_THRESHOLD_SECONDS,
    upper_bound_ns,
};
use num_bigint::BigUint;

const NANOS: u64 = 1_000_000_000;

/// The boundaries as the crate has them: the lower end of the range, then each bucket's upper bound.
/// The first is above OpenTelemetry's bucket -320, so it is 2^(-319/16) s.
fn boundaries() -> Vec<(i32, u64)> {
    let upper =
        (MIN_OTEL_INDEX..).map_while(|otel_index| Some((otel_index + 1, upper_bound_ns(otel_index)?)));
    std::iter::once((MIN_OTEL_INDEX, ZERO_THRESHOLD_NS))
        .chain(upper)
        .collect()
}

/// Compares `ns` with `2^(power/16)` s: `ns^16` with `2^power * 10^144`, both times `2^-power` if that is negative.
fn is_at_most_the_power(ns: u64, power: i32) -> bool {
    let value = BigUint::from(ns).pow(16);
    let bound = BigUint::from(NANOS).pow(16);
    match u32::try_from(power) {
        Ok(power) => value <= bound << power,
        Err(_) => value << power.unsigned_abs() <= bound,
    }
}

/// What the histogram says about one value: its bucket, if it is in one, and its bounds.
fn place(ns: u64) -> (Option<i32>, Option<Bounds>) {
    let mut one = Histogram::new();
    one.record(ns);
    let bucket = one.buckets().next().map(|(index, count)| {
        assert_eq!(count, 1);
        index
    });
    assert_eq!(one.count(), 1);
    assert_eq!(one.sum_ns(), ns);
    let outside = one.underflow() + one.overflow();
    assert_eq!(outside, u64::from(bucket.is_none()));
    (bucket, one.quantile(500_000))
}

/// The same from the definition alone: the first power that is not below the value.
fn place_by_definition(ns: u64) -> Option<i32> {
    let range = MIN_OTEL_INDEX..=MIN_OTEL_INDEX + BUCKETS as i32;
    let power = range.clone().find(|power| is_at_most_the_power(ns, *power))?;
    // At most the lower end of the range is the underflow.
    (power > *range.start()).then(|| power - 1)
}

#[test]
fn every_boundary_is_the_power_rounded_down() {
    let boundaries = boundaries();
    assert_eq!(SCALE, 4);
    assert_eq!(boundaries.len(), 432);
    assert_eq!(boundaries[0], (-319, 995));
    assert_eq!(boundaries[319], (0, NANOS));
    assert_eq!(boundaries[431], (112, 128 * NANOS));
    for (power, ns) in boundaries {
        assert!(is_at_most_the_power(ns, power), "2^({power}/16) s");
        assert!(!is_at_most_the_power(ns + 1, power), "2^({power}/16) s");
    }
}

#[test]
fn the_index_is_right_at_every_boundary_and_one_nanosecond_to_each_side() {
    for (power, ns) in boundaries() {
        for value in [ns - 1, ns, ns + 1] {
            let (bucket, bounds) = place(value);
            let bounds = bounds.unwrap();
            assert_eq!(bucket, place_by_definition(value), "{value} ns, 2^({power}/16) s");
            assert!(bounds.lower_ns < value && value <= bounds.upper_ns);
        }
        // The boundary itself belongs below, the next nanosecond above.
        let below = Some(power - 1).filter(|index| *index >= MIN_OTEL_INDEX);
        let above = Some(power).filter(|index| *index < MIN_OTEL_INDEX + BUCKETS as i32);
        assert_eq!(place(ns).0, below);
        assert_eq!(place(ns + 1).0, above);
    }
}

#[test]
fn a_midpoint_is_within_the_stated_error_of_everything_in_its_bucket() {
    for pair in boundaries().windows(2) {
        let (lower_ns, upper_ns) = (pair[0].1, pair[1].1);
        let midpoint = Bounds { lower_ns, upper_ns }.midpoint_ns();
        for sample in [lower_ns + 1, upper_ns] {
            // 2.1658 %, (r - 1) / (r + 1) rounded up, and two nanoseconds.
            let error = u128::from(midpoint.abs_diff(sample));
            assert!(
                error * 1_000_000 <= u128::from(sample) * 21_658 + 2_000_000,
                "{sample} ns"
            );
        }
    }
}

#[test]
fn the_index_is_right_at_powers_of_ten_and_of_two() {
    let tens = (0..20).map(|digits| 10_u64.pow(digits));
    let twos = (0..64).map(|bits| 1_u64 << bits);
    let around = tens.chain(twos).flat_map(|n| [n - 1, n, n + 1]);
    for value in around.chain([u64::MAX - 1, u64::MAX]) {
        assert_eq!(place(value).0, place_by_definition(value), "{value} ns");
    }
}

#[test]
fn what_is_outside_the_range_is_counted_apart() {
    let cases = [
        (0, 1, 0, (0, 995)),
        (1, 1, 0, (0, 995)),
        (995, 1, 0, (0, 995)),
        (996, 0, 0, (995, 1039)),
        (128 * NANOS, 0, 0, (122_573_219_929, 128 * NANOS)),
        (128 * NANOS + 1, 0, 1, (128 * NANOS, u64::MAX)),
        (u64::MAX, 0, 1, (128 * NANOS, u64::MAX)),
    ];
    for (value, underflow, overflow, (lower_ns, upper_ns)) in cases {
        let mut one = Histogram::new();
        one.record(value);
        assert_eq!(
            (one.underflow(), one.overflow()),
            (underflow, overflow),
            "{value}"
        );
        assert_eq!(one.quantile(0), Some(Bounds { lower_ns, upper_ns }), "{value}");
    }
}

#[test]
fn only_indices_in_the_range_have_an_upper_bound() {
    assert_eq!(upper_bound_ns(-319), Some(1039));
    assert_eq!(upper_bound_ns(-1), Some(NANOS));
    assert_eq!(upper_bound_ns(111), Some(128 * NANOS));
    for index in [i32::MIN, -321, -320, 112, 113, i32::MAX] {
        assert_eq!(upper_bound_ns(index), None, "{index}");
    }
}

#[test]
fn the_zero_threshold_in_seconds_is_the_double_nearest_to_the_boundary() {
    // The doubles halfway to either side enclose 2^(-319/16): (m * 2^e)^16 * 2^319 against 1.
    let bits = ZERO_THRESHOLD_SECONDS.to_bits();
    let mantissa = BigUint::from(bits & ((1 << 52) - 1) | 1 << 52);
    let exponent = (bits >> 52) as u32;
    // One half in the last place: twice the mantissa plus or minus one, with an exponent one lower.
    let shift = 16 * (1023 + 52 + 1 - exponent) - 319;
    let one = BigUint::from(1_u32);
    assert!((&mantissa * 2_u32 - &one).pow(16) < &one << shift);
    assert!((&mantissa * 2_u32 + &one).pow(16) > &one << shift);
}
