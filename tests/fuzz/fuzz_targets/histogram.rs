//! Histograms from messages, two with their lengths before them: what is accepted is exact in all forms.

#![no_main]

use coalmine_proto::{
    histogram::{Bounds, Histogram, MAX_COUNT},
    v1,
};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fn check(histogram: &Histogram) {
    assert_eq!(Histogram::from_wire(&histogram.to_wire()).as_ref(), Ok(histogram));
    let (offset, counts) = histogram.contiguous();
    let parts = Histogram::from_parts(
        offset,
        counts,
        histogram.underflow(),
        histogram.overflow(),
        histogram.sum_ns(),
    );
    assert_eq!(parts.as_ref(), Ok(histogram));
    assert_eq!(Histogram::from_otel(&histogram.to_otel()).as_ref(), Ok(histogram));
    assert_eq!(
        Histogram::from_prometheus(&histogram.to_prometheus()).as_ref(),
        Ok(histogram)
    );
    let inside: u64 = histogram.buckets().map(|(_, count)| count).sum();
    assert_eq!(
        inside + histogram.underflow() + histogram.overflow(),
        histogram.count()
    );
    assert!(histogram.count() <= MAX_COUNT);
    for limit in [0, 995, 1_000_000, histogram.sum_ns(), u64::MAX] {
        let above = histogram.count_above(limit);
        assert!(above.at_least <= above.at_most && above.at_most <= histogram.count());
    }
    for q_ppm in [0, 500_000, 990_000, 1_000_000] {
        let bounds = histogram.quantile(q_ppm);
        assert_eq!(bounds.is_none(), histogram.is_empty());
        let inside = |bounds: Bounds| (bounds.lower_ns..=bounds.upper_ns).contains(&bounds.midpoint_ns());
        assert!(bounds.is_none_or(inside));
    }
}

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    let read = |rest: &mut &[u8]| {
        let wire = v1::Histogram::decode_length_delimited(rest).ok()?;
        let histogram = Histogram::from_wire(&wire).ok()?;
        check(&histogram);
        Some((wire, histogram))
    };
    let (Some((_, first)), Some((wire, second))) = (read(&mut rest), read(&mut rest)) else {
        return;
    };
    let mut sum = first.clone();
    sum.merge(&second);
    let mut other = second.clone();
    other.merge(&first);
    assert_eq!(sum, other);
    let mut direct = first.clone();
    match direct.merge_wire(&wire) {
        Ok(()) => {
            assert_eq!(direct, sum);
            check(&sum);
        }
        Err(_) => assert_eq!(direct, first),
    }
});
