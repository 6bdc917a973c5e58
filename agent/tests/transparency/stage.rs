//! Plays a case twice, directly and through an agent, and compares: what both sides saw, and what the agent
//! counted with what the case says.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use coalmine_agent::observer::Opaque;
use coalmine_proto::names::{Outcome, Outcomes};

use crate::{
    aggregator::{Aggregator, Told},
    messages::{OK, get},
    script::{Seen, Step, play, read, send_all},
    support::{Agent, PATIENCE},
};

/// How many requests of a tenant ended how.
pub(crate) type Counted = BTreeMap<(String, Outcome), u64>;

/// An exchange, and what an agent has to count of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    name: String,
    rules: Vec<&'static str>,
    client: Vec<Step>,
    application: Vec<Step>,
    counted: Counted,
    /// Each of these is a right reason not to follow the connection; none: it is followed to its end.
    opaque: Vec<Opaque>,
    /// Another connection follows, to see that the agent lives.
    is_followed: bool,
}

/// An agent with an aggregator, between a client and an application.
pub(crate) struct Stage {
    agent: Agent,
    aggregator: Aggregator,
}

/// What an agent has counted when all is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) counted: Counted,
    /// Connections that were not followed, by reason.
    pub(crate) opaque: BTreeMap<String, u64>,
}

/// An application's listener on loopback.
pub(crate) fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

// === impl Case ===

impl Case {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rules: vec!["header:x-tenant"],
            client: Vec::new(),
            application: Vec::new(),
            counted: Counted::new(),
            opaque: Vec::new(),
            is_followed: false,
        }
    }

    /// A request and its answer, after which the client closes.
    pub(crate) fn exchange(
        name: impl Into<String>,
        request: impl AsRef<[u8]>,
        answer: impl AsRef<[u8]>,
    ) -> Self {
        Self::new(name)
            .client([send_all(&request), read(&answer), Step::Close])
            .application([read(&request), send_all(&answer), Step::ExpectEof])
    }

    /// A request and its answer, after which the application closes.
    pub(crate) fn until_close(
        name: impl Into<String>,
        request: impl AsRef<[u8]>,
        answer: impl AsRef<[u8]>,
    ) -> Self {
        Self::new(name)
            .client([send_all(&request), Step::ExpectEof, Step::Close])
            .application([read(&request), send_all(&answer), Step::Close])
    }

    /// More steps of the client.
    pub(crate) fn client(mut self, steps: impl IntoIterator<Item = Step>) -> Self {
        self.client.extend(steps);
        self
    }

    /// More steps of the application.
    pub(crate) fn application(mut self, steps: impl IntoIterator<Item = Step>) -> Self {
        self.application.extend(steps);
        self
    }

    /// The rules by which tenants are found, in place of `header:x-tenant`.
    pub(crate) fn rules(mut self, rules: impl IntoIterator<Item = &'static str>) -> Self {
        self.rules = rules.into_iter().collect();
        self
    }

    /// These requests are counted, once more for each time that they are listed.
    pub(crate) fn counts(mut self, counted: &[(&str, Outcome)]) -> Self {
        for (tenant, outcome) in counted {
            *self.counted.entry(((*tenant).to_owned(), *outcome)).or_default() += 1;
        }
        self
    }

    /// The agent stops following the connection for this reason; where several are given, each is right.
    pub(crate) fn opaque(mut self, reasons: impl IntoIterator<Item = Opaque>) -> Self {
        self.opaque.extend(reasons);
        self
    }

    /// Another connection follows, which must work.
    pub(crate) fn followed(mut self) -> Self {
        self.is_followed = true;
        self
    }

    /// Plays the case and panics where something is not as it should be.
    #[track_caller]
    pub(crate) fn check(&self) {
        if let Err(why) = self.run() {
            panic!("{}: {why}", self.name);
        }
    }

    fn run(&self) -> Result<(), String> {
        let listener = listen();
        let address = listener.local_addr().unwrap();
        let direct = self
            .play(address, &listener)
            .map_err(|why| format!("directly: {why}"))?;
        let stage = Stage::with_rules(address, &self.rules);
        let through = self
            .play(stage.address(), &listener)
            .map_err(|why| format!("through the agent: {why}"))?;
        for (side, direct, through) in [
            ("client", &direct.client, &through.client),
            ("application", &direct.application, &through.application),
        ] {
            if let Some(difference) = direct.difference(through) {
                return Err(format!(
                    "the {side} sees directly and through the agent {difference}"
                ));
            }
        }
        let mut connections = 1;
        let mut expected = self.counted.clone();
        if self.is_followed {
            connections += 1;
            let next = Self::exchange("the next connection", get("next"), OK);
            next.play(stage.address(), &listener)
                .map_err(|why| format!("the next connection: {why}"))?;
            let tenant = if self.rules == ["header:x-tenant"] {
                "next"
            } else {
                "__none__"
            };
            *expected.entry((tenant.to_owned(), Outcome::Success)).or_default() += 1;
        }
        self.judge(&stage.finish(connections)?, &expected)
    }

    fn play(&self, address: SocketAddr, listener: &TcpListener) -> Result<Seen, String> {
        play(address, listener, &self.client, &self.application)
    }

    fn judge(&self, counts: &Counts, expected: &Counted) -> Result<(), String> {
        if counts.counted != *expected {
            return Err(format!("counted {:?}, not {expected:?}", counts.counted));
        }
        let reasons: Vec<&str> = self.opaque.iter().map(|reason| reason.as_str()).collect();
        let seen: Vec<&str> = counts.opaque.keys().map(String::as_str).collect();
        let is_right = match seen[..] {
            [] => reasons.is_empty(),
            [reason] => reasons.contains(&reason) && counts.opaque.values().all(|count| *count == 1),
            _ => false,
        };
        if !is_right {
            return Err(format!(
                "not followed for {:?}, not for {reasons:?}",
                counts.opaque
            ));
        }
        Ok(())
    }
}

// === impl Stage ===

impl Stage {
    /// An agent before the application at `upstream`, with the usual rule.
    pub(crate) fn new(upstream: SocketAddr) -> Self {
        Self::with_rules(upstream, &["header:x-tenant"])
    }

    fn with_rules(upstream: SocketAddr, rules: &[&str]) -> Self {
        let aggregator = Aggregator::start();
        let agent = Agent::with(upstream, |config| {
            config.aggregator = aggregator.url();
            // The system's connections are not asked for: there are many agents.
            config.pool_port = 0;
            config.window = Duration::from_millis(10);
            config.tenant = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        });
        Self { agent, aggregator }
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.agent.address
    }

    /// The agent.
    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Waits until so many connections came and are over, stops the agent, and gives what it counted.
    pub(crate) fn finish(mut self, connections: u64) -> Result<Counts, String> {
        let text = self.settle(connections)?;
        self.agent.stop();
        self.agent.join();
        let told = self.aggregator.told();
        if told.hellos.len() != 1 {
            return Err(format!("{} sessions", told.hellos.len()));
        }
        let counted = counted(&told);
        // What was scraped and what was sent are two accounts of the same requests.
        for outcome in Outcome::ALL {
            let name = outcome.as_str();
            let scraped = metric(&text, &format!("requests_total{{outcome=\"{name}\"}}"));
            let sent: u64 = counted
                .iter()
                .filter(|((_, of), _)| *of == outcome)
                .map(|(_, count)| count)
                .sum();
            if scraped != Some(sent) {
                return Err(format!("{name}: scraped {scraped:?}, sent {sent}"));
            }
        }
        let reasons = Opaque::ALL.into_iter().filter_map(|reason| {
            let name = format!("opaque_connections_total{{reason=\"{}\"}}", reason.as_str());
            let count = metric(&text, &name).filter(|count| *count > 0)?;
            Some((reason.as_str().to_owned(), count))
        });
        Ok(Counts {
            counted,
            opaque: reasons.collect(),
        })
    }

    /// Gives the metrics of a window in which so many connections are over and none is open.
    fn settle(&self, connections: u64) -> Result<String, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (_, text) = self.agent.get("/metrics");
            let (open, total) = (metric(&text, "connections"), metric(&text, "connections_total"));
            if (open, total) == (Some(0), Some(connections)) {
                return Ok(text);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "{open:?} of {total:?} connections are open, of {connections}"
                ));
            }
            thread::park_timeout(Duration::from_millis(2));
        }
    }
}

/// The value of a metric in what was scraped, without `coalmine_agent_`.
fn metric(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| {
        let rest = line.strip_prefix("coalmine_agent_")?.strip_prefix(name)?;
        rest.strip_prefix(' ')
    });
    value?.parse().ok()
}

/// What the windows of an agent's only session say.
fn counted(told: &Told) -> Counted {
    let (mut names, mut counted) = (BTreeMap::new(), Counted::new());
    for batch in &told.applied {
        for name in &batch.names {
            names.insert(name.r#ref, name.name.clone());
        }
        for row in &batch.rows {
            let outcomes = Outcomes::from_row(row);
            for outcome in Outcome::ALL {
                let count = outcomes.get(outcome);
                if count > 0 {
                    *counted.entry((names[&row.tenant].clone(), outcome)).or_default() += count;
                }
            }
        }
    }
    counted
}
