//! What Prometheus scrapes, under `coalmine_agent_`.
//!
//! Requests are counted from closed windows, so that a request costs nothing here; the numbers are at
//! most one window old. They are those of the pod: the agent exposes no tenant's name.

use std::sync::{Arc, Mutex, PoisonError, atomic::AtomicU64};

use coalmine_proto::{
    exposition::{classic_buckets, classic_text},
    histogram::Histogram,
    names::Outcome,
    v1,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, TypedMetric, counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::{config::Config, observer::Opaque, pool::Pools, recorder::Sealed, ring::Ring, window::Build};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    agent_version: &'static str,
    service: String,
    version: String,
    arm: &'static str,
}

/// All metrics of the agent. Cloning gives another handle to the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    build: Family<BuildLabels, Gauge>,
    service: String,
    requests: Family<OutcomeLabel, Counter>,
    durations: Durations,
    first_bytes: Durations,
    received_bytes: Counter,
    sent_bytes: Counter,
    malformed: Counter,
    unfollowed: Counter,
    connections: Gauge,
    connections_total: Counter,
    opaque: Family<ReasonLabel, Counter>,
    dial_exhausted: Counter,
    in_flight: Gauge,
    tenants: Gauge,
    tenant_overflow: Counter,
    tenant_replaced: Counter,
    tenant_rejected: Counter,
    refused_rules: Counter,
    windows: Counter,
    ring_bytes: Gauge<u64, AtomicU64>,
    ring_merged: Counter,
    gap_requests: Counter,
    connected: Gauge,
    reconnects: Counter,
    durable_seq: Gauge<u64, AtomicU64>,
    pools: Arc<Pools>,
    scrapes: Counter,
    failed_scrapes: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Times of all answered requests, as a classic histogram.
#[derive(Debug, Clone, Default)]
struct Durations(Arc<Mutex<Histogram>>);

impl Metrics {
    /// Metrics of an agent with this configuration, all at zero.
    pub fn new(config: &Config, pools: Arc<Pools>) -> Self {
        let mut new = Self {
            registry: Arc::default(),
            build: Family::default(),
            service: config.service.clone(),
            requests: Family::default(),
            durations: Durations::default(),
            first_bytes: Durations::default(),
            received_bytes: Counter::default(),
            sent_bytes: Counter::default(),
            malformed: Counter::default(),
            unfollowed: Counter::default(),
            connections: Gauge::default(),
            connections_total: Counter::default(),
            opaque: Family::default(),
            dial_exhausted: Counter::default(),
            in_flight: Gauge::default(),
            tenants: Gauge::default(),
            tenant_overflow: Counter::default(),
            tenant_replaced: Counter::default(),
            tenant_rejected: Counter::default(),
            refused_rules: Counter::default(),
            windows: Counter::default(),
            ring_bytes: Gauge::default(),
            ring_merged: Counter::default(),
            gap_requests: Counter::default(),
            connected: Gauge::default(),
            reconnects: Counter::default(),
            durable_seq: Gauge::default(),
            pools,
            scrapes: Counter::default(),
            failed_scrapes: Counter::default(),
        };
        for outcome in Outcome::ALL {
            drop(new.requests.get_or_create(&OutcomeLabel {
                outcome: outcome.as_str(),
            }));
        }
        new.registry = Arc::new(new.register());
        new.measures(&config.build());
        new
    }

    fn register(&self) -> Registry {
        let mut registry = Registry::with_prefix("coalmine_agent");
        let r = &mut registry;
        r.register(
            "requests",
            "Requests that ended, by outcome",
            self.requests.clone(),
        );
        r.register(
            "request_duration_seconds",
            "From the first byte of the request to the last of the answer",
            self.durations.clone(),
        );
        r.register(
            "time_to_first_byte_seconds",
            "From the first byte of the request to the first of the answer",
            self.first_bytes.clone(),
        );
        r.register(
            "received_bytes",
            "Bytes passed on to the application",
            self.received_bytes.clone(),
        );
        r.register(
            "sent_bytes",
            "Bytes passed on to clients",
            self.sent_bytes.clone(),
        );
        r.register(
            "unfollowed_requests",
            "Requests that could not be followed to their end; they are not counted",
            self.unfollowed.clone(),
        );
        r.register(
            "malformed_requests",
            "Requests of HTTP/2 that break the rules for headers; they are nobody's and not counted",
            self.malformed.clone(),
        );
        r.register(
            "connections",
            "Client connections that are open",
            self.connections.clone(),
        );
        r.register(
            "connections",
            "Client connections that were accepted",
            self.connections_total.clone(),
        );
        r.register(
            "opaque_connections",
            "Connections that could not be followed, by reason; their requests are not counted",
            self.opaque.clone(),
        );
        r.register(
            "dial_exhausted",
            "Connections to the application that failed for want of files, ports or memory in the agent",
            self.dial_exhausted.clone(),
        );
        r.register(
            "in_flight_requests",
            "Requests that have not ended",
            self.in_flight.clone(),
        );
        r.register("tenants", "Tenants that are told apart", self.tenants.clone());
        r.register(
            "tenant_overflow_requests",
            "Requests counted as __overflow__ because of --max-tenants",
            self.tenant_overflow.clone(),
        );
        r.register(
            "tenant_replaced",
            "Tenants that lost their place to busier ones",
            self.tenant_replaced.clone(),
        );
        r.register(
            "tenant_rules_refused",
            "Lists of tenant rules of the aggregator that cannot be read; the ones before stay in force",
            self.refused_rules.clone(),
        );
        r.register(
            "pool_scrapes",
            "Times that the application's pool was asked",
            self.scrapes.clone(),
        );
        r.register(
            "pool_scrapes_failed",
            "Of these, how many brought no metrics",
            self.failed_scrapes.clone(),
        );
        r.register(
            "tenant_rejected",
            "Requests whose tenant had a name that is not allowed",
            self.tenant_rejected.clone(),
        );
        r.register("windows_sealed", "Windows that were closed", self.windows.clone());
        r.register(
            "ring_bytes",
            "Windows that the aggregator does not have on disk",
            self.ring_bytes.clone(),
        );
        r.register(
            "ring_merged_windows",
            "Windows merged because the ring was full",
            self.ring_merged.clone(),
        );
        r.register(
            "gap_requests",
            "Requests in windows that were dropped",
            self.gap_requests.clone(),
        );
        r.register(
            "session_connected",
            "Whether the aggregator is connected",
            self.connected.clone(),
        );
        r.register(
            "session_reconnects",
            "Sessions after the first",
            self.reconnects.clone(),
        );
        r.register(
            "durable_seq",
            "Last batch that the aggregator has on disk",
            self.durable_seq.clone(),
        );
        r.register("build_info", "What runs and what it measures", self.build.clone());
        registry
    }

    /// This is measured from now on.
    pub(crate) fn measures(&self, build: &Build) {
        self.build.clear();
        let labels = BuildLabels {
            agent_version: env!("CARGO_PKG_VERSION"),
            service: self.service.clone(),
            version: build.version.clone(),
            arm: build.arm.as_str(),
        };
        self.build.get_or_create(&labels).set(1);
    }

    /// A window was closed.
    pub fn sealed(&self, sealed: &Sealed) {
        let totals = &sealed.totals;
        for outcome in Outcome::ALL {
            let counter = self.requests.get_or_create(&OutcomeLabel {
                outcome: outcome.as_str(),
            });
            raise(&counter, totals.outcomes.get(outcome));
        }
        for reason in Opaque::ALL {
            let counter = self.opaque.get_or_create(&ReasonLabel {
                reason: reason.as_str(),
            });
            raise(&counter, totals.opaque[reason as usize]);
        }
        self.durations
            .add(sealed.window.rows.iter().map(|row| &row.latency));
        self.first_bytes.add([&sealed.first_byte]);
        self.connections.set(sealed.window.host.connections.into());
        self.in_flight.set(sealed.window.host.in_flight.into());
        raise(&self.connections_total, totals.connections);
        self.tenants
            .set(i64::try_from(sealed.tenants).unwrap_or(i64::MAX));
        raise(&self.tenant_overflow, totals.overflow_requests);
        raise(&self.tenant_replaced, totals.replaced_tenants);
        raise(&self.tenant_rejected, totals.rejected_names);
        raise(&self.refused_rules, totals.refused_rules);
        raise(&self.malformed, totals.malformed);
        raise(&self.unfollowed, totals.unfollowed);
        raise(&self.received_bytes, totals.received_bytes);
        raise(&self.sent_bytes, totals.sent_bytes);
        raise(&self.scrapes, self.pools.scrapes());
        raise(&self.failed_scrapes, self.pools.failed_scrapes());
        raise(&self.dial_exhausted, totals.dial_exhausted);
        raise(&self.windows, totals.windows);
    }

    /// The ring changed.
    pub fn ring(&self, ring: &Ring) {
        self.ring_bytes.set(ring.bytes() as u64);
        raise(&self.ring_merged, ring.stats().merged_windows);
        raise(&self.gap_requests, ring.stats().gap_requests);
        self.durable_seq.set(ring.durable());
    }

    /// A session began or ended.
    pub fn connected(&self, is_connected: bool) {
        self.connected.set(is_connected.into());
    }

    /// A session began, and it is not the first.
    pub fn reconnected(&self) {
        self.reconnects.inc();
    }

    /// The text that is scraped.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(classic_text(&text))
    }
}

/// Raises a counter to a sum that is kept elsewhere.
fn raise(counter: &Counter, sum: u64) {
    counter.inc_by(sum.saturating_sub(counter.get()));
}

// === impl Durations ===

impl Durations {
    fn add<'h>(&self, more: impl IntoIterator<Item = &'h v1::Histogram>) {
        let mut durations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for part in more {
            if let Err(error) = durations.merge_wire(part) {
                tracing::error!(%error, "a window's latencies cannot be read");
            }
        }
    }
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let durations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = classic_buckets(&durations);
        let sum = std::time::Duration::from_nanos(durations.sum_ns()).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, durations.count(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Durations {
    const TYPE: MetricType = MetricType::Histogram;
}
