//! One simulation: the hosts, the plan carried out, the end in order, the judgement.

use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{Arc, Mutex, Once},
    time::{Duration, UNIX_EPOCH},
};

use turmoil::{Builder, Sim};

use crate::{
    account::{Account, Lives},
    agent::{self, Agent, Stage},
    aggregator::{self, Place},
    disk::{Disk, Mood},
    faults::{Action, Clock, Cut, Down, Plan},
    network::{AGGREGATOR, START_SECONDS},
    oracle::{self, Reached},
    random::{Rng, Trace},
};

/// How far each host runs before the next does.
const TICK: Duration = Duration::from_millis(10);

/// How long an aggregator that was told to stop goes on.
const DRAIN_MS: u64 = 1_000;

/// How long everything may take to become durable once nothing goes wrong any more: the longest pause of
/// an agent and all timeouts of its connection are in it several times.
const SETTLE_MS: u64 = 180_000;

/// How long agents may take to end.
const END_MS: u64 = 20_000;

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// How a simulation went.
pub(crate) struct Outcome {
    /// What happened.
    pub(crate) trace: Vec<String>,
    /// What it has reached, or what is wrong.
    pub(crate) judged: Result<Reached, String>,
    /// The most that any ring was seen to hold, in bytes, if rings were looked at.
    pub(crate) most_ring_bytes: u64,
}

/// Runs the simulation of a seed.
pub(crate) fn run(seed: u64) -> Outcome {
    carry_out(seed, Plan::of(seed))
}

/// Runs the simulation of a plan; the seed decides what the plan does not.
pub(crate) fn carry_out(seed: u64, plan: Plan) -> Outcome {
    count_panics();
    PANICS.set(0);
    let mut run = Run::new(seed, plan);
    let mut judged = run.carry_out();
    let panics = PANICS.get();
    if panics > 0 && judged.is_ok() {
        judged = Err(format!("{panics} tasks panicked; they said why above"));
    }
    Outcome {
        trace: run.trace.lines(),
        judged,
        most_ring_bytes: run.most_ring_bytes,
    }
}

/// Counts panics by thread: those of tasks that nobody waits for would go unnoticed.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.set(PANICS.get() + 1);
            before(panic);
        }));
    });
}

struct Run {
    sim: Sim<'static>,
    trace: Trace,
    place: Place,
    lives: Lives,
    is_aggregator_up: bool,
    /// Whether each agent is up.
    agents_up: Vec<bool>,
    /// How each agent's link is cut.
    cuts: Vec<Option<Cut>>,
    /// What is to happen, by time and then by the order in which it was decided.
    due: BTreeMap<(u64, usize), Action>,
    decided: usize,
    /// Faults end then.
    faults_ms: u64,
    watches_rings: bool,
    most_ring_bytes: u64,
    last_roll_up_ms: u64,
    /// How often each kind of fault happened.
    reached: Reached,
}

impl Run {
    fn new(seed: u64, plan: Plan) -> Self {
        let trace = Trace::default();
        let lives = Lives::default();
        let place = Place {
            disk: Disk::new(Rng::of(seed, 2)),
            account: Arc::new(Mutex::new(Account::default())),
            running: Arc::default(),
            clock: Arc::default(),
            trace: trace.clone(),
        };
        let mut sim = Builder::new()
            .rng_seed(seed)
            .epoch(UNIX_EPOCH + Duration::from_secs(START_SECONDS))
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(3_600))
            .tcp_capacity(1_024)
            .build();
        let host_aggregator = |sim: &mut Sim<'static>| {
            let place = place.clone();
            sim.host(AGGREGATOR, move || aggregator::serve(place.clone()));
        };
        for (number, setting) in plan.agents.iter().enumerate() {
            if number == plan.place {
                host_aggregator(&mut sim);
            }
            let agent = Arc::new(Agent {
                number,
                seed,
                setting: setting.clone(),
                lives: Arc::clone(&lives),
                trace: trace.clone(),
            });
            sim.host(agent::name(number), move || agent::live(Arc::clone(&agent)));
        }
        if plan.place == plan.agents.len() {
            host_aggregator(&mut sim);
        }
        for (number, setting) in plan.agents.iter().enumerate() {
            let delay = Duration::from_millis(setting.delay_ms);
            sim.set_link_latency(agent::name(number), AGGREGATOR, delay);
        }
        let agents = plan.agents.len();
        let mut run = Self {
            sim,
            trace,
            place,
            lives,
            is_aggregator_up: true,
            agents_up: vec![true; agents],
            cuts: vec![None; agents],
            due: BTreeMap::new(),
            decided: 0,
            faults_ms: plan.faults_ms,
            watches_rings: plan.watches_rings,
            most_ring_bytes: 0,
            last_roll_up_ms: plan.last_roll_up_ms,
            reached: Reached::default(),
        };
        for (at_ms, action) in plan.faults {
            run.decide(at_ms, action);
        }
        run
    }

    fn carry_out(&mut self) -> Result<Reached, String> {
        self.fail_until(self.faults_ms)?;
        self.end_faults();
        // The last lives have something to count too.
        self.step_until(self.now_ms() + 5_000)?;
        self.tell(Stage::Quiet);
        self.eventually(SETTLE_MS, "all windows are durable", Self::has_settled)?;
        self.tell(Stage::Stop);
        // That an agent has ended must outlast a roll-up at any moment.
        self.later(self.last_roll_up_ms, Action::RollUp);
        self.eventually(END_MS, "all agents end", |run| {
            (0..run.agents_up.len()).all(|agent| !run.sim.is_host_running(agent::name(agent)))
        })?;
        self.eventually(END_MS, "the disk has all", |run| run.place.disk.is_idle())?;
        self.note("judgement");
        let book = {
            let running = self.place.running.lock().unwrap();
            Arc::clone(&running.as_ref().ok_or("the aggregator does not run")?.book)
        };
        let lives = self.lives.lock().unwrap();
        let account = self.place.account.lock().unwrap();
        let now_ms = START_SECONDS * 1_000 + self.now_ms();
        let judged = oracle::judge(&lives, &account, &book.lock().unwrap(), &self.place.disk, now_ms)?;
        self.reached.add(&judged);
        Ok(self.reached.clone())
    }

    /// Lets things go wrong, and looks at the rings each second.
    fn fail_until(&mut self, ms: u64) -> Result<(), String> {
        while self.watches_rings && self.now_ms() < ms {
            self.step_until(ms.min(self.now_ms() + 1_000))?;
            self.look_at_rings()?;
        }
        self.step_until(ms)
    }

    fn look_at_rings(&mut self) -> Result<(), String> {
        for life in self.lives.lock().unwrap().iter() {
            let (bytes, bound) = (life.metric("ring_bytes"), life.ring_bound());
            if bytes > bound as u64 {
                let name = agent::name(life.agent);
                return Err(format!(
                    "{name}'s ring holds {bytes} bytes; at most {bound} are allowed"
                ));
            }
            self.most_ring_bytes = self.most_ring_bytes.max(bytes);
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.sim.elapsed().as_millis()).unwrap()
    }

    fn note(&self, what: &str) {
        self.trace.note_at(self.sim.elapsed(), what);
    }

    fn decide(&mut self, at_ms: u64, action: Action) {
        self.due.insert((at_ms, self.decided), action);
        self.decided += 1;
    }

    fn later(&mut self, ms: u64, action: Action) {
        self.decide(self.now_ms() + ms, action);
    }

    /// One tick of everything.
    fn step(&mut self) -> Result<(), String> {
        while let Some(next) = self.due.first_entry()
            && next.key().0 <= u64::try_from(self.sim.elapsed().as_millis()).unwrap()
        {
            let action = next.remove();
            self.apply(action);
        }
        match self.sim.step() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("a host failed: {error}")),
        }
    }

    fn step_until(&mut self, ms: u64) -> Result<(), String> {
        while self.now_ms() < ms {
            self.step()?;
        }
        Ok(())
    }

    fn eventually(
        &mut self,
        within_ms: u64,
        what: &str,
        mut condition: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), String> {
        let deadline_ms = self.now_ms() + within_ms;
        while !condition(self) {
            if self.now_ms() > deadline_ms {
                return Err(format!("not within {within_ms} ms: {what}"));
            }
            // Asking costs more than a tick.
            self.step_until(self.now_ms() + 50)?;
        }
        Ok(())
    }

    /// Whether the aggregator has everything of the agents that run.
    fn has_settled(&mut self) -> bool {
        let lives = self.lives.lock().unwrap();
        (0..self.agents_up.len()).all(|agent| {
            let last = lives.iter().rfind(|life| life.agent == agent);
            last.is_some_and(|life| life.metric("session_connected") == 1 && life.metric("ring_bytes") == 0)
        })
    }

    /// Tells the agents that run what to do.
    fn tell(&self, stage: Stage) {
        self.note(&format!("all agents: {stage:?}"));
        for life in self.lives.lock().unwrap().iter() {
            life.stage.send_replace(stage);
        }
    }

    /// From now on nothing goes wrong.
    fn end_faults(&mut self) {
        self.note("no more faults");
        self.due.clear();
        self.place.disk.set(Mood::Fine);
        for agent in 0..self.agents_up.len() {
            self.apply(Action::Delay(agent, 5));
            self.apply(Action::Heal(agent));
            if !self.agents_up[agent] {
                self.apply(Action::AgentUp(agent));
            }
        }
        if *self.place.clock.lock().unwrap() != Clock::Right {
            self.apply(Action::AggregatorClock(Clock::Right));
        }
        if !self.is_aggregator_up {
            self.apply(Action::AggregatorUp);
        }
    }

    fn apply(&mut self, action: Action) {
        let is_possible = match action {
            Action::AggregatorDown(..) => self.is_aggregator_up,
            Action::AgentDown(agent, ..) => self.agents_up[agent],
            Action::Cut(agent, ..) => self.cuts[agent].is_none(),
            _ => true,
        };
        if !is_possible {
            return;
        }
        self.note(&format!("{action:?}"));
        match action {
            Action::AggregatorDown(down, ms) => self.aggregator_down(down, ms),
            Action::AggregatorEnds(ms) => self.crash_aggregator(ms),
            Action::AggregatorClock(clock) => {
                *self.place.clock.lock().unwrap() = clock;
                self.apply(Action::AggregatorUp);
            }
            Action::AggregatorUp => {
                // One that was told to stop may run still.
                self.kill_aggregator();
                self.sim.bounce(AGGREGATOR);
                self.is_aggregator_up = true;
            }
            Action::AgentDown(agent, down, ms) => self.agent_down(agent, down, ms),
            Action::AgentUp(agent) => {
                self.sim.bounce(agent::name(agent));
                self.agents_up[agent] = true;
            }
            Action::Cut(agent, cut, ms) => self.cut(agent, cut, ms),
            Action::Heal(agent) => {
                // Lets through what was held, and heals a cut of any kind.
                self.sim.release(agent::name(agent), AGGREGATOR);
                self.cuts[agent] = None;
            }
            Action::Delay(agent, ms) => {
                let delay = Duration::from_millis(ms);
                self.sim.set_link_latency(agent::name(agent), AGGREGATOR, delay);
            }
            Action::Disk(mood, ms) => {
                self.reached.full_disks += u64::from(mood == Mood::Full);
                self.place.disk.set(mood);
                self.later(ms, Action::DiskFine);
            }
            Action::DiskFine => self.place.disk.set(Mood::Fine),
            Action::RollUp => {
                if let Some(running) = self.place.running.lock().unwrap().as_ref() {
                    self.reached.roll_ups += 1;
                    running.roll_up(&self.place.disk);
                }
            }
        }
    }

    fn aggregator_down(&mut self, down: Down, ms: u64) {
        self.is_aggregator_up = false;
        if down == Down::Stop {
            self.reached.drains += 1;
            if let Some(running) = self.place.running.lock().unwrap().as_ref() {
                running.drain.send_replace(true);
            }
            return self.later(DRAIN_MS, Action::AggregatorEnds(ms));
        }
        if down == Down::Power {
            (0..self.cuts.len()).for_each(|agent| self.unplug(agent));
        }
        self.crash_aggregator(ms);
        if down == Down::Power {
            (0..self.cuts.len()).for_each(|agent| self.plug(agent));
        }
    }

    fn crash_aggregator(&mut self, ms: u64) {
        self.reached.aggregator_crashes += 1;
        self.kill_aggregator();
        self.later(ms, Action::AggregatorUp);
    }

    fn kill_aggregator(&mut self) {
        self.sim.crash(AGGREGATOR);
        self.place.disk.crash();
        *self.place.running.lock().unwrap() = None;
    }

    fn agent_down(&mut self, agent: usize, down: Down, ms: u64) {
        self.agents_up[agent] = false;
        self.later(ms, Action::AgentUp(agent));
        match down {
            Down::Stop => {
                let lives = self.lives.lock().unwrap();
                if let Some(life) = lives.iter().rfind(|life| life.agent == agent) {
                    life.stage.send_replace(Stage::Stop);
                }
            }
            Down::Crash => self.sim.crash(agent::name(agent)),
            Down::Power => {
                self.unplug(agent);
                self.sim.crash(agent::name(agent));
                self.plug(agent);
            }
        }
    }

    /// Loses what is on an agent's link, and all that is sent there.
    fn unplug(&self, agent: usize) {
        self.sim.partition(agent::name(agent), AGGREGATOR);
    }

    /// Heals the link unless it was cut before; it is then cut both ways until its end.
    fn plug(&self, agent: usize) {
        if self.cuts[agent].is_none() {
            self.sim.release(agent::name(agent), AGGREGATOR);
        }
    }

    fn cut(&mut self, agent: usize, cut: Cut, ms: u64) {
        let name = agent::name(agent);
        match cut {
            Cut::Both => self.sim.partition(name, AGGREGATOR),
            Cut::Out => self.sim.partition_oneway(name, AGGREGATOR),
            Cut::Back => self.sim.partition_oneway(AGGREGATOR, name),
            Cut::Held => self.sim.hold(name, AGGREGATOR),
        }
        self.reached.cuts += 1;
        self.cuts[agent] = Some(cut);
        self.later(ms, Action::Heal(agent));
    }
}
