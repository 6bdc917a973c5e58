//! Tests of what no correct peer sends, and of bounds.

use proptest::prelude::*;

use super::*;

/// What is bad, and another request on the same connection, which is still followed.
fn and_others(bad: &[Vec<u8>]) -> [On; 2] {
    [
        q(&[bad.concat(), get(99, "b")]),
        a(&[reset(1, 1), status(99, END_STREAM, "200")]),
    ]
}

#[track_caller]
fn check_malformed(bad: &[(&str, &str)]) {
    let flags = END_STREAM | END_HEADERS;
    let bad = [frame(HEADERS, flags, 1, &block(bad))];
    let (notes, observer) = check(&and_others(&bad), &[("b", Success)], None);
    assert_eq!((notes.malformed, notes.tenants.len()), (1, 1));
    assert!(observer.is_quiet());
}

#[track_caller]
fn check_accepted(good: &[(&str, &str)]) {
    let good = headers(1, END_STREAM, good);
    let (notes, _) = check(
        &[q(&[good]), a(&[status(1, END_STREAM, "200")])],
        &[("Missing", Success)],
        None,
    );
    assert_eq!(notes.malformed, 0);
}

#[test]
fn requests_that_no_server_accepts() {
    for missing in 0..3 {
        let mut fields = POST.to_vec();
        fields.remove(missing);
        check_malformed(&fields);
    }
    for repeated in POST {
        check_malformed(&[&POST[..], &[repeated]].concat());
    }
    for more in [
        (":x", "y"),
        (":status", "200"),
        (":protocol", "websocket"),
        ("T", "a"),
        ("a b", "c"),
        ("", "nameless"),
        ("connection", "close"),
        ("keep-alive", "1"),
        ("proxy-connection", "close"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "h2c"),
        ("te", "gzip"),
        ("t", "a\r\nb"),
        ("t", "a\nb"),
        ("t", "a\0b"),
        ("content-length", "x"),
        ("content-length", "+0"),
        ("content-length", "5"),
        ("content-length", "99999999999999999999999"),
    ] {
        check_malformed(&[&POST[..], &[more]].concat());
    }
    check_malformed(&[&[("t", "a")][..], &POST].concat());
    check_malformed(&[&POST[..], &[("content-length", "0"), ("content-length", "1")]].concat());
    check_malformed(&[&POST[..3], &[("host", "a"), ("host", "b")]].concat());
}

#[test]
fn targets_that_no_server_accepts() {
    let target = |method, path| [(":method", method), (":scheme", "http"), (":path", path)];
    check_malformed(&target("GET", ""));
    check_malformed(&target("GET", "x"));
    check_malformed(&target("GET", "*"));
    check_malformed(&target("", "/"));
    check_malformed(&target("CONNECT", "/"));
    check_malformed(&[(":method", "CONNECT")]);
    check_accepted(&target("OPTIONS", "*"));
    check_accepted(&[(":method", "GET"), (":scheme", "coap"), (":path", "x")]);
    check_accepted(&[&POST[..], &[("te", "trailers"), ("content-length", "0")]].concat());
    check_accepted(&[&POST[..], &[("host", "SHOP.example:80")]].concat());
    check_accepted(&[&POST[..3], &[("host", "a"), ("host", "a")]].concat());
    check_accepted(&[&POST[..], &[("x", " y\t")]].concat());
}

#[test]
fn a_host_takes_the_place_of_an_authority() {
    let fields = [&POST[..3], &[("host", "h.example")]].concat();
    let (notes, _) = check(&[q(&[headers(1, END_STREAM, &fields)])], &[], None);
    assert_eq!(notes.hosts, ["h.example"]);
}

#[test]
fn an_authority_and_a_host_that_differ_are_no_host() {
    for (host, expected) in [
        ("other.example", "Differing"),
        ("shop.example:8080", "Differing"),
        ("", "Differing"),
        ("SHOP.example:80", "shop.example"),
    ] {
        let fields = [&POST[..], &[("t", "a"), ("host", host)]].concat();
        let (notes, _) = check(
            &[
                q(&[headers(1, END_STREAM, &fields)]),
                a(&[status(1, END_STREAM, "200")]),
            ],
            &[("a", Success)],
            None,
        );
        assert_eq!(
            (notes.malformed, &notes.hosts[..]),
            (0, &[expected.to_owned()][..])
        );
    }
}

#[test]
fn requests_that_turn_out_to_be_malformed() {
    let trailers = headers(1, END_STREAM, &[("x", "y")]);
    let with_length = |length| post(1, "a", &[("content-length", length)]);
    for bad in [
        vec![with_length("5"), data(1, 0, 6)],
        vec![with_length("5"), data(1, 0, 2), data(1, END_STREAM, 2)],
        vec![with_length("5"), data(1, 0, 2), trailers.clone()],
        vec![post(1, "a", &[]), headers(1, END_STREAM, &[(":path", "/")])],
        vec![post(1, "a", &[]), headers(1, END_STREAM, &[("X", "y")])],
        vec![post(1, "a", &[]), headers(1, 0, &[("x", "y")])],
        vec![get(1, "a"), data(1, END_STREAM, 0)],
        vec![get(1, "a"), trailers.clone()],
    ] {
        let (notes, _) = check(&and_others(&bad), &[("b", Success)], None);
        assert_eq!(
            (notes.malformed, &notes.forgotten[..]),
            (1, &["a".to_owned()][..])
        );
    }
    let right = [with_length("5"), data(1, 0, 2), data(1, 0, 3), trailers];
    let (_, observer) = check(&and_others(&right), &[("a", UpstreamReset), ("b", Success)], None);
    assert!(observer.is_quiet());
}

#[track_caller]
fn check_opaque(begun: On, bad: On, why: Opaque) {
    let (notes, observer) = check(&[begun, bad, q(&[get(101, "z")])], &[], Some(why));
    assert_eq!(notes.forgotten, ["a"]);
    assert!(!observer.is_quiet());
    assert_eq!((observer.pending(), observer.footprint()), (0, 0));
}

/// Frames that break the framing from whichever side they come.
fn broken() -> Vec<Vec<u8>> {
    let open = frame(HEADERS, 0, 1, &block(&[("x", "y")]));
    vec![
        frame(HEADERS, END_HEADERS, 0, &block(&POST)),
        frame(DATA, 0, 0, b"x"),
        frame(RST_STREAM, 0, 0, &[0; 4]),
        frame(PRIORITY, 0, 0, &[0; 5]),
        frame(CONTINUATION, END_HEADERS, 1, b""),
        [open.clone(), frame(PING, 0, 0, &[0; 8])].concat(),
        [open.clone(), data(1, 0, 3)].concat(),
        [open.clone(), frame(0xbe, 0, 1, b"")].concat(),
        [open.clone(), open.clone()].concat(),
        [open.clone(), frame(CONTINUATION, END_HEADERS, 3, b"")].concat(),
        [open, frame(CONTINUATION, END_HEADERS, 0, b"")].concat(),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[2, 0]),
        frame(HEADERS, END_HEADERS | PADDED, 1, b""),
        frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, &[0; 4]),
        frame(
            HEADERS,
            END_HEADERS | PADDED | HAS_PRIORITY,
            1,
            &[1, 0, 0, 0, 0, 0],
        ),
        frame(DATA, PADDED, 1, &[3, 0, 0]),
        frame(DATA, PADDED, 1, b""),
        frame(SETTINGS, 0, 0, &[0; 5]),
        frame(SETTINGS, 0, 1, b""),
        frame(SETTINGS, ACK, 0, &[0; 6]),
        frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0x3f, 0xff]),
        frame(SETTINGS, 0, 0, &[0, 5, 1, 0, 0, 0]),
        frame(PING, 0, 0, &[0; 7]),
        frame(PING, 0, 1, &[0; 8]),
        frame(WINDOW_UPDATE, 0, 1, &[0; 3]),
        frame(RST_STREAM, 0, 1, &[0; 5]),
        frame(PRIORITY, 0, 1, &[0; 4]),
        frame(GOAWAY, 0, 0, &[0; 7]),
        frame(GOAWAY, 0, 1, &[0; 8]),
        frame(DATA, 0, 1, &[0; 16_385]),
        frame(SETTINGS, 0, 0, b"").repeat(65),
    ]
}

#[test]
fn frames_that_break_the_framing() {
    for bad in broken() {
        let begun = q(&[post(1, "a", &[])]);
        check_opaque(begun.clone(), q(std::slice::from_ref(&bad)), Opaque::Http2Framing);
        check_opaque(begun, a(&[bad]), Opaque::Http2Framing);
    }
    for bad in [
        frame(HEADERS, END_HEADERS, 2, &block(&POST)),
        data(2, 0, 1),
        data(5, 0, 1),
        reset(5, 8),
        frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2]),
    ] {
        check_opaque(q(&[get(1, "a")]), q(&[bad]), Opaque::Http2Framing);
    }
    let short = frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0]);
    check_opaque(q(&[get(1, "a")]), a(&[short]), Opaque::Http2Framing);
}

#[test]
fn numbers_of_streams_only_rise() {
    for back in [3, 5] {
        let begun = q(&[get(7, "a"), reset(7, 8), get(9, "a")]);
        let (notes, _) = check(
            &[begun, q(&[get(back, "z")])],
            &[("a", ClientAbort)],
            Some(Opaque::Http2Framing),
        );
        assert_eq!(notes.forgotten, ["a"]);
    }
    check_opaque(
        q(&[get(1, "a")]),
        q(&[headers(5, END_STREAM, &[("x", "y")]), get(3, "z")]),
        Opaque::Http2Framing,
    );
}

#[test]
fn servers_that_answer_what_nobody_asked() {
    for bad in [status(5, 0, "200"), data(5, 0, 1), reset(5, 2)] {
        check_opaque(q(&[get(1, "a")]), a(&[bad]), Opaque::Unsolicited);
    }
}

#[test]
fn beginnings_that_are_none() {
    let check = |request: &[u8], response: &[u8], why: Option<Opaque>| {
        for step in [1, 9999] {
            let (mut notes, mut observer) = (Notes::default(), Http2::new());
            for piece in request.chunks(step) {
                observer.on_request(piece, 1, &mut notes);
            }
            for piece in response.chunks(step) {
                observer.on_response(piece, 1, &mut notes);
            }
            assert_eq!(notes.opaque, why);
            assert_eq!((notes.open, observer.is_opaque()), (0, why.is_some()));
        }
    };
    check(b"PRI * HTTP/2.0\r\n\r\nSX", b"", Some(Opaque::Http2Framing));
    check(b"GET / HTTP/1.1\r\n\r\n", b"", Some(Opaque::Http2Framing));
    check(&[PREFACE, &get(1, "a")].concat(), b"", Some(Opaque::Http2Framing));
    let acknowledged = [PREFACE, &frame(SETTINGS, ACK, 0, b"")].concat();
    check(&acknowledged, b"", Some(Opaque::Http2Framing));
    let asked = [client_start(), get(1, "a")].concat();
    let refusal = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
    check(&asked, refusal, Some(Opaque::BadResponse));
    check(&asked, &status(1, END_STREAM, "200"), Some(Opaque::BadResponse));
    check(&client_start(), &server_start(), None);
}

#[test]
fn blocks_that_cannot_be_decompressed() {
    let begun = q(&[get(1, "a")]);
    let request = frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x80]);
    check_opaque(begun.clone(), q(&[request]), Opaque::Hpack);
    let answer = frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88, 0xbe]);
    check_opaque(begun.clone(), a(&[answer]), Opaque::Hpack);
    let promise = frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 4, 0x80]);
    check_opaque(begun, a(&[promise]), Opaque::Hpack);
}

#[test]
fn the_table_may_be_as_large_as_was_acknowledged() {
    let limit = |size: u32| {
        a(&[frame(
            SETTINGS,
            0,
            0,
            &[&[0_u8, 1][..], &size.to_be_bytes()].concat(),
        )])
    };
    let acknowledge = frame(SETTINGS, ACK, 0, b"");
    let request = |update: &[u8]| {
        let fields = block(&[&POST[..], &[("t", "a")]].concat());
        frame(HEADERS, END_STREAM | END_HEADERS, 1, &[update, &fields].concat())
    };
    let ok = a(&[status(1, END_STREAM, "200")]);
    let accepted = |events: &[On]| {
        check(
            &[events, std::slice::from_ref(&ok)].concat(),
            &[("a", Success)],
            None,
        );
    };
    let refused = |events: &[On]| {
        check(events, &[], Some(Opaque::Hpack));
    };
    // Until it is acknowledged, the old size holds. After that an entry may be meant that only one side has.
    let entry = &[0x40_u8, 1, b'k', 1, b'v', 0xbe][..];
    let trailers = frame(HEADERS, END_STREAM | END_HEADERS, 1, entry);
    let post = post(1, "a", &[]);
    accepted(&[limit(0), q(&[request(b""), acknowledge.clone()])]);
    accepted(&[limit(0), q(&[acknowledge.clone(), request(&[0x20])])]);
    accepted(&[limit(0), q(&[acknowledge.clone(), request(b"")])]);
    accepted(&[
        limit(0),
        q(&[post.clone(), trailers.clone(), acknowledge.clone()]),
    ]);
    refused(&[limit(0), q(&[acknowledge.clone(), post, trailers])]);
    // Both must be acknowledged before the second holds: 31 + 4066 bytes are 4097.
    let larger = &[0x3f_u8, 0xe2, 0x1f][..];
    let twice = [limit(4096), limit(5000)];
    refused(&[&twice[..], &[q(&[acknowledge.clone(), request(larger)])]].concat());
    let both = q(&[acknowledge.clone(), acknowledge.clone(), request(larger)]);
    accepted(&[&twice[..], &[both]].concat());
    // 31 + 131,041 bytes are 131,072: allowed, but not followed.
    refused(&[
        limit(1 << 20),
        q(&[acknowledge, request(&[0x3f, 0xe1, 0xff, 0x07])]),
    ]);
}

#[test]
fn frames_may_be_as_long_as_was_announced() {
    let longer = a(&[frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0x50, 0])]);
    let request = q(&[post(1, "a", &[]), data(1, END_STREAM, 0x5000)]);
    let answer = a(&[status(1, END_STREAM, "200")]);
    check(&[longer.clone(), request, answer], &[("a", Success)], None);
    check_opaque(
        q(&[post(1, "a", &[])]),
        a(&[data(1, 0, 0x4001)]),
        Opaque::Http2Framing,
    );
    check(
        &[longer, q(&[post(1, "a", &[]), data(1, 0, 0x5001)])],
        &[],
        Some(Opaque::Http2Framing),
    );
}

#[test]
fn heads_are_bounded() {
    let begun = q(&[get(1, "a")]);
    // Frame by frame without an end.
    let first = frame(HEADERS, 0, 3, &[0x82; 1]);
    let more = frame(CONTINUATION, 0, 3, &[0x82; 8192]);
    let flood = [first, more.repeat(8)].concat();
    let (notes, _) = play(&[begun.clone(), q(&[flood])], 0, 10_000);
    assert_eq!(notes.opaque, Some(Opaque::HeadTooLong));
    // A block that is small and grows: an entry of four thousand bytes, so often that it comes to more than
    // 1 MiB.
    let entry = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'v'; 4000]].concat();
    let bomb = |count| {
        let fields = [&entry[..], &vec![0xbe_u8; count]].concat();
        frame(HEADERS, END_STREAM | END_HEADERS, 3, &fields)
    };
    let (notes, _) = play(&[begun.clone(), q(&[bomb(300)])], 0, 10_000);
    assert_eq!(
        (notes.opaque, notes.forgotten.len()),
        (Some(Opaque::HeadTooLong), 1)
    );
    // The same by names: each field puts the long name of the one before into the table again.
    let named = [&[0x40_u8, 0x7f, 0xa1, 0x1e][..], &[b'n'; 4000], &[0]].concat();
    let named = [named, [0x7e_u8, 0].repeat(300)].concat();
    let named = frame(HEADERS, END_STREAM | END_HEADERS, 3, &named);
    let (notes, _) = play(&[begun.clone(), q(&[named])], 0, 10_000);
    assert_eq!(notes.opaque, Some(Opaque::HeadTooLong));
    // In an answer it is nothing.
    let (notes, observer) = play(&[begun, q(&[get(3, "b")]), a(&[bomb(300)])], 0, 10_000);
    assert_eq!(notes.opaque, None);
    assert!(observer.footprint() < 4096, "{}", observer.footprint());
}

#[test]
fn a_request_with_more_fields_than_are_kept_is_passed_over() {
    let begun = q(&[get(1, "a")]);
    let request = |fields: &[u8]| {
        let fields = [&block(&POST)[..], fields].concat();
        frame(HEADERS, END_HEADERS, 3, &fields)
    };
    let (many, as_many) = (vec![0x90_u8; MAX_FIELDS - 3], vec![0x90_u8; MAX_FIELDS - 4]);
    // An entry of four thousand bytes that comes to 64 KiB.
    let entry = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'v'; 4000]].concat();
    let large = [entry, vec![0xbe; 20]].concat();
    for (fields, tenants) in [
        (as_many, &["a", "Missing", "b"][..]),
        (many, &["a", "b"]),
        (large, &["a", "b"]),
    ] {
        let events = [
            begun.clone(),
            q(&[
                request(&fields),
                data(3, 0, 9),
                headers(3, END_STREAM, &[("x", "y")]),
            ]),
            q(&[get(5, "b")]),
            a(&[status(3, END_STREAM, "200"), status(5, END_STREAM, "200")]),
            a(&[status(1, END_STREAM, "200")]),
        ];
        let (notes, observer) = play(&events, 0, 10_000);
        assert_eq!(notes.tenants, tenants);
        assert_eq!((notes.passed_over, notes.malformed), (3 - tenants.len(), 0));
        assert_eq!((notes.opaque, notes.ended.len()), (None, tenants.len()));
        assert!(observer.is_quiet());
    }
}

#[test]
fn trailers_with_more_fields_than_are_kept_make_a_request_unknown() {
    let request = q(&[post(1, "a", &[]), get(3, "b")]);
    let trailers = frame(HEADERS, END_STREAM | END_HEADERS, 1, &[0x90; MAX_FIELDS + 1]);
    let answers = a(&[status(1, END_STREAM, "200"), status(3, END_STREAM, "200")]);
    let events = [request.clone(), q(std::slice::from_ref(&trailers)), answers];
    let (notes, observer) = check(&events, &[("b", Success)], None);
    assert_eq!(
        (notes.malformed, &notes.forgotten[..]),
        (0, &["a".to_owned()][..])
    );
    assert!(observer.is_quiet());
    // Those of a request that was reset are nobody's.
    let answers = a(&[reset(1, 0), status(3, END_STREAM, "200")]);
    let ended = [("a", UpstreamReset), ("b", Success)];
    check(&[request, answers, q(&[trailers])], &ended, None);
}

const MAX_FIELDS: usize = super::super::super::MAX_HEADERS;

#[test]
fn open_streams_are_bounded() {
    let number = |n: usize| u32::try_from(n).unwrap() * 2 + 1;
    let requests: Vec<_> = (0..MAX_STREAMS).map(|n| get(number(n), "a")).collect();
    let (notes, observer) = play(&[q(&requests)], 0, 10_000);
    assert_eq!((notes.opaque, observer.pending()), (None, MAX_STREAMS));
    assert!(observer.footprint() <= 640 * 1024, "{}", observer.footprint());
    // One more is not followed, but those after it are once there is room.
    let passed = number(MAX_STREAMS);
    let one_more = q(&[
        post(passed, "b", &[]),
        data(passed, 0, 5),
        headers(passed, END_STREAM, &[("x", "y")]),
    ]);
    let answers: Vec<_> = (0..=MAX_STREAMS)
        .map(|n| status(number(n), END_STREAM, "200"))
        .collect();
    let last = number(MAX_STREAMS + 1);
    let (notes, observer) = play(
        &[
            q(&requests),
            one_more,
            a(&answers),
            q(&[get(last, "c")]),
            a(&[status(last, END_STREAM, "200")]),
        ],
        0,
        10_000,
    );
    assert_eq!((notes.opaque, notes.passed_over, notes.malformed), (None, 1, 0));
    assert_eq!((notes.ended.len(), notes.forgotten.len()), (MAX_STREAMS + 1, 0));
    assert!(
        notes
            .ended
            .iter()
            .all(|(name, outcome)| name != "b" && *outcome == Success)
    );
    assert!(observer.is_quiet() && observer.footprint() < 1024);
}

#[test]
fn rapid_reset_takes_no_memory() {
    let (mut notes, mut observer) = (Notes::default(), Http2::new());
    observer.on_request(&client_start(), 0, &mut notes);
    observer.on_response(&server_start(), 0, &mut notes);
    for n in 0..100_000 {
        let id = n * 2 + 1;
        observer.on_request(&[get(id, "a"), reset(id, 8)].concat(), 0, &mut notes);
        assert!(observer.footprint() <= 1024, "{}", observer.footprint());
    }
    assert_eq!((notes.ended.len(), notes.open, notes.opaque), (100_000, 0, None));
    assert!(notes.ended.iter().all(|(_, outcome)| *outcome == ClientAbort));
    assert!(observer.is_quiet());
}

// === anything ===

/// A frame that is more or less right, and from which side it comes.
fn any_frame() -> impl Strategy<Value = On> {
    let payload = prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..24),
        1 => Just(block(&[&POST[..], &[("t", "a")]].concat())),
        1 => Just(block(&[(":status", "200")])),
        1 => Just(vec![0x88_u8, 0xbe]),
        1 => Just(vec![0_u8; 4]),
        1 => Just(vec![0_u8; 8]),
        1 => Just(Vec::<u8>::new()),
    ];
    let flags = prop_oneof![
        3 => Just(END_HEADERS),
        3 => Just(END_HEADERS | END_STREAM),
        1 => any::<u8>(),
    ];
    (any::<bool>(), 0_u8..11, flags, 0_u32..10, payload).prop_map(|(asks, kind, flags, stream, payload)| {
        let frame = frame(kind, flags, stream, &payload);
        if asks { Q(frame) } else { A(frame) }
    })
}

fn request_or_answer() -> impl Strategy<Value = On> {
    let (stream, last) = ((0_u32..12).prop_map(|n| n * 2 + 1), any::<bool>());
    (0_u8..8, stream, last, 0_usize..40).prop_map(|(what, stream, is_last, length)| {
        let flags = if is_last { END_STREAM } else { 0 };
        match what {
            0 | 1 => Q(get(stream, "a")),
            2 => Q(post(stream, "b", &[])),
            3 => Q(data(stream, flags, length)),
            4 => A(status(stream, flags, "200")),
            5 => A(data(stream, flags, length)),
            6 => A(reset(stream, 2)),
            _ => Q(reset(stream, 8)),
        }
    })
}

#[track_caller]
fn check_any(events: &[On], step: usize) -> Result<(), TestCaseError> {
    let (whole, observer) = play(events, 9999, 9999);
    let (pieces, _) = play(events, 0, step);
    prop_assert_eq!(&whole, &pieces);
    let counted = whole.ended.len() + whole.forgotten.len() + whole.open;
    prop_assert_eq!(counted, whole.tenants.len());
    prop_assert_eq!(observer.is_opaque(), whole.opaque.is_some());
    prop_assert!(!observer.is_opaque() || whole.open == 0);
    prop_assert!(observer.footprint() < 64 * 1024);
    Ok(())
}

proptest! {
    #[test]
    fn frames_of_any_kind_never_panic(
        events in prop::collection::vec(any_frame(), 0..40), step in 1_usize..20,
    ) {
        check_any(&events, step)?;
    }

    #[test]
    fn streams_in_any_order_are_counted_once(
        events in prop::collection::vec(request_or_answer(), 0..60), step in 1_usize..20,
    ) {
        check_any(&events, step)?;
    }

    #[test]
    fn bytes_of_any_kind_never_panic(
        request in prop::collection::vec(any::<u8>(), 0..300),
        response in prop::collection::vec(any::<u8>(), 0..300),
        step in 1_usize..40,
    ) {
        let (mut notes, mut observer) = (Notes::default(), Http2::new());
        for piece in request.chunks(step) {
            observer.on_request(piece, 0, &mut notes);
        }
        for piece in response.chunks(step) {
            observer.on_response(piece, 0, &mut notes);
        }
        check_any(&[Q(request), A(response)], step)?;
    }
}

#[test]
fn all_connections_together_are_bounded() {
    // Half of a block each, of which what is beyond 16 KiB counts against 32 MiB (observer/account.rs).
    let part = frame(CONTINUATION, 0, 1, &[0x82; 16_000]);
    let begun = [
        client_start(),
        frame(HEADERS, 0, 1, &[0x82; 16_000]),
        part.repeat(2),
    ]
    .concat();
    let begin = || {
        let (mut notes, mut observer) = (Notes::default(), Http2::new());
        observer.on_request(&begun, 0, &mut notes);
        (notes.opaque, observer)
    };
    let mut followed = Vec::new();
    let refused = (0..2_000).find_map(|_| match begin() {
        (None, observer) => {
            followed.push(observer);
            None
        }
        (Some(why), observer) => Some((why, observer)),
    });
    let (why, refused) = refused.unwrap();
    assert_eq!(why, Opaque::Memory);
    assert_eq!(refused.footprint(), 0);
    drop(followed.pop());
    assert_eq!(begin().0, None, "what is not followed holds nothing");
}
