//! What holds the decision log together: leaf hashes, the chain of lines, the Merkle tree, the checkpoint.
//!
//! A line's leaf hash is SHA-256(0x00 || the line without its newline) and a node's SHA-256(0x01 || left || right),
//! as in RFC 6962 section 2.1. Each record names the leaf before it, so a change in the middle breaks the chain;
//! the checkpoint states the length and the root, so a change at the end, or a cut, is noticed too.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::record::{Body, MAX_LINE_BYTES, Record};

/// A SHA-256 hash, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash before the first record.
    pub const ZERO: Self = Self([0; 32]);

    /// SHA-256 of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The leaf hash of a line, given without its newline.
    pub fn leaf(line: &[u8]) -> Self {
        Self(
            Sha256::new()
                .chain_update([0])
                .chain_update(line)
                .finalize()
                .into(),
        )
    }

    fn node(left: Self, right: Self) -> Self {
        Self(
            Sha256::new()
                .chain_update([1])
                .chain_update(left.0)
                .chain_update(right.0)
                .finalize()
                .into(),
        )
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Hash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.as_bytes();
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut hash = [0; 32];
        if digits.len() == 64 {
            for (byte, pair) in hash.iter_mut().zip(digits.as_chunks::<2>().0) {
                let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                    return Err(format!(
                        "{text:?} is not a hash of 64 lower-case hexadecimal digits"
                    ));
                };
                *byte = high << 4 | low;
            }
            return Ok(Self(hash));
        }
        Err(format!(
            "{text:?} is not a hash of 64 lower-case hexadecimal digits"
        ))
    }
}

impl TryFrom<String> for Hash {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hash.to_string()
    }
}

/// The Merkle tree over the leaves so far, as the roots of its full subtrees (RFC 6962 section 2.1).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    /// Roots of full subtrees, largest first; their sizes are the bits of `size`.
    peaks: Vec<Hash>,
}

impl Tree {
    /// Appends a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut node = leaf;
        let mut size = self.size;
        while size & 1 == 1 {
            if let Some(left) = self.peaks.pop() {
                node = Hash::node(left, node);
            }
            size >>= 1;
        }
        self.peaks.push(node);
        self.size += 1;
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The tree hash; that of the empty tree is SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        let mut peaks = self.peaks.iter().rev().copied();
        let Some(last) = peaks.next() else {
            return Hash::of(&[]);
        };
        peaks.fold(last, |right, left| Hash::node(left, right))
    }
}

/// Why a log is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {seq}: {problem}")]
pub struct ChainError {
    /// Position of the first record that is wrong.
    pub seq: u64,
    /// What is wrong with it.
    pub problem: String,
}

/// Reads a log line by line and holds each record against the ones before it.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    tree: Tree,
    head: Option<Hash>,
    log: Option<String>,
    time_ms: u64,
}

impl Chain {
    /// Takes the next line, without its newline.
    pub fn accept(&mut self, line: &[u8]) -> Result<Record, ChainError> {
        let seq = self.tree.size();
        let fail = |problem: String| ChainError { seq, problem };
        if line.len() > MAX_LINE_BYTES {
            return Err(fail(format!(
                "has {} bytes; at most {MAX_LINE_BYTES} are allowed",
                line.len()
            )));
        }
        let text = std::str::from_utf8(line).map_err(|_| fail("is not UTF-8".to_owned()))?;
        let record: Record =
            serde_json::from_str(text).map_err(|error| fail(format!("is not a record: {error}")))?;
        if record.v != 1 {
            return Err(fail(format!(
                "has version {}; this program reads version 1",
                record.v
            )));
        }
        if record.seq != seq {
            return Err(fail(format!("says that it is record {}", record.seq)));
        }
        let head = self.head.unwrap_or(Hash::ZERO);
        if record.prev != head {
            return Err(fail(format!(
                "follows {}, but the record before it is {head}",
                record.prev
            )));
        }
        if self.log.as_ref().is_some_and(|log| *log != record.log) {
            return Err(fail(format!("belongs to the log {:?}", record.log)));
        }
        if record.time_ms < self.time_ms {
            return Err(fail("is dated before the record ahead of it".to_owned()));
        }
        if record.to_line() != text {
            return Err(fail("is not in canonical form".to_owned()));
        }
        self.time_ms = record.time_ms;
        self.log.get_or_insert_with(|| record.log.clone());
        self.push(Hash::leaf(line));
        Ok(record)
    }

    /// Appends a record that this program has just made; gives its line and leaf hash. A record that no reader
    /// would accept is refused.
    pub fn append(
        &mut self,
        log: &str,
        time_ms: u64,
        body: Body,
    ) -> Result<(Record, String, Hash), ChainError> {
        let time_ms = self.time_ms.max(time_ms);
        let record = Record {
            v: 1,
            log: log.to_owned(),
            seq: self.tree.size(),
            prev: self.head.unwrap_or(Hash::ZERO),
            time_ms,
            body,
        };
        let line = record.to_line();
        if line.len() > MAX_LINE_BYTES {
            let problem = format!("has {} bytes; at most {MAX_LINE_BYTES} are allowed", line.len());
            return Err(ChainError {
                seq: record.seq,
                problem,
            });
        }
        self.time_ms = time_ms;
        let leaf = Hash::leaf(line.as_bytes());
        self.log.get_or_insert_with(|| log.to_owned());
        self.push(leaf);
        Ok((record, line, leaf))
    }

    fn push(&mut self, leaf: Hash) {
        self.tree.push(leaf);
        self.head = Some(leaf);
    }

    /// Number of records.
    pub fn size(&self) -> u64 {
        self.tree.size()
    }

    /// The Merkle root.
    pub fn root(&self) -> Hash {
        self.tree.root()
    }

    /// The leaf hash of the last record.
    pub fn head(&self) -> Option<Hash> {
        self.head
    }

    /// The log's name.
    pub fn log(&self) -> Option<&str> {
        self.log.as_deref()
    }

    /// The checkpoint's text.
    pub fn checkpoint(&self) -> String {
        format!(
            "{}\n{}\n{}\n",
            self.log().unwrap_or(""),
            self.size(),
            base64(&self.root().0)
        )
    }
}

/// The number of records and the root that a checkpoint states.
pub fn parse_checkpoint(text: &str) -> Option<(String, u64, String)> {
    let mut lines = text.strip_suffix('\n')?.split('\n');
    let (log, size, root) = (lines.next()?, lines.next()?, lines.next()?);
    let plain = size == "0" || (!size.starts_with('0') && size.bytes().all(|b| b.is_ascii_digit()));
    (plain && lines.next().is_none()).then_some(())?;
    Some((log.to_owned(), size.parse().ok()?, root.to_owned()))
}

/// Base64 with padding, RFC 4648 section 4.
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk
            .iter()
            .fold(0_u32, |group, byte| group << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for position in 0..4 {
            if position <= chunk.len() {
                let sextet = (group >> (18 - 6 * position)) & 63;
                text.push(char::from(ALPHABET[sextet as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::RolloutEnd;

    fn sample(count: u64) -> (Vec<String>, Chain) {
        let mut chain = Chain::default();
        let lines = (0..count)
            .map(|i| {
                let body = if i == 0 {
                    Body::LogStart {
                        build: "coalmine 0.1.0".into(),
                    }
                } else {
                    Body::End(RolloutEnd {
                        rollout: format!("r-{i}"),
                        actor: "é \"quoted\"".into(),
                        reason: "done".into(),
                        verdict: "HOLD".into(),
                    })
                };
                chain.append("test", 1_700_000_000_000 + i, body).unwrap().1
            })
            .collect();
        (lines, chain)
    }

    #[test]
    fn a_chain_reads_back_to_the_same_root() {
        let (lines, written) = sample(9);
        let mut read = Chain::default();
        for line in &lines {
            read.accept(line.as_bytes()).unwrap();
        }
        assert_eq!(read.checkpoint(), written.checkpoint());
        assert_eq!(parse_checkpoint(&read.checkpoint()).unwrap().1, 9);
        assert!(lines[0].starts_with(r#"{"body":{"build":"#), "{}", lines[0]);
    }

    #[test]
    fn every_flipped_bit_is_noticed_by_the_chain_or_by_the_root() {
        let (lines, written) = sample(4);
        for (index, line) in lines.iter().enumerate() {
            for at in 0..line.len() {
                let mut bad = line.clone().into_bytes();
                bad[at] ^= 1;
                let mut chain = Chain::default();
                let result = lines.iter().enumerate().try_for_each(|(i, line)| {
                    chain
                        .accept(if i == index { &bad } else { line.as_bytes() })
                        .map(|_| ())
                });
                assert!(
                    result.is_err() || chain.root() != written.root(),
                    "record {index}, byte {at}"
                );
            }
        }
    }

    #[test]
    fn a_missing_or_moved_record_is_named() {
        let (mut lines, _) = sample(5);
        lines.remove(2);
        let mut chain = Chain::default();
        let error = lines
            .iter()
            .map(|line| chain.accept(line.as_bytes()))
            .find_map(Result::err)
            .unwrap();
        assert_eq!(error.seq, 2);
        assert!(error.to_string().contains("says that it is record 3"), "{error}");
    }

    #[test]
    fn a_record_that_names_another_one_before_it_is_refused() {
        let (lines, _) = sample(3);
        let mut chain = Chain::default();
        chain.accept(lines[0].as_bytes()).unwrap();
        let mut record: Record = serde_json::from_str(&lines[1]).unwrap();
        record.prev = Hash::of(b"another log");
        let error = chain.accept(record.to_line().as_bytes()).unwrap_err();
        assert!(
            error.seq == 1 && error.problem.contains("but the record before it is"),
            "{error}"
        );
    }

    /// Roots of RFC 6962 trees over the leaves of the Certificate Transparency test data
    /// (transparency-dev/merkle, testonly/constants.go).
    #[test]
    fn the_tree_is_that_of_rfc_6962() {
        let leaves: [&[u8]; 8] = [
            b"",
            &[0x00],
            &[0x10],
            &[0x20, 0x21],
            &[0x30, 0x31],
            &[0x40, 0x41, 0x42, 0x43],
            &[0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57],
            &[
                0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e,
                0x6f,
            ],
        ];
        let roots = [
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let mut tree = Tree::default();
        assert_eq!(tree.root().to_string(), roots[0]);
        for (leaf, root) in leaves.iter().zip(&roots[1..]) {
            tree.push(Hash::leaf(leaf));
            assert_eq!(tree.root().to_string(), *root);
        }
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let encoded = ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes()));
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
    }
}
