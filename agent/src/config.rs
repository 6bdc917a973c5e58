//! Flags and environment, read and checked whole before anything is opened.

mod values;

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use coalmine_proto::{
    names::{Arm, check_name},
    rule,
};

use crate::pool::{CustomMetric, ScrapeUrl};
use crate::tenant::Rule;
use crate::window::Build;
pub use values::Target;
use values::{address, aggregator, bytes, duration};

/// What `--version` without a value stands for.
const PRINT_VERSION: &str = "\0print";

/// What a request meets here, in short; docs/agent.md has it whole.
const WHAT_IT_DOES: &str = "\
What it does to a request:
  Every byte is passed on unchanged, in order, as it comes, in both directions, whatever the protocol is.
  Nothing is added, removed, rewritten, answered or sent twice; a reset or close of one side becomes one of
  the other. Each client connection has its own connection to the application. TLS is not terminated.
  --proxy-protocol is the one exception: it puts a header before the client's first byte.

  Beside the relay the heads of HTTP/1 and HTTP/2 messages are read, to find the tenant, the status and the
  end of each request. What cannot be read for certain stays opaque: it is passed on and not counted.
  An HTTP/1 connection that the application closes between two requests is opened again for the client.

What leaves the pod:
  Counts for each tenant and window, and what the pod and its connection pool use. No path, header or body,
  and no client's address. Without the aggregator, requests go on and windows wait in --ring.
  The token of --token-file goes to --aggregator with each connection, in clear text like the rest.

What it may take:
  --max-connections, --max-tenants and --ring bound it; SIGTERM lets requests end for as long as --drain.";

/// The sidecar of Coalmine: relays the bytes of your application unchanged, observes how each request
/// ends, and streams counts per tenant to the aggregator.
#[derive(Debug, Parser)]
#[command(name = "coalmine-agent", disable_version_flag = true, after_long_help = WHAT_IT_DOES)]
struct Flags {
    /// Address on which clients are accepted, unless a supervisor hands a socket over (LISTEN_FDS)
    #[arg(long, value_name = "ADDRESS", env = "COALMINE_AGENT_LISTEN", default_value = "0.0.0.0:15080", value_parser = address)]
    listen: SocketAddr,

    /// Address of the application; a name is looked up for each connection
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "COALMINE_AGENT_UPSTREAM",
        default_value = "127.0.0.1:8080"
    )]
    upstream: Target,

    /// Address of /livez, /readyz and /metrics, unless a supervisor hands a socket over
    #[arg(long, value_name = "ADDRESS", env = "COALMINE_AGENT_ADMIN", default_value = "127.0.0.1:15090", value_parser = address)]
    admin: SocketAddr,

    /// Where windows are sent, in clear text, as in http://coalmine-aggregator:7443
    #[arg(long, value_name = "URL", env = "COALMINE_AGENT_AGGREGATOR", value_parser = aggregator)]
    aggregator: Option<String>,

    /// Name of the service that is measured
    #[arg(long, value_name = "NAME", env = "COALMINE_AGENT_SERVICE", value_parser = name)]
    service: Option<String>,

    /// Version of the service that is measured; without a value, print the agent's own version
    #[arg(long, value_name = "V", env = "COALMINE_AGENT_VERSION", num_args = 0..=1,
          default_missing_value = PRINT_VERSION, value_parser = name_or_print)]
    version: Option<String>,

    /// Whether this pod has the new version (canary) or the one that users have today (baseline)
    #[arg(long, value_name = "canary|baseline", env = "COALMINE_AGENT_ARM")]
    arm: Option<Arm>,

    /// Labels of this pod, as a volume of the downward API has them; looked at each second. The labels
    /// coalmine.dev/arm and that of --version-label take the place of --arm and --version, which hold at the
    /// start and wherever a label is missing or no name
    #[arg(long, value_name = "FILE", env = "COALMINE_AGENT_LABELS_FILE")]
    labels_file: Option<PathBuf>,

    /// Label that names the version; without a value, none does
    #[arg(
        long,
        value_name = "LABEL",
        env = "COALMINE_AGENT_VERSION_LABEL",
        default_value = "app.kubernetes.io/version"
    )]
    version_label: String,

    /// Token that is shown to the aggregator, such as one of a projected service account; read again for each
    /// connection
    #[arg(long, value_name = "FILE", env = "COALMINE_AGENT_TOKEN_FILE")]
    token_file: Option<PathBuf>,

    /// Identity of this agent that survives a restart [default: $POD_UID, or HOSTNAME:PORT of --listen]
    #[arg(long, value_name = "NAME", env = "COALMINE_AGENT_INSTANCE", value_parser = name)]
    instance: Option<String>,

    /// Where a request's tenant stands: header:NAME, host:{tenant}.example.com, path:/t/{tenant}/,
    /// query:NAME, jwt:CLAIM or jwt:CLAIM@HEADER (decoded, not verified) or fixed:NAME, then |lower,
    /// |regex=PATTERN or |lower|regex=PATTERN; the first that applies decides, and tenant_rules of the
    /// policy take the place of all (repeatable, or separated by white space)
    #[arg(long, value_name = "RULE", env = "COALMINE_AGENT_TENANT")]
    tenant: Vec<String>,

    /// Length of a window, from 10ms to 60s
    #[arg(long, value_name = "DURATION", env = "COALMINE_AGENT_WINDOW", default_value = "1s", value_parser = window)]
    window: Duration,

    /// Memory for windows that the aggregator does not have on disk; beyond it they are merged, then dropped
    #[arg(long, value_name = "BYTES", env = "COALMINE_AGENT_RING", default_value = "8MiB", value_parser = bytes)]
    ring: usize,

    /// Most tenants that are told apart at a time, but for those that the policy lists; the rest is counted
    /// as __overflow__
    #[arg(long, value_name = "N", env = "COALMINE_AGENT_MAX_TENANTS", default_value_t = 20_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tenants: u32,

    /// Most client connections at a time, lowered to what the limit of open files allows; further ones wait
    /// to be accepted
    #[arg(long, value_name = "N", env = "COALMINE_AGENT_MAX_CONNECTIONS", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: u32,

    /// Longest wait for a connection to the application, after which the client is reset
    #[arg(long, value_name = "DURATION", env = "COALMINE_AGENT_CONNECT_TIMEOUT", default_value = "5s", value_parser = duration)]
    connect_timeout: Duration,

    /// A connection on which no byte was passed on for so long is ended; 0s for never
    #[arg(long, value_name = "DURATION", env = "COALMINE_AGENT_IDLE_TIMEOUT", default_value = "1h", value_parser = duration)]
    idle_timeout: Duration,

    /// Tell the application the client's address, with a PROXY protocol header of version 2 at the beginning
    /// of each connection; the application must expect it
    #[arg(long, env = "COALMINE_AGENT_PROXY_PROTOCOL")]
    proxy_protocol: bool,

    /// Port of the application's database, whose connections are counted in the pod's network; 0 for none
    #[arg(
        long,
        value_name = "PORT",
        env = "COALMINE_AGENT_POOL_PORT",
        default_value_t = 5432
    )]
    pool_port: u16,

    /// Where the application exposes the metrics of its connection pool, over plain HTTP, as in
    /// http://127.0.0.1:9100/metrics; asked once a window, at most once a second
    #[arg(long, value_name = "URL", env = "COALMINE_AGENT_POOL_SCRAPE")]
    pool_scrape: Option<ScrapeUrl>,

    /// A metric of the pool that is not known by its name, as in waits=my_pool_waits or
    /// used=my_pool{state=busy}; roles are used, idle, open, max, waiters, acquires, waits, timeouts,
    /// wait_seconds, wait_millis, wait_nanos and acquire_bucket (repeatable, or separated by commas)
    #[arg(
        long,
        value_name = "ROLE=NAME",
        env = "COALMINE_AGENT_POOL_METRIC",
        value_delimiter = ','
    )]
    pool_metric: Vec<CustomMetric>,

    /// Longest wait, after SIGTERM or SIGINT, for requests to end; then all connections are closed
    #[arg(long, value_name = "DURATION", env = "COALMINE_AGENT_DRAIN", default_value = "20s", value_parser = duration)]
    drain: Duration,

    /// Format of the log on standard error; RUST_LOG sets what is logged
    #[arg(
        long,
        value_name = "text|json",
        env = "COALMINE_AGENT_LOG",
        default_value = "text"
    )]
    log: LogFormat,

    /// Print the agent's own version
    #[arg(short = 'V', long = "agent-version")]
    agent_version: bool,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Everything that an agent is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Address on which clients are accepted.
    pub listen: SocketAddr,
    /// Address of the application.
    pub upstream: Target,
    /// Address of the admin server.
    pub admin: SocketAddr,
    /// URL of the aggregator.
    pub aggregator: String,
    /// The measured service.
    pub service: String,
    /// Its version, where no label says another.
    pub version: String,
    /// Its arm, where no label says another.
    pub arm: Arm,
    /// Where the pod's labels stand.
    pub labels_file: Option<PathBuf>,
    /// The label that names the version, if one does.
    pub version_label: Option<String>,
    /// Where the token for the aggregator stands.
    pub token_file: Option<PathBuf>,
    /// Identity of the agent.
    pub instance: String,
    /// Rules that find tenants.
    pub tenant: Vec<Rule>,
    /// Length of a window.
    pub window: Duration,
    /// Limit of the ring.
    pub ring_bytes: usize,
    /// Limit of distinct tenants.
    pub max_tenants: usize,
    /// Limit of client connections.
    pub max_connections: usize,
    /// Longest wait for a connection to the application.
    pub connect_timeout: Duration,
    /// How long a connection may be silent; zero for ever.
    pub idle_timeout: Duration,
    /// Whether the application is told the client's address.
    pub proxy_protocol: bool,
    /// Port of the application's database; 0 for none.
    pub pool_port: u16,
    /// Where the application's pool is scraped.
    pub pool_scrape: Option<ScrapeUrl>,
    /// Metrics of the pool by names of the user's own.
    pub pool_metrics: Vec<CustomMetric>,
    /// Longest wait for requests to end when stopping.
    pub drain: Duration,
    /// Format of the log.
    pub log: LogFormat,
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Run with this configuration.
    Run(Box<Config>),
    /// Print this text and exit.
    Print(String),
}

/// Why the configuration is refused: one line that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}; see coalmine-agent --help")]
pub struct UsageError(String);

impl Command {
    /// Reads the process' arguments (the first is the program) and environment.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let flags = Flags::command().try_get_matches_from(args);
        let flags = match flags.and_then(|matches| Flags::from_arg_matches(&matches)) {
            Ok(flags) => flags,
            Err(error) if error.kind() == clap::error::ErrorKind::DisplayHelp => {
                return Ok(Self::Print(error.to_string()));
            }
            Err(error) => return Err(UsageError(first_line(&error.to_string()))),
        };
        if flags.agent_version || flags.version.as_deref() == Some(PRINT_VERSION) {
            let version = env!("CARGO_PKG_VERSION");
            return Ok(Self::Print(format!("coalmine-agent {version}\n")));
        }
        Config::from_flags(flags).map(|config| Self::Run(Box::new(config)))
    }
}

impl Config {
    /// What the agent is started to measure.
    pub(crate) fn build(&self) -> Build {
        Build {
            arm: self.arm,
            version: self.version.clone(),
        }
    }

    fn from_flags(flags: Flags) -> Result<Self, UsageError> {
        let instance = match flags.instance {
            Some(instance) => instance,
            None => default_instance(flags.listen)?,
        };
        let tenant = rule::parse_list(flags.tenant.iter().map(String::as_str))
            .map_err(|why| UsageError(format!("--tenant: {why}")))?;
        if flags.listen == flags.admin && flags.listen.port() != 0 {
            let text = format!("--listen and --admin are both {}", flags.listen);
            return Err(UsageError(text));
        }
        if flags.upstream.is(flags.listen) {
            let text = format!("--upstream is {}, the agent's own --listen", flags.listen);
            return Err(UsageError(text));
        }
        Ok(Self {
            listen: flags.listen,
            upstream: flags.upstream,
            admin: flags.admin,
            aggregator: required(flags.aggregator, "aggregator", "http://HOST:7443")?,
            service: required(flags.service, "service", "the service's name")?,
            version: required(flags.version, "version", "the version of the service")?,
            arm: required(flags.arm, "arm", "canary or baseline")?,
            labels_file: flags.labels_file,
            version_label: Some(flags.version_label).filter(|label| !label.is_empty()),
            token_file: flags.token_file,
            instance,
            tenant,
            window: flags.window,
            ring_bytes: flags.ring,
            max_tenants: flags.max_tenants as usize,
            max_connections: flags.max_connections as usize,
            connect_timeout: flags.connect_timeout,
            idle_timeout: flags.idle_timeout,
            proxy_protocol: flags.proxy_protocol,
            pool_port: flags.pool_port,
            pool_scrape: flags.pool_scrape,
            pool_metrics: flags.pool_metric,
            drain: flags.drain,
            log: flags.log,
        })
    }
}

fn required<T>(value: Option<T>, flag: &str, what: &str) -> Result<T, UsageError> {
    let variable = flag.to_ascii_uppercase();
    value.ok_or_else(|| {
        UsageError(format!(
            "--{flag} is missing: give {what}, or set COALMINE_AGENT_{variable}"
        ))
    })
}

/// An identity that is the same after a restart of the process in the same place.
fn default_instance(listen: SocketAddr) -> Result<String, UsageError> {
    let given = std::env::var("POD_UID").ok().filter(|uid| !uid.is_empty());
    let instance = given.unwrap_or_else(|| format!("{}:{}", hostname(), listen.port()));
    match check_name(instance.as_bytes()) {
        Ok(_) => Ok(instance),
        Err(why) => Err(UsageError(format!(
            "the default --instance {instance:?} {why}; give another"
        ))),
    }
}

fn hostname() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = kernel.or_else(|| std::env::var("HOSTNAME").ok());
    let name = name.map(|name| name.trim().to_owned());
    name.filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

fn name(text: &str) -> Result<String, String> {
    match check_name(text.as_bytes()) {
        Ok(name) => Ok(name.to_owned()),
        Err(why) => Err(why.to_string()),
    }
}

fn name_or_print(text: &str) -> Result<String, String> {
    if text == PRINT_VERSION {
        Ok(text.to_owned())
    } else {
        name(text)
    }
}

fn window(text: &str) -> Result<Duration, String> {
    let window = duration(text)?;
    let ms = window.as_millis();
    if !(10..=60_000).contains(&ms) || window.subsec_nanos() % 1_000_000 != 0 {
        return Err("a window has 10ms to 60s".to_owned());
    }
    Ok(window)
}

/// Clap's errors have several lines; the first says what is wrong.
fn first_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    text.lines().next().unwrap_or(text).trim().to_owned()
}

#[cfg(test)]
mod tests;
