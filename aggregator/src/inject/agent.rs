//! The agent's container, as `deploy/examples/checkout` has it written out.

use serde_json::{Map, Value, json};

use super::{ADMIN_PORT_NAME, AGENT, Identity, Setting, Settings, ports::AppPort, setting::Chosen};

/// The user that the agent's image is made for.
const USER: u32 = 65532;

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
    ];
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
