//! What Prometheus scrapes. Names follow its conventions: base units, `_total` on counters only.
//!
//! Series are bounded: none has a tenant as a label but the ten worst tenants of each open rollout.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use coalmine_judge::v1::{Outcome, State, Verdict};
use coalmine_proto::{
    exposition::{classic_buckets, classic_text},
    names::{Arm, Outcome as RequestOutcome},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::{
    book::{Book, Pools, SILENT_MS, locked},
    clock,
    inject::certificate::Certificate,
    ledger,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceVerdict {
    service: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RolloutLabel {
    service: String,
    rollout: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RolloutVerdict {
    service: String,
    rollout: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RolloutState {
    service: String,
    rollout: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RolloutKind {
    service: String,
    rollout: String,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Worst {
    service: String,
    rollout: String,
    rank: u32,
    tenant: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LogState {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Became {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Made {
    what: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Actuated {
    target: &'static str,
    act: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Version {
    version: &'static str,
}

/// The metrics of the process.
pub struct Metrics {
    registry: Mutex<Registry>,
    decisions: Family<ServiceVerdict, Counter>,
    /// How long a decision takes, from frozen evidence to a durable record.
    pub decision_seconds: Histogram,
    score: Family<RolloutLabel, Gauge<f64, std::sync::atomic::AtomicU64>>,
    verdict: Family<RolloutVerdict, Gauge>,
    tenants: Family<RolloutState, Gauge>,
    coverage: Family<RolloutKind, Gauge<f64, std::sync::atomic::AtomicU64>>,
    worst: Family<Worst, Gauge<f64, std::sync::atomic::AtomicU64>>,
    rejected: Family<Reason, Counter>,
    refused: Family<Reason, Counter>,
    closed: Family<Reason, Counter>,
    records: Family<Kind, Counter>,
    /// How long a commit of the decision log takes.
    pub audit_append_seconds: Histogram,
    audit_writable: Gauge,
    audit_log: Family<LogState, Gauge>,
    audit_free: Gauge,
    admissions: Family<Became, Counter>,
    admission_seconds: Histogram,
    webhook_certificates: Family<Became, Counter>,
    certificate_renewals: Family<Made, Counter>,
    actuations: Family<Actuated, Counter>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn ratio(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}

/// 0.5 ms to 16 s.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("coalmine")),
            decisions: Family::default(),
            decision_seconds: durations(),
            score: Family::default(),
            verdict: Family::default(),
            tenants: Family::default(),
            coverage: Family::default(),
            worst: Family::default(),
            rejected: Family::default(),
            refused: Family::default(),
            closed: Family::default(),
            records: Family::default(),
            audit_append_seconds: durations(),
            audit_writable: Gauge::default(),
            audit_log: Family::default(),
            audit_free: Gauge::default(),
            admissions: Family::default(),
            admission_seconds: durations(),
            certificate_renewals: Family::default(),
            actuations: Family::default(),
            webhook_certificates: Family::default(),
        };
        let info: Family<Version, Gauge> = Family::default();
        info.get_or_create(&Version {
            version: env!("CARGO_PKG_VERSION"),
        })
        .set(1);
        if let Ok(mut registry) = metrics.registry.lock() {
            registry.register("build_info", "The program's version", info);
            registry.register("decisions", "Decisions recorded", metrics.decisions.clone());
            registry.register(
                "decision_duration_seconds",
                "Time from frozen evidence to a durable record",
                metrics.decision_seconds.clone(),
            );
            registry.register(
                "rollout_health_score_ratio",
                "Health score of a rollout; below the policy's threshold some unit is in breach",
                metrics.score.clone(),
            );
            registry.register(
                "rollout_verdict",
                "1 for the rollout's verdict, else 0",
                metrics.verdict.clone(),
            );
            registry.register(
                "rollout_tenants",
                "Tenants of a rollout by state",
                metrics.tenants.clone(),
            );
            registry.register(
                "rollout_coverage_ratio",
                "Share of the expected agents that reported, and of the canary's requests in judged tenants",
                metrics.coverage.clone(),
            );
            registry.register(
                "worst_tenant_health_score_ratio",
                "Health scores of the ten worst tenants of a rollout",
                metrics.worst.clone(),
            );
            registry.register(
                "ingest_rejected",
                "Sessions and batches refused",
                metrics.rejected.clone(),
            );
            registry.register(
                "requests_refused",
                "Requests that came to no route or were not allowed, by reason",
                metrics.refused.clone(),
            );
            registry.register(
                "connections_closed",
                "Connections that were closed: full, all places were taken; caller, all of an address; silent, no head came in time",
                metrics.closed.clone(),
            );
            registry.register(
                "audit_records",
                "Records appended to the decision log",
                metrics.records.clone(),
            );
            registry.register(
                "audit_append_duration_seconds",
                "Time of a commit of the decision log, syncs included",
                metrics.audit_append_seconds.clone(),
            );
            registry.register(
                "audit_writable",
                "Whether the last commit of the decision log succeeded",
                metrics.audit_writable.clone(),
            );
            registry.register(
                "audit_log_state",
                "1 for the state that the decision log is in; only in `ok` it takes records",
                metrics.audit_log.clone(),
            );
            registry.register(
                "audit_disk_free_bytes",
                "Free space where the decision log is",
                metrics.audit_free.clone(),
            );
            registry.register(
                "admissions",
                "Reviews of new pods that were answered, by what became of the pod",
                metrics.admissions.clone(),
            );
            registry.register(
                "admission_duration_seconds",
                "Time from the head of a review to its answer",
                metrics.admission_seconds.clone(),
            );
            registry.register(
                "webhook_certificates",
                "Certificates that the webhook was given, by what became of them",
                metrics.webhook_certificates.clone(),
            );
            registry.register(
                "webhook_certificate_renewals",
                "Certificates and authorities that were made for the webhook",
                metrics.certificate_renewals.clone(),
            );
            registry.register(
                "actuations",
                "Tries to act on a verdict outside, by result",
                metrics.actuations.clone(),
            );
        }
        metrics
    }

    /// Adds what is read off the book at each scrape.
    pub fn watch(&self, book: Arc<Mutex<Book>>) {
        if let Ok(mut registry) = self.registry.lock() {
            registry.register_collector(Box::new(BookCollector(book)));
        }
    }

    /// Adds when the webhook's certificate expires, once there is one.
    pub(crate) fn watch_certificate(&self, certificate: Arc<Certificate>) {
        if let Ok(mut registry) = self.registry.lock() {
            registry.register_collector(Box::new(CertificateCollector(certificate)));
        }
    }

    /// Counts a review that was answered: `patched`, `unchanged`, the name of a refusal, or `bad`.
    pub(crate) fn admission(&self, result: &'static str, took: Duration) {
        self.admissions.get_or_create(&Became { result }).inc();
        self.admission_seconds.observe(took.as_secs_f64());
    }

    /// Counts a certificate that the webhook was given: `taken` or `refused`.
    pub(crate) fn webhook_certificate(&self, result: &'static str) {
        self.webhook_certificates.get_or_create(&Became { result }).inc();
    }

    /// Counts a certificate or an authority that was made for the webhook.
    pub(crate) fn certificate_renewed(&self, what: &'static str) {
        self.certificate_renewals.get_or_create(&Made { what }).inc();
    }

    /// Counts a try to act on a verdict.
    pub(crate) fn actuated(&self, target: &'static str, act: &'static str, result: &'static str) {
        let labels = Actuated { target, act, result };
        self.actuations.get_or_create(&labels).inc();
    }

    /// Shows whether the decision log takes records.
    pub fn audit_state(&self, state: ledger::State) {
        self.audit_writable.set(i64::from(state == ledger::State::Ok));
        for other in ledger::State::ALL {
            let labels = LogState {
                state: other.as_str(),
            };
            self.audit_log
                .get_or_create(&labels)
                .set(i64::from(other == state));
        }
    }

    /// Shows how much space is left for the decision log.
    pub fn audit_disk_free(&self, bytes: u64) {
        self.audit_free.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Counts a request that came to no route, or was not allowed.
    pub(crate) fn request_refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a connection of a tool that was closed.
    pub(crate) fn connection_closed(&self, reason: &'static str) {
        self.closed.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a refused session or batch.
    pub fn reject(&self, reason: &'static str) {
        self.rejected.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a record of the decision log.
    pub fn audit_record(&self, kind: &'static str) {
        self.records.get_or_create(&Kind { r#type: kind }).inc();
    }

    /// Shows a decision as it is published: an approval that is held back is a HOLD here too.
    pub fn decided(
        &self,
        service: &str,
        rollout: &str,
        shown: &str,
        outcome: &Outcome,
        before: Option<&Outcome>,
    ) {
        let shown = Verdict::ALL.into_iter().find(|verdict| verdict.as_str() == shown);
        let shown = shown.unwrap_or(Verdict::Hold);
        let label = || RolloutLabel {
            service: service.to_owned(),
            rollout: rollout.to_owned(),
        };
        self.decisions
            .get_or_create(&ServiceVerdict {
                service: service.to_owned(),
                verdict: shown.as_str(),
            })
            .inc();
        self.score.get_or_create(&label()).set(ratio(outcome.score_ppm));
        self.shown(service, rollout, shown);
        for state in TENANT_STATES {
            self.tenants
                .get_or_create(&RolloutState {
                    service: service.to_owned(),
                    rollout: rollout.to_owned(),
                    state: state.as_str(),
                })
                .set(i64::try_from(outcome.tenants.get(state)).unwrap_or(i64::MAX));
        }
        for (kind, ppm) in [("agents", outcome.agents_ppm), ("traffic", outcome.traffic_ppm)] {
            self.coverage
                .get_or_create(&RolloutKind {
                    service: service.to_owned(),
                    rollout: rollout.to_owned(),
                    kind,
                })
                .set(ratio(ppm));
        }
        for worst in before
            .into_iter()
            .flat_map(|before| worst_labels(service, rollout, before))
        {
            self.worst.remove(&worst.0);
        }
        for (label, score) in worst_labels(service, rollout, outcome) {
            self.worst.get_or_create(&label).set(score);
        }
    }

    /// Shows the verdict that is published of a rollout.
    pub fn shown(&self, service: &str, rollout: &str, shown: Verdict) {
        for verdict in Verdict::ALL {
            self.verdict
                .get_or_create(&RolloutVerdict {
                    service: service.to_owned(),
                    rollout: rollout.to_owned(),
                    verdict: verdict.as_str(),
                })
                .set(i64::from(verdict == shown));
        }
    }

    /// Takes the series of a rollout away.
    pub fn ended(&self, service: &str, rollout: &str, last: Option<&Outcome>) {
        let (service, rollout) = (service.to_owned(), rollout.to_owned());
        self.score.remove(&RolloutLabel {
            service: service.clone(),
            rollout: rollout.clone(),
        });
        for verdict in Verdict::ALL {
            let verdict = verdict.as_str();
            self.verdict.remove(&RolloutVerdict {
                service: service.clone(),
                rollout: rollout.clone(),
                verdict,
            });
        }
        for state in TENANT_STATES {
            let state = state.as_str();
            self.tenants.remove(&RolloutState {
                service: service.clone(),
                rollout: rollout.clone(),
                state,
            });
        }
        for kind in ["agents", "traffic"] {
            self.coverage.remove(&RolloutKind {
                service: service.clone(),
                rollout: rollout.clone(),
                kind,
            });
        }
        for (label, _) in last
            .into_iter()
            .flat_map(|last| worst_labels(&service, &rollout, last))
        {
            self.worst.remove(&label);
        }
    }

    /// The exposition, in Prometheus' text format.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        let registry = self.registry.lock().map_err(|_| fmt::Error)?;
        encode(&mut text, &registry)?;
        Ok(classic_text(&text))
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The states that a tenant can be in.
const TENANT_STATES: [State; 6] = [
    State::Clear,
    State::Proven,
    State::Suspect,
    State::Breach,
    State::Shared,
    State::Error,
];

fn worst_labels<'a>(
    service: &'a str,
    rollout: &'a str,
    outcome: &'a Outcome,
) -> impl Iterator<Item = (Worst, f64)> + 'a {
    outcome
        .worst_tenants
        .iter()
        .zip(1..)
        .map(move |((tenant, score), rank)| {
            let label = Worst {
                service: service.to_owned(),
                rollout: rollout.to_owned(),
                rank,
                tenant: tenant.as_str().to_owned(),
            };
            (label, ratio(*score))
        })
}

/// Reads the book when Prometheus asks.
#[derive(Debug)]
struct BookCollector(Arc<Mutex<Book>>);

/// Reads the webhook's certificate when Prometheus asks.
#[derive(Debug)]
struct CertificateCollector(Arc<Certificate>);

impl Collector for CertificateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(expires) = self.0.expires() else {
            return Ok(());
        };
        let gauge = ConstGauge::<i64>::new(i64::try_from(expires).unwrap_or(i64::MAX));
        gauge.encode(encoder.encode_descriptor(
            "webhook_certificate_expires_seconds",
            "When the webhook's certificate expires, seconds since the Unix epoch",
            None,
            MetricType::Gauge,
        )?)
    }
}

type Labels<'a> = Vec<(&'a str, &'a str)>;

impl Collector for BookCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let book = locked(&self.0);
        let now_ms = clock::now_ms();
        let mut requests = Vec::new();
        let mut gaps = Vec::new();
        let mut lates = Vec::new();
        let mut agents = Vec::new();
        let mut windows = Vec::new();
        let mut tenant_windows = Vec::new();
        let mut duplicates = Vec::new();
        for (name, service) in book.services() {
            let received = service.received();
            windows.push((vec![("service", name)], received.0));
            tenant_windows.push((vec![("service", name)], received.1));
            duplicates.push((vec![("service", name)], received.2));
            for arm in Arm::ALL {
                let labels = vec![("service", name), ("arm", arm.as_str())];
                let (outcomes, gap, late) = service.arm_totals(arm);
                gaps.push((labels.clone(), gap));
                lates.push((labels.clone(), late));
                for outcome in RequestOutcome::ALL {
                    let mut labels = labels.clone();
                    labels.push(("outcome", outcome.as_str()));
                    requests.push((labels, outcomes.get(outcome)));
                }
                let mut counts = [0_u64; 2];
                for (_, agent) in service
                    .agents()
                    .filter(|(_, agent)| agent.build.arm == arm && !agent.gone)
                {
                    counts[usize::from(!agent.is_alive(now_ms, SILENT_MS))] += 1;
                }
                for (state, count) in ["connected", "silent"].into_iter().zip(counts) {
                    let mut labels = labels.clone();
                    labels.push(("state", state));
                    agents.push((labels, count));
                }
            }
        }
        counter(
            &mut encoder,
            "requests",
            "Requests counted by agents, by outcome",
            &requests,
        )?;
        counter(
            &mut encoder,
            "gap_requests",
            "Requests in windows that agents dropped and declared",
            &gaps,
        )?;
        counter(
            &mut encoder,
            "late_requests",
            "Requests that came after their window was judged, or in a window whose agent had a wrong clock",
            &lates,
        )?;
        counter(
            &mut encoder,
            "windows_received",
            "Windows received from agents",
            &windows,
        )?;
        counter(
            &mut encoder,
            "tenant_windows_received",
            "Rows of windows received from agents",
            &tenant_windows,
        )?;
        counter(
            &mut encoder,
            "window_duplicates",
            "Windows received again after a reconnection",
            &duplicates,
        )?;
        encode_pools(&mut encoder, &book, now_ms)?;
        let mut family = encoder.encode_descriptor("agents", "Agents, by state", None, MetricType::Gauge)?;
        for (labels, count) in agents {
            encode_gauge(&mut family, &labels, count)?;
        }
        let mut family = encoder.encode_descriptor(
            "request_duration_seconds",
            "Latency from the first byte of a request to the last byte of its response",
            None,
            MetricType::Histogram,
        )?;
        for (name, service) in book.services() {
            for arm in Arm::ALL {
                let histogram = service.latency(arm);
                let sum = std::time::Duration::from_nanos(histogram.sum_ns()).as_secs_f64();
                let labels: Labels<'_> = vec![("service", name), ("arm", arm.as_str())];
                family
                    .encode_family(&labels)?
                    .encode_histogram::<[(&str, &str); 0]>(
                        sum,
                        histogram.count(),
                        &classic_buckets(&histogram),
                        None,
                    )?;
            }
        }
        Ok(())
    }
}

/// The connection pools of the applications: one series for each arm of a service, zeros where there are none.
fn encode_pools(encoder: &mut DescriptorEncoder<'_>, book: &Book, now_ms: u64) -> Result<(), fmt::Error> {
    let pools: Vec<(Labels<'_>, Pools)> = book
        .services()
        .flat_map(|(name, service)| {
            Arm::ALL.map(|arm| {
                let context = service.context(|build| build.arm == arm, now_ms);
                let labels = vec![("service", name), ("arm", arm.as_str())];
                (labels, context.pool.unwrap_or_default())
            })
        })
        .collect();
    let of = |value: fn(&Pools) -> u64| {
        let values = pools.iter().map(|(labels, pools)| (labels.clone(), value(pools)));
        values.collect::<Vec<_>>()
    };
    counter(
        encoder,
        "pool_acquires",
        "Connections that applications asked their pools for",
        &of(|pools| pools.acquires),
    )?;
    counter(
        encoder,
        "pool_waits",
        "Connections that applications had to wait for",
        &of(|pools| pools.waits),
    )?;
    counter(
        encoder,
        "pool_timeouts",
        "Connections that applications waited for in vain",
        &of(|pools| pools.timeouts),
    )?;
    for (name, help, values) in [
        (
            "pool_used_connections",
            "Connections of the applications' pools that are in use",
            of(|pools| pools.used),
        ),
        (
            "pool_max_connections",
            "Most connections that the applications' pools may open; 0 where that is not known",
            of(|pools| pools.max),
        ),
    ] {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            encode_gauge(&mut family, &labels, value)?;
        }
    }
    Ok(())
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: &[(Labels<'_>, u64)],
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::<u64>::new(*value).encode(family.encode_family(labels)?)?;
    }
    Ok(())
}

fn encode_gauge(
    family: &mut prometheus_client::encoding::MetricEncoder<'_>,
    labels: &Labels<'_>,
    value: u64,
) -> Result<(), fmt::Error> {
    let gauge = ConstGauge::<i64>::new(i64::try_from(value).unwrap_or(i64::MAX));
    gauge.encode(family.encode_family(labels)?)
}
