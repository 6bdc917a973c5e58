//! A witness and a log that asks it, in one process; and witnesses that answer nonsense.

use axum::http::HeaderValue;
use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, SignerKey},
    tree::Nodes,
    witness::AddCheckpoint,
};
use tokio::{sync::oneshot, task::JoinHandle};

use super::*;

pub(super) const ORIGIN: &str = "log.example/a";
pub(super) const NAME: &str = "witness.example/w1";

pub(super) fn log_key(seed: u8) -> SignerKey {
    SignerKey::from_seed(ORIGIN, Kind::Ed25519, &[seed; 32])
}

/// A log of 20 records; those before `common` are the same in every branch.
pub(super) fn nodes(branch: u8, common: u8) -> Nodes {
    let mut nodes = Nodes::default();
    for index in 0..20 {
        let branch = if index < common { 0 } else { branch };
        nodes.push(Hash::leaf(&[branch, index]));
    }
    nodes
}

pub(super) fn checkpoint(nodes: &Nodes, size: u64) -> Checkpoint {
    Checkpoint {
        origin: ORIGIN.to_owned(),
        size,
        root: nodes.root(size).unwrap(),
    }
}

pub(super) fn request(nodes: &Nodes, old: u64, size: u64) -> AddCheckpoint {
    AddCheckpoint {
        old,
        path: nodes.consistency(old, size).unwrap(),
        checkpoint: checkpoint(nodes, size).sign([&log_key(1)]),
    }
}

struct Running {
    witness: Witness,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), StartError>>,
}

async fn start(directory: &Path) -> Running {
    let logs = vec![log_key(1).verifier()];
    drop(Memory::open(directory, NAME, &logs).unwrap());
    let key = verifier_key(directory).unwrap();
    let settings = Settings {
        data: directory.to_owned(),
        name: NAME.to_owned(),
        logs,
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(serve(settings, listener, async move {
        drop(stopped.await);
    }));
    Running {
        witness: format!("http://{address}/ {key}").parse().unwrap(),
        stop,
        task,
    }
}

async fn ask(witness: &Witness, request: AddCheckpoint) -> Result<Cosigned, WitnessError> {
    witness.add(request.old, request.path, &request.checkpoint).await
}

#[tokio::test]
async fn a_log_is_cosigned_as_it_grows_and_its_fork_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let running = start(directory.path()).await;
    let witness = &running.witness;
    let (ours, fork) = (nodes(1, 3), nodes(2, 3));
    for (old, size) in [(0, 4), (4, 4), (4, 9), (9, 20)] {
        let request = request(&ours, old, size);
        let cosigned = ask(witness, request.clone()).await.unwrap();
        let note = request.checkpoint + &cosigned.lines;
        let opened = Checkpoint::open(&note, std::slice::from_ref(witness.key()));
        assert_eq!(opened, Ok(checkpoint(&ours, size)));
        assert_eq!(cosigned.lines.lines().count(), 1);
    }
    assert_eq!(
        ask(witness, request(&ours, 0, 20)).await,
        Err(WitnessError::Conflict { size: 20 })
    );
    let forked = ask(witness, request(&fork, 20, 20)).await.unwrap_err();
    assert!(
        matches!(&forked, WitnessError::Inconsistent(why) if why.starts_with("at size 20 the log had the root ")),
        "{forked}"
    );
    let stranger = SignerKey::from_seed("log.example/b", Kind::Ed25519, &[1; 32]);
    let unknown = Checkpoint {
        origin: "log.example/b".to_owned(),
        ..checkpoint(&ours, 4)
    };
    let refused = witness.add(0, Vec::new(), &unknown.sign([&stranger])).await;
    match refused {
        Err(WitnessError::Refused { status, detail }) => {
            assert_eq!(status, StatusCode::NOT_FOUND);
            assert!(detail.contains("does not know the log"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
    // What cannot be a note is refused by the witness, and nothing here fails.
    let nonsense = witness.add(20, Vec::new(), "nonsense").await.unwrap_err();
    assert!(
        matches!(
            nonsense,
            WitnessError::Refused {
                status: StatusCode::BAD_REQUEST,
                ..
            }
        ),
        "{nonsense}"
    );

    running.stop.send(()).unwrap();
    running.task.await.unwrap().unwrap();
    let gone = ask(witness, request(&ours, 20, 20)).await.unwrap_err();
    assert!(matches!(gone, WitnessError::Unreachable(_)), "{gone}");
}

/// Something that answers each request with the same.
async fn impostor(status: StatusCode, kind: &'static str, body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let kind = HeaderValue::from_static(kind);
    let answer = move || async move { (status, [(header::CONTENT_TYPE, kind)], body) };
    let routes = Router::new().route("/prefix/add-checkpoint", post(answer));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    format!("http://{address}/prefix")
}

#[tokio::test]
async fn answers_that_are_no_cosignature_are_refused() {
    let key = SignerKey::from_seed(NAME, Kind::Cosignature, &[5; 32]);
    let other = SignerKey::from_seed(NAME, Kind::Cosignature, &[6; 32]);
    let ours = nodes(1, 3);
    let text = checkpoint(&ours, 4).to_string();
    let asked = |url: String| {
        let witness: Witness = format!("{url} {}", key.verifier()).parse().unwrap();
        let request = request(&ours, 0, 4);
        async move { ask(&witness, request).await }
    };

    // Lines of keys that nobody knows are left out.
    let (good, unknown) = (key.sign(&text, 1_700_000_000), other.sign(&text, 1_700_000_000));
    let url = impostor(StatusCode::OK, TEXT, format!("{unknown}{good}")).await;
    assert_eq!(asked(url).await, Ok(Cosigned { lines: good.clone() }));

    let elsewhere = checkpoint(&ours, 5).to_string();
    let moved = format!("more\n\n{}", key.sign(&format!("{text}\nmore\n"), 1_700_000_000));
    for body in [
        String::new(),
        "no signature\n".to_owned(),
        unknown.clone(),
        key.sign(&elsewhere, 1_700_000_000),
        // A cosignature states its time.
        key.sign(&text, 0),
        format!("{good}{}", key.sign(&elsewhere, 1_700_000_000)),
        good.trim_end().to_owned(),
        moved,
    ] {
        let url = impostor(StatusCode::OK, TEXT, body.clone()).await;
        assert_eq!(asked(url).await, Err(WitnessError::BadCosignature), "{body:?}");
    }

    const SIZE: &str = "text/x.tlog.size";
    let detail = |detail: &str| WitnessError::Refused {
        status: StatusCode::CONFLICT,
        detail: detail.to_owned(),
    };
    for (kind, body, says) in [
        (SIZE, "7\n", WitnessError::Conflict { size: 7 }),
        (SIZE, "7", detail("7")),
        (SIZE, "-7\n", detail("-7")),
        (SIZE, "18446744073709551616\n", detail("18446744073709551616")),
        (TEXT, "7\n", detail("7")),
        (TEXT, "", detail("it gave no reason")),
        (TEXT, "a\tb\nc", detail("a b")),
    ] {
        let url = impostor(StatusCode::CONFLICT, kind, body.to_owned()).await;
        assert_eq!(asked(url).await, Err(says), "{kind} {body:?}");
    }

    let long = good.repeat(MAX_BODY_BYTES / good.len() + 1);
    let url = impostor(StatusCode::OK, TEXT, long).await;
    let refused = asked(url).await.unwrap_err();
    assert!(matches!(refused, WitnessError::Unreachable(_)), "{refused}");
    let url = impostor(StatusCode::IM_A_TEAPOT, TEXT, "x".repeat(5_000)).await;
    assert_eq!(
        asked(url).await,
        Err(WitnessError::Refused {
            status: StatusCode::IM_A_TEAPOT,
            detail: "x".repeat(500)
        })
    );
}

#[test]
fn a_witness_is_written_as_address_and_key() {
    let key = SignerKey::from_seed(NAME, Kind::Cosignature, &[5; 32]).verifier();
    let witness: Witness = format!(" http://127.0.0.1:7444/  {key} ").parse().unwrap();
    assert_eq!((witness.url(), witness.key()), ("http://127.0.0.1:7444", &key));
    let log = log_key(1).verifier();
    for (text, says) in [
        (String::new(), "write a witness as"),
        ("http://127.0.0.1:7444".to_owned(), "is not an address and a key"),
        (key.to_string(), "is not an address and a key"),
        (
            format!("{key} http://127.0.0.1:7444"),
            "its key is not a verifier key",
        ),
        (format!("127.0.0.1:7444 {key}"), "is not "),
        (format!("http:// {key}"), "is not "),
        (format!("ftp://witness.example {key}"), "is not an address"),
        (format!("http://witness.example/?a=b {key}"), "is not an address"),
        (
            format!("https://witness.example {key}"),
            "with https is not supported yet",
        ),
        (
            "http://127.0.0.1:7444 witness.example/w1+00000000+AAAA".to_owned(),
            "its key is not a verifier key",
        ),
        (
            format!("http://127.0.0.1:7444 {log}"),
            "is the key of a log, not of a witness",
        ),
    ] {
        let refused = text.parse::<Witness>().unwrap_err();
        assert!(refused.contains(says), "{text:?}: {refused}");
    }
}

#[tokio::test]
async fn settings_that_make_no_sense_are_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let other = SignerKey::from_seed(NAME, Kind::Cosignature, &[5; 32]).verifier();
    for (name, log, says) in [
        (
            "a b",
            log_key(1).verifier(),
            "--name \"a b\" cannot stand in a signature",
        ),
        ("", log_key(1).verifier(), "cannot stand in a signature"),
        (NAME, other, "is the key of a witness, not of a log"),
    ] {
        let settings = Settings {
            data: data.clone(),
            name: name.to_owned(),
            logs: vec![log],
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        match serve(settings, listener, std::future::pending()).await {
            Err(StartError::Usage(problem)) => assert!(problem.contains(says), "{problem}"),
            other => panic!("{other:?}"),
        }
        assert!(!data.exists());
    }
}
