//! What a poll costs on each face, while ten thousand tenants are judged each second on the same core.
//!
//! A real aggregator process is pinned to one core; two agents made by hand send it a window of all tenants each second,
//! from a thread of this process. One keep-alive connection asks each face: as fast as answers come, and at a constant
//! rate whether they come or not, where each latency counts from when the poll should have been sent, unless only this
//! process was late. The floor is `/livez` on the admin port: the same server and client, and no verdict. Afterwards
//! all are asked again with no tenant to judge, which shows what judging takes from them, and what the machine does. That
//! polls write nothing is looked up in the decision log.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    num::NonZeroU64,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use coalmine_proto::{histogram::Histogram, names::Arm, v1::TenantRow};
use coalmine_tests::{
    http::{get, post},
    process::free_addresses,
    speaker::{Speaker, now_ms},
};
use rustix::{process::setpriority_process, thread::set_current_timer_slack};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::{
    Plan,
    aggregator::{POLICY, SERVICE},
    child::{Child, beside},
    load::PATIENCE,
    report::{Budget, Report, Spread, Table},
    sample::tenant,
};

/// Tenants that are judged each second.
const TENANTS: usize = 10_000;

/// Requests of a tenant in a window of one arm.
const REQUESTS: u64 = 4;

/// The limit that the policy of the run gives to every tenant.
const LIMIT_US: u64 = 350_000;

/// Polls a second of one face.
const RATE: u32 = 5_000;

/// How long 99 % of the polls may take at most, in microseconds.
const BUDGET_US: f64 = 1_000.0;

/// Most bytes of an answer with its head.
const MAX_ANSWER: usize = 64 << 10;

/// How long the first decisions may take.
const JUDGED_WITHIN: Duration = Duration::from_secs(60);

/// The agents' priority: that of what gives way to everything else.
const LAST_IN_LINE: i32 = 19;

/// Windows that are judged before anything is measured.
const WARM: u64 = 5;

/// A poll that is sent again and again.
#[derive(Debug)]
struct Poll {
    name: &'static str,
    target: SocketAddr,
    request: Vec<u8>,
}

/// A poll's connection and what its rounds gave.
#[derive(Debug)]
struct Lane {
    name: &'static str,
    client: Client,
    /// Polls a second, by round.
    rates: Vec<f64>,
    /// All latencies at the constant rate, while all tenants are judged.
    judging_us: Vec<f64>,
    /// The same while there are none.
    quiet_us: Vec<f64>,
}

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

/// The agents; they end when dropped.
#[derive(Debug)]
struct Agents {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) async fn measure(plan: Plan, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    report.title("Faces: polls while 10,000 tenants are judged each second");
    let directory = directory.join("faces");
    fs::create_dir(&directory)?;
    let [grpc, http, admin] = free_addresses();
    let _aggregator = start(plan.cores.proxy, &directory, [grpc, http, admin]).await?;
    let log = directory.join("data/decisions.jsonl");
    let lanes = spawn_blocking(move || run(plan, [grpc, http, admin], &log)).await??;
    report.note(&format!(
        "The aggregator on core {}, one connection of HTTP/1.1 for each face; {} rounds of {} ms, as fast as answers come \
         and at {RATE}/s.\nOpen loop: each latency from when the poll should have been sent, but for what this process was late by \
         itself. No poll wrote a record.",
        plan.cores.proxy,
        plan.rounds,
        plan.slice.as_millis(),
    ));
    print(&lanes, report);
    Ok(())
}

/// An aggregator that judges each second.
async fn start(core: usize, directory: &Path, listen: [SocketAddr; 3]) -> anyhow::Result<Child> {
    let policy = directory.join("policy.yaml");
    fs::write(&policy, POLICY.replace("judge_window: 10s", "judge_window: 1s"))?;
    let [grpc, http, admin] = listen;
    let arguments = [
        "serve".to_owned(),
        format!("--data={}", directory.join("data").display()),
        format!("--policy={}", policy.display()),
        format!("--listen-grpc={grpc}"),
        format!("--listen-http={http}"),
        format!("--listen-admin={admin}"),
        "--rate-limit=1000000".to_owned(),
    ];
    let program = beside("coalmine-aggregator")?;
    let mut child = Child::program("faces", core, directory, &program, &arguments)?;
    child.listening(grpc).await?;
    child.listening(http).await?;
    Ok(child)
}

/// Asks all faces, in turns: first while all tenants are judged, and then again while there are none. It blocks the thread.
fn run(plan: Plan, [grpc, http, admin]: [SocketAddr; 3], log: &Path) -> anyhow::Result<Vec<Lane>> {
    let agents = Agents::start(grpc);
    let rollout = json!({
        "service": SERVICE,
        "canary_version": "v2",
        "workload": { "kind": "Canary", "namespace": "shop", "name": SERVICE },
    });
    let rollout = asked(http, "/v1/rollouts", &rollout, 201)?;
    let id = rollout["id"].as_str().context("the rollout has no name")?;
    let scopes = json!({ "default": { "experimentScope": { "scope": "v2" } } });
    let analysis = json!({ "scopes": scopes, "thresholds": { "pass": 95, "marginal": 75 } });
    let execution = asked(http, &format!("/kayenta/canary/{SERVICE}"), &analysis, 200)?;
    let execution = execution["canaryExecutionId"].as_str();
    let execution = execution.context("the execution has no name")?;
    wait_until_judged(http, id, WARM)?;

    let polls = polls(http, admin, id, execution);
    let mut lanes = polls.into_iter().map(Lane::new).collect::<Result<Vec<_>, _>>()?;
    let before = records(log)?.len();
    for _ in 0..plan.rounds {
        for lane in &mut lanes {
            let rate = lane.asked(|client| client.flat_out(plan.slice))?;
            lane.rates.push(rate);
            let took_us = lane.asked(|client| client.paced(RATE, plan.slice))?;
            lane.judging_us.extend(took_us);
        }
    }
    drop(agents);
    wait_until_judged(http, id, wait_until_judged(http, id, 0)? + WARM)?;
    for _ in 0..plan.rounds {
        for lane in &mut lanes {
            let took_us = lane.asked(|client| client.paced(RATE, plan.slice))?;
            lane.quiet_us.extend(took_us);
        }
    }
    let written = records(log)?.split_off(before);
    let of_its_own = ["decision", "heartbeat", "segment_seal"].map(|kind| format!(r#""type":"{kind}""#));
    for line in &written {
        let is_of_its_own = of_its_own.iter().any(|kind| line.contains(kind));
        ensure!(is_of_its_own, "a poll has written a record: {line:.200}");
    }
    ensure!(
        written.iter().any(|line| line.contains(&of_its_own[0])),
        "nothing was judged meanwhile"
    );
    Ok(lanes)
}

fn polls(http: SocketAddr, admin: SocketAddr, rollout: &str, execution: &str) -> [Poll; 6] {
    let canary = json!({ "name": SERVICE, "namespace": "shop", "phase": "Progressing", "checksum": "1" });
    let poll = |name, path: &str| Poll {
        name,
        target: http,
        request: request("GET", path, ""),
    };
    [
        Poll {
            name: "floor: /livez",
            target: admin,
            request: request("GET", "/livez", ""),
        },
        poll("gate of a rollout", &format!("/v1/rollouts/{rollout}/gate")),
        poll("gate of a service", &format!("/v1/gate?service={SERVICE}")),
        Poll {
            name: "Flagger, /gate/check",
            target: http,
            request: request("POST", "/gate/check", &canary.to_string()),
        },
        poll(
            "Prometheus, one selector",
            &format!("/api/v1/query?query=coalmine_health_score%7Bservice%3D%22{SERVICE}%22%7D"),
        ),
        poll("Kayenta", &format!("/kayenta/canary/{execution}")),
    ]
}

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: coalmine-bench\r\naccept: */*\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn asked(http: SocketAddr, path: &str, body: &Value, status: u16) -> anyhow::Result<Value> {
    let answer = post(http, path, body)?;
    ensure!(
        answer.status == status,
        "{path}: {} {}",
        answer.status,
        answer.body
    );
    Ok(answer.json())
}

/// Waits until so many windows are judged; gives how many are.
fn wait_until_judged(http: SocketAddr, id: &str, wanted: u64) -> anyhow::Result<u64> {
    let deadline = Instant::now() + JUDGED_WITHIN;
    loop {
        let view = get(http, &format!("/v1/rollouts/{id}"))?.json();
        let judged = view["windows_judged"].as_u64();
        if let Some(judged) = judged.filter(|judged| *judged >= wanted) {
            return Ok(judged);
        }
        ensure!(Instant::now() < deadline, "nothing is judged: {}", view["reason"]);
        thread::sleep(Duration::from_millis(50));
    }
}

fn records(log: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(log).with_context(|| format!("{} cannot be read", log.display()))?;
    // The last line may not be whole yet.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    Ok(whole.lines().map(str::to_owned).collect())
}

fn print(lanes: &[Lane], report: &mut Report) {
    let heads = [
        "",
        "polls/s",
        "to floor",
        "p50 us",
        "p99 us",
        "p99/floor",
        "budget",
        "",
        "none judged: p99 us",
        "budget",
        "",
    ];
    let mut table = Table::new(heads);
    let Some(floor) = lanes.first() else { return };
    let floor_p99 = quantile(&floor.judging_us, 0.99);
    for (number, lane) in lanes.iter().enumerate() {
        let [p99, quiet_p99] = [&lane.judging_us, &lane.quiet_us].map(|took_us| quantile(took_us, 0.99));
        let mut held = |p99: f64, when: &str| {
            let what = format!("poll of {}, p99 at {RATE}/s{when}, us", lane.name);
            let budget = if number > 0 {
                Budget::AtMost(BUDGET_US)
            } else {
                Budget::None
            };
            report.held(&what, p99, budget, 0)
        };
        let mut row = vec![
            lane.name.to_owned(),
            Spread::of(lane.rates.iter().copied()).cell(0),
            Spread::of_ratios(&lane.rates, &floor.rates).cell(2),
            format!("{:.0}", quantile(&lane.judging_us, 0.5)),
            format!("{p99:.0}"),
            format!("{:.2}", p99 / floor_p99.max(1.0)),
        ];
        row.extend(held(p99, ""));
        row.push(format!("{quiet_p99:.0}"));
        row.extend(held(quiet_p99, ", none judged"));
        table.row(row);
    }
    table.print();
}

/// The latency that this share of the polls does not exceed.
fn quantile(took_us: &[f64], share: f64) -> f64 {
    let mut sorted = took_us.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    let took = sorted.get(rank.max(1) - 1).or(sorted.last());
    took.copied().unwrap_or(0.0)
}

// === impl Lane ===

impl Lane {
    fn new(poll: Poll) -> anyhow::Result<Self> {
        Ok(Self {
            name: poll.name,
            client: Client::connect(poll)?,
            rates: Vec::new(),
            judging_us: Vec::new(),
            quiet_us: Vec::new(),
        })
    }

    fn asked<T>(&mut self, ask: impl FnOnce(&mut Client) -> anyhow::Result<T>) -> anyhow::Result<T> {
        ask(&mut self.client).with_context(|| format!("{} is not answered any more", self.name))
    }
}

// === impl Client ===

impl Client {
    fn connect(poll: Poll) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(poll.target)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self {
            stream,
            request: poll.request,
            buffer: vec![0; MAX_ANSWER],
        };
        client
            .ask()
            .with_context(|| format!("{} is not answered", poll.name))?;
        Ok(client)
    }

    /// Polls as fast as answers come; gives polls a second.
    fn flat_out(&mut self, length: Duration) -> anyhow::Result<f64> {
        let (begun, mut polls) = (Instant::now(), 0_u32);
        while begun.elapsed() < length {
            self.ask()?;
            polls += 1;
        }
        Ok(f64::from(polls) / begun.elapsed().as_secs_f64())
    }

    /// Polls at a constant rate; gives each latency, in microseconds.
    fn paced(&mut self, rate: u32, length: Duration) -> anyhow::Result<Vec<f64>> {
        // By default a sleeping thread may be woken 50 us late, so that wake-ups are joined.
        set_current_timer_slack(NonZeroU64::new(1))?;
        let apart = Duration::from_secs(1) / rate;
        let count = ((length.as_secs_f64() * f64::from(rate)) as u32).max(1);
        let mut took_us = Vec::with_capacity(count as usize);
        let mut planned = Instant::now();
        let mut answered = planned;
        for _ in 0..count {
            thread::sleep(planned.saturating_duration_since(Instant::now()));
            let mut due = planned;
            if answered <= planned {
                // Nothing was waited for but this thread itself, and the polls that it missed are left out.
                due = Instant::now();
                while planned + apart <= due {
                    planned += apart;
                }
            }
            self.ask()?;
            answered = Instant::now();
            took_us.push((answered - due).as_secs_f64() * 1e6);
            planned += apart;
        }
        set_current_timer_slack(None)?;
        Ok(took_us)
    }

    /// Sends the poll and reads its answer to the end: a verdict, whatever it is.
    fn ask(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.request)?;
        let (mut read, mut whole) = (0, None);
        while whole.is_none_or(|whole| read < whole) {
            let more = self.stream.read(&mut self.buffer[read..])?;
            ensure!(
                more > 0,
                "the connection was closed within an answer, or the answer is too long"
            );
            read += more;
            if whole.is_none() {
                whole = whole_length(&self.buffer[..read])?;
            }
        }
        let status = self.buffer.get(9..12).unwrap_or_default();
        ensure!(
            status == b"200" || status == b"403",
            "an answer is no verdict: {:.400}",
            String::from_utf8_lossy(&self.buffer[..read])
        );
        ensure!(whole == Some(read), "an answer goes on after its end");
        Ok(())
    }
}

/// The length of an answer whose head is there, with its body; none before that.
fn whole_length(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length
        .context("an answer without Content-Length")?
        .trim()
        .parse()?;
    Ok(Some(end + 4 + length))
}

// === impl Agents ===

impl Agents {
    fn start(grpc: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            if let Err(error) = speak(grpc, &stopped) {
                eprintln!("the agents of the faces have ended: {error:#}");
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What went wrong there was said there.
            thread.join().ok();
        }
    }
}

/// Sends a window of each arm when a second is over, until it is told to stop.
fn speak(grpc: SocketAddr, stop: &AtomicBool) -> anyhow::Result<()> {
    // Whoever asks is on the same core, and must not wait for this thread: the priority is that of the thread only.
    setpriority_process(None, LAST_IN_LINE)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let names = || (0..TENANTS).map(tenant);
    let mut speakers = [
        Speaker::new(SERVICE, "baseline-1", Arm::Baseline, names()),
        Speaker::new(SERVICE, "canary-1", Arm::Canary, names()),
    ];
    let rows = rows();
    let mut next_ms = now_ms() / 1_000 * 1_000;
    while !stop.load(Ordering::Relaxed) {
        if now_ms() >= next_ms + 1_000 {
            for speaker in &mut speakers {
                speaker.count(next_ms, 1_000, rows.clone());
            }
            next_ms += 1_000;
        }
        for speaker in &mut speakers {
            runtime.block_on(speaker.turn(grpc, Duration::from_millis(20)))?;
        }
    }
    Ok(())
}

/// A window in which all tenants are well.
fn rows() -> Vec<TenantRow> {
    let mut latency = Histogram::new();
    (0..REQUESTS).for_each(|request| latency.record(20_000_000 + request * 1_000_000));
    let row = |tenant| TenantRow {
        tenant,
        success: REQUESTS,
        latency: Some(latency.to_wire()),
        limit_us: LIMIT_US,
        ..TenantRow::default()
    };
    (0..TENANTS as u32).map(row).collect()
}
