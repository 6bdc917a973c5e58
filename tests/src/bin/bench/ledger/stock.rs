//! Made-up decisions, written as the aggregator writes them.

use std::sync::atomic::{AtomicU64, Ordering};

use coalmine_aggregator::{BUILD, ledger::Blob};
use coalmine_judge::{
    chain::Hash,
    record::{Anomaly, Body, Decision, Finding, Record, Step},
    v1,
};

use crate::{
    aggregator::{POLICY, SERVICE},
    sample::{Random, tenant},
};

/// What every decision here is about.
const ROLLOUT: &str = "bench-canary-1-1772357400";

/// Tenants that are not in order.
pub(super) const ANOMALIES: usize = 8;

/// Decisions of 500 tenants, each with a name and evidence of its own.
#[derive(Debug)]
pub(super) struct Stock {
    finding: Finding,
    /// As long as packed evidence is, and not to be packed further.
    evidence: Vec<u8>,
    made: AtomicU64,
}

impl Stock {
    /// Decisions with this finding, but for its anomalies; their evidence takes so many bytes.
    pub(super) fn new(finding: Finding, evidence_bytes: usize) -> Self {
        let anomalies: Vec<Anomaly> = (1..=ANOMALIES).map(anomaly).collect();
        let mut random = Random::new(17);
        let evidence = (0..evidence_bytes).map(|_| (random.next() >> 56) as u8);
        Self {
            finding: Finding {
                worst: anomalies.first().cloned(),
                worst_tenant: Some(tenant(7)),
                anomalies_detected: ANOMALIES as u64,
                anomalies,
                ..finding
            },
            evidence: evidence.collect(),
            made: AtomicU64::new(0),
        }
    }

    /// The next record, alone.
    pub(super) fn alone(&self) -> Body {
        self.body(self.next(), Hash::ZERO)
    }

    /// The next record, and the evidence that it names.
    pub(super) fn with_evidence(&self) -> anyhow::Result<(Body, Blob)> {
        let number = self.next();
        let mut content = self.evidence.clone();
        for (byte, own) in content.iter_mut().zip(number.to_le_bytes()) {
            *byte = own;
        }
        let evidence = Blob::pack(&content)?;
        Ok((self.body(number, evidence.digest), evidence))
    }

    /// A line as the log has it, with its newline.
    pub(super) fn line(&self) -> String {
        let record = Record {
            v: 1,
            log: "coalmine/default".to_owned(),
            seq: 100_000,
            prev: Hash::of(b"bench"),
            time_ms: 1_772_357_400_000,
            body: self.alone(),
        };
        record.to_line() + "\n"
    }

    /// How long the evidence is.
    pub(super) fn evidence_bytes(&self) -> usize {
        self.evidence.len()
    }

    fn next(&self) -> u64 {
        self.made.fetch_add(1, Ordering::Relaxed)
    }

    fn body(&self, number: u64, evidence: Hash) -> Body {
        Body::Decision(Box::new(decision(number, 500, self.finding.clone(), evidence)))
    }
}

/// A decision as it is recorded.
pub(super) fn decision(number: u64, tenants: usize, finding: Finding, evidence: Hash) -> Decision {
    Decision {
        id: format!("{ROLLOUT}-{number}"),
        execution_id: format!("canary-2026-03-01T09:30:00Z-{:.5}", finding.outcome.to_string()),
        task: "orchestrate_canary_health_checks".to_owned(),
        rollout: ROLLOUT.to_owned(),
        service: SERVICE.to_owned(),
        canary_version: "canary-1".to_owned(),
        steps: steps(tenants, &finding),
        finding,
        evidence,
        // As long as real ones; what they name is measured apart.
        manifest: evidence,
        snapshot: Some(evidence),
        policy: Hash::of(POLICY.as_bytes()),
        judge: v1::ID.to_owned(),
        build: BUILD.to_owned(),
        late: false,
    }
}

/// The steps of an execution, as long as the aggregator's.
fn steps(tenants: usize, finding: &Finding) -> Vec<Step> {
    let steps = [
        (
            "load_sla_baselines",
            "success",
            "0 tenant definitions, policy 6f1c1d0e6a51".to_owned(),
        ),
        (
            "validate_metrics_connectivity",
            "success",
            "1 of 1 canary agents and 1 of 1 baseline agents reported".to_owned(),
        ),
        (
            "batch_health_probes",
            "skipped",
            "live traffic is judged; no probes were asked for".to_owned(),
        ),
        (
            "analyze_latency_distribution",
            "success",
            format!(
                "{} tenants in {tenants} rows of window {}, {} anomalies",
                finding.tenants_checked, finding.window, finding.anomalies_detected
            ),
        ),
        (
            "calculate_rollout_health_score",
            "success",
            format!(
                "score {} ppm, threshold 500000 ppm, no tenant suspected",
                finding.score_ppm
            ),
        ),
        (
            "log_decision_audit_trail",
            "in_progress",
            "decisions.jsonl; the hash is that of this record".to_owned(),
        ),
        (
            "emit_metrics_event",
            "skipped",
            "no receiver of events is configured".to_owned(),
        ),
    ];
    let step = |(step, (action, status, detail)): (u32, (&str, &str, String))| Step {
        step,
        action: action.to_owned(),
        status: status.to_owned(),
        detail,
        duration_us: u64::from(step) * 211,
    };
    (1..).zip(steps).map(step).collect()
}

/// A tenant that fails, in the judge's words.
fn anomaly(number: usize) -> Anomaly {
    Anomaly {
        unit: format!("tenant:{}", tenant(number * 7)),
        metric: "errors".to_owned(),
        state: "SUSPECT".to_owned(),
        severity: "warning".to_owned(),
        detail: format!(
            "{} of 2417 canary requests failed (0.91 %), on the baseline 5 of 5630 (0.089 %); up to 0.189 % is \
             tolerated",
            20 + number
        ),
        limits: "max_increase 0.1pp (defaults); max_ratio 1.25 (defaults)".to_owned(),
        bits_q32: 40_132_174_413 + number as i64,
        budget_q32: 71_468_255_805,
        score_ppm: 719_230 + number as u32,
    }
}
