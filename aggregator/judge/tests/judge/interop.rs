//! Trees, proofs and signed notes are those of other people's programs: `tlog_tiles` and `signed_note`, both ways.

use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, Kind, Note, SignerKey, VerifierKey},
    tree::{self, Nodes},
};
use proptest::prelude::*;
use signed_note::{StandardSigner, StandardVerifier, Verifier as _, VerifierList};
use tlog_tiles::tlog;

/// The other program's tree.
#[derive(Default)]
struct Theirs {
    hashes: Vec<tlog::Hash>,
}

impl tlog::HashReader for Theirs {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<tlog::Hash>, tlog::Error> {
        Ok(indexes.iter().map(|index| self.hashes[*index as usize]).collect())
    }
}

fn ours(hashes: &[tlog::Hash]) -> Vec<Hash> {
    hashes.iter().map(|hash| Hash(hash.0)).collect()
}

fn theirs(hashes: &[Hash]) -> Vec<tlog::Hash> {
    hashes.iter().map(|hash| tlog::Hash(hash.0)).collect()
}

fn grow(leaves: &[Vec<u8>]) -> (Nodes, Theirs) {
    let (mut nodes, mut other) = (Nodes::default(), Theirs::default());
    for (index, leaf) in leaves.iter().enumerate() {
        nodes.push(Hash::leaf(leaf));
        let stored = tlog::stored_hashes(index as u64, leaf, &other).unwrap();
        other.hashes.extend(stored);
    }
    (nodes, other)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn trees_and_proofs_are_the_same_bytes(
        leaves in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..150),
        at in any::<prop::sample::Index>(),
        flip in any::<prop::sample::Index>(),
    ) {
        let (nodes, other) = grow(&leaves);
        let size = leaves.len() as u64;
        let root = nodes.root(size).unwrap();
        prop_assert_eq!(root, Hash(tlog::tree_hash(size, &other).unwrap().0));

        let index = at.index(leaves.len()) as u64;
        let path = nodes.inclusion(index, size).unwrap();
        prop_assert_eq!(&path, &ours(&tlog::prove_record(size, index, &other).unwrap()));
        let leaf = Hash::leaf(&leaves[index as usize]);
        let check = |path: &[Hash]| {
            let said = tlog::check_record(&theirs(path), size, tlog::Hash(root.0), index, tlog::Hash(leaf.0));
            (said.is_ok(), tree::root_of_inclusion(index, size, leaf, path) == Some(root))
        };
        prop_assert_eq!(check(&path), (true, true));
        if !path.is_empty() {
            let mut bad = path.clone();
            bad[flip.index(path.len())].0[7] ^= 16;
            prop_assert_eq!(check(&bad), (false, false));
            prop_assert_eq!(check(&path[1..]), (false, false));
        }

        let old = index + 1;
        let path = nodes.consistency(old, size).unwrap();
        prop_assert_eq!(&path, &ours(&tlog::prove_tree(size, old, &other).unwrap()));
        let old_root = nodes.root(old).unwrap();
        let check = |path: &[Hash]| {
            let said = tlog::check_tree(&theirs(path), size, tlog::Hash(root.0), old, tlog::Hash(old_root.0));
            (said.is_ok(), tree::is_consistent(old, old_root, size, root, path))
        };
        prop_assert_eq!(check(&path), (true, true));
        if !path.is_empty() {
            let mut bad = path.clone();
            bad[flip.index(path.len())].0[7] ^= 16;
            prop_assert_eq!(check(&bad), (false, false));
        }
    }

    #[test]
    fn each_reads_what_the_other_has_signed(
        seed in any::<[u8; 32]>(),
        name in "[a-z]{1,8}(\\.[a-z]{2,5})?(/[a-z0-9-]{1,8})?",
        size in any::<u64>(),
        root in any::<[u8; 32]>(),
        flip in any::<prop::sample::Index>(),
    ) {
        let key = SignerKey::from_seed(&name, Kind::Ed25519, &seed);
        let vkey = key.verifier().to_string();
        let verifier = StandardVerifier::new(&vkey).unwrap();
        prop_assert_eq!(verifier.name(), name.as_str());
        let known = VerifierList::new(vec![Box::new(verifier)]);
        let checkpoint = Checkpoint { origin: name.clone(), size, root: Hash(root) };

        let text = checkpoint.to_string();
        let read = tlog_tiles::checkpoint::Checkpoint::from_bytes(text.as_bytes()).unwrap();
        prop_assert_eq!((read.origin(), read.size(), read.hash().0), (name.as_str(), size, root));
        prop_assert_eq!(read.to_bytes(), text.clone().into_bytes());

        let signed = checkpoint.sign([&key]);
        let note = signed_note::Note::from_bytes(signed.as_bytes()).unwrap();
        prop_assert!(note.verify(&known).is_ok());

        let signer = StandardSigner::new(key.to_secret_text().trim_end()).unwrap();
        let mut note = signed_note::Note::new(text.as_bytes(), &[]).unwrap();
        note.add_sigs(&[&signer]).unwrap();
        // Ed25519 is deterministic: the two notes are one.
        prop_assert_eq!(String::from_utf8(note.to_bytes()).unwrap(), signed.clone());

        // Of a changed note both say the same, unless we are stricter on the form.
        let mut bad = signed.into_bytes();
        let at = flip.index(bad.len());
        bad[at] ^= 1;
        if let Ok(bad) = String::from_utf8(bad) {
            let keys = [VerifierKey::parse(&vkey).unwrap()];
            let we_accept = Note::parse(&bad).and_then(|note| note.verify(&keys).map(drop)).is_ok();
            let they_accept = signed_note::Note::from_bytes(bad.as_bytes()).is_ok_and(|note| note.verify(&known).is_ok());
            prop_assert!(!we_accept && !they_accept, "{}", bad);
        }
    }
}
