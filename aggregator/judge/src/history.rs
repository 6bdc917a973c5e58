//! The history digest: what approved rollouts of a service have shown, frozen into one JSON object.
//!
//! ```json
//! {"arm_difference_millibuckets":310,"arm_difference_tenants":42,"first_ms":1700000000000,"last_ms":1700600000000,
//!  "rollouts":6,"service":"checkout","sources":["<64 hex>"],"tenants":{"acme-corp":{"error_p90_ppb":3100000,
//!  "p99_us":181020,"requests":1200000,"rollouts":6,"windows":900}},"v":1,"windows":1080}
//! ```
//!
//! `coalmine policy learn` makes it from a decision log, a person reviews it and gives it to the aggregator, and a
//! rollout pins it at its start by its digest. Nothing is learned while a canary is judged.
//!
//! Limits of a tenant come from the **baseline** arm alone, so that a canary cannot teach its own limits:
//!
//! * `error_p90_ppb`: windows that follow one another are added up until they have [`GROUP_REQUESTS`] requests; of
//!   the groups' error rates, the one that nine in ten do not exceed. What is left over is not used.
//! * `p99_us`: the upper edge of the bucket that holds the 0.99 quantile of all latencies.
//!
//! `arm_difference_millibuckets` says how far two arms of a healthy rollout lie apart: the root of the mean square
//! of the difference between the arms' median latencies, in thousandths of a bucket, over tenants and rollouts with
//! at least [`ARM_LATENCIES`] latencies on both arms. `arm_difference_tenants` is how many such differences there were.
//!
//! **Gaps never loosen**: a window that misses an agent on either arm is not learned from.

use std::{collections::BTreeMap, fmt};

use coalmine_proto::{
    histogram::Histogram,
    names::{TenantName, check_name},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{
    chain::Hash,
    evidence::{ArmCounts, Window},
    policy::MAX_LATENCY_US,
    record::canonical,
};

/// Largest digest that is read, in bytes.
pub const MAX_HISTORY_BYTES: usize = 64 << 20;

/// Most tenants that a digest may have.
pub const MAX_TENANTS: usize = 200_000;

/// Baseline requests of one group of windows, of which an error rate is taken.
pub const GROUP_REQUESTS: u64 = 500;

/// Latencies of each arm from which the difference of their medians counts.
pub const ARM_LATENCIES: u64 = 5_000;

/// Differences from which their root mean square is given.
pub const MIN_DIFFERENCES: u64 = 5;

/// Baseline requests from which a tenant is known well enough to move its limits.
pub const KNOWN_REQUESTS: u64 = 1_000;

/// One whole in parts per billion.
const WHOLE_PPB: u64 = 1_000_000_000;

/// Largest difference between two medians: the whole range of the histogram.
const MAX_DIFFERENCE_MILLIBUCKETS: u64 = 431_000;

/// What approved rollouts of a service have shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    /// Version of this form.
    v: u32,
    /// The service.
    pub service: String,
    /// Rollouts that were learned from.
    pub rollouts: u64,
    /// Windows that were learned from.
    pub windows: u64,
    /// Start of the first window, milliseconds since the Unix epoch.
    pub first_ms: u64,
    /// End of the last window, milliseconds since the Unix epoch.
    pub last_ms: u64,
    /// Leaf hash of each rollout's last decision.
    pub sources: Vec<Hash>,
    /// How far the arms of a healthy rollout lie apart, in thousandths of a bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arm_difference_millibuckets: Option<u64>,
    /// Of how many tenants and rollouts that was measured.
    pub arm_difference_tenants: u64,
    /// What is known of each tenant.
    #[serde(deserialize_with = "tenants")]
    pub tenants: BTreeMap<String, TenantHistory>,
}

/// What is known of one tenant, all of it from the baseline arm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantHistory {
    /// Its requests.
    pub requests: u64,
    /// Windows in which it had some.
    pub windows: u64,
    /// Rollouts in which it had some.
    pub rollouts: u64,
    /// The error rate that nine in ten groups of windows do not exceed, in parts per billion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_p90_ppb: Option<u64>,
    /// The latency that 99 in 100 requests do not exceed, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<u64>,
}

/// Why a digest is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// It is no JSON object of this form.
    #[error("{0}")]
    Syntax(String),
    /// A value contradicts another or is out of range.
    #[error("{place}: {problem}")]
    Value {
        /// The field.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Reads the tenants; one that stands twice would make the digest mean two things.
fn tenants<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, TenantHistory>, D::Error> {
    struct Tenants;

    impl<'de> Visitor<'de> for Tenants {
        type Value = BTreeMap<String, TenantHistory>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object with a member for each tenant")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tenants = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                let shown: String = name.chars().take(40).collect();
                TenantName::parse(name.as_bytes())
                    .map_err(|error| A::Error::custom(format!("the tenant's name {shown:?} {error}")))?;
                if tenants.len() == MAX_TENANTS {
                    return Err(A::Error::custom(format!(
                        "there are more than {MAX_TENANTS} tenants"
                    )));
                }
                if tenants.insert(name, map.next_value()?).is_some() {
                    return Err(A::Error::custom(format!("tenant {shown:?} stands twice")));
                }
            }
            Ok(tenants)
        }
    }

    deserializer.deserialize_map(Tenants)
}

impl History {
    /// Reads a digest.
    pub fn parse(text: &str) -> Result<Self, HistoryError> {
        if text.len() > MAX_HISTORY_BYTES {
            return Err(HistoryError::Syntax(format!(
                "the history has {} bytes; at most {MAX_HISTORY_BYTES} are read",
                text.len()
            )));
        }
        let history: Self = serde_json::from_str(text).map_err(|error| {
            HistoryError::Syntax(format!(
                "{error}; a history is what `coalmine policy learn` writes"
            ))
        })?;
        history.check()?;
        Ok(history)
    }

    fn check(&self) -> Result<(), HistoryError> {
        let fail = |place: String, problem: String| Err(HistoryError::Value { place, problem });
        if self.v != 1 {
            return fail(
                "v".into(),
                format!("version {} is not known; this program reads version 1", self.v),
            );
        }
        if let Err(error) = check_name(self.service.as_bytes()) {
            return fail("service".into(), format!("the name {error}"));
        }
        if self.last_ms < self.first_ms {
            return fail("last_ms".into(), "is before first_ms".into());
        }
        let enough = self.arm_difference_tenants >= MIN_DIFFERENCES;
        match self.arm_difference_millibuckets {
            Some(difference) if difference > MAX_DIFFERENCE_MILLIBUCKETS => {
                return fail(
                    "arm_difference_millibuckets".into(),
                    format!(
                        "{difference} is out of range; the histogram has {MAX_DIFFERENCE_MILLIBUCKETS} at most"
                    ),
                );
            }
            difference if difference.is_some() != enough => {
                return fail(
                    "arm_difference_millibuckets".into(),
                    format!(
                        "is given if and only if arm_difference_tenants is at least {MIN_DIFFERENCES}, which is {}",
                        self.arm_difference_tenants
                    ),
                );
            }
            _ => {}
        }
        for (name, tenant) in &self.tenants {
            let place = |field: &str| format!("tenants.{name}.{field}");
            if tenant.windows > self.windows {
                return fail(
                    place("windows"),
                    format!("{} of {} windows", tenant.windows, self.windows),
                );
            }
            if tenant.rollouts > self.rollouts {
                return fail(
                    place("rollouts"),
                    format!("{} of {} rollouts", tenant.rollouts, self.rollouts),
                );
            }
            if let Some(rate) = tenant.error_p90_ppb
                && rate > WHOLE_PPB
            {
                return fail(
                    place("error_p90_ppb"),
                    format!("{rate} is more than {WHOLE_PPB}, which is 100 %"),
                );
            }
            if let Some(p99) = tenant.p99_us
                && !(1..=MAX_LATENCY_US).contains(&p99)
            {
                return fail(
                    place("p99_us"),
                    format!("{p99} is out of range; a latency is from 1 to {MAX_LATENCY_US} microseconds"),
                );
            }
        }
        Ok(())
    }

    /// Writes the digest, without a newline. The same digest always gives the same bytes.
    pub fn to_json(&self) -> String {
        // Integers, strings and lists always convert.
        canonical(&serde_json::to_value(self).unwrap_or_default())
    }

    /// What is known of a tenant, however little.
    pub fn tenant(&self, tenant: &TenantName) -> Option<&TenantHistory> {
        self.tenants.get(tenant.as_str())
    }

    /// The margin that keeps healthy arms apart: three times their usual difference, in whole buckets, rounded up.
    pub fn margin_buckets(&self) -> Option<u64> {
        self.arm_difference_millibuckets
            .map(|difference| difference.saturating_mul(3).div_ceil(1_000))
    }
}

impl TenantHistory {
    /// Whether enough was seen to move the tenant's limits.
    pub fn is_enough(&self) -> bool {
        self.rollouts >= 1 && self.requests >= KNOWN_REQUESTS
    }
}

/// Learns a history, window by window, rollout after rollout.
#[derive(Debug)]
pub struct Learner {
    service: String,
    /// The rollout whose windows come now, until one of them is used.
    source: Option<Hash>,
    sources: Vec<Hash>,
    windows: u64,
    skipped: u64,
    span_ms: Option<(u64, u64)>,
    tenants: BTreeMap<TenantName, Learned>,
    tenants_left_out: u64,
    differences: u64,
    squares: u128,
}

/// What was learned of a tenant so far.
#[derive(Debug, Default)]
struct Learned {
    requests: u64,
    windows: u64,
    rollouts: u64,
    /// Requests and errors of the group that is not full yet.
    group: (u64, u64),
    /// Error rates of the full groups, in parts per billion.
    rates: Vec<u32>,
    baseline: Histogram,
    /// Of the rollout whose windows come now.
    current: Current,
}

#[derive(Debug, Default)]
struct Current {
    is_seen: bool,
    canary: Histogram,
    baseline: Histogram,
}

/// What became of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It was learned from.
    Used,
    /// An agent is missing, so it was not.
    Skipped,
}

impl Learner {
    /// Begins without any rollout.
    pub fn new(service: &str) -> Self {
        Self {
            service: service.to_owned(),
            source: None,
            sources: Vec::new(),
            windows: 0,
            skipped: 0,
            span_ms: None,
            tenants: BTreeMap::new(),
            tenants_left_out: 0,
            differences: 0,
            squares: 0,
        }
    }

    /// The windows that follow are those of the rollout with this leaf hash of its last decision.
    pub fn take_rollout(&mut self, source: Hash) {
        self.end_rollout();
        self.source = Some(source);
    }

    /// Learns from a window, unless it misses an agent.
    pub fn take_window(&mut self, window: &Window) -> Taken {
        let arms = [window.canary, window.baseline];
        if arms
            .iter()
            .any(|arm| arm.expected == 0 || arm.reported < arm.expected)
        {
            self.skipped += 1;
            return Taken::Skipped;
        }
        self.windows += 1;
        self.sources.extend(self.source.take());
        let end_ms = window.start_ms.saturating_add(window.len_ms);
        let (first, last) = self.span_ms.unwrap_or((window.start_ms, end_ms));
        self.span_ms = Some((first.min(window.start_ms), last.max(end_ms)));
        for row in &window.rows {
            // What Coalmine itself puts together is no tenant whose limits could be known.
            if TenantName::parse(row.tenant.as_str().as_bytes()).is_err() {
                continue;
            }
            if !self.tenants.contains_key(&row.tenant) && self.tenants.len() == MAX_TENANTS {
                self.tenants_left_out += 1;
                continue;
            }
            let learned = self.tenants.entry(row.tenant.clone()).or_default();
            learned.take(&row.canary, &row.baseline);
        }
        Taken::Used
    }

    /// Windows that were not learned from, because an agent is missing.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Rows that were not learned from, because there are too many tenants.
    pub fn tenants_left_out(&self) -> u64 {
        self.tenants_left_out
    }

    /// Freezes what was learned.
    pub fn finish(mut self) -> History {
        self.end_rollout();
        let (first_ms, last_ms) = self.span_ms.unwrap_or_default();
        let difference = (self.differences >= MIN_DIFFERENCES)
            .then(|| (self.squares / u128::from(self.differences)).isqrt())
            .map(|root| u64::try_from(root).unwrap_or(u64::MAX));
        let tenants = self
            .tenants
            .into_iter()
            .filter(|(_, learned)| learned.requests > 0)
            .map(|(name, learned)| (name.as_str().to_owned(), learned.finish()));
        History {
            v: 1,
            service: self.service,
            rollouts: self.sources.len() as u64,
            windows: self.windows,
            first_ms,
            last_ms,
            sources: self.sources,
            arm_difference_millibuckets: difference,
            arm_difference_tenants: self.differences,
            tenants: tenants.collect(),
        }
    }

    fn end_rollout(&mut self) {
        for learned in self.tenants.values_mut() {
            if let Some(difference) = learned.end_rollout() {
                self.differences += 1;
                self.squares += u128::from(difference) * u128::from(difference);
            }
        }
    }
}

impl Learned {
    fn take(&mut self, canary: &ArmCounts, baseline: &ArmCounts) {
        if let Some(latency) = &canary.latency {
            self.current.canary.merge(&latency.histogram);
        }
        if baseline.requests == 0 {
            return;
        }
        self.current.is_seen = true;
        if let Some(latency) = &baseline.latency {
            self.current.baseline.merge(&latency.histogram);
        }
        self.requests = self.requests.saturating_add(baseline.requests);
        self.windows += 1;
        let (requests, errors) = &mut self.group;
        *requests = requests.saturating_add(baseline.requests);
        *errors = errors.saturating_add(baseline.errors);
        if *requests >= GROUP_REQUESTS {
            let rate = (u128::from(*errors) * u128::from(WHOLE_PPB)).div_ceil(u128::from(*requests));
            self.rates.push(u32::try_from(rate).unwrap_or(u32::MAX));
            self.group = (0, 0);
        }
    }

    /// Closes the rollout; gives by how many thousandths of a bucket the arms' medians differ, if that is known.
    fn end_rollout(&mut self) -> Option<u64> {
        let current = std::mem::take(&mut self.current);
        self.rollouts += u64::from(current.is_seen);
        self.baseline.merge(&current.baseline);
        let arms = [&current.canary, &current.baseline];
        if arms.iter().any(|arm| arm.count() < ARM_LATENCIES) {
            return None;
        }
        let (canary, baseline) = (median(&current.canary)?, median(&current.baseline)?);
        Some(canary.abs_diff(baseline))
    }

    fn finish(mut self) -> TenantHistory {
        self.rates.sort_unstable();
        let rank = (self.rates.len() * 9).div_ceil(10);
        let p90 = rank.checked_sub(1).and_then(|rank| self.rates.get(rank));
        TenantHistory {
            requests: self.requests,
            windows: self.windows,
            rollouts: self.rollouts,
            error_p90_ppb: p90.map(|ppb| u64::from(*ppb).min(WHOLE_PPB)),
            p99_us: self
                .baseline
                .quantile(990_000)
                .map(|bounds| bounds.upper_ns.div_ceil(1_000).clamp(1, MAX_LATENCY_US)),
        }
    }
}

/// The median's place in thousandths of a bucket, as if values were spread evenly within their bucket; none where
/// it is outside the buckets.
fn median(histogram: &Histogram) -> Option<i64> {
    // Everything is counted in halves, so that half of an odd number is whole.
    let half = u128::from(histogram.count());
    let mut below = 2 * u128::from(histogram.underflow());
    if half <= below {
        return None;
    }
    for (index, count) in histogram.buckets() {
        let count = 2 * u128::from(count);
        if below + count >= half {
            let within = i64::try_from((half - below) * 1_000 / count).ok()?;
            return Some(i64::from(index) * 1_000 + within);
        }
        below += count;
    }
    None
}

#[cfg(test)]
mod tests;
