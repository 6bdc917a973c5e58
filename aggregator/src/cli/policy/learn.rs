//! `coalmine policy learn`: a decision log in, a history out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use coalmine_judge::{
    chain::Hash,
    evidence::Window,
    history::{History, Learner, MAX_TENANTS, Taken},
    policy::Policy,
    record::{Body, Decision},
    replay::Blobs as _,
};

use super::{Exit, Failure};
use crate::{
    cli::{audit, say, tell},
    disk,
    ledger::{BlobStore, LedgerFiles},
};

/// Most rollouts that are named when they are ignored.
const MAX_NAMED: usize = 20;

/// A rollout as the log tells it.
struct Recorded {
    id: String,
    service: String,
    policy: Hash,
    start_ms: u64,
    /// Name and evidence of each decision.
    decisions: Vec<(String, Hash)>,
    /// The last decision's verdict and leaf hash.
    last: Option<(String, Hash)>,
    /// What somebody has decided in the judge's place, as long as that is in force.
    overridden: Option<String>,
}

impl Recorded {
    fn take(&mut self, decision: Decision, leaf: Hash) {
        self.decisions.push((decision.id, decision.evidence));
        self.last = Some((decision.finding.verdict, leaf));
    }

    /// Why nothing is learned from the rollout, or the leaf hash of its last decision.
    fn source(&self) -> Result<Hash, String> {
        // What a person has approved was not shown to be healthy, and what he has held may not be.
        if let Some(verdict) = &self.overridden {
            return Err(format!("somebody has decided {verdict} in the judge's place"));
        }
        match &self.last {
            Some((verdict, leaf)) if verdict == "APPROVE" => Ok(*leaf),
            Some((verdict, _)) => Err(format!("its last verdict is {verdict}")),
            None => Err("it has no decision".to_owned()),
        }
    }
}

/// What a log teaches.
pub(super) struct Lesson {
    pub(super) history: History,
    /// Rollouts that were not learned from, and why.
    pub(super) ignored: Vec<String>,
    pub(super) skipped: u64,
    pub(super) warm_up: u64,
    left_out: u64,
}

pub(super) fn run(data: &Path, service: Option<&str>, file: Option<&Path>) -> Result<Exit, Failure> {
    let files = audit::files(data)?;
    let lesson = learn_from(&files, service)?;
    let history = &lesson.history;
    let text = history.to_json();
    match file {
        None => say(&text),
        Some(path) => disk::replace(path, format!("{text}\n").as_bytes()).map_err(|error| {
            Failure::usage(format!("cannot write the history {}: {error}", path.display()))
        })?,
    }
    for ignored in lesson.ignored.iter().take(MAX_NAMED) {
        tell(&format_args!("ignored {ignored}"));
    }
    if lesson.ignored.len() > MAX_NAMED {
        tell(&format_args!("ignored {} more", lesson.ignored.len() - MAX_NAMED));
    }
    if lesson.left_out > 0 {
        tell(&format_args!(
            "{} rows belong to tenants beyond the first {}, which are all that a history can have",
            lesson.left_out, MAX_TENANTS
        ));
    }
    tell(&format_args!(
        "learned from {} of {} rollouts of {}: {} windows used, {} skipped because an agent is missing, {} skipped \
         as warm-up; {} tenants",
        history.rollouts,
        history.rollouts + lesson.ignored.len() as u64,
        history.service,
        history.windows,
        lesson.skipped,
        lesson.warm_up,
        history.tenants.len()
    ));
    Ok(Exit::Good)
}

/// Reads a log and its evidence, each checked against its digest, and learns from the approved rollouts.
pub(super) fn learn_from(files: &LedgerFiles, service: Option<&str>) -> Result<Lesson, Failure> {
    let rollouts = recorded(files)?;
    let service = only_service(&rollouts, service)?;
    let mut learner = Learner::new(&service);
    let mut ignored = Vec::new();
    let mut warm_up = 0;
    for rollout in rollouts.iter().filter(|rollout| rollout.service == service) {
        let source = match rollout.source() {
            Ok(source) => source,
            Err(why) => {
                ignored.push(format!("{}: {why}", rollout.id));
                continue;
            }
        };
        let (used, warming) = learn_rollout(&mut learner, &files.blobs, rollout, source)?;
        warm_up += warming;
        if used == 0 {
            ignored.push(format!(
                "{}: it was approved, but no window of it can be used: {warming} in the warm-up, {} miss an agent",
                rollout.id,
                rollout.decisions.len() as u64 - warming
            ));
        }
    }
    let (skipped, left_out) = (learner.skipped(), learner.tenants_left_out());
    let history = learner.finish();
    if history.rollouts == 0 {
        let seen = if ignored.is_empty() {
            "there is none at all".to_owned()
        } else {
            format!("ignored {}", ignored.join("; ignored "))
        };
        return Err(Failure::usage(format!(
            "there is no approved rollout of {service} to learn from: {seen}"
        )));
    }
    Ok(Lesson {
        history,
        ignored,
        skipped,
        warm_up,
        left_out,
    })
}

/// The rollouts of a log, in their order.
fn recorded(files: &LedgerFiles) -> Result<Vec<Recorded>, Failure> {
    let mut rollouts: Vec<Recorded> = Vec::new();
    let mut places = BTreeMap::new();
    let scan = files.scan(|record, leaf, _| match record.body {
        Body::Rollout(start) => {
            places.insert(start.rollout.clone(), rollouts.len());
            rollouts.push(Recorded {
                id: start.rollout,
                service: start.service,
                policy: start.policy,
                start_ms: start.start_ms,
                decisions: Vec::new(),
                last: None,
                overridden: None,
            });
        }
        Body::Override(change) => {
            let place = places.get(&change.rollout);
            if let Some(rollout) = place.and_then(|place| rollouts.get_mut(*place)) {
                rollout.overridden = change.verdict;
            }
        }
        Body::Decision(decision) => {
            let place = places.get(&decision.rollout);
            if let Some(rollout) = place.and_then(|place| rollouts.get_mut(*place)) {
                rollout.take(*decision, leaf);
            }
        }
        _ => {}
    });
    scan.map_err(|problem| Failure::new(Exit::Bad, problem.to_string()))?;
    Ok(rollouts)
}

fn only_service(rollouts: &[Recorded], service: Option<&str>) -> Result<String, Failure> {
    let all: BTreeSet<&str> = rollouts.iter().map(|rollout| rollout.service.as_str()).collect();
    let names: Vec<&str> = all.into_iter().collect();
    match (service, names.as_slice()) {
        (_, []) => Err(Failure::usage("the log has no rollout to learn from")),
        (Some(service), names) if names.contains(&service) => Ok(service.to_owned()),
        (Some(service), names) => Err(Failure::usage(format!(
            "the log has no rollout of service {service:?} (it has some of: {})",
            names.join(", ")
        ))),
        (None, [only]) => Ok((*only).to_owned()),
        (None, names) => Err(Failure::usage(format!(
            "the log has rollouts of several services; choose one with --service: {}",
            names.join(", ")
        ))),
    }
}

/// Learns from one rollout; gives how many windows were used, and how many were in its warm-up.
fn learn_rollout(
    learner: &mut Learner,
    blobs: &BlobStore,
    rollout: &Recorded,
    source: Hash,
) -> Result<(u64, u64), Failure> {
    let bad = |name: &str, problem: String| Failure::new(Exit::Bad, format!("{name}: {problem}"));
    let policy = blobs
        .text(&rollout.policy)
        .map_err(|error| bad(&rollout.id, format!("its policy {} {error}", rollout.policy)))?;
    let policy = Policy::parse(&policy)
        .map_err(|error| bad(&rollout.id, format!("its policy is refused: {error}")))?;
    let warm_us = u128::from(rollout.start_ms) * 1_000 + u128::from(policy.rollout.warm_up_us());
    learner.take_rollout(source);
    let (mut used, mut warm_up) = (0, 0);
    for (name, digest) in &rollout.decisions {
        let evidence = blobs
            .text(digest)
            .map_err(|error| bad(name, format!("its evidence {digest} {error}")))?;
        let window = Window::from_json(&evidence)
            .map_err(|error| bad(name, format!("its evidence is refused: {error}")))?;
        if u128::from(window.start_ms) * 1_000 < warm_us {
            warm_up += 1;
        } else if learner.take_window(&window) == Taken::Used {
            used += 1;
        }
    }
    Ok((used, warm_up))
}
