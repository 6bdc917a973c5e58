//! What the aggregator's account may do with each component, and that it may do nothing else.

use std::collections::BTreeSet;

use coalmine_tests::kubernetes::Cluster;
use serde_json::{Value, json};

use crate::scene::{HOME, PODS, Scene, pod, rendered};

const VERBS: [&str; 8] = [
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
];

/// Group, resource with its part, namespace, name: all that a verb is tried on.
const RESOURCES: &[(&str, &str, &str, &str)] = &[
    ("", "secrets", "coalmine", "coalmine-webhook"),
    ("", "secrets", "coalmine", "another"),
    ("", "secrets", "coalmine", ""),
    ("", "secrets", "shop", "coalmine-webhook"),
    ("", "configmaps", "coalmine", ""),
    ("", "events", "shop", ""),
    ("", "namespaces", "", ""),
    ("", "nodes", "", ""),
    ("", "pods", "shop", ""),
    ("", "pods/exec", "shop", ""),
    ("", "pods/ephemeralcontainers", "shop", ""),
    ("", "pods/log", "shop", ""),
    ("", "serviceaccounts", "shop", ""),
    ("", "serviceaccounts/token", "shop", ""),
    ("", "services", "shop", ""),
    (
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        "",
        "coalmine",
    ),
    (
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        "",
        "another",
    ),
    (
        "admissionregistration.k8s.io",
        "validatingwebhookconfigurations",
        "",
        "coalmine",
    ),
    ("apiextensions.k8s.io", "customresourcedefinitions", "", ""),
    ("apps", "daemonsets", "shop", ""),
    ("apps", "deployments", "shop", ""),
    ("apps", "deployments/scale", "shop", ""),
    ("apps", "deployments/status", "shop", ""),
    ("apps", "replicasets", "shop", ""),
    ("apps", "statefulsets", "shop", ""),
    ("argoproj.io", "analysisruns", "shop", ""),
    ("argoproj.io", "rollouts", "shop", ""),
    ("argoproj.io", "rollouts/status", "shop", ""),
    ("authentication.k8s.io", "tokenreviews", "", ""),
    ("authorization.k8s.io", "subjectaccessreviews", "", ""),
    ("batch", "jobs", "shop", ""),
    ("coordination.k8s.io", "leases", "coalmine", ""),
    ("flagger.app", "canaries", "shop", ""),
    ("flagger.app", "canaries/status", "shop", ""),
    ("rbac.authorization.k8s.io", "clusterrolebindings", "", ""),
    ("rbac.authorization.k8s.io", "clusterroles", "", ""),
    ("rbac.authorization.k8s.io", "roles", "coalmine", ""),
];

/// What each component needs, and so may do: verb, resource, namespace and name.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "webhook",
        &[
            "get secrets coalmine/coalmine-webhook",
            "update secrets coalmine/coalmine-webhook",
            "get mutatingwebhookconfigurations /coalmine",
            "patch mutatingwebhookconfigurations /coalmine",
        ],
    ),
    ("cert-manager", &[]),
    ("admission-policy", &[]),
    ("watch", &["list pods shop/", "watch pods shop/"]),
    ("identity", &["create tokenreviews /"]),
    (
        "argo",
        &[
            "get rollouts shop/",
            "patch rollouts shop/",
            "patch rollouts/status shop/",
            "list replicasets shop/",
            "create events shop/",
        ],
    ),
    (
        "flagger",
        &[
            "get canaries shop/",
            "patch canaries shop/",
            "create events shop/",
        ],
    ),
    (
        "deployment",
        &[
            "get deployments shop/",
            "patch deployments shop/",
            "list replicasets shop/",
            "create events shop/",
        ],
    ),
    ("tokens", &[]),
    ("halt-webhook", &[]),
    ("network-policy", &[]),
    ("prometheus", &[]),
    ("postgres", &[]),
];

/// How often a change of the roles is looked for; each look takes a while.
const LOOKS: u32 = 40;

const ACCOUNT: &str = "system:serviceaccount:coalmine:coalmine";

#[test]
fn each_component_may_do_exactly_what_it_needs() {
    let scene = Scene::install(&[]);
    assert_eq!(allowed(&scene.cluster), BTreeSet::new(), "the base alone");
    for &(component, wanted) in ALLOWED {
        let roles = rendered(scene.directory.path(), &[component]);
        let roles: Vec<_> = roles.into_iter().filter(is_role).collect();
        // Where nothing is wanted, a look before the server knows of a role would find nothing.
        assert_eq!(roles.is_empty(), wanted.is_empty(), "{component}");
        roles.iter().for_each(|role| scene.cluster.apply(role));
        settles(&scene.cluster, component, wanted);
        for role in &roles {
            let arguments = ["delete", "--ignore-not-found", "-f", "-"];
            let output = scene.cluster.try_kubectl(arguments, Some(&role.to_string()));
            assert!(output.status.success(), "{component}: {output:?}");
        }
        settles(&scene.cluster, "nothing", &[]);
    }
}

fn is_role(object: &Value) -> bool {
    object["apiVersion"] == "rbac.authorization.k8s.io/v1"
}

/// Waits until the server's copy of the roles is as it was made, and fails if it never is.
fn settles(cluster: &Cluster, component: &str, wanted: &[&str]) {
    let wanted: BTreeSet<_> = wanted.iter().map(|one| (*one).to_owned()).collect();
    let mut found = BTreeSet::new();
    for _ in 0..LOOKS {
        found = allowed(cluster);
        if found == wanted {
            return;
        }
    }
    assert_eq!(found, wanted, "{component}");
}

/// All that the account may do.
fn allowed(cluster: &Cluster) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    for (group, resource, namespace, name) in RESOURCES {
        let (kind, part) = resource.split_once('/').unwrap_or((resource, ""));
        for verb in VERBS {
            let review = json!({
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": ACCOUNT,
                    "groups": ["system:authenticated", "system:serviceaccounts", "system:serviceaccounts:coalmine"],
                    "resourceAttributes": {
                        "group": group, "resource": kind, "subresource": part,
                        "namespace": namespace, "name": name, "verb": verb,
                    },
                },
            });
            let answer = cluster.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review);
            if answer["status"]["allowed"] == true {
                allowed.insert(format!("{verb} {resource} {namespace}/{name}"));
            }
        }
    }
    allowed
}

#[test]
fn what_is_forbidden_is_refused_when_it_is_tried() {
    let scene = Scene::install(&["webhook", "watch", "identity"]);
    let cluster = &scene.cluster;
    let can_i = |question: &[&str]| {
        let as_account = format!("--as={ACCOUNT}");
        let question = ["auth", "can-i"].iter().chain(question);
        let said = cluster.try_kubectl(question.chain(&[as_account.as_str()]), None);
        String::from_utf8_lossy(&said.stdout).trim() == "yes"
    };
    assert!(can_i(&["update", "secrets/coalmine-webhook", "-n", HOME]));
    assert!(can_i(&["list", "pods", "-A"]));
    assert!(!can_i(&["update", "secrets/another", "-n", HOME]));
    assert!(!can_i(&["create", "secrets", "-n", HOME]));
    assert!(!can_i(&["delete", "pods", "-n", "shop"]));

    let token = cluster.token(HOME, "coalmine", &[]);
    let status =
        |method: &str, path: &str, body: &Value| cluster.request_as(&token, method, path, body).status;
    let none = &Value::Null;
    let secrets = "/api/v1/namespaces/coalmine/secrets";
    assert_eq!(status("GET", PODS, none), 200);
    assert_eq!(status("GET", &format!("{secrets}/coalmine-webhook"), none), 200);
    assert_eq!(status("GET", secrets, none), 403);
    assert_eq!(status("GET", &format!("{secrets}/another"), none), 403);
    assert_eq!(status("POST", PODS, &pod("forbidden", "canary")), 403);
    let other = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
    assert_eq!(status("GET", other, none), 403);
    assert_eq!(status("PATCH", &format!("{other}/another"), &json!({})), 403);
}
