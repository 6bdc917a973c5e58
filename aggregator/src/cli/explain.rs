//! `coalmine explain`: why a decision is what it is.

use std::path::Path;

use coalmine_judge::{
    fixed::ONE,
    record::{Anomaly, Body, Decision},
    replay::{Replay, Replayed},
};
use coalmine_proto::names::TenantName;
use serde_json::Value;

use super::{Exit, Failure, Output, say};
use crate::{
    client::{Client, ClientError, segment},
    ledger::LedgerFiles,
};

pub(super) async fn online(client: &Client, id: &str, output: Output) -> Result<Exit, Failure> {
    let answer = client.get(&format!("/v1/decisions/{}", segment(id))).await?;
    if output == Output::Json {
        say(&answer);
        return Ok(Exit::Good);
    }
    let hash = answer
        .get("hash")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let body = answer.pointer("/record/body").cloned().unwrap_or_default();
    match serde_json::from_value(body) {
        Ok(Body::Decision(decision)) => print(&decision, &hash, None),
        Ok(body) if name(&body).is_some() => print_other(&body, &hash),
        Ok(_) | Err(_) => {
            let cause = "the answer holds no decision of a form that this program knows".to_owned();
            return Err(ClientError::Unreachable {
                server: "the server".to_owned(),
                cause,
            }
            .into());
        }
    }
    Ok(Exit::Good)
}

pub(super) fn offline(
    data: &Path,
    id: &str,
    tenant: Option<&TenantName>,
    output: Output,
) -> Result<Exit, Failure> {
    let files = LedgerFiles::new(data);
    let mut replay = Replay::default();
    let mut found = None;
    let scan = files.scan(|record, hash, _| {
        if found.is_some() {
            return;
        }
        let replayed = replay.take(&record, &files.blobs);
        if name(&record.body) != Some(id) {
            return;
        }
        let tree = match &record.body {
            Body::Decision(decision) => replay.judged(&decision.rollout).and_then(|judged| {
                let outcome = judged.outcome.as_ref()?;
                Some(judged.judge.explain(outcome, tenant))
            }),
            _ => None,
        };
        found = Some((record.clone(), hash, replayed, tree));
    });
    let Some((record, hash, replayed, tree)) = found else {
        scan.map_err(|problem| Failure::new(Exit::Bad, problem.to_string()))?;
        return Err(Failure::usage(format!(
            "there is no decision {id:?} in {}",
            data.display()
        )));
    };
    if output == Output::Json {
        say(&serde_json::json!({ "record": record, "hash": hash, "tree": tree }));
        return Ok(Exit::Good);
    }
    match &record.body {
        Body::Decision(decision) => print(decision, &hash.to_string(), tree.as_deref()),
        other => print_other(other, &hash.to_string()),
    }
    match replayed {
        Replayed::Different { problem, .. } => {
            say(&format_args!("replay     FAILED: {problem}"));
            Ok(Exit::Bad)
        }
        Replayed::Same => {
            say(&"replay     the same bytes");
            Ok(Exit::Good)
        }
        Replayed::Other => {
            say(&"replay     it is not the judge's decision, so there is nothing to judge again");
            Ok(Exit::Good)
        }
    }
}

/// The name of the decision in a record, whoever has decided.
pub(super) fn name(body: &Body) -> Option<&str> {
    match body {
        Body::Decision(decision) => Some(&decision.id),
        Body::Override(change) => Some(&change.id),
        Body::Bootstrap(bootstrap) => Some(&bootstrap.id),
        _ => None,
    }
}

/// What there is to tell of a decision that is not the judge's: who, why, and what the judge said.
pub(super) fn of_another(body: &Body) -> Vec<String> {
    match body {
        Body::Override(change) => vec![
            format!("decision   {}", change.id),
            format!("rollout    {}", change.rollout),
            match &change.verdict {
                Some(verdict) => format!("verdict    {verdict}, in the judge's place"),
                None => "verdict    the judge's again".to_owned(),
            },
            format!("actor      {}", change.actor),
            format!("reason     {}", change.reason),
            match &change.decision {
                Some(decision) => format!("judge      said {} by {decision}", change.judged),
                None => format!("judge      said {}, and had decided nothing yet", change.judged),
            },
        ],
        Body::Bootstrap(bootstrap) => vec![
            format!("decision   {}", bootstrap.id),
            format!("rollout    {}", bootstrap.rollout),
            "verdict    the canary may have its first traffic, once".to_owned(),
            format!("actor      Flagger's hook {}", bootstrap.hook),
            format!(
                "reason     of its {} agents none had counted a request, and without any nothing can be judged",
                bootstrap.agents
            ),
            "judge      HOLD, and it goes on".to_owned(),
        ],
        _ => Vec::new(),
    }
}

fn print_other(body: &Body, hash: &str) {
    for line in of_another(body) {
        say(&line);
    }
    say(&format_args!("record     {hash}"));
}

fn print(decision: &Decision, hash: &str, tree: Option<&[String]>) {
    say(&format_args!("decision   {}", decision.id));
    say(&format_args!("verdict    {}", decision.finding.verdict));
    say(&format_args!("reason     {}", decision.finding.reason));
    say(&format_args!(
        "score      {}   (1 is healthy; below the policy's threshold some unit is in breach)",
        score(decision.finding.score_ppm)
    ));
    if let Some(confidence) = decision.finding.confidence_ppm {
        say(&format_args!(
            "confidence {} %   (1 minus the error probability of the verdict)",
            confidence / 10_000
        ));
    }
    say(&format_args!(
        "coverage   {} % of the agents; {} % of the canary's requests and {} % of its tenants were judged",
        decision.finding.agents_ppm / 10_000,
        decision.finding.traffic_ppm / 10_000,
        decision.finding.tenants_ppm / 10_000
    ));
    for missing in &decision.finding.missing {
        say(&format_args!("missing    {missing}"));
    }
    if !decision.finding.anomalies.is_empty() {
        say(&format_args!(
            "anomalies  {} (evidence in bits, of those needed to roll back)",
            decision.finding.anomalies_detected
        ));
        for anomaly in &decision.finding.anomalies {
            say(&format_args!("  {}", line(anomaly)));
            if !anomaly.limits.is_empty() {
                say(&format_args!("    by {}", anomaly.limits));
            }
        }
    }
    if let Some(tree) = tree {
        say(
            &"tree       policy -> threshold -> evidence -> state -> score -> verdict (counts: since the evidence began to grow)",
        );
        for line in tree {
            say(&format_args!("  {line}"));
        }
    }
    say(&"steps");
    for step in &decision.steps {
        say(&format_args!(
            "  {} {:<32} {:<11} {:>8} us  {}",
            step.step, step.action, step.status, step.duration_us, step.detail
        ));
    }
    say(&format_args!(
        "judge      {} in {}",
        decision.judge, decision.build
    ));
    say(&format_args!("policy     {}", decision.policy));
    say(&format_args!("evidence   {}", decision.evidence));
    say(&format_args!("outcome    {}", decision.finding.outcome));
    say(&format_args!("record     {hash}"));
}

fn line(anomaly: &Anomaly) -> String {
    let bits = |bits: i64| format!("{}.{}", bits / ONE, (bits.rem_euclid(ONE) * 10) / ONE);
    format!(
        "{:<8} {} {} {} {} of {} bits: {}",
        anomaly.severity,
        anomaly.state,
        anomaly.unit,
        anomaly.metric,
        bits(anomaly.bits_q32),
        bits(anomaly.budget_q32),
        anomaly.detail
    )
}

/// A score with three digits.
pub(crate) fn score(ppm: u32) -> String {
    format!("{}.{:03}", ppm / 1_000_000, ppm % 1_000_000 / 1_000)
}
