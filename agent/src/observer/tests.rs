//! Tests of the observer.

use coalmine_proto::names::Outcome::{self, *};
use proptest::prelude::*;

use super::{Opaque::*, *};
use crate::tenant::Header;

/// Notes what is observed; a tenant is what the header `t` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    tenants: Vec<String>,
    ended: Vec<(String, Outcome)>,
    latencies: Vec<u64>,
    forgotten: usize,
    opaque: Option<Opaque>,
    open: usize,
}

impl Sink for Notes {
    fn begin(&mut self, head: &dyn Head) -> TenantId {
        let tenant = match head.header("t") {
            Header::Value(value) => String::from_utf8_lossy(value).into_owned(),
            other => format!("{other:?}"),
        };
        self.open += 1;
        self.tenants.push(tenant);
        TenantId(u32::try_from(self.tenants.len() - 1).unwrap())
    }

    fn end(&mut self, tenant: TenantId, outcome: Outcome, times: Times) {
        self.open -= 1;
        let name = self.tenants[tenant.0 as usize].clone();
        self.ended.push((name, outcome));
        self.latencies.push(times.total_ns);
    }

    fn forget(&mut self, _: TenantId) {
        self.open -= 1;
        self.forgotten += 1;
    }

    fn passed_over(&mut self) {
        panic!("there are no streams");
    }

    fn malformed(&mut self, _: Option<TenantId>) {
        panic!("there are no streams");
    }

    fn opaque(&mut self, why: Opaque) {
        assert_eq!(
            self.opaque.replace(why),
            None,
            "a connection is opaque for one reason"
        );
    }
}

/// One thing that happens on a connection.
#[derive(Debug, Clone, Copy)]
enum On<'a> {
    Request(&'a [u8]),
    Response(&'a [u8]),
    ClientClosed,
    ClientReset,
    UpstreamClosed,
    UpstreamReset,
}
use On::{ClientClosed, ClientReset, Request as Q, Response as A, UpstreamClosed};

/// Plays the events, bytes cut at the multiples of `step` counted from `first`.
fn play(events: &[On<'_>], first: usize, step: usize) -> (Notes, Http1) {
    let (mut notes, mut observer, mut now_ns) = (Notes::default(), Http1::new(), 0);
    let cut = |bytes: &[u8]| -> Vec<Vec<u8>> {
        let (head, tail) = bytes.split_at(first.min(bytes.len()));
        let parts = std::iter::once(head).chain(tail.chunks(step));
        parts.map(<[u8]>::to_vec).collect()
    };
    for event in events {
        now_ns += 1000;
        match event {
            Q(bytes) => cut(bytes)
                .iter()
                .for_each(|part| observer.on_request(part, now_ns, &mut notes)),
            A(bytes) => cut(bytes)
                .iter()
                .for_each(|part| observer.on_response(part, now_ns, &mut notes)),
            ClientClosed => observer.client_closed(),
            ClientReset => observer.client_reset(now_ns, &mut notes),
            UpstreamClosed => observer.upstream_closed(now_ns, &mut notes),
            On::UpstreamReset => observer.upstream_reset(now_ns, &mut notes),
        }
    }
    (notes, observer)
}

/// Plays the events whole, cut in two at every byte, and byte by byte.
#[track_caller]
fn check(events: &[On<'_>], ended: &[(&str, Outcome)], opaque: Option<Opaque>) -> Http1 {
    let longest = events.iter().map(|event| match event {
        Q(bytes) | A(bytes) => bytes.len(),
        _ => 0,
    });
    let longest = longest.max().unwrap_or(0);
    let (whole, observer) = play(events, longest, usize::MAX);
    let seen: Vec<(&str, Outcome)> = whole
        .ended
        .iter()
        .map(|(name, outcome)| (name.as_str(), *outcome))
        .collect();
    assert_eq!(seen, ended);
    assert_eq!(whole.opaque, opaque);
    for at in 0..longest.min(600) {
        assert_eq!(play(events, at, usize::MAX).0, whole, "cut at {at}");
    }
    for step in [1, 2, 3, 7] {
        assert_eq!(play(events, 0, step).0, whole, "in steps of {step}");
    }
    observer
}

const GET_A: &[u8] = b"GET /x HTTP/1.1\r\nhost: h\r\nT: a\r\n\r\n";
const GET_B: &[u8] = b"GET / HTTP/1.1\r\nt: b\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
const FAILED: &[u8] = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";

#[test]
fn keep_alive() {
    let observer = check(
        &[Q(GET_A), A(OK), Q(b"\r\n"), Q(GET_B), A(FAILED)],
        &[("a", Success), ("b", ServerError)],
        None,
    );
    assert!(observer.is_between_requests());
}

#[test]
fn latency_is_from_the_first_byte_to_the_last() {
    let split = OK.len() - 1;
    let events = [Q(&GET_A[..3]), Q(&GET_A[3..]), A(&OK[..split]), A(&OK[split..])];
    assert_eq!(play(&events, 99, 99).0.latencies, [3000]);
}

#[test]
fn pipelining() {
    let requests = [GET_A, GET_B, GET_A, GET_B, GET_A].concat();
    let answers = [OK, FAILED, OK, OK, FAILED].concat();
    let expected = [
        ("a", Success),
        ("b", ServerError),
        ("a", Success),
        ("b", Success),
        ("a", ServerError),
    ];
    check(&[Q(&requests), A(&answers)], &expected, None);
    check(
        &[Q(&requests), A(OK), UpstreamClosed],
        &[
            ("a", Success),
            ("b", UpstreamReset),
            ("a", UpstreamReset),
            ("b", UpstreamReset),
            ("a", UpstreamReset),
        ],
        None,
    );
    let many = GET_A.repeat(MAX_PIPELINED + 1);
    let (notes, _) = play(&[Q(&many)], 0, 999);
    assert_eq!((notes.opaque, notes.open), (Some(Pipelined), MAX_PIPELINED));
}

#[test]
fn request_bodies() {
    let length =
        b"POST / HTTP/1.1\r\nt: a\r\ncontent-length: 31\r\n\r\nGET / HTTP/1.1\r\nt: evil\r\n\r\n....";
    let length = [&length[..], GET_B].concat();
    check(
        &[Q(&length), A(OK), A(OK)],
        &[("a", Success), ("b", Success)],
        None,
    );
    let chunked = b"POST / HTTP/1.1\r\nt: a\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n\
        5;ext=\"a\"\r\nhello\r\n1b \r\nGET / HTTP/1.1\r\nt: evil\r\n\r\n\r\n000\r\ntrailer: x\r\nother: y\r\n\r\n";
    let both = [&chunked[..], GET_B].concat();
    check(&[Q(&both), A(OK), A(OK)], &[("a", Success), ("b", Success)], None);
}

#[test]
fn response_bodies() {
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\ngrpc: 0\r\n\r\n";
    check(
        &[Q(GET_A), A(chunked), Q(GET_B), A(OK)],
        &[("a", Success), ("b", Success)],
        None,
    );
    for empty in [
        &b"HTTP/1.1 204 No Content\r\n\r\n"[..],
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\n\r\n",
    ] {
        check(
            &[Q(GET_A), A(empty), Q(GET_B), A(OK)],
            &[("a", Success), ("b", Success)],
            None,
        );
    }
    let head = b"HEAD / HTTP/1.1\r\nt: a\r\n\r\n";
    let answer = b"HTTP/1.1 404 No\r\ncontent-length: 99\r\n\r\n";
    check(
        &[Q(head), A(answer), Q(GET_B), A(OK)],
        &[("a", ClientError), ("b", Success)],
        None,
    );
}

#[test]
fn interim_responses() {
    let post = b"POST / HTTP/1.1\r\nt: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
    let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
    let hints = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    check(
        &[Q(post), A(interim), Q(b"ok"), A(hints), A(hints), A(OK)],
        &[("a", Success)],
        None,
    );
    // Refused before the body was sent.
    let observer = check(
        &[
            Q(post),
            A(b"HTTP/1.1 413 Large\r\ncontent-length: 0\r\n\r\n"),
            Q(b"o"),
            UpstreamClosed,
        ],
        &[("a", ClientError)],
        None,
    );
    assert!(!observer.is_between_requests());
}

#[test]
fn close_delimited_bodies() {
    let old = b"HTTP/1.0 200 OK\r\n\r\nhello";
    check(&[Q(GET_A), A(old)], &[], None);
    check(&[Q(GET_A), A(old), UpstreamClosed], &[("a", Success)], None);
    check(
        &[Q(GET_A), A(old), On::UpstreamReset],
        &[("a", UpstreamReset)],
        None,
    );
    check(
        &[
            Q(GET_A),
            A(b"HTTP/1.1 500 No\r\ntransfer-encoding: gzip\r\n\r\nx"),
            UpstreamClosed,
        ],
        &[("a", ServerError)],
        None,
    );
}

#[test]
fn incomplete_answers() {
    for partial in [&b""[..], b"HTTP/1.1 2", &OK[..OK.len() - 1]] {
        check(
            &[Q(GET_A), A(partial), UpstreamClosed],
            &[("a", UpstreamReset)],
            None,
        );
        check(&[Q(GET_A), A(partial), ClientReset], &[("a", ClientAbort)], None);
        check(
            &[Q(GET_A), A(partial), ClientClosed, UpstreamClosed],
            &[("a", ClientAbort)],
            None,
        );
    }
    check(
        &[Q(GET_A), ClientClosed, A(OK), UpstreamClosed],
        &[("a", Success)],
        None,
    );
    check(&[Q(&GET_A[..20]), ClientReset], &[], None);
}

#[test]
fn what_leaves_the_connection_open() {
    let between =
        |request: &[u8], answer: &[u8]| play(&[Q(request), A(answer)], 0, 999).1.is_between_requests();
    assert!(between(GET_A, OK));
    assert!(!between(GET_A, &OK[..OK.len() - 1]));
    assert!(!between(
        GET_A,
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: x, Close\r\n\r\n"
    ));
    assert!(!between(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", OK));
    assert!(!between(b"GET / HTTP/1.0\r\n\r\n", OK));
    let keep = b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n";
    assert!(!between(keep, b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n"));
    assert!(between(
        keep,
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: Keep-Alive\r\n\r\n"
    ));
    assert!(!Http1::new().is_between_requests());
}

#[test]
fn tunnels_are_opaque() {
    let upgrade = b"GET /ws HTTP/1.1\r\nt: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
    let switch = b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\n\r\n\x81\x05hello";
    check(
        &[Q(upgrade), A(switch), Q(b"\x81\x01x"), A(b"\x81")],
        &[("a", Success)],
        Some(Upgrade),
    );
    check(
        &[Q(upgrade), A(OK), Q(GET_B), A(OK)],
        &[("a", Success), ("b", Success)],
        None,
    );
    let connect = b"CONNECT h:443 HTTP/1.1\r\nt: a\r\n\r\n";
    let made = b"HTTP/1.1 200 OK\r\n\r\n\x16\x03";
    check(
        &[Q(connect), A(made), Q(b"\x16\x03")],
        &[("a", Success)],
        Some(Connect),
    );
    check(&[Q(connect), A(FAILED)], &[("a", ServerError)], None);
}

#[test]
fn ambiguous_requests_are_opaque() {
    for (headers, why) in [
        ("content-length: 5\r\ntransfer-encoding: chunked", Framing),
        ("transfer-encoding: chunked\r\ncontent-length: 5", Framing),
        ("content-length: 5\r\ncontent-length: 6", Framing),
        ("content-length: +5", Framing),
        ("content-length: 0x5", Framing),
        ("content-length: 5, 5", Framing),
        ("content-length:", Framing),
        ("content-length: 99999999999999999999", Framing),
        ("transfer-encoding: chunked, gzip", Framing),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            Framing,
        ),
        ("transfer-encoding: xchunked", Framing),
        ("bad header", NotHttp),
        ("a: b\r\n folded", NotHttp),
    ] {
        let request = format!("POST / HTTP/1.1\r\nt: a\r\n{headers}\r\n\r\nhello");
        check(&[Q(request.as_bytes()), A(OK)], &[], Some(why));
        // What came before is still followed to its answer.
        let second = [GET_B, request.as_bytes()].concat();
        check(&[Q(&second), A(OK), A(OK)], &[("b", Success)], Some(why));
    }
    let same = b"POST / HTTP/1.1\r\nt: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello";
    check(&[Q(same), A(OK)], &[("a", Success)], None);
    check(
        &[Q(b"GET / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n")],
        &[],
        Some(Framing),
    );
}

#[test]
fn ambiguous_answers_are_opaque() {
    for (answer, why) in [
        (
            &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"[..],
            Framing,
        ),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            Framing,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\nhello",
            BadChunk,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\n",
            BadChunk,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
            BadChunk,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n",
            BadChunk,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
            BadChunk,
        ),
        (b"SSH-2.0-x\r\n\r\n", BadResponse),
    ] {
        check(&[Q(GET_A), A(answer), UpstreamClosed], &[], Some(why));
        assert_eq!(play(&[Q(GET_A), A(answer)], 0, 9).0.forgotten, 1);
    }
    check(
        &[A(b"220 smtp ready\r\n"), Q(b"EHLO x\r\n")],
        &[],
        Some(Unsolicited),
    );
    check(
        &[Q(GET_A), A(&[OK, OK].concat())],
        &[("a", Success)],
        Some(Unsolicited),
    );
}

#[test]
fn other_protocols_are_opaque() {
    check(
        &[Q(b"\x16\x03\x01\x02\x00\x01\r\n\r\n"), A(b"\x16\x03\x03")],
        &[],
        Some(NotHttp),
    );
    check(
        &[Q(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), A(b"SSH")],
        &[],
        Some(NotHttp),
    );
}

#[test]
fn heads_are_bounded() {
    let long = |bytes: usize| format!("GET / HTTP/1.1\r\nt: a\r\nx: {}\r\n\r\n", "y".repeat(bytes));
    let frame = long(0).len();
    let fits = long(MAX_HEAD_BYTES - frame);
    let too_long = long(MAX_HEAD_BYTES - frame + 1);
    for step in [100, 65_536, 99_999] {
        let (notes, _) = play(&[Q(fits.as_bytes()), A(OK)], 0, step);
        assert_eq!((notes.ended.len(), notes.opaque), (1, None));
        let (notes, _) = play(&[Q(too_long.as_bytes()), A(OK)], 0, step);
        assert_eq!((notes.ended.len(), notes.opaque), (0, Some(HeadTooLong)));
    }
    let many = |n: usize| format!("GET / HTTP/1.1\r\nt: a\r\n{}\r\n", "x: y\r\n".repeat(n));
    check(
        &[Q(many(MAX_HEADERS - 1).as_bytes()), A(OK)],
        &[("a", Success)],
        None,
    );
    let (notes, _) = play(&[Q(many(MAX_HEADERS).as_bytes())], 0, 9999);
    assert_eq!(notes.opaque, Some(TooManyHeaders));
}

#[test]
fn what_is_asked_after_the_last_exchange_is_nobodys() {
    let closing: &[u8] = b"GET / HTTP/1.1\r\nt: a\r\nconnection: close\r\n\r\n";
    let close: &[u8] = b"HTTP/1.1 400 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let keep: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    // The client says that it is the last.
    check(
        &[Q(closing), Q(GET_B), A(keep), UpstreamClosed],
        &[("a", Success)],
        None,
    );
    check(
        &[Q(closing), A(keep), Q(GET_B), UpstreamClosed],
        &[("a", Success)],
        None,
    );
    check(
        &[Q(closing), Q(GET_B), UpstreamClosed],
        &[("a", UpstreamReset)],
        None,
    );
    // The application says so, when others wait already.
    check(
        &[Q(GET_A), Q(GET_B), Q(GET_B), A(close), UpstreamClosed],
        &[("a", ClientError)],
        None,
    );
    let until_close: &[u8] = b"HTTP/1.1 200 OK\r\n\r\nbytes";
    check(
        &[Q(GET_A), Q(GET_B), A(until_close), UpstreamClosed],
        &[("a", Success)],
        None,
    );
}

#[test]
fn all_connections_together_are_bounded() {
    // What each holds beyond 16 KiB counts against 32 MiB (account.rs).
    let begun = [&b"GET / HTTP/1.1\r\nt: a\r\nx: "[..], &[b'y'; 60_000]].concat();
    let begin = || {
        let (mut notes, mut observer) = (Notes::default(), Http1::new());
        observer.on_request(&begun, 0, &mut notes);
        (notes.opaque, observer)
    };
    let mut followed = Vec::new();
    let refused = (0..1_000).find_map(|_| match begin() {
        (None, observer) => {
            followed.push(observer);
            None
        }
        (Some(why), observer) => Some((why, observer)),
    });
    let (why, refused) = refused.unwrap();
    assert_eq!(why, Memory);
    assert_eq!(followed.len(), (32 << 20) / (begun.len() - (16 << 10)));
    // What is not followed holds nothing.
    drop(followed.pop());
    assert_eq!(begin().0, None);
    drop(refused);
}

#[test]
fn the_length_of_an_answer_is_told_from_its_head() {
    let asked = |requests: &[&[u8]]| play(&[Q(&requests.concat())], 9999, 9999).1;
    let (one, head) = (asked(&[GET_A]), OK.len() - 5);
    for begun in [OK, &OK[..head]] {
        assert_eq!(one.answer_of(begun), Some((head, OK.len() as u64)));
    }
    for other in [
        &OK[..head - 1],
        FAILED,
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 304 No\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ] {
        assert_eq!(one.answer_of(other), None, "{}", other.escape_ascii());
    }
    for requests in [
        &[][..],
        &[GET_A, GET_B],
        &[b"HEAD / HTTP/1.1\r\n\r\n"],
        &[b"CONNECT h:1 HTTP/1.1\r\n\r\n"],
    ] {
        assert_eq!(asked(requests).answer_of(OK), None);
    }
}

#[test]
fn bare_line_feeds_are_ambiguous() {
    check(&[Q(b"GET / HTTP/1.1\nt: a\n\n")], &[], Some(NotHttp));
    check(&[Q(b"GET / HTTP/1.1\r\nx: y\nt: a\r\n\r\n")], &[], Some(NotHttp));
    check(
        &[Q(GET_A), A(b"HTTP/1.1 200 OK\ncontent-length: 0\n\n")],
        &[],
        Some(BadResponse),
    );
}

fn messages() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop::sample::select(vec![
        GET_A,
        GET_B,
        OK,
        FAILED,
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"HTTP/1.1 100 C\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"content-length: 7\r\n",
        b"transfer-encoding: chunked\r\n\r\n",
        b"CONNECT x HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 101 S\r\n\r\n",
        b"\x00\xff",
        b"ffffffff",
    ]);
    let noise = prop::collection::vec(any::<u8>(), 0..20);
    let piece = prop_oneof![9 => pieces.prop_map(<[u8]>::to_vec), 1 => noise];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn nothing_panics_and_each_request_is_told_once(
        parts in prop::collection::vec((any::<bool>(), messages()), 0..8),
        last in 0..4,
        step in 1_usize..50,
    ) {
        let mut events: Vec<On<'_>> = parts
            .iter()
            .map(|(is_request, bytes)| if *is_request { Q(bytes) } else { A(bytes) })
            .collect();
        events.push(match last {
            0 => ClientReset,
            1 => UpstreamClosed,
            2 => On::UpstreamReset,
            _ => ClientClosed,
        });
        let (mut notes, mut observer) = play(&events, 0, step);
        observer.end_all(ClientAbort, 0, &mut notes);
        prop_assert_eq!(notes.open, 0);
        prop_assert_eq!(notes.ended.len() + notes.forgotten, notes.tenants.len());
    }

    #[test]
    fn valid_traffic_is_observed_the_same_however_it_is_cut(
        exchanges in prop::collection::vec((0_u8..4, 0_usize..300), 1..6),
        first in 0_usize..500,
        step in 1_usize..200,
    ) {
        let (mut requests, mut answers, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for (kind, size) in exchanges {
            let data = "x".repeat(size);
            let body = match kind {
                0 | 1 => format!("content-length: {size}\r\n\r\n{data}"),
                _ if size == 0 => "transfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
                _ => format!("transfer-encoding: chunked\r\n\r\n{size:x};e\r\n{data}\r\n0\r\na: b\r\n\r\n"),
            };
            requests.extend(format!("PUT / HTTP/1.1\r\nt: t{kind}\r\n{body}").into_bytes());
            let status = if kind % 2 == 0 { 200 } else { 500 };
            answers.extend(format!("HTTP/1.1 {status} X\r\n{body}").into_bytes());
            let outcome = if kind % 2 == 0 { Success } else { ServerError };
            expected.push((format!("t{kind}"), outcome));
        }
        let (notes, observer) = play(&[Q(&requests), A(&answers)], first, step);
        prop_assert_eq!(notes.ended, expected);
        prop_assert_eq!(notes.opaque, None);
        prop_assert!(observer.is_between_requests());
    }
}
