//! One direction of a relayed connection.
//!
//! Bytes that must be observed are copied through the thread's buffer. Those that need not be, of a long
//! body, go from one socket to the other inside the kernel (splice), through a pipe that is borrowed.

use std::{
    cell::Cell,
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    task::yield_now,
};

use super::{
    pipes::Pipe,
    socket::{peek, poll_recv, poll_send},
};
use crate::proxy::Proxy;

/// After so many bytes the other connections get their turn.
const TURN_BYTES: usize = 256 * 1024;

/// What is left of a body is spliced from this length on; below, copying is cheaper.
pub(super) const SPLICE_BYTES: u64 = 16 * 1024;

/// What a direction tells about the bytes that it passes on.
pub(super) trait Watch {
    /// Whether the time of bytes is when they were read, and not when they were written.
    const STAMPS_READ: bool;
    /// These bytes were written; they were read at this time if that counts.
    fn seen(&mut self, bytes: &[u8], read_ns: u64);
    /// How many of the next bytes need not be seen.
    fn left(&self) -> u64;
    /// So many of them were written.
    fn skipped(&mut self, count: u64);
    /// Bytes that had waited were written at this time.
    fn moved(&mut self, _now_ns: u64) {}
    /// Lengths of the head and of the whole of the answer that begins with these bytes, if it can be told; nothing
    /// of it has been seen.
    fn answer_of(&self, _bytes: &[u8]) -> Option<(usize, u64)> {
        None
    }
    /// How much is read at most while what comes next is not known.
    fn room(&self) -> usize {
        usize::MAX
    }
}

/// Bytes that all connections of the thread hold together from which on each holds no more than [`LITTLE`].
const MUCH: usize = 32 * 1024 * 1024;

/// Read at a time, at most, while much is held: peers that do not read cannot take all memory.
const LITTLE: usize = 4 * 1024;

/// One direction: what was read and could not be written yet, and how far closing has come.
#[derive(Debug)]
pub(super) struct Half {
    /// What all directions of the thread hold together.
    held: Rc<Cell<usize>>,
    waiting: Vec<u8>,
    written: usize,
    /// When the waiting bytes were read.
    read_ns: u64,
    /// Holds what was spliced in and could not be spliced out yet.
    pipe: Option<Pipe>,
    /// Of what is in the pipe, the begin that must be seen once it is written.
    ahead: Vec<u8>,
    /// The last answer was long: the next is looked at before it is read.
    is_long: bool,
    state: State,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The source has closed; what is waiting must still be written.
    Ended,
    /// The close was passed on.
    Finished,
    /// The destination takes nothing any more.
    Broken,
}

/// Why a direction stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The source closed it, and all its bytes were written.
    Closed,
    /// The source was reset.
    SourceLost,
    /// The destination cannot be written to.
    DestinationLost,
}

impl Drop for Half {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl Half {
    pub(super) fn new(proxy: &Proxy) -> Self {
        Self {
            held: proxy.held.clone(),
            waiting: Vec::new(),
            written: 0,
            read_ns: 0,
            pipe: None,
            ahead: Vec::new(),
            is_long: false,
            state: State::Open,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Finished | State::Broken)
    }

    /// Whether the source has closed and all of it was passed on.
    pub(super) fn is_finished(&self) -> bool {
        self.state == State::Finished
    }

    pub(super) fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.pipe.is_none()
    }

    fn keep(&mut self, bytes: Vec<u8>, read_ns: u64) {
        self.let_go();
        self.hold(bytes.len());
        (self.waiting, self.read_ns) = (bytes, read_ns);
    }

    fn hold(&self, count: usize) {
        self.held.set(self.held.get().saturating_add(count));
    }

    /// Gives back the memory of what was waiting.
    fn let_go(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        self.held.set(self.held.get().saturating_sub(waiting.len()));
        self.written = 0;
    }

    /// More bytes that were read elsewhere, to be written after those that are waiting.
    pub(super) fn append(&mut self, bytes: &[u8], read_ns: u64) {
        if self.waiting.is_empty() {
            self.read_ns = read_ns;
        }
        self.hold(bytes.len());
        self.waiting.extend_from_slice(bytes);
    }

    /// The bytes that are waiting.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let waiting = self.waiting.get(self.written..).unwrap_or_default().to_vec();
        self.let_go();
        waiting
    }

    /// Passes the close on.
    pub(super) fn finish(&mut self, cx: &mut Context<'_>, to: &mut TcpStream) {
        self.state = State::Finished;
        // A socket's write side is closed at once; that it is closed already is no error here.
        if let Poll::Ready(Err(error)) = Pin::new(to).poll_shutdown(cx) {
            tracing::trace!(%error, "cannot be closed");
        }
    }

    /// Nothing more can be written; gives what could not, but for what only the kernel has.
    pub(super) fn break_off(&mut self) -> Vec<u8> {
        self.state = State::Broken;
        self.pipe = None;
        self.take()
    }

    /// What is to be seen of so many bytes that have left the pipe.
    fn written_ahead(&mut self, count: usize) -> Vec<u8> {
        if count >= self.ahead.len() {
            return std::mem::take(&mut self.ahead);
        }
        let rest = self.ahead.split_off(count);
        std::mem::replace(&mut self.ahead, rest)
    }

    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.written >= self.waiting.len() {
            // Slow readers are few: an idle connection keeps no buffer.
            self.let_go();
        }
    }
}

/// Passes on what can be read and written now, but not so much that the others wait for long. What the
/// destination refuses is kept.
pub(super) fn pump<W: Watch>(
    cx: &mut Context<'_>,
    proxy: &Proxy,
    half: &mut Half,
    from: &TcpStream,
    to: &TcpStream,
    watch: &mut W,
) -> Poll<Stop> {
    let mut shared = proxy.buffer.borrow_mut();
    let mut passed = 0;
    loop {
        if passed >= TURN_BYTES {
            return give_way(cx);
        }
        if half.pipe.is_some() {
            match ready!(splice_out(cx, proxy, half, to)) {
                Ok(count) => {
                    let seen = half.written_ahead(count);
                    if !seen.is_empty() {
                        watch.seen(&seen, 0);
                    }
                    watch.skipped((count - seen.len()) as u64);
                    passed += count;
                    continue;
                }
                Err(_) => return Poll::Ready(Stop::DestinationLost),
            }
        }
        if let Some(rest) = half.waiting.get(half.written..).filter(|rest| !rest.is_empty()) {
            match poll_send(cx, to, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(count)) if count > 0 => {
                    watch.seen(&rest[..count], half.read_ns);
                    watch.moved(proxy.now_ns());
                    half.wrote(count);
                    passed += count;
                    continue;
                }
                Poll::Ready(_) => return Poll::Ready(Stop::DestinationLost),
            }
        }
        if half.state == State::Ended {
            return Poll::Ready(Stop::Closed);
        }
        let left = watch.left();
        if left >= SPLICE_BYTES
            && let Some(pipe) = proxy.pipes.take()
        {
            match splice_in(cx, proxy, half, from, pipe, left) {
                Poll::Pending => return Poll::Pending,
                // Urgent data stops a splice, and is not the end: it must be read.
                Poll::Ready(Ok(0)) if peek(from) == Ok(1) => {}
                Poll::Ready(Ok(0)) => {
                    half.state = State::Ended;
                    continue;
                }
                Poll::Ready(Err(error)) if proxy.pipes.is_refusal(&error) => continue,
                Poll::Ready(Ok(_)) => continue,
                Poll::Ready(Err(_)) => return Poll::Ready(Stop::SourceLost),
            }
        }
        let most = if proxy.held.get() < MUCH {
            shared.len()
        } else {
            LITTLE
        };
        let room = watch.room().min(most);
        if half.is_long && room < most {
            let Ok(long) = ready!(peek_long(cx, from, &mut shared[..room], watch)) else {
                return Poll::Ready(Stop::SourceLost);
            };
            half.is_long = long.is_some();
            if let Some((head, whole)) = long
                && let Some(pipe) = proxy.pipes.take()
                && let Poll::Ready(Ok(count @ 1..)) = splice_in(cx, proxy, half, from, pipe, whole)
            {
                half.ahead = shared[..head.min(count)].to_vec();
                continue;
            }
        }
        let bytes = match ready!(poll_recv(cx, from, &mut shared[..room])) {
            Ok(0) => {
                half.state = State::Ended;
                continue;
            }
            Ok(count) => &shared[..count],
            Err(_) => return Poll::Ready(Stop::SourceLost),
        };
        let read_ns = if W::STAMPS_READ { proxy.now_ns() } else { 0 };
        let count = match poll_send(cx, to, bytes) {
            Poll::Pending => 0,
            Poll::Ready(Ok(count)) if count > 0 => count,
            Poll::Ready(_) => {
                half.keep(bytes.to_vec(), read_ns);
                return Poll::Ready(Stop::DestinationLost);
            }
        };
        passed += count;
        if count > 0 {
            watch.seen(&bytes[..count], read_ns);
        }
        if count < bytes.len() {
            half.keep(bytes[count..].to_vec(), read_ns);
        }
    }
}

/// Looks at the begin of an answer without taking it. Where the answer is long, its head and body can go through
/// the kernel together, with one packet less. None also at the end: reading says it again. An error is not there a
/// second time.
fn peek_long<W: Watch>(
    cx: &mut Context<'_>,
    from: &TcpStream,
    room: &mut [u8],
    watch: &W,
) -> Poll<io::Result<Option<(usize, u64)>>> {
    let mut buffer = ReadBuf::new(room);
    ready!(from.poll_peek(cx, &mut buffer))?;
    let answer = watch.answer_of(buffer.filled());
    Poll::Ready(Ok(answer.filter(|(_, whole)| *whole >= SPLICE_BYTES)))
}

/// Moves bytes of the source into the pipe, which the direction keeps if it took any; zero at the end.
fn splice_in(
    cx: &mut Context<'_>,
    proxy: &Proxy,
    half: &mut Half,
    from: &TcpStream,
    mut pipe: Pipe,
    left: u64,
) -> Poll<io::Result<usize>> {
    let read = loop {
        match from.poll_read_ready(cx) {
            Poll::Pending => break None,
            Poll::Ready(Err(error)) => break Some(Err(error)),
            Poll::Ready(Ok(())) => {}
        }
        match from.try_io(Interest::READABLE, || pipe.fill(from, left)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => break Some(read),
        }
    };
    match read {
        Some(Ok(count)) if count > 0 => {
            (half.pipe, half.is_long) = (Some(pipe), true);
            Poll::Ready(Ok(count))
        }
        nothing => {
            proxy.pipes.give_back(pipe);
            nothing.map_or(Poll::Pending, Poll::Ready)
        }
    }
}

/// Moves bytes of the pipe to the destination, and gives the pipe back when it is empty.
fn splice_out(
    cx: &mut Context<'_>,
    proxy: &Proxy,
    half: &mut Half,
    to: &TcpStream,
) -> Poll<io::Result<usize>> {
    let Some(pipe) = &mut half.pipe else {
        return Poll::Ready(Ok(0));
    };
    loop {
        ready!(to.poll_write_ready(cx))?;
        match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => {
                let count = written?;
                if pipe.is_empty()
                    && let Some(pipe) = half.pipe.take()
                {
                    proxy.pipes.give_back(pipe);
                }
                return Poll::Ready(Ok(count));
            }
        }
    }
}

/// Ends this turn. The task runs again after the runtime has looked for events: waking it directly
/// would run it before the others have noticed theirs.
fn give_way<T>(cx: &mut Context<'_>) -> Poll<T> {
    let yielded = pin!(yield_now()).poll(cx);
    if yielded.is_ready() {
        cx.waker().wake_by_ref();
    }
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::proxy::tests::proxy;

    /// Adds up what it is told; wants to see all but the bytes of a body of this length.
    #[derive(Default)]
    struct Sums {
        seen: usize,
        skipped: u64,
        body: u64,
        /// Lengths of the head and of the whole of each answer.
        answer: Option<(usize, u64)>,
    }

    impl Watch for Sums {
        const STAMPS_READ: bool = true;

        fn seen(&mut self, bytes: &[u8], _: u64) {
            self.seen += bytes.len();
        }

        fn left(&self) -> u64 {
            self.body.saturating_sub(self.skipped)
        }

        fn skipped(&mut self, count: u64) {
            self.skipped += count;
        }

        fn answer_of(&self, bytes: &[u8]) -> Option<(usize, u64)> {
            self.answer.filter(|_| !bytes.is_empty())
        }

        fn room(&self) -> usize {
            if self.answer.is_some() { 4096 } else { usize::MAX }
        }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (connected, listener.accept().await.unwrap().0)
    }

    /// Passes 32 MiB on, of which this many are spliced at first.
    async fn pass_on(body: u64) {
        const TOTAL: usize = 32 << 20;
        let (mut source, from) = pair().await;
        let (to, mut destination) = pair().await;
        let proxy = proxy();
        let mut half = Half::new(&proxy);
        let bytes: Vec<u8> = (0..TOTAL).map(|at| (at % 251) as u8).collect();
        let sent = bytes.clone();
        let writing = tokio::spawn(async move {
            source.write_all(&sent).await.unwrap();
        });
        let reading = tokio::spawn(async move {
            let mut bytes = Vec::new();
            destination.read_to_end(&mut bytes).await.unwrap();
            bytes
        });
        let mut sums = Sums {
            body,
            ..Sums::default()
        };
        let stop = poll_fn(|cx| {
            let before = sums.seen as u64 + sums.skipped;
            let stop = pump(cx, &proxy, &mut half, &from, &to, &mut sums);
            let turn = sums.seen as u64 + sums.skipped - before;
            assert!(
                turn <= (TURN_BYTES + (128 << 10)) as u64,
                "{turn} bytes in one turn"
            );
            stop
        });
        assert_eq!(stop.await, Stop::Closed);
        drop(to);
        writing.await.unwrap();
        assert!(reading.await.unwrap() == bytes, "the bytes are others");
        assert_eq!(
            (sums.seen as u64 + sums.skipped, sums.skipped > 0),
            (TOTAL as u64, body > 0)
        );
    }

    #[tokio::test]
    async fn a_bulk_transfer_gives_way() {
        pass_on(0).await;
    }

    #[tokio::test]
    async fn a_long_body_stays_in_the_kernel() {
        pass_on(20 << 20).await;
        pass_on(u64::MAX).await;
    }

    #[tokio::test]
    async fn a_long_answer_goes_with_its_head() {
        const WHOLE: usize = 20_000;
        let (mut source, from) = pair().await;
        let (to, _destination) = pair().await;
        let proxy = proxy();
        let mut half = Half::new(&proxy);
        half.is_long = true;
        source.write_all(&[b'x'; WHOLE]).await.unwrap();
        drop(source);
        while from.peek(&mut [0; WHOLE]).await.unwrap() < WHOLE {}
        let mut sums = Sums {
            answer: Some((100, WHOLE as u64)),
            ..Sums::default()
        };
        let stop = poll_fn(|cx| pump(cx, &proxy, &mut half, &from, &to, &mut sums)).await;
        assert_eq!(
            (stop, sums.seen, sums.skipped),
            (Stop::Closed, 100, WHOLE as u64 - 100)
        );
        half.ahead = b"head".to_vec();
        let seen = [1, 2, 9, 9].map(|count| half.written_ahead(count));
        assert_eq!(seen, [&b"h"[..], b"ea", b"d", b""]);
    }

    #[tokio::test]
    async fn what_is_refused_is_kept() {
        let (mut source, from) = pair().await;
        let (to, destination) = pair().await;
        destination.set_zero_linger().unwrap();
        drop(destination);
        source.write_all(b"hello").await.unwrap();
        let proxy = proxy();
        let mut half = Half::new(&proxy);
        let mut sums = Sums::default();
        let stop = poll_fn(|cx| pump(cx, &proxy, &mut half, &from, &to, &mut sums)).await;
        assert_eq!((stop, sums.seen), (Stop::DestinationLost, 0));
        half.append(b" again", 0);
        assert_eq!(half.take(), b"hello again");
    }
}
