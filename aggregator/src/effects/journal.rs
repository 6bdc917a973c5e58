//! The records of what is done on one target, in order. They are durable before and after an act, if the log allows: it is
//! waited for only for a while, and what it has not taken then follows later, with a mark.

use std::{collections::VecDeque, time::Duration};

use coalmine_judge::record::{Actuation, Body};
use tokio::{sync::oneshot, time::Instant};

use super::plan::{Stage, Step};
use crate::ledger::{AppendError, Appended, Ledger};

/// How long an act waits for the log before it goes on without.
pub(super) const RECORD_WITHIN: Duration = Duration::from_secs(2);

/// How long to wait before a record is offered again.
const OFFER_AGAIN: Duration = Duration::from_secs(1);

/// The mark of a record that the log did not take at first.
const LATE: &str = "; recorded late, the log could not be written";

/// A record on its way into the log.
struct Entry {
    actuation: Actuation,
    /// The log's answer, while it is awaited.
    answer: Option<oneshot::Receiver<Result<Appended, AppendError>>>,
}

/// Records on their way into the log.
pub(super) struct Journal {
    ledger: Ledger,
    entries: VecDeque<Entry>,
    /// When the first one is offered again, after the log has refused it.
    offered_again: Option<Instant>,
    /// Whether the log will never take any.
    is_distrusted: bool,
}

impl Journal {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self {
            ledger,
            entries: VecDeque::new(),
            offered_again: None,
            is_distrusted: false,
        }
    }

    /// Whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the log will never take any record.
    pub(super) fn is_distrusted(&self) -> bool {
        self.is_distrusted
    }

    /// Whether all is on record.
    pub(super) fn is_settled(&self) -> bool {
        self.is_empty() && !self.is_distrusted
    }

    /// Whether it is on record that a step has begun, once it was put in line.
    pub(super) fn has_begun(&self, step: &Step) -> bool {
        let is_it = |it: &Actuation| it.stage == Stage::Begun.as_str() && step.is_told_by(it);
        !self.is_distrusted && !self.entries.iter().any(|entry| is_it(&entry.actuation))
    }

    /// Puts a record in line.
    pub(super) fn push(&mut self, actuation: Actuation) {
        if !self.is_distrusted {
            self.entries.push_back(Entry {
                actuation,
                answer: None,
            });
        }
    }

    /// Waits for a while until all that is in line is on record.
    pub(super) async fn wait(&mut self) {
        // What is not there in time follows later.
        drop(tokio::time::timeout(RECORD_WITHIN, self.settle()).await);
    }

    /// Writes what is in line, in order. May be given up at any time and called again.
    pub(super) async fn settle(&mut self) {
        while let Some(entry) = self.entries.front_mut() {
            if let Some(at) = self.offered_again {
                tokio::time::sleep_until(at).await;
                self.offered_again = None;
            }
            let ledger = &self.ledger;
            let answer = entry
                .answer
                .get_or_insert_with(|| ledger.submit(Body::Actuation(entry.actuation.clone()), Vec::new()));
            let answer = answer.await.unwrap_or(Err(AppendError::Closed));
            entry.answer = None;
            match answer {
                Ok(_) => {
                    self.entries.pop_front();
                }
                Err(error @ AppendError::Untrusted(_)) => {
                    tracing::error!(%error, "what is done outside is not recorded");
                    self.is_distrusted = true;
                    self.entries.clear();
                }
                Err(error @ AppendError::Refused(_)) => {
                    tracing::error!(%error, "a record of what was done outside is left out");
                    self.entries.pop_front();
                }
                Err(error) => {
                    if !entry.actuation.detail.ends_with(LATE) {
                        tracing::error!(%error, decision = entry.actuation.decision, "act not recorded yet");
                        entry.actuation.detail.push_str(LATE);
                    }
                    self.offered_again = Some(Instant::now() + OFFER_AGAIN);
                }
            }
        }
    }
}
