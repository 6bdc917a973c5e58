//! Finds the busiest of any number of names in bounded memory: the Space-Saving sketch of Metwally, Agrawal and
//! El Abbadi, "Efficient Computation of Frequent and Top-k Elements in Data Streams" (ICDT 2005).
//!
//! There are k counters. A name that has one is counted there. A name that has none takes the counter that has
//! counted least, with its count, which is then the most by which the new name's count may be too high. So, after
//! n requests:
//!
//! - the counts add up to n, and no error is above n / k;
//! - a name's true count is between count - error, which is **guaranteed**, and count;
//! - a name with more than n / k requests has a counter.
//!
//! What is replaced follows from the requests and their order alone. A request costs one look-up and O(log k)
//! steps.

use std::collections::{BTreeSet, HashMap};

use coalmine_proto::names::TenantName;

/// Counters of a sketch: enough that a tenant with a thousandth of the overflow is found.
const COUNTERS: usize = 1_024;

/// The busiest names so far.
#[derive(Debug)]
pub(super) struct Sketch {
    most: usize,
    numbers: HashMap<TenantName, usize, foldhash::fast::RandomState>,
    counters: Vec<Counter>,
    /// The counts with the numbers of their counters: the first is replaced next.
    order: BTreeSet<(u64, usize)>,
}

#[derive(Debug)]
struct Counter {
    name: TenantName,
    count: u64,
    error: u64,
}

impl Sketch {
    pub(super) fn new() -> Self {
        Self::with_counters(COUNTERS)
    }

    /// A sketch with at most so many counters.
    fn with_counters(most: usize) -> Self {
        Self {
            most,
            numbers: HashMap::default(),
            counters: Vec::new(),
            order: BTreeSet::new(),
        }
    }

    /// Counts a request of this name.
    pub(super) fn record(&mut self, name: &str) {
        let number = self.numbers.get(name).copied();
        let Some(number) = number.or_else(|| self.take_counter(name)) else {
            return;
        };
        if let Some(counter) = self.counters.get_mut(number) {
            self.order.remove(&(counter.count, number));
            counter.count += 1;
            self.order.insert((counter.count, number));
        }
    }

    /// Gives a name that has none a counter; none only if the name is not allowed.
    fn take_counter(&mut self, name: &str) -> Option<usize> {
        let name = TenantName::parse(name.as_bytes()).ok()?;
        let number = if self.counters.len() < self.most {
            self.counters.push(Counter {
                name: name.clone(),
                count: 0,
                error: 0,
            });
            self.counters.len() - 1
        } else {
            let (_, number) = *self.order.first()?;
            let counter = self.counters.get_mut(number)?;
            self.numbers.remove(&counter.name);
            counter.name = name.clone();
            counter.error = counter.count;
            number
        };
        self.numbers.insert(name, number);
        Some(number)
    }

    /// The names with at least so many guaranteed requests, and these, most first.
    pub(super) fn heavy(self, least: u64) -> Vec<(TenantName, u64)> {
        let guaranteed = |counter: Counter| (counter.name, counter.count.saturating_sub(counter.error));
        let all = self.counters.into_iter().map(guaranteed);
        let mut heavy: Vec<_> = all.filter(|(_, requests)| *requests >= least).collect();
        heavy.sort_by(|(name, requests), (other, others)| (others, name).cmp(&(requests, other)));
        heavy
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn name(number: u32) -> String {
        format!("t{number}")
    }

    fn sketched(stream: &[u32], counters: usize) -> Sketch {
        let mut sketch = Sketch::with_counters(counters);
        stream.iter().for_each(|number| sketch.record(&name(*number)));
        sketch
    }

    proptest! {
        /// The three properties that the module's documentation claims, against exact counts.
        #[test]
        fn the_sketch_keeps_its_promises(
            // Few numbers come often, many seldom.
            stream in prop::collection::vec(prop_oneof![0_u32..4, 0_u32..30, 0_u32..1000], 0..600),
            counters in 1_usize..40,
        ) {
            let mut exact = BTreeMap::<String, u64>::new();
            for number in &stream {
                *exact.entry(name(*number)).or_default() += 1;
            }
            let sketch = sketched(&stream, counters);
            let requests = stream.len() as u64;
            prop_assert!(sketch.counters.len() <= counters);
            prop_assert_eq!(sketch.numbers.len(), sketch.counters.len());
            prop_assert_eq!(sketch.order.len(), sketch.counters.len());
            prop_assert_eq!(sketch.counters.iter().map(|c| c.count).sum::<u64>(), requests);
            for counter in &sketch.counters {
                let truth = exact[counter.name.as_str()];
                prop_assert!(counter.count - counter.error <= truth && truth <= counter.count);
                prop_assert!(counter.error <= requests / counters as u64);
            }
            for (name, truth) in &exact {
                let has_counter = sketch.numbers.contains_key(name.as_str());
                prop_assert!(has_counter || *truth <= requests / counters as u64, "{name} is lost");
            }
            let heavy = sketch.heavy(3);
            prop_assert!(heavy.is_sorted_by(|(_, more), (_, less)| more >= less));
            for (name, requests) in &heavy {
                prop_assert!(*requests >= 3 && *requests <= exact[name.as_str()]);
            }
            // The same requests in the same order give the same names.
            prop_assert_eq!(heavy, sketched(&stream, counters).heavy(3));
        }
    }

    #[test]
    fn names_that_come_once_do_not_hide_one_that_comes_often() {
        let mut sketch = Sketch::new();
        for number in 0..100_000 {
            sketch.record(&name(number));
            if number % 100 == 0 {
                sketch.record("busy");
            }
        }
        assert_eq!(sketch.counters.len(), COUNTERS);
        assert!(sketch.numbers.capacity() <= 8 * COUNTERS);
        let heavy = sketch.heavy(16);
        assert_eq!(heavy.len(), 1);
        assert_eq!(heavy[0].0.as_str(), "busy");
        assert!((800..=1_000).contains(&heavy[0].1), "{}", heavy[0].1);
    }

    #[test]
    fn names_that_are_not_allowed_are_not_counted() {
        let mut sketch = Sketch::with_counters(2);
        for name in ["", "a b", "__none__", "a"] {
            sketch.record(name);
        }
        let heavy = sketch.heavy(1);
        assert_eq!(heavy.len(), 1);
        assert_eq!((heavy[0].0.as_str(), heavy[0].1), ("a", 1));
    }
}
