//! What a commit consists of, and the two places where it can go.

use std::{io, sync::Arc};

use coalmine_judge::{chain::Hash, replay::Blobs};

use super::{
    Blob, BlobStore,
    jsonl::{Jsonl, Lines},
    postgres::{PgLog, PgReader},
};

/// Records that are made durable together.
#[derive(Debug)]
pub(super) struct Group {
    /// What the records name; written before them.
    pub(super) blobs: Vec<Blob>,
    pub(super) lines: Vec<Line>,
    /// Position of the first line.
    pub(super) first: u64,
    /// When the first line was written.
    pub(super) time_ms: u64,
    /// The checkpoint that covers all of them.
    pub(super) note: String,
    /// The leaf hash of the record before, and of the last one.
    pub(super) prev: Hash,
    pub(super) head: Hash,
}

/// A record as it is kept.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) leaf: Hash,
    /// The decision's name, if it is one.
    pub(super) id: Option<String>,
}

/// Where records go.
#[derive(Debug)]
pub(super) enum Storage {
    Files(Box<Jsonl>),
    Postgres(PgLog),
}

impl Storage {
    /// Makes a group durable. After an error nothing of it is in the log. Says whether the checkpoint is there too.
    pub(super) fn commit(&mut self, group: &Group) -> io::Result<bool> {
        match self {
            Self::Files(files) => files.commit(group),
            Self::Postgres(log) => log.commit(group).map(|()| true),
        }
    }

    pub(super) fn keep_checkpoint(&self, note: &str) {
        match self {
            Self::Files(files) => files.keep_checkpoint(note),
            // The table has all of them.
            Self::Postgres(_) => {}
        }
    }
}

/// Where records and blobs are read from.
#[derive(Debug, Clone)]
pub(super) enum Reader {
    Files(Arc<Lines>, BlobStore),
    Postgres(PgReader),
}

impl Reader {
    /// Why what is written may not be this process's to write.
    pub(super) fn trouble(&self) -> Option<String> {
        match self {
            Self::Files(..) => None,
            Self::Postgres(reader) => reader.0.doubt(),
        }
    }

    /// One record's line.
    pub(super) fn line(&self, seq: u64) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Files(lines, _) => lines.read(seq),
            Self::Postgres(reader) => reader.line(seq),
        }
    }
}

impl Blobs for Reader {
    fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String> {
        match self {
            Self::Files(_, blobs) => blobs.bytes(digest),
            Self::Postgres(reader) => reader.bytes(digest),
        }
    }
}
