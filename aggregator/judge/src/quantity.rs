//! Quantities as people write them in a policy, read into integers.
//!
//! A rate is `1%` or `500ppm`; an increase is in percentage points, `0.1pp`; a ratio is a plain number,
//! `1.25`, or `2x`; a duration is `350ms`, `30m`. A unit that is missing or wrong is an error that shows
//! how to write it: nothing is guessed.

use serde::Deserialize;

/// A share of requests, in parts per billion; more than 0 and less than 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate {
    /// Parts per billion.
    pub ppb: u64,
}

/// A difference between two rates, in parts per billion; 0 is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct PercentagePoints {
    /// Parts per billion.
    pub ppb: u64,
}

/// A factor of at least one, in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Ratio {
    /// Thousandths.
    pub milli: u64,
}

/// A factor written with an x, in thousandths; more than zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Times {
    /// Thousandths.
    pub milli: u64,
}

/// A share between 0 and 1, written as `90%` or `0.9`, in parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Share {
    /// Parts per million.
    pub ppm: u32,
}

/// A length of time, in microseconds; more than zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Span {
    /// Microseconds.
    pub micros: u64,
}

/// `text` as a number times 10^`digits`, exactly; none if it is no plain decimal number or has more digits.
fn decimal(text: &str, digits: usize) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let plain = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !plain(whole) || !plain(fraction) || (text.contains('.') && fraction.is_empty()) {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > digits {
        return None;
    }
    let scale = 10_u64.pow(u32::try_from(digits).ok()?);
    let padded = format!("{fraction:0<digits$}");
    let low: u64 = if digits == 0 { 0 } else { padded.parse().ok()? };
    whole.parse::<u64>().ok()?.checked_mul(scale)?.checked_add(low)
}

fn reject_negative(text: &str, what: &str) -> Result<(), String> {
    if text.starts_with('-') {
        return Err(format!("{text:?} is negative; {what} must be positive"));
    }
    Ok(())
}

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "a rate")?;
        let ppb = if let Some(number) = text.strip_suffix('%') {
            decimal(number.trim_end(), 7)
        } else if let Some(number) = text.strip_suffix("ppm") {
            decimal(number.trim_end(), 3)
        } else {
            return Err(format!(
                "{text:?} has no unit that a rate can have; write it like 1% or 500ppm"
            ));
        };
        match ppb {
            Some(ppb) if ppb > 0 && ppb < 1_000_000_000 => Ok(Self { ppb }),
            Some(_) => Err(format!(
                "{text:?} is out of range; a rate is more than 0% and less than 100%"
            )),
            None => Err(format!("{text:?} is not a rate; write it like 1% or 500ppm")),
        }
    }
}

impl TryFrom<String> for PercentagePoints {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "an increase")?;
        let Some(number) = text.strip_suffix("pp") else {
            return Err(format!(
                "{text:?} has no unit that an increase can have; write percentage points, like 0.1pp"
            ));
        };
        match decimal(number.trim_end(), 7) {
            Some(ppb) if ppb < 1_000_000_000 => Ok(Self { ppb }),
            Some(_) => Err(format!(
                "{text:?} is out of range; an increase is less than 100pp"
            )),
            None => Err(format!(
                "{text:?} is not a number of percentage points; write it like 0.1pp"
            )),
        }
    }
}

impl TryFrom<String> for Ratio {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "a ratio")?;
        match decimal(&text, 3) {
            Some(milli) if (1_000..=100_000).contains(&milli) => Ok(Self { milli }),
            Some(_) => Err(format!("{text:?} is out of range; a ratio is from 1 to 100")),
            None => Err(format!(
                "{text:?} is not a ratio; write a plain number with at most three decimals, like 1.25"
            )),
        }
    }
}

impl TryFrom<String> for Times {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "a factor")?;
        match text.strip_suffix('x').and_then(|number| decimal(number, 3)) {
            Some(milli) if (1..=100_000).contains(&milli) => Ok(Self { milli }),
            Some(_) => Err(format!(
                "{text:?} is out of range; a factor is more than 0x and at most 100x"
            )),
            None => Err(format!("{text:?} is not a factor; write it like 0.5x or 2x")),
        }
    }
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "a share")?;
        let ppm = match text.strip_suffix('%') {
            Some(number) => decimal(number.trim_end(), 4),
            None => decimal(&text, 6),
        };
        match ppm.map(u32::try_from) {
            Some(Ok(ppm)) if ppm <= 1_000_000 => Ok(Self { ppm }),
            Some(_) => Err(format!("{text:?} is out of range; a share is from 0% to 100%")),
            None => Err(format!("{text:?} is not a share; write it like 90% or 0.9")),
        }
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        reject_negative(&text, "a duration")?;
        let units = [
            ("us", 1),
            ("ms", 1_000),
            ("s", 1_000_000),
            ("m", 60_000_000),
            ("h", 3_600_000_000),
        ];
        let Some((number, micros)) = units
            .into_iter()
            .find_map(|(unit, micros)| Some((text.strip_suffix(unit)?.trim_end(), micros)))
        else {
            return Err(format!(
                "{text:?} has no unit that a duration can have; write us, ms, s, m or h, like 350ms"
            ));
        };
        let value = decimal(number, 3).map(|milli| u128::from(milli) * micros);
        match value {
            Some(value) if value % 1_000 == 0 && value > 0 => u64::try_from(value / 1_000)
                .map(|micros| Self { micros })
                .map_err(|_| format!("{text:?} is too long")),
            Some(0) => Err(format!("{text:?} is zero; a duration must be positive")),
            Some(_) => Err(format!("{text:?} is finer than one microsecond")),
            None => Err(format!(
                "{text:?} is not a duration; write it like 350ms, 1.5s or 30m"
            )),
        }
    }
}

/// The smallest margin that is judged as k + 1 buckets, in parts per million: 2^((2k+1)/32) - 1, rounded up.
const MARGIN_STEPS_PPM: [u32; 16] = [
    21_898, 67_141, 114_387, 163_725, 215_248, 269_051, 325_237, 383_910, 445_181, 509_165, 575_981, 645_756,
    718_620, 794_710, 874_168, 957_145,
];

/// How much longer k buckets are, in thousandths of a percent: 2^(k/16) - 1, rounded.
const BUCKETS_MILLI_PERCENT: [u32; 17] = [
    0, 4_427, 9_051, 13_879, 18_921, 24_186, 29_684, 35_426, 41_421, 47_683, 54_221, 61_049, 68_179, 75_625,
    83_401, 91_521, 100_000,
];

/// Most buckets that a margin can be: those of 100 %.
pub const MAX_MARGIN_BUCKETS: u32 = 16;

/// A margin as whole buckets of the histogram, of which 16 make a doubling: the whole number nearest to
/// 16 log2(1 + margin), at most [`MAX_MARGIN_BUCKETS`].
pub fn margin_buckets(margin_ppm: u32) -> u32 {
    let buckets = MARGIN_STEPS_PPM.iter().filter(|step| margin_ppm >= **step);
    buckets.map(|_| 1).sum()
}

/// So many buckets as text: `2 buckets, +9.05 %`.
pub fn buckets(count: u32) -> String {
    let milli = BUCKETS_MILLI_PERCENT
        .get(count as usize)
        .copied()
        .unwrap_or(100_000);
    let plural = if count == 1 { "" } else { "s" };
    // A thousandth of a percent is 10,000 parts per billion.
    format!("{count} bucket{plural}, +{}", percent(u128::from(milli) * 10_000))
}

/// A factor or ratio in thousandths, as text: `1.25`, `2`.
pub fn times(milli: u64) -> String {
    let text = format!("{}.{:03}", milli / 1_000, milli % 1_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A share given in parts per billion, as text with three significant digits: `15.1 %`, `0.098 %`.
pub fn percent(ppb: u128) -> String {
    // In thousandths of a percent, then fewer decimals for larger numbers.
    let (decimals, unit) = match ppb {
        100_000_000.. => (1, 1_000_000),
        10_000_000.. => (2, 100_000),
        _ => (3, 10_000),
    };
    let rounded = (ppb + unit / 2) / unit;
    let scale = 10_u128.pow(decimals);
    let text = format!(
        "{}.{:0width$}",
        rounded / scale,
        rounded % scale,
        width = decimals as usize
    );
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

/// `part` of `whole` as text; `0 %` of nothing.
pub fn percent_of(part: u64, whole: u64) -> String {
    if whole == 0 {
        return percent(0);
    }
    percent(u128::from(part) * 1_000_000_000 / u128::from(whole))
}

/// A number of microseconds as text: `350 ms`, `1.5 s`.
pub fn micros(value: u64) -> String {
    let (unit, scale) = match value {
        1_000_000.. => ("s", 1_000_000_u128),
        1_000.. => ("ms", 1_000),
        _ => ("us", 1),
    };
    if scale == 1 {
        return format!("{value} {unit}");
    }
    let tenths = (u128::from(value) * 10 + scale / 2) / scale;
    if tenths.is_multiple_of(10) {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// A number of microseconds as it stands in a policy, exactly: `30m`, `1500ms`, `7us`.
pub fn span(micros: u64) -> String {
    let units = [
        ("h", 3_600_000_000),
        ("m", 60_000_000),
        ("s", 1_000_000),
        ("ms", 1_000),
    ];
    match units.into_iter().find(|(_, scale)| micros.is_multiple_of(*scale)) {
        Some((unit, scale)) => format!("{}{unit}", micros / scale),
        None => format!("{micros}us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_exactly() {
        let rate = |text: &str| Rate::try_from(text.to_owned()).map(|r| r.ppb);
        assert_eq!(rate("1%"), Ok(10_000_000));
        assert_eq!(rate("0.5 %"), Ok(5_000_000));
        assert_eq!(rate("250ppm"), Ok(250_000));
        assert_eq!(
            PercentagePoints::try_from("0.1pp".to_owned()).map(|p| p.ppb),
            Ok(1_000_000)
        );
        assert_eq!(Ratio::try_from("1.25".to_owned()).map(|r| r.milli), Ok(1_250));
        assert_eq!(Times::try_from("0.5x".to_owned()).map(|r| r.milli), Ok(500));
        assert_eq!(Share::try_from("90%".to_owned()).map(|s| s.ppm), Ok(900_000));
        assert_eq!(Share::try_from("0.95".to_owned()).map(|s| s.ppm), Ok(950_000));
        let span = |text: &str| Span::try_from(text.to_owned()).map(|s| s.micros);
        assert_eq!(span("350ms"), Ok(350_000));
        assert_eq!(span("1.5s"), Ok(1_500_000));
        assert_eq!(span("30m"), Ok(1_800_000_000));
        assert_eq!(span("7us"), Ok(7));
    }

    #[test]
    fn a_wrong_quantity_says_how_to_write_it() {
        for (error, hint) in [
            (Rate::try_from("-1%".to_owned()).unwrap_err(), "negative"),
            (Rate::try_from("1".to_owned()).unwrap_err(), "like 1% or 500ppm"),
            (Rate::try_from("100%".to_owned()).unwrap_err(), "less than 100%"),
            (Rate::try_from("0%".to_owned()).unwrap_err(), "more than 0%"),
            (Rate::try_from("1e-2%".to_owned()).unwrap_err(), "not a rate"),
            (
                PercentagePoints::try_from("0.1%".to_owned()).unwrap_err(),
                "0.1pp",
            ),
            (Ratio::try_from("0.9".to_owned()).unwrap_err(), "from 1 to 100"),
            (Times::try_from("2".to_owned()).unwrap_err(), "0.5x or 2x"),
            (Share::try_from("101%".to_owned()).unwrap_err(), "from 0% to 100%"),
            (Span::try_from("350".to_owned()).unwrap_err(), "350ms"),
            (
                Span::try_from("350 parsecs".to_owned()).unwrap_err(),
                "not a duration",
            ),
            (Span::try_from("0s".to_owned()).unwrap_err(), "zero"),
            (Span::try_from("0.5us".to_owned()).unwrap_err(), "finer"),
        ] {
            assert!(error.contains(hint), "{error:?} does not say {hint:?}");
        }
    }

    #[test]
    fn a_margin_is_the_nearest_whole_number_of_buckets() {
        for ppm in (0..=1_000_000).step_by(7).chain([999_999, 1_000_000]) {
            let exact = 16.0 * (1.0 + f64::from(ppm) / 1e6).log2();
            assert_eq!(f64::from(margin_buckets(ppm)), exact.round(), "{ppm} ppm");
        }
        for (k, step) in (0..).zip(MARGIN_STEPS_PPM) {
            let exact = (f64::from(2 * k + 1) / 32.0).exp2() - 1.0;
            assert_eq!(f64::from(step), (exact * 1e6).ceil());
        }
        for (k, milli) in (0..).zip(BUCKETS_MILLI_PERCENT) {
            let exact = (f64::from(k) / 16.0).exp2() - 1.0;
            assert_eq!(f64::from(milli), (exact * 1e5).round());
        }
        assert_eq!(
            [0, 10_000, 100_000, 200_000, 1_000_000, u32::MAX].map(margin_buckets),
            [0, 0, 2, 4, 16, 16]
        );
        assert_eq!(buckets(2), "2 buckets, +9.05 %");
        assert_eq!(buckets(1), "1 bucket, +4.43 %");
        assert_eq!((times(1_250), times(2_000)), ("1.25".into(), "2".into()));
    }

    #[test]
    fn shares_are_shown_with_three_digits() {
        assert_eq!(percent_of(15, 100), "15 %");
        assert_eq!(percent_of(1, 7), "14.3 %");
        assert_eq!(percent_of(1, 1_000), "0.1 %");
        assert_eq!(percent_of(3, 99), "3.03 %");
        assert_eq!(percent_of(0, 0), "0 %");
        assert_eq!(micros(350_000), "350 ms");
        assert_eq!(micros(1_500_000), "1.5 s");
        assert_eq!(
            [1_800_000_000, 7_200_000_000, 1_500_000, 7].map(span),
            ["30m", "2h", "1500ms", "7us"]
        );
    }
}
