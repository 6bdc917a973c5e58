//! A real Kubernetes API server for one test: etcd and kube-apiserver on loopback, killed when the test is over.
//!
//! There are no nodes and no controllers. Pods can be created and stay Pending; a test gives them the status that a node
//! would give them, and makes ReplicaSets itself; or it plays the nodes (`nodes`) and runs the controllers. Everything
//! else is what a cluster does: admission with its webhooks, validation, RBAC, Pod Security, service-account tokens,
//! custom resources.
//!
//! Services have addresses in 127.96.0.0/16, all of which are this machine. So the API server finds a webhook by its
//! Service, as it does in a cluster: a program of the test listens on the Service's own address.
//!
//! The programs come from `tests/kubernetes/assets.sh`, which builds them once.

mod nodes;
mod proxy;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::{
    nodes::{FAILING, Nodes, Plan, Split},
    proxy::{Held, Proxy, When},
};
use crate::{
    eventually,
    http::{Answer, request},
    process::{Process, free_addresses, repository, wait_for_listener},
    tools, within,
};

/// Who signs service-account tokens.
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// The address of the Service of a webhook. Others may be had from the same network.
pub const WEBHOOK_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 96, 0, 10);

/// The network of Services.
const SERVICES: &str = "127.96.0.0/16";

/// What the user who may do everything presents.
const ADMIN_TOKEN: &str = "administrator-of-the-test";

/// Starting takes seconds; on a busy machine, many.
const START_WITHIN: Duration = Duration::from_secs(180);

/// Asks an API server as the user who may do everything; a thread can take it along.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    address: SocketAddr,
}

/// A cluster without nodes.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: the proxy, then the server, then its store, then their files.
    direct: Proxy,
    server: Process,
    _etcd: Process,
    /// Where the API server listens, with TLS.
    pub address: SocketAddr,
    admin: PathBuf,
    files: AtomicU32,
    directory: TempDir,
}

impl Cluster {
    /// Starts one.
    ///
    /// # Panics
    /// When a program is missing, or does not start.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory for the cluster");
        certificates(directory.path());
        let (etcd, store) = start_etcd(directory.path());
        let [address] = free_addresses();
        let mut server = start_server(directory.path(), store, address);
        let admin = directory.path().join("admin.kubeconfig");
        let text = kubeconfig(
            directory.path(),
            &format!("https://{address}"),
            "default",
            ADMIN_TOKEN,
        );
        fs::write(&admin, text).expect("the kubeconfig is written");
        within(START_WITHIN, "the API server is ready", || {
            assert!(
                server.ended().is_none(),
                "kube-apiserver ended: {}",
                server.said()
            );
            let output = kubectl(directory.path(), &admin, ["get", "--raw", "/readyz"], None);
            output.status.success().then_some(())
        });
        let cluster = Self {
            direct: Proxy::start(address, &directory.path().join("authority.pem")),
            server,
            _etcd: etcd,
            address,
            admin,
            files: AtomicU32::new(0),
            directory,
        };
        within(START_WITHIN, "the first namespaces are there", || {
            let names = ["default", "kube-system"].map(|name| format!("/api/v1/namespaces/{name}"));
            let there = |path: &String| cluster.request("GET", path, &Value::Null).status == 200;
            names.iter().all(there).then_some(())
        });
        cluster.account("default", "default");
        cluster
    }

    /// What the API server said so far.
    pub fn said(&self) -> String {
        self.server.said()
    }

    /// The kubeconfig of the user who may do everything.
    pub fn kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// A kubeconfig of a service account, with its namespace as that of the context.
    ///
    /// # Panics
    /// When there is no such account.
    pub fn kubeconfig_of(&self, namespace: &str, account: &str) -> PathBuf {
        self.kubeconfig_at(&format!("https://{}", self.address), namespace, account)
    }

    /// The same for a server at another place: a proxy before the API server.
    ///
    /// # Panics
    /// When there is no such account.
    pub fn kubeconfig_through(&self, proxy: &Proxy, namespace: &str, account: &str) -> PathBuf {
        self.kubeconfig_at(&format!("http://{}", proxy.address), namespace, account)
    }

    fn kubeconfig_at(&self, server: &str, namespace: &str, account: &str) -> PathBuf {
        let token = self.token(namespace, account, &[]);
        let file = self.file(&format!("{namespace}-{account}.kubeconfig"));
        let text = kubeconfig(self.directory.path(), server, namespace, &token);
        fs::write(&file, text).expect("the kubeconfig is written");
        file
    }

    /// A path in the cluster's directory that nobody else gets.
    pub fn file(&self, name: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.directory.path().join(format!("{number}-{name}"))
    }

    /// A token of a service account, as `kubectl create token` makes it; with more arguments, such as `--audience=`.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn token(&self, namespace: &str, account: &str, arguments: &[&str]) -> String {
        let all = ["create", "token", account, "-n", namespace];
        self.kubectl(all.iter().chain(arguments)).trim().to_owned()
    }

    /// A token with these claims and the cluster's own signature: one that could have been issued at another time.
    ///
    /// # Panics
    /// When it cannot be signed.
    pub fn signed(&self, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!(
            "{}.{}",
            part(&json!({ "alg": "RS256", "typ": "JWT" })),
            part(claims)
        );
        let mut sign = Command::new(tools::tool("openssl", "openssl"));
        sign.current_dir(self.directory.path());
        sign.args(["dgst", "-sha256", "-sign", "accounts.key"]);
        let output = run(sign, Some(&text));
        assert!(output.status.success(), "openssl dgst: {}", error_of(&output));
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(output.stdout))
    }

    /// Runs kubectl as the user who may do everything; gives what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let arguments: Vec<_> = arguments.into_iter().map(|one| one.as_ref().to_owned()).collect();
        let output = self.try_kubectl(&arguments, None);
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}",
            error_of(&output)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs kubectl, with text on its standard input; it may fail.
    pub fn try_kubectl<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        input: Option<&str>,
    ) -> Output {
        kubectl(self.directory.path(), &self.admin, arguments, input)
    }

    /// Applies an object from the server's side, whoever had it before.
    ///
    /// # Panics
    /// When it is refused.
    pub fn apply(&self, object: &Value) {
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        let output = self.try_kubectl(arguments, Some(&object.to_string()));
        assert!(
            output.status.success(),
            "{}/{}: {}",
            object["kind"],
            object["metadata"]["name"],
            error_of(&output)
        );
    }

    /// Who asks beside this thread.
    pub fn client(&self) -> Client {
        Client {
            address: self.direct.address,
        }
    }

    /// One request to the API, as the user who may do everything. A patch is a merge patch.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.client().request(method, path, body)
    }

    /// The same as somebody else.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn request_as(&self, token: &str, method: &str, path: &str, body: &Value) -> Answer {
        self.client().request_as(token, method, path, body)
    }

    /// An object, as JSON.
    ///
    /// # Panics
    /// When there is none.
    pub fn get(&self, path: &str) -> Value {
        let answer = self.request("GET", path, &Value::Null);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// Creates an object in a collection; gives it as it was stored.
    ///
    /// # Panics
    /// When it is refused.
    pub fn create(&self, collection: &str, object: &Value) -> Value {
        let answer = self.request("POST", collection, object);
        assert_eq!(answer.status, 201, "{collection}: {}", answer.body);
        answer.json()
    }

    /// Merges a patch into an object, or into its status; gives the whole.
    ///
    /// # Panics
    /// When it is refused.
    pub fn patch(&self, path: &str, patch: &Value) -> Value {
        let answer = self.request("PATCH", path, patch);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    /// Deletes an object, at once.
    ///
    /// # Panics
    /// When it is not there.
    pub fn delete(&self, path: &str) {
        let at_once = json!({ "kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0 });
        let answer = self.request("DELETE", path, &at_once);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }

    /// Makes a namespace, with the account that pods have by default.
    ///
    /// # Panics
    /// When it is refused.
    pub fn namespace(&self, name: &str, labels: &Value) {
        let metadata = json!({ "name": name, "labels": labels });
        self.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }));
        self.account(name, "default");
    }

    /// Makes a service account.
    pub fn account(&self, namespace: &str, name: &str) {
        let metadata = json!({ "name": name, "namespace": namespace });
        self.apply(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata }));
    }

    /// Gives a pod the status of one that runs and is ready.
    pub fn run_pod(&self, namespace: &str, name: &str) {
        let conditions = ["Initialized", "ContainersReady", "Ready"].map(
            |kind| json!({ "type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }),
        );
        let status = json!({ "phase": "Running", "conditions": conditions, "podIP": "10.0.0.1" });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        self.patch(&path, &json!({ "status": status }));
    }

    /// A proxy before the API server, without TLS on the side of clients.
    pub fn proxy(&self) -> Proxy {
        Proxy::start(self.address, &self.directory.path().join("authority.pem"))
    }

    /// Installs custom resources from a file of the assets, and waits until they can be used.
    ///
    /// # Panics
    /// When the file is not there.
    pub fn custom_resources(&self, file: &str) {
        let path = assets().join("crds").join(file);
        assert!(
            path.is_file(),
            "{} is missing; tests/kubernetes/assets.sh makes it",
            path.display()
        );
        let path = path.display().to_string();
        self.kubectl(["apply", "--server-side", "-f", &path]);
        // Until the first conditions are there, to wait for one is an error.
        let wait = [
            "wait",
            "--for=condition=Established",
            "--timeout=10s",
            "-f",
            &path,
        ];
        eventually("the definitions are established", || {
            self.try_kubectl(wait, None).status.success().then_some(())
        });
    }
}

impl Client {
    /// One request to the API, as the user who may do everything. A patch is a merge patch.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.request_as(ADMIN_TOKEN, method, path, body)
    }

    fn request_as(&self, token: &str, method: &str, path: &str, body: &Value) -> Answer {
        let bearer = format!("Bearer {token}");
        let kind = if method == "PATCH" {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", kind),
            ("accept", "application/json"),
        ];
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        request(self.address, method, path, &headers, &body).expect("the API server answers")
    }
}

/// An address at which a webhook's Service can be, with a port that nobody listens on.
///
/// # Panics
/// When there is none.
pub fn service_address() -> SocketAddr {
    let listener = TcpListener::bind((WEBHOOK_ADDRESS, 0)).expect("a free port");
    listener.local_addr().expect("the port's number")
}

/// Renders a kustomization with kubectl: its objects.
///
/// # Panics
/// When it does not render.
pub fn render(directory: &Path) -> Vec<Value> {
    let mut command = Command::new(program("kubectl"));
    command.arg("kustomize").arg(directory);
    let output = run(command, None);
    assert!(
        output.status.success(),
        "{}: {}",
        directory.display(),
        error_of(&output)
    );
    serde_saphyr::from_multiple(&String::from_utf8_lossy(&output.stdout))
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
}

/// What a program said on its standard error.
pub fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The directory of the programs, built if need be.
///
/// # Panics
/// When one is missing and cannot be built.
pub fn assets() -> &'static Path {
    static ASSETS: OnceLock<PathBuf> = OnceLock::new();
    ASSETS.get_or_init(|| {
        let script = repository().join("tests/kubernetes/assets.sh");
        let mut command = Command::new(script);
        command.stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = command.output().expect("assets.sh starts");
        assert!(output.status.success(), "assets.sh says what is missing");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
}

/// One of the programs.
pub fn program(name: &str) -> PathBuf {
    assets().join(name)
}

fn start_etcd(directory: &Path) -> (Process, SocketAddr) {
    let [clients, peers] = free_addresses();
    let (clients_url, peers_url) = (format!("http://{clients}"), format!("http://{peers}"));
    let mut command = Command::new(program("etcd"));
    command
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--listen-client-urls", &clients_url])
        .args(["--advertise-client-urls", &clients_url])
        .args(["--listen-peer-urls", &peers_url])
        .args(["--initial-advertise-peer-urls", &peers_url])
        .args(["--initial-cluster", &format!("default={peers_url}")])
        // Nothing has to outlive the test.
        .args(["--unsafe-no-fsync", "--log-level=error"]);
    let mut process = Process::start(command, &directory.join("etcd.log"));
    wait_for_listener(&mut process, clients);
    (process, clients)
}

fn start_server(directory: &Path, store: SocketAddr, address: SocketAddr) -> Process {
    let tokens = format!("{ADMIN_TOKEN},administrator,1,\"system:masters\"\n");
    fs::write(directory.join("tokens.csv"), tokens).expect("the tokens are written");
    let mut flags = BTreeMap::from([
        ("etcd-servers", format!("http://{store}")),
        ("bind-address", address.ip().to_string()),
        ("advertise-address", address.ip().to_string()),
        ("secure-port", address.port().to_string()),
        ("authorization-mode", "RBAC".to_owned()),
        ("service-cluster-ip-range", SERVICES.to_owned()),
        // Endpoints may not be on loopback.
        ("endpoint-reconciler-type", "none".to_owned()),
        ("service-account-issuer", ISSUER.to_owned()),
        ("allow-privileged", "true".to_owned()),
        ("profiling", "false".to_owned()),
    ]);
    for (flag, file) in [
        ("tls-cert-file", "server.pem"),
        ("tls-private-key-file", "server.key"),
        ("token-auth-file", "tokens.csv"),
        ("service-account-key-file", "accounts.key"),
        ("service-account-signing-key-file", "accounts.key"),
        ("cert-dir", "server"),
    ] {
        flags.insert(flag, directory.join(file).display().to_string());
    }
    let mut command = Command::new(program("kube-apiserver"));
    command.args(flags.iter().map(|(flag, value)| format!("--{flag}={value}")));
    Process::start(command, &directory.join("kube-apiserver.log"))
}

/// The API server's certificate, its authority, and the key that signs the tokens of accounts.
fn certificates(directory: &Path) {
    tools::certify(directory, "IP:127.0.0.1,DNS:localhost,DNS:kubernetes.default.svc");
    tools::openssl(directory, "genrsa -out accounts.key 2048");
}

fn kubeconfig(directory: &Path, server: &str, namespace: &str, token: &str) -> String {
    let mut cluster = json!({ "server": server });
    if server.starts_with("https:") {
        cluster["certificate-authority"] = json!(directory.join("authority.pem"));
    }
    // JSON is YAML.
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{ "name": "test", "cluster": cluster }],
        "users": [{ "name": "test", "user": { "token": token } }],
        "contexts": [{
            "name": "test",
            "context": { "cluster": "test", "user": "test", "namespace": namespace },
        }],
    })
    .to_string()
}

fn kubectl<S: AsRef<OsStr>>(
    directory: &Path,
    kubeconfig: &Path,
    arguments: impl IntoIterator<Item = S>,
    input: Option<&str>,
) -> Output {
    let mut command = Command::new(program("kubectl"));
    command
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .arg("--cache-dir")
        .arg(directory.join("kubectl"))
        .args(arguments);
    run(command, input)
}

/// Runs a program to its end.
fn run(mut command: Command, input: Option<&str>) -> Output {
    command
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
    let pipe = child.stdin.take();
    std::thread::scope(|scope| {
        // Beside reading what it says, lest both wait for each other.
        scope.spawn(move || {
            if let Some((mut pipe, text)) = pipe.zip(input) {
                // It may end without reading all.
                pipe.write_all(text.as_bytes()).ok();
            }
        });
        child.wait_with_output().expect("the program ends")
    })
}
