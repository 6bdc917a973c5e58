//! What each round of a way gave: requests a second, and what each of them cost the process in between.

use super::{Ratios, stage::Way};
use crate::{
    cpu::{Usage, Used},
    load::Slice,
    report::{Budget, Report, Spread, Table},
};

/// A way, and its rounds so far.
#[derive(Debug)]
pub(super) struct Rounds<'s> {
    pub(super) way: &'s Way,
    pub(super) rates: Vec<f64>,
    pub(super) cpu_us: Vec<f64>,
    /// All requests, those of no round too.
    pub(super) requests: u64,
    /// What the process had used before the first slice and after the last.
    usage: Option<(Usage, Usage)>,
}

// === impl Rounds ===

impl<'s> Rounds<'s> {
    pub(super) fn new(way: &'s Way) -> Self {
        Self {
            way,
            rates: Vec::new(),
            cpu_us: Vec::new(),
            requests: 0,
            usage: None,
        }
    }

    /// Lets a round's slice happen.
    pub(super) async fn take(
        &mut self,
        slice: impl Future<Output = anyhow::Result<Slice>>,
    ) -> anyhow::Result<()> {
        let (slice, used) = self.watch(slice).await?;
        let requests = slice.requests as f64;
        self.rates.push(requests / slice.seconds);
        if let Some(used) = used {
            self.cpu_us.push(used.total_ns / 1e3 / requests);
        }
        Ok(())
    }

    /// Lets a slice happen that is of no round: it counts only for how CPU is divided between user space and kernel.
    pub(super) async fn watch(
        &mut self,
        slice: impl Future<Output = anyhow::Result<Slice>>,
    ) -> anyhow::Result<(Slice, Option<Used>)> {
        let before = self.way.usage()?;
        let slice = slice.await?;
        self.requests += slice.requests;
        let (Some(before), Some(after)) = (before, self.way.usage()?) else {
            return Ok((slice, None));
        };
        let first = self.usage.map_or(before, |(first, _)| first);
        self.usage = Some((first, after));
        Ok((slice, Some(after.since(before))))
    }

    /// CPU in user space for each request: the share is of all slices, since ticks are few.
    pub(super) fn user_us(&self) -> Spread {
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

/// The rounds of a way, by name.
pub(super) fn find<'r, 's>(all: &'r [Rounds<'s>], name: &str) -> Option<&'r Rounds<'s>> {
    all.iter().find(|rounds| rounds.way.name == name)
}

/// The agent's CPU beside that of the relay, of nginx and of HAProxy.
pub(super) fn compare_cpu(
    all: &[Rounds<'_>],
    what: &str,
    budgets: [Budget; 3],
    ratios: &mut Ratios,
    report: &mut Report,
) {
    let Some(agent) = find(all, "agent") else { return };
    for (name, budget) in ["relay", "nginx", "haproxy"].into_iter().zip(budgets) {
        let Some(other) = find(all, name) else { continue };
        let what = format!("agent/{name}, CPU per request, {what}");
        let spread = Spread::of_ratios(&agent.cpu_us, &other.cpu_us);
        ratios.row(&what, spread, budget, report);
    }
}

/// How many requests went through the agent.
pub(super) fn through_agent(all: &[Rounds<'_>]) -> u64 {
    find(all, "agent").map_or(0, |agent| agent.requests)
}

/// Prints what all gave; the first is the one that the others' requests are compared with.
pub(super) fn print(title: &str, all: &[Rounds<'_>]) {
    let mut table = Table::new([
        title,
        "requests/s",
        "of direct",
        "CPU us/request",
        "user",
        "kernel",
    ]);
    for rounds in all {
        table.row(rounds.row(&all[0]));
    }
    table.print();
}
