//! What we give to a cluster: every manifest parses and renders, asks for no right that is not in the table,
//! and tells the programs only what they know. What needs an API server is tested against one.

#![allow(clippy::print_stderr, reason = "says what could not be tested")]

mod arguments;
mod pods;
mod rights;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use coalmine_proto::names::{ARM_LABEL, Arm};
use coalmine_tests::process::repository;
use serde_json::{Value, json};

/// What is rendered as it is.
const KUSTOMIZATIONS: [&str; 5] = [
    "base",
    "examples/checkout",
    "overlays/demo",
    "overlays/install",
    "overlays/production",
];

/// Each component, and all that it lets the account of the aggregator do. The README has the same lines.
const COMPONENTS: [(&str, &[&str]); 14] = [
    (
        "webhook",
        &[
            "in coalmine: get, update secrets coalmine-webhook",
            "get, patch mutatingwebhookconfigurations.admissionregistration.k8s.io coalmine",
        ],
    ),
    ("cert-manager", &[]),
    ("admission-policy", &[]),
    ("watch", &["list, watch pods"]),
    ("identity", &["create tokenreviews.authentication.k8s.io"]),
    (
        "argo",
        &[
            "get, patch rollouts.argoproj.io",
            "patch rollouts/status.argoproj.io",
            "list replicasets.apps",
            "create events",
        ],
    ),
    ("flagger", &["get, patch canaries.flagger.app", "create events"]),
    (
        "deployment",
        &[
            "get, patch deployments.apps",
            "list replicasets.apps",
            "create events",
        ],
    ),
    ("tokens", &[]),
    ("halt-webhook", &[]),
    ("network-policy", &[]),
    ("prometheus", &[]),
    ("postgres", &[]),
    ("redirect", &[]),
];

/// Secrets that somebody else makes, as the components' comments say.
const MADE_ELSEWHERE: [&str; 4] = [
    "coalmine-halt-webhook",
    "coalmine-tokens",
    "coalmine-postgres",
    "coalmine-webhook-tls",
];

fn deploy(path: &str) -> PathBuf {
    repository().canonicalize().unwrap().join("deploy").join(path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents(name: &str, text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Runs `kubectl kustomize`, which needs no cluster. None where there is no kubectl, and that is said; its own
/// error is given back.
fn kustomize(directory: &Path) -> Option<Result<Vec<Value>, String>> {
    let mut kubectl = Command::new("kubectl");
    let output = kubectl
        .arg("kustomize")
        .arg(directory)
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!(
                "NOT TESTED: what {} renders to; kubectl is missing",
                directory.display()
            );
            return None;
        }
        output => output.unwrap(),
    };
    if !output.status.success() {
        return Some(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let text = String::from_utf8(output.stdout).unwrap();
    Some(Ok(documents(&directory.display().to_string(), &text)))
}

fn render(directory: &Path) -> Option<Vec<Value>> {
    let rendered = kustomize(directory)?;
    Some(rendered.unwrap_or_else(|error| panic!("{}: {error}", directory.display())))
}

/// `resource` with components, in this order. Kustomize takes paths relative to the directory only.
fn compose(resource: &Path, components: &[&str]) -> Option<Result<Vec<Value>, String>> {
    let directory = tempfile::tempdir().unwrap();
    let from = directory.path().canonicalize().unwrap();
    let up = "../".repeat(from.components().count() - 1);
    let relative = |to: &Path| format!("{up}{}", to.strip_prefix("/").unwrap().display());
    let components = components
        .iter()
        .map(|name| relative(&deploy("components").join(name)));
    let kustomization = json!({
        "resources": [relative(resource)],
        "components": components.collect::<Vec<_>>(),
    });
    fs::write(from.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    kustomize(&from)
}

fn with_components(components: &[&str]) -> Option<Vec<Value>> {
    let rendered = compose(&deploy("base"), components)?;
    Some(rendered.unwrap_or_else(|error| panic!("{components:?}: {error}")))
}

/// Everything that the tests look at, with its name; rendered once.
fn all_rendered() -> &'static [(String, Vec<Value>)] {
    static ALL: OnceLock<Vec<(String, Vec<Value>)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let whole = KUSTOMIZATIONS.iter();
        let whole = whole.map(|name| Some(((*name).to_owned(), render(&deploy(name))?)));
        let parts = COMPONENTS.iter();
        let parts = parts.map(|(name, _)| Some((format!("components/{name}"), with_components(&[name])?)));
        // Without kubectl there is none.
        whole.chain(parts).collect::<Option<_>>().unwrap_or_default()
    })
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'v>(value: &'v Value, pointer: &str) -> &'v [Value] {
    let array = value.pointer(pointer).and_then(Value::as_array);
    array.map(Vec::as_slice).unwrap_or_default()
}

fn strings(value: &Value, pointer: &str) -> Vec<String> {
    let found = items(value, pointer).iter();
    found.map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn of_kind<'o>(objects: &'o [Value], kind: &'o str) -> impl Iterator<Item = &'o Value> {
    objects.iter().filter(move |object| text(object, "/kind") == kind)
}

/// The specs of pods that an object makes.
fn pod(object: &Value) -> Option<&Value> {
    match text(object, "/kind") {
        "Deployment" | "StatefulSet" | "DaemonSet" | "Job" => object.pointer("/spec/template/spec"),
        "Pod" => object.get("spec"),
        _ => None,
    }
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let init = items(pod, "/initContainers").iter();
    init.chain(items(pod, "/containers"))
}

fn files_below(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, extension, found);
        } else if path.extension().is_some_and(|other| other == extension) {
            found.push(path);
        }
    }
}

#[test]
fn every_manifest_parses_and_every_component_is_known() {
    let mut files = Vec::new();
    files_below(&deploy(""), "yaml", &mut files);
    // The templates of the chart are no YAML before they are rendered.
    files.retain(|file| !file.starts_with(deploy("helm/coalmine/templates")));
    assert!(files.len() > 40, "only {} files", files.len());
    let mut rendered = 0;
    for file in files {
        let name = file.display().to_string();
        let documents = documents(&name, &read(&file));
        assert!(!documents.is_empty(), "{name} is empty");
        rendered += usize::from(text(&documents[0], "/kind") == "Kustomization");
    }
    assert_eq!(
        rendered,
        KUSTOMIZATIONS.len(),
        "a kustomization is not in the list"
    );
    let mut known: BTreeSet<_> = COMPONENTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    // Included by two others.
    known.insert("webhook-server".to_owned());
    let there = fs::read_dir(deploy("components")).unwrap();
    let there: BTreeSet<_> = there
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, known);
}

#[test]
fn what_is_made_from_other_files_is_as_they_are() {
    let rules = documents("rules.yaml", &read(&deploy("prometheus/rules.yaml")));
    let made = documents("made", &read(&deploy("components/prometheus/rules.yaml")));
    assert_eq!(made[0]["spec"], rules[0], "run deploy/render.sh");
    for (source, copy) in [
        ("prometheus/rules.yaml", "helm/coalmine/files/rules.yaml"),
        ("base/sla.yaml", "helm/coalmine/files/sla.yaml"),
    ] {
        assert_eq!(
            read(&deploy(source)),
            read(&deploy(copy)),
            "{copy}: run deploy/render.sh"
        );
    }
    let install = read(&deploy("install.yaml"));
    assert!(install.starts_with("# Made by deploy/render.sh"));
    if let Some(rendered) = render(&deploy("overlays/install")) {
        assert_eq!(
            documents("install.yaml", &install),
            rendered,
            "run deploy/render.sh"
        );
    }
}

#[test]
fn what_is_installed_can_be_listed() {
    let installed = ["overlays/install", "overlays/production"];
    let all = all_rendered().iter();
    for (name, objects) in all.filter(|(name, _)| installed.contains(&name.as_str())) {
        for object in objects {
            let part_of = text(object, "/metadata/labels/app.kubernetes.io~1part-of");
            assert_eq!(part_of, "coalmine", "{name}: {object}");
        }
    }
}

/// Objects by kind and name, with lists that components append to in one order.
fn normal(objects: Vec<Value>) -> BTreeMap<(String, String), Value> {
    let named = objects.into_iter().map(|mut object| {
        for list in [
            "/spec/ports",
            "/spec/template/spec/volumes",
            "/spec/template/spec/containers/0/args",
            "/spec/template/spec/containers/0/env",
            "/spec/template/spec/containers/0/ports",
            "/spec/template/spec/containers/0/volumeMounts",
        ] {
            if let Some(items) = object.pointer_mut(list).and_then(Value::as_array_mut) {
                items.sort_by_key(Value::to_string);
            }
        }
        let key = (
            text(&object, "/kind").to_owned(),
            text(&object, "/metadata/name").to_owned(),
        );
        (key, object)
    });
    named.collect()
}

#[test]
fn components_combine_in_any_order() {
    // The policy takes the place of the webhook, and so does the webhook with cert-manager's certificate.
    for left_out in [
        ["cert-manager", "admission-policy"],
        ["webhook", "admission-policy"],
    ] {
        let names = COMPONENTS.iter().map(|(name, _)| *name);
        let mut names: Vec<_> = names.filter(|name| !left_out.contains(name)).collect();
        let Some(first) = with_components(&names) else {
            return;
        };
        let first = normal(first);
        for _ in 0..3 {
            names.rotate_left(4);
            assert_eq!(normal(with_components(&names).unwrap()), first, "{names:?}");
        }
        names.reverse();
        assert_eq!(normal(with_components(&names).unwrap()), first, "{names:?}");
    }
    let both = compose(&deploy("base"), &["webhook", "cert-manager"]).unwrap();
    assert!(both.is_err(), "the webhook is there twice, and nobody says so");
}

#[test]
fn the_policy_and_the_chart_ask_for_the_pods_that_the_webhook_asks_for() {
    let webhook = documents(
        "webhook",
        &read(&deploy("components/webhook-server/webhook.yaml")),
    );
    let webhook = webhook[0].pointer("/webhooks/0").unwrap();
    let policy = documents(
        "policy",
        &read(&deploy("components/admission-policy/policy.yaml")),
    );
    let constraints = policy[0].pointer("/spec/matchConstraints").unwrap();
    assert_eq!(constraints["namespaceSelector"], webhook["namespaceSelector"]);
    assert_eq!(constraints["resourceRules"], webhook["rules"]);
    // The webhook is asked about labels that mean nothing too, and warns of them; the policy cannot.
    let label = "coalmine.dev/inject";
    let has_label_but_disabled = json!([
        { "key": label, "operator": "Exists" },
        { "key": label, "operator": "NotIn", "values": ["disabled"] },
    ]);
    assert_eq!(
        webhook["objectSelector"],
        json!({ "matchExpressions": has_label_but_disabled })
    );
    assert_eq!(
        constraints["objectSelector"]["matchLabels"],
        json!({ label: "enabled" })
    );

    let values = documents("values", &read(&deploy("helm/coalmine/values.yaml")));
    let schema: Value = serde_json::from_str(&read(&deploy("helm/coalmine/values.schema.json"))).unwrap();
    check_schema("values", &values[0], &schema);
    assert_eq!(schema["properties"]["replicas"]["const"], 1);
    let chart = documents("chart", &read(&deploy("helm/coalmine/Chart.yaml")));
    assert_eq!(
        chart[0]["appVersion"],
        env!("CARGO_PKG_VERSION"),
        "the chart is of another version"
    );
}

/// The arms that pods are selected by, in each of the places that do.
#[test]
fn pods_of_the_same_arms_are_selected_everywhere() {
    let selectors = [
        (
            "network-policy/network-policy.yaml",
            "NetworkPolicy",
            "/spec/ingress/0/from/0/podSelector",
        ),
        ("prometheus/monitors.yaml", "PodMonitor", "/spec/selector"),
        (
            "admission-policy/policy.yaml",
            "MutatingAdmissionPolicy",
            "/spec/matchConstraints/objectSelector",
        ),
    ];
    let selected = selectors.map(|(file, kind, pointer)| {
        let documents = documents(file, &read(&deploy("components").join(file)));
        let object = of_kind(&documents, kind).next().unwrap();
        let rules = items(object.pointer(pointer).unwrap(), "/matchExpressions");
        let rule = rules.iter().find(|rule| text(rule, "/key") == ARM_LABEL).unwrap();
        assert_eq!(text(rule, "/operator"), "In", "{file}");
        strings(rule, "/values")
    });
    let [arms, ..] = &selected;
    assert!(selected.iter().all(|others| others == arms), "{selected:?}");
    // Each means an arm, and no arm is missing.
    for arm in Arm::ALL {
        assert!(arms.contains(&arm.as_str().to_owned()), "{arms:?}");
    }
    for arm in arms {
        let known = Arm::of_labels(|label| (label == ARM_LABEL).then_some(arm.as_str()));
        assert!(matches!(known, Some(Ok(_))), "{arm}");
    }
    // What follows pods, and the templates of the chart, which are no YAML before they are rendered.
    let follows = repository().join("aggregator/src/kubernetes/pods/follow.rs");
    let selector = format!("\"{ARM_LABEL} in ({})\"", arms.join(","));
    assert!(read(&follows).contains(&selector), "{selector}");
    for template in ["networkpolicy.yaml", "monitoring.yaml"] {
        let written = read(&deploy("helm/coalmine/templates").join(template));
        let values = format!("values: [{}]", arms.join(", "));
        assert!(written.contains(&values), "{template}: {values}");
    }
}

/// Each value is in the schema, and the schema has no value that is not there to be changed.
fn check_schema(name: &str, value: &Value, schema: &Value) {
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    let given: BTreeSet<_> = value.as_object().unwrap().keys().collect();
    // What helm itself passes to every chart.
    let listed: BTreeSet<_> = properties.keys().filter(|key| *key != "global").collect();
    assert_eq!(given, listed, "{name}");
    for (key, schema) in properties {
        check_schema(&format!("{name}.{key}"), &value[key], schema);
    }
}

#[test]
fn a_redirect_is_only_for_whoever_asks_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = "\
apiVersion: apps/v1
kind: Deployment
metadata: { name: NAME, labels: LABELS }
spec: { template: { spec: { containers: [{ name: app, image: 'app:1' }] } } }
";
    let asks = manifest
        .replace("NAME", "asks")
        .replace("LABELS", "{ coalmine.dev/redirect: enabled }");
    let other = manifest.replace("NAME", "other").replace("LABELS", "{}");
    fs::write(directory.path().join("pods.yaml"), format!("{asks}---\n{other}")).unwrap();
    fs::write(
        directory.path().join("kustomization.yaml"),
        "resources: [pods.yaml]\n",
    )
    .unwrap();
    let Some(rendered) = compose(&directory.path().canonicalize().unwrap(), &["redirect"]) else {
        return;
    };
    for object in rendered.unwrap() {
        let init = items(&object, "/spec/template/spec/initContainers");
        if text(&object, "/metadata/name") == "other" {
            assert!(init.is_empty());
            continue;
        }
        assert_eq!(init.len(), 1);
        assert_eq!(
            strings(&init[0], "/securityContext/capabilities/add"),
            ["NET_ADMIN", "NET_RAW"]
        );
        pods::check_needs("coalmine-redirect", &init[0]);
    }
}
