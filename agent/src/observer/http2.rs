//! Follows one connection of HTTP/2 with prior knowledge (RFC 9113), gRPC above all.
//!
//! Read in this order: `frames` (what happens in a direction), `stream` (what is known of a request),
//! `hpack` with `table` and `huffman` (header blocks), `request` and `response` (what is kept of them).
//!
//! A stream of the client is one request. It begins with the first byte of its HEADERS and ends with the
//! last byte that the server sends on it; its outcome stands in the status, for gRPC in `grpc-status`.
//! These are the cases that are not plain:
//!
//! * A reset by the server is its failure, a reset by the client is the client's; what is still on the way
//!   on the stream is nobody's, but its header blocks are read: they change the tables.
//! * A caller of gRPC that resets its stream when its deadline is over (`grpc-timeout`) got no answer in
//!   time. It is the same as where the server notices first and says DEADLINE_EXCEEDED.
//! * A call of gRPC that is answered before its request has ended is a conversation, which lasts as long as
//!   the caller likes; it has no latency. One that only the server streams does have: telling it from others
//!   takes the prefixes of messages, which are not looked at.
//! * An answer that is complete before its request is counted when it is complete.
//! * A CONNECT is answered when it is accepted. What goes through the tunnel is not part of the answer.
//! * What the server pushes was not asked for and is not counted.
//! * GOAWAY says which streams the server has not processed and never will. The client sends them again
//!   elsewhere, so they are forgotten: a server that stops with grace makes no error. Streams that it did
//!   promise to answer end when the connection closes, as the server's failure.
//! * A request that no correct server accepts (RFC 9113, section 8.1.1) is attributed to nobody; neither
//!   framing nor compression are in doubt, so all others are still followed.
//! * So they are where a request is passed over because too many others are open, or because its head is
//!   larger than is kept. Servers may well answer it.
//! * Where a correct peer would give the connection up, or where tables might differ, nobody knows what
//!   follows: the connection is opaque and what is pending is forgotten.

mod frames;
mod hpack;
mod huffman;
mod request;
mod response;
mod stream;
mod table;

use std::{cell::Cell, collections::VecDeque};

use coalmine_proto::names::Outcome;

use super::{Opaque, Sink, account::Account};
use frames::{Block, Data, Event, Frames, Sender, Settings};
use hpack::{Decoder, Table};
use request::{RequestHead, RequestTable};
use response::{Answer, ResponseTable};
use stream::{NOT_SAID, Stream, Streams};

/// The most streams that are followed at a time. Many servers set no limit, and streams pile up on a shared
/// connection while a server stands still.
const MAX_STREAMS: usize = 4096;

/// The most SETTINGS of one side that the other may leave without an acknowledgement.
const MAX_UNACKNOWLEDGED: usize = 64;

const LAST_STREAM: u32 = (1 << 31) - 1;

thread_local! {
    /// The head that is being read: one is enough for all connections of a thread, since a block is read
    /// in one go.
    static HEAD: Cell<Option<Box<RequestHead>>> = const { Cell::new(None) };
}

/// The observer of one client connection that speaks HTTP/2.
#[derive(Debug)]
pub struct Http2 {
    client: Direction<RequestTable>,
    server: Direction<ResponseTable>,
    streams: Streams,
    /// The last stream that the client has opened. Their numbers only rise (RFC 9113, section 5.1.1).
    last_opened: u32,
    /// The server has promised not to process any stream above.
    last_processed: u32,
    client_gone: bool,
    is_opaque: bool,
    account: Account,
}

/// What one side sends.
#[derive(Debug)]
struct Direction<T> {
    frames: Frames,
    blocks: Decoder<T>,
    /// Limits of this direction's table in SETTINGS of the other side that this side has not acknowledged.
    limits: VecDeque<Option<u32>>,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            client: Direction::new(Sender::Client),
            server: Direction::new(Sender::Server),
            streams: Streams::default(),
            last_opened: 0,
            last_processed: LAST_STREAM,
            client_gone: false,
            is_opaque: false,
            account: Account::default(),
        }
    }
}

// === impl Http2 ===

impl Http2 {
    /// An observer of a connection on which nothing was sent.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no message has begun that is not complete.
    pub fn is_quiet(&self) -> bool {
        let between = self.client.frames.is_between() && self.server.frames.is_between();
        between && self.streams.is_empty() && !self.is_opaque
    }

    /// Whether the connection is not followed any more.
    pub fn is_opaque(&self) -> bool {
        self.is_opaque
    }

    /// Requests whose answers are not complete.
    pub fn pending(&self) -> usize {
        self.streams.pending()
    }

    /// Bytes of memory that the observer holds beside its own.
    pub fn footprint(&self) -> usize {
        let tables = self.client.blocks.table().footprint() + self.server.blocks.table().footprint();
        let pieces = self.client.footprint() + self.server.footprint();
        tables + pieces + self.streams.footprint()
    }

    /// Bytes of the client that were passed on.
    pub fn on_request(&mut self, mut bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        while !self.is_opaque {
            let noted = match self.client.frames.next(&mut bytes, now_ns) {
                Ok(None) => return self.account_for(sink),
                Ok(Some(event)) => self.on_client(event, now_ns, sink),
                Err(why) => Err(why),
            };
            if let Err(why) = noted {
                self.lose(why, sink);
            }
        }
    }

    /// Bytes of the application that were passed on.
    pub fn on_response(&mut self, mut bytes: &[u8], now_ns: u64, sink: &mut impl Sink) {
        while !self.is_opaque {
            let noted = match self.server.frames.next(&mut bytes, now_ns) {
                Ok(None) => return self.account_for(sink),
                Ok(Some(event)) => self.on_server(event, now_ns, sink),
                Err(why) => Err(why),
            };
            if let Err(why) = noted {
                self.lose(why, sink);
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
        for mut stream in self.streams.take_all() {
            stream.end(outcome, now_ns, sink);
        }
        self.stop();
    }

    fn on_client(&mut self, event: Event<'_>, now_ns: u64, sink: &mut impl Sink) -> Result<(), Opaque> {
        match event {
            Event::Data(data) => self.on_request_data(data, sink),
            Event::Block(block) => {
                let noted = self.on_request_block(&block, sink);
                self.client.frames.recycle(block.bytes);
                noted
            }
            Event::Settings(settings) => self.server.limit(settings),
            Event::Acknowledged => {
                self.client.acknowledge();
                Ok(())
            }
            Event::Reset(id) if is_pushed(id) => Ok(()),
            Event::Reset(id) if id > self.last_opened => Err(Opaque::Http2Framing),
            Event::Reset(id) => {
                self.on_reset(id, |stream| stream.given_up(now_ns), now_ns, sink);
                Ok(())
            }
            Event::GoAway(_) => Ok(()),
        }
    }

    fn on_server(&mut self, event: Event<'_>, now_ns: u64, sink: &mut impl Sink) -> Result<(), Opaque> {
        match event {
            Event::Data(data) => self.on_response_data(data, now_ns, sink),
            Event::Block(block) => {
                let noted = self.on_response_block(&block, now_ns, sink);
                self.server.frames.recycle(block.bytes);
                noted
            }
            Event::Settings(settings) => {
                if settings.takes_binary {
                    self.client.blocks.table_mut().allow_binary();
                }
                self.client.limit(settings)
            }
            Event::Acknowledged => {
                self.server.acknowledge();
                Ok(())
            }
            Event::Reset(id) if is_pushed(id) => Ok(()),
            Event::Reset(id) if id > self.last_opened => Err(Opaque::Unsolicited),
            Event::Reset(id) => {
                self.on_reset(id, |_| Outcome::UpstreamReset, now_ns, sink);
                Ok(())
            }
            Event::GoAway(last) => {
                self.on_go_away(last, sink);
                Ok(())
            }
        }
    }

    fn on_request_block(&mut self, block: &Block<'_>, sink: &mut impl Sink) -> Result<(), Opaque> {
        if is_pushed(block.stream) {
            return Err(Opaque::Http2Framing);
        }
        let mut head = HEAD.take().unwrap_or_default();
        head.clear();
        let read = self.client.blocks.decode(&block.bytes, &mut head);
        let noted = read.and_then(|()| self.on_request_head(block, &head, sink));
        HEAD.set(Some(head));
        noted
    }

    fn on_request_head(
        &mut self,
        block: &Block<'_>,
        head: &RequestHead,
        sink: &mut impl Sink,
    ) -> Result<(), Opaque> {
        if block.stream > self.last_opened {
            self.open(block, head, sink);
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(block.stream) else {
            // Trailers of a stream that was reset may still be on the way; a request would go back.
            if head.has_pseudo() {
                return Err(Opaque::Http2Framing);
            }
            return Ok(());
        };
        let may_end = block.is_last && !stream.has_request_ended && stream.has_body();
        if head.is_cut() {
            stream.forget(sink);
        } else if !may_end || !head.is_trailers() {
            stream.spoil(sink);
        }
        if block.is_last {
            self.request_ended(block.stream);
        }
        Ok(())
    }

    /// The client opens a stream.
    fn open(&mut self, block: &Block<'_>, head: &RequestHead, sink: &mut impl Sink) {
        self.last_opened = block.stream;
        if block.stream > self.last_processed {
            return;
        }
        if self.streams.len() >= MAX_STREAMS {
            sink.passed_over();
            return;
        }
        let mut stream = Stream::new(block.stream, block.started_ns);
        stream.has_request_ended = block.is_last;
        if head.is_cut() {
            sink.passed_over();
        } else if head.is_request(block.is_last) {
            stream.kind = head.kind();
            stream.body_left = head.content_length().unwrap_or(NOT_SAID);
            stream.timeout_ns = head.timeout_ns().unwrap_or(NOT_SAID);
            stream.tenant = Some(sink.begin(head));
        } else {
            sink.malformed(None);
        }
        self.streams.insert(stream);
    }

    fn on_request_data(&mut self, data: Data, sink: &mut impl Sink) -> Result<(), Opaque> {
        if is_pushed(data.stream) || data.stream > self.last_opened {
            return Err(Opaque::Http2Framing);
        }
        let Some(stream) = self.streams.get_mut(data.stream) else {
            return Ok(());
        };
        let fits = !stream.has_request_ended && stream.take_body(u64::from(data.length));
        if !fits || (data.is_last && !stream.has_body()) {
            stream.spoil(sink);
        }
        if data.is_last {
            self.request_ended(data.stream);
        }
        Ok(())
    }

    fn request_ended(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.has_request_ended = true;
            if stream.has_answer_ended {
                self.streams.remove(id);
            }
        }
    }

    fn on_response_block(
        &mut self,
        block: &Block<'_>,
        now_ns: u64,
        sink: &mut impl Sink,
    ) -> Result<(), Opaque> {
        let mut answer = Answer::default();
        self.server.blocks.decode(&block.bytes, &mut answer)?;
        if block.is_push || is_pushed(block.stream) {
            return Ok(());
        }
        if block.stream > self.last_opened {
            return Err(Opaque::Unsolicited);
        }
        let Some(stream) = self.streams.get_mut(block.stream) else {
            return Ok(());
        };
        if !stream.is_answering() {
            if answer.is_interim() && !block.is_last {
                return Ok(());
            }
            stream.answer(&answer, block.is_last, block.started_ns);
            if stream.is_tunnel() {
                stream.end(stream.outcome(None), now_ns, sink);
            }
        }
        if block.is_last {
            self.answer_ended(block.stream, answer.grpc_status, now_ns, sink);
        }
        Ok(())
    }

    fn on_response_data(&mut self, data: Data, now_ns: u64, sink: &mut impl Sink) -> Result<(), Opaque> {
        if is_pushed(data.stream) {
            return Ok(());
        }
        if data.stream > self.last_opened {
            return Err(Opaque::Unsolicited);
        }
        if data.is_last {
            self.answer_ended(data.stream, None, now_ns, sink);
        }
        Ok(())
    }

    fn answer_ended(&mut self, id: u32, grpc_status: Option<u32>, now_ns: u64, sink: &mut impl Sink) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.end(stream.outcome(grpc_status), now_ns, sink);
            stream.has_answer_ended = true;
            if stream.has_request_ended {
                self.streams.remove(id);
            }
        }
    }

    fn on_reset(&mut self, id: u32, how: impl Fn(&Stream) -> Outcome, now_ns: u64, sink: &mut impl Sink) {
        if let Some(mut stream) = self.streams.remove(id) {
            stream.end(how(&stream), now_ns, sink);
        }
    }

    fn on_go_away(&mut self, last: u32, sink: &mut impl Sink) {
        if last >= self.last_processed {
            return;
        }
        self.last_processed = last;
        if last >= self.last_opened {
            return;
        }
        for mut stream in self.streams.take_all() {
            if stream.id > last {
                stream.forget(sink);
            } else {
                self.streams.insert(stream);
            }
        }
    }

    /// Gives up where all connections together hold too much.
    fn account_for(&mut self, sink: &mut impl Sink) {
        if !self.account.note(self.footprint()) {
            self.lose(Opaque::Memory, sink);
        }
    }

    fn lose(&mut self, why: Opaque, sink: &mut impl Sink) {
        for mut stream in self.streams.take_all() {
            stream.forget(sink);
        }
        self.stop();
        sink.opaque(why);
    }

    /// Follows nothing any more and gives the memory back.
    fn stop(&mut self) {
        *self = Self {
            client_gone: self.client_gone,
            is_opaque: true,
            ..Self::default()
        };
    }
}

// === impl Direction ===

impl<T: Table + Default> Direction<T> {
    fn new(sender: Sender) -> Self {
        Self {
            frames: Frames::new(sender),
            blocks: Decoder::default(),
            limits: VecDeque::new(),
        }
    }

    /// The other side says what it accepts. Longer frames may come once this side knows; a table that is
    /// larger or smaller holds from the acknowledgement on (RFC 9113, section 6.5.3).
    fn limit(&mut self, settings: Settings) -> Result<(), Opaque> {
        if let Some(frame_bytes) = settings.frame_bytes {
            self.frames.allow(frame_bytes);
        }
        if self.limits.len() >= MAX_UNACKNOWLEDGED {
            return Err(Opaque::Http2Framing);
        }
        self.limits.push_back(settings.table_size);
        Ok(())
    }

    /// This side acknowledges the oldest SETTINGS of the other.
    fn acknowledge(&mut self) {
        if let Some(Some(limit)) = self.limits.pop_front() {
            self.blocks
                .set_limit(usize::try_from(limit).unwrap_or(usize::MAX));
        }
    }

    /// Bytes of memory beside the table.
    fn footprint(&self) -> usize {
        let limits = self.limits.capacity().saturating_mul(size_of::<Option<u32>>());
        self.frames.footprint().saturating_add(limits)
    }
}

/// Streams with even numbers are the server's, opened by what it pushes (RFC 9113, section 5.1.1).
fn is_pushed(id: u32) -> bool {
    id.is_multiple_of(2)
}

#[cfg(test)]
mod tests;
