//! Tests of the observer of HTTP/2: whole connections, built from frames by hand.

mod blocks;
mod grpc;
mod hostile;

use coalmine_proto::names::Outcome::*;

use super::{
    super::{TenantId, Times, protocol::PREFACE},
    *,
};
use crate::tenant::{Head, Header};

// Types and flags of frames (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const HAS_PRIORITY: u8 = 0x20;

/// Notes what is observed; a tenant is what the header `t` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    tenants: Vec<String>,
    hosts: Vec<String>,
    targets: Vec<String>,
    ended: Vec<(String, Outcome)>,
    times: Vec<Times>,
    forgotten: Vec<String>,
    passed_over: usize,
    malformed: usize,
    opaque: Option<Opaque>,
    open: usize,
}

impl Sink for Notes {
    fn begin(&mut self, head: &dyn Head) -> TenantId {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.open += 1;
        self.hosts.push(match head.host() {
            Header::Value(host) => text(host),
            other => format!("{other:?}"),
        });
        self.targets.push(text(head.target()));
        self.tenants.push(match head.header("t") {
            Header::Value(value) => text(value),
            other => format!("{other:?}"),
        });
        TenantId(u32::try_from(self.tenants.len() - 1).unwrap())
    }

    fn end(&mut self, tenant: TenantId, outcome: Outcome, times: Times) {
        self.open -= 1;
        let name = self.tenants[tenant.0 as usize].clone();
        self.ended.push((name, outcome));
        self.times.push(times);
    }

    fn forget(&mut self, tenant: TenantId) {
        self.open -= 1;
        self.forgotten.push(self.tenants[tenant.0 as usize].clone());
    }

    fn passed_over(&mut self) {
        self.passed_over += 1;
    }

    fn malformed(&mut self, begun: Option<TenantId>) {
        if let Some(tenant) = begun {
            self.forget(tenant);
        }
        self.malformed += 1;
    }

    fn opaque(&mut self, why: Opaque) {
        let before = self.opaque.replace(why);
        assert_eq!(before, None, "a connection is opaque for one reason");
    }
}

/// One thing that happens on a connection.
#[derive(Debug, Clone)]
enum On {
    Request(Vec<u8>),
    Response(Vec<u8>),
    ClientClosed,
    ClientReset,
    UpstreamClosed,
}
use On::{ClientClosed, ClientReset, Request as Q, Response as A, UpstreamClosed};

/// Plays the events after both sides' SETTINGS, bytes cut in pieces of `step` after a first one.
fn play(events: &[On], first: usize, step: usize) -> (Notes, Http2) {
    let (mut notes, mut observer, mut now_ns) = (Notes::default(), Http2::new(), 0);
    let start = [
        Q(client_start()),
        A(server_start()),
        Q(frame(SETTINGS, ACK, 0, b"")),
    ];
    for event in start.iter().chain(events) {
        now_ns += 1000;
        let (Q(bytes) | A(bytes)) = event else {
            match event {
                ClientClosed => observer.client_closed(),
                ClientReset => observer.client_reset(now_ns, &mut notes),
                _ => observer.upstream_closed(now_ns, &mut notes),
            }
            continue;
        };
        let (head, tail) = bytes.split_at(first.min(bytes.len()));
        for piece in std::iter::once(head).chain(tail.chunks(step)) {
            match event {
                Q(_) => observer.on_request(piece, now_ns, &mut notes),
                _ => observer.on_response(piece, now_ns, &mut notes),
            }
        }
    }
    assert_eq!(observer.pending(), notes.open);
    (notes, observer)
}

/// Plays the events whole, cut in two at every byte, and in small pieces.
#[track_caller]
fn replay(events: &[On]) -> (Notes, Http2) {
    let longest = events.iter().map(|event| match event {
        Q(bytes) | A(bytes) => bytes.len(),
        _ => 0,
    });
    let longest = longest.max().unwrap_or(0).max(PREFACE.len() + 9);
    let (whole, observer) = play(events, longest, usize::MAX);
    for at in 0..longest.min(600) {
        assert_eq!(play(events, at, usize::MAX).0, whole, "cut at {at}");
    }
    for step in [1, 2, 3, 7, 64] {
        assert_eq!(play(events, 0, step).0, whole, "in steps of {step}");
    }
    (whole, observer)
}

#[track_caller]
fn check(events: &[On], ended: &[(&str, Outcome)], opaque: Option<Opaque>) -> (Notes, Http2) {
    let (notes, observer) = replay(events);
    let seen = notes
        .ended
        .iter()
        .map(|(name, outcome)| (name.as_str(), *outcome));
    assert_eq!(seen.collect::<Vec<_>>(), ended);
    assert_eq!(notes.opaque, opaque);
    assert_eq!(observer.is_opaque(), opaque.is_some() || is_over(events));
    (notes, observer)
}

fn is_over(events: &[On]) -> bool {
    matches!(events.last(), Some(ClientReset | UpstreamClosed))
}

// === frames ===

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn client_start() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, b"")].concat()
}

fn server_start() -> Vec<u8> {
    [
        frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]),
        frame(SETTINGS, ACK, 0, b""),
    ]
    .concat()
}

/// A header block in which every field is spelled out and none is kept.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            assert!(text.len() < 127);
            block.extend(text.as_bytes());
        }
    }
    block
}

fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, flags | END_HEADERS, stream, &block(fields))
}

const POST: [(&str, &str); 4] = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/x?y=z"),
    (":authority", "shop.example"),
];

/// A request that goes on, with further fields.
fn post(stream: u32, tenant: &str, more: &[(&str, &str)]) -> Vec<u8> {
    headers(stream, 0, &[&POST[..], &[("t", tenant)], more].concat())
}

/// A request without a body.
fn get(stream: u32, tenant: &str) -> Vec<u8> {
    headers(stream, END_STREAM, &[&POST[..], &[("t", tenant)]].concat())
}

fn data(stream: u32, flags: u8, length: usize) -> Vec<u8> {
    frame(DATA, flags, stream, &vec![0; length])
}

fn status(stream: u32, flags: u8, status: &str) -> Vec<u8> {
    headers(stream, flags, &[(":status", status)])
}

fn reset(stream: u32, code: u8) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, code])
}

fn go_away(last: u32, code: u8) -> Vec<u8> {
    let mut payload = last.to_be_bytes().to_vec();
    payload.extend([0, 0, 0, code]);
    payload.extend(b"bye");
    frame(GOAWAY, 0, 0, &payload)
}

fn q(parts: &[Vec<u8>]) -> On {
    Q(parts.concat())
}

fn a(parts: &[Vec<u8>]) -> On {
    A(parts.concat())
}

// === requests and answers ===

#[test]
fn requests_and_answers() {
    let (notes, observer) = check(
        &[
            q(&[
                get(1, "a"),
                post(3, "b", &[]),
                data(3, 0, 500),
                data(3, END_STREAM, 0),
            ]),
            a(&[status(1, 0, "200"), data(1, 0, 99), data(1, END_STREAM, 1)]),
            a(&[status(3, END_STREAM, "503")]),
        ],
        &[("a", Success), ("b", ServerError)],
        None,
    );
    assert!(observer.is_quiet());
    assert_eq!(notes.hosts, ["shop.example"; 2]);
    assert_eq!(notes.targets, ["/x?y=z"; 2]);
}

#[test]
fn streams_end_in_any_order() {
    let requests: Vec<_> = (0..40).map(|n| get(n * 2 + 1, &n.to_string())).collect();
    let heads: Vec<_> = (0..40).map(|n| status(n * 2 + 1, 0, "204")).collect();
    let ends: Vec<_> = (0..40).rev().map(|n| data(n * 2 + 1, END_STREAM, 3)).collect();
    let (notes, observer) = replay(&[q(&requests), a(&heads), a(&ends)]);
    let names: Vec<_> = notes.ended.iter().map(|(name, _)| name.clone()).collect();
    let expected: Vec<_> = (0..40).rev().map(|n| n.to_string()).collect();
    assert_eq!(names, expected);
    assert!(observer.is_quiet());
}

#[test]
fn times_are_from_the_first_byte_of_the_head() {
    // The start takes three thousand nanoseconds.
    let (request, answer) = (get(1, "a"), status(1, 0, "200"));
    let (notes, _) = play(
        &[
            Q(request[..1].to_vec()),
            Q(request[1..].to_vec()),
            a(&[status(1, 0, "103")]),
            A(answer[..1].to_vec()),
            A(answer[1..].to_vec()),
            a(&[data(1, 0, 5)]),
            a(&[data(1, END_STREAM, 5)]),
        ],
        9999,
        9999,
    );
    let expected = Times {
        total_ns: 6000,
        first_byte_ns: Some(3000),
        is_stream: false,
    };
    assert_eq!(notes.times, [expected]);
}

#[test]
fn an_unanswered_request_has_no_first_byte() {
    let (notes, _) = check(
        &[q(&[get(1, "a")]), UpstreamClosed],
        &[("a", UpstreamReset)],
        None,
    );
    assert_eq!(notes.times[0].first_byte_ns, None);
}

#[test]
fn event_streams_say_nothing_about_speed() {
    let events = [
        (":status", "200"),
        ("content-type", "text/event-stream;charset=utf-8"),
    ];
    let (notes, _) = check(
        &[
            q(&[get(1, "a")]),
            a(&[headers(1, 0, &events), data(1, END_STREAM, 9)]),
        ],
        &[("a", Success)],
        None,
    );
    assert!(notes.times[0].is_stream);
}

#[test]
fn interim_answers_are_not_the_answer() {
    check(
        &[
            q(&[get(1, "a")]),
            a(&[
                status(1, 0, "100"),
                status(1, 0, "103"),
                status(1, END_STREAM, "404"),
            ]),
        ],
        &[("a", ClientError)],
        None,
    );
}

#[test]
fn answers_that_no_client_accepts() {
    for answer in [
        headers(1, END_STREAM, &[("x", "y")]),
        status(1, END_STREAM, "2xx"),
        status(1, END_STREAM, "100"),
        data(1, END_STREAM, 3),
    ] {
        check(&[q(&[get(1, "a")]), a(&[answer])], &[("a", ServerError)], None);
    }
}

#[test]
fn padding_and_priority_are_passed_over() {
    let fields = block(&[&POST[..], &[("t", "a")]].concat());
    let padded = [&[4_u8, 0, 0, 0, 0, 255][..], &fields, &[0; 4]].concat();
    let flags = END_STREAM | END_HEADERS | PADDED | HAS_PRIORITY;
    let answer = [&[2_u8][..], &block(&[(":status", "500")]), &[0; 2]].concat();
    check(
        &[
            q(&[frame(PRIORITY, 0, 3, &[0; 5]), frame(HEADERS, flags, 1, &padded)]),
            a(&[frame(HEADERS, END_HEADERS | PADDED, 1, &answer)]),
            a(&[frame(DATA, END_STREAM | PADDED, 1, &[3, 1, 0, 0, 0])]),
        ],
        &[("a", ServerError)],
        None,
    );
    // Nothing but padding.
    check(
        &[
            q(&[get(1, "a")]),
            a(&[
                status(1, 0, "200"),
                frame(DATA, END_STREAM | PADDED, 1, &[2, 0, 0]),
            ]),
        ],
        &[("a", Success)],
        None,
    );
}

#[test]
fn blocks_go_on_in_further_frames() {
    let fields = block(&[&POST[..], &[("t", "a")]].concat());
    for at in 0..=fields.len() {
        let (first, rest) = fields.split_at(at);
        let (second, third) = rest.split_at(rest.len() / 2);
        let request = [
            frame(HEADERS, END_STREAM, 1, first),
            frame(CONTINUATION, 0, 1, second),
            frame(CONTINUATION, 0, 1, b""),
            frame(CONTINUATION, END_HEADERS, 1, third),
        ];
        let answer = block(&[(":status", "200")]);
        let answer = [
            frame(HEADERS, END_STREAM, 1, &answer[..4]),
            frame(CONTINUATION, END_HEADERS, 1, &answer[4..]),
        ];
        let (notes, _) = play(&[q(&request), a(&answer)], 13, 17);
        assert_eq!(notes.ended, [("a".to_owned(), Success)], "cut at {at}");
    }
}

#[test]
fn other_frames_change_nothing() {
    let others = [
        frame(PING, 0, 0, &[0; 8]),
        frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0]),
        frame(WINDOW_UPDATE, 0, 1, &[0, 0, 1, 0]),
        frame(0xbe, 0xff, 77, b"grease"),
    ]
    .concat();
    check(
        &[
            q(&[others.clone(), get(1, "a"), others.clone()]),
            a(&[
                others.clone(),
                status(1, 0, "200"),
                others,
                data(1, END_STREAM, 9),
            ]),
        ],
        &[("a", Success)],
        None,
    );
}

#[test]
fn an_answer_may_be_complete_before_its_request() {
    let early = a(&[status(1, END_STREAM, "413")]);
    let request = q(&[post(1, "a", &[]), data(1, 0, 10)]);
    // The client goes on, then there is no doubt about what follows.
    let rest = q(&[data(1, 0, 10), headers(1, END_STREAM, &[("x", "y")]), get(3, "b")]);
    let (_, observer) = check(
        &[request.clone(), early.clone(), rest],
        &[("a", ClientError)],
        None,
    );
    assert_eq!(observer.pending(), 1);
    // The server asks it to stop.
    let (_, observer) = check(
        &[
            request,
            early,
            a(&[reset(1, 0)]),
            q(&[data(1, 0, 10), data(1, END_STREAM, 10)]),
        ],
        &[("a", ClientError)],
        None,
    );
    assert!(observer.is_quiet());
}

#[test]
fn resets() {
    let request = q(&[post(1, "a", &[]), get(3, "b")]);
    for code in [0, 2, 7, 11] {
        check(
            &[
                request.clone(),
                a(&[reset(1, code), status(3, END_STREAM, "200")]),
            ],
            &[("a", UpstreamReset), ("b", Success)],
            None,
        );
    }
    // What is on the way is ignored, but not its header blocks: they fill the tables.
    let late = [&[0x40_u8, 4][..], b"late", &[1], b"1"].concat();
    let (notes, observer) = check(
        &[
            request.clone(),
            q(&[reset(1, 8)]),
            a(&[status(1, 0, "200"), data(1, 0, 9)]),
            a(&[
                frame(HEADERS, END_STREAM | END_HEADERS, 1, &late),
                status(3, END_STREAM, "200"),
            ]),
            a(&[reset(1, 0)]),
        ],
        &[("a", ClientAbort), ("b", Success)],
        None,
    );
    assert_eq!(notes.malformed, 0);
    assert!(observer.is_quiet() && observer.footprint() > 0);
    // The same for trailers of a request that the server did not want to hear, even if the client has passed
    // over numbers of streams.
    let trailers = frame(HEADERS, END_STREAM | END_HEADERS, 1, &late);
    let late = q(&[data(1, 0, 1), trailers]);
    check(
        &[request.clone(), a(&[reset(1, 0)]), late.clone()],
        &[("a", UpstreamReset)],
        None,
    );
    check(
        &[request, q(&[get(9, "c")]), a(&[reset(1, 0)]), late],
        &[("a", UpstreamReset)],
        None,
    );
}

#[test]
fn tunnels_are_answered_when_they_are_accepted() {
    let connect = headers(
        1,
        0,
        &[(":method", "CONNECT"), (":authority", "db:5432"), ("t", "a")],
    );
    let extended = [&POST[1..], &[(":method", "CONNECT"), (":protocol", "websocket")]].concat();
    let extended = [&block(&extended)[..], &block(&[("t", "a")])].concat();
    let extended = frame(HEADERS, END_HEADERS, 1, &extended);
    for request in [connect.clone(), extended] {
        let (notes, observer) = check(
            &[
                q(&[request]),
                a(&[status(1, 0, "200")]),
                q(&[data(1, 0, 9)]),
                a(&[data(1, 0, 9)]),
            ],
            &[("a", Success)],
            None,
        );
        assert_eq!(notes.times[0].first_byte_ns, Some(1000));
        assert!(!observer.is_quiet() && observer.pending() == 0);
    }
    let refusal = a(&[status(1, 0, "502"), data(1, END_STREAM, 9)]);
    check(
        &[q(std::slice::from_ref(&connect)), refusal],
        &[("a", ServerError)],
        None,
    );
    // A tunnel that breaks was answered before.
    let broken = a(&[status(1, 0, "200"), reset(1, 2)]);
    let (_, observer) = check(&[q(&[connect]), broken], &[("a", Success)], None);
    assert!(observer.is_quiet());
}

#[test]
fn a_server_that_stops_with_grace_makes_no_error() {
    let requests = q(&[get(1, "a"), get(3, "b"), get(5, "c")]);
    let (notes, observer) = check(
        &[
            requests.clone(),
            a(&[go_away(LAST_STREAM, 0), go_away(3, 0)]),
            q(&[get(7, "d")]),
            a(&[status(1, END_STREAM, "200"), status(3, END_STREAM, "200")]),
        ],
        &[("a", Success), ("b", Success)],
        None,
    );
    assert_eq!(notes.forgotten, ["c"]);
    assert_eq!(
        notes.tenants,
        ["a", "b", "c"],
        "what comes later is not processed either"
    );
    assert!(observer.is_quiet());
    // What it promised to answer is its failure.
    let (notes, _) = check(
        &[requests, a(&[go_away(3, 2)]), UpstreamClosed],
        &[("a", UpstreamReset), ("b", UpstreamReset)],
        None,
    );
    assert_eq!(notes.forgotten, ["c"]);
}

#[test]
fn what_is_pushed_is_not_counted() {
    let promise = [&[0_u8, 0, 0, 2][..], &block(&POST)].concat();
    let kept = [&[0x40_u8, 1][..], b"k", &[1], b"v"].concat();
    let (_, observer) = check(
        &[
            q(&[get(1, "a")]),
            a(&[
                frame(PUSH_PROMISE, 0, 1, &promise),
                frame(CONTINUATION, END_HEADERS, 1, &kept),
            ]),
            a(&[
                status(2, 0, "200"),
                data(2, END_STREAM, 5),
                status(1, END_STREAM, "200"),
            ]),
            q(&[reset(2, 8)]),
            // The promise filled the server's table.
            q(&[get(3, "b")]),
            a(&[frame(HEADERS, END_STREAM | END_HEADERS, 3, &[0x88, 0xbe])]),
        ],
        &[("a", Success), ("b", Success)],
        None,
    );
    assert!(observer.is_quiet());
}

#[test]
fn closes_and_resets_of_the_connection() {
    let begun = [
        q(&[get(1, "a"), get(3, "b")]),
        a(&[status(1, END_STREAM, "200"), status(3, 0, "200")]),
    ];
    let play = |ends: &[On], outcome| {
        check(
            &[&begun[..], ends].concat(),
            &[("a", Success), ("b", outcome)],
            None,
        );
    };
    play(&[UpstreamClosed], UpstreamReset);
    play(&[ClientReset], ClientAbort);
    play(&[ClientClosed, UpstreamClosed], ClientAbort);
    play(&[ClientClosed, a(&[data(3, END_STREAM, 5)])], Success);
    let (mut notes, mut observer) = self::play(&begun, 9999, 9999);
    observer.end_all(Timeout, 9, &mut notes);
    assert_eq!(notes.ended[1], ("b".to_owned(), Timeout));
    assert!(!observer.is_quiet() && observer.footprint() == 0);
}

#[test]
fn either_side_may_speak_first() {
    let (mut notes, mut observer) = (Notes::default(), Http2::new());
    assert!(observer.is_quiet());
    observer.on_response(&server_start()[..15], 1, &mut notes);
    observer.on_request(&client_start(), 2, &mut notes);
    observer.on_response(&server_start()[15..], 3, &mut notes);
    observer.on_request(&get(1, "a"), 4, &mut notes);
    observer.on_response(&status(1, END_STREAM, "200"), 5, &mut notes);
    assert_eq!(notes.ended, [("a".to_owned(), Success)]);
    assert!(observer.is_quiet());
}

#[test]
fn a_frame_in_pieces_is_not_quiet() {
    let (mut notes, mut observer) = (Notes::default(), Http2::new());
    observer.on_request(&PREFACE[..3], 1, &mut notes);
    assert!(!observer.is_quiet());
    observer.on_request(&client_start()[3..], 2, &mut notes);
    assert!(observer.is_quiet());
    for byte in get(1, "a") {
        observer.on_request(&[byte], 3, &mut notes);
        assert!(!observer.is_quiet());
    }
}

#[test]
fn an_idle_connection_is_small() {
    let (mut notes, mut observer) = (Notes::default(), Http2::new());
    assert_eq!(observer.footprint(), 0);
    observer.on_request(&client_start(), 0, &mut notes);
    observer.on_response(&server_start(), 0, &mut notes);
    for round in 0..100 {
        for n in 0..20 {
            let id = (round * 20 + n) * 2 + 1;
            for piece in get(id, "a").chunks(5) {
                observer.on_request(piece, 0, &mut notes);
            }
        }
        for n in 0..20 {
            let id = (round * 20 + n) * 2 + 1;
            for piece in status(id, END_STREAM, "200").chunks(5) {
                observer.on_response(piece, 0, &mut notes);
            }
        }
    }
    assert_eq!((notes.ended.len(), notes.opaque), (2000, None));
    assert!(observer.is_quiet());
    // No table was filled.
    assert!(observer.footprint() <= 3072, "{}", observer.footprint());
}
