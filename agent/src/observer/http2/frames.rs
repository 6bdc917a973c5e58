//! Follows the frames of one direction (RFC 9113, section 4) through pieces of any size.
//!
//! Bodies are passed over by their length. Of other frames only what matters is looked at, where it stands
//! if it came whole; header blocks that are spread over frames are put together.

use std::{borrow::Cow, ops::Range};

use super::super::{MAX_HEAD_BYTES, Opaque, protocol::PREFACE};

const HEADER_BYTES: usize = 9;

/// The longest frame that a peer accepts which has not said otherwise (RFC 9113, section 6.5.2).
const DEFAULT_FRAME_BYTES: u32 = 16 * 1024;
const LARGEST_FRAME_BYTES: u32 = (1 << 24) - 1;

/// gRPC's own setting (grpc/proposal/G1-true-binary-metadata.md).
const TRUE_BINARY_METADATA: u16 = 0xfe03;

/// A buffer of at most this size is kept for the next frame that comes in pieces.
const KEPT_BYTES: usize = 256;

// Types of frames (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

// Flags of frames; what a bit means depends on the type.
const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const HAS_PRIORITY: u8 = 0x20;

/// Who sends the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    Client,
    Server,
}

/// What happened in a direction.
#[derive(Debug)]
pub(super) enum Event<'b> {
    /// The last byte of a frame of a body came.
    Data(Data),
    /// A header block is complete.
    Block(Block<'b>),
    Settings(Settings),
    /// The other side's oldest SETTINGS that were not acknowledged now are.
    Acknowledged,
    /// The stream with this number is reset.
    Reset(u32),
    /// No stream above this number will be processed.
    GoAway(u32),
}

/// One frame of a body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub(super) stream: u32,
    /// Without padding.
    pub(super) length: u32,
    pub(super) is_last: bool,
}

/// A header block.
#[derive(Debug)]
pub(super) struct Block<'b> {
    pub(super) stream: u32,
    /// The stream has no more frames from this side.
    pub(super) is_last: bool,
    /// It announces a request that the server made up.
    pub(super) is_push: bool,
    /// When its first frame's first byte came.
    pub(super) started_ns: u64,
    pub(super) bytes: Cow<'b, [u8]>,
}

/// What matters of a SETTINGS frame.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Settings {
    /// The largest dynamic table that the other side may use.
    pub(super) table_size: Option<u32>,
    /// The longest frame that the other side may send.
    pub(super) frame_bytes: Option<u32>,
    /// The other side may send values of binary fields as they are.
    pub(super) takes_binary: bool,
}

/// The frames of one direction.
#[derive(Debug)]
pub(super) struct Frames {
    sender: Sender,
    at: At,
    /// The header of a frame, as far as it came.
    header: [u8; HEADER_BYTES],
    header_count: usize,
    /// What is wanted of a frame, as far as it came.
    held: Vec<u8>,
    /// When the first byte of the frame came.
    started_ns: u64,
    /// The beginning of a header block that goes on in the next frame.
    unfinished: Option<Block<'static>>,
    longest: u32,
    has_begun: bool,
}

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy)]
enum At {
    /// The client's preface, of which so many bytes came.
    Preface(usize),
    Header,
    /// What is wanted of the frame.
    Wanted(Frame),
    /// What is not.
    Rest {
        left: u32,
        data: Option<Data>,
    },
}

/// The header of a frame.
#[derive(Debug, Clone, Copy)]
struct Frame {
    length: u32,
    kind: u8,
    flags: u8,
    stream: u32,
}

// === impl Frames ===

impl Frames {
    pub(super) fn new(sender: Sender) -> Self {
        Self {
            sender,
            at: match sender {
                Sender::Client => At::Preface(0),
                Sender::Server => At::Header,
            },
            header: [0; HEADER_BYTES],
            header_count: 0,
            held: Vec::new(),
            started_ns: 0,
            unfinished: None,
            longest: DEFAULT_FRAME_BYTES,
            has_begun: false,
        }
    }

    /// Whether no frame and no header block has begun that is not complete.
    pub(super) fn is_between(&self) -> bool {
        let between = match self.at {
            At::Preface(seen) => seen == 0,
            At::Header => self.header_count == 0,
            At::Wanted(_) | At::Rest { .. } => false,
        };
        between && self.unfinished.is_none()
    }

    /// The other side accepts frames of this length. What it once accepted may still be on the way.
    pub(super) fn allow(&mut self, frame_bytes: u32) {
        self.longest = self.longest.max(frame_bytes);
    }

    /// Takes bytes up to the next event; none if there is none in what came.
    pub(super) fn next<'b>(
        &mut self,
        bytes: &mut &'b [u8],
        now_ns: u64,
    ) -> Result<Option<Event<'b>>, Opaque> {
        loop {
            match self.at {
                At::Preface(seen) => {
                    if !self.preface(seen, bytes)? {
                        return Ok(None);
                    }
                }
                At::Header => {
                    let Some(frame) = self.header(bytes, now_ns) else {
                        return Ok(None);
                    };
                    self.check(frame)?;
                    self.at = At::Wanted(frame);
                }
                At::Wanted(frame) => {
                    let wanted = frame.wanted();
                    let Some(payload) = self.wanted(wanted, bytes) else {
                        return Ok(None);
                    };
                    let left = frame.length.saturating_sub(length_of(&payload));
                    self.at = At::Rest { left, data: None };
                    if frame.kind == DATA {
                        let data = Some(frame.data(&payload)?);
                        self.at = At::Rest { left, data };
                    } else if let Some(event) = self.event(frame, payload)? {
                        return Ok(Some(event));
                    }
                }
                At::Rest { left, data } => {
                    let taken = left.min(length_of(bytes));
                    *bytes = after(bytes, taken);
                    if taken < left {
                        let left = left.saturating_sub(taken);
                        self.at = At::Rest { left, data };
                        return Ok(None);
                    }
                    self.at = At::Header;
                    if let Some(data) = data {
                        return Ok(Some(Event::Data(data)));
                    }
                }
            }
        }
    }

    /// Takes a buffer back that came with an event.
    pub(super) fn recycle(&mut self, bytes: Cow<'_, [u8]>) {
        if let Cow::Owned(mut bytes) = bytes
            && bytes.capacity() <= KEPT_BYTES
        {
            bytes.clear();
            self.held = bytes;
        }
    }

    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        let unfinished = match &self.unfinished {
            Some(Block {
                bytes: Cow::Owned(bytes),
                ..
            }) => bytes.capacity(),
            _ => 0,
        };
        self.held.capacity().saturating_add(unfinished)
    }

    /// Takes bytes of the preface; true once it is complete.
    fn preface(&mut self, seen: usize, bytes: &mut &[u8]) -> Result<bool, Opaque> {
        let expected = PREFACE.get(seen..).unwrap_or_default();
        let (taken, rest) = bytes.split_at(expected.len().min(bytes.len()));
        if !expected.starts_with(taken) {
            return Err(Opaque::Http2Framing);
        }
        *bytes = rest;
        let is_complete = taken.len() == expected.len();
        self.at = if is_complete {
            At::Header
        } else {
            At::Preface(seen.saturating_add(taken.len()))
        };
        Ok(is_complete)
    }

    /// Takes the bytes of a frame's header; none if they are not all there yet.
    fn header(&mut self, bytes: &mut &[u8], now_ns: u64) -> Option<Frame> {
        if self.header_count == 0 {
            self.started_ns = now_ns;
            if let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
                *bytes = rest;
                return Some(Frame::read(*header));
            }
        }
        let room = self.header.get_mut(self.header_count..).unwrap_or_default();
        let (taken, rest) = bytes.split_at(room.len().min(bytes.len()));
        for (to, from) in room.iter_mut().zip(taken) {
            *to = *from;
        }
        *bytes = rest;
        self.header_count = self.header_count.saturating_add(taken.len());
        if self.header_count < HEADER_BYTES {
            return None;
        }
        self.header_count = 0;
        Some(Frame::read(self.header))
    }

    /// Takes so many bytes; none if they are not all there yet.
    fn wanted<'b>(&mut self, wanted: usize, bytes: &mut &'b [u8]) -> Option<Cow<'b, [u8]>> {
        if self.held.is_empty()
            && let Some((payload, rest)) = bytes.split_at_checked(wanted)
        {
            *bytes = rest;
            return Some(Cow::Borrowed(payload));
        }
        let missing = wanted.saturating_sub(self.held.len());
        let (taken, rest) = bytes.split_at(missing.min(bytes.len()));
        self.held.extend_from_slice(taken);
        *bytes = rest;
        (taken.len() == missing).then(|| Cow::Owned(std::mem::take(&mut self.held)))
    }

    /// What a frame other than DATA says, if that matters.
    fn event<'b>(&mut self, frame: Frame, payload: Cow<'b, [u8]>) -> Result<Option<Event<'b>>, Opaque> {
        let event = match frame.kind {
            HEADERS | PUSH_PROMISE => return self.begin_block(frame, payload),
            CONTINUATION => return self.continue_block(frame, payload),
            SETTINGS if frame.has(ACK) => Event::Acknowledged,
            SETTINGS => Event::Settings(Settings::read(&payload)?),
            RST_STREAM => Event::Reset(frame.stream),
            GOAWAY => Event::GoAway(stream_of(&payload)),
            _ => return Ok(None),
        };
        self.recycle(payload);
        Ok(Some(event))
    }

    fn begin_block<'b>(&mut self, frame: Frame, payload: Cow<'b, [u8]>) -> Result<Option<Event<'b>>, Opaque> {
        let fragment = frame.fragment(&payload)?;
        let bytes = narrowed(payload, fragment);
        if frame.has(END_HEADERS) {
            return Ok(Some(Event::Block(self.block(frame, bytes))));
        }
        self.unfinished = Some(self.block(frame, Cow::Owned(bytes.into_owned())));
        Ok(None)
    }

    fn block<'b>(&self, frame: Frame, bytes: Cow<'b, [u8]>) -> Block<'b> {
        let is_push = frame.kind == PUSH_PROMISE;
        Block {
            stream: frame.stream,
            is_last: !is_push && frame.has(END_STREAM),
            is_push,
            started_ns: self.started_ns,
            bytes,
        }
    }

    fn continue_block<'b>(
        &mut self,
        frame: Frame,
        payload: Cow<'b, [u8]>,
    ) -> Result<Option<Event<'b>>, Opaque> {
        let Some(mut block) = self.unfinished.take() else {
            return Err(Opaque::Http2Framing);
        };
        if block.bytes.len().saturating_add(payload.len()) > MAX_HEAD_BYTES {
            return Err(Opaque::HeadTooLong);
        }
        block.bytes.to_mut().extend_from_slice(&payload);
        self.recycle(payload);
        if frame.has(END_HEADERS) {
            return Ok(Some(Event::Block(block)));
        }
        self.unfinished = Some(block);
        Ok(None)
    }

    /// Refuses frames after which nobody knows how a correct peer reads on.
    fn check(&mut self, frame: Frame) -> Result<(), Opaque> {
        if !self.has_begun {
            self.has_begun = true;
            if frame.kind != SETTINGS || frame.has(ACK) {
                return Err(match self.sender {
                    Sender::Client => Opaque::Http2Framing,
                    // Most likely an answer of HTTP/1 that says so.
                    Sender::Server => Opaque::BadResponse,
                });
            }
        }
        let follows = match &self.unfinished {
            Some(block) => frame.kind == CONTINUATION && frame.stream == block.stream,
            None => frame.kind != CONTINUATION,
        };
        if !follows || frame.length > self.longest || !frame.is_sound(self.sender) {
            return Err(Opaque::Http2Framing);
        }
        let is_block = matches!(frame.kind, HEADERS | PUSH_PROMISE | CONTINUATION);
        if is_block && frame.wanted() > MAX_HEAD_BYTES {
            return Err(Opaque::HeadTooLong);
        }
        Ok(())
    }
}

// === impl Frame ===

impl Frame {
    fn read(header: [u8; HEADER_BYTES]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = header;
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]),
            kind,
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]),
        }
    }

    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// How many bytes of the payload must be seen.
    fn wanted(self) -> usize {
        let wanted = match self.kind {
            DATA if self.has(PADDED) => 1,
            HEADERS | PUSH_PROMISE | CONTINUATION | SETTINGS => self.length,
            RST_STREAM | GOAWAY => 4,
            _ => 0,
        };
        usize::try_from(wanted).unwrap_or(usize::MAX)
    }

    /// Whether length and stream are possible for the type (RFC 9113, section 6).
    fn is_sound(self, sender: Sender) -> bool {
        let of_stream = self.stream != 0;
        match self.kind {
            DATA => of_stream && (self.length > 0 || !self.has(PADDED)),
            HEADERS | CONTINUATION => of_stream,
            PRIORITY => of_stream && self.length == 5,
            RST_STREAM => of_stream && self.length == 4,
            SETTINGS if self.has(ACK) => !of_stream && self.length == 0,
            SETTINGS => !of_stream && self.length.is_multiple_of(6) && self.wanted() <= MAX_HEAD_BYTES,
            PUSH_PROMISE => of_stream && sender == Sender::Server,
            PING => !of_stream && self.length == 8,
            GOAWAY => !of_stream && self.length >= 8,
            WINDOW_UPDATE => self.length == 4,
            // Others are ignored by all (RFC 9113, section 5.5).
            _ => true,
        }
    }

    fn data(self, payload: &[u8]) -> Result<Data, Opaque> {
        let padding = payload.first().map_or(0, |padding| u32::from(*padding) + 1);
        let length = self.length.checked_sub(padding).ok_or(Opaque::Http2Framing)?;
        Ok(Data {
            stream: self.stream,
            length,
            is_last: self.has(END_STREAM),
        })
    }

    /// Where the part of the header block stands in the payload.
    fn fragment(self, payload: &[u8]) -> Result<Range<usize>, Opaque> {
        let (mut start, mut end) = (0_usize, payload.len());
        if self.has(PADDED) {
            let padding = payload.first().ok_or(Opaque::Http2Framing)?;
            start = 1;
            end = end
                .checked_sub(usize::from(*padding))
                .ok_or(Opaque::Http2Framing)?;
        }
        start += match self.kind {
            HEADERS if self.has(HAS_PRIORITY) => 5,
            // The number of the stream that is promised.
            PUSH_PROMISE => 4,
            _ => 0,
        };
        if start > end {
            return Err(Opaque::Http2Framing);
        }
        Ok(start..end)
    }
}

// === impl Settings ===

impl Settings {
    /// Of a setting that is given several times the last one holds (RFC 9113, section 6.5.3).
    fn read(payload: &[u8]) -> Result<Self, Opaque> {
        let mut settings = Self::default();
        let (all, _) = payload.as_chunks::<6>();
        for [i0, i1, v0, v1, v2, v3] in all {
            let value = u32::from_be_bytes([*v0, *v1, *v2, *v3]);
            match u16::from_be_bytes([*i0, *i1]) {
                1 => settings.table_size = Some(value),
                5 if (DEFAULT_FRAME_BYTES..=LARGEST_FRAME_BYTES).contains(&value) => {
                    settings.frame_bytes = Some(value);
                }
                5 => return Err(Opaque::Http2Framing),
                TRUE_BINARY_METADATA => settings.takes_binary = value == 1,
                _ => {}
            }
        }
        Ok(settings)
    }
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// What comes after so many bytes.
fn after(bytes: &[u8], count: u32) -> &[u8] {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    bytes.get(count..).unwrap_or_default()
}

fn stream_of(payload: &[u8]) -> u32 {
    match payload {
        [s0, s1, s2, s3, ..] => u32::from_be_bytes([s0 & 0x7f, *s1, *s2, *s3]),
        _ => 0,
    }
}

/// A part of the bytes.
fn narrowed(bytes: Cow<'_, [u8]>, part: Range<usize>) -> Cow<'_, [u8]> {
    match bytes {
        Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(part).unwrap_or_default()),
        Cow::Owned(mut bytes) => {
            bytes.truncate(part.end);
            bytes.drain(..part.start.min(bytes.len()));
            Cow::Owned(bytes)
        }
    }
}
