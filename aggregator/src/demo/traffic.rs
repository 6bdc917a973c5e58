//! The demonstration's tenants and its chance: a seeded generator, so that a run can be repeated.

/// How many tenants there are.
pub(super) const TENANTS: usize = 200;

/// The rank by traffic, from 1, of the tenant that fails: neither among the largest nor in the tail.
pub(super) const FAILING_RANK: usize = 12;

const FIRST: [&str; 20] = [
    "acme",
    "globex",
    "initech",
    "umbrella",
    "hooli",
    "stark",
    "wayne",
    "wonka",
    "tyrell",
    "cyberdyne",
    "soylent",
    "aperture",
    "oscorp",
    "vandelay",
    "dunder",
    "sterling",
    "pied-piper",
    "massive",
    "gringotts",
    "monarch",
];

const LAST: [&str; 10] = [
    "corp", "labs", "retail", "health", "energy", "bank", "media", "foods", "travel", "games",
];

/// The name of the tenant of a rank, from 1.
pub(super) fn tenant_name(rank: usize) -> String {
    let index = rank.saturating_sub(1);
    let first = FIRST[index % FIRST.len()];
    // The second part moves on by one more in each round, so that neighbours differ in both.
    let last = LAST[(index + index / FIRST.len()) % LAST.len()];
    format!("{first}-{last}")
}

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// A generator; a seed of 0 is replaced, as the generator would stay there.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        // 53 bits, which a double holds exactly.
        let bits = self.next() >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }

    /// A number that is lognormal with this median and spread (Box and Muller).
    pub(super) fn lognormal(&mut self, median: f64, sigma: f64) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.unit()).cos();
        median * (sigma * normal).exp()
    }
}

/// Picks ranks with probability proportional to 1/rank.
#[derive(Debug, Clone)]
pub(super) struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    /// Over ranks 1 to `count`.
    pub(super) fn new(count: usize) -> Self {
        let mut sum = 0.0;
        let cumulative = (1..=count)
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        Self { cumulative }
    }

    /// A rank, from 1.
    pub(super) fn pick(&self, random: &mut Random) -> usize {
        let at = random.unit() * self.cumulative.last().copied().unwrap_or(1.0);
        self.cumulative
            .partition_point(|sum| *sum <= at)
            .min(self.cumulative.len().saturating_sub(1))
            + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tenants_have_different_names() {
        let names: std::collections::BTreeSet<_> = (1..=TENANTS).map(tenant_name).collect();
        assert_eq!(names.len(), TENANTS);
    }

    #[test]
    fn small_ranks_are_picked_more_often() {
        let (zipf, mut random) = (Zipf::new(10), Random::new(1));
        let mut counts = [0_u32; 11];
        for _ in 0..10_000 {
            counts[zipf.pick(&mut random)] += 1;
        }
        assert_eq!(counts[0], 0);
        // 1/H(10) = 34.1 %, and a tenth of it.
        assert!(
            (3_200..3_650).contains(&counts[1]) && (250..450).contains(&counts[10]),
            "{counts:?}"
        );
    }
}
