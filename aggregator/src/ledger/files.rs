//! The files of a log as they are read: by the aggregator when it starts, and by anybody who checks them.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use coalmine_judge::{
    chain::{Chain, Hash},
    note::{Checkpoint, Note, Proof},
    record::{Body, Record},
    tree::Nodes,
};

use super::BlobStore;

/// The segment that is written to.
const CURRENT: &str = "decisions.jsonl";

/// The files of a log, for reading.
#[derive(Debug, Clone)]
pub struct LedgerFiles {
    pub(super) data: PathBuf,
    /// The blobs.
    pub blobs: BlobStore,
}

/// A file of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    /// Position of its first record, if it is sealed.
    pub(super) first: Option<u64>,
}

/// Where a record's line stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which segment, counted from the oldest.
    pub(super) segment: u32,
    pub(super) length: u32,
    pub(super) offset: u64,
}

/// A checkpoint as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The number of records that it covers.
    pub size: u64,
    /// The signed note.
    pub note: String,
}

impl Published {
    /// Takes a note for a checkpoint; its signature can be checked only with the log's key.
    pub(super) fn read(note: &str) -> Result<Self, String> {
        let checkpoint = Note::parse(note).and_then(|note| Checkpoint::parse(note.unverified()));
        checkpoint
            .map(|checkpoint| Self {
                size: checkpoint.size,
                note: note.to_owned(),
            })
            .map_err(|error| error.to_string())
    }

    /// The name of the log.
    pub(super) fn origin(&self) -> String {
        self.note.lines().next().unwrap_or_default().to_owned()
    }

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

/// What is wrong with a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct LogProblem {
    /// The file, or the table.
    pub file: PathBuf,
    /// What is wrong, with the number of the record.
    pub problem: String,
}

/// A log as it was read.
#[derive(Debug)]
pub struct Scan {
    /// The chain up to there.
    pub chain: Chain,
    /// The checkpoint; none if there is none.
    pub published: Option<Published>,
    /// Length of the current segment's whole records in bytes.
    pub current_bytes: u64,
    /// Bytes after the last newline.
    pub torn_bytes: u64,
    /// Length of the whole checkpoints that were kept, and of what stands after them.
    pub history: (u64, u64),
    /// Position of the current segment's first record.
    pub(super) current_first: u64,
    /// When the current segment's first record was written.
    pub(super) current_since_ms: u64,
    /// Whether the file that is written to is there.
    pub(super) has_current: bool,
}

impl Scan {
    /// How many records the checkpoint covers.
    pub fn covered(&self) -> u64 {
        self.published.as_ref().map_or(0, |published| published.size)
    }
}

/// The checkpoints that were kept.
pub(super) struct History {
    pub(super) notes: Vec<Published>,
    whole_bytes: u64,
    torn_bytes: u64,
}

/// Holds a log, line by line, against the checkpoints that were published of it.
#[derive(Debug, Default)]
pub(super) struct Check {
    pub(super) chain: Chain,
    /// Checkpoints that cover more than was read, with where each comes from, in the order of their sizes.
    ahead: VecDeque<(PathBuf, Published)>,
    /// How many records are known to have been accepted when they were written.
    accepted: u64,
}

impl Check {
    pub(super) fn new(mut known: Vec<(PathBuf, Published)>) -> Self {
        known.sort_by_key(|(_, published)| published.size);
        Self {
            chain: Chain::default(),
            ahead: known.into(),
            accepted: 0,
        }
    }

    /// For whoever has written the log: what its checkpoint covers was accepted before. If that is not so, the checkpoint
    /// will tell.
    pub(super) fn trusting(self, published: Option<&Published>) -> Self {
        Self {
            accepted: published.map_or(0, |published| published.size),
            ..self
        }
    }

    /// Takes the next line, which stands in `file`.
    pub(super) fn accept(&mut self, line: &[u8], file: &Path) -> Result<Record, LogProblem> {
        let accepted = if self.chain.size() < self.accepted {
            self.chain.accept_again(line)
        } else {
            self.chain.accept(line)
        };
        let record = accepted.map_err(|error| LogProblem {
            file: file.to_owned(),
            problem: error.to_string(),
        })?;
        while let Some((place, published)) = self
            .ahead
            .pop_front_if(|(_, published)| published.size <= self.chain.size())
        {
            self.hold_against(&published, &place, file)?;
        }
        Ok(record)
    }

    fn hold_against(&self, published: &Published, place: &Path, file: &Path) -> Result<(), LogProblem> {
        let signed = Checkpoint::open(&published.note, self.chain.key()).map_err(|error| LogProblem {
            file: place.to_owned(),
            problem: error.to_string(),
        })?;
        let found = self.chain.checkpoint();
        if signed == found {
            return Ok(());
        }
        Err(LogProblem {
            file: file.to_owned(),
            problem: format!(
                "record {} or one before it differs from what the checkpoint of {} records in {} covers\n  signed: {}\n  found:  {}",
                signed.size.saturating_sub(1),
                signed.size,
                place.display(),
                one_line(&signed),
                one_line(&found),
            ),
        })
    }

    /// The log has ended: nothing may be missing.
    pub(super) fn finish(&self, file: &Path) -> Result<(), LogProblem> {
        let Some((place, published)) = self.ahead.back() else {
            return Ok(());
        };
        Err(LogProblem {
            file: file.to_owned(),
            problem: format!(
                "ends after record {}, but the checkpoint in {} covers {} records: the log was cut",
                self.chain.size().saturating_sub(1),
                place.display(),
                published.size,
            ),
        })
    }
}

fn one_line(checkpoint: &Checkpoint) -> String {
    checkpoint.to_string().trim_end().replace('\n', " ")
}

impl LedgerFiles {
    /// The log under a data directory.
    pub fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
            blobs: BlobStore::new(data),
        }
    }

    /// The file that is written to.
    pub fn log_path(&self) -> PathBuf {
        self.data.join(CURRENT)
    }

    /// The file of a sealed segment.
    pub(super) fn sealed_path(&self, first: u64) -> PathBuf {
        self.data.join(format!("decisions-{first:012}.jsonl"))
    }

    pub(super) fn checkpoint_path(&self) -> PathBuf {
        self.data.join("checkpoint")
    }

    /// The file of the checkpoints that are kept.
    pub fn history_path(&self) -> PathBuf {
        self.data.join("checkpoints.txt")
    }

    /// Whether there is a log.
    pub fn exists(&self) -> bool {
        self.segments().is_ok_and(|segments| !segments.is_empty())
    }

    /// The sealed segments, oldest first, and then the current one if it is there.
    pub(super) fn segments(&self) -> Result<Vec<Segment>, LogProblem> {
        let problem = |error: io::Error| LogProblem {
            file: self.data.clone(),
            problem: format!("cannot be read: {error}"),
        };
        let mut sealed = Vec::new();
        let entries = match std::fs::read_dir(&self.data) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(sealed),
            Err(error) => return Err(problem(error)),
        };
        for entry in entries {
            let path = entry.map_err(problem)?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let number = name
                .strip_prefix("decisions-")
                .and_then(|rest| rest.strip_suffix(".jsonl"));
            if let Some(first) = number.and_then(|number| number.parse().ok()) {
                sealed.push(Segment {
                    path,
                    first: Some(first),
                });
            }
        }
        sealed.sort_by_key(|segment| segment.first);
        let current = self.log_path();
        if current.exists() {
            sealed.push(Segment {
                path: current,
                first: None,
            });
        }
        Ok(sealed)
    }

    /// Reads the whole log, gives each record to `each`, and holds all against the checkpoints.
    pub fn scan(&self, each: impl FnMut(Record, Hash, Place)) -> Result<Scan, LogProblem> {
        self.scan_against(Vec::new(), each)
    }

    /// The same for whoever has written the log; see `Check::trusting`.
    pub(super) fn scan_own(&self, each: impl FnMut(Record, Hash, Place)) -> Result<Scan, LogProblem> {
        self.scan_with(Vec::new(), true, each)
    }

    /// The same, and holds it against checkpoints that were kept elsewhere too.
    pub fn scan_against(
        &self,
        elsewhere: Vec<(PathBuf, Published)>,
        each: impl FnMut(Record, Hash, Place),
    ) -> Result<Scan, LogProblem> {
        self.scan_with(elsewhere, false, each)
    }

    fn scan_with(
        &self,
        elsewhere: Vec<(PathBuf, Published)>,
        own: bool,
        mut each: impl FnMut(Record, Hash, Place),
    ) -> Result<Scan, LogProblem> {
        let published = self.read_checkpoint()?;
        let mut known = elsewhere;
        known.extend(
            published
                .clone()
                .map(|published| (self.checkpoint_path(), published)),
        );
        let history = self.read_history()?;
        known.extend(
            history
                .notes
                .into_iter()
                .map(|published| (self.history_path(), published)),
        );
        let mut check = Check::new(known).trusting(published.as_ref().filter(|_| own));
        let segments = self.segments()?;
        let mut scan = Scan {
            chain: Chain::default(),
            published,
            current_bytes: 0,
            torn_bytes: 0,
            history: (history.whole_bytes, history.torn_bytes),
            current_first: 0,
            current_since_ms: 0,
            has_current: false,
        };
        for (number, segment) in (0..).zip(&segments) {
            self.scan_segment(number, segment, &mut check, &mut scan, &mut each)?;
        }
        check.finish(&self.log_path())?;
        if !scan.has_current {
            scan.current_first = check.chain.size();
        }
        scan.chain = check.chain;
        Ok(scan)
    }

    fn scan_segment(
        &self,
        number: u32,
        segment: &Segment,
        check: &mut Check,
        scan: &mut Scan,
        each: &mut impl FnMut(Record, Hash, Place),
    ) -> Result<(), LogProblem> {
        let path = &segment.path;
        let problem = |problem: String| LogProblem {
            file: path.clone(),
            problem,
        };
        let begin = check.chain.size();
        if segment.first.is_some_and(|first| first != begin) {
            return Err(problem(format!(
                "record {begin}: is missing; the segment before this one is not there"
            )));
        }
        let file = File::open(path).map_err(|error| problem(format!("cannot be read: {error}")))?;
        let mut reader = BufReader::new(file);
        let (mut line, mut offset, mut since_ms, mut seal) = (Vec::new(), 0_u64, 0, None);
        loop {
            line.clear();
            let read = reader
                .read_until(b'\n', &mut line)
                .map_err(|error| problem(format!("cannot be read: {error}")))?;
            if read == 0 {
                break;
            }
            let whole = line.pop_if(|last| *last == b'\n').is_some();
            if !whole && segment.first.is_none() {
                scan.torn_bytes = read as u64;
                break;
            }
            if !whole {
                return Err(problem(format!(
                    "record {}: is not whole, and the segment is sealed",
                    check.chain.size()
                )));
            }
            let record = check.accept(&line, path)?;
            if offset == 0 {
                since_ms = record.time_ms;
            }
            seal = match record.body {
                Body::SegmentSeal { first, bytes } => Some((first, bytes, offset)),
                _ => None,
            };
            let place = Place {
                segment: number,
                // Lines have at most MAX_LINE_BYTES.
                length: u32::try_from(line.len()).unwrap_or(u32::MAX),
                offset,
            };
            offset += read as u64;
            each(record, check.chain.head().unwrap_or(Hash::ZERO), place);
        }
        if segment.first.is_some() && seal.is_none_or(|(first, bytes, at)| (first, bytes) != (begin, at)) {
            return Err(problem(format!(
                "record {}: the segment is sealed, but its last record does not say so",
                check.chain.size().saturating_sub(1)
            )));
        }
        if segment.first.is_none() {
            scan.has_current = true;
            scan.current_first = begin;
            scan.current_since_ms = since_ms;
            scan.current_bytes = offset;
        }
        Ok(())
    }

    /// The checkpoint as it stands there.
    fn read_checkpoint(&self) -> Result<Option<Published>, LogProblem> {
        read_note(&self.checkpoint_path())
    }

    /// The checkpoints that were kept; an incomplete last one does not count.
    pub(super) fn read_history(&self) -> Result<History, LogProblem> {
        let file = self.history_path();
        let problem = |problem: String| LogProblem {
            file: file.clone(),
            problem,
        };
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(problem(format!("cannot be read: {error}"))),
        };
        // A tail may be torn within a character.
        let valid = std::str::from_utf8(&bytes).map_or_else(|error| error.valid_up_to(), str::len);
        let text = String::from_utf8_lossy(bytes.get(..valid).unwrap_or_default());
        let mut kept = Vec::new();
        let mut rest = &*text;
        // A note has one empty line within and one after it.
        while let Some(signatures) = rest.find("\n\n").map(|at| at + 2)
            && let Some(end) = rest.get(signatures..).and_then(|rest| rest.find("\n\n"))
        {
            let (note, after) = rest.split_at(signatures + end + 1);
            let number = kept.len() + 1;
            let read =
                Published::read(note).map_err(|error| problem(format!("checkpoint {number} {error}")))?;
            kept.push(read);
            rest = after.get(1..).unwrap_or_default();
        }
        Ok(History {
            notes: kept,
            whole_bytes: (text.len() - rest.len()) as u64,
            torn_bytes: (rest.len() + bytes.len() - valid) as u64,
        })
    }
}

/// Reads a checkpoint that is a file of its own; none if the file is not there.
pub fn read_note(file: &Path) -> Result<Option<Published>, LogProblem> {
    let problem = |problem: String| LogProblem {
        file: file.to_owned(),
        problem,
    };
    match std::fs::read_to_string(file) {
        Ok(note) => Published::read(&note).map(Some).map_err(problem),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(problem(format!("cannot be read: {error}"))),
    }
}
