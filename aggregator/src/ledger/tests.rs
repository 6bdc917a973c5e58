//! What becomes of a log on disk: written, cut, changed, put back, sealed, signed anew.

use std::{collections::BTreeMap, fs};

use coalmine_judge::{
    note::{Checkpoint, Note},
    record::{RolloutEnd, RolloutStart},
};

use super::*;
use crate::cli::audit;

fn options() -> Options {
    Options {
        name: "test".into(),
        ..Options::default()
    }
}

fn open_with(data: &Path, options: Options) -> Result<Ledger, DiskError> {
    let opened = Ledger::open(data, options, Arc::new(Metrics::new()), |_, _| {})?;
    opened.ledger.begin();
    Ok(opened.ledger)
}

fn open(data: &Path) -> Result<Ledger, DiskError> {
    open_with(data, options())
}

fn append(ledger: &Ledger, body: Body, blobs: Vec<Blob>) -> Result<Appended, AppendError> {
    ledger.submit(body, blobs).blocking_recv().unwrap()
}

fn end(number: u64) -> Body {
    Body::End(RolloutEnd {
        rollout: format!("r-{number}"),
        actor: "test".into(),
        reason: "é \"quoted\" \\ done".into(),
        verdict: "HOLD".into(),
    })
}

/// A record that names a blob.
fn rollout(number: u64) -> (Body, Vec<Blob>) {
    let blob = Blob::pack(format!("policy {number}").as_bytes()).unwrap();
    let start = RolloutStart {
        rollout: format!("r-{number}"),
        key: format!("r-{number}"),
        service: "checkout".into(),
        canary_version: "v2".into(),
        baseline_version: None,
        policy: blob.digest,
        history: None,
        judge: "judge".into(),
        max_windows: 10,
        window_ms: 10_000,
        start_ms: 0,
        actor: "test".into(),
        workload: None,
    };
    (Body::Rollout(start), vec![blob])
}

/// Writes a log of a start, and then rollouts and ends in turn.
fn write(data: &Path, records: u64, options: Options) {
    let ledger = open_with(data, options).unwrap();
    for number in 1..records {
        let (body, blobs) = if number % 2 == 1 {
            rollout(number)
        } else {
            (end(number), Vec::new())
        };
        append(&ledger, body, blobs).unwrap();
    }
    close(ledger);
}

/// Ends the writer, as a process does that ends in order.
fn close(ledger: Ledger) {
    ledger.stop().blocking_recv().unwrap();
}

/// What `coalmine audit verify` finds.
fn problems(data: &Path) -> Vec<String> {
    audit::check(&LedgerFiles::new(data), Vec::new()).problems
}

/// All files of a directory, by name, with their content.
fn content(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut directories = vec![data.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                all.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    all
}

fn put_back(data: &Path, all: &BTreeMap<PathBuf, Vec<u8>>) {
    for path in content(data).keys() {
        fs::remove_file(path).unwrap();
    }
    for (path, bytes) in all {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(content(data), *all);
}

#[test]
fn every_flipped_byte_of_log_checkpoints_and_blobs_is_found_and_the_record_named() {
    let data = tempfile::tempdir().unwrap();
    write(data.path(), 5, options());
    assert_eq!(problems(data.path()), Vec::<String>::new());
    let log = fs::read(data.path().join("decisions.jsonl")).unwrap();
    let ends: Vec<usize> = (0..log.len()).filter(|at| log[*at] == b'\n').collect();
    for (path, bytes) in content(data.path()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        if ["key", ".lock", "reserve"].contains(&name) {
            continue;
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let found = problems(data.path());
            assert!(!found.is_empty(), "{name}, byte {at}");
            if name == "decisions.jsonl" {
                let record = ends.iter().position(|end| at <= *end).unwrap();
                // A record that still is one, with another content, is found by the record after it or by the checkpoint.
                let named =
                    (record..=record + 1).any(|record| found[0].contains(&format!("record {record}")));
                let last = found[0].contains("record 4") || found[0].contains("after record");
                assert!(named || last, "byte {at} of record {record}: {found:?}");
            }
        }
        fs::write(&path, &bytes).unwrap();
    }
    assert_eq!(problems(data.path()), Vec::<String>::new());
}

#[test]
fn a_log_that_is_cut_anywhere_is_found_and_only_an_unanswered_tail_is_set_aside() {
    let data = tempfile::tempdir().unwrap();
    write(data.path(), 4, options());
    let before = content(data.path());
    let path = data.path().join("decisions.jsonl");
    let log = before[&path].clone();
    for cut in 0..log.len() {
        fs::write(&path, &log[..cut]).unwrap();
        assert!(!problems(data.path()).is_empty(), "cut at {cut}");
        assert!(
            open(data.path()).is_err(),
            "what was answered is missing, cut at {cut}"
        );
        put_back(data.path(), &before);
    }
    // A write that was not finished: nobody was answered.
    let half: Vec<u8> = [log.as_slice(), b"{\"body\":{\"actor"].concat();
    fs::write(&path, half).unwrap();
    assert!(problems(data.path())[0].contains("15 bytes after record 3 are no whole record"));
    let ledger = open(data.path()).unwrap();
    let appended = append(&ledger, end(9), Vec::new()).unwrap();
    assert_eq!(appended.record.seq, 5, "a gap and then the record");
    let gap = ledger.read(4).unwrap().unwrap().record.body;
    let Body::Gap { bytes: 15, kept_in } = gap else {
        panic!("{gap:?}")
    };
    assert_eq!(
        fs::read(data.path().join(kept_in)).unwrap(),
        b"{\"body\":{\"actor"
    );
    close(ledger);
    assert_eq!(problems(data.path()), Vec::<String>::new());
}

#[test]
fn lines_that_are_swapped_doubled_or_taken_out_are_found() {
    let data = tempfile::tempdir().unwrap();
    write(data.path(), 5, options());
    let path = data.path().join("decisions.jsonl");
    let log = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    let mut changed = Vec::new();
    for at in 0..lines.len() {
        let mut doubled = lines.clone();
        doubled.insert(at, lines[at]);
        changed.push((at + 1, doubled));
        let mut without = lines.clone();
        without.remove(at);
        changed.push((at, without));
        if at + 1 < lines.len() {
            let mut swapped = lines.clone();
            swapped.swap(at, at + 1);
            changed.push((at, swapped));
        }
    }
    for (first_bad, lines) in changed {
        fs::write(
            &path,
            lines.iter().map(|line| format!("{line}\n")).collect::<String>(),
        )
        .unwrap();
        let found = problems(data.path());
        let named = found[0].contains(&format!("record {first_bad}"));
        let cut = first_bad == 4 && found[0].contains("ends after record 3");
        assert!(named || cut, "{first_bad}: {found:?}");
        assert!(open(data.path()).is_err());
    }
}

#[test]
fn an_older_checkpoint_is_mended_and_an_older_state_is_found_by_whoever_knows_more() {
    let data = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let copy = elsewhere.path().join("checkpoint");
    let copied = || Options {
        checkpoint_copy: Some(copy.clone()),
        ..options()
    };
    write(data.path(), 3, copied());
    let old = content(data.path());
    write(data.path(), 4, copied());
    let known = fs::read_to_string(&copy).unwrap();
    let checkpoint = data.path().join("checkpoint");
    assert_eq!(known, fs::read_to_string(&checkpoint).unwrap());

    // Only the checkpoint: the log tells that it is older, and goes on.
    fs::write(&checkpoint, &old[&checkpoint]).unwrap();
    assert!(problems(data.path())[0].contains("are not covered by the checkpoint"));
    let ledger = open_with(data.path(), copied()).unwrap();
    append(&ledger, end(7), Vec::new()).unwrap();
    assert_eq!(ledger.trouble(), None);
    close(ledger);
    assert_eq!(problems(data.path()), Vec::<String>::new());

    // The whole directory: nothing in it is wrong, and the copy knows better.
    let known = fs::read_to_string(&copy).unwrap();
    put_back(data.path(), &old);
    assert_eq!(problems(data.path()), Vec::<String>::new());
    let against = vec![(copy.clone(), Published::read(&known).unwrap())];
    let found = audit::check(&LedgerFiles::new(data.path()), against.clone()).problems;
    assert!(found[0].contains("the log was cut"), "{found:?}");
    let ledger = open_with(data.path(), copied()).unwrap();
    let trouble = ledger.trouble().unwrap();
    assert!(trouble.contains("an older state of it was put back"), "{trouble}");
    let error = append(&ledger, end(8), Vec::new()).unwrap_err();
    assert!(matches!(error, AppendError::Untrusted(_)), "{error}");
    close(ledger);
    assert_eq!(
        content(data.path())[&data.path().join("decisions.jsonl")],
        old[&data.path().join("decisions.jsonl")]
    );
    assert_eq!(
        fs::read_to_string(&copy).unwrap(),
        known,
        "the copy is not made older"
    );

    // Continued without asking: two histories of the same length and more.
    for number in 20..30 {
        let ledger = open(data.path()).unwrap();
        append(&ledger, end(number), Vec::new()).unwrap();
        close(ledger);
    }
    let found = audit::check(&LedgerFiles::new(data.path()), against).problems;
    assert!(found[0].contains("differs from what the checkpoint"), "{found:?}");
    let ledger = open_with(data.path(), copied()).unwrap();
    let trouble = ledger.trouble().unwrap();
    assert!(
        trouble.contains("are not those that the checkpoint in"),
        "{trouble}"
    );
    assert_eq!(ledger.health.get().0, State::Forked);
    close(ledger);

    // A person decides: a new log that names the old one. A checkpoint that the key here has not signed is none.
    let checkpoint_here = fs::read_to_string(&checkpoint).unwrap();
    let forger =
        coalmine_judge::note::SignerKey::from_seed("test", coalmine_judge::note::Kind::Ed25519, &[3; 32]);
    let (text, _) = checkpoint_here.split_once("\n\n").unwrap();
    fs::write(
        &checkpoint,
        Checkpoint::parse(&format!("{text}\n")).unwrap().sign([&forger]),
    )
    .unwrap();
    let refused = new_log(data.path(), "test/2", "a backup was put back".into()).unwrap_err();
    assert!(
        refused.to_string().contains("is not signed by a known key"),
        "{refused}"
    );
    fs::write(&checkpoint, checkpoint_here).unwrap();
    let aside = new_log(data.path(), "test/2", "a backup was put back".into()).unwrap();
    assert!(aside.join("decisions.jsonl").exists() && aside.join("key").exists());
    assert_eq!(problems(data.path()), Vec::<String>::new());
    let opened = open(data.path()).unwrap();
    let first = opened.read(0).unwrap().unwrap().record;
    let Body::LogStart {
        follows: Some(follows),
        ..
    } = first.body
    else {
        panic!("{first:?}")
    };
    assert_eq!((first.log.as_str(), follows.log.as_str()), ("test/2", "test"));
    let retired = LedgerFiles::new(&aside).scan(|_, _, _| {}).unwrap().chain;
    assert_eq!((follows.size, follows.root), (retired.size(), retired.root()));
    assert_eq!(follows.reason, "a backup was put back");
}

#[test]
fn segments_are_sealed_and_read_as_one_log() {
    let data = tempfile::tempdir().unwrap();
    let small = Options {
        segment_bytes: 2_000,
        ..options()
    };
    let ledger = open_with(data.path(), small.clone()).unwrap();
    let mut hashes = Vec::new();
    for number in 0..40 {
        let appended = append(&ledger, end(number), Vec::new()).unwrap();
        hashes.push((appended.record.seq, appended.hash));
    }
    let segments = LedgerFiles::new(data.path()).segments().unwrap();
    assert!(segments.len() > 3, "{segments:?}");
    for segment in &segments[..segments.len() - 1] {
        assert!(fs::metadata(&segment.path).unwrap().permissions().readonly());
    }
    let reads = |ledger: &Ledger| {
        for (seq, hash) in &hashes {
            assert_eq!(ledger.read(*seq).unwrap().unwrap().hash, *hash);
            let proof = ledger.proof(*seq).unwrap().unwrap();
            let keys = ledger.index().keys.clone();
            assert!(proof.verify(*hash, &keys).is_ok());
        }
    };
    reads(&ledger);
    close(ledger);
    assert_eq!(problems(data.path()), Vec::<String>::new());
    let ledger = open_with(data.path(), small).unwrap();
    reads(&ledger);
    close(ledger);

    // What is missing or no segment is named.
    let middle = &segments[1].path;
    let kept = fs::read(middle).unwrap();
    fs::remove_file(middle).unwrap();
    assert!(problems(data.path())[0].contains("the segment before this one is not there"));
    fs::write(middle, &kept[..kept.len() - 1]).unwrap();
    assert!(problems(data.path())[0].contains("is not whole, and the segment is sealed"));
    let line = kept[..kept.len() - 1]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .unwrap();
    fs::write(middle, &kept[..=line]).unwrap();
    assert!(problems(data.path())[0].contains("its last record does not say so"));
    fs::write(middle, &kept).unwrap();

    // An export is one file with the same bytes.
    let to = tempfile::tempdir().unwrap();
    let exported = export_files(&LedgerFiles::new(data.path()), to.path()).unwrap();
    let joined: Vec<u8> = LedgerFiles::new(data.path())
        .segments()
        .unwrap()
        .iter()
        .flat_map(|segment| fs::read(&segment.path).unwrap())
        .collect();
    assert_eq!(fs::read(to.path().join("decisions.jsonl")).unwrap(), joined);
    let verified = audit::check(&LedgerFiles::new(to.path()), Vec::new());
    assert_eq!(
        (verified.problems, verified.root),
        (Vec::new(), exported.root.to_string())
    );
    assert!(
        export_files(&LedgerFiles::new(data.path()), to.path()).is_err(),
        "nothing is overwritten"
    );
}

#[test]
fn a_crash_between_sealing_and_the_next_segment_leaves_a_log_that_goes_on() {
    let small = || Options {
        segment_bytes: 1_000,
        ..options()
    };
    // Before the rename the current segment ends with its seal; after it there is no current segment.
    for renamed in [false, true] {
        let data = tempfile::tempdir().unwrap();
        let ledger = open_with(data.path(), small()).unwrap();
        let mut number = 0;
        // Until a segment was sealed just now.
        while fs::metadata(data.path().join("decisions.jsonl")).unwrap().len() > 0 || number == 0 {
            number += 1;
            append(&ledger, end(number), Vec::new()).unwrap();
            // The seal comes after the answer, and before the answer to what is asked next.
            drop(append(
                &ledger,
                Body::LogStart {
                    build: String::new(),
                    key: String::new(),
                    follows: None,
                },
                Vec::new(),
            ));
        }
        close(ledger);
        let segments = LedgerFiles::new(data.path()).segments().unwrap();
        let [.., last, current] = segments.as_slice() else {
            panic!("{segments:?}")
        };
        let records = audit::check(&LedgerFiles::new(data.path()), Vec::new()).records;
        fs::remove_file(&current.path).unwrap();
        if !renamed {
            fs::rename(&last.path, &current.path).unwrap();
        }
        assert_eq!(
            audit::check(&LedgerFiles::new(data.path()), Vec::new()).records,
            records
        );
        let ledger = open_with(data.path(), small()).unwrap();
        let appended = append(&ledger, end(100), Vec::new()).unwrap();
        assert!(appended.record.seq >= records);
        close(ledger);
        assert_eq!(problems(data.path()), Vec::<String>::new());
    }
}

#[test]
fn a_key_is_rotated_by_a_record_and_the_old_one_signs_beside_it_for_a_while() {
    let data = tempfile::tempdir().unwrap();
    write(data.path(), 3, options());
    let old = LedgerFiles::new(data.path())
        .scan(|_, _, _| {})
        .unwrap()
        .chain
        .keys()[0]
        .clone();
    let new = rotate_key(data.path(), "yearly".into()).unwrap();
    assert_ne!(old, new);
    assert_eq!(problems(data.path()), Vec::<String>::new());
    let ledger = open(data.path()).unwrap();
    append(&ledger, end(5), Vec::new()).unwrap();
    let note = ledger.checkpoint().unwrap().note;
    for key in [&old, &new] {
        assert!(
            Checkpoint::open(&note, std::slice::from_ref(key)).is_ok(),
            "{key}"
        );
    }
    close(ledger);
    fs::remove_file(data.path().join("key.old")).unwrap();
    let ledger = open(data.path()).unwrap();
    append(&ledger, end(6), Vec::new()).unwrap();
    let note = ledger.checkpoint().unwrap().note;
    assert!(Checkpoint::open(&note, std::slice::from_ref(&old)).is_err());
    assert!(
        Note::parse(&note)
            .unwrap()
            .verify(std::slice::from_ref(&new))
            .is_ok()
    );
    close(ledger);
    assert_eq!(problems(data.path()), Vec::<String>::new());

    // A rotation that ended before the renames, or between them, is finished, and one before its record is forgotten.
    let (key, next) = (data.path().join("key"), data.path().join("key.next"));
    let newest = fs::read(&key).unwrap();
    fs::write(&next, &newest).unwrap();
    fs::write(&key, "PRIVATE+KEY+".to_owned() + "test+00000000+AAAA").unwrap();
    assert!(
        open(data.path()).is_err(),
        "a key that is damaged is not replaced"
    );
    let older =
        coalmine_judge::note::SignerKey::from_seed("test", coalmine_judge::note::Kind::Ed25519, &[4; 32]);
    fs::write(&key, older.to_secret_text()).unwrap();
    close(open(data.path()).unwrap());
    assert!(!next.exists() && fs::read(&key).unwrap() == newest);
    fs::rename(data.path().join("key"), data.path().join("key.next")).unwrap();
    close(open(data.path()).unwrap());
    key::prepare(data.path(), "test").unwrap();
    close(open(data.path()).unwrap());
    assert!(!data.path().join("key.next").exists());

    // The old key alone signs nothing any more.
    let checkpoint = data.path().join("checkpoint");
    fs::remove_file(data.path().join("key")).unwrap();
    let Err(error) = open(data.path()) else {
        panic!("a key was made unasked")
    };
    assert!(error.to_string().contains("gets no other key unasked"), "{error}");
    assert!(checkpoint.exists());
}

#[test]
fn what_no_record_names_is_removed_when_it_is_old() {
    let data = tempfile::tempdir().unwrap();
    write(data.path(), 3, options());
    let blobs = BlobStore::new(data.path());
    let orphan = |text: &str| {
        let blob = Blob::pack(text.as_bytes()).unwrap();
        blobs.write(&blob).unwrap();
        blobs.path(&blob.digest)
    };
    let (old, young) = (orphan("an hour ago"), orphan("now"));
    let temporary = old.with_extension("tmp");
    fs::write(&temporary, b"half").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(7_200);
    let kept: Vec<PathBuf> = content(data.path()).into_keys().collect();
    for path in kept
        .iter()
        .filter(|path| path.starts_with(data.path().join("evidence")) && **path != young)
    {
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
    }
    let ledger = open(data.path()).unwrap();
    // The writer has looked for orphans before it answers.
    append(&ledger, end(5), Vec::new()).unwrap();
    assert!(!old.exists() && !temporary.exists() && young.exists());
    assert_eq!(problems(data.path()), Vec::<String>::new());
}

#[test]
fn silence_is_recorded() {
    let data = tempfile::tempdir().unwrap();
    let ledger = open_with(
        data.path(),
        Options {
            heartbeat: Duration::from_millis(5),
            ..options()
        },
    )
    .unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let beats = (1..).map_while(|seq| ledger.read(seq).unwrap());
        let beats = beats
            .filter(|read| read.record.body.kind() == "heartbeat")
            .count();
        if beats >= 3 && ledger.checkpoint().unwrap().size >= 4 {
            break;
        }
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn a_blob_unpacks_to_no_more_than_it_may() {
    let bomb = zstd::bulk::compress(&vec![b'a'; 1 << 20], 3).unwrap();
    assert!(bomb.len() < 1_000);
    assert_eq!(unpack(&bomb, 1 << 20).unwrap().len(), 1 << 20);
    let error = unpack(&bomb, (1 << 20) - 1).unwrap_err();
    assert!(error.contains("is larger than"), "{error}");
    assert!(unpack(b"no zstd", 100).is_err());
    for cut in 0..bomb.len() {
        assert!(unpack(&bomb[..cut], 1 << 20).is_err(), "cut at {cut}");
    }
}
