//! The blobs that records name: zstd, each under the SHA-256 of its stored bytes.

use std::{
    collections::HashSet,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use coalmine_judge::{chain::Hash, replay::Blobs};

use super::AppendError;
use crate::disk::{self, DiskError};

/// Largest content of a blob, in bytes: the evidence of 200,000 tenants on both arms.
pub const MAX_BLOB_BYTES: u64 = 1 << 29;

/// zstd's level: higher ones cost fifty times the time for a tenth of the size.
const ZSTD_LEVEL: i32 = 3;

/// Content that a record names.
#[derive(Debug, Clone)]
pub struct Blob {
    /// SHA-256 of the stored bytes.
    pub digest: Hash,
    pub(super) stored: Vec<u8>,
}

impl Blob {
    /// Packs some content.
    pub fn pack(content: &[u8]) -> Result<Self, AppendError> {
        let stored = zstd::bulk::compress(content, ZSTD_LEVEL)
            .map_err(|error| AppendError::Disk(error.to_string()))?;
        Ok(Self {
            digest: Hash::of(&stored),
            stored,
        })
    }
}

/// The blobs of a data directory.
#[derive(Debug, Clone)]
pub struct BlobStore {
    directory: PathBuf,
}

impl BlobStore {
    /// The blobs under a data directory.
    pub fn new(data: &Path) -> Self {
        Self {
            directory: data.join("evidence"),
        }
    }

    /// Where a blob is kept.
    pub fn path(&self, digest: &Hash) -> PathBuf {
        let name = digest.to_string();
        self.directory.join(name.get(..2).unwrap_or("")).join(&name)
    }

    /// Makes the directory, so that what is put into it lasts.
    pub(super) fn prepare(&self) -> Result<(), DiskError> {
        disk::create_dir(&self.directory)?;
        disk::sync_directory(&self.directory).map_err(|error| DiskError::io("sync", &self.directory, error))
    }

    pub(super) fn write(&self, blob: &Blob) -> io::Result<()> {
        self.write_stored(&blob.digest, &blob.stored)
    }

    pub(super) fn write_stored(&self, digest: &Hash, stored: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        if path.exists() {
            // It may have got its name a moment before a crash.
            return disk::sync_directory(&path);
        }
        if let Some(parent) = path.parent()
            && !parent.exists()
        {
            std::fs::create_dir_all(parent)?;
            disk::sync_directory(parent)?;
        }
        disk::replace(&path, stored)
    }

    /// Removes what no record names, if it is older than `age`; says how much that was.
    pub(super) fn remove_orphans(&self, named: &HashSet<Hash>, age: Duration) -> io::Result<u64> {
        let mut removed = 0;
        let directories = match std::fs::read_dir(&self.directory) {
            Ok(directories) => directories,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        for directory in directories {
            for file in std::fs::read_dir(directory?.path())? {
                let file = file?;
                let digest = file.file_name().to_str().and_then(|name| name.parse().ok());
                if digest.is_some_and(|digest| named.contains(&digest)) {
                    continue;
                }
                // A clock that was set back makes files young, which keeps them.
                let old = file.metadata()?.modified()?.elapsed().unwrap_or_default();
                if old >= age {
                    std::fs::remove_file(file.path())?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

impl Blobs for BlobStore {
    fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String> {
        let path = self.path(digest);
        let stored = std::fs::read(&path).map_err(|error| format!("cannot be read: {error}"))?;
        checked(digest, &stored)
    }
}

/// The content of a blob that was stored under this digest.
pub(super) fn checked(digest: &Hash, stored: &[u8]) -> Result<Vec<u8>, String> {
    let found = Hash::of(stored);
    if found != *digest {
        return Err(format!("was changed: its bytes hash to {found}"));
    }
    unpack(stored, MAX_BLOB_BYTES)
}

/// Unpacks what a blob is stored as, and no more than `max_bytes` of it.
pub fn unpack(stored: &[u8], max_bytes: u64) -> Result<Vec<u8>, String> {
    let decoder = zstd::Decoder::new(stored).map_err(|error| format!("cannot be unpacked: {error}"))?;
    let mut content = Vec::new();
    // One byte more than is allowed tells that there is more.
    match decoder
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut content)
    {
        Ok(bytes) if bytes as u64 <= max_bytes => Ok(content),
        Ok(_) => Err(format!("is larger than {max_bytes} bytes")),
        Err(error) => Err(format!("cannot be unpacked: {error}")),
    }
}
