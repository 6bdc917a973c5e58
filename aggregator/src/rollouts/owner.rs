//! The task that owns a rollout.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use coalmine_judge::{
    evidence::Window,
    record::{Body, Decision, Hash, RolloutEnd, RolloutStart, Step},
    replay::{Judged, anomalies},
    v1::{Judge, Outcome},
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    RolloutError, Shared, comparison,
    view::{self, State, View},
};
use crate::{
    BUILD,
    book::Comparison,
    clock,
    ingest::locked,
    ledger::{AppendError, Blob},
};

/// How often a slot's deadline is looked at when nothing else happens.
const TICK: Duration = Duration::from_millis(100);

/// Decisions that may wait for a log that cannot be written; then judging pauses.
const MAX_PENDING: usize = 1_000;

/// What a person or a tool asks of a rollout.
#[derive(Debug)]
pub(super) enum Command {
    End {
        actor: String,
        reason: String,
        reply: oneshot::Sender<Result<(), RolloutError>>,
    },
}

/// What can happen to a rollout.
enum Event {
    /// A slot is complete, or late enough.
    Slot,
    /// Somebody asks for something.
    Command(Command),
    /// Nobody can ask any more: the server stops.
    Closed,
}

/// A rollout and its state.
#[derive(Debug)]
pub(super) struct Owner {
    start: RolloutStart,
    comparison: Comparison,
    judge: Judge,
    outcome: Option<Outcome>,
    view: View,
    shared: Shared,
    /// Decisions that are not in the log yet, in order.
    pending: VecDeque<(Decision, Vec<Blob>)>,
    broken: bool,
}

impl Owner {
    pub(super) fn new(start: RolloutStart, judged: Judged, view: View, shared: Shared) -> Self {
        let owner = Self {
            comparison: comparison(&start),
            start,
            judge: judged.judge,
            outcome: judged.outcome,
            view,
            shared,
            pending: VecDeque::new(),
            broken: false,
        };
        if let Some(outcome) = &owner.outcome {
            owner
                .shared
                .metrics
                .decided(&owner.start.service, &owner.start.rollout, outcome, None);
        }
        owner
    }

    pub(super) fn view(&self) -> Arc<View> {
        Arc::new(self.view.clone())
    }

    /// The number of the window that comes next.
    pub(super) fn next_window(&self) -> u64 {
        self.judge.last_window().unwrap_or(0) + 1
    }

    fn next_slot_ms(&self) -> u64 {
        self.start.start_ms + (self.next_window() - 1) * self.start.window_ms
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Command>, publish: watch::Sender<Arc<View>>) {
        loop {
            match self.select(&mut inbox).await {
                Event::Slot => self.judge_slot().await,
                Event::Command(Command::End { actor, reason, reply }) => {
                    let result = self.end(actor, reason).await;
                    let ended = result.is_ok();
                    publish.send_replace(self.view());
                    // The caller may have gone away.
                    drop(reply.send(result));
                    if ended {
                        return;
                    }
                }
                Event::Closed => return,
            }
            publish.send_replace(self.view());
        }
    }

    /// Waits for the next thing to do.
    async fn select(&self, inbox: &mut mpsc::Receiver<Command>) -> Event {
        let idle = self.view.state == State::Halted && self.pending.is_empty();
        loop {
            let news = self.shared.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if !idle && !self.broken && self.is_ready() {
                return Event::Slot;
            }
            tokio::select! {
                command = inbox.recv() => return command.map_or(Event::Closed, Event::Command),
                () = &mut news => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    fn is_ready(&self) -> bool {
        locked(&self.shared.book).is_ready(&self.comparison, self.next_slot_ms(), clock::now_ms())
    }

    /// Freezes the next slot, judges it, records the decision and shows it.
    async fn judge_slot(&mut self) {
        let begun = Instant::now();
        if self.view.state != State::Halted && self.pending.len() < MAX_PENDING {
            let window = locked(&self.shared.book).freeze(
                &self.comparison,
                self.next_slot_ms(),
                self.next_window(),
                clock::now_ms(),
            );
            let frozen = begun.elapsed();
            let judging = Instant::now();
            match self.judge.step(&window) {
                Ok(outcome) => {
                    let judged = judging.elapsed();
                    match self.decide(&window, &outcome, frozen, judged) {
                        Ok(decision) => self.pending.push_back(decision),
                        Err(error) => return self.fail(&error.to_string()),
                    }
                    let before = self.outcome.replace(outcome);
                    if let Some(outcome) = &self.outcome {
                        let (service, rollout) = (&self.start.service, &self.start.rollout);
                        self.shared
                            .metrics
                            .decided(service, rollout, outcome, before.as_ref());
                    }
                }
                Err(error) => return self.fail(&error.to_string()),
            }
        }
        self.record().await;
        self.shared
            .metrics
            .decision_seconds
            .observe(begun.elapsed().as_secs_f64());
    }

    /// Writes what is pending, in order, and shows the newest decision as recorded or not.
    async fn record(&mut self) {
        while let Some((decision, blobs)) = self.pending.front().cloned() {
            self.view.decision(&decision);
            match self
                .shared
                .ledger
                .append(Body::Decision(Box::new(decision.clone())), blobs)
                .await
            {
                Ok(appended) => {
                    self.view.recorded_decision(&decision, &appended.hash.to_string());
                    self.pending.pop_front();
                    tracing::info!(
                        rollout = decision.rollout,
                        window = decision.window,
                        verdict = decision.verdict,
                        score_ppm = decision.score_ppm,
                        reason = decision.reason,
                        "decision recorded"
                    );
                }
                Err(error) => return self.unrecorded(&error).await,
            }
        }
    }

    /// HOLD and ROLLBACK take effect without a log; APPROVE does not.
    async fn unrecorded(&mut self, error: &AppendError) {
        for (decision, _) in &mut self.pending {
            decision.late = true;
        }
        if let Some((newest, _)) = self.pending.back() {
            self.view.decision(newest);
        }
        self.view.unrecorded(&error.to_string());
        tokio::time::sleep(TICK).await;
    }

    fn fail(&mut self, problem: &str) {
        tracing::error!(rollout = self.start.rollout, problem, "rollout cannot be judged");
        self.broken = true;
        self.view.broken(problem);
    }

    fn decide(
        &self,
        window: &Window,
        outcome: &Outcome,
        frozen: Duration,
        judged: Duration,
    ) -> Result<(Decision, Vec<Blob>), AppendError> {
        let evidence = Blob::pack(window.to_json().as_bytes())?;
        let result = outcome.to_json();
        let now_ms = clock::now_ms();
        let all = anomalies(outcome);
        let detected = outcome
            .units
            .iter()
            .filter(|report| report.state.is_trouble())
            .count() as u64;
        let digest = Hash::of(result.as_bytes());
        let decision = Decision {
            id: format!("{}-{}", self.start.rollout, outcome.window),
            execution_id: format!("canary-{}-{:.5}", clock::rfc3339(now_ms), digest.to_string()),
            task: "orchestrate_canary_health_checks".to_owned(),
            rollout: self.start.rollout.clone(),
            service: self.start.service.clone(),
            canary_version: self.start.canary_version.clone(),
            window: outcome.window,
            verdict: outcome.verdict.as_str().to_owned(),
            score_ppm: outcome.score_ppm,
            confidence_ppm: outcome.confidence_ppm,
            reason: outcome.reason.clone(),
            worst: view::worst(outcome),
            anomalies: all,
            anomalies_detected: detected,
            traffic_ppm: outcome.traffic_ppm,
            agents_ppm: outcome.agents_ppm,
            tenants_checked: outcome.tenants.total(),
            evidence: evidence.digest,
            policy: self.start.policy,
            outcome: digest,
            judge: self.start.judge.clone(),
            build: BUILD.to_owned(),
            late: false,
            steps: self.steps(window, outcome, frozen, judged, detected),
        };
        Ok((decision, vec![evidence]))
    }

    /// The steps of an execution, as everywhere in Coalmine; what a judged window does not need is skipped.
    fn steps(
        &self,
        window: &Window,
        outcome: &Outcome,
        frozen: Duration,
        judged: Duration,
        anomalies: u64,
    ) -> Vec<Step> {
        let policy = self.judge.policy();
        let steps = [
            (
                "load_sla_baselines",
                "success",
                format!(
                    "{} tenant definitions, policy {:.12}",
                    policy.tenants.len(),
                    self.start.policy.to_string()
                ),
                Duration::ZERO,
            ),
            (
                "validate_metrics_connectivity",
                if outcome.agents_ppm == 1_000_000 {
                    "success"
                } else {
                    "failed"
                },
                format!(
                    "{} of {} canary agents and {} of {} baseline agents reported",
                    window.canary.reported,
                    window.canary.expected,
                    window.baseline.reported,
                    window.baseline.expected
                ),
                frozen,
            ),
            (
                "batch_health_probes",
                "skipped",
                "live traffic is judged; no probes were asked for".to_owned(),
                Duration::ZERO,
            ),
            (
                "analyze_latency_distribution",
                "success",
                format!(
                    "{} tenants in {} rows of window {}, {anomalies} anomalies",
                    outcome.tenants.total(),
                    window.rows.len(),
                    window.number
                ),
                judged,
            ),
            (
                "calculate_rollout_health_score",
                "success",
                format!(
                    "score {} ppm, threshold {} ppm, {}",
                    outcome.score_ppm,
                    policy.rollout.rollback_threshold.ppm,
                    view::tenant_of(outcome).map_or_else(
                        || "no tenant suspected".to_owned(),
                        |tenant| format!("worst tenant {tenant}")
                    )
                ),
                Duration::ZERO,
            ),
            (
                "log_decision_audit_trail",
                "in_progress",
                "decisions.jsonl; the hash is that of this record".to_owned(),
                Duration::ZERO,
            ),
            (
                "emit_metrics_event",
                "skipped",
                "no receiver of events is configured".to_owned(),
                Duration::ZERO,
            ),
        ];
        let step = |(number, (action, status, detail, took)): (u32, (&str, &str, String, Duration))| Step {
            step: number,
            action: action.to_owned(),
            status: status.to_owned(),
            detail,
            duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        (1..).zip(steps).map(step).collect()
    }

    async fn end(&mut self, actor: String, reason: String) -> Result<(), RolloutError> {
        self.record().await;
        let end = RolloutEnd {
            rollout: self.start.rollout.clone(),
            actor,
            reason,
            verdict: self.view.verdict.clone(),
        };
        self.shared
            .ledger
            .append(Body::End(end.clone()), Vec::new())
            .await?;
        self.view.end(&end);
        self.shared
            .metrics
            .ended(&self.start.service, &self.start.rollout, self.outcome.as_ref());
        tracing::info!(
            rollout = end.rollout,
            actor = end.actor,
            reason = end.reason,
            "rollout ended"
        );
        Ok(())
    }
}
