//! What a decision costs: freezing a window from the book, judging it, and writing it down.
//!
//! The book is filled as ingest fills it, one agent for each arm; then the code of the aggregator does what
//! it does for each window of a rollout. Freezing and judging is what the budget is for; evidence and log are
//! reported apart.

use std::{hint::black_box, path::Path, sync::Arc};

use anyhow::Context as _;
use coalmine_aggregator::{
    book::{Batch, Book, Build, Comparison, Introduction, Patience, Row},
    ledger::{Blob, Ledger, Options},
    metrics::Metrics,
};
use coalmine_judge::{
    chain::Hash,
    evidence::Window,
    policy::Policy,
    record::{Body, RolloutEnd},
    v1::{Judge, Outcome, Verdict},
};
use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcomes},
    v1::{Histogram as WireHistogram, TenantRow, Totals},
};
use tokio::time::Instant;

use crate::{
    Plan,
    aggregator::{POLICY, SERVICE},
    cpu::thread_ns,
    report::{Budget, Report, Spread, Table},
    sample::{Traffic, tenant_name},
};

/// Requests of a typical tenant in a window, on the canary and on the baseline.
const REQUESTS: [f64; 2] = [60.0, 140.0];

/// Windows before the first that is measured.
const WARM_UP: usize = 5;

const START_MS: u64 = 1_700_000_000_000;

/// One size of the fleet.
struct Fleet {
    tenants: usize,
    windows: usize,
    budget_ms: f64,
}

/// A rollout of this many tenants.
pub(super) struct Rollout {
    traffic: Traffic,
    tenants: Vec<u32>,
    policy: Policy,
    book: Book,
    /// Its judge.
    pub(super) judge: Judge,
    comparison: Comparison,
    pub(super) ledger: Ledger,
    sums: [Totals; 2],
    number: u64,
}

/// Milliseconds of each window.
#[derive(Debug, Default)]
pub(super) struct Times {
    apply: Vec<f64>,
    freeze: Vec<f64>,
    step: Vec<f64>,
    decide: Vec<f64>,
    pack: Vec<f64>,
    append: Vec<f64>,
    /// A step in which one tenant of a hundred has traffic.
    quiet: Vec<f64>,
    evidence_bytes: Vec<f64>,
    state_bytes: f64,
    last: Option<Verdict>,
}

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Decide: milliseconds of one core for a window");
    report.note(
        "Both arms, latency histograms, 0.1 % errors; CPU time of one thread, but the append of evidence and record \
         to the log by the clock,\nwith its syncs. Median (min-max) over the windows.",
    );
    let fleets: &[_] = &[(500, 30, 2.0), (10_000, 30, 40.0), (100_000, 6, 400.0)];
    let fleets = fleets.iter().map(|(tenants, windows, budget_ms)| Fleet {
        tenants: *tenants,
        windows: if plan.quick { 3 } else { *windows },
        budget_ms: *budget_ms,
    });
    let largest = if plan.quick { 10_000 } else { usize::MAX };
    for fleet in fleets.filter(|fleet| fleet.tenants <= largest) {
        let data = directory.join(format!("decide-{}", fleet.tenants));
        let mut rollout = Rollout::begin(fleet.tenants, &data)?;
        let mut times = Times::default();
        for _ in 0..WARM_UP {
            rollout.window(&mut Times::default()).await?;
        }
        for _ in 0..fleet.windows {
            rollout.window(&mut times).await?;
        }
        rollout.quiet(&mut times)?;
        times.state_bytes = rollout.judge.memory_bytes() as f64 / fleet.tenants as f64;
        print(&fleet, &times, report);
    }
    Ok(())
}

fn print(fleet: &Fleet, times: &Times, report: &mut Report) {
    let title = format!("{} tenants, {} windows", fleet.tenants, fleet.windows);
    let mut table = Table::new([title.as_str(), "ms", "us a tenant", "budget", "", "of it"]);
    let decide = format!("decide (freeze and step), {} tenants", fleet.tenants);
    for (what, values, budget) in [
        ("applying both batches (ingest)", &times.apply, Budget::None),
        ("freeze from the book", &times.freeze, Budget::None),
        ("Judge::step", &times.step, Budget::None),
        (&decide, &times.decide, Budget::AtMost(fleet.budget_ms)),
        (
            "Judge::step, traffic in 1 tenant of 100",
            &times.quiet,
            Budget::None,
        ),
        ("audit: evidence to JSON and zstd", &times.pack, Budget::None),
        ("audit: append to the log (clock)", &times.append, Budget::None),
    ] {
        let spread = Spread::of(values.iter().copied());
        let each = spread.median * 1e3 / fleet.tenants as f64;
        let held = report.held(what, spread.median, budget, 0);
        let mut row = vec![what.to_owned(), spread.cell(2), format!("{each:.2}")];
        row.extend(held);
        if let Budget::AtMost(ms) = budget {
            row.push(format!("{:.2}", spread.median / ms));
        }
        table.row(row);
    }
    let what = format!("state of the judge, bytes a tenant, {} tenants", fleet.tenants);
    let mut row = vec![
        what.clone(),
        format!("{:.0} bytes", times.state_bytes),
        String::new(),
    ];
    row.extend(report.held(&what, times.state_bytes, Budget::AtMost(1024.0), 0));
    row.push(format!("{:.2}", times.state_bytes / 1024.0));
    table.row(row);
    report.note("");
    table.print();
    let verdict = times.last.map_or("none", Verdict::as_str);
    let kib = Spread::of(times.evidence_bytes.iter().copied()).median / 1024.0;
    report.note(&format!(
        "Evidence of a window: {kib:.0} KiB of JSON; the last verdict was {verdict}."
    ));
}

impl Rollout {
    pub(super) fn begin(tenants: usize, data: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(data)?;
        let policy = Policy::parse(POLICY)?;
        let mut book = Book::new(Patience::default(), 0);
        book.set_slot(SERVICE, policy.window_ms());
        for arm in Arm::ALL {
            book.introduce(&introduction(arm), 1 + arm as u64, START_MS);
        }
        let numbers = (0..tenants).map(|number| Ok(book.intern(SERVICE, &tenant_name(number)?)));
        let opened = Ledger::open(data, Options::default(), Arc::new(Metrics::new()), |_, _| {})?;
        Ok(Self {
            traffic: Traffic::new(5, 20.0, 0.45),
            tenants: numbers.collect::<anyhow::Result<_>>()?,
            judge: Judge::new(policy.clone(), None, None)?,
            policy,
            book,
            comparison: Comparison {
                service: SERVICE.to_owned(),
                canary_version: introduction(Arm::Canary).build.version,
                baseline_version: None,
            },
            ledger: opened.ledger,
            sums: [Totals::default(); 2],
            number: 0,
        })
    }

    /// One window: counted, frozen, judged, recorded.
    async fn window(&mut self, times: &mut Times) -> anyhow::Result<()> {
        let (window, outcome) = self.judge_next(times)?;
        let packing = thread_ns();
        let (evidence, json_bytes) = pack(&window, &outcome)?;
        times.pack.push((thread_ns() - packing) / 1e6);
        times.evidence_bytes.push(json_bytes as f64);

        let writing = Instant::now();
        let body = Body::End(RolloutEnd {
            rollout: "bench".to_owned(),
            actor: "bench".to_owned(),
            reason: outcome.reason.clone(),
            verdict: outcome.verdict.as_str().to_owned(),
        });
        self.ledger.append(body, vec![evidence]).await?;
        times.append.push(writing.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }

    /// One window: counted, frozen, judged.
    pub(super) fn judge_next(&mut self, times: &mut Times) -> anyhow::Result<(Window, Outcome)> {
        self.number += 1;
        let slot_ms = self.policy.window_ms();
        let start_ms = START_MS + self.number * slot_ms;
        let now_ms = start_ms + slot_ms;
        times.apply.push(self.count(start_ms, now_ms)?);

        let begun = thread_ns();
        let window = self.book.freeze(&self.comparison, start_ms, self.number, now_ms);
        let frozen = thread_ns();
        let outcome = self.judge.step(&window)?;
        let judged = thread_ns();
        times.freeze.push((frozen - begun) / 1e6);
        times.step.push((judged - frozen) / 1e6);
        times.decide.push((judged - begun) / 1e6);
        times.last = Some(outcome.verdict);
        self.book.evict(now_ms, |_| None);
        Ok((window, outcome))
    }

    /// Windows in which few tenants have traffic, judged by a copy of the judge.
    fn quiet(&mut self, times: &mut Times) -> anyhow::Result<()> {
        let mut judge = self.judge.clone();
        for number in 1..=6 {
            let start_ms = START_MS + self.number * self.policy.window_ms();
            let mut window = self
                .book
                .freeze(&self.comparison, start_ms, self.number + number, start_ms);
            let mut place = 0;
            window.rows.retain(|_| {
                place += 1;
                place % 100 == 0
            });
            let begun = thread_ns();
            black_box(judge.step(&window)?);
            times.quiet.push((thread_ns() - begun) / 1e6);
        }
        Ok(())
    }

    /// Lets each arm's agent report a window; milliseconds for applying what they say.
    fn count(&mut self, start_ms: u64, now_ms: u64) -> anyhow::Result<f64> {
        let mut applying = 0.0;
        for arm in Arm::ALL {
            let limit_us = self.policy.defaults.latency.p99.map_or(0, |p99| p99.micros);
            let mut made = Vec::with_capacity(self.tenants.len());
            for _ in &self.tenants {
                made.push(counts(&mut self.traffic, REQUESTS[arm as usize], limit_us));
            }
            let sums = &mut self.sums[arm as usize];
            sums.requests += made.iter().map(|(outcomes, ..)| outcomes.seen()).sum::<u64>();
            sums.errors += made.iter().map(|(outcomes, ..)| outcomes.errors()).sum::<u64>();
            let rows = self.tenants.iter().zip(&made);
            let rows = rows.map(|(tenant, (outcomes, latency, over))| Row {
                tenant: *tenant,
                outcomes: *outcomes,
                latency: Some(latency),
                limit_us,
                over: *over,
            });
            let batch = Batch {
                seq: self.number,
                start_ms,
                length_ms: u32::try_from(self.policy.window_ms())?,
                rows: rows.collect(),
                cumulative: *sums,
                gap: None,
                pools: &[],
                host: None,
            };
            let begun = thread_ns();
            let instance = introduction(arm).instance;
            let session = 1 + arm as u64;
            self.book.apply(SERVICE, &instance, session, &batch, now_ms)?;
            applying += thread_ns() - begun;
        }
        Ok(applying / 1e6)
    }
}

/// Evidence as the log keeps it, and the length of its text; the outcome is hashed, as a decision has it.
pub(super) fn pack(window: &Window, outcome: &Outcome) -> anyhow::Result<(Blob, usize)> {
    let json = window.to_json();
    let evidence = Blob::pack(json.as_bytes()).context("the evidence cannot be packed")?;
    black_box(Hash::of(outcome.to_json().as_bytes()));
    Ok((evidence, json.len()))
}

fn introduction(arm: Arm) -> Introduction {
    Introduction {
        service: SERVICE.to_owned(),
        instance: format!("agent-{arm}"),
        build: Build {
            arm,
            version: format!("{arm}-1"),
        },
        epoch: 1,
        first_seq: 1,
    }
}

/// One tenant's requests of one window on one arm: outcomes, latency, how many were over the limit.
pub(super) fn counts(traffic: &mut Traffic, typical: f64, limit_us: u64) -> (Outcomes, WireHistogram, u64) {
    let (mut latency, mut over) = (Histogram::new(), 0);
    let count = traffic.count(typical);
    let ended = traffic.requests(count, |ns| {
        latency.record(ns);
        over += u64::from(ns > limit_us * 1_000);
    });
    let row = TenantRow {
        success: ended.ok,
        server_error: ended.failed,
        ..TenantRow::default()
    };
    (Outcomes::from_row(&row), latency.to_wire(), over)
}
