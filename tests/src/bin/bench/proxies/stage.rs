//! Everything that requests can go through: started once, all up at the same time.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use coalmine_tests::process::free_addresses;

use crate::{
    Plan,
    agent::Agent,
    aggregator::Aggregator,
    child::{Child, installed},
    cpu::Usage,
    report::Report,
    upstream::Upstream,
};

/// A way to the upstream.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) name: &'static str,
    pub(super) address: SocketAddr,
    /// Where HTTP/2 can be spoken, if it can.
    pub(super) http2: Option<SocketAddr>,
    /// The process whose CPU and memory are counted.
    pub(super) pid: Option<u32>,
}

/// All processes.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) ways: Vec<Way>,
    pub(super) agent: Agent,
    pub(super) upstream: Upstream,
    pub(super) aggregator: Aggregator,
    children: Vec<Child>,
}

// === impl Way ===

impl Way {
    /// What its process has used so far.
    pub(super) fn usage(&self) -> anyhow::Result<Option<Usage>> {
        self.pid.map(Usage::of).transpose()
    }
}

// === impl Stage ===

impl Stage {
    pub(super) async fn start(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<Self> {
        let (core, load) = (plan.cores.proxy, plan.cores.load);
        let upstream = Upstream::start("upstream", load, directory).await?;
        let aggregator = Aggregator::start("aggregator", load, directory).await?;
        let agent = Agent::start("agent", core, directory, upstream.address, aggregator.grpc).await?;
        let mut stage = Self {
            ways: vec![
                Way {
                    name: "direct",
                    address: upstream.address,
                    http2: Some(upstream.address),
                    pid: None,
                },
                Way {
                    name: "agent",
                    address: agent.address,
                    http2: Some(agent.address),
                    pid: Some(agent.pid()),
                },
            ],
            agent,
            upstream,
            aggregator,
            children: Vec::new(),
        };
        let [relay, nginx, haproxy, haproxy_http2] = free_addresses();
        let application = stage.upstream.address;
        let child = start_relay(core, directory, relay, application)?;
        stage.add("relay", relay, Some(relay), child).await?;
        match installed("nginx") {
            Some(program) => {
                let child = start_nginx(core, directory, &program, nginx, application)?;
                stage.add("nginx", nginx, None, child).await?;
            }
            None => report.left_out("nginx", "nginx-light"),
        }
        match installed("haproxy") {
            Some(program) => {
                let child = start_haproxy(core, directory, &program, [haproxy, haproxy_http2], application)?;
                stage.add("haproxy", haproxy, Some(haproxy_http2), child).await?;
            }
            None => report.left_out("haproxy", "haproxy"),
        }
        Ok(stage)
    }

    async fn add(
        &mut self,
        name: &'static str,
        address: SocketAddr,
        http2: Option<SocketAddr>,
        mut child: Child,
    ) -> anyhow::Result<()> {
        child.listening(address).await?;
        self.ways.push(Way {
            name,
            address,
            http2,
            pid: Some(child.pid()),
        });
        self.children.push(child);
        Ok(())
    }
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

/// One process that never logs and keeps its connections. It speaks HTTP/1.1 to the application, whatever its clients
/// speak, so it is no way for HTTP/2.
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
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
  uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi; proxy_max_temp_file_size 0;
  keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nodelay on;
  upstream app {{
    server {upstream};
    keepalive 2048; keepalive_requests 1000000000; keepalive_timeout 1h;
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

/// One thread that never logs and keeps its connections; HTTP/2 on both sides has a port of its own.
fn start_haproxy(
    core: usize,
    directory: &Path,
    program: &Path,
    [listen, http2]: [SocketAddr; 2],
    upstream: SocketAddr,
) -> anyhow::Result<Child> {
    let home = home(directory, "haproxy")?;
    let configuration = format!(
        "global
  nbthread 1
  maxconn 2048
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
frontend clients-http2
  bind {http2} proto h2
  default_backend app-http2
backend app-http2
  server app {upstream} proto h2
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
