//! The one thread that writes: it takes all records that wait, makes them durable together, and then answers.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        mpsc::{self, RecvTimeoutError},
    },
    time::Instant,
};

use coalmine_judge::{
    chain::{Chain, Hash},
    record::{Body, Record},
};
use tokio::sync::{oneshot, watch};

use super::{
    AppendError, Appended, Blob, Health, Index, Options, Published, State, anchor,
    key::{self, Keys},
    storage::{Group, Line, Storage},
};
use crate::{BUILD, clock, disk, metrics::Metrics};

/// Most records that share one sync.
const MAX_GROUP: usize = 1_024;

/// A segment is sealed after so long, whatever its size.
const MAX_SEGMENT_AGE_MS: u64 = 24 * 3_600_000;

/// A record on its way into the log.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) body: Body,
    pub(super) blobs: Vec<Blob>,
    pub(super) answer: oneshot::Sender<Result<Appended, AppendError>>,
}

/// What the writer is told.
#[derive(Debug)]
pub(super) enum Message {
    Append(Box<Job>),
    /// The log may be put in order.
    Begin,
    /// Nothing follows.
    Stop(oneshot::Sender<()>),
}

pub(super) struct Writer {
    pub(super) data: PathBuf,
    pub(super) log: String,
    pub(super) keys: Keys,
    pub(super) chain: Chain,
    pub(super) storage: Storage,
    pub(super) options: Options,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
    pub(super) index: Arc<RwLock<Index>>,
    pub(super) publish: watch::Sender<Option<Published>>,
    /// The blobs that records name, until orphans were looked for.
    pub(super) named: HashSet<Hash>,
    pub(super) torn: Option<(u64, String)>,
}

impl Writer {
    /// Writes the first record of a log that begins.
    pub(super) fn begin_log(&mut self) -> io::Result<()> {
        if self.chain.size() > 0 {
            return Ok(());
        }
        let start = Body::LogStart {
            build: BUILD.to_owned(),
            key: self.keys.current.verifier().to_string(),
            follows: self.options.follows.take(),
        };
        self.write(vec![(start, Vec::new())]).map(drop)
    }

    pub(super) fn run(mut self, messages: &mpsc::Receiver<Message>) {
        let mut begun = false;
        loop {
            let due = match &self.storage {
                Storage::Files(files) => files.checkpoint_due_in(),
                Storage::Postgres(_) => None,
            };
            let patience = due.unwrap_or(self.options.heartbeat);
            let first = match messages.recv_timeout(patience) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    if due.is_some() {
                        self.write_checkpoint();
                    } else if begun {
                        self.note(Body::Heartbeat {});
                        self.keep_checkpoint();
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let was_begun = begun;
            let mut stop = None;
            let mut group = Vec::new();
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Append(job) => group.push(*job),
                    Message::Begin => begun = true,
                    Message::Stop(tell) => stop = Some(tell),
                }
                next = (group.len() < MAX_GROUP && stop.is_none())
                    .then(|| messages.try_recv().ok())
                    .flatten();
            }
            if begun && !was_begun {
                self.put_in_order();
            }
            if !group.is_empty() {
                self.serve(group);
                self.seal_if_due();
            }
            if let Some(tell) = stop {
                self.write_checkpoint();
                // Whoever asked may have gone away.
                tell.send(()).ok();
                return;
            }
        }
    }

    /// Writes the checkpoint's file, if it is behind.
    fn write_checkpoint(&mut self) {
        let Storage::Files(files) = &mut self.storage else {
            return;
        };
        // What else is wrong with the log stays so.
        match (files.write_checkpoint(), self.health.get().0) {
            (false, State::Ok) => {
                let why = "the checkpoint of the decision log cannot be written".to_owned();
                self.health.set(State::Failing, why);
            }
            (true, State::Failing) => self.health.set(State::Ok, String::new()),
            _ => {}
        }
    }

    /// After whoever knows more was asked: says what was set aside, signs what no checkpoint covers, removes orphans.
    fn put_in_order(&mut self) {
        if self.health.distrust().is_some() {
            // Nothing is written, and nothing taken away: what is missing may come back.
            return;
        }
        if let Storage::Files(files) = &self.storage {
            files.collect_orphans(&std::mem::take(&mut self.named));
        }
        if let Some((bytes, kept_in)) = self.torn.take() {
            self.note(Body::Gap { bytes, kept_in });
        }
        let size = self.chain.size();
        let covered = self
            .publish
            .borrow()
            .as_ref()
            .is_some_and(|published| published.size == size);
        if !covered && let Err(error) = self.write(Vec::new()) {
            self.failed(&error);
        }
        self.keep_checkpoint();
    }

    /// Appends a record of the log's own.
    fn note(&mut self, body: Body) {
        if self.health.distrust().is_some() {
            return;
        }
        match self.write(vec![(body, Vec::new())]) {
            Ok(_) => self.seal_if_due(),
            Err(error) => self.failed(&error),
        }
    }

    fn serve(&mut self, group: Vec<Job>) {
        let begun = Instant::now();
        let (answers, bodies): (Vec<_>, Vec<_>) = group
            .into_iter()
            .map(|job| (job.answer, (job.body, job.blobs)))
            .unzip();
        let refuse = |answers: Vec<oneshot::Sender<_>>, error: AppendError| {
            for answer in answers {
                drop(answer.send(Err(error.clone())));
            }
        };
        if let Some(why) = self.health.distrust() {
            return refuse(answers, AppendError::Untrusted(why));
        }
        let result = self.write(bodies);
        self.metrics
            .audit_append_seconds
            .observe(begun.elapsed().as_secs_f64());
        match result {
            Ok(results) => {
                for (answer, result) in answers.into_iter().zip(results) {
                    // A caller that has gone away needs no answer.
                    drop(answer.send(result));
                }
            }
            Err(error) => {
                self.failed(&error);
                refuse(answers, AppendError::Disk(error.to_string()));
            }
        }
    }

    /// Takes note that a commit failed. When the disk is full, what is kept for that is given up for one record.
    fn failed(&mut self, error: &io::Error) {
        let full = disk::is_full(error);
        tracing::error!(%error, log = self.log, "cannot write the decision log");
        let before = self.health.get().0;
        let state = if full { State::Full } else { State::Failing };
        self.health
            .set(state, format!("the decision log cannot be written: {error}"));
        if !full || before == State::Full {
            return;
        }
        let problem = error.to_string();
        let group = self.group(vec![(Body::DiskFull { problem }, Vec::new())]);
        if let (Storage::Files(files), Ok((group, chain, results))) = (&mut self.storage, group) {
            match files.commit_last(&group) {
                Ok(published) => self.committed(&group, chain, &results, published),
                Err(error) => tracing::error!(%error, "not even the reserve is enough to record it"),
            }
            // Whatever became of that record, the disk is full.
            self.health.set(
                State::Full,
                format!("the decision log cannot be written: {error}"),
            );
        }
    }

    /// Makes records durable. On an error nothing of the group is in the log; a record that cannot be one is refused
    /// alone.
    fn write(&mut self, bodies: Vec<(Body, Vec<Blob>)>) -> io::Result<Vec<Result<Appended, AppendError>>> {
        let (group, chain, results) = self.group(bodies)?;
        let published = self.storage.commit(&group)?;
        self.committed(&group, chain, &results, published);
        Ok(results)
    }

    /// Draws up a commit, and what the log is after it.
    #[allow(clippy::type_complexity, reason = "three things, once")]
    fn group(
        &self,
        bodies: Vec<(Body, Vec<Blob>)>,
    ) -> io::Result<(Group, Chain, Vec<Result<Appended, AppendError>>)> {
        let mut chain = self.chain.clone();
        let time_ms = clock::now_ms();
        let mut group = Group {
            first: chain.size(),
            time_ms,
            prev: chain.head().unwrap_or(Hash::ZERO),
            head: Hash::ZERO,
            blobs: Vec::new(),
            lines: Vec::with_capacity(bodies.len()),
            note: String::new(),
        };
        let mut results = Vec::with_capacity(bodies.len());
        for (body, blobs) in bodies {
            results.push(match chain.append(&self.log, time_ms, body) {
                Ok((record, text, leaf)) => {
                    group.blobs.extend(blobs);
                    let id = match &record.body {
                        Body::Decision(decision) => Some(decision.id.clone()),
                        _ => None,
                    };
                    group.lines.push(Line { text, leaf, id });
                    Ok(Appended { record, hash: leaf })
                }
                Err(error) => Err(AppendError::Refused(error.to_string())),
            });
        }
        group.head = chain.head().unwrap_or(Hash::ZERO);
        let rotated = chain.key() != [self.keys.current.verifier()];
        let next = rotated.then(|| self.next_key()).transpose()?;
        let signers = next.iter().chain(self.keys.all());
        group.note = chain.checkpoint().sign(signers);
        Ok((group, chain, results))
    }

    fn committed(
        &mut self,
        group: &Group,
        chain: Chain,
        results: &[Result<Appended, AppendError>],
        published: bool,
    ) {
        self.chain = chain;
        let size = self.chain.size();
        let latest = Published {
            size,
            note: group.note.clone(),
        };
        if published && let Some(copy) = &self.options.checkpoint_copy {
            anchor::write_copy(copy, &latest);
        }
        {
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            for appended in results.iter().flatten() {
                index.add(&appended.record, appended.hash);
                self.metrics.audit_record(appended.record.body.kind());
            }
            index.keys = self.chain.keys().to_vec();
            if published {
                index.published = Some(latest.clone());
            }
        }
        if published {
            self.publish.send_replace(Some(latest));
        }
        let rotated = results.iter().flatten().any(|appended| {
            matches!(
                &appended.record,
                Record {
                    body: Body::KeyRotation { .. },
                    ..
                }
            )
        });
        if rotated {
            self.keep_checkpoint();
            self.take_next_key();
        }
        let state = if published {
            (State::Ok, String::new())
        } else {
            (
                State::Failing,
                "the checkpoint of the decision log cannot be written".to_owned(),
            )
        };
        self.health.set(state.0, state.1);
        if let Storage::Files(files) = &self.storage
            && let Some(bytes) = files.free_bytes()
        {
            self.metrics.audit_disk_free(bytes);
        }
    }

    fn seal_if_due(&mut self) {
        let Storage::Files(files) = &self.storage else {
            return;
        };
        let Some((first, bytes)) = files.wants_seal(clock::now_ms(), MAX_SEGMENT_AGE_MS) else {
            return;
        };
        if let Err(error) = self.write(vec![(Body::SegmentSeal { first, bytes }, Vec::new())]) {
            return self.failed(&error);
        }
        let size = self.chain.size();
        if let Storage::Files(files) = &mut self.storage
            && let Err(error) = files.seal(size)
        {
            // It goes on in the same segment, and is tried again.
            tracing::warn!(%error, "cannot begin a new segment");
        }
        self.keep_checkpoint();
    }

    fn keep_checkpoint(&self) {
        if self.health.distrust().is_some() {
            return;
        }
        if let Some(published) = &*self.publish.borrow() {
            self.storage.keep_checkpoint(&published.note);
        }
    }

    /// The key of a rotation that is being recorded.
    fn next_key(&self) -> io::Result<coalmine_judge::note::SignerKey> {
        key::next(&self.data).map_err(|error| io::Error::other(error.to_string()))
    }

    fn take_next_key(&mut self) {
        match key::open(&self.data, &self.log, self.chain.keys()) {
            Ok(keys) => self.keys = keys,
            Err(error) => tracing::error!(
                %error,
                "the new key is named by the log and not in its place; start again to finish that"
            ),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = "the writer of the decision log has failed".to_owned();
            self.health.set(State::Failing, why);
        }
    }
}
