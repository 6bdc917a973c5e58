//! Checks what must hold for all histograms, on random ones.

use bytes::Bytes;
use coalmine_proto::{
    histogram::{BUCKETS, Histogram, MAX_COUNT, MIN_OTEL_INDEX},
    v1,
};
use proptest::{collection::vec, prelude::*};

/// Latencies of all sizes: any magnitude, what requests take, and the ends.
fn latency() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u32..64, any::<u64>()).prop_map(|(shift, bits)| bits >> shift),
        4 => 900_u64..140_000_000_000,
        4 => 1_000_000_u64..2_000_000,
        1 => prop::sample::select(vec![0, 995, 996, 128_000_000_000, 128_000_000_001, u64::MAX]),
    ]
}

fn latencies() -> impl Strategy<Value = Vec<u64>> {
    vec(latency(), 0..200)
}

/// Histograms with counts of all sizes, as an agent might send them.
fn histogram() -> impl Strategy<Value = Histogram> {
    let count = prop_oneof![3 => 0_u64..3, 3 => 0_u64..300, 1 => 0_u64..1 << 39];
    let run = (0..BUCKETS).prop_flat_map(move |skipped| {
        let counts = vec(count.clone(), 0..=(BUCKETS - skipped).min(120));
        (Just(MIN_OTEL_INDEX + skipped as i32), counts)
    });
    let ends = (0_u64..400, 0_u64..400);
    (run, ends, any::<u32>()).prop_filter_map("in the limits", |(run, ends, sum_ns)| {
        Histogram::from_parts(run.0, &run.1, ends.0, ends.1, sum_ns.into()).ok()
    })
}

/// Messages from nowhere, mostly wrong.
fn wild_message() -> impl Strategy<Value = v1::Histogram> {
    let offset = prop_oneof![3 => -330..120, 1 => any::<i32>()];
    let byte = prop_oneof![3 => 0_u8..0x80, 1 => any::<u8>()];
    let counts = prop_oneof![
        vec(byte.clone(), 0..20),
        vec(byte, 0..500),
        vec(any::<u8>(), 0..40)
    ];
    let small = prop_oneof![3 => 0..1000_u64, 1 => any::<u64>()];
    (offset, counts, small.clone(), small, any::<u64>()).prop_map(
        |(offset, counts, underflow, overflow, sum_ns)| v1::Histogram {
            offset,
            counts: Bytes::from(counts),
            underflow,
            overflow,
            sum_ns,
        },
    )
}

/// Messages that were right until a byte of the counts changed.
fn damaged_message() -> impl Strategy<Value = v1::Histogram> {
    (histogram(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(latency, at, byte)| {
        let mut wire = latency.to_wire();
        let mut counts = wire.counts.to_vec();
        if !counts.is_empty() {
            let at = at.index(counts.len());
            counts[at] = byte;
        }
        wire.counts = counts.into();
        wire
    })
}

fn recorded(values: &[u64]) -> Histogram {
    let mut all = Histogram::new();
    values.iter().for_each(|value| all.record(*value));
    all
}

fn merged(a: &Histogram, b: &Histogram) -> Histogram {
    let mut sum = a.clone();
    sum.merge(b);
    sum
}

proptest! {
    #[test]
    fn merging_is_commutative(a in histogram(), b in histogram()) {
        prop_assert_eq!(merged(&a, &b), merged(&b, &a));
    }

    #[test]
    fn merging_is_associative(a in histogram(), b in histogram(), c in histogram()) {
        prop_assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)));
    }

    #[test]
    fn merging_with_nothing_changes_nothing(a in histogram()) {
        prop_assert_eq!(&merged(&a, &Histogram::new()), &a);
        prop_assert_eq!(&merged(&Histogram::new(), &a), &a);
    }

    #[test]
    fn merging_parts_equals_recording_all(parts in vec(latencies(), 0..6)) {
        let mut whole = Histogram::new();
        for part in &parts {
            whole.merge(&recorded(part));
        }
        let all = parts.concat();
        prop_assert_eq!(&whole, &recorded(&all));
        prop_assert_eq!(whole.count(), all.len() as u64);
        prop_assert_eq!(whole.sum_ns(), all.iter().fold(0, |sum: u64, ns| sum.saturating_add(*ns)));
    }

    #[test]
    fn the_order_of_recording_does_not_matter(mut values in latencies()) {
        let forward = recorded(&values);
        values.reverse();
        prop_assert_eq!(forward, recorded(&values));
    }

    #[test]
    fn merging_saturates_and_is_still_associative(
        values in latencies(),
        doublings in 50_u32..66,
        more in histogram(),
    ) {
        let mut a = recorded(&values);
        for _ in 0..doublings {
            a.merge(&a.clone());
        }
        let factor = 1_u128 << doublings;
        let expected = (values.len() as u128 * factor).min(u64::MAX.into());
        prop_assert_eq!(u128::from(a.count()), expected);
        prop_assert_eq!(merged(&merged(&a, &more), &a), merged(&a, &merged(&more, &a)));
        prop_assert_eq!(a.quantile(1_000_000).is_some(), !values.is_empty());
    }

    #[test]
    fn clearing_leaves_an_empty_histogram_and_its_memory(a in latencies(), b in latencies()) {
        let mut reused = recorded(&a);
        let before = reused.memory_bytes();
        reused.clear();
        prop_assert!(reused.is_empty());
        prop_assert_eq!(reused.memory_bytes(), before);
        prop_assert_eq!(&reused, &Histogram::new());
        b.iter().for_each(|value| reused.record(*value));
        prop_assert_eq!(reused, recorded(&b));
    }

    #[test]
    fn a_quantile_encloses_the_sample_of_its_rank(mut values in latencies(), q_ppm in 0_u32..=1_000_000) {
        values.sort_unstable();
        let latency = recorded(&values);
        let Some(bounds) = latency.quantile(q_ppm) else {
            prop_assert!(values.is_empty());
            return Ok(());
        };
        let rank = (values.len() as u64 * u64::from(q_ppm)).div_ceil(1_000_000).max(1);
        let sample = values[rank as usize - 1];
        prop_assert!(bounds.lower_ns < sample || bounds.lower_ns == 0);
        prop_assert!(sample <= bounds.upper_ns);

        // 2.17 % and two nanoseconds, within the range.
        if (996..=128_000_000_000).contains(&sample) {
            let error = u128::from(bounds.midpoint_ns().abs_diff(sample));
            prop_assert!(error * 10_000 <= u128::from(sample) * 217 + 20_000, "{bounds:?} {sample}");
        }
    }

    #[test]
    fn count_above_brackets_the_truth(values in latencies(), limit in latency()) {
        let truth = values.iter().filter(|value| **value > limit).count() as u64;
        let latency = recorded(&values);
        let above = latency.count_above(limit);
        prop_assert!(above.at_least <= truth && truth <= above.at_most, "{above:?}, {truth}");
        // Only one bucket is in doubt, and none when the limit is its upper bound.
        let widest = latency.buckets().map(|(_, count)| count);
        let widest = widest.chain([latency.underflow(), latency.overflow()]).max().unwrap();
        prop_assert!(above.at_most - above.at_least <= widest);
    }

    #[test]
    fn count_above_a_boundary_is_exact(values in latencies(), bucket in 0..BUCKETS as i32) {
        let limit = coalmine_proto::histogram::upper_bound_ns(MIN_OTEL_INDEX + bucket).unwrap();
        let truth = values.iter().filter(|value| **value > limit).count() as u64;
        let above = recorded(&values).count_above(limit);
        prop_assert_eq!((above.at_least, above.at_most), (truth, truth));
    }

    #[test]
    fn buckets_and_parts_agree(a in histogram()) {
        let (offset, counts) = a.contiguous();
        prop_assert!(counts.first() != Some(&0) && counts.last() != Some(&0));
        let again = Histogram::from_parts(offset, counts, a.underflow(), a.overflow(), a.sum_ns());
        prop_assert_eq!(again.as_ref(), Ok(&a));
        let in_buckets: u64 = a.buckets().map(|(_, count)| count).sum();
        prop_assert_eq!(in_buckets + a.underflow() + a.overflow(), a.count());
        prop_assert!(a.buckets().map(|(index, _)| index).is_sorted());
        for (index, count) in a.buckets() {
            prop_assert_eq!(counts[(index - offset) as usize], count);
        }
    }

    #[test]
    fn the_wire_form_reads_back(a in histogram(), b in histogram()) {
        let wire = a.to_wire();
        prop_assert_eq!(Histogram::from_wire(&wire), Ok(a.clone()));
        let mut sum = b.clone();
        sum.merge_wire(&wire).unwrap();
        prop_assert_eq!(sum, merged(&b, &a));
    }

    #[test]
    fn equal_histograms_have_equal_bytes(a in histogram(), b in histogram()) {
        let mut wide = merged(&a, &b);
        wide.clear();
        wide.merge(&a);
        prop_assert_eq!(wide.to_wire(), a.to_wire());
        prop_assert_eq!(&wide, &a);
        prop_assert_eq!(a.to_wire() == b.to_wire(), a == b);
    }

    #[test]
    fn the_otel_form_reads_back(a in histogram()) {
        let otel = a.to_otel();
        prop_assert_eq!(otel.bucket_counts.iter().sum::<u64>() + otel.zero_count, otel.count);
        prop_assert_eq!(Histogram::from_otel(&otel), Ok(a));
    }

    #[test]
    fn the_prometheus_form_reads_back(a in histogram()) {
        let native = a.to_prometheus();
        // No span could be joined with the one before it.
        prop_assert!(native.positive_spans.iter().skip(1).all(|span| span.offset > 2));
        prop_assert!(native.positive_spans.iter().all(|span| span.length > 0));
        prop_assert_eq!(Histogram::from_prometheus(&native), Ok(a));
    }

    #[test]
    fn both_forms_have_the_same_buckets_one_index_apart(a in histogram()) {
        let otel = a.to_otel();
        let native = a.to_prometheus();
        let mut index = 0;
        let mut count = 0;
        let mut deltas = native.positive_deltas.iter();
        for span in &native.positive_spans {
            index += span.offset;
            for delta in deltas.by_ref().take(span.length as usize) {
                count += delta;
                let otel_count = otel.bucket_counts[(index - 1 - otel.offset) as usize];
                prop_assert_eq!(otel_count, count as u64);
                index += 1;
            }
        }
        prop_assert_eq!(deltas.len(), 0);
    }

    #[test]
    fn whatever_a_message_says_the_limits_hold_and_errors_change_nothing(
        before in histogram(),
        wire in prop_oneof![wild_message(), damaged_message()],
    ) {
        let mut after = before.clone();
        match (after.merge_wire(&wire), Histogram::from_wire(&wire)) {
            (Ok(()), Ok(alone)) => {
                prop_assert!(after.count() <= MAX_COUNT);
                prop_assert!(after.buckets().count() <= BUCKETS);
                prop_assert_eq!(after, merged(&before, &alone));
                // What was accepted had its one form, but for empty buckets at the ends.
                prop_assert_eq!(Histogram::from_wire(&alone.to_wire()), Ok(alone));
            }
            (Err(_), _) => prop_assert_eq!(after, before),
            (Ok(()), Err(error)) => prop_assert!(false, "accepted, but alone {error}"),
        }
    }
}
