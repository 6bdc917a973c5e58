//! From counters since the start of the application to what happened between two scrapes.
//!
//! Each series is followed by itself, before series of one pool are added: of eight worker processes that are
//! exposed together, one may end or start anew, and the sum of their counters would tell neither.

use std::collections::{BTreeMap, HashMap};

use super::{
    PoolRow,
    mapping::{Quantity, Source},
    reading::{MAX_POOLS, MAX_READINGS, Reading},
};

/// A pool that was missing from so many scrapes is forgotten, and is new when it comes back.
const FORGET_AFTER: u64 = 600;

/// What the last scrapes said.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pools: BTreeMap<String, Known>,
    scrapes: u64,
}

/// What is known about a pool.
#[derive(Debug, Default)]
struct Known {
    /// The scrape that had it last.
    scrape: u64,
    waiters: Option<u64>,
    series: HashMap<(Quantity, u64), Last>,
}

/// The last value of a series.
#[derive(Debug, Clone, Copy)]
struct Last {
    value: u64,
    scrape: u64,
}

/// Sums over the series of one pool; of several sources, the first one's.
#[derive(Debug, Default)]
struct Sums([Option<(Source, u64)>; Quantity::COUNT]);

// === impl Counters ===

impl Counters {
    /// What happened since the scrape before, and the state of now, of each pool that is there.
    ///
    /// A pool that is new has counted before anyone looked: its counters count from now on. A counter that
    /// goes down was started anew, and what it has was counted since; so was a series that is new in a pool
    /// that is not. Scrapes that failed between leave no trace: what they missed is in the next.
    pub(super) fn next(&mut self, readings: &[Reading]) -> Vec<PoolRow> {
        self.scrapes = self.scrapes.saturating_add(1);
        let has_hikari = readings.iter().any(|reading| reading.source == Source::Hikari);
        let mut pools: BTreeMap<&str, Vec<&Reading>> = BTreeMap::new();
        for reading in readings {
            // Spring Boot shows HikariCP's pools once more, under other names.
            if !(has_hikari && reading.source == Source::Spring) {
                pools.entry(&reading.pool).or_default().push(reading);
            }
        }
        let mut rows = Vec::new();
        for (name, readings) in pools {
            rows.push(self.pool(name, &readings));
        }
        self.forget();
        rows
    }

    fn pool(&mut self, name: &str, readings: &[&Reading]) -> PoolRow {
        let is_new = !self.pools.contains_key(name);
        let known = self.pools.entry(name.to_owned()).or_default();
        known.scrape = self.scrapes;
        let mut sums = Sums::default();
        for reading in readings {
            let amount = if reading.quantity.is_gauge() {
                reading.value
            } else {
                known.raise(reading, is_new)
            };
            sums.add(reading, amount);
        }
        let waiters = sums.get(Quantity::Waiters);
        let rise = waiters
            .unwrap_or(0)
            .saturating_sub(known.waiters.unwrap_or(u64::MAX));
        known.waiters = waiters.or(known.waiters);
        known.make_room();
        sums.row(name, rise)
    }

    fn forget(&mut self) {
        let now = self.scrapes;
        self.pools
            .retain(|_, known| now.saturating_sub(known.scrape) < FORGET_AFTER);
        if self.pools.len() > 4 * MAX_POOLS {
            self.pools.retain(|_, known| known.scrape == now);
        }
    }
}

// === impl Known ===

impl Known {
    /// By how much a counter has risen.
    fn raise(&mut self, reading: &Reading, is_new: bool) -> u64 {
        let last = Last {
            value: reading.value,
            scrape: self.scrape,
        };
        let before = self.series.insert((reading.quantity, reading.series), last);
        match before {
            Some(before) => {
                let rise = reading.value.checked_sub(before.value);
                rise.unwrap_or(reading.value)
            }
            None if is_new => 0,
            None => reading.value,
        }
    }

    fn make_room(&mut self) {
        if self.series.len() > 2 * MAX_READINGS {
            let now = self.scrape;
            self.series.retain(|_, last| last.scrape == now);
        }
    }
}

// === impl Sums ===

impl Sums {
    fn add(&mut self, reading: &Reading, amount: u64) {
        let sum = &mut self.0[reading.quantity as usize];
        *sum = match *sum {
            Some((source, sum)) if source == reading.source => Some((source, sum.saturating_add(amount))),
            Some((source, sum)) if source < reading.source => Some((source, sum)),
            _ => Some((reading.source, amount)),
        };
    }

    fn get(&self, quantity: Quantity) -> Option<u64> {
        self.0[quantity as usize].map(|(_, sum)| sum)
    }

    /// `rise` is that of the waiters.
    fn row(&self, name: &str, rise: u64) -> PoolRow {
        let count = |quantity| self.get(quantity).unwrap_or(0);
        let rest = |other| Some(self.get(Quantity::Open)?.saturating_sub(self.get(other)?));
        let timed = self.get(Quantity::Timed);
        let slow = timed.unwrap_or(0).saturating_sub(count(Quantity::TimedFast));
        let acquires = self.get(Quantity::Acquires);
        PoolRow {
            name: name.to_owned(),
            acquires: acquires.or_else(|| self.get(Quantity::Transactions)).or(timed),
            waits: self.get(Quantity::Waits).unwrap_or(slow.max(rise)),
            timeouts: count(Quantity::Timeouts),
            wait_ns: self.get(Quantity::WaitNs).unwrap_or(count(Quantity::AcquireNs)),
            used: self.get(Quantity::Used).or(rest(Quantity::Idle)).unwrap_or(0),
            idle: self.get(Quantity::Idle).or(rest(Quantity::Used)).unwrap_or(0),
            max: count(Quantity::Max),
            waiters: count(Quantity::Waiters),
        }
        .plausible()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(pool: &str, source: Source, quantity: Quantity, series: u64, value: u64) -> Reading {
        Reading {
            pool: pool.to_owned(),
            source,
            quantity,
            series,
            value,
        }
    }

    /// Readings of one pool of database/sql: of each worker its waits.
    fn waits(workers: &[(u64, u64)]) -> Vec<Reading> {
        let workers = workers.iter();
        workers
            .map(|(series, value)| reading("db", Source::GoSql, Quantity::Waits, *series, *value))
            .collect()
    }

    fn waited(counters: &mut Counters, workers: &[(u64, u64)]) -> u64 {
        let rows = counters.next(&waits(workers));
        assert_eq!(rows.len(), 1);
        rows[0].waits
    }

    #[test]
    fn counters_count_from_the_second_scrape() {
        let mut counters = Counters::default();
        assert_eq!(waited(&mut counters, &[(1, 1000)]), 0);
        assert_eq!(waited(&mut counters, &[(1, 1007)]), 7);
        assert_eq!(waited(&mut counters, &[(1, 1007)]), 0);
    }

    #[test]
    fn a_restart_counts_whole() {
        let mut counters = Counters::default();
        waited(&mut counters, &[(1, 1000)]);
        assert_eq!(waited(&mut counters, &[(1, 3)]), 3);
        assert_eq!(waited(&mut counters, &[(1, 5)]), 2);
    }

    #[test]
    fn a_worker_that_ends_is_no_restart() {
        let mut counters = Counters::default();
        waited(&mut counters, &[(1, 1000), (2, 5000)]);
        assert_eq!(waited(&mut counters, &[(1, 1001)]), 1);
        // It comes back with what it had, and then anew beside another.
        assert_eq!(waited(&mut counters, &[(1, 1001), (2, 5000)]), 0);
        assert_eq!(waited(&mut counters, &[(1, 1001), (2, 4), (3, 2)]), 6);
    }

    #[test]
    fn a_pool_that_vanished_is_followed_on_until_it_is_forgotten() {
        let mut counters = Counters::default();
        waited(&mut counters, &[(1, 10)]);
        assert!(counters.next(&[]).is_empty());
        assert_eq!(waited(&mut counters, &[(1, 12)]), 2);
        for _ in 0..FORGET_AFTER {
            counters.next(&[]);
        }
        assert!(counters.pools.is_empty());
        assert_eq!(waited(&mut counters, &[(1, 1_000_000)]), 0);
    }

    #[test]
    fn memory_is_bounded() {
        let mut counters = Counters::default();
        for n in 0..20_u64 {
            let pools = (0..MAX_POOLS as u64).map(|pool| {
                let name = format!("{n}-{pool}");
                reading(&name, Source::Custom, Quantity::Waits, 0, 1)
            });
            counters.next(&pools.collect::<Vec<_>>());
            assert!(counters.pools.len() <= 4 * MAX_POOLS);
        }
        for n in 0..5_u64 {
            let series = (0..MAX_READINGS as u64).map(|series| (n * 1_000_000 + series, 1));
            waited(&mut counters, &series.collect::<Vec<_>>());
            assert!(counters.pools["db"].series.len() <= 2 * MAX_READINGS);
        }
    }

    #[test]
    fn without_a_count_of_waits_there_is_a_lower_bound() {
        let mut counters = Counters::default();
        let mut next = |timed, fast, timeouts, waiters| {
            let rows = counters.next(&[
                reading("p", Source::Hikari, Quantity::Timed, 1, timed),
                reading("p", Source::Hikari, Quantity::TimedFast, 1, fast),
                reading("p", Source::Hikari, Quantity::Timeouts, 1, timeouts),
                reading("p", Source::Hikari, Quantity::Waiters, 1, waiters),
            ]);
            (rows[0].acquires, rows[0].waits, rows[0].timeouts)
        };
        assert_eq!(
            next(100, 90, 5, 3),
            (Some(0), 0, 0),
            "waiters of before are not counted"
        );
        assert_eq!(next(110, 96, 5, 3), (Some(10), 4, 0), "slow acquires");
        assert_eq!(next(120, 106, 11, 3), (Some(10), 6, 6), "timeouts");
        assert_eq!(next(130, 116, 11, 9), (Some(10), 6, 0), "waiters that came");
        assert_eq!(next(140, 126, 11, 2), (Some(10), 0, 0), "waiters that went");
        // The two are not read at the same moment.
        assert_eq!(next(150, 137, 11, 2), (Some(10), 0, 0));
    }

    #[test]
    fn a_number_of_two_sources_counts_once() {
        let mut counters = Counters::default();
        let mut next = |new, old| {
            counters.next(&[
                reading("p", Source::OtelConnections, Quantity::Timeouts, 1, old),
                reading("p", Source::OtelConnection, Quantity::Timeouts, 2, new),
                reading("p", Source::OtelConnections, Quantity::Used, 1, 9),
            ])
        };
        next(1, 1);
        let rows = next(3, 4);
        assert_eq!((rows[0].timeouts, rows[0].used), (2, 9));
        assert_eq!(rows.len(), 1);
    }

    #[test]
    fn spring_is_silent_where_hikari_speaks() {
        let mut counters = Counters::default();
        let spring = reading("dataSource", Source::Spring, Quantity::Used, 1, 4);
        let hikari = reading("HikariPool-1", Source::Hikari, Quantity::Used, 1, 4);
        assert_eq!(counters.next(&[spring.clone(), hikari])[0].name, "HikariPool-1");
        assert_eq!(counters.next(&[spring])[0].name, "dataSource");
    }

    #[test]
    fn what_is_not_exposed_is_the_rest() {
        let mut counters = Counters::default();
        let mut next = |first, second| {
            let rows = counters.next(&[
                reading("p", Source::Bb8, first, 1, 10),
                reading("p", Source::Bb8, second, 1, 3),
            ]);
            (rows[0].used, rows[0].idle)
        };
        assert_eq!(next(Quantity::Open, Quantity::Idle), (7, 3));
        assert_eq!(next(Quantity::Open, Quantity::Used), (3, 7));
        assert_eq!(next(Quantity::Idle, Quantity::Open), (0, 10), "torn apart");
        assert_eq!(next(Quantity::Used, Quantity::Idle), (10, 3));
    }
}
