//! Collects what one scrape says about pools.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use coalmine_proto::pool::{MAX_NAME_BYTES, MAX_POOLS};

use super::{
    exposition::{Sample, Samples},
    mapping::{Mapping, Quantity, Role, Rule, Source, Unit, whole},
};

/// Most numbers that are taken from a scrape.
pub(super) const MAX_READINGS: usize = 4096;

/// An acquire that took longer than this, 10 ms, has waited. A pool that tests a connection before it gives it
/// away does so within the time that it measures: that takes a round trip to the database, and is no wait.
const SLOW_NS: f64 = 1e7;

/// One number of one series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The pool's name; empty where it has none.
    pub pool: String,
    /// Who exposes it.
    pub source: Source,
    /// What it is.
    pub quantity: Quantity,
    /// Tells series of one quantity apart: a hash of the metric's name and of all labels.
    pub series: u64,
    /// How much.
    pub value: u64,
}

/// Takes the samples of a scrape.
#[derive(Debug)]
pub(super) struct Collector<'a> {
    mapping: &'a Mapping,
    readings: Vec<Reading>,
    /// What has been read, since an exposition may say things twice. Then the first holds.
    seen: HashSet<(Quantity, u64)>,
    pools: BTreeSet<String>,
    histograms: BTreeMap<u64, Buckets>,
    ignored: u64,
}

/// What matters of the buckets of one histogram.
#[derive(Debug)]
struct Buckets {
    pool: String,
    source: Source,
    /// The lowest limit from 10 ms on, in nanoseconds, and how many did not exceed it.
    fast: Option<(f64, u64)>,
    all: Option<u64>,
}

// === impl Collector ===

impl<'a> Collector<'a> {
    pub(super) fn new(mapping: &'a Mapping) -> Self {
        Self {
            mapping,
            readings: Vec::new(),
            seen: HashSet::new(),
            pools: BTreeSet::new(),
            histograms: BTreeMap::new(),
            ignored: 0,
        }
    }

    /// Samples that were beyond a limit.
    pub(super) fn ignored(&self) -> u64 {
        self.ignored
    }

    pub(super) fn finish(mut self) -> Vec<Reading> {
        for (series, buckets) in self.histograms {
            let (Some((_, fast)), Some(all)) = (buckets.fast, buckets.all) else {
                continue;
            };
            for (quantity, value) in [(Quantity::Timed, all), (Quantity::TimedFast, fast)] {
                self.readings.push(Reading {
                    pool: buckets.pool.clone(),
                    source: buckets.source,
                    quantity,
                    series,
                    value,
                });
            }
        }
        self.readings
    }

    fn take(&mut self, rule: &Rule, sample: &Sample<'_>) {
        let Some(pool) = rule.pool(sample) else {
            return;
        };
        let number = rule.role.number(sample.value);
        let bucket = match rule.role {
            Role::AcquireBucket(unit) => bucket(unit, sample),
            Role::Count(_) | Role::Time(..) => None,
        };
        if number.is_none() && bucket.is_none() {
            return;
        }
        // A bucket makes two numbers in the end.
        let places = if bucket.is_some() { 2 } else { 1 };
        let Some(pool) = self.pool(pool, places) else {
            self.ignored = self.ignored.saturating_add(1);
            return;
        };
        if let Some((quantity, value)) = number {
            let series = series(rule, sample, "");
            if self.seen.insert((quantity, series)) {
                let source = rule.source;
                self.readings.push(Reading {
                    pool,
                    source,
                    quantity,
                    series,
                    value,
                });
            }
        } else if let Some((limit_ns, value)) = bucket {
            let series = series(rule, sample, "le");
            let buckets = self.histograms.entry(series).or_insert_with(|| Buckets {
                pool,
                source: rule.source,
                fast: None,
                all: None,
            });
            buckets.add(limit_ns, value);
        }
    }

    /// The name as it is shown, if there is room for so many more numbers, and for a pool that is new.
    fn pool(&mut self, name: &str, places: usize) -> Option<String> {
        let taken = self.readings.len() + 2 * self.histograms.len();
        if taken + places > MAX_READINGS {
            return None;
        }
        let name = shown(name);
        if !self.pools.contains(&name) {
            if self.pools.len() >= MAX_POOLS {
                return None;
            }
            self.pools.insert(name.clone());
        }
        Some(name)
    }
}

impl Samples for Collector<'_> {
    fn is_wanted(&self, name: &str) -> bool {
        !self.mapping.find(name).is_empty()
    }

    fn sample(&mut self, sample: &Sample<'_>) {
        let mapping = self.mapping;
        for rule in mapping.find(sample.name) {
            self.take(rule, sample);
        }
    }
}

// === impl Buckets ===

impl Buckets {
    fn add(&mut self, limit_ns: f64, value: u64) {
        if limit_ns == f64::INFINITY {
            self.all = self.all.or(Some(value));
        } else if limit_ns >= SLOW_NS && self.fast.is_none_or(|(lowest, _)| limit_ns < lowest) {
            self.fast = Some((limit_ns, value));
        }
    }
}

/// The limit of a bucket and how many did not exceed it.
fn bucket(unit: Unit, sample: &Sample<'_>) -> Option<(f64, u64)> {
    let limit: f64 = sample.label("le")?.parse().ok()?;
    Some((limit * unit.ns(), whole(sample.value)?))
}

/// Tells series apart: all labels but one count, in any order.
fn series(rule: &Rule, sample: &Sample<'_>, but: &str) -> u64 {
    let mut labels: Vec<(&str, &str)> = sample
        .labels
        .iter()
        .map(|(name, value)| (*name, value.as_ref()))
        .filter(|(name, _)| *name != but)
        .collect();
    labels.sort_unstable();
    // Its keys are fixed: a series has the same number in each scrape.
    let mut hasher = DefaultHasher::new();
    (rule.name.as_str(), labels).hash(&mut hasher);
    hasher.finish()
}

/// A name that can be shown and sent anywhere: printable ASCII, and the rest of one that is too long cut off.
fn shown(name: &str) -> String {
    let chars = name.chars().take(MAX_NAME_BYTES);
    chars
        .map(|c| if matches!(c, ' '..='~') { c } else { '_' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_shown() {
        assert_eq!(shown("db-1:5432/shop \"x\""), "db-1:5432/shop \"x\"");
        assert_eq!(shown("zażółć\n"), "za_____");
        assert_eq!(shown(&"é".repeat(500)), "_".repeat(MAX_NAME_BYTES));
    }

    #[test]
    fn the_first_limit_from_10_ms_decides() {
        let fast_and_all = |unit: Unit, limits: &[(&str, u64)]| {
            let mut buckets = Buckets {
                pool: String::new(),
                source: Source::Hikari,
                fast: None,
                all: None,
            };
            for (limit, value) in limits {
                let limit: f64 = limit.parse().unwrap();
                buckets.add(limit * unit.ns(), *value);
            }
            (buckets.fast, buckets.all)
        };
        let seconds = [
            ("0.1", 9),
            ("0.001", 2),
            ("0.005", 3),
            ("0.01", 5),
            ("0.01", 6),
            ("0.05", 7),
            ("+Inf", 12),
            ("+Inf", 13),
        ];
        assert_eq!(
            fast_and_all(Unit::Seconds, &seconds),
            (Some((SLOW_NS, 5)), Some(12)),
            "0.01 s is 10 ms"
        );
        let millis = [("5.0", 3), ("10.0", 5), ("25.0", 7), ("+Inf", 8)];
        assert_eq!(fast_and_all(Unit::Millis, &millis), (Some((SLOW_NS, 5)), Some(8)));
        // Micrometer's.
        let between = [("0.009786709", 3), ("0.011184810", 5), ("+Inf", 8)];
        let (fast, _) = fast_and_all(Unit::Seconds, &between);
        assert_eq!(fast.map(|(_, value)| value), Some(5));
        // Where all limits are below, nothing can be said.
        assert_eq!(
            fast_and_all(Unit::Seconds, &[("0.005", 3), ("+Inf", 8)]),
            (None, Some(8))
        );
    }
}
