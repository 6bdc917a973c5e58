//! The part of PromQL that is read: one instant vector selector, `vector(N)`, or a number.
//!
//! ```text
//! expression = selector | "vector" "(" number ")" | number
//! selector   = [name] ["{" [matcher {"," matcher} [","]] "}"]
//! matcher    = label ("=" | "!=" | "=~" | "!~") string
//! number     = {"+" | "-"} (decimal | octal | hexadecimal | "Inf" | "NaN")
//! ```
//!
//! What is refused is refused at the place and, where it is plain bad syntax, in the words of Prometheus 2.42, so that
//! people recognise it: a line and a column in bytes, both from 1. Nothing here recurses, and every size is bounded.

mod matcher;
mod text;

pub(super) use self::matcher::{NAME, Selector};
use self::{
    matcher::{Matcher, Operator},
    text::Text,
};

/// Longest expression, in bytes.
const MAX_BYTES: usize = 4 << 10;

/// Most matchers of a selector.
const MAX_MATCHERS: usize = 32;

/// Most of them that are patterns.
const MAX_PATTERNS: usize = 4;

/// What Flagger's built-in metrics ask of a mesh or an ingress: how the names begin (`pkg/metrics/observers`, 1.44).
const MESH_METRICS: [&str; 10] = [
    "apisix_http_",
    "envoy_cluster_upstream_rq",
    "http_request_duration_seconds_",
    "istio_request",
    "nginx_ingress_controller_",
    "osm_request_",
    "response_latency_ms_bucket",
    "response_total",
    "skipper_",
    "traefik_service_request_",
];

/// What can be answered.
#[derive(Debug)]
pub(super) enum Expression {
    /// A scalar.
    Number(f64),
    /// One series without labels.
    Vector(f64),
    /// The series that match.
    Selector(Selector),
}

/// Why an expression is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is malformed, or more than is read here.
    Malformed(String),
    /// It is one of Flagger's built-in metrics, which only a mesh can answer.
    OfAMesh,
}

/// Reads an expression.
pub(super) fn parse(source: &str) -> Result<Expression, Refusal> {
    let read = Parser::new(source).and_then(Parser::whole);
    read.map_err(|why| refusal(source, why))
}

/// Reads a selector and nothing else, as `match[]` has it.
pub(super) fn parse_selector(source: &str) -> Result<Selector, String> {
    let mut parser = Parser::new(source)?;
    let start = parser.text.at();
    let has_name = parser.text.peek().is_some_and(begins_name);
    let name = has_name.then(|| parser.text.run(is_in_name));
    let selector = parser.selector(start, name)?;
    parser.end()?;
    Ok(selector)
}

fn refusal(source: &str, why: String) -> Refusal {
    let is_of_a_mesh = ["rate(", "rate ("].iter().any(|call| source.contains(call))
        && MESH_METRICS.iter().any(|name| source.contains(name));
    if is_of_a_mesh {
        Refusal::OfAMesh
    } else {
        Refusal::Malformed(why)
    }
}

fn begins_name(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte == b':'
}

fn is_in_name(byte: u8) -> bool {
    begins_name(byte) || byte.is_ascii_digit()
}

/// Whether a byte is of a label's name or a number's tail.
fn is_in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn begins_label(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_'
}

fn begins_number(byte: u8) -> bool {
    byte.is_ascii_digit() || matches!(byte, b'.' | b'+' | b'-')
}

struct Parser<'a> {
    text: Text<'a>,
}

impl<'a> Parser<'a> {
    /// Stands at the first thing that is no blank.
    fn new(source: &'a str) -> Result<Self, String> {
        if source.len() > MAX_BYTES {
            return Err(format!(
                "the expression has {} bytes, and at most {MAX_BYTES} are read",
                source.len()
            ));
        }
        let mut text = Text::new(source);
        text.skip_blank();
        if text.peek().is_none() {
            return Err(text.refuse(0, "no expression found in input"));
        }
        Ok(Self { text })
    }

    /// An expression, and nothing after it.
    fn whole(mut self) -> Result<Expression, String> {
        let expression = self.expression()?;
        self.end()?;
        Ok(expression)
    }

    fn expression(&mut self) -> Result<Expression, String> {
        match self.text.peek() {
            Some(byte) if begins_number(byte) => Ok(Expression::Number(self.number()?)),
            Some(byte) if begins_name(byte) || byte == b'{' => self.named(),
            _ => Err(self.unexpected()),
        }
    }

    /// What begins with a name, or with the braces that follow one.
    fn named(&mut self) -> Result<Expression, String> {
        let start = self.text.at();
        let name = self.text.run(is_in_name);
        if let Some(value) = special(name) {
            return Ok(Expression::Number(value));
        }
        self.text.skip_blank();
        if self.text.peek() != Some(b'(') {
            let name = (!name.is_empty()).then_some(name);
            return Ok(Expression::Selector(self.selector(start, name)?));
        }
        if name != "vector" {
            let what = format!("{name:?} cannot be computed here");
            return Err(self.text.refuse(start, &what));
        }
        self.text.step();
        self.text.skip_blank();
        let value = self.number()?;
        self.text.skip_blank();
        if !self.text.take(b')') {
            return Err(match self.text.peek() {
                None => self.text.refuse(self.text.at(), "unclosed left parenthesis"),
                Some(_) => self.unexpected(),
            });
        }
        Ok(Expression::Vector(value))
    }

    fn number(&mut self) -> Result<f64, String> {
        let mut is_negative = false;
        while let Some(sign @ (b'+' | b'-')) = self.text.peek() {
            is_negative ^= sign == b'-';
            self.text.step();
            self.text.skip_blank();
        }
        let value = self.unsigned()?;
        Ok(if is_negative { -value } else { value })
    }

    fn unsigned(&mut self) -> Result<f64, String> {
        let start = self.text.at();
        match self.text.peek() {
            None => Err(self.text.refuse(start, "unexpected end of input")),
            Some(byte) if byte.is_ascii_digit() || byte == b'.' => self.digits(),
            Some(byte) if begins_name(byte) => {
                let word = self.text.run(is_in_name);
                special(word).ok_or_else(|| {
                    let what = format!("expected a number, and {word:?} is none");
                    self.text.refuse(start, &what)
                })
            }
            Some(_) => Err(self.unexpected()),
        }
    }

    fn digits(&mut self) -> Result<f64, String> {
        let start = self.text.at();
        let is_hexadecimal = self.text.take_word("0x") || self.text.take_word("0X");
        let is_digit = |byte: u8| {
            if is_hexadecimal {
                byte.is_ascii_hexdigit()
            } else {
                byte.is_ascii_digit()
            }
        };
        self.text.run(is_digit);
        if self.text.take(b'.') {
            self.text.run(is_digit);
        }
        if self.text.take(b'e') || self.text.take(b'E') {
            if !self.text.take(b'+') {
                self.text.take(b'-');
            }
            self.text.run(|byte| byte.is_ascii_digit());
        }
        let digits = self.text.since(start);
        if self.text.peek().is_some_and(is_in_word) {
            let what = format!("bad number or duration syntax: {digits:?}");
            return Err(self.text.refuse(start, &what));
        }
        read_number(digits).ok_or_else(|| {
            let what = format!("error parsing number: {digits:?} is no number that fits");
            self.text.refuse(start, &what)
        })
    }

    /// The braces, if there are any, after a name that began at `start`.
    fn selector(&mut self, start: usize, name: Option<&str>) -> Result<Selector, String> {
        self.text.skip_blank();
        let mut matchers = match self.text.peek() {
            Some(b'{') => self.matchers()?,
            _ if name.is_some() => Vec::new(),
            _ => return Err(self.unexpected()),
        };
        if let Some(name) = name {
            if let Some(second) = matchers.iter().find(|matcher| matcher.label() == NAME) {
                let second = second.value();
                let what = format!("metric name must not be set twice: {name:?} or {second:?}");
                return Err(self.text.refuse(start, &what));
            }
            matchers.push(Matcher::equal(NAME, name));
        }
        if matchers.iter().all(|matcher| matcher.matches("")) {
            let what = "vector selector must contain at least one non-empty matcher";
            return Err(self.text.refuse(start, what));
        }
        Ok(Selector::new(matchers))
    }

    fn matchers(&mut self) -> Result<Vec<Matcher>, String> {
        let mut matchers = Vec::new();
        self.text.step();
        loop {
            self.text.skip_blank();
            let start = self.text.at();
            match self.inside()? {
                b'}' => break,
                byte if begins_label(byte) => {}
                _ => return Err(self.unexpected_inside("identifier or \"}\"")),
            }
            if matchers.len() == MAX_MATCHERS {
                let what = format!("a selector has at most {MAX_MATCHERS} matchers");
                return Err(self.text.refuse(start, &what));
            }
            matchers.push(self.matcher(start)?);
            if matchers.iter().filter(|matcher| matcher.is_pattern()).count() > MAX_PATTERNS {
                let what = format!("a selector has at most {MAX_PATTERNS} patterns (=~ and !~)");
                return Err(self.text.refuse(start, &what));
            }
            self.text.skip_blank();
            match self.inside()? {
                b',' => self.text.step(),
                b'}' => {}
                _ => return Err(self.unexpected_inside("\",\" or \"}\"")),
            }
        }
        self.text.step();
        Ok(matchers)
    }

    fn matcher(&mut self, start: usize) -> Result<Matcher, String> {
        let label = self.text.run(is_in_word);
        self.text.skip_blank();
        let operator = self.operator()?;
        self.text.skip_blank();
        if !matches!(self.inside()?, b'"' | b'\'' | b'`') {
            return Err(self.unexpected_inside("string"));
        }
        let value = self.text.string()?;
        Matcher::new(label, operator, value).map_err(|why| {
            let what = format!("error parsing regexp: {why:.200}");
            self.text.refuse(start, &what)
        })
    }

    fn operator(&mut self) -> Result<Operator, String> {
        self.inside()?;
        for operator in Operator::ALL {
            if self.text.take_word(operator.as_str()) {
                return Ok(operator);
            }
        }
        Err(self.unexpected_inside("label matching operator"))
    }

    /// The next byte, which cannot be missing before the brace is closed.
    fn inside(&self) -> Result<u8, String> {
        self.text.peek().ok_or_else(|| {
            let what = "unexpected end of input inside braces";
            self.text.refuse(self.text.at(), what)
        })
    }

    fn unexpected_inside(&self, expected: &str) -> String {
        let found = match self.text.peek() {
            Some(byte) if begins_label(byte) => format!("identifier {:?}", self.text.ahead(is_in_word)),
            Some(byte @ (b',' | b'=' | b'}')) => format!("{:?}", char::from(byte).to_string()),
            Some(b'"' | b'\'' | b'`') => "string".to_owned(),
            _ => {
                let what = format!("unexpected character inside braces: {:?}", self.text.character());
                return self.text.refuse(self.text.at(), &what);
            }
        };
        let what = format!("unexpected {found} in label matching, expected {expected}");
        self.text.refuse(self.text.at(), &what)
    }

    fn unexpected(&self) -> String {
        let found = match self.text.peek() {
            None => return self.text.refuse(self.text.at(), "unexpected end of input"),
            Some(byte) if begins_name(byte) => format!("identifier {:?}", self.text.ahead(is_in_name)),
            Some(_) => format!("{:?}", self.text.character().to_string()),
        };
        self.text.refuse(self.text.at(), &format!("unexpected {found}"))
    }

    fn end(&mut self) -> Result<(), String> {
        self.text.skip_blank();
        self.text.peek().map_or(Ok(()), |_| Err(self.unexpected()))
    }
}

/// The two numbers that are words.
fn special(word: &str) -> Option<f64> {
    match word {
        _ if word.eq_ignore_ascii_case("inf") => Some(f64::INFINITY),
        _ if word.eq_ignore_ascii_case("nan") => Some(f64::NAN),
        _ => None,
    }
}

/// A number without its sign, as Prometheus reads it: whole numbers as Go does, where a leading zero means octal.
fn read_number(digits: &str) -> Option<f64> {
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    if let Some(digits) = hexadecimal {
        return i64::from_str_radix(digits, 16).ok().map(|whole| whole as f64);
    }
    if digits.starts_with('0')
        && let Ok(whole) = i64::from_str_radix(digits, 8)
    {
        return Some(whole as f64);
    }
    digits.parse().ok().filter(|value: &f64| value.is_finite())
}

#[cfg(test)]
mod tests;
