//! Tests of the book: windows that come in parts, and those of which nobody knows when they were.

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
