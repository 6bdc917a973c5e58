//! What the agent says of a request while it is under way, and of how long its answer took.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    time::Instant,
};

use crate::support::{Agent, Upstream, client, eventually, read_all, read_exactly};

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\n\r\n";
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
const BODY: &[u8] = b"hello";

/// A client that has asked, and the application's end, which has read it.
fn ask(agent: &Agent, upstream: &Upstream) -> (TcpStream, TcpStream) {
    let mut client = client(agent);
    client.write_all(GET).unwrap();
    (client, upstream.accept_next(GET))
}

/// Sends this to the client, which reads it.
fn say(bytes: &[u8], server: &mut TcpStream, client: &mut TcpStream) {
    server.write_all(bytes).unwrap();
    assert_eq!(read_exactly(client, bytes.len()), bytes);
}

/// Waits until the agent has closed some windows.
fn let_windows_pass(agent: &Agent) {
    let sealed = || agent.metric("windows_sealed_total").unwrap();
    let then = sealed();
    eventually("some windows are closed", || sealed() > then + 3);
}

#[test]
fn the_first_byte_of_an_answer_has_a_time_of_its_own() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let (mut slow, mut slow_server) = ask(&agent, &upstream);
    say(HEAD, &mut slow_server, &mut slow);
    // The agent takes the time when it has written: once it serves others, it has taken it.
    let (mut other, mut other_server) = ask(&agent, &upstream);
    say(HEAD, &mut other_server, &mut other);
    say(BODY, &mut other_server, &mut other);

    let head_was_read = Instant::now();
    let_windows_pass(&agent);
    // That of the other.
    agent.expect("time_to_first_byte_seconds_count", 1);
    let held_back = head_was_read.elapsed();
    say(BODY, &mut slow_server, &mut slow);

    agent.expect("requests_total{outcome=\"success\"}", 2);
    agent.expect("time_to_first_byte_seconds_count", 2);
    agent.expect("request_duration_seconds_count", 2);
    let whole = agent.seconds("request_duration_seconds_sum");
    let first_byte = agent.seconds("time_to_first_byte_seconds_sum");
    assert!(first_byte > 0.0);
    assert!(
        whole - first_byte >= held_back.as_secs_f64(),
        "{whole} s to the last byte and {first_byte} s to the first, with {held_back:?} between them"
    );
}

#[test]
fn requests_are_in_flight_until_they_end() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let (mut one, mut one_server) = ask(&agent, &upstream);
    agent.expect("in_flight_requests", 1);
    // Two more on one connection.
    let mut two = client(&agent);
    two.write_all(&GET.repeat(2)).unwrap();
    let mut two_server = upstream.accept_next(&GET.repeat(2));
    agent.expect("in_flight_requests", 3);
    say(HEAD, &mut one_server, &mut one);
    let_windows_pass(&agent);
    agent.expect("in_flight_requests", 3);
    say(BODY, &mut one_server, &mut one);
    agent.expect("in_flight_requests", 2);
    say(&[HEAD, BODY].concat(), &mut two_server, &mut two);
    agent.expect("in_flight_requests", 1);
    // The last is given up by its client.
    two.shutdown(Shutdown::Both).unwrap();
    assert_eq!(read_all(&mut two_server).unwrap(), b"");
    drop(two_server);
    agent.expect("in_flight_requests", 0);
    agent.expect("requests_total{outcome=\"success\"}", 2);
    agent.expect("requests_total{outcome=\"client_abort\"}", 1);
}

#[test]
fn bytes_are_counted_when_they_are_passed_on() {
    let upstream = Upstream::new();
    let agent = Agent::start(upstream.address());
    let (mut client, mut server) = ask(&agent, &upstream);
    agent.expect("received_bytes_total", GET.len() as u64);
    agent.expect("sent_bytes_total", 0);
    say(HEAD, &mut server, &mut client);
    agent.expect("sent_bytes_total", HEAD.len() as u64);
    say(BODY, &mut server, &mut client);
    let mut passed = (HEAD.len() + BODY.len()) as u64;
    agent.expect("sent_bytes_total", passed);
    // Most of a long body is passed on without being looked at.
    let long = vec![b'x'; 1 << 20];
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", long.len());
    client.write_all(GET).unwrap();
    assert_eq!(read_exactly(&mut server, GET.len()), GET);
    say(head.as_bytes(), &mut server, &mut client);
    let writer = std::thread::spawn(move || {
        server.write_all(&long).unwrap();
        server
    });
    assert!(
        read_exactly(&mut client, 1 << 20)
            .iter()
            .all(|byte| *byte == b'x')
    );
    drop(writer.join().unwrap());
    passed += head.len() as u64 + (1 << 20);
    agent.expect("sent_bytes_total", passed);
    agent.expect("received_bytes_total", 2 * GET.len() as u64);
}
