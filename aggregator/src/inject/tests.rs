//! Pods with the agent: what is added, what is renamed, and that nothing else changes.

mod placement;
mod properties;
mod refusals;
mod resources;
mod reviews;
mod roundtrip;
mod webhook;

use std::{ffi::OsString, time::Duration};

use coalmine_agent::config::{Command, Config};
use coalmine_proto::rule::Rule;

use super::*;

/// A pod that asks for an agent, with the application `app` and its port 8080, called `http`.
fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "checkout-1",
            "labels": {
                "coalmine.dev/inject": "enabled",
                "coalmine.dev/arm": "canary",
                "app.kubernetes.io/name": "checkout",
                "app.kubernetes.io/version": "v2",
            },
        },
        "spec": { "containers": [app()] },
    })
}

fn app() -> Value {
    json!({
        "name": "app",
        "image": "app:1",
        "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
        "readinessProbe": { "httpGet": { "path": "/healthz", "port": "http", "scheme": "HTTP" } },
    })
}

fn annotated(annotations: Value) -> Value {
    let mut pod = pod();
    pod["metadata"]["annotations"] = annotations;
    pod
}

fn settings() -> Settings {
    Settings::new("http://coalmine.coalmine:7443", "coalmine-agent:dev")
}

/// Agents present a token.
fn with_tokens() -> Settings {
    Settings {
        audience: Some("coalmine".to_owned()),
        ..settings()
    }
}

fn ordinary() -> Settings {
    Settings {
        native_sidecar: false,
        ..settings()
    }
}

/// The pod with its patch applied, by an implementation of RFC 6902 that knows nothing of ours.
#[track_caller]
fn injected(pod: &Value, settings: &Settings) -> Value {
    let patch = match inject(pod, settings) {
        Injected::Patch(patch) => patch,
        other => panic!("{other:?}"),
    };
    let mut patched = pod.clone();
    for operation in serde_json::to_value(&patch).unwrap().as_array().unwrap() {
        apply_rfc6902(&mut patched, operation);
    }
    let mut ours = pod.clone();
    apply(&mut ours, &patch).unwrap();
    assert_eq!(ours, patched);
    assert_eq!(
        inject(&patched, settings),
        Injected::Unchanged(Unchanged::AlreadyInjected)
    );
    patched
}

/// `add`, `replace` and `remove` of RFC 6902, section 4.
fn apply_rfc6902(document: &mut Value, operation: &Value) {
    let op = operation["op"].as_str().unwrap();
    let path = operation["path"].as_str().unwrap();
    let (parent, key) = path.rsplit_once('/').unwrap();
    let key = key.replace("~1", "/").replace("~0", "~");
    let value = || operation["value"].clone();
    match document.pointer_mut(parent).unwrap() {
        Value::Object(map) => match op {
            "add" => drop(map.insert(key, value())),
            "replace" => drop(map.insert(key, value()).expect("what is replaced is there")),
            "remove" => drop(map.remove(&key).unwrap()),
            other => panic!("{other}"),
        },
        Value::Array(list) => {
            let end = list.len();
            let index = if key == "-" { end } else { key.parse().unwrap() };
            match op {
                "add" => list.insert(index, value()),
                "replace" => list[index] = value(),
                "remove" => drop(list.remove(index)),
                other => panic!("{other}"),
            }
        }
        other => panic!("{other}"),
    }
}

/// The agent's container, wherever it is.
#[track_caller]
fn agent_of(patched: &Value) -> &Value {
    let lists = ["initContainers", "containers"].map(|list| patched["spec"][list].as_array());
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|container| container["name"] == "coalmine-agent")
        .unwrap()
}

/// What the agent makes of its arguments, once Kubernetes has put the variables in.
#[track_caller]
fn config(patched: &Value) -> Config {
    let args = agent_of(patched)["args"].as_array().unwrap().iter();
    let args = args.map(|arg| {
        let parts = arg.as_str().unwrap().split("$$");
        let parts: Vec<String> = parts.map(|part| part.replace("$(POD_UID)", "uid-1")).collect();
        OsString::from(parts.join("$"))
    });
    match Command::parse([OsString::from("coalmine-agent")].into_iter().chain(args)) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_agent_takes_the_ports_name_and_nothing_else_changes() {
    let mut patched = injected(&pod(), &settings());
    let digest = patched["metadata"]["annotations"]["coalmine.dev/injected"].take();
    let hex = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
    assert!(
        hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()),
        "{digest}"
    );
    let mut expected = annotated(json!({ "coalmine.dev/injected": null }));
    let app = &mut expected["spec"]["containers"][0];
    app["ports"][0]["name"] = json!("coalmine-app");
    app["readinessProbe"]["httpGet"]["port"] = json!(8080);
    expected["spec"]["initContainers"] = json!([{
        "name": "coalmine-agent",
        "image": "coalmine-agent:dev",
        "imagePullPolicy": "IfNotPresent",
        "restartPolicy": "Always",
        "args": [
            "--listen=0.0.0.0:15080",
            "--upstream=127.0.0.1:8080",
            "--admin=0.0.0.0:15090",
            "--aggregator=http://coalmine.coalmine:7443",
            "--service=checkout",
            "--version=v2",
            "--arm=canary",
            "--instance=$(POD_UID)",
            "--labels-file=/etc/coalmine/labels",
        ],
        "env": [{ "name": "POD_UID", "valueFrom": { "fieldRef": { "fieldPath": "metadata.uid" } } }],
        "ports": [
            { "name": "http", "containerPort": 15080 },
            { "name": "coalmine-admin", "containerPort": 15090 },
        ],
        "startupProbe": {
            "httpGet": { "path": "/livez", "port": "coalmine-admin" },
            "periodSeconds": 1,
            "failureThreshold": 30,
        },
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": "coalmine-admin" },
            "periodSeconds": 5,
        },
        "resources": {
            "requests": { "cpu": "10m", "memory": "16Mi" },
            "limits": { "memory": "192Mi" },
        },
        "volumeMounts": [
            { "name": "coalmine-labels", "mountPath": "/etc/coalmine", "readOnly": true },
            { "name": "coalmine-labels", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true },
        ],
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    }]);
    expected["spec"]["volumes"] = json!([{
        "name": "coalmine-labels",
        "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] },
    }]);
    assert_eq!(patched, expected);
}

#[test]
fn the_agents_volumes_come_after_the_pods_own() {
    let own = json!({ "name": "tmp", "emptyDir": {} });
    for volumes in [json!(null), json!([]), json!([own])] {
        let mut pod = pod();
        pod["spec"]["volumes"] = volumes.clone();
        let mut expected = volumes.as_array().cloned().unwrap_or_default();
        let patched = injected(&pod, &with_tokens());
        expected.push(json!({
            "name": "coalmine-labels",
            "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] },
        }));
        expected.push(json!({
            "name": "coalmine-token",
            "projected": { "sources": [
                { "serviceAccountToken": { "path": "token", "audience": "coalmine", "expirationSeconds": 3600 } },
            ] },
        }));
        assert_eq!(patched["spec"]["volumes"], json!(expected));
        assert_eq!(
            agent_of(&patched)["volumeMounts"],
            json!([
                { "name": "coalmine-labels", "mountPath": "/etc/coalmine", "readOnly": true },
                { "name": "coalmine-labels", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true },
                { "name": "coalmine-token", "mountPath": "/var/run/coalmine", "readOnly": true },
            ])
        );
        let config = config(&patched);
        let file = |path: Option<std::path::PathBuf>| path.unwrap().display().to_string();
        assert_eq!(file(config.labels_file), "/etc/coalmine/labels");
        assert_eq!(file(config.token_file), "/var/run/coalmine/token");
    }
}

/// The example has the agent written out by hand; without it, and injected, it is the same.
#[test]
fn the_written_out_example_is_what_would_be_injected() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/examples/checkout/canary.yaml"
    );
    let manifest: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let by_hand = &manifest["spec"]["template"];
    let mut plain = by_hand.clone();
    plain["metadata"]["labels"]["coalmine.dev/inject"] = json!("enabled");
    plain["metadata"]["annotations"] = json!({ "coalmine.dev/tenant": "header:x-tenant-id" });
    plain["spec"].as_object_mut().unwrap().remove("initContainers");
    let volumes = plain["spec"]["volumes"].as_array_mut().unwrap();
    let is_ours = |volume: &Value| {
        matches!(
            volume["name"].as_str(),
            Some("coalmine-labels" | "coalmine-token")
        )
    };
    volumes.retain(|volume| !is_ours(volume));
    let app = &mut plain["spec"]["containers"][0];
    app["ports"][0]["name"] = json!("http");
    app["readinessProbe"]["httpGet"]["port"] = json!("http");

    let patched = injected(&plain, &with_tokens());
    let (ours, theirs) = (agent_of(&patched), agent_of(by_hand));
    for part in [
        "name",
        "imagePullPolicy",
        "restartPolicy",
        "env",
        "ports",
        "startupProbe",
        "readinessProbe",
        "resources",
        "volumeMounts",
    ] {
        assert_eq!(ours[part], theirs[part], "{part}");
    }
    assert_eq!(patched["spec"]["volumes"], by_hand["spec"]["volumes"]);
    for (key, value) in theirs["securityContext"].as_object().unwrap() {
        assert_eq!(ours["securityContext"][key], *value, "{key}");
    }
    let written: Vec<&str> = theirs["args"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let mut written: Vec<String> = written.chunks(2).map(|pair| pair.join("=")).collect();
    written.push("--instance=$(POD_UID)".to_owned());
    written.sort();
    let mut args: Vec<&str> = ours["args"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    args.sort_unstable();
    assert_eq!(args, written);
    assert_eq!(
        patched["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"],
        8080
    );
}

#[test]
fn the_agent_understands_every_setting() {
    let pod = annotated(json!({
        "example.com/other": "kept",
        "coalmine.dev/port": "http",
        "coalmine.dev/service": "shop/checkout",
        "coalmine.dev/version": "-rc",
        "coalmine.dev/tenant": "header:x-org|regex=^$(POD_UID)?a$$\n fixed:rest",
        "coalmine.dev/pool-port": "0",
        "coalmine.dev/pool-scrape": "http://[::1]:9100/metrics?a=b",
        "coalmine.dev/idle-timeout": "30s",
        "coalmine.dev/drain": "1500ms",
        "coalmine.dev/proxy-protocol": "true",
        "coalmine.dev/max-connections": "4294967295",
        "coalmine.dev/max-tenants": "1000000",
        "coalmine.dev/cpu-request": "0.25",
        "coalmine.dev/cpu-limit": "250m",
        "coalmine.dev/memory-request": "64Mi",
        "coalmine.dev/memory-limit": "1Gi",
    }));
    let patched = injected(&pod, &settings());
    let config = config(&patched);
    assert_eq!(config.upstream.to_string(), "127.0.0.1:8080");
    assert_eq!(
        (config.service.as_str(), config.version.as_str()),
        ("shop/checkout", "-rc")
    );
    assert_eq!((config.arm, config.instance.as_str()), (Arm::Canary, "uid-1"));
    let rules: [Rule; 2] =
        ["header:x-org|regex=^$(POD_UID)?a$$", "fixed:rest"].map(|rule| rule.parse().unwrap());
    assert_eq!(config.tenant, rules);
    assert_eq!(config.pool_port, 0);
    assert_eq!(
        config.pool_scrape.unwrap().to_string(),
        "http://[::1]:9100/metrics?a=b"
    );
    assert_eq!(config.idle_timeout, Duration::from_secs(30));
    assert_eq!(config.drain, Duration::from_millis(1500));
    assert!(config.proxy_protocol);
    assert_eq!(config.max_tenants, 1_000_000);
    assert_eq!(
        agent_of(&patched)["resources"],
        json!({
            "requests": { "cpu": "0.25", "memory": "64Mi" },
            "limits": { "cpu": "250m", "memory": "1Gi" },
        })
    );
    assert_eq!(patched["metadata"]["annotations"]["example.com/other"], "kept");
}

/// What the injector lets pass the agent must take, and what the agent takes need not be refused.
#[test]
fn the_agent_takes_the_values_that_the_injector_takes() {
    let required = [
        "coalmine-agent",
        "--aggregator=http://coalmine:7443",
        "--service=checkout",
        "--version=v2",
        "--arm=canary",
        "--instance=uid-1",
    ];
    let cases: [(Setting, &[&str]); 7] = [
        (Setting::PoolPort, &["0", "65535", "65536", "x"]),
        (
            Setting::PoolScrape,
            &[
                "http://app",
                "http://app:80/m?a",
                "https://app/m",
                "http://a@app/m",
            ],
        ),
        (Setting::IdleTimeout, &["0s", "1h", "3600001ms", "5"]),
        (Setting::Drain, &["0ms", "60m", "61m", "1d"]),
        (Setting::MaxConnections, &["1", "4294967295", "0", "4294967296"]),
        (Setting::MaxTenants, &["1", "1000000", "1000001", "0"]),
        (
            Setting::Tenant,
            &["header:x", "fixed:a", "cookie:x", "fixed:a header:x"],
        ),
    ];
    for (setting, values) in cases {
        for value in values {
            let flag = format!("--{}={value}", setting.as_str());
            let args = required.into_iter().chain([flag.as_str()]);
            let taken = Command::parse(args.map(OsString::from));
            assert_eq!(setting.check(value).is_ok(), taken.is_ok(), "{flag}: {taken:?}");
        }
    }
}

#[test]
fn an_annotation_goes_before_the_injectors_default() {
    let defaults = [(Setting::Tenant, "header:x-tenant"), (Setting::IdleTimeout, "5m")];
    let settings = Settings {
        defaults: defaults
            .map(|(setting, value)| (setting, value.to_owned()))
            .into(),
        ..settings()
    };
    settings.check().unwrap();
    let pod = annotated(json!({ "coalmine.dev/idle-timeout": "10s" }));
    let config = config(&injected(&pod, &settings));
    assert_eq!(config.tenant, ["header:x-tenant".parse::<Rule>().unwrap()]);
    assert_eq!(config.idle_timeout, Duration::from_secs(10));
}

#[test]
fn the_digest_changes_with_what_is_injected() {
    let digest = |pod: &Value, settings: &Settings| {
        injected(pod, settings)["metadata"]["annotations"]["coalmine.dev/injected"].clone()
    };
    let first = digest(&pod(), &settings());
    let mut other = pod();
    other["metadata"]["name"] = json!("checkout-2");
    other["metadata"]["labels"]["team"] = json!("shop");
    assert_eq!(digest(&other, &settings()), first);
    other["metadata"]["labels"]["coalmine.dev/arm"] = json!("baseline");
    assert_ne!(digest(&other, &settings()), first);
    assert_ne!(digest(&pod(), &ordinary()), first);
    // The audience stands in a volume only.
    let other_audience = Settings {
        audience: Some("other".to_owned()),
        ..settings()
    };
    assert_ne!(digest(&pod(), &with_tokens()), digest(&pod(), &other_audience));
    let newer = Settings {
        image: "coalmine-agent:newer".to_owned(),
        ..settings()
    };
    assert_ne!(digest(&pod(), &newer), first);
}

#[test]
fn who_does_not_ask_stays_as_it_is() {
    let mut disabled = pod();
    disabled["metadata"]["labels"]["coalmine.dev/inject"] = json!("disabled");
    let mut silent = pod();
    silent["metadata"]["labels"]
        .as_object_mut()
        .unwrap()
        .remove("coalmine.dev/inject");
    for pod in [
        disabled,
        silent,
        json!({}),
        json!(null),
        json!({ "metadata": { "labels": 1 } }),
    ] {
        assert_eq!(
            inject(&pod, &settings()),
            Injected::Unchanged(Unchanged::NotOptedIn)
        );
    }
}

#[test]
fn a_copied_annotation_alone_is_no_agent() {
    let patched = injected(
        &annotated(json!({ "coalmine.dev/injected": "sha256:old" })),
        &settings(),
    );
    assert_ne!(
        patched["metadata"]["annotations"]["coalmine.dev/injected"],
        "sha256:old"
    );
}
