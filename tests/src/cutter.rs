//! A connection that breaks when a test wants it to: a proxy before PostgreSQL, or before anything else.
//!
//! Of PostgreSQL's protocol it knows how messages begin and end, and two of them:
//!
//! ```text
//! packet    length, u32 big-endian, itself included; code; rest       the first of a connection
//! message   type, one byte; length, as above; rest                    all others, in both directions
//!
//! Q  "COMMIT" 0     from the client: it commits
//! C  "COMMIT" 0     from the server: it has committed
//! Z  state          from the server: it has answered
//! ```
//!
//! Whether TLS is possible it answers itself, with no.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::held::Action;
pub use crate::held::{Held, When};

/// The codes of the packets that ask for encryption: SSLRequest and GSSENCRequest.
const ASK_FOR_ENCRYPTION: [u32; 2] = [80_877_103, 80_877_104];

/// What passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    Postgres,
    Anything,
}

/// A proxy that listens on loopback.
#[derive(Debug)]
pub struct Cutter {
    shared: Arc<Shared>,
    /// Where clients connect.
    pub address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    speech: Speech,
    state: Mutex<State>,
    /// Woken when bytes may flow again.
    flows: Condvar,
}

#[derive(Debug)]
struct State {
    upstream: SocketAddr,
    plan: Option<Plan>,
    cuts: u64,
    refusing: bool,
    silent: bool,
    stopped: bool,
    /// The open connections.
    links: BTreeMap<u64, Arc<Link>>,
    last_link: u64,
}

/// What is to happen at a COMMIT.
#[derive(Debug)]
struct Plan {
    when: When,
    /// How many come before.
    others: u64,
    action: Action,
}

/// A client's connection and the one to the server.
#[derive(Debug)]
struct Link {
    client: TcpStream,
    server: TcpStream,
    /// What to do when the server says that it has committed.
    at_answer: Mutex<Option<Action>>,
}

impl Link {
    fn cut(&self) {
        // The other side may have been faster.
        self.client.shutdown(Shutdown::Both).ok();
        self.server.shutdown(Shutdown::Both).ok();
    }

    fn at_answer(&self) -> MutexGuard<'_, Option<Action>> {
        self.at_answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cutter {
    /// Starts a proxy before PostgreSQL.
    pub fn start(upstream: SocketAddr) -> Self {
        Self::listen(upstream, Speech::Postgres)
    }

    /// Starts a proxy before anything; it sees no COMMIT.
    pub fn plain(upstream: SocketAddr) -> Self {
        Self::listen(upstream, Speech::Anything)
    }

    fn listen(upstream: SocketAddr, speech: Speech) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("the port's number");
        let shared = Arc::new(Shared {
            speech,
            state: Mutex::new(State {
                upstream,
                plan: None,
                cuts: 0,
                refusing: false,
                silent: false,
                stopped: false,
                links: BTreeMap::new(),
                last_link: 0,
            }),
            flows: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accepting.accept(&listener));
        Self { shared, address }
    }

    /// Cuts the connection that sends the `n`th COMMIT from now, counted from 1 over all connections.
    pub fn arm(&self, when: When, n: u64) {
        self.plan(when, n, Action::Cut);
    }

    /// Holds the `n`th COMMIT from now, or the answer to it, until what is given back is dropped.
    pub fn hold(&self, when: When, n: u64) -> Held {
        let (action, held) = Action::hold("COMMIT".to_owned());
        self.plan(when, n, action);
        held
    }

    fn plan(&self, when: When, n: u64, action: Action) {
        self.shared.state().plan = Some(Plan {
            when,
            others: n.saturating_sub(1),
            action,
        });
    }

    /// How many connections were cut at a COMMIT.
    pub fn cuts(&self) -> u64 {
        self.shared.state().cuts
    }

    /// Lets nobody through, as if the server were gone: open connections are cut, new ones closed at once.
    pub fn refuse(&self, refusing: bool) {
        let mut state = self.shared.state();
        state.refusing = refusing;
        if refusing {
            state.cut_all();
        }
    }

    /// Lets nothing through, as if the network lost it: connections stay open, and what was sent arrives later.
    pub fn silence(&self, silent: bool) {
        self.shared.state().silent = silent;
        self.shared.flows.notify_all();
    }

    /// Sends clients to another server from now on, and cuts their connections to the old one.
    pub fn redirect(&self, upstream: SocketAddr) {
        let mut state = self.shared.state();
        state.upstream = upstream;
        state.cut_all();
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stopped = true;
        state.silent = false;
        state.cut_all();
        drop(state);
        self.shared.flows.notify_all();
        // Wakes the thread that waits for clients.
        TcpStream::connect(self.address).ok();
    }
}

impl State {
    fn cut_all(&mut self) {
        std::mem::take(&mut self.links)
            .into_values()
            .for_each(|link| link.cut());
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            if self.state().stopped {
                return;
            }
            if let Ok(client) = client {
                let shared = Arc::clone(&self);
                std::thread::spawn(move || shared.serve(client));
            }
        }
    }

    /// Serves a client until either side ends.
    fn serve(self: Arc<Self>, client: TcpStream) {
        let upstream = self.state().upstream;
        let Ok(server) = TcpStream::connect(upstream) else {
            return;
        };
        // Messages are small, and wait for each other.
        client.set_nodelay(true).and(server.set_nodelay(true)).ok();
        let link = Arc::new(Link {
            client,
            server,
            at_answer: Mutex::default(),
        });
        let Some(number) = self.register(&link, upstream) else {
            return link.cut();
        };
        let (shared, back) = (Arc::clone(&self), Arc::clone(&link));
        std::thread::spawn(move || {
            // However it ends: one direction alone is of no use.
            shared.to_client(&back).ok();
            back.cut();
        });
        self.to_server(&link).ok();
        link.cut();
        self.state().links.remove(&number);
    }

    /// Notes an open connection; none if it may not be.
    fn register(&self, link: &Arc<Link>, upstream: SocketAddr) -> Option<u64> {
        let mut state = self.state();
        if state.refusing || state.stopped || state.upstream != upstream {
            return None;
        }
        state.last_link += 1;
        let number = state.last_link;
        state.links.insert(number, Arc::clone(link));
        Some(number)
    }

    fn to_server(&self, link: &Link) -> io::Result<()> {
        if self.speech == Speech::Anything {
            return self.pass(&link.client, &link.server);
        }
        loop {
            let packet = read(&link.client, 0)?;
            let code = packet
                .get(4..8)
                .and_then(|code| code.try_into().ok())
                .map(u32::from_be_bytes);
            if code.is_some_and(|code| ASK_FOR_ENCRYPTION.contains(&code)) {
                (&link.client).write_all(b"N")?;
                continue;
            }
            self.wait_while_silent();
            (&link.server).write_all(&packet)?;
            break;
        }
        loop {
            let message = read(&link.client, 1)?;
            if commits(&message) {
                self.at_commit(link)?;
            }
            self.wait_while_silent();
            (&link.server).write_all(&message)?;
        }
    }

    fn to_client(&self, link: &Link) -> io::Result<()> {
        if self.speech == Speech::Anything {
            return self.pass(&link.server, &link.client);
        }
        loop {
            let message = read(&link.server, 1)?;
            let committed =
                message.first() == Some(&b'C') && message.get(5..) == Some(b"COMMIT\0".as_slice());
            let action = if committed { link.at_answer().take() } else { None };
            match action {
                Some(Action::Cut) => {
                    while read(&link.server, 1)?.first() != Some(&b'Z') {}
                    return self.cut(link);
                }
                Some(action) => self.act(link, action)?,
                None => {}
            }
            self.wait_while_silent();
            (&link.client).write_all(&message)?;
        }
    }

    /// Does what is planned for this COMMIT, which the server does not have yet.
    fn at_commit(&self, link: &Link) -> io::Result<()> {
        let due = {
            let mut state = self.state();
            match &mut state.plan {
                Some(plan) if plan.others > 0 => {
                    plan.others -= 1;
                    None
                }
                plan => plan.take(),
            }
        };
        match due {
            None => Ok(()),
            Some(plan) if plan.when == When::Before => self.act(link, plan.action),
            // Before the COMMIT is sent on, so that its answer cannot come first.
            Some(plan) => {
                *link.at_answer() = Some(plan.action);
                Ok(())
            }
        }
    }

    fn act(&self, link: &Link, action: Action) -> io::Result<()> {
        action.act().or_else(|_| self.cut(link))
    }

    fn cut(&self, link: &Link) -> io::Result<()> {
        link.cut();
        self.state().cuts += 1;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Passes bytes on without a look at them.
    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut bytes)?;
            let Some(some) = bytes.get(..read).filter(|some| !some.is_empty()) else {
                return Ok(());
            };
            self.wait_while_silent();
            to.write_all(some)?;
        }
    }

    fn wait_while_silent(&self) {
        let flows = self.flows.wait_while(self.state(), |state| state.silent);
        drop(flows);
    }
}

/// Reads a message of which `before` bytes precede the length: the whole, as it came.
fn read(mut from: &TcpStream, before: usize) -> io::Result<Vec<u8>> {
    let mut message = vec![0; before + 4];
    from.read_exact(&mut message)?;
    let length = message
        .get(before..)
        .and_then(|length| length.try_into().ok())
        .map_or(0, u32::from_be_bytes);
    let rest = u64::from(length.saturating_sub(4));
    let read = from.take(rest).read_to_end(&mut message)?;
    if read as u64 == rest {
        Ok(message)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Whether a client's message is a query that ends with COMMIT.
fn commits(message: &[u8]) -> bool {
    let Some((b'Q', rest)) = message.split_first() else {
        return false;
    };
    let text = String::from_utf8_lossy(rest.get(4..).unwrap_or_default());
    let text = text.trim_end_matches(|c: char| c.is_whitespace() || c == '\0' || c == ';');
    let last = text.rsplit(';').next().unwrap_or_default();
    last.trim().eq_ignore_ascii_case("COMMIT")
}
