//! Tests of what is read from each source, and of what hostile expositions do.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{sources::SOURCES, *};

const BB8: &str = include_str!("../../tests/expositions/bb8.txt");

/// Expositions of `agent/tests/expositions`, recorded from what their first lines name, or written in its
/// form, and what the pool did between the two scrapes, or its state in the only one: differences that can be
/// taken by hand. Recorded pools have 4 connections. Of those of Java and Go, 14 callers asked at once: 4 had
/// no need to wait, 4 waited, and 6 gave up; at the second scrape others have the 4 connections and wait.
const EXPOSITIONS: [(&str, &[Expected]); 20] = [
    (
        include_str!("../../tests/expositions/hikari_micrometer.txt"),
        // Waits are the acquires above 10 ms: all 10 that waited. Of the 8 that had no need to, 3 took above
        // 1 ms. Spring's gauges show the same pool, and are left out.
        &[expected("HikariPool-1", Some(18), [10, 6, 2_573_184_327], [4, 0, 4, 5]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/hikari_prometheus.txt"),
        // Of the waits, only those that gave up are known, and the waiters.
        &[
            expected("audit", Some(0), [0, 0, 0], [0, 4, 4, 0]).at_least(),
            expected("orders", Some(18), [6, 6, 2_523_347_590], [4, 0, 4, 5]).at_least(),
        ],
    ),
    (
        include_str!("../../tests/expositions/hikari_prometheus_histogram.txt"),
        // The limits end at 1 ms, and say nothing about waits.
        &[expected("orders", Some(18), [6, 6, 2_539_492_661], [4, 0, 4, 5]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/spring_jdbc.txt"),
        &[expected("dataSource", None, [0, 0, 0], [4, 0, 4, 0]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/go_sql.txt"),
        // Those that gave up, and the 4 that wait still, are among the waits.
        &[expected("shop", None, [14, 0, 1_112_314_091], [4, 0, 4, 0])],
    ),
    (
        include_str!("../../tests/expositions/pgxpool_ibm.txt"),
        // 12 acquires with success, of which 4 waited, and 6 that were cancelled.
        &[expected("shop", Some(18), [10, 6, 323_982_611], [4, 0, 4, 0])],
    ),
    (
        include_str!("../../tests/expositions/pgxpool_otel.txt"),
        &[expected(
            "127.0.0.1:55432/shop",
            Some(18),
            [10, 6, 322_932_515],
            [4, 0, 4, 0],
        )],
    ),
    (
        include_str!("../../tests/expositions/otel_connection.txt"),
        &[expected("main", Some(75), [20, 2, 1_500_000_000], [10, 0, 10, 4]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/otel_connections.txt"),
        &[expected("HikariPool-1", Some(38), [7, 0, 100_250_000], [10, 0, 10, 1]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/sqlalchemy.txt"),
        &[state("", [3, 1, 0, 0])],
    ),
    (
        include_str!("../../tests/expositions/sqlalchemy_otel.txt"),
        &[expected(
            "postgresql+psycopg2://127.0.0.1:55432/shop",
            None,
            [0, 0, 0],
            [5, 0, 0, 0],
        )
        .at_least()],
    ),
    (
        include_str!("../../tests/expositions/node_postgres_otel.txt"),
        &[expected("127.0.0.1:55432/shop", None, [12, 0, 0], [4, 0, 4, 12]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/node_postgres_otel_old.txt"),
        &[expected("db:5432/shop", None, [5, 0, 0], [10, 0, 0, 6]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/node_postgres.txt"),
        &[state("", [6, 4, 0, 0])],
    ),
    (
        include_str!("../../tests/expositions/sqlx.txt"),
        &[state("shop", [1, 5, 10, 0])],
    ),
    (
        BB8,
        // 25 waited with success and 2 gave up.
        &[expected("", Some(100), [27, 2, 2_500_000_000], [5, 0, 5, 0])],
    ),
    (
        include_str!("../../tests/expositions/deadpool.txt"),
        &[expected("main", None, [3, 0, 0], [16, 0, 16, 3]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/pgbouncer.txt"),
        // Two users have a pool each, of the same size.
        &[expected("shop", Some(27), [9, 0, 638_482_000], [8, 0, 0, 9]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/pgbouncer_assignments.txt"),
        &[expected("shop", Some(280), [8, 0, 2_250_000_000], [20, 0, 0, 9]).at_least()],
    ),
    (
        include_str!("../../tests/expositions/pgbouncer_old.txt"),
        &[expected("shop", Some(27), [9, 0, 662_028_000], [8, 0, 0, 9]).at_least()],
    ),
];

/// A row with a name that can stand in a constant.
#[derive(Debug, Clone, Copy)]
struct Expected {
    name: &'static str,
    acquires: Option<u64>,
    acquires_estimated: bool,
    /// Waits, timeouts, nanoseconds waited.
    events: [u64; 3],
    waits_at_least: bool,
    /// Used, idle, max, waiters.
    state: [u64; 4],
}

/// Acquires that are not known are not counted; waits are, unless it is said.
const fn expected(name: &'static str, acquires: Option<u64>, events: [u64; 3], state: [u64; 4]) -> Expected {
    Expected {
        name,
        acquires,
        acquires_estimated: acquires.is_none(),
        events,
        waits_at_least: false,
        state,
    }
}

/// A pool that was scraped once and counts nothing.
const fn state(name: &'static str, state: [u64; 4]) -> Expected {
    Expected {
        acquires_estimated: true,
        ..expected(name, Some(0), [0; 3], state).at_least()
    }
}

impl Expected {
    const fn at_least(self) -> Self {
        Self {
            waits_at_least: true,
            ..self
        }
    }

    fn row(self) -> PoolRow {
        let [waits, timeouts, wait_ns] = self.events;
        let [used, idle, max, waiters] = self.state;
        PoolRow {
            name: self.name.to_owned(),
            acquires: self.acquires,
            acquires_estimated: self.acquires_estimated,
            waits,
            waits_at_least: self.waits_at_least,
            timeouts,
            wait_ns,
            used,
            idle,
            max,
            waiters,
        }
    }
}

fn scrapes(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.split("# NEXT SCRAPE\n")
}

fn scrape(pools: &Pools, text: &str) {
    pools.add(&read(text.as_bytes(), &[]));
}

/// What is taken after each of these scrapes.
fn last(texts: &[&str], custom: &[&str]) -> Vec<PoolRow> {
    let custom: Vec<CustomMetric> = custom.iter().map(|metric| metric.parse().unwrap()).collect();
    let pools = Pools::default();
    let mut rows = Vec::new();
    for text in texts {
        pools.add(&read(text.as_bytes(), &custom));
        rows = pools.take();
    }
    rows
}

#[test]
fn each_source_is_read() {
    for (text, expected) in EXPOSITIONS {
        let title = text.lines().next().unwrap();
        assert!(title.starts_with("# "), "{title:?} does not say where it is from");
        let texts: Vec<&str> = scrapes(text).collect();
        let expected: Vec<PoolRow> = expected.iter().map(|row| row.row()).collect();
        assert_eq!(last(&texts, &[]), expected, "{title}");
    }
}

#[test]
fn what_is_new_has_a_state_and_no_events() {
    for (text, _) in EXPOSITIONS {
        let first = scrapes(text).next().unwrap();
        for row in last(&[first], &[]) {
            assert_eq!((row.waits, row.timeouts, row.wait_ns), (0, 0, 0), "{row:?}");
            assert_eq!(row.acquires.unwrap_or(0), 0, "{row:?}");
            assert_ne!((row.used, row.idle), (0, 0), "{row:?}");
        }
    }
}

#[test]
fn each_known_source_has_an_exposition() {
    let seen: BTreeSet<Source> = EXPOSITIONS
        .iter()
        .flat_map(|(text, _)| read(text.as_bytes(), &[]))
        .map(|reading| reading.source)
        .collect();
    let known: BTreeSet<Source> = SOURCES.iter().map(|known| known.source).collect();
    assert_eq!(seen, known);
}

/// The counters of the first scrape, which are smaller, come after those of the second.
#[test]
fn a_restart_counts_what_was_since() {
    let texts: Vec<&str> = scrapes(BB8).collect();
    let rows = last(&[texts[1], texts[0]], &[]);
    assert_eq!(
        (rows[0].acquires, rows[0].waits, rows[0].timeouts),
        (Some(1000), 50, 10)
    );
}

#[test]
fn events_add_up_until_they_are_taken() {
    let pools = Pools::default();
    assert!(pools.take().is_empty());
    let text = |waits: u64, used: u64| {
        format!(
            "go_sql_wait_count_total{{db_name=\"a\"}} {waits}\n\
             go_sql_in_use_connections{{db_name=\"a\"}} {used}\n"
        )
    };
    for (waits, used) in [(100, 1), (103, 2), (110, 3)] {
        scrape(&pools, &text(waits, used));
    }
    // A scrape that fails loses nothing.
    pools.fail();
    let rows = pools.take();
    assert_eq!((rows.len(), rows[0].waits, rows[0].used), (1, 10, 3));
    assert!(pools.take().is_empty());
    pools.fail();
    assert!(pools.take().is_empty());
    scrape(&pools, &text(115, 4));
    // The pool is closed.
    scrape(&pools, "up 1\n");
    let rows = pools.take();
    assert_eq!((rows.len(), rows[0].waits, rows[0].used), (1, 5, 0));
    assert_eq!((pools.scrapes(), pools.failed_scrapes()), (7, 2));
}

#[test]
fn operators_name_metrics_of_their_own() {
    let custom = [
        "used=app_connections{state=busy}",
        "idle=app_connections{state=free}",
        "waits=app_waits",
        "wait_millis=app_wait_ms",
        "acquire_bucket=app_acquire_seconds",
    ];
    let before = "app_waits_total{pool=\"a\"} 1\napp_wait_ms_total{pool=\"a\"} 10\n\
                  app_acquire_seconds_bucket{pool=\"a\",le=\"+Inf\"} 1\n\
                  app_acquire_seconds_bucket{pool=\"a\",le=\"1\"} 1\n";
    let after = "app_connections{pool=\"a\",state=\"busy\"} 3\napp_connections{pool=\"a\",state=\"free\"} 4\n\
                 app_connections{pool=\"a\",state=\"broken\"} 9\n\
                 app_waits_total{pool=\"a\"} 5\napp_wait_ms_total{pool=\"a\"} 12.5\n\
                 app_acquire_seconds_bucket{pool=\"a\",le=\"+Inf\"} 9\n\
                 app_acquire_seconds_bucket{pool=\"a\",le=\"1\"} 9\n";
    let rows = last(&[before, after], &custom);
    assert_eq!(
        rows,
        [expected("a", Some(8), [4, 0, 2_500_000], [3, 4, 0, 0]).row()]
    );
    assert!(last(&[before, after], &[]).is_empty());
}

/// What a library does not say, the operator can add to its pool.
#[test]
fn operators_complete_what_is_known() {
    let text = "sqlalchemy_pool_checkedout 3\nsqlalchemy_pool_size 5\napp_pool_max 15\n";
    let rows = last(&[text], &["max=app_pool_max"]);
    assert_eq!(rows, [state("", [3, 0, 15, 0]).row()]);
}

#[test]
fn hostile_expositions_do_no_harm() {
    let before = "bb8_get_started 10\nbb8_get_waited 1\nbb8_get_timed_out 0\nbb8_connections 4\n";
    for hostile in [
        "bb8_get_waited -5\n",
        "bb8_get_waited NaN\n",
        "bb8_get_waited 1e300\n",
        "bb8_get_waited +Inf\n",
        "bb8_get_waited{pool=\"\\x\"} 7\n",
        "bb8_get_waited{pool=\"\n",
        "bb8_get_waited\n",
        "bb8_get_waited 0x1p4\n",
    ] {
        let rows = last(&[before, hostile], &[]);
        assert!(rows.is_empty(), "{hostile}: {rows:?}");
    }
    // The first of two counts, and more waits than acquires makes more acquires.
    let twice = "bb8_get_waited{a=\"1\",b=\"2\"} 7\nbb8_get_waited{b=\"2\",a=\"1\"} 9\nbb8_get_started 11\n";
    let rows = last(&[before, twice], &[]);
    assert_eq!((rows[0].acquires, rows[0].waits), (Some(7), 7));
    // No number is beyond what the aggregator takes.
    let large = "bb8_get_waited 9e18\nbb8_get_timed_out 9e18\nbb8_idle_connections 9e18\nbb8_max_size 9e18\n";
    let row = &last(&[before, large], &[])[0];
    assert_eq!(
        (row.acquires, row.waits, row.timeouts),
        (None, MAX_COUNT, MAX_COUNT)
    );
    assert_eq!((row.used, row.idle, row.max), (0, MAX_COUNT, MAX_COUNT));
    // Invalid UTF-8 costs its own line.
    let pools = Pools::default();
    let text = b"bb8_connections{pool=\"\xff\"} 1\nbb8_connections{pool=\"ok\"} 2\n";
    pools.add(&read(text, &[]));
    assert_eq!(pools.take()[0].name, "ok");
}

#[test]
fn there_are_not_more_pools_than_allowed() {
    let pools = (0..1000).map(|n| format!("deadpool_size{{pool=\"p{n:03}\"}} 1\n"));
    let pools: String = pools.collect();
    let rows = last(&[pools.as_str()], &[]);
    assert_eq!(rows.len(), MAX_POOLS);
    assert_eq!(rows[MAX_POOLS - 1].name, "p063");
    let series = (0..10_000).map(|n| format!("deadpool_size{{worker=\"{n}\"}} 1\n"));
    let series: String = series.collect();
    assert_eq!(read(series.as_bytes(), &[]).len(), reading::MAX_READINGS);
    let series = (0..10_000).map(|n| {
        let name = "hikaricp_connections_acquire_seconds_bucket";
        format!("{name}{{n=\"{n}\",le=\"+Inf\"}} 1\n{name}{{n=\"{n}\",le=\"1\"}} 1\n")
    });
    let series: String = series.collect();
    let numbers = read(series.as_bytes(), &[]).len();
    assert!(
        (reading::MAX_READINGS - 2..=reading::MAX_READINGS).contains(&numbers),
        "{numbers}"
    );
}

#[test]
fn rows_of_neighbouring_windows_add_up() {
    let mut row = expected("a", Some(5), [3, 1, 10], [1, 2, 3, 4]).row();
    row.add(&expected("a", Some(7), [2, 2, 30], [5, 6, 7, 8]).row());
    assert_eq!(row, expected("a", Some(12), [5, 3, 40], [5, 6, 7, 8]).row());
    row.add(&expected("a", None, [20, 0, 0], [0, 0, 7, 0]).at_least().row());
    assert_eq!(
        row,
        expected("a", None, [25, 3, 40], [0, 0, 7, 0]).at_least().row()
    );
}

#[test]
fn requests_stand_for_acquires_that_are_not_counted() {
    let sent = |acquires, events, requests| {
        let mut row = expected("a", acquires, events, [0; 4]).row();
        row.estimate(requests);
        let wire = row.to_wire();
        (wire.acquires, wire.acquires_estimated)
    };
    assert_eq!(sent(Some(5), [3, 1, 0], 100), (5, false));
    assert_eq!(sent(None, [3, 1, 0], 100), (100, true));
    assert_eq!(sent(None, [3, 1, 0], 2), (3, true));
    let row = expected("a", Some(9), [8, 7, 6], [5, 4, 3, 2]).at_least();
    let row = row.row().to_wire();
    let state = (row.used, row.idle, row.max, row.waiters);
    assert_eq!((row.acquires, row.waits, row.timeouts, row.wait_ns), (9, 8, 7, 6));
    assert_eq!((row.name.as_str(), state), ("a", (5, 4, 3, 2)));
    assert!(row.waits_at_least && !row.acquires_estimated);
}

fn names() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "bb8_connections",
        "bb8_get_started",
        "bb8_get_waited_total",
        "bb8_get_timed_out",
        "hikaricp_connections_pending",
        "hikaricp_connections_acquire_seconds_bucket",
        "hikaricp_connections_acquire_seconds_count",
        "hikaricp_connections_timeout_total",
        "pgxpool_canceled_acquire_count",
        "db_client_connection_count",
    ])
}

fn lines() -> impl Strategy<Value = String> {
    let labels = prop::sample::select(vec![
        "",
        "{pool=\"a\"}",
        "{pool=\"a\",le=\"+Inf\"}",
        "{pool=\"a\",le=\"0.001\"}",
        "{db_client_connection_state=\"used\"}",
    ]);
    let line = (names(), labels, prop_oneof![0.0..1e3, any::<f64>()]);
    let lines = prop::collection::vec(line, 0..20);
    lines.prop_map(|lines| {
        let lines = lines.iter();
        lines
            .map(|(name, labels, value)| format!("{name}{labels} {value}\n"))
            .collect()
    })
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        read(&bytes, &[]);
    }

    /// Whatever an application says, and however often it is taken: who gave up has waited, and who waited
    /// has asked.
    #[test]
    fn numbers_agree(texts in prop::collection::vec(lines(), 1..6)) {
        let (each, once) = (Pools::default(), Pools::default());
        for text in &texts {
            scrape(&each, text);
            scrape(&once, text);
            for row in each.take() {
                let acquires = row.to_wire().acquires;
                prop_assert!(row.timeouts <= row.waits, "{:?}", row);
                prop_assert!(row.waits <= acquires && acquires <= MAX_COUNT, "{:?}", row);
            }
        }
        for row in once.take() {
            let acquires = row.acquires.unwrap_or(MAX_COUNT);
            prop_assert!(row.timeouts <= row.waits, "{:?}", row);
            prop_assert!(row.waits <= acquires && acquires <= MAX_COUNT, "{:?}", row);
        }
    }
}
