//! A cluster with the aggregator's manifests in it, and the aggregator beside it: it runs on this machine, with the
//! account, the roles and the Service that the manifests give it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::MutexGuard,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_tests::{
    components::{Aggregator, POLICY},
    eventually,
    http::Answer,
    kubernetes::{Cluster, render, service_address},
    process::repository,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stage;

/// Where the aggregator is installed, and its account.
pub(crate) const HOME: &str = "coalmine";

/// Where the judged service is.
pub(crate) const SHOP: &str = "shop";

/// Its pods.
pub(crate) const PODS: &str = "/api/v1/namespaces/shop/pods";

/// The webhook's configuration.
pub(crate) const CONFIGURATION: &str =
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/coalmine";

/// The Secret in which the aggregator keeps the webhook's certificate.
pub(crate) const SECRET: &str = "/api/v1/namespaces/coalmine/secrets/coalmine-webhook";

/// The groups of objects that other programs bring along.
pub(crate) const FOREIGN: [&str; 2] = ["monitoring.coreos.com/v1", "cert-manager.io/v1"];

/// A cluster with the manifests in it.
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) directory: TempDir,
    /// The address of the webhook's Service, which is where the aggregator listens.
    pub(crate) webhook: SocketAddr,
    _stage: MutexGuard<'static, ()>,
}

impl Scene {
    /// Starts a cluster and installs the aggregator's manifests with these components.
    pub(crate) fn install(components: &[&str]) -> Self {
        let stage = stage();
        let cluster = Cluster::start();
        let directory = tempfile::tempdir().unwrap();
        let webhook = service_address();
        let mut objects = rendered(directory.path(), components);
        objects.iter_mut().for_each(|object| place(object, webhook));
        cluster.namespace(HOME, &json!({}));
        cluster.namespace(SHOP, &json!({}));
        for object in &objects {
            if !is_foreign(object) {
                cluster.apply(object);
            }
        }
        Self {
            cluster,
            directory,
            webhook,
            _stage: stage,
        }
    }

    /// An aggregator with the account of the manifests; it is not started.
    pub(crate) fn aggregator(&self, arguments: &[&str]) -> Aggregator {
        let kubeconfig = self.cluster.kubeconfig_of(HOME, "coalmine");
        self.aggregator_with(&kubeconfig, arguments)
    }

    /// The same with another kubeconfig, and a directory of its own.
    pub(crate) fn aggregator_with(&self, kubeconfig: &Path, arguments: &[&str]) -> Aggregator {
        let directory = self.cluster.file("aggregator");
        fs::create_dir(&directory).unwrap();
        let kubeconfig = kubeconfig.display().to_string();
        Aggregator::prepare_with(&directory, POLICY)
            .with_arguments(&["--kubeconfig", &kubeconfig])
            .with_arguments(arguments)
    }

    /// An aggregator that injects, with a certificate that it keeps itself; it is started, and the API server asks it.
    pub(crate) fn injecting(&self, arguments: &[&str]) -> Aggregator {
        let listen = self.webhook.to_string();
        let webhook = [
            "--listen-webhook",
            &listen,
            "--webhook-secret",
            "coalmine-webhook",
            "--agent-image",
            "localhost/coalmine-agent:dev",
            "--agent-aggregator",
            "http://coalmine.coalmine:7443",
        ];
        let mut aggregator = self.aggregator(&webhook).with_arguments(arguments);
        aggregator.launch();
        self.wait_for_injection();
        aggregator
    }

    /// Waits until pods get agents.
    pub(crate) fn wait_for_injection(&self) {
        let pod = pod("dry-run", "canary");
        eventually("the webhook injects", || {
            let answer = self.cluster.request("POST", &format!("{PODS}?dryRun=All"), &pod);
            (answer.status == 201 && has_agent(&answer.json())).then_some(())
        });
    }

    /// Creates a pod; gives it as it was stored.
    pub(crate) fn create(&self, pod: &Value) -> Value {
        self.cluster.create(PODS, pod)
    }
}

/// What `deploy/base` is with these components, as objects.
pub(crate) fn rendered(directory: &Path, components: &[&str]) -> Vec<Value> {
    let kustomization = directory.join(format!("kustomization-{}", components.join("-")));
    fs::create_dir_all(&kustomization).unwrap();
    let deploy = relative(&kustomization, &repository().join("deploy"));
    let at = |place: &str| json!(deploy.join(place));
    let components: Vec<_> = components
        .iter()
        .map(|component| at(&format!("components/{component}")))
        .collect();
    let text = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [at("base")],
        "components": components,
    });
    fs::write(kustomization.join("kustomization.yaml"), text.to_string()).unwrap();
    render(&kustomization)
}

/// kustomize takes no absolute paths.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to) = (from.canonicalize().unwrap(), to.canonicalize().unwrap());
    let up = from.components().skip(1).map(|_| "..");
    up.collect::<PathBuf>().join(to.strip_prefix("/").unwrap())
}

/// Whether the object is of a kind that this cluster does not have.
pub(crate) fn is_foreign(object: &Value) -> bool {
    FOREIGN.iter().any(|group| object["apiVersion"] == *group)
}

/// Gives the webhook's Service an address of this machine and a port that anybody may listen on.
fn place(object: &mut Value, webhook: SocketAddr) {
    match object["kind"].as_str() {
        Some("Service") => {
            object["spec"]["clusterIP"] = json!(webhook.ip());
            for port in object["spec"]["ports"].as_array_mut().unwrap() {
                if port["port"] == 443 {
                    port["port"] = json!(webhook.port());
                }
            }
        }
        Some("MutatingWebhookConfiguration") => {
            for each in object["webhooks"].as_array_mut().unwrap() {
                each["clientConfig"]["service"]["port"] = json!(webhook.port());
            }
        }
        _ => {}
    }
}

/// A pod that asks for an agent.
pub(crate) fn pod(name: &str, arm: &str) -> Value {
    let version = if arm == "canary" { "v2" } else { "v1" };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": SHOP,
            "labels": {
                "coalmine.dev/inject": "enabled",
                "coalmine.dev/arm": arm,
                "app.kubernetes.io/name": "checkout",
                "app.kubernetes.io/version": version,
            },
            "annotations": { "coalmine.dev/tenant": "header:x-tenant-id" },
        },
        "spec": { "containers": [{
            "name": "app",
            "image": "docker.io/library/nginx:1.27",
            "ports": [{ "name": "http", "containerPort": 8080 }],
        }] },
    })
}

/// The containers of a pod that are agents, of either kind.
pub(crate) fn agents(pod: &Value) -> usize {
    ["initContainers", "containers"]
        .iter()
        .filter_map(|list| pod["spec"][list].as_array())
        .flatten()
        .filter(|container| container["name"] == "coalmine-agent")
        .count()
}

/// Whether a pod has an agent.
pub(crate) fn has_agent(pod: &Value) -> bool {
    agents(pod) > 0
}

/// The warnings of an answer, as the API server passes them on.
pub(crate) fn warnings(answer: &Answer) -> Vec<String> {
    let lines = answer.head.lines().filter_map(|line| line.split_once(": "));
    lines
        .filter(|(name, _)| name.eq_ignore_ascii_case("warning"))
        .map(|(_, text)| text.to_owned())
        .collect()
}

/// The uid of an object.
pub(crate) fn uid(object: &Value) -> String {
    object["metadata"]["uid"].as_str().unwrap().to_owned()
}

/// An entry of a Secret; empty where there is none.
pub(crate) fn entry(secret: &Value, name: &str) -> String {
    decoded(&secret["data"][name])
}

/// Text that stands in an object as base64; empty where there is none.
pub(crate) fn decoded(value: &Value) -> String {
    let bytes = STANDARD.decode(value.as_str().unwrap_or_default()).unwrap();
    String::from_utf8(bytes).unwrap()
}
