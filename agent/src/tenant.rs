//! Finds the tenant of a request by an ordered list of rules.
//!
//! The first rule that applies decides. A rule applies when the request has what it looks at: the
//! header, a host or a path of the shape. A name that is found but not allowed makes the request
//! [`Found::Invalid`]; it is then counted for nobody and never tried with the next rule, because what
//! a client sends must not choose the rule.

use std::{borrow::Cow, str::FromStr};

use coalmine_proto::names::check_name;

/// What a rule may look at in a request, whatever the protocol.
pub trait Head {
    /// The values of the header with this name (in lower case).
    fn header(&self, name: &str) -> Header<'_>;
    /// The host that the request is for, with its port if it was given.
    fn host(&self) -> Option<&[u8]>;
    /// The request target: a path with its query, or an absolute URI.
    fn target(&self) -> &[u8];
}

/// The values of one header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header<'a> {
    /// Not there.
    Missing,
    /// There, once or several times with the same value.
    Value(&'a [u8]),
    /// There several times with different values.
    Differing,
}

impl<'a> Header<'a> {
    /// Folds the values of all headers of one name.
    pub fn of(values: impl Iterator<Item = &'a [u8]>) -> Self {
        values.fold(Self::Missing, |so_far, value| match so_far {
            Self::Missing => Self::Value(value),
            Self::Value(first) if first == value => so_far,
            _ => Self::Differing,
        })
    }
}

/// What the rules found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found<'a> {
    /// A name that may be used; borrowed unless the host had capital letters.
    Name(Cow<'a, str>),
    /// No rule applied.
    Missing,
    /// A rule applied, and what it found is no name.
    Invalid,
}

/// One rule: where the tenant's name stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// `header:NAME`
    Header(String),
    /// `host:{tenant}.api.example.com`: one label of the host.
    Host(Pattern),
    /// `path:/t/{tenant}/`: one segment of the path.
    Path(Pattern),
    /// `fixed:NAME`
    Fixed(String),
}

/// Text before and after `{tenant}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    before: String,
    after: String,
}

/// Why a rule is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// No such kind of rule.
    #[error(
        "{0:?} is not a rule; say header:NAME, host:{{tenant}}.example.com, path:/t/{{tenant}}/ or fixed:NAME"
    )]
    Kind(String),
    /// The pattern does not have `{tenant}` exactly once.
    #[error("{0:?} must have {{tenant}} exactly once")]
    Placeholder(String),
    /// `{tenant}` is not a whole segment of the path.
    #[error("{0:?} must begin with / and {{tenant}} must be a whole segment, as in path:/t/{{tenant}}/")]
    Segment(String),
    /// `{tenant}` is not a whole label of the host.
    #[error("{{tenant}} in {0:?} must be a whole label, as in host:{{tenant}}.example.com")]
    Label(String),
    /// Not the name of a header.
    #[error("{0:?} is not the name of a header")]
    HeaderName(String),
    /// Not the name of a tenant.
    #[error("the fixed tenant {0:?} {1}")]
    Name(String, coalmine_proto::names::NameError),
}

// === impl Rule ===

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let Some((kind, value)) = text.split_once(':') else {
            return Err(RuleError::Kind(text.to_owned()));
        };
        match kind {
            "header" => http::HeaderName::from_bytes(value.as_bytes())
                .map(|name| Self::Header(name.as_str().to_owned()))
                .map_err(|_| RuleError::HeaderName(value.to_owned())),
            "host" => {
                let pattern = Pattern::parse(&value.to_ascii_lowercase())?;
                let whole = (pattern.before.is_empty() || pattern.before.ends_with('.'))
                    && (pattern.after.is_empty() || pattern.after.starts_with('.'));
                whole
                    .then_some(Self::Host(pattern))
                    .ok_or_else(|| RuleError::Label(value.to_owned()))
            }
            "path" => {
                let pattern = Pattern::parse(value)?;
                let whole = pattern.before.starts_with('/')
                    && pattern.before.ends_with('/')
                    && (pattern.after.is_empty() || pattern.after.starts_with('/'));
                whole
                    .then_some(Self::Path(pattern))
                    .ok_or_else(|| RuleError::Segment(value.to_owned()))
            }
            "fixed" => coalmine_proto::names::TenantName::parse(value.as_bytes())
                .map(|name| Self::Fixed(name.as_str().to_owned()))
                .map_err(|why| RuleError::Name(value.to_owned(), why)),
            _ => Err(RuleError::Kind(text.to_owned())),
        }
    }
}

impl Rule {
    fn find<'a>(&'a self, head: &'a dyn Head) -> Found<'a> {
        match self {
            Self::Fixed(name) => Found::Name(Cow::Borrowed(name)),
            Self::Header(name) => match head.header(name) {
                Header::Missing | Header::Value([]) => Found::Missing,
                Header::Value(value) => checked(value),
                Header::Differing => Found::Invalid,
            },
            Self::Host(pattern) => head
                .host()
                .and_then(|host| pattern.label_of(without_port(host)))
                .map_or(Found::Missing, lower_case),
            Self::Path(pattern) => pattern
                .segment_of(path_of(head.target()))
                .map_or(Found::Missing, checked),
        }
    }
}

/// Asks the rules in turn.
pub fn find<'a>(rules: &'a [Rule], head: &'a dyn Head) -> Found<'a> {
    rules
        .iter()
        .map(|rule| rule.find(head))
        .find(|found| *found != Found::Missing)
        .unwrap_or(Found::Missing)
}

fn checked(name: &[u8]) -> Found<'_> {
    match check_name(name) {
        Ok(text) if !text.starts_with("__") => Found::Name(Cow::Borrowed(text)),
        _ => Found::Invalid,
    }
}

/// Hosts are equal whatever their case; names are not.
fn lower_case(label: &[u8]) -> Found<'_> {
    match checked(label) {
        Found::Name(name) if name.bytes().any(|b| b.is_ascii_uppercase()) => {
            Found::Name(Cow::Owned(name.to_ascii_lowercase()))
        }
        found => found,
    }
}

fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().rposition(|b| *b == b':') {
        Some(colon) if host[colon + 1..].iter().all(u8::is_ascii_digit) => &host[..colon],
        _ => host,
    }
}

/// The path of a request target, which may be an absolute URI.
fn path_of(target: &[u8]) -> &[u8] {
    if target.starts_with(b"/") {
        return target;
    }
    let scheme = target.windows(3).position(|w| w == b"://");
    let rest = scheme.map_or(&[][..], |at| &target[at + 3..]);
    let slash = rest.iter().position(|b| *b == b'/');
    slash.map_or(&[][..], |at| &rest[at..])
}

// === impl Pattern ===

impl Pattern {
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

    fn label_of<'h>(&self, host: &'h [u8]) -> Option<&'h [u8]> {
        let end = host.len().checked_sub(self.after.len())?;
        let label = host.get(self.before.len()..end)?;
        let fits = host[..self.before.len()].eq_ignore_ascii_case(self.before.as_bytes())
            && host[end..].eq_ignore_ascii_case(self.after.as_bytes())
            && !label.contains(&b'.');
        fits.then_some(label)
    }

    /// The slash that ends the pattern may be missing in the path: `/t/acme` fits `/t/{tenant}/`.
    fn segment_of<'p>(&self, path: &'p [u8]) -> Option<&'p [u8]> {
        let query = path.iter().position(|b| matches!(b, b'?' | b'#'));
        let path = &path[..query.unwrap_or(path.len())];
        let rest = path.strip_prefix(self.before.as_bytes())?;
        let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
        let (segment, rest) = rest.split_at(end);
        let after = self.after.as_bytes();
        (rest.starts_with(after) || (rest.is_empty() && after == b"/")).then_some(segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake<'a> {
        headers: &'a [(&'a str, &'a str)],
        target: &'a str,
    }

    impl Head for Fake<'_> {
        fn header(&self, name: &str) -> Header<'_> {
            let named = self.headers.iter().filter(|(n, _)| *n == name);
            Header::of(named.map(|(_, value)| value.as_bytes()))
        }

        fn host(&self) -> Option<&[u8]> {
            match self.header("host") {
                Header::Value(value) => Some(value),
                _ => None,
            }
        }

        fn target(&self) -> &[u8] {
            self.target.as_bytes()
        }
    }

    #[track_caller]
    fn check(rules: &[&str], headers: &[(&str, &str)], target: &str, expected: Result<&str, bool>) {
        let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let head = Fake { headers, target };
        let found = find(&rules, &head);
        let expected = match expected {
            Ok(name) => Found::Name(Cow::Borrowed(name)),
            Err(true) => Found::Invalid,
            Err(false) => Found::Missing,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn rules_find_tenants() {
        let header = &["header:X-Tenant-Id"][..];
        check(header, &[("x-tenant-id", "acme")], "/", Ok("acme"));
        check(header, &[], "/", Err(false));
        check(header, &[("x-tenant-id", "")], "/", Err(false));
        check(header, &[("x-tenant-id", "a b")], "/", Err(true));
        check(header, &[("x-tenant-id", "__none__")], "/", Err(true));
        check(header, &[("x-tenant-id", &"a".repeat(200))], "/", Err(true));
        check(
            header,
            &[("x-tenant-id", "a"), ("x-tenant-id", "a")],
            "/",
            Ok("a"),
        );
        check(
            header,
            &[("x-tenant-id", "a"), ("x-tenant-id", "b")],
            "/",
            Err(true),
        );

        let host = &["host:{tenant}.api.example.com"][..];
        check(host, &[("host", "acme.api.example.com:8080")], "/", Ok("acme"));
        check(host, &[("host", "ACME.Api.example.com")], "/", Ok("acme"));
        check(host, &[("host", "a.b.api.example.com")], "/", Err(false));
        check(host, &[("host", ".api.example.com")], "/", Err(true));
        check(host, &[("host", "example.com")], "/", Err(false));

        let path = &["path:/t/{tenant}/"][..];
        check(path, &[], "/t/acme/x?y=/t/z/", Ok("acme"));
        check(path, &[], "/t/acme?x", Ok("acme"));
        check(path, &[], "http://h/t/acme/x", Ok("acme"));
        check(path, &[], "/t/", Err(true));
        check(path, &[], "/u/acme/", Err(false));
        check(path, &[], "/t/ac%20me/", Err(true));
        check(path, &[], "*", Err(false));
        check(&["path:/t/{tenant}/v1"], &[], "/t/acme/v2", Err(false));
    }

    #[test]
    fn the_first_rule_that_applies_decides() {
        let rules = &["header:x-tenant", "path:/t/{tenant}/", "fixed:rest"][..];
        check(rules, &[("x-tenant", "a")], "/t/b/", Ok("a"));
        check(rules, &[], "/t/b/", Ok("b"));
        check(rules, &[], "/", Ok("rest"));
        check(rules, &[("x-tenant", "a b")], "/t/b/", Err(true));
    }

    #[test]
    fn bad_rules_are_refused() {
        for (text, part) in [
            ("acme", "is not a rule"),
            ("cookie:x", "is not a rule"),
            ("header:a b", "is not the name of a header"),
            ("host:example.com", "exactly once"),
            ("host:x{tenant}.example.com", "whole label"),
            ("path:t/{tenant}/", "must begin with /"),
            ("path:/t/{tenant}x", "whole segment"),
            ("path:/{tenant}/{tenant}", "exactly once"),
            ("fixed:__none__", "begins with"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
