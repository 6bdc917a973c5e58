//! The webhook: what API servers ask over TLS before they make a pod, `POST /inject`.
//!
//! An API server waits for the answer, and goes on without one after some seconds; nothing here makes it wait for
//! anything but its own review. Whoever reaches the port can ask, so all that a connection may take is bounded: how
//! many there are, how long a handshake, a head and a body take, and the memory of reviews. Whoever holds all places
//! keeps pods without agents, which holds their rollouts: let only API servers reach the port.

use std::{
    convert::Infallible,
    error::Error,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    body::{Body, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::server::NoServerSessionStorage;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, SemaphorePermit, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Settings,
    admission::{About, Admitted, Answer, MAX_REVIEW_BYTES, answer},
    certificate::{Certificate, Files},
};
use crate::{
    connections::{HEAD_WITHIN, IDLE, Places, accept},
    ingest::drained,
    metrics::Metrics,
};

/// The only thing that is served.
const PATH: &str = "/inject";

/// Connections at a time; others wait.
const MAX_CONNECTIONS: u16 = 256;

/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 128;

/// What a connection of HTTP/2 may send ahead of what is read of it.
const WINDOW: u32 = 256 << 10;

/// Bytes of all reviews that are being read; beyond them no review is taken.
const MAX_READING_BYTES: usize = 64 << 20;

/// Reviews that are being answered: as values a review takes many times its size.
const MAX_ANSWERING: usize = 2;

/// How long a handshake, and a body with its answer may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Less than the `timeoutSeconds` of deploy/components/webhook-server, after which the API server does not wait: so
/// what comes too late is counted.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// How often the other side of HTTP/2 must give a sign, and how long it may take for it.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_WITHIN: Duration = Duration::from_secs(10);

/// How long a connection that is to be closed may take for its last answers.
const CLOSE_WITHIN: Duration = Duration::from_secs(10);

/// How often the files of a certificate are read.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What requests are answered with.
#[derive(Debug)]
struct Desk {
    settings: Settings,
    metrics: Arc<Metrics>,
    reading: Semaphore,
    answering: Semaphore,
}

/// Why there is no answer to a review.
type Problem = (StatusCode, String);

/// Answers until it is to stop, and then until every connection is closed.
pub(crate) async fn serve(
    listener: TcpListener,
    settings: Settings,
    certificate: Arc<Certificate>,
    metrics: Arc<Metrics>,
    draining: watch::Receiver<bool>,
) {
    metrics.watch_certificate(Arc::clone(&certificate));
    let tls = match acceptor(certificate) {
        Ok(tls) => tls,
        Err(error) => {
            tracing::error!(%error, "the webhook has no TLS and is not served");
            return;
        }
    };
    let desk = Arc::new(Desk {
        settings,
        metrics,
        reading: Semaphore::new(MAX_READING_BYTES),
        answering: Semaphore::new(MAX_ANSWERING),
    });
    let begin = {
        let draining = draining.clone();
        move |stream, _| connection(stream, tls.clone(), Arc::clone(&desk), draining.clone())
    };
    accept(listener, Places::waited_for(MAX_CONNECTIONS), draining, begin).await;
}

/// Reads the files now and whenever they change.
pub(crate) async fn follow_files(
    certificate: Arc<Certificate>,
    chain: PathBuf,
    key: PathBuf,
    metrics: Arc<Metrics>,
) {
    let mut files = Files::new(chain, key);
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        if let Some(is_taken) = files.look(&certificate).await {
            metrics.webhook_certificate(if is_taken { "taken" } else { "refused" });
        }
    }
}

/// TLS without client certificates: an API server has none unless it is told to.
fn acceptor(certificate: Arc<Certificate>) -> Result<TlsAcceptor, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Nobody goes on from an earlier session, so that everybody is shown the certificate of the moment.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves one connection until either side ends it.
async fn connection(
    stream: TcpStream,
    tls: TlsAcceptor,
    desk: Arc<Desk>,
    mut draining: watch::Receiver<bool>,
) {
    let stream = match timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a handshake with the webhook failed");
            return;
        }
        Err(_) => {
            tracing::debug!("a handshake with the webhook took too long");
            return;
        }
    };
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2".as_slice());
    let protocol = protocol(is_http2);
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    let service = service_fn(move |request: Request<Incoming>| {
        count.fetch_add(1, Ordering::Relaxed);
        let desk = Arc::clone(&desk);
        async move { Ok::<_, Infallible>(desk.reply(request).await) }
    });
    let connection = protocol.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut before = 0;
    loop {
        tokio::select! {
            // Why it ended is of no use here: most are closed by the other side.
            _ = connection.as_mut() => return,
            () = drained(&mut draining) => break,
            () = tokio::time::sleep(if before == 0 { HEAD_WITHIN } else { IDLE }) => {}
        }
        let now = asked.load(Ordering::Relaxed);
        if now == 0 {
            return;
        }
        if now == before {
            break;
        }
        before = now;
    }
    connection.as_mut().graceful_shutdown();
    drop(timeout(CLOSE_WITHIN, connection).await);
}

fn protocol(is_http2: bool) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_WITHIN)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_concurrent_streams(MAX_STREAMS);
    // The handshake has settled it; so nobody is waited for to show which it is.
    if is_http2 {
        builder.http2_only()
    } else {
        builder.http1_only()
    }
}

fn too_large() -> Problem {
    let text = format!("a review has at most {MAX_REVIEW_BYTES} bytes");
    (StatusCode::PAYLOAD_TOO_LARGE, text)
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn text(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", format!("{line}\n"))
}

// === impl Desk ===

impl Desk {
    async fn reply(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, "there is only POST /inject here");
        }
        if request.method() != Method::POST {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "send reviews with POST");
            let allow = HeaderValue::from_static("POST");
            response.headers_mut().insert(header::ALLOW, allow);
            return response;
        }
        let begun = Instant::now();
        let late = (
            StatusCode::REQUEST_TIMEOUT,
            format!(
                "the review did not come whole within {} s",
                ANSWER_WITHIN.as_secs()
            ),
        );
        let answered = timeout(ANSWER_WITHIN, self.admit(request.into_body())).await;
        let (result, response) = match answered.unwrap_or(Err(late)) {
            Ok(answer) => {
                let result = note(&answer);
                (result, response(StatusCode::OK, "application/json", answer.body))
            }
            Err((status, why)) => {
                tracing::debug!(why, "the webhook was sent what it cannot answer");
                let result = match status {
                    StatusCode::REQUEST_TIMEOUT => "late",
                    StatusCode::SERVICE_UNAVAILABLE => "busy",
                    _ => "bad",
                };
                (result, text(status, &why))
            }
        };
        self.metrics.admission(result, begun.elapsed());
        response
    }

    /// Reads a review and answers it, when there is room for it.
    async fn admit<B>(&self, body: B) -> Result<Answer, Problem>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let most = u32::try_from(MAX_REVIEW_BYTES).unwrap_or(u32::MAX);
        let size = body.size_hint();
        if size.lower() > u64::from(most) {
            return Err(too_large());
        }
        let mut body = std::pin::pin!(Limited::new(body, MAX_REVIEW_BYTES));
        // Room for what has come, and not for what is announced; nobody who has some waits for more.
        let (mut read, mut room) = (BytesMut::new(), None::<SemaphorePermit<'_>>);
        while let Some(frame) = body.as_mut().frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) if error.is::<LengthLimitError>() => return Err(too_large()),
                Err(error) => {
                    let why = format!("the review broke off: {error}");
                    return Err((StatusCode::BAD_REQUEST, why));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            let Ok(more) = self
                .reading
                .try_acquire_many(u32::try_from(data.len()).unwrap_or(most))
            else {
                let why = "too many reviews are being read".to_owned();
                return Err((StatusCode::SERVICE_UNAVAILABLE, why));
            };
            match &mut room {
                Some(room) => room.merge(more),
                none => *none = Some(more),
            }
            read.extend_from_slice(&data);
        }
        let body = read.freeze();
        let _turn = self.answering.acquire().await;
        answer(&body, &self.settings).map_err(|why| (StatusCode::BAD_REQUEST, why))
    }
}

/// Logs what somebody may look for, and names the result for the metrics.
fn note(answer: &Answer) -> &'static str {
    let About {
        namespace,
        name,
        is_dry_run,
    } = &answer.about;
    match &answer.admitted {
        Admitted::Patched => "patched",
        Admitted::Unchanged(why) => {
            tracing::debug!(
                namespace,
                pod = name,
                reason = why.as_str(),
                "a pod stays as it is"
            );
            "unchanged"
        }
        Admitted::Refused(refusal) => {
            tracing::warn!(
                namespace,
                pod = name,
                reason = refusal.as_str(),
                dry_run = is_dry_run,
                "a pod gets no agent: {refusal}"
            );
            refusal.as_str()
        }
    }
}
