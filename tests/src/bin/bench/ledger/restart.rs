//! Reading it all again: the log and the store by their length, before and after a roll-up.
//!
//! What was written just now is still in the system's memory, so no disk is read.

use std::{
    collections::BTreeMap,
    fs,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use coalmine_aggregator::{
    book::{Book, Patience},
    ingest::Rebuild,
    ledger::{Ledger, Options},
    metrics::Metrics,
    store::{self, Entry, Store},
};
use coalmine_judge::chain::Hash;
use coalmine_proto::v1::Bye;
use tokio::time::Instant;

use super::{
    agents::{Agent, Filler, Made, START_MS},
    pool::Pool,
    space::Size,
    stock::Stock,
};
use crate::{
    Plan,
    aggregator::SERVICE,
    report::{Budget, Report, Spread, Table},
};

/// Records that are on their way into the log.
const AHEAD: u64 = 1_024;

/// A log or store that is longer than this is read once only.
const LONG: u64 = 20_000;

/// How often those that are shorter are read, and how often the book's image is taken.
const TIMES: usize = 3;

/// What the design allows after a crash, with so many windows stored.
const BUDGET_MS: f64 = 5_000.0;
const WINDOWS: u64 = 100_000;

/// Length of a slot of the book.
const SLOT_MS: u32 = 10_000;

/// Agents that have stored windows.
#[derive(Debug, Clone, Copy)]
struct Fleet {
    agents: usize,
    tenants: usize,
    /// Rows of a window, and requests of a typical tenant in it.
    rows: usize,
    requests: f64,
    window_ms: u32,
    windows: u64,
}

/// What one length gave.
#[derive(Debug)]
struct Read {
    what: String,
    /// What was read: records or windows, and their bytes.
    count: u64,
    bytes: u64,
    floor_ms: Vec<f64>,
    read_ms: Vec<f64>,
    budget: Budget,
}

/// What a roll-up gave.
#[derive(Debug)]
struct RolledUp {
    before: u64,
    after: u64,
    /// For taking the image, while the book is locked.
    image_ms: Vec<f64>,
    /// Until it is on disk, the image included.
    durable_ms: f64,
    /// For reading it again.
    read_ms: Vec<f64>,
}

pub(super) async fn measure(
    plan: Plan,
    directory: &Path,
    pool: &Pool,
    stock: &Arc<Stock>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let stored = if plan.quick { WINDOWS / 20 } else { WINDOWS };
    let small = Fleet {
        agents: 100,
        tenants: 500,
        rows: 20,
        requests: 12.0,
        window_ms: 1_000,
        windows: stored,
    };
    let large = Fleet {
        agents: 2,
        tenants: 10_000,
        rows: 10_000,
        requests: 100.0,
        window_ms: SLOT_MS,
        windows: 14,
    };
    report.note(&format!(
        "\nReading again, by one thread. The floor of the log reads its lines and hashes each (SHA-256); \
         that of the store\nreads its frames and decodes them. A window has {} rows of {} tenants.",
        small.rows, small.tenants
    ));
    let mut reads = Vec::new();
    let lengths: &[u64] = if plan.quick {
        &[1_000]
    } else {
        &[1_000, 10_000, 100_000]
    };
    for length in lengths {
        let (data, stock, length) = (directory.join("restart"), Arc::clone(stock), *length);
        reads.push(pool.aside(move || decisions(&data, &stock, length)).await?);
    }
    let mut rolled_up = Vec::new();
    for (name, fleet) in [("windows-small", small), ("windows-large", large)] {
        if plan.quick && fleet.tenants > small.tenants {
            continue;
        }
        let data = directory.join(name);
        let (read, rolled) = pool.aside(move || windows(data, fleet)).await?;
        reads.push(read);
        rolled_up.push((fleet, rolled));
    }
    print_reads(&reads, report);
    report.note("");
    print_roll_ups(&rolled_up);
    Ok(())
}

fn print_reads(reads: &[Read], report: &mut Report) {
    let mut table = Table::new([
        "",
        "ms median (min-max)",
        "floor, ms",
        "of the floor",
        "us each",
        "MB",
        "budget",
        "",
    ]);
    for read in reads {
        let spread = Spread::of(read.read_ms.iter().copied());
        let held = report.held(&read.what, spread.median, read.budget, 0);
        let cells = [
            read.what.clone(),
            spread.cell(0),
            Spread::of(read.floor_ms.iter().copied()).cell(0),
            Spread::of_ratios(&read.read_ms, &read.floor_ms).cell(1),
            format!("{:.1}", spread.median * 1e3 / read.count.max(1) as f64),
            format!("{:.1}", read.bytes as f64 / 1e6),
        ];
        table.row(cells.into_iter().chain(held));
    }
    table.print();
}

fn print_roll_ups(all: &[(Fleet, RolledUp)]) {
    let mut table = Table::new([
        "roll-up",
        "MB before",
        "MB after",
        "image, book locked, ms",
        "on disk after, ms",
        "read again, ms",
    ]);
    for (fleet, rolled) in all {
        let mb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e6);
        table.row([
            format!("{} windows of {} tenants", fleet.windows, fleet.tenants),
            mb(rolled.before),
            mb(rolled.after),
            Spread::of(rolled.image_ms.iter().copied()).cell(1),
            format!("{:.1}", rolled.durable_ms),
            Spread::of(rolled.read_ms.iter().copied()).cell(1),
        ]);
    }
    table.print();
}

/// Makes a log so long, and opens it again.
fn decisions(data: &Path, stock: &Stock, length: u64) -> anyhow::Result<Read> {
    fs::create_dir_all(data)?;
    let opened = open(data)?;
    opened.ledger.begin();
    let mut missing = length.saturating_sub(opened.records);
    while missing > 0 {
        let group = missing.min(AHEAD);
        let submitted: Vec<_> = (0..group)
            .map(|_| opened.ledger.submit(stock.alone(), Vec::new()))
            .collect();
        for answer in submitted {
            answer.blocking_recv().context("the log has stopped")??;
        }
        missing -= group;
    }
    opened.ledger.stop().blocking_recv().ok();

    let mut read = Read {
        what: format!("log of {length} records: Ledger::open"),
        count: length,
        bytes: 0,
        floor_ms: Vec::new(),
        read_ms: Vec::new(),
        budget: Budget::None,
    };
    for _ in 0..times(length) {
        let begun = Instant::now();
        read.bytes = hash_lines(data)?;
        read.floor_ms.push(ms(begun));
        let begun = Instant::now();
        let opened = open(data)?;
        read.read_ms.push(ms(begun));
        ensure!(opened.records >= length, "{} records are read", opened.records);
        opened.ledger.stop().blocking_recv().ok();
    }
    Ok(read)
}

fn open(data: &Path) -> anyhow::Result<coalmine_aggregator::ledger::Opened> {
    let metrics = Arc::new(Metrics::new());
    Ok(Ledger::open(data, Options::default(), metrics, |_, _| {})?)
}

/// Reads all segments and hashes their lines; gives their length.
fn hash_lines(data: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(data)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let text = fs::read(path)?;
            bytes += text.len() as u64;
            for line in text.split(|byte| *byte == b'\n') {
                black_box(Hash::leaf(line));
            }
        }
    }
    Ok(bytes)
}

/// Stores the windows of a fleet, reads them into a book, and rolls that up.
fn windows(data: PathBuf, fleet: Fleet) -> anyhow::Result<(Read, RolledUp)> {
    let log = data.join("windows");
    fill(&data, fleet)?;
    let mut read = Read {
        what: format!(
            "{} windows of {} rows: Store::open into a book",
            fleet.windows, fleet.rows
        ),
        count: fleet.windows,
        bytes: Size::of(&log)?.bytes,
        floor_ms: Vec::new(),
        read_ms: Vec::new(),
        budget: match fleet.windows {
            WINDOWS => Budget::AtMost(BUDGET_MS),
            _ => Budget::None,
        },
    };
    let mut kept = None;
    for _ in 0..times(fleet.windows) {
        // The writer ends with the store.
        drop(kept.take());
        let begun = Instant::now();
        let entries = decode(&log)?;
        read.floor_ms.push(ms(begun));
        ensure!(entries > fleet.windows, "{entries} entries are stored");
        let (store, book, took_ms) = rebuild(&data, fleet)?;
        read.read_ms.push(took_ms);
        kept = Some((store, book));
    }
    let (store, book) = kept.context("nothing was read")?;

    let mut rolled = RolledUp {
        before: read.bytes,
        after: 0,
        image_ms: Vec::new(),
        durable_ms: 0.0,
        read_ms: Vec::new(),
    };
    for _ in 0..TIMES {
        let begun = Instant::now();
        black_box(book.image());
        rolled.image_ms.push(ms(begun));
    }
    let begun = Instant::now();
    store.roll_up(book.image());
    let mut filler = Filler::new(store);
    // What comes after the roll-up is durable after it. There is no session 0, so it changes nothing.
    filler.put(Entry::Bye(0, Bye::default()))?;
    filler.flush()?;
    rolled.durable_ms = ms(begun);
    drop(filler);
    rolled.after = Size::of(&log)?.bytes;
    for _ in 0..TIMES {
        let (_, _, took_ms) = rebuild(&data, fleet)?;
        rolled.read_ms.push(took_ms);
    }
    Ok((read, rolled))
}

fn fill(data: &Path, fleet: Fleet) -> anyhow::Result<()> {
    let made = Made::several(
        if fleet.rows > 1_000 { 4 } else { 64 },
        fleet.rows,
        fleet.requests,
    );
    let mut agents = Agent::several(fleet.agents, fleet.tenants, fleet.window_ms, &made);
    let mut filler = Filler::new(Store::open(data, u64::MAX, |_| {})?);
    for agent in &agents {
        filler.put(agent.hello())?;
    }
    for number in 0..fleet.windows {
        let agent = number as usize % fleet.agents;
        filler.put(agents[agent].batch())?;
    }
    filler.flush()
}

/// Reads what is stored into a book, as after a crash in the moment in which the last window ended; nobody waits for a
/// window that is older than the book keeps them.
fn rebuild(data: &Path, fleet: Fleet) -> anyhow::Result<(Store, Book, f64)> {
    let windows = fleet.windows.div_ceil(fleet.agents as u64);
    let now_ms = START_MS + windows * u64::from(fleet.window_ms);
    let mut book = Book::new(Patience::default(), now_ms);
    book.set_slot(SERVICE, u64::from(SLOT_MS));
    book.keep_only(now_ms, &BTreeMap::new());
    let mut rebuild = Rebuild::default();
    let begun = Instant::now();
    let store = Store::open(data, u64::MAX, |entry| rebuild.take(&mut book, entry, now_ms))?;
    let took_ms = ms(begun);
    ensure!(
        rebuild.refused == 0,
        "{} stored entries do not apply",
        rebuild.refused
    );
    let totals = book.get(SERVICE).map(|service| service.received().0);
    ensure!(
        totals == Some(fleet.windows),
        "{totals:?} windows are in the book, and {} were stored",
        fleet.windows
    );
    Ok((store, book, took_ms))
}

/// Reads and decodes all that is stored; gives how many entries there are.
fn decode(log: &Path) -> anyhow::Result<u64> {
    let mut entries = 0;
    for file in fs::read_dir(log)? {
        let frames = fs::read(file?.path())?;
        let read = store::entries(&frames, |entry| {
            black_box(entry);
            entries += 1;
        });
        read.map_err(anyhow::Error::msg)?;
    }
    Ok(entries)
}

fn times(length: u64) -> usize {
    if length > LONG { 1 } else { TIMES }
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}
