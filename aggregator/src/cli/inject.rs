//! `coalmine inject`: manifests in, manifests with the agent out.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::ArgAction;
use serde_json::{Value, json};

use super::{Exit, Failure, Output, say, tell};
use crate::inject::{Injected, Outcome, Setting, Settings, default_setting, inject_manifest};

/// Most bytes of manifests.
const MAX_INPUT_BYTES: u64 = 64 << 20;

/// Lists and maps within each other: more than the deepest schema of a custom resource.
const MAX_DEPTH: usize = 100;

/// Values in all documents: a few times what the largest sets of custom resources have.
const MAX_VALUES: usize = 4_000_000;

const WHAT_IT_DOES: &str = "\
Injects the agent into the pod templates of Pods, Deployments, StatefulSets, DaemonSets, ReplicaSets, Jobs,
CronJobs and Argo Rollouts, and into those in lists. A template asks for it by its labels:

  coalmine.dev/inject: enabled
  coalmine.dev/arm: canary                 or baseline; or flagger, for both: the primary is the baseline
  app.kubernetes.io/name: checkout         the service
  app.kubernetes.io/version: v2            its version

The agent takes the name of the application's port, which must have one; a Service whose targetPort says the
name goes through the agent without a change, and one whose targetPort is a number does not. Annotations,
and --default for all templates, set the rest:

  coalmine.dev/port             name or number of the port, where there are several
  coalmine.dev/tenant           where a request's tenant stands, as in header:x-tenant-id
  coalmine.dev/service, version in the place of the labels
  coalmine.dev/pool-port, pool-scrape, idle-timeout, drain, proxy-protocol, max-connections, max-tenants
                                as the agent's flags of the same name
  coalmine.dev/cpu-request, cpu-limit, memory-request, memory-limit

Native sidecars need Kubernetes 1.29, and 1.33 for a Service to find their ports by name.

Reads JSON or YAML of one document or several. Writes all of them, whether they were changed or not, as YAML
documents in JSON notation, which kubectl takes; comments and the order of keys are lost. Standard error has a
line for each workload. Exits with 1 if one was refused: it is written as it was, without an agent.

  coalmine inject --aggregator http://coalmine.coalmine:7443 --image IMAGE < app.yaml | kubectl apply -f -";

/// What `coalmine inject` is asked.
#[derive(Debug, clap::Args)]
#[command(after_long_help = WHAT_IT_DOES)]
pub(super) struct Options {
    /// Where agents send their windows, as in http://coalmine.coalmine:7443
    #[arg(long, value_name = "URL")]
    aggregator: String,
    /// The agent's image
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// Make the agent a native sidecar, an init container that stays, and not an ordinary container
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set)]
    native_sidecar: bool,
    /// The agent's port for requests
    #[arg(long, value_name = "PORT", default_value_t = 15080)]
    listen_port: u16,
    /// The agent's port for probes and metrics
    #[arg(long, value_name = "PORT", default_value_t = 15090)]
    admin_port: u16,
    /// Give agents a token of their pod's account for this audience, where the aggregator asks for one
    #[arg(long, value_name = "AUDIENCE")]
    audience: Option<String>,
    /// A setting of templates that lack the annotation, as in tenant=header:x-tenant-id (repeatable)
    #[arg(long = "default", value_name = "SETTING=VALUE", value_parser = default_setting)]
    defaults: Vec<(Setting, String)>,
    /// Manifests, JSON or YAML; - for standard input
    #[arg(default_value = "-", value_name = "FILE")]
    manifests: PathBuf,
}

pub(super) fn run(options: Options, output: Output) -> Result<Exit, Failure> {
    let settings = Settings {
        native_sidecar: options.native_sidecar,
        listen_port: options.listen_port,
        admin_port: options.admin_port,
        audience: options.audience,
        defaults: options.defaults.into_iter().collect::<BTreeMap<_, _>>(),
        ..Settings::new(options.aggregator, options.image)
    };
    settings.check().map_err(Failure::usage)?;
    let mut documents = documents(&read(&options.manifests)?).map_err(Failure::usage)?;
    let mut outcomes = Vec::new();
    for document in &mut documents {
        outcomes.append(&mut inject_manifest(document, &settings));
    }
    for document in &documents {
        say(&format_args!("---\n{}", notation(document)));
    }
    for outcome in &outcomes {
        match output {
            Output::Table => tell(&line(outcome)),
            Output::Json => tell(&record(outcome)),
        }
    }
    if outcomes.is_empty() {
        tell(&"coalmine: the manifests have no workload; nothing was injected");
    }
    let is_refused = outcomes.iter().any(|outcome| outcome.result.is_refused());
    Ok(if is_refused { Exit::Bad } else { Exit::Good })
}

fn read(path: &Path) -> Result<String, Failure> {
    let is_stdin = path.as_os_str() == "-";
    let name = if is_stdin {
        "standard input".to_owned()
    } else {
        path.display().to_string()
    };
    let fail = |error: io::Error| Failure::usage(format!("cannot read the manifests of {name}: {error}"));
    let input: Box<dyn Read> = if is_stdin {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(path).map_err(fail)?)
    };
    let mut text = String::new();
    // One byte more shows that there is more.
    let read = input
        .take(MAX_INPUT_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if read as u64 > MAX_INPUT_BYTES {
        return Err(Failure::usage(format!(
            "{name} has more than {MAX_INPUT_BYTES} bytes; inject into its parts one by one"
        )));
    }
    Ok(text)
}

/// Reads documents: JSON objects one after the other, or YAML as kubectl reads it (`0644` is octal, `yes` is true).
fn documents(text: &str) -> Result<Vec<Value>, String> {
    let looks_like_json = text.trim_start().starts_with('{');
    let stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let documents = match stream.collect::<Result<Vec<_>, _>>() {
        Ok(documents) if looks_like_json => documents,
        json => {
            let options = serde_saphyr::options! {
                legacy_octal_numbers: true,
                with_snippet: false,
                budget: serde_saphyr::budget! {
                    max_depth: MAX_DEPTH,
                    max_nodes: MAX_VALUES,
                    max_events: MAX_VALUES.saturating_mul(2),
                },
            };
            serde_saphyr::from_multiple_with_options::<Value>(text, options).map_err(|error| match json {
                // What is JSON but for a mistake is better explained as JSON.
                Err(json) if looks_like_json => format!("the manifests cannot be read: {json}"),
                _ => format!("the manifests cannot be read: {error}"),
            })?
        }
    };
    match documents.iter().position(|document| !document.is_object()) {
        Some(index) => Err(format!(
            "document {} of the manifests is not an object with apiVersion and kind",
            index + 1
        )),
        None => Ok(documents),
    }
}

/// A document as JSON that is YAML too. Characters that YAML does not take as they are, or takes for the end of a line,
/// are escaped; outside of strings JSON has none of them.
fn notation(document: &Value) -> String {
    let mut out = String::new();
    for c in format!("{document:#}").chars() {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out
}

fn line(outcome: &Outcome) -> String {
    let namespace = outcome.namespace.as_ref().map(|name| format!("{name}/"));
    let who = format!(
        "{} {}{}",
        outcome.kind,
        namespace.unwrap_or_default(),
        outcome.name
    );
    match &outcome.result {
        Injected::Patch(_) => format!("{who}: injected"),
        Injected::Unchanged(why) => format!("{who}: unchanged because {why}"),
        Injected::Refused(refusal) => format!("{who}: refused: {}: {refusal}", refusal.as_str()),
    }
}

fn record(outcome: &Outcome) -> Value {
    let (result, message) = match &outcome.result {
        Injected::Patch(_) => ("injected", None),
        Injected::Unchanged(why) => ("unchanged", Some(why.to_string())),
        Injected::Refused(refusal) => ("refused", Some(refusal.to_string())),
    };
    json!({
        "kind": outcome.kind,
        "namespace": outcome.namespace,
        "name": outcome.name,
        "result": result,
        "reason": message.is_some().then(|| outcome.as_str()),
        "message": message,
    })
}

#[cfg(test)]
mod tests;
