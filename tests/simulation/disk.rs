//! A disk that forgets at a crash what was not synced; it can be slow and full.
//!
//! It works as the store's writer does: what has queued up while the last group was synced is the next group;
//! a group is on disk when the sync has returned, and only then is anybody told. At a crash a part of the group
//! that is being written may be on disk, cut off anywhere, or all of it without anybody having been told. A
//! roll-up takes the place of all that was written before it, whole or not at all.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use coalmine_aggregator::store::{self, Entry};
use tokio::{sync::Notify, time::sleep};

use crate::random::Rng;

/// How long the store waits before it tries again to write to a full disk.
const RETRY: Duration = Duration::from_secs(1);

/// What is called when something is on disk.
pub(crate) type Done = Box<dyn FnOnce() + Send>;

/// How the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// A sync takes a few milliseconds.
    Fine,
    /// A sync takes up to some seconds.
    Slow,
    /// Nothing can be written.
    Full,
}

/// The disk of the aggregator. Cloning gives another handle to the same one.
#[derive(Clone)]
pub(crate) struct Disk {
    state: Arc<Mutex<State>>,
    queued: Arc<Notify>,
}

struct State {
    /// What is there after a crash.
    synced: Vec<u8>,
    /// What roll-ups took the place of: no longer on disk, and kept here for the judgement.
    retired: Vec<u8>,
    /// The group that is being written.
    group: Vec<Job>,
    /// What waits for it.
    queue: Vec<Job>,
    mood: Mood,
    rng: Rng,
    /// How many times a frame was cut off by a crash.
    torn: u64,
}

struct Job {
    frame: Vec<u8>,
    is_roll_up: bool,
    done: Done,
}

impl Disk {
    /// An empty disk.
    pub(crate) fn new(rng: Rng) -> Self {
        let state = State {
            synced: Vec::new(),
            retired: Vec::new(),
            group: Vec::new(),
            queue: Vec::new(),
            mood: Mood::Fine,
            rng,
            torn: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            queued: Arc::new(Notify::new()),
        }
    }

    /// Takes a frame to write.
    pub(crate) fn append(&self, frame: Vec<u8>, done: Done) {
        self.push(Job {
            frame,
            is_roll_up: false,
            done,
        });
    }

    /// Takes frames that stand for all that was appended before.
    pub(crate) fn roll_up(&self, frames: Vec<u8>) {
        self.push(Job {
            frame: frames,
            is_roll_up: true,
            done: Box::new(|| {}),
        });
    }

    fn push(&self, job: Job) {
        self.state.lock().unwrap().queue.push(job);
        self.queued.notify_one();
    }

    /// Writes what is appended, for as long as the host runs.
    pub(crate) async fn work(&self) {
        loop {
            let Some(takes) = self.begin() else {
                self.queued.notified().await;
                continue;
            };
            sleep(takes).await;
            while self.mood() == Mood::Full {
                sleep(RETRY).await;
            }
            // Whoever is told locks other things: the disk must not be locked meanwhile.
            self.finish().into_iter().for_each(|done| done());
        }
    }

    /// Begins to write a group, if there is one; says how long that takes.
    fn begin(&self) -> Option<Duration> {
        let mut state = self.state.lock().unwrap();
        if state.queue.is_empty() {
            return None;
        }
        // A roll-up is a group of its own.
        let end = match state.queue.iter().position(|job| job.is_roll_up) {
            Some(at) => at.max(1),
            None => state.queue.len(),
        };
        let group = state.queue.drain(..end).collect();
        state.group = group;
        let takes_ms = match state.mood {
            Mood::Slow => state.rng.between(100, 3_000),
            Mood::Fine | Mood::Full => state.rng.between(1, 8),
        };
        Some(Duration::from_millis(takes_ms))
    }

    fn finish(&self) -> Vec<Done> {
        let mut state = self.state.lock().unwrap();
        let group = std::mem::take(&mut state.group);
        let written = group.into_iter().map(|job| {
            if job.is_roll_up {
                state.begin_anew(&job.frame);
            } else {
                state.synced.extend_from_slice(&job.frame);
            }
            job.done
        });
        written.collect()
    }

    fn mood(&self) -> Mood {
        self.state.lock().unwrap().mood
    }

    /// Changes how the disk is.
    pub(crate) fn set(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    /// The host has crashed.
    pub(crate) fn crash(&self) {
        let mut state = self.state.lock().unwrap();
        let (group, queue) = (std::mem::take(&mut state.group), std::mem::take(&mut state.queue));
        let bytes: Vec<u8> = group.iter().flat_map(|job| job.frame.iter().copied()).collect();
        let kept = match state.mood {
            Mood::Full => 0,
            Mood::Fine | Mood::Slow => state.rng.index(bytes.len() + 1),
        };
        if !group.iter().any(|job| job.is_roll_up) {
            state.synced.extend_from_slice(&bytes[..kept]);
        } else if kept > bytes.len() / 2 {
            state.begin_anew(&bytes);
        }
        drop(state);
        drop((group, queue));
    }

    /// Reads what is there and cuts off an incomplete frame, as the store does when it is opened.
    pub(crate) fn open(&self, each: impl FnMut(Entry)) -> Result<(), String> {
        let mut state = self.state.lock().unwrap();
        let whole = store::entries(&state.synced, each)?;
        let whole = usize::try_from(whole).unwrap();
        if whole < state.synced.len() {
            state.torn += 1;
            state.synced.truncate(whole);
        }
        Ok(())
    }

    /// Reads all that ever was on disk, what roll-ups took the place of included.
    pub(crate) fn read_all(&self, mut each: impl FnMut(Entry)) -> Result<(), String> {
        let state = self.state.lock().unwrap();
        store::entries(&state.retired, &mut each)?;
        store::entries(&state.synced, &mut each)?;
        Ok(())
    }

    /// How many times a frame was cut off by a crash.
    pub(crate) fn torn(&self) -> u64 {
        self.state.lock().unwrap().torn
    }

    /// Whether everything is written.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.state.lock().unwrap();
        state.group.is_empty() && state.queue.is_empty()
    }
}

impl State {
    fn begin_anew(&mut self, frames: &[u8]) {
        let before = std::mem::replace(&mut self.synced, frames.to_vec());
        self.retired.extend(before);
    }
}
