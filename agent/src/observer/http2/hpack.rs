//! Reads header blocks (RFC 7541) and keeps the rules of the tables that they refer to.
//!
//! What is kept of a field differs between requests and answers, so that is for a [`Table`] to decide.
//! All blocks of a direction must be read, whosever they are: each changes the table for those after it.

use super::{super::Opaque, huffman, table::statics};

/// The largest dynamic table that is followed; a peer that uses more makes the connection opaque.
pub(super) const MAX_TABLE_SIZE: usize = 64 * 1024;

/// How many bytes of a string are looked at where the whole does not matter.
const START_BYTES: usize = 32;

/// A dynamic table, and what is noted of fields.
pub(super) trait Table {
    /// Where the fields of a block are noted.
    type List;
    /// A field that the tables have.
    fn indexed(&mut self, index: usize, list: &mut Self::List) -> Result<(), Opaque>;
    /// A field that is spelled out.
    fn literal(&mut self, literal: &Literal<'_>, list: &mut Self::List) -> Result<(), Opaque>;
    /// The size that the table may have.
    fn max_size(&self) -> usize;
    /// Changes the size that the table may have.
    fn resize(&mut self, max_size: usize);
}

/// A field that is spelled out, at least its value.
#[derive(Debug)]
pub(super) struct Literal<'b> {
    pub(super) name: Name<'b>,
    pub(super) value: Text<'b>,
    /// Whether the table gets it.
    pub(super) is_kept: bool,
}

/// The name of a field.
#[derive(Debug)]
pub(super) enum Name<'b> {
    /// That of an entry of the tables.
    Index(usize),
    Text(Text<'b>),
}

/// A string as the block has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text<'b> {
    bytes: &'b [u8],
    is_huffman: bool,
}

/// The first bytes of a string, and how long it is.
#[derive(Debug)]
pub(super) struct Start {
    bytes: [u8; START_BYTES],
    length: usize,
}

/// Reads the header blocks of one direction.
#[derive(Debug)]
pub(super) struct Decoder<T> {
    table: T,
    /// The most that the other side lets the table be.
    limit: usize,
    /// The limit is below what the table may have, and no new size came since. A block should begin with one
    /// (RFC 7541, section 4.2), but senders that never use the table leave it out; until it comes, nobody
    /// knows which entries there are.
    must_resize: bool,
}

// === impl Decoder ===

impl<T: Table + Default> Default for Decoder<T> {
    fn default() -> Self {
        let table = T::default();
        Self {
            limit: table.max_size(),
            table,
            must_resize: false,
        }
    }
}

impl<T: Table> Decoder<T> {
    pub(super) fn table(&self) -> &T {
        &self.table
    }

    pub(super) fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    /// The other side's limit is known to who sends the blocks, from the next one on.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.must_resize |= limit < self.table.max_size();
    }

    /// Reads a whole block.
    pub(super) fn decode(&mut self, block: &[u8], list: &mut T::List) -> Result<(), Opaque> {
        let mut rest = block;
        let mut is_start = true;
        while let Some((&first, after)) = rest.split_first() {
            rest = after;
            if first & 0xe0 == 0x20 {
                let size = integer(&mut rest, first, 5).ok_or(Opaque::Hpack)?;
                self.resize(size, is_start)?;
                continue;
            }
            is_start = false;
            if first & 0x80 != 0 {
                let index = integer(&mut rest, first, 7).ok_or(Opaque::Hpack)?;
                self.check(index)?;
                self.table.indexed(index, list)?;
            } else {
                let literal = Literal::read(&mut rest, first).ok_or(Opaque::Hpack)?;
                if let Name::Index(index) = literal.name {
                    self.check(index)?;
                }
                self.table.literal(&literal, list)?;
            }
        }
        Ok(())
    }

    /// Refuses an entry of the dynamic table while it is not known what that has.
    fn check(&self, index: usize) -> Result<(), Opaque> {
        if self.must_resize && statics(index).is_none() {
            return Err(Opaque::Hpack);
        }
        Ok(())
    }

    /// Sizes are changed before the first field of a block (RFC 7541, section 4.2).
    fn resize(&mut self, size: usize, is_start: bool) -> Result<(), Opaque> {
        if !is_start || size > self.limit.min(MAX_TABLE_SIZE) {
            return Err(Opaque::Hpack);
        }
        self.must_resize = false;
        self.table.resize(size);
        Ok(())
    }
}

// === impl Literal ===

impl<'b> Literal<'b> {
    fn read(rest: &mut &'b [u8], first: u8) -> Option<Self> {
        let is_kept = first & 0x40 != 0;
        let name = match integer(rest, first, if is_kept { 6 } else { 4 })? {
            0 => Name::Text(Text::read(rest)?),
            index => Name::Index(index),
        };
        let value = Text::read(rest)?;
        Some(Self { name, value, is_kept })
    }
}

// === impl Text ===

impl<'b> Text<'b> {
    fn read(rest: &mut &'b [u8]) -> Option<Self> {
        let (&first, after) = rest.split_first()?;
        *rest = after;
        let length = integer(rest, first, 7)?;
        let (bytes, after) = rest.split_at_checked(length)?;
        *rest = after;
        let is_huffman = first & 0x80 != 0;
        Some(Self { bytes, is_huffman })
    }

    /// Adds the string to a text.
    pub(super) fn append_to(self, text: &mut Vec<u8>) -> Result<(), Opaque> {
        if !self.is_huffman {
            text.extend_from_slice(self.bytes);
            return Ok(());
        }
        // The shortest code has five bits.
        text.reserve(self.bytes.len().saturating_mul(8) / 5);
        huffman::decode(self.bytes, |byte| text.push(byte)).ok_or(Opaque::Hpack)
    }

    /// How long the string is.
    pub(super) fn length(self) -> Result<usize, Opaque> {
        if self.is_huffman {
            huffman::measure(self.bytes).ok_or(Opaque::Hpack)
        } else {
            Ok(self.bytes.len())
        }
    }

    /// How the string begins.
    pub(super) fn start(self) -> Result<Start, Opaque> {
        let mut start = Start {
            bytes: [0; START_BYTES],
            length: 0,
        };
        if self.is_huffman {
            huffman::decode(self.bytes, |byte| start.push(byte)).ok_or(Opaque::Hpack)?;
        } else {
            let seen = self.bytes.len().min(START_BYTES);
            let (to, from) = (start.bytes.get_mut(..seen), self.bytes.get(..seen));
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
            start.length = self.bytes.len();
        }
        Ok(start)
    }
}

// === impl Start ===

impl Start {
    /// The bytes that were kept.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&self.bytes)
    }

    /// The whole string, unless it is longer than what was kept.
    pub(super) fn whole(&self) -> Option<&[u8]> {
        self.bytes.get(..self.length)
    }

    /// How long the whole string is.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
        }
        self.length += 1;
    }
}

/// Reads an integer that begins with the low bits of `first` (RFC 7541, section 5.1). None if it is not
/// whole or larger than anything that a block can have.
fn integer(rest: &mut &[u8], first: u8, bits: u32) -> Option<usize> {
    let full = (1_usize << bits) - 1;
    let mut value = usize::from(first) & full;
    if value < full {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], bits: u32, expected: Option<usize>) {
        let mut rest = &bytes[1..];
        assert_eq!(integer(&mut rest, bytes[0], bits), expected, "{bytes:x?}");
    }

    #[test]
    fn integers() {
        // RFC 7541, appendix C.1.
        check(&[0b1110_1010], 5, Some(10));
        check(&[0b1111_1111, 0b1001_1010, 0b0000_1010], 5, Some(1337));
        check(&[0b0010_1010], 8, Some(42));
        // A limit, what is missing, and what is too much.
        check(&[0x7f, 0], 7, Some(127));
        check(&[0x7f], 7, None);
        check(&[0x7f, 0x80], 7, None);
        check(&[0x7f, 0xff, 0xff, 0xff, 0x7f], 7, Some(127 + (1 << 28) - 1));
        check(&[0x7f, 0xff, 0xff, 0xff, 0xff, 0x01], 7, None);
        check(&[0x7f, 0x80, 0x80, 0x80, 0x80, 0x00], 7, None);
    }
}
