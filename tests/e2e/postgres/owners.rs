//! Two aggregators on one log: one writes, the other waits, and whoever has lost the log writes nothing more.

use std::{fs, process::Command, time::Duration};

use coalmine_tests::{
    components::{Aggregator, Scene},
    cutter::{Cutter, When},
    eventually,
    http::get,
    postgres::{DATABASE, Postgres, url_at},
    process::{Process, program},
    within,
};
use rustix::process::Signal;

use super::{Play, Traffic, WRITER, database, is_ready, serve};
use crate::stage;

/// A lease of 15 s has to end, and what the stopped owner left open in the database too.
const TAKEOVER: Duration = Duration::from_secs(90);

/// Starts an aggregator that a test sends signals to, and does not wait for it.
fn start(aggregator: &Aggregator, url: &str, instance: &str) -> Process {
    let mut command = Command::new(program("coalmine-aggregator"));
    command
        .args(serve(aggregator, url))
        .args(["--instance", instance]);
    Process::start(command, &aggregator.data.with_file_name("aggregator.log"))
}

/// Who has the log, and under which term.
fn lease(postgres: &Postgres) -> (String, u64) {
    let rows = postgres.query("SELECT owner, lease.term FROM lease JOIN log_head USING (log, term)");
    match rows.concat().as_slice() {
        [owner, term] => (owner.clone(), term.parse().unwrap()),
        _ => panic!("not one lease: {rows:?}"),
    }
}

#[test]
fn whoever_was_stopped_for_longer_than_its_lease_writes_nothing_more() {
    let _stage = stage();
    let directory = tempfile::tempdir().unwrap();
    let postgres = database(directory.path());
    let [first, second] = ["first", "second"].map(|name| {
        let own = directory.path().join(name);
        fs::create_dir(&own).unwrap();
        Aggregator::prepare(&own)
    });

    // The first's way to the database, and the agents' way to whoever has the log.
    let cutter = Cutter::start(postgres.address);
    let way = Cutter::plain(first.grpc);
    let mut stale = start(&first, &url_at(cutter.address, WRITER, DATABASE), "a");
    eventually("the first is ready", || {
        assert!(stale.ended().is_none(), "{}", stale.said());
        is_ready(&first).then_some(())
    });
    let scene = Scene::start(directory.path(), way.address, None);
    let traffic = Traffic::start(directory.path(), &scene, None);
    eventually("all agents report", || (first.windows() >= 3).then_some(()));
    let rollout = first.start_rollout();
    let old = first.admin;

    // The second has the same key, and waits for its turn.
    fs::create_dir(&second.data).unwrap();
    fs::copy(first.data.join("key"), second.data.join("key")).unwrap();
    let url = postgres.url(WRITER, DATABASE);
    let mut second = second.with_arguments(&["--postgres", &url, "--instance", "b"]);
    second.spawn();
    let mut play = Play {
        traffic,
        scene,
        aggregator: first,
        cutter,
        postgres,
        rollout,
        directory,
    };
    play.goes_on();
    let (owner, term) = lease(&play.postgres);
    assert_eq!(owner, "a");
    assert_eq!(second.ended(), None, "the second waits");

    // The first stops with a COMMIT on its way.
    let held = play.cutter.hold(When::Before, 1);
    held.wait();
    stale.signal(Signal::STOP);
    within(TAKEOVER, "the second takes over", || {
        assert_eq!(second.ended(), None, "the second waits");
        is_ready(&second).then_some(())
    });
    let (owner, next) = lease(&play.postgres);
    assert!(owner == "b" && next > term, "{owner} {next}, after {term}");
    play.aggregator = second;
    way.redirect(play.aggregator.grpc);
    play.goes_on();

    // It knows nothing of that, and wants to go on where it was.
    stale.signal(Signal::CONT);
    drop(held);
    let gives_up = eventually("the first steps down", || match stale.ended() {
        Some(status) => Some(!status.success()),
        None => {
            let unready = get(old, "/readyz").is_ok_and(|answer| answer.status == 503);
            unready.then_some(true)
        }
    });
    assert!(gives_up, "it ends as if all were well: {}", stale.said());
    play.goes_on();
    assert_eq!(lease(&play.postgres), ("b".to_owned(), next));

    // One that still runs would take the log when the second is killed.
    drop(stale);
    play.finish();
}
