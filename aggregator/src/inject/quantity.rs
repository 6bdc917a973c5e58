//! Amounts of CPU and memory, as Kubernetes writes them: `10m`, `0.5`, `192Mi`, `1e3`.
//!
//! They are counted in billionths, which is all that Kubernetes tells apart, and never rounded: what is finer, or
//! larger than Kubernetes counts, is refused. Signs are, too, since nothing takes less than nothing.

/// Most digits before the point: as many as the largest amount has in billionths.
const MAX_WHOLE_DIGITS: usize = 28;

/// Most digits after the point.
const MAX_FRACTION_DIGITS: usize = 9;

/// Billionths of one.
const NANO: u128 = 1_000_000_000;

/// The largest amount: Kubernetes counts with 64 bits.
const MAX: u128 = ((1 << 63) - 1) * NANO;

/// Reads an amount, in billionths.
pub(super) fn parse(text: &str) -> Result<u128, String> {
    exact(text).ok_or_else(|| format!("is {}, not an amount as in 10m, 0.5 or 192Mi", super::shown(text)))
}

/// An amount and so many billionths more, written out; none where one cannot be read or the sum is too large.
pub(super) fn add(amount: &str, more: u128) -> Option<String> {
    let sum = exact(amount)?.checked_add(more)?;
    (sum <= MAX).then(|| written(sum))
}

fn exact(text: &str) -> Option<u128> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_short = whole.len() <= MAX_WHOLE_DIGITS && fraction.len() <= MAX_FRACTION_DIGITS;
    if !is_short || (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (times, by) = scale(suffix)?;
    let digits: u128 = format!("{whole}{fraction:0<MAX_FRACTION_DIGITS$}").parse().ok()?;
    let product = digits.checked_mul(times)?;
    let amount = product / by;
    (product.is_multiple_of(by) && amount <= MAX).then_some(amount)
}

/// What a suffix multiplies by and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, NANO),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (NANO, 1),
        "T" => (NANO * 1_000, 1),
        "P" => (NANO * 1_000_000, 1),
        "E" => (NANO * NANO, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => return power(suffix.strip_prefix(['e', 'E'])?),
    })
}

/// The same of an exponent, as in `3`, `+3` or `-3`.
fn power(exponent: &str) -> Option<(u128, u128)> {
    let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    // To parse alone would let a second sign pass.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let power = 10_u128.checked_pow(digits.parse().ok()?)?;
    Some(if exponent.starts_with('-') {
        (1, power)
    } else {
        (power, 1)
    })
}

/// Billionths in the largest of a few units that leaves no rest.
fn written(nano: u128) -> String {
    if nano == 0 {
        return "0".to_owned();
    }
    let units = [("Mi", NANO << 20), ("", NANO), ("m", NANO / 1_000)];
    match units.iter().find(|(_, unit)| nano.is_multiple_of(*unit)) {
        Some((suffix, unit)) => format!("{}{suffix}", nano / unit),
        None => format!("{nano}n"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_parsed() {
        for (text, nano) in [
            ("0", 0),
            ("1", NANO),
            ("10m", NANO / 100),
            ("0.5", NANO / 2),
            (".5", NANO / 2),
            ("1.", NANO),
            ("100u", 100_000),
            ("7n", 7),
            ("2.000n", 2),
            ("1.5k", 1_500 * NANO),
            ("16Mi", (16 << 20) * NANO),
            ("1.5Gi", (3 << 29) * NANO),
            ("1e3", 1_000 * NANO),
            ("1.5E+3", 1_500 * NANO),
            ("12E-1", 12 * NANO / 10),
            ("1E", NANO * NANO * NANO),
            ("3P", 3 * NANO * NANO * 1_000_000),
            ("7Ei", (7 << 60) * NANO),
            ("1Pi", (1 << 50) * NANO),
            ("9223372036854775807", MAX),
            ("9223372036854775807000000000n", MAX),
        ] {
            assert_eq!(parse(text), Ok(nano), "{text}");
        }
    }

    #[test]
    fn all_else_is_refused() {
        for text in [
            "",
            ".",
            "-1",
            "+1",
            "1e",
            "1e+",
            "1e--3",
            "1e+-3",
            "1e3.5",
            "1e39",
            "1e99999999999",
            "1Em",
            "1K",
            "1mi",
            "1 Mi",
            "Mi",
            "1.2.3",
            "ten",
            // Finer than a billionth.
            "0.5n",
            "1e-10",
            "0.1234567890",
            // Larger than 64 bits.
            "8Ei",
            "10E",
            "9223372036854775808",
            "9223372036854775807.1",
            "99999999999999999999999999999",
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("as in 10m"), "{text}: {error}");
        }
    }

    #[test]
    fn amounts_are_added_up() {
        for (amount, more, sum) in [
            ("500m", "10m", "510m"),
            ("1", "10m", "1010m"),
            ("1.5", "500m", "2"),
            ("64Mi", "192Mi", "256Mi"),
            ("1.5Gi", "16Mi", "1552Mi"),
            // No multiple of a Mi.
            ("500M", "16Mi", "516777216"),
            ("1e3", "1", "1001"),
            ("1u", "1m", "1001000n"),
            ("0", "0", "0"),
            ("9223372036854775806", "1", "9223372036854775807"),
        ] {
            let more = parse(more).unwrap();
            assert_eq!(add(amount, more).as_deref(), Some(sum), "{amount} and {more}");
        }
        assert_eq!(add("much", 1), None);
        assert_eq!(add("9223372036854775807", 1), None);
        assert_eq!(add("1", u128::MAX), None);
    }

    proptest! {
        #[test]
        fn a_written_amount_is_read_as_it_was(
            nano in prop_oneof![0..=MAX, 0..=NANO * 10, (0_u128..100_000).prop_map(|mi| (mi << 20) * NANO)],
        ) {
            prop_assert_eq!(parse(&written(nano)), Ok(nano));
        }

        #[test]
        fn no_text_is_too_much(
            text in any::<String>(), number in "[0-9.]{0,40}[numkKMGTPEei]{0,2}[+-]?[0-9]{0,12}",
        ) {
            for text in [text, number] {
                if let Some(sum) = add(&text, 1) {
                    prop_assert_eq!(parse(&sum), parse(&text).map(|amount| amount + 1));
                }
            }
        }
    }
}
