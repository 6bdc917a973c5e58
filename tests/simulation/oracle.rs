//! The judgement: every request is counted once, or declared lost, or was never acknowledged.

use std::collections::{BTreeMap, BTreeSet};

use coalmine_aggregator::book::Book;
use coalmine_proto::names::{Arm, Outcome, Outcomes};

use crate::{
    account::{Account, Life, Stored},
    agent::{self, EVERYONE, version},
    aggregator::{SERVICE, restore},
    disk::Disk,
};

/// How often simulations got to what they are meant to get to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reached {
    /// Lives that ended in order with everything delivered.
    pub(crate) complete: u64,
    /// Lives that did not.
    pub(crate) broken: u64,
    /// Requests that broken lives took with them.
    pub(crate) lost: u64,
    /// Requests that were declared lost because a ring was full.
    pub(crate) gap_requests: u64,
    /// Windows that were merged because a ring was full.
    pub(crate) merged: u64,
    /// Batches that were stored again.
    pub(crate) again: u64,
    /// Sessions after the first of their life.
    pub(crate) reconnects: u64,
    /// Crashes of the aggregator.
    pub(crate) aggregator_crashes: u64,
    /// Frames that were cut off by a crash.
    pub(crate) torn: u64,
    /// Aggregators that were told to stop.
    pub(crate) drains: u64,
    /// Links that were cut.
    pub(crate) cuts: u64,
    /// Disks that became full.
    pub(crate) full_disks: u64,
    /// Logs that were rolled up.
    pub(crate) roll_ups: u64,
}

/// Counts by arm, version and tenant; what has no request is left out.
type Counts = BTreeMap<(Arm, String, String), Outcomes>;

impl Reached {
    /// All kinds by name.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("complete", self.complete),
            ("broken", self.broken),
            ("lost", self.lost),
            ("gap_requests", self.gap_requests),
            ("merged", self.merged),
            ("again", self.again),
            ("reconnects", self.reconnects),
            ("aggregator_crashes", self.aggregator_crashes),
            ("torn", self.torn),
            ("drains", self.drains),
            ("cuts", self.cuts),
            ("full_disks", self.full_disks),
            ("roll_ups", self.roll_ups),
        ]
        .into_iter()
    }

    /// Adds what another simulation reached.
    pub(crate) fn add(&mut self, other: &Self) {
        self.complete += other.complete;
        self.broken += other.broken;
        self.lost += other.lost;
        self.gap_requests += other.gap_requests;
        self.merged += other.merged;
        self.again += other.again;
        self.reconnects += other.reconnects;
        self.aggregator_crashes += other.aggregator_crashes;
        self.torn += other.torn;
        self.drains += other.drains;
        self.cuts += other.cuts;
        self.full_disks += other.full_disks;
        self.roll_ups += other.roll_ups;
    }
}

/// Judges a simulation after its end: the book of the aggregator that ran last, and the book that the next
/// one would begin with.
pub(crate) fn judge(
    lives: &[Life],
    account: &Account,
    book: &Book,
    disk: &Disk,
    now_ms: u64,
) -> Result<Reached, String> {
    let mut kept = Account::default();
    disk.read_all(|entry| {
        kept.take(&entry);
    })?;
    if let Some(problem) = account.problems.iter().chain(&kept.problems).next() {
        return Err(problem.clone());
    }
    let mut reached = Reached {
        again: account.again,
        torn: disk.torn(),
        ..Reached::default()
    };
    let (mut expected, mut gaps) = (Counts::new(), BTreeMap::new());
    let nothing = Stored::default();
    for life in lives {
        let stored = kept.lives.get(&life.epoch).unwrap_or(&nothing);
        let promised = account.lives.get(&life.epoch).map_or(0, |stored| stored.promised);
        let lived = judge_life(life, stored, promised, &mut expected);
        let name = agent::name(life.agent);
        let lived = lived.map_err(|problem| format!("{name} {:x}: {problem}", life.epoch))?;
        *gaps.entry(life.arm).or_insert(0) += lived.gap_requests;
        reached.add(&lived);
    }
    let restored = restore(disk, now_ms)?;
    for (which, book) in [("the last book", book), ("the restored book", &restored)] {
        judge_book(book, &expected, &gaps).map_err(|problem| format!("{which}: {problem}"))?;
        judge_ends(book, lives, &kept).map_err(|problem| format!("{which}: {problem}"))?;
    }
    Ok(reached)
}

/// Judges one life by what was stored of it; adds what the book must count.
fn judge_life(life: &Life, stored: &Stored, promised: u64, expected: &mut Counts) -> Result<Reached, String> {
    let last = stored.batches.len() as u64;
    let hole = stored
        .batches
        .keys()
        .zip(1_u64..)
        .find(|(seq, number)| *seq != number);
    if let Some((seq, number)) = hole {
        return Err(format!("batch {number} is missing before batch {seq}"));
    }
    let durable = life.metric("durable_seq");
    if promised > last || durable > promised {
        return Err(format!(
            "{last} batches are stored, the aggregator called {promised} durable, and the agent has \
             forgotten {durable}"
        ));
    }
    let made: u64 = life.made.values().map(|burst| burst.requests()).sum();
    let (mut counted, mut gap_requests) = (0, 0);
    let mut seen = BTreeSet::new();
    for (seq, batch) in &stored.batches {
        let mut shared = Outcomes::default();
        for (name, outcomes) in batch.bursts() {
            let Some(burst) = life.made.get(name) else {
                return Err(format!("batch {seq} counts {name}, which is not of this life"));
            };
            if !seen.insert(name) {
                return Err(format!("batch {seq} counts {name} once more"));
            }
            if burst.own != *outcomes {
                return Err(format!("batch {seq} has {outcomes:?} of {name}: {:?}", burst.own));
            }
            shared.add(&burst.shared);
            count(expected, life.arm, name, &burst.own);
            count(expected, life.arm, EVERYONE, &burst.shared);
        }
        let said = batch.rows.get(EVERYONE).copied().unwrap_or_default();
        if said != shared {
            return Err(format!("batch {seq} has {said:?} of {EVERYONE}: {shared:?}"));
        }
        counted += batch.requests();
        gap_requests += batch.gap;
    }
    let dropped = life.metric("gap_requests_total");
    let is_complete = life.is_complete();
    if is_complete && (counted + gap_requests != made || gap_requests != dropped || durable != last) {
        return Err(format!(
            "{made} requests were made, {counted} are counted and {gap_requests} declared lost; the ring has \
             dropped {dropped}; of {last} batches {durable} are known to be durable"
        ));
    }
    if counted + gap_requests > made || gap_requests > dropped {
        return Err(format!(
            "{made} requests were made, and {counted} are counted; the ring has dropped {dropped}, and \
             {gap_requests} are declared lost"
        ));
    }
    Ok(Reached {
        complete: u64::from(is_complete),
        broken: u64::from(!is_complete),
        lost: made - counted - gap_requests,
        gap_requests,
        merged: life.metric("ring_merged_windows_total"),
        reconnects: life.metric("session_reconnects_total"),
        ..Reached::default()
    })
}

fn count(counts: &mut Counts, arm: Arm, tenant: &str, outcomes: &Outcomes) {
    let key = (arm, version(arm).to_owned(), tenant.to_owned());
    counts.entry(key).or_default().add(outcomes);
}

/// Whether a book counts exactly this.
fn judge_book(book: &Book, expected: &Counts, gaps: &BTreeMap<Arm, u64>) -> Result<(), String> {
    let Some(service) = book.get(SERVICE) else {
        return Err("nothing is known of the service".to_owned());
    };
    let mut counts = Counts::new();
    for (build, tenant, outcomes) in service.totals() {
        if !outcomes.is_empty() {
            let key = (build.arm, build.version.clone(), tenant.as_str().to_owned());
            counts.insert(key, *outcomes);
        }
    }
    for key in expected.keys().chain(counts.keys()) {
        let (is, must_be) = (counts.get(key), expected.get(key));
        if is != must_be {
            return Err(format!("{key:?}: {is:?} is counted, it must be {must_be:?}"));
        }
    }
    for arm in Arm::ALL {
        let (outcomes, declared, _) = service.arm_totals(arm);
        let must_be = gaps.get(&arm).copied().unwrap_or(0);
        if declared != must_be {
            return Err(format!(
                "{declared} requests of {arm} are declared lost, it must be {must_be}"
            ));
        }
        let answered = Outcome::ALL.into_iter().filter(|outcome| outcome.is_answered());
        let answered: u64 = answered.map(|outcome| outcomes.get(outcome)).sum();
        let latencies = service.latency(arm).count();
        if latencies != answered {
            return Err(format!(
                "{latencies} latencies of {answered} answered requests of {arm}"
            ));
        }
    }
    Ok(())
}

/// Whether a book knows how each agent's last life ended.
fn judge_ends(book: &Book, lives: &[Life], kept: &Account) -> Result<(), String> {
    let service = book.get(SERVICE).into_iter();
    let agents: BTreeMap<_, _> = service.flat_map(|service| service.agents()).collect();
    let last: BTreeMap<usize, &Life> = lives.iter().map(|life| (life.agent, life)).collect();
    for (number, life) in last {
        let name = agent::name(number);
        let Some(agent) = agents.get(name.as_str()) else {
            return Err(format!("nothing is known of {name}"));
        };
        let stored = kept.lives.get(&life.epoch);
        let batches = stored.map_or(0, |stored| stored.batches.len() as u64);
        let is = (agent.epoch, agent.applied_seq, agent.durable_seq, agent.gone);
        let must_be = (life.epoch, batches, batches, true);
        if is != must_be {
            return Err(format!("{name} is {is:x?}, it must be {must_be:x?}"));
        }
    }
    Ok(())
}
