//! Follows the messages of one client connection beside the relay, byte by byte, and says how each
//! request ended.
//!
//! The observer decides nothing about bytes: it sees a copy of what has been passed on, and the relay
//! works the same whatever the observer thinks. It has no sockets and no clock (the time is an
//! argument, in nanoseconds of any clock that does not go back), it never panics, and its memory is
//! bounded: one incomplete head of at most [`MAX_HEAD_BYTES`] in each direction and
//! [`MAX_PIPELINED`] requests.
//!
//! Where it cannot be sure which bytes belong to which message it stops, for good, and says why
//! ([`Opaque`]). It would rather count nothing than count wrongly.
//!
//! Read in this order: [`Observer`] (which protocol), [`Http1`] with `head` and `body`, [`Http2`] with what
//! is below it.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod account;
mod body;
mod head;
mod http1;
mod http2;
mod protocol;

pub use http1::Http1;
pub use http2::Http2;
pub use protocol::Observer;

use coalmine_proto::names::Outcome;

use crate::tenant::Head;

/// The longest head of a request or response that is followed.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;

/// The most headers of a message that is followed.
pub const MAX_HEADERS: usize = 256;

/// The most requests that may wait for their answers on one connection.
pub const MAX_PIPELINED: usize = 128;

/// A tenant, as the one who keeps the counts knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantId(pub u32);

/// Takes what is observed. Each `begin` is followed by one `end`, `forget` or `malformed` with its
/// tenant.
pub trait Sink {
    /// A request's head is complete.
    fn begin(&mut self, head: &dyn Head) -> TenantId;
    /// The request ended.
    fn end(&mut self, tenant: TenantId, outcome: Outcome, times: Times);
    /// The request cannot be followed to its end: it is not counted.
    fn forget(&mut self, tenant: TenantId);
    /// A request that is not followed, because too many others are or its head is too large: it is not counted.
    fn passed_over(&mut self);
    /// A request of an HTTP/2 stream that no correct server would accept: it is nobody's, and not counted. It
    /// ends the `begin` with this tenant, where that was seen too late.
    fn malformed(&mut self, begun: Option<TenantId>);
    /// The connection is not followed any more.
    fn opaque(&mut self, why: Opaque);
}

/// How long a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// From the first byte of the request's head to the last of the answer.
    pub total_ns: u64,
    /// From the first byte of the request's head to the first of the final answer's; none if none came.
    pub first_byte_ns: Option<u64>,
    /// The answer is a stream of events, whose length says nothing about speed: it has no latency.
    pub is_stream: bool,
}

/// Why a connection is not followed (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Opaque {
    /// The client's bytes are no HTTP request.
    NotHttp,
    /// The application's bytes are no HTTP response.
    BadResponse,
    /// The application spoke without being asked.
    Unsolicited,
    /// A head longer than [`MAX_HEAD_BYTES`].
    HeadTooLong,
    /// A head with more headers than [`MAX_HEADERS`].
    TooManyHeaders,
    /// The length of a body is ambiguous: a smuggling attempt or a broken client.
    Framing,
    /// A chunk that is no chunk.
    BadChunk,
    /// More requests than [`MAX_PIPELINED`] wait for their answers.
    Pipelined,
    /// The connection was upgraded to another protocol, such as WebSocket.
    Upgrade,
    /// The connection is a tunnel.
    Connect,
    /// The client speaks TLS to the application.
    Tls,
    /// A frame of HTTP/2 that breaks the framing.
    Http2Framing,
    /// A header block of HTTP/2 that cannot be decompressed.
    Hpack,
    /// All connections together need more memory for what is not complete than there is.
    Memory,
}

impl Opaque {
    /// How many reasons there are.
    pub const COUNT: usize = 14;

    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::NotHttp,
        Self::BadResponse,
        Self::Unsolicited,
        Self::HeadTooLong,
        Self::TooManyHeaders,
        Self::Framing,
        Self::BadChunk,
        Self::Pipelined,
        Self::Upgrade,
        Self::Connect,
        Self::Tls,
        Self::Http2Framing,
        Self::Hpack,
        Self::Memory,
    ];

    /// The reason's name in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotHttp => "not_http",
            Self::BadResponse => "bad_response",
            Self::Unsolicited => "unsolicited_response",
            Self::HeadTooLong => "head_too_long",
            Self::TooManyHeaders => "too_many_headers",
            Self::Framing => "ambiguous_length",
            Self::BadChunk => "bad_chunk",
            Self::Pipelined => "pipeline_too_long",
            Self::Upgrade => "upgrade",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Http2Framing => "http2_framing",
            Self::Hpack => "hpack",
            Self::Memory => "memory_limit",
        }
    }
}

#[cfg(test)]
mod tests;
