//! The heads of answers: the status, and whether the answer is a stream of events.
//!
//! The dynamic table of the answers' direction keeps what an entry would say about an answer, and its size;
//! names and values are not kept, and values that say nothing are measured, not decoded.

use super::{
    super::{
        Opaque,
        head::{is_event_stream, number_of},
    },
    hpack::{Literal, Name as Reference, Start, Table},
    table::{Dynamic, ENTRY_OVERHEAD, Entry, statics},
};

/// gRPC's UNKNOWN (grpc/doc/statuscodes.md): what a caller takes a missing or unreadable status for.
pub(super) const GRPC_UNKNOWN: u32 = 2;

/// What one header block of an answer says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// None if it is missing or no status.
    pub(super) status: Option<u16>,
    pub(super) grpc_status: Option<u32>,
    pub(super) is_event_stream: bool,
}

/// The names that matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Status,
    GrpcStatus,
    ContentType,
    Other,
}

/// What a field says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    Status(u16),
    GrpcStatus(u32),
    EventStream,
}

/// The dynamic table of the answers' direction.
#[derive(Debug, Default)]
pub(super) struct ResponseTable {
    dynamic: Dynamic<Stored>,
}

#[derive(Debug)]
struct Stored {
    name: Name,
    name_length: u32,
    size: u32,
    said: Said,
}

// === impl Answer ===

impl Answer {
    /// Whether another head will follow, the one that counts.
    pub(super) fn is_interim(&self) -> bool {
        matches!(self.status, Some(100..200))
    }

    fn note(&mut self, said: Said) {
        match said {
            Said::Nothing => {}
            Said::Status(status) => self.status = self.status.or(Some(status)),
            Said::GrpcStatus(code) => self.grpc_status = self.grpc_status.or(Some(code)),
            Said::EventStream => self.is_event_stream = true,
        }
    }
}

// === impl Name ===

impl Name {
    fn of(name: &Start) -> Self {
        match name.whole() {
            Some(b":status") => Self::Status,
            Some(b"grpc-status") => Self::GrpcStatus,
            Some(b"content-type") => Self::ContentType,
            _ => Self::Other,
        }
    }

    /// The same for an index of the static table.
    fn of_static(index: usize) -> Self {
        match index {
            8..=14 => Self::Status,
            31 => Self::ContentType,
            _ => Self::Other,
        }
    }

    /// What a field of this name says.
    fn read(self, value: &Start) -> Said {
        match self {
            Self::Status => value
                .whole()
                .and_then(status_of)
                .map_or(Said::Nothing, Said::Status),
            Self::GrpcStatus => {
                let code = value.whole().and_then(number_of);
                Said::GrpcStatus(code.unwrap_or(GRPC_UNKNOWN))
            }
            Self::ContentType if is_event_stream(value.bytes()) => Said::EventStream,
            Self::ContentType | Self::Other => Said::Nothing,
        }
    }
}

// === impl ResponseTable ===

impl Table for ResponseTable {
    type List = Answer;

    fn indexed(&mut self, index: usize, answer: &mut Answer) -> Result<(), Opaque> {
        let said = match statics(index) {
            Some((_, value)) if Name::of_static(index) == Name::Status => {
                status_of(value.as_bytes()).map_or(Said::Nothing, Said::Status)
            }
            Some(_) => Said::Nothing,
            None => self.dynamic.get(index).ok_or(Opaque::Hpack)?.said,
        };
        answer.note(said);
        Ok(())
    }

    fn literal(&mut self, literal: &Literal<'_>, answer: &mut Answer) -> Result<(), Opaque> {
        let (name, name_length) = match literal.name {
            Reference::Index(index) => self.name_of(index)?,
            Reference::Text(text) => {
                let start = text.start()?;
                (Name::of(&start), start.length())
            }
        };
        let (value_length, said) = match name {
            Name::Other if !literal.is_kept => return Ok(()),
            Name::Other => (literal.value.length()?, Said::Nothing),
            _ => {
                let start = literal.value.start()?;
                (start.length(), name.read(&start))
            }
        };
        answer.note(said);
        if literal.is_kept {
            self.store(name, name_length, value_length, said);
        }
        Ok(())
    }

    fn max_size(&self) -> usize {
        self.dynamic.max_size()
    }

    fn resize(&mut self, max_size: usize) {
        self.dynamic.resize(max_size);
    }
}

impl ResponseTable {
    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        self.dynamic.footprint()
    }

    /// The name of an entry, and its length.
    fn name_of(&self, index: usize) -> Result<(Name, usize), Opaque> {
        if let Some((name, _)) = statics(index) {
            return Ok((Name::of_static(index), name.len()));
        }
        let stored = self.dynamic.get(index).ok_or(Opaque::Hpack)?;
        let length = usize::try_from(stored.name_length).unwrap_or(usize::MAX);
        Ok((stored.name, length))
    }

    fn store(&mut self, name: Name, name_length: usize, value_length: usize, said: Said) {
        let text = name_length.saturating_add(value_length);
        let size = text.saturating_add(ENTRY_OVERHEAD);
        if self.dynamic.make_room(size) {
            self.dynamic.push(Stored {
                name,
                name_length: u32::try_from(name_length).unwrap_or(u32::MAX),
                size: u32::try_from(size).unwrap_or(u32::MAX),
                said,
            });
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
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }
}

// === fields ===

/// Three digits, the first of them not 0.
fn status_of(value: &[u8]) -> Option<u16> {
    match value {
        [b'1'..=b'9', b'0'..=b'9', b'0'..=b'9'] => std::str::from_utf8(value).ok()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_three_digits() {
        assert_eq!(status_of(b"200"), Some(200));
        assert_eq!(status_of(b"999"), Some(999));
        for bad in [&b""[..], b"20", b"2000", b"099", b"2x0", b"+20"] {
            assert_eq!(status_of(bad), None, "{bad:?}");
        }
        assert_eq!(
            (number_of::<u32>(b"14"), number_of::<u32>(b"007")),
            (Some(14), Some(7))
        );
        for bad in [&b""[..], b"+1", b"x", b"99999999999"] {
            assert_eq!(number_of::<u32>(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn event_streams() {
        assert!(is_event_stream(b"text/event-stream"));
        assert!(is_event_stream(b"Text/Event-Stream; charset=utf-8"));
        assert!(!is_event_stream(b"text/event-streams"));
        assert!(!is_event_stream(b"text/plain"));
    }
}
