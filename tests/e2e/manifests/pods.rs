//! The pods: what the restricted pod security standard asks, and what a scheduler has to know.

use serde_json::Value;

use super::{MADE_ELSEWHERE, all_rendered, containers, items, of_kind, pod, strings, text};

#[test]
fn pods_are_restricted_and_say_what_they_need() {
    for (name, objects) in all_rendered() {
        let pods: Vec<_> = objects.iter().filter_map(pod).collect();
        assert!(!pods.is_empty(), "{name} makes no pod");
        for pod in pods {
            for container in containers(pod) {
                let name = format!("{name}, container {}", text(container, "/name"));
                check_restricted(&name, pod, container);
                check_needs(&name, container);
            }
            check_references(name, pod, objects);
        }
    }
}

/// What the restricted pod security standard asks, and a root file system that cannot be written.
fn check_restricted(name: &str, pod: &Value, container: &Value) {
    let of = |field: &str| {
        let own = container.pointer(&format!("/securityContext{field}"));
        own.or_else(|| pod.pointer(&format!("/securityContext{field}")))
    };
    let own = |field: &str| container.pointer(&format!("/securityContext{field}"));
    assert_eq!(of("/runAsNonRoot"), Some(&true.into()), "{name}");
    assert!(
        of("/runAsUser").and_then(Value::as_u64) > Some(0),
        "{name} has no user"
    );
    assert_eq!(
        of("/seccompProfile/type"),
        Some(&"RuntimeDefault".into()),
        "{name}"
    );
    assert_eq!(own("/allowPrivilegeEscalation"), Some(&false.into()), "{name}");
    assert_eq!(own("/readOnlyRootFilesystem"), Some(&true.into()), "{name}");
    assert_eq!(
        strings(container, "/securityContext/capabilities/drop"),
        ["ALL"],
        "{name}"
    );
    assert_eq!(own("/capabilities/add"), None, "{name}");
    assert_eq!(own("/privileged"), None, "{name}");
    for shared in ["/hostNetwork", "/hostPID", "/hostIPC"] {
        assert_eq!(pod.pointer(shared), None, "{name}");
    }
}

pub(super) fn check_needs(name: &str, container: &Value) {
    for need in ["requests/cpu", "requests/memory", "limits/memory"] {
        let amount = text(container, &format!("/resources/{need}"));
        assert!(!amount.is_empty(), "{name} does not say its {need}");
    }
    let image = text(container, "/image");
    let tag = image.rsplit('/').next().unwrap().split_once(':');
    let tag = tag.unwrap_or_else(|| panic!("{name}: {image} has no tag")).1;
    assert!(!tag.is_empty() && tag != "latest", "{name}: {image}");
}

/// Whatever a pod mounts or reads is there, or known to be made elsewhere.
fn check_references(name: &str, pod: &Value, objects: &[Value]) {
    let mut wanted = Vec::new();
    for volume in items(pod, "/volumes") {
        wanted.push(("ConfigMap", text(volume, "/configMap/name")));
        wanted.push(("Secret", text(volume, "/secret/secretName")));
    }
    for variable in containers(pod).flat_map(|container| items(container, "/env")) {
        wanted.push(("Secret", text(variable, "/valueFrom/secretKeyRef/name")));
    }
    wanted.push(("ServiceAccount", text(pod, "/serviceAccountName")));
    for (kind, wanted) in wanted {
        let is_there = of_kind(objects, kind).any(|object| text(object, "/metadata/name") == wanted);
        assert!(
            wanted.is_empty() || is_there || MADE_ELSEWHERE.contains(&wanted),
            "{name}: there is no {kind} {wanted}"
        );
    }
}
