//! Tests of the ring.

use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcome, Outcomes, TenantName},
};
use proptest::prelude::*;

use super::*;

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

fn build(arm: Arm) -> Arc<Build> {
    Arc::new(Build {
        arm,
        version: "v1".to_owned(),
    })
}

/// A ring for windows that are all of one build.
fn ring(limit_bytes: usize) -> Ring {
    Ring::new(limit_bytes, build(Arm::Canary))
}

/// Adds a window of that build.
fn push(ring: &mut Ring, window: Window) {
    ring.push(window, build(Arm::Canary));
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

/// What is on its way takes no more than the limit, unless it is alone.
fn keeps_to_its_limit(ring: &Ring) {
    let sent: usize = ring.sent.iter().map(|batch| batch.window.bytes()).sum();
    assert_eq!(ring.sent_bytes, sent);
    assert!(sent <= ring.limit_bytes || ring.sent.len() == 1, "{sent} bytes");
}

fn drain(ring: &mut Ring) -> Vec<Batch> {
    std::iter::from_fn(|| ring.next(1 << 20).cloned()).collect()
}

#[test]
fn what_is_sent_is_kept_until_durable_and_sent_again() {
    let mut ring = ring(1 << 20);
    (0..3).for_each(|n| push(&mut ring, window(n, vec![row("a", 1, 0, 0)])));
    assert_eq!((ring.oldest_seq(), ring.next_seq()), (0, 1));
    let first = drain(&mut ring);
    assert_eq!(first.iter().map(|b| b.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(ring.in_flight(), 3);
    ring.acknowledge(1).unwrap();
    ring.resume(2).unwrap();
    assert_eq!((ring.oldest_seq(), ring.next_seq(), ring.in_flight()), (3, 4, 0));
    push(&mut ring, window(3, vec![]));
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
    let mut ring = ring(one * 4);
    (0..8).for_each(|n| push(&mut ring, window(n, vec![row("a", 3, 1, 5)])));
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
    let mut ring = ring(1);
    (0..200).for_each(|n| push(&mut ring, window(n, vec![row("a", 2, 1, 0)])));
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
    let mut ring = ring(1 << 20);
    let window = window(0, rows);
    let max_bytes = window.frame_bytes() + 3 * row("t19", 1, 0, 0).wire_bytes();
    push(&mut ring, window);
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
fn many_tenants_take_the_limit_and_one_window_however_long_nothing_is_durable() {
    const TENANTS: u64 = 200;
    const SECONDS: u64 = 150;
    let second = |n| {
        let rows = (0..TENANTS).map(|tenant| row(&format!("tenant-{tenant}"), 1, 1, 0));
        window(n, rows.collect())
    };
    let one = second(0).bytes();
    let limit = one * 5 / 2;
    let mut ring = ring(limit);
    let mut batches = Vec::new();
    for n in 0..SECONDS {
        push(&mut ring, second(n));
        batches.extend(drain(&mut ring));
        keeps_to_its_limit(&ring);
        assert!(ring.bytes() <= limit + one, "{} bytes after {n} s", ring.bytes());
    }
    assert_eq!(batches.len(), 2, "a third has no room");
    while !ring.is_empty() {
        let last = ring.next_seq() - 1;
        ring.acknowledge(last).unwrap();
        batches.extend(drain(&mut ring));
    }
    conserves(&batches);
    let totals = batches.last().unwrap().cumulative;
    let all = TENANTS * SECONDS;
    assert_eq!((totals.requests, totals.errors), (2 * all, all));
    assert!(totals.gap_requests > 0);
    assert_eq!(totals.gap_requests, ring.stats().gap_requests);
    assert_eq!(ring.bytes(), 0);
}

#[test]
fn what_is_larger_than_the_limit_is_sent_alone() {
    let rows: Vec<Row> = (0..20).map(|n| row(&format!("t{n}"), 1, 0, 0)).collect();
    let mut ring = ring(1);
    let window = window(0, rows);
    let max_bytes = window.frame_bytes() + 3 * row("t19", 1, 0, 0).wire_bytes();
    push(&mut ring, window);
    let mut batches = Vec::new();
    while let Some(batch) = ring.next(max_bytes).cloned() {
        assert_eq!(ring.next(max_bytes), None, "nothing beside it");
        keeps_to_its_limit(&ring);
        ring.acknowledge(batch.seq).unwrap();
        batches.push(batch);
    }
    assert_eq!(batches.len(), 7);
    conserves(&batches);
    assert_eq!(batches[6].cumulative.requests, 20);
    assert!(ring.is_empty());
}

/// All that the ring has, build by build, each acknowledged before the next.
fn drain_builds(ring: &mut Ring) -> Vec<(Arm, Vec<Batch>)> {
    let mut all = Vec::new();
    loop {
        let batches = drain(ring);
        conserves(&batches);
        all.push((ring.build().arm, batches));
        let last = ring.next_seq() - 1;
        ring.acknowledge(last).unwrap();
        if !ring.turn() {
            return all;
        }
    }
}

#[test]
fn windows_of_another_build_wait_until_all_before_them_is_durable() {
    let mut ring = ring(1 << 20);
    let second = |n| window(n, vec![row("a", 1, 0, 0)]);
    let numbers = |batches: &[Batch]| batches.iter().map(|b| b.seq).collect::<Vec<_>>();
    (0..2).for_each(|n| push(&mut ring, second(n)));
    (2..5).for_each(|n| ring.push(second(n), build(Arm::Baseline)));
    assert!(!ring.turn());
    assert_eq!(numbers(&drain(&mut ring)), [1, 2]);
    ring.acknowledge(1).unwrap();
    assert!(!ring.turn(), "what was sent may have to be sent again");
    ring.resume(1).unwrap();
    assert_eq!(numbers(&drain(&mut ring)), [2]);
    ring.acknowledge(2).unwrap();
    assert!(ring.is_at_turn());
    assert_eq!(ring.next(1 << 20), None);
    assert!(ring.turn());
    assert!(!ring.is_at_turn());
    assert_eq!(*ring.build(), *build(Arm::Baseline));
    assert_eq!((ring.oldest_seq(), ring.next_seq()), (0, 1));
    assert_eq!((ring.durable(), ring.in_flight()), (0, 0));
    ring.resume(0).unwrap();
    let batches = drain(&mut ring);
    assert_eq!(numbers(&batches), [1, 2, 3]);
    conserves(&batches);
    ring.acknowledge(3).unwrap();
    assert_eq!((ring.bytes(), ring.is_empty()), (0, true));
    assert!(!ring.turn(), "nothing waits");
}

#[test]
fn windows_of_two_builds_never_become_one() {
    let one = window(0, vec![row("a", 3, 1, 5)]).bytes();
    let mut ring = ring(one * 4);
    for n in 0..40 {
        let arm = Arm::ALL[usize::from(n / 10 % 2 == 1)];
        ring.push(window(n, vec![row("a", 3, 1, 5)]), build(arm));
    }
    assert!(ring.bytes() <= one * 4);
    assert_eq!(ring.stats().gap_requests, 0);
    let builds = drain_builds(&mut ring);
    let arms: Vec<Arm> = builds.iter().map(|(arm, _)| *arm).collect();
    assert_eq!(arms, [Arm::Canary, Arm::Baseline, Arm::Canary, Arm::Baseline]);
    for (number, (_, batches)) in builds.iter().enumerate() {
        let [batch] = &batches[..] else {
            panic!("{batches:?}");
        };
        assert_eq!(batch.window.start_unix_ms, 10_000 * number as u64);
        assert_eq!(batch.window.length_ms, 10_000);
        assert_eq!((batch.cumulative.requests, batch.cumulative.errors), (40, 10));
    }
}

#[test]
fn what_is_dropped_is_declared_by_the_build_that_lost_it() {
    let mut ring = ring(1);
    for n in 0..300 {
        let arm = Arm::ALL[usize::from(n >= 150)];
        ring.push(window(n, vec![row("a", 2, 1, 0)]), build(arm));
    }
    let dropped = ring.stats().gap_requests;
    let builds = drain_builds(&mut ring);
    let [(Arm::Canary, canary), (Arm::Baseline, baseline)] = &builds[..] else {
        panic!("{builds:?}");
    };
    let ([canary], [baseline]) = (&canary[..], &baseline[..]) else {
        panic!("{canary:?}, {baseline:?}");
    };
    // Nothing is left of the first but what it declares.
    assert!(canary.window.rows.is_empty());
    let gap = canary.gap.unwrap();
    assert_eq!((gap.requests, gap.errors), (450, 150));
    assert_eq!((gap.start_unix_ms, gap.end_unix_ms), (0, 150_000));
    let gap = baseline.gap.unwrap();
    assert_eq!((gap.start_unix_ms, gap.requests), (150_000, dropped - 450));
    assert_eq!(gap.end_unix_ms, baseline.window.start_unix_ms);
    for last in [canary, baseline] {
        assert_eq!((last.cumulative.requests, last.cumulative.errors), (450, 150));
    }
    assert_eq!(ring.bytes(), 0);
}

#[test]
fn turns_that_nobody_takes_are_bounded() {
    let mut ring = ring(1);
    let pushed = 3 * MAX_TURNS;
    for n in 0..pushed {
        let arm = Arm::ALL[n % 2];
        ring.push(window(n as u64, vec![row("a", 1, 0, 0)]), build(arm));
    }
    assert_eq!(ring.len(), MAX_TURNS + 1);
    assert_eq!(ring.stats().gap_requests, pushed as u64 - 1, "all but the newest");
    let declared = drain_builds(&mut ring);
    let declared = declared.iter().flat_map(|(_, batches)| batches);
    let declared: u64 = declared
        .filter_map(|batch| batch.gap)
        .map(|gap| gap.requests)
        .sum();
    assert_eq!(declared, MAX_TURNS as u64);
    assert_eq!(ring.bytes(), 0);
}

/// What an aggregator knows of each arm, and the batches since the last turn.
#[derive(Default)]
struct Told {
    arms: [Sums; 2],
    batches: Vec<Batch>,
}

impl Told {
    /// Takes the next batch; false if there is none.
    fn take(&mut self, ring: &mut Ring) -> bool {
        let arm = ring.build().arm;
        let Some(batch) = ring.next(2000).cloned() else {
            return false;
        };
        assert!(
            batch
                .window
                .rows
                .iter()
                .all(|row| row.tenant.as_str() == arm.as_str())
        );
        assert_eq!(batch.seq, self.batches.len() as u64 + 1);
        self.batches.push(batch);
        true
    }

    /// All that was sent is durable; that may be a turn.
    fn settle(&mut self, ring: &mut Ring) {
        let (arm, last) = (ring.build().arm, ring.next_seq() - 1);
        ring.acknowledge(last).unwrap();
        if ring.turn() {
            self.close(arm);
        }
    }

    /// No more batches come in this row of numbers.
    fn close(&mut self, arm: Arm) {
        conserves(&self.batches);
        let last = self.batches.drain(..).next_back();
        let sums = last.map(|last| last.cumulative).unwrap_or_default();
        let sums = Sums {
            requests: sums.requests,
            errors: sums.errors,
        };
        self.arms[arm as usize] = self.arms[arm as usize].plus(sums);
    }
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
        let mut ring = ring(limit);
        let mut pushed = Sums::default();
        let mut batches: Vec<Batch> = Vec::new();
        let mut take = |ring: &mut Ring| {
            let Some(batch) = ring.next(2000).cloned() else {
                return false;
            };
            let at = usize::try_from(batch.seq).unwrap() - 1;
            match batches.get(at) {
                Some(same) => assert_eq!(*same, batch),
                None => {
                    assert_eq!(at, batches.len());
                    batches.push(batch);
                }
            }
            true
        };
        for (second, (step, good, bad)) in steps.into_iter().enumerate() {
            match step {
                0..3 => {
                    let rows = vec![row("a", good, bad, good), row("b", bad, 0, 1)];
                    let window = window(second as u64, rows);
                    pushed = pushed.plus(window.sums());
                    push(&mut ring, window);
                }
                3 => {
                    take(&mut ring);
                }
                _ => {
                    let sent = ring.durable() + ring.in_flight();
                    ring.acknowledge(sent.saturating_sub(good)).unwrap();
                    let durable = ring.durable();
                    ring.resume(durable).unwrap();
                }
            }
            keeps_to_its_limit(&ring);
        }
        push(&mut ring, window(1000, vec![]));
        while !ring.is_empty() {
            while take(&mut ring) {}
            let sent = ring.durable() + ring.in_flight();
            ring.acknowledge(sent).unwrap();
        }
        conserves(&batches);
        let last = batches.last().unwrap().cumulative;
        prop_assert_eq!((last.requests, last.errors), (pushed.requests, pushed.errors));
        prop_assert_eq!(ring.bytes(), 0);
    }

    #[test]
    fn each_build_has_its_own_requests_and_no_others(
        limit in 0_usize..4000,
        steps in prop::collection::vec((0_u8..6, 0_u64..4, 0_u64..3), 1..80),
    ) {
        let mut ring = ring(limit);
        let (mut told, mut pushed) = (Told::default(), [Sums::default(); 2]);
        let mut arm = Arm::Canary;
        for (second, (step, good, bad)) in steps.into_iter().enumerate() {
            match step {
                0..3 => {
                    let window = window(second as u64, vec![row(arm.as_str(), good, bad, 0)]);
                    pushed[arm as usize] = pushed[arm as usize].plus(window.sums());
                    ring.push(window, build(arm));
                }
                3 => arm = Arm::ALL[1 - arm as usize],
                4 => {
                    told.take(&mut ring);
                }
                _ => told.settle(&mut ring),
            }
            keeps_to_its_limit(&ring);
        }
        while !ring.is_empty() {
            while told.take(&mut ring) {}
            told.settle(&mut ring);
        }
        told.close(ring.build().arm);
        prop_assert_eq!(told.arms, pushed);
        prop_assert_eq!((ring.bytes(), ring.len()), (0, 0));
    }
}
