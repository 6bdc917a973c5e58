//! What a witness cosigns, and all that it refuses.

use proptest::prelude::*;

use super::*;
use crate::{note::SignerKey, tree::Nodes};

const ORIGIN: &str = "log.example/a";

fn signer(name: &str, kind: Kind, seed: u8) -> SignerKey {
    SignerKey::from_seed(name, kind, &[seed; 32])
}

fn log_key() -> SignerKey {
    signer(ORIGIN, Kind::Ed25519, 1)
}

/// A log whose records are the same as those of any other branch up to `common`.
fn nodes(branch: u8, common: u64, size: u64) -> Nodes {
    let mut nodes = Nodes::default();
    for index in 0..size {
        let branch = if index < common { 0 } else { branch };
        nodes.push(Hash::leaf(&[&[branch], index.to_be_bytes().as_slice()].concat()));
    }
    nodes
}

fn checkpoint(nodes: &Nodes, size: u64) -> Checkpoint {
    Checkpoint {
        origin: ORIGIN.to_owned(),
        size,
        root: nodes.root(size).unwrap(),
    }
}

fn request(nodes: &Nodes, old: u64, size: u64) -> AddCheckpoint {
    AddCheckpoint {
        old,
        path: nodes.consistency(old, size).unwrap_or_default(),
        checkpoint: checkpoint(nodes, size).sign([&log_key()]),
    }
}

fn keys() -> Vec<VerifierKey> {
    vec![log_key().verifier()]
}

/// The example of the C2SP tlog-witness document.
#[test]
fn the_published_request_is_read_and_written() {
    let text = "old 20852014
PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=
jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=
5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=
/6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=

example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
— example.com/behind-the-sofa opLqBQsREYCgu6xQkYQwJr9fo45a62DN9EdmHXnZdXNqlcVGlCum2Wks+49/V6267UEjw6QUXTS5Rovnzv++qbSzm9Q=
";
    let request = AddCheckpoint::parse(text).unwrap();
    assert_eq!((request.old, request.path.len()), (20_852_014, 4));
    assert_eq!(request.to_string(), text);
    let statement = request.statement().unwrap();
    assert_eq!(
        (statement.origin.as_str(), statement.size),
        ("example.com/behind-the-sofa", 20_852_163)
    );
    // The document gives no keys: to us it is a log that nobody knows, or one that a stranger has signed.
    assert_eq!(request.decide(&keys(), None), Err(Refusal::UnknownLog));
    let stranger = signer(&statement.origin, Kind::Ed25519, 9).verifier();
    assert!(matches!(
        request.decide(&[stranger], None),
        Err(Refusal::Untrusted(NoteError::Unsigned { .. }))
    ));
}

#[test]
fn a_log_that_grows_is_cosigned_at_every_size() {
    let nodes = nodes(0, 0, 40);
    for old in 0..=40 {
        let latest = checkpoint(&nodes, old);
        for size in old..=40 {
            let request = request(&nodes, old, size);
            let read = AddCheckpoint::parse(&request.to_string()).unwrap();
            assert_eq!(read, request);
            let accepted = read.decide(&keys(), Some(&latest));
            assert_eq!(accepted, Ok(checkpoint(&nodes, size)), "{old} to {size}");
            if old == 0 {
                assert_eq!(read.decide(&keys(), None), accepted);
            }
        }
    }
}

#[test]
fn each_refusal_has_its_status_and_they_come_in_order() {
    let (ours, fork) = (nodes(0, 3, 9), nodes(1, 3, 9));
    let latest = checkpoint(&ours, 5);
    let decide = |request: &AddCheckpoint| request.decide(&keys(), Some(&latest)).unwrap_err();
    let good = request(&ours, 5, 9);
    assert!(good.decide(&keys(), Some(&latest)).is_ok());

    // Nobody knows the log: its signature is not even looked at.
    assert_eq!(good.decide(&[], Some(&latest)), Err(Refusal::UnknownLog));
    let others = [
        signer("log.example/b", Kind::Ed25519, 1).verifier(),
        // A witness of the log's name is not the log.
        signer(ORIGIN, Kind::Cosignature, 1).verifier(),
    ];
    assert_eq!(good.decide(&others, Some(&latest)), Err(Refusal::UnknownLog));

    // Signed by a stranger, and forged, before anything is said about sizes.
    let with = |checkpoint: String| AddCheckpoint {
        old: 99,
        path: Vec::new(),
        checkpoint,
    };
    let stranger = signer(ORIGIN, Kind::Ed25519, 2);
    let unsigned = with(checkpoint(&ours, 9).sign([&stranger]));
    assert!(matches!(
        decide(&unsigned),
        Refusal::Untrusted(NoteError::Unsigned { .. })
    ));
    let text = checkpoint(&ours, 9).to_string();
    let other = log_key().sign(&checkpoint(&ours, 8).to_string(), 0);
    let forged = with(format!("{text}\n{other}"));
    assert!(matches!(
        decide(&forged),
        Refusal::Untrusted(NoteError::Forged(_))
    ));
    let right = log_key().sign(&text, 0);
    let both = with(format!("{text}\n{right}{other}"));
    assert!(matches!(decide(&both), Refusal::Untrusted(NoteError::Forged(_))));

    // A log that shrinks is an error of form, whatever was cosigned.
    let shrunk = AddCheckpoint {
        old: 9,
        ..request(&ours, 5, 7)
    };
    assert!(matches!(decide(&shrunk), Refusal::Malformed(_)), "{shrunk}");
    for old in [0, 4, 6] {
        let conflict = decide(&request(&ours, old, 9));
        assert_eq!(conflict, Refusal::Conflict { size: 5 });
    }
    let first = request(&ours, 3, 9).decide(&keys(), None);
    assert_eq!(first, Err(Refusal::Conflict { size: 0 }));

    let inconsistent = |request: &AddCheckpoint, latest: Option<&Checkpoint>, says: &str| {
        let refusal = request.decide(&keys(), latest).unwrap_err();
        assert_eq!(refusal.status(), 422, "{refusal}");
        assert!(refusal.to_string().contains(says), "{refusal}");
    };
    inconsistent(
        &request(&fork, 5, 5),
        Some(&latest),
        "at size 5 the log had the root ",
    );
    inconsistent(
        &request(&fork, 5, 9),
        Some(&latest),
        "the proof of 5 hashes does not show",
    );
    let useless = vec![Hash::of(b"x")];
    for (old, size, latest) in [(0, 9, None), (5, 5, Some(&latest)), (5, 9, Some(&latest))] {
        let wrong = AddCheckpoint {
            path: useless.clone(),
            ..request(&ours, old, size)
        };
        inconsistent(&wrong, latest, "the proof of 1 hashes does not show");
    }
    let nothing = Checkpoint {
        root: Hash::ZERO,
        ..checkpoint(&ours, 0)
    };
    let nothing = AddCheckpoint {
        checkpoint: nothing.sign([&log_key()]),
        ..request(&ours, 0, 0)
    };
    inconsistent(&nothing, None, "a log of size 0 does not have the root AAAA");

    let statuses = [
        (malformed("x"), 400),
        (Refusal::UnknownLog, 404),
        (decide(&unsigned), 403),
        (Refusal::Conflict { size: 1 }, 409),
        (Refusal::Inconsistent(String::new()), 422),
    ];
    for (refusal, status) in statuses {
        assert_eq!(refusal.status(), status);
        assert!(!refusal.to_string().contains('\n'), "{refusal}");
    }
}

#[test]
fn requests_have_one_form() {
    let good = request(&nodes(0, 0, 9), 5, 9).to_string();
    let hash = base64(Hash::ZERO);
    let long = |hashes: usize| {
        let lines = format!("{hash}\n").repeat(hashes);
        good.replacen("old 5\n", &format!("old 5\n{lines}"), 1)
    };
    let held = AddCheckpoint::parse(&good).unwrap().path.len();
    assert!(AddCheckpoint::parse(&long(MAX_PROOF - held)).is_ok());
    for (bad, says) in [
        (String::new(), "no empty line"),
        (
            good.replacen("old 5", "old 05", 1),
            "its first line is \"old 05\"",
        ),
        (good.replacen("old 5", "old +5", 1), "its first line"),
        (good.replacen("old 5", "old", 1), "its first line"),
        (good.replacen("old 5", "old  5", 1), "its first line"),
        (good.replacen("old 5", "Old 5", 1), "its first line"),
        (
            good.replacen("old 5", "old 18446744073709551616", 1),
            "its first line",
        ),
        (good.replacen("old 5\n", "", 1), "its first line"),
        (good.replacen("old 5\n", "old 5\r\n", 1), "its first line"),
        (
            good.replacen("old 5\n", "old 5\nAAAA\n", 1),
            "\"AAAA\" is not a hash",
        ),
        (
            good.replacen("old 5\n", &format!("old 5\n {hash}\n"), 1),
            "is not a hash",
        ),
        (good.replacen("old 5\n", "old 5\n\n", 1), "its checkpoint is not"),
        (good.replacen(ORIGIN, "\n", 1), "its checkpoint is not"),
        (long(MAX_PROOF - held + 1), "more than 63 hashes"),
    ] {
        let refusal = AddCheckpoint::parse(&bad).and_then(|request| request.decide(&keys(), None));
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.status(), 400, "{bad:?}: {refusal}");
        assert!(refusal.to_string().contains(says), "{bad:?}: {refusal}");
    }
}

#[test]
fn every_flipped_bit_of_a_request_is_noticed() {
    let nodes = nodes(0, 0, 9);
    let latest = checkpoint(&nodes, 5);
    let good = request(&nodes, 5, 9).to_string();
    let decide = |text: &str| {
        let request = AddCheckpoint::parse(text)?;
        // As the server does: what is not this log's is not held against its latest checkpoint.
        let same = request.statement()?.origin == ORIGIN;
        request.decide(&keys(), same.then_some(&latest))
    };
    assert!(decide(&good).is_ok());
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1 << bit;
            if let Ok(bad) = String::from_utf8(bad) {
                assert!(decide(&bad).is_err(), "byte {at}, bit {bit}: {bad}");
            }
        }
    }
}

#[test]
fn the_lines_of_known_keys_are_found_among_others() {
    let (ours, other, witness) = (
        log_key(),
        signer("log.example/b", Kind::Ed25519, 2),
        signer("witness.example/w", Kind::Cosignature, 3),
    );
    let text = checkpoint(&nodes(0, 0, 3), 3).to_string();
    let (own, cosigned) = (ours.sign(&text, 0), witness.sign(&text, 1_700_000_000));
    let forged = witness.sign("other", 1_700_000_000);
    let note = format!("{text}\n{}{own}{forged}{cosigned}", other.sign(&text, 0));
    let note = Note::parse(&note).unwrap();
    assert_eq!(note.signatures_of(&[ours.verifier()]), [own.as_str()]);
    assert_eq!(
        note.signatures_of(&[witness.verifier(), ours.verifier()]),
        [own.as_str(), cosigned.as_str()]
    );
    assert!(note.signatures_of(&[]).is_empty());
    let stranger = signer(ORIGIN, Kind::Ed25519, 9).verifier();
    assert!(note.signatures_of(&[stranger]).is_empty());
}

/// One request of a log that may lie: which branch it shows, from where, up to which size, and with which proof.
#[derive(Debug, Clone)]
struct Try {
    branch: bool,
    /// The true old size if there is none.
    old: Option<u64>,
    size: u64,
    proof_of: bool,
    broken: bool,
}

fn tries() -> impl Strategy<Value = Vec<Try>> {
    let one = (
        any::<bool>(),
        prop::option::weighted(0.1, 0_u64..24),
        0_u64..24,
        any::<bool>(),
        prop::bool::weighted(0.1),
    );
    let one = one.prop_map(|(branch, old, size, proof_of, broken)| Try {
        branch,
        old,
        size,
        proof_of,
        broken,
    });
    prop::collection::vec(one, 1..24)
}

proptest! {
    /// Two branches of a log, shown in any order and with any proofs: all that is cosigned is of one branch.
    #[test]
    fn what_was_cosigned_is_one_log(common in 0_u64..20, tries in tries()) {
        let branches = [nodes(1, common, 24), nodes(2, common, 24)];
        let mut accepted: Vec<Checkpoint> = Vec::new();
        for one in tries {
            let latest = accepted.last();
            let old = one.old.unwrap_or_else(|| latest.map_or(0, |latest| latest.size));
            let mut request = request(&branches[usize::from(one.branch)], old, one.size);
            if one.proof_of != one.branch {
                let other = &branches[usize::from(one.proof_of)];
                request.path = other.consistency(old, one.size).unwrap_or_default();
            }
            if one.broken && let Some(hash) = request.path.first_mut() {
                hash.0[0] ^= 1;
            }
            if let Ok(checkpoint) = request.decide(&keys(), latest) {
                accepted.push(checkpoint);
            }
        }
        let of = |nodes: &Nodes| accepted.iter().all(|one| nodes.root(one.size) == Some(one.root));
        let [first, second] = &branches;
        prop_assert!(of(first) || of(second), "{accepted:?}");
        for (before, after) in accepted.iter().zip(accepted.iter().skip(1)) {
            prop_assert!(before.size <= after.size);
        }
        let branch = if of(first) { first } else { second };
        for (at, after) in accepted.iter().enumerate() {
            for before in &accepted[..at] {
                let path = branch.consistency(before.size, after.size).unwrap();
                prop_assert!(tree::is_consistent(before.size, before.root, after.size, after.root, &path));
            }
        }
    }

    /// Texts of anybody's making are answered, never a panic.
    #[test]
    fn any_text_is_answered(
        text in "(?s).{0,300}",
        near in "(old|0|1|9| |\n|A{43}=|—|\\+|a){0,40}",
        at in any::<prop::sample::Index>(),
        insert in "[old0-9\n— +=A]{0,3}",
    ) {
        let nodes = nodes(0, 0, 9);
        let good = request(&nodes, 5, 9).to_string();
        let mut at = at.index(good.len());
        while !good.is_char_boundary(at) {
            at -= 1;
        }
        let (cut, changed) = (&good[..at], format!("{}{insert}{}", &good[..at], &good[at..]));
        let latest = checkpoint(&nodes, 5);
        for text in [text.as_str(), near.as_str(), cut, changed.as_str()] {
            let Ok(request) = AddCheckpoint::parse(text) else {
                continue;
            };
            prop_assert_eq!(request.to_string(), text);
            let same = request.statement().is_ok_and(|statement| statement.origin == ORIGIN);
            let answer = request.decide(&keys(), same.then_some(&latest));
            prop_assert!(answer.is_err() || text == good, "{text}");
        }
    }
}
