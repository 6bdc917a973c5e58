//! Agents, an aggregator, a network and a disk, simulated: everything follows from a seed.
//!
//! What runs is the real code: the agent's recorder, ring and sessions, tonic on both sides, the aggregator's
//! ingest and book, the frames of its store and the reading back of them at a start. What is simulated is what
//! the code stands on: time, the network ([turmoil]), the disk ([`disk`]) and the clients' requests ([`agent`]).
//! Agents and the aggregator crash with and without a word to their peers, links are cut, cut one way or held
//! up, disks are slow and full, logs are rolled up ([`faults`]). When all of it is over and the agents have
//! ended in order, every request must be counted exactly once or declared lost ([`oracle`]).
//!
//! Why turmoil's file system is not used: the store's writer is a thread with blocking calls, and turmoil drives
//! futures alone. So the store is opened over a log that this test gives it; what the disk keeps of that log at
//! a crash is decided here. A roll-up is begun here too, with the pieces that the book gives. The files, when
//! to roll up and the thread itself are a matter of the store's own tests.
//!
//! What makes it deterministic: each host is one thread of a runtime whose time is paused; links have a fixed
//! delay at any moment, since turmoil draws random ones in the order in which hosts happen to send; `select!` in
//! the agent and in ingest is biased, since tokio's random choice can only be seeded with `--cfg tokio_unstable`;
//! clock and epoch are parameters. What is left of the real world does not reach the events: hyper puts the date
//! into a header, h2 forgets reset streams by the system's clock, and tokio wakes several receivers of a watch
//! channel in a random order, all at the same moment. A test holds two runs of a seed against each other.
//!
//! What seeds seldom reach has plans of its own ([`scenarios`]): ten minutes without an aggregator, for example.
//!
//! `COALMINE_SEED=7` runs one seed and shows its events; `COALMINE_SEEDS=1000` runs more than the usual number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test may panic, and says why"
)]

mod random;

mod faults;

mod network;

mod disk;

mod account;

mod aggregator;

mod agent;

mod run;

mod oracle;

mod scenarios;

use oracle::Reached;

/// How many seeds are run when nothing else is asked for.
const SEEDS: u64 = 30;

/// The seeds to run, and whether they are the usual ones or more.
fn seeds() -> (Vec<u64>, bool) {
    let number = |name: &str| -> Option<u64> {
        let value = std::env::var(name).ok()?;
        let number = value.parse();
        Some(number.unwrap_or_else(|_| panic!("{name}={value} is not a number")))
    };
    if let Some(seed) = number("COALMINE_SEED") {
        return (vec![seed], false);
    }
    let count = number("COALMINE_SEEDS").unwrap_or(SEEDS);
    ((0..count).collect(), count >= SEEDS)
}

/// Says which seed it was, should the test panic.
struct Blame(u64);

impl Drop for Blame {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let seed = self.0;
            eprintln!(
                "\nseed {seed} failed; to run it alone:\n\
                 COALMINE_SEED={seed} cargo test -p coalmine-tests --test simulation -- --nocapture"
            );
        }
    }
}

#[test]
fn every_request_is_counted_once_or_declared_lost() {
    let (seeds, is_whole) = seeds();
    let is_alone = seeds.len() == 1;
    let mut reached = Reached::default();
    for seed in &seeds {
        let _blame = Blame(*seed);
        let run = run::run(*seed);
        if is_alone {
            run.trace.iter().for_each(|line| eprintln!("{line}"));
        }
        match run.judged {
            Ok(more) => reached.add(&more),
            Err(problem) => {
                let tail = run.trace.len().saturating_sub(40);
                panic!("{problem}\nthe last events:\n{}", run.trace[tail..].join("\n"));
            }
        }
    }
    eprintln!("{} seeds: {reached:?}", seeds.len());
    // A simulation in which nothing goes wrong proves nothing.
    if is_whole {
        let never: Vec<_> = reached.kinds().filter(|(_, count)| *count == 0).collect();
        assert!(never.is_empty(), "no seed has reached this: {never:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_events() {
    let seeds = match seeds() {
        (seeds, false) if seeds.len() == 1 => seeds,
        _ => vec![3, 11, 17],
    };
    for seed in seeds {
        let _blame = Blame(seed);
        let [one, other] = [run::run(seed), run::run(seed)];
        for (number, (one, other)) in one.trace.iter().zip(&other.trace).enumerate() {
            assert_eq!(one, other, "event {number} differs");
        }
        assert_eq!(one.trace.len(), other.trace.len(), "one run has more events");
        assert!(one.trace.len() > 100, "hardly anything happened: {:?}", one.trace);
    }
}
