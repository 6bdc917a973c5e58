//! A log as files, wherever it is kept: the same bytes, so the same hashes and the same signatures.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use coalmine_judge::chain::Hash;

use super::{BlobStore, LedgerFiles, LogProblem, Published, postgres};
use crate::{
    database::Database,
    disk::{self, DiskError},
};

/// What was exported.
#[derive(Debug)]
pub struct Exported {
    /// How many records.
    pub records: u64,
    /// How many blobs.
    pub blobs: u64,
    /// The Merkle root.
    pub root: Hash,
}

/// Copies a log and its evidence; refuses one that is not in order.
pub fn export_files(files: &LedgerFiles, to: &Path) -> Result<Exported, DiskError> {
    let mut target = Target::new(to)?;
    let scan = files
        .scan(|record, _, _| {
            target.line(record.to_line().as_bytes());
            target
                .named
                .extend(record.body.blobs().into_iter().map(|(_, digest)| digest));
        })
        .map_err(LogProblem::into_disk_error)?;
    for digest in target.named.clone() {
        let path = files.blobs.path(&digest);
        let stored = std::fs::read(&path).map_err(|error| DiskError::io("read", &path, error))?;
        target.blob(&digest, stored)?;
    }
    let kept = files.read_history().map_err(LogProblem::into_disk_error)?;
    let kept = kept.notes.into_iter().map(|published| published.note);
    target.finish(
        scan.published.as_ref(),
        kept,
        scan.chain.size(),
        scan.chain.root(),
    )
}

/// The same from a database, as it was at one moment.
pub async fn export_database(database: &Database, to: &Path) -> Result<Exported, DiskError> {
    let mut target = Target::new(to)?;
    let held = postgres::read(database, |record, _, line| {
        target.line(line);
        target
            .named
            .extend(record.body.blobs().into_iter().map(|(_, digest)| digest));
    })
    .await?;
    if held.chain.size() == 0 {
        return Err(DiskError::Corrupt {
            path: crate::database::table("log_entry"),
            problem: format!("has no log named {:?}", database.log),
        });
    }
    for digest in target.named.clone() {
        let stored = postgres::blob(database, &digest).await;
        let stored = stored.map_err(|problem| DiskError::Corrupt {
            path: crate::database::table("evidence_blob"),
            problem: format!("the blob {digest} {problem}"),
        })?;
        target.blob(&digest, stored)?;
    }
    let size = held.chain.size();
    let kept = postgres::notes(database, size).await?;
    target.finish(held.published.as_ref(), kept.into_iter(), size, held.chain.root())
}

struct Target {
    files: LedgerFiles,
    log: BufWriter<File>,
    /// The first error of the log's file; it is told at the end.
    failed: Option<std::io::Error>,
    named: BTreeSet<Hash>,
}

impl Target {
    fn new(to: &Path) -> Result<Self, DiskError> {
        disk::create_dir(to)?;
        let mut entries = std::fs::read_dir(to).map_err(|error| DiskError::io("read", to, error))?;
        if entries.next().is_some() {
            return Err(DiskError::Corrupt {
                path: to.to_owned(),
                problem: "is not empty, and nothing in it is overwritten".to_owned(),
            });
        }
        let files = LedgerFiles::new(to);
        files.blobs.prepare()?;
        let path = files.log_path();
        let log = File::create(&path).map_err(|error| DiskError::io("write", &path, error))?;
        Ok(Self {
            files,
            log: BufWriter::new(log),
            failed: None,
            named: BTreeSet::new(),
        })
    }

    fn line(&mut self, line: &[u8]) {
        let written = self.log.write_all(line).and_then(|()| self.log.write_all(b"\n"));
        if let Err(error) = written {
            self.failed.get_or_insert(error);
        }
    }

    fn blob(&self, digest: &Hash, stored: Vec<u8>) -> Result<(), DiskError> {
        let blobs: &BlobStore = &self.files.blobs;
        let written = blobs.write_stored(digest, &stored);
        written.map_err(|error| DiskError::io("write", &blobs.path(digest), error))
    }

    fn finish(
        mut self,
        published: Option<&Published>,
        kept: impl Iterator<Item = String>,
        records: u64,
        root: Hash,
    ) -> Result<Exported, DiskError> {
        let path = self.files.log_path();
        let written = self
            .failed
            .take()
            .map_or(Ok(()), Err)
            .and_then(|()| self.log.flush());
        written.map_err(|error| DiskError::io("write", &path, error))?;
        disk::sync_or_exit(self.log.get_ref(), &path);
        let note = published
            .map(|published| published.note.as_str())
            .unwrap_or_default();
        let history: String = kept.map(|note| note + "\n").collect();
        for (path, text) in [
            (self.files.checkpoint_path(), note),
            (self.files.history_path(), &history),
        ] {
            disk::replace(&path, text.as_bytes()).map_err(|error| DiskError::io("write", &path, error))?;
        }
        Ok(Exported {
            records,
            blobs: self.named.len() as u64,
            root,
        })
    }
}
