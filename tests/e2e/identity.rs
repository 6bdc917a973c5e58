//! Agents that prove who they are by a token that somebody has given out, outside of a cluster.

use std::{fs, path::Path};

use coalmine_tests::{
    components::{Agent, Aggregator, Nginx},
    eventually,
    http::get,
};

/// The message of FIPS 180-2, appendix B.2, and its SHA-256.
const OTHER: [&str; 2] = [
    "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
];

/// SHA-256 of `abc`, from FIPS 180-2, appendix B.1.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

/// An agent of checkout whose token is in this file.
fn agent(directory: &Path, name: &str, aggregator: &Aggregator, token: &Path) -> (Nginx, Agent) {
    let application = Nginx::start(directory, &format!("nginx-{name}"), None);
    let more = ["--token-file", token.to_str().unwrap()];
    let upstream = application.address;
    let agent = Agent::start_with(directory, name, "canary", upstream, aggregator.grpc, &more);
    (application, agent)
}

/// Whether it has a session now.
fn is_connected(agent: &Agent) -> bool {
    let metrics = get(agent.admin, "/metrics").unwrap().body;
    metrics.contains("\ncoalmine_agent_session_connected 1\n")
}

/// How many sessions were refused for want of a proof.
fn refused(aggregator: &Aggregator) -> u64 {
    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    let line = metrics
        .lines()
        .find(|line| line.contains("rejected") && line.contains("identity"));
    line.and_then(|line| line.rsplit(' ').next())
        .map_or(0, |count| count.parse().unwrap())
}

#[test]
fn only_agents_with_a_token_of_their_service_are_let_in() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let tokens = path.join("tokens");
    // The first is for agents of checkout, the second for those of another service.
    let [secret, other] = OTHER;
    fs::write(&tokens, format!("# shop\n{ABC} checkout\n{other} cart\n")).unwrap();
    let mut aggregator =
        Aggregator::prepare(path).with_arguments(&["--agent-tokens", tokens.to_str().unwrap()]);
    aggregator.launch();

    let [right, wrong] = ["right", "wrong"].map(|name| path.join(name));
    fs::write(&right, "abc\n").unwrap();
    fs::write(&wrong, format!("{secret}\n")).unwrap();
    let (_first, let_in) = agent(path, "in", &aggregator, &right);
    eventually("whoever has the right token is let in", || {
        is_connected(&let_in).then_some(())
    });
    let (_second, kept_out) = agent(path, "out", &aggregator, &wrong);
    eventually("whoever has another's is not", || {
        (refused(&aggregator) > 0).then_some(())
    });
    assert!(!is_connected(&kept_out));
    assert_eq!(
        get(kept_out.address, "/").unwrap().status,
        200,
        "it is a proxy all the same"
    );
    // The file is read for each connection.
    fs::write(&wrong, "abc\n").unwrap();
    eventually("with the right token it is let in too", || {
        is_connected(&kept_out).then_some(())
    });
    let log = fs::read_to_string(path.join("aggregator.log")).unwrap();
    assert!(log.contains("its token is for agents of cart"), "{log}");
    assert!(!log.contains(secret), "a token is nobody's business: {log}");
}
