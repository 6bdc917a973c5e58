//! Numbers that follow from a seed (SplitMix64), and what happened (the trace).

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// A stream of numbers. Each part of the simulation has its own, so that none disturbs another.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of one part in the simulation of a seed.
    pub(crate) fn of(seed: u64, part: u64) -> Self {
        let mut rng = Self(seed);
        let mixed = rng.draw() ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(mixed)
    }

    /// The next number.
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % (high - low + 1)
    }

    /// True so many times of a hundred.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.draw() % 100 < percent
    }

    /// An index into something of this length.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        (self.draw() % length as u64) as usize
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }
}

/// What happened, in order. Cloning gives another handle to the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Arc<Mutex<Vec<String>>>);

impl Trace {
    /// Notes what happens on a host, now.
    pub(crate) fn note(&self, what: &str) {
        self.note_at(turmoil::sim_elapsed().unwrap_or_default(), what);
    }

    /// Notes what happens at a time of the simulation.
    pub(crate) fn note_at(&self, at: Duration, what: &str) {
        let line = format!("{:>9.3} {what}", at.as_secs_f64());
        self.0.lock().unwrap().push(line);
    }

    /// All of it.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}
