//! What a window of a tenant costs in the aggregator: sent over gRPC, counted in the book, written to disk,
//! acknowledged.
//!
//! A real aggregator process is pinned to one core, and its CPU is what counts. The floor is the least that any
//! receiver must do: this process decodes the same messages with prost and adds up their histograms.

mod session;

use std::{path::Path, sync::Arc, time::Duration};

use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcomes},
    v1::{AgentMessage, TenantRow, Totals, WindowBatch, agent_message},
};
use prost::{Message as _, bytes::Bytes};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    Plan,
    aggregator::Aggregator,
    cpu::{Usage, thread_ns},
    report::{Budget, Report, Spread, Table},
    sample::Traffic,
};
use session::Session;

const SESSIONS: usize = 4;
const TENANTS: usize = 500;

/// Different windows, which are sent again and again.
const WINDOWS: usize = 16;

/// Requests of a typical tenant in a window; it makes about 40 buckets that are not empty.
const REQUESTS: f64 = 260.0;

/// The limit that the policy of the run gives to every tenant.
const LIMIT_US: u64 = 350_000;

/// A window without its number and time.
#[derive(Debug)]
struct Made {
    rows: Vec<TenantRow>,
    sums: Totals,
}

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Ingest: tenant-windows per second of CPU");
    let mut traffic = Traffic::new(3, 20.0, 0.45);
    let made: Arc<[Made]> = (0..WINDOWS).map(|_| Made::new(&mut traffic)).collect();
    let messages: Vec<Bytes> = made.iter().map(Made::message).collect();
    report.note(&format!(
        "{SESSIONS} sessions of {TENANTS} tenants; a row has {:.0} buckets that are not empty and {:.0} bytes; \
         {} rounds of {} ms;\nthe aggregator on core {}; acknowledgements after fsync, in {}.",
        buckets(&made),
        messages.iter().map(Bytes::len).sum::<usize>() as f64 / (WINDOWS * TENANTS) as f64,
        plan.rounds,
        plan.slice.as_millis(),
        plan.cores.proxy,
        directory.display(),
    ));

    let aggregator = Aggregator::start("ingest", plan.cores.proxy, directory).await?;
    let mut sessions = Vec::new();
    for number in 0..SESSIONS {
        let arm = Arm::ALL[number % 2];
        sessions.push(Session::open(aggregator.grpc, number, arm, Arc::clone(&made)).await?);
    }
    let pid = aggregator.child.pid();
    // The first windows introduce all names, in the aggregator and in the floor.
    run(&mut sessions, Duration::from_millis(100)).await?;
    let mut sums = vec![(Outcomes::default(), Histogram::new()); TENANTS];
    floor(&messages, WINDOWS, &mut sums)?;

    let (mut floor_ns, mut server_ns, mut rates) = (vec![], vec![], vec![]);
    let first = Usage::of(pid)?;
    for _ in 0..plan.rounds {
        floor_ns.push(floor(&messages, if plan.quick { 64 } else { 1_000 }, &mut sums)?);
        let before = Usage::of(pid)?;
        let begun = Instant::now();
        let rows = run(&mut sessions, plan.slice).await? as f64;
        rates.push(rows / begun.elapsed().as_secs_f64() / 1e6);
        server_ns.push(Usage::of(pid)?.since(before).total_ns / rows);
    }

    let mut table = Table::new(["", "ns a tenant-window", "M/s of CPU", "budget", ""]);
    let millions = |ns: &[f64]| Spread::of(ns.iter().map(|ns| 1e3 / ns));
    let of = |values: &[f64]| Spread::of(values.iter().copied());
    table.row([
        "floor: decode with prost, merge".to_owned(),
        of(&floor_ns).cell(0),
        millions(&floor_ns).cell(2),
    ]);
    let server = millions(&server_ns);
    let what = "aggregator: gRPC, book, disk, acknowledgements; M/s";
    let held = report.held(what, server.median, Budget::AtLeast(4.0), 1);
    let cells = [what.to_owned(), of(&server_ns).cell(0), server.cell(2)];
    table.row(cells.into_iter().chain(held));
    let all_ns = of(&server_ns).median;
    let user_ns = all_ns * Usage::of(pid)?.since(first).user_share;
    table.row(["  of it in user space".to_owned(), format!("{user_ns:.0}")]);
    table.row([
        "  of it in the kernel".to_owned(),
        format!("{:.0}", all_ns - user_ns),
    ]);
    let ratio = Spread::of_ratios(&server_ns, &floor_ns);
    table.row(["aggregator/floor, CPU".to_owned(), ratio.cell(2)]);
    table.print();
    report.note(&format!(
        "By the clock {} M tenant-windows/s were durable.",
        of(&rates).cell(2)
    ));
    Ok(())
}

/// Lets all sessions send for a while; gives the rows that became durable.
async fn run(sessions: &mut Vec<Session>, length: Duration) -> anyhow::Result<u64> {
    let until = Instant::now() + length;
    let mut running = JoinSet::new();
    for session in sessions.drain(..) {
        running.spawn(session.run(until));
    }
    let mut sum = 0;
    while let Some(session) = running.join_next().await {
        let (session, batches) = session??;
        sessions.push(session);
        sum += batches * TENANTS as u64;
    }
    Ok(sum)
}

/// Decodes so many messages and adds up what they say; nanoseconds a row.
fn floor(messages: &[Bytes], count: usize, sums: &mut [(Outcomes, Histogram)]) -> anyhow::Result<f64> {
    let begun = thread_ns();
    for message in messages.iter().cycle().take(count) {
        let decoded = AgentMessage::decode(message.clone())?;
        let Some(agent_message::Kind::Batch(batch)) = decoded.kind else {
            continue;
        };
        for row in &batch.rows {
            let (outcomes, latency) = &mut sums[row.tenant as usize];
            outcomes.add(&Outcomes::from_row(row));
            if let Some(wire) = &row.latency {
                latency.merge_wire(wire)?;
            }
        }
    }
    Ok((thread_ns() - begun) / (count * TENANTS) as f64)
}

/// How many buckets of a row are not empty.
fn buckets(made: &[Made]) -> f64 {
    let rows = made.iter().flat_map(|window| &window.rows);
    let full = rows.filter_map(|row| {
        let latency = Histogram::from_wire(row.latency.as_ref()?).ok()?;
        Some(latency.buckets().count())
    });
    full.sum::<usize>() as f64 / (WINDOWS * TENANTS) as f64
}

impl Made {
    fn new(traffic: &mut Traffic) -> Self {
        let mut sums = Totals::default();
        let mut rows = Vec::with_capacity(TENANTS);
        for tenant in 0..TENANTS {
            let (mut latency, mut over) = (Histogram::new(), 0);
            let count = traffic.count(REQUESTS);
            let ended = traffic.requests(count, |ns| {
                latency.record(ns);
                over += u64::from(ns > LIMIT_US * 1_000);
            });
            sums.requests += count;
            sums.errors += ended.failed;
            rows.push(TenantRow {
                tenant: tenant as u32,
                success: ended.ok,
                server_error: ended.failed,
                latency: Some(latency.to_wire()),
                limit_us: LIMIT_US,
                over_limit: over,
                ..TenantRow::default()
            });
        }
        Self { rows, sums }
    }

    /// The window as it travels.
    fn message(&self) -> Bytes {
        let batch = WindowBatch {
            seq: 1_000,
            start_unix_ms: 1_700_000_000_000,
            length_ms: 1_000,
            rows: self.rows.clone(),
            cumulative: Some(self.sums),
            ..WindowBatch::default()
        };
        let kind = Some(agent_message::Kind::Batch(batch));
        Bytes::from(AgentMessage { kind }.encode_to_vec())
    }
}
