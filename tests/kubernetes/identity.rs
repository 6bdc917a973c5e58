//! Who agents are: the API server is asked about their tokens, and only a token of the very pod will do.

use std::time::{Duration, SystemTime};

use coalmine_proto::{
    PROTOCOL,
    names::Arm,
    v1::{AgentMessage, Hello, agent_message::Kind, telemetry_client::TelemetryClient},
};
use coalmine_tests::{
    components::{Agent, Aggregator, Nginx},
    eventually,
    http::get,
    kubernetes::ISSUER,
    speaker::now_ms,
};
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status, transport::Endpoint};

use crate::scene::{PODS, SHOP, Scene, pod, uid};

const PATIENCE: Duration = Duration::from_secs(20);

/// What an agent that presents a token is answered: none if it is let in.
fn presented(aggregator: &Aggregator, instance: &str, token: Option<&str>) -> Option<Status> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let hello = Hello {
        protocol: PROTOCOL,
        instance: instance.to_owned(),
        epoch: now_ms(),
        service: "checkout".to_owned(),
        version: "v2".to_owned(),
        arm: Arm::Canary.to_wire().into(),
        next_seq: 1,
        now_unix_ms: now_ms(),
        ..Hello::default()
    };
    let said = async {
        let endpoint = Endpoint::from_shared(format!("http://{}", aggregator.grpc)).unwrap();
        let mut client = TelemetryClient::new(endpoint.connect().await.unwrap());
        let hello = AgentMessage {
            kind: Some(Kind::Hello(hello)),
        };
        // Open after the first message, as a session is.
        let messages = tokio_stream::once(hello).chain(tokio_stream::pending());
        let mut request = Request::new(messages);
        if let Some(token) = token {
            let bearer = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", bearer);
        }
        let mut answers = client.session(request).await?.into_inner();
        answers.message().await.map(drop)
    };
    let said = runtime.block_on(async { tokio::time::timeout(PATIENCE, said).await });
    said.unwrap().err()
}

fn assert_refused(what: &str, answer: Option<Status>) {
    let status = answer.unwrap_or_else(|| panic!("{what}: it is let in"));
    let refused = matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied);
    assert!(refused, "{what}: {status}");
}

/// A token of our audience that is bound to a pod.
fn bound(scene: &Scene, pod: &Value, audience: &str) -> String {
    let name = pod["metadata"]["name"].as_str().unwrap();
    let arguments = [
        format!("--audience={audience}"),
        "--bound-object-kind=Pod".to_owned(),
        format!("--bound-object-name={name}"),
        format!("--bound-object-uid={}", uid(pod)),
    ];
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    scene.cluster.token(SHOP, "default", &arguments)
}

/// The claims that the cluster makes for a pod, with another end.
fn claims(scene: &Scene, pod: &Value, expires: u64) -> Value {
    let account = scene
        .cluster
        .get("/api/v1/namespaces/shop/serviceaccounts/default");
    json!({
        "iss": ISSUER,
        "sub": "system:serviceaccount:shop:default",
        "aud": ["coalmine"],
        "iat": expires - 3_600,
        "nbf": expires - 3_600,
        "exp": expires,
        "kubernetes.io": {
            "namespace": SHOP,
            "serviceaccount": { "name": "default", "uid": uid(&account) },
            "pod": { "name": pod["metadata"]["name"], "uid": uid(pod) },
        },
    })
}

#[test]
fn only_a_token_of_the_very_pod_and_for_us_is_believed() {
    let scene = Scene::install(&["identity"]);
    let mut aggregator = scene.aggregator(&["--agent-audience", "coalmine"]);
    aggregator.launch();
    let [ours, other, gone] = ["ours", "other", "gone"].map(|name| scene.create(&pod(name, "canary")));
    let instance = uid(&ours);
    let present = |token: &str| presented(&aggregator, &instance, Some(token));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap().as_secs();

    let believed = present(&bound(&scene, &ours, "coalmine"));
    assert!(believed.is_none(), "a right token: {believed:?}");
    // So that the one below is refused for its end and for nothing else.
    let believed = present(&scene.cluster.signed(&claims(&scene, &ours, now + 600)));
    assert!(believed.is_none(), "a token that we have signed: {believed:?}");

    assert_refused("no token", presented(&aggregator, &instance, None));
    assert_refused("no token at all", present("nothing"));
    assert_refused(
        "another audience",
        present(&bound(&scene, &ours, "somebody-else")),
    );
    assert_refused(
        "the API server's audience",
        present(&bound(&scene, &ours, ISSUER)),
    );
    assert_refused("another pod's", present(&bound(&scene, &other, "coalmine")));
    let unbound = scene.cluster.token(SHOP, "default", &["--audience", "coalmine"]);
    assert_refused("no pod's", present(&unbound));
    let expired = scene.cluster.signed(&claims(&scene, &ours, now - 60));
    assert_refused("expired", present(&expired));

    // A token goes with its pod.
    let token = bound(&scene, &gone, "coalmine");
    scene.cluster.delete(&format!("{PODS}/gone"));
    assert_refused(
        "a pod that is gone",
        presented(&aggregator, &uid(&gone), Some(&token)),
    );
}

#[test]
fn an_agent_presents_the_token_of_its_file() {
    let scene = Scene::install(&["identity"]);
    let mut aggregator = scene.aggregator(&["--agent-audience", "coalmine"]);
    aggregator.launch();
    let stored = scene.create(&pod("ours", "canary"));
    let directory = scene.directory.path();
    let file = directory.join("token");
    std::fs::write(&file, bound(&scene, &stored, "somebody-else")).unwrap();
    let application = Nginx::start(directory, "nginx", None);
    let path = file.display().to_string();
    let agent = Agent::start_with(
        directory,
        &uid(&stored),
        "canary",
        application.address,
        aggregator.grpc,
        &["--token-file", &path],
    );
    let is_connected = || {
        let metrics = get(agent.admin, "/metrics").ok()?.body;
        let line = metrics
            .lines()
            .find(|line| line.starts_with("coalmine_agent_session_connected "));
        Some(line?.ends_with(" 1"))
    };
    // Without a session it is still a proxy.
    let answer = get(agent.address, "/").unwrap();
    assert_eq!(
        (answer.status, is_connected()),
        (200, Some(false)),
        "{}",
        answer.body
    );
    // The kubelet puts a fresh token into the same place; the next connection takes it.
    std::fs::write(&file, bound(&scene, &stored, "coalmine")).unwrap();
    eventually("the agent is let in", || {
        is_connected().filter(|connected| *connected)
    });
}

#[test]
fn a_service_that_is_bound_to_a_namespace_is_spoken_for_by_its_pods_only() {
    let scene = Scene::install(&["identity"]);
    let pod = scene.create(&pod("ours", "canary"));
    let token = bound(&scene, &pod, "coalmine");
    for (namespace, is_let_in) in [(SHOP, true), ("elsewhere", false)] {
        let binding = format!("checkout={namespace}");
        let mut aggregator =
            scene.aggregator(&["--agent-audience", "coalmine", "--agent-namespace", &binding]);
        aggregator.launch();
        let answer = presented(&aggregator, &uid(&pod), Some(&token));
        if is_let_in {
            assert!(answer.is_none(), "{answer:?}");
        } else {
            let status = answer.expect("it is refused");
            assert_eq!(status.code(), Code::Unauthenticated, "{status}");
            assert!(status.message().contains("elsewhere"), "{status}");
        }
        aggregator.terminate();
    }
}
