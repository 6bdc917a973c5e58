//! An agent that may open no more files: the one fault that is its own, and not the service's.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
};

use coalmine_proto::names::Outcome;

use crate::{
    aggregator::Aggregator,
    program::Program,
    stage::{self, OK, answer_all, get},
    support::{Upstream, eventually, read_exactly},
};

/// Files of a connection: the client's and the application's.
const FILES_EACH: usize = 2;

/// Connections for which there are files.
const ROOM: usize = 2;

/// Asks once; false if the connection is reset.
fn is_served(client: &mut TcpStream) -> bool {
    let mut answer = [0; OK.len()];
    let asked = client.write_all(&get("files"));
    match asked.and_then(|()| client.read_exact(&mut answer)) {
        Ok(()) => {
            assert_eq!(answer, OK);
            true
        }
        Err(error) => {
            // The reset may come before all is written.
            let is_reset = matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
            assert!(is_reset, "{error}");
            false
        }
    }
}

#[test]
fn without_files_clients_wait_or_are_reset_and_nobody_is_blamed() {
    let (upstream, aggregator) = (Upstream::new(), Aggregator::start());
    let options = ["--window=50ms", "--pool-port=0"];
    let agent = Program::with(upstream.address(), &aggregator.url(), &options);
    answer_all(upstream);
    let mut first = agent.client();
    assert!(is_served(&mut first));
    agent.expect("session_connected", 1);
    let (mut served, mut reset) = (1, 0);

    // One file more than for these: a client can be accepted, and the application not be dialled.
    agent.leave_files(ROOM * FILES_EACH + 1);
    let mut inside = Vec::new();
    while reset < 5 {
        let mut client = agent.client();
        if is_served(&mut client) {
            served += 1;
            inside.push(client);
        } else {
            reset += 1;
        }
        assert!(inside.len() <= ROOM, "more are served than there are files for");
    }
    agent.expect("dial_exhausted_total", reset);
    agent.expect("requests_total{outcome=\"connect_failure\"}", 0);
    agent.expect("requests_total{outcome=\"success\"}", served);
    // Those that are inside do not notice.
    for client in &mut inside {
        assert!(is_served(client));
        served += 1;
    }

    // One leaves, and others are served in its place.
    assert!(inside.pop().is_some(), "some were served");
    eventually("others are served", || {
        let is_served = is_served(&mut agent.client());
        served += u64::from(is_served);
        reset += u64::from(!is_served);
        is_served
    });
    agent.expect("dial_exhausted_total", reset);

    // Now no client can be accepted at all: it waits.
    agent.leave_files(0);
    let mut waiting = agent.client();
    waiting.write_all(&get("files")).unwrap();
    for _ in 0..100 {
        assert!(is_served(&mut first));
        served += 1;
    }
    agent.restore_files();
    assert_eq!(read_exactly(&mut waiting, OK.len()), OK);
    served += 1;

    // The last is known to have been answered before all are closed.
    agent.expect("requests_total{outcome=\"success\"}", served);
    drop((first, inside, waiting));
    agent.stop();
    stage::check(&aggregator, &[("files", Outcome::Success, served)]);
}
