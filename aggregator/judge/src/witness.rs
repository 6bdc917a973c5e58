//! What a witness answers: whether it cosigns a log's checkpoint (C2SP tlog-witness).
//!
//! A witness keeps the latest checkpoint that it has cosigned of each log. It cosigns another one only if the log says
//! from where it has grown, and proves that nothing of that was changed. So of all checkpoints that it has ever cosigned
//! each contains the ones before it, and who has a cosigned checkpoint knows that others are shown the same log.
//!
//! ```text
//! request  "old N" (size of the latest cosigned checkpoint), at most 63 hashes of a consistency proof in base64, an
//!          empty line, a checkpoint as a signed note
//! ```
//!
//! The first checkpoint of a log is taken on trust: the old size is 0, and there is nothing to prove.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::{
    chain::Hash,
    note::{self, Checkpoint, Kind, Note, NoteError, VerifierKey},
    tree::{self, MAX_PROOF},
};

/// Why a checkpoint is not cosigned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request has another form, or states that the log has shrunk.
    #[error("the request is not valid: {0}")]
    Malformed(String),
    /// Nobody has told the witness of this log.
    #[error("this witness does not know the log; its operator adds it with the log's key")]
    UnknownLog,
    /// None of the log's keys has signed, or a signature in the name of one is forged.
    #[error("the checkpoint {0}")]
    Untrusted(NoteError),
    /// The latest cosigned checkpoint is another one than the request says.
    #[error(
        "the latest checkpoint that was cosigned has size {size}; prove that the log has grown from there"
    )]
    Conflict {
        /// Its size; 0 if there is none.
        size: u64,
    },
    /// It is not shown that the log has only grown.
    #[error("{0}")]
    Inconsistent(String),
}

impl Refusal {
    /// The HTTP status of the answer.
    pub const fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::UnknownLog => 404,
            Self::Untrusted(_) => 403,
            Self::Conflict { .. } => 409,
            Self::Inconsistent(_) => 422,
        }
    }
}

fn malformed(problem: impl Into<String>) -> Refusal {
    Refusal::Malformed(problem.into())
}

/// A request to cosign a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddCheckpoint {
    /// Size of the checkpoint that the witness cosigned last; 0 if there is none.
    pub old: u64,
    /// Proof that the log of that size is the beginning of the present one.
    pub path: Vec<Hash>,
    /// The checkpoint, as a signed note.
    pub checkpoint: String,
}

impl AddCheckpoint {
    /// Reads the body of a request.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let (head, checkpoint) = text
            .split_once("\n\n")
            .ok_or_else(|| malformed("no empty line stands before a checkpoint"))?;
        let mut lines = head.split('\n');
        let first = lines.next().unwrap_or_default();
        let old = first
            .strip_prefix("old ")
            .and_then(note::number)
            .ok_or_else(|| malformed(format!("its first line is {first:?}, not \"old\" and a size")))?;
        let mut path = Vec::new();
        for line in lines {
            if path.len() == MAX_PROOF {
                return Err(malformed(format!("its proof has more than {MAX_PROOF} hashes")));
            }
            let hash = note::hash_from_base64(line);
            path.push(hash.ok_or_else(|| malformed(format!("{line:?} is not a hash in base64")))?);
        }
        Ok(Self {
            old,
            path,
            checkpoint: checkpoint.to_owned(),
        })
    }

    /// What the checkpoint says, which nothing vouches for yet.
    pub fn statement(&self) -> Result<Checkpoint, Refusal> {
        Ok(self.read()?.1)
    }

    fn read(&self) -> Result<(Note<'_>, Checkpoint), Refusal> {
        let wrong = |error: NoteError| malformed(format!("its checkpoint {error}"));
        let note = Note::parse(&self.checkpoint).map_err(wrong)?;
        let checkpoint = Checkpoint::parse(note.unverified()).map_err(wrong)?;
        Ok((note, checkpoint))
    }

    /// Decides about the request. `keys` are those of the logs that the witness knows, where a log's keys bear its name;
    /// `latest` is the checkpoint of this log that the witness has cosigned last.
    ///
    /// What this gives must be stored as the latest before it is cosigned, and nothing else may be decided about this
    /// log meanwhile.
    pub fn decide(&self, keys: &[VerifierKey], latest: Option<&Checkpoint>) -> Result<Checkpoint, Refusal> {
        let (note, checkpoint) = self.read()?;
        debug_assert!(
            latest.is_none_or(|latest| latest.origin == checkpoint.origin),
            "the latest checkpoint is of the same log"
        );
        let of_log = |key: &&VerifierKey| key.kind() == Kind::Ed25519 && key.name() == checkpoint.origin;
        let keys: Vec<VerifierKey> = keys.iter().filter(of_log).cloned().collect();
        if keys.is_empty() {
            return Err(Refusal::UnknownLog);
        }
        note.verify(&keys).map_err(Refusal::Untrusted)?;
        if self.old > checkpoint.size {
            return Err(malformed(format!(
                "its old size is {}, but the checkpoint's is only {}",
                self.old, checkpoint.size
            )));
        }
        let empty = Hash::of(&[]);
        let (size, root) = latest.map_or((0, empty), |latest| (latest.size, latest.root));
        if self.old != size {
            return Err(Refusal::Conflict { size });
        }
        let problem = if checkpoint.size == 0 && checkpoint.root != empty {
            format!(
                "a log of size 0 does not have the root {}",
                base64(checkpoint.root)
            )
        } else if size == checkpoint.size && root != checkpoint.root {
            format!(
                "at size {size} the log had the root {}, and now it has the root {}",
                base64(root),
                base64(checkpoint.root)
            )
        } else if !tree::is_consistent(size, root, checkpoint.size, checkpoint.root, &self.path) {
            format!(
                "the proof of {} hashes does not show that the log of size {} and root {} begins with the one of size \
                 {size} and root {}",
                self.path.len(),
                checkpoint.size,
                base64(checkpoint.root),
                base64(root)
            )
        } else {
            return Ok(checkpoint);
        };
        Err(Refusal::Inconsistent(problem))
    }
}

impl fmt::Display for AddCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "old {}", self.old)?;
        for hash in &self.path {
            writeln!(f, "{}", base64(*hash))?;
        }
        write!(f, "\n{}", self.checkpoint)
    }
}

fn base64(hash: Hash) -> String {
    STANDARD.encode(hash.0)
}

#[cfg(test)]
mod tests;
