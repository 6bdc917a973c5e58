//! The tables, and the goals beside them.

use super::{
    model::{Fault, Model},
    peers::Rule,
    rollouts::{Found, Results},
    statistics::{proportion, quantile},
};
use crate::report::{Budget, Report, Table};

/// A scenario in which nothing is wrong.
pub(super) struct Healthy {
    pub(super) name: String,
    /// What it changes in the model.
    pub(super) model: Box<dyn Fn(&mut Model)>,
    /// Most halts in 1000 rollouts.
    pub(super) most_of_1000: Option<u32>,
    /// Whether thresholds follow a history of earlier healthy rollouts.
    pub(super) learned: bool,
}

/// What is asked of a detection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Goal {
    MedianSeconds(f64),
    P95Seconds(f64),
    MedianRequests(f64),
    P95Requests(f64),
    /// Share that is detected at all.
    Detected(f64),
}

/// One row of a table of detection.
pub(super) struct Detection<'a> {
    pub(super) rank: usize,
    /// The faulty canary's requests a second.
    pub(super) canary_rate: f64,
    pub(super) goals: &'a [Goal],
    pub(super) results: Results,
}

/// How windows become seconds after the onset, and whether the whole fleet was simulated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    pub(super) seconds: f64,
    pub(super) onset: u32,
    pub(super) whole: bool,
}

/// Healthy rollouts: as they are, and under each stress.
pub(super) fn healthy_goals() -> Vec<Healthy> {
    type Change = Box<dyn Fn(&mut Model)>;
    let most = Some(3);
    let all: [(&str, Option<u32>, bool, Change); 11] = [
        (
            "plain, all of the rest is baseline",
            most,
            false,
            Box::new(|_| {}),
        ),
        (
            "plain, baseline of the canary's size",
            most,
            false,
            Box::new(|model| model.baseline_share = model.canary_weight),
        ),
        (
            "noise of error rates, CV 1",
            most,
            false,
            Box::new(|model| model.overdispersion = 1.0),
        ),
        (
            "arms' error rates differ, sd 20 %",
            most,
            false,
            Box::new(|model| model.error_difference = 0.2),
        ),
        (
            "arms' error rates differ, sd 30 %",
            most,
            false,
            Box::new(|model| model.error_difference = 0.3),
        ),
        (
            "a pod fails for a window, 0.05 %",
            most,
            false,
            Box::new(|model| model.bursts = 0.000_5),
        ),
        (
            "a pod fails for a window, 0.2 %",
            most,
            false,
            Box::new(|model| model.bursts = 0.002),
        ),
        (
            "arms' latencies differ, sd 3 %",
            most,
            false,
            Box::new(|model| model.latency_difference = 0.03),
        ),
        (
            "arms' latencies differ, sd 5 %",
            None,
            false,
            Box::new(|model| model.latency_difference = 0.05),
        ),
        (
            "the same, margin from history",
            most,
            true,
            Box::new(|model| model.latency_difference = 0.05),
        ),
        (
            "weight 5 to 50 %, errors 0.1 to 0.5 %",
            most,
            false,
            Box::new(|model| model.steps = true),
        ),
    ];
    let scenario = |(name, most_of_1000, learned, model): (&str, Option<u32>, bool, Change)| Healthy {
        name: name.to_owned(),
        model,
        most_of_1000,
        learned,
    };
    all.map(scenario).into_iter().collect()
}

/// 15 % errors from the start, by rank.
pub(super) fn error_goals() -> Vec<(usize, Vec<Goal>)> {
    let few_requests = || vec![Goal::MedianRequests(65.0), Goal::P95Requests(120.0)];
    let mut smallest = few_requests();
    smallest.push(Goal::Detected(0.9));
    vec![
        (1, vec![Goal::P95Seconds(50.0)]),
        (10, vec![Goal::P95Seconds(50.0)]),
        (50, few_requests()),
        (100, few_requests()),
        (200, few_requests()),
        (500, smallest),
    ]
}

/// 15 % errors that begin late, by rank.
pub(super) fn late_error_goals() -> Vec<(usize, Vec<Goal>)> {
    [1, 10]
        .map(|rank| (rank, vec![Goal::MedianSeconds(60.0)]))
        .to_vec()
}

/// 20 % longer latencies, by rank; `strict` is without a margin.
pub(super) fn latency_goals(strict: bool) -> Vec<(usize, Vec<Goal>)> {
    let goal = |rank| match (strict, rank) {
        (false, 1) => vec![Goal::P95Seconds(350.0)],
        (true, 1) => vec![Goal::P95Seconds(120.0)],
        (true, 10) => vec![Goal::P95Seconds(600.0)],
        _ => Vec::new(),
    };
    [1, 2, 5, 10].map(|rank| (rank, goal(rank))).to_vec()
}

/// Prints what became of the healthy rollouts: before the judge, and before its peers.
pub(super) fn print_healthy(
    scenarios: &[Healthy],
    results: &[Results],
    window_seconds: u32,
    report: &mut Report,
) {
    let mut ours = Table::new([
        "A/A, this judge",
        "halted [95 %]",
        "goal",
        "",
        "approved at the end",
        "first APPROVE, median s",
        "halted by",
    ]);
    let mut peers = Table::new([
        "A/A, peers: halted [95 %]",
        "Flagger, errors",
        "Flagger, p99",
        "Flagger, fleet",
        "Kayenta, errors",
        "Kayenta, p99",
    ]);
    for (scenario, results) in scenarios.iter().zip(results) {
        let found = &results.found;
        let count = |is: fn(&Found) -> bool| found.iter().filter(|found| is(found)).count();
        let halted = count(|found| found.halted.is_some());
        let mut row = vec![scenario.name.clone(), proportion(halted, found.len())];
        let budget = match scenario.most_of_1000 {
            Some(most) => Budget::AtMost((most as usize * found.len() / 1_000) as f64),
            None => Budget::None,
        };
        row.extend(report.held(&format!("halts, {}", scenario.name), halted as f64, budget, 0));
        row.push(proportion(count(|found| found.approved_at_last), found.len()));
        let approved = found.iter().map(|found| found.approved);
        let seconds = approved.map(|at| at.map_or(f64::INFINITY, |at| f64::from(at * window_seconds)));
        row.push(number(quantile(&seconds.collect::<Vec<_>>(), 0.5)));
        row.push(halted_by(found));
        ours.row(row);

        let seen: Vec<_> = found.iter().filter_map(|found| found.peers).collect();
        let halts = Rule::ALL.map(|rule| {
            let halts = seen.iter().filter(|halts| halts.get(rule).is_some());
            proportion(halts.count(), seen.len())
        });
        let mut row = vec![scenario.name.clone()];
        row.extend(halts);
        peers.row(row);
    }
    report.note("");
    ours.print();
    report.note("");
    peers.print();
}

/// `3 x tenant errors/live, 1 x fleet errors/live`: what was in breach when rollouts were halted.
fn halted_by(found: &[Found]) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for kind in found
        .iter()
        .filter_map(|found| found.halted.as_ref())
        .flat_map(|(_, kinds)| kinds)
    {
        match kinds.iter_mut().find(|(known, _)| known == kind) {
            Some((_, times)) => *times += 1,
            None => kinds.push((kind, 1)),
        }
    }
    kinds.sort_by_key(|(kind, times)| (usize::MAX - times, *kind));
    let kinds: Vec<String> = kinds
        .iter()
        .map(|(kind, times)| format!("{times} x {kind}"))
        .collect();
    kinds.join(", ")
}

/// Prints how soon a faulty tenant was found.
pub(super) fn print_detection(
    name: &str,
    fault: Fault,
    timing: Timing,
    rows: &[Detection<'_>],
    report: &mut Report,
) {
    let [flagger, kayenta] = match fault {
        Fault::Errors(_) => [Rule::FlaggerErrors, Rule::KayentaErrors],
        Fault::Scale(_) | Fault::Tail(_) => [Rule::FlaggerP99, Rule::KayentaP99],
    };
    let mut table = Table::new([
        name,
        "canary rps",
        "s, median / p95",
        "requests, median / p95",
        "detected [95 %]",
        "any halt s",
        "Flagger s / requests",
        "Kayenta s / requests",
        "goals",
    ]);
    for row in rows {
        let found = &row.results.found;
        let detections = Detections::of(found.iter().map(|found| found.detected), timing);
        let mut cells = vec![
            format!("rank {}", row.rank),
            format!("{:.2}", row.canary_rate),
            pair(
                detections.quantile_seconds(0.5),
                detections.quantile_seconds(0.95),
            ),
            pair(
                detections.quantile_requests(0.5),
                detections.quantile_requests(0.95),
            ),
            proportion(detections.found, found.len()),
        ];
        let halts = found
            .iter()
            .map(|found| found.halted.as_ref().map(|(at, _)| (*at, 0)));
        cells.push(number(Detections::of(halts, timing).quantile_seconds(0.5)));
        for rule in [flagger, kayenta] {
            let detected = found.iter().filter_map(|found| {
                let at = found.peers?.get(rule).filter(|at| *at >= timing.onset);
                Some(at.map(|at| {
                    (
                        at,
                        found.faulty_requests.get(at as usize - 1).copied().unwrap_or(0),
                    )
                }))
            });
            cells.push(Detections::of(detected, timing).short());
        }
        let goals = row.goals.iter().map(|goal| {
            let (what, value, budget, digits) = detections.held(*goal);
            let held = report.held(
                &format!("{name}, rank {}: {what}", row.rank),
                value,
                budget,
                digits,
            );
            format!("{what} {}: {}", held[0], held[1])
        });
        cells.push(goals.collect::<Vec<_>>().join("; "));
        table.row(cells);
    }
    report.note("");
    table.print();
    report.note(if timing.whole {
        "All tenants were simulated in all windows; a peer may have halted for another tenant."
    } else {
        "The other tenants' traffic stops after the first window, so that the fleet halts sooner than it would (--whole)."
    });
}

/// When a fault was found in each of the rollouts.
struct Detections {
    found: usize,
    /// Infinite where it was not.
    seconds: Vec<f64>,
    requests: Vec<f64>,
}

impl Detections {
    fn of(detected: impl Iterator<Item = Option<(u32, u64)>>, timing: Timing) -> Self {
        let detected: Vec<_> = detected.collect();
        let seconds = |at: u32| (f64::from(at + 1) - f64::from(timing.onset)) * timing.seconds;
        Self {
            found: detected.iter().flatten().count(),
            seconds: detected
                .iter()
                .map(|found| found.map_or(f64::INFINITY, |(at, _)| seconds(at)))
                .collect(),
            requests: detected
                .iter()
                .map(|found| found.map_or(f64::INFINITY, |(_, requests)| requests as f64))
                .collect(),
        }
    }

    fn quantile_seconds(&self, share: f64) -> f64 {
        quantile(&self.seconds, share)
    }

    fn quantile_requests(&self, share: f64) -> f64 {
        quantile(&self.requests, share)
    }

    fn share(&self) -> f64 {
        self.found as f64 / self.seconds.len().max(1) as f64
    }

    /// `60 / 1767 (93 %)`: medians, and how many were found.
    fn short(&self) -> String {
        let (seconds, requests) = (self.quantile_seconds(0.5), self.quantile_requests(0.5));
        format!("{} ({:.0} %)", pair(seconds, requests), 100.0 * self.share())
    }

    fn held(&self, goal: Goal) -> (&'static str, f64, Budget, usize) {
        match goal {
            Goal::MedianSeconds(most) => ("median s", self.quantile_seconds(0.5), Budget::AtMost(most), 0),
            Goal::P95Seconds(most) => ("p95 s", self.quantile_seconds(0.95), Budget::AtMost(most), 0),
            Goal::MedianRequests(most) => (
                "median requests",
                self.quantile_requests(0.5),
                Budget::AtMost(most),
                0,
            ),
            Goal::P95Requests(most) => (
                "p95 requests",
                self.quantile_requests(0.95),
                Budget::AtMost(most),
                0,
            ),
            Goal::Detected(least) => ("detected", self.share(), Budget::AtLeast(least), 2),
        }
    }
}

fn pair(one: f64, other: f64) -> String {
    format!("{} / {}", number(one), number(other))
}

/// A whole number, or that it never came.
fn number(value: f64) -> String {
    if value.is_finite() {
        format!("{value:.0}")
    } else {
        "never".to_owned()
    }
}
