//! Closed windows: what the requests of a span of time did, tenant by tenant.

use std::collections::BTreeMap;

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcomes, TenantName},
    v1,
};
use prost::Message as _;

/// One closed window.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Its start on the wall clock, in milliseconds since the Unix epoch.
    pub start_unix_ms: u64,
    /// Its length.
    pub length_ms: u32,
    /// The tenants that had requests.
    pub rows: Vec<Row>,
    /// Version of the limits that it was recorded under; 0 before the first.
    pub config_version: u64,
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
        size_of::<Self>() + rows
    }

    /// Adds the window that follows. Nothing is lost but the border between the two.
    pub fn merge(&mut self, next: Self) {
        let (before, start) = (self.sums(), self.start_unix_ms);
        let added = next.sums();
        self.length_ms = self.length_ms.saturating_add(next.length_ms);
        self.start_unix_ms = start.min(next.start_unix_ms);
        self.config_version = self.config_version.min(next.config_version);
        self.host = next.host;
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
