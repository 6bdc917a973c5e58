//! Windows into the store, as files.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use coalmine_aggregator::store::Store;
use prost::Message as _;
use tokio::sync::oneshot;

use super::{
    agents::{Agent, Made},
    callers::{Floor, Lane},
    pool::Pool,
    rounds,
    space::Size,
};
use crate::{
    Plan,
    report::{Report, Spread, Table},
};

const AGENTS: usize = 8;
const TENANTS: usize = 500;

/// Requests of a typical tenant in a window.
const REQUESTS: f64 = 100.0;

const WINDOW_MS: u32 = 10_000;

/// Windows of an agent that are on their way: one, and as many as an agent may send ahead.
const AHEAD: [usize; 2] = [1, 8];

pub(super) async fn measure(
    plan: Plan,
    directory: &Path,
    pool: &Pool,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (rounds, slice) = rounds(plan);
    let made = Made::several(16, TENANTS, REQUESTS);
    let mut agents = Agent::several(AGENTS, TENANTS, WINDOW_MS, &made);
    // The first has the names.
    let frame = agents.first_mut().map(|agent| (agent.window(), agent.window()).1);
    let frame = frame.context("there is no agent")?.encode_to_vec();
    report.note(&format!(
        "\nWindows into the store, {rounds} rounds of {} ms: {AGENTS} agents, {TENANTS} rows and {:.0} KiB a window.\n\
         The floor writes the same bytes, with an fdatasync for each window.",
        slice.as_millis(),
        frame.len() as f64 / 1024.0
    ));
    let data = directory.join("windows");
    let opening = data.clone();
    let store = pool
        .aside(move || Ok(Store::open(&opening, u64::MAX, |_| {})?))
        .await?;
    let agents: Arc<Vec<_>> = Arc::new(agents.into_iter().map(Mutex::new).collect());
    let append = move |caller: usize| {
        let agent = agents[caller % AGENTS].lock();
        let entry = agent.unwrap_or_else(PoisonError::into_inner).batch();
        let (store, (tell, told)) = (store.clone(), oneshot::channel());
        async move {
            store.append(entry, move || {
                // Whoever waits may have given up.
                tell.send(()).ok();
            });
            told.await.context("the store has stopped")
        }
    };

    let written = Floor::new(&directory.join("floor-windows"), &frame)?;
    let (mut floor, mut lanes) = (Lane::default(), AHEAD.map(|_| Lane::default()));
    for _ in 0..rounds {
        let written = written.clone();
        let write = move |_| written.clone().append();
        floor.round(pool, AGENTS, slice, write).await?;
        for (lane, ahead) in lanes.iter_mut().zip(AHEAD) {
            lane.round(pool, AGENTS * ahead, slice, append.clone()).await?;
        }
    }

    let windows = lanes.iter().map(|lane| lane.appended).sum::<u64>();
    let bytes = Size::of(&data.join("windows"))?.bytes as f64 / windows.max(1) as f64;
    let mut table = Table::new([
        "",
        "windows/s median (min-max)",
        "of the floor",
        "p50 ms",
        "p99 ms",
        "M rows/s",
        "MB/s",
    ]);
    let store = AHEAD.map(|ahead| format!("store, {ahead} on the way from each agent"));
    let all = lanes.iter().zip(store);
    for (lane, what) in [(&floor, "floor".to_owned())].into_iter().chain(all) {
        let rate = Spread::of(lane.rates.iter().copied()).median;
        let mut row = vec![what];
        row.extend(lane.cells(&floor));
        row.push(format!("{:.2}", rate * TENANTS as f64 / 1e6));
        row.push(format!("{:.0}", rate * bytes / 1e6));
        table.row(row);
    }
    table.print();
    Ok(())
}
