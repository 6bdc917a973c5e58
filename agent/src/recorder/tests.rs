//! Tests of the recorder.

use super::*;
use crate::tenant::Header;

struct Named<'a>(&'a str);

impl Head for Named<'_> {
    fn header(&self, _: &str) -> Header<'_> {
        Header::Value(self.0.as_bytes())
    }

    fn host(&self) -> Option<&[u8]> {
        None
    }

    fn target(&self) -> &[u8] {
        b"/"
    }
}

fn recorder(max_tenants: usize) -> Recorder {
    Recorder::new(vec!["header:x".parse().unwrap()], max_tenants)
}

fn request(recorder: &mut Recorder, tenant: &str, outcome: Outcome, latency_ns: u64) {
    let id = recorder.begin(&Named(tenant));
    recorder.end(id, outcome, latency_ns);
}

fn counts(window: &Window) -> Vec<(&str, u64)> {
    let rows = window.rows.iter();
    rows.map(|row| (row.tenant.as_str(), row.outcomes.seen()))
        .collect()
}

#[test]
fn requests_are_counted_in_the_window_in_which_they_end() {
    let mut recorder = recorder(10);
    request(&mut recorder, "a", Outcome::Success, 1);
    let later = recorder.begin(&Named("b"));
    request(&mut recorder, "a b", Outcome::ServerError, 1);
    let window = recorder.seal(5000, 1000);
    assert_eq!(counts(&window), [("a", 1), ("__none__", 1)]);
    assert_eq!((window.host.in_flight, recorder.totals.rejected_names), (1, 1));
    recorder.end(later, Outcome::ClientAbort, 1);
    let window = recorder.seal(6000, 1000);
    assert_eq!(counts(&window), [("b", 1)]);
    assert_eq!(window.rows[0].latency, v1::Histogram::default());
    assert_eq!(
        recorder.sums(),
        Sums {
            requests: 3,
            errors: 1
        }
    );
    assert!(recorder.seal(7000, 1000).rows.is_empty());
}

#[test]
fn limits_are_counted_against() {
    let mut recorder = recorder(10);
    request(&mut recorder, "a", Outcome::Success, 9_000);
    assert_eq!(recorder.seal(0, 1000).rows[0].limit_us, 0);
    let by_tenant = HashMap::from([(TenantName::parse(b"a").unwrap(), 5)]);
    recorder.set_limits(Limits {
        version: 7,
        default_us: 9,
        by_tenant,
    });
    for latency_ns in [5_000, 5_001, 10_000] {
        request(&mut recorder, "a", Outcome::Success, latency_ns);
        request(&mut recorder, "b", Outcome::ClientError, latency_ns);
        request(&mut recorder, "b", Outcome::UpstreamReset, latency_ns);
    }
    let window = recorder.seal(1000, 1000);
    let rows = window.rows.iter().map(|row| (row.limit_us, row.over_limit));
    assert_eq!(rows.collect::<Vec<_>>(), [(5, 2), (9, 1)]);
    assert_eq!(window.config_version, 7);
}

#[test]
fn tenants_are_bounded_and_idle_ones_make_room() {
    let mut recorder = recorder(2);
    recorder.set_limits(Limits {
        by_tenant: HashMap::from([(TenantName::parse(b"listed").unwrap(), 5)]),
        ..Limits::default()
    });
    for tenant in ["a", "b", "c", "d", "listed", "a"] {
        request(&mut recorder, tenant, Outcome::Success, 1);
    }
    let window = recorder.seal(0, 1000);
    assert_eq!(
        counts(&window),
        [("a", 2), ("b", 1), ("__overflow__", 2), ("listed", 1)]
    );
    assert_eq!(recorder.totals.overflow_requests, 2);
    let held = recorder.begin(&Named("b"));
    for _ in 0..=IDLE_WINDOWS {
        recorder.seal(0, 1000);
    }
    request(&mut recorder, "c", Outcome::Success, 1);
    recorder.end(held, Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("c", 1), ("b", 1)]);
}
