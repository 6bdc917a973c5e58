//! Pods through the API server and the webhook: who gets an agent, who does not and is told why, who is asked twice.

use std::{
    fs,
    io::{BufRead, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_aggregator::inject::{Injected, Operation, Settings, apply, inject};
use coalmine_tests::{
    eventually,
    kubernetes::{error_of, program},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};

use crate::scene::{PODS, SECRET, SHOP, Scene, agents, entry, has_agent, pod, warnings};

/// The name by which API servers call the webhook.
const NAME: &str = "coalmine.coalmine.svc";

/// How long a connection may give no sign before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) type Edit = fn(&mut Value);

/// What is wrong with a pod, a part of the sentence that its author gets, and what is done to a good pod for it.
pub(crate) const REFUSED: &[(&str, &str, Edit)] = &[
    ("unknown-inject", "say enabled or disabled", |pod| {
        pod["metadata"]["labels"]["coalmine.dev/inject"] = json!("true");
    }),
    ("host-network", "pod network", |pod| {
        pod["spec"]["hostNetwork"] = json!(true);
    }),
    ("mirror-pod", "from a file", |pod| {
        annotate(pod, "kubernetes.io/config.mirror", "1f");
        pod["spec"]["nodeName"] = json!("somewhere");
        pod["spec"]["automountServiceAccountToken"] = json!(false);
    }),
    ("static-pod", "static one", |pod| {
        annotate(pod, "kubernetes.io/config.source", "http");
    }),
    ("windows", "Linux", |pod| {
        pod["spec"]["os"] = json!({ "name": "windows" });
    }),
    ("no-arm", "coalmine.dev/arm", |pod| {
        unlabel(pod, "coalmine.dev/arm")
    }),
    ("unknown-arm", "stable", |pod| {
        pod["metadata"]["labels"]["coalmine.dev/arm"] = json!("stable");
    }),
    ("no-service", "coalmine.dev/service", |pod| {
        unlabel(pod, "app.kubernetes.io/name");
    }),
    ("no-version", "coalmine.dev/version", |pod| {
        unlabel(pod, "app.kubernetes.io/version");
    }),
    ("bad-label", "coalmine.dev/service", |pod| {
        pod["metadata"]["labels"]["app.kubernetes.io/name"] = json!("");
    }),
    ("unknown-setting", "is no setting", |pod| {
        annotate(pod, "coalmine.dev/tenents", "header:x");
    }),
    ("bad-setting", "cannot be read", |pod| {
        annotate(pod, "coalmine.dev/tenant", "cookie:x");
    }),
    ("no-port", "declares a port", |pod| {
        pod["spec"]["containers"][0]["ports"] = json!([]);
    }),
    ("no-such-port", "web", |pod| {
        annotate(pod, "coalmine.dev/port", "web")
    }),
    ("ambiguous-port", "say which", |pod| {
        port(pod, json!({ "containerPort": 9100 }));
    }),
    ("unnamed-port", "has no name", |pod| {
        pod["spec"]["containers"][0]["ports"] = json!([{ "containerPort": 8080 }]);
    }),
    ("not-tcp", "UDP", |pod| {
        pod["spec"]["containers"][0]["ports"][0]["protocol"] = json!("UDP");
    }),
    ("host-port", "hostPort", |pod| {
        pod["spec"]["containers"][0]["ports"][0]["hostPort"] = json!(8080);
    }),
    ("reserved-port", "15090", |pod| {
        annotate(pod, "coalmine.dev/port", "http");
        port(pod, json!({ "name": "other", "containerPort": 15090 }));
    }),
    ("port-name", "coalmine-app", |pod| {
        pod["spec"]["containers"][0]["ports"][0]["name"] = json!("coalmine-app");
    }),
    ("container-name", "was not injected", |pod| {
        let other = json!({ "name": "coalmine-agent", "image": "docker.io/library/nginx:1.27" });
        pod["spec"]["containers"].as_array_mut().unwrap().push(other);
    }),
    ("volume-name", "coalmine-labels", |pod| {
        pod["spec"]["volumes"] = json!([{ "name": "coalmine-labels", "emptyDir": {} }]);
    }),
    // As much as the API server can count: the agent's cannot be added.
    ("pod-resources", "cannot be added", |pod| {
        pod["spec"]["resources"] = json!({ "limits": { "memory": "9223372036854775807" } });
    }),
];

fn annotate(pod: &mut Value, name: &str, value: &str) {
    pod["metadata"]["annotations"][name] = json!(value);
}

fn unlabel(pod: &mut Value, name: &str) {
    let labels = pod["metadata"]["labels"].as_object_mut().unwrap();
    labels.remove(name).unwrap();
}

fn port(pod: &mut Value, port: Value) {
    let ports = pod["spec"]["containers"][0]["ports"].as_array_mut().unwrap();
    ports.push(port);
}

/// What an author would send to get the same pod again.
fn as_written(stored: &Value, name: &str) -> Value {
    let mut pod = stored.clone();
    pod["metadata"] = json!({
        "name": name,
        "namespace": SHOP,
        "labels": stored["metadata"]["labels"],
        "annotations": stored["metadata"]["annotations"],
    });
    pod.as_object_mut().unwrap().remove("status");
    pod
}

#[test]
fn who_asks_gets_an_agent_and_nobody_else() {
    let scene = Scene::install(&["webhook", "identity"]);
    let _aggregator = scene.injecting(&["--agent-audience", "coalmine"]);

    let stored = scene.create(&pod("asks", "canary"));
    let agent = &stored["spec"]["initContainers"][0];
    assert_eq!(agent["name"], "coalmine-agent", "{stored}");
    assert_eq!(
        agent["restartPolicy"], "Always",
        "the server has native sidecars: {agent}"
    );
    assert_eq!(agent["ports"][0]["name"], "http");
    assert_eq!(
        stored["spec"]["containers"][0]["ports"][0]["name"],
        "coalmine-app"
    );
    let volumes = stored["spec"]["volumes"].as_array().unwrap();
    let volume = |name: &str| volumes.iter().find(|volume| volume["name"] == name).unwrap();
    let fields = &volume("coalmine-labels")["downwardAPI"]["items"];
    assert_eq!(
        fields[0]["fieldRef"]["fieldPath"], "metadata.labels",
        "{volumes:?}"
    );
    let token = &volume("coalmine-token")["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!(token["audience"], "coalmine", "{volumes:?}");
    // The token of the pod's account is for the application alone.
    let app = &stored["spec"]["containers"][0];
    assert!(has_account_token(app), "the server mounts no tokens: {app}");
    assert!(!has_account_token(agent), "{agent}");

    // A server that sees the pod twice sees nothing to do the second time.
    let again = scene.create(&as_written(&stored, "again"));
    assert_eq!(agents(&again), 1);
    let agent_again = &again["spec"]["initContainers"][0];
    assert_eq!(agent_again["args"], agent["args"]);
    assert!(!has_account_token(agent_again), "{agent_again}");
    assert_eq!(
        again["metadata"]["annotations"],
        stored["metadata"]["annotations"]
    );

    // Without the label the API server does not even ask.
    let mut silent = pod("silent", "canary");
    unlabel(&mut silent, "coalmine.dev/inject");
    let silent = scene.create(&silent);
    assert!(!has_agent(&silent), "{silent}");
    assert_eq!(
        silent["metadata"]["annotations"],
        json!({ "coalmine.dev/tenant": "header:x-tenant-id" })
    );
    assert_eq!(silent["spec"]["containers"][0]["ports"][0]["name"], "http");
    let mut disabled = pod("disabled", "canary");
    disabled["metadata"]["labels"]["coalmine.dev/inject"] = json!("disabled");
    let answer = scene.cluster.request("POST", PODS, &disabled);
    assert_eq!(answer.status, 201, "{}", answer.body);
    assert!(!has_agent(&answer.json()), "{}", answer.body);
    let said = warnings(&answer).concat();
    assert!(!said.contains("coalmine"), "{said}");

    // Pods of a namespace that is left out are left alone, whatever they ask.
    let mut system = pod("system", "canary");
    system["metadata"]["namespace"] = json!("kube-system");
    scene.cluster.account("kube-system", "default");
    let system = scene
        .cluster
        .create("/api/v1/namespaces/kube-system/pods", &system);
    assert!(!has_agent(&system), "{system}");
}

#[test]
fn who_asks_and_cannot_have_one_is_created_and_told_why() {
    let scene = Scene::install(&["webhook"]);
    let mut aggregator = scene.injecting(&[]);
    for (name, part, edit) in REFUSED {
        let mut refused = pod(name, "canary");
        edit(&mut refused);
        is_refused(&scene, &refused, part);
    }

    // A pod of more values than are read is a good one to the API server.
    let mut endless = pod("endless", "canary");
    endless["spec"]["containers"][0]["args"] = json!(vec![""; 200_001]);
    is_refused(&scene, &endless, "more than 200000 values");

    // As people see it.
    let mut unarmed = pod("for-people", "canary");
    unlabel(&mut unarmed, "coalmine.dev/arm");
    let output = scene
        .cluster
        .try_kubectl(["create", "-f", "-"], Some(&unarmed.to_string()));
    let said = error_of(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("Warning: ")
            && said.contains("no agent")
            && said.contains("say canary, baseline or flagger"),
        "{said}"
    );

    // As an ordinary container the agent would keep a job from ending.
    aggregator.terminate();
    let _ordinary = scene.injecting(&["--native-sidecar", "false"]);
    let mut job = pod("job", "canary");
    job["spec"]["restartPolicy"] = json!("Never");
    is_refused(&scene, &job, "native sidecars");
    let ordinary = scene.create(&pod("ordinary", "canary"));
    let agent = &ordinary["spec"]["containers"][1];
    assert_eq!(agent["name"], "coalmine-agent", "{ordinary}");
    assert!(!has_account_token(agent), "{agent}");
}

/// The API server takes no pod that asks for less than its containers do, or has a lower limit than one of them.
#[test]
fn a_pod_that_says_what_it_needs_as_a_whole_is_created_with_room_for_its_agent() {
    let scene = Scene::install(&["webhook"]);
    let mut aggregator = scene.injecting(&[]);
    let amounts = |cpu: &str, memory: &str| json!({ "cpu": cpu, "memory": memory });
    let (sum, with_agent) = (amounts("100m", "32Mi"), amounts("110m", "48Mi"));
    let limits = amounts("500m", "64Mi");
    for (name, whole, app, expected) in [
        // What pods ask for the API server has filled in before it asks the webhook: the sum, or the limits.
        (
            "limits-only",
            json!({ "limits": limits }),
            json!({ "requests": sum }),
            json!({ "limits": amounts("510m", "256Mi"), "requests": with_agent }),
        ),
        (
            "limits-alone",
            json!({ "limits": limits }),
            json!({}),
            json!({ "limits": amounts("510m", "256Mi"), "requests": amounts("510m", "80Mi") }),
        ),
        (
            "requests-equal",
            json!({ "requests": sum }),
            json!({ "requests": sum }),
            json!({ "requests": with_agent }),
        ),
    ] {
        let stored = scene.create(&needing(name, whole, app));
        assert_eq!(agents(&stored), 1, "{name}: {stored}");
        assert_eq!(stored["spec"]["resources"], expected, "{name}: {stored}");
        let again = scene.create(&as_written(&stored, &format!("{name}-again")));
        assert_eq!(agents(&again), 1, "{name}: {again}");
        assert_eq!(again["spec"]["resources"], expected, "{name}: {again}");
    }

    // The agent's own limit is higher than the pod's.
    aggregator.terminate();
    let _ordinary = scene.injecting(&["--native-sidecar", "false"]);
    let small = needing("small", json!({ "limits": { "memory": "64Mi" } }), json!({}));
    let stored = scene.create(&small);
    assert_eq!(
        stored["spec"]["containers"][1]["name"], "coalmine-agent",
        "{stored}"
    );
    assert_eq!(
        stored["spec"]["resources"]["limits"]["memory"], "256Mi",
        "{stored}"
    );
}

/// A pod that needs this as a whole, and whose application needs this.
fn needing(name: &str, whole: Value, app: Value) -> Value {
    let mut pod = pod(name, "canary");
    pod["spec"]["resources"] = whole;
    pod["spec"]["containers"][0]["resources"] = app;
    pod
}

/// Whether the API server has mounted the token of the pod's account into a container.
fn has_account_token(container: &Value) -> bool {
    let mut mounts = container["volumeMounts"].as_array().into_iter().flatten();
    mounts.any(|mount| mount["name"].as_str().unwrap().starts_with("kube-api-access"))
}

fn is_refused(scene: &Scene, pod: &Value, part: &str) {
    let before = agents(pod);
    let answer = scene.cluster.request("POST", PODS, pod);
    assert_eq!(answer.status, 201, "{part}: {}", answer.body);
    assert_eq!(agents(&answer.json()), before, "{part}: {}", answer.body);
    let warnings = warnings(&answer);
    let told = warnings
        .iter()
        .find(|warning| warning.contains("coalmine: no agent"))
        .unwrap_or_else(|| panic!("{part}: {warnings:?}"));
    assert!(told.contains(part), "{part}: {told}");
}

#[test]
fn an_injected_pod_passes_the_restricted_pod_security_standard() {
    let scene = Scene::install(&["webhook", "identity"]);
    let _aggregator = scene.injecting(&["--agent-audience", "coalmine"]);
    scene.cluster.namespace(
        "strict",
        &json!({ "pod-security.kubernetes.io/enforce": "restricted" }),
    );
    let mut strict = pod("strict", "canary");
    strict["metadata"]["namespace"] = json!("strict");
    let refused = scene
        .cluster
        .request("POST", "/api/v1/namespaces/strict/pods", &strict);
    assert_eq!(
        refused.status, 403,
        "the namespace enforces nothing: {}",
        refused.body
    );
    strict["spec"]["containers"][0]["securityContext"] = json!({
        "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    });
    let stored = scene.cluster.create("/api/v1/namespaces/strict/pods", &strict);
    assert!(has_agent(&stored), "{stored}");
}

#[test]
fn without_the_aggregator_pods_are_created_as_they_are() {
    let scene = Scene::install(&["webhook"]);
    let mut aggregator = scene.injecting(&[]);
    assert!(has_agent(&scene.create(&pod("before", "canary"))));
    let certificate = || entry(&scene.cluster.get(SECRET), "tls.crt");
    let before = certificate();
    assert!(!before.is_empty(), "there is no certificate");
    aggregator.kill_9();
    assert!(!has_agent(&scene.create(&pod("while-away", "canary"))));
    aggregator.launch();
    eventually("pods get agents again, with the same certificate", || {
        let answer = scene
            .cluster
            .request("POST", &format!("{PODS}?dryRun=All"), &pod("after", "canary"));
        has_agent(&answer.json()).then_some(())
    });
    assert_eq!(certificate(), before);
}

#[test]
fn a_review_that_is_half_here_when_the_aggregator_ends_is_answered() {
    let scene = Scene::install(&["webhook"]);
    let mut aggregator = scene.injecting(&[]);
    let review = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "1",
            "operation": "CREATE",
            "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "namespace": SHOP,
            "object": pod("half", "canary"),
        },
    });
    let review = review.to_string();
    let (first, rest) = review.split_at(review.len() / 2);
    let mut stream = connect(&scene);
    let head = format!(
        "POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         expect: 100-continue\r\n\r\n",
        review.len()
    );
    send(&mut stream, &head);
    // From here on the webhook has the head, and reads the body.
    let begun = read_head(&mut stream);
    assert!(begun.starts_with("HTTP/1.1 100 "), "{begun}");
    send(&mut stream, first);
    thread::scope(|scope| {
        // With the exit code 0, or this panics.
        let ending = scope.spawn(|| aggregator.terminate());
        eventually("no other connection is taken", || {
            TcpStream::connect(scene.webhook).is_err().then_some(())
        });
        send(&mut stream, rest);
        let head = read_head(&mut stream);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let answer = read_json(&mut stream, &head);
        let patch = answer["response"]["patch"].as_str();
        let patch = STANDARD
            .decode(patch.unwrap_or_else(|| panic!("{answer}")))
            .unwrap();
        let patch: Value = serde_json::from_slice(&patch).unwrap();
        let paths: Vec<_> = patch.as_array().unwrap().iter().map(|it| &it["path"]).collect();
        assert!(paths.contains(&&json!("/spec/initContainers")), "{patch}");
        ending.join().unwrap();
    });
}

type Stream = BufReader<StreamOwned<ClientConnection, TcpStream>>;

/// A connection to the webhook, without HTTP/2, of somebody who trusts the authority in the Secret.
fn connect(scene: &Scene) -> Stream {
    let mut roots = RootCertStore::empty();
    let authority = entry(&scene.cluster.get(SECRET), "ca.crt");
    for root in CertificateDer::pem_slice_iter(authority.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(NAME).unwrap();
    let tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(scene.webhook).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(StreamOwned::new(tls, stream))
}

fn send(stream: &mut Stream, text: &str) {
    let stream = stream.get_mut();
    stream.write_all(text.as_bytes()).unwrap();
    stream.flush().unwrap();
}

/// The head of an answer, with the empty line after it.
fn read_head(stream: &mut Stream) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let length = stream.read_line(&mut head).unwrap();
        assert!(length > 0, "the connection ends after {head:?}");
    }
    head
}

/// The body after a head that says its length.
fn read_json(stream: &mut Stream, head: &str) -> Value {
    let head = head.to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.unwrap_or_else(|| panic!("{head}")).parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn kubectl_makes_of_a_patch_what_we_make_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let plain = Settings::new("http://coalmine.coalmine:7443", "localhost/coalmine-agent:dev");
    let with_tokens = Settings {
        audience: Some("coalmine".to_owned()),
        ..plain.clone()
    };
    let ordinary = Settings {
        native_sidecar: false,
        ..plain.clone()
    };
    for pod in patched_pods() {
        for settings in [&plain, &with_tokens, &ordinary] {
            let patch = match inject(&pod, settings) {
                Injected::Patch(patch) => patch,
                other => panic!("{other:?}: {pod}"),
            };
            let mut ours = pod.clone();
            apply(&mut ours, &patch).unwrap();
            assert!(has_agent(&ours), "{ours}");
            assert_eq!(patched_by_kubectl(directory.path(), &pod, &patch), ours);
        }
    }
}

/// Pods whose patches differ: lists that are there or not, keys with signs that paths must escape, ports by name.
fn patched_pods() -> [Value; 5] {
    let mut bare = pod("bare", "canary");
    bare["metadata"].as_object_mut().unwrap().remove("annotations");
    let mut empty = pod("empty", "baseline");
    empty["spec"]["volumes"] = json!(null);
    empty["spec"]["initContainers"] = json!([]);
    let mut rich = pod("rich", "canary");
    annotate(&mut rich, "example.com/a~b", "<&> \u{1F426}");
    annotate(&mut rich, "coalmine.dev/port", "http");
    port(&mut rich, json!({ "name": "metrics", "containerPort": 9100 }));
    let app = &mut rich["spec"]["containers"][0];
    app["livenessProbe"] = json!({ "tcpSocket": { "port": "http" } });
    app["readinessProbe"] = json!({ "httpGet": { "path": "/", "port": "http" } });
    app["lifecycle"] = json!({ "preStop": { "httpGet": { "port": "http" } } });
    let beside = json!({ "name": "beside", "image": "docker.io/library/nginx:1.27" });
    rich["spec"]["containers"]
        .as_array_mut()
        .unwrap()
        .insert(0, beside.clone());
    rich["spec"]["initContainers"] = json!([beside]);
    rich["spec"]["initContainers"][0]["name"] = json!("first");
    rich["spec"]["volumes"] = json!([{ "name": "tmp", "emptyDir": {} }]);
    let limits = json!({ "limits": { "cpu": "1", "memory": "64Mi" } });
    let whole = needing("whole", limits, json!({}));
    [pod("plain", "canary"), bare, empty, rich, whole]
}

/// The same patch by kubectl, which asks no server for it.
fn patched_by_kubectl(directory: &Path, pod: &Value, patch: &[Operation]) -> Value {
    let (document, changes) = (directory.join("pod.json"), directory.join("patch.json"));
    fs::write(&document, pod.to_string()).unwrap();
    fs::write(&changes, serde_json::to_string(patch).unwrap()).unwrap();
    let mut command = Command::new(program("kubectl"));
    command
        .env("HOME", directory)
        .args([
            "--kubeconfig=/dev/null",
            "patch",
            "--local",
            "--type=json",
            "-o",
            "json",
        ])
        .arg("-f")
        .arg(&document)
        .arg("--patch-file")
        .arg(&changes);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}: {pod}", error_of(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}
