//! Where the error probability of a rollout is spent.
//!
//! A rollout over many tenants asks many questions, many times. Each question (a unit and a metric) gets
//! a share w of alpha, fixed before its evidence is seen, and halts when its e-process reaches
//! 1 / (alpha w). By Ville's inequality a healthy rollout crosses that bound, ever, with probability at
//! most alpha w; by Bonferroni's it crosses any bound with probability at most alpha, as the shares add
//! up to at most 1, whatever the dependence between tenants.
//!
//! | share | of | goes to |
//! |---|---|---|
//! | 3/8 | alpha | the tenants known at the start, equal parts |
//! | 1/8 | alpha | tenants that appear later: the b-th group of newcomers gets 6/(pi b)^2 of it, in equal parts |
//! | 1/4 | alpha | the fleet |
//! | 1/4 | alpha | cohorts; not judged by judge-fx/1, so this part is not spent |
//! | 1/4 | a unit | `errors/live` |
//! | 1/4 | a unit | `errors/sla` |
//! | 1/8 | a unit | `latency/sla` |
//! | 3/8 | a unit | `latency/live`, `pool`, `gaps`; not judged by judge-fx/1 |
//!
//! Newcomers share by groups, one group for each window in which some appear, because 6/pi^2 sum(1/b^2) = 1
//! and a group's size is known from request counts alone, which say nothing about who fails: a bound that
//! depends only on counts of requests leaves the e-process valid, since that holds given the counts.

use crate::fixed::{Bits, OutOfRange, log2_ceil};

/// What is asked about a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Error rate against the live baseline.
    ErrorsLive,
    /// Error rate against the SLA.
    ErrorsSla,
    /// Share of slow requests against the SLA.
    LatencySla,
    /// Agents that did not report; a rule, not a test.
    Gaps,
}

impl Metric {
    /// The metrics that are tests, in the order in which they are listed.
    pub const TESTS: [Self; 3] = [Self::ErrorsLive, Self::ErrorsSla, Self::LatencySla];

    /// The metric's name in outcomes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ErrorsLive => "errors/live",
            Self::ErrorsSla => "errors/sla",
            Self::LatencySla => "latency/sla",
            Self::Gaps => "gaps",
        }
    }

    /// One divided by the metric's share of a unit.
    const fn parts(self) -> u128 {
        match self {
            Self::ErrorsLive | Self::ErrorsSla => 4,
            Self::LatencySla => 8,
            Self::Gaps => 16,
        }
    }
}

/// A unit's share of alpha, as a fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    numerator: u128,
    denominator: u128,
}

impl Share {
    /// The fleet's.
    pub const FLEET: Self = Self {
        numerator: 1,
        denominator: 4,
    };

    /// That of each of `count` tenants known at the start.
    pub fn of_known(count: usize) -> Self {
        Self {
            numerator: 3,
            denominator: 8 * count.max(1) as u128,
        }
    }

    /// That of each of `count` tenants of the `group`-th group of newcomers, from 1.
    pub fn of_newcomers(group: u32, count: usize) -> Self {
        // 6 / pi^2 = 0.60792710..., rounded down.
        let group = u128::from(group);
        Self {
            numerator: 607_927,
            denominator: 8 * 1_000_000 * group * group * count.max(1) as u128,
        }
    }
}

/// Evidence at which a unit halts on a metric: log2(1 / (alpha w)), rounded up.
pub fn budget(alpha_ppb: u64, share: Share, metric: Metric) -> Result<Bits, OutOfRange> {
    log2_ceil(
        1_000_000_000 * share.denominator * metric.parts(),
        u128::from(alpha_ppb) * share.numerator,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixed::ONE;

    #[test]
    fn budgets_are_what_the_table_says() {
        // 1 / (0.01 * 1/4 * 1/4) = 1600; log2 = 10.6438...
        let fleet = budget(10_000_000, Share::FLEET, Metric::ErrorsLive).unwrap();
        assert_eq!(fleet * 10_000 / ONE, 106_438);
        // 1 / (0.01 * 3/8/200 * 1/4) = 213333; log2 = 17.7027...
        let tenant = budget(10_000_000, Share::of_known(200), Metric::ErrorsLive).unwrap();
        assert_eq!(tenant * 10_000 / ONE, 177_027);
        let latency = budget(10_000_000, Share::of_known(200), Metric::LatencySla).unwrap();
        assert!((latency - tenant - ONE).abs() <= 8);
    }

    #[test]
    fn the_shares_never_add_up_to_more_than_one() {
        // In units of 1 / (8 * 10^12): known, newcomers over very many groups, fleet, cohorts.
        let scale = 8 * 10_u128.pow(12);
        let part = |share: Share, count: u128| (share.numerator * scale).div_ceil(share.denominator) * count;
        let newcomers: u128 = (1..200_000)
            .map(|group| part(Share::of_newcomers(group, 1), 1))
            .sum();
        let total = part(Share::of_known(200), 200) + newcomers + 2 * part(Share::FLEET, 1);
        assert!(total <= scale, "{total} of {scale}");
        assert!(total > scale * 999 / 1000);
        let metrics = Metric::TESTS
            .map(|metric| 16 / metric.parts())
            .iter()
            .sum::<u128>();
        assert_eq!(
            metrics, 10,
            "10/16 are spent; 6/16 are latency/live, pool and gaps"
        );
    }
}
