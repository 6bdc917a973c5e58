//! One direction of a relayed connection.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::proxy::Proxy;

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

    /// The bytes that are waiting.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.waiting)
    }

    /// Passes the close on.
    pub(super) fn finish(&mut self, cx: &mut Context<'_>, to: &mut TcpStream) {
        self.state = State::Finished;
        // A socket's write side is closed at once; that it is closed already is no error here.
        if let Poll::Ready(Err(error)) = Pin::new(to).poll_shutdown(cx) {
            tracing::trace!(%error, "cannot be closed");
        }
    }

    pub(super) fn break_off(&mut self) {
        self.waiting = Vec::new();
        self.state = State::Broken;
    }

    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.written >= self.waiting.len() {
            // Slow readers are few: an idle connection keeps no buffer.
            (self.waiting, self.written) = (Vec::new(), 0);
        }
    }
}

/// Passes on all that can be read and written now.
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
    loop {
        if let Some(rest) = half.waiting.get(half.written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut *to).poll_write(cx, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(count)) if count > 0 => {
                    seen(&rest[..count], time(half.read_ns));
                    half.wrote(count);
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
            Poll::Ready(_) => return Poll::Ready(Stop::DestinationLost),
        };
        if count > 0 {
            seen(&bytes[..count], time(read_ns));
        }
        if count < bytes.len() {
            half.keep(bytes[count..].to_vec(), read_ns);
        }
    }
}
