//! Files that must not lie: appended with group commit, synced before anybody is answered.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The system refused.
    #[error("cannot {what} {}: {source}; {remedy}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// Another process has the directory.
    #[error("{} is in use by another aggregator; stop it or choose another --data directory", .0.display())]
    InUse(PathBuf),
    /// The content is not what was written.
    #[error("{}: {problem}; restore it from a backup, or keep it aside and start with an empty --data directory", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
}

impl DiskError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        let remedy = match source.kind() {
            io::ErrorKind::PermissionDenied => "check who owns it",
            io::ErrorKind::StorageFull => "free some space",
            io::ErrorKind::NotFound => "check the path",
            _ => "check the disk",
        };
        Self::Io {
            what,
            path: path.to_owned(),
            source,
            remedy,
        }
    }
}

/// Whether there is no space left.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

/// Creates a directory and its parents.
pub(crate) fn create_dir(path: &Path) -> Result<(), DiskError> {
    std::fs::create_dir_all(path).map_err(|error| DiskError::io("create", path, error))
}

/// Takes the directory for this process, for as long as the file is held.
pub(crate) fn lock(directory: &Path) -> Result<File, DiskError> {
    let path = directory.join(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| DiskError::io("open", &path, error))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DiskError::InUse(directory.to_owned())),
        Err(error) => Err(DiskError::io("lock", &path, error.into())),
    }
}

/// Opens a file for appending.
pub(crate) fn open_append(path: &Path) -> Result<File, DiskError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| DiskError::io("open", path, error))
}

/// Writes a whole file so that either the old or the new content is there, whatever happens.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    replace_with(path, content, 0o666)
}

/// The same, for the owner's eyes only.
pub(crate) fn replace_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    replace_with(path, content, 0o600)
}

fn replace_with(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)?;
    if let Err(error) = file.write_all(content) {
        // What there was of it must not take the space of others.
        drop(std::fs::remove_file(&temporary));
        return Err(error);
    }
    sync_or_exit(&file, &temporary);
    std::fs::rename(&temporary, path)?;
    sync_directory(path)
}

/// Syncs a file with all that belongs to it. A failed sync ends the process: the kernel may have dropped the pages and
/// would say yes the next time, so nothing that this process knows of the file is certain any more.
pub(crate) fn sync_or_exit(file: &File, path: &Path) {
    or_exit(file.sync_all(), path);
}

/// Ends the process if something failed after which it is not known what is on disk.
#[allow(clippy::exit, reason = "see sync_or_exit")]
pub(crate) fn or_exit(result: io::Result<()>, path: &Path) {
    if let Err(error) = result {
        tracing::error!(path = %path.display(), %error, "exiting, since it is not known what is on disk");
        std::process::exit(1);
    }
}

/// Syncs the directory that holds `path`, so that a new name in it lasts.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        // A bare name is in the directory that the process is in.
        Some(directory) if directory.as_os_str().is_empty() => Path::new("."),
        Some(directory) => directory,
        None => return Ok(()),
    };
    sync_or_exit(&File::open(directory)?, directory);
    Ok(())
}

/// Appends and syncs. After an error nothing of `bytes` is in the file.
pub(crate) fn append_durably(file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.len();
    if let Err(error) = file.write_all(bytes) {
        or_exit(file.set_len(before).and_then(|()| file.sync_all()), path);
        return Err(error);
    }
    or_exit(file.sync_data(), path);
    Ok(())
}
