//! A proxy before the API server, on which a test holds or cuts one request: before it is sent on, or after it was done.
//!
//! Clients speak HTTP/1.1 to it without TLS; each of their connections has one of its own to the API server, with TLS.
//! Heads pass as they came, tokens too. A request's body is of a length that its head says; an answer's may be chunked,
//! without end for a watch.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read as _, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use crate::held::Action;
pub use crate::held::{Held, When};

/// Largest head of a message.
const MAX_HEAD: u64 = 256 << 10;

/// A proxy that listens on loopback.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    /// Where clients connect.
    pub address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    tls: Arc<ClientConfig>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    /// Requests that the API server has done without an error: method, and path without the query.
    done: Vec<(String, String)>,
    stopped: bool,
    links: BTreeMap<u64, [TcpStream; 2]>,
    last_link: u64,
}

/// What is to happen to the next request that fits.
#[derive(Debug)]
struct Rule {
    method: String,
    /// How its path ends, without the query.
    end: String,
    when: When,
    action: Action,
}

/// The first line of a message and what follows from its head.
struct Head {
    text: String,
    length: Length,
    closes: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    Exact(u64),
    Chunked,
    UntilEnd,
}

type Upstream = StreamOwned<ClientConnection, TcpStream>;

impl Proxy {
    pub(super) fn start(upstream: SocketAddr, authority: &Path) -> Self {
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_file(authority).expect("the authority's certificate");
        roots.add(root).expect("the authority is one");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider knows TLS")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("the port's number");
        let shared = Arc::new(Shared {
            upstream,
            tls: Arc::new(tls),
            state: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accepting.accept(&listener));
        Self { shared, address }
    }

    /// Cuts the connection of the next request of this method whose path ends so.
    pub fn cut(&self, when: When, method: &str, end: &str) {
        self.plan(when, method, end, Action::Cut);
    }

    /// Holds the next request of this method whose path ends so, or the answer to it. A request whose client has gone
    /// before it is let go never reaches the API server.
    pub fn hold(&self, when: When, method: &str, end: &str) -> Held {
        let (action, held) = Action::hold(format!("{method} of {end}"));
        self.plan(when, method, end, action);
        held
    }

    fn plan(&self, when: When, method: &str, end: &str, action: Action) {
        self.shared.state().rules.push(Rule {
            method: method.to_owned(),
            end: end.to_owned(),
            when,
            action,
        });
    }

    /// How many requests of this method, whose path ends so, the API server has done without an error.
    pub fn done(&self, method: &str, end: &str) -> usize {
        let state = self.shared.state();
        let fits = |(of, path): &&(String, String)| of == method && path.ends_with(end);
        state.done.iter().filter(fits).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stopped = true;
        // Those that are held are of no use any more.
        state.rules.clear();
        for link in std::mem::take(&mut state.links).into_values() {
            cut(&link);
        }
        drop(state);
        // Wakes the thread that waits for clients.
        TcpStream::connect(self.address).ok();
    }
}

fn cut(link: &[TcpStream; 2]) {
    // Either side may have been faster.
    link.iter().for_each(|stream| {
        stream.shutdown(Shutdown::Both).ok();
    });
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
                std::thread::spawn(move || shared.serve(&client));
            }
        }
    }

    /// Serves a client until either side ends.
    fn serve(&self, client: &TcpStream) {
        let Ok((server, number)) = self.link(client) else {
            return;
        };
        // However it ends: the client sees that the connection is over.
        self.relay(client, server).ok();
        let link = self.state().links.remove(&number);
        link.iter().for_each(cut);
    }

    /// Connects to the API server, and notes the connection so that it can be cut.
    fn link(&self, client: &TcpStream) -> io::Result<(Upstream, u64)> {
        let server = TcpStream::connect(self.upstream)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let both = [client.try_clone()?, server.try_clone()?];
        let name = ServerName::IpAddress(self.upstream.ip().into());
        let session = ClientConnection::new(Arc::clone(&self.tls), name).map_err(io::Error::other)?;
        let mut state = self.state();
        if state.stopped {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        state.last_link += 1;
        let number = state.last_link;
        state.links.insert(number, both);
        Ok((StreamOwned::new(session, server), number))
    }

    fn relay(&self, client: &TcpStream, server: Upstream) -> io::Result<()> {
        let (mut from_client, mut to_client) = (BufReader::new(client), client);
        let mut server = BufReader::new(server);
        while let Some(request) = head(&mut from_client, Length::Exact(0))? {
            let mut words = request.text.split(' ');
            let method = words.next().unwrap_or_default().to_owned();
            let path = words.next().and_then(|target| target.split('?').next());
            let path = path.unwrap_or_default().to_owned();
            let mut body = Vec::new();
            copy_body(&mut from_client, &mut body, request.length)?;

            if self.act(When::Before, &method, &path)? && is_gone(client)? {
                return Ok(());
            }
            server.get_mut().write_all(request.text.as_bytes())?;
            server.get_mut().write_all(&body)?;
            server.get_mut().flush()?;

            let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let answer = head(&mut server, Length::UntilEnd)?.ok_or_else(ended)?;
            if self.is_awaited(&method, &path) {
                // The answer is whole before anything happens to it, so that the request is surely done.
                let mut body = Vec::new();
                copy_body(&mut server, &mut body, answer.length)?;
                self.note(&method, &path, &answer);
                self.act(When::After, &method, &path)?;
                to_client.write_all(answer.text.as_bytes())?;
                to_client.write_all(&body)?;
            } else {
                self.note(&method, &path, &answer);
                to_client.write_all(answer.text.as_bytes())?;
                copy_body(&mut server, &mut to_client, answer.length)?;
            }
            if request.closes || answer.closes || answer.length == Length::UntilEnd {
                return Ok(());
            }
        }
        Ok(())
    }

    fn note(&self, method: &str, path: &str, answer: &Head) {
        if answer.text.starts_with("HTTP/1.1 2") {
            self.state().done.push((method.to_owned(), path.to_owned()));
        }
    }

    /// Whether something is to happen to the answer.
    fn is_awaited(&self, method: &str, path: &str) -> bool {
        let state = self.state();
        state
            .rules
            .iter()
            .any(|rule| rule.fits(When::After, method, path))
    }

    /// Does what is planned for this request; says whether it was held.
    fn act(&self, when: When, method: &str, path: &str) -> io::Result<bool> {
        let mut state = self.state();
        let place = state.rules.iter().position(|rule| rule.fits(when, method, path));
        let action = place.map(|place| state.rules.remove(place).action);
        drop(state);
        action.map_or(Ok(false), |action| action.act().map(|()| true))
    }
}

impl Rule {
    fn fits(&self, when: When, method: &str, path: &str) -> bool {
        self.when == when && self.method == method && path.ends_with(&self.end)
    }
}

/// Whether a client that has sent a request has ended since.
fn is_gone(client: &TcpStream) -> io::Result<bool> {
    client.set_nonblocking(true)?;
    let peeked = client.peek(&mut [0]);
    client.set_nonblocking(false)?;
    Ok(match peeked {
        Ok(more) => more == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    })
}

/// Reads a head; none at the end of the connection. What says nothing of its length has that of `otherwise`.
fn head(from: &mut impl BufRead, otherwise: Length) -> io::Result<Option<Head>> {
    let mut text = String::new();
    loop {
        let before = text.len();
        let read = from.by_ref().take(MAX_HEAD).read_line(&mut text)?;
        if read == 0 && text.is_empty() {
            return Ok(None);
        }
        if read == 0 || text.len() as u64 > MAX_HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if text.get(before..) == Some("\r\n") {
            break;
        }
    }
    let lower = text.to_ascii_lowercase();
    let value = |name: &str| {
        let mut lines = lower.lines().filter_map(|line| line.split_once(':'));
        lines
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.trim().to_owned())
    };
    let status = lower.strip_prefix("http/1.1 ").and_then(|rest| rest.get(..3));
    let length = if matches!(status, Some("204" | "304")) {
        Length::Exact(0)
    } else if value("transfer-encoding").is_some_and(|coding| coding == "chunked") {
        Length::Chunked
    } else {
        let given = value("content-length").and_then(|length| length.parse().ok());
        given.map_or(otherwise, Length::Exact)
    };
    let closes = value("connection").is_some_and(|options| options == "close");
    Ok(Some(Head { text, length, closes }))
}

fn copy_body(from: &mut impl BufRead, to: &mut impl Write, length: Length) -> io::Result<()> {
    match length {
        Length::Exact(length) => copy(from, to, length),
        Length::UntilEnd => io::copy(from, to).map(drop),
        Length::Chunked => loop {
            let mut line = String::new();
            from.by_ref().take(MAX_HEAD).read_line(&mut line)?;
            let digits = line.trim().split(';').next().unwrap_or_default();
            let size = u64::from_str_radix(digits, 16).map_err(io::Error::other)?;
            to.write_all(line.as_bytes())?;
            // A chunk ends with an empty line, and the last one is that line (trailers are not sent to us).
            copy(from, to, size.saturating_add(2))?;
            if size == 0 {
                return Ok(());
            }
        },
    }
}

fn copy(from: &mut impl BufRead, to: &mut impl Write, length: u64) -> io::Result<()> {
    let copied = io::copy(&mut from.by_ref().take(length), to)?;
    if copied < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}
