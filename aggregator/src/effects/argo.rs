//! Halts by Argo Rollouts: a rollback aborts the Rollout. What the verdict is otherwise stands in its Events, and Argo asks
//! for it in its analysis.

use coalmine_judge::v1::Verdict;
use kube::{
    Client,
    api::{DynamicObject, Patch},
};
use serde_json::{Value, json};

use super::{
    Order,
    cluster::{Carried, DECISION, Objects, ROLLOUT, annotation, carried, check_known, replica_sets},
    event,
    plan::{Again, Problem},
};

/// Acts on a Rollout. Says what was done.
pub(super) async fn act(client: &Client, order: &Order<'_>) -> Result<String, Problem> {
    if order.notice.verdict != Verdict::Rollback {
        event::tell_only(client, &ROLLOUT, order).await?;
        return Ok("told by an Event".to_owned());
    }
    let objects = Objects::new(client, &ROLLOUT, &order.workload.namespace);
    let rollout = objects.get(&order.workload.name).await?;
    let done = abort(client, &objects, &rollout, order).await?;
    Ok(event::told(client, &ROLLOUT, &rollout, order, done).await)
}

/// Aborts a Rollout. The annotation is there first, so that nobody wonders who has aborted it.
async fn abort(
    client: &Client,
    objects: &Objects,
    rollout: &DynamicObject,
    order: &Order<'_>,
) -> Result<String, Problem> {
    let decision = order.notice.decision.as_str();
    let is_marked = annotation(rollout, DECISION) == Some(decision);
    if is_marked && is_aborted(rollout) {
        return Ok(order.found());
    }
    // A Rollout may leave its template to a Deployment; then there is no version here.
    if let Carried::Other(version) = carried(rollout, order.canary_version) {
        if !is_marked {
            let sets = replica_sets(client, rollout, &order.workload.namespace).await?;
            check_known(rollout, &sets, order.canary_version)?;
        }
        return Ok(format!("nothing was done: {}", order.replaced(version)));
    }
    if is_promoted(rollout) {
        return Err(Problem::new(
            "it is fully promoted, and Argo ignores an abort then; go back with `kubectl argo rollouts undo`",
            Again::Slowly,
        ));
    }
    let name = &order.workload.name;
    let mut seen = rollout.metadata.resource_version.clone();
    if !is_marked {
        let mark = json!({ "metadata": { "resourceVersion": seen, "annotations": { DECISION: decision } } });
        let marked = objects.patch(name, &Patch::Merge(mark)).await?;
        seen = marked.metadata.resource_version;
    }
    if is_aborted(rollout) {
        return Ok("it was aborted already".to_owned());
    }
    let abort = json!({ "metadata": { "resourceVersion": seen }, "status": { "abort": true } });
    objects.patch_status(name, &Patch::Merge(abort)).await?;
    Ok("aborted".to_owned())
}

/// Whether nothing else runs any more than what its template makes.
fn is_promoted(rollout: &DynamicObject) -> bool {
    let hash = |pointer: &str| rollout.data.pointer(pointer).and_then(Value::as_str);
    let stable = hash("/status/stableRS").filter(|hash| !hash.is_empty());
    stable.is_some() && stable == hash("/status/currentPodHash")
}

fn is_aborted(rollout: &DynamicObject) -> bool {
    rollout.data.pointer("/status/abort") == Some(&Value::Bool(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_is_promoted_when_its_template_is_what_is_stable() {
        for (status, expected) in [
            (json!({ "stableRS": "a", "currentPodHash": "a" }), true),
            (json!({ "stableRS": "a", "currentPodHash": "b" }), false),
            (json!({ "stableRS": "", "currentPodHash": "" }), false),
            (json!({ "currentPodHash": "a" }), false),
            (Value::Null, false),
        ] {
            let rollout = json!({ "metadata": {}, "status": status });
            let rollout = serde_json::from_value(rollout).unwrap();
            assert_eq!(is_promoted(&rollout), expected, "{status}");
        }
    }
}
