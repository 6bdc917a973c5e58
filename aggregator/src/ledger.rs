//! The decision log and the blobs that its records name.
//!
//! ```text
//! DATA/decisions.jsonl         the segment that is written to: one record a line; see coalmine_judge::record
//! DATA/decisions-NNN.jsonl     a sealed segment, by the position of its first record; its last one is a segment_seal
//! DATA/decisions.jsonl.torn-T  what stood after the last whole record when the log was opened at time T
//! DATA/checkpoint              log name, number of records, Merkle root, signed; replaced after commits
//! DATA/checkpoints.txt         checkpoints kept for good (at starts, heartbeats, seals): notes, an empty line after each
//! DATA/evidence/ab/ab12...     blobs: zstd, named by the SHA-256 of their stored bytes
//! DATA/key, DATA/key.old       the keys that sign, secret; see `key`
//! DATA/postgres                says that the log is in a database, and has its name
//! DATA/reserve                 space that is given up when the disk is full, for the record that says so
//! DATA/.lock                   held by the process that writes
//! ```
//!
//! Order of a commit: the blobs, synced; the lines, synced; the checkpoint signed and published; then the callers are
//! answered. So a record without its blobs cannot exist, and an answered record is on disk. The file of the checkpoint is
//! written with it, under load a moment later (at most 50 ms): a log that is longer than its checkpoint is signed again.
//!
//! On opening, the longest prefix of whole, linked records is kept; an incomplete last line is set aside, and a record
//! says so. A log that is shorter than a checkpoint beside it, or differs from it, or is wrong in the middle, is refused.
//!
//! A checkpoint that is kept elsewhere (a copy, a witness) may know more than the directory does: somebody put an older
//! backup back, or two processes have written. Then nothing is recorded any more, so nothing is approved, until a person
//! opens a new log that names the old one (`anchor`).
//!
//! With PostgreSQL the same bytes and the same checkpoints are in tables; see `postgres`.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        mpsc::{self, Sender},
    },
    time::Duration,
};

use coalmine_judge::{
    chain::Hash,
    note::{Proof, VerifierKey},
    record::{Body, Bootstrap, Follows, Override, Record},
    replay::Blobs,
    tree::Nodes,
};
use foldhash::HashMap;
use tokio::sync::{oneshot, watch};

mod anchor;
mod blobs;
mod export;
mod files;
mod jsonl;
mod key;
mod postgres;
mod storage;
#[cfg(test)]
mod tests;
mod upkeep;
mod writer;

pub use self::{
    blobs::{Blob, BlobStore, MAX_BLOB_BYTES, unpack},
    export::{Exported, export_database, export_files},
    files::{LedgerFiles, LogProblem, Place, Published, Scan, read_note},
    upkeep::{new_log, rotate_key},
};
use self::{
    jsonl::{Jsonl, Lines},
    postgres::{PgLog, PgReader},
    storage::{Reader, Storage},
    writer::{Job, Message, Writer},
};
use crate::{
    database::Database,
    disk::{self, DiskError},
    metrics::Metrics,
};

/// The file that says that the log of a directory's key is in a database: one key signs one log.
const ELSEWHERE: &str = "postgres";

/// How a log is kept.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of a log that begins now.
    pub name: String,
    /// A segment is sealed when it is larger.
    pub segment_bytes: u64,
    /// After so long without a record one says that the log is alive.
    pub heartbeat: Duration,
    /// Every checkpoint is written there too, and the log is held against it at the start.
    pub checkpoint_copy: Option<PathBuf>,
    /// What a log that begins now continues.
    pub follows: Option<Follows>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "coalmine/default".to_owned(),
            segment_bytes: 64 << 20,
            heartbeat: Duration::from_secs(300),
            checkpoint_copy: None,
            follows: None,
        }
    }
}

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
    /// A longer or another log is known elsewhere.
    #[error("nothing is recorded, because {0}")]
    Untrusted(String),
    /// It cannot be a record.
    #[error("the record is refused: {0}")]
    Refused(String),
    /// The server is stopping.
    #[error("the decision log is closed")]
    Closed,
}

/// Whether the log takes records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It does.
    Ok,
    /// The disk is full.
    Full,
    /// The last commit failed for another reason.
    Failing,
    /// A longer log is known elsewhere.
    Behind,
    /// Another log of the same name is known elsewhere.
    Forked,
}

impl State {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Ok, Self::Full, Self::Failing, Self::Behind, Self::Forked];

    /// The state's name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Full => "full",
            Self::Failing => "failing",
            Self::Behind => "behind",
            Self::Forked => "forked",
        }
    }
}

/// The state of a log, with what is wrong.
#[derive(Debug)]
struct Health {
    state: Mutex<(State, String)>,
    metrics: Arc<Metrics>,
}

impl Health {
    fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        let health = Self {
            state: Mutex::new((State::Ok, String::new())),
            metrics,
        };
        health.set(State::Ok, String::new());
        Arc::new(health)
    }

    fn get(&self) -> (State, String) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A log that is behind or forked stays so.
    fn set(&self, state: State, why: String) {
        let mut held = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(held.0, State::Behind | State::Forked) {
            *held = (state, why);
        }
        self.metrics.audit_state(held.0);
    }

    /// Why nothing may be recorded.
    fn distrust(&self) -> Option<String> {
        let (state, why) = self.get();
        matches!(state, State::Behind | State::Forked).then_some(why)
    }
}

/// The decision log of a running aggregator.
#[derive(Debug, Clone)]
pub struct Ledger {
    queue: Sender<Message>,
    health: Arc<Health>,
    index: Arc<RwLock<Index>>,
    reader: Reader,
    published: watch::Receiver<Option<Published>>,
    cosigned: Arc<Mutex<Option<Published>>>,
}

/// What was found when the log was opened.
#[derive(Debug)]
pub struct Opened {
    /// The log, ready for records.
    pub ledger: Ledger,
    /// How many records there were.
    pub records: u64,
}

/// Where records are, so that one can be read without the others, and what proves that they are there.
#[derive(Debug, Default)]
pub struct Index {
    nodes: Nodes,
    published: Option<Published>,
    keys: Vec<VerifierKey>,
    /// The log that this one continues.
    follows: Option<String>,
    decisions: HashMap<String, u64>,
    /// Of the decisions that are not the judge's.
    others: HashMap<String, u64>,
    /// Positions of each rollout's decisions, in order.
    rollouts: BTreeMap<String, Vec<u64>>,
    /// Positions of what was done outside because of them, in order.
    actuations: BTreeMap<String, Vec<u64>>,
}

impl Index {
    fn add(&mut self, record: &Record, leaf: Hash) {
        self.nodes.push(leaf);
        if let Body::LogStart {
            follows: Some(follows),
            ..
        } = &record.body
        {
            self.follows = Some(follows.log.clone());
        }
        if let Body::Decision(decision) = &record.body {
            self.decisions.insert(decision.id.clone(), record.seq);
            self.rollouts
                .entry(decision.rollout.clone())
                .or_default()
                .push(record.seq);
        }
        if let Body::Override(Override { id, .. }) | Body::Bootstrap(Bootstrap { id, .. }) = &record.body {
            self.others.insert(id.clone(), record.seq);
        }
        if let Body::Actuation(actuation) = &record.body {
            let positions = self.actuations.entry(actuation.rollout.clone()).or_default();
            positions.push(record.seq);
        }
    }

    /// The positions of what was done outside because of a rollout's decisions, in order.
    pub fn actuations(&self, rollout: &str) -> &[u64] {
        self.actuations.get(rollout).map_or(&[], Vec::as_slice)
    }

    /// The position of a decision, the judge's or another's.
    pub fn decision(&self, id: &str) -> Option<u64> {
        self.decisions.get(id).or_else(|| self.others.get(id)).copied()
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

/// A log that was read and may be written to.
struct Opening {
    storage: Storage,
    reader: Reader,
    index: Index,
    chain: coalmine_judge::chain::Chain,
    named: HashSet<Hash>,
    /// What was set aside: how many bytes, and the file.
    torn: Option<(u64, String)>,
}

impl Ledger {
    /// Opens the log of a data directory, or begins one. Gives each record to `each`.
    pub fn open(
        data: &Path,
        options: Options,
        metrics: Arc<Metrics>,
        mut each: impl FnMut(&Record, Hash),
    ) -> Result<Opened, DiskError> {
        let files = LedgerFiles::new(data);
        let elsewhere = data.join(ELSEWHERE);
        if elsewhere.exists() {
            return Err(DiskError::Corrupt {
                path: elsewhere,
                problem:
                    "says that the log of this directory's key is in a database; start with --postgres, or \
                          remove it if that was a mistake"
                        .to_owned(),
            });
        }
        if data.join("new-log").exists() && options.follows.is_none() {
            return Err(DiskError::Corrupt {
                path: data.join("new-log"),
                problem:
                    "says that a new log was about to be opened; run `coalmine-aggregator new-log` again"
                        .to_owned(),
            });
        }
        let lines = Arc::new(Lines::default());
        let (mut index, mut named, mut places) = (Index::default(), HashSet::new(), Vec::new());
        let mut scan = files
            .scan_own(|record, leaf, place| {
                index.add(&record, leaf);
                named.extend(record.body.blobs().into_iter().map(|(_, digest)| digest));
                places.push(place);
                each(&record, leaf);
            })
            .map_err(LogProblem::into_disk_error)?;
        if scan.published.is_none() && scan.chain.size() > 1 {
            let problem = "is missing, so nobody can tell whether the log was cut".to_owned();
            return Err(DiskError::Corrupt {
                path: files.checkpoint_path(),
                problem,
            });
        }
        lines.add(places);
        files.blobs.prepare()?;
        let reader = Reader::Files(Arc::clone(&lines), files.blobs.clone());
        let (jsonl, torn) = Jsonl::open(files, &scan, lines, options.segment_bytes)?;
        index.published = scan.published.take();
        let opening = Opening {
            storage: Storage::Files(Box::new(jsonl)),
            reader,
            index,
            torn: torn.map(|file| (scan.torn_bytes, file)),
            chain: scan.chain,
            named,
        };
        Self::start(data, options, metrics, opening)
    }

    /// Opens the log in a database, or begins one. `data` has the key.
    pub async fn open_postgres(
        data: &Path,
        database: &Database,
        options: Options,
        metrics: Arc<Metrics>,
        mut each: impl FnMut(&Record, Hash),
    ) -> Result<Opened, DiskError> {
        let files = LedgerFiles::new(data);
        if files.exists() {
            return Err(DiskError::Corrupt {
                path: files.log_path(),
                problem: "is a log of its own, and its key would sign that of the database too; give --postgres another \
                          --data directory"
                    .to_owned(),
            });
        }
        let mut index = Index::default();
        let held = postgres::read(database, |record, leaf, _| {
            index.add(&record, leaf);
            each(&record, leaf);
        });
        let held = held.await?;
        let elsewhere = data.join(ELSEWHERE);
        let written = disk::replace(&elsewhere, format!("{}\n", options.name).as_bytes());
        written.map_err(|error| DiskError::io("write", &elsewhere, error))?;
        index.published = held.published;
        let opening = Opening {
            storage: Storage::Postgres(PgLog::new(database.clone())),
            reader: Reader::Postgres(PgReader(database.clone())),
            index,
            chain: held.chain,
            // In a transaction nothing is left behind.
            named: HashSet::new(),
            torn: None,
        };
        tokio::task::block_in_place(|| Self::start(data, options, metrics, opening))
    }

    fn start(
        data: &Path,
        options: Options,
        metrics: Arc<Metrics>,
        opening: Opening,
    ) -> Result<Opened, DiskError> {
        let Opening {
            mut storage,
            reader,
            mut index,
            chain,
            named,
            torn,
        } = opening;
        let log = chain.log().unwrap_or(&options.name).to_owned();
        index.keys = chain.keys().to_vec();
        let health = Health::new(Arc::clone(&metrics));
        if let Some(copy) = &options.checkpoint_copy {
            anchor::hold_against_copy(copy, &index, &health)?;
        }
        let keys = key::open(data, &log, chain.keys())?;
        match &mut storage {
            Storage::Postgres(log) => log.report_to(Arc::clone(&health)),
            Storage::Files(files) if files.is_full() => {
                health.set(State::Full, "the disk is full".to_owned())
            }
            Storage::Files(_) => {}
        }
        let (publish, published) = watch::channel(index.published.clone());
        let index = Arc::new(RwLock::new(index));
        let (queue, jobs) = mpsc::channel();
        let mut writer = Writer {
            data: data.to_owned(),
            log,
            keys,
            chain,
            storage,
            options,
            metrics,
            health: Arc::clone(&health),
            index: Arc::clone(&index),
            publish,
            named,
            torn,
        };
        writer
            .begin_log()
            .map_err(|error| DiskError::io("write the log in", data, error))?;
        let records = writer.chain.size();
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(|error| DiskError::io("start the writer of", data, error))?;
        let ledger = Self {
            queue,
            health,
            index,
            reader,
            published,
            cosigned: Arc::default(),
        };
        Ok(Opened { ledger, records })
    }

    /// Puts the log in order, after whoever knows more was asked: says what was set aside, signs what is not covered.
    pub fn begin(&self) {
        drop(self.queue.send(Message::Begin));
    }

    /// Queues a record and its blobs; the answer comes when they are on disk. It is written even if nobody waits
    /// for the answer. Each caller waits before it queues more, so the queue is bounded by the callers.
    pub fn submit(&self, body: Body, blobs: Vec<Blob>) -> oneshot::Receiver<Result<Appended, AppendError>> {
        let (answer, answered) = oneshot::channel();
        // When the writer is gone the answer's sender is dropped, which the receiver sees.
        drop(
            self.queue
                .send(Message::Append(Box::new(Job { body, blobs, answer }))),
        );
        answered
    }

    /// Appends a record and its blobs; returns when they are on disk.
    pub async fn append(&self, body: Body, blobs: Vec<Blob>) -> Result<Appended, AppendError> {
        self.submit(body, blobs).await.unwrap_or(Err(AppendError::Closed))
    }

    /// Writes what is queued and ends the writer; gives what resolves when it has.
    pub fn stop(&self) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        drop(self.queue.send(Message::Stop(tell)));
        told
    }

    /// Where records are.
    pub fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blobs.
    pub fn blobs(&self) -> &dyn Blobs {
        &self.reader
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

    /// A record's line, as it was when it was written or read at the start.
    fn line(&self, seq: u64) -> io::Result<Option<Vec<u8>>> {
        let Some(leaf) = self.index().nodes.leaf(seq) else {
            return Ok(None);
        };
        let line = self.reader.line(seq)?;
        if line.as_deref().map(Hash::leaf) != Some(leaf) {
            let problem = format!("record {seq} was changed where it is kept");
            return Err(io::Error::other(problem));
        }
        Ok(line)
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

    /// The latest checkpoint, with the witnesses' signatures if they have signed it.
    pub fn checkpoint(&self) -> Option<Published> {
        let latest = self.published.borrow().clone()?;
        let cosigned = self.cosigned.lock().unwrap_or_else(PoisonError::into_inner);
        let cosigned = cosigned.clone().filter(|cosigned| cosigned.size == latest.size);
        Some(cosigned.unwrap_or(latest))
    }

    /// Proof that the log of `from` records is the beginning of that of `to`; none if it has not so many.
    pub fn consistency(&self, from: u64, to: u64) -> Option<Vec<Hash>> {
        self.index().nodes.consistency(from, to)
    }

    /// What is wrong with the log, if it takes no records. Nothing is approved while it is so.
    pub fn trouble(&self) -> Option<String> {
        let (state, why) = self.health.get();
        if state != State::Ok {
            return Some(why);
        }
        self.reader.trouble()
    }
}

impl LogProblem {
    pub(crate) fn into_disk_error(self) -> DiskError {
        DiskError::Corrupt {
            path: self.file,
            problem: self.problem,
        }
    }
}
