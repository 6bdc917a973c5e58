//! One HTTP/2 connection with bytes as a client and a server send them after their first exchange.
//!
//! What is the same in all requests stands in the compression's dynamic table (RFC 7541) and takes a byte; the tenant's
//! name differs, so it is a literal in Huffman's code whose header is in the table.

use coalmine_agent::{observer::Http2, recorder::Recorder};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames and their flags, RFC 9113 section 6.
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const SETTINGS: u8 = 0x4;
const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

/// Where a frame's stream stands.
const STREAM: std::ops::Range<usize> = 5..9;

/// The observer, and what it is shown.
pub(super) struct Connection {
    observer: Http2,
    /// By tenant.
    requests: Vec<Vec<u8>>,
    answer: Vec<u8>,
    /// Where the answer's second frame begins.
    data: usize,
    /// The stream of the next request.
    stream: u32,
}

impl Connection {
    /// A connection on which there was one request of the first of these tenants.
    pub(super) fn open(names: &[String], body_bytes: usize, recorder: &mut Recorder) -> Self {
        let mut connection = Self {
            observer: Http2::new(),
            requests: vec![frame(HEADERS, END_HEADERS | END_STREAM, &first_request(names))],
            answer: Vec::new(),
            data: 0,
            stream: 1,
        };
        connection.answer_with(&first_answer(body_bytes), body_bytes);
        let Self { observer, .. } = &mut connection;
        observer.on_request(PREFACE, 0, recorder);
        observer.on_request(&frame(SETTINGS, 0, &[]), 0, recorder);
        observer.on_response(&frame(SETTINGS, 0, &[]), 0, recorder);
        observer.on_response(&frame(SETTINGS, ACK, &[]), 0, recorder);
        observer.on_request(&frame(SETTINGS, ACK, &[]), 0, recorder);
        connection.exchange(0, 0, 1, recorder);

        let request = |name: &String| frame(HEADERS, END_HEADERS | END_STREAM, &next_request(name));
        connection.requests = names.iter().map(request).collect();
        // `:status`, and both headers from the table.
        connection.answer_with(&[0x88, 0x80 | 63, 0x80 | 62], body_bytes);
        connection
    }

    /// A request of this tenant and its answer.
    pub(super) fn exchange(
        &mut self,
        tenant: usize,
        asked_ns: u64,
        answered_ns: u64,
        recorder: &mut Recorder,
    ) {
        let stream = self.stream.to_be_bytes();
        self.stream = self.stream.saturating_add(2);
        let request = &mut self.requests[tenant];
        request[STREAM].copy_from_slice(&stream);
        self.observer.on_request(request, asked_ns, recorder);
        self.answer[STREAM].copy_from_slice(&stream);
        self.answer[self.data..][STREAM].copy_from_slice(&stream);
        self.observer.on_response(&self.answer, answered_ns, recorder);
    }

    fn answer_with(&mut self, headers: &[u8], body_bytes: usize) {
        self.answer = frame(HEADERS, END_HEADERS, headers);
        self.data = self.answer.len();
        self.answer
            .extend(frame(DATA, END_STREAM, &vec![b'x'; body_bytes]));
    }
}

/// A frame whose stream is written later.
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    let mut frame = length.to_vec();
    frame.extend([kind, flags, 0, 0, 0, 0]);
    frame.extend(payload);
    frame
}

/// All fields go into the dynamic table, where the last has the index 62.
fn first_request(names: &[String]) -> Vec<u8> {
    // `:method: GET` and `:scheme: http`.
    let mut block = vec![0x82, 0x86];
    for (index, value) in [
        (1, "bench.local"),
        (4, "/orders"),
        (58, "coalmine-bench"),
        (19, "*/*"),
    ] {
        block.push(0x40 | index);
        block.extend(literal(value));
    }
    let name = names.first().map_or("", String::as_str);
    for (header, value) in [
        ("x-request-id", "6f1c1d0e-6a51-4a3c-9f6e-0d3f5a2b7c11"),
        ("x-tenant-id", name),
    ] {
        block.push(0x40);
        block.extend(literal(header));
        block.extend(literal(value));
    }
    block
}

/// All fields of [`first_request`] from the tables, and another tenant, which stays out of them.
fn next_request(name: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x86];
    block.extend([67, 66, 65, 64, 63].map(|index| 0x80 | index));
    // The index 62 in a prefix of four bits.
    block.extend([0x0f, 62 - 15]);
    block.extend(huffman(name));
    block
}

/// `content-type` and `content-length`, in this order.
fn first_answer(body_bytes: usize) -> Vec<u8> {
    let mut block = vec![0x88, 0x40 | 31];
    block.extend(literal("application/json"));
    block.push(0x40 | 28);
    block.extend(literal(&body_bytes.to_string()));
    block
}

/// A string as it is; it has less than 127 bytes.
fn literal(text: &str) -> Vec<u8> {
    let mut literal = vec![text.len() as u8];
    literal.extend(text.bytes());
    literal
}

/// A string in Huffman's code.
fn huffman(text: &str) -> Vec<u8> {
    let (mut bits, mut count) = (0_u32, 0);
    let mut coded = vec![0x80];
    for (code, length) in text.bytes().map(code) {
        bits = (bits << length) | code;
        count += length;
        while count >= 8 {
            count -= 8;
            coded.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    if count > 0 {
        // Filled up with ones.
        coded.push(((bits << (8 - count)) | (0xff >> count)) as u8);
    }
    coded[0] |= (coded.len() - 1) as u8;
    coded
}

/// Code and length of the characters of the bench's tenants, RFC 7541 appendix B.
fn code(byte: u8) -> (u32, u32) {
    match byte {
        b'0'..=b'2' => (u32::from(byte - b'0'), 5),
        b'3'..=b'9' => (0x19 + u32::from(byte - b'3'), 6),
        b'a' => (0x03, 5),
        b'e' => (0x05, 5),
        b't' => (0x09, 5),
        b'n' => (0x2a, 6),
        // The hyphen.
        _ => (0x16, 6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huffman_codes_are_those_of_the_rfc() {
        // 01001 00101 101010 00011 101010 01001 010110 00000 00010 011001, filled up with ones.
        let coded = [0x87, 0x49, 0x6a, 0x1d, 0x49, 0x58, 0x02, 0x67];
        assert_eq!(huffman("tenant-023"), coded);
        // RFC 7541 appendix C.6.1 has `302` as 6402.
        assert_eq!(huffman("302"), [0x82, 0x64, 0x02]);
        assert_eq!(huffman(""), [0x80]);
    }
}
