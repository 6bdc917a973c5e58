//! Sends windows to the aggregator: the control thread's owner task.
//!
//! One session after the other, each a bidirectional stream (proto/coalmine/v1/telemetry.proto says
//! what is on it). A batch stays in the ring until the aggregator has it on disk; after a broken
//! session it is sent again, with the same number, so that it is applied once. Whatever happens here,
//! proxying goes on.
//!
//! A session and an epoch are of one build. When the pod's labels name another, what was measured as the
//! old one is sent until it is durable; then the session ends, without Bye: the aggregator shall wait for the
//! agent, which comes back at once, as the new build and in a new epoch, with numbers and totals of its
//! own. So no total is of two builds.

mod link;
mod measured;
mod stream;
mod token;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tonic::transport::{self, Channel, Endpoint};

use crate::{
    backoff,
    config::Config,
    context::Context,
    metrics::Metrics,
    proxy::now_unix_ms,
    recorder::{Sealed, Settings},
    ring::Ring,
    window::{Build, Sums, Window},
};
use link::Link;
use measured::Measured;

/// How long the last windows may take to become durable when the agent stops.
const FLUSH: Duration = Duration::from_secs(5);

/// Opens a connection to the aggregator.
pub type Dial = Box<dyn Fn(Endpoint) -> Dialling>;

/// A connection that is being opened.
pub type Dialling = Pin<Box<dyn Future<Output = Result<Channel, transport::Error>>>>;

/// What a session takes from the world outside; a simulation has another world than a process.
pub struct Surroundings {
    /// Names this life of the process, never 0; once arm or version have changed, the number after it does.
    pub epoch: u64,
    /// The wall clock, in milliseconds since the Unix epoch.
    pub clock: fn() -> u64,
    /// How the aggregator is reached.
    pub dial: Dial,
    /// Adds to a closed window what is known of the pod.
    pub context: Box<dyn FnMut(&mut Window)>,
}

/// The owner of everything that is on its way to the aggregator.
pub struct Session<'c> {
    config: &'c Config,
    surroundings: Surroundings,
    /// Names what the ring numbers: this life of the process, as one build.
    epoch: u64,
    ring: Ring,
    /// Sums of all windows that were taken: the ring must conserve them.
    taken: Sums,
    windows: Measured,
    settings: watch::Sender<Arc<Settings>>,
    /// Version of the settings under which the open window is recorded.
    config_version: u64,
    metrics: Metrics,
    /// Set when the last window was taken: until then it may take.
    deadline: Option<Instant>,
    link: Link,
}

/// Why a session ended.
#[derive(Debug)]
enum Ended {
    /// There was none, or it broke.
    Lost(String),
    /// There is no token to show.
    NoToken(String),
    /// The aggregator refuses the agent.
    Rejected {
        reason: String,
        retry_after: Option<Duration>,
    },
    /// It ended in order, and another may begin.
    Again,
    /// All windows of its build are durable, and there are others.
    Turned,
    /// Everything is durable, and no more will come.
    Finished,
    /// Not everything became durable in time.
    TooLate,
}

// === impl Surroundings ===

impl Surroundings {
    /// Those of a process: a random epoch, the system's clock and network.
    pub(crate) fn of_process(mut context: Context) -> Self {
        Self {
            // The standard library's hash keys are random: that is all the randomness needed here.
            epoch: RandomState::new().build_hasher().finish().max(1),
            clock: now_unix_ms,
            dial: Box::new(|endpoint: Endpoint| -> Dialling {
                Box::pin(async move { endpoint.connect().await })
            }),
            context: Box::new(move |window| context.add_to(window)),
        }
    }
}

// === impl Session ===

// Each select! is biased: what happens then depends on what came when, and on no lot that is drawn.
impl<'c> Session<'c> {
    /// A session that takes closed windows and hands on settings.
    pub fn new(
        config: &'c Config,
        windows: mpsc::Receiver<Sealed>,
        settings: watch::Sender<Arc<Settings>>,
        metrics: Metrics,
        surroundings: Surroundings,
    ) -> Self {
        let windows = Measured::new(config, windows);
        Self {
            config,
            epoch: surroundings.epoch,
            surroundings,
            ring: Ring::new(config.ring_bytes, windows.build()),
            taken: Sums::default(),
            windows,
            settings,
            config_version: 0,
            link: Link::new(config.aggregator.clone(), metrics.clone()),
            metrics,
            deadline: None,
        }
    }

    /// Sends windows until the last is durable, or cannot be sent in time.
    pub async fn run(mut self) {
        let mut attempt = 0;
        loop {
            self.turn();
            let before = self.ring.durable();
            let ended = self.connect().await;
            // A session that gets nothing through, such as one that is always refused, is no success.
            if self.ring.durable() > before {
                attempt = 0;
            }
            let backoff = backoff::delay(&self.config.instance, attempt);
            let wait = match ended {
                Ended::Finished => return,
                Ended::TooLate => break,
                // Each turn is one less that waits.
                Ended::Turned => continue,
                Ended::Again => backoff,
                Ended::Lost(error) => {
                    self.link.lost(&error);
                    backoff
                }
                Ended::NoToken(why) => {
                    self.link.without_token(&why);
                    backoff
                }
                Ended::Rejected { reason, retry_after } => {
                    self.link.rejected(&reason);
                    retry_after.unwrap_or(backoff::LONGEST).max(backoff)
                }
            };
            attempt = attempt.saturating_add(1);
            if self.pause(wait).await.is_none() {
                break;
            }
        }
        tracing::warn!(
            requests = self.ring.requests(),
            batches = self.ring.len(),
            "the aggregator does not have the last windows; their requests are lost to it"
        );
    }

    /// At a turn of the ring, begins the epoch of the next build.
    fn turn(&mut self) {
        if self.ring.turn() {
            self.epoch = self.epoch.wrapping_add(1).max(1);
            self.metrics.ring(&self.ring);
        }
        self.metrics.measures(self.ring.build());
    }

    /// Waits for the next attempt, but less when the agent stops.
    async fn pause(&mut self, wait: Duration) -> Option<()> {
        let until = Instant::now() + wait;
        let was_stopping = self.deadline.is_some();
        loop {
            tokio::select! {
                biased;
                () = sleep_until(until) => return Some(()),
                sealed = self.windows.recv(), if self.deadline.is_none() => self.take(sealed),
                () = sleep_until(self.deadline.unwrap_or(until)), if self.deadline.is_some() => return None,
            }
            if !was_stopping && self.deadline.is_some() {
                return Some(());
            }
        }
    }

    /// Takes windows while something else goes on; none if the agent stops and time is up.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        loop {
            let deadline = self.deadline;
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                sealed = self.windows.recv(), if deadline.is_none() => self.take(sealed),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => return None,
            }
        }
    }

    /// A window was closed; none when that was the last.
    fn take(&mut self, measured: Option<(Sealed, Arc<Build>)>) {
        let Some((mut sealed, build)) = measured else {
            self.deadline = Some(Instant::now() + FLUSH);
            return;
        };
        (self.surroundings.context)(&mut sealed.window);
        self.metrics.sealed(&sealed);
        self.config_version = sealed.next_config_version;
        self.taken = self.taken.plus(sealed.window.sums());
        let outcomes = &sealed.totals.outcomes;
        let seen = Sums {
            requests: outcomes.seen(),
            errors: outcomes.errors(),
        };
        debug_assert_eq!(self.taken, seen, "each request is in one window");
        self.ring.push(sealed.window, build);
        self.metrics.ring(&self.ring);
    }
}
