//! A rollout is followed with a real log and a real receiver of the webhook.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use coalmine_judge::{
    chain::Hash,
    record::{Actuation, Body, RolloutStart},
    v1::Verdict,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    Effects, despite_conflicts,
    journal::Journal,
    plan::{Again, Problem, Step, Told},
    webhook::tests::{Post, receiver, webhook},
};
use crate::{
    ledger::{Ledger, Options},
    metrics::Metrics,
    rollouts::{Overridden, State, View},
};

const DEADLINE: Duration = Duration::from_secs(30);

/// What is shown of a rollout.
fn view(decision: Option<&str>, verdict: &str, recorded: bool, state: State) -> Arc<View> {
    Arc::new(View {
        id: "r".to_owned(),
        key: "r".to_owned(),
        service: "checkout".to_owned(),
        canary_version: "v2".to_owned(),
        baseline_version: None,
        actor: "test".to_owned(),
        workload: None,
        approved: false,
        state,
        started_at: String::new(),
        start_ms: 0,
        window_ms: 1_000,
        windows_judged: 1,
        verdict: verdict.to_owned(),
        score: 0.5,
        score_ppm: 500_000,
        reason: "because".to_owned(),
        worst: None,
        worst_tenant: Some("acme".to_owned()),
        decision_id: decision.map(str::to_owned),
        decision_hash: None,
        recorded,
        confidence_ppm: None,
        agents_ppm: 1_000_000,
        traffic_ppm: 1_000_000,
        tenants_checked: 1,
        anomalies: Vec::new(),
        judge: "judge".to_owned(),
        policy: String::new(),
        ended: None,
        beneath: None,
        overridden: None,
        bootstrapped: false,
        hold_expired: false,
        decided_ms: 0,
        waits_for_ms: None,
    })
}

fn start() -> RolloutStart {
    RolloutStart {
        rollout: "r".to_owned(),
        key: "r".to_owned(),
        service: "checkout".to_owned(),
        canary_version: "v2".to_owned(),
        baseline_version: None,
        policy: Hash::ZERO,
        history: None,
        judge: "judge".to_owned(),
        max_windows: 10,
        window_ms: 1_000,
        start_ms: 0,
        actor: "test".to_owned(),
        workload: None,
    }
}

/// A rollout that is followed, with its log and its receiver.
struct Followed {
    _data: TempDir,
    ledger: Ledger,
    shown: watch::Sender<Arc<View>>,
    posts: watch::Receiver<Vec<Post>>,
    effects: Effects,
    following: JoinHandle<()>,
}

impl Followed {
    async fn begin(statuses: &'static [u16], done: Vec<Actuation>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ledger = open(data.path(), Options::default());
        Self::begin_on(data, ledger, statuses, done).await
    }

    async fn begin_on(data: TempDir, ledger: Ledger, statuses: &'static [u16], done: Vec<Actuation>) -> Self {
        let metrics = Arc::new(Metrics::new());
        ledger.begin();
        let (address, posts) = receiver(statuses).await;
        let webhook = Some(webhook(address));
        let effects = Effects::new(BTreeSet::new(), None, webhook, ledger.clone(), metrics);
        let (shown, watched) = watch::channel(view(None, "HOLD", false, State::Running));
        let following = tokio::spawn(effects.clone().follow(start(), watched, done));
        Self {
            _data: data,
            ledger,
            shown,
            posts,
            effects,
            following,
        }
    }

    fn show(&self, decision: &str, verdict: &str, recorded: bool) {
        let view = view(Some(decision), verdict, recorded, State::Running);
        self.shown.send_replace(view);
    }

    /// The process ends, and another one goes on with what is on record.
    async fn crash(&mut self) {
        self.following.abort();
        assert!((&mut self.following).await.unwrap_err().is_cancelled());
        let (effects, shown) = (self.effects.clone(), self.shown.subscribe());
        self.following = tokio::spawn(effects.follow(start(), shown, self.records()));
    }

    /// Ends the rollout, and waits until nobody follows it.
    async fn end(self) -> (Vec<Post>, Vec<(String, String)>) {
        self.shown
            .send_modify(|view| Arc::make_mut(view).state = State::Ended);
        let ended = tokio::time::timeout(DEADLINE, self.following).await;
        ended.expect("it is followed no longer").unwrap();
        let told = records(&self.ledger);
        let posts = self.posts.borrow().clone();
        (
            posts,
            told.into_iter().map(|it| (it.decision, it.stage)).collect(),
        )
    }

    async fn posted(&mut self, number: usize) {
        let posted = self.posts.wait_for(|posts| posts.len() >= number);
        tokio::time::timeout(DEADLINE, posted)
            .await
            .expect("it is posted")
            .unwrap();
    }

    /// Waits until the log says that a decision has come so far.
    async fn told(&self, decision: &str, stage: &str) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let is_it = |it: &Actuation| it.decision == decision && it.stage == stage;
        while !self.records().iter().any(is_it) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{decision} {stage} is not told: {:?}",
                self.records()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn records(&self) -> Vec<Actuation> {
        records(&self.ledger)
    }
}

fn open(data: &Path, options: Options) -> Ledger {
    let opened = Ledger::open(data, options, Arc::new(Metrics::new()), |_, _| {});
    opened.unwrap().ledger
}

/// The files of a log without evidence.
fn files(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(data).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

fn begun(decision: &str, act: &str) -> Actuation {
    Actuation {
        rollout: "r".to_owned(),
        decision: decision.to_owned(),
        target: "webhook".to_owned(),
        act: act.to_owned(),
        stage: "begun".to_owned(),
        detail: String::new(),
    }
}

fn records(ledger: &Ledger) -> Vec<Actuation> {
    let read = |seq| ledger.read(seq).unwrap();
    (0..)
        .map_while(read)
        .filter_map(|appended| match appended.record.body {
            Body::Actuation(actuation) => Some(actuation),
            _ => None,
        })
        .collect()
}

fn keys(posts: &[Post]) -> Vec<&str> {
    posts
        .iter()
        .map(|post| post.headers["idempotency-key"].to_str().unwrap())
        .collect()
}

fn pairs(told: &[(String, String)]) -> Vec<(&str, &str)> {
    told.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_of_the_verdict_acts_once_and_is_on_record_before_and_after() {
    let mut followed = Followed::begin(&[], Vec::new()).await;
    followed.show("r-1", "HOLD", true);
    followed.told("r-1", "done").await;
    followed.show("r-2", "HOLD", true);
    followed.show("r-3", "ROLLBACK", true);
    followed.told("r-3", "done").await;
    followed.crash().await;
    let (posts, told) = followed.end().await;
    assert_eq!(keys(&posts), ["r-1", "r-3"]);
    let expected = [
        ("r-1", "begun"),
        ("r-1", "done"),
        ("r-3", "begun"),
        ("r-3", "done"),
    ];
    assert_eq!(pairs(&told), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_before_a_crash_is_taken_to_its_end_under_the_same_name() {
    let mut followed = Followed::begin(&[], vec![begun("r-1", "rollback")]).await;
    followed.show("r-1", "ROLLBACK", true);
    followed.posted(1).await;
    followed.told("r-1", "done").await;
    let (posts, told) = followed.end().await;
    assert_eq!(keys(&posts), ["r-1"]);
    assert_eq!(pairs(&told), [("r-1", "done")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_rollout_that_is_over_only_what_is_open_is_done() {
    let failed = Actuation {
        stage: "failed".to_owned(),
        ..begun("r-1", "hold")
    };
    for done in [vec![], vec![begun("r-1", "hold"), failed]] {
        let followed = Followed::begin(&[], Vec::new()).await;
        let over = view(Some("r-1"), "HOLD", true, State::Ended);
        let (_shown, watched) = watch::channel(over);
        followed.effects.clone().follow(start(), watched, done).await;
        assert!(followed.posts.borrow().is_empty());
        assert_eq!(followed.records(), []);
    }
    let followed = Followed::begin(&[], Vec::new()).await;
    let over = view(Some("r-1"), "ROLLBACK", true, State::Ended);
    let (_shown, watched) = watch::channel(over);
    let open = vec![begun("r-1", "rollback")];
    followed.effects.clone().follow(start(), watched, open).await;
    assert_eq!(keys(&followed.posts.borrow()), ["r-1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_recorded_once_and_what_may_pass_is_tried_again() {
    let followed = Followed::begin(&[503, 503, 200, 400], Vec::new()).await;
    followed.show("r-1", "HOLD", true);
    followed.told("r-1", "done").await;
    // What is refused is given up, and the next verdict is told all the same.
    followed.show("r-2", "APPROVE", true);
    followed.told("r-2", "failed").await;
    followed.show("r-3", "ROLLBACK", true);
    followed.told("r-3", "done").await;
    let (posts, told) = followed.end().await;
    assert_eq!(keys(&posts), ["r-1", "r-1", "r-1", "r-2", "r-3"]);
    assert_eq!(posts[0].body, posts[2].body);
    let expected = [
        ("r-1", "begun"),
        ("r-1", "failed"),
        ("r-1", "done"),
        ("r-2", "begun"),
        ("r-2", "failed"),
        ("r-3", "begun"),
        ("r-3", "done"),
    ];
    assert_eq!(pairs(&told), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_given_up_when_the_rollout_ends() {
    let followed = Followed::begin(&[503; 9], Vec::new()).await;
    followed.show("r-1", "HOLD", true);
    followed.told("r-1", "failed").await;
    let (_, told) = followed.end().await;
    let expected = [("r-1", "begun"), ("r-1", "failed"), ("r-1", "failed")];
    assert_eq!(pairs(&told), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_log_a_rollback_acts_and_an_approval_does_not() {
    let mut followed = Followed::begin(&[], Vec::new()).await;
    followed.ledger.stop().await.unwrap();
    followed.show("r-1", "APPROVE", true);
    // Its beginning is waited for in vain.
    let posted = followed.posts.wait_for(|posts| !posts.is_empty());
    assert!(
        tokio::time::timeout(Duration::from_secs(3), posted)
            .await
            .is_err()
    );
    followed.show("r-2", "ROLLBACK", false);
    followed.posted(1).await;
    let posts = followed.posts.borrow().clone();
    assert_eq!(keys(&posts), ["r-2"]);
    let body: Value = serde_json::from_slice(&posts[0].body).unwrap();
    assert_eq!(body["verdict"], "ROLLBACK");
    assert!(body["hash"].is_null(), "{body}");
    assert!(followed.records().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_that_was_begun_is_not_ended_while_the_log_is_not_trusted() {
    let (data, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = || Options {
        checkpoint_copy: Some(copies.path().join("checkpoint")),
        ..Options::default()
    };
    // Somebody has put an older state of the log back.
    open(data.path(), options()).stop().await.unwrap();
    let older = files(data.path());
    let ledger = open(data.path(), options());
    let body = Body::Actuation(begun("r-1", "approve"));
    ledger.append(body, Vec::new()).await.unwrap();
    ledger.stop().await.unwrap();
    files(data.path())
        .keys()
        .for_each(|file| fs::remove_file(file).unwrap());
    for (file, bytes) in older {
        fs::write(file, bytes).unwrap();
    }
    let ledger = open(data.path(), options());
    assert!(ledger.trouble().is_some());

    let mut followed = Followed::begin_on(data, ledger, &[], vec![begun("r-1", "approve")]).await;
    followed.show("r-1", "APPROVE", true);
    let posted = followed.posts.wait_for(|posts| !posts.is_empty());
    let waited = tokio::time::timeout(Duration::from_secs(2), posted);
    assert!(waited.await.is_err());
    followed.show("r-2", "ROLLBACK", false);
    followed.posted(1).await;
    assert_eq!(keys(&followed.posts.borrow()), ["r-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_of_a_decision_that_was_approved_is_told_under_a_key_of_its_own() {
    let mut followed = Followed::begin(&[], Vec::new()).await;
    followed.show("r-1", "APPROVE", true);
    followed.told("r-1", "done").await;
    // The rollout cannot be judged any more.
    followed.show("r-1", "HOLD", true);
    followed.posted(2).await;
    let (posts, told) = followed.end().await;
    assert_eq!(keys(&posts), ["r-1", "r-1/hold"]);
    let (begun, done) = (("r-1", "begun"), ("r-1", "done"));
    assert_eq!(pairs(&told), [begun, done, begun, done]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_beginning_is_on_record_when_the_log_has_answered() {
    let data = tempfile::tempdir().unwrap();
    let mut journal = Journal::new(open(data.path(), Options::default()));
    let step = |decision: &str| Step {
        decision: decision.to_owned(),
        verdict: Verdict::Rollback,
    };
    journal.push(begun("r-1", "rollback"));
    assert!(!journal.has_begun(&step("r-1")));
    journal.settle().await;
    assert!(journal.has_begun(&step("r-1")));
    // What else is on its way is not waited for.
    journal.push(begun("r-2", "rollback"));
    assert!(journal.has_begun(&step("r-1")) && !journal.has_begun(&step("r-2")));
}

/// What is shown while somebody holds the rollout.
fn held(decision: &str) -> View {
    let mut view = View::clone(&view(Some(decision), "HOLD", true, State::Running));
    view.overridden = Some(Overridden {
        verdict: "HOLD".to_owned(),
        actor: "alice".to_owned(),
        reason: "I say so".to_owned(),
        judged: "HOLD".to_owned(),
    });
    view
}

#[test]
fn only_a_decision_of_a_person_that_is_in_force_is_told_as_one() {
    let order = |decision: &str, view: &View| {
        let step = Step {
            decision: decision.to_owned(),
            verdict: Verdict::Hold,
        };
        Told::of(&step, "because", view).order
    };
    let persons = held("r-override-1");
    assert_eq!(order("r-override-1", &persons).as_deref(), Some("r-override-1"));
    // A step that began before is taken to its end meanwhile.
    assert_eq!(order("r-1", &persons), None);
    // One that gives the decision back.
    let given_back = view(Some("r-override-2"), "HOLD", true, State::Running);
    assert_eq!(order("r-override-2", &given_back), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_persons_hold_over_a_hold_is_no_act_and_is_not_posted() {
    let mut followed = Followed::begin(&[], Vec::new()).await;
    followed.show("r-1", "HOLD", true);
    followed.told("r-1", "done").await;
    followed.shown.send_replace(Arc::new(held("r-override-1")));
    followed.crash().await;
    followed.show("r-2", "ROLLBACK", true);
    followed.told("r-2", "done").await;
    let (posts, told) = followed.end().await;
    assert_eq!(keys(&posts), ["r-1", "r-2"]);
    let expected = [
        ("r-1", "begun"),
        ("r-1", "done"),
        ("r-2", "begun"),
        ("r-2", "done"),
    ];
    assert_eq!(pairs(&told), expected);
}

#[tokio::test]
async fn a_conflict_is_tried_again_at_once_but_not_for_ever() {
    for (failures, again, expected) in [
        (0, Again::AtOnce, (1, true)),
        (5, Again::AtOnce, (6, true)),
        (6, Again::AtOnce, (6, false)),
        (1, Again::Soon, (1, false)),
    ] {
        let mut asked = 0;
        let result = despite_conflicts(|| {
            asked += 1;
            let fails = asked <= failures;
            async move {
                if fails {
                    Err(Problem::new("changed meanwhile", again))
                } else {
                    Ok("done".to_owned())
                }
            }
        });
        let is_done = result.await.is_ok();
        assert_eq!((asked, is_done), expected, "{failures} {again:?}");
    }
}
