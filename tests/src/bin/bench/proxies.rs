//! Requests through the agent, beside other proxies and a bare relay.
//!
//! All are up at once and keep all their connections. In each round each gets a slice of time, in an order
//! that rotates; what is compared are the slices of one round.

mod stage;

use std::{path::Path, time::Duration};

use crate::{
    Plan,
    cpu::{Usage, resident_bytes},
    load::{CONNECTIONS, Load, TENANTS},
    report::{Budget, Report, Spread, Table},
};
use stage::{Stage, Way};

/// Before the first round each is used for this long.
const WARM_UP: Duration = Duration::from_millis(300);

const KIB: usize = 1024;

/// A way, its clients, and what each round gave.
struct Target<'s> {
    way: &'s Way,
    load: Load,
    rates: Vec<f64>,
    cpu_us: Vec<f64>,
    /// What the process had used before the first slice and after the last.
    usage: Option<(Usage, Usage)>,
    requests: u64,
}

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Proxies: HTTP/1.1, everything in the agent on");
    let stage = Stage::start(plan, directory, report).await?;
    let idle_bytes = match stage.pid("agent") {
        Some(pid) => resident_bytes(pid)?,
        None => 0.0,
    };
    report.note(&format!(
        "{CONNECTIONS} keep-alive connections, closed loop, {TENANTS} tenants; upstream and clients saturate \
         their core first, so\ncompare CPU rather than requests/s. Each cell: median of {} rounds (min-max). \
         User and kernel are divided as the kernel's ticks fell.",
        plan.rounds
    ));

    let small = rounds(plan, &stage, KIB, plan.slice, report).await?;
    let large = rounds(plan, &stage, 64 * KIB, plan.slice / 2, report).await?;
    let mut ratios = Table::new(["", "median (min-max)", "budget", ""]);
    compare_small(&small, &mut ratios, report);
    compare_large(&large, &mut ratios, report);
    let mib = idle_bytes / (KIB * KIB) as f64;
    let what = "agent, idle with its session, resident MiB";
    ratio(what, Spread::of([mib]), Budget::AtMost(8.0), &mut ratios, report);
    report.note("");
    ratios.print();

    let sent = [&small, &large].into_iter().flatten();
    let sent: u64 = sent
        .filter(|target| target.way.name == "agent")
        .map(|target| target.requests)
        .sum();
    let batches = stage.agent_has_counted(sent).await?;
    report.note(&format!(
        "The agent counted each of the {sent} requests, and the aggregator has all of its {batches} windows on disk."
    ));
    Ok(())
}

/// Measures all ways with answers of this length, and prints what each gave.
async fn rounds<'s>(
    plan: Plan,
    stage: &'s Stage,
    answer_bytes: usize,
    slice: Duration,
    report: &Report,
) -> anyhow::Result<Vec<Target<'s>>> {
    let mut targets = Vec::new();
    for way in &stage.ways {
        let load = Load::open(way.address, answer_bytes).await?;
        let mut target = Target::new(way, load);
        target.requests += target.load.run(WARM_UP.min(slice)).await?.requests;
        targets.push(target);
    }
    for round in 0..plan.rounds {
        for place in 0..targets.len() {
            let next = (round + place) % targets.len();
            targets[next].measure(slice).await?;
        }
    }
    let title = format!("{} KiB, {} ms", answer_bytes / KIB, slice.as_millis());
    let mut table = Table::new([
        &title,
        "requests/s",
        "of direct",
        "CPU us/request",
        "user",
        "kernel",
    ]);
    for target in &targets {
        table.row(target.row(&targets[0]));
    }
    report.note("");
    table.print();
    Ok(targets)
}

fn compare_small(targets: &[Target<'_>], ratios: &mut Table, report: &mut Report) {
    let find = |name| targets.iter().find(|target| target.way.name == name);
    let Some(agent) = find("agent") else { return };
    for (name, budget) in [
        ("relay", Budget::AtMost(1.10)),
        ("nginx", Budget::AtMost(0.75)),
        ("haproxy", Budget::AtMost(0.75)),
    ] {
        let Some(other) = find(name) else { continue };
        let what = format!("agent/{name}, CPU per request, 1 KiB");
        let spread = Spread::of_ratios(&agent.cpu_us, &other.cpu_us);
        ratio(&what, spread, budget, ratios, report);
    }
    let what = "agent, user-space CPU per request, us, 1 KiB";
    ratio(what, agent.user_us(), Budget::AtMost(1.5), ratios, report);
    for name in ["relay", "nginx", "haproxy"] {
        let Some(other) = find(name) else { continue };
        let what = format!("agent/{name}, requests/s, 1 KiB");
        let spread = Spread::of_ratios(&agent.rates, &other.rates);
        ratio(&what, spread, Budget::None, ratios, report);
    }
}

fn compare_large(targets: &[Target<'_>], ratios: &mut Table, report: &mut Report) {
    let find = |name| targets.iter().find(|target| target.way.name == name);
    let Some(agent) = find("agent") else { return };
    let peers: Vec<_> = ["nginx", "haproxy"].into_iter().filter_map(find).collect();
    let best = |round: usize| {
        let cpu_us = peers.iter().filter_map(|peer| peer.cpu_us.get(round));
        cpu_us.copied().fold(f64::INFINITY, f64::min)
    };
    if !peers.is_empty() {
        let best: Vec<f64> = (0..agent.cpu_us.len()).map(best).collect();
        let what = "agent/better of nginx and haproxy, CPU per request, 64 KiB";
        let spread = Spread::of_ratios(&agent.cpu_us, &best);
        ratio(what, spread, Budget::AtMost(0.55), ratios, report);
    }
    if let Some(relay) = find("relay") {
        let what = "agent/relay, CPU per request, 64 KiB";
        let spread = Spread::of_ratios(&agent.cpu_us, &relay.cpu_us);
        ratio(what, spread, Budget::None, ratios, report);
    }
}

fn ratio(what: &str, spread: Spread, budget: Budget, ratios: &mut Table, report: &mut Report) {
    let cells = [what.to_owned(), spread.cell(2)];
    let held = report.held(what, spread.median, budget, 2);
    ratios.row(cells.into_iter().chain(held));
}

impl<'s> Target<'s> {
    fn new(way: &'s Way, load: Load) -> Self {
        Self {
            way,
            load,
            rates: Vec::new(),
            cpu_us: Vec::new(),
            usage: None,
            requests: 0,
        }
    }

    async fn measure(&mut self, length: Duration) -> anyhow::Result<()> {
        let before = self.way.pid.map(Usage::of).transpose()?;
        let slice = self.load.run(length).await?;
        let requests = slice.requests as f64;
        if let (Some(before), Some(after)) = (before, self.way.pid.map(Usage::of).transpose()?) {
            self.cpu_us.push(after.since(before).total_ns / 1e3 / requests);
            let first = self.usage.map_or(before, |(first, _)| first);
            self.usage = Some((first, after));
        }
        self.rates.push(requests / slice.seconds);
        self.requests += slice.requests;
        Ok(())
    }

    /// CPU in user space for each request: the share is of all rounds, since ticks are few.
    fn user_us(&self) -> Spread {
        let share = self
            .usage
            .map_or(0.0, |(first, last)| last.since(first).user_share);
        Spread::of(self.cpu_us.iter().copied()).times(share)
    }

    fn row(&self, direct: &Self) -> Vec<String> {
        let mut row = vec![
            self.way.name.to_owned(),
            Spread::of(self.rates.iter().copied()).cell(0),
            Spread::of_ratios(&self.rates, &direct.rates).cell(2),
        ];
        if !self.cpu_us.is_empty() {
            let (cpu, user) = (Spread::of(self.cpu_us.iter().copied()), self.user_us().median);
            row.push(cpu.cell(2));
            row.push(format!("{user:.2}"));
            row.push(format!("{:.2}", cpu.median - user));
        }
        row
    }
}
