//! What no judge can do: how many canary requests a fault needs before anyone could be sure of it.
//!
//! A sequential test that is wrong with probability `a` needs `ln(1/a) / D` requests on average at least (Wald 1945),
//! where `D` is what a request tells, in nats. `a` is what the judge grants one metric of one tenant.

use std::collections::BTreeMap;

use coalmine_judge::{
    evidence::{ArmCounts, Latency, OverSla, TenantWindow},
    policy::Policy,
};
use coalmine_proto::histogram::Histogram;

use super::{
    judged::{self, Judged, Tolerance},
    model::{LATENCY_SIGMA, LIMIT_OVER_P99, World},
    random::inverse_normal,
    statistics::{nats_above, nats_of_shift, nats_over_baseline, normal_above},
};
use crate::report::{Report, Table};

/// A healthy tenant's error rate.
const HEALTHY: f64 = 0.001;

/// How much longer the p99 is.
const LONGER: f64 = 0.2;

/// Ranks in the table.
const RANKS: [usize; 10] = [1, 2, 5, 10, 25, 50, 100, 200, 300, 500];

/// Windows of disaster that put all metrics of a tenant in doubt.
const DISASTER: u32 = 4;

/// Bits at which one tenant halts the rollout.
#[derive(Debug, Clone, Copy)]
struct Budgets {
    errors_live: f64,
    errors_sla: f64,
    /// None as long as the judge does not compare latencies with the baseline.
    latency_live: Option<f64>,
    latency_sla: f64,
}

/// A fault, and the canary requests that it needs.
struct Floor {
    name: String,
    requests: f64,
}

/// Prints the canary requests that faults need, and which tenants have them.
pub(super) fn print(world: &World, policy: &Policy, report: &mut Report) -> anyhow::Result<()> {
    report.title("Quality: what information allows");
    let Some(budgets) = budgets(world, policy)? else {
        report.note(
            "The judge names no budgets of a tenant that fails all requests, so that nothing can be said.",
        );
        return Ok(());
    };
    let Some(profile) = world.tenants.first() else {
        return Ok(());
    };
    let model = &world.model;
    let floors = floors(
        budgets,
        judged::tolerance(policy, &profile.name),
        model.baseline_share / model.canary_weight,
    );
    report.note(&format!(
        "Fewest canary requests (Wald) for a tenant's share of alpha: 2^-{:.1} for errors, 2^-{:.1} for latency{}.\n\
         Below, the seconds in which a tenant's canary gets them, or what it lacks in {} windows of {} s.",
        budgets.errors_live.min(budgets.errors_sla),
        budgets.latency_live.unwrap_or(budgets.latency_sla),
        if budgets.latency_live.is_none() { " (that of the SLA: this judge has no latency/live)" } else { "" },
        model.windows,
        model.window_seconds,
    ));
    let mut needs = Table::new(["fault", "requests needed", "last rank that gets them in time"]);
    let time = f64::from(model.windows) * f64::from(model.window_seconds);
    for floor in &floors {
        let reached = world
            .tenants
            .iter()
            .rposition(|tenant| tenant.rate * model.canary_weight * time >= floor.requests);
        needs.row([
            floor.name.clone(),
            count(floor.requests),
            reached.map_or("none".to_owned(), |at| (at + 1).to_string()),
        ]);
    }
    report.note("");
    needs.print();
    // An empty line, then the heads: there are as many as faults.
    let mut table = Table::new([]);
    let heads = floors.iter().map(|floor| floor.name.clone());
    table.row(["rank".to_owned(), "gets".to_owned()].into_iter().chain(heads));
    let ranks = RANKS
        .iter()
        .filter_map(|rank| Some((rank, world.tenants.get(rank - 1)?)));
    for (rank, tenant) in ranks {
        let rate = tenant.rate * model.canary_weight;
        let gets = rate * time;
        let cells = floors.iter().map(|floor| {
            if floor.requests <= gets {
                format!("{:.0} s", floor.requests / rate)
            } else {
                format!("cannot: needs {}", count(floor.requests))
            }
        });
        table.row([rank.to_string(), count(gets)].into_iter().chain(cells));
    }
    table.print();
    Ok(())
}

fn floors(budgets: Budgets, tolerance: Tolerance, baseline: f64) -> Vec<Floor> {
    let nats = |bits: f64| bits * f64::ln(2.0);
    let mut floors = Vec::new();
    for rate in [0.15, 0.03, 0.02] {
        let tolerated = |p: f64| tolerance.max_ratio * p + tolerance.max_increase;
        let live = nats(budgets.errors_live) / nats_over_baseline(rate, HEALTHY, baseline, tolerated);
        let sla = nats(budgets.errors_sla) / nats_above(rate, tolerance.max_rate);
        floors.push(Floor {
            name: format!("{:.0} % errors", 100.0 * rate),
            requests: live.min(sla),
        });
    }
    let live = nats(budgets.latency_live.unwrap_or(budgets.latency_sla));
    let sla = nats(budgets.latency_sla);
    // Requests above the limit, where the limit is still kept: none tell anything.
    let z99 = inverse_normal(0.99);
    let above = |factor: f64| normal_above(z99 + factor.ln() / LATENCY_SIGMA);
    let limit = nats_above(above(LIMIT_OVER_P99 / (1.0 + LONGER)), 0.01);
    for (name, margin) in [
        ("+20 % p99, no margin", 0.0),
        ("+20 % p99, margin", tolerance.margin),
    ] {
        let longer = (1.0 + LONGER) / (1.0 + margin);
        let whole = nats_of_shift(longer.ln() / LATENCY_SIGMA, baseline);
        let tail = nats_over_baseline(above(1.0 / longer), 0.01, baseline, |p| p);
        floors.push(Floor {
            name: name.to_owned(),
            requests: (live / whole).min(sla / limit),
        });
        floors.push(Floor {
            name: format!("{name}, above p99 only"),
            requests: (live / tail).min(sla / limit),
        });
    }
    floors
}

/// Reads the budgets of a tenant off the judge, by breaking it.
fn budgets(world: &World, policy: &Policy) -> anyhow::Result<Option<Budgets>> {
    let model = &world.model;
    let mut traffic = world.begin([0; 3]);
    let mut judge = Judged::begin(policy, None, model.windows)?;
    judge.step(&judged::window(
        1,
        model.window_seconds,
        traffic.window(1, 0..world.tenants.len()),
    ))?;
    let Some(profile) = world.tenants.first() else {
        return Ok(None);
    };
    let mut read = BTreeMap::new();
    for number in 2..2 + DISASTER {
        let limit_us = judged::limit_us(policy, &profile.name);
        let row = TenantWindow {
            tenant: profile.name.clone(),
            canary: counts(1_000, limit_us, true),
            baseline: counts(9_000, limit_us, false),
        };
        let window = judged::window(number, model.window_seconds, vec![row]);
        read.extend(judge.budgets(&window, &profile.name)?);
    }
    let bits = |metric: &str| read.get(metric).copied();
    let (Some(errors_live), Some(errors_sla)) = (bits("errors/live"), bits("errors/sla")) else {
        return Ok(None);
    };
    Ok(Some(Budgets {
        errors_live,
        errors_sla,
        latency_live: bits("latency/live"),
        latency_sla: bits("latency/sla").unwrap_or(f64::INFINITY),
    }))
}

/// An arm on which all goes wrong or nothing does.
fn counts(requests: u64, limit_us: Option<u64>, broken: bool) -> ArmCounts {
    let mut histogram = Histogram::new();
    let ns = limit_us.unwrap_or(100_000) * if broken { 2_000 } else { 500 };
    (0..requests).for_each(|_| histogram.record(ns));
    let over = if broken { requests } else { 0 };
    ArmCounts {
        requests,
        errors: over,
        latency: Some(Latency {
            histogram,
            over_sla: limit_us.map(|limit_us| OverSla {
                limit_us,
                count: over,
            }),
        }),
        ..ArmCounts::default()
    }
}

fn count(requests: f64) -> String {
    if requests.is_finite() {
        format!("{:.0}", requests.ceil())
    } else {
        "infinitely many".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_are_what_a_hand_finds() {
        let bits = 50_000_f64.log2();
        let budgets = Budgets {
            errors_live: f64::INFINITY,
            errors_sla: bits,
            latency_live: Some(bits),
            latency_sla: bits,
        };
        let tolerance = Tolerance {
            max_rate: 0.01,
            max_ratio: 1.25,
            max_increase: 0.001,
            margin: 0.1,
        };
        let floors = floors(budgets, tolerance, 9.0);
        // ln 50000 = 10.82 nats, over 0.2767 nats a request.
        assert!((floors[0].requests - 39.1).abs() < 0.1, "{}", floors[0].requests);
        // (ln 1.2 / 0.8)^2 / 2 * 0.9 = 0.02337 nats.
        assert!((floors[3].requests - 463.0).abs() < 1.0, "{}", floors[3].requests);
        // 4140 if the p99 were known; it is not, so it is somewhat more.
        assert!(
            (4_140.0..5_000.0).contains(&floors[4].requests),
            "{}",
            floors[4].requests
        );
    }
}
