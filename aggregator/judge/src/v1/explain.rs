//! From states to a verdict, a score and a sentence.

use std::collections::{BTreeMap, VecDeque};

use coalmine_proto::names::TenantName;

use super::{
    COVERAGE_WINDOWS, Fleet, NODATA_WINDOWS, Tenant,
    outcome::{Outcome, State, TenantStates, Unit, UnitReport, Verdict},
    track::{Arms, Track},
};
use crate::{
    budget::Metric,
    evidence::{Coverage, Window},
    fixed::{Bits, ONE},
    policy::{Policy, Requirement},
    quantity::{micros, percent, percent_of},
    threshold::Thresholds,
};

/// How many of the worst tenants are named.
const WORST: usize = 10;

/// What was found in one window, unit by unit.
pub(super) struct Findings {
    window: u64,
    alpha_ppb: u64,
    theta_ppm: u32,
    required: Vec<Requirement>,
    min_windows: u32,
    min_requests: u64,
    min_traffic_ppm: u32,
    min_agents_ppm: u32,
    critical: Vec<TenantName>,
    limits: Thresholds,
    units: Vec<UnitReport>,
    worst: Option<UnitReport>,
    /// The tenant with the lowest score below 1, whatever its state: where a finding about the fleet comes from.
    worst_tenant: Option<UnitReport>,
    score_ppm: u32,
    /// Of the tenant being reported: its worst state and score.
    current: (Option<State>, u32),
    tenants: TenantStates,
    scores: Vec<(TenantName, u32)>,
    canary_requests: u64,
    judged_requests: u64,
    agents_ppm: u32,
    /// What stands in the way of APPROVE, in the order of importance.
    missing: Vec<String>,
    totals: Arms,
}

impl Findings {
    pub(super) fn new(window: &Window, policy: &Policy, totals: Arms) -> Self {
        let expected = u64::from(window.canary.expected) + u64::from(window.baseline.expected);
        let reported = u64::from(window.canary.reported) + u64::from(window.baseline.reported);
        Self {
            window: window.number,
            alpha_ppb: policy.rollout.alpha.ppb,
            theta_ppm: policy.rollout.rollback_threshold.ppm,
            required: policy.defaults.required.clone(),
            min_windows: policy.rollout.min_windows,
            min_requests: policy.rollout.min_coverage.requests,
            min_traffic_ppm: policy.rollout.min_coverage.traffic.ppm,
            min_agents_ppm: policy.rollout.min_coverage.agents.ppm,
            critical: policy.rollout.critical().cloned().collect(),
            limits: Thresholds::default_of(policy),
            units: Vec::new(),
            worst: None,
            worst_tenant: None,
            score_ppm: 1_000_000,
            current: (None, 1_000_000),
            tenants: TenantStates::default(),
            scores: Vec::new(),
            canary_requests: 0,
            judged_requests: 0,
            agents_ppm: share_ppm(reported, expected),
            missing: Vec::new(),
            totals,
        }
    }

    /// Agents and data that must be there.
    pub(super) fn require_data(&mut self, window: &Window, fleet: &Fleet, agents: &VecDeque<[Coverage; 2]>) {
        let nodata = |metric, seen: &str| UnitReport {
            unit: Unit::Fleet,
            metric,
            state: State::NoData,
            bits: 0,
            budget: 0,
            score_ppm: 1_000_000,
            seen: seen.to_owned(),
        };
        let idle = |windows: u32| windows >= NODATA_WINDOWS;
        let arms_missing = if window.canary.reported == 0 {
            Some((&Metric::TESTS[..], "no canary agent reported".to_owned()))
        } else if idle(fleet.without_canary) {
            let seen = format!("no canary request in the last {} windows", fleet.without_canary);
            Some((&Metric::TESTS[..], seen))
        } else if window.baseline.reported == 0 {
            let seen = "no baseline agent reported, so there is nothing to compare with".to_owned();
            Some((&Metric::TESTS[..1], seen))
        } else if idle(fleet.without_live) {
            let seen = format!(
                "in the last {} windows no tenant had requests on both arms to compare",
                fleet.without_live
            );
            Some((&Metric::TESTS[..1], seen))
        } else {
            None
        };
        if let Some((metrics, seen)) = arms_missing {
            for metric in metrics {
                self.units.push(nodata(*metric, &seen));
            }
            self.missing.push(seen);
        } else if fleet.live.blocks() == 0 {
            self.missing
                .push("no tenant has had requests on both arms to compare yet".to_owned());
        }
        let measured = fleet.latency.requests > 0 || !self.required.contains(&Requirement::Latency);
        if fleet.totals.canary.requests > 0 && !measured && window.canary.reported > 0 {
            let seen = "no latency was measured, and the policy requires it";
            self.missing.push(seen.to_owned());
            self.units.push(nodata(Metric::LatencySla, seen));
        }
        let minimum = self.min_agents_ppm;
        let mut gaps = Vec::new();
        for (index, (arm, now)) in [("canary", window.canary), ("baseline", window.baseline)]
            .into_iter()
            .enumerate()
        {
            if share_ppm(u64::from(now.reported), u64::from(now.expected)) < minimum {
                gaps.push(format!(
                    "{} of {} {arm} agents reported",
                    now.reported, now.expected
                ));
                continue;
            }
            let sum = |count: fn(&Coverage) -> u32| {
                agents
                    .iter()
                    .map(|arms| u64::from(count(&arms[index])))
                    .sum::<u64>()
            };
            let (reported, expected) = (sum(|arm| arm.reported), sum(|arm| arm.expected));
            if share_ppm(reported, expected) < minimum {
                self.missing.push(format!(
                    "only {} of the {arm} agents' windows arrived in the last {COVERAGE_WINDOWS} windows",
                    percent_of(reported, expected)
                ));
            }
        }
        if !gaps.is_empty() {
            let seen = gaps.join(", ");
            self.missing.push(seen.clone());
            self.units.push(UnitReport {
                unit: Unit::Fleet,
                metric: Metric::Gaps,
                state: State::Gap,
                bits: 0,
                budget: 0,
                score_ppm: 1_000_000,
                seen,
            });
        }
    }

    /// Reports a unit's evidence against the live baseline; says whether something is not in order.
    pub(super) fn live(&mut self, unit: &Unit, track: &mut Track, limits: Thresholds) -> bool {
        let state = track.state();
        let seen = || seen_live(track.episode(), limits);
        self.push(unit, Metric::ErrorsLive, state, track, seen)
    }

    /// Reports a unit's evidence against its SLA; says whether something is not in order.
    pub(super) fn sla(
        &mut self,
        unit: &Unit,
        metric: Metric,
        track: &Track,
        state: State,
        proven: bool,
        limits: Thresholds,
    ) -> bool {
        let state = if state == State::Clear && proven {
            State::Proven
        } else {
            state
        };
        let seen = || seen_sla(metric, track.episode(), limits);
        self.push(unit, metric, state, track, seen)
    }

    fn push(
        &mut self,
        unit: &Unit,
        metric: Metric,
        state: State,
        track: &Track,
        seen: impl Fn() -> String,
    ) -> bool {
        let bits = track.bits().unwrap_or(0);
        let score_ppm = score(bits, track.budget(), self.theta_ppm, state);
        let trouble = state.is_trouble();
        let report = || UnitReport {
            unit: unit.clone(),
            metric,
            state,
            bits,
            budget: track.budget(),
            score_ppm,
            seen: if trouble || score_ppm < 1_000_000 {
                seen()
            } else {
                String::new()
            },
        };
        self.score_ppm = self.score_ppm.min(score_ppm);
        if *unit != Unit::Fleet {
            // CLEAR on errors/live is as good as it gets there; it does not take PROVEN away.
            if (metric, state) != (Metric::ErrorsLive, State::Clear) {
                let worst = self
                    .current
                    .0
                    .filter(|worst| worst.severity() >= state.severity());
                self.current.0 = worst.or(Some(state));
            }
            self.current.1 = self.current.1.min(score_ppm);
            let lowest = self
                .worst_tenant
                .as_ref()
                .map_or(1_000_000, |worst| worst.score_ppm);
            if score_ppm < lowest {
                self.worst_tenant = Some(report());
            }
        }
        if state == State::Clear {
            return trouble;
        }
        let report = report();
        if trouble
            && self
                .worst
                .as_ref()
                .is_none_or(|worst| rank(&report) < rank(worst))
        {
            self.worst = Some(report.clone());
        }
        self.units.push(report);
        trouble
    }

    /// Ends the report of a tenant.
    pub(super) fn tenant_judged(&mut self, name: &TenantName, canary_requests: u64, suspected: bool) {
        let (state, score) = std::mem::replace(&mut self.current, (None, 1_000_000));
        self.tenants.count(state.unwrap_or(State::Clear));
        if score < 1_000_000 {
            self.scores.push((name.clone(), score));
        }
        self.canary_requests = self.canary_requests.saturating_add(canary_requests);
        if canary_requests >= self.min_requests && !suspected {
            self.judged_requests = self.judged_requests.saturating_add(canary_requests);
        }
    }

    /// The fleet must be proven on what the policy requires.
    pub(super) fn require_proof(&mut self, requirement: Requirement, proven: bool) {
        if proven || !self.required.contains(&requirement) {
            return;
        }
        self.missing.push(format!(
            "not yet proven that {} ({} canary requests so far)",
            self.claim(requirement),
            self.totals.canary.requests
        ));
    }

    /// Tenants that the policy calls critical must be judged.
    pub(super) fn require_critical(&mut self, tenants: &BTreeMap<TenantName, Tenant>) {
        for name in std::mem::take(&mut self.critical) {
            let requests = tenants
                .get(&name)
                .map_or(0, |tenant| tenant.totals.canary.requests);
            if requests < self.min_requests {
                self.missing.push(format!(
                    "critical tenant {name} has {requests} canary requests, fewer than {}",
                    self.min_requests
                ));
            }
        }
    }

    pub(super) fn has_breach(&self) -> bool {
        self.units.iter().any(|report| report.state == State::Breach)
    }

    pub(super) fn conclude(mut self, halted: bool, windows: u32) -> Outcome {
        let traffic_ppm = share_ppm(self.judged_requests, self.canary_requests);
        if traffic_ppm < self.min_traffic_ppm {
            self.missing.push(format!(
                "only {} of the canary's requests belong to tenants with at least {} requests and no suspicion",
                percent_of(self.judged_requests, self.canary_requests),
                self.min_requests
            ));
        }
        if windows < self.min_windows {
            self.missing.push(format!(
                "only {windows} of at least {} windows were judged",
                self.min_windows
            ));
        }
        let trouble = self.units.iter().any(|report| report.state.is_trouble());
        let verdict = if halted {
            Verdict::Rollback
        } else if trouble || !self.missing.is_empty() {
            Verdict::Hold
        } else {
            Verdict::Approve
        };
        let right = u32::try_from((1_000_000_000 - self.alpha_ppb) / 1_000).unwrap_or(0);
        let reason = self.reason(verdict, traffic_ppm);
        self.scores.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        self.scores.truncate(WORST);
        Outcome {
            window: self.window,
            verdict,
            score_ppm: self.score_ppm,
            halted,
            reason,
            worst_tenant: self.worst.as_ref().and(self.worst_tenant.as_ref()).and_then(
                |report| match &report.unit {
                    Unit::Tenant(name) => Some(name.clone()),
                    Unit::Fleet => None,
                },
            ),
            worst: self.worst,
            units: self.units,
            worst_tenants: self.scores,
            confidence_ppm: (verdict != Verdict::Hold).then_some(right),
            traffic_ppm,
            agents_ppm: self.agents_ppm,
            tenants: self.tenants,
        }
    }

    fn reason(&self, verdict: Verdict, traffic_ppm: u32) -> String {
        let alpha = percent(u128::from(self.alpha_ppb));
        match (verdict, &self.worst) {
            (Verdict::Rollback, Some(worst)) => format!(
                "{}: {}{}; evidence {} bits of {} needed, which a healthy canary reaches in at most {alpha} of rollouts",
                unit_name(&worst.unit),
                worst.seen,
                self.where_from(worst),
                bits_text(worst.bits),
                bits_text(worst.budget),
            ),
            (Verdict::Hold, Some(worst)) => format!(
                "{} is {} on {}: {}{}; evidence {} bits of {} needed to roll back",
                unit_name(&worst.unit),
                worst.state.as_str(),
                worst.metric.as_str(),
                worst.seen,
                self.where_from(worst),
                bits_text(worst.bits),
                bits_text(worst.budget),
            ),
            (Verdict::Hold | Verdict::Rollback, _) => match self.missing.split_first() {
                Some((first, [])) => first.clone(),
                Some((first, rest)) => format!("{first}; and {} more", rest.len()),
                None => "waiting".to_owned(),
            },
            (Verdict::Approve, _) => format!(
                "no tenant is suspected; over {} canary requests the error rate is {} on the canary and {} on the \
                 baseline; proven, with error probability {alpha}: {}; {} of the canary's requests are in tenants that \
                 were judged",
                self.totals.canary.requests,
                percent_of(self.totals.canary.events, self.totals.canary.requests),
                percent_of(self.totals.baseline.events, self.totals.baseline.requests),
                self.required
                    .iter()
                    .map(|requirement| self.claim(*requirement))
                    .collect::<Vec<_>>()
                    .join(" and "),
                percent(u128::from(traffic_ppm) * 1_000),
            ),
        }
    }

    /// Of a finding about the fleet: the tenant that it shows in most.
    fn where_from(&self, worst: &UnitReport) -> String {
        match (&worst.unit, &self.worst_tenant) {
            (Unit::Fleet, Some(tenant)) => {
                format!("; most of it in {}: {}", unit_name(&tenant.unit), tenant.seen)
            }
            _ => String::new(),
        }
    }

    /// What is proven when a requirement is met.
    fn claim(&self, requirement: Requirement) -> String {
        match requirement {
            Requirement::Errors => {
                format!(
                    "the canary's error rate is below {}",
                    percent(u128::from(self.limits.max_rate_ppb))
                )
            }
            Requirement::Latency => "less than 1 % of its requests are over their p99 limit".to_owned(),
        }
    }
}

/// Orders reports: the lowest score first; at the same score a breach first, then a tenant before the fleet.
fn rank(report: &UnitReport) -> (bool, bool, u32) {
    let breach = report.state == State::Breach;
    (!breach, breach && report.unit == Unit::Fleet, report.score_ppm)
}

fn unit_name(unit: &Unit) -> String {
    match unit {
        Unit::Fleet => "the fleet".to_owned(),
        Unit::Tenant(name) => format!("tenant {name}"),
    }
}

fn seen_live(arms: Arms, limits: Thresholds) -> String {
    let (canary, baseline) = (arms.canary, arms.baseline);
    let baseline_ppb = u128::from(baseline.events) * 1_000_000_000 / u128::from(baseline.requests.max(1));
    let tolerated =
        baseline_ppb * u128::from(limits.max_ratio_milli) / 1_000 + u128::from(limits.max_increase_ppb);
    format!(
        "{} of {} canary requests failed ({}), on the baseline {} of {} ({}); up to {} is tolerated",
        canary.events,
        canary.requests,
        percent_of(canary.events, canary.requests),
        baseline.events,
        baseline.requests,
        percent(baseline_ppb),
        percent(tolerated),
    )
}

fn seen_sla(metric: Metric, arms: Arms, limits: Thresholds) -> String {
    let canary = arms.canary;
    let share = percent_of(canary.events, canary.requests);
    match metric {
        Metric::LatencySla => format!(
            "{} of {} canary requests took longer than {} ({share}); at most 1 % is allowed",
            canary.events,
            canary.requests,
            limits.p99_us.map_or_else(|| "the limit".to_owned(), micros),
        ),
        _ => format!(
            "{} of {} canary requests failed ({share}); the SLA allows {}",
            canary.events,
            canary.requests,
            percent(u128::from(limits.max_rate_ppb)),
        ),
    }
}

/// The health score of a unit on a metric: 1 without evidence, theta at the budget, 0 at twice the budget.
///
/// For u = bits / budget: 1 - (1 - theta) u up to u = 1, theta (2 - u) up to 2, then 0. So the score is below
/// theta if and only if the unit is in breach.
fn score(bits: Bits, budget: Bits, theta_ppm: u32, state: State) -> u32 {
    let budget = i128::from(budget.max(1));
    let theta = i128::from(theta_ppm);
    let mut bits = i128::from(bits.max(0));
    if state != State::Breach {
        bits = bits.min(budget);
    }
    let ppm = if bits <= budget {
        1_000_000 - (1_000_000 - theta) * bits / budget
    } else {
        (theta * (2 * budget - bits).max(0) / budget).min(theta - 1)
    };
    u32::try_from(ppm.clamp(0, 1_000_000)).unwrap_or(0)
}

fn share_ppm(part: u64, whole: u64) -> u32 {
    if whole == 0 {
        return 0;
    }
    u32::try_from(u128::from(part) * 1_000_000 / u128::from(whole)).unwrap_or(1_000_000)
}

/// Evidence with one decimal.
fn bits_text(bits: Bits) -> String {
    let tenths = i128::from(bits) * 10 / i128::from(ONE);
    let sign = if tenths < 0 { "-" } else { "" };
    format!("{sign}{}.{}", tenths.abs() / 10, tenths.abs() % 10)
}
