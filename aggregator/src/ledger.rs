//! The decision log on disk and the blobs that its records name.
//!
//! ```text
//! DATA/decisions.jsonl       one record a line; the form is described in coalmine_judge::record
//! DATA/checkpoint            log name, number of records, Merkle root, signed; replaced after each commit
//! DATA/key                   the key that signs, secret; made with the log, and never again
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
    io::{self, BufRead as _, BufReader},
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
    chain::{Chain, Hash},
    note::{Checkpoint, Note, Proof, SignerKey},
    record::{Body, Record},
    tree::Nodes,
};
use foldhash::HashMap;
use tokio::sync::oneshot;

mod blobs;
mod key;

pub use blobs::{Blob, BlobStore};

use crate::{
    BUILD, clock,
    disk::{self, DiskError},
    metrics::Metrics,
};

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

/// A checkpoint as it was published.
#[derive(Debug, Clone)]
pub struct Published {
    /// The number of records that it covers.
    pub size: u64,
    /// The signed note.
    pub note: String,
}

impl Published {
    /// Proof that a record, of which this is the line, is in the log; none if the checkpoint does not cover it.
    pub fn proof(&self, nodes: &Nodes, seq: u64, line: Vec<u8>) -> Option<Proof> {
        Some(Proof {
            extra: Some(line),
            index: seq,
            path: nodes.inclusion(seq, self.size)?,
            checkpoint: self.note.clone(),
        })
    }
}

/// Where records are, so that one can be read without the others, and what proves that they are there.
#[derive(Debug, Default)]
pub struct Index {
    places: Vec<Place>,
    nodes: Nodes,
    published: Option<Published>,
    decisions: HashMap<String, u64>,
    /// Positions of each rollout's decisions, in order.
    rollouts: BTreeMap<String, Vec<u64>>,
}

impl Index {
    fn add(&mut self, record: &Record, leaf: Hash, place: Place) {
        self.places.push(place);
        self.nodes.push(leaf);
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
    /// The checkpoint; none if there is none.
    pub published: Option<Published>,
}

impl Scan {
    /// How many records the checkpoint covers.
    pub fn covered(&self) -> u64 {
        self.published.as_ref().map_or(0, |published| published.size)
    }
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
        let published = self.read_checkpoint()?;
        let file = match File::open(&path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(problem(format!("cannot be read: {error}"))),
        };
        let mut scan = Scan {
            chain: Chain::default(),
            whole_bytes: 0,
            torn_bytes: 0,
            published,
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
            if scan.covered() == scan.chain.size() {
                self.hold_against_checkpoint(&scan)?;
            }
        }
        let (covered, size) = (scan.covered(), scan.chain.size());
        if size < covered {
            return Err(problem(format!(
                "ends after record {}, but the checkpoint covers {covered} records: the log was cut",
                size.saturating_sub(1)
            )));
        }
        Ok(scan)
    }

    /// Checks the checkpoint, when as many records have been read as it covers.
    fn hold_against_checkpoint(&self, scan: &Scan) -> Result<(), LogProblem> {
        let Some(published) = &scan.published else {
            return Ok(());
        };
        let signed = Checkpoint::open(&published.note, scan.chain.keys()).map_err(|error| LogProblem {
            file: self.checkpoint_path(),
            problem: error.to_string(),
        })?;
        let found = scan.chain.checkpoint();
        if signed == found {
            return Ok(());
        }
        Err(LogProblem {
            file: self.log_path(),
            problem: format!(
                "record {} or one before it differs from what the checkpoint of {} records covers\n  signed: {}\n  found:  {}",
                signed.size.saturating_sub(1),
                signed.size,
                one_line(&signed),
                one_line(&found),
            ),
        })
    }

    /// The checkpoint as it stands there; its signature can be checked only with the log's key.
    fn read_checkpoint(&self) -> Result<Option<Published>, LogProblem> {
        let file = self.checkpoint_path();
        let note = match std::fs::read_to_string(&file) {
            Ok(note) => note,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let problem = format!("cannot be read: {error}");
                return Err(LogProblem { file, problem });
            }
        };
        match Note::parse(&note).and_then(|note| Checkpoint::parse(note.unverified())) {
            Ok(checkpoint) => Ok(Some(Published {
                size: checkpoint.size,
                note,
            })),
            Err(error) => Err(LogProblem {
                file,
                problem: error.to_string(),
            }),
        }
    }
}

fn one_line(checkpoint: &Checkpoint) -> String {
    checkpoint.to_string().trim_end().replace('\n', " ")
}

impl Ledger {
    /// Opens the log of a data directory, or begins one.
    pub fn open(data: &Path, name: &str, metrics: Arc<Metrics>) -> Result<Opened, DiskError> {
        let files = LedgerFiles::new(data);
        let mut index = Index::default();
        let mut scan = files
            .scan(|record, leaf, place| index.add(&record, leaf, place))
            .map_err(|error| DiskError::Corrupt {
                path: error.file,
                problem: error.problem,
            })?;
        let path = files.log_path();
        if scan.published.is_none() && scan.chain.size() > 1 {
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
        let log = scan.chain.log().unwrap_or(name).to_owned();
        let key = key::open(data, &log, scan.chain.keys())?;
        let covered = scan.covered();
        index.published = scan.published.take();
        let (queue, jobs) = mpsc::channel();
        let writable = Arc::new(AtomicBool::new(true));
        let mut writer = Writer {
            log,
            key,
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
                key: writer.key.verifier().to_string(),
            };
            writer
                .write(vec![(start, Vec::new())])
                .map_err(|error| DiskError::io("write", &path, error))?;
        } else if covered < writer.chain.size() {
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
        let Some(line) = self.line(seq)? else {
            return Ok(None);
        };
        let record = serde_json::from_slice(&line)?;
        Ok(Some(Appended {
            record,
            hash: Hash::leaf(&line),
        }))
    }

    /// Proof that a record is in the log; none if no checkpoint covers it yet.
    pub fn proof(&self, seq: u64) -> io::Result<Option<Proof>> {
        let Some(line) = self.line(seq)? else {
            return Ok(None);
        };
        let index = self.index();
        let published = index.published.as_ref();
        Ok(published.and_then(|published| published.proof(&index.nodes, seq, line)))
    }

    fn line(&self, seq: u64) -> io::Result<Option<Vec<u8>>> {
        let place = usize::try_from(seq)
            .ok()
            .and_then(|seq| self.index().places.get(seq).copied());
        let Some(place) = place else { return Ok(None) };
        let mut line = vec![0; place.length];
        File::open(self.files.log_path())?.read_exact_at(&mut line, place.offset)?;
        Ok(Some(line))
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
    key: SignerKey,
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
            index.add(&appended.record, appended.hash, place);
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
        let checkpoint = self.chain.checkpoint();
        let published = Published {
            size: checkpoint.size,
            note: checkpoint.sign([&self.key]),
        };
        disk::replace(&self.files.checkpoint_path(), published.note.as_bytes())?;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.published = Some(published);
        Ok(())
    }
}
