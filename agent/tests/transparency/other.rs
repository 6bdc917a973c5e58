//! Protocols that are not HTTP: passed on as they are, and not followed.

use coalmine_agent::observer::Opaque;

use crate::{
    frames::settings,
    messages::filling,
    script::{Step, read, send_all, send_slowly},
    stage::Case,
};

#[test]
fn tls() {
    // The head of a record with a ClientHello (RFC 8446, sections 4.1.2 and 5.1); the rest is any bytes.
    let mut hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    hello.extend(filling(506));
    let server = b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03";
    Case::exchange("whole", &hello, server)
        .opaque([Opaque::Tls])
        .check();
    Case::new("byte by byte")
        .client([send_slowly(1, &hello[..64]), read(server), Step::Close])
        .application([Step::Read(64), send_slowly(1, server), Step::ExpectEof])
        .opaque([Opaque::Tls])
        .check();
    Case::new("the application resets")
        .client([send_all(&hello), Step::ExpectReset])
        .application([read(&hello), Step::Reset])
        .opaque([Opaque::Tls])
        .check();
}

#[test]
fn the_application_speaks_first() {
    Case::new("a greeting")
        .client([
            read(b"220 ready\r\n"),
            send_all(b"EHLO x\r\n"),
            read(b"250 ok\r\n"),
            Step::Close,
        ])
        .application([
            send_all(b"220 ready\r\n"),
            read(b"EHLO x\r\n"),
            send_all(b"250 ok\r\n"),
        ])
        .application([Step::ExpectEof])
        .opaque([Opaque::Unsolicited])
        .check();
    Case::new("what is nearly HTTP/2's SETTINGS")
        .client([Step::Read(5), send_all(b"\x01"), Step::Read(3), Step::Close])
        .application([
            send_all(b"\0\0\0\x04\0"),
            Step::Read(1),
            send_all(b"abc"),
            Step::ExpectEof,
        ])
        .opaque([Opaque::NotHttp, Opaque::Unsolicited])
        .check();
    // The client answers a server that speaks HTTP/2 with something else.
    let first = settings(&[(3, 100)]);
    Case::new("HTTP/2's SETTINGS, to a client that speaks another protocol")
        .client([read(&first), send_all(b"\x00what?"), Step::ExpectEof, Step::Close])
        .application([send_all(&first), Step::Read(6), Step::Close])
        .opaque([Opaque::NotHttp, Opaque::Unsolicited])
        .check();
}

#[test]
fn bytes_without_a_meaning() {
    for (name, up) in [
        ("zeros", &b"\x00\x00\x00\x00\x00\x00\x00\x00"[..]),
        ("PostgreSQL's SSLRequest", b"\x00\x00\x00\x08\x04\xd2\x16\x2f"),
        ("Redis", b"*1\r\n$4\r\nPING\r\n"),
        ("SSH", b"SSH-2.0-OpenSSH_9.9\r\n"),
        ("high bytes", b"\xff\xfe\xfd\xfc\xfb\xfa"),
        ("memcached", b"get some_key\r\n"),
    ] {
        Case::exchange(name, up, b"\x00\xff\r\n\r\nHTTP/1.1 500 No\r\n\r\n")
            .opaque([Opaque::NotHttp])
            .check();
    }
    let (up, down) = (filling(300_000), filling(200_000));
    let first = b"\x01\x02\x03\x04";
    Case::new("much, in both directions at once")
        .client([
            send_all(first),
            Step::SendAndRead(up.clone(), down.len()),
            Step::Close,
        ])
        .application([read(first), Step::SendAndRead(down, up.len()), Step::ExpectEof])
        .opaque([Opaque::NotHttp])
        .check();
    Case::new("half-closed in both directions, one after the other")
        .client([
            send_all(b"\x01hello"),
            Step::ExpectEof,
            send_all(b"still here"),
            Step::Close,
        ])
        .application([
            Step::Read(6),
            send_all(b"bye"),
            Step::ShutdownWrite,
            Step::Read(10),
            Step::ExpectEof,
        ])
        .opaque([Opaque::NotHttp])
        .check();
    Case::new("a client that half-closes and is talked to")
        .client([
            send_all(b"\x01hello"),
            Step::ShutdownWrite,
            Step::ExpectEof,
            Step::Close,
        ])
        .application([
            Step::Read(6),
            Step::ExpectEof,
            send_all(filling(9_000)),
            Step::Close,
        ])
        .opaque([Opaque::NotHttp])
        .check();
}

#[test]
fn what_may_become_http_2_and_does_not() {
    // Nothing is held back while it is not clear: the application answers each piece.
    Case::new("P, R, and no more")
        .client([
            send_all(b"P"),
            Step::Read(1),
            send_all(b"R"),
            Step::Read(1),
            Step::Close,
        ])
        .application([
            Step::Read(1),
            send_all(b"?"),
            Step::Read(1),
            send_all(b"?"),
            Step::ExpectEof,
        ])
        .opaque([Opaque::NotHttp, Opaque::Unsolicited])
        .check();
    Case::new("another preface")
        .client([
            send_all(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"),
            Step::ExpectEof,
            Step::Close,
        ])
        .application([Step::Read(24), Step::Close])
        .opaque([Opaque::NotHttp, Opaque::Http2Framing])
        .check();
}
