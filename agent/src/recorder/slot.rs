//! What is counted of one tenant.

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcome, Outcomes, TenantName},
};

use super::Settings;
use crate::{observer::Times, window::Row};

/// The place of one tenant, and what its requests did in the open window.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: TenantName,
    /// Nobody's: the next tenant may have it.
    pub(super) is_free: bool,
    /// Whether the policy names the tenant.
    pub(super) is_listed: bool,
    limit_us: u64,
    pub(super) in_flight: u32,
    /// Number of the window in which its last request ended.
    pub(super) last_window: u64,
    /// Requests that began since the review before this one.
    begun: u64,
    review: u64,
    pub(super) is_active: bool,
    outcomes: Outcomes,
    latency: Histogram,
    over_limit: u64,
}

impl Slot {
    pub(super) fn new(name: TenantName, settings: &Settings, window: u64) -> Self {
        let mut new = Self {
            name,
            is_free: false,
            is_listed: false,
            limit_us: 0,
            in_flight: 0,
            last_window: window,
            begun: 0,
            review: 0,
            is_active: false,
            outcomes: Outcomes::default(),
            latency: Histogram::new(),
            over_limit: 0,
        };
        new.settle(settings);
        new
    }

    /// Takes what the settings say of the tenant.
    pub(super) fn settle(&mut self, settings: &Settings) {
        self.limit_us = settings.limit_of(&self.name);
        self.is_listed = settings.lists(self.name.as_str());
    }

    /// A request begins, before the review with this number.
    pub(super) fn begin(&mut self, review: u64) {
        self.in_flight += 1;
        if self.review != review {
            (self.review, self.begun) = (review, 0);
        }
        self.begun += 1;
    }

    /// Requests that began since the review before this one.
    pub(super) fn begun(&self, review: u64) -> u64 {
        if self.review == review { self.begun } else { 0 }
    }

    /// A request ended.
    pub(super) fn record(&mut self, outcome: Outcome, times: Times) {
        self.outcomes.record(outcome);
        if outcome.is_answered() && !times.is_stream {
            self.latency.record(times.total_ns);
            let limit_ns = self.limit_us.saturating_mul(1000);
            self.over_limit += u64::from(self.limit_us > 0 && times.total_ns > limit_ns);
        }
    }

    /// The row of the window that is closed.
    pub(super) fn take(&mut self) -> Row {
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

    /// The tenant loses its place, and the memory is given back.
    pub(super) fn clear(&mut self) {
        self.is_free = true;
        self.latency = Histogram::new();
    }
}
