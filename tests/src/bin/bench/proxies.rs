//! Requests through the agent, beside other proxies, a bare relay and no proxy at all.
//!
//! All are up at once. In each round each gets a slice of time, in an order that rotates; what is compared are the slices
//! of one round. Read in this order: [`stage`] (everything that requests can go through), [`memory`], [`saturation`] (CPU
//! and requests a second), [`rate`] (latency), [`http2`]; [`rounds`] is what the last three share.

mod stage;

mod memory;

mod saturation;

mod rate;

mod http2;

mod rounds;

use std::{path::Path, time::Duration};

use crate::{
    Plan,
    load::TENANTS,
    report::{Budget, Report, Spread, Table},
};
use stage::Stage;

/// Before the first round each is used for this long.
const WARM_UP: Duration = Duration::from_millis(300);

/// Connections to each, where their number is not what is measured.
const CONNECTIONS: usize = 32;

const KIB: usize = 1024;

/// What is held against budgets, printed when all is measured.
#[derive(Debug)]
struct Ratios(Table);

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Proxies: everything in the agent on (tenants, histograms, streaming to an aggregator)");
    let stage = Stage::start(plan, directory, report).await?;
    report.note(&format!(
        "Keep-alive connections, {TENANTS} tenants. Each cell: median of {} rounds (min-max).",
        plan.rounds
    ));
    let mut ratios = Ratios::new();
    // First, as long as nothing has been asked of any process.
    let mut sent = memory::measure(plan, &stage, &mut ratios, report).await?;
    memory::tenants(plan, directory, &stage, &mut ratios, report).await?;
    sent += saturation::measure(plan, &stage, &mut ratios, report).await?;
    sent += rate::measure(plan, &stage, &mut ratios, report).await?;
    sent += http2::measure(plan, &stage, &mut ratios, report).await?;
    report.note("");
    ratios.0.print();
    let windows = stage.agent.has_counted(sent).await?;
    report.note(&format!(
        "The agent counted each of the {sent} requests, and the aggregator has all of its {windows} windows on disk."
    ));
    Ok(())
}

/// Whose turn it is, round by round: each of the ways once, in an order that rotates.
fn turns(rounds: usize, ways: usize) -> impl Iterator<Item = usize> {
    (0..rounds).flat_map(move |round| (0..ways).map(move |place| (round + place) % ways))
}

// === impl Ratios ===

impl Ratios {
    fn new() -> Self {
        Self(Table::new(["", "median (min-max)", "budget", ""]))
    }

    fn row(&mut self, what: &str, spread: Spread, budget: Budget, report: &mut Report) {
        let cells = [what.to_owned(), spread.cell(2)];
        let held = report.held(what, spread.median, budget, 2);
        self.0.row(cells.into_iter().chain(held));
    }
}
