//! The cluster: what is asked of it, and what is done there.
//!
//! Everything here is off unless it is asked for, and each part needs rights of its own (`deploy/components`):
//! `certificates` keeps the admission webhook's certificate, `pods` knows which pods there are, `automatic` begins and
//! ends the rollouts that follow them, `tokens` finds out whose token an agent presents. What a decision halts is in `effects`.

mod automatic;
mod certificates;
mod pods;
pub(crate) mod tokens;

use std::{
    collections::BTreeSet,
    fmt::Display,
    net::SocketAddr,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{net::TcpSocket, runtime::Handle, sync::watch};

use crate::{
    book::{Roster, locked},
    clock,
    faces::Faces,
    identity::{Identity, Tokens},
    ingest::drained,
    inject::{self, certificate::Certificate},
    metrics::Metrics,
    server::BACKLOG,
};
use automatic::Automatic;
use certificates::Names;
use tokens::Reviewer;

/// How long an answer of the API server is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How long after a failed question it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// How often it is looked whether a rollout has no canary pod any more.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// The minor version of Kubernetes from which on a Service finds a named port of a native sidecar.
const NATIVE_SIDECAR_MINOR: u32 = 33;

/// Whether the agent is a native sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NativeSidecar {
    /// Where the server is of 1.33 or later.
    Auto,
    /// Always.
    True,
    /// Never: an ordinary container.
    False,
}

/// What is asked of a cluster; nothing by default.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Kubernetes")]
#[group(id = "kubernetes")]
pub struct Settings {
    /// How the cluster is reached; without it as the variable KUBECONFIG says, or as a pod of the cluster
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where the API server asks for agents in pods (HTTPS, POST /inject)
    #[arg(long, env = "COALMINE_LISTEN_WEBHOOK", value_name = "ADDRESS", requires_all = ["agent_image", "agent_aggregator"])]
    pub listen_webhook: Option<SocketAddr>,
    /// The agent's image for pods that ask for one
    #[arg(
        long,
        env = "COALMINE_AGENT_IMAGE",
        value_name = "IMAGE",
        requires = "listen_webhook"
    )]
    pub agent_image: Option<String>,
    /// Where these agents send their windows, as in http://coalmine.coalmine:7443
    #[arg(
        long,
        env = "COALMINE_AGENT_AGGREGATOR",
        value_name = "URL",
        requires = "listen_webhook"
    )]
    pub agent_aggregator: Option<String>,
    /// A setting of pods that lack the annotation, as in tenant=header:x-tenant-id (repeatable)
    #[arg(long, value_name = "SETTING=VALUE", value_parser = inject::default_setting, requires = "listen_webhook")]
    pub agent_setting: Vec<(inject::Setting, String)>,
    /// Whether these agents are native sidecars, which a Service finds by a port's name from Kubernetes 1.33 on
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub native_sidecar: NativeSidecar,
    /// The webhook's certificate chain, in PEM, kept by somebody else; read again when it changes
    #[arg(long, value_name = "FILE", requires_all = ["webhook_key", "listen_webhook"], conflicts_with = "webhook_secret")]
    pub webhook_certificate: Option<PathBuf>,
    /// The key of that certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "webhook_certificate")]
    pub webhook_key: Option<PathBuf>,
    /// Keep the webhook's certificate in this Secret of the aggregator's namespace, which must exist, and renew it
    #[arg(long, value_name = "NAME", requires = "listen_webhook")]
    pub webhook_secret: Option<String>,
    /// The MutatingWebhookConfiguration that learns who signs that certificate
    #[arg(
        long,
        value_name = "NAME",
        default_value = "coalmine",
        requires = "webhook_secret"
    )]
    pub webhook_configuration: String,
    /// The Service by which the API server reaches the webhook
    #[arg(
        long,
        value_name = "NAME",
        default_value = "coalmine",
        requires = "webhook_secret"
    )]
    pub webhook_service: String,
    /// Another name or address for which the certificate is good (repeatable)
    #[arg(long, value_name = "NAME", requires = "webhook_secret")]
    pub webhook_name: Vec<String>,
    /// Ask which pods there are: a canary pod without an agent holds its rollout
    #[arg(long, env = "COALMINE_WATCH_PODS")]
    pub watch_pods: bool,
    /// Only in this namespace (repeatable)
    #[arg(long, value_name = "NAMESPACE", requires = "watch_pods")]
    pub watch_namespace: Vec<String>,
    /// Let only agents speak that present a token of their pod's service account for this audience
    #[arg(
        long,
        env = "COALMINE_AGENT_AUDIENCE",
        value_name = "AUDIENCE",
        conflicts_with = "agent_tokens"
    )]
    pub agent_audience: Option<String>,
    /// Let only pods of this namespace speak for a service, as in checkout=shop (repeatable)
    #[arg(long, value_name = "SERVICE=NAMESPACE", value_parser = service_namespace, requires = "agent_audience")]
    pub agent_namespace: Vec<(String, String)>,
    /// Let only agents speak that present a token whose SHA-256 is in this file, with its service or *
    #[arg(long, env = "COALMINE_AGENT_TOKENS", value_name = "FILE")]
    pub agent_tokens: Option<PathBuf>,
}

fn service_namespace(text: &str) -> Result<(String, String), String> {
    let parts = text
        .split_once('=')
        .filter(|(service, namespace)| !service.is_empty() && !namespace.is_empty());
    let (service, namespace) = parts.ok_or("give SERVICE=NAMESPACE, as in checkout=shop")?;
    Ok((service.to_owned(), namespace.to_owned()))
}

/// A cluster that can be asked.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// The namespace that we are in.
    pub(crate) namespace: String,
}

impl Settings {
    /// Whether a cluster has to be asked for anything.
    fn needs_cluster(&self) -> bool {
        let asks_version = self.listen_webhook.is_some() && self.native_sidecar == NativeSidecar::Auto;
        self.webhook_secret.is_some() || self.watch_pods || self.agent_audience.is_some() || asks_version
    }

    /// Checks what clap cannot.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.listen_webhook.is_some()
            && self.webhook_secret.is_none()
            && self.webhook_certificate.is_none()
        {
            return Err(
                "--listen-webhook needs a certificate: --webhook-secret, or --webhook-certificate with \
                 --webhook-key"
                    .to_owned(),
            );
        }
        if self.listen_webhook.is_some() && self.agent_tokens.is_some() {
            return Err(
                "pods that are injected have no token of --agent-tokens; use --agent-audience with --listen-webhook"
                    .to_owned(),
            );
        }
        let is_no_name = |name: &&String| rustls::pki_types::ServerName::try_from(name.as_str()).is_err();
        if let Some(name) = self.webhook_name.iter().find(is_no_name) {
            return Err(format!(
                "--webhook-name {name:?} is neither a DNS name nor an address"
            ));
        }
        let mut bound = BTreeSet::new();
        let mut namespaces = self.agent_namespace.iter();
        if let Some((service, _)) = namespaces.find(|(service, _)| !bound.insert(service)) {
            return Err(format!(
                "--agent-namespace names the service {service} twice; a service has one namespace"
            ));
        }
        self.injection(false).map_or(Ok(()), |settings| settings.check())
    }

    /// What the injector is told.
    fn injection(&self, native_sidecar: bool) -> Option<inject::Settings> {
        let (aggregator, image) = (self.agent_aggregator.clone()?, self.agent_image.clone()?);
        Some(inject::Settings {
            native_sidecar,
            audience: self.agent_audience.clone(),
            defaults: self.agent_setting.iter().cloned().collect(),
            ..inject::Settings::new(aggregator, image)
        })
    }

    /// How agents prove who they are; none if they need not.
    pub(crate) fn identity(&self, cluster: Option<&Cluster>) -> Result<Option<Arc<Identity>>, String> {
        let identity = match (&self.agent_tokens, &self.agent_audience, cluster) {
            (Some(path), ..) => Identity::Tokens(Tokens::read(path)?),
            (None, Some(audience), Some(cluster)) => {
                let reviewer = Reviewer::new(cluster.client.clone(), audience.clone());
                Identity::Cluster(reviewer, self.agent_namespace.iter().cloned().collect())
            }
            _ => return Ok(None),
        };
        Ok(Some(Arc::new(identity)))
    }

    /// The cluster, if one has to be asked.
    pub(crate) async fn connect(&self, halts: bool) -> Result<Option<Cluster>, String> {
        if !self.needs_cluster() && !halts {
            return Ok(None);
        }
        Cluster::connect(self.kubeconfig.as_deref()).await.map(Some)
    }
}

impl Cluster {
    async fn connect(kubeconfig: Option<&Path>) -> Result<Self, String> {
        let told = |error: &dyn Display| match kubeconfig {
            Some(path) => format!("cannot use the kubeconfig {}: {error}", path.display()),
            None => format!("cannot use the kubeconfig that KUBECONFIG names: {error}"),
        };
        let read = match kubeconfig {
            Some(path) => Kubeconfig::read_from(path).map(Some),
            None => Kubeconfig::from_env(),
        };
        let mut config = match read.map_err(|error| told(&error))? {
            Some(read) => {
                let options = KubeConfigOptions::default();
                let config = Config::from_custom_kubeconfig(read, &options).await;
                config.map_err(|error| told(&error))?
            }
            None => Config::incluster().map_err(|error| {
                format!(
                    "not in a pod of a cluster: {error}; give --kubeconfig, or leave out what asks a cluster"
                )
            })?,
        };
        // Who asks decides when to ask again.
        config.default_retry = false;
        let namespace = config.default_namespace.clone();
        let client =
            Client::try_from(config).map_err(|error| format!("cannot reach the cluster: {error}"))?;
        Ok(Self { client, namespace })
    }

    /// Whether the server has native sidecars that a Service finds by name; asked until it answers.
    async fn has_native_sidecars(&self) -> bool {
        loop {
            match tokio::time::timeout(ANSWER_WITHIN, self.client.apiserver_version()).await {
                Ok(Ok(version)) => {
                    let is_new = has_native_sidecars(&version.major, &version.minor);
                    tracing::info!(version = version.git_version, native_sidecars = is_new, "cluster");
                    return is_new;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the cluster does not say its version"),
                Err(_) => tracing::warn!("the cluster does not answer when asked its version"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// Whether a server of this version has native sidecars that a Service finds by name. Some add a sign to the minor one.
fn has_native_sidecars(major: &str, minor: &str) -> bool {
    let digits = minor
        .split(|character: char| !character.is_ascii_digit())
        .next()
        .unwrap_or_default();
    let is_new = digits
        .parse::<u32>()
        .is_ok_and(|minor| minor >= NATIVE_SIDECAR_MINOR);
    is_new || major != "1"
}

/// Does what a cluster is needed for, until the server stops. The webhook answers on `answering`.
pub(crate) async fn run(
    settings: Settings,
    cluster: Option<Cluster>,
    socket: Option<TcpSocket>,
    answering: Handle,
    faces: Faces,
    draining: watch::Receiver<bool>,
) {
    let pods = async {
        if let Some(cluster) = cluster.as_ref().filter(|_| settings.watch_pods) {
            tokio::select! {
                () = enrol(cluster, settings.watch_namespace.clone(), &faces, draining.clone()) => {}
                () = stopped(draining.clone()) => {}
            }
        }
    };
    let webhook = async {
        if let Some(socket) = socket {
            let metrics = Arc::clone(&faces.metrics);
            webhook(
                settings.clone(),
                cluster.clone(),
                socket,
                &answering,
                metrics,
                draining.clone(),
            )
            .await;
        }
    };
    tokio::join!(pods, webhook);
}

/// Tells the book which pods there are, and begins and ends rollouts that follow them. The book hears of pods also
/// while a rollout that shall begin waits for the log.
async fn enrol(cluster: &Cluster, namespaces: Vec<String>, faces: &Faces, draining: watch::Receiver<bool>) {
    let (publish, mut rosters) = watch::channel(Arc::new(pods::Roster::default()));
    let mut asked = rosters.clone();
    let enrolment = Enrolment(faces, draining);
    let told = async {
        while rosters.changed().await.is_ok() {
            let roster = rosters.borrow_and_update().for_book();
            enrolment.enrol(roster);
        }
    };
    let acted = async {
        let mut automatic = Automatic::new(faces.rollouts.clone());
        let mut look = tokio::time::interval(LOOK_AGAIN);
        loop {
            tokio::select! {
                changed = asked.changed() => if changed.is_err() { return },
                _ = look.tick() => {}
            }
            let roster = Arc::clone(&asked.borrow_and_update());
            automatic.follow(&roster).await;
        }
    };
    tokio::select! {
        () = pods::watch(cluster.client.clone(), namespaces, publish) => {}
        () = told => {}
        () = acted => {}
    }
}

/// Knows pods for as long as it lives; whatever ends it, nobody knows any after.
struct Enrolment<'f>(&'f Faces, watch::Receiver<bool>);

impl Enrolment<'_> {
    fn enrol(&self, roster: Roster) {
        locked(&self.0.ingest.book).enrol(roster, clock::now_ms());
        self.0.ingest.news.notify_waiters();
    }
}

impl Drop for Enrolment<'_> {
    fn drop(&mut self) {
        // What was known a moment ago is good enough for what is still judged while the server stops.
        if !*self.1.borrow() {
            self.enrol(Roster::unknown());
        }
    }
}

async fn stopped(mut draining: watch::Receiver<bool>) {
    drained(&mut draining).await;
}

/// Serves the webhook until the server stops. It listens only when it can answer: whoever is refused a connection asks
/// nobody else and waits for nothing.
async fn webhook(
    settings: Settings,
    cluster: Option<Cluster>,
    socket: TcpSocket,
    answering: &Handle,
    metrics: Arc<Metrics>,
    draining: watch::Receiver<bool>,
) {
    let native_sidecar = match (settings.native_sidecar, &cluster) {
        (NativeSidecar::Auto, Some(cluster)) => tokio::select! {
            has = cluster.has_native_sidecars() => has,
            () = stopped(draining.clone()) => return,
        },
        (when, _) => when == NativeSidecar::True,
    };
    let Some(injection) = settings.injection(native_sidecar) else {
        return;
    };
    let listener = {
        // Whoever waits for connections has to be that runtime, too.
        let _entered = answering.enter();
        socket.listen(BACKLOG)
    };
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the webhook cannot listen, so no pod gets an agent");
            return;
        }
    };
    let certificate = Certificate::new();
    let served = answering.spawn(inject::server::serve(
        listener,
        injection,
        Arc::clone(&certificate),
        Arc::clone(&metrics),
        draining,
    ));
    let kept = async {
        match (
            settings.webhook_certificate,
            settings.webhook_key,
            settings.webhook_secret,
            cluster,
        ) {
            (Some(chain), Some(key), ..) => {
                inject::server::follow_files(certificate, chain, key, metrics).await
            }
            (.., Some(secret), Some(cluster)) => {
                let names = Names {
                    namespace: cluster.namespace,
                    secret,
                    configuration: settings.webhook_configuration,
                    service: settings.webhook_service,
                    others: settings.webhook_name,
                };
                certificates::keep(cluster.client, names, certificate, metrics).await;
            }
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        served = served => if let Err(error) = served && error.is_panic() {
            resume_unwind(error.into_panic());
        },
        () = kept => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_sidecars_are_used_where_a_service_finds_their_ports() {
        for (major, minor, expected) in [
            ("1", "28", false),
            ("1", "32", false),
            ("1", "32+", false),
            ("1", "33", true),
            ("1", "33+", true),
            ("1", "40", true),
            ("2", "0", true),
            ("1", "", false),
            ("1", "new", false),
        ] {
            assert_eq!(has_native_sidecars(major, minor), expected, "{major}.{minor}");
        }
    }
}
