//! The demonstration as a user runs it, its data, and what the README quotes of it.

use std::{fs, path::Path, process::Command};

use coalmine_tests::{
    process::{coalmine, release_program, repository},
    tools::tool,
};
use serde_json::Value;

use crate::stage;

fn demo(data: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(release_program("coalmine"));
    command.arg("demo").arg("--data").arg(data).args(arguments);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.stderr.is_empty() || arguments.contains(&"json"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.code(), said)
}

/// A line without what differs from run to run: numbers, hashes, paths, and the width of columns.
fn shape(line: &str) -> String {
    let words = line.split_whitespace().map(|word| {
        let hex = word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
        match word {
            _ if hex => "HASH".to_owned(),
            _ if word.ends_with("/coalmine") => "coalmine".to_owned(),
            _ if word.contains("coalmine-demo") || word.starts_with('/') => "DIR".to_owned(),
            _ => word
                .chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect::<String>(),
        }
    });
    let text = words.collect::<Vec<_>>().join(" ");
    let mut shape = String::new();
    for c in text.chars() {
        if c != '0' || !shape.ends_with('0') {
            shape.push(c);
        }
    }
    shape
}

/// The parts of the demonstration's output that are the same in every run.
fn skeleton(output: &str) -> Vec<String> {
    // The README leaves rows out where three dots stand.
    let lines = output
        .lines()
        .filter(|line| !line.trim().is_empty() && *line != "...");
    let mut skeleton: Vec<String> = lines
        .map(|line| match line.split_whitespace().next() {
            Some("reason") => "reason".to_owned(),
            // A row of the table.
            Some(first)
                if first.ends_with('s') && first[..first.len() - 1].bytes().all(|b| b.is_ascii_digit()) =>
            {
                "row".to_owned()
            }
            _ => shape(line),
        })
        .collect();
    skeleton.dedup();
    skeleton
}

#[test]
fn the_demonstration_rolls_back_and_every_flipped_byte_of_its_data_is_found() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("coalmine-demo");
    let (code, said) = demo(&data, &[]);
    assert_eq!(code, Some(0), "{said}");

    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let quoted = readme
        .split("```")
        .find(|block| block.contains("Coalmine demo: "))
        .expect("README quotes the demo");
    let quoted: String = quoted
        .lines()
        .skip_while(|line| !line.starts_with("Coalmine demo: "))
        .collect::<Vec<_>>()
        .join("\n");
    assert_eq!(
        skeleton(&quoted),
        skeleton(&said),
        "the README's output is not that of the demo"
    );

    let check = |arguments: &[&str]| {
        let mut all = arguments.to_vec();
        let data = data.display().to_string();
        all.extend(["--data", &data]);
        let output = coalmine(all);
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    assert_eq!(check(&["replay", "--all"]).0, Some(0));
    assert_eq!(check(&["audit", "verify"]).0, Some(0));

    provable(&data);

    // A byte of each kind of place: every record at several positions, the newlines, the checkpoint, every blob.
    let log = data.join("decisions.jsonl");
    let whole = fs::read(&log).unwrap();
    let lines = whole.iter().filter(|byte| **byte == b'\n').count();
    let step = whole.len() / 80;
    let newlines = whole
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .map(|(at, _)| at);
    for at in (0..whole.len())
        .step_by(step)
        .chain(newlines.step_by(7))
        .chain([whole.len() - 1, whole.len() - 2])
    {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        fs::write(&log, bad).unwrap();
        let (code, said) = check(&["audit", "verify"]);
        assert_eq!(code, Some(1), "byte {at} of {lines} records: {said}");
        assert!(said.contains("record "), "byte {at}: {said}");
    }
    fs::write(&log, &whole[..whole.len() - 100]).unwrap();
    assert_eq!(check(&["audit", "verify"]).0, Some(1), "a log that was cut");
    fs::write(&log, &whole).unwrap();

    for blob in blobs(&data.join("evidence")) {
        let whole = fs::read(&blob).unwrap();
        for at in [0, 5, whole.len() / 2, whole.len() - 1] {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&blob, bad).unwrap();
            let (code, said) = check(&["audit", "verify"]);
            assert!(
                code == Some(1) && said.contains("record "),
                "{}: byte {at}: {said}",
                blob.display()
            );
        }
        let (code, said) = check(&["replay", "--all"]);
        assert!(
            code == Some(1) && said.contains("record "),
            "{}: {said}",
            blob.display()
        );
        fs::write(&blob, whole).unwrap();
    }
    assert_eq!(check(&["audit", "verify"]).0, Some(0));
}

/// What somebody can check who has only Python, or only a proof and the key.
fn provable(data: &Path) {
    let directory = data.display().to_string();
    let python = tool("python3", "python3-minimal");
    let verifier = repository().join("deploy/examples/verify.py");
    let run = || {
        let output = Command::new(&python).arg(&verifier).arg(data).output().unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (good, said) = run();
    assert!(good && said.contains("records"), "{said}");

    let verified = coalmine(["audit", "verify", "--data", &directory, "--output", "json"]);
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    let key = verified["key"].as_str().unwrap();
    let wrong = "other.example+00f5c00d+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k";
    let refused = coalmine(["audit", "verify", "--data", &directory, "--key", wrong]);
    assert_eq!(refused.status.code(), Some(64), "a key whose id is wrong");
    let stranger = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k";
    let refused = coalmine(["audit", "verify", "--data", &directory, "--key", stranger]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stdout).unwrap();
    assert!(
        said.contains("record 0") && said.contains("written anew"),
        "{said}"
    );
    let accepted = coalmine(["audit", "verify", "--data", &directory, "--key", key]);
    assert_eq!(accepted.status.code(), Some(0));

    let whole = fs::read(data.join("decisions.jsonl")).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let id = |line: &[u8]| -> Option<String> {
        let record: Value = serde_json::from_slice(line).unwrap();
        (record["body"]["type"] == "decision").then(|| record["body"]["id"].as_str().unwrap().to_owned())
    };
    let decision = lines.iter().find_map(|line| id(line)).unwrap();
    let proof = coalmine(["audit", "proof", &decision, "--data", &directory]);
    assert_eq!(proof.status.code(), Some(0));
    let proof = String::from_utf8(proof.stdout).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let check = |proof: &str, key: &str| {
        fs::write(file.path(), proof).unwrap();
        coalmine(["audit", "check", &file.path().display().to_string(), "--key", key])
    };
    let checked = check(&proof, key);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success() && said.contains(&decision), "{said}");
    assert_eq!(check(&proof, stranger).status.code(), Some(1));
    for at in (0..proof.len()).step_by(proof.len() / 60) {
        let mut bad = proof.clone().into_bytes();
        bad[at] ^= 1;
        if let Ok(bad) = String::from_utf8(bad) {
            assert_eq!(check(&bad, key).status.code(), Some(1), "byte {at}: {bad}");
        }
    }

    // The checkpoint's own bytes, two lines swapped, one doubled, one left out.
    let checkpoint = data.join("checkpoint");
    let note = fs::read(&checkpoint).unwrap();
    let verify = || coalmine(["audit", "verify", "--data", &directory]);
    for at in 0..note.len() {
        let mut bad = note.clone();
        bad[at] ^= 1;
        fs::write(&checkpoint, bad).unwrap();
        let output = verify();
        assert_eq!(output.status.code(), Some(1), "byte {at} of the checkpoint");
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("checkpoint"),
            "byte {at}"
        );
    }
    fs::write(&checkpoint, &note).unwrap();
    let log = data.join("decisions.jsonl");
    let (mut swapped, mut doubled, mut shorter) = (lines.clone(), lines.clone(), lines.clone());
    swapped.swap(2, 3);
    doubled.insert(3, lines[2]);
    shorter.remove(2);
    for (bad, first) in [(swapped, 2), (doubled, 3), (shorter, 2)] {
        fs::write(&log, bad.concat()).unwrap();
        let output = verify();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains(&format!("record {first}:")), "{said}");
        let (good, said) = run();
        assert!(!good && said.contains(&format!("record {first}:")), "{said}");
    }
    fs::write(&log, whole).unwrap();
}

fn blobs(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = |directory: &Path| {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    entries(directory)
        .flat_map(|prefix| entries(&prefix).collect::<Vec<_>>())
        .collect()
}

#[test]
fn the_healthy_demonstration_is_approved_and_leaves_no_process() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let (code, said) = demo(&directory.path().join("data"), &["--healthy", "--output", "json"]);
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        (&last["verdict"], &last["worst_tenant"]),
        (&"APPROVE".into(), &Value::Null)
    );
    for field in ["decision_id", "score_ppm", "seconds"] {
        assert!(!last[field].is_null(), "{last}");
    }
    nothing_runs_in(directory.path());
}

#[test]
fn a_demonstration_that_is_kept_answers_until_ctrl_c_and_ends_with_its_result() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("demo.log");
    let mut command = Command::new(release_program("coalmine"));
    command
        .args(["demo", "--healthy", "--keep", "--output", "json", "--data"])
        .arg(directory.path().join("data"));
    let mut demo = coalmine_tests::process::Process::start(command, &log);
    let said = coalmine_tests::eventually("the demo says that it goes on", || {
        Some(demo.said()).filter(|said| said.contains("until Ctrl-C"))
    });
    let running = said.lines().find(|line| line.starts_with("running")).unwrap();
    let (server, rollout) = (word_after(running, "API"), word_after(running, "rollout"));
    let ask = |arguments: &[&str]| {
        let output = coalmine(arguments.iter().copied().chain(["--server", server]));
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, list) = ask(&["rollout", "list"]);
    assert!(
        code == Some(0) && list.contains(rollout) && list.contains("APPROVE"),
        "{list}"
    );
    let (code, status) = ask(&["rollout", "status", rollout]);
    assert!(
        code == Some(0) && status.contains("agent      canary-3 canary v2 connected"),
        "{status}"
    );
    let (code, gate) = ask(&["gate", rollout]);
    // One failure that belongs to the healthy demonstration takes a little off the score.
    assert!(
        code == Some(0) && (gate.starts_with("APPROVE 1.000") || gate.starts_with("APPROVE 0.9")),
        "{gate}"
    );
    let (code, explained) = ask(&["explain", word_after(&status, "decision")]);
    assert!(
        code == Some(0) && explained.contains("calculate_rollout_health_score"),
        "{explained}"
    );
    let (code, ended) = ask(&["rollout", "end", rollout]);
    assert!(code == Some(0) && ended.starts_with("ended at "), "{ended}");

    demo.signal(rustix::process::Signal::INT);
    let status = coalmine_tests::eventually("the demo ends after Ctrl-C", || demo.ended());
    assert_eq!(status.code(), Some(0), "{}", demo.said());
    let said = demo.said();
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(last["verdict"], "APPROVE");
    assert!(directory.path().join("data/decisions.jsonl").is_file());
    nothing_runs_in(directory.path());
}

fn word_after<'a>(text: &'a str, word: &str) -> &'a str {
    text.split_whitespace()
        .skip_while(|found| *found != word)
        .nth(1)
        .unwrap()
}

#[test]
fn breaking_off_the_demonstration_leaves_nothing_behind() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("demo.log");
    let mut command = Command::new(release_program("coalmine"));
    command
        .args(["demo", "--data"])
        .arg(directory.path().join("data"));
    let mut demo = coalmine_tests::process::Process::start(command, &log);
    coalmine_tests::eventually("the table begins", || demo.said().contains("HOLD").then_some(()));
    demo.signal(rustix::process::Signal::INT);
    coalmine_tests::eventually("the demo ends after Ctrl-C", || demo.ended());
    nothing_runs_in(directory.path());
}

/// No process has the directory in its command line.
fn nothing_runs_in(directory: &Path) {
    let pgrep = tool("pgrep", "procps");
    coalmine_tests::eventually("all processes of the demo are gone", || {
        let output = Command::new(&pgrep).arg("-f").arg(directory).output().unwrap();
        (!output.status.success()).then_some(())
    });
}
