//! Tests of the recorder.

use super::{
    room::{ADVANTAGE, IDLE_WINDOWS, MIN_REQUESTS, REVIEW_WINDOWS},
    *,
};
use crate::tenant::Header;

struct Named<'a>(&'a str);

impl Head for Named<'_> {
    fn header(&self, _: &str) -> Header<'_> {
        Header::Value(self.0.as_bytes())
    }

    fn host(&self) -> Header<'_> {
        Header::Missing
    }

    fn target(&self) -> &[u8] {
        b"/path/?q=query"
    }
}

fn recorder(max_tenants: usize) -> Recorder {
    Recorder::new(vec!["header:x".parse().unwrap()], max_tenants)
}

fn took(total_ns: u64) -> Times {
    Times {
        total_ns,
        ..Times::default()
    }
}

fn request(recorder: &mut Recorder, tenant: &str, outcome: Outcome, latency_ns: u64) {
    let id = recorder.begin(&Named(tenant));
    recorder.end(id, outcome, took(latency_ns));
}

fn requests(recorder: &mut Recorder, tenant: &str, count: u64) {
    (0..count).for_each(|_| request(recorder, tenant, Outcome::Success, 1));
}

fn counts(window: &Window) -> Vec<(&str, u64)> {
    let rows = window.rows.iter();
    rows.map(|row| (row.tenant.as_str(), row.outcomes.seen()))
        .collect()
}

fn listing(names: &[&str]) -> Settings {
    let by_tenant = names
        .iter()
        .map(|name| (TenantName::parse(name.as_bytes()).unwrap(), 5));
    Settings {
        by_tenant: by_tenant.collect(),
        ..Settings::default()
    }
}

/// Closes windows up to the next review, the first of which has what was recorded.
fn review(recorder: &mut Recorder) -> Window {
    let first = recorder.seal(0, 1000);
    while !recorder.windows.is_multiple_of(REVIEW_WINDOWS) {
        assert!(recorder.seal(0, 1000).rows.is_empty());
    }
    first
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
    recorder.end(later, Outcome::ClientAbort, took(1));
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
    recorder.apply(Settings {
        version: 7,
        default_us: 9,
        ..listing(&["a"])
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
fn a_stream_of_events_has_no_latency() {
    let mut recorder = recorder(10);
    recorder.apply(listing(&["a"]));
    let id = recorder.begin(&Named("a"));
    let times = Times {
        total_ns: 3_600_000_000_000,
        first_byte_ns: Some(2_000_000),
        is_stream: true,
    };
    recorder.end(id, Outcome::Success, times);
    let window = recorder.seal(0, 1000);
    let row = &window.rows[0];
    assert_eq!((row.outcomes.seen(), row.limit_us, row.over_limit), (1, 5, 0));
    assert_eq!(row.latency, v1::Histogram::default());
}

#[test]
fn first_bytes_are_counted_by_window_and_without_failures() {
    let mut recorder = recorder(10);
    for (outcome, first_byte_ns) in [
        (Outcome::Success, Some(1_000_000)),
        (Outcome::ServerError, Some(2_000_000)),
        (Outcome::ClientAbort, Some(4_000_000)),
        (Outcome::UpstreamReset, None),
    ] {
        let id = recorder.begin(&Named("a"));
        let times = Times {
            total_ns: 5_000_000,
            first_byte_ns,
            is_stream: false,
        };
        recorder.end(id, outcome, times);
    }
    let mut next = |start| {
        let window = recorder.seal(start, 1000);
        let first_byte = recorder.sealed(window).first_byte;
        Histogram::from_wire(&first_byte).unwrap()
    };
    let first_byte = next(0);
    assert_eq!((first_byte.count(), first_byte.sum_ns()), (2, 3_000_000));
    assert!(next(1000).is_empty());
}

#[test]
fn what_is_nobodys_is_in_the_totals() {
    let mut recorder = recorder(10);
    recorder.malformed(None);
    recorder.passed_over();
    let spoilt = recorder.begin(&Named("a"));
    recorder.malformed(Some(spoilt));
    recorder.passed(10, 20);
    recorder.passed(1, u64::MAX);
    recorder.opaque(Opaque::Upgrade);
    let id = recorder.begin(&Named("a"));
    recorder.forget(id);
    let window = recorder.seal(0, 1000);
    assert!(window.rows.is_empty());
    assert_eq!((window.host.opaque_connections, window.host.in_flight), (1, 0));
    let totals = recorder.sealed(window).totals;
    assert_eq!(
        (totals.malformed, totals.unfollowed, totals.outcomes.seen()),
        (2, 2, 0)
    );
    assert_eq!((totals.received_bytes, totals.sent_bytes), (11, u64::MAX));
}

#[test]
fn tenants_are_bounded_and_idle_ones_make_room() {
    let mut recorder = recorder(2);
    recorder.apply(listing(&["listed"]));
    assert!(recorder.sketch.is_none());
    for tenant in ["a", "b", "c", "d", "listed", "a"] {
        request(&mut recorder, tenant, Outcome::Success, 1);
    }
    assert!(recorder.sketch.is_some());
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
    recorder.end(held, Outcome::Success, took(1));
    assert_eq!(counts(&recorder.seal(0, 1000)), [("c", 1), ("b", 1)]);
    assert!(
        recorder.sketch.is_none(),
        "without overflow there is no sketch after a review"
    );
}

#[test]
fn a_heavy_hitter_takes_the_place_of_the_least_busy() {
    let mut recorder = recorder(2);
    requests(&mut recorder, "busy", 100);
    requests(&mut recorder, "quiet", 10);
    requests(&mut recorder, "heavy", 40);
    requests(&mut recorder, "light", MIN_REQUESTS - 1);
    // What is under way as the place changes hands stays where it began.
    let under_way = recorder.begin(&Named("heavy"));
    let window = review(&mut recorder);
    assert_eq!(
        counts(&window),
        [
            ("busy", 100),
            ("quiet", 10),
            ("__overflow__", 40 + MIN_REQUESTS - 1)
        ]
    );
    recorder.end(under_way, Outcome::Success, took(1));
    for tenant in ["busy", "quiet", "heavy", "light"] {
        request(&mut recorder, tenant, Outcome::Success, 1);
    }
    let window = recorder.seal(0, 1000);
    assert_eq!(
        counts(&window),
        [("__overflow__", 3), ("busy", 1), ("heavy", 1)],
        "quiet and light, and the one under way"
    );
    let sealed = recorder.sealed(window);
    assert_eq!((sealed.totals.replaced_tenants, sealed.tenants), (1, 2));
    // Each request is in one row of one window.
    assert_eq!(recorder.sums().requests, 100 + 10 + 40 + MIN_REQUESTS - 1 + 5);
}

#[test]
fn a_place_is_not_lost_to_a_tenant_that_is_little_busier() {
    let mut recorder = recorder(1);
    requests(&mut recorder, "first", 50);
    requests(&mut recorder, "second", 50 * ADVANTAGE);
    review(&mut recorder);
    request(&mut recorder, "first", Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("first", 1)]);
    // The counts of a review begin anew.
    requests(&mut recorder, "first", 49);
    requests(&mut recorder, "second", 50 * ADVANTAGE + 1);
    review(&mut recorder);
    request(&mut recorder, "second", Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("second", 1)]);
}

#[test]
fn what_the_policy_lists_and_what_is_under_way_stay() {
    let mut recorder = recorder(3);
    recorder.apply(listing(&["listed"]));
    requests(&mut recorder, "listed", 1);
    requests(&mut recorder, "held", 1);
    requests(&mut recorder, "quiet", 1);
    let held = recorder.begin(&Named("held"));
    for name in ["one", "two", "three"] {
        requests(&mut recorder, name, 1000);
    }
    review(&mut recorder);
    recorder.end(held, Outcome::Success, took(1));
    for tenant in ["listed", "held", "quiet", "one", "two", "three"] {
        request(&mut recorder, tenant, Outcome::Success, 1);
    }
    let window = recorder.seal(0, 1000);
    assert_eq!(
        counts(&window),
        [("held", 2), ("listed", 1), ("__overflow__", 3), ("one", 1)]
    );
    // Once the policy lists a tenant, it has a place at once.
    recorder.apply(listing(&["three"]));
    request(&mut recorder, "three", Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("three", 1)]);
}

#[test]
fn a_name_that_got_a_place_meanwhile_does_not_get_a_second() {
    let mut recorder = recorder(1);
    request(&mut recorder, "idle", Outcome::Success, 1);
    recorder.seal(0, 1000);
    // The place becomes free with the next window, and between two reviews.
    while recorder.windows < IDLE_WINDOWS {
        recorder.seal(0, 1000);
    }
    requests(&mut recorder, "heavy", 40);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("__overflow__", 40)]);
    requests(&mut recorder, "heavy", 1);
    requests(&mut recorder, "other", 1);
    assert_eq!(
        counts(&review(&mut recorder)),
        [("heavy", 1), ("__overflow__", 1)]
    );
    requests(&mut recorder, "heavy", 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("heavy", 1)]);
    assert_eq!(
        (recorder.ids.len(), recorder.slots.len()),
        (OWN_SLOTS + 1, OWN_SLOTS + 1)
    );
    assert_eq!(recorder.totals.replaced_tenants, 0);
}

#[test]
fn names_that_are_made_up_cost_bounded_memory_and_push_nobody_out() {
    let mut recorder = recorder(50);
    let tenants: Vec<String> = (0..50).map(|number| format!("tenant{number}")).collect();
    let mut made_up = 0..;
    for _ in 0..3 * REVIEW_WINDOWS {
        // Each tenant has a request in every second review only.
        if recorder.review.is_multiple_of(2) {
            tenants
                .iter()
                .for_each(|tenant| requests(&mut recorder, tenant, 1));
        }
        for number in made_up.by_ref().take(1_000) {
            request(&mut recorder, &format!("x{number}"), Outcome::Success, 1);
        }
        let window = recorder.seal(0, 1000);
        let overflow = window
            .rows
            .iter()
            .find(|row| row.tenant.as_str() == "__overflow__");
        assert_eq!(overflow.unwrap().outcomes.seen(), 1_000);
    }
    assert_eq!(recorder.totals.replaced_tenants, 0);
    assert_eq!((recorder.ids.len(), recorder.slots.len()), (52, 52));
    assert!(
        tenants
            .iter()
            .all(|tenant| recorder.ids.find(tenant.as_str(), &recorder.slots).is_some())
    );
}

#[test]
fn many_tenants_are_looked_at_in_turn() {
    let mut recorder = recorder(10_000);
    for number in 0..10_000 {
        request(&mut recorder, &format!("t{number}"), Outcome::Success, 1);
    }
    // One border does not look at all of them, but a few do.
    let mut windows = 0;
    while recorder.ids.len() > OWN_SLOTS && windows < IDLE_WINDOWS + 9 {
        recorder.seal(0, 1000);
        windows += 1;
        if !recorder.is_full() {
            // Full again, so that it goes on.
            recorder.max_tenants = recorder.ids.len() - OWN_SLOTS;
        }
    }
    assert_eq!(recorder.ids.len(), OWN_SLOTS);
    assert!(windows > IDLE_WINDOWS + 1, "{windows}");
}

fn config(rules: &[&str]) -> v1::Config {
    v1::Config {
        version: 2,
        tenant_rules: rules.iter().map(|rule| (*rule).to_owned()).collect(),
        ..v1::Config::default()
    }
}

#[test]
fn rules_change_at_a_border_and_requests_under_way_keep_their_tenant() {
    let mut recorder = recorder(10);
    let under_way = recorder.begin(&Named("a"));
    recorder.seal(0, 1000);
    recorder.apply(Settings::from_wire(&config(&["query:none", "path:/{tenant}/"])));
    request(&mut recorder, "a", Outcome::Success, 1);
    recorder.end(under_way, Outcome::Success, took(1));
    assert_eq!(counts(&recorder.seal(0, 1000)), [("path", 1), ("a", 1)]);
    // Without rules, those that the agent was started with hold again.
    recorder.apply(Settings::from_wire(&config(&[])));
    request(&mut recorder, "a", Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("a", 1)]);
}

#[test]
fn rules_that_cannot_be_read_change_nothing() {
    let mut recorder = recorder(10);
    recorder.apply(Settings::from_wire(&config(&["query:q"])));
    for bad in [
        &["header:x", "cookie:y"][..],
        &["fixed:a", "header:x"],
        &["header:x|regex=("],
    ] {
        let settings = Settings::from_wire(&config(bad));
        assert!(matches!(&settings.rules, PushedRules::Refused(_)), "{settings:?}");
        recorder.apply(settings.clone());
        recorder.apply(settings);
        request(&mut recorder, "a", Outcome::Success, 1);
        let window = recorder.seal(0, 1000);
        assert_eq!(counts(&window), [("query", 1)]);
        // The limits that came with them are in force.
        assert_eq!(recorder.sealed(window).next_config_version, 2);
    }
    assert_eq!(recorder.totals.refused_rules, 6);
    recorder.apply(Settings::from_wire(&config(&["fixed:all"])));
    request(&mut recorder, "a", Outcome::Success, 1);
    assert_eq!(counts(&recorder.seal(0, 1000)), [("all", 1)]);
    assert_eq!(recorder.totals.refused_rules, 6);
}
