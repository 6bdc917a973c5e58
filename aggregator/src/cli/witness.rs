//! `coalmine witness`: a witness as a process of its own.

use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::PathBuf,
};

use clap::{Args, Subcommand};
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use super::{Exit, Failure, say};
use crate::{
    server::{StartError, stop_signal},
    witness::{self, Settings},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Cosign what logs ask for, as long as nothing that was cosigned before is changed (C2SP tlog-witness)
    Serve(Serve),
    /// Print the key that checks the witness's cosignatures (NAME+ID+BASE64)
    Key {
        /// Directory of the witness
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct Serve {
    #[command(flatten)]
    settings: Settings,
    /// Where logs ask (HTTP)
    #[arg(long, default_value = "127.0.0.1:7444", value_name = "ADDRESS")]
    listen: SocketAddr,
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let exit = match &error {
            StartError::Usage(_) => Exit::Usage,
            StartError::Failed(_) => Exit::Bad,
        };
        Self::new(exit, error.to_string())
    }
}

pub(super) async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Serve(serve) => self::serve(serve).await,
        Command::Key { data } => {
            say(&witness::verifier_key(&data)?);
            Ok(Exit::Good)
        }
    }
}

async fn serve(Serve { settings, listen }: Serve) -> Result<Exit, Failure> {
    let filter = EnvFilter::try_from_env("COALMINE_LOG_FILTER").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    // The socket comes before anything else is touched.
    let listener = TcpListener::bind(listen).await.map_err(|error| {
        let cause = match error.kind() {
            io::ErrorKind::AddrInUse => "the port is in use".to_owned(),
            _ => error.to_string(),
        };
        let problem =
            format!("cannot listen on {listen}: {cause}; stop the other process or choose another --listen");
        Failure::new(Exit::Bad, problem)
    })?;
    witness::serve(settings, listener, stop_signal()).await?;
    Ok(Exit::Good)
}
