//! HTTP/2 with prior knowledge, and gRPC.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::http2::{SendRequest, handshake},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, runtime::Runtime, sync::Notify};

use crate::{
    aggregator::Aggregator,
    support::{Agent, Upstream, eventually},
};

type Body = BoxBody<Bytes, Infallible>;

/// An application that speaks HTTP/2: echoes bodies, with the trailers that the request asks for.
struct Application {
    runtime: Runtime,
    address: SocketAddr,
    waits: Arc<Waits>,
}

/// Where an answer waits.
#[derive(Debug, Default)]
struct Waits {
    /// A request has come that is not answered yet, or never.
    hangs: Notify,
    /// It is to be answered now.
    goes_on: Notify,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

impl Application {
    fn start() -> Self {
        let runtime = runtime();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let waits = Arc::new(Waits::default());
        let waiting = waits.clone();
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let waiting = waiting.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(request, waiting.clone()));
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                        .ok();
                });
            }
        });
        Self {
            runtime,
            address,
            waits,
        }
    }

    fn client(&self, agent: &Agent) -> SendRequest<Body> {
        self.runtime.block_on(connect(agent))
    }

    fn call(&self, client: &mut SendRequest<Body>, request: Request<Body>) -> Result<Answer, hyper::Error> {
        self.runtime.block_on(ask(client, request))
    }
}

async fn ask(client: &mut SendRequest<Body>, request: Request<Body>) -> Result<Answer, hyper::Error> {
    let (head, body) = client.send_request(request).await?.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().cloned();
    Ok(Answer {
        head,
        body: body.to_bytes(),
        trailers,
    })
}

#[derive(Debug)]
struct Answer {
    head: http::response::Parts,
    body: Bytes,
    trailers: Option<HeaderMap>,
}

async fn connect(agent: &Agent) -> SendRequest<Body> {
    let stream = TcpStream::connect(agent.address).await.unwrap();
    let (client, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

async fn answer(request: Request<Incoming>, waits: Arc<Waits>) -> Result<Response<Body>, h2::Error> {
    let mut response = Response::builder()
        .status(
            request
                .headers()
                .get("want-status")
                .map_or("200", |v| v.to_str().unwrap()),
        )
        .header("x-uri", request.uri().to_string());
    match request.uri().path() {
        "/reset" => return Err(h2::Reason::ENHANCE_YOUR_CALM.into()),
        "/hang" => {
            waits.hangs.notify_one();
            std::future::pending::<()>().await;
        }
        "/wait" => {
            waits.hangs.notify_one();
            waits.goes_on.notified().await;
        }
        "/trailers-only" => {
            response = response.header("grpc-status", "5");
            return Ok(response.body(Empty::new().boxed()).unwrap());
        }
        _ => {}
    }
    let wanted = request.headers().get("want-grpc-status").cloned();
    let (data, incoming) = {
        let collected = request.into_body().collect().await.unwrap();
        (collected.trailers().cloned(), collected.to_bytes())
    };
    let mut trailers = data.unwrap_or_default();
    if let Some(status) = wanted {
        trailers.insert("grpc-status", status);
    }
    let body =
        Full::new(incoming).with_trailers(async move { (!trailers.is_empty()).then_some(Ok(trailers)) });
    Ok(response.body(body.boxed()).unwrap())
}

fn request(path: &str, headers: &[(&str, &str)], body: &'static [u8]) -> Request<Body> {
    let mut request = Request::post(format!("http://shop.example.com{path}")).header("x-tenant", "acme");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::from(body).boxed()).unwrap()
}

const GRPC: (&str, &str) = ("content-type", "application/grpc+proto");

#[test]
fn bodies_and_trailers_pass_and_grpc_status_counts() {
    let application = Application::start();
    let agent = Agent::start(application.address);
    let mut client = application.client(&agent);
    let answer = application
        .call(&mut client, request("/x?q=1", &[], b"hello"))
        .unwrap();
    assert_eq!(
        (answer.head.status, &answer.body[..]),
        (StatusCode::OK, &b"hello"[..])
    );
    assert_eq!(answer.head.headers["x-uri"], "http://shop.example.com/x?q=1");
    for (status, count) in [("0", 1), ("14", 1), ("5", 1), ("14", 2)] {
        let headers = [GRPC, ("want-grpc-status", status), ("te", "trailers")];
        let answer = application
            .call(&mut client, request("/shop.Cart/Add", &headers, b"proto"))
            .unwrap();
        assert_eq!(answer.trailers.unwrap()["grpc-status"], status);
        if status == "14" {
            agent.expect("requests_total{outcome=\"server_error\"}", count);
        }
    }
    let only = application
        .call(&mut client, request("/trailers-only", &[GRPC], b""))
        .unwrap();
    assert_eq!(only.head.headers["grpc-status"], "5");
    application
        .call(&mut client, request("/", &[("want-status", "503")], b""))
        .unwrap();
    agent.expect("requests_total{outcome=\"success\"}", 2);
    agent.expect("requests_total{outcome=\"client_error\"}", 2);
    agent.expect("requests_total{outcome=\"server_error\"}", 3);
    agent.expect("tenants", 1);
    agent.expect("in_flight_requests", 0);
}

#[test]
fn request_trailers_and_large_bodies_pass() {
    let application = Application::start();
    let agent = Agent::start(application.address);
    let mut client = application.client(&agent);
    let large = vec![b'x'; 5 << 20];
    let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("checksum"), "1".parse().unwrap())]);
    let body = Full::from(large).with_trailers(async move { Some(Ok(trailers)) });
    let request = Request::post("http://h/").body(body.boxed()).unwrap();
    let answer = application.call(&mut client, request).unwrap();
    assert_eq!(answer.body.len(), 5 << 20);
    assert_eq!(answer.trailers.unwrap()["checksum"], "1");
    agent.expect("requests_total{outcome=\"success\"}", 1);
}

#[test]
fn resets_are_passed_on_stream_by_stream() {
    let application = Application::start();
    let agent = Agent::start(application.address);
    let mut client = application.client(&agent);
    let error = application
        .call(&mut client, request("/reset", &[], b""))
        .unwrap_err();
    assert_eq!(reason(&error), Some(h2::Reason::ENHANCE_YOUR_CALM));
    agent.expect("requests_total{outcome=\"upstream_reset\"}", 1);
    let answer = application.call(&mut client, request("/", &[], b"on")).unwrap();
    assert_eq!(&answer.body[..], b"on");
    application.runtime.block_on(async {
        let hanging = tokio::spawn(client.send_request(request("/hang", &[], b"")));
        application.waits.hangs.notified().await;
        hanging.abort();
    });
    agent.expect("requests_total{outcome=\"client_abort\"}", 1);
    agent.expect("connections", 1);
}

#[test]
fn without_an_application_the_client_is_reset() {
    let closed = Upstream::new().address();
    let agent = Agent::start(closed);
    let runtime = runtime();
    let error = runtime.block_on(async {
        let mut client = connect(&agent).await;
        client.send_request(request("/", &[], b"")).await.unwrap_err()
    });
    assert_eq!(reason(&error), None, "no answer is made up");
    agent.expect("requests_total{outcome=\"connect_failure\"}", 1);
    agent.expect("tenants", 1);
}

#[test]
fn stopping_ends_connections_without_streams() {
    let application = Application::start();
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(application.address, |config| config.aggregator = aggregator.url());
    let mut client = application.client(&agent);
    application.call(&mut client, request("/", &[], b"")).unwrap();
    agent.stop();
    agent.join();
    assert_eq!(aggregator.told().requests["acme"], 1);
    eventually("the client knows", || client.is_closed());
}

#[test]
fn stopping_waits_for_streams() {
    let application = Application::start();
    let aggregator = Aggregator::start();
    let mut agent = Agent::with(application.address, |config| config.aggregator = aggregator.url());
    let client = application.client(&agent);
    let mut asking = client.clone();
    let asked = application.runtime.spawn(async move {
        let request = request("/wait", &[], b"at last");
        ask(&mut asking, request).await
    });
    let waits = application.waits.clone();
    application.runtime.block_on(waits.hangs.notified());
    agent.stop();
    eventually("not ready", || agent.get("/readyz").0 == 503);
    assert!(!asked.is_finished() && !client.is_closed());
    waits.goes_on.notify_one();
    let answer = application.runtime.block_on(asked).unwrap().unwrap();
    assert_eq!(
        (answer.head.status, &answer.body[..]),
        (StatusCode::OK, &b"at last"[..])
    );
    // The client keeps its connection: it is the agent that ends it.
    agent.join();
    eventually("the client knows", || client.is_closed());
    assert_eq!(aggregator.told().requests["acme"], 1);
}

fn reason(error: &hyper::Error) -> Option<h2::Reason> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<h2::Error>()?.reason()
}
