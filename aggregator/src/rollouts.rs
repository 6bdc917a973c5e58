//! Rollouts: one owner task each. It waits until a slot is complete, freezes it, has it judged, records the
//! decision, and only then publishes it.
//!
//! `select` is the only part that touches the world; what it returns is an event, and `apply` turns it into
//! a recorded decision. Everything that asks about a rollout reads the last published [`View`].

mod execution;
mod kept;
mod logbook;
mod overriding;
mod owner;
mod ownerless;
mod request;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use coalmine_judge::{
    chain::Hash,
    history,
    policy::Policy,
    record::{Actuation, Body, RolloutStart},
    replay::{Judged, replay_decision},
    threshold::Thresholds,
    v1::{self, Verdict},
};
use coalmine_proto::{
    names::TenantName,
    v1::{Config, TenantLimit},
};
use futures_util::{Stream, stream};
use tokio::{
    runtime,
    sync::{Notify, mpsc, oneshot, watch},
};

use self::{
    kept::{Handle, Kept},
    logbook::Logged,
    overriding::Overriding,
    owner::{Command, Owner, Reply},
};
pub use self::{
    logbook::Logbook,
    request::{Question, StartRequest},
    view::{Overridden, State, View},
};
pub(crate) use self::{
    overriding::is_override,
    request::{is_haltable, is_subdomain},
};
use crate::{
    book::{Book, Comparison, locked},
    clock,
    effects::{self, Effects},
    ingest::Configs,
    ledger::{AppendError, Blob, Ledger},
    metrics::Metrics,
};

/// How often whoever watches a rollout is told that an approval is held back, or is not any more.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// The history of each service that has one.
pub type Histories = BTreeMap<String, Arc<history::History>>;

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
    kept: RwLock<Kept>,
    /// Starting is done one at a time.
    starting: tokio::sync::Mutex<()>,
    /// Where owners run, whoever starts a rollout.
    runtime: runtime::Handle,
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
            kept: RwLock::default(),
            starting: tokio::sync::Mutex::default(),
            runtime: runtime::Handle::current(),
        }));
        let mut rollouts = logbook.rollouts;
        for id in logbook.order {
            if let Some(rollout) = rollouts.remove(&id) {
                this.resume(rollout);
            }
        }
        this.kept_mut().forget();
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
            changed,
            bootstrapped,
            hold_expired,
        } = logged;
        let mut view = View::new(&start);
        view.approved = approved;
        view.bootstrapped = bootstrapped;
        if let Some((decision, hash)) = &last {
            view.recorded_decision(decision, hash);
        }
        view.hold_expired = hold_expired;
        let overriding = Overriding::restored(changed);
        if let Some(end) = end {
            view.end(&end);
            let publish = self.keep(&start, None, overriding.shown(&view));
            // What was begun is finished, or is on record as failed; nothing else is done because of what is over.
            if effects::is_unfinished(&actuations) {
                self.act_on(&start, &publish, actuations);
            }
            return;
        }
        let (commands, inbox) = mpsc::channel(8);
        let publish = self.keep(&start, Some(commands), overriding.shown(&view));
        self.act_on(&start, &publish, actuations);
        let (this, shared, shown) = (self.clone(), self.0.shared.clone(), Arc::clone(&publish));
        // The last decision is known; that it takes a while until the judge knows as much keeps nobody waiting.
        self.watch_over(start.rollout.clone(), publish, async move {
            let again = tokio::task::spawn_blocking(move || this.judge_again(&start));
            match again.await {
                Ok(Ok(judged)) => {
                    let mut owner = Owner::new(judged, view, overriding, shared);
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
        self.watch_over(
            start.rollout.clone(),
            Arc::clone(&publish),
            owner.run(inbox, publish),
        );
    }

    /// Runs what owns a rollout. A verdict that nobody stands behind any more must not stay up.
    fn watch_over(
        &self,
        rollout: String,
        publish: Arc<watch::Sender<Arc<View>>>,
        owner: impl Future<Output = ()> + Send + 'static,
    ) {
        let running = self.0.runtime.spawn(owner);
        self.0.runtime.spawn(async move {
            if running.await.is_err_and(|error| error.is_panic()) {
                tracing::error!(rollout, "the rollout's owner has failed");
                give_up(&publish, "its owner has failed");
            }
        });
    }

    /// Has done outside what is shown of a rollout. `done` is what the log has of that.
    fn act_on(&self, start: &RolloutStart, publish: &watch::Sender<Arc<View>>, done: Vec<Actuation>) {
        let effects = self.0.shared.effects.clone();
        let following = effects.follow(start.clone(), publish.subscribe(), done);
        self.0.runtime.spawn(following);
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
            changing: Arc::default(),
        };
        self.kept_mut().insert(start, handle);
        publish
    }

    fn kept(&self) -> std::sync::RwLockReadGuard<'_, Kept> {
        self.0.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept_mut(&self) -> std::sync::RwLockWriteGuard<'_, Kept> {
        self.0.kept.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a rollout, or finds the one with the same key. Says whether it is new.
    pub async fn start(&self, request: StartRequest) -> Result<(Arc<View>, bool), RolloutError> {
        request.check().map_err(RolloutError::Invalid)?;
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
            && let Some(handle) = self
                .kept()
                .all()
                .find(|handle| handle.key == *key && handle.service == request.service)
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
        let open = self.kept().open(&request.service).map(str::to_owned);
        if let Some(open) = open {
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
        let overriding = Overriding::default();
        let owner = Owner::new(judged, View::new(&start), overriding, self.0.shared.clone());
        let view = owner.view();
        self.spawn(&start, owner);
        self.kept_mut().forget();
        tracing::info!(
            rollout = start.rollout,
            service = start.service,
            version = start.canary_version,
            "rollout started"
        );
        Ok((view, true))
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
        while self.kept().contains(&id) {
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
        if !handle.is_ended() {
            let command = |reply| Command::End {
                actor: actor.clone(),
                reason: reason.clone(),
                reply,
            };
            match ask(&handle, command).await {
                Some(done) => done?,
                None => self.end_without_owner(id, &handle, actor, reason).await?,
            }
        }
        Ok(self.trusted(handle.shown()))
    }

    /// Decides in the judge's place, or gives the decision back to it. It is on record before it is shown; a HOLD and a
    /// ROLLBACK take effect without, if they must.
    pub async fn override_verdict(
        &self,
        id: &str,
        verdict: Option<Verdict>,
        actor: String,
        reason: String,
    ) -> Result<Arc<View>, RolloutError> {
        let handle = self.open_handle(id)?;
        let command = |reply| Command::Override {
            verdict,
            actor: actor.clone(),
            reason: reason.clone(),
            reply,
        };
        match ask(&handle, command).await {
            Some(done) => done?,
            None => {
                let decided = self.override_without_owner(id, &handle, verdict, actor, reason);
                decided.await?;
            }
        }
        Ok(self.trusted(handle.shown()))
    }

    /// Records that a canary without any traffic may get its first, once for a rollout.
    pub async fn bootstrap(&self, id: &str, agents: u64, hook: &str) -> Result<Arc<View>, RolloutError> {
        let handle = self.open_handle(id)?;
        let hook = hook.to_owned();
        let done = ask(&handle, |reply| Command::Bootstrap { agents, hook, reply }).await;
        done.unwrap_or_else(|| {
            let problem = format!("rollout {id} cannot be judged any more; start a new one");
            Err(RolloutError::Conflict(problem))
        })?;
        Ok(self.trusted(handle.shown()))
    }

    fn open_handle(&self, id: &str) -> Result<Handle, RolloutError> {
        let handle = self.handle(id)?;
        if handle.is_ended() {
            return Err(RolloutError::Conflict(format!(
                "rollout {id} is ended; start a new one"
            )));
        }
        Ok(handle)
    }

    /// The policies, by service.
    pub fn policies(&self) -> &BTreeMap<String, Policy> {
        &self.0.policies
    }

    /// The last published state of a rollout.
    pub fn view(&self, id: &str) -> Result<Arc<View>, RolloutError> {
        Ok(self.trusted(self.handle(id)?.shown()))
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
        let kept: Vec<_> = self.kept().all().map(Handle::shown).collect();
        let mut views: Vec<_> = kept.into_iter().map(|view| self.trusted(view)).collect();
        views.sort_by(|a, b| (b.start_ms, &b.id).cmp(&(a.start_ms, &a.id)));
        views
    }

    /// Of each service that has rollouts that are meant, the open one; if none is open, the newest. Those that are open come
    /// first, and the newest before the others. What is over says nothing of what comes next: it is on HOLD then, unless it
    /// is asked for by its name.
    pub fn find(&self, question: &Question) -> Vec<Arc<View>> {
        let views = self.kept().find(question);
        let is_named = question.rollout.is_some();
        let of_next = |view: Arc<View>| {
            if view.state == State::Ended && !is_named {
                Arc::new(view.of_next())
            } else {
                self.trusted(view)
            }
        };
        views.into_iter().map(of_next).collect()
    }

    /// What is shown of a rollout, now and whenever it changes, until it is ended.
    pub fn watch(&self, id: &str) -> Result<impl Stream<Item = Arc<View>> + Send + use<>, RolloutError> {
        let mut views = self.handle(id)?.view.subscribe();
        views.mark_changed();
        let begin = (self.clone(), views, None::<Arc<View>>);
        Ok(stream::unfold(begin, async |(this, mut views, told)| {
            if told.as_ref().is_some_and(|told| told.state == State::Ended) {
                return None;
            }
            loop {
                tokio::select! {
                    changed = views.changed() => changed.ok()?,
                    // Nobody tells when the log takes no records any more.
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
                let view = views.borrow_and_update().clone();
                let view = this.trusted(view);
                if told.as_ref().is_none_or(|told| told.differs(&view)) {
                    return Some((Arc::clone(&view), (this, views, Some(view))));
                }
            }
        }))
    }

    fn handle(&self, id: &str) -> Result<Handle, RolloutError> {
        self.kept().get(id).cloned().ok_or_else(|| {
            RolloutError::NotFound(format!(
                "there is no rollout {id:?}; `coalmine rollout list` shows all"
            ))
        })
    }

    /// The start of the oldest slot that an open rollout of a service still waits for.
    pub fn waited_for(&self, service: &str) -> Option<u64> {
        let kept = self.kept();
        let open = kept.all().filter(|handle| handle.service == service);
        open.filter_map(|handle| handle.view.borrow().waits_for_ms).min()
    }
}

/// Asks the owner of a rollout for something, and waits for its answer. None if it has no owner, or none any more: then
/// nothing was done.
async fn ask(handle: &Handle, command: impl FnOnce(Reply) -> Command) -> Option<Result<(), RolloutError>> {
    let (reply, answer) = oneshot::channel();
    handle.commands.as_ref()?.send(command(reply)).await.ok()?;
    answer.await.ok()
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
