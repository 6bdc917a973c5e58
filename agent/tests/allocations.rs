//! A request of a known tenant costs no allocation, whatever protocol and form it has.
//!
//! Heads come whole here, as they nearly always do: one in pieces is collected first, and that costs.
//! What is counted is what the observer and the recorder allocate together, on this thread, once buffers and
//! buckets have the sizes that they need.

// The helpers are no test functions, which clippy.toml allows to unwrap.
#![allow(clippy::unwrap_used)]

#[path = "transparency/frames.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod frames;

#[path = "transparency/messages.rs"]
#[allow(dead_code, reason = "another binary uses all of it")]
mod messages;

use allocation_counter::measure;
use coalmine_agent::{observer::Observer, recorder::Recorder};
use frames::{
    END_HEADERS, END_STREAM, Encoder, Form, HEADERS, NO_FLAGS, data, frame, opening, settings, settings_ack,
};
use messages::{FAILED, OK, answer, chunked, filling, get, request};

/// Windows that are closed before anything is measured, and exchanges in each.
const WINDOWS: u64 = 5;
const EXCHANGES: u64 = 50;

/// From one exchange to the next.
const STEP_NS: u64 = 1_000_000;

/// The rule by which tenants are found where it does not matter.
const RULE: &str = "header:x-tenant";

/// Exchanges often with the same latencies, and measures those of the last window.
#[track_caller]
fn check(name: &str, rule: &str, requests: u64, mut exchange: impl FnMut(&mut Recorder, u64)) {
    let mut recorder = Recorder::new(vec![rule.parse().unwrap()], 100);
    let mut now_ns = STEP_NS;
    let mut window = |recorder: &mut Recorder| {
        for _ in 0..EXCHANGES {
            exchange(recorder, now_ns);
            now_ns += STEP_NS;
        }
    };
    for _ in 0..WINDOWS {
        window(&mut recorder);
        recorder.seal(0, 1_000);
    }
    let allocated = measure(|| window(&mut recorder));
    assert_eq!(allocated.count_total, 0, "{name}: {allocated:?}");
    // It was counted, and for somebody.
    let rows = recorder.seal(0, 1_000).rows;
    let seen: Vec<(&str, u64)> = rows
        .iter()
        .map(|row| (row.tenant.as_str(), row.outcomes.seen()))
        .collect();
    assert_eq!(seen, [("acme", EXCHANGES * requests)], "{name}");
}

#[test]
fn what_is_allocated_is_counted() {
    let allocated = measure(|| drop(std::hint::black_box(vec![1_u8, 2, 3])));
    assert_eq!(allocated.count_total, 1);
}

/// Exchanges of HTTP/1 on one connection, each in pieces as they are given.
#[track_caller]
fn check_http1(name: &str, requests: u64, sent: &[&[u8]], answered: &[&[u8]]) {
    check_http1_by(RULE, name, requests, sent, answered);
}

#[track_caller]
fn check_http1_by(rule: &str, name: &str, requests: u64, sent: &[&[u8]], answered: &[&[u8]]) {
    let mut observer = Observer::new();
    check(name, rule, requests, |recorder, now_ns| {
        for piece in sent {
            observer.on_request(piece, now_ns, recorder);
        }
        for piece in answered {
            observer.on_response(piece, now_ns + 500_000, recorder);
        }
    });
}

#[test]
fn http_1() {
    let tenant = "X-Tenant: acme";
    let one = get("acme");
    check_http1("one", 1, &[&one], &[OK]);
    check_http1("one that fails", 1, &[&one], &[FAILED]);

    let five = one.repeat(5);
    check_http1("five at once", 5, &[&five], &[&OK.repeat(5)]);

    let body = chunked(&[5, 300, 26]);
    let coding = "Transfer-Encoding: chunked";
    let post = request("POST / HTTP/1.1", &[tenant, coding], &body);
    let streamed = answer("200 OK", &[coding], &body);
    check_http1("chunks", 1, &[&post], &[&streamed]);

    // Heads whole, bodies in pieces.
    let head = post.len() - body.len();
    let (begun, rest) = post.split_at(head + 3);
    let (first, second) = streamed.split_at(streamed.len() - 7);
    check_http1("chunks in pieces", 1, &[begun, rest], &[first, second]);

    let length = "Content-Length: 9000";
    let put = request("PUT / HTTP/1.1", &[tenant, length], filling(9_000));
    let large = answer("200 OK", &[length], filling(9_000));
    let (begun, rest) = put.split_at(4_000);
    let (first, second) = large.split_at(7_000);
    check_http1("lengths in pieces", 1, &[begun, rest], &[first, second]);

    let interim = [&b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"[..], OK].concat();
    check_http1("interim answers", 1, &[&one], &[&interim]);

    let many: Vec<String> = (0..60)
        .map(|number| format!("X-Header-{number}: value"))
        .collect();
    let mut headers: Vec<&str> = many.iter().map(String::as_str).collect();
    headers.push(tenant);
    let long = request("GET / HTTP/1.1", &headers, b"");
    check_http1("many headers", 1, &[&long], &[OK]);
}

#[test]
fn rules() {
    for (rule, head) in [
        ("header:x-tenant|lower", "GET / HTTP/1.1\r\nX-Tenant: ACME"),
        ("host:{tenant}.io", "GET / HTTP/1.1\r\nHost: acme.io"),
        ("host:{tenant}.io", "GET / HTTP/1.1\r\nHost: Acme.IO:80"),
        ("host:{tenant}.io", "GET http://Acme.io/ HTTP/1.1"),
        ("path:/t/{tenant}/", "GET /t/acme/x%20y/z.html?a=%20 HTTP/1.1"),
        ("path:/t/{tenant}/|lower", "GET /t/Acme HTTP/1.1"),
        ("query:tenant", "GET /x?a=b%20c&tenant=acme&d HTTP/1.1"),
        ("query:tenant|lower", "GET /x?tenant=Acme HTTP/1.1"),
        ("fixed:acme", "GET / HTTP/1.1"),
    ] {
        let name = format!("{rule} of {head}");
        let request = format!("{head}\r\nAccept: */*\r\n\r\n");
        check_http1_by(rule, &name, 1, &[request.as_bytes()], &[OK]);
    }
}

/// Frames of one exchange of HTTP/2; the stream's number is put into each before it is used again.
struct Frames {
    bytes: Vec<u8>,
    /// Where the numbers of streams stand.
    numbers: Vec<usize>,
}

impl Frames {
    fn new(frames: &[Vec<u8>]) -> Self {
        let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
        for frame in frames {
            // RFC 9113, section 4.1: behind the length, the type and the flags.
            numbers.push(bytes.len() + 5);
            bytes.extend_from_slice(frame);
        }
        Self { bytes, numbers }
    }

    fn of_stream(&mut self, stream: u32) -> &[u8] {
        for number in &self.numbers {
            self.bytes[*number..*number + 4].copy_from_slice(&stream.to_be_bytes());
        }
        &self.bytes
    }
}

/// A header block; `form` is how fields stand in it.
fn block(encoder: &mut Encoder, form: Form, fields: &frames::Fields<'_>) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        encoder.field(form, name, value, &mut block);
    }
    block
}

/// Exchanges on one connection: a first one that fills the tables, and then the same frames again and again,
/// on another stream each time.
#[track_caller]
fn check_http2(name: &str, first: [&[Vec<u8>]; 2], again: [&[Vec<u8>]; 2]) {
    let mut observer = Observer::new();
    let (mut fill, mut fill_answer) = (Frames::new(first[0]), Frames::new(first[1]));
    let (mut sent, mut answered) = (Frames::new(again[0]), Frames::new(again[1]));
    let mut stream = 1;
    check(name, RULE, 1, |recorder, now_ns| {
        let (up, down) = if stream == 1 {
            observer.on_request(&opening(), now_ns, recorder);
            observer.on_response(&settings(&[]), now_ns, recorder);
            observer.on_response(&settings_ack(), now_ns, recorder);
            observer.on_request(&settings_ack(), now_ns, recorder);
            (&mut fill, &mut fill_answer)
        } else {
            (&mut sent, &mut answered)
        };
        observer.on_request(up.of_stream(stream), now_ns, recorder);
        observer.on_response(down.of_stream(stream), now_ns + 500_000, recorder);
        stream += 2;
    });
}

#[test]
fn http_2() {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/shop.Cart/Add"),
        (":authority", "shop.example.com"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("x-tenant", "acme"),
    ];
    let head = [(":status", "200"), ("content-type", "application/grpc")];
    let trailers = [("grpc-status", "0"), ("grpc-message", "fine")];
    for form in [Form::Literal, Form::Indexed] {
        let (mut up, mut down) = (Encoder::default(), Encoder::default());
        let mut exchange = || {
            let block_up = block(&mut up, form, &fields);
            let (block_down, block_last) = (block(&mut down, form, &head), block(&mut down, form, &trailers));
            let sent = vec![
                frame(HEADERS, END_HEADERS, 0, &block_up),
                data(0, END_STREAM, &filling(200)),
            ];
            let answered = vec![
                frame(HEADERS, END_HEADERS, 0, &block_down),
                data(0, NO_FLAGS, &filling(300)),
                frame(HEADERS, END_HEADERS | END_STREAM, 0, &block_last),
            ];
            (sent, answered)
        };
        let (first, first_answer) = exchange();
        let (sent, answered) = exchange();
        check_http2(
            &format!("gRPC, {form:?}"),
            [&first, &first_answer],
            [&sent, &answered],
        );
    }
}
