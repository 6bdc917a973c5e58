//! What callers ask for, and what is wrong with it.

use coalmine_judge::record::Workload;
use coalmine_proto::names::check_name;
use serde::Deserialize;
use utoipa::ToSchema;

use super::view::View;

/// What a caller asks for.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with; by default all of the baseline arm.
    pub baseline_version: Option<String>,
    /// The same key names the same rollout of the service.
    pub key: Option<String>,
    /// Who asks.
    pub actor: Option<String>,
    /// What is rolled out, so that it can be halted.
    #[schema(value_type = Option<Object>)]
    pub workload: Option<Workload>,
}

/// Which rollouts are meant: all that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Its name.
    pub rollout: Option<String>,
    /// The service.
    pub service: Option<String>,
    /// The version on trial.
    pub version: Option<String>,
    /// The namespace of what is rolled out.
    pub namespace: Option<String>,
    /// The name of what is rolled out, whatever its kind.
    pub workload: Option<String>,
}

impl Question {
    /// Whether it means this rollout.
    pub(super) fn means(&self, view: &View) -> bool {
        let workload = view.workload.as_ref();
        let is =
            |wanted: &Option<String>, found: Option<&str>| wanted.is_none() || wanted.as_deref() == found;
        is(&self.rollout, Some(&view.id))
            && is(&self.service, Some(&view.service))
            && is(&self.version, Some(&view.canary_version))
            && is(
                &self.namespace,
                workload.map(|workload| workload.namespace.as_str()),
            )
            && is(&self.workload, workload.map(|workload| workload.name.as_str()))
    }
}

impl StartRequest {
    /// Says what is wrong with what is asked for.
    pub(super) fn check(&self) -> Result<(), String> {
        for (field, name) in [
            ("service", Some(&self.service)),
            ("canary_version", Some(&self.canary_version)),
            ("baseline_version", self.baseline_version.as_ref()),
            ("key", self.key.as_ref()),
            ("actor", self.actor.as_ref()),
        ] {
            if let Some(name) = name {
                check_name(name.as_bytes()).map_err(|error| format!("{field} {error}"))?;
            }
        }
        if let Some(workload) = &self.workload {
            check_workload(workload)?;
        }
        if self.baseline_version.as_ref() == Some(&self.canary_version) {
            return Err(format!(
                "baseline_version and canary_version are both {}; a version cannot be compared with itself",
                self.canary_version
            ));
        }
        Ok(())
    }
}

/// Kinds of workloads that can be told to stop.
const WORKLOAD_KINDS: [&str; 3] = ["Deployment", "Rollout", "Canary"];

/// Whether a workload can be told to stop.
pub(crate) fn is_haltable(workload: &Workload) -> bool {
    WORKLOAD_KINDS.contains(&workload.kind.as_str())
}

fn check_workload(workload: &Workload) -> Result<(), String> {
    if !is_haltable(workload) {
        return Err(format!(
            "workload.kind is {:.40?}, and must be one of {}",
            workload.kind,
            WORKLOAD_KINDS.join(", ")
        ));
    }
    for (field, name) in [("namespace", &workload.namespace), ("name", &workload.name)] {
        if !is_subdomain(name) {
            return Err(format!(
                "workload.{field} is {name:.40?}; give the {field} of the object as Kubernetes has it"
            ));
        }
    }
    Ok(())
}

/// Whether a name is a DNS subdomain of RFC 1123, as Kubernetes has it: it becomes part of a path.
pub(crate) fn is_subdomain(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let ends = [label.bytes().next(), label.bytes().last()];
        label.bytes().all(|c| is_plain(c) || c == b'-') && ends.into_iter().all(|c| c.is_some_and(is_plain))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_can_be_halted_and_is_named_as_kubernetes_names() {
        let check = |kind: &str, namespace: &str, name: &str| {
            let [kind, namespace, name] = [kind, namespace, name].map(str::to_owned);
            check_workload(&Workload {
                kind,
                namespace,
                name,
            })
        };
        for kind in ["Deployment", "Rollout", "Canary"] {
            assert_eq!(check(kind, "shop", "check-out.v2"), Ok(()));
        }
        let refused = check("StatefulSet", "shop", "checkout").unwrap_err();
        assert!(refused.contains("workload.kind"), "{refused}");
        let long = "x".repeat(254);
        for bad in ["", ".", "..", "a/b", "a..b", "-a", "a-", "A", "a_b", &long] {
            let refused = check("Deployment", bad, "a").unwrap_err();
            assert!(refused.contains("workload.namespace"), "{refused}");
            let refused = check("Deployment", "a", bad).unwrap_err();
            assert!(refused.contains("workload.name "), "{refused}");
        }
    }
}
