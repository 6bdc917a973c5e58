//! The text of an expression, read from left to right: bytes, blanks, comments, strings, and where something is.

use std::fmt::Display;

/// A text and where the reader stands in it.
pub(super) struct Text<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Text<'a> {
    pub(super) fn new(source: &'a str) -> Self {
        Self { source, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The next byte; none at the end.
    pub(super) fn peek(&self) -> Option<u8> {
        self.source.as_bytes().get(self.at).copied()
    }

    /// Goes past the next byte.
    pub(super) fn step(&mut self) {
        self.at = self.at.saturating_add(1).min(self.source.len());
    }

    /// The next character, whole.
    pub(super) fn character(&self) -> char {
        let rest = self.source.get(self.at..).unwrap_or_default();
        rest.chars().next().unwrap_or(char::REPLACEMENT_CHARACTER)
    }

    /// Goes past this byte, if it is the next one.
    pub(super) fn take(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        if is_next {
            self.step();
        }
        is_next
    }

    /// Goes past these bytes, if they are the next ones.
    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let rest = self.source.as_bytes().get(self.at..).unwrap_or_default();
        let is_next = rest.starts_with(word.as_bytes());
        if is_next {
            self.at += word.len();
        }
        is_next
    }

    /// All next bytes of a kind, which must be a kind of ASCII.
    pub(super) fn ahead(&self, is_meant: impl Fn(u8) -> bool) -> &'a str {
        let rest = self.source.get(self.at..).unwrap_or_default();
        let length = rest.bytes().take_while(|byte| is_meant(*byte)).count();
        rest.get(..length).unwrap_or_default()
    }

    /// Goes past them.
    pub(super) fn run(&mut self, is_meant: impl Fn(u8) -> bool) -> &'a str {
        let found = self.ahead(is_meant);
        self.at += found.len();
        found
    }

    /// What was read since then.
    pub(super) fn since(&self, start: usize) -> &'a str {
        self.source.get(start..self.at).unwrap_or_default()
    }

    /// Goes past white space and comments.
    pub(super) fn skip_blank(&mut self) {
        loop {
            self.run(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
            if self.peek() != Some(b'#') {
                return;
            }
            while self.peek().is_some_and(|byte| byte != b'\n') {
                self.step();
            }
        }
    }

    /// A sentence about what is at a place: line and column, in bytes and from 1.
    pub(super) fn refuse(&self, at: usize, what: &(impl Display + ?Sized)) -> String {
        let before = self.source.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let begin = before
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |newline| newline + 1);
        format!("{line}:{}: parse error: {what}", before.len() - begin + 1)
    }

    /// A string in any of Go's three quotes, which stands next.
    pub(super) fn string(&mut self) -> Result<String, String> {
        let (start, quote) = (self.at, self.peek().unwrap_or_default());
        let is_raw = quote == b'`';
        let unterminated = if is_raw {
            "unterminated raw string"
        } else {
            "unterminated quoted string"
        };
        self.step();
        let mut bytes = Vec::new();
        loop {
            let Some(byte) = self.peek() else {
                return Err(self.refuse(start, unterminated));
            };
            self.step();
            match byte {
                _ if byte == quote => break,
                b'\n' if !is_raw => return Err(self.refuse(start, unterminated)),
                b'\\' if !is_raw => self
                    .escape(quote, &mut bytes)
                    .map_err(|what| self.refuse(start, &what))?,
                _ => bytes.push(byte),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.refuse(start, "the string is not valid UTF-8"))
    }

    /// What stands after a backslash.
    fn escape(&mut self, quote: u8, bytes: &mut Vec<u8>) -> Result<(), String> {
        let Some(letter) = self.peek() else {
            return Err("escape sequence not terminated".to_owned());
        };
        let character = self.character();
        if !matches!(letter, b'0'..=b'7') {
            self.step();
        }
        let is_byte = matches!(letter, b'0'..=b'7' | b'x');
        let code = match letter {
            b'a' => 0x07,
            b'b' => 0x08,
            b't' => 0x09,
            b'n' => 0x0A,
            b'v' => 0x0B,
            b'f' => 0x0C,
            b'r' => 0x0D,
            b'\\' => 0x5C,
            _ if letter == quote => u32::from(quote),
            b'0'..=b'7' => self.code(3, 8)?,
            b'x' => self.code(2, 16)?,
            b'u' => self.code(4, 16)?,
            b'U' => self.code(8, 16)?,
            _ => {
                return Err(format!(
                    "unknown escape sequence U+{:04X} {character:?}",
                    u32::from(character)
                ));
            }
        };
        let invalid = || "escape sequence is an invalid Unicode code point".to_owned();
        if is_byte {
            bytes.push(u8::try_from(code).map_err(|_| invalid())?);
        } else {
            let character = char::from_u32(code).ok_or_else(invalid)?;
            bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        }
        Ok(())
    }

    /// So many digits.
    fn code(&mut self, digits: usize, base: u32) -> Result<u32, String> {
        let mut code: u32 = 0;
        for _ in 0..digits {
            let byte = self.peek().ok_or("escape sequence not terminated")?;
            let digit = char::from(byte).to_digit(base).ok_or_else(|| {
                let character = self.character();
                let number = u32::from(character);
                format!("illegal character U+{number:04X} {character:?} in escape sequence")
            })?;
            code = code.saturating_mul(base).saturating_add(digit);
            self.step();
        }
        Ok(code)
    }
}
