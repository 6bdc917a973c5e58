//! The metrics that are known: data.
//!
//! A counter stands here without its `_total`; both spellings are read. Whoever gave up also waited: where a
//! library counts the two apart, its count of the former has both roles. What the numbers are:
//!
//! | source | acquires | waits | timeouts | time waited |
//! |---|---|---|---|---|
//! | HikariCP | timed calls, with those that gave up | above 10 ms (a), or (b) | exact | of all calls |
//! | Spring Boot | - | - | - | - |
//! | Go database/sql | - | exact | - (c) | of waits |
//! | pgxpool | exact | those that found none idle | cancelled (d) | of waits, else of all |
//! | OpenTelemetry | timed calls | above 10 ms (a), or (b) | exact | of all calls |
//! | SQLAlchemy, sqlx | - | - | - | - |
//! | node-postgres, deadpool | - | (b) | - | - |
//! | bb8 | exact | exact | exact | of waits |
//! | PgBouncer | assignments of a server, else transactions | (b) | - | of waits |
//!
//! (a) If the time is a histogram: an acquire above 10 ms has waited, for a free connection or for a new one.
//! From a pool with an idle one it takes microseconds, or a round trip to the database if it is tested first,
//! as HikariCP does with one idle for 500 ms (`com.zaxxer.hikari.aliveBypassWindowMs`). The first limit from
//! 10 ms on decides; those of HikariCP's own histogram end at 1 ms, and say nothing. Spring Boot exposes
//! Micrometer's histogram of HikariCP with
//! `management.metrics.distribution.percentiles-histogram.hikaricp.connections.acquire=true`.
//! (b) A lower bound: the largest of the timeouts, the slow acquires, and the rise of the waiters from one
//! scrape to the next. (c) They are among the waits. (d) By a deadline, or by a client that went away.

use super::mapping::{
    Quantity,
    Role::{self, AcquireBucket, Count, Time},
    Source,
    Unit::{Millis, Nanos, Seconds},
};

/// The metrics of one source.
pub(super) struct Known {
    pub(super) source: Source,
    /// Labels that name the pool; the first that is there.
    pub(super) pool: &'static [&'static str],
    /// Labels that say the state of the connections that are counted.
    pub(super) state: &'static [&'static str],
    /// A pool that is not one of the application's.
    pub(super) except: Option<&'static str>,
    /// Name, state (if several are counted under one name), what it says.
    pub(super) metrics: &'static [(&'static str, &'static str, &'static [Role])],
}

/// Labels that name the pool where no library says which.
pub(super) const ANY_POOL: &[&str] = &[
    "pool",
    "pool_name",
    "db_client_connection_pool_name",
    "db_name",
    "database",
    "db",
    "name",
];

const USED: &[Role] = &[Count(Quantity::Used)];
const IDLE: &[Role] = &[Count(Quantity::Idle)];
const OPEN: &[Role] = &[Count(Quantity::Open)];
const MAX: &[Role] = &[Count(Quantity::Max)];
const WAITERS: &[Role] = &[Count(Quantity::Waiters)];
const ACQUIRES: &[Role] = &[Count(Quantity::Acquires)];
const TRANSACTIONS: &[Role] = &[Count(Quantity::Transactions)];
const WAITS: &[Role] = &[Count(Quantity::Waits)];
const TIMEOUTS: &[Role] = &[Count(Quantity::Timeouts)];
/// Counted apart from those that waited with success.
const TIMEOUTS_APART: &[Role] = &[Count(Quantity::Waits), Count(Quantity::Timeouts)];
/// Counted apart from those that waited, and from the acquires.
const TIMEOUTS_BESIDE: &[Role] = &[
    Count(Quantity::Acquires),
    Count(Quantity::Waits),
    Count(Quantity::Timeouts),
];
const WAIT_NANOS: &[Role] = &[Time(Quantity::WaitNs, Nanos)];
const WAIT_SECONDS: &[Role] = &[Time(Quantity::WaitNs, Seconds)];
const ACQUIRE_NANOS: &[Role] = &[Time(Quantity::AcquireNs, Nanos)];
const ACQUIRE_MILLIS: &[Role] = &[Time(Quantity::AcquireNs, Millis)];
const ACQUIRE_SECONDS: &[Role] = &[Time(Quantity::AcquireNs, Seconds)];
const BUCKET_NANOS: &[Role] = &[AcquireBucket(Nanos)];
const BUCKET_MILLIS: &[Role] = &[AcquireBucket(Millis)];
const BUCKET_SECONDS: &[Role] = &[AcquireBucket(Seconds)];

pub(super) const SOURCES: &[Known] = &[
    // HikariCP: metrics/micrometer/MicrometerMetricsTracker.java. Its gauges are up to 1 s old, its counters
    // are not: metrics/PoolStats.java.
    Known {
        source: Source::Hikari,
        pool: &["pool"],
        state: &[],
        except: None,
        metrics: &[
            ("hikaricp_connections_active", "", USED),
            ("hikaricp_connections_idle", "", IDLE),
            ("hikaricp_connections", "", OPEN),
            ("hikaricp_connections_max", "", MAX),
            ("hikaricp_connections_pending", "", WAITERS),
            ("hikaricp_connections_acquire_seconds_count", "", ACQUIRES),
            ("hikaricp_connections_acquire_seconds_sum", "", ACQUIRE_SECONDS),
            ("hikaricp_connections_acquire_seconds_bucket", "", BUCKET_SECONDS),
            ("hikaricp_connections_timeout", "", TIMEOUTS),
            // HikariCP without Micrometer: metrics/prometheus/{HikariCPCollector,PrometheusMetricsTracker,
            // PrometheusHistogramMetricsTracker}.java.
            ("hikaricp_active_connections", "", USED),
            ("hikaricp_idle_connections", "", IDLE),
            ("hikaricp_max_connections", "", MAX),
            ("hikaricp_pending_threads", "", WAITERS),
            ("hikaricp_connection_acquired_nanos_count", "", ACQUIRES),
            ("hikaricp_connection_acquired_nanos_sum", "", ACQUIRE_NANOS),
            ("hikaricp_connection_acquired_nanos_bucket", "", BUCKET_NANOS),
            ("hikaricp_connection_timeout", "", TIMEOUTS),
        ],
    },
    // Spring Boot: actuate/metrics/jdbc/DataSourcePoolMetrics.java. It shows HikariCP's pools again, under
    // the names of their beans, and of a pool that opens later only its limits: where HikariCP speaks for
    // itself, these are left out.
    Known {
        source: Source::Spring,
        pool: &["name"],
        state: &[],
        except: None,
        metrics: &[
            ("jdbc_connections_active", "", USED),
            ("jdbc_connections_idle", "", IDLE),
            ("jdbc_connections_max", "", MAX),
        ],
    },
    // client_golang: prometheus/collectors/dbstats_collector.go.
    Known {
        source: Source::GoSql,
        pool: &["db_name"],
        state: &[],
        except: None,
        metrics: &[
            ("go_sql_in_use_connections", "", USED),
            ("go_sql_idle_connections", "", IDLE),
            ("go_sql_open_connections", "", OPEN),
            ("go_sql_max_open_connections", "", MAX),
            ("go_sql_wait_count", "", WAITS),
            ("go_sql_wait_duration_seconds", "", WAIT_SECONDS),
        ],
    },
    // IBM/pgxpoolprometheus: collector.go.
    Known {
        source: Source::Pgxpool,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("pgxpool_acquired_conns", "", USED),
            ("pgxpool_idle_conns", "", IDLE),
            ("pgxpool_total_conns", "", OPEN),
            ("pgxpool_max_conns", "", MAX),
            ("pgxpool_acquire_count", "", ACQUIRES),
            ("pgxpool_acquire_duration_ns", "", ACQUIRE_NANOS),
            ("pgxpool_acquire_duration_seconds", "", ACQUIRE_SECONDS),
            ("pgxpool_empty_acquire", "", WAITS),
            ("pgxpool_empty_acquire_count", "", WAITS),
            ("pgxpool_empty_acquire_wait_time_ns", "", WAIT_NANOS),
            ("pgxpool_empty_acquire_wait_time_seconds", "", WAIT_SECONDS),
            ("pgxpool_canceled_acquire_count", "", TIMEOUTS_BESIDE),
            // exaring/otelpgx: meter.go; the exporter adds the unit's name. All is up to 1 s old.
            ("pgxpool_acquired_connections", "", USED),
            ("pgxpool_idle_connections", "", IDLE),
            ("pgxpool_total_connections", "", OPEN),
            ("pgxpool_max_connections", "", MAX),
            ("pgxpool_acquires", "", ACQUIRES),
            ("pgxpool_acquire_duration_nanoseconds", "", ACQUIRE_NANOS),
            ("pgxpool_empty_acquire_wait_time_nanoseconds", "", WAIT_NANOS),
            ("pgxpool_canceled_acquires", "", TIMEOUTS_BESIDE),
        ],
    },
    // OpenTelemetry, semantic conventions since 1.27: docs/database/database-metrics.md. node-postgres has
    // these by @opentelemetry/instrumentation-pg, as they were at the pool's last event; if that gave a
    // connection back, it still counts as used. Some exporters leave the unit out, JavaScript's among them.
    Known {
        source: Source::OtelConnection,
        pool: &["db_client_connection_pool_name", "pool_name"],
        state: &["db_client_connection_state", "state"],
        except: None,
        metrics: &[
            ("db_client_connection_count", "used", USED),
            ("db_client_connection_count", "idle", IDLE),
            ("db_client_connection_max", "", MAX),
            ("db_client_connection_pending_requests", "", WAITERS),
            ("db_client_connection_timeouts", "", TIMEOUTS),
            ("db_client_connection_wait_time_seconds_count", "", ACQUIRES),
            ("db_client_connection_wait_time_seconds_sum", "", ACQUIRE_SECONDS),
            (
                "db_client_connection_wait_time_seconds_bucket",
                "",
                BUCKET_SECONDS,
            ),
            ("db_client_connection_wait_time_count", "", ACQUIRES),
            ("db_client_connection_wait_time_sum", "", ACQUIRE_SECONDS),
            ("db_client_connection_wait_time_bucket", "", BUCKET_SECONDS),
        ],
    },
    // OpenTelemetry, semantic conventions before: as the instrumentations of Java, Npgsql and SQLAlchemy
    // write them. The latter's unit is a word, which Python's exporter adds to the name.
    Known {
        source: Source::OtelConnections,
        pool: &["pool_name", "db_client_connections_pool_name"],
        state: &["state", "db_client_connections_state"],
        except: None,
        metrics: &[
            ("db_client_connections_usage", "used", USED),
            ("db_client_connections_usage", "idle", IDLE),
            ("db_client_connections_usage_connections", "used", USED),
            ("db_client_connections_usage_connections", "idle", IDLE),
            ("db_client_connections_count", "used", USED),
            ("db_client_connections_count", "idle", IDLE),
            ("db_client_connections_max", "", MAX),
            ("db_client_connections_pending_requests", "", WAITERS),
            ("db_client_connections_timeouts", "", TIMEOUTS),
            ("db_client_connections_wait_time_milliseconds_count", "", ACQUIRES),
            (
                "db_client_connections_wait_time_milliseconds_sum",
                "",
                ACQUIRE_MILLIS,
            ),
            (
                "db_client_connections_wait_time_milliseconds_bucket",
                "",
                BUCKET_MILLIS,
            ),
            ("db_client_connections_wait_time_count", "", ACQUIRES),
            ("db_client_connections_wait_time_sum", "", ACQUIRE_MILLIS),
            ("db_client_connections_wait_time_bucket", "", BUCKET_MILLIS),
        ],
    },
    // SQLAlchemy has no exporter: the methods of QueuePool, under the names in use. `size` is the pool's
    // size without its overflow, so that more may be in use, and no maximum is known.
    Known {
        source: Source::SqlAlchemy,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("sqlalchemy_pool_checkedout", "", USED),
            ("sqlalchemy_pool_checked_out", "", USED),
            ("sqlalchemy_pool_checkedin", "", IDLE),
            ("sqlalchemy_pool_checked_in", "", IDLE),
        ],
    },
    // node-postgres has no exporter: the properties of Pool (node-postgres.com/apis/pool), by names in use.
    Known {
        source: Source::NodePostgres,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("pg_pool_total_count", "", OPEN),
            ("pg_pool_total_connections", "", OPEN),
            ("pg_pool_total", "", OPEN),
            ("pg_pool_idle_count", "", IDLE),
            ("pg_pool_idle_connections", "", IDLE),
            ("pg_pool_idle", "", IDLE),
            ("pg_pool_waiting_count", "", WAITERS),
            ("pg_pool_waiting_requests", "", WAITERS),
            ("pg_pool_waiting_clients", "", WAITERS),
            ("pg_pool_waiting", "", WAITERS),
            ("pg_pool_max", "", MAX),
        ],
    },
    // sqlx has no exporter: Pool::size, Pool::num_idle and PoolOptions::max_connections.
    Known {
        source: Source::Sqlx,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("sqlx_pool_size", "", OPEN),
            ("sqlx_pool_connections_open", "", OPEN),
            ("sqlx_pool_num_idle", "", IDLE),
            ("sqlx_pool_connections_idle", "", IDLE),
            ("sqlx_pool_max_connections", "", MAX),
        ],
    },
    // bb8 has no exporter: State, Statistics and Builder::max_size (docs.rs/bb8/0.9.1). `get_direct` is not
    // needed: what was started is the acquires.
    Known {
        source: Source::Bb8,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("bb8_connections", "", OPEN),
            ("bb8_idle_connections", "", IDLE),
            ("bb8_max_size", "", MAX),
            ("bb8_pending_gets", "", WAITERS),
            ("bb8_get_started", "", ACQUIRES),
            ("bb8_get_waited", "", WAITS),
            ("bb8_get_timed_out", "", TIMEOUTS_APART),
            ("bb8_get_wait_time_seconds", "", WAIT_SECONDS),
        ],
    },
    // deadpool has no exporter: Status (docs.rs/deadpool).
    Known {
        source: Source::Deadpool,
        pool: ANY_POOL,
        state: &[],
        except: None,
        metrics: &[
            ("deadpool_max_size", "", MAX),
            ("deadpool_size", "", OPEN),
            ("deadpool_available", "", IDLE),
            ("deadpool_waiting", "", WAITERS),
        ],
    },
    // prometheus-community/pgbouncer_exporter: collector.go and CHANGELOG.md. A database's pools, one a user,
    // are one; its size is that of each of them, so that no maximum of the database is known. The database `pgbouncer` is its
    // console. A server connection that waits for its check is idle ("used" in its words). Only PgBouncer
    // from 1.23 on counts assignments.
    Known {
        source: Source::PgBouncer,
        pool: &["name", "database"],
        state: &[],
        except: Some("pgbouncer"),
        metrics: &[
            ("pgbouncer_pools_server_active_connections", "", USED),
            ("pgbouncer_pools_server_idle_connections", "", IDLE),
            ("pgbouncer_pools_server_used_connections", "", IDLE),
            ("pgbouncer_pools_client_waiting_connections", "", WAITERS),
            ("pgbouncer_stats_client_wait_seconds", "", WAIT_SECONDS),
            ("pgbouncer_stats_totals_client_wait_seconds", "", WAIT_SECONDS),
            ("pgbouncer_stats_server_assignments", "", ACQUIRES),
            ("pgbouncer_stats_totals_server_assignments", "", ACQUIRES),
            ("pgbouncer_stats_sql_transactions_pooled", "", TRANSACTIONS),
            ("pgbouncer_stats_totals_sql_transactions_pooled", "", TRANSACTIONS),
        ],
    },
];
