//! The one difference that is meant: when the application closes an idle connection of HTTP/1 and accepts
//! another, the client does not notice (relay/renew.rs says the rule). All other closes are passed on.

use std::{
    io::Write,
    net::{Shutdown, TcpListener, TcpStream},
};

use coalmine_proto::names::Outcome::Success;

use crate::{
    frames::{answer, opening, request, settings},
    messages::{OK, OK_AND_CLOSE, get},
    script::{Step, accept, connect, read, send_all},
    stage::{Case, Counted, Stage, listen},
    support::{read_all, read_exactly, reset},
};

fn exchange(client: &mut TcpStream, application: &mut TcpStream) {
    client.write_all(&get("a")).unwrap();
    assert_eq!(read_exactly(application, get("a").len()), get("a"));
    application.write_all(OK).unwrap();
    assert_eq!(read_exactly(client, OK.len()), OK);
}

fn stage() -> (TcpListener, Stage, TcpStream) {
    let listener = listen();
    let stage = Stage::new(listener.local_addr().unwrap());
    let client = connect(stage.address()).unwrap();
    (listener, stage, client)
}

#[track_caller]
fn finish(stage: Stage, successes: u64) {
    let counts = stage.finish(1).unwrap();
    let expected = Counted::from([(("a".to_owned(), Success), successes)]);
    assert_eq!((counts.counted, counts.opaque.len()), (expected, 0));
}

#[test]
fn the_next_request_goes_to_another_connection() {
    let (listener, stage, mut client) = stage();
    for round in 0..4 {
        let mut application = accept(&listener).unwrap();
        exchange(&mut client, &mut application);
        if round % 2 == 0 {
            application.shutdown(Shutdown::Write).unwrap();
            assert_eq!(
                read_all(&mut application).unwrap(),
                b"",
                "the agent lets go of it"
            );
        } else {
            reset(application);
        }
    }
    let mut last = accept(&listener).unwrap();
    drop(client);
    assert_eq!(read_all(&mut last).unwrap(), b"");
    drop(last);
    finish(stage, 4);
}

#[test]
fn a_connection_that_is_closed_unused_ends_the_clients() {
    let (listener, stage, mut client) = stage();
    let mut application = accept(&listener).unwrap();
    exchange(&mut client, &mut application);
    drop(application);
    drop(accept(&listener).unwrap());
    assert_eq!(read_all(&mut client).unwrap(), b"");
    drop(client);
    finish(stage, 1);
}

#[test]
fn an_application_that_accepts_no_more_ends_the_clients() {
    let (listener, stage, mut client) = stage();
    let mut application = accept(&listener).unwrap();
    exchange(&mut client, &mut application);
    drop(listener);
    drop(application);
    assert_eq!(read_all(&mut client).unwrap(), b"");
    drop(client);
    finish(stage, 1);
}

#[test]
fn all_other_closes_are_passed_on() {
    Case::until_close("one that was announced", get("a"), OK_AND_CLOSE)
        .counts(&[("a", Success)])
        .check();
    let closing = b"GET / HTTP/1.1\r\nX-Tenant: a\r\nConnection: close\r\n\r\n";
    Case::until_close("one that the client asked for", closing, OK)
        .counts(&[("a", Success)])
        .check();
    Case::until_close("one of HTTP/1.0", b"GET / HTTP/1.0\r\nX-Tenant: a\r\n\r\n", OK)
        .counts(&[("a", Success)])
        .check();
    // A connection of HTTP/2 has a state that another has not.
    let two = [opening(), request(1, "a")].concat();
    let answered = [settings(&[]), answer(1, "200")].concat();
    Case::until_close("one of HTTP/2", two, answered)
        .counts(&[("a", Success)])
        .check();
    Case::new("one in the middle of the next request")
        .client([
            send_all(get("a")),
            read(OK),
            send_all(b"GET"),
            Step::ExpectEof,
            Step::Close,
        ])
        .application([read(get("a")), send_all(OK), Step::Read(3), Step::Close])
        .counts(&[("a", Success)])
        .check();
}
