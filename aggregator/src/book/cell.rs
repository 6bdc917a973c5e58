//! One tenant in one slot, and what a row must satisfy to be counted there.

use coalmine_judge::evidence::{ArmCounts, Latency, OverSla, Probes};
use coalmine_proto::{
    histogram::Histogram,
    names::{Outcomes, TenantName},
    v1::TenantRow,
};

use super::{BookError, Row};

/// One tenant in one slot.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    pub(super) outcomes: Outcomes,
    pub(super) latency: Histogram,
    limit: Limit,
    over: u64,
}

/// The latency limit that `over` was counted against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Limit {
    /// Nothing was counted yet.
    #[default]
    Fresh,
    /// All agents counted against the same limit.
    Same(u64),
    /// Some agents did not know the limit, or knew another: only the histogram says.
    Mixed,
}

/// Most requests of one row that are believed: more than any pod can answer in a window.
const MAX_ROW_REQUESTS: u64 = 1 << 32;

/// The latency of a row, if the row makes sense.
pub(super) fn latency_of(row: &Row<'_>, tenants: &[TenantName]) -> Result<Option<Histogram>, BookError> {
    let tenant = || {
        tenants
            .get(row.tenant as usize)
            .cloned()
            .unwrap_or_else(TenantName::none)
    };
    let refuse = |problem: &'static str| {
        Err(BookError::Row {
            tenant: tenant(),
            problem,
        })
    };
    if row.outcomes.seen() > MAX_ROW_REQUESTS {
        return refuse("more requests than a window can hold");
    }
    let latency = row
        .latency
        .map(Histogram::from_wire)
        .transpose()
        .map_err(|error| BookError::Latency {
            tenant: tenant(),
            problem: error.to_string(),
        })?;
    let count = latency.as_ref().map_or(0, Histogram::count);
    if count > row.outcomes.requests() {
        return refuse("more latencies than requests");
    }
    if row.over > count {
        return refuse("more requests over the limit than latencies");
    }
    Ok(latency)
}

impl Cell {
    pub(super) fn add(&mut self, row: &Row<'_>, latency: Option<Histogram>) {
        self.outcomes.add(&row.outcomes);
        if let Some(latency) = latency {
            let known = if row.limit_us == 0 {
                Limit::Mixed
            } else {
                Limit::Same(row.limit_us)
            };
            self.limit = self.limit.with(known);
            self.over = self.over.saturating_add(row.over);
            if self.latency.is_empty() {
                self.latency = latency;
            } else {
                self.latency.merge(&latency);
            }
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.outcomes.add(&other.outcomes);
        if other.limit != Limit::Fresh {
            self.limit = self.limit.with(other.limit);
            self.over = self.over.saturating_add(other.over);
            self.latency.merge(&other.latency);
        }
    }

    /// The cell as a row; none if nothing was counted.
    pub(super) fn image(&self) -> Option<TenantRow> {
        let mut row = TenantRow {
            latency: (self.limit != Limit::Fresh).then(|| self.latency.to_wire()),
            limit_us: match self.limit {
                Limit::Same(limit_us) => limit_us,
                Limit::Fresh | Limit::Mixed => 0,
            },
            over_limit: self.over,
            ..TenantRow::default()
        };
        self.outcomes.to_row(&mut row);
        (!self.outcomes.is_empty()).then_some(row)
    }

    /// The cell of such a row.
    pub(super) fn of_image(row: &TenantRow) -> Result<Self, String> {
        let latency = row.latency.as_ref().map(Histogram::from_wire);
        let latency = latency.transpose().map_err(|error| error.to_string())?;
        Ok(Self {
            outcomes: Outcomes::from_row(row),
            limit: match (&latency, row.limit_us) {
                (None, _) => Limit::Fresh,
                (Some(_), 0) => Limit::Mixed,
                (Some(_), limit_us) => Limit::Same(limit_us),
            },
            latency: latency.unwrap_or_default(),
            over: row.over_limit,
        })
    }

    pub(super) fn into_counts(self) -> ArmCounts {
        let over_sla = match self.limit {
            Limit::Same(limit_us) => Some(OverSla {
                limit_us,
                count: self.over,
            }),
            Limit::Fresh | Limit::Mixed => None,
        };
        let measured = !self.latency.is_empty();
        ArmCounts {
            requests: self.outcomes.requests(),
            errors: self.outcomes.errors(),
            latency: measured.then_some(Latency {
                histogram: self.latency,
                over_sla,
            }),
            probes: Probes::default(),
        }
    }
}

impl Limit {
    pub(super) fn with(self, other: Self) -> Self {
        if self == Self::Fresh || self == other {
            other
        } else {
            Self::Mixed
        }
    }
}
