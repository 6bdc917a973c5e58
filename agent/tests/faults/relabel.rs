//! A pod whose labels change while requests go on: each request is counted once, as what the pod was then.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use coalmine_proto::{names::Arm, v1};

use crate::{
    aggregator::Aggregator,
    stage::{answer_all, requests},
    support::{Agent, Upstream, eventually},
};

/// Puts other labels into the place of those that are there, as the kubelet does.
fn label(file: &Path, arm: Arm, version: &str) {
    let text = format!("app.kubernetes.io/version=\"{version}\"\ncoalmine.dev/arm=\"{arm}\"");
    let next = file.with_extension("next");
    fs::write(&next, text).unwrap();
    fs::rename(next, file).unwrap();
}

/// An agent that is started as the baseline of v0, whatever the labels say.
fn agent(aggregator: String, labels: &Path, window_ms: u64) -> Agent {
    let upstream = Upstream::new();
    let agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator;
        config.window = Duration::from_millis(window_ms);
        (config.arm, config.version) = (Arm::Baseline, "v0".to_owned());
        config.labels_file = Some(PathBuf::from(labels));
    });
    answer_all(upstream);
    agent
}

fn says(hello: &v1::Hello, arm: Arm, version: &str) -> bool {
    hello.arm() == arm.to_wire() && hello.version == version
}

/// Requests of the tenant "load", without a pause.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Load {
    fn on(agent: SocketAddr) -> Self {
        const AT_ONCE: usize = 50;
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) {
                requests(agent, "load", AT_ONCE);
                count += AT_ONCE as u64;
            }
            count
        });
        Self { stop, thread }
    }

    /// How many there were.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn requests_are_those_of_the_arm_and_version_that_the_labels_named() {
    // What the labels say in turn, and a tenant that asks only then.
    const TURNS: [(Arm, &str, &str); 4] = [
        (Arm::Canary, "v2", "a"),
        (Arm::Baseline, "v2", "b"),
        (Arm::Baseline, "v3", "c"),
        (Arm::Canary, "v2", "d"),
    ];
    let directory = tempfile::tempdir().unwrap();
    let labels = directory.path().join("labels");
    let aggregator = Aggregator::start();
    label(&labels, TURNS[0].0, TURNS[0].1);
    let mut agent = agent(aggregator.url(), &labels, 20);
    let load = Load::on(agent.address);
    for (number, (arm, version, tenant)) in TURNS.into_iter().enumerate() {
        if number > 0 {
            // Beside the change, a session breaks: one batch is taken, and the agent is not told.
            aggregator.told().breaks_after = Some(1);
            label(&labels, arm, version);
        }
        eventually("it is measured as what the labels name", || {
            let told = aggregator.told();
            told.hellos.last().is_some_and(|hello| says(hello, arm, version))
        });
        let (_, text) = agent.get("/metrics");
        let is_build = |line: &&str| line.starts_with("coalmine_agent_build_info{");
        let builds: Vec<&str> = text.lines().filter(is_build).collect();
        let said = format!(",version=\"{version}\",arm=\"{arm}\"}} 1");
        assert!(
            matches!(builds[..], [build] if build.ends_with(&said)),
            "{builds:?}"
        );
        requests(agent.address, tenant, 7);
    }
    let sent = load.stop();
    agent.stop();
    agent.join();

    let told = aggregator.told();
    let last = (told.hellos.last().unwrap().clone(), told.requests.clone());
    let lives: Vec<_> = told.ended.iter().cloned().chain([last]).collect();
    assert_eq!(lives.len(), TURNS.len());
    let epochs: BTreeSet<u64> = lives.iter().map(|(hello, _)| hello.epoch).collect();
    assert_eq!(epochs.len(), TURNS.len());
    let mut counted = 0;
    for ((hello, mut requests), (arm, version, tenant)) in lives.into_iter().zip(TURNS) {
        assert!(says(&hello, arm, version), "{hello:?}");
        counted += requests.remove("load").unwrap_or_default();
        assert_eq!(requests, BTreeMap::from([(tenant.to_owned(), 7)]));
    }
    assert_eq!(counted, sent);
    let bye = told.bye.as_ref().unwrap();
    assert_eq!(bye.last_seq, told.applied.last().unwrap().seq);
}

#[test]
fn what_is_not_durable_at_a_change_is_sent_again_before_what_follows() {
    let directory = tempfile::tempdir().unwrap();
    let labels = directory.path().join("labels");
    label(&labels, Arm::Canary, "v2");
    let address = Aggregator::free_address();
    let first = Aggregator::on(address);
    {
        let mut told = first.told();
        (told.acknowledges, told.max_unacked) = (false, 64);
    }
    let mut agent = agent(format!("http://{address}"), &labels, 50);
    requests(agent.address, "a", 10);
    eventually("they are known, and on no disk", || {
        first.told().requests.get("a") == Some(&10)
    });
    label(&labels, Arm::Baseline, "v2");
    // Two seconds: the labels have been looked at, and windows of the baseline wait.
    let sealed = agent.metric("windows_sealed_total").unwrap();
    eventually("more windows", || {
        agent
            .metric("windows_sealed_total")
            .is_some_and(|now| now > sealed + 40)
    });
    requests(agent.address, "b", 10);
    assert_eq!(first.told().hellos.len(), 1, "the canary's are not durable");
    drop(first);
    eventually("it is gone", || TcpStream::connect(address).is_err());
    let second = Aggregator::on(address);
    eventually("the agent is back, as the baseline", || {
        let told = second.told();
        told.hellos
            .last()
            .is_some_and(|hello| says(hello, Arm::Baseline, "v2"))
    });
    agent.stop();
    agent.join();

    let told = second.told();
    let [(hello, canary)] = &told.ended[..] else {
        panic!("{:?}", told.ended);
    };
    assert!(says(hello, Arm::Canary, "v2"), "{hello:?}");
    assert_eq!(hello.oldest_seq, 1);
    assert_eq!(*canary, BTreeMap::from([("a".to_owned(), 10)]));
    assert_eq!(told.requests, BTreeMap::from([("b".to_owned(), 10)]));
    assert!(told.applied.iter().all(|batch| batch.gap.is_none()));
    assert_eq!((told.duplicates, told.bye.is_some()), (0, true));
}
