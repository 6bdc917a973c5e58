//! The book: what agents counted, by service, time, arm and version, and tenant.
//!
//! Synchronous and without I/O. Time comes as an argument. A window of an agent belongs to the slot (one
//! window of the judge) in which it starts; one that was closed while the agent's clock was wrong belongs to
//! none. Each batch is applied exactly once: batches of one life of an agent (an epoch) have contiguous
//! numbers, and the agent's running totals are held against ours.

mod agent;
mod cell;
mod context;
mod image;
mod pool;
mod roster;
mod service;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use coalmine_judge::evidence::Window;
use coalmine_proto::{
    names::{Arm, Outcomes, TenantName},
    v1::{Gap, Histogram as WireHistogram, HostContext, Pool, Totals},
};

use foldhash::HashMap;

pub use self::{
    agent::Agent,
    context::{ArmContext, DatabaseConnections, Hosts, Pools},
    image::{Changes, Piece},
    pool::MAX_POOLS,
    roster::{Pod, Roster},
    service::Service,
};

/// Length of a slot of a service without a policy.
pub const DEFAULT_SLOT_MS: u64 = 10_000;

/// How long a slot is kept after its end when no rollout waits for it.
const KEEP_SLOTS_MS: u64 = 60_000;

/// An agent that said Bye is remembered for so long, and one that fell silent for so long: it may come back with what
/// it has counted since.
const REMEMBER_GONE_MS: u64 = 3_600_000;
const REMEMBER_SILENT_MS: u64 = 7 * 24 * 3_600_000;

/// After this long without a sign a connected agent counts as silent.
pub const SILENT_MS: u64 = 10_000;

/// Most tenants of a service; agents fold beyond their own, lower limit. For those that the policy lists, up to half of
/// the places are kept.
pub const MAX_TENANTS: usize = 200_000;

/// How long to wait for agents, and when to give them up.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long after a slot's end its agents may still report before it is judged without them.
    pub grace_ms: u64,
    /// After a start of the aggregator: how long agents may take to come back.
    pub return_ms: u64,
    /// After how long without a sign an agent is no longer expected.
    pub forget_ms: u64,
}

impl Default for Patience {
    fn default() -> Self {
        // An agent's longest pause between two attempts to connect is 30 s.
        Self {
            grace_ms: 10_000,
            return_ms: 35_000,
            forget_ms: 60_000,
        }
    }
}

/// Locks the book. A panic in another holder does not make its counts wrong: they change last.
pub(crate) fn locked(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is measured: an arm and a version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Build {
    /// The arm.
    pub arm: Arm,
    /// The version.
    pub version: String,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    services: BTreeMap<String, Service>,
    patience: Patience,
    /// When this process began, on the same clock as all other times here.
    started_ms: u64,
    /// The sessions whose batches may come.
    sessions: BTreeMap<u64, Speaker>,
    last_session: u64,
    /// Whether it is noted what changes.
    journals: bool,
    /// What a cluster says of its pods, where one is asked.
    roster: Option<Arc<Roster>>,
}

/// Who speaks in a session, and the numbers that it has given to names.
#[derive(Debug)]
pub(crate) struct Speaker {
    pub(crate) who: Introduction,
    /// The agent's numbers to the book's.
    pub(crate) names: HashMap<u32, u32>,
}

/// Who an agent says it is.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The service.
    pub service: String,
    /// The pod.
    pub instance: String,
    /// What it measures.
    pub build: Build,
    /// The life of its process.
    pub epoch: u64,
    /// The first batch that it can still send.
    pub first_seq: u64,
}

/// A batch, with the names of its tenants resolved.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Its number.
    pub seq: u64,
    /// Start of the window.
    pub start_ms: u64,
    /// Length of the window; 0 where nobody knows when it was, because the agent's clock was wrong.
    pub length_ms: u32,
    /// The rows.
    pub rows: Vec<Row<'a>>,
    /// The agent's totals at the end of the window.
    pub cumulative: Totals,
    /// Windows that the agent dropped.
    pub gap: Option<Gap>,
    /// The application's connection pools.
    pub pools: &'a [Pool],
    /// The pod, as it is at the end of the window.
    pub host: Option<HostContext>,
}

impl Batch<'_> {
    /// Whether nobody knows when the window was: what it counts is counted, and is in no slot.
    fn is_undated(&self) -> bool {
        self.length_ms == 0
    }
}

/// A row of a batch.
#[derive(Debug)]
pub struct Row<'a> {
    /// The tenant, as the book numbers it.
    pub tenant: u32,
    /// Requests by outcome.
    pub outcomes: Outcomes,
    /// Their latency.
    pub latency: Option<&'a WireHistogram>,
    /// The limit that `over` counts against; 0 for none.
    pub limit_us: u64,
    /// Requests over the limit.
    pub over: u64,
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It counts.
    Now,
    /// It had been applied before.
    Before,
}

/// Why a batch is refused. The stream is closed; the agent begins again after the last durable batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BookError {
    /// A batch is missing.
    #[error("batch {got} came after batch {last}; batches must be contiguous")]
    Order {
        /// The batch that came.
        got: u64,
        /// The last one applied.
        last: u64,
    },
    /// A batch came again with another content.
    #[error("batch {0} came before with another content; two agents may be using the same --instance")]
    Changed(u64),
    /// A newer session of the same agent took over.
    #[error("a newer session of this agent is open")]
    Superseded,
    /// The histogram is not valid.
    #[error("the latency of tenant {tenant} is refused: {problem}")]
    Latency {
        /// The tenant.
        tenant: TenantName,
        /// Why.
        problem: String,
    },
    /// The agent's own totals differ from what it sent.
    #[error(
        "the agent's totals say {said} {what}, {applied} were received and {gaps} are declared as gaps; windows were \
         lost or doubled"
    )]
    Totals {
        /// Requests, errors or requests in gaps.
        what: &'static str,
        /// The agent's count.
        said: u64,
        /// Ours.
        applied: u64,
        /// Declared.
        gaps: u64,
    },
    /// A row contradicts itself.
    #[error("the row of tenant {tenant} is refused: {problem}")]
    Row {
        /// The tenant.
        tenant: TenantName,
        /// Why.
        problem: &'static str,
    },
    /// What is said of a connection pool contradicts itself.
    #[error("the connection pool {name:?} is refused: {problem}")]
    Pool {
        /// The pool; the beginning of a long name.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// More pools than one application has.
    #[error("{0} connection pools in one window; at most {MAX_POOLS} are taken")]
    TooManyPools(usize),
    /// The service is not known; an introduction is missing.
    #[error("nothing is known of this agent")]
    Unknown,
}

/// What a rollout compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// The service.
    pub service: String,
    /// The version on trial.
    pub canary_version: String,
    /// The version to compare with; none for all of the baseline arm.
    pub baseline_version: Option<String>,
}

/// An agent of the canary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    /// Its instance.
    pub instance: String,
    /// The version that it measures.
    pub version: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// Requests since it began, as far as they were told.
    pub requests: u64,
}

impl Comparison {
    fn covers(&self, build: &Build) -> bool {
        match build.arm {
            Arm::Canary => build.version == self.canary_version,
            Arm::Baseline => self
                .baseline_version
                .as_ref()
                .is_none_or(|version| *version == build.version),
        }
    }
}

impl Book {
    /// An empty book.
    pub fn new(patience: Patience, started_ms: u64) -> Self {
        Self {
            services: BTreeMap::new(),
            patience,
            started_ms,
            sessions: BTreeMap::new(),
            last_session: 0,
            journals: false,
            roster: None,
        }
    }

    /// Sets the length of a service's slots; before its first window.
    pub fn set_slot(&mut self, service: &str, slot_ms: u64) {
        self.service(service).slot_ms = slot_ms;
    }

    /// Keeps places for the tenants that a service's policy lists, however many other names there are; before its first
    /// window.
    pub fn keep_places(&mut self, service: &str, tenants: impl IntoIterator<Item = TenantName>) {
        let listed = tenants.into_iter().collect::<BTreeSet<_>>();
        self.service(service).list(listed);
    }

    fn service(&mut self, name: &str) -> &mut Service {
        let journals = self.journals;
        let service = self.services.entry(name.to_owned()).or_insert_with(Service::new);
        if journals {
            service.journal.get_or_insert_default();
        }
        service
    }

    /// The services, by name.
    pub fn services(&self) -> impl Iterator<Item = (&str, &Service)> {
        self.services
            .iter()
            .map(|(name, service)| (name.as_str(), service))
    }

    /// One service.
    pub fn get(&self, service: &str) -> Option<&Service> {
        self.services.get(service)
    }

    /// The agents of a service's canary that have not said Bye.
    pub fn canaries(&self, service: &str) -> Vec<Canary> {
        let agents = self.get(service).into_iter().flat_map(Service::agents);
        let canaries = agents.filter(|(_, agent)| agent.build.arm == Arm::Canary && !agent.gone);
        let canary = |(instance, agent): (&str, &Agent)| Canary {
            instance: instance.to_owned(),
            version: agent.build.version.clone(),
            connected: agent.connected,
            requests: agent.applied.requests.saturating_add(agent.gap_requests),
        };
        canaries.map(canary).collect()
    }

    /// The number of the next session.
    pub fn next_session(&self) -> u64 {
        self.last_session + 1
    }

    /// Opens a session of an agent; says which batch is the last durable one of its epoch. An older session of the same
    /// agent is superseded.
    pub fn introduce(&mut self, who: &Introduction, session: u64, now_ms: u64) -> u64 {
        self.last_session = self.last_session.max(session);
        let older = self.agent(&who.service, &who.instance).map(|agent| agent.session);
        if let Some(older) = older {
            self.sessions.remove(&older);
        }
        let speaker = Speaker {
            who: who.clone(),
            names: HashMap::default(),
        };
        self.sessions.insert(session, speaker);
        let service = self.service(&who.service);
        service.note_agents();
        let agent = service
            .agents
            .entry(who.instance.clone())
            .or_insert_with(|| Agent::new(who));
        if agent.epoch != who.epoch || agent.build != who.build {
            // At a change of its labels all of the build before is durable, and the epoch is the next one. Any other
            // life has lost what the one before it had not sent.
            let turned = agent.build != who.build && who.epoch == agent.epoch.wrapping_add(1).max(1);
            let crashed = !agent.gone && !turned && agent.sealed_until_ms > 0;
            *agent = Agent {
                hole: crashed.then_some((agent.sealed_until_ms, u64::MAX)),
                first_start_ms: if crashed && agent.build == who.build {
                    agent.first_start_ms
                } else {
                    0
                },
                ..Agent::new(who)
            };
        }
        if who.first_seq > agent.applied_seq.saturating_add(1) {
            // The agent has forgotten batches that an earlier state of this book had acknowledged: a data
            // directory was put back from a backup. They will not come again.
            agent.applied_seq = who.first_seq - 1;
            agent.durable_seq = agent.applied_seq;
            agent.based = false;
        }
        agent.session = session;
        agent.connected = true;
        agent.gone = false;
        agent.last_seen_ms = now_ms;
        // What was applied and is not durable yet comes again, and is then known.
        agent.durable_seq
    }

    /// Takes out who speaks in a session, to read a batch of it; `resume` puts it back.
    pub(crate) fn speaker(&mut self, session: u64) -> Result<Speaker, BookError> {
        self.sessions.remove(&session).ok_or(BookError::Superseded)
    }

    /// Who speaks in a session.
    pub fn who(&self, session: u64) -> Option<Introduction> {
        Some(self.sessions.get(&session)?.who.clone())
    }

    /// Puts back who speaks in a session.
    pub(crate) fn resume(&mut self, session: u64, speaker: Speaker) {
        self.sessions.insert(session, speaker);
    }

    /// After stored windows were read again: of the sessions that were open then none is.
    pub fn disconnect_all(&mut self, now_ms: u64) {
        self.sessions.clear();
        for service in self.services.values_mut() {
            for agent in service.agents.values_mut().filter(|agent| agent.connected) {
                // It could not come back while nobody was there.
                agent.connected = false;
                agent.last_seen_ms = agent.last_seen_ms.max(now_ms);
            }
        }
    }

    /// Gives a tenant its number. Beyond [`MAX_TENANTS`], or what of them is not kept for others, the rest is one tenant,
    /// [`TenantName::overflow`].
    pub fn intern(&mut self, service: &str, tenant: &TenantName) -> u32 {
        self.service(service).intern(tenant)
    }

    /// Applies a batch.
    pub fn apply(
        &mut self,
        service: &str,
        instance: &str,
        session: u64,
        batch: &Batch<'_>,
        now_ms: u64,
    ) -> Result<Applied, BookError> {
        let service = self.services.get_mut(service).ok_or(BookError::Unknown)?;
        service.apply(instance, session, batch, now_ms)
    }

    /// Notes that batches up to `seq` are on disk.
    pub fn durable(&mut self, service: &str, instance: &str, epoch: u64, seq: u64) {
        if let Some(agent) = self.agent(service, instance)
            && agent.epoch == epoch
        {
            agent.durable_seq = agent.durable_seq.max(seq);
        }
    }

    /// Notes that a session's stream has ended, for good if `gone`.
    pub fn disconnect(&mut self, service: &str, instance: &str, session: u64, gone: bool, now_ms: u64) {
        self.sessions.remove(&session);
        if let Some(agent) = self.agent(service, instance)
            && agent.session == session
        {
            agent.connected = false;
            agent.gone |= gone;
            agent.last_seen_ms = now_ms;
            self.service(service).note_agents();
        }
    }

    fn agent(&mut self, service: &str, instance: &str) -> Option<&mut Agent> {
        self.services.get_mut(service)?.agents.get_mut(instance)
    }

    /// The first slot that starts at or after `now_ms`.
    pub fn next_slot(&self, service: &str, now_ms: u64) -> u64 {
        let slot = self
            .services
            .get(service)
            .map_or(DEFAULT_SLOT_MS, |service| service.slot_ms);
        now_ms.div_ceil(slot) * slot
    }

    /// Whether every agent that is expected has reported the slot, or waiting any longer is no use.
    pub fn is_ready(&self, comparison: &Comparison, start_ms: u64, now_ms: u64) -> bool {
        let Some(service) = self.services.get(&comparison.service) else {
            return now_ms >= start_ms + DEFAULT_SLOT_MS + self.patience.grace_ms;
        };
        let end_ms = start_ms + service.slot_ms;
        if now_ms < end_ms {
            return false;
        }
        let returned_ms = self.started_ms.saturating_add(self.patience.return_ms);
        let deadline = end_ms.saturating_add(self.patience.grace_ms).max(returned_ms);
        let (patience, roster) = (self.patience.forget_ms, self.roster.as_deref());
        let silent = service.silent(comparison, start_ms, now_ms, patience, roster);
        let mut expected = [false; 2];
        // After a start the cluster is still being asked which pods there are.
        let is_asked = now_ms < returned_ms && roster.is_some_and(|roster| roster.is_stale);
        let mut waiting = is_asked || silent != [0; 2];
        for agent in service.expected(comparison, start_ms, now_ms, patience) {
            expected[agent.build.arm as usize] = true;
            waiting |= !agent.has_reported(end_ms);
        }
        // Without agents on both arms there may be some on their way.
        (!waiting && expected == [true; 2]) || now_ms >= deadline
    }

    /// Freezes a slot into evidence. Windows that come later are counted, and judged no more.
    pub fn freeze(&mut self, comparison: &Comparison, start_ms: u64, number: u64, now_ms: u64) -> Window {
        let (forget_ms, roster) = (self.patience.forget_ms, self.roster.clone());
        let service = self.service(&comparison.service);
        service.freeze(comparison, start_ms, number, now_ms, forget_ms, roster.as_deref())
    }

    /// Takes note of the pods that there are. Before the first time nobody is held to have any.
    pub fn enrol(&mut self, mut roster: Roster, now_ms: u64) {
        if let Some(before) = &self.roster {
            roster.follow(before, now_ms);
        }
        self.roster = Some(Arc::new(roster));
    }

    /// What the agents of both arms say of their pods and pools at present, canary first.
    pub fn contexts(&self, comparison: &Comparison, now_ms: u64) -> [ArmContext; 2] {
        let service = self.services.get(&comparison.service);
        Arm::ALL.map(|arm| {
            let covers = |build: &Build| build.arm == arm && comparison.covers(build);
            service.map_or_else(ArmContext::default, |service| service.context(covers, now_ms))
        })
    }

    /// Before stored windows are read again: slots that nobody waits for get no place.
    pub fn keep_only(&mut self, now_ms: u64, waiting: &BTreeMap<String, u64>) {
        self.evict(now_ms, |_| None);
        for (name, slot) in waiting {
            self.service(name).keep_from_ms = *slot;
        }
    }

    /// After they were read: what comes from now on for a slot that was judged comes too late.
    pub fn judged(&mut self, waiting: &BTreeMap<String, u64>) {
        for (name, slot) in waiting {
            self.service(name).judged_until_ms = *slot;
        }
    }

    /// Lets go of slots that nobody waits for.
    pub fn evict(&mut self, now_ms: u64, waited_for: impl Fn(&str) -> Option<u64>) {
        for (name, service) in &mut self.services {
            let old = now_ms.saturating_sub(KEEP_SLOTS_MS + service.slot_ms);
            let keep = waited_for(name).map_or(old, |slot| slot.min(old));
            service.evict(keep);
            service.forget_agents(now_ms);
        }
    }
}
