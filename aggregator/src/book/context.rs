//! What agents say of their pods: shown beside a decision and never judged. It is not kept over a restart.

use std::fmt;

use coalmine_proto::v1::{HostContext, Pool, Sockets};
use serde::{Deserialize, Serialize};

use super::{Batch, Build, SILENT_MS, Service, pool::PoolEvents};

/// Connections of pools that were not reported for so long are not shown any more.
const POOLS_STALE_MS: u64 = 30_000;

const MIB: u64 = 1 << 20;

/// What an agent said last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Said {
    /// Of its pod, in a window of so many milliseconds.
    host: Option<(HostContext, u32)>,
    /// Of its pools, in a window that ended then.
    pools: Option<(u64, Connections)>,
}

/// Connections of pools, added up.
#[derive(Debug, Clone, Copy, Default)]
struct Connections {
    /// In use, of each pool not more than its maximum, as in evidence.
    used: u64,
    /// In use, of pools whose maximum is not known.
    unlimited: u64,
    idle: u64,
    max: u64,
    waiters: u64,
}

/// The pods of an arm, as their agents see them, and the pools of the applications in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmContext {
    /// Agents that are heard at present.
    pub agents: u64,
    /// Their pods; none before one of them has said anything.
    pub host: Option<Hosts>,
    /// Their connection pools; none if there were never any.
    pub pool: Option<Pools>,
}

/// Pods, added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hosts {
    /// Requests under way.
    pub in_flight: u64,
    /// Connections of clients.
    pub connections: u64,
    /// CPU in thousandths of a core.
    pub cpu_milli: u64,
    /// The limit on that; none if one of the pods has none.
    pub cpu_limit_milli: Option<u64>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The limit on that; none if one of the pods has none.
    pub memory_limit_bytes: Option<u64>,
    /// Open files.
    pub open_files: u64,
    /// Connections that were not followed, since the agents began: their requests are not counted.
    pub opaque_connections: u64,
    /// Connections to the database; none where no agent can see them.
    pub database: Option<DatabaseConnections>,
}

/// Connections to the database, added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseConnections {
    /// Established.
    pub established: u64,
    /// Of these, those on which an answer is awaited.
    pub awaiting: u64,
    /// In another state than established.
    pub other: u64,
    /// Round trip of the slowest, in microseconds.
    pub rtt_us: u64,
    /// Segments that were sent again in the last windows.
    pub retransmits: u64,
}

/// Connection pools, added up: how they are now, and what happened since the beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pools {
    /// Connections in use, of the pools of which `max` is known; of all where it is known of none.
    pub used: u64,
    /// Open connections that are not in use.
    pub idle: u64,
    /// Most connections that the pools may open.
    pub max: u64,
    /// Callers that wait for one.
    pub waiters: u64,
    /// Connections that were asked for.
    pub acquires: u64,
    /// Of these, how many had to wait.
    pub waits: u64,
    /// Of these, how many gave up.
    pub timeouts: u64,
    /// Milliseconds that were waited.
    pub wait_ms: u64,
}

// === impl Said ===

impl Said {
    /// Takes the next batch of the agent.
    pub(super) fn hear(&mut self, batch: &Batch<'_>) {
        if let Some(host) = batch.host {
            self.host = Some((host, batch.length_ms));
        }
        let end_ms = batch.start_ms.saturating_add(u64::from(batch.length_ms));
        if !batch.pools.is_empty() {
            self.pools = Some((end_ms, Connections::of(batch.pools)));
        } else if let Some((until_ms, _)) = self.pools
            && until_ms.saturating_add(POOLS_STALE_MS) < end_ms
        {
            self.pools = None;
        }
    }
}

// === impl Connections ===

impl Connections {
    fn of(pools: &[Pool]) -> Self {
        let sum = |gauge: fn(&Pool) -> u64| pools.iter().map(gauge).fold(0, u64::saturating_add);
        Self {
            used: sum(|pool| pool.used.min(pool.max)),
            unlimited: sum(|pool| if pool.max == 0 { pool.used } else { 0 }),
            idle: sum(|pool| pool.idle),
            max: sum(|pool| pool.max),
            waiters: sum(|pool| pool.waiters),
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            used: self.used.saturating_add(other.used),
            unlimited: self.unlimited.saturating_add(other.unlimited),
            idle: self.idle.saturating_add(other.idle),
            max: self.max.saturating_add(other.max),
            waiters: self.waiters.saturating_add(other.waiters),
        }
    }
}

// === impl Service ===

impl Service {
    /// What the agents of some builds say of their pods, and what happened at their pools since the beginning.
    pub fn context(&self, covers: impl Fn(&Build) -> bool, now_ms: u64) -> ArmContext {
        let heard = self
            .agents
            .values()
            .filter(|agent| covers(&agent.build) && agent.is_alive(now_ms, SILENT_MS));
        let said: Vec<Said> = heard.map(|agent| agent.said).collect();
        let hosts: Vec<_> = said.iter().filter_map(|said| said.host).collect();
        let mut pool: Option<Pools> = None;
        for (_, events) in self.pool_events.iter().filter(|(build, _)| covers(build)) {
            pool.get_or_insert_default().count(events);
        }
        let connections = said.iter().filter_map(|said| said.pools).map(|(_, of)| of);
        if let Some(connections) = connections.reduce(Connections::and) {
            pool.get_or_insert_default().hold(connections);
        }
        ArmContext {
            agents: said.len() as u64,
            host: (!hosts.is_empty()).then(|| Hosts::of(&hosts)),
            pool,
        }
    }
}

// === impl Hosts ===

impl Hosts {
    fn of(hosts: &[(HostContext, u32)]) -> Self {
        let sum = |value: fn(&HostContext) -> u64| {
            let values = hosts.iter().map(|(host, _)| value(host));
            values.fold(0, u64::saturating_add)
        };
        let limit = |value: fn(&HostContext) -> u64| {
            let limited = hosts.iter().all(|(host, _)| value(host) > 0);
            limited.then(|| sum(value))
        };
        // Microseconds in a millisecond are thousandths of a core.
        let cpu = hosts
            .iter()
            .map(|(host, length_ms)| host.cpu_us / u64::from(*length_ms).max(1));
        Self {
            in_flight: sum(|host| host.in_flight.into()),
            connections: sum(|host| host.connections.into()),
            cpu_milli: cpu.fold(0, u64::saturating_add),
            cpu_limit_milli: limit(|host| host.cpu_limit_milli),
            memory_bytes: sum(|host| host.memory_bytes),
            memory_limit_bytes: limit(|host| host.memory_limit_bytes),
            open_files: sum(|host| host.open_files),
            opaque_connections: sum(|host| host.opaque_connections),
            database: DatabaseConnections::of(hosts.iter().filter_map(|(host, _)| host.database)),
        }
    }
}

// === impl DatabaseConnections ===

impl DatabaseConnections {
    fn of(sockets: impl Iterator<Item = Sockets>) -> Option<Self> {
        sockets.fold(None, |sum: Option<Self>, sockets| {
            let sum = sum.unwrap_or_default();
            Some(Self {
                established: sum.established.saturating_add(sockets.established.into()),
                awaiting: sum.awaiting.saturating_add(sockets.awaiting.into()),
                other: sum.other.saturating_add(sockets.other.into()),
                rtt_us: sum.rtt_us.max(sockets.rtt_us.into()),
                retransmits: sum.retransmits.saturating_add(sockets.retransmits),
            })
        })
    }
}

// === impl Pools ===

impl Pools {
    fn count(&mut self, events: &PoolEvents) {
        self.acquires = self.acquires.saturating_add(events.acquires);
        self.waits = self.waits.saturating_add(events.waits);
        self.timeouts = self.timeouts.saturating_add(events.timeouts);
        self.wait_ms = self.wait_ms.saturating_add(events.wait_ns / 1_000_000);
    }

    fn hold(&mut self, connections: Connections) {
        let Connections {
            used,
            unlimited,
            idle,
            max,
            waiters,
        } = connections;
        // A pool without a maximum must not make the others look full.
        self.used = if max > 0 { used } else { unlimited };
        (self.idle, self.max, self.waiters) = (idle, max, waiters);
    }
}

// === in words ===

/// What there is to say, in one clause; what no agent can see is left out.
impl fmt::Display for ArmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.agents == 1 { "" } else { "s" };
        write!(f, "{} agent{plural}", self.agents)?;
        if let Some(host) = &self.host {
            write!(f, ", {host}")?;
        }
        if let Some(pool) = &self.pool {
            write!(f, "; {pool}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests in flight", self.in_flight)?;
        if self.cpu_milli > 0 {
            write!(f, ", cpu {}", cores(self.cpu_milli))?;
            if let Some(limit) = self.cpu_limit_milli {
                write!(f, " of {}", cores(limit))?;
            }
            f.write_str(" cores")?;
        }
        if self.memory_bytes > 0 {
            write!(f, ", memory {} MiB", self.memory_bytes / MIB)?;
            if let Some(limit) = self.memory_limit_bytes {
                let share = u128::from(self.memory_bytes) * 100 / u128::from(limit.max(1));
                write!(f, " of {} MiB ({share} %)", limit / MIB)?;
            }
        }
        if self.open_files > 0 {
            write!(f, ", {} open files", self.open_files)?;
        }
        if self.opaque_connections > 0 {
            write!(
                f,
                ", {} connections that were not followed",
                self.opaque_connections
            )?;
        }
        if let Some(database) = &self.database {
            write!(
                f,
                ", {} database connections ({} await an answer)",
                database.established, database.awaiting
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {}", self.used)?;
        if self.max > 0 {
            write!(f, " of {}", self.max)?;
        }
        write!(
            f,
            " connections in use, {} callers waiting; so far {} of {} acquires had to wait and {} timed out",
            self.waiters, self.waits, self.acquires, self.timeouts
        )
    }
}

/// Thousandths of a core, in cores.
fn cores(milli: u64) -> String {
    format!("{}.{:02}", milli / 1_000, milli % 1_000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_without_a_maximum_does_not_make_the_others_look_full() {
        let pool = |used, max| Pool {
            used,
            max,
            ..Pool::default()
        };
        let shown = |agents: &[&[Pool]]| {
            let agents = agents.iter().map(|pools| Connections::of(pools));
            let mut pools = Pools::default();
            pools.hold(agents.reduce(Connections::and).unwrap());
            (pools.used, pools.max)
        };
        assert_eq!(shown(&[&[pool(2, 5), pool(40, 0)]]), (2, 5));
        assert_eq!(shown(&[&[pool(40, 0)], &[pool(2, 5)]]), (2, 5));
        assert_eq!(shown(&[&[pool(15, 5), pool(0, 10)], &[pool(1, 10)]]), (6, 25));
        // Where no maximum is known, what is in use can still be said.
        assert_eq!(shown(&[&[pool(40, 0)], &[pool(3, 0)]]), (43, 0));
    }
}
