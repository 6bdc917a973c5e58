//! The decision log on disk and the blobs that its records name.
//!
//! ```text
//! DATA/decisions.jsonl       one record a line; the form is described in coalmine_judge::record
//! DATA/checkpoint            log name, number of records, Merkle root; replaced after each commit
//! DATA/evidence/ab/ab12...   blobs: zstd, named by the SHA-256 of their stored bytes
//! DATA/decisions.jsonl.torn-T  what stood after the last whole record when the log was opened at time T
//! DATA/.lock                 held by the process that writes
//! ```
//!
//! Order of a commit: the blobs, synced; the lines, synced; the checkpoint, synced; then the callers are
//! answered. So a record without its blobs cannot exist, and an answered record is on disk.
//!
//! On opening, the longest prefix of whole, linked records is kept; an incomplete last line is set aside.
//! A log that is shorter than its checkpoint, or differs from it, or is wrong in the middle, is refused.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Sender},
    },
    time::Instant,
};

use coalmine_judge::{
    chain::{Chain, Hash, base64, parse_checkpoint},
    record::{Body, Record},
    replay::Blobs,
};
use foldhash::HashMap;
use tokio::sync::oneshot;

use crate::{
    BUILD, clock,
    disk::{self, DiskError},
    metrics::Metrics,
};

/// Largest content of a blob, in bytes.
const MAX_BLOB_BYTES: u64 = 1 << 30;

/// zstd's level: higher ones cost fifty times the time for a tenth of the size.
const ZSTD_LEVEL: i32 = 3;

/// A record that is on disk.
#[derive(Debug, Clone)]
pub struct Appended {
    /// The record.
    pub record: Record,
    /// Its leaf hash.
    pub hash: Hash,
}

/// Why a record was not written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// The disk refused.
    #[error("the decision log cannot be written: {0}")]
    Disk(String),
    /// It cannot be a record.
    #[error("the record is refused: {0}")]
    Refused(String),
    /// The server is stopping.
    #[error("the decision log is closed")]
    Closed,
}

struct Job {
    body: Body,
    blobs: Vec<Blob>,
    answer: oneshot::Sender<Result<Appended, AppendError>>,
}

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

    fn write(&self, blob: &Blob) -> io::Result<()> {
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

/// The decision log of a running aggregator.
#[derive(Debug, Clone)]
pub struct Ledger {
    queue: Sender<Job>,
    writable: Arc<AtomicBool>,
    index: Arc<RwLock<Index>>,
    /// Where decisions are read from.
    pub files: LedgerFiles,
}

/// What was found when the log was opened.
#[derive(Debug)]
pub struct Opened {
    /// The log, ready for records.
    pub ledger: Ledger,
    /// How many records there were.
    pub records: u64,
}

/// The files of a log, for reading.
#[derive(Debug, Clone)]
pub struct LedgerFiles {
    data: PathBuf,
    /// The blobs.
    pub blobs: BlobStore,
}

/// Where a record's line stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    offset: u64,
    length: usize,
}

/// Where records are, so that one can be read without the others.
#[derive(Debug, Default)]
pub struct Index {
    places: Vec<Place>,
    decisions: HashMap<String, u64>,
    /// Positions of each rollout's decisions, in order.
    rollouts: BTreeMap<String, Vec<u64>>,
}

impl Index {
    fn add(&mut self, record: &Record, place: Place) {
        self.places.push(place);
        if let Body::Decision(decision) = &record.body {
            self.decisions.insert(decision.id.clone(), record.seq);
            self.rollouts
                .entry(decision.rollout.clone())
                .or_default()
                .push(record.seq);
        }
    }

    /// The position of a decision.
    pub fn decision(&self, id: &str) -> Option<u64> {
        self.decisions.get(id).copied()
    }

    /// The positions of a rollout's decisions; of all decisions without one.
    pub fn decisions(&self, rollout: Option<&str>) -> Vec<u64> {
        match rollout {
            Some(rollout) => self.rollouts.get(rollout).cloned().unwrap_or_default(),
            None => {
                let mut all: Vec<u64> = self.decisions.values().copied().collect();
                all.sort_unstable();
                all
            }
        }
    }
}

/// What is wrong with a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct LogProblem {
    /// The file.
    pub file: PathBuf,
    /// What is wrong, with the number of the record.
    pub problem: String,
}

/// A log as it was read.
#[derive(Debug)]
pub struct Scan {
    /// The chain up to there.
    pub chain: Chain,
    /// Length of the whole records in bytes.
    pub whole_bytes: u64,
    /// Bytes after the last newline.
    pub torn_bytes: u64,
    /// How many records the checkpoint covers.
    pub covered: u64,
}

impl LedgerFiles {
    /// The log under a data directory.
    pub fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
            blobs: BlobStore::new(data),
        }
    }

    /// The log's file.
    pub fn log_path(&self) -> PathBuf {
        self.data.join("decisions.jsonl")
    }

    fn checkpoint_path(&self) -> PathBuf {
        self.data.join("checkpoint")
    }

    /// Reads the whole log, gives each record to `each`, and holds all against the checkpoint.
    pub fn scan(&self, mut each: impl FnMut(Record, Hash, Place)) -> Result<Scan, LogProblem> {
        let path = self.log_path();
        let problem = |problem: String| LogProblem {
            file: path.clone(),
            problem,
        };
        let checkpoint = self.read_checkpoint()?;
        let file = match File::open(&path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(problem(format!("cannot be read: {error}"))),
        };
        let mut scan = Scan {
            chain: Chain::default(),
            whole_bytes: 0,
            torn_bytes: 0,
            covered: 0,
        };
        let mut reader = file.map(BufReader::new);
        let mut line = Vec::new();
        while let Some(reader) = &mut reader {
            line.clear();
            let read = reader
                .read_until(b'\n', &mut line)
                .map_err(|error| problem(format!("cannot be read: {error}")))?;
            if read == 0 {
                break;
            }
            if line.pop_if(|last| *last == b'\n').is_none() {
                scan.torn_bytes = read as u64;
                break;
            }
            let record = scan
                .chain
                .accept(&line)
                .map_err(|error| problem(error.to_string()))?;
            let place = Place {
                offset: scan.whole_bytes,
                length: line.len(),
            };
            scan.whole_bytes += read as u64;
            each(record, scan.chain.head().unwrap_or(Hash::ZERO), place);
            if let Some((log, size, root)) = &checkpoint
                && scan.chain.size() == *size
            {
                if scan.chain.log() != Some(log) || base64(&scan.chain.root().0) != *root {
                    return Err(problem(format!(
                        "record {} or one before it differs from what the checkpoint of {size} records covers",
                        size - 1
                    )));
                }
                scan.covered = *size;
            }
        }
        if let Some((_, size, _)) = checkpoint
            && scan.chain.size() < size
        {
            return Err(problem(format!(
                "ends after record {}, but the checkpoint covers {size} records: the log was cut",
                scan.chain.size().saturating_sub(1)
            )));
        }
        Ok(scan)
    }

    fn read_checkpoint(&self) -> Result<Option<(String, u64, String)>, LogProblem> {
        let path = self.checkpoint_path();
        match std::fs::read_to_string(&path) {
            Ok(text) => parse_checkpoint(&text).map(Some).ok_or_else(|| LogProblem {
                file: path,
                problem: "is not a checkpoint (three lines: log, size, root)".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogProblem {
                file: path,
                problem: format!("cannot be read: {error}"),
            }),
        }
    }
}

impl Ledger {
    /// Opens the log of a data directory, or begins one.
    pub fn open(data: &Path, name: &str, metrics: Arc<Metrics>) -> Result<Opened, DiskError> {
        let files = LedgerFiles::new(data);
        let mut index = Index::default();
        let scan = files
            .scan(|record, _, place| index.add(&record, place))
            .map_err(|error| DiskError::Corrupt {
                path: error.file,
                problem: error.problem,
            })?;
        let path = files.log_path();
        if scan.covered == 0 && scan.chain.size() > 1 {
            let problem = "is missing, so nobody can tell whether the log was cut".to_owned();
            return Err(DiskError::Corrupt {
                path: files.checkpoint_path(),
                problem,
            });
        }
        if scan.torn_bytes > 0 {
            set_aside(&path, scan.whole_bytes, scan.torn_bytes)?;
        }
        let file = disk::open_append(&path)?;
        disk::sync_directory(&path).map_err(|error| DiskError::io("sync", &path, error))?;
        let (queue, jobs) = mpsc::channel();
        let writable = Arc::new(AtomicBool::new(true));
        let log = scan.chain.log().unwrap_or(name).to_owned();
        let mut writer = Writer {
            log,
            chain: scan.chain,
            file,
            files: files.clone(),
            metrics,
            writable: Arc::clone(&writable),
            index: Arc::new(RwLock::new(index)),
            has_checkpoint: true,
        };
        let index = Arc::clone(&writer.index);
        if writer.chain.size() == 0 {
            let start = Body::LogStart {
                build: BUILD.to_owned(),
            };
            writer
                .write(vec![(start, Vec::new())])
                .map_err(|error| DiskError::io("write", &path, error))?;
        } else if scan.covered < writer.chain.size() {
            writer
                .write_checkpoint()
                .map_err(|error| DiskError::io("write", &path, error))?;
        }
        let records = writer.chain.size();
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(|error| DiskError::io("start the writer of", &path, error))?;
        Ok(Opened {
            ledger: Self {
                queue,
                writable,
                index,
                files,
            },
            records,
        })
    }

    /// Queues a record and its blobs; the answer comes when they are on disk. It is written even if nobody waits
    /// for the answer. Each caller waits before it queues more, so the queue is bounded by the callers.
    pub fn submit(&self, body: Body, blobs: Vec<Blob>) -> oneshot::Receiver<Result<Appended, AppendError>> {
        let (answer, answered) = oneshot::channel();
        // When the writer is gone the answer's sender is dropped, which the receiver sees.
        drop(self.queue.send(Job { body, blobs, answer }));
        answered
    }

    /// Appends a record and its blobs; returns when they are on disk.
    pub async fn append(&self, body: Body, blobs: Vec<Blob>) -> Result<Appended, AppendError> {
        self.submit(body, blobs).await.unwrap_or(Err(AppendError::Closed))
    }

    /// Where records are.
    pub fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one record and its hash.
    pub fn read(&self, seq: u64) -> io::Result<Option<Appended>> {
        let place = usize::try_from(seq)
            .ok()
            .and_then(|seq| self.index().places.get(seq).copied());
        let Some(place) = place else { return Ok(None) };
        let mut line = vec![0; place.length];
        File::open(self.files.log_path())?.read_exact_at(&mut line, place.offset)?;
        let record = serde_json::from_slice(&line)?;
        Ok(Some(Appended {
            record,
            hash: Hash::leaf(&line),
        }))
    }

    /// Whether the last append succeeded. Nothing is approved while it is not so.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }
}

/// Moves what stands after the last whole record to a file of its own.
fn set_aside(path: &Path, whole: u64, torn: u64) -> Result<(), DiskError> {
    let fail = |error| DiskError::io("mend", path, error);
    let content = std::fs::read(path).map_err(fail)?;
    let keep = usize::try_from(whole).unwrap_or(usize::MAX).min(content.len());
    let aside = path.with_extension(format!("jsonl.torn-{}", clock::now_ms()));
    disk::replace(&aside, content.get(keep..).unwrap_or_default()).map_err(fail)?;
    let file = std::fs::OpenOptions::new().write(true).open(path).map_err(fail)?;
    file.set_len(whole).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    tracing::warn!(
        bytes = torn,
        kept_in = %aside.display(),
        "the decision log ended in an incomplete record, which nobody was answered; it was set aside"
    );
    Ok(())
}

struct Writer {
    log: String,
    chain: Chain,
    file: File,
    files: LedgerFiles,
    metrics: Arc<Metrics>,
    writable: Arc<AtomicBool>,
    index: Arc<RwLock<Index>>,
    /// Whether the checkpoint covers the log.
    has_checkpoint: bool,
}

impl Writer {
    fn run(mut self, jobs: &mpsc::Receiver<Job>) {
        while let Some(group) = disk::next_group(jobs) {
            let begun = Instant::now();
            let mut answers = Vec::with_capacity(group.len());
            let mut bodies = Vec::with_capacity(group.len());
            for job in group {
                answers.push(job.answer);
                bodies.push((job.body, job.blobs));
            }
            let result = self.write(bodies);
            self.set_writable(result.is_ok() && self.has_checkpoint);
            self.metrics
                .audit_append_seconds
                .observe(begun.elapsed().as_secs_f64());
            match result {
                Ok(results) => {
                    for (answer, result) in answers.into_iter().zip(results) {
                        if let Ok(appended) = &result {
                            self.metrics.audit_record(appended.record.body.kind());
                        }
                        // A caller that has gone away needs no answer.
                        drop(answer.send(result));
                    }
                }
                Err(error) => {
                    tracing::error!(%error, log = %self.files.log_path().display(), "cannot write the decision log");
                    for answer in answers {
                        drop(answer.send(Err(AppendError::Disk(error.to_string()))));
                    }
                }
            }
        }
    }

    fn set_writable(&self, writable: bool) {
        self.writable.store(writable, Ordering::Relaxed);
        self.metrics.audit_writable.set(i64::from(writable));
    }

    /// Writes a group: blobs, lines, checkpoint, each synced. On an error nothing of the group is in the log; a
    /// record that cannot be one is refused alone.
    fn write(&mut self, group: Vec<(Body, Vec<Blob>)>) -> io::Result<Vec<Result<Appended, AppendError>>> {
        for blob in group.iter().flat_map(|(_, blobs)| blobs) {
            self.files.blobs.write(blob)?;
        }
        let mut chain = self.chain.clone();
        let mut lines = Vec::new();
        let mut places = Vec::with_capacity(group.len());
        let mut results = Vec::with_capacity(group.len());
        let before = self.file.metadata()?.len();
        for (body, _) in group {
            results.push(match chain.append(&self.log, clock::now_ms(), body) {
                Ok((record, line, hash)) => {
                    places.push(Place {
                        offset: before + lines.len() as u64,
                        length: line.len(),
                    });
                    lines.extend_from_slice(line.as_bytes());
                    lines.push(b'\n');
                    Ok(Appended { record, hash })
                }
                Err(error) => Err(AppendError::Refused(error.to_string())),
            });
        }
        disk::append_durably(&mut self.file, &self.files.log_path(), &lines)?;
        self.chain = chain;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for (appended, place) in results
            .iter()
            .filter_map(|result| result.as_ref().ok())
            .zip(places)
        {
            index.add(&appended.record, place);
        }
        drop(index);
        // The records are on disk, whatever becomes of the checkpoint; it is written again with the next group.
        let checkpoint = self.write_checkpoint();
        self.has_checkpoint = checkpoint.is_ok();
        if let Err(error) = checkpoint {
            tracing::error!(%error, "cannot write the checkpoint of the decision log");
        }
        Ok(results)
    }

    fn write_checkpoint(&self) -> io::Result<()> {
        disk::replace(&self.files.checkpoint_path(), self.chain.checkpoint().as_bytes())
    }
}
