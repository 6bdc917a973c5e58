//! A flood of made-up tenants: everything is counted, and the agent does not grow with the number of names.

use std::{fmt::Write as _, io::Write as _};

use coalmine_proto::{names::OVERFLOW_TENANT, v1};

use crate::{
    aggregator::Aggregator,
    program::Program,
    stage::{OK, answer_all, get},
    support::{Upstream, eventually, read_exactly},
};

/// Names that nobody has heard of, each in one request.
const SPOOFED: usize = 10_000;

/// As in --max-tenants.
const MAX_TENANTS: usize = 1_000;

/// Tenants that the policy lists.
const LISTED: [&str; 5] = ["acme", "borealis", "cumulus", "delta", "zenith"];

/// How many made-up names come between two requests of each tenant that is listed.
const TOGETHER: usize = 100;

/// What the agent may grow by: the names and counts of the tenants that it tells apart, and windows on their way.
const GROWTH_BYTES: u64 = 16 << 20;

fn listed() -> v1::Config {
    let limits = LISTED.map(|name| v1::TenantLimit {
        tenant: name.to_owned(),
        limit_us: 60_000_000,
    });
    v1::Config {
        version: 7,
        limits: limits.to_vec(),
        ..v1::Config::default()
    }
}

#[test]
fn ten_thousand_made_up_tenants_are_counted_in_bounded_memory() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    aggregator.told().config = Some(listed());
    let most = format!("--max-tenants={MAX_TENANTS}");
    let options = ["--window=1s", most.as_str()];
    let agent = Program::with(upstream.address(), &aggregator.url(), &options);
    answer_all(upstream);
    eventually("the limits are known", || {
        !aggregator.told().config_applied.is_empty()
    });
    let mut client = agent.client();
    client.write_all(&get(LISTED[0])).unwrap();
    assert_eq!(read_exactly(&mut client, OK.len()), OK);
    let before = agent.resident();
    for first in (0..SPOOFED).step_by(TOGETHER) {
        let mut requests = String::new();
        let spoofed = (first..first + TOGETHER).map(|number| format!("spoofed-{number:05}-{:064}", 0));
        for name in spoofed.chain(LISTED.map(str::to_owned)) {
            write!(requests, "GET / HTTP/1.1\r\nhost: h\r\nx-tenant: {name}\r\n\r\n").unwrap();
        }
        client.write_all(requests.as_bytes()).unwrap();
        let answers = OK.len() * (TOGETHER + LISTED.len());
        assert_eq!(read_exactly(&mut client, answers).len(), answers);
    }
    let rounds = (SPOOFED / TOGETHER) as u64;
    let sent = 1 + SPOOFED as u64 + rounds * LISTED.len() as u64;
    agent.expect("requests_total{outcome=\"success\"}", sent);
    let grown = agent.resident().saturating_sub(before);
    assert!(
        grown <= GROWTH_BYTES,
        "{SPOOFED} names take {grown} bytes; at most {GROWTH_BYTES} are allowed"
    );
    let folded = agent.metric("tenant_overflow_requests_total");
    assert!(agent.metric("tenants") <= (MAX_TENANTS + LISTED.len()) as u64);
    drop(client);
    agent.stop();

    let told = aggregator.told();
    assert_eq!(told.requests.values().sum::<u64>(), sent, "each is in one row");
    assert!(told.applied.iter().all(|batch| batch.gap.is_none()));
    // Those of the policy are counted for themselves, whatever else comes.
    for (number, name) in LISTED.iter().enumerate() {
        assert_eq!(told.requests[*name], rounds + u64::from(number == 0), "{name}");
    }
    assert_eq!(told.requests[OVERFLOW_TENANT], folded);
    assert!(folded >= (SPOOFED - MAX_TENANTS) as u64, "{folded} are folded");
    for batch in &told.applied {
        // Beside the tenants that are told apart, those that are listed, and the two that are no tenants.
        assert!(batch.rows.len() <= MAX_TENANTS + LISTED.len() + 2);
    }
}
