//! Tests of the book: windows that come in parts, those of which nobody knows when they were, and agents that change sides.

use coalmine_judge::evidence::Coverage;
use coalmine_proto::names::Arm;

use super::{SERVICE, Sender, book, comparison};
use crate::book::{Applied, Book, BookError};

/// Agents of the canary that should have reported a slot and those that did, and its requests in it.
fn reported(book: &mut Book, slot_ms: u64) -> (u32, u32, u64) {
    let window = book.freeze(&comparison(), slot_ms, 1, 60_000);
    let requests = window.rows.iter().map(|row| row.canary.requests).sum();
    (window.canary.expected, window.canary.reported, requests)
}

#[test]
fn a_window_that_comes_in_parts_is_reported_when_the_last_is_here() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 1);
    baseline.window(&mut book, 1_000, 1, 0).unwrap();
    for _ in 0..2 {
        canary.length_ms = 1;
        canary.window(&mut book, 1_000, 3, 0).unwrap();
        assert!(!book.is_ready(&comparison(), 1_000, 2_000));
    }
    canary.length_ms = 1_000;
    canary.window(&mut book, 1_000, 2, 0).unwrap();
    assert!(book.is_ready(&comparison(), 1_000, 2_000));
    assert_eq!(reported(&mut book, 1_000), (1, 1, 8));
}

#[test]
fn an_agent_that_ends_between_the_parts_of_a_window_has_not_reported_it() {
    let mut book = book();
    let mut first = Sender::new(&mut book, "c", Arm::Canary, 1);
    first.length_ms = 1;
    first.window(&mut book, 1_000, 3, 0).unwrap();
    let mut second = Sender::new(&mut book, "c", Arm::Canary, 2);
    second.window(&mut book, 2_000, 1, 0).unwrap();
    assert_eq!(reported(&mut book, 1_000), (1, 0, 3));
    assert_eq!(reported(&mut book, 2_000), (1, 1, 1));
}

#[test]
fn a_window_without_a_time_counts_once_and_is_in_no_slot() {
    const AHEAD_MS: u64 = 3_602_000;
    let mut book = book();
    let mut agent = Sender::new(&mut book, "c", Arm::Canary, 1);
    agent.window(&mut book, 1_000, 7, 1).unwrap();
    agent.length_ms = 0;
    assert_eq!(agent.window(&mut book, AHEAD_MS, 5, 2), Ok(Applied::Now));
    // It comes again when its time is not ahead any more, and is known.
    agent.length_ms = 1_000;
    assert_eq!(agent.send(&mut book, 2, AHEAD_MS, 5, 2, 0), Ok(Applied::Before));
    assert_eq!(
        agent.send(&mut book, 2, AHEAD_MS, 6, 2, 0),
        Err(BookError::Changed(2))
    );
    assert_eq!(agent.window(&mut book, 3_000, 3, 0), Ok(Applied::Now));
    let mut copy = super::book();
    for piece in book.image() {
        copy.load(&piece).unwrap();
    }
    assert_eq!(copy.image(), book.image());
    for book in [&mut book, &mut copy] {
        let service = book.get(SERVICE).unwrap();
        let (outcomes, gaps, late) = service.arm_totals(Arm::Canary);
        assert_eq!((outcomes.seen(), outcomes.errors(), gaps, late), (15, 3, 0, 5));
        assert_eq!(service.latency(Arm::Canary).count(), 15);
        assert_eq!(service.received(), (3, 3, 1));
        assert_eq!(reported(book, 1_000), (1, 1, 7));
        assert_eq!(reported(book, 2_000), (1, 0, 0), "the five may be of this time");
        assert_eq!(reported(book, 3_000), (1, 1, 3));
        assert_eq!(reported(book, AHEAD_MS), (1, 0, 0));
    }
}

#[test]
fn an_agent_begins_with_its_first_window_that_has_a_time() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "c", Arm::Canary, 1);
    agent.length_ms = 0;
    agent.window(&mut book, 3_602_000, 5, 0).unwrap();
    assert_eq!(
        reported(&mut book, 3_000),
        (1, 0, 0),
        "nothing of it has a time yet"
    );
    agent.length_ms = 1_000;
    agent.window(&mut book, 5_000, 1, 0).unwrap();
    assert_eq!(reported(&mut book, 4_000), (0, 0, 0));
    assert_eq!(reported(&mut book, 5_000), (1, 1, 1));
}

/// The canary's agent ends within a slot, as the life `first`, and goes on as an agent of the baseline, as the life
/// `second`. Gives the book, with both of its lives in the slots from 1 s to 4 s.
fn moved(first: u64, second: u64) -> Book {
    let mut book = book();
    // It has sent nothing before it is the life that is meant.
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 9);
    canary.who.epoch = first;
    canary.connect(&mut book, 1, 0);
    canary.window(&mut book, 1_000, 3, 1).unwrap();
    canary.length_ms = 400;
    canary.window(&mut book, 2_000, 2, 0).unwrap();
    let mut baseline = Sender::new(&mut book, "c", Arm::Baseline, second);
    baseline.length_ms = 400;
    baseline.window(&mut book, 2_600, 5, 2).unwrap();
    baseline.length_ms = 1_000;
    baseline.window(&mut book, 3_000, 7, 0).unwrap();
    book
}

#[test]
fn an_agent_that_goes_on_as_another_build_has_lost_nothing_if_its_next_life_follows() {
    let none = Coverage::default();
    for (first, second, is_whole) in [
        (1, 2, true),
        // The numbers of lives begin again, without zero.
        (u64::MAX, 1, true),
        (1, 1, false),
        (1, 3, false),
        (2, 1, false),
        (u64::MAX, 2, false),
    ] {
        let mut book = moved(first, second);
        let what = format!("life {first}, then {second}");
        let service = book.get(SERVICE).unwrap();
        for (arm, seen, errors) in [(Arm::Canary, 5, 1), (Arm::Baseline, 12, 2)] {
            let (outcomes, gaps, late) = service.arm_totals(arm);
            let totals = (outcomes.seen(), outcomes.errors(), gaps, late);
            assert_eq!(totals, (seen, errors, 0, 0), "{what}: {arm}");
        }
        assert!(
            service
                .agents()
                .all(|(_, agent)| agent.build.arm == Arm::Baseline),
            "{what}"
        );

        // In the slot in which it moves all is counted on the side on which it was, and one agent is waited for.
        for (slot, canary, baseline, reported) in [(2_000, 2, 5, u32::from(is_whole)), (3_000, 0, 7, 1)] {
            let window = book.freeze(&comparison(), slot, 1, 5_000);
            let row = &window.rows[0];
            assert_eq!(
                (row.canary.requests, row.baseline.requests),
                (canary, baseline),
                "{what}: {slot}"
            );
            let expected = Coverage {
                expected: 1,
                reported,
            };
            assert_eq!(
                (window.canary, window.baseline),
                (none, expected),
                "{what}: {slot}"
            );
        }
    }
}

#[test]
fn before_it_moves_an_agent_is_not_missed_on_the_side_that_it_moves_to() {
    let mut book = moved(1, 2);
    let window = book.freeze(&comparison(), 1_000, 1, 5_000);
    let none = Coverage::default();
    assert_eq!((window.canary, window.baseline), (none, none));
    assert_eq!(window.rows[0].canary.requests, 3);
}
