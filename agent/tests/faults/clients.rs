//! Clients that go away in the middle of something: never the service's fault, and counted only once they had asked.

use std::{
    io::{ErrorKind, Write},
    net::{Shutdown, TcpStream},
};

use coalmine_proto::names::Outcome;

use crate::{
    stage::{OK, Stage, exchange, get},
    support::{self, read_all, read_exactly},
};

const HALF_A_BODY: &[u8] = b"POST / HTTP/1.1\r\nhost: h\r\nx-tenant: acme\r\ncontent-length: 10\r\n\r\nhello";

const HALF_AN_ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";

#[track_caller]
fn is_reset(stream: &mut TcpStream) {
    let error = read_all(stream).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_client_that_leaves_in_a_head_has_not_asked() {
    let stage = Stage::new();
    let head = get("acme");
    for length in [1, 3, 4, 20, head.len() - 1] {
        let (client, mut server) = stage.ask(&head[..length]);
        drop(client);
        assert_eq!(read_all(&mut server).unwrap(), b"", "{length} bytes of a head");
        let (client, mut server) = stage.ask(&head[..length]);
        support::reset(client);
        is_reset(&mut server);
    }
    stage.ends(&[]);
}

#[test]
fn a_client_that_leaves_in_its_request_aborts() {
    let stage = Stage::new();
    let (client, mut server) = stage.ask(HALF_A_BODY);
    support::reset(client);
    is_reset(&mut server);
    let (client, mut server) = stage.ask(HALF_A_BODY);
    drop(client);
    assert_eq!(read_all(&mut server).unwrap(), b"");
    // What most servers do when they see that the client is gone.
    drop(server);
    stage.ends(&[("acme", Outcome::ClientAbort, 2)]);
}

#[test]
fn a_client_that_leaves_in_an_answer_aborts() {
    let stage = Stage::new();
    let (mut client, mut server) = stage.ask(&get("acme"));
    server.write_all(HALF_AN_ANSWER).unwrap();
    assert_eq!(read_exactly(&mut client, HALF_AN_ANSWER.len()), HALF_AN_ANSWER);
    support::reset(client);
    is_reset(&mut server);

    // With a close the application learns of it only when it goes on.
    let (mut client, mut server) = stage.ask(&get("acme"));
    server.write_all(HALF_AN_ANSWER).unwrap();
    assert_eq!(read_exactly(&mut client, HALF_AN_ANSWER.len()), HALF_AN_ANSWER);
    drop(client);
    assert_eq!(read_all(&mut server).unwrap(), b"");
    drop(server);
    stage.ends(&[("acme", Outcome::ClientAbort, 2)]);
}

#[test]
fn a_client_that_only_says_that_it_has_asked_all_gets_its_answer() {
    let stage = Stage::new();
    let (mut client, mut server) = stage.ask(&get("acme"));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut server).unwrap(), b"");
    server.write_all(OK).unwrap();
    drop(server);
    assert_eq!(read_all(&mut client).unwrap(), OK);
    stage.ends(&[("acme", Outcome::Success, 1)]);
}

#[test]
fn of_several_requests_those_that_were_answered_count_as_answered() {
    let stage = Stage::new();
    let three = [get("a"), get("b"), get("c")].concat();
    let (mut client, mut server) = stage.ask(&three);
    server.write_all(OK).unwrap();
    server.write_all(HALF_AN_ANSWER).unwrap();
    let seen = [OK, HALF_AN_ANSWER].concat();
    assert_eq!(read_exactly(&mut client, seen.len()), seen);
    support::reset(client);
    is_reset(&mut server);
    stage.ends(&[
        ("a", Outcome::Success, 1),
        ("b", Outcome::ClientAbort, 1),
        ("c", Outcome::ClientAbort, 1),
    ]);
}

#[test]
fn others_do_not_notice() {
    let stage = Stage::new();
    let (mut other, mut other_server) = stage.ask(&get("other"));
    other_server.write_all(OK).unwrap();
    assert_eq!(read_exactly(&mut other, OK.len()), OK);
    for _ in 0..50 {
        let (client, mut server) = stage.ask(HALF_A_BODY);
        support::reset(client);
        is_reset(&mut server);
        exchange(&mut other, &mut other_server, &get("other"));
    }
    drop(other);
    stage.ends(&[
        ("acme", Outcome::ClientAbort, 50),
        ("other", Outcome::Success, 51),
    ]);
}
