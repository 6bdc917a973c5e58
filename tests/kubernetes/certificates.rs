//! The webhook's certificate: renewed while pods are created, and no pod goes without its agent for it.
//!
//! The webhook's failures are ignored by the API server, so a pod that was created while the certificate did not fit
//! would be there without an agent. That is what is looked for.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use coalmine_tests::{kubernetes::Cluster, tools::openssl, within};
use serde_json::{Value, json};

use crate::scene::{CONFIGURATION, PODS, SECRET, Scene, decoded, entry, has_agent, pod};

/// The annotation of the Secret that says since when the newest authority is in the configuration (seconds since the
/// Unix epoch), and which authority that is.
const MARK: &str = "coalmine.dev/ca-published";

/// An authority that has been in the configuration for so long signs, and a while more.
const SETTLED_SECONDS: u64 = 700;

/// Between two pods.
const EVERY: Duration = Duration::from_millis(20);

/// So many pods are created after all seems to be right again.
const MORE: u32 = 200;

/// How long the aggregator may take to see that the Secret or the configuration was changed by somebody else.
const SEEN_WITHIN: Duration = Duration::from_secs(120);

/// What is changed, and how it is told that it was put right.
type Change<'a> = &'a dyn Fn(&Scene) -> Box<dyn Fn(&Cluster) -> bool>;

/// The pods that were created so far.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    created: AtomicU32,
    without_agent: AtomicU32,
}

/// In the order in which one follows from the other: the last has API servers shake hands with what came of the others.
#[test]
fn no_pod_goes_without_an_agent_while_the_certificate_is_renewed() {
    let scene = Scene::install(&["webhook"]);
    let _aggregator = scene.injecting(&[]);
    let changes: [(&str, Change<'_>); 4] = [
        ("a leaf that is too old is renewed", &make_the_leaf_old),
        ("an emptied Secret is filled", &empty_the_secret),
        ("the new authority signs", &let_the_authority_settle),
        ("a reset caBundle is put back", &reset_the_bundle),
    ];
    let load = Load::default();
    thread::scope(|scope| {
        let creating = scope.spawn(|| load.run(&scene));
        // Ends the load however this ends, since it is waited for.
        let ends = Ends(&load.over);
        for (what, change) in changes {
            under_load(&scene, &load, what, change);
        }
        drop(ends);
        creating.join().unwrap();
    });
    // Also of those that were created after the last look.
    assert_eq!(load.without_agent.into_inner(), 0);
}

/// Changes something while pods are created; waits until it is put right, and for a while longer.
fn under_load(scene: &Scene, load: &Load, what: &str, change: Change<'_>) {
    let is_right = change(scene);
    within(SEEN_WITHIN, what, || is_right(&scene.cluster).then_some(()));
    // Servers go on with what they knew for a moment.
    let enough = load.created.load(Ordering::Relaxed) + MORE;
    within(SEEN_WITHIN, "some more pods are created", || {
        (load.created.load(Ordering::Relaxed) >= enough).then_some(())
    });
    let without = load.without_agent.load(Ordering::Relaxed);
    assert_eq!(without, 0, "{what}: so many pods have no agent");
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Load {
    /// Creates pods, one each [`EVERY`], until it is over.
    fn run(&self, scene: &Scene) {
        let path = format!("{PODS}?dryRun=All");
        let mut next = Instant::now();
        while !self.over.load(Ordering::Relaxed) {
            // A dry run asks the webhook like any other, and leaves nothing behind.
            let answer = scene.cluster.request("POST", &path, &pod("load", "canary"));
            assert_eq!(answer.status, 201, "{}", answer.body);
            let is_without = !has_agent(&answer.json());
            self.without_agent
                .fetch_add(u32::from(is_without), Ordering::Relaxed);
            self.created.fetch_add(1, Ordering::Relaxed);
            next += EVERY;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}

fn empty_the_secret(scene: &Scene) -> Box<dyn Fn(&Cluster) -> bool> {
    let before = entry(&scene.cluster.get(SECRET), "ca.crt");
    // Replaced, since a merge keeps what it does not name.
    let mut secret = scene.cluster.get(SECRET);
    secret["data"] = json!({});
    replace(&scene.cluster, &secret);
    Box::new(move |cluster| {
        let secret = cluster.get(SECRET);
        let now = entry(&secret, "ca.crt");
        let newest = certificate_of(&now);
        let is_published = !newest.is_empty() && now != before && bundle(cluster).contains(&newest);
        is_published && mark(&secret).is_some()
    })
}

/// Has the new authority in the configuration for longer than it must be there before it signs.
fn let_the_authority_settle(scene: &Scene) -> Box<dyn Fn(&Cluster) -> bool> {
    let secret = scene.cluster.get(SECRET);
    let before = entry(&secret, "tls.crt");
    let (since, authority) = mark(&secret).unwrap();
    let earlier = format!("{} {authority}", since - SETTLED_SECONDS);
    let patch = json!({ "metadata": { "annotations": { MARK: earlier } } });
    scene.cluster.patch(SECRET, &patch);
    let directory = scene.cluster.file("settled");
    fs::create_dir(&directory).unwrap();
    Box::new(move |cluster| {
        let secret = cluster.get(SECRET);
        let now = entry(&secret, "tls.crt");
        if now.is_empty() || certificate_of(&now) == certificate_of(&before) {
            return false;
        }
        let newest = certificate_of(&entry(&secret, "ca.crt"));
        fs::write(directory.join("newest.pem"), newest).unwrap();
        fs::write(directory.join("leaf.pem"), now).unwrap();
        openssl(&directory, "verify -CAfile newest.pem leaf.pem");
        true
    })
}

fn reset_the_bundle(scene: &Scene) -> Box<dyn Fn(&Cluster) -> bool> {
    let whole = bundle(&scene.cluster);
    let mut configuration = scene.cluster.get(CONFIGURATION);
    // Not emptied, which would be a failure of the test's own making: another authority is put before ours.
    let other = scene.cluster.file("other");
    fs::create_dir(&other).unwrap();
    let text = format!("{}{whole}", authority(&other));
    configuration["webhooks"][0]["clientConfig"]["caBundle"] = json!(STANDARD.encode(text));
    let answer = scene.cluster.request("PUT", CONFIGURATION, &configuration);
    assert_eq!(answer.status, 200, "{}", answer.body);
    Box::new(move |cluster| bundle(cluster) == whole)
}

/// Puts a leaf in the Secret's place that the same authority has signed 80 days ago, for 90.
fn make_the_leaf_old(scene: &Scene) -> Box<dyn Fn(&Cluster) -> bool> {
    let directory = scene.cluster.file("old-leaf");
    fs::create_dir(&directory).unwrap();
    let mut secret = scene.cluster.get(SECRET);
    for name in ["ca.crt", "ca.key", "tls.key"] {
        let mut text = entry(&secret, name);
        if name == "ca.crt" {
            text = certificate_of(&text);
        }
        fs::write(directory.join(name), text).unwrap();
    }
    let old = old_leaf(&directory);
    secret["data"]["tls.crt"] = json!(STANDARD.encode(&old));
    replace(&scene.cluster, &secret);
    Box::new(move |cluster| {
        let now = entry(&cluster.get(SECRET), "tls.crt");
        !now.is_empty() && certificate_of(&now) != certificate_of(&old)
    })
}

fn replace(cluster: &Cluster, secret: &Value) {
    let answer = cluster.request("PUT", SECRET, secret);
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn bundle(cluster: &Cluster) -> String {
    decoded(&cluster.get(CONFIGURATION)["webhooks"][0]["clientConfig"]["caBundle"])
}

/// Since when the newest authority is in the configuration, and its name.
fn mark(secret: &Value) -> Option<(u64, String)> {
    let (since, authority) = secret["metadata"]["annotations"][MARK]
        .as_str()?
        .split_once(' ')?;
    Some((since.parse().unwrap(), authority.to_owned()))
}

/// The first certificate of a bundle, without the line break after it.
fn certificate_of(text: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    text.split_once(END)
        .map_or_else(String::new, |(before, _)| format!("{before}{END}"))
}

fn authority(directory: &Path) -> String {
    openssl(
        directory,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout other.key -out other.pem -subj /CN=other -days 2",
    );
    fs::read_to_string(directory.join("other.pem")).unwrap()
}

fn old_leaf(directory: &Path) -> String {
    let configuration = "[ca]\ndefault_ca = ours\n[ours]\ndatabase = index\nserial = serial\nnew_certs_dir = .\n\
                         default_md = sha256\npolicy = any\nunique_subject = no\ncopy_extensions = copy\n[any]\n\
                         commonName = optional\n[leaf]\nbasicConstraints = CA:FALSE\nextendedKeyUsage = serverAuth\n\
                         subjectAltName = DNS:coalmine.coalmine.svc,DNS:coalmine.coalmine.svc.cluster.local\n";
    fs::write(directory.join("ca.conf"), configuration).unwrap();
    fs::write(directory.join("index"), "").unwrap();
    fs::write(directory.join("serial"), "1001\n").unwrap();
    openssl(
        directory,
        "req -new -key tls.key -subj /CN=coalmine.coalmine.svc -out old.csr",
    );
    let (from, to) = (date("-80 days"), date("+10 days"));
    openssl(
        directory,
        &format!(
            "ca -batch -notext -config ca.conf -cert ca.crt -keyfile ca.key -extensions leaf -startdate {from} \
             -enddate {to} -in old.csr -out old.pem"
        ),
    );
    fs::read_to_string(directory.join("old.pem")).unwrap()
}

/// A day counted from today, as openssl reads it.
fn date(days: &str) -> String {
    let mut command = Command::new("date");
    command.args(["-u", "-d", days, "+%Y%m%d%H%M%SZ"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "date -d {days}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
