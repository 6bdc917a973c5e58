//! What a decision rests on, so that it can be judged again without the log: a blob that names all others.
//!
//! The judge takes one window after the other, so a decision rests on all windows since the rollout began. Their blobs are
//! the deltas. Every [`SNAPSHOT_EVERY`] windows the state is kept as well, as a snapshot; a manifest names the latest one
//! and the windows after it, the last of which is the decision's own:
//!
//! ```text
//! {"rollout":{...as in the log...},"snapshot":{"state":"<digest>","window":20},"v":1,"windows":["<digest>",...]}
//! ```
//!
//! A snapshot is believed where it only saves time (going on after a restart, looking at one decision). A replay of the
//! whole log computes every snapshot again and compares its bytes.

use serde::{Deserialize, Serialize};

use crate::{
    chain::Hash,
    record::{RolloutStart, canonical},
};

/// After so many windows the state is kept.
pub const SNAPSHOT_EVERY: usize = 10;

/// What one decision rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this form.
    pub v: u32,
    /// How the rollout began: judge, policy and history with it.
    pub rollout: RolloutStart,
    /// Where to begin; none for the beginning of the rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// The windows from there on, the decision's own last.
    pub windows: Vec<Hash>,
}

/// The state of the judge after a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The window.
    pub window: u64,
    /// Digest of the state's blob.
    pub state: Hash,
}

impl Manifest {
    /// The manifest of a rollout's first window, without the window.
    pub fn begin(rollout: RolloutStart) -> Self {
        Self {
            v: 1,
            rollout,
            snapshot: None,
            windows: Vec::new(),
        }
    }

    /// Whether the state should be kept before the next window.
    pub fn wants_snapshot(&self) -> bool {
        self.windows.len() >= SNAPSHOT_EVERY
    }

    /// Begins anew from a snapshot.
    pub fn rest_on(&mut self, snapshot: Snapshot) {
        self.snapshot = Some(snapshot);
        self.windows.clear();
    }

    /// Reads a manifest.
    pub fn parse(text: &str) -> Result<Self, String> {
        let manifest: Self =
            serde_json::from_str(text).map_err(|error| format!("is no manifest: {error}"))?;
        if manifest.v != 1 {
            return Err(format!(
                "has version {}; this program reads version 1",
                manifest.v
            ));
        }
        if manifest.windows.is_empty() || manifest.windows.len() > SNAPSHOT_EVERY {
            return Err(format!(
                "names {} windows; a manifest has 1 to {SNAPSHOT_EVERY}",
                manifest.windows.len()
            ));
        }
        Ok(manifest)
    }

    /// The manifest as its blob has it.
    pub fn to_json(&self) -> String {
        // Strings, integers and lists always convert.
        canonical(&serde_json::to_value(self).unwrap_or_default())
    }
}
