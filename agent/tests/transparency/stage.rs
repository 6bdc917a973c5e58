//! Plays a case twice, directly and through an agent, and compares: what both sides saw, and what the agent
//! counted with what the case says.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use coalmine_agent::{config::Config, observer::Opaque};
use coalmine_proto::names::{Outcome, Outcomes};

use crate::{
    aggregator::Aggregator,
    messages::{OK, get},
    script::{Seen, Step, play, read, send_all},
    support::{Agent, PATIENCE, series},
};

/// How long the header of the PROXY protocol is, version 2, for TCP over IPv4 (haproxy.org,
/// doc/proxy-protocol.txt, section 2.2).
const ANNOUNCEMENT_BYTES: usize = 28;

/// All of it before the ports, on loopback: the signature, version and command, family, length, both addresses.
const ANNOUNCEMENT: &[u8; ANNOUNCEMENT_BYTES - 4] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01";

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
    /// Requests that no correct server accepts.
    malformed: u64,
    /// Requests that are not followed to their end, where the case says how many; otherwise none, of a connection that
    /// is followed to its end.
    unfollowed: Option<u64>,
    /// The agent says who the client is.
    is_announced: bool,
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
    malformed: u64,
    unfollowed: u64,
    /// Answers whose time to the first byte was taken.
    first_bytes: u64,
    /// Bytes that were passed on to the application, and to clients.
    received_bytes: u64,
    sent_bytes: u64,
}

/// Bytes that each side has sent, and the other has read.
#[derive(Debug, Default)]
struct Traffic {
    sent_up: u64,
    read_up: u64,
    sent_down: u64,
    read_down: u64,
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
            malformed: 0,
            unfollowed: None,
            is_announced: false,
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

    /// So many requests are ones that no correct server accepts: they are counted as that and nothing else.
    pub(crate) fn malformed(mut self, count: u64) -> Self {
        self.malformed = count;
        self
    }

    /// So many requests are not followed to their end, and not counted.
    pub(crate) fn unfollowed(mut self, count: u64) -> Self {
        self.unfollowed = Some(count);
        self
    }

    /// The agent says who the client is, before the first byte of the client; nothing else is different.
    pub(crate) fn announced(mut self) -> Self {
        self.is_announced = true;
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
        let stage = Stage::with(address, |config| {
            config.tenant = self.rules.iter().map(|rule| rule.parse().unwrap()).collect();
            config.proxy_protocol = self.is_announced;
        });
        let through = self
            .play_through(&stage, &listener)
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
        let mut traffic = Traffic::default();
        traffic.add(&through);
        let mut connections = 1;
        let mut expected = self.counted.clone();
        if self.is_followed {
            connections += 1;
            let mut next = Self::exchange("the next connection", get("next"), OK);
            next.is_announced = self.is_announced;
            let seen = next
                .play_through(&stage, &listener)
                .map_err(|why| format!("the next connection: {why}"))?;
            traffic.add(&seen);
            let tenant = if self.rules == ["header:x-tenant"] {
                "next"
            } else {
                "__none__"
            };
            *expected.entry((tenant.to_owned(), Outcome::Success)).or_default() += 1;
        }
        let counts = stage.finish(connections)?;
        self.judge(&counts, &expected)?;
        counts.judge_first_bytes()?;
        traffic.judge(&counts)
    }

    fn play(&self, address: SocketAddr, listener: &TcpListener) -> Result<Seen, String> {
        play(address, listener, &self.client, &self.application)
    }

    /// Plays it through the agent. What the agent says of the client is looked at, and is not part of what the
    /// application sees.
    fn play_through(&self, stage: &Stage, listener: &TcpListener) -> Result<Seen, String> {
        if !self.is_announced {
            return self.play(stage.address(), listener);
        }
        let mut application = vec![Step::Read(ANNOUNCEMENT_BYTES)];
        application.extend_from_slice(&self.application);
        let mut seen = play(stage.address(), listener, &self.client, &application)?;
        let announcement: Vec<u8> = seen.application.bytes.drain(..ANNOUNCEMENT_BYTES).collect();
        let (before_ports, ports) = announcement.split_at(ANNOUNCEMENT.len());
        // The client's port is any; the other is the one to which it has connected.
        if before_ports != ANNOUNCEMENT || ports[2..] != stage.address().port().to_be_bytes() {
            return Err(format!(
                "the client is announced with {}",
                announcement.escape_ascii()
            ));
        }
        Ok(seen)
    }

    fn judge(&self, counts: &Counts, expected: &Counted) -> Result<(), String> {
        if counts.counted != *expected {
            return Err(format!("counted {:?}, not {expected:?}", counts.counted));
        }
        if counts.malformed != self.malformed {
            return Err(format!(
                "{} requests are malformed, not {}",
                counts.malformed, self.malformed
            ));
        }
        let unfollowed = self.unfollowed.or(self.opaque.is_empty().then_some(0));
        if unfollowed.is_some_and(|expected| expected != counts.unfollowed) {
            return Err(format!(
                "{} requests are not followed, not {unfollowed:?}",
                counts.unfollowed
            ));
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

// === impl Counts ===

impl Counts {
    /// Each request that was answered has a time to the first byte of its answer.
    fn judge_first_bytes(&self) -> Result<(), String> {
        let answered = self.counted.iter().filter(|((_, of), _)| of.is_answered());
        let answered: u64 = answered.map(|(_, count)| count).sum();
        // 101 is an interim answer, behind which no final one comes (RFC 9110, section 15.2.2).
        let switched = self.opaque.get(Opaque::Upgrade.as_str()).copied().unwrap_or(0);
        if self.first_bytes + switched != answered {
            return Err(format!(
                "{} times to the first byte of {answered} answers, of which {switched} switch protocols",
                self.first_bytes
            ));
        }
        Ok(())
    }
}

// === impl Traffic ===

impl Traffic {
    fn add(&mut self, seen: &Seen) {
        self.sent_up += seen.sent_by_client;
        self.read_up += seen.application.bytes.len() as u64;
        self.sent_down += seen.sent_by_application;
        self.read_down += seen.client.bytes.len() as u64;
    }

    /// What the agent has passed on is no less than what was read, and no more than what was sent.
    fn judge(&self, counts: &Counts) -> Result<(), String> {
        for (name, read, passed, sent) in [
            ("received", self.read_up, counts.received_bytes, self.sent_up),
            ("sent", self.read_down, counts.sent_bytes, self.sent_down),
        ] {
            if passed < read || passed > sent {
                return Err(format!(
                    "{name}_bytes_total is {passed}; {read} bytes were read, and {sent} sent"
                ));
            }
        }
        Ok(())
    }
}

// === impl Stage ===

impl Stage {
    /// An agent before the application at `upstream`, with the usual rule.
    pub(crate) fn new(upstream: SocketAddr) -> Self {
        Self::with(upstream, |_| {})
    }

    fn with(upstream: SocketAddr, change: impl FnOnce(&mut Config)) -> Self {
        let aggregator = Aggregator::start();
        let agent = Agent::with(upstream, |config| {
            config.aggregator = aggregator.url();
            // The system's connections are not asked for: there are many agents.
            config.pool_port = 0;
            config.window = Duration::from_millis(10);
            change(config);
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
        let counted = counted(&told.outcomes);
        let scraped = |name: &str| metric(&text, name).ok_or_else(|| format!("there is no metric {name}"));
        let in_flight = scraped("in_flight_requests")?;
        if in_flight != 0 {
            return Err(format!("{in_flight} requests are under way when all is over"));
        }
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
            malformed: scraped("malformed_requests_total")?,
            unfollowed: scraped("unfollowed_requests_total")?,
            first_bytes: scraped("time_to_first_byte_seconds_count")?,
            received_bytes: scraped("received_bytes_total")?,
            sent_bytes: scraped("sent_bytes_total")?,
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
    series(text, name)?.parse().ok()
}

/// What the windows of an agent's only session say.
fn counted(told: &BTreeMap<String, Outcomes>) -> Counted {
    let mut counted = Counted::new();
    for (tenant, outcomes) in told {
        for outcome in Outcome::ALL {
            let count = outcomes.get(outcome);
            if count > 0 {
                counted.insert((tenant.clone(), outcome), count);
            }
        }
    }
    counted
}
