//! The log in a real PostgreSQL, which syncs as in production.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use coalmine_aggregator::{
    database::Database,
    ledger::{Ledger, Options},
    metrics::Metrics,
};
use coalmine_tests::postgres::{DATABASE, Postgres, SUPERUSER};
use tokio_postgres::{Client, NoTls, Statement};

use super::{
    pool::Pool,
    rates::{Kind, Log, Rates},
    rounds,
    stock::Stock,
};
use crate::{Plan, report::Report};

/// Where Debian puts the server, and in which package.
const PROGRAM: &str = "/usr/lib/postgresql/15/bin/postgres";
const PACKAGE: &str = "postgresql-15";

/// Connections of the floor; more callers than that share them.
const CONNECTIONS: usize = 32;

pub(super) async fn measure(
    plan: Plan,
    directory: &Path,
    pool: &Pool,
    stock: &Arc<Stock>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (rounds, slice) = rounds(plan);
    report.note(&format!(
        "\nDecisions in PostgreSQL, on the same disk, {rounds} rounds of {} ms; each caller of the floor has a \
         connection, up to {CONNECTIONS}.",
        slice.as_millis()
    ));
    if !Path::new(PROGRAM).is_file() {
        report.left_out("PostgreSQL 15", PACKAGE);
        return Ok(());
    }
    // The server may run as another user, who cannot pass the directory of the run.
    let home = tempfile::Builder::new().prefix("coalmine-bench-").tempdir()?;
    let path = home.path().to_owned();
    let started = pool.aside(move || Ok(Postgres::start(&path))).await;
    let postgres = started.context("PostgreSQL does not start")?;
    let url = postgres.url(SUPERUSER, DATABASE);

    let log = open(&url, directory.join("postgres"), pool, stock).await?;
    let line = stock.line();
    let floor = pool.wait(move || Floor::connect(url, line)).await?;
    let mut all = Rates::all(plan);
    for _ in 0..rounds {
        for rates in &mut all {
            let floor = floor.clone();
            let append = move |caller| floor.clone().append(caller);
            rates.floor.round(pool, rates.callers, slice, append).await?;
            rates.round(pool, slice, &log).await?;
        }
    }
    log.ledger.stop().await.ok();
    let kind = Kind {
        floor: "INSERT and COMMIT for each",
        log: "PostgreSQL",
        syncs: None,
        goal: None,
    };
    Rates::print(&all, kind, report);
    Ok(())
}

async fn open(url: &str, data: PathBuf, pool: &Pool, stock: &Arc<Stock>) -> anyhow::Result<Log> {
    let metrics = Arc::new(Metrics::new());
    let (url, counting) = (url.to_owned(), Arc::clone(&metrics));
    let open = move || async move {
        fs::create_dir_all(&data)?;
        let options = Options::default();
        let database = Database::connect(&url, None, &options.name).await?;
        database.migrate().await?;
        database.check_schema().await?;
        let database = database.take_lease("bench").await?;
        let opened = Ledger::open_postgres(&data, &database, options, counting, |_, _| {}).await?;
        opened.ledger.begin();
        anyhow::Ok(opened.ledger)
    };
    Ok(Log {
        ledger: pool.wait(open).await?,
        metrics,
        stock: Arc::clone(stock),
    })
}

/// The same line into a table, each in a transaction of its own.
#[derive(Clone)]
struct Floor {
    connections: Arc<Vec<(Client, Statement)>>,
    line: Arc<[u8]>,
}

impl Floor {
    async fn connect(url: String, line: String) -> anyhow::Result<Self> {
        let mut connections = Vec::with_capacity(CONNECTIONS);
        for number in 0..CONNECTIONS {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
            // It ends with its client.
            tokio::spawn(async move { connection.await.ok() });
            if number == 0 {
                let table = "CREATE TABLE bench_floor (seq bigserial PRIMARY KEY, line bytea NOT NULL)";
                client.batch_execute(table).await?;
            }
            let insert = client
                .prepare("INSERT INTO bench_floor (line) VALUES ($1)")
                .await?;
            connections.push((client, insert));
        }
        Ok(Self {
            connections: Arc::new(connections),
            line: line.into_bytes().into(),
        })
    }

    /// A statement outside of a transaction is one, and is committed when it is answered.
    async fn append(self, caller: usize) -> anyhow::Result<()> {
        let (client, insert) = &self.connections[caller % CONNECTIONS];
        let line: &[u8] = &self.line;
        client.execute(insert, &[&line]).await?;
        Ok(())
    }
}
