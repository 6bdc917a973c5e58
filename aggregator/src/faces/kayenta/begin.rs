//! Which rollout a request means, and whether it has to be begun.
//!
//! Whoever asks this face never says that a rollout is over, and asks again and again during one. So:
//!
//! * The open rollout of the version is the one that is meant, whoever began it.
//! * All that one pipeline execution asks about one version is one rollout, by its key. Another execution is another
//!   attempt: it ends what an earlier one has begun here.
//! * Without a pipeline (Argo) an attempt lasts as long as its rollout is open. One that was rolled back stays so until
//!   somebody ends it, or another version comes; after one that cannot be judged any more another attempt is begun.
//! * Another version ends what this face has begun of an earlier one, once agents report it or none report the earlier
//!   one any more. What others have begun is theirs to end.
//! * The hash of a pod template, of a workload that is named, stands for the version of the canary's agents if that is
//!   one and none reports the hash itself: of the open rollout, whose workload must not be another, or of the one that
//!   is begun. Without connected agents nobody knows what it stands for, and the caller has to ask again: what was
//!   approved before must not pass for what comes next.

use std::{collections::BTreeSet, sync::Arc};

use coalmine_judge::chain::Hash;
use coalmine_proto::names::check_name;

use super::{
    execution::is_dead,
    scope::{Place, Trial},
};
use crate::{
    faces::Faces,
    rollouts::{RolloutError, StartRequest, State, View},
};

/// Begins the key of each rollout that this face begins.
const KEY: &str = "kayenta/";

/// Who asks about what.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) service: String,
    pub(super) trial: Trial,
    /// The execution of a pipeline that asks, if one does.
    pub(super) pipeline: Option<String>,
    pub(super) actor: String,
}

/// A rollout of the service that is kept.
#[derive(Debug)]
struct Known<'v> {
    id: &'v str,
    key: &'v str,
    version: &'v str,
    /// Namespace and name.
    workload: Option<(&'v str, &'v str)>,
    is_open: bool,
    /// It cannot be judged any more.
    is_dead: bool,
}

/// What has to be done.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is this one.
    Is(String),
    Begin {
        /// The rollout that is over by that.
        after: Option<String>,
        version: String,
        baseline: Option<String>,
        key: String,
    },
}

/// Whether this face has begun a rollout.
pub(super) fn is_begun_here(view: &View) -> bool {
    view.key.starts_with(KEY)
}

/// The rollout that is meant; it is begun if there is none. Asking again finds the same.
pub(super) async fn settle(faces: Faces, question: Question) -> Result<Arc<View>, RolloutError> {
    let (version, place, baseline) = match &question.trial {
        Trial::Rollout(id) => return named(&faces, &question.service, id),
        Trial::Version {
            version,
            place,
            baseline,
        } => (version, place.as_ref(), baseline.as_ref()),
    };
    let canaries = faces.book().canaries(&question.service);
    let connected = canaries.iter().filter(|canary| canary.connected);
    let reported: BTreeSet<&str> = connected.map(|canary| canary.version.as_str()).collect();
    let views = faces.rollouts.list();
    let known: Vec<Known<'_>> = views
        .iter()
        .filter(|view| view.service == question.service)
        .map(|view| Known::of(view))
        .collect();
    let wanted = Wanted {
        service: &question.service,
        version,
        place,
        baseline: baseline.map(String::as_str),
        pipeline: question.pipeline.as_deref(),
    };
    match wanted.step(&known, &reported).map_err(RolloutError::Conflict)? {
        Step::Is(id) => faces.rollouts.view(&id),
        Step::Begin {
            after,
            version,
            baseline,
            key,
        } => {
            if let Some(over) = after {
                let reason = format!("an analysis of {version} was asked for by another attempt");
                faces.rollouts.end(&over, question.actor.clone(), reason).await?;
            }
            let request = StartRequest {
                service: question.service,
                canary_version: version,
                baseline_version: baseline,
                key: Some(key),
                actor: Some(question.actor),
                workload: None,
            };
            faces.rollouts.start(request).await.map(|(view, _)| view)
        }
    }
}

fn named(faces: &Faces, service: &str, id: &str) -> Result<Arc<View>, RolloutError> {
    let view = faces.rollouts.view(id)?;
    if view.service != service {
        return Err(RolloutError::Invalid(format!(
            "rollout {id} is of service {}, and the canary config is that of {service}",
            view.service
        )));
    }
    Ok(view)
}

impl<'v> Known<'v> {
    fn of(view: &'v View) -> Self {
        let workload = view.workload.as_ref();
        Self {
            id: &view.id,
            key: &view.key,
            version: &view.canary_version,
            workload: workload.map(|workload| (workload.namespace.as_str(), workload.name.as_str())),
            is_open: view.state != State::Ended,
            is_dead: is_dead(view),
        }
    }
}

/// The canary that a question is about, and who asks.
#[derive(Debug, Clone, Copy)]
struct Wanted<'q> {
    service: &'q str,
    version: &'q str,
    place: Option<&'q Place>,
    baseline: Option<&'q str>,
    pipeline: Option<&'q str>,
}

impl Wanted<'_> {
    /// What to do, or what stands in the way. `reported` are the versions of the canary's connected agents.
    fn step(&self, known: &[Known<'_>], reported: &BTreeSet<&str>) -> Result<Step, String> {
        if self.pipeline.is_some() {
            let key = self.key(known);
            if let Some(begun) = known.iter().find(|rollout| rollout.key == key) {
                return Ok(Step::Is(begun.id.to_owned()));
            }
        }
        let Some(open) = known.iter().find(|rollout| rollout.is_open) else {
            return self.begin(None, known, reported);
        };
        let is_ours = open.key.starts_with(KEY);
        if self.means(open, reported)? {
            return if is_ours && (self.pipeline.is_some() || open.is_dead) {
                self.begin(Some(open), known, reported)
            } else {
                Ok(Step::Is(open.id.to_owned()))
            };
        }
        let Some(version) = self.stands_for(reported) else {
            return Err(format!(
                "no agent reports {} as its version, and the open rollout {} is of {}; ask again when the canary's agents \
                 are connected, or name the version that they report ({})",
                self.version,
                open.id,
                open.version,
                list(reported)
            ));
        };
        if is_ours && (reported.contains(version) || !reported.contains(open.version)) {
            return self.begin(Some(open), known, reported);
        }
        Err(format!(
            "rollout {} of {} {} is still open; end it with `coalmine rollout end {0}`, then ask again",
            open.id, self.service, open.version
        ))
    }

    /// Whether the open rollout is the one; an error if it is the version's and somewhere else.
    fn means(&self, open: &Known<'_>, reported: &BTreeSet<&str>) -> Result<bool, String> {
        let is_the_version = open.version == self.version;
        let is_the_only_one = reported.len() == 1 && reported.contains(open.version);
        let is_stood_for = self.is_unreported_hash(reported) && is_the_only_one;
        if !is_the_version && !is_stood_for {
            return Ok(false);
        }
        match (open.workload, self.place) {
            (Some((namespace, workload)), Some(place))
                if namespace != place.namespace || workload != place.workload =>
            {
                Err(format!(
                    "rollout {} of {} {} is that of {namespace}/{workload}, and not of {}/{}; end it with `coalmine rollout end \
                 {0}`, or give the experiment's scope without a place",
                    open.id, self.service, open.version, place.namespace, place.workload
                ))
            }
            _ => Ok(true),
        }
    }

    fn begin(
        &self,
        after: Option<&Known<'_>>,
        known: &[Known<'_>],
        reported: &BTreeSet<&str>,
    ) -> Result<Step, String> {
        let Some(version) = self.stands_for(reported) else {
            return Err(format!(
                "no agent reports {} as its version, and those of the canary that are connected report: {}; ask again \
                 when they are, or name the version that they report",
                self.version,
                list(reported)
            ));
        };
        // Where the version is a hash, so is the baseline's, and its agents do not report that either.
        let baseline = self.baseline.filter(|_| version == self.version);
        Ok(Step::Begin {
            after: after.map(|rollout| rollout.id.to_owned()),
            version: version.to_owned(),
            baseline: baseline.map(str::to_owned),
            key: self.key(known),
        })
    }

    /// The key of the attempt: the same for whatever belongs to it, and of no rollout that is over.
    fn key(&self, known: &[Known<'_>]) -> String {
        let (service, version) = (self.service, self.version);
        if let Some(pipeline) = self.pipeline {
            return fitting(format!("{KEY}{service}/{version}/by/{pipeline}"));
        }
        let mut number = 1_u64;
        loop {
            let key = fitting(format!("{KEY}{service}/{version}/{number}"));
            if !known.iter().any(|rollout| rollout.key == key) {
                return key;
            }
            number += 1;
        }
    }

    /// The version that is meant; none if it is a hash of which nobody knows what it stands for.
    fn stands_for<'v>(&'v self, reported: &BTreeSet<&'v str>) -> Option<&'v str> {
        match (self.is_unreported_hash(reported), reported.len()) {
            (false, _) => Some(self.version),
            (true, 1) => reported.first().copied(),
            (true, _) => None,
        }
    }

    /// Whether the version is a hash that no agent reports. A version without a place may look like a hash and is none:
    /// whoever has a hash knows whose it is.
    fn is_unreported_hash(&self, reported: &BTreeSet<&str>) -> bool {
        self.place.is_some() && is_template_hash(self.version) && !reported.contains(self.version)
    }
}

/// A key that may stand in records: as it is, or by its hash.
fn fitting(key: String) -> String {
    match check_name(key.as_bytes()) {
        Ok(_) => key,
        Err(_) => format!("{KEY}{}", Hash::of(key.as_bytes())),
    }
}

/// Whether it looks like the hash of a pod template: 32 bits in decimal, each digit written as one of ten characters
/// (apimachinery `rand.SafeEncodeString`; Argo and Deployments do it alike). Fewer than six digits are too rare to be
/// meant.
fn is_template_hash(version: &str) -> bool {
    let is_digit = |byte| matches!(byte, b'4'..=b'9' | b'b' | b'c' | b'd' | b'f');
    (6..=10).contains(&version.len()) && version.bytes().all(is_digit)
}

fn list(versions: &BTreeSet<&str>) -> String {
    if versions.is_empty() {
        return "none".to_owned();
    }
    let versions: Vec<_> = versions.iter().copied().take(10).collect();
    versions.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "6d4f8b9c7d";

    fn wanted<'q>(version: &'q str, pipeline: Option<&'q str>) -> Wanted<'q> {
        Wanted {
            service: "checkout",
            version,
            place: None,
            baseline: Some("v1"),
            pipeline,
        }
    }

    /// By key and version, open unless it is said otherwise; the key is the name too.
    fn rollout<'v>(key: &'v str, version: &'v str) -> Known<'v> {
        Known {
            id: key,
            key,
            version,
            workload: None,
            is_open: true,
            is_dead: false,
        }
    }

    fn dead<'v>(key: &'v str, version: &'v str) -> Known<'v> {
        Known {
            is_dead: true,
            ..rollout(key, version)
        }
    }

    fn ended<'v>(key: &'v str, version: &'v str) -> Known<'v> {
        Known {
            is_open: false,
            ..rollout(key, version)
        }
    }

    /// `=` and the rollout that it is, `+` and the key, version and baseline of one that is begun, with `-` and what ends
    /// before, or what stands in the way.
    fn told(wanted: Wanted<'_>, known: &[Known<'_>], reported: &[&str]) -> String {
        match wanted.step(known, &reported.iter().copied().collect()) {
            Ok(Step::Is(id)) => format!("={id}"),
            Ok(Step::Begin {
                after,
                version,
                baseline,
                key,
            }) => {
                let after = after.map_or_else(String::new, |id| format!("-{id} "));
                format!("{after}+{key} {version} {}", baseline.as_deref().unwrap_or("all"))
            }
            Err(problem) => problem,
        }
    }

    fn place(workload: &str) -> Place {
        Place {
            namespace: "shop".to_owned(),
            workload: workload.to_owned(),
        }
    }

    #[test]
    fn what_is_meant_is_found_or_begun() {
        let here = place("checkout");
        let argo = |version| wanted(version, None);
        let by_hash = || Wanted {
            place: Some(&here),
            ..argo(HASH)
        };
        let orca = |version| wanted(version, Some("P2"));
        let (first, second) = ("kayenta/checkout/v2/1", "kayenta/checkout/v2/2");
        let (earlier, same) = ("kayenta/checkout/v2/by/P1", "kayenta/checkout/v2/by/P2");
        for (name, wanted, known, reported, expected) in [
            (
                "nothing",
                argo("v2"),
                vec![],
                vec![],
                "+kayenta/checkout/v2/1 v2 v1",
            ),
            (
                "again",
                argo("v2"),
                vec![rollout(first, "v2")],
                vec![],
                "=kayenta/checkout/v2/1",
            ),
            ("of others", argo("v2"), vec![rollout("x", "v2")], vec![], "=x"),
            (
                "over, and again",
                argo("v2"),
                vec![ended(first, "v2")],
                vec![],
                "+kayenta/checkout/v2/2 v2 v1",
            ),
            (
                "it cannot be judged any more",
                argo("v2"),
                vec![dead(first, "v2")],
                vec![],
                "-kayenta/checkout/v2/1 +kayenta/checkout/v2/2 v2 v1",
            ),
            (
                "others' cannot be judged any more",
                argo("v2"),
                vec![dead("x", "v2")],
                vec![],
                "=x",
            ),
            (
                "a pipeline's own cannot be judged any more",
                orca("v2"),
                vec![dead(same, "v2")],
                vec![],
                "=kayenta/checkout/v2/by/P2",
            ),
            (
                "over twice",
                argo("v2"),
                vec![ended(second, "v2"), ended(first, "v2")],
                vec![],
                "+kayenta/checkout/v2/3 v2 v1",
            ),
            (
                "the next version is there",
                argo("v3"),
                vec![rollout(first, "v2")],
                vec!["v2", "v3"],
                "-kayenta/checkout/v2/1 +kayenta/checkout/v3/1 v3 v1",
            ),
            (
                "the version before is gone",
                argo("v3"),
                vec![rollout(first, "v2")],
                vec![],
                "-kayenta/checkout/v2/1 +kayenta/checkout/v3/1 v3 v1",
            ),
            (
                "a version that nobody has seen",
                argo("v3"),
                vec![rollout(first, "v2")],
                vec!["v2"],
                "rollout kayenta/checkout/v2/1 of checkout v2 is still open",
            ),
            (
                "others' rollout of another version",
                argo("v3"),
                vec![rollout("x", "v2")],
                vec!["v3"],
                "rollout x of checkout v2 is still open",
            ),
            (
                "a pipeline",
                orca("v2"),
                vec![],
                vec![],
                "+kayenta/checkout/v2/by/P2 v2 v1",
            ),
            (
                "its next interval",
                orca("v2"),
                vec![rollout(same, "v2")],
                vec![],
                "=kayenta/checkout/v2/by/P2",
            ),
            (
                "its next interval, after the end",
                orca("v2"),
                vec![rollout("x", "v3"), ended(same, "v2")],
                vec![],
                "=kayenta/checkout/v2/by/P2",
            ),
            (
                "the next pipeline",
                orca("v2"),
                vec![rollout(earlier, "v2")],
                vec!["v2"],
                "-kayenta/checkout/v2/by/P1 +kayenta/checkout/v2/by/P2 v2 v1",
            ),
            (
                "a pipeline and others",
                orca("v2"),
                vec![rollout("x", "v2")],
                vec![],
                "=x",
            ),
            (
                "a hash that agents report",
                by_hash(),
                vec![],
                vec![HASH, "v2"],
                "+kayenta/checkout/6d4f8b9c7d/1 6d4f8b9c7d v1",
            ),
            (
                "a hash that stands for the only version",
                by_hash(),
                vec![],
                vec!["v2"],
                "+kayenta/checkout/6d4f8b9c7d/1 v2 all",
            ),
            (
                "a hash that stands for what is open",
                by_hash(),
                vec![rollout("x", "v2")],
                vec!["v2"],
                "=x",
            ),
            (
                "a hash, and what is open was there before it",
                by_hash(),
                vec![rollout("x", "v2")],
                vec![],
                "no agent reports 6d4f8b9c7d as its version, and the open rollout x is of v2",
            ),
            (
                "a hash, and what was begun here was there before it",
                by_hash(),
                vec![rollout("kayenta/checkout/5c9d7f4b8/1", "v2")],
                vec![],
                "no agent reports 6d4f8b9c7d as its version, and the open rollout kayenta/checkout/5c9d7f4b8/1 is of v2",
            ),
            (
                "a hash that stands for the next version",
                by_hash(),
                vec![rollout("kayenta/checkout/5c9d7f4b8/1", "v2")],
                vec!["v3"],
                "-kayenta/checkout/5c9d7f4b8/1 +kayenta/checkout/6d4f8b9c7d/1 v3 all",
            ),
            (
                "a hash that stands for the next version, and others' rollout",
                by_hash(),
                vec![rollout("x", "v2")],
                vec!["v3"],
                "rollout x of checkout v2 is still open",
            ),
            (
                "a version that looks like a hash",
                argo(HASH),
                vec![],
                vec!["v2"],
                "+kayenta/checkout/6d4f8b9c7d/1 6d4f8b9c7d v1",
            ),
            (
                "a version that looks like a hash, and others' rollout",
                argo(HASH),
                vec![rollout("x", "v2")],
                vec!["v2"],
                "rollout x of checkout v2 is still open",
            ),
            (
                "a hash, and two versions",
                by_hash(),
                vec![rollout("x", "v2")],
                vec!["v2", "v3"],
                "or name the version that they report (v2, v3)",
            ),
            (
                "a hash and nobody",
                by_hash(),
                vec![],
                vec![],
                "are connected report: none",
            ),
            (
                "a hash and too many",
                by_hash(),
                vec![],
                vec!["v2", "v3"],
                "report: v2, v3",
            ),
        ] {
            let told = told(wanted, &known, &reported);
            let is_as_expected = if expected.starts_with(['=', '+', '-']) {
                told == expected
            } else {
                told.contains(expected)
            };
            assert!(is_as_expected, "{name}: {told}");
        }
    }

    #[test]
    fn a_rollout_elsewhere_is_not_meant() {
        let (here, there) = (place("checkout"), place("basket"));
        let open = Known {
            workload: Some(("shop", "checkout")),
            ..rollout("x", "v2")
        };
        for version in ["v2", HASH] {
            let at = |place| Wanted {
                place: Some(place),
                ..wanted(version, None)
            };
            let open = std::slice::from_ref(&open);
            assert_eq!(told(at(&here), open, &["v2"]), "=x");
            let told = told(at(&there), open, &["v2"]);
            assert!(
                told.contains("is that of shop/checkout, and not of shop/basket"),
                "{told}"
            );
        }
    }

    #[test]
    fn a_key_may_stand_in_records_whatever_the_pipeline_is_called() {
        let key = |pipeline| wanted("v2", Some(pipeline)).key(&[]);
        assert_eq!(
            key("01ARZ3NDEKTSV4RRFFQ69G5FAV"),
            "kayenta/checkout/v2/by/01ARZ3NDEKTSV4RRFFQ69G5FAV"
        );
        let long = "p".repeat(10_000);
        for odd in ["a pipeline", "", "\u{1f426}", &long] {
            assert!(check_name(key(odd).as_bytes()).is_ok() && key(odd).starts_with(KEY));
        }
        assert_ne!(key("a pipeline"), key("a  pipeline"));
    }

    #[test]
    fn hashes_of_pod_templates_are_told_from_versions() {
        for hash in [HASH, "5c9d7f4b8", "59d67564", "bbbbbb"] {
            assert!(is_template_hash(hash), "{hash}");
        }
        for version in [
            "",
            "v2",
            "4.5.6",
            "1.2.3",
            "6d4f8b9c7d5",
            "6d4f8",
            "6D4F8B9C7D",
            "6d4f8b9c7a",
            "20261128",
        ] {
            assert!(!is_template_hash(version), "{version}");
        }
    }
}
