//! Decisions a second: a log with one to many callers, beside its floor.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use coalmine_aggregator::{ledger::Ledger, metrics::Metrics};

use super::{callers::Lane, pool::Pool, stock::Stock};
use crate::{
    Plan,
    report::{Budget, Report, Table},
};

/// How many wait for the log at a time.
static CALLERS: [usize; 4] = [1, 8, 64, 256];

/// A log, with what is appended to it.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) ledger: Ledger,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stock: Arc<Stock>,
}

/// Rounds of the floor and of a log.
#[derive(Debug, Default)]
pub(super) struct Rates {
    pub(super) callers: usize,
    pub(super) floor: Lane,
    alone: Lane,
    with_evidence: Lane,
    /// Commits of the log in the rounds of both kinds.
    commits: [u64; 2],
}

/// What is particular about a log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) floor: &'static str,
    pub(super) log: &'static str,
    /// Syncs that a commit takes, and those for each blob in it, where they are known.
    pub(super) syncs: Option<(f64, f64)>,
    /// How much better than its floor the log must be, with so many callers.
    pub(super) goal: Option<(usize, f64)>,
}

impl Log {
    /// How many times the log has made something durable for its callers.
    fn commits(&self) -> anyhow::Result<u64> {
        let text = self.metrics.render()?;
        let of = "coalmine_audit_append_duration_seconds_count ";
        let count = text.lines().find_map(|line| line.strip_prefix(of));
        let count = count.context("the log does not count its commits")?;
        Ok(count.trim().parse()?)
    }
}

impl Rates {
    /// One for each number of callers.
    pub(super) fn all(plan: Plan) -> Vec<Self> {
        let most = if plan.quick { 8 } else { usize::MAX };
        let callers = CALLERS.into_iter().filter(|callers| *callers <= most);
        let rates = callers.map(|callers| Self {
            callers,
            ..Self::default()
        });
        rates.collect()
    }

    /// A round of records alone, and one of records with evidence.
    pub(super) async fn round(&mut self, pool: &Pool, length: Duration, log: &Log) -> anyhow::Result<()> {
        let before = log.commits()?;
        let (ledger, stock) = (log.ledger.clone(), Arc::clone(&log.stock));
        let append = move |_| {
            let (ledger, body) = (ledger.clone(), stock.alone());
            async move {
                ledger.append(body, Vec::new()).await?;
                anyhow::Ok(())
            }
        };
        self.alone.round(pool, self.callers, length, append).await?;

        let between = log.commits()?;
        let (ledger, stock) = (log.ledger.clone(), Arc::clone(&log.stock));
        let append = move |_| {
            let (ledger, made) = (ledger.clone(), stock.with_evidence());
            async move {
                let (body, evidence) = made?;
                ledger.append(body, vec![evidence]).await?;
                anyhow::Ok(())
            }
        };
        self.with_evidence
            .round(pool, self.callers, length, append)
            .await?;
        let after = log.commits()?;
        self.commits[0] += between - before;
        self.commits[1] += after - between;
        Ok(())
    }

    /// Prints all of a log.
    pub(super) fn print(all: &[Self], kind: Kind, report: &mut Report) {
        let mut table = Table::new([
            "",
            "records/s median (min-max)",
            "of the floor",
            "p50 ms",
            "p99 ms",
            "records a commit",
            "syncs/s",
            "budget",
            "",
        ]);
        for rates in all {
            rates.rows(kind, &mut table, report);
        }
        table.print();
    }

    fn rows(&self, kind: Kind, table: &mut Table, report: &mut Report) {
        let callers = match self.callers {
            1 => "1 caller".to_owned(),
            many => format!("{many} callers"),
        };
        let what = format!("{callers}, floor: {}", kind.floor);
        table.row([what].into_iter().chain(self.floor.cells(&self.floor)));
        let log = [
            ("records alone", &self.alone, self.commits[0], 0.0),
            ("with evidence", &self.with_evidence, self.commits[1], 1.0),
        ];
        for (what, lane, commits, blobs) in log {
            let what = format!("{callers}, {}, {what}", kind.log);
            let budget = match kind.goal {
                Some((callers, times)) if callers == self.callers && blobs == 0.0 => Budget::AtLeast(times),
                _ => Budget::None,
            };
            let (appended, commits) = (lane.appended as f64, commits as f64);
            let each = format!("{:.1}", appended / commits.max(1.0));
            let syncs = kind.syncs.map_or_else(String::new, |(commit, blob)| {
                let syncs = commits * commit + appended * blobs * blob;
                format!("{:.0}", syncs / lane.seconds)
            });
            let held = report.held(
                &format!("{what}, of the floor"),
                lane.of(&self.floor).median,
                budget,
                1,
            );
            let mut row = vec![what];
            row.extend(lane.cells(&self.floor));
            row.extend([each, syncs]);
            row.extend(held);
            table.row(row);
        }
    }
}
