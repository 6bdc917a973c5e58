//! Tests of what is read from each source, and of what hostile expositions do.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{sources::SOURCES, *};

const BB8: &str = include_str!("../../tests/expositions/bb8.txt");

/// Expositions of `agent/tests/expositions`, written in the form of what their first lines name, and what the
/// pool did between the two scrapes, or its state in the only one: differences that can be taken by hand.
const EXPOSITIONS: [(&str, &[Expected]); 17] = [
    (
        include_str!("../../tests/expositions/hikari_micrometer.txt"),
        // Waits are the acquires above 1 ms. Spring's gauges show the same pool, and are left out.
        &[expected(
            "HikariPool-1",
            Some(122),
            [22, 2, 61_250_000_000],
            [10, 0, 10, 5],
        )],
    ),
    (
        include_str!("../../tests/expositions/hikari_prometheus.txt"),
        &[
            expected("audit", Some(0), [0, 0, 0], [0, 1, 2, 0]),
            expected("orders", Some(40), [6, 1, 500_000_000], [8, 0, 8, 7]),
        ],
    ),
    (
        include_str!("../../tests/expositions/spring_jdbc.txt"),
        &[expected("dataSource", None, [0, 0, 0], [4, 6, 100, 0])],
    ),
    (
        include_str!("../../tests/expositions/go_sql.txt"),
        &[expected("shop", None, [31, 0, 1_500_000_000], [5, 0, 5, 0])],
    ),
    (
        include_str!("../../tests/expositions/pgxpool_ibm.txt"),
        // 100 acquires with success, of which 15 waited, and 2 that were cancelled.
        &[expected("shop", Some(102), [17, 2, 250_000_000], [8, 0, 8, 0])],
    ),
    (
        include_str!("../../tests/expositions/pgxpool_otel.txt"),
        &[expected("db:5432/shop", Some(7), [1, 0, 500_000], [2, 0, 4, 0])],
    ),
    (
        include_str!("../../tests/expositions/otel_connection.txt"),
        &[expected("main", Some(75), [25, 2, 1_500_000_000], [10, 0, 10, 4])],
    ),
    (
        include_str!("../../tests/expositions/otel_connections.txt"),
        &[expected(
            "HikariPool-1",
            Some(38),
            [8, 0, 100_250_000],
            [10, 0, 10, 1],
        )],
    ),
    (
        include_str!("../../tests/expositions/sqlalchemy.txt"),
        &[expected("", None, [0, 0, 0], [3, 1, 5, 0])],
    ),
    (
        include_str!("../../tests/expositions/sqlalchemy_otel.txt"),
        &[expected(
            "postgresql+psycopg2://db:5432/shop",
            None,
            [0, 0, 0],
            [3, 2, 0, 0],
        )],
    ),
    (
        include_str!("../../tests/expositions/node_postgres_otel.txt"),
        &[expected("db:5432/shop", None, [5, 0, 0], [10, 0, 0, 6])],
    ),
    (
        include_str!("../../tests/expositions/node_postgres.txt"),
        &[expected("", None, [0, 0, 0], [6, 4, 0, 0])],
    ),
    (
        include_str!("../../tests/expositions/sqlx.txt"),
        &[expected("shop", None, [0, 0, 0], [1, 5, 10, 0])],
    ),
    (
        BB8,
        // 25 waited with success and 2 gave up.
        &[expected("", Some(100), [27, 2, 2_500_000_000], [5, 0, 5, 0])],
    ),
    (
        include_str!("../../tests/expositions/deadpool.txt"),
        &[expected("main", None, [3, 0, 0], [16, 0, 16, 3])],
    ),
    (
        include_str!("../../tests/expositions/pgbouncer.txt"),
        &[expected("shop", Some(280), [8, 0, 2_250_000_000], [20, 0, 20, 9])],
    ),
    (
        include_str!("../../tests/expositions/pgbouncer_old.txt"),
        &[expected("shop", Some(300), [8, 0, 2_250_000_000], [20, 0, 20, 9])],
    ),
];

/// A row with a name that can stand in a constant.
#[derive(Debug, Clone, Copy)]
struct Expected {
    name: &'static str,
    acquires: Option<u64>,
    /// Waits, timeouts, nanoseconds waited.
    events: [u64; 3],
    /// Used, idle, max, waiters.
    state: [u64; 4],
}

const fn expected(name: &'static str, acquires: Option<u64>, events: [u64; 3], state: [u64; 4]) -> Expected {
    Expected {
        name,
        acquires,
        events,
        state,
    }
}

impl Expected {
    fn row(self) -> PoolRow {
        let [waits, timeouts, wait_ns] = self.events;
        let [used, idle, max, waiters] = self.state;
        PoolRow {
            name: self.name.to_owned(),
            acquires: self.acquires,
            waits,
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
    assert_eq!(rows, [expected("", None, [0, 0, 0], [3, 0, 15, 0]).row()]);
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
    assert_eq!((row.acquires, row.waits, row.timeouts), (None, MOST, MOST));
    assert_eq!((row.used, row.idle, row.max), (0, MOST, MOST));
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
    row.add(&expected("a", None, [20, 0, 0], [0, 0, 7, 0]).row());
    assert_eq!(row, expected("a", None, [25, 3, 40], [0, 0, 7, 0]).row());
}

#[test]
fn requests_stand_for_acquires_that_are_not_counted() {
    let sent = |acquires, events, requests| {
        let row = expected("a", acquires, events, [0; 4]).row();
        row.to_wire(requests).acquires
    };
    assert_eq!(sent(Some(5), [3, 1, 0], 100), 5);
    assert_eq!(sent(None, [3, 1, 0], 100), 100);
    assert_eq!(sent(None, [3, 1, 0], 2), 3);
    let row = expected("a", Some(9), [8, 7, 6], [5, 4, 3, 2]).row().to_wire(0);
    let state = (row.used, row.idle, row.max, row.waiters);
    assert_eq!((row.acquires, row.waits, row.timeouts, row.wait_ns), (9, 8, 7, 6));
    assert_eq!((row.name.as_str(), state), ("a", (5, 4, 3, 2)));
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
                let acquires = row.to_wire(0).acquires;
                prop_assert!(row.timeouts <= row.waits, "{:?}", row);
                prop_assert!(row.waits <= acquires && acquires <= MOST, "{:?}", row);
            }
        }
        for row in once.take() {
            let acquires = row.acquires.unwrap_or(MOST);
            prop_assert!(row.timeouts <= row.waits, "{:?}", row);
            prop_assert!(row.waits <= acquires && acquires <= MOST, "{:?}", row);
        }
    }
}
