//! Random numbers: the same from the same seed on every run, however many threads share the work.
//!
//! Floats are fine here: this makes the traffic, it does not judge it.
//!
//! | what | how |
//! |---|---|
//! | generator | xoshiro256++ (Blackman and Vigna 2021), seeded by SplitMix64 (Steele, Lea and Flood 2014) |
//! | normal | inverse of the distribution, AS 241 PPND16 (Wichura 1988) |
//! | Poisson | inversion below a mean of 10, else transformed rejection, PTRS (Hörmann 1993) |
//! | binomial | inversion below a mean of 10, else transformed rejection, BTRS (Hörmann 1993) |
//! | gamma | Marsaglia and Tsang 2000 |

use std::f64::consts::PI;

/// Means below this are drawn by inversion, which rejection is not made for.
const SMALL_MEAN: f64 = 10.0;

/// Cells of the table of the normal distribution's inverse; a power of two.
const CELLS: usize = 1 << 12;

/// As many cells at both ends are not interpolated, because the inverse bends too much there.
const TAIL_CELLS: usize = 16;

/// A generator of random numbers.
#[derive(Debug, Clone)]
pub(super) struct Random([u64; 4]);

/// Draws from the normal distribution, fast: a table, linear between its points (within 0.0002), exact in the tails.
#[derive(Debug)]
pub(super) struct NormalTable(Vec<f64>);

// === impl Random ===

impl Random {
    /// A generator whose numbers follow from these seeds, in this order.
    pub(super) fn of(seeds: &[u64]) -> Self {
        let mut state = 0_u64;
        for seed in seeds {
            state = split_mix(&mut state.wrapping_add(*seed));
        }
        Self([(); 4].map(|()| split_mix(&mut state)))
    }

    pub(super) fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let drawn = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        drawn
    }

    /// Above 0 and below 1.
    pub(super) fn uniform(&mut self) -> f64 {
        ((self.next() >> 12) as f64 + 0.5) / (1_u64 << 52) as f64
    }

    /// Mean 0, standard deviation 1.
    pub(super) fn normal(&mut self) -> f64 {
        inverse_normal(self.uniform())
    }

    /// A count with this mean.
    pub(super) fn poisson(&mut self, mean: f64) -> u64 {
        if mean <= 0.0 {
            return 0;
        }
        if mean >= SMALL_MEAN {
            return self.large_poisson(mean);
        }
        let (mut probability, mut count) = ((-mean).exp(), 0_u64);
        let mut left = self.uniform();
        while left > probability && count < 1_000 {
            left -= probability;
            count += 1;
            probability *= mean / count as f64;
        }
        count
    }

    /// How many of `count` happen, each with this probability.
    pub(super) fn binomial(&mut self, count: u64, probability: f64) -> u64 {
        if count == 0 || probability <= 0.0 {
            return 0;
        }
        if probability >= 1.0 {
            return count;
        }
        if probability > 0.5 {
            return count - self.binomial(count, 1.0 - probability);
        }
        if count as f64 * probability >= SMALL_MEAN {
            return self.large_binomial(count as f64, probability);
        }
        let odds = probability / (1.0 - probability);
        let mut chance = (count as f64 * (-probability).ln_1p()).exp();
        let (mut left, mut drawn) = (self.uniform(), 0_u64);
        while left > chance && drawn < count {
            left -= chance;
            chance *= odds * (count - drawn) as f64 / (drawn + 1) as f64;
            drawn += 1;
        }
        drawn
    }

    /// Mean 1, with this coefficient of variation.
    pub(super) fn gamma_of_mean_one(&mut self, variation: f64) -> f64 {
        if variation <= 0.0 {
            return 1.0;
        }
        let shape = 1.0 / (variation * variation);
        self.gamma(shape) / shape
    }

    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = self.uniform().powf(1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// PTRS, without its shortcut for the outer steps.
    fn large_poisson(&mut self, mean: f64) -> u64 {
        let root = mean.sqrt();
        let b = 0.931 + 2.53 * root;
        let a = -0.059 + 0.02483 * b;
        let inverse_alpha = 1.1239 + 1.1328 / (b - 3.4);
        let close = 0.9277 - 3.6224 / (b - 2.0);
        loop {
            let u = self.uniform() - 0.5;
            let v = self.uniform();
            let us = 0.5 - u.abs();
            let k = ((2.0 * a / us + b) * u + mean + 0.43).floor();
            if us >= 0.07 && v <= close {
                return k as u64;
            }
            if k < 0.0 || (us < 0.013 && v > us) {
                continue;
            }
            let left = (v * inverse_alpha / (a / (us * us) + b)).ln();
            if left <= k * mean.ln() - mean - ln_factorial(k) {
                return k as u64;
            }
        }
    }

    /// BTRS.
    fn large_binomial(&mut self, n: f64, p: f64) -> u64 {
        let spread = (n * p * (1.0 - p)).sqrt();
        let b = 1.15 + 2.53 * spread;
        let a = -0.0873 + 0.0248 * b + 0.01 * p;
        let center = n * p + 0.5;
        let close = 0.92 - 4.2 / b;
        let alpha = (2.83 + 5.1 / b) * spread;
        let mode = ((n + 1.0) * p).floor();
        let ln_odds = (p / (1.0 - p)).ln();
        loop {
            let u = self.uniform() - 0.5;
            let v = self.uniform();
            let us = 0.5 - u.abs();
            let k = ((2.0 * a / us + b) * u + center).floor();
            if k < 0.0 || k > n {
                continue;
            }
            if us >= 0.07 && v <= close {
                return k as u64;
            }
            let left = (v * alpha / (a / (us * us) + b)).ln();
            let right = ln_factorial(mode) + ln_factorial(n - mode) - ln_factorial(k) - ln_factorial(n - k)
                + (k - mode) * ln_odds;
            if left <= right {
                return k as u64;
            }
        }
    }
}

// === impl NormalTable ===

impl NormalTable {
    pub(super) fn new() -> Self {
        let at = |cell: usize| inverse_normal((cell as f64 / CELLS as f64).clamp(1e-9, 1.0 - 1e-9));
        Self((0..=CELLS).map(at).collect())
    }

    /// Mean 0, standard deviation 1.
    #[inline]
    pub(super) fn draw(&self, random: &mut Random) -> f64 {
        let drawn = random.next();
        let cell = (drawn >> 52) as usize;
        let within = (drawn & ((1 << 52) - 1)) as f64 / (1_u64 << 52) as f64;
        if cell.wrapping_sub(TAIL_CELLS) >= CELLS - 2 * TAIL_CELLS {
            return inverse_normal(((cell as f64 + within) / CELLS as f64).clamp(1e-18, 1.0 - 1e-16));
        }
        match self.0.get(cell..cell + 2) {
            Some([low, high]) => low + within * (high - low),
            _ => 0.0,
        }
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// ln k!, by Stirling's series from 10 (within 1e-9), exactly below.
fn ln_factorial(k: f64) -> f64 {
    if k < 10.0 {
        let product: f64 = (2..=k as u32).map(f64::from).product();
        return product.ln();
    }
    let inverse = 1.0 / k;
    let square = inverse * inverse;
    let series = inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square / 1260.0));
    (k + 0.5) * k.ln() - k + 0.5 * (2.0 * PI).ln() + series
}

/// The value below which a normal variable is with this probability; AS 241, PPND16, within 1e-15.
pub(super) fn inverse_normal(p: f64) -> f64 {
    const A: [f64; 8] = [
        3.387_132_872_796_366_5,
        1.331_416_678_917_843_8e2,
        1.971_590_950_306_551_3e3,
        1.373_169_376_550_946e4,
        4.592_195_393_154_987e4,
        6.726_577_092_700_87e4,
        3.343_057_558_358_813e4,
        2.509_080_928_730_122_7e3,
    ];
    const B: [f64; 8] = [
        1.0,
        4.231_333_070_160_091e1,
        6.871_870_074_920_579e2,
        5.394_196_021_424_751e3,
        2.121_379_430_158_659_7e4,
        3.930_789_580_009_271e4,
        2.872_908_573_572_194_3e4,
        5.226_495_278_852_545e3,
    ];
    const C: [f64; 8] = [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        2.417_807_251_774_506e-1,
        2.272_384_498_926_918_4e-2,
        7.745_450_142_783_414e-4,
    ];
    const D: [f64; 8] = [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        6.897_673_349_851e-1,
        1.481_039_764_274_800_8e-1,
        1.519_866_656_361_645_7e-2,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ];
    const E: [f64; 8] = [
        6.657_904_643_501_103,
        5.463_784_911_164_114,
        1.784_826_539_917_291_3,
        2.965_605_718_285_048_7e-1,
        2.653_218_952_657_612_4e-2,
        1.242_660_947_388_078_4e-3,
        2.711_555_568_743_487_6e-5,
        2.010_334_399_292_288_1e-7,
    ];
    const F: [f64; 8] = [
        1.0,
        5.998_322_065_558_88e-1,
        1.369_298_809_227_358e-1,
        1.487_536_129_085_061_5e-2,
        7.868_691_311_456_133e-4,
        1.846_318_317_510_054_8e-5,
        1.421_511_758_316_446e-7,
        2.044_263_103_389_939_8e-15,
    ];
    let polynomial = |coefficients: &[f64; 8], x: f64| {
        let terms = coefficients.iter().rev();
        terms.fold(0.0, |sum, coefficient| sum * x + coefficient)
    };
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        return q * polynomial(&A, r) / polynomial(&B, r);
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let value = if r <= 5.0 {
        polynomial(&C, r - 1.6) / polynomial(&D, r - 1.6)
    } else {
        polynomial(&E, r - 5.0) / polynomial(&F, r - 5.0)
    };
    value.copysign(q)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_and_variance(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let count = 200_000;
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..count {
            let value = draw();
            sum += value;
            squares += value * value;
        }
        let mean = sum / f64::from(count);
        (mean, squares / f64::from(count) - mean * mean)
    }

    fn near((mean, variance): (f64, f64), expected: (f64, f64)) {
        // Five standard errors of a mean of 200,000, and 3 % of a variance.
        let error = 5.0 * (expected.1 / 200_000.0).sqrt();
        assert!(
            (mean - expected.0).abs() <= error,
            "mean {mean}, not {}",
            expected.0
        );
        assert!(
            (variance / expected.1 - 1.0).abs() < 0.03,
            "variance {variance}, not {}",
            expected.1
        );
    }

    #[test]
    fn the_inverse_of_the_normal_distribution_is_known() {
        for (p, z) in [
            (0.5, 0.0),
            (0.99, 2.326_347_874_040_841),
            (0.9, 1.281_551_565_544_600_5),
            (1e-10, -6.361_340_902_404_056),
        ] {
            assert!(
                (inverse_normal(p) - z).abs() < 1e-12,
                "{p}: {}",
                inverse_normal(p)
            );
        }
        assert!((inverse_normal(1e-12) + 7.034_483_825_3).abs() < 1e-9);
    }

    #[test]
    fn counts_have_their_mean_and_variance() {
        let mut random = Random::of(&[1]);
        for mean in [0.06, 0.6, 5.3, 9.99, 10.0, 29.4, 2646.0] {
            near(mean_and_variance(|| random.poisson(mean) as f64), (mean, mean));
        }
        for (count, p) in [
            (1, 0.15),
            (7, 0.3),
            (200, 0.001),
            (200, 0.049),
            (100, 0.1),
            (300, 0.15),
            (2646, 0.5),
            (294, 0.9),
        ] {
            let expected = (count as f64 * p, count as f64 * p * (1.0 - p));
            near(mean_and_variance(|| random.binomial(count, p) as f64), expected);
        }
    }

    #[test]
    fn continuous_draws_have_their_mean_and_variance() {
        let mut random = Random::of(&[2]);
        let table = NormalTable::new();
        near(mean_and_variance(|| table.draw(&mut random)), (0.0, 1.0));
        near(mean_and_variance(|| random.normal()), (0.0, 1.0));
        for variation in [0.3, 1.0, 1.5] {
            let gamma = mean_and_variance(|| random.gamma_of_mean_one(variation));
            assert!((gamma.0 - 1.0).abs() < 0.02, "{gamma:?}");
            assert!(
                (gamma.1 / (variation * variation) - 1.0).abs() < 0.06,
                "{gamma:?}"
            );
        }
    }

    #[test]
    fn the_table_has_the_tails_of_the_normal_distribution() {
        let (table, mut random) = (NormalTable::new(), Random::of(&[3]));
        let draws = 1_000_000;
        for (z, share) in [(2.326_348, 0.01), (3.090_232, 0.001)] {
            let above = (0..draws).filter(|_| table.draw(&mut random) > z).count() as f64;
            let expected = share * f64::from(draws);
            assert!(
                (above - expected).abs() < 5.0 * expected.sqrt(),
                "{above}, not {expected}"
            );
        }
    }
}
