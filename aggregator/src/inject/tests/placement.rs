//! Where the agent goes, and where the application is found.

use super::*;

#[test]
fn an_ordinary_container_is_the_last() {
    let mut pod = pod();
    pod["spec"]["initContainers"] = json!([{ "name": "migrate" }]);
    let patched = injected(&pod, &ordinary());
    let containers = patched["spec"]["containers"].as_array().unwrap();
    assert_eq!(
        (&containers[0]["name"], &containers[1]["name"]),
        (&json!("app"), &json!("coalmine-agent"))
    );
    assert_eq!(containers[1].get("restartPolicy"), None);
    assert_eq!(patched["spec"]["initContainers"], pod["spec"]["initContainers"]);
}

#[test]
fn a_native_sidecar_is_the_first() {
    let mut pod = pod();
    pod["spec"]["initContainers"] = json!([{ "name": "migrate" }, { "name": "warm" }]);
    let patched = injected(&pod, &settings());
    let names = patched["spec"]["initContainers"].as_array().unwrap();
    let names: Vec<_> = names.iter().map(|container| &container["name"]).collect();
    assert_eq!(names, ["coalmine-agent", "migrate", "warm"]);
    pod["spec"]["initContainers"] = json!([]);
    injected(&pod, &settings());
    pod["spec"]["initContainers"] = Value::Null;
    pod["metadata"]["annotations"] = Value::Null;
    injected(&pod, &settings());
}

#[test]
fn what_speaks_of_the_port_by_name_gets_its_number() {
    let mut pod = pod();
    let app = &mut pod["spec"]["containers"][0];
    app["ports"] = json!([
        { "name": "http", "containerPort": 8080 },
        { "name": "quic", "containerPort": 8080, "protocol": "UDP" },
    ]);
    app["livenessProbe"] = json!({ "tcpSocket": { "port": "http" } });
    app["startupProbe"] = json!({ "httpGet": { "port": "http" } });
    app["lifecycle"] = json!({
        "postStart": { "httpGet": { "port": "http" } },
        "preStop": { "tcpSocket": { "port": "http" }, "httpGet": { "port": "quic" } },
    });
    // Another container's probes speak of its own ports.
    let other = json!({ "name": "other", "livenessProbe": { "httpGet": { "port": "http" } } });
    pod["spec"]["containers"].as_array_mut().unwrap().push(other);
    for settings in [settings(), ordinary()] {
        let patched = injected(&pod, &settings);
        let app = &patched["spec"]["containers"][0];
        assert_eq!(app["ports"][0]["name"], "coalmine-app");
        assert_eq!(app["ports"][1], pod["spec"]["containers"][0]["ports"][1]);
        assert_eq!(app["livenessProbe"]["tcpSocket"]["port"], 8080);
        assert_eq!(app["readinessProbe"]["httpGet"]["port"], 8080);
        assert_eq!(app["startupProbe"]["httpGet"]["port"], 8080);
        assert_eq!(app["lifecycle"]["postStart"]["httpGet"]["port"], 8080);
        assert_eq!(app["lifecycle"]["preStop"]["tcpSocket"]["port"], 8080);
        assert_eq!(app["lifecycle"]["preStop"]["httpGet"]["port"], "quic");
        assert_eq!(patched["spec"]["containers"][1], pod["spec"]["containers"][1]);
    }
}

#[test]
fn the_application_is_found_wherever_it_stands() {
    let exporter = json!({ "name": "exporter", "ports": [{ "name": "metrics", "containerPort": 9100 }] });
    let logger = json!({ "name": "logger" });
    for order in [
        [app(), exporter.clone(), logger.clone()],
        [app(), logger.clone(), exporter.clone()],
        [exporter.clone(), app(), logger.clone()],
        [exporter.clone(), logger.clone(), app()],
        [logger.clone(), app(), exporter.clone()],
        [logger, exporter, app()],
    ] {
        let index = order.iter().position(|container| *container == app()).unwrap();
        for (wanted, settings) in [("http", settings()), ("8080", ordinary())] {
            let mut pod = annotated(json!({ "coalmine.dev/port": wanted }));
            pod["spec"]["containers"] = json!(order);
            let mut patched = injected(&pod, &settings);
            let containers = patched["spec"]["containers"].as_array_mut().unwrap();
            containers.retain(|container| container["name"] != "coalmine-agent");
            let renamed = &mut containers[index];
            assert_eq!(renamed["ports"][0]["name"], "coalmine-app");
            *renamed = app();
            assert_eq!(*containers, order);
        }
    }
}

#[test]
fn the_port_of_a_sidecar_is_not_taken_for_the_applications() {
    let mut pod = pod();
    pod["spec"]["initContainers"] = json!([{
        "name": "exporter",
        "restartPolicy": "Always",
        "ports": [{ "name": "metrics", "containerPort": 9100 }],
    }]);
    let config = config(&injected(&pod, &settings()));
    assert_eq!(config.upstream.to_string(), "127.0.0.1:8080");
}

#[test]
fn the_application_may_be_a_native_sidecar_itself() {
    let mut pod = annotated(json!({ "coalmine.dev/port": "web" }));
    let mut front = json!({ "name": "front", "ports": [{ "name": "web", "containerPort": 80 }] });
    front["restartPolicy"] = json!("Always");
    // What ends before the application starts has no part in the names that a Service finds.
    let migrate = json!({ "name": "migrate", "ports": [{ "name": "web", "containerPort": 81 }] });
    pod["spec"]["initContainers"] = json!([migrate, front]);
    let patched = injected(&pod, &settings());
    let init = &patched["spec"]["initContainers"];
    assert_eq!(init[0]["ports"][0]["name"], "web");
    assert_eq!(init[1], migrate);
    assert_eq!(init[2]["ports"][0]["name"], "coalmine-app");
    assert_eq!(config(&patched).upstream.to_string(), "127.0.0.1:80");
}
