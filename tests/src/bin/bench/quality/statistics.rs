//! What the tables need: intervals of proportions, quantiles, and how much a request can tell.

/// The normal distribution's quantile for an interval of 95 %.
const Z_95: f64 = 1.959_963_984_540_054;

/// Wilson's score interval of 95 % for a proportion (Wilson 1927, equation 8), from 0 to 1.
pub(super) fn wilson(found: usize, of: usize) -> (f64, f64) {
    if of == 0 {
        return (0.0, 1.0);
    }
    let (n, z2) = (of as f64, Z_95 * Z_95);
    let share = found as f64 / n;
    let middle = share + z2 / (2.0 * n);
    let half = Z_95 * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    let whole = 1.0 + z2 / n;
    (
        ((middle - half) / whole).max(0.0),
        ((middle + half) / whole).min(1.0),
    )
}

/// `3/1000 = 0.3 % [0.1, 0.9]`
pub(super) fn proportion(found: usize, of: usize) -> String {
    if of == 0 {
        return "-".to_owned();
    }
    let (low, high) = wilson(found, of);
    let share = 100.0 * found as f64 / of as f64;
    format!(
        "{found}/{of} = {share:.1} % [{:.1}, {:.1}]",
        100.0 * low,
        100.0 * high
    )
}

/// The smallest value that at least this share of the values do not exceed; what never came is infinite.
pub(super) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied().unwrap_or(f64::INFINITY)
}

/// Kullback-Leibler divergence of one coin from another, in nats.
fn divergence(q: f64, p: f64) -> f64 {
    let part = |q: f64, p: f64| if q <= 0.0 { 0.0 } else { q * (q / p).ln() };
    part(q, p) + part(1.0 - q, 1.0 - p)
}

/// Nats that a request tells against a rate of at most `limit` when it fails at `rate`.
pub(super) fn nats_above(rate: f64, limit: f64) -> f64 {
    if rate <= limit {
        0.0
    } else {
        divergence(rate, limit)
    }
}

/// Nats that a canary request tells against a rate of at most `tolerated(p)` for a baseline's rate of `p`.
///
/// It fails at `rate`, the baseline at `baseline_rate` with `baseline_requests` for each of the canary's: the
/// least divergence over all p, which is found by golden sections, since divergence is convex in p.
pub(super) fn nats_over_baseline(
    rate: f64,
    baseline_rate: f64,
    baseline_requests: f64,
    tolerated: impl Fn(f64) -> f64,
) -> f64 {
    if rate <= tolerated(baseline_rate) {
        return 0.0;
    }
    let both = |p: f64| {
        let canary = nats_above(rate, tolerated(p).min(rate));
        canary + baseline_requests * divergence(baseline_rate, p)
    };
    let section = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (baseline_rate, rate);
    for _ in 0..100 {
        let (left, right) = (high - section * (high - low), low + section * (high - low));
        if both(left) < both(right) {
            high = right;
        } else {
            low = left;
        }
    }
    both((low + high) / 2.0)
}

/// Nats that a canary request tells about a shift of a normal variable by so many standard deviations.
pub(super) fn nats_of_shift(shift: f64, baseline_requests: f64) -> f64 {
    let shift = shift.max(0.0);
    shift * shift / 2.0 * baseline_requests / (1.0 + baseline_requests)
}

/// Share of a normal variable's values above `z`, by Simpson's rule from `z` to `z + 12` (within 1e-10).
pub(super) fn normal_above(z: f64) -> f64 {
    let steps = 2_000;
    let width = 12.0 / f64::from(steps);
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let sum = (0..=steps).map(|step| {
        let weight = match step {
            0 => 1.0,
            step if step == steps => 1.0,
            step if step % 2 == 1 => 4.0,
            _ => 2.0,
        };
        weight * density(z + f64::from(step) * width)
    });
    sum.sum::<f64>() * width / 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_wilson() {
        // 14 of 300: 4.7 % [2.8, 7.7].
        assert_eq!(proportion(14, 300), "14/300 = 4.7 % [2.8, 7.7]");
        let (low, high) = wilson(0, 1_000);
        assert!(low < 1e-12 && (high - 0.003_827).abs() < 1e-6, "{high}");
        // 5 of 10, by hand: (0.5 + 0.19207 +- 1.95996 sqrt(0.025 + 0.0096036)) / 1.38415.
        let (low, high) = wilson(5, 10);
        assert!((low - 0.236_6).abs() < 1e-4 && (high - 0.763_4).abs() < 1e-4);
    }

    #[test]
    fn what_never_came_is_the_largest() {
        let values = [f64::INFINITY, 10.0, 30.0, 20.0];
        assert_eq!(quantile(&values, 0.5), 20.0);
        assert_eq!(quantile(&values, 0.95), f64::INFINITY);
        assert_eq!(quantile(&[], 0.5), f64::INFINITY);
    }

    #[test]
    fn the_floor_is_what_a_hand_finds() {
        // ln(50000) / (0.15 ln 15 + 0.85 ln(0.85 / 0.99)) = 39.1
        let against_limit = 50_000_f64.ln() / nats_above(0.15, 0.01);
        assert!((against_limit - 39.1).abs() < 0.1, "{against_limit}");
        // Against any common rate the least is at (0.15 + 9 * 0.001) / 10 = 0.0159: 0.2121 + 0.1102 nats.
        let nats = nats_over_baseline(0.15, 0.001, 9.0, |p| p);
        assert!((nats - 0.3223).abs() < 0.0003, "{nats}");
        assert_eq!(nats_over_baseline(0.0015, 0.001, 9.0, |p| 1.25 * p + 0.001), 0.0);
        assert_eq!(nats_above(0.01, 0.01), 0.0);
    }

    #[test]
    fn the_tail_of_the_normal_distribution_is_known() {
        assert!((normal_above(0.0) - 0.5).abs() < 1e-9);
        assert!((normal_above(2.326_347_874) - 0.01).abs() < 1e-9);
        assert!((normal_above(-1.0) - 0.841_344_746).abs() < 1e-8);
    }
}
