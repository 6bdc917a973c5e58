//! The blobs that records name: zstd, each under the SHA-256 of its stored bytes.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use coalmine_judge::{chain::Hash, replay::Blobs};

use super::AppendError;
use crate::disk;

/// Largest content of a blob, in bytes.
const MAX_BLOB_BYTES: u64 = 1 << 30;

/// zstd's level: higher ones cost fifty times the time for a tenth of the size.
const ZSTD_LEVEL: i32 = 3;

/// Content that a record names.
#[derive(Debug, Clone)]
pub struct Blob {
    /// SHA-256 of the stored bytes.
    pub digest: Hash,
    stored: Vec<u8>,
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

    pub(super) fn write(&self, blob: &Blob) -> io::Result<()> {
        let path = self.path(&blob.digest);
        if path.exists() {
            return Ok(());
        }
        if let Some(parent) = path.parent()
            && !parent.exists()
        {
            std::fs::create_dir_all(parent)?;
            disk::sync_directory(parent)?;
        }
        disk::replace(&path, &blob.stored)
    }
}

impl Blobs for BlobStore {
    fn text(&self, digest: &Hash) -> Result<String, String> {
        let path = self.path(digest);
        let stored = std::fs::read(&path).map_err(|error| format!("cannot be read: {error}"))?;
        let found = Hash::of(&stored);
        if found != *digest {
            return Err(format!("was changed: its bytes hash to {found}"));
        }
        let decoder =
            zstd::Decoder::new(stored.as_slice()).map_err(|error| format!("cannot be unpacked: {error}"))?;
        let mut content = String::new();
        let read = decoder.take(MAX_BLOB_BYTES).read_to_string(&mut content);
        match read {
            Ok(bytes) if (bytes as u64) < MAX_BLOB_BYTES => Ok(content),
            Ok(_) => Err(format!("is larger than {MAX_BLOB_BYTES} bytes")),
            Err(error) => Err(format!("cannot be unpacked: {error}")),
        }
    }
}
