//! Evidence: the frozen input of one step of the judge.
//!
//! One JSON object a line, a line a window. It is the form in which evidence is stored, exported and
//! read by `coalmine judge`:
//!
//! ```json
//! {"v":1,"window":12,"start_ms":1700000000000,"len_ms":10000,
//!  "coverage":{"canary":{"expected":3,"reported":3},"baseline":{"expected":9,"reported":9}},
//!  "rows":[{"tenant":"acme-corp","arm":"canary","requests":107,"errors":3,
//!           "latency":{"scale":4,"offset":-90,"counts":[1,0,4],"over_sla":{"limit_us":350000,"count":1}},
//!           "probes":{"checks":5,"failed":0}}],
//!  "pool":[{"arm":"canary","acquires":200,"waits":1,"timeouts":0,"used":7,"max":10}]}
//! ```
//!
//! `offset` is OpenTelemetry's index of the first count. `latency`, its `over_sla`, `underflow`, `overflow` and
//! `sum_ns`, `probes` (active checks of the tenant), and `pool` may be absent. Rows are written in the order of tenant, then arm.
//!
//! A pool may also say `"at_least":true` (there may have been more waits), `"estimated":true` (requests stand for
//! acquires, which are not counted) and `"agents":3` (so many agents reported one).

use borsh::{BorshDeserialize, BorshSerialize};
use coalmine_proto::{
    histogram::{Histogram, SCALE},
    names::{Arm, TenantName},
};
use serde::{Deserialize, Serialize};

/// Most rows that a window may have: two arms of 200,000 tenants.
pub const MAX_ROWS: usize = 400_000;

/// Longest line of evidence that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 256 << 20;

/// Why evidence is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// The line is no JSON object of this form.
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

/// One window of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Number of the window in its rollout.
    pub number: u64,
    /// Start, milliseconds since the Unix epoch.
    pub start_ms: u64,
    /// Length in milliseconds.
    pub len_ms: u64,
    /// Agents of the canary.
    pub canary: Coverage,
    /// Agents of the baseline.
    pub baseline: Coverage,
    /// What was counted, sorted by tenant.
    pub rows: Vec<TenantWindow>,
    /// Connection pools, as reported.
    pub pool: Vec<Pool>,
    /// What the cluster says of the canary's pods; none where nobody asks it.
    pub pods: Option<Pods>,
}

/// The canary's pods, as the cluster knows them, at the end of one window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pods {
    /// Pods that requests may reach.
    pub canary: u32,
    /// Of these, how many have no agent: what they answer is seen by nobody.
    pub unobserved: u32,
    /// The cluster has not answered for a while, so there may be others.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stale: bool,
}

/// Agents of one arm.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, BorshSerialize, BorshDeserialize,
)]
#[serde(deny_unknown_fields)]
pub struct Coverage {
    /// Agents that should have reported the window.
    pub expected: u32,
    /// Agents that did.
    pub reported: u32,
}

/// Both arms of one tenant in one window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantWindow {
    /// The tenant.
    pub tenant: TenantName,
    /// What the canary's agents counted.
    pub canary: ArmCounts,
    /// What the baseline's agents counted.
    pub baseline: ArmCounts,
}

/// One tenant on one arm in one window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArmCounts {
    /// Requests that count.
    pub requests: u64,
    /// Requests in which the service failed.
    pub errors: u64,
    /// Latency of the requests that were answered, where it was measured.
    pub latency: Option<Latency>,
    /// Active checks.
    pub probes: Probes,
}

/// Active checks of one tenant on one arm in one window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probes {
    /// Checks that were run.
    pub checks: u64,
    /// Of these, how many failed.
    pub failed: u64,
}

/// Latency of one tenant on one arm in one window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latency {
    /// The distribution.
    pub histogram: Histogram,
    /// Requests over a limit, counted exactly by the agents.
    pub over_sla: Option<OverSla>,
}

/// Requests over a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverSla {
    /// The limit, in microseconds.
    pub limit_us: u64,
    /// Requests that took longer.
    pub count: u64,
}

/// A connection pool of one arm in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Whose pool it is.
    #[serde(with = "arm")]
    pub arm: Arm,
    /// Connections that were asked for.
    pub acquires: u64,
    /// Of these, how many had to wait.
    pub waits: u64,
    /// Of these, how many gave up.
    pub timeouts: u64,
    /// Connections in use at the end of the window.
    pub used: u64,
    /// Most connections that the pool may open.
    pub max: u64,
    /// Not all waits were counted: there may have been as many as acquires.
    #[serde(default, skip_serializing_if = "is_false")]
    pub at_least: bool,
    /// Acquires were not counted: requests stand for them, of which there may be more or fewer.
    #[serde(default, skip_serializing_if = "is_false")]
    pub estimated: bool,
    /// Agents that reported a pool; none where nobody has counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<u32>,
}

impl Latency {
    /// Requests that may have taken longer than `limit_us`: what a proof of safety must count.
    pub fn over_at_most(&self, limit_us: u64) -> u64 {
        match self.over_sla {
            Some(over) if over.limit_us == limit_us => over.count,
            _ => self.histogram.count_above(limit_us.saturating_mul(1_000)).at_most,
        }
    }

    /// Requests that surely took longer than `limit_us`: exact where the agents counted against this limit,
    /// else those in buckets wholly above it.
    pub fn over(&self, limit_us: u64) -> u64 {
        match self.over_sla {
            Some(over) if over.limit_us == limit_us => over.count,
            _ => {
                self.histogram
                    .count_above(limit_us.saturating_mul(1_000))
                    .at_least
            }
        }
    }
}

impl ArmCounts {
    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether there was neither a request nor a check.
    pub fn is_idle(&self) -> bool {
        self.requests == 0 && self.probes.checks == 0
    }
}

mod arm {
    use super::{Arm, Deserialize};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: serde::Serializer>(arm: &Arm, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(arm.as_str())
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Arm, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    v: u64,
    window: u64,
    start_ms: u64,
    len_ms: u64,
    coverage: LineCoverage,
    rows: Vec<Row>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pool: Vec<Pool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pods: Option<Pods>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineCoverage {
    canary: Coverage,
    baseline: Coverage,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    tenant: String,
    #[serde(with = "arm")]
    arm: Arm,
    requests: u64,
    errors: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    latency: Option<RowLatency>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    probes: Option<Probes>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowLatency {
    scale: i32,
    offset: i32,
    counts: Vec<u64>,
    #[serde(default, skip_serializing_if = "is_zero")]
    underflow: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    overflow: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    sum_ns: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    over_sla: Option<OverSla>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_false(value: &bool) -> bool {
    !*value
}

impl Window {
    /// Reads one line.
    pub fn from_json(line: &str) -> Result<Self, EvidenceError> {
        if line.len() > MAX_LINE_BYTES {
            return Err(EvidenceError::Syntax(format!(
                "the line has {} bytes; at most {MAX_LINE_BYTES} are read",
                line.len()
            )));
        }
        let line: Line =
            serde_json::from_str(line).map_err(|error| EvidenceError::Syntax(error.to_string()))?;
        let fail = |place: String, problem: String| Err(EvidenceError::Value { place, problem });
        if line.v != 1 {
            return fail(
                "v".into(),
                format!("version {} is not known; this judge reads version 1", line.v),
            );
        }
        if line.len_ms == 0 {
            return fail("len_ms".into(), "a window cannot have length 0".into());
        }
        if line.rows.len() > MAX_ROWS {
            return fail(
                "rows".into(),
                format!("{} rows; at most {MAX_ROWS} are read", line.rows.len()),
            );
        }
        for (name, coverage) in [
            ("canary", line.coverage.canary),
            ("baseline", line.coverage.baseline),
        ] {
            if coverage.reported > coverage.expected {
                return fail(
                    format!("coverage.{name}"),
                    format!(
                        "{} agents reported of {} expected",
                        coverage.reported, coverage.expected
                    ),
                );
            }
        }
        if let Some(Pods {
            canary, unobserved, ..
        }) = line.pods
            && unobserved > canary
        {
            return fail(
                "pods".into(),
                format!("{unobserved} pods without an agent of {canary}"),
            );
        }
        for (index, pool) in line.pool.iter().enumerate() {
            let most = pool.waits.max(pool.timeouts);
            if most > pool.acquires {
                return fail(
                    format!("pool[{index}] ({})", pool.arm),
                    format!("{most} waits or timeouts of {} acquires", pool.acquires),
                );
            }
        }
        let mut halves = Vec::with_capacity(line.rows.len());
        for (index, row) in line.rows.into_iter().enumerate() {
            let (tenant, arm) = (row.tenant.clone(), row.arm);
            match half(row) {
                Ok(half) => halves.push(half),
                Err(problem) => {
                    let shown: String = tenant.chars().take(40).collect();
                    return fail(format!("rows[{index}] (tenant {shown:?}, {arm})"), problem);
                }
            }
        }
        halves.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        let mut rows: Vec<TenantWindow> = Vec::with_capacity(halves.len());
        let mut previous: Option<(TenantName, Arm)> = None;
        for (tenant, arm, counts) in halves {
            if previous.as_ref() == Some(&(tenant.clone(), arm)) {
                return fail(
                    "rows".into(),
                    format!("tenant {tenant} stands twice on the {arm} arm; merge the rows"),
                );
            }
            previous = Some((tenant.clone(), arm));
            if rows.last().is_none_or(|last| last.tenant != tenant) {
                rows.push(TenantWindow {
                    tenant,
                    canary: ArmCounts::default(),
                    baseline: ArmCounts::default(),
                });
            }
            if let Some(last) = rows.last_mut() {
                match arm {
                    Arm::Canary => last.canary = counts,
                    Arm::Baseline => last.baseline = counts,
                }
            }
        }
        Ok(Self {
            number: line.window,
            start_ms: line.start_ms,
            len_ms: line.len_ms,
            canary: line.coverage.canary,
            baseline: line.coverage.baseline,
            rows,
            pool: line.pool,
            pods: line.pods,
        })
    }

    /// Writes the line, without a newline. The same window always gives the same bytes.
    pub fn to_json(&self) -> String {
        let mut rows = Vec::with_capacity(self.rows.len() * 2);
        for row in &self.rows {
            for (arm, counts) in [(Arm::Canary, &row.canary), (Arm::Baseline, &row.baseline)] {
                if !counts.is_empty() {
                    rows.push(Row {
                        tenant: row.tenant.as_str().to_owned(),
                        arm,
                        requests: counts.requests,
                        errors: counts.errors,
                        latency: counts.latency.as_ref().map(RowLatency::of),
                        probes: (counts.probes != Probes::default()).then_some(counts.probes),
                    });
                }
            }
        }
        let line = Line {
            v: 1,
            window: self.number,
            start_ms: self.start_ms,
            len_ms: self.len_ms,
            coverage: LineCoverage {
                canary: self.canary,
                baseline: self.baseline,
            },
            rows,
            pool: self.pool.clone(),
            pods: self.pods,
        };
        // Integers, strings and lists always serialise.
        serde_json::to_string(&line).unwrap_or_default()
    }
}

impl RowLatency {
    fn of(latency: &Latency) -> Self {
        let (offset, counts) = latency.histogram.contiguous();
        Self {
            scale: SCALE,
            offset,
            counts: counts.to_vec(),
            underflow: latency.histogram.underflow(),
            overflow: latency.histogram.overflow(),
            sum_ns: latency.histogram.sum_ns(),
            over_sla: latency.over_sla,
        }
    }
}

fn half(row: Row) -> Result<(TenantName, Arm, ArmCounts), String> {
    let tenant =
        TenantName::parse_counted(&row.tenant).map_err(|error| format!("the tenant's name {error}"))?;
    if row.errors > row.requests {
        return Err(format!("{} errors among {} requests", row.errors, row.requests));
    }
    let probes = row.probes.unwrap_or_default();
    if probes.failed > probes.checks {
        return Err(format!(
            "probes: {} failed of {} checks",
            probes.failed, probes.checks
        ));
    }
    let latency = match row.latency {
        None => None,
        Some(latency) => {
            if latency.scale != SCALE {
                return Err(format!(
                    "latency.scale is {}; this judge reads scale {SCALE}",
                    latency.scale
                ));
            }
            let histogram = Histogram::from_parts(
                latency.offset,
                &latency.counts,
                latency.underflow,
                latency.overflow,
                latency.sum_ns,
            )
            .map_err(|error| format!("latency: {error}"))?;
            if histogram.count() > row.requests {
                return Err(format!(
                    "{} latencies of {} requests",
                    histogram.count(),
                    row.requests
                ));
            }
            if let Some(over) = latency.over_sla
                && over.count > histogram.count()
            {
                return Err(format!(
                    "latency.over_sla.count is {}, but only {} latencies were counted",
                    over.count,
                    histogram.count()
                ));
            }
            Some(Latency {
                histogram,
                over_sla: latency.over_sla,
            })
        }
    };
    Ok((
        tenant,
        row.arm,
        ArmCounts {
            requests: row.requests,
            errors: row.errors,
            latency,
            probes,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = concat!(
        r#"{"v":1,"window":12,"start_ms":1700000000000,"len_ms":10000,"#,
        r#""coverage":{"canary":{"expected":3,"reported":3},"baseline":{"expected":9,"reported":9}},"#,
        r#""rows":[{"tenant":"acme-corp","arm":"canary","requests":107,"errors":3,"#,
        r#""latency":{"scale":4,"offset":-90,"counts":[1,0,4],"over_sla":{"limit_us":350000,"count":1}}}],"#,
        r#""pool":[{"arm":"canary","acquires":200,"waits":1,"timeouts":0,"used":7,"max":10}]}"#
    );

    #[test]
    fn the_example_reads_and_writes_the_same_bytes() {
        let window = Window::from_json(EXAMPLE).unwrap();
        assert_eq!(window.rows[0].canary.requests, 107);
        assert_eq!(window.rows[0].canary.latency.as_ref().unwrap().over(350_000), 1);
        assert_eq!(window.to_json(), EXAMPLE);
    }

    #[test]
    fn what_is_not_counted_of_a_pool_stands_only_where_it_is_so() {
        let window = Window::from_json(EXAMPLE).unwrap();
        let pool = window.pool[0];
        assert_eq!((pool.at_least, pool.estimated, pool.agents), (false, false, None));
        let said = r#""max":10,"at_least":true,"estimated":true,"agents":3}"#;
        let line = EXAMPLE.replace(r#""max":10}"#, said);
        let window = Window::from_json(&line).unwrap();
        let pool = window.pool[0];
        assert_eq!(
            (pool.at_least, pool.estimated, pool.agents),
            (true, true, Some(3))
        );
        assert_eq!(window.to_json(), line);
    }

    #[test]
    fn rows_are_sorted_and_paired() {
        let line = r#"{"v":1,"window":1,"start_ms":0,"len_ms":1,"coverage":{"canary":{"expected":1,"reported":1},"baseline":{"expected":1,"reported":0}},"rows":[{"tenant":"b","arm":"baseline","requests":2,"errors":0},{"tenant":"a","arm":"canary","requests":1,"errors":1},{"tenant":"b","arm":"canary","requests":3,"errors":0}]}"#;
        let window = Window::from_json(line).unwrap();
        let shape: Vec<_> = window
            .rows
            .iter()
            .map(|row| (row.tenant.as_str(), row.canary.requests, row.baseline.requests))
            .collect();
        assert_eq!(shape, [("a", 1, 0), ("b", 3, 2)]);
    }

    #[test]
    fn bad_evidence_is_refused_with_its_place() {
        let with = |from: &str, to: &str| {
            let line = EXAMPLE.replace(from, to);
            assert_ne!(line, EXAMPLE, "{from} is not in the example");
            Window::from_json(&line).unwrap_err().to_string()
        };
        for (error, hint) in [
            (with("\"v\":1", "\"v\":2"), "v: version 2 is not known"),
            (with("\"len_ms\":10000", "\"len_ms\":0"), "len_ms"),
            (
                with("\"errors\":3", "\"errors\":300"),
                "rows[0] (tenant \"acme-corp\", canary): 300 errors among 107",
            ),
            (with("\"errors\":3", "\"errors\":-3"), "-3"),
            (with("\"scale\":4", "\"scale\":3"), "scale is 3"),
            (with("\"count\":1", "\"count\":9"), "over_sla.count is 9"),
            (with("\"reported\":3", "\"reported\":4"), "coverage.canary"),
            (with("acme-corp", &"x".repeat(200)), "200 bytes long"),
            (with("\"window\"", "\"windows\""), "unknown field `windows`"),
            (
                with("\"arm\":\"canary\",\"req", "\"arm\":\"blue\",\"req"),
                "say canary or baseline",
            ),
            (
                with(
                    "\"errors\":3,",
                    "\"errors\":3,\"probes\":{\"checks\":1,\"failed\":2},",
                ),
                "probes: 2 failed of 1 checks",
            ),
            (
                with("\"waits\":1", "\"waits\":201"),
                "pool[0] (canary): 201 waits or timeouts of 200",
            ),
            (
                with(
                    "\"rows\":[",
                    "\"rows\":[{\"tenant\":\"acme-corp\",\"arm\":\"canary\",\"requests\":1,\"errors\":0},",
                ),
                "stands twice",
            ),
        ] {
            assert!(error.contains(hint), "{error:?} does not say {hint:?}");
        }
    }
}
