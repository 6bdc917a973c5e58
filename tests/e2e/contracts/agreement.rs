//! All faces say the same at every moment, whatever has happened: histories of decisions, traffic, crashes and new
//! rollouts that follow from a seed, beside a rollout whose hold passes its deadline meanwhile.
//!
//! The gate is asked, then a client, then the gate again. If it said the same both times, what the client does must be what
//! the table says of that verdict, and if it names a decision it must name that one. `COALMINE_SEED=7` runs
//! the history of one seed, `COALMINE_HISTORIES=50` and `COALMINE_STEPS=40` run more and longer ones.

#![allow(clippy::print_stderr, reason = "a history that fails is told")]

use std::env;

use coalmine_tests::{clients::Poll, eventually};
use serde_json::Value;

use super::{
    Asked, CLIENTS, Client, fits, row,
    site::{ASKER, DEPLOYER, Service, Site, Traffic},
};
use crate::{gate::FACES, stage};

/// How many histories are run when nothing else is asked for; their seeds begin with 1.
const HISTORIES: u64 = 3;

/// How much happens in a history when nothing else is asked for.
const STEPS: u64 = 10;

/// When the aggregator is killed in any case.
const CRASH: u64 = 6;

const SERVICE: Service = Service::new("checkout", "hold_deadline: 1h", 3, Some(Traffic::Healthy));

/// Nothing is heard of it, until its hold has lasted as long as it may.
const LATE: Service = Service::new("late", "hold_deadline: 3s", 3, None);

/// Numbers that follow from a seed (SplitMix64).
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (number ^ (number >> 31)) % limit
    }
}

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Somebody decides in the judge's place.
    Decide(&'static str),
    /// Or gives the decision back.
    GiveBack,
    /// The agents count something else.
    Serve(Traffic),
    /// Another window is judged.
    Judge,
    /// The aggregator is killed and starts again.
    Crash,
    /// The rollout is ended, and another one is begun.
    Next,
}

impl Act {
    fn draw(rng: &mut Rng) -> Self {
        match rng.below(12) {
            0 => Self::Decide("approve"),
            1 => Self::Decide("hold"),
            2 => Self::Decide("rollback"),
            3 | 4 => Self::GiveBack,
            5 => Self::Serve(Traffic::Healthy),
            6 => Self::Serve(Traffic::Failing),
            7..=9 => Self::Judge,
            10 => Self::Crash,
            _ => Self::Next,
        }
    }
}

/// What has happened; told when the test fails.
struct Told {
    seed: u64,
    acts: Vec<Act>,
}

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("COALMINE_SEED={}: {:?}", self.seed, self.acts);
        }
    }
}

/// A rollout, and who asks about it.
struct Trial {
    rollout: String,
    asked: Asked,
    /// Whether somebody has decided in the judge's place.
    overridden: bool,
}

impl Trial {
    fn begin(site: &Site, service: &Service, number: u64) -> Self {
        let rollout = site.roll_out(service.name, &number.to_string());
        Self {
            rollout,
            asked: Asked::begin(&site.server(DEPLOYER), service.name).by(site.server(ASKER)),
            overridden: false,
        }
    }

    /// Waits for the next window, if another one is judged.
    fn judge(&self, site: &Site) {
        let path = format!("/v1/rollouts/{}", self.rollout);
        let view = || site.get(&path).expect("the rollout is known");
        let before = view()["windows_judged"].as_u64();
        eventually("another window is judged", || {
            let view = view();
            let goes_on = view["state"] == "running";
            (!goes_on || view["windows_judged"].as_u64() > before).then_some(())
        });
    }

    /// Waits until the hold deadline has rolled it back.
    fn passes_its_deadline(&self, site: &Site) {
        eventually("the hold deadline is over", || {
            (site.gate(&self.rollout)["verdict"] == "ROLLBACK").then_some(())
        });
    }

    /// Holds every client to what the gate says while it asks. `state` gives the row of the table for a verdict.
    fn agrees(&self, site: &Site, state: fn(&str) -> &str) {
        for client in CLIENTS.iter().filter(|client| client.name != "job") {
            let (gate, poll) = site.while_it_says(&self.rollout, None, &["verdict", "decision_id"], |_| {
                (client.ask)(&self.asked)
            });
            let verdict = gate["verdict"].as_str().expect("a verdict");
            let mut cells = row(state(verdict)).into_iter();
            let (_, cell) = cells.find(|(other, _)| other.name == client.name).unwrap();
            assert!(
                fits(cell, &poll),
                "{}: not {cell}, but {poll:?} at {gate}",
                client.name
            );
            names_the_decision(client, &gate, &poll);
        }
        self.says_the_same(site);
    }

    /// The same of every face that is asked for the rollout by its name, and says what the gate does also at the end.
    fn says_the_same(&self, site: &Site) {
        for face in &FACES {
            let (gate, said) = site.while_it_says(&self.rollout, None, &["verdict", "decision_id"], |_| {
                (face.ask)(&self.asked.server, &self.rollout)
            });
            assert_eq!(gate["verdict"], said.verdict, "{}: {said:?}, {gate}", face.name);
            let decision = gate["decision_id"].as_str();
            assert!(
                decision.is_none_or(|decision| said.came.contains(decision)),
                "{}: {} is of another decision than {gate}",
                face.name,
                said.came
            );
        }
    }
}

/// What comes with a poll names the decision that the gate names, if it names one. When a rollout is over, whoever asks
/// about the service may be told less.
fn names_the_decision(client: &Client, gate: &Value, poll: &Poll) {
    let Some(decision) = gate["decision_id"].as_str() else {
        return;
    };
    let must = if client.names_decision {
        gate["state"] != "ended"
    } else {
        poll.came.contains("decision_id")
    };
    assert!(
        !must || poll.came.contains(decision),
        "{}: {} is of another decision than {gate}",
        client.name,
        poll.came
    );
}

/// The row of a verdict while the rollout is open.
fn open(verdict: &str) -> &str {
    verdict
}

/// The row of a verdict when the rollout has ended with it.
fn ended(verdict: &str) -> &str {
    match verdict {
        "APPROVE" => "approved",
        "ROLLBACK" => "failed",
        _ => "held",
    }
}

fn history(seed: u64, steps: u64) {
    let mut rng = Rng(seed);
    let mut told = Told {
        seed,
        acts: Vec::new(),
    };
    let mut site = Site::start(&[SERVICE, LATE]);
    let late = Trial::begin(&site, &LATE, 0);
    late.agrees(&site, open);
    let mut trial = Trial::begin(&site, &SERVICE, 0);
    trial.agrees(&site, open);
    for step in 1..=steps {
        let act = if step == CRASH {
            Act::Crash
        } else {
            Act::draw(&mut rng)
        };
        told.acts.push(act);
        match act {
            Act::Decide(verdict) => {
                site.decide(&trial.rollout, Some(verdict));
                trial.overridden = true;
            }
            Act::GiveBack if trial.overridden => {
                site.decide(&trial.rollout, None);
                trial.overridden = false;
            }
            Act::GiveBack | Act::Judge => trial.judge(&site),
            Act::Serve(traffic) => {
                site.serve(SERVICE.name, traffic);
                trial.judge(&site);
            }
            Act::Crash => {
                site.restart(|| {});
                late.agrees(&site, open);
            }
            Act::Next => {
                site.end(&trial.rollout);
                trial.agrees(&site, ended);
                trial = Trial::begin(&site, &SERVICE, step);
            }
        }
        trial.agrees(&site, open);
    }
    late.passes_its_deadline(&site);
    late.agrees(&site, open);
    site.stop();
}

/// A number that the environment may have.
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

#[test]
fn all_faces_say_the_same_at_every_moment() {
    let _stage = stage();
    let steps = number("COALMINE_STEPS").unwrap_or(STEPS);
    let histories = number("COALMINE_HISTORIES").unwrap_or(HISTORIES);
    match number("COALMINE_SEED") {
        Some(seed) => history(seed, steps),
        None => (1..=histories).for_each(|seed| history(seed, steps)),
    }
}
