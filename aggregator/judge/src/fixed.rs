//! Fixed-point logarithms, always rounded so that evidence is never overstated.
//!
//! Evidence is measured in bits, as an `i64` with 32 fractional bits ([`Bits`]). A logarithm is computed
//! with integers only: normalise the quotient to `z` in [1, 2) with 62 fractional bits, then square 32
//! times; each squaring yields one fractional bit of the logarithm, because log2(z^2) = 2 log2(z).
//! Every step truncates, so the result is a lower bound, and it is at most two units in the last place
//! (2^-31 bits) below the true value; the tests compare it with big integers.

/// Evidence in bits, with 32 fractional bits.
pub type Bits = i64;

/// One bit.
pub const ONE: Bits = 1 << 32;

/// log2(e), rounded up: ceil(1.4426950408889634... * 2^32).
pub const LOG2_E_CEIL: u128 = 6_196_328_019;

/// An intermediate value left its range; the unit is reported as ERROR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a count or an intermediate value is out of range")]
pub struct OutOfRange;

/// The largest power of two that a quotient may reach.
const MAX_EXPONENT: i32 = 62;

/// A lower bound of log2(numerator / denominator).
pub fn log2_floor(numerator: u128, denominator: u128) -> Result<Bits, OutOfRange> {
    if numerator == 0 || denominator == 0 {
        return Err(OutOfRange);
    }
    // Keep both below 2^64 so that the shifted numerator fits; rounding the denominator up only lowers the result.
    let excess = bit_length(numerator)
        .max(bit_length(denominator))
        .saturating_sub(64);
    let (numerator, denominator) = if excess == 0 {
        (numerator, denominator)
    } else {
        (numerator >> excess, (denominator >> excess) + 1)
    };
    if numerator == 0 {
        return Err(OutOfRange);
    }
    let mut exponent = bit_length(numerator).cast_signed() - bit_length(denominator).cast_signed();
    if !(-MAX_EXPONENT..=MAX_EXPONENT).contains(&exponent) {
        return Err(OutOfRange);
    }
    let mut mantissa = quotient_q62(numerator, denominator, exponent);
    if mantissa < 1 << 62 {
        exponent -= 1;
        mantissa = quotient_q62(numerator, denominator, exponent);
    }
    let mut z = mantissa;
    let mut fraction: i64 = 0;
    for _ in 0..32 {
        // z < 2^63, so z * z >> 62 < 2^64.
        z = (z * z) >> 62;
        fraction <<= 1;
        if z >= 1 << 63 {
            z >>= 1;
            fraction |= 1;
        }
    }
    Ok((i64::from(exponent) << 32) + fraction)
}

/// An upper bound of log2(numerator / denominator).
pub fn log2_ceil(numerator: u128, denominator: u128) -> Result<Bits, OutOfRange> {
    log2_floor(denominator, numerator).map(|bits| -bits)
}

/// floor(numerator / denominator * 2^(62 - exponent)), for a quotient near 2^exponent.
fn quotient_q62(numerator: u128, denominator: u128, exponent: i32) -> u128 {
    // The numerator's length and the shift add up to at most 62 + 64 + 1 bits.
    (numerator << (62 - exponent)) / denominator
}

const fn bit_length(value: u128) -> u32 {
    128 - value.leading_zeros()
}

/// count * bits, or out of range.
pub fn times(count: u64, bits: Bits) -> Result<Bits, OutOfRange> {
    i64::try_from(i128::from(count) * i128::from(bits)).map_err(|_| OutOfRange)
}

/// The sum of two amounts of evidence, or out of range.
pub fn plus(a: Bits, b: Bits) -> Result<Bits, OutOfRange> {
    a.checked_add(b).ok_or(OutOfRange)
}

#[cfg(test)]
mod tests {
    use num_bigint::BigUint;
    use proptest::prelude::*;

    use super::*;

    /// Whether 2^(bits / 2^32) <= n / d, exactly, for a result of few bits: compares n^(2^k) with d^(2^k) * 2^m
    /// after dropping all but `k` fractional bits (rounding down, which keeps the direction).
    fn is_lower_bound(bits: Bits, n: u128, d: u128) -> bool {
        const K: u32 = 10;
        let coarse = bits >> (32 - K);
        let n_power = BigUint::from(n).pow(1 << K);
        let d_power = BigUint::from(d).pow(1 << K);
        if coarse >= 0 {
            (d_power << coarse.unsigned_abs()) <= n_power
        } else {
            d_power <= (n_power << coarse.unsigned_abs())
        }
    }

    /// Whether 2^(bits / 2^32) >= n / d after rounding up to `k` fractional bits.
    fn is_upper_bound(bits: Bits, n: u128, d: u128) -> bool {
        const K: u32 = 10;
        let coarse = -((-bits) >> (32 - K));
        let n_power = BigUint::from(n).pow(1 << K);
        let d_power = BigUint::from(d).pow(1 << K);
        if coarse >= 0 {
            n_power <= (d_power << coarse.unsigned_abs())
        } else {
            (n_power << coarse.unsigned_abs()) <= d_power
        }
    }

    #[test]
    fn known_values() {
        assert_eq!(log2_floor(1, 1), Ok(0));
        assert_eq!(log2_floor(8, 1), Ok(3 * ONE));
        assert_eq!(log2_floor(1, 4), Ok(-2 * ONE));
        // log2(3) = 1.584962500721156..., of which 2^32 is 6807362105.99.
        assert!((6_807_362_104..=6_807_362_105).contains(&log2_floor(3, 1).unwrap()));
        // log2(1/3): the floor of the negative.
        assert!((-6_807_362_108..=-6_807_362_106).contains(&log2_floor(1, 3).unwrap()));
        assert_eq!(log2_ceil(1, 8), Ok(-3 * ONE));
        assert_eq!(log2_floor(0, 1), Err(OutOfRange));
        assert_eq!(log2_floor(1, 0), Err(OutOfRange));
        assert_eq!(log2_floor(u128::MAX, 1), Err(OutOfRange));
        assert_eq!(times(u64::MAX, ONE), Err(OutOfRange));
    }

    proptest! {
        #[test]
        fn the_floor_and_the_ceiling_enclose_the_logarithm(
            n in 1_u128..(1 << 70), d in 1_u128..(1 << 70),
        ) {
            let floor = log2_floor(n, d);
            let ceil = log2_ceil(n, d);
            if let (Ok(floor), Ok(ceil)) = (floor, ceil) {
                prop_assert!(is_lower_bound(floor, n, d));
                prop_assert!(is_upper_bound(ceil, n, d));
                prop_assert!((0..=4).contains(&(ceil - floor)), "{floor} {ceil}");
            }
        }

        #[test]
        fn the_logarithm_grows_with_its_argument(n in 1_u128..(1 << 40), step in 1_u128..1000, d in 1_u128..(1 << 40)) {
            prop_assert!(log2_floor(n, d).unwrap() <= log2_floor(n + step, d).unwrap());
        }
    }
}
