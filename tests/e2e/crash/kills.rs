//! An aggregator that is killed again and again while eight agents send and a deploy tool works.
//!
//! `COALMINE_KILLS=200` kills it so often; by default it is 40 times, in about two and a half minutes. The moments are
//! not drawn: each is so many acknowledged batches, a new decision, or an answer to the deploy tool after the start
//! before; every fifth time the aggregator is killed once more while it starts. Segments and the write-ahead log are
//! small, so that seals and roll-ups are among what is interrupted.

use std::{
    env,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use coalmine_proto::{names::Arm, v1::TenantRow};
use coalmine_tests::{
    components::{Aggregator, Counts},
    eventually,
    speaker::{Speaker, now_ms},
    within,
};
use tokio::runtime::Builder;

use super::{POLICY, Promises, ask, conserves, end, end_all, start};
use crate::stage;

const KILLS: u64 = 40;

const AGENTS: u64 = 8;

const TENANTS: u32 = 20;

/// Ten windows of an agent make one of the judge.
const LENGTH_MS: u32 = 100;

/// How long an agent listens before it looks at the clock again.
const LISTEN: Duration = Duration::from_millis(20);

/// No run lasts so long.
const LONGEST: Duration = Duration::from_secs(3_600);

/// Windows that a rollout is judged by before it is ended and the next one begins.
const JUDGED: u64 = 2;

/// What those who take part tell each other.
#[derive(Debug, Default)]
struct Scene {
    /// Batches that were acknowledged as durable.
    acknowledged: AtomicU64,
    /// Decisions that were shown as recorded.
    decisions: AtomicU64,
    /// Starts and ends that were answered.
    answers: AtomicU64,
    /// Keys and names of the rollouts that were started, the newest last.
    rollouts: Mutex<Vec<(String, String)>>,
    over: AtomicBool,
}

impl Scene {
    fn rollouts(&self) -> Vec<(String, String)> {
        self.rollouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Tries until it works; none when the run is over.
    fn insist<T>(&self, what: &str, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
        within(LONGEST, what, || {
            if self.over.load(Relaxed) {
                return Some(None);
            }
            attempt().map(Some)
        })
    }
}

/// Ends the run, also when the test fails.
struct Curtain<'s>(&'s Scene);

impl Drop for Curtain<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Relaxed);
    }
}

/// Numbers that look drawn, and are the same in every run.
#[derive(Debug)]
struct Lot(u64);

impl Lot {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// Rows of a window, of some of the tenants, with every outcome that there is now and then.
    fn rows(&mut self) -> Vec<TenantRow> {
        let mut rows = Vec::new();
        for tenant in 0..TENANTS {
            if self.below(4) == 0 {
                continue;
            }
            let mut seldom = || u64::from(self.below(200) == 0);
            rows.push(TenantRow {
                tenant,
                server_error: seldom(),
                connect_failure: seldom(),
                upstream_reset: seldom(),
                timeout: seldom(),
                client_abort: seldom(),
                client_error: self.below(3),
                success: 1 + self.below(9),
                ..TenantRow::default()
            });
        }
        rows
    }
}

/// One agent: its windows follow the clock, whether the aggregator is there or not. Ends when all is durable.
async fn agent(number: u64, aggregator: SocketAddr, scene: Arc<Scene>) -> Speaker {
    let arm = if number.is_multiple_of(2) {
        Arm::Canary
    } else {
        Arm::Baseline
    };
    let tenants = (0..TENANTS).map(|tenant| format!("tenant-{tenant:02}"));
    let mut speaker = Speaker::new("checkout", &format!("agent-{number}"), arm, tenants);
    let mut lot = Lot(number);
    let mut next_ms = now_ms().next_multiple_of(u64::from(LENGTH_MS));
    loop {
        let over = scene.over.load(Relaxed);
        while !over && next_ms + u64::from(LENGTH_MS) <= now_ms() {
            speaker.count(next_ms, LENGTH_MS, lot.rows());
            next_ms += u64::from(LENGTH_MS);
        }
        if over && speaker.is_settled() {
            return speaker;
        }
        let before = speaker.durable();
        if speaker.turn(aggregator, LISTEN).await.is_err() {
            tokio::time::sleep(LISTEN).await;
        }
        scene.acknowledged.fetch_add(speaker.durable() - before, Relaxed);
    }
}

/// The deploy tool: one rollout after the other. It asks for each start twice, as one does that lost the answer.
fn deploy(http: SocketAddr, scene: &Scene) -> Promises {
    let mut promises = Promises::default();
    let mut number = 0;
    loop {
        number += 1;
        let key = format!("deploy-{number}");
        for _ in 0..2 {
            let what = format!("{key} is started");
            let Some(rollout) = scene.insist(&what, || start(http, &key)) else {
                return promises;
            };
            promises.started(&key, &rollout);
            scene.answers.fetch_add(1, Relaxed);
        }
        let rollout = promises.rollouts[&key].clone();
        let mut rollouts = scene.rollouts.lock().unwrap_or_else(PoisonError::into_inner);
        rollouts.push((key.clone(), rollout.clone()));
        drop(rollouts);
        let judged = scene.insist(&format!("{rollout} is judged"), || {
            let view = ask(http, &format!("/v1/rollouts/{rollout}"))?;
            let enough = view["windows_judged"].as_u64()? >= JUDGED || view["state"] == "halted";
            enough.then_some(())
        });
        let ended = judged.and_then(|()| scene.insist("the rollout is ended", || end(http, &rollout)));
        if ended.is_none() {
            return promises;
        }
        scene.answers.fetch_add(1, Relaxed);
        promises.ended.insert(rollout);
    }
}

/// Somebody who watches the newest rollout at the gate.
fn watch_gate(http: SocketAddr, scene: &Scene) -> Promises {
    let mut promises = Promises::default();
    scene.insist("the run is over", || {
        let (_, rollout) = scene.rollouts().pop()?;
        promises.ask_gate(http, &rollout);
        None::<()>
    });
    promises
}

/// Somebody who reads the log, and starts again what was started long ago.
fn watch_records(http: SocketAddr, scene: &Scene) -> Promises {
    let mut promises = Promises::default();
    let mut lot = Lot(1);
    scene.insist("the run is over", || {
        let rollouts = scene.rollouts();
        let (_, newest) = rollouts.last()?;
        promises.ask_records(http, newest);
        scene
            .decisions
            .fetch_max(promises.decisions.len() as u64, Relaxed);
        let (key, _) = &rollouts[lot.below(rollouts.len() as u64) as usize];
        if let Some(rollout) = start(http, key) {
            promises.started(key, &rollout);
        }
        None::<()>
    });
    promises
}

/// Waits for the moment of a kill.
fn moment(number: u64, scene: &Scene) {
    let (counter, more) = match number % 4 {
        0 => (&scene.acknowledged, 1 + number * 37 % 300),
        1 => (&scene.decisions, 1),
        2 => (&scene.acknowledged, 1),
        _ => (&scene.answers, 1),
    };
    let wanted = counter.load(Relaxed) + more;
    eventually(&format!("the moment of kill {number}"), || {
        (counter.load(Relaxed) >= wanted).then_some(())
    });
}

fn kill(number: u64, aggregator: &mut Aggregator) {
    aggregator.kill_9();
    if number % 5 == 4 {
        // It listens before it opens the log, so this is while it reads.
        aggregator.spawn();
        let admin = aggregator.admin;
        eventually("it listens again", || TcpStream::connect(admin).ok());
        aggregator.kill_9();
    }
    aggregator.launch();
}

#[test]
fn however_often_it_is_killed_nothing_is_lost_or_told_in_two_ways() {
    let _stage = stage();
    let kills = env::var("COALMINE_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number of kills"));
    let directory = tempfile::tempdir().unwrap();
    let small = ["--segment-bytes", "16384", "--windows-bytes", "262144"];
    let mut aggregator = Aggregator::prepare_with(directory.path(), POLICY).with_arguments(&small);
    aggregator.launch();
    let (grpc, http) = (aggregator.grpc, aggregator.http);
    let scene = Arc::new(Scene::default());
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let agents: Vec<_> = (0..AGENTS)
        .map(|number| runtime.spawn(agent(number, grpc, Arc::clone(&scene))))
        .collect();

    let (begun, shared) = (Instant::now(), &*scene);
    let promises = thread::scope(|scope| {
        let others =
            [deploy, watch_gate, watch_records].map(|other| scope.spawn(move || other(http, shared)));
        let curtain = Curtain(shared);
        for number in 0..kills {
            moment(number, shared);
            kill(number, &mut aggregator);
        }
        // The last start, too, gives a decision that is recorded.
        moment(1, shared);
        drop(curtain);
        let mut promises = Promises::default();
        for other in others {
            promises.merge(other.join().unwrap());
        }
        promises
    });
    eprintln!(
        "{kills} kills in {:.0} s: {} batches durable, {} decisions and {} checkpoints seen, {} rollouts ended",
        begun.elapsed().as_secs_f64(),
        scene.acknowledged.load(Relaxed),
        promises.decisions.len(),
        promises.checkpoints.len(),
        promises.ended.len()
    );
    assert!(!promises.ended.is_empty(), "no rollout was ended");

    let mut made = Counts::default();
    for agent in agents {
        let mut speaker = runtime.block_on(agent).unwrap();
        runtime.block_on(speaker.bye()).unwrap();
        made.add(speaker.made());
    }
    conserves(&aggregator, &made);
    end_all(&aggregator);
    // What is durable is there again, too.
    kill(0, &mut aggregator);
    conserves(&aggregator, &made);
    promises.hold(&mut aggregator);
}
