//! Pods that say what they need as a whole: with the agent in it the API server takes them, and the application has
//! what it had.

use proptest::prelude::*;

use super::*;
use crate::inject::quantity::parse;

/// A pod that needs this as a whole, and whose application asks for this.
fn needing(whole: Value, app: Value) -> Value {
    let mut pod = pod();
    pod["spec"]["resources"] = whole;
    pod["spec"]["containers"][0]["resources"] = app;
    pod
}

/// The amount at this place; none if there is none.
fn amount(value: &Value, group: &str, name: &str) -> Option<u128> {
    let amount = value.pointer(&format!("/resources/{group}/{name}"))?;
    Some(parse(&text_of(amount)).unwrap())
}

/// What containers ask for: where they say only a limit, as much as that.
fn asked(container: &Value, name: &str) -> Option<u128> {
    amount(container, "requests", name).or_else(|| amount(container, "limits", name))
}

/// What API servers fill in, and then what they hold pods to: `defaultPodRequests` and `validatePodResourceConsistency`.
/// The sum is that of pods without init containers that end.
#[track_caller]
fn request_of(pod: &Value, name: &str) -> Option<u128> {
    let spec = &pod["spec"];
    let list = |list: &str| spec[list].as_array().cloned().unwrap_or_default();
    let (containers, sidecars) = (list("containers"), list("initContainers"));
    let asked = containers
        .iter()
        .chain(&sidecars)
        .filter_map(|it| asked(it, name));
    let sum = asked.reduce(|sum, more| sum + more);
    let limit = amount(spec, "limits", name);
    let request = amount(spec, "requests", name).or_else(|| limit.and(sum).or(limit));
    if let Some(request) = request {
        assert!(sum.unwrap_or_default() <= request, "{name}: {spec}");
        assert!(limit.is_none_or(|limit| request <= limit), "{name}: {spec}");
    }
    for container in &containers {
        let own = amount(container, "limits", name);
        assert!(limit.is_none() || own <= limit, "{name}: {spec}");
    }
    request
}

/// Injects, and compares what the pod needs afterwards.
#[track_caller]
fn check(pod: &Value, settings: &Settings, expected: Value) {
    for name in ["cpu", "memory"] {
        request_of(pod, name);
    }
    let patched = injected(pod, settings);
    for name in ["cpu", "memory"] {
        request_of(&patched, name);
    }
    assert_eq!(patched["spec"]["resources"], expected, "{pod}");
}

#[test]
fn a_pod_with_limits_alone_asks_for_what_it_did_and_for_what_the_agent_does() {
    let limits = json!({ "limits": { "cpu": "500m", "memory": "64Mi" } });
    // The application asks for nothing, so the pod does for its limits.
    let expected = json!({
        "limits": { "cpu": "510m", "memory": "256Mi" },
        "requests": { "cpu": "510m", "memory": "80Mi" },
    });
    check(&needing(limits.clone(), json!({})), &settings(), expected.clone());
    check(
        &needing(limits.clone(), Value::Null),
        &ordinary(),
        expected.clone(),
    );
    let mut with_null = limits.clone();
    with_null["requests"] = Value::Null;
    check(&needing(with_null, json!({})), &settings(), expected);

    // The application asks for some, and the API server adds up what containers do.
    for app in [
        json!({ "requests": { "cpu": "100m", "memory": "32Mi" } }),
        json!({ "requests": { "cpu": "100m" }, "limits": { "memory": "32Mi" } }),
    ] {
        let expected = json!({ "limits": { "cpu": "510m", "memory": "256Mi" } });
        check(&needing(limits.clone(), app), &settings(), expected);
    }

    // One amount is there, and the other is not.
    let one = json!({ "limits": { "cpu": "1", "memory": "64Mi" }, "requests": { "cpu": "0.5" } });
    let expected = json!({
        "limits": { "cpu": "1010m", "memory": "256Mi" },
        "requests": { "cpu": "510m", "memory": "80Mi" },
    });
    check(&needing(one, json!({})), &settings(), expected);
}

#[test]
fn a_pod_that_asks_for_no_more_than_its_containers_has_room_for_the_agent() {
    let amounts = json!({ "cpu": "100m", "memory": "32Mi" });
    let app = json!({ "requests": amounts });
    for settings in [settings(), ordinary()] {
        let expected = json!({ "requests": { "cpu": "110m", "memory": "48Mi" } });
        check(
            &needing(json!({ "requests": amounts }), app.clone()),
            &settings,
            expected,
        );
        // As an API server sends it that has filled in what the pod asks for.
        let whole = json!({ "requests": amounts, "limits": { "cpu": "100m", "memory": "32Mi" } });
        let expected = json!({
            "requests": { "cpu": "110m", "memory": "48Mi" },
            "limits": { "cpu": "110m", "memory": "224Mi" },
        });
        check(&needing(whole, app.clone()), &settings, expected);
    }
}

#[test]
fn a_small_limit_grows_by_that_of_an_ordinary_container() {
    let mut pod = needing(json!({ "limits": { "memory": "64Mi" } }), json!({}));
    let expected = json!({ "limits": { "memory": "256Mi" }, "requests": { "memory": "80Mi" } });
    check(&pod, &ordinary(), expected);

    pod["metadata"]["annotations"] = json!({
        "coalmine.dev/cpu-limit": "2",
        "coalmine.dev/memory-request": "1Mi",
        "coalmine.dev/memory-limit": "2Mi",
    });
    pod["spec"]["resources"] = json!({ "limits": { "cpu": "1", "memory": "64Mi" } });
    let expected = json!({
        "limits": { "cpu": "3", "memory": "66Mi" },
        "requests": { "cpu": "1010m", "memory": "65Mi" },
    });
    check(&pod, &ordinary(), expected);
}

#[test]
fn what_the_agent_has_none_of_stays_as_it_is() {
    for whole in [
        json!({}),
        json!(null),
        json!({ "limits": null, "requests": {} }),
        json!({ "limits": { "hugepages-2Mi": "4Mi" }, "requests": { "hugepages-2Mi": "4Mi" } }),
    ] {
        check(&needing(whole.clone(), json!({})), &settings(), whole);
    }
}

#[test]
fn amounts_of_manifests_may_be_numbers() {
    let whole = json!({ "requests": { "cpu": 0.5, "memory": 1e9 }, "limits": { "cpu": 2 } });
    let expected = json!({
        "requests": { "cpu": "510m", "memory": "1016777216" },
        "limits": { "cpu": "2010m" },
    });
    check(&needing(whole, json!({})), &settings(), expected);
}

fn mi(amount: u32) -> Value {
    json!(format!("{amount}Mi"))
}

fn milli(amount: u32) -> Value {
    json!(format!("{amount}m"))
}

proptest! {
    /// What the application has within the pod is what it had.
    #[test]
    fn what_was_good_stays_good(
        app in 1_u32..500, beside in 1_u32..500, spare in 0_u32..50, more in 0_u32..50,
        has_requests in any::<bool>(), is_ordinary in any::<bool>(),
    ) {
        let request = app + beside + spare;
        let limit = request + more;
        let requests = json!({ "cpu": milli(request), "memory": mi(request) });
        let mut pod = needing(
            json!({ "limits": { "cpu": milli(limit), "memory": mi(limit) } }),
            json!({ "requests": { "cpu": milli(app), "memory": mi(app) } }),
        );
        if has_requests {
            pod["spec"]["resources"]["requests"] = requests;
        }
        let limits = json!({ "cpu": milli(beside), "memory": mi(beside) });
        let other = json!({ "name": "beside", "resources": { "limits": limits } });
        pod["spec"]["containers"].as_array_mut().unwrap().push(other);
        let settings = if is_ordinary { ordinary() } else { settings() };
        let patched = injected(&pod, &settings);
        for (name, most) in [("cpu", "10m"), ("memory", "192Mi")] {
            let own = asked(agent_of(&patched), name).unwrap();
            let before = request_of(&pod, name).unwrap();
            prop_assert_eq!(request_of(&patched, name), Some(before + own));
            let before = amount(&pod["spec"], "limits", name).unwrap();
            prop_assert_eq!(amount(&patched["spec"], "limits", name), Some(before + parse(most).unwrap()));
        }
    }
}
