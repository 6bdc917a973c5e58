//! One agent follows another on a listening socket that a supervisor holds.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    aggregator::Aggregator,
    support::{PATIENCE, eventually, read_all},
};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: h\r\nx-tenant: acme\r\n\r\n";
/// The application closes, so that no port of the clients stays in TIME_WAIT.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";

/// Clients that connect without a pause.
const CLIENTS: usize = 3;

/// Starts a program with two sockets as its descriptors 3 and 4.
const HAND_OVER: &str = "export LISTEN_PID=$$; exec \"$0\" \"$@\" 3<&0 4<&1 </dev/null >/dev/null";

/// An agent that runs in a process of its own, with inherited sockets.
struct Process {
    child: Child,
    /// Where its admin server is; the test holds the socket too.
    admin: TcpListener,
    aggregator: Aggregator,
}

impl Process {
    fn start(listener: &TcpListener, upstream: SocketAddr, instance: &str) -> Self {
        let admin = TcpListener::bind("127.0.0.1:0").unwrap();
        let aggregator = Aggregator::start();
        let child = Command::new("sh")
            .args(["-c", HAND_OVER, env!("CARGO_BIN_EXE_coalmine-agent")])
            // Neither is opened.
            .args(["--listen=192.0.2.1:1", "--admin=192.0.2.1:2"])
            .arg(format!("--upstream={upstream}"))
            .arg(format!("--aggregator={}", aggregator.url()))
            .arg(format!("--instance={instance}"))
            .args(["--service=shop", "--version=v2", "--arm=canary"])
            .args(["--tenant=header:x-tenant", "--window=20ms", "--drain=20s"])
            .envs([("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "listen:admin")])
            .env("RUST_LOG", "warn")
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())))
            .stdout(Stdio::from(OwnedFd::from(admin.try_clone().unwrap())))
            .spawn()
            .unwrap();
        Self {
            child,
            admin,
            aggregator,
        }
    }

    /// Connections that it has accepted; waits until it runs.
    fn accepted(&self) -> u64 {
        let mut stream = TcpStream::connect(self.admin.local_addr().unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let text = String::from_utf8(read_all(&mut stream).unwrap()).unwrap();
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix("coalmine_agent_connections_total "));
        value.unwrap().parse().unwrap()
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// Waits until it has ended, and gives the requests that it has counted.
    fn join(&mut self) -> u64 {
        let mut status = None;
        eventually("the agent has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success());
        eventually("it has delivered everything", || {
            self.aggregator.told().bye.is_some()
        });
        self.aggregator.told().requests.values().sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// How a client's request ended.
enum Seen {
    Answered,
    /// Closed in order before the first byte of an answer: the agent had accepted it, stopped, and had not
    /// seen the request. A client asks again then, as RFC 9112 section 9.3.1 says.
    Closed,
    Refused,
    /// The answer began and did not end, or the connection was reset.
    Cut,
}

/// What the clients met.
#[derive(Debug, Default)]
struct Met {
    stop: AtomicBool,
    answered: AtomicU64,
    closed: AtomicU64,
    refused: AtomicU64,
    cut: AtomicU64,
}

impl Met {
    /// Asks once on each connection, until told to stop.
    fn ask(&self, address: SocketAddr) {
        while !self.stop.load(Ordering::Relaxed) {
            let count = match once(address) {
                Seen::Answered => &self.answered,
                Seen::Closed => &self.closed,
                Seen::Refused => &self.refused,
                Seen::Cut => &self.cut,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn once(address: SocketAddr) -> Seen {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return Seen::Refused;
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    if stream.write_all(REQUEST).is_err() {
        return Seen::Cut;
    }
    match read_all(&mut stream) {
        Ok(answer) if answer == ANSWER => Seen::Answered,
        Ok(answer) if answer.is_empty() => Seen::Closed,
        Ok(_) | Err(_) => Seen::Cut,
    }
}

/// An application that answers one request of each connection.
fn application() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; REQUEST.len()];
            // The agent may have stopped before there was one.
            if stream.read_exact(&mut request).is_ok() {
                assert_eq!(request, REQUEST);
                stream.write_all(ANSWER).ok();
            }
        }
    });
    address
}

#[test]
fn no_client_is_refused_or_cut_when_one_agent_follows_another() {
    let upstream = application();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut first = Process::start(&listener, upstream, "pod-1");
    let met = Arc::new(Met::default());
    let clients: Vec<JoinHandle<()>> = (0..CLIENTS)
        .map(|_| {
            let met = met.clone();
            thread::spawn(move || met.ask(address))
        })
        .collect();
    eventually("the first serves", || first.accepted() > 0);

    let mut second = Process::start(&listener, upstream, "pod-2");
    eventually("the second serves", || second.accepted() > 0);
    first.terminate();
    let of_first = first.join();
    let answered = || met.answered.load(Ordering::Relaxed);
    let then = answered();
    eventually("the second serves alone", || answered() > then + 200);

    met.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    second.terminate();
    let of_second = second.join();
    assert_eq!(met.refused.load(Ordering::Relaxed), 0, "{met:?}");
    assert_eq!(met.cut.load(Ordering::Relaxed), 0, "{met:?}");
    // At most what each client had under way when the first stopped.
    assert!(met.closed.load(Ordering::Relaxed) <= CLIENTS as u64, "{met:?}");
    assert!(of_first > 0 && of_second >= 200, "{of_first} and {of_second}");
    assert_eq!(of_first + of_second, answered(), "each request is counted once");
}

/// Runs the agent with something else than a listening socket.
fn refused(stdin: Stdio, names: &str) -> Output {
    Command::new("sh")
        .args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\" 3<&0"])
        .arg(env!("CARGO_BIN_EXE_coalmine-agent"))
        .args([
            "--aggregator=http://127.0.0.1:1",
            "--service=shop",
            "--version=v2",
            "--arm=canary",
        ])
        .envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", names)])
        .stdin(stdin)
        .output()
        .unwrap()
}

#[test]
fn what_cannot_be_accepted_from_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    for (stdin, names, expected) in [
        (
            Stdio::null(),
            "listen",
            "is not a socket; hand over a listening TCP socket",
        ),
        (
            Stdio::from(OwnedFd::from(connected)),
            "listen",
            "it does not listen",
        ),
        (
            Stdio::from(OwnedFd::from(listener)),
            "agent.socket",
            "call it listen or admin",
        ),
    ] {
        let output = refused(stdin, names);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{text}");
        assert!(text.contains(expected) && text.lines().count() == 1, "{text}");
    }
}
