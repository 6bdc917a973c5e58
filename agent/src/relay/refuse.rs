//! What happens to a client when the application accepts no connection.

use std::{future::poll_fn, io, pin::Pin, task::Poll, time::Duration};

use coalmine_proto::names::Outcome;
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{Watched, close};
use crate::{
    http2::{self, Prefixed, Sniffed},
    system,
};

/// How long the client's first request is waited for, so that the failure counts for its tenant.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// Reads the first request, counts it as failed, and resets the connection.
pub(super) async fn refuse(mut client: TcpStream, mut watched: Watched, why: &io::Error) {
    tracing::debug!(error = %why, "the application accepts no connection");
    if system::is_exhausted(why) {
        // Nobody asked the application: this says nothing about it.
        return close::reset(&client);
    }
    let (mut first, mut told) = (Vec::new(), 0);
    let read = timeout(FIRST_REQUEST, async {
        loop {
            read_some(&mut client, &watched, &mut first).await?;
            match http2::sniff(&first) {
                Sniffed::Http2 => return Some(true),
                Sniffed::Unclear => {}
                Sniffed::Other => {
                    watched.observe(|o, now_ns, sink| o.on_request(&first[told..], now_ns, sink));
                    told = first.len();
                    if watched.observer.pending() > 0 || watched.observer.is_request_opaque() {
                        return Some(false);
                    }
                }
            }
        }
    });
    if let Ok(Some(true)) = read.await {
        // Each stream is refused by itself, and the application may be there for the next.
        return http2::serve(Prefixed::new(first, client), None, watched).await;
    }
    watched.observe(|o, now_ns, sink| o.end_all(Outcome::ConnectFailure, now_ns, sink));
    close::reset(&client);
}

/// Appends what the client sent; none if it is gone.
async fn read_some(client: &mut TcpStream, watched: &Watched, bytes: &mut Vec<u8>) -> Option<()> {
    poll_fn(|cx| {
        let mut buffer = watched.proxy.buffer.borrow_mut();
        let mut buffer = ReadBuf::new(&mut buffer);
        match Pin::new(&mut *client).poll_read(cx, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                bytes.extend_from_slice(buffer.filled());
                Poll::Ready(Some(()))
            }
            Poll::Ready(_) => Poll::Ready(None),
        }
    })
    .await
}
