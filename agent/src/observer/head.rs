//! Collects and reads the heads of messages.

use std::{mem::MaybeUninit, str::FromStr};

use super::{
    MAX_HEAD_BYTES, MAX_HEADERS, Opaque,
    body::{Body, Chunked},
};
use crate::tenant::{Head, Header};

/// The bytes of a head that has not arrived whole.
#[derive(Debug, Default)]
pub(super) struct Incomplete {
    bytes: Vec<u8>,
    /// Before this position no end begins.
    searched: usize,
}

/// Room for the headers of one message, on the stack.
pub(super) type Headers<'b> = [MaybeUninit<httparse::Header<'b>>; MAX_HEADERS];

/// An empty [`Headers`].
pub(super) const fn no_headers<'b>() -> Headers<'b> {
    [const { MaybeUninit::uninit() }; MAX_HEADERS]
}

/// A request's head that was read.
pub(super) struct Request<'h, 'b> {
    method: &'b str,
    target: &'b str,
    version: u8,
    headers: &'h [httparse::Header<'b>],
}

/// What matters of a response's head.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) persistent: bool,
    /// A stream of events, which lasts as long as both sides like.
    pub(super) is_stream: bool,
    body: Option<Body>,
}

/// What matters of a request's method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Head,
    Connect,
    Other,
}

// === impl Incomplete ===

impl Incomplete {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes bytes up to the end of the head; gives how many, and whether the end is among them.
    pub(super) fn extend(&mut self, bytes: &[u8]) -> Result<(usize, bool), Opaque> {
        let before = self.bytes.len();
        let room = MAX_HEAD_BYTES - before;
        self.bytes.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        if let Some(end) = end_of_head(&self.bytes, self.searched) {
            self.bytes.truncate(end);
            return Ok((end - before, true));
        }
        if bytes.len() >= room {
            return Err(Opaque::HeadTooLong);
        }
        self.searched = self.bytes.len().saturating_sub(2);
        Ok((bytes.len(), false))
    }

    /// Forgets the bytes and gives the memory back: a head in pieces is rare.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Finds the byte after the empty line, looking at line ends from `from` on.
fn end_of_head(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(line) = bytes.get(at..)?.iter().position(|b| *b == b'\n') {
        let next = at + line + 1;
        match bytes.get(next..) {
            Some([b'\n', ..]) => return Some(next + 1),
            Some([b'\r', b'\n', ..]) => return Some(next + 2),
            _ => at = next,
        }
    }
    None
}

// === impl Request ===

impl<'h, 'b> Request<'h, 'b> {
    /// Reads a head; gives its length too. None if it is not complete.
    pub(super) fn parse(bytes: &'b [u8], room: &'h mut Headers<'b>) -> Result<Option<(Self, usize)>, Opaque> {
        let mut request = httparse::Request::new(&mut []);
        let length = match request.parse_with_uninit_headers(bytes, room) {
            Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
            Ok(httparse::Status::Complete(_)) => return Err(Opaque::HeadTooLong),
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Opaque::TooManyHeaders),
            Err(_) => return Err(Opaque::NotHttp),
        };
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version)
        else {
            return Err(Opaque::NotHttp);
        };
        if has_bare_line_feed(bytes, length) {
            return Err(Opaque::NotHttp);
        }
        let read = Self {
            method,
            target,
            version,
            headers: request.headers,
        };
        Ok(Some((read, length)))
    }

    pub(super) fn method(&self) -> Method {
        match self.method {
            "HEAD" => Method::Head,
            "CONNECT" => Method::Connect,
            _ => Method::Other,
        }
    }

    /// Whether the client lets the connection stay open after the answer.
    pub(super) fn is_persistent(&self) -> bool {
        is_persistent(self.version, self.headers)
    }

    /// The request's body. Of two answers to the question where it ends, neither is believed.
    pub(super) fn body(&self) -> Result<Body, Opaque> {
        let framing = Framing::of(self.headers)?;
        match (framing.codings, framing.length) {
            (Codings::None, length) => Ok(Body::Length(length.unwrap_or(0))),
            (Codings::Chunked, None) if self.version == 1 => Ok(Body::Chunked(Chunked::default())),
            _ => Err(Opaque::Framing),
        }
    }
}

impl Head for Request<'_, '_> {
    fn header(&self, name: &str) -> Header<'_> {
        Header::of(named(self.headers, name))
    }

    fn host(&self) -> Header<'_> {
        let header = self.header("host");
        if self.target.starts_with('/') || self.target == "*" || self.method == "CONNECT" {
            return match header {
                Header::Value(host) => Header::of_host(host),
                other => other,
            };
        }
        // An absolute URI names the host itself; another in the header is another reading.
        let Some(authority) = authority_of(self.target) else {
            return Header::Differing;
        };
        match header {
            Header::Missing => Header::of_host(authority),
            Header::Value(host) if host.eq_ignore_ascii_case(authority) => Header::of_host(authority),
            Header::Value(_) | Header::Differing => Header::Differing,
        }
    }

    fn target(&self) -> &[u8] {
        self.target.as_bytes()
    }
}

/// The authority of an absolute URI (RFC 9112, section 3.2.2); none of what is no such target.
fn authority_of(target: &str) -> Option<&[u8]> {
    let (scheme, rest) = target.split_once("://")?;
    let is_scheme = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
    let authority = rest.split(['/', '?', '#']).next()?;
    (!scheme.is_empty() && scheme.bytes().all(is_scheme)).then_some(authority.as_bytes())
}

// === impl Response ===

impl Response {
    /// Reads a head; gives its length too. None if it is not complete.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Opaque> {
        let mut room = no_headers();
        let mut response = httparse::Response::new(&mut []);
        let config = httparse::ParserConfig::default();
        let parsed = config.parse_response_with_uninit_headers(&mut response, bytes, &mut room);
        let length = match parsed {
            Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
            Ok(httparse::Status::Complete(_)) => return Err(Opaque::HeadTooLong),
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Opaque::TooManyHeaders),
            Err(_) => return Err(Opaque::BadResponse),
        };
        let (Some(status @ 100..), Some(version)) = (response.code, response.version) else {
            return Err(Opaque::BadResponse);
        };
        if has_bare_line_feed(bytes, length) {
            return Err(Opaque::BadResponse);
        }
        let body = if status < 200 {
            None
        } else {
            body_of_response(version, response.headers)?
        };
        let content_type = named(response.headers, "content-type").next();
        let read = Self {
            status,
            persistent: is_persistent(version, response.headers),
            is_stream: content_type.is_some_and(is_event_stream),
            body,
        };
        Ok(Some((read, length)))
    }

    /// The response's body, which depends on the request too.
    pub(super) fn body(self, method: Method) -> Body {
        match self.status {
            0..200 | 204 | 304 => Body::Length(0),
            _ if method == Method::Head => Body::Length(0),
            _ => self.body.unwrap_or(Body::UntilClose),
        }
    }
}

fn body_of_response(version: u8, headers: &[httparse::Header<'_>]) -> Result<Option<Body>, Opaque> {
    let framing = Framing::of(headers)?;
    match (framing.codings, framing.length) {
        (Codings::None, length) => Ok(length.map(Body::Length)),
        (_, Some(_)) => Err(Opaque::Framing),
        (Codings::Chunked, None) if version == 1 => Ok(Some(Body::Chunked(Chunked::default()))),
        (Codings::Chunked, None) => Err(Opaque::Framing),
        (Codings::Other, None) => Ok(None),
    }
}

/// Whether a line of the head ends without a carriage return. Some readers take that for an end and some
/// do not (RFC 9112, section 2.2), so that one header may hide in another.
fn has_bare_line_feed(bytes: &[u8], length: usize) -> bool {
    let head = bytes.get(..length).unwrap_or_default();
    let pairs = head.iter().zip(head.get(1..).unwrap_or_default());
    // Without leaving the loop early, so that many bytes are looked at with one instruction.
    pairs.fold(false, |bare, (before, byte)| {
        bare | (*byte == b'\n' && *before != b'\r')
    })
}

// === headers ===

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codings {
    None,
    /// The last coding is chunked, and no other is.
    Chunked,
    Other,
}

struct Framing {
    length: Option<u64>,
    codings: Codings,
}

impl Framing {
    fn of(headers: &[httparse::Header<'_>]) -> Result<Self, Opaque> {
        let mut framing = Self {
            length: None,
            codings: Codings::None,
        };
        for header in headers {
            match header.name.len() {
                14 if header.name.eq_ignore_ascii_case("content-length") => {
                    let length = number_of(header.value.trim_ascii()).ok_or(Opaque::Framing)?;
                    if framing
                        .length
                        .replace(length)
                        .is_some_and(|other| other != length)
                    {
                        return Err(Opaque::Framing);
                    }
                }
                17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                    framing.codings = framing.codings.then(header.value)?;
                }
                _ => {}
            }
        }
        Ok(framing)
    }
}

impl Codings {
    /// Adds the codings of one more header.
    fn then(self, value: &[u8]) -> Result<Self, Opaque> {
        value
            .split(|b| *b == b',')
            .try_fold(self, |so_far, coding| match (so_far, coding.trim_ascii()) {
                (Self::Chunked, _) | (_, b"") => Err(Opaque::Framing),
                (_, coding) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Self::Chunked),
                _ => Ok(Self::Other),
            })
    }
}

/// Digits and nothing else: no sign, no list, no hexadecimal.
pub(super) fn number_of<N: FromStr>(value: &[u8]) -> Option<N> {
    let digits = value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()
}

fn is_persistent(version: u8, headers: &[httparse::Header<'_>]) -> bool {
    let mut persistent = version == 1;
    for value in named(headers, "connection") {
        for option in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
            if option.eq_ignore_ascii_case(b"close") {
                return false;
            }
            persistent |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    persistent
}

/// Whether a Content-Type is that of server-sent events.
pub(super) fn is_event_stream(content_type: &[u8]) -> bool {
    const NAME: &[u8] = b"text/event-stream";
    let name = content_type.split_at_checked(NAME.len());
    name.is_some_and(|(name, rest)| {
        name.eq_ignore_ascii_case(NAME) && matches!(rest.first(), None | Some(b';' | b' '))
    })
}

fn named<'a>(headers: &'a [httparse::Header<'a>], name: &str) -> impl Iterator<Item = &'a [u8]> {
    headers
        .iter()
        .filter(move |h| h.name.len() == name.len() && h.name.eq_ignore_ascii_case(name))
        .map(|header| header.value.trim_ascii())
}
