//! The agents' sessions: validate, deduplicate, make durable, acknowledge.
//!
//! One task a session. A batch is applied to the book at once (acknowledged as received) and written to the
//! store; when it is on disk it is acknowledged as durable, and only then does the agent forget it. Names
//! are validated here, once.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use coalmine_proto::{
    PROTOCOL,
    names::{Arm, Outcomes, TenantName, check_name},
    v1::{
        Ack, AgentMessage, AggregatorMessage, Bye, Config, Hello, HelloAck, Reject, WindowBatch,
        agent_message, aggregator_message, telemetry_server::Telemetry,
    },
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    book::{Applied, Batch, Book, BookError, Build, Introduction, Row, Speaker, locked},
    clock,
    identity::Identity,
    kubernetes::tokens::NotBelieved,
    metrics::Metrics,
    store::{Entry, Store},
};

/// Largest message of an agent, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Batches that an agent may send ahead of the acknowledgements.
const MAX_UNACKED: u32 = 8;

/// Most names that one session may introduce.
const MAX_SESSION_NAMES: usize = 200_000;

/// Longest window that an agent may report, in milliseconds.
const MAX_WINDOW_MS: u32 = 3_600_000;

/// How far an agent's clock may be from ours, in milliseconds: its windows must fall into the right slots.
const MAX_SKEW_MS: u64 = 5_000;

/// For so long after a Hello it is taken for granted that the clocks agree.
const COMPARED_MS: u64 = 60_000;

/// Most requests that one gap can declare.
const MAX_GAP_REQUESTS: u64 = 1 << 40;

/// After so long an agent has to prove anew who it is: its token may have ended, and its pod too.
const PROVEN: Duration = Duration::from_secs(1_800);

/// How long an agent that spoke another protocol, or nonsense, shall wait.
const RETRY_REFUSED_MS: u32 = 30_000;

/// The latency limits that agents count against, by service.
pub type Configs = std::collections::BTreeMap<String, Config>;

/// What all sessions share.
#[derive(Debug, Clone)]
pub struct Ingest {
    /// Where windows are counted.
    pub book: Arc<Mutex<Book>>,
    /// Where they are made durable.
    pub store: Store,
    configs: Arc<Configs>,
    metrics: Arc<Metrics>,
    /// Woken when the book has news.
    pub news: Arc<Notify>,
    draining: watch::Receiver<bool>,
    now_ms: fn() -> u64,
    /// How agents prove who they are, where they have to.
    identity: Option<Arc<Identity>>,
}

/// Why a session ends before the agent ends it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Book(#[from] BookError),
}

/// The comparison of an agent's clock with ours.
#[derive(Debug)]
struct Clocks {
    /// When its Hello was found to say the right time.
    compared_ms: u64,
    /// Whether a window of this session was ahead.
    was_ahead: bool,
}

impl Clocks {
    fn compared_at(now_ms: u64) -> Self {
        Self {
            compared_ms: now_ms,
            was_ahead: false,
        }
    }

    /// Takes its time from a window that begins in time to come. The clocks agree now, so the agent closed it while its
    /// own was wrong, and nobody knows when that was. Its length becomes 0, which no agent may send: so it is stored, and
    /// what was decided here is not decided again when the store is read, by another clock.
    ///
    /// Long after the comparison, or after a jump of our own clock, the window is refused: the agent connects anew, and
    /// its Hello shows whose clock is wrong.
    fn date(&mut self, batch: &mut WindowBatch, now_ms: u64) -> Result<(), SessionError> {
        if batch.length_ms == 0 {
            return Err(SessionError::Refused("a window of 0 ms".to_owned()));
        }
        let ahead_ms = batch.start_unix_ms.saturating_sub(now_ms);
        if ahead_ms <= MAX_SKEW_MS {
            return Ok(());
        }
        if now_ms.abs_diff(self.compared_ms) > COMPARED_MS {
            return Err(SessionError::Refused(format!(
                "a window that starts {ahead_ms} ms from now; the clocks are compared anew when the agent connects again"
            )));
        }
        if !self.was_ahead {
            tracing::warn!(
                seq = batch.seq,
                ahead_ms,
                "a window begins in time to come, so the agent's clock was wrong; its requests are counted as late, and \
                 are no evidence"
            );
        }
        self.was_ahead = true;
        batch.length_ms = 0;
        Ok(())
    }
}

/// Takes note that a session is over, however it ends.
struct Leaving<'a> {
    ingest: &'a Ingest,
    who: &'a Introduction,
    session: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let Self { ingest, who, session } = self;
        let now_ms = (ingest.now_ms)();
        locked(&ingest.book).disconnect(&who.service, &who.instance, *session, false, now_ms);
        ingest.news.notify_waiters();
    }
}

/// Reads a Hello, or says what is wrong with it.
pub(crate) fn introduction(hello: &Hello) -> Result<Introduction, String> {
    if hello.protocol != PROTOCOL {
        return Err(format!(
            "the agent speaks protocol version {}, this aggregator version {PROTOCOL}; use an agent of the same release",
            hello.protocol
        ));
    }
    for (what, name) in [
        ("service", &hello.service),
        ("version", &hello.version),
        ("instance", &hello.instance),
    ] {
        check_name(name.as_bytes()).map_err(|error| format!("the agent's {what} {error}"))?;
    }
    let arm =
        Arm::from_wire(hello.arm()).ok_or("the agent says neither canary nor baseline; set its --arm")?;
    Ok(Introduction {
        service: hello.service.clone(),
        instance: hello.instance.clone(),
        build: Build {
            arm,
            version: hello.version.clone(),
        },
        epoch: hello.epoch,
        first_seq: if hello.oldest_seq > 0 {
            hello.oldest_seq
        } else {
            hello.next_seq
        },
    })
}

/// Applies a batch as it is stored: names, then rows.
pub(crate) fn apply(
    book: &mut Book,
    session: u64,
    batch: &WindowBatch,
    now_ms: u64,
) -> Result<Applied, SessionError> {
    let mut speaker = book.speaker(session)?;
    let applied = apply_of(book, &mut speaker, session, batch, now_ms);
    book.resume(session, speaker);
    applied
}

fn apply_of(
    book: &mut Book,
    Speaker { who, names }: &mut Speaker,
    session: u64,
    batch: &WindowBatch,
    now_ms: u64,
) -> Result<Applied, SessionError> {
    for name in &batch.names {
        let tenant = TenantName::parse_counted(&name.name).map_err(|error| {
            SessionError::Refused(format!("the tenant's name {:.40?} {error}", name.name))
        })?;
        if names.len() >= MAX_SESSION_NAMES {
            return Err(SessionError::Refused(format!(
                "more than {MAX_SESSION_NAMES} tenants in one session"
            )));
        }
        let number = book.intern(&who.service, &tenant);
        names.insert(name.r#ref, number);
    }
    if batch.length_ms > MAX_WINDOW_MS {
        return Err(SessionError::Refused(format!(
            "a window of {} ms",
            batch.length_ms
        )));
    }
    if batch.gap.is_some_and(|gap| gap.requests > MAX_GAP_REQUESTS) {
        return Err(SessionError::Refused(
            "a gap of more requests than there can be".to_owned(),
        ));
    }
    let mut rows = Vec::with_capacity(batch.rows.len());
    for row in &batch.rows {
        let tenant = names.get(&row.tenant).copied();
        let tenant = tenant.ok_or_else(|| {
            SessionError::Refused(format!("a row for tenant number {} without a name", row.tenant))
        })?;
        rows.push(Row {
            tenant,
            outcomes: Outcomes::from_row(row),
            latency: row.latency.as_ref(),
            limit_us: row.limit_us,
            over: row.over_limit,
        });
    }
    let batch = Batch {
        seq: batch.seq,
        start_ms: batch.start_unix_ms,
        length_ms: batch.length_ms,
        rows,
        cumulative: batch.cumulative.unwrap_or_default(),
        gap: batch.gap,
        pools: &batch.pools,
        host: batch.host,
    };
    Ok(book.apply(&who.service, &who.instance, session, &batch, now_ms)?)
}

/// Rebuilds the book from the store's entries.
#[derive(Debug, Default)]
pub struct Rebuild {
    /// Entries that did not fit; they are counted, and the store is left as it is.
    pub refused: u64,
}

impl Rebuild {
    /// Takes the next entry.
    pub fn take(&mut self, book: &mut Book, entry: Entry, now_ms: u64) {
        match entry {
            Entry::Hello(session, hello) => match introduction(&hello) {
                Ok(who) => {
                    book.introduce(&who, session, now_ms);
                }
                Err(_) => self.refused += 1,
            },
            // Whether it has a time was decided when it came, whatever this machine's clock says now.
            Entry::Batch(session, batch) => match apply(book, session, &batch, now_ms) {
                Ok(_) => {
                    if let Some(who) = book.who(session) {
                        book.durable(&who.service, &who.instance, who.epoch, batch.seq);
                    }
                }
                Err(error) => {
                    tracing::error!(session, seq = batch.seq, %error, "a stored window does not apply");
                    self.refused += 1;
                }
            },
            Entry::Bye(session, _) => {
                if let Some(who) = book.who(session) {
                    book.disconnect(&who.service, &who.instance, session, true, now_ms);
                }
            }
            Entry::Piece(piece) => {
                if let Err(problem) = book.load(&piece) {
                    tracing::error!(
                        problem,
                        "a part of the windows that were rolled up is not readable"
                    );
                    self.refused += 1;
                }
            }
        }
    }
}

impl Ingest {
    /// Takes sessions from now on.
    pub fn new(
        book: Arc<Mutex<Book>>,
        store: Store,
        configs: Configs,
        metrics: Arc<Metrics>,
        draining: watch::Receiver<bool>,
    ) -> Self {
        Self {
            book,
            store,
            configs: Arc::new(configs),
            metrics,
            news: Arc::new(Notify::new()),
            draining,
            now_ms: clock::now_ms,
            identity: None,
        }
    }

    /// Takes sessions only of agents that prove who they are.
    #[must_use]
    pub(crate) fn with_identity(self, identity: Option<Arc<Identity>>) -> Self {
        Self { identity, ..self }
    }

    /// With another clock, as in a simulation.
    #[must_use]
    pub fn with_clock(self, now_ms: fn() -> u64) -> Self {
        Self { now_ms, ..self }
    }

    async fn run(
        self,
        token: Option<String>,
        mut inbound: Streaming<AgentMessage>,
        out: mpsc::Sender<Result<AggregatorMessage, Status>>,
    ) {
        let hello = match inbound.message().await {
            Ok(Some(AgentMessage {
                kind: Some(agent_message::Kind::Hello(hello)),
            })) => hello,
            Ok(_) => return self.reject(&out, "a session begins with Hello".to_owned()).await,
            Err(_) => return,
        };
        let now_ms = (self.now_ms)();
        let who = match introduction(&hello) {
            Ok(who) => who,
            Err(reason) => return self.reject(&out, reason).await,
        };
        if let Some(identity) = &self.identity
            && let Err(problem) = identity.check(token.as_deref(), &who).await
        {
            self.metrics.reject("identity");
            let (service, instance) = (&who.service, &who.instance);
            tracing::warn!(service, instance, %problem, "whoever says that it is this agent is not believed");
            drop(out.send(Err(problem.into())).await);
            return;
        }
        let skew_ms = hello.now_unix_ms.abs_diff(now_ms);
        if skew_ms > MAX_SKEW_MS {
            let reason = format!(
                "the agent's clock and the aggregator's differ by {skew_ms} ms; at most {MAX_SKEW_MS} are allowed, so \
                 synchronise the clocks"
            );
            return self.reject(&out, reason).await;
        }
        // The store must see sessions and batches in the order in which the book does.
        let (session, durable_seq) = {
            let mut book = locked(&self.book);
            let session = book.next_session();
            let durable_seq = book.introduce(&who, session, (self.now_ms)());
            self.store.append(Entry::Hello(session, hello), || {});
            (session, durable_seq)
        };
        let _leaving = Leaving {
            ingest: &self,
            who: &who,
            session,
        };
        tracing::info!(
            session,
            service = who.service,
            instance = who.instance,
            arm = %who.build.arm,
            version = who.build.version,
            durable_seq,
            "agent connected"
        );
        let greeting = HelloAck {
            durable_seq,
            max_unacked: MAX_UNACKED,
            max_message_bytes: u32::try_from(MAX_MESSAGE_BYTES).unwrap_or(u32::MAX),
            now_unix_ms: (self.now_ms)(),
        };
        if !send(&out, aggregator_message::Kind::HelloAck(greeting)).await {
            return;
        }
        if let Some(config) = self.configs.get(&who.service)
            && !send(&out, aggregator_message::Kind::Config(config.clone())).await
        {
            return;
        }
        self.news.notify_waiters();
        let clocks = Clocks::compared_at(now_ms);
        self.converse(&who, session, durable_seq, clocks, &mut inbound, &out)
            .await;
    }

    /// Takes messages until the stream ends.
    async fn converse(
        &self,
        who: &Introduction,
        session: u64,
        durable_seq: u64,
        mut clocks: Clocks,
        inbound: &mut Streaming<AgentMessage>,
        out: &mpsc::Sender<Result<AggregatorMessage, Status>>,
    ) {
        let (acks, mut acked) = watch::channel(Ack {
            received_seq: durable_seq,
            durable_seq,
        });
        let acks = Arc::new(acks);
        let mut draining = self.draining.clone();
        let proven = tokio::time::sleep(PROVEN);
        tokio::pin!(proven);
        loop {
            let message = tokio::select! {
                // In this order, so that the same events always give the same conversation.
                biased;
                changed = acked.changed() => {
                    let ack = *acked.borrow_and_update();
                    if changed.is_err() || !send(out, aggregator_message::Kind::Ack(ack)).await {
                        return;
                    }
                    continue;
                }
                () = drained(&mut draining) => {
                    let drain = coalmine_proto::v1::Drain { within_ms: 0 };
                    send(out, aggregator_message::Kind::Drain(drain)).await;
                    return;
                }
                () = &mut proven, if self.identity.is_some() => {
                    let drain = coalmine_proto::v1::Drain { within_ms: 0 };
                    send(out, aggregator_message::Kind::Drain(drain)).await;
                    return;
                }
                message = inbound.message() => message,
            };
            match message {
                Ok(Some(AgentMessage { kind: Some(kind) })) => match kind {
                    agent_message::Kind::Batch(batch) => {
                        if let Err(error) = self.batch(who, session, batch, &acks, &mut clocks) {
                            self.metrics.reject(error.reason());
                            tracing::error!(session, instance = who.instance, %error, "batch refused");
                            drop(
                                out.send(Err(Status::failed_precondition(error.to_string())))
                                    .await,
                            );
                            return;
                        }
                    }
                    agent_message::Kind::ConfigApplied(applied) => {
                        tracing::debug!(session, version = applied.version, "limits applied");
                    }
                    agent_message::Kind::Bye(bye) => {
                        tracing::info!(
                            session,
                            instance = who.instance,
                            reason = bye.reason,
                            "agent ended"
                        );
                        self.farewell(who, session, bye).await;
                        return;
                    }
                    agent_message::Kind::Hello(_) => {
                        self.reject(out, "a session has one Hello".to_owned()).await;
                        return;
                    }
                },
                Ok(Some(AgentMessage { kind: None })) => {}
                Ok(None) => return,
                Err(status) => {
                    tracing::info!(session, instance = who.instance, %status, "agent's stream broke");
                    return;
                }
            }
        }
    }

    fn batch(
        &self,
        who: &Introduction,
        session: u64,
        mut batch: WindowBatch,
        acks: &Arc<watch::Sender<Ack>>,
        clocks: &mut Clocks,
    ) -> Result<(), SessionError> {
        let seq = batch.seq;
        if seq > acks.borrow().durable_seq.saturating_add(MAX_UNACKED.into()) {
            return Err(SessionError::Refused(format!(
                "batch {seq} was sent ahead of the acknowledgements; at most {MAX_UNACKED} may be"
            )));
        }
        let now_ms = (self.now_ms)();
        clocks.date(&mut batch, now_ms)?;
        let mut book = locked(&self.book);
        let applied = apply(&mut book, session, &batch, now_ms)?;
        acks.send_modify(|ack| ack.received_seq = ack.received_seq.max(seq));
        if applied == Applied::Before {
            // The counts are stored already. What is stored now are the names, which are needed to read what follows
            // in this session, and that the counts before it are on disk.
            batch.rows.clear();
            batch.pools.clear();
            batch.host = None;
        }
        let (acks, shared, news) = (Arc::clone(acks), Arc::clone(&self.book), Arc::clone(&self.news));
        let who = who.clone();
        self.store.append(Entry::Batch(session, batch), move || {
            locked(&shared).durable(&who.service, &who.instance, who.epoch, seq);
            acks.send_modify(|ack| ack.durable_seq = ack.durable_seq.max(seq));
            news.notify_waiters();
        });
        drop(book);
        Ok(())
    }

    /// Stores the agent's farewell, and everything before it.
    async fn farewell(&self, who: &Introduction, session: u64, bye: Bye) {
        let (tell, told) = tokio::sync::oneshot::channel();
        {
            // What the store has of the book must not be older than the farewell.
            let mut book = locked(&self.book);
            book.disconnect(&who.service, &who.instance, session, true, (self.now_ms)());
            self.store.append(Entry::Bye(session, bye), move || {
                // The receiver waits below.
                tell.send(()).ok();
            });
        }
        drop(told.await);
    }

    async fn reject(&self, out: &mpsc::Sender<Result<AggregatorMessage, Status>>, reason: String) {
        self.metrics.reject("hello");
        tracing::warn!(reason, "session refused");
        let reject = Reject {
            reason,
            retry_after_ms: RETRY_REFUSED_MS,
        };
        send(out, aggregator_message::Kind::Reject(reject)).await;
    }
}

impl SessionError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Refused(_) => "malformed",
            Self::Book(BookError::Order { .. }) => "order",
            Self::Book(BookError::Changed(_)) => "changed",
            Self::Book(BookError::Superseded) => "superseded",
            Self::Book(BookError::Latency { .. }) => "histogram",
            Self::Book(BookError::Totals { .. }) => "totals",
            Self::Book(BookError::Row { .. }) => "row",
            Self::Book(BookError::Pool { .. } | BookError::TooManyPools(_)) => "pool",
            Self::Book(BookError::Unknown) => "unknown",
        }
    }
}

impl From<NotBelieved> for Status {
    fn from(problem: NotBelieved) -> Self {
        match problem {
            NotBelieved::Refused(_) => Self::unauthenticated(problem.to_string()),
            NotBelieved::Unavailable(_) => Self::unavailable(problem.to_string()),
        }
    }
}

/// The token that a request presents.
fn bearer<T>(request: &Request<T>) -> Option<String> {
    let header = request.metadata().get("authorization")?.to_str().ok()?;
    let (scheme, token) = header.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim().to_owned())
}

/// Resolves when the server is about to stop.
pub(crate) async fn drained(draining: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: the server stops as well.
    drop(draining.wait_for(|draining| *draining).await);
}

/// Sends a message; says whether anybody still listens.
async fn send(out: &mpsc::Sender<Result<AggregatorMessage, Status>>, kind: aggregator_message::Kind) -> bool {
    out.send(Ok(AggregatorMessage { kind: Some(kind) })).await.is_ok()
}

#[tonic::async_trait]
impl Telemetry for Ingest {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<AggregatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (out, messages) = mpsc::channel(16);
        let token = bearer(&request);
        tokio::spawn(self.clone().run(token, request.into_inner(), out));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

#[cfg(test)]
mod tests {
    use coalmine_proto::v1::{Pool, TenantName as WireName, TenantRow, Totals};

    use super::*;
    use crate::{
        book::{Comparison, Patience},
        store,
    };

    const NOW_MS: u64 = 1_700_000_000_000;

    fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL,
            instance: "a".to_owned(),
            epoch: 7,
            service: "checkout".to_owned(),
            version: "v2".to_owned(),
            arm: Arm::Canary.to_wire().into(),
            next_seq: 1,
            window_ms: 1_000,
            ..Hello::default()
        }
    }

    fn comparison() -> Comparison {
        Comparison {
            service: "checkout".to_owned(),
            canary_version: "v2".to_owned(),
            baseline_version: None,
        }
    }

    /// A window of two requests of one tenant.
    fn window(seq: u64, start_unix_ms: u64) -> WindowBatch {
        let name = WireName {
            r#ref: 1,
            name: "acme".to_owned(),
        };
        WindowBatch {
            seq,
            start_unix_ms,
            length_ms: 1_000,
            names: if seq == 1 { vec![name] } else { Vec::new() },
            rows: vec![TenantRow {
                tenant: 1,
                success: 2,
                ..TenantRow::default()
            }],
            cumulative: Some(Totals {
                requests: 2 * seq,
                ..Totals::default()
            }),
            ..WindowBatch::default()
        }
    }

    #[test]
    fn a_window_that_is_ahead_is_late_when_it_comes_and_when_it_is_read_again() {
        const AHEAD_MS: u64 = NOW_MS + 3_600_000;
        let (write, written) = std::sync::mpsc::channel();
        let store = Store::with_log(Box::new(move |frame, _| write.send(frame).unwrap()));
        let book = Arc::new(Mutex::new(Book::new(Patience::default(), NOW_MS)));
        let (_drain, draining) = watch::channel(false);
        let metrics = Arc::new(Metrics::new());
        let ingest = Ingest::new(Arc::clone(&book), store, Configs::new(), metrics, draining);
        let ingest = ingest.with_clock(|| NOW_MS);
        let who = introduction(&hello()).unwrap();
        locked(&book).introduce(&who, 1, NOW_MS);
        ingest.store.append(Entry::Hello(1, hello()), || {});
        let acks = Arc::new(watch::Sender::new(Ack::default()));
        let mut clocks = Clocks::compared_at(NOW_MS);
        for batch in [
            window(1, NOW_MS - 3_000),
            window(2, AHEAD_MS),
            window(3, NOW_MS - 1_000),
        ] {
            let taken = ingest.batch(&who, 1, batch, &acks, &mut clocks);
            taken.unwrap();
        }
        assert_eq!(acks.borrow().received_seq, 3);
        drop(ingest);
        let frames: Vec<u8> = written.into_iter().flatten().collect();

        // By the second clock, the window would have been in time.
        for now_ms in [NOW_MS, AHEAD_MS + 10_000] {
            let mut copy = Book::new(Patience::default(), now_ms);
            let mut rebuild = Rebuild::default();
            store::entries(&frames, |entry| rebuild.take(&mut copy, entry, now_ms)).unwrap();
            assert_eq!(rebuild.refused, 0);
            for book in [&mut *locked(&book), &mut copy] {
                let (outcomes, gaps, late) = book.get("checkout").unwrap().arm_totals(Arm::Canary);
                assert_eq!((outcomes.seen(), gaps, late), (6, 0, 2));
                let frozen = book.freeze(&comparison(), NOW_MS - 10_000, 1, now_ms);
                assert_eq!(frozen.rows[0].canary.requests, 4);
                // Where the two requests belong, some are missing.
                assert_eq!((frozen.canary.expected, frozen.canary.reported), (1, 0));
                let frozen = book.freeze(&comparison(), AHEAD_MS, 2, now_ms);
                assert_eq!((frozen.rows.len(), frozen.canary.reported), (0, 0));
            }
        }
    }

    #[test]
    fn clocks_are_compared_anew_before_windows_are_taken_for_late_much_later() {
        let mut clocks = Clocks::compared_at(NOW_MS);
        let mut length = |now_ms: u64, ahead_ms: u64| {
            let mut batch = window(1, now_ms + ahead_ms);
            let dated = clocks.date(&mut batch, now_ms);
            dated.map(|()| batch.length_ms).map_err(|error| error.to_string())
        };
        for (now_ms, is_compared) in [
            (NOW_MS, true),
            (NOW_MS + 60_000, true),
            (NOW_MS + 60_001, false),
            // The aggregator's own clock was set back.
            (NOW_MS - 60_001, false),
        ] {
            assert_eq!(length(now_ms, 5_000), Ok(1_000), "within what clocks may differ");
            match length(now_ms, 5_001) {
                Ok(length_ms) => assert_eq!((length_ms, is_compared), (0, true)),
                Err(problem) => assert!(!is_compared && problem.contains("5001 ms"), "{problem}"),
            }
        }
        let mut batch = WindowBatch::default();
        let problem = clocks.date(&mut batch, NOW_MS).unwrap_err().to_string();
        assert!(problem.contains("0 ms"), "{problem}");
    }

    #[test]
    fn what_was_stored_of_a_pool_counts_once_after_a_restart() {
        let hello = hello();
        let pool = Pool {
            name: "orders".to_owned(),
            acquires: 10,
            waits: 3,
            timeouts: 1,
            used: 4,
            max: 5,
            ..Pool::default()
        };
        let batch = WindowBatch {
            seq: 1,
            start_unix_ms: 10_000,
            length_ms: 1_000,
            cumulative: Some(Totals::default()),
            pools: vec![pool],
            ..WindowBatch::default()
        };
        // The agent connected anew and sent it again, and so it was stored without its counts.
        let again = WindowBatch {
            pools: Vec::new(),
            ..batch.clone()
        };
        let mut book = Book::new(Patience::default(), 0);
        let mut rebuild = Rebuild::default();
        for entry in [
            Entry::Hello(1, hello.clone()),
            Entry::Batch(1, batch),
            Entry::Hello(2, hello),
            Entry::Batch(2, again),
        ] {
            rebuild.take(&mut book, entry, 12_000);
        }
        assert_eq!(rebuild.refused, 0);
        let window = book.freeze(&comparison(), 10_000, 1, 30_000);
        let [pool] = window.pool.as_slice() else {
            panic!("{:?}", window.pool);
        };
        assert_eq!((pool.acquires, pool.waits, pool.timeouts), (10, 3, 1));
        assert_eq!((pool.used, pool.max), (4, 5));
    }
}
