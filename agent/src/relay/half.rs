//! One direction of a relayed connection.

use std::{
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::yield_now,
};

use crate::proxy::Proxy;

/// After so many bytes the other connections get their turn.
const TURN_BYTES: usize = 256 * 1024;

/// One direction: what was read and could not be written yet, and how far closing has come.
#[derive(Debug, Default)]
pub(super) struct Half {
    waiting: Vec<u8>,
    written: usize,
    /// When the waiting bytes were read.
    read_ns: u64,
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

/// Which moment counts as the time of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stamp {
    /// When they were read.
    Read,
    /// When they were written.
    Written,
}

impl Half {
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
        self.waiting.is_empty()
    }

    /// Bytes that were read elsewhere and are the next to be written.
    pub(super) fn keep(&mut self, bytes: Vec<u8>, read_ns: u64) {
        (self.waiting, self.written, self.read_ns) = (bytes, 0, read_ns);
    }

    /// More bytes that were read elsewhere, to be written after those that are waiting.
    pub(super) fn append(&mut self, bytes: &[u8], read_ns: u64) {
        if self.waiting.is_empty() {
            self.read_ns = read_ns;
        }
        self.waiting.extend_from_slice(bytes);
    }

    /// The bytes that are waiting.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.drain(..std::mem::take(&mut self.written));
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

    /// Nothing more can be written; gives what could not.
    pub(super) fn break_off(&mut self) -> Vec<u8> {
        self.state = State::Broken;
        self.take()
    }

    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.written >= self.waiting.len() {
            // Slow readers are few: an idle connection keeps no buffer.
            (self.waiting, self.written) = (Vec::new(), 0);
        }
    }
}

/// Passes on what can be read and written now, but not so much that the others wait for long. What the
/// destination refuses is kept.
pub(super) fn pump(
    cx: &mut Context<'_>,
    proxy: &Proxy,
    half: &mut Half,
    from: &mut TcpStream,
    to: &mut TcpStream,
    stamp: Stamp,
    mut seen: impl FnMut(&[u8], u64),
) -> Poll<Stop> {
    let time = |read_ns| match stamp {
        Stamp::Read => read_ns,
        Stamp::Written => proxy.now_ns(),
    };
    let mut shared = proxy.buffer.borrow_mut();
    let mut passed = 0;
    loop {
        if passed >= TURN_BYTES {
            return give_way(cx);
        }
        if let Some(rest) = half.waiting.get(half.written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut *to).poll_write(cx, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(count)) if count > 0 => {
                    seen(&rest[..count], time(half.read_ns));
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
        let mut buffer = ReadBuf::new(&mut shared);
        match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return Poll::Ready(Stop::SourceLost),
        }
        let bytes = buffer.filled();
        if bytes.is_empty() {
            half.state = State::Ended;
            continue;
        }
        let read_ns = if stamp == Stamp::Read { proxy.now_ns() } else { 0 };
        let count = match Pin::new(&mut *to).poll_write(cx, bytes) {
            Poll::Pending => 0,
            Poll::Ready(Ok(count)) if count > 0 => count,
            Poll::Ready(_) => {
                half.keep(bytes.to_vec(), read_ns);
                return Poll::Ready(Stop::DestinationLost);
            }
        };
        passed += count;
        if count > 0 {
            seen(&bytes[..count], time(read_ns));
        }
        if count < bytes.len() {
            half.keep(bytes[count..].to_vec(), read_ns);
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

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (connected, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_bulk_transfer_gives_way() {
        const TOTAL: usize = 32 << 20;
        let (mut source, mut from) = pair().await;
        let (mut to, mut destination) = pair().await;
        let (proxy, mut half) = (proxy(), Half::default());
        let writing = tokio::spawn(async move {
            source.write_all(&vec![7; TOTAL]).await.unwrap();
        });
        let reading = tokio::spawn(async move {
            let mut bytes = Vec::new();
            destination.read_to_end(&mut bytes).await.unwrap();
            bytes
        });
        let stop = poll_fn(|cx| {
            let mut turn = 0;
            let seen = |bytes: &[u8], _| turn += bytes.len();
            let stop = pump(cx, &proxy, &mut half, &mut from, &mut to, Stamp::Read, seen);
            assert!(turn < TURN_BYTES + (64 << 10), "{turn} bytes in one turn");
            stop
        });
        assert_eq!(stop.await, Stop::Closed);
        drop(to);
        writing.await.unwrap();
        assert_eq!(reading.await.unwrap(), vec![7; TOTAL]);
    }

    #[tokio::test]
    async fn what_is_refused_is_kept() {
        let (mut source, mut from) = pair().await;
        let (mut to, destination) = pair().await;
        destination.set_zero_linger().unwrap();
        drop(destination);
        source.write_all(b"hello").await.unwrap();
        let (proxy, mut half) = (proxy(), Half::default());
        let stop = poll_fn(|cx| {
            let seen = |_: &[u8], _| panic!("nothing is written");
            pump(cx, &proxy, &mut half, &mut from, &mut to, Stamp::Read, seen)
        });
        assert_eq!(stop.await, Stop::DestinationLost);
        half.append(b" again", 0);
        assert_eq!(half.take(), b"hello again");
    }
}
