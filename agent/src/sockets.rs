//! The connections to the application's database, as the kernel knows them: how many, how many await an
//! answer, how long a round trip takes, and how many segments had to be sent again.
//!
//! The containers of a pod share a network namespace, so nothing of the application changes and no
//! privilege is needed. The kernel is asked over netlink (sock_diag); where it refuses, `/proc/net/tcp`
//! still says how many connections there are and in which state.
//!
//! What cannot be known from here: how many connections a pool may open and who waits for one, whether a
//! connection without a question on its way is in a transaction, and connections that are not TCP. Behind
//! a local pooler, these are the connections to the pooler.

mod diag;
mod procfs;

use std::{
    collections::HashMap,
    io,
    path::Path,
    time::{Duration, Instant},
};

use coalmine_proto::v1;
use rustix::io::Errno;

/// The kernel walks the table of all sockets of the machine for each look, so looks are a second apart;
/// a little less, so that a look for each window of a second is never put off to the next.
const SHORTEST: Duration = Duration::from_millis(900);

/// A look takes at most this share of the time: on a machine with many sockets, looks are further apart.
const SHARE: u32 = 500;

/// What one read of the kernel's answer takes; the kernel fills at most this much.
const BUFFER_BYTES: usize = 32 * 1024;

/// States of a TCP connection, as in the kernel's `net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const SYN_RECV: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// The states that are counted: not TIME_WAIT, which nobody uses any more, and not listening sockets.
const COUNTED: [u8; 8] = [
    ESTABLISHED,
    SYN_SENT,
    SYN_RECV,
    FIN_WAIT1,
    FIN_WAIT2,
    CLOSE_WAIT,
    LAST_ACK,
    CLOSING,
];

/// Looks at the connections to one port.
#[derive(Debug)]
pub(crate) struct Sockets {
    port: u16,
    source: Source,
    /// When the kernel was last asked, and how long it is left alone after that.
    asked: Option<(Instant, Duration)>,
    /// What it said, if it answered.
    seen: Option<v1::Sockets>,
    /// Segments that each connection has sent again so far, by the kernel's cookie; only those that have.
    /// None before the first look.
    resent: Option<HashMap<u64, u32>>,
    buffer: Vec<u8>,
}

/// Who says what connections there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// sock_diag.
    Netlink,
    /// `/proc/net/tcp` and `/proc/net/tcp6`: states only.
    Table,
    Nobody,
}

/// A connection of one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Connection {
    state: u8,
    /// What tells it from all others, for as long as the machine runs.
    cookie: u64,
    /// None where only the state is known.
    info: Option<Info>,
}

/// The part of the kernel's `struct tcp_info` that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Info {
    /// Milliseconds since it last sent data, in steps of the kernel's timer (1 to 10 ms).
    since_sent_ms: u32,
    /// Milliseconds since it last received data.
    since_received_ms: u32,
    /// Round trip, smoothed.
    rtt_us: u32,
    /// Segments that it has sent again.
    resent: u32,
}

/// What one look adds up to.
#[derive(Debug, Default)]
struct Tally {
    sockets: v1::Sockets,
    resent: HashMap<u64, u32>,
}

// === impl Sockets ===

impl Sockets {
    /// Takes the first look, so that what was sent again before is not of the first window. Fails where
    /// nobody says what connections there are.
    pub(crate) fn new(port: u16) -> io::Result<Self> {
        if port == 0 {
            let text = "0 is not the port of a database";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut sockets = Self {
            port,
            source: Source::Netlink,
            asked: None,
            seen: None,
            resent: None,
            buffer: vec![0; BUFFER_BYTES],
        };
        match sockets.read() {
            Err(error) if sockets.source == Source::Nobody => Err(error),
            // Another look may succeed.
            Ok(_) | Err(_) => Ok(sockets),
        }
    }

    /// The connections now; within a second of the last look, what it saw. Takes milliseconds where a
    /// machine has thousands of sockets, so it belongs on a thread that relays nothing.
    pub(crate) fn read(&mut self) -> io::Result<v1::Sockets> {
        self.read_at(Instant::now())
    }

    fn read_at(&mut self, now: Instant) -> io::Result<v1::Sockets> {
        let is_fresh = |(asked, pause)| now.saturating_duration_since(asked) < pause;
        if self.asked.is_some_and(is_fresh) {
            return self.again();
        }
        self.seen = None;
        let begun = Instant::now();
        let looked = loop {
            match self.look() {
                Err(error) if is_refused(&error) && self.falls_back(&error) => {}
                looked => break looked,
            }
        };
        let pause = begun.elapsed().saturating_mul(SHARE).max(SHORTEST);
        self.asked = Some((now, pause));
        let say = |error: &io::Error| tracing::debug!(%error, "the database's connections are not known now");
        looked.inspect_err(say).map(|tally| self.note(tally))
    }

    /// What the last look saw; what was sent again was said then.
    fn again(&self) -> io::Result<v1::Sockets> {
        let Some(seen) = self.seen else {
            let text = "the last look at the database's connections failed";
            return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
        };
        Ok(v1::Sockets {
            retransmits: 0,
            ..seen
        })
    }

    /// A whole look, or an error: half of the connections would look like a loss of the others.
    fn look(&mut self) -> io::Result<Tally> {
        let mut tally = Tally::default();
        let each = |connection| tally.add(connection);
        match self.source {
            Source::Netlink => diag::dump(self.port, &mut self.buffer, each)?,
            Source::Table => procfs::dump(Path::new("/proc/net"), self.port, each)?,
            Source::Nobody => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(tally)
    }

    /// Tries another source, if there is one, and says once what is missing.
    fn falls_back(&mut self, error: &io::Error) -> bool {
        match self.source {
            Source::Netlink => {
                tracing::warn!(
                    %error,
                    "the kernel refuses to describe connections (netlink sock_diag), so round trips, awaited \
                     answers and retransmissions of the database are not known: allow AF_NETLINK sockets in \
                     the seccomp profile"
                );
                self.source = Source::Table;
            }
            Source::Table => {
                tracing::warn!(
                    %error,
                    "/proc/net/tcp cannot be read either, so connections to the database are not shown"
                );
                self.source = Source::Nobody;
            }
            Source::Nobody => return false,
        }
        true
    }

    /// Compares with the look before. What a connection sent again between that look and its end is lost.
    fn note(&mut self, tally: Tally) -> v1::Sockets {
        let Tally { mut sockets, resent } = tally;
        if let Some(before) = &self.resent {
            sockets.retransmits = resent
                .iter()
                .map(|(cookie, now)| now.saturating_sub(before.get(cookie).copied().unwrap_or(0)))
                .fold(0, |sum, more| sum.saturating_add(u64::from(more)));
        }
        self.resent = Some(resent);
        self.seen = Some(sockets);
        sockets
    }
}

/// Whether the error says that asking again is of no use.
fn is_refused(error: &io::Error) -> bool {
    let refusals = [
        Errno::PERM,
        Errno::ACCESS,
        Errno::NOSYS,
        Errno::NOENT,
        Errno::OPNOTSUPP,
        Errno::PROTONOSUPPORT,
        Errno::AFNOSUPPORT,
    ];
    Errno::from_io_error(error).is_some_and(|errno| refusals.contains(&errno))
}

// === impl Tally ===

impl Tally {
    fn add(&mut self, connection: Connection) {
        let Connection { state, cookie, info } = connection;
        let sockets = &mut self.sockets;
        if let Some(info) = info
            && info.resent > 0
        {
            self.resent.insert(cookie, info.resent);
        }
        if state != ESTABLISHED {
            sockets.other = sockets.other.saturating_add(1);
            return;
        }
        sockets.established = sockets.established.saturating_add(1);
        let Some(info) = info else { return };
        sockets.rtt_us = sockets.rtt_us.max(info.rtt_us);
        // Equal where neither side has said anything yet, or both within one step of the kernel's timer.
        if info.since_sent_ms < info.since_received_ms {
            sockets.awaiting = sockets.awaiting.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests;
