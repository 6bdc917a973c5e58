//! The agent, put into a pod: what must change in a pod so that the agent stands in front of the application.
//!
//! [`inject`] is a function of the pod and of [`Settings`], without I/O. A pod asks for the agent by labels:
//! `coalmine.dev/inject: enabled` and `coalmine.dev/arm: canary` or `baseline`; [`Setting`]s are annotations.
//! The answer is a JSON patch, or [`Unchanged`], or a [`Refusal`] with a sentence for whoever wrote the pod: a pod in
//! which the agent would miss requests or break something is not touched at all.
//!
//! ```text
//!        Service, targetPort: http                     Service, targetPort: http
//!                  |                                             |
//!                  v                                             v
//!   app    http  8080                     coalmine-agent    http            15080
//!                                                           coalmine-admin  15090
//!                                                                |
//!                                                                v  127.0.0.1:8080
//!                                         app               coalmine-app    8080   <- probes, by number
//! ```
//!
//! The pod is read as JSON and not as a type of its own, so that fields which this version does not know stay.
//!
//! Read in this order: `setting` (what can be said), `ports` (whose name the agent takes), `agent` (the container and
//! its volumes), `resources` (what the pod needs as a whole), `patch`, `refusal`, `workload` (where pods are in
//! manifests). API servers ask through `admission` (a review and its answer), `certificate` and `server`.

mod admission;
mod agent;
pub(crate) mod certificate;
mod patch;
mod ports;
mod quantity;
mod refusal;
mod resources;
pub(crate) mod server;
mod setting;
mod workload;

use std::collections::BTreeMap;

use coalmine_judge::chain::Hash;
use coalmine_proto::names::{ARM_LABEL, Arm, check_name};
use serde_json::{Map, Value, json};

use self::{
    refusal::shown,
    setting::{Chosen, INJECTED},
};

pub use self::{
    patch::{Op, Operation, PatchError, apply},
    refusal::{Refusal, Unchanged},
    setting::Setting,
    workload::{Outcome, inject_manifest},
};

/// The name of the agent's container.
pub(crate) const AGENT: &str = "coalmine-agent";

/// The name of the agent's port for probes and metrics.
const ADMIN_PORT_NAME: &str = "coalmine-admin";

/// The name that the application's port gets when the agent takes its own.
const APP_PORT_NAME: &str = "coalmine-app";

const INJECT_LABEL: &str = "coalmine.dev/inject";
pub(crate) const SERVICE_LABEL: &str = "app.kubernetes.io/name";
pub(crate) const VERSION_LABEL: &str = "app.kubernetes.io/version";
pub(crate) const VERSION_ANNOTATION: &str = "coalmine.dev/version";

/// What the injector is told for all pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where agents send their windows, as in `http://coalmine.coalmine:7443`.
    pub aggregator: String,
    /// The agent's image.
    pub image: String,
    /// Whether the agent is a native sidecar, an init container that stays (Kubernetes 1.29 and later), or an ordinary
    /// container. A Service finds a named port of a native sidecar from Kubernetes 1.33 on.
    pub native_sidecar: bool,
    /// The agent's port for requests.
    pub listen_port: u16,
    /// Its port for probes and metrics.
    pub admin_port: u16,
    /// Whom agents present a token of their pod's account to; without it they present none.
    pub audience: Option<String>,
    /// Values of settings for pods that say nothing of their own.
    pub defaults: BTreeMap<Setting, String>,
}

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Injected {
    /// It gets an agent by these changes.
    Patch(Vec<Operation>),
    /// There is nothing to do.
    Unchanged(Unchanged),
    /// It asks for an agent and cannot have one.
    Refused(Refusal),
}

/// Who a pod is measured as.
struct Identity<'p> {
    arm: Arm,
    service: &'p str,
    version: &'p str,
}

/// Says what must change in a pod, or in the template of one, so that it has an agent.
pub fn inject(pod: &Value, settings: &Settings) -> Injected {
    decide(pod, settings).unwrap_or_else(Injected::Refused)
}

/// Reads a setting and its value from a command line.
pub(crate) fn default_setting(text: &str) -> Result<(Setting, String), String> {
    let bad = "give SETTING=VALUE, as in tenant=header:x-tenant-id";
    let (name, value) = text.split_once('=').ok_or(bad)?;
    let setting = Setting::named(name).ok_or_else(|| format!("there is no setting {name:?}; {bad}"))?;
    Ok((setting, value.to_owned()))
}

fn decide(pod: &Value, settings: &Settings) -> Result<Injected, Refusal> {
    let (labels, annotations) = (map_of(pod, "labels"), map_of(pod, "annotations"));
    if !is_opted_in(labels)? {
        return Ok(Injected::Unchanged(Unchanged::NotOptedIn));
    }
    if annotations.is_none()
        && pod
            .pointer("/metadata/annotations")
            .is_some_and(|it| !it.is_null())
    {
        return Err(Refusal::malformed("annotations of the pod is no map"));
    }
    let none = Value::Null;
    let spec = pod.get("spec").unwrap_or(&none);
    let containers = ports::containers(spec)?;
    let has_agent = containers.iter().any(ports::Container::is_agent);
    if has_agent && annotations.is_some_and(|all| all.contains_key(INJECTED)) {
        return Ok(Injected::Unchanged(Unchanged::AlreadyInjected));
    }
    check_kind(spec, annotations, settings)?;
    if has_agent {
        return Err(Refusal::ContainerName);
    }
    let chosen = Chosen::read(annotations, &settings.defaults)?;
    let identity = Identity {
        arm: arm(labels)?,
        service: name(
            labels,
            SERVICE_LABEL,
            &chosen,
            Setting::Service,
            Refusal::NoService,
        )?,
        version: name(
            labels,
            VERSION_LABEL,
            &chosen,
            Setting::Version,
            Refusal::NoVersion,
        )?,
    };
    let port = ports::choose(&containers, chosen.get(Setting::Port), settings)?;
    let agent = agent::container(&identity, &port, &chosen, settings);
    let volumes = agent::volumes(settings);
    let digest = json!({ "container": &agent, "port": port.describe(), "volumes": &volumes });
    let digest = format!("sha256:{}", Hash::of(digest.to_string().as_bytes()));

    // Paths into lists come before what moves the lists' items.
    let mut patch = Vec::new();
    port.rename(&mut patch);
    add_volumes(spec, volumes, &mut patch)?;
    resources::make_room(spec, &containers, &chosen, &mut patch)?;
    patch.push(add_agent(spec, agent, settings));
    patch.push(annotate(annotations, digest));
    Ok(Injected::Patch(patch))
}

/// A map of the pod's metadata. Where it is none, the API server will say so.
fn map_of<'p>(pod: &'p Value, name: &str) -> Option<&'p Map<String, Value>> {
    pod.get("metadata")?.get(name)?.as_object()
}

fn is_opted_in(labels: Option<&Map<String, Value>>) -> Result<bool, Refusal> {
    match labels.and_then(|labels| labels.get(INJECT_LABEL)) {
        None => Ok(false),
        Some(Value::String(text)) if text == "enabled" => Ok(true),
        Some(Value::String(text)) if text == "disabled" => Ok(false),
        Some(other) => Err(Refusal::UnknownInject(text_of(other))),
    }
}

/// Refuses pods that the agent cannot belong to, whatever their ports are.
fn check_kind(
    spec: &Value,
    annotations: Option<&Map<String, Value>>,
    settings: &Settings,
) -> Result<(), Refusal> {
    let annotation = |name: &str| annotations.and_then(|all| all.get(name));
    if annotation("kubernetes.io/config.mirror").is_some() {
        return Err(Refusal::MirrorPod);
    }
    if let Some(source) = annotation("kubernetes.io/config.source").filter(|source| **source != "api") {
        return Err(Refusal::StaticPod(text_of(source)));
    }
    if spec.get("hostNetwork") == Some(&Value::Bool(true)) {
        return Err(Refusal::HostNetwork);
    }
    if spec.pointer("/os/name").and_then(Value::as_str) == Some("windows") {
        return Err(Refusal::Windows);
    }
    match spec.get("restartPolicy").and_then(Value::as_str) {
        Some(policy @ ("Never" | "OnFailure")) if !settings.native_sidecar => {
            Err(Refusal::NeverEnds(policy.to_owned()))
        }
        _ => Ok(()),
    }
}

fn arm(labels: Option<&Map<String, Value>>) -> Result<Arm, Refusal> {
    let labels = labels.ok_or(Refusal::NoArm)?;
    let text = text_of(labels.get(ARM_LABEL).ok_or(Refusal::NoArm)?);
    let arm = Arm::of_labels(|name| labels.get(name).and_then(Value::as_str));
    arm.and_then(Result::ok).ok_or(Refusal::UnknownArm(text))
}

/// The name of the service or of its version: as the setting says, or the label.
fn name<'c>(
    labels: Option<&'c Map<String, Value>>,
    label: &'static str,
    chosen: &'c Chosen,
    setting: Setting,
    missing: Refusal,
) -> Result<&'c str, Refusal> {
    if let Some(name) = chosen.get(setting) {
        return Ok(name);
    }
    let bad = |why: String| Refusal::BadLabel {
        label,
        why,
        instead: setting,
    };
    let value = labels.and_then(|labels| labels.get(label)).ok_or(missing)?;
    let text = value
        .as_str()
        .ok_or_else(|| bad("is not text; put its value in quotes".to_owned()))?;
    check_name(text.as_bytes()).map_err(|error| bad(error.to_string()))
}

/// A native sidecar is the first to start. An ordinary container is the last, so that the application's stays the one
/// that `kubectl logs` and `kubectl exec` mean.
fn add_agent(spec: &Value, agent: Value, settings: &Settings) -> Operation {
    let has_init = spec.get("initContainers").is_some_and(Value::is_array);
    match (settings.native_sidecar, has_init) {
        (false, _) => Operation::add("/spec/containers/-", agent),
        (true, true) => Operation::add("/spec/initContainers/0", agent),
        (true, false) => Operation::add("/spec/initContainers", json!([agent])),
    }
}

/// The agent's volumes come after the pod's own.
fn add_volumes(spec: &Value, volumes: Vec<Value>, patch: &mut Vec<Operation>) -> Result<(), Refusal> {
    let there = match spec.get("volumes") {
        None | Some(Value::Null) => {
            patch.push(Operation::add("/spec/volumes", Value::Array(volumes)));
            return Ok(());
        }
        Some(Value::Array(there)) => there,
        Some(_) => return Err(Refusal::malformed("volumes of the pod's spec is no list")),
    };
    for volume in volumes {
        let name = volume.get("name");
        if there.iter().any(|other| other.get("name") == name) {
            return Err(Refusal::VolumeName(name.map(text_of).unwrap_or_default()));
        }
        patch.push(Operation::add("/spec/volumes/-", volume));
    }
    Ok(())
}

fn annotate(annotations: Option<&Map<String, Value>>, digest: String) -> Operation {
    match annotations {
        Some(_) => {
            let path = format!("/metadata/annotations/{}", patch::escape(INJECTED));
            Operation::add(path, Value::String(digest))
        }
        None => Operation::add("/metadata/annotations", json!({ INJECTED: digest })),
    }
}

/// Text as it is, anything else as JSON.
fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

// === impl Settings ===

impl Settings {
    /// Settings with which the agent does what it does by default.
    pub fn new(aggregator: impl Into<String>, image: impl Into<String>) -> Self {
        Self {
            aggregator: aggregator.into(),
            image: image.into(),
            native_sidecar: true,
            listen_port: 15080,
            admin_port: 15090,
            audience: None,
            defaults: BTreeMap::new(),
        }
    }

    /// Checks what is the same for all pods. An error says what to write instead.
    pub fn check(&self) -> Result<(), String> {
        let uri = self.aggregator.parse::<http::Uri>().ok();
        let is_url = uri.is_some_and(|uri| {
            let has_host = uri.host().is_some_and(|host| !host.is_empty());
            uri.scheme_str() == Some("http") && has_host && matches!(uri.path(), "" | "/")
        });
        if !is_url {
            let text = shown(&self.aggregator);
            return Err(format!(
                "the aggregator {text} is not a URL as in http://HOST:7443"
            ));
        }
        if self.image.is_empty() || self.image.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(format!("{} is not the name of an image", shown(&self.image)));
        }
        if self.listen_port == self.admin_port || self.listen_port == 0 || self.admin_port == 0 {
            let (listen, admin) = (self.listen_port, self.admin_port);
            return Err(format!(
                "the agent needs two ports, and is given {listen} and {admin}"
            ));
        }
        if let Some(audience) = &self.audience
            && (audience.is_empty() || !audience.bytes().all(|b| b.is_ascii_graphic()))
        {
            let text = shown(audience);
            return Err(format!(
                "{text} is not an audience; give a word or a URL, as in coalmine"
            ));
        }
        for (setting, value) in &self.defaults {
            if matches!(setting, Setting::Service | Setting::Version) {
                let name = setting.as_str();
                return Err(format!(
                    "the {name} is not the same for all pods; it has no default"
                ));
            }
            setting
                .check(value)
                .map_err(|why| format!("the default of {} {why}", setting.as_str()))?;
        }
        Ok(())
    }
}

// === impl Injected ===

impl Injected {
    /// Whether the pod asks for an agent and cannot have one.
    pub const fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

#[cfg(test)]
mod tests;
