//! `coalmine gate`: asks for a verdict, once or until there is one.

use std::time::{Duration, Instant};

use clap::Args;
use http::StatusCode;
use serde_json::Value;

use super::{POLL, score, text};
use crate::{
    cli::{Exit, Failure, Output, duration, say, tell},
    client::{Client, ClientError, segment},
};

/// What `gate` asks for, and how long.
#[derive(Debug, Args)]
pub(in crate::cli) struct Gate {
    /// The rollout
    #[arg(required_unless_present = "service", conflicts_with = "service")]
    rollout: Option<String>,
    /// Ask for the open rollout of this service instead of naming one; of several, for the one with the worst verdict. If
    /// none is open it is on hold, whatever the last one has ended with
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// Only a rollout of this version
    #[arg(
        long,
        requires = "service",
        conflicts_with = "rollout",
        value_name = "VERSION"
    )]
    version: Option<String>,
    /// Only a rollout of a workload in this namespace
    #[arg(
        long,
        requires = "service",
        conflicts_with = "rollout",
        value_name = "NAMESPACE"
    )]
    namespace: Option<String>,
    /// Only a rollout of the workload with this name
    #[arg(long, requires = "service", conflicts_with = "rollout", value_name = "NAME")]
    workload: Option<String>,
    /// Wait until the verdict is APPROVE or ROLLBACK; what changes meanwhile is told on standard error
    #[arg(long)]
    wait: bool,
    /// How long to wait at most
    #[arg(long, default_value = "30m", value_parser = duration, requires = "wait", value_name = "DURATION")]
    timeout: Duration,
}

impl Gate {
    /// Whether this is about a rollout that is over, where the open one was asked for: what it has ended with says nothing of
    /// the next one, which may not have begun yet.
    fn is_of_the_last(&self, gate: &Value) -> bool {
        self.service.is_some() && text(gate, "state") == "ended"
    }

    fn path(&self) -> String {
        if let Some(rollout) = &self.rollout {
            return format!("/v1/rollouts/{}/gate", segment(rollout));
        }
        let parameters = [
            ("service", &self.service),
            ("version", &self.version),
            ("namespace", &self.namespace),
            ("workload", &self.workload),
        ];
        let given = parameters
            .into_iter()
            .filter_map(|(name, value)| Some(format!("{name}={}", segment(value.as_deref()?))));
        format!("/v1/gate?{}", given.collect::<Vec<_>>().join("&"))
    }
}

/// Asks for the verdict, once or until there is one.
pub(in crate::cli) async fn gate(client: &Client, asked: &Gate, output: Output) -> Result<Exit, Failure> {
    let path = asked.path();
    let deadline = asked.wait.then(|| Instant::now() + asked.timeout);
    let mut told = None;
    let mut tell_once = |line: String| {
        if told.as_ref() != Some(&line) {
            tell(&line);
            told = Some(line);
        }
    };
    loop {
        // While waiting, a server that is away for a moment is no answer.
        let gate = match client.get(&path).await {
            Ok(gate) => gate,
            Err(error) => {
                // A rollout that is asked for by its service may not have begun yet.
                let is_to_come = asked.service.is_some()
                    && matches!(&error, ClientError::Refused { status, .. } if *status == StatusCode::NOT_FOUND);
                let failure = Failure::from(error);
                let patient = (is_to_come || failure.exit == Exit::Unknown)
                    && deadline.is_some_and(|deadline| Instant::now() < deadline);
                if !patient {
                    return Err(failure);
                }
                tell_once(format!("waiting: {failure}"));
                tokio::time::sleep(POLL).await;
                continue;
            }
        };
        let is_of_the_last = asked.is_of_the_last(&gate);
        let exit = match text(&gate, "verdict") {
            _ if is_of_the_last => Exit::Hold,
            "APPROVE" => Exit::Good,
            "ROLLBACK" => Exit::Bad,
            _ => Exit::Hold,
        };
        let open = is_of_the_last || (exit == Exit::Hold && text(&gate, "state") != "ended");
        if !open || deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            match output {
                Output::Json => say(&gate),
                Output::Table => say(&line(&gate)),
            }
            return Ok(exit);
        }
        tell_once(line(&gate));
        tokio::time::sleep(POLL).await;
    }
}

fn line(gate: &Value) -> String {
    format!(
        "{} {}  {}",
        text(gate, "verdict"),
        score(gate),
        text(gate, "reason")
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        gate: Gate,
    }

    fn path(line: &str) -> Result<String, String> {
        let words = ["gate"].into_iter().chain(line.split(' '));
        let parsed = Line::try_parse_from(words);
        parsed
            .map(|line| line.gate.path())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_last_rollout_has_ended_with_is_not_the_next_one_s_verdict() {
        for (line, state, is_of_the_last) in [
            ("--service checkout", "running", false),
            ("--service checkout", "halted", false),
            ("--service checkout", "ended", true),
            ("--service checkout --version v2", "ended", true),
            ("r-1", "ended", false),
        ] {
            let words = ["gate"].into_iter().chain(line.split(' '));
            let asked = Line::try_parse_from(words).unwrap().gate;
            let gate = serde_json::json!({ "verdict": "APPROVE", "state": state });
            assert_eq!(asked.is_of_the_last(&gate), is_of_the_last, "{line} {state}");
        }
    }

    #[test]
    fn a_rollout_is_named_or_found_by_its_service() {
        for (line, asks) in [
            ("r-1", "/v1/rollouts/r-1/gate"),
            ("a/b", "/v1/rollouts/a%2Fb/gate"),
            ("--service checkout", "/v1/gate?service=checkout"),
            (
                "--service a&b --version v=2 --wait --timeout 5m",
                "/v1/gate?service=a%26b&version=v%3D2",
            ),
            (
                "--service checkout --namespace shop --workload web",
                "/v1/gate?service=checkout&namespace=shop&workload=web",
            ),
        ] {
            assert_eq!(path(line).as_deref(), Ok(asks), "{line}");
        }
        for (line, says) in [
            ("--wait", "<ROLLOUT>"),
            ("r-1 --service checkout", "cannot be used with"),
            ("r-1 --version v2", "cannot be used with"),
            ("--version v2", "--service"),
            ("r-1 --timeout 5m", "--wait"),
            ("r-1 --wait --timeout soon", "soon"),
        ] {
            let refused = path(line).unwrap_err();
            assert!(refused.contains(says), "{line}: {refused}");
        }
    }
}
