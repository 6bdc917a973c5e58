//! What happens to a client when the application accepts no connection.

use std::{future::poll_fn, io, pin::Pin, task::Poll, time::Duration};

use coalmine_proto::names::Outcome;
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{Watched, close};
use crate::system;

/// How long the client's first request is waited for, so that the failure counts for its tenant.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// Reads the first request, counts it as failed, and resets the connection.
pub(super) async fn refuse(mut client: TcpStream, mut watched: Watched, why: &io::Error) {
    tracing::debug!(error = %why, "the application accepts no connection");
    if system::is_exhausted(why) {
        // Nobody asked the application: this says nothing about it.
        return close::reset(&client);
    }
    let read = timeout(FIRST_REQUEST, async {
        while watched.observer.pending() == 0 && !watched.observer.is_request_opaque() {
            read_some(&mut client, &mut watched).await?;
        }
        Some(())
    });
    if !matches!(read.await, Ok(Some(()))) {
        tracing::trace!("no request came before the reset");
    }
    watched.observe(|o, now_ns, sink| o.end_all(Outcome::ConnectFailure, now_ns, sink));
    close::reset(&client);
}

/// Observes what the client sent; none if it is gone.
async fn read_some(client: &mut TcpStream, watched: &mut Watched) -> Option<()> {
    poll_fn(|cx| {
        let proxy = watched.proxy.clone();
        let mut buffer = proxy.buffer.borrow_mut();
        let mut buffer = ReadBuf::new(&mut buffer);
        match Pin::new(&mut *client).poll_read(cx, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                watched.observe(|o, now_ns, sink| o.on_request(buffer.filled(), now_ns, sink));
                Poll::Ready(Some(()))
            }
            Poll::Ready(_) => Poll::Ready(None),
        }
    })
    .await
}
