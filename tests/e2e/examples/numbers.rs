//! The numbers in the examples: an aggregator may be away for as long as a restart takes, and waiting ends in the right
//! order.

use coalmine_judge::quantity::Span;
use coalmine_tests::clients::{
    argo::{self, Limits},
    flagger, orca,
};
use serde_json::Value;

use super::{at, document, list, number, text};

/// So long a restart may take, in seconds, and no tool may have given up.
const AWAY: u64 = 30;

/// Argo asks again so soon after an error, in seconds, whatever the interval.
const ARGO_RETRIES: u64 = 10;

fn seconds(text: &str) -> u64 {
    let span = Span::try_from(text.to_owned());
    span.unwrap_or_else(|error| panic!("{text:?}: {error}")).micros / 1_000_000
}

fn metric(file: &str) -> Value {
    let mut template = document(file);
    let metrics = template.pointer_mut("/spec/metrics").unwrap();
    let metrics = metrics.as_array_mut().unwrap();
    assert_eq!(metrics.len(), 1, "{file}");
    metrics.swap_remove(0)
}

#[test]
fn an_analysis_of_argo_outlives_a_restart_and_waits_for_a_verdict() {
    for file in [
        "argo/analysis-web.yaml",
        "argo/analysis-prometheus.yaml",
        "argo/analysis-kayenta.yaml",
        "argo/analysis-job.yaml",
    ] {
        let metric = metric(file);
        let errors = number(&metric, "/consecutiveErrorLimit");
        assert!(
            errors >= 30 && errors * ARGO_RETRIES >= 5 * AWAY,
            "{file}: {errors}"
        );
        assert_eq!(
            number(&metric, "/failureLimit"),
            0,
            "{file}: one ROLLBACK is enough"
        );
        assert!(
            seconds(text(&metric, "/initialDelay")) >= 30,
            "{file}: the canary has to be seen first"
        );
    }
    for file in ["argo/analysis-web.yaml", "argo/analysis-prometheus.yaml"] {
        let metric = metric(file);
        // Argo refuses an inline analysis without an end, and ends with an error where more may be inconclusive than are
        // measured.
        assert!(
            number(&metric, "/count") >= number(&metric, "/inconclusiveLimit"),
            "{file}: ends with an error"
        );
        assert!(
            number(&metric, "/consecutiveSuccessLimit") >= 1,
            "{file}: never ends"
        );
        let holds = number(&metric, "/inconclusiveLimit") * seconds(text(&metric, "/interval"));
        assert!(holds >= 24 * 3_600, "{file}: gives up a HOLD after {holds} s");
    }
    let job = metric("argo/analysis-job.yaml");
    let spec = at(&job, "/provider/job/spec");
    assert_eq!(number(spec, "/backoffLimit"), 0);
    let arguments = list(spec, "/template/spec/containers/0/args");
    let timeout = seconds(arguments.last().unwrap().as_str().unwrap());
    assert!(number(spec, "/activeDeadlineSeconds") >= timeout + 60);
    let deadline = hold_deadline();
    assert!(
        timeout > deadline,
        "{timeout} s, and hold_deadline is {deadline} s"
    );
}

/// When the policy that is shipped ends a HOLD, in seconds.
fn hold_deadline() -> u64 {
    let sla = std::fs::read_to_string(super::example("../base/sla.yaml")).unwrap();
    let policy: Value = serde_saphyr::from_str(&sla).unwrap();
    seconds(text(&policy, "/defaults/hold_deadline"))
}

/// The policy ends a HOLD before whoever waits for it gives up.
#[test]
fn a_gate_waits_longer_than_a_hold_lasts() {
    let deadline = hold_deadline();
    let waits = |file: &str, before: &str| {
        let text = super::read(file);
        let (_, rest) = text
            .split_once(before)
            .unwrap_or_else(|| panic!("{file}: no {before}"));
        let end = rest.find(|next: char| !next.is_ascii_alphanumeric());
        seconds(&rest[..end.unwrap_or(rest.len())])
    };
    for (file, before) in [
        ("ci/gate.sh", "${GATE_TIMEOUT:-"),
        ("github/gate.sh", "${GATE_TIMEOUT:-"),
        ("../README.md", "coalmine gate \"$id\" --wait --timeout "),
        ("../../README.md", "coalmine gate \"$id\" --wait --timeout "),
    ] {
        let timeout = waits(file, before);
        assert!(
            timeout > deadline,
            "{file}: {timeout} s, and hold_deadline is {deadline} s"
        );
    }
    let action = document("github/action.yml");
    assert!(seconds(text(&action, "/inputs/timeout/default")) > deadline);
    let gitlab = document("gitlab/.gitlab-ci.yml");
    assert!(seconds(text(&gitlab, "/variables/GATE_TIMEOUT")) > deadline);
    let pipeline = document("spinnaker/pipeline.json");
    assert!(number(&pipeline, "/stages/0/stageTimeoutMs") / 1_000 > deadline);
}

/// The clients by which all faces are compared go by what is shipped.
#[test]
fn the_metrics_are_those_that_the_clients_go_by() {
    let web = metric("argo/analysis-web.yaml");
    let prometheus = metric("argo/analysis-prometheus.yaml");
    let limit = |metric: &Value, name: &str| u32::try_from(number(metric, name)).unwrap();
    for (metric, conditions) in [
        (&web, argo::web::CONDITIONS),
        (&prometheus, argo::prometheus::CONDITIONS),
    ] {
        let limits = Limits {
            failure: limit(metric, "/failureLimit"),
            inconclusive: limit(metric, "/inconclusiveLimit"),
            consecutive_error: limit(metric, "/consecutiveErrorLimit"),
            consecutive_success: Some(limit(metric, "/consecutiveSuccessLimit")),
            count: Some(limit(metric, "/count")),
        };
        assert_eq!(limits, Limits::PATIENT, "{metric}");
        let found = ["/successCondition", "/failureCondition"].map(|name| text(metric, name));
        assert_eq!(found, conditions);
    }
    let url = text(&web, "/provider/web/url");
    assert!(url.ends_with(argo::web::PATH), "{url}");
    assert_eq!(text(&web, "/provider/web/jsonPath"), "{$}");
    let query = text(&prometheus, "/provider/prometheus/query");
    assert_eq!(query, argo::prometheus::QUERY);

    let template = document("flagger/metrictemplate.yaml");
    assert_eq!(text(&template, "/spec/query").trim(), flagger::QUERY);
    let canary = document("flagger/canary.yaml");
    let metric = at(&canary, "/spec/analysis/metrics/0");
    assert_eq!(metric["thresholdRange"]["min"].as_f64(), Some(flagger::LEAST));
    // The metric and the hooks are about the same rollout.
    let service = text(metric, "/templateVariables/service");
    for hook in list(&canary, "/spec/analysis/webhooks") {
        assert_eq!(text(hook, "/metadata/service"), service, "{hook}");
    }

    let pipeline = document("spinnaker/pipeline.json");
    let thresholds = at(&pipeline, "/stages/0/canaryConfig/scoreThresholds");
    let known = serde_json::json!({ "pass": orca::PASS, "marginal": orca::MARGINAL });
    assert_eq!(*thresholds, known);
}

#[test]
fn flagger_outlives_a_restart_and_a_tick_is_longer_than_a_hook() {
    for file in ["flagger/canary.yaml", "flagger/loadtester.yaml"] {
        let canary = document(file);
        let analysis = at(&canary, "/spec/analysis");
        let interval = seconds(text(analysis, "/interval"));
        let threshold = number(analysis, "/threshold");
        assert!(
            threshold >= 3 && interval * (threshold - 1) > AWAY,
            "{file}: {threshold} checks of {interval} s"
        );
        assert_ne!(
            canary["spec"]["skipAnalysis"], true,
            "{file}: the rollback hook is not called"
        );
        for hook in list(analysis, "/webhooks") {
            assert_eq!(text(hook, "/timeout"), "5s", "{file}: {hook}");
            let retries = number(hook, "/retries");
            // Events are sent within the tick: each try would delay it.
            let expected = if hook["type"] == "event" { 0 } else { 2 };
            assert_eq!(retries, expected, "{file}: {hook}");
            // Between the tries: 1 s, then twice as long each time.
            let longest = (retries + 1) * 5 + (1_u64 << retries) - 1;
            assert!(longest < interval, "{file}: {longest} s of {interval} s");
            assert!(text(hook, "/name").starts_with("coalmine-"), "{file}: {hook}");
        }
        // What is promoted would be judged on, and told to go back at the hold deadline.
        let ends = list(analysis, "/webhooks")
            .iter()
            .any(|hook| hook["type"] == "post-rollout");
        assert!(ends, "{file}: nothing ends an attempt");
    }
    let metric = document("flagger/canary.yaml");
    let range = at(&metric, "/spec/analysis/metrics/0/thresholdRange");
    // 0 is HOLD, which would be counted as a failure otherwise.
    assert_eq!(*range, serde_json::json!({ "min": 0 }));
}

#[test]
fn a_job_is_ended_by_its_tool_only_after_the_gate_has_given_up() {
    let action = document("github/action.yml");
    let workflow = document("github/workflow.yml");
    let gate = seconds(text(&action, "/inputs/timeout/default"));
    assert!(number(&workflow, "/jobs/canary/timeout-minutes") * 60 >= gate + 600);
    let patience = text(&action, "/inputs/patience/default").parse::<u64>().unwrap();
    assert!(patience >= 2 * AWAY);

    let gitlab = document("gitlab/.gitlab-ci.yml");
    let gate = seconds(text(&gitlab, "/variables/GATE_TIMEOUT"));
    assert!(seconds(text(&gitlab, "/coalmine/timeout")) >= gate + 600);
    assert_eq!(gitlab["coalmine"]["allow_failure"], false);
}

#[test]
fn scores_have_room_for_a_hold() {
    let kayenta = metric("argo/analysis-kayenta.yaml");
    let pipeline = document("spinnaker/pipeline.json");
    for thresholds in [
        at(&kayenta, "/provider/kayenta/threshold"),
        at(&pipeline, "/stages/0/canaryConfig/scoreThresholds"),
    ] {
        let [pass, marginal] = ["/pass", "/marginal"].map(|name| number(thresholds, name));
        assert!((1..=98).contains(&marginal) && marginal + 2 <= pass && pass <= 100);
    }
}
