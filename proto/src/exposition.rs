//! What both programs show to Prometheus: the classic form of the histogram and of the text.
//!
//! The classic form is read by every version of Prometheus; native histograms need a protobuf scrape that
//! is off by default (Prometheus documentation, `scrape_native_histograms`).

use crate::histogram::Histogram;

/// Upper bounds of the classic buckets are 2^e seconds for these e. They are bounds of our own buckets too, so
/// that the counts are exact.
const EXPONENTS: std::ops::RangeInclusive<i32> = -12..=7;

/// The classic buckets of a histogram: each with its upper bound in seconds and its own count; the last bound is
/// infinite.
pub fn classic_buckets(histogram: &Histogram) -> Vec<(f64, u64)> {
    let mut below = 0;
    let mut buckets: Vec<_> = EXPONENTS
        .map(|exponent| {
            // floor(2^e * 10^9): whole nanoseconds are at most the bound if and only if they are at most this.
            let bound_ns = if exponent < 0 {
                1_000_000_000_u64 >> exponent.unsigned_abs()
            } else {
                1_000_000_000_u64 << exponent.unsigned_abs()
            };
            let up_to = histogram.count() - histogram.count_above(bound_ns).at_least;
            let own = up_to - below;
            below = up_to;
            (f64::from(exponent).exp2(), own)
        })
        .collect();
    buckets.push((f64::INFINITY, histogram.count() - below));
    buckets
}

/// Turns OpenMetrics' text into Prometheus' older one (text format 0.0.4), in which a family is named as its
/// samples are, so that `promtool check metrics` and every scraper read it.
pub fn classic_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = "";
    for line in open_metrics.lines() {
        if let Some(about) = line.strip_prefix("# HELP ") {
            help = about;
        } else if let Some(about) = line.strip_prefix("# TYPE ") {
            let (name, kind) = about.rsplit_once(' ').unwrap_or((about, "untyped"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                _ => ("", kind),
            };
            let help = help.strip_prefix(name).unwrap_or(help).trim_start();
            text.push_str(&format!(
                "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n"
            ));
        } else if line != "# EOF" {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The content type of [`classic_text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classic_buckets_hold_every_value_once() {
        let mut histogram = Histogram::new();
        for ns in [
            0,
            976_562,
            976_563,
            1_000_000_000,
            1_000_000_001,
            128_000_000_000,
            128_000_000_001,
        ] {
            histogram.record(ns);
        }
        let filled: Vec<_> = classic_buckets(&histogram)
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        let bounds = [
            (0.000_244_140_625, 1),
            (0.000_976_562_5, 1),
            (0.001_953_125, 1),
            (1.0, 1),
            (2.0, 1),
            (128.0, 1),
            (f64::INFINITY, 1),
        ];
        assert_eq!(filled, bounds);
    }

    #[test]
    fn families_are_named_as_their_samples() {
        let open = "# HELP a_requests Requests.\n# TYPE a_requests counter\na_requests_total 3\n\
                    # HELP a_build What runs.\n# TYPE a_build info\na_build_info{v=\"1\"} 1\n# EOF\n";
        assert_eq!(
            classic_text(open),
            "# HELP a_requests_total Requests.\n# TYPE a_requests_total counter\na_requests_total 3\n\
             # HELP a_build_info What runs.\n# TYPE a_build_info gauge\na_build_info{v=\"1\"} 1\n"
        );
    }
}
