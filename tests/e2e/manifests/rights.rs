//! The rights: what the account of the aggregator may do is what the table says, and what the README says.

use serde_json::Value;

use super::{COMPONENTS, deploy, items, of_kind, read, strings, text, with_components};

#[test]
fn each_component_may_do_what_the_table_says() {
    let readme = read(&deploy("README.md"));
    let Some(base) = with_components(&[]) else { return };
    assert_eq!(rights("base", &base), [""; 0]);
    let is_mounted = |objects: &[Value]| {
        let set = of_kind(objects, "StatefulSet").next().unwrap();
        set.pointer("/spec/template/spec/automountServiceAccountToken") == Some(&true.into())
    };
    assert!(!is_mounted(&base));
    for (name, expected) in COMPONENTS {
        let objects = with_components(&[name]).unwrap();
        assert_eq!(rights(name, &objects), expected, "{name}");
        // Without rights there is no token, but for cert-manager's: it asks the API server for its version.
        let needs_token = !expected.is_empty() || name == "cert-manager";
        assert_eq!(is_mounted(&objects), needs_token, "{name}");
        let row = readme
            .lines()
            .find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("README.md has no row for {name}"));
        for right in expected {
            assert!(row.contains(right), "README.md does not say of {name}: {right}");
        }
    }
}

/// What the account of the aggregator may do, one line for each resource.
fn rights(name: &str, objects: &[Value]) -> Vec<String> {
    let mut rights = Vec::new();
    let roles = objects.iter().filter(|object| {
        let kind = text(object, "/kind");
        kind == "Role" || kind == "ClusterRole"
    });
    for role in roles {
        let (kind, role_name) = (text(role, "/kind"), text(role, "/metadata/name"));
        let binding = of_kind(
            objects,
            if kind == "Role" {
                "RoleBinding"
            } else {
                "ClusterRoleBinding"
            },
        )
        .find(|binding| text(binding, "/roleRef/kind") == kind && text(binding, "/roleRef/name") == role_name)
        .unwrap_or_else(|| panic!("{name}: nobody has {kind} {role_name}"));
        let subject = serde_json::json!([
            { "kind": "ServiceAccount", "name": "coalmine", "namespace": "coalmine" },
        ]);
        assert_eq!(binding["subjects"], subject, "{name}: {role_name}");
        let namespace = text(role, "/metadata/namespace");
        for rule in items(role, "/rules") {
            assert_eq!(rule.get("nonResourceURLs"), None, "{name}: {role_name}");
            rights.extend(lines_of(rule, namespace));
        }
    }
    // Roles of a namespace first, then in the order of the file.
    rights.sort_by_key(|right| !right.starts_with("in "));
    rights
}

fn lines_of(rule: &Value, namespace: &str) -> Vec<String> {
    let verbs = strings(rule, "/verbs").join(", ");
    let names = strings(rule, "/resourceNames").join(", ");
    let place = match namespace {
        "" => String::new(),
        namespace => format!("in {namespace}: "),
    };
    let mut lines = Vec::new();
    for group in strings(rule, "/apiGroups") {
        for resource in strings(rule, "/resources") {
            let dot = if group.is_empty() { "" } else { "." };
            let line = format!("{place}{verbs} {resource}{dot}{group} {names}");
            lines.push(line.trim_end().to_owned());
        }
    }
    lines
}
