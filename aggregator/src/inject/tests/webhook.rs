//! The webhook over sockets and TLS, as an API server meets it: what is asked, what is not taken, and certificates that
//! are replaced meanwhile.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;
use crate::{
    inject::{
        admission::MAX_REVIEW_BYTES,
        certificate::{Certificate, Files},
        server::serve,
    },
    metrics::Metrics,
};

const NAME: &str = "coalmine.coalmine.svc";

/// How long something may take that ends a test if it does not happen.
const DEADLINE: Duration = Duration::from_secs(60);

/// A certificate that signs itself, and its key.
struct Pair {
    chain: String,
    key: String,
    der: CertificateDer<'static>,
}

/// A webhook that is served.
struct Webhook {
    address: SocketAddr,
    certificate: Arc<Certificate>,
    metrics: Arc<Metrics>,
    draining: watch::Sender<bool>,
    served: JoinHandle<()>,
}

fn pair() -> Pair {
    pair_until(2096)
}

fn pair_until(year: i32) -> Pair {
    let mut params = rcgen::CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Pair {
        chain: certificate.pem(),
        key: key.serialize_pem(),
        der: certificate.der().clone(),
    }
}

async fn start(pair: Option<&Pair>) -> Webhook {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (certificate, metrics) = (Certificate::new(), Arc::new(Metrics::new()));
    if let Some(pair) = pair {
        certificate.replace(&pair.chain, &pair.key).unwrap();
    }
    let (draining, stop) = watch::channel(false);
    let served = serve(
        listener,
        settings(),
        Arc::clone(&certificate),
        Arc::clone(&metrics),
        stop,
    );
    Webhook {
        address,
        certificate,
        metrics,
        draining,
        served: tokio::spawn(served),
    }
}

/// Connects as somebody who trusts these certificates, and speaks one protocol.
async fn connect(address: SocketAddr, trusted: &[Pair], protocol: &str) -> io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    for pair in trusted {
        roots.add(pair.der.clone()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(NAME).unwrap();
    timeout(DEADLINE, connector.connect(name, stream)).await.unwrap()
}

/// The certificate that a connection was shown.
fn shown_on(stream: &TlsStream<TcpStream>) -> &CertificateDer<'static> {
    &stream.get_ref().1.peer_certificates().unwrap()[0]
}

/// Asks over HTTP/2.
async fn ask<B>(stream: TlsStream<TcpStream>, request: Request<B>) -> (StatusCode, Bytes)
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let answered = async {
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    timeout(DEADLINE, answered).await.unwrap()
}

fn request<B>(method: Method, path: &str, body: B) -> Request<B> {
    Request::builder()
        .method(method)
        .uri(format!("https://{NAME}{path}"))
        .body(body)
        .unwrap()
}

fn review() -> Full<Bytes> {
    let review = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "uid-1", "operation": "CREATE", "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "namespace": "shop", "object": pod(),
        },
    });
    Full::new(Bytes::from(review.to_string()))
}

/// Asks over HTTP/1.1 with these bytes, and reads until the connection is closed.
async fn ask_plainly(mut stream: TlsStream<TcpStream>, bytes: &[u8]) -> String {
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
    // Some ends of a connection are not announced; what was answered is there.
    drop(read);
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_review_is_answered_over_both_protocols() {
    let pairs = [pair()];
    let webhook = start(Some(&pairs[0])).await;
    let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
    let (status, body) = ask(stream, request(Method::POST, "/inject?timeout=3s", review())).await;
    assert_eq!(status, StatusCode::OK);
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (&body["response"]["uid"], &body["response"]["allowed"]),
        (&json!("uid-1"), &json!(true))
    );
    assert!(body["response"]["patch"].is_string(), "{body}");

    let stream = connect(webhook.address, &pairs, "http/1.1").await.unwrap();
    let review = review().collect().await.unwrap().to_bytes();
    let mut bytes = format!(
        "POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        review.len()
    )
    .into_bytes();
    bytes.extend_from_slice(&review);
    let answer = ask_plainly(stream, &bytes).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("\"patchType\":\"JSONPatch\""), "{answer}");

    let metrics = webhook.metrics.render().unwrap();
    for line in [
        "coalmine_admissions_total{result=\"patched\"} 2",
        "coalmine_admission_duration_seconds_count 2",
        // 2096-01-01T00:00:00Z.
        "coalmine_webhook_certificate_expires_seconds 3976214400",
    ] {
        assert!(metrics.lines().any(|other| other == line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn what_is_no_review_has_a_status() {
    let pairs = [pair()];
    let webhook = start(Some(&pairs[0])).await;
    for (method, path, body, status, part) in [
        (Method::POST, "/", "{}", StatusCode::NOT_FOUND, "POST /inject"),
        (
            Method::POST,
            "/inject/",
            "{}",
            StatusCode::NOT_FOUND,
            "POST /inject",
        ),
        (Method::GET, "/inject", "", StatusCode::METHOD_NOT_ALLOWED, "POST"),
        (
            Method::PUT,
            "/inject",
            "{}",
            StatusCode::METHOD_NOT_ALLOWED,
            "POST",
        ),
        (
            Method::POST,
            "/inject",
            "{}",
            StatusCode::BAD_REQUEST,
            "apiVersion",
        ),
        (
            Method::POST,
            "/inject",
            "",
            StatusCode::BAD_REQUEST,
            "AdmissionReview",
        ),
    ] {
        let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
        let body = Full::new(Bytes::from_static(body.as_bytes()));
        let (answered, text) = ask(stream, request(method, path, body)).await;
        let text = String::from_utf8_lossy(&text);
        assert_eq!(answered, status, "{path}: {text}");
        assert!(text.contains(part), "{path}: {text}");
    }
    let metrics = webhook.metrics.render().unwrap();
    assert!(
        metrics.contains("coalmine_admissions_total{result=\"bad\"} 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_review_that_is_too_large_is_not_read() {
    let pairs = [pair()];
    let webhook = start(Some(&pairs[0])).await;
    // One that says so before it comes.
    let stream = connect(webhook.address, &pairs, "http/1.1").await.unwrap();
    let length = MAX_REVIEW_BYTES + 1;
    let head = format!(
        "POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    let answer = ask_plainly(stream, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // One that does not say how large it is.
    let part = Bytes::from(vec![b' '; 64 << 10]);
    let parts = std::iter::repeat_n(part, MAX_REVIEW_BYTES / (64 << 10) + 1);
    let parts = parts.map(|part| Ok::<_, Infallible>(Frame::data(part)));
    let body = StreamBody::new(futures_util::stream::iter(parts));
    let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
    let (status, _) = ask(stream, request(Method::POST, "/inject", body)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    // One of just the size is read, and is no review.
    let most = Full::new(Bytes::from(vec![b' '; MAX_REVIEW_BYTES]));
    let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
    let (status, _) = ask(stream, request(Method::POST, "/inject", most)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_handshake_fails_while_the_certificate_is_replaced() {
    let pairs = Arc::new([pair(), pair()]);
    let webhook = start(Some(&pairs[0])).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (pairs, is_over, address) = (Arc::clone(&pairs), Arc::clone(&is_over), webhook.address);
            tokio::spawn(async move {
                let mut answered = 0_u32;
                while answered == 0 || !is_over.load(Ordering::Relaxed) {
                    let stream = connect(address, pairs.as_slice(), "h2").await.unwrap();
                    let (status, _) = ask(stream, request(Method::POST, "/inject", review())).await;
                    assert_eq!(status, StatusCode::OK);
                    answered += 1;
                }
            })
        })
        .collect();
    for turn in 1..=50 {
        let pair = &pairs[turn % 2];
        webhook.certificate.replace(&pair.chain, &pair.key).unwrap();
        let stream = connect(webhook.address, pairs.as_slice(), "h2").await.unwrap();
        assert_eq!(shown_on(&stream), &pair.der, "turn {turn}");
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        timeout(DEADLINE, client).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn without_a_certificate_nobody_is_answered_yet() {
    let pairs = [pair()];
    let webhook = start(None).await;
    assert_eq!(webhook.certificate.expires(), None);
    assert!(connect(webhook.address, &pairs, "h2").await.is_err());
    let metrics = webhook.metrics.render().unwrap();
    assert!(
        !metrics.contains("webhook_certificate_expires_seconds"),
        "{metrics}"
    );
    webhook
        .certificate
        .replace(&pairs[0].chain, &pairs[0].key)
        .unwrap();
    let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
    let (status, _) = ask(stream, request(Method::POST, "/inject", review())).await;
    assert_eq!(status, StatusCode::OK);
}

#[test]
fn a_certificate_that_cannot_be_used_does_not_replace_one_that_can() {
    let (good, other) = (pair_until(2031), pair());
    let certificate = Certificate::new();
    certificate.replace(&good.chain, &good.key).unwrap();
    // 2031-01-01T00:00:00Z.
    assert_eq!(certificate.expires(), Some(1_924_992_000));
    let cut = |text: &str| text[..text.len() / 2].to_owned();
    let one_line = other.key.replace('\n', "");
    let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    let large = "\n".repeat(2 << 20);
    for (chain, key, part) in [
        (&good.chain, &other.key, "not that of the certificate"),
        (&other.chain, &good.key, "not that of the certificate"),
        (&String::new(), &other.key, "no certificate"),
        (&other.key, &other.key, "no certificate"),
        (&cut(&other.chain), &other.key, "not in PEM form"),
        (&nonsense, &other.key, "not one of X.509"),
        (&other.chain, &String::new(), "no private key"),
        (&other.chain, &other.chain, "no private key"),
        (&other.chain, &cut(&other.key), "no private key"),
        (&other.chain, &one_line, "no private key"),
        (&large, &other.key, "more than"),
        (&other.chain, &large, "more than"),
    ] {
        let problem = certificate.replace(chain, key).unwrap_err();
        assert!(problem.contains(part), "{part}: {problem}");
        // Nothing of a key is ever said.
        assert!(problem.len() < 200, "{problem}");
        assert_eq!(certificate.expires(), Some(1_924_992_000), "{part}");
    }
    // The chain goes before the key, and what goes beyond it is let pass.
    let chain = format!("{}{}", other.chain, good.chain);
    let key = format!("{}{}", other.key, other.chain);
    certificate.replace(&chain, &key).unwrap();
    assert_eq!(certificate.expires(), Some(3_976_214_400));
}

#[tokio::test]
async fn files_are_taken_when_they_belong_together() {
    let (first, second) = (pair_until(2031), pair_until(2032));
    let directory = tempfile::tempdir().unwrap();
    let (chain, key) = (directory.path().join("tls.crt"), directory.path().join("tls.key"));
    let write = |path: &Path, text: &str| std::fs::write(path, text).unwrap();
    let certificate = Certificate::new();
    let mut files = Files::new(chain.clone(), key.clone());
    assert_eq!(files.look(&certificate).await, Some(false));
    assert_eq!(files.look(&certificate).await, None);
    write(&chain, &first.chain);
    write(&key, &first.key);
    assert_eq!(files.look(&certificate).await, Some(true));
    assert_eq!(files.look(&certificate).await, None);
    let before = certificate.expires();
    assert!(before.is_some());
    // Half of a change is not one, and is said once.
    write(&chain, &second.chain);
    assert_eq!(files.look(&certificate).await, Some(false));
    assert_eq!(files.look(&certificate).await, None);
    assert_eq!(certificate.expires(), before);
    write(&key, &second.key);
    assert_eq!(files.look(&certificate).await, Some(true));
    assert!(certificate.expires() > before);
    // A file that is gone takes nothing away.
    std::fs::remove_file(&key).unwrap();
    assert_eq!(files.look(&certificate).await, Some(false));
    assert_eq!(files.look(&certificate).await, None);
    assert!(certificate.expires() > before);
}

#[tokio::test]
async fn stopping_closes_what_is_idle_and_takes_nothing_more() {
    let pairs = [pair()];
    let webhook = start(Some(&pairs[0])).await;
    let stream = connect(webhook.address, &pairs, "h2").await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    let closed = tokio::spawn(connection);
    let response = sender.send_request(request(Method::POST, "/inject", review()));
    assert_eq!(response.await.unwrap().status(), StatusCode::OK);
    webhook.draining.send_replace(true);
    timeout(DEADLINE, webhook.served).await.unwrap().unwrap();
    drop(timeout(DEADLINE, closed).await.unwrap().unwrap());
    assert!(connect(webhook.address, &pairs, "h2").await.is_err());
}
