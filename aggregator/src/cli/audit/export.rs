//! `coalmine audit export`: a log with its evidence as files, wherever it is kept.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Exit, Failure, Output, files, say};
use crate::{
    database::{Database, DatabaseError},
    ledger::{self, Exported},
};

/// Options of `audit export`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Options {
    /// Where the files go; a directory that is empty or does not exist
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Directory of the log
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "postgres",
        conflicts_with = "postgres"
    )]
    data: Option<PathBuf>,
    /// The database that has the log
    #[arg(long, env = "COALMINE_POSTGRES", value_name = "URL", hide_env_values = true)]
    postgres: Option<String>,
    /// Certificates to trust, in PEM; by default those of the system
    #[arg(long, env = "COALMINE_TLS_CA", value_name = "FILE", requires = "postgres")]
    tls_ca: Option<PathBuf>,
    /// Name of the log in the database
    #[arg(
        long,
        default_value = "coalmine/default",
        value_name = "NAME",
        requires = "postgres"
    )]
    log: String,
}

pub(super) async fn run(options: Options, output: Output) -> Result<Exit, Failure> {
    let bad = |error: &dyn std::fmt::Display| Failure::new(Exit::Bad, error.to_string());
    let exported = match (options.data, options.postgres) {
        (Some(data), _) => {
            let files = files(&data)?;
            ledger::export_files(&files, &options.to).map_err(|error| bad(&error))?
        }
        (None, Some(url)) => {
            let connected = Database::connect(&url, options.tls_ca.as_deref(), &options.log).await;
            let database = connected.map_err(|error| match error {
                DatabaseError::Usage(problem) => Failure::usage(problem),
                DatabaseError::Failed(_) => Failure::new(Exit::Unknown, error.to_string()),
            })?;
            let exported = ledger::export_database(&database, &options.to).await;
            exported.map_err(|error| bad(&error))?
        }
        (None, None) => return Err(Failure::usage("give --data or --postgres")),
    };
    let Exported { records, blobs, root } = exported;
    let to = options.to.display().to_string();
    match output {
        Output::Json => {
            say(&json!({ "to": to, "records": records, "blobs": blobs, "root": root.to_string() }))
        }
        Output::Table => say(&format_args!(
            "exported {records} records and {blobs} blobs to {to}, root {root}"
        )),
    }
    Ok(Exit::Good)
}
