//! `coalmine audit` and `coalmine replay`: anybody with a copy of the data directory can check it.

use std::{
    io,
    path::{Path, PathBuf},
    slice,
};

use clap::Subcommand;
use coalmine_judge::{
    chain::Hash,
    note::{Proof, VerifierKey},
    record::{Body, Record},
    replay::{Blobs as _, Replay, Replayed, replay_decision},
    tree::Nodes,
};
use serde_json::json;

use super::{
    Exit, Failure, Output,
    explain::{name, of_another},
    say,
};
use crate::ledger::{LedgerFiles, Published, read_note};

mod export;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check every record, the chain, the checkpoint, and that all evidence is there unchanged
    Verify {
        /// Directory of the log
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// The key that must have signed the log, as the aggregator announced it when it began the log (NAME+ID+BASE64);
        /// without it the log is held against the key that it names itself
        #[arg(long, value_name = "KEY")]
        key: Option<VerifierKey>,
        /// Judge every decision again too, and compare the bytes
        #[arg(long)]
        deep: bool,
        /// A checkpoint that was kept elsewhere: the log must contain what it covers; repeat it for several
        #[arg(long, value_name = "FILE")]
        checkpoint: Vec<PathBuf>,
    },
    /// Copy a log and its evidence into a directory that can be verified and replayed anywhere
    Export(export::Options),
    /// Print the proof that a decision is in the log, for somebody who does not have the log (offline)
    Proof {
        /// The decision
        decision: String,
        /// Directory of the log
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
    /// Check a proof and print the record that it proves (offline)
    Check {
        /// The proof, as `coalmine audit proof` or GET /v1/decisions/ID/proof gives it; - is the standard input
        proof: PathBuf,
        /// The key that must have signed it (NAME+ID+BASE64)
        #[arg(long, value_name = "KEY")]
        key: VerifierKey,
    },
}

pub(super) async fn run(command: Command, output: Output) -> Result<Exit, Failure> {
    match command {
        Command::Verify {
            data,
            key,
            deep,
            checkpoint,
        } => verify(&data, key.as_ref(), deep, &checkpoint, output),
        Command::Export(options) => export::run(options, output).await,
        Command::Proof { decision, data } => proof(&data, &decision),
        Command::Check { proof, key } => check_proof(&proof, &key, output),
    }
}

pub(super) fn files(data: &Path) -> Result<LedgerFiles, Failure> {
    let files = LedgerFiles::new(data);
    if files.exists() {
        return Ok(files);
    }
    Err(Failure::usage(format!(
        "there is no decision log in {}: {} does not exist; give the directory that the aggregator has as --data",
        data.display(),
        files.log_path().display()
    )))
}

/// What a check of a log gives.
pub(crate) struct Verified {
    pub(crate) records: u64,
    pub(crate) decisions: u64,
    pub(crate) blobs: u64,
    pub(crate) root: String,
    /// The key that signs, as the log names it.
    pub(crate) key: Option<VerifierKey>,
    pub(crate) problems: Vec<String>,
    /// What somebody else can check, when checkpoints contradict each other.
    evidence: Vec<String>,
}

/// Checks a log and all that it names, against checkpoints that were kept elsewhere too.
pub(crate) fn check(files: &LedgerFiles, elsewhere: Vec<(PathBuf, Published)>) -> Verified {
    let mut verified = Verified {
        records: 0,
        decisions: 0,
        blobs: 0,
        root: String::new(),
        key: None,
        problems: Vec::new(),
        evidence: Vec::new(),
    };
    let mut checked = std::collections::BTreeSet::new();
    let mut problems = Vec::new();
    let scan = files.scan_against(elsewhere, |record, _, _| {
        verified.decisions += u64::from(matches!(record.body, Body::Decision(_)));
        for (what, digest) in record.body.blobs() {
            if checked.insert(digest)
                && let Err(problem) = files.blobs.bytes(&digest)
            {
                problems.push(format!("record {}: its {what} {digest} {problem}", record.seq));
            }
        }
    });
    verified.blobs = checked.len() as u64;
    verified.problems = problems;
    match scan {
        Ok(scan) => {
            verified.records = scan.chain.size();
            verified.root = scan.chain.root().to_string();
            verified.key = scan.chain.keys().first().cloned();
            if scan.torn_bytes > 0 {
                let problem = format!(
                    "{}: {} bytes after record {} are no whole record",
                    files.log_path().display(),
                    scan.torn_bytes,
                    scan.chain.size().saturating_sub(1)
                );
                verified.problems.push(problem);
            }
            if scan.history.1 > 0 {
                let problem = format!(
                    "{}: the last {} bytes are no whole checkpoint; the aggregator mends this when it starts",
                    files.history_path().display(),
                    scan.history.1
                );
                verified.problems.push(problem);
            }
            if scan.covered() < scan.chain.size() {
                let problem = format!(
                    "record {} and those after it are not covered by the checkpoint, so nobody can tell whether they \
                     were changed; the aggregator mends this when it starts",
                    scan.covered()
                );
                verified.problems.push(problem);
            }
        }
        Err(problem) => verified.problems.push(problem.to_string()),
    }
    verified
}

fn verify(
    data: &Path,
    wanted: Option<&VerifierKey>,
    deep: bool,
    checkpoints: &[PathBuf],
    output: Output,
) -> Result<Exit, Failure> {
    let files = files(data)?;
    let mut elsewhere = Vec::new();
    for path in checkpoints {
        let note = read_note(path).map_err(|problem| Failure::usage(problem.to_string()))?;
        let note =
            note.ok_or_else(|| Failure::usage(format!("there is no checkpoint in {}", path.display())))?;
        elsewhere.push((path.clone(), note));
    }
    let mut verified = check(&files, elsewhere.clone());
    if verified.records == 0 && verified.problems.is_empty() {
        let problem = format!("record 0: is missing: {} is empty", files.log_path().display());
        verified.problems.push(problem);
    }
    if !verified.problems.is_empty() {
        // Who shows this to others needs both sides.
        for (path, note) in elsewhere {
            verified
                .evidence
                .push(format!("the checkpoint in {}:\n{}", path.display(), note.note));
        }
        if let Ok(Some(here)) = read_note(&data.join("checkpoint")) {
            verified
                .evidence
                .push(format!("the checkpoint beside the log:\n{}", here.note));
        }
    }
    let mut replayed = None;
    if deep && verified.problems.is_empty() {
        let summary = replay_all(&files, |_, _| {});
        verified.problems.extend(summary.different);
        replayed = Some(summary.same);
    }
    if let (Some(wanted), Some(found)) = (wanted, &verified.key)
        && wanted != found
    {
        let problem = format!(
            "record 0: the log names {found} as its key, not {wanted}: it is another log, or one that was written anew"
        );
        verified.problems.push(problem);
    }
    let key = verified.key.as_ref().map(ToString::to_string);
    let good = verified.problems.is_empty();
    match output {
        Output::Json => say(&json!({
            "valid": good,
            "records": verified.records,
            "decisions": verified.decisions,
            "blobs": verified.blobs,
            "root": verified.root,
            "key": key,
            "replayed": replayed,
            "problems": verified.problems,
            "evidence": verified.evidence,
        })),
        Output::Table if good => {
            say(&format_args!(
                "verified: {} records ({} decisions), {} blobs, root {}, signed by {}",
                verified.records,
                verified.decisions,
                verified.blobs,
                verified.root,
                key.unwrap_or_default()
            ));
            if let Some(replayed) = replayed {
                say(&format_args!(
                    "replayed {replayed} decisions: the same bytes, all of them"
                ));
            }
        }
        Output::Table => {
            for problem in &verified.problems {
                say(&format_args!("FAILED {problem}"));
            }
            for evidence in &verified.evidence {
                say(&format_args!("\n{}", evidence.trim_end()));
            }
        }
    }
    Ok(if good { Exit::Good } else { Exit::Bad })
}

/// The record of a decision in a log, whoever has decided.
fn find(files: &LedgerFiles, wanted: &str) -> Result<Record, Failure> {
    let mut found = None;
    let scan = files.scan(|record, _, _| {
        if name(&record.body) == Some(wanted) {
            found = Some(record);
        }
    });
    scan.map_err(|problem| Failure::new(Exit::Bad, problem.to_string()))?;
    found.ok_or_else(|| {
        Failure::usage(format!(
            "there is no decision {wanted:?} in {}",
            files.log_path().display()
        ))
    })
}

fn proof(data: &Path, wanted: &str) -> Result<Exit, Failure> {
    let files = files(data)?;
    let record = find(&files, wanted)?;
    let (seq, line) = (record.seq, record.to_line());
    let mut nodes = Nodes::default();
    let scan = files
        .scan(|_, leaf, _| nodes.push(leaf))
        .map_err(|problem| Failure::new(Exit::Bad, problem.to_string()))?;
    let proof = scan
        .published
        .and_then(|published| published.proof(&nodes, seq, line.into_bytes()));
    let Some(proof) = proof else {
        let problem =
            format!("no checkpoint covers record {seq} yet; the aggregator mends this when it starts");
        return Err(Failure::new(Exit::Bad, problem));
    };
    say(&proof.to_string().trim_end());
    Ok(Exit::Good)
}

fn check_proof(path: &Path, key: &VerifierKey, output: Output) -> Result<Exit, Failure> {
    let shown = path.display();
    let text = if path.as_os_str() == "-" {
        io::read_to_string(io::stdin().lock())
    } else {
        std::fs::read_to_string(path)
    };
    let text = text.map_err(|error| Failure::usage(format!("cannot read {shown}: {error}")))?;
    let bad = |problem: &dyn std::fmt::Display| Failure::new(Exit::Bad, format!("{shown}: {problem}"));
    let proof = Proof::parse(&text).map_err(|error| bad(&error))?;
    let line = proof.extra.as_deref().ok_or_else(|| bad(&"carries no record"))?;
    let checkpoint = proof
        .verify(Hash::leaf(line), slice::from_ref(key))
        .map_err(|error| bad(&error))?;
    let record: Record =
        serde_json::from_slice(line).map_err(|error| bad(&format_args!("its record: {error}")))?;
    match output {
        Output::Json => say(&json!({
            "log": checkpoint.origin,
            "records": checkpoint.size,
            "root": checkpoint.root.to_string(),
            "record": record,
        })),
        Output::Table => {
            say(&format_args!(
                "record {} of {} in {}, root {}, signed by {key}",
                record.seq, checkpoint.size, checkpoint.origin, checkpoint.root
            ));
            if let Body::Decision(decision) = &record.body {
                say(&format_args!(
                    "decision {}: {}: {}",
                    decision.id, decision.finding.verdict, decision.finding.reason
                ));
            }
            for line in of_another(&record.body) {
                say(&line);
            }
        }
    }
    Ok(Exit::Good)
}

/// What a replay gives.
pub(crate) struct ReplaySummary {
    pub(crate) same: u64,
    pub(crate) different: Vec<String>,
}

/// Judges every decision of a log again.
pub(crate) fn replay_all(files: &LedgerFiles, mut each: impl FnMut(&str, &Replayed)) -> ReplaySummary {
    let mut replay = Replay::default();
    let mut summary = ReplaySummary {
        same: 0,
        different: Vec::new(),
    };
    let scan = files.scan(|record, _, _| {
        let replayed = replay.take(&record, &files.blobs);
        match &replayed {
            Replayed::Other => {}
            Replayed::Same => summary.same += 1,
            Replayed::Different { name, problem } => {
                summary
                    .different
                    .push(format!("record {} ({name}): {problem}", record.seq));
            }
        }
        if let Body::Decision(decision) = &record.body {
            each(&decision.id, &replayed);
        }
    });
    if let Err(problem) = scan {
        summary.different.push(problem.to_string());
    }
    summary
}

pub(super) fn replay(data: &Path, wanted: Option<&str>, output: Output) -> Result<Exit, Failure> {
    let files = files(data)?;
    match wanted {
        Some(wanted) => replay_one(&files, wanted, output),
        None => replay_log(&files, output),
    }
}

/// Judges one decision again, from what it rests on.
fn replay_one(files: &LedgerFiles, wanted: &str, output: Output) -> Result<Exit, Failure> {
    let Body::Decision(decision) = find(files, wanted)?.body else {
        return Err(Failure::usage(format!(
            "{wanted} is not the judge's decision, so it cannot be judged again; `coalmine explain {wanted}` says who has \
             decided, and why"
        )));
    };
    let problem = replay_decision(&decision, &files.blobs).err();
    match output {
        Output::Json => say(&json!({ "decision": wanted, "same": problem.is_none(), "problem": problem })),
        Output::Table => match &problem {
            None => say(&format_args!("{wanted}: the same bytes")),
            Some(problem) => say(&format_args!("FAILED {wanted}: {problem}")),
        },
    }
    Ok(if problem.is_none() { Exit::Good } else { Exit::Bad })
}

fn replay_log(files: &LedgerFiles, output: Output) -> Result<Exit, Failure> {
    let summary = replay_all(files, |_, _| {});
    let good = summary.different.is_empty();
    match output {
        Output::Json => say(&json!({ "same": summary.same, "different": summary.different })),
        Output::Table => {
            for problem in &summary.different {
                say(&format_args!("FAILED {problem}"));
            }
            if good {
                say(&format_args!(
                    "replayed {} decisions: the same bytes, all of them",
                    summary.same
                ));
            }
        }
    }
    Ok(if good { Exit::Good } else { Exit::Bad })
}
