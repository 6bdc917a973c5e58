//! What a request says: which canary is meant, compared with what, and between which thresholds it is scored.
//!
//! ```text
//! experiment scope   NAMESPACE/WORKLOAD/VERSION   the version, or the hash of the pod template, as Argo gives it
//!                    VERSION                      the version that agents report, never a hash; it has no slash then
//!                    rollout:ID                   a rollout that is known by its name
//! control scope      the first two, or nothing, or *, for all of the baseline
//! ```
//!
//! Location, step, start and end are read by nobody: what is judged is what the agents count while the rollout is open.

use std::collections::BTreeMap;

use coalmine_proto::names::check_name;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::execution::Thresholds;

/// Longest scope, in bytes: three names and what is between them.
const MAX_SCOPE_BYTES: usize = 512;

/// Stands before the name of a rollout.
const ROLLOUT: &str = "rollout:";

/// Asks for an analysis of a canary. Callers send more than is listed here.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CanaryExecutionRequest {
    /// What to compare, by any names; all of them mean the same canary.
    #[serde(default)]
    scopes: BTreeMap<String, CanaryScopes>,
    thresholds: Option<ScoreThresholds>,
}

/// The two sides of a comparison.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CanaryScopes {
    control_scope: Option<CanaryScope>,
    experiment_scope: Option<CanaryScope>,
}

/// One side of a comparison.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct CanaryScope {
    /// `NAMESPACE/WORKLOAD/VERSION`, `VERSION` or `rollout:ID`.
    scope: Option<String>,
}

/// From which scores on a canary passes, and is at least not failed: whole numbers, `1 <= marginal <= pass - 2 <= 98`.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ScoreThresholds {
    #[schema(value_type = u8)]
    pass: Option<Value>,
    #[schema(value_type = u8)]
    marginal: Option<Value>,
}

/// Asks for an analysis without a pipeline. How long it takes is for the policy of the service to say.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct StandaloneRequest {
    /// What to compare; all of them mean the same canary.
    #[serde(default)]
    scopes: Vec<StandaloneScope>,
    thresholds: Option<ScoreThresholds>,
    /// Must be a number of minutes, and changes nothing.
    #[serde(rename = "lifetimeDurationMins")]
    _lifetime: Option<u32>,
    /// Must be a number of minutes, and changes nothing.
    #[serde(rename = "beginAfterMins")]
    _begin_after: Option<u32>,
    /// Must be a number of minutes, and changes nothing.
    #[serde(rename = "lookbackMins")]
    _lookback: Option<u32>,
    /// Must be a number of minutes, and changes nothing.
    #[serde(rename = "analysisIntervalMins")]
    _interval: Option<u32>,
}

/// What to compare.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct StandaloneScope {
    scope_name: Option<String>,
    control_scope: Option<String>,
    /// `NAMESPACE/WORKLOAD/VERSION`, `VERSION` or `rollout:ID`.
    experiment_scope: Option<String>,
}

/// Where a workload is in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) workload: String,
}

/// The canary that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trial {
    Rollout(String),
    Version {
        version: String,
        place: Option<Place>,
        /// The version to compare with; none for all of the baseline.
        baseline: Option<String>,
    },
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) trial: Trial,
    pub(super) thresholds: Thresholds,
}

impl CanaryExecutionRequest {
    pub(super) fn read(&self) -> Result<Asked, String> {
        let scopes = self.scopes.iter().map(|(name, scopes)| {
            let text = |side: &Option<CanaryScope>| side.as_ref().and_then(|side| side.scope.clone());
            (
                name.as_str(),
                text(&scopes.experiment_scope),
                text(&scopes.control_scope),
            )
        });
        asked(scopes, self.thresholds.as_ref())
    }
}

impl StandaloneRequest {
    pub(super) fn read(&self) -> Result<Asked, String> {
        let scopes = self.scopes.iter().map(|scope| {
            let name = scope.scope_name.as_deref().unwrap_or("default");
            (name, scope.experiment_scope.clone(), scope.control_scope.clone())
        });
        asked(scopes, self.thresholds.as_ref())
    }
}

/// Reads scopes by their names: experiment and control.
fn asked<'s>(
    scopes: impl Iterator<Item = (&'s str, Option<String>, Option<String>)>,
    thresholds: Option<&ScoreThresholds>,
) -> Result<Asked, String> {
    let mut meant: Option<(&str, Trial)> = None;
    for (name, experiment, control) in scopes {
        let trial = trial(experiment.as_deref(), control.as_deref());
        let trial = trial.map_err(|problem| format!("scope {name:.40?}: {problem}"))?;
        match &meant {
            None => meant = Some((name, trial)),
            Some((_, first)) if *first == trial => {}
            Some((first, _)) => {
                return Err(format!(
                    "scopes {first:.40?} and {name:.40?} mean different canaries or baselines; one request is about one \
                     canary, so give all scopes the same ones"
                ));
            }
        }
    }
    let (_, trial) =
        meant.ok_or("there are no scopes; give one whose experiment scope names the canary's version")?;
    let thresholds = thresholds.ok_or("thresholds are missing; give pass and marginal")?;
    let thresholds = Thresholds::read(thresholds.pass.as_ref(), thresholds.marginal.as_ref())?;
    Ok(Asked { trial, thresholds })
}

fn trial(experiment: Option<&str>, control: Option<&str>) -> Result<Trial, String> {
    let experiment = experiment.unwrap_or_default();
    if let Some(id) = experiment.strip_prefix(ROLLOUT) {
        check_length(experiment)?;
        return Ok(Trial::Rollout(id.to_owned()));
    }
    let (place, version) =
        version(experiment).map_err(|problem| format!("the experiment's scope {problem}"))?;
    let baseline = match control.unwrap_or_default() {
        "" | "*" => None,
        control if control.starts_with(ROLLOUT) => None,
        control => {
            let read = self::version(control);
            Some(
                read.map_err(|problem| format!("the control's scope {problem}"))?
                    .1,
            )
        }
    };
    Ok(Trial::Version {
        baseline: baseline.filter(|baseline| *baseline != version),
        version,
        place,
    })
}

fn version(text: &str) -> Result<(Option<Place>, String), String> {
    check_length(text)?;
    let mut parts = text.splitn(3, '/');
    let (place, version) = match (parts.next(), parts.next(), parts.next()) {
        (Some(version), None, None) => (None, version),
        (Some(namespace), Some(workload), Some(version)) if !namespace.is_empty() && !workload.is_empty() => {
            let place = Place {
                namespace: namespace.to_owned(),
                workload: workload.to_owned(),
            };
            (Some(place), version)
        }
        _ => {
            return Err(format!(
                "is {text:.60?}; give NAMESPACE/WORKLOAD/VERSION, or a VERSION without a slash, or rollout:ID"
            ));
        }
    };
    check_name(version.as_bytes()).map_err(|error| format!("has a version that {error}"))?;
    Ok((place, version.to_owned()))
}

fn check_length(scope: &str) -> Result<(), String> {
    if scope.len() > MAX_SCOPE_BYTES {
        return Err(format!(
            "has {} bytes; at most {MAX_SCOPE_BYTES} are allowed",
            scope.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(scopes: &Value) -> Result<Trial, String> {
        let body = json!({ "scopes": scopes, "thresholds": { "pass": 95, "marginal": 75 } });
        let request: CanaryExecutionRequest = serde_json::from_value(body).unwrap();
        request.read().map(|asked| asked.trial)
    }

    fn of_version(version: &str, place: Option<(&str, &str)>, baseline: Option<&str>) -> Trial {
        Trial::Version {
            version: version.to_owned(),
            place: place.map(|(namespace, workload)| Place {
                namespace: namespace.to_owned(),
                workload: workload.to_owned(),
            }),
            baseline: baseline.map(str::to_owned),
        }
    }

    #[test]
    fn scopes_name_a_canary() {
        let shop = Some(("shop", "checkout"));
        for (experiment, control, expected) in [
            ("v2", json!(null), of_version("v2", None, None)),
            ("v2", json!({}), of_version("v2", None, None)),
            ("v2", json!({ "scope": null }), of_version("v2", None, None)),
            ("v2", json!({ "scope": "*" }), of_version("v2", None, None)),
            ("v2", json!({ "scope": "v2" }), of_version("v2", None, None)),
            ("v2", json!({ "scope": "v1" }), of_version("v2", None, Some("v1"))),
            (
                "shop/checkout/6d4f8b9c7d",
                json!({ "scope": "shop/checkout/5c9d7f4b8" }),
                of_version("6d4f8b9c7d", shop, Some("5c9d7f4b8")),
            ),
            (
                "shop/checkout/feature/x",
                json!({ "scope": "shop/checkout/feature/x" }),
                of_version("feature/x", shop, None),
            ),
            (
                "rollout:checkout-v2-17",
                json!({ "scope": "a/b" }),
                Trial::Rollout("checkout-v2-17".to_owned()),
            ),
        ] {
            let pair =
                json!({ "experimentScope": { "scope": experiment, "step": 60 }, "controlScope": control });
            let read = read(&json!({ "default": pair.clone(), "other": pair }));
            assert_eq!(read, Ok(expected), "{experiment} against {control}");
        }
    }

    #[test]
    fn a_request_that_is_not_about_one_canary_is_refused() {
        let scope = |experiment: &str, control: &str| json!({ "experimentScope": { "scope": experiment }, "controlScope": { "scope": control } });
        let long = "v".repeat(MAX_SCOPE_BYTES + 1);
        let long_version = "v".repeat(129);
        for (scopes, problem) in [
            (json!({}), "there are no scopes"),
            (json!({ "a": {} }), "is empty"),
            (json!({ "a": scope("", "") }), "is empty"),
            (
                json!({ "a": scope("shop/v2", "") }),
                "is \"shop/v2\"; give NAMESPACE",
            ),
            (json!({ "a": scope("/checkout/v2", "") }), "give NAMESPACE"),
            (json!({ "a": scope("shop//v2", "") }), "give NAMESPACE"),
            (json!({ "a": scope("shop/checkout/", "") }), "is empty"),
            (json!({ "a": scope("v 2", "") }), "has the character"),
            (json!({ "a": scope("v2", "v 1") }), "the control's scope"),
            (json!({ "a": scope(&long, "") }), "at most 512"),
            (
                json!({ "a": scope(&format!("rollout:{long}"), "") }),
                "at most 512",
            ),
            (json!({ "a": scope(&long_version, "") }), "129 bytes"),
            (
                json!({ "a": scope("v2", ""), "b": scope("v3", "") }),
                "scopes \"a\" and \"b\"",
            ),
            (
                json!({ "a": scope("v2", "v1"), "b": scope("v2", "v0") }),
                "different canaries",
            ),
        ] {
            let refused = read(&scopes).unwrap_err();
            assert!(refused.contains(problem), "{scopes}: {refused}");
        }
        let without: CanaryExecutionRequest =
            serde_json::from_value(json!({ "scopes": { "a": scope("v2", "") } })).unwrap();
        assert!(without.read().unwrap_err().contains("thresholds are missing"));
    }

    #[test]
    fn a_standalone_request_is_read_alike() {
        let body = json!({
            "scopes": [{ "experimentScope": "shop/checkout/v2", "controlScope": "v1", "startTimeIso": "2026-01-01T00:00:00Z" }],
            "thresholds": { "pass": 95.0, "marginal": "75" },
            "lifetimeDurationMins": 60,
            "siteLocal": { "any": ["thing"] },
        });
        let request: StandaloneRequest = serde_json::from_value(body).unwrap();
        let expected = Asked {
            trial: of_version("v2", Some(("shop", "checkout")), Some("v1")),
            thresholds: Thresholds::new(95, 75).unwrap(),
        };
        assert_eq!(request.read(), Ok(expected));
        for minutes in [json!(-1), json!("soon"), json!(1.5)] {
            let body = json!({ "lifetimeDurationMins": minutes });
            assert!(serde_json::from_value::<StandaloneRequest>(body).is_err());
        }
    }
}
