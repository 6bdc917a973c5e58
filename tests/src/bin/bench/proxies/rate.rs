//! A constant modest rate: how much latency each way adds to that of no proxy at all.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::task::spawn_blocking;

use super::{
    CONNECTIONS, KIB, Ratios, WARM_UP,
    stage::{Stage, Way},
    turns,
};
use crate::{
    Plan,
    load::shape,
    pace::Pace,
    report::{Budget, Report, Spread, Table},
};

/// Requests a second.
const RATE: u32 = 2_000;

/// The quantiles that are shown.
const SHARES: [f64; 3] = [0.5, 0.99, 0.999];

/// A way, its clients, and what each round gave.
struct Target<'s> {
    way: &'s Way,
    pace: Arc<Mutex<Pace>>,
    /// Microseconds, by quantile and round.
    quantiles_us: [Vec<f64>; SHARES.len()],
    cpu_us: Vec<f64>,
    requests: u64,
}

/// Gives how many requests went through the agent.
pub(super) async fn measure(
    plan: Plan,
    stage: &Stage,
    ratios: &mut Ratios,
    report: &mut Report,
) -> anyhow::Result<u64> {
    let slice = plan.slice * 3 / 2;
    let mut targets = Vec::new();
    for way in &stage.ways {
        let mut target = Target::new(way)?;
        // What it gives is of no round.
        target.round(WARM_UP.min(slice)).await?;
        target.quantiles_us = Default::default();
        target.cpu_us.clear();
        targets.push(target);
    }
    for next in turns(plan.rounds, targets.len()) {
        targets[next].round(slice).await?;
    }
    report.note(&format!(
        "\nOpen loop: {RATE} requests/s over {CONNECTIONS} connections, each latency from when the request should have \
         been sent.\nAdded is what a way has more than direct in the same round."
    ));
    print(&targets, slice);

    let [direct, ..] = &targets[..] else { return Ok(0) };
    let find = |name| targets.iter().find(|target| target.way.name == name);
    let Some(agent) = find("agent") else { return Ok(0) };
    for (name, budget) in [
        ("relay", Budget::AtMost(1.05)),
        ("nginx", Budget::None),
        ("haproxy", Budget::None),
    ] {
        let Some(other) = find(name) else { continue };
        let spread = Spread::of_ratios(&agent.added_us(0, direct), &other.added_us(0, direct));
        let what = format!("agent/{name}, added p50, {RATE} requests/s");
        ratios.row(&what, spread, budget, report);
    }
    Ok(agent.requests)
}

fn print(targets: &[Target<'_>], slice: Duration) {
    let title = format!("{RATE}/s, {} ms, us", slice.as_millis());
    let mut table = Table::new([
        &title,
        "p50",
        "p99",
        "p99.9",
        "added p50",
        "added p99",
        "added p99.9",
        "CPU us/request",
    ]);
    for target in targets {
        let whole = target.quantiles_us.iter();
        let whole = whole.map(|us| Spread::of(us.iter().copied()).cell(0));
        let mut row: Vec<String> = [target.way.name.to_owned()].into_iter().chain(whole).collect();
        if target.way.pid.is_some() {
            let added = (0..SHARES.len()).map(|quantile| target.added_us(quantile, &targets[0]));
            row.extend(added.map(|us| Spread::of(us).cell(0)));
            row.push(Spread::of(target.cpu_us.iter().copied()).cell(1));
        }
        table.row(row);
    }
    table.print();
}

// === impl Target ===

impl<'s> Target<'s> {
    fn new(way: &'s Way) -> anyhow::Result<Self> {
        let pace = Pace::open(way.address, shape(CONNECTIONS, KIB))?;
        Ok(Self {
            way,
            pace: Arc::new(Mutex::new(pace)),
            quantiles_us: Default::default(),
            cpu_us: Vec::new(),
            requests: 0,
        })
    }

    async fn round(&mut self, length: Duration) -> anyhow::Result<()> {
        let before = self.way.usage()?;
        let pace = Arc::clone(&self.pace);
        let sending = spawn_blocking(move || {
            let mut pace = pace.lock().unwrap_or_else(PoisonError::into_inner);
            pace.run(RATE, length)
        });
        let latencies = sending.await??;
        for (us, share) in self.quantiles_us.iter_mut().zip(SHARES) {
            us.push(latencies.quantile_us(share));
        }
        let requests = latencies.count() as f64;
        if let (Some(before), Some(after)) = (before, self.way.usage()?) {
            self.cpu_us.push(after.since(before).total_ns / 1e3 / requests);
        }
        self.requests += latencies.count() as u64;
        Ok(())
    }

    /// What a quantile has more than direct's, by round.
    fn added_us(&self, quantile: usize, direct: &Self) -> Vec<f64> {
        let both = self.quantiles_us[quantile]
            .iter()
            .zip(&direct.quantiles_us[quantile]);
        both.map(|(mine, direct)| mine - direct).collect()
    }
}
