//! Writes the seeds: `cargo run --example seeds` here, after a change of a format. Each is accepted by what it is a
//! seed of.

use std::{fs, path::Path};

use coalmine_aggregator::store;
use coalmine_fuzz::{
    COSIGNED, FRAME_HEADER_BYTES, HERE, LOG, POLICY, checkpoints, entries, evidence, frames, growth,
    histograms, keys, last_batch, lines, log_key, messages, proof, rollout, witness_key,
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
