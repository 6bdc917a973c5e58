//! What is answered to a poll, in the forms that Orca, Argo and standalone callers read.
//!
//! Orca's classes take no null where they have no question mark: `complete`, `status`, `application` and, within a
//! result, the score with its classification and reason, and `results`. They pass over what they do not know, so
//! `coalmine` may stand beside them. `results` has one entry for each metric, with the number of its data points, in
//! Kayenta; here it is empty: a verdict rests on requests, and Orca warns of fewer than 50 points.

use coalmine_judge::v1::Verdict;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::execution::{Execution, Reading, Status, Thresholds, is_dead};
use crate::{
    clock,
    rollouts::{State, View},
};

/// What judges.
pub(super) const JUDGE: &str = "coalmine";

/// How far the analysis of a canary is, and what it gave.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CanaryExecution {
    pipeline_id: String,
    application: String,
    canary_config_id: String,
    complete: bool,
    /// `running`, `succeeded` (there is a score) or `terminal` (on HOLD, the rollout was ended or cannot be judged any more).
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<CanaryResult>,
    canary_execution_request: EchoedRequest,
    #[serde(flatten)]
    times: Times,
    storage_account_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exception: Option<Exception>,
    coalmine: Decided,
}

/// How far a standalone analysis is, and what it gave.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct StandaloneExecution {
    pipeline_id: String,
    application: String,
    user: String,
    canary_config_id: String,
    complete: bool,
    /// `running`, `succeeded` (the canary passes) or `terminal` (it does not).
    status: &'static str,
    /// The same in capitals.
    execution_status: &'static str,
    stage_status: Vec<Stage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    canary_analysis_execution_result: Option<StandaloneResult>,
    #[serde(flatten)]
    times: Times,
    storage_account_name: Option<String>,
    metrics_account_name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exception: Option<Exception>,
    coalmine: Decided,
}

/// What a standalone analysis gave.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct StandaloneResult {
    did_pass_thresholds: bool,
    has_warnings: bool,
    canary_score_message: String,
    canary_scores: Vec<u8>,
    canary_execution_results: Vec<StandaloneRun>,
    build_time_iso: String,
    start_time_iso: String,
    end_time_iso: Option<String>,
}

/// The only judgement of a standalone analysis.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct StandaloneRun {
    execution_id: String,
    execution_status: &'static str,
    result: CanaryResult,
    warnings: Vec<String>,
    #[serde(flatten)]
    times: Times,
}

/// A stage of a standalone analysis; there is one.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Stage {
    r#type: &'static str,
    name: &'static str,
    status: &'static str,
    execution_id: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct CanaryResult {
    application: String,
    judge_result: JudgeResult,
    canary_execution_request: EchoedRequest,
    /// ISO 8601.
    canary_duration: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct JudgeResult {
    judge_name: &'static str,
    score: JudgeScore,
    /// Empty.
    #[schema(value_type = Vec<Object>)]
    results: Vec<Value>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct JudgeScore {
    score: u8,
    /// `Pass`, `Marginal` or `Fail`.
    classification: &'static str,
    /// The verdict's reason.
    classification_reason: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
struct EchoedRequest {
    thresholds: Thresholds,
}

/// From the first window's beginning to the end of the last one that was judged.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Times {
    build_time_iso: String,
    build_time_millis: u64,
    start_time_iso: String,
    start_time_millis: u64,
    end_time_iso: Option<String>,
    end_time_millis: Option<u64>,
}

/// Why nothing more comes.
#[derive(Debug, Serialize, ToSchema)]
struct Exception {
    details: ExceptionDetails,
}

#[derive(Debug, Serialize, ToSchema)]
struct ExceptionDetails {
    errors: Vec<String>,
}

/// The verdict as it is, for people.
#[derive(Debug, Serialize, ToSchema)]
struct Decided {
    rollout: String,
    verdict: String,
    decision_id: Option<String>,
    decision_hash: Option<String>,
    recorded: bool,
    worst_tenant: Option<String>,
    reason: String,
}

impl CanaryExecution {
    pub(super) fn of(view: &View, execution: &Execution, storage_account_name: Option<String>) -> Self {
        let reading = read(view, execution.thresholds);
        Self {
            pipeline_id: execution.id(),
            application: view.service.clone(),
            canary_config_id: view.service.clone(),
            complete: reading.status.is_complete(),
            status: reading.status.as_str(),
            result: CanaryResult::of(view, execution.thresholds, reading),
            canary_execution_request: EchoedRequest {
                thresholds: execution.thresholds,
            },
            times: Times::of(view, reading.status.is_complete()),
            storage_account_name,
            exception: Exception::of(view, reading.status),
            coalmine: Decided::of(view),
        }
    }
}

impl StandaloneExecution {
    pub(super) fn of(view: &View, execution: &Execution, storage_account_name: Option<String>) -> Self {
        let reading = read(view, execution.thresholds);
        let status = whole_status(reading, execution.thresholds);
        Self {
            pipeline_id: execution.id(),
            application: view.service.clone(),
            user: view.actor.clone(),
            canary_config_id: view.service.clone(),
            complete: status.is_complete(),
            status: status.as_str(),
            execution_status: status.constant(),
            stage_status: vec![Stage {
                r#type: "runCanary",
                name: "Run Canary #1",
                status: reading.status.constant(),
                execution_id: execution.id(),
            }],
            canary_analysis_execution_result: StandaloneResult::of(view, execution, reading),
            times: Times::of(view, status.is_complete()),
            storage_account_name,
            metrics_account_name: JUDGE,
            exception: Exception::of(view, reading.status),
            coalmine: Decided::of(view),
        }
    }
}

fn read(view: &View, thresholds: Thresholds) -> Reading {
    let ended_at = view.ended.as_ref().map(|ended| ended.verdict.as_str());
    let is_over = is_dead(view) || is_over(view.state, ended_at);
    Reading::of(view.standing(), view.hold_expired, is_over, thresholds)
}

/// Whether a rollout is ended, and no other verdict comes. The approval that one was ended at is held back while the
/// decision log takes no records, and is shown again.
fn is_over(state: State, ended_at: Option<&str>) -> bool {
    state == State::Ended && ended_at != Some(Verdict::Approve.as_str())
}

/// Kayenta's analyses succeed only if the canary passes.
fn whole_status(reading: Reading, thresholds: Thresholds) -> Status {
    match reading.score {
        Some(score) if !thresholds.is_passed_by(score.score) => Status::Terminal,
        _ => reading.status,
    }
}

impl StandaloneResult {
    fn of(view: &View, execution: &Execution, reading: Reading) -> Option<Self> {
        let result = CanaryResult::of(view, execution.thresholds, reading)?;
        let score = &result.judge_result.score;
        let did_pass_thresholds = execution.thresholds.is_passed_by(score.score);
        let message = format!(
            "final canary score {} ({}): {}",
            score.score, score.classification, view.reason
        );
        let canary_scores = vec![score.score];
        let times = Times::of(view, true);
        Some(Self {
            did_pass_thresholds,
            has_warnings: false,
            canary_score_message: message,
            canary_scores,
            build_time_iso: times.build_time_iso.clone(),
            start_time_iso: times.start_time_iso.clone(),
            end_time_iso: times.end_time_iso.clone(),
            canary_execution_results: vec![StandaloneRun {
                execution_id: execution.id(),
                execution_status: reading.status.constant(),
                result,
                warnings: Vec::new(),
                times,
            }],
        })
    }
}

impl CanaryResult {
    /// None while there is no score.
    fn of(view: &View, thresholds: Thresholds, reading: Reading) -> Option<Self> {
        let score = reading.score?;
        Some(Self {
            application: view.service.clone(),
            judge_result: JudgeResult {
                judge_name: JUDGE,
                score: JudgeScore {
                    score: score.score,
                    classification: score.classification,
                    classification_reason: view.reason.clone(),
                },
                results: Vec::new(),
            },
            canary_execution_request: EchoedRequest { thresholds },
            canary_duration: duration(view.decided_ms.saturating_sub(view.start_ms)),
        })
    }
}

impl Times {
    fn of(view: &View, is_complete: bool) -> Self {
        Self {
            build_time_iso: view.started_at.clone(),
            build_time_millis: view.start_ms,
            start_time_iso: view.started_at.clone(),
            start_time_millis: view.start_ms,
            end_time_iso: is_complete.then(|| clock::rfc3339(view.decided_ms)),
            end_time_millis: is_complete.then_some(view.decided_ms),
        }
    }
}

impl Exception {
    fn of(view: &View, status: Status) -> Option<Self> {
        if status != Status::Terminal {
            return None;
        }
        let error = match &view.ended {
            Some(ended) => format!(
                "rollout {} was ended by {} while it was on HOLD ({}); last: {}",
                view.id, ended.actor, ended.reason, view.reason
            ),
            None => format!("rollout {}: {}", view.id, view.reason),
        };
        Some(Self {
            details: ExceptionDetails { errors: vec![error] },
        })
    }
}

impl Decided {
    fn of(view: &View) -> Self {
        Self {
            rollout: view.id.clone(),
            verdict: view.verdict.clone(),
            decision_id: view.decision_id.clone(),
            decision_hash: view.decision_hash.clone(),
            recorded: view.recorded,
            worst_tenant: view.worst_tenant.clone(),
            reason: view.reason.clone(),
        }
    }
}

/// A length of time as ISO 8601.
fn duration(ms: u64) -> String {
    match (ms / 1_000, ms % 1_000) {
        (seconds, 0) => format!("PT{seconds}S"),
        (seconds, ms) => format!("PT{seconds}.{ms:03}S"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_of_time_is_iso_8601() {
        for (ms, text) in [
            (0, "PT0S"),
            (1_000, "PT1S"),
            (90_000, "PT90S"),
            (10_050, "PT10.050S"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn an_analysis_is_over_when_no_other_verdict_comes() {
        for (state, ended_at, expected) in [
            (State::Running, None, false),
            (State::Halted, None, false),
            (State::Ended, Some("HOLD"), true),
            (State::Ended, Some("ROLLBACK"), true),
            // Shown as HOLD only while the log takes no records.
            (State::Ended, Some("APPROVE"), false),
        ] {
            assert_eq!(is_over(state, ended_at), expected, "{state:?} {ended_at:?}");
        }
    }

    #[test]
    fn a_standalone_analysis_succeeds_only_if_the_canary_passes() {
        let thresholds = Thresholds::new(95, 75).unwrap();
        for (verdict, has_expired, is_ended, expected) in [
            (Verdict::Approve, false, false, Status::Succeeded),
            (Verdict::Approve, false, true, Status::Succeeded),
            (Verdict::Rollback, false, false, Status::Terminal),
            (Verdict::Hold, false, false, Status::Running),
            (Verdict::Hold, true, false, Status::Terminal),
            (Verdict::Hold, false, true, Status::Terminal),
        ] {
            let reading = Reading::of(verdict, has_expired, is_ended, thresholds);
            assert_eq!(
                whole_status(reading, thresholds),
                expected,
                "{verdict} {has_expired} {is_ended}"
            );
        }
    }
}
