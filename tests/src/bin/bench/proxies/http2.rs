//! HTTP/2 in clear text, with prior knowledge: h2load as the clients.
//!
//! nginx is left out: it speaks HTTP/1.1 to the application, whatever its clients speak.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    KIB, Ratios,
    rounds::{self, Rounds, compare_cpu, through_agent},
    stage::Stage,
    turns,
};
use crate::{
    Plan,
    child::installed,
    load::Slice,
    report::{Budget, Report},
    sample::tenant,
};

const CONNECTIONS: usize = 8;

/// Streams of a connection at a time.
const STREAMS: usize = 32;

/// Requests with which each way begins; they also tell how many make a slice.
const FIRST: u64 = 5_000;

/// h2load is given up after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// The clients.
#[derive(Debug)]
struct H2load {
    program: PathBuf,
    core: usize,
}

/// Gives how many requests went through the agent.
pub(super) async fn measure(
    plan: Plan,
    stage: &Stage,
    ratios: &mut Ratios,
    report: &mut Report,
) -> anyhow::Result<u64> {
    let Some(program) = installed("h2load") else {
        report.left_out("h2load", "nghttp2-client");
        return Ok(0);
    };
    let clients = H2load {
        program,
        core: plan.cores.load,
    };
    report.note(&format!(
        "\nHTTP/2: h2load, {CONNECTIONS} connections x {STREAMS} streams, one tenant; nginx speaks HTTP/1.1 to \
         applications."
    ));
    let small = clients.compare(plan, stage, 1).await?;
    let budgets = [Budget::AtMost(1.08), Budget::None, Budget::AtMost(0.80)];
    compare_cpu(&small, "HTTP/2, 1 KiB", budgets, ratios, report);
    let large = clients.compare(plan, stage, 64).await?;
    compare_cpu(&large, "HTTP/2, 64 KiB", [Budget::None; 3], ratios, report);
    Ok(through_agent(&small) + through_agent(&large))
}

// === impl H2load ===

impl H2load {
    /// Measures all ways with answers of so many KiB.
    async fn compare<'s>(&self, plan: Plan, stage: &'s Stage, kib: usize) -> anyhow::Result<Vec<Rounds<'s>>> {
        let spoken = stage
            .ways
            .iter()
            .filter_map(|way| Some((way.http2?, Rounds::new(way))));
        let (addresses, mut all): (Vec<SocketAddr>, Vec<Rounds<'_>>) = spoken.unzip();
        let mut rate = 0.0;
        for (rounds, address) in all.iter_mut().zip(&addresses) {
            let (first, _) = rounds.watch(self.run(*address, kib, FIRST)).await?;
            rate = f64::max(rate, first.requests as f64 / first.seconds);
        }
        // The same for all, so that no request is cut off by a clock.
        let requests = (rate * plan.slice.as_secs_f64()) as u64;
        for next in turns(plan.rounds, all.len()) {
            all[next].take(self.run(addresses[next], kib, requests)).await?;
        }
        rounds::print(&format!("HTTP/2, {kib} KiB, {requests} requests"), &all);
        Ok(all)
    }

    /// Opens the connections, sends so many requests and waits for all answers.
    async fn run(&self, target: SocketAddr, kib: usize, requests: u64) -> anyhow::Result<Slice> {
        // Through the bench, so that it is killed with it.
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("launch")
            .arg(self.core.to_string())
            .arg(&self.program);
        command.args([
            format!("-n{requests}"),
            format!("-c{CONNECTIONS}"),
            format!("-m{STREAMS}"),
            format!("-Hx-tenant-id: {}", tenant(1)),
            format!("http://{target}/{}", kib * KIB),
        ]);
        command.stdin(Stdio::null());
        let output = timeout(PATIENCE, spawn_blocking(move || command.output())).await;
        let output = output.context("h2load does not end")???;
        let said = String::from_utf8_lossy(&output.stdout);
        let problem = String::from_utf8_lossy(&output.stderr);
        let (succeeded, rate) =
            results(&said).with_context(|| format!("h2load failed ({}): {said}{problem}", output.status))?;
        ensure!(succeeded == requests, "h2load has not had all answers: {said}");
        Ok(Slice {
            requests,
            seconds: requests as f64 / rate,
        })
    }
}

/// How many requests succeeded, and how many there were a second.
fn results(said: &str) -> Option<(u64, f64)> {
    let part = |line: &str, unit: &str| {
        let line = said.lines().find_map(|found| found.strip_prefix(line))?;
        let part = line.split(", ").find_map(|part| part.strip_suffix(unit))?;
        Some(part.trim().to_owned())
    };
    let succeeded = part("requests:", " succeeded")?;
    let rate = part("finished in", " req/s")?;
    Some((succeeded.parse().ok()?, rate.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in the documentation of nghttp2, "h2load - HTTP/2 benchmarking tool - HOW-TO", with other numbers.
    const SAID: &str = "starting benchmark...
spawning thread #0: 8 total client(s). 30000 total requests
progress: 100% done

finished in 435.21ms, 68932.49 req/s, 71.62MB/s
requests: 30000 total, 30000 started, 30000 done, 29999 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 29999 2xx, 0 3xx, 0 4xx, 1 5xx
";

    #[test]
    fn the_results_are_read() {
        assert_eq!(results(SAID), Some((29_999, 68_932.49)));
        assert_eq!(results("starting benchmark...\n"), None);
        assert_eq!(results(""), None);
    }
}
