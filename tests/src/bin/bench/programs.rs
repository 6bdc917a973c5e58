//! What the bench runs besides itself: the judge's quality with options of its own, and as its children the upstream,
//! the bare relay, and the step before another program.

use std::{net::SocketAddr, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::Context as _;
use clap::Subcommand;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use crate::{cpu, quality, upstream};

/// A part with options of its own, or a program that the bench runs as a child.
#[derive(Debug, Subcommand)]
pub(crate) enum Program {
    /// Simulates rollouts: false alarms, detection and limits of the judge, beside its peers
    Quality(Box<quality::Options>),
    /// Answers HTTP/1.1 and HTTP/2 requests; the number in the path is how many bytes the answer has
    #[command(hide = true)]
    Upstream { core: usize, listen: SocketAddr },
    /// Copies bytes both ways, with tokio's copy_bidirectional
    #[command(hide = true)]
    Relay {
        core: usize,
        listen: SocketAddr,
        upstream: SocketAddr,
    },
    /// Becomes another program
    #[command(hide = true)]
    Launch {
        core: usize,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

impl Program {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        if !matches!(self, Self::Quality(_)) {
            set_parent_process_death_signal(Some(Signal::KILL))?;
        }
        match self {
            Self::Quality(options) => quality::run(options),
            Self::Upstream { core, listen } => {
                cpu::pin(*core)?;
                block_on(upstream::serve(*listen))
            }
            Self::Relay {
                core,
                listen,
                upstream,
            } => {
                cpu::pin(*core)?;
                block_on(relay(*listen, *upstream))
            }
            Self::Launch {
                core,
                program,
                arguments,
            } => {
                cpu::pin(*core)?;
                // Comes back only if it fails.
                let error = Command::new(program).args(arguments).exec();
                Err(error).with_context(|| format!("cannot run {}", program.display()))
            }
        }
    }
}

fn block_on(program: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(program)
}

async fn relay(listen: SocketAddr, upstream: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (mut client, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut upstream = TcpStream::connect(upstream).await?;
            client.set_nodelay(true)?;
            upstream.set_nodelay(true)?;
            copy_bidirectional(&mut client, &mut upstream).await
        });
    }
}
