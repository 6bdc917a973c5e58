//! Every refusal: what a pod must look like to get it, and that its text says what to do.

use std::collections::BTreeSet;

use super::*;

type Edit = fn(&mut Value, &mut Settings);

fn spec(pod: &mut Value) -> &mut Value {
    &mut pod["spec"]
}

fn ports(pod: &mut Value) -> &mut Value {
    &mut pod["spec"]["containers"][0]["ports"]
}

fn label<'p>(pod: &'p mut Value, name: &str) -> &'p mut Value {
    &mut pod["metadata"]["labels"][name]
}

fn annotate(pod: &mut Value, name: &str, value: Value) {
    pod["metadata"]["annotations"][name] = value;
}

fn remove_label(pod: &mut Value, name: &str) {
    let labels = pod["metadata"]["labels"].as_object_mut().unwrap();
    labels.remove(name).unwrap();
}

/// The name of the refusal, a part of its text, and what is done to a good pod to get it.
const REFUSED: &[(&str, &str, Edit)] = &[
    ("malformed_pod", "no containers", |pod, _| *spec(pod) = json!({})),
    ("malformed_pod", "no containers", |pod, _| {
        *spec(pod) = json!(null)
    }),
    ("malformed_pod", "is no map", |pod, _| {
        pod["metadata"]["annotations"] = json!("none")
    }),
    ("malformed_pod", "is no list", |pod, _| {
        spec(pod)["containers"] = json!({})
    }),
    ("malformed_pod", "containers[0] has no name", |pod, _| {
        spec(pod)["containers"] = json!([{ "name": 1 }])
    }),
    ("malformed_pod", "ports of the container \"app\"", |pod, _| {
        *ports(pod) = json!("http")
    }),
    ("malformed_pod", "ports[0]", |pod, _| {
        *ports(pod) = json!([{ "containerPort": 65536 }])
    }),
    ("malformed_pod", "from 1 to 65535", |pod, _| {
        ports(pod)[0]["containerPort"] = json!(0)
    }),
    ("malformed_pod", "a name that is not text", |pod, _| {
        ports(pod)[0]["name"] = json!(80)
    }),
    ("unknown_inject", "is \"true\"; say enabled", |pod, _| {
        *label(pod, "coalmine.dev/inject") = json!(true)
    }),
    ("unknown_inject", "is \"Enabled\"", |pod, _| {
        *label(pod, "coalmine.dev/inject") = json!("Enabled")
    }),
    ("host_network", "pod network", |pod, _| {
        spec(pod)["hostNetwork"] = json!(true)
    }),
    ("mirror_pod", "from a file", |pod, _| {
        annotate(pod, "kubernetes.io/config.mirror", json!("1f"))
    }),
    ("static_pod", "\"http\"", |pod, _| {
        annotate(pod, "kubernetes.io/config.source", json!("http"))
    }),
    ("windows_pod", "Linux", |pod, _| {
        spec(pod)["os"] = json!({ "name": "windows" })
    }),
    ("no_arm", "say canary, baseline or flagger", |pod, _| {
        remove_label(pod, "coalmine.dev/arm")
    }),
    ("unknown_arm", "is \"stable\"", |pod, _| {
        *label(pod, "coalmine.dev/arm") = json!("stable")
    }),
    ("no_service", "coalmine.dev/service", |pod, _| {
        remove_label(pod, "app.kubernetes.io/name")
    }),
    ("no_version", "coalmine.dev/version", |pod, _| {
        remove_label(pod, "app.kubernetes.io/version")
    }),
    ("bad_label", "put its value in quotes", |pod, _| {
        *label(pod, "app.kubernetes.io/version") = json!(1.1)
    }),
    (
        "bad_label",
        "set the annotation coalmine.dev/service",
        |pod, _| *label(pod, "app.kubernetes.io/name") = json!(""),
    ),
    (
        "unknown_setting",
        "\"coalmine.dev/tenents\" is no setting",
        |pod, _| annotate(pod, "coalmine.dev/tenents", json!("header:x")),
    ),
    ("bad_setting", "coalmine.dev/tenant cannot be read", |pod, _| {
        annotate(pod, "coalmine.dev/tenant", json!("cookie:x"))
    }),
    ("bad_setting", "put the value in quotes", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!(8080))
    }),
    ("bad_setting", "cpu-limit of \"5m\"", |pod, _| {
        annotate(pod, "coalmine.dev/cpu-limit", json!("5m"))
    }),
    ("bad_setting", "more than the memory-limit", |pod, _| {
        annotate(pod, "coalmine.dev/memory-request", json!("1Gi"))
    }),
    ("bad_setting", "coalmine.dev/drain is", |_, settings| {
        settings.defaults.insert(Setting::Drain, "soon".to_owned());
    }),
    ("no_port", "declares a port", |pod, _| *ports(pod) = json!([])),
    ("no_port", "declares a port", |pod, _| *ports(pod) = json!(null)),
    ("no_such_port", "\"web\" of coalmine.dev/port", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!("web"))
    }),
    ("no_such_port", "\"81\" of coalmine.dev/port", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!("81"))
    }),
    ("ambiguous_port", "\"http\" (8080), 9100; say which", |pod, _| {
        *ports(pod) = json!([{ "name": "http", "containerPort": 8080 }, { "containerPort": 9100 }])
    }),
    ("ambiguous_port", "\"a\" (8080), \"b\" (8080)", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!("8080"));
        *ports(pod) = json!([{ "name": "a", "containerPort": 8080 }, { "name": "b", "containerPort": 8080 }])
    }),
    ("needs_named_port", "port 8080 has no name", |pod, _| {
        *ports(pod) = json!([{ "containerPort": 8080 }])
    }),
    ("not_tcp", "port 8080 is for \"UDP\"", |pod, _| {
        ports(pod)[0]["protocol"] = json!("UDP")
    }),
    ("not_tcp", "port 8080 is for \"SCTP\"", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!("http"));
        ports(pod)[0]["protocol"] = json!("SCTP")
    }),
    ("host_port", "port 8080 has a hostPort", |pod, _| {
        ports(pod)[0]["hostPort"] = json!(80)
    }),
    ("reserved_port", "\"app\" uses port 15080", |pod, _| {
        ports(pod)[0]["containerPort"] = json!(15080)
    }),
    ("reserved_port", "\"other\" uses port 15090", |pod, _| {
        spec(pod)["initContainers"] = json!([{ "name": "other", "ports": [{ "containerPort": 15090 }] }])
    }),
    ("reserved_port", "\"app\" uses port 8080", |_, settings| {
        settings.admin_port = 8080
    }),
    (
        "port_name_conflict",
        "\"http\" of the container \"other\"",
        |pod, _| {
            annotate(pod, "coalmine.dev/port", json!("8080"));
            spec(pod)["containers"][1] = json!({
                "name": "other", "ports": [{ "name": "http", "containerPort": 81 }],
            })
        },
    ),
    ("port_name_conflict", "say the port's number", |pod, _| {
        annotate(pod, "coalmine.dev/port", json!("http"));
        spec(pod)["containers"][1] = json!({
            "name": "other", "ports": [{ "name": "http", "containerPort": 81 }],
        })
    }),
    (
        "port_name_conflict",
        "\"coalmine-app\" of the container \"app\"",
        |pod, _| ports(pod)[0]["name"] = json!("coalmine-app"),
    ),
    (
        "port_name_conflict",
        "\"coalmine-admin\" of the container \"other\"",
        |pod, _| {
            spec(pod)["initContainers"] = json!([{
                "name": "other", "ports": [{ "name": "coalmine-admin", "containerPort": 81 }],
            }])
        },
    ),
    ("container_name_conflict", "was not injected", |pod, _| {
        spec(pod)["initContainers"] = json!([{ "name": "coalmine-agent" }])
    }),
    ("container_name_conflict", "was not injected", |pod, _| {
        spec(pod)["containers"][0]["name"] = json!("coalmine-agent")
    }),
    ("volume_name_conflict", "volume \"coalmine-labels\"", |pod, _| {
        spec(pod)["volumes"] = json!([{ "name": "tmp" }, { "name": "coalmine-labels", "emptyDir": {} }])
    }),
    (
        "volume_name_conflict",
        "volume \"coalmine-token\"",
        |pod, settings| {
            spec(pod)["volumes"] = json!([{ "name": "coalmine-token", "emptyDir": {} }]);
            settings.audience = Some("coalmine".to_owned());
        },
    ),
    (
        "malformed_pod",
        "volumes of the pod's spec is no list",
        |pod, _| spec(pod)["volumes"] = json!({ "name": "tmp" }),
    ),
    ("pod_resources", "limits.memory is \"much\"", |pod, _| {
        spec(pod)["resources"] = json!({ "limits": { "memory": "much" } })
    }),
    ("pod_resources", "requests.cpu is \"-1\"", |pod, _| {
        spec(pod)["resources"] = json!({ "requests": { "cpu": "-1" } })
    }),
    ("pod_resources", "requests.cpu is \"null\"", |pod, _| {
        spec(pod)["resources"] = json!({ "requests": { "cpu": null } })
    }),
    // No more can be added to it: API servers have 64 bits.
    (
        "pod_resources",
        "limits.memory is \"9223372036854775807\"",
        |pod, _| spec(pod)["resources"] = json!({ "limits": { "memory": "9223372036854775807" } }),
    ),
    ("pod_resources", "limits.cpu is \"0\"", |pod, _| {
        spec(pod)["resources"] = json!({ "limits": { "cpu": 0 } })
    }),
    (
        "malformed_pod",
        "resources of the pod's spec is no map",
        |pod, _| spec(pod)["resources"] = json!("1"),
    ),
    (
        "malformed_pod",
        "limits of the pod's resources is no map",
        |pod, _| spec(pod)["resources"] = json!({ "limits": [] }),
    ),
    (
        "needs_native_sidecar",
        "restartPolicy \"Never\"",
        |pod, settings| {
            spec(pod)["restartPolicy"] = json!("Never");
            settings.native_sidecar = false;
        },
    ),
    (
        "needs_native_sidecar",
        "restartPolicy \"OnFailure\"",
        |pod, settings| {
            spec(pod)["restartPolicy"] = json!("OnFailure");
            settings.native_sidecar = false;
        },
    ),
];

/// All names, so that none is without a pod that gets it.
const NAMES: [&str; 25] = [
    "ambiguous_port",
    "bad_label",
    "bad_setting",
    "container_name_conflict",
    "host_network",
    "host_port",
    "malformed_pod",
    "mirror_pod",
    "needs_named_port",
    "needs_native_sidecar",
    "no_arm",
    "no_port",
    "no_service",
    "no_such_port",
    "no_version",
    "not_tcp",
    "pod_resources",
    "port_name_conflict",
    "reserved_port",
    "static_pod",
    "unknown_arm",
    "unknown_inject",
    "unknown_setting",
    "volume_name_conflict",
    "windows_pod",
];

#[test]
fn every_refusal_has_a_name_and_says_what_to_do() {
    let mut seen = BTreeSet::new();
    for (name, part, edit) in REFUSED {
        let (mut pod, mut settings) = (pod(), settings());
        pod["spec"]["containers"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "name": "sidecar" }));
        edit(&mut pod, &mut settings);
        match inject(&pod, &settings) {
            Injected::Refused(refusal) => {
                let text = refusal.to_string();
                assert_eq!(refusal.as_str(), *name, "{text}");
                assert!(text.contains(part), "{name}: {part:?} is not in: {text}");
                assert!(text.contains("; "), "{name} does not say what to do: {text}");
                seen.insert(refusal.as_str());
            }
            other => panic!("{name}, {part}: {other:?}"),
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), NAMES);
}

#[test]
fn what_looks_like_a_refusal_and_is_none() {
    let edits: [Edit; 13] = [
        |pod, _| spec(pod)["hostNetwork"] = json!(false),
        |pod, _| annotate(pod, "kubernetes.io/config.source", json!("api")),
        |pod, _| spec(pod)["os"] = json!({ "name": "linux" }),
        |pod, _| ports(pod)[0]["hostPort"] = json!(0),
        |pod, _| ports(pod)[0]["protocol"] = json!(null),
        // A job with a native sidecar ends.
        |pod, _| spec(pod)["restartPolicy"] = json!("Never"),
        // UDP and TCP do not share ports.
        |pod, _| ports(pod)[1] = json!({ "containerPort": 15080, "protocol": "UDP" }),
        // A Service tells names apart by protocol.
        |pod, _| ports(pod)[1]["name"] = json!("http"),
        // Without an audience there is no volume with a token.
        |pod, _| spec(pod)["volumes"] = json!([{ "name": "coalmine-token", "emptyDir": {} }]),
        |pod, _| spec(pod)["volumes"] = json!([{ "emptyDir": {} }]),
        |pod, _| spec(pod)["resources"] = json!({ "requests": null, "limits": {} }),
        // What the agent has none of.
        |pod, _| spec(pod)["resources"] = json!({ "limits": { "hugepages-2Mi": "much" } }),
        |pod, settings| {
            spec(pod)["restartPolicy"] = json!("Always");
            settings.native_sidecar = false;
        },
    ];
    for edit in edits {
        let (mut pod, mut settings) = (pod(), settings());
        ports(&mut pod).as_array_mut().unwrap().push(json!(null));
        ports(&mut pod)[1] = json!({ "name": "dns", "containerPort": 53, "protocol": "UDP" });
        edit(&mut pod, &mut settings);
        injected(&pod, &settings);
    }
}

#[test]
fn hostile_text_is_shortened_and_harmless() {
    let mut pod = pod();
    *label(&mut pod, "coalmine.dev/arm") = json!("\u{1b}[2J\n".repeat(10_000));
    let Injected::Refused(refusal) = inject(&pod, &settings()) else {
        panic!("an arm like this is none")
    };
    let text = refusal.to_string();
    assert!(text.len() < 1_000 && !text.contains(['\u{1b}', '\n']), "{text}");
}

#[test]
fn settings_for_all_pods_are_checked() {
    let with = |edit: fn(&mut Settings)| {
        let mut settings = settings();
        edit(&mut settings);
        settings.check()
    };
    assert_eq!(with(|_| ()), Ok(()));
    type Change = fn(&mut Settings);
    let cases: [(&str, Change); 10] = [
        ("http://HOST:7443", |settings| settings.aggregator = String::new()),
        ("http://HOST:7443", |settings| {
            settings.aggregator = "https://coalmine:7443".to_owned();
        }),
        ("http://HOST:7443", |settings| {
            settings.aggregator = "http://coalmine:7443/path".to_owned();
        }),
        ("name of an image", |settings| settings.image = "a b".to_owned()),
        ("name of an image", |settings| settings.image.clear()),
        ("two ports", |settings| settings.listen_port = settings.admin_port),
        ("is not an audience", |settings| {
            settings.audience = Some(String::new())
        }),
        ("is not an audience", |settings| {
            settings.audience = Some("coalmine agents".to_owned());
        }),
        ("no default", |settings| {
            settings.defaults.insert(Setting::Version, "v1".to_owned());
        }),
        ("the default of pool-port is", |settings| {
            settings.defaults.insert(Setting::PoolPort, "x".to_owned());
        }),
    ];
    for (part, edit) in cases {
        let error = with(edit).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
}
