//! Why a pod stays without an agent: because it did not ask for one, or because it would go wrong.

use super::{AGENT, Setting, setting::PREFIX};

/// Most characters of somebody else's text in a sentence.
const MAX_SHOWN: usize = 80;

/// Most characters of an explanation that may itself quote somebody else's text.
const MAX_WHY: usize = 400;

/// Why there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unchanged {
    /// The pod does not ask for an agent.
    #[error("the pod's label coalmine.dev/inject is not \"enabled\"")]
    NotOptedIn,
    /// The agent is there.
    #[error("the agent was injected before")]
    AlreadyInjected,
    /// The manifest makes its pods from another's template.
    #[error("the manifest has no pod template of its own")]
    NoTemplate,
    /// An API server asks about something else.
    #[error("the request does not make a pod")]
    NotANewPod,
}

/// Why a pod that asks for an agent does not get one. Its text is for whoever wrote the pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not what Kubernetes calls a pod.
    #[error("{}; correct the pod", clipped(.0, MAX_WHY))]
    Malformed(String),
    /// The label has a value that means nothing.
    #[error("the label coalmine.dev/inject is {}; say enabled or disabled", shown(.0))]
    UnknownInject(String),
    /// The pod's ports are the node's.
    #[error(
        "the pod has hostNetwork: true, so that the agent's ports would be the node's; run it on the pod network"
    )]
    HostNetwork,
    /// The API server has only a copy of the pod.
    #[error(
        "the pod is a mirror of one from a file on its node, and cannot be changed here; inject into the file"
    )]
    MirrorPod,
    /// The pod comes from a file or a URL of its node.
    #[error("the pod is a static one, which its node starts from {}; inject into the source", shown(.0))]
    StaticPod(String),
    /// The agent is a Linux program.
    #[error(
        "the pod is for Windows, and the agent runs on Linux only; leave the label coalmine.dev/inject out"
    )]
    Windows,
    /// Nobody said which side the pod is on.
    #[error("the pod has no label coalmine.dev/arm; say canary, baseline or flagger")]
    NoArm,
    /// There is no such side.
    #[error("the label coalmine.dev/arm is {}; say canary, baseline or flagger", shown(.0))]
    UnknownArm(String),
    /// Nobody said what is measured.
    #[error(
        "the service cannot be told; give the pod the label app.kubernetes.io/name or the annotation coalmine.dev/service"
    )]
    NoService,
    /// Nobody said which version it is.
    #[error(
        "the version cannot be told; give the pod the label app.kubernetes.io/version or the annotation coalmine.dev/version"
    )]
    NoVersion,
    /// A label that names the service or the version has a value that is no name.
    #[error("the label {label} {}; set the annotation coalmine.dev/{}", clipped(.why, MAX_WHY), .instead.as_str())]
    BadLabel {
        /// The label.
        label: &'static str,
        /// What is wrong.
        why: String,
        /// The setting that takes its place.
        instead: Setting,
    },
    /// There is no such setting.
    #[error("{} is no setting; known are {}", annotation(.0), Setting::list())]
    UnknownSetting(String),
    /// A setting has a value that cannot be used.
    #[error("coalmine.dev/{} {}", .setting.as_str(), clipped(.why, MAX_WHY))]
    BadSetting {
        /// The setting.
        setting: Setting,
        /// What is wrong, and what to say instead.
        why: String,
    },
    /// The pod declares no port.
    #[error(
        "no container declares a port; give the application's a name and let the Service's targetPort say it"
    )]
    NoPort,
    /// The pod does not declare the port that was asked for.
    #[error("no container declares the port {} of coalmine.dev/port; say one that is declared", shown(.0))]
    NoSuchPort(String),
    /// Several ports may be meant.
    #[error("the application's port cannot be told: there are {}; say which in the annotation coalmine.dev/port",
            clipped(.0, MAX_WHY))]
    AmbiguousPort(String),
    /// The port has no name that the agent could take over.
    #[error(
        "port {0} has no name, and the agent gets in the path by taking the name over; name it, and let the Service's targetPort say the name"
    )]
    UnnamedPort(u16),
    /// The agent relays TCP.
    #[error("port {number} is for {}, and the agent relays TCP only; choose another with coalmine.dev/port", shown(.protocol))]
    NotTcp {
        /// The port.
        number: u16,
        /// Its protocol.
        protocol: String,
    },
    /// Requests to the node's port would pass by the agent.
    #[error("port {0} has a hostPort, and requests to it would pass by the agent; take the hostPort out")]
    HostPort(u16),
    /// The agent's own port is in use.
    #[error("the container {} uses port {number}, which is the agent's; give either of them another", shown(.container))]
    ReservedPort {
        /// The port.
        number: u16,
        /// Who uses it.
        container: String,
    },
    /// A port's name would be there twice.
    #[error("the port name {} of the container {} {why}", shown(.name), shown(.container))]
    PortName {
        /// The name.
        name: String,
        /// Who has it.
        container: String,
        /// Why that cannot be.
        why: &'static str,
    },
    /// The agent's name is taken.
    #[error(
        "the pod has a container {AGENT} that was not injected; take it out, or leave the label coalmine.dev/inject out"
    )]
    ContainerName,
    /// The name of one of the agent's volumes is taken.
    #[error("the pod has a volume {}, whose name is kept for what is injected; give it another", shown(.0))]
    VolumeName(String),
    /// The pod says what it needs as a whole, and the agent's part cannot be added.
    #[error(
        "the pod's resources.{place} is {}, to which the agent's own cannot be added; give an amount as in 500m, 1.5 or 512Mi",
        shown(.amount)
    )]
    PodResources {
        /// Which amount, as in `requests.cpu`.
        place: String,
        /// What it is.
        amount: String,
    },
    /// As an ordinary container the agent would keep the pod from ever ending.
    #[error(
        "the pod is to end by itself (restartPolicy {}), and would not while an ordinary container runs; use native sidecars",
        shown(.0)
    )]
    NeverEnds(String),
}

// === impl Unchanged ===

impl Unchanged {
    /// Its name for machines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotOptedIn => "not_opted_in",
            Self::AlreadyInjected => "already_injected",
            Self::NoTemplate => "no_template",
            Self::NotANewPod => "not_a_new_pod",
        }
    }
}

// === impl Refusal ===

impl Refusal {
    /// Its name for machines.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed_pod",
            Self::UnknownInject(_) => "unknown_inject",
            Self::HostNetwork => "host_network",
            Self::MirrorPod => "mirror_pod",
            Self::StaticPod(_) => "static_pod",
            Self::Windows => "windows_pod",
            Self::NoArm => "no_arm",
            Self::UnknownArm(_) => "unknown_arm",
            Self::NoService => "no_service",
            Self::NoVersion => "no_version",
            Self::BadLabel { .. } => "bad_label",
            Self::UnknownSetting(_) => "unknown_setting",
            Self::BadSetting { .. } => "bad_setting",
            Self::NoPort => "no_port",
            Self::NoSuchPort(_) => "no_such_port",
            Self::AmbiguousPort(_) => "ambiguous_port",
            Self::UnnamedPort(_) => "needs_named_port",
            Self::NotTcp { .. } => "not_tcp",
            Self::HostPort(_) => "host_port",
            Self::ReservedPort { .. } => "reserved_port",
            Self::PortName { .. } => "port_name_conflict",
            Self::ContainerName => "container_name_conflict",
            Self::VolumeName(_) => "volume_name_conflict",
            Self::PodResources { .. } => "pod_resources",
            Self::NeverEnds(_) => "needs_native_sidecar",
        }
    }

    pub(super) fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed(what.into())
    }
}

/// Somebody else's text in quotes: without control characters, and not longer than a line takes.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The annotation of a setting, whether there is such a setting or not.
fn annotation(name: &str) -> String {
    shown(&format!("{PREFIX}{name}"))
}

pub(super) fn clipped(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
