//! How connections end: closes of either direction, resets at every point, and sides that do not read.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
};

use coalmine_proto::names::Outcome::{ClientAbort, ClientError, Success, UpstreamReset};

use crate::{
    messages::{OK, OK_AND_CLOSE, answer, filling, get, request},
    script::{Step, accept, connect, read, send_all},
    stage::{Case, Counted, Stage, listen},
    support::{eventually, read_all, read_exactly, reset},
};

const LENGTH: &str = "Content-Length: 10";

fn post() -> Vec<u8> {
    request("POST / HTTP/1.1", &["X-Tenant: a", LENGTH], b"")
}

#[test]
fn nothing_is_said() {
    Case::new("the client closes")
        .client([Step::Close])
        .application([Step::ExpectEof])
        .check();
    Case::new("the application closes")
        .client([Step::ExpectEof, Step::Close])
        .application([Step::Close])
        .check();
    Case::new("the client resets")
        .client([Step::Reset])
        .application([Step::ExpectReset])
        .check();
    Case::new("the application resets")
        .client([Step::ExpectReset])
        .application([Step::Reset])
        .check();
}

#[test]
fn the_client_closes_its_direction() {
    Case::new("before the answer")
        .client([
            send_all(get("a")),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([
            read(get("a")),
            Step::ExpectEof,
            send_all(OK_AND_CLOSE),
            Step::Close,
        ])
        .counts(&[("a", Success)])
        .check();
    Case::new("before an answer without an end")
        .client([
            send_all(get("a")),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([read(get("a")), Step::ExpectEof])
        .application([send_all(answer("200 OK", &[], filling(100_000))), Step::Close])
        .counts(&[("a", Success)])
        .check();
    Case::new("in the request's body, and is answered")
        .client([
            send_all(post()),
            send_all(b"hello"),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([read(post()), Step::Read(5), Step::ExpectEof])
        .application([
            send_all(answer("400 No", &["Connection: close"], b"no")),
            Step::Close,
        ])
        .counts(&[("a", ClientError)])
        .check();
    Case::new("in the request's head")
        .client([
            send_all(&get("a")[..20]),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([Step::Read(20), Step::ExpectEof, Step::Close])
        .check();
    // It may be gone altogether: nobody can tell, and the service is not to blame.
    Case::new("and gets no answer")
        .client([
            send_all(get("a")),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([read(get("a")), Step::ExpectEof, Step::Close])
        .counts(&[("a", ClientAbort)])
        .check();
    Case::new("after the answer")
        .client([
            send_all(get("a")),
            read(OK),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([read(get("a")), send_all(OK), Step::ExpectEof, Step::Close])
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn the_client_closes_altogether() {
    Case::new("before the answer")
        .client([send_all(get("a")), Step::Hear("read"), Step::Close])
        .application([read(get("a")), Step::Say("read"), Step::ExpectEof, Step::Close])
        .counts(&[("a", ClientAbort)])
        .check();
    Case::new("in the request's body")
        .client([send_all(post()), send_all(b"hello"), Step::Close])
        .application([read(post()), Step::Read(5), Step::ExpectEof, Step::Close])
        .counts(&[("a", ClientAbort)])
        .check();
}

#[test]
fn the_application_closes() {
    let half = answer("200 OK", &[LENGTH], b"hello");
    for (name, said) in [
        ("without an answer", &b""[..]),
        ("in the answer's head", b"HTTP/1.1 200 OK\r\nContent-Le"),
        (
            "before the answer's body",
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
        ),
        ("in the answer's body", &half),
        (
            "in a chunk",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        ),
        (
            "before the last chunk",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        ),
        ("after an interim answer", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ] {
        Case::until_close(name, get("a"), said)
            .counts(&[("a", UpstreamReset)])
            .check();
        Case::new(format!("its direction, {name}"))
            .client([send_all(get("a")), Step::ExpectEof, Step::Close])
            .application([
                read(get("a")),
                send_all(said),
                Step::ShutdownWrite,
                Step::ExpectEof,
                Step::Close,
            ])
            .counts(&[("a", UpstreamReset)])
            .check();
    }
    Case::until_close(
        "in the middle of a pipeline",
        get("a").repeat(3),
        [OK, &half].concat(),
    )
    .counts(&[("a", Success), ("a", UpstreamReset), ("a", UpstreamReset)])
    .check();
    Case::new("in the request's head")
        .client([send_all(&get("a")[..20]), Step::ExpectEof, Step::Close])
        .application([Step::Read(20), Step::Close])
        .check();
    Case::new("its direction, after its last answer")
        .client([send_all(get("a")), Step::ExpectEof, Step::Close])
        .application([
            read(get("a")),
            send_all(OK_AND_CLOSE),
            Step::ShutdownWrite,
            Step::ExpectEof,
        ])
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn the_application_resets() {
    let half = answer("200 OK", &[LENGTH], b"hello");
    for (name, said) in [
        ("without an answer", &b""[..]),
        ("in the answer's head", b"HTTP/1.1 200 OK\r\nContent-Le"),
        ("in the answer's body", &half),
        ("in an answer without an end", b"HTTP/1.1 200 OK\r\n\r\nhello"),
    ] {
        Case::new(name)
            .client([
                send_all(get("a")),
                read(said),
                Step::Say("read"),
                Step::ExpectReset,
            ])
            .application([read(get("a")), send_all(said), Step::Hear("read"), Step::Reset])
            .counts(&[("a", UpstreamReset)])
            .check();
        // What was said before the reset arrives before it.
        Case::new(format!("at once, {name}"))
            .client([send_all(get("a")), Step::ExpectReset])
            .application([read(get("a")), send_all(said), Step::Reset])
            .counts(&[("a", UpstreamReset)])
            .check();
    }
    Case::new("after its last answer")
        .client([
            send_all(get("a")),
            read(OK_AND_CLOSE),
            Step::Say("read"),
            Step::ExpectReset,
        ])
        .application([
            read(get("a")),
            send_all(OK_AND_CLOSE),
            Step::Hear("read"),
            Step::Reset,
        ])
        .counts(&[("a", Success)])
        .check();
    let long = answer("200 OK", &["Content-Length: 100000"], filling(100_000));
    Case::new("after a long answer")
        .client([
            send_all(get("a")),
            read(&long),
            send_all(get("a")),
            Step::ExpectReset,
        ])
        .application([read(get("a")), send_all(&long), read(get("a")), Step::Reset])
        .counts(&[("a", Success), ("a", UpstreamReset)])
        .check();
    Case::new("in the request's head")
        .client([send_all(&get("a")[..20]), Step::ExpectReset])
        .application([Step::Read(20), Step::Reset])
        .check();
    Case::new("in the request's body")
        .client([send_all(post()), send_all(b"hello"), Step::ExpectReset])
        .application([read(post()), Step::Read(5), Step::Reset])
        .counts(&[("a", UpstreamReset)])
        .check();
}

/// So long that most of it goes from socket to socket inside the kernel.
#[test]
fn long_answers_that_are_cut_off() {
    const WHOLE: usize = 1 << 20;
    let begun = filling(300 << 10);
    let length = format!("Content-Length: {WHOLE}");
    let chunk = [format!("{WHOLE:x}\r\n").as_bytes(), &begun].concat();
    for (name, said) in [
        ("of a length", answer("200 OK", &[&length], &begun)),
        (
            "in one chunk",
            answer("200 OK", &["Transfer-Encoding: chunked"], chunk),
        ),
    ] {
        Case::until_close(format!("{name}, by a close"), get("a"), &said)
            .counts(&[("a", UpstreamReset)])
            .check();
        Case::new(format!("{name}, by a reset"))
            .client([
                send_all(get("a")),
                read(&said),
                Step::Say("read"),
                Step::ExpectReset,
            ])
            .application([read(get("a")), send_all(&said), Step::Hear("read"), Step::Reset])
            .counts(&[("a", UpstreamReset)])
            .check();
    }
}

#[test]
fn the_client_resets() {
    let half = answer("200 OK", &[LENGTH], b"hello");
    Case::new("in its head")
        .client([send_all(&get("a")[..20]), Step::Hear("read"), Step::Reset])
        .application([Step::Read(20), Step::Say("read"), Step::ExpectReset])
        .check();
    Case::new("in its body")
        .client([
            send_all(post()),
            send_all(b"hello"),
            Step::Hear("read"),
            Step::Reset,
        ])
        .application([read(post()), Step::Read(5), Step::Say("read"), Step::ExpectReset])
        .counts(&[("a", ClientAbort)])
        .check();
    Case::new("before the answer")
        .client([send_all(get("a")), Step::Hear("read"), Step::Reset])
        .application([read(get("a")), Step::Say("read"), Step::ExpectReset])
        .counts(&[("a", ClientAbort)])
        .check();
    Case::new("in the answer")
        .client([send_all(get("a")), read(&half), Step::Reset])
        .application([read(get("a")), send_all(&half), Step::ExpectReset])
        .counts(&[("a", ClientAbort)])
        .check();
    Case::new("after the answer")
        .client([send_all(get("a")), read(OK), Step::Reset])
        .application([read(get("a")), send_all(OK), Step::ExpectReset])
        .counts(&[("a", Success)])
        .check();
    Case::new("in the middle of a pipeline")
        .client([send_all(get("a").repeat(3)), read(OK), Step::Reset])
        .application([read(get("a").repeat(3)), send_all(OK), Step::ExpectReset])
        .counts(&[("a", Success), ("a", ClientAbort), ("a", ClientAbort)])
        .check();
}

/// Closes the direction of one side, and then resets: the other reads the close and is told of the reset. Behind a
/// close no read tells of it, but the connection has no peer any more.
fn closes_and_resets(side: TcpStream, mut other: TcpStream) {
    side.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut other).unwrap(), b"");
    assert!(other.peer_addr().is_ok());
    reset(side);
    eventually("the other side is reset", || other.peer_addr().is_err());
}

#[test]
fn resets_behind_a_close() {
    let listener = listen();
    let direct = listener.local_addr().unwrap();
    let stage = Stage::new(direct);
    for address in [direct, stage.address()] {
        let ask = || {
            let mut client = connect(address).unwrap();
            client.write_all(&get("a")).unwrap();
            let mut application = accept(&listener).unwrap();
            assert_eq!(read_exactly(&mut application, get("a").len()), get("a"));
            (client, application)
        };
        let (client, application) = ask();
        closes_and_resets(client, application);
        let (client, application) = ask();
        closes_and_resets(application, client);
    }
    let counts = stage.finish(2).unwrap();
    let expected = [ClientAbort, UpstreamReset].map(|outcome| (("a".to_owned(), outcome), 1));
    assert_eq!(counts.counted, Counted::from(expected));
}

#[test]
fn answers_before_the_request_is_whole() {
    let head = request(
        "POST / HTTP/1.1",
        &["X-Tenant: a", "Content-Length: 100000000"],
        b"",
    );
    let refusal = answer("413 Too Large", &["Connection: close", "Content-Length: 0"], b"");
    Case::until_close("nothing of the body was sent", &head, &refusal)
        .counts(&[("a", ClientError)])
        .check();
    // A close with unread bytes is a reset (RFC 1122, section 4.2.2.13), behind the answer.
    let begun = [&head[..], b"some bytes"].concat();
    Case::new("some of the body was not read")
        .client([send_all(begun), Step::ExpectReset])
        .application([read(&head), send_all(&refusal), Step::Close])
        .counts(&[("a", ClientError)])
        .check();
    let ten = post();
    let both = [&ten[..], b"0123456789", &get("b")[..]].concat();
    let first = ten.len();
    Case::new("the rest of the body follows, and another request")
        .client([
            send_all(&ten),
            read(OK),
            send_all(&both[first..]),
            read(OK),
            Step::Close,
        ])
        .application([
            read(&ten),
            send_all(OK),
            Step::Read(both.len() - first),
            send_all(OK),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success), ("b", Success)])
        .check();
}

/// More than all buffers between the two sides hold.
const MUCH: usize = 40 << 20;

#[test]
fn a_client_that_does_not_read_holds_the_application_back() {
    let body = vec![b'x'; MUCH];
    let download = answer("200 OK", &[&format!("Content-Length: {MUCH}")], body);
    Case::new("a slow reader")
        .client([Step::SmallBuffers, send_all(get("a")), Step::AwaitBlockedPeer])
        .client([read(&download), Step::Close])
        .application([
            Step::SmallBuffers,
            read(get("a")),
            send_all(&download),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn an_application_that_does_not_read_holds_the_client_back() {
    let body = vec![b'x'; MUCH];
    let length = format!("Content-Length: {MUCH}");
    let upload = request("PUT / HTTP/1.1", &["X-Tenant: a", &length], body);
    Case::new("a slow reader")
        .client([Step::SmallBuffers, send_all(&upload), read(OK), Step::Close])
        .application([Step::SmallBuffers, Step::AwaitBlockedPeer, read(&upload)])
        .application([send_all(OK), Step::ExpectEof])
        .counts(&[("a", Success)])
        .check();
}
