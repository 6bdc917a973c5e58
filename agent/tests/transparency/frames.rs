//! Frames of HTTP/2 (RFC 9113, sections 4 and 6) and header blocks (RFC 7541), made by hand.

use std::collections::VecDeque;

/// What a client begins with.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const NO_FLAGS: u8 = 0;
pub(crate) const ACK: u8 = 0x1;
pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;
pub(crate) const PADDED: u8 = 0x8;
pub(crate) const WITH_PRIORITY: u8 = 0x20;

/// A list of fields.
pub(crate) type Fields<'a> = [(&'a str, &'a str)];

/// How a field stands in a header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As text, and not remembered.
    Literal,
    /// As text, and remembered.
    Inserted,
    /// As a position, where it is remembered.
    Indexed,
}

/// Makes header blocks of one direction, and remembers what the other side will.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    /// The newest first.
    table: VecDeque<(String, String)>,
    size: usize,
}

/// A frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend_from_slice(&[kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A SETTINGS frame.
pub(crate) fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (name, value) in settings {
        payload.extend_from_slice(&name.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    frame(SETTINGS, NO_FLAGS, 0, &payload)
}

/// The answer to SETTINGS.
pub(crate) fn settings_ack() -> Vec<u8> {
    frame(SETTINGS, ACK, 0, b"")
}

/// What a client begins with, and its SETTINGS.
pub(crate) fn opening() -> Vec<u8> {
    [PREFACE, &settings(&[])].concat()
}

/// A HEADERS frame with a whole block.
pub(crate) fn headers(stream: u32, flags: u8, fields: &Fields<'_>) -> Vec<u8> {
    frame(HEADERS, flags | END_HEADERS, stream, &block(fields))
}

/// A request of a tenant, without a body.
pub(crate) fn request(stream: u32, tenant: &str) -> Vec<u8> {
    headers(stream, END_STREAM, &get(tenant))
}

/// The fields of a request of a tenant.
pub(crate) fn get(tenant: &str) -> [(&str, &str); 5] {
    [
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/x?y=z"),
        (":authority", "h"),
        ("x-tenant", tenant),
    ]
}

/// An answer without a body.
pub(crate) fn answer(stream: u32, status: &str) -> Vec<u8> {
    headers(stream, END_STREAM, &[(":status", status)])
}

/// A DATA frame.
pub(crate) fn data(stream: u32, flags: u8, bytes: &[u8]) -> Vec<u8> {
    frame(DATA, flags, stream, bytes)
}

/// A RST_STREAM frame.
pub(crate) fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, NO_FLAGS, stream, &code.to_be_bytes())
}

/// A GOAWAY frame.
pub(crate) fn goaway(last_stream: u32, code: u32) -> Vec<u8> {
    frame(
        GOAWAY,
        NO_FLAGS,
        0,
        &[last_stream.to_be_bytes(), code.to_be_bytes()].concat(),
    )
}

/// A header block in which nothing is remembered.
pub(crate) fn block(fields: &Fields<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        literal(0, name.as_bytes(), value.as_bytes(), &mut bytes);
    }
    bytes
}

/// A field with a new name (RFC 7541, section 6.2), whose first byte is given.
pub(crate) fn literal(first: u8, name: &[u8], value: &[u8], bytes: &mut Vec<u8>) {
    bytes.push(first);
    for text in [name, value] {
        integer(0, 7, text.len(), bytes);
        bytes.extend_from_slice(text);
    }
}

/// An integer behind the first bits of a byte (RFC 7541, section 5.1).
pub(crate) fn integer(first: u8, prefix_bits: u32, value: usize, bytes: &mut Vec<u8>) {
    let most = (1 << prefix_bits) - 1;
    if value < most {
        return bytes.push(first | u8::try_from(value).unwrap());
    }
    bytes.push(first | u8::try_from(most).unwrap());
    let mut rest = value - most;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
}

// === impl Encoder ===

impl Encoder {
    /// What the other side remembers by default (RFC 9113, section 6.5.2).
    const TABLE_BYTES: usize = 4096;

    /// Appends a field.
    pub(crate) fn field(&mut self, form: Form, name: &str, value: &str, block: &mut Vec<u8>) {
        let place = self.table.iter().position(|(n, v)| n == name && v == value);
        match (form, place) {
            // The static table has 61 entries (RFC 7541, appendix A).
            (Form::Indexed, Some(place)) => integer(0x80, 7, 62 + place, block),
            (Form::Literal, _) => literal(0, name.as_bytes(), value.as_bytes(), block),
            (Form::Inserted, _) | (Form::Indexed, None) => {
                literal(0x40, name.as_bytes(), value.as_bytes(), block);
                self.insert(name, value);
            }
        }
    }

    /// RFC 7541, section 4: an entry's size is that of its texts and 32; the oldest make room.
    fn insert(&mut self, name: &str, value: &str) {
        let size = |(name, value): &(String, String)| name.len() + value.len() + 32;
        let entry = (name.to_owned(), value.to_owned());
        self.size += size(&entry);
        self.table.push_front(entry);
        while self.size > Self::TABLE_BYTES {
            let oldest = self.table.pop_back().unwrap();
            self.size -= size(&oldest);
        }
    }
}
