//! Tests of the book: what agents say of connection pools and pods.

use coalmine_agent::pool::PoolRow;
use coalmine_judge::evidence;
use coalmine_proto::{
    names::Arm,
    v1::{HostContext, Pool, Sockets},
};

use super::{SERVICE, Sender, book, comparison};
use crate::book::{Applied, Batch, Book, BookError, DatabaseConnections, MAX_POOLS, Pools};

/// A pool that was asked for connections, some of which had to wait; a tenth of these gave up.
fn pool(name: &str, acquires: u64, waits: u64, used: u64, max: u64) -> Pool {
    Pool {
        name: name.to_owned(),
        acquires,
        waits,
        timeouts: waits / 10,
        wait_ns: waits * 2_000_000,
        used,
        idle: max.saturating_sub(used),
        max,
        waiters: u64::from(used == max),
        ..Pool::default()
    }
}

impl Sender {
    /// Sends the next window, which has no requests.
    fn says(
        &mut self,
        book: &mut Book,
        start_ms: u64,
        pools: &[Pool],
        host: Option<HostContext>,
    ) -> Result<Applied, BookError> {
        self.seq += 1;
        let said = self.says_again(book, start_ms, pools, host);
        if said.is_err() {
            self.seq -= 1;
        }
        said
    }

    /// Sends the last window once more.
    fn says_again(
        &self,
        book: &mut Book,
        start_ms: u64,
        pools: &[Pool],
        host: Option<HostContext>,
    ) -> Result<Applied, BookError> {
        let batch = Batch {
            seq: self.seq,
            start_ms,
            length_ms: 1_000,
            rows: Vec::new(),
            cumulative: self.totals(),
            gap: None,
            pools,
            host,
        };
        self.hand_in(book, &batch)
    }
}

/// A book with slots of three seconds.
fn long_slots() -> Book {
    let mut book = book();
    book.set_slot(SERVICE, 3_000);
    book
}

/// What happened at an arm's pools since the beginning, and their connections at a time.
fn shown(book: &Book, arm: Arm, now_ms: u64) -> Option<Pools> {
    let service = book.get(SERVICE).unwrap();
    service.context(|build| build.arm == arm, now_ms).pool
}

#[test]
fn events_add_up_and_connections_are_those_of_the_last_report() {
    let mut book = long_slots();
    let mut first = Sender::new(&mut book, "a", Arm::Canary, 1);
    let mut second = Sender::new(&mut book, "b", Arm::Canary, 2);
    let mut baseline = Sender::new(&mut book, "c", Arm::Baseline, 3);
    let reports = [
        vec![pool("orders", 100, 10, 5, 5), pool("stock", 7, 0, 1, 9)],
        vec![pool("orders", 50, 20, 2, 5)],
    ];
    for (start_ms, pools) in [0, 1_000].into_iter().zip(&reports) {
        assert_eq!(first.says(&mut book, start_ms, pools, None), Ok(Applied::Now));
    }
    // A pool whose maximum nobody knows has events, and says nothing of how full it is.
    let unlimited = [pool("orders", 11, 0, 3, 4), pool("", 1, 1, 40, 0)];
    second.says(&mut book, 2_000, &unlimited, None).unwrap();
    baseline
        .says(&mut book, 0, &[pool("orders", 900, 1, 4, 8)], None)
        .unwrap();
    let window = book.freeze(&comparison(), 0, 1, 4_000);
    assert_eq!(
        window.pool,
        [
            evidence::Pool {
                arm: Arm::Canary,
                acquires: 169,
                waits: 31,
                timeouts: 3,
                used: 2 + 1 + 3,
                max: 5 + 9 + 4,
                at_least: false,
                estimated: false,
                agents: Some(2),
            },
            evidence::Pool {
                arm: Arm::Baseline,
                acquires: 900,
                waits: 1,
                timeouts: 0,
                used: 4,
                max: 8,
                at_least: false,
                estimated: false,
                agents: Some(1),
            },
        ]
    );
    // It can be read back, as all evidence must be.
    let line = window.to_json();
    assert_eq!(evidence::Window::from_json(&line).unwrap(), window);
}

#[test]
fn pools_without_a_name_of_their_own_are_one() {
    let mut book = long_slots();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    for start_ms in [0, 1_000] {
        let pools = [pool("", 10, 1, 2, 5), pool("", 20, 2, 3, 5)];
        canary.says(&mut book, start_ms, &pools, None).unwrap();
    }
    let window = book.freeze(&comparison(), 0, 1, 4_000);
    let [pool] = window.pool.as_slice() else {
        panic!("{:?}", window.pool);
    };
    assert_eq!((pool.acquires, pool.waits, pool.used, pool.max), (60, 6, 5, 10));
}

#[test]
fn what_is_not_all_counted_is_said_of_the_whole_arm_and_slot() {
    let mut book = long_slots();
    let mut first = Sender::new(&mut book, "a", Arm::Canary, 1);
    let mut second = Sender::new(&mut book, "b", Arm::Canary, 2);
    let mut baseline = Sender::new(&mut book, "c", Arm::Baseline, 3);
    let exact = pool("orders", 10, 1, 1, 5);
    let at_least = Pool {
        waits_at_least: true,
        ..exact.clone()
    };
    let estimated = Pool {
        acquires_estimated: true,
        ..exact.clone()
    };
    first.says(&mut book, 0, &[at_least], None).unwrap();
    // What is said later does not take it back.
    first
        .says(&mut book, 1_000, std::slice::from_ref(&exact), None)
        .unwrap();
    second
        .says(&mut book, 0, &[pool("stock", 10, 1, 1, 5), estimated], None)
        .unwrap();
    baseline.says(&mut book, 0, &[exact], None).unwrap();
    let mut copy = long_slots();
    for piece in book.image() {
        copy.load(&piece).unwrap();
    }
    let window = book.freeze(&comparison(), 0, 1, 4_000);
    let said = |pool: &evidence::Pool| (pool.arm, pool.at_least, pool.estimated, pool.agents);
    assert_eq!(
        window.pool.iter().map(said).collect::<Vec<_>>(),
        [
            (Arm::Canary, true, true, Some(2)),
            (Arm::Baseline, false, false, Some(1)),
        ]
    );
    assert_eq!(copy.freeze(&comparison(), 0, 1, 4_000).pool, window.pool);
    let line = window.to_json();
    assert!(
        line.contains("\"max\":15,\"at_least\":true,\"estimated\":true,\"agents\":2}"),
        "{line}"
    );
}

#[test]
fn a_pool_beyond_its_maximum_does_not_make_the_others_look_full() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    let pools = [
        pool("overflowing", 10, 0, 15, 5),
        pool("idle", 10, 0, 0, 10),
        pool("unlimited", 10, 0, 40, 0),
        // Pools without a name of their own are one, of which the same holds.
        pool("", 10, 0, 15, 5),
        pool("", 10, 0, 0, 10),
    ];
    canary.says(&mut book, 0, &pools, None).unwrap();
    let window = book.freeze(&comparison(), 0, 1, 1_000);
    assert_eq!((window.pool[0].used, window.pool[0].max), (10, 30));
}

#[test]
fn the_names_of_an_agents_pools_in_a_slot_are_bounded_and_no_event_is_lost() {
    let frozen = |write_down: bool| {
        let mut book = long_slots();
        let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
        for (start_ms, letter) in [(0, 'a'), (1_000, 'b'), (2_000, 'a')] {
            let named = |n: usize| Pool {
                waits_at_least: letter == 'b',
                ..pool(&format!("{letter}{n:02}"), 10, 1, 1, 2)
            };
            let pools: Vec<Pool> = (0..MAX_POOLS).map(named).collect();
            canary.says(&mut book, start_ms, &pools, None).unwrap();
            if write_down {
                let pieces = book.image();
                let mut copy = long_slots();
                for piece in &pieces {
                    copy.load(piece).unwrap();
                }
                assert_eq!(copy.image(), pieces);
                book = copy;
                canary.connect(&mut book, 1_000 + start_ms, start_ms + 1_000);
            }
        }
        book.freeze(&comparison(), 0, 1, 60_000).pool
    };
    let pools = frozen(false);
    let most = MAX_POOLS as u64;
    assert_eq!((pools[0].acquires, pools[0].waits), (3 * 10 * most, 3 * most));
    // The connections are those of the pools that are kept.
    assert_eq!((pools[0].used, pools[0].max), (most, 2 * most));
    assert!(pools[0].at_least);
    assert_eq!(frozen(true), pools);
}

/// A batch that is refused is sent again for ever, so no agent may send one.
#[test]
fn whatever_an_application_says_of_its_pools_the_agent_sends_what_is_taken() {
    let most = u64::MAX;
    let row = PoolRow {
        name: "~".repeat(128),
        acquires: Some(0),
        acquires_estimated: false,
        waits: most,
        waits_at_least: true,
        timeouts: most,
        wait_ns: most,
        used: most,
        idle: most,
        max: most,
        waiters: most,
    };
    let uncounted = PoolRow {
        acquires: None,
        ..row.clone()
    };
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    let mut added = row.clone();
    added.add(&uncounted);
    for row in [row, uncounted, added] {
        let pools = vec![row.to_wire(); MAX_POOLS];
        let said = canary.says(&mut book, 0, &pools, None);
        assert_eq!(said, Ok(Applied::Now), "{row:?}");
    }
}

#[test]
fn evidence_has_no_pool_where_no_agent_reported_one() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    canary.window(&mut book, 0, 10, 0).unwrap();
    canary
        .says(&mut book, 1_000, &[pool("orders", 0, 0, 0, 5)], None)
        .unwrap();
    let window = book.freeze(&comparison(), 0, 1, 2_000);
    assert!(window.pool.is_empty());
    assert!(!window.to_json().contains("pool"), "{}", window.to_json());
    let window = book.freeze(&comparison(), 1_000, 2, 2_000);
    assert_eq!(window.pool.len(), 1, "an idle pool is a pool");
    // Another version's pools are not compared.
    let mut other = Sender::new(&mut book, "x", Arm::Canary, 2);
    other.who.build.version = "v3".to_owned();
    other.connect(&mut book, 500, 0);
    other
        .says(&mut book, 2_000, &[pool("orders", 9, 9, 5, 5)], None)
        .unwrap();
    assert!(book.freeze(&comparison(), 2_000, 3, 3_000).pool.is_empty());
}

#[test]
fn whoever_is_heard_first_the_evidence_is_the_same() {
    let frozen = |order: [usize; 6]| {
        let mut book = long_slots();
        let mut senders: Vec<Sender> = (0..3_u64)
            .map(|agent| Sender::new(&mut book, &format!("agent-{agent}"), Arm::Canary, 1 + agent))
            .collect();
        for agent in order {
            let number = senders[agent].seq;
            let at = agent as u64;
            let pools = [
                pool("orders", 10 + at, 3, at + number, 5),
                pool("stock", 20 * number, 2 * number, 1, 2),
            ];
            senders[agent]
                .says(&mut book, number * 1_000, &pools, None)
                .unwrap();
        }
        book.freeze(&comparison(), 0, 1, 9_000).to_json()
    };
    let alone = frozen([0, 0, 1, 1, 2, 2]);
    assert!(alone.contains("\"pool\":[{\"arm\":\"canary\""), "{alone}");
    for order in [[2, 1, 0, 2, 1, 0], [0, 1, 2, 2, 1, 0], [1, 0, 1, 2, 0, 2]] {
        assert_eq!(frozen(order), alone, "{order:?}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_whole_and_names_the_pool() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    let good = pool("orders", 10, 1, 5, 5);
    let changed = |change: fn(&mut Pool)| {
        let mut pool = good.clone();
        change(&mut pool);
        pool
    };
    for (bad, problem) in [
        (changed(|pool| pool.waits = 11), "more waits than acquires"),
        (changed(|pool| pool.timeouts = 11), "more timeouts than acquires"),
        (
            changed(|pool| pool.acquires = (1 << 32) + 1),
            "than a window can hold",
        ),
        (changed(|pool| pool.max = u64::MAX), "than a window can hold"),
        (changed(|pool| pool.wait_ns = u64::MAX), "more time was waited"),
        (changed(|pool| pool.name = "x".repeat(129)), "more than 128 bytes"),
        (
            changed(|pool| pool.name = "a\nb".to_owned()),
            "not printable ASCII",
        ),
        (
            changed(|pool| pool.name = "Größe".to_owned()),
            "not printable ASCII",
        ),
    ] {
        let error = canary
            .says(&mut book, 0, &[good.clone(), bad], None)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("the connection pool \"") && error.contains(problem),
            "{error}"
        );
    }
    let many = vec![good.clone(); MAX_POOLS + 1];
    assert_eq!(
        canary.says(&mut book, 0, &many, None),
        Err(BookError::TooManyPools(65))
    );
    assert_eq!(shown(&book, Arm::Canary, 1_000), None, "nothing was counted");
    // A name need not be a tenant's.
    let named = Pool {
        name: "HikariPool-1 (primary)".to_owned(),
        ..good
    };
    assert_eq!(canary.says(&mut book, 0, &[named], None), Ok(Applied::Now));
}

#[test]
fn a_window_that_comes_again_counts_its_pools_once() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    let pools = [pool("orders", 10, 1, 5, 5)];
    canary.says(&mut book, 0, &pools, None).unwrap();
    assert_eq!(canary.says_again(&mut book, 0, &pools, None), Ok(Applied::Before));
    let other = [pool("orders", 11, 1, 5, 5)];
    assert_eq!(
        canary.says_again(&mut book, 0, &other, None),
        Err(BookError::Changed(1))
    );
    // As it is stored again, for names alone.
    assert_eq!(canary.says_again(&mut book, 0, &[], None), Ok(Applied::Before));
    assert_eq!(shown(&book, Arm::Canary, 1_000).unwrap().acquires, 10);
    assert_eq!(book.freeze(&comparison(), 0, 1, 1_000).pool[0].acquires, 10);
}

#[test]
fn pools_that_come_after_their_slot_was_judged_are_counted_and_are_no_evidence() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    assert!(book.freeze(&comparison(), 0, 1, 11_000).pool.is_empty());
    canary
        .says(&mut book, 0, &[pool("orders", 10, 1, 5, 5)], None)
        .unwrap();
    assert!(book.freeze(&comparison(), 0, 1, 12_000).pool.is_empty());
    assert_eq!(shown(&book, Arm::Canary, 1_000).unwrap().waits, 1);
}

#[test]
fn pools_are_the_same_after_they_were_written_down_in_pieces() {
    let mut original = long_slots();
    let mut senders: Vec<Sender> = (0..5_u64)
        .map(|agent| Sender::new(&mut original, &format!("agent-{agent}"), Arm::Canary, 1 + agent))
        .collect();
    for sender in &mut senders {
        let pools = [pool("orders", 10, 1, 5, 5), pool("", 3, 0, 1, 2)];
        sender.says(&mut original, 0, &pools, None).unwrap();
    }
    let mut copy = long_slots();
    for piece in original.image() {
        copy.load(&piece).unwrap();
    }
    assert_eq!(copy.image(), original.image());

    // What changes from then on is enough to keep the copy up.
    original.keep_journal();
    assert!(original.changes().is_empty());
    let pools = [pool("orders", 20, 2, 1, 5)];
    senders[3].says(&mut original, 1_000, &pools, None).unwrap();
    let changes = original.changes();
    let of_pools = changes
        .pieces
        .iter()
        .filter(|piece| piece.key.starts_with("pools/"));
    assert_eq!(of_pools.count(), 1, "of one agent, one piece");
    for piece in &changes.pieces {
        copy.load(piece).unwrap();
    }
    assert_eq!(copy.image(), original.image());
    assert_eq!(
        shown(&copy, Arm::Canary, 0).map(|pools| (pools.acquires, pools.waits, pools.wait_ms, pools.max)),
        Some((85, 7, 14, 0)),
        "what happened is kept, what is said at present is not"
    );
    let frozen = original.freeze(&comparison(), 0, 1, 60_000);
    assert_eq!(copy.freeze(&comparison(), 0, 1, 60_000), frozen);
    assert_eq!(
        (frozen.pool[0].acquires, frozen.pool[0].used, frozen.pool[0].max),
        (85, 26, 35)
    );
    original.evict(1_000_000, |_| None);
    let removed = original.changes().removed;
    assert!(
        removed.iter().any(|(_, key)| key.starts_with("pools/0/canary/")),
        "{removed:?}"
    );
}

#[test]
fn what_agents_say_of_their_pods_is_added_up_for_each_arm_and_never_judged() {
    let mut book = book();
    let mut first = Sender::new(&mut book, "a", Arm::Canary, 1);
    let mut second = Sender::new(&mut book, "b", Arm::Canary, 2);
    let host = HostContext {
        in_flight: 3,
        connections: 10,
        cpu_us: 250_000,
        cpu_limit_milli: 1_000,
        memory_bytes: 100 << 20,
        memory_limit_bytes: 256 << 20,
        open_files: 40,
        database: Some(Sockets {
            established: 5,
            awaiting: 2,
            other: 1,
            rtt_us: 400,
            retransmits: 0,
        }),
        ..HostContext::default()
    };
    let pools = [pool("orders", 10, 1, 5, 5)];
    first.says(&mut book, 0, &pools, Some(host)).unwrap();
    let slow = Sockets {
        rtt_us: 900,
        ..host.database.unwrap()
    };
    let unlimited = HostContext {
        memory_limit_bytes: 0,
        database: Some(slow),
        ..host
    };
    second.says(&mut book, 0, &pools, Some(unlimited)).unwrap();
    let [canary, baseline] = book.contexts(&comparison(), 2_000);
    assert_eq!((baseline.agents, baseline.host, baseline.pool), (0, None, None));
    let hosts = canary.host.unwrap();
    assert_eq!((canary.agents, hosts.in_flight, hosts.open_files), (2, 6, 80));
    assert_eq!((hosts.cpu_milli, hosts.cpu_limit_milli), (500, Some(2_000)));
    assert_eq!((hosts.memory_bytes, hosts.memory_limit_bytes), (200 << 20, None));
    let database = DatabaseConnections {
        established: 10,
        awaiting: 4,
        other: 2,
        rtt_us: 900,
        retransmits: 0,
    };
    assert_eq!(hosts.database, Some(database));
    let pools = canary.pool.unwrap();
    assert_eq!((pools.used, pools.max, pools.waiters), (10, 10, 2));
    assert_eq!(
        canary.to_string(),
        "2 agents, 6 requests in flight, cpu 0.50 of 2.00 cores, memory 200 MiB, 80 open files, 10 database \
         connections (4 await an answer); pool 10 of 10 connections in use, 2 callers waiting; so far 2 of 20 acquires \
         had to wait and 0 timed out"
    );
    // It goes through JSON unharmed, as the command line reads it.
    let json = serde_json::to_value(canary).unwrap();
    assert_eq!(
        serde_json::from_value::<crate::book::ArmContext>(json).unwrap(),
        canary
    );
    // Whoever is silent is not shown, and what happened stays.
    let [canary, _] = book.contexts(&comparison(), 20_000);
    let pools = canary.pool.unwrap();
    assert_eq!((canary.agents, canary.host), (0, None));
    assert_eq!((pools.used, pools.max, pools.acquires), (0, 0, 20));
}

#[test]
fn connections_of_a_pool_that_nobody_reads_any_more_are_not_shown() {
    let mut book = book();
    let mut canary = Sender::new(&mut book, "a", Arm::Canary, 1);
    canary
        .says(&mut book, 0, &[pool("orders", 10, 1, 5, 5)], None)
        .unwrap();
    let used = |book: &Book, now_ms: u64| shown(book, Arm::Canary, now_ms).unwrap().used;
    canary.says(&mut book, 30_000, &[], None).unwrap();
    assert_eq!(used(&book, 31_000), 5, "one scrape that failed says nothing");
    canary.says(&mut book, 31_000, &[], None).unwrap();
    assert_eq!(used(&book, 32_000), 0);
}
