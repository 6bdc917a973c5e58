//! What a client and an application do with their connection, step by step, and what each of them saw.
//!
//! Both sides are played at the same time, each by a thread. Nothing sleeps: a step waits for bytes, for an
//! end, or for a word of the other side, and fails when it has waited for longer than [`PATIENCE`].

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use rustix::net::sockopt::{
    Timeout, set_socket_linger, set_socket_recv_buffer_size, set_socket_send_buffer_size, set_socket_timeout,
};

use crate::support::PATIENCE;

/// Most bytes that are written or read at once.
const PIECE_BYTES: usize = 64 * 1024;

/// Size of a buffer that is soon full.
const SMALL_BUFFER: usize = 64 * 1024;

/// After so long without progress, a write that is not done is blocked.
const STUCK: Duration = Duration::from_millis(100);

/// One thing that a side does.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Writes the bytes.
    Send(Vec<u8>),
    /// Writes pieces of so many bytes, each after the other side has read the one before.
    SendSlowly(usize, Vec<u8>),
    /// Writes the bytes and reads so many at the same time.
    SendAndRead(Vec<u8>, usize),
    /// Reads so many bytes.
    Read(usize),
    /// Reads up to and with the pattern.
    ReadUntil(&'static [u8]),
    /// Reads to the end, which must be a close.
    ExpectEof,
    /// Reads to the end, which must be a reset.
    ExpectReset,
    /// Closes the direction of its own bytes.
    ShutdownWrite,
    /// Closes the connection.
    Close,
    /// Closes the connection with a reset.
    Reset,
    /// Says a word to the other side, past the connection.
    Say(&'static str),
    /// Waits for a word of the other side.
    Hear(&'static str),
    /// From now on the kernel keeps little for this side.
    SmallBuffers,
    /// Waits until the other side's write is blocked.
    AwaitBlockedPeer,
}

/// How the other direction ended, as far as a side looked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum End {
    /// It did not.
    #[default]
    Open,
    /// With a close.
    Eof,
    /// With a reset.
    Reset,
}

/// What one side saw: all bytes that it read, in order, and the end after them.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: End,
}

/// What both sides saw, and how many bytes each of them sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) client: Trace,
    pub(crate) application: Trace,
    pub(crate) sent_by_client: u64,
    pub(crate) sent_by_application: u64,
}

/// The sides of a connection, as positions in what they have in common.
const CLIENT: usize = 0;
const APPLICATION: usize = 1;

/// What the threads of both sides know of each other.
#[derive(Debug, Default)]
struct Common {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    words: BTreeSet<&'static str>,
    sides: [Progress; 2],
    has_failed: bool,
}

/// How far a side is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    sent: u64,
    received: u64,
    is_sending: bool,
}

/// One side of the play.
struct Player<'c> {
    side: usize,
    common: &'c Common,
    stream: Option<TcpStream>,
    trace: Trace,
}

/// Plays both scripts: the client connects to `address`, the application accepts from `listener`.
pub(crate) fn play(
    address: SocketAddr,
    listener: &TcpListener,
    client: &[Step],
    application: &[Step],
) -> Result<Seen, String> {
    let common = Common::default();
    let (client, application) = thread::scope(|scope| {
        let application = scope.spawn(|| {
            let stream = accept(listener).map_err(|error| format!("cannot accept: {error}"));
            common.perform(APPLICATION, stream, application)
        });
        let stream = connect(address).map_err(|error| format!("cannot connect: {error}"));
        let client = common.perform(CLIENT, stream, client);
        (client, application.join().unwrap())
    });
    let sides = common.lock().sides;
    match (client, application) {
        (Ok(client), Ok(application)) => {
            // What is still open is closed by the client first.
            drop(client.stream);
            drop(application.stream);
            Ok(Seen {
                client: client.trace,
                application: application.trace,
                sent_by_client: sides[CLIENT].sent,
                sent_by_application: sides[APPLICATION].sent,
            })
        }
        (Err(client), Err(application)) => Err(format!("client: {client}\napplication: {application}")),
        (Err(client), Ok(_)) => Err(format!("client: {client}")),
        (Ok(_), Err(application)) => Err(format!("application: {application}")),
    }
}

/// A client's connection, on which nothing waits for ever.
pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    patient(TcpStream::connect(address)?)
}

/// The next connection, for which nobody waits for ever.
pub(crate) fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    set_socket_timeout(listener, Timeout::Recv, Some(PATIENCE))?;
    patient(listener.accept()?.0)
}

fn patient(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

// === impl Common ===

impl Common {
    fn perform(
        &self,
        side: usize,
        stream: Result<TcpStream, String>,
        script: &[Step],
    ) -> Result<Player<'_>, String> {
        let played = stream.and_then(|stream| {
            let mut player = Player {
                side,
                common: self,
                stream: Some(stream),
                trace: Trace::default(),
            };
            for (number, step) in script.iter().enumerate() {
                player
                    .perform(step)
                    .map_err(|why| format!("step {number}, {}: {why}", brief(step)))?;
            }
            Ok(player)
        });
        if played.is_err() {
            self.change(|state| state.has_failed = true);
        }
        played
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until the condition holds.
    fn wait(&self, condition: impl Fn(&State) -> bool) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !condition(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.has_failed {
                return Err("the other side has failed".to_owned());
            }
            if left.is_zero() {
                return Err("not in time".to_owned());
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
        Ok(())
    }

    /// Waits until the side's write makes no progress.
    fn wait_until_blocked(&self, side: usize) -> Result<(), String> {
        self.wait(|state| state.sides[side].sent > 0)?;
        let mut state = self.lock();
        loop {
            let before = state.sides[side];
            if !before.is_sending {
                return Err(format!("all {} bytes were taken", before.sent));
            }
            let waited = self.changed.wait_timeout_while(state, STUCK, |state| {
                state.sides[side].sent == before.sent && state.sides[side].is_sending && !state.has_failed
            });
            let (locked, result) = waited.unwrap();
            state = locked;
            if result.timed_out() {
                return Ok(());
            }
            if state.has_failed {
                return Err("the other side has failed".to_owned());
            }
        }
    }
}

// === impl Player ===

impl Player<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Send(bytes) => send(self.stream()?, self.common, self.side, bytes),
            Step::SendSlowly(size, bytes) => self.send_slowly(*size, bytes),
            Step::SendAndRead(bytes, count) => self.send_and_read(bytes, *count),
            Step::Read(count) => self.read(*count),
            Step::ReadUntil(pattern) => self.read_until(pattern),
            Step::ExpectEof => self.read_to_end(End::Eof),
            Step::ExpectReset => self.read_to_end(End::Reset),
            Step::ShutdownWrite => {
                let closed = self.stream()?.shutdown(Shutdown::Write);
                closed.map_err(|error| error.to_string())
            }
            Step::Close => {
                self.stream = None;
                Ok(())
            }
            Step::Reset => {
                set_socket_linger(self.stream()?, Some(Duration::ZERO)).map_err(|error| error.to_string())?;
                self.stream = None;
                Ok(())
            }
            Step::Say(word) => {
                self.common.change(|state| {
                    state.words.insert(word);
                });
                Ok(())
            }
            Step::Hear(word) => self.common.wait(|state| state.words.contains(word)),
            Step::SmallBuffers => {
                let stream = self.stream()?;
                set_socket_recv_buffer_size(stream, SMALL_BUFFER)
                    .and_then(|()| set_socket_send_buffer_size(stream, SMALL_BUFFER))
                    .map_err(|error| error.to_string())
            }
            Step::AwaitBlockedPeer => self.common.wait_until_blocked(1 - self.side),
        }
    }

    fn stream(&self) -> Result<&TcpStream, String> {
        self.stream
            .as_ref()
            .ok_or_else(|| "the connection is closed already".to_owned())
    }

    fn send_slowly(&self, size: usize, bytes: &[u8]) -> Result<(), String> {
        for piece in bytes.chunks(size.max(1)) {
            send(self.stream()?, self.common, self.side, piece)?;
            let (mine, theirs) = (self.side, 1 - self.side);
            self.common
                .wait(|state| state.sides[theirs].received >= state.sides[mine].sent)?;
        }
        Ok(())
    }

    fn send_and_read(&mut self, bytes: &[u8], count: usize) -> Result<(), String> {
        let (common, side) = (self.common, self.side);
        let writer = self.stream()?.try_clone().map_err(|error| error.to_string())?;
        thread::scope(|scope| {
            let sending = scope.spawn(move || send(&writer, common, side, bytes));
            let read = self.read(count);
            let sent = sending.join().unwrap();
            read.and(sent)
        })
    }

    fn read(&mut self, count: usize) -> Result<(), String> {
        let mut left = count;
        while left > 0 {
            match self.read_some(left)? {
                0 => {
                    return Err(format!(
                        "{left} of {count} bytes did not come: {:?}",
                        self.trace.end
                    ));
                }
                read => left -= read,
            }
        }
        Ok(())
    }

    /// Byte by byte, so that nothing behind the pattern is read.
    fn read_until(&mut self, pattern: &[u8]) -> Result<(), String> {
        let from = self.trace.bytes.len();
        while !self.trace.bytes[from..].ends_with(pattern) {
            if self.read_some(1)? == 0 {
                return Err(format!("{:?} came first", self.trace.end));
            }
        }
        Ok(())
    }

    fn read_to_end(&mut self, expected: End) -> Result<(), String> {
        while self.trace.end == End::Open {
            self.read_some(PIECE_BYTES)?;
        }
        match self.trace.end {
            end if end == expected => Ok(()),
            end => Err(format!("{end:?} after {} bytes", self.trace.bytes.len())),
        }
    }

    /// Reads at most so many bytes; 0 at the end, which is noted.
    fn read_some(&mut self, most: usize) -> Result<usize, String> {
        let mut buffer = vec![0; most.min(PIECE_BYTES)];
        let count = loop {
            let read = self.stream()?.read(&mut buffer);
            match read {
                Ok(0) => {
                    self.trace.end = End::Eof;
                    return Ok(0);
                }
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    self.trace.end = End::Reset;
                    return Ok(0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("after {} bytes: {error}", self.trace.bytes.len())),
            }
        };
        self.trace.bytes.extend_from_slice(&buffer[..count]);
        let side = self.side;
        self.common
            .change(|state| state.sides[side].received += count as u64);
        Ok(count)
    }
}

fn send(mut stream: &TcpStream, common: &Common, side: usize, bytes: &[u8]) -> Result<(), String> {
    common.change(|state| state.sides[side].is_sending = true);
    let mut rest = bytes;
    while !rest.is_empty() {
        match stream.write(&rest[..rest.len().min(PIECE_BYTES)]) {
            Ok(0) => return Err("nothing can be written".to_owned()),
            Ok(count) => {
                rest = &rest[count..];
                common.change(|state| state.sides[side].sent += count as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("{} bytes were not taken: {error}", rest.len())),
        }
    }
    common.change(|state| state.sides[side].is_sending = false);
    Ok(())
}

/// The step without its bytes.
fn brief(step: &Step) -> String {
    match step {
        Step::Send(bytes) => format!("Send({} bytes)", bytes.len()),
        Step::SendSlowly(size, bytes) => format!("SendSlowly({size}, {} bytes)", bytes.len()),
        Step::SendAndRead(bytes, count) => format!("SendAndRead({} bytes, {count})", bytes.len()),
        other => format!("{other:?}"),
    }
}

// === impl Trace ===

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (length, end) = (self.bytes.len(), self.end);
        let tail = &self.bytes[length.saturating_sub(200)..];
        write!(
            f,
            "{length} bytes, the last {:?}, then {end:?}",
            tail.escape_ascii().to_string()
        )
    }
}

impl Trace {
    /// Says where the two differ; none if they do not.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        if self == other {
            return None;
        }
        let pairs = self.bytes.iter().zip(&other.bytes);
        let same = pairs.take_while(|(mine, theirs)| mine == theirs).count();
        let part = |bytes: &[u8]| bytes[same..bytes.len().min(same + 80)].escape_ascii().to_string();
        Some(format!(
            "from byte {same} on: {:?} then {:?}, and {:?} then {:?}",
            part(&self.bytes),
            self.end,
            part(&other.bytes),
            other.end
        ))
    }
}

// === steps, in few words ===

/// [`Step::Send`].
pub(crate) fn send_all(bytes: impl AsRef<[u8]>) -> Step {
    Step::Send(bytes.as_ref().to_vec())
}

/// [`Step::SendSlowly`].
pub(crate) fn send_slowly(size: usize, bytes: impl AsRef<[u8]>) -> Step {
    Step::SendSlowly(size, bytes.as_ref().to_vec())
}

/// [`Step::Read`], as many as these.
pub(crate) fn read(bytes: impl AsRef<[u8]>) -> Step {
    Step::Read(bytes.as_ref().len())
}
