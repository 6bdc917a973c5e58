//! A constant mixed load on one agent, and whether its memory grows.
//!
//! Keep-alive connections with small and with large answers, connections of one request each, and clients that break off
//! within a request or within an answer.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    Plan,
    agent::Agent,
    aggregator::Aggregator,
    cpu::resident_bytes,
    load::{Load, PATIENCE, Shape, TENANTS, request, shape},
    report::{Budget, Report, Spread, Table},
    sample::tenant,
    upstream::Upstream,
};

const KIB: usize = 1024;

/// What is compared: the median of the first span of this length, and the maximum of the last.
const SPAN: Duration = Duration::from_secs(60);

/// How often memory is read.
const SAMPLE: Duration = Duration::from_secs(1);

/// At least so many samples, however short the run is.
const SAMPLES: u32 = 30;

/// The last span's maximum may be so many times the first span's median.
const GROWTH: f64 = 1.05;

/// Clients of one kind: each connection asks once in a period.
#[derive(Debug, Clone, Copy)]
struct Kind {
    shape: Shape,
    period: Duration,
    /// Whether the connections are closed after each request.
    is_churn: bool,
}

/// 1,200 small and 200 large answers a second, and 200 connections.
const KINDS: [Kind; 3] = [
    Kind {
        shape: shape(24, KIB),
        period: Duration::from_millis(20),
        is_churn: false,
    },
    Kind {
        shape: shape(8, 64 * KIB),
        period: Duration::from_millis(40),
        is_churn: false,
    },
    Kind {
        shape: shape(4, KIB),
        period: Duration::from_millis(20),
        is_churn: true,
    },
];

/// How often a client breaks off.
const ABORT_EVERY: Duration = Duration::from_millis(20);

pub(crate) async fn measure(
    plan: Plan,
    length: Duration,
    directory: &Path,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.title("Soak: the agent's memory under a constant mixed load");
    let (core, load) = (plan.cores.proxy, plan.cores.load);
    let upstream = Upstream::start("soak-upstream", load, directory).await?;
    let aggregator = Aggregator::start("soak-aggregator", load, directory).await?;
    let agent = Agent::start("soak-agent", core, directory, upstream.address, aggregator.grpc).await?;

    let until = Instant::now() + length;
    let mut clients = JoinSet::new();
    for kind in KINDS {
        clients.spawn(kind.run(agent.address, until));
    }
    clients.spawn(abort(agent.address, until));
    let mut sample = interval(SAMPLE.min(length / SAMPLES));
    sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut samples, mut requests) = (Vec::new(), 0);
    loop {
        tokio::select! {
            _ = sample.tick() => samples.push(resident_bytes(agent.pid())? / (KIB * KIB) as f64),
            ended = clients.join_next() => match ended {
                Some(client) => requests += client?.context("a client of the soak failed")?,
                None => break,
            },
        }
    }

    let span = SPAN.min(length / 3);
    let share = span.as_secs_f64() / length.as_secs_f64();
    let count = ((samples.len() as f64 * share) as usize).clamp(1, samples.len().max(1));
    let first = Spread::of(samples.iter().take(count).copied());
    let last = Spread::of(samples.iter().rev().take(count).copied());
    let growth = last.max / first.median;
    let seconds = span.as_secs();
    let mut table = Table::new(["resident", "", "budget", ""]);
    let mib = |what: String, mib: f64| [what, format!("{mib:.2} MiB")];
    table.row(mib(format!("median of the first {seconds} s"), first.median));
    table.row(mib(format!("maximum of the last {seconds} s"), last.max));
    let what = "agent, last maximum/first median, resident";
    let held = report.held(what, growth, Budget::AtMost(GROWTH), 2);
    let row = [what.to_owned(), format!("{growth:.3}")];
    table.row(row.into_iter().chain(held));
    table.print();
    let windows = agent.has_counted(requests).await?;
    report.note(&format!(
        "{} s, {requests} requests; the agent counted each of them, and the aggregator has all of its {windows} windows \
         on disk.",
        length.as_secs()
    ));
    Ok(())
}

// === impl Kind ===

impl Kind {
    /// Gives how many requests were answered.
    async fn run(self, target: SocketAddr, until: Instant) -> anyhow::Result<u64> {
        let mut load = Load::open(target, self.shape).await?;
        let mut period = interval(self.period);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answered = 0;
        while Instant::now() < until {
            period.tick().await;
            answered += load.once().await?;
            if self.is_churn {
                load.reopen().await?;
            }
        }
        Ok(answered)
    }
}

/// Breaks off, in turn, within the head of a request and within an answer; gives how many requests were whole.
async fn abort(target: SocketAddr, until: Instant) -> anyhow::Result<u64> {
    let mut period = interval(ABORT_EVERY);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut whole = 0;
    for number in 0.. {
        period.tick().await;
        if Instant::now() >= until {
            break;
        }
        let request = request(64 * KIB, &tenant(number % TENANTS));
        let mut stream = TcpStream::connect(target).await?;
        if number % 2 == 0 {
            stream.write_all(&request[..request.len() / 2]).await?;
            continue;
        }
        stream.write_all(&request).await?;
        whole += 1;
        // What is not read makes the close a reset.
        let answer = timeout(PATIENCE, stream.read_u8()).await;
        answer.context("an answer does not come")??;
    }
    Ok(whole)
}
