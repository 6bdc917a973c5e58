//! Every manifest that is shipped, against the real server: it takes them, and so does Pod Security.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use coalmine_tests::{
    eventually,
    kubernetes::{Cluster, error_of, program, render},
    process::repository,
};
use serde_json::{Value, json};

use crate::{
    injection::{Edit, REFUSED},
    scene::{FOREIGN, PODS, Scene, agents, has_agent, is_foreign, pod, rendered},
};

/// What can stand in for one another, and so is not combined.
const ALONE: [&str; 3] = ["webhook", "cert-manager", "admission-policy"];

/// Components that the two above bring along themselves.
const PARTS: [&str; 1] = ["webhook-server"];

/// Where the API server has the token of a pod's account mounted.
const TOKEN_PLACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

fn directories(place: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(repository().join("deploy").join(place))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("kustomization.yaml").is_file())
        .collect();
    found.sort();
    found
}

/// Has the server take the objects without keeping them; it keeps their namespaces, without which it takes nothing.
fn takes(cluster: &Cluster, what: &str, objects: &[Value]) {
    let (foreign, ours): (Vec<_>, Vec<_>) = objects.iter().partition(|object| is_foreign(object));
    println!(
        "{what}: {} objects, and {} of {FOREIGN:?}",
        ours.len(),
        foreign.len()
    );
    for namespace in ours.iter().filter(|object| object["kind"] == "Namespace") {
        let mut namespace = (*namespace).clone();
        // So that it warns of templates that it would refuse pods of.
        namespace["metadata"]["labels"]["pod-security.kubernetes.io/warn"] = json!("restricted");
        cluster.apply(&namespace);
    }
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": ours });
    let arguments = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        "-",
    ];
    let output = cluster.try_kubectl(arguments, Some(&list.to_string()));
    let said = error_of(&output);
    assert!(output.status.success(), "{what}: {said}");
    assert!(!said.contains("would violate"), "{what}: {said}");
}

#[test]
fn every_manifest_is_taken_by_the_server() {
    let scene = Scene::install(&[]);
    let cluster = &scene.cluster;
    for directory in directories("overlays").into_iter().chain(directories("examples")) {
        takes(cluster, &directory.display().to_string(), &render(&directory));
    }
    let mut together = Vec::new();
    for directory in directories("components") {
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        if PARTS.contains(&name.as_str()) {
            continue;
        }
        takes(
            cluster,
            &name,
            &rendered(scene.directory.path(), &[name.as_str()]),
        );
        if !ALONE.contains(&name.as_str()) {
            together.push(name);
        }
    }
    for alone in ALONE {
        let all: Vec<_> = together.iter().map(String::as_str).chain([alone]).collect();
        takes(
            cluster,
            &format!("all with {alone}"),
            &rendered(scene.directory.path(), &all),
        );
    }
    takes(cluster, "deploy/install.yaml", &installed());
}

#[test]
fn the_examples_for_deploy_tools_are_taken_by_the_server() {
    let scene = Scene::install(&[]);
    for definitions in ["argo-rollouts.yaml", "flagger.yaml"] {
        scene.cluster.custom_resources(definitions);
    }
    for tool in ["argo", "flagger"] {
        for entry in fs::read_dir(repository().join("deploy/examples").join(tool)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|it| it == "yaml") {
                let text = fs::read_to_string(&path).unwrap();
                let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
                takes(&scene.cluster, &path.display().to_string(), &objects);
            }
        }
    }
}

fn installed() -> Vec<Value> {
    let text = fs::read_to_string(repository().join("deploy/install.yaml")).unwrap();
    serde_saphyr::from_multiple(&text).unwrap()
}

/// The tests that need no server compare this only where there is a kubectl.
#[test]
fn what_is_installed_is_what_its_overlay_renders_to() {
    let rendered = render(&repository().join("deploy/overlays/install"));
    assert_eq!(installed(), rendered, "run deploy/render.sh");
}

/// Values under which the chart has all that it can have.
const EVERYTHING: [&str; 10] = [
    "access.tokensSecretName=tokens",
    "halts.argo=true",
    "halts.flagger=true",
    "halts.deployment=true",
    "halts.webhookSecretName=halt",
    "networkPolicy.enabled=true",
    "serviceMonitor.enabled=true",
    "podMonitor.enabled=true",
    "prometheusRule.enabled=true",
    "postgres.secretName=database",
];

/// Values under which what may be halted, and watched, is in two namespaces only.
const SOMEWHERE: [&str; 5] = [
    "halts.argo=true",
    "halts.flagger=true",
    "halts.deployment=true",
    "halts.namespaces={shop,search}",
    "watch.namespaces={shop,search}",
];

/// What these values are as arguments.
fn set<'v>(values: &[&'v str]) -> Vec<&'v str> {
    values.iter().flat_map(|value| ["--set", *value]).collect()
}

#[test]
fn the_chart_is_taken_by_the_server() {
    let scene = Scene::install(&[]);
    scene.cluster.namespace("search", &json!({}));
    let external = ["webhook.certificates=cert-manager"];
    let none: &[&str] = &[];
    for values in [none, &EVERYTHING, &SOMEWHERE, &external] {
        helm("lint", &["--strict"], values);
        takes(
            &scene.cluster,
            &format!("the chart with {values:?}"),
            &chart(values),
        );
    }
}

/// What the chart renders to with these values.
fn chart(values: &[&str]) -> Vec<Value> {
    let text = helm("template", &["coalmine", "--namespace", "coalmine"], values);
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let objects: Vec<_> = objects.into_iter().filter(|object| !object.is_null()).collect();
    assert!(objects.len() >= 4, "{values:?}: {text}");
    objects
}

/// What gives rights, and to whom: by kind and name, without what has no part in that.
fn rights(objects: &[Value]) -> BTreeMap<(String, String), Value> {
    let rights = objects
        .iter()
        .filter(|object| object["apiVersion"] == "rbac.authorization.k8s.io/v1");
    let rights = rights.map(|object| {
        let text = |pointer: &str| object.pointer(pointer).unwrap().as_str().unwrap().to_owned();
        let parts = ["rules", "roleRef", "subjects"].map(|part| &object[part]);
        ((text("/kind"), text("/metadata/name")), json!(parts))
    });
    rights.collect()
}

/// What the chart writes out itself, and must have as the components do.
const SAME: [(&str, &str); 5] = [
    ("MutatingWebhookConfiguration", "/webhooks"),
    ("NetworkPolicy", "/spec/ingress"),
    ("NetworkPolicy", "/spec/egress"),
    ("PodMonitor", "/spec"),
    ("ServiceMonitor", "/spec/endpoints"),
];

fn part<'o>(objects: &'o [Value], kind: &str, pointer: &str) -> &'o Value {
    let object = objects.iter().find(|object| object["kind"] == kind);
    let part = object.and_then(|object| object.pointer(pointer));
    part.unwrap_or_else(|| panic!("no {kind}{pointer}"))
}

#[test]
fn the_chart_gives_the_rights_and_asks_for_the_pods_that_the_components_do() {
    let directory = tempfile::tempdir().unwrap();
    let components = [
        "webhook",
        "watch",
        "identity",
        "argo",
        "flagger",
        "deployment",
        "network-policy",
        "prometheus",
    ];
    let (ours, of_chart) = (rendered(directory.path(), &components), chart(&EVERYTHING));
    assert_eq!(rights(&of_chart), rights(&ours));
    assert!(rights(&ours).len() >= 12, "{ours:?}");
    for (kind, pointer) in SAME {
        let (theirs, own) = (part(&of_chart, kind, pointer), part(&ours, kind, pointer));
        assert_eq!(theirs, own, "{kind}{pointer}");
    }
}

#[test]
fn the_chart_binds_in_the_namespaces_that_are_named_and_nowhere_else() {
    let objects = chart(&SOMEWHERE);
    for role in [
        "coalmine-watch",
        "coalmine-argo",
        "coalmine-flagger",
        "coalmine-deployment",
    ] {
        let bindings = objects
            .iter()
            .filter(|object| object["roleRef"]["kind"] == "ClusterRole" && object["roleRef"]["name"] == role);
        let places: Vec<_> = bindings
            .map(|binding| (&binding["kind"], &binding["metadata"]["namespace"]))
            .collect();
        let [kind, shop, search] = ["RoleBinding", "shop", "search"].map(Value::from);
        assert_eq!(places, [(&kind, &shop), (&kind, &search)], "{role}");
    }
}

fn helm(verb: &str, before: &[&str], values: &[&str]) -> String {
    let chart = repository().join("deploy/helm/coalmine");
    let mut command = Command::new(program("helm"));
    command.arg(verb).args(before).arg(chart).args(set(values));
    let output = command.output().unwrap();
    let (said, text) = (error_of(&output), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "helm {verb} {values:?}: {said}{text}");
    text.into_owned()
}

#[test]
fn the_aggregators_own_pod_passes_the_restricted_standard() {
    let none: &[&str] = &[];
    for components in [none, &["webhook", "watch", "identity"]] {
        let scene = Scene::install(components);
        let namespace = scene.cluster.get("/api/v1/namespaces/coalmine");
        let enforced = &namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
        assert_eq!(enforced, "restricted");
        let set = scene
            .cluster
            .get("/apis/apps/v1/namespaces/coalmine/statefulsets/coalmine");
        // What the controller would create, but for the volume that it claims.
        let mut pod = set["spec"]["template"].clone();
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["metadata"]["name"] = json!("coalmine-0");
        let volumes = pod["spec"]["volumes"].as_array_mut().unwrap();
        let claim = json!({ "name": "data", "persistentVolumeClaim": { "claimName": "data-coalmine-0" } });
        volumes.push(claim);
        let stored = scene
            .cluster
            .create("/api/v1/namespaces/coalmine/pods?dryRun=All", &pod);
        assert_eq!(stored["spec"]["serviceAccountName"], "coalmine", "{stored}");

        // The namespace refuses others.
        pod["spec"]["containers"][0]["securityContext"] = json!({ "privileged": true });
        let refused = scene
            .cluster
            .request("POST", "/api/v1/namespaces/coalmine/pods?dryRun=All", &pod);
        assert_eq!(refused.status, 403, "{}", refused.body);
    }
}

/// Pods that the policy leaves as they are.
const LEFT_ALONE: [(&str, Edit); 9] = [
    ("host network", |pod| pod["spec"]["hostNetwork"] = json!(true)),
    ("port's name", |pod| {
        pod["spec"]["containers"][0]["ports"][0]["name"] = json!("web");
    }),
    ("our volume", |pod| {
        pod["spec"]["volumes"] = json!([{ "name": "coalmine-labels", "emptyDir": {} }]);
    }),
    ("our port", |pod| {
        let ports = pod["spec"]["containers"][0]["ports"].as_array_mut().unwrap();
        ports.push(json!({ "name": "other", "containerPort": 15090 }));
    }),
    ("our port, in a container that ends", |pod| {
        pod["spec"]["initContainers"] = json!([beside(json!({ "containerPort": 15080 }))]);
    }),
    ("a probe", |pod| {
        pod["spec"]["containers"][0]["livenessProbe"] = json!({ "httpGet": { "port": "http" } });
    }),
    ("the name twice", |pod| {
        push_beside(pod, json!({ "name": "http", "containerPort": 81 }));
    }),
    ("the name twice, in a native sidecar", |pod| {
        let mut sidecar = beside(json!({ "name": "http", "containerPort": 81 }));
        sidecar["restartPolicy"] = json!("Always");
        pod["spec"]["initContainers"] = json!([sidecar]);
    }),
    ("what the pod needs as a whole", |pod| {
        pod["spec"]["resources"] = json!({ "requests": { "cpu": "100m" } });
    }),
];

/// Pods like these, which get an agent.
const GIVEN_AN_AGENT: [(&str, Edit); 3] = [
    ("the name for UDP", |pod| {
        push_beside(
            pod,
            json!({ "name": "http", "containerPort": 81, "protocol": "UDP" }),
        );
    }),
    ("the name in a container that ends", |pod| {
        pod["spec"]["initContainers"] = json!([beside(json!({ "name": "http", "containerPort": 81 }))]);
    }),
    ("Linux, and a pod from the API", |pod| {
        pod["spec"]["os"] = json!({ "name": "linux" });
        pod["metadata"]["annotations"]["kubernetes.io/config.source"] = json!("api");
    }),
];

/// A container beside the application's, with this port.
fn beside(port: Value) -> Value {
    json!({ "name": "beside", "image": "docker.io/library/nginx:1.27", "ports": [port] })
}

fn push_beside(pod: &mut Value, port: Value) {
    let containers = pod["spec"]["containers"].as_array_mut().unwrap();
    containers.push(beside(port));
}

/// Pods that the injector refuses and the policy gives an agent all the same, and why.
const GIVEN_ALL_THE_SAME: [(&str, &str); 4] = [
    ("unknown-setting", "it reads no settings"),
    ("bad-setting", "it reads no settings"),
    ("no-such-port", "it reads no settings"),
    ("ambiguous-port", "it takes the first port for the application's"),
];

/// Whatever the injector refuses, the API server makes a pod of with the policy too, and most of it without an agent.
fn takes_what_is_refused(cluster: &Cluster, path: &str) {
    let mut given = Vec::new();
    for (name, _, edit) in REFUSED {
        let mut refused = pod(name, "canary");
        edit(&mut refused);
        let answer = cluster.request("POST", path, &refused);
        assert_eq!(answer.status, 201, "{name}: {}", answer.body);
        if agents(&answer.json()) != agents(&refused) {
            given.push(*name);
        }
    }
    let mut allowed = GIVEN_ALL_THE_SAME.map(|(name, _)| name);
    allowed.sort_unstable();
    given.sort_unstable();
    assert_eq!(given, allowed);
}

#[test]
fn the_admission_policy_injects_without_the_aggregator() {
    let scene = Scene::install(&["admission-policy"]);
    let path = format!("{}?dryRun=All", PODS);
    let create = |pod: &Value| scene.cluster.create(&path, pod);
    let asking = pod("asks", "canary");
    let stored = eventually("the policy is in force", || {
        let stored = create(&asking);
        has_agent(&stored).then_some(stored)
    });
    assert_eq!(agents(&stored), 1, "{stored}");
    for (label, value) in [
        ("coalmine.dev/inject", "disabled"),
        ("coalmine.dev/arm", "other"),
        ("app.kubernetes.io/name", ""),
        ("app.kubernetes.io/version", ""),
    ] {
        let mut other = asking.clone();
        other["metadata"]["labels"][label] = json!(value);
        assert!(!has_agent(&create(&other)), "{label}: {value:?}");
    }
    let edits = LEFT_ALONE.iter().map(|(what, edit)| (what, edit, 0));
    let edits = edits.chain(GIVEN_AN_AGENT.iter().map(|(what, edit)| (what, edit, 1)));
    for (what, edit, expected) in edits {
        let mut other = asking.clone();
        edit(&mut other);
        assert_eq!(agents(&create(&other)), expected, "{what}");
    }
    takes_what_is_refused(&scene.cluster, &path);

    // The token of the pod's account is for the application only.
    let mounted = |container: &Value| {
        let mounts = container["volumeMounts"].as_array().unwrap().iter();
        let mut there = mounts.filter(|mount| mount["mountPath"] == TOKEN_PLACE);
        let volume = there.next().unwrap()["name"].as_str().unwrap().to_owned();
        assert!(there.next().is_none(), "{container}");
        volume
    };
    let spec = &stored["spec"];
    assert_eq!(mounted(&spec["initContainers"][0]), "coalmine-labels", "{stored}");
    let token = mounted(&spec["containers"][0]);
    assert!(token.starts_with("kube-api-access-"), "{token}");
}
