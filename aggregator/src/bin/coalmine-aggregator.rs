//! The aggregator's process.

use std::{io::IsTerminal as _, process::ExitCode};

use clap::Parser as _;
use coalmine_aggregator::server::{Action, Command, LogForm, Settings, StartError, serve, stop_signal};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of a wrong command line or policy.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            // Nothing can be done when the terminal is gone.
            drop(error.print());
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let Action::Serve(settings) = command.action;
    log(settings.log);
    match run(*settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(if matches!(error, StartError::Usage(_)) {
                USAGE
            } else {
                1
            })
        }
    }
}

fn run(settings: Settings) -> Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| StartError::Failed(format!("cannot start: {error}")))?;
    let result = runtime.block_on(serve(settings, stop_signal()));
    runtime.shutdown_background();
    result
}

fn log(form: LogForm) {
    let filter = EnvFilter::try_from_env("COALMINE_LOG_FILTER").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let builder = builder.with_ansi(std::io::stderr().is_terminal());
    match form {
        LogForm::Text => builder.init(),
        LogForm::Json => builder.json().init(),
    }
}

#[allow(
    clippy::print_stderr,
    reason = "an entry point says in one line why it cannot start"
)]
fn complain(error: &StartError) {
    eprintln!("coalmine-aggregator: {error}");
}
