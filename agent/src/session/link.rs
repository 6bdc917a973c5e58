//! Whether the aggregator is connected, said once for each change.

use crate::metrics::Metrics;

/// The state of the link, for logs and metrics.
#[derive(Debug)]
pub(super) struct Link {
    aggregator: String,
    metrics: Metrics,
    state: State,
    /// Whether there was a session before.
    was_up: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Up,
    Lost,
    NoToken(String),
    Rejected(String),
}

impl Link {
    pub(super) fn new(aggregator: String, metrics: Metrics) -> Self {
        Self {
            aggregator,
            metrics,

            state: State::Unknown,
            was_up: false,
        }
    }

    /// The aggregator accepted a session.
    pub(super) fn up(&mut self) {
        if self.was_up {
            self.metrics.reconnected();
        }
        self.was_up = true;
        self.metrics.connected(true);
        if self.state != State::Up {
            tracing::info!(aggregator = self.aggregator, "connected to the aggregator");
        }
        self.state = State::Up;
    }

    /// There is no session, for whatever reason.
    pub(super) fn down(&self) {
        self.metrics.connected(false);
    }

    pub(super) fn lost(&mut self, error: &str) {
        if self.state == State::Lost {
            tracing::debug!(aggregator = self.aggregator, error, "still no aggregator");
        } else {
            tracing::warn!(
                aggregator = self.aggregator,
                error,
                "no connection to the aggregator; windows are kept and sent later, and proxying goes on; \
                 if it stays so, check --aggregator and whether the aggregator runs"
            );
        }
        self.state = State::Lost;
    }

    pub(super) fn without_token(&mut self, why: &str) {
        let state = State::NoToken(why.to_owned());
        if self.state != state {
            tracing::warn!(
                why,
                "there is no token for the aggregator; windows are kept and sent later, and proxying goes on; \
                 check --token-file"
            );
        }
        self.state = state;
    }

    pub(super) fn rejected(&mut self, reason: &str) {
        let state = State::Rejected(reason.to_owned());
        if self.state != state {
            tracing::warn!(
                aggregator = self.aggregator,
                reason,
                "the aggregator refuses this agent; windows are kept, and proxying goes on"
            );
        }
        self.state = state;
    }
}
