//! The aggregator's process; called by the name `coalmine`, as in the image, it is that command.

use std::{env, io::IsTerminal as _, path::Path, process::ExitCode};

use clap::Parser as _;
use coalmine_aggregator::{
    ledger,
    server::{Action, Command, LogForm, StartError, migrate, serve, stop_signal},
};
use tokio::runtime::Builder;
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of a wrong command line or policy.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let name = env::args_os().next().unwrap_or_default();
    if Path::new(&name)
        .file_name()
        .is_some_and(|name| name == "coalmine")
    {
        return coalmine_aggregator::cli::main();
    }
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            // Nothing can be done when the terminal is gone.
            drop(error.print());
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let form = match &command.action {
        Action::Serve(settings) => settings.log,
        _ => LogForm::Text,
    };
    log(form);
    match run(command.action) {
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

fn run(action: Action) -> Result<(), StartError> {
    let failed = |error: &dyn std::fmt::Display| StartError::Failed(error.to_string());
    match action {
        Action::RotateKey { data, reason } => {
            let key = ledger::rotate_key(&data, reason).map_err(|error| failed(&error))?;
            tracing::info!(%key, "from now on this key signs the decision log; the one before signs too while key.old is there");
            return Ok(());
        }
        Action::NewLog {
            data,
            log_name,
            reason,
        } => {
            let aside = ledger::new_log(&data, &log_name, reason).map_err(|error| failed(&error))?;
            tracing::info!(log = log_name, old = %aside.display(), "a new decision log was opened, which names the old one");
            return Ok(());
        }
        Action::Serve(_) | Action::Migrate(_) => {}
    }
    let runtime = |name: &str| {
        let runtime = Builder::new_multi_thread().thread_name(name).enable_all().build();
        runtime.map_err(|error| failed(&format_args!("cannot start: {error}")))
    };
    let answering = runtime("answering")?;
    let runtime = runtime("working")?;
    let result = match action {
        Action::Serve(settings) => {
            let answering = answering.handle().clone();
            runtime.block_on(async { serve(*settings, answering, stop_signal()).await })
        }
        Action::Migrate(database) => runtime.block_on(migrate(&database)),
        Action::RotateKey { .. } | Action::NewLog { .. } => Ok(()),
    };
    // What is still being answered may ask the other one.
    answering.shutdown_background();
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
