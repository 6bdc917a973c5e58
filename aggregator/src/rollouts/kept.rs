//! The rollouts that are kept in memory, and how one is found without looking at all.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use coalmine_judge::record::RolloutStart;
use tokio::sync::{mpsc, watch};

use super::{
    owner::Command,
    request::Question,
    view::{State, View},
};

/// Most rollouts that are kept in memory; ended ones beyond are only in the log.
const MAX_KEPT: usize = 1_000;

/// A rollout that is kept.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) key: String,
    pub(super) service: String,
    /// The owner's inbox, if it has an owner.
    pub(super) commands: Option<mpsc::Sender<Command>>,
    pub(super) view: Arc<watch::Sender<Arc<View>>>,
    /// Held while something is changed that has no owner who would do one thing after the other.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
}

impl Handle {
    /// What was published last.
    pub(super) fn shown(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Publishes a change of what was published last.
    pub(super) fn change(&self, change: impl FnOnce(&mut View)) -> Arc<View> {
        self.view.send_modify(|view| change(Arc::make_mut(view)));
        self.shown()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.view.borrow().state == State::Ended
    }
}

/// All rollouts that are kept.
#[derive(Debug, Default)]
pub(super) struct Kept {
    handles: BTreeMap<String, Handle>,
    /// The rollouts of each service and of each workload, by name, in the order of their starts.
    services: HashMap<String, Vec<String>>,
    workloads: HashMap<String, Vec<String>>,
}

impl Kept {
    pub(super) fn insert(&mut self, start: &RolloutStart, handle: Handle) {
        let id = || start.rollout.clone();
        self.services.entry(start.service.clone()).or_default().push(id());
        if let Some(workload) = &start.workload {
            self.workloads
                .entry(workload.name.clone())
                .or_default()
                .push(id());
        }
        self.handles.insert(id(), handle);
    }

    pub(super) fn get(&self, id: &str) -> Option<&Handle> {
        self.handles.get(id)
    }

    pub(super) fn contains(&self, id: &str) -> bool {
        self.handles.contains_key(id)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Handle> {
        self.handles.values()
    }

    /// The rollout of a service that is open, of which there is one at most.
    pub(super) fn open(&self, service: &str) -> Option<&str> {
        let newest = self.services.get(service)?.last()?;
        let handle = self.handles.get(newest)?;
        (!handle.is_ended()).then_some(newest.as_str())
    }

    /// Of each service that has rollouts that are meant, the open one; if none is open, the newest. Those that are open
    /// come first, and the newest before the others.
    pub(super) fn find(&self, question: &Question) -> Vec<Arc<View>> {
        let named = question.rollout.as_ref().map(std::slice::from_ref);
        let candidates = named
            .or_else(|| listed(&self.services, question.service.as_ref()))
            .or_else(|| listed(&self.workloads, question.workload.as_ref()));
        let mut views: Vec<_> = match candidates {
            Some(ids) => ids
                .iter()
                .filter_map(|id| self.handles.get(id))
                .map(Handle::shown)
                .collect(),
            None => self.all().map(Handle::shown).collect(),
        };
        views.retain(|view| question.means(view));
        let is_ended = |view: &View| view.state == State::Ended;
        views.sort_by(|a, b| (is_ended(a), b.start_ms, &b.id).cmp(&(is_ended(b), a.start_ms, &a.id)));
        let mut services = HashSet::new();
        views.retain(|view| services.insert(view.service.clone()));
        views
    }

    /// Drops the oldest ended rollouts.
    pub(super) fn forget(&mut self) {
        let excess = self.handles.len().saturating_sub(MAX_KEPT);
        if excess == 0 {
            return;
        }
        let ended = self.handles.iter().filter(|(_, handle)| handle.is_ended());
        let mut ended: Vec<(u64, String)> = ended
            .map(|(id, handle)| (handle.view.borrow().start_ms, id.clone()))
            .collect();
        ended.sort();
        for (_, id) in ended.into_iter().take(excess) {
            self.handles.remove(&id);
        }
        for index in [&mut self.services, &mut self.workloads] {
            for ids in index.values_mut() {
                ids.retain(|id| self.handles.contains_key(id));
            }
            index.retain(|_, ids| !ids.is_empty());
        }
    }
}

/// The rollouts that an index has under a name, if one is asked for.
fn listed<'k>(index: &'k HashMap<String, Vec<String>>, name: Option<&String>) -> Option<&'k [String]> {
    name.map(|name| index.get(name).map_or(&[][..], Vec::as_slice))
}

#[cfg(test)]
mod tests {
    use coalmine_judge::{chain::Hash, record::Workload};

    use super::*;

    /// Keeps a rollout of a service that began then.
    fn keep(kept: &mut Kept, id: &str, service: &str, canary: Option<&str>, start_ms: u64, is_ended: bool) {
        let start = RolloutStart {
            rollout: id.to_owned(),
            key: id.to_owned(),
            service: service.to_owned(),
            canary_version: format!("v{start_ms}"),
            baseline_version: None,
            policy: Hash::ZERO,
            history: None,
            judge: String::new(),
            max_windows: 1,
            window_ms: 1_000,
            start_ms,
            actor: String::new(),
            workload: canary.map(|name| Workload {
                kind: "Canary".to_owned(),
                namespace: "shop".to_owned(),
                name: name.to_owned(),
            }),
        };
        let mut view = View::new(&start);
        if is_ended {
            view.state = State::Ended;
        }
        let handle = Handle {
            key: id.to_owned(),
            service: service.to_owned(),
            commands: None,
            view: Arc::new(watch::Sender::new(Arc::new(view))),
            changing: Arc::default(),
        };
        kept.insert(&start, handle);
    }

    #[test]
    fn what_is_open_is_meant_before_what_is_newest() {
        let mut kept = Kept::default();
        keep(&mut kept, "a1", "a", Some("one"), 1, true);
        keep(&mut kept, "a2", "a", Some("one"), 2, true);
        keep(&mut kept, "b3", "b", Some("one"), 3, false);
        keep(&mut kept, "c4", "c", Some("two"), 4, false);
        keep(&mut kept, "d5", "d", None, 5, true);
        let question = |service: &str, version: &str, workload: &str, namespace: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Question {
                rollout: None,
                service: some(service),
                version: some(version),
                namespace: some(namespace),
                workload: some(workload),
            }
        };
        for (question, expected) in [
            (question("a", "", "", ""), vec!["a2"]),
            (question("a", "v1", "", ""), vec!["a1"]),
            (question("a", "v3", "", ""), vec![]),
            (question("x", "", "", ""), vec![]),
            (question("", "", "one", ""), vec!["b3", "a2"]),
            (question("", "", "one", "shop"), vec!["b3", "a2"]),
            (question("", "", "one", "other"), vec![]),
            (question("a", "", "one", ""), vec!["a2"]),
            (question("a", "", "two", ""), vec![]),
            (question("", "", "", ""), vec!["c4", "b3", "d5", "a2"]),
            (question("", "v5", "", ""), vec!["d5"]),
        ] {
            let found = kept.find(&question);
            let found: Vec<_> = found.iter().map(|view| view.id.as_str()).collect();
            assert_eq!(found, expected, "{question:?}");
        }
        assert_eq!((kept.open("a"), kept.open("b")), (None, Some("b3")));
    }

    #[test]
    fn the_oldest_ended_rollouts_are_forgotten() {
        let mut kept = Kept::default();
        let beyond = 5;
        for number in 0..MAX_KEPT + beyond {
            let start_ms = u64::try_from(number).unwrap();
            // The very first is open for ever.
            keep(
                &mut kept,
                &format!("r{number}"),
                "a",
                Some("one"),
                start_ms,
                number > 0,
            );
        }
        kept.forget();
        assert_eq!(kept.all().count(), MAX_KEPT);
        assert!(kept.contains("r0") && !kept.contains("r1") && !kept.contains("r5") && kept.contains("r6"));
        assert_eq!(kept.services["a"].len(), MAX_KEPT);
        assert_eq!(kept.workloads["one"].len(), MAX_KEPT);
    }
}
