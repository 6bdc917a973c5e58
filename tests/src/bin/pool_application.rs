//! An application with a real connection pool before a real PostgreSQL: what the tests of connection pools look at.
//!
//! A request works for a while without the database and then asks it once. `/metrics` has what the pool counts, under the
//! names that the agent knows for bb8, and how many requests failed for a reason that has nothing to do with the pool.

use std::{
    net::SocketAddr,
    num::NonZeroU64,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use bb8::Pool;
use bb8_postgres::PostgresConnectionManager;
use clap::Parser;
use tokio::net::TcpListener;
use tokio_postgres::NoTls;

type Connections = Pool<PostgresConnectionManager<NoTls>>;

/// The shortest and the longest work without the database, in milliseconds. It is most of a request's latency, so that
/// a short wait for a connection is not seen there; and it differs, so that requests which come one by one meet at the pool.
const WORK_MS: (u64, u64) = (20, 60);

/// What the database is asked: for as long as it takes, the connection is in use.
const QUERY: &str = "SELECT pg_sleep(0.008)";

/// Requests that have come.
static COME: AtomicU64 = AtomicU64::new(0);

/// Of these, how many failed by `--fail-every`.
static FAILED: AtomicU64 = AtomicU64::new(0);

/// The command line.
#[derive(Debug, Parser)]
struct Options {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
    /// How the database is reached
    #[arg(long, value_name = "URL")]
    postgres: String,
    /// Connections of the pool; all of them are open all the time
    #[arg(long)]
    connections: u32,
    /// How long a request waits for a connection before it fails; as long as bb8 has it, if not given
    #[arg(long, value_name = "N")]
    timeout_ms: Option<NonZeroU64>,
    /// One request in so many fails without asking for a connection; none, if not given
    #[arg(long, value_name = "N")]
    fail_every: Option<NonZeroU64>,
}

/// What requests are answered with.
#[derive(Clone)]
struct Application {
    pool: Connections,
    fail_every: Option<NonZeroU64>,
}

async fn answer(State(application): State<Application>) -> (StatusCode, String) {
    let (shortest, longest) = WORK_MS;
    let number = COME.fetch_add(1, Ordering::Relaxed);
    let work_ms = shortest + number * 17 % (longest - shortest + 1);
    tokio::time::sleep(Duration::from_millis(work_ms)).await;
    let Application { pool, fail_every } = application;
    if fail_every.is_some_and(|every| number.is_multiple_of(every.get())) {
        FAILED.fetch_add(1, Ordering::Relaxed);
        return (StatusCode::INTERNAL_SERVER_ERROR, "one in so many\n".to_owned());
    }
    match ask(&pool).await {
        Ok(()) => (StatusCode::OK, "fine\n".to_owned()),
        Err(problem) => (StatusCode::INTERNAL_SERVER_ERROR, problem),
    }
}

async fn ask(pool: &Connections) -> Result<(), String> {
    let connection = pool.get().await.map_err(|error| error.to_string())?;
    let asked = connection.batch_execute(QUERY).await;
    asked.map_err(|error| error.to_string())
}

async fn metrics(State(application): State<Application>) -> impl IntoResponse {
    let pool = application.pool;
    let state = pool.state();
    let counted = &state.statistics;
    // The counters are not read at one instant.
    let pending = counted
        .get_started
        .saturating_sub(counted.get_direct)
        .saturating_sub(counted.get_waited)
        .saturating_sub(counted.get_timed_out);
    let mut text = String::new();
    for (name, kind, value) in [
        ("bb8_connections", "gauge", u64::from(state.connections)),
        ("bb8_idle_connections", "gauge", u64::from(state.idle_connections)),
        ("bb8_max_size", "gauge", u64::from(pool.config().max_size)),
        ("bb8_pending_gets", "gauge", pending),
        ("bb8_get_started_total", "counter", counted.get_started),
        ("bb8_get_direct_total", "counter", counted.get_direct),
        ("bb8_get_waited_total", "counter", counted.get_waited),
        ("bb8_get_timed_out_total", "counter", counted.get_timed_out),
        (
            "application_failures_total",
            "counter",
            FAILED.load(Ordering::Relaxed),
        ),
    ] {
        text.push_str(&format!("# TYPE {name} {kind}\n{name} {value}\n"));
    }
    text.push_str(&format!(
        "# TYPE bb8_get_wait_time_seconds_total counter\nbb8_get_wait_time_seconds_total {}\n",
        counted.get_wait_time.as_secs_f64()
    ));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let manager = PostgresConnectionManager::new_from_stringlike(&options.postgres, NoTls)
        .with_context(|| format!("--postgres {} is not understood", options.postgres))?;
    let mut pool = Pool::builder()
        .max_size(options.connections)
        .min_idle(options.connections);
    if let Some(timeout_ms) = options.timeout_ms {
        pool = pool.connection_timeout(Duration::from_millis(timeout_ms.get()));
    }
    let pool = pool.build(manager).await.context("the pool cannot be filled")?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .fallback(answer)
        .with_state(Application {
            pool,
            fail_every: options.fail_every,
        });
    let listener = TcpListener::bind(options.listen).await?;
    axum::serve(listener, router).await?;
    Ok(())
}
