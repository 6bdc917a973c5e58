//! Whole exchanges of HTTP/1: every kind of body, interim answers, pipelining, tunnels.

use coalmine_agent::observer::Opaque;
use coalmine_proto::names::Outcome::{ClientError, ServerError, Success, UpstreamReset};

use crate::{
    messages::{FAILED, OK, OK_AND_CLOSE, answer, chunked, filling, get, request},
    script::{Step, read, send_all, send_slowly},
    stage::Case,
};

const TENANT: &str = "X-Tenant: a";
const CHUNKED: &str = "Transfer-Encoding: chunked";

#[test]
fn methods() {
    for method in [
        "GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "P-U_R!GE",
    ] {
        let request = request(&format!("{method} /x?y=z HTTP/1.1"), &[TENANT], b"");
        Case::exchange(method, request, OK)
            .counts(&[("a", Success)])
            .check();
    }
    let options = request("OPTIONS * HTTP/1.1", &[TENANT], b"");
    Case::exchange(
        "OPTIONS *",
        options,
        answer("204 No Content", &["Allow: GET"], b""),
    )
    .counts(&[("a", Success)])
    .check();
}

#[test]
fn bytes_are_passed_on_as_they_are() {
    let odd = b"\r\n\r\nPOST /Mixed%2f?q#f HTTP/1.1\r\nHOST:h\r\nx-TENANT:\t a \t\r\nX-Tenant: a\r\n\
        X-Empty:\r\nX-Latin: \xe9\xff\r\ncontent-length: 5\r\n\r\nhello";
    let strange = b"HTTP/1.1 200  Very   Fine \xe9\r\nX-ODD:   spaces \r\nSet-Cookie: a\r\nset-cookie: b\r\n\
        content-length:2\r\n\r\nok";
    Case::exchange("odd spelling", odd, strange)
        .counts(&[("a", Success)])
        .check();
    Case::exchange(
        "no reason",
        get("a"),
        b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n",
    )
    .counts(&[("a", Success)])
    .check();
}

#[test]
fn the_outcome_is_the_status() {
    for (status, outcome) in [
        ("200 OK", Success),
        ("301 Moved", Success),
        ("404 Not Found", ClientError),
        ("429 Slow Down", ClientError),
        ("500 No", ServerError),
        ("599 No", ServerError),
    ] {
        let answer = answer(status, &["Content-Length: 4"], b"body");
        Case::exchange(status, get("a"), answer)
            .counts(&[("a", outcome)])
            .check();
    }
    let nobody = request("GET / HTTP/1.1", &[], b"");
    Case::exchange("no tenant", nobody, OK)
        .counts(&[("__none__", Success)])
        .check();
}

#[test]
fn bodies_of_requests() {
    let bodies: [(&str, &[&str], Vec<u8>); 6] = [
        ("length", &["Content-Length: 100"], filling(100)),
        ("no bytes", &["Content-Length: 0"], Vec::new()),
        ("chunks", &[CHUNKED], chunked(&[5, 26, 1, 300])),
        ("no chunks", &[CHUNKED], chunked(&[])),
        (
            "two codings",
            &["Transfer-Encoding: gzip, Chunked"],
            chunked(&[9]),
        ),
        ("no length", &[], Vec::new()),
    ];
    for (name, framing, body) in bodies {
        let headers = [&[TENANT][..], framing].concat();
        // Another request follows, so that the end of the body matters.
        let both = [request("POST / HTTP/1.1", &headers, body), get("b")].concat();
        Case::exchange(name, both, [OK, FAILED].concat())
            .counts(&[("a", Success), ("b", ServerError)])
            .check();
    }
}

#[test]
fn bodies_of_answers() {
    let head = |framing| request("HEAD / HTTP/1.1", &[TENANT, framing], b"");
    let answers: [(&str, Vec<u8>, Vec<u8>); 8] = [
        (
            "length",
            get("a"),
            answer("200 OK", &["Content-Length: 99"], filling(99)),
        ),
        (
            "no bytes",
            get("a"),
            answer("200 OK", &["Content-Length: 0"], b""),
        ),
        (
            "chunks",
            get("a"),
            answer("200 OK", &[CHUNKED, "Trailer: Grpc-Status"], chunked(&[7, 1, 99])),
        ),
        ("no chunks", get("a"), answer("200 OK", &[CHUNKED], chunked(&[]))),
        ("204", get("a"), answer("204 No Content", &[], b"")),
        (
            "304 with a length",
            get("a"),
            answer("304 Not Modified", &["Content-Length: 99"], b""),
        ),
        (
            "HEAD with a length",
            head("A: b"),
            answer("200 OK", &["Content-Length: 99"], b""),
        ),
        (
            "HEAD with chunks",
            head("A: b"),
            answer("200 OK", &[CHUNKED], b""),
        ),
    ];
    for (name, request, answer) in answers {
        let both = [request, get("b")].concat();
        Case::exchange(name, both, [&answer[..], FAILED].concat())
            .counts(&[("a", Success), ("b", ServerError)])
            .check();
    }
}

#[test]
fn answers_that_end_with_the_connection() {
    for (name, answer) in [
        ("1.0", b"HTTP/1.0 200 OK\r\n\r\nuntil the close".to_vec()),
        ("1.1", answer("200 OK", &["Connection: close"], filling(5000))),
        (
            "another coding",
            answer("200 OK", &["Transfer-Encoding: gzip"], filling(50)),
        ),
        ("empty", answer("200 OK", &[], b"")),
        ("a length and a close", OK_AND_CLOSE.to_vec()),
    ] {
        Case::until_close(name, get("a"), answer)
            .counts(&[("a", Success)])
            .check();
    }
}

#[test]
fn http_1_0() {
    let old = b"GET / HTTP/1.0\r\nX-Tenant: a\r\n\r\n";
    Case::until_close("1.0", old, b"HTTP/1.0 404 No\r\nContent-Length: 2\r\n\r\nno")
        .counts(&[("a", ClientError)])
        .check();
    let kept = b"GET / HTTP/1.0\r\nX-Tenant: a\r\nConnection: keep-alive\r\n\r\n";
    let answer = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok";
    let turn = [send_all(kept), read(answer)];
    let other = [read(kept), send_all(answer)];
    Case::new("1.0 that is kept")
        .client([turn.clone(), turn].concat())
        .client([Step::Close])
        .application([other.clone(), other].concat())
        .application([Step::ExpectEof])
        .counts(&[("a", Success), ("a", Success)])
        .check();
}

#[test]
fn interim_answers() {
    let post = request(
        "POST / HTTP/1.1",
        &[TENANT, "Expect: 100-continue", "Content-Length: 5"],
        b"",
    );
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    Case::new("100-continue")
        .client([send_all(&post), Step::ReadUntil(b"Continue\r\n\r\n")])
        .client([send_all(b"hello"), read(OK), Step::Close])
        .application([Step::ReadUntil(b"\r\n\r\n"), send_all(go_on)])
        .application([Step::Read(5), send_all(OK), Step::ExpectEof])
        .counts(&[("a", Success)])
        .check();
    let hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n";
    let several = [
        &b"HTTP/1.1 102 Processing\r\n\r\n"[..],
        hints,
        hints,
        go_on,
        FAILED,
    ]
    .concat();
    Case::exchange("several", get("a"), several)
        .counts(&[("a", ServerError)])
        .check();
    Case::new("one after the other")
        .client([
            send_all(get("a")),
            read(hints),
            Step::Say("seen"),
            read(OK),
            Step::Close,
        ])
        .application([read(get("a")), send_all(hints), Step::Hear("seen")])
        .application([send_all(OK), Step::ExpectEof])
        .counts(&[("a", Success)])
        .check();
    let refused = b"HTTP/1.1 417 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    Case::until_close("expectation refused", &post, refused)
        .counts(&[("a", ClientError)])
        .check();
}

#[test]
fn pipelining() {
    for depth in [5, 50] {
        let (mut requests, mut answers, mut counted) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..depth {
            let (tenant, outcome) = match number % 3 {
                0 => ("a", Success),
                1 => ("b", ServerError),
                _ => ("c", ClientError),
            };
            let body = filling(number * 7);
            let length = format!("Content-Length: {}", body.len());
            let tenant_header = format!("X-Tenant: {tenant}");
            requests.extend(request("POST / HTTP/1.1", &[&tenant_header, &length], &body));
            let status = match outcome {
                Success => "200 OK",
                ServerError => "502 No",
                _ => "400 No",
            };
            answers.extend(answer(status, &[&length], &body));
            counted.push((tenant, outcome));
        }
        Case::exchange(format!("{depth} at once"), &requests, &answers)
            .counts(&counted)
            .check();
        Case::new(format!("{depth} in pieces"))
            .client([send_slowly(97, &requests), read(&answers), Step::Close])
            .application([read(&requests), send_slowly(89, &answers), Step::ExpectEof])
            .counts(&counted)
            .check();
    }
}

#[test]
fn byte_by_byte() {
    let headers = [TENANT, CHUNKED];
    let request = [request("POST / HTTP/1.1", &headers, chunked(&[3, 12])), get("b")].concat();
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n".to_vec();
    let answers = [
        interim,
        answer("200 OK", &[CHUNKED], chunked(&[1, 17])),
        FAILED.to_vec(),
    ]
    .concat();
    Case::new("every byte by itself")
        .client([send_slowly(1, &request), read(&answers), Step::Close])
        .application([read(&request), send_slowly(1, &answers), Step::ExpectEof])
        .counts(&[("a", Success), ("b", ServerError)])
        .check();
}

#[test]
fn large_bodies() {
    let large = filling(1 << 20);
    let length = "Content-Length: 1048576";
    let upload = request("PUT / HTTP/1.1", &[TENANT, length], &large);
    let download = answer("200 OK", &[length], &large);
    Case::exchange("up", &upload, OK)
        .counts(&[("a", Success)])
        .check();
    Case::exchange("down", get("a"), &download)
        .counts(&[("a", Success)])
        .check();
    let head = upload.len() - large.len();
    Case::new("both at once, the answer before the request is read")
        .client([Step::SendAndRead(upload.clone(), download.len()), Step::Close])
        .application([
            Step::Read(head),
            Step::SendAndRead(download.clone(), large.len()),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success)])
        .check();
    let chunks = chunked(&[1 << 19, 70_000, 65_536, 16_384]);
    let upload = request("PUT / HTTP/1.1", &[TENANT, CHUNKED], &chunks);
    let download = answer("200 OK", &[CHUNKED], &chunks);
    Case::exchange(
        "large chunks",
        [upload, get("b")].concat(),
        [&download[..], FAILED].concat(),
    )
    .counts(&[("a", Success), ("b", ServerError)])
    .check();
    Case::until_close("down until the close", get("a"), answer("200 OK", &[], &large))
        .counts(&[("a", Success)])
        .check();
}

#[test]
fn bodies_around_the_sizes_of_buffers() {
    let mut case = Case::new("one after the other");
    for size in [16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000] {
        let length = format!("Content-Length: {size}");
        let body = filling(size);
        let upload = request("PUT / HTTP/1.1", &[TENANT, &length], &body);
        let download = answer("200 OK", &[&length], &body);
        case = case
            .client([send_all(&upload), read(&download)])
            .application([read(&upload), send_all(&download)])
            .counts(&[("a", Success)]);
    }
    case.client([Step::Close]).application([Step::ExpectEof]).check();
}

/// An answer after a long one is looked at before it is read, whatever it turns out to be.
#[test]
fn answers_after_a_long_one() {
    let length = "Content-Length: 100000";
    let long = answer("200 OK", &[length], filling(100_000));
    let head_only = answer("200 OK", &[length], b"");
    let not_modified = answer("304 Not Modified", &[length], b"");
    let interim = [&answer("103 Early Hints", &[], b"")[..], &long].concat();
    let large_head = answer(
        "200 OK",
        &[&format!("X: {}", "y".repeat(9_000)), length],
        filling(100_000),
    );
    let chunks = answer("200 OK", &[CHUNKED], chunked(&[50_000, 1]));
    let head = request("HEAD / HTTP/1.1", &[TENANT], b"");
    let mut case = Case::new("one after the other");
    for (asked, said) in [
        (&get("a"), &long[..]),
        (&get("a"), OK),
        (&get("a"), &long),
        (&head, &head_only),
        (&get("a"), &long),
        (&get("a"), &not_modified),
        (&get("a"), &long),
        (&get("a"), &interim),
        (&get("a"), &long),
        (&get("a"), &large_head),
        (&get("a"), &long),
        (&get("a"), &chunks),
        (&get("a"), &long),
    ] {
        case = case
            .client([send_all(asked), read(said)])
            .application([read(asked), send_all(said)])
            .counts(&[("a", Success)]);
    }
    case.client([Step::Close]).application([Step::ExpectEof]).check();

    let two = [get("a"), get("b")].concat();
    Case::exchange(
        "in a pipeline",
        [get("a"), two].concat(),
        [&long[..], &long, FAILED].concat(),
    )
    .counts(&[("a", Success), ("a", Success), ("b", ServerError)])
    .check();
    let cut = [&long[..], &long[..60_000]].concat();
    Case::until_close("cut off", [get("a"), get("b")].concat(), &cut)
        .counts(&[("a", Success), ("b", UpstreamReset)])
        .check();
    Case::new("byte by byte")
        .client([
            send_all(get("a")),
            read(&long),
            send_all(get("b")),
            read(&long),
            Step::Close,
        ])
        .application([read(get("a")), send_all(&long), read(get("b"))])
        .application([
            Step::SendSlowly(1, long[..200].to_vec()),
            send_all(&long[200..]),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success), ("b", Success)])
        .check();
}

#[test]
fn upgrades() {
    let headers = [TENANT, "Upgrade: websocket", "Connection: Upgrade"];
    let upgrade = request("GET /ws HTTP/1.1", &headers, b"");
    let headers = ["Upgrade: websocket", "Connection: Upgrade"];
    let first = answer("101 Switching Protocols", &headers, b"\x81\x05first");
    let (up, down) = (filling(20_000), filling(30_000));
    Case::new("websocket")
        .client([
            send_all(&upgrade),
            read(&first),
            Step::SendAndRead(up.clone(), down.len()),
            Step::Close,
        ])
        .application([read(&upgrade), send_all(&first)])
        .application([Step::SendAndRead(down, up.len()), Step::ExpectEof])
        .counts(&[("a", Success)])
        .opaque([Opaque::Upgrade])
        .check();
    Case::exchange("refused", [upgrade, get("b")].concat(), [OK, FAILED].concat())
        .counts(&[("a", Success), ("b", ServerError)])
        .check();
}

#[test]
fn tunnels() {
    let connect = request("CONNECT h:443 HTTP/1.1", &[TENANT], b"");
    for (name, made) in [
        ("made", answer("200 OK", &[], b"")),
        // RFC 9110, section 9.3.6: a client ignores the length.
        (
            "made, with a length",
            answer("200 OK", &["Content-Length: 5"], b""),
        ),
    ] {
        Case::new(name)
            .client([
                send_all(&connect),
                read(&made),
                send_all(b"\x16\x03\x01"),
                Step::Read(4),
                Step::Close,
            ])
            .application([read(&connect), send_all(&made), Step::Read(3)])
            .application([send_all(b"\x16\x03\x03\x00"), Step::ExpectEof])
            .counts(&[("a", Success)])
            .opaque([Opaque::Connect])
            .check();
    }
    let refused = answer("403 No", &["Content-Length: 2"], b"no");
    Case::exchange(
        "refused",
        [connect, get("b")].concat(),
        [&refused[..], OK].concat(),
    )
    .counts(&[("a", ClientError), ("b", Success)])
    .check();
}

#[test]
fn events_count_and_are_passed_on_at_once() {
    let head = answer("200 OK", &["Content-Type: text/event-stream", CHUNKED], b"");
    let event = b"9\r\ndata: 1\n\n\r\n";
    Case::new("server-sent events")
        .client([send_all(get("a")), read(&head), read(event), Step::Say("one")])
        .client([read(event), Step::Say("two"), Step::Read(5), Step::Close])
        .application([
            read(get("a")),
            send_all(&head),
            send_all(event),
            Step::Hear("one"),
        ])
        .application([
            send_all(event),
            Step::Hear("two"),
            send_all(b"0\r\n\r\n"),
            Step::ExpectEof,
        ])
        .counts(&[("a", Success)])
        .check();
}
