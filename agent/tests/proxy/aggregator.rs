//! An aggregator that does what the test says, and applies batches as the real one does.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

use coalmine_proto::{
    names::Outcomes,
    v1::{
        self, AgentMessage, AggregatorMessage, agent_message, aggregator_message,
        telemetry_server::{Telemetry, TelemetryServer},
    },
};
use tokio::{runtime::Builder, sync::mpsc, sync::oneshot};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

/// What the aggregator was told, and what it is to do.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) hellos: Vec<v1::Hello>,
    /// What was in `authorization`, of each session that was asked for.
    pub(crate) tokens: Vec<Option<String>>,
    /// Epochs of the only agent that are over: its last Hello, and requests by tenant.
    pub(crate) ended: Vec<(v1::Hello, BTreeMap<String, u64>)>,
    /// Batches that were applied in the present epoch. The counts that follow are of these.
    pub(crate) applied: Vec<v1::WindowBatch>,
    /// Requests by tenant.
    pub(crate) requests: BTreeMap<String, u64>,
    /// How they ended.
    pub(crate) outcomes: BTreeMap<String, Outcomes>,
    pub(crate) duplicates: u64,
    pub(crate) most_in_flight: u64,
    pub(crate) config_applied: Vec<u64>,
    pub(crate) bye: Option<v1::Bye>,
    /// Say that batches are durable.
    pub(crate) acknowledges: bool,
    /// Break the session after so many batches, once.
    pub(crate) breaks_after: Option<usize>,
    /// Ask for another session after so many batches, once.
    pub(crate) drains_after: Option<usize>,
    /// Send this after HelloAck; when it is replaced by a newer version, after the next batch.
    pub(crate) config: Option<v1::Config>,
    /// Refuse so many sessions.
    pub(crate) rejects: u32,
    /// Do not believe so many tokens.
    pub(crate) disbelieves: u32,
    pub(crate) max_unacked: u32,
    pub(crate) max_message_bytes: u32,
}

pub(crate) struct Aggregator {
    address: SocketAddr,
    told: Arc<Mutex<Told>>,
    stop: Option<oneshot::Sender<()>>,
}

/// What is known of one session.
#[derive(Debug, Default)]
struct Conversation {
    names: BTreeMap<u32, String>,
    batches: usize,
    /// Version of the configuration that was sent last.
    pushed: u64,
}

#[derive(Clone)]
struct Service(Arc<Mutex<Told>>);

impl Aggregator {
    pub(crate) fn start() -> Self {
        Self::on("127.0.0.1:0".parse().unwrap())
    }

    /// Where an aggregator may come to be later: a loopback address that nothing else here uses, so that the port stays
    /// free.
    pub(crate) fn free_address() -> SocketAddr {
        static GIVEN: AtomicU8 = AtomicU8::new(1);
        let address = [127, 0, 2, GIVEN.fetch_add(1, Ordering::Relaxed)];
        let listener = std::net::TcpListener::bind((Ipv4Addr::from(address), 0)).unwrap();
        listener.local_addr().unwrap()
    }

    pub(crate) fn on(address: SocketAddr) -> Self {
        let told = Arc::new(Mutex::new(Told {
            hellos: Vec::new(),
            tokens: Vec::new(),
            ended: Vec::new(),
            applied: Vec::new(),
            requests: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            duplicates: 0,
            most_in_flight: 0,
            config_applied: Vec::new(),
            bye: None,
            acknowledges: true,
            breaks_after: None,
            drains_after: None,
            config: None,
            rejects: 0,
            disbelieves: 0,
            max_unacked: 8,
            max_message_bytes: 0,
        }));
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = TelemetryServer::new(Service(told.clone()));
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let server = tonic::transport::Server::builder().add_service(service);
                tokio::select! {
                    served = server.serve_with_incoming(TcpListenerStream::new(listener)) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self {
            address,
            told,
            stop: Some(stop),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }

    /// The last cumulative totals.
    pub(crate) fn totals(&self) -> v1::Totals {
        let told = self.told();
        told.applied
            .last()
            .and_then(|batch| batch.cumulative)
            .unwrap_or_default()
    }
}

impl Drop for Aggregator {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
    }
}

impl Told {
    fn durable(&self) -> u64 {
        self.applied.len() as u64
    }

    /// The configuration, if it is newer than the last that was sent.
    fn newer_config(&self, conversation: &mut Conversation) -> Option<aggregator_message::Kind> {
        let config = self.config.as_ref()?;
        if config.version <= conversation.pushed {
            return None;
        }
        conversation.pushed = config.version;
        Some(aggregator_message::Kind::Config(config.clone()))
    }

    /// An agent in another epoch begins anew.
    fn begin(&mut self, hello: &v1::Hello) {
        let before = self.hellos.last().filter(|last| last.epoch != hello.epoch);
        if let Some(before) = before.cloned() {
            self.applied.clear();
            self.outcomes.clear();
            self.ended.push((before, std::mem::take(&mut self.requests)));
        }
    }

    /// Applies a batch exactly once, and checks its checksum.
    fn apply(&mut self, batch: v1::WindowBatch, names: &mut BTreeMap<u32, String>) {
        for name in &batch.names {
            assert!(names.insert(name.r#ref, name.name.clone()).is_none());
        }
        if batch.seq <= self.durable() {
            self.duplicates += 1;
            return;
        }
        assert_eq!(batch.seq, self.durable() + 1, "numbers are contiguous");
        for row in &batch.rows {
            let (tenant, outcomes) = (&names[&row.tenant], Outcomes::from_row(row));
            *self.requests.entry(tenant.clone()).or_default() += outcomes.seen();
            self.outcomes.entry(tenant.clone()).or_default().add(&outcomes);
        }
        self.applied.push(batch);
        let (mut requests, mut gaps) = (self.requests.values().sum::<u64>(), 0);
        for gap in self.applied.iter().filter_map(|batch| batch.gap) {
            gaps += gap.requests;
        }
        requests += gaps;
        let cumulative = self.applied.last().unwrap().cumulative.unwrap();
        assert_eq!((cumulative.requests, cumulative.gap_requests), (requests, gaps));
    }
}

#[tonic::async_trait]
impl Telemetry for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<AggregatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let token = request.metadata().get("authorization");
        let token = token.map(|token| token.to_str().unwrap().to_owned());
        {
            let mut told = self.0.lock().unwrap();
            told.tokens.push(token);
            if told.disbelieves > 0 {
                told.disbelieves -= 1;
                return Err(Status::unauthenticated("another token is expected here"));
            }
        }
        let (answers, stream) = mpsc::channel(64);
        let told = self.0.clone();
        tokio::spawn(async move {
            if let Err(status) = converse(&told, request.into_inner(), &answers).await {
                answers.send(Err(status)).await.ok();
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

async fn converse(
    told: &Mutex<Told>,
    mut inbound: Streaming<AgentMessage>,
    answers: &mpsc::Sender<Result<AggregatorMessage, Status>>,
) -> Result<(), Status> {
    let mut conversation = Conversation::default();
    while let Some(message) = inbound.message().await? {
        for answer in hear(told, message, &mut conversation)? {
            let message = AggregatorMessage { kind: Some(answer) };
            answers.send(Ok(message)).await.ok();
        }
    }
    Ok(())
}

fn hear(
    told: &Mutex<Told>,
    message: AgentMessage,
    conversation: &mut Conversation,
) -> Result<Vec<aggregator_message::Kind>, Status> {
    let mut told = told.lock().unwrap();
    match message.kind.unwrap() {
        agent_message::Kind::Hello(hello) => {
            told.begin(&hello);
            told.hellos.push(hello);
            if told.rejects > 0 {
                told.rejects -= 1;
                let reason = "not expected here".to_owned();
                return Ok(vec![aggregator_message::Kind::Reject(v1::Reject {
                    reason,
                    retry_after_ms: 50,
                })]);
            }
            let mut answers = vec![aggregator_message::Kind::HelloAck(v1::HelloAck {
                durable_seq: told.durable(),
                max_unacked: told.max_unacked,
                max_message_bytes: told.max_message_bytes,
                now_unix_ms: 0,
            })];
            answers.extend(told.newer_config(conversation));
            Ok(answers)
        }
        agent_message::Kind::Batch(batch) => {
            let seq = batch.seq;
            conversation.batches += 1;
            let batches = conversation.batches;
            told.apply(batch, &mut conversation.names);
            told.most_in_flight = told.most_in_flight.max(batches as u64);
            if told.breaks_after.is_some_and(|after| batches >= after) {
                told.breaks_after = None;
                return Err(Status::unavailable("broken by the test"));
            }
            if told.drains_after.is_some_and(|after| batches >= after) {
                told.drains_after = None;
                let drain = aggregator_message::Kind::Drain(v1::Drain { within_ms: 10_000 });
                let ack = v1::Ack {
                    received_seq: seq,
                    durable_seq: seq,
                };
                return Ok(vec![drain, aggregator_message::Kind::Ack(ack)]);
            }
            let acknowledges = told.acknowledges && told.breaks_after.is_none();
            let durable_seq = if acknowledges { seq } else { 0 };
            let mut answers = vec![aggregator_message::Kind::Ack(v1::Ack {
                received_seq: seq,
                durable_seq,
            })];
            answers.extend(told.newer_config(conversation));
            Ok(answers)
        }
        agent_message::Kind::ConfigApplied(applied) => {
            told.config_applied.push(applied.version);
            Ok(Vec::new())
        }
        agent_message::Kind::Bye(bye) => {
            told.bye = Some(bye);
            Ok(Vec::new())
        }
    }
}
