//! Closes and resets at the edges: between requests, before the first, and when somebody stops.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use crate::{
    aggregator::Aggregator,
    support::{self, Agent, PATIENCE, Upstream, client, eventually, read_all, read_exactly},
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\n\r\n";

/// One request and its answer, on the next connection to the application.
fn exchange(client: &mut TcpStream, upstream: &Upstream) -> TcpStream {
    client.write_all(GET).unwrap();
    let mut server = upstream.accept_next(GET);
    server.write_all(OK).unwrap();
    assert_eq!(read_exactly(client, OK.len()), OK);
    server
}

#[test]
fn an_application_that_stops_closes_the_clients_connection() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let server = exchange(&mut client, &upstream);
    drop(upstream);
    drop(server);
    assert_eq!(read_all(&mut client).unwrap(), b"", "before the next request");
    agent.expect("connections", 0);
    agent.expect("requests_total{outcome=\"success\"}", 1);
    agent.expect("requests_total{outcome=\"connect_failure\"}", 0);
}

#[test]
fn an_unused_connection_that_is_closed_too_closes_the_clients() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    drop(exchange(&mut client, &upstream));
    drop(upstream.accept());
    assert_eq!(read_all(&mut client).unwrap(), b"");
    agent.expect("requests_total{outcome=\"success\"}", 1);
}

#[test]
fn what_an_unused_connection_says_is_no_answer() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    drop(exchange(&mut client, &upstream));
    let mut unused = upstream.accept();
    unused
        .write_all(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(read_all(&mut client).unwrap(), b"");
    agent.expect("requests_total{outcome=\"success\"}", 1);
    agent.expect("opaque_connections_total{reason=\"unsolicited_response\"}", 0);
}

#[test]
fn the_client_does_not_notice_an_idle_reset() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    for round in 1..=20 {
        // The next request races with the reset.
        support::reset(exchange(&mut client, &upstream));
        if round % 2 == 0 {
            agent.expect("requests_total{outcome=\"success\"}", round);
        }
    }
    agent.expect("requests_total{outcome=\"success\"}", 20);
    agent.expect("requests_total{outcome=\"upstream_reset\"}", 0);
    agent.expect("connections_total", 1);
}

#[test]
fn a_request_that_is_never_read_counts() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    for _ in 0..10 {
        let mut client = client(&agent);
        client.write_all(GET).unwrap();
        support::reset(upstream.accept());
        assert_eq!(
            read_all(&mut client).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }
    // A reset may come before the agent knows of the connection.
    eventually("all are counted", || {
        let of = |outcome| agent.metric(&format!("requests_total{{outcome=\"{outcome}\"}}"));
        of("upstream_reset").unwrap() + of("connect_failure").unwrap() == 10
    });
}

#[test]
fn resets_before_the_first_byte_are_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut reset_by_server = client(&agent);
    support::reset(upstream.accept());
    let error = read_all(&mut reset_by_server).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let reset_by_client = client(&agent);
    let mut server = upstream.accept();
    support::reset(reset_by_client);
    let error = read_all(&mut server).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn short_prompts_and_pauses_are_relayed() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let mut server = upstream.accept();
    server.write_all(b"> ").unwrap();
    assert_eq!(read_exactly(&mut client, 2), b"> ");
    client.write_all(b"P").unwrap();
    assert_eq!(read_exactly(&mut server, 1), b"P");
    server.write_all(b"?").unwrap();
    assert_eq!(read_exactly(&mut client, 1), b"?");
}

#[test]
fn an_answer_arrives_whatever_the_client_says_while_the_agent_stops() {
    let upstream = Upstream::new();
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(upstream.address(), |config| config.aggregator = aggregator.url());
    let mut client = client(&agent);
    client.write_all(GET).unwrap();
    let mut server = upstream.accept_next(GET);
    server.write_all(OK).unwrap();
    agent.expect("requests_total{outcome=\"success\"}", 1);
    // Answers what may still reach it.
    let answering = std::thread::spawn(move || {
        let mut request = [0; GET.len()];
        while server.read_exact(&mut request).is_ok() && server.write_all(OK).is_ok() {}
    });
    agent.stop();
    eventually("not ready", || agent.get("/readyz").0 == 503);
    client.write_all(GET).unwrap();
    let answers = read_all(&mut client).expect("no reset");
    assert!(answers == OK || answers == OK.repeat(2), "{answers:?}");
    client.shutdown(Shutdown::Both).ok();
    agent.join();
    answering.join().unwrap();
}

/// Answers that have not ended. With a clean close behind it, the second would be a whole one.
const BEGUN: [&[u8]; 4] = [
    b"",
    b"HTTP/1.0 200 OK\r\n\r\nhalf",
    b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
];

/// Has an answer begun, makes the agent stop at once, and requires that neither side takes it for complete.
fn is_cut_off(begun: &[u8], drain: Duration, stop: impl FnOnce(&Agent)) {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let mut agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator.url();
        config.drain = drain;
    });
    let mut client = client(&agent);
    client.write_all(GET).unwrap();
    let mut server = upstream.accept_next(GET);
    server.write_all(begun).unwrap();
    assert_eq!(read_exactly(&mut client, begun.len()), begun);
    stop(&agent);
    for (side, stream) in [("client", &mut client), ("application", &mut server)] {
        let ended = read_all(stream).map_err(|error| error.kind());
        assert_eq!(
            ended,
            Err(ErrorKind::ConnectionReset),
            "the {side} after {}",
            begun.escape_ascii()
        );
    }
    agent.join();
    assert_eq!(aggregator.told().requests["a"], 1);
    assert_eq!(aggregator.totals().errors, 0, "the service is not to blame");
}

#[test]
fn an_answer_that_is_cut_off_when_time_is_up_does_not_look_complete() {
    for begun in BEGUN {
        is_cut_off(begun, Duration::from_millis(200), Agent::stop);
    }
}

#[test]
fn an_answer_that_is_cut_off_by_a_second_stop_does_not_look_complete() {
    for begun in BEGUN {
        is_cut_off(begun, PATIENCE * 2, |agent| {
            agent.stop();
            agent.stop();
        });
    }
}
