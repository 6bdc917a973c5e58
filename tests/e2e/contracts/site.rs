//! An aggregator that knows several services and several tokens, and agents made by hand that go on talking to it.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use coalmine_judge::chain::Hash;
use coalmine_proto::{names::Arm, v1::TenantRow};
use coalmine_tests::{
    clients::Server,
    components::Aggregator,
    eventually,
    http::{Answer, get, request},
    speaker::{Speaker, now_ms},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Builder;

/// Who may do everything.
pub(super) const DEPLOYER: &str = "deployer";
/// Who may ask for verdicts.
pub(super) const ASKER: &str = "asker";
/// Who may read the log and nothing else.
pub(super) const AUDITOR: &str = "auditor";
/// Who may ask for the verdicts of other services.
pub(super) const ELSEWHERE: &str = "elsewhere";
/// Who has a token that is not known.
pub(super) const STRANGER: &str = "stranger";
/// Who has no token.
pub(super) const NOBODY: &str = "";

/// Scopes and services of the tokens that are known.
const KNOWN: [(&str, &str, &str); 4] = [
    (DEPLOYER, "gate,rollout,override,audit", "*"),
    (ASKER, "gate", "*"),
    (AUDITOR, "audit", "*"),
    (ELSEWHERE, "gate", "search,cart*"),
];

/// Length of a window.
const WINDOW_MS: u32 = 1_000;

/// Tenants of a service, and requests of each in a window.
const TENANTS: u32 = 4;
const REQUESTS: u64 = 100;

/// Between two turns of the agents.
const PACE: Duration = Duration::from_millis(20);

/// How long an agent listens in a turn.
const LISTEN: Duration = Duration::from_millis(5);

/// What a client may take; each has a shorter limit of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the agents of a service count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Traffic {
    /// Nothing: nobody comes.
    Idle,
    /// Requests that succeed.
    Healthy,
    /// A fifth of the canary's requests fails.
    Failing,
}

/// A service with a policy. Windows have a second, and errors alone are judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Service {
    pub(super) name: &'static str,
    /// What the policy says of HOLD.
    hold: &'static str,
    /// Windows before APPROVE.
    min_windows: u32,
    /// None if it has no agents.
    traffic: Option<Traffic>,
}

impl Service {
    pub(super) const fn new(
        name: &'static str,
        hold: &'static str,
        min_windows: u32,
        traffic: Option<Traffic>,
    ) -> Self {
        Self {
            name,
            hold,
            min_windows,
            traffic,
        }
    }

    fn policy(&self) -> String {
        format!(
            "apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: {}
defaults:
  errors: {{ max_rate: 5% }}
  judge_window: 1s
  required: [errors]
  {}
rollout: {{ min_coverage: {{ requests: 10 }}, min_windows: {} }}
",
            self.name, self.hold, self.min_windows
        )
    }
}

/// The token of somebody, in the form that tokens have; none of nobody.
fn token(name: &str) -> Option<String> {
    (name != NOBODY).then(|| format!("cmt_{name:A<43}"))
}

/// Whom a client asks.
pub(super) fn server(http: SocketAddr, token: Option<String>) -> Server {
    Server {
        http,
        token,
        patience: PATIENCE,
    }
}

type Plan = Arc<Mutex<BTreeMap<&'static str, Traffic>>>;

/// The aggregator and the agents; the agents end with it.
pub(super) struct Site {
    aggregator: Aggregator,
    plan: Plan,
    /// Gone when the agents are to end.
    stop: Option<mpsc::Sender<()>>,
    agents: Option<JoinHandle<()>>,
    _directory: TempDir,
}

impl Site {
    /// Starts everything; the agents have told of a window.
    pub(super) fn start(services: &[Service]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name).display().to_string();
        let tokens = KNOWN.map(|(name, scopes, services)| {
            let hash = Hash::of(token(name).unwrap().as_bytes());
            format!("{hash} {name} {scopes} {services}\n")
        });
        fs::write(place("tokens"), tokens.concat()).unwrap();
        let [first, others @ ..] = services else {
            panic!("a site has a service");
        };
        let mut aggregator = Aggregator::prepare_with(directory.path(), &first.policy()).with_arguments(&[
            "--tokens",
            &place("tokens"),
            "--grace-seconds",
            "3",
        ]);
        for service in others {
            let file = place(&format!("{}.yaml", service.name));
            fs::write(&file, service.policy()).unwrap();
            aggregator = aggregator.with_arguments(&["--policy", &file]);
        }
        aggregator.launch();

        let served = services
            .iter()
            .filter_map(|service| Some((service.name, service.traffic?)));
        let plan: Plan = Arc::new(Mutex::new(served.collect()));
        let (stop, stopped) = mpsc::channel();
        let (grpc, planned) = (aggregator.grpc, Arc::clone(&plan));
        let site = Self {
            aggregator,
            plan,
            stop: Some(stop),
            agents: Some(thread::spawn(move || talk(grpc, &planned, &stopped))),
            _directory: directory,
        };
        for service in services.iter().filter(|service| service.traffic.is_some()) {
            eventually(
                &format!("the agents of {} have told something", service.name),
                || site.is_heard(service.name).then_some(()),
            );
        }
        site
    }

    /// Whether both arms of a service have told of windows, and of requests if there are any.
    fn is_heard(&self, name: &'static str) -> bool {
        let Some(service) = self.get(&format!("/v1/services/{name}")) else {
            return false;
        };
        let idle = self.planned().get(name) == Some(&Traffic::Idle);
        let totals = service["totals"].as_array();
        let has = |arm: Arm| totals.into_iter().flatten().any(|row| row["arm"] == arm.as_str());
        service["windows"].as_u64() >= Some(2) && (idle || Arm::ALL.into_iter().all(has))
    }

    fn planned(&self) -> MutexGuard<'_, BTreeMap<&'static str, Traffic>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From the next window on the agents of a service count this.
    pub(super) fn serve(&self, service: &'static str, traffic: Traffic) {
        self.planned().insert(service, traffic);
    }

    /// The aggregator, asked by somebody.
    pub(super) fn server(&self, name: &str) -> Server {
        server(self.aggregator.http, token(name))
    }

    /// What somebody is answered at a path.
    pub(super) fn ask_as(&self, name: &str, path: &str) -> Answer {
        self.send(name, "GET", path, "")
    }

    fn send(&self, name: &str, method: &str, path: &str, body: &str) -> Answer {
        let bearer = token(name).map(|token| format!("Bearer {token}"));
        let bearer = bearer.iter().map(|bearer| ("authorization", bearer.as_str()));
        let headers: Vec<_> = [("content-type", "application/json")]
            .into_iter()
            .chain(bearer)
            .collect();
        let answer = request(self.aggregator.http, method, path, &headers, body);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// What there is at a path; none if there is nothing.
    pub(super) fn get(&self, path: &str) -> Option<Value> {
        let answer = self.ask_as(DEPLOYER, path);
        assert!(matches!(answer.status, 200 | 404), "{path}: {}", answer.body);
        (answer.status == 200).then(|| answer.json())
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.send(DEPLOYER, "POST", path, &body.to_string());
        assert!(
            matches!(answer.status, 200 | 201),
            "{path} {body}: {}",
            answer.body
        );
        answer.json()
    }

    /// Starts a rollout of a service, whose Canary has the same name.
    pub(super) fn roll_out(&self, service: &str, key: &str) -> String {
        self.roll_out_of(service, key, Some(service))
    }

    /// The same with a Canary of another name, or without a word of what is rolled out.
    pub(super) fn roll_out_of(&self, service: &str, key: &str, canary: Option<&str>) -> String {
        let workload = canary.map(|name| json!({ "kind": "Canary", "namespace": "shop", "name": name }));
        let request = json!({
            "service": service,
            "canary_version": "v2",
            "key": format!("{service}-{key}"),
            "workload": workload,
        });
        let view = self.post("/v1/rollouts", &request);
        view["id"].as_str().unwrap().to_owned()
    }

    /// Decides in the judge's place, or gives the decision back to it.
    pub(super) fn decide(&self, rollout: &str, verdict: Option<&str>) {
        let body = json!({ "verdict": verdict, "reason": "the test says so" });
        self.post(&format!("/v1/rollouts/{rollout}/override"), &body);
    }

    /// Ends a rollout.
    pub(super) fn end(&self, rollout: &str) {
        self.post(&format!("/v1/rollouts/{rollout}/end"), &json!({}));
    }

    /// What the gate says of a rollout.
    pub(super) fn gate(&self, rollout: &str) -> Value {
        let gate = self.get(&format!("/v1/rollouts/{rollout}/gate"));
        gate.unwrap_or_else(|| panic!("{rollout} is not known"))
    }

    /// Has something asked while the gate's fields stay as they are, and the verdict is the one that is wanted. Gives
    /// what the gate said, and what was told.
    pub(super) fn while_it_says<T>(
        &self,
        rollout: &str,
        wanted: Option<&str>,
        fields: &[&str],
        mut ask: impl FnMut(&Value) -> T,
    ) -> (Value, T) {
        eventually(&format!("{rollout} says {wanted:?} for long enough"), || {
            let before = self.gate(rollout);
            if wanted.is_some_and(|wanted| before["verdict"] != wanted) {
                return None;
            }
            let told = ask(&before);
            let after = self.gate(rollout);
            let stands = fields.iter().all(|field| before[*field] == after[*field]);
            stands.then_some((before, told))
        })
    }

    /// Kills the aggregator and starts it again. Until it is ready, at least once, something is done.
    pub(super) fn restart(&mut self, mut meanwhile: impl FnMut()) {
        self.aggregator.kill_9();
        self.aggregator.spawn();
        eventually("the aggregator is ready again", || {
            meanwhile();
            let answer = get(self.aggregator.admin, "/readyz").ok()?;
            (answer.status == 200).then_some(())
        });
    }

    /// Ends the aggregator in order, and the agents.
    pub(super) fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(agents) = self.agents.take() {
            agents.join().expect("the agents were treated as they must be");
        }
        self.aggregator.terminate();
    }
}

/// One agent on each arm of each service, until they are told to stop.
fn talk(grpc: SocketAddr, plan: &Plan, stopped: &mpsc::Receiver<()>) {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.unwrap();
    let names = || (0..TENANTS).map(|tenant| format!("tenant-{tenant}"));
    let planned = || plan.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut speakers: Vec<(&'static str, Speaker)> = Vec::new();
    for service in planned().into_keys() {
        for arm in Arm::ALL {
            let speaker = Speaker::new(service, &format!("{service}-{arm}"), arm, names());
            speakers.push((service, speaker));
        }
    }
    let length_ms = u64::from(WINDOW_MS);
    let mut next_ms = now_ms().next_multiple_of(length_ms);
    while stopped.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
        while next_ms + length_ms <= now_ms() {
            let plan = planned();
            for (service, speaker) in &mut speakers {
                speaker.count(next_ms, WINDOW_MS, rows(plan[*service], speaker.arm()));
            }
            next_ms += length_ms;
        }
        runtime.block_on(async {
            for (_, speaker) in &mut speakers {
                // The aggregator may be down; then the agent comes back in another turn.
                speaker.turn(grpc, LISTEN).await.ok();
            }
        });
    }
}

fn rows(traffic: Traffic, arm: Arm) -> Vec<TenantRow> {
    if traffic == Traffic::Idle {
        return Vec::new();
    }
    let is_failing = traffic == Traffic::Failing && arm == Arm::Canary;
    let failed = if is_failing { REQUESTS / 5 } else { 0 };
    let row = |tenant| TenantRow {
        tenant,
        success: REQUESTS - failed,
        server_error: failed,
        ..TenantRow::default()
    };
    (0..TENANTS).map(row).collect()
}
