//! Space: what a decision takes, of the fleets and the traffic of `decide`.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::Context as _;
use coalmine_aggregator::ledger::Blob;
use coalmine_judge::{
    chain::Hash,
    manifest::{Manifest, Snapshot},
    record::{Body, Finding, RolloutStart},
    v1,
};

use super::stock::decision;
use crate::{
    Plan,
    decide::{Rollout, Times, pack},
    report::{Report, Spread, Table},
};

/// Windows before the first that counts.
const WARM_UP: usize = 3;

/// Decisions of a rollout in an hour, with windows of ten seconds.
const AN_HOUR: f64 = 360.0;

/// What the files below a directory take.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    /// Their lengths.
    pub(super) bytes: u64,
    /// Their blocks on the disk.
    pub(super) on_disk: u64,
}

impl Size {
    pub(super) fn of(directory: &Path) -> io::Result<Self> {
        let mut size = Self::default();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                let inner = Self::of(&entry.path())?;
                size.bytes += inner.bytes;
                size.on_disk += inner.on_disk;
            } else if entry.file_name() != "reserve" {
                size.bytes += metadata.len();
                size.on_disk += metadata.blocks() * 512;
            }
        }
        Ok(size)
    }
}

/// Gives what was found of the smallest fleet last, and how long the packed evidence of its windows is.
pub(super) async fn measure(
    plan: Plan,
    directory: &Path,
    report: &mut Report,
) -> anyhow::Result<(Finding, usize)> {
    report.note(
        "\nSpace, in KiB a decision: the traffic of Decide, both arms in order. Evidence is the window, its manifest, and a \
         tenth of a\nsnapshot. On the disk are record, evidence, checkpoint and key in whole blocks, without directories \
         and the reserve.",
    );
    let mut table = Table::new([
        "",
        "record",
        "evidence",
        "evidence as JSON",
        "on the disk",
        "MiB an hour",
        "bytes a tenant",
    ]);
    let mut smallest = None;
    for (tenants, decisions) in [(500, 30), (10_000, 20)] {
        let decisions = if plan.quick { 2 } else { decisions };
        let data = directory.join(format!("space-{tenants}"));
        let mut rollout = Rollout::begin(tenants, &data)?;
        rollout.ledger.begin();
        for _ in 0..WARM_UP {
            rollout.judge_next(&mut Times::default())?;
        }
        let (mut record, mut json, mut last) = (vec![], vec![], None);
        let mut manifest = Manifest::begin(start());
        for number in 0..decisions {
            let mut blobs = Vec::new();
            if manifest.wants_snapshot() {
                let state = Blob::pack(&rollout.judge.save())?;
                manifest.rest_on(Snapshot {
                    window: number,
                    state: state.digest,
                });
                blobs.push(state);
            }
            let (window, outcome) = rollout.judge_next(&mut Times::default())?;
            let (evidence, json_bytes) = pack(&window, &outcome)?;
            manifest.windows.push(evidence.digest);
            let finding = Finding::of(&outcome);
            let decision = decision(number, tenants, finding.clone(), evidence.digest);
            blobs.extend([evidence, Blob::pack(manifest.to_json().as_bytes())?]);
            let body = Body::Decision(Box::new(decision));
            let appended = rollout.ledger.append(body, blobs).await?;
            record.push(appended.record.to_line().len() as f64 + 1.0);
            json.push(json_bytes as f64);
            last = Some(finding);
        }
        rollout.ledger.stop().await.ok();
        let each = |bytes: u64| bytes as f64 / decisions as f64;
        let evidence = each(Size::of(&data.join("evidence"))?.bytes);
        let on_disk = each(Size::of(&data)?.on_disk);
        let kib = |values: Vec<f64>| Spread::of(values).median / 1024.0;
        table.row([
            format!("{tenants} tenants, {decisions} decisions"),
            format!("{:.1}", kib(record)),
            format!("{:.0}", evidence / 1024.0),
            format!("{:.0}", kib(json)),
            format!("{:.0}", on_disk / 1024.0),
            format!("{:.0}", on_disk * AN_HOUR / f64::from(1 << 20)),
            format!("{:.0}", on_disk / tenants as f64),
        ]);
        smallest = smallest.or(last.map(|finding| (finding, evidence as usize)));
    }
    table.print();
    smallest.context("nothing was decided")
}

/// How the rollout began.
fn start() -> RolloutStart {
    RolloutStart {
        rollout: "checkout-canary-1-1772357400".to_owned(),
        key: "deploy-4711".to_owned(),
        service: "checkout".to_owned(),
        canary_version: "canary-1".to_owned(),
        baseline_version: None,
        policy: Hash::of(b"policy"),
        history: None,
        judge: v1::ID.to_owned(),
        max_windows: 180,
        window_ms: 10_000,
        start_ms: 1_772_357_400_000,
        actor: "bench".to_owned(),
        workload: None,
    }
}
