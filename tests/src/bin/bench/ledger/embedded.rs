//! The log as files.

use std::{fs, path::Path, sync::Arc};

use coalmine_aggregator::{
    ledger::{Ledger, Options},
    metrics::Metrics,
};

use super::{
    callers::Floor,
    pool::Pool,
    rates::{Kind, Log, Rates},
    rounds,
    stock::{ANOMALIES, Stock},
};
use crate::{Plan, report::Report};

/// What group commit gives at the least, also where a sync takes a quarter of a millisecond; where it takes four, a bare one
/// gave 2.6 to 7 times the floor with as many callers.
const GOAL: (usize, f64) = (8, 1.5);

/// A commit syncs the lines, and each blob and its directory. The checkpoint's file is synced beside it, under load twenty
/// times a second.
const SYNCS: (f64, f64) = (1.0, 2.0);

pub(super) async fn measure(
    plan: Plan,
    directory: &Path,
    pool: &Pool,
    stock: &Arc<Stock>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let line = stock.line();
    let (rounds, slice) = rounds(plan);
    report.note(&format!(
        "\nDecisions as files, {rounds} rounds of {} ms: a record has {} bytes and {ANOMALIES} anomalies, its \
         evidence {:.0} KiB.\nA commit is {} sync and {} for each evidence, the checkpoint's file comes beside it; \
         the floor writes the record alone.",
        slice.as_millis(),
        line.len(),
        stock.evidence_bytes() as f64 / 1024.0,
        SYNCS.0,
        SYNCS.1,
    ));
    let log = open(&directory.join("embedded"), pool, stock).await?;
    let floor = Floor::new(&directory.join("floor"), line.as_bytes())?;
    let mut all = Rates::all(plan);
    for _ in 0..rounds {
        for rates in &mut all {
            let floor = floor.clone();
            let append = move |_| floor.clone().append();
            rates.floor.round(pool, rates.callers, slice, append).await?;
            rates.round(pool, slice, &log).await?;
        }
    }
    log.ledger.stop().await.ok();
    let kind = Kind {
        floor: "an fdatasync for each",
        log: "log",
        syncs: Some(SYNCS),
        goal: Some(GOAL),
    };
    Rates::print(&all, kind, report);
    Ok(())
}

async fn open(data: &Path, pool: &Pool, stock: &Arc<Stock>) -> anyhow::Result<Log> {
    let metrics = Arc::new(Metrics::new());
    let (data, counting) = (data.to_owned(), Arc::clone(&metrics));
    let open = move || {
        fs::create_dir_all(&data)?;
        let opened = Ledger::open(&data, Options::default(), counting, |_, _| {})?;
        opened.ledger.begin();
        anyhow::Ok(opened.ledger)
    };
    Ok(Log {
        ledger: pool.aside(open).await?,
        metrics,
        stock: Arc::clone(stock),
    })
}
