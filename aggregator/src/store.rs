//! Windows on disk: a write-ahead log of what agents sent, so that an acknowledgement is a promise.
//!
//! ```text
//! DATA/windows/wal      frames, one after the other
//!
//! frame    length of the payload; the same with all bits flipped; CRC-32 (IEEE) of the payload; payload
//!          (the three numbers are u32, little-endian)
//! payload  kind, one byte; session, u64 little-endian; message, protobuf
//! kind     1: a session begins, the message is its Hello
//!          2: a batch, the message is the WindowBatch as the agent sent it
//!          3: a session ends for good, the message is Bye
//! ```
//!
//! A batch's tenants are numbers whose names came earlier in its session, so reading starts at the
//! beginning. On opening, an incomplete last frame, or a tail of zeros as a power failure leaves it, is
//! dropped: nobody was told that it is durable. A frame that is wrong in any other way is corruption and
//! refused.

use std::{
    fs::File,
    io::{self, BufReader, Read as _},
    path::{Path, PathBuf},
    sync::mpsc::{self, Sender},
    time::Duration,
};

use coalmine_proto::v1::{Bye, Hello, WindowBatch};
use prost::Message;

use crate::disk::{self, DiskError};

/// Largest frame, in bytes; a message of the protocol is smaller.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

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
        };
        frames.push(kind);
        frames.extend_from_slice(&session.to_le_bytes());
        // Encoding into a Vec that grows cannot fail.
        let encoded = match self {
            Self::Hello(_, hello) => hello.encode(frames),
            Self::Batch(_, batch) => batch.encode(frames),
            Self::Bye(_, bye) => bye.encode(frames),
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
            kind => Err(format!("has the unknown kind {kind}")),
        }
    }
}

type Done = Box<dyn FnOnce() + Send>;

/// The write-ahead log of windows.
#[derive(Debug, Clone)]
pub struct Store {
    queue: Sender<Job>,
}

struct Job {
    entry: Entry,
    done: Done,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("entry", &self.entry)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the log and gives each entry to `replay`, in order.
    pub fn open(data: &Path, mut replay: impl FnMut(Entry)) -> Result<Self, DiskError> {
        let directory = data.join("windows");
        disk::create_dir(&directory)?;
        let path = directory.join("wal");
        let whole = match File::open(&path) {
            Ok(file) => read(&path, file, &mut replay)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(DiskError::io("read", &path, error)),
        };
        let file = disk::open_append(&path)?;
        let fail = |error| DiskError::io("mend", &path, error);
        if file.metadata().map_err(fail)?.len() > whole {
            file.set_len(whole).map_err(fail)?;
            file.sync_all().map_err(fail)?;
        }
        disk::sync_directory(&path).map_err(fail)?;
        let (queue, jobs) = mpsc::channel();
        let thread_path = path.clone();
        std::thread::Builder::new()
            .name("windows".to_owned())
            .spawn(move || run(file, &thread_path, &jobs))
            .map_err(|error| DiskError::io("start the writer of", &path, error))?;
        Ok(Self { queue })
    }

    /// Appends an entry; `done` is called when it is on disk. Never waits, so that it may be called while the book
    /// is locked: entries stand in the log in the order in which they were applied. What may queue up is bounded
    /// by the number of batches that an agent may send ahead.
    pub fn append(&self, entry: Entry, done: impl FnOnce() + Send + 'static) {
        let job = Job {
            entry,
            done: Box::new(done),
        };
        // The writer ends only with the process.
        drop(self.queue.send(job));
    }
}

fn run(mut file: File, path: &Path, jobs: &mpsc::Receiver<Job>) {
    let mut bytes = Vec::new();
    while let Some(group) = disk::next_group(jobs) {
        bytes.clear();
        for job in &group {
            job.entry.encode(&mut bytes);
        }
        // A full disk is no reason to stop judging: the agents keep what is not acknowledged.
        while let Err(error) = disk::append_durably(&mut file, path, &bytes) {
            tracing::error!(%error, path = %path.display(), "cannot write windows; the agents keep them, trying again");
            std::thread::sleep(RETRY);
        }
        for job in group {
            (job.done)();
        }
    }
}

/// Reads all whole frames; gives the length up to the end of the last.
fn read(path: &Path, file: File, replay: &mut impl FnMut(Entry)) -> Result<u64, DiskError> {
    let size = file
        .metadata()
        .map_err(|error| DiskError::io("read", path, error))?
        .len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut at = 0_u64;
    let mut payload = Vec::new();
    let corrupt = |at: u64, problem: &str| DiskError::Corrupt {
        path: PathBuf::from(path),
        problem: format!("the frame at byte {at} {problem}"),
    };
    while size - at >= HEADER_BYTES as u64 {
        let mut header = [0; HEADER_BYTES];
        reader
            .read_exact(&mut header)
            .map_err(|error| DiskError::io("read", path, error))?;
        let [l0, l1, l2, l3, f0, f1, f2, f3, c0, c1, c2, c3] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length != !u32::from_le_bytes([f0, f1, f2, f3]) || length as usize > MAX_FRAME_BYTES {
            let mut rest = Vec::new();
            reader
                .read_to_end(&mut rest)
                .map_err(|error| DiskError::io("read", path, error))?;
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
        reader
            .read_exact(&mut payload)
            .map_err(|error| DiskError::io("read", path, error))?;
        if crc32fast::hash(&payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
            if end == size {
                break;
            }
            return Err(corrupt(at, "does not match its checksum"));
        }
        replay(Entry::decode(&payload).map_err(|problem| corrupt(at, &problem))?);
        at = end;
    }
    if at < size {
        tracing::warn!(bytes = size - at, path = %path.display(), "the windows ended in an incomplete frame; dropped");
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(data: &Path) -> Result<Vec<Entry>, DiskError> {
        let mut entries = Vec::new();
        Store::open(data, |entry| entries.push(entry))?;
        Ok(entries)
    }

    fn write(data: &Path, count: u64) -> Vec<Entry> {
        let store = Store::open(data, |_| {}).unwrap();
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
        let path = data.path().join("windows/wal");
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
