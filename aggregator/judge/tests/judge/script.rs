//! Scripted rollouts: traffic with the same numbers everywhere.

use coalmine_judge::{
    evidence::{ArmCounts, Coverage, Latency, OverSla, TenantWindow, Window},
    policy::Policy,
    v1::{Judge, Outcome},
};
use coalmine_proto::{histogram::Histogram, names::TenantName};

pub(crate) const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms }
  judge_window: 1s
  hold_deadline: 3m
tenants:
  tenant-003: { errors: { max_rate: 0.5% } }
";

/// A generator with the same numbers everywhere (xorshift64*, Vigna 2016).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// How many of `n` requests have an event of probability `ppm`.
    pub(crate) fn events(&mut self, n: u64, ppm: u64) -> u64 {
        (0..n)
            .filter(|_| self.next() >> 11 < (1 << 53) / 1_000_000 * ppm)
            .count() as u64
    }
}

/// A rollout of tenants with falling traffic; `error_ppm(tenant, window, canary)` is the error rate.
pub(crate) struct Script {
    random: Random,
    tenants: u64,
    busiest: u64,
}

impl Script {
    pub(crate) fn new(seed: u64, tenants: u64, busiest: u64) -> Self {
        Self {
            random: Random(seed),
            tenants,
            busiest,
        }
    }

    pub(crate) fn window(
        &mut self,
        number: u64,
        error_ppm: &dyn Fn(u64, bool) -> u64,
        slow_ppm: u64,
    ) -> Window {
        let mut rows = Vec::new();
        for tenant in 0..self.tenants {
            let rate = self.busiest / (tenant + 1);
            let mut arm = |requests: u64, canary: bool| {
                let errors = self.random.events(requests, error_ppm(tenant, canary));
                let mut histogram = Histogram::new();
                let over = self.random.events(requests, slow_ppm);
                for i in 0..requests {
                    histogram.record(if i < over {
                        600_000_000
                    } else {
                        5_000_000 + i * 1_000_000
                    });
                }
                let over_sla = Some(OverSla {
                    limit_us: 350_000,
                    count: over,
                });
                ArmCounts {
                    requests,
                    errors,
                    latency: Some(Latency { histogram, over_sla }),
                    ..ArmCounts::default()
                }
            };
            let (canary, baseline) = (arm(rate / 10, true), arm(rate - rate / 10, false));
            rows.push(TenantWindow {
                tenant: TenantName::parse(format!("tenant-{tenant:03}").as_bytes()).unwrap(),
                canary,
                baseline,
            });
        }
        let agents = |n| Coverage {
            expected: n,
            reported: n,
        };
        Window {
            number,
            start_ms: 1_700_000_000_000 + number * 1_000,
            len_ms: 1_000,
            canary: agents(1),
            baseline: agents(2),
            rows,
            pool: Vec::new(),
            pods: None,
        }
    }
}

/// A judge by a policy of these lines: those of `defaults`, then what follows it.
pub(crate) fn judge_by(defaults: &[&str], rest: &str) -> Judge {
    let defaults = defaults.join("\n");
    let text = format!(
        "apiVersion: coalmine.dev/v1\nkind: SlaBaseline\nservice: checkout\ndefaults:\n  judge_window: 1s\n{defaults}\n{rest}"
    );
    let policy = Policy::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    Judge::new(policy, None, None).unwrap()
}

pub(crate) fn judge() -> Judge {
    Judge::new(Policy::parse(POLICY).unwrap(), None, None).unwrap()
}

pub(crate) fn run(
    script: &mut Script,
    windows: u64,
    error_ppm: &dyn Fn(u64, u64, bool) -> u64,
) -> Vec<Outcome> {
    let mut judge = judge();
    (1..=windows)
        .map(|number| {
            let window = script.window(number, &|tenant, canary| error_ppm(tenant, number, canary), 2_000);
            judge.step(&window).unwrap()
        })
        .collect()
}
