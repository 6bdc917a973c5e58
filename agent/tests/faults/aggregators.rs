//! An aggregator that refuses, is slow, restarts, or is not there: requests go on, and the counts are exact afterwards.

use std::{ffi::OsString, net::TcpStream, sync::Arc, thread, time::Duration};

use coalmine_agent::{
    Dialling, Session, Surroundings,
    config::{Command, Config},
    metrics::Metrics,
    observer::{Sink, Times},
    recorder::{Recorder, Settings},
    tenant::{Head, Header},
};
use coalmine_proto::names::{NO_TENANT, Outcome};
use tokio::{
    runtime::Builder,
    sync::{mpsc, watch},
};
use tonic::transport::Endpoint;

use crate::{
    aggregator::Aggregator,
    stage::{answer_all, requests},
    support::{Agent, Upstream, eventually},
};

fn agent(aggregator: String, window_ms: u64) -> Agent {
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator;
        config.window = Duration::from_millis(window_ms);
    });
    answer_all(upstream);
    agent
}

/// The aggregator takes batches, many of them, and calls none durable.
fn never_durable(aggregator: &Aggregator) {
    let mut told = aggregator.told();
    (told.acknowledges, told.max_unacked) = (false, 64);
}

/// Stops the agent; the aggregator then knows exactly so many requests of each tenant.
#[track_caller]
fn ends(mut agent: Agent, aggregator: &Aggregator, expected: &[(&str, u64)]) {
    agent.stop();
    agent.join();
    let told = aggregator.told();
    let counted: Vec<(&str, u64)> = told
        .requests
        .iter()
        .map(|(name, count)| (name.as_str(), *count))
        .collect();
    assert_eq!(counted, expected);
    assert!(told.applied.iter().all(|batch| batch.gap.is_none()));
    assert!(told.bye.is_some(), "the agent ended in order");
}

#[test]
fn an_aggregator_that_refuses_gets_all_once_it_does_not() {
    let aggregator = Aggregator::start();
    aggregator.told().rejects = 3;
    let agent = agent(aggregator.url(), 20);
    requests(agent.address, "a", 10);
    eventually("it was refused", || !aggregator.told().hellos.is_empty());
    requests(agent.address, "b", 10);
    eventually("the fourth session is accepted", || {
        aggregator.told().hellos.len() == 4
    });
    requests(agent.address, "a", 10);
    ends(agent, &aggregator, &[("a", 20), ("b", 10)]);
}

#[test]
fn sessions_that_break_again_and_again_double_nothing() {
    const TIMES: usize = 4;
    let aggregator = Aggregator::start();
    let agent = agent(aggregator.url(), 20);
    for broken in 1..=TIMES {
        requests(agent.address, "a", 5);
        // The next batch is taken, and the agent is not told.
        aggregator.told().breaks_after = Some(1);
        requests(agent.address, "b", 5);
        eventually("another session", || aggregator.told().hellos.len() > broken);
    }
    let epochs: Vec<u64> = aggregator.told().hellos.iter().map(|hello| hello.epoch).collect();
    assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "{epochs:?}");
    let all = 5 * TIMES as u64;
    ends(agent, &aggregator, &[("a", all), ("b", all)]);
}

#[test]
fn an_aggregator_that_lost_what_it_had_not_called_durable_gets_it_again() {
    let address = Aggregator::free_address();
    let agent = agent(format!("http://{address}"), 200);
    requests(agent.address, "early", 7);
    let first = Aggregator::on(address);
    never_durable(&first);
    requests(agent.address, "a", 10);
    eventually("it has some, on no disk", || {
        let told = first.told();
        told.requests.get("a") == Some(&10) && told.requests.get("early") == Some(&7)
    });
    drop(first);
    eventually("it is gone", || TcpStream::connect(address).is_err());
    requests(agent.address, "b", 10);
    let second = Aggregator::on(address);
    requests(agent.address, "a", 10);
    eventually("the agent is back", || !second.told().hellos.is_empty());
    assert_eq!(second.told().hellos[0].oldest_seq, 1);
    ends(agent, &second, &[("a", 20), ("b", 10), ("early", 7)]);
}

#[test]
fn an_aggregator_that_is_slow_to_acknowledge_is_waited_for() {
    let aggregator = Aggregator::start();
    never_durable(&aggregator);
    let agent = agent(aggregator.url(), 100);
    requests(agent.address, "a", 10);
    eventually("some are on their way", || aggregator.told().applied.len() >= 3);
    agent.expect("durable_seq", 0);
    requests(agent.address, "a", 10);
    aggregator.told().acknowledges = true;
    eventually("they are durable", || {
        agent.metric("durable_seq").is_some_and(|durable| durable > 3)
    });
    assert_eq!(aggregator.told().hellos.len(), 1);
    assert_eq!(aggregator.told().duplicates, 0);
    ends(agent, &aggregator, &[("a", 20)]);
}

/// Each window is larger than the whole ring.
#[test]
fn what_is_on_its_way_to_a_slow_aggregator_leaves_no_room_for_more() {
    let address = Aggregator::free_address();
    let first = Aggregator::on(address);
    never_durable(&first);
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| {
        config.aggregator = first.url();
        config.window = Duration::from_millis(50);
        config.ring_bytes = 1;
    });
    answer_all(upstream);
    eventually("the first is on its way", || first.told().applied.len() == 1);
    requests(agent.address, "a", 10);
    let sealed = agent.metric("windows_sealed_total").unwrap();
    eventually("more windows", || {
        agent
            .metric("windows_sealed_total")
            .is_some_and(|now| now > sealed + 20)
    });
    assert_eq!(first.told().applied.len(), 1, "nothing beside it");
    drop(first);
    eventually("it is gone", || TcpStream::connect(address).is_err());
    let second = Aggregator::on(address);
    eventually("the agent is back", || !second.told().hellos.is_empty());
    ends(agent, &second, &[("a", 10)]);
}

/// A request of nobody.
struct Nobody;

impl Head for Nobody {
    fn header(&self, _: &str) -> Header<'_> {
        Header::Missing
    }

    fn host(&self) -> Header<'_> {
        Header::Missing
    }

    fn target(&self) -> &[u8] {
        b"/"
    }
}

fn config(aggregator: &str) -> Box<Config> {
    let aggregator = format!("--aggregator={aggregator}");
    let arguments = [
        "coalmine-agent",
        "--service=shop",
        "--version=v2",
        "--arm=canary",
        "--instance=pod-1",
        aggregator.as_str(),
    ];
    match Command::parse(arguments.map(OsString::from)) {
        Ok(Command::Run(config)) => config,
        other => panic!("the arguments are good: {other:?}"),
    }
}

fn surroundings() -> Surroundings {
    Surroundings {
        epoch: 1,
        clock: || 1_700_000_000_000,
        dial: Box::new(|endpoint: Endpoint| -> Dialling {
            Box::pin(async move { endpoint.connect().await })
        }),
        context: Box::new(|_| {}),
    }
}

/// Windows that are so long that no two become one: without an aggregator, a ring without room keeps only the last.
#[test]
fn a_ring_that_is_full_declares_exactly_what_it_drops() {
    const WINDOW_MS: u32 = 40_000;
    const WINDOWS: u64 = 10;
    let address = Aggregator::free_address();
    let mut config = config(&format!("http://{address}"));
    config.ring_bytes = 1;
    let metrics = Metrics::new(&config, Arc::default());
    let (windows, sealed) = mpsc::channel(WINDOWS as usize);
    let (set_settings, _settings) = watch::channel(Arc::new(Settings::default()));
    let session = thread::spawn({
        let metrics = metrics.clone();
        move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let session = Session::new(&config, sealed, set_settings, metrics, surroundings());
            runtime.block_on(session.run());
        }
    });
    let mut recorder = Recorder::new(Vec::new(), 10);
    let start = |number: u64| 1_600_000_000_000 + number * u64::from(WINDOW_MS);
    for number in 0..WINDOWS {
        // Each has another number of requests, half of them errors.
        for request in 0..10 + number {
            let id = recorder.begin(&Nobody);
            let outcome = [Outcome::Success, Outcome::ServerError][request as usize % 2];
            recorder.end(id, outcome, Times::default());
        }
        let window = recorder.seal(start(number), WINDOW_MS);
        windows.try_send(recorder.sealed(window)).unwrap();
    }
    let said = |line: String| metrics.text().unwrap().lines().any(|other| other == line);
    let dropped: u64 = (0..WINDOWS - 1).map(|number| 10 + number).sum();
    eventually("all windows are taken, and all but the last dropped", || {
        said(format!("coalmine_agent_windows_sealed_total {WINDOWS}"))
            && said(format!("coalmine_agent_gap_requests_total {dropped}"))
    });
    let aggregator = Aggregator::on(address);
    drop(windows);
    eventually("the session has ended", || session.is_finished());
    session.join().unwrap();

    let told = aggregator.told();
    let [batch] = &told.applied[..] else {
        panic!("one window was left, and {} came", told.applied.len());
    };
    let gap = batch.gap.unwrap();
    let errors: u64 = (0..WINDOWS - 1).map(|number| (10 + number) / 2).sum();
    assert_eq!(
        (gap.windows, gap.requests, gap.errors),
        (WINDOWS - 1, dropped, errors)
    );
    assert_eq!(
        (gap.start_unix_ms, gap.end_unix_ms),
        (start(0), start(WINDOWS - 1))
    );
    assert_eq!(batch.start_unix_ms, start(WINDOWS - 1));
    assert_eq!(told.requests[NO_TENANT], 10 + WINDOWS - 1);
    let totals = batch.cumulative.unwrap();
    assert_eq!(totals.gap_requests, dropped);
    assert_eq!(totals.requests, dropped + 10 + WINDOWS - 1);
}
