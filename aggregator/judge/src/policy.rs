//! The SLA baseline: the operator's policy for one service, read from YAML.
//!
//! ```yaml
//! apiVersion: coalmine.dev/v1
//! kind: SlaBaseline
//! service: checkout
//! defaults:
//!   errors:  { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
//!   latency: { p99: 350ms, margin: 10% }
//!   pool:    { max_wait_rate: 1%, max_increase: 1pp, max_ratio: 1.25 }
//!   hold_deadline: 30m
//!   on_deadline: rollback
//!   required: [errors, latency]
//!   judge_window: 10s
//! tiers:
//!   gold: { latency: { p99: 250ms } }
//! tenants:
//!   acme-corp: { tier: gold, labels: { region: eu }, errors: { max_rate: 0.5% } }
//! rollout:
//!   alpha: 1%
//!   rollback_threshold: 0.95
//!   warm_up: 30s
//!   min_coverage: { traffic: 90%, agents: 90%, tenants: 0% }
//!   cohorts: [tier, region, tail]
//!   critical: [acme-corp]
//! adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
//! tenant_rules: ["header:x-tenant-id", "path:/t/{tenant}/"]
//! ```
//!
//! Unknown fields are refused; an error names line, column and what to write instead.
//!
//! `tenant_rules` says where the agents find a request's tenant, instead of what they were started with; nothing
//! that is judged depends on it. A rule with braces is quoted, because YAML has a use for them.
//!
//! `limits` has what is said of tenants, `rollout` how a rollout is judged; this file reads both and checks what
//! concerns more than one field.

mod check;
mod limits;
mod rollout;

use std::collections::{BTreeMap, BTreeSet};

use coalmine_proto::{
    names::{TenantName, check_name},
    rule::{Rule, RuleError},
};
use serde::Deserialize;

pub use self::limits::{Defaults, ErrorLimits, LatencyLimits, Limits, OnDeadline, PoolLimits, TenantPolicy};
pub use self::rollout::{Adjust, MinCoverage, Rollout};
use self::rollout::{TAIL, TIER};
use crate::{
    history::History,
    quantity::{buckets, margin_buckets, percent, span},
    threshold::DEFAULT_MARGIN_PPM,
};

/// Longest latency limit, in microseconds: the upper end of the histogram.
pub const MAX_LATENCY_US: u64 = 128_000_000;

/// Most cohorts that a policy may form: they share a part of alpha.
pub const MAX_COHORTS: usize = 1_000;

/// Most margins that a note is made about.
const MAX_MARGINS_NOTED: usize = 10;

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
    /// Where agents find a request's tenant; empty where they follow rules of their own.
    pub tenant_rules: Vec<Rule>,
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
    /// The share of waits for a connection is proven to be below the limit.
    Pool,
}

impl Requirement {
    /// The word as it stands in a policy.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Errors => "errors",
            Self::Latency => "latency",
            Self::Pool => "pool",
        }
    }
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
    tiers: BTreeMap<Name, Limits>,
    #[serde(default)]
    tenants: BTreeMap<Tenant, TenantPolicy>,
    #[serde(default)]
    rollout: Rollout,
    adjust: Option<Adjust>,
    #[serde(default)]
    tenant_rules: Vec<TenantRule>,
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

/// A name that may stand in outcomes and records.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
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

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct TenantRule(Rule);

impl TryFrom<String> for TenantRule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
            .map(Self)
            .map_err(|error: RuleError| error.to_string())
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() > 40 {
        format!("{}...", text.chars().take(40).collect::<String>())
    } else {
        text.to_owned()
    }
}

impl Policy {
    /// Reads and validates a policy.
    pub fn parse(source: &str) -> Result<Self, PolicyError> {
        if source.trim().is_empty() {
            return Err(PolicyError {
                line: 1,
                column: 1,
                message: "the file is empty; a policy begins with apiVersion: coalmine.dev/v1".to_owned(),
            });
        }
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
            tiers: document
                .tiers
                .into_iter()
                .map(|(name, limits)| (name.0, limits))
                .collect(),
            tenants: document
                .tenants
                .into_iter()
                .map(|(name, policy)| (name.0, policy))
                .collect(),
            rollout: document.rollout,
            adjust: document.adjust,
            tenant_rules: document.tenant_rules.into_iter().map(|rule| rule.0).collect(),
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

    /// The cohorts of a tenant, such as `tier:gold` and `region:eu`, in the order of `rollout.cohorts`. Whether it
    /// is in the tail depends on traffic and is not said here.
    pub fn cohorts_of(&self, tenant: &TenantName) -> Vec<String> {
        let Some(own) = self.tenants.get(tenant) else {
            return Vec::new();
        };
        let value = |word: &str| match word {
            TIER => own.tier.as_ref(),
            TAIL => None,
            label => own.labels.get(label),
        };
        self.rollout
            .cohorts()
            .filter_map(|word| Some(format!("{word}:{}", value(word)?)))
            .collect()
    }

    /// All cohorts that have a tenant, sorted; the tail is not among them.
    pub fn cohorts(&self) -> Vec<String> {
        let all: BTreeSet<String> = self
            .tenants
            .keys()
            .flat_map(|tenant| self.cohorts_of(tenant))
            .collect();
        all.into_iter().collect()
    }

    /// Whether the tenants with little traffic form a cohort.
    pub fn has_tail(&self) -> bool {
        self.rollout.cohorts().any(|word| word == TAIL)
    }

    /// Whether limits follow a history where there is one.
    pub fn follows_history(&self) -> bool {
        self.adjust.is_some_and(|adjust| adjust.from_history)
    }

    /// What a user should know about how the policy is judged with this history.
    pub fn notes(&self, history: Option<&History>) -> Vec<String> {
        let mut notes = Vec::new();
        let levels = std::iter::once(self.defaults.latency)
            .chain(self.tiers.values().map(|tier| tier.latency))
            .chain(self.tenants.values().map(|tenant| tenant.latency));
        let mut margins: BTreeSet<u32> = levels.filter_map(|level| Some(level.margin?.ppm)).collect();
        if self.defaults.latency.margin.is_none() {
            margins.insert(DEFAULT_MARGIN_PPM);
        }
        for ppm in margins.into_iter().take(MAX_MARGINS_NOTED) {
            notes.push(format!(
                "latency.margin {} is judged as {}",
                percent(u128::from(ppm) * 1_000),
                buckets(margin_buckets(ppm))
            ));
        }
        match (self.follows_history(), history) {
            (true, None) => notes.push(
                "adjust.from_history: limits follow a history only where one is given with --history"
                    .to_owned(),
            ),
            (false, Some(_)) => notes.push(
                "the history changes nothing: adjust.from_history is not true in the policy".to_owned(),
            ),
            (true, Some(_)) | (false, None) => {}
        }
        for name in self
            .rollout
            .critical()
            .filter(|name| !self.tenants.contains_key(*name))
        {
            notes.push(format!(
                "rollout.critical names {name}, which is not among tenants; check its spelling"
            ));
        }
        if self.rollout.min_windows > self.planned_windows() {
            notes.push(format!(
                "rollout.min_windows {} is more than fits before hold_deadline, so nothing can be approved before it",
                self.rollout.min_windows
            ));
        }
        notes.push(format!(
            "hold_deadline {}: a rollout is planned for {} windows of {}; a HOLD that lasts so long {}",
            span(self.defaults.hold_deadline.micros),
            self.planned_windows(),
            span(self.defaults.judge_window.micros),
            match self.defaults.on_deadline {
                OnDeadline::Rollback => "ends in ROLLBACK",
                OnDeadline::Hold => "stays a HOLD",
                OnDeadline::Approve =>
                    "ends in APPROVE if nothing is suspected and only proof or coverage is missing, else in ROLLBACK",
            }
        ));
        notes
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
        Self::find(source, 0, needle, message.clone()).unwrap_or(Self {
            line: 1,
            column: 1,
            message,
        })
    }

    /// An error at the first place where `needle` stands as a word on the line of the word `field`, or below.
    fn below(source: &str, field: &str, needle: &str, message: String) -> Self {
        let place = Self::at(source, field, message);
        let lines = usize::try_from(place.line - 1).unwrap_or(0);
        Self::find(source, lines, needle, place.message.clone()).unwrap_or(place)
    }

    fn find(source: &str, skip: usize, needle: &str, message: String) -> Option<Self> {
        for (number, line) in source.lines().enumerate().skip(skip) {
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
                return Some(Self {
                    line: number as u64 + 1,
                    column: text
                        .get(..column)
                        .map_or(1, |before| before.chars().count() as u64 + 1),
                    message,
                });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
