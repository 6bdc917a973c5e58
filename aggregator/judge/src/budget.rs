//! Where the error probability of a rollout is spent: the ledger of alpha.
//!
//! A rollout over many tenants asks many questions, many times. Each question (a unit and a metric) gets a share w of
//! alpha, fixed before its evidence is seen, and halts when its e-process reaches 1 / (alpha w). By Ville's inequality
//! a healthy rollout crosses that bound, ever, with probability at most alpha w; by Bonferroni's it crosses any
//! bound with probability at most alpha, as the shares add up to at most 1, whatever the dependence between tenants.
//! (The weights are Holm's 1979 and older; that an e-process may be stopped at any time is Ville's. Procedures for the
//! false discovery rate, such as e-BH, do not keep their promise when a halt is latched: arXiv 2501.19360.)
//!
//! | of alpha | goes to |
//! |---|---|
//! | 5/8 | the tenants known at the start, equal parts; 6/8 where there are no cohorts |
//! | 1/8 | the reserve: the b-th group of newcomers gets 6/(pi b)^2 of it, in equal parts |
//! | 1/8 | the fleet |
//! | 1/8 | the cohorts, equal parts |
//!
//! | of a unit | tenant, cohort | fleet |
//! |---|---|---|
//! | `errors/live` | 5/16 | 4/16 |
//! | `errors/sla` | 4/16 | 3/16 |
//! | `latency/live` | 4/16 | 4/16 |
//! | `latency/sla` | 2/16 | 2/16 |
//! | `probes` | 1/16 | 1/16 |
//! | `pool` | | 1/16 |
//! | `gaps` | | 1/16 |
//!
//! `probes` and `pool` ask two questions, against the baseline and against the limit, with half of the share each.
//! Halving a share costs one bit, two to three canary requests at 15 % errors. The fleet sees most requests, so it can
//! afford the smaller share.
//!
//! Newcomers share by groups, one group for each window in which some appear: 6/pi^2 sum(1/b^2) = 1, and a group's
//! size is known from request counts alone, which say nothing about who fails. A bound that depends only on counts of
//! requests leaves the e-process valid, since that holds given the counts.

use crate::fixed::{Bits, OutOfRange, log2_ceil};

/// What is asked about a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Error rate against the live baseline.
    ErrorsLive,
    /// Error rate against the SLA.
    ErrorsSla,
    /// Latency against the live baseline.
    LatencyLive,
    /// Share of slow requests against the SLA.
    LatencySla,
    /// Waits and timeouts at the connection pool.
    Pool,
    /// Active checks that failed.
    Probes,
    /// Agents that fell silent.
    Gaps,
}

/// How many metrics there are.
pub const METRICS: usize = Metric::ALL.len();

impl Metric {
    /// All metrics, in the order in which they are listed.
    pub const ALL: [Self; 7] = [
        Self::ErrorsLive,
        Self::ErrorsSla,
        Self::LatencyLive,
        Self::LatencySla,
        Self::Pool,
        Self::Probes,
        Self::Gaps,
    ];

    /// The metric's name in outcomes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ErrorsLive => "errors/live",
            Self::ErrorsSla => "errors/sla",
            Self::LatencyLive => "latency/live",
            Self::LatencySla => "latency/sla",
            Self::Pool => "pool",
            Self::Probes => "probes",
            Self::Gaps => "gaps",
        }
    }

    /// How many questions share the metric's part: two where both the baseline and a limit are asked.
    pub const fn questions(self) -> u128 {
        match self {
            Self::Pool | Self::Probes => 2,
            _ => 1,
        }
    }

    /// Sixteenths of a tenant's or a cohort's share.
    const fn of_tenant(self) -> u128 {
        match self {
            Self::ErrorsLive => 5,
            Self::ErrorsSla | Self::LatencyLive => 4,
            Self::LatencySla => 2,
            Self::Probes => 1,
            Self::Pool | Self::Gaps => 0,
        }
    }

    /// Sixteenths of the fleet's share.
    const fn of_fleet(self) -> u128 {
        match self {
            Self::ErrorsLive | Self::LatencyLive => 4,
            Self::ErrorsSla => 3,
            Self::LatencySla => 2,
            Self::Probes | Self::Pool | Self::Gaps => 1,
        }
    }
}

/// A unit's share of alpha, as a fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    numerator: u128,
    denominator: u128,
}

/// Evidence at which one unit halts, by metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The unit's share of alpha.
    pub share: Share,
    budgets: [Bits; METRICS],
}

impl Grant {
    /// Evidence at which the unit halts on one question about `metric`: log2(1 / (alpha w)), rounded up.
    pub const fn budget(&self, metric: Metric) -> Bits {
        self.budgets[metric as usize]
    }
}

impl Share {
    /// In parts per billion, rounded down.
    pub fn ppb(self) -> u128 {
        self.numerator * 1_000_000_000 / self.denominator
    }
}

/// One line of the account: who was given which share of alpha.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Who.
    pub holder: Holder,
    /// How many units share it.
    pub units: usize,
    /// All of them together.
    pub share: Share,
}

/// Who holds a part of alpha.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// The fleet.
    Fleet,
    /// All cohorts.
    Cohorts,
    /// The tenants known at the start.
    Known,
    /// A group of newcomers, from 1.
    Newcomers(u32),
}

/// The ledger of one rollout.
#[derive(Debug, Clone)]
pub struct Ledger {
    alpha_ppb: u64,
    cohorts: usize,
    entries: Vec<Entry>,
    groups: u32,
}

const fn share(numerator: u128, denominator: u128) -> Share {
    Share {
        numerator,
        denominator,
    }
}

impl Ledger {
    /// The ledger of a rollout that is wrongly halted with probability `alpha_ppb` at most, with so many cohorts.
    pub fn new(alpha_ppb: u64, cohorts: usize) -> Self {
        Self {
            alpha_ppb,
            cohorts,
            entries: Vec::new(),
            groups: 0,
        }
    }

    /// Gives the fleet its share.
    pub fn fleet(&mut self) -> Result<Grant, OutOfRange> {
        self.grant(Holder::Fleet, 1, share(1, 8), Metric::of_fleet)
    }

    /// Gives each cohort its share.
    pub fn cohorts(&mut self) -> Result<Grant, OutOfRange> {
        self.grant(Holder::Cohorts, self.cohorts, share(1, 8), Metric::of_tenant)
    }

    /// Gives each of `count` tenants known at the start its share.
    pub fn known(&mut self, count: usize) -> Result<Grant, OutOfRange> {
        let eighths = if self.cohorts == 0 { 6 } else { 5 };
        self.grant(Holder::Known, count, share(eighths, 8), Metric::of_tenant)
    }

    /// Gives each of `count` tenants that appear together its share of the reserve.
    pub fn newcomers(&mut self, count: usize) -> Result<Grant, OutOfRange> {
        self.groups = self.groups.saturating_add(1);
        // 6 / pi^2 = 0.60792710..., rounded down.
        let group = u128::from(self.groups);
        let part = share(607_927, 8 * 1_000_000 * group * group);
        self.grant(Holder::Newcomers(self.groups), count, part, Metric::of_tenant)
    }

    /// What was given to whom, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What is left for tenants that appear later, in parts per billion of alpha.
    pub fn reserve_ppb(&self) -> u128 {
        let spent = |entry: &Entry| match entry.holder {
            Holder::Newcomers(_) => entry.share.ppb() + 1,
            Holder::Fleet | Holder::Cohorts | Holder::Known => 0,
        };
        125_000_000_u128.saturating_sub(self.entries.iter().map(spent).sum())
    }

    fn grant(
        &mut self,
        holder: Holder,
        units: usize,
        all: Share,
        sixteenths: fn(Metric) -> u128,
    ) -> Result<Grant, OutOfRange> {
        let each = share(all.numerator, all.denominator * units.max(1) as u128);
        let mut budgets = [Bits::MAX; METRICS];
        for metric in Metric::ALL {
            if sixteenths(metric) > 0 {
                budgets[metric as usize] = log2_ceil(
                    1_000_000_000 * each.denominator * 16 * metric.questions(),
                    u128::from(self.alpha_ppb) * each.numerator * sixteenths(metric),
                )?;
            }
        }
        let share = all;
        self.entries.push(Entry { holder, units, share });
        Ok(Grant { share: each, budgets })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixed::ONE;

    #[test]
    fn budgets_are_what_the_table_says() {
        let mut ledger = Ledger::new(10_000_000, 3);
        // 1 / (0.01 * 1/8 * 4/16) = 3200; log2 = 11.6438...
        let fleet = ledger.fleet().unwrap();
        assert_eq!(fleet.budget(Metric::ErrorsLive) * 10_000 / ONE, 116_438);
        // 1 / (0.01 * 1/8 * 1/16 / 2) = 25600; log2 = 14.6438...
        assert_eq!(fleet.budget(Metric::Pool) * 10_000 / ONE, 146_438);
        assert_eq!(fleet.budget(Metric::Gaps) * 10_000 / ONE, 136_438);
        // 1 / (0.01 * 5/8/500 * 5/16) = 256000; log2 = 17.9657...
        let tenant = ledger.known(500).unwrap();
        assert_eq!(tenant.budget(Metric::ErrorsLive) * 10_000 / ONE, 179_657);
        assert_eq!(tenant.budget(Metric::Pool), Bits::MAX);
        let apart = tenant.budget(Metric::LatencySla) - tenant.budget(Metric::LatencyLive) - ONE;
        assert!(apart.abs() <= 2, "{apart}");
        // Without cohorts their part goes to the tenants.
        let alone = Ledger::new(10_000_000, 0).known(500).unwrap();
        assert_eq!(alone.share.ppb(), 1_500_000);
        assert_eq!(tenant.share.ppb(), 1_250_000);
        assert!(Ledger::new(0, 0).fleet().is_err());
    }

    #[test]
    fn the_shares_never_add_up_to_more_than_one() {
        for cohorts in [0, 4] {
            let mut ledger = Ledger::new(10_000_000, cohorts);
            ledger.fleet().unwrap();
            if cohorts > 0 {
                ledger.cohorts().unwrap();
            }
            ledger.known(200).unwrap();
            for _ in 0..20_000 {
                ledger.newcomers(3).unwrap();
            }
            // Rounded up, in parts per million million.
            let part =
                |entry: &Entry| (entry.share.numerator * 10_u128.pow(12)).div_ceil(entry.share.denominator);
            let total: u128 = ledger.entries().iter().map(part).sum();
            assert!(total <= 10_u128.pow(12), "{total}");
            assert!(total > 999 * 10_u128.pow(9), "{total}");
            assert!(ledger.reserve_ppb() < 30_000, "{}", ledger.reserve_ppb());
            assert_eq!(ledger.entries().last().unwrap().holder, Holder::Newcomers(20_000));
        }
        assert_eq!(Ledger::new(1, 0).reserve_ppb(), 125_000_000);
        for share in [Metric::of_tenant, Metric::of_fleet] {
            assert_eq!(Metric::ALL.map(share).iter().sum::<u128>(), 16);
        }
    }
}
