//! Many connections at a time: idle ones, slow ones, silent ones, and more than may be.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use coalmine_proto::names::Outcome;
use rustix::net::sockopt::set_socket_send_buffer_size;

use crate::{
    aggregator::Aggregator,
    program::{Program, SLACK_BYTES, connections_that_fit},
    stage::{self, OK, connect_with_room, exchange, get},
    support::{Agent, Upstream, client, eventually, read_all, read_exactly},
};

/// What an open connection may cost (DESIGN.md, section 12).
const CONNECTION_BYTES: u64 = 2 * 1024;

/// What is kept of an answer that a client does not take (relay/half.rs).
const BUFFER_BYTES: u64 = 64 * 1024;

/// What a table that all connections share may grow by when there are twice as many: between two powers of two, it
/// doubles once.
const TABLE_BYTES: u64 = 256 * 1024;

/// A client and the application's end.
type Pair = (TcpStream, TcpStream);

/// Opens a connection and has a request answered on it.
fn begin(agent: &Program, upstream: &Upstream, tenant: &str) -> Pair {
    let mut client = agent.client();
    let request = get(tenant);
    client.write_all(&request).unwrap();
    let mut server = upstream.accept_next(&request);
    server.write_all(OK).unwrap();
    assert_eq!(read_exactly(&mut client, OK.len()), OK);
    (client, server)
}

fn go_on(pair: &mut Pair, tenant: &str) {
    exchange(&mut pair.0, &mut pair.1, &get(tenant));
}

#[test]
fn idle_connections_cost_little_and_hold_nobody_up() {
    const WANTED: u64 = 5_000;
    let count = connections_that_fit(WANTED);
    let upstream = Upstream::new();
    let agent = Program::start(upstream.address(), &["--window=100ms"]);
    // The first ones pay for what all share.
    let mut pairs: Vec<Pair> = (0..50).map(|_| begin(&agent, &upstream, "idle")).collect();
    let before = agent.resident();
    let mut half_way = before;
    let mut exchanges = pairs.len() as u64;
    for number in 0..count {
        if number == count / 2 {
            agent.expect("connections", pairs.len() as u64);
            half_way = agent.resident();
        }
        pairs.push(begin(&agent, &upstream, "idle"));
        exchanges += 1;
        if number % 100 == 0 {
            go_on(&mut pairs[0], "busy");
            exchanges += 1;
        }
    }
    agent.expect("connections", pairs.len() as u64);
    let resident = agent.resident();
    let grown = resident.saturating_sub(before);
    let bound = count * CONNECTION_BYTES + SLACK_BYTES;
    assert!(
        grown <= bound,
        "{count} idle connections take {grown} bytes; at most {bound} are allowed"
    );
    // The second half pays for nothing but itself.
    let (grown, more) = (resident.saturating_sub(half_way), count - count / 2);
    let bound = more * CONNECTION_BYTES + TABLE_BYTES;
    assert!(
        grown <= bound,
        "{more} idle connections more take {grown} bytes; at most {bound} are allowed"
    );
    // None was forgotten.
    for pair in pairs.iter_mut().step_by(25) {
        go_on(pair, "busy");
        exchanges += 1;
    }
    agent.expect("requests_total{outcome=\"success\"}", exchanges);
    // Clients first: a close by the application alone would have the agent open another connection.
    let (clients, servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    drop(clients);
    for mut server in servers {
        assert_eq!(read_all(&mut server).unwrap(), b"");
    }
    agent.expect("connections", 0);
    agent.expect("requests_total{outcome=\"client_abort\"}", 0);
}

#[test]
fn slow_heads_are_passed_on_as_they_come_and_hold_nobody_up() {
    const WANTED: u64 = 1_000;
    const AT_ONCE: usize = 20;
    let count = connections_that_fit(WANTED);
    let upstream = Upstream::new();
    let agent = Program::start(upstream.address(), &["--window=100ms"]);
    let mut other = begin(&agent, &upstream, "other");
    let mut exchanges = 1;
    let head = get("slow");
    let before = agent.resident();
    let mut pairs: Vec<Pair> = Vec::new();
    for _ in 0..count {
        let mut client = agent.client();
        client.write_all(&head[..AT_ONCE]).unwrap();
        pairs.push((client, upstream.accept_next(&head[..AT_ONCE])));
    }
    for byte in &head[AT_ONCE..head.len() - 1] {
        for (client, server) in &mut pairs {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(read_exactly(server, 1), [*byte]);
        }
        go_on(&mut other, "other");
        exchanges += 1;
    }
    let grown = agent.resident().saturating_sub(before);
    // What was read of an incomplete head is kept once, in a buffer that grows by doubling.
    let bound = count * (CONNECTION_BYTES + 2 * head.len() as u64) + SLACK_BYTES;
    assert!(
        grown <= bound,
        "{count} incomplete heads take {grown} bytes; at most {bound} are allowed"
    );
    agent.expect("requests_total{outcome=\"success\"}", exchanges);
    agent.expect("in_flight_requests", 0);
    for (client, server) in &mut pairs {
        client.write_all(&head[head.len() - 1..]).unwrap();
        assert_eq!(read_exactly(server, 1), head[head.len() - 1..]);
        server.write_all(OK).unwrap();
        assert_eq!(read_exactly(client, OK.len()), OK);
    }
    agent.expect("requests_total{outcome=\"success\"}", exchanges + count);
}

/// An application that gives the tenant `deaf` a long answer, and all others a short one. Its kernel keeps little.
fn answer_at_length(room: usize, length: usize) -> SocketAddr {
    const STACK_BYTES: usize = 128 * 1024;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    set_socket_send_buffer_size(&listener, room).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answering = thread::Builder::new().stack_size(STACK_BYTES);
            let answering = answering.spawn(move || {
                let mut request = vec![0; get("deaf").len()];
                while stream.read_exact(&mut request).is_ok() {
                    let answered = if request == get("deaf") {
                        write_at_length(&mut stream, length)
                    } else {
                        stream.write_all(OK)
                    };
                    if answered.is_err() {
                        return;
                    }
                }
            });
            answering.unwrap();
        }
    });
    address
}

fn write_at_length(stream: &mut TcpStream, length: usize) -> io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")?;
    let piece = [b'x'; 4096];
    for _ in 0..length / piece.len() {
        stream.write_all(&piece)?;
    }
    Ok(())
}

#[test]
fn clients_that_do_not_read_cost_a_buffer_each_and_hold_nobody_up() {
    const WANTED: u64 = 1_000;
    const ANSWER: usize = 1 << 20;
    const ROOM: usize = 16 * 1024;
    let count = connections_that_fit(WANTED);
    // What is accepted from it has as little room: else the kernel would keep the whole answers for the agent.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    set_socket_send_buffer_size(&listener, ROOM).unwrap();
    let application = answer_at_length(ROOM, ANSWER);
    let agent = Program::inheriting(&listener, application, &["--window=50ms"]);
    let mut other = agent.client();
    let mut ask_other = || {
        // As long as the requests of the deaf.
        other.write_all(&get("next")).unwrap();
        assert_eq!(read_exactly(&mut other, OK.len()), OK);
    };
    ask_other();
    let before = agent.resident();
    let mut deaf = Vec::new();
    for _ in 0..count {
        let mut client = connect_with_room(agent.address, ROOM);
        client.write_all(&get("deaf")).unwrap();
        deaf.push(client);
    }
    agent.expect("in_flight_requests", count);
    let (mut passed, mut since) = (0, 0);
    eventually("nothing is passed on any more", || {
        let windows = agent.metric("windows_sealed_total");
        let now = agent.metric("sent_bytes_total");
        if now != passed {
            (passed, since) = (now, windows);
        }
        windows > since + 10
    });
    let asked = count * ANSWER as u64;
    assert!(
        passed < asked / 2,
        "{passed} of {asked} bytes found room elsewhere"
    );
    ask_other();
    let grown = agent.resident().saturating_sub(before);
    let bound = count * (BUFFER_BYTES + CONNECTION_BYTES) + SLACK_BYTES;
    assert!(
        grown <= bound,
        "{count} clients that do not read take {grown} bytes; at most {bound} are allowed"
    );
    agent.expect("requests_total{outcome=\"success\"}", 2);
    // They close with bytes unread, which is a reset.
    drop(deaf);
    agent.expect("requests_total{outcome=\"client_abort\"}", count);
    agent.expect("connections", 1);
    ask_other();
    agent.expect("requests_total{outcome=\"success\"}", 3);
}

#[test]
fn silent_connections_are_ended_and_others_are_not() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let options = ["--window=50ms", "--idle-timeout=1s"];
    let agent = Program::with(upstream.address(), &aggregator.url(), &options);
    let mut busy = begin(&agent, &upstream, "busy");
    let idle = begin(&agent, &upstream, "idle");
    let mut unused = agent.client();
    let unused_server = upstream.accept();
    let mut half = agent.client();
    half.write_all(&get("half")[..20]).unwrap();
    let half_server = upstream.accept_next(&get("half")[..20]);
    let mut unanswered = agent.client();
    unanswered.write_all(&get("unanswered")).unwrap();
    let unanswered_server = upstream.accept_next(&get("unanswered"));

    let ended = thread::spawn(move || {
        let (mut idle, mut idle_server) = idle;
        for stream in [&mut idle, &mut unused, &mut half] {
            assert_eq!(read_all(stream).unwrap(), b"");
        }
        for mut server in [unused_server, half_server] {
            assert_eq!(read_all(&mut server).unwrap(), b"");
        }
        assert_eq!(read_all(&mut idle_server).unwrap(), b"");
        // A request that is given up is a failure, and must look like one.
        let error = read_all(&mut unanswered).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        drop(unanswered_server);
    });
    let mut exchanges = 1;
    eventually("silent connections are ended", || {
        go_on(&mut busy, "busy");
        exchanges += 1;
        ended.is_finished()
    });
    ended.join().unwrap();
    go_on(&mut busy, "busy");
    drop(busy);
    agent.stop();
    stage::check(
        &aggregator,
        &[
            ("busy", Outcome::Success, exchanges + 1),
            ("idle", Outcome::Success, 1),
            ("unanswered", Outcome::Timeout, 1),
        ],
    );
}

#[test]
fn connections_beyond_the_limit_wait_and_are_served_when_others_leave() {
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| config.max_connections = 2);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = client(&agent);
        client.write_all(&get("held")).unwrap();
        held.push((client, upstream.accept_next(&get("held"))));
    }
    let waiting: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut waiting = client(&agent);
            waiting.write_all(&get("waiting")).unwrap();
            waiting
        })
        .collect();
    // Those that are inside go on meanwhile, and nobody else is let in.
    for (client, server) in &mut held {
        server.write_all(OK).unwrap();
        assert_eq!(read_exactly(client, OK.len()), OK);
        exchange(client, server, &get("held"));
    }
    agent.expect("requests_total{outcome=\"success\"}", 4);
    agent.expect("connections_total", 2);
    agent.expect("connections", 2);
    for (served, mut client) in (1..).zip(waiting) {
        // One leaves; the next is served, and takes its place.
        let (leaving, mut left) = held.remove(0);
        drop(leaving);
        assert_eq!(read_all(&mut left).unwrap(), b"");
        drop(left);
        let mut server = upstream.accept_next(&get("waiting"));
        server.write_all(OK).unwrap();
        assert_eq!(read_exactly(&mut client, OK.len()), OK);
        held.push((client, server));
        agent.expect("requests_total{outcome=\"success\"}", 4 + served);
        agent.expect("connections_total", 2 + served);
    }
    agent.expect("requests_total{outcome=\"connect_failure\"}", 0);
    agent.expect("requests_total{outcome=\"client_abort\"}", 0);
}
