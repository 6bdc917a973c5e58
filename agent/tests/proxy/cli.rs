//! The program, as it is started.

use std::process::{Command, Output};

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
    let script = "ulimit -n 100 && exec \"$0\" --listen=192.0.2.1:1 --aggregator=http://127.0.0.1:1 \
                  --service=shop --version=v2 --arm=canary";
    let output = command
        .args(["-c", script, env!("CARGO_BIN_EXE_coalmine-agent")])
        .output()
        .unwrap();
    let text = stderr(&output);
    assert!(
        text.contains("--max-connections is lowered") && text.contains("max_connections=16"),
        "{text}"
    );
}

#[test]
fn an_address_in_use_ends_with_1_and_says_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(
        &["--listen", &address, "--log=json"],
        &[
            ("COALMINE_AGENT_AGGREGATOR", "http://127.0.0.1:1"),
            ("COALMINE_AGENT_SERVICE", "shop"),
            ("COALMINE_AGENT_VERSION", "v2"),
            ("COALMINE_AGENT_ARM", "baseline"),
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let expected = format!(
        "coalmine-agent: cannot listen on {address}: address in use; stop the other process or choose another --listen"
    );
    assert!(stderr(&output).contains(&expected), "{}", stderr(&output));
}
