//! Pods that a cluster knows, and the agents that speak.

use std::collections::BTreeMap;

use coalmine_judge::evidence::{Coverage, Pods};

use super::*;
use crate::book::{Pod, Roster};

fn pod(arm: Arm, has_agent: bool, since_ms: u64) -> Pod {
    Pod {
        build: Build {
            arm,
            version: if arm == Arm::Canary { "v2" } else { "v1" }.to_owned(),
        },
        has_agent,
        since_ms,
    }
}

fn roster(pods: &[(&str, Pod)]) -> Roster {
    let pods = pods.iter().map(|(uid, pod)| ((*uid).to_owned(), pod.clone()));
    Roster {
        services: BTreeMap::from([(SERVICE.to_owned(), pods.collect())]),
        is_stale: false,
    }
}

fn agents(expected: u32, reported: u32) -> Coverage {
    Coverage { expected, reported }
}

#[test]
fn a_pod_without_an_agent_or_with_one_that_is_silent_is_seen() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 1);
    for start in (1_000..9_000).step_by(1_000) {
        canary.window(&mut book, start, 1, 0).unwrap();
        baseline.window(&mut book, start, 1, 0).unwrap();
    }
    assert_eq!(book.freeze(&comparison(), 1_000, 1, 9_000).pods, None);
    let whole = [
        ("c", pod(Arm::Canary, true, 0)),
        ("b", pod(Arm::Baseline, true, 0)),
    ];
    book.enrol(roster(&whole), 1_000);
    assert!(book.is_ready(&comparison(), 2_000, 3_000));
    let window = book.freeze(&comparison(), 2_000, 2, 9_000);
    assert_eq!((window.canary, window.baseline), (agents(1, 1), agents(1, 1)));
    let pods = |canary, unobserved| {
        Some(Pods {
            canary,
            unobserved,
            stale: false,
        })
    };
    assert_eq!(window.pods, pods(1, 0));

    let more = [
        ("c2", pod(Arm::Canary, false, 0)),
        ("c3", pod(Arm::Canary, true, 0)),
        ("b2", pod(Arm::Baseline, false, 0)),
        ("later", pod(Arm::Canary, false, 3_001)),
        ("lateragent", pod(Arm::Canary, true, 3_001)),
    ];
    book.enrol(roster(&[&whole[..], &more[..]].concat()), 2_000);
    assert!(
        !book.is_ready(&comparison(), 3_000, 4_000),
        "c3 has an agent that may come"
    );
    let window = book.freeze(&comparison(), 3_000, 3, 9_000);
    assert_eq!((window.canary, window.baseline), (agents(2, 1), agents(1, 1)));
    assert_eq!(window.pods, pods(5, 2), "also the one that has come since");

    // An agent that says Bye in a pod that goes on leaves its requests unseen.
    book.disconnect(SERVICE, "c", canary.session, true, 9_000);
    book.enrol(roster(&whole), 9_000);
    let window = book.freeze(&comparison(), 9_000, 9, 10_000);
    assert_eq!(window.canary, agents(1, 0));
}

#[test]
fn after_a_start_a_slot_waits_for_the_cluster_as_it_does_for_agents() {
    let patience = Patience {
        return_ms: 35_000,
        ..Patience::default()
    };
    let mut book = Book::new(patience, 0);
    book.set_slot(SERVICE, 1_000);
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 1);
    for start in [1_000, 2_000] {
        canary.window(&mut book, start, 1, 0).unwrap();
        baseline.window(&mut book, start, 1, 0).unwrap();
    }
    assert!(book.is_ready(&comparison(), 1_000, 2_000));
    book.enrol(Roster::unknown(), 0);
    assert!(!book.is_ready(&comparison(), 1_000, 34_999));
    assert!(book.is_ready(&comparison(), 1_000, 35_000));
    book.enrol(roster(&[]), 2_000);
    assert!(book.is_ready(&comparison(), 1_000, 2_000));
}

#[test]
fn a_pod_is_what_it_is_from_the_moment_on_in_which_it_changes() {
    let mut book = book();
    let unseen = |book: &mut Book, slot| book.freeze(&comparison(), slot, slot, 60_000).pods.unwrap();
    book.enrol(Roster::unknown(), 0);
    assert!(unseen(&mut book, 1_000).stale);
    book.enrol(roster(&[("p", pod(Arm::Baseline, false, 500))]), 2_000);
    assert_eq!(unseen(&mut book, 2_000), Pods::default());
    book.enrol(roster(&[("p", pod(Arm::Canary, false, 500))]), 3_500);
    assert_eq!(unseen(&mut book, 3_000).canary, 1);
    book.enrol(roster(&[("p", pod(Arm::Canary, false, 500))]), 9_000);
    assert_eq!(
        (
            unseen(&mut book, 4_000).canary,
            unseen(&mut book, 4_000).unobserved
        ),
        (1, 1)
    );
    let stale = Roster {
        is_stale: true,
        ..roster(&[("p", pod(Arm::Canary, false, 500))])
    };
    book.enrol(stale, 9_500);
    assert_eq!(
        (
            unseen(&mut book, 5_000).unobserved,
            unseen(&mut book, 5_000).stale
        ),
        (1, true)
    );
}

#[test]
fn a_pod_is_missed_where_it_is_only_from_the_moment_on_in_which_it_changed() {
    let mut book = book();
    let missed = |book: &mut Book, slot| {
        let window = book.freeze(&comparison(), slot, slot, 60_000);
        (window.canary.expected, window.baseline.expected)
    };
    book.enrol(roster(&[("p", pod(Arm::Baseline, true, 500))]), 2_000);
    assert_eq!(missed(&mut book, 2_000), (0, 1));
    book.enrol(roster(&[("p", pod(Arm::Canary, true, 500))]), 3_500);
    assert_eq!(missed(&mut book, 3_000), (0, 0));
    assert_eq!(missed(&mut book, 4_000), (1, 0));
    // Its containers began anew, which changes nothing.
    book.enrol(roster(&[("p", pod(Arm::Canary, true, 8_000))]), 9_000);
    assert_eq!(missed(&mut book, 5_000), (1, 0));
}
