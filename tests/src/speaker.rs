//! An agent made by hand: it speaks the protocol of the real one, and remembers exactly what it has counted.
//!
//! No application is behind it; a test says what was counted in each window. Like the real agent it keeps every window
//! until the aggregator has it on disk, and sends again from there when a connection was lost. It holds the aggregator
//! to what was acknowledged: one that has forgotten durable windows, or refuses a batch, fails the test.

use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use coalmine_proto::{
    PROTOCOL,
    names::{Arm, Outcome, Outcomes},
    v1::{
        AgentMessage, AggregatorMessage, Bye, Hello, TenantName, TenantRow, Totals, WindowBatch,
        agent_message::Kind, aggregator_message::Kind as Answer, telemetry_client::TelemetryClient,
    },
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Endpoint};

use crate::components::Counts;

/// How long the aggregator may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(20);

/// Messages on their way into a session; more than an agent may send ahead.
const QUEUE: usize = 64;

/// Milliseconds since the Unix epoch.
///
/// # Panics
/// When the clock is before that.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.expect("the clock is set").as_millis();
    u64::try_from(now).expect("milliseconds fit")
}

/// An agent. A copy holds the same windows and has no session.
#[derive(Debug)]
pub struct Speaker {
    service: String,
    instance: String,
    arm: Arm,
    epoch: u64,
    /// A row's tenant is a place in this list.
    tenants: Vec<String>,
    made: Counts,
    sums: Totals,
    /// Windows that are not durable yet, oldest first, without the names that they need.
    kept: VecDeque<WindowBatch>,
    next_seq: u64,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    outbound: mpsc::Sender<AgentMessage>,
    inbound: Streaming<AggregatorMessage>,
    /// Tenants whose names this session knows.
    named: BTreeSet<u32>,
    sent_seq: u64,
    max_unacked: u64,
}

impl Clone for Speaker {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            instance: self.instance.clone(),
            arm: self.arm,
            epoch: self.epoch,
            tenants: self.tenants.clone(),
            made: self.made.clone(),
            sums: self.sums,
            kept: self.kept.clone(),
            next_seq: self.next_seq,
            session: None,
        }
    }
}

impl Speaker {
    /// An agent of one life, that has counted nothing. The canary is of version v2, the baseline of v1.
    pub fn new(service: &str, instance: &str, arm: Arm, tenants: impl IntoIterator<Item = String>) -> Self {
        Self {
            service: service.to_owned(),
            instance: instance.to_owned(),
            arm,
            epoch: now_ms(),
            tenants: tenants.into_iter().collect(),
            made: Counts::default(),
            sums: Totals::default(),
            kept: VecDeque::new(),
            next_seq: 1,
            session: None,
        }
    }

    /// Its arm.
    pub fn arm(&self) -> Arm {
        self.arm
    }

    /// All that it has counted since it began.
    pub fn made(&self) -> &Counts {
        &self.made
    }

    /// How many windows the aggregator has acknowledged as durable.
    pub fn durable(&self) -> u64 {
        self.last_seq() - self.kept.len() as u64
    }

    /// Whether every window is durable.
    pub fn is_settled(&self) -> bool {
        self.kept.is_empty()
    }

    fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    /// Closes a window: what was counted in it is due to the aggregator from now on.
    ///
    /// # Panics
    /// When a row is of a tenant that is not in the list.
    pub fn count(&mut self, start_ms: u64, length_ms: u32, rows: Vec<TenantRow>) {
        for row in &rows {
            let outcomes = Outcomes::from_row(row);
            self.sums.requests += outcomes.seen();
            self.sums.errors += outcomes.errors();
            let tenant = self
                .tenants
                .get(row.tenant as usize)
                .expect("a tenant of the list");
            for outcome in Outcome::ALL {
                let count = outcomes.get(outcome);
                if count > 0 {
                    let (arm, outcome) = (self.arm.as_str(), outcome.as_str());
                    let key = (arm.to_owned(), tenant.clone(), outcome.to_owned());
                    *self.made.0.entry(key).or_insert(0) += count;
                }
            }
        }
        self.kept.push_back(WindowBatch {
            seq: self.next_seq,
            start_unix_ms: start_ms,
            length_ms,
            rows,
            cumulative: Some(self.sums),
            ..WindowBatch::default()
        });
        self.next_seq += 1;
    }

    /// One turn: connects if there is no session, sends what may be sent, and listens for one answer, no longer than
    /// `listen`. After an error the next turn connects anew.
    pub async fn turn(&mut self, aggregator: SocketAddr, listen: Duration) -> anyhow::Result<()> {
        let talked = self.talk(aggregator, listen).await;
        if talked.is_err() {
            self.session = None;
        }
        talked
    }

    /// Takes turns until every window is durable, through however many sessions that takes.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    pub async fn flush(&mut self, aggregator: SocketAddr, limit: Duration) {
        let mut trouble = None;
        let flushed = timeout(limit, async {
            while !self.is_settled() {
                if let Err(error) = self.turn(aggregator, PATIENCE).await {
                    trouble = Some(error);
                    sleep(PAUSE).await;
                }
            }
        });
        let in_time = flushed.await.is_ok();
        assert!(
            in_time,
            "{}: not durable within {} s: {} windows; the last trouble: {trouble:?}",
            self.instance,
            limit.as_secs(),
            self.kept.len()
        );
    }

    /// Ends in order; returns when the aggregator has stored that.
    pub async fn bye(&mut self) -> anyhow::Result<()> {
        let last_seq = self.last_seq();
        let mut session = self.session.take().context("there is no session")?;
        let bye = Bye {
            last_seq,
            reason: "the test is over".to_owned(),
        };
        session.outbound.send(message(Kind::Bye(bye))).await?;
        while timeout(PATIENCE, session.inbound.message()).await??.is_some() {}
        Ok(())
    }

    async fn talk(&mut self, aggregator: SocketAddr, listen: Duration) -> anyhow::Result<()> {
        if self.session.is_none() {
            self.connect(aggregator).await?;
        }
        self.send().await?;
        // Nothing to be heard for a while is no error.
        timeout(listen, self.hear()).await.unwrap_or(Ok(()))
    }

    async fn connect(&mut self, aggregator: SocketAddr) -> anyhow::Result<()> {
        let endpoint = Endpoint::from_shared(format!("http://{aggregator}"))?.tcp_nodelay(true);
        let channel = timeout(PATIENCE, endpoint.connect()).await??;
        let (outbound, messages) = mpsc::channel(QUEUE);
        let hello = Hello {
            protocol: PROTOCOL,
            instance: self.instance.clone(),
            epoch: self.epoch,
            service: self.service.clone(),
            version: if self.arm == Arm::Canary { "v2" } else { "v1" }.to_owned(),
            arm: self.arm.to_wire().into(),
            oldest_seq: self.kept.front().map_or(0, |batch| batch.seq),
            next_seq: self.next_seq,
            now_unix_ms: now_ms(),
            ..Hello::default()
        };
        outbound.send(message(Kind::Hello(hello))).await?;
        let mut client = TelemetryClient::new(channel);
        let session = client.session(ReceiverStream::new(messages));
        let mut inbound = timeout(PATIENCE, session).await??.into_inner();
        let first = timeout(PATIENCE, inbound.message()).await??;
        let ack = match first.and_then(|first| first.kind) {
            Some(Answer::HelloAck(ack)) => ack,
            // Such as when the Hello waited for an aggregator that was still starting, and its time is too old.
            other => bail!("the aggregator answers Hello with {other:?}"),
        };
        self.settle(ack.durable_seq);
        self.session = Some(Session {
            outbound,
            inbound,
            named: BTreeSet::new(),
            sent_seq: ack.durable_seq,
            max_unacked: u64::from(ack.max_unacked).max(1),
        });
        Ok(())
    }

    /// Forgets what is on disk over there.
    fn settle(&mut self, durable_seq: u64) {
        let (before, last) = (self.durable(), self.last_seq());
        assert!(
            (before..=last).contains(&durable_seq),
            "{}: the aggregator says that {durable_seq} windows are durable; {before} were acknowledged and {last} made",
            self.instance
        );
        while self.durable() < durable_seq {
            self.kept.pop_front();
        }
    }

    /// Sends what may be sent ahead of the acknowledgements.
    async fn send(&mut self) -> anyhow::Result<()> {
        let (durable, last) = (self.durable(), self.last_seq());
        let session = self.session.as_mut().context("there is no session")?;
        while session.sent_seq < last && session.sent_seq - durable < session.max_unacked {
            let place = usize::try_from(session.sent_seq - durable)?;
            let mut batch = self.kept.get(place).context("the window is gone")?.clone();
            for row in &batch.rows {
                if session.named.insert(row.tenant) {
                    batch.names.push(TenantName {
                        r#ref: row.tenant,
                        name: self.tenants.get(row.tenant as usize).cloned().unwrap_or_default(),
                    });
                }
            }
            let sent = session.outbound.send(message(Kind::Batch(batch)));
            sent.await.ok().context("the session is over")?;
            session.sent_seq += 1;
        }
        Ok(())
    }

    /// Hears the next answer.
    async fn hear(&mut self) -> anyhow::Result<()> {
        let session = self.session.as_mut().context("there is no session")?;
        let heard = session.inbound.message().await;
        if let Err(status) = &heard {
            // That is what a batch is refused with, and none of ours is wrong.
            assert_ne!(
                status.code(),
                Code::FailedPrecondition,
                "{}: {status}",
                self.instance
            );
        }
        match heard?.and_then(|heard| heard.kind) {
            Some(Answer::Ack(ack)) => self.settle(ack.durable_seq.max(self.durable())),
            Some(Answer::Config(_)) => {}
            other => bail!("the aggregator said {other:?}"),
        }
        Ok(())
    }
}

fn message(kind: Kind) -> AgentMessage {
    AgentMessage { kind: Some(kind) }
}
