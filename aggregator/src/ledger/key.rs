//! The keys that sign a log's checkpoints: made with the log, and replaced only by a record that says so.
//!
//! ```text
//! DATA/key       signs
//! DATA/key.old   signed before, and still does while others learn the new one; take it away to end that
//! DATA/key.next  the key of a rotation that is not finished
//! ```

use std::{
    io,
    path::{Path, PathBuf},
};

use coalmine_judge::note::{Kind, SignerKey, VerifierKey};

use crate::disk::{self, DiskError};

/// The keys that sign.
#[derive(Debug)]
pub(super) struct Keys {
    /// The key that must sign.
    pub(super) current: SignerKey,
    /// The one before, while it signs too.
    old: Option<SignerKey>,
}

impl Keys {
    pub(super) fn all(&self) -> impl Iterator<Item = &SignerKey> {
        [&self.current].into_iter().chain(&self.old)
    }
}

/// Reads the keys of a data directory; makes one if there is no log yet. `known` are the keys that the log names, the
/// newest last.
pub(super) fn open(data: &Path, log: &str, known: &[VerifierKey]) -> Result<Keys, DiskError> {
    let path = data.join("key");
    finish_rotation(data, known)?;
    let Some(key) = read(&path)? else {
        if !known.is_empty() {
            return Err(corrupt(
                &path,
                "is missing, and a log that exists gets no other key unasked".to_owned(),
            ));
        }
        let current = make(log, &path)?;
        tracing::info!(
            key = %current.verifier(),
            "a key was made that signs the decision log; keep this line elsewhere, for checking the log with it, and \
             a backup of the key's file"
        );
        return Ok(Keys { current, old: None });
    };
    let verifier = key.verifier();
    if verifier.name() != log {
        return Err(corrupt(
            &path,
            format!("is the key of {:?}, but the log is {log:?}", verifier.name()),
        ));
    }
    if known.last().is_some_and(|known| *known != verifier) {
        return Err(corrupt(
            &path,
            format!("is {verifier}, which the log does not name as its key"),
        ));
    }
    let old = read(&data.join("key.old"))?.filter(|old| known.contains(&old.verifier()));
    Ok(Keys { current: key, old })
}

/// Makes the key of a rotation; it signs once the log names it.
pub(super) fn prepare(data: &Path, log: &str) -> Result<SignerKey, DiskError> {
    make(log, &data.join("key.next"))
}

/// The key that signs now.
pub(super) fn current(data: &Path) -> Result<SignerKey, DiskError> {
    let path = data.join("key");
    read(&path)?.ok_or_else(|| DiskError::io("read", &path, io::ErrorKind::NotFound.into()))
}

/// The key of the rotation that is being recorded.
pub(super) fn next(data: &Path) -> Result<SignerKey, DiskError> {
    let path = data.join("key.next");
    read(&path)?.ok_or_else(|| corrupt(&path, "is missing, and the log is about to name it".to_owned()))
}

/// Puts the keys of a rotation, which the log names, in their places. The same after a crash in the middle.
fn finish_rotation(data: &Path, known: &[VerifierKey]) -> Result<(), DiskError> {
    let (path, next) = (data.join("key"), data.join("key.next"));
    let Some(key) = read(&next)? else { return Ok(()) };
    if known.last() != Some(&key.verifier()) {
        // The log never named it.
        return std::fs::remove_file(&next).map_err(|error| DiskError::io("remove", &next, error));
    }
    let rename = |from: &Path, to: &Path| {
        std::fs::rename(from, to).map_err(|error| DiskError::io("rename", from, error))?;
        disk::sync_directory(to).map_err(|error| DiskError::io("sync", to, error))
    };
    if read(&path)?.is_some() {
        rename(&path, &data.join("key.old"))?;
    }
    rename(&next, &path)
}

fn read(path: &Path) -> Result<Option<SignerKey>, DiskError> {
    match std::fs::read_to_string(path) {
        Ok(text) => SignerKey::parse(&text)
            .map(Some)
            .map_err(|error| corrupt(path, error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DiskError::io("read", path, error)),
    }
}

fn make(log: &str, path: &Path) -> Result<SignerKey, DiskError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| DiskError::io("make the key in", path, io::Error::other(error)))?;
    let key = SignerKey::from_seed(log, Kind::Ed25519, &seed);
    disk::replace_secret(path, key.to_secret_text().as_bytes())
        .map_err(|error| DiskError::io("write", path, error))?;
    Ok(key)
}

fn corrupt(path: &Path, problem: String) -> DiskError {
    DiskError::Corrupt {
        path: PathBuf::from(path),
        problem,
    }
}
