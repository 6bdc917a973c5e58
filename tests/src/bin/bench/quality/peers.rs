//! The peers, from their documented semantics: what Flagger and Kayenta would do with the same windows.
//!
//! Both look once a minute. *Flagger* counts failed checks, a count that never falls, and rolls back at the fifth:
//! a check fails when less than 99 % of a minute's requests succeed, or when the minute's p99 is above the limit.
//! Tenants without requests are left alone (Flagger itself would call that a failure). *Kayenta* compares time
//! series with a point for each window (see [`kayenta`](super::kayenta)), and every tenant is critical, so that one
//! High halts. Latencies are given to it in milliseconds.

use std::collections::BTreeMap;

use coalmine_judge::evidence::{ArmCounts, TenantWindow};
use coalmine_proto::{
    histogram::{Histogram, upper_bound_ns},
    names::TenantName,
};

use super::kayenta::Pair;

/// Seconds between two looks.
const LOOK_SECONDS: u32 = 60;

/// Failed checks at which Flagger rolls back.
const FAILED_CHECKS: u32 = 5;

/// Share of requests that must succeed.
const SUCCESS: f64 = 0.99;

/// The peers' rules, in the order of the tables' columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    FlaggerErrors,
    FlaggerP99,
    FlaggerFleet,
    KayentaErrors,
    KayentaP99,
}

/// The peers, looking on at one rollout.
#[derive(Debug)]
pub(super) struct Peers {
    windows_a_look: u32,
    tenants: BTreeMap<TenantName, Tenant>,
    fleet: Minute,
    halts: Halts,
}

/// The window in which each rule halted the rollout, if it did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Halts([Option<u32>; Rule::ALL.len()]);

#[derive(Debug, Default)]
struct Tenant {
    errors: Minute,
    latency: Histogram,
    slow_checks: u32,
    limit_us: Option<u64>,
    error_shares: Pair,
    p99_ms: Pair,
}

/// Requests of a minute, and the checks that failed so far.
#[derive(Debug, Default)]
struct Minute {
    requests: u64,
    errors: u64,
    failed_checks: u32,
}

// === impl Rule ===

impl Rule {
    pub(super) const ALL: [Self; 5] = [
        Self::FlaggerErrors,
        Self::FlaggerP99,
        Self::FlaggerFleet,
        Self::KayentaErrors,
        Self::KayentaP99,
    ];
}

// === impl Halts ===

impl Halts {
    pub(super) fn get(self, rule: Rule) -> Option<u32> {
        self.0[rule as usize]
    }

    fn add(&mut self, rule: Rule, window: u32) {
        self.0[rule as usize].get_or_insert(window);
    }
}

// === impl Peers ===

impl Peers {
    pub(super) fn new(window_seconds: u32) -> Self {
        Self {
            windows_a_look: LOOK_SECONDS.div_ceil(window_seconds).max(1),
            tenants: BTreeMap::new(),
            fleet: Minute::default(),
            halts: Halts::default(),
        }
    }

    /// The halts so far.
    pub(super) fn halts(&self) -> Halts {
        self.halts
    }

    /// Shows them a window, from 1.
    pub(super) fn window(&mut self, window: u32, rows: &[TenantWindow]) {
        for row in rows {
            if !self.tenants.contains_key(&row.tenant) {
                self.tenants.insert(row.tenant.clone(), Tenant::default());
            }
            if let Some(tenant) = self.tenants.get_mut(&row.tenant) {
                tenant.take(row);
            }
            self.fleet.take(&row.canary);
        }
        if !window.is_multiple_of(self.windows_a_look) {
            return;
        }
        for tenant in self.tenants.values_mut() {
            tenant.look(window, &mut self.halts);
        }
        if self.fleet.check() {
            self.halts.add(Rule::FlaggerFleet, window);
        }
    }
}

// === impl Tenant ===

impl Tenant {
    fn take(&mut self, row: &TenantWindow) {
        self.errors.take(&row.canary);
        for (counts, shares, p99s) in [
            (
                &row.canary,
                &mut self.error_shares.canary,
                &mut self.p99_ms.canary,
            ),
            (
                &row.baseline,
                &mut self.error_shares.baseline,
                &mut self.p99_ms.baseline,
            ),
        ] {
            // A window without requests has no value: Kayenta removes it.
            if counts.requests > 0 {
                shares.add(counts.errors as f64 / counts.requests as f64);
            }
            if let Some(p99) = counts
                .latency
                .as_ref()
                .and_then(|latency| p99_ms(&latency.histogram))
            {
                p99s.add(p99);
            }
        }
        if let Some(latency) = &row.canary.latency {
            self.latency.merge(&latency.histogram);
            self.limit_us = latency.over_sla.map(|over| over.limit_us);
        }
    }

    fn look(&mut self, window: u32, halts: &mut Halts) {
        if self.errors.check() {
            halts.add(Rule::FlaggerErrors, window);
        }
        if let (Some(p99), Some(limit_us)) = (p99_ms(&self.latency), self.limit_us)
            && p99 * 1e3 > limit_us as f64
        {
            self.slow_checks += 1;
            if self.slow_checks >= FAILED_CHECKS {
                halts.add(Rule::FlaggerP99, window);
            }
        }
        self.latency.clear();
        // One High halts, so that nothing more can come after it.
        if halts.get(Rule::KayentaErrors).is_none() && self.error_shares.is_high() {
            halts.add(Rule::KayentaErrors, window);
        }
        if halts.get(Rule::KayentaP99).is_none() && self.p99_ms.is_high() {
            halts.add(Rule::KayentaP99, window);
        }
    }
}

// === impl Minute ===

impl Minute {
    fn take(&mut self, counts: &ArmCounts) {
        self.requests += counts.requests;
        self.errors += counts.errors;
    }

    /// Ends the minute; whether the checks that failed are now enough.
    fn check(&mut self) -> bool {
        let succeeded = (self.requests - self.errors) as f64;
        if self.requests > 0 && succeeded < SUCCESS * self.requests as f64 {
            self.failed_checks += 1;
        }
        (self.requests, self.errors) = (0, 0);
        self.failed_checks >= FAILED_CHECKS
    }
}

/// The p99 in milliseconds, between a bucket's bounds as Prometheus does it: exponentially, by the rank within.
fn p99_ms(histogram: &Histogram) -> Option<f64> {
    let (first, counts) = histogram.contiguous();
    let rank = 0.99 * histogram.count() as f64;
    let mut below = 0.0;
    for (index, count) in (first..).zip(counts) {
        let count = *count as f64;
        if below + count >= rank && count > 0.0 {
            let upper = upper_bound_ns(index)? as f64;
            let lower = upper / 2_f64.powf(1.0 / 16.0);
            return Some(lower * (upper / lower).powf((rank - below) / count) / 1e6);
        }
        below += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(requests: u64, errors: u64, slow_ms: u64) -> TenantWindow {
        let mut histogram = Histogram::new();
        (0..requests).for_each(|_| histogram.record(slow_ms * 1_000_000));
        let latency = coalmine_judge::evidence::Latency {
            histogram,
            over_sla: Some(coalmine_judge::evidence::OverSla {
                limit_us: 100_000,
                count: 0,
            }),
        };
        TenantWindow {
            tenant: TenantName::parse(b"a").unwrap(),
            canary: ArmCounts {
                requests,
                errors,
                latency: Some(latency),
                ..ArmCounts::default()
            },
            baseline: ArmCounts::default(),
        }
    }

    fn halts(rows: impl Fn(u32) -> TenantWindow) -> Halts {
        let mut peers = Peers::new(10);
        for window in 1..=60 {
            peers.window(window, &[rows(window)]);
        }
        peers.halts()
    }

    #[test]
    fn flagger_rolls_back_at_the_fifth_failed_minute() {
        let found = halts(|_| row(100, 2, 50));
        assert_eq!(found.get(Rule::FlaggerErrors), Some(30));
        assert_eq!(found.get(Rule::FlaggerFleet), Some(30));
        assert_eq!(found.get(Rule::FlaggerP99), None);
        // The count never falls: each second minute fails.
        let found = halts(|window| row(100, 4 * u64::from(window % 12 == 1), 50));
        assert_eq!(found.get(Rule::FlaggerErrors), None, "4 of 600 are less than 1 %");
        let found = halts(|window| row(100, 7 * u64::from(window % 12 == 1), 50));
        assert_eq!(found.get(Rule::FlaggerErrors), Some(54));
        assert_eq!(halts(|_| row(100, 0, 200)).get(Rule::FlaggerP99), Some(30));
        assert_eq!(halts(|_| row(0, 0, 0)), Halts::default());
    }

    #[test]
    fn p99_lies_in_its_bucket() {
        let mut histogram = Histogram::new();
        (1..=1_000).for_each(|ms| histogram.record(ms * 1_000_000));
        let p99 = p99_ms(&histogram).unwrap();
        assert!((p99 / 990.0 - 1.0).abs() < 0.045, "{p99}");
        assert_eq!(p99_ms(&Histogram::new()), None);
    }
}
