//! Manifests as people write them, read and written again.

use clap::{CommandFactory as _, Parser as _};
use serde_json::json;

use super::*;
use crate::cli::Cli;

/// Two workloads, one of which cannot have an agent, and something that is none.
const MANIFESTS: &str = r#"# The application.
apiVersion: v1
kind: Service
metadata: { name: checkout }
spec:
  ports: [{ port: 80, targetPort: http }]
---
# Nothing but a remark.
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: checkout-canary
  namespace: shop
spec:
  template:
    metadata:
      labels: &labels
        coalmine.dev/inject: enabled
        coalmine.dev/arm: canary
        app.kubernetes.io/name: checkout
        app.kubernetes.io/version: "1.10"
    spec:
      containers:
        - name: app
          ports:
            - { name: http, containerPort: 8080 }
      volumes:
        - name: secret
          secret: { secretName: s, defaultMode: 0440, optional: yes }
---
apiVersion: v1
kind: Pod
metadata: { name: checkout-1, labels: { coalmine.dev/inject: enabled } }
spec: { hostNetwork: true, containers: [{ name: app }] }
"#;

fn settings() -> Settings {
    Settings::new("http://coalmine.coalmine:7443", "coalmine-agent:dev")
}

#[test]
fn manifests_are_injected_one_by_one() {
    let mut documents = documents(MANIFESTS).unwrap();
    assert_eq!(documents.len(), 3);
    let service = documents[0].clone();
    let pod = documents[2].clone();
    let outcomes: Vec<Outcome> = documents
        .iter_mut()
        .flat_map(|document| inject_manifest(document, &settings()))
        .collect();
    let lines: Vec<String> = outcomes.iter().map(line).collect();
    assert_eq!(lines[0], "Deployment shop/checkout-canary: injected");
    assert!(
        lines[1].starts_with("Pod checkout-1: refused: host_network: the pod has hostNetwork"),
        "{}",
        lines[1]
    );
    assert_eq!(lines.len(), 2);
    // What was not injected is as it was.
    assert_eq!((&documents[0], &documents[2]), (&service, &pod));

    let again = inject_manifest(&mut documents[1], &settings());
    assert_eq!(
        line(&again[0]),
        "Deployment shop/checkout-canary: unchanged because the agent was injected before"
    );
    assert_eq!(
        record(&outcomes[0]),
        json!({
            "kind": "Deployment", "namespace": "shop", "name": "checkout-canary",
            "result": "injected", "reason": null, "message": null,
        })
    );
    let refused = record(&outcomes[1]);
    assert_eq!(
        (&refused["result"], &refused["reason"]),
        (&json!("refused"), &json!("host_network"))
    );
}

#[test]
fn a_refusal_decides_how_the_command_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.yaml");
    let ends = |manifests: &str| {
        std::fs::write(&path, manifests).unwrap();
        let options = Options {
            aggregator: "http://coalmine.coalmine:7443".to_owned(),
            image: "coalmine-agent:dev".to_owned(),
            native_sidecar: true,
            listen_port: 15080,
            admin_port: 15090,
            audience: None,
            defaults: Vec::new(),
            manifests: path.clone(),
        };
        run(options, Output::Table)
    };
    assert_eq!(ends(MANIFESTS).unwrap(), Exit::Bad);
    let (good, _refused) = MANIFESTS.rsplit_once("---").unwrap();
    assert_eq!(ends(good).unwrap(), Exit::Good);
    assert_eq!(ends("just words").unwrap_err().exit, Exit::Usage);
}

#[test]
fn yaml_is_read_as_kubectl_reads_it() {
    let documents = documents(MANIFESTS).unwrap();
    let secret = &documents[1]["spec"]["template"]["spec"]["volumes"][0]["secret"];
    // YAML 1.1: octal, and yes is true.
    assert_eq!(
        *secret,
        json!({ "secretName": "s", "defaultMode": 0o440, "optional": true })
    );
}

#[test]
fn json_may_have_several_objects() {
    let text = " {\"kind\": \"A\"}\n{\"kind\": \"B\"} ";
    assert_eq!(
        documents(text),
        Ok(vec![json!({ "kind": "A" }), json!({ "kind": "B" })])
    );
    assert_eq!(documents("{ kind: A }"), Ok(vec![json!({ "kind": "A" })]));
    assert_eq!(documents(""), Ok(Vec::new()));
    assert_eq!(documents("---\n# nothing\n"), Ok(Vec::new()));
}

#[test]
fn what_cannot_be_read_says_where() {
    for (text, part) in [
        ("{\"kind\": \"A\"", "line 1"),
        ("kind: [A", "cannot be read: "),
        ("kind: A\nkind: B\n", "line 2"),
        ("kind: A\n---\n- kind: B\n", "document 2"),
        ("just words", "document 1"),
    ] {
        let error = documents(text).unwrap_err();
        assert!(error.contains(part), "{text:?}: {error}");
    }
}

#[test]
fn what_is_written_is_read_as_the_same() {
    let odd = "a\u{7f}\u{85}\u{2028}\u{2029}\u{feff}\u{ffff}\u{1F426}\t\"\\ # : - \n";
    let document = json!({
        "text": odd, "long": "x".repeat(5_000), "number": 1.5, "none": null, "list": [[], {}, "0440", "yes", "~"],
        odd: 1,
    });
    let text = notation(&document);
    assert!(
        !text.contains(['\u{7f}', '\u{85}', '\u{2028}', '\u{2029}', '\u{feff}', '\u{ffff}']),
        "{text}"
    );
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), document);
    assert_eq!(
        documents(&format!("---\n{text}\n---\n{text}\n")),
        Ok(vec![document.clone(), document])
    );
}

#[test]
fn defaults_name_a_setting() {
    assert_eq!(
        default_setting("tenant=header:x|regex=a=b"),
        Ok((Setting::Tenant, "header:x|regex=a=b".to_owned()))
    );
    for text in ["tenant", "tenents=header:x", "=x"] {
        let error = default_setting(text).unwrap_err();
        assert!(error.contains("give SETTING=VALUE"), "{text}: {error}");
    }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
    let parse = |more: &[&str]| {
        let line = [
            "coalmine",
            "inject",
            "--aggregator=http://coalmine:7443",
            "--image=agent",
        ];
        Cli::try_parse_from(line.iter().chain(more))
    };
    for good in [
        &["--native-sidecar=false"][..],
        &[],
        &["--native-sidecar", "true", "-"],
        &["--audience", "coalmine"],
        &[
            "--default",
            "tenant=header:x",
            "--default",
            "drain=5s",
            "app.yaml",
        ],
    ] {
        assert!(parse(good).is_ok(), "{good:?}");
    }
    for bad in [
        &["--native-sidecar=maybe"][..],
        &["--default", "x"],
        &["--listen-port", "70000"],
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}
