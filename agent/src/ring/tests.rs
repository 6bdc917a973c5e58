//! Tests of the ring.

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcome, Outcomes, TenantName},
};
use proptest::prelude::*;

use super::*;
use crate::window::Row;

fn row(tenant: &str, good: u64, bad: u64, limit_us: u64) -> Row {
    let mut outcomes = Outcomes::default();
    outcomes.0[Outcome::Success as usize] = good;
    outcomes.0[Outcome::ServerError as usize] = bad;
    let mut latency = Histogram::new();
    (0..good + bad).for_each(|n| latency.record(1_000_000 * (n + 1)));
    Row {
        tenant: TenantName::parse(tenant.as_bytes()).unwrap(),
        outcomes,
        latency: latency.to_wire(),
        limit_us,
        over_limit: if limit_us > 0 { bad } else { 0 },
    }
}

fn window(second: u64, rows: Vec<Row>) -> Window {
    Window {
        start_unix_ms: second * 1000,
        length_ms: 1000,
        rows,
        config_version: 1,
        host: v1::HostContext::default(),
        pools: Vec::new(),
    }
}

/// The invariant "conservation", from the side of the aggregator.
fn conserves(batches: &[Batch]) {
    let mut sums = v1::Totals::default();
    for batch in batches {
        let rows = batch.window.sums();
        let gap = batch.gap.unwrap_or_default();
        sums.requests += rows.requests + gap.requests;
        sums.errors += rows.errors + gap.errors;
        sums.gap_requests += gap.requests;
        assert_eq!(batch.cumulative, sums, "at batch {}", batch.seq);
    }
}

fn drain(ring: &mut Ring) -> Vec<Batch> {
    std::iter::from_fn(|| ring.next(1 << 20).cloned()).collect()
}

#[test]
fn what_is_sent_is_kept_until_durable_and_sent_again() {
    let mut ring = Ring::new(1 << 20);
    (0..3).for_each(|n| ring.push(window(n, vec![row("a", 1, 0, 0)])));
    assert_eq!((ring.oldest_seq(), ring.next_seq()), (0, 1));
    let first = drain(&mut ring);
    assert_eq!(first.iter().map(|b| b.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(ring.in_flight(), 3);
    ring.acknowledge(1).unwrap();
    ring.resume(2).unwrap();
    assert_eq!((ring.oldest_seq(), ring.next_seq(), ring.in_flight()), (3, 4, 0));
    ring.push(window(3, vec![]));
    let second = drain(&mut ring);
    assert_eq!(second[0], first[2]);
    assert_eq!(second[1].seq, 4);
    ring.acknowledge(4).unwrap();
    assert_eq!((ring.bytes(), ring.is_empty()), (0, true));
    assert!(ring.acknowledge(5).is_err());
    assert!(ring.resume(9).is_err());
}

#[test]
fn old_neighbours_are_merged_before_anything_is_dropped() {
    let one = window(0, vec![row("a", 3, 1, 5)]).bytes();
    let mut ring = Ring::new(one * 4);
    (0..8).for_each(|n| ring.push(window(n, vec![row("a", 3, 1, 5)])));
    assert!(ring.bytes() <= one * 4);
    assert_eq!(ring.stats().gap_requests, 0);
    let batches = drain(&mut ring);
    conserves(&batches);
    let last = batches.last().unwrap();
    assert_eq!((last.cumulative.requests, last.cumulative.errors), (32, 8));
    let lengths: Vec<u32> = batches.iter().map(|b| b.window.length_ms).collect();
    assert_eq!(lengths.iter().sum::<u32>(), 8000);
    let over: u64 = batches.iter().map(|b| b.window.rows[0].over_limit).sum();
    assert_eq!(over, 8);
    let mut latency = Histogram::new();
    for batch in &batches {
        latency.merge_wire(&batch.window.rows[0].latency).unwrap();
    }
    assert_eq!(latency.count(), 32);
}

#[test]
fn rows_with_different_limits_lose_the_limit() {
    let mut merged = window(0, vec![row("a", 1, 1, 5), row("b", 1, 1, 5)]);
    merged.merge(window(1, vec![row("a", 1, 1, 6), row("c", 1, 0, 5)]));
    let rows = merged.rows.iter();
    let seen = rows.map(|r| (r.tenant.as_str(), r.outcomes.seen(), r.limit_us, r.over_limit));
    assert_eq!(
        seen.collect::<Vec<_>>(),
        [("a", 4, 0, 0), ("b", 2, 5, 1), ("c", 1, 5, 0)]
    );
}

#[test]
fn what_is_dropped_is_declared_by_the_next_batch() {
    let mut ring = Ring::new(1);
    (0..200).for_each(|n| ring.push(window(n, vec![row("a", 2, 1, 0)])));
    let batches = drain(&mut ring);
    conserves(&batches);
    let gap = batches[0].gap.unwrap();
    assert_eq!(gap.start_unix_ms, 0);
    assert_eq!(gap.requests, ring.stats().gap_requests);
    let last = batches.last().unwrap();
    assert_eq!((last.cumulative.requests, last.cumulative.errors), (600, 200));
    assert!(batches.iter().all(|b| b.window.length_ms <= MAX_MERGED_MS));
}

#[test]
fn large_windows_are_sent_in_parts() {
    let rows: Vec<Row> = (0..20).map(|n| row(&format!("t{n}"), 1, 0, 0)).collect();
    let mut ring = Ring::new(1 << 20);
    let window = window(0, rows);
    let max_bytes = window.frame_bytes() + 3 * row("t19", 1, 0, 0).wire_bytes();
    ring.push(window);
    let batches: Vec<Batch> = std::iter::from_fn(|| ring.next(max_bytes).cloned()).collect();
    assert_eq!(batches.len(), 7);
    conserves(&batches);
    assert_eq!(batches[6].cumulative.requests, 20);
    // The slots of the window are complete with the last part, and not before.
    let lengths: Vec<u32> = batches.iter().map(|b| b.window.length_ms).collect();
    assert_eq!(lengths, [1, 1, 1, 1, 1, 1, 1000]);
    assert!(batches.iter().all(|b| b.window.start_unix_ms == 0));
    ring.acknowledge(7).unwrap();
    assert_eq!(ring.bytes(), 0);
}

#[test]
fn a_message_has_fewer_names_than_a_session_leaves_room_for() {
    // 200,000 names are taken in a session, a session ends after 100,000, and 4 MiB in a message.
    assert!(row("t", 0, 0, 0).wire_bytes() * 100_000 > 4 << 20);
}

proptest! {
    #[test]
    fn requests_are_conserved_whatever_happens(
        limit in 0_usize..4000,
        steps in prop::collection::vec((0_u8..5, 0_u64..4, 0_u64..3), 1..80),
    ) {
        let mut ring = Ring::new(limit);
        let mut pushed = Sums::default();
        let mut batches: Vec<Batch> = Vec::new();
        let mut take = |ring: &mut Ring| {
            if let Some(batch) = ring.next(2000).cloned() {
                let at = usize::try_from(batch.seq).unwrap() - 1;
                match batches.get(at) {
                    Some(same) => assert_eq!(*same, batch),
                    None => {
                        assert_eq!(at, batches.len());
                        batches.push(batch);
                    }
                }
            }
        };
        for (second, (step, good, bad)) in steps.into_iter().enumerate() {
            match step {
                0..3 => {
                    let rows = vec![row("a", good, bad, good), row("b", bad, 0, 1)];
                    let window = window(second as u64, rows);
                    pushed = pushed.plus(window.sums());
                    ring.push(window);
                }
                3 => take(&mut ring),
                _ => {
                    let sent = ring.durable() + ring.in_flight();
                    ring.acknowledge(sent.saturating_sub(good)).unwrap();
                    let durable = ring.durable();
                    ring.resume(durable).unwrap();
                }
            }
        }
        ring.push(window(1000, vec![]));
        while ring.in_flight() + ring.durable() + 1 < ring.next_seq() || !ring.unsent.is_empty() {
            take(&mut ring);
        }
        conserves(&batches);
        let last = batches.last().unwrap().cumulative;
        prop_assert_eq!((last.requests, last.errors), (pushed.requests, pushed.errors));
        let sent = ring.durable() + ring.in_flight();
        ring.acknowledge(sent).unwrap();
        prop_assert_eq!(ring.bytes(), 0);
    }
}
