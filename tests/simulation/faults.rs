//! What goes wrong, and when: a plan that follows from the seed, or from a scenario.

use coalmine_proto::names::Arm;

use crate::{disk::Mood, random::Rng};

/// Faults begin until then, where the seed decides.
const FAULTS_MS: u64 = 100_000;

/// The longest delay of a link, one way.
const SLOWEST_MS: u64 = 400;

/// How one agent is set up.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// What it measures.
    pub(crate) arm: Arm,
    /// Length of its windows.
    pub(crate) window_ms: u64,
    /// Limit of its ring: a minute or less of windows.
    pub(crate) ring_bytes: usize,
    /// Limit of its tenants; a session may have four times as many.
    pub(crate) max_tenants: u64,
    /// Longest usual pause between two bursts of requests.
    pub(crate) pause_ms: u64,
    /// Delay of its link, one way.
    pub(crate) delay_ms: u64,
}

/// How a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing gets through.
    Both,
    /// Nothing gets from the agent to the aggregator.
    Out,
    /// Nothing gets from the aggregator to the agent.
    Back,
    /// Everything waits, and arrives when the link is well again.
    Held,
}

/// How a host goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Down {
    /// The process dies, and the system closes its connections.
    Crash,
    /// The power fails: nobody is told, and what was on the way is lost.
    Power,
    /// It is told to stop.
    Stop,
}

/// What a machine's clock says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The time.
    #[default]
    Right,
    /// A minute more.
    Ahead,
}

/// Something that is done to the system.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    /// The aggregator goes down, for so many milliseconds.
    AggregatorDown(Down, u64),
    /// It starts again.
    AggregatorUp,
    /// The aggregator, which was told to stop, has ended.
    AggregatorEnds(u64),
    /// The clock of the aggregator's machine goes wrong, or right: it begins anew, and refuses all agents until its
    /// clock is right again.
    AggregatorClock(Clock),
    /// An agent goes down, for so many milliseconds.
    AgentDown(usize, Down, u64),
    /// It starts again.
    AgentUp(usize),
    /// An agent's link is cut, for so many milliseconds.
    Cut(usize, Cut, u64),
    /// An agent's link is well again.
    Heal(usize),
    /// An agent's link has another delay from now on.
    Delay(usize, u64),
    /// The disk changes, for so many milliseconds.
    Disk(Mood, u64),
    /// The disk is fine again.
    DiskFine,
    /// The aggregator's log is rolled up.
    RollUp,
}

/// What happens in the simulation of a seed.
pub(crate) struct Plan {
    /// The agents.
    pub(crate) agents: Vec<Setting>,
    /// Before which agent the aggregator's host stands in the order in which hosts run.
    pub(crate) place: usize,
    /// When and what, in order.
    pub(crate) faults: Vec<(u64, Action)>,
    /// Faults end then, whether they would or not.
    pub(crate) faults_ms: u64,
    /// Whether the agents' rings are looked at until then. While an aggregator comes back they may hold the one
    /// window more that is on its way.
    pub(crate) watches_rings: bool,
    /// The log is rolled up once more so many milliseconds after all agents were told to end.
    pub(crate) last_roll_up_ms: u64,
}

impl Setting {
    fn draw(rng: &mut Rng, number: u64) -> Self {
        Self {
            arm: Arm::ALL[(number % 2) as usize],
            window_ms: rng.pick(&[1_000, 1_000, 2_000, 5_000]),
            ring_bytes: rng.pick(&[3_000, 5_000, 8_000, 12_000]),
            max_tenants: rng.pick(&[8, 20, 1_000]),
            pause_ms: rng.between(400, 2_500),
            delay_ms: rng.between(1, 80),
        }
    }
}

impl Action {
    fn draw(rng: &mut Rng, agents: usize) -> Self {
        let agent = rng.index(agents);
        let down = rng.pick(&[Down::Crash, Down::Crash, Down::Power, Down::Stop]);
        match rng.between(0, 99) {
            0..20 => Self::AggregatorDown(down, rng.between(200, 15_000)),
            20..45 => Self::AgentDown(agent, down, rng.between(7_000, 15_000)),
            45..70 => {
                let cut = rng.pick(&[Cut::Both, Cut::Both, Cut::Out, Cut::Back, Cut::Held]);
                // Short ones end before anybody notices; long ones outlast keepalives.
                let short = rng.percent(30);
                Self::Cut(agent, cut, rng.between(100, if short { 2_000 } else { 40_000 }))
            }
            70..82 => Self::Delay(agent, rng.between(1, SLOWEST_MS)),
            82..87 => Self::RollUp,
            87..95 => Self::Disk(Mood::Slow, rng.between(3_000, 20_000)),
            _ => Self::Disk(Mood::Full, rng.between(3_000, 20_000)),
        }
    }

    /// An outage so long that rings merge all that they have and then drop windows.
    fn long_outage(rng: &mut Rng, agents: usize) -> Self {
        let ms = rng.between(80_000, FAULTS_MS);
        if rng.percent(50) {
            Self::AggregatorDown(rng.pick(&[Down::Crash, Down::Power]), ms)
        } else {
            Self::Cut(rng.index(agents), Cut::Both, ms)
        }
    }
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = Rng::of(seed, 1);
        let count = rng.between(3, 6);
        let agents: Vec<Setting> = (0..count).map(|number| Setting::draw(&mut rng, number)).collect();
        let place = rng.index(agents.len() + 1);
        let mut faults: Vec<(u64, Action)> = (0..rng.between(6, 16))
            .map(|_| {
                let at_ms = rng.between(2_000, FAULTS_MS);
                (at_ms, Action::draw(&mut rng, agents.len()))
            })
            .collect();
        if rng.percent(40) {
            let at_ms = rng.between(5_000, 15_000);
            faults.push((at_ms, Action::long_outage(&mut rng, agents.len())));
        }
        faults.sort_by_key(|(at_ms, _)| *at_ms);
        Self {
            agents,
            place,
            faults,
            faults_ms: FAULTS_MS,
            watches_rings: false,
            last_roll_up_ms: rng.between(0, 400),
        }
    }
}
