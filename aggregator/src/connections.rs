//! Taking connections, and so many at a time. Whoever reaches a port can connect, so what a connection may hold is bounded:
//! a place among others, and the time for a head. Each service bounds what it reads by itself.

use std::{
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
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};

use crate::{access::Access, ingest::drained, metrics::Metrics};

/// How long a head may take, and how long a connection may be silent between two requests.
pub(crate) const HEAD_WITHIN: Duration = Duration::from_secs(10);

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
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    metrics: Arc<Metrics>,
    mut draining: watch::Receiver<bool>,
) {
    // What is sent and never taken holds its place no longer than that.
    if let Err(error) = set_tcp_user_timeout(&stream, TAKEN_WITHIN_MS) {
        tracing::debug!(%error, "a connection has no limit for what is not taken");
    }
    let router = TowerToHyperService::new(router);
    let has_asked = Arc::new(AtomicBool::new(false));
    let asks = Arc::clone(&has_asked);
    let service = service_fn(move |mut request: Request<Incoming>| {
        asks.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(ConnectInfo(peer));
        router.call(request)
    });
    let mut protocol = http1::Builder::new();
    protocol.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    let connection = protocol.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = drained(&mut draining) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // Why else it ended is of no use here: most are closed by the other side, or were idle between two requests.
    if !has_asked.load(Ordering::Relaxed) && ended.is_err_and(|error| error.is_timeout()) {
        metrics.connection_closed("silent");
    }
}
