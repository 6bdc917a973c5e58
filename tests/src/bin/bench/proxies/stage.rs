//! Everything that requests can go through: started once, all up at the same time.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    Plan,
    aggregator::{Aggregator, SERVICE},
    child::{Child, beside, free_addresses, installed},
    report::Report,
};

/// How long the agent may take to find its aggregator, and to count the last window.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// A way to the upstream.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) name: &'static str,
    pub(super) address: SocketAddr,
    /// The process whose CPU is counted.
    pub(super) pid: Option<u32>,
}

/// All processes.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) ways: Vec<Way>,
    agent_admin: SocketAddr,
    _aggregator: Aggregator,
    _children: Vec<Child>,
}

impl Stage {
    pub(super) async fn start(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<Self> {
        let [upstream, relay, agent, agent_admin, nginx, haproxy] = free_addresses()?;
        let (core, load) = (plan.cores.proxy, plan.cores.load);
        let arguments = ["upstream".to_owned(), load.to_string(), upstream.to_string()];
        let mut children = vec![Child::own("upstream", directory, &arguments)?];
        children[0].listening(upstream).await?;
        let mut ways = vec![Way {
            name: "direct",
            address: upstream,
            pid: None,
        }];
        let aggregator = Aggregator::start("aggregator", load, directory).await?;

        let mut proxies = vec![
            (
                "agent",
                agent,
                start_agent(core, directory, agent, agent_admin, upstream, aggregator.grpc)?,
            ),
            ("relay", relay, start_relay(core, directory, relay, upstream)?),
        ];
        match installed("nginx") {
            Some(program) => proxies.push((
                "nginx",
                nginx,
                start_nginx(core, directory, &program, nginx, upstream)?,
            )),
            None => report.left_out("nginx", "nginx-light"),
        }
        match installed("haproxy") {
            Some(program) => proxies.push((
                "haproxy",
                haproxy,
                start_haproxy(core, directory, &program, haproxy, upstream)?,
            )),
            None => report.left_out("haproxy", "haproxy"),
        }
        for (name, address, mut child) in proxies {
            child.listening(address).await?;
            ways.push(Way {
                name,
                address,
                pid: Some(child.pid()),
            });
            children.push(child);
        }
        let stage = Self {
            ways,
            agent_admin,
            _aggregator: aggregator,
            _children: children,
        };
        stage
            .until("the agent has no session", |text| {
                metric(text, "coalmine_agent_session_connected") == 1
            })
            .await?;
        Ok(stage)
    }

    /// The process with this name.
    pub(super) fn pid(&self, name: &str) -> Option<u32> {
        self.ways.iter().find(|way| way.name == name)?.pid
    }

    /// Waits until the agent has counted all these requests, and the aggregator has all its windows on disk.
    pub(super) async fn agent_has_counted(&self, requests: u64) -> anyhow::Result<u64> {
        let text = self
            .until("the agent's counts differ from what was sent", |text| {
                metric(text, "coalmine_agent_requests_total") == requests
                    && metric(text, "coalmine_agent_ring_bytes") == 0
            })
            .await?;
        Ok(metric(&text, "coalmine_agent_durable_seq"))
    }

    async fn until(&self, problem: &str, is_so: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let deadline = Instant::now() + SETTLE_WITHIN;
        loop {
            let text = timeout(SETTLE_WITHIN, get(self.agent_admin, "/metrics")).await;
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

fn start_agent(
    core: usize,
    directory: &Path,
    listen: SocketAddr,
    admin: SocketAddr,
    upstream: SocketAddr,
    aggregator: SocketAddr,
) -> anyhow::Result<Child> {
    let arguments = [
        format!("--listen={listen}"),
        format!("--admin={admin}"),
        format!("--upstream={upstream}"),
        format!("--aggregator=http://{aggregator}"),
        format!("--service={SERVICE}"),
        "--version=v2".to_owned(),
        "--arm=canary".to_owned(),
        "--instance=bench-agent".to_owned(),
        "--tenant=header:x-tenant-id".to_owned(),
    ];
    Child::program("agent", core, directory, &beside("coalmine-agent")?, &arguments)
}

fn start_relay(
    core: usize,
    directory: &Path,
    listen: SocketAddr,
    upstream: SocketAddr,
) -> anyhow::Result<Child> {
    let arguments = [core.to_string(), listen.to_string(), upstream.to_string()];
    let arguments: Vec<String> = ["relay".to_owned()].into_iter().chain(arguments).collect();
    Child::own("relay", directory, &arguments)
}

/// One process that never logs and keeps its connections.
fn start_nginx(
    core: usize,
    directory: &Path,
    program: &Path,
    listen: SocketAddr,
    upstream: SocketAddr,
) -> anyhow::Result<Child> {
    let home = home(directory, "nginx")?;
    let at = home.display();
    let configuration = format!(
        "daemon off; master_process off; worker_processes 1; pid {at}/pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
  uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi; proxy_max_temp_file_size 0;
  keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nodelay on;
  upstream app {{
    server {upstream};
    keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h;
  }}
  server {{
    listen {listen};
    location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection \"\"; }}
  }}
}}
"
    );
    let file = home.join("nginx.conf");
    fs::write(&file, configuration)?;
    let arguments = [
        "-e",
        "stderr",
        "-p",
        &at.to_string(),
        "-c",
        &file.display().to_string(),
    ];
    Child::program("nginx", core, directory, program, &arguments.map(str::to_owned))
}

/// One thread that never logs and keeps its connections.
fn start_haproxy(
    core: usize,
    directory: &Path,
    program: &Path,
    listen: SocketAddr,
    upstream: SocketAddr,
) -> anyhow::Result<Child> {
    let home = home(directory, "haproxy")?;
    let configuration = format!(
        "global
  nbthread 1
  maxconn 1024
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend clients
  bind {listen}
  default_backend app
backend app
  server app {upstream}
"
    );
    let file = home.join("haproxy.cfg");
    fs::write(&file, configuration)?;
    let arguments = ["-db", "-q", "-f", &file.display().to_string()];
    Child::program("haproxy", core, directory, program, &arguments.map(str::to_owned))
}

fn home(directory: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let home = directory.join(name);
    fs::create_dir_all(&home)?;
    Ok(home)
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
