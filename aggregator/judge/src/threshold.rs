//! What the policy means for one tenant: plain integers, fixed when the rollout starts.
//!
//! A pure function of the policy, the tenant's own entry, its tier, and the history digest that the rollout pinned.
//! Nothing that the canary does can change a threshold while it is being judged, and a gap in the data can never
//! loosen one: a window with a gap is not in the history, and a tenant that the history does not know well has the
//! limits of the policy.
//!
//! With `adjust.from_history` and a tenant that the history knows well ([`TenantHistory::is_enough`]):
//!
//! | limit | follows | clipped to |
//! |---|---|---|
//! | `max_rate` | 2 x the error rate that nine in ten groups of windows did not exceed | `floor` to `ceiling` x the policy's |
//! | `p99` | 1.25 x the baseline's p99, rounded up to whole microseconds | the same |
//!
//! `margin` follows three times the usual difference of healthy arms, in whole buckets. That is a property of the
//! service's instances and not of a tenant, so it holds for every tenant, known or not; it is clipped to the policy's
//! margin and `ceiling` x that: history may only widen it. `max_ratio` and `max_increase` are never moved.

use std::fmt;

use coalmine_proto::names::TenantName;
use serde::Serialize;

use crate::{
    history::{History, TenantHistory},
    policy::{Adjust, ErrorLimits, LatencyLimits, MAX_LATENCY_US, Policy},
    quantity::{buckets, margin_buckets, micros, percent, times},
};

/// The tolerated error rate when the policy is silent, in parts per billion; a policy that is read is not.
const DEFAULT_MAX_RATE_PPB: u64 = 10_000_000;

/// The tolerated ratio of the canary's error rate to the baseline's when the policy is silent, in thousandths.
const DEFAULT_MAX_RATIO_MILLI: u64 = 1_250;

/// The tolerated difference between the two error rates when the policy is silent, in parts per billion.
const DEFAULT_MAX_INCREASE_PPB: u64 = 1_000_000;

/// The tolerated latency over the baseline's when the policy is silent, in parts per million.
pub const DEFAULT_MARGIN_PPM: u32 = 100_000;

/// The highest error rate that a limit can be, in parts per billion.
const MAX_RATE_PPB: u64 = 999_999_999;

/// The limits of one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Thresholds {
    /// Highest error rate that the SLA allows, in parts per billion.
    pub max_rate_ppb: u64,
    /// Tolerated ratio of the canary's error rate to the baseline's, in thousandths.
    pub max_ratio_milli: u64,
    /// Tolerated difference between the two error rates, in parts per billion.
    pub max_increase_ppb: u64,
    /// Latency that at most one request in a hundred may exceed, in microseconds.
    pub p99_us: Option<u64>,
    /// By how many buckets of the histogram the canary may be slower than the baseline.
    pub margin_buckets: u32,
}

impl Thresholds {
    /// The limits of `tenant`: its own entry, else its tier's, else the defaults; moved by the history.
    pub fn of(policy: &Policy, history: Option<&History>, tenant: &TenantName) -> Self {
        Derivation::of(policy, history, tenant).thresholds
    }

    /// The limits of a tenant that neither the policy nor the history names.
    pub fn default_of(policy: &Policy, history: Option<&History>) -> Self {
        Self::of(policy, history, &TenantName::none())
    }
}

/// The limits of one tenant, and where each comes from.
#[derive(Debug, Clone)]
pub struct Derivation<'a> {
    /// The limits.
    pub thresholds: Thresholds,
    tenant: &'a TenantName,
    tier: Option<&'a str>,
    /// What may move limits, if anything may.
    adjust: Option<Adjust>,
    knows: Knows<'a>,
    max_rate: Origin,
    max_ratio: Origin,
    max_increase: Origin,
    p99: Option<Origin>,
    margin: Margin,
}

/// What the history knows of the tenant.
#[derive(Debug, Clone, Copy)]
enum Knows<'a> {
    /// There is no history to ask, or nobody to ask about.
    NotAsked,
    Nothing,
    TooLittle(&'a TenantHistory),
    Enough(&'a TenantHistory),
}

/// The level of the policy that says a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Tenant,
    Tier,
    Defaults,
    BuiltIn,
}

/// Where one limit comes from.
#[derive(Debug, Clone, Copy)]
struct Origin {
    level: Level,
    policy: u64,
    /// What the history says, and whether a bound of the policy stopped it.
    moved: Option<(u64, Clip)>,
}

/// Where the margin comes from.
#[derive(Debug, Clone, Copy)]
struct Margin {
    level: Level,
    policy_ppm: u32,
    /// The arms' usual difference, what follows from it, and whether a bound of the policy stopped it.
    moved: Option<(u64, u64, Clip)>,
}

/// Whether a bound of the policy stopped the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clip {
    No,
    Floor,
    Ceiling,
}

/// One limit, for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// Its name in the policy.
    pub name: &'static str,
    /// What is judged; none where there is no limit.
    pub raw: Option<u64>,
    /// The same as text.
    pub value: String,
    /// Where it comes from.
    pub from: String,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.name, self.value, self.from)
    }
}

impl<'a> Derivation<'a> {
    /// Derives the limits of a tenant.
    pub fn of(policy: &'a Policy, history: Option<&'a History>, tenant: &'a TenantName) -> Self {
        let own = policy.tenants.get(tenant);
        let tier_name = own.and_then(|own| own.tier.as_deref());
        let tier = tier_name.and_then(|tier| policy.tiers.get(tier));
        let errors = Levels {
            tenant: own.map(|own| own.errors),
            tier: tier.map(|tier| tier.errors),
            defaults: policy.defaults.errors,
        };
        let latency = Levels {
            tenant: own.map(|own| own.latency),
            tier: tier.map(|tier| tier.latency),
            defaults: policy.defaults.latency,
        };
        let max_rate = errors.find(|limits: ErrorLimits| limits.max_rate);
        let max_ratio = errors.find(|limits: ErrorLimits| limits.max_ratio);
        let max_increase = errors.find(|limits: ErrorLimits| limits.max_increase);
        let p99 = latency.find(|limits: LatencyLimits| limits.p99);
        let margin = latency.find(|limits: LatencyLimits| limits.margin);

        let adjust = policy.adjust.filter(|adjust| adjust.from_history);
        let (adjust, history) = adjust.zip(history).unzip();
        let knows = Knows::of(history, tenant);
        let known = match knows {
            Knows::Enough(known) => adjust.map(|adjust| (adjust, known)),
            Knows::NotAsked | Knows::Nothing | Knows::TooLittle(_) => None,
        };
        let mut max_rate = Origin::new(
            max_rate.map(|(level, rate)| (level, rate.ppb)),
            DEFAULT_MAX_RATE_PPB,
        );
        let mut p99 = p99.map(|(level, span)| Origin::new(Some((level, span.micros)), 0));
        let mut max_rate_ppb = max_rate.policy;
        let mut p99_us = p99.map(|p99| p99.policy);
        if let Some((adjust, known)) = known {
            if let Some(seen) = known.error_p90_ppb {
                max_rate_ppb = max_rate.follow(seen, seen.saturating_mul(2), adjust, MAX_RATE_PPB);
            }
            if let (Some(origin), Some(seen)) = (&mut p99, known.p99_us) {
                let wanted = seen.saturating_mul(5).div_ceil(4);
                p99_us = Some(origin.follow(seen, wanted, adjust, MAX_LATENCY_US));
            }
        }
        let mut margin = match margin {
            Some((level, margin)) => Margin::new(level, margin.ppm),
            None => Margin::new(Level::BuiltIn, DEFAULT_MARGIN_PPM),
        };
        let margin_buckets = margin.follow(adjust.zip(history));
        let max_ratio = Origin::new(
            max_ratio.map(|(level, ratio)| (level, ratio.milli)),
            DEFAULT_MAX_RATIO_MILLI,
        );
        let max_increase = Origin::new(
            max_increase.map(|(level, points)| (level, points.ppb)),
            DEFAULT_MAX_INCREASE_PPB,
        );
        Self {
            thresholds: Thresholds {
                max_rate_ppb,
                max_ratio_milli: max_ratio.policy,
                max_increase_ppb: max_increase.policy,
                p99_us,
                margin_buckets,
            },
            tenant,
            tier: tier_name,
            adjust,
            knows,
            max_rate,
            max_ratio,
            max_increase,
            p99,
            margin,
        }
    }

    /// Each limit with its origin, always in the same order.
    pub fn limits(&self) -> [Limit; 5] {
        let all = self.thresholds;
        let of = |name, raw, value, from| Limit {
            name,
            raw: Some(raw),
            value,
            from,
        };
        let points = |ppb| rate(ppb).replace(" %", "pp");
        let p99 = self.p99.zip(all.p99_us);
        [
            of(
                "errors.max_rate",
                all.max_rate_ppb,
                rate(all.max_rate_ppb),
                self.source(&self.max_rate, rate, "x 2", "error rate"),
            ),
            of(
                "errors.max_ratio",
                all.max_ratio_milli,
                times(all.max_ratio_milli),
                self.level(self.max_ratio.level),
            ),
            of(
                "errors.max_increase",
                all.max_increase_ppb,
                points(all.max_increase_ppb),
                self.level(self.max_increase.level),
            ),
            match p99 {
                Some((origin, value)) => of(
                    "latency.p99",
                    value,
                    micros(value),
                    self.source(&origin, micros, "x 1.25", "latency"),
                ),
                None => Limit {
                    name: "latency.p99",
                    raw: None,
                    value: "not limited".to_owned(),
                    from: "no level of the policy sets it".to_owned(),
                },
            },
            of(
                "latency.margin",
                u64::from(all.margin_buckets),
                buckets(all.margin_buckets),
                self.margin_source(),
            ),
        ]
    }

    /// Where a limit that may follow history comes from.
    fn source(&self, origin: &Origin, show: fn(u64) -> String, factor: &str, what: &str) -> String {
        let policy = format!("{} {}", self.level(origin.level), show(origin.policy));
        match (origin.moved, self.knows) {
            (Some((seen, clip)), _) => {
                format!("{policy}; history {} {factor}{}", show(seen), self.clipped(clip))
            }
            (None, Knows::NotAsked) => policy,
            (None, Knows::Nothing) => format!("{policy}; the history does not know the tenant"),
            (None, Knows::TooLittle(known)) => format!(
                "{policy}; the history knows too little: {} requests in {} rollout{}",
                known.requests,
                known.rollouts,
                if known.rollouts == 1 { "" } else { "s" }
            ),
            (None, Knows::Enough(_)) => format!("{policy}; the history has no {what} of the tenant"),
        }
    }

    fn margin_source(&self) -> String {
        let Margin {
            level,
            policy_ppm,
            moved,
        } = self.margin;
        let policy = format!(
            "{} {}",
            self.level(level),
            percent(u128::from(policy_ppm) * 1_000)
        );
        match moved {
            None => policy,
            Some((difference, wanted, clip)) => format!(
                "{policy}; history: arms differ by {} buckets, x 3 = {wanted}{}",
                times(difference),
                match clip {
                    Clip::Floor => ", not below the policy's margin".to_owned(),
                    Clip::No | Clip::Ceiling => self.clipped(clip),
                }
            ),
        }
    }

    fn level(&self, level: Level) -> String {
        match level {
            Level::Tenant => format!("tenants.{}", self.tenant),
            Level::Tier => format!("tiers.{}", self.tier.unwrap_or_default()),
            Level::Defaults => "defaults".to_owned(),
            Level::BuiltIn => "built in".to_owned(),
        }
    }

    fn clipped(&self, clip: Clip) -> String {
        match (clip, self.adjust) {
            (Clip::Floor, Some(adjust)) => format!(", clipped to the floor {}x", times(adjust.floor.milli)),
            (Clip::Ceiling, Some(adjust)) => {
                format!(", clipped to the ceiling {}x", times(adjust.ceiling.milli))
            }
            _ => String::new(),
        }
    }
}

/// What each level of a policy says.
struct Levels<T> {
    tenant: Option<T>,
    tier: Option<T>,
    defaults: T,
}

impl<T: Copy> Levels<T> {
    /// The first level that says something.
    fn find<V>(&self, field: impl Fn(T) -> Option<V>) -> Option<(Level, V)> {
        let levels = [
            (Level::Tenant, self.tenant),
            (Level::Tier, self.tier),
            (Level::Defaults, Some(self.defaults)),
        ];
        levels
            .into_iter()
            .find_map(|(level, said)| Some((level, field(said?)?)))
    }
}

impl<'a> Knows<'a> {
    fn of(history: Option<&'a History>, tenant: &TenantName) -> Self {
        let Some(history) = history.filter(|_| *tenant != TenantName::none()) else {
            return Self::NotAsked;
        };
        match history.tenant(tenant) {
            None => Self::Nothing,
            Some(known) if known.is_enough() => Self::Enough(known),
            Some(known) => Self::TooLittle(known),
        }
    }
}

impl Origin {
    fn new(said: Option<(Level, u64)>, built_in: u64) -> Self {
        let (level, policy) = said.unwrap_or((Level::BuiltIn, built_in));
        Self {
            level,
            policy,
            moved: None,
        }
    }

    /// Moves the limit to `wanted`, within the policy's bounds and at most to `most`; gives what it is then.
    fn follow(&mut self, seen: u64, wanted: u64, adjust: Adjust, most: u64) -> u64 {
        let low = self.policy.saturating_mul(adjust.floor.milli).div_ceil(1_000);
        let high = (self.policy.saturating_mul(adjust.ceiling.milli) / 1_000).min(most);
        let (value, clip) = clip(wanted, low, high.max(self.policy));
        self.moved = Some((seen, clip));
        value
    }
}

impl Margin {
    fn new(level: Level, policy_ppm: u32) -> Self {
        Self {
            level,
            policy_ppm,
            moved: None,
        }
    }

    /// Widens the margin to what the history asks for, within the policy's bounds; gives what it is then, in buckets.
    fn follow(&mut self, history: Option<(Adjust, &History)>) -> u32 {
        let low = margin_buckets(self.policy_ppm);
        let Some((adjust, history)) = history else {
            return low;
        };
        let Some((difference, wanted)) = history.arm_difference_millibuckets.zip(history.margin_buckets())
        else {
            return low;
        };
        let widest_ppm = u64::from(self.policy_ppm).saturating_mul(adjust.ceiling.milli) / 1_000;
        let high = margin_buckets(u32::try_from(widest_ppm).unwrap_or(u32::MAX)).max(low);
        let (value, clip) = clip(wanted, u64::from(low), u64::from(high));
        self.moved = Some((difference, wanted, clip));
        u32::try_from(value).unwrap_or(high)
    }
}

fn clip(wanted: u64, low: u64, high: u64) -> (u64, Clip) {
    if wanted < low {
        (low, Clip::Floor)
    } else if wanted > high {
        (high, Clip::Ceiling)
    } else {
        (wanted, Clip::No)
    }
}

/// A rate as text; one that would be shown as nothing in percent is shown in parts per million.
fn rate(ppb: u64) -> String {
    if (1..10_000).contains(&ppb) {
        return format!("{} ppm", times(ppb));
    }
    percent(u128::from(ppb))
}

#[cfg(test)]
mod tests;
