//! What a witness remembers, on disk: its key, and of each log the checkpoint that it cosigned last.
//!
//! ```text
//! key                    the key that cosigns, PRIVATE+KEY+NAME+ID+BASE64; made at the first start, never again
//! logs/<hash>            the latest checkpoint of the log with that SHA-256 of its name: a note with the lines of the
//!                        log's keys and of the witness
//! evidence/<hash>-<size>-<root>
//!                        a checkpoint that the log has signed and that was refused, since nothing shows that it
//!                        continues what was cosigned: both notes, each followed by an empty line. The root is given by
//!                        its first 8 hexadecimal digits
//! .lock                  held while a witness uses the directory
//! ```
//!
//! A checkpoint is decided about, stored and synced under the lock of its log, and only then is anybody answered. So
//! whatever happens, and in whatever order requests come, there is one line of checkpoints that grow.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io,
    path::{Path, PathBuf},
    slice,
    sync::{Mutex, MutexGuard, PoisonError},
};

use coalmine_judge::{
    chain::Hash,
    note::{Checkpoint, Kind, Note, SignerKey, VerifierKey},
    witness::{AddCheckpoint, Refusal},
};

use crate::{
    clock,
    disk::{self, DiskError},
    server::StartError,
};

/// Most refused checkpoints that are kept of one log, so that it cannot fill the disk.
const MAX_EVIDENCE: usize = 1_000;

/// What to do about a directory that does not hold what was written. To go on without it would be to forget.
const REMEDY: &str = "restore it, or move it away if the log may be trusted anew from its next checkpoint on";

/// What a witness remembers.
#[derive(Debug)]
pub(super) struct Memory {
    key: SignerKey,
    logs: BTreeMap<String, Log>,
    directory: PathBuf,
    /// Held, so that nobody else decides about the same logs.
    _lock: File,
}

/// A log that the witness knows.
#[derive(Debug)]
struct Log {
    /// SHA-256 of the log's name, which is how files and monitors name it.
    hash: String,
    keys: Vec<VerifierKey>,
    latest: Mutex<Option<Latest>>,
}

/// The checkpoint that was cosigned last.
#[derive(Debug)]
struct Latest {
    checkpoint: Checkpoint,
    /// As it is stored.
    note: String,
}

/// Why a checkpoint is not cosigned.
#[derive(Debug)]
pub(super) enum NotCosigned {
    /// The witness refuses.
    Refused(Refusal),
    /// The witness cannot.
    Failed(String),
}

impl From<Refusal> for NotCosigned {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError::Failed(error.to_string())
}

fn wrong(path: &Path, problem: impl std::fmt::Display) -> StartError {
    StartError::Failed(format!("{}: {problem}; {REMEDY}", path.display()))
}

fn hash_of(origin: &str) -> String {
    Hash::of(origin.as_bytes()).to_string()
}

fn locked(latest: &Mutex<Option<Latest>>) -> MutexGuard<'_, Option<Latest>> {
    // It is replaced as a whole, after it is on disk: a panic elsewhere has not left half of it.
    latest.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The key of a witness's directory; none if there is none.
pub(super) fn read_key(data: &Path) -> Result<Option<SignerKey>, StartError> {
    let path = data.join("key");
    let key = match std::fs::read_to_string(&path) {
        Ok(text) => SignerKey::parse(&text).map_err(|error| {
            failed(format_args!(
                "{} {error}; restore it from a backup",
                path.display()
            ))
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(DiskError::io("read", &path, error))),
    };
    if key.verifier().kind() != Kind::Cosignature {
        return Err(StartError::Usage(format!(
            "{} is a key that signs a log, not the key of a witness; choose another --data directory",
            path.display()
        )));
    }
    Ok(Some(key))
}

impl Memory {
    /// Opens the directory of a witness, or begins one. `keys` are those of the logs that it knows.
    pub(super) fn open(data: &Path, name: &str, keys: &[VerifierKey]) -> Result<Self, StartError> {
        let new = !data.exists();
        for directory in [data.to_owned(), data.join("logs"), data.join("evidence")] {
            disk::create_dir(&directory).map_err(failed)?;
        }
        if new {
            disk::sync_directory(data).map_err(|error| failed(DiskError::io("sync", data, error)))?;
        }
        let lock = disk::lock(data).map_err(|error| match error {
            DiskError::InUse(path) => failed(format_args!(
                "{} is in use by another process; stop it or choose another --data directory",
                path.display()
            )),
            error => failed(error),
        })?;
        // The names of the two directories last as well.
        let inside = data.join("logs");
        disk::sync_directory(&inside).map_err(|error| failed(DiskError::io("sync", data, error)))?;
        let key = open_key(data, name)?;
        let mut stored = read_logs(&inside, &key.verifier(), keys)?;

        let mut logs: BTreeMap<String, Log> = BTreeMap::new();
        for key in keys {
            let origin = key.name().to_owned();
            let log = logs.entry(origin).or_insert_with_key(|origin| Log {
                hash: hash_of(origin),
                keys: Vec::new(),
                latest: Mutex::new(stored.remove(origin)),
            });
            if !log.keys.contains(key) {
                log.keys.push(key.clone());
            }
        }
        for (origin, latest) in stored {
            tracing::warn!(
                origin,
                size = latest.checkpoint.size,
                "a log that was cosigned before is not among the logs given with --log: it is remembered, and refused"
            );
        }
        Ok(Self {
            key,
            logs,
            directory: data.to_owned(),
            _lock: lock,
        })
    }

    /// The key that checks this witness's cosignatures.
    pub(super) fn key(&self) -> VerifierKey {
        self.key.verifier()
    }

    /// The latest cosigned checkpoint of a log, given by its name.
    pub(super) fn latest(&self, origin: &str) -> Option<String> {
        let log = self.logs.get(origin)?;
        locked(&log.latest).as_ref().map(|latest| latest.note.clone())
    }

    /// The same, given by the hash of its name.
    pub(super) fn latest_by_hash(&self, hash: &str) -> Option<String> {
        let log = self.logs.values().find(|log| log.hash == hash)?;
        locked(&log.latest).as_ref().map(|latest| latest.note.clone())
    }

    /// Cosigns a checkpoint if it continues the latest one, and stores it. Gives the signature line.
    pub(super) fn add(&self, body: &str) -> Result<String, NotCosigned> {
        let request = AddCheckpoint::parse(body)?;
        let statement = request.statement()?;
        let log = self.logs.get(&statement.origin).ok_or(Refusal::UnknownLog)?;
        let mut latest = locked(&log.latest);
        let before = latest.as_ref().map(|latest| &latest.checkpoint);
        let checkpoint = match request.decide(&log.keys, before) {
            Ok(checkpoint) => checkpoint,
            Err(refusal) => {
                if let Refusal::Inconsistent(problem) = &refusal {
                    self.keep_evidence(log, latest.as_ref(), &request, &statement, problem);
                }
                return Err(refusal.into());
            }
        };
        let now = clock::now_ms() / 1_000;
        if now == 0 {
            let problem = "the clock of this machine stands before 1970, and a cosignature states its time";
            return Err(NotCosigned::Failed(problem.to_owned()));
        }
        let (text, lines) = signed(&request, &log.keys);
        let line = self.key.sign(&text, now);
        let note = format!("{text}\n{lines}{line}");
        // What could not be read at the next start, such as a note that has become too long, is not written.
        if let Err(problem) = read_note(&note, &self.key(), &log.keys) {
            return Err(Refusal::Malformed(format!("with the cosignature its checkpoint {problem}")).into());
        }
        let path = self.directory.join("logs").join(&log.hash);
        disk::replace(&path, note.as_bytes())
            .map_err(|error| NotCosigned::Failed(DiskError::io("write", &path, error).to_string()))?;
        tracing::debug!(origin = checkpoint.origin, size = checkpoint.size, "cosigned");
        *latest = Some(Latest { checkpoint, note });
        Ok(line)
    }

    /// Keeps a checkpoint that the log has signed and that does not continue the latest one. Failing that is no reason
    /// to answer otherwise.
    fn keep_evidence(
        &self,
        log: &Log,
        latest: Option<&Latest>,
        request: &AddCheckpoint,
        refused: &Checkpoint,
        problem: &str,
    ) {
        // Only the proof is wrong: what was signed tells nothing about the log.
        let known = latest.map_or(refused.size > 0, |latest| latest.checkpoint == *refused);
        if known {
            return;
        }
        let (text, lines) = signed(request, &log.keys);
        let refused_note = format!("{text}\n{lines}");
        let latest_note = latest.map(|latest| latest.note.as_str()).unwrap_or_default();
        let root: String = refused.root.to_string().chars().take(8).collect();
        let directory = self.directory.join("evidence");
        let path = directory.join(format!("{}-{}-{root}", log.hash, refused.size));
        if path.exists() {
            tracing::warn!(origin = refused.origin, problem, evidence = %path.display(), "refused once more");
            return;
        }
        let message = "a checkpoint that the log has signed does not continue what was cosigned: the log shows different \
                       people different records, or whoever asks has made the proof wrongly";
        tracing::error!(
            origin = refused.origin,
            problem,
            cosigned = latest_note,
            refused = refused_note,
            evidence = %path.display(),
            "{message}"
        );
        let notes = [latest_note, &refused_note];
        let notes: String = notes
            .iter()
            .filter(|note| !note.is_empty())
            .map(|note| format!("{note}\n"))
            .collect();
        match evidence_of(&directory, &log.hash) {
            Ok(kept) if kept >= MAX_EVIDENCE => {
                tracing::warn!(
                    origin = refused.origin,
                    kept,
                    "there is so much evidence about this log that no more is kept"
                );
            }
            Ok(_) => {
                if let Err(error) = disk::replace(&path, notes.as_bytes()) {
                    tracing::error!(error = %DiskError::io("write", &path, error), "the evidence is not kept");
                }
            }
            Err(error) => {
                tracing::error!(error = %DiskError::io("read", &directory, error), "the evidence is not kept");
            }
        }
    }
}

/// The text of a request's checkpoint, and the lines that keys of the log have made.
fn signed(request: &AddCheckpoint, keys: &[VerifierKey]) -> (String, String) {
    match Note::parse(&request.checkpoint) {
        Ok(note) => (note.unverified().to_owned(), note.signatures_of(keys).concat()),
        // It was read before.
        Err(_) => (request.checkpoint.clone(), String::new()),
    }
}

fn evidence_of(directory: &Path, hash: &str) -> io::Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(directory)? {
        if entry?
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(hash))
        {
            count += 1;
        }
    }
    Ok(count)
}

/// Reads the key, or makes one if there is nothing yet that a witness would have to remember.
fn open_key(data: &Path, name: &str) -> Result<SignerKey, StartError> {
    let path = data.join("key");
    if let Some(key) = read_key(data)? {
        let verifier = key.verifier();
        if verifier.name() != name {
            return Err(StartError::Usage(format!(
                "{} is the key of {:?}; give that as --name, or choose another --data directory",
                path.display(),
                verifier.name()
            )));
        }
        return Ok(key);
    }
    for directory in ["logs", "evidence"].map(|name| data.join(name)) {
        let unreadable = |error| failed(DiskError::io("read", &directory, error));
        for entry in std::fs::read_dir(&directory).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            if Path::new(&entry.file_name()).extension() != Some(OsStr::new("tmp")) {
                return Err(failed(format_args!(
                    "{} is missing, and a witness that has cosigned already gets no other key unasked; restore it from \
                     a backup, or begin another witness with an empty --data directory",
                    path.display()
                )));
            }
        }
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| failed(DiskError::io("make the key in", &path, io::Error::other(error))))?;
    let key = SignerKey::from_seed(name, Kind::Cosignature, &seed);
    disk::replace_secret(&path, key.to_secret_text().as_bytes())
        .map_err(|error| failed(DiskError::io("write", &path, error)))?;
    tracing::info!(
        key = %key.verifier(),
        "a key was made that cosigns checkpoints; give this line to those who ask this witness, and keep a backup of \
         the key's file"
    );
    Ok(key)
}

/// Reads the latest checkpoints, by the name of the log.
fn read_logs(
    directory: &Path,
    own: &VerifierKey,
    keys: &[VerifierKey],
) -> Result<BTreeMap<String, Latest>, StartError> {
    let unreadable = |error| failed(DiskError::io("read", directory, error));
    let mut stored = BTreeMap::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if name.parse::<Hash>().is_err() {
            if path.extension() != Some(OsStr::new("tmp")) {
                tracing::warn!(file = %path.display(), "this file is not a witness's, and is not read");
            }
            continue;
        }
        let bytes = std::fs::read(&path).map_err(|error| failed(DiskError::io("read", &path, error)))?;
        let note = String::from_utf8(bytes).map_err(|_| wrong(&path, "is not UTF-8"))?;
        let checkpoint = read_note(&note, own, keys).map_err(|problem| wrong(&path, problem))?;
        if hash_of(&checkpoint.origin) != name {
            let problem = format!(
                "is a checkpoint of {:?}, whose file has another name",
                checkpoint.origin
            );
            return Err(wrong(&path, problem));
        }
        stored.insert(checkpoint.origin.clone(), Latest { checkpoint, note });
    }
    Ok(stored)
}

/// Reads a checkpoint that this witness has cosigned. The log's keys may have been exchanged since.
fn read_note(note: &str, own: &VerifierKey, keys: &[VerifierKey]) -> Result<Checkpoint, String> {
    let note = Note::parse(note).map_err(|error| error.to_string())?;
    let known = [slice::from_ref(own), keys].concat();
    let text = note.verify(&known).map_err(|error| error.to_string())?;
    if note.signatures_of(slice::from_ref(own)).is_empty() {
        return Err(format!("is not cosigned by {own}, the key of this witness"));
    }
    Checkpoint::parse(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
