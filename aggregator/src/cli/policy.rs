//! `coalmine policy`: checks a policy, learns a history from a decision log, and shows what a change means for whom.

mod diff;
mod learn;

use std::path::{Path, PathBuf};

use clap::Subcommand;
use coalmine_judge::{history::History, policy::Policy};
use serde_json::json;

use self::diff::Side;
use super::{Exit, Failure, Output, say};
use crate::server::{read_history, read_policy};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Read a policy and say what is wrong with it, or what to know about it
    Validate {
        /// The policy
        file: PathBuf,
        /// The history that its limits may follow
        #[arg(long, value_name = "FILE")]
        history: Option<PathBuf>,
    },
    /// Learn a history from the approved rollouts of a decision log
    Learn {
        /// Directory of the log
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// The service; by default the only one of the log
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Where to write the history; by default to standard output
        #[arg(long, short, value_name = "FILE")]
        output_file: Option<PathBuf>,
    },
    /// Show whose limits change between two policies, and why
    Diff {
        /// The policy as it is
        old: PathBuf,
        /// The policy as it is to be
        new: PathBuf,
        /// The history that the new policy's limits may follow
        #[arg(long, value_name = "FILE")]
        history: Option<PathBuf>,
        /// The history that the old policy's limits follow
        #[arg(long, value_name = "FILE")]
        old_history: Option<PathBuf>,
    },
}

pub(super) fn run(command: Command, output: Output) -> Result<Exit, Failure> {
    match command {
        Command::Validate { file, history } => validate(&file, history.as_deref(), output),
        Command::Learn {
            data,
            service,
            output_file,
        } => learn::run(&data, service.as_deref(), output_file.as_deref()),
        Command::Diff {
            old,
            new,
            history,
            old_history,
        } => {
            let old = Side::read(&old, old_history.as_deref())?;
            let new = Side::read(&new, history.as_deref())?;
            diff::run(&old, &new, output)
        }
    }
}

/// Reads the history that belongs to a policy, if one is given.
pub(super) fn history_for(file: Option<&Path>, policy: &Policy) -> Result<Option<History>, Failure> {
    let Some(file) = file else { return Ok(None) };
    let history = read_history(file).map_err(Failure::usage)?;
    if history.service != policy.service {
        return Err(Failure::usage(format!(
            "{}: it is the history of service {}, and the policy is for {}",
            file.display(),
            history.service,
            policy.service
        )));
    }
    Ok(Some(history))
}

fn validate(file: &Path, history: Option<&Path>, output: Output) -> Result<Exit, Failure> {
    let policy = read_policy(file).map_err(Failure::usage)?;
    let history = history_for(history, &policy)?;
    let notes = policy.notes(history.as_ref());
    match output {
        Output::Json => say(&json!({
            "valid": true,
            "service": policy.service,
            "tiers": policy.tiers.len(),
            "tenants": policy.tenants.len(),
            "cohorts": policy.cohorts(),
            "history_tenants": history.map(|history| history.tenants.len()),
            "notes": notes,
        })),
        Output::Table => {
            say(&format_args!(
                "{} is valid: service {}, {} tiers, {} tenants named",
                file.display(),
                policy.service,
                policy.tiers.len(),
                policy.tenants.len()
            ));
            if let Some(history) = history {
                say(&format_args!(
                    "the history is valid: {} rollouts, {} windows, {} tenants",
                    history.rollouts,
                    history.windows,
                    history.tenants.len()
                ));
            }
            for note in notes {
                say(&format_args!("note: {note}"));
            }
        }
    }
    Ok(Exit::Good)
}

#[cfg(test)]
mod tests;
