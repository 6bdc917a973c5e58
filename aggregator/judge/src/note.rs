//! Checkpoints of the log as signed notes, and proofs that carry one: text formats that other programs read too.
//!
//! ```text
//! note        text, an empty line, one line "— NAME BASE64(key id || signature)" for each signature
//! checkpoint  a note whose text is three lines: origin, number of records, root in base64
//! proof       "c2sp.org/tlog-proof@v1", "extra BASE64" (the record's line), "index N", the hashes of an inclusion
//!             proof in base64, an empty line, a checkpoint
//! ```
//!
//! Sources: C2SP signed-note, tlog-checkpoint, tlog-cosignature and tlog-proof; signatures are those of RFC 8032.
//! A key's id is the beginning of SHA-256(NAME || 0x0A || kind || public key). The kinds are 0x01, which signs the
//! text, and 0x04, a witness's cosignature: a time of eight bytes, then a signature of the text below the lines
//! "cosignature/v1" and "time SECONDS".

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use sha2::{Digest as _, Sha256};

use crate::{
    chain::Hash,
    tree::{self, MAX_PROOF},
};

/// Largest note that is read, in bytes.
const MAX_NOTE_BYTES: usize = 64 * 1024;

/// Most signature lines of a note.
const MAX_SIGNATURES: usize = 64;

const PRIVATE: &str = "PRIVATE+KEY+";
const PROOF_HEADER: &str = "c2sp.org/tlog-proof@v1";

/// What a signature states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The log's own signature of a text.
    Ed25519,
    /// A witness's: at that time this was the largest tree it had seen, and it contained all earlier ones.
    Cosignature,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Self::Ed25519 => 1,
            Self::Cosignature => 4,
        }
    }

    const fn of(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Ed25519),
            4 => Some(Self::Cosignature),
            _ => None,
        }
    }
}

/// Why a key, a note, a checkpoint or a proof is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// The text has another form.
    #[error("is not {what}: {problem}")]
    Form {
        /// What it should have been.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A key that is known has not made this signature.
    #[error("has a signature in the name of {0} that this key did not make")]
    Forged(String),
    /// No key that is known has signed.
    #[error("is not signed by a known key: its signatures are of {found}, and the known keys are {known}")]
    Unsigned {
        /// Who signed.
        found: String,
        /// Who should have.
        known: String,
    },
    /// The record is not there.
    #[error("does not show that the record is in the log: it leads to another root than the checkpoint's")]
    NotIncluded,
}

fn form(what: &'static str, problem: impl Into<String>) -> NoteError {
    NoteError::Form {
        what,
        problem: problem.into(),
    }
}

/// Base64 with padding, RFC 4648 section 4; only the one canonical form is read.
fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

pub(crate) fn hash_from_base64(text: &str) -> Option<Hash> {
    Some(Hash(decode(text)?.try_into().ok()?))
}

/// A number in the one form that is allowed: digits, no leading zero.
pub(crate) fn number(text: &str) -> Option<u64> {
    let plain = text == "0" || (!text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit()));
    plain.then(|| text.parse().ok()).flatten()
}

/// Whether a key or a log may have this name.
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.contains(|c: char| c.is_whitespace() || c == '+' || c.is_control())
}

fn key_id(name: &str, kind: Kind, public: &[u8; 32]) -> [u8; 4] {
    let digest = Sha256::new()
        .chain_update(name)
        .chain_update([b'\n', kind.byte()])
        .chain_update(public)
        .finalize();
    let [first, second, third, fourth, ..] = digest.0;
    [first, second, third, fourth]
}

/// A key that checks signatures, with the name that signs.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifierKey {
    name: String,
    kind: Kind,
    id: [u8; 4],
    key: VerifyingKey,
}

impl VerifierKey {
    fn new(name: &str, kind: Kind, key: VerifyingKey) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            id: key_id(name, kind, key.as_bytes()),
            key,
        }
    }

    /// Reads `NAME+ID+BASE64`.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        const WHAT: &str = "a verifier key (NAME+ID+BASE64)";
        let (name, id, kind, public) = key_parts(text).ok_or_else(|| form(WHAT, format!("{text:?}")))?;
        let key =
            VerifyingKey::from_bytes(&public).map_err(|_| form(WHAT, "its point is not on the curve"))?;
        let key = Self::new(name, kind, key);
        if key.id != id {
            return Err(form(WHAT, "its id is not that of its name and key"));
        }
        Ok(key)
    }

    /// Who signs with it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its signatures state.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    fn verify(&self, text: &str, signature: &[u8]) -> bool {
        match self.kind {
            Kind::Ed25519 => self.is_signed(text.as_bytes(), signature),
            Kind::Cosignature => signature
                .split_first_chunk::<8>()
                .is_some_and(|(time, signature)| {
                    let time = u64::from_be_bytes(*time);
                    time != 0 && self.is_signed(cosigned(text, time).as_bytes(), signature)
                }),
        }
    }

    fn is_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature)
            .is_ok_and(|signature| self.key.verify_strict(message, &signature).is_ok())
    }
}

impl FromStr for VerifierKey {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        Self::parse(text)
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&key_text(&self.name, self.id, self.kind, self.key.as_bytes()))
    }
}

impl fmt::Debug for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn key_text(name: &str, id: [u8; 4], kind: Kind, key: &[u8; 32]) -> String {
    let material = STANDARD.encode([&[kind.byte()], key.as_slice()].concat());
    format!("{name}+{:08x}+{material}", u32::from_be_bytes(id))
}

/// Name, id, kind and 32 bytes of a key in its text form.
fn key_parts(text: &str) -> Option<(&str, [u8; 4], Kind, [u8; 32])> {
    let (name, rest) = text.split_once('+')?;
    let (id, material) = rest.split_once('+')?;
    let lower = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_name(name) || id.len() != 8 || !lower {
        return None;
    }
    let id = u32::from_str_radix(id, 16).ok()?.to_be_bytes();
    let material = decode(material)?;
    let (kind, key) = material.split_first()?;
    Some((name, id, Kind::of(*kind)?, key.try_into().ok()?))
}

/// A key that signs, with its name. Its text form is the one of Go's sumdb/note: `PRIVATE+KEY+NAME+ID+BASE64`.
pub struct SignerKey {
    name: String,
    kind: Kind,
    key: SigningKey,
}

impl SignerKey {
    /// The key of a seed, which must come from a source of random numbers.
    pub fn from_seed(name: &str, kind: Kind, seed: &[u8; 32]) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            key: SigningKey::from_bytes(seed),
        }
    }

    /// Reads the text form. No error shows a part of the key.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        const WHAT: &str = "a signing key (PRIVATE+KEY+NAME+ID+BASE64)";
        let (name, id, kind, seed) = text
            .trim_end()
            .strip_prefix(PRIVATE)
            .and_then(key_parts)
            .ok_or_else(|| form(WHAT, "it has another form"))?;
        let key = Self::from_seed(name, kind, &seed);
        if key.verifier().id != id {
            return Err(form(WHAT, "its id is not that of its name and key"));
        }
        Ok(key)
    }

    /// The text form, secret.
    pub fn to_secret_text(&self) -> String {
        let key = key_text(&self.name, self.verifier().id, self.kind, self.key.as_bytes());
        format!("{PRIVATE}{key}\n")
    }

    /// The key that checks what this one signs.
    pub fn verifier(&self) -> VerifierKey {
        VerifierKey::new(&self.name, self.kind, self.key.verifying_key())
    }

    /// The signature line for a note's text; `now` is the time of a cosignature in seconds since the Unix epoch.
    pub fn sign(&self, text: &str, now: u64) -> String {
        let mut bytes = self.verifier().id.to_vec();
        match self.kind {
            Kind::Ed25519 => bytes.extend(self.key.sign(text.as_bytes()).to_bytes()),
            Kind::Cosignature => {
                bytes.extend(now.to_be_bytes());
                bytes.extend(self.key.sign(cosigned(text, now).as_bytes()).to_bytes());
            }
        }
        signature_text(&self.name, &bytes)
    }
}

impl fmt::Debug for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignerKey({})", self.verifier())
    }
}

fn signature_text(name: &str, bytes: &[u8]) -> String {
    format!("— {name} {}\n", STANDARD.encode(bytes))
}

fn cosigned(text: &str, time: u64) -> String {
    format!("cosignature/v1\ntime {time}\n{text}")
}

/// A signature line, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SignatureLine<'a> {
    name: &'a str,
    id: [u8; 4],
    signature: Vec<u8>,
}

/// A note whose signatures have not been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note<'a> {
    text: &'a str,
    signatures: Vec<SignatureLine<'a>>,
}

impl<'a> Note<'a> {
    /// Takes a note apart.
    pub fn parse(note: &'a str) -> Result<Self, NoteError> {
        const WHAT: &str = "a signed note";
        if note.len() > MAX_NOTE_BYTES {
            return Err(form(WHAT, format!("it has more than {MAX_NOTE_BYTES} bytes")));
        }
        if let Some(at) = note.bytes().position(|byte| byte < 0x20 && byte != b'\n') {
            return Err(form(WHAT, format!("byte {at} is a control character")));
        }
        let at = note
            .rfind("\n\n")
            .ok_or_else(|| form(WHAT, "no empty line stands before signatures"))?;
        let (text, lines) = (&note[..=at], &note[at + 2..]);
        let lines = lines
            .strip_suffix('\n')
            .ok_or_else(|| form(WHAT, "it does not end with a newline"))?;
        let mut signatures = Vec::new();
        for line in lines.split('\n') {
            if signatures.len() == MAX_SIGNATURES {
                return Err(form(
                    WHAT,
                    format!("it has more than {MAX_SIGNATURES} signatures"),
                ));
            }
            let signature =
                signature_line(line).ok_or_else(|| form(WHAT, format!("{line:?} is not a signature")))?;
            signatures.push(signature);
        }
        Ok(Self { text, signatures })
    }

    /// The text, which nothing vouches for.
    pub fn unverified(&self) -> &'a str {
        self.text
    }

    /// Of the signature lines, those that known keys have made, each with its newline.
    pub fn signatures_of(&self, keys: &[VerifierKey]) -> Vec<String> {
        let made = |line: &&SignatureLine<'_>| {
            keys.iter().any(|key| {
                key.name == line.name && key.id == line.id && key.verify(self.text, &line.signature)
            })
        };
        let lines = self.signatures.iter().filter(made);
        lines
            .map(|line| signature_text(line.name, &[line.id.as_slice(), &line.signature].concat()))
            .collect()
    }

    /// The text, if a known key has signed it and no signature of a known key is forged.
    pub fn verify(&self, keys: &[VerifierKey]) -> Result<&'a str, NoteError> {
        let mut good = false;
        for line in &self.signatures {
            let known = keys.iter().find(|key| key.name == line.name && key.id == line.id);
            if let Some(key) = known {
                if !key.verify(self.text, &line.signature) {
                    return Err(NoteError::Forged(key.to_string()));
                }
                good = true;
            }
        }
        let names = |names: Vec<String>| {
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            }
        };
        if good {
            return Ok(self.text);
        }
        Err(NoteError::Unsigned {
            found: names(
                self.signatures
                    .iter()
                    .map(|line| format!("{}+{:08x}", line.name, u32::from_be_bytes(line.id)))
                    .collect(),
            ),
            known: names(keys.iter().map(ToString::to_string).collect()),
        })
    }
}

fn signature_line(line: &str) -> Option<SignatureLine<'_>> {
    let (name, signature) = line.strip_prefix("— ")?.split_once(' ')?;
    let bytes = decode(signature)?;
    let (id, signature) = bytes.split_first_chunk::<4>()?;
    (is_name(name) && !signature.is_empty()).then(|| SignatureLine {
        name,
        id: *id,
        signature: signature.to_owned(),
    })
}

/// How long a log is and what its root is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log's name.
    pub origin: String,
    /// Number of records.
    pub size: u64,
    /// The Merkle root.
    pub root: Hash,
}

impl Checkpoint {
    /// Reads a note's text. Lines after the third are extensions, which are allowed and mean nothing here.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        const WHAT: &str = "a checkpoint (three lines: log, size, root)";
        let mut lines = text.split_inclusive('\n').map(|line| line.strip_suffix('\n'));
        let mut line = |name| {
            lines
                .next()
                .flatten()
                .ok_or_else(|| form(WHAT, format!("its {name} is missing")))
        };
        let (origin, size, root) = (line("log")?, line("size")?, line("root")?);
        if origin.is_empty() {
            return Err(form(WHAT, "its log has no name"));
        }
        let wrong = |name, text| form(WHAT, format!("its {name} is {text:?}"));
        let checkpoint = Self {
            origin: origin.to_owned(),
            size: number(size).ok_or_else(|| wrong("size", size))?,
            root: hash_from_base64(root).ok_or_else(|| wrong("root", root))?,
        };
        if lines.any(|line| line.is_none_or(str::is_empty)) {
            return Err(form(WHAT, "an extension line is empty"));
        }
        Ok(checkpoint)
    }

    /// Reads a signed checkpoint and checks who signed it.
    pub fn open(note: &str, keys: &[VerifierKey]) -> Result<Self, NoteError> {
        Self::parse(Note::parse(note)?.verify(keys)?)
    }

    /// The signed checkpoint.
    pub fn sign<'k>(&self, keys: impl IntoIterator<Item = &'k SignerKey>) -> String {
        let text = self.to_string();
        let lines: String = keys.into_iter().map(|key| key.sign(&text, 0)).collect();
        format!("{text}\n{lines}")
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = STANDARD.encode(self.root.0);
        write!(f, "{}\n{}\n{root}\n", self.origin, self.size)
    }
}

/// Proof that a record stands in the log, that can be checked without the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The record's line, so that the proof needs nothing beside it; only what the checkpoint's root confirms is
    /// worth anything.
    pub extra: Option<Vec<u8>>,
    /// Position of the record.
    pub index: u64,
    /// Proof of inclusion, from the record's sibling upwards.
    pub path: Vec<Hash>,
    /// A signed checkpoint, as it was published.
    pub checkpoint: String,
}

impl Proof {
    /// Reads a proof.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        const WHAT: &str = "a proof (c2sp.org/tlog-proof@v1)";
        let (head, checkpoint) = text
            .split_once("\n\n")
            .ok_or_else(|| form(WHAT, "no empty line stands before a checkpoint"))?;
        let mut lines = head.split('\n');
        if lines.next() != Some(PROOF_HEADER) {
            return Err(form(WHAT, format!("its first line is not {PROOF_HEADER:?}")));
        }
        let mut line = lines.next().unwrap_or_default();
        let mut extra = None;
        if let Some(data) = line.strip_prefix("extra ") {
            extra = Some(decode(data).ok_or_else(|| form(WHAT, "its extra data is not base64"))?);
            line = lines.next().unwrap_or_default();
        }
        let index = line
            .strip_prefix("index ")
            .and_then(number)
            .ok_or_else(|| form(WHAT, format!("{line:?} is not the line of the index")))?;
        let mut path = Vec::new();
        for line in lines {
            if path.len() == MAX_PROOF {
                return Err(form(WHAT, format!("it has more than {MAX_PROOF} hashes")));
            }
            path.push(hash_from_base64(line).ok_or_else(|| form(WHAT, format!("{line:?} is not a hash")))?);
        }
        Ok(Self {
            extra,
            index,
            path,
            checkpoint: checkpoint.to_owned(),
        })
    }

    /// Checks that the record with this leaf hash is in the log, as a known key has signed it.
    pub fn verify(&self, leaf: Hash, keys: &[VerifierKey]) -> Result<Checkpoint, NoteError> {
        let checkpoint = Checkpoint::open(&self.checkpoint, keys)?;
        let root = tree::root_of_inclusion(self.index, checkpoint.size, leaf, &self.path);
        if root != Some(checkpoint.root) {
            return Err(NoteError::NotIncluded);
        }
        Ok(checkpoint)
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{PROOF_HEADER}")?;
        if let Some(extra) = &self.extra {
            writeln!(f, "extra {}", STANDARD.encode(extra))?;
        }
        writeln!(f, "index {}", self.index)?;
        for hash in &self.path {
            writeln!(f, "{}", STANDARD.encode(hash.0))?;
        }
        write!(f, "\n{}", self.checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn signer(name: &str, kind: Kind, seed: u8) -> SignerKey {
        SignerKey::from_seed(name, kind, &[seed; 32])
    }

    fn checkpoint(size: u64) -> Checkpoint {
        Checkpoint {
            origin: "log.example/a".into(),
            size,
            root: Hash::of(b"root"),
        }
    }

    /// The example of the C2SP signed-note document.
    #[test]
    fn the_published_note_is_verified() {
        let key = VerifierKey::parse("example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k");
        let note = "This is an example message.\n\n— example.com/foo \
                    Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n";
        let keys = [key.unwrap()];
        let text = Note::parse(note).unwrap().verify(&keys).unwrap();
        assert_eq!(text, "This is an example message.\n");
        let changed = note.replace("an example", "no example");
        assert!(matches!(
            Note::parse(&changed).unwrap().verify(&keys),
            Err(NoteError::Forged(_))
        ));
    }

    #[test]
    fn keys_read_back_and_every_changed_byte_of_one_is_refused() {
        for kind in [Kind::Ed25519, Kind::Cosignature] {
            let key = signer("log.example/a", kind, 1);
            let text = key.verifier().to_string();
            assert_eq!(VerifierKey::parse(&text).unwrap(), key.verifier());
            for at in 0..text.len() {
                let mut bad = text.clone().into_bytes();
                bad[at] ^= 1;
                let bad = String::from_utf8(bad).unwrap();
                assert!(VerifierKey::parse(&bad).is_err(), "{bad}");
            }
            let secret = key.to_secret_text();
            assert!(secret.starts_with("PRIVATE+KEY+log.example/a+"));
            assert_eq!(SignerKey::parse(&secret).unwrap().verifier(), key.verifier());
            assert!(!format!("{key:?}").contains("PRIVATE"));
        }
        let error = SignerKey::parse("PRIVATE+KEY+secret").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn every_flipped_bit_of_a_signed_checkpoint_is_noticed() {
        let key = signer("log.example/a", Kind::Ed25519, 1);
        let keys = [key.verifier()];
        let note = checkpoint(7).sign([&key]);
        assert_eq!(Checkpoint::open(&note, &keys).unwrap(), checkpoint(7));
        for at in 0..note.len() {
            for bit in 0..8 {
                let mut bad = note.clone().into_bytes();
                bad[at] ^= 1 << bit;
                if let Ok(bad) = String::from_utf8(bad) {
                    assert!(
                        Checkpoint::open(&bad, &keys).is_err(),
                        "byte {at}, bit {bit}: {bad}"
                    );
                }
            }
        }
        for end in 0..note.len() {
            if note.is_char_boundary(end) {
                assert!(Checkpoint::open(&note[..end], &keys).is_err(), "cut at {end}");
            }
        }
    }

    #[test]
    fn a_note_needs_one_known_key_and_no_forged_one() {
        let (ours, other) = (
            signer("log.example/a", Kind::Ed25519, 1),
            signer("log.example/b", Kind::Ed25519, 2),
        );
        let note = checkpoint(3).sign([&other, &ours]);
        assert!(Checkpoint::open(&note, &[ours.verifier()]).is_ok());
        assert!(Checkpoint::open(&note, &[other.verifier()]).is_ok());
        let stranger = signer("log.example/c", Kind::Ed25519, 3).verifier();
        let error = Checkpoint::open(&note, &[stranger]).unwrap_err().to_string();
        assert!(
            error.contains("log.example/b+") && error.contains("known keys are log.example/c+"),
            "{error}"
        );
        let forged = note.replace(
            &other.sign(&checkpoint(3).to_string(), 0),
            &other.sign(&checkpoint(4).to_string(), 0),
        );
        let both = [ours.verifier(), other.verifier()];
        assert!(matches!(
            Checkpoint::open(&forged, &both),
            Err(NoteError::Forged(_))
        ));
    }

    #[test]
    fn a_cosignature_states_its_time() {
        let (log, witness) = (
            signer("log.example/a", Kind::Ed25519, 1),
            signer("witness.example/w", Kind::Cosignature, 2),
        );
        let text = checkpoint(3).to_string();
        let note = checkpoint(3).sign([&log]) + &witness.sign(&text, 1_700_000_000);
        assert_eq!(
            Checkpoint::open(&note, &[witness.verifier()]).unwrap(),
            checkpoint(3)
        );
        let timeless = format!("{text}\n{}", witness.sign(&text, 0));
        assert!(Checkpoint::open(&timeless, &[witness.verifier()]).is_err());
    }

    #[test]
    fn checkpoints_have_one_form() {
        let root = STANDARD.encode([9; 32]);
        for (text, says) in [
            (format!("\n1\n{root}\n"), "no name"),
            (format!("a\n01\n{root}\n"), "its size is \"01\""),
            (format!("a\n+1\n{root}\n"), "its size is"),
            (format!("a\n18446744073709551616\n{root}\n"), "its size is"),
            (format!("a\n\n{root}\n"), "its size is"),
            ("a\n1\nAAAA\n".to_owned(), "its root is"),
            (format!("a\n1\n{root}"), "its root is missing"),
            ("a\n1\n".to_owned(), "its root is missing"),
            (format!("a\n1\n{root}\n\nx\n"), "extension"),
            (format!("a\n1\n{root}\nx"), "extension"),
        ] {
            let error = Checkpoint::parse(&text).unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
        let extended = format!("a\n0\n{root}\nmore\nand more\n");
        assert_eq!(Checkpoint::parse(&extended).unwrap().size, 0);
    }

    #[test]
    fn a_proof_shows_one_record_and_no_other() {
        let key = signer("log.example/a", Kind::Ed25519, 1);
        let keys = [key.verifier()];
        let mut nodes = tree::Nodes::default();
        let leaves: Vec<Hash> = (0_u8..9).map(|index| Hash::leaf(&[index])).collect();
        for leaf in &leaves {
            nodes.push(*leaf);
        }
        let checkpoint = Checkpoint {
            root: nodes.root(9).unwrap(),
            ..checkpoint(9)
        };
        for index in 0..9 {
            let proof = Proof {
                extra: (index % 2 == 0).then(|| vec![index as u8; 5]),
                index,
                path: nodes.inclusion(index, 9).unwrap(),
                checkpoint: checkpoint.sign([&key]),
            };
            let text = proof.to_string();
            assert_eq!(Proof::parse(&text).unwrap(), proof);
            let leaf = leaves[index as usize];
            assert_eq!(proof.verify(leaf, &keys).unwrap(), checkpoint);
            let other = leaves[(index as usize + 1) % 9];
            assert_eq!(proof.verify(other, &keys), Err(NoteError::NotIncluded));
            for (from, to) in [
                ("@v1", "@v2"),
                ("index ", "index 0"),
                ("\n\n", "\n"),
                ("index", "extra !\nindex"),
            ] {
                let bad = text.replacen(from, to, 1);
                let refused = Proof::parse(&bad).and_then(|proof| proof.verify(leaf, &keys));
                assert!(refused.is_err(), "{bad}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "(?s).{0,300}", note in "[a\n— +=A0-9]{0,200}") {
            for text in [text.as_str(), note.as_str()] {
                let keys = [signer("a", Kind::Ed25519, 1).verifier()];
                prop_assert!(Checkpoint::open(text, &keys).is_err());
                prop_assert!(SignerKey::parse(text).is_err());
                prop_assert!(VerifierKey::parse(text).is_err());
                drop(Proof::parse(text));
                drop(Checkpoint::parse(text));
            }
        }
    }
}
