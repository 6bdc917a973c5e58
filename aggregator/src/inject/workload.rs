//! Pods in manifests: which kinds have them, and where.

use serde_json::Value;

use super::{Injected, Refusal, Settings, Unchanged, apply, inject};

/// Lists within lists beyond which none is looked into.
const MAX_NESTED_LISTS: u32 = 8;

/// What became of a manifest that makes pods.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Its kind.
    pub kind: String,
    /// Its namespace, if it says one.
    pub namespace: Option<String>,
    /// Its name, or what its name begins with.
    pub name: String,
    /// What became of its pod template.
    pub result: Injected,
}

/// Injects into a manifest where it has a pod or the template of one, and into each item of a list. Anything else stays
/// as it is. Says what became of each manifest that makes pods.
pub fn inject_manifest(manifest: &mut Value, settings: &Settings) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    walk(manifest, settings, MAX_NESTED_LISTS, &mut outcomes);
    outcomes
}

fn walk(manifest: &mut Value, settings: &Settings, lists: u32, outcomes: &mut Vec<Outcome>) {
    if is_list(manifest) {
        let items = manifest.get_mut("items").and_then(Value::as_array_mut);
        if let (Some(items), Some(lists)) = (items, lists.checked_sub(1)) {
            for item in items {
                walk(item, settings, lists, outcomes);
            }
        }
        return;
    }
    let Some(place) = template_of(manifest) else {
        return;
    };
    let meta = |key: &str| {
        let text = manifest.get("metadata")?.get(key)?.as_str()?;
        Some(text.to_owned()).filter(|text| !text.is_empty())
    };
    outcomes.push(Outcome {
        kind: text(manifest, "kind").to_owned(),
        namespace: meta("namespace"),
        name: meta("name").or_else(|| meta("generateName")).unwrap_or_default(),
        result: inject_at(manifest, place, settings),
    });
}

fn inject_at(manifest: &mut Value, place: &str, settings: &Settings) -> Injected {
    let Some(pod) = manifest.pointer_mut(place) else {
        return Injected::Unchanged(Unchanged::NoTemplate);
    };
    let result = inject(pod, settings);
    if let Injected::Patch(patch) = &result {
        // All or nothing: a patch that stops half-way leaves no trace.
        let mut patched = pod.clone();
        match apply(&mut patched, patch) {
            Ok(()) => *pod = patched,
            Err(error) => return Injected::Refused(Refusal::malformed(error.to_string())),
        }
    }
    result
}

fn is_list(manifest: &Value) -> bool {
    text(manifest, "apiVersion") == "v1" && text(manifest, "kind") == "List"
}

/// Where the pod of a manifest is (RFC 6901); none for kinds that have none.
fn template_of(manifest: &Value) -> Option<&'static str> {
    let version = text(manifest, "apiVersion");
    let group = version.split_once('/').map_or("", |(group, _)| group);
    match (group, text(manifest, "kind")) {
        ("", "Pod") => Some(""),
        ("apps", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("batch", "Job")
        | ("argoproj.io", "Rollout") => Some("/spec/template"),
        ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

fn text<'m>(manifest: &'m Value, key: &str) -> &'m str {
    manifest.get(key).and_then(Value::as_str).unwrap_or_default()
}

// === impl Outcome ===

impl Outcome {
    /// `injected`, or the name of why not.
    pub const fn as_str(&self) -> &'static str {
        match &self.result {
            Injected::Patch(_) => "injected",
            Injected::Unchanged(why) => why.as_str(),
            Injected::Refused(refusal) => refusal.as_str(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({
            "metadata": { "labels": {
                "coalmine.dev/inject": "enabled",
                "coalmine.dev/arm": "canary",
                "app.kubernetes.io/name": "checkout",
                "app.kubernetes.io/version": "v2",
            } },
            "spec": { "containers": [
                { "name": "app", "ports": [{ "name": "http", "containerPort": 8080 }] },
            ] },
        })
    }

    fn manifest(version: &str, kind: &str, spec: Value) -> Value {
        json!({ "apiVersion": version, "kind": kind, "metadata": { "name": "checkout" }, "spec": spec })
    }

    fn settings() -> Settings {
        Settings::new("http://coalmine.coalmine:7443", "coalmine-agent:dev")
    }

    #[track_caller]
    fn outcome(manifest: &mut Value) -> Outcome {
        let mut outcomes = inject_manifest(manifest, &settings());
        assert_eq!(outcomes.len(), 1);
        outcomes.remove(0)
    }

    #[test]
    fn every_kind_that_makes_pods_is_injected() {
        let template = json!({ "replicas": 2, "template": pod() });
        let job = json!({ "template": pod() });
        for (mut manifest, place) in [
            (
                manifest("apps/v1", "Deployment", template.clone()),
                "/spec/template",
            ),
            (
                manifest("apps/v1", "StatefulSet", template.clone()),
                "/spec/template",
            ),
            (
                manifest("apps/v1", "DaemonSet", template.clone()),
                "/spec/template",
            ),
            (
                manifest("apps/v1", "ReplicaSet", template.clone()),
                "/spec/template",
            ),
            (
                manifest("argoproj.io/v1alpha1", "Rollout", template),
                "/spec/template",
            ),
            (manifest("batch/v1", "Job", job.clone()), "/spec/template"),
            (
                manifest("batch/v1", "CronJob", json!({ "jobTemplate": { "spec": job } })),
                "/spec/jobTemplate/spec/template",
            ),
        ] {
            let before = manifest.clone();
            let done = outcome(&mut manifest);
            assert_eq!((done.as_str(), done.name.as_str()), ("injected", "checkout"));
            let Injected::Patch(patch) = &done.result else {
                panic!("{done:?}")
            };
            let mut expected = before.pointer(place).unwrap().clone();
            apply(&mut expected, patch).unwrap();
            assert_eq!(manifest.pointer(place), Some(&expected));
            // Nothing beside the template has changed.
            *manifest.pointer_mut(place).unwrap() = before.pointer(place).unwrap().clone();
            assert_eq!(manifest, before);
        }
    }

    #[test]
    fn a_pod_is_injected_itself() {
        let mut manifest = pod();
        manifest["apiVersion"] = json!("v1");
        manifest["kind"] = json!("Pod");
        manifest["metadata"]["generateName"] = json!("checkout-");
        manifest["metadata"]["namespace"] = json!("shop");
        let done = outcome(&mut manifest);
        assert_eq!((done.as_str(), done.name.as_str()), ("injected", "checkout-"));
        assert_eq!(done.namespace.as_deref(), Some("shop"));
        assert_eq!(manifest["spec"]["initContainers"][0]["name"], "coalmine-agent");
        assert_eq!(outcome(&mut manifest).as_str(), "already_injected");
    }

    #[test]
    fn the_items_of_lists_are_injected_in_turn() {
        let item = || manifest("apps/v1", "Deployment", json!({ "template": pod() }));
        let service = manifest("v1", "Service", json!({}));
        let inner = json!({ "apiVersion": "v1", "kind": "List", "items": [item()] });
        let mut list =
            json!({ "apiVersion": "v1", "kind": "List", "items": [item(), service.clone(), inner, "?"] });
        let outcomes = inject_manifest(&mut list, &settings());
        let names: Vec<_> = outcomes.iter().map(Outcome::as_str).collect();
        assert_eq!(names, ["injected", "injected"]);
        assert_eq!(list["items"][1], service);
    }

    #[test]
    fn other_kinds_stay_as_they_are() {
        for mut other in [
            json!(null),
            json!("Deployment"),
            json!({ "kind": "Deployment", "spec": { "template": pod() } }),
            manifest("v1", "Service", json!({ "template": pod() })),
            manifest("batch.example.com/v1", "Job", json!({ "template": pod() })),
            json!({ "apiVersion": "v1", "kind": "List" }),
        ] {
            let before = other.clone();
            assert!(inject_manifest(&mut other, &settings()).is_empty(), "{before}");
            assert_eq!(other, before);
        }
    }

    #[test]
    fn a_rollout_of_somebody_elses_template_has_none() {
        let spec = json!({ "workloadRef": { "kind": "Deployment", "name": "checkout" } });
        let mut rollout = manifest("argoproj.io/v1alpha1", "Rollout", spec);
        assert_eq!(outcome(&mut rollout).as_str(), "no_template");
    }
}
