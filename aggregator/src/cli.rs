//! The `coalmine` command.
//!
//! Exit codes: 0 approved or valid; 1 rolled back, a verification failed, or an injection was refused; 2 on hold at the
//! deadline; 3 could not find out (network, server); 64 wrong usage or input.

pub(crate) mod audit;
pub(crate) mod explain;
mod inject;
mod judge;
mod policy;
mod rollout;
mod token;
mod witness;

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use coalmine_judge::quantity::Span;
use coalmine_proto::names::TenantName;
use http::StatusCode;

use crate::{
    client::{Client, ClientError},
    demo,
};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "coalmine",
    version,
    about = "Judges canary rollouts for every tenant, and proves it"
)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// The aggregator to ask
    #[arg(
        long,
        global = true,
        env = "COALMINE_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    server: String,
    /// File with the token to present; without it the variable COALMINE_TOKEN
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Form of the output
    #[arg(long, global = true, default_value = "table", value_name = "FORM")]
    output: Output,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For machines: one JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a rollout judged from end to end on this machine, with one tenant failing
    Demo(demo::Options),
    /// Start, list, show and end rollouts
    #[command(subcommand)]
    Rollout(rollout::Command),
    /// Ask for the verdict on a rollout: exit 0 approved, 1 rolled back, 2 on hold
    Gate(rollout::Gate),
    /// Explain a decision
    Explain {
        /// The decision, as `gate` and `rollout status` name it
        decision: String,
        /// Read the log in this directory instead of asking a server, judge again, and show the whole tree
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// Show this tenant too, whatever its state
        #[arg(long, value_name = "NAME", requires = "data", value_parser = tenant)]
        tenant: Option<TenantName>,
    },
    /// Judge recorded evidence again and compare the bytes (offline)
    Replay {
        /// The decision
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        decision: Option<String>,
        /// Every decision of the log
        #[arg(long)]
        all: bool,
        /// Directory of the log
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
    /// Verify the decision log (offline)
    #[command(subcommand)]
    Audit(audit::Command),
    /// Judge evidence from a file or from standard input, one window a line (offline)
    Judge(judge::Options),
    /// Check and compare SLA baselines, and learn their history (offline)
    #[command(subcommand)]
    Policy(policy::Command),
    /// Put the agent into the pods of manifests that ask for it by label (offline)
    Inject(inject::Options),
    /// Cosign checkpoints of decision logs that only grow, for somebody who cannot change them
    #[command(subcommand)]
    Witness(witness::Command),
    /// Make, list and revoke the tokens that tools present (offline)
    #[command(subcommand)]
    Token(token::Command),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Approved, valid, done.
    Good = 0,
    /// Rolled back, a verification failed, or an injection was refused.
    Bad = 1,
    /// On hold.
    Hold = 2,
    /// It could not be found out.
    Unknown = 3,
    /// The question makes no sense.
    Usage = 64,
}

/// Why a command fails: its exit code and one clear sentence.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::Usage(_) => Exit::Usage,
            // It says that it can be asked again.
            ClientError::Refused {
                status: StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS,
                ..
            } => Exit::Unknown,
            ClientError::Refused { status, .. } if status.is_client_error() => Exit::Usage,
            ClientError::Refused { .. } | ClientError::Unreachable { .. } => Exit::Unknown,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Exit::Unknown, format!("cannot write the output: {error}"))
    }
}

/// Reads a duration like `30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    Span::try_from(text.to_owned()).map(|span| Duration::from_micros(span.micros))
}

/// Reads the name of a tenant, as it stands in evidence.
fn tenant(text: &str) -> Result<TenantName, String> {
    TenantName::parse_counted(text).map_err(|error| format!("the name {error}"))
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done when the terminal is gone.
            error.print().ok();
            return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { 0 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&Failure::new(Exit::Unknown, format!("cannot start: {error}"))),
    };
    let result = runtime.block_on(run(cli));
    runtime.shutdown_background();
    match result {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(failure) => complain(&failure),
    }
}

async fn run(cli: Cli) -> Result<Exit, Failure> {
    let Common {
        server,
        output,
        token_file,
    } = cli.common;
    let client = || -> Result<Client, Failure> {
        let token = token::presented(token_file.as_deref())?;
        Ok(Client::new(&server, token.as_deref())?)
    };
    match cli.command {
        Command::Demo(options) => demo::run(options, output).await,
        Command::Rollout(command) => rollout::run(command, &client()?, output).await,
        Command::Gate(asked) => rollout::gate(&client()?, &asked, output).await,
        Command::Explain {
            decision,
            data: Some(data),
            tenant,
        } => explain::offline(&data, &decision, tenant.as_ref(), output),
        Command::Explain {
            decision, data: None, ..
        } => explain::online(&client()?, &decision, output).await,
        Command::Replay {
            decision,
            all: _,
            data,
        } => audit::replay(&data, decision.as_deref(), output),
        Command::Audit(command) => audit::run(command, output).await,
        Command::Judge(options) => judge::run(&options),
        Command::Policy(command) => policy::run(command, output),
        Command::Inject(options) => inject::run(options, output),
        Command::Witness(command) => witness::run(command).await,
        Command::Token(command) => token::run(command, output),
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "coalmine", &mut io::stdout());
            Ok(Exit::Good)
        }
    }
}

/// Prints a line of output.
pub(crate) fn say(line: &dyn std::fmt::Display) {
    use io::Write as _;
    let mut out = io::stdout().lock();
    // A reader that has gone away, as after `| head`, is no reason to fail.
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// Prints a line of progress or complaint, beside the output.
pub(crate) fn tell(line: &dyn std::fmt::Display) {
    use io::Write as _;
    writeln!(io::stderr().lock(), "{line}").ok();
}

fn complain(failure: &Failure) -> ExitCode {
    tell(&format_args!("coalmine: {failure}"));
    ExitCode::from(failure.exit as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_asked_again_is_no_mistake_of_the_caller() {
        for (status, exit) in [
            (StatusCode::BAD_REQUEST, Exit::Usage),
            (StatusCode::UNAUTHORIZED, Exit::Usage),
            (StatusCode::NOT_FOUND, Exit::Usage),
            (StatusCode::CONFLICT, Exit::Usage),
            (StatusCode::REQUEST_TIMEOUT, Exit::Unknown),
            (StatusCode::TOO_MANY_REQUESTS, Exit::Unknown),
            (StatusCode::INTERNAL_SERVER_ERROR, Exit::Unknown),
            (StatusCode::SERVICE_UNAVAILABLE, Exit::Unknown),
        ] {
            let detail = "no".to_owned();
            let failure = Failure::from(ClientError::Refused { status, detail });
            assert_eq!(failure.exit, exit, "{status}");
        }
    }
}
