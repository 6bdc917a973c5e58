//! Bad input: each gives one clear error with its place and a remedy, and the right exit code.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use coalmine_tests::{
    components::{Agent, Aggregator, POLICY},
    eventually,
    http::{get, request},
    process::{Process, coalmine, free_addresses, program},
};
use serde_json::json;

fn run(program_name: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(program(program_name))
        .args(arguments)
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// The exit code, and that one line on standard error says all of this.
fn refuses(program_name: &str, arguments: &[&str], code: i32, says: &[&str]) {
    let (found, said) = run(program_name, arguments);
    assert_eq!(found, Some(code), "{program_name} {arguments:?}: {said}");
    for part in says {
        assert!(
            said.contains(part),
            "{program_name} {arguments:?} does not say {part:?}: {said}"
        );
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn policies() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sla.yaml");
    let path = file.display().to_string();
    let long = format!("service: checkout\ntenants:\n  {}: {{}}", "x".repeat(200));
    let table: &[(&str, &str, &[&str])] = &[
        (
            "judge_window: 1s",
            "judge_windows: 1s",
            &[":7:3:", "judge_windows"],
        ),
        (
            "p99: 350ms",
            "p99: 350 fortnights",
            &[":6:19:", "write it like 350ms"],
        ),
        ("p99: 350ms", "p99: 350", &[":6:19:", "no unit", "like 350ms"]),
        ("max_rate: 1%", "max_rate: -1%", &[":5:24:", "negative"]),
        (
            "service: checkout",
            &long,
            &[":5:3:", "200 bytes long; at most 128"],
        ),
        (
            "coalmine.dev/v1",
            "coalmine.dev/v9",
            &[":1:13:", "coalmine.dev/v9", "coalmine.dev/v1"],
        ),
        ("defaults:", "defaults: [", &[": "]),
    ];
    for (from, to, says) in table {
        fs::write(&file, POLICY.replacen(from, to, 1)).unwrap();
        let mut says = says.to_vec();
        says.push(&path);
        refuses("coalmine", &["policy", "validate", &path], 64, &says);
        let data = directory.path().join("data").display().to_string();
        refuses(
            "coalmine-aggregator",
            &["serve", "--data", &data, "--policy", &path],
            64,
            &says,
        );
        assert!(
            !Path::new(&data).exists(),
            "nothing is touched before the policy is read"
        );
    }
    refuses(
        "coalmine",
        &["policy", "validate", "/nowhere/sla.yaml"],
        64,
        &["/nowhere/sla.yaml", "No such file"],
    );
    fs::write(&file, POLICY).unwrap();
    assert_eq!(run("coalmine", &["policy", "validate", &path]).0, Some(0));
}

#[test]
fn evidence() {
    let directory = tempfile::tempdir().unwrap();
    let (policy, file) = (
        directory.path().join("sla.yaml"),
        directory.path().join("windows.jsonl"),
    );
    fs::write(&policy, POLICY).unwrap();
    let (policy, path) = (policy.display().to_string(), file.display().to_string());
    let good = concat!(
        r#"{"v":1,"window":1,"start_ms":0,"len_ms":1000,"coverage":{"canary":{"expected":1,"reported":1},"#,
        r#""baseline":{"expected":1,"reported":1}},"rows":[{"tenant":"acme","arm":"canary","requests":5,"errors":1}]}"#
    );
    let long = "x".repeat(200);
    let huge = format!("\"requests\":{}", u64::MAX);
    let table: &[(&str, &str, &[&str])] = &[
        (
            "\"v\":1",
            "\"v\":2",
            &[":2:", "version 2 is not known; this judge reads version 1"],
        ),
        ("acme", &long, &[":2:", "rows[0]", "200 bytes long"]),
        (
            "\"errors\":1",
            "\"errors\":6",
            &[":2:", "6 errors among 5 requests"],
        ),
        ("\"errors\":1", "\"errors\":-1", &[":2:", "-1"]),
        (
            "\"window\":2",
            "\"window\":1",
            &[":2:", "window 1 comes after window 1"],
        ),
        ("{\"v\"", "\"v\"", &[":2:"]),
    ];
    for (from, to, says) in table {
        let second = good.replace("\"window\":1", "\"window\":2");
        fs::write(&file, format!("{good}\n{}\n", second.replacen(from, to, 1))).unwrap();
        let mut says = says.to_vec();
        says.push(&path);
        refuses("coalmine", &["judge", "--policy", &policy, &path], 64, &says);
        // What was judged before the mistake was printed.
        let output = coalmine(["judge", "--policy", &policy, &path]);
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
    }
    // A count that no arithmetic can hold is an ERROR of the unit, and holds.
    fs::write(&file, good.replace("\"requests\":5", &huge)).unwrap();
    let output = coalmine(["judge", "--policy", &policy, &path]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("\"state\":\"ERROR\"") && said.contains("\"verdict\":\"HOLD\""),
        "{said}"
    );
    refuses(
        "coalmine",
        &["judge", "--policy", &policy, "--max-windows", "1", &path],
        64,
        &["max-windows"],
    );
}

#[test]
fn questions_to_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let server = format!("http://{}", aggregator.http);
    let ask = |arguments: &[&str], code, says: &[&str]| {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--server", &server]);
        refuses("coalmine", &arguments, code, says);
    };
    ask(
        &["gate", "nothing"],
        64,
        &["there is no rollout \"nothing\"", "rollout list"],
    );
    ask(
        &["rollout", "status", "no/such"],
        64,
        &["there is no rollout \"no/such\""],
    );
    ask(&["explain", "nothing"], 64, &["there is no decision \"nothing\""]);
    ask(
        &["rollout", "start", "--service", "cart", "--canary-version", "v2"],
        64,
        &["no policy for service \"cart\"", "checkout"],
    );
    ask(
        &[
            "rollout",
            "start",
            "--service",
            "checkout",
            "--canary-version",
            "v 2",
        ],
        64,
        &["canary_version", "character ' '"],
    );
    let same = [
        "rollout",
        "start",
        "--service",
        "checkout",
        "--canary-version",
        "v2",
        "--baseline-version",
        "v2",
    ];
    ask(&same, 64, &["cannot be compared with itself"]);
    refuses(
        "coalmine",
        &["gate", "x", "--server", "http://no-such-host.invalid:1"],
        3,
        &["no-such-host.invalid", "--server"],
    );
    refuses(
        "coalmine",
        &["gate", "x", "--server", "127.0.0.1:8080"],
        64,
        &["http://127.0.0.1:8080"],
    );
    let [nobody] = free_addresses();
    refuses(
        "coalmine",
        &["gate", "x", "--server", &format!("http://{nobody}")],
        3,
        &["refused", "--server"],
    );
    refuses("coalmine", &["gate"], 64, &["<ROLLOUT>"]);

    for (path, status, says) in [
        (
            "/v1/audit/consistency?from=0&to=99",
            400,
            "is no growth of this log",
        ),
        (
            "/v1/audit/consistency?from=1&to=0",
            400,
            "is no growth of this log",
        ),
        (
            "/v1/audit/consistency?from=-1&to=x",
            400,
            "from and to, two numbers",
        ),
        ("/v1/audit/consistency", 400, "from and to, two numbers"),
        (
            "/v1/rollouts/nothing/gate?proof=perhaps",
            400,
            "proof, true or false",
        ),
        ("/v1/decisions/nothing/proof", 404, "there is no decision"),
    ] {
        let answer = get(aggregator.http, path).unwrap();
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        assert!(answer.body.contains(says), "{path}: {}", answer.body);
    }
    let replayed = aggregator.post("/v1/decisions/nothing/replay", &json!(null));
    assert_eq!(replayed.status, 404, "{}", replayed.body);

    // A version that no agent reports is a warning, and the rollout holds.
    let started = aggregator.post(
        "/v1/rollouts",
        &json!({ "service": "checkout", "canary_version": "v9", "key": "k1" }),
    );
    assert_eq!(started.status, 201);
    assert!(
        started.json()["warnings"][0]
            .as_str()
            .unwrap()
            .contains("no canary agent reports version v9"),
        "{}",
        started.body
    );
    let again = aggregator.post(
        "/v1/rollouts",
        &json!({ "service": "checkout", "canary_version": "v9", "key": "k1" }),
    );
    assert_eq!((again.status, &again.json()["id"]), (200, &started.json()["id"]));
    let other = aggregator.post(
        "/v1/rollouts",
        &json!({ "service": "checkout", "canary_version": "v3" }),
    );
    assert_eq!(other.status, 409, "{}", other.body);
    assert!(other.body.contains("still open"), "{}", other.body);
    let reused = aggregator.post(
        "/v1/rollouts",
        &json!({ "service": "checkout", "canary_version": "v3", "key": "k1" }),
    );
    assert_eq!(reused.status, 409, "{}", reused.body);
    let workload = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
    let moved = aggregator.post(
        "/v1/rollouts",
        &json!({ "service": "checkout", "canary_version": "v9", "key": "k1", "workload": workload }),
    );
    assert_eq!(moved.status, 409, "{}", moved.body);

    // The API's own errors are problem documents.
    let post = |path, body: &str| {
        request(
            aggregator.http,
            "POST",
            path,
            &[("content-type", "application/json")],
            body,
        )
        .unwrap()
    };
    for (answer, status, says) in [
        (get(aggregator.http, "/v2").unwrap(), 404, "no such route"),
        (
            request(aggregator.http, "DELETE", "/v1/rollouts", &[], "").unwrap(),
            405,
            "method",
        ),
        (post("/v1/rollouts", "{"), 400, "EOF"),
        (
            post("/v1/rollouts", r#"{"service":"checkout","canary":"v2"}"#),
            422,
            "unknown field `canary`",
        ),
        (post("/v1/rollouts", &"x".repeat(100_000)), 413, "length limit"),
        (
            get(aggregator.http, "/v1/decisions?limit=many").unwrap(),
            400,
            "limit",
        ),
        (get(aggregator.http, "/v1/services/cart").unwrap(), 404, "cart"),
    ] {
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(
            answer
                .head
                .to_ascii_lowercase()
                .contains("application/problem+json"),
            "{}",
            answer.head
        );
        let problem = answer.json();
        assert!(problem["detail"].as_str().unwrap().contains(says), "{problem}");
        assert!(problem["request_id"].is_string());
    }
}

#[test]
fn agents() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let good = [
        "--service",
        "s",
        "--version",
        "v1",
        "--arm",
        "canary",
        "--upstream",
        "127.0.0.1:9",
    ];
    let with = |extra: &[&'static str]| {
        good.iter()
            .copied()
            .chain(extra.iter().copied())
            .collect::<Vec<_>>()
    };
    let aggregator = ["--aggregator", "http://127.0.0.1:9"];
    let usage = |extra: &[&'static str], says: &[&str]| {
        let mut arguments = with(extra);
        if !extra.contains(&"--aggregator") {
            arguments.extend(aggregator);
        }
        refuses("coalmine-agent", &arguments, 64, says);
    };
    usage(&["--window", "1 parsec"], &["--window", "parsec"]);
    usage(&["--tenant", "cookie:x"], &["--tenant", "cookie"]);
    usage(&["--aggregator", "ftp://x"], &["--aggregator", "ftp://x"]);
    usage(&["--aggregator", "https://x"], &["https"]);
    usage(&["--listen", "nowhere"], &["--listen", "nowhere"]);
    refuses("coalmine-agent", &["--arm", "blue"], 64, &["--arm"]);

    let mut arguments = with(&[]);
    arguments.extend(aggregator);
    arguments.extend(["--listen", &address]);
    refuses(
        "coalmine-agent",
        &arguments,
        1,
        &["cannot listen on", &address, "in use", "--listen"],
    );
    refuses_busy_aggregator(&address);

    // An aggregator that does not resolve is no reason to stop proxying: one clear warning.
    let directory = tempfile::tempdir().unwrap();
    let [listen, admin] = free_addresses();
    let mut command = Command::new(program("coalmine-agent"));
    command
        .args(good)
        .args(["--aggregator", "http://no-such-host.invalid:7443"]);
    command.args(["--listen", &listen.to_string(), "--admin", &admin.to_string()]);
    let agent = Process::start(command, &directory.path().join("agent.log"));
    let said = eventually("the agent says that it has no aggregator", || {
        Some(agent.said()).filter(|said| said.contains("no connection to the aggregator"))
    });
    let warning = said
        .lines()
        .find(|line| line.contains("no connection to the aggregator"))
        .unwrap();
    assert!(
        warning.contains("WARN")
            && warning.contains("check --aggregator")
            && warning.contains("no-such-host.invalid"),
        "{said}"
    );
    assert_eq!(get(admin, "/readyz").unwrap().status, 200);
    assert!(agent.terminate().success());
}

fn refuses_busy_aggregator(address: &str) {
    let directory = tempfile::tempdir().unwrap();
    let policy = directory.path().join("sla.yaml");
    fs::write(&policy, POLICY).unwrap();
    let (policy, data) = (
        policy.display().to_string(),
        directory.path().join("data").display().to_string(),
    );
    let arguments = [
        "serve",
        "--policy",
        &policy,
        "--data",
        &data,
        "--listen-http",
        address,
        "--listen-grpc",
        "127.0.0.1:0",
        "--listen-admin",
        "127.0.0.1:0",
    ];
    refuses(
        "coalmine-aggregator",
        &arguments,
        1,
        &["cannot listen on", address, "in use", "--listen-http"],
    );
}

#[test]
fn damaged_data() {
    let directory = tempfile::tempdir().unwrap();
    let mut aggregator = Aggregator::start(directory.path());
    let rollout = aggregator.start_rollout();
    let application = TcpListener::bind("127.0.0.1:0").unwrap();
    let agent = Agent::start(
        directory.path(),
        "canary-1",
        "canary",
        application.local_addr().unwrap(),
        aggregator.grpc,
    );
    eventually("some windows are stored", || {
        (aggregator.windows() >= 3).then_some(())
    });
    let second = Command::new(program("coalmine-aggregator"))
        .args([
            "serve",
            "--listen-grpc",
            "127.0.0.1:0",
            "--listen-http",
            "127.0.0.1:0",
            "--listen-admin",
            "127.0.0.1:0",
        ])
        .arg("--data")
        .arg(&aggregator.data)
        .arg("--policy")
        .arg(directory.path().join("sla.yaml"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        second.status.code() == Some(1) && said.contains("in use by another aggregator"),
        "{said}"
    );
    assert!(
        coalmine([
            "rollout",
            "end",
            &rollout,
            "--server",
            &format!("http://{}", aggregator.http)
        ])
        .status
        .success()
    );
    agent.terminate();
    aggregator.terminate();

    let policy = directory.path().join("sla.yaml").display().to_string();
    let data = aggregator.data.display().to_string();
    let serve = [
        "serve",
        "--policy",
        &policy,
        "--data",
        &data,
        "--listen-grpc",
        "127.0.0.1:0",
        "--listen-http",
        "127.0.0.1:0",
        "--listen-admin",
        "127.0.0.1:0",
    ];
    let log = aggregator.data.join("decisions.jsonl");
    let whole = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = whole.lines().collect();
    assert_eq!(lines.len(), 3, "log_start, rollout, end");

    fs::write(&log, format!("{}\n{}\n", lines[0], lines[1])).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &[
            "decisions.jsonl",
            "ends after record 1",
            "checkpoint covers 3",
            "backup",
        ],
    );
    refuses("coalmine", &["audit", "verify", "--data", &data], 1, &[]);
    fs::write(&log, whole.replace("checkout", "checkin!")).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["decisions.jsonl", "record 2", "record before it", "backup"],
    );
    fs::write(&log, &whole).unwrap();

    let wal = aggregator.data.join("windows/wal-000000000001");
    let stored = fs::read(&wal).unwrap();
    let mut bad = stored.clone();
    bad[stored.len() / 2] ^= 1;
    fs::write(&wal, bad).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["windows/wal-000000000001", "the frame at byte", "backup"],
    );
    fs::write(&wal, stored).unwrap();

    // A log that exists gets no other key, and nobody but the owner reads the one that it has.
    let key = aggregator.data.join("key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let secret = fs::read_to_string(&key).unwrap();
    fs::remove_file(&key).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["/key", "is missing", "backup"],
    );
    let material = secret.trim_end().rsplit('+').next().unwrap().to_owned();
    fs::write(
        &key,
        secret.replace(&material, "AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"),
    )
    .unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["/key", "is not a signing key"],
    );
    let other = tempfile::tempdir().unwrap();
    let elsewhere = other.path().display().to_string();
    let mut another = serve;
    another[4] = &elsewhere;
    let mut command = Command::new(program("coalmine-aggregator"));
    command.args(another);
    let process = Process::start(command, &directory.path().join("another.log"));
    eventually("another log is begun", || {
        other.path().join("checkpoint").is_file().then_some(())
    });
    assert!(process.said().contains("key="), "{}", process.said());
    assert!(process.terminate().success());
    fs::copy(other.path().join("key"), &key).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["/key", "does not name as its key"],
    );
    // Signed by another key, as of a log that was written anew.
    fs::write(&key, &secret).unwrap();
    let checkpoint = aggregator.data.join("checkpoint");
    let signed = fs::read(&checkpoint).unwrap();
    fs::copy(other.path().join("checkpoint"), &checkpoint).unwrap();
    refuses(
        "coalmine-aggregator",
        &serve,
        1,
        &["checkpoint", "is not signed by a known key"],
    );
    fs::write(&checkpoint, signed).unwrap();
    let mut named = serve.to_vec();
    named.extend(["--log-name", "a+b"]);
    refuses("coalmine-aggregator", &named, 64, &["--log-name", "plus sign"]);
    refuses(
        "coalmine",
        &["audit", "verify", "--data", "/nowhere"],
        64,
        &["/nowhere", "--data"],
    );
    aggregator.launch();
    assert_eq!(
        aggregator.get(&format!("/v1/rollouts/{rollout}"))["state"],
        "ended"
    );
}

#[test]
fn what_a_cluster_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (policy, data) = (file("sla.yaml", POLICY), directory.path().join("data"));
    let data = data.display().to_string();
    let tokens = file("tokens", "\nno hash\n");
    let nowhere = file(
        "kubeconfig",
        "{ apiVersion: v1, kind: Config, current-context: none }",
    );
    let key = file("empty", "");
    let webhook = [
        "--listen-webhook",
        "127.0.0.1:0",
        "--agent-image",
        "agent:1",
        "--agent-aggregator",
        "http://coalmine.coalmine:7443",
    ];
    let refuses = |more: &[&str], says: &[&str]| {
        let mut arguments = vec!["serve", "--data", &data, "--policy", &policy];
        arguments.extend(more);
        self::refuses("coalmine-aggregator", &arguments, 64, says);
        assert!(
            !Path::new(&data).exists(),
            "nothing is touched before the settings are read"
        );
    };
    refuses(
        &["--agent-tokens", &tokens],
        &["tokens:2:", "64 hexadecimal digits"],
    );
    refuses(
        &["--agent-tokens", "/nowhere/tokens"],
        &["/nowhere/tokens", "No such file"],
    );
    refuses(&webhook, &["--webhook-secret", "--webhook-certificate"]);
    refuses(
        &[&webhook[..], &["--webhook-secret", "s", "--webhook-name", "a b"]].concat(),
        &["--webhook-name", "a b", "neither a DNS name nor an address"],
    );
    refuses(
        &[
            &webhook[..],
            &["--webhook-secret", "s", "--agent-setting", "port=x y"],
        ]
        .concat(),
        &["port"],
    );
    refuses(&["--listen-webhook", "127.0.0.1:0"], &["--agent-image"]);
    refuses(&["--watch-pods"], &["not in a pod of a cluster", "--kubeconfig"]);
    refuses(
        &["--halt", "argo"],
        &["not in a pod of a cluster", "--kubeconfig"],
    );
    refuses(&["--halt", "spinnaker"], &["spinnaker", "argo"]);
    refuses(&["--watch-pods", "--kubeconfig", &nowhere], &[&nowhere, "none"]);
    refuses(
        &["--halt-webhook", "ftp://x", "--halt-webhook-key", &tokens],
        &["--halt-webhook", "http"],
    );
    refuses(
        &["--halt-webhook", "https://x/", "--halt-webhook-key", &key],
        &["--halt-webhook-key", "empty", "32 random"],
    );
}

#[test]
fn the_aggregators_file_is_the_command_as_well() {
    let directory = tempfile::tempdir().unwrap();
    let name = directory.path().join("coalmine");
    std::os::unix::fs::symlink(program("coalmine-aggregator"), &name).unwrap();
    let said = |program: &Path, argument: &str| {
        let output = Command::new(program).arg(argument).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(said(&name, "--help"), said(&program("coalmine"), "--help"));
    assert_ne!(
        said(&name, "--help"),
        said(&program("coalmine-aggregator"), "--help")
    );
}
