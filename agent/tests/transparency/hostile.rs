//! Messages of HTTP/1 that are made to be read in two ways: what the agent passes on is the same, it lives,
//! and nothing is counted for a tenant that another reader would not find.
//!
//! The lists follow RFC 9112, sections 2, 3, 5, 6, 7 and 11, and RFC 9110, sections 5, 7.2 and 8.6.

mod http2;

use coalmine_agent::observer::Opaque::{
    self, BadChunk, BadResponse, Framing, HeadTooLong, NotHttp, Pipelined, TooManyHeaders, Unsolicited,
};
use coalmine_proto::names::Outcome::{self, ClientError, Success};

use crate::{
    frames,
    messages::{OK, answer, get, request},
    script::{Step, read, send_all},
    stage::Case,
};

/// The agent cannot be sure of what is said, so it counts nothing.
const NOTHING: &[(&str, Outcome)] = &[];

/// It is only the tenant that is not sure.
const NOBODY: &[(&str, Outcome)] = &[("__none__", Success)];

/// There is only one reading.
const ONE: &[(&str, Outcome)] = &[("a", Success)];

/// Sends a request, answers it, and opens another connection.
#[track_caller]
fn ask(
    name: &str,
    rules: &'static str,
    bytes: impl AsRef<[u8]>,
    counted: &[(&str, Outcome)],
    opaque: Option<Opaque>,
) {
    Case::exchange(name, bytes, OK)
        .rules([rules])
        .counts(counted)
        .opaque(opaque)
        .followed()
        .check();
}

/// Sends a request with these headers, and a body that is both of the length 5 and a chunk.
#[track_caller]
fn post(headers: &str, body: &str, counted: &[(&str, Outcome)], opaque: Option<Opaque>) {
    let bytes = format!("POST / HTTP/1.1\r\nHost: h\r\nX-Tenant: a\r\n{headers}\r\n\r\n{body}");
    ask(headers, "header:x-tenant", bytes, counted, opaque);
}

#[test]
fn lengths() {
    for (headers, counted, opaque) in [
        ("Content-Length: 5", ONE, None),
        ("Content-Length: 00005", ONE, None),
        ("Content-Length:\t5 \t", ONE, None),
        // One length, said twice: RFC 9110, section 8.6, lets a reader take it.
        ("Content-Length: 5\r\nContent-Length: 5", ONE, None),
        ("Content-Length: 5\r\nContent-Length: 6", NOTHING, Some(Framing)),
        ("Content-Length: 6\r\nContent-Length: 5", NOTHING, Some(Framing)),
        ("Content-Length: 5\r\nContent-length: 05x", NOTHING, Some(Framing)),
        ("Content-Length: 5, 5", NOTHING, Some(Framing)),
        ("Content-Length: 5,6", NOTHING, Some(Framing)),
        ("Content-Length: 5,", NOTHING, Some(Framing)),
        ("Content-Length: +5", NOTHING, Some(Framing)),
        ("Content-Length: -5", NOTHING, Some(Framing)),
        ("Content-Length: -0", NOTHING, Some(Framing)),
        ("Content-Length: 0x5", NOTHING, Some(Framing)),
        ("Content-Length: 5h", NOTHING, Some(Framing)),
        ("Content-Length: 5 5", NOTHING, Some(Framing)),
        ("Content-Length: 5.0", NOTHING, Some(Framing)),
        ("Content-Length: 1e0", NOTHING, Some(Framing)),
        ("Content-Length: 5;", NOTHING, Some(Framing)),
        ("Content-Length: \"5\"", NOTHING, Some(Framing)),
        ("Content-Length: \u{ff15}", NOTHING, Some(Framing)),
        ("Content-Length:", NOTHING, Some(Framing)),
        ("Content-Length: \t ", NOTHING, Some(Framing)),
        ("Content-Length: 18446744073709551616", NOTHING, Some(Framing)),
        (
            "Content-Length: 99999999999999999999999999999999",
            NOTHING,
            Some(Framing),
        ),
        ("Content-Length: 5\0", NOTHING, Some(NotHttp)),
        ("Content-Length: \x0b5", NOTHING, Some(NotHttp)),
        ("Content-Length : 5", NOTHING, Some(NotHttp)),
        ("Content-Length\t: 5", NOTHING, Some(NotHttp)),
        ("Content-Length:\r\n 5", NOTHING, Some(NotHttp)),
        (" Content-Length: 5", NOTHING, Some(NotHttp)),
        ("Content-Length 5", NOTHING, Some(NotHttp)),
        ("Content-Length: 5\r\n: 5", NOTHING, Some(NotHttp)),
        ("Content-Length: 5\rX: y", NOTHING, Some(NotHttp)),
    ] {
        post(headers, "hello", counted, opaque);
    }
}

#[test]
fn codings() {
    const BODY: &str = "5\r\nhello\r\n0\r\n\r\n";
    for (headers, counted, opaque) in [
        ("Transfer-Encoding: chunked", ONE, None),
        ("TRANSFER-ENCODING: CHUNKED", ONE, None),
        ("Transfer-Encoding:\tchunked\t", ONE, None),
        ("Transfer-Encoding: gzip, chunked", ONE, None),
        ("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", ONE, None),
        (
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
            NOTHING,
            Some(Framing),
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 15",
            NOTHING,
            Some(Framing),
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 0",
            NOTHING,
            Some(Framing),
        ),
        (
            "Transfer-Encoding: identity\r\nContent-Length: 15",
            NOTHING,
            Some(Framing),
        ),
        ("Transfer-Encoding: chunked, chunked", NOTHING, Some(Framing)),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            NOTHING,
            Some(Framing),
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            NOTHING,
            Some(Framing),
        ),
        ("Transfer-Encoding: chunked, gzip", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunked, identity", NOTHING, Some(Framing)),
        ("Transfer-Encoding: identity", NOTHING, Some(Framing)),
        ("Transfer-Encoding: gzip", NOTHING, Some(Framing)),
        ("Transfer-Encoding: xchunked", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunkedx", NOTHING, Some(Framing)),
        ("Transfer-Encoding: x chunked", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunked;q=1", NOTHING, Some(Framing)),
        ("Transfer-Encoding: \"chunked\"", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunked,", NOTHING, Some(Framing)),
        ("Transfer-Encoding: ,chunked", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunke\u{17f}d", NOTHING, Some(Framing)),
        ("Transfer-Encoding:", NOTHING, Some(Framing)),
        ("Transfer-Encoding: chunked\x0b", NOTHING, Some(NotHttp)),
        ("Transfer-Encoding: \x0bchunked", NOTHING, Some(NotHttp)),
        ("Transfer-Encoding: chunked\0", NOTHING, Some(NotHttp)),
        ("Transfer-Encoding : chunked", NOTHING, Some(NotHttp)),
        ("Transfer-Encoding:\r\n chunked", NOTHING, Some(NotHttp)),
        ("Transfer-Encoding: gzip,\r\n chunked", NOTHING, Some(NotHttp)),
        ("X: y\r\n Transfer-Encoding: chunked", NOTHING, Some(NotHttp)),
        ("X: y\r\n\tTransfer-Encoding: chunked", NOTHING, Some(NotHttp)),
        ("X: y\rTransfer-Encoding: chunked", NOTHING, Some(NotHttp)),
        ("X: y\nTransfer-Encoding: chunked", NOTHING, Some(NotHttp)),
        ("\u{feff}Transfer-Encoding: chunked", NOTHING, Some(NotHttp)),
        ("Transfer\0Encoding: chunked", NOTHING, Some(NotHttp)),
    ] {
        post(headers, BODY, counted, opaque);
    }
    let old = "POST / HTTP/1.0\r\nX-Tenant: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    ask(
        "chunks in HTTP/1.0",
        "header:x-tenant",
        old,
        NOTHING,
        Some(Framing),
    );
}

#[test]
fn chunks() {
    // The head is sure, and so is whose the first answer is; where the body ends is not.
    let long_trailer = format!("0\r\nX: {}\r\n\r\n", "y".repeat(70_000));
    for (body, opaque) in [
        ("0\r\n\r\n", None),
        ("5\r\nhello\r\n0\r\n\r\n", None),
        ("0000000000000000000000005\r\nhello\r\n000\r\n\r\n", None),
        ("5 \r\nhello\r\n0\t\r\n\r\n", None),
        ("5;a;b=\"c;d\"\r\nhello\r\n0;x\r\n\r\n", None),
        (
            "0\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\nX-Tenant: b\r\n\r\n",
            None,
        ),
        ("fffffffffffffffff\r\nhello", Some(BadChunk)),
        ("10000000000000005\r\nhello", Some(BadChunk)),
        ("-5\r\nhello", Some(BadChunk)),
        ("+5\r\nhello", Some(BadChunk)),
        ("0x5\r\nhello", Some(BadChunk)),
        (" 5\r\nhello", Some(BadChunk)),
        ("\r\n5\r\nhello", Some(BadChunk)),
        (";a\r\nhello", Some(BadChunk)),
        ("5\nhello", Some(BadChunk)),
        ("5\rhello", Some(BadChunk)),
        ("5;a\nhello", Some(BadChunk)),
        ("5;a\rb\r\nhello", Some(BadChunk)),
        ("5\0\r\nhello", Some(BadChunk)),
        ("5\r\nhello0\r\n\r\n", Some(BadChunk)),
        ("5\r\nhelloworld\r\n0\r\n\r\n", Some(BadChunk)),
        ("5\r\nhello\n0\r\n\r\n", Some(BadChunk)),
        ("5\r\nhello\r0\r\n\r\n", Some(BadChunk)),
        ("0\r\nX: y\n\r\n", Some(BadChunk)),
        ("0\r\n\n", Some(BadChunk)),
        ("0\r\n\rx", Some(BadChunk)),
        (&long_trailer, Some(BadChunk)),
    ] {
        let bytes = request(
            "POST / HTTP/1.1",
            &["X-Tenant: a", "Transfer-Encoding: chunked"],
            body,
        );
        let name: String = body.chars().take(30).collect();
        ask(&name, "header:x-tenant", bytes, ONE, opaque);
    }
    let nobody = "GET / HTTP/1.1\r\nX-Tenant: smuggled\r\n\r\n";
    let bytes = request(
        "POST / HTTP/1.1",
        &["X-Tenant: a", "Transfer-Encoding: chunked"],
        format!("0\r\n\n{nobody}"),
    );
    // The application finds a second request behind the bad end, and answers it too.
    Case::exchange("a request behind a bad end", bytes, OK.repeat(2))
        .counts(ONE)
        .opaque([BadChunk])
        .followed()
        .check();
}

#[test]
fn request_lines() {
    for (line, counted, opaque) in [
        ("GET / HTTP/1.1", ONE, None),
        ("get / HTTP/1.1", ONE, None),
        ("GET / HTTP/1.0", ONE, None),
        ("G\0T / HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GE T / HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET  / HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET\t/\tHTTP/1.1", NOTHING, Some(NotHttp)),
        (" GET / HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET / HTTP/1.1 ", NOTHING, Some(NotHttp)),
        ("GET /  HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET /a b HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET /\0 HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET /\r HTTP/1.1", NOTHING, Some(NotHttp)),
        ("GET / HTTP/1.1\rX: y", NOTHING, Some(NotHttp)),
        ("GET /", NOTHING, Some(NotHttp)),
        ("GET", NOTHING, Some(NotHttp)),
        ("GET / HTTP/3.0", NOTHING, Some(NotHttp)),
        ("GET / HTTP/2.0", NOTHING, Some(NotHttp)),
        ("GET / HTTP/1.2", NOTHING, Some(NotHttp)),
        ("GET / HTTP/1.10", NOTHING, Some(NotHttp)),
        ("GET / HTTP/01.1", NOTHING, Some(NotHttp)),
        ("GET / http/1.1", NOTHING, Some(NotHttp)),
        ("GET / HTTP1.1", NOTHING, Some(NotHttp)),
        ("GET / HTTPS/1.1", NOTHING, Some(NotHttp)),
        ("G(T / HTTP/1.1", NOTHING, Some(NotHttp)),
        (": / HTTP/1.1", NOTHING, Some(NotHttp)),
    ] {
        ask(
            line,
            "header:x-tenant",
            format!("{line}\r\nHost: h\r\nX-Tenant: a\r\n\r\n"),
            counted,
            opaque,
        );
    }
    Case::until_close("HTTP/0.9", "GET /\r\n", "<html>old</html>")
        .opaque([NotHttp])
        .followed()
        .check();
}

#[test]
fn header_lines() {
    for (headers, counted, opaque) in [
        ("X-Tenant: a", ONE, None),
        ("X-Tenant: a\r\nX-Tenant: a", ONE, None),
        ("X-Tenant: a\r\nX-Tenant: b", NOBODY, None),
        ("X-Tenant: a\r\nx-tenant:", NOBODY, None),
        ("X-Tenant: a, a", NOBODY, None),
        ("X-Tenant: \u{e4}", NOBODY, None),
        ("X-Tenant: __none__", NOBODY, None),
        ("X-Tenant: __overflow__", NOBODY, None),
        ("X_Tenant: a", NOBODY, None),
        ("X-Tenant : a", NOTHING, Some(NotHttp)),
        ("X-Tenant a", NOTHING, Some(NotHttp)),
        (" X-Tenant: a", NOTHING, Some(NotHttp)),
        ("X-Tenant:\r\n a", NOTHING, Some(NotHttp)),
        ("X-Tenant: a\r\n b", NOTHING, Some(NotHttp)),
        ("X-Tenant: a\0", NOTHING, Some(NotHttp)),
        ("X-Tenant: a\x7f", NOTHING, Some(NotHttp)),
        ("X-Tenant: a\rX: y", NOTHING, Some(NotHttp)),
        (": a\r\nX-Tenant: a", NOTHING, Some(NotHttp)),
        ("X(Tenant): a", NOTHING, Some(NotHttp)),
        ("X: y\nX-Tenant: a", NOTHING, Some(NotHttp)),
    ] {
        ask(
            headers,
            "header:x-tenant",
            format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n\r\n"),
            counted,
            opaque,
        );
    }
    // RFC 9112, section 2.2: a reader may take a bare LF for the end of a line, and another does not.
    let bare = "GET / HTTP/1.1\nHost: h\nX-Tenant: a\n\n";
    ask("bare LF", "header:x-tenant", bare, NOTHING, Some(NotHttp));
    let mixed = "GET / HTTP/1.1\r\nHost: h\r\nX-Tenant: a\r\n\n";
    ask(
        "bare LF at the end",
        "header:x-tenant",
        mixed,
        NOTHING,
        Some(NotHttp),
    );
    let bare = "GET / HTTP/1.1\rHost: h\rX-Tenant: a\r\r";
    ask("bare CR", "header:x-tenant", bare, NOTHING, Some(NotHttp));
}

#[test]
fn hosts() {
    const ACME: &[(&str, Outcome)] = &[("acme", Success)];
    const RULE: &str = "host:{tenant}.example.com";
    // Whether the tenant is sure by its host; by a header it is sure in all of these, as their ends are.
    for (head, by_host) in [
        ("GET / HTTP/1.1\r\nHost: acme.example.com", ACME),
        ("GET / HTTP/1.1\r\nHost: ACME.example.com:80", ACME),
        (
            "GET /?u=http://evil.example.com/ HTTP/1.1\r\nHost: acme.example.com",
            ACME,
        ),
        (
            "GET http://acme.example.com/ HTTP/1.1\r\nHost: acme.example.com",
            ACME,
        ),
        ("GET http://acme.example.com/ HTTP/1.0", ACME),
        ("OPTIONS * HTTP/1.1\r\nHost: acme.example.com", ACME),
        (
            "GET / HTTP/1.1\r\nHost: acme.example.com\r\nHost: acme.example.com",
            ACME,
        ),
        (
            "GET / HTTP/1.1\r\nHost: acme.example.com\r\nHost: evil.example.com",
            NOBODY,
        ),
        (
            "GET / HTTP/1.1\r\nHost: evil.example.com\r\nHost: acme.example.com",
            NOBODY,
        ),
        ("GET / HTTP/1.1\r\nHost:\r\nHost: acme.example.com", NOBODY),
        (
            "GET / HTTP/1.1\r\nHost: acme.example.com, evil.example.com",
            NOBODY,
        ),
        (
            "GET / HTTP/1.1\r\nHost: acme.example.com evil.example.com",
            NOBODY,
        ),
        ("GET / HTTP/1.1\r\nHost: evil@acme.example.com", NOBODY),
        ("GET / HTTP/1.1\r\nHost: acme.example.com/evil", NOBODY),
        ("GET / HTTP/1.1\r\nHost: acme.example.com:80x", NOBODY),
        ("GET / HTTP/1.1", NOBODY),
        ("GET / HTTP/1.1\r\nX-Forwarded-Host: acme.example.com", NOBODY),
        (
            "GET http://evil.example.com/ HTTP/1.1\r\nHost: acme.example.com",
            NOBODY,
        ),
        ("GET http://acme.example.com/ HTTP/1.1\r\nHost: h", NOBODY),
        ("GET http://evil@acme.example.com/ HTTP/1.0", NOBODY),
        ("GET http:///acme.example.com HTTP/1.0", NOBODY),
        (
            "GET ?u=http://evil.example.com/ HTTP/1.1\r\nHost: acme.example.com",
            NOBODY,
        ),
        (
            "GET acme.example.com:80 HTTP/1.1\r\nHost: evil.example.com",
            NOBODY,
        ),
    ] {
        let bytes = format!("{head}\r\nX-Tenant: a\r\n\r\n");
        ask(head, RULE, &bytes, by_host, None);
        ask(head, "header:x-tenant", &bytes, ONE, None);
    }
}

#[test]
fn paths() {
    const ACME: &[(&str, Outcome)] = &[("acme", Success)];
    // A path of another shape leaves it to the header. One that servers read in two ways does not: then the
    // client would choose the rule.
    for (path, counted) in [
        ("/t/acme/x", ACME),
        ("/t/%61cme?x=/../", ACME),
        ("/t/acme/x//y/a%2Fb/..z", ACME),
        ("/u/acme/", ONE),
        ("/u//acme/", ONE),
        ("/t/acme/../evil/x", NOBODY),
        ("/t/acme/x/%2e%2E/%2e./evil/", NOBODY),
        ("/t/acme/..;/evil/", NOBODY),
        ("/t/acme/..%2fevil/", NOBODY),
        ("/t/acme/..\\evil/", NOBODY),
        ("/t/acme/./x", NOBODY),
        ("/x/../t/acme/", NOBODY),
        ("/%2e/t/acme/", NOBODY),
        ("//t/acme/", NOBODY),
        ("/t//acme/", NOBODY),
        ("/\\t/acme/", NOBODY),
        ("/t\\acme/", NOBODY),
        ("/t/evil\\acme/", NOBODY),
        ("/t%2Facme/", NOBODY),
        ("/t/evil%5Cacme/", NOBODY),
        ("/%74/acme/", NOBODY),
        ("/t;x=y/acme/", NOBODY),
    ] {
        let check = |version: &str, sent: &[u8], answered: &[u8]| {
            Case::exchange(format!("{path} of {version}"), sent, answered)
                .rules(["path:/t/{tenant}/", "header:x-tenant"])
                .counts(counted)
                .check();
        };
        let line = format!("GET {path} HTTP/1.1");
        check("HTTP/1", &request(&line, &["X-Tenant: a"], b""), OK);
        let fields = frames::get("a").map(|(name, value)| match name {
            ":path" => (name, path),
            _ => (name, value),
        });
        let head = frames::headers(1, frames::END_STREAM, &fields);
        let answered = [
            frames::settings(&[]),
            frames::settings_ack(),
            frames::answer(1, "200"),
        ];
        check("HTTP/2", &[frames::opening(), head].concat(), &answered.concat());
    }
}

#[test]
fn sizes() {
    let head = |length: usize| {
        let rest = request("GET / HTTP/1.1", &["X-Tenant: a", "X: "], b"").len();
        request(
            "GET / HTTP/1.1",
            &["X-Tenant: a", &format!("X: {}", "y".repeat(length - rest))],
            b"",
        )
    };
    let count = |headers: usize| {
        // With Host and X-Tenant.
        let more = vec!["X: y"; headers - 2];
        request("GET / HTTP/1.1", &[&["X-Tenant: a"][..], &more].concat(), b"")
    };
    let target = |length: usize| {
        let line = format!("GET /{} HTTP/1.1", "x".repeat(length));
        request(&line, &["X-Tenant: a"], b"")
    };
    for (name, bytes, counted, opaque) in [
        ("64 KiB", head(65_536), ONE, None),
        ("64 KiB and a byte", head(65_537), NOTHING, Some(HeadTooLong)),
        ("a million bytes", head(1_000_000), NOTHING, Some(HeadTooLong)),
        ("a long target", target(60_000), ONE, None),
        (
            "a target that is too long",
            target(70_000),
            NOTHING,
            Some(HeadTooLong),
        ),
        ("256 headers", count(256), ONE, None),
        ("257 headers", count(257), NOTHING, Some(TooManyHeaders)),
        ("300 headers", count(300), NOTHING, Some(TooManyHeaders)),
        ("5,000 headers", count(5_000), NOTHING, Some(TooManyHeaders)),
    ] {
        ask(name, "header:x-tenant", bytes, counted, opaque);
    }
    let endless = b"GET / HTTP/1.1\r\nX-Tenant: a\r\n".repeat(10_000);
    Case::new("a head without an end")
        .client([send_all(&endless), Step::Close])
        .application([read(&endless), Step::ExpectEof])
        .opaque([NotHttp, HeadTooLong])
        .followed()
        .check();
    // 128 requests may wait; the application answers all 129.
    Case::exchange(
        "more requests than are followed",
        get("a").repeat(129),
        OK.repeat(129),
    )
    .counts(&[("a", Success); 128])
    .opaque([Pipelined])
    .followed()
    .check();
    let largest = request(
        "PUT / HTTP/1.1",
        &["X-Tenant: a", "Content-Length: 18446744073709551615"],
        b"x",
    );
    let refused = answer("413 Too Large", &["Connection: close", "Content-Length: 0"], b"");
    Case::until_close("the largest length", largest, refused)
        .counts(&[("a", ClientError)])
        .followed()
        .check();
}

#[test]
fn what_follows_a_request() {
    for (name, rest, opaque) in [
        ("empty lines", &b"\r\n\r\n"[..], None),
        ("noise", b"\x00\xff", Some(NotHttp)),
        ("a bad request", b"GET / HTTP/9\r\n\r\n", Some(NotHttp)),
        (
            "the preface of HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            Some(NotHttp),
        ),
        ("a ClientHello", b"\x16\x03\x01\x02\x00", Some(NotHttp)),
    ] {
        let bytes = [&get("a")[..], rest].concat();
        ask(name, "header:x-tenant", bytes, ONE, opaque);
    }
}

#[test]
fn answers() {
    let long = answer(
        "200 OK",
        &[&format!("X: {}", "y".repeat(70_000)), "Content-Length: 0"],
        b"",
    );
    let many = answer("200 OK", &["X: y"; 300], b"");
    for (name, bytes, counted, opaque) in [
        (
            "a length and chunks",
            &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"[..],
            NOTHING,
            Some(Framing),
        ),
        (
            "chunks and a length",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "two lengths",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            NOTHING,
            Some(Framing),
        ),
        (
            "one length twice",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
            ONE,
            None,
        ),
        (
            "a list of lengths",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
            NOTHING,
            Some(Framing),
        ),
        (
            "a negative length",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "a length of 2^64",
            b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "chunked twice",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "chunked, not at last",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "identity and a length",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
            NOTHING,
            Some(Framing),
        ),
        (
            "chunks in 1.0",
            b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            NOTHING,
            Some(Framing),
        ),
        (
            "a chunk too large",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
            NOTHING,
            Some(BadChunk),
        ),
        (
            "a chunk with a bare LF",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
            NOTHING,
            Some(BadChunk),
        ),
        (
            "a chunk too long",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n",
            NOTHING,
            Some(BadChunk),
        ),
        (
            "no chunk",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
            NOTHING,
            Some(BadChunk),
        ),
        (
            "four digits",
            b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "two digits",
            b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        // RFC 9110, section 15: a status is one of 100 to 599.
        (
            "a status below 100",
            b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "another version",
            b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "another protocol",
            b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "no status line",
            b"<html>old</html>\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "obs-fold",
            b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "a space before the colon",
            b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "NUL",
            b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 0\r\n\r\n",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "bare CR",
            b"HTTP/1.1 200 OK\r\nX: y\rContent-Length: 5\r\n\r\nhello",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "bare LF",
            b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 5\r\n\r\nhello",
            NOTHING,
            Some(BadResponse),
        ),
        (
            "an answer too many",
            b"HTTP/1.1 204 No\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
            ONE,
            Some(Unsolicited),
        ),
        (
            "bytes too many",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!",
            ONE,
            Some(Unsolicited),
        ),
        (
            "a body with 204",
            b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\nhello",
            ONE,
            Some(Unsolicited),
        ),
        (
            "a body with 304",
            b"HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\nhello",
            ONE,
            Some(Unsolicited),
        ),
        ("a long head", &long, NOTHING, Some(HeadTooLong)),
        ("many headers", &many, NOTHING, Some(TooManyHeaders)),
    ] {
        Case::exchange(name, get("a"), bytes)
            .counts(counted)
            .opaque(opaque)
            .followed()
            .check();
    }
    let head = request("HEAD / HTTP/1.1", &["X-Tenant: a"], b"");
    Case::exchange("a body with HEAD", head, OK)
        .counts(ONE)
        .opaque([Unsolicited])
        .followed()
        .check();
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(5_000);
    Case::exchange(
        "a flood of interim answers",
        get("a"),
        [&interim[..], OK].concat(),
    )
    .counts(ONE)
    .followed()
    .check();
}
