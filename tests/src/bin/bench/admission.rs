//! How long an API server waits for the webhook when pods are made, and what a review costs.
//!
//! A real aggregator process is pinned to one core. Reviews go over TLS on one connection of HTTP/1.1 that stays, at a
//! constant rate whether answers come or not: each latency counts from when the review should have been sent, so a slow
//! answer is charged to the reviews behind it too. The floor is a request that the webhook knows nothing of (404): the
//! same TLS, connection and client, and no review.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    num::NonZeroU64,
    ops::Range,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use coalmine_tests::{process::free_addresses, tools::certify};
use rustix::thread::set_current_timer_slack;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::{
    Plan,
    aggregator::POLICY,
    child::{Child, beside, installed},
    cpu::Usage,
    load::PATIENCE,
    report::{Budget, Report, Spread, Table},
};

/// Reviews a second, and how many slices a round of them has: a slow rate needs longer for as many reviews.
const RATES: [(u32, u32); 2] = [(50, 3), (500, 1)];

/// The pods of a review, by their containers.
const SMALL: usize = 1;
const LARGE: usize = 500;

/// The quantiles that are shown.
const SHARES: [f64; 3] = [0.5, 0.99, 0.999];

/// Most bytes of an answer with its head.
const MAX_ANSWER: usize = 64 << 10;

/// What the webhook reads at once. A request that is answered before its body is read must not be larger, or the
/// connection is closed.
const MAX_UNREAD: usize = 8 << 10;

/// How long the webhook may take until it has its certificate.
const CERTIFICATE_WITHIN: Duration = Duration::from_secs(15);

/// The connection.
struct Client {
    stream: StreamOwned<ClientConnection, TcpStream>,
    buffer: Vec<u8>,
}

/// A request that is sent again and again, and the answer that each must get.
struct Question {
    name: String,
    request: Vec<u8>,
    /// The answer's beginning.
    status: &'static str,
    /// The answer's body, as it was the first time.
    body: Vec<u8>,
}

/// A question at a rate, and what its rounds gave.
#[derive(Debug)]
struct Lane {
    name: String,
    /// All latencies; the shortest first, once all are there.
    took_ms: Vec<f64>,
    /// By round.
    cpu_us: Vec<f64>,
}

/// All questions at one rate; the first is the floor.
#[derive(Debug)]
struct AtRate {
    rate: u32,
    lanes: Vec<Lane>,
}

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Admission: reviews of new pods, over TLS");
    if installed("openssl").is_none() {
        report.left_out("openssl", "openssl");
        return Ok(());
    }
    let directory = directory.join("admission");
    fs::create_dir(&directory)?;
    certify(&directory, "IP:127.0.0.1");
    let (aggregator, webhook) = start(plan.cores.proxy, &directory).await?;
    let pid = aggregator.pid();

    let before = Usage::of(pid)?;
    tokio::time::sleep(plan.slice).await;
    let idle_us = Usage::of(pid)?.since(before).total_ns / 1e3 / plan.slice.as_secs_f64();

    let questions = [floor()?, review(SMALL), review(LARGE)];
    report.note(&format!(
        "The aggregator on core {}, one connection of HTTP/1.1; the reviews have {} and {} bytes with their heads; \
         {} rounds of {} ms at {}/s and of {} ms at {}/s.\nOpen loop: each latency from when the review should have \
         been sent. Idle, the aggregator uses {idle_us:.0} us of CPU a second, which are in what is below.",
        plan.cores.proxy,
        questions[1].request.len(),
        questions[2].request.len(),
        plan.rounds,
        (plan.slice * RATES[0].1).as_millis(),
        RATES[0].0,
        (plan.slice * RATES[1].1).as_millis(),
        RATES[1].0,
    ));
    let authority = directory.join("authority.pem");
    let asked = spawn_blocking(move || {
        let client = Client::connect(webhook, &authority)?;
        run(plan, pid, client, questions)
    });
    let measured = asked.await??;
    print(&measured, report);
    Ok(())
}

/// An aggregator that has a webhook, and where it is.
async fn start(core: usize, directory: &Path) -> anyhow::Result<(Child, SocketAddr)> {
    let [grpc, http, admin, webhook] = free_addresses();
    let policy = directory.join("policy.yaml");
    fs::write(&policy, POLICY)?;
    let arguments = [
        "serve".to_owned(),
        format!("--data={}", directory.join("data").display()),
        format!("--policy={}", policy.display()),
        format!("--listen-grpc={grpc}"),
        format!("--listen-http={http}"),
        format!("--listen-admin={admin}"),
        format!("--listen-webhook={webhook}"),
        format!("--webhook-certificate={}", directory.join("server.pem").display()),
        format!("--webhook-key={}", directory.join("server.key").display()),
        "--native-sidecar=true".to_owned(),
        "--agent-image=i:1".to_owned(),
        "--agent-aggregator=http://coalmine.coalmine:7443".to_owned(),
    ];
    let program = beside("coalmine-aggregator")?;
    let mut child = Child::program("admission", core, directory, &program, &arguments)?;
    child.listening(webhook).await?;
    Ok((child, webhook))
}

/// Asks all questions at all rates, in turns. It blocks the thread.
fn run(
    plan: Plan,
    pid: u32,
    mut client: Client,
    mut questions: [Question; 3],
) -> anyhow::Result<Vec<AtRate>> {
    for question in &mut questions {
        client.learn(question)?;
    }
    let mut measured = Vec::with_capacity(RATES.len());
    for (rate, slices) in RATES {
        let lanes = questions.iter().map(|question| Lane::new(question, rate));
        let mut lanes: Vec<Lane> = lanes.collect();
        for _ in 0..plan.rounds {
            for (lane, question) in lanes.iter_mut().zip(&questions) {
                let before = Usage::of(pid)?;
                let took_ms = client.paced(question, rate, plan.slice * slices)?;
                let used = Usage::of(pid)?.since(before);
                lane.cpu_us.push(used.total_ns / 1e3 / took_ms.len() as f64);
                lane.took_ms.extend(took_ms);
            }
        }
        for lane in &mut lanes {
            lane.took_ms.sort_by(f64::total_cmp);
        }
        measured.push(AtRate { rate, lanes });
    }
    Ok(measured)
}

fn print(measured: &[AtRate], report: &mut Report) {
    let mut table = Table::new([
        "",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "p50/floor",
        "p99/floor",
        "CPU us/review",
        "CPU/floor",
        "budget",
        "",
    ]);
    for AtRate { lanes, .. } in measured {
        let Some(floor) = lanes.first() else { continue };
        for lane in lanes {
            table.row(lane.cells(floor));
        }
    }
    // The second question is the small pod.
    let held = measured.iter().find(|at| at.rate == RATES[0].0);
    if let Some(lane) = held.and_then(|at| at.lanes.get(1)) {
        let what = format!("admission, p99 at {} pods/s, ms", RATES[0].0);
        let p99 = lane.quantile_ms(0.99);
        let held = report.held(&what, p99, Budget::AtMost(10.0), 0);
        let mut row = vec![what, String::new(), format!("{p99:.2}")];
        row.resize(8, String::new());
        row.extend(held);
        table.row(row);
    }
    table.print();
}

/// What is not there, with the body of a small review.
fn floor() -> anyhow::Result<Question> {
    let request = post("/floor", &body(SMALL));
    ensure!(
        request.len() < MAX_UNREAD,
        "the floor's request has {} bytes, which is too many",
        request.len()
    );
    Ok(Question {
        name: "floor: 404".to_owned(),
        request,
        status: "HTTP/1.1 404",
        body: Vec::new(),
    })
}

fn review(containers: usize) -> Question {
    Question {
        name: match containers {
            1 => "pod of 1 container".to_owned(),
            many => format!("pod of {many} containers"),
        },
        request: post("/inject", &body(containers)),
        status: "HTTP/1.1 200",
        body: Vec::new(),
    }
}

fn post(path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path}?timeout=3s HTTP/1.1\r\nhost: coalmine.coalmine.svc:443\r\nuser-agent: kube-apiserver-admission\r\n\
         accept: application/json, */*\r\ncontent-type: application/json\r\naccept-encoding: gzip\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A review of a pod that a ReplicaSet makes and that asks for an agent.
fn body(containers: usize) -> String {
    let pods = json!({ "group": "", "version": "v1", "resource": "pods" });
    let kind = json!({ "group": "", "version": "v1", "kind": "Pod" });
    let review = json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": kind,
            "resource": pods,
            "requestKind": kind,
            "requestResource": pods,
            "namespace": "shop",
            "operation": "CREATE",
            "userInfo": {
                "username": "system:serviceaccount:kube-system:replicaset-controller",
                "groups": ["system:serviceaccounts", "system:authenticated"],
            },
            "object": pod(containers),
            "oldObject": null,
            "dryRun": false,
            "options": { "kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1" },
        },
    });
    review.to_string()
}

fn pod(containers: usize) -> Value {
    let metadata = json!({
        "generateName": "checkout-7c5d9f8b6-",
        "namespace": "shop",
        "labels": {
            "coalmine.dev/inject": "enabled",
            "coalmine.dev/arm": "canary",
            "app.kubernetes.io/name": "checkout",
            "app.kubernetes.io/version": "v2",
            "pod-template-hash": "7c5d9f8b6",
        },
        "annotations": { "coalmine.dev/tenant": "header:x-tenant-id" },
        "ownerReferences": [{
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "checkout-7c5d9f8b6",
            "uid": "0f1c7a52-9a4e-4f0e-8d3b-2f6f5f1b7c11", "controller": true, "blockOwnerDeletion": true,
        }],
    });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "containers": (0..containers).map(container).collect::<Vec<_>>(),
            "volumes": [{ "name": "token", "projected": { "defaultMode": 420, "sources": [] } }],
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "serviceAccountName": "checkout",
            "schedulerName": "default-scheduler",
            "priority": 0,
            "enableServiceLinks": true,
        },
        "status": {},
    })
}

/// The first one is the application, which has the only port.
fn container(number: usize) -> Value {
    let mut container = json!({
        "name": format!("container-{number}"),
        "image": "registry.example/shop/checkout:2.14.1",
        "env": [
            { "name": "NUMBER", "value": number.to_string() },
            { "name": "POD", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.name" } } },
        ],
        "resources": { "limits": { "memory": "256Mi" }, "requests": { "cpu": "100m", "memory": "256Mi" } },
        "volumeMounts": [{ "name": "token", "readOnly": true, "mountPath": "/var/run/secrets/token" }],
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
    });
    if number == 0 {
        container["ports"] = json!([{ "name": "http", "containerPort": 8080, "protocol": "TCP" }]);
        container["readinessProbe"] =
            json!({ "httpGet": { "path": "/healthz", "port": "http", "scheme": "HTTP" } });
    }
    container
}

/// Where an answer's body is, once the head is there.
fn body_of(answer: &[u8]) -> anyhow::Result<Option<Range<usize>>> {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length
        .context("an answer without Content-Length")?
        .trim()
        .parse()?;
    ensure!(length <= MAX_ANSWER, "an answer of {length} bytes");
    Ok(Some(end + 4..end + 4 + length))
}

// === impl Client ===

impl Client {
    /// Connects as somebody who trusts only who signed the certificate.
    fn connect(webhook: SocketAddr, authority: &Path) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(authority)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let config = Arc::new(config);
        let deadline = Instant::now() + CERTIFICATE_WITHIN;
        loop {
            match Self::handshake(webhook, &config) {
                Ok(client) => return Ok(client),
                // It may listen a moment before it has read its certificate.
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error.context("there is no handshake with the webhook")),
            }
        }
    }

    fn handshake(webhook: SocketAddr, config: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(webhook)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let name = ServerName::from(webhook.ip());
        let connection = ClientConnection::new(Arc::clone(config), name)?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self {
            stream,
            buffer: vec![0; MAX_ANSWER],
        })
    }

    /// Asks for the first time, and looks at the answer.
    fn learn(&mut self, question: &mut Question) -> anyhow::Result<()> {
        let body = self.ask(&question.request)?;
        question.body = self.buffer[body.clone()].to_vec();
        question.check(&self.buffer, body)?;
        if question.request.starts_with(b"POST /inject") {
            let answer: Value = serde_json::from_slice(&question.body)?;
            let response = &answer["response"];
            ensure!(
                response["allowed"] == true && response["patchType"] == "JSONPatch",
                "{} gets no agent: {response}",
                question.name
            );
        }
        Ok(())
    }

    /// Asks so many times a second for a while, and waits for all answers; gives how long each took, in milliseconds.
    fn paced(&mut self, question: &Question, rate: u32, length: Duration) -> anyhow::Result<Vec<f64>> {
        // By default a sleeping thread may be woken 50 us late, so that wake-ups are joined.
        set_current_timer_slack(NonZeroU64::new(1))?;
        let took_ms = self.send(question, rate, length);
        set_current_timer_slack(None)?;
        took_ms
    }

    /// One review is under way at a time, and those that are due meanwhile wait.
    fn send(&mut self, question: &Question, rate: u32, length: Duration) -> anyhow::Result<Vec<f64>> {
        let apart = Duration::from_secs(1) / rate.max(1);
        let count = ((length.as_secs_f64() * f64::from(rate)) as u32).max(1);
        let mut took_ms = Vec::with_capacity(count as usize);
        let begun = Instant::now();
        for number in 0..count {
            let due = begun + apart * number;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let body = self.ask(&question.request)?;
            took_ms.push(due.elapsed().as_secs_f64() * 1e3);
            question.check(&self.buffer, body)?;
            ensure!(
                due.elapsed() < PATIENCE,
                "the webhook cannot keep up with {rate} reviews/s ({})",
                question.name
            );
        }
        Ok(took_ms)
    }

    /// Sends a request and reads its answer to the end; gives where the answer's body is.
    fn ask(&mut self, request: &[u8]) -> anyhow::Result<Range<usize>> {
        self.stream.write_all(request)?;
        self.stream.flush()?;
        let mut read = 0;
        loop {
            let more = self.stream.read(&mut self.buffer[read..]);
            let more = more.context("an answer does not come")?;
            ensure!(
                more > 0,
                "an answer breaks off, or is larger than {MAX_ANSWER} bytes"
            );
            read += more;
            let Some(body) = body_of(&self.buffer[..read])? else {
                continue;
            };
            if read >= body.end {
                ensure!(read == body.end, "there is more than one answer");
                return Ok(body);
            }
        }
    }
}

// === impl Question ===

impl Question {
    /// Whether an answer is the expected one.
    fn check(&self, answer: &[u8], body: Range<usize>) -> anyhow::Result<()> {
        ensure!(
            answer.starts_with(self.status.as_bytes()) && answer[body.clone()] == self.body,
            "{}: an answer is not the expected one: {:?}",
            self.name,
            String::from_utf8_lossy(&answer[..body.end.min(400)])
        );
        Ok(())
    }
}

// === impl Lane ===

impl Lane {
    fn new(question: &Question, rate: u32) -> Self {
        Self {
            name: format!("{}, {rate}/s", question.name),
            took_ms: Vec::new(),
            cpu_us: Vec::new(),
        }
    }

    /// The latency that this share of the reviews does not exceed.
    fn quantile_ms(&self, share: f64) -> f64 {
        let rank = (self.took_ms.len() as f64 * share).ceil() as usize;
        let latency = self.took_ms.get(rank.max(1) - 1).or(self.took_ms.last());
        latency.copied().unwrap_or(0.0)
    }

    fn cells(&self, floor: &Self) -> Vec<String> {
        let ratio = |share| self.quantile_ms(share) / floor.quantile_ms(share);
        let mut cells = vec![self.name.clone()];
        cells.extend(SHARES.map(|share| format!("{:.3}", self.quantile_ms(share))));
        cells.extend([0.5, 0.99].map(|share| format!("{:.2}", ratio(share))));
        cells.push(Spread::of(self.cpu_us.iter().copied()).cell(0));
        cells.push(Spread::of_ratios(&self.cpu_us, &floor.cpu_us).cell(2));
        cells
    }
}
