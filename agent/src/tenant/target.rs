//! Finds a part of what a request is for: a label of its host, a segment of its path, a parameter of its query.

use std::{borrow::Cow, iter};

use coalmine_proto::rule::Template;

use super::Seen;

/// The label of a host that stands where the template has `{tenant}`.
pub(super) fn label_of<'h>(template: &Template, host: &'h [u8]) -> Option<&'h [u8]> {
    let (before, after) = (template.before.as_bytes(), template.after.as_bytes());
    let host = without_port(host);
    let (first, rest) = host.split_at_checked(before.len())?;
    let (label, last) = rest.split_at_checked(rest.len().checked_sub(after.len())?)?;
    let fits =
        first.eq_ignore_ascii_case(before) && last.eq_ignore_ascii_case(after) && !label.contains(&b'.');
    fits.then_some(label)
}

fn without_port(host: &[u8]) -> &[u8] {
    let mut parts = host.rsplitn(2, |b| *b == b':');
    match (parts.next(), parts.next()) {
        (Some(port), Some(name)) if port.iter().all(u8::is_ascii_digit) => name,
        _ => host,
    }
}

/// The segment of a target's path that stands where the template has `{tenant}`, decoded.
pub(super) fn segment<'t>(template: &Template, target: &'t [u8]) -> Seen<'t> {
    let path = path_of(target);
    if is_ambiguous(template, path) {
        return Seen::Invalid;
    }
    match segment_of(template, path) {
        Some(segment) => decoded(segment, b'+').map_or(Seen::Invalid, Seen::Value),
        None => Seen::Missing,
    }
}

/// Whether some servers may find another tenant in the path than is found here, or find one where none is found.
/// They differ in whether they resolve `.` and `..`, merge slashes, take a backslash or `%2F` for a slash, pass over
/// what follows a `;`, and decode what they compare.
fn is_ambiguous(template: &Template, path: &[u8]) -> bool {
    let before = template.before.split('/').skip(1);
    let after = template.after.trim_end_matches('/').split('/').skip(1);
    // Empty where the tenant stands.
    let mut expected = before.chain(after);
    let mut may_fit = true;
    let path = path.strip_suffix(b"/").unwrap_or(path);
    for segment in path.split(|b| *b == b'/').skip(1) {
        if has_dots(segment) {
            return true;
        }
        if !may_fit {
            continue;
        }
        match expected.next() {
            None => may_fit = false,
            Some(text) if !text.is_empty() && segment == text.as_bytes() => {}
            Some(_) if segment.is_empty() || has_divider(segment) => return true,
            Some("") => {}
            Some(text) if may_be_read_as(text, segment) => return true,
            Some(_) => may_fit = false,
        }
    }
    false
}

/// Whether a part of a segment is `.` or `..` to a reader that divides it wherever it can be divided.
fn has_dots(segment: &[u8]) -> bool {
    let mut dots = Some(0_usize);
    for byte in loosely_decoded(segment).chain([b'/']) {
        match byte {
            b'/' | b'\\' | b';' if matches!(dots, Some(1 | 2)) => return true,
            b'/' | b'\\' | b';' => dots = Some(0),
            b'.' => dots = dots.map(|count| count + 1),
            _ => dots = None,
        }
    }
    false
}

/// Whether a segment is several to a reader that decodes it first, or takes a backslash for a slash.
fn has_divider(segment: &[u8]) -> bool {
    loosely_decoded(segment).any(|byte| matches!(byte, b'/' | b'\\'))
}

/// Whether a segment that is not this text is it once it is decoded and its parameters are cut off.
fn may_be_read_as(text: &str, segment: &[u8]) -> bool {
    let read = loosely_decoded(segment).take_while(|byte| *byte != b';');
    read.eq(text.bytes())
}

/// The slash that ends the template may be missing in the path: `/t/acme` fits `/t/{tenant}/`.
fn segment_of<'p>(template: &Template, path: &'p [u8]) -> Option<&'p [u8]> {
    let rest = path.strip_prefix(template.before.as_bytes())?;
    let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
    let (segment, rest) = rest.split_at(end);
    let after = template.after.as_bytes();
    (rest.starts_with(after) || (rest.is_empty() && after == b"/")).then_some(segment)
}

/// The path of a request target, which may be an absolute URI.
fn path_of(target: &[u8]) -> &[u8] {
    let (target, _) = split_query(target);
    if target.starts_with(b"/") {
        return target;
    }
    let scheme = target.windows(3).position(|w| w == b"://");
    let rest = scheme.and_then(|at| target.get(at + 3..)).unwrap_or_default();
    let slash = rest.iter().position(|b| *b == b'/');
    slash.and_then(|at| rest.get(at..)).unwrap_or_default()
}

/// The value of the parameter of a target's query that has this name, decoded as forms are
/// (`application/x-www-form-urlencoded`, where a `+` is a space).
pub(super) fn parameter<'t>(name: &str, target: &'t [u8]) -> Seen<'t> {
    let (_, query) = split_query(target);
    let mut found: Option<Cow<'t, [u8]>> = None;
    for parameter in query.split(|b| *b == b'&') {
        let (its_name, value) = split_once(parameter, b'=');
        let is_wanted = decoded(its_name, b' ').is_some_and(|its_name| *its_name == *name.as_bytes());
        if !is_wanted {
            continue;
        }
        let Some(value) = decoded(value, b' ') else {
            return Seen::Invalid;
        };
        match &found {
            Some(first) if *first != value => return Seen::Invalid,
            Some(_) => {}
            None => found = Some(value),
        }
    }
    match found {
        Some(value) if !value.is_empty() => Seen::Value(value),
        _ => Seen::Missing,
    }
}

/// What comes before the query, and the query; without a fragment, which clients should not send.
fn split_query(target: &[u8]) -> (&[u8], &[u8]) {
    let (target, _) = split_once(target, b'#');
    split_once(target, b'?')
}

/// What stands before and after a byte; nothing stands after one that is not there.
fn split_once(bytes: &[u8], at: u8) -> (&[u8], &[u8]) {
    let mut parts = bytes.splitn(2, |b| *b == at);
    let before = parts.next().unwrap_or_default();
    (before, parts.next().unwrap_or_default())
}

/// Reads `%` with two digits as the byte that it stands for, and a plus as what it is here. None if two digits
/// do not follow each `%`.
fn decoded(text: &[u8], plus: u8) -> Option<Cow<'_, [u8]>> {
    let is_coded = |b: &u8| *b == b'%' || (*b == b'+' && plus != b'+');
    if !text.iter().any(is_coded) {
        return Some(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        rest = after;
        match first {
            b'%' => {
                let (byte, after) = coded(rest)?;
                bytes.push(byte);
                rest = after;
            }
            b'+' => bytes.push(plus),
            byte => bytes.push(*byte),
        }
    }
    Some(Cow::Owned(bytes))
}

/// The bytes of a text, decoded where two digits follow a `%`.
fn loosely_decoded(mut text: &[u8]) -> impl Iterator<Item = u8> {
    iter::from_fn(move || {
        let (first, after) = text.split_first()?;
        let found = if *first == b'%' { coded(after) } else { None };
        let (byte, rest) = found.unwrap_or((*first, after));
        text = rest;
        Some(byte)
    })
}

/// The byte for which the two digits behind a `%` stand, and what follows them.
fn coded(text: &[u8]) -> Option<(u8, &[u8])> {
    let ([high, low], rest) = text.split_first_chunk::<2>()?;
    Some((digit(*high)? << 4 | digit(*low)?, rest))
}

fn digit(byte: u8) -> Option<u8> {
    let value = char::from(byte).to_digit(16)?;
    u8::try_from(value).ok()
}
