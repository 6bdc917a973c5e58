//! Decodes strings in HPACK's Huffman code (RFC 7541, section 5.2 and appendix B).
//!
//! The code is canonical: codes of one length follow each other in the order of their symbols, so the
//! lengths say everything. From them a tree of tables is made when this is compiled; each table is asked
//! with one byte. The codes of all usual characters have at most eight bits, so the first table has them.

/// All bytes, and the mark of the end (256), which no string may contain.
const SYMBOLS: usize = 257;

/// The length of each symbol's code in bits (RFC 7541, appendix B).
const LENGTHS: [u32; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26, 30,
];

const LONGEST: u32 = 30;

const CODES: [u32; SYMBOLS] = codes();

/// How many tables the code needs: one for each whole byte that a longer code begins with, and the first.
const TABLE_COUNT: usize = 15;

/// Entries of a table that lead to another one. All others have the bits that are used in the high byte
/// and the symbol in the low one.
const BRANCH: u16 = 0x8000;

/// The entry of what is no code, or the code of the end.
const INVALID: u16 = 0;

static TABLES: [[u16; 256]; TABLE_COUNT] = tables();

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const fn codes() -> [u32; SYMBOLS] {
    let mut codes = [0; SYMBOLS];
    let mut next = 0;
    let mut length = 1;
    while length <= LONGEST {
        next <<= 1;
        let mut symbol = 0;
        while symbol < SYMBOLS {
            if LENGTHS[symbol] == length {
                codes[symbol] = next;
                next += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    codes
}

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const fn tables() -> [[u16; 256]; TABLE_COUNT] {
    let mut tables = [[INVALID; 256]; TABLE_COUNT];
    let mut used = 1;
    let mut symbol = 0;
    while symbol < SYMBOLS - 1 {
        let mut table = 0;
        let mut left = LENGTHS[symbol];
        while left > 8 {
            left -= 8;
            let byte = ((CODES[symbol] >> left) & 0xff) as usize;
            if tables[table][byte] == INVALID {
                tables[table][byte] = BRANCH | used;
                used += 1;
            }
            table = (tables[table][byte] & !BRANCH) as usize;
        }
        // Every byte that begins with what is left of the code.
        let first = ((CODES[symbol] << (8 - left)) & 0xff) as usize;
        let mut byte = first;
        while byte < first + (1 << (8 - left)) {
            tables[table][byte] = ((left as u16) << 8) | symbol as u16;
            byte += 1;
        }
        symbol += 1;
    }
    tables
}

/// The bits of a string that are to be read next.
struct Bits<'c> {
    /// The next bit is the highest; those after the last are 0.
    bits: u64,
    count: u32,
    rest: &'c [u8],
}

/// A table has an entry for each byte.
#[allow(clippy::indexing_slicing, reason = "no byte is beyond the 256 entries")]
fn entry_of(table: &[u16; 256], byte: u8) -> u16 {
    table[usize::from(byte)]
}

/// Gives the bytes of a string in turn to `put`; none if it is no Huffman code.
pub(super) fn decode(coded: &[u8], mut put: impl FnMut(u8)) -> Option<()> {
    let mut next = Bits {
        bits: 0,
        count: 0,
        rest: coded,
    };
    let first = &TABLES[0];
    loop {
        next.fill();
        let entry = entry_of(first, next.byte_after(0));
        let (symbol, length) = if entry & BRANCH == 0 {
            (entry, u32::from(entry >> 8))
        } else if next.count < 8 {
            break;
        } else {
            next.long(entry)?
        };
        if length > next.count {
            break;
        }
        put(symbol.to_le_bytes()[0]);
        next.bits <<= length;
        next.count -= length;
    }
    // What is left fills the last byte, with the beginning of the code of the end: ones.
    (next.count < 8 && next.byte_after(0) | (0xff_u8 >> next.count) == 0xff).then_some(())
}

/// The length of a string once it is decoded; none if it is no Huffman code.
pub(super) fn measure(coded: &[u8]) -> Option<usize> {
    let mut length = 0;
    decode(coded, |_| length += 1)?;
    Some(length)
}

// === impl Bits ===

impl Bits<'_> {
    /// Makes sure that there are at least as many bits as the longest code has, if the string has them.
    #[inline]
    fn fill(&mut self) {
        if self.count > 32 {
            return;
        }
        if let Some((four, rest)) = self.rest.split_first_chunk::<4>() {
            self.bits |= u64::from(u32::from_be_bytes(*four)) << (32 - self.count);
            self.count += 32;
            self.rest = rest;
            return;
        }
        for byte in self.rest {
            self.bits |= u64::from(*byte) << (56 - self.count);
            self.count += 8;
        }
        self.rest = &[];
    }

    /// The eight bits that come after this many.
    #[inline]
    fn byte_after(&self, bits: u32) -> u8 {
        (self.bits << bits).to_be_bytes()[0]
    }

    /// Follows a code of more than eight bits from its entry in the first table; gives the entry at its
    /// end and its length.
    fn long(&self, mut entry: u16) -> Option<(u16, u32)> {
        let mut used = 0;
        while entry & BRANCH != 0 {
            used += 8;
            let table = TABLES.get(usize::from(entry & !BRANCH))?;
            entry = entry_of(table, self.byte_after(used));
        }
        let length = used + u32::from(entry >> 8);
        // A code that is not whole is no filling either: that has less than a byte.
        (entry != INVALID && length <= self.count).then_some((entry, length))
    }
}

/// Encodes a string.
#[cfg(test)]
pub(super) fn encode(text: &[u8]) -> Vec<u8> {
    let mut coded = Vec::new();
    let (mut bits, mut count) = (0_u64, 0);
    for symbol in text {
        let symbol = usize::from(*symbol);
        bits = (bits << LENGTHS[symbol]) | u64::from(CODES[symbol]);
        count += LENGTHS[symbol];
        while count >= 8 {
            count -= 8;
            coded.push((bits >> count) as u8);
        }
    }
    if count > 0 {
        coded.push((bits << (8 - count)) as u8 | (0xff >> count));
    }
    coded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(coded: &[u8]) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        decode(coded, |byte| text.push(byte)).map(|()| text)
    }

    #[test]
    fn the_codes_are_those_of_the_rfc() {
        // RFC 7541, appendix B: the first and last of some lengths.
        for (symbol, code) in [
            (b'0', 0x0),
            (b't', 0x9),
            (b' ', 0x14),
            (b'u', 0x2d),
            (b':', 0x5c),
            (b'z', 0x7b),
            (b'&', 0xf8),
            (b';', 0xfb),
            (b'X', 0xfc),
            (b'Z', 0xfd),
            (b'!', 0x3f8),
            (b'#', 0xffa),
            (0, 0x1ff8),
            (b'\\', 0x7fff0),
            (1, 0x7f_ffd8),
            (255, 0x3ff_ffee),
            (9, 0xff_ffea),
            (b'\n', 0x3fff_fffc),
            (22, 0x3fff_fffe),
        ] {
            assert_eq!(CODES[usize::from(symbol)], code, "{symbol}");
        }
        assert_eq!(CODES[256], 0x3fff_ffff);
    }

    #[test]
    fn every_symbol_and_every_pair_comes_back() {
        for one in 0..=255 {
            assert_eq!(decoded(&encode(&[one])), Some(vec![one]));
            for other in 0..=255 {
                let text = [one, other, b'a', other];
                let coded = encode(&text);
                assert_eq!(decoded(&coded), Some(text.to_vec()));
                assert_eq!(measure(&coded), Some(4));
            }
        }
        let all: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        assert_eq!(decoded(&encode(&all)), Some(all));
        assert_eq!(decoded(b""), Some(Vec::new()));
    }

    #[test]
    fn filling_is_less_than_a_byte_of_ones() {
        // 'a' is 00011 and '0' is 00000.
        assert_eq!(decoded(&[0b0001_1111]), Some(b"a".to_vec()));
        for bad in [
            &[0b0001_1000][..],
            &[0b0001_1110],
            &[0b0001_1011],
            &[0b0001_1111, 0xff],
            &[0xff],
            &[0xff; 2],
            &[0xff; 3],
            &[0xfe],
            &[0, 0],
        ] {
            assert_eq!(decoded(bad), None, "{bad:x?}");
        }
    }

    #[test]
    fn the_end_is_no_symbol() {
        assert_eq!(decoded(&[0xff; 4]), None);
        assert_eq!(decoded(&[0xff; 40]), None);
        let mut coded = encode(b"00000000");
        assert_eq!(coded, [0; 5], "no filling");
        coded.extend([0xff; 4]);
        assert_eq!(decoded(&coded), None);
    }
}
