//! Random exchanges, well-formed, by a generator that knows what happened: bytes and counts are the same.
//!
//! PROPTEST_CASES says how many; 64 without it.

use coalmine_agent::observer::Opaque;
use coalmine_proto::names::Outcome;
use proptest::{prelude::*, sample::select, test_runner::Config};

use crate::{
    frames::{
        self, CONTINUATION, END_HEADERS, END_STREAM, Encoder, Form, HEADERS, NO_FLAGS, data, frame, opening,
        settings, settings_ack,
    },
    messages::{answer, chunked, filling, request},
    script::{Step, send_slowly},
    stage::Case,
};

fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(64),
        // Each try takes an agent.
        max_shrink_iters: 100,
        failure_persistence: None,
        ..Config::default()
    }
}

fn a_tenant() -> impl Strategy<Value = &'static str> {
    select(vec![
        "a",
        "b",
        "c",
        "a-rather-long-name.with_all+kinds=of:characters@here",
    ])
}

// === HTTP/1 ===

/// How a body ends.
#[derive(Debug, Clone)]
enum Body {
    Nothing,
    Length(usize),
    Chunks(Vec<usize>),
}

#[derive(Debug, Clone)]
struct Exchange {
    tenant: &'static str,
    method: &'static str,
    upload: Body,
    interim: usize,
    status: u16,
    download: Body,
}

/// What happens after the last whole exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    ClientCloses,
    ApplicationCloses,
    Upgrade,
}

impl Body {
    fn header(&self) -> String {
        match self {
            Self::Nothing => "X-Nothing: here".to_owned(),
            Self::Length(length) => format!("Content-Length: {length}"),
            Self::Chunks(_) => "Transfer-Encoding: chunked".to_owned(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Length(length) => filling(*length),
            Self::Chunks(sizes) => chunked(sizes),
        }
    }
}

impl Exchange {
    fn request(&self) -> Vec<u8> {
        let tenant = format!("X-Tenant: {}", self.tenant);
        let line = format!("{} /p HTTP/1.1", self.method);
        request(&line, &[&tenant, &self.upload.header()], self.upload.bytes())
    }

    fn answer(&self) -> Vec<u8> {
        let mut bytes = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n".repeat(self.interim);
        let has_no_body = self.method == "HEAD" || matches!(self.status, 204 | 304);
        let status = format!("{} Status", self.status);
        bytes.extend(match (&self.download, has_no_body) {
            (Body::Nothing, false) => answer(&status, &["Content-Length: 0"], b""),
            // RFC 9110, section 8.6: no length with 204.
            (_, true) if self.status == 204 => answer(&status, &[], b""),
            (body, true) => answer(&status, &[&body.header()], b""),
            (body, false) => answer(&status, &[&body.header()], body.bytes()),
        });
        bytes
    }

    fn counted(&self) -> (&str, Outcome) {
        (self.tenant, Outcome::of_http_status(self.status))
    }
}

fn a_body() -> impl Strategy<Value = Body> {
    prop_oneof![
        3 => Just(Body::Nothing),
        4 => (0_usize..3_000).prop_map(Body::Length),
        1 => (10_000_usize..100_000).prop_map(Body::Length),
        4 => prop::collection::vec(0_usize..600, 0..5).prop_map(Body::Chunks),
        1 => prop::collection::vec(0_usize..20_000, 0..4).prop_map(Body::Chunks),
    ]
}

fn an_exchange() -> impl Strategy<Value = Exchange> {
    (
        a_tenant(),
        select(vec!["GET", "POST", "HEAD", "PUT", "OPTIONS"]),
        a_body(),
        0_usize..3,
        select(vec![200_u16, 200, 204, 301, 304, 400, 404, 500, 503]),
        a_body(),
    )
        .prop_map(|(tenant, method, upload, interim, status, download)| Exchange {
            tenant,
            method,
            upload,
            interim,
            status,
            download,
        })
}

fn an_ending() -> impl Strategy<Value = Last> {
    select(vec![
        Last::ClientCloses,
        Last::ClientCloses,
        Last::ApplicationCloses,
        Last::Upgrade,
    ])
}

/// Pieces of the size, but not so many that they take long.
fn pieces(size: usize, bytes: Vec<u8>) -> Step {
    send_slowly(size.max(bytes.len() / 30), bytes)
}

/// Requests that are sent without waiting for answers, and their answers, in either of two manners: all
/// requests are read before the first is answered, or each is answered when it was read.
fn batch(case: Case, exchanges: &[Exchange], is_eager: bool, size: usize) -> Case {
    let requests: Vec<Vec<u8>> = exchanges.iter().map(Exchange::request).collect();
    let answers: Vec<Vec<u8>> = exchanges.iter().map(Exchange::answer).collect();
    let counted: Vec<(&str, Outcome)> = exchanges.iter().map(Exchange::counted).collect();
    let (sent, read) = (requests.concat(), answers.concat());
    let case = case.counts(&counted);
    if is_eager {
        let turns = requests.iter().zip(answers);
        let turns = turns.flat_map(|(request, answer)| [Step::Read(request.len()), Step::Send(answer)]);
        return case
            .client([Step::SendAndRead(sent, read.len())])
            .application(turns);
    }
    case.client([pieces(size, sent.clone()), Step::Read(read.len())])
        .application([Step::Read(sent.len()), pieces(size, read)])
}

fn ending(case: Case, last: Last) -> Case {
    match last {
        Last::ClientCloses => case.client([Step::Close]).application([Step::ExpectEof]),
        Last::ApplicationCloses => {
            let asked = request("GET /last HTTP/1.1", &["X-Tenant: last"], b"");
            let said = answer("200 OK", &["Connection: close"], filling(777));
            case.client([Step::Send(asked.clone()), Step::ExpectEof, Step::Close])
                .application([Step::Read(asked.len()), Step::Send(said), Step::Close])
                .counts(&[("last", Outcome::Success)])
        }
        Last::Upgrade => {
            let headers = ["X-Tenant: last", "Connection: upgrade", "Upgrade: x"];
            let asked = request("GET /last HTTP/1.1", &headers, b"");
            let said = answer("101 Switching", &headers[1..], filling(99));
            case.client([Step::Send(asked.clone()), Step::Read(said.len())])
                .client([Step::SendAndRead(filling(5_000), 7_000), Step::Close])
                .application([Step::Read(asked.len()), Step::Send(said)])
                .application([Step::SendAndRead(filling(7_000), 5_000), Step::ExpectEof])
                .counts(&[("last", Outcome::Success)])
                .opaque([Opaque::Upgrade])
        }
    }
}

// === HTTP/2 ===

/// One stream: a request and its answer.
#[derive(Debug, Clone)]
struct Call {
    tenant: &'static str,
    upload: Vec<usize>,
    download: Vec<usize>,
    has_trailers: bool,
    is_grpc: bool,
    status: &'static str,
    grpc_status: &'static str,
    /// The form of the first field; none for literals only.
    form: Option<usize>,
}

impl Call {
    fn form(&self, number: usize) -> Form {
        match self.form {
            None => Form::Literal,
            Some(first) => [Form::Literal, Form::Inserted, Form::Indexed][(first + number) % 3],
        }
    }

    fn block(&self, encoder: &mut Encoder, fields: &frames::Fields<'_>) -> Vec<u8> {
        let mut block = Vec::new();
        for (number, (name, value)) in fields.iter().enumerate() {
            encoder.field(self.form(number), name, value, &mut block);
        }
        block
    }

    /// The frames of the request, as they follow each other.
    fn request(&self, stream: u32, encoder: &mut Encoder) -> Vec<Vec<u8>> {
        let content_type = if self.is_grpc {
            "application/grpc"
        } else {
            "text/plain"
        };
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/a/rather/long/path?with=a&query=too"),
            (":authority", "shop.example.com"),
            ("content-type", content_type),
            ("x-tenant", self.tenant),
        ];
        let block = self.block(encoder, &fields);
        message(stream, &block, &self.upload, None)
    }

    fn answer(&self, stream: u32, encoder: &mut Encoder) -> Vec<Vec<u8>> {
        let status = if self.is_grpc { "200" } else { self.status };
        let block = self.block(encoder, &[(":status", status), ("server", "random")]);
        if !self.is_grpc && !self.has_trailers {
            return message(stream, &block, &self.download, None);
        }
        let trailers = self.block(encoder, &[("grpc-status", self.grpc_status), ("checksum", "1")]);
        message(stream, &block, &self.download, Some(trailers))
    }

    fn outcome(&self) -> Outcome {
        if self.is_grpc {
            Outcome::of_grpc_status(self.grpc_status.parse().unwrap())
        } else {
            Outcome::of_http_status(self.status.parse().unwrap())
        }
    }
}

/// The frames of a message. Header blocks must not be apart from their continuations.
fn message(stream: u32, block: &[u8], body: &[usize], trailers: Option<Vec<u8>>) -> Vec<Vec<u8>> {
    let ends = |is_last: bool| {
        if is_last && trailers.is_none() {
            END_STREAM
        } else {
            NO_FLAGS
        }
    };
    let (first, rest) = block.split_at(block.len() / 2);
    let head = [
        frame(HEADERS, ends(body.is_empty()), stream, first),
        frame(CONTINUATION, END_HEADERS, stream, rest),
    ];
    let mut all = vec![head.concat()];
    for (number, size) in body.iter().enumerate() {
        all.push(data(stream, ends(number + 1 == body.len()), &filling(*size)));
    }
    all.extend(trailers.map(|block| frame(HEADERS, END_STREAM | END_HEADERS, stream, &block)));
    all
}

fn a_call() -> impl Strategy<Value = Call> {
    let sizes = || prop::collection::vec(0_usize..900, 0..4);
    (
        a_tenant(),
        sizes(),
        sizes(),
        any::<bool>(),
        any::<bool>(),
        select(vec!["200", "201", "404", "500"]),
        select(vec!["0", "3", "13", "14"]),
        (0_usize..3).prop_map(Some),
    )
        .prop_map(
            |(tenant, upload, download, has_trailers, is_grpc, status, grpc_status, form)| Call {
                tenant,
                upload,
                download,
                has_trailers,
                is_grpc,
                status,
                grpc_status,
                form,
            },
        )
}

/// All frames, those of one message in order: message by message, or of each message one in turn.
fn interleave(messages: Vec<Vec<Vec<u8>>>, is_interleaved: bool) -> Vec<u8> {
    if !is_interleaved {
        return messages.concat().concat();
    }
    let longest = messages.iter().map(Vec::len).max().unwrap_or(0);
    let turns = (0..longest).flat_map(|turn| messages.iter().filter_map(move |frames| frames.get(turn)));
    turns.flatten().copied().collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn exchanges_of_http_1(
        exchanges in prop::collection::vec(an_exchange(), 1..9),
        depth in 1_usize..5,
        is_eager in any::<bool>(),
        size in 1_usize..2_000,
        last in an_ending(),
    ) {
        let mut case = Case::new("random exchanges");
        for exchanges in exchanges.chunks(depth) {
            case = batch(case, exchanges, is_eager, size);
        }
        ending(case, last).check();
    }

    #[test]
    fn streams_of_http_2(
        calls in prop::collection::vec(a_call(), 1..12),
        is_interleaved in any::<bool>(),
        size in 1_usize..2_000,
    ) {
        // What is remembered depends on the order of the blocks: with frames of several streams in turn,
        // nothing is remembered.
        let calls: Vec<Call> = calls
            .into_iter()
            .map(|call| if is_interleaved { Call { form: None, ..call } } else { call })
            .collect();
        let (mut up, mut down) = (Encoder::default(), Encoder::default());
        let (mut requests, mut answers) = (Vec::new(), Vec::new());
        for (call, stream) in calls.iter().zip((1..).step_by(2)) {
            requests.push(call.request(stream, &mut up));
            answers.push(call.answer(stream, &mut down));
        }
        let counted: Vec<(&str, Outcome)> = calls.iter().map(|call| (call.tenant, call.outcome())).collect();
        let client = [opening(), interleave(requests, is_interleaved)].concat();
        let application = [settings(&[]), settings_ack(), interleave(answers, is_interleaved)].concat();
        Case::new("random streams")
            .client([pieces(size, client.clone()), Step::Read(application.len()), Step::Close])
            .application([Step::Read(client.len()), pieces(size, application), Step::ExpectEof])
            .counts(&counted)
            .check();
    }
}
