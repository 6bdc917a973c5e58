//! One agent's session, as far as the bench needs it: sends windows no faster than they become durable.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use coalmine_proto::{
    PROTOCOL,
    names::Arm,
    v1::{
        AgentMessage, AggregatorMessage, Hello, TenantName, Totals, WindowBatch, agent_message,
        aggregator_message, telemetry_client::TelemetryClient,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{Made, TENANTS};
use crate::{aggregator::SERVICE, sample::tenant};

/// How long an acknowledgement may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The windows are of the past, so that the book lets go of them as it would.
const AGE_MS: u64 = 24 * 3_600_000;

const WINDOW_MS: u32 = 1_000;

#[derive(Debug)]
pub(super) struct Session {
    outbound: mpsc::Sender<AgentMessage>,
    inbound: Streaming<AggregatorMessage>,
    made: Arc<[Made]>,
    max_unacked: u64,
    start_ms: u64,
    seq: u64,
    durable: u64,
    sums: Totals,
}

impl Session {
    pub(super) async fn open(
        aggregator: SocketAddr,
        number: usize,
        arm: Arm,
        made: Arc<[Made]>,
    ) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{aggregator}"))?.tcp_nodelay(true);
        let channel = timeout(PATIENCE, endpoint.connect()).await??;
        let (outbound, messages) = mpsc::channel(64);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let now_ms = now.as_millis() as u64;
        let hello = Hello {
            protocol: PROTOCOL,
            instance: format!("bench-{number}"),
            epoch: 1 + number as u64,
            service: SERVICE.to_owned(),
            version: format!("{arm}-1"),
            arm: arm.to_wire().into(),
            next_seq: 1,
            window_ms: WINDOW_MS,
            now_unix_ms: now_ms,
            ..Hello::default()
        };
        outbound.send(message(agent_message::Kind::Hello(hello))).await?;
        let mut client = TelemetryClient::new(channel);
        let session = client.session(ReceiverStream::new(messages));
        let mut inbound = timeout(PATIENCE, session).await??.into_inner();
        let first = timeout(PATIENCE, inbound.message()).await??;
        let Some(aggregator_message::Kind::HelloAck(ack)) = first.and_then(|first| first.kind) else {
            bail!("the aggregator does not answer Hello with HelloAck");
        };
        Ok(Self {
            outbound,
            inbound,
            made,
            max_unacked: u64::from(ack.max_unacked).max(1),
            start_ms: now_ms - AGE_MS,
            seq: 0,
            durable: 0,
            sums: Totals::default(),
        })
    }

    /// Sends for a while, then waits until all is durable; gives the number of batches.
    pub(super) async fn run(mut self, until: Instant) -> anyhow::Result<(Self, u64)> {
        let first = self.seq;
        loop {
            while self.seq - self.durable < self.max_unacked && Instant::now() < until {
                let batch = self.next();
                let sent = self.outbound.send(message(agent_message::Kind::Batch(batch)));
                sent.await.context("the session is over")?;
            }
            if self.seq == self.durable {
                let batches = self.seq - first;
                return Ok((self, batches));
            }
            let heard = timeout(PATIENCE, self.inbound.message()).await;
            match heard.context("no acknowledgement")??.and_then(|heard| heard.kind) {
                Some(aggregator_message::Kind::Ack(ack)) => {
                    self.durable = self.durable.max(ack.durable_seq);
                }
                Some(aggregator_message::Kind::Config(_)) => {}
                other => bail!("the aggregator said {other:?}"),
            }
        }
    }

    fn next(&mut self) -> WindowBatch {
        let made = &self.made[self.seq as usize % self.made.len()];
        let names = match self.seq {
            0 => (0..TENANTS).map(name).collect(),
            _ => Vec::new(),
        };
        self.seq += 1;
        self.sums.requests += made.sums.requests;
        self.sums.errors += made.sums.errors;
        WindowBatch {
            seq: self.seq,
            start_unix_ms: self.start_ms + self.seq * u64::from(WINDOW_MS),
            length_ms: WINDOW_MS,
            names,
            rows: made.rows.clone(),
            cumulative: Some(self.sums),
            ..WindowBatch::default()
        }
    }
}

fn message(kind: agent_message::Kind) -> AgentMessage {
    AgentMessage { kind: Some(kind) }
}

fn name(number: usize) -> TenantName {
    TenantName {
        r#ref: number as u32,
        name: tenant(number),
    }
}
