//! Finds the tenant of a request by an ordered list of rules.
//!
//! The first rule that applies decides. A rule applies when the request has what it looks at: the
//! header, a host or a path of the shape, the parameter, the claim. What is found but is not allowed makes the
//! request [`Found::Invalid`]; it is then counted for nobody and never tried with the next rule, because what
//! a client sends must not choose the rule. For the same reason a value that does not fit the pattern of its
//! rule is invalid, and not missing.
//!
//! | place | does not apply (the next rule is asked) | is invalid (counted for nobody) |
//! |---|---|---|
//! | `header` | there is no such header, or it is empty | there are several with different values |
//! | `host` | no host, or one of another shape | an empty label |
//! | `path` | a path of another shape | an empty segment, a bad `%`, a path that servers read differently |
//! | `query` | there is no such parameter, or it is empty | different values, a bad `%` |
//! | `jwt` | no token, or one without the claim, or with an empty one or `null` | several headers, what is no token, a claim twice, one that is neither text nor a whole number |
//! | `fixed` | never | never |
//!
//! Then the rule's options work, and the name is checked: 1 to 128 bytes of the allowed characters, and no name
//! that Coalmine gives itself. Finding a name allocates nothing, unless it stands in a token or in coded text (a
//! `%`, of a query also a `+`), or the rule has a pattern.
//!
//! Paths and queries are decoded (RFC 3986, section 2.1), since the application decodes them too: `/t/%61cme/`
//! is the tenant `acme`. But a path is invalid, whatever the rule finds in it, where programs differ in what they make
//! of it: if a segment is `.` or `..`, or if among the segments that the rule compares one is empty, is divided by a
//! backslash or `%2F`, or becomes what the rule says only when it is decoded or loses its parameters (`;`).

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod jwt;
mod name;
mod target;

use std::borrow::Cow;

pub use coalmine_proto::rule::{Rule, RuleError};
use coalmine_proto::{
    names::check_name,
    rule::{Place, Shape},
};
pub use name::{Made, Name};

/// Longest value that is compared with a pattern, in bytes: the time that it takes grows with both. No name is longer.
const MAX_SHAPED_BYTES: usize = 1024;

/// What a rule may look at in a request, whatever the protocol.
pub trait Head {
    /// The values of the header with this name (in lower case).
    fn header(&self, name: &str) -> Header<'_>;
    /// The host that the request is for, with its port if it was given.
    fn host(&self) -> Header<'_>;
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
    /// A host as it was given; with user information in it, as in `a@b`, it is not one host for all readers.
    pub fn of_host(host: &'a [u8]) -> Self {
        if host.contains(&b'@') {
            Self::Differing
        } else {
            Self::Value(host)
        }
    }

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
    /// A name that may be used.
    Name(Name<'a>),
    /// No rule applied.
    Missing,
    /// A rule applied, and what it found is no name.
    Invalid,
}

/// What stands in a place, before the rule's options and the checks.
#[derive(Debug, PartialEq, Eq)]
enum Seen<'a> {
    Value(Cow<'a, [u8]>),
    Missing,
    Invalid,
}

/// Asks the rules in turn.
pub fn find<'a>(rules: &'a [Rule], head: &'a dyn Head) -> Found<'a> {
    rules
        .iter()
        .map(|rule| apply(rule, head))
        .find(|found| *found != Found::Missing)
        .unwrap_or(Found::Missing)
}

fn apply<'a>(rule: &'a Rule, head: &'a dyn Head) -> Found<'a> {
    match look(&rule.place, head) {
        Seen::Value(value) => named(rule, value),
        Seen::Missing => Found::Missing,
        Seen::Invalid => Found::Invalid,
    }
}

fn look<'a>(place: &'a Place, head: &'a dyn Head) -> Seen<'a> {
    match place {
        Place::Header(name) => match head.header(name) {
            Header::Missing | Header::Value([]) => Seen::Missing,
            Header::Value(value) => Seen::Value(Cow::Borrowed(value)),
            Header::Differing => Seen::Invalid,
        },
        Place::Host(template) => match head.host() {
            Header::Missing => Seen::Missing,
            Header::Value(host) => target::label_of(template, host)
                .map_or(Seen::Missing, |label| Seen::Value(Cow::Borrowed(label))),
            Header::Differing => Seen::Invalid,
        },
        Place::Path(template) => target::segment(template, head.target()),
        Place::Query(name) => target::parameter(name, head.target()),
        Place::Jwt { claim, header } => jwt::claim(claim, header, head.header(header)),
        Place::Fixed(name) => Seen::Value(Cow::Borrowed(name.as_str().as_bytes())),
    }
}

/// The name that is in a value.
fn named<'a>(rule: &Rule, value: Cow<'a, [u8]>) -> Found<'a> {
    // Hosts are equal whatever their case; other names are not.
    let is_lowered = rule.lower || matches!(rule.place, Place::Host(_));
    let changes = is_lowered && value.iter().any(u8::is_ascii_uppercase);
    let shape = rule.shape.as_ref();
    let name = match value {
        Cow::Borrowed(value) if !changes => name_in(value, shape).map(Name::Borrowed),
        Cow::Borrowed(value) => lowered_name_in(value, shape),
        Cow::Owned(mut value) => {
            if changes {
                value.make_ascii_lowercase();
            }
            name_in(&value, shape).and_then(Name::made)
        }
    };
    name.map_or(Found::Invalid, Found::Name)
}

/// The name in a value whose capital letters are made small first, on the stack.
fn lowered_name_in(value: &[u8], shape: Option<&Shape>) -> Option<Name<'static>> {
    let mut room = [0_u8; MAX_SHAPED_BYTES];
    let lowered = room.get_mut(..value.len())?;
    lowered.copy_from_slice(value);
    lowered.make_ascii_lowercase();
    name_in(lowered, shape).and_then(Name::made)
}

fn name_in<'v>(value: &'v [u8], shape: Option<&Shape>) -> Option<&'v str> {
    let part = match shape {
        None => value,
        Some(_) if value.len() > MAX_SHAPED_BYTES => return None,
        Some(shape) => shape.part_of(std::str::from_utf8(value).ok()?)?.as_bytes(),
    };
    check_name(part).ok().filter(|name| !name.starts_with("__"))
}

#[cfg(test)]
mod tests;
