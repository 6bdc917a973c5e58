//! A real aggregator process.

use std::{fs, net::SocketAddr, path::Path};

use coalmine_tests::process::free_addresses;

use crate::child::{Child, beside};

/// The service that everything here is about.
pub(crate) const SERVICE: &str = "bench";

/// What it is held to: errors and latency, for every tenant.
pub(crate) const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: bench
defaults:
  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms }
  judge_window: 10s
  hold_deadline: 30m
";

/// The process, and where agents connect to it.
#[derive(Debug)]
pub(crate) struct Aggregator {
    pub(crate) child: Child,
    pub(crate) grpc: SocketAddr,
}

impl Aggregator {
    /// Starts it on one core, with its data under `directory`.
    pub(crate) async fn start(name: &'static str, core: usize, directory: &Path) -> anyhow::Result<Self> {
        let [grpc, http, admin] = free_addresses();
        let policy = directory.join(format!("{name}.yaml"));
        fs::write(&policy, POLICY)?;
        let arguments = [
            "serve".to_owned(),
            format!("--data={}", directory.join(name).display()),
            format!("--policy={}", policy.display()),
            format!("--listen-grpc={grpc}"),
            format!("--listen-http={http}"),
            format!("--listen-admin={admin}"),
        ];
        let program = beside("coalmine-aggregator")?;
        let mut child = Child::program(name, core, directory, &program, &arguments)?;
        child.listening(grpc).await?;
        Ok(Self { child, grpc })
    }
}
