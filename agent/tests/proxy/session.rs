//! What the aggregator is told, whatever happens to the session.

use std::{fs, io::Write};

use coalmine_proto::{names::Arm, v1};

use crate::{
    aggregator::Aggregator,
    support::{Agent, Upstream, client, eventually, read_all, read_exactly},
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Sends requests of these tenants over one connection.
fn requests(agent: &Agent, upstream: &Upstream, tenants: &[&str]) {
    let heads = tenants
        .iter()
        .map(|tenant| format!("GET / HTTP/1.1\r\nX-Tenant: {tenant}\r\n\r\n"));
    exchanges(agent, upstream, heads);
}

/// Sends these requests over one connection, each after the answer to the one before.
fn exchanges(agent: &Agent, upstream: &Upstream, requests: impl IntoIterator<Item = String>) {
    let mut client = client(agent);
    let mut server = upstream.accept();
    for request in requests {
        client.write_all(request.as_bytes()).unwrap();
        read_exactly(&mut server, request.len());
        server.write_all(OK).unwrap();
        read_exactly(&mut client, OK.len());
    }
    // The client closes first: for an idle client, the agent would open another connection.
    drop(client);
    assert_eq!(read_all(&mut server).unwrap(), b"");
}

fn agent(upstream: &Upstream, url: String) -> Agent {
    Agent::with(upstream.address(), |config| config.aggregator = url)
}

#[test]
fn windows_reach_the_aggregator_once() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let mut agent = agent(&upstream, aggregator.url());
    requests(&agent, &upstream, &["a", "b", "a"]);
    eventually("all three", || aggregator.totals().requests == 3);
    agent.expect("session_connected", 1);
    requests(&agent, &upstream, &["a"]);
    agent.stop();
    agent.join();
    let told = aggregator.told();
    let hello = &told.hellos[0];
    assert_eq!(
        (hello.protocol, hello.instance.as_str(), hello.window_ms),
        (1, "pod-1", 20)
    );
    assert_eq!((hello.service.as_str(), hello.version.as_str()), ("shop", "v2"));
    assert_eq!(hello.arm(), Arm::Canary.to_wire());
    assert_ne!(hello.epoch, 0);
    assert_eq!(told.requests.get("a"), Some(&3));
    assert_eq!(told.requests.get("b"), Some(&1));
    assert_eq!((told.duplicates, &told.tokens[..]), (0, &[None][..]));
    let (last, others) = told.applied.split_last().unwrap();
    assert!(
        others
            .iter()
            .all(|b| b.start_unix_ms % 20 == 0 && b.length_ms % 20 == 0)
    );
    assert!(last.length_ms >= 1);
    assert_eq!(told.bye.as_ref().unwrap().last_seq, last.seq);
    assert!(told.applied.iter().all(|batch| batch.host.is_some()));
}

#[test]
fn a_broken_session_doubles_nothing() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().breaks_after = Some(5);
    let mut agent = agent(&upstream, aggregator.url());
    for _ in 0..20 {
        requests(&agent, &upstream, &["a"]);
    }
    eventually("a second session", || aggregator.told().hellos.len() == 2);
    eventually("all requests", || aggregator.totals().requests == 20);
    {
        let told = aggregator.told();
        assert_eq!(told.hellos[0].epoch, told.hellos[1].epoch);
        // The aggregator had them, but had not said so.
        assert_eq!(told.hellos[1].oldest_seq, 1);
        assert!(told.hellos[1].next_seq > 5);
    }
    agent.expect("session_reconnects_total", 1);
    agent.stop();
    agent.join();
    assert_eq!(aggregator.told().requests["a"], 20);
}

#[test]
fn a_drained_session_is_followed_by_another() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().drains_after = Some(3);
    let agent = agent(&upstream, aggregator.url());
    requests(&agent, &upstream, &["a", "b"]);
    eventually("a second session", || aggregator.told().hellos.len() == 2);
    requests(&agent, &upstream, &["a"]);
    eventually("all three", || aggregator.totals().requests == 3);
    let told = aggregator.told();
    assert_eq!((told.duplicates, told.bye.is_some()), (0, false));
}

#[test]
fn a_full_ring_merges_and_loses_nothing() {
    let upstream = Upstream::new();
    let address = Aggregator::free_address();
    let mut agent = Agent::with(upstream.address(), |config| {
        config.aggregator = format!("http://{address}");
        config.ring_bytes = 2000;
    });
    for _ in 0..10 {
        requests(&agent, &upstream, &["a", "b"]);
    }
    agent.expect("requests_total{outcome=\"success\"}", 20);
    eventually("merged", || {
        agent.metric("ring_merged_windows_total").unwrap() > 5
    });
    assert!(agent.metric("ring_bytes").unwrap() <= 2000);
    let aggregator = Aggregator::on(address);
    eventually("all", || aggregator.totals().requests == 20);
    assert_eq!(aggregator.totals().gap_requests, 0);
    agent.stop();
    agent.join();
    let told = aggregator.told();
    assert!(told.applied.iter().any(|batch| batch.length_ms > 20));
}

#[test]
fn agents_that_start_first_lose_nothing() {
    let upstream = Upstream::new();
    let address = Aggregator::free_address();
    let mut agent = agent(&upstream, format!("http://{address}"));
    requests(&agent, &upstream, &["a", "b"]);
    agent.expect("requests_total{outcome=\"success\"}", 2);
    agent.expect("session_connected", 0);
    let aggregator = Aggregator::on(address);
    requests(&agent, &upstream, &["a"]);
    eventually("all three", || aggregator.totals().requests == 3);
    agent.stop();
    agent.join();
    let told = aggregator.told();
    assert_eq!((told.requests["a"], told.requests["b"]), (2, 1));
    assert_eq!(told.hellos[0].next_seq, 1);
}

#[test]
fn no_more_batches_than_allowed_are_on_their_way() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    {
        let mut told = aggregator.told();
        (told.max_unacked, told.acknowledges) = (3, false);
    }
    let agent = agent(&upstream, aggregator.url());
    requests(&agent, &upstream, &["a"]);
    eventually("three batches", || aggregator.told().applied.len() == 3);
    eventually("more windows", || {
        agent.metric("windows_sealed_total").unwrap() > 20
    });
    assert_eq!(aggregator.told().most_in_flight, 3);
    agent.expect("durable_seq", 0);
}

#[test]
fn limits_are_applied_at_a_border_and_answered() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().config = Some(v1::Config {
        version: 7,
        default_limit_us: 60_000_000,
        limits: vec![v1::TenantLimit {
            tenant: "a".to_owned(),
            limit_us: 1,
        }],
        tenant_rules: Vec::new(),
    });
    let agent = agent(&upstream, aggregator.url());
    eventually("applied", || aggregator.told().config_applied == [7]);
    requests(&agent, &upstream, &["a", "b"]);
    eventually("both", || aggregator.totals().requests == 2);
    let told = aggregator.told();
    let with_rows = told.applied.iter().filter(|batch| !batch.rows.is_empty());
    let mut limits = Vec::new();
    for batch in with_rows {
        assert_eq!(batch.config_version, 7);
        limits.extend(batch.rows.iter().map(|row| (row.limit_us, row.over_limit)));
    }
    limits.sort_unstable();
    assert_eq!(limits, [(1, 1), (60_000_000, 0)]);
}

#[test]
fn rules_are_replaced_while_requests_go_on() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let agent = agent(&upstream, aggregator.url());
    // One tenant stands in the header, another in the query.
    let counts_for = |tenant: &str, times: u64| {
        let request = "GET /?t=q HTTP/1.1\r\nX-Tenant: a\r\n\r\n".to_owned();
        exchanges(&agent, &upstream, [request]);
        eventually("it is counted", || {
            aggregator.told().requests.get(tenant) == Some(&times)
        });
    };
    let push = |version: u64, rules: &[&str]| {
        aggregator.told().config = Some(v1::Config {
            version,
            tenant_rules: rules.iter().map(|rule| (*rule).to_owned()).collect(),
            ..v1::Config::default()
        });
        eventually("it is applied", || {
            aggregator.told().config_applied.last() == Some(&version)
        });
    };
    // Those that the agent was started with.
    counts_for("a", 1);
    push(8, &["query:t"]);
    assert_eq!(aggregator.told().config_applied, [8]);
    counts_for("q", 1);
    // One that cannot be read: the ones before stay, all of them.
    push(9, &["header:x-tenant", "nowhere:t"]);
    counts_for("q", 2);
    agent.expect("tenant_rules_refused_total", 1);
    push(10, &[]);
    counts_for("a", 2);
    let told = aggregator.told();
    assert_eq!(told.requests.len(), 2, "{:?}", told.requests);
    assert_eq!(told.config_applied, [8, 9, 10]);
    assert_eq!((told.hellos.len(), told.duplicates), (1, 0));
}

#[test]
fn a_refused_agent_tries_again() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().rejects = 1;
    let agent = agent(&upstream, aggregator.url());
    requests(&agent, &upstream, &["a"]);
    eventually("one request", || aggregator.totals().requests == 1);
    assert_eq!(aggregator.told().hellos.len(), 2);
}

#[test]
fn a_token_is_read_anew_for_each_session() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().disbelieves = u32::MAX;
    let mut agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator.url();
        config.token_file = Some(file.clone());
    });
    requests(&agent, &upstream, &["a"]);
    agent.expect("requests_total{outcome=\"success\"}", 1);
    assert!(aggregator.told().tokens.is_empty(), "there is none to show");
    let is_shown = |token: &str| {
        let told = aggregator.told();
        told.tokens
            .last()
            .is_some_and(|last| last.as_deref() == Some(token))
    };
    for (text, token) in [("first\n", "Bearer first"), ("second", "Bearer second")] {
        fs::write(&file, text).unwrap();
        eventually("it is shown", || is_shown(token));
        assert!(aggregator.told().hellos.is_empty());
    }
    aggregator.told().disbelieves = 0;
    eventually("it is believed", || aggregator.totals().requests == 1);
    agent.expect("session_connected", 1);
    agent.stop();
    agent.join();
    let told = aggregator.told();
    assert_eq!(told.requests["a"], 1);
    assert!(told.tokens.iter().all(Option::is_some), "never without a token");
}

#[test]
fn many_tenants_are_sent_in_parts() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().max_message_bytes = 2000;
    let names: Vec<String> = (0..100).map(|n| format!("tenant-{n}")).collect();
    let tenants: Vec<&str> = names.iter().map(String::as_str).collect();
    let agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator.url();
        config.window = std::time::Duration::from_millis(500);
    });
    requests(&agent, &upstream, &tenants);
    eventually("all", || aggregator.totals().requests == 100);
    let told = aggregator.told();
    assert_eq!(told.requests.len(), 100);
    assert!(
        told.applied
            .iter()
            .all(|batch| prost::Message::encoded_len(batch) <= 2000)
    );
}

#[test]
fn more_names_than_a_session_may_have_get_through() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let names: Vec<String> = (0..30).map(|n| format!("tenant-{n}")).collect();
    // Tenants with limits are counted beyond --max-tenants.
    aggregator.told().config = Some(limits_of(&names));
    let agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator.url();
        config.max_tenants = 1;
    });
    eventually("applied", || !aggregator.told().config_applied.is_empty());
    let tenants: Vec<&str> = names.iter().map(String::as_str).collect();
    requests(&agent, &upstream, &tenants);
    eventually("all", || aggregator.totals().requests == 30);
    eventually("another session", || aggregator.told().hellos.len() > 1);
    requests(&agent, &upstream, &tenants);
    eventually("all again", || aggregator.totals().requests == 60);
    assert_eq!(aggregator.told().duplicates, 0);
}

#[test]
fn limits_of_many_tenants_are_read() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let names: Vec<String> = (0..80_000).map(|n| format!("{}-{n}", "x".repeat(50))).collect();
    let config = limits_of(&names);
    assert!(prost::Message::encoded_len(&config) > 4 << 20);
    aggregator.told().config = Some(config);
    let _agent = agent(&upstream, aggregator.url());
    eventually("applied", || !aggregator.told().config_applied.is_empty());
    assert_eq!(aggregator.told().hellos.len(), 1);
}

fn limits_of(names: &[String]) -> v1::Config {
    let limits = names.iter().map(|name| v1::TenantLimit {
        tenant: name.clone(),
        limit_us: 1_000,
    });
    v1::Config {
        version: 7,
        default_limit_us: 0,
        limits: limits.collect(),
        tenant_rules: Vec::new(),
    }
}
