//! As many requests as go through: CPU for each, and how many.

use std::time::Duration;

use super::{
    CONNECTIONS, KIB, Ratios, WARM_UP,
    rounds::{self, Rounds, compare_cpu, find, through_agent},
    stage::Stage,
    turns,
};
use crate::{
    Plan,
    load::{Load, Shape, shape},
    report::{Budget, Report, Spread},
};

/// Other numbers of connections.
const OTHER_CONNECTIONS: [usize; 2] = [1, 256];

/// The slices in which CPU is divided between user space and kernel are so many times longer.
const LONGER: u32 = 5;

/// A way with its clients.
struct Target<'s> {
    rounds: Rounds<'s>,
    load: Load,
}

/// Gives how many requests went through the agent.
pub(super) async fn measure(
    plan: Plan,
    stage: &Stage,
    ratios: &mut Ratios,
    report: &mut Report,
) -> anyhow::Result<u64> {
    report.note(&format!(
        "\nSaturated: closed loop. Upstream and clients share a core and saturate first, so compare CPU rather than \
         requests/s.\nUser space and kernel are divided as the kernel's ticks fell, at 1 KiB and {CONNECTIONS} \
         connections also in a slice of {} s of agent and relay.",
        (plan.slice * LONGER).as_secs_f64()
    ));
    let mut sent = 0;
    let usual = measured(plan, stage, shape(CONNECTIONS, KIB), plan.slice, report).await?;
    compare_small(&usual, ratios, report);
    sent += through_agent(&usual);
    for connections in OTHER_CONNECTIONS {
        let shape = shape(connections, KIB);
        let other = measured(plan, stage, shape, plan.slice / 2, report).await?;
        compare_cpu(&other, &what_of(shape), [Budget::None; 3], ratios, report);
        sent += through_agent(&other);
    }
    let large = measured(plan, stage, shape(CONNECTIONS, 64 * KIB), plan.slice / 2, report).await?;
    compare_large(&large, ratios, report);
    sent += through_agent(&large);
    Ok(sent)
}

/// Measures all ways with clients of this shape, and prints what each gave.
async fn measured<'s>(
    plan: Plan,
    stage: &'s Stage,
    shape: Shape,
    slice: Duration,
    report: &Report,
) -> anyhow::Result<Vec<Rounds<'s>>> {
    let mut targets = Vec::new();
    for way in &stage.ways {
        let mut target = Target {
            rounds: Rounds::new(way),
            load: Load::open(way.address, shape).await?,
        };
        target.rounds.watch(target.load.run(WARM_UP.min(slice))).await?;
        targets.push(target);
    }
    for next in turns(plan.rounds, targets.len()) {
        let target = &mut targets[next];
        target.rounds.take(target.load.run(slice)).await?;
    }
    if (shape.connections, shape.answer_bytes) == (CONNECTIONS, KIB) {
        let divided = targets.iter_mut();
        for target in divided.filter(|target| matches!(target.rounds.way.name, "agent" | "relay")) {
            target.rounds.watch(target.load.run(plan.slice * LONGER)).await?;
        }
    }
    let all: Vec<_> = targets.into_iter().map(|target| target.rounds).collect();
    report.note("");
    rounds::print(&format!("{}, {} ms", what_of(shape), slice.as_millis()), &all);
    Ok(all)
}

fn compare_small(all: &[Rounds<'_>], ratios: &mut Ratios, report: &mut Report) {
    let what = what_of(shape(CONNECTIONS, KIB));
    let budgets = [1.10, 0.75, 0.75].map(Budget::AtMost);
    compare_cpu(all, &what, budgets, ratios, report);
    let Some(agent) = find(all, "agent") else { return };
    let user = "agent, user-space CPU per request, us, 1 KiB";
    ratios.row(user, agent.user_us(), Budget::AtMost(1.5), report);
    if let Some(relay) = find(all, "relay") {
        let ratio = agent.user_us().median / relay.user_us().median;
        let user = "agent/relay, user-space CPU per request, 1 KiB";
        ratios.row(user, Spread::of([ratio]), Budget::None, report);
    }
    for name in ["relay", "nginx", "haproxy"] {
        let Some(other) = find(all, name) else { continue };
        let spread = Spread::of_ratios(&agent.rates, &other.rates);
        let what = format!("agent/{name}, requests/s, {what}");
        ratios.row(&what, spread, Budget::None, report);
    }
}

fn compare_large(all: &[Rounds<'_>], ratios: &mut Ratios, report: &mut Report) {
    let Some(agent) = find(all, "agent") else { return };
    let peers: Vec<_> = ["nginx", "haproxy"]
        .into_iter()
        .filter_map(|name| find(all, name))
        .collect();
    let best = |round: usize| {
        let cpu_us = peers.iter().filter_map(|peer| peer.cpu_us.get(round));
        cpu_us.copied().fold(f64::INFINITY, f64::min)
    };
    if !peers.is_empty() {
        let best: Vec<f64> = (0..agent.cpu_us.len()).map(best).collect();
        let what = "agent/better of nginx and haproxy, CPU per request, 64 KiB";
        let spread = Spread::of_ratios(&agent.cpu_us, &best);
        ratios.row(what, spread, Budget::AtMost(0.55), report);
    }
    if let Some(relay) = find(all, "relay") {
        let what = "agent/relay, CPU per request, 64 KiB";
        let spread = Spread::of_ratios(&agent.cpu_us, &relay.cpu_us);
        ratios.row(what, spread, Budget::None, report);
    }
}

fn what_of(shape: Shape) -> String {
    let kib = shape.answer_bytes / KIB;
    match shape.connections {
        1 => format!("{kib} KiB, 1 connection"),
        connections => format!("{kib} KiB, {connections} connections"),
    }
}
