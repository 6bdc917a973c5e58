//! The decision log: its records and their exact bytes; `chain` holds them together.
//!
//! `decisions.jsonl` has one record a line:
//!
//! ```text
//! {"body":{"type":"decision",...},"log":"...","prev":"<64 hex>","seq":7,"time_ms":1700000000000,"v":1}\n
//!
//! seq    position in the log, from 0
//! prev   leaf hash of the line before; 64 zeros in the first
//! leaf   SHA-256(0x00 || the line's bytes without the newline), as in RFC 6962 section 2.1
//! root   the RFC 6962 Merkle tree hash over the leaves
//! ```
//!
//! The bytes as written are what is hashed: a verifier needs no JSON. As an added property they are
//! canonical (keys sorted, no spaces, integers only), so that equal content has equal bytes; a line that
//! is not in canonical form is refused.
//!
//! `checkpoint` beside the log states how long it is and what its root is, signed: see `note`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::chain::Hash;

/// Longest line of the log, in bytes.
pub const MAX_LINE_BYTES: usize = 60_000;

/// Most anomalies that a decision lists; how many there were is recorded beside them.
pub const MAX_ANOMALIES: usize = 20;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of this form.
    pub v: u32,
    /// The log's name.
    pub log: String,
    /// Position in the log.
    pub seq: u64,
    /// Leaf hash of the line before.
    pub prev: Hash,
    /// When it was written, milliseconds since the Unix epoch; never before the record ahead of it.
    pub time_ms: u64,
    /// What is recorded.
    pub body: Body,
}

/// What is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Body {
    /// The log begins.
    LogStart {
        /// The program that began it.
        build: String,
        /// The key that checks the signatures of its checkpoints (C2SP signed-note).
        key: String,
        /// The log that this one continues, if it does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        follows: Option<Follows>,
    },
    /// A rollout begins.
    Rollout(RolloutStart),
    /// A window was judged.
    Decision(Box<Decision>),
    /// A HOLD lasted as long as the policy allows.
    Deadline(HoldDeadline),
    /// A rollout ends.
    End(RolloutEnd),
    /// Something is done outside because of a decision, or was.
    Actuation(Actuation),
    /// Somebody decides in the judge's place, or gives the decision back to it.
    Override(Override),
    /// A canary without any traffic may get its first, so that there is something to judge.
    Bootstrap(Bootstrap),
    /// A decision was acted on before it was on record, and its record, which was under way already, does not say so.
    LateRecord {
        /// The rollout's name.
        rollout: String,
        /// The decision.
        decision: String,
    },
    /// Nothing was recorded for a while, and the log is alive.
    Heartbeat {},
    /// The last record of a segment; what follows is in another file.
    SegmentSeal {
        /// Position of the segment's first record.
        first: u64,
        /// Length of the segment up to this record, in bytes.
        bytes: u64,
    },
    /// From the next record on another key signs.
    KeyRotation {
        /// The key that checks the signatures from now on.
        key: String,
        /// Why.
        reason: String,
        /// The signature line of the key before, on the text that `chain::rotation` gives.
        endorsed: String,
    },
    /// The disk was full: what follows was recorded late.
    DiskFull {
        /// What the system said.
        problem: String,
    },
    /// Something at the end of the log was no whole record when it was opened, and was set aside. Nobody had been
    /// answered with it.
    Gap {
        /// How much, in bytes.
        bytes: u64,
        /// The file that has it now.
        kept_in: String,
    },
}

/// The log that another one continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Follows {
    /// Its name.
    pub log: String,
    /// How many records of it are known.
    pub size: u64,
    /// Their Merkle root.
    pub root: Hash,
    /// Why it does not go on.
    pub reason: String,
}

impl Body {
    /// The type as it stands in the record.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::LogStart { .. } => "log_start",
            Self::Rollout(_) => "rollout",
            Self::Decision(_) => "decision",
            Self::Deadline(_) => "deadline",
            Self::End(_) => "end",
            Self::Actuation(_) => "actuation",
            Self::Override(_) => "override",
            Self::Bootstrap(_) => "bootstrap",
            Self::LateRecord { .. } => "late_record",
            Self::Heartbeat {} => "heartbeat",
            Self::SegmentSeal { .. } => "segment_seal",
            Self::KeyRotation { .. } => "key_rotation",
            Self::DiskFull { .. } => "disk_full",
            Self::Gap { .. } => "gap",
        }
    }
}

/// A rollout begins: all that its judgement depends on besides the windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutStart {
    /// The rollout's name.
    pub rollout: String,
    /// The caller's key; the same key names the same rollout.
    pub key: String,
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with; none for every version of the baseline arm.
    pub baseline_version: Option<String>,
    /// Digest of the policy's blob.
    pub policy: Hash,
    /// Digest of the history's blob; none if limits are those of the policy alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Hash>,
    /// The judge, for the whole rollout.
    pub judge: String,
    /// Planned number of windows.
    pub max_windows: u32,
    /// Length of a window.
    pub window_ms: u64,
    /// Start of window 1, milliseconds since the Unix epoch.
    pub start_ms: u64,
    /// Who asked.
    pub actor: String,
    /// What is rolled out, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
}

/// An object of a cluster that rolls a version out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Its kind: `Deployment`, or `Rollout` of Argo, or `Canary` of Flagger.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Something is done outside because of a decision. `begun` is on record before it is done, and `done` or `failed`
/// after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Actuation {
    /// The rollout's name.
    pub rollout: String,
    /// The decision.
    pub decision: String,
    /// On what, as in `Deployment shop/checkout`, or `webhook`.
    pub target: String,
    /// The verdict that is acted on: `approve`, `hold` or `rollback`; or `release`, at the end of a rollout.
    pub act: String,
    /// `begun`, `done` or `failed`.
    pub stage: String,
    /// One sentence.
    pub detail: String,
}

/// Somebody decides in the judge's place. The judge goes on beside it, and nothing that it says is changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// The name of this decision.
    pub id: String,
    /// The rollout's name.
    pub rollout: String,
    /// APPROVE, HOLD or ROLLBACK; none where the decision is the judge's again.
    pub verdict: Option<String>,
    /// What the judge said at that time.
    pub judged: String,
    /// The judge's decision at that time, if there was one.
    pub decision: Option<String>,
    /// Who decided.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// A canary without any traffic may get its first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    /// The name of this decision.
    pub id: String,
    /// The rollout's name.
    pub rollout: String,
    /// Agents of the canary that were connected.
    pub agents: u64,
    /// Which hook asked.
    pub hook: String,
}

impl RolloutStart {
    /// The name of the decision on a window.
    pub fn decision_id(&self, window: u64) -> String {
        format!("{}-{window}", self.rollout)
    }
}

/// A HOLD lasted as long as the policy allows; the decision before it says what follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldDeadline {
    /// The rollout's name.
    pub rollout: String,
    /// The decision of the window in which the deadline was reached.
    pub decision: String,
    /// How long the HOLD had lasted, in milliseconds.
    pub held_ms: u64,
    /// What the policy does: `rollback`, `hold` or `approve`.
    pub on_deadline: String,
    /// The verdict that follows.
    pub verdict: String,
}

/// A rollout ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutEnd {
    /// The rollout's name.
    pub rollout: String,
    /// Who asked.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// The verdict at the end.
    pub verdict: String,
}

/// A window was judged. A field that does not belong here is noticed all the same: the line is then not canonical.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The decision's name.
    pub id: String,
    /// Name of the execution, with its time: `canary-<RFC 3339>-<5 characters>`.
    pub execution_id: String,
    /// The kind of work.
    pub task: String,
    /// The rollout.
    pub rollout: String,
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// What the judge found.
    #[serde(flatten)]
    pub finding: Finding,
    /// Digest of the blob of the window that was judged.
    pub evidence: Hash,
    /// Digest of the blob that names all that the decision rests on.
    pub manifest: Hash,
    /// Digest of the blob of the state that the manifest begins with, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Hash>,
    /// Digest of the policy's blob.
    pub policy: Hash,
    /// The judge.
    pub judge: String,
    /// The program.
    pub build: String,
    /// Whether it was acted on before it could be recorded, because the log could not be written.
    pub late: bool,
    /// What was done, in order. Times are here and not in the outcome.
    pub steps: Vec<Step>,
}

/// What the judge found: a function of policy and evidence, and what a replay compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Number of the window.
    pub window: u64,
    /// APPROVE, HOLD or ROLLBACK.
    pub verdict: String,
    /// Health score in parts per million.
    pub score_ppm: u32,
    /// Probability that the verdict is right, in parts per million; none for HOLD.
    pub confidence_ppm: Option<u32>,
    /// Why, in one sentence.
    pub reason: String,
    /// What stood in the way of APPROVE besides the anomalies, most important first, at most [`MAX_ANOMALIES`].
    pub missing: Vec<String>,
    /// The unit with the lowest score, if one is suspected.
    pub worst: Option<Anomaly>,
    /// The tenant to look at first, if anything is suspected.
    pub worst_tenant: Option<String>,
    /// What is not in order, worst first, at most [`MAX_ANOMALIES`].
    pub anomalies: Vec<Anomaly>,
    /// How many anomalies there were.
    pub anomalies_detected: u64,
    /// Share of the canary's requests in tenants that were judged, in parts per million.
    pub traffic_ppm: u32,
    /// Share of the tenants on the canary that were judged, in parts per million.
    pub tenants_ppm: u32,
    /// Share of the expected agents that reported, in parts per million.
    pub agents_ppm: u32,
    /// Tenants that were judged.
    pub tenants_checked: u64,
    /// Digest of the outcome's bytes.
    pub outcome: Hash,
}

/// Something that is not in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anomaly {
    /// The unit.
    pub unit: String,
    /// The metric.
    pub metric: String,
    /// What was found.
    pub state: String,
    /// `critical` for a breach, `warning` for whatever else holds the rollout, `info` for what is only watched.
    pub severity: String,
    /// What was seen.
    pub detail: String,
    /// The thresholds that it was judged by, and where they come from.
    pub limits: String,
    /// Evidence in bits, with 32 fractional bits.
    pub bits_q32: i64,
    /// Evidence that halts.
    pub budget_q32: i64,
    /// Health score in parts per million.
    pub score_ppm: u32,
}

/// A step of an execution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// From 1.
    pub step: u32,
    /// What was done.
    pub action: String,
    /// `success`, `in_progress`, `failed` or `skipped`.
    pub status: String,
    /// One sentence with numbers.
    pub detail: String,
    /// How long it took, in microseconds.
    pub duration_us: u64,
}

impl Body {
    /// The blobs that the record names, with what each is.
    pub fn blobs(&self) -> Vec<(&'static str, Hash)> {
        match self {
            Self::Rollout(start) => {
                let history = start.history.map(|digest| ("history", digest));
                [("policy", start.policy)].into_iter().chain(history).collect()
            }
            Self::Decision(decision) => {
                let snapshot = decision.snapshot.map(|digest| ("snapshot", digest));
                let named = [
                    ("evidence", decision.evidence),
                    ("manifest", decision.manifest),
                    ("policy", decision.policy),
                ];
                named.into_iter().chain(snapshot).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Record {
    /// The line, without a newline.
    pub fn to_line(&self) -> String {
        // Records have integers, strings and lists, which always convert.
        canonical(&serde_json::to_value(self).unwrap_or(Value::Null))
    }
}

/// Writes JSON with sorted keys and no spaces.
pub fn canonical(value: &Value) -> String {
    let mut text = String::new();
    write_canonical(value, &mut text);
    text
}

fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_canonical(item, text);
            }
            text.push(']');
        }
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(key, _)| *key);
            text.push('{');
            for (index, (key, item)) in fields.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                text.push_str(&Value::String(key.clone()).to_string());
                text.push(':');
                write_canonical(item, text);
            }
            text.push('}');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}
