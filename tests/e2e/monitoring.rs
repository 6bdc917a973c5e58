//! What Prometheus and Grafana see: a real Prometheus scrapes a real aggregator and real agents.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
};

use coalmine_tests::{
    components::{Aggregator, Scene},
    eventually,
    http::get,
    process::{Process, free_addresses, repository, wait_for_listener},
    tools::tool,
};
use serde_json::Value;

use crate::stage;

fn lint(metrics: &str) {
    let promtool = tool("promtool", "prometheus");
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success() && said.trim().is_empty(),
        "promtool: {said}\n{metrics}"
    );
}

pub(crate) fn prometheus(directory: &Path, targets: &[SocketAddr]) -> (Process, SocketAddr) {
    let prometheus = tool("prometheus", "prometheus");
    let [address] = free_addresses();
    let targets: Vec<_> = targets.iter().map(|target| format!("'{target}'")).collect();
    let config = format!(
        "global: {{ scrape_interval: 1s }}\nscrape_configs:\n- job_name: coalmine\n  honor_labels: true\n  static_configs: [ {{ targets: [ {} ] }} ]\n",
        targets.join(", ")
    );
    let file = directory.join("prometheus.yml");
    fs::write(&file, config).unwrap();
    let mut command = Command::new(prometheus);
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.join("tsdb").display()
        ))
        .arg(format!("--web.listen-address={address}"));
    let mut process = Process::start(command, &directory.join("prometheus.log"));
    wait_for_listener(&mut process, address);
    (process, address)
}

fn query(prometheus: SocketAddr, expression: &str) -> Value {
    let escaped: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let answer = get(prometheus, &format!("/api/v1/query?query={escaped}"))
        .unwrap()
        .json();
    assert_eq!(answer["status"], "success", "{expression}: {answer}");
    answer["data"]["result"].clone()
}

/// The last two minutes, second by second.
fn query_range(prometheus: SocketAddr, expression: &str) -> Value {
    let now = query(prometheus, "time()")[0].as_f64().unwrap();
    let escaped: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let path = format!(
        "/api/v1/query_range?query={escaped}&start={}&end={now}&step=1",
        now - 120.0
    );
    let answer = get(prometheus, &path).unwrap().json();
    assert_eq!(answer["status"], "success", "{expression}: {answer}");
    answer["data"]["result"].clone()
}

/// Something, if the answer has any series.
fn some(result: &Value) -> Option<()> {
    result.as_array().filter(|series| !series.is_empty()).map(|_| ())
}

/// All PromQL expressions of a dashboard: panels, variables and annotations.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(expression) = fields.get("expr").and_then(Value::as_str) {
                found.push(expression.to_owned());
            }
            fields.values().for_each(|value| expressions(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[test]
fn metrics_are_clean_bounded_and_every_query_of_the_dashboards_has_an_answer() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let aggregator = Aggregator::start(directory.path());
    let scene = Scene::start(directory.path(), aggregator.grpc, Some("stark-bank"));
    let mut targets = vec![aggregator.admin];
    targets.extend(scene.agents.iter().map(|agent| agent.admin));
    let (_prometheus, server) = prometheus(directory.path(), &targets);
    let load = scene.load(1_500, 40_000);
    eventually("all agents report", || (aggregator.windows() >= 3).then_some(()));
    let rollout = aggregator.start_rollout();
    aggregator.wait_for_verdict(&rollout, &["ROLLBACK"]);
    eventually("Prometheus has the verdict", || {
        let found = query(server, "coalmine_rollout_verdict{verdict=\"ROLLBACK\"} == 1");
        found.as_array().filter(|series| !series.is_empty()).map(|_| ())
    });

    let metrics = get(aggregator.admin, "/metrics").unwrap().body;
    lint(&metrics);
    lint(&get(scene.agents[0].admin, "/metrics").unwrap().body);
    let with_tenant = metrics.lines().filter(|line| line.contains("tenant=\"")).count();
    assert!(
        (1..=10).contains(&with_tenant),
        "{with_tenant} series have a tenant as a label"
    );
    let series = metrics.lines().filter(|line| !line.starts_with('#')).count();
    assert!(series < 400, "{series} series");

    let mut checked = 0;
    for entry in fs::read_dir(repository().join("deploy/grafana/dashboards")).unwrap() {
        let path = entry.unwrap().path();
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert!(
            dashboard["schemaVersion"].as_u64() >= Some(39),
            "{}",
            path.display()
        );
        let mut found = Vec::new();
        expressions(&dashboard["panels"], &mut found);
        assert!(!found.is_empty());
        for expression in found {
            let expression = fill(&expression, &rollout);
            eventually(&format!("an answer to {expression}"), || {
                query(server, &expression)
                    .as_array()
                    .filter(|series| !series.is_empty())
                    .map(|_| ())
            });
            checked += 1;
        }
        // An annotation marks a moment: over the whole run there is one, the change to ROLLBACK.
        let mut found = Vec::new();
        expressions(&dashboard["annotations"], &mut found);
        for expression in found {
            let expression = fill(&expression, &rollout);
            eventually(&format!("an answer over time to {expression}"), || {
                some(&query_range(server, &expression))
            });
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            let Some(values) = variable["query"]["query"].as_str() else {
                continue;
            };
            // label_values(SELECTOR, LABEL)
            let inside = values
                .strip_prefix("label_values(")
                .and_then(|rest| rest.strip_suffix(')'))
                .unwrap();
            let (selector, label) = inside.rsplit_once(", ").unwrap();
            let found = query(server, &fill(selector, &rollout));
            let labelled = found
                .as_array()
                .unwrap()
                .iter()
                .filter(|series| series["metric"][label].is_string());
            assert!(labelled.count() > 0, "{values} has no values: {found}");
        }
    }
    assert!(checked >= 10, "only {checked} queries");

    let rules = repository().join("deploy/prometheus/rules.yaml");
    let output = Command::new(tool("promtool", "prometheus"))
        .args(["check", "rules"])
        .arg(&rules)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    drop(load);
}

/// An expression with Grafana's variables replaced.
fn fill(expression: &str, rollout: &str) -> String {
    let filled = expression
        .replace("$__rate_interval", "4s")
        .replace("$__interval", "4s")
        .replace("$__range", "60s")
        .replace("$service", "checkout")
        .replace("${service}", "checkout")
        .replace("$rollout", rollout)
        .replace("${rollout}", rollout);
    assert!(
        !filled.contains('$'),
        "{filled} has a variable that this test does not know"
    );
    filled
}
