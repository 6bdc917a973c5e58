//! The log in PostgreSQL: the same bytes, the same chain, the same checkpoints.
//!
//! A commit is one transaction: the row of `log_head` is locked and must say this process's term and the length and last
//! leaf that it knows; blobs, lines and checkpoint are inserted; the row moves on. When the connection breaks in the
//! middle, the row tells afterwards which of both happened.

use std::{io, path::PathBuf, sync::Arc};

use coalmine_judge::{
    chain::{Chain, Hash},
    record::Record,
};
use futures_util::TryStreamExt as _;

use super::{Blob, Health, LogProblem, Published, State, blobs, files::Check, storage::Group};
use crate::{
    database::{Database, WriteError, describe, step_down, table},
    disk::DiskError,
};

/// Of the checkpoints in the table one in so many is checked at the start, and the last.
const CHECKED_EACH: i64 = 1_000;

/// The log of this process, for writing.
#[derive(Debug)]
pub(super) struct PgLog {
    database: Database,
    health: Option<Arc<Health>>,
}

impl PgLog {
    pub(super) fn new(database: Database) -> Self {
        Self {
            database,
            health: None,
        }
    }

    /// Tells where it is said that the database is away.
    pub(super) fn report_to(&mut self, health: Arc<Health>) {
        self.health = Some(health);
    }

    /// Makes a group durable; waits for a database that is away.
    pub(super) fn commit(&mut self, group: &Group) -> io::Result<()> {
        let (database, health) = (&self.database, &self.health);
        database.write(
            || try_commit(database, group),
            |problem| {
                tracing::warn!(
                    problem,
                    "the database does not answer; the decision log waits for it"
                );
                if let Some(health) = health {
                    let why = format!(
                        "the decision log cannot be written: the database does not answer: {problem}"
                    );
                    health.set(State::Failing, why);
                }
            },
        )
    }
}

async fn try_commit(database: &Database, group: &Group) -> Result<(), WriteError> {
    let log = &*database.log;
    let mut connection = database.get().await?;
    let transaction = connection.transaction().await?;
    let head = transaction
        .query_opt(
            "SELECT size, prev, term FROM log_head WHERE log = $1 FOR UPDATE",
            &[&log],
        )
        .await?;
    let Some(head) = head else { step_down(log) };
    let (size, prev, term): (i64, Vec<u8>, i64) = (head.try_get(0)?, head.try_get(1)?, head.try_get(2)?);
    if term != database.term {
        step_down(log);
    }
    let first = i64::try_from(group.first).unwrap_or(i64::MAX);
    let end = first.saturating_add(i64::try_from(group.lines.len()).unwrap_or(i64::MAX));
    if !group.lines.is_empty() && (size, prev.as_slice()) == (end, &group.head.0[..]) {
        // It was committed before the connection broke.
        return Ok(());
    }
    if (size, prev.as_slice()) != (first, &group.prev.0[..]) {
        // Nobody else has the term, so somebody wrote by hand.
        step_down(log);
    }
    for Blob { digest, stored } in &group.blobs {
        transaction
            .execute(
                "INSERT INTO evidence_blob (sha256, bytes) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                &[&&digest.0[..], stored],
            )
            .await?;
    }
    let seqs: Vec<i64> = (first..end).collect();
    let texts: Vec<&[u8]> = group.lines.iter().map(|line| line.text.as_bytes()).collect();
    let leaves: Vec<&[u8]> = group.lines.iter().map(|line| &line.leaf.0[..]).collect();
    let ids: Vec<Option<&str>> = group.lines.iter().map(|line| line.id.as_deref()).collect();
    transaction
        .execute(
            "INSERT INTO log_entry (log, seq, line, leaf, id)
             SELECT $1, * FROM unnest($2::bigint[], $3::bytea[], $4::bytea[], $5::text[])",
            &[&log, &seqs, &texts, &leaves, &ids],
        )
        .await?;
    transaction
        .execute(
            "INSERT INTO log_checkpoint (log, size, note) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            &[&log, &end, &group.note],
        )
        .await?;
    transaction
        .execute(
            "UPDATE log_head SET size = $2, prev = $3 WHERE log = $1",
            &[&log, &end, &&group.head.0[..]],
        )
        .await?;
    Ok(transaction.commit().await?)
}

/// The log, for reading.
#[derive(Debug, Clone)]
pub(super) struct PgReader(pub(super) Database);

impl PgReader {
    pub(super) fn line(&self, seq: u64) -> io::Result<Option<Vec<u8>>> {
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        let read = async {
            let connection = self.0.connection().await.map_err(io::Error::other)?;
            let row = connection
                .query_opt(
                    "SELECT line FROM log_entry WHERE log = $1 AND seq = $2",
                    &[&&*self.0.log, &seq],
                )
                .await
                .map_err(|error| io::Error::other(describe(&error)))?;
            row.map(|row| row.try_get(0))
                .transpose()
                .map_err(io::Error::other)
        };
        self.0.wait(read)
    }

    pub(super) fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String> {
        let stored = self.0.wait(blob(&self.0, digest))?;
        blobs::checked(digest, &stored)
    }
}

/// A blob as it is stored.
pub(super) async fn blob(database: &Database, digest: &Hash) -> Result<Vec<u8>, String> {
    let connection = database.connection().await.map_err(|error| error.to_string())?;
    let row = connection
        .query_opt(
            "SELECT bytes FROM evidence_blob WHERE sha256 = $1",
            &[&&digest.0[..]],
        )
        .await
        .map_err(|error| format!("cannot be read: {}", describe(&error)))?;
    let row = row.ok_or("is not there")?;
    row.try_get(0).map_err(|error| format!("cannot be read: {error}"))
}

/// What a database holds of a log.
pub(super) struct Held {
    pub(super) chain: Chain,
    pub(super) published: Option<Published>,
}

/// Reads a whole log as it was at one moment, gives each record with its line to `each`, and holds all against the
/// checkpoints.
pub(super) async fn read(
    database: &Database,
    mut each: impl FnMut(Record, Hash, &[u8]),
) -> Result<Held, DiskError> {
    let log = &*database.log;
    let failed = |error: tokio_postgres::Error| unreadable(describe(&error));
    let mut connection = database
        .connection()
        .await
        .map_err(|error| unreadable(error.to_string()))?;
    let transaction = connection
        .build_transaction()
        .read_only(true)
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await
        .map_err(failed)?;
    // A long log takes longer to read than anything else may.
    transaction
        .batch_execute("SET LOCAL statement_timeout = 0")
        .await
        .map_err(failed)?;
    let notes = transaction
        .query(
            "SELECT note FROM log_checkpoint WHERE log = $1 AND (size % $2 = 0 OR
             size = (SELECT max(size) FROM log_checkpoint WHERE log = $1)) ORDER BY size",
            &[&log, &CHECKED_EACH],
        )
        .await
        .map_err(failed)?;
    let mut known = Vec::new();
    for row in notes {
        let note: String = row.try_get(0).map_err(failed)?;
        let published = Published::read(&note).map_err(|problem| corrupt("log_checkpoint", problem))?;
        known.push((table("log_checkpoint"), published));
    }
    let published = known.last().map(|(_, published)| published.clone());
    let mut check = Check::new(known);
    let entries = table("log_entry");
    let rows = transaction
        .query_raw("SELECT line FROM log_entry WHERE log = $1 ORDER BY seq", [log])
        .await
        .map_err(failed)?;
    tokio::pin!(rows);
    while let Some(row) = rows.try_next().await.map_err(failed)? {
        let line: &[u8] = row.try_get(0).map_err(failed)?;
        let record = check
            .accept(line, &entries)
            .map_err(LogProblem::into_disk_error)?;
        each(record, check.chain.head().unwrap_or(Hash::ZERO), line);
    }
    check.finish(&entries).map_err(LogProblem::into_disk_error)?;
    // They are committed together, so what no checkpoint covers was written by somebody else.
    let covered = published.as_ref().map_or(0, |published| published.size);
    if covered != check.chain.size() {
        let problem = format!(
            "has {} records, and the checkpoint covers {covered}: somebody has written by hand",
            check.chain.size()
        );
        return Err(corrupt("log_entry", problem));
    }
    let head = transaction
        .query_opt("SELECT size, prev FROM log_head WHERE log = $1", &[&log])
        .await
        .map_err(failed)?;
    let (size, prev): (i64, Vec<u8>) = match head {
        Some(row) => (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?),
        None => (0, Hash::ZERO.0.to_vec()),
    };
    let found = (check.chain.size(), check.chain.head().unwrap_or(Hash::ZERO));
    if (u64::try_from(size).ok(), prev.as_slice()) != (Some(found.0), &found.1.0[..]) {
        let problem = format!(
            "says that the log has {size} records, and the table log_entry has {}",
            found.0
        );
        return Err(corrupt("log_head", problem));
    }
    Ok(Held {
        chain: check.chain,
        published,
    })
}

/// Some of the checkpoints of a log that cover no more than `size` records, by what they cover.
pub(super) async fn notes(database: &Database, size: u64) -> Result<Vec<String>, DiskError> {
    let failed = |error: tokio_postgres::Error| unreadable(describe(&error));
    let connection = database
        .connection()
        .await
        .map_err(|error| unreadable(error.to_string()))?;
    let rows = connection
        .query(
            "SELECT note FROM log_checkpoint WHERE log = $1 AND size % $2 = 0 AND size <= $3 ORDER BY size",
            &[
                &&*database.log,
                &CHECKED_EACH,
                &i64::try_from(size).unwrap_or(i64::MAX),
            ],
        )
        .await
        .map_err(failed)?;
    rows.iter().map(|row| row.try_get(0).map_err(failed)).collect()
}

fn unreadable(problem: String) -> DiskError {
    DiskError::io("read", &PathBuf::from("the database"), io::Error::other(problem))
}

fn corrupt(name: &str, problem: String) -> DiskError {
    DiskError::Corrupt {
        path: table(name),
        problem,
    }
}
