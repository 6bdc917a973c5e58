//! The heads of requests: all their fields, since a rule for tenants may ask for any of them.
//!
//! The dynamic table of the requests' direction therefore keeps names and values, decoded and judged once
//! for all requests that refer to them.

use super::{
    super::{MAX_HEAD_BYTES, MAX_HEADERS, Opaque},
    hpack::{Literal, Name, Table},
    stream::Kind,
    table::{Dynamic, ENTRY_OVERHEAD, Entry, statics},
};
use crate::tenant::{Head, Header};

/// Less than this that nobody refers to any more is left where it is.
const MIN_DEAD_BYTES: usize = 512;

/// The fields of one header block.
#[derive(Debug, Default)]
pub(super) struct RequestHead {
    /// Names and values, one after the other.
    text: Vec<u8>,
    fields: Vec<Field>,
    method: Option<Field>,
    scheme: Option<Field>,
    authority: Option<Field>,
    path: Option<Field>,
    protocol: Option<Field>,
    host: Option<Field>,
    content_length: Option<u64>,
    is_grpc: bool,
    has_regular: bool,
    /// A field was among them that no request may have.
    is_refused: bool,
}

/// Where a name stands, directly followed by its value.
#[derive(Debug, Clone, Copy)]
struct Field {
    start: usize,
    name: usize,
    value: usize,
}

/// What is known of a field from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Method,
    Scheme,
    Authority,
    Path,
    Protocol,
    Host,
    ContentType,
    ContentLength,
    Te,
    /// No request may have a field of this name (RFC 9113, sections 8.2 and 8.3).
    Refused,
    Other,
}

/// The dynamic table of the requests' direction.
#[derive(Debug, Default)]
pub(super) struct RequestTable {
    dynamic: Dynamic<Stored>,
    /// Names and values of the entries, the oldest first, after what evicted ones have left.
    text: Vec<u8>,
}

#[derive(Debug)]
struct Stored {
    field: Field,
    known: Known,
    /// Its value may stand in no field.
    is_refused: bool,
}

// === impl RequestHead ===

impl RequestHead {
    /// Makes it empty; the memory is kept.
    pub(super) fn clear(&mut self) {
        let (mut text, mut fields) = (std::mem::take(&mut self.text), std::mem::take(&mut self.fields));
        text.clear();
        fields.clear();
        *self = Self {
            text,
            fields,
            ..Self::default()
        };
    }

    /// Whether these are the fields of a request that a correct server accepts, which ends with its head or
    /// does not (RFC 9113, section 8.3.1).
    pub(super) fn is_request(&self, is_last: bool) -> bool {
        let names_target = match (self.is_connect(), self.protocol) {
            (true, None) => self.scheme.is_none() && self.path.is_none() && self.authority.is_some(),
            (false, Some(_)) => false,
            _ => self.has_method() && self.has_target(),
        };
        let has_length = !is_last || self.content_length.unwrap_or(0) == 0;
        !self.is_refused && names_target && has_length && self.names_one_host()
    }

    /// Whether these may be the fields after a request's body.
    pub(super) fn is_trailers(&self) -> bool {
        let pseudo = [self.method, self.scheme, self.authority, self.path, self.protocol];
        !self.is_refused && pseudo.iter().all(Option::is_none)
    }

    /// What the request asks for.
    pub(super) fn kind(&self) -> Kind {
        match (self.is_connect(), self.is_grpc) {
            (true, _) => Kind::Tunnel,
            (false, true) => Kind::Grpc,
            (false, false) => Kind::Http,
        }
    }

    /// How long the request's body is, if it says so.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.content_length
    }

    /// Adds a field that was put at the end of the text.
    fn add(&mut self, field: Field, known: Known, is_refused: bool) -> Result<(), Opaque> {
        if self.text.len() > MAX_HEAD_BYTES {
            return Err(Opaque::HeadTooLong);
        }
        if self.fields.len() >= MAX_HEADERS {
            return Err(Opaque::TooManyHeaders);
        }
        self.fields.push(field);
        self.is_refused |= is_refused || !self.accepts(field, known);
        Ok(())
    }

    /// Notes what the field says about the request; false if it may not stand where it does.
    fn accepts(&mut self, field: Field, known: Known) -> bool {
        let place = match known {
            Known::Method => &mut self.method,
            Known::Scheme => &mut self.scheme,
            Known::Authority => &mut self.authority,
            Known::Path => &mut self.path,
            Known::Protocol => &mut self.protocol,
            _ => {
                self.has_regular = true;
                return self.accepts_regular(field, known);
            }
        };
        let is_first = place.replace(field).is_none();
        is_first && !self.has_regular
    }

    fn accepts_regular(&mut self, field: Field, known: Known) -> bool {
        match known {
            Known::Host => {
                let first = *self.host.get_or_insert(field);
                self.value(first) == self.value(field)
            }
            Known::ContentType => {
                self.is_grpc |= is_grpc(self.value(field));
                true
            }
            Known::ContentLength => {
                let Some(length) = length_of(self.value(field)) else {
                    return false;
                };
                *self.content_length.get_or_insert(length) == length
            }
            Known::Te => self.value(field).eq_ignore_ascii_case(b"trailers"),
            Known::Refused => false,
            _ => true,
        }
    }

    fn is_connect(&self) -> bool {
        self.method.is_some_and(|method| self.value(method) == b"CONNECT")
    }

    fn has_method(&self) -> bool {
        self.method.is_some_and(|method| !self.value(method).is_empty())
    }

    fn has_target(&self) -> bool {
        let (Some(scheme), Some(path)) = (self.scheme, self.path) else {
            return false;
        };
        let path = self.value(path);
        let is_http = matches!(self.value(scheme), b"http" | b"https");
        let is_options = self.method.is_some_and(|m| self.value(m) == b"OPTIONS");
        !is_http || path.starts_with(b"/") || (is_options && path == b"*")
    }

    /// Whether the authority and the host, if both are given, are the same.
    fn names_one_host(&self) -> bool {
        let (Some(authority), Some(host)) = (self.authority, self.host) else {
            return true;
        };
        let port: &[u8] = match self.scheme.map(|scheme| self.value(scheme)) {
            Some(b"https") => b":443",
            _ => b":80",
        };
        let (authority, host) = (self.value(authority), self.value(host));
        without(authority, port).eq_ignore_ascii_case(without(host, port))
    }

    /// Puts a field at the end of the text.
    fn copy(&mut self, name: &[u8], value: &[u8]) -> Field {
        let start = self.text.len();
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(value);
        Field {
            start,
            name: name.len(),
            value: value.len(),
        }
    }

    fn name(&self, field: Field) -> &[u8] {
        field.name_in(&self.text)
    }

    fn value(&self, field: Field) -> &[u8] {
        field.value_in(&self.text)
    }

    /// Names and values as text.
    #[cfg(test)]
    pub(super) fn pairs(&self) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let fields = self.fields.iter();
        fields
            .map(|field| (text(self.name(*field)), text(self.value(*field))))
            .collect()
    }
}

impl Head for RequestHead {
    fn header(&self, name: &str) -> Header<'_> {
        let wanted = name.as_bytes();
        let named = self
            .fields
            .iter()
            .filter(|field| field.name == wanted.len() && self.name(**field) == wanted);
        Header::of(named.map(|field| self.value(*field)))
    }

    fn host(&self) -> Header<'_> {
        let authority = self.authority.map(|field| self.value(field));
        let host = authority
            .filter(|authority| !authority.is_empty())
            .or_else(|| self.host.map(|field| self.value(field)));
        host.map_or(Header::Missing, Header::of_host)
    }

    fn target(&self) -> &[u8] {
        self.path.map(|field| self.value(field)).unwrap_or_default()
    }
}

// === impl Field ===

impl Field {
    fn name_in(self, text: &[u8]) -> &[u8] {
        let rest = text.get(self.start..).unwrap_or_default();
        rest.get(..self.name).unwrap_or_default()
    }

    fn value_in(self, text: &[u8]) -> &[u8] {
        let start = self.start.saturating_add(self.name);
        let rest = text.get(start..).unwrap_or_default();
        rest.get(..self.value).unwrap_or_default()
    }
}

// === impl Known ===

impl Known {
    fn of(name: &[u8]) -> Self {
        match name {
            b":method" => Self::Method,
            b":scheme" => Self::Scheme,
            b":authority" => Self::Authority,
            b":path" => Self::Path,
            b":protocol" => Self::Protocol,
            b"host" => Self::Host,
            b"content-type" => Self::ContentType,
            b"content-length" => Self::ContentLength,
            b"te" => Self::Te,
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                Self::Refused
            }
            name if is_name(name) => Self::Other,
            _ => Self::Refused,
        }
    }

    /// The same for an index of the static table.
    fn of_static(index: usize) -> Self {
        match index {
            1 => Self::Authority,
            2 | 3 => Self::Method,
            4 | 5 => Self::Path,
            6 | 7 => Self::Scheme,
            // The status of an answer, and transfer-encoding.
            8..=14 | 57 => Self::Refused,
            28 => Self::ContentLength,
            31 => Self::ContentType,
            38 => Self::Host,
            _ => Self::Other,
        }
    }
}

// === impl RequestTable ===

impl Table for RequestTable {
    type List = RequestHead;

    fn indexed(&mut self, index: usize, head: &mut RequestHead) -> Result<(), Opaque> {
        if let Some((name, value)) = statics(index) {
            let field = head.copy(name.as_bytes(), value.as_bytes());
            return head.add(field, Known::of_static(index), false);
        }
        let stored = self.dynamic.get(index).ok_or(Opaque::Hpack)?;
        let (name, value) = (
            stored.field.name_in(&self.text),
            stored.field.value_in(&self.text),
        );
        let field = head.copy(name, value);
        head.add(field, stored.known, stored.is_refused)
    }

    fn literal(&mut self, literal: &Literal<'_>, head: &mut RequestHead) -> Result<(), Opaque> {
        let start = head.text.len();
        let known = match literal.name {
            Name::Index(index) => self.copy_name(index, head)?,
            Name::Text(name) => {
                name.append_to(&mut head.text)?;
                Known::of(head.text.get(start..).unwrap_or_default())
            }
        };
        let value_start = head.text.len();
        literal.value.append_to(&mut head.text)?;
        let field = Field {
            start,
            name: value_start.saturating_sub(start),
            value: head.text.len().saturating_sub(value_start),
        };
        let is_refused = !is_value(head.value(field));
        head.add(field, known, is_refused)?;
        if literal.is_kept {
            let text = head.text.get(start..).unwrap_or_default();
            self.store(text, field, known, is_refused);
        }
        Ok(())
    }

    fn max_size(&self) -> usize {
        self.dynamic.max_size()
    }

    fn resize(&mut self, max_size: usize) {
        self.dynamic.resize(max_size);
        self.compact();
    }
}

impl RequestTable {
    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        self.dynamic.footprint().saturating_add(self.text.capacity())
    }

    /// Puts the name of an entry at the end of the head's text.
    fn copy_name(&self, index: usize, head: &mut RequestHead) -> Result<Known, Opaque> {
        if let Some((name, _)) = statics(index) {
            head.text.extend_from_slice(name.as_bytes());
            return Ok(Known::of_static(index));
        }
        let stored = self.dynamic.get(index).ok_or(Opaque::Hpack)?;
        head.text.extend_from_slice(stored.field.name_in(&self.text));
        Ok(stored.known)
    }

    fn store(&mut self, text: &[u8], field: Field, known: Known, is_refused: bool) {
        let has_room = self.dynamic.make_room(text.len().saturating_add(ENTRY_OVERHEAD));
        self.compact();
        if !has_room {
            return;
        }
        let field = Field {
            start: self.text.len(),
            ..field
        };
        self.text.extend_from_slice(text);
        self.dynamic.push(Stored {
            field,
            known,
            is_refused,
        });
    }

    /// Moves the text to the front once a quarter of it is nobody's: for each byte that is added, three at
    /// most are moved.
    fn compact(&mut self) {
        let Some(oldest) = self.dynamic.oldest() else {
            self.text.clear();
            return;
        };
        let dead = oldest.field.start.min(self.text.len());
        if dead >= MIN_DEAD_BYTES && dead > self.text.len() / 4 {
            self.text.drain(..dead);
            for stored in self.dynamic.iter_mut() {
                stored.field.start = stored.field.start.saturating_sub(dead);
            }
        }
    }

    /// The sum of the entries' sizes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.dynamic.size()
    }
}

impl Entry for Stored {
    fn size(&self) -> usize {
        let text = self.field.name.saturating_add(self.field.value);
        text.saturating_add(ENTRY_OVERHEAD)
    }
}

// === fields ===

/// Whether a name that is no pseudo-header has allowed characters only (RFC 9113, section 8.2.1).
fn is_name(name: &[u8]) -> bool {
    let allowed = |byte: &u8| matches!(byte, b'!'..=b'9' | b';'..=b'@' | b'['..=b'~');
    !name.is_empty() && name.iter().all(allowed)
}

/// Whether a value has none of the characters that end a line or a string elsewhere, and no white space at
/// its ends (section 8.2.1 too).
fn is_value(value: &[u8]) -> bool {
    if [value.first(), value.last()]
        .iter()
        .any(|end| matches!(end, Some(b' ' | b'\t')))
    {
        return false;
    }
    // Without leaving the loop early, so that many bytes are looked at with one instruction.
    let bad = |bad: bool, byte: &u8| bad | matches!(byte, b'\0' | b'\r' | b'\n');
    !value.iter().fold(false, bad)
}

/// Whether this is the content type of a gRPC call. gRPC-Web's is not: its status stands in the body.
fn is_grpc(value: &[u8]) -> bool {
    let rest = value.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// Digits and nothing else.
fn length_of(value: &[u8]) -> Option<u64> {
    let digits = value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| digits)?;
    text.parse().ok()
}

fn without<'h>(host: &'h [u8], port: &[u8]) -> &'h [u8] {
    host.strip_suffix(port).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_names_are_known_by_their_index() {
        for index in 1..=61 {
            let (name, _) = statics(index).unwrap();
            assert_eq!(Known::of_static(index), Known::of(name.as_bytes()), "{name}");
        }
        assert_eq!((statics(0), statics(62)), (None, None));
    }

    #[test]
    fn names_and_values_are_judged() {
        for name in [&b""[..], b"A", b"a b", b"a:b", b":x", b"a\0", b"\x7f", b"\xff"] {
            assert_eq!(Known::of(name), Known::Refused, "{name:?}");
        }
        assert_eq!(Known::of(b"x-tenant_id~1"), Known::Other);
        assert!(is_value(b"a \t\x01\xff") && is_value(b""));
        for value in [&b"a\r"[..], b"\nb", b"a\0b", b" a", b"a\t"] {
            assert!(!is_value(value), "{value:?}");
        }
    }

    #[test]
    fn grpc_is_told_from_its_relatives() {
        for content_type in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc;charset=x",
        ] {
            assert!(is_grpc(content_type.as_bytes()), "{content_type}");
        }
        for content_type in ["application/grpc-web", "application/grpc-web+proto", "text/plain"] {
            assert!(!is_grpc(content_type.as_bytes()), "{content_type}");
        }
    }

    #[test]
    fn a_name_and_a_value_are_compared_without_the_port_of_the_scheme() {
        assert_eq!(without(b"a.com:80", b":80"), b"a.com");
        assert_eq!(without(b"a.com:8080", b":80"), b"a.com:8080");
    }
}
