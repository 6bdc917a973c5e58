//! The SLA baseline: the operator's policy for one service, read from YAML.
//!
//! ```yaml
//! apiVersion: coalmine.dev/v1
//! kind: SlaBaseline
//! service: checkout
//! defaults:
//!   errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
//!   latency: { p99: 350ms, margin: 10% }
//!   pool:    { max_wait_rate: 1% }
//!   hold_deadline: 30m
//!   required: [errors, latency]
//!   judge_window: 10s
//! tiers:
//!   gold: { latency: { p99: 250ms } }
//! tenants:
//!   acme-corp: { tier: gold, errors: { max_rate: 0.5% } }
//! rollout: { alpha: 1%, rollback_threshold: 0.95, min_coverage: { traffic: 90%, agents: 90% }, critical: [acme-corp] }
//! adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
//! ```
//!
//! Unknown fields are refused; an error names line, column and what to write instead.

use std::collections::BTreeMap;

use coalmine_proto::names::{TenantName, check_name};
use serde::Deserialize;

use crate::quantity::{PercentagePoints, Rate, Ratio, Share, Span, Times};

/// Longest latency limit, in microseconds: the upper end of the histogram.
const MAX_LATENCY_US: u64 = 128_000_000;

/// Largest policy file that is read, in bytes.
pub const MAX_POLICY_BYTES: usize = 4 << 20;

/// A validated policy, with the bytes that it was read from.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The file's content, as written: what its digest covers.
    pub source: String,
    /// The service that the policy is for.
    pub service: String,
    /// Limits of a tenant that nothing more specific is said about.
    pub defaults: Defaults,
    /// Limits by tier; they overrule the defaults.
    pub tiers: BTreeMap<String, Limits>,
    /// Limits by tenant; they overrule the tier's.
    pub tenants: BTreeMap<TenantName, TenantPolicy>,
    /// How a rollout is judged.
    pub rollout: Rollout,
    /// How thresholds may follow history.
    pub adjust: Option<Adjust>,
}

/// Why a policy is refused: one sentence, with its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct PolicyError {
    /// Line of the mistake, from 1.
    pub line: u64,
    /// Column of the mistake, from 1.
    pub column: u64,
    /// What is wrong and what to write.
    pub message: String,
}

/// What a rollout must show before it is approved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Requirement {
    /// The error rate is proven to be below the limit.
    Errors,
    /// The share of slow requests is proven to be below the limit.
    Latency,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(rename = "apiVersion")]
    _api_version: ApiVersion,
    #[serde(rename = "kind")]
    _kind: Kind,
    service: Name,
    defaults: Defaults,
    #[serde(default)]
    tiers: BTreeMap<String, Limits>,
    #[serde(default)]
    tenants: BTreeMap<Tenant, TenantPolicy>,
    #[serde(default)]
    rollout: Rollout,
    adjust: Option<Adjust>,
}

#[derive(Debug, Deserialize)]
enum ApiVersion {
    #[serde(rename = "coalmine.dev/v1")]
    V1,
}

#[derive(Debug, Deserialize)]
enum Kind {
    SlaBaseline,
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Name(String);

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match check_name(text.as_bytes()) {
            Ok(_) => Ok(Self(text)),
            Err(error) => Err(format!("the name {:?} {error}", shorten(&text))),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
struct Tenant(TenantName);

impl TryFrom<String> for Tenant {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        TenantName::parse(text.as_bytes())
            .map(Self)
            .map_err(|error| format!("the tenant's name {:?} {error}", shorten(&text)))
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() > 40 {
        format!("{}...", text.chars().take(40).collect::<String>())
    } else {
        text.to_owned()
    }
}

/// What holds for every tenant unless a tier or the tenant itself says otherwise.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
    /// Limits on the database connection pool.
    pub pool: Option<PoolLimits>,
    /// Longest time that a rollout may stay on HOLD.
    #[serde(default = "thirty_minutes")]
    pub hold_deadline: Span,
    /// What must be proven before APPROVE.
    #[serde(default = "errors_and_latency")]
    pub required: Vec<Requirement>,
    /// Length of the windows that the judge takes; a whole number of milliseconds.
    #[serde(default = "ten_seconds")]
    pub judge_window: Span,
}

const fn thirty_minutes() -> Span {
    Span {
        micros: 30 * 60 * 1_000_000,
    }
}

const fn ten_seconds() -> Span {
    Span { micros: 10_000_000 }
}

fn errors_and_latency() -> Vec<Requirement> {
    vec![Requirement::Errors, Requirement::Latency]
}

/// Limits of a tier.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
}

/// What is said of one tenant.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantPolicy {
    /// The tenant's tier.
    pub tier: Option<String>,
    /// Limits on errors.
    #[serde(default)]
    pub errors: ErrorLimits,
    /// Limits on latency.
    #[serde(default)]
    pub latency: LatencyLimits,
}

/// Limits on errors; what is absent comes from the next level up.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorLimits {
    /// Highest share of failing requests that the SLA allows.
    pub max_rate: Option<Rate>,
    /// How much higher than the live baseline's the canary's error rate may be.
    pub max_increase: Option<PercentagePoints>,
    /// How many times the live baseline's error rate is tolerated.
    pub max_ratio: Option<Ratio>,
}

/// Limits on latency; what is absent comes from the next level up.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatencyLimits {
    /// At most one request in a hundred may take longer.
    pub p99: Option<Span>,
    /// How much slower than the live baseline is tolerated.
    pub margin: Option<Share>,
}

/// Limits on the connection pool.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolLimits {
    /// Highest share of acquires that may have to wait.
    pub max_wait_rate: Rate,
}

/// How a rollout is judged.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Probability with which a healthy rollout may be halted, over its whole length.
    #[serde(default = "one_percent")]
    pub alpha: Rate,
    /// Health score below which a rollout is rolled back.
    #[serde(default = "score_of_95")]
    pub rollback_threshold: Share,
    /// What must have been seen before APPROVE.
    #[serde(default)]
    pub min_coverage: MinCoverage,
    /// Windows that must have been judged before APPROVE.
    #[serde(default = "three")]
    pub min_windows: u32,
    /// Tenants that must be judged on enough requests before APPROVE.
    #[serde(default)]
    critical: Vec<Tenant>,
}

const fn one_percent() -> Rate {
    Rate { ppb: 10_000_000 }
}

const fn score_of_95() -> Share {
    Share { ppm: 950_000 }
}

const fn three() -> u32 {
    3
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            alpha: one_percent(),
            rollback_threshold: score_of_95(),
            min_coverage: MinCoverage::default(),
            min_windows: three(),
            critical: Vec::new(),
        }
    }
}

impl Rollout {
    /// Tenants that must be judged on enough requests before APPROVE.
    pub fn critical(&self) -> impl Iterator<Item = &TenantName> {
        self.critical.iter().map(|tenant| &tenant.0)
    }
}

/// What must have been seen before APPROVE.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MinCoverage {
    /// Share of the canary's requests that belong to tenants with enough requests and no suspicion.
    #[serde(default = "ninety_percent")]
    pub traffic: Share,
    /// Share of the expected agents that reported.
    #[serde(default = "ninety_percent")]
    pub agents: Share,
    /// Canary requests from which a tenant counts as judged.
    #[serde(default = "twenty")]
    pub requests: u64,
}

const fn ninety_percent() -> Share {
    Share { ppm: 900_000 }
}

const fn twenty() -> u64 {
    20
}

impl Default for MinCoverage {
    fn default() -> Self {
        Self {
            traffic: ninety_percent(),
            agents: ninety_percent(),
            requests: twenty(),
        }
    }
}

/// How thresholds may follow history.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adjust {
    /// Whether thresholds are derived from a frozen digest of earlier windows where there is one.
    pub from_history: bool,
    /// Lowest factor on a limit.
    pub floor: Times,
    /// Highest factor on a limit.
    pub ceiling: Times,
}

impl Policy {
    /// Reads and validates a policy.
    pub fn parse(source: &str) -> Result<Self, PolicyError> {
        if source.len() > MAX_POLICY_BYTES {
            return Err(PolicyError {
                line: 1,
                column: 1,
                message: format!(
                    "the policy has {} bytes; at most {MAX_POLICY_BYTES} are read",
                    source.len()
                ),
            });
        }
        let document: Document =
            serde_saphyr::from_str(source).map_err(|error| PolicyError::from_yaml(&error))?;
        let policy = Self {
            source: source.to_owned(),
            service: document.service.0,
            defaults: document.defaults,
            tiers: document.tiers,
            tenants: document
                .tenants
                .into_iter()
                .map(|(name, policy)| (name.0, policy))
                .collect(),
            rollout: document.rollout,
            adjust: document.adjust,
        };
        policy.check()?;
        Ok(policy)
    }

    /// The judge's window, in milliseconds.
    pub fn window_ms(&self) -> u64 {
        self.defaults.judge_window.micros / 1_000
    }

    /// How many windows fit before the hold deadline; the most that the judge plans for unless told otherwise.
    pub fn planned_windows(&self) -> u32 {
        let windows = self.defaults.hold_deadline.micros / self.defaults.judge_window.micros;
        u32::try_from(windows.clamp(2, 1_000_000)).unwrap_or(1_000_000)
    }

    /// What the policy asks for that this version of the judge reads and does not yet judge.
    pub fn not_judged(&self) -> Vec<&'static str> {
        let mut notes = Vec::new();
        notes.push("defaults.hold_deadline: plans the length of a rollout; a HOLD is not ended by it yet");
        if self.defaults.pool.is_some() {
            notes.push("defaults.pool: waits for a connection are not judged by judge-fx/1");
        }
        let margins = self.tiers.values().map(|tier| tier.latency.margin);
        let margins = margins.chain(self.tenants.values().map(|tenant| tenant.latency.margin));
        if self.defaults.latency.margin.is_some() || margins.flatten().next().is_some() {
            notes.push(
                "latency.margin: latency is judged against p99, not against the live baseline, by judge-fx/1",
            );
        }
        if self.adjust.is_some_and(|adjust| adjust.from_history) {
            notes.push(
                "adjust.from_history: there is no history digest, so thresholds are those of the policy",
            );
        }
        notes
    }

    /// Checks what concerns more than one field.
    fn check(&self) -> Result<(), PolicyError> {
        let fail = |needle: &str, message: String| Err(PolicyError::at(&self.source, needle, message));
        if self.defaults.errors.max_rate.is_none() {
            return fail(
                "defaults",
                "defaults.errors.max_rate is missing; say which error rate the SLA allows, like 1%".into(),
            );
        }
        if self.defaults.required.contains(&Requirement::Latency) && self.defaults.latency.p99.is_none() {
            return fail(
                "required",
                "latency is required, but defaults.latency.p99 is missing; set it, like 350ms, or leave latency out of required".into(),
            );
        }
        let window = self.defaults.judge_window.micros;
        if !window.is_multiple_of(1_000) || !(1_000_000..=600_000_000).contains(&window) {
            return fail(
                "judge_window",
                "judge_window must be whole milliseconds from 1s to 10m".into(),
            );
        }
        if self.defaults.hold_deadline.micros < 2 * window {
            return fail(
                "hold_deadline",
                "hold_deadline must be at least two judge windows".into(),
            );
        }
        if self.rollout.alpha.ppb > 500_000_000 {
            return fail("alpha", "rollout.alpha must be at most 50%; 1% is usual".into());
        }
        if !(500_000..1_000_000).contains(&self.rollout.rollback_threshold.ppm) {
            return fail(
                "rollback_threshold",
                "rollout.rollback_threshold must be from 0.5 to below 1; 0.95 is usual".into(),
            );
        }
        if self.defaults.required.is_empty() {
            return fail(
                "required",
                "defaults.required is empty; say what APPROVE must prove, like [errors, latency]".into(),
            );
        }
        let limits = self
            .tiers
            .values()
            .map(|tier| tier.latency)
            .chain(self.tenants.values().map(|tenant| tenant.latency));
        for limit in limits
            .chain([self.defaults.latency])
            .filter_map(|latency| latency.p99)
        {
            if limit.micros > MAX_LATENCY_US {
                return fail(
                    "p99",
                    "latency.p99 is longer than 128s, the longest latency that is measured".into(),
                );
            }
        }
        if let Some(adjust) = self.adjust
            && (adjust.floor.milli > 1_000 || adjust.ceiling.milli < 1_000)
        {
            return fail(
                "adjust",
                "adjust.floor must be at most 1x and adjust.ceiling at least 1x".into(),
            );
        }
        for (name, tenant) in &self.tenants {
            if let Some(tier) = &tenant.tier
                && !self.tiers.contains_key(tier)
            {
                let known: Vec<_> = self.tiers.keys().map(String::as_str).collect();
                return fail(
                    name.as_str(),
                    format!(
                        "tenant {name} is in tier {tier:?}, which is not under tiers (there are: {})",
                        known.join(", ")
                    ),
                );
            }
        }
        Ok(())
    }
}

impl PolicyError {
    fn from_yaml(error: &serde_saphyr::Error) -> Self {
        let error = error.without_snippet();
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        // The library ends its text with the place, which is shown apart.
        let text = error.to_string();
        let message = match text.rfind(" at line ") {
            Some(at) => text[..at].to_owned(),
            None => text,
        };
        Self {
            line,
            column,
            message,
        }
    }

    /// An error at the first place where `needle` stands as a word of the file.
    fn at(source: &str, needle: &str, message: String) -> Self {
        for (number, line) in source.lines().enumerate() {
            let text = line.split('#').next().unwrap_or("");
            let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
            let is_word = |at: &usize| {
                let before = text.get(..*at).and_then(|before| before.chars().next_back());
                let after = text
                    .get(at + needle.len()..)
                    .and_then(|after| after.chars().next());
                !before.is_some_and(is_name) && !after.is_some_and(is_name)
            };
            if let Some(column) = text.match_indices(needle).map(|(at, _)| at).find(is_word) {
                return Self {
                    line: number as u64 + 1,
                    column: text
                        .get(..column)
                        .map_or(1, |before| before.chars().count() as u64 + 1),
                    message,
                };
            }
        }
        Self {
            line: 1,
            column: 1,
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the module's documentation.
    const EXAMPLE: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 10% }
  pool:    { max_wait_rate: 1% }
  hold_deadline: 30m
  required: [errors, latency]
  judge_window: 10s
tiers:
  gold: { latency: { p99: 250ms } }
tenants:
  acme-corp: { tier: gold, errors: { max_rate: 0.5% } }
rollout: { alpha: 1%, rollback_threshold: 0.95, min_coverage: { traffic: 90%, agents: 90% }, critical: [acme-corp] }
adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
";

    #[test]
    fn the_example_is_read() {
        let policy = Policy::parse(EXAMPLE).unwrap();
        assert_eq!((policy.window_ms(), policy.planned_windows()), (10_000, 180));
        let acme = crate::threshold::Thresholds::of(&policy, &TenantName::parse(b"acme-corp").unwrap());
        assert_eq!(
            (acme.max_rate_ppb, acme.p99_us, acme.max_ratio_milli),
            (5_000_000, Some(250_000), 1_250)
        );
        let other = crate::threshold::Thresholds::default_of(&policy);
        assert_eq!((other.max_rate_ppb, other.p99_us), (10_000_000, Some(350_000)));
        assert_eq!(policy.not_judged().len(), 4);
        assert_eq!(policy.rollout.critical().count(), 1);
    }

    #[test]
    fn a_mistake_is_named_with_its_place() {
        for (from, to, place, hint) in [
            ("judge_window: 10s", "judge_windw: 10s", (10, 3), "judge_windw"),
            ("max_rate: 1%", "max_rate: -1%", (5, 24), "negative"),
            ("max_rate: 1%", "max_rate: 1", (5, 24), "like 1% or 500ppm"),
            ("p99: 350ms", "p99: 350", (6, 19), "350ms"),
            ("p99: 350ms, ", "", (9, 3), "defaults.latency.p99 is missing"),
            ("coalmine.dev/v1", "coalmine.dev/v2", (1, 13), "coalmine.dev/v2"),
            ("tier: gold", "tier: golden", (14, 3), "(there are: gold)"),
            ("max_rate: 1%, ", "", (4, 1), "max_rate is missing"),
            (
                "judge_window: 10s",
                "judge_window: 10ms",
                (10, 3),
                "from 1s to 10m",
            ),
            ("alpha: 1%", "alpha: 60%", (15, 12), "at most 50%"),
            (
                "critical: [acme-corp]",
                "critical: [\"a b\"]",
                (15, 105),
                "character ' '",
            ),
            ("floor: 0.5x", "floor: 2x", (16, 1), "at most 1x"),
            (
                "hold_deadline: 30m",
                "hold_deadline: 30m\n  hold_deadline: 31m",
                (9, 3),
                "duplicate",
            ),
        ] {
            let text = EXAMPLE.replace(from, to);
            assert_ne!(text, EXAMPLE, "{from}");
            let error = Policy::parse(&text).unwrap_err();
            assert!(error.message.contains(hint), "{error} does not say {hint:?}");
            assert_eq!((error.line, error.column), place, "{error}");
        }
        let long = EXAMPLE.replace("acme-corp:", &format!("{}:", "x".repeat(200)));
        let error = Policy::parse(&long).unwrap_err();
        assert!(
            error.message.contains("200 bytes long") && error.line == 14,
            "{error}"
        );
    }
}
