//! What agents send: messages with their lengths before them, into the book, out of it as evidence, and into another
//! book as a roll-up.

#![no_main]

use std::{collections::BTreeSet, sync::LazyLock};

use coalmine_aggregator::{
    book::{Book, Comparison, Patience, Piece},
    ingest::Rebuild,
    store::Entry,
};
use coalmine_fuzz::{NOW_MS, POLICY};
use coalmine_judge::{evidence::Window, policy::Policy, v1::Judge};
use coalmine_proto::{
    names::Arm,
    v1::{AgentMessage, agent_message::Kind},
};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

const SLOT_MS: u64 = 1_000;

static JUDGE: LazyLock<Judge> =
    LazyLock::new(|| Judge::new(Policy::parse(POLICY).unwrap(), None, None).unwrap());

/// The services, with the versions on trial, and the slots that messages speak of.
#[derive(Default)]
struct Spoken {
    canaries: BTreeSet<(String, String)>,
    slots: BTreeSet<u64>,
}

fn fill(book: &mut Book, mut data: &[u8], now_ms: u64) -> Spoken {
    let mut spoken = Spoken::default();
    let mut rebuild = Rebuild::default();
    let mut session = 0;
    while !data.is_empty()
        && let Ok(message) = AgentMessage::decode_length_delimited(&mut data)
    {
        let entry = match message.kind {
            Some(Kind::Hello(hello)) => {
                session = book.next_session();
                spoken
                    .canaries
                    .insert((hello.service.clone(), hello.version.clone()));
                Entry::Hello(session, hello)
            }
            Some(Kind::Batch(batch)) => {
                spoken.slots.insert(batch.start_unix_ms / SLOT_MS * SLOT_MS);
                Entry::Batch(session, batch)
            }
            Some(Kind::Bye(bye)) => Entry::Bye(session, bye),
            // Here it says which session goes on, so that sessions can mix.
            Some(Kind::ConfigApplied(applied)) => {
                session = applied.version;
                continue;
            }
            None => continue,
        };
        rebuild.take(book, entry, now_ms);
    }
    spoken
}

fn empty() -> Book {
    let mut book = Book::new(Patience::default(), NOW_MS);
    book.set_slot("checkout", SLOT_MS);
    book
}

/// What is put back from a roll-up is the same book.
fn put_back(book: &Book, now_ms: u64) -> Book {
    let mut copy = empty();
    let mut rebuild = Rebuild::default();
    for piece in book.image() {
        rebuild.take(&mut copy, Entry::Piece(piece), now_ms);
    }
    assert_eq!(rebuild.refused, 0);
    assert_eq!(pieces(&copy), pieces(book));
    copy
}

/// The pieces of which the order of their content is fixed.
fn pieces(book: &Book) -> Vec<Piece> {
    let mut pieces = book.image();
    pieces.retain(|piece| !piece.key.starts_with("speaker/"));
    pieces
}

fuzz_target!(|data: &[u8]| {
    let now_ms = NOW_MS + 10_000;
    let mut book = empty();
    let spoken = fill(&mut book, data, now_ms);
    let mut copy = put_back(&book, now_ms);
    for (_, service) in book.services() {
        for arm in Arm::ALL {
            let (outcomes, ..) = service.arm_totals(arm);
            assert!(service.latency(arm).count() <= outcomes.requests());
            assert!(outcomes.errors() <= outcomes.requests());
        }
    }
    for (service, canary_version) in spoken.canaries {
        let comparison = Comparison {
            service,
            canary_version,
            baseline_version: None,
        };
        let mut judge = JUDGE.clone();
        for (number, start_ms) in (1..).zip(spoken.slots.range(..=now_ms)) {
            book.is_ready(&comparison, *start_ms, now_ms);
            let window = book.freeze(&comparison, *start_ms, number, now_ms);
            assert_eq!(copy.freeze(&comparison, *start_ms, number, now_ms), window);
            assert_eq!(Window::from_json(&window.to_json()).as_ref(), Ok(&window));
            judge.step(&window).unwrap();
        }
    }
    book.evict(now_ms + 1_000_000, |_| None);
    put_back(&book, now_ms);
});
