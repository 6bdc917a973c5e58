//! Callers that append one thing after the other, each as soon as the one before is durable; and the floor.

use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{sync::Mutex, task::JoinSet, time::Instant};

use super::pool::Pool;
use crate::report::Spread;

/// What the rounds of one kind gave.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Appends a second, of each round.
    pub(super) rates: Vec<f64>,
    pub(super) appended: u64,
    pub(super) seconds: f64,
    /// How long each append took.
    took_ms: Vec<f64>,
}

impl Lane {
    /// A round of so many callers. `append` prepares something, and gives what appends it; only that is timed.
    pub(super) async fn round<A>(
        &mut self,
        pool: &Pool,
        callers: usize,
        length: Duration,
        append: impl Fn(usize) -> A + Clone + Send + 'static,
    ) -> anyhow::Result<()>
    where
        A: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let begun = Instant::now();
        let until = begun + length;
        let mut calling = JoinSet::new();
        for caller in 0..callers {
            let append = append.clone();
            let call = async move {
                let mut took_ms = Vec::new();
                while Instant::now() < until {
                    let appending = append(caller);
                    let begun = Instant::now();
                    appending.await?;
                    took_ms.push(begun.elapsed().as_secs_f64() * 1e3);
                }
                anyhow::Ok(took_ms)
            };
            calling.spawn_on(call, pool.handle());
        }
        let mut appended = 0;
        while let Some(called) = calling.join_next().await {
            let took_ms = called.context("a caller has panicked")??;
            appended += took_ms.len() as u64;
            self.took_ms.extend(took_ms);
        }
        let seconds = begun.elapsed().as_secs_f64();
        self.rates.push(appended as f64 / seconds);
        self.appended += appended;
        self.seconds += seconds;
        Ok(())
    }

    /// Rate, what it is of the floor's, and half and 99 % of the appends took no longer than so many milliseconds.
    pub(super) fn cells(&self, floor: &Self) -> [String; 4] {
        let mut took_ms = self.took_ms.clone();
        took_ms.sort_by(f64::total_cmp);
        let last = took_ms.len().saturating_sub(1) as f64;
        let within = |share: f64| {
            let at = (last * share).round() as usize;
            format!("{:.2}", took_ms.get(at).copied().unwrap_or(0.0))
        };
        [
            Spread::of(self.rates.iter().copied()).cell(0),
            self.of(floor).cell(2),
            within(0.5),
            within(0.99),
        ]
    }

    /// The rate, as a multiple of the floor's in the same round.
    pub(super) fn of(&self, floor: &Self) -> Spread {
        Spread::of_ratios(&self.rates, &floor.rates)
    }
}

/// The least that a caller can do by itself: the same bytes at the end of a file, and one fdatasync.
#[derive(Debug, Clone)]
pub(super) struct Floor {
    file: Arc<Mutex<File>>,
    bytes: Arc<[u8]>,
}

impl Floor {
    pub(super) fn new(path: &Path, bytes: &[u8]) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self {
            file: Arc::new(Mutex::new(file)),
            bytes: bytes.into(),
        })
    }

    /// Appends the bytes once more, when it is this caller's turn.
    pub(super) async fn append(self) -> anyhow::Result<()> {
        let mut file = self.file.lock().await;
        // It blocks a thread of the pool, and nobody has anything else to do meanwhile.
        file.write_all(&self.bytes)?;
        file.sync_data()?;
        Ok(())
    }
}
