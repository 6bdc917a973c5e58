//! Taking connections, and so many at a time. Whoever reaches a port can connect, so what a connection may hold is bounded:
//! a place among others, and the time for a head. Each service bounds what it reads by itself.

use std::{
    future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::ConnectInfo};
use http::Request;
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};

use crate::{access::Access, ingest::drained, metrics::Metrics};

/// How long the first head of a connection may take.
pub(crate) const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// A connection on which no request has come for so long is closed. Clients of Go close theirs after 90 s; if the server
/// were first, a poll could be sent into the close, and a POST is not sent again.
pub(crate) const IDLE: Duration = Duration::from_secs(120);

/// Connections of tools and people at a time; another one is closed.
const MAX_CONNECTIONS: u32 = 4_096;

/// How long what was sent may stay unacknowledged, in milliseconds.
const TAKEN_WITHIN_MS: u32 = 30_000;

/// Pause when no connection can be accepted, for want of descriptors as a rule.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Places for connections.
#[derive(Debug)]
pub(crate) struct Places {
    all: u32,
    free: Arc<Semaphore>,
    /// Where a connection without a place is counted, and closed; else it waits for one.
    metrics: Option<Arc<Metrics>>,
}

impl Places {
    /// So many, for which others wait.
    pub(crate) fn waited_for(all: u16) -> Self {
        Self {
            all: u32::from(all),
            free: Arc::new(Semaphore::new(usize::from(all))),
            metrics: None,
        }
    }

    /// So many, without which a connection is closed.
    fn or_closed(all: u32, metrics: Arc<Metrics>) -> Self {
        Self {
            all,
            free: Arc::new(Semaphore::new(
                usize::try_from(all).unwrap_or(Semaphore::MAX_PERMITS),
            )),
            metrics: Some(metrics),
        }
    }

    /// A place for the next connection, which comes when this is there; none where the connection is to be closed.
    async fn next(&self) -> Option<OwnedSemaphorePermit> {
        match &self.metrics {
            None => Arc::clone(&self.free).acquire_owned().await.ok(),
            Some(_) => Arc::clone(&self.free).try_acquire_owned().ok(),
        }
    }

    fn closed(&self) {
        if let Some(metrics) = &self.metrics {
            metrics.connection_closed("full");
        }
    }
}

/// Takes connections until it is to stop, and returns when the last one is closed.
pub(crate) async fn accept<C>(
    listener: TcpListener,
    places: Places,
    mut draining: watch::Receiver<bool>,
    mut begin: impl FnMut(TcpStream, SocketAddr) -> C,
) where
    C: Future<Output = ()> + Send + 'static,
{
    loop {
        let next = async {
            if places.metrics.is_some() {
                // Whether there is a place is known when the connection is there.
                let accepted = listener.accept().await;
                return (places.next().await, accepted);
            }
            (places.next().await, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = drained(&mut draining) => break,
        };
        match (place, accepted) {
            (Some(place), Ok((stream, peer))) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection keeps its delay");
                }
                let connection = begin(stream, peer);
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            (None, Ok(_)) => places.closed(),
            (_, Err(error)) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    // All places are free when the last connection is closed.
    drop(places.free.acquire_many(places.all).await);
}

/// Answers tools and people until it is to stop, and then until every connection is closed.
pub(crate) async fn api(
    listener: TcpListener,
    router: Router,
    metrics: Arc<Metrics>,
    access: Arc<Access>,
    draining: watch::Receiver<bool>,
) {
    let places = Places::or_closed(MAX_CONNECTIONS, Arc::clone(&metrics));
    let begin = {
        let draining = draining.clone();
        move |stream, peer: SocketAddr| {
            let (router, metrics, draining) = (router.clone(), Arc::clone(&metrics), draining.clone());
            let held = access.connection(peer.ip());
            async move {
                // What is sent and never taken holds its place no longer than that.
                if let Err(error) = set_tcp_user_timeout(&stream, TAKEN_WITHIN_MS) {
                    tracing::debug!(%error, "a connection has no limit for what is not taken");
                }
                match held {
                    Some(_held) => connection(stream, peer, router, metrics, draining).await,
                    None => metrics.connection_closed("caller"),
                }
            }
        }
    };
    accept(listener, places, draining, begin).await;
}

/// Answers one connection until either side ends it.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: SocketAddr,
    router: Router,
    metrics: Arc<Metrics>,
    mut draining: watch::Receiver<bool>,
) {
    let router = TowerToHyperService::new(router);
    let has_asked = Arc::new(AtomicBool::new(false));
    let asks = Arc::clone(&has_asked);
    let service = service_fn(move |mut request: Request<Incoming>| {
        asks.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(ConnectInfo(peer));
        router.call(request)
    });
    let mut protocol = http1::Builder::new();
    // It counts from the end of the answer before.
    protocol.timer(TokioTimer::new()).header_read_timeout(IDLE);
    let connection = protocol.serve_connection(TokioIo::new(stream), service);
    let silent = async {
        tokio::time::sleep(HEAD_WITHIN).await;
        if has_asked.load(Ordering::Relaxed) {
            future::pending::<()>().await;
        }
    };
    tokio::pin!(connection, silent);
    tokio::select! {
        // What has come is looked at before it is called late.
        biased;
        // Why it ended is of no use here: most are closed by the other side, or were idle.
        _ = connection.as_mut() => return,
        () = silent => return metrics.connection_closed("silent"),
        () = drained(&mut draining) => {}
    }
    connection.as_mut().graceful_shutdown();
    drop(connection.await);
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        task::JoinHandle,
        time::{Instant, sleep},
    };

    use super::*;

    /// A connection to a server that goes on for as long as `draining`.
    fn connected(draining: watch::Receiver<bool>) -> (DuplexStream, JoinHandle<()>, Arc<Metrics>) {
        let (client, server) = duplex(4_096);
        let metrics = Arc::new(Metrics::new());
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let router = Router::new().route("/", get(|| async { "here" }));
        let serving = connection(server, peer, router, Arc::clone(&metrics), draining);
        (client, tokio::spawn(serving), metrics)
    }

    async fn ask(client: &mut DuplexStream) -> String {
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
            .await
            .unwrap();
        let mut answer = vec![0; 4_096];
        let read = client.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_has_asked_is_kept_for_longer_than_clients_keep_theirs() {
        let (_goes_on, draining) = watch::channel(false);
        let (mut client, serving, _) = connected(draining);
        for _ in 0..3 {
            assert!(ask(&mut client).await.ends_with("here"));
            sleep(Duration::from_secs(91)).await;
            assert!(!serving.is_finished());
        }
        assert!(ask(&mut client).await.ends_with("here"));
        let answered = Instant::now();
        serving.await.unwrap();
        assert_eq!(answered.elapsed().as_secs(), IDLE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_asks_is_closed_soon_and_counted() {
        let (_goes_on, draining) = watch::channel(false);
        let (mut client, serving, metrics) = connected(draining);
        client.write_all(b"GET / HTTP/1.1\r\nhost: ").await.unwrap();
        let begun = Instant::now();
        serving.await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), HEAD_WITHIN.as_secs());
        let text = metrics.render().unwrap();
        assert!(
            text.contains("coalmine_connections_closed_total{reason=\"silent\"} 1"),
            "{text}"
        );
    }
}
