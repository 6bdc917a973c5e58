//! Canary configs: one for each policy, by the name of its service, to be read only.

use std::collections::{BTreeMap, BTreeSet};

use coalmine_judge::policy::{Policy, Requirement};
use serde::Serialize;
use utoipa::ToSchema;

use super::answer::JUDGE;
use crate::clock;

/// The group of all metrics, and where they come from.
const GROUP: &str = "coalmine";

/// A policy has no time of its own.
const UPDATED_MS: u64 = 0;

/// A canary config in the list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CanaryConfigSummary {
    id: String,
    name: String,
    /// Always 0.
    updated_timestamp: u64,
    updated_timestamp_iso: String,
    /// The service.
    applications: Vec<String>,
}

/// A canary config.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CanaryConfig {
    id: String,
    name: String,
    description: String,
    config_version: &'static str,
    updated_timestamp: u64,
    updated_timestamp_iso: String,
    applications: Vec<String>,
    judge: ConfiguredJudge,
    metrics: Vec<ConfiguredMetric>,
    /// Empty.
    templates: BTreeMap<String, String>,
    classifier: Classifier,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ConfiguredJudge {
    name: &'static str,
    /// Empty.
    judge_configurations: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ConfiguredMetric {
    name: &'static str,
    query: MetricQuery,
    groups: Vec<&'static str>,
    /// Empty.
    analysis_configurations: BTreeMap<String, String>,
    scope_name: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct MetricQuery {
    r#type: &'static str,
    service_type: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Classifier {
    group_weights: BTreeMap<String, u8>,
}

impl CanaryConfigSummary {
    pub(super) fn of(service: &str) -> Self {
        Self {
            id: service.to_owned(),
            name: service.to_owned(),
            updated_timestamp: UPDATED_MS,
            updated_timestamp_iso: clock::rfc3339(UPDATED_MS),
            applications: vec![service.to_owned()],
        }
    }
}

impl CanaryConfig {
    pub(super) fn of(policy: &Policy) -> Self {
        let CanaryConfigSummary {
            id,
            name,
            updated_timestamp,
            updated_timestamp_iso,
            applications,
        } = CanaryConfigSummary::of(&policy.service);
        Self {
            description: format!(
                "The SLA baseline of {name}, which is judged for each tenant; it is read here, and changed in its file"
            ),
            id,
            name,
            config_version: "1",
            updated_timestamp,
            updated_timestamp_iso,
            applications,
            judge: ConfiguredJudge {
                name: JUDGE,
                judge_configurations: BTreeMap::new(),
            },
            metrics: metrics(policy).into_iter().map(ConfiguredMetric::of).collect(),
            templates: BTreeMap::new(),
            classifier: Classifier {
                group_weights: BTreeMap::from([(GROUP.to_owned(), 100)]),
            },
        }
    }
}

impl ConfiguredMetric {
    fn of(metric: Requirement) -> Self {
        Self {
            name: metric.as_str(),
            query: MetricQuery {
                r#type: GROUP,
                service_type: GROUP,
            },
            groups: vec![GROUP],
            analysis_configurations: BTreeMap::new(),
            scope_name: "default",
        }
    }
}

/// What a policy has judged.
fn metrics(policy: &Policy) -> BTreeSet<Requirement> {
    let always = [Requirement::Errors, Requirement::Latency];
    let pool = policy.defaults.pool.as_ref().map(|_| Requirement::Pool);
    always.into_iter().chain(pool).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout, defaults: { errors: { max_rate: 1% }, required: [errors] } }";

    #[test]
    fn a_policy_is_a_canary_config() {
        let config = |policy: &str| {
            let policy = Policy::parse(policy).unwrap();
            serde_json::to_value(CanaryConfig::of(&policy)).unwrap()
        };
        let names = |config: &serde_json::Value| -> Vec<String> {
            let metrics = config["metrics"].as_array().unwrap().iter();
            metrics
                .map(|metric| metric["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let plain = config(POLICY);
        assert_eq!(plain["id"], "checkout");
        assert_eq!(plain["applications"], serde_json::json!(["checkout"]));
        assert_eq!(plain["updatedTimestampIso"], "1970-01-01T00:00:00Z");
        assert_eq!(plain["judge"]["name"], "coalmine");
        assert_eq!(names(&plain), ["errors", "latency"]);
        let pool = config(&POLICY.replace("errors: {", "pool: { max_wait_rate: 1% }, errors: {"));
        assert_eq!(names(&pool), ["errors", "latency", "pool"]);
    }
}
