//! Serves a client that speaks HTTP/2 with prior knowledge, gRPC above all, through hyper on both sides.
//!
//! One connection to the application for each client connection, streams one to one. Bodies and
//! trailers are passed on as they come. Where the application fails, the stream is reset, as it would
//! have been without the agent: no answer is made up.

mod observed;
mod prefixed;

use std::{error::Error, future::poll_fn, io, pin::pin, rc::Rc, task::Poll};

use coalmine_proto::names::Outcome;
use http::{Request, Response, Uri, header, uri::Authority};
use hyper::{body::Incoming, client::conn::http2::SendRequest, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;

use crate::{
    gate::Stage,
    observer::Sink,
    proxy::Proxy,
    relay::Watched,
    system,
    tenant::{Head, Header},
};
use observed::{Flight, Kind, Observed};
pub(crate) use prefixed::Prefixed;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a stream may have on its way in each direction: the bound of the memory for a slow reader.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const MAX_HEADER_LIST: u32 = 64 * 1024;
const MAX_STREAMS: u32 = 1024;

type Failure = Box<dyn Error + Send + Sync>;

/// Which protocol a client's first bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sniffed {
    /// HTTP/2 with prior knowledge.
    Http2,
    /// More bytes are needed.
    Unclear,
    /// Anything else.
    Other,
}

/// Looks at the first bytes of a connection.
pub(crate) fn sniff(bytes: &[u8]) -> Sniffed {
    if bytes.starts_with(PREFACE) {
        Sniffed::Http2
    } else if PREFACE.starts_with(bytes) {
        Sniffed::Unclear
    } else {
        Sniffed::Other
    }
}

/// The connection to the application, opened again when the application has closed it.
struct Link {
    proxy: Rc<Proxy>,
    sender: Mutex<Option<SendRequest<Incoming>>>,
}

/// Runs hyper's tasks on this thread.
#[derive(Debug, Clone, Copy)]
struct Local;

impl<F> hyper::rt::Executor<F> for Local
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

/// Serves the client until it or the agent is done.
pub(crate) async fn serve(client: Prefixed, upstream: Option<Prefixed>, mut watched: Watched) {
    let proxy = watched.proxy.clone();
    let link = Rc::new(Link {
        proxy: proxy.clone(),
        sender: Mutex::new(None),
    });
    if let Some(upstream) = upstream {
        *link.sender.lock().await = handshake(upstream).await.ok();
    }
    let service = service_fn(move |request| forward(link.clone(), request));
    let connection = hyper::server::conn::http2::Builder::new(Local)
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(client), service);
    let mut connection = pin!(connection);
    let mut is_draining = false;
    let ended = poll_fn(|cx| {
        let stage = proxy.gate.watch(&mut watched.ticket, cx);
        if stage == Stage::Closed {
            return Poll::Ready(Ok(()));
        }
        if stage == Stage::Draining && !is_draining {
            is_draining = true;
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(cx)
    });
    if let Err(error) = ended.await {
        tracing::debug!(%error, "an HTTP/2 connection ended");
    }
}

async fn handshake(upstream: Prefixed) -> Result<SendRequest<Incoming>, hyper::Error> {
    let (sender, connection) = hyper::client::conn::http2::Builder::new(Local)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .handshake(TokioIo::new(upstream))
        .await?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "an HTTP/2 connection to the application ended");
        }
    });
    Ok(sender)
}

async fn forward(link: Rc<Link>, mut request: Request<Incoming>) -> Result<Response<Observed>, Failure> {
    let tenant = link.proxy.recorder.borrow_mut().begin(&Stream(&request));
    let flight = Flight::new(link.proxy.clone(), tenant);
    let kind = Kind::of(request.headers());
    name_authority(&mut request);
    // A request that was not sent, because the application had just closed, is tried once more.
    for _ in 0..2 {
        let mut sender = match link.sender().await {
            Ok(sender) => sender,
            Err(failure) => {
                let io = failure.downcast_ref::<io::Error>();
                match io.is_some_and(system::is_exhausted) {
                    true => flight.forget(),
                    false => flight.end(Outcome::ConnectFailure),
                }
                return Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into());
            }
        };
        match sender.try_send_request(request).await {
            Ok(response) => {
                let (head, body) = response.into_parts();
                let body = Observed::new(body, kind, &head, flight);
                return Ok(Response::from_parts(head, body));
            }
            Err(mut failed) => match failed.take_message() {
                Some(unsent) => request = unsent,
                None => {
                    flight.end(Outcome::UpstreamReset);
                    return Err(failed.into_error().into());
                }
            },
        }
    }
    flight.end(Outcome::UpstreamReset);
    Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into())
}

/// hyper's client wants an authority, which a client may have given as Host alone.
fn name_authority(request: &mut Request<Incoming>) {
    if request.uri().authority().is_some() {
        return;
    }
    let host = request
        .headers()
        .get(header::HOST)
        .map(http::HeaderValue::as_bytes);
    let authority = host.and_then(|host| Authority::try_from(host).ok());
    let mut parts = request.uri().clone().into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTP);
    parts.authority = authority.or_else(|| Authority::try_from("localhost").ok());
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

// === impl Link ===

impl Link {
    /// A sender to the application, on a new connection if the one before is closed.
    async fn sender(&self) -> Result<SendRequest<Incoming>, Failure> {
        let mut sender = self.sender.lock().await;
        if let Some(open) = sender.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(open.clone());
        }
        let upstream = Prefixed::new(Vec::new(), self.proxy.dial().await?);
        let new = handshake(upstream).await?;
        *sender = Some(new.clone());
        Ok(new)
    }
}

/// A stream's head, as the tenant rules see it.
struct Stream<'a>(&'a Request<Incoming>);

impl Head for Stream<'_> {
    fn header(&self, name: &str) -> Header<'_> {
        Header::of(
            self.0
                .headers()
                .get_all(name)
                .iter()
                .map(|value| value.as_bytes()),
        )
    }

    fn host(&self) -> Option<&[u8]> {
        let authority = self.0.uri().authority().map(|a| a.as_str().as_bytes());
        authority.or_else(|| self.0.headers().get(header::HOST).map(|h| h.as_bytes()))
    }

    fn target(&self) -> &[u8] {
        self.0.uri().path().as_bytes()
    }
}
