//! Counts requests into the open window, tenant by tenant.
//!
//! A request of a known tenant costs a look-up and a few additions, and allocates nothing.

use std::collections::HashMap;

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcome, Outcomes, TenantName},
    v1,
};

use crate::{
    observer::{Opaque, Sink, TenantId},
    tenant::{self, Found, Head, Rule},
    window::{Row, Sums, Window},
};

/// A tenant without requests for this many windows makes room when the table is full.
const IDLE_WINDOWS: u64 = 60;

const NONE: TenantId = TenantId(0);
const OVERFLOW: TenantId = TenantId(1);

/// Counts requests into the open window.
#[derive(Debug)]
pub struct Recorder {
    rules: Vec<Rule>,
    max_tenants: usize,
    limits: Limits,
    ids: HashMap<TenantName, TenantId, foldhash::fast::RandomState>,
    slots: Vec<Slot>,
    free: Vec<TenantId>,
    /// Slots that have requests in the open window.
    active: Vec<TenantId>,
    windows: u64,
    in_flight: u32,
    connections: u32,
    totals: Totals,
}

/// Latency limits, as the aggregator pushed them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// The version that the aggregator gave them; 0 before the first.
    pub version: u64,
    /// For tenants that are not listed, in microseconds; 0 for none.
    pub default_us: u64,
    /// For tenants that are listed.
    pub by_tenant: HashMap<TenantName, u64>,
}

/// Sums since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// All requests that ended.
    pub outcomes: Outcomes,
    /// Client connections that were accepted.
    pub connections: u64,
    /// Connections that could not be followed, by reason.
    pub opaque: [u64; Opaque::COUNT],
    /// Requests of tenants beyond the limit of distinct ones.
    pub overflow_requests: u64,
    /// Requests whose tenant had a name that is not allowed.
    pub rejected_names: u64,
    /// Connections to the application that could not be opened for want of files, ports or memory here.
    pub dial_exhausted: u64,
    /// Windows that were closed.
    pub windows: u64,
}

/// A closed window, and the state in which it was closed.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// The window.
    pub window: Window,
    /// Sums up to its end.
    pub totals: Totals,
    /// Tenants that are known now.
    pub tenants: usize,
    /// Version of the limits that the next window is recorded under.
    pub next_config_version: u64,
}

#[derive(Debug)]
struct Slot {
    name: TenantName,
    limit_us: u64,
    in_flight: u32,
    /// Number of the window in which its last request ended.
    last_window: u64,
    is_active: bool,
    outcomes: Outcomes,
    latency: Histogram,
    over_limit: u64,
}

// === impl Limits ===

impl Limits {
    /// Reads the limits from a message; those with names that are not allowed are left out.
    pub fn from_wire(config: &v1::Config) -> Self {
        let listed = config.limits.iter().filter_map(|limit| {
            let name = TenantName::parse_counted(&limit.tenant).ok()?;
            Some((name, limit.limit_us))
        });
        Self {
            version: config.version,
            default_us: config.default_limit_us,
            by_tenant: listed.collect(),
        }
    }

    fn of(&self, name: &TenantName) -> u64 {
        self.by_tenant.get(name).copied().unwrap_or(self.default_us)
    }
}

// === impl Recorder ===

impl Recorder {
    /// A recorder that finds tenants by these rules and knows at most so many at a time.
    pub fn new(rules: Vec<Rule>, max_tenants: usize) -> Self {
        let mut new = Self {
            rules,
            max_tenants,
            limits: Limits::default(),
            ids: HashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            windows: 0,
            in_flight: 0,
            connections: 0,
            totals: Totals::default(),
        };
        // These two have the ids NONE and OVERFLOW, and no request can name them.
        new.admit(TenantName::none());
        new.admit(TenantName::overflow());
        new
    }

    /// A client connection was accepted.
    pub fn connection_opened(&mut self) {
        self.connections += 1;
        self.totals.connections += 1;
    }

    /// A client connection is over.
    pub fn connection_closed(&mut self) {
        self.connections = self.connections.saturating_sub(1);
    }

    /// A connection to the application could not be opened for want of something on this side.
    pub fn dial_exhausted(&mut self) {
        self.totals.dial_exhausted += 1;
    }

    /// Requests that began and have not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Puts other limits in force. Only between two windows.
    pub fn set_limits(&mut self, limits: Limits) {
        debug_assert!(self.active.is_empty(), "limits change at a border only");
        self.limits = limits;
        for slot in &mut self.slots {
            slot.limit_us = self.limits.of(&slot.name);
        }
    }

    /// Closes the open window and opens the next.
    pub fn seal(&mut self, start_unix_ms: u64, length_ms: u32) -> Window {
        let active = std::mem::take(&mut self.active);
        let rows = active.iter().filter_map(|id| self.slot(*id).map(Slot::take));
        let rows: Vec<Row> = rows.collect();
        self.active = active;
        self.active.clear();
        self.windows += 1;
        self.totals.windows += 1;
        if self.is_full() {
            self.make_room();
        }
        Window {
            start_unix_ms,
            length_ms,
            rows,
            config_version: self.limits.version,
            host: v1::HostContext {
                in_flight: self.in_flight,
                connections: self.connections,
                opaque_connections: self.totals.opaque.iter().sum(),
            },
        }
    }

    /// What goes with a window that was just closed.
    pub fn sealed(&self, window: Window) -> Sealed {
        Sealed {
            window,
            totals: self.totals.clone(),
            tenants: self.ids.len().saturating_sub(2),
            next_config_version: self.limits.version,
        }
    }

    /// The sums of all requests that ended.
    pub fn sums(&self) -> Sums {
        Sums {
            requests: self.totals.outcomes.seen(),
            errors: self.totals.outcomes.errors(),
        }
    }

    fn slot(&mut self, id: TenantId) -> Option<&mut Slot> {
        self.slots.get_mut(id.0 as usize)
    }

    fn is_full(&self) -> bool {
        self.ids.len() >= self.max_tenants.saturating_add(2)
    }

    fn id_of(&mut self, name: &str) -> TenantId {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        // Checked by the rules already; a name that is refused after all is nobody's.
        let Ok(name) = TenantName::parse(name.as_bytes()) else {
            return NONE;
        };
        // Tenants that the policy lists are counted however many others there are.
        if self.is_full() && !self.limits.by_tenant.contains_key(&name) {
            self.totals.overflow_requests += 1;
            return OVERFLOW;
        }
        self.admit(name)
    }

    fn admit(&mut self, name: TenantName) -> TenantId {
        let slot = Slot::new(name.clone(), self.limits.of(&name), self.windows);
        let id = match self.free.pop() {
            Some(id) => {
                if let Some(free) = self.slot(id) {
                    *free = slot;
                }
                id
            }
            None => {
                self.slots.push(slot);
                TenantId(u32::try_from(self.slots.len() - 1).unwrap_or(OVERFLOW.0))
            }
        };
        self.ids.insert(name, id);
        id
    }

    /// Forgets tenants that have been idle for long.
    fn make_room(&mut self) {
        let (slots, windows, free) = (&mut self.slots, self.windows, &mut self.free);
        self.ids.retain(|_, id| {
            let Some(slot) = slots.get_mut(id.0 as usize) else {
                return false;
            };
            let is_idle = slot.in_flight == 0 && windows - slot.last_window > IDLE_WINDOWS;
            if is_idle && *id != NONE && *id != OVERFLOW {
                slot.latency = Histogram::new();
                free.push(*id);
                return false;
            }
            true
        });
    }
}

impl Sink for Recorder {
    fn begin(&mut self, head: &dyn Head) -> TenantId {
        let rules = std::mem::take(&mut self.rules);
        let id = match tenant::find(&rules, head) {
            Found::Name(name) => self.id_of(&name),
            Found::Missing => NONE,
            Found::Invalid => {
                self.totals.rejected_names += 1;
                NONE
            }
        };
        self.rules = rules;
        self.in_flight += 1;
        if let Some(slot) = self.slot(id) {
            slot.in_flight += 1;
        }
        id
    }

    fn end(&mut self, tenant: TenantId, outcome: Outcome, latency_ns: u64) {
        self.forget(tenant);
        self.totals.outcomes.record(outcome);
        let windows = self.windows;
        let Some(slot) = self.slots.get_mut(tenant.0 as usize) else {
            return;
        };
        slot.record(outcome, latency_ns);
        slot.last_window = windows;
        if !slot.is_active {
            slot.is_active = true;
            self.active.push(tenant);
        }
    }

    fn forget(&mut self, tenant: TenantId) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(slot) = self.slot(tenant) {
            slot.in_flight = slot.in_flight.saturating_sub(1);
        }
    }

    fn opaque(&mut self, why: Opaque) {
        self.totals.opaque[why as usize] += 1;
    }
}

// === impl Slot ===

impl Slot {
    fn new(name: TenantName, limit_us: u64, window: u64) -> Self {
        Self {
            name,
            limit_us,
            in_flight: 0,
            last_window: window,
            is_active: false,
            outcomes: Outcomes::default(),
            latency: Histogram::new(),
            over_limit: 0,
        }
    }

    fn record(&mut self, outcome: Outcome, latency_ns: u64) {
        self.outcomes.record(outcome);
        if outcome.is_answered() {
            self.latency.record(latency_ns);
            let limit_ns = self.limit_us.saturating_mul(1000);
            self.over_limit += u64::from(self.limit_us > 0 && latency_ns > limit_ns);
        }
    }

    fn take(&mut self) -> Row {
        let row = Row {
            tenant: self.name.clone(),
            outcomes: std::mem::take(&mut self.outcomes),
            latency: self.latency.to_wire(),
            limit_us: self.limit_us,
            over_limit: std::mem::take(&mut self.over_limit),
        };
        self.latency.clear();
        self.is_active = false;
        row
    }
}

#[cfg(test)]
mod tests;
