//! Evidence on one metric of one unit, against its budget.

use super::outcome::State;
use crate::{
    eprocess::{Counts, Evidence, GRID, Onset, cap},
    fixed::{Bits, OutOfRange},
};

/// Counts of both arms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Arms {
    pub(super) canary: Counts,
    pub(super) baseline: Counts,
}

impl Arms {
    /// Counts of one arm alone, in the canary's place.
    pub(super) fn of_canary(counts: Counts) -> Self {
        Self {
            canary: counts,
            baseline: Counts::default(),
        }
    }
    pub(super) fn add(&mut self, other: Self) {
        self.canary.add(other.canary);
        self.baseline.add(other.baseline);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.canary.requests == 0 && self.baseline.requests == 0
    }
}

/// Evidence of harm on one metric, and what was seen since it began to grow.
#[derive(Debug, Clone)]
pub(super) struct Track {
    evidence: Evidence,
    budget: Bits,
    cap: Bits,
    /// The evidence at which the track was found in breach; the finding stays.
    breached_at: Option<Bits>,
    failed: bool,
    /// What was counted since the evidence last began anew.
    episode: Arms,
}

impl Track {
    pub(super) fn new(budget: Bits) -> Result<Self, OutOfRange> {
        Ok(Self {
            evidence: Evidence::default(),
            budget,
            cap: cap(budget)?,
            breached_at: None,
            failed: false,
            episode: Arms::default(),
        })
    }

    /// Adds a block.
    pub(super) fn take(
        &mut self,
        bits: Result<[Bits; GRID], OutOfRange>,
        seen: Arms,
        onset: Onset,
    ) -> Result<(), OutOfRange> {
        let begins = bits
            .and_then(|bits| self.evidence.add(bits, onset, self.cap))
            .inspect_err(|_| self.failed = true)?;
        if begins {
            self.episode = Arms::default();
        }
        self.episode.add(seen);
        Ok(())
    }

    /// Adds a block; a failure is kept and reported.
    pub(super) fn take_or_fail(&mut self, bits: Result<[Bits; GRID], OutOfRange>, seen: Arms, onset: Onset) {
        if self.take(bits, seen, onset).is_err() {
            self.failed = true;
        }
    }

    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    pub(super) fn blocks(&self) -> u32 {
        self.evidence.blocks()
    }

    pub(super) fn budget(&self) -> Bits {
        self.budget
    }

    pub(super) fn episode(&self) -> Arms {
        self.episode
    }

    /// The evidence now; after a breach never less than it was then.
    pub(super) fn bits(&self) -> Result<Bits, OutOfRange> {
        let now = self.evidence.bits()?;
        Ok(self.breached_at.map_or(now, |then| then.max(now)))
    }

    /// The track's state. A breach is kept.
    pub(super) fn state(&mut self) -> State {
        if self.breached_at.is_some() {
            return State::Breach;
        }
        let Some(bits) = self.sound_bits() else {
            return State::Error;
        };
        if bits > self.budget {
            self.breached_at = Some(bits);
            return State::Breach;
        }
        if bits >= self.budget / 2 {
            State::Suspect
        } else {
            State::Clear
        }
    }

    /// The track's state while its evidence is not about the new version: what is above half of the budget is
    /// given up.
    pub(super) fn excuse(&mut self) -> State {
        if self.breached_at.is_some() {
            return State::Breach;
        }
        let Some(bits) = self.sound_bits() else {
            return State::Error;
        };
        if bits < self.budget / 2 {
            return State::Clear;
        }
        if self.evidence.lower_to(self.budget / 2).is_err() {
            self.failed = true;
            return State::Error;
        }
        State::Shared
    }

    fn sound_bits(&self) -> Option<Bits> {
        if self.failed { None } else { self.bits().ok() }
    }
}
