//! Plans that are made by hand: an aggregator that is away for long, slow, full, refuses everybody, or never stays.
//!
//! No agent goes down in them, so each request must be received or declared in a gap, as exact integers
//! ([`oracle`](crate::oracle)); what a plan must reach beyond that is said here.

use coalmine_proto::names::Arm;

use crate::{
    disk::Mood,
    faults::{Action, Clock, Down, Plan, Setting},
    oracle::Reached,
    run,
};

/// Decides when requests come, and how long the disk takes.
const SEED: u64 = 1;

/// The ring that agents have when nobody says otherwise.
const USUAL_RING_BYTES: usize = 8 << 20;

const MINUTE_MS: u64 = 60_000;

/// Nothing goes wrong before.
const FIRST_MS: u64 = 5_000;

/// Two agents with a burst of requests each 0.3 s, and what goes wrong until when.
fn plan(ring_bytes: usize, faults_ms: u64, faults: Vec<(u64, Action)>) -> Plan {
    let agents = Arm::ALL.map(|arm| Setting {
        arm,
        window_ms: 1_000,
        ring_bytes,
        max_tenants: 20_000,
        pause_ms: 300,
        delay_ms: 5,
    });
    Plan {
        agents: agents.to_vec(),
        place: 1,
        faults,
        faults_ms,
        watches_rings: true,
        last_roll_up_ms: 100,
    }
}

/// Carries out a plan in which no agent goes down; gives what it reached, and the most that a ring held.
#[track_caller]
fn carry_out(plan: Plan) -> (Reached, usize) {
    let agents = plan.agents.len() as u64;
    let run = run::carry_out(SEED, plan);
    let reached = run.judged.unwrap_or_else(|problem| {
        let tail = run.trace.len().saturating_sub(40);
        panic!("{problem}\nthe last events:\n{}", run.trace[tail..].join("\n"))
    });
    let ends = (reached.complete, reached.broken, reached.lost);
    assert_eq!(ends, (agents, 0, 0), "complete, broken, lost");
    (reached, usize::try_from(run.most_ring_bytes).unwrap())
}

/// The aggregator is away for ten minutes.
fn away(ring_bytes: usize) -> (Reached, usize) {
    const AWAY_MS: u64 = 10 * MINUTE_MS;
    let down = Action::AggregatorDown(Down::Crash, AWAY_MS);
    carry_out(plan(ring_bytes, FIRST_MS + AWAY_MS, vec![(FIRST_MS, down)]))
}

#[test]
fn ten_minutes_without_an_aggregator_cost_resolution_first_and_requests_last() {
    // Everything has room.
    let (reached, all_bytes) = away(USUAL_RING_BYTES);
    assert_eq!((reached.merged, reached.gap_requests), (0, 0));
    assert!(all_bytes > 100_000, "{all_bytes} bytes are not much of a load");
    // It has room once windows are merged.
    let (reached, _) = away(all_bytes / 5 * 4);
    assert!(reached.merged > 0);
    assert_eq!(reached.gap_requests, 0);
    // Not even then.
    let (reached, _) = away(all_bytes / 20);
    assert!(reached.merged > 0);
    assert!(reached.gap_requests > 0);
}

#[test]
fn acknowledgements_that_come_late_cost_nothing() {
    let faults = vec![(FIRST_MS, Action::Disk(Mood::Slow, 2 * MINUTE_MS))];
    let (reached, most_bytes) = carry_out(plan(USUAL_RING_BYTES, FIRST_MS + 2 * MINUTE_MS, faults));
    assert_eq!((reached.merged, reached.gap_requests), (0, 0));
    assert_eq!(reached.reconnects, 0, "late is not lost");
    assert!(most_bytes > 1_000, "nothing waited: {most_bytes} bytes");
}

#[test]
fn a_full_disk_is_waited_for() {
    let faults = vec![(FIRST_MS, Action::Disk(Mood::Full, MINUTE_MS))];
    let (reached, most_bytes) = carry_out(plan(USUAL_RING_BYTES, FIRST_MS + 2 * MINUTE_MS, faults));
    assert_eq!(reached.full_disks, 1);
    assert_eq!((reached.merged, reached.gap_requests), (0, 0));
    assert!(most_bytes > 10_000, "nothing waited: {most_bytes} bytes");
}

#[test]
fn an_aggregator_that_refuses_everybody_gets_all_once_it_does_not() {
    let faults = vec![
        (FIRST_MS, Action::AggregatorClock(Clock::Ahead)),
        (FIRST_MS + MINUTE_MS, Action::AggregatorClock(Clock::Right)),
    ];
    let (reached, most_bytes) = carry_out(plan(USUAL_RING_BYTES, FIRST_MS + 2 * MINUTE_MS, faults));
    assert_eq!((reached.merged, reached.gap_requests), (0, 0));
    assert_eq!(reached.reconnects, 2, "each agent comes back once");
    assert!(most_bytes > 10_000, "nobody was refused: {most_bytes} bytes");
}

#[test]
fn an_aggregator_that_never_stays_counts_everything_once() {
    const TIMES: u64 = 12;
    const EVERY_MS: u64 = 8_000;
    let downs = [Down::Crash, Down::Stop, Down::Power].into_iter().cycle();
    let faults = (0..TIMES)
        .zip(downs)
        .map(|(time, down)| (FIRST_MS + time * EVERY_MS, Action::AggregatorDown(down, 1_000)));
    let (reached, _) = carry_out(plan(
        USUAL_RING_BYTES,
        FIRST_MS + TIMES * EVERY_MS,
        faults.collect(),
    ));
    assert_eq!((reached.aggregator_crashes, reached.drains), (TIMES, TIMES / 3));
    assert_eq!((reached.merged, reached.gap_requests), (0, 0));
    assert!(reached.reconnects >= TIMES / 2, "{} sessions", reached.reconnects);
}
