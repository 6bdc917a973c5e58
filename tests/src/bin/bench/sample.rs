//! Made-up traffic: the same in every run.

use coalmine_proto::names::TenantName;

/// Share of requests that fail, in parts per million.
const ERROR_PPM: u64 = 1_000;

/// How many latencies are drawn before they repeat.
const LATENCIES: usize = 1 << 14;

/// A generator with the same numbers everywhere (xorshift64*, Vigna 2016).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

/// Requests with latencies that are distributed as those of a service are: log-normally.
#[derive(Debug, Clone)]
pub(crate) struct Traffic {
    random: Random,
    latencies_ns: Vec<u64>,
}

/// How requests ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ended {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        // The upper bits are the better ones; the remainder's bias does not matter here.
        (self.next() >> 20) as usize % limit.max(1)
    }

    /// Between 0 and 1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

impl Traffic {
    /// Latencies around a median; `spread` is the standard deviation of their logarithm.
    pub(crate) fn new(seed: u64, median_ms: f64, spread: f64) -> Self {
        let mut random = Random::new(seed);
        let latencies_ns = (0..LATENCIES).map(|_| {
            // The sum of twelve is as good as normal.
            let normal = (0..12).map(|_| random.share()).sum::<f64>() - 6.0;
            (median_ms * 1e6 * (spread * normal).exp()) as u64
        });
        let latencies_ns = latencies_ns.collect();
        Self { random, latencies_ns }
    }

    pub(crate) fn latency_ns(&mut self) -> u64 {
        let at = self.random.below(LATENCIES);
        self.latencies_ns[at]
    }

    /// Lets requests happen; `each` is given the latency of each.
    pub(crate) fn requests(&mut self, count: u64, mut each: impl FnMut(u64)) -> Ended {
        let mut ended = Ended::default();
        for _ in 0..count {
            let drawn = self.random.next() >> 20;
            each(self.latencies_ns[drawn as usize % LATENCIES]);
            let failed = (drawn >> 14) % 1_000_000 < ERROR_PPM;
            ended.failed += u64::from(failed);
            ended.ok += u64::from(!failed);
        }
        ended
    }

    /// How many requests a tenant of this rank has; few have many.
    pub(crate) fn count(&mut self, typical: f64) -> u64 {
        let normal = (0..12).map(|_| self.random.share()).sum::<f64>() - 6.0;
        ((typical * (0.6 * normal).exp()) as u64).max(1)
    }
}

/// A tenant's name.
pub(crate) fn tenant(number: usize) -> String {
    format!("tenant-{number:05}")
}

/// A tenant's name, validated.
pub(crate) fn tenant_name(number: usize) -> anyhow::Result<TenantName> {
    Ok(TenantName::parse(tenant(number).as_bytes())?)
}
