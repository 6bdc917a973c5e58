//! Halts of a plain Deployment: HOLD pauses it, APPROVE lets it go on, ROLLBACK puts its former template back.
//!
//! A pause of ours is lifted when the canary's version is not in the template any more, and when the rollout ends.
//!
//! What follows for a Deployment is a function of it and of its ReplicaSets. The patch names the version of the object that
//! it was made for, so that nothing is changed which somebody else has changed meanwhile.

use std::collections::BTreeSet;

use coalmine_judge::v1::Verdict;
use kube::{
    Client,
    api::{DynamicObject, Patch},
};
use serde_json::{Value, json};

use super::{
    Order,
    cluster::{
        Carried, DECISION, DEPLOYMENT, Objects, annotation, carried, check_known, is_owned, replica_sets,
    },
    event,
    plan::{Again, Problem},
};

/// The annotation with the decision that a Deployment is paused for; without it somebody else has paused it.
const PAUSED: &str = "coalmine.dev/paused-for";

/// Which of a Deployment's templates an object has.
const REVISION: &str = "deployment.kubernetes.io/revision";

/// The label that tells the pods of one ReplicaSet from those of others.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// What follows for a Deployment.
#[derive(Debug)]
struct Change {
    /// None if there is nothing to change.
    patch: Option<Value>,
    /// What was done then.
    done: String,
}

impl Change {
    fn none(why: impl Into<String>) -> Self {
        Self {
            patch: None,
            done: why.into(),
        }
    }
}

/// Acts on a Deployment. Says what was done.
pub(super) async fn act(client: &Client, order: &Order<'_>) -> Result<String, Problem> {
    let namespace = &order.workload.namespace;
    let objects = Objects::new(client, &DEPLOYMENT, namespace);
    let deployment = objects.get(&order.workload.name).await?;
    let change = match order.notice.verdict {
        Verdict::Hold => hold(&deployment, order),
        Verdict::Approve => approve(&deployment, order),
        Verdict::Rollback => match needs_sets(&deployment, order)? {
            Some(change) => change,
            None => {
                let sets = replica_sets(client, &deployment, namespace).await?;
                roll_back(&deployment, &sets, order)?
            }
        },
    };
    let done = make(&objects, order, change).await?;
    Ok(event::told(client, &DEPLOYMENT, &deployment, order, done).await)
}

/// Lifts the pause that a rollout has left at its end. Says what was done. `holds` are the decisions that it may be of.
pub(super) async fn release(
    client: &Client,
    order: &Order<'_>,
    holds: &BTreeSet<&str>,
    was_approved: bool,
) -> Result<String, Problem> {
    let objects = Objects::new(client, &DEPLOYMENT, &order.workload.namespace);
    let deployment = objects.get(&order.workload.name).await?;
    let change = end(&deployment, order, holds, was_approved);
    make(&objects, order, change).await
}

/// Makes a change. Says what was done.
async fn make(objects: &Objects, order: &Order<'_>, change: Change) -> Result<String, Problem> {
    if let Some(patch) = change.patch {
        // A JSON merge would mix the containers of two templates; this form has a way to say "replace".
        objects
            .patch(&order.workload.name, &Patch::Strategic(patch))
            .await?;
    }
    Ok(change.done)
}

fn is_paused(deployment: &DynamicObject) -> bool {
    deployment.data.pointer("/spec/paused") == Some(&Value::Bool(true))
}

/// A change of a Deployment that is as it was seen.
fn patch(deployment: &DynamicObject, order: &Order<'_>, paused_for: Option<&str>, spec: Value) -> Value {
    json!({
        "metadata": {
            "resourceVersion": deployment.metadata.resource_version,
            "annotations": { DECISION: order.notice.decision, PAUSED: paused_for },
        },
        "spec": spec,
    })
}

/// Takes our pause back.
fn lift(deployment: &DynamicObject, order: &Order<'_>, done: impl Into<String>) -> Change {
    Change {
        patch: Some(patch(deployment, order, None, json!({ "paused": false }))),
        done: done.into(),
    }
}

/// Says that another version than the canary's is rolled out. Our pause was not meant for that one.
fn is_over(deployment: &DynamicObject, order: &Order<'_>) -> Option<Change> {
    let Carried::Other(version) = carried(deployment, order.canary_version) else {
        return None;
    };
    let why = order.replaced(version);
    Some(if annotation(deployment, PAUSED).is_some() {
        lift(deployment, order, format!("our pause was lifted: {why}"))
    } else {
        Change::none(format!("nothing was done: {why}"))
    })
}

/// What follows from the end of a rollout with these holds. That nothing more is judged approves nothing.
fn end(deployment: &DynamicObject, order: &Order<'_>, holds: &BTreeSet<&str>, was_approved: bool) -> Change {
    let is_on_trial = carried(deployment, order.canary_version) == Carried::Canary;
    match annotation(deployment, PAUSED) {
        Some(by) if holds.contains(by) && is_on_trial && !was_approved => Change::none(format!(
            "it stays paused: version {} was not approved; to let it go on, run `kubectl -n {} rollout resume \
             deployment/{}`",
            order.canary_version, order.workload.namespace, order.workload.name
        )),
        Some(by) if holds.contains(by) => {
            lift(deployment, order, "our pause was lifted: the rollout was ended")
        }
        Some(by) => Change::none(format!("nothing was done: decision {by} is of another rollout")),
        None => Change::none("nothing was done: no pause of ours is left"),
    }
}

fn hold(deployment: &DynamicObject, order: &Order<'_>) -> Change {
    let decision = order.notice.decision.as_str();
    match carried(deployment, order.canary_version) {
        Carried::Canary => {}
        Carried::Other(version) => {
            return Change::none(format!("nothing was done: {}", order.replaced(version)));
        }
        // Whoever may begin a rollout could stop any Deployment.
        Carried::Unknown => {
            return Change::none(
                "nothing was done: its template does not say which version it carries; give the template the \
                 label app.kubernetes.io/version",
            );
        }
    }
    match (is_paused(deployment), annotation(deployment, PAUSED)) {
        (true, Some(by)) if by == decision => Change::none(order.found()),
        (true, Some(by)) => Change::none(format!("it was paused already, for decision {by}")),
        (true, None) => Change::none("it was paused already, by somebody else"),
        (false, Some(by)) if by == decision => {
            Change::none("it was paused, and somebody has resumed it since")
        }
        (false, _) => Change {
            patch: Some(patch(
                deployment,
                order,
                Some(decision),
                json!({ "paused": true }),
            )),
            done: "paused".to_owned(),
        },
    }
}

fn approve(deployment: &DynamicObject, order: &Order<'_>) -> Change {
    if annotation(deployment, PAUSED).is_none() {
        return Change::none(
            if annotation(deployment, DECISION) == Some(order.notice.decision.as_str()) {
                order.found()
            } else {
                "nothing was done: Coalmine has not paused it".to_owned()
            },
        );
    }
    is_over(deployment, order).unwrap_or_else(|| lift(deployment, order, "goes on"))
}

/// What follows from a rollback without a look at the ReplicaSets; none if it takes one.
fn needs_sets(deployment: &DynamicObject, order: &Order<'_>) -> Result<Option<Change>, Problem> {
    let is_marked = annotation(deployment, DECISION) == Some(order.notice.decision.as_str());
    let is_paused_by_us = annotation(deployment, PAUSED).is_some();
    match carried(deployment, order.canary_version) {
        Carried::Canary if is_marked && !is_paused_by_us => Ok(Some(Change::none(
            "its former template was put back, and somebody has applied the canary again since",
        ))),
        Carried::Other(_) if is_paused_by_us => Ok(is_over(deployment, order)),
        Carried::Other(_) if is_marked => Ok(Some(Change::none(order.found()))),
        Carried::Canary | Carried::Other(_) => Ok(None),
        // Whether somebody has rolled back already could not be told, and the former template would be the canary's.
        Carried::Unknown => Err(Problem::new(
            "its template does not say which version it carries; give the template the label \
             app.kubernetes.io/version, and roll back by hand now",
            Again::Slowly,
        )),
    }
}

/// What follows from a rollback, with these ReplicaSets.
fn roll_back(
    deployment: &DynamicObject,
    sets: &[DynamicObject],
    order: &Order<'_>,
) -> Result<Change, Problem> {
    match is_over(deployment, order) {
        Some(over) => check_known(deployment, sets, order.canary_version).map(|()| over),
        None => restore(deployment, sets, order),
    }
}

fn revision(object: &DynamicObject) -> Option<u64> {
    annotation(object, REVISION)?.parse().ok()
}

/// Puts the newest template back that is not of the canary's version. A Deployment that was paused early has no ReplicaSet
/// of the canary yet.
fn restore(deployment: &DynamicObject, sets: &[DynamicObject], order: &Order<'_>) -> Result<Change, Problem> {
    let former = sets
        .iter()
        .filter(|set| is_owned(set, deployment))
        .filter(|set| carried(set, order.canary_version) != Carried::Canary)
        .filter_map(|set| Some((revision(set)?, set)))
        .max_by_key(|(revision, _)| *revision);
    let template = former.and_then(|(revision, set)| {
        let template = set.data.pointer("/spec/template")?.as_object()?;
        Some((revision, carried(set, order.canary_version), template))
    });
    let Some((revision, version, template)) = template else {
        return Err(Problem::new(
            format!(
                "it has no former ReplicaSet of another version than {}; roll back by hand, and keep \
                 spec.revisionHistoryLimit above 0",
                order.canary_version
            ),
            Again::Slowly,
        ));
    };
    let mut template = template.clone();
    if let Some(labels) = template
        .get_mut("metadata")
        .and_then(|metadata| metadata.get_mut("labels")?.as_object_mut())
    {
        labels.remove(TEMPLATE_HASH);
    }
    template.insert("$patch".to_owned(), Value::from("replace"));
    let version = match version {
        Carried::Other(version) => format!(" (version {version})"),
        Carried::Canary | Carried::Unknown => String::new(),
    };
    Ok(Change {
        patch: Some(patch(
            deployment,
            order,
            None,
            json!({ "paused": false, "template": template }),
        )),
        done: format!("the template of revision {revision}{version} was put back"),
    })
}

#[cfg(test)]
mod tests {
    use coalmine_judge::record::Workload;

    use super::*;
    use crate::effects::notice::tests::notice;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn template(version: Option<&str>, image: &str) -> Value {
        let labels = match version {
            Some(version) => json!({ "app": "checkout", "app.kubernetes.io/version": version }),
            None => json!({ "app": "checkout" }),
        };
        json!({
            "metadata": { "labels": labels },
            "spec": { "containers": [{ "name": "app", "image": image, "unknownField": 7 }] },
        })
    }

    fn deployment(version: Option<&str>, annotations: Value, paused: bool) -> DynamicObject {
        object(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": "checkout", "namespace": "shop", "uid": "d-1", "resourceVersion": "42",
                "annotations": annotations,
            },
            "spec": {
                "paused": paused,
                "selector": { "matchLabels": { "app": "checkout" } },
                "template": template(version, "new"),
            },
        }))
    }

    fn set(revision: u64, version: Option<&str>, owner: &str) -> DynamicObject {
        let mut template = template(version, &format!("image-{revision}"));
        template["metadata"]["labels"][TEMPLATE_HASH] = json!("abc");
        object(json!({
            "metadata": {
                "name": format!("checkout-{revision}"),
                "annotations": { REVISION: revision.to_string() },
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "Deployment", "name": "checkout", "uid": owner,
                    "controller": true,
                }],
            },
            "spec": { "template": template },
        }))
    }

    /// What is asked of a function under a verdict and the decision `r-7` about version v2.
    fn ordered<T>(verdict: Verdict, is_resumed: bool, ask: impl FnOnce(&Order<'_>) -> T) -> T {
        let workload = Workload {
            kind: "Deployment".to_owned(),
            namespace: "shop".to_owned(),
            name: "checkout".to_owned(),
        };
        ask(&Order {
            workload: &workload,
            canary_version: "v2",
            notice: &notice("r-7", verdict),
            is_resumed,
        })
    }

    #[test]
    fn a_hold_pauses_once_and_touches_nobody_elses_pause() {
        let held = |deployment: DynamicObject| ordered(Verdict::Hold, true, |order| hold(&deployment, order));
        let change = held(deployment(Some("v2"), json!({}), false));
        let expected = json!({
            "metadata": {
                "resourceVersion": "42",
                "annotations": { "coalmine.dev/decision": "r-7", "coalmine.dev/paused-for": "r-7" },
            },
            "spec": { "paused": true },
        });
        assert_eq!(change.patch, Some(expected));
        for (deployment, says) in [
            (
                deployment(Some("v2"), json!({ PAUSED: "r-7" }), true),
                "found done after a restart",
            ),
            (
                deployment(Some("v2"), json!({ PAUSED: "r-3" }), true),
                "for decision r-3",
            ),
            (deployment(Some("v2"), json!({}), true), "by somebody else"),
            (
                deployment(Some("v2"), json!({ PAUSED: "r-7" }), false),
                "somebody has resumed it since",
            ),
            (
                deployment(Some("v1"), json!({}), false),
                "carries version v1 and not v2",
            ),
            (deployment(None, json!({}), false), "app.kubernetes.io/version"),
        ] {
            let change = held(deployment);
            assert!(change.patch.is_none(), "{change:?}");
            assert!(change.done.contains(says), "{change:?}");
        }
    }

    #[test]
    fn an_approval_takes_back_only_our_own_pause() {
        let approved =
            |deployment: DynamicObject| ordered(Verdict::Approve, false, |order| approve(&deployment, order));
        let change = approved(deployment(Some("v2"), json!({ PAUSED: "r-3" }), true));
        let patch = change.patch.unwrap();
        assert_eq!(patch["spec"], json!({ "paused": false }));
        assert_eq!(patch["metadata"]["annotations"][PAUSED], Value::Null);
        assert_eq!(patch["metadata"]["annotations"][DECISION], "r-7");
        for deployment in [
            deployment(Some("v2"), json!({}), true),
            deployment(Some("v2"), json!({ DECISION: "r-7" }), false),
            deployment(Some("v3"), json!({}), true),
        ] {
            let change = approved(deployment);
            assert!(change.patch.is_none(), "{change:?}");
        }
    }

    fn assert_lifted(change: &Change, says: &str) {
        let patch = change.patch.as_ref().unwrap();
        assert_eq!(patch["spec"], json!({ "paused": false }));
        assert_eq!(patch["metadata"]["resourceVersion"], "42");
        assert_eq!(patch["metadata"]["annotations"][PAUSED], Value::Null);
        assert_eq!(change.done, says);
    }

    #[test]
    fn our_pause_is_lifted_once_the_template_moves_on() {
        let says = "our pause was lifted: its template carries version v3 and not v2 any more";
        let moved = deployment(Some("v3"), json!({ PAUSED: "r-3", DECISION: "r-7" }), true);
        let approved = ordered(Verdict::Approve, false, |order| approve(&moved, order));
        assert_lifted(&approved, says);
        let rolled_back = ordered(Verdict::Rollback, false, |order| needs_sets(&moved, order));
        assert_lifted(&rolled_back.unwrap().unwrap(), says);
    }

    #[test]
    fn our_pause_is_lifted_when_the_rollout_ends_but_for_what_was_not_approved() {
        let holds = BTreeSet::from(["r-3", "r-7"]);
        let ended_after = |deployment: DynamicObject, was_approved| {
            ordered(Verdict::Hold, false, |order| {
                end(&deployment, order, &holds, was_approved)
            })
        };
        let ended = |deployment: DynamicObject| ended_after(deployment, false);
        for version in [Some("v3"), None] {
            let change = ended(deployment(version, json!({ PAUSED: "r-3" }), true));
            assert_lifted(&change, "our pause was lifted: the rollout was ended");
        }
        let change = ended_after(deployment(Some("v2"), json!({ PAUSED: "r-3" }), true), true);
        assert_lifted(&change, "our pause was lifted: the rollout was ended");
        let change = ended(deployment(Some("v2"), json!({ PAUSED: "r-3" }), true));
        assert!(
            change.patch.is_none() && change.done.contains("rollout resume"),
            "{change:?}"
        );
        for annotations in [json!({ PAUSED: "s-3" }), json!({})] {
            let change = ended(deployment(Some("v2"), annotations, true));
            assert!(
                change.patch.is_none() && change.done.starts_with("nothing"),
                "{change:?}"
            );
        }
    }

    #[test]
    fn a_rollback_restores_the_newest_template_of_another_version() {
        let mut kept = set(7, Some("v9"), "d-1");
        kept.metadata.owner_references.as_mut().unwrap()[0].controller = Some(false);
        let sets = [
            kept,
            set(3, Some("v0"), "d-1"),
            set(4, Some("v1"), "d-1"),
            // The canary with another setting, and somebody else's.
            set(5, Some("v2"), "d-1"),
            set(5, Some("v1"), "d-9"),
            set(6, Some("v2"), "d-1"),
        ];
        let current = deployment(Some("v2"), json!({ REVISION: "6", PAUSED: "r-3" }), true);
        let change = ordered(Verdict::Rollback, false, |order| {
            assert!(needs_sets(&current, order).unwrap().is_none());
            roll_back(&current, &sets, order).unwrap()
        });
        assert!(change.done.contains("revision 4 (version v1)"), "{}", change.done);
        let patch = change.patch.unwrap();
        let mut former = template(Some("v1"), "image-4");
        former["$patch"] = json!("replace");
        assert_eq!(patch["spec"], json!({ "paused": false, "template": former }));
        assert_eq!(patch["metadata"]["resourceVersion"], "42");
        assert_eq!(
            patch["metadata"]["annotations"],
            json!({ DECISION: "r-7", PAUSED: null })
        );
    }

    #[test]
    fn the_newest_template_is_the_former_one_before_the_canary_has_a_replica_set() {
        let sets = [set(3, Some("v0"), "d-1"), set(4, Some("v1"), "d-1")];
        let current = deployment(Some("v2"), json!({ REVISION: "4", PAUSED: "r-3" }), true);
        let change = ordered(Verdict::Rollback, false, |order| {
            roll_back(&current, &sets, order).unwrap()
        });
        assert!(change.done.contains("revision 4 (version v1)"), "{}", change.done);
    }

    #[test]
    fn a_rollback_without_a_former_template_fails_and_says_so() {
        let current = deployment(Some("v2"), json!({ REVISION: "6" }), false);
        for sets in [
            vec![],
            vec![set(6, Some("v2"), "d-1"), set(5, Some("v2"), "d-1")],
            vec![set(4, Some("v1"), "d-9")],
        ] {
            let problem = ordered(Verdict::Rollback, false, |order| {
                restore(&current, &sets, order).unwrap_err()
            });
            assert!(problem.text.contains("no former ReplicaSet"), "{problem:?}");
        }
    }

    #[test]
    fn a_rollback_that_somebody_has_done_already_is_not_done_again() {
        let asked = |deployment: DynamicObject| {
            ordered(Verdict::Rollback, true, |order| needs_sets(&deployment, order))
        };
        let done = asked(deployment(Some("v1"), json!({ DECISION: "r-7" }), false));
        assert_eq!(done.unwrap().unwrap().done, "found done after a restart");
        let again = asked(deployment(Some("v2"), json!({ DECISION: "r-7" }), false));
        let again = again.unwrap().unwrap();
        assert!(
            again.patch.is_none() && again.done.contains("applied the canary again"),
            "{again:?}"
        );
        let theirs = deployment(Some("v1"), json!({}), false);
        let sets = |canary| [set(4, Some("v1"), "d-1"), set(5, Some(canary), "d-1")];
        ordered(Verdict::Rollback, false, |order| {
            assert!(needs_sets(&theirs, order).unwrap().is_none());
            let change = roll_back(&theirs, &sets("v2"), order).unwrap();
            assert!(
                change.patch.is_none() && change.done.contains("carries version v1"),
                "{change:?}"
            );
            // It never had that version, or calls it something else.
            let problem = roll_back(&theirs, &sets("2.0"), order).unwrap_err();
            assert!(
                problem.text.contains("no template carries version v2"),
                "{problem:?}"
            );
        });
        let unknown = asked(deployment(None, json!({}), false)).unwrap_err();
        assert!(unknown.text.contains("app.kubernetes.io/version"), "{unknown:?}");
    }
}
