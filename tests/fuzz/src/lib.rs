//! What the fuzz targets and their seeds share: a small log with all kinds of records, its keys, a policy that asks
//! for everything, evidence, a session, and a [`connection`] that an observer follows. Nothing is random, so that a
//! signature that a target accepts must be one that was made here.

pub mod connection;

use std::sync::mpsc;

use coalmine_aggregator::{
    book::{Book, Patience},
    ingest::Rebuild,
    store::{Entry, Store},
};
use coalmine_judge::{
    chain::{Chain, Hash, rotation},
    evidence::Window,
    note::{Checkpoint, Kind, Proof, SignerKey, VerifierKey},
    record::{
        Actuation, Anomaly, Body, Decision, Finding, Follows, HoldDeadline, RolloutEnd, RolloutStart, Step,
        Workload,
    },
    tree::Nodes,
    v1,
    witness::AddCheckpoint,
};
use coalmine_proto::{
    PROTOCOL,
    histogram::Histogram,
    v1::{
        AgentMessage, Arm, Bye, ConfigApplied, Gap, Hello, TenantName, TenantRow, Totals, WindowBatch,
        agent_message::Kind as Message,
    },
};

/// The log's name.
pub const LOG: &str = "log.example/fuzz";

/// The time that it is, in milliseconds since the Unix epoch.
pub const NOW_MS: u64 = 1_700_000_000_000;

/// Stands in the seeds of `record_line` where the position, or the hash of the line before, would have to be known.
pub const HERE: &str = "@";

/// Length of the beginning of a frame in the write-ahead log: payload's length, the same inverted, checksum.
pub const FRAME_HEADER_BYTES: usize = 12;

/// The size of the checkpoint that the witness has cosigned last.
pub const COSIGNED: usize = 5;

/// A policy that asks for everything.
pub const POLICY: &str = "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults:
  errors: { max_rate: 1%, max_increase: 0.1pp, max_ratio: 1.25 }
  latency: { p99: 350ms, margin: 5% }
  pool: { max_wait_rate: 1%, max_increase: 1pp, max_ratio: 1.25 }
  required: [errors, latency, pool]
  judge_window: 1s
  hold_deadline: 45s
  on_deadline: rollback
tiers:
  gold: { errors: { max_rate: 0.9% }, latency: { p99: 250ms } }
tenants:
  tenant-0: { tier: gold, labels: { region: eu } }
  tenant-1: { labels: { region: eu }, errors: { max_rate: 0.5% } }
rollout:
  alpha: 1%
  rollback_threshold: 0.95
  warm_up: 2s
  min_coverage: { traffic: 90%, agents: 90%, tenants: 20% }
  cohorts: [tier, region, tail]
  critical: [tenant-0]
adjust: { from_history: true, floor: 0.5x, ceiling: 2x }
";

/// The key that signs the log at first.
pub fn log_key() -> SignerKey {
    SignerKey::from_seed(LOG, Kind::Ed25519, &[7; 32])
}

/// A witness's key.
pub fn witness_key() -> SignerKey {
    SignerKey::from_seed("witness.example/w", Kind::Cosignature, &[9; 32])
}

/// The keys of the log and of its witness.
pub fn keys() -> [VerifierKey; 2] {
    [log_key().verifier(), witness_key().verifier()]
}

/// How a rollout begins.
pub fn rollout() -> RolloutStart {
    RolloutStart {
        rollout: "r-1".into(),
        key: "deploy-7".into(),
        service: "checkout".into(),
        canary_version: "v2".into(),
        baseline_version: Some("v1".into()),
        policy: Hash::of(POLICY.as_bytes()),
        history: Some(Hash::of(b"history")),
        judge: v1::ID.into(),
        max_windows: 45,
        window_ms: 1_000,
        start_ms: NOW_MS,
        actor: "ci".into(),
        workload: Some(Workload {
            kind: "Deployment".into(),
            namespace: "shop".into(),
            name: "checkout".into(),
        }),
    }
}

fn bodies() -> Vec<Body> {
    let anomaly = Anomaly {
        unit: "tenant:acme".into(),
        metric: "errors".into(),
        state: "BREACH".into(),
        severity: "critical".into(),
        detail: "9 errors among 100 requests, \"é\"".into(),
        limits: "max_rate 1 %".into(),
        bits_q32: -1,
        budget_q32: 1 << 36,
        score_ppm: 12_345,
    };
    let start = rollout();
    let next = SignerKey::from_seed(LOG, Kind::Ed25519, &[8; 32])
        .verifier()
        .to_string();
    let finding = Finding {
        window: 1,
        verdict: "ROLLBACK".into(),
        score_ppm: 12_345,
        confidence_ppm: Some(990_000),
        reason: "tenant acme fails".into(),
        missing: vec!["nothing".into()],
        worst: Some(anomaly.clone()),
        worst_tenant: Some("acme".into()),
        anomalies: vec![anomaly],
        anomalies_detected: 1,
        traffic_ppm: 1_000_000,
        tenants_ppm: 1_000_000,
        agents_ppm: 1_000_000,
        tenants_checked: 1,
        outcome: Hash::of(b"outcome"),
    };
    let decision = Decision {
        id: start.decision_id(1),
        execution_id: "canary-2023-11-14T22:13:20Z-00000".into(),
        task: "canary_analysis".into(),
        rollout: start.rollout.clone(),
        service: start.service.clone(),
        canary_version: start.canary_version.clone(),
        finding,
        evidence: Hash::of(b"evidence"),
        manifest: Hash::of(b"manifest"),
        snapshot: Some(Hash::of(b"snapshot")),
        policy: start.policy,
        judge: start.judge.clone(),
        build: "coalmine 0.1.0".into(),
        late: false,
        steps: vec![Step {
            step: 1,
            action: "judge".into(),
            status: "success".into(),
            detail: "1 tenant".into(),
            duration_us: 7,
        }],
    };
    vec![
        Body::LogStart {
            build: "coalmine 0.1.0".into(),
            key: log_key().verifier().to_string(),
            follows: Some(Follows {
                log: "log.example/old".into(),
                size: 3,
                root: Hash::of(b"old"),
                reason: "the disk was lost".into(),
            }),
        },
        Body::Rollout(start),
        Body::Decision(Box::new(decision)),
        Body::Deadline(HoldDeadline {
            rollout: "r-1".into(),
            decision: "r-1-1".into(),
            held_ms: 45_000,
            on_deadline: "rollback".into(),
            verdict: "ROLLBACK".into(),
        }),
        Body::Gap {
            bytes: 17,
            kept_in: "decisions.jsonl.torn-1".into(),
        },
        Body::DiskFull {
            problem: "no space left on device".into(),
        },
        Body::SegmentSeal {
            first: 0,
            bytes: 4_096,
        },
        Body::Heartbeat {},
        Body::Actuation(Actuation {
            rollout: "r-1".into(),
            decision: "r-1-1".into(),
            target: "Deployment shop/checkout".into(),
            act: "restore".into(),
            stage: "begun".into(),
            detail: "to revision 3".into(),
        }),
        Body::End(RolloutEnd {
            rollout: "r-1".into(),
            actor: "ci".into(),
            reason: "done".into(),
            verdict: "ROLLBACK".into(),
        }),
        Body::KeyRotation {
            endorsed: log_key().sign(&rotation(LOG, &next), 0).trim_end().to_owned(),
            key: next,
            reason: "yearly".into(),
        },
    ]
}

/// The log's lines.
pub fn lines() -> Vec<String> {
    let mut chain = Chain::default();
    (NOW_MS..)
        .zip(bodies())
        .map(|(time_ms, body)| chain.append(LOG, time_ms, body).unwrap().1)
        .collect()
}

/// The log's tree.
pub fn nodes() -> Nodes {
    let mut nodes = Nodes::default();
    for line in lines() {
        nodes.push(Hash::leaf(line.as_bytes()));
    }
    nodes
}

/// The checkpoints of all beginnings of the log.
pub fn checkpoints() -> Vec<Checkpoint> {
    let nodes = nodes();
    (0..=nodes.size())
        .map(|size| Checkpoint {
            origin: LOG.into(),
            size,
            root: nodes.root(size).unwrap(),
        })
        .collect()
}

/// The proof of a record by a checkpoint, both counted from 0.
pub fn proof(index: usize, checkpoint: &Checkpoint) -> Proof {
    Proof {
        extra: Some(lines().swap_remove(index).into_bytes()),
        index: index as u64,
        path: nodes().inclusion(index as u64, checkpoint.size).unwrap(),
        checkpoint: checkpoint.sign([&log_key()]),
    }
}

/// The request to cosign a checkpoint after another one.
pub fn growth(old: &Checkpoint, checkpoint: &Checkpoint) -> AddCheckpoint {
    AddCheckpoint {
        old: old.size,
        path: nodes().consistency(old.size, checkpoint.size).unwrap(),
        checkpoint: checkpoint.sign([&log_key()]),
    }
}

fn latency(requests: u64) -> Histogram {
    let mut latency = Histogram::new();
    (0..requests).for_each(|request| latency.record((request * 7_919 % 97 + 3) * 1_000_000));
    latency
}

/// Lines of evidence, as they are stored.
pub fn evidence() -> Vec<String> {
    (1..=5)
        .map(|number| {
            let row = |tenant: u64, arm: &str, requests: u64, errors: u64| {
                let (offset, counts) = {
                    let latency = latency(requests);
                    let (offset, counts) = latency.contiguous();
                    (offset, counts.to_vec())
                };
                format!(
                    r#"{{"tenant":"tenant-{tenant}","arm":"{arm}","requests":{requests},"errors":{errors},"latency":{{"scale":4,"offset":{offset},"counts":{counts:?},"sum_ns":1000000,"over_sla":{{"limit_us":350000,"count":0}}}},"probes":{{"checks":3,"failed":0}}}}"#
                )
            };
            let rows = [
                row(0, "canary", 200, number),
                row(0, "baseline", 900, 1),
                row(1, "canary", 20, 9),
                row(1, "baseline", 90, 0),
            ];
            let line = format!(
                r#"{{"v":1,"window":{number},"start_ms":{start},"len_ms":1000,"coverage":{{"canary":{{"expected":1,"reported":1}},"baseline":{{"expected":2,"reported":1}}}},"rows":[{rows}],"pool":[{{"arm":"canary","acquires":200,"waits":1,"timeouts":0,"used":7,"max":10}}]}}"#,
                start = NOW_MS + 1_000 * number,
                rows = rows.join(",")
            );
            Window::from_json(&line).unwrap().to_json()
        })
        .collect()
}

/// What two agents send, one after the other: all kinds of messages.
pub fn messages() -> Vec<AgentMessage> {
    let hello = |arm: Arm, version: &str| {
        Message::Hello(Hello {
            protocol: PROTOCOL,
            instance: format!("pod-{version}"),
            epoch: 5,
            service: "checkout".into(),
            version: version.into(),
            arm: arm.into(),
            agent_version: "0.1.0".into(),
            oldest_seq: 1,
            next_seq: 2,
            window_ms: 1_000,
            now_unix_ms: NOW_MS,
        })
    };
    let batch = |seq: u64| {
        let row = |tenant: u32, requests: u64| TenantRow {
            tenant,
            success: requests - 2,
            server_error: 1,
            timeout: 1,
            client_abort: 3,
            latency: Some(latency(requests - 1).to_wire()),
            limit_us: 350_000,
            over_limit: 1,
            ..TenantRow::default()
        };
        let name = |number: u32, name: &str| TenantName {
            r#ref: number,
            name: name.into(),
        };
        // Each batch has 10 + 3 and 300 + 3 requests; the second one declares a gap of 4.
        let gap = (seq == 2).then_some(Gap {
            windows: 1,
            requests: 4,
            errors: 0,
            start_unix_ms: NOW_MS,
            end_unix_ms: NOW_MS + 1_000,
        });
        Message::Batch(WindowBatch {
            seq,
            start_unix_ms: NOW_MS + 1_000 * seq,
            length_ms: 1_000,
            names: if seq == 1 {
                vec![name(1, "acme"), name(2, "__none__")]
            } else {
                Vec::new()
            },
            rows: vec![row(1, 10), row(2, 300)],
            cumulative: Some(Totals {
                requests: 316 * seq + gap.map_or(0, |gap| gap.requests),
                errors: 4 * seq,
                gap_requests: gap.map_or(0, |gap| gap.requests),
            }),
            gap,
            config_version: 1,
            host: None,
            pools: Vec::new(),
        })
    };
    let bye = || {
        Message::Bye(Bye {
            last_seq: 2,
            reason: "stopped".into(),
        })
    };
    [
        hello(Arm::Canary, "v2"),
        batch(1),
        Message::ConfigApplied(ConfigApplied { version: 1 }),
        batch(2),
        bye(),
        hello(Arm::Baseline, "v1"),
        batch(1),
    ]
    .map(|kind| AgentMessage { kind: Some(kind) })
    .into()
}

/// A session that begins with the last batch that there can be.
pub fn last_batch() -> Vec<AgentMessage> {
    let mut messages = messages();
    messages.truncate(2);
    for message in &mut messages {
        match &mut message.kind {
            Some(Message::Hello(hello)) => hello.oldest_seq = u64::MAX,
            Some(Message::Batch(batch)) => batch.seq = u64::MAX,
            _ => {}
        }
    }
    messages
}

/// The same messages as they are stored, with the book that comes of them in pieces.
pub fn entries() -> Vec<Entry> {
    let mut session = 0;
    let entry = |message: AgentMessage| match message.kind? {
        Message::Hello(hello) => {
            session += 1;
            Some(Entry::Hello(session, hello))
        }
        Message::Batch(batch) => Some(Entry::Batch(session, batch)),
        Message::Bye(bye) => Some(Entry::Bye(session, bye)),
        Message::ConfigApplied(_) => None,
    };
    let mut entries: Vec<Entry> = messages().into_iter().filter_map(entry).collect();
    let mut book = Book::new(Patience::default(), NOW_MS);
    let mut rebuild = Rebuild::default();
    for entry in &entries {
        rebuild.take(&mut book, entry.clone(), NOW_MS + 10_000);
    }
    assert_eq!(rebuild.refused, 0);
    entries.extend(book.image().into_iter().map(Entry::Piece));
    entries
}

/// The entries' frames, as they stand in the write-ahead log.
pub fn frames(entries: impl IntoIterator<Item = Entry>) -> Vec<Vec<u8>> {
    let (write, written) = mpsc::channel();
    let store = Store::with_log(Box::new(move |frame, _| write.send(frame).unwrap()));
    entries.into_iter().for_each(|entry| store.append(entry, || {}));
    drop(store);
    written.into_iter().collect()
}

/// Histograms of all sizes.
pub fn histograms() -> Vec<Histogram> {
    let ends = Histogram::from_parts(-319, &[0; 431], 1, 2, 3).unwrap();
    vec![Histogram::new(), latency(3), latency(3_000), ends]
}
