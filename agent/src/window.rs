//! Closed windows: what the requests of a span of time did, tenant by tenant.

use std::collections::BTreeMap;

use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcomes, TenantName},
    v1,
};
use prost::Message as _;

use crate::pool::{PoolRow, merge_pools};

/// What a window is measured as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// The arm.
    pub arm: Arm,
    /// The version of the service.
    pub version: String,
}

/// One closed window.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Its start on the wall clock, in milliseconds since the Unix epoch.
    pub start_unix_ms: u64,
    /// Its length.
    pub length_ms: u32,
    /// The tenants that had requests.
    pub rows: Vec<Row>,
    /// Version of the settings that it was recorded under; 0 before the first.
    pub config_version: u64,
    /// What the application's connection pools did; those that could be read.
    pub pools: Vec<PoolRow>,
    /// The state of the pod when it was closed.
    pub host: v1::HostContext,
}

/// What one tenant's requests did in one window.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The tenant.
    pub tenant: TenantName,
    /// How its requests ended.
    pub outcomes: Outcomes,
    /// Latency of the answered ones.
    pub latency: v1::Histogram,
    /// The latency limit that was counted against; 0 when none was known.
    pub limit_us: u64,
    /// Answered requests that took longer.
    pub over_limit: u64,
}

/// Sums over rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Requests that were seen, aborted ones included.
    pub requests: u64,
    /// Requests in which the service failed.
    pub errors: u64,
}

// === impl Window ===

impl Window {
    /// When it ends, in milliseconds since the Unix epoch.
    pub fn end_unix_ms(&self) -> u64 {
        self.start_unix_ms.saturating_add(u64::from(self.length_ms))
    }

    /// The sums of its rows.
    pub fn sums(&self) -> Sums {
        Sums::of(&self.rows)
    }

    /// What the window takes of the ring, in bytes.
    pub fn bytes(&self) -> usize {
        let rows: usize = self.rows.iter().map(Row::bytes).sum();
        let pools: usize = self.pools.iter().map(PoolRow::bytes).sum();
        size_of::<Self>() + rows + pools
    }

    /// Upper bound of what the window takes of a message beside its rows.
    pub fn frame_bytes(&self) -> usize {
        // Each number has ten bytes at most: those of the window, its totals, a gap, and the pod's state.
        const FRAME: usize = 512;
        // Eight numbers and two marks with their tags, and two lengths.
        const POOL: usize = 100;
        let pools = self.pools.iter().map(|pool| POOL + pool.name.len());
        FRAME + pools.sum::<usize>()
    }

    /// Splits off the rows from this one on, as a window of the same time. What is no row goes with them, so that
    /// it is sent once. Only the end of the rest is the window's: whoever has not got the rest must not take the
    /// window for complete.
    pub fn split_off(&mut self, at: usize) -> Self {
        let rest = Self {
            rows: self.rows.split_off(at.min(self.rows.len())),
            pools: std::mem::take(&mut self.pools),
            ..*self
        };
        self.length_ms = self.length_ms.min(1);
        self.host.cpu_us = 0;
        if let Some(database) = &mut self.host.database {
            database.retransmits = 0;
        }
        rest
    }

    /// Adds the window that follows. Nothing is lost but the border between the two.
    pub fn merge(&mut self, next: Self) {
        let (before, start) = (self.sums(), self.start_unix_ms);
        let added = next.sums();
        self.length_ms = self.length_ms.saturating_add(next.length_ms);
        self.start_unix_ms = start.min(next.start_unix_ms);
        self.config_version = self.config_version.min(next.config_version);
        self.host = merged_host(&self.host, next.host);
        merge_pools(&mut self.pools, next.pools);
        let mut mine: BTreeMap<TenantName, Row> = std::mem::take(&mut self.rows)
            .into_iter()
            .map(|row| (row.tenant.clone(), row))
            .collect();
        for row in next.rows {
            match mine.get_mut(&row.tenant) {
                Some(same) => same.merge(row),
                None => {
                    mine.insert(row.tenant.clone(), row);
                }
            }
        }
        self.rows = mine.into_values().collect();
        debug_assert_eq!(self.sums(), before.plus(added), "merging keeps all requests");
    }
}

// === impl Row ===

impl Row {
    /// What the row takes of the ring, in bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.tenant.as_str().len() + self.latency.counts.len()
    }

    /// Upper bound of its size in a message, with the tenant's name.
    pub fn wire_bytes(&self) -> usize {
        // Tags, lengths and the tenant's number are below this together; other numbers have ten bytes at most.
        const FRAME: usize = 64;
        let numbers = [self.limit_us, self.over_limit]
            .into_iter()
            .chain(self.outcomes.0);
        let numbers: usize = numbers.map(prost::encoding::encoded_len_varint).sum();
        FRAME + numbers + self.tenant.as_str().len() + self.latency.encoded_len()
    }

    /// The row as it is sent, with the number that the tenant has in the session.
    pub fn to_wire(&self, tenant: u32) -> v1::TenantRow {
        let mut row = v1::TenantRow {
            tenant,
            limit_us: self.limit_us,
            over_limit: self.over_limit,
            ..v1::TenantRow::default()
        };
        self.outcomes.to_row(&mut row);
        if self.latency.encoded_len() > 0 {
            row.latency = Some(self.latency.clone());
        }
        row
    }

    fn merge(&mut self, other: Self) {
        self.outcomes.add(&other.outcomes);
        // What is over one limit says nothing about another: without a limit, the aggregator counts
        // the buckets that are wholly above.
        if self.limit_us == other.limit_us {
            self.over_limit = self.over_limit.saturating_add(other.over_limit);
        } else {
            (self.limit_us, self.over_limit) = (0, 0);
        }
        self.latency = merged(&self.latency, &other.latency);
    }
}

/// Adds two histograms that this agent made, so that they can be decoded.
fn merged(one: &v1::Histogram, other: &v1::Histogram) -> v1::Histogram {
    let mut sum = Histogram::new();
    for part in [one, other] {
        if let Err(error) = sum.merge_wire(part) {
            debug_assert!(false, "own histogram cannot be read: {error}");
            tracing::error!(%error, "a histogram of the ring cannot be read; its latencies are lost");
        }
    }
    sum.to_wire()
}

/// What the kernel counted in both windows is added; the rest is as it was at the end of the later.
fn merged_host(earlier: &v1::HostContext, later: v1::HostContext) -> v1::HostContext {
    let database = match (earlier.database, later.database) {
        (Some(before), Some(after)) => Some(v1::Sockets {
            retransmits: before.retransmits.saturating_add(after.retransmits),
            ..after
        }),
        (before, after) => after.or(before),
    };
    v1::HostContext {
        cpu_us: earlier.cpu_us.saturating_add(later.cpu_us),
        database,
        ..later
    }
}

// === impl Sums ===

impl Sums {
    /// The sums of these rows.
    pub fn of(rows: &[Row]) -> Self {
        rows.iter().fold(Self::default(), |sums, row| {
            sums.plus(Self {
                requests: row.outcomes.seen(),
                errors: row.outcomes.errors(),
            })
        })
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            errors: self.errors.saturating_add(other.errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use coalmine_proto::pool::MAX_POOLS;

    use super::*;

    fn pool(name: &str, acquires: Option<u64>, counts: u64, gauges: u64) -> PoolRow {
        PoolRow {
            name: name.to_owned(),
            acquires,
            acquires_estimated: acquires.is_none(),
            waits: counts + 1,
            waits_at_least: false,
            timeouts: counts,
            wait_ns: counts + 2,
            used: gauges,
            idle: gauges + 1,
            max: gauges + 2,
            waiters: gauges + 3,
        }
    }

    fn window(pools: Vec<PoolRow>, host: v1::HostContext) -> Window {
        Window {
            start_unix_ms: 0,
            length_ms: 1000,
            rows: Vec::new(),
            config_version: 1,
            pools,
            host,
        }
    }

    #[test]
    fn pools_add_up_by_name() {
        let uncounted = PoolRow {
            waits_at_least: true,
            ..pool("b", None, 2, 6)
        };
        let mut one = window(
            vec![
                pool("a", Some(10), 1, 5),
                pool("b", Some(10), 1, 5),
                pool("c", None, 1, 5),
            ],
            v1::HostContext::default(),
        );
        let next = window(
            vec![
                pool("d", Some(30), 7, 7),
                uncounted,
                pool("a", Some(4), 2, 6),
                pool("c", Some(4), 2, 6),
            ],
            v1::HostContext::default(),
        );
        one.merge(next);
        let merged = |name: &str, acquires| PoolRow {
            waits: 2 + 3,
            timeouts: 1 + 2,
            wait_ns: 3 + 4,
            ..pool(name, acquires, 0, 6)
        };
        let expected = [
            merged("a", Some(14)),
            PoolRow {
                waits_at_least: true,
                ..merged("b", None)
            },
            merged("c", None),
            pool("d", Some(30), 7, 7),
        ];
        assert_eq!(one.pools, expected);
        assert!(one.bytes() >= size_of::<Window>() + 4 * size_of::<PoolRow>() + 4);
    }

    #[test]
    fn what_happened_at_more_pools_than_are_taken_is_in_the_last() {
        let named = |from: usize| (from..from + MAX_POOLS).map(|n| pool(&format!("p{n:03}"), Some(10), 1, 5));
        let mut one = window(named(0).collect(), v1::HostContext::default());
        // Half of them are new.
        let mut next = window(named(MAX_POOLS / 2).collect(), v1::HostContext::default());
        next.pools[MAX_POOLS - 1].waits_at_least = true;
        one.merge(next);
        assert_eq!(one.pools.len(), MAX_POOLS);
        let acquires = one.pools.iter().filter_map(|pool| pool.acquires);
        assert_eq!(
            acquires.sum::<u64>(),
            2 * 10 * MAX_POOLS as u64,
            "nothing is lost"
        );
        let last = &one.pools[MAX_POOLS - 1];
        let others = MAX_POOLS as u64 / 2;
        let expected = PoolRow {
            acquires: Some(10 * (2 + others)),
            waits: 2 * (2 + others),
            waits_at_least: true,
            timeouts: 2 + others,
            wait_ns: 3 * (2 + others),
            ..pool("p063", Some(0), 1, 5)
        };
        assert_eq!(*last, expected);
        assert_eq!(one.pools[0], pool("p000", Some(10), 1, 5));
    }

    #[test]
    fn what_is_no_row_goes_with_the_rest_of_a_window() {
        let row = |tenant: &[u8]| {
            let mut outcomes = Outcomes::default();
            outcomes.0[0] = 2;
            Row {
                tenant: TenantName::parse(tenant).unwrap(),
                outcomes,
                latency: v1::Histogram::default(),
                limit_us: 0,
                over_limit: 0,
            }
        };
        let host = v1::HostContext {
            in_flight: 3,
            cpu_us: 9,
            database: Some(v1::Sockets {
                established: 4,
                retransmits: 5,
                ..v1::Sockets::default()
            }),
            ..v1::HostContext::default()
        };
        let mut whole = window(vec![pool("a", Some(6), 1, 1)], host);
        whole.rows = vec![row(b"a"), row(b"b"), row(b"c")];
        let rest = whole.split_off(1);
        assert_eq!((whole.rows.len(), rest.rows.len()), (1, 2));
        assert_eq!(
            (rest.start_unix_ms, rest.length_ms, rest.config_version),
            (0, 1000, 1)
        );
        assert!(whole.pools.is_empty());
        assert_eq!(rest.pools, [pool("a", Some(6), 1, 1)]);
        assert_eq!(rest.host, host);
        let database = whole.host.database.unwrap();
        assert_eq!((whole.host.in_flight, whole.host.cpu_us), (3, 0));
        assert_eq!((database.established, database.retransmits), (4, 0));
    }

    #[test]
    fn a_window_without_rows_is_no_larger_in_a_message_than_is_said() {
        let most = u64::MAX;
        let row = PoolRow {
            acquires: Some(most),
            waits_at_least: true,
            ..pool(&"n".repeat(200), None, most - 2, most - 3)
        };
        let sockets = v1::Sockets {
            established: u32::MAX,
            awaiting: u32::MAX,
            other: u32::MAX,
            rtt_us: u32::MAX,
            retransmits: most,
        };
        let host = v1::HostContext {
            in_flight: u32::MAX,
            connections: u32::MAX,
            opaque_connections: most,
            cpu_us: most,
            cpu_limit_milli: most,
            memory_bytes: most,
            memory_limit_bytes: most,
            open_files: most,
            database: Some(sockets),
        };
        let totals = v1::Totals {
            requests: most,
            errors: most,
            gap_requests: most,
        };
        let gap = v1::Gap {
            windows: most,
            requests: most,
            errors: most,
            start_unix_ms: most,
            end_unix_ms: most,
        };
        for pools in [0, 1, 64] {
            let window = window(vec![row.clone(); pools], host);
            let batch = v1::WindowBatch {
                seq: most,
                start_unix_ms: most,
                length_ms: u32::MAX,
                names: Vec::new(),
                rows: Vec::new(),
                cumulative: Some(totals),
                gap: Some(gap),
                config_version: most,
                host: Some(window.host),
                pools: window.pools.iter().map(PoolRow::to_wire).collect(),
            };
            assert!(batch.encoded_len() <= window.frame_bytes(), "{pools} pools");
        }
    }

    #[test]
    fn the_host_is_as_the_later_window_saw_it() {
        let sockets = |established, retransmits| v1::Sockets {
            established,
            retransmits,
            ..v1::Sockets::default()
        };
        let host = |in_flight, cpu_us, database| v1::HostContext {
            in_flight,
            cpu_us,
            database,
            ..v1::HostContext::default()
        };
        for (earlier, later, merged) in [
            (Some(sockets(9, 2)), Some(sockets(5, 3)), Some(sockets(5, 5))),
            (Some(sockets(9, 2)), None, Some(sockets(9, 2))),
            (None, Some(sockets(5, 3)), Some(sockets(5, 3))),
            (None, None, None),
        ] {
            let mut window = window(Vec::new(), host(1, 10, earlier));
            window.merge(self::window(Vec::new(), host(2, 30, later)));
            assert_eq!(window.host, host(2, 40, merged));
        }
    }
}
