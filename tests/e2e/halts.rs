//! What a verdict does outside, where there is no cluster: a webhook of the user's own.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::Command,
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use coalmine_tests::{components::Aggregator, eventually, process::coalmine};
use serde_json::Value;

/// A request as it came.
struct Post {
    line: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Post {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map_or("", |(_, value)| value)
    }
}

/// Reads one request of each connection and answers with the next status, then with 204.
fn receiver(statuses: &'static [u16]) -> (String, Receiver<Post>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hooks/coalmine", listener.local_addr().unwrap());
    let (told, posts) = mpsc::channel();
    thread::spawn(move || {
        let mut statuses = statuses.iter();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                match line.trim_end() {
                    "" => break,
                    line => lines.push(line.to_owned()),
                }
            }
            let headers = lines[1..].iter().filter_map(|line| line.split_once(": "));
            let mut post = Post {
                line: lines[0].clone(),
                headers: headers
                    .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                    .collect(),
                body: Vec::new(),
            };
            post.body = vec![0; post.header("content-length").parse().unwrap()];
            reader.read_exact(&mut post.body).unwrap();
            let status = statuses.next().unwrap_or(&204);
            write!(
                stream,
                "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            .unwrap();
            if told.send(post).is_err() {
                return;
            }
        }
    });
    (url, posts)
}

#[test]
fn each_verdict_is_posted_once_and_signed_and_shown() {
    const SECRET: &str = "between you and me";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let key = path.join("key");
    fs::write(&key, SECRET).unwrap();
    // What fails for the moment is tried again under the same key.
    let (url, posts) = receiver(&[503]);
    let arguments = [
        "--halt-webhook",
        &url,
        "--halt-webhook-key",
        key.to_str().unwrap(),
    ];
    let mut aggregator = Aggregator::prepare(path).with_arguments(&arguments);
    aggregator.launch();
    // Without an agent it holds.
    let rollout = aggregator.start_rollout();
    let next = || posts.recv_timeout(Duration::from_secs(60)).unwrap();
    let (first, second) = (next(), next());
    for post in [&first, &second] {
        assert_eq!(post.line, "POST /hooks/coalmine HTTP/1.1");
        let said: Value = serde_json::from_slice(&post.body).unwrap();
        assert_eq!(said["verdict"], "HOLD", "{said}");
        assert_eq!(said["rollout"], rollout.as_str());
        assert_eq!(said["decision"], post.header("idempotency-key"));
        // Somebody else's program has the last word on the signature.
        let body = path.join("body");
        fs::write(&body, &post.body).unwrap();
        let output = Command::new("openssl")
            .args(["dgst", "-sha256", "-hmac", SECRET, "-r"])
            .arg(&body)
            .output()
            .unwrap();
        let hash = String::from_utf8(output.stdout).unwrap();
        let hash = hash.split(' ').next().unwrap();
        assert_eq!(post.header("x-coalmine-signature"), format!("sha256={hash}"));
    }
    assert_eq!(first.header("idempotency-key"), second.header("idempotency-key"));

    let stages = || {
        let view = aggregator.get(&format!("/v1/rollouts/{rollout}"));
        let actuations = view["actuations"].as_array().unwrap().clone();
        actuations
            .iter()
            .map(|actuation| actuation["stage"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    eventually("it is on record, before and after", || {
        (stages() == ["begun", "failed", "done"]).then_some(())
    });
    let server = format!("http://{}", aggregator.http);
    let status = coalmine(["rollout", "status", &rollout, "--server", &server]);
    let said = String::from_utf8(status.stdout).unwrap();
    assert!(said.contains("outside    webhook: hold done"), "{said}");
    assert!(posts.try_recv().is_err(), "it is posted a third time");
}
