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
    // What is about to be done is written down first, so that what breaks off is done again, and the same.
    let plan = data.join("new-log");
    let (aside, follows) = match read_plan(&plan)? {
        Some(begun) => begun,
        None => {
            let begun = plan_for(data, &files, name, reason)?;
            let text = serde_json::to_string(&begun).unwrap_or_default();
            disk::replace(&plan, text.as_bytes()).map_err(|error| DiskError::io("write", &plan, error))?;
            begun
        }
    };
    let aside = data.join(aside);
    disk::create_dir(&aside)?;
    let segments = files.segments().map_err(LogProblem::into_disk_error)?;
    let mut moved: Vec<PathBuf> = segments.into_iter().rev().map(|segment| segment.path).collect();
    let names = ["evidence", "checkpoints.txt", "checkpoint", "key.old", "key"];
    moved.extend(names.map(|name| data.join(name)));
    for path in moved.into_iter().filter(|path| path.exists()) {
        let to = path.file_name().map(|name| aside.join(name)).unwrap_or_default();
        let renamed = std::fs::rename(&path, &to).and_then(|()| disk::sync_directory(&to));
        renamed.map_err(|error| DiskError::io("rename", &path, error))?;
    }
    disk::sync_directory(&aside).map_err(|error| DiskError::io("sync", &aside, error))?;
    let options = Options {
        name: name.to_owned(),
        follows,
        ..Options::default()
    };
    let opened = Ledger::open(data, options, Arc::new(Metrics::new()), |_, _| {})?;
    drop(opened.ledger.stop().blocking_recv());
    std::fs::remove_file(&plan).map_err(|error| DiskError::io("remove", &plan, error))?;
    Ok(aside)
}

/// Where the old files go, and what the new log will say of the old one.
type Plan = (String, Option<Follows>);

fn read_plan(path: &Path) -> Result<Option<Plan>, DiskError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| DiskError::Corrupt {
                path: path.to_owned(),
                problem: format!("is no plan of a new log: {error}"),
            }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DiskError::io("read", path, error)),
    }
}

fn plan_for(data: &Path, files: &LedgerFiles, name: &str, reason: String) -> Result<Plan, DiskError> {
    require_log(files)?;
    let published = read_note(&files.checkpoint_path()).map_err(LogProblem::into_disk_error)?;
    let old = published.map(|published| known(data, &published)).transpose()?;
    if old.as_ref().is_some_and(|old| old.origin == name) {
        return Err(DiskError::Corrupt {
            path: files.checkpoint_path(),
            problem: format!("is of a log named {name} too; give the new log another --log-name"),
        });
    }
    let follows = old.map(|old| Follows {
        log: old.origin,
        size: old.size,
        root: old.root,
        reason,
    });
    Ok((format!("retired-{}", clock::now_ms()), follows))
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
