//! Windows made durable, so that an acknowledgement is a promise.
//!
//! Embedded, they are in a write-ahead log; with a database, see `postgres`.
//!
//! ```text
//! DATA/windows/wal-NNN  frames, one after the other; only the file with the highest number counts
//!
//! frame    length of the payload; the same with all bits flipped; CRC-32 (IEEE) of the payload; payload
//!          (the three numbers are u32, little-endian)
//! payload  kind, one byte; session, u64 little-endian; message, protobuf
//! kind     1: a session begins, the message is its Hello
//!          2: a batch, the message is the WindowBatch as the agent sent it; with a length of 0 where its agent's clock
//!             was wrong (ingest.rs), and without its counts where it had come before
//!          3: a session ends for good, the message is Bye
//!          4: a piece of the book, the message is Piece (book/image.rs); the session is 0
//! ```
//!
//! When a file has grown large, the next one begins with a roll-up: the whole book in pieces. It is written and synced
//! under another name before it gets its own, and the file before it goes only then. So what is kept is bounded, and so
//! is the time to start.
//!
//! A batch's tenants are numbers whose names came earlier in its session, so reading starts at the beginning, where the
//! roll-up has the names of the sessions that were open. On opening, an incomplete last frame, or a tail of zeros as a
//! power failure leaves it, is dropped: nobody was told that it is durable. A frame that is wrong in any other way is
//! corruption and refused.

pub(crate) mod postgres;

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Sender},
    },
    time::Duration,
};

use coalmine_proto::v1::{Bye, Hello, WindowBatch};
use prost::Message;

use crate::{
    book::{Book, Piece},
    database::Database,
    disk::{self, DiskError},
};

/// Largest frame, in bytes; a message of the protocol is smaller.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

/// Most entries that share one sync.
const MAX_GROUP: usize = 1_024;

/// How long to wait before a write that the disk refused is tried again.
const RETRY: Duration = Duration::from_secs(1);

const HEADER_BYTES: usize = 12;

/// What the log holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// A session begins.
    Hello(u64, Hello),
    /// A batch of a session.
    Batch(u64, WindowBatch),
    /// An agent ends.
    Bye(u64, Bye),
    /// A part of the book, in a roll-up.
    Piece(Piece),
}

impl Entry {
    /// Appends the entry's frame to `frames`.
    fn encode(&self, frames: &mut Vec<u8>) {
        let begin = frames.len();
        frames.extend_from_slice(&[0; HEADER_BYTES]);
        let (kind, session) = match self {
            Self::Hello(session, _) => (1, session),
            Self::Batch(session, _) => (2, session),
            Self::Bye(session, _) => (3, session),
            Self::Piece(_) => (4, &0),
        };
        frames.push(kind);
        frames.extend_from_slice(&session.to_le_bytes());
        // Encoding into a Vec that grows cannot fail.
        let encoded = match self {
            Self::Hello(_, hello) => hello.encode(frames),
            Self::Batch(_, batch) => batch.encode(frames),
            Self::Bye(_, bye) => bye.encode(frames),
            Self::Piece(piece) => piece.encode(frames),
        };
        debug_assert!(encoded.is_ok());
        let Some((header, payload)) = frames
            .get_mut(begin..)
            .and_then(|frame| frame.split_at_mut_checked(HEADER_BYTES))
        else {
            return;
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let numbers = [length, !length, crc32fast::hash(payload)];
        for (place, number) in header.chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
    }

    fn decode(payload: &[u8]) -> Result<Self, String> {
        let (Some((kind, rest)), true) = (payload.split_first(), payload.len() >= 9) else {
            return Err("is too short".to_owned());
        };
        let (session, message) = rest.split_at(8);
        let session = session
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte));
        let wrong = |error: prost::DecodeError| error.to_string();
        match kind {
            1 => Hello::decode(message)
                .map(|hello| Self::Hello(session, hello))
                .map_err(wrong),
            2 => WindowBatch::decode(message)
                .map(|batch| Self::Batch(session, batch))
                .map_err(wrong),
            3 => Bye::decode(message)
                .map(|bye| Self::Bye(session, bye))
                .map_err(wrong),
            4 => Piece::decode(message).map(Self::Piece).map_err(wrong),
            kind => Err(format!("has the unknown kind {kind}")),
        }
    }
}

type Done = Box<dyn FnOnce() + Send>;

/// Takes a frame, and calls back when it is durable.
pub type Log = Box<dyn FnMut(Vec<u8>, Done) + Send>;

/// Where windows are made durable.
#[derive(Clone)]
pub struct Store {
    sink: Sink,
    /// Whether the log has grown so large that a roll-up is worth it.
    wants_roll_up: Arc<AtomicBool>,
}

#[derive(Clone)]
enum Sink {
    /// A thread that writes.
    Thread(Sender<Job>),
    /// Somebody else's log.
    Given(Arc<Mutex<Log>>),
}

/// What is done at one go: the roll-up last.
struct Jobs {
    group: Vec<(Entry, Done)>,
    roll_up: Option<Vec<Piece>>,
}

enum Job {
    Append(Box<Entry>, Done),
    RollUp(Vec<Piece>),
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the log and gives each entry to `replay`, in order. A roll-up is asked for when the log is larger than
    /// `limit_bytes`.
    pub fn open(data: &Path, limit_bytes: u64, replay: impl FnMut(Entry)) -> Result<Self, DiskError> {
        let directory = data.join("windows");
        disk::create_dir(&directory)?;
        disk::sync_directory(&directory).map_err(|error| DiskError::io("sync", &directory, error))?;
        let (wal, whole) = Wal::open(directory, limit_bytes, replay)?;
        let wants_roll_up = Arc::new(AtomicBool::new(false));
        let (queue, jobs) = mpsc::channel();
        let (flag, path) = (Arc::clone(&wants_roll_up), wal.path());
        flag.store(whole > limit_bytes, Ordering::Relaxed);
        std::thread::Builder::new()
            .name("windows".to_owned())
            .spawn(move || wal.run(&jobs, &flag))
            .map_err(|error| DiskError::io("start the writer of", &path, error))?;
        Ok(Self {
            sink: Sink::Thread(queue),
            wants_roll_up,
        })
    }

    /// Keeps the book in a database: what changed of it is written, in one transaction after the other.
    pub fn postgres(database: Database, book: Arc<Mutex<Book>>) -> Result<Self, DiskError> {
        let (queue, jobs) = mpsc::channel();
        std::thread::Builder::new()
            .name("windows".to_owned())
            .spawn(move || postgres::run(&database, &book, &jobs))
            .map_err(|error| DiskError::io("start the writer of", Path::new("windows"), error))?;
        Ok(Self {
            sink: Sink::Thread(queue),
            wants_roll_up: Arc::default(),
        })
    }

    /// A store on a log of the caller's, such as a simulated disk.
    pub fn with_log(log: Log) -> Self {
        Self {
            sink: Sink::Given(Arc::new(Mutex::new(log))),
            wants_roll_up: Arc::default(),
        }
    }

    /// Appends an entry; `done` is called when it is on disk. Never waits, so that it may be called while the book
    /// is locked: entries stand in the log in the order in which they were applied. What may queue up is bounded
    /// by the number of batches that an agent may send ahead.
    pub fn append(&self, entry: Entry, done: impl FnOnce() + Send + 'static) {
        let done: Done = Box::new(done);
        match &self.sink {
            // The writer ends only with the process.
            Sink::Thread(queue) => drop(queue.send(Job::Append(Box::new(entry), done))),
            Sink::Given(log) => {
                let mut frame = Vec::new();
                entry.encode(&mut frame);
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                log(frame, done);
            }
        }
    }

    /// Whether `roll_up` should be called.
    pub fn wants_roll_up(&self) -> bool {
        self.wants_roll_up.load(Ordering::Relaxed)
    }

    /// Begins the log anew with all that the book holds. To be called while the book is locked.
    pub fn roll_up(&self, pieces: Vec<Piece>) {
        self.wants_roll_up.store(false, Ordering::Relaxed);
        if let Sink::Thread(queue) = &self.sink {
            drop(queue.send(Job::RollUp(pieces)));
        }
    }
}

/// Waits for a job and takes with it all that have queued up meanwhile; none when no one can send any more. A roll-up
/// ends a group, and comes back beside it.
fn next_group(queue: &mpsc::Receiver<Job>) -> Option<Jobs> {
    let mut group = Vec::new();
    let mut next = Some(queue.recv().ok()?);
    while let Some(job) = next {
        match job {
            Job::Append(entry, done) => group.push((*entry, done)),
            Job::RollUp(pieces) => {
                return Some(Jobs {
                    group,
                    roll_up: Some(pieces),
                });
            }
        }
        next = (group.len() < MAX_GROUP).then(|| queue.try_recv().ok()).flatten();
    }
    Some(Jobs { group, roll_up: None })
}

/// The write-ahead log.
struct Wal {
    directory: PathBuf,
    number: u64,
    file: File,
    bytes: u64,
    /// How much of that is the roll-up.
    rolled_up_bytes: u64,
    limit_bytes: u64,
}

impl Wal {
    fn open(
        directory: PathBuf,
        limit_bytes: u64,
        mut replay: impl FnMut(Entry),
    ) -> Result<(Self, u64), DiskError> {
        let numbers = numbers(&directory)?;
        let number = numbers.last().copied().unwrap_or(1);
        let path = file_of(&directory, number);
        let whole = if numbers.is_empty() {
            0
        } else {
            read_file(&path, &mut replay)?
        };
        let file = disk::open_append(&path)?;
        let fail = |error| DiskError::io("mend", &path, error);
        if file.metadata().map_err(fail)?.len() > whole {
            file.set_len(whole).map_err(fail)?;
            disk::sync_or_exit(&file, &path);
        }
        disk::sync_directory(&path).map_err(fail)?;
        let wal = Self {
            number,
            file,
            bytes: whole,
            rolled_up_bytes: 0,
            limit_bytes,
            directory,
        };
        wal.remove_others();
        Ok((wal, whole))
    }

    fn path(&self) -> PathBuf {
        file_of(&self.directory, self.number)
    }

    fn run(mut self, jobs: &mpsc::Receiver<Job>, wants_roll_up: &AtomicBool) {
        let mut bytes = Vec::new();
        while let Some(Jobs { group, roll_up }) = next_group(jobs) {
            bytes.clear();
            for (entry, _) in &group {
                entry.encode(&mut bytes);
            }
            let path = self.path();
            // A full disk is no reason to stop judging: the agents keep what is not acknowledged.
            while let Err(error) = disk::append_durably(&mut self.file, &path, &bytes) {
                tracing::error!(%error, path = %path.display(), "cannot write windows; the agents keep them, trying again");
                std::thread::sleep(RETRY);
            }
            self.bytes += bytes.len() as u64;
            for (_, done) in group {
                done();
            }
            if let Some(pieces) = roll_up
                && let Err(error) = self.roll_up(pieces)
            {
                tracing::warn!(%error, path = %path.display(), "cannot roll the windows up; they go on in the same file");
            }
            if self.bytes > self.limit_bytes.max(2 * self.rolled_up_bytes) {
                wants_roll_up.store(true, Ordering::Relaxed);
            }
        }
    }

    fn roll_up(&mut self, pieces: Vec<Piece>) -> Result<(), DiskError> {
        let mut bytes = Vec::new();
        for piece in pieces {
            if piece.payload.len() > MAX_FRAME_BYTES / 2 {
                let problem = format!("the piece {:?} has {} bytes", piece.key, piece.payload.len());
                return Err(DiskError::io("roll up", &self.path(), io::Error::other(problem)));
            }
            Entry::Piece(piece).encode(&mut bytes);
        }
        let path = file_of(&self.directory, self.number + 1);
        let temporary = path.with_extension("tmp");
        let fail = |error| DiskError::io("write", &temporary, error);
        drop(std::fs::remove_file(&temporary));
        let mut file = disk::open_append(&temporary)?;
        let named = disk::append_durably(&mut file, &temporary, &bytes)
            .and_then(|()| std::fs::rename(&temporary, &path));
        if let Err(error) = named {
            drop(std::fs::remove_file(&temporary));
            return Err(fail(error));
        }
        // From here on this is the file that counts.
        disk::or_exit(disk::sync_directory(&path), &path);
        self.file = file;
        self.number += 1;
        self.bytes = bytes.len() as u64;
        self.rolled_up_bytes = self.bytes;
        self.remove_others();
        tracing::info!(bytes = self.bytes, path = %path.display(), "windows rolled up");
        Ok(())
    }

    /// Removes what the roll-up at the beginning of the present file replaces. What stays is not read.
    fn remove_others(&self) {
        for number in numbers(&self.directory).unwrap_or_default() {
            let path = file_of(&self.directory, number);
            if number != self.number
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(%error, path = %path.display(), "cannot remove windows that were rolled up");
            }
        }
    }
}

fn file_of(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("wal-{number:012}"))
}

/// The numbers of the files, in order.
fn numbers(directory: &Path) -> Result<Vec<u64>, DiskError> {
    let fail = |error| DiskError::io("read", directory, error);
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("wal-"));
        numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn read_file(path: &Path, replay: &mut impl FnMut(Entry)) -> Result<u64, DiskError> {
    let fail = |error| DiskError::io("read", path, error);
    let file = File::open(path).map_err(fail)?;
    let size = file.metadata().map_err(fail)?.len();
    let whole = read(BufReader::with_capacity(1 << 20, file), size, replay).map_err(|error| match error {
        ReadError::Io(error) => fail(error),
        ReadError::Corrupt(problem) => DiskError::Corrupt {
            path: path.to_owned(),
            problem,
        },
    })?;
    if whole < size {
        tracing::warn!(bytes = size - whole, path = %path.display(), "the windows ended in an incomplete frame; dropped");
    }
    Ok(whole)
}

/// Reads frames from memory; gives the length up to the end of the last whole one.
pub fn entries(frames: &[u8], mut each: impl FnMut(Entry)) -> Result<u64, String> {
    read(frames, frames.len() as u64, &mut each).map_err(|error| match error {
        ReadError::Io(error) => error.to_string(),
        ReadError::Corrupt(problem) => problem,
    })
}

enum ReadError {
    Io(io::Error),
    Corrupt(String),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads all whole frames; gives the length up to the end of the last.
fn read(mut reader: impl Read, size: u64, replay: &mut impl FnMut(Entry)) -> Result<u64, ReadError> {
    let mut at = 0_u64;
    let mut payload = Vec::new();
    let corrupt = |at: u64, problem: &str| ReadError::Corrupt(format!("the frame at byte {at} {problem}"));
    while size - at >= HEADER_BYTES as u64 {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header)?;
        let [l0, l1, l2, l3, f0, f1, f2, f3, c0, c1, c2, c3] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length != !u32::from_le_bytes([f0, f1, f2, f3]) || length as usize > MAX_FRAME_BYTES {
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest)?;
            if header.iter().chain(&rest).all(|byte| *byte == 0) {
                break;
            }
            return Err(corrupt(at, "has no valid length"));
        }
        let length = length as usize;
        let end = at + (HEADER_BYTES + length) as u64;
        if end > size {
            break;
        }
        payload.resize(length, 0);
        reader.read_exact(&mut payload)?;
        if crc32fast::hash(&payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
            if end == size {
                break;
            }
            return Err(corrupt(at, "does not match its checksum"));
        }
        replay(Entry::decode(&payload).map_err(|problem| corrupt(at, &problem))?);
        at = end;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(data: &Path) -> Result<Vec<Entry>, DiskError> {
        let mut entries = Vec::new();
        Store::open(data, 1 << 20, |entry| entries.push(entry))?;
        Ok(entries)
    }

    fn write(data: &Path, count: u64) -> Vec<Entry> {
        let store = Store::open(data, 1 << 20, |_| {}).unwrap();
        let written: Vec<_> = (1..=count)
            .map(|seq| {
                Entry::Batch(
                    7,
                    WindowBatch {
                        seq,
                        length_ms: 1_000,
                        ..WindowBatch::default()
                    },
                )
            })
            .collect();
        let (tell, told) = mpsc::channel();
        for entry in &written {
            let tell = tell.clone();
            store.append(entry.clone(), move || tell.send(()).unwrap());
        }
        written.iter().for_each(|_| told.recv().unwrap());
        written
    }

    #[test]
    fn what_was_written_is_read_back() {
        let data = tempfile::tempdir().unwrap();
        let written = write(data.path(), 5);
        assert_eq!(entries(data.path()).unwrap(), written);
    }

    #[test]
    fn a_torn_tail_is_dropped_at_every_length_and_a_flipped_byte_is_refused() {
        let data = tempfile::tempdir().unwrap();
        let written = write(data.path(), 3);
        let path = data.path().join("windows/wal-000000000001");
        let whole = std::fs::read(&path).unwrap();
        let frame = whole.len() / 3;
        for cut in 2 * frame..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(entries(data.path()).unwrap(), written[..2], "cut at {cut}");
        }
        for at in 0..2 * frame {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            match entries(data.path()) {
                Err(DiskError::Corrupt { .. }) => {}
                other => panic!("byte {at}: {other:?}"),
            }
        }
        let mut zeros = whole[..2 * frame].to_vec();
        zeros.extend_from_slice(&[0; 50]);
        std::fs::write(&path, zeros).unwrap();
        assert_eq!(entries(data.path()).unwrap(), written[..2]);
    }
}
