//! Counts requests into the open window, tenant by tenant.
//!
//! A request of a known tenant costs a look-up and a few additions, and allocates nothing. How many tenants are
//! known is bounded, whatever names clients send: `room` says who has a place and who loses it, and `sketch`
//! finds the busiest of those that have none.
//!
//! What the aggregator tells ([`Settings`]) takes effect between two windows. A request stays with the tenant that
//! it had when it began, whatever the rules say later.

mod ids;
mod room;
mod settings;
mod sketch;
mod slot;

use std::{rc::Rc, sync::Arc};

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcome, Outcomes, TenantName},
    v1,
};

pub use self::settings::{PushedRules, Settings};
use self::{ids::Ids, sketch::Sketch, slot::Slot};
use crate::{
    observer::{Opaque, Sink, TenantId, Times},
    tenant::{self, Found, Head, Rule},
    window::{Row, Sums, Window},
};

const NONE: TenantId = TenantId(0);
const OVERFLOW: TenantId = TenantId(1);

/// How many of the slots are not those of tenants: the two above.
const OWN_SLOTS: usize = 2;

/// Counts requests into the open window.
#[derive(Debug)]
pub struct Recorder {
    /// The rules in force.
    rules: Rc<[Rule]>,
    /// Those that the agent was started with.
    own_rules: Rc<[Rule]>,
    max_tenants: usize,
    settings: Arc<Settings>,
    ids: Ids,
    slots: Vec<Slot>,
    free: Vec<TenantId>,
    /// Slots that have requests in the open window.
    active: Vec<TenantId>,
    /// Names without a place, since the last review; none before the first of them.
    sketch: Option<Sketch>,
    /// Number of the review that comes next.
    review: u64,
    /// The slot that is looked at next for one that can be given away.
    hand: usize,
    windows: u64,
    in_flight: u32,
    connections: u32,
    /// Times to the first byte of the answers of the open window.
    first_byte: Histogram,
    totals: Totals,
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
    /// Requests that were not followed to their end; they are not among the outcomes.
    pub unfollowed: u64,
    /// Requests that no correct server would accept; they are nobody's, and not among the outcomes.
    pub malformed: u64,
    /// Bytes that were passed on to the application.
    pub received_bytes: u64,
    /// Bytes that were passed on to clients.
    pub sent_bytes: u64,
    /// Requests of tenants beyond the limit of distinct ones.
    pub overflow_requests: u64,
    /// Tenants that lost their place to busier ones.
    pub replaced_tenants: u64,
    /// Requests whose tenant had a name that is not allowed.
    pub rejected_names: u64,
    /// Lists of rules that came from the aggregator and cannot be read.
    pub refused_rules: u64,
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
    /// Times from the first byte of a request to the first of its answer, of all answers of the window.
    pub first_byte: v1::Histogram,
    /// Sums up to its end.
    pub totals: Totals,
    /// Tenants that are known now.
    pub tenants: usize,
    /// Version of the settings that the next window is recorded under.
    pub next_config_version: u64,
}

// === impl Recorder ===

impl Recorder {
    /// A recorder that finds tenants by these rules and knows at most so many at a time.
    pub fn new(rules: Vec<Rule>, max_tenants: usize) -> Self {
        let rules: Rc<[Rule]> = rules.into();
        let mut new = Self {
            own_rules: rules.clone(),
            rules,
            max_tenants,
            settings: Arc::default(),
            ids: Ids::default(),
            slots: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            sketch: None,
            review: 0,
            hand: 0,
            windows: 0,
            in_flight: 0,
            connections: 0,
            first_byte: Histogram::new(),
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

    /// So many bytes were passed on, up to the application and down to the client.
    pub fn passed(&mut self, up: u64, down: u64) {
        self.totals.received_bytes = self.totals.received_bytes.saturating_add(up);
        self.totals.sent_bytes = self.totals.sent_bytes.saturating_add(down);
    }

    /// Requests that began and have not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Puts other settings in force. Only between two windows.
    pub fn apply(&mut self, settings: impl Into<Arc<Settings>>) {
        debug_assert!(self.active.is_empty(), "settings change at a border only");
        let settings = settings.into();
        match &settings.rules {
            PushedRules::None => self.follow(None),
            PushedRules::Rules(rules) => self.follow(Some(rules)),
            PushedRules::Refused(why) => self.refuse(why),
        }
        self.settings = settings;
        for slot in &mut self.slots {
            slot.settle(&self.settings);
        }
    }

    /// Puts rules in force; the agent's own if there are no others.
    fn follow(&mut self, rules: Option<&[Rule]>) {
        let rules = rules.map_or_else(|| self.own_rules.clone(), Rc::from);
        if self.rules != rules {
            tracing::info!(rules = rules.len(), "other rules find the tenants from now on");
            self.rules = rules;
        }
    }

    /// The rules in force stay. Said once, and not at each new session.
    fn refuse(&mut self, why: &str) {
        self.totals.refused_rules += 1;
        let is_said = matches!(&self.settings.rules, PushedRules::Refused(said) if said == why);
        if !is_said {
            tracing::error!(
                why,
                "the aggregator's tenant_rules cannot be used; the rules in force stay"
            );
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
        self.make_room();
        Window {
            start_unix_ms,
            length_ms,
            rows,
            config_version: self.settings.version,
            pools: Vec::new(),
            host: v1::HostContext {
                in_flight: self.in_flight,
                connections: self.connections,
                opaque_connections: self.totals.opaque.iter().sum(),
                ..v1::HostContext::default()
            },
        }
    }

    /// What goes with a window that was just closed.
    pub fn sealed(&mut self, window: Window) -> Sealed {
        let first_byte = self.first_byte.to_wire();
        self.first_byte.clear();
        Sealed {
            window,
            first_byte,
            totals: self.totals.clone(),
            tenants: self.ids.len().saturating_sub(OWN_SLOTS),
            next_config_version: self.settings.version,
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

    /// A request is not under way any more.
    fn leave(&mut self, tenant: TenantId) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(slot) = self.slot(tenant) {
            slot.in_flight = slot.in_flight.saturating_sub(1);
        }
    }

    fn id_of(&mut self, name: &str) -> TenantId {
        if let Some(id) = self.ids.find(name, &self.slots) {
            return id;
        }
        // Tenants that the policy lists are counted however many others there are.
        if self.is_full() && !self.settings.lists(name) {
            self.totals.overflow_requests += 1;
            self.sketch.get_or_insert_with(Sketch::new).record(name);
            return OVERFLOW;
        }
        // Checked by the rules already; a name that is refused after all is nobody's.
        TenantName::parse(name.as_bytes()).map_or(NONE, |name| self.admit(name))
    }
}

impl Sink for Recorder {
    fn begin(&mut self, head: &dyn Head) -> TenantId {
        let rules = self.rules.clone();
        let id = match tenant::find(&rules, head) {
            Found::Name(name) => self.id_of(&name),
            Found::Missing => NONE,
            Found::Invalid => {
                self.totals.rejected_names += 1;
                NONE
            }
        };
        self.in_flight += 1;
        let review = self.review;
        if let Some(slot) = self.slot(id) {
            slot.begin(review);
        }
        id
    }

    fn end(&mut self, tenant: TenantId, outcome: Outcome, times: Times) {
        self.leave(tenant);
        self.totals.outcomes.record(outcome);
        if let Some(first_byte_ns) = times.first_byte_ns
            && outcome.is_answered()
        {
            self.first_byte.record(first_byte_ns);
        }
        let windows = self.windows;
        let Some(slot) = self.slots.get_mut(tenant.0 as usize) else {
            return;
        };
        slot.record(outcome, times);
        slot.last_window = windows;
        if !slot.is_active {
            slot.is_active = true;
            self.active.push(tenant);
        }
    }

    fn forget(&mut self, tenant: TenantId) {
        self.leave(tenant);
        self.totals.unfollowed += 1;
    }

    fn passed_over(&mut self) {
        self.totals.unfollowed += 1;
    }

    fn malformed(&mut self, begun: Option<TenantId>) {
        if let Some(tenant) = begun {
            self.leave(tenant);
        }
        self.totals.malformed += 1;
    }

    fn opaque(&mut self, why: Opaque) {
        self.totals.opaque[why as usize] += 1;
    }
}

#[cfg(test)]
mod tests;
