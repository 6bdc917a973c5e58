//! Bytes, closes and resets through the agent, and what it counts.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use crate::{
    aggregator::Aggregator,
    support::{self, Agent, Upstream, client, eventually, read_all, read_exactly},
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn get(tenant: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nhost: h\r\nX-Tenant: {tenant}\r\n\r\n").into_bytes()
}

#[test]
fn bytes_are_not_changed() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let (mut client, mut server) = (client(&agent), None);
    let request = b"\r\nPOST /Mixed?q HTTP/1.1\r\nHOST: h\r\nX-TeNaNt: Acme\r\nx-tenant:Acme\r\nTransfer-Encoding: chunked\r\n\r\n\
        5;ext=1\r\nhello\r\n0\r\nTrailer-A: b\r\n\r\n";
    let answer = b"HTTP/1.1 200 Very Fine\r\nX-ODD:   spaces \r\ntransfer-encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\nGrpc-Status: 0\r\n\r\n";
    for _ in 0..3 {
        client.write_all(request).unwrap();
        let server = server.get_or_insert_with(|| upstream.accept());
        assert_eq!(read_exactly(server, request.len()), request);
        server
            .write_all(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
            .unwrap();
        server.write_all(answer).unwrap();
        let interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n".len();
        assert!(read_exactly(&mut client, interim + answer.len()).ends_with(answer));
    }
    agent.expect("requests_total{outcome=\"success\"}", 3);
    agent.expect("opaque_connections_total{reason=\"not_http\"}", 0);
}

#[test]
fn five_pipelined_requests_get_five_answers() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let requests = get("a").repeat(5);
    client.write_all(&requests).unwrap();
    let mut server = upstream.accept();
    assert_eq!(read_exactly(&mut server, requests.len()), requests);
    server.write_all(&OK.repeat(5)).unwrap();
    assert_eq!(read_exactly(&mut client, OK.len() * 5), OK.repeat(5));
    agent.expect("requests_total{outcome=\"success\"}", 5);
}

#[test]
fn half_closed_connections_go_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut server = upstream.accept();
    assert_eq!(read_all(&mut server).unwrap(), get("a"));
    server.write_all(b"HTTP/1.0 200 OK\r\n\r\nuntil close").unwrap();
    drop(server);
    assert!(read_all(&mut client).unwrap().ends_with(b"until close"));
    agent.expect("requests_total{outcome=\"success\"}", 1);
}

#[test]
fn the_applications_half_close_is_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(b"hello").unwrap();
    let mut server = upstream.accept();
    assert_eq!(read_exactly(&mut server, 5), b"hello");
    server.write_all(b"bye").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut client).unwrap(), b"bye");
    client.write_all(b"still here").unwrap();
    assert_eq!(read_exactly(&mut server, 10), b"still here");
}

#[test]
fn the_applications_reset_is_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, get("a").len());
    support::reset(server);
    let error = read_all(&mut client).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    agent.expect("requests_total{outcome=\"upstream_reset\"}", 1);
}

#[test]
fn the_clients_reset_is_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, get("a").len());
    support::reset(client);
    let error = read_all(&mut server).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    agent.expect("requests_total{outcome=\"client_abort\"}", 1);
}

#[test]
fn a_client_that_leaves_is_no_fault_of_the_service() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, get("a").len());
    drop(client);
    // What most servers do when they see that the client is gone.
    assert_eq!(read_all(&mut server).unwrap(), b"");
    drop(server);
    agent.expect("requests_total{outcome=\"client_abort\"}", 1);
    agent.expect("requests_total{outcome=\"upstream_reset\"}", 0);
}

#[test]
fn a_refused_upload_gets_its_answer() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let head = b"POST / HTTP/1.1\r\ncontent-length: 100000000\r\n\r\n";
    client.write_all(head).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, head.len());
    let refusal = b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    server.write_all(refusal).unwrap();
    drop(server);
    assert_eq!(read_exactly(&mut client, refusal.len()), refusal);
    agent.expect("requests_total{outcome=\"client_error\"}", 1);
    agent.expect("requests_total{outcome=\"upstream_reset\"}", 0);
}

#[test]
fn a_slow_reader_holds_the_application_back() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, get("a").len());
    let total: usize = 64 << 20;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {total}\r\n\r\n");
    server.write_all(head.as_bytes()).unwrap();
    server.set_nonblocking(true).unwrap();
    let chunk = vec![b'x'; 1 << 20];
    let mut sent = 0;
    // Until the kernel's buffers are full and nothing moves any more.
    let mut stuck = 0;
    while stuck < 50 {
        match server.write(&chunk) {
            Ok(count) => (sent, stuck) = (sent + count, 0),
            Err(_) => {
                stuck += 1;
                std::thread::yield_now();
                std::thread::park_timeout(std::time::Duration::from_millis(2));
            }
        }
        assert!(sent < total, "the agent takes more than the client reads");
    }
    server.set_nonblocking(false).unwrap();
    let writer = std::thread::spawn(move || {
        while sent < total {
            sent += server.write(&chunk[..chunk.len().min(total - sent)]).unwrap();
        }
        server
    });
    let got = read_exactly(&mut client, head.len() + total);
    assert!(got[head.len()..].iter().all(|b| *b == b'x'));
    drop(writer.join().unwrap());
    agent.expect("requests_total{outcome=\"success\"}", 1);
}

#[test]
fn the_client_does_not_notice_an_idle_close() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    for round in 0..3 {
        client.write_all(&get("a")).unwrap();
        let mut server = upstream.accept();
        assert_eq!(
            read_exactly(&mut server, get("a").len()),
            get("a"),
            "round {round}"
        );
        server.write_all(OK).unwrap();
        assert_eq!(read_exactly(&mut client, OK.len()), OK);
        // The application closes the idle connection; the agent lets go of it too, and opens another.
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut server).unwrap(), b"");
    }
    agent.expect("requests_total{outcome=\"success\"}", 3);
    agent.expect("connections_total", 1);
    // The connection that waits in its queue goes with the listener.
    drop(upstream);
    assert_eq!(read_all(&mut client).unwrap(), b"");
    agent.expect("connections", 0);
    agent.expect("requests_total{outcome=\"connect_failure\"}", 0);
}

#[test]
fn a_close_that_was_announced_is_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    client.write_all(&get("a")).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, get("a").len());
    let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    server.write_all(answer).unwrap();
    drop(server);
    assert_eq!(read_all(&mut client).unwrap(), answer);
}

#[test]
fn connect_failures_are_counted_for_their_tenants() {
    let closed = Upstream::new().address();
    let agent = Agent::start(closed);
    let mut client = client(&agent);
    client.write_all(&get("acme")).unwrap();
    assert!(read_all(&mut client).is_err());
    agent.expect("requests_total{outcome=\"connect_failure\"}", 1);
    agent.expect("tenants", 1);
}

#[test]
fn a_server_that_speaks_first_is_relayed() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let mut server = upstream.accept();
    server.write_all(b"220 ready\r\n").unwrap();
    assert_eq!(read_exactly(&mut client, 11), b"220 ready\r\n");
    // Looks like the head of HTTP/2's SETTINGS, but does not stand at the beginning.
    server.write_all(&[0, 0, 0, 4, 0]).unwrap();
    assert_eq!(read_exactly(&mut client, 5), [0, 0, 0, 4, 0]);
    client.write_all(b"P").unwrap();
    client.write_all(b"R").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut server).unwrap(), b"PR");
    agent.expect("opaque_connections_total{reason=\"unsolicited_response\"}", 1);
}

#[test]
fn a_websocket_is_relayed() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let mut client = client(&agent);
    let upgrade = b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    client.write_all(upgrade).unwrap();
    let mut server = upstream.accept();
    read_exactly(&mut server, upgrade.len());
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x81\x02hi";
    server.write_all(switch).unwrap();
    assert_eq!(read_exactly(&mut client, switch.len()), switch);
    client.write_all(b"\x81\x00\xff").unwrap();
    assert_eq!(read_exactly(&mut server, 3), b"\x81\x00\xff");
    agent.expect("opaque_connections_total{reason=\"upgrade\"}", 1);
}

#[test]
fn stopping_waits_for_requests_and_not_for_idle_connections() {
    let upstream = Upstream::new();
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(upstream.address(), |config| config.aggregator = aggregator.url());
    let mut idle = client(&agent);
    idle.write_all(&get("a")).unwrap();
    let mut idle_server = upstream.accept_next(&get("a"));
    idle_server.write_all(OK).unwrap();
    assert_eq!(read_exactly(&mut idle, OK.len()), OK);
    let mut busy = client(&agent);
    busy.write_all(&get("a")).unwrap();
    let mut busy_server = upstream.accept_next(&get("a"));
    assert_eq!(agent.get("/readyz").0, 200);
    agent.stop();
    assert_eq!(read_all(&mut idle).unwrap(), b"");
    eventually("not ready", || agent.get("/readyz").0 == 503);
    assert_eq!(agent.get("/livez").0, 200);
    busy_server.write_all(OK).unwrap();
    assert_eq!(read_all(&mut busy).unwrap(), OK);
    agent.join();
}

#[test]
fn told_to_stop_twice_the_agent_does_not_wait() {
    let upstream = Upstream::new();
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(upstream.address(), |config| config.aggregator = aggregator.url());
    let mut busy = client(&agent);
    busy.write_all(&get("a")).unwrap();
    let _server = upstream.accept_next(&get("a"));
    agent.stop();
    agent.stop();
    let mut rest = Vec::new();
    assert_eq!(busy.read_to_end(&mut rest).unwrap_or(0), 0);
    agent.join();
}

/// What the application reads before the first byte of a client, where it is told who the client is
/// (haproxy.org, doc/proxy-protocol.txt, section 2.2).
fn announcement(client: &TcpStream, agent: &Agent) -> Vec<u8> {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (client.local_addr().unwrap(), agent.address) else {
        panic!("both are addresses of IPv4");
    };
    // The signature; version 2 and PROXY; TCP over IPv4; a length of 12.
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend(from.ip().octets());
    header.extend(to.ip().octets());
    header.extend(from.port().to_be_bytes());
    header.extend(to.port().to_be_bytes());
    assert_eq!(header.len(), 28);
    header
}

#[test]
fn the_application_is_told_who_the_client_is_on_each_connection() {
    const ROUNDS: usize = 3;
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| config.proxy_protocol = true);
    let mut client = client(&agent);
    let announced = announcement(&client, &agent);
    for _ in 0..ROUNDS {
        // It comes before the client has said anything.
        let mut server = upstream.accept_next(&announced);
        client.write_all(&get("a")).unwrap();
        assert_eq!(read_exactly(&mut server, get("a").len()), get("a"));
        server.write_all(OK).unwrap();
        assert_eq!(read_exactly(&mut client, OK.len()), OK);
        // The application closes the idle connection; nothing but the request has come on it.
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut server).unwrap(), b"");
    }
    let mut last = upstream.accept_next(&announced);
    drop(client);
    assert_eq!(read_all(&mut last).unwrap(), b"");
    agent.expect("requests_total{outcome=\"success\"}", ROUNDS as u64);
    agent.expect("connections_total", 1);
    // The headers are the agent's own bytes, and not passed on.
    agent.expect("received_bytes_total", (ROUNDS * get("a").len()) as u64);
}

#[test]
fn a_server_that_is_told_who_the_client_is_may_speak_first() {
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| config.proxy_protocol = true);
    let mut client = client(&agent);
    let mut server = upstream.accept_next(&announcement(&client, &agent));
    server.write_all(b"220 ready\r\n").unwrap();
    assert_eq!(read_exactly(&mut client, 11), b"220 ready\r\n");
    client.write_all(b"EHLO x\r\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut server).unwrap(), b"EHLO x\r\n");
}
