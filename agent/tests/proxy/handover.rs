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

const REQUEST: &[u8] = b"GET /once HTTP/1.1\r\nhost: h\r\nx-tenant: acme\r\n\r\n";
/// The application closes, so that no port of the clients stays in TIME_WAIT.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";

/// A request after which the connection stays open; as long as the other.
const KEPT_REQUEST: &[u8] = b"GET /kept HTTP/1.1\r\nhost: h\r\nx-tenant: acme\r\n\r\n";
const KEPT_ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Clients that connect for each request, and clients that keep their connections; all ask without a pause.
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
    /// Closed in order before the first byte of an answer.
    Closed,
    Refused,
    /// The answer began and did not end, or the connection was reset.
    Cut,
}

/// The two kinds of clients.
const KINDS: [fn(&Met, SocketAddr); 2] = [Met::ask, Met::keep_asking];

/// What the clients met.
#[derive(Debug, Default)]
struct Met {
    stop: AtomicBool,
    answered: AtomicU64,
    /// Of these, how many on a connection that was kept.
    answered_again: AtomicU64,
    /// Connections that were closed before their first answer.
    closed: AtomicU64,
    /// Kept connections that were closed when the client had just asked again. The client then asks on another,
    /// as RFC 9112 section 9.3.1 says.
    closed_between: AtomicU64,
    refused: AtomicU64,
    cut: AtomicU64,
}

impl Met {
    /// Asks once on each connection, until told to stop.
    fn ask(&self, address: SocketAddr) {
        while !self.is_over() {
            let seen = match connect(address) {
                Some(mut stream) => once(&mut stream),
                None => Seen::Refused,
            };
            self.count(&seen, true);
        }
    }

    /// Asks again and again on one connection, and on another when it is closed, until told to stop.
    fn keep_asking(&self, address: SocketAddr) {
        let mut kept = None;
        while !self.is_over() {
            let is_first = kept.is_none();
            let Some(mut stream) = kept.take().or_else(|| connect(address)) else {
                self.count(&Seen::Refused, is_first);
                continue;
            };
            let seen = again(&mut stream);
            self.count(&seen, is_first);
            if matches!(seen, Seen::Answered) {
                kept = Some(stream);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Counts what was seen on a connection, for the first time or later.
    fn count(&self, seen: &Seen, is_first: bool) {
        let count = match seen {
            Seen::Answered => &self.answered,
            Seen::Closed if is_first => &self.closed,
            Seen::Closed => &self.closed_between,
            Seen::Refused => &self.refused,
            Seen::Cut => &self.cut,
        };
        count.fetch_add(1, Ordering::Relaxed);
        if matches!(seen, Seen::Answered) && !is_first {
            self.answered_again.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn connect(address: SocketAddr) -> Option<TcpStream> {
    let stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    Some(stream)
}

/// Asks on a connection of its own.
fn once(stream: &mut TcpStream) -> Seen {
    if stream.write_all(REQUEST).is_err() {
        return Seen::Cut;
    }
    match read_all(stream) {
        Ok(answer) if answer == ANSWER => Seen::Answered,
        Ok(answer) if answer.is_empty() => Seen::Closed,
        Ok(_) | Err(_) => Seen::Cut,
    }
}

/// Asks on a connection that stays open.
fn again(stream: &mut TcpStream) -> Seen {
    if stream.write_all(KEPT_REQUEST).is_err() {
        return Seen::Cut;
    }
    let mut answer = [0; KEPT_ANSWER.len()];
    let mut got = 0;
    while got < answer.len() {
        match stream.read(&mut answer[got..]) {
            Ok(0) if got == 0 => return Seen::Closed,
            Ok(0) | Err(_) => return Seen::Cut,
            Ok(count) => got += count,
        }
    }
    assert_eq!(answer, KEPT_ANSWER);
    Seen::Answered
}

/// An application that keeps its connections, as long as nobody asks for one answer only.
fn application() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    address
}

fn answer(mut stream: TcpStream) {
    stream.set_nodelay(true).ok();
    let mut request = [0; REQUEST.len()];
    // The agent may have stopped before there was one.
    while stream.read_exact(&mut request).is_ok() {
        let is_kept = request == KEPT_REQUEST;
        assert!(is_kept || request == REQUEST, "{}", request.escape_ascii());
        let answer = if is_kept { KEPT_ANSWER } else { ANSWER };
        if stream.write_all(answer).is_err() || !is_kept {
            return;
        }
    }
}

#[test]
fn no_client_is_refused_or_cut_when_one_agent_follows_another() {
    let upstream = application();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut first = Process::start(&listener, upstream, "pod-1");
    let met = Arc::new(Met::default());
    let clients: Vec<JoinHandle<()>> = KINDS
        .repeat(CLIENTS)
        .into_iter()
        .map(|ask| {
            let met = met.clone();
            thread::spawn(move || ask(&met, address))
        })
        .collect();
    eventually("the first serves", || first.accepted() > 0);

    let mut second = Process::start(&listener, upstream, "pod-2");
    eventually("the second serves", || second.accepted() > 0);
    first.terminate();
    let of_first = first.join();
    let answered = || met.answered.load(Ordering::Relaxed);
    let answered_again = || met.answered_again.load(Ordering::Relaxed);
    let then = (answered(), answered_again());
    eventually("the second serves alone", || {
        answered() > then.0 + 200 && answered_again() > then.1 + 50
    });

    met.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    second.terminate();
    let of_second = second.join();
    assert_eq!(met.refused.load(Ordering::Relaxed), 0, "{met:?}");
    assert_eq!(met.cut.load(Ordering::Relaxed), 0, "{met:?}");
    // A client that has connected gets its first answer.
    assert_eq!(met.closed.load(Ordering::Relaxed), 0, "{met:?}");
    // Each connection that was kept was closed at most once, when the first stopped.
    assert!(
        met.closed_between.load(Ordering::Relaxed) <= CLIENTS as u64,
        "{met:?}"
    );
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
