//! From states to a verdict, a score and a sentence.

use coalmine_proto::{histogram::upper_bound_ns, names::TenantName};

use super::{
    Judge,
    group::Group,
    outcome::{Deadline, Outcome, State, Unit, UnitReport, Verdict},
    tenant::{Episode, Summary, Tenant, fleet_tolerance},
    track::{Arms, Reading},
};
use crate::{
    budget::Metric,
    eprocess::{QUANTILE_PPM, TailCounts},
    evidence::Window,
    fixed::{Bits, ONE},
    policy::{OnDeadline, Requirement},
    quantity::{Span, micros, percent, percent_of, span},
    threshold::Thresholds,
};

/// How many of the worst tenants are named.
const WORST: usize = 10;

/// How many of the units that are watched are named.
const WATCHED: usize = 20;

/// What was found in one window, unit by unit.
pub(super) struct Findings {
    theta_ppm: u32,
    units: Vec<UnitReport>,
    watched: Vec<UnitReport>,
    worst: Option<UnitReport>,
    /// The tenant with the lowest score below 1, whatever its state: where a finding about the fleet comes from.
    worst_tenant: Option<UnitReport>,
    score_ppm: u32,
    scores: Vec<(TenantName, u32)>,
    /// What stands in the way of APPROVE, in the order of importance.
    missing: Vec<String>,
}

/// What the verdict needs of a tenant.
pub(super) fn summary(readings: &[Option<Reading>], theta_ppm: u32) -> Summary {
    let mut summary = Summary::default();
    let mut worst: Option<State> = None;
    for reading in readings.iter().flatten() {
        summary.score_ppm = summary.score_ppm.min(score(reading, theta_ppm));
        summary.suspected |= reading.state.is_trouble();
        summary.notable |= reading.state != State::Clear;
        // A metric that has no limit to be proven against is as good as it gets when it is CLEAR; it does not take
        // PROVEN away.
        let is_live = matches!(reading.metric, Metric::ErrorsLive | Metric::LatencyLive);
        if !(is_live && reading.state == State::Clear)
            && worst.is_none_or(|worst| worst.severity() < reading.state.severity())
        {
            worst = Some(reading.state);
        }
    }
    summary.notable |= summary.score_ppm < 1_000_000;
    summary.state = worst.unwrap_or(State::Clear);
    summary
}

impl Findings {
    pub(super) fn new(judge: &Judge) -> Self {
        Self {
            theta_ppm: judge.policy.rollout.rollback_threshold.ppm,
            units: Vec::new(),
            watched: Vec::new(),
            worst: None,
            worst_tenant: None,
            score_ppm: 1_000_000,
            scores: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// Nothing is approved while the canary warms up.
    pub(super) fn warm_up(&mut self, warm_up: Option<Span>) {
        self.missing.push(format!(
            "the canary warms up: requests of the first {} are no evidence",
            span(warm_up.map_or(0, |span| span.micros))
        ));
    }

    /// Agents, pool, and data that must be there.
    pub(super) fn service(&mut self, judge: &Judge, window: &Window) {
        let found = judge.service.shortfalls(window, &judge.groups[0], &judge.policy);
        self.missing.extend(found.missing);
        self.units.extend(found.units);
        for reading in judge.service.readings(&judge.groups[0].bars).iter().flatten() {
            self.push(judge, &Unit::Fleet, reading, || {
                judge.service.seen(reading.metric)
            });
        }
    }

    /// The fleet or a cohort.
    pub(super) fn group(&mut self, judge: &Judge, group: &Group) {
        let limits = fleet_tolerance(judge.limits);
        for reading in group.readings(judge.proof).iter().flatten() {
            self.push(judge, &group.unit, reading, || {
                seen(reading.metric, &group.unit, group.episode(reading.metric), limits)
            });
        }
        if group.unit != Unit::Fleet {
            return;
        }
        for requirement in &judge.policy.defaults.required {
            let proven = match requirement {
                Requirement::Errors => group.errors.is_proven(judge.proof),
                Requirement::Latency => group.slow.is_proven(judge.proof),
                Requirement::Pool => judge.service.is_pool_proven(),
            };
            if !proven {
                let obstacle = match requirement {
                    Requirement::Pool => judge.service.pool_obstacle(),
                    Requirement::Errors | Requirement::Latency => None,
                };
                let obstacle = obstacle.map_or_else(String::new, |obstacle| format!("; {obstacle}"));
                self.missing.push(format!(
                    "not yet proven that {} ({} canary requests so far){obstacle}",
                    claim(judge, *requirement),
                    group.totals.canary.requests
                ));
            }
        }
    }

    /// A tenant of which something is to be said.
    pub(super) fn tenant(&mut self, judge: &Judge, name: &TenantName, tenant: &Tenant) {
        let bars = &judge.bars[tenant.bars as usize];
        let limits = judge.tests[tenant.tests as usize].thresholds;
        let unit = Unit::Tenant(name.clone());
        for reading in tenant.readings(bars).iter().flatten() {
            self.push(judge, &unit, reading, || {
                seen(reading.metric, &unit, tenant.episode(reading.metric), limits)
            });
        }
        if tenant.summary.score_ppm < 1_000_000 {
            self.scores.push((name.clone(), tenant.summary.score_ppm));
        }
    }

    fn push(&mut self, judge: &Judge, unit: &Unit, reading: &Reading, seen: impl Fn() -> String) {
        let score_ppm = score(reading, self.theta_ppm);
        let trouble = reading.state.is_trouble();
        self.score_ppm = self.score_ppm.min(score_ppm);
        if reading.state == State::Clear && score_ppm == 1_000_000 {
            return;
        }
        let report = |with_text: bool| UnitReport {
            unit: unit.clone(),
            metric: reading.metric,
            state: reading.state,
            bits: reading.bits,
            budget: reading.budget,
            score_ppm,
            seen: match reading.state {
                _ if !with_text => String::new(),
                State::Error => "its counts are out of range and cannot be computed with".to_owned(),
                State::Shared => format!(
                    "{}; the baseline is over the limit too, so it is not the new version's",
                    seen()
                ),
                _ => seen(),
            },
            limits: if with_text {
                judge.limits_of(unit, reading.metric)
            } else {
                String::new()
            },
        };
        let is_worst = self
            .worst_tenant
            .as_ref()
            .is_none_or(|worst| (score_ppm, worst.bits) < (worst.score_ppm, reading.bits));
        if matches!(unit, Unit::Tenant(_)) && score_ppm < 1_000_000 && is_worst {
            self.worst_tenant = Some(report(true));
        }
        if reading.state == State::Clear {
            if reading.bits >= reading.budget / 4 && self.watched.len() < WATCHED {
                self.watched.push(report(true));
            }
            return;
        }
        let report = report(trouble);
        if trouble
            && self
                .worst
                .as_ref()
                .is_none_or(|worst| rank(&report) < rank(worst))
        {
            self.worst = Some(report.clone());
        }
        self.units.push(report);
    }

    /// Tenants that the policy calls critical must be judged.
    pub(super) fn require_critical(&mut self, judge: &Judge) {
        let least = judge.policy.rollout.min_coverage.requests;
        for name in judge.policy.rollout.critical() {
            let tenant = judge
                .roster
                .find(name)
                .map(|number| &judge.tenants[number as usize]);
            let requests = tenant.map_or(0, |tenant| tenant.canary_requests);
            if requests < least {
                self.missing.push(format!(
                    "critical tenant {name} has {requests} canary requests, fewer than {least}"
                ));
            }
        }
    }

    pub(super) fn has_breach(&self) -> bool {
        self.units.iter().any(|report| report.state == State::Breach)
    }

    pub(super) fn conclude(mut self, judge: &Judge, window: &Window) -> Outcome {
        let policy = &judge.policy.rollout;
        let tally = &judge.tally;
        let traffic_ppm = share_ppm(tally.judged_requests, tally.canary_requests);
        let tenants_ppm = share_ppm(tally.judged_tenants.into(), tally.tenants.into());
        let least = policy.min_coverage.requests;
        if traffic_ppm < policy.min_coverage.traffic.ppm {
            self.missing.push(format!(
                "only {} of the canary's requests belong to tenants with at least {least} requests and no suspicion",
                percent(u128::from(traffic_ppm) * 1_000),
            ));
        }
        if tenants_ppm < policy.min_coverage.tenants.ppm {
            self.missing.push(format!(
                "only {} of {} tenants on the canary have at least {least} requests and no suspicion",
                tally.judged_tenants, tally.tenants,
            ));
        }
        if judge.clock.windows < policy.min_windows {
            self.missing.push(format!(
                "only {} of at least {} windows were judged",
                judge.clock.windows, policy.min_windows
            ));
        }
        let trouble = self.units.iter().any(|report| report.state.is_trouble());
        let verdict = if judge.clock.halted {
            Verdict::Rollback
        } else if trouble || !self.missing.is_empty() {
            Verdict::Hold
        } else {
            Verdict::Approve
        };
        let by_deadline = judge.clock.expired.is_some();
        let confidence = 1_000_000_u32.saturating_sub(u32::try_from(policy.alpha.ppb / 1_000).unwrap_or(0));
        let reason = judge
            .clock
            .expired
            .clone()
            .unwrap_or_else(|| self.reason(judge, verdict, traffic_ppm));
        // One report for each unit and metric: the most serious.
        self.units.sort_by(|a, b| {
            (&a.unit, a.metric, b.state.severity()).cmp(&(&b.unit, b.metric, a.state.severity()))
        });
        self.units
            .dedup_by(|b, a| (&a.unit, a.metric) == (&b.unit, b.metric));
        self.scores.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        self.scores.truncate(WORST);
        let agents = |count: fn(&crate::evidence::Coverage) -> u32| {
            u128::from(count(&window.canary)) + u128::from(count(&window.baseline))
        };
        Outcome {
            window: window.number,
            verdict,
            score_ppm: self.score_ppm,
            halted: judge.clock.halted,
            reason,
            worst_tenant: self.worst.as_ref().and(self.worst_tenant.as_ref()).and_then(
                |report| match &report.unit {
                    Unit::Tenant(name) => Some(name.clone()),
                    Unit::Fleet | Unit::Cohort(_) => None,
                },
            ),
            worst: self.worst,
            units: self.units,
            watched: self.watched,
            deadline: None,
            missing: self.missing,
            worst_tenants: self.scores,
            confidence_ppm: (verdict != Verdict::Hold && !by_deadline).then_some(confidence),
            traffic_ppm,
            tenants_ppm,
            agents_ppm: share_ppm(agents(|arm| arm.reported), agents(|arm| arm.expected)),
            tenants: tally.states,
        }
    }

    fn reason(&self, judge: &Judge, verdict: Verdict, traffic_ppm: u32) -> String {
        let alpha = percent(judge.policy.rollout.alpha.ppb.into());
        match (verdict, &self.worst) {
            (Verdict::Rollback, Some(worst)) => format!(
                "{} on {}: {}{}; evidence {} bits of {} needed; of healthy rollouts at most {alpha} ever \
                 show a breach",
                unit_name(&worst.unit),
                worst.metric.as_str(),
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
            (Verdict::Approve, _) => {
                let totals = judge.groups[0].totals;
                let required = judge.policy.defaults.required.iter();
                let claims: Vec<_> = required.map(|requirement| claim(judge, *requirement)).collect();
                format!(
                    "no tenant is suspected; over {} canary requests the error rate is {} on the canary and {} on the \
                     baseline; proven, with error probability {alpha}: {}; {} of the canary's requests are in tenants \
                     that were judged",
                    totals.canary.requests,
                    percent_of(totals.canary.events, totals.canary.requests),
                    percent_of(totals.baseline.events, totals.baseline.requests),
                    claims.join(" and "),
                    percent(u128::from(traffic_ppm) * 1_000),
                )
            }
        }
    }

    /// Of a finding about several tenants: the one that it shows in most.
    fn where_from(&self, worst: &UnitReport) -> String {
        match (&worst.unit, &self.worst_tenant) {
            (Unit::Fleet | Unit::Cohort(_), Some(tenant)) if tenant.seen != worst.seen => {
                format!("; worst in {}: {}", unit_name(&tenant.unit), tenant.seen)
            }
            (Unit::Fleet | Unit::Cohort(_), Some(tenant)) => {
                format!("; all of it in {}", unit_name(&tenant.unit))
            }
            _ => String::new(),
        }
    }
}

/// What is proven when a requirement is met.
fn claim(judge: &Judge, requirement: Requirement) -> String {
    match requirement {
        Requirement::Errors => {
            let mut limits = judge.tests.iter().map(|tests| tests.thresholds.max_rate_ppb);
            let first = limits.next().unwrap_or(judge.limits.max_rate_ppb);
            if limits.all(|limit| limit == first) {
                format!("the canary's error rate is below {}", percent(first.into()))
            } else {
                "the canary's error rate is below the mean of its tenants' limits".to_owned()
            }
        }
        Requirement::Latency => "less than 1 % of the canary's requests are over their p99 limit".to_owned(),
        Requirement::Pool => {
            let limit = judge
                .policy
                .defaults
                .pool
                .map_or(0, |pool| pool.max_wait_rate.ppb);
            format!(
                "fewer than {} of the canary's acquires of a connection wait",
                percent(limit.into())
            )
        }
    }
}

/// Ends a HOLD: says what follows, and returns the verdict.
pub(super) fn expire(
    outcome: &mut Outcome,
    deadline: Deadline,
    allowed_us: u64,
    is_compared: bool,
) -> Verdict {
    let trouble = outcome.units.iter().any(|report| report.state.is_trouble());

    let verdict = match deadline.action {
        OnDeadline::Rollback => Verdict::Rollback,
        OnDeadline::Approve if trouble || !is_compared => Verdict::Rollback,
        OnDeadline::Approve => Verdict::Approve,
        OnDeadline::Hold => Verdict::Hold,
    };
    let what = match (deadline.action, verdict) {
        (OnDeadline::Approve, Verdict::Approve) => "approve, as nothing is suspected",
        (OnDeadline::Approve, _) => "approve, but not everything is in order",
        (action, _) => action.as_str(),
    };
    outcome.reason = format!(
        "on HOLD for {}, as long as hold_deadline allows (on_deadline: {what}); last: {}",
        span(allowed_us),
        outcome.reason
    );
    outcome.verdict = verdict;
    outcome.halted = verdict == Verdict::Rollback;
    outcome.confidence_ppm = None;
    verdict
}

/// Orders reports: breaches first, of tenants, then cohorts, then the fleet; then the lowest score, the more serious state,
/// and the most evidence.
fn rank(report: &UnitReport) -> (bool, u8, u32, std::cmp::Reverse<(u8, Bits)>) {
    let breach = report.state == State::Breach;
    let width = match report.unit {
        Unit::Tenant(_) => 0,
        Unit::Cohort(_) => 1,
        Unit::Fleet => 2,
    };
    let weight = std::cmp::Reverse((report.state.severity(), report.bits));
    (!breach, if breach { width } else { 0 }, report.score_ppm, weight)
}

pub(super) fn unit_name(unit: &Unit) -> String {
    match unit {
        Unit::Fleet => "the fleet".to_owned(),
        Unit::Cohort(name) => format!("cohort {name}"),
        Unit::Tenant(name) => format!("tenant {name}"),
    }
}

/// What was seen, in one clause: observed, expected, requests.
pub(super) fn seen(metric: Metric, unit: &Unit, episode: Episode, limits: Thresholds) -> String {
    // Tenants have limits of their own, which several tenants together need not share.
    let is_tenant = matches!(unit, Unit::Tenant(_));
    let failed = if metric == Metric::Probes {
        "probes"
    } else {
        "requests"
    };
    match episode {
        Episode::Live(arms) => seen_live(arms, limits, failed),
        Episode::Limit(arms) if metric == Metric::LatencySla => {
            seen_slow(arms, limits.p99_us.filter(|_| is_tenant))
        }
        Episode::Limit(Arms { canary, .. }) => format!(
            "{} of {} canary {failed} failed ({}); at most {} is allowed",
            canary.events,
            canary.requests,
            percent_of(canary.events, canary.requests),
            if is_tenant {
                percent(u128::from(limits.max_rate_ppb))
            } else {
                "each tenant's limit".to_owned()
            },
        ),
        Episode::Tail(counts, q, marks) => {
            seen_tail(&counts, q, marks.limits_ns(q, limits.margin_buckets), limits)
        }
    }
}

fn seen_live(Arms { canary, baseline }: Arms, limits: Thresholds, what: &str) -> String {
    if canary.requests == 0 || baseline.requests == 0 {
        return format!("not compared yet: no {what} on both arms");
    }
    let baseline_ppb = u128::from(baseline.events) * 1_000_000_000 / u128::from(baseline.requests.max(1));
    let tolerated =
        baseline_ppb * u128::from(limits.max_ratio_milli) / 1_000 + u128::from(limits.max_increase_ppb);
    format!(
        "{} of {} canary {what} failed ({}), on the baseline {} of {} ({}); up to {} is tolerated",
        canary.events,
        canary.requests,
        percent_of(canary.events, canary.requests),
        baseline.events,
        baseline.requests,
        percent(baseline_ppb),
        percent(tolerated.min(1_000_000_000)),
    )
}

fn seen_slow(Arms { canary, .. }: Arms, limit_us: Option<u64>) -> String {
    format!(
        "{} of {} canary requests took longer than {} ({}); at most 1 % is allowed",
        canary.events,
        canary.requests,
        limit_us.map_or_else(|| "their tenant's limit".to_owned(), micros),
        percent_of(canary.events, canary.requests),
    )
}

fn seen_tail(counts: &TailCounts, q: usize, limits_ns: Option<(u64, u64)>, limits: Thresholds) -> String {
    let quantile = QUANTILE_PPM[q] / 10_000;
    let over = |over: u32, count: u32| percent_of(over.into(), count.into());
    let (canary_over, baseline_over) = (counts.canary_over[q], counts.baseline_over[q]);
    let (on_canary, on_baseline) = (
        over(canary_over, counts.canary),
        over(baseline_over, counts.baseline),
    );
    let margin = margin(limits.margin_buckets);
    match limits_ns {
        Some((tau, with_margin)) => format!(
            "{canary_over} of {} canary requests took longer than {} ({on_canary}), on the baseline {baseline_over} of {} \
             longer than {}, its p{quantile} ({on_baseline}); {margin} slower is tolerated",
            counts.canary,
            micros(with_margin / 1_000),
            counts.baseline,
            micros(tau / 1_000),
        ),
        None => format!(
            "{canary_over} of {} canary requests took longer than their tenant's p{quantile} on the baseline and {margin}, \
             which is tolerated ({on_canary}); on the baseline {baseline_over} of {} took longer than that p{quantile} \
             ({on_baseline})",
            counts.canary, counts.baseline,
        ),
    }
}

/// A margin of so many buckets, in percent.
pub(super) fn margin(buckets: u32) -> String {
    // Buckets are bounded by powers of the same ratio, so any two that far apart will do; these are near a second.
    let bound = |index: u32| {
        i32::try_from(index)
            .ok()
            .and_then(upper_bound_ns)
            .unwrap_or(u64::MAX)
    };
    let (low, high) = (bound(0), bound(buckets));
    percent(u128::from(high - low) * 1_000_000_000 / u128::from(low))
}

/// The health score of a unit on a metric: 1 without evidence, theta at the budget, 0 at twice the budget.
///
/// For u = bits / budget: 1 - (1 - theta) u up to u = 1, theta (2 - u) up to 2, then 0. So the score is below theta if
/// and only if the unit is in breach.
pub(super) fn score(reading: &Reading, theta_ppm: u32) -> u32 {
    let budget = i128::from(reading.budget.max(1));
    let theta = i128::from(theta_ppm);
    let mut bits = i128::from(reading.bits.max(0));
    if reading.state != State::Breach {
        bits = bits.min(budget);
    }
    let ppm = if bits <= budget && reading.state != State::Breach {
        1_000_000 - (1_000_000 - theta) * bits / budget
    } else {
        (theta * (2 * budget - bits).max(0) / budget).min(theta - 1)
    };
    u32::try_from(ppm.clamp(0, 1_000_000)).unwrap_or(0)
}

fn share_ppm(part: u128, whole: u128) -> u32 {
    if whole == 0 {
        return 0;
    }
    u32::try_from(part * 1_000_000 / whole).unwrap_or(1_000_000)
}

/// Evidence with one decimal.
pub(super) fn bits_text(bits: Bits) -> String {
    let tenths = i128::from(bits) * 10 / i128::from(ONE);
    let sign = if tenths < 0 { "-" } else { "" };
    format!("{sign}{}.{}", tenths.abs() / 10, tenths.abs() % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(metric: Metric, state: State, bits: Bits) -> Reading {
        Reading {
            metric,
            state,
            bits,
            budget: 20 * ONE,
        }
    }

    #[test]
    fn the_score_goes_from_one_to_theta_at_the_budget_and_to_nothing_at_twice_the_budget() {
        let score = |state, bits| score(&reading(Metric::ErrorsLive, state, bits), 950_000);
        assert_eq!(score(State::Clear, -5 * ONE), 1_000_000);
        assert_eq!(score(State::Clear, 0), 1_000_000);
        assert_eq!(score(State::Suspect, 10 * ONE), 975_000);
        assert_eq!(score(State::Suspect, 20 * ONE), 950_000);
        // Below theta if and only if in breach, also at the budget itself.
        assert_eq!(score(State::Breach, 20 * ONE), 949_999);
        assert_eq!(score(State::Shared, 25 * ONE), 950_000);
        assert_eq!(score(State::Breach, 30 * ONE), 475_000);
        assert_eq!(score(State::Breach, 40 * ONE), 0);
        assert_eq!(score(State::Breach, Bits::MAX), 0);
    }

    #[test]
    fn a_summary_is_the_worst_of_its_readings() {
        let summary = |states: &[(Metric, State, Bits)]| {
            let readings: Vec<_> = states
                .iter()
                .map(|(metric, state, bits)| Some(reading(*metric, *state, *bits)))
                .collect();
            let summary = super::summary(&readings, 950_000);
            (
                summary.state,
                summary.score_ppm,
                summary.suspected,
                summary.notable,
            )
        };
        let clear = (Metric::ErrorsLive, State::Clear, 0);
        assert_eq!(summary(&[]), (State::Clear, 1_000_000, false, false));
        assert_eq!(summary(&[clear]), (State::Clear, 1_000_000, false, false));
        // Against the live baseline nothing can be proven, so CLEAR there does not take PROVEN away; elsewhere it does.
        let proven = (Metric::ErrorsSla, State::Proven, -ONE);
        assert_eq!(summary(&[clear, proven]), (State::Proven, 1_000_000, false, true));
        let slow = (Metric::LatencySla, State::Clear, 2 * ONE);
        assert_eq!(
            summary(&[clear, proven, slow]),
            (State::Clear, 995_000, false, true)
        );
        let suspect = (Metric::LatencyLive, State::Suspect, 10 * ONE);
        assert_eq!(summary(&[suspect, proven]), (State::Suspect, 975_000, true, true));
        let breach = (Metric::Probes, State::Breach, 40 * ONE);
        assert_eq!(summary(&[suspect, breach, clear]), (State::Breach, 0, true, true));
    }

    #[test]
    fn the_worst_report_is_a_breach_of_the_narrowest_unit_with_the_most_evidence() {
        let report = |unit: &str, state, score_ppm, bits| UnitReport {
            unit: match unit {
                "fleet" => Unit::Fleet,
                "tail" => Unit::Cohort("tail".to_owned()),
                name => TenantName::parse(name.as_bytes()).map(Unit::Tenant).unwrap(),
            },
            metric: Metric::ErrorsLive,
            state,
            bits,
            budget: ONE,
            score_ppm,
            seen: String::new(),
            limits: String::new(),
        };
        let mut reports = [
            report("fleet", State::Suspect, 960_000, 9),
            report("c", State::Shared, 970_000, 7),
            report("d", State::Error, 970_000, 0),
            report("fleet", State::Breach, 0, 90),
            report("tail", State::Breach, 0, 95),
            report("a", State::Breach, 0, 20),
            report("b", State::Breach, 0, 30),
        ];
        reports.sort_by_key(rank);
        let order: Vec<_> = reports.iter().map(|report| report.unit.to_string()).collect();
        let wanted = [
            "tenant:b",
            "tenant:a",
            "cohort:tail",
            "fleet",
            "fleet",
            "tenant:d",
            "tenant:c",
        ];
        assert_eq!(order, wanted);
    }

    #[test]
    fn shares_margins_and_bits_are_shown_in_short() {
        assert_eq!(
            (share_ppm(1, 3), share_ppm(0, 0), share_ppm(5, 5)),
            (333_333, 0, 1_000_000)
        );
        assert_eq!([0, 1, 2, 16].map(margin), ["0 %", "4.43 %", "9.05 %", "100 %"]);
        assert_eq!(
            [0, 19 * ONE + ONE / 2, -ONE / 4].map(bits_text),
            ["0.0", "19.5", "-0.2"]
        );
    }
}
