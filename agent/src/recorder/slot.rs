//! What is counted of one tenant.

use coalmine_proto::{
    histogram::Histogram,
    names::{Outcome, Outcomes, TenantName},
};

use super::Settings;
use crate::{observer::Times, window::Row};

/// Longest name that stands in the slot itself.
const SHORT: usize = 31;

/// The place of one tenant, and what its requests did in the open window. What a request touches when it begins
/// is the first cache line, and what when it ends the next two: with many tenants, each is read from memory.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Slot {
    short: [u8; SHORT],
    /// Length of the name.
    length: u8,
    pub(super) in_flight: u32,
    /// Nobody's: the next tenant may have it.
    pub(super) is_free: bool,
    /// Whether the policy names the tenant.
    pub(super) is_listed: bool,
    pub(super) is_active: bool,
    /// Requests that began since the review before this one.
    begun: u64,
    review: u64,
    /// Number of the window in which its last request ended.
    pub(super) last_window: u64,
    outcomes: Outcomes,
    limit_us: u64,
    over_limit: u64,
    latency: Histogram,
    pub(super) name: TenantName,
}

impl Slot {
    pub(super) fn new(name: TenantName, settings: &Settings, window: u64) -> Self {
        let bytes = name.as_str().as_bytes();
        let mut short = [0; SHORT];
        for (place, byte) in short.iter_mut().zip(bytes) {
            *place = *byte;
        }
        let mut new = Self {
            short,
            // A name has at most 128 bytes.
            length: u8::try_from(bytes.len()).unwrap_or(u8::MAX),
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

    /// Whether it is the place of the tenant with this name.
    pub(super) fn is_of(&self, name: &str) -> bool {
        let length = usize::from(self.length);
        length == name.len()
            && match self.short.get(..length) {
                Some(short) => short == name.as_bytes(),
                None => self.name.as_str() == name,
            }
    }

    /// Takes what the settings say of the tenant.
    pub(super) fn settle(&mut self, settings: &Settings) {
        let listed = settings.by_tenant.get(&self.name).copied();
        self.limit_us = listed.unwrap_or(settings.default_us);
        self.is_listed = listed.is_some();
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
