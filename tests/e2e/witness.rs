//! A witness as a process: what it cosigns, what it refuses, and that it forgets nothing.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, Kind, SignerKey, VerifierKey},
    tree::Nodes,
    witness::AddCheckpoint,
};
use coalmine_tests::{
    eventually,
    http::{Answer, get, request},
    process::{Process, coalmine, free_addresses, program, wait_for_listener},
};
use tempfile::TempDir;

const ORIGIN: &str = "log.example/a";
const NAME: &str = "witness.example/w1";
const TEXT: &str = "content-type: text/plain";

struct Scene {
    directory: TempDir,
    address: SocketAddr,
    process: Option<Process>,
}

impl Scene {
    fn start() -> Self {
        let [address] = free_addresses();
        let mut scene = Self {
            directory: tempfile::tempdir().unwrap(),
            address,
            process: None,
        };
        scene.launch();
        scene
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn arguments(&self, name: &str) -> Vec<String> {
        let log = log_key().verifier().to_string();
        let data = self.data().display().to_string();
        let listen = self.address.to_string();
        let flags = [
            "--data", &data, "--name", name, "--listen", &listen, "--log", &log,
        ];
        let all = ["witness", "serve"].into_iter().chain(flags);
        all.map(str::to_owned).collect()
    }

    fn launch(&mut self) {
        let mut command = Command::new(program("coalmine"));
        command.args(self.arguments(NAME));
        let mut process = Process::start(command, &self.directory.path().join("witness.log"));
        wait_for_listener(&mut process, self.address);
        self.process = Some(process);
        eventually("the witness answers", || {
            get(self.address, "/").ok().filter(|answer| answer.status == 200)
        });
    }

    fn said(&self) -> String {
        self.process.as_ref().unwrap().said()
    }

    fn stop(&mut self) {
        assert!(self.process.take().unwrap().terminate().success());
    }

    fn key(&self) -> VerifierKey {
        let output = coalmine(["witness", "key", "--data", &self.data().display().to_string()]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }
}

fn log_key() -> SignerKey {
    SignerKey::from_seed(ORIGIN, Kind::Ed25519, &[1; 32])
}

/// A log whose records are those of every other branch up to `common`.
fn nodes(branch: u8, common: u64, size: u64) -> Nodes {
    let mut nodes = Nodes::default();
    for index in 0..size {
        let branch = if index < common { 0 } else { branch };
        nodes.push(Hash::leaf(format!("{branch}: {index}").as_bytes()));
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

fn grow(nodes: &Nodes, old: u64, size: u64) -> AddCheckpoint {
    AddCheckpoint {
        old,
        path: nodes.consistency(old, size).unwrap(),
        checkpoint: checkpoint(nodes, size).sign([&log_key()]),
    }
}

fn post(address: SocketAddr, body: &str) -> std::io::Result<Answer> {
    request(address, "POST", "/add-checkpoint", &[], body)
}

fn add(address: SocketAddr, asked: &AddCheckpoint) -> Answer {
    post(address, &asked.to_string()).unwrap()
}

fn answers(answer: &Answer, status: u16, kind: &str, says: &str) {
    assert_eq!(answer.status, status, "{}", answer.body);
    assert!(answer.head.to_ascii_lowercase().contains(kind), "{}", answer.head);
    assert!(answer.body.contains(says), "{says:?} is not in {:?}", answer.body);
    assert!(answer.body.ends_with('\n'), "{:?}", answer.body);
}

/// The size that the witness knows of the log, as a log asks for it.
fn known(address: SocketAddr, nodes: &Nodes) -> u64 {
    let conflict = add(address, &grow(nodes, 0, 1));
    answers(&conflict, 409, "content-type: text/x.tlog.size", "");
    conflict.body.trim_end().parse().unwrap()
}

#[test]
fn a_log_is_cosigned_while_it_only_grows() {
    let mut scene = Scene::start();
    let (address, key) = (scene.address, scene.key());
    assert_eq!((key.name(), key.kind()), (NAME, Kind::Cosignature));
    assert!(scene.said().contains(&key.to_string()), "{}", scene.said());
    let about = get(address, "/").unwrap();
    answers(&about, 200, TEXT, &key.to_string());
    assert_eq!(about.body.lines().count(), 1);

    let ours = nodes(1, 0, 40);
    let by_name = "/logs/log.example%2Fa";
    let by_hash = format!("/{}/checkpoint", Hash::of(ORIGIN.as_bytes()));
    for path in [by_name, &by_hash] {
        answers(
            &get(address, path).unwrap(),
            404,
            TEXT,
            "has cosigned no checkpoint",
        );
    }
    for (old, size) in [(0, 0), (0, 7), (7, 7), (7, 8), (8, 40)] {
        let asked = grow(&ours, old, size);
        let answer = add(address, &asked);
        answers(&answer, 200, TEXT, "— witness.example/w1 ");
        let note = asked.checkpoint + &answer.body;
        for key in [key.clone(), log_key().verifier()] {
            assert_eq!(Checkpoint::open(&note, &[key]), Ok(checkpoint(&ours, size)));
        }
        for path in [by_name, &by_hash] {
            let shown = get(address, path).unwrap();
            answers(&shown, 200, TEXT, "");
            assert_eq!(shown.body, note);
        }
    }
    assert_eq!(known(address, &ours), 40);
    // Whoever begins elsewhere is told where to begin, even with a proof that is right.
    answers(
        &add(address, &grow(&ours, 8, 40)),
        409,
        "text/x.tlog.size",
        "40\n",
    );

    // In order or by force: the next process knows what this one has cosigned.
    scene.stop();
    scene.launch();
    assert_eq!(known(address, &ours), 40);
    scene.process.take().unwrap().kill_9();
    scene.launch();
    assert_eq!(known(address, &ours), 40);
    assert_eq!(scene.key(), key);
}

#[test]
fn a_fork_is_refused_and_kept_as_evidence() {
    let scene = Scene::start();
    let address = scene.address;
    let (ours, fork) = (nodes(1, 5, 20), nodes(2, 5, 20));
    let first = add(address, &grow(&ours, 0, 9));
    answers(&first, 200, TEXT, "— ");
    let cosigned = checkpoint(&ours, 9).sign([&log_key()]) + &first.body;

    for (size, says) in [
        (9, "at size 9 the log had the root "),
        (20, "does not show that the log of size 20"),
    ] {
        let forked = grow(&fork, 9, size);
        answers(&add(address, &forked), 422, TEXT, says);
        let root = fork.root(size).unwrap().to_string();
        let hash = Hash::of(ORIGIN.as_bytes());
        let evidence = scene
            .data()
            .join("evidence")
            .join(format!("{hash}-{size}-{}", &root[..8]));
        let notes = fs::read_to_string(&evidence).unwrap();
        assert_eq!(notes, format!("{cosigned}\n{}\n", forked.checkpoint));
        let said = scene.said();
        let complaint = said
            .lines()
            .find(|line| line.contains(&evidence.display().to_string()))
            .unwrap();
        for part in [
            "ERROR",
            "does not continue what was cosigned",
            &checkpoint(&fork, size).to_string().replace('\n', "\\n"),
            &checkpoint(&ours, 9).to_string().replace('\n', "\\n"),
        ] {
            assert!(complaint.contains(part), "{part:?} is not in {complaint}");
        }
    }
    // A proof that somebody has changed.
    let mut changed = grow(&ours, 9, 20);
    changed.path[0].0[0] ^= 1;
    answers(
        &add(address, &changed),
        422,
        TEXT,
        "does not show that the log of size 20",
    );

    // The log itself is not stopped by any of this.
    answers(&add(address, &grow(&ours, 9, 20)), 200, TEXT, "— ");
    assert_eq!(known(address, &ours), 20);
}

#[test]
fn what_is_not_to_be_cosigned_is_refused_with_a_reason() {
    let scene = Scene::start();
    let address = scene.address;
    let ours = nodes(1, 0, 9);
    let good = grow(&ours, 0, 5);
    let with = |checkpoint: String| AddCheckpoint {
        checkpoint,
        ..good.clone()
    };
    let other_log = SignerKey::from_seed("log.example/b", Kind::Ed25519, &[1; 32]);
    let elsewhere = Checkpoint {
        origin: "log.example/b".to_owned(),
        ..checkpoint(&ours, 5)
    };
    let stranger = SignerKey::from_seed(ORIGIN, Kind::Ed25519, &[2; 32]);
    let text = checkpoint(&ours, 5).to_string();
    let forged = log_key().sign(&checkpoint(&ours, 6).to_string(), 0);
    for (body, status, says) in [
        (
            with(elsewhere.sign([&other_log])).to_string(),
            404,
            "does not know the log",
        ),
        (
            with(checkpoint(&ours, 5).sign([&stranger])).to_string(),
            403,
            "is not signed by a known key",
        ),
        (
            with(format!("{text}\n{forged}")).to_string(),
            403,
            "that this key did not make",
        ),
        (
            with(format!("{text}\n{}{forged}", log_key().sign(&text, 0))).to_string(),
            403,
            "that this key did not make",
        ),
        (with(text.clone()).to_string(), 400, "is not a signed note"),
        (String::new(), 400, "no empty line"),
        (
            good.to_string().replacen("old 0", "old 00", 1),
            400,
            "its first line is \"old 00\"",
        ),
        (
            good.to_string().replacen("old 0", "old 6", 1),
            400,
            "its old size is 6, but the checkpoint's is only 5",
        ),
        (
            good.to_string().replacen("old 0\n", "old 0\nAAAA\n", 1),
            400,
            "\"AAAA\" is not a hash",
        ),
        ("x".repeat(100_000), 413, "length limit"),
    ] {
        let answer = post(address, &body).unwrap();
        answers(&answer, status, TEXT, says);
        assert_eq!(answer.body.lines().count(), 1, "{}", answer.body);
    }
    // Nothing was cosigned yet, and none of the above counts.
    let early = add(address, &grow(&ours, 5, 9));
    answers(&early, 409, "content-type: text/x.tlog.size", "");
    assert_eq!(early.body, "0\n");
    let read = get(address, "/add-checkpoint").unwrap();
    answers(&read, 405, TEXT, "does not have that method");
    answers(
        &get(address, "/nowhere").unwrap(),
        404,
        TEXT,
        "there is no such route",
    );
    answers(&add(address, &good), 200, TEXT, "— ");
    assert_eq!(fs::read_dir(scene.data().join("evidence")).unwrap().count(), 0);
}

#[test]
fn what_was_answered_is_known_after_a_crash_at_any_moment() {
    let mut scene = Scene::start();
    let address = scene.address;
    let ours = &nodes(1, 0, 3_000);
    answers(&add(address, &grow(ours, 0, 1)), 200, TEXT, "— ");
    for _ in 0..4 {
        let before = known(address, ours);
        let answered = &AtomicU64::new(before);
        thread::scope(|scope| {
            // A log that grows record by record until the witness is gone.
            scope.spawn(move || {
                for size in before..2_999 {
                    match post(address, &grow(ours, size, size + 1).to_string()) {
                        Ok(answer) if answer.status == 200 => answered.store(size + 1, Ordering::SeqCst),
                        Ok(answer) => panic!("{answer:?}"),
                        Err(_) => return,
                    }
                }
            });
            eventually("the log has grown", || {
                (answered.load(Ordering::SeqCst) >= before + 5).then_some(())
            });
            scene.process.take().unwrap().kill_9();
        });
        scene.launch();
        let (answered, after) = (answered.load(Ordering::SeqCst), known(address, ours));
        assert!(
            after == answered || after == answered + 1,
            "answered {answered}, known {after}"
        );
    }
}

fn fails(output: &Output, code: i32, says: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(says), "{says:?} is not in {said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_witness_that_cannot_be_sure_does_not_start() {
    let mut scene = Scene::start();
    let ours = nodes(1, 0, 9);
    answers(&add(scene.address, &grow(&ours, 0, 9)), 200, TEXT, "— ");
    fails(
        &coalmine(scene.arguments(NAME)),
        1,
        "the port is in use; stop the other process or choose another --listen",
    );
    let [elsewhere] = free_addresses();
    let here = std::mem::replace(&mut scene.address, elsewhere);
    fails(
        &coalmine(scene.arguments(NAME)),
        1,
        "is in use by another process",
    );
    scene.address = here;
    scene.stop();

    fails(
        &coalmine(scene.arguments("witness.example/w2")),
        64,
        "is the key of \"witness.example/w1\"",
    );
    let stored = scene
        .data()
        .join("logs")
        .join(Hash::of(ORIGIN.as_bytes()).to_string());
    let note = fs::read_to_string(&stored).unwrap();
    fs::write(&stored, note.replacen("\n9\n", "\n8\n", 1)).unwrap();
    fails(
        &coalmine(scene.arguments(NAME)),
        1,
        &format!("{}: has a signature in the name of ", stored.display()),
    );
    fs::write(&stored, note).unwrap();
    let key = scene.data().join("key");
    let secret = fs::read_to_string(&key).unwrap();
    fs::remove_file(&key).unwrap();
    fails(
        &coalmine(scene.arguments(NAME)),
        1,
        "gets no other key unasked; restore it from a backup",
    );
    let data = scene.data().display().to_string();
    fails(
        &coalmine(["witness", "key", "--data", &data]),
        64,
        "the first start of `coalmine witness serve` makes one",
    );
    fs::write(&key, secret).unwrap();
    fails(
        &coalmine(["witness", "serve", "--data", &data, "--name", NAME]),
        64,
        "--log <KEY>",
    );
    let witness = scene.key().to_string();
    let other = ["--data", &data, "--name", NAME, "--log", &witness];
    fails(
        &coalmine(
            ["witness", "serve", "--listen", "127.0.0.1:0"]
                .into_iter()
                .chain(other),
        ),
        64,
        "is the key of a witness, not of a log",
    );

    scene.launch();
    assert_eq!(known(scene.address, &ours), 9);
}
