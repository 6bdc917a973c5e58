//! Reviews as an API server sends them, and what is none: the answers are whole and short, and admit every pod.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::{collection, prelude::*, sample};

use super::{
    properties::{any_json, any_pod, places},
    *,
};
use crate::inject::admission::{Admitted, Answer, answer};

const UID: &str = "705ab4f5-6393-11e8-b7cc-42010a800002";

/// The form is that of the documentation (Kubernetes, Dynamic Admission Control, "Webhook request and response").
fn review(pod: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": UID,
            "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "requestKind": { "group": "", "version": "v1", "kind": "Pod" },
            "requestResource": { "group": "", "version": "v1", "resource": "pods" },
            "namespace": "shop",
            "operation": "CREATE",
            "userInfo": { "username": "system:serviceaccount:kube-system:replicaset-controller" },
            "object": pod,
            "oldObject": null,
            "dryRun": false,
            "options": { "kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1" },
        },
    })
}

/// The answer, and its response.
#[track_caller]
fn ask(review: &str) -> (Answer, Value) {
    let answer = answer(review.as_bytes(), &settings()).unwrap();
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(body["kind"], "AdmissionReview");
    let response = body["response"].clone();
    assert_eq!(
        (&response["uid"], &response["allowed"]),
        (&json!(UID), &json!(true))
    );
    (answer, response)
}

/// The pod as the API server makes it of a response.
fn patched(pod: &Value, response: &Value) -> Value {
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: Value = serde_json::from_slice(&patch).unwrap();
    let mut pod = pod.clone();
    for operation in patch.as_array().unwrap() {
        apply_rfc6902(&mut pod, operation);
    }
    pod
}

/// The warnings of a response, each of which a header can carry.
#[track_caller]
fn warnings_of(response: &Value) -> Vec<String> {
    let warnings: Vec<String> = match response.get("warnings") {
        None => Vec::new(),
        Some(warnings) => serde_json::from_value(warnings.clone()).unwrap(),
    };
    for warning in &warnings {
        assert!(warning.len() <= 256, "{warning}");
        assert!(warning.bytes().all(|b| (b' '..=b'~').contains(&b)), "{warning}");
        assert!(warning.starts_with("coalmine: "), "{warning}");
    }
    assert!(warnings.len() <= 4, "{warnings:?}");
    warnings
}

/// Lists within each other.
fn deep(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

/// The review of a good pod, with this text in the place of its status.
fn with_status(status: &str) -> String {
    let mut pod = pod();
    pod["status"] = json!("PLACE");
    review(&pod).to_string().replace("\"PLACE\"", status)
}

#[test]
fn a_new_pod_gets_its_agent() {
    let mut pod = pod();
    pod["metadata"].as_object_mut().unwrap().remove("name");
    pod["metadata"]["generateName"] = json!("checkout-");
    let (answer, response) = ask(&review(&pod).to_string());
    assert_eq!(answer.admitted, Admitted::Patched);
    assert_eq!(
        (answer.about.namespace.as_str(), answer.about.name.as_str()),
        ("shop", "checkout-")
    );
    assert!(!answer.about.is_dry_run);
    assert!(warnings_of(&response).is_empty());
    let patched = patched(&pod, &response);
    assert_eq!(patched, injected(&pod, &settings()));

    // API servers may ask a second time, when another webhook has changed the pod.
    let (answer, response) = ask(&review(&patched).to_string());
    assert_eq!(answer.admitted, Admitted::Unchanged(Unchanged::AlreadyInjected));
    assert_eq!(response, json!({ "uid": UID, "allowed": true }));
}

#[test]
fn a_refusal_is_a_warning() {
    let mut pod = pod();
    pod["spec"]["hostNetwork"] = json!(true);
    let mut review = review(&pod);
    review["request"]["dryRun"] = json!(true);
    let (answer, response) = ask(&review.to_string());
    assert_eq!(answer.admitted, Admitted::Refused(Refusal::HostNetwork));
    assert!(answer.about.is_dry_run);
    assert_eq!(
        warnings_of(&response),
        [format!("coalmine: no agent: {}", Refusal::HostNetwork)]
    );
    assert_eq!(response.get("patch"), None);
    assert_eq!(response.get("patchType"), None);
}

#[test]
fn what_makes_no_pod_is_let_through() {
    let kind = |group: &str, version: &str, kind: &str| {
        let mut review = review(&pod());
        review["request"]["kind"] = json!({ "group": group, "version": version, "kind": kind });
        review
    };
    let operation = |operation: &str| {
        let mut review = review(&pod());
        review["request"]["operation"] = json!(operation);
        review
    };
    for review in [
        kind("apps", "v1", "Deployment"),
        kind("example.com", "v1", "Pod"),
        kind("", "v2", "Pod"),
        kind("", "v1", "Binding"),
        operation("UPDATE"),
        operation("DELETE"),
        operation("CONNECT"),
    ] {
        let (answer, response) = ask(&review.to_string());
        assert_eq!(
            answer.admitted,
            Admitted::Unchanged(Unchanged::NotANewPod),
            "{review}"
        );
        assert_eq!(response, json!({ "uid": UID, "allowed": true }));
    }
    // A pod that does not ask, and one that is not there.
    for pod in [json!({ "metadata": {} }), json!(null)] {
        let (answer, _) = ask(&review(&pod).to_string());
        assert_eq!(answer.admitted, Admitted::Unchanged(Unchanged::NotOptedIn));
    }
    // What is left out where it is empty.
    let mut sparse = review(&pod());
    let request = sparse["request"].as_object_mut().unwrap();
    request.retain(|key, _| ["uid", "kind", "operation", "object"].contains(&key.as_str()));
    assert_eq!(ask(&sparse.to_string()).0.admitted, Admitted::Patched);
}

#[test]
fn what_is_no_review_says_why() {
    let with = |path: &str, value: Value| {
        let mut review = review(&pod());
        *review.pointer_mut(path).unwrap() = value;
        review.to_string()
    };
    let long = json!("x".repeat(1 << 20));
    for (text, part) in [
        (String::new(), "EOF"),
        ("{}".to_owned(), "missing field `apiVersion`"),
        ("[".repeat(1 << 20), "AdmissionReview"),
        (
            with("/apiVersion", json!("admission.k8s.io/v1beta1")),
            "\"admission.k8s.io/v1beta1\"; send an AdmissionReview of admission.k8s.io/v1",
        ),
        (with("/kind", json!("Pod")), "the body is \"Pod\""),
        (with("/kind", long.clone()), "the body is \"xxx"),
        (with("/request", json!(null)), "has no request"),
        (with("/request", long.clone()), "invalid type"),
        (with("/request/uid", json!("")), "uid is empty"),
        (with("/request/uid", long), "more than 128 bytes"),
        (with("/request/kind", json!("Pod")), "invalid type"),
    ] {
        let why = answer(text.as_bytes(), &settings()).unwrap_err();
        assert!(why.contains(part), "{part}: {why}");
        assert!(why.len() < 1_000, "{part}: {} bytes", why.len());
    }
}

#[test]
fn a_long_reason_is_several_warnings() {
    let mut pod = pod();
    let unknown = format!("coalmine.dev/{}", "x".repeat(90));
    pod["metadata"]["annotations"] = json!({ unknown: "header:x" });
    let refusal = match inject(&pod, &settings()) {
        Injected::Refused(refusal) => refusal.to_string(),
        other => panic!("{other:?}"),
    };
    let (_, response) = ask(&review(&pod).to_string());
    let warnings = warnings_of(&response);
    assert!(refusal.len() > 256 && warnings.len() > 1, "{refusal}");
    // Nothing of the sentence is lost, and no word is cut.
    let mut parts = vec![warnings[0].strip_prefix("coalmine: no agent: ").unwrap()];
    let rest = warnings[1..].iter();
    parts.extend(rest.map(|warning| warning.strip_prefix("coalmine: ").unwrap()));
    assert_eq!(parts.join(" "), refusal);
}

#[test]
fn odd_names_make_harmless_warnings() {
    for odd in [
        "\u{1F426}".repeat(500),
        "\u{1b}[2J\r\n\"\\".repeat(500),
        "x".repeat(1 << 20),
        " ".repeat(500),
        "\u{202e}\u{0}\u{7f}\u{85}".to_owned(),
    ] {
        let mut named = pod();
        named["metadata"]["name"] = json!(odd);
        named["metadata"]["labels"]["coalmine.dev/arm"] = json!(odd);
        let mut review = review(&named);
        review["request"]["namespace"] = json!(odd);
        let (answer, response) = ask(&review.to_string());
        assert!(!warnings_of(&response).is_empty());
        assert!(answer.body.len() < 2_000, "{} bytes", answer.body.len());
        for text in [answer.about.name, answer.about.namespace] {
            assert!(text.len() < 1_100, "{text}");
        }
    }
}

#[test]
fn the_answer_for_a_large_pod_is_small() {
    let mut pod = pod();
    let others = (0..500).map(|index| {
        let env = (0..30).map(|index| json!({ "name": format!("VARIABLE_{index}"), "value": "a,b,c" }));
        json!({
            "name": format!("other-{index}"),
            "image": "registry.example.com/other:1",
            "env": env.collect::<Vec<_>>(),
            "livenessProbe": { "httpGet": { "path": "/", "port": "http" } },
        })
    });
    pod["spec"]["containers"].as_array_mut().unwrap().extend(others);
    let review = review(&pod).to_string();
    assert!(review.len() > 500_000, "{} bytes", review.len());
    let (answer, response) = ask(&review);
    assert_eq!(answer.admitted, Admitted::Patched);
    assert!(answer.body.len() < 8_000, "{} bytes", answer.body.len());
    assert_eq!(patched(&pod, &response), injected(&pod, &settings()));
}

#[test]
fn a_pod_that_cannot_be_read_is_let_through() {
    for (status, part) in [
        (deep(1_000), "the pod cannot be read: recursion limit exceeded"),
        (deep(1 << 20), "the pod has more than 200000 values"),
        (
            format!("[{}0]", "0,".repeat(1 << 20)),
            "the pod has more than 200000 values",
        ),
        (
            format!("[{}0]", "{},".repeat(300_000)),
            "the pod has more than 200000 values",
        ),
        ("1e999".to_owned(), "the pod cannot be read: number out of range"),
        ("\"\\ud800\"".to_owned(), "the pod cannot be read: "),
    ] {
        let (answer, response) = ask(&with_status(&status));
        let warnings = warnings_of(&response);
        assert!(warnings[0].contains(part), "{part}: {warnings:?}");
        assert!(
            matches!(answer.admitted, Admitted::Refused(Refusal::Malformed(_))),
            "{part}"
        );
        assert!(answer.body.len() < 1_000, "{} bytes", answer.body.len());
    }
    // Punctuation within a text is text.
    let text = json!("{[,\\\"".repeat(100_000)).to_string();
    assert_eq!(ask(&with_status(&text)).0.admitted, Admitted::Patched);
    assert_eq!(ask(&with_status(&deep(100))).0.admitted, Admitted::Patched);
}

proptest! {
    #[test]
    fn every_pod_is_admitted(pod in any_pod(), place in any::<sample::Index>(), odd in any_json()) {
        let mut all = Vec::new();
        places(&pod, "", &mut all);
        let mut changed = pod.clone();
        *changed.pointer_mut(place.get::<String>(&all)).unwrap() = odd;
        for pod in [pod, changed] {
            let review = review(&pod).to_string();
            let (answer, response) = ask(&review);
            prop_assert!(answer.body.len() < 16_000 + 16 * review.len());
            let warnings = warnings_of(&response);
            match answer.admitted {
                Admitted::Patched => prop_assert_eq!(patched(&pod, &response), injected(&pod, &settings())),
                Admitted::Unchanged(_) => prop_assert_eq!(response.get("patch"), None),
                Admitted::Refused(_) => prop_assert!(!warnings.is_empty() && response.get("patch").is_none()),
            }
        }
    }

    #[test]
    fn any_bytes_are_answered_or_explained(
        bytes in collection::vec(any::<u8>(), 0..200), place in any::<sample::Index>(), cut in any::<bool>(),
    ) {
        let settings = settings();
        let explained = |review: &[u8]| answer(review, &settings).map_or_else(|why| why.len(), |_| 0);
        prop_assert!(explained(&bytes) < 1_000);
        let mut review = review(&pod()).to_string().into_bytes();
        let place = place.index(review.len());
        if cut {
            review.truncate(place);
        }
        review.splice(place..place, bytes);
        prop_assert!(explained(&review) < 2_000);
    }
}
