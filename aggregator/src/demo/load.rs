//! The load generator: open loop, so that a slow answer delays no other request.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Args;
use coalmine_proto::names::{Arm, Outcome, Outcomes};
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::traffic::{Random, Zipf, tenant_name};
use crate::cli::{Exit, Failure};

/// How often requests that are due are sent.
const TICK: Duration = Duration::from_millis(5);

/// Most requests that may be under way.
const MAX_IN_FLIGHT: usize = 10_000;

/// What the load generator takes.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// An instance of the canary; repeat it for several
    #[arg(long, required = true)]
    canary: Vec<SocketAddr>,
    /// An instance of the baseline; repeat it for several
    #[arg(long, required = true)]
    baseline: Vec<SocketAddr>,
    /// Share of the requests that goes to the canary
    #[arg(long, default_value_t = 10)]
    canary_percent: u32,
    /// Requests a second
    #[arg(long)]
    rate: u32,
    /// Number of tenants
    #[arg(long, default_value_t = super::traffic::TENANTS)]
    tenants: usize,
    /// Stop after so many requests; by default at SIGTERM
    #[arg(long)]
    requests: Option<u64>,
    /// Seed of the chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the counts go at the end
    #[arg(long)]
    report: Option<PathBuf>,
}

/// What was sent and how it ended, by arm and tenant.
#[derive(Debug, Default)]
struct Counts {
    by_tenant: BTreeMap<(Arm, usize), Outcomes>,
    /// Requests that ended without an answer.
    unanswered: u64,
}

type Http = Client<HttpConnector, Empty<Bytes>>;

pub(super) async fn run(options: Options) -> Result<Exit, Failure> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let http: Http = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(256)
        .build(connector);
    let counts = Arc::new(Mutex::new(Counts::default()));
    let room = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    tokio::select! {
        () = send(&options, &http, &counts, &room) => {}
        () = crate::server::stop_signal() => {}
    }
    // What is under way is finished and counted.
    let all = u32::try_from(MAX_IN_FLIGHT).unwrap_or(u32::MAX);
    tokio::time::timeout(Duration::from_secs(10), room.acquire_many(all))
        .await
        .ok();
    let report = report(&options, &counts.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(path) = &options.report {
        std::fs::write(path, report.to_string()).map_err(|error| {
            Failure::new(Exit::Unknown, format!("cannot write {}: {error}", path.display()))
        })?;
    }
    Ok(Exit::Good)
}

async fn send(options: &Options, http: &Http, counts: &Arc<Mutex<Counts>>, room: &Arc<Semaphore>) {
    let mut random = Random::new(options.seed);
    let zipf = Zipf::new(options.tenants);
    let begun = Instant::now();
    let mut sent = 0_u64;
    let mut tick = tokio::time::interval(TICK);
    let limit = options.requests.unwrap_or(u64::MAX);
    while sent < limit {
        tick.tick().await;
        let elapsed_us = begun.elapsed().as_micros();
        let due = u64::try_from(elapsed_us * u128::from(options.rate) / 1_000_000).unwrap_or(u64::MAX);
        while sent < due.min(limit) {
            let rank = zipf.pick(&mut random);
            let arm = if random.unit() * 100.0 < f64::from(options.canary_percent) {
                Arm::Canary
            } else {
                Arm::Baseline
            };
            let targets = if arm == Arm::Canary {
                &options.canary
            } else {
                &options.baseline
            };
            let Some(target) = usize::try_from(sent)
                .ok()
                .and_then(|sent| targets.get(sent % targets.len()))
            else {
                return;
            };
            let Ok(permit) = Arc::clone(room).acquire_owned().await else {
                return;
            };
            let request = request(*target, rank);
            let (http, counts) = (http.clone(), Arc::clone(counts));
            tokio::spawn(async move {
                let outcome = match request {
                    Some(request) => exchange(&http, request).await,
                    None => None,
                };
                let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                match outcome {
                    Some(outcome) => counts.by_tenant.entry((arm, rank)).or_default().record(outcome),
                    None => counts.unanswered += 1,
                }
                drop(permit);
            });
            sent += 1;
        }
    }
}

fn request(target: SocketAddr, rank: usize) -> Option<Request<Empty<Bytes>>> {
    Request::builder()
        .uri(format!("http://{target}/api/items"))
        .header("x-tenant-id", tenant_name(rank))
        .header("user-agent", "coalmine-demo")
        .body(Empty::new())
        .ok()
}

/// Sends a request and reads the answer to its end.
async fn exchange(http: &Http, request: Request<Empty<Bytes>>) -> Option<Outcome> {
    let response = http.request(request).await.ok()?;
    let status = response.status().as_u16();
    response.into_body().collect().await.ok()?;
    Some(Outcome::of_http_status(status))
}

fn report(options: &Options, counts: &Counts) -> Value {
    let rows = counts.by_tenant.iter().map(|((arm, rank), outcomes)| {
        let by_outcome: serde_json::Map<_, _> = Outcome::ALL
            .into_iter()
            .map(|outcome| (outcome.as_str().to_owned(), json!(outcomes.get(outcome))))
            .collect();
        json!({ "arm": arm.as_str(), "tenant": tenant_name(*rank), "outcomes": by_outcome })
    });
    let rows: Vec<_> = rows.collect();
    let answered: u64 = counts.by_tenant.values().map(Outcomes::seen).sum();
    json!({ "rate": options.rate, "answered": answered, "unanswered": counts.unanswered, "counts": rows })
}
