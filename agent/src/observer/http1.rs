//! Follows HTTP/1.0 and HTTP/1.1.

use std::collections::VecDeque;

use coalmine_proto::names::Outcome;

use super::{
    MAX_PIPELINED, Opaque, Sink, TenantId, Times,
    account::Account,
    body::{Body, Progress},
    head::{Incomplete, Method, Request, Response, no_headers},
};

/// The observer of one client connection that speaks HTTP/1.
#[derive(Debug)]
pub struct Http1 {
    request: Side,
    response: Side,
    request_head: Incomplete,
    response_head: Incomplete,
    account: Account,
    pending: VecDeque<Pending>,
    /// When the first byte of the request that is being read came.
    started_ns: u64,
    /// When the first byte of the answer that is being read went.
    answered_ns: u64,
    /// Whether the last whole exchange left the connection open for another.
    reusable: bool,
    /// Whether at least one answer was complete.
    has_answered: bool,
    /// The exchange that is or was the last has come: what the client sends after it is no request (RFC 9112,
    /// section 9.6), and nobody will answer it.
    is_last: bool,
    client_gone: bool,
}

/// What the next byte of a direction belongs to.
#[derive(Debug)]
enum Side {
    /// Nothing yet: the message before is complete.
    Idle,
    Head,
    Body(Body),
    /// Nobody knows.
    Opaque,
}

/// A request whose answer is not complete.
#[derive(Debug)]
struct Pending {
    tenant: TenantId,
    started_ns: u64,
    method: Method,
    persistent: bool,
    /// Status of the answer, once its head is complete.
    status: u16,
    /// When the first byte of its final answer went; 0 before.
    first_byte_ns: u64,
    is_stream: bool,
}

impl Default for Http1 {
    fn default() -> Self {
        Self {
            request: Side::Idle,
            response: Side::Idle,
            request_head: Incomplete::default(),
            response_head: Incomplete::default(),
            account: Account::default(),
            pending: VecDeque::new(),
            started_ns: 0,
            answered_ns: 0,
            reusable: false,
            has_answered: false,
            is_last: false,
            client_gone: false,
        }
    }
}

impl Http1 {
    /// An observer of a connection on which nothing was sent.
    pub fn new() -> Self {
        Self::default()
    }

    /// An observer of a connection that is not followed.
    pub(super) fn opaque() -> Self {
        Self {
            request: Side::Opaque,
            response: Side::Opaque,
            ..Self::default()
        }
    }

    /// Whether at least one exchange is complete, none has begun, and another may follow.
    pub fn is_between_requests(&self) -> bool {
        self.reusable && self.is_quiet() && !self.client_gone
    }

    /// Whether no message has begun that is not complete.
    pub fn is_quiet(&self) -> bool {
        let idle = matches!((&self.request, &self.response), (Side::Idle, Side::Idle));
        idle && self.pending.is_empty()
    }

    /// Whether a close by the application, now, is the end of an exchange that was the last.
    pub fn ends_with_close(&self) -> bool {
        let last_by_close = matches!(self.response, Side::Body(Body::UntilClose))
            && matches!(self.request, Side::Idle)
            && self.pending.len() == 1;
        last_by_close || (self.has_answered && self.is_quiet())
    }

    /// Whether the client's bytes are not followed any more.
    pub fn is_request_opaque(&self) -> bool {
        matches!(self.request, Side::Opaque)
    }

    /// Requests whose answers are not complete.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn owes_request(&self) -> bool {
        matches!(self.request, Side::Head | Side::Body(_))
    }

    /// Whether the application's next byte may begin the head of an answer.
    pub(super) fn awaits_answer(&self) -> bool {
        matches!(self.response, Side::Idle | Side::Head)
    }

    /// Lengths of the head and of the whole of the answer that begins with these bytes. None where it is not the
    /// answer to the only request, or has no length.
    pub(super) fn answer_of(&self, bytes: &[u8]) -> Option<(usize, u64)> {
        let request = self.pending.front()?;
        let is_only = matches!(self.response, Side::Idle) && self.pending.len() == 1;
        if !is_only || request.method == Method::Connect {
            return None;
        }
        let (head, length) = Response::parse(bytes).ok()??;
        match head.body(request.method) {
            Body::Length(body) if body > 0 => Some((length, body.checked_add(length as u64)?)),
            _ => None,
        }
    }

    pub(super) fn request_body_left(&self) -> u64 {
        self.request.body_left()
    }

    pub(super) fn response_body_left(&self) -> u64 {
        self.response.body_left()
    }

    pub(super) fn skip_request(&mut self, count: u64) {
        if let Side::Body(body) = &mut self.request
            && body.skip(count)
        {
            self.request = Side::Idle;
        }
    }

    pub(super) fn skip_response(&mut self, count: u64, now_ns: u64, sink: &mut impl Sink) {
        if let Side::Body(body) = &mut self.response
            && body.skip(count)
        {
            self.answered(now_ns, sink);
        }
    }

    /// Bytes of the client that were passed on.
    pub fn on_request(&mut self, mut bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        while !bytes.is_empty() {
            let taken = match &mut self.request {
                Side::Opaque => return,
                Side::Idle if self.is_last => return,
                Side::Idle => {
                    // Empty lines before a request are allowed, and are not its first byte.
                    let blank = |b: &&u8| matches!(**b, b'\r' | b'\n');
                    let skipped = bytes.iter().take_while(blank).count();
                    if skipped < bytes.len() {
                        self.request = Side::Head;
                        self.started_ns = now_ns;
                    }
                    Ok(skipped)
                }
                Side::Head => self.on_request_head(bytes, sink),
                Side::Body(body) => match body.advance(bytes) {
                    Ok(Progress::More) => Ok(bytes.len()),
                    Ok(Progress::Ended(end)) => {
                        self.request = Side::Idle;
                        Ok(end)
                    }
                    Err(why) => Err(why),
                },
            };
            match taken {
                Ok(taken) => bytes = bytes.get(taken..).unwrap_or_default(),
                Err(why) => return self.lose_request(why, sink),
            }
        }
    }

    /// Bytes of the application that were passed on.
    pub fn on_response(&mut self, mut bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        while !bytes.is_empty() {
            let taken = match &mut self.response {
                Side::Opaque => return,
                Side::Idle if self.pending.is_empty() => {
                    if matches!(self.request, Side::Opaque) {
                        self.response = Side::Opaque;
                        return;
                    }
                    Err(Opaque::Unsolicited)
                }
                // Nothing else begins an answer, empty lines included.
                Side::Idle if bytes.first() != Some(&b'H') => Err(Opaque::BadResponse),
                Side::Idle => {
                    self.response = Side::Head;
                    self.answered_ns = now_ns;
                    Ok(0)
                }
                Side::Head => self.on_response_head(bytes, now_ns, sink),
                Side::Body(body) => match body.advance(bytes) {
                    Ok(Progress::More) => Ok(bytes.len()),
                    Ok(Progress::Ended(end)) => {
                        self.answered(now_ns, sink);
                        Ok(end)
                    }
                    Err(why) => Err(why),
                },
            };
            match taken {
                Ok(taken) => bytes = bytes.get(taken..).unwrap_or_default(),
                Err(why) => return self.lose(why, sink),
            }
        }
    }

    /// The client closed its direction. Most often it is gone altogether, so that an answer which is
    /// not completed after this is the client's doing; if it does want the answer, it will count.
    pub fn client_closed(&mut self) {
        self.client_gone = true;
    }

    /// The client reset the connection, or cannot be written to.
    pub fn client_reset(&mut self, now_ns: u64, sink: &mut impl Sink) {
        self.client_gone = true;
        self.end_all(Outcome::ClientAbort, now_ns, sink);
    }

    /// The application closed its direction.
    pub fn upstream_closed(&mut self, now_ns: u64, sink: &mut impl Sink) {
        if matches!(self.response, Side::Body(Body::UntilClose)) {
            self.answered(now_ns, sink);
        }
        self.upstream_reset(now_ns, sink);
    }

    /// The application reset the connection, or cannot be written to.
    pub fn upstream_reset(&mut self, now_ns: u64, sink: &mut impl Sink) {
        let outcome = if self.client_gone {
            Outcome::ClientAbort
        } else {
            Outcome::UpstreamReset
        };
        self.end_all(outcome, now_ns, sink);
    }

    /// All requests that are pending end in this way, and no more will come.
    pub fn end_all(&mut self, outcome: Outcome, now_ns: u64, sink: &mut impl Sink) {
        for request in std::mem::take(&mut self.pending) {
            sink.end(request.tenant, outcome, request.times(now_ns));
        }
        self.reusable = false;
        self.request = Side::Opaque;
        self.response = Side::Opaque;
        self.request_head.clear();
        self.response_head.clear();
        self.note_heads();
    }

    fn on_request_head(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize, Opaque> {
        if self.request_head.is_empty() {
            let mut room = no_headers();
            if let Some((head, length)) = Request::parse(bytes, &mut room)? {
                let next = begin(&head, self.started_ns, &mut self.pending, sink)?;
                self.request = next;
                self.is_last |= !head.is_persistent();
                return Ok(length);
            }
        }
        let (taken, complete) = self.request_head.extend(bytes)?;
        if complete {
            let whole = self.request_head.bytes();
            let mut room = no_headers();
            self.request = match Request::parse(whole, &mut room)? {
                Some((head, length)) if length == whole.len() => {
                    self.is_last |= !head.is_persistent();
                    begin(&head, self.started_ns, &mut self.pending, sink)?
                }
                _ => return Err(Opaque::NotHttp),
            };
            self.request_head.clear();
        }
        self.account_for_heads()?;
        Ok(taken)
    }

    fn account_for_heads(&mut self) -> Result<(), Opaque> {
        self.note_heads().then_some(()).ok_or(Opaque::Memory)
    }

    /// Notes what incomplete heads hold; false if it is more than there is room for.
    fn note_heads(&mut self) -> bool {
        self.account
            .note(self.request_head.len() + self.response_head.len())
    }

    fn on_response_head(&mut self, bytes: &[u8], now_ns: u64, sink: &mut impl Sink) -> Result<usize, Opaque> {
        if self.response_head.is_empty()
            && let Some((head, length)) = Response::parse(bytes)?
        {
            self.begin_response(head, now_ns, sink)?;
            return Ok(length);
        }
        let (taken, complete) = self.response_head.extend(bytes)?;
        if complete {
            let whole = self.response_head.bytes();
            match Response::parse(whole)? {
                Some((head, length)) if length == whole.len() => {
                    self.response_head.clear();
                    self.begin_response(head, now_ns, sink)?;
                }
                _ => return Err(Opaque::BadResponse),
            }
        }
        self.account_for_heads()?;
        Ok(taken)
    }

    fn begin_response(&mut self, head: Response, now_ns: u64, sink: &mut impl Sink) -> Result<(), Opaque> {
        let Some(request) = self.pending.front_mut() else {
            return Err(Opaque::Unsolicited);
        };
        let persistent = head.persistent;
        let (status, method) = (head.status, request.method);
        request.status = status;
        if status == 101 {
            self.answered(now_ns, sink);
            return Err(Opaque::Upgrade);
        }
        if status < 200 {
            self.response = Side::Idle;
            return Ok(());
        }
        (request.first_byte_ns, request.is_stream) = (self.answered_ns, head.is_stream);
        if method == Method::Connect && status < 300 {
            self.answered(now_ns, sink);
            return Err(Opaque::Connect);
        }
        let body = head.body(method);
        request.persistent &= persistent && body != Body::UntilClose;
        if body.is_empty() {
            self.answered(now_ns, sink);
        } else {
            self.response = Side::Body(body);
        }
        Ok(())
    }

    /// The answer to the oldest request is complete.
    fn answered(&mut self, now_ns: u64, sink: &mut impl Sink) {
        self.response = Side::Idle;
        self.has_answered = true;
        if let Some(request) = self.pending.pop_front() {
            self.reusable = request.persistent;
            let outcome = Outcome::of_http_status(request.status);
            sink.end(request.tenant, outcome, request.times(now_ns));
            if !request.persistent {
                self.end_here(sink);
            }
        }
    }

    /// No exchange follows. Whoever has sent requests ahead of this answer sends them again elsewhere.
    fn end_here(&mut self, sink: &mut impl Sink) {
        self.is_last = true;
        for later in std::mem::take(&mut self.pending) {
            sink.forget(later.tenant);
        }
        if matches!(self.request, Side::Head) {
            self.request = Side::Idle;
            self.request_head.clear();
            self.note_heads();
        }
    }

    /// The requests that were understood are still followed to their answers.
    fn lose_request(&mut self, why: Opaque, sink: &mut impl Sink) {
        self.request = Side::Opaque;
        self.request_head.clear();
        self.note_heads();
        sink.opaque(why);
    }

    fn lose(&mut self, why: Opaque, sink: &mut impl Sink) {
        for request in std::mem::take(&mut self.pending) {
            sink.forget(request.tenant);
        }
        // A connection is opaque for one reason, the first.
        if !matches!(self.request, Side::Opaque) {
            self.lose_request(why, sink);
        }
        self.response_head.clear();
        self.note_heads();
        self.response = Side::Opaque;
    }
}

impl Side {
    fn body_left(&self) -> u64 {
        match self {
            Self::Body(body) => body.left(),
            Self::Idle | Self::Head | Self::Opaque => 0,
        }
    }
}

impl Pending {
    fn times(&self, now_ns: u64) -> Times {
        let since = |moment: u64| moment.saturating_sub(self.started_ns);
        Times {
            total_ns: since(now_ns),
            first_byte_ns: (self.first_byte_ns > 0).then(|| since(self.first_byte_ns)),
            is_stream: self.is_stream,
        }
    }
}

/// Notes the request; gives what follows its head.
fn begin(
    head: &Request<'_, '_>,
    started_ns: u64,
    pending: &mut VecDeque<Pending>,
    sink: &mut impl Sink,
) -> Result<Side, Opaque> {
    let body = head.body()?;
    if pending.len() >= MAX_PIPELINED {
        return Err(Opaque::Pipelined);
    }
    pending.push_back(Pending {
        tenant: sink.begin(head),
        started_ns,
        method: head.method(),
        persistent: head.is_persistent(),
        status: 0,
        first_byte_ns: 0,
        is_stream: false,
    });
    Ok(if body.is_empty() {
        Side::Idle
    } else {
        Side::Body(body)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Recorder;

    const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

    #[track_caller]
    fn check(request: &[u8], answer: &[u8], expected: bool) {
        let (mut observer, mut sink) = (Http1::new(), Recorder::new(Vec::new(), 1));
        observer.on_request(request, 0, &mut sink);
        observer.on_response(answer, 1, &mut sink);
        assert_eq!(observer.ends_with_close(), expected, "{answer:?}");
    }

    #[test]
    fn what_is_lost_holds_no_memory() {
        let mut sink = Recorder::new(Vec::new(), 1);
        let begun = [&b"GET / HTTP/1.1\r\nx: "[..], &[b'y'; 50_000]].concat();
        let lose = |_| {
            let mut observer = Http1::new();
            observer.on_request(&begun, 0, &mut sink);
            observer.on_request(&[b'y'; 20_000], 0, &mut sink);
            assert!(observer.is_request_opaque());
            observer
        };
        // All together they would have held more than there is room for.
        let lost: Vec<Http1> = (0..1_100).map(lose).collect();
        let mut other = Http1::new();
        other.on_request(&begun, 0, &mut sink);
        assert!(!other.is_request_opaque());
        drop((lost, other));
        // Nor does what was asked after the last answer.
        let closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let end = |_| {
            let mut observer = Http1::new();
            observer.on_request(b"GET / HTTP/1.1\r\n\r\n", 0, &mut sink);
            observer.on_request(&begun, 0, &mut sink);
            observer.on_response(closing, 1, &mut sink);
            observer
        };
        let ended: Vec<Http1> = (0..1_100).map(end).collect();
        let mut other = Http1::new();
        other.on_request(&begun, 0, &mut sink);
        assert!(!other.is_request_opaque());
        drop(ended);
    }

    #[test]
    fn a_close_ends_an_exchange_that_is_complete() {
        let closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
        check(GET, closing, true);
        check(GET, b"HTTP/1.0 200 OK\r\n\r\nuntil", true);
        check(b"", b"", false);
        check(GET, b"", false);
        check(GET, &closing[..closing.len() - 1], false);
        // The application may still read what is to come.
        check(b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n", closing, false);
        check(b"hello", b"bye", false);
    }
}
