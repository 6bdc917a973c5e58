//! One session: the messages between Hello and Bye.

use std::{collections::HashMap, error::Error, time::Duration};

use coalmine_proto::{
    PROTOCOL,
    names::TenantName,
    v1::{
        self, AgentMessage, AggregatorMessage, agent_message, aggregator_message,
        telemetry_client::TelemetryClient,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, transport::Endpoint};

use super::{Ended, Session, token};
use crate::{pool::PoolRow, recorder::Settings, ring::Batch, sealer};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the aggregator may take to answer Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Whatever the aggregator allows, no more batches than this are on their way.
const MAX_UNACKED: u64 = 64;

/// What an aggregator that does not say accepts.
const MESSAGE_BYTES: usize = 1 << 20;

/// The largest message that is read: the limits of a million tenants fit into it.
const MAX_DECODED: usize = 64 << 20;

/// Once a session has had more names than this many times --max-tenants, another follows, with none.
const MAX_NAMES: usize = 4;

/// The same with this many names, however many tenants there may be: the aggregator takes 200,000 in a session, and no
/// batch brings as many as are left.
const MOST_NAMES: usize = 100_000;

/// What one session knows.
struct State {
    outbound: mpsc::Sender<AgentMessage>,
    max_unacked: u64,
    max_bytes: usize,
    names: HashMap<TenantName, u32>,
    max_names: usize,
    /// Version of a Config that was not applied yet.
    wanted: Option<u64>,
    /// The aggregator is about to stop: until then the session may finish.
    drain: Option<Instant>,
}

impl State {
    /// Whether no more batches are sent in this session.
    fn is_ending(&self) -> bool {
        self.drain.is_some() || self.names.len() > self.max_names
    }
}

impl Session<'_> {
    /// Opens a session and keeps it until it ends.
    pub(super) async fn connect(&mut self) -> Ended {
        let ended = match self.open().await {
            Ok((state, inbound)) => {
                self.link.up();
                self.converse(state, inbound).await
            }
            Err(ended) => ended,
        };
        self.link.down();
        ended
    }

    async fn open(&mut self) -> Result<(State, Streaming<AggregatorMessage>), Ended> {
        let token = self.config.token_file.as_deref().map(token::read).transpose();
        let token = token.map_err(Ended::NoToken)?;
        let endpoint = Endpoint::from_shared(self.config.aggregator.clone())
            .map_err(|error| Ended::Lost(chain(&error)))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true);
        let dialling = (self.surroundings.dial)(endpoint);
        let channel = self.meanwhile(dialling).await.ok_or(Ended::TooLate)?;
        let channel = channel.map_err(|error| Ended::Lost(chain(&error)))?;
        let (outbound, messages) = mpsc::channel(MAX_UNACKED as usize + 8);
        say(&outbound, agent_message::Kind::Hello(self.hello()))?;
        let mut request = Request::new(ReceiverStream::new(messages));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        let opened = timeout(HELLO_TIMEOUT, async move {
            let mut client = TelemetryClient::new(channel).max_decoding_message_size(MAX_DECODED);
            let mut inbound = client.session(request).await?.into_inner();
            let first = inbound.message().await?;
            Ok::<_, Status>((first, inbound))
        });
        let (first, inbound) = match self.meanwhile(opened).await.ok_or(Ended::TooLate)? {
            Ok(opened) => opened.map_err(unopened)?,
            Err(_) => return Err(Ended::Lost("no answer to Hello".to_owned())),
        };
        let ack = match first.and_then(|message| message.kind) {
            Some(aggregator_message::Kind::HelloAck(ack)) => ack,
            Some(aggregator_message::Kind::Reject(reject)) => return Err(rejected(reject)),
            Some(_) => return Err(Ended::Lost("the answer to Hello is no HelloAck".to_owned())),
            None => return Err(Ended::Lost("the session ended after Hello".to_owned())),
        };
        self.greet(&ack)?;
        let state = State {
            outbound,
            max_unacked: u64::from(ack.max_unacked).clamp(1, MAX_UNACKED),
            max_bytes: match ack.max_message_bytes {
                0 => MESSAGE_BYTES,
                bytes => bytes as usize,
            },
            names: HashMap::new(),
            max_names: self.config.max_tenants.saturating_mul(MAX_NAMES).min(MOST_NAMES),
            wanted: None,
            drain: None,
        };
        Ok((state, inbound))
    }

    fn hello(&self) -> v1::Hello {
        let (config, build) = (self.config, self.ring.build());
        v1::Hello {
            protocol: PROTOCOL,
            instance: config.instance.clone(),
            epoch: self.epoch,
            service: config.service.clone(),
            version: build.version.clone(),
            arm: build.arm.to_wire().into(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            oldest_seq: self.ring.oldest_seq(),
            next_seq: self.ring.next_seq(),
            window_ms: u32::try_from(config.window.as_millis()).unwrap_or(u32::MAX),
            now_unix_ms: (self.surroundings.clock)(),
        }
    }

    fn greet(&mut self, ack: &v1::HelloAck) -> Result<(), Ended> {
        let held_from = self.ring.oldest_seq();
        if ack.durable_seq < self.ring.durable() {
            tracing::warn!(
                durable = ack.durable_seq,
                held_from,
                "the aggregator has lost batches that it had called durable"
            );
        }
        let resumed = self.ring.resume(ack.durable_seq);
        self.metrics.ring(&self.ring);
        resumed.map_err(|error| Ended::Lost(error.to_string()))
    }

    async fn converse(&mut self, mut state: State, mut inbound: Streaming<AggregatorMessage>) -> Ended {
        loop {
            if let Err(ended) = self.send_due(&mut state) {
                return ended;
            }
            if self.deadline.is_some() && self.ring.is_empty() {
                return self.part(state, inbound).await;
            }
            if self.ring.is_at_turn() {
                return Ended::Turned;
            }
            let is_drained = state.drain.is_some_and(|until| until <= Instant::now());
            // What was sent must be durable: ending the session discards what is still on its way.
            if is_drained || (state.is_ending() && self.ring.in_flight() == 0) {
                return Ended::Again;
            }
            let now = Instant::now();
            let (deadline, drain) = (self.deadline, state.drain);
            let outbound = state.outbound.clone();
            let is_full = outbound.capacity() == 0;
            tokio::select! {
                biased;
                // What ends the session comes first: no stream of messages can put it off.
                () = sleep_until(deadline.unwrap_or(now)), if deadline.is_some() => return Ended::TooLate,
                () = sleep_until(drain.unwrap_or(now)), if drain.is_some() => {}
                sealed = self.windows.recv(), if deadline.is_none() => self.take(sealed),
                message = inbound.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(ended) = self.hear(&mut state, message) {
                            return ended;
                        }
                    }
                    Ok(None) => return Ended::Lost("the aggregator ended the session".to_owned()),
                    Err(status) => return Ended::Lost(chain(&status)),
                },
                place = outbound.reserve(), if is_full => drop(place),
            }
        }
    }

    /// Sends all that may be sent now.
    fn send_due(&mut self, state: &mut State) -> Result<(), Ended> {
        if state.wanted == Some(self.config_version) && state.outbound.capacity() > 0 {
            let version = self.config_version;
            say(
                &state.outbound,
                agent_message::Kind::ConfigApplied(v1::ConfigApplied { version }),
            )?;
            state.wanted = None;
        }
        while !state.is_ending() && self.ring.in_flight() < state.max_unacked && state.outbound.capacity() > 0
        {
            let Some(batch) = self.ring.next(state.max_bytes) else {
                break;
            };
            let message = to_wire(batch, &mut state.names);
            say(&state.outbound, agent_message::Kind::Batch(message))?;
        }
        self.metrics.ring(&self.ring);
        Ok(())
    }

    fn hear(&mut self, state: &mut State, message: AggregatorMessage) -> Result<(), Ended> {
        match message.kind {
            Some(aggregator_message::Kind::Ack(ack)) => {
                let acknowledged = self.ring.acknowledge(ack.durable_seq);
                self.metrics.ring(&self.ring);
                acknowledged.map_err(|error| Ended::Lost(error.to_string()))?;
            }
            Some(aggregator_message::Kind::Config(config)) => {
                tracing::debug!(
                    version = config.version,
                    limits = config.limits.len(),
                    rules = config.tenant_rules.len(),
                    "new settings"
                );
                state.wanted = Some(config.version);
                sealer::hand_over(&self.settings, Settings::from_wire(&config));
            }
            Some(aggregator_message::Kind::Drain(drain)) => {
                let within = Duration::from_millis(drain.within_ms.into());
                state.drain = Some(Instant::now() + within);
            }
            Some(aggregator_message::Kind::Reject(reject)) => return Err(rejected(reject)),
            Some(aggregator_message::Kind::HelloAck(_)) => {
                return Err(Ended::Lost("a second HelloAck".to_owned()));
            }
            // A message of a later protocol version.
            None => {}
        }
        Ok(())
    }

    /// Everything is durable: says Bye, and waits until the aggregator has heard it.
    async fn part(&mut self, state: State, mut inbound: Streaming<AggregatorMessage>) -> Ended {
        let bye = v1::Bye {
            last_seq: self.ring.next_seq() - 1,
            reason: "the agent was told to stop".to_owned(),
        };
        if say(&state.outbound, agent_message::Kind::Bye(bye)).is_ok() {
            drop(state);
            let heard = timeout(Duration::from_secs(1), async {
                while let Ok(Some(_)) = inbound.message().await {}
            });
            if heard.await.is_err() {
                tracing::debug!("the aggregator did not end the session after Bye");
            }
        }
        Ended::Finished
    }
}

fn say(outbound: &mpsc::Sender<AgentMessage>, kind: agent_message::Kind) -> Result<(), Ended> {
    let message = AgentMessage { kind: Some(kind) };
    outbound
        .try_send(message)
        .map_err(|_| Ended::Lost("the session ended".to_owned()))
}

/// The batch as it is sent, with the names that this session has not had.
fn to_wire(batch: &Batch, names: &mut HashMap<TenantName, u32>) -> v1::WindowBatch {
    let window = &batch.window;
    let mut new_names = Vec::new();
    let rows = window.rows.iter().map(|row| {
        let known = names.get(&row.tenant).copied();
        let reference = known.unwrap_or_else(|| {
            let reference = u32::try_from(names.len() + 1).unwrap_or(u32::MAX);
            names.insert(row.tenant.clone(), reference);
            let name = row.tenant.as_str().to_owned();
            new_names.push(v1::TenantName {
                r#ref: reference,
                name,
            });
            reference
        });
        row.to_wire(reference)
    });
    let rows = rows.collect();
    v1::WindowBatch {
        seq: batch.seq,
        start_unix_ms: window.start_unix_ms,
        length_ms: window.length_ms,
        names: new_names,
        rows,
        cumulative: Some(batch.cumulative),
        gap: batch.gap,
        config_version: window.config_version,
        host: Some(window.host),
        pools: window.pools.iter().map(PoolRow::to_wire).collect(),
    }
}

/// The aggregator did not take the session; who has a token that it does not believe is told so by the status.
fn unopened(status: Status) -> Ended {
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => Ended::Rejected {
            reason: status.message().to_owned(),
            // The token may be another by then.
            retry_after: Some(Duration::ZERO),
        },
        _ => Ended::Lost(chain(&status)),
    }
}

fn rejected(reject: v1::Reject) -> Ended {
    let ms = u64::from(reject.retry_after_ms);
    Ended::Rejected {
        reason: reject.reason,
        retry_after: (ms > 0).then(|| Duration::from_millis(ms)),
    }
}

/// An error with its causes: the outermost alone often says only "transport error".
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
