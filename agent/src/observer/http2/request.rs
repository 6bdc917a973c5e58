//! The heads of requests: all their fields, since a rule for tenants may ask for any of them.
//!
//! The dynamic table of the requests' direction therefore keeps names and values, decoded and judged once
//! for all requests that refer to them.

use super::{
    super::{MAX_HEAD_BYTES, MAX_HEADERS, Opaque, head::number_of},
    hpack::{Literal, Name, Table},
    stream::Kind,
    table::{Dynamic, ENTRY_OVERHEAD, Entry, statics},
};
use crate::tenant::{Head, Header};

/// The most that the fields of a block may come to, the bytes that are not kept included: it bounds the work.
const MAX_BLOCK_BYTES: usize = 16 * MAX_HEAD_BYTES;

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
    timeout_ns: Option<u64>,
    is_grpc: bool,
    has_regular: bool,
    /// A field was among them that no request may have.
    is_refused: bool,
    /// There are more fields than are kept.
    is_cut: bool,
    /// Bytes of those that are not.
    cut_bytes: usize,
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
    GrpcTimeout,
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
    /// The server takes values of binary fields as they are.
    takes_binary: bool,
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
        !self.is_refused && names_target && has_length
    }

    /// Whether these may be the fields after a request's body.
    pub(super) fn is_trailers(&self) -> bool {
        !self.is_refused && !self.has_pseudo()
    }

    /// Whether a field of those that only a request has is among them.
    pub(super) fn has_pseudo(&self) -> bool {
        let pseudo = [self.method, self.scheme, self.authority, self.path, self.protocol];
        pseudo.iter().any(Option::is_some)
    }

    /// Whether there are more fields than are kept, so that nobody knows what the others say.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
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

    /// How long a caller of gRPC waits, if it says so.
    pub(super) fn timeout_ns(&self) -> Option<u64> {
        self.timeout_ns.filter(|_| self.kind() == Kind::Grpc)
    }

    /// Adds a field that was put at the end of the text.
    fn add(&mut self, field: Field, known: Known, is_refused: bool) -> Result<(), Opaque> {
        if self.is_cut || self.text.len() > MAX_HEAD_BYTES || self.fields.len() >= MAX_HEADERS {
            self.text.truncate(field.start);
            return self.leave_out(field.name.saturating_add(field.value));
        }
        self.fields.push(field);
        self.is_refused |= is_refused || !self.accepts(field, known);
        Ok(())
    }

    /// Passes over a field of so many bytes, and all that follow.
    fn leave_out(&mut self, bytes: usize) -> Result<(), Opaque> {
        self.is_cut = true;
        self.cut_bytes = self.cut_bytes.saturating_add(bytes);
        if self.text.len().saturating_add(self.cut_bytes) > MAX_BLOCK_BYTES {
            return Err(Opaque::HeadTooLong);
        }
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
                let Some(length) = number_of(self.value(field)) else {
                    return false;
                };
                *self.content_length.get_or_insert(length) == length
            }
            Known::GrpcTimeout => {
                // One that is none is for the server to answer.
                self.timeout_ns = self.timeout_ns.or(timeout_of(self.value(field)));
                true
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

    /// Whether an authority and a host are the same.
    fn is_one_host(&self, authority: &[u8], host: &[u8]) -> bool {
        let port: &[u8] = match self.scheme.map(|scheme| self.value(scheme)) {
            Some(b"https") => b":443",
            _ => b":80",
        };
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
        let authority = authority.filter(|authority| !authority.is_empty());
        match (authority, self.host.map(|field| self.value(field))) {
            // Servers differ in which of the two they read.
            (Some(authority), Some(host)) if !self.is_one_host(authority, host) => Header::Differing,
            (Some(host), _) | (None, Some(host)) => Header::of_host(host),
            (None, None) => Header::Missing,
        }
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
            b"grpc-timeout" => Self::GrpcTimeout,
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
            if head.is_cut {
                return head.leave_out(name.len().saturating_add(value.len()));
            }
            let field = head.copy(name.as_bytes(), value.as_bytes());
            return head.add(field, Known::of_static(index), false);
        }
        let stored = self.dynamic.get(index).ok_or(Opaque::Hpack)?;
        if head.is_cut {
            return head.leave_out(stored.field.name.saturating_add(stored.field.value));
        }
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
        let (name, value) = (head.name(field), head.value(field));
        let is_taken = is_value(value) || (self.takes_binary && is_binary(name, value));
        let is_refused = !is_taken;
        // The table gets it even if the head is cut before it.
        if literal.is_kept {
            let text = head.text.get(start..).unwrap_or_default();
            self.store(text, field, known, is_refused);
        }
        head.add(field, known, is_refused)
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
    /// The server says that it takes values of binary fields as they are. What it once took may still be on
    /// the way.
    pub(super) fn allow_binary(&mut self) {
        self.takes_binary = true;
    }

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

/// Whether a value has none of the characters that end a line or a string elsewhere (section 8.2.1 too).
/// White space at its ends, which that section forbids as well, is not looked at: most servers accept it.
fn is_value(value: &[u8]) -> bool {
    // Without leaving the loop early, so that many bytes are looked at with one instruction.
    let bad = |bad: bool, byte: &u8| bad | matches!(byte, b'\0' | b'\r' | b'\n');
    !value.iter().fold(false, bad)
}

/// Whether this is binary metadata of gRPC that is sent as it is, behind a byte 0, and not as Base64
/// (grpc/proposal/G1-true-binary-metadata.md).
fn is_binary(name: &[u8], value: &[u8]) -> bool {
    name.ends_with(b"-bin") && value.first() == Some(&0)
}

/// Whether this is the content type of a gRPC call. gRPC-Web's is not: its status stands in the body.
fn is_grpc(value: &[u8]) -> bool {
    let rest = value.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// The value of `grpc-timeout`: at most eight digits and a unit (grpc/doc/PROTOCOL-HTTP2.md).
fn timeout_of(value: &[u8]) -> Option<u64> {
    let (unit, digits) = value.split_last()?;
    let unit_ns: u64 = match unit {
        b'H' => 3_600_000_000_000,
        b'M' => 60_000_000_000,
        b'S' => 1_000_000_000,
        b'm' => 1_000_000,
        b'u' => 1_000,
        b'n' => 1,
        _ => return None,
    };
    let number: u64 = number_of(digits).filter(|_| digits.len() <= 8)?;
    Some(number.saturating_mul(unit_ns))
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
        assert!(is_value(b" a \t\x01\xff ") && is_value(b""));
        for value in [&b"a\r"[..], b"\nb", b"a\0b"] {
            assert!(!is_value(value), "{value:?}");
        }
        assert!(is_binary(b"x-bin", b"\0\r\n\0") && is_binary(b"x-bin", b"\0"));
        assert!(!is_binary(b"x-bin", b"") && !is_binary(b"x-bin", b"a\0") && !is_binary(b"x-bi", b"\0"));
    }

    #[test]
    fn timeouts_of_grpc() {
        for (value, expected) in [
            ("1H", Some(3_600_000_000_000)),
            ("2M", Some(120_000_000_000)),
            ("3S", Some(3_000_000_000)),
            ("100m", Some(100_000_000)),
            ("007u", Some(7_000)),
            ("0n", Some(0)),
            ("99999999n", Some(99_999_999)),
            ("99999999H", Some(u64::MAX)),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("+1S", None),
            ("-1S", None),
            ("1.5S", None),
            ("1 S", None),
            ("100000000n", None),
        ] {
            assert_eq!(timeout_of(value.as_bytes()), expected, "{value}");
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
