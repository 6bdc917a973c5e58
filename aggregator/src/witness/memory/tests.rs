//! What a witness remembers: nothing is forgotten, nothing is believed that was not written.

use std::{fs, os::unix::fs::PermissionsExt as _, thread};

use coalmine_judge::tree::Nodes;

use super::*;
use crate::witness::tests::{NAME, ORIGIN, checkpoint, log_key, nodes, request};

fn open(directory: &Path) -> Memory {
    Memory::open(directory, NAME, &[log_key(1).verifier()]).unwrap()
}

fn refused(result: Result<String, NotCosigned>) -> Refusal {
    match result {
        Err(NotCosigned::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn add(memory: &Memory, nodes: &Nodes, old: u64, size: u64) -> Result<String, NotCosigned> {
    memory.add(&request(nodes, old, size).to_string())
}

fn stored(directory: &Path) -> PathBuf {
    directory.join("logs").join(hash_of(ORIGIN))
}

/// Why a directory is not opened.
fn says(directory: &Path, name: &str) -> String {
    match Memory::open(directory, name, &[log_key(1).verifier()]) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} is opened", directory.display()),
    }
}

#[test]
fn the_latest_checkpoint_outlives_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let ours = nodes(1, 3);
    let memory = open(directory.path());
    let key = memory.key();
    assert_eq!(memory.latest(ORIGIN), None);
    let line = add(&memory, &ours, 0, 4).unwrap();
    let note = memory.latest(ORIGIN).unwrap();
    assert!(note.ends_with(&line), "{note}");
    for signer in [&key, &log_key(1).verifier()] {
        assert_eq!(
            Checkpoint::open(&note, slice::from_ref(signer)),
            Ok(checkpoint(&ours, 4))
        );
    }
    assert_eq!(memory.latest_by_hash(&hash_of(ORIGIN)), Some(note.clone()));
    assert_eq!(memory.latest("log.example/b"), None);
    assert_eq!(memory.latest_by_hash(ORIGIN), None);
    assert_eq!(fs::read_to_string(stored(directory.path())).unwrap(), note);
    assert!(says(directory.path(), NAME).contains("is in use by another process"));
    drop(memory);

    // What a crash may leave behind is no state.
    fs::write(stored(directory.path()).with_extension("tmp"), "half").unwrap();
    let memory = open(directory.path());
    assert_eq!(memory.key(), key);
    assert_eq!(memory.latest(ORIGIN), Some(note));
    assert_eq!(refused(add(&memory, &ours, 0, 9)), Refusal::Conflict { size: 4 });
    add(&memory, &ours, 4, 9).unwrap();
    drop(memory);

    // A log that is not asked for any more is refused, and remembered for the day when it is again.
    let others = [SignerKey::from_seed("log.example/b", Kind::Ed25519, &[1; 32]).verifier()];
    let memory = Memory::open(directory.path(), NAME, &others).unwrap();
    assert_eq!(refused(add(&memory, &ours, 9, 12)), Refusal::UnknownLog);
    drop(memory);
    // Its key may have been exchanged, and both may be known for a while.
    let keys = [log_key(2).verifier(), log_key(1).verifier()];
    let memory = Memory::open(directory.path(), NAME, &keys).unwrap();
    let mut grown = request(&ours, 9, 12);
    grown.checkpoint = checkpoint(&ours, 12).sign([&log_key(2)]);
    memory.add(&grown.to_string()).unwrap();
    add(&memory, &ours, 12, 13).unwrap();
}

#[test]
fn only_lines_of_the_log_and_the_witness_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let memory = open(directory.path());
    let ours = nodes(1, 3);
    let mut request = request(&ours, 0, 4);
    let own = request.checkpoint.lines().last().unwrap().to_owned();
    let stranger = SignerKey::from_seed("stranger", Kind::Ed25519, &[3; 32]);
    request.checkpoint += &stranger.sign(&checkpoint(&ours, 4).to_string(), 0);
    let line = memory.add(&request.to_string()).unwrap();
    let note = memory.latest(ORIGIN).unwrap();
    assert_eq!(note, format!("{}\n{own}\n{line}", checkpoint(&ours, 4)));
}

#[test]
fn a_note_that_could_not_be_read_again_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let memory = open(directory.path());
    let ours = nodes(1, 3);
    let sized = |bytes: usize| {
        let mut text = checkpoint(&ours, 4).to_string();
        let rest = text.len() + 1 + log_key(1).sign(&text, 0).len();
        text.push_str(&"x".repeat(bytes - rest - 1));
        text.push('\n');
        let note = format!("{text}\n{}", log_key(1).sign(&text, 0));
        assert_eq!(note.len(), bytes);
        let mut request = request(&ours, 0, 4);
        request.checkpoint = note;
        request.to_string()
    };
    let refusal = refused(memory.add(&sized((64 << 10) - 5)));
    assert_eq!(refusal.status(), 400, "{refusal}");
    assert!(refusal.to_string().contains("with the cosignature"), "{refusal}");
    assert_eq!(memory.latest(ORIGIN), None);
    memory.add(&sized(60 << 10)).unwrap();
    drop(memory);
    assert!(open(directory.path()).latest(ORIGIN).is_some());
}

#[test]
fn of_many_requests_from_the_same_size_one_is_cosigned() {
    let directory = tempfile::tempdir().unwrap();
    let memory = &open(directory.path());
    // Different logs at the beginning, then one log that grows to different sizes.
    let won = thread::scope(|scope| {
        let asked: Vec<_> = (1..=12)
            .map(|branch| scope.spawn(move || add(memory, &nodes(branch, 0), 0, 5)))
            .collect();
        let answers = asked.into_iter().map(|asked| asked.join().unwrap());
        answers.filter(Result::is_ok).count()
    });
    assert_eq!(won, 1);
    let latest = || Checkpoint::open(&memory.latest(ORIGIN).unwrap(), &[memory.key()]).unwrap();
    let branch = (1..=12).find(|branch| latest() == checkpoint(&nodes(*branch, 0), 5));
    let ours = &nodes(branch.unwrap(), 0);
    let sizes: Vec<u64> = thread::scope(|scope| {
        let asked: Vec<_> = (6..=17)
            .map(|size| scope.spawn(move || (size, add(memory, ours, 5, size))))
            .collect();
        let answers = asked.into_iter().map(|asked| asked.join().unwrap());
        answers
            .filter_map(|(size, answer)| match answer {
                Ok(_) => Some(size),
                Err(NotCosigned::Refused(Refusal::Conflict { .. })) => None,
                Err(other) => panic!("{other:?}"),
            })
            .collect()
    });
    assert_eq!(sizes, [latest().size]);
}

#[test]
fn a_fork_is_kept_once_with_what_was_cosigned() {
    let directory = tempfile::tempdir().unwrap();
    let memory = open(directory.path());
    let (ours, fork) = (nodes(1, 3), nodes(2, 3));
    add(&memory, &ours, 0, 6).unwrap();
    let kept = || {
        let entries = fs::read_dir(directory.path().join("evidence")).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    // A proof that is only wrong is evidence of nothing.
    let mut wrong = request(&ours, 6, 6);
    wrong.path.push(Hash::ZERO);
    assert_eq!(refused(memory.add(&wrong.to_string())).status(), 422);
    assert_eq!(kept(), Vec::<PathBuf>::new());

    for _ in 0..2 {
        assert_eq!(refused(add(&memory, &fork, 6, 6)).status(), 422);
        let root = fork.root(6).unwrap().to_string();
        let name = format!("{}-6-{}", hash_of(ORIGIN), &root[..8]);
        assert_eq!(kept(), [directory.path().join("evidence").join(name)]);
        let notes = fs::read_to_string(&kept()[0]).unwrap();
        let refused = checkpoint(&fork, 6).sign([&log_key(1)]);
        assert_eq!(notes, format!("{}\n{refused}\n", memory.latest(ORIGIN).unwrap()));
    }
    assert_eq!(refused(add(&memory, &fork, 6, 9)).status(), 422);
    assert_eq!(kept().len(), 2);
    // What nobody has signed is not kept, and the log itself goes on.
    let mut forged = request(&fork, 6, 7);
    forged.checkpoint = checkpoint(&fork, 7).sign([&log_key(9)]);
    assert_eq!(refused(memory.add(&forged.to_string())).status(), 403);
    assert_eq!(kept().len(), 2);
    add(&memory, &ours, 6, 9).unwrap();
}

#[test]
fn a_changed_directory_is_refused_by_the_name_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    let memory = open(data);
    add(&memory, &nodes(1, 3), 0, 6).unwrap();
    let own = memory.key();
    let note = memory.latest(ORIGIN).unwrap();
    drop(memory);

    let path = stored(data);
    let shown = path.display().to_string();
    let known = [log_key(1).verifier()];
    assert!(read_note(&note, &own, &known).is_ok());
    let text = checkpoint(&nodes(1, 3), 6).to_string();
    let own_line = note.rfind("— ").unwrap();
    for at in (0..text.len()).chain(own_line..note.len()) {
        for bit in 0..8 {
            let mut bad = note.clone().into_bytes();
            bad[at] ^= 1 << bit;
            if let Ok(bad) = String::from_utf8(bad) {
                assert!(
                    read_note(&bad, &own, &known).is_err(),
                    "byte {at}, bit {bit}: {bad}"
                );
            }
        }
    }
    let unsigned = checkpoint(&nodes(1, 3), 6).sign([&log_key(1)]);
    for (content, problem) in [
        (note.replacen("\n6\n", "\n5\n", 1), "that this key did not make"),
        (unsigned, "is not cosigned by witness.example/w1+"),
        (note[..note.len() - 1].to_owned(), "does not end with a newline"),
        (String::new(), "is not a signed note"),
    ] {
        fs::write(&path, content).unwrap();
        let said = says(data, NAME);
        assert!(said.starts_with(&shown) && said.contains(problem), "{said}");
        assert!(said.contains("restore it, or move it away"), "{said}");
    }
    fs::write(&path, b"\xff\n\n").unwrap();
    assert!(says(data, NAME).contains("is not UTF-8"));
    let other = data.join("logs").join(hash_of("log.example/b"));
    fs::write(&path, &note).unwrap();
    fs::write(&other, &note).unwrap();
    let said = says(data, NAME);
    assert!(said.starts_with(&other.display().to_string()), "{said}");
    assert!(said.contains("whose file has another name"), "{said}");
    fs::remove_file(&other).unwrap();
    assert_eq!(open(data).latest(ORIGIN), Some(note));
}

#[test]
fn the_key_is_made_once() {
    let directory = tempfile::tempdir().unwrap();
    let data = &directory.path().join("new/data");
    assert!(read_key(data).unwrap().is_none());
    let key = open(data).key();
    assert_eq!((key.name(), key.kind()), (NAME, Kind::Cosignature));
    let path = data.join("key");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(read_key(data).unwrap().unwrap().verifier(), key);
    assert!(says(data, "witness.example/w2").contains("is the key of \"witness.example/w1\""));
    let secret = fs::read_to_string(&path).unwrap();

    // Nothing was cosigned yet: another key harms nobody.
    fs::remove_file(&path).unwrap();
    assert_ne!(open(data).key(), key);
    fs::write(&path, &secret).unwrap();
    add(&open(data), &nodes(1, 3), 0, 6).unwrap();
    fs::remove_file(&path).unwrap();
    let said = says(data, NAME);
    assert!(said.starts_with(&path.display().to_string()), "{said}");
    assert!(
        said.contains("is missing, and a witness that has cosigned already gets no other key"),
        "{said}"
    );
    assert!(!path.exists());

    for (content, problem) in [
        (secret[..secret.len() - 3].to_owned(), "is not a signing key"),
        (log_key(1).to_secret_text(), "is a key that signs a log"),
    ] {
        fs::write(&path, &content).unwrap();
        let said = says(data, log_key(1).verifier().name());
        assert!(said.contains(problem), "{said}");
        assert!(!said.contains(content.trim_end()), "{said}");
    }
}
