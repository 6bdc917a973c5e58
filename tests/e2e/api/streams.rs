//! What holds a connection: a request that comes byte by byte, and streams, which are bounded for each caller and end with
//! the token.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use coalmine_judge::chain::Hash;
use coalmine_tests::{components::Aggregator, eventually, http::get, within};
use serde_json::Value;

use super::{Events, SHORT, connect};

/// So many streams one caller may have.
const MAX_STREAMS: usize = 50;

/// How long a head and a body may take: the server's own time, and some for a slow machine.
const CUT_OFF_WITHIN: Duration = Duration::from_secs(30);

/// What is sent byte by byte, and what comes back of it.
struct Slow {
    stream: TcpStream,
    came: Vec<u8>,
    is_closed: bool,
}

impl Slow {
    fn begin(address: SocketAddr, beginning: &str) -> Self {
        let mut stream = connect(address);
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        stream.write_all(beginning.as_bytes()).unwrap();
        Self {
            stream,
            came: Vec::new(),
            is_closed: false,
        }
    }

    /// Sends one more byte and looks what has come; whether it was cut off.
    fn goes_on(&mut self) -> bool {
        let mut block = [0; 4_096];
        self.is_closed |= self.stream.write_all(b"x").is_err();
        match self.stream.read(&mut block) {
            Ok(0) => self.is_closed = true,
            Ok(read) => self.came.extend_from_slice(&block[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => self.is_closed = true,
        }
        self.is_closed
    }
}

#[test]
fn a_request_that_comes_byte_by_byte_is_cut_off_and_others_are_answered() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let (http, begun) = (aggregator.http, Instant::now());
    let mut head = Slow::begin(
        http,
        &format!("GET /v1/rollouts HTTP/1.1\r\nhost: {http}\r\nx-slow: "),
    );
    let mut body = Slow::begin(
        http,
        &format!(
            "POST /v1/rollouts HTTP/1.1\r\nhost: {http}\r\ncontent-type: application/json\r\ncontent-length: 60000\r\n\r\n"
        ),
    );
    within(CUT_OFF_WITHIN, "both are cut off", || {
        let answer = get(http, "/v1/rollouts").unwrap();
        assert_eq!(answer.status, 200, "others are answered");
        let (head, body) = (head.goes_on(), body.goes_on() || !body.came.is_empty());
        (head && body).then_some(())
    });
    assert!(
        begun.elapsed() >= Duration::from_secs(5),
        "nobody is cut off at once"
    );
    assert!(head.came.is_empty(), "{:?}", String::from_utf8_lossy(&head.came));
    let answer = String::from_utf8_lossy(&body.came).into_owned();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(
        answer.to_ascii_lowercase().contains("application/problem+json"),
        "{answer}"
    );
    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    for series in [
        "coalmine_connections_closed_total{reason=\"silent\"}",
        "coalmine_requests_refused_total{reason=\"too_slow\"}",
    ] {
        assert!(metrics.contains(series), "{series}: {metrics}");
    }
}

/// The head of an answer to whoever wants to watch; the stream stays open with what is given back.
fn watch(address: SocketAddr, path: &str) -> (String, BufReader<TcpStream>) {
    let mut stream = connect(address);
    let head = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
    }
    (head.to_ascii_lowercase(), stream)
}

#[test]
fn a_caller_has_so_many_streams_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let token = format!("cmt_{}", "a".repeat(43));
    fs::write(&file, format!("{} ci gate *\n", Hash::of(token.as_bytes()))).unwrap();
    let tokens = file.to_str().unwrap();
    let aggregator = Aggregator::prepare(directory.path());
    let mut aggregator = aggregator.with_arguments(&["--tokens", tokens, "--anonymous", "gate,rollout"]);
    aggregator.launch();
    let rollout = aggregator.start_rollout();
    let path = format!("/v1/rollouts/{rollout}/watch");
    let mut open: Vec<_> = (0..MAX_STREAMS)
        .map(|_| {
            let (head, stream) = watch(aggregator.http, &path);
            assert!(head.starts_with("http/1.1 200 "), "{head}");
            stream
        })
        .collect();
    let (head, mut body) = watch(aggregator.http, &path);
    assert!(head.starts_with("http/1.1 429 "), "{head}");
    assert!(head.contains("\r\nretry-after: 15\r\n"), "{head}");
    let mut problem = String::new();
    body.read_to_string(&mut problem).unwrap();
    let problem: Value = serde_json::from_str(&problem).unwrap();
    assert!(
        problem["detail"].as_str().unwrap().contains("50 streams"),
        "{problem}"
    );
    // Another caller has its own, and what is given back can be had again.
    let (head, _other) = watch(aggregator.http, &format!("/t/{token}{path}"));
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    open.pop();
    eventually("a place is free again", || {
        let (head, stream) = watch(aggregator.http, &path);
        head.starts_with("http/1.1 200 ").then_some(stream)
    });
}

#[test]
fn a_stream_ends_with_its_token() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let [gone, kept] = ["a", "b"].map(|letter| format!("cmt_{}", letter.repeat(43)));
    let line = |token: &str, rest: &str| format!("{} {rest}\n", Hash::of(token.as_bytes()));
    let rest = line(&kept, "kept gate *");
    fs::write(&file, line(&gone, "gone gate *") + &rest).unwrap();
    let tokens = file.to_str().unwrap();
    let aggregator = Aggregator::prepare_with(directory.path(), SHORT);
    let mut aggregator = aggregator.with_arguments(&["--tokens", tokens, "--anonymous", "rollout"]);
    aggregator.launch();
    let rollout = aggregator.start_rollout();
    let watched = |token: &str| {
        let path = format!("/t/{token}/v1/rollouts/{rollout}/watch");
        Events::at(aggregator.http, &path, None)
    };
    let (mut first, mut second) = (watched(&gone), watched(&kept));
    assert_eq!(first.next().unwrap().kind, "verdict");
    fs::write(&file, &rest).unwrap();
    // It is told nothing more once the token is not known, and its end is no end of the rollout.
    while let Some(event) = first.next() {
        assert_eq!(event.kind, "verdict", "{event:?}");
    }
    second.until("verdict", "verdict", "ROLLBACK");
}
