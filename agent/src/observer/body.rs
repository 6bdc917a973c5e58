//! Follows a message's body to its end.

use super::{MAX_HEAD_BYTES, Opaque};

/// What is left of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// This many bytes.
    Length(u64),
    /// Chunks.
    Chunked(Chunked),
    /// All bytes until the connection is closed.
    UntilClose,
}

/// Where in a chunked body the next byte stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Chunked {
    at: At,
    /// The size of the chunk so far, then what is left of it.
    size: u64,
    /// Digits of the size, then bytes of extensions or trailers.
    length: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum At {
    #[default]
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
}

/// The result of looking at some bytes of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All bytes belong to the body, and more will follow.
    More,
    /// The body ended after this many bytes.
    Ended(usize),
}

impl Body {
    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::Length(0)
    }

    /// How many of the next bytes surely belong to the body, and are not looked at.
    pub(super) fn left(&self) -> u64 {
        match self {
            Self::Length(left) => *left,
            Self::Chunked(chunked) if chunked.at == At::Data => chunked.size,
            Self::Chunked(_) => 0,
            Self::UntilClose => u64::MAX,
        }
    }

    /// This many bytes, at most [`left`](Self::left), have gone by; true if the body ended with them.
    pub(super) fn skip(&mut self, count: u64) -> bool {
        match self {
            Self::Length(left) => {
                *left = left.saturating_sub(count);
                *left == 0
            }
            Self::Chunked(chunked) => {
                chunked.size = chunked.size.saturating_sub(count);
                if chunked.size == 0 {
                    chunked.at = At::DataCr;
                }
                false
            }
            Self::UntilClose => false,
        }
    }

    /// Looks at the next bytes of the connection.
    pub(super) fn advance(&mut self, bytes: &[u8]) -> Result<Progress, Opaque> {
        match self {
            Self::UntilClose => Ok(Progress::More),
            Self::Length(left) => {
                let here = bytes.len() as u64;
                if here < *left {
                    *left -= here;
                    return Ok(Progress::More);
                }
                let end = usize::try_from(*left).unwrap_or(bytes.len());
                *left = 0;
                Ok(Progress::Ended(end))
            }
            Self::Chunked(chunked) => chunked.advance(bytes),
        }
    }
}

impl Chunked {
    fn advance(&mut self, bytes: &[u8]) -> Result<Progress, Opaque> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.at == At::Data {
                let here = (bytes.len() - at) as u64;
                let taken = self.size.min(here);
                self.size -= taken;
                at = at.saturating_add(usize::try_from(taken).unwrap_or(usize::MAX));
                if self.size == 0 {
                    self.at = At::DataCr;
                }
                continue;
            }
            at += 1;
            if self.step(byte)? {
                return Ok(Progress::Ended(at));
            }
        }
        Ok(Progress::More)
    }

    /// Takes one byte that is not data; true if it is the last of the body.
    fn step(&mut self, byte: u8) -> Result<bool, Opaque> {
        self.at = match (self.at, byte) {
            (At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.digit(byte)?;
                At::Size
            }
            (At::Size, b';' | b' ' | b'\t') if self.length > 0 => At::Extension,
            (At::Size, b'\r') if self.length > 0 => At::SizeLf,
            (At::Extension, b'\r') => At::SizeLf,
            (At::Extension, byte) if byte != b'\n' => {
                self.lengthen()?;
                At::Extension
            }
            (At::SizeLf, b'\n') => {
                self.length = 0;
                if self.size == 0 {
                    At::TrailerStart
                } else {
                    At::Data
                }
            }
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size,
            (At::TrailerStart, b'\r') => At::EndLf,
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::TrailerStart | At::Trailer, byte) if byte != b'\n' => {
                self.lengthen()?;
                At::Trailer
            }
            (At::TrailerLf, b'\n') => At::TrailerStart,
            (At::EndLf, b'\n') => return Ok(true),
            _ => return Err(Opaque::BadChunk),
        };
        Ok(false)
    }

    fn digit(&mut self, byte: u8) -> Result<(), Opaque> {
        let value = char::from(byte).to_digit(16).ok_or(Opaque::BadChunk)?;
        let size = self.size.checked_mul(16).ok_or(Opaque::BadChunk)?;
        self.size = size | u64::from(value);
        self.lengthen()
    }

    fn lengthen(&mut self) -> Result<(), Opaque> {
        self.length += 1;
        if self.length > MAX_HEAD_BYTES {
            return Err(Opaque::BadChunk);
        }
        Ok(())
    }
}
