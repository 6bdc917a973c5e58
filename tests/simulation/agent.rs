//! The agents' hosts: real recorders, rings and sessions, fed with requests that follow from the seed.

use std::{collections::BTreeMap, ffi::OsString, sync::Arc, time::Duration};

use coalmine_agent::{
    Session, Surroundings,
    config::{Command, Config},
    metrics::Metrics,
    observer::{Sink, Times},
    recorder::{Recorder, Sealed, Settings},
    tenant::{Head, Header},
};
use coalmine_proto::names::{Arm, Outcome};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    account::{Burst, Life, Lives},
    aggregator::SERVICE,
    faults::Setting,
    network::{AGGREGATOR, PORT, clock, dial},
    random::{Rng, Trace},
};

/// The tenant that has requests in every burst of every agent.
pub(crate) const EVERYONE: &str = "everyone";

const TENANT_HEADER: &str = "x-tenant-id";

/// Closed windows that may wait for the session.
const WAITING_WINDOWS: usize = 64;

/// What an agent is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Requests come.
    Busy,
    /// None come, but windows are closed.
    Quiet,
    /// Close the last window and end.
    Stop,
}

/// An agent: what all its lives have in common.
pub(crate) struct Agent {
    /// Its number.
    pub(crate) number: usize,
    /// The seed of the simulation.
    pub(crate) seed: u64,
    /// How it is set up.
    pub(crate) setting: Setting,
    /// All lives of all agents.
    pub(crate) lives: Lives,
    /// What happens.
    pub(crate) trace: Trace,
}

/// The name of an agent's host, which is its instance too.
pub(crate) fn name(number: usize) -> String {
    format!("agent-{number}")
}

/// The version that an arm measures.
pub(crate) fn version(arm: Arm) -> &'static str {
    match arm {
        Arm::Canary => "v2",
        Arm::Baseline => "v1",
    }
}

/// One life of an agent's process.
pub(crate) async fn live(agent: Arc<Agent>) -> turmoil::Result {
    let config = config(&agent);
    let metrics = Metrics::new(&config, Arc::default());
    let (stage, told) = watch::channel(Stage::Busy);
    let (life, epoch, mut rng) = begin(&agent, metrics.clone(), stage);
    agent
        .trace
        .note(&format!("{}: begins life {epoch:016x}", config.instance));
    let (windows, sealed) = mpsc::channel(WAITING_WINDOWS);
    let (set_settings, settings) = watch::channel(Arc::new(Settings::default()));
    let surroundings = Surroundings {
        epoch,
        clock,
        dial: Box::new(dial),
        context: Box::new(|_| {}),
    };
    let session = Session::new(&config, sealed, set_settings, metrics, surroundings);
    let window_ms = agent.setting.window_ms;
    let rule = format!("header:{TENANT_HEADER}");
    let clients = Clients {
        life,
        name: format!("{}.{life}", agent.number),
        bursts: 0,
        pause_ms: rng.between(300, agent.setting.pause_ms),
        rng,
        lives: Arc::clone(&agent.lives),
        recorder: Recorder::new(vec![rule.parse().unwrap()], 10_000),
        window_ms,
        start_ms: clock() / window_ms * window_ms,
        windows,
        settings,
    };
    tokio::join!(clients.run(told), session.run());
    agent.lives.lock().unwrap()[life].has_ended = true;
    agent.trace.note(&format!("{}: ends", config.instance));
    Ok(())
}

/// Enters a new life; gives its index, its epoch and its numbers.
fn begin(agent: &Agent, metrics: Metrics, stage: watch::Sender<Stage>) -> (usize, u64, Rng) {
    let mut lives = agent.lives.lock().unwrap();
    let life = lives.len();
    let mut rng = Rng::of(agent.seed, 1_000 + life as u64);
    let epoch = rng.draw().max(1);
    lives.push(Life {
        agent: agent.number,
        arm: agent.setting.arm,
        epoch,
        metrics,
        stage,
        ring_bytes: agent.setting.ring_bytes,
        windows: Vec::new(),
        made: BTreeMap::new(),
        has_ended: false,
    });
    (life, epoch, rng)
}

fn config(agent: &Agent) -> Box<Config> {
    let setting = &agent.setting;
    let arguments = [
        "coalmine-agent".to_owned(),
        format!("--service={SERVICE}"),
        format!("--version={}", version(setting.arm)),
        format!("--arm={}", setting.arm),
        format!("--instance={}", name(agent.number)),
        format!("--aggregator=http://{AGGREGATOR}:{PORT}"),
        format!("--window={}ms", setting.window_ms),
        format!("--max-tenants={}", setting.max_tenants),
    ];
    let Command::Run(mut config) = Command::parse(arguments.map(OsString::from)).unwrap() else {
        panic!("the agent would print something");
    };
    // Smaller than the command line allows, so that it is full soon.
    config.ring_bytes = setting.ring_bytes;
    config
}

/// The clients of an agent, and the closing of its windows.
struct Clients {
    life: usize,
    name: String,
    bursts: u64,
    pause_ms: u64,
    rng: Rng,
    lives: Lives,
    recorder: Recorder,
    window_ms: u64,
    start_ms: u64,
    windows: mpsc::Sender<Sealed>,
    settings: watch::Receiver<Arc<Settings>>,
}

impl Clients {
    async fn run(mut self, mut stage: watch::Receiver<Stage>) {
        let mut next = self.next();
        loop {
            let now = *stage.borrow_and_update();
            if now == Stage::Stop {
                break;
            }
            let border_ms = self.window_ms - clock() % self.window_ms;
            tokio::select! {
                biased;
                told = stage.changed() => told.unwrap(),
                () = sleep_until(next), if now == Stage::Busy => {
                    self.burst();
                    next = self.next();
                }
                () = sleep(Duration::from_millis(border_ms)) => self.close(),
            }
        }
        self.start_ms = self.start_ms.min(clock() - 1);
        self.close();
    }

    fn next(&mut self) -> Instant {
        Instant::now() + Duration::from_millis(self.rng.between(self.pause_ms / 2, self.pause_ms * 3 / 2))
    }

    /// A burst of requests ends.
    fn burst(&mut self) {
        self.bursts += 1;
        let own = format!("b{}.{}", self.bursts, self.name);
        let mut burst = Burst::default();
        for _ in 0..self.rng.between(1, 5) {
            burst.own.record(self.request(&own));
            burst.shared.record(self.request(EVERYONE));
        }
        self.lives.lock().unwrap()[self.life].made.insert(own, burst);
    }

    fn request(&mut self, tenant: &str) -> Outcome {
        let outcome = self.rng.pick(&Outcome::ALL);
        let latency_ns = self.rng.between(1_000_000, 400_000_000);
        let id = self.recorder.begin(&Request(tenant));
        let times = Times {
            total_ns: latency_ns,
            first_byte_ns: Some(latency_ns / 2),
            is_stream: false,
        };
        self.recorder.end(id, outcome, times);
        outcome
    }

    /// Closes the open window, as the agent does; it stays open while nobody takes windows.
    fn close(&mut self) {
        let Ok(place) = self.windows.try_reserve() else {
            return;
        };
        let now_ms = clock();
        let length_ms = u32::try_from(now_ms - self.start_ms).unwrap();
        let window = self.recorder.seal(self.start_ms, length_ms);
        self.lives.lock().unwrap()[self.life]
            .windows
            .push((now_ms, window.bytes()));
        if self.settings.has_changed().unwrap_or(false) {
            self.recorder.apply(self.settings.borrow_and_update().clone());
        }
        self.start_ms = now_ms;
        place.send(self.recorder.sealed(window));
    }
}

/// A request, of which only the tenant matters.
struct Request<'a>(&'a str);

impl Head for Request<'_> {
    fn header(&self, name: &str) -> Header<'_> {
        if name == TENANT_HEADER {
            Header::Value(self.0.as_bytes())
        } else {
            Header::Missing
        }
    }

    fn host(&self) -> Header<'_> {
        Header::Missing
    }

    fn target(&self) -> &[u8] {
        b"/"
    }
}
