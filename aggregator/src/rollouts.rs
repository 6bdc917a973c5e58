//! Rollouts: one owner task each. It waits until a slot is complete, freezes it, has it judged, records the
//! decision, and only then publishes it.
//!
//! `select` is the only part that touches the world; what it returns is an event, and `apply` turns it into
//! a recorded decision. Everything that asks about a rollout reads the last published [`View`].

mod owner;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use coalmine_judge::{
    chain::Hash,
    history,
    policy::Policy,
    record::{Actuation, Body, Decision, Record, RolloutEnd, RolloutStart, Workload},
    replay::{Judged, replay_decision},
    threshold::Thresholds,
    v1,
};
use coalmine_proto::{
    names::{TenantName, check_name},
    v1::{Config, TenantLimit},
};
use serde::Deserialize;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use self::owner::{Command, Owner};
pub use self::view::{State, View};
use crate::{
    book::{Book, Comparison, locked},
    clock,
    effects::{self, Effects},
    ingest::Configs,
    ledger::{AppendError, Blob, Ledger},
    metrics::Metrics,
};

/// The history of each service that has one.
pub type Histories = BTreeMap<String, Arc<history::History>>;

/// Most rollouts that are kept in memory; ended ones beyond are only in the log.
const MAX_KEPT: usize = 1_000;

/// What a caller asks for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with; by default all of the baseline arm.
    pub baseline_version: Option<String>,
    /// The same key names the same rollout.
    pub key: Option<String>,
    /// Who asks.
    pub actor: Option<String>,
    /// What is rolled out, so that it can be halted.
    pub workload: Option<Workload>,
}

/// Why a request is refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RolloutError {
    /// The request is malformed.
    #[error("{0}")]
    Invalid(String),
    /// There is no such rollout or service.
    #[error("{0}")]
    NotFound(String),
    /// It contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// The log cannot be written.
    #[error(transparent)]
    Append(#[from] AppendError),
}

/// All rollouts.
#[derive(Debug, Clone)]
pub struct Rollouts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    policies: BTreeMap<String, Policy>,
    histories: Histories,
    shared: Shared,
    handles: RwLock<BTreeMap<String, Handle>>,
    /// Starting is done one at a time.
    starting: tokio::sync::Mutex<()>,
}

/// What every owner needs.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Where evidence is frozen.
    pub book: Arc<Mutex<Book>>,
    /// Where decisions are recorded.
    pub ledger: Ledger,
    /// Where they are counted.
    pub metrics: Arc<Metrics>,
    /// Woken when the book has news.
    pub news: Arc<Notify>,
    /// What they do outside.
    pub effects: Effects,
}

#[derive(Debug, Clone)]
struct Handle {
    key: String,
    service: String,
    /// The owner's inbox, if it has an owner.
    commands: Option<mpsc::Sender<Command>>,
    view: Arc<watch::Sender<Arc<View>>>,
}

/// A rollout as the log tells it.
#[derive(Debug)]
struct Logged {
    start: RolloutStart,
    last: Option<(Decision, String)>,
    /// Whether any of its decisions was an approval.
    approved: bool,
    /// Whether the hold deadline that the last decision reached, if it did, has its record.
    deadline_told: bool,
    end: Option<RolloutEnd>,
    /// What was done outside because of its decisions.
    actuations: Vec<Actuation>,
}

/// Kinds of workloads that can be told to stop.
const WORKLOAD_KINDS: [&str; 3] = ["Deployment", "Rollout", "Canary"];

/// Whether a workload can be told to stop.
pub(crate) fn is_haltable(workload: &Workload) -> bool {
    WORKLOAD_KINDS.contains(&workload.kind.as_str())
}

fn check_workload(workload: &Workload) -> Result<(), String> {
    if !is_haltable(workload) {
        return Err(format!(
            "workload.kind is {:.40?}, and must be one of {}",
            workload.kind,
            WORKLOAD_KINDS.join(", ")
        ));
    }
    for (field, name) in [("namespace", &workload.namespace), ("name", &workload.name)] {
        if !is_subdomain(name) {
            return Err(format!(
                "workload.{field} is {name:.40?}; give the {field} of the object as Kubernetes has it"
            ));
        }
    }
    Ok(())
}

/// Whether a name is a DNS subdomain of RFC 1123, as Kubernetes has it: it becomes part of a path.
fn is_subdomain(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let ends = [label.bytes().next(), label.bytes().last()];
        label.bytes().all(|c| is_plain(c) || c == b'-') && ends.into_iter().all(|c| c.is_some_and(is_plain))
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// The rollouts of a log, gathered while it is read.
#[derive(Debug, Default)]
pub struct Logbook {
    rollouts: BTreeMap<String, Logged>,
    /// In the order of their starts.
    order: Vec<String>,
}

impl Logbook {
    /// Takes the next record.
    pub fn take(&mut self, record: &Record, hash: Hash) {
        match &record.body {
            Body::Rollout(start) => {
                self.order.push(start.rollout.clone());
                let logged = Logged {
                    start: start.clone(),
                    last: None,
                    approved: false,
                    deadline_told: false,
                    end: None,
                    actuations: Vec::new(),
                };
                self.rollouts.insert(start.rollout.clone(), logged);
            }
            Body::Decision(decision) => {
                if let Some(rollout) = self.rollouts.get_mut(&decision.rollout) {
                    rollout.last = Some(((**decision).clone(), hash.to_string()));
                    rollout.approved |= decision.finding.verdict == v1::Verdict::Approve.as_str();
                    rollout.deadline_told = false;
                }
            }
            Body::Deadline(deadline) => {
                if let Some(rollout) = self.rollouts.get_mut(&deadline.rollout) {
                    rollout.deadline_told = true;
                }
            }
            Body::End(end) => {
                if let Some(rollout) = self.rollouts.get_mut(&end.rollout) {
                    rollout.end = Some(end.clone());
                }
            }
            Body::Actuation(actuation) => {
                if let Some(rollout) = self.rollouts.get_mut(&actuation.rollout) {
                    rollout.actuations.push(actuation.clone());
                }
            }
            // What concerns the log alone.
            _ => {}
        }
    }

    /// Of each service, the slot that its open rollout waits for.
    pub fn waiting(&self) -> BTreeMap<String, u64> {
        let open = self.rollouts.values().filter(|rollout| rollout.end.is_none());
        let slot = |Logged { start, last, .. }: &Logged| {
            let windows = last.as_ref().map_or(0, |(decision, _)| decision.finding.window);
            let passed = windows.saturating_mul(start.window_ms);
            (start.service.clone(), start.start_ms.saturating_add(passed))
        };
        open.map(slot).collect()
    }
}

impl Rollouts {
    /// Restores the rollouts of the log; the open ones go on.
    pub fn restore(
        policies: BTreeMap<String, Policy>,
        histories: Histories,
        shared: Shared,
        logbook: Logbook,
    ) -> Self {
        let this = Self(Arc::new(Inner {
            policies,
            histories,
            shared,
            handles: RwLock::default(),
            starting: tokio::sync::Mutex::default(),
        }));
        let mut rollouts = logbook.rollouts;
        for id in logbook.order {
            if let Some(rollout) = rollouts.remove(&id) {
                this.resume(rollout);
            }
        }
        this.forget();
        this
    }

    /// Shows a rollout as the log left it, and goes on with it when it is judged again.
    fn resume(&self, logged: Logged) {
        let Logged {
            start,
            last,
            approved,
            deadline_told,
            end,
            actuations,
        } = logged;
        let mut view = View::new(&start);
        view.approved = approved;
        if let Some((decision, hash)) = &last {
            view.recorded_decision(decision, hash);
        }
        if let Some(end) = end {
            view.end(&end);
            let publish = self.keep(&start, None, view);
            // What was begun is finished, or is on record as failed; nothing else is done because of what is over.
            if effects::is_unfinished(&actuations) {
                self.act_on(&start, &publish, actuations);
            }
            return;
        }
        let (commands, inbox) = mpsc::channel(8);
        let publish = self.keep(&start, Some(commands), view.clone());
        self.act_on(&start, &publish, actuations);
        let (this, shared, shown) = (self.clone(), self.0.shared.clone(), Arc::clone(&publish));
        // The last decision is known; that it takes a while until the judge knows as much keeps nobody waiting.
        watch_over(start.rollout.clone(), publish, async move {
            let again = tokio::task::spawn_blocking(move || this.judge_again(&start));
            match again.await {
                Ok(Ok(judged)) => {
                    let mut owner = Owner::new(judged, view, shared);
                    if !deadline_told {
                        owner.tell_deadline();
                    }
                    owner.run(inbox, shown).await;
                }
                Ok(Err(problem)) => give_up(&shown, &problem),
                Err(error) => give_up(&shown, &error.to_string()),
            }
        });
    }

    /// Judges the last windows of a rollout again, from the last state that was kept.
    fn judge_again(&self, start: &RolloutStart) -> Result<Judged, String> {
        let ledger = &self.0.shared.ledger;
        let policy_window = self.0.policies.get(&start.service).map(Policy::window_ms);
        if policy_window != Some(start.window_ms) {
            return Err(format!(
                "it was begun with windows of {} ms, and the policy of {} now has {}",
                start.window_ms,
                start.service,
                policy_window.map_or_else(|| "none".to_owned(), |ms| format!("{ms} ms"))
            ));
        }
        let last = ledger.index().decisions(Some(&start.rollout)).last().copied();
        let Some(seq) = last else {
            return Judged::begin_with(start, ledger.blobs());
        };
        let read = ledger.read(seq);
        let read = read.map_err(|error| format!("record {seq} cannot be read: {error}"))?;
        match read.map(|read| read.record.body) {
            Some(Body::Decision(decision)) => {
                let judged = replay_decision(&decision, ledger.blobs());
                let judged =
                    judged.map_err(|problem| format!("{} does not replay: {problem}", decision.id))?;
                if judged.start == *start {
                    Ok(judged)
                } else {
                    Err(format!(
                        "{} rests on another beginning of the rollout",
                        decision.id
                    ))
                }
            }
            _ => Err(format!("record {seq} is no decision")),
        }
    }

    fn spawn(&self, start: &RolloutStart, owner: Owner) {
        let (commands, inbox) = mpsc::channel(8);
        let publish = self.keep(start, Some(commands), (*owner.view()).clone());
        self.act_on(start, &publish, Vec::new());
        watch_over(
            start.rollout.clone(),
            Arc::clone(&publish),
            owner.run(inbox, publish),
        );
    }

    /// Has done outside what is shown of a rollout. `done` is what the log has of that.
    fn act_on(&self, start: &RolloutStart, publish: &watch::Sender<Arc<View>>, done: Vec<Actuation>) {
        let effects = self.0.shared.effects.clone();
        tokio::spawn(effects.follow(start.clone(), publish.subscribe(), done));
    }

    /// Keeps a rollout; one without commands has no owner.
    fn keep(
        &self,
        start: &RolloutStart,
        commands: Option<mpsc::Sender<Command>>,
        view: View,
    ) -> Arc<watch::Sender<Arc<View>>> {
        let publish = Arc::new(watch::Sender::new(Arc::new(view)));
        let handle = Handle {
            key: start.key.clone(),
            service: start.service.clone(),
            commands,
            view: Arc::clone(&publish),
        };
        self.handles_mut().insert(start.rollout.clone(), handle);
        publish
    }

    fn handles(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Handle>> {
        self.0.handles.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Handle>> {
        self.0.handles.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the oldest ended rollouts from memory.
    fn forget(&self) {
        let mut handles = self.handles_mut();
        let excess = handles.len().saturating_sub(MAX_KEPT);
        let mut ended: Vec<(u64, String)> = handles
            .iter()
            .filter(|(_, handle)| handle.view.borrow().state == State::Ended)
            .map(|(id, handle)| (handle.view.borrow().start_ms, id.clone()))
            .collect();
        ended.sort();
        for (_, id) in ended.into_iter().take(excess) {
            handles.remove(&id);
        }
    }

    /// Starts a rollout, or finds the one with the same key. Says whether it is new.
    pub async fn start(&self, request: StartRequest) -> Result<(Arc<View>, bool), RolloutError> {
        for (field, name) in [
            ("service", Some(&request.service)),
            ("canary_version", Some(&request.canary_version)),
            ("baseline_version", request.baseline_version.as_ref()),
            ("key", request.key.as_ref()),
            ("actor", request.actor.as_ref()),
        ] {
            if let Some(name) = name {
                check_name(name.as_bytes())
                    .map_err(|error| RolloutError::Invalid(format!("{field} {error}")))?;
            }
        }
        if let Some(workload) = &request.workload {
            check_workload(workload).map_err(RolloutError::Invalid)?;
        }
        if request.baseline_version.as_ref() == Some(&request.canary_version) {
            return Err(RolloutError::Invalid(format!(
                "baseline_version and canary_version are both {}; a version cannot be compared with itself",
                request.canary_version
            )));
        }
        let Some(policy) = self.0.policies.get(&request.service) else {
            let known: Vec<_> = self.0.policies.keys().map(String::as_str).collect();
            return Err(RolloutError::NotFound(format!(
                "there is no policy for service {:?} (there is one for: {}); start the aggregator with its --policy",
                request.service,
                known.join(", ")
            )));
        };
        let _one_at_a_time = self.0.starting.lock().await;
        if let Some(key) = &request.key
            && let Some(handle) = self.handles().values().find(|handle| handle.key == *key)
        {
            let view = handle.view.borrow().clone();
            let asked = (
                &request.service,
                &request.canary_version,
                &request.baseline_version,
                &request.workload,
            );
            let known = (
                &view.service,
                &view.canary_version,
                &view.baseline_version,
                &view.workload,
            );
            if asked != known {
                return Err(RolloutError::Conflict(format!(
                    "the key {key:?} belongs to rollout {} of {} {}; use a new key",
                    view.id, view.service, view.canary_version
                )));
            }
            return Ok((self.trusted(view), false));
        }
        if let Some(open) = self.open_rollout(&request.service) {
            return Err(RolloutError::Conflict(format!(
                "rollout {open} of {} is still open; end it with `coalmine rollout end {open}`",
                request.service
            )));
        }
        let start = self.new_start(request, policy);
        let history = self.0.histories.get(&start.service).cloned();
        let policy_blob = Blob::pack(policy.source.as_bytes())?;
        let history_text = history.map(|history| history.to_json());
        let history_blob = history_text.as_ref().map(|text| Blob::pack(text.as_bytes()));
        let history_blob = history_blob.transpose()?;
        let start = RolloutStart {
            policy: policy_blob.digest,
            history: history_blob.as_ref().map(|blob| blob.digest),
            ..start
        };
        let blobs = [policy_blob].into_iter().chain(history_blob).collect();
        self.0
            .shared
            .ledger
            .append(Body::Rollout(start.clone()), blobs)
            .await?;
        let judged = Judged::begin(&start, &policy.source, history_text.as_deref());
        let judged = judged.map_err(RolloutError::Invalid)?;
        let owner = Owner::new(judged, View::new(&start), self.0.shared.clone());
        let view = owner.view();
        self.spawn(&start, owner);
        self.forget();
        tracing::info!(
            rollout = start.rollout,
            service = start.service,
            version = start.canary_version,
            "rollout started"
        );
        Ok((view, true))
    }

    fn open_rollout(&self, service: &str) -> Option<String> {
        let handles = self.handles();
        let open = |handle: &Handle| handle.service == service && handle.view.borrow().state != State::Ended;
        handles
            .iter()
            .find(|(_, handle)| open(handle))
            .map(|(id, _)| id.clone())
    }

    fn new_start(&self, request: StartRequest, policy: &Policy) -> RolloutStart {
        let now_ms = clock::now_ms();
        let start_ms = locked(&self.0.shared.book).next_slot(&request.service, now_ms);
        let plain = |name: &str| -> String {
            name.chars()
                .map(|c| {
                    if c.is_ascii_alphanumeric() || c == '.' {
                        c
                    } else {
                        '-'
                    }
                })
                .collect()
        };
        let stem = format!("{}-{}", plain(&request.service), plain(&request.canary_version));
        let mut id = format!("{stem}-{}", now_ms / 1_000);
        while self.handles().contains_key(&id) {
            id.push('x');
        }
        RolloutStart {
            key: request.key.unwrap_or_else(|| id.clone()),
            rollout: id,
            service: request.service,
            canary_version: request.canary_version,
            baseline_version: request.baseline_version,
            policy: Hash::ZERO,
            history: None,
            judge: v1::ID.to_owned(),
            max_windows: policy.planned_windows(),
            window_ms: policy.window_ms(),
            start_ms,
            actor: request.actor.unwrap_or_else(|| "api".to_owned()),
            workload: request.workload,
        }
    }

    /// Ends a rollout.
    pub async fn end(&self, id: &str, actor: String, reason: String) -> Result<Arc<View>, RolloutError> {
        let handle = self.handle(id)?;
        if handle.view.borrow().state == State::Ended {
            return Ok(self.trusted(handle.view.borrow().clone()));
        }
        let Some(commands) = handle.commands.as_ref().filter(|commands| !commands.is_closed()) else {
            return self.end_without_owner(id, &handle, actor, reason).await;
        };
        let (reply, answer) = oneshot::channel();
        let stopping =
            || RolloutError::Conflict(format!("rollout {id} cannot be ended while the server stops"));
        commands
            .send(Command::End { actor, reason, reply })
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())??;
        Ok(self.trusted(handle.view.borrow().clone()))
    }

    /// A rollout that cannot be judged any more can still be ended.
    async fn end_without_owner(
        &self,
        id: &str,
        handle: &Handle,
        actor: String,
        reason: String,
    ) -> Result<Arc<View>, RolloutError> {
        let verdict = handle.view.borrow().verdict.clone();
        let end = RolloutEnd {
            rollout: id.to_owned(),
            actor,
            reason,
            verdict,
        };
        self.0
            .shared
            .ledger
            .append(Body::End(end.clone()), Vec::new())
            .await?;
        handle.view.send_modify(|view| Arc::make_mut(view).end(&end));
        Ok(handle.view.borrow().clone())
    }

    /// The last published state of a rollout.
    pub fn view(&self, id: &str) -> Result<Arc<View>, RolloutError> {
        Ok(self.trusted(self.handle(id)?.view.borrow().clone()))
    }

    /// What is shown of a view: an approval only while the log takes records, for whatever reason it does not.
    fn trusted(&self, view: Arc<View>) -> Arc<View> {
        if view.verdict != v1::Verdict::Approve.as_str() {
            return view;
        }
        match self.0.shared.ledger.trouble() {
            None => view,
            Some(why) => {
                let mut view = (*view).clone();
                view.hold_back(&why);
                Arc::new(view)
            }
        }
    }

    /// All rollouts that are kept, newest first.
    pub fn list(&self) -> Vec<Arc<View>> {
        let mut views: Vec<_> = self
            .handles()
            .values()
            .map(|handle| self.trusted(handle.view.borrow().clone()))
            .collect();
        views.sort_by(|a, b| (b.start_ms, &b.id).cmp(&(a.start_ms, &a.id)));
        views
    }

    fn handle(&self, id: &str) -> Result<Handle, RolloutError> {
        self.handles().get(id).cloned().ok_or_else(|| {
            RolloutError::NotFound(format!(
                "there is no rollout {id:?}; `coalmine rollout list` shows all"
            ))
        })
    }

    /// The start of the oldest slot that an open rollout of a service still waits for.
    pub fn waited_for(&self, service: &str) -> Option<u64> {
        let handles = self.handles();
        let open = handles.values().filter(|handle| handle.service == service);
        open.filter_map(|handle| handle.view.borrow().waits_for_ms).min()
    }
}

/// Runs what owns a rollout. A verdict that nobody stands behind any more must not stay up.
fn watch_over(
    rollout: String,
    publish: Arc<watch::Sender<Arc<View>>>,
    owner: impl Future<Output = ()> + Send + 'static,
) {
    let running = tokio::spawn(owner);
    tokio::spawn(async move {
        if running.await.is_err_and(|error| error.is_panic()) {
            tracing::error!(rollout, "the rollout's owner has failed");
            give_up(&publish, "its owner has failed");
        }
    });
}

/// Shows that a rollout cannot go on.
fn give_up(publish: &watch::Sender<Arc<View>>, problem: &str) {
    publish.send_modify(|view| {
        tracing::error!(
            rollout = view.id,
            problem,
            "rollout cannot be continued; it stays on HOLD"
        );
        Arc::make_mut(view).broken(problem);
    });
}

/// What a rollout compares.
fn comparison(start: &RolloutStart) -> Comparison {
    Comparison {
        service: start.service.clone(),
        canary_version: start.canary_version.clone(),
        baseline_version: start.baseline_version.clone(),
    }
}

/// What agents shall count, and against what: the rules of the policies, and the limits that are judged, from the
/// policies and the histories. A tenant that a policy names is listed whatever its limit, because what is listed is
/// never counted as `__overflow__`.
pub fn configs(policies: &BTreeMap<String, Policy>, histories: &Histories) -> Configs {
    let config = |policy: &Policy, history: Option<&history::History>| {
        let default_limit_us = Thresholds::default_of(policy, history).p99_us.unwrap_or(0);
        let learned = history.into_iter().flat_map(|history| history.tenants.keys());
        // The digest's names were checked when it was read.
        let learned = learned.filter_map(|name| TenantName::parse(name.as_bytes()).ok());
        let tenants: BTreeSet<TenantName> = policy.tenants.keys().cloned().chain(learned).collect();
        let limit = |tenant: &TenantName| TenantLimit {
            tenant: tenant.as_str().to_owned(),
            limit_us: Thresholds::of(policy, history, tenant).p99_us.unwrap_or(0),
        };
        Config {
            version: 1,
            default_limit_us,
            limits: tenants
                .iter()
                .map(|tenant| (policy.tenants.contains_key(tenant), limit(tenant)))
                .filter(|(is_named, limit)| *is_named || limit.limit_us != default_limit_us)
                .map(|(_, limit)| limit)
                .collect(),
            tenant_rules: policy.tenant_rules.iter().map(ToString::to_string).collect(),
        }
    };
    policies
        .iter()
        .map(|(service, policy)| {
            let history = histories.get(service).map(|history| &**history);
            (service.clone(), config(policy, history))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_can_be_halted_and_is_named_as_kubernetes_names() {
        let check = |kind: &str, namespace: &str, name: &str| {
            let [kind, namespace, name] = [kind, namespace, name].map(str::to_owned);
            check_workload(&Workload {
                kind,
                namespace,
                name,
            })
        };
        for kind in ["Deployment", "Rollout", "Canary"] {
            assert_eq!(check(kind, "shop", "check-out.v2"), Ok(()));
        }
        let refused = check("StatefulSet", "shop", "checkout").unwrap_err();
        assert!(refused.contains("workload.kind"), "{refused}");
        let long = "x".repeat(254);
        for bad in ["", ".", "..", "a/b", "a..b", "-a", "a-", "A", "a_b", &long] {
            let refused = check("Deployment", bad, "a").unwrap_err();
            assert!(refused.contains("workload.namespace"), "{refused}");
            let refused = check("Deployment", "a", bad).unwrap_err();
            assert!(refused.contains("workload.name "), "{refused}");
        }
    }

    const POLICY: &str = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
        defaults: { errors: { max_rate: 1% }, latency: { p99: 350ms } },
        tenants: { acme: { latency: { p99: 250ms } }, same: {} },
        adjust: { from_history: true, floor: 0.5x, ceiling: 2x },
        tenant_rules: [ 'header:X-Tenant', 'fixed:rest' ] }";

    const HISTORY: &str = r#"{"v":1,"service":"checkout","rollouts":1,"windows":9,"first_ms":0,"last_ms":1,"sources":[],
        "arm_difference_tenants":0,"tenants":{
        "fast":{"requests":1000,"windows":9,"rollouts":1,"p99_us":200000},
        "few":{"requests":999,"windows":9,"rollouts":1,"p99_us":200000}}}"#;

    #[test]
    fn agents_count_against_the_limits_that_are_judged() {
        let policies = BTreeMap::from([("checkout".to_owned(), Policy::parse(POLICY).unwrap())]);
        let history = Arc::new(history::History::parse(HISTORY).unwrap());
        let limits = |histories: &Histories| {
            let config = configs(&policies, histories).remove("checkout").unwrap();
            let limits: Vec<_> = config
                .limits
                .into_iter()
                .map(|limit| (limit.tenant, limit.limit_us))
                .collect();
            (config.default_limit_us, limits)
        };
        let acme = ("acme".to_owned(), 250_000);
        let same = ("same".to_owned(), 350_000);
        assert_eq!(
            limits(&Histories::new()),
            (350_000, vec![acme.clone(), same.clone()])
        );
        let histories = Histories::from([("checkout".to_owned(), history)]);
        let fast = ("fast".to_owned(), 250_000);
        assert_eq!(limits(&histories), (350_000, vec![acme, fast, same]));
    }

    #[test]
    fn agents_follow_the_rules_of_the_policy() {
        let policies = BTreeMap::from([("checkout".to_owned(), Policy::parse(POLICY).unwrap())]);
        let config = configs(&policies, &Histories::new()).remove("checkout").unwrap();
        assert_eq!(config.tenant_rules, ["header:x-tenant", "fixed:rest"]);
    }
}
