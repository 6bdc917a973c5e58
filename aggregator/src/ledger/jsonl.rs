//! The log as files: segments of lines, the checkpoint beside them, and a reserve for the day the disk is full.

use std::{
    collections::HashSet,
    fs::{File, Permissions},
    io,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use coalmine_judge::chain::Hash;

use super::{
    LedgerFiles, LogProblem,
    files::{Place, Scan},
    storage::Group,
};
use crate::{
    clock,
    disk::{self, DiskError},
};

/// Under load the checkpoint's file is written at most so often: it needs two syncs of its own.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(50);

/// How long to wait after it could not be written.
const CHECKPOINT_AGAIN: Duration = Duration::from_secs(1);

/// Largest reserve, in bytes.
const RESERVE_BYTES: u64 = 1 << 20;

/// Smallest reserve that is worth having.
const MIN_RESERVE_BYTES: u64 = 4 << 10;

/// Blobs that no record names are left for so long: a record may be on its way.
const ORPHAN_AGE: Duration = Duration::from_secs(3_600);

/// Where lines stand, for reading one without the others.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The segments' files, oldest first.
    files: RwLock<Vec<PathBuf>>,
    places: RwLock<Vec<Place>>,
}

impl Lines {
    pub(super) fn add(&self, places: impl IntoIterator<Item = Place>) {
        let mut all = self.places.write().unwrap_or_else(PoisonError::into_inner);
        all.extend(places);
    }

    /// Reads one line.
    pub(super) fn read(&self, seq: u64) -> io::Result<Option<Vec<u8>>> {
        let place = {
            let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
            usize::try_from(seq).ok().and_then(|seq| places.get(seq).copied())
        };
        let Some(place) = place else { return Ok(None) };
        let file = {
            // No file is renamed meanwhile.
            let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
            let path = files.get(place.segment as usize);
            path.map(File::open).transpose()?
        };
        let Some(file) = file else { return Ok(None) };
        let mut line = vec![0; place.length as usize];
        file.read_exact_at(&mut line, place.offset)?;
        Ok(Some(line))
    }

    fn set_files(&self, paths: Vec<PathBuf>) {
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = paths;
    }
}

/// The log as files.
#[derive(Debug)]
pub(super) struct Jsonl {
    files: LedgerFiles,
    lines: Arc<Lines>,
    current: File,
    /// Which segment is written to, counted from the oldest.
    segment: u32,
    /// Position and time of its first record, and its length.
    first: u64,
    since_ms: u64,
    bytes: u64,
    segment_bytes: u64,
    reserve: Reserve,
    /// When the checkpoint's file was written, and what should be in it if that is more.
    checkpoint_at: Option<Instant>,
    checkpoint_due: Option<String>,
    checkpoint_every: Duration,
    /// Whether the last commit had more than one record.
    busy: bool,
}

impl Jsonl {
    /// Opens the log for writing after it was read; sets an incomplete tail aside and says where to.
    pub(super) fn open(
        files: LedgerFiles,
        scan: &Scan,
        lines: Arc<Lines>,
        segment_bytes: u64,
    ) -> Result<(Self, Option<String>), DiskError> {
        let path = files.log_path();
        let torn = (scan.torn_bytes > 0).then(|| set_aside(&path, scan.current_bytes, scan.torn_bytes));
        let torn = torn.transpose()?;
        let (whole, rest) = scan.history;
        if rest > 0 {
            set_aside(&files.history_path(), whole, rest)?;
        }
        let current = disk::open_append(&path)?;
        disk::sync_directory(&path).map_err(|error| DiskError::io("sync", &path, error))?;
        let segments = files.segments().map_err(LogProblem::into_disk_error)?;
        let last = segments.len().saturating_sub(1);
        lines.set_files(segments.into_iter().map(|segment| segment.path).collect());
        let mut reserve = Reserve::new(&files.data);
        reserve.refill();
        let jsonl = Self {
            lines,
            current,
            segment: u32::try_from(last).unwrap_or(u32::MAX),
            first: scan.current_first,
            since_ms: scan.current_since_ms,
            bytes: scan.current_bytes,
            segment_bytes,
            reserve,
            checkpoint_at: None,
            checkpoint_due: None,
            checkpoint_every: CHECKPOINT_EVERY,
            busy: false,
            files,
        };
        Ok((jsonl, torn))
    }

    /// Makes a group durable: blobs, then lines, then the checkpoint, each synced. After an error nothing of the group is
    /// in the log; says whether the checkpoint is there as well.
    pub(super) fn commit(&mut self, group: &Group) -> io::Result<bool> {
        if self.reserve.is_spent() && !self.reserve.refill() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.write(group)
    }

    /// The same, on the reserve: for the record that says that the disk is full.
    pub(super) fn commit_last(&mut self, group: &Group) -> io::Result<bool> {
        self.reserve.spend();
        self.write(group)
    }

    fn write(&mut self, group: &Group) -> io::Result<bool> {
        for blob in &group.blobs {
            self.files.blobs.write(blob)?;
        }
        let mut bytes = Vec::new();
        let mut places = Vec::with_capacity(group.lines.len());
        for line in &group.lines {
            places.push(Place {
                segment: self.segment,
                length: u32::try_from(line.text.len()).unwrap_or(u32::MAX),
                offset: self.bytes + bytes.len() as u64,
            });
            bytes.extend_from_slice(line.text.as_bytes());
            bytes.push(b'\n');
        }
        disk::append_durably(&mut self.current, &self.files.log_path(), &bytes)?;
        if self.bytes == 0 {
            self.since_ms = group.time_ms;
        }
        self.bytes += bytes.len() as u64;
        self.lines.add(places);
        // The records are on disk, whatever becomes of the checkpoint: a log that is longer than it is signed again.
        self.checkpoint_due = Some(group.note.clone());
        // Records that come together mean that more are waiting.
        let busy = group.lines.len() > 1;
        let waits = std::mem::replace(&mut self.busy, busy) || busy;
        let recent = self
            .checkpoint_at
            .is_some_and(|at| at.elapsed() < self.checkpoint_every);
        Ok((waits && recent) || self.write_checkpoint())
    }

    /// How long the checkpoint's file may still wait; none if it says what it should.
    pub(super) fn checkpoint_due_in(&self) -> Option<Duration> {
        self.checkpoint_due.as_ref()?;
        let every = self.checkpoint_every;
        let since = self.checkpoint_at.map_or(every, |at| at.elapsed());
        Some(every.saturating_sub(since))
    }

    /// Writes the checkpoint's file, if it does not say what it should; says whether it does then.
    pub(super) fn write_checkpoint(&mut self) -> bool {
        let Some(note) = self.checkpoint_due.take() else {
            return true;
        };
        self.checkpoint_at = Some(Instant::now());
        match disk::replace(&self.files.checkpoint_path(), note.as_bytes()) {
            Ok(()) => {
                self.checkpoint_every = CHECKPOINT_EVERY;
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot write the checkpoint of the decision log");
                self.checkpoint_every = CHECKPOINT_AGAIN;
                self.checkpoint_due = Some(note);
                false
            }
        }
    }

    /// Whether the current segment is large or old enough; gives the position of its first record and its length.
    pub(super) fn wants_seal(&self, now_ms: u64, max_age_ms: u64) -> Option<(u64, u64)> {
        let old = self.since_ms.saturating_add(max_age_ms) <= now_ms;
        (self.bytes > 0 && (self.bytes >= self.segment_bytes || old)).then_some((self.first, self.bytes))
    }

    /// Begins a new segment; `size` is the length of the log, and its last record seals the current one.
    pub(super) fn seal(&mut self, size: u64) -> Result<(), DiskError> {
        let current = self.files.log_path();
        let sealed = self.files.sealed_path(self.first);
        // Whoever reads a line meanwhile waits.
        let mut paths = self.lines.files.write().unwrap_or_else(PoisonError::into_inner);
        std::fs::rename(&current, &sealed).map_err(|error| DiskError::io("rename", &current, error))?;
        let opened = disk::sync_directory(&sealed)
            .map_err(|error| DiskError::io("sync", &sealed, error))
            .and_then(|()| disk::open_append(&current))
            .and_then(|file| {
                let synced = disk::sync_directory(&current);
                synced.map_err(|error| DiskError::io("sync", &current, error))?;
                Ok(file)
            });
        match opened {
            Ok(file) => self.current = file,
            Err(error) => {
                // What is written next must not go into a file that is called sealed.
                let back = std::fs::rename(&sealed, &current).and_then(|()| disk::sync_directory(&current));
                disk::or_exit(back, &sealed);
                return Err(error);
            }
        }
        if let Some(last) = paths.last_mut() {
            last.clone_from(&sealed);
        }
        paths.push(current);
        drop(paths);
        (self.first, self.bytes, self.since_ms) = (size, 0, 0);
        self.segment += 1;
        // Sealed as far as the system goes; what really seals it is the chain.
        if let Err(error) = std::fs::set_permissions(&sealed, Permissions::from_mode(0o444)) {
            tracing::warn!(%error, path = %sealed.display(), "cannot make a sealed segment read-only");
        }
        Ok(())
    }

    /// Keeps a checkpoint for good, beside those before it.
    pub(super) fn keep_checkpoint(&self, note: &str) {
        let path = self.files.history_path();
        let kept = disk::open_append(&path).and_then(|mut file| {
            disk::append_durably(&mut file, &path, format!("{note}\n").as_bytes())
                .and_then(|()| disk::sync_directory(&path))
                .map_err(|error| DiskError::io("write", &path, error))
        });
        if let Err(error) = kept {
            tracing::warn!(%error, "cannot keep a checkpoint");
        }
    }

    /// Removes blobs and temporary files that no record names and that are too old to be on their way.
    pub(super) fn collect_orphans(&self, named: &HashSet<Hash>) {
        match self.files.blobs.remove_orphans(named, ORPHAN_AGE) {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "evidence that no record names was removed"),
            Err(error) => tracing::warn!(%error, "cannot look for evidence that no record names"),
        }
    }

    /// Whether not even the reserve could be taken.
    pub(super) fn is_full(&self) -> bool {
        self.reserve.is_spent()
    }

    /// Bytes that are free for this process.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        free_bytes(&self.files.data)
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Space that is kept for the record that says that there is none left.
#[derive(Debug)]
struct Reserve {
    path: PathBuf,
    spent: bool,
}

impl Reserve {
    fn new(data: &Path) -> Self {
        Self {
            path: data.join("reserve"),
            spent: true,
        }
    }

    fn is_spent(&self) -> bool {
        self.spent
    }

    /// Takes the space, at most a sixteenth of what is free; says whether it is there.
    fn refill(&mut self) -> bool {
        if self.path.exists() {
            self.spent = false;
            return true;
        }
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let bytes = free_bytes(directory).unwrap_or(0) / 16 / MIN_RESERVE_BYTES * MIN_RESERVE_BYTES;
        let bytes = bytes.clamp(MIN_RESERVE_BYTES, RESERVE_BYTES);
        let taken = File::create(&self.path).and_then(|file| {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
            Ok(())
        });
        self.spent = match taken {
            Ok(()) => false,
            Err(error) => {
                self.give_up();
                // A file system that cannot set space aside has no reserve; it may have space all the same.
                disk::is_full(&error)
            }
        };
        !self.spent
    }

    fn spend(&mut self) {
        self.give_up();
        self.spent = true;
    }

    fn give_up(&self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "cannot give the reserve up");
        }
    }
}

/// Moves what stands after the last whole record to a file of its own; gives its name.
fn set_aside(path: &Path, whole: u64, torn: u64) -> Result<String, DiskError> {
    let fail = |error| DiskError::io("mend", path, error);
    let content = std::fs::read(path).map_err(fail)?;
    let keep = usize::try_from(whole).unwrap_or(usize::MAX).min(content.len());
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let aside = path.with_extension(format!("{extension}.torn-{}", clock::now_ms()));
    disk::replace(&aside, content.get(keep..).unwrap_or_default()).map_err(fail)?;
    let file = std::fs::OpenOptions::new().write(true).open(path).map_err(fail)?;
    file.set_len(whole).map_err(fail)?;
    disk::sync_or_exit(&file, path);
    tracing::warn!(
        bytes = torn,
        kept_in = %aside.display(),
        path = %path.display(),
        "the end of a file was not whole, and nobody was answered with it; it was set aside"
    );
    let name = aside.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(name.unwrap_or_default())
}
