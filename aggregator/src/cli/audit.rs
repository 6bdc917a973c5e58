//! `coalmine audit` and `coalmine replay`: anybody with a copy of the data directory can check it.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use coalmine_judge::{
    record::Body,
    replay::{Blobs as _, Replay, Replayed},
};
use serde_json::json;

use super::{Exit, Failure, Output, say};
use crate::ledger::LedgerFiles;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check every record, the chain, the checkpoint, and that all evidence is there unchanged
    Verify {
        /// Directory of the log
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
}

pub(super) fn run(command: Command, output: Output) -> Result<Exit, Failure> {
    match command {
        Command::Verify { data } => verify(&data, output),
    }
}

pub(super) fn files(data: &Path) -> Result<LedgerFiles, Failure> {
    let files = LedgerFiles::new(data);
    if files.log_path().is_file() {
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
    pub(crate) problems: Vec<String>,
}

/// Checks a log and all that it names.
pub(crate) fn check(files: &LedgerFiles) -> Verified {
    let mut verified = Verified {
        records: 0,
        decisions: 0,
        blobs: 0,
        root: String::new(),
        problems: Vec::new(),
    };
    let mut checked = std::collections::BTreeSet::new();
    let mut problems = Vec::new();
    let scan = files.scan(|record, _, _| {
        let named: Vec<_> = match &record.body {
            Body::Rollout(start) => {
                let history = start.history.map(|digest| ("history", digest));
                [("policy", start.policy)].into_iter().chain(history).collect()
            }
            Body::Decision(decision) => {
                verified.decisions += 1;
                vec![("evidence", decision.evidence), ("policy", decision.policy)]
            }
            Body::LogStart { .. } | Body::Deadline(_) | Body::End(_) => Vec::new(),
        };
        for (what, digest) in named {
            if checked.insert(digest)
                && let Err(problem) = files.blobs.text(&digest)
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
            if scan.torn_bytes > 0 {
                let problem = format!(
                    "{}: {} bytes after record {} are no whole record",
                    files.log_path().display(),
                    scan.torn_bytes,
                    scan.chain.size().saturating_sub(1)
                );
                verified.problems.push(problem);
            }
            if scan.covered < scan.chain.size() {
                let problem = format!(
                    "record {} and those after it are not covered by the checkpoint, so nobody can tell whether they \
                     were changed; the aggregator mends this when it starts",
                    scan.covered
                );
                verified.problems.push(problem);
            }
        }
        Err(problem) => verified.problems.push(problem.to_string()),
    }
    verified
}

fn verify(data: &Path, output: Output) -> Result<Exit, Failure> {
    let files = files(data)?;
    let verified = check(&files);
    let good = verified.problems.is_empty();
    match output {
        Output::Json => say(&json!({
            "valid": good,
            "records": verified.records,
            "decisions": verified.decisions,
            "blobs": verified.blobs,
            "root": verified.root,
            "problems": verified.problems,
        })),
        Output::Table if good => say(&format_args!(
            "verified: {} records ({} decisions), {} blobs, root {}",
            verified.records, verified.decisions, verified.blobs, verified.root
        )),
        Output::Table => {
            for problem in &verified.problems {
                say(&format_args!("FAILED {problem}"));
            }
        }
    }
    Ok(if good { Exit::Good } else { Exit::Bad })
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
    let mut found = None;
    let summary = replay_all(&files, |id, replayed| {
        if Some(id) == wanted {
            found = Some(replayed.clone());
        }
    });
    if let Some(wanted) = wanted {
        let Some(replayed) = found else {
            return match summary.different.first() {
                Some(problem) => Err(Failure::new(Exit::Bad, problem.clone())),
                None => Err(Failure::usage(format!(
                    "there is no decision {wanted:?} in {}",
                    data.display()
                ))),
            };
        };
        let problem = match &replayed {
            Replayed::Different { problem, .. } => Some(problem.clone()),
            Replayed::Same | Replayed::Other => None,
        };
        match output {
            Output::Json => {
                say(&json!({ "decision": wanted, "same": problem.is_none(), "problem": problem }))
            }
            Output::Table => match &problem {
                None => say(&format_args!("{wanted}: the same bytes")),
                Some(problem) => say(&format_args!("FAILED {wanted}: {problem}")),
            },
        }
        return Ok(if problem.is_none() { Exit::Good } else { Exit::Bad });
    }
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
