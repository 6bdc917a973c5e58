//! Writes the seeds: `cargo run --example seeds` here, after a change of a format. Each is accepted by what it is a
//! seed of.

use std::{fs, path::Path};

use coalmine_agent::{
    observer::{Http1, Http2, Observer},
    pool,
};
use coalmine_aggregator::store;
use coalmine_fuzz::{
    COSIGNED, FRAME_HEADER_BYTES, HERE, LOG, POLICY, checkpoints,
    connection::{self, Deed, Event, Follows, Side, Turn, frame},
    entries, evidence, frames, growth, histograms, keys, last_batch, lines, log_key, messages, proof,
    rollout, witness_key,
};
use coalmine_judge::{
    chain::{Chain, Hash},
    evidence::Window,
    manifest::{Manifest, Snapshot},
    note::{Checkpoint, Proof, SignerKey, VerifierKey},
    policy::Policy,
    record::Record,
    v1::Judge,
};
use coalmine_proto::{names::Outcome, rule};
use prost::Message as _;

fn main() {
    record_line();
    note();
    checkpoint();
    proofs();
    window_batch();
    histogram();
    zstd_blob();
    policy();
    windows();
    snapshots();
    manifests();
    wal();
    add_checkpoint();
    http1();
    http2();
    hpack();
    tenant_rules();
    exposition();
}

/// Replaces a seed of a target.
fn write(target: &str, name: &str, content: impl AsRef<[u8]>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(name), content).unwrap();
}

fn record_line() {
    let mut chain = Chain::default();
    let mut open = Vec::new();
    for line in lines() {
        chain.accept(line.as_bytes()).unwrap();
        let record: Record = serde_json::from_str(&line).unwrap();
        let prev = format!("\"prev\":\"{}\"", record.prev);
        let seq = format!("\"seq\":{}", record.seq);
        open.push(
            line.replace(&prev, &format!("\"prev\":\"{HERE}\""))
                .replace(&seq, &format!("\"seq\":{HERE}")),
        );
    }
    write("record_line", "log", lines().join("\n"));
    write("record_line", "completed", open.join("\n"));
    for line in &open[1..] {
        let kind = line
            .split("\"type\":\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        write("record_line", kind, format!("{}\n{line}", open[0]));
    }
}

fn note() {
    let checkpoint = &checkpoints()[9];
    let text = checkpoint.to_string();
    let signed = checkpoint.sign([&log_key()]);
    let cosigned = signed.clone() + &witness_key().sign(&text, 1_700_000_000);
    for (name, note) in [("signed", &signed), ("cosigned", &cosigned)] {
        assert_eq!(Checkpoint::open(note, &keys()).as_ref(), Ok(checkpoint));
        write("note", name, note);
    }
    for (name, key) in [("key", log_key()), ("witness-key", witness_key())] {
        let public = key.verifier().to_string();
        VerifierKey::parse(&public).unwrap();
        write("note", name, public);
        SignerKey::parse(&key.to_secret_text()).unwrap();
        write("note", &format!("{name}-secret"), key.to_secret_text());
    }
}

fn checkpoint() {
    for size in [0, 9] {
        write(
            "checkpoint",
            &format!("size-{size}"),
            checkpoints()[size].to_string(),
        );
    }
    let extended = format!("{}an extension\nand another\n", checkpoints()[1]);
    assert_eq!(Checkpoint::parse(&extended).unwrap().origin, LOG);
    write("checkpoint", "extended", extended);
}

fn proofs() {
    for (index, size) in [(0, 1), (4, 7), (7, 10), (8, 9)] {
        let text = proof(index, &checkpoints()[size]).to_string();
        Proof::parse(&text).unwrap();
        write("proof", &format!("record-{index}-of-{size}"), text);
    }
    let bare = Proof {
        extra: None,
        ..proof(2, &checkpoints()[4])
    };
    write("proof", "without-record", bare.to_string());
}

fn window_batch() {
    let all: Vec<Vec<u8>> = messages()
        .iter()
        .map(|message| message.encode_length_delimited_to_vec())
        .collect();
    write("window_batch", "two-sessions", all.concat());
    write("window_batch", "one-batch", all[..2].concat());
    let last = last_batch();
    let last = last
        .iter()
        .map(|message| message.encode_length_delimited_to_vec());
    write("window_batch", "last-batch", last.collect::<Vec<_>>().concat());
    write(
        "window_batch",
        "twice",
        [&all[0], &all[1], &all[0], &all[1], &all[3]]
            .map(Vec::as_slice)
            .concat(),
    );
}

fn histogram() {
    let all: Vec<Vec<u8>> = histograms()
        .iter()
        .map(|histogram| histogram.to_wire().encode_length_delimited_to_vec())
        .collect();
    for (number, pair) in all.windows(2).enumerate() {
        write("histogram", &format!("pair-{number}"), pair.concat());
    }
}

fn zstd_blob() {
    let evidence = evidence().join("\n");
    for (name, content) in [
        ("evidence", evidence.as_bytes()),
        ("empty", b""),
        ("repeated", &[b'a'; 100_000]),
        ("no-text", &[0xff; 100]),
    ] {
        write("zstd_blob", name, zstd::bulk::compress(content, 3).unwrap());
    }
    // What unpacks to more than a reader takes.
    write(
        "zstd_blob",
        "large",
        zstd::bulk::compress(&vec![b'a'; 3 << 20], 19).unwrap(),
    );
}

fn policy() {
    let minimal = "apiVersion: coalmine.dev/v1\nkind: SlaBaseline\nservice: checkout\n\
                   defaults: { errors: { max_rate: 2% }, latency: { p99: 400ms } }\n";
    for (name, text) in [("minimal", minimal), ("everything", POLICY)] {
        Policy::parse(text).unwrap();
        write("policy", name, text);
    }
}

fn windows() {
    let lines = evidence();
    write("evidence", "windows", lines.join("\n"));
    write("evidence", "window", &lines[0]);
}

fn snapshots() {
    let mut judge = Judge::new(Policy::parse(POLICY).unwrap(), None, None).unwrap();
    write("snapshot", "new", judge.save());
    for (number, line) in (1..).zip(evidence()) {
        judge.step(&Window::from_json(&line).unwrap()).unwrap();
        if number >= 3 {
            write("snapshot", &format!("window-{number}"), judge.save());
        }
    }
}

fn manifests() {
    let mut manifest = Manifest::begin(rollout());
    manifest.windows.push(Hash::of(b"window 1"));
    write("manifest", "first", manifest.to_json());
    let state = Hash::of(b"state");
    manifest.rest_on(Snapshot { window: 10, state });
    manifest
        .windows
        .extend([b"window 11", b"window 12"].map(|window| Hash::of(window)));
    Manifest::parse(&manifest.to_json()).unwrap();
    write("manifest", "later", manifest.to_json());
}

fn wal() {
    let entries = entries();
    let frames = frames(entries.clone());
    let all = frames.concat();
    let mut read = Vec::new();
    assert_eq!(
        store::entries(&all, |entry| read.push(entry)),
        Ok(all.len() as u64)
    );
    assert_eq!(read, entries);
    write("wal", "frames", &all);
    write("wal", "torn", &all[..all.len() - 5]);
    // What `wal` itself puts into frames: payloads with their lengths before them.
    let payloads = frames.iter().map(|frame| &frame[FRAME_HEADER_BYTES..]);
    let pieces = payloads.map(|payload| [&(payload.len() as u16).to_le_bytes()[..], payload].concat());
    write("wal", "payloads", pieces.collect::<Vec<_>>().concat());
}

fn add_checkpoint() {
    let all = checkpoints();
    for (old, new) in [(0, 9), (COSIGNED, 9), (COSIGNED, 10), (COSIGNED, COSIGNED)] {
        let request = growth(&all[old], &all[new]);
        let latest = (old > 0).then_some(&all[old]);
        assert_eq!(request.decide(&keys(), latest), Ok(all[new].clone()));
        write(
            "add_checkpoint",
            &format!("from-{old}-to-{new}"),
            request.to_string(),
        );
    }
}

/// What the client sends.
fn asks(bytes: &[u8]) -> Turn<'_> {
    (Side::Client, Deed::Sends(bytes))
}

/// What the application sends.
fn answers(bytes: &[u8]) -> Turn<'_> {
    (Side::Application, Deed::Sends(bytes))
}

/// Writes a connection, in which so many requests must end in this way.
fn write_connection<O: Follows>(
    target: &str,
    name: &str,
    turns: &[Turn<'_>],
    ended: usize,
    outcome: Outcome,
) {
    for events in [
        connection::whole::<O>(turns),
        connection::whole::<Observer>(turns),
    ] {
        let ended_so = |event: &&Event| matches!(event, Event::Ended(_, so, _) if *so == outcome);
        assert_eq!(
            events.iter().filter(ended_so).count(),
            ended,
            "{name}: {events:?}"
        );
    }
    write(target, name, connection::write(1, turns));
}

fn http1() {
    let get = b"GET /t/acme/ HTTP/1.1\r\nHost: shop.example\r\nX-Tenant: acme\r\n\r\n";
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let save = |name: &str, turns: &[Turn<'_>], ended, outcome| {
        write_connection::<Http1>("http1", name, turns, ended, outcome);
    };
    save("get", &[asks(get), answers(ok)], 1, Outcome::Success);
    let (three, answered) = (get.repeat(3), ok.repeat(3));
    save(
        "pipelined",
        &[asks(&three), answers(&answered)],
        3,
        Outcome::Success,
    );
    let chunked =
        b"POST /upload HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunks = b"5;ext=1\r\nhello\r\n0\r\nTrailer-A: b\r\n\r\n";
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    let failed =
        b"HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let turns = [asks(chunked), answers(go_on), asks(chunks), answers(failed)];
    save("chunked", &turns, 1, Outcome::ServerError);
    let head = b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    let empty = b"HTTP/1.0 404 Not Found\r\nContent-Length: 10\r\n\r\n";
    save("head", &[asks(head), answers(empty)], 1, Outcome::ClientError);
    let until_close = [
        asks(get),
        answers(b"HTTP/1.0 200 OK\r\n\r\nuntil close"),
        (Side::Application, Deed::Closes),
    ];
    save("until-close", &until_close, 1, Outcome::Success);
    let upgrade = b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x81\x02hi";
    save("upgrade", &[asks(upgrade), answers(switch)], 1, Outcome::Success);
    let aborted = [asks(get), answers(&ok[..30]), (Side::Client, Deed::Resets)];
    save("aborted", &aborted, 1, Outcome::ClientAbort);
    let smuggled =
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    save("smuggled", &[asks(smuggled), answers(ok)], 0, Outcome::Success);
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Three requests on one connection (RFC 7541, appendix C.3), and the first as Huffman writes it (C.4.1).
const GETS: [&[u8]; 3] = [
    b"\x82\x86\x84\x41\x0fwww.example.com",
    b"\x82\x86\x84\xbe\x58\x08no-cache",
    b"\x82\x87\x85\xbf\x40\x0acustom-key\x0ccustom-value",
];
const HUFFMAN: &[u8] = b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";

/// A call of gRPC of a tenant, the head of its answer, and its trailers.
const CALL: &[u8] = b"\x83\x86\x04\x0e/shop.Cart/Add\x41\x0fwww.example.com\x5f\x10application/grpc\
    \x40\x02te\x08trailers\x40\x08x-tenant\x04acme";
const CALLED: &[u8] = b"\x88\x5f\x10application/grpc";
const TRAILERS: &[u8] = b"\x40\x0bgrpc-status\x0214";

/// `:status` 200 and 404, as the static table has them.
const FOUND: &[u8] = b"\x88";
const NOT_FOUND: &[u8] = b"\x8d";

fn http2() {
    let settings = frame(4, 0, 0, b"\x00\x03\x00\x00\x00\x64");
    let acknowledged = frame(4, 1, 0, b"");
    let hello = [PREFACE, &settings].concat();
    let save = |name: &str, turns: &[Turn<'_>], ended, outcome| {
        let mut all = vec![asks(&hello), answers(&settings), asks(&acknowledged)];
        all.extend(turns);
        write_connection::<Http2>("http2", name, &all, ended, outcome);
    };
    let gets: Vec<Vec<u8>> = (1..)
        .step_by(2)
        .zip(GETS)
        .map(|(stream, block)| frame(1, 5, stream, block))
        .collect();
    let (gets, body) = (gets.concat(), frame(0, 1, 1, b"hello"));
    let mixed = [
        frame(1, 5, 3, NOT_FOUND),
        frame(1, 4, 1, FOUND),
        body,
        frame(1, 5, 5, FOUND),
    ]
    .concat();
    save("three", &[asks(&gets), answers(&mixed)], 2, Outcome::Success);
    let call = [frame(1, 4, 1, CALL), frame(0, 1, 1, b"\0\0\0\0\0")].concat();
    let called = [
        frame(1, 4, 1, CALLED),
        frame(0, 0, 1, b"\0\0\0\0\0"),
        frame(1, 5, 1, TRAILERS),
    ];
    let called = called.concat();
    save("grpc", &[asks(&call), answers(&called)], 1, Outcome::ServerError);
    let split = [frame(1, 1, 1, &HUFFMAN[..4]), frame(9, 4, 1, &HUFFMAN[4..])].concat();
    let found = frame(1, 5, 1, FOUND);
    save(
        "continuation",
        &[asks(&split), answers(&found)],
        1,
        Outcome::Success,
    );
    let one = frame(1, 5, 1, HUFFMAN);
    let cancelled = frame(3, 0, 1, &[0, 0, 0, 8]);
    save(
        "cancelled",
        &[asks(&one), asks(&cancelled)],
        1,
        Outcome::ClientAbort,
    );
    save(
        "refused",
        &[asks(&one), answers(&cancelled)],
        1,
        Outcome::UpstreamReset,
    );
    let padded = frame(1, 13, 1, &[&[3][..], HUFFMAN, &[0; 3]].concat());
    save("padded", &[asks(&padded), answers(&found)], 1, Outcome::Success);
}

fn hpack() {
    let all: Vec<Turn<'_>> = GETS.iter().map(|block| asks(block)).collect();
    write("hpack", "appendix-c3", connection::write(1, &all));
    write(
        "hpack",
        "huffman",
        connection::write(1, &[asks(HUFFMAN), answers(FOUND)]),
    );
    let call = [asks(CALL), answers(TRAILERS), asks(CALL), answers(CALLED)];
    write("hpack", "grpc", connection::write(1, &call));
    // The table is made empty, and as large as it was (RFC 7541, section 4.2).
    let resized = [&b"\x20\x3f\xe1\x1f"[..], GETS[0]].concat();
    write(
        "hpack",
        "resized",
        connection::write(1, &[asks(&resized), answers(NOT_FOUND)]),
    );
}

fn tenant_rules() {
    // {"org":{"id":"acme"}}, signed by nobody.
    let signed = "/\nauthorization: Bearer eyJhbGciOiJub25lIn0.eyJvcmciOnsiaWQiOiJhY21lIn19.";
    for (name, rules, head) in [
        ("header", "header:X-Tenant-Id|lower", "/\nx-tenant-id: ACME"),
        (
            "host",
            "host:{tenant}.api.example.com",
            "/\nhost: acme.api.example.com:8080",
        ),
        ("path", "path:/t/{tenant}/ fixed:rest", "/t/%61cme/x?y"),
        (
            "query",
            "query:tenant|regex=org-([a-z]+)",
            "/x?a=b&tenant=org-acme",
        ),
        ("jwt", "jwt:org.id", signed),
    ] {
        rule::parse_list([rules]).unwrap();
        write("tenant_rules", name, format!("{rules}\n\n{head}"));
    }
}

/// The expositions that the agent's own tests read.
fn exposition() {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../agent/tests/expositions");
    for name in ["hikari_micrometer", "go_sql", "otel_connection", "pgbouncer"] {
        let text = fs::read(recorded.join(name).with_extension("txt")).unwrap();
        assert!(!pool::read(&text, &[]).is_empty(), "{name}");
        write("exposition", name, text);
    }
    let custom = "app_pool{state=\"busy\"} 7\napp_pool{state=\"free\"} 3\napp_pool_max 10\n\
                  app_pool_waits_total 5 1700000000000\napp_pool_wait_seconds_total 0.25\n\
                  app_pool_acquire_seconds_bucket{le=\"0.001\"} 90\n\
                  app_pool_acquire_seconds_bucket{le=\"+Inf\"} 100 # {trace=\"t\"} 0.3\n# EOF\n";
    write("exposition", "custom", custom);
}
