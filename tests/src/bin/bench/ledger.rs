//! What it costs to keep decisions and windows, syncs included: space, records a second, and the time to read all of it
//! again.
//!
//! Read in this order: [`space`] (bytes of a decision), [`embedded`] and [`postgres`] (decisions a second), [`windows`]
//! (windows a second), [`restart`] (log and windows read again, and the roll-up). What they share: [`stock`] (made-up
//! decisions), [`agents`] (made-up windows), [`callers`] (who append, and the floor), [`rates`] (a log with callers),
//! [`pool`] (threads on both cores).
//!
//! A disk is never twice the same, so what is measured and its floor take turns in the same rounds.

mod space;

mod embedded;
mod postgres;

mod windows;

mod restart;

mod agents;
mod callers;
mod pool;
mod rates;
mod stock;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;

use self::{pool::Pool, stock::Stock};
use crate::{Plan, report::Report};

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Ledger: decisions and windows, kept and read again");
    report.note(&format!(
        "The log's writer and its callers use both cores. Data is in {}; in memory a sync would cost nothing.",
        directory.display()
    ));
    let pool = Pool::new(plan.cores)?;
    let (finding, evidence_bytes) = space::measure(plan, directory, report).await?;
    let stock = Arc::new(Stock::new(finding, evidence_bytes));
    let embedded = embedded::measure(plan, directory, &pool, &stock, report).await;
    embedded.context("the log as files cannot be measured")?;
    let postgres = postgres::measure(plan, directory, &pool, &stock, report).await;
    postgres.context("the log in PostgreSQL cannot be measured")?;
    let windows = windows::measure(plan, directory, &pool, report).await;
    windows.context("the store of windows cannot be measured")?;
    restart::measure(plan, directory, &pool, &stock, report).await
}

/// Rounds of what is interleaved, and how long each takes: there are many kinds of it here.
fn rounds(plan: Plan) -> (usize, Duration) {
    ((plan.rounds / 2).max(1), plan.slice / 2)
}
