//! HTTP/2 with prior knowledge, frame by frame.

use coalmine_agent::observer::Opaque;
use coalmine_proto::names::Outcome::{ClientAbort, ClientError, ServerError, Success, UpstreamReset};

use crate::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, NO_FLAGS, PADDED, PING, PRIORITY,
        PUSH_PROMISE, WINDOW_UPDATE, WITH_PRIORITY, answer, block, data, frame, get, goaway, headers,
        opening, request, reset, settings, settings_ack,
    },
    messages::filling,
    script::{Step, read, send_all, send_slowly},
    stage::Case,
};

/// RFC 9113, section 7.
const NO_ERROR: u32 = 0;
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// All that the client says, then all that the application says, and the client closes.
fn exchange(name: &str, client: &[Vec<u8>], application: &[Vec<u8>]) -> Case {
    let client = [opening(), client.concat()].concat();
    let application = [settings(&[]), settings_ack(), application.concat()].concat();
    Case::exchange(name, client, application)
}

fn grpc(tenant: &str) -> Vec<(&str, &str)> {
    let mut fields = get(tenant).to_vec();
    fields[0] = (":method", "POST");
    fields.extend([("content-type", "application/grpc+proto"), ("te", "trailers")]);
    fields
}

#[test]
fn streams_count_by_their_status() {
    exchange("one", &[request(1, "a")], &[answer(1, "200")])
        .counts(&[("a", Success)])
        .check();
    exchange(
        "three at a time, answered in another order",
        &[request(1, "a"), request(3, "b"), request(5, "c")],
        &[answer(5, "404"), answer(1, "500"), answer(3, "204")],
    )
    .counts(&[("a", ServerError), ("b", Success), ("c", ClientError)])
    .check();
    exchange(
        "interim answers",
        &[request(1, "a")],
        &[
            headers(1, NO_FLAGS, &[(":status", "103"), ("link", "x")]),
            headers(1, NO_FLAGS, &[(":status", "100")]),
            answer(1, "503"),
        ],
    )
    .counts(&[("a", ServerError)])
    .check();
}

#[test]
fn every_byte_by_itself() {
    let client = [
        opening(),
        request(1, "a"),
        headers(3, NO_FLAGS, &get("b")),
        data(3, END_STREAM, b"hello"),
    ];
    let application = [
        settings(&[(3, 100)]),
        settings_ack(),
        answer(3, "200"),
        answer(1, "500"),
    ];
    let (client, application) = (client.concat(), application.concat());
    Case::new("byte by byte")
        .client([send_slowly(1, &client), read(&application), Step::Close])
        .application([read(&client), send_slowly(1, &application), Step::ExpectEof])
        .counts(&[("a", ServerError), ("b", Success)])
        .check();
}

#[test]
fn either_side_speaks_first() {
    let first = settings(&[(3, 100), (4, 1 << 20)]);
    let client = [opening(), settings_ack(), request(1, "a")].concat();
    let application = [settings_ack(), answer(1, "200")].concat();
    Case::new("the application")
        .client([read(&first), send_all(&client), read(&application), Step::Close])
        .application([
            send_all(&first),
            read(&client),
            send_all(&application),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success)])
        .check();
    // As a probe does that only connects: nobody can say that this is another protocol.
    Case::new("the application, and then nobody")
        .client([read(&first), Step::Close])
        .application([send_all(&first), Step::ExpectEof])
        .check();
}

#[test]
fn bodies_and_trailers() {
    let pieces = |stream| -> Vec<Vec<u8>> {
        let body = filling(60_000);
        let frames = body.chunks(16_384).map(|piece| data(stream, NO_FLAGS, piece));
        frames.collect()
    };
    let with_body = [
        vec![headers(1, NO_FLAGS, &get("a"))],
        pieces(1),
        vec![data(1, END_STREAM, b"")],
    ]
    .concat();
    let answered = [
        vec![headers(
            1,
            NO_FLAGS,
            &[(":status", "200"), ("content-type", "text/plain")],
        )],
        pieces(1),
        vec![headers(1, END_STREAM, &[("checksum", "1")])],
    ]
    .concat();
    exchange("large bodies", &with_body, &answered)
        .counts(&[("a", Success)])
        .check();
    let with_trailers = [
        headers(1, NO_FLAGS, &get("a")),
        data(1, NO_FLAGS, b"body"),
        headers(1, END_STREAM, &[("checksum", "1")]),
        request(3, "b"),
    ];
    exchange(
        "trailers of the request",
        &with_trailers,
        &[answer(1, "200"), answer(3, "400")],
    )
    .counts(&[("a", Success), ("b", ClientError)])
    .check();
    exchange(
        "an answer before the request is whole",
        &[
            headers(1, NO_FLAGS, &get("a")),
            data(1, NO_FLAGS, b"begun"),
            request(3, "b"),
        ],
        &[answer(1, "413"), reset(1, NO_ERROR), answer(3, "200")],
    )
    .counts(&[("a", ClientError), ("b", Success)])
    .check();
}

#[test]
fn grpc_status_is_the_outcome() {
    let call = |stream, tenant| {
        [
            headers(stream, NO_FLAGS, &grpc(tenant)),
            data(stream, END_STREAM, b"\0\0\0\0\x02hi"),
        ]
        .concat()
    };
    let head = [(":status", "200"), ("content-type", "application/grpc")];
    let message = b"\0\0\0\0\x02ok";
    for (status, outcome) in [
        ("0", Success),
        ("5", ClientError),
        ("14", ServerError),
        ("x", ServerError),
    ] {
        let trailers = headers(1, END_STREAM, &[("grpc-status", status), ("grpc-message", "m")]);
        exchange(
            &format!("trailers with {status}"),
            &[call(1, "a")],
            &[headers(1, NO_FLAGS, &head), data(1, NO_FLAGS, message), trailers],
        )
        .counts(&[("a", outcome)])
        .check();
        let only = [&head[..], &[("grpc-status", status)]].concat();
        exchange(
            &format!("trailers only, with {status}"),
            &[call(1, "a")],
            &[headers(1, END_STREAM, &only)],
        )
        .counts(&[("a", outcome)])
        .check();
    }
    exchange(
        "no status",
        &[call(1, "a"), call(3, "b")],
        &[
            headers(1, NO_FLAGS, &head),
            data(1, END_STREAM, message),
            answer(3, "502"),
        ],
    )
    .counts(&[("a", ServerError), ("b", ServerError)])
    .check();
}

#[test]
fn resets_end_their_streams_only() {
    exchange(
        "by the application",
        &[request(1, "a"), request(3, "b"), request(5, "c")],
        &[
            reset(1, INTERNAL_ERROR),
            reset(5, REFUSED_STREAM),
            answer(3, "200"),
        ],
    )
    .counts(&[("a", UpstreamReset), ("b", Success), ("c", UpstreamReset)])
    .check();
    exchange(
        "by the application, in its answer",
        &[request(1, "a"), request(3, "b")],
        &[
            headers(1, NO_FLAGS, &[(":status", "200")]),
            data(1, NO_FLAGS, b"half"),
            reset(1, INTERNAL_ERROR),
            answer(3, "200"),
        ],
    )
    .counts(&[("a", UpstreamReset), ("b", Success)])
    .check();
    exchange(
        "by the client",
        &[request(1, "a"), reset(1, CANCEL), request(3, "b")],
        // What was under way when the reset came is not counted again.
        &[
            headers(1, NO_FLAGS, &[(":status", "200")]),
            data(1, END_STREAM, b"late"),
            answer(3, "200"),
        ],
    )
    .counts(&[("a", ClientAbort), ("b", Success)])
    .check();
}

#[test]
fn connections_end_with_streams_open() {
    let client = [opening(), request(1, "a"), request(3, "b")].concat();
    let application = [settings(&[]), settings_ack(), answer(1, "200")].concat();
    let begun = |last| [send_all(&client), read(&application), last];
    let heard = |last| [read(&client), send_all(&application), last];
    Case::new("the client closes")
        .client(begun(Step::Close))
        .application(heard(Step::ExpectEof))
        .application([Step::Close])
        .counts(&[("a", Success), ("b", ClientAbort)])
        .check();
    Case::new("the client resets")
        .client(begun(Step::Reset))
        .application(heard(Step::ExpectReset))
        .counts(&[("a", Success), ("b", ClientAbort)])
        .check();
    Case::new("the application closes")
        .client(begun(Step::ExpectEof))
        .client([Step::Close])
        .application(heard(Step::Close))
        .counts(&[("a", Success), ("b", UpstreamReset)])
        .check();
    Case::new("the application resets")
        .client(begun(Step::Say("read")))
        .client([Step::ExpectReset])
        .application(heard(Step::Hear("read")))
        .application([Step::Reset])
        .counts(&[("a", Success), ("b", UpstreamReset)])
        .check();
}

#[test]
fn a_graceful_goaway_is_no_error() {
    // Streams above the last were not processed, and the client tries them elsewhere (RFC 9113, section 6.8).
    let client = [opening(), request(1, "a"), request(3, "b")].concat();
    let application = [
        settings(&[]),
        settings_ack(),
        goaway(1, NO_ERROR),
        answer(1, "200"),
    ]
    .concat();
    Case::until_close("one of two streams is processed", client, application)
        .counts(&[("a", Success)])
        .unfollowed(1)
        .check();
    let client = [opening(), request(1, "a")].concat();
    let all = [
        settings(&[]),
        settings_ack(),
        goaway(0x7fff_ffff, NO_ERROR),
        answer(1, "200"),
    ]
    .concat();
    let all = [all, goaway(1, NO_ERROR)].concat();
    Case::until_close("announced, then said", client, all)
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn an_idle_close_is_passed_on() {
    let client = [opening(), request(1, "a")].concat();
    let application = [settings(&[]), settings_ack(), answer(1, "200")].concat();
    Case::until_close("between two streams", client, application)
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn frames_of_every_form() {
    let fields = block(&get("a"));
    let mut padded = vec![3];
    padded.extend_from_slice(&fields);
    padded.extend_from_slice(&[0; 3]);
    let mut with_all = vec![2, 0x80, 0, 0, 0, 15];
    with_all.extend_from_slice(&fields);
    with_all.extend_from_slice(&[0; 2]);
    let (first, rest) = fields.split_at(7);
    let cases: [(&str, Vec<Vec<u8>>); 7] = [
        (
            "padding",
            vec![frame(HEADERS, END_STREAM | END_HEADERS | PADDED, 1, &padded)],
        ),
        (
            "padding and priority",
            vec![frame(
                HEADERS,
                END_STREAM | END_HEADERS | PADDED | WITH_PRIORITY,
                1,
                &with_all,
            )],
        ),
        (
            "a continuation",
            vec![
                frame(HEADERS, END_STREAM, 1, first),
                frame(CONTINUATION, NO_FLAGS, 1, b""),
                frame(CONTINUATION, END_HEADERS, 1, rest),
            ],
        ),
        (
            "the reserved bit",
            vec![frame(HEADERS, END_STREAM | END_HEADERS, 0x8000_0001, &fields)],
        ),
        (
            "a kind of frame that nobody knows",
            vec![
                frame(0xfa, 0xff, 1, b"what?"),
                request(1, "a"),
                frame(0x10, NO_FLAGS, 0, b""),
            ],
        ),
        (
            "frames about the connection",
            vec![
                frame(PRIORITY, NO_FLAGS, 3, &[0, 0, 0, 0, 9]),
                frame(PING, NO_FLAGS, 0, b"12345678"),
                frame(WINDOW_UPDATE, NO_FLAGS, 0, &[0, 1, 0, 0]),
                request(1, "a"),
                frame(PING, ACK, 0, b"87654321"),
                frame(WINDOW_UPDATE, NO_FLAGS, 1, &[0, 1, 0, 0]),
            ],
        ),
        (
            "padded data",
            vec![
                headers(1, NO_FLAGS, &get("a")),
                frame(DATA, PADDED, 1, b"\x02hello\0\0"),
                frame(DATA, PADDED | END_STREAM, 1, b"\x00"),
            ],
        ),
    ];
    for (name, mut frames) in cases {
        frames.push(request(7, "b"));
        exchange(name, &frames, &[answer(1, "200"), answer(7, "500")])
            .counts(&[("a", Success), ("b", ServerError)])
            .check();
    }
}

#[test]
fn pushed_streams_are_nobodys_requests() {
    let mut promise = 2_u32.to_be_bytes().to_vec();
    promise.extend(block(&get("pushed")));
    exchange(
        "a push",
        &[request(1, "a")],
        &[
            frame(PUSH_PROMISE, END_HEADERS, 1, &promise),
            answer(1, "200"),
            answer(2, "500"),
        ],
    )
    .counts(&[("a", Success)])
    .check();
}

#[test]
fn tunnels_within_streams_count_when_they_are_made() {
    let connect = |stream, tenant| {
        headers(
            stream,
            NO_FLAGS,
            &[
                (":method", "CONNECT"),
                (":authority", "h:1"),
                ("x-tenant", tenant),
            ],
        )
    };
    exchange(
        "CONNECT",
        &[
            connect(1, "a"),
            connect(3, "b"),
            data(1, NO_FLAGS, b"\x16\x03\x01"),
        ],
        &[
            headers(1, NO_FLAGS, &[(":status", "200")]),
            data(1, NO_FLAGS, b"\x16\x03\x03"),
            answer(3, "403"),
        ],
    )
    .counts(&[("a", Success), ("b", ClientError)])
    .check();
}

#[test]
fn a_server_of_http_1_answers_a_client_of_http_2() {
    let client = [opening(), request(1, "a")].concat();
    let answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    Case::until_close("the wrong protocol", client, answer)
        .opaque([Opaque::BadResponse, Opaque::Http2Framing])
        .check();
}

#[test]
fn the_client_is_announced_before_the_preface() {
    exchange(
        "announced",
        &[request(1, "a"), request(3, "b")],
        &[answer(3, "500"), answer(1, "200")],
    )
    .announced()
    .followed()
    .counts(&[("a", Success), ("b", ServerError)])
    .check();
    let first = settings(&[(3, 100)]);
    let client = [opening(), settings_ack(), request(1, "a")].concat();
    let answered = [settings_ack(), answer(1, "200")].concat();
    Case::new("announced, and the application speaks first")
        .client([read(&first), send_all(&client), read(&answered), Step::Close])
        .application([
            send_all(&first),
            read(&client),
            send_all(&answered),
            Step::ExpectEof,
        ])
        .announced()
        .counts(&[("a", Success)])
        .check();
}
