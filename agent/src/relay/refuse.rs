//! What happens to a client when the application accepts no connection.

use std::{future::poll_fn, io, pin::Pin, task::Poll};

use coalmine_proto::names::Outcome;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::timeout,
};

use super::{FIRST_REQUEST, Relay};
use crate::system;

impl Relay {
    /// Reads the first request, counts it as failed, and resets the connection.
    pub(super) async fn refuse(&mut self, why: io::Error) {
        tracing::debug!(error = %why, "the application accepts no connection");
        if system::is_exhausted(&why) {
            // Nobody asked the application: this says nothing about it.
            return self.reset();
        }
        let read = timeout(FIRST_REQUEST, async {
            while self.watched.observer.pending() == 0 && !self.watched.observer.is_request_opaque() {
                self.read_some().await?;
            }
            Some(())
        });
        if !matches!(read.await, Ok(Some(()))) {
            tracing::trace!("no request came before the reset");
        }
        self.watched
            .observe(|o, now_ns, sink| o.end_all(Outcome::ConnectFailure, now_ns, sink));
        self.reset();
    }

    /// Observes what the client sent; none if it is gone.
    async fn read_some(&mut self) -> Option<()> {
        let proxy = self.watched.proxy.clone();
        poll_fn(|cx| {
            let mut shared = proxy.buffer.borrow_mut();
            let mut buffer = ReadBuf::new(&mut shared);
            match Pin::new(&mut self.client).poll_read(cx, &mut buffer) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    self.watched
                        .observe(|o, now_ns, sink| o.on_request(buffer.filled(), now_ns, sink));
                    Poll::Ready(Some(()))
                }
                Poll::Ready(_) => Poll::Ready(None),
            }
        })
        .await
    }
}
