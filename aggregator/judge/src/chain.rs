//! What holds the decision log together: leaf hashes and the chain of lines.
//!
//! A line's leaf hash is SHA-256(0x00 || the line without its newline), as in RFC 6962 section 2.1. Each record
//! names the leaf before it, so a change in the middle breaks the chain; the signed checkpoint states the length
//! and the root of the tree over the leaves, so a change at the end, or a cut, is noticed too. The first record
//! names the key that signs, so that whoever knows the key knows the log.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    note::{Checkpoint, Note, VerifierKey},
    record::{Body, MAX_LINE_BYTES, Record},
    tree::Tree,
};

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

    pub(crate) fn node(left: Self, right: Self) -> Self {
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

/// Why a log is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {seq}: {problem}")]
pub struct ChainError {
    /// Position of the first record that is wrong.
    pub seq: u64,
    /// What is wrong with it.
    pub problem: String,
}

/// What the key before signs when another one follows it (as a C2SP signed note).
pub fn rotation(log: &str, key: &str) -> String {
    format!("coalmine key rotation\n{log}\n{key}\n")
}

/// Reads a log line by line and holds each record against the ones before it.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    tree: Tree,
    head: Option<Hash>,
    log: Option<String>,
    keys: Vec<VerifierKey>,
    time_ms: u64,
}

impl Chain {
    /// Takes the next line, without its newline.
    pub fn accept(&mut self, line: &[u8]) -> Result<Record, ChainError> {
        self.accept_in_form(line, true)
    }

    /// The same without looking at the form, for a line that was accepted before: a signed checkpoint that covers it vouches
    /// for its bytes.
    pub fn accept_again(&mut self, line: &[u8]) -> Result<Record, ChainError> {
        self.accept_in_form(line, false)
    }

    fn accept_in_form(&mut self, line: &[u8], canonical: bool) -> Result<Record, ChainError> {
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
        if canonical && record.to_line() != text {
            return Err(fail("is not in canonical form".to_owned()));
        }
        self.take_key(&record).map_err(fail)?;
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
        let seq = record.seq;
        self.take_key(&record)
            .map_err(|problem| ChainError { seq, problem })?;
        self.time_ms = time_ms;
        let leaf = Hash::leaf(line.as_bytes());
        self.log.get_or_insert_with(|| log.to_owned());
        self.push(leaf);
        Ok((record, line, leaf))
    }

    /// The first record, and no other one, begins the log and names its key; a rotation names the next one.
    fn take_key(&mut self, record: &Record) -> Result<(), String> {
        let mut endorsed = None;
        let key = match &record.body {
            Body::LogStart { key, .. } if record.seq == 0 => key,
            Body::LogStart { .. } => return Err("begins the log again".to_owned()),
            _ if record.seq == 0 => return Err("does not begin the log".to_owned()),
            Body::KeyRotation {
                key, endorsed: line, ..
            } => {
                endorsed = Some(format!("{}\n{line}\n", rotation(&record.log, key)));
                key
            }
            _ => return Ok(()),
        };
        let key = VerifierKey::parse(key).map_err(|error| format!("its key {error}"))?;
        if key.name() != record.log {
            return Err(format!("its key is that of {:?}, not of this log", key.name()));
        }
        // Whoever can write the log could otherwise go on with a key of his own.
        if let Some(note) = endorsed {
            let signed = Note::parse(&note).and_then(|note| note.verify(self.key()));
            signed.map_err(|error| format!("its endorsement by the key before {error}"))?;
        }
        if self.keys.contains(&key) {
            return Err("names a key that the log had before".to_owned());
        }
        self.keys.push(key);
        Ok(())
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

    /// What a checkpoint of the log says now.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            origin: self.log().unwrap_or("").to_owned(),
            size: self.size(),
            root: self.root(),
        }
    }

    /// The keys that have signed the log's checkpoints, as the log itself names them, the first one first.
    pub fn keys(&self) -> &[VerifierKey] {
        &self.keys
    }

    /// The key that must have signed a checkpoint of the log as it stands.
    pub fn key(&self) -> &[VerifierKey] {
        self.keys.last().map_or(&[], std::slice::from_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        note::{Kind, SignerKey},
        record::RolloutEnd,
    };

    fn sample(count: u64) -> (Vec<String>, Chain) {
        let mut chain = Chain::default();
        let lines = (0..count)
            .map(|i| {
                let body = if i == 0 {
                    Body::LogStart {
                        build: "coalmine 0.1.0".into(),
                        key: SignerKey::from_seed("test", Kind::Ed25519, &[7; 32])
                            .verifier()
                            .to_string(),
                        follows: None,
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
        assert_eq!(read.checkpoint().size, 9);
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
    fn a_rotated_key_signs_from_then_on() {
        let key = |seed| SignerKey::from_seed("test", Kind::Ed25519, &[seed; 32]);
        let (_, mut chain) = sample(2);
        let rotate_by = |by: &SignerKey, key: &SignerKey| {
            let key = key.verifier().to_string();
            Body::KeyRotation {
                endorsed: by.sign(&rotation("test", &key), 0).trim_end().to_owned(),
                key,
                reason: "yearly".into(),
            }
        };
        let rotate = |next: &SignerKey| rotate_by(&key(7), next);
        let own = chain
            .clone()
            .append("test", 0, rotate_by(&key(8), &key(8)))
            .unwrap_err();
        assert!(own.problem.contains("its endorsement by the key before"), "{own}");
        let again = chain.clone().append("test", 0, rotate(&key(7))).unwrap_err();
        assert!(again.problem.contains("had before"), "{again}");
        let foreign = SignerKey::from_seed("other", Kind::Ed25519, &[8; 32]);
        assert!(chain.clone().append("test", 0, rotate(&foreign)).is_err());
        let (_, line, _) = chain.append("test", 0, rotate(&key(8))).unwrap();
        assert_eq!(chain.keys(), [key(7).verifier(), key(8).verifier()]);
        assert_eq!(chain.key(), [key(8).verifier()]);
        let (lines, mut read) = sample(2);
        assert_eq!(lines.len(), 2);
        read.accept(line.as_bytes()).unwrap();
        assert_eq!(read.checkpoint(), chain.checkpoint());
        let old = chain.checkpoint().sign([&key(7)]);
        assert!(
            Checkpoint::open(&old, chain.key()).is_err(),
            "the old key signs no more"
        );
        let both = chain.checkpoint().sign([&key(7), &key(8)]);
        assert!(Checkpoint::open(&both, chain.key()).is_ok());
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
}
