//! How the connections of a relay are closed.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::Relay;
use crate::gate::Stage;

/// How long a client may take to close after the agent has.
const LINGER: Duration = Duration::from_secs(1);

impl Relay {
    /// Closes the client's connection so that all that was written to it arrives. Were it simply dropped
    /// while bytes of the client are unread, the kernel would say a reset, which discards the answer.
    pub(super) async fn linger(&mut self) {
        self.upstream = None;
        if self.up.is_finished() {
            return;
        }
        let closed = poll_fn(|cx| Pin::new(&mut self.client).poll_shutdown(cx));
        if closed.await.is_err() {
            return;
        }
        let gone = poll_fn(|cx| {
            loop {
                if self.watched.proxy.gate.watch(&mut self.watched.ticket, cx) == Stage::Closed {
                    return Poll::Ready(());
                }
                let mut shared = self.watched.proxy.buffer.borrow_mut();
                let mut buffer = ReadBuf::new(&mut shared);
                let read = ready!(Pin::new(&mut self.client).poll_read(cx, &mut buffer));
                if read.is_err() || buffer.filled().is_empty() {
                    return Poll::Ready(());
                }
            }
        });
        if timeout(LINGER, gone).await.is_err() {
            tracing::debug!("a client does not close");
        }
    }

    /// Closes both connections with a reset, as one of them was.
    pub(super) fn reset(&self) {
        for stream in [Some(&self.client), self.upstream.as_ref()].into_iter().flatten() {
            reset(stream);
        }
    }
}

/// Lets the connection be closed with a reset when it is dropped.
pub(super) fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "a reset cannot be passed on");
    }
}
