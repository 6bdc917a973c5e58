//! Objects of the API server: requests with a limit of time, and errors that say what to do.

use std::time::Duration;

use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams},
};
use serde_json::Value;

use super::{
    notice::cut,
    plan::{Again, Problem},
};
use crate::{
    client::cause,
    inject::{VERSION_ANNOTATION, VERSION_LABEL},
};

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Who makes our changes, in the objects' managed fields.
pub(super) const FIELD_MANAGER: &str = "coalmine";

/// The annotation with the decision that an object was changed for last.
pub(super) const DECISION: &str = "coalmine.dev/decision";

/// More objects than this are not looked through.
const MAX_LISTED: u32 = 500;

/// A kind of objects.
pub(super) struct Kind {
    group: &'static str,
    version: &'static str,
    pub(super) kind: &'static str,
    plural: &'static str,
}

pub(super) const ROLLOUT: Kind = Kind {
    group: "argoproj.io",
    version: "v1alpha1",
    kind: "Rollout",
    plural: "rollouts",
};

pub(super) const CANARY: Kind = Kind {
    group: "flagger.app",
    version: "v1beta1",
    kind: "Canary",
    plural: "canaries",
};

pub(super) const DEPLOYMENT: Kind = Kind {
    group: "apps",
    version: "v1",
    kind: "Deployment",
    plural: "deployments",
};

const REPLICA_SET: Kind = Kind {
    group: "apps",
    version: "v1",
    kind: "ReplicaSet",
    plural: "replicasets",
};

impl Kind {
    fn resource(&self) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, self.version, self.kind);
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }

    pub(super) fn api_version(&self) -> String {
        format!("{}/{}", self.group, self.version)
    }
}

/// The objects of a kind in a namespace. They are JSON, so that fields which this version does not know stay.
pub(super) struct Objects {
    api: Api<DynamicObject>,
    kind: &'static Kind,
    namespace: String,
}

impl Objects {
    pub(super) fn new(client: &Client, kind: &'static Kind, namespace: &str) -> Self {
        Self {
            api: Api::namespaced_with(client.clone(), namespace, &kind.resource()),
            kind,
            namespace: namespace.to_owned(),
        }
    }

    pub(super) async fn get(&self, name: &str) -> Result<DynamicObject, Problem> {
        self.ask("get", "", self.api.get(name)).await
    }

    /// All with these labels, as `name=value,name=value`.
    pub(super) async fn list(&self, labels: &str) -> Result<Vec<DynamicObject>, Problem> {
        let params = ListParams::default().labels(labels).limit(MAX_LISTED);
        let list = self.ask("list", "", self.api.list(&params)).await?;
        if list.metadata.continue_.is_some_and(|token| !token.is_empty()) {
            let text = format!(
                "there are more than {MAX_LISTED} {} with the labels {labels} in namespace {}; remove old ones",
                self.kind.plural, self.namespace
            );
            return Err(Problem::new(text, Again::Slowly));
        }
        Ok(list.items)
    }

    pub(super) async fn patch(&self, name: &str, patch: &Patch<Value>) -> Result<DynamicObject, Problem> {
        let params = params();
        self.ask("patch", "", self.api.patch(name, &params, patch)).await
    }

    pub(super) async fn patch_status(
        &self,
        name: &str,
        patch: &Patch<Value>,
    ) -> Result<DynamicObject, Problem> {
        let params = params();
        self.ask("patch", "/status", self.api.patch_status(name, &params, patch))
            .await
    }

    async fn ask<T>(
        &self,
        verb: &str,
        subresource: &str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Problem> {
        let what = format!("{}.{}{subresource}", self.kind.plural, self.kind.group);
        ask(verb, &what, &self.namespace, request).await
    }
}

fn params() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// Waits for an answer of the API server, but not for ever.
pub(super) async fn ask<T>(
    verb: &str,
    what: &str,
    namespace: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            Err(refused((verb, what, namespace), status.code, &status.message))
        }
        Ok(Err(error)) => {
            let text = format!("cannot {verb} {what} in namespace {namespace}: {}", cause(&error));
            Err(Problem::new(cut(&text), Again::Soon))
        }
        Err(_) => {
            let text = format!(
                "cannot {verb} {what} in namespace {namespace}: no answer within {} s",
                TIMEOUT.as_secs()
            );
            Err(Problem::new(text, Again::Soon))
        }
    }
}

/// What an answer of the API server that is no success means.
fn refused((verb, what, namespace): (&str, &str, &str), code: u16, message: &str) -> Problem {
    if code == 403 {
        let text = format!(
            "the aggregator's account may not {verb} {what} in namespace {namespace}; give it the verb {verb} on \
             {what}: {message}"
        );
        return Problem::new(cut(&text), Again::Slowly);
    }
    let again = match code {
        409 => Again::AtOnce,
        401 | 408 | 425 | 429 | 500..=599 => Again::Soon,
        _ => Again::Slowly,
    };
    let text = format!("cannot {verb} {what} in namespace {namespace} ({code}): {message}");
    Problem::new(cut(&text), again)
}

/// An annotation of an object.
pub(super) fn annotation<'o>(object: &'o DynamicObject, name: &str) -> Option<&'o str> {
    let annotations = object.metadata.annotations.as_ref()?;
    annotations.get(name).map(String::as_str)
}

/// What the template of a workload says of its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carried<'o> {
    /// It is the canary's.
    Canary,
    /// It is another one.
    Other(&'o str),
    /// It says nothing.
    Unknown,
}

/// The version of the pods that an object makes: the annotation comes first, as for the injector.
pub(super) fn carried<'o>(object: &'o DynamicObject, canary_version: &str) -> Carried<'o> {
    let metadata = object.data.pointer("/spec/template/metadata");
    let text = |map: &str, name: &str| -> Option<&'o str> { metadata?.get(map)?.get(name)?.as_str() };
    match text("annotations", VERSION_ANNOTATION).or_else(|| text("labels", VERSION_LABEL)) {
        Some(version) if version == canary_version => Carried::Canary,
        Some(other) => Carried::Other(other),
        None => Carried::Unknown,
    }
}

/// The labels of a workload's ReplicaSets. What else it selects by is left out: they are told by their owner.
fn selector(workload: &DynamicObject) -> String {
    let labels = workload.data.pointer("/spec/selector/matchLabels");
    let labels = labels.and_then(Value::as_object).into_iter().flatten();
    let pairs: Vec<String> = labels
        .filter_map(|(name, value)| Some(format!("{name}={}", value.as_str()?)))
        .collect();
    pairs.join(",")
}

/// The ReplicaSets that may be a workload's; whether one is, `is_owned` says.
pub(super) async fn replica_sets(
    client: &Client,
    workload: &DynamicObject,
    namespace: &str,
) -> Result<Vec<DynamicObject>, Problem> {
    let sets = Objects::new(client, &REPLICA_SET, namespace);
    sets.list(&selector(workload)).await
}

pub(super) fn is_owned(set: &DynamicObject, workload: &DynamicObject) -> bool {
    let owners = set.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    controllers.any(|owner| Some(&owner.uid) == workload.metadata.uid.as_ref())
}

/// Refuses to believe that a workload went back from a version that it never had: then the version is called something
/// else there, and the canary may well be rolled out.
pub(super) fn check_known(
    workload: &DynamicObject,
    sets: &[DynamicObject],
    canary_version: &str,
) -> Result<(), Problem> {
    let is_it =
        |set: &DynamicObject| is_owned(set, workload) && carried(set, canary_version) == Carried::Canary;
    if sets.iter().any(is_it) {
        return Ok(());
    }
    Err(Problem::new(
        format!("no template carries version {canary_version}; give it the label {VERSION_LABEL}"),
        Again::Slowly,
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_refusal_says_what_to_do_and_when_to_try_again() {
        let asked = ("patch", "rollouts.argoproj.io/status", "shop");
        let forbidden = refused(asked, 403, "user x cannot patch");
        assert_eq!(forbidden.again, Again::Slowly);
        assert!(
            forbidden
                .text
                .contains("give it the verb patch on rollouts.argoproj.io/status"),
            "{}",
            forbidden.text
        );
        for (code, again) in [
            (409, Again::AtOnce),
            (429, Again::Soon),
            (500, Again::Soon),
            (503, Again::Soon),
            (401, Again::Soon),
            (404, Again::Slowly),
            (422, Again::Slowly),
        ] {
            assert_eq!(refused(asked, code, "no").again, again, "{code}");
        }
        assert!(refused(asked, 500, &"x".repeat(10_000)).text.len() < 1_000);
    }

    #[test]
    fn the_replica_sets_are_asked_for_by_label() {
        let object = |spec: Value| -> DynamicObject {
            serde_json::from_value(json!({ "metadata": {}, "spec": spec })).unwrap()
        };
        let selects = json!({ "selector": { "matchLabels": { "app": "checkout" } } });
        assert_eq!(selector(&object(selects)), "app=checkout");
        assert_eq!(selector(&object(json!({}))), "");
    }

    #[test]
    fn the_annotation_comes_before_the_label() {
        let object = |metadata: Value| DynamicObject {
            types: None,
            metadata: kube::api::ObjectMeta::default(),
            data: json!({ "spec": { "template": { "metadata": metadata } } }),
        };
        let label = json!({ "labels": { "app.kubernetes.io/version": "v2" } });
        let both = json!({
            "labels": { "app.kubernetes.io/version": "v2" },
            "annotations": { "coalmine.dev/version": "v3" },
        });
        assert_eq!(carried(&object(label), "v2"), Carried::Canary);
        assert_eq!(carried(&object(both.clone()), "v2"), Carried::Other("v3"));
        assert_eq!(carried(&object(both), "v3"), Carried::Canary);
        assert_eq!(carried(&object(Value::Null), "v2"), Carried::Unknown);
    }
}
