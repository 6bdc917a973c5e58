//! Fixed-point logarithms, always rounded so that evidence is never overstated.
//!
//! Evidence is measured in bits, as an `i64` with 32 fractional bits ([`Bits`]). What is multiplied by a count
//! before it becomes evidence is a [`Log`], with 56 fractional bits: with 2^24 requests its rounding is still
//! below one unit of the evidence.
//!
//! # A logarithm
//!
//! For x = 2^e m, m in [1, 2), two tables bring m close to 1: `R1[i]` is 1 / (1 + i/256) rounded up, for the
//! first eight bits i of m - 1, so that m `R1[i]` = 1 + z with 0 <= z < 2^-8; the same again with steps of 2^-16
//! gives 1 + y with 0 <= y < 2^-16. Then ln(1 + y) >= y - y^2/2 + y^3/3 - y^4/4, and the last term is below
//! 2^-64. `T1` and `T2` hold -log2 of the table's own numbers, so that rounding a reciprocal costs nothing.
//! Every step truncates downward with 64 fractional bits, and all together lose less than two units of a
//! [`Log`]; the tests compare with big integers. The tables are computed by the compiler, by squaring: log2(z^2) =
//! 2 log2(z) yields one bit at a time. (Muller, Elementary Functions, 3rd ed., 2016, chapters 4 and 5, has both
//! methods.)
//!
//! # A sum
//!
//! [`log2_sum`] is log2 of the sum of powers 2^l, for mixtures of e-processes. 2^-f for a fraction f comes from a
//! table of 2^(-i/256), made of square roots, and 1 - t + t^2/2 - t^3/6 <= exp(-t).

/// Evidence in bits, with 32 fractional bits.
pub type Bits = i64;

/// A logarithm to base 2, with 56 fractional bits.
pub type Log = i64;

/// One bit.
pub const ONE: Bits = 1 << 32;

/// log2(e) with 62 fractional bits, rounded down and up: 1.4426950408889634073599...
const LOG2_E_Q62: u64 = 6_653_256_548_922_161_245;
pub(crate) const LOG2_E_Q62_CEIL: u128 = LOG2_E_Q62 as u128 + 1;

/// ln 2 with 64 fractional bits, rounded up: 0.693147180559945309417232...
const LN_2_Q64_CEIL: u128 = 12_786_308_645_202_655_660;

/// By how much [`log2_lower`] may be too low.
const LOG_ERROR: Log = 2;

/// Arguments of a logarithm are below 2^120.
const MAX_LENGTH: u32 = 120;

/// An intermediate value left its range; the unit is reported as ERROR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a count or an intermediate value is out of range")]
pub struct OutOfRange;

/// Reciprocals of 1 + i/256, rounded up, and their -log2, rounded down; 63 and 64 fractional bits.
static COARSE: [(u64, u64); 256] = steps(8);

/// The same for 1 + i/65536.
static FINE: [(u64, u64); 256] = steps(16);

/// 2^(-i/256), rounded down, with 63 fractional bits.
static POWERS: [u64; 256] = powers();

const fn steps(bits: u32) -> [(u64, u64); 256] {
    let mut table = [(1 << 63, 0); 256];
    let mut i = 1;
    while i < 256 {
        let reciprocal = (1_u128 << (63 + bits)).div_ceil((1 << bits) + i as u128);
        table[i] = (reciprocal as u64, minus_log2(reciprocal));
        i += 1;
    }
    table
}

/// -log2(x / 2^63) with 64 fractional bits, rounded down, for x in (2^62, 2^63).
const fn minus_log2(x: u128) -> u64 {
    // x / 2^62, with 127 fractional bits, in (1, 2).
    let mut z = x << 65;
    let mut log: u128 = 0;
    let mut bit = 0;
    while bit < 64 {
        // z^2 with 126 fractional bits; what is cut off is below 2^-124.
        let (high, low) = (z >> 64, z & u64::MAX as u128);
        z = high * high + ((high * low) >> 63);
        log <<= 1;
        if z >= 1 << 127 {
            log |= 1;
        } else {
            z <<= 1;
        }
        bit += 1;
    }
    // log is too low by at most two units, so 1 - log2 needs two less.
    ((1 << 64) - log - 2) as u64
}

const fn powers() -> [u64; 256] {
    // 2^(-1/2), 2^(-1/4), ... 2^(-1/256), with 63 fractional bits, rounded down.
    let mut roots = [0_u64; 8];
    let mut square: u128 = 1 << 62;
    let mut k = 0;
    while k < 8 {
        roots[k] = (square << 63).isqrt() as u64;
        square = roots[k] as u128;
        k += 1;
    }
    let mut table = [1 << 63; 256];
    let mut i = 1;
    while i < 256 {
        let mut product: u128 = 1 << 63;
        let mut k = 0;
        while k < 8 {
            if i & (0x80 >> k) != 0 {
                product = (product * roots[k] as u128) >> 63;
            }
            k += 1;
        }
        table[i] = product as u64;
        i += 1;
    }
    table
}

/// A lower bound of log2 x, at most two units below it.
pub fn log2_lower(x: u128) -> Result<Log, OutOfRange> {
    let length = bit_length(x);
    if length == 0 || length > MAX_LENGTH {
        return Err(OutOfRange);
    }
    // 1 <= m < 2 with 63 fractional bits; cutting bits off only lowers it, by less than 2^-63.
    let mantissa = if length > 64 {
        x >> (length - 64)
    } else {
        x << (64 - length)
    };
    let (reciprocal, coarse) = COARSE[(mantissa >> 55 & 0xff) as usize];
    // z, with 64 fractional bits.
    let z = (mantissa * u128::from(reciprocal) - (1 << 126)) >> 62;
    let (reciprocal, fine) = FINE[((z >> 48) as usize).min(255)];
    let y = (((1 << 64) + z) * u128::from(reciprocal) - (1 << 127)) >> 63;
    let square = (y * y).div_ceil(1 << 64);
    let cube = (((y * y) >> 64) * y) >> 64;
    // y is below 2^-16 and a little, so y^4/4 is less than one unit.
    let ln = (y + cube / 3).saturating_sub(square.div_ceil(2) + u128::from(y > 0));
    let log = u128::from(coarse) + u128::from(fine) + ((ln * u128::from(LOG2_E_Q62)) >> 62);
    Ok((i64::from(length - 1) << 56) + (log >> 8) as i64)
}

/// An upper bound of log2 x, at most two units above it.
pub fn log2_upper(x: u128) -> Result<Log, OutOfRange> {
    let lower = log2_lower(x)?;
    Ok(if x.is_power_of_two() {
        lower
    } else {
        lower + LOG_ERROR
    })
}

/// A lower bound of log2(numerator / denominator), as evidence.
pub fn log2_floor(numerator: u128, denominator: u128) -> Result<Bits, OutOfRange> {
    Ok((log2_lower(numerator)? - log2_upper(denominator)?) >> 24)
}

/// An upper bound of log2(numerator / denominator), as evidence.
pub fn log2_ceil(numerator: u128, denominator: u128) -> Result<Bits, OutOfRange> {
    log2_floor(denominator, numerator).map(|bits| -bits)
}

/// A lower bound of log2 of the sum of 2^level over the levels.
pub fn log2_sum<const K: usize>(levels: &[Bits; K]) -> Result<Bits, OutOfRange> {
    let highest = levels.iter().copied().max().ok_or(OutOfRange)?;
    // The sum of 2^(level - highest), with 63 fractional bits; from 1 to K.
    let mut sum: u128 = 0;
    for level in levels {
        sum += u128::from(power_lower(i128::from(highest) - i128::from(*level)));
    }
    plus(highest, (log2_lower(sum)? - (63 << 56)) >> 24)
}

/// A lower bound of 2^-d with 63 fractional bits, for d >= 0 with 32 fractional bits.
pub(crate) fn power_lower(d: i128) -> u64 {
    let whole = d >> 32;
    if whole >= 63 {
        return 0;
    }
    let fraction = (d & 0xffff_ffff) as u128;
    let tabled = u128::from(POWERS[(fraction >> 24) as usize]);
    // t = f ln 2 for what is left of the fraction, below 2^-8; with 64 fractional bits, rounded up.
    let t = ((fraction & 0x00ff_ffff) * LN_2_Q64_CEIL).div_ceil(1 << 32);
    let square = (t * t) >> 64;
    let cube = ((t * t).div_ceil(1 << 64) * t).div_ceil(1 << 64);
    // exp(-t), with 64 fractional bits, rounded down: it falls with t, so t rounded up is safe.
    if t == 0 {
        return (tabled >> whole) as u64;
    }
    let exp = (1 << 64) + square / 2 - t - cube.div_ceil(6) - 1;
    ((tabled * (exp >> 1)) >> 63 >> whole) as u64
}

const fn bit_length(value: u128) -> u32 {
    128 - value.leading_zeros()
}

/// The sum of two amounts of evidence, or out of range.
pub fn plus(a: Bits, b: Bits) -> Result<Bits, OutOfRange> {
    a.checked_add(b).ok_or(OutOfRange)
}

/// Logarithms times counts, as evidence, rounded down.
pub fn weighed(sum: i128) -> Result<Bits, OutOfRange> {
    i64::try_from(sum >> 24).map_err(|_| OutOfRange)
}

#[cfg(test)]
mod tests {
    use num_bigint::BigUint;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(log2_floor(1, 1), Ok(0));
        assert_eq!(log2_floor(8, 1), Ok(3 * ONE));
        assert_eq!(log2_floor(1, 4), Ok(-2 * ONE));
        // log2(3) = 1.584962500721156..., of which 2^32 is 6807362105.99, and 2^56 is 114208327604001...
        assert_eq!(log2_floor(3, 1), Ok(6_807_362_105));
        assert_eq!(log2_floor(1, 3), Ok(-6_807_362_106));
        assert_eq!(log2_ceil(3, 1), Ok(6_807_362_106));
        assert_eq!(log2_ceil(1, 8), Ok(-3 * ONE));
        assert_eq!(log2_lower(1 << 119), Ok(119 << 56));
        for outside in [0, 1 << 120, u128::MAX] {
            assert_eq!(log2_lower(outside), Err(OutOfRange));
        }
        assert_eq!(plus(i64::MAX, 1), Err(OutOfRange));
        assert_eq!(weighed(-1), Ok(-1));
        assert_eq!(weighed(1 << 24), Ok(1));
        assert_eq!(weighed(i128::MAX), Err(OutOfRange));
    }

    /// log2 by squaring a number of 300 digits: 56 fractional bits, rounded down.
    fn reference(x: u128) -> i128 {
        let precision = 400_u32;
        let length = bit_length(x);
        let mut z = BigUint::from(x) << (precision + 1 - length);
        let mut log = i128::from(length - 1);
        for _ in 0..56 {
            z = (&z * &z) >> precision;
            log <<= 1;
            if z.bits() > u64::from(precision) + 1 {
                z >>= 1;
                log |= 1;
            }
        }
        log
    }

    #[test]
    fn a_logarithm_is_at_most_two_units_low_at_every_step_of_the_tables() {
        for i in 0..256_u128 {
            for fine in [0, 1, 127, 255] {
                for edge in [0, 1, (1 << 40) - 1] {
                    let x = (1 << 56) + (i << 48) + (fine << 40) + edge;
                    let low = reference(x) - i128::from(log2_lower(x).unwrap());
                    assert!((0..=1).contains(&low), "{x}: {low}");
                }
            }
        }
    }

    #[test]
    fn a_sum_of_powers() {
        assert_eq!(log2_sum(&[5 * ONE]), Ok(5 * ONE));
        // Each rounds down, by one unit or two.
        let near = |got: Result<Bits, OutOfRange>, want: Bits| {
            let low = want - got.unwrap();
            assert!((0..=2).contains(&low), "{low}");
        };
        near(log2_sum(&[ONE, ONE]), 2 * ONE);
        // 2^3 + 2^0 = 9: log2 = 3.169925001442312...
        near(log2_sum(&[3 * ONE, 0]), 9_319_756_915 + ONE);
        near(log2_sum(&[i64::MAX, i64::MIN]), i64::MAX);
        near(log2_sum(&[-7 * ONE; 16]), -3 * ONE);
        assert_eq!(log2_sum(&[i64::MAX; 2]), Err(OutOfRange));
    }

    proptest! {
        #[test]
        fn a_logarithm_is_a_lower_bound(x in 1_u128..(1 << 120), shift in 0_u32..119) {
            let x = (x >> shift).max(1);
            let low = reference(x) - i128::from(log2_lower(x).unwrap());
            prop_assert!((0..=1).contains(&low), "{}", low);
            let high = i128::from(log2_upper(x).unwrap()) - reference(x);
            prop_assert!((0..=2).contains(&high), "{}", high);
            prop_assert!(high > 0 || x.is_power_of_two());
        }

        #[test]
        #[allow(clippy::float_arithmetic, reason = "a check of the integers, not a part of them")]
        fn a_sum_of_powers_is_a_lower_bound(levels in prop::array::uniform7(-60 * ONE..60 * ONE)) {
            let sum = levels.iter().map(|level| (*level as f64 / ONE as f64).exp2()).sum::<f64>();
            let got = log2_sum(&levels).unwrap() as f64 / ONE as f64;
            prop_assert!((-1e-12..2e-9).contains(&(sum.log2() - got)), "{} {}", sum.log2(), got);
        }

        #[test]
        fn the_floor_and_the_ceiling_enclose_the_logarithm(n in 1_u128..(1 << 70), d in 1_u128..(1 << 70)) {
            let (floor, ceil) = (log2_floor(n, d).unwrap(), log2_ceil(n, d).unwrap());
            let true_units = reference(n) - reference(d);
            prop_assert!(i128::from(floor) << 24 <= true_units + 1);
            prop_assert!(i128::from(ceil) << 24 >= true_units - 1);
            prop_assert!((0..=2).contains(&(ceil - floor)), "{floor} {ceil}");
        }
    }
}
