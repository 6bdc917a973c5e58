//! The book in PostgreSQL: what changed of it, written piece by piece.
//!
//! A batch is durable when a transaction is committed that began after the batch was applied, since it has every piece
//! that changed until then, and the agent's number with them. Writing the same state twice changes nothing, so a
//! transaction whose end is not known is done again.

use std::{
    sync::{Mutex, mpsc},
    time::{Duration, Instant},
};

use super::{Job, Jobs, next_group};
use crate::{
    book::{Book, Changes, Piece, locked},
    database::{Database, DatabaseError, WriteError, describe, step_down},
};

/// Transactions are at least so far apart: each writes whole pieces.
const APART: Duration = Duration::from_millis(200);

pub(super) fn run(database: &Database, book: &Mutex<Book>, jobs: &mpsc::Receiver<Job>) {
    let mut last: Option<Instant> = None;
    while let Some(Jobs { group, .. }) = next_group(jobs) {
        if let Some(wait) = last.and_then(|last| (last + APART).checked_duration_since(Instant::now())) {
            std::thread::sleep(wait);
        }
        last = Some(Instant::now());
        let changes = locked(book).changes();
        if !changes.is_empty() {
            keep(database, &changes);
        }
        for (_, done) in group {
            done();
        }
    }
}

/// Writes until it is written.
fn keep(database: &Database, changes: &Changes) {
    loop {
        let written = database.write(
            || write(database, changes),
            |problem| {
                tracing::warn!(
                    problem,
                    "the database does not answer; the agents keep their windows"
                )
            },
        );
        match written {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%error, "the database takes no windows; the agents keep them, trying again");
                std::thread::sleep(super::RETRY);
            }
        }
    }
}

async fn write(database: &Database, changes: &Changes) -> Result<(), WriteError> {
    let log = &*database.log;
    let mut connection = database.get().await?;
    let transaction = connection.transaction().await?;
    // The term cannot change until this is committed.
    let ours = transaction
        .query_opt(
            "SELECT 1 FROM log_head WHERE log = $1 AND term = $2 FOR SHARE",
            &[&log, &database.term],
        )
        .await?;
    if ours.is_none() {
        step_down(log);
    }
    let of = |part: fn(&Piece) -> &str| changes.pieces.iter().map(part).collect::<Vec<_>>();
    let payloads: Vec<&[u8]> = changes
        .pieces
        .iter()
        .map(|piece| piece.payload.as_slice())
        .collect();
    transaction
        .execute(
            "INSERT INTO window_piece (log, service, key, payload)
             SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bytea[])
             ON CONFLICT (log, service, key) DO UPDATE SET payload = EXCLUDED.payload",
            &[
                &log,
                &of(|piece| &piece.service),
                &of(|piece| &piece.key),
                &payloads,
            ],
        )
        .await?;
    let (services, keys): (Vec<&str>, Vec<&str>) = changes
        .removed
        .iter()
        .map(|(service, key)| (service.as_str(), key.as_str()))
        .unzip();
    transaction
        .execute(
            "DELETE FROM window_piece USING unnest($2::text[], $3::text[]) AS gone (service, key)
             WHERE log = $1 AND window_piece.service = gone.service AND window_piece.key = gone.key",
            &[&log, &services, &keys],
        )
        .await?;
    Ok(transaction.commit().await?)
}

/// Puts the book back as it was committed last.
pub(crate) async fn load(database: &Database, book: &mut Book) -> Result<(), DatabaseError> {
    let failed = |error: tokio_postgres::Error| DatabaseError::Failed(describe(&error));
    let mut connection = database.connection().await?;
    let transaction = connection.transaction().await.map_err(failed)?;
    transaction
        .batch_execute("SET LOCAL statement_timeout = 0")
        .await
        .map_err(failed)?;
    let rows = transaction
        .query(
            // Names before slots and totals, as the alphabet has it in the C collation; shards by number.
            "SELECT service, key, payload FROM window_piece WHERE log = $1
             ORDER BY service COLLATE \"C\", split_part(key, '/', 1) COLLATE \"C\",
                      CASE WHEN key LIKE 'names/%' THEN split_part(key, '/', 2)::bigint END, key COLLATE \"C\"",
            &[&&*database.log],
        )
        .await
        .map_err(failed)?;
    for row in rows {
        let piece = Piece {
            service: row.try_get(0).map_err(failed)?,
            key: row.try_get(1).map_err(failed)?,
            payload: row.try_get(2).map_err(failed)?,
        };
        book.load(&piece)
            .map_err(|problem| DatabaseError::Failed(format!("table window_piece: {problem}")))?;
    }
    Ok(())
}
