//! What the bench runs besides itself: the judge's quality with options of its own, and as its children the upstream,
//! the bare relay, and the step before another program.

use std::{net::SocketAddr, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::Context as _;
use clap::Subcommand;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

use crate::{cpu, quality};

/// The longest request that the upstream reads.
const MAX_REQUEST: usize = 4096;

/// A part with options of its own, or a program that the bench runs as a child.
#[derive(Debug, Subcommand)]
pub(crate) enum Program {
    /// Simulates rollouts: false alarms, detection and limits of the judge, beside its peers
    Quality(Box<quality::Options>),
    /// Answers HTTP/1.1 requests; the number in the path is how many bytes the answer has
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
                block_on(upstream(*listen))
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

async fn upstream(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (client, _) = listener.accept().await?;
        client.set_nodelay(true)?;
        tokio::spawn(answer(client));
    }
}

/// Answers one request after the other; the answer is made once for all of a connection with the same path.
async fn answer(mut client: TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; MAX_REQUEST];
    let mut read = 0;
    let mut made = (0, Vec::new());
    loop {
        let more = client.read(&mut buffer[read..]).await?;
        if more == 0 {
            return Ok(());
        }
        read += more;
        let request = &buffer[..read];
        if !request.ends_with(b"\r\n\r\n") {
            continue;
        }
        let bytes = number_in_path(request);
        if made.0 != bytes || made.1.is_empty() {
            let mut response = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {bytes}\r\n\r\n"
            )
            .into_bytes();
            response.resize(response.len() + bytes, b'x');
            made = (bytes, response);
        }
        client.write_all(&made.1).await?;
        read = 0;
    }
}

/// The number after `GET /`.
fn number_in_path(request: &[u8]) -> usize {
    let path = request.strip_prefix(b"GET /").unwrap_or_default();
    let digits = path.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| {
        (number * 10 + usize::from(digit - b'0')).min(1 << 20)
    })
}
