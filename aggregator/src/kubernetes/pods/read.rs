//! One pod as the API server tells of it: whether requests may reach it, and what it is measured as. Without I/O.
//!
//! A pod without an agent counts while it is running and is not being deleted, whatever its readiness: requests can
//! reach a pod that is not ready, by its own address or by a Service that publishes such, and nobody would see them.
//! A pod with an agent counts from when it is ready the first time. Before, its agent may be on the way still, and to
//! wait for it would hold a rollout each time that a pod is added. Afterwards it counts while it is not ready too:
//! what its agent has counted is to come.

use coalmine_judge::record::Workload;
use coalmine_proto::names::{Arm, check_name};
use k8s_openapi::{
    api::core::v1::{ContainerState, Pod, PodStatus},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};

use super::RosterPod;
use crate::{
    book::Build,
    inject::{AGENT, SERVICE_LABEL, VERSION_ANNOTATION, VERSION_LABEL},
};

const SERVICE_ANNOTATION: &str = "coalmine.dev/service";

/// With the value `auto` a canary pod begins a rollout.
const ROLLOUT_LABEL: &str = "coalmine.dev/rollout";

/// What the controllers of Rollouts (Argo) and of Deployments call their ReplicaSets after, and the kind of each.
const HASH_LABELS: [(&str, &str); 2] = [
    ("rollouts-pod-template-hash", "Rollout"),
    ("pod-template-hash", "Deployment"),
];

/// The kubelet says first that a pod is not ready in the moment in which it begins with it, give or take a second.
const SAME_MOMENT_MS: u64 = 1_000;

/// A pod that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) service: String,
    pub(super) uid: String,
    pub(super) pod: RosterPod,
}

/// Reads a pod. None is one that no request reaches, or that is of no arm; an error is one that would count, and says
/// why it does not.
pub(super) fn read(pod: &Pod) -> Result<Option<Found>, String> {
    let meta = &pod.metadata;
    let nothing = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&nothing);
    let has_agent = has_agent(pod);
    if !is_running(meta, status) || (has_agent && !may_have_been_ready(status)) {
        return Ok(None);
    }
    let arm = Arm::of_labels(|name| label(meta, name)).and_then(Result::ok);
    let (Some(arm), Some(uid)) = (arm, meta.uid.clone()) else {
        return Ok(None);
    };
    let service = name(meta, "service", SERVICE_ANNOTATION, SERVICE_LABEL)?;
    let version = match name(meta, "version", VERSION_ANNOTATION, VERSION_LABEL) {
        // Requests reach it all the same: it is missed, whatever version is on trial. No version is empty.
        Err(_) if !has_agent => String::new(),
        version => version?,
    };
    let pod = RosterPod {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        build: Build { arm, version },
        has_agent,
        since_ms: since_ms(meta, status, has_agent),
        created_ms: meta.creation_timestamp.as_ref().map_or(0, ms_of),
        workload: workload(meta),
        starts_rollout: arm == Arm::Canary && label(meta, ROLLOUT_LABEL) == Some("auto"),
    };
    Ok(Some(Found { service, uid, pod }))
}

fn is_running(meta: &ObjectMeta, status: &PodStatus) -> bool {
    status.phase.as_deref() == Some("Running") && meta.deletion_timestamp.is_none()
}

fn has_agent(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        let init = spec.init_containers.iter().flatten();
        spec.containers
            .iter()
            .chain(init)
            .any(|container| container.name == AGENT)
    })
}

/// Whether a pod is ready, or was: the condition changes its moment only when it changes. In doubt it was.
fn may_have_been_ready(status: &PodStatus) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    let Some(ready) = conditions.find(|condition| condition.type_ == "Ready") else {
        return true;
    };
    if ready.status == "True" {
        return true;
    }
    match (&ready.last_transition_time, &status.start_time) {
        (Some(changed), Some(began)) => ms_of(changed) > ms_of(began).saturating_add(SAME_MOMENT_MS),
        _ => true,
    }
}

/// Since when requests may reach a pod: the agent's since it is ready, without one since the first container runs.
fn since_ms(meta: &ObjectMeta, status: &PodStatus, has_agent: bool) -> u64 {
    let mut conditions = status.conditions.iter().flatten();
    let ready = conditions.find(|it| has_agent && it.type_ == "Ready" && it.status == "True");
    let ready = ready.and_then(|it| it.last_transition_time.as_ref());
    let containers = status.container_statuses.iter().flatten();
    let begun = containers
        .flat_map(|container| [&container.state, &container.last_state])
        .filter_map(|state| begun_at(state.as_ref()?))
        .min_by_key(|time| ms_of(time));
    let time = ready
        .or(begun)
        .or(status.start_time.as_ref())
        .or(meta.creation_timestamp.as_ref());
    time.map_or(0, ms_of)
}

fn begun_at(state: &ContainerState) -> Option<&Time> {
    let running = state.running.as_ref().and_then(|it| it.started_at.as_ref());
    running.or_else(|| state.terminated.as_ref()?.started_at.as_ref())
}

/// The name of the service or of its version, as the injector finds it: the annotation, or the label.
fn name(meta: &ObjectMeta, what: &str, annotation: &str, label_name: &str) -> Result<String, String> {
    let annotated = meta.annotations.as_ref().and_then(|all| all.get(annotation));
    let (from, text) = match annotated {
        Some(text) => (annotation, Some(text.as_str())),
        None => (label_name, label(meta, label_name)),
    };
    let text = text.ok_or_else(|| {
        let who = who(meta);
        format!("{who} has no {what}; set the label {label_name} or the annotation {annotation}")
    })?;
    check_name(text.as_bytes())
        .map(str::to_owned)
        .map_err(|error| format!("{from} of {} {error}", who(meta)))
}

fn label<'m>(meta: &'m ObjectMeta, name: &str) -> Option<&'m str> {
    meta.labels.as_ref()?.get(name).map(String::as_str)
}

/// Who is to be told of: what made the pod, so that all that are alike are spoken of once.
fn who(meta: &ObjectMeta) -> String {
    let of_pod = || Workload {
        kind: "Pod".to_owned(),
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    };
    let who = workload(meta).unwrap_or_else(of_pod);
    format!("{} {}/{}", who.kind, who.namespace, who.name)
}

/// What made the pod. A ReplicaSet is named after what made it, which the pod itself does not say.
fn workload(meta: &ObjectMeta) -> Option<Workload> {
    let mut owners = meta.owner_references.iter().flatten();
    let owner = owners.find(|owner| owner.controller == Some(true))?;
    let (kind, name) = match owner.kind.as_str() {
        "ReplicaSet" => maker(meta, &owner.name).unwrap_or(("ReplicaSet", owner.name.as_str())),
        kind => (kind, owner.name.as_str()),
    };
    Some(Workload {
        kind: kind.to_owned(),
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: name.to_owned(),
    })
}

fn maker<'m>(meta: &ObjectMeta, replica_set: &'m str) -> Option<(&'static str, &'m str)> {
    HASH_LABELS.into_iter().find_map(|(hash, kind)| {
        let name = replica_set.strip_suffix(label(meta, hash)?)?.strip_suffix('-')?;
        Some((kind, name)).filter(|_| !name.is_empty())
    })
}

/// Milliseconds since the Unix epoch.
fn ms_of(time: &Time) -> u64 {
    u64::try_from(time.0.as_millisecond()).unwrap_or(0)
}
