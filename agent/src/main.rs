//! Reads the configuration, and runs the agent.

use std::{io::IsTerminal, process::ExitCode};

use coalmine_agent::{
    config::{Command, LogFormat},
    handover::Inherited,
    run::Bound,
};
use tracing_subscriber::{EnvFilter, fmt};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Bad usage, as sysexits.h calls it.
const EX_USAGE: u8 = 64;

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let config = match Command::parse(std::env::args_os()) {
        Ok(Command::Run(config)) => *config,
        Ok(Command::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("coalmine-agent: {error}");
            return ExitCode::from(EX_USAGE);
        }
    };
    let inherited = match Inherited::take() {
        Ok(inherited) => inherited,
        Err(error) => {
            eprintln!("coalmine-agent: {error}");
            return ExitCode::from(EX_USAGE);
        }
    };
    log_to_stderr(config.log);
    tracing::info!(
        agent = env!("CARGO_PKG_VERSION"),
        listen = %config.listen,
        upstream = %config.upstream,
        aggregator = config.aggregator,
        instance = config.instance,
        "starting"
    );
    let format = config.log;
    match Bound::with(config, inherited).and_then(Bound::run_until_signal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match format {
                LogFormat::Text => eprintln!("coalmine-agent: {error}"),
                LogFormat::Json => tracing::error!(%error, "stopped"),
            }
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let is_terminal = std::io::stderr().is_terminal();
    let log = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(is_terminal);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
