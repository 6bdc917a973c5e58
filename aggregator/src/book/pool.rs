//! The application's connection pools: what agents report of them, in a slot and since the beginning.
//!
//! Events add up. Connections in use and at most are states, so of each agent and pool the last report in a slot counts;
//! an agent's own reports come in order, so what agents said together does not depend on who was heard first.

use std::collections::{BTreeMap, BTreeSet};

use coalmine_judge::evidence;
pub use coalmine_proto::pool::MAX_POOLS;
use coalmine_proto::{
    names::Arm,
    pool::{MAX_COUNT, MAX_NAME_BYTES, MAX_WAIT_NS},
    v1,
};
use prost::Message;

use super::{BookError, Build};

/// The pools of a slot are written down in so many pieces, by the instance that reports them.
const SHARDS: u32 = 64;

/// What happened at pools, added up.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct PoolEvents {
    /// Connections that were asked for.
    #[prost(uint64, tag = "1")]
    pub(super) acquires: u64,
    /// Of these, how many had to wait.
    #[prost(uint64, tag = "2")]
    pub(super) waits: u64,
    /// Of these, how many gave up.
    #[prost(uint64, tag = "3")]
    pub(super) timeouts: u64,
    /// Nanoseconds that were waited.
    #[prost(uint64, tag = "4")]
    pub(super) wait_ns: u64,
}

/// The pools of one build in one slot, by agent and name.
#[derive(Debug, Clone, Default)]
pub(super) struct SlotPools(BTreeMap<String, BTreeMap<String, PoolCell>>);

/// One pool of one agent in one slot.
#[derive(Debug, Clone, Copy, Default)]
struct PoolCell {
    acquires: u64,
    waits: u64,
    timeouts: u64,
    /// Some of the waits were not counted.
    at_least: bool,
    /// Requests stand for some of the acquires.
    estimated: bool,
    /// Of the last report; not more than `max`, and none where that is not known: how full such a pool is nobody could
    /// say.
    used: u64,
    max: u64,
}

/// The pools of one build in one slot, of the agents in one shard.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PoolsImage {
    #[prost(uint32, tag = "1")]
    pub(super) arm: u32,
    #[prost(string, tag = "2")]
    pub(super) version: String,
    #[prost(uint64, tag = "3")]
    pub(super) slot_ms: u64,
    #[prost(message, repeated, tag = "4")]
    agents: Vec<AgentPoolsImage>,
}

#[derive(Clone, PartialEq, Message)]
struct AgentPoolsImage {
    #[prost(string, tag = "1")]
    instance: String,
    /// With the counts of the slot and what is not counted of them, and used and max as they were reported last.
    #[prost(message, repeated, tag = "2")]
    pools: Vec<v1::Pool>,
}

/// What happened at the pools of one build since the beginning.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PoolEventsImage {
    #[prost(uint32, tag = "1")]
    pub(super) arm: u32,
    #[prost(string, tag = "2")]
    pub(super) version: String,
    #[prost(message, required, tag = "3")]
    pub(super) events: PoolEvents,
}

/// Whether what a batch says of its pools makes sense.
pub(super) fn check(pools: &[v1::Pool]) -> Result<(), BookError> {
    if pools.len() > MAX_POOLS {
        return Err(BookError::TooManyPools(pools.len()));
    }
    for pool in pools {
        if let Some(problem) = problem_of(pool) {
            return Err(BookError::Pool {
                name: pool.name.chars().take(40).collect(),
                problem,
            });
        }
    }
    Ok(())
}

fn problem_of(pool: &v1::Pool) -> Option<&'static str> {
    let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    let counts = [
        pool.acquires,
        pool.used,
        pool.idle,
        pool.max,
        pool.waiters,
        pool.waits,
        pool.timeouts,
    ];
    if pool.name.len() > MAX_NAME_BYTES {
        Some("its name has more than 128 bytes")
    } else if !pool.name.bytes().all(printable) {
        Some("its name has a character that is not printable ASCII")
    } else if counts.into_iter().any(|count| count > MAX_COUNT) {
        Some("more acquires or connections than a window can hold")
    } else if pool.waits > pool.acquires {
        Some("more waits than acquires")
    } else if pool.timeouts > pool.acquires {
        Some("more timeouts than acquires")
    } else if pool.wait_ns > MAX_WAIT_NS {
        Some("more time was waited than a window can hold")
    } else {
        None
    }
}

/// The shard of an agent: the same in every process.
pub(super) fn shard_of(instance: &str) -> u32 {
    crc32fast::hash(instance.as_bytes()) % SHARDS
}

// === impl PoolEvents ===

impl PoolEvents {
    /// Adds what a batch reports.
    pub(super) fn take(&mut self, pools: &[v1::Pool]) {
        for pool in pools {
            self.acquires = self.acquires.saturating_add(pool.acquires);
            self.waits = self.waits.saturating_add(pool.waits);
            self.timeouts = self.timeouts.saturating_add(pool.timeouts);
            self.wait_ns = self.wait_ns.saturating_add(pool.wait_ns);
        }
    }
}

// === impl SlotPools ===

impl SlotPools {
    /// Takes an agent's next report. What happened at pools with more names than are kept is added to the last.
    pub(super) fn take(&mut self, instance: &str, pools: &[v1::Pool]) {
        // Pools without a name of their own are one.
        let mut reported: BTreeMap<&str, PoolCell> = BTreeMap::new();
        for pool in pools {
            reported.entry(&pool.name).or_default().add(&PoolCell::of(pool));
        }
        let kept = self.0.entry(instance.to_owned()).or_default();
        for (name, report) in reported {
            if let Some(cell) = kept.get_mut(name) {
                cell.follow(&report);
            } else if kept.len() < MAX_POOLS {
                kept.insert(name.to_owned(), report);
            } else if let Some(mut last) = kept.last_entry() {
                last.get_mut().add_events(&report);
            }
        }
    }

    /// Adds all of them to a sum. Since no pool counts more connections in use than it may open, one that does not keep
    /// to its maximum cannot make the others look full.
    fn add_to(&self, sum: &mut PoolCell) {
        for cell in self.0.values().flat_map(BTreeMap::values) {
            sum.add(cell);
        }
    }

    /// The shards that have an agent.
    pub(super) fn shards(&self) -> BTreeSet<u32> {
        self.0.keys().map(|instance| shard_of(instance)).collect()
    }

    pub(super) fn image(&self, build: &Build, slot_ms: u64, shard: u32) -> PoolsImage {
        let agents = self.0.iter().filter(|(instance, _)| shard_of(instance) == shard);
        let agents = agents.map(|(instance, pools)| AgentPoolsImage {
            instance: instance.clone(),
            pools: pools.iter().map(|(name, cell)| cell.image(name)).collect(),
        });
        PoolsImage {
            arm: build.arm as u32,
            version: build.version.clone(),
            slot_ms,
            agents: agents.collect(),
        }
    }

    /// Puts a shard back.
    pub(super) fn load(&mut self, image: PoolsImage) {
        for agent in image.agents {
            let pools = agent.pools.iter();
            let pools = pools
                .map(|pool| (pool.name.clone(), PoolCell::of(pool)))
                .collect();
            self.0.insert(agent.instance, pools);
        }
    }
}

/// The pools of one arm as evidence; none if no agent reported any.
pub(super) fn evidence_of<'a>(
    arm: Arm,
    builds: impl Iterator<Item = &'a SlotPools>,
) -> Option<evidence::Pool> {
    let mut sum: Option<PoolCell> = None;
    let mut agents = BTreeSet::new();
    for pools in builds {
        pools.add_to(sum.get_or_insert_default());
        agents.extend(pools.0.keys());
    }
    let sum = sum?;
    Some(evidence::Pool {
        arm,
        acquires: sum.acquires,
        waits: sum.waits,
        timeouts: sum.timeouts,
        used: sum.used,
        max: sum.max,
        at_least: sum.at_least,
        estimated: sum.estimated,
        agents: Some(u32::try_from(agents.len()).unwrap_or(u32::MAX)),
    })
}

// === impl PoolCell ===

impl PoolCell {
    fn of(pool: &v1::Pool) -> Self {
        Self {
            acquires: pool.acquires,
            waits: pool.waits,
            timeouts: pool.timeouts,
            at_least: pool.waits_at_least,
            estimated: pool.acquires_estimated,
            used: pool.used.min(pool.max),
            max: pool.max,
        }
    }

    /// Adds another pool.
    fn add(&mut self, other: &Self) {
        self.add_events(other);
        self.used = self.used.saturating_add(other.used);
        self.max = self.max.saturating_add(other.max);
    }

    /// Takes a later report of the same pool.
    fn follow(&mut self, later: &Self) {
        self.add_events(later);
        self.used = later.used;
        self.max = later.max;
    }

    fn add_events(&mut self, other: &Self) {
        self.acquires = self.acquires.saturating_add(other.acquires);
        self.waits = self.waits.saturating_add(other.waits);
        self.timeouts = self.timeouts.saturating_add(other.timeouts);
        self.at_least |= other.at_least;
        self.estimated |= other.estimated;
    }

    fn image(&self, name: &str) -> v1::Pool {
        v1::Pool {
            name: name.to_owned(),
            acquires: self.acquires,
            waits: self.waits,
            timeouts: self.timeouts,
            used: self.used,
            max: self.max,
            waits_at_least: self.at_least,
            acquires_estimated: self.estimated,
            ..v1::Pool::default()
        }
    }
}
