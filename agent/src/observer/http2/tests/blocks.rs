//! Tests of header blocks: the examples of RFC 7541, and both tables against a plain one.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::{
    super::{MAX_HEADERS, Opaque},
    hpack::Decoder,
    huffman,
    request::{RequestHead, RequestTable},
    response::{Answer, ResponseTable},
};

type Pairs = Vec<(String, String)>;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|digit| char::from(digit).to_digit(16).unwrap() as u8)
        .collect();
    digits.chunks(2).map(|pair| (pair[0] << 4) | pair[1]).collect()
}

fn pairs(fields: &[(&str, &str)]) -> Pairs {
    let fields = fields.iter();
    fields
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn read(decoder: &mut Decoder<RequestTable>, block: &[u8]) -> Result<Pairs, Opaque> {
    let mut head = RequestHead::default();
    decoder.decode(block, &mut head)?;
    Ok(head.pairs())
}

fn read_answer(decoder: &mut Decoder<ResponseTable>, block: &[u8]) -> Result<Answer, Opaque> {
    let mut answer = Answer::default();
    decoder.decode(block, &mut answer)?;
    Ok(answer)
}

/// An integer in the low bits, under a pattern in the high ones (RFC 7541, section 5.1).
fn integer(pattern: u8, bits: u32, value: usize) -> Vec<u8> {
    let full = (1 << bits) - 1;
    if value < full {
        return vec![pattern | value as u8];
    }
    let mut bytes = vec![pattern | full as u8];
    let mut rest = value - full;
    while rest >= 128 {
        bytes.push(0x80 | (rest & 0x7f) as u8);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes
}

fn text(text: &[u8], is_huffman: bool) -> Vec<u8> {
    let (pattern, bytes) = match is_huffman {
        true => (0x80, huffman::encode(text)),
        false => (0, text.to_vec()),
    };
    [integer(pattern, 7, bytes.len()), bytes].concat()
}

fn kept(name: &str, value: &str) -> Vec<u8> {
    [
        vec![0x40],
        text(name.as_bytes(), true),
        text(value.as_bytes(), false),
    ]
    .concat()
}

/// A block in hexadecimal, its fields, and the table's size after it.
type Block<'a> = (&'a str, &'a [(&'a str, &'a str)], usize);

/// Blocks that follow each other, each with its fields and the size of the table after it.
#[track_caller]
fn check(start: &[u8], blocks: &[Block<'_>]) {
    let mut requests = Decoder::<RequestTable>::default();
    let mut answers = Decoder::<ResponseTable>::default();
    assert_eq!(read(&mut requests, start), Ok(Vec::new()));
    assert_eq!(read_answer(&mut answers, start), Ok(Answer::default()));
    for (block, fields, size) in blocks {
        let block = hex(block);
        assert_eq!(read(&mut requests, &block), Ok(pairs(fields)));
        assert_eq!(requests.table().size(), *size);
        let answer = read_answer(&mut answers, &block).unwrap();
        let status = fields.iter().find(|(name, _)| *name == ":status");
        assert_eq!(answer.status, status.map(|(_, value)| value.parse().unwrap()));
        assert_eq!(answers.table().size(), *size);
    }
}

#[test]
fn single_fields() {
    // RFC 7541, appendix C.2.
    for (block, field, size) in [
        (
            "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
            ("custom-key", "custom-header"),
            55,
        ),
        ("040c 2f73 616d 706c 652f 7061 7468", (":path", "/sample/path"), 0),
        (
            "1008 7061 7373 776f 7264 0673 6563 7265 74",
            ("password", "secret"),
            0,
        ),
        ("82", (":method", "GET"), 0),
    ] {
        check(&[], &[(block, &[field], size)]);
    }
}

const FIRST_REQUEST: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "www.example.com"),
];
const SECOND_REQUEST: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "www.example.com"),
    ("cache-control", "no-cache"),
];
const THIRD_REQUEST: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "https"),
    (":path", "/index.html"),
    (":authority", "www.example.com"),
    ("custom-key", "custom-value"),
];

#[test]
fn requests() {
    // RFC 7541, appendix C.3: without Huffman coding.
    check(
        &[],
        &[
            ("828684410f7777772e6578616d706c652e636f6d", FIRST_REQUEST, 57),
            ("828684be58086e6f2d6361636865", SECOND_REQUEST, 110),
            (
                "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
                THIRD_REQUEST,
                164,
            ),
        ],
    );
    // Appendix C.4: with it.
    check(
        &[],
        &[
            ("828684418cf1e3c2e5f23a6ba0ab90f4ff", FIRST_REQUEST, 57),
            ("828684be5886a8eb10649cbf", SECOND_REQUEST, 110),
            (
                "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
                THIRD_REQUEST,
                164,
            ),
        ],
    );
}

const FIRST_ANSWER: &[(&str, &str)] = &[
    (":status", "302"),
    ("cache-control", "private"),
    ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
    ("location", "https://www.example.com"),
];
const SECOND_ANSWER: &[(&str, &str)] = &[
    (":status", "307"),
    ("cache-control", "private"),
    ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
    ("location", "https://www.example.com"),
];
const THIRD_ANSWER: &[(&str, &str)] = &[
    (":status", "200"),
    ("cache-control", "private"),
    ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
    ("location", "https://www.example.com"),
    ("content-encoding", "gzip"),
    (
        "set-cookie",
        "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
    ),
];

#[test]
fn answers_with_a_small_table() {
    // The examples have a table of 256 bytes from the beginning.
    let small = integer(0x20, 5, 256);
    // RFC 7541, appendix C.5: without Huffman coding.
    check(
        &small,
        &[
            (
                "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54\
                 6e1768747470733a2f2f7777772e6578616d706c652e636f6d",
                FIRST_ANSWER,
                222,
            ),
            ("4803333037c1c0bf", SECOND_ANSWER, 222),
            (
                "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f\
                 3d4153444a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076\
                 657273696f6e3d31",
                THIRD_ANSWER,
                215,
            ),
        ],
    );
    // Appendix C.6: with it.
    check(
        &small,
        &[
            (
                "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f\
                 0b97c8e9ae82ae43d3",
                FIRST_ANSWER,
                222,
            ),
            ("4883640effc1c0bf", SECOND_ANSWER, 222),
            (
                "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335df\
                 dfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
                THIRD_ANSWER,
                215,
            ),
        ],
    );
}

#[test]
fn what_an_entry_said_is_said_again() {
    let mut decoder = Decoder::<ResponseTable>::default();
    let block = [
        kept(":status", "503"),
        kept("content-type", "text/event-stream"),
        kept("grpc-status", "14"),
    ]
    .concat();
    let expected = Answer {
        status: Some(503),
        grpc_status: Some(14),
        is_event_stream: true,
    };
    assert_eq!(read_answer(&mut decoder, &block), Ok(expected));
    assert_eq!(read_answer(&mut decoder, &[0xc0, 0xbf, 0xbe]), Ok(expected));
    // The name of an entry, with another value, and the first status counts.
    let block = [integer(0x40, 6, 62), text(b"5", true), vec![0xbe, 0xbf]].concat();
    let answer = read_answer(&mut decoder, &block).unwrap();
    assert_eq!(answer.grpc_status, Some(5));
}

#[test]
fn sizes_are_changed_first() {
    let field = [0x82];
    let mut decoder = Decoder::<RequestTable>::default();
    let mut check = |parts: &[&[u8]], is_right: bool| {
        let read = read(&mut decoder, &parts.concat()).map(|_| ());
        assert_eq!(
            read,
            if is_right { Ok(()) } else { Err(Opaque::Hpack) },
            "{parts:x?}"
        );
    };
    check(&[&integer(0x20, 5, 4096), &field], true);
    check(&[&integer(0x20, 5, 0), &integer(0x20, 5, 100), &field], true);
    check(&[&field, &integer(0x20, 5, 100)], false);
    check(&[&integer(0x20, 5, 4097), &field], false);
}

#[test]
fn a_lower_limit_must_be_heeded() {
    let mut decoder = Decoder::<RequestTable>::default();
    assert!(read(&mut decoder, &kept("name", "value")).is_ok());
    decoder.set_limit(50);
    // Senders that never use the table do not mind: until a size comes, only its entries are in doubt.
    for entry in [&[0xbe_u8][..], &[0x7e, 1, b'x'], &[0x0f, 47, 1, b'x']] {
        assert_eq!(read(&mut decoder, entry), Err(Opaque::Hpack), "{entry:x?}");
    }
    let others = [&[0x82, 0x04, 1, b'/'][..], &[0x00, 1, b'a', 1, b'b']].concat();
    let expected = [(":method", "GET"), (":path", "/"), ("a", "b")];
    assert_eq!(read(&mut decoder, &others), Ok(pairs(&expected)));
    assert_eq!(
        read(&mut decoder, &[0x3f, 20, 0x82]),
        Err(Opaque::Hpack),
        "51 bytes"
    );
    assert_eq!(decoder.table().size(), 41);
    assert!(read(&mut decoder, &[0x3f, 19, 0x82, 0xbe]).is_ok(), "50 bytes");
    // A higher limit changes nothing by itself.
    decoder.set_limit(1000);
    assert!(read(&mut decoder, &[0x82, 0xbe]).is_ok());
    assert!(read(&mut decoder, &[&integer(0x20, 5, 1000)[..], &[0xbe]].concat()).is_ok());
    // However high it is, tables are followed up to a size.
    decoder.set_limit(1 << 30);
    assert!(read(&mut decoder, &integer(0x20, 5, 65_536)).is_ok());
    assert_eq!(read(&mut decoder, &integer(0x20, 5, 65_537)), Err(Opaque::Hpack));
}

#[test]
fn blocks_that_cannot_be_read() {
    for bad in [
        "80",
        "be",
        "ff80808080",
        "ff00",
        "40",
        "7e",
        "4001",
        "400161",
        "40016102",
        "4001610261",
        "4081ff",
        "40016181ff",
        "008200",
        "ffffffffffff",
    ] {
        let block = hex(bad);
        let mut requests = Decoder::<RequestTable>::default();
        assert_eq!(read(&mut requests, &block), Err(Opaque::Hpack), "{bad}");
        let mut answers = Decoder::<ResponseTable>::default();
        assert_eq!(read_answer(&mut answers, &block), Err(Opaque::Hpack), "{bad}");
    }
}

#[test]
fn an_entry_may_take_its_name_from_one_that_it_evicts() {
    let mut decoder = Decoder::<RequestTable>::default();
    let small = integer(0x20, 5, 60);
    let block = [
        small,
        kept("first-name", "1"),
        vec![0x7e],
        text(b"2", true),
        vec![0xbe],
    ]
    .concat();
    let expected = [("first-name", "1"), ("first-name", "2"), ("first-name", "2")];
    assert_eq!(read(&mut decoder, &block), Ok(pairs(&expected)));
    assert_eq!(decoder.table().size(), 43);
    // One that is larger than the table leaves it empty (RFC 7541, section 4.4).
    let block = kept("long-name", "a value that does not fit in it");
    assert!(read(&mut decoder, &block).is_ok());
    assert_eq!(decoder.table().size(), 0);
    assert_eq!(read(&mut decoder, &[0xbe]), Err(Opaque::Hpack));
}

#[test]
fn what_is_left_out_of_a_head_is_in_the_table() {
    let mut decoder = Decoder::<RequestTable>::default();
    let many = vec![0x90; 300];
    let fields = read(&mut decoder, &[many, kept("late", "1"), vec![0xbe]].concat()).unwrap();
    assert_eq!(fields.len(), MAX_HEADERS);
    assert!(fields.iter().all(|(name, _)| name == "accept-encoding"));
    assert_eq!(read(&mut decoder, &[0xbe]), Ok(pairs(&[("late", "1")])));
    // Even what is left out must be there.
    let missing = [vec![0x90; 300], vec![0xbf]].concat();
    assert_eq!(read(&mut decoder, &missing), Err(Opaque::Hpack));
}

#[test]
fn a_table_takes_little_more_memory_than_its_size() {
    let mut decoder = Decoder::<RequestTable>::default();
    for n in 0..5000 {
        let block = kept("x-request-id", &format!("{n:0>300}"));
        assert!(read(&mut decoder, &block).is_ok());
        assert!(decoder.table().size() <= 4096);
    }
    let footprint = decoder.table().footprint();
    assert!(footprint <= 16 * 1024, "{footprint}");
}

/// The dynamic table as the RFC has it, the newest entry first.
#[derive(Debug)]
struct Plain {
    entries: VecDeque<(Vec<u8>, Vec<u8>)>,
    max_size: usize,
}

impl Plain {
    fn size(&self) -> usize {
        self.entries
            .iter()
            .map(|(name, value)| name.len() + value.len() + 32)
            .sum()
    }

    fn insert(&mut self, name: &[u8], value: &[u8]) {
        self.entries.push_front((name.to_vec(), value.to_vec()));
        self.evict();
    }

    fn evict(&mut self) {
        while self.size() > self.max_size {
            self.entries.pop_back();
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Kept(String, String, bool),
    Passing(String, String, bool),
    Indexed(usize),
    Named(usize, String, bool),
    Resize(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (name, value) = ("[a-z][a-z0-9-]{0,20}", "[ -~]{0,90}");
    prop_oneof![
        4 => (name, value, any::<bool>()).prop_map(|(n, v, h)| Step::Kept(n, v, h)),
        1 => (name, value, any::<bool>()).prop_map(|(n, v, h)| Step::Passing(n, v, h)),
        4 => (0_usize..200).prop_map(Step::Indexed),
        2 => (0_usize..200, value, any::<bool>()).prop_map(|(i, v, h)| Step::Named(i, v, h)),
        1 => (0_usize..=4096).prop_map(Step::Resize),
    ]
}

proptest! {
    /// Both tables have what a plain one has, whatever is put in.
    #[test]
    fn tables_are_as_plain_ones(steps in prop::collection::vec(step(), 0..120)) {
        let mut plain = Plain { entries: VecDeque::new(), max_size: 4096 };
        let mut requests = Decoder::<RequestTable>::default();
        let mut answers = Decoder::<ResponseTable>::default();
        for step in steps {
            let mut expected = Vec::new();
            let block = match step {
                Step::Kept(name, value, h) => {
                    plain.insert(name.as_bytes(), value.as_bytes());
                    let block = [vec![0x40], text(name.as_bytes(), h), text(value.as_bytes(), !h)].concat();
                    expected.push((name, value));
                    block
                }
                Step::Passing(name, value, h) => {
                    let block = [vec![0x10], text(name.as_bytes(), h), text(value.as_bytes(), h)].concat();
                    expected.push((name, value));
                    block
                }
                Step::Indexed(index) | Step::Named(index, ..) if index >= plain.entries.len() => continue,
                Step::Indexed(index) => {
                    let (name, value) = plain.entries[index].clone();
                    expected.push((String::from_utf8(name).unwrap(), String::from_utf8(value).unwrap()));
                    integer(0x80, 7, 62 + index)
                }
                Step::Named(index, value, h) => {
                    let (name, _) = plain.entries[index].clone();
                    plain.insert(&name, value.as_bytes());
                    let block = [integer(0x40, 6, 62 + index), text(value.as_bytes(), h)].concat();
                    expected.push((String::from_utf8(name).unwrap(), value));
                    block
                }
                Step::Resize(size) => {
                    plain.max_size = size;
                    plain.evict();
                    integer(0x20, 5, size)
                }
            };
            prop_assert_eq!(read(&mut requests, &block), Ok(expected));
            prop_assert!(read_answer(&mut answers, &block).is_ok());
            prop_assert_eq!(requests.table().size(), plain.size());
            prop_assert_eq!(answers.table().size(), plain.size());
        }
    }

    #[test]
    fn random_blocks_are_read_or_refused(
        blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8),
    ) {
        let mut requests = Decoder::<RequestTable>::default();
        let mut answers = Decoder::<ResponseTable>::default();
        for block in blocks {
            // What both read, they read alike.
            let (request, answer) = (read(&mut requests, &block), read_answer(&mut answers, &block));
            if request.is_err() || answer.is_err() {
                break;
            }
            prop_assert_eq!(requests.table().size(), answers.table().size());
        }
    }
}
