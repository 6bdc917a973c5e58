//! Checkpoints that are kept elsewhere: a copy on another volume, witnesses on other machines.
//!
//! Whoever can write the data directory can put an older state of it back, and the key would sign again; only somebody
//! outside can tell. At the start the log must be at least as long as every checkpoint that is known elsewhere, and agree
//! with it; while it grows, each checkpoint is given to them.

use std::{fs::File, io::Write as _, path::Path, sync::PoisonError};

use coalmine_judge::note::Checkpoint;
use http::StatusCode;

use super::{Health, Index, Ledger, LogProblem, Published, State, read_note};
use crate::{
    disk::DiskError,
    witness::{Witness, WitnessError},
};

/// A witness that says another size is asked so often before the next checkpoint is waited for.
const ATTEMPTS: u32 = 3;

/// Holds the log against a copy of its checkpoint.
pub(super) fn hold_against_copy(copy: &Path, index: &Index, health: &Health) -> Result<(), DiskError> {
    let Some(known) = read_note(copy).map_err(LogProblem::into_disk_error)? else {
        return Ok(());
    };
    let origin = known.origin();
    if index.nodes.size() == 0 {
        return Err(DiskError::Corrupt {
            path: copy.to_owned(),
            problem: format!(
                "covers {} records of the log {origin}, and the data directory has no log at all: was a volume lost?",
                known.size
            ),
        });
    }
    // A log that a person has opened in place of another one need not agree with that one.
    if index.follows.as_ref() != Some(&origin) {
        hold_against(index, &known, &copy.display().to_string(), health);
    }
    Ok(())
}

/// Keeps a copy of a checkpoint. The log goes on without it.
pub(super) fn write_copy(copy: &Path, published: &Published) {
    let temporary = copy.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(published.note.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, copy)
    });
    if let Err(error) = written {
        tracing::warn!(%error, copy = %copy.display(), "cannot write the copy of the checkpoint");
    }
}

fn hold_against(index: &Index, known: &Published, place: &str, health: &Health) {
    let size = index.nodes.size();
    let (state, problem) = match Checkpoint::open(&known.note, &index.keys) {
        Err(error) => (State::Forked, format!("the checkpoint in {place} {error}")),
        Ok(checkpoint) if checkpoint.size > size => (
            State::Behind,
            format!(
                "the checkpoint in {place} covers {} records, and the log here has {size}: an older state of it was put back",
                checkpoint.size
            ),
        ),
        Ok(checkpoint) if index.nodes.root(checkpoint.size) != Some(checkpoint.root) => (
            State::Forked,
            format!(
                "the first {} records here are not those that the checkpoint in {place} covers",
                checkpoint.size
            ),
        ),
        Ok(_) => return,
    };
    distrust(index, state, &problem, Some(&known.note), health);
}

/// From now on nothing is recorded.
fn distrust(index: &Index, state: State, problem: &str, there: Option<&str>, health: &Health) {
    let here = index
        .published
        .as_ref()
        .map_or("none", |published| &published.note);
    tracing::error!(
        state = state.as_str(),
        here,
        there,
        "{problem}; nothing is recorded and nothing approved until `coalmine-aggregator new-log` opens a new log \
         that names this one, or the newer state is put back"
    );
    health.set(state, problem.to_owned());
}

impl Ledger {
    /// Asks each witness what it has seen of the log, and gives it what is new.
    pub async fn consult(&self, witnesses: &[Witness]) {
        for witness in witnesses {
            let mut seen = 0;
            self.tell(witness, &mut seen).await;
        }
    }

    /// Gives each witness every new checkpoint, from now on.
    pub fn follow(&self, witnesses: Vec<Witness>) {
        for witness in witnesses {
            let ledger = self.clone();
            tokio::spawn(async move {
                let mut published = ledger.published.clone();
                let mut seen = 0;
                while published.changed().await.is_ok() {
                    ledger.tell(&witness, &mut seen).await;
                }
            });
        }
    }

    /// Gives a witness the latest checkpoint; `seen` is what it is known to have seen.
    async fn tell(&self, witness: &Witness, seen: &mut u64) {
        for _ in 0..ATTEMPTS {
            let Some(latest) = self.published.borrow().clone() else {
                return;
            };
            let Some(path) = self.consistency(*seen, latest.size) else {
                return;
            };
            match witness.add(*seen, path, &latest.note).await {
                Ok(cosigned) => {
                    *seen = latest.size;
                    return self.cosign(latest, &cosigned.lines);
                }
                Err(WitnessError::Conflict { size }) if size <= latest.size => *seen = size,
                Err(WitnessError::Conflict { .. } | WitnessError::Inconsistent(_)) => {
                    return self.ask_what_it_has_seen(witness).await;
                }
                // Perhaps it knows the log by another key.
                Err(WitnessError::Refused { status, .. }) if status == StatusCode::FORBIDDEN => {
                    return self.ask_what_it_has_seen(witness).await;
                }
                Err(error) => {
                    tracing::warn!(
                        witness = witness.key().name(),
                        address = witness.url(),
                        %error,
                        "the witness has not signed the checkpoint"
                    );
                    return;
                }
            }
        }
    }

    /// A witness says that it has seen another log. Nobody is believed without what he has signed.
    async fn ask_what_it_has_seen(&self, witness: &Witness) {
        let name = witness.key().name();
        let origin = self.published.borrow().as_ref().map(Published::origin);
        let note = witness.latest(&origin.unwrap_or_default()).await;
        match note
            .map_err(|error| error.to_string())
            .and_then(|note| Published::read(&note))
        {
            Ok(known) => hold_against(
                &self.index(),
                &known,
                &format!("the witness {name}"),
                &self.health,
            ),
            Err(problem) => tracing::warn!(
                witness = name,
                problem,
                "the witness says that it has seen another log, and does not show what"
            ),
        }
    }

    /// Adds a witness's signatures to a checkpoint.
    fn cosign(&self, latest: Published, signatures: &str) {
        let mut held = self.cosigned.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *held {
            Some(cosigned) if cosigned.size == latest.size => {
                if !cosigned.note.contains(signatures) {
                    cosigned.note.push_str(signatures);
                }
            }
            Some(cosigned) if cosigned.size > latest.size => {}
            _ => {
                *held = Some(Published {
                    size: latest.size,
                    note: latest.note + signatures,
                });
            }
        }
    }
}
