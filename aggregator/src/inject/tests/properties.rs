//! Whatever a pod is like: no panic, and nothing changes but what the patch names.

use proptest::{collection, prelude::*, sample, strategy::ValueTree as _, test_runner::TestCaseError};

use super::*;

/// Keys that mean something to the injector, and one that does not.
const KEYS: [&str; 21] = [
    "containers",
    "volumes",
    "initContainers",
    "ports",
    "name",
    "containerPort",
    "protocol",
    "hostPort",
    "readinessProbe",
    "httpGet",
    "port",
    "restartPolicy",
    "resources",
    "requests",
    "limits",
    "cpu",
    "hostNetwork",
    "labels",
    "annotations",
    "coalmine.dev/injected",
    "a/~b",
];

const TEXTS: [&str; 9] = [
    "coalmine-labels",
    "http",
    "TCP",
    "UDP",
    "Always",
    "coalmine-agent",
    "app",
    "",
    "\u{1F426}$(x)",
];

fn any_text() -> impl Strategy<Value = String> {
    sample::select(TEXTS.to_vec()).prop_map(str::to_owned)
}

pub(super) fn any_json() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        (-1_i64..70_000).prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
        any_text().prop_map(Value::String),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let key = sample::select(KEYS.to_vec()).prop_map(str::to_owned);
        prop_oneof![
            collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            collection::btree_map(key, inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
    .boxed()
}

/// What a pod needs as a whole, where it says so.
fn any_resources() -> impl Strategy<Value = Value> {
    let amount = sample::select(vec![
        json!("500m"),
        json!("64Mi"),
        json!("1.5Gi"),
        json!(2),
        json!("1e9"),
    ]);
    let name = sample::select(vec!["cpu", "memory", "hugepages-2Mi"]).prop_map(str::to_owned);
    let amounts =
        collection::btree_map(name, amount, 0..3).prop_map(|all| Value::Object(all.into_iter().collect()));
    let group = prop_oneof![Just(Value::Null), amounts];
    let both = (group.clone(), group)
        .prop_map(|(requests, limits)| json!({ "requests": requests, "limits": limits }));
    prop_oneof![Just(Value::Null), both]
}

/// A pod with up to three containers, most of them good.
pub(super) fn any_pod() -> impl Strategy<Value = Value> {
    let port = (
        sample::select(vec!["http", "web", "grpc"]),
        1_u16..,
        sample::select(vec!["TCP", "TCP", "TCP", "UDP"]),
    );
    let port = port.prop_map(
        |(name, number, protocol)| json!({ "name": name, "containerPort": number, "protocol": protocol }),
    );
    let ports = collection::vec(port, 0..2);
    let container = (ports, sample::select(vec!["http", "web"]), any_json()).prop_map(
        |(ports, probed, unknown)| {
            json!({ "ports": ports, "livenessProbe": { "httpGet": { "port": probed } }, "x": unknown })
        },
    );
    let lists = (
        collection::vec(container.clone(), 1..4),
        collection::vec(container, 0..2),
    );
    let volume = sample::select(vec!["tmp", "data"]).prop_map(|name| json!({ "name": name, "emptyDir": {} }));
    let volumes = prop_oneof![
        Just(None),
        Just(Some(Value::Null)),
        collection::vec(volume, 0..3).prop_map(|volumes| Some(Value::Array(volumes))),
    ];
    let pods = (lists, volumes, any_resources(), any_json(), any::<bool>());
    pods.prop_map(
        |((containers, init), volumes, resources, unknown, has_annotations)| {
            let mut pod = pod();
            pod["status"] = unknown;
            if !resources.is_null() {
                pod["spec"]["resources"] = resources;
            }
            if let Some(volumes) = volumes {
                pod["spec"]["volumes"] = volumes;
            }
            for (list, containers) in [("containers", containers), ("initContainers", init)] {
                let named = containers.into_iter().enumerate().map(|(index, mut container)| {
                    container["name"] = json!(format!("{list}-{index}").to_lowercase());
                    container
                });
                pod["spec"][list] = named.collect();
            }
            if has_annotations {
                pod["metadata"]["annotations"] = json!({ "a/~b": "c" });
            }
            pod
        },
    )
}

/// Every place in a document.
pub(super) fn places(value: &Value, place: &str, all: &mut Vec<String>) {
    all.push(place.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                places(value, &format!("{place}/{}", patch::escape(key)), all);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                places(value, &format!("{place}/{index}"), all);
            }
        }
        _ => {}
    }
}

/// Takes back what the patch has done, from its end: what was replaced is as in the original, what was added is gone.
fn undo(patched: &mut Value, operation: &Operation, original: &Value) {
    let before = original.pointer(&operation.path);
    if operation.op == Op::Replace {
        *patched.pointer_mut(&operation.path).unwrap() = before.unwrap().clone();
        return;
    }
    let (parent, key) = operation.path.rsplit_once('/').unwrap();
    match patched.pointer_mut(parent).unwrap() {
        Value::Array(list) if key == "-" => drop(list.pop().unwrap()),
        Value::Array(list) => drop(list.remove(key.parse().unwrap())),
        Value::Object(map) => {
            let key = key.replace("~1", "/").replace("~0", "~");
            match before {
                Some(before) => drop(map.insert(key, before.clone())),
                None => drop(map.remove(&key).unwrap()),
            }
        }
        other => panic!("{other}"),
    }
}

/// The places that a patch may name.
fn is_ours(operation: &Operation) -> bool {
    let path = operation.path.as_str();
    match operation.op {
        Op::Add => {
            path.starts_with("/metadata/annotations")
                || path.starts_with("/spec/resources/requests")
                || [
                    "/spec/volumes",
                    "/spec/volumes/-",
                    "/spec/containers/-",
                    "/spec/initContainers",
                    "/spec/initContainers/0",
                ]
                .contains(&path)
        }
        Op::Replace => {
            let is_of = |places: [&str; 2], ends: [&str; 2]| {
                places.iter().any(|place| path.starts_with(place))
                    && ends.iter().any(|end| path.ends_with(end))
            };
            is_of(["/spec/containers/", "/spec/initContainers/"], ["/port", "/name"])
                || is_of(
                    ["/spec/resources/requests/", "/spec/resources/limits/"],
                    ["/cpu", "/memory"],
                )
        }
    }
}

fn check(pod: &Value, settings: &Settings) -> Result<(), TestCaseError> {
    match inject(pod, settings) {
        Injected::Patch(patch) => {
            prop_assert!(patch.iter().all(is_ours), "{patch:?}");
            let mut patched = injected(pod, settings);
            config(&patched);
            for operation in patch.iter().rev() {
                undo(&mut patched, operation, pod);
            }
            prop_assert_eq!(&patched, pod);
        }
        Injected::Unchanged(_) => {}
        Injected::Refused(refusal) => prop_assert!(refusal.to_string().len() < 4_000),
    }
    Ok(())
}

proptest! {
    #[test]
    fn pods_change_only_where_the_patch_says(pod in any_pod()) {
        check(&pod, &settings())?;
        check(&pod, &ordinary())?;
        check(&pod, &with_tokens())?;
    }

    #[test]
    fn a_pod_with_anything_anywhere_does_no_harm(
        pod in any_pod(), place in any::<sample::Index>(), odd in any_json(), list in any_json(),
    ) {
        let mut all = Vec::new();
        places(&pod, "", &mut all);
        let mut pod = pod;
        *pod.pointer_mut(place.get::<String>(&all)).unwrap() = odd;
        check(&pod, &settings())?;
        if pod.get("spec").is_some_and(Value::is_object) {
            pod["spec"]["initContainers"] = list;
            check(&pod, &settings())?;
            check(&pod, &ordinary())?;
        }
    }
}

#[test]
fn most_of_these_pods_can_be_judged_by_their_patches() {
    // A generator whose pods were all refused would prove nothing.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let injected = (0..200)
        .filter(|_| {
            let pod = any_pod().new_tree(&mut runner).unwrap().current();
            matches!(inject(&pod, &settings()), Injected::Patch(_))
        })
        .count();
    assert!(injected >= 20, "{injected} of 200");
}
