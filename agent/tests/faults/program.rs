//! The agent as it is built and started: a process of its own, so that its memory can be looked at.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};

use crate::{
    stage::connect,
    support::{PATIENCE, eventually, patient, read_all, series},
};

/// What may be added to a bound of memory: pages of the allocator that are used in part, tables that all connections
/// share, and what a build without optimisation takes more.
pub(crate) const SLACK_BYTES: u64 = 6 << 20;

/// Starts a program with a socket as its descriptor 3.
const HAND_OVER: &str = "export LISTEN_PID=$$; exec \"$0\" \"$@\" 3<&0 </dev/null";

/// A running agent; killed when dropped.
pub(crate) struct Program {
    child: Child,
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
}

impl Program {
    /// An agent without an aggregator.
    pub(crate) fn start(upstream: SocketAddr, more: &[&str]) -> Self {
        Self::with(upstream, "http://127.0.0.1:1", more)
    }

    pub(crate) fn with(upstream: SocketAddr, aggregator: &str, more: &[&str]) -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = listeners.map(|listener| listener.local_addr().unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_coalmine-agent"));
        command.stdin(Stdio::null());
        Self::spawn(command, addresses, upstream, aggregator, more)
    }

    /// An agent without an aggregator that accepts from this socket, as from one that a supervisor holds.
    pub(crate) fn inheriting(listener: &TcpListener, upstream: SocketAddr, more: &[&str]) -> Self {
        let address = listener.local_addr().unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", HAND_OVER, env!("CARGO_BIN_EXE_coalmine-agent")])
            .envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "listen")])
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())));
        Self::spawn(command, [address, admin], upstream, "http://127.0.0.1:1", more)
    }

    fn spawn(
        mut command: Command,
        [address, admin]: [SocketAddr; 2],
        upstream: SocketAddr,
        aggregator: &str,
        more: &[&str],
    ) -> Self {
        let child = command
            .args([
                format!("--listen={address}"),
                format!("--admin={admin}"),
                format!("--upstream={upstream}"),
                format!("--aggregator={aggregator}"),
            ])
            .args([
                "--service=shop",
                "--version=v2",
                "--arm=canary",
                "--instance=pod-1",
            ])
            .args(["--tenant=header:x-tenant", "--drain=20s"])
            .args(more)
            .env("RUST_LOG", "error")
            .spawn()
            .unwrap();
        let mut agent = Self {
            child,
            address,
            admin,
        };
        // Both addresses are taken before either is served, and the application must not see who asks.
        eventually("the agent serves", || {
            assert!(!agent.has_ended(), "the agent has ended");
            TcpStream::connect(admin).is_ok()
        });
        agent
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn client(&self) -> TcpStream {
        connect(self.address)
    }

    /// Memory that is resident, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().unwrap();
        kib * 1024
    }

    /// Lets it open so many files more than it has open, and no others.
    pub(crate) fn leave_files(&self, more: usize) {
        let open = self.open_files();
        // A file gets the lowest number that is free, and all numbers are below the limit.
        let mut free = (0..).filter(|number| !open.contains(number));
        self.limit_files(free.nth(more));
    }

    /// Lets it open as many files as it may.
    pub(crate) fn restore_files(&self) {
        self.limit_files(getrlimit(Resource::Nofile).maximum);
    }

    /// The most that may be allowed stays.
    fn limit_files(&self, current: Option<u64>) {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let limit = Rlimit { current, maximum };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit).unwrap();
    }

    /// The numbers of its open files, without those that it opens for a moment.
    fn open_files(&self) -> BTreeSet<u64> {
        const LOOKS: usize = 10;
        let (mut files, mut same) = (BTreeSet::new(), 0);
        eventually("its open files stay the same", || {
            let now = self.listed_files();
            same = if now == files { same + 1 } else { 0 };
            files = now;
            same == LOOKS
        });
        files
    }

    fn listed_files(&self) -> BTreeSet<u64> {
        let listed = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let numbers = listed.map(|file| file.unwrap().file_name().to_str().unwrap().parse().unwrap());
        numbers.collect()
    }

    /// A metric, without `coalmine_agent_`.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let mut stream = patient(TcpStream::connect(self.admin).unwrap());
        let request = b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let answer = String::from_utf8(read_all(&mut stream).unwrap()).unwrap();
        let value = series(&answer, name).unwrap_or_else(|| panic!("the agent has no metric {name}"));
        value.trim().parse().unwrap()
    }

    /// Waits until the metric has the value.
    #[track_caller]
    pub(crate) fn expect(&self, name: &str, value: u64) {
        let mut last = self.metric(name);
        let deadline = Instant::now() + PATIENCE;
        while last != value {
            assert!(Instant::now() < deadline, "{name} is {last}, not {value}");
            thread::park_timeout(Duration::from_millis(5));
            last = self.metric(name);
        }
    }

    /// Asks the agent to end, and waits until it has, in order.
    pub(crate) fn stop(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        eventually("the agent has ended", || self.has_ended());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Set to 1, tests of crowds may be smaller than they should be.
const FEW_FILES: &str = "COALMINE_FEW_FILES";

/// Raises this process' limit of open files as far as it may be raised, and gives how many connections through an
/// agent fit beside what other tests have open: each takes two files here and two there. A test with less than a tenth
/// of what it should have shows too little, and fails, unless it is said that it may.
pub(crate) fn connections_that_fit(wanted: u64) -> u64 {
    const OTHERS: u64 = 4_000;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let Some(limit) = maximum else {
        return wanted;
    };
    let fit = (limit.saturating_sub(OTHERS) / 2).max(limit / 8);
    if fit >= wanted {
        return wanted;
    }
    let why = format!("the hard limit of open files, {limit}, allows {fit} connections instead of {wanted}");
    let may_be_few = env::var_os(FEW_FILES).is_some_and(|value| value == "1");
    assert!(
        may_be_few || fit >= wanted / 10,
        "{why}; raise it, or set {FEW_FILES}=1 to test with fewer"
    );
    // On standard error, where the harness shows it.
    std::io::Write::write_all(&mut std::io::stderr(), format!("{why}\n").as_bytes()).unwrap();
    fit
}
