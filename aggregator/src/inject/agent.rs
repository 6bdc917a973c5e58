//! The agent's container and its volumes, as `deploy/examples/checkout` has them written out.
//!
//! The arm of a pod may change while it runs, since some deploy tools move labels from one arm to the other: the agent
//! follows the labels in a file that the node keeps up to date. Its flags say what holds at the start.

use serde_json::{Map, Value, json};

use super::{ADMIN_PORT_NAME, AGENT, Identity, Setting, Settings, ports::AppPort, setting::Chosen};

/// Where the API server mounts the token of the pod's account into each container that has nothing there. The agent
/// asks the API server nothing, and must not have it.
const ACCOUNT_PLACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The user that the agent's image is made for.
const USER: u32 = 65532;

/// The volume with the pod's labels, and where the agent finds it.
const LABELS_VOLUME: &str = "coalmine-labels";
const LABELS_PLACE: &str = "/etc/coalmine";

/// The volume with the token that the agent presents, and where the agent finds it.
const TOKEN_VOLUME: &str = "coalmine-token";
const TOKEN_PLACE: &str = "/var/run/coalmine";

/// For how long a token is valid; the node renews it in time.
const TOKEN_SECONDS: u32 = 3600;

/// Settings that are a flag of the same name with a value.
const FLAGS: [Setting; 6] = [
    Setting::PoolPort,
    Setting::PoolScrape,
    Setting::IdleTimeout,
    Setting::MaxConnections,
    Setting::MaxTenants,
    Setting::Drain,
];

pub(super) fn container(
    identity: &Identity<'_>,
    port: &AppPort<'_>,
    chosen: &Chosen,
    settings: &Settings,
) -> Value {
    let mut container = json!({
        "name": AGENT,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments(identity, port, chosen, settings),
        "env": [{ "name": "POD_UID", "valueFrom": { "fieldRef": { "fieldPath": "metadata.uid" } } }],
        "ports": [
            { "name": port.name, "containerPort": settings.listen_port },
            { "name": ADMIN_PORT_NAME, "containerPort": settings.admin_port },
        ],
        // Before a native sidecar has started the application does not, so it asks for the agent alone.
        "startupProbe": {
            "httpGet": { "path": "/livez", "port": ADMIN_PORT_NAME },
            "periodSeconds": 1,
            "failureThreshold": 30,
        },
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": ADMIN_PORT_NAME },
            "periodSeconds": 5,
        },
        "resources": resources(chosen),
        "volumeMounts": mounts(settings),
        // What the restricted pod security standard asks of a container, whatever the pod says.
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER,
            "runAsGroup": USER,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    });
    if settings.native_sidecar {
        container["restartPolicy"] = json!("Always");
    }
    container
}

/// What the agent's container mounts.
pub(super) fn volumes(settings: &Settings) -> Vec<Value> {
    let labels = json!({
        "name": LABELS_VOLUME,
        "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] },
    });
    let token = settings.audience.as_ref().map(|audience| {
        let token = json!({ "path": "token", "audience": audience, "expirationSeconds": TOKEN_SECONDS });
        json!({ "name": TOKEN_VOLUME, "projected": { "sources": [{ "serviceAccountToken": token }] } })
    });
    [Some(labels), token].into_iter().flatten().collect()
}

fn mounts(settings: &Settings) -> Vec<Value> {
    let labels = [LABELS_PLACE, ACCOUNT_PLACE].map(|place| (LABELS_VOLUME, place));
    let token = settings.audience.as_ref().map(|_| (TOKEN_VOLUME, TOKEN_PLACE));
    let mounts = labels.into_iter().chain(token);
    mounts
        .map(|(volume, place)| json!({ "name": volume, "mountPath": place, "readOnly": true }))
        .collect()
}

/// Each flag and its value are one argument, so that no value is taken for a flag.
fn arguments(
    identity: &Identity<'_>,
    port: &AppPort<'_>,
    chosen: &Chosen,
    settings: &Settings,
) -> Vec<String> {
    let mut args = vec![
        format!("--listen=0.0.0.0:{}", settings.listen_port),
        format!("--upstream=127.0.0.1:{}", port.number),
        format!("--admin=0.0.0.0:{}", settings.admin_port),
        format!("--aggregator={}", literal(&settings.aggregator)),
        format!("--service={}", literal(identity.service)),
        format!("--version={}", literal(identity.version)),
        format!("--arm={}", identity.arm),
        "--instance=$(POD_UID)".to_owned(),
        format!("--labels-file={LABELS_PLACE}/labels"),
    ];
    if chosen.get(Setting::Version).is_some() {
        // The annotation is the version, whatever the label says.
        args.push("--version-label=".to_owned());
    }
    if settings.audience.is_some() {
        args.push(format!("--token-file={TOKEN_PLACE}/token"));
    }
    let rules = chosen.get(Setting::Tenant).unwrap_or_default();
    let rules = rules.split_whitespace();
    args.extend(rules.map(|rule| format!("--tenant={}", literal(rule))));
    for setting in FLAGS {
        if let Some(value) = chosen.get(setting) {
            args.push(format!("--{}={}", setting.as_str(), literal(value)));
        }
    }
    if chosen.get(Setting::ProxyProtocol) == Some("true") {
        args.push("--proxy-protocol".to_owned());
    }
    args
}

/// Kubernetes puts variables in the place of `$(NAME)` and makes `$$` one `$`: this is for text that is meant as it is.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

fn resources(chosen: &Chosen) -> Value {
    let group = |cpu: Setting, memory: Setting| {
        let given = [("cpu", cpu), ("memory", memory)].into_iter();
        let given = given.filter_map(|(name, setting)| Some((name.to_owned(), json!(chosen.get(setting)?))));
        Value::Object(given.collect::<Map<_, _>>())
    };
    json!({
        "requests": group(Setting::CpuRequest, Setting::MemoryRequest),
        "limits": group(Setting::CpuLimit, Setting::MemoryLimit),
    })
}
