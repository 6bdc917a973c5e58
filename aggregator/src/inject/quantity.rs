//! Amounts of CPU and memory, as Kubernetes writes them: `10m`, `0.5`, `192Mi`.

/// Most digits before and after the point.
const MAX_WHOLE_DIGITS: usize = 12;
const MAX_FRACTION_DIGITS: usize = 9;

/// Billionths of one.
const NANO: u128 = 1_000_000_000;

/// Reads an amount, in billionths. Exponents (`1e3`), which Kubernetes takes too, and signs are refused.
pub(super) fn parse(text: &str) -> Result<u128, String> {
    let bad = || format!("is {}, not an amount as in 10m, 0.5 or 192Mi", super::shown(text));
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_short = whole.len() <= MAX_WHOLE_DIGITS && fraction.len() <= MAX_FRACTION_DIGITS;
    if !is_short || (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(bad());
    }
    let (times, by) = scale(suffix).ok_or_else(bad)?;
    let digits: u128 = format!("{whole}{fraction:0<MAX_FRACTION_DIGITS$}")
        .parse()
        .map_err(|_| bad())?;
    digits
        .checked_mul(times)
        .map(|product| product / by)
        .ok_or_else(bad)
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
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
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
            ("1.5k", 1_500 * NANO),
            ("16Mi", (16 << 20) * NANO),
            ("999999999999Ti", (999_999_999_999 << 40) * NANO),
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
            "1e3",
            "1E",
            "1mi",
            "1 Mi",
            "Mi",
            "1.2.3",
            "ten",
            "1000000000000",
            "0.1234567890",
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("as in 10m"), "{text}: {error}");
        }
    }
}
