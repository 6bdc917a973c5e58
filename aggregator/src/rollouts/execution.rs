//! A decision as the execution of a task, step by step, for the log.

use std::time::Duration;

use coalmine_judge::{
    evidence::Window,
    record::{Decision, Finding, Step},
    replay::Judged,
    v1::Outcome,
};
use coalmine_proto::names::Arm;

use crate::{BUILD, book::ArmContext, clock, ledger::Blob};

/// Who reported a window, and what is known of their pods and pools beside it. It is told and not judged, so it may be
/// other when the decision is judged again.
pub(super) fn connectivity(window: &Window, contexts: &[ArmContext; 2]) -> String {
    let mut text = format!(
        "{} of {} canary agents and {} of {} baseline agents reported",
        window.canary.reported, window.canary.expected, window.baseline.reported, window.baseline.expected
    );
    for pool in &window.pool {
        text += &format!(
            "; pool of the {}: {} of {} acquires had to wait and {} timed out",
            pool.arm, pool.waits, pool.acquires, pool.timeouts
        );
        if pool.max > 0 {
            text += &format!(", {} of {} connections in use", pool.used, pool.max);
        }
    }
    for (arm, context) in Arm::ALL.into_iter().zip(contexts) {
        if let Some(host) = &context.host {
            text += &format!("; pods of the {arm}: {host}");
        }
    }
    text
}

/// What is recorded of a window that was judged.
pub(super) fn decision(
    judged: &Judged,
    window: &Window,
    outcome: &Outcome,
    (evidence, manifest): (&Blob, &Blob),
    connectivity: String,
    times: (Duration, Duration),
) -> Decision {
    let finding = Finding::of(outcome);
    let now_ms = clock::now_ms();
    Decision {
        id: judged.start.decision_id(outcome.window),
        execution_id: format!(
            "canary-{}-{:.5}",
            clock::rfc3339(now_ms),
            finding.outcome.to_string()
        ),
        task: "orchestrate_canary_health_checks".to_owned(),
        rollout: judged.start.rollout.clone(),
        service: judged.start.service.clone(),
        canary_version: judged.start.canary_version.clone(),
        steps: steps(
            judged,
            window,
            outcome,
            connectivity,
            times,
            finding.anomalies_detected,
        ),
        finding,
        evidence: evidence.digest,
        manifest: manifest.digest,
        snapshot: judged.manifest.snapshot.map(|snapshot| snapshot.state),
        policy: judged.start.policy,
        judge: judged.start.judge.clone(),
        build: BUILD.to_owned(),
        late: false,
    }
}

/// The steps of an execution, as everywhere in Coalmine; what a judged window does not need is skipped.
fn steps(
    judged: &Judged,
    window: &Window,
    outcome: &Outcome,
    connectivity: String,
    (frozen, took): (Duration, Duration),
    anomalies: u64,
) -> Vec<Step> {
    let policy = judged.judge.policy();
    let steps = [
        (
            "load_sla_baselines",
            "success",
            format!(
                "{} tenant definitions, policy {:.12}",
                policy.tenants.len(),
                judged.start.policy.to_string()
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
            connectivity,
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
            took,
        ),
        (
            "calculate_rollout_health_score",
            "success",
            format!(
                "score {} ppm, threshold {} ppm, {}",
                outcome.score_ppm,
                policy.rollout.rollback_threshold.ppm,
                outcome.worst_tenant.as_ref().map_or_else(
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
