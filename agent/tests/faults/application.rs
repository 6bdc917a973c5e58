//! An application that is not there, is slow, breaks off, or does not read.

use std::{
    io::{ErrorKind, Read, Write},
    iter,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use coalmine_proto::names::Outcome;

use crate::{
    aggregator::Aggregator,
    program::{Program, SLACK_BYTES},
    stage::{self, OK, Stage, connect, exchange, get, read_head},
    support::{self, Agent, PATIENCE, Upstream, client, patient, read_all, read_exactly},
};

/// An agent in front of this application, and its aggregator.
fn agent(application: &TcpListener) -> (Agent, Aggregator) {
    let aggregator = Aggregator::start();
    let address = application.local_addr().unwrap();
    let agent = Agent::with(address, |config| config.aggregator = aggregator.url());
    (agent, aggregator)
}

/// Asks, and is reset.
fn is_reset(agent: &Agent, tenant: &str) {
    let mut client = client(agent);
    client.write_all(&get(tenant)).unwrap();
    let error = read_all(&mut client).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn where_nobody_listens_the_client_is_reset_and_its_tenant_pays() {
    let application = stage::closed();
    let (mut agent, aggregator) = agent(&application);
    is_reset(&agent, "acme");
    is_reset(&agent, "acme");
    is_reset(&agent, "zenith");
    agent.stop();
    agent.join();
    stage::check(
        &aggregator,
        &[
            ("acme", Outcome::ConnectFailure, 2),
            ("zenith", Outcome::ConnectFailure, 1),
        ],
    );
}

#[test]
fn an_application_that_comes_later_is_found() {
    let application = stage::closed();
    let (mut agent, aggregator) = agent(&application);
    is_reset(&agent, "acme");
    stage::open(&application, 16);
    let mut client = client(&agent);
    client.write_all(&get("acme")).unwrap();
    let mut server = patient(application.accept().unwrap().0);
    assert_eq!(read_exactly(&mut server, get("acme").len()), get("acme"));
    server.write_all(OK).unwrap();
    assert_eq!(read_exactly(&mut client, OK.len()), OK);
    drop(client);
    agent.stop();
    agent.join();
    stage::check(
        &aggregator,
        &[
            ("acme", Outcome::ConnectFailure, 1),
            ("acme", Outcome::Success, 1),
        ],
    );
}

/// Connects until nobody is let in any more: the kernel then drops what comes (listen(2)). The connections must
/// stay open.
fn fill(application: &TcpListener) -> Vec<TcpStream> {
    const MOST: usize = 16;
    let address = application.local_addr().unwrap();
    let mut waiting = Vec::new();
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
            Ok(stream) => waiting.push(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::TimedOut);
                return waiting;
            }
        }
        assert!(waiting.len() < MOST, "a queue without places takes {MOST}");
    }
}

#[test]
fn an_application_that_does_not_accept_in_time_is_not_reached() {
    let application = stage::closed();
    stage::open(&application, 0);
    let waiting = fill(&application);
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(application.local_addr().unwrap(), |config| {
        config.aggregator = aggregator.url();
        config.connect_timeout = Duration::from_millis(300);
    });
    is_reset(&agent, "acme");
    agent.expect("requests_total{outcome=\"connect_failure\"}", 1);
    // The agent itself lacks nothing.
    agent.expect("dial_exhausted_total", 0);
    agent.stop();
    agent.join();
    stage::check(&aggregator, &[("acme", Outcome::ConnectFailure, 1)]);
    drop(waiting);
}

#[test]
fn an_answer_that_comes_after_the_client_gave_up_is_no_answer() {
    let stage = Stage::new();
    let (client, mut server) = stage.ask(&get("slow"));
    support::reset(client);
    let error = read_all(&mut server).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(server.write_all(OK).is_err());

    // One that says a close is only known to be gone once it refuses what is sent to it.
    let (client, mut server) = stage.ask(&get("slow"));
    drop(client);
    assert_eq!(read_all(&mut server).unwrap(), b"");
    send_until_it_fails(&mut server);
    stage.ends(&[("slow", Outcome::ClientAbort, 2)]);
}

/// Begins an answer of 100 MB and goes on with it until nobody takes it any more.
fn send_until_it_fails(server: &mut TcpStream) {
    const TOTAL: usize = 100_000_000;
    server
        .write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {TOTAL}\r\n\r\n").as_bytes())
        .unwrap();
    let chunk = vec![b'x'; 1 << 16];
    let mut sent = 0;
    while server.write_all(&chunk).is_ok() {
        sent += chunk.len();
        assert!(sent < TOTAL, "somebody takes an answer that nobody reads");
    }
}

#[test]
fn a_reset_in_the_middle_of_an_answer_comes_after_the_same_bytes() {
    let stage = Stage::new();
    let half = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";
    for length in [half.len(), half.len() - 5, 12] {
        let (mut client, mut server) = stage.ask(&get("acme"));
        server.write_all(&half[..length]).unwrap();
        assert_eq!(read_exactly(&mut client, length), &half[..length]);
        support::reset(server);
        let error = read_all(&mut client).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    stage.ends(&[("acme", Outcome::UpstreamReset, 3)]);
}

#[test]
fn half_an_answer_is_passed_on_and_is_a_failure() {
    let stage = Stage::new();
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let mut failed = 0;
    for answer in [OK, chunked] {
        for length in [0, 5, 20, answer.len() - 3, answer.len() - 1] {
            let (mut client, mut server) = stage.ask(&get("acme"));
            server.write_all(&answer[..length]).unwrap();
            drop(server);
            assert_eq!(read_all(&mut client).unwrap(), &answer[..length]);
            failed += 1;
        }
    }
    let (mut client, mut server) = stage.ask(&get("acme"));
    server.write_all(chunked).unwrap();
    assert_eq!(read_exactly(&mut client, chunked.len()), chunked);
    drop(client);
    stage.ends(&[
        ("acme", Outcome::UpstreamReset, failed),
        ("acme", Outcome::Success, 1),
    ]);
}

#[test]
fn an_application_that_accepts_and_closes_at_once_fails() {
    let stage = Stage::new();
    for _ in 0..20 {
        let mut client = client(&stage.agent);
        client.write_all(&get("acme")).unwrap();
        let server = stage.upstream.accept();
        // The request has come, and is not read.
        assert_eq!(server.peek(&mut [0]).unwrap(), 1);
        drop(server);
        let error = read_all(&mut client).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    // Where nothing was asked, nothing has failed.
    let mut unused = client(&stage.agent);
    drop(stage.upstream.accept());
    assert_eq!(read_all(&mut unused).unwrap(), b"");
    drop(unused);
    stage.ends(&[("acme", Outcome::UpstreamReset, 20)]);
}

/// How many requests each client sends to the application that closes early.
const REQUESTS: u64 = 300;

/// Without an agent a client that goes on where the application has closed loses that request, and connects again.
/// The agent connects again in its place, since the close reaches it before the request does; where the kernel tells
/// it of both in the other order, the request is on its way to a closed socket, and lost as well.
#[test]
fn early_closes_fail_every_other_request_without_an_agent_and_hardly_any_through_it() {
    let (direct, behind) = (Upstream::new(), Upstream::new());
    let application = direct.address();
    assert_eq!(failures(application, &close_after_each(direct)), REQUESTS / 2);
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(behind.address(), |config| config.aggregator = aggregator.url());
    let failed = failures(agent.address, &close_after_each(behind));
    assert!(failed <= REQUESTS / 20, "{failed} of {REQUESTS} requests fail");
    // Each failure that the client saw was counted, and nothing else.
    agent.stop();
    agent.join();
    stage::check(
        &aggregator,
        &[
            ("early", Outcome::Success, REQUESTS - failed),
            ("early", Outcome::UpstreamReset, failed),
        ],
    );
}

/// An application that says that connections stay open, and closes each after its first answer; it tells of each
/// close.
fn close_after_each(upstream: Upstream) -> Receiver<()> {
    let (close, closes) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in iter::repeat_with(|| upstream.accept()) {
            if let Ok(true) = read_head(&mut stream)
                && stream.write_all(OK).is_ok()
            {
                drop(stream);
                close.send(()).ok();
            }
        }
    });
    closes
}

/// Sends requests one after the other, each connection as long as it lasts and each request behind the close that
/// follows the answer before it; gives how many got no answer.
fn failures(address: SocketAddr, closes: &Receiver<()>) -> u64 {
    let (mut failed, mut open) = (0, None);
    for _ in 0..REQUESTS {
        let client = open.get_or_insert_with(|| connect(address));
        let mut answer = [0; OK.len()];
        let asked = client.write_all(&get("early"));
        match asked.and_then(|()| client.read_exact(&mut answer)) {
            Ok(()) => {
                assert_eq!(answer, OK);
                closes.recv_timeout(PATIENCE).unwrap();
            }
            Err(_) => {
                failed += 1;
                open = None;
            }
        }
    }
    failed
}

#[test]
fn what_an_application_does_not_read_is_not_kept_by_the_agent() {
    const TOTAL: usize = 64 << 20;
    let upstream = Upstream::new();
    let agent = Program::start(upstream.address(), &["--window=50ms"]);
    let (mut other, mut other_server) = (agent.client(), upstream.accept());
    exchange(&mut other, &mut other_server, &get("other"));
    let before = agent.resident();
    let mut client = agent.client();
    let head = format!("POST / HTTP/1.1\r\nx-tenant: deaf\r\ncontent-length: {TOTAL}\r\n\r\n");
    client.write_all(head.as_bytes()).unwrap();
    let mut deaf = upstream.accept();
    client
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let chunk = vec![b'x'; 1 << 16];
    let mut sent = 0;
    // Until the kernel's buffers are full.
    while let Ok(count) = client.write(&chunk) {
        sent += count;
        assert!(sent < TOTAL, "the agent takes more than the application reads");
    }
    let grown = agent.resident().saturating_sub(before);
    assert!(grown <= SLACK_BYTES, "{grown} bytes more for one connection");
    exchange(&mut other, &mut other_server, &get("other"));
    support::reset(client);
    // Whoever reads at last learns that the client is gone.
    let error = read_all(&mut deaf).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    agent.expect("requests_total{outcome=\"client_abort\"}", 1);
    agent.expect("requests_total{outcome=\"success\"}", 2);
}
