//! Measures the design's budgets on this machine, as ratios in one run: `make bench`.
//!
//! Read in this order: [`proxies`] (the agent beside nginx, HAProxy and a bare relay), [`soak`] (its memory in the long
//! run), [`recorder`] (what a request costs in the agent's tables), [`ingest`] (what a window costs in the aggregator),
//! [`decide`] (what a decision costs), [`ledger`] (what it costs to keep decisions and windows, and to read them again),
//! [`admission`] (how long an API server waits for the webhook), [`faces`] (polls of deploy tools), [`quality`] (how often a decision is right, and how
//! soon; simulated). What they share: [`agent`] and [`aggregator`] (real ones), [`upstream`] (the application), [`child`]
//! and [`programs`] (processes that never outlive the run), [`load`] and [`pace`] (the clients), [`cpu`] (what a process
//! or thread has used), [`sample`] (made-up traffic) and [`report`] (medians, tables, budgets).
//!
//! Everything is on loopback and in a temporary directory, and bounded in time.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an entry point: its output is its purpose"
)]

mod proxies;

mod soak;

mod recorder;

mod ingest;

mod decide;

mod ledger;

mod admission;

mod faces;

mod quality;

mod agent;
mod aggregator;
mod child;
mod programs;
mod upstream;

mod cpu;
mod load;
mod pace;
mod report;
mod sample;

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::{cpu::Cores, programs::Program, report::Report};

// As in the agent and in the aggregator, whose code runs here too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whatever happens, the run is over after this, the soak not counted.
const LONGEST_RUN: Duration = Duration::from_secs(30 * 60);

/// How long the soak is if nothing else is said.
const SOAK: Duration = Duration::from_secs(3 * 60);
const QUICK_SOAK: Duration = Duration::from_secs(6);

/// Files that a process may have open: a proxy has two for each of the connections that are open at once.
const OPEN_FILES: u64 = 16_384;

/// What the design has a budget for and nothing here measures.
const NOT_MEASURED: &str = "Not measured here: linkerd2-proxy, which cannot be installed from Debian (the design's ratios to it \
    are of another run); gRPC; HTTP/2 at a constant rate; TLS, but for the webhook's; a network other than loopback; \
    transparency, which the tests hold; Prometheus; the gate after a restart.";

/// Measures the budgets of Coalmine's design, as ratios in one run
#[derive(Debug, Parser)]
#[command(
    name = "bench",
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
struct Options {
    /// Few and short rounds: shows that the bench works, and no more
    #[arg(long)]
    quick: bool,

    /// Only this part (repeatable)
    #[arg(long, value_name = "NAME")]
    only: Vec<Part>,

    /// Rounds of a measurement that is interleaved [default: 7, or 2 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,

    /// Length of a slice, in milliseconds [default: 1000, or 200 with --quick]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(50..=10_000))]
    slice_ms: Option<u64>,

    /// Length of the soak, in minutes [default: 3, or 6 s with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1440))]
    minutes: Option<u32>,

    /// One part with options of its own, or what a child of the bench runs.
    #[command(subcommand)]
    program: Option<Program>,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Requests through the agent, nginx, HAProxy and a bare relay
    Proxies,
    /// The agent's memory under a constant mixed load
    Soak,
    /// Recording a request into its window
    Recorder,
    /// Windows into the aggregator
    Ingest,
    /// Freezing, judging and recording a decision
    Decide,
    /// Decisions into the log and windows into the store, as fast as they become durable, and both read again
    Ledger,
    /// Reviews of new pods, over TLS, as an API server sends them
    Admission,
    /// Polls on each face while ten thousand tenants are judged
    Faces,
    /// False alarms, detection and limits of the judge, simulated
    Quality,
}

/// How long and how often to measure, and where.
#[derive(Debug, Clone, Copy)]
struct Plan {
    quick: bool,
    rounds: usize,
    slice: Duration,
    cores: Cores,
}

impl Options {
    fn soak(&self) -> Duration {
        match self.minutes {
            Some(minutes) => Duration::from_secs(60) * minutes,
            None if self.quick => QUICK_SOAK,
            None => SOAK,
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.program {
        Some(program) => program.run(),
        None => run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let (rounds, slice_ms) = if options.quick { (2, 200) } else { (7, 1000) };
    let plan = Plan {
        quick: options.quick,
        rounds: options.rounds.unwrap_or(rounds) as usize,
        slice: Duration::from_millis(options.slice_ms.unwrap_or(slice_ms)),
        cores: Cores::choose()?,
    };
    allow_files()?;
    // Threads that are made later inherit it.
    plan.cores.pin(plan.cores.load)?;
    let directory = tempfile::Builder::new().prefix("coalmine-bench-").tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let longest = LONGEST_RUN + options.soak();
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            result = measure(options, plan, directory.path()) => result,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
            () = tokio::time::sleep(longest) => bail!("not done after {} s", longest.as_secs()),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Lets this process and its children open many files, where that is allowed.
fn allow_files() -> anyhow::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum,
    };
    setrlimit(Resource::Nofile, raised).context("the limit of open files cannot be raised")
}

async fn measure(options: &Options, plan: Plan, directory: &Path) -> anyhow::Result<()> {
    let chosen = |part| options.only.is_empty() || options.only.contains(&part);
    let mut report = Report::default();
    report.machine(&plan.cores);
    if options.quick {
        report.note("--quick: too short to hold a budget against; it shows that the bench works.");
    }
    if chosen(Part::Proxies) {
        let proxies = proxies::measure(plan, directory, &mut report).await;
        proxies.context("the proxies cannot be measured")?;
    }
    if chosen(Part::Soak) {
        let soak = soak::measure(plan, options.soak(), directory, &mut report).await;
        soak.context("the soak cannot be measured")?;
    }
    if chosen(Part::Recorder) {
        recorder::measure(plan, &mut report).await?;
    }
    if chosen(Part::Ingest) {
        let ingest = ingest::measure(plan, directory, &mut report).await;
        ingest.context("the ingest cannot be measured")?;
    }
    if chosen(Part::Decide) {
        let decide = decide::measure(plan, directory, &mut report).await;
        decide.context("decisions cannot be measured")?;
    }
    if chosen(Part::Ledger) {
        let ledger = ledger::measure(plan, directory, &mut report).await;
        ledger.context("the ledger cannot be measured")?;
    }
    if chosen(Part::Admission) {
        let admission = admission::measure(plan, directory, &mut report).await;
        admission.context("admissions cannot be measured")?;
    }
    if chosen(Part::Faces) {
        let faces = faces::measure(plan, directory, &mut report).await;
        faces.context("the faces cannot be measured")?;
    }
    if chosen(Part::Quality) {
        report = quality::measure(plan, report).await?;
    }
    report.finish(NOT_MEASURED);
    Ok(())
}
