//! Rules that say where a request's tenant stands: their text, which the agent's flags and the policy share.
//!
//! ```text
//!   rule   = place [ "|lower" ] [ "|regex=" PATTERN ]
//!
//!   place  = "header:" NAME                a header
//!          | "host:" ... "{tenant}" ...    one label of the host, as in host:{tenant}.api.example.com
//!          | "path:/" ... "{tenant}" ...   one segment of the path, as in path:/t/{tenant}/
//!          | "query:" NAME                 a parameter of the query
//!          | "jwt:" CLAIM [ "@" HEADER ]   a claim of the bearer token in `authorization`, or of the token in HEADER
//!          | "fixed:" NAME                 this tenant; without options
//! ```
//!
//! `|lower` makes capital letters small. `|regex=` demands that the value fits the pattern **as a whole**: it is
//! anchored at both ends, because a pattern that may fit somewhere would take `xacme` for `acme`. What its one
//! group holds is the name, or all of the value where it has no group. The options work in the order in which they
//! are written, and the pattern is the rest of the text, so that it may have a `|`.
//!
//! A claim is a name, or names with dots between them that lead into objects (`org.id`). A claim that is a URL
//! is one name, whatever dots it has. **The token is decoded and not verified**: that is the application's task. A
//! forged token is counted for the tenant that it names, as a forged header is.
//!
//! A rule has no white space, so that a list of rules is written with white space between them: on a command line,
//! in an environment variable, one on each line of a file.

use std::{fmt, str::FromStr};

use regex_lite::{Regex, RegexBuilder};

use crate::names::{NameError, TenantName};

/// Most rules of a list: each costs a look at every request to which none before it applies.
pub const MAX_RULES: usize = 16;

/// Longest rule, in bytes.
pub const MAX_RULE_BYTES: usize = 512;

/// Longest pattern of a rule, in bytes.
pub const MAX_PATTERN_BYTES: usize = 256;

/// Longest name of a header, of a parameter or of a claim, in bytes.
const MAX_PLACE_NAME_BYTES: usize = 128;

/// Most names of a claim.
const MAX_CLAIM_NAMES: usize = 8;

/// Largest compiled pattern, in bytes: some thousand states, each of which may be looked at for each character.
const MAX_COMPILED_BYTES: usize = 32 << 10;

/// Most brackets within brackets of a pattern.
const MAX_NESTING: u32 = 32;

/// The header in which a bearer token stands.
const AUTHORIZATION: &str = "authorization";

/// Where a tenant's name stands, and what is done with what stands there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Where it stands.
    pub place: Place,
    /// Whether capital letters are made small.
    pub lower: bool,
    /// What the value must look like.
    pub shape: Option<Shape>,
}

/// Where a tenant's name stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the header with this name (in lower case).
    Header(String),
    /// In one label of the host.
    Host(Template),
    /// In one segment of the path.
    Path(Template),
    /// In the parameter of the query with this name.
    Query(String),
    /// In a claim of a JSON Web Token (RFC 7519).
    Jwt {
        /// The claim's name, and the names within it.
        claim: Vec<String>,
        /// The header that has the token (in lower case).
        header: String,
    },
    /// Nowhere: it is always this one.
    Fixed(TenantName),
}

/// Text before and after `{tenant}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// What stands before the name.
    pub before: String,
    /// What stands after it.
    pub after: String,
}

/// A regular expression that a whole value must fit.
#[derive(Clone)]
pub struct Shape {
    pattern: String,
    /// The pattern, anchored at both ends.
    regex: Regex,
    /// The group that holds the name; 0 is the whole.
    group: usize,
}

/// Why a rule, or a list of rules, is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// No such kind of rule.
    #[error(
        "{0:?} is not a rule; say header:NAME, host:{{tenant}}.example.com, path:/t/{{tenant}}/, query:NAME, jwt:CLAIM or fixed:NAME"
    )]
    Kind(String),
    /// The rule is too long.
    #[error("a rule has {0} bytes; at most {MAX_RULE_BYTES} are allowed")]
    TooLong(usize),
    /// The rule has white space or a control character.
    #[error(
        "the rule {0:?} has white space or control characters; white space stands between rules only, and a pattern says \\s or \\x20"
    )]
    WhiteSpace(String),
    /// The template does not have `{tenant}` exactly once.
    #[error("{0:?} must have {{tenant}} exactly once")]
    Placeholder(String),
    /// `{tenant}` is not a whole segment of the path.
    #[error(
        "{0:?} must begin with /, have no query, and {{tenant}} must be a whole segment, as in path:/t/{{tenant}}/"
    )]
    Segment(String),
    /// `{tenant}` is not a whole label of the host.
    #[error("{{tenant}} in {0:?} must be a whole label, as in host:{{tenant}}.example.com")]
    Label(String),
    /// Not the name of a header.
    #[error("{0:?} is not the name of a header")]
    HeaderName(String),
    /// Not the name of a parameter.
    #[error("{0:?} is not the name of a query's parameter; write it decoded, without & = # % and +")]
    Parameter(String),
    /// Not the name of a claim.
    #[error("{0:?} is not the name of a claim, as in jwt:tenant or jwt:org.id")]
    Claim(String),
    /// Not the name of a tenant.
    #[error("the fixed tenant {0:?} {1}")]
    Name(String, NameError),
    /// The fixed tenant has options.
    #[error("{0:?} is a fixed tenant, so that |lower and |regex= would change nothing; leave them out")]
    FixedOptions(String),
    /// No such option.
    #[error("|{0} is not an option of a rule; say |lower, |regex=PATTERN, or |lower|regex=PATTERN")]
    Option(String),
    /// The pattern is empty or too long.
    #[error("the pattern of |regex= has {0} bytes; give 1 to {MAX_PATTERN_BYTES}")]
    PatternLength(usize),
    /// The pattern is no regular expression, or one that is too large.
    #[error("the pattern {0:?} cannot be used: {1}")]
    Pattern(String, String),
    /// The pattern has several groups.
    #[error(
        "the pattern {0:?} has {1} groups; one may hold the tenant's name, the others must be of the form (?:...)"
    )]
    Groups(String, usize),
    /// An option stands where it would belong to the pattern.
    #[error(
        "the pattern {0:?} ends with |lower; say |lower|regex=PATTERN, since the pattern is the rest of the rule"
    )]
    LowerLast(String),
    /// There are too many rules.
    #[error("there are {0} rules for tenants; at most {MAX_RULES} are allowed")]
    TooMany(usize),
    /// A rule follows one that always applies.
    #[error("no rule can follow {0}, which always applies; put it last")]
    AfterFixed(String),
}

/// Reads rules with white space between them, from one text or several, and checks the list.
pub fn parse_list<'t>(texts: impl IntoIterator<Item = &'t str>) -> Result<Vec<Rule>, RuleError> {
    let texts = texts.into_iter().flat_map(str::split_whitespace);
    let rules = texts.map(str::parse).collect::<Result<Vec<Rule>, RuleError>>()?;
    check_list(&rules)?;
    Ok(rules)
}

/// Checks what concerns more than one rule.
pub fn check_list(rules: &[Rule]) -> Result<(), RuleError> {
    if rules.len() > MAX_RULES {
        return Err(RuleError::TooMany(rules.len()));
    }
    let mut before_last = rules.iter().rev().skip(1);
    match before_last.find(|rule| matches!(rule.place, Place::Fixed(_))) {
        Some(fixed) => Err(RuleError::AfterFixed(fixed.to_string())),
        None => Ok(()),
    }
}

// === impl Rule ===

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        if text.len() > MAX_RULE_BYTES {
            return Err(RuleError::TooLong(text.len()));
        }
        if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(RuleError::WhiteSpace(text.to_owned()));
        }
        let Some((place, options)) = text.split_once('|') else {
            return Ok(Self {
                place: text.parse()?,
                lower: false,
                shape: None,
            });
        };
        let place: Place = place.parse()?;
        if matches!(place, Place::Fixed(_)) {
            return Err(RuleError::FixedOptions(text.to_owned()));
        }
        let (lower, pattern) = split_options(options)?;
        Ok(Self {
            place,
            lower,
            shape: pattern.map(Shape::parse).transpose()?,
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if self.lower {
            f.write_str("|lower")?;
        }
        match &self.shape {
            Some(shape) => write!(f, "|regex={}", shape.pattern),
            None => Ok(()),
        }
    }
}

/// Whether the options have `lower`, and their pattern.
fn split_options(options: &str) -> Result<(bool, Option<&str>), RuleError> {
    if options == "lower" {
        return Ok((true, None));
    }
    let (lower, rest) = match options.strip_prefix("lower|") {
        Some(rest) => (true, rest),
        None => (false, options),
    };
    match rest.strip_prefix("regex=") {
        Some(pattern) => Ok((lower, Some(pattern))),
        None => Err(RuleError::Option(rest.to_owned())),
    }
}

// === impl Place ===

impl FromStr for Place {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let Some((kind, value)) = text.split_once(':') else {
            return Err(RuleError::Kind(text.to_owned()));
        };
        match kind {
            "header" => header_name(value).map(Self::Header),
            "host" => Template::of_host(value).map(Self::Host),
            "path" => Template::of_path(value).map(Self::Path),
            "query" => parameter(value).map(Self::Query),
            "jwt" => {
                let (claim, header) = value.rsplit_once('@').unwrap_or((value, AUTHORIZATION));
                Ok(Self::Jwt {
                    claim: claim_names(claim)?,
                    header: header_name(header)?,
                })
            }
            "fixed" => TenantName::parse(value.as_bytes())
                .map(Self::Fixed)
                .map_err(|why| RuleError::Name(value.to_owned(), why)),
            _ => Err(RuleError::Kind(text.to_owned())),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Host(template) => write!(f, "host:{template}"),
            Self::Path(template) => write!(f, "path:{template}"),
            Self::Query(name) => write!(f, "query:{name}"),
            Self::Jwt { claim, header } if header == AUTHORIZATION => write!(f, "jwt:{}", claim.join(".")),
            Self::Jwt { claim, header } => write!(f, "jwt:{}@{header}", claim.join(".")),
            Self::Fixed(name) => write!(f, "fixed:{name}"),
        }
    }
}

/// The name of a header, in lower case: a token of RFC 9110, section 5.6.2, without `|`, which begins the options.
fn header_name(text: &str) -> Result<String, RuleError> {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`~".contains(&b);
    if text.is_empty() || text.len() > MAX_PLACE_NAME_BYTES || !text.bytes().all(is_token) {
        return Err(RuleError::HeaderName(text.to_owned()));
    }
    Ok(text.to_ascii_lowercase())
}

fn parameter(text: &str) -> Result<String, RuleError> {
    let is_coded = |c: char| matches!(c, '&' | '=' | '#' | '%' | '+');
    if text.is_empty() || text.len() > MAX_PLACE_NAME_BYTES || text.contains(is_coded) {
        return Err(RuleError::Parameter(text.to_owned()));
    }
    Ok(text.to_owned())
}

fn claim_names(text: &str) -> Result<Vec<String>, RuleError> {
    // Identity providers name claims of their own by URLs, to keep them apart from others'.
    let names: Vec<&str> = if text.contains("://") {
        vec![text]
    } else {
        text.split('.').collect()
    };
    let is_empty = names.iter().any(|name| name.is_empty());
    if is_empty || names.len() > MAX_CLAIM_NAMES || text.len() > MAX_PLACE_NAME_BYTES {
        return Err(RuleError::Claim(text.to_owned()));
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

// === impl Template ===

impl Template {
    fn of_host(text: &str) -> Result<Self, RuleError> {
        let template = Self::parse(&text.to_ascii_lowercase())?;
        let whole = (template.before.is_empty() || template.before.ends_with('.'))
            && (template.after.is_empty() || template.after.starts_with('.'));
        whole
            .then_some(template)
            .ok_or_else(|| RuleError::Label(text.to_owned()))
    }

    fn of_path(text: &str) -> Result<Self, RuleError> {
        let template = Self::parse(text)?;
        let whole = template.before.starts_with('/')
            && template.before.ends_with('/')
            && (template.after.is_empty() || template.after.starts_with('/'))
            && !text.contains(['?', '#']);
        whole
            .then_some(template)
            .ok_or_else(|| RuleError::Segment(text.to_owned()))
    }

    fn parse(text: &str) -> Result<Self, RuleError> {
        let mut parts = text.split("{tenant}");
        match (parts.next(), parts.next(), parts.next()) {
            (Some(before), Some(after), None) => Ok(Self {
                before: before.to_owned(),
                after: after.to_owned(),
            }),
            _ => Err(RuleError::Placeholder(text.to_owned())),
        }
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{{tenant}}{}", self.before, self.after)
    }
}

// === impl Shape ===

impl Shape {
    fn parse(pattern: &str) -> Result<Self, RuleError> {
        if pattern.is_empty() || pattern.len() > MAX_PATTERN_BYTES {
            return Err(RuleError::PatternLength(pattern.len()));
        }
        if pattern.ends_with("|lower") {
            return Err(RuleError::LowerLast(pattern.to_owned()));
        }
        let compile = |text: &str| {
            RegexBuilder::new(text)
                .size_limit(MAX_COMPILED_BYTES)
                .nest_limit(MAX_NESTING)
                .build()
                .map_err(|why| RuleError::Pattern(pattern.to_owned(), why.to_string()))
        };
        // By itself first: "a)|(b" is whole only between the brackets below, and would not be anchored.
        let groups = compile(pattern)?.captures_len().saturating_sub(1);
        if groups > 1 {
            return Err(RuleError::Groups(pattern.to_owned(), groups));
        }
        Ok(Self {
            pattern: pattern.to_owned(),
            regex: compile(&format!(r"\A(?:{pattern})\z"))?,
            group: groups,
        })
    }

    /// The part of the value that is the name; none if the value does not fit. The time is at most proportional
    /// to the value's length.
    pub fn part_of<'v>(&self, value: &'v str) -> Option<&'v str> {
        let part = self.regex.captures(value)?.get(self.group)?;
        Some(part.as_str())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.pattern)
    }
}

impl PartialEq for Shape {
    fn eq(&self, other: &Self) -> bool {
        self.pattern == other.pattern
    }
}

impl Eq for Shape {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_as_they_were_read() {
        for text in [
            "header:x-tenant-id",
            "header:x-tenant-id|lower",
            "header:cookie|regex=(?:.*;)?tenant=([^;]+)(?:;.*)?",
            "header:x|lower|regex=(a|b)-.*",
            "host:{tenant}.api.example.com",
            "host:api.{tenant}",
            "path:/t/{tenant}/",
            "path:/{tenant}",
            "path:/t/{tenant}/v1|regex=[a-z]{1,9}",
            "query:tenant",
            "query:filter[tenant]|lower",
            "jwt:tenant",
            "jwt:org.id",
            "jwt:https://example.com/org.id",
            "jwt:org.id@x-token|lower",
            "fixed:acme",
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
            assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
        }
        for (text, shown) in [
            ("header:X-Tenant-Id", "header:x-tenant-id"),
            ("host:{tenant}.API.Example.com", "host:{tenant}.api.example.com"),
            ("jwt:org.id@Authorization", "jwt:org.id"),
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), shown);
        }
        let claim = |text: &str| match text.parse::<Rule>().unwrap().place {
            Place::Jwt { claim, .. } => claim,
            other => panic!("{other:?}"),
        };
        assert_eq!(claim("jwt:org.id"), ["org", "id"]);
        assert_eq!(claim("jwt:https://a.b/c.d"), ["https://a.b/c.d"]);
    }

    #[test]
    fn bad_rules_are_refused() {
        let long = |before: &str, count: usize| format!("{before}{}", "a".repeat(count));
        for (text, part) in [
            ("acme", "is not a rule"),
            ("", "is not a rule"),
            ("cookie:x", "is not a rule"),
            ("header:a b", "has white space"),
            ("header:a\u{a0}b", "has white space"),
            ("header:a\0b", "has white space"),
            ("header:", "is not the name of a header"),
            ("header:a:b", "is not the name of a header"),
            ("header:é", "is not the name of a header"),
            ("header:a,path:/t/{tenant}/", "is not the name of a header"),
            (&long("header:", 129), "is not the name of a header"),
            (&long("header:", 600), "at most 512"),
            ("host:example.com", "exactly once"),
            ("host:x{tenant}.example.com", "whole label"),
            ("path:t/{tenant}/", "must begin with /"),
            ("path:/t/{tenant}x", "whole segment"),
            ("path:/t/{tenant}/?x", "no query"),
            ("path:/{tenant}/{tenant}", "exactly once"),
            ("query:", "is not the name of a query's parameter"),
            ("query:a=b", "is not the name of a query's parameter"),
            ("query:a%20b", "write it decoded"),
            ("jwt:", "is not the name of a claim"),
            ("jwt:org..id", "is not the name of a claim"),
            ("jwt:a.b.c.d.e.f.g.h.i", "is not the name of a claim"),
            ("jwt:org@", "is not the name of a header"),
            ("fixed:__none__", "begins with"),
            ("fixed:", "is empty"),
            ("fixed:acme|lower", "leave them out"),
            ("header:x|", "is not an option"),
            ("header:x|upper", "|upper is not an option"),
            ("header:x|lower|lower", "|lower is not an option"),
            ("header:x|regex=", "has 0 bytes"),
            (&long("header:x|regex=", 257), "has 257 bytes"),
            ("header:x|regex=a|lower", "ends with |lower"),
            ("header:x|regex=(", "cannot be used"),
            ("header:x|regex=a)|(b", "cannot be used"),
            ("header:x|regex=(?x)a#", "cannot be used"),
            (r"header:x|regex=(a)\1", "cannot be used"),
            ("header:x|regex=(?:a{1000}){1000}", "cannot be used"),
            ("header:x|regex=(a)(b)", "has 2 groups"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains(['\n', '\0']), "{error}");
        }
    }

    #[test]
    fn a_pattern_fits_the_whole_value() {
        let part = |pattern: &str, value: &'static str| {
            let rule: Rule = format!("header:x|regex={pattern}").parse().unwrap();
            rule.shape.unwrap().part_of(value)
        };
        assert_eq!(part("[a-z]+", "acme"), Some("acme"));
        assert_eq!(part("[a-z]+", "acme1"), None);
        assert_eq!(part("[a-z]+", "1acme"), None);
        assert_eq!(part("[a-z]+", "acme\n"), None);
        assert_eq!(part("(?m)^[a-z]+$", "x\nacme"), None);
        assert_eq!(part("t-([a-z]+)-.*", "t-acme-eu"), Some("acme"));
        assert_eq!(part("(?P<tenant>[a-z]+)/.*", "acme/eu"), Some("acme"));
        // The first alternative alone would fit the beginning.
        assert_eq!(part("a|ab", "ab"), Some("ab"));
        assert_eq!(part("(a)?b", "b"), None);
        assert_eq!(part("(.*)", ""), Some(""));
    }

    #[test]
    fn lists_are_checked_as_a_whole() {
        let read = |text: &str| parse_list([text]).map(|rules| rules.len());
        assert_eq!(read(""), Ok(0));
        assert_eq!(read("header:a\n  path:/t/{tenant}/\tfixed:rest\n"), Ok(3));
        assert_eq!(parse_list(["header:a", "fixed:rest"]).unwrap().len(), 2);
        assert_eq!(
            parse_list(["fixed:rest", "header:a"]).unwrap_err().to_string(),
            "no rule can follow fixed:rest, which always applies; put it last"
        );
        assert_eq!(
            read("fixed:a fixed:b"),
            Err(RuleError::AfterFixed("fixed:a".to_owned()))
        );
        let many = "header:a ".repeat(MAX_RULES);
        assert_eq!(read(&many), Ok(MAX_RULES));
        assert_eq!(
            read(&format!("{many} header:b")),
            Err(RuleError::TooMany(MAX_RULES + 1))
        );
        assert!(read("header:a cookie:b").is_err());
    }
}
