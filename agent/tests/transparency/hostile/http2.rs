//! Frames and header blocks of HTTP/2 that are made to be read in two ways, or to cost much.
//!
//! The lists follow RFC 9113, sections 5, 6, 8 and 10.5, and RFC 7541, sections 3 to 6. A request that no
//! correct server accepts is nobody's, and its connection goes on; where the framing or the compression is in
//! doubt, so is all that follows, and nothing is counted.

use coalmine_agent::observer::Opaque::{self, HeadTooLong, Hpack, Http2Framing};
use coalmine_proto::names::Outcome::{self, ClientAbort, Success};

use crate::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, NO_FLAGS, PADDED, PING, PRIORITY,
        PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, answer, block, data, frame, get,
        headers, integer, literal, opening, request, reset, settings, settings_ack,
    },
    script::{Step, read, send_all},
    stage::Case,
};

const CANCEL: u32 = 8;

/// The client says all this; the application answers so, and the client closes.
fn exchange(name: &str, client: &[Vec<u8>], application: &[Vec<u8>]) -> Case {
    let client = [opening(), client.concat()].concat();
    let application = [settings(&[]), settings_ack(), application.concat()].concat();
    Case::exchange(name, client, application).followed()
}

#[test]
fn malformed_requests_are_nobodys() {
    let without = |name: &str| -> Vec<(&'static str, &'static str)> {
        get("a").into_iter().filter(|(n, _)| *n != name).collect()
    };
    let with = |field: (&'static str, &'static str)| {
        let mut fields = get("a").to_vec();
        fields.push(field);
        fields
    };
    let replaced = |name: &str, value: &'static str| -> Vec<(&'static str, &'static str)> {
        let fields = get("a").into_iter();
        fields
            .map(|(n, v)| if n == name { (n, value) } else { (n, v) })
            .collect()
    };
    for (name, fields) in [
        ("a pseudo-header after another header", {
            let mut fields = without(":path");
            fields.push((":path", "/"));
            fields
        }),
        ("a method twice", with_first((":method", "GET"))),
        ("a path twice", with_first((":path", "/x?y=z"))),
        ("an authority twice", with_first((":authority", "evil"))),
        ("a pseudo-header of answers", with_first((":status", "200"))),
        ("a pseudo-header that nobody knows", with_first((":what", "x"))),
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("no path", without(":path")),
        ("an empty path", replaced(":path", "")),
        ("a name in upper case", with(("X-Other", "x"))),
        ("the tenant's name in upper case", {
            let mut fields = without("x-tenant");
            fields.push(("X-Tenant", "a"));
            fields
        }),
        ("connection", with(("connection", "close"))),
        ("transfer-encoding", with(("transfer-encoding", "chunked"))),
        ("keep-alive", with(("keep-alive", "1"))),
        ("proxy-connection", with(("proxy-connection", "close"))),
        ("upgrade", with(("upgrade", "websocket"))),
        ("te with something else", with(("te", "gzip"))),
        ("CR in a value", with(("x", "y\rz"))),
        ("LF in a value", with(("x", "y\nz: w"))),
        ("NUL in a value", with(("x", "y\0z"))),
        ("CR LF in the tenant", replaced("x-tenant", "a\r\nx: y")),
        ("an empty name", with(("", "x"))),
        ("a space in a name", with(("x y", "z"))),
        ("a colon in a name", with(("x:y", "z"))),
        ("CR LF in a name", with(("x\r\ny", "z"))),
        ("CR LF in the path", replaced(":path", "/\r\nx: y")),
        ("CONNECT with a path", replaced(":method", "CONNECT")),
    ] {
        exchange(
            name,
            &[headers(1, END_STREAM, &fields), request(3, "b")],
            &[answer(1, "400"), answer(3, "200")],
        )
        .counts(&[("b", Success)])
        .malformed(1)
        .check();
    }
    for (name, fields) in [
        ("te with trailers", with(("te", "trailers"))),
        ("the same host", with(("host", "h"))),
        // Servers answer it, and no rule looks at either.
        ("another host", with(("host", "evil"))),
        ("a space before a value and behind it", with(("x", " y "))),
        ("no authority, but a host", {
            let mut fields = without(":authority");
            fields.push(("host", "h"));
            fields
        }),
    ] {
        exchange(name, &[headers(1, END_STREAM, &fields)], &[answer(1, "200")])
            .counts(&[("a", Success)])
            .check();
    }
}

/// The fields of a request with one more before all others.
fn with_first(field: (&'static str, &'static str)) -> Vec<(&'static str, &'static str)> {
    let mut fields = vec![field];
    fields.extend(get("a"));
    fields
}

#[test]
fn tenants_that_are_not_sure() {
    for (tenants, counted) in [
        (&["a", "a"][..], "a"),
        (&["a", "b"], "__none__"),
        (&["__none__"], "__none__"),
        (&["a b"], "__none__"),
        (&[" a"], "__none__"),
        (&["a "], "__none__"),
    ] {
        let mut fields = get("a")[..4].to_vec();
        fields.extend(tenants.iter().map(|tenant| ("x-tenant", *tenant)));
        exchange(counted, &[headers(1, END_STREAM, &fields)], &[answer(1, "200")])
            .counts(&[(counted, Success)])
            .check();
    }
}

/// What the client says after an open stream of tenant b, and why nothing is followed any more.
#[track_caller]
fn breaks(name: &str, frames: &[Vec<u8>], opaque: &[Opaque]) {
    let client = [&[request(1, "b")][..], frames, &[request(99, "c")]].concat();
    exchange(name, &client, &[answer(1, "200"), answer(99, "200")])
        .opaque(opaque.iter().copied())
        .check();
}

#[test]
fn broken_framing_ends_the_reading() {
    let whole = block(&get("a"));
    let padded = [&[200][..], &whole].concat();
    let flags = END_STREAM | END_HEADERS;
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("HEADERS without a stream", vec![frame(HEADERS, flags, 0, &whole)]),
        ("a stream of the server", vec![frame(HEADERS, flags, 2, &whole)]),
        ("streams that go back", vec![request(7, "a"), request(5, "a")]),
        (
            "CONTINUATION of nothing",
            vec![frame(CONTINUATION, END_HEADERS, 3, &whole)],
        ),
        (
            "CONTINUATION of another stream",
            vec![
                frame(HEADERS, END_STREAM, 3, &whole[..9]),
                frame(CONTINUATION, END_HEADERS, 5, &whole[9..]),
            ],
        ),
        (
            "a frame between a block's parts",
            vec![
                frame(HEADERS, END_STREAM, 3, &whole[..9]),
                frame(PING, NO_FLAGS, 0, b"12345678"),
                frame(CONTINUATION, END_HEADERS, 3, &whole[9..]),
            ],
        ),
        (
            "a frame that nobody knows between a block's parts",
            vec![
                frame(HEADERS, END_STREAM, 3, &whole[..9]),
                frame(0xfa, NO_FLAGS, 3, b""),
                frame(CONTINUATION, END_HEADERS, 3, &whole[9..]),
            ],
        ),
        (
            "a request in a block that has not ended",
            vec![frame(HEADERS, END_STREAM, 3, &whole), request(5, "a")],
        ),
        (
            "padding longer than the frame",
            vec![frame(HEADERS, flags | PADDED, 3, &padded)],
        ),
        (
            "padding without a length",
            vec![frame(HEADERS, flags | PADDED, 3, b"")],
        ),
        (
            "priority without room",
            vec![frame(HEADERS, flags | WITH_PRIORITY, 3, b"\0\0\0")],
        ),
        (
            "padded data longer than the frame",
            vec![
                headers(3, NO_FLAGS, &get("a")),
                frame(DATA, PADDED, 3, b"\x05hey"),
            ],
        ),
        ("DATA without a stream", vec![data(0, NO_FLAGS, b"x")]),
        ("DATA of a stream that never was", vec![data(9, NO_FLAGS, b"x")]),
        ("RST_STREAM without a stream", vec![reset(0, CANCEL)]),
        (
            "RST_STREAM of the wrong length",
            vec![frame(RST_STREAM, NO_FLAGS, 1, b"\0\0\0")],
        ),
        ("SETTINGS of a stream", vec![frame(SETTINGS, NO_FLAGS, 1, b"")]),
        (
            "SETTINGS of the wrong length",
            vec![frame(SETTINGS, NO_FLAGS, 0, b"\0\x03\0\0\0")],
        ),
        (
            "SETTINGS acknowledged with some",
            vec![frame(SETTINGS, ACK, 0, b"\0\x03\0\0\0\x01")],
        ),
        ("PING of a stream", vec![frame(PING, NO_FLAGS, 1, b"12345678")]),
        (
            "PING of the wrong length",
            vec![frame(PING, NO_FLAGS, 0, b"1234567")],
        ),
        ("GOAWAY of a stream", vec![frame(GOAWAY, NO_FLAGS, 1, &[0; 8])]),
        ("GOAWAY too short", vec![frame(GOAWAY, NO_FLAGS, 0, &[0; 7])]),
        (
            "WINDOW_UPDATE of the wrong length",
            vec![frame(WINDOW_UPDATE, NO_FLAGS, 0, b"\0\0\x01")],
        ),
        (
            "a push by a client",
            vec![frame(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 2][..], &whole].concat(),
            )],
        ),
    ];
    for (name, frames) in cases {
        breaks(name, &frames, &[Http2Framing]);
    }
}

#[test]
fn what_cannot_be_decompressed_ends_the_reading() {
    let good = block(&get("a"));
    let cases: [(&str, &[u8]); 12] = [
        ("the position 0", b"\x80"),
        ("a position that nothing has", b"\xbe"),
        ("a position beyond all", b"\xff\xff\xff\xff\x07"),
        (
            "a position that overflows",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        ),
        ("a name at a position that nothing has", b"\x7e\x01x"),
        ("a text longer than the block", b"\x00\x7f\x01x"),
        ("a block that ends in a field", b"\x00\x01x"),
        ("a size above what was allowed", b"\x3f\xe2\x1f"),
        (
            "a size that overflows",
            b"\x3f\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        ),
        // RFC 7541, section 5.2: padding is of ones, shorter than a byte, and EOS does not occur.
        ("padding of zeros", b"\x00\x81\x18\x01x"),
        ("padding of a byte", b"\x00\x82\x1f\xff\x01x"),
        ("EOS", b"\x00\x84\xff\xff\xff\xff\x01x"),
    ];
    for (name, bytes) in cases {
        let bad = [&good[..], bytes].concat();
        // A size stands at a block's beginning only.
        let first = [bytes, &good[..]].concat();
        let bad = if bytes[0] == 0x3f { first } else { bad };
        breaks(
            name,
            &[frame(HEADERS, END_STREAM | END_HEADERS, 3, &bad)],
            &[Hpack],
        );
    }
    let late = [&good[..], b"\x20"].concat();
    let frames = [frame(HEADERS, END_STREAM | END_HEADERS, 3, &late)];
    breaks("a size that is not at the beginning", &frames, &[Hpack]);
    // The answers of a server are compressed as well.
    exchange(
        "an answer",
        &[request(1, "a"), request(3, "b")],
        &[
            frame(HEADERS, END_STREAM | END_HEADERS, 1, b"\xbe"),
            answer(3, "200"),
        ],
    )
    .opaque([Hpack])
    .check();
}

#[test]
fn a_table_larger_than_is_kept_ends_the_reading() {
    let first = settings(&[(1, 1 << 20)]);
    let mut large = Vec::new();
    integer(0x20, 5, 1 << 20, &mut large);
    large.extend(block(&get("a")));
    let client = [
        opening(),
        settings_ack(),
        frame(HEADERS, END_STREAM | END_HEADERS, 1, &large),
    ]
    .concat();
    let rest = [settings_ack(), answer(1, "200")].concat();
    Case::new("a table of 1 MiB")
        .client([read(&first), send_all(&client), read(&rest), Step::Close])
        .application([send_all(&first), read(&client), send_all(&rest), Step::ExpectEof])
        .opaque([Hpack])
        .followed()
        .check();
}

/// A request with this block is not followed; those before and after it are.
#[track_caller]
fn is_passed_over(name: &str, block: &[u8]) {
    let frames = [
        request(1, "b"),
        frame(HEADERS, END_STREAM | END_HEADERS, 3, block),
        request(5, "c"),
    ];
    exchange(
        name,
        &frames,
        &[answer(1, "200"), answer(3, "431"), answer(5, "200")],
    )
    .counts(&[("b", Success), ("c", Success)])
    .unfollowed(1)
    .check();
}

#[test]
fn blocks_that_become_large() {
    let mut bomb = block(&get("a"));
    literal(0x40, b"x-bomb", "y".repeat(3_900).as_bytes(), &mut bomb);
    // 62 is the newest entry (RFC 7541, section 2.3.3): each byte stands for 3,906.
    bomb.extend_from_slice(&[0x80 | 62; 200]);
    is_passed_over("a small block with much in it", &bomb);
    bomb.extend_from_slice(&[0x80 | 62; 200]);
    let frames = [frame(HEADERS, END_STREAM | END_HEADERS, 3, &bomb)];
    breaks("a small block with too much in it", &frames, &[HeadTooLong]);

    let mut many = block(&get("a"));
    for _ in 0..1_000 {
        literal(0, b"x", b"y", &mut many);
    }
    is_passed_over("many fields", &many);

    let part = [0; 1_000];
    let mut flood = vec![frame(HEADERS, END_STREAM, 3, &block(&get("a")))];
    flood.extend((0..100).map(|_| frame(CONTINUATION, NO_FLAGS, 3, &part)));
    breaks(
        "a flood of continuations",
        &flood,
        &[HeadTooLong, Hpack, Http2Framing],
    );
}

#[test]
fn floods() {
    let cases: [(&str, Vec<u8>); 5] = [
        ("PING", frame(PING, NO_FLAGS, 0, b"12345678")),
        ("PRIORITY", frame(PRIORITY, NO_FLAGS, 9, &[0, 0, 0, 0, 9])),
        ("WINDOW_UPDATE", frame(WINDOW_UPDATE, NO_FLAGS, 0, &[0, 0, 0, 1])),
        ("frames that nobody knows", frame(0xfa, 0xff, 0, b"x")),
        ("empty DATA", data(1, NO_FLAGS, b"")),
    ];
    for (name, flood) in cases {
        let mut frames = vec![headers(1, NO_FLAGS, &get("a"))];
        frames.push(flood.repeat(2_000));
        frames.push(data(1, END_STREAM, b""));
        exchange(name, &frames, &[answer(1, "200")])
            .counts(&[("a", Success)])
            .check();
    }
}

#[test]
fn settings_that_are_not_acknowledged_are_not_remembered_for_ever() {
    // When each of them takes effect would have to be known for the tables.
    let frames = [settings(&[(1, 100)]).repeat(2_000), request(1, "a")];
    exchange("SETTINGS", &frames, &[answer(1, "200")])
        .opaque([Http2Framing])
        .check();
}

#[test]
fn bodies_that_are_not_as_long_as_they_say_are_nobodys() {
    let post = |length: &'static str, flags| {
        let mut fields = get("a").to_vec();
        fields.push(("content-length", length));
        headers(1, flags, &fields)
    };
    for (name, frames) in [
        (
            "too long",
            vec![post("3", NO_FLAGS), data(1, END_STREAM, b"hello")],
        ),
        (
            "too short",
            vec![post("9", NO_FLAGS), data(1, END_STREAM, b"hello")],
        ),
        ("no body", vec![post("9", END_STREAM)]),
        (
            "no number",
            vec![post("+5", NO_FLAGS), data(1, END_STREAM, b"hello")],
        ),
    ] {
        exchange(
            name,
            &[frames.concat(), request(3, "b")],
            &[answer(1, "400"), answer(3, "200")],
        )
        .counts(&[("b", Success)])
        .malformed(1)
        .check();
    }
    let good = [
        post("5", NO_FLAGS),
        data(1, NO_FLAGS, b"he"),
        data(1, END_STREAM, b"llo"),
    ];
    exchange("as long as it says", &good, &[answer(1, "200")])
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn rapid_resets_are_aborts_of_the_client() {
    // CVE-2023-44487: each request is taken back at once.
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let streams = || (1..).step_by(2).take(2_000);
    for stream in streams() {
        frames.extend([request(stream, "a"), reset(stream, CANCEL)]);
    }
    frames.push(request(9_999, "b"));
    let mut counted: Vec<(&str, Outcome)> = streams().map(|_: u32| ("a", ClientAbort)).collect();
    counted.push(("b", Success));
    exchange("rapid reset", &frames, &[answer(9_999, "200")])
        .counts(&counted)
        .check();
}

#[test]
fn more_streams_than_are_followed() {
    let streams = || (1_u32..).step_by(2);
    let requests: Vec<Vec<u8>> = streams().take(4_097).map(|stream| request(stream, "a")).collect();
    let answers: Vec<Vec<u8>> = streams()
        .take(4_097)
        .map(|stream| answer(stream, "200"))
        .collect();
    let all: Vec<(&str, Outcome)> = vec![("a", Success); 4_096];
    exchange("4,097 at a time", &requests, &answers)
        .counts(&all)
        .unfollowed(1)
        .check();
    exchange("4,096 at a time", &requests[..4_096], &answers[..4_096])
        .counts(&all)
        .unfollowed(0)
        .check();
}

#[test]
fn answers_that_no_server_gives() {
    for (name, frames) in [
        (
            "an answer without a stream",
            vec![frame(
                HEADERS,
                END_STREAM | END_HEADERS,
                0,
                &block(&[(":status", "200")]),
            )],
        ),
        (
            "a continuation of nothing",
            vec![frame(CONTINUATION, END_HEADERS, 1, b"")],
        ),
        ("PING of the wrong length", vec![frame(PING, NO_FLAGS, 0, b"1")]),
    ] {
        exchange(name, &[request(1, "a")], &[frames.concat(), answer(1, "200")])
            .opaque([Http2Framing])
            .check();
    }
}
