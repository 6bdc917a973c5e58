//! The program, as it is started.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    aggregator::Aggregator,
    support::{PATIENCE, eventually, read_all},
};

fn run(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coalmine-agent"));
    command
        .args(args)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn the_version_is_printed() {
    for args in [&["--version"][..], &["-V"], &["--agent-version"]] {
        let output = run(args, &[]);
        assert!(output.status.success());
        assert!(output.stdout.starts_with(b"coalmine-agent "), "{output:?}");
    }
}

#[test]
fn bad_usage_ends_with_64_and_one_line() {
    let output = run(&["--service", "shop"], &[("COALMINE_AGENT_WINDOW", "soon")]);
    assert_eq!(output.status.code(), Some(64));
    let text = stderr(&output);
    assert!(
        text.contains("--window") && text.contains("is not a duration"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn connections_are_limited_by_open_files() {
    let mut command = Command::new("sh");
    let script = "ulimit -n 300 && exec \"$0\" --listen=192.0.2.1:1 --aggregator=http://127.0.0.1:1 \
                  --service=shop --version=v2 --arm=canary";
    let output = command
        .args(["-c", script, env!("CARGO_BIN_EXE_coalmine-agent")])
        .output()
        .unwrap();
    let text = stderr(&output);
    assert!(
        text.contains("--max-connections is lowered") && text.contains("max_connections=48"),
        "{text}"
    );
}

/// Runs the program on an address that is taken; gives what it says, and what it must have said.
fn run_on_a_taken_address(log: &str) -> (String, String) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(
        &["--listen", &address, log],
        &[
            ("COALMINE_AGENT_AGGREGATOR", "http://127.0.0.1:1"),
            ("COALMINE_AGENT_SERVICE", "shop"),
            ("COALMINE_AGENT_VERSION", "v2"),
            ("COALMINE_AGENT_ARM", "baseline"),
            ("RUST_LOG", "info"),
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let expected = format!(
        "cannot listen on {address}: address in use; stop the other process or choose another --listen"
    );
    (stderr(&output), expected)
}

#[test]
fn an_address_in_use_ends_with_1_and_says_what_to_do() {
    let (text, expected) = run_on_a_taken_address("--log=text");
    assert!(text.contains(&format!("coalmine-agent: {expected}")), "{text}");
}

/// Each line is an object with a level and a message.
fn objects(text: &str) -> Vec<Value> {
    let objects = text.lines().map(|line| {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(
            object["level"].is_string() && object["message"].is_string(),
            "{line}"
        );
        object
    });
    objects.collect()
}

#[test]
fn in_json_a_start_that_fails_is_an_object_too() {
    let (text, expected) = run_on_a_taken_address("--log=json");
    let objects = objects(&text);
    assert_eq!(
        (&objects[0]["level"], &objects[0]["message"]),
        (&Value::from("INFO"), &Value::from("starting"))
    );
    let last = objects.last().unwrap();
    assert_eq!(last["level"], "ERROR", "{text}");
    assert!(last.to_string().contains(&expected), "{text}");
}

/// A running program; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Whether the admin server answers.
fn is_live(admin: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(admin) else {
        return false;
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = b"GET /livez HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    stream.write_all(request).is_ok()
        && read_all(&mut stream).is_ok_and(|answer| answer.starts_with(b"HTTP/1.1 200"))
}

#[test]
fn in_json_all_lines_are_objects_from_the_start_to_the_end() {
    let aggregator = Aggregator::start();
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [listen, admin] = listeners.map(|listener| listener.local_addr().unwrap());
    let child = Command::new(env!("CARGO_BIN_EXE_coalmine-agent"))
        .arg(format!("--listen={listen}"))
        .arg(format!("--admin={admin}"))
        .arg(format!("--aggregator={}", aggregator.url()))
        .args([
            "--service=shop",
            "--version=v2",
            "--arm=canary",
            "--instance=pod-1",
        ])
        .args(["--window=20ms", "--log=json"])
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut agent = Running(child);
    // Signals are heard before the admin server answers.
    eventually("the agent serves", || is_live(admin));
    eventually("its session is open", || !aggregator.told().hellos.is_empty());
    kill_process(Pid::from_child(&agent.0), Signal::TERM).unwrap();
    eventually("the agent has ended", || agent.0.try_wait().unwrap().is_some());
    assert!(agent.0.wait().unwrap().success());
    // What it says fits into the pipe.
    let mut text = String::new();
    let mut stderr = agent.0.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    let objects = objects(&text);
    let says = |object: &Value, beginning: &str| {
        let message = object["message"].as_str().unwrap();
        message.starts_with(beginning)
    };
    assert!(says(&objects[0], "starting"), "{text}");
    assert_eq!(objects[0]["instance"], "pod-1", "{text}");
    assert!(objects.iter().any(|object| says(object, "stopping: ")), "{text}");
}
