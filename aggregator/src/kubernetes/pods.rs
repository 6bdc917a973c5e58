//! The pods of both arms that a cluster has: which of them requests may reach, and which have an agent.
//!
//! Each namespace that is looked at, or all of them at once, has a follower (`follow`), which lists the pods once and
//! then hears of each change. What one pod says is read without I/O (`read`). One task keeps what the followers tell it
//! and publishes a [`Roster`]: a few at most each second, and only when it differs from the one before.
//!
//! The roster is stale when for [`STALE_AFTER`] no watch could be begun: a pod without an agent may have come since.
//! What was known stays in it, and it is never shorter because a list is read anew.

mod follow;
mod read;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use coalmine_judge::record::Workload;
use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};

use self::{follow::Follower, read::Found};
use crate::book::{self, Build};

/// Without a sign of life for this long, the roster is stale.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// What comes within this time is published together.
const TOGETHER: Duration = Duration::from_millis(200);

/// How long to wait for news when nothing can become stale.
const NO_HURRY: Duration = Duration::from_secs(3_600);

/// News that may wait for their turn; followers wait when there are more.
const QUEUE: usize = 256;

/// Most pods of one follower. With more the roster is stale, since it does not have them all.
const MAX_PODS: usize = 50_000;

/// The pods that there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Roster {
    /// By service, then by uid, which is the instance of the pod's agent.
    pub(crate) services: BTreeMap<String, BTreeMap<String, RosterPod>>,
    is_stale: bool,
}

/// A pod that requests may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RosterPod {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// What it is measured as, by its labels at present.
    pub(crate) build: Build,
    /// Whether it has a container of the agent's name.
    pub(crate) has_agent: bool,
    /// Since when requests may reach it, as far as the pod itself says: later when its containers began anew.
    pub(crate) since_ms: u64,
    /// When it was made.
    pub(crate) created_ms: u64,
    /// What made it, and would make another one.
    pub(crate) workload: Option<Workload>,
    /// Whether it asks that a rollout begins when it is there.
    pub(crate) starts_rollout: bool,
}

/// What a follower tells.
enum News {
    /// All of its pods.
    Listed(Vec<Found>),
    /// One that has come or changed.
    Put(Box<Found>),
    /// One that requests reach no more.
    Gone(String),
    /// At this moment a watch began where the list or the watch before had ended, so that nothing was missed.
    InSync(Instant),
}

/// What all followers have told.
struct Sheet(Vec<Scope>);

/// What one follower has told.
#[derive(Default)]
struct Scope {
    /// By uid.
    pods: BTreeMap<String, Found>,
    /// When a watch began last.
    in_sync: Option<Instant>,
    /// Whether there are more pods than are kept.
    is_short: bool,
}

/// Watches the pods of some namespaces, or of all if none is named, for as long as it is polled.
pub(crate) async fn watch(client: Client, namespaces: Vec<String>, publish: watch::Sender<Arc<Roster>>) {
    let namespaces: BTreeSet<String> = namespaces.into_iter().collect();
    let mut places: Vec<(Api<Pod>, String)> = namespaces
        .iter()
        .map(|namespace| {
            let api = Api::namespaced(client.clone(), namespace);
            (api, format!("in the namespace {namespace}"))
        })
        .collect();
    if places.is_empty() {
        places.push((Api::all(client), "in all namespaces".to_owned()));
    }
    let sheet = Sheet::new(places.len());
    let (news, inbox) = mpsc::channel(QUEUE);
    let followers = places
        .into_iter()
        .enumerate()
        .map(|(number, (api, place))| Follower::new(api, place, number, news.clone()).run());
    tokio::join!(join_all(followers), keep(sheet, inbox, publish));
}

/// Takes the followers' news, and publishes what follows from them.
async fn keep(
    mut sheet: Sheet,
    mut inbox: mpsc::Receiver<(usize, News)>,
    publish: watch::Sender<Arc<Roster>>,
) {
    let mut was_stale = true;
    loop {
        let due = sheet.stale_at().filter(|_| !was_stale);
        let due = due.unwrap_or_else(|| Instant::now() + NO_HURRY);
        let mut changed = match timeout_at(due, inbox.recv()).await {
            Ok(Some((number, news))) => sheet.take(number, news),
            Ok(None) => return,
            // Nothing was heard for so long that this is news.
            Err(_) => false,
        };
        let until = Instant::now() + TOGETHER;
        while let Ok(Some((number, news))) = timeout_at(until, inbox.recv()).await {
            changed |= sheet.take(number, news);
        }
        let is_stale = sheet.is_stale(Instant::now());
        if is_stale && !was_stale {
            let seconds = STALE_AFTER.as_secs();
            tracing::error!(
                "for {seconds} s it is not known which pods there are; nothing is approved until it is"
            );
        }
        if changed || is_stale != was_stale {
            publish.send_replace(Arc::new(sheet.roster(is_stale)));
        }
        was_stale = is_stale;
    }
}

// === impl Roster ===

impl Default for Roster {
    /// Before the cluster has said anything.
    fn default() -> Self {
        Self {
            services: BTreeMap::new(),
            is_stale: true,
        }
    }
}

impl Roster {
    /// Whether there may be pods that it does not have.
    pub(crate) fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// What the book needs of it.
    pub(crate) fn for_book(&self) -> book::Roster {
        let pod_of = |(uid, pod): (&String, &RosterPod)| {
            let pod = book::Pod {
                build: pod.build.clone(),
                has_agent: pod.has_agent,
                since_ms: pod.since_ms,
            };
            (uid.clone(), pod)
        };
        let services = self.services.iter();
        let services = services.map(|(service, pods)| (service.clone(), pods.iter().map(pod_of).collect()));
        book::Roster {
            services: services.collect(),
            is_stale: self.is_stale,
        }
    }
}

// === impl Sheet ===

impl Sheet {
    fn new(followers: usize) -> Self {
        Self((0..followers).map(|_| Scope::default()).collect())
    }

    /// Takes news of a follower. Says whether the pods are others now.
    fn take(&mut self, number: usize, news: News) -> bool {
        self.0.get_mut(number).is_some_and(|scope| scope.take(news))
    }

    /// When the roster is stale unless something is heard; none if it is now, since not all has been heard yet.
    fn stale_at(&self) -> Option<Instant> {
        let in_sync = self
            .0
            .iter()
            .map(|scope| scope.in_sync.filter(|_| !scope.is_short));
        // None is less than any moment.
        Some(in_sync.min().flatten()? + STALE_AFTER)
    }

    fn is_stale(&self, now: Instant) -> bool {
        self.stale_at().is_none_or(|at| at <= now)
    }

    fn roster(&self, is_stale: bool) -> Roster {
        let mut services: BTreeMap<String, BTreeMap<String, RosterPod>> = BTreeMap::new();
        for (uid, found) in self.0.iter().flat_map(|scope| &scope.pods) {
            let pods = services.entry(found.service.clone()).or_default();
            pods.insert(uid.clone(), found.pod.clone());
        }
        Roster { services, is_stale }
    }
}

// === impl Scope ===

impl Scope {
    fn take(&mut self, news: News) -> bool {
        match news {
            News::Listed(found) => {
                let pods = found.into_iter().map(|found| (found.uid.clone(), found));
                let before = std::mem::replace(&mut self.pods, pods.collect());
                self.is_short = false;
                before != self.pods
            }
            News::Put(found) => self.put(*found),
            News::Gone(uid) => self.pods.remove(&uid).is_some(),
            News::InSync(at) => {
                self.in_sync = Some(at);
                false
            }
        }
    }

    fn put(&mut self, found: Found) -> bool {
        let before = self.pods.get(&found.uid);
        if before == Some(&found) {
            return false;
        }
        if before.is_none() && self.pods.len() >= MAX_PODS {
            if !self.is_short {
                tracing::error!("{}", follow::too_many());
            }
            self.is_short = true;
            return false;
        }
        self.pods.insert(found.uid.clone(), found);
        true
    }
}
