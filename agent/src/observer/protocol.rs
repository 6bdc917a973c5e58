//! Finds out which protocol a connection speaks, beside the relay: no byte is held back for it.
//!
//! A client that begins with HTTP/2's preface speaks HTTP/2; all other connections are taken for HTTP/1,
//! whose observer stops at once where they are not. A server of HTTP/2 may send its SETTINGS before the
//! client has said anything; its first bytes are remembered until the client has spoken. Whatever else a
//! server says unasked is another protocol.

use coalmine_proto::names::Outcome;

use super::{Http1, Http2, Opaque, Sink};

/// What a client with prior knowledge of HTTP/2 begins with (RFC 9113, section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of a TLS record that begins a handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Most bytes that are remembered of a server that speaks first: its SETTINGS, and no more.
const MAX_EARLY_BYTES: usize = 1024;

/// The observer of one client connection, whatever it speaks.
#[derive(Debug)]
pub struct Observer(Protocol);

#[derive(Debug)]
enum Protocol {
    Unknown(Unknown),
    Http1(Http1),
    Http2(Box<Http2>),
}

/// A connection on which the client has not said enough.
#[derive(Debug, Default)]
struct Unknown {
    /// Bytes of the preface that came.
    preface: usize,
    /// When the first of them came.
    started_ns: u64,
    /// What the server said meanwhile.
    early: Vec<u8>,
}

impl Default for Observer {
    fn default() -> Self {
        Self(Protocol::Unknown(Unknown::default()))
    }
}

impl Observer {
    /// An observer of a connection on which nothing was sent.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether at least one exchange is complete, none has begun, and another may follow on another
    /// connection to the application. Never so for HTTP/2, where a connection has a state of its own.
    pub fn is_between_requests(&self) -> bool {
        match &self.0 {
            Protocol::Http1(http1) => http1.is_between_requests(),
            Protocol::Unknown(_) | Protocol::Http2(_) => false,
        }
    }

    /// Whether the client has sent nothing.
    pub fn is_untouched(&self) -> bool {
        matches!(&self.0, Protocol::Unknown(unknown) if unknown.preface == 0)
    }

    /// Whether no message has begun that is not complete.
    pub fn is_quiet(&self) -> bool {
        match &self.0 {
            Protocol::Unknown(unknown) => unknown.preface == 0,
            Protocol::Http1(http1) => http1.is_quiet(),
            Protocol::Http2(http2) => http2.is_quiet(),
        }
    }

    /// Whether a close by the application, now, is the end of an exchange that was the last.
    pub fn ends_with_close(&self) -> bool {
        match &self.0 {
            Protocol::Unknown(_) => false,
            Protocol::Http1(http1) => http1.ends_with_close(),
            Protocol::Http2(http2) => http2.is_quiet(),
        }
    }

    /// Whether the client's bytes are not followed any more.
    pub fn is_request_opaque(&self) -> bool {
        match &self.0 {
            Protocol::Unknown(_) => false,
            Protocol::Http1(http1) => http1.is_request_opaque(),
            Protocol::Http2(http2) => http2.is_opaque(),
        }
    }

    /// Whether the client has begun a request and not sent all of it.
    pub fn owes_request(&self) -> bool {
        matches!(&self.0, Protocol::Http1(http1) if http1.owes_request())
    }

    /// Requests whose answers are not complete.
    pub fn pending(&self) -> usize {
        match &self.0 {
            Protocol::Unknown(_) => 0,
            Protocol::Http1(http1) => http1.pending(),
            Protocol::Http2(http2) => http2.pending(),
        }
    }

    /// How many of the client's next bytes surely belong to a body: their content need not be seen, so
    /// [`skip_request`](Self::skip_request) may take the place of [`on_request`](Self::on_request).
    pub fn request_body_left(&self) -> u64 {
        match &self.0 {
            Protocol::Http1(http1) => http1.request_body_left(),
            Protocol::Unknown(_) | Protocol::Http2(_) => 0,
        }
    }

    /// As [`request_body_left`](Self::request_body_left), of the application's bytes.
    pub fn response_body_left(&self) -> u64 {
        match &self.0 {
            Protocol::Http1(http1) => http1.response_body_left(),
            Protocol::Unknown(_) | Protocol::Http2(_) => 0,
        }
    }

    /// Whether the application's next byte may begin the head of an answer with a body of any length.
    pub fn awaits_answer(&self) -> bool {
        matches!(&self.0, Protocol::Http1(http1) if http1.awaits_answer())
    }

    /// Lengths of the head and of the whole of the answer that begins with these bytes, if it can be told.
    /// Nothing is noted of it: [`on_response`](Self::on_response) is still to come.
    pub fn answer_of(&self, bytes: &[u8]) -> Option<(usize, u64)> {
        match &self.0 {
            Protocol::Http1(http1) => http1.answer_of(bytes),
            Protocol::Unknown(_) | Protocol::Http2(_) => None,
        }
    }

    /// This many bytes of a request's body were passed on; at most [`request_body_left`](Self::request_body_left).
    pub fn skip_request(&mut self, count: u64) {
        if let Protocol::Http1(http1) = &mut self.0 {
            http1.skip_request(count);
        }
    }

    /// This many bytes of an answer's body were passed on; at most [`response_body_left`](Self::response_body_left).
    pub fn skip_response(&mut self, count: u64, now_ns: u64, sink: &mut impl Sink) {
        if let Protocol::Http1(http1) = &mut self.0 {
            http1.skip_response(count, now_ns, sink);
        }
    }

    /// Bytes of the client that were passed on.
    pub fn on_request(&mut self, bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        match &mut self.0 {
            Protocol::Unknown(_) => self.find_out(bytes, now_ns, sink),
            Protocol::Http1(http1) => http1.on_request(bytes, now_ns, sink),
            Protocol::Http2(http2) => http2.on_request(bytes, now_ns, sink),
        }
    }

    /// Bytes of the application that were passed on.
    pub fn on_response(&mut self, bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        match &mut self.0 {
            Protocol::Unknown(unknown) => {
                if !unknown.remember(bytes) {
                    self.settle(now_ns, sink);
                    self.on_response(bytes, now_ns, sink);
                }
            }
            Protocol::Http1(http1) => http1.on_response(bytes, now_ns, sink),
            Protocol::Http2(http2) => http2.on_response(bytes, now_ns, sink),
        }
    }

    /// The client closed its direction.
    pub fn client_closed(&mut self) {
        match &mut self.0 {
            Protocol::Unknown(_) => {}
            Protocol::Http1(http1) => http1.client_closed(),
            Protocol::Http2(http2) => http2.client_closed(),
        }
    }

    /// The client reset the connection, or cannot be written to.
    pub fn client_reset(&mut self, now_ns: u64, sink: &mut impl Sink) {
        self.settle_begun(now_ns, sink);
        match &mut self.0 {
            Protocol::Unknown(_) => {}
            Protocol::Http1(http1) => http1.client_reset(now_ns, sink),
            Protocol::Http2(http2) => http2.client_reset(now_ns, sink),
        }
    }

    /// The application closed its direction.
    pub fn upstream_closed(&mut self, now_ns: u64, sink: &mut impl Sink) {
        self.settle_begun(now_ns, sink);
        match &mut self.0 {
            Protocol::Unknown(_) => {}
            Protocol::Http1(http1) => http1.upstream_closed(now_ns, sink),
            Protocol::Http2(http2) => http2.upstream_closed(now_ns, sink),
        }
    }

    /// The application reset the connection, or cannot be written to.
    pub fn upstream_reset(&mut self, now_ns: u64, sink: &mut impl Sink) {
        self.settle_begun(now_ns, sink);
        match &mut self.0 {
            Protocol::Unknown(_) => {}
            Protocol::Http1(http1) => http1.upstream_reset(now_ns, sink),
            Protocol::Http2(http2) => http2.upstream_reset(now_ns, sink),
        }
    }

    /// All requests that are pending end in this way, and no more will come.
    pub fn end_all(&mut self, outcome: Outcome, now_ns: u64, sink: &mut impl Sink) {
        self.settle_begun(now_ns, sink);
        match &mut self.0 {
            Protocol::Unknown(_) => {}
            Protocol::Http1(http1) => http1.end_all(outcome, now_ns, sink),
            Protocol::Http2(http2) => http2.end_all(outcome, now_ns, sink),
        }
    }

    /// Looks at the client's first bytes.
    fn find_out(&mut self, bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        let Protocol::Unknown(unknown) = &mut self.0 else {
            return;
        };
        if bytes.is_empty() {
            return;
        }
        if unknown.preface == 0 {
            unknown.started_ns = now_ns;
            if bytes.first() == Some(&TLS_HANDSHAKE) {
                sink.opaque(Opaque::Tls);
                self.0 = Protocol::Http1(Http1::opaque());
                return;
            }
        }
        let seen = unknown.preface;
        let expected = PREFACE.get(seen..).unwrap_or_default();
        let common = expected.len().min(bytes.len());
        if bytes.get(..common) != expected.get(..common) {
            self.settle(now_ns, sink);
            return self.on_request(bytes, now_ns, sink);
        }
        unknown.preface += common;
        if unknown.preface < PREFACE.len() {
            return;
        }
        let early = std::mem::take(&mut unknown.early);
        let mut http2 = Box::new(Http2::new());
        http2.on_request(PREFACE, now_ns, sink);
        http2.on_response(&early, now_ns, sink);
        http2.on_request(bytes.get(common..).unwrap_or_default(), now_ns, sink);
        self.0 = Protocol::Http2(http2);
    }

    /// Nothing more will be said: of a client that has said nothing, there is nothing to say.
    fn settle_begun(&mut self, now_ns: u64, sink: &mut impl Sink) {
        if !self.is_untouched() {
            self.settle(now_ns, sink);
        }
    }

    /// The client does not speak HTTP/2.
    fn settle(&mut self, now_ns: u64, sink: &mut impl Sink) {
        if let Protocol::Unknown(unknown) = &self.0 {
            let mut http1 = Http1::new();
            let begun = PREFACE.get(..unknown.preface).unwrap_or_default();
            http1.on_request(begun, unknown.started_ns, sink);
            http1.on_response(&unknown.early, now_ns, sink);
            self.0 = Protocol::Http1(http1);
        }
    }
}

impl Unknown {
    /// Keeps what the server says before the client has; false if it can be no SETTINGS.
    fn remember(&mut self, bytes: &[u8]) -> bool {
        let before = self.early.len();
        if before.saturating_add(bytes.len()) > MAX_EARLY_BYTES {
            return false;
        }
        self.early.extend_from_slice(bytes);
        let may_be = may_be_settings(&self.early);
        if !may_be {
            self.early.truncate(before);
        }
        may_be
    }
}

/// Whether a server's first bytes may be the head of a SETTINGS frame.
fn may_be_settings(bytes: &[u8]) -> bool {
    // Three bytes of length, then type 4, no flags, stream 0 (RFC 9113, sections 4.1 and 6.5).
    const HEAD: [u8; 6] = [4, 0, 0, 0, 0, 0];
    // A length of 256 or more is no server's first SETTINGS: it has six bytes a setting.
    let long = bytes.iter().take(2).any(|byte| *byte != 0);
    let seen = bytes.get(3..).unwrap_or_default();
    !long && HEAD.iter().zip(seen).all(|(expected, byte)| expected == byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Recorder;

    #[test]
    fn settings_are_told_from_greetings() {
        let settings = [0, 0, 18, 4, 0, 0, 0, 0, 0, 0, 3];
        for end in 0..settings.len() {
            assert!(may_be_settings(&settings[..end]));
        }
        for prompt in [
            &[0x4a][..],
            &[0, 1],
            &[0x4a, 0, 0, 0, 0x0a],
            b"220 smtp",
            b"SSH-2.0",
        ] {
            assert!(!may_be_settings(prompt), "{prompt:?}");
        }
    }

    #[track_caller]
    fn check(pieces: &[&[u8]], expected: &str) {
        let (mut observer, mut sink) = (Observer::new(), Recorder::new(Vec::new(), 1));
        for piece in pieces {
            observer.on_request(piece, 1, &mut sink);
        }
        let protocol = match &observer.0 {
            Protocol::Unknown(_) => "unknown",
            Protocol::Http1(http1) if http1.is_request_opaque() => "opaque",
            Protocol::Http1(_) => "http/1",
            Protocol::Http2(_) => "http/2",
        };
        assert_eq!(protocol, expected, "{pieces:?}");
    }

    #[test]
    fn the_first_bytes_say_the_protocol() {
        check(&[], "unknown");
        check(&[PREFACE], "http/2");
        check(&[&PREFACE[..5], &PREFACE[5..]], "http/2");
        check(&[&PREFACE[..5]], "unknown");
        check(&[&PREFACE[..5], b" HTTP/1.1\r\nhost: h\r\n\r\n"], "http/1");
        check(&[b"PR", b"OPFIND / HTTP/1.1\r\n\r\n"], "http/1");
        check(&[b"GET / HTTP/1.1\r\n"], "http/1");
        check(&[&[0x16, 3, 1, 2, 0]], "opaque");
        check(&[b"SSH-2.0-x\r\n\r\n"], "opaque");
    }

    #[test]
    fn a_server_may_speak_first() {
        let (mut observer, mut sink) = (Observer::new(), Recorder::new(Vec::new(), 1));
        observer.on_response(&[0, 0, 0, 4, 0, 0, 0, 0, 0], 1, &mut sink);
        observer.on_request(PREFACE, 2, &mut sink);
        assert!(matches!(observer.0, Protocol::Http2(_)));

        let mut observer = Observer::new();
        observer.on_response(b"220 ready\r\n", 1, &mut sink);
        assert!(observer.is_request_opaque());
    }
}
