//! `coalmine demo`: the whole path on this machine, with real processes on loopback.
//!
//! One aggregator, two baseline instances and one canary instance of a small multi-tenant service, an agent
//! before each, and a load generator. The service and the load are hidden roles of this same program, so
//! that the demonstration needs nothing but the three binaries side by side.

mod load;
pub mod ports;
mod processes;
mod service;
mod stage;
mod traffic;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use self::stage::Stage;
use crate::{
    cli::{Exit, Failure, Output, audit, explain, say, tell},
    ledger::LedgerFiles,
};

/// Requests a second, to all instances together.
const RATE: u32 = 3_000;

/// How long after the start of the rollout the fault begins.
const FAULT_AFTER: Duration = Duration::from_secs(6);

/// When the demonstration gives up waiting for the verdict.
const GIVE_UP: Duration = Duration::from_secs(50);

/// The rule that everybody has: the canary's success rate, over all tenants, is at least this.
const FLEET_RULE_PPM: u64 = 990_000;

/// What `coalmine demo` takes.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    /// Let no tenant fail: the rollout is approved
    #[arg(long)]
    healthy: bool,
    /// Leave everything running after the verdict, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Where the decision log goes; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// The parts that the demonstration starts as processes of their own.
#[derive(Debug, Subcommand)]
enum Role {
    /// The small multi-tenant service
    #[command(hide = true)]
    Service(service::Options),
    /// The load generator
    #[command(hide = true)]
    Load(load::Options),
}

/// The result for machines: the last line with `--output json`.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    verdict: &'a str,
    worst_tenant: Option<&'a str>,
    decision_id: &'a str,
    score_ppm: u64,
    seconds: u64,
}

/// How the scenario ended.
struct Ending {
    view: Value,
    seconds: u64,
    sent_rule_ppm: u64,
}

pub(crate) async fn run(options: Options, output: Output) -> Result<Exit, Failure> {
    match options.role {
        Some(Role::Service(options)) => return service::run(options).await,
        Some(Role::Load(options)) => return load::run(options).await,
        None => {}
    }
    let data = data_directory(options.data.as_deref())?;
    // A directory that we made up goes when the demonstration is broken off; one that was asked for stays.
    let ours = options.data.is_none().then(|| data.clone());
    let played = tokio::select! {
        played = play(&data, options.healthy, output) => played,
        () = crate::server::stop_signal() => Err(Failure::new(Exit::Bad, "broken off; everything that was started is stopped")),
    };
    if let (Err(_), Some(ours)) = (&played, ours) {
        std::fs::remove_dir_all(ours).ok();
    }
    let Played {
        mut stage,
        result,
        exit,
    } = played?;
    if options.keep {
        let print = printer(output);
        print(&"");
        print(&format_args!("running   {} until Ctrl-C", stage.addresses()));
        stage.resume_load().await?;
        crate::server::stop_signal().await;
    }
    stage.strike().await;
    if output == Output::Json {
        say(&result);
    }
    Ok(exit)
}

/// With JSON, standard output is for the result alone.
fn printer(output: Output) -> fn(&dyn std::fmt::Display) {
    if output == Output::Json { tell } else { say }
}

/// A scenario that was played to its end; everything still runs.
struct Played {
    stage: Stage,
    /// The result for machines.
    result: String,
    exit: Exit,
}

fn data_directory(wanted: Option<&std::path::Path>) -> Result<PathBuf, Failure> {
    let directory = match wanted {
        Some(wanted) => wanted.to_owned(),
        None => std::env::temp_dir().join(format!("coalmine-demo-{}", std::process::id())),
    };
    if std::fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::usage(format!(
            "--data {} is not empty; choose a directory that does not exist or is empty",
            directory.display()
        )));
    }
    std::fs::create_dir_all(&directory)
        .map_err(|error| Failure::usage(format!("cannot create {}: {error}", directory.display())))?;
    Ok(directory)
}

async fn play(data: &std::path::Path, healthy: bool, output: Output) -> Result<Played, Failure> {
    let print = printer(output);
    let failing = (!healthy).then(|| traffic::tenant_name(traffic::FAILING_RANK));
    print(
        &"Coalmine demo: one aggregator, three instances of a service with an agent before each, one load generator.",
    );
    print(&format_args!(
        "{} tenants, {RATE} requests a second, 10 % of them to the canary (version v2).{}",
        traffic::TENANTS,
        failing.as_ref().map_or_else(
            || " Nothing will fail.".to_owned(),
            |tenant| format!(
                "\nIn {} seconds the canary starts to answer 15 % of the requests of one tenant, {tenant}, with 500.",
                FAULT_AFTER.as_secs()
            )
        )
    ));
    let begun = Instant::now();
    let mut stage = Stage::set(data, failing.as_deref(), FAULT_AFTER).await?;
    let ending = watch(&mut stage, failing.as_deref(), begun, print).await?;
    let load = stage.stop_load().await?;
    let counted = stage.counted().await?;
    let verdict = text(&ending.view, "verdict");
    print(&"");
    print(&format_args!("verdict   {verdict}, after {} s", ending.seconds));
    print(&format_args!("reason    {}", text(&ending.view, "reason")));
    print(&format_args!(
        "99 % rule {} (the canary's success rate over all tenants is {}.{:02} %)",
        if ending.sent_rule_ppm >= FLEET_RULE_PPM {
            "would have passed it"
        } else {
            "would have stopped it"
        },
        ending.sent_rule_ppm / 10_000,
        ending.sent_rule_ppm % 10_000 / 100,
    ));
    print(&format_args!(
        "counted   {counted} of {load} requests that were sent"
    ));
    print(&format_args!("record    {}", text(&ending.view, "decision_hash")));
    let files = LedgerFiles::new(data);
    let verified = audit::check(&files, Vec::new());
    let replayed = audit::replay_all(&files, |_, _| {});
    let log_is_good = verified.problems.is_empty() && replayed.different.is_empty() && replayed.same > 0;
    print(&format_args!(
        "verified  {} records, root {}{}",
        verified.records,
        verified.root,
        verified
            .problems
            .first()
            .map_or_else(String::new, |problem| format!(" FAILED: {problem}"))
    ));
    print(&format_args!(
        "replayed  {} decisions from their evidence: {}",
        replayed.same,
        replayed
            .different
            .first()
            .map_or("the same bytes", String::as_str)
    ));
    let decision = text(&ending.view, "decision_id");
    let shown = data.display();
    print(&"");
    print(&"next:");
    // As this program was called, so that the lines can be pasted.
    let coalmine = std::env::args().next().unwrap_or_else(|| "coalmine".to_owned());
    print(&format_args!("  {coalmine} explain {decision} --data {shown}"));
    print(&format_args!("  {coalmine} replay --all --data {shown}"));
    print(&format_args!("  {coalmine} audit verify --data {shown}"));
    let worst = ending.view.get("worst_tenant").and_then(Value::as_str);
    let as_it_should = match &failing {
        Some(tenant) => verdict == "ROLLBACK" && worst == Some(tenant),
        None => verdict == "APPROVE",
    };
    let summary = Summary {
        verdict,
        worst_tenant: worst,
        decision_id: decision,
        score_ppm: ending.view.get("score_ppm").and_then(Value::as_u64).unwrap_or(0),
        seconds: ending.seconds,
    };
    let result =
        serde_json::to_string(&summary).map_err(|error| Failure::new(Exit::Unknown, error.to_string()))?;
    let exit = if as_it_should && log_is_good && counted == load {
        Exit::Good
    } else {
        Exit::Bad
    };
    Ok(Played { stage, result, exit })
}

/// Shows a line for each judged window until there is a verdict.
async fn watch(
    stage: &mut Stage,
    failing: Option<&str>,
    begun: Instant,
    print: fn(&dyn std::fmt::Display),
) -> Result<Ending, Failure> {
    print(&"");
    print(&format_args!(
        "{:>4} {:>8} {:>9} {:>8} {:>13}  {:<9} {:>5}  worst tenant",
        "time", "requests", "to canary", "errors", "99 % rule", "verdict", "score"
    ));
    let mut shown = 0;
    loop {
        let view = stage.rollout().await?;
        let window = view.get("windows_judged").and_then(Value::as_u64).unwrap_or(0);
        if window > shown {
            shown = window;
            let fleet = stage.fleet().await?;
            let rule = fleet.success_ppm();
            let verdict = text(&view, "verdict");
            print(&format_args!(
                "{:>3}s {:>8} {:>9} {:>8} {:>13}  {:<9} {:>5}  {}",
                begun.elapsed().as_secs(),
                fleet.requests,
                fleet.canary_requests,
                format!(
                    "{}.{:02} %",
                    (1_000_000 - rule) / 10_000,
                    (1_000_000 - rule) % 10_000 / 100
                ),
                if rule >= FLEET_RULE_PPM { "pass" } else { "FAIL" },
                verdict,
                score(&view),
                worst(&view),
            ));
            // Without a fault the demonstration ends with the first approval; with one, when it is found.
            let ended = if failing.is_some() {
                verdict == "ROLLBACK"
            } else {
                verdict != "HOLD"
            };
            if ended {
                return Ok(Ending {
                    view,
                    seconds: begun.elapsed().as_secs(),
                    sent_rule_ppm: rule,
                });
            }
        }
        if begun.elapsed() > GIVE_UP {
            return Err(Failure::new(
                Exit::Bad,
                format!(
                    "no verdict after {} s: {}",
                    GIVE_UP.as_secs(),
                    text(&view, "reason")
                ),
            ));
        }
        stage.check()?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or("-")
}

fn score(view: &Value) -> String {
    let ppm = view.get("score_ppm").and_then(Value::as_u64).unwrap_or(0);
    explain::score(u32::try_from(ppm).unwrap_or(0))
}

fn worst(view: &Value) -> String {
    match (
        view.get("worst_tenant").and_then(Value::as_str),
        view.get("worst"),
    ) {
        (Some(tenant), Some(worst)) => format!("{tenant} {}", text(worst, "state")),
        _ => "-".to_owned(),
    }
}
