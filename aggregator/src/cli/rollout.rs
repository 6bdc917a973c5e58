//! `coalmine rollout` and `coalmine gate`.

mod gate;

use std::{collections::BTreeMap, time::Duration};

use clap::{Subcommand, ValueEnum};
use coalmine_proto::names::{MAX_NAME_BYTES, check_name};
use serde_json::{Value, json};

pub(super) use self::gate::{Gate, gate};
use super::{Exit, Failure, Output, say, tell};
use crate::{
    book::ArmContext,
    client::{Client, segment},
};

/// How often `gate --wait` and `status --watch` ask.
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Start judging a rollout
    Start {
        /// The service
        #[arg(long)]
        service: String,
        /// The version on trial
        #[arg(long, value_name = "VERSION")]
        canary_version: String,
        /// The version to compare with; by default every version of the baseline arm
        #[arg(long, value_name = "VERSION")]
        baseline_version: Option<String>,
        /// The same key names the same rollout, so that a retry starts nothing
        #[arg(long)]
        key: Option<String>,
        /// What is rolled out, as in Deployment/shop/checkout, so that it can be halted: a Deployment, a Rollout of
        /// Argo or a Canary of Flagger
        #[arg(long, value_name = "KIND/NAMESPACE/NAME", value_parser = workload)]
        workload: Option<Value>,
    },
    /// List rollouts, newest first
    List,
    /// Show a rollout
    Status {
        /// The rollout
        rollout: String,
        /// Show every change until there is a verdict
        #[arg(long, short)]
        watch: bool,
    },
    /// Decide in the judge's place, or give the decision back to it; recorded, and shown by every face
    Override {
        /// The rollout
        rollout: String,
        /// The decision; `judge` gives it back
        #[arg(long, value_name = "VERDICT")]
        verdict: Decision,
        /// Why; it is part of the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// End a rollout: nothing more is judged
    End {
        /// The rollout
        rollout: String,
        /// Why
        #[arg(long, default_value = "ended by hand")]
        reason: String,
    },
}

/// Who decides, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Decision {
    /// The rollout may go on.
    Approve,
    /// It has to wait.
    Hold,
    /// It has to go back.
    Rollback,
    /// The judge decides again.
    Judge,
}

impl Decision {
    /// As the server has it.
    fn to_json(self) -> Value {
        match self {
            Self::Approve => json!("approve"),
            Self::Hold => json!("hold"),
            Self::Rollback => json!("rollback"),
            Self::Judge => Value::Null,
        }
    }
}

/// Who asks, as records have it.
fn actor() -> String {
    let user = std::env::var("USER").ok().filter(|user| !user.is_empty());
    user.map_or_else(|| "cli".to_owned(), |user| as_a_name(&user))
}

/// What is called so, with a `-` for each character that names cannot have, such as that in `DOMAIN\user`.
fn as_a_name(user: &str) -> String {
    let is_allowed = |c: char| check_name(c.encode_utf8(&mut [0; 4]).as_bytes()).is_ok();
    let characters = user.chars().map(|c| if is_allowed(c) { c } else { '-' });
    characters.take(MAX_NAME_BYTES).collect()
}

fn workload(text: &str) -> Result<Value, String> {
    let parts: Vec<_> = text.split('/').collect();
    let [kind, namespace, name] = parts[..] else {
        return Err("give KIND/NAMESPACE/NAME, as in Deployment/shop/checkout".to_owned());
    };
    Ok(json!({ "kind": kind, "namespace": namespace, "name": name }))
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or("-")
}

fn number(value: &Value, field: &str) -> u64 {
    value.get(field).and_then(Value::as_u64).unwrap_or(0)
}

fn score(value: &Value) -> String {
    super::explain::score(u32::try_from(number(value, "score_ppm")).unwrap_or(0))
}

pub(super) async fn run(command: Command, client: &Client, output: Output) -> Result<Exit, Failure> {
    match command {
        Command::Start {
            service,
            canary_version,
            baseline_version,
            key,
            workload,
        } => {
            let request = json!({
                "service": service,
                "canary_version": canary_version,
                "baseline_version": baseline_version,
                "key": key,
                "actor": actor(),
                "workload": workload,
            });
            let view = client.post("/v1/rollouts", &request).await?;
            for warning in view
                .get("warnings")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                tell(&format_args!("warning: {}", warning.as_str().unwrap_or_default()));
            }
            match output {
                Output::Json => say(&view),
                Output::Table => say(&text(&view, "id")),
            }
            Ok(Exit::Good)
        }
        Command::List => {
            let answer = client.get("/v1/rollouts").await?;
            if output == Output::Json {
                say(&answer);
                return Ok(Exit::Good);
            }
            let rollouts = answer
                .get("rollouts")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            if rollouts.is_empty() {
                tell(&"there are no rollouts yet; start one with `coalmine rollout start`");
                return Ok(Exit::Good);
            }
            say(&format_args!(
                "{:<36} {:<8} {:<9} {:>6} {:>7}  {:<20}  WORST TENANT",
                "ROLLOUT", "STATE", "VERDICT", "SCORE", "WINDOWS", "STARTED"
            ));
            for view in &rollouts {
                say(&format_args!(
                    "{:<36} {:<8} {:<9} {:>6} {:>7}  {:<20}  {}",
                    text(view, "id"),
                    text(view, "state"),
                    text(view, "verdict"),
                    score(view),
                    number(view, "windows_judged"),
                    text(view, "started_at"),
                    text(view, "worst_tenant"),
                ));
            }
            Ok(Exit::Good)
        }
        Command::Status { rollout, watch } => status(client, &rollout, watch, output).await,
        Command::Override {
            rollout,
            verdict,
            reason,
        } => {
            let path = format!("/v1/rollouts/{}/override", segment(&rollout));
            let request = json!({ "verdict": verdict.to_json(), "actor": actor(), "reason": reason });
            let view = client.post(&path, &request).await?;
            match output {
                Output::Json => say(&view),
                Output::Table => say(&format_args!(
                    "{}: {}",
                    text(&view, "verdict"),
                    text(&view, "reason")
                )),
            }
            Ok(Exit::Good)
        }
        Command::End { rollout, reason } => {
            let path = format!("/v1/rollouts/{}/end", segment(&rollout));
            let view = client
                .post(&path, &json!({ "actor": actor(), "reason": reason }))
                .await?;
            match output {
                Output::Json => say(&view),
                Output::Table => say(&format_args!(
                    "ended at {}: {}",
                    text(&view, "verdict"),
                    text(&view, "reason")
                )),
            }
            Ok(Exit::Good)
        }
    }
}

async fn status(client: &Client, rollout: &str, watch: bool, output: Output) -> Result<Exit, Failure> {
    let path = format!("/v1/rollouts/{}", segment(rollout));
    let mut shown = None;
    loop {
        let view = client.get(&path).await?;
        let news = (number(&view, "windows_judged"), text(&view, "verdict").to_owned());
        if shown.as_ref() != Some(&news) {
            shown = Some(news);
            show(&view, watch, output);
        }
        let waiting = text(&view, "state") == "running" && text(&view, "verdict") == "HOLD";
        if !watch || !waiting {
            return Ok(Exit::Good);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How far the last act on each target has come.
fn show_actuations(view: &Value) {
    let all = view.get("actuations").and_then(Value::as_array);
    let mut last = BTreeMap::new();
    for actuation in all.into_iter().flatten() {
        last.insert(text(actuation, "target"), actuation);
    }
    for (target, actuation) in last {
        say(&format_args!(
            "outside    {target}: {} {}: {}",
            text(actuation, "act"),
            text(actuation, "stage"),
            text(actuation, "detail")
        ));
    }
}

fn show(view: &Value, brief: bool, output: Output) {
    if output == Output::Json {
        return say(view);
    }
    if brief {
        return say(&format_args!(
            "window {:>4}  {:<9} {}  {}",
            number(view, "windows_judged"),
            text(view, "verdict"),
            score(view),
            text(view, "reason")
        ));
    }
    say(&format_args!(
        "rollout    {}  ({})",
        text(view, "id"),
        text(view, "state")
    ));
    say(&format_args!(
        "service    {} {}",
        text(view, "service"),
        text(view, "canary_version")
    ));
    say(&format_args!("verdict    {}", text(view, "verdict")));
    say(&format_args!("reason     {}", text(view, "reason")));
    show_interventions(view);
    say(&format_args!("score      {}", score(view)));
    say(&format_args!(
        "judged     {} windows of {} s since {}, {} tenants",
        number(view, "windows_judged"),
        number(view, "window_ms") / 1_000,
        text(view, "started_at"),
        number(view, "tenants_checked")
    ));
    say(&format_args!(
        "coverage   {} % of the agents, {} % of the canary's requests are in tenants that were judged",
        number(view, "agents_ppm") / 10_000,
        number(view, "traffic_ppm") / 10_000
    ));
    show_arms(view);
    show_actuations(view);
    for anomaly in view
        .get("anomalies")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        say(&format_args!(
            "           {} {} {}: {}",
            text(anomaly, "state"),
            text(anomaly, "unit"),
            text(anomaly, "metric"),
            text(anomaly, "detail")
        ));
    }
    for agent in view.get("agents").and_then(Value::as_array).into_iter().flatten() {
        let connected = agent.get("connected").and_then(Value::as_bool).unwrap_or(false);
        say(&format_args!(
            "agent      {} {} {} {}",
            text(agent, "instance"),
            text(agent, "arm"),
            text(agent, "version"),
            if connected { "connected" } else { "silent" }
        ));
    }
    if let Some(decision) = view.get("decision_id").and_then(Value::as_str) {
        say(&format_args!("decision   {decision}"));
        say(&format_args!("record     {}", text(view, "decision_hash")));
    }
}

/// What stands beside the judge's word: a decision in its place, a first traffic that was let through.
fn show_interventions(view: &Value) {
    if let Some(overridden) = view.get("overridden").filter(|overridden| overridden.is_object()) {
        say(&format_args!(
            "overridden by {}: {}; the judge says {}",
            text(overridden, "actor"),
            text(overridden, "reason"),
            text(overridden, "judged")
        ));
    }
    if view.get("bootstrapped").and_then(Value::as_bool) == Some(true) {
        say(&"bootstrap  the canary was let have its first traffic before anything could be judged");
    }
}

/// What the pods and pools of both arms do at present, as far as the server says.
fn show_arms(view: &Value) {
    for arm in ["canary", "baseline"] {
        let context = view.get("arms").and_then(|arms| arms.get(arm)).cloned();
        let context = context.and_then(|context| serde_json::from_value::<ArmContext>(context).ok());
        if let Some(context) = context {
            say(&format_args!("{arm:<10} {context}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_has_a_name_that_can_stand_in_a_record() {
        let long = "n".repeat(200);
        for (user, expected) in [
            ("alice", "alice"),
            ("alice@example.com", "alice@example.com"),
            ("DOMAIN\\user", "DOMAIN-user"),
            ("Jörg Müller", "J-rg-M-ller"),
            (&*long, &long[..MAX_NAME_BYTES]),
        ] {
            assert_eq!(as_a_name(user), expected);
            assert_eq!(check_name(expected.as_bytes()), Ok(expected));
        }
    }
}
