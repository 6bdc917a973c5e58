//! The aggregator as a process: settings, restoring, listening, stopping.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::Router;
use clap::{Args, Parser, Subcommand};
use coalmine_judge::{history::History, note, policy::Policy, record::Record};
use coalmine_proto::v1::telemetry_server::TelemetryServer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpSocket},
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
};
use tokio_stream::wrappers::TcpListenerStream;

use crate::{
    access::{self, Access},
    book::{Book, Patience, Roster, locked},
    clock, connections,
    database::{self, DatabaseError},
    disk,
    effects::{self, Effects},
    faces::{self, Faces},
    ingest::{Ingest, MAX_MESSAGE_BYTES, Rebuild},
    kubernetes::{self, Cluster},
    ledger::{self, Ledger},
    metrics::Metrics,
    rollouts::{self, Histories, Logbook, Rollouts},
    store::{self, Store},
    witness::Witness,
};

/// How often slots that nobody waits for are let go, and windows rolled up if they have grown.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// Connections that wait to be accepted, at most.
pub(crate) const BACKLOG: u32 = 1_024;

/// How long open requests may take after a signal to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// HTTP/2 windows of an agent's stream and connection: large enough that a batch never waits for an update.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// The command line of `coalmine-aggregator`.
#[derive(Debug, Parser)]
#[command(
    name = "coalmine-aggregator",
    version,
    about = "Judges canary rollouts for every tenant, and proves it"
)]
pub struct Command {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// What the aggregator can do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Take windows from agents, judge rollouts, answer deploy tools
    Serve(Box<Settings>),
    /// Create the schema in a PostgreSQL database, or bring it up to date
    Migrate(Database),
    /// Give the decision log a new key; the aggregator must not be running
    RotateKey {
        /// Directory of the decision log
        #[arg(long, env = "COALMINE_DATA", value_name = "DIR")]
        data: PathBuf,
        /// Why; it is part of the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Open a new decision log that names the old one, when that one cannot go on; the aggregator must not be running
    NewLog {
        /// Directory of the decision log
        #[arg(long, env = "COALMINE_DATA", value_name = "DIR")]
        data: PathBuf,
        /// Name of the new log
        #[arg(long, value_name = "NAME", value_parser = log_name)]
        log_name: String,
        /// Why; it is part of the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// A PostgreSQL database.
#[derive(Debug, Clone, Args)]
pub struct Database {
    /// Address of the database, as postgres://USER@HOST/DATABASE
    #[arg(long, env = "COALMINE_POSTGRES", value_name = "URL", hide_env_values = true)]
    pub postgres: String,
    /// Certificates to trust, in PEM; by default those of the system
    #[arg(long, env = "COALMINE_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Reads the name of a log, which is a name in a signature too.
fn log_name(name: &str) -> Result<String, String> {
    coalmine_proto::names::check_name(name.as_bytes()).map_err(|error| error.to_string())?;
    if note::is_name(name) {
        return Ok(name.to_owned());
    }
    Err("has a space or a plus sign, which a signature's name cannot have".to_owned())
}

/// Settings of `serve`.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Directory of the decision log, the evidence and the windows
    #[arg(long, env = "COALMINE_DATA", value_name = "DIR")]
    pub data: PathBuf,
    /// SLA baseline of a service; repeat it for several services
    #[arg(
        long,
        env = "COALMINE_POLICY",
        value_name = "FILE",
        required = true,
        value_delimiter = ','
    )]
    pub policy: Vec<PathBuf>,
    /// History of a service, as `coalmine policy learn` writes it; repeat it for several services
    #[arg(long, env = "COALMINE_HISTORY", value_name = "FILE", value_delimiter = ',')]
    pub history: Vec<PathBuf>,
    /// Where agents connect (gRPC)
    #[arg(
        long,
        env = "COALMINE_LISTEN_GRPC",
        default_value = "127.0.0.1:7443",
        value_name = "ADDRESS"
    )]
    pub listen_grpc: SocketAddr,
    /// Where tools and people ask (HTTP)
    #[arg(
        long,
        env = "COALMINE_LISTEN_HTTP",
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS"
    )]
    pub listen_http: SocketAddr,
    /// Health and metrics (HTTP)
    #[arg(
        long,
        env = "COALMINE_LISTEN_ADMIN",
        default_value = "127.0.0.1:9090",
        value_name = "ADDRESS"
    )]
    pub listen_admin: SocketAddr,
    /// Name of the decision log; it is part of every record and cannot change later
    #[arg(
        long,
        env = "COALMINE_LOG_NAME",
        default_value = "coalmine/default",
        value_name = "NAME",
        value_parser = log_name
    )]
    pub log_name: String,
    /// Size in bytes at which a file of the decision log is sealed and another begun
    #[arg(long, env = "COALMINE_SEGMENT_BYTES", default_value_t = 64 << 20, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(4_096..))]
    pub segment_bytes: u64,
    /// Seconds after which the decision log records that it is alive, when there is nothing else to record
    #[arg(long, env = "COALMINE_HEARTBEAT_SECONDS", default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub heartbeat_seconds: u64,
    /// Size in bytes at which the stored windows are rolled up
    #[arg(long, env = "COALMINE_WINDOWS_BYTES", default_value_t = 64 << 20, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(65_536..))]
    pub windows_bytes: u64,
    /// Keep a copy of each checkpoint here, best on another volume, and hold the log against it at the start
    #[arg(long, env = "COALMINE_CHECKPOINT_COPY", value_name = "FILE")]
    pub checkpoint_copy: Option<PathBuf>,
    /// A witness that signs each checkpoint, as "URL KEY"; repeat it for several
    #[arg(long, env = "COALMINE_WITNESS", value_name = "URL KEY", value_delimiter = ',')]
    pub witness: Vec<Witness>,
    /// Keep decisions, evidence and windows in this PostgreSQL database, as postgres://USER@HOST/DATABASE; the data
    /// directory then has the key
    #[arg(long, env = "COALMINE_POSTGRES", value_name = "URL", hide_env_values = true)]
    pub postgres: Option<String>,
    /// Certificates to trust when connecting to PostgreSQL, in PEM; by default those of the system
    #[arg(long, env = "COALMINE_TLS_CA", value_name = "FILE", requires = "postgres")]
    pub tls_ca: Option<PathBuf>,
    /// Name of this aggregator among those that share a database; the same name takes the lease over at once [default: the host's name]
    #[arg(long, env = "COALMINE_INSTANCE", value_name = "NAME")]
    pub instance: Option<String>,
    /// Seconds after a window's end that its agents may still report
    #[arg(long, env = "COALMINE_GRACE_SECONDS", default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub grace_seconds: u64,
    /// Seconds without a sign after which an agent is no longer expected
    #[arg(long, env = "COALMINE_FORGET_SECONDS", default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub forget_seconds: u64,
    /// Who may ask
    #[command(flatten)]
    pub access: access::Settings,
    /// What is asked of a cluster
    #[command(flatten)]
    pub kubernetes: kubernetes::Settings,
    /// What verdicts do outside
    #[command(flatten)]
    pub effects: effects::Settings,
    /// Form of the log lines
    #[arg(long, env = "COALMINE_LOG", default_value = "text", value_name = "FORM")]
    pub log: LogForm,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogForm {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Why the aggregator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The machine refuses.
    #[error("{0}")]
    Failed(String),
}

/// Listening sockets, made before anything else is touched.
#[derive(Debug)]
pub struct Listeners {
    grpc: Port,
    http: Port,
    admin: TcpListener,
    /// Not listening: whoever connects is refused until there is an answer.
    webhook: Option<TcpSocket>,
}

/// A port that is ours.
#[derive(Debug)]
enum Port {
    /// Whoever connects while the log is being read waits for the answer.
    Open(TcpListener),
    /// Whoever connects is refused: another aggregator may have the log for as long as it lives, and this one no answer.
    Shut(TcpSocket),
}

impl Port {
    fn open(self) -> io::Result<TcpListener> {
        match self {
            Self::Open(listener) => Ok(listener),
            Self::Shut(socket) => socket.listen(BACKLOG),
        }
    }
}

impl Listeners {
    /// Binds all.
    pub async fn bind(settings: &Settings) -> Result<Self, StartError> {
        let may_stand_by = settings.postgres.is_some();
        let webhook = match settings.kubernetes.listen_webhook {
            Some(address) => {
                Some(reserve(address).map_err(|error| refused("--listen-webhook", address, &error))?)
            }
            None => None,
        };
        Ok(Self {
            webhook,
            grpc: port("--listen-grpc", settings.listen_grpc, may_stand_by).await?,
            http: port("--listen-http", settings.listen_http, may_stand_by).await?,
            admin: bind("--listen-admin", settings.listen_admin).await?,
        })
    }
}

async fn port(flag: &str, address: SocketAddr, is_shut: bool) -> Result<Port, StartError> {
    if is_shut {
        let socket = reserve(address).map_err(|error| refused(flag, address, &error))?;
        return Ok(Port::Shut(socket));
    }
    Ok(Port::Open(bind(flag, address).await?))
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, StartError> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| refused(flag, address, &error))
}

/// Takes the port without listening.
fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn refused(flag: &str, address: SocketAddr, error: &io::Error) -> StartError {
    let cause = match error.kind() {
        io::ErrorKind::AddrInUse => "the port is in use".to_owned(),
        _ => error.to_string(),
    };
    StartError::Failed(format!(
        "cannot listen on {address}: {cause}; stop the other process or choose another {flag}"
    ))
}

/// Reads a policy, with the file's name in the error.
pub fn read_policy(path: &Path) -> Result<Policy, String> {
    let source = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read the policy {}: {error}", path.display()))?;
    Policy::parse(&source).map_err(|error| {
        format!(
            "{}:{}:{}: {}",
            path.display(),
            error.line,
            error.column,
            error.message
        )
    })
}

/// Reads a history digest, with the file's name in the error.
pub fn read_history(path: &Path) -> Result<History, String> {
    let source = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read the history {}: {error}", path.display()))?;
    History::parse(&source).map_err(|error| format!("{}: {error}", path.display()))
}

fn read_histories(paths: &[PathBuf], policies: &BTreeMap<String, Policy>) -> Result<Histories, StartError> {
    let mut histories = Histories::new();
    for path in paths {
        let history = read_history(path).map_err(StartError::Usage)?;
        let service = history.service.clone();
        let refuse = |problem: String| Err(StartError::Usage(format!("{}: {problem}", path.display())));
        let Some(policy) = policies.get(&service) else {
            let known: Vec<_> = policies.keys().map(String::as_str).collect();
            return refuse(format!(
                "it is the history of service {service}, which has no policy (there is one for: {})",
                known.join(", ")
            ));
        };
        if !policy.follows_history() {
            tracing::warn!(
                service,
                "its history changes nothing: adjust.from_history is not true in its policy"
            );
        }
        if histories.insert(service.clone(), Arc::new(history)).is_some() {
            return refuse(format!(
                "service {service} has a history in another file too; give each service one"
            ));
        }
    }
    Ok(histories)
}

fn read_policies(paths: &[PathBuf]) -> Result<BTreeMap<String, Policy>, StartError> {
    let mut policies = BTreeMap::new();
    for path in paths {
        let policy = read_policy(path).map_err(StartError::Usage)?;
        let service = policy.service.clone();
        if policies.insert(service.clone(), policy).is_some() {
            return Err(StartError::Usage(format!(
                "{}: service {service} has a policy in another file too; give each service one",
                path.display()
            )));
        }
    }
    Ok(policies)
}

/// Runs until `stop` resolves, which it may while the start is still under way. Tools and people are answered on a
/// runtime of its own, so that nobody waits behind ten thousand tenants that are counted or judged.
pub async fn serve(
    settings: Settings,
    answering: Handle,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    tokio::pin!(stop);
    let started = tokio::select! {
        started = start(&settings) => started?,
        () = &mut stop => {
            tracing::info!("stopping before it was ready");
            return Ok(());
        }
    };
    serve_until(started, settings.kubernetes, answering, stop).await
}

/// All that is ready before anybody is answered.
struct Started {
    _lock: File,
    listeners: Listeners,
    faces: Faces,
    drain: watch::Sender<bool>,
    cluster: Option<Cluster>,
}

/// Opens and recovers what is kept; nobody is answered yet.
async fn start(settings: &Settings) -> Result<Started, StartError> {
    let policies = read_policies(&settings.policy)?;
    let histories = read_histories(&settings.history, &policies)?;
    settings.kubernetes.check().map_err(StartError::Usage)?;
    let hook = settings.effects.webhook().map_err(StartError::Usage)?;
    let halts = !settings.effects.halt.is_empty();
    let cluster = settings
        .kubernetes
        .connect(halts)
        .await
        .map_err(StartError::Usage)?;
    let identity = settings.kubernetes.identity(cluster.as_ref());
    let identity = identity.map_err(StartError::Usage)?;
    raise_open_files();
    let access = Access::open(&settings.access).map_err(StartError::Usage)?;
    tokio::spawn(Arc::clone(&access).follow());
    let listeners = Listeners::bind(settings).await?;
    let failed = |error: &dyn std::fmt::Display| StartError::Failed(error.to_string());
    disk::create_dir(&settings.data).map_err(|error| failed(&error))?;
    let lock = disk::lock(&settings.data).map_err(|error| failed(&error))?;
    for (address, asks) in [
        (settings.listen_grpc, identity.is_some()),
        (
            settings.listen_http,
            settings.access.tokens.is_some() || settings.access.anonymous.is_empty(),
        ),
        (settings.listen_admin, false),
    ] {
        if !address.ip().is_loopback() && !asks {
            tracing::warn!(%address, "listening beyond this machine, and nobody is asked who they are");
        }
    }

    let metrics = Arc::new(Metrics::new());
    let database = match &settings.postgres {
        Some(url) => Some(open_database(settings, url).await?),
        None => None,
    };
    let options = ledger::Options {
        name: settings.log_name.clone(),
        segment_bytes: settings.segment_bytes,
        heartbeat: Duration::from_secs(settings.heartbeat_seconds),
        checkpoint_copy: settings.checkpoint_copy.clone(),
        follows: None,
    };
    let mut logbook = Logbook::default();
    let each = |record: &Record, hash| logbook.take(record, hash);
    let opened = match &database {
        Some(database) => {
            Ledger::open_postgres(&settings.data, database, options, Arc::clone(&metrics), each).await
        }
        None => Ledger::open(&settings.data, options, Arc::clone(&metrics), each),
    };
    let opened = opened.map_err(|error| failed(&error))?;
    opened.ledger.consult(&settings.witness).await;
    opened.ledger.follow(settings.witness.clone());
    opened.ledger.begin();
    let patience = Patience {
        grace_ms: settings.grace_seconds * 1_000,
        forget_ms: settings.forget_seconds * 1_000,
        ..Patience::default()
    };
    let started_ms = clock::now_ms();
    // Only agents that were there before a restart need time to come back.
    let patience = if opened.records > 1 {
        patience
    } else {
        Patience {
            return_ms: 0,
            ..patience
        }
    };
    let mut book = Book::new(patience, started_ms);
    for (service, policy) in &policies {
        book.set_slot(service, policy.window_ms());
        book.keep_places(service, policy.tenants.keys().cloned());
    }
    // Windows that were judged already are counted again, and need no place.
    let waiting = logbook.waiting();
    book.keep_only(started_ms, &waiting);
    let (book, store) = match database {
        Some(database) => {
            let loaded = store::postgres::load(&database, &mut book).await;
            loaded.map_err(|error| failed(&error))?;
            book.keep_journal();
            book.judged(&waiting);
            let book = Arc::new(Mutex::new(book));
            let store = Store::postgres(database, Arc::clone(&book)).map_err(|error| failed(&error))?;
            (book, store)
        }
        None => {
            let mut rebuild = Rebuild::default();
            let store = Store::open(&settings.data, settings.windows_bytes, |entry| {
                rebuild.take(&mut book, entry, started_ms);
            });
            if rebuild.refused > 0 {
                tracing::error!(
                    entries = rebuild.refused,
                    "stored windows did not apply; their requests are missing"
                );
            }
            book.judged(&waiting);
            (Arc::new(Mutex::new(book)), store.map_err(|error| failed(&error))?)
        }
    };
    locked(&book).disconnect_all(started_ms);
    if settings.kubernetes.watch_pods {
        // Until the cluster has said which pods there are, nobody knows.
        locked(&book).enrol(Roster::unknown(), started_ms);
    }
    metrics.watch(Arc::clone(&book));

    let (drain, draining) = watch::channel(false);
    let configs = rollouts::configs(&policies, &histories);
    let ingest = Ingest::new(Arc::clone(&book), store, configs, Arc::clone(&metrics), draining);
    let ingest = ingest.with_identity(identity);
    let client = cluster.as_ref().map(|cluster| cluster.client.clone());
    let shared = rollouts::Shared {
        effects: Effects::new(
            settings.effects.halt.iter().copied().collect(),
            client,
            hook,
            opened.ledger.clone(),
            Arc::clone(&metrics),
        ),
        book,
        ledger: opened.ledger.clone(),
        metrics: Arc::clone(&metrics),
        news: Arc::clone(&ingest.news),
    };
    let rollouts = Rollouts::restore(policies, histories, shared, logbook);
    let faces = Faces {
        rollouts,
        ledger: opened.ledger,
        ingest,
        metrics,
        access,
        flagger: Arc::default(),
        stopping: drain.subscribe(),
    };
    tracing::info!(
        data = %settings.data.display(),
        records = opened.records,
        grpc = %settings.listen_grpc,
        http = %settings.listen_http,
        admin = %settings.listen_admin,
        "ready"
    );
    Ok(Started {
        _lock: lock,
        listeners,
        faces,
        drain,
        cluster,
    })
}

/// Raises the limit of open files as far as it may be raised: connections must not take those that the log needs.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

/// Connects to the database and takes the lease of the log.
async fn open_database(settings: &Settings, url: &str) -> Result<database::Database, StartError> {
    let database = database::Database::connect(url, settings.tls_ca.as_deref(), &settings.log_name).await?;
    database.check_schema().await?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let instance = settings.instance.as_ref().unwrap_or(&host);
    Ok(database.take_lease(instance).await?)
}

/// Creates the schema of a database, or brings it up to date.
pub async fn migrate(settings: &Database) -> Result<(), StartError> {
    let database = database::Database::connect(&settings.postgres, settings.tls_ca.as_deref(), "").await?;
    let applied = database.migrate().await?;
    tracing::info!(applied = applied.join(", "), "the schema is up to date");
    Ok(())
}

impl From<DatabaseError> for StartError {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::Usage(problem) => Self::Usage(problem),
            DatabaseError::Failed(_) => Self::Failed(error.to_string()),
        }
    }
}

/// Answers until `stop` resolves, and does what a cluster is needed for beside it.
async fn serve_until(
    started: Started,
    settings: kubernetes::Settings,
    answering: Handle,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let Started {
        _lock,
        mut listeners,
        faces,
        drain,
        cluster,
    } = started;
    let webhook = listeners.webhook.take();
    let beside = kubernetes::run(
        settings,
        cluster,
        webhook,
        answering.clone(),
        faces.clone(),
        drain.subscribe(),
    );
    let mut beside = tokio::spawn(beside);
    let result = tokio::select! {
        result = listen(listeners, faces, drain, &answering, stop) => result,
        Err(error) = &mut beside => {
            return Err(StartError::Failed(format!("what a cluster is needed for has failed: {error}")));
        }
    };
    if !beside.is_finished() {
        // The webhook's last answers.
        drop(tokio::time::timeout(STOP_WITHIN, &mut beside).await);
    }
    beside.abort();
    result
}

async fn listen(
    listeners: Listeners,
    faces: Faces,
    drain: watch::Sender<bool>,
    answering: &Handle,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let stopping = || {
        let mut draining = drain.subscribe();
        async move {
            // An error means that the sender is gone: stop as well.
            drop(draining.wait_for(|draining| *draining).await);
        }
    };
    let failed = |error: io::Error| StartError::Failed(format!("cannot listen: {error}"));
    let grpc_port = listeners.grpc.open().map_err(failed)?;
    let answer = |listener: TcpListener, router: Router| -> io::Result<_> {
        // Whoever waits for connections has to be that runtime, too.
        let _entered = answering.enter();
        let listener = TcpListener::from_std(listener.into_std()?)?;
        let (metrics, access) = (Arc::clone(&faces.metrics), Arc::clone(&faces.access));
        Ok(answering.spawn(connections::api(
            listener,
            router,
            metrics,
            access,
            drain.subscribe(),
        )))
    };
    let http_port = listeners.http.open().map_err(failed)?;
    let http = answer(http_port, faces::api(faces.clone())).map_err(failed)?;
    let admin = answer(listeners.admin, faces::admin(faces.clone())).map_err(failed)?;
    let telemetry = TelemetryServer::new(faces.ingest.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let grpc = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(telemetry)
        .serve_with_incoming_shutdown(TcpListenerStream::new(grpc_port), stopping());
    let servers = async {
        let grpc = async { grpc.await.map_err(|error| StartError::Failed(error.to_string())) };
        let answered = async |face: JoinHandle<()>| {
            let failed = |error| StartError::Failed(format!("what answers has failed: {error}"));
            face.await.map_err(failed)
        };
        tokio::try_join!(grpc, answered(http), answered(admin)).map(|_| ())
    };
    tokio::pin!(servers, stop);
    let mut evict = tokio::time::interval(TIDY_EVERY);
    loop {
        tokio::select! {
            result = &mut servers => return result,
            () = &mut stop => break,
            _ = evict.tick() => {
                let waited_for = |service: &str| faces.rollouts.waited_for(service);
                let mut book = locked(&faces.ingest.book);
                book.evict(clock::now_ms(), waited_for);
                if faces.ingest.store.wants_roll_up() {
                    faces.ingest.store.roll_up(book.image());
                }
            }
        }
    }
    tracing::info!("stopping: agents keep their windows and come back");
    drain.send_replace(true);
    drop(tokio::time::timeout(STOP_WITHIN, servers).await);
    drop(tokio::time::timeout(STOP_WITHIN, faces.ledger.stop()).await);
    Ok(())
}

/// Resolves at SIGTERM or SIGINT, also one that comes before it is waited for. To be called within a runtime.
pub fn stop_signal() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async {
        match signals {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            // Without handlers the system ends the process, which the data directory survives.
            _ => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_needs_a_policy_of_its_service() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, service: &str| {
            let path = directory.path().join(name);
            let text = format!(
                r#"{{"v":1,"service":"{service}","rollouts":0,"windows":0,"first_ms":0,"last_ms":0,"sources":[],"arm_difference_tenants":0,"tenants":{{}}}}"#
            );
            std::fs::write(&path, text).unwrap();
            path
        };
        let policy = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
            defaults: { errors: { max_rate: 1% }, required: [errors] } }";
        let policies = BTreeMap::from([("checkout".to_owned(), Policy::parse(policy).unwrap())]);
        let (one, two, cart) = (
            file("one", "checkout"),
            file("two", "checkout"),
            file("cart", "cart"),
        );
        let read = |paths: &[PathBuf]| read_histories(paths, &policies).map(|histories| histories.len());
        assert_eq!(read(&[]).unwrap(), 0);
        assert_eq!(read(std::slice::from_ref(&one)).unwrap(), 1);
        for (paths, says) in [
            (vec![one.clone(), two], "a history in another file too"),
            (
                vec![cart],
                "service cart, which has no policy (there is one for: checkout)",
            ),
            (vec![one.with_extension("gone")], "cannot read the history"),
        ] {
            match read(&paths) {
                Err(StartError::Usage(problem)) => assert!(problem.contains(says), "{problem}"),
                other => panic!("{other:?}"),
            }
        }
    }
}
