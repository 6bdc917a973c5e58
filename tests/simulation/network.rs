//! The simulated network under tonic, and the simulated clock.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use coalmine_agent::Dialling;
use futures_util::Stream;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::{
    codegen::Service,
    transport::{Endpoint, Uri, server::Connected},
};
use turmoil::net::{TcpListener, TcpStream};

/// When every simulation begins, in seconds since the Unix epoch.
pub(crate) const START_SECONDS: u64 = 1_800_000_000;

/// The name of the aggregator's host.
pub(crate) const AGGREGATOR: &str = "aggregator";

/// Where the aggregator listens.
pub(crate) const PORT: u16 = 7443;

/// The wall clock of the host that runs, in milliseconds.
pub(crate) fn clock() -> u64 {
    let since = turmoil::since_epoch().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap()
}

/// The wall clock of a host that is a minute ahead, in milliseconds.
pub(crate) fn clock_ahead() -> u64 {
    clock() + 60_000
}

/// Connects an agent.
pub(crate) fn dial(endpoint: Endpoint) -> Dialling {
    Box::pin(async move { endpoint.connect_with_connector(Connector).await })
}

struct Connector;

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(async {
            let stream = TcpStream::connect((AGGREGATOR, PORT)).await?;
            Ok(TokioIo::new(stream))
        })
    }
}

/// The connections that come in.
pub(crate) fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Accepted>> {
    futures_util::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await;
        Some((accepted.map(|(stream, _)| Accepted(stream)), listener))
    })
}

/// A connection that came in, as tonic wants it.
pub(crate) struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, to)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
