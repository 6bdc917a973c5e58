//! What every deploy tool makes of our answers, by its own rule, in every state that a rollout or the aggregator can be
//! in: one table.

mod agreement;
mod site;

use std::{fs, time::Duration};

use coalmine_tests::{
    clients::{
        Poll, Reading, Server, Subject,
        argo::{self, Limits, Metric, Phase},
        ci,
        flagger::{self, Hook},
        orca::{self, Interval},
    },
    components::Aggregator,
    eventually,
    http::get,
    postgres::DATABASE,
    within,
};
use serde_json::json;

use self::site::{ASKER, AUDITOR, DEPLOYER, ELSEWHERE, NOBODY, STRANGER, Service, Site, Traffic, server};
use crate::{
    postgres::{WRITER, database},
    stage,
};

/// What each client does in each state. `errors` is counted: too many of them go back. A `!` allows everything else.
///
/// Of Flagger: the hooks `rollout`, `confirm-traffic-increase`, `confirm-promotion` and `rollback`, then `/gate/check`
/// and `/rollback/check`, then a metric. Of Argo: the providers web, prometheus, kayenta, and job at the end of its time.
/// Of Orca: an interval that is not the last one, and the last one. Then a script.
///
/// `first-one` is a HOLD without any traffic yet (Flagger calls `rollout` only once it leads some to the canary, so `-`
/// is not asked), `overdue` one that has lasted as long as it may and goes on; `approved`, `held` and `failed` have ended
/// so, which says nothing to whoever asks about the service and not about that rollout.
/// `unbegun` is a service without any rollout, `unknown` one without a policy. `denied` has no valid token, or one for
/// something else. `unnamed` and `claimed` are held until somebody decides: a rollout that does not say what it rolls
/// out, and one whose Canary is named by the rollout of another service as well, which is to go back. What counts is the
/// verdict of the service's own rollout.
const TABLE: &str = "
state      rollout raise promote back  check undo  metric web    prom   kayenta job   interval last  ci

APPROVE    goes    goes  goes    goes  goes  goes  goes   goes   goes   goes    goes  goes     goes  goes
HOLD       goes    holds holds   goes  holds goes  goes   holds  holds  holds   stops holds    holds holds
ROLLBACK   errors  holds holds   stops holds stops errors stops  stops  stops   stops stops    stops stops

first-one  -       goes  holds   goes  holds goes  goes   holds  holds  holds   stops holds    holds holds
overdue    goes    holds holds   goes  holds goes  goes   holds  holds  holds   stops goes     stops holds
unnamed    goes    holds holds   goes  holds goes  goes   holds  holds  holds   stops holds    holds holds
claimed    goes    holds holds   goes  holds goes  goes   holds  holds  holds   stops holds    holds holds

approved   errors  holds holds   goes  holds goes  goes   holds  holds  goes    stops goes     goes  holds
held       errors  holds holds   goes  holds goes  goes   holds  holds  !goes   stops stops    stops holds
failed     errors  holds holds   goes  holds goes  goes   holds  holds  stops   stops stops    stops holds

unbegun    errors  holds holds   goes  holds goes  errors errors errors errors  stops errors   errors errors
unknown    errors  holds holds   goes  holds goes  errors errors errors errors  stops errors   errors errors
denied     errors  holds holds   goes  holds goes  errors errors errors errors  stops errors   errors errors
stopped    errors  holds holds   goes  holds goes  errors errors errors errors  stops errors   errors errors
standby    errors  holds holds   goes  holds goes  errors errors errors errors  stops errors   errors errors
";

/// The cell of a client that does not ask then.
const NOT_ASKED: &str = "-";

/// A client that polls.
struct Client {
    name: &'static str,
    /// Whether what comes with a verdict names the decision.
    names_decision: bool,
    ask: fn(&Asked) -> Poll,
}

static CLIENTS: [Client; 14] = [
    Client {
        name: "rollout",
        names_decision: true,
        ask: |asked| asked.hook("/v1/flagger/rollout", Hook::Rollout),
    },
    Client {
        name: "raise",
        names_decision: true,
        ask: |asked| asked.hook("/v1/flagger/confirm-traffic-increase", Hook::TrafficIncrease),
    },
    Client {
        name: "promote",
        names_decision: true,
        ask: |asked| asked.hook("/v1/flagger/confirm-promotion", Hook::Promotion),
    },
    Client {
        name: "back",
        names_decision: true,
        ask: |asked| asked.hook("/v1/flagger/rollback", Hook::Rollback),
    },
    Client {
        name: "check",
        names_decision: true,
        ask: |asked| asked.hook("/gate/check", Hook::Promotion),
    },
    Client {
        name: "undo",
        names_decision: true,
        ask: |asked| asked.hook("/rollback/check", Hook::Rollback),
    },
    Client {
        name: "metric",
        names_decision: true,
        ask: |asked| flagger::metric(&asked.server, &asked.subject),
    },
    Client {
        name: "web",
        names_decision: true,
        ask: |asked| argo::web::measure(&asked.server, &asked.subject),
    },
    Client {
        name: "prom",
        names_decision: true,
        ask: |asked| argo::prometheus::measure(&asked.server, &asked.subject),
    },
    Client {
        name: "kayenta",
        names_decision: false,
        ask: |asked| match &asked.argo {
            Ok(execution) => argo::kayenta::poll(&asked.server, execution),
            Err(why) => Poll::failed(why.clone()),
        },
    },
    Client {
        name: "job",
        names_decision: true,
        ask: |asked| argo::job::measure(&asked.server, &asked.subject),
    },
    Client {
        name: "interval",
        names_decision: false,
        ask: |asked| asked.analysis(Interval::Early),
    },
    Client {
        name: "last",
        names_decision: false,
        ask: |asked| asked.analysis(Interval::Last),
    },
    Client {
        name: "ci",
        names_decision: true,
        ask: |asked| ci::ask(&asked.server, &asked.subject),
    },
];

/// A subject that every client asks about; those that begin something have begun it.
#[derive(Debug, Clone)]
struct Asked {
    server: Server,
    subject: Subject,
    /// The executions of Argo's kayenta provider and of Orca.
    argo: Result<String, String>,
    orca: Result<String, String>,
}

impl Asked {
    fn begin(server: &Server, service: &str) -> Self {
        let subject = subject(service);
        Self {
            server: server.clone(),
            argo: argo::kayenta::begin(server, &subject),
            orca: orca::begin(server, &subject),
            subject,
        }
    }

    /// The same with executions of a rollout that there never was.
    fn made_up(server: &Server, service: &str) -> Self {
        let execution = Ok(format!("{service}-v2-1700000000.95.75"));
        Self {
            server: server.clone(),
            argo: execution.clone(),
            orca: execution,
            subject: subject(service),
        }
    }

    /// The same, by somebody else or elsewhere.
    fn by(&self, server: Server) -> Self {
        Self {
            server,
            ..self.clone()
        }
    }

    fn hook(&self, path: &str, hook: Hook) -> Poll {
        flagger::call(&self.server, &self.subject, path, hook)
    }

    fn analysis(&self, interval: Interval) -> Poll {
        match &self.orca {
            Ok(execution) => orca::poll(&self.server, execution, interval),
            Err(why) => Poll::failed(why.clone()),
        }
    }
}

fn subject(service: &str) -> Subject {
    Subject {
        service: service.to_owned(),
        version: "v2".to_owned(),
        namespace: "shop".to_owned(),
    }
}

/// The cells of a state.
fn row(state: &str) -> Vec<(&'static Client, &'static str)> {
    let rows: Vec<Vec<&str>> = TABLE
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let find = |name: &str| {
        let found = rows.iter().find(|row| row.first() == Some(&name));
        &found.unwrap_or_else(|| panic!("the table has no row {name}"))[1..]
    };
    let names: Vec<&str> = CLIENTS.iter().map(|client| client.name).collect();
    assert_eq!(find("state"), names, "the table's columns are the clients");
    CLIENTS.iter().zip(find(state).iter().copied()).collect()
}

/// Whether a poll is what a cell says.
fn fits(cell: &str, poll: &Poll) -> bool {
    match cell.strip_prefix('!') {
        Some(other) => poll.reading.word() != other,
        None => poll.reading.word() == cell,
    }
}

/// Has every client ask once; gives what is not as in the table.
fn differences(state: &str, asked: &Asked) -> Vec<String> {
    let mut found = Vec::new();
    for (client, cell) in row(state).into_iter().filter(|(_, cell)| *cell != NOT_ASKED) {
        let poll = (client.ask)(asked);
        if !fits(cell, &poll) {
            let service = &asked.subject.service;
            found.push(format!(
                "{state}, {service}: {}: not {cell}, but {poll:?}",
                client.name
            ));
        }
    }
    found
}

const HOLDS_LONG: &str = "hold_deadline: 1h";

/// Services whose rollouts come to a state and stay there, with the row of that state.
const STATES: [(Service, &str); 10] = [
    (
        Service::new("approved", HOLDS_LONG, 3, Some(Traffic::Healthy)),
        "APPROVE",
    ),
    (
        Service::new("failing", HOLDS_LONG, 3, Some(Traffic::Failing)),
        "ROLLBACK",
    ),
    (
        Service::new("held", HOLDS_LONG, 1_000_000, Some(Traffic::Healthy)),
        "HOLD",
    ),
    // Nothing is known of it.
    (Service::new("silent", HOLDS_LONG, 3, None), "HOLD"),
    // Its agents are there, and nobody has come yet.
    (
        Service::new("waiting", HOLDS_LONG, 3, Some(Traffic::Idle)),
        "first-one",
    ),
    (
        Service::new("late-rollback", "hold_deadline: 3s", 3, None),
        "ROLLBACK",
    ),
    (
        Service::new("late-hold", "hold_deadline: 3s\n  on_deadline: hold", 3, None),
        "overdue",
    ),
    (
        Service::new(
            "late-approve",
            "hold_deadline: 4s\n  on_deadline: approve",
            1_000_000,
            Some(Traffic::Healthy),
        ),
        "APPROVE",
    ),
    (UNNAMED, "unnamed"),
    (CLAIMED, "claimed"),
];

/// A service whose rollout does not say what it rolls out.
const UNNAMED: Service = Service::new("unnamed", HOLDS_LONG, 3, None);

/// A service whose Canary the rollout of another one names.
const CLAIMED: Service = Service::new("claimed", HOLDS_LONG, 3, None);

/// That other one.
const CLAIMANT: Service = Service::new("claimant", HOLDS_LONG, 3, None);

/// The verdict of a state.
fn verdict(state: &str) -> &str {
    match state {
        "first-one" | "overdue" | "unnamed" | "claimed" => "HOLD",
        verdict => verdict,
    }
}

/// A rollout of a service, and who asks about it.
struct Trial {
    service: &'static str,
    state: &'static str,
    rollout: String,
    asked: Asked,
}

impl Trial {
    fn begin(site: &Site, service: &Service, state: &'static str) -> Self {
        let canary = (service.name != UNNAMED.name).then_some(service.name);
        let rollout = site.roll_out_of(service.name, "1", canary);
        Self {
            service: service.name,
            state,
            rollout,
            asked: Asked::begin(&site.server(DEPLOYER), service.name).by(site.server(ASKER)),
        }
    }

    /// What is not as in the table, while it has the verdict of a state.
    fn differs(&self, site: &Site, state: &str) -> Vec<String> {
        if state == "overdue" {
            eventually("the hold deadline is over", || {
                let view = site.get(&format!("/v1/rollouts/{}", self.rollout))?;
                (view["hold_expired"] == true).then_some(())
            });
        }
        let wanted = Some(verdict(state));
        let (_, found) = site.while_it_says(&self.rollout, wanted, &["verdict"], |_| {
            differences(state, &self.asked)
        });
        found
    }
}

/// What is not as it must be of a metric of Argo's web provider that is measured so, one after the other.
fn unlike(wanted: &str, limits: Limits, measured: &[&Asked]) -> Option<String> {
    let mut metric = Metric::new(limits);
    let mut phase = Phase::Running;
    for asked in measured {
        let poll = argo::web::measure(&asked.server, &asked.subject);
        phase = metric.measured(Phase::from(&poll.reading));
        if phase != Phase::Running {
            break;
        }
    }
    let told = format!("{phase:?}");
    (!told.starts_with(wanted)).then(|| format!("a metric with {limits:?}: not {wanted}, but {told}"))
}

/// A service that has a policy, and of which nobody has begun a rollout.
const UNBEGUN: Service = Service::new("unbegun", HOLDS_LONG, 3, None);

/// What is told where there is no rollout: to Flagger a status that is no verdict and that it asks again after, to
/// everybody else that there is none.
const THERE_IS_NONE: [(&str, &str); 8] = [
    ("rollout", "giving up after 3 attempt(s)"),
    ("metric", "status 404"),
    ("web", "404"),
    ("prom", "404"),
    ("kayenta", "404"),
    ("interval", "404"),
    ("last", "404"),
    ("ci", "64"),
];

/// What is told otherwise.
fn told_otherwise(asked: &Asked) -> Vec<String> {
    let mut found = Vec::new();
    for (name, told) in THERE_IS_NONE {
        let client = CLIENTS.iter().find(|client| client.name == name).unwrap();
        let poll = (client.ask)(asked);
        let is_told = matches!(&poll.reading, Reading::Errors(why) if why.contains(told));
        if !is_told {
            found.push(format!("unbegun: {name}: not {told}, but {poll:?}"));
        }
    }
    found
}

/// What whoever may see only other services is told of this one.
fn told_to_strangers(site: &Site, trial: &Trial) -> Vec<String> {
    let mut found = Vec::new();
    let verdict =
        |label: &str, value: &str| format!("query?query=coalmine_verdict%7B{label}=%22{value}%22%7D");
    for (path, status) in [
        (verdict("canary", trial.service), 404),
        (verdict("rollout", &trial.rollout), 404),
        (verdict("service", trial.service), 401),
        ("query?query=coalmine_tenant_score".to_owned(), 200),
        ("series?match[]=coalmine_verdict".to_owned(), 200),
        ("label/service/values".to_owned(), 200),
    ] {
        let path = format!("/api/v1/{path}");
        let answer = site.ask_as(ELSEWHERE, &path);
        // Errors say again what was asked for, once.
        let is_named = [trial.service, trial.rollout.as_str()]
            .into_iter()
            .any(|name| answer.body.matches(name).count() > path.matches(name).count());
        if answer.status != status || is_named {
            found.push(format!(
                "{path}: not {status}, but {} {}",
                answer.status, answer.body
            ));
        }
    }
    found
}

/// Kills the aggregator and starts it again; gives what goes on meanwhile although it is held.
fn goes_on_while_it_restarts(site: &mut Site, held: &Asked) -> Vec<String> {
    let mut found = Vec::new();
    let clients: Vec<_> = row("HOLD")
        .into_iter()
        .filter(|(client, cell)| *cell == "holds" && client.name != "job")
        .collect();
    site.restart(|| {
        for (client, _) in &clients {
            let poll = (client.ask)(held);
            if poll.reading == Reading::Goes {
                found.push(format!("not ready yet: {}: {poll:?}", client.name));
            }
        }
    });
    found
}

#[test]
fn every_client_does_what_the_verdict_means_in_every_state() {
    let _stage = stage();
    let mut services = STATES.map(|(service, _)| service).to_vec();
    services.extend([UNBEGUN, CLAIMANT]);
    let mut site = Site::start(&services);
    let claim = site.roll_out_of(CLAIMANT.name, "1", Some(CLAIMED.name));
    site.decide(&claim, Some("rollback"));
    let trials: Vec<Trial> = STATES
        .into_iter()
        .map(|(service, state)| Trial::begin(&site, &service, state))
        .collect();
    let trial = |name: &str| {
        let found = trials.iter().find(|trial| trial.service == name);
        found.unwrap_or_else(|| panic!("no service {name}"))
    };
    let mut wrong = Vec::new();
    for trial in &trials {
        wrong.extend(trial.differs(&site, trial.state));
    }

    // What an operator decides is as good as what the judge does.
    let decisions = [
        ("approved", "hold", "HOLD"),
        ("failing", "approve", "APPROVE"),
        ("held", "rollback", "ROLLBACK"),
        ("unnamed", "approve", "APPROVE"),
        ("unnamed", "rollback", "ROLLBACK"),
        ("claimed", "approve", "APPROVE"),
        ("claimed", "rollback", "ROLLBACK"),
    ];
    for (service, decision, state) in decisions {
        let trial = trial(service);
        site.decide(&trial.rollout, Some(decision));
        wrong.extend(trial.differs(&site, state));
        site.decide(&trial.rollout, None);
        wrong.extend(trial.differs(&site, trial.state));
    }

    // Executions that were begun before a crash go on after it. The first increase depends on who is back already.
    wrong.extend(goes_on_while_it_restarts(&mut site, &trial("held").asked));
    for trial in trials.iter().filter(|trial| trial.state != "first-one") {
        wrong.extend(trial.differs(&site, trial.state));
    }

    // Many measurements: HOLD is waited for, one ROLLBACK aborts.
    let [approved, held, failing] = ["approved", "held", "failing"].map(|name| &trial(name).asked);
    let patient = Limits::PATIENT;
    let waits = [held, held, approved, held, approved, approved];
    wrong.extend(unlike("Successful", patient, &waits));
    wrong.extend(unlike("Failed", patient, &[held, approved, failing]));

    for token in [NOBODY, STRANGER, AUDITOR, ELSEWHERE] {
        wrong.extend(differences("denied", &approved.by(site.server(token))));
    }
    wrong.extend(told_to_strangers(&site, trial("approved")));
    let unbegun = Asked::made_up(&site.server(ASKER), UNBEGUN.name);
    wrong.extend(differences("unbegun", &unbegun));
    wrong.extend(told_otherwise(&unbegun));
    wrong.extend(differences(
        "unknown",
        &Asked::begin(&site.server(DEPLOYER), "nobody"),
    ));

    for (service, state) in [("approved", "approved"), ("held", "held"), ("failing", "failed")] {
        site.end(&trial(service).rollout);
        wrong.extend(differences(state, &trial(service).asked));
    }

    site.stop();
    wrong.extend(differences("stopped", approved));
    // The outage that a metric bears.
    wrong.extend(unlike("Running", Limits::DEFAULT, &[approved; 4]));
    wrong.extend(unlike("Error", Limits::DEFAULT, &[approved; 5]));
    wrong.extend(unlike("Running", patient, &[approved; 30]));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// How long the next owner may take: a lease of 15 s may have to end.
const TAKEOVER: Duration = Duration::from_secs(90);

#[test]
fn whoever_does_not_own_the_log_gives_no_verdict_and_the_next_owner_gives_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let postgres = database(directory.path());
    let url = postgres.url(WRITER, DATABASE);
    let [mut owner, mut standby] = ["first", "second"].map(|name| {
        let own = directory.path().join(name);
        fs::create_dir(&own).unwrap();
        Aggregator::prepare(&own).with_arguments(&["--postgres", &url, "--instance", name])
    });
    owner.launch();
    let path = format!("/v1/rollouts/{}/override", owner.start_rollout());
    let answer = owner.post(
        &path,
        &json!({ "verdict": "approve", "reason": "the test says so" }),
    );
    assert_eq!(answer.status, 200, "{}", answer.body);
    let asked = Asked::begin(&server(owner.http, None), "checkout");
    let mut wrong = differences("APPROVE", &asked);

    // It has the same key, and waits for its turn once it has its directory.
    fs::create_dir(&standby.data).unwrap();
    fs::copy(owner.data.join("key"), standby.data.join("key")).unwrap();
    standby.spawn();
    eventually("the second has its directory", || {
        (fs::read_dir(&standby.data).unwrap().count() > 1).then_some(())
    });
    // Its port is shut, so nobody waits.
    wrong.extend(differences("standby", &asked.by(server(standby.http, None))));
    assert_eq!(standby.ended(), None, "the second waits");

    owner.terminate();
    within(TAKEOVER, "the second takes over", || {
        let answer = get(standby.admin, "/readyz").ok()?;
        (answer.status == 200).then_some(())
    });
    wrong.extend(differences("APPROVE", &asked.by(server(standby.http, None))));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
