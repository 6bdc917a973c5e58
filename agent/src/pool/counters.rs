//! From counters since the start of the application to what happened between two scrapes.
//!
//! Each series is followed by itself, before series of one pool are added: of eight worker processes that are
//! exposed together, one may end or start anew, and the sum of their counters would tell neither.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use coalmine_proto::pool::MAX_POOLS;

use super::{
    PoolRow,
    mapping::{Quantity, Source},
    reading::{MAX_READINGS, Reading},
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
struct Sums([Option<Sum>; Quantity::COUNT]);

#[derive(Debug, Clone, Copy)]
struct Sum {
    source: Source,
    amount: u64,
    /// There is more in it than those who gave up, which some libraries count apart from who waited and asked.
    is_whole: bool,
}

// === impl Counters ===

impl Counters {
    /// What happened since the scrape before, and the state of now, of each pool that is there.
    ///
    /// A pool that is new has counted before anyone looked: its counters count from now on. A counter that
    /// goes down was started anew, and what it has was counted since; so was a series that is new in a pool
    /// that is not. Scrapes that failed between leave no trace: what they missed is in the next. Where acquires
    /// are not counted they are not known, but of a pool that is new: nothing has happened at it yet.
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
        let gave_up = readings
            .iter()
            .filter(|reading| reading.quantity == Quantity::Timeouts);
        let gave_up: BTreeSet<u64> = gave_up.map(|reading| reading.series).collect();
        let mut sums = Sums::default();
        for reading in readings {
            let amount = if reading.quantity.is_gauge() {
                reading.value
            } else {
                known.raise(reading, is_new)
            };
            let is_apart = gave_up.contains(&reading.series);
            sums.add(reading, amount, !is_apart);
        }
        let waiters = sums.get(Quantity::Waiters);
        let rise = waiters
            .unwrap_or(0)
            .saturating_sub(known.waiters.unwrap_or(u64::MAX));
        known.waiters = waiters.or(known.waiters);
        known.make_room();
        let mut row = sums.row(name, rise);
        if is_new && row.acquires.is_none() {
            row.acquires = Some(0);
        }
        row
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
    fn add(&mut self, reading: &Reading, amount: u64, is_whole: bool) {
        let sum = &mut self.0[reading.quantity as usize];
        *sum = match *sum {
            Some(sum) if sum.source == reading.source => Some(Sum {
                source: sum.source,
                amount: sum.amount.saturating_add(amount),
                is_whole: sum.is_whole || is_whole,
            }),
            Some(sum) if sum.source < reading.source => Some(sum),
            _ => Some(Sum {
                source: reading.source,
                amount,
                is_whole,
            }),
        };
    }

    fn get(&self, quantity: Quantity) -> Option<u64> {
        self.0[quantity as usize].map(|sum| sum.amount)
    }

    /// The number, if it is not only that of those who gave up.
    fn whole(&self, quantity: Quantity) -> Option<u64> {
        let sum = self.0[quantity as usize].filter(|sum| sum.is_whole);
        sum.map(|sum| sum.amount)
    }

    /// `rise` is that of the waiters. Only where the waits themselves are counted are all of them known: a slow
    /// acquire is a sign of a wait, and so are waiters, but not of each.
    fn row(&self, name: &str, rise: u64) -> PoolRow {
        let count = |quantity| self.get(quantity).unwrap_or(0);
        let rest = |other| Some(self.get(Quantity::Open)?.saturating_sub(self.get(other)?));
        let timed = self.get(Quantity::Timed);
        let slow = timed.unwrap_or(0).saturating_sub(count(Quantity::TimedFast));
        let acquires = self.whole(Quantity::Acquires);
        let acquires = acquires.or_else(|| self.get(Quantity::Transactions)).or(timed);
        let waits = self.whole(Quantity::Waits);
        let mut row = PoolRow {
            name: name.to_owned(),
            acquires,
            acquires_estimated: acquires.is_none(),
            waits: waits.unwrap_or(slow.max(rise)),
            waits_at_least: waits.is_none(),
            timeouts: count(Quantity::Timeouts),
            wait_ns: self.get(Quantity::WaitNs).unwrap_or(count(Quantity::AcquireNs)),
            used: self.get(Quantity::Used).or(rest(Quantity::Idle)).unwrap_or(0),
            idle: self.get(Quantity::Idle).or(rest(Quantity::Used)).unwrap_or(0),
            max: count(Quantity::Max),
            waiters: count(Quantity::Waiters),
        };
        row.make_plausible();
        row
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
    fn it_is_said_what_is_not_all_counted() {
        /// Whether waits are a lower bound, and acquires estimated.
        fn of(numbers: &[(Quantity, u64)]) -> (bool, bool) {
            let readings = numbers
                .iter()
                .map(|(quantity, series)| reading("p", Source::Pgxpool, *quantity, *series, 7));
            let readings: Vec<Reading> = readings.collect();
            let mut counters = Counters::default();
            let first = counters.next(&readings);
            let second = counters.next(&readings);
            let said = |row: &PoolRow| (row.waits_at_least, row.acquires_estimated);
            assert_eq!(said(&first[0]), said(&second[0]));
            assert_eq!(second[0].acquires.is_none(), second[0].acquires_estimated);
            said(&second[0])
        }
        use Quantity::{Acquires, Timed, TimedFast, Timeouts, Transactions, Used, Waiters, Waits};
        type Case = (&'static [(Quantity, u64)], bool, bool);
        let cases: [Case; 7] = [
            (&[(Waits, 1), (Acquires, 2)], false, false),
            (&[(Waits, 1)], false, true),
            (&[(Used, 1)], true, true),
            (&[(Waiters, 1), (Transactions, 2)], true, false),
            // A slow acquire is not each wait.
            (&[(Timed, 1), (TimedFast, 1), (Timeouts, 2)], true, false),
            // Those who gave up are counted apart, and the others too.
            (
                &[
                    (Waits, 1),
                    (Acquires, 2),
                    (Waits, 3),
                    (Acquires, 3),
                    (Timeouts, 3),
                ],
                false,
                false,
            ),
            // Nothing else is there.
            (&[(Waits, 3), (Acquires, 3), (Timeouts, 3)], true, true),
        ];
        for (numbers, waits_at_least, acquires_estimated) in cases {
            assert_eq!(of(numbers), (waits_at_least, acquires_estimated), "{numbers:?}");
        }
    }

    #[test]
    fn those_who_gave_up_are_not_all_who_asked() {
        let mut counters = Counters::default();
        let mut next = |gave_up| {
            let rows = counters.next(&[
                reading("p", Source::Pgxpool, Quantity::Acquires, 1, gave_up),
                reading("p", Source::Pgxpool, Quantity::Waits, 1, gave_up),
                reading("p", Source::Pgxpool, Quantity::Timeouts, 1, gave_up),
            ]);
            (rows[0].acquires, rows[0].waits, rows[0].timeouts)
        };
        assert_eq!(next(4), (Some(0), 0, 0), "nothing has happened at a new pool");
        assert_eq!(next(6), (None, 2, 2));
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
