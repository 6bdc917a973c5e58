//! How good the judge's decisions are, in simulated rollouts: false alarms, detection, and what nobody could detect.
//!
//! Read in this order: [`model`] (the traffic), [`rollouts`] (many of them, on threads), [`judged`] (what is known of
//! the judge), [`peers`] and [`kayenta`] (what others would do with the same windows), [`tables`] (what is printed,
//! and the goals), [`limits`] (what follows from information alone). They share [`random`] and [`statistics`].
//!
//! `bench quality` without options holds all goals with few rollouts; `--rollouts 1000` is the full run. An option
//! that names a fault or a stress simulates that alone: `bench quality --fault errors=3% --rank 1,10,50`.

mod model;

mod rollouts;

mod judged;

mod kayenta;
mod peers;

mod limits;
mod tables;

mod random;
mod statistics;

use std::{fs, num::NonZero, path::PathBuf, sync::Arc, thread, time::Instant};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use coalmine_judge::policy::Policy;
use coalmine_proto::names::TenantName;

use self::{
    model::{Fault, Faulty, Model, World},
    rollouts::{Results, Scenario, Spent, Threads},
    tables::{Detection, Goal, Healthy, Timing},
};
use crate::{Plan, report::Report, sample::tenant_name};

/// Rollouts of a healthy fleet and with a fault, and how many of each the peers see: by default, and with --quick.
const USUAL: Counts = Counts {
    healthy: 60,
    healthy_peers: 20,
    faulty: 200,
};
const QUICK: Counts = Counts {
    healthy: 2,
    healthy_peers: 1,
    faulty: 4,
};

/// The peers see at most so many healthy rollouts, since Kayenta takes its time.
const MOST_PEER_ROLLOUTS: usize = 300;

/// Simulates rollouts and judges them
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Tenants
    #[arg(long, default_value_t = 500, value_name = "N")]
    tenants: usize,
    /// Exponent of Zipf's law, by which tenants share the requests
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    zipf: f64,
    /// Requests a second of all tenants
    #[arg(long, default_value_t = 2_000.0, value_name = "RPS")]
    rate: f64,
    /// The canary's share of the traffic
    #[arg(long, default_value = "10%", value_parser = share, value_name = "SHARE")]
    canary_weight: f64,
    /// The baseline arm's share of the traffic; the rest is not observed
    #[arg(long, default_value = "90%", value_parser = share, value_name = "SHARE")]
    baseline_share: f64,
    /// Length of a window, in seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
    window: u32,
    /// Windows of a rollout
    #[arg(long, default_value_t = 180, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10_000))]
    windows: u32,
    /// What is wrong with one tenant's canary: errors=15%, p99=+20% (all latencies) or tail=+20% (those above p90)
    #[arg(long, value_parser = fault, value_name = "KIND=SIZE")]
    fault: Option<Fault>,
    /// Whose canary it is, by rank of traffic; one after the other
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "RANK")]
    rank: Vec<usize>,
    /// First window with the fault
    #[arg(long, default_value_t = 1, value_name = "WINDOW")]
    onset: u32,
    /// Stress: coefficient of variation of each arm's error rate, from window to window
    #[arg(long, default_value_t = 0.0, value_name = "CV")]
    overdispersion: f64,
    /// Stress: probability that a pod fails in a window
    #[arg(long, default_value = "0", value_parser = share, value_name = "SHARE")]
    bursts: f64,
    /// Stress: standard deviation of the logarithm of an arm's own error rate
    #[arg(long, default_value = "0", value_parser = share, value_name = "SD")]
    error_difference: f64,
    /// Stress: standard deviation of the logarithm of an arm's own latency
    #[arg(long, default_value = "0", value_parser = share, value_name = "SD")]
    latency_difference: f64,
    /// Stress: the canary's weight goes from 5 % to 50 % while the shared error rate rises from 0.1 % to 0.5 %
    #[arg(long)]
    steps: bool,
    /// Simulate all tenants in all windows where one is faulty, too
    #[arg(long)]
    whole: bool,
    /// Rollouts of each scenario [default: 60 healthy ones, 200 with a fault]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rollouts: Option<u32>,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Threads [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZero<usize>>,
    /// Judge by this policy; latencies follow from its limits
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Only this table (repeatable)
    #[arg(long, value_name = "NAME")]
    table: Vec<Which>,
}

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// False alarms in healthy rollouts
    Healthy,
    /// Detection of errors
    Errors,
    /// Detection of latency
    Latency,
    /// What information allows
    Limits,
}

/// How many rollouts.
#[derive(Debug, Clone, Copy)]
struct Counts {
    healthy: usize,
    healthy_peers: usize,
    faulty: usize,
}

/// One run of the simulator.
struct Simulation<'a> {
    options: &'a Options,
    counts: Counts,
    threads: Threads,
    /// With the policy's margin on latency, with none, and with thresholds that follow history.
    policy: Policy,
    strict: Policy,
    learned: Policy,
    report: Report,
    spent: Spent,
    rollouts: usize,
    begun: Instant,
}

/// As a part of the bench: all goals, in as little time as gives a picture.
pub(crate) async fn measure(plan: Plan, report: Report) -> anyhow::Result<Report> {
    let mut cores = vec![plan.cores.proxy, plan.cores.load];
    cores.dedup();
    let threads = Threads {
        count: cores.len(),
        cores,
    };
    let counts = if plan.quick { QUICK } else { USUAL };
    // It computes for minutes; the bench still hears signals.
    let work = tokio::task::spawn_blocking(move || {
        let options = Options::usual()?;
        Simulation::new(&options, counts, threads, report)?.all()
    });
    work.await.context("the simulator has panicked")?
}

/// As a program of its own, with options.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let available = thread::available_parallelism()?;
    let threads = Threads {
        count: options.threads.unwrap_or(available).get(),
        cores: Vec::new(),
    };
    let counts = options.rollouts.map_or(USUAL, |rollouts| {
        let rollouts = rollouts as usize;
        Counts {
            healthy: rollouts,
            healthy_peers: rollouts.div_ceil(3).min(MOST_PEER_ROLLOUTS),
            faulty: rollouts,
        }
    });
    let simulation = Simulation::new(options, counts, threads, Report::default())?;
    let report = if options.is_one_scenario() {
        simulation.one()?
    } else {
        simulation.all()?
    };
    report.finish("All of it is simulated, by the model that quality/model.rs describes.");
    Ok(())
}

// === impl Options ===

impl Options {
    /// Those of a command line without any.
    fn usual() -> anyhow::Result<Self> {
        use clap::FromArgMatches as _;
        let command = Self::augment_args(clap::Command::new("quality").no_binary_name(true));
        Ok(Self::from_arg_matches(&command.try_get_matches_from([""; 0])?)?)
    }

    /// Whether a fault or a stress is asked for, so that it alone is simulated.
    fn is_one_scenario(&self) -> bool {
        let stresses = [
            self.overdispersion,
            self.bursts,
            self.error_difference,
            self.latency_difference,
        ];
        self.fault.is_some() || self.steps || stresses.iter().any(|stress| *stress > 0.0)
    }

    fn model(&self) -> Model {
        Model {
            tenants: self.tenants,
            zipf: self.zipf,
            rate: self.rate,
            canary_weight: self.canary_weight,
            baseline_share: self.baseline_share,
            window_seconds: self.window,
            windows: self.windows,
            overdispersion: self.overdispersion,
            bursts: self.bursts,
            error_difference: self.error_difference,
            latency_difference: self.latency_difference,
            steps: self.steps,
            fault: None,
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let shares = self.canary_weight + self.baseline_share;
        ensure!(
            self.canary_weight > 0.0 && self.baseline_share > 0.0 && shares < 1.0 + 1e-9,
            "the arms' shares must be above 0, and 100 % at most together"
        );
        ensure!(
            (1..=99_999).contains(&self.tenants),
            "there must be 1 to 99999 tenants"
        );
        ensure!(
            self.rank.iter().all(|rank| (1..=self.tenants).contains(rank)),
            "a rank is a number from 1 to that of the tenants"
        );
        ensure!(
            (1..=self.windows).contains(&self.onset),
            "the onset is a window, from 1"
        );
        let finite = [self.zipf, self.rate, self.overdispersion];
        ensure!(
            finite.iter().all(|value| value.is_finite() && *value >= 0.0),
            "numbers must not be negative"
        );
        Ok(())
    }
}

/// `10%`, `+20%` or `0.1`.
fn share(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let value = match text.strip_suffix('%') {
        Some(percent) => number(percent).map(|percent| percent / 100.0),
        None => number(text),
    };
    let value = value.filter(|value| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "write a share like 10% or 0.1".to_owned())
}

/// `errors=15%`, `p99=+20%` or `tail=+20%`.
fn fault(text: &str) -> Result<Fault, String> {
    let (kind, size) = text
        .split_once('=')
        .ok_or("write a fault like errors=15% or p99=+20%")?;
    let size = share(size)?;
    match kind {
        "errors" if size <= 1.0 => Ok(Fault::Errors(size)),
        "p99" => Ok(Fault::Scale(size)),
        "tail" => Ok(Fault::Tail(size)),
        _ => Err("faults are errors=SHARE (at most 100%), p99=+SHARE and tail=+SHARE".to_owned()),
    }
}

// === impl Simulation ===

impl<'a> Simulation<'a> {
    fn new(options: &'a Options, counts: Counts, threads: Threads, report: Report) -> anyhow::Result<Self> {
        options.check()?;
        let usual = |margin, adjust| {
            judged::usual_policy(options.tenants, options.window, options.windows, margin, adjust)
        };
        let (policy, strict, learned) = match &options.policy {
            None => (
                usual("10%", "")?,
                usual("0%", "")?,
                usual("10%", "adjust: { from_history: true, floor: 1x, ceiling: 3x }")?,
            ),
            Some(path) => {
                let text =
                    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                let policy = Policy::parse(&text).with_context(|| path.display().to_string())?;
                (policy.clone(), policy.clone(), policy)
            }
        };
        ensure!(
            policy.window_ms() == u64::from(options.window) * 1_000,
            "the policy's judge_window is {} ms; say --window",
            policy.window_ms()
        );
        Ok(Self {
            options,
            counts,
            threads,
            policy,
            strict,
            learned,
            report,
            spent: Spent::default(),
            rollouts: 0,
            begun: Instant::now(),
        })
    }

    /// All tables and goals.
    fn all(mut self) -> anyhow::Result<Report> {
        let tables = &self.options.table;
        let chosen = |which| tables.is_empty() || tables.contains(&which);
        self.head();
        if chosen(Which::Healthy) {
            self.healthy(&tables::healthy_goals())?;
        }
        if chosen(Which::Errors) {
            self.report
                .title("Quality: one tenant's canary fails 15 % of its requests");
            let fault = Fault::Errors(0.15);
            self.detection(
                "15 % errors from the start",
                fault,
                1,
                false,
                &tables::error_goals(),
            )?;
            let onset = (self.options.windows / 2).max(1);
            let goals = tables::late_error_goals();
            self.detection("15 % errors from the middle", fault, onset, false, &goals)?;
        }
        if chosen(Which::Latency) {
            self.report
                .title("Quality: one tenant's canary has a p99 that is 20 % longer, within its limit");
            // A given policy has one margin; the usual one is tried without, too.
            let margins: &[_] = &[(false, "the policy's margin"), (true, "no margin")];
            let tried = if self.options.policy.is_some() { 1 } else { 2 };
            for &(strict, margin) in margins.iter().take(tried) {
                let name = format!("all latencies 20 % longer, {margin}");
                let goals = tables::latency_goals(strict);
                self.detection(&name, Fault::Scale(0.2), 1, strict, &goals)?;
                let name = format!("latencies above p90 stretched, {margin}");
                self.detection(&name, Fault::Tail(0.2), 1, strict, &[(1, Vec::new())])?;
            }
        }
        if chosen(Which::Limits) {
            let world = self.world(self.options.model())?;
            limits::print(&world, &self.policy, &mut self.report)?;
        }
        self.foot();
        Ok(self.report)
    }

    /// What the options describe, alone.
    fn one(mut self) -> anyhow::Result<Report> {
        self.head();
        match self.options.fault {
            None => {
                let scenario = Healthy {
                    name: "as the options say".to_owned(),
                    model: Box::new(|_| {}),
                    most_of_1000: None,
                    learned: false,
                };
                self.healthy(&[scenario])?;
            }
            Some(fault) => {
                self.report.title("Quality: detection");
                let ranks: Vec<_> = self.options.rank.iter().map(|rank| (*rank, Vec::new())).collect();
                self.detection("as the options say", fault, self.options.onset, false, &ranks)?;
            }
        }
        self.foot();
        Ok(self.report)
    }

    fn head(&mut self) {
        let options = self.options;
        self.report.title("Quality of decisions, simulated");
        self.report.note(&format!(
            "{} tenants (Zipf {}), {} requests a second, {} windows of {} s, canary {} %, baseline {} %; seed {}, {} \
             threads.\nThe peers are Flagger-like (every minute, 99 % success or p99 within the limit, fifth failure, \
             for each tenant or the fleet) and Kayenta-like\n(every minute, growing look-back, Mann-Whitney, one High \
             halts). Proportions with Wilson's interval of 95 %.",
            options.tenants,
            options.zipf,
            options.rate,
            options.windows,
            options.window,
            100.0 * options.canary_weight,
            100.0 * options.baseline_share,
            options.seed,
            self.threads.count,
        ));
    }

    fn foot(&mut self) {
        let Spent {
            traffic,
            judge,
            peers,
        } = self.spent;
        let seconds = self.begun.elapsed().as_secs_f64();
        self.report.note(&format!(
            "\n{} rollouts in {seconds:.0} s; processor seconds: traffic {traffic:.0}, judge {judge:.0}, peers {peers:.0}.",
            self.rollouts
        ));
    }

    fn healthy(&mut self, scenarios: &[Healthy]) -> anyhow::Result<()> {
        self.report
            .title("Quality: healthy rollouts (A/A), and how many are halted");
        let mut results = Vec::new();
        for healthy in scenarios {
            let mut model = self.options.model();
            (healthy.model)(&mut model);
            let run = Run {
                name: &healthy.name,
                model,
                rollouts: self.counts.healthy,
                peer_rollouts: self.counts.healthy_peers,
                terms: if healthy.learned {
                    Terms::Learned
                } else {
                    Terms::Usual
                },
            };
            results.push(self.run(run)?);
        }
        tables::print_healthy(scenarios, &results, self.options.window, &mut self.report);
        Ok(())
    }

    fn detection(
        &mut self,
        name: &str,
        fault: Fault,
        onset: u32,
        strict: bool,
        ranks: &[(usize, Vec<Goal>)],
    ) -> anyhow::Result<()> {
        let mut rows = Vec::new();
        for (rank, goals) in ranks.iter().filter(|(rank, _)| *rank <= self.options.tenants) {
            let faulty = Faulty {
                rank: *rank,
                fault,
                onset,
            };
            let run = Run {
                name: &format!("{name}, rank {rank}"),
                model: Model {
                    fault: Some(faulty),
                    ..self.options.model()
                },
                rollouts: self.counts.faulty,
                peer_rollouts: self.counts.faulty,
                terms: if strict { Terms::Strict } else { Terms::Usual },
            };
            let results = self.run(run)?;
            let share = self
                .options
                .model()
                .shares()
                .get(rank - 1)
                .copied()
                .unwrap_or(0.0);
            rows.push(Detection {
                rank: *rank,
                canary_rate: self.options.rate * share * self.options.canary_weight,
                goals,
                results,
            });
        }
        let timing = Timing {
            seconds: f64::from(self.options.window),
            onset,
            whole: self.options.whole,
        };
        tables::print_detection(name, fault, timing, &rows, &mut self.report);
        Ok(())
    }

    fn run(&mut self, run: Run<'_>) -> anyhow::Result<Results> {
        let begun = Instant::now();
        let world = self.world(run.model)?;
        let (policy, history) = match run.terms {
            Terms::Usual => (&self.policy, None),
            Terms::Strict => (&self.strict, None),
            Terms::Learned => {
                let history = rollouts::learn(&world, [self.options.seed, u64::MAX], LESSONS);
                let margin = history
                    .margin_buckets()
                    .map_or_else(|| "none".to_owned(), |buckets| buckets.to_string());
                self.report.note(&format!(
                    "  {}: learned from {LESSONS} healthy rollouts: a margin of {margin} buckets",
                    run.name
                ));
                (&self.learned, Some(Arc::new(history)))
            }
        };
        let scenario = Scenario {
            name: run.name.to_owned(),
            world,
            policy,
            history,
            rollouts: run.rollouts,
            peer_rollouts: run.peer_rollouts,
            whole: self.options.whole,
            seed: self.options.seed,
            threads: &self.threads,
        };
        let results = scenario.run()?;
        let each = |seconds: f64, rollouts: usize| 1e3 * seconds / rollouts.max(1) as f64;
        let Spent {
            traffic,
            judge,
            peers,
        } = results.spent;
        self.report.note(&format!(
            "  {}: {} rollouts in {:.1} s; ms of a core for each: traffic {:.0}, judge {:.0}, peers {:.0}",
            run.name,
            run.rollouts,
            begun.elapsed().as_secs_f64(),
            each(traffic, run.rollouts),
            each(judge, run.rollouts),
            each(peers, run.peer_rollouts.min(run.rollouts)),
        ));
        self.spent.add(results.spent);
        self.rollouts += run.rollouts;
        Ok(results)
    }

    fn world(&self, model: Model) -> anyhow::Result<World> {
        let names = (1..=model.tenants).map(tenant_name);
        let names: Vec<TenantName> = names.collect::<anyhow::Result<_>>()?;
        Ok(World::new(model, names, |name| {
            judged::limit_us(&self.policy, name)
        }))
    }
}

/// A scenario to be run.
struct Run<'a> {
    name: &'a str,
    model: Model,
    rollouts: usize,
    peer_rollouts: usize,
    terms: Terms,
}

/// What is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Terms {
    /// The policy.
    Usual,
    /// The same without a margin on latency.
    Strict,
    /// The same, with thresholds that follow the history of a few healthy rollouts.
    Learned,
}

/// Rollouts that a history is learned from.
const LESSONS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        assert_eq!(share("10%"), Ok(0.1));
        assert_eq!(share("+20%"), Ok(0.2));
        assert_eq!(share("0.25"), Ok(0.25));
        assert!(share("-1%").is_err() && share("x").is_err());
        assert_eq!(fault("errors=15%"), Ok(Fault::Errors(0.15)));
        assert_eq!(fault("p99=+20%"), Ok(Fault::Scale(0.2)));
        assert_eq!(fault("tail=20%"), Ok(Fault::Tail(0.2)));
        assert!(fault("errors=150%").is_err() && fault("disk=1").is_err());
        let options = Options::usual().unwrap();
        assert!(options.check().is_ok() && !options.is_one_scenario());
        assert_eq!(
            (options.tenants, options.canary_weight, options.windows),
            (500, 0.1, 180)
        );
    }
}
