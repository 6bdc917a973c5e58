//! Rollouts that begin and end with their pods: where canary pods carry `coalmine.dev/rollout: auto`, nobody has to
//! say that a version is on trial, nor that it is no longer.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use coalmine_judge::{chain::Hash, record::Workload};
use coalmine_proto::names::{Arm, MAX_NAME_BYTES};
use tokio::time::Instant;

use super::pods::{Roster, RosterPod};
use crate::rollouts::{Rollouts, StartRequest, State, View, is_haltable};

/// Who begins and ends them.
const ACTOR: &str = "kubernetes";

/// So long a rollout may be without a canary pod before it is over: one that is replaced comes back, and what is known
/// of its version must not be forgotten meanwhile.
const GONE_AFTER: Duration = Duration::from_secs(600);

/// The same where nobody waits for them: another version is on trial, or this one was approved and has no baseline left.
const OVER_AFTER: Duration = Duration::from_secs(60);

/// Begins and ends rollouts.
pub(super) struct Automatic {
    rollouts: Rollouts,
    /// By rollout, since when it has had nothing to judge.
    without: BTreeMap<String, Instant>,
    /// By service, why its rollout could not be begun or ended, as it was said last.
    said: BTreeMap<String, String>,
}

/// A version whose pods ask that it is judged.
#[derive(Debug, PartialEq, Eq)]
struct Trial<'r> {
    version: &'r str,
    /// Names this trial: the same version that comes again later, with other pods, is another.
    key: String,
    workload: Option<Workload>,
}

impl Automatic {
    pub(super) fn new(rollouts: Rollouts) -> Self {
        Self {
            rollouts,
            without: BTreeMap::new(),
            said: BTreeMap::new(),
        }
    }

    /// Ends what has no canary pod any more, and begins what has some.
    pub(super) async fn follow(&mut self, roster: &Roster) {
        if roster.is_stale() {
            // Who is not in it may be there all the same.
            return;
        }
        let none = BTreeMap::new();
        for view in self.rollouts.list() {
            let pods = roster.services.get(&view.service).unwrap_or(&none);
            let is_ours = view.state != State::Ended && view.actor == ACTOR;
            let over = over(&view.canary_version, view.approved, pods).filter(|_| is_ours);
            let Some((patience, reason)) = over else {
                self.without.remove(&view.id);
                continue;
            };
            let since = *self.without.entry(view.id.clone()).or_insert_with(Instant::now);
            if since.elapsed() >= patience {
                let ended = self.rollouts.end(&view.id, ACTOR.to_owned(), reason).await;
                self.say(&view.service, ended.err().map(|error| error.to_string()));
            }
        }
        for (service, pods) in &roster.services {
            let Some(trial) = trial(service, pods) else {
                continue;
            };
            let views = self.rollouts.list();
            let is_open = |view: &Arc<View>| view.service == *service && view.state != State::Ended;
            if views.iter().any(is_open) {
                continue;
            }
            let request = StartRequest {
                service: service.clone(),
                canary_version: trial.version.to_owned(),
                baseline_version: None,
                key: Some(trial.key),
                actor: Some(ACTOR.to_owned()),
                workload: trial.workload,
            };
            let begun = self.rollouts.start(request).await;
            self.say(service, begun.err().map(|error| error.to_string()));
        }
    }

    /// Says once why something could not be done.
    fn say(&mut self, service: &str, problem: Option<String>) {
        let Some(problem) = problem else {
            self.said.remove(service);
            return;
        };
        if self.said.get(service) != Some(&problem) {
            tracing::warn!(
                service,
                problem,
                "the rollout that the pods ask for is not begun or ended"
            );
            self.said.insert(service.to_owned(), problem);
        }
    }
}

/// Why a rollout of a version has nothing to judge any more, if that is so, and for how long it may be so.
fn over(version: &str, approved: bool, pods: &BTreeMap<String, RosterPod>) -> Option<(Duration, String)> {
    let of = |arm: Arm| pods.values().filter(move |pod| pod.build.arm == arm);
    if of(Arm::Canary).any(|pod| pod.build.version == version) {
        // It is everywhere: there is nothing to compare it with, which is no reason to hold it, let alone to go back.
        let is_everywhere = approved && of(Arm::Baseline).next().is_none();
        let reason = format!("{version} was approved, and there is no baseline any more");
        return is_everywhere.then_some((OVER_AFTER, reason));
    }
    let is_replaced = of(Arm::Canary).any(|pod| !pod.build.version.is_empty());
    let patience = if is_replaced { OVER_AFTER } else { GONE_AFTER };
    Some((patience, format!("no pod of {version} is a canary any more")))
}

/// What the canary's pods ask for. While there are two versions on trial, nobody knows which one is meant.
fn trial<'r>(service: &str, pods: &'r BTreeMap<String, RosterPod>) -> Option<Trial<'r>> {
    let canaries = || pods.iter().filter(|(_, pod)| pod.build.arm == Arm::Canary);
    let versions = canaries().map(|(_, pod)| pod.build.version.as_str());
    let versions: BTreeSet<_> = versions.filter(|version| !version.is_empty()).collect();
    let [version] = versions.into_iter().collect::<Vec<_>>()[..] else {
        return None;
    };
    // Without another version to compare with it is on trial no more, or not yet.
    let is_other = |pod: &RosterPod| pod.build.arm == Arm::Baseline && pod.build.version.as_str() != version;
    if !pods.values().any(is_other) {
        return None;
    }
    let mut asking = canaries().filter(|(_, pod)| pod.starts_rollout);
    let (_, first) = asking.next()?;
    let since = canaries()
        .map(|(_, pod)| pod.created_ms)
        .min()
        .unwrap_or_default();
    let key = format!("{service}-{version}-{since}");
    // A key may be as long as a name.
    let key = if key.len() > MAX_NAME_BYTES {
        Hash::of(key.as_bytes()).to_string()
    } else {
        key
    };
    Some(Trial {
        version,
        key,
        workload: first.workload.clone().filter(is_haltable),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::book::Build;

    fn pod(arm: Arm, version: &str, starts_rollout: bool, since_ms: u64) -> RosterPod {
        RosterPod {
            namespace: "shop".to_owned(),
            name: "p".to_owned(),
            build: Build {
                arm,
                version: version.to_owned(),
            },
            has_agent: true,
            since_ms: 0,
            created_ms: since_ms,
            workload: Some(Workload {
                kind: "StatefulSet".to_owned(),
                namespace: "shop".to_owned(),
                name: "checkout".to_owned(),
            }),
            starts_rollout,
        }
    }

    fn pods(pods: &[RosterPod]) -> BTreeMap<String, RosterPod> {
        let numbered = pods.iter().enumerate();
        numbered
            .map(|(number, pod)| (number.to_string(), pod.clone()))
            .collect()
    }

    #[test]
    fn one_version_whose_pods_ask_for_it_is_tried() {
        let baseline = pod(Arm::Baseline, "v1", true, 1);
        let asking = pod(Arm::Canary, "v2", true, 5);
        let silent = pod(Arm::Canary, "v2", false, 3);
        for (there, key) in [
            (vec![], None),
            (vec![baseline.clone()], None),
            (vec![baseline.clone(), silent.clone()], None),
            (vec![asking.clone()], None),
            (vec![pod(Arm::Baseline, "v2", true, 1), asking.clone()], None),
            (
                vec![baseline, silent.clone(), asking.clone()],
                Some("checkout-v2-3"),
            ),
            (vec![asking.clone(), pod(Arm::Canary, "v3", true, 9)], None),
        ] {
            let there = pods(&there);
            let trial = trial("checkout", &there);
            assert_eq!(trial.as_ref().map(|trial| trial.key.as_str()), key);
            // A StatefulSet cannot be told to stop.
            assert!(trial.is_none_or(|trial| trial.workload.is_none()));
        }
    }

    #[test]
    fn a_rollout_is_over_when_it_is_everywhere_or_nowhere() {
        let baseline = pod(Arm::Baseline, "v1", false, 1);
        let [canary, next, unnamed] = ["v2", "v3", ""].map(|version| pod(Arm::Canary, version, true, 2));
        for (there, approved, patience) in [
            (vec![baseline.clone(), canary.clone()], true, None),
            (vec![canary.clone()], false, None),
            (vec![canary], true, Some(OVER_AFTER)),
            (vec![baseline.clone()], true, Some(GONE_AFTER)),
            // What is known of a version that is only being replaced must not be forgotten.
            (vec![baseline.clone(), unnamed], false, Some(GONE_AFTER)),
            (vec![baseline, next], false, Some(OVER_AFTER)),
            (vec![], false, Some(GONE_AFTER)),
        ] {
            let over = over("v2", approved, &pods(&there));
            assert_eq!(over.map(|(patience, _)| patience), patience, "{there:?}");
        }
    }

    #[test]
    fn long_names_have_a_key_too() {
        let long = "v".repeat(MAX_NAME_BYTES);
        let there = pods(&[
            pod(Arm::Baseline, "v1", false, 1),
            pod(Arm::Canary, &long, true, 2),
        ]);
        let key = trial("checkout", &there).unwrap().key;
        assert!(key.len() <= MAX_NAME_BYTES, "{key}");
    }
}
