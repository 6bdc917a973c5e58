//! PostgreSQL, as ledger and store share it: connections, the schema, and the lease.
//!
//! One aggregator at a time may write. It holds the lease of its log, and with it a term, a number that only grows; every
//! transaction that writes checks the term in the row of `log_head`. So a process that was stopped for longer than its
//! lease and goes on writes nothing: it finds another term, and ends.
//!
//! What a broken connection leaves open (was it committed?) is never guessed: whoever writes asks again until it knows.

use std::{
    future::Future,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bb8::{Pool, PooledConnection, RunError};
use bb8_postgres::PostgresConnectionManager;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::runtime::Handle;
use tokio_postgres::{
    config::{Host, SslMode},
    error::Severity,
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// The steps of the schema, in the order in which they are taken.
#[allow(
    missing_docs,
    unreachable_pub,
    reason = "what the macro makes is not for others"
)]
mod schema {
    refinery::embed_migrations!("migrations");
}

/// The schema that this program reads and writes.
const SCHEMA: i64 = 1;

/// How long a lease lasts, and how often it is renewed.
const LEASE: Duration = Duration::from_secs(15);
const RENEW: Duration = Duration::from_secs(5);

/// After so long without a renewal nothing is approved any more.
const DOUBT: Duration = Duration::from_secs(10);

/// How long one transaction may take before it is tried anew on another connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait before the database is asked again.
const AGAIN: Duration = Duration::from_millis(500);

type Manager = PostgresConnectionManager<MakeRustlsConnect>;
type Connection<'a> = PooledConnection<'a, Manager>;

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The settings make no sense.
    #[error("{0}")]
    Usage(String),
    /// The server cannot be reached, or refuses.
    #[error("cannot use the database: {0}")]
    Failed(String),
}

/// What a write to the database gives.
#[derive(Debug)]
pub(crate) enum WriteError {
    /// The server refused: nothing was written.
    Refused(io::Error),
    /// The connection broke, perhaps after the commit.
    Unknown(String),
}

impl From<tokio_postgres::Error> for WriteError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            // 57P01 to 57P03 and class 08: the server goes away. 40: try again. 55P03, 57014: it took too long.
            Some(refusal)
                if !matches!(refusal.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
                    && !["57P", "08", "40", "55P03", "57014", "25P03"]
                        .iter()
                        .any(|class| refusal.code().code().starts_with(class)) =>
            {
                let kind = match refusal.code().code() {
                    "53100" => io::ErrorKind::StorageFull,
                    _ => io::ErrorKind::Other,
                };
                Self::Refused(io::Error::new(kind, describe(&error)))
            }
            _ => Self::Unknown(describe(&error)),
        }
    }
}

impl From<RunError<tokio_postgres::Error>> for WriteError {
    fn from(error: RunError<tokio_postgres::Error>) -> Self {
        Self::Unknown(cause(&error))
    }
}

/// An error with what the server said.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(refusal) => format!("{} ({})", refusal.message(), refusal.code().code()),
        None => {
            let source = std::error::Error::source(error);
            source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
        }
    }
}

fn cause(error: &RunError<tokio_postgres::Error>) -> String {
    match error {
        RunError::User(error) => describe(error),
        RunError::TimedOut => "no connection within the time allowed".to_owned(),
    }
}

/// A database, and the log that this process keeps there.
#[derive(Debug, Clone)]
pub struct Database {
    /// Host and port, for errors.
    place: Arc<str>,
    pool: Pool<Manager>,
    runtime: Handle,
    /// The log.
    pub log: Arc<str>,
    /// The term under which this process writes; 0 if it only reads.
    pub term: i64,
    /// When the lease was renewed last, in milliseconds since `begun`.
    renewed_ms: Arc<AtomicU64>,
    begun: Instant,
}

impl Database {
    /// Connects. `roots` are the certificates to trust, in PEM; by default those of the system.
    pub async fn connect(url: &str, roots: Option<&Path>, log: &str) -> Result<Self, DatabaseError> {
        let mut config: tokio_postgres::Config = url.parse().map_err(|error: tokio_postgres::Error| {
            DatabaseError::Usage(format!(
                "--postgres is not an address of a database: {}; write it like postgres://USER@HOST/DATABASE",
                describe(&error)
            ))
        })?;
        if config.get_hosts().is_empty() {
            return Err(DatabaseError::Usage("--postgres names no host".to_owned()));
        }
        if config.get_ssl_mode() == SslMode::Prefer {
            // "Prefer" would go on in the clear where somebody in between says that there is no TLS.
            let local = config.get_hosts().iter().all(is_local);
            config.ssl_mode(if local { SslMode::Disable } else { SslMode::Require });
        }
        let ports = config.get_ports();
        let hosts = config.get_hosts().iter().enumerate().map(|(at, host)| {
            let port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(path) => path.display().to_string(),
            }
        });
        let place = hosts.collect::<Vec<_>>().join(", ");
        let limits = "-c synchronous_commit=on -c statement_timeout=20s -c lock_timeout=10s -c idle_in_transaction_session_timeout=5s";
        let options = config
            .get_options()
            .map_or_else(String::new, |own| format!("{own} "));
        config
            .options(format!("{options}{limits}"))
            .application_name("coalmine")
            .connect_timeout(Duration::from_secs(2))
            .tcp_user_timeout(Duration::from_secs(5))
            .keepalives_idle(Duration::from_secs(5));
        let tls = MakeRustlsConnect::new(trusting(roots)?);
        // A pool only says that it has no connection; this says why.
        let tried = config.connect(tls.clone()).await;
        drop(tried.map_err(|error| DatabaseError::Failed(format!("{place}: {}", describe(&error))))?);
        let manager = PostgresConnectionManager::new(config, tls);
        let pool = Pool::builder()
            .max_size(8)
            .connection_timeout(Duration::from_secs(5))
            .max_lifetime(Duration::from_secs(1_800))
            .retry_connection(false)
            .build_unchecked(manager);
        Ok(Self {
            place: place.into(),
            pool,
            runtime: Handle::current(),
            log: log.into(),
            term: 0,
            renewed_ms: Arc::default(),
            begun: Instant::now(),
        })
    }

    /// A connection, for reading at the start.
    pub(crate) async fn connection(&self) -> Result<Connection<'_>, DatabaseError> {
        let connection = self.pool.get().await;
        connection.map_err(|error| DatabaseError::Failed(format!("{}: {}", self.place, cause(&error))))
    }

    /// A connection, for writing.
    pub(crate) async fn get(&self) -> Result<Connection<'_>, WriteError> {
        Ok(self.pool.get().await?)
    }

    /// Creates the schema, or brings it to the present version; gives the migrations that were applied.
    pub async fn migrate(&self) -> Result<Vec<String>, DatabaseError> {
        let mut connection = self.connection().await?;
        let report = schema::migrations::runner().run_async(&mut *connection).await;
        let report = report.map_err(|error| {
            let source = std::error::Error::source(&error);
            let said = source.and_then(|source| source.downcast_ref::<tokio_postgres::Error>());
            DatabaseError::Failed(format!(
                "the schema cannot be brought up to date: {}",
                said.map_or_else(|| error.to_string(), describe)
            ))
        })?;
        Ok(report
            .applied_migrations()
            .iter()
            .map(ToString::to_string)
            .collect())
    }

    /// Refuses a schema of another version.
    pub async fn check_schema(&self) -> Result<(), DatabaseError> {
        let connection = self.connection().await?;
        let found = connection
            .query_one("SELECT max(version)::bigint FROM refinery_schema_history", &[])
            .await;
        let found: Option<i64> = match found {
            Ok(row) => row.try_get(0).unwrap_or(None),
            Err(error) if error.code().is_some_and(|code| code.code() == "42P01") => None,
            Err(error) => return Err(DatabaseError::Failed(describe(&error))),
        };
        match found {
            Some(SCHEMA) => Ok(()),
            Some(newer) if newer > SCHEMA => Err(DatabaseError::Failed(format!(
                "its schema has version {newer}, and this program knows version {SCHEMA}; use a newer program"
            ))),
            found => Err(DatabaseError::Failed(format!(
                "its schema has {}, and this program needs version {SCHEMA}; run `coalmine-aggregator migrate`",
                found.map_or_else(|| "no version".to_owned(), |version| format!("version {version}"))
            ))),
        }
    }

    /// Takes the lease of the log, when nobody else holds it; the same owner takes it over at once. From then on it is
    /// renewed, and the process ends when it is lost.
    pub async fn take_lease(mut self, owner: &str) -> Result<Self, DatabaseError> {
        let mut told = false;
        loop {
            let asked = self.begun.elapsed();
            let taken = match self.try_lease(owner).await {
                // Whoever stands by outlives a database that is away for a moment.
                Err(error) if told => {
                    tracing::warn!(%error, "cannot ask for the lease of the log; trying again");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                taken => taken?,
            };
            match taken {
                Ok(term) => {
                    self.term = term;
                    self.note_renewal(asked);
                    break;
                }
                Err(holder) => {
                    if !told {
                        tracing::warn!(holder, log = %self.log, "another aggregator holds the lease of the log; waiting for its end");
                        told = true;
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        tracing::info!(owner, term = self.term, log = %self.log, "the lease of the log is ours");
        tokio::spawn(self.clone().renew());
        Ok(self)
    }

    async fn try_lease(&self, owner: &str) -> Result<Result<i64, String>, DatabaseError> {
        let failed = |error: tokio_postgres::Error| DatabaseError::Failed(describe(&error));
        let mut connection = self.connection().await?;
        let transaction = connection.transaction().await.map_err(failed)?;
        let seconds = LEASE.as_secs().to_string();
        let taken = transaction
            .query_opt(
                "INSERT INTO lease (log, owner, term, expires)
                 VALUES ($1, $2, 1, now() + ($3 || ' seconds')::interval)
                 ON CONFLICT (log) DO UPDATE
                 SET owner = EXCLUDED.owner, term = lease.term + 1, expires = EXCLUDED.expires
                 WHERE lease.expires < now() OR lease.owner = EXCLUDED.owner
                 RETURNING term",
                &[&&*self.log, &owner, &seconds],
            )
            .await
            .map_err(failed)?;
        let Some(row) = taken else {
            let holder = transaction
                .query_opt("SELECT owner FROM lease WHERE log = $1", &[&&*self.log])
                .await
                .map_err(failed)?;
            let holder = holder.and_then(|row| row.try_get(0).ok());
            return Ok(Err(holder.unwrap_or_default()));
        };
        let term: i64 = row.try_get(0).map_err(failed)?;
        transaction
            .execute(
                "INSERT INTO log_head (log, size, prev, term) VALUES ($1, 0, $2, $3)
                 ON CONFLICT (log) DO UPDATE SET term = EXCLUDED.term",
                &[&&*self.log, &[0_u8; 32].as_slice(), &term],
            )
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(Ok(term))
    }

    fn note_renewal(&self, asked: Duration) {
        let ms = u64::try_from(asked.as_millis()).unwrap_or(u64::MAX);
        self.renewed_ms.store(ms, Ordering::Relaxed);
    }

    /// Why another aggregator may have taken over by now, without this one knowing.
    pub(crate) fn doubt(&self) -> Option<String> {
        let renewed = Duration::from_millis(self.renewed_ms.load(Ordering::Relaxed));
        let since = self.begun.elapsed().saturating_sub(renewed);
        (self.term > 0 && since > DOUBT).then(|| {
            format!(
                "the lease of the log in the database could not be renewed for {} s; another aggregator may have it",
                since.as_secs()
            )
        })
    }

    async fn renew(self) {
        let seconds = LEASE.as_secs().to_string();
        loop {
            tokio::time::sleep(RENEW).await;
            // The lease counts from the moment at which it was asked for, at the earliest.
            let asked = self.begun.elapsed();
            let renewed = async {
                let connection = self.get().await?;
                let renewed = connection
                    .execute(
                        "UPDATE lease SET expires = now() + ($3 || ' seconds')::interval
                         WHERE log = $1 AND term = $2",
                        &[&&*self.log, &self.term, &seconds],
                    )
                    .await?;
                Ok::<_, WriteError>(renewed)
            };
            let late = |_| Err(WriteError::Unknown("it does not answer".to_owned()));
            match tokio::time::timeout(RENEW, renewed).await.unwrap_or_else(late) {
                Ok(0) => step_down(&self.log),
                Ok(_) => self.note_renewal(asked),
                Err(error) => tracing::warn!(?error, "cannot renew the lease of the log"),
            }
        }
    }

    /// Waits, on whatever thread this is, for something that the runtime does.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::task::block_in_place(|| self.runtime.block_on(work))
    }

    /// Writes until it is known that it is written, or refused. `work` must be such that doing it again is harmless.
    pub(crate) fn write<T, F>(
        &self,
        mut work: impl FnMut() -> F,
        mut waiting: impl FnMut(&str),
    ) -> io::Result<T>
    where
        F: Future<Output = Result<T, WriteError>>,
    {
        self.wait(async {
            let mut in_doubt = false;
            loop {
                let done = tokio::time::timeout(PATIENCE, work()).await;
                let late = |_| Err(WriteError::Unknown("it does not answer".to_owned()));
                match done.unwrap_or_else(late) {
                    Ok(done) => return Ok(done),
                    // An earlier try may have been committed all the same.
                    Err(WriteError::Refused(error)) if !in_doubt => return Err(error),
                    Err(WriteError::Refused(error)) => {
                        waiting(&error.to_string());
                        tokio::time::sleep(AGAIN).await;
                    }
                    Err(WriteError::Unknown(problem)) => {
                        in_doubt = true;
                        waiting(&problem);
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        })
    }
}

/// Ends the process: another one has taken the log over.
#[allow(
    clippy::exit,
    reason = "what this process would write next is not its to write"
)]
pub(crate) fn step_down(log: &str) -> ! {
    tracing::error!(
        log,
        "another aggregator has taken over the log; exiting, so that nothing is written twice"
    );
    std::process::exit(1);
}

fn is_local(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }
        Host::Unix(_) => true,
    }
}

/// TLS that trusts these roots.
fn trusting(roots: Option<&Path>) -> Result<rustls::ClientConfig, DatabaseError> {
    let mut store = rustls::RootCertStore::empty();
    match roots {
        Some(path) => {
            let wrong =
                |problem: String| DatabaseError::Usage(format!("--tls-ca {}: {problem}", path.display()));
            let certificates =
                CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                store.add(certificate).map_err(|error| wrong(error.to_string()))?;
            }
            if store.is_empty() {
                return Err(wrong("has no certificate in PEM form".to_owned()));
            }
        }
        None => {
            // What cannot be read is missed when it is needed, with an error that says so.
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| DatabaseError::Failed(error.to_string()))?;
    Ok(config.with_root_certificates(store).with_no_client_auth())
}

/// Where `problem` stands, in errors that name a file.
pub(crate) fn table(name: &str) -> PathBuf {
    PathBuf::from(format!("table {name}"))
}
