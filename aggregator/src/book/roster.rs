//! The pods that a cluster says there are, beside the agents that speak.

use std::collections::BTreeMap;

use coalmine_judge::evidence::Pods;
use coalmine_proto::names::Arm;

use super::{Build, Comparison};

/// A pod that requests may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// What it runs; the version is empty where a pod without an agent does not say it.
    pub build: Build,
    /// Whether it has an agent, whose instance is then the pod's uid.
    pub has_agent: bool,
    /// Since when requests may reach it and it is what it is.
    pub since_ms: u64,
}

/// The pods of a cluster: by service, then by uid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roster {
    /// The pods.
    pub services: BTreeMap<String, BTreeMap<String, Pod>>,
    /// Whether the cluster has not answered for a while, or not yet.
    pub is_stale: bool,
}

impl Roster {
    /// Before the cluster has said anything.
    pub fn unknown() -> Self {
        Self {
            services: BTreeMap::new(),
            is_stale: true,
        }
    }

    /// Follows one that was there before: a pod whose labels have changed is what it is from now on.
    pub(super) fn follow(&mut self, before: &Self, now_ms: u64) {
        for (service, pods) in &mut self.services {
            let Some(before) = before.services.get(service) else {
                continue;
            };
            for (uid, pod) in pods {
                if let Some(known) = before.get(uid) {
                    let same = known.build == pod.build && known.has_agent == pod.has_agent;
                    pod.since_ms = if same { known.since_ms } else { now_ms };
                }
            }
        }
    }

    /// The pods of a comparison that were there before a slot.
    fn covered<'a>(
        &'a self,
        comparison: &'a Comparison,
        start_ms: u64,
    ) -> impl Iterator<Item = (&'a String, &'a Pod)> {
        let pods = self.services.get(&comparison.service).into_iter().flatten();
        pods.filter(move |(_, pod)| comparison.covers(&pod.build) && pod.since_ms <= start_ms)
    }

    /// Of each arm, how many pods have an agent that is not among those which are expected anyhow: it has never
    /// spoken, or it speaks no more although its pod goes on.
    pub(super) fn silent(
        &self,
        comparison: &Comparison,
        start_ms: u64,
        is_expected: impl Fn(&str) -> bool,
    ) -> [u32; 2] {
        let mut silent = [0; 2];
        for (uid, pod) in self.covered(comparison, start_ms) {
            silent[pod.build.arm as usize] += u32::from(pod.has_agent && !is_expected(uid));
        }
        silent
    }

    /// What is said of the canary's pods, as they are by now: one that has come since the slot is on trial as well.
    pub(super) fn pods(&self, comparison: &Comparison) -> Pods {
        let mut pods = Pods {
            stale: self.is_stale,
            ..Pods::default()
        };
        let all = self.services.get(&comparison.service).into_iter().flatten();
        // Without a version it may be of any.
        let is_meant =
            |pod: &Pod| comparison.covers(&pod.build) || (!pod.has_agent && pod.build.version.is_empty());
        for (_, pod) in all.filter(|(_, pod)| pod.build.arm == Arm::Canary && is_meant(pod)) {
            pods.canary += 1;
            pods.unobserved += u32::from(!pod.has_agent);
        }
        pods
    }
}
