//! An agent, clients and applications, on loopback.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use coalmine_agent::{
    config::{Command, Config, Target},
    run::Bound,
};
use tokio::sync::mpsc;

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An agent that runs in this process.
pub(crate) struct Agent {
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// An agent without an aggregator.
    pub(crate) fn start(upstream: SocketAddr) -> Self {
        Self::with(upstream, |_| {})
    }

    pub(crate) fn with(upstream: SocketAddr, change: impl FnOnce(&mut Config)) -> Self {
        let args = [
            "coalmine-agent",
            "--listen=127.0.0.1:0",
            "--admin=127.0.0.1:0",
            "--aggregator=http://127.0.0.1:1",
            "--service=shop",
            "--version=v2",
            "--arm=canary",
            "--instance=pod-1",
            "--tenant=header:x-tenant",
            "--window=20ms",
            "--drain=20s",
        ];
        let Ok(Command::Run(mut config)) = Command::parse(args.map(Into::into)) else {
            panic!("the arguments are good");
        };
        config.upstream = Target::Address(upstream);
        change(&mut config);
        let bound = Bound::new(*config).unwrap();
        let (address, admin) = (bound.listen_address().unwrap(), bound.admin_address().unwrap());
        let (stop, stopped) = mpsc::channel(2);
        let thread = thread::spawn(move || bound.run(stopped).unwrap());
        Self {
            address,
            admin,
            stop,
            thread: Some(thread),
        }
    }

    /// Asks the agent to stop.
    pub(crate) fn stop(&self) {
        self.stop.try_send(()).unwrap();
    }

    /// Waits until it has stopped.
    pub(crate) fn join(&mut self) {
        let thread = self.thread.take().unwrap();
        eventually("the agent has stopped", || thread.is_finished());
        thread.join().unwrap();
    }

    /// A connection to the admin server.
    pub(crate) fn admin(&self) -> TcpStream {
        patient(TcpStream::connect(self.admin).unwrap())
    }

    /// Status and body of a path of the admin server.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path)
    }

    /// Status and body of what the admin server answers to this method.
    pub(crate) fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = self.admin();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let answer = String::from_utf8(read_all(&mut stream).unwrap()).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    /// A metric, without `coalmine_agent_`.
    pub(crate) fn metric(&self, name: &str) -> Option<u64> {
        self.scrape(name).map(|value| value.parse().unwrap())
    }

    /// A metric of time, without `coalmine_agent_`.
    pub(crate) fn seconds(&self, name: &str) -> f64 {
        self.scrape(name).unwrap().parse().unwrap()
    }

    fn scrape(&self, name: &str) -> Option<String> {
        let (_, text) = self.get("/metrics");
        series(&text, name).map(str::to_owned)
    }

    /// Waits until the metric has the value.
    #[track_caller]
    pub(crate) fn expect(&self, name: &str, value: u64) {
        let mut last = None;
        let deadline = Instant::now() + PATIENCE;
        while last != Some(value) {
            assert!(Instant::now() < deadline, "{name} is {last:?}, not {value}");
            last = self.metric(name);
            thread::park_timeout(Duration::from_millis(2));
        }
    }
}

/// The value of a metric in what was scraped, without `coalmine_agent_`.
pub(crate) fn series<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix("coalmine_agent_")?.strip_prefix(name)?;
        rest.strip_prefix(' ')
    })
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// An application that does what the test says.
pub(crate) struct Upstream(TcpListener);

impl Upstream {
    pub(crate) fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    pub(crate) fn accept(&self) -> TcpStream {
        patient(self.0.accept().unwrap().0)
    }

    /// The connection on which these bytes come, of those that wait.
    pub(crate) fn accept_next(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.accept();
        assert_eq!(read_exactly(&mut stream, bytes.len()), bytes);
        stream
    }
}

/// A client of the agent.
pub(crate) fn client(agent: &Agent) -> TcpStream {
    patient(TcpStream::connect(agent.address).unwrap())
}

/// A connection that does not wait for ever.
pub(crate) fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

pub(crate) fn read_exactly(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub(crate) fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map(|_| bytes)
}

/// Whether the agent has neither closed the connection nor sent anything more.
pub(crate) fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Closes a connection with a reset.
pub(crate) fn reset(stream: TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    tokio::net::TcpStream::from_std(stream)
        .unwrap()
        .set_zero_linger()
        .unwrap();
}
