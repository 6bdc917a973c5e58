//! What a person does to a log while no aggregator runs: give it a new key, or open another one in its place.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use coalmine_judge::{
    chain,
    note::{Checkpoint, Note, NoteError, VerifierKey},
    record::{Body, Follows},
};

use super::{AppendError, Ledger, LedgerFiles, LogProblem, Options, Published, key, read_note};
use crate::{
    clock,
    disk::{self, DiskError},
    metrics::Metrics,
};

/// Gives a log a new key, which the one before endorses. Checkpoints are signed by both until `key.old` is taken away.
pub fn rotate_key(data: &Path, reason: String) -> Result<VerifierKey, DiskError> {
    let _lock = disk::lock(data)?;
    require_log(&LedgerFiles::new(data))?;
    let opened = Ledger::open(data, Options::default(), Arc::new(Metrics::new()), |_, _| {})?;
    let ledger = opened.ledger;
    ledger.begin();
    let current = key::current(data)?;
    let log = current.verifier().name().to_owned();
    let next = key::prepare(data, &log)?.verifier();
    let text = chain::rotation(&log, &next.to_string());
    let rotation = Body::KeyRotation {
        key: next.to_string(),
        reason,
        endorsed: current.sign(&text, 0).trim_end().to_owned(),
    };
    let appended = ledger.submit(rotation, Vec::new()).blocking_recv();
    let appended = appended.unwrap_or(Err(AppendError::Closed));
    drop(ledger.stop().blocking_recv());
    match appended {
        Ok(_) => Ok(next),
        Err(error) => Err(DiskError::io(
            "write the log in",
            data,
            io::Error::other(error.to_string()),
        )),
    }
}

/// Opens a new log in place of one that cannot go on, and names that one in its first record. The old files are put
/// aside; gives the directory that has them.
pub fn new_log(data: &Path, name: &str, reason: String) -> Result<PathBuf, DiskError> {
    let _lock = disk::lock(data)?;
    let files = LedgerFiles::new(data);
    if !files.checkpoint_path().exists() {
        require_log(&files)?;
    }
    let published = read_note(&files.checkpoint_path()).map_err(LogProblem::into_disk_error)?;
    let old = published.map(|published| known(data, &published)).transpose()?;
    if old.as_ref().is_some_and(|old| old.origin == name) {
        return Err(DiskError::Corrupt {
            path: files.checkpoint_path(),
            problem: format!("is of a log named {name} too; give the new log another --log-name"),
        });
    }
    let aside = data.join(format!("retired-{}", clock::now_ms()));
    disk::create_dir(&aside)?;
    // The key and the checkpoint go last: what breaks off in between is done again.
    let segments = files.segments().map_err(LogProblem::into_disk_error)?;
    let mut moved = vec![data.join("evidence"), files.history_path(), data.join("key.old")];
    moved.extend(segments.into_iter().rev().map(|segment| segment.path));
    moved.extend([data.join("key"), files.checkpoint_path()]);
    for path in moved.into_iter().filter(|path| path.exists()) {
        let to = path.file_name().map(|name| aside.join(name)).unwrap_or_default();
        let renamed = std::fs::rename(&path, &to).and_then(|()| disk::sync_directory(&to));
        renamed.map_err(|error| DiskError::io("rename", &path, error))?;
    }
    disk::sync_directory(&aside).map_err(|error| DiskError::io("sync", &aside, error))?;
    let options = Options {
        name: name.to_owned(),
        follows: old.map(|old| Follows {
            log: old.origin,
            size: old.size,
            root: old.root,
            reason,
        }),
        ..Options::default()
    };
    let opened = Ledger::open(data, options, Arc::new(Metrics::new()), |_, _| {})?;
    drop(opened.ledger.stop().blocking_recv());
    Ok(aside)
}

/// A log that is not there cannot be put in order: in a wrong directory one would be begun.
fn require_log(files: &LedgerFiles) -> Result<(), DiskError> {
    if files.exists() {
        return Ok(());
    }
    let not_found = io::ErrorKind::NotFound.into();
    Err(DiskError::io("find a decision log in", &files.data, not_found))
}

/// What a checkpoint says, if the key of the directory has signed it; without the key nothing vouches for it.
fn known(data: &Path, published: &Published) -> Result<Checkpoint, DiskError> {
    let refused = |error: NoteError| DiskError::Corrupt {
        path: data.join("checkpoint"),
        problem: error.to_string(),
    };
    match key::current(data) {
        Ok(key) => Checkpoint::open(&published.note, &[key.verifier()]).map_err(refused),
        Err(error) => {
            tracing::warn!(%error, "nothing vouches for the checkpoint of the old log");
            let note = Note::parse(&published.note).map_err(refused)?;
            Checkpoint::parse(note.unverified()).map_err(refused)
        }
    }
}
