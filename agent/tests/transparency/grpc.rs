//! gRPC and HTTP/2 between real clients and servers, compared by what they say.

use std::{future::poll_fn, net::SocketAddr, pin::Pin, sync::Arc};

use bytes::Bytes;
use coalmine_proto::{
    names::Outcome::{self, ClientAbort, ClientError, ServerError, Success, UpstreamReset},
    v1::{
        self, AgentMessage, AggregatorMessage, agent_message, aggregator_message,
        telemetry_client::TelemetryClient,
        telemetry_server::{Telemetry, TelemetryServer},
    },
};
use h2::{Reason, RecvStream, client::SendRequest, server::SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Status, Streaming, transport::Endpoint};

use crate::{
    messages::filling,
    stage::{Counted, Stage},
    support::PATIENCE,
};

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn listen(runtime: &Runtime) -> (TcpListener, SocketAddr) {
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Waits for the end of a conversation, but not for ever.
fn within<T>(runtime: &Runtime, conversation: impl Future<Output = T>) -> T {
    runtime
        .block_on(async { timeout(PATIENCE, conversation).await })
        .unwrap()
}

/// As many requests as are listed.
fn counted(requests: &[(&str, Outcome, u64)]) -> Counted {
    requests
        .iter()
        .map(|(tenant, outcome, count)| (((*tenant).to_owned(), *outcome), *count))
        .collect()
}

#[track_caller]
fn finish(stage: Stage, connections: u64, expected: &Counted) {
    let counts = stage.finish(connections).unwrap();
    assert_eq!((&counts.counted, counts.opaque.len()), (expected, 0));
}

// === a bidirectional stream ===

/// Answers each message with one, and ends as it is told.
struct Echo;

#[tonic::async_trait]
impl Telemetry for Echo {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<AggregatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: tonic::Request<Streaming<AgentMessage>>,
    ) -> Result<tonic::Response<Self::SessionStream>, Status> {
        if request.metadata().contains_key("x-refuse") {
            return Err(Status::not_found("no such session"));
        }
        let (answers, stream) = mpsc::channel(4);
        let mut inbound = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                let answer = echo(message);
                let is_last = answer.is_err();
                if answers.send(answer).await.is_err() || is_last {
                    return;
                }
            }
        });
        Ok(tonic::Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn echo(message: AgentMessage) -> Result<AggregatorMessage, Status> {
    let kind = match message.kind {
        Some(agent_message::Kind::Batch(batch)) => aggregator_message::Kind::Ack(v1::Ack {
            received_seq: batch.seq,
            durable_seq: batch.names.len() as u64,
        }),
        Some(agent_message::Kind::Bye(bye)) => aggregator_message::Kind::Reject(v1::Reject {
            reason: bye.reason,
            retry_after_ms: 7,
        }),
        _ => return Err(Status::unavailable("told to fail")),
    };
    Ok(AggregatorMessage { kind: Some(kind) })
}

fn batch(seq: u64, names: u32) -> AgentMessage {
    let names = (0..names).map(|number| v1::TenantName {
        r#ref: number,
        name: format!("tenant-{number}"),
    });
    AgentMessage {
        kind: Some(agent_message::Kind::Batch(v1::WindowBatch {
            seq,
            names: names.collect(),
            ..Default::default()
        })),
    }
}

fn bye(bytes: usize) -> AgentMessage {
    let reason = "x".repeat(bytes);
    AgentMessage {
        kind: Some(agent_message::Kind::Bye(v1::Bye { last_seq: 1, reason })),
    }
}

/// One call: each message is sent when the one before was answered.
async fn call(address: SocketAddr, tenant: &str, refuse: bool, messages: Vec<AgentMessage>) -> Vec<String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut client = TelemetryClient::new(endpoint.connect().await.unwrap());
    let (sender, receiver) = mpsc::channel(1);
    let mut request = tonic::Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("x-tenant", tenant.parse().unwrap());
    if refuse {
        request.metadata_mut().insert("x-refuse", "1".parse().unwrap());
    }
    let mut heard = Vec::new();
    let told = |status: &Status| format!("{:?}: {}", status.code(), status.message());
    let mut inbound = match client.session(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return vec![told(&status)],
    };
    for message in messages {
        sender.send(message).await.unwrap();
        match inbound.message().await {
            Ok(Some(answer)) => heard.push(format!("{answer:?}")),
            Ok(None) => heard.push("the end".to_owned()),
            Err(status) => {
                heard.push(told(&status));
                return heard;
            }
        }
    }
    drop(sender);
    match inbound.message().await {
        Ok(None) => heard.push("the end".to_owned()),
        other => heard.push(format!("{other:?}")),
    }
    heard
}

#[test]
fn a_bidirectional_stream_says_the_same() {
    let runtime = runtime();
    let (listener, address) = listen(&runtime);
    let server = tonic::transport::Server::builder().add_service(TelemetryServer::new(Echo));
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let fails = AgentMessage { kind: None };
    let calls = [
        (
            "a",
            false,
            vec![batch(1, 0), batch(2, 20), batch(3, 20_000), bye(200_000), bye(0)],
        ),
        ("b", false, vec![batch(1, 1), fails]),
        ("c", true, Vec::new()),
        ("d", false, Vec::new()),
    ];
    let stage = Stage::new(address);
    for (tenant, refuse, messages) in calls {
        let direct = within(&runtime, call(address, tenant, refuse, messages.clone()));
        let through = within(&runtime, call(stage.address(), tenant, refuse, messages));
        assert_eq!(through, direct, "{tenant}");
    }
    let expected = [
        ("a", Success, 1),
        ("b", ServerError, 1),
        ("c", ClientError, 1),
        ("d", Success, 1),
    ];
    finish(stage, 4, &counted(&expected));
}

// === calls with one message ===

/// A server that answers with what it got, and ends as the path says.
async fn serve(listener: TcpListener, hangs: Arc<Notify>) {
    while let Ok((stream, _)) = listener.accept().await {
        let hangs = hangs.clone();
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(respond_to(request, respond, hangs.clone()));
            }
        });
    }
}

async fn respond_to(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, hangs: Arc<Notify>) {
    let (head, mut incoming) = request.into_parts();
    match head.uri.path() {
        "/reset" => return respond.send_reset(Reason::ENHANCE_YOUR_CALM),
        "/hang" => {
            hangs.notify_one();
            // The client's reset ends it.
            poll_fn(|cx| respond.poll_reset(cx)).await.ok();
            return;
        }
        _ => {}
    }
    let Ok((body, trailers)) = collect(&mut incoming).await else {
        return;
    };
    let wanted = |name: &str| head.headers.get(name).cloned();
    let status: u16 = wanted("want-status").map_or(200, |status| status.to_str().unwrap().parse().unwrap());
    let mut response = Response::builder().status(status);
    for name in ["content-type", "want-grpc-status"] {
        if let Some(value) = wanted(name) {
            response = response.header(name, value);
        }
    }
    let mut sending = respond.send_response(response.body(()).unwrap(), false).unwrap();
    sending.send_data(body, false).unwrap();
    let mut trailers = trailers.unwrap_or_default();
    if let Some(status) = wanted("want-grpc-status") {
        trailers.insert("grpc-status", status);
    }
    sending.send_trailers(trailers).unwrap();
}

async fn collect(incoming: &mut RecvStream) -> Result<(Bytes, Option<HeaderMap>), h2::Error> {
    let mut body = Vec::new();
    while let Some(piece) = incoming.data().await {
        let piece = piece?;
        incoming.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    let trailers = incoming.trailers().await?;
    Ok((body.into(), trailers))
}

async fn open(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    client
}

/// What a client asks for.
#[derive(Clone)]
struct Ask {
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    bytes: usize,
}

impl Ask {
    fn request(&self, tenant: &'static str) -> Request<()> {
        let mut request = Request::post(format!("http://shop.example.com{}", self.path));
        request = request.header("x-tenant", tenant);
        for (name, value) in self.headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }
}

/// Asks on a connection, and tells what came of it.
async fn ask(client: SendRequest<Bytes>, ask: &Ask) -> Vec<String> {
    match try_asking(client, ask).await {
        Ok(heard) => heard,
        Err(error) => vec![format!("{:?}", error.reason())],
    }
}

async fn try_asking(client: SendRequest<Bytes>, ask: &Ask) -> Result<Vec<String>, h2::Error> {
    let mut client = client.ready().await?;
    // A reset may come before a body could be sent.
    let is_whole = ask.path == "/reset";
    let (response, mut sending) = client.send_request(ask.request("a"), is_whole)?;
    if !is_whole {
        sending.send_data(filling(ask.bytes).into(), false)?;
        let trailer = (HeaderName::from_static("checksum"), HeaderValue::from_static("1"));
        sending.send_trailers(HeaderMap::from_iter([trailer]))?;
    }
    let (head, mut incoming) = response.await?.into_parts();
    let (body, trailers) = collect(&mut incoming).await?;
    let mut heard = vec![format!("{} {:?}", head.status, head.version)];
    heard.extend(lines(&head.headers));
    let is_same = body == filling(ask.bytes);
    heard.push(format!("{} bytes, the same: {is_same}", body.len()));
    heard.extend(lines(&trailers.unwrap_or_default()));
    Ok(heard)
}

fn lines(headers: &HeaderMap) -> Vec<String> {
    let mut lines: Vec<String> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value:?}"))
        .collect();
    lines.sort_unstable();
    lines
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");

#[test]
fn calls_with_trailers_in_both_directions_say_the_same() {
    let asks: [(Ask, Outcome); 8] = [
        (
            Ask {
                path: "/",
                headers: &[],
                bytes: 5,
            },
            Success,
        ),
        (
            Ask {
                path: "/large",
                headers: &[],
                bytes: 3 << 20,
            },
            Success,
        ),
        (
            Ask {
                path: "/",
                headers: &[("want-status", "503")],
                bytes: 0,
            },
            ServerError,
        ),
        (
            Ask {
                path: "/s/m",
                headers: &[GRPC, ("want-grpc-status", "0")],
                bytes: 99,
            },
            Success,
        ),
        (
            Ask {
                path: "/s/m",
                headers: &[GRPC, ("want-grpc-status", "5")],
                bytes: 99,
            },
            ClientError,
        ),
        (
            Ask {
                path: "/s/m",
                headers: &[GRPC, ("want-grpc-status", "14")],
                bytes: 70_000,
            },
            ServerError,
        ),
        (
            Ask {
                path: "/s/m",
                headers: &[GRPC],
                bytes: 9,
            },
            ServerError,
        ),
        (
            Ask {
                path: "/reset",
                headers: &[],
                bytes: 9,
            },
            UpstreamReset,
        ),
    ];
    let runtime = runtime();
    let (listener, address) = listen(&runtime);
    runtime.spawn(serve(listener, Arc::new(Notify::new())));
    let stage = Stage::new(address);
    let direct = within(&runtime, open(address));
    let through = within(&runtime, open(stage.address()));
    let mut expected = Counted::new();
    // Twice, so that the second time nearly all fields are indexed.
    for (wanted, outcome) in asks.iter().chain(&asks) {
        let directly = within(&runtime, ask(direct.clone(), wanted));
        assert_eq!(
            within(&runtime, ask(through.clone(), wanted)),
            directly,
            "{}",
            wanted.path
        );
        *expected.entry(("a".to_owned(), *outcome)).or_default() += 1;
    }
    drop(through);
    finish(stage, 1, &expected);
}

#[test]
fn many_streams_at_a_time_say_the_same() {
    let runtime = runtime();
    let (listener, address) = listen(&runtime);
    runtime.spawn(serve(listener, Arc::new(Notify::new())));
    let stage = Stage::new(address);
    let wanted = Ask {
        path: "/s/m",
        headers: &[GRPC, ("want-grpc-status", "0")],
        bytes: 20_000,
    };
    let all = |address| {
        let wanted = wanted.clone();
        async move {
            let client = open(address).await;
            let mut asking = Vec::new();
            for _ in 0..50 {
                let (client, wanted) = (client.clone(), wanted.clone());
                asking.push(tokio::spawn(async move { ask(client, &wanted).await }));
            }
            let mut heard = Vec::new();
            for asked in asking {
                heard.push(asked.await.unwrap());
            }
            heard
        }
    };
    let direct = within(&runtime, all(address));
    assert_eq!(within(&runtime, all(stage.address())), direct);
    finish(stage, 1, &counted(&[("a", Success, 50)]));
}

#[test]
fn a_client_that_cancels_is_no_fault_of_the_service() {
    let runtime = runtime();
    let (listener, address) = listen(&runtime);
    let hangs = Arc::new(Notify::new());
    runtime.spawn(serve(listener, hangs.clone()));
    let stage = Stage::new(address);
    let hang = Ask {
        path: "/hang",
        headers: &[GRPC],
        bytes: 0,
    };
    let next = Ask {
        path: "/s/m",
        headers: &[GRPC, ("want-grpc-status", "0")],
        bytes: 1,
    };
    within(&runtime, async {
        let client = open(stage.address()).await;
        let mut ready = client.clone().ready().await.unwrap();
        let (response, mut sending) = ready.send_request(hang.request("b"), true).unwrap();
        hangs.notified().await;
        sending.send_reset(Reason::CANCEL);
        assert!(response.await.is_err());
        let heard = ask(client, &next).await;
        assert!(heard.iter().any(|line| line == "grpc-status: \"0\""), "{heard:?}");
    });
    stage
        .agent()
        .expect("requests_total{outcome=\"client_abort\"}", 1);
    finish(stage, 1, &counted(&[("a", Success, 1), ("b", ClientAbort, 1)]));
}
