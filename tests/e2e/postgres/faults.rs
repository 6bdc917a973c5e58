//! Crashes and broken connections: nothing is lost, nothing is doubled, and all goes on by itself.

use std::{
    thread,
    time::{Duration, Instant},
};

use coalmine_tests::{
    cutter::{Cutter, When},
    eventually,
    http::get,
    postgres::{DATABASE, Postgres, SUPERUSER, psql, url_at},
    process::coalmine,
    within,
};
use serde_json::{Value, json};

use super::{FAILING, Play, is_ready};
use crate::{gate::all_hold_back, stage};

/// Shorter than a lease, which another instance would have to wait for.
const AT_ONCE: Duration = Duration::from_secs(10);

#[test]
fn killing_the_database_during_commits_loses_and_doubles_nothing() {
    let _stage = stage();
    let mut play = Play::begin(None);
    for (when, n, let_go_first) in [
        // The COMMIT does not arrive any more.
        (When::Before, 1, false),
        // It is being done.
        (When::Before, 2, true),
        (When::Before, 3, true),
        // It was done, and the client hears of it when the server is gone.
        (When::After, 1, false),
        (When::After, 2, false),
    ] {
        let held = play.cutter.hold(when, n);
        held.wait();
        let held = (!let_go_first).then_some(held);
        play.postgres.kill_9();
        drop(held);
        play.postgres.launch();
        play.goes_on();
    }
    play.finish();
}

#[test]
fn a_connection_that_breaks_before_or_after_a_commit_loses_and_doubles_nothing() {
    let _stage = stage();
    let play = Play::begin(None);
    for n in 1..=4 {
        for when in [When::Before, When::After] {
            let before = play.cutter.cuts();
            play.cutter.arm(when, n);
            eventually("the connection is cut at a COMMIT", || {
                (play.cutter.cuts() > before).then_some(())
            });
            play.goes_on();
        }
    }
    assert_eq!(play.cutter.cuts(), 8);
    play.finish();
}

#[test]
fn without_the_database_nothing_is_approved_and_afterwards_all_is_recorded_once() {
    let _stage = stage();
    let play = Play::begin(None);
    let aggregator = &play.aggregator;
    aggregator.wait_for_verdict(&play.rollout, &["APPROVE"]);
    let server = format!("http://{}", aggregator.http);
    let gate = || {
        coalmine(["gate", &play.rollout, "--server", &server])
            .status
            .code()
    };
    let held_back = |view: &Value| {
        let says = |start: &str| {
            view["reason"]
                .as_str()
                .is_some_and(|reason| reason.starts_with(start))
        };
        view["recorded"] == false && view["verdict"] == "HOLD" && says("APPROVE is held back: ")
    };
    let judged = |view: &Value| view["windows_judged"].as_u64().unwrap();

    play.cutter.refuse(true);
    let first = eventually("the approval is held back", || play.view().filter(held_back));
    assert_eq!(gate(), Some(2), "the gate is shut");
    all_hold_back(aggregator.http, &play.rollout, || {});
    let unready = eventually("the aggregator is not ready", || {
        let answer = get(aggregator.admin, "/readyz").ok()?;
        (answer.status == 503).then_some(answer)
    });
    assert!(unready.body.contains("database"), "{:?}", unready.body);
    eventually("the metric says so", || {
        let metrics = get(aggregator.admin, "/metrics").ok()?.body;
        metrics.contains("coalmine_audit_writable 0\n").then_some(())
    });
    // Judging goes on meanwhile.
    eventually("more windows are judged", || {
        play.view()
            .filter(|view| held_back(view) && judged(view) >= judged(&first) + 2)
    });

    play.cutter.refuse(false);
    aggregator.wait_for_verdict(&play.rollout, &["APPROVE"]);
    assert_eq!(gate(), Some(0));
    eventually("the aggregator is ready again", || {
        is_ready(aggregator).then_some(())
    });
    play.goes_on();

    // A database that is there and says nothing.
    play.cutter.silence(true);
    eventually("the approval is held back", || play.view().filter(held_back));
    assert_eq!(gate(), Some(2), "the gate is shut");
    play.cutter.silence(false);
    play.goes_on();
    play.finish();
}

/// A rollout whose harm is found while the database is away. The database goes as soon as the first decision is on
/// record; where the verdict was faster than that, or needs more windows than agents send ahead, another is begun.
fn harm_without_the_database() -> (Play, Value) {
    for _ in 0..4 {
        let play = Play::begin(Some(FAILING));
        eventually("a decision is on record", || {
            play.view().filter(|view| view["recorded"] == true)
        });
        play.cutter.refuse(true);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let harm = |view: &Value| view["verdict"] == "ROLLBACK" && view["recorded"] == false;
            if let Some(shown) = play.view().filter(harm) {
                return (play, shown);
            }
            thread::park_timeout(Duration::from_millis(10));
        }
    }
    panic!("harm is not shown without a record");
}

#[test]
fn harm_is_shown_without_the_database_and_recorded_later_with_a_mark() {
    let _stage = stage();
    let (play, shown) = harm_without_the_database();
    play.cutter.refuse(false);
    eventually("it is on record", || {
        play.view().filter(|view| view["recorded"] == true)
    });
    // Either it says so itself, or a record after it does, where it was on its way already.
    let decision = &shown["decision_id"];
    let marked = |body: &Value| match body["type"].as_str() {
        Some("decision") => body["id"] == *decision && body["late"] == true,
        Some("late_record") => body["decision"] == *decision,
        _ => false,
    };
    eventually("it is marked as late", || {
        let lines = play
            .postgres
            .query("SELECT convert_from(line, 'UTF8') FROM log_entry ORDER BY seq");
        let mut records = lines
            .concat()
            .into_iter()
            .map(|line| serde_json::from_str::<Value>(&line).unwrap());
        records.find(|record| marked(&record["body"]))
    });
    play.finish();
}

#[test]
fn a_hold_that_was_answered_is_not_outrun_by_an_approval_that_was_asked_for_before() {
    let _stage = stage();
    let play = Play::begin(None);
    let decide = |verdict: &str| {
        let path = format!("/v1/rollouts/{}/override", play.rollout);
        let body = json!({ "verdict": verdict, "reason": "I have looked" });
        play.aggregator.post(&path, &body)
    };
    play.goes_on();
    assert_eq!(decide("hold").status, 200, "the first is on record at once");
    let silent_at = Instant::now();
    play.cutter.silence(true);
    // It is on its way, and nobody knows whether it arrives.
    let approve = decide("approve");
    assert_eq!(approve.status, 503, "{}", approve.body);
    let hold = decide("hold");
    assert_eq!(hold.status, 200, "{}", hold.body);
    play.cutter.silence(false);
    assert!(
        silent_at.elapsed() < Duration::from_secs(15),
        "the lease is another matter"
    );
    let overrides = eventually("all are on record", || {
        let lines = play
            .postgres
            .query("SELECT convert_from(line, 'UTF8') FROM log_entry ORDER BY seq");
        let records = lines.concat().into_iter();
        let bodies = records.map(|line| serde_json::from_str::<Value>(&line).unwrap()["body"].take());
        let overrides: Vec<_> = bodies.filter(|body| body["type"] == "override").collect();
        (overrides.len() == 3).then_some(overrides)
    });
    let verdicts: Vec<_> = overrides.iter().map(|body| &body["verdict"]).collect();
    assert_eq!(verdicts, ["HOLD", "APPROVE", "HOLD"]);
    eventually("the last one is in force, on record", || {
        let view = play.view()?;
        assert_ne!(view["verdict"], "APPROVE", "{view}");
        (view["decision_id"] == overrides[2]["id"] && view["recorded"] == true).then_some(())
    });
    assert_eq!(decide("judge").status, 422, "the judge is asked by null");
    let path = format!("/v1/rollouts/{}/override", play.rollout);
    let back = play
        .aggregator
        .post(&path, &json!({ "verdict": null, "reason": "enough" }));
    assert_eq!(back.status, 200, "{}", back.body);
    play.goes_on();
    play.finish();
}

#[test]
fn killing_the_aggregator_loses_and_doubles_nothing() {
    let _stage = stage();
    let mut play = Play::begin(None);
    for windows in [3, 6, 9] {
        let shown = eventually("some windows are judged", || {
            play.recorded().filter(|judged| *judged >= windows)
        });
        play.aggregator.kill_9();
        let begun = Instant::now();
        play.aggregator.launch();
        assert!(
            begun.elapsed() < AT_ONCE,
            "the same instance does not wait for its own lease"
        );
        let judged = play.view().unwrap()["windows_judged"].as_u64().unwrap();
        assert!(judged >= shown, "decisions that were shown are lost");
    }
    play.goes_on();
    play.finish();
}

/// What the tests above rest on.
#[test]
fn the_cutter_cuts_where_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let mut postgres = Postgres::start(directory.path());
    postgres.query("CREATE TABLE kept (n integer)");
    let cutter = Cutter::start(postgres.address);
    let url = url_at(cutter.address, SUPERUSER, DATABASE);
    let insert = || psql(&url, &["BEGIN", "INSERT INTO kept VALUES (1)", "COMMIT"]);
    let kept = |postgres: &Postgres| postgres.value("SELECT count(*) FROM kept");

    insert().unwrap();
    assert_eq!(kept(&postgres), "1");
    cutter.arm(When::Before, 2);
    insert().unwrap();
    insert().unwrap_err();
    assert_eq!(kept(&postgres), "2", "the server had no COMMIT");
    cutter.arm(When::After, 1);
    insert().unwrap_err();
    assert_eq!(kept(&postgres), "3", "the server had committed");
    insert().unwrap();
    assert_eq!((cutter.cuts(), kept(&postgres).as_str()), (2, "4"));

    for (when, meanwhile) in [(When::Before, "4"), (When::After, "6")] {
        let held = cutter.hold(when, 1);
        std::thread::scope(|scope| {
            let inserting = scope.spawn(insert);
            held.wait();
            assert_eq!(kept(&postgres), meanwhile);
            drop(held);
            inserting.join().unwrap().unwrap();
        });
    }
    assert_eq!(kept(&postgres), "6");

    cutter.refuse(true);
    insert().unwrap_err();
    cutter.refuse(false);
    insert().unwrap();
    cutter.silence(true);
    std::thread::scope(|scope| {
        let inserting = scope.spawn(insert);
        assert_eq!(kept(&postgres), "7");
        cutter.silence(false);
        inserting.join().unwrap().unwrap();
    });

    // What is committed outlives the server.
    postgres.kill_9();
    insert().unwrap_err();
    postgres.launch();
    postgres.stop_immediate();
    postgres.launch();
    within(AT_ONCE, "the way is open again", || insert().ok());
    assert_eq!(kept(&postgres), "9");
}
