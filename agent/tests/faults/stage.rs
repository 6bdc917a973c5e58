//! An application, an agent and an aggregator, and what the aggregator must have been told at the end.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    iter,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::OwnedFd,
    thread,
};

use coalmine_proto::names::{Outcome, Outcomes};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt::set_socket_recv_buffer_size};

use crate::{
    aggregator::Aggregator,
    support::{Agent, Upstream, client, patient, read_exactly},
};

/// What applications answer when nothing is wrong.
pub(crate) const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A request of a tenant.
pub(crate) fn get(tenant: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nhost: h\r\nX-Tenant: {tenant}\r\n\r\n").into_bytes()
}

/// How many requests of a tenant ended in which way.
pub(crate) type Expected<'a> = &'a [(&'a str, Outcome, u64)];

/// An application that does what the test says, behind an agent in this process.
pub(crate) struct Stage {
    pub(crate) upstream: Upstream,
    pub(crate) agent: Agent,
    aggregator: Aggregator,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
        let agent = Agent::with(upstream.address(), |config| config.aggregator = aggregator.url());
        Self {
            upstream,
            agent,
            aggregator,
        }
    }

    /// A client that has sent this, and the application's end, which has read it.
    pub(crate) fn ask(&self, request: &[u8]) -> (TcpStream, TcpStream) {
        let mut client = client(&self.agent);
        client.write_all(request).unwrap();
        (client, self.upstream.accept_next(request))
    }

    /// Stops the agent; the aggregator must have been told exactly this.
    #[track_caller]
    pub(crate) fn ends(mut self, expected: Expected<'_>) {
        self.agent.stop();
        self.agent.join();
        check(&self.aggregator, expected);
    }
}

/// The aggregator of an agent that has ended must have been told exactly this, in one session.
#[track_caller]
pub(crate) fn check(aggregator: &Aggregator, expected: Expected<'_>) {
    let mut must_be: BTreeMap<String, Outcomes> = BTreeMap::new();
    for (tenant, outcome, count) in expected.iter().filter(|(_, _, count)| *count > 0) {
        must_be.entry((*tenant).to_owned()).or_default().0[*outcome as usize] += count;
    }
    let told = aggregator.told();
    assert_eq!(told.hellos.len(), 1, "names are those of one session");
    assert_eq!(told.outcomes, must_be);
    assert!(told.applied.iter().all(|batch| batch.gap.is_none()));
}

/// Sends a request on a connection whose other end is this, and has it answered.
pub(crate) fn exchange(client: &mut TcpStream, server: &mut TcpStream, request: &[u8]) {
    client.write_all(request).unwrap();
    assert_eq!(read_exactly(server, request.len()), request);
    server.write_all(OK).unwrap();
    assert_eq!(read_exactly(client, OK.len()), OK);
}

/// From now on an application answers every request on every connection.
pub(crate) fn answer_all(upstream: Upstream) {
    thread::spawn(move || {
        for stream in iter::repeat_with(|| upstream.accept()) {
            thread::spawn(move || answer(stream));
        }
    });
}

fn answer(mut stream: TcpStream) {
    while let Ok(true) = read_head(&mut stream) {
        if stream.write_all(OK).is_err() {
            return;
        }
    }
}

/// Reads a request without a body; false if the connection was closed before it.
pub(crate) fn read_head(stream: &mut TcpStream) -> io::Result<bool> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Ok(false);
        }
        head.push(byte[0]);
    }
    Ok(true)
}

/// Sends requests of a tenant to an agent, one after the other, on a connection of their own.
pub(crate) fn requests(agent: SocketAddr, tenant: &str, count: usize) {
    let mut client = connect(agent);
    for _ in 0..count {
        client.write_all(&get(tenant)).unwrap();
        assert_eq!(read_exactly(&mut client, OK.len()), OK);
    }
}

/// A client's connection.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    patient(TcpStream::connect(address).unwrap())
}

/// A client's connection for which the kernel keeps little that is not read.
pub(crate) fn connect_with_room(address: SocketAddr, bytes: usize) -> TcpStream {
    let socket = socket();
    // Before it connects, so that it never offers more room.
    set_socket_recv_buffer_size(&socket, bytes).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    patient(TcpStream::from(socket))
}

/// An address that is taken, so that nobody else gets it, and on which nobody listens.
pub(crate) fn closed() -> TcpListener {
    let socket = socket();
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    TcpListener::from(socket)
}

/// From now on somebody listens, and lets so many wait.
pub(crate) fn open(closed: &TcpListener, backlog: i32) {
    rustix::net::listen(closed, backlog).unwrap();
}

fn socket() -> OwnedFd {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    socket.unwrap()
}
