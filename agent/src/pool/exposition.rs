//! Reads metrics in the text form of Prometheus (0.0.4) and of OpenMetrics (1.0), as the bytes come.
//!
//! ```text
//! # HELP, # TYPE, # UNIT, any comment          skipped
//! name{label="value",label="a \"b\" \\ \n"} 12.5 1700000000 # {trace_id="x"} 1
//! |   |                                     |    |          `- exemplar: skipped
//! |   labels                                |    `- time: skipped
//! `- a name that nobody wants ends it here  `- value, NaN and +Inf included
//! # EOF                                        the end of OpenMetrics
//! ```
//!
//! A line that is wanted and makes no sense, or is longer than [`MAX_LINE_BYTES`], is skipped and counted:
//! one bad series must not hide the others. So is a last line without its end, which may be half a number.

use std::borrow::Cow;

/// Longest line that is read.
pub(super) const MAX_LINE_BYTES: usize = 4096;

/// Most labels of a sample.
const MAX_LABELS: usize = 64;

/// One value of one series.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample<'a> {
    pub(super) name: &'a str,
    pub(super) labels: Vec<(&'a str, Cow<'a, str>)>,
    pub(super) value: f64,
}

/// Who is interested in samples.
pub(super) trait Samples {
    /// Whether samples of this name are of interest; others are not read further.
    fn is_wanted(&self, name: &str) -> bool;
    /// A sample of a name that is wanted.
    fn sample(&mut self, sample: &Sample<'_>);
}

/// What is known when the text has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// The text has said that it is complete, as OpenMetrics must.
    pub(super) is_marked: bool,
    /// Lines that were skipped although they may have been wanted.
    pub(super) skipped: u64,
}

/// Puts lines together and reads them.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The beginning of a line whose end has not come.
    held: Vec<u8>,
    /// The line whose end has not come is longer than allowed.
    is_too_long: bool,
    is_marked: bool,
    skipped: u64,
}

// === impl Sample ===

impl Sample<'_> {
    /// The value of a label.
    pub(super) fn label(&self, name: &str) -> Option<&str> {
        let label = self.labels.iter().find(|(label, _)| *label == name);
        label.map(|(_, value)| value.as_ref())
    }

    /// `rest` is what follows the name on the line.
    fn parse<'a>(name: &'a str, rest: &'a str) -> Option<Sample<'a>> {
        let rest = rest.trim_start();
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Vec::new(), rest),
        };
        let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
        Some(Sample { name, labels, value })
    }
}

// === impl Reader ===

impl Reader {
    /// The next bytes of the text, wherever they were cut.
    pub(super) fn feed(&mut self, mut bytes: &[u8], samples: &mut impl Samples) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            if self.held.is_empty() && !self.is_too_long {
                self.line(line, samples);
            } else {
                self.hold(line);
                self.held_line(samples);
            }
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.hold(bytes);
    }

    /// The text has ended.
    pub(super) fn finish(mut self) -> End {
        if self.held.trim_ascii() == b"# EOF" {
            self.is_marked = true;
        } else if self.is_too_long || !self.held.trim_ascii().is_empty() {
            self.skip();
        }
        End {
            is_marked: self.is_marked,
            skipped: self.skipped,
        }
    }

    fn hold(&mut self, part: &[u8]) {
        if self.is_too_long || self.held.len().saturating_add(part.len()) > MAX_LINE_BYTES {
            self.is_too_long = true;
            self.held.clear();
        } else {
            self.held.extend_from_slice(part);
        }
    }

    fn held_line(&mut self, samples: &mut impl Samples) {
        if std::mem::take(&mut self.is_too_long) {
            self.skip();
            return;
        }
        let mut line = std::mem::take(&mut self.held);
        self.line(&line, samples);
        line.clear();
        self.held = line;
    }

    fn line(&mut self, line: &[u8], samples: &mut impl Samples) {
        if line.len() > MAX_LINE_BYTES {
            self.skip();
            return;
        }
        let line = line.trim_ascii();
        if self.is_marked || line.is_empty() {
            return;
        }
        if line.first() == Some(&b'#') {
            self.is_marked = line == b"# EOF";
            return;
        }
        let end = line.iter().position(|byte| !is_of_name(*byte));
        let (name, rest) = line.split_at(end.unwrap_or(line.len()));
        // A name is ASCII, so that this does not fail.
        let name = str::from_utf8(name).unwrap_or_default();
        if name.is_empty() || !samples.is_wanted(name) {
            return;
        }
        match str::from_utf8(rest)
            .ok()
            .and_then(|rest| Sample::parse(name, rest))
        {
            Some(sample) => samples.sample(&sample),
            None => self.skip(),
        }
    }

    fn skip(&mut self) {
        if !self.is_marked {
            self.skipped = self.skipped.saturating_add(1);
        }
    }
}

pub(super) fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':')
}

/// Names and values.
type Labels<'a> = Vec<(&'a str, Cow<'a, str>)>;

/// The labels up to `}`, and what follows.
fn labels(mut text: &str) -> Option<(Labels<'_>, &str)> {
    let mut labels = Vec::new();
    loop {
        text = text.trim_start();
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once('=')?;
        let name = name.trim_end();
        let is_name = !name.is_empty() && name.bytes().all(|byte| is_of_name(byte) || byte == b'.');
        if !is_name || labels.len() == MAX_LABELS {
            return None;
        }
        let (value, rest) = quoted(rest.trim_start().strip_prefix('"')?)?;
        labels.push((name, value));
        let rest = rest.trim_start();
        text = match rest.strip_prefix(',') {
            Some(rest) => rest,
            None if rest.starts_with('}') => rest,
            None => return None,
        };
    }
}

/// A value up to its closing quote, and what follows.
fn quoted(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let (value, rest) = text.split_once(['"', '\\'])?;
    if !text[value.len()..].starts_with('\\') {
        return Some((Cow::Borrowed(value), rest));
    }
    let mut unescaped = String::new();
    let mut rest = text;
    loop {
        let (part, after) = rest.split_once(['"', '\\'])?;
        unescaped.push_str(part);
        if !rest[part.len()..].starts_with('\\') {
            return Some((Cow::Owned(unescaped), after));
        }
        let mut after = after.chars();
        unescaped.push(match after.next()? {
            'n' => '\n',
            same @ ('\\' | '"') => same,
            _ => return None,
        });
        rest = after.as_str();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Wants all names but `other`, and notes what it gets.
    #[derive(Debug, Default, PartialEq)]
    struct Notes(Vec<Note>);

    type Note = (String, Vec<(String, String)>, f64);

    impl Samples for Notes {
        fn is_wanted(&self, name: &str) -> bool {
            name != "other"
        }

        fn sample(&mut self, sample: &Sample<'_>) {
            let labels = sample.labels.iter();
            let labels = labels.map(|(name, value)| ((*name).to_owned(), value.to_string()));
            self.0
                .push((sample.name.to_owned(), labels.collect(), sample.value));
        }
    }

    fn read(parts: &[&[u8]]) -> (Notes, End) {
        let (mut reader, mut notes) = (Reader::default(), Notes::default());
        for part in parts {
            reader.feed(part, &mut notes);
        }
        (notes, reader.finish())
    }

    fn one(line: &str) -> Option<(Vec<(String, String)>, f64)> {
        let (notes, end) = read(&[line.as_bytes(), b"\n"]);
        assert_eq!(notes.0.len() as u64 + end.skipped, 1, "{line:?}");
        notes
            .0
            .into_iter()
            .next()
            .map(|(_, labels, value)| (labels, value))
    }

    fn label(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    /// The first two are examples of "Exposition formats" in the Prometheus documentation, the third of
    /// the OpenMetrics specification ("Exemplars").
    #[test]
    fn samples_are_read() {
        assert_eq!(
            one(concat!(
                r#"msdos_file_access_time_seconds{path="C:\\DIR\\FILE.TXT","#,
                r#"error="Cannot find file:\n\"FILE.TXT\""} 1.458255915e9"#
            )),
            Some((
                vec![
                    label("path", r"C:\DIR\FILE.TXT"),
                    label("error", "Cannot find file:\n\"FILE.TXT\""),
                ],
                1_458_255_915.0
            ))
        );
        assert_eq!(
            one(r#"http_requests_total{method="post",code="200"} 1027 1395066363000"#),
            Some((vec![label("method", "post"), label("code", "200")], 1027.0))
        );
        assert_eq!(
            one(r#"foo_bucket{le="1"} 11 # {trace_id="KOO5S4vxi0o"} 0.67"#),
            Some((vec![label("le", "1")], 11.0))
        );
        assert_eq!(one("plain 3"), Some((vec![], 3.0)));
        assert_eq!(
            one("  spaced\t { a = \"b\" , } \t 3\r"),
            Some((vec![label("a", "b")], 3.0))
        );
        assert_eq!(one("empty{} 3"), Some((vec![], 3.0)));
        assert_eq!(one("negative -3.5e2"), Some((vec![], -350.0)));
        assert_eq!(one("infinite +Inf"), Some((vec![], f64::INFINITY)));
        assert!(one("none NaN").is_some_and(|(_, value)| value.is_nan()));
        assert_eq!(one("brace{a=\"},{\"} 1"), Some((vec![label("a", "},{")], 1.0)));
    }

    #[test]
    fn nonsense_is_skipped_and_counted() {
        for line in [
            "no_value",
            "no_value{a=\"b\"}",
            "open{a=\"b\" 1",
            "open{a=\"b",
            "open{",
            "unquoted{a=b} 1",
            "no_equals{a} 1",
            "no_comma{a=\"b\"c=\"d\"} 1",
            "escape{a=\"\\t\"} 1",
            "escape{a=\"\\",
            "empty_name{=\"b\"} 1",
            "name{a\"=\"b\"} 1",
            "word one",
            "dash-ed 1",
            "underscores 1_000",
        ] {
            assert_eq!(one(line), None, "{line:?}");
        }
        assert_eq!(read(&[b"latin{a=\"\xe9\"} 1\n"]).1.skipped, 1);
        let many: String = (0..=MAX_LABELS).map(|n| format!("l{n}=\"\",")).collect();
        assert_eq!(one(&format!("many{{{many}}} 1")), None);
    }

    #[test]
    fn what_is_not_wanted_costs_nothing() {
        let comments: &[u8] = b"# HELP other nothing\n# TYPE other counter\n";
        let samples: &[u8] = b"other{a=\"broken 1\n\n  \n{\"quoted.name\"} 1\n";
        assert_eq!(
            read(&[comments, samples]),
            (
                Notes::default(),
                End {
                    is_marked: false,
                    skipped: 0
                }
            )
        );
    }

    #[test]
    fn long_lines_are_skipped_wherever_they_are_cut() {
        let longest = format!("a{{l=\"{}\"}} 1", "x".repeat(MAX_LINE_BYTES - 9));
        assert_eq!(longest.len(), MAX_LINE_BYTES);
        let longer = longest.replacen('x', "xx", 1);
        let text = format!("{longest}\n{longer}\nafter 2\n");
        for size in [1, 7, 4095, 4096, 4097, text.len()] {
            let parts: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            let (notes, end) = read(&parts);
            let names: Vec<&str> = notes.0.iter().map(|(name, _, _)| name.as_str()).collect();
            assert_eq!((names, end.skipped), (vec!["a", "after"], 1), "pieces of {size}");
        }
        assert_eq!(read(&[&vec![b'x'; 100_000]]).1.skipped, 1);
    }

    #[test]
    fn the_end_is_known() {
        let (notes, end) = read(&[b"a 1\n# EOF\nb 2\n"]);
        assert_eq!((notes.0.len(), end.is_marked), (1, true));
        assert!(read(&[b"a 1\n# E", b"OF"]).1.is_marked);
        let (notes, end) = read(&[b"a 1\nb 12"]);
        assert_eq!(notes.0.len(), 1, "the number may go on");
        assert_eq!((end.is_marked, end.skipped), (false, 1));
    }

    fn texts() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(&b"a{b=\"c\"} 1\n"[..]),
            Just(&b"name"[..]),
            Just(&b"{"[..]),
            Just(&b"}"[..]),
            Just(&b"l=\""[..]),
            Just(&b"\""[..]),
            Just(&b"\\"[..]),
            Just(&b","[..]),
            Just(&b" 1e300"[..]),
            Just(&b"\n"[..]),
            Just(&b"# EOF\n"[..]),
            Just(&b"\xff\xc3"[..]),
        ];
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..400),
            prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat()),
        ]
    }

    proptest! {
        #[test]
        fn nothing_panics_and_cuts_do_not_matter(text in texts(), size in 1_usize..40) {
            let whole = read(&[&text]);
            let parts: Vec<&[u8]> = text.chunks(size).collect();
            // NaN is not equal to itself.
            prop_assert_eq!(format!("{:?}", read(&parts)), format!("{whole:?}"));
        }
    }
}
