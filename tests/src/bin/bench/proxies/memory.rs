//! Resident memory: idle, with open connections, after load, and what a tenant takes in the agent.

use std::{path::Path, time::Duration};

use tokio::time::sleep;

use super::{CONNECTIONS, KIB, Ratios, stage::Stage};
use crate::{
    Plan,
    agent::Agent,
    cpu::resident_bytes,
    load::{Load, Shape, shape},
    report::{Budget, Report, Spread, Table},
};

/// Connections that are open at once.
const OPEN: usize = 1_000;

/// How long a process is given to notice that its connections are closed.
const CLOSED_WITHIN: Duration = Duration::from_millis(500);

/// Tenants of the two runs that are compared.
const FEW: usize = 10;
const MANY: usize = 10_000;

/// Long enough for at least one whole window of a second.
const WINDOWS: Duration = Duration::from_millis(2_500);

const MIB: f64 = (KIB * KIB) as f64;

/// Gives how many requests went through the agent.
pub(super) async fn measure(
    plan: Plan,
    stage: &Stage,
    ratios: &mut Ratios,
    report: &mut Report,
) -> anyhow::Result<u64> {
    let connections = format!("{OPEN} connections");
    let mut table = Table::new([
        "Resident MiB",
        "idle",
        &connections,
        "KiB a connection",
        "after 64 KiB load",
        "after close",
    ]);
    let mut through_agent = 0;
    for way in &stage.ways {
        let Some(pid) = way.pid else { continue };
        let idle = resident_bytes(pid)?;
        let mut load = Load::open(way.address, shape(OPEN, KIB)).await?;
        let mut requests = load.once().await?;
        let open = resident_bytes(pid)?;
        load.ask_for(64 * KIB);
        requests += load.run(plan.slice).await?.requests;
        let loaded = resident_bytes(pid)?;
        drop(load);
        sleep(CLOSED_WITHIN).await;
        let closed = resident_bytes(pid)?;

        let each = (open - idle) / OPEN as f64 / KIB as f64;
        let mib = |bytes: f64| format!("{:.1}", bytes / MIB);
        table.row([
            way.name.to_owned(),
            mib(idle),
            mib(open),
            format!("{each:.2}"),
            mib(loaded),
            mib(closed),
        ]);
        if way.name == "agent" {
            through_agent = requests;
            let what = "agent, idle with its session, resident MiB";
            ratios.row(what, Spread::of([idle / MIB]), Budget::AtMost(8.0), report);
            let what = "agent, resident KiB for each open connection";
            ratios.row(what, Spread::of([each]), Budget::AtMost(2.0), report);
        }
    }
    report.note(&format!(
        "\nMemory: once. Each connection has asked once for 1 KiB; the load asks for 64 KiB on all of them for {} ms. \
         nginx\nand HAProxy keep fewer connections to the application where clients are idle.",
        plan.slice.as_millis()
    ));
    table.print();
    Ok(through_agent)
}

/// What a known tenant takes: an agent with many of them in its windows, beside the same agent with few.
pub(super) async fn tenants(
    plan: Plan,
    directory: &Path,
    stage: &Stage,
    ratios: &mut Ratios,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (upstream, aggregator) = (stage.upstream.address, stage.aggregator.grpc);
    let agent = Agent::start("agent-tenants", plan.cores.proxy, directory, upstream, aggregator).await?;
    let (few, _) = resident_with(&agent, FEW).await?;
    let (many, settled) = resident_with(&agent, MANY).await?;
    let each = |bytes: f64| (bytes - few) / (MANY - FEW) as f64 / KIB as f64;
    let what = format!("agent, resident KiB for a known tenant, {MANY} of them");
    ratios.row(&what, Spread::of([each(many)]), Budget::AtMost(2.0), report);
    report.note(&format!(
        "\nTenants: the agent has {:.1} MiB with {FEW} of them in its windows, {:.1} MiB with {MANY}, \
         and {:.1} MiB when all windows\nhave been sent: {:.2} and {:.2} KiB for each.",
        few / MIB,
        many / MIB,
        settled / MIB,
        each(many),
        each(settled),
    ));
    Ok(())
}

/// Resident memory under load of so many tenants, and when all windows have been sent.
async fn resident_with(agent: &Agent, tenants: usize) -> anyhow::Result<(f64, f64)> {
    let shape = Shape {
        tenants,
        ..shape(CONNECTIONS, KIB)
    };
    let mut load = Load::open(agent.address, shape).await?;
    load.run(WINDOWS).await?;
    let loaded = resident_bytes(agent.pid())?;
    agent.knows_tenants(tenants).await?;
    Ok((loaded, resident_bytes(agent.pid())?))
}
