//! Many rollouts of one scenario, on several threads, and what was found in each.
//!
//! A rollout's traffic follows from the seed, the scenario's name and the rollout's number alone, so that the
//! results do not depend on how many threads there are.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Context as _;
use coalmine_judge::{
    chain::Hash,
    history::{History, Learner},
    policy::Policy,
};

use super::{
    judged::{self, Judged},
    model::World,
    peers::{Halts, Peers},
};
use crate::cpu;

/// What is simulated, how often, and on how many threads.
#[derive(Debug)]
pub(super) struct Scenario<'a> {
    /// Its name, from which its traffic follows.
    pub(super) name: String,
    pub(super) world: World,
    pub(super) policy: &'a Policy,
    pub(super) history: Option<Arc<History>>,
    pub(super) rollouts: usize,
    /// The peers look on at so many of the rollouts.
    pub(super) peer_rollouts: usize,
    /// Whether all tenants are simulated in all windows where only one is faulty, too.
    pub(super) whole: bool,
    pub(super) seed: u64,
    pub(super) threads: &'a Threads,
}

/// Threads to share rollouts between.
#[derive(Debug, Clone)]
pub(super) struct Threads {
    pub(super) count: usize,
    /// The cores that they are kept on, in turn; empty leaves them alone.
    pub(super) cores: Vec<usize>,
}

/// What was found in one rollout. Windows count from 1.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Found {
    /// The first window in which the rollout was halted, and by what: kind of unit and metric.
    pub(super) halted: Option<(u32, Vec<String>)>,
    /// The first window with APPROVE.
    pub(super) approved: Option<u32>,
    /// Whether it was approved in the end.
    pub(super) approved_at_last: bool,
    /// The first window in which the faulty tenant was in breach, and its canary's faulty requests until then.
    pub(super) detected: Option<(u32, u64)>,
    /// What the peers did, where they looked on.
    pub(super) peers: Option<Halts>,
    /// The faulty canary's requests after each window.
    pub(super) faulty_requests: Vec<u64>,
}

/// Seconds of processor time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent {
    pub(super) traffic: f64,
    pub(super) judge: f64,
    pub(super) peers: f64,
}

/// Everything that was found in a scenario, by number of the rollout.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) found: Vec<Found>,
    pub(super) spent: Spent,
}

// === impl Scenario ===

impl Scenario<'_> {
    /// Runs all rollouts.
    pub(super) fn run(&self) -> anyhow::Result<Results> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let results = Mutex::new((BTreeMap::new(), Spent::default()));
        let work = |thread: usize| -> anyhow::Result<()> {
            self.threads.pin(thread)?;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.rollouts || failed.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let (found, spent) = self.rollout(number)?;
                let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                results.0.insert(number, found);
                results.1.add(spent);
            }
        };
        thread::scope(|scope| {
            let run = |thread| {
                let work = &work;
                let failed = &failed;
                scope.spawn(move || {
                    let result = work(thread);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    result
                })
            };
            let threads: Vec<_> = (0..self.threads.count.max(1)).map(run).collect();
            threads.into_iter().try_for_each(|thread| {
                let result = thread
                    .join()
                    .ok()
                    .context("a thread of the simulator has panicked")?;
                result.with_context(|| format!("scenario {}", self.name))
            })
        })?;
        let (found, spent) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Results {
            found: found.into_values().collect(),
            spent,
        })
    }

    fn rollout(&self, number: usize) -> anyhow::Result<(Found, Spent)> {
        let model = &self.world.model;
        let mut traffic = self
            .world
            .begin([self.seed, name_seed(&self.name), number as u64]);
        let mut judge = Judged::begin(self.policy, self.history.clone(), model.windows)?;
        let mut peers = (number < self.peer_rollouts).then(|| Peers::new(model.window_seconds));
        let faulty = model.fault.and_then(|faulty| {
            let profile = self.world.tenants.get(faulty.rank.checked_sub(1)?)?;
            Some((faulty, judged::unit_of(&profile.name), &profile.name))
        });
        let (mut found, mut spent) = (Found::default(), Spent::default());
        let (mut requests, mut judging) = (0, true);
        for window in 1..=model.windows {
            let begun = cpu::thread_ns();
            let all = 0..self.world.tenants.len();
            let rows = match &faulty {
                // All are there at first, so that the judge shares its error probability between them.
                Some((faulty, ..)) if window > 1 && !self.whole => {
                    traffic.window(window, faulty.rank - 1..faulty.rank)
                }
                _ => traffic.window(window, all),
            };
            let drawn = cpu::thread_ns();
            spent.traffic += (drawn - begun) / 1e9;
            if let Some(peers) = &mut peers {
                match &faulty {
                    // The peers are asked about the faulty tenant alone, unless all are simulated.
                    Some((.., name)) if !self.whole => {
                        let row = rows.iter().position(|row| row.tenant == **name);
                        peers.window(window, row.and_then(|at| rows.get(at..=at)).unwrap_or_default());
                    }
                    _ => peers.window(window, &rows),
                }
                spent.peers += (cpu::thread_ns() - drawn) / 1e9;
            }
            if let Some((faulty, _, name)) = &faulty {
                let row = rows.iter().find(|row| row.tenant == **name);
                if window >= faulty.onset {
                    requests += row.map_or(0, |row| row.canary.requests);
                }
                found.faulty_requests.push(requests);
            }
            if judging {
                let evidence = judged::window(window, model.window_seconds, rows);
                let stepping = cpu::thread_ns();
                let said = judge.step(&evidence)?;
                spent.judge += (cpu::thread_ns() - stepping) / 1e9;
                found.approved_at_last = said.approves;
                if said.approves {
                    found.approved.get_or_insert(window);
                }
                if said.halted && found.halted.is_none() {
                    found.halted = Some((window, kinds(&said.breaches)));
                }
                if let Some((faulty, unit, _)) = &faulty
                    && window >= faulty.onset
                    && said.breaches.iter().any(|(breached, _)| breached == unit)
                {
                    found.detected = Some((window, requests));
                }
            }
            // A halt stays, so that nothing new can be learned from what follows, but where a tenant is looked for.
            judging &= if faulty.is_some() {
                found.detected.is_none()
            } else {
                found.halted.is_none()
            };
            if !judging && peers.is_none() {
                break;
            }
        }
        found.peers = peers.map(|peers| peers.halts());
        Ok((found, spent))
    }
}

/// What healthy rollouts of this traffic teach.
pub(super) fn learn(world: &World, seed: [u64; 2], rollouts: usize) -> History {
    let model = &world.model;
    let mut learner = Learner::new(judged::SERVICE);
    for number in 0..rollouts as u64 {
        let mut traffic = world.begin([seed[0], seed[1], number]);
        learner.take_rollout(Hash::of(&number.to_be_bytes()));
        for window in 1..=model.windows {
            let rows = traffic.window(window, 0..world.tenants.len());
            learner.take_window(&judged::window(window, model.window_seconds, rows));
        }
    }
    learner.finish()
}

// === impl Threads ===

impl Threads {
    fn pin(&self, thread: usize) -> anyhow::Result<()> {
        match self.cores.get(thread % self.cores.len().max(1)) {
            Some(core) => cpu::pin(*core),
            None => Ok(()),
        }
    }
}

// === impl Spent ===

impl Spent {
    pub(super) fn add(&mut self, other: Self) {
        self.traffic += other.traffic;
        self.judge += other.judge;
        self.peers += other.peers;
    }
}

/// `tenant errors/live`, each once.
fn kinds(breaches: &[(String, &'static str)]) -> Vec<String> {
    let kinds = breaches.iter().map(|(unit, metric)| {
        let kind = unit.split(':').next().unwrap_or(unit);
        format!("{kind} {metric}")
    });
    let mut kinds: Vec<String> = kinds.collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// FNV-1a: a seed that is a scenario's own, wherever it stands in the list.
fn name_seed(name: &str) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        quality::model::{Fault, Faulty, Model, tests::model},
        sample::tenant_name,
    };

    fn results(threads: usize, fault: Option<Faulty>) -> Vec<Found> {
        let model = Model {
            tenants: 20,
            windows: 30,
            fault,
            ..model()
        };
        let policy = judged::usual_policy(20, 10, 30, "10%", "").unwrap();
        let names = (1..=20).map(|rank| tenant_name(rank).unwrap());
        let threads = Threads {
            count: threads,
            cores: Vec::new(),
        };
        let scenario = Scenario {
            name: "test".to_owned(),
            world: World::new(model, names.collect(), |name| judged::limit_us(&policy, name)),
            policy: &policy,
            history: None,
            rollouts: 7,
            peer_rollouts: 2,
            whole: false,
            seed: 1,
            threads: &threads,
        };
        scenario.run().unwrap().found
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let one = results(1, None);
        assert_eq!(one.len(), 7);
        assert_eq!(one.iter().filter(|found| found.peers.is_some()).count(), 2);
        assert_eq!(one, results(4, None));
    }

    #[test]
    fn a_failing_tenant_is_found_after_its_onset() {
        let fault = Faulty {
            rank: 2,
            fault: Fault::Errors(0.5),
            onset: 5,
        };
        for found in results(2, Some(fault)) {
            let (window, requests) = found.detected.unwrap();
            assert!((5..=10).contains(&window), "{window}");
            assert_eq!(found.faulty_requests[window as usize - 1], requests);
            assert_eq!(found.faulty_requests[3], 0);
        }
    }
}
