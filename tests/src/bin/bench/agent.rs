//! A real agent process, and what it says of itself.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use coalmine_tests::process::free_addresses;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    aggregator::SERVICE,
    child::{Child, beside},
};

/// How long the agent may take to find its aggregator, and to count the last window.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// The process, and where its clients connect.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    child: Child,
}

impl Agent {
    /// Starts it on one core, with everything on, and waits for its session.
    pub(crate) async fn start(
        name: &'static str,
        core: usize,
        directory: &Path,
        upstream: SocketAddr,
        aggregator: SocketAddr,
    ) -> anyhow::Result<Self> {
        let [address, admin] = free_addresses();
        let arguments = [
            format!("--listen={address}"),
            format!("--admin={admin}"),
            format!("--upstream={upstream}"),
            format!("--aggregator=http://{aggregator}"),
            format!("--service={SERVICE}"),
            "--version=v2".to_owned(),
            "--arm=canary".to_owned(),
            format!("--instance=bench-{name}"),
            "--tenant=header:x-tenant-id".to_owned(),
        ];
        let mut child = Child::program(name, core, directory, &beside("coalmine-agent")?, &arguments)?;
        child.listening(address).await?;
        let agent = Self {
            address,
            admin,
            child,
        };
        let connected = agent.until("the agent has no session", |text| {
            metric(text, "coalmine_agent_session_connected") == 1
        });
        connected.await?;
        Ok(agent)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until it has counted all these requests, and the aggregator has all its windows on disk; gives how many
    /// windows that are.
    pub(crate) async fn has_counted(&self, requests: u64) -> anyhow::Result<u64> {
        let problem = format!("the agent has not counted the {requests} requests that were sent");
        let counted = self.until(&problem, |text| {
            metric(text, "coalmine_agent_requests_total") == requests
                && metric(text, "coalmine_agent_ring_bytes") == 0
        });
        Ok(metric(&counted.await?, "coalmine_agent_durable_seq"))
    }

    /// Waits until it knows so many tenants, and the aggregator has all its windows on disk.
    pub(crate) async fn knows_tenants(&self, tenants: usize) -> anyhow::Result<()> {
        let problem = format!("the agent does not know {tenants} tenants");
        let known = self.until(&problem, |text| {
            metric(text, "coalmine_agent_tenants") == tenants as u64
                && metric(text, "coalmine_agent_ring_bytes") == 0
        });
        known.await.map(drop)
    }

    /// Reads its metrics until they are so.
    async fn until(&self, problem: &str, is_so: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let deadline = Instant::now() + SETTLE_WITHIN;
        loop {
            let text = timeout(SETTLE_WITHIN, get(self.admin, "/metrics")).await;
            let text = text.context("the agent's metrics do not come")??;
            if is_so(&text) {
                return Ok(text);
            }
            if Instant::now() > deadline {
                bail!("{problem}; its metrics:\n{text}");
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: bench.local\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The sum of a metric's series.
fn metric(text: &str, name: &str) -> u64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let is_it = rest.starts_with([' ', '{']);
        is_it.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    });
    values.sum::<f64>() as u64
}
