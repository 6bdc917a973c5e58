//! Matchers of labels. A label that a series does not have is the empty text, as everywhere in Prometheus.

use std::fmt::{self, Write as _};

use regex_lite::{Regex, RegexBuilder};

/// The label that a metric's name is.
pub(in crate::faces::prometheus) const NAME: &str = "__name__";

/// Size of a compiled pattern, in bytes: some hundred characters. The time of a match grows with it.
const MAX_COMPILED_BYTES: usize = 8 << 10;

/// How deep the groups of a pattern may be.
const MAX_DEPTH: u32 = 32;

/// How a matcher compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Matches,
    MatchesNot,
    IsNot,
    Is,
}

impl Operator {
    /// Longer ones first, so that none is taken for another.
    pub(super) const ALL: [Self; 4] = [Self::Matches, Self::MatchesNot, Self::IsNot, Self::Is];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Matches => "=~",
            Self::MatchesNot => "!~",
            Self::IsNot => "!=",
            Self::Is => "=",
        }
    }
}

/// What a label must be, or must not be.
#[derive(Debug)]
pub(in crate::faces::prometheus) struct Matcher {
    label: String,
    operator: Operator,
    value: String,
    /// Of those that compare with a pattern.
    pattern: Option<Regex>,
}

impl Matcher {
    /// Fails with the reason if the value should be a pattern and is none.
    pub(super) fn new(label: &str, operator: Operator, value: String) -> Result<Self, String> {
        let pattern = match operator {
            Operator::Matches | Operator::MatchesNot => Some(anchored(&value)?),
            Operator::Is | Operator::IsNot => None,
        };
        Ok(Self {
            label: label.to_owned(),
            operator,
            value,
            pattern,
        })
    }

    pub(super) fn equal(label: &str, value: &str) -> Self {
        Self {
            label: label.to_owned(),
            operator: Operator::Is,
            value: value.to_owned(),
            pattern: None,
        }
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) fn value(&self) -> &str {
        &self.value
    }

    /// Whether it compares with a pattern, which takes longer than comparing texts.
    pub(super) fn is_pattern(&self) -> bool {
        self.pattern.is_some()
    }

    /// Whether a label may have this value.
    pub(super) fn matches(&self, found: &str) -> bool {
        let is_same = self
            .pattern
            .as_ref()
            .map_or(self.value == found, |pattern| pattern.is_match(found));
        is_same == matches!(self.operator, Operator::Is | Operator::Matches)
    }
}

/// A pattern that must match the whole of a value. Matching takes linear time: there is no backtracking.
fn anchored(pattern: &str) -> Result<Regex, String> {
    let compile = |pattern: &str| {
        let mut builder = RegexBuilder::new(pattern);
        builder.size_limit(MAX_COMPILED_BYTES).nest_limit(MAX_DEPTH);
        builder.build().map_err(|why| why.to_string())
    };
    // By itself first, since `a)|(b` must not become two halves of the group around it.
    compile(pattern)?;
    compile(&format!("^(?:{pattern})$"))
}

/// What all labels of a series must be.
#[derive(Debug)]
pub(in crate::faces::prometheus) struct Selector(Vec<Matcher>);

impl Selector {
    pub(super) fn new(matchers: Vec<Matcher>) -> Self {
        Self(matchers)
    }

    /// The only value that a label can have, if the selector says so.
    pub(in crate::faces::prometheus) fn only(&self, label: &str) -> Option<&str> {
        let mut exact = self
            .0
            .iter()
            .filter(|matcher| matcher.operator == Operator::Is && matcher.label == label);
        exact.find_map(|matcher| (!matcher.value.is_empty()).then_some(matcher.value.as_str()))
    }

    /// The metric's name, if it is given as it is.
    pub(in crate::faces::prometheus) fn name(&self) -> Option<&str> {
        self.only(NAME)
    }

    /// Whether a series may be meant whose labels have these values. Of labels that have none nothing is asked.
    pub(in crate::faces::prometheus) fn matches<'v>(
        &self,
        value_of: impl Fn(&str) -> Option<&'v str>,
    ) -> bool {
        self.0
            .iter()
            .all(|matcher| value_of(&matcher.label).is_none_or(|value| matcher.matches(value)))
    }
}

/// As it would be written.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().unwrap_or_default())?;
        let is_the_name = |matcher: &&Matcher| matcher.label == NAME && matcher.operator == Operator::Is;
        let mut before = '{';
        for matcher in self.0.iter().filter(|matcher| !is_the_name(matcher)) {
            let operator = matcher.operator.as_str();
            write!(f, "{before}{}{operator}{:?}", matcher.label, matcher.value)?;
            before = ',';
        }
        if before == ',' { f.write_char('}') } else { Ok(()) }
    }
}
