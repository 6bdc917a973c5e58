//! Tests of the book: exactly once, whatever comes twice, late, out of order or not at all.

mod places;
mod pools;
mod roster;
mod times;

use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcome, Outcomes, TenantName},
    v1::{Gap, Pool, Totals},
};

use super::{Applied, Batch, Book, BookError, Build, Comparison, Introduction, Patience, Row};

const SERVICE: &str = "checkout";

/// An agent that counts what it sent.
struct Sender {
    who: Introduction,
    session: u64,
    seq: u64,
    sent: u64,
    failed: u64,
    gaps: u64,
    /// Length of the windows that it sends.
    length_ms: u32,
}

impl Sender {
    fn new(book: &mut Book, name: &str, arm: Arm, epoch: u64) -> Self {
        let who = Introduction {
            service: SERVICE.to_owned(),
            instance: name.to_owned(),
            build: Build {
                arm,
                version: if arm == Arm::Canary { "v2" } else { "v1" }.to_owned(),
            },
            epoch,
            first_seq: 1,
        };
        let mut sender = Self {
            who,
            session: 0,
            seq: 0,
            sent: 0,
            failed: 0,
            gaps: 0,
            length_ms: 1_000,
        };
        sender.connect(book, epoch * 100 + 1, 0);
        sender
    }

    fn connect(&mut self, book: &mut Book, session: u64, now_ms: u64) -> u64 {
        self.session = session;
        book.introduce(&self.who, session, now_ms)
    }

    /// Sends the next window: `requests` of one tenant, of which `errors` fail.
    fn window(
        &mut self,
        book: &mut Book,
        start_ms: u64,
        requests: u64,
        errors: u64,
    ) -> Result<Applied, BookError> {
        self.seq += 1;
        self.sent += requests;
        self.failed += errors;
        let seq = self.seq;
        self.send(book, seq, start_ms, requests, errors, 0)
    }

    fn send(
        &self,
        book: &mut Book,
        seq: u64,
        start_ms: u64,
        requests: u64,
        errors: u64,
        gap: u64,
    ) -> Result<Applied, BookError> {
        let tenant = book.intern(SERVICE, &TenantName::parse(b"acme").unwrap());
        let mut outcomes = Outcomes::default();
        let mut histogram = Histogram::new();
        for i in 0..requests {
            outcomes.record(if i < errors {
                Outcome::ServerError
            } else {
                Outcome::Success
            });
            histogram.record(5_000_000);
        }
        let latency = histogram.to_wire();
        let row = Row {
            tenant,
            outcomes,
            latency: Some(&latency),
            limit_us: 350_000,
            over: 0,
        };
        let batch = Batch {
            seq,
            start_ms,
            length_ms: self.length_ms,
            rows: if requests > 0 { vec![row] } else { Vec::new() },
            cumulative: self.totals(),
            gap: (gap > 0).then_some(Gap {
                requests: gap,
                ..Gap::default()
            }),
            pools: &[],
            host: None,
        };
        self.hand_in(book, &batch)
    }

    /// What it has counted since it began.
    fn totals(&self) -> Totals {
        Totals {
            requests: self.sent + self.gaps,
            errors: self.failed,
            gap_requests: self.gaps,
        }
    }

    /// The batch arrives a second after its window began.
    fn hand_in(&self, book: &mut Book, batch: &Batch<'_>) -> Result<Applied, BookError> {
        let now_ms = batch.start_ms + 1_000;
        book.apply(SERVICE, &self.who.instance, self.session, batch, now_ms)
    }
}

fn book() -> Book {
    let mut book = Book::new(
        Patience {
            grace_ms: 10_000,
            return_ms: 0,
            forget_ms: 60_000,
        },
        0,
    );
    book.set_slot(SERVICE, 1_000);
    book
}

fn comparison() -> Comparison {
    Comparison {
        service: SERVICE.to_owned(),
        canary_version: "v2".to_owned(),
        baseline_version: None,
    }
}

fn counted(book: &Book) -> u64 {
    book.get(SERVICE)
        .unwrap()
        .totals()
        .map(|(_, _, outcomes)| outcomes.seen())
        .sum()
}

#[test]
fn a_batch_counts_once_however_often_it_comes() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "a", Arm::Canary, 1);
    assert_eq!(agent.window(&mut book, 1_000, 7, 1), Ok(Applied::Now));
    assert_eq!(agent.window(&mut book, 2_000, 5, 0), Ok(Applied::Now));
    book.durable(SERVICE, "a", 1, 1);
    // The stream breaks; the agent begins again after the last durable batch.
    assert_eq!(agent.connect(&mut book, 102, 3_000), 1);
    assert_eq!(agent.send(&mut book, 2, 2_000, 5, 0, 0), Ok(Applied::Before));
    assert_eq!(agent.window(&mut book, 3_000, 3, 0), Ok(Applied::Now));
    assert_eq!(counted(&book), 15);
    assert_eq!(book.get(SERVICE).unwrap().received(), (3, 3, 1));
}

#[test]
fn what_does_not_fit_is_refused_whole() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "a", Arm::Canary, 1);
    agent.window(&mut book, 1_000, 7, 1).unwrap();
    assert_eq!(
        agent.send(&mut book, 3, 3_000, 0, 0, 0),
        Err(BookError::Order { got: 3, last: 1 })
    );
    agent.sent += 4;
    assert_eq!(
        agent.send(&mut book, 2, 2_000, 3, 0, 0),
        Err(BookError::Totals {
            what: "requests",
            said: 11,
            applied: 10,
            gaps: 0
        }),
        "a request that the agent counted and did not send"
    );
    agent.sent -= 4;
    agent.failed += 1;
    assert_eq!(
        agent.send(&mut book, 2, 2_000, 0, 0, 0),
        Err(BookError::Totals {
            what: "errors",
            said: 2,
            applied: 1,
            gaps: 0
        }),
        "an error that the agent counted and did not send"
    );
    agent.failed -= 1;
    // A newer session takes over; the older one may not send.
    let old = agent.session;
    agent.connect(&mut book, 200, 2_000);
    agent.session = old;
    assert_eq!(
        agent.send(&mut book, 2, 2_000, 0, 0, 0),
        Err(BookError::Superseded)
    );
    assert_eq!(counted(&book), 7);
}

#[test]
fn a_row_that_contradicts_itself_is_refused() {
    let mut book = book();
    let agent = Sender::new(&mut book, "a", Arm::Canary, 1);
    let tenant = book.intern(SERVICE, &TenantName::parse(b"acme").unwrap());
    let mut histogram = Histogram::new();
    histogram.record(1_000_000);
    let latency = histogram.to_wire();
    let mut outcomes = Outcomes::default();
    let mut apply = |outcomes: Outcomes, over: u64| {
        let row = Row {
            tenant,
            outcomes,
            latency: Some(&latency),
            limit_us: 1,
            over,
        };
        let cumulative = Totals {
            requests: outcomes.seen(),
            ..Totals::default()
        };
        let batch = Batch {
            seq: 1,
            start_ms: 0,
            length_ms: 1_000,
            rows: vec![row],
            cumulative,
            gap: None,
            pools: &[],
            host: None,
        };
        book.apply(SERVICE, "a", agent.session, &batch, 0)
    };
    let problem = |result: Result<Applied, BookError>| result.unwrap_err().to_string();
    assert!(problem(apply(outcomes, 0)).contains("more latencies than requests"));
    outcomes.0[Outcome::Success as usize] = u64::MAX;
    assert!(problem(apply(outcomes, 0)).contains("more requests than a window can hold"));
    outcomes.0[Outcome::Success as usize] = 1;
    assert!(problem(apply(outcomes, 2)).contains("more requests over the limit"));
    assert_eq!(apply(outcomes, 1), Ok(Applied::Now));
}

#[test]
fn declared_gaps_are_counted_as_gaps() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "a", Arm::Baseline, 1);
    agent.window(&mut book, 1_000, 7, 0).unwrap();
    agent.gaps = 40;
    agent.seq += 1;
    agent.sent += 3;
    assert_eq!(agent.send(&mut book, 2, 9_000, 3, 0, 40), Ok(Applied::Now));
    let service = book.get(SERVICE).unwrap();
    let (outcomes, gaps, late) = service.arm_totals(Arm::Baseline);
    assert_eq!(
        (
            outcomes.seen(),
            service.latency(Arm::Baseline).count(),
            gaps,
            late
        ),
        (10, 10, 40, 0)
    );
}

#[test]
fn an_agent_with_a_past_that_this_book_does_not_know_goes_on_and_its_past_is_a_gap() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "other", Arm::Canary, 1);
    agent.who = Introduction {
        instance: "a".to_owned(),
        first_seq: 6,
        ..agent.who
    };
    assert_eq!(agent.connect(&mut book, 300, 0), 5);
    agent.seq = 5;
    agent.sent = 1_000;
    assert_eq!(agent.window(&mut book, 6_000, 9, 0), Ok(Applied::Now));
    assert_eq!(agent.window(&mut book, 7_000, 1, 0), Ok(Applied::Now));
    let (outcomes, gaps, _) = book.get(SERVICE).unwrap().arm_totals(Arm::Canary);
    assert_eq!((outcomes.seen(), gaps), (10, 1_000));
}

#[test]
fn a_book_that_was_put_back_from_a_backup_goes_on_and_what_it_lost_is_a_gap() {
    let mut book = book();
    let mut agent = Sender::new(&mut book, "a", Arm::Canary, 1);
    agent.window(&mut book, 1_000, 10, 0).unwrap();
    // Three more windows with 60 requests were acknowledged by a state of the book that is gone.
    agent.seq += 3;
    agent.sent += 60;
    agent.who.first_seq = 5;
    assert_eq!(agent.connect(&mut book, 400, 5_000), 4);
    assert_eq!(agent.window(&mut book, 5_000, 5, 0), Ok(Applied::Now));
    let (outcomes, gaps, _) = book.get(SERVICE).unwrap().arm_totals(Arm::Canary);
    assert_eq!((outcomes.seen(), gaps), (15, 60));
}

#[test]
fn a_slot_is_ready_when_every_agent_has_reported_it_or_the_grace_is_over() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 1);
    for start in [9_000, 10_000] {
        canary.window(&mut book, start, 3, 0).unwrap();
    }
    baseline.window(&mut book, 9_000, 30, 0).unwrap();
    let both = comparison();
    assert!(book.is_ready(&both, 9_000, 10_000));
    assert!(!book.is_ready(&both, 10_000, 11_000), "the baseline is missing");
    assert!(book.is_ready(&both, 10_000, 21_000), "the grace is over");
    let window = book.freeze(&both, 9_000, 1, 11_000);
    assert_eq!((window.canary.reported, window.baseline.reported), (1, 1));
    assert_eq!(
        (window.rows[0].canary.requests, window.rows[0].baseline.requests),
        (3, 30)
    );
    let window = book.freeze(&both, 10_000, 2, 21_000);
    assert_eq!((window.baseline.expected, window.baseline.reported), (1, 0));
    // What comes now is counted, and is no evidence any more.
    baseline.window(&mut book, 10_000, 31, 0).unwrap();
    let (outcomes, _, late) = book.get(SERVICE).unwrap().arm_totals(Arm::Baseline);
    assert_eq!((outcomes.seen(), late), (61, 31));
}

#[test]
fn agents_that_say_bye_are_not_waited_for_and_silent_ones_are_forgotten() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 1);
    let mut leaving = Sender::new(&mut book, "b2", Arm::Baseline, 1);
    for start in [1_000, 2_000] {
        canary.window(&mut book, start, 1, 0).unwrap();
        baseline.window(&mut book, start, 1, 0).unwrap();
    }
    leaving.window(&mut book, 1_000, 1, 0).unwrap();
    assert!(!book.is_ready(&comparison(), 2_000, 3_000));
    book.disconnect(SERVICE, "b2", leaving.session, true, 3_000);
    assert!(book.is_ready(&comparison(), 2_000, 3_000));
    // An agent that vanishes is missed until it is forgotten.
    book.disconnect(SERVICE, "b", baseline.session, false, 3_000);
    canary.window(&mut book, 3_000, 1, 0).unwrap();
    assert_eq!(book.freeze(&comparison(), 3_000, 1, 20_000).baseline.expected, 1);
    assert_eq!(book.freeze(&comparison(), 4_000, 2, 70_000).baseline.expected, 0);
}

#[test]
fn a_crash_of_an_agent_leaves_a_hole_that_is_no_report() {
    let mut book = book();
    let mut first = Sender::new(&mut book, "c", Arm::Canary, 1);
    first.window(&mut book, 1_000, 1, 0).unwrap();
    let mut second = Sender::new(&mut book, "c", Arm::Canary, 2);
    second.window(&mut book, 3_000, 1, 0).unwrap();
    let reported = |book: &mut Book, slot| {
        let window = book.freeze(&comparison(), slot, slot, 60_000);
        (window.canary.expected, window.canary.reported)
    };
    assert_eq!(reported(&mut book, 1_000), (1, 1));
    assert_eq!(
        reported(&mut book, 2_000),
        (1, 0),
        "what the first life counted here is lost"
    );
    assert_eq!(reported(&mut book, 3_000), (1, 1));
}

#[test]
fn other_versions_and_services_are_not_compared() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut other = Sender::new(&mut book, "x", Arm::Canary, 1);
    other.who.build.version = "v3".to_owned();
    other.connect(&mut book, 500, 0);
    canary.window(&mut book, 1_000, 2, 0).unwrap();
    other.window(&mut book, 1_000, 50, 50).unwrap();
    let window = book.freeze(&comparison(), 1_000, 1, 5_000);
    assert_eq!((window.canary.expected, window.rows[0].canary.requests), (1, 2));
}

#[test]
fn slots_are_let_go_unless_a_rollout_waits_for_them() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    for start in (0..10).map(|i| i * 1_000) {
        canary.window(&mut book, start, 1, 0).unwrap();
    }
    book.evict(66_000, |_| Some(3_000));
    let kept = |book: &mut Book, slot| !book.freeze(&comparison(), slot, 1, 70_000).rows.is_empty();
    assert!(!kept(&mut book, 2_000) && kept(&mut book, 3_000));
    book.evict(166_000, |_| None);
    assert!(!kept(&mut book, 9_000));
    assert_eq!(counted(&book), 10, "the totals stay");
    assert_eq!(book.get(SERVICE).unwrap().latency(Arm::Canary).count(), 10);
}

/// Numbers that are the same everywhere (splitmix64, Steele, Lea, Flood 2014).
fn mixed(mut number: u64) -> u64 {
    number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// What one of so many agents sees of the pools of its arm in a window. They have 42 connections, which 1, 2, 3 and 7
/// agents can share.
fn pools_of(arm: Arm, window: u64, (agent, agents): (u64, u64), seed: u64) -> [Pool; 1] {
    let mut pool = Pool {
        name: "orders".to_owned(),
        max: 42 / agents,
        ..Pool::default()
    };
    for acquire in 0..200 {
        let lot = mixed(acquire << 32 | window << 16 | 0xff << 8 | arm as u64);
        if mixed(lot ^ seed) % agents == agent {
            pool.acquires += 1;
            pool.waits += u64::from(lot % 100 < if arm == Arm::Canary { 12 } else { 1 });
        }
    }
    if window.is_multiple_of(3) {
        pool.used = pool.max;
    }
    [pool]
}

/// The judge's lines on thirty windows of the same requests, shared between so many agents of each arm, whose batches
/// arrive in an order that `seed` decides.
fn judged(agents: u64, seed: u64) -> Vec<String> {
    const POLICY: &str = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
        defaults: { errors: { max_rate: 1% }, latency: { p99: 350ms }, pool: { max_wait_rate: 2% },
            judge_window: 1s } }";
    let policy = coalmine_judge::policy::Policy::parse(POLICY).unwrap();
    let mut judge = coalmine_judge::v1::Judge::new(policy, None, None).unwrap();
    let mut book = book();
    let names: Vec<(Arm, u64)> = Arm::ALL
        .into_iter()
        .flat_map(|arm| (0..agents).map(move |agent| (arm, agent)))
        .collect();
    let mut senders: Vec<Sender> = names
        .iter()
        .map(|(arm, agent)| Sender::new(&mut book, &format!("{arm}-{agent}"), *arm, 1 + agent))
        .collect();
    let mut errors_sent = vec![0; senders.len()];
    // Each agent's next window; the agent whose turn it is is drawn by lot.
    let mut next = vec![1_u64; senders.len()];
    let mut draw = seed;
    while next.iter().any(|window| *window <= 30) {
        draw = mixed(draw);
        let at = (draw % senders.len() as u64) as usize;
        let window = next[at];
        if window > 30 {
            continue;
        }
        next[at] += 1;
        let (arm, agent) = names[at];
        let sender = &mut senders[at];
        let rows: Vec<_> = (0..6)
            .map(|tenant: u64| {
                let mut outcomes = Outcomes::default();
                let mut histogram = Histogram::new();
                let mut over = 0;
                let all = if arm == Arm::Canary { 60 } else { 300 };
                for request in 0..all / (tenant + 1) {
                    let lot = mixed(request << 32 | window << 16 | tenant << 8 | arm as u64);
                    // Which agent sees a request depends on the number of agents, what happens to it does not.
                    if mixed(lot ^ seed) % agents != agent {
                        continue;
                    }
                    let failed = lot % 100 < if tenant == 2 && arm == Arm::Canary { 15 } else { 1 };
                    outcomes.record(if failed {
                        Outcome::ServerError
                    } else {
                        Outcome::Success
                    });
                    let ns = 1_000_000 + (lot >> 20) % 400_000_000;
                    histogram.record(ns);
                    over += u64::from(ns > 350_000_000);
                }
                let name = TenantName::parse(format!("tenant-{tenant}").as_bytes()).unwrap();
                (book.intern(SERVICE, &name), outcomes, histogram.to_wire(), over)
            })
            .collect();
        sender.seq += 1;
        sender.sent += rows.iter().map(|(_, outcomes, ..)| outcomes.seen()).sum::<u64>();
        errors_sent[at] += rows
            .iter()
            .map(|(_, outcomes, ..)| outcomes.errors())
            .sum::<u64>();
        let rows = rows.iter().map(|(tenant, outcomes, latency, over)| Row {
            tenant: *tenant,
            outcomes: *outcomes,
            latency: Some(latency),
            limit_us: 350_000,
            over: *over,
        });
        let pools = pools_of(arm, window, (agent, agents), seed);
        let batch = Batch {
            seq: sender.seq,
            start_ms: window * 1_000,
            length_ms: 1_000,
            rows: rows.collect(),
            cumulative: Totals {
                requests: sender.sent,
                errors: errors_sent[at],
                gap_requests: 0,
            },
            gap: None,
            pools: &pools,
            host: None,
        };
        let (instance, session) = (sender.who.instance.clone(), sender.session);
        book.apply(SERVICE, &instance, session, &batch, 31_000).unwrap();
    }
    (1..=30)
        .map(|window| {
            let frozen = book.freeze(&comparison(), window * 1_000, window, 40_000);
            assert_eq!(
                (
                    u64::from(frozen.canary.reported),
                    frozen.rows.len(),
                    frozen.pool.len()
                ),
                (agents, 6, 2)
            );
            judge.step(&frozen).unwrap().to_json()
        })
        .collect()
}

#[test]
fn however_requests_are_shared_between_agents_and_whenever_they_arrive_the_judge_says_the_same() {
    let alone = judged(1, 1);
    assert!(
        alone.last().unwrap().contains("\"verdict\":\"ROLLBACK\""),
        "{alone:?}"
    );
    assert!(
        alone.iter().any(|line| line.contains("\"metric\":\"pool\"")),
        "{alone:?}"
    );
    for (agents, seed) in [(1, 2), (2, 3), (3, 4), (7, 5), (7, 6)] {
        assert_eq!(judged(agents, seed), alone, "{agents} agents, seed {seed}");
    }
}

/// A book that was put together from pieces is the same as the one that they are from.
#[test]
fn a_book_is_the_same_after_it_was_written_down_in_pieces() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    let mut baseline = Sender::new(&mut book, "b", Arm::Baseline, 2);
    canary.window(&mut book, 0, 10, 1).unwrap();
    baseline.window(&mut book, 0, 90, 2).unwrap();
    let mut copy = self::book();
    for piece in book.image() {
        copy.load(&piece).unwrap();
    }
    assert_eq!(copy.image(), book.image());

    // What changes from then on is enough to keep the copy up.
    book.keep_journal();
    assert!(book.changes().is_empty());
    canary.window(&mut book, 1_000, 7, 0).unwrap();
    let changes = book.changes();
    assert!(!changes.pieces.is_empty() && changes.removed.is_empty());
    for piece in &changes.pieces {
        if !piece.key.starts_with("names") {
            copy.load(piece).unwrap();
        }
    }
    assert_eq!(copy.image(), book.image());
    let comparison = comparison();
    let frozen = book.freeze(&comparison, 0, 1, 60_000);
    assert_eq!(copy.freeze(&comparison, 0, 1, 60_000), frozen);
    assert!(book.changes().pieces.iter().any(|piece| piece.key == "counts"));
    book.evict(1_000_000, |_| None);
    let changes = book.changes();
    assert!(
        changes
            .removed
            .iter()
            .any(|(_, key)| key.starts_with("slot/0/canary/0/")),
        "{changes:?}"
    );
}

#[test]
fn a_batch_that_comes_again_with_another_content_is_refused() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "c", Arm::Canary, 1);
    canary.window(&mut book, 0, 10, 1).unwrap();
    canary.seq -= 1;
    canary.sent -= 10;
    assert_eq!(canary.window(&mut book, 0, 10, 1), Ok(Applied::Before));
    canary.seq -= 1;
    canary.sent -= 10;
    assert_eq!(canary.window(&mut book, 0, 11, 1), Err(BookError::Changed(1)));
}
