//! What Flagger's Canary is told: the verdict, by an Event and an annotation. Flagger waits and goes back by the gates
//! that it asks (`faces/flagger.rs`), and its own Events do not say why one is closed.

use kube::{Client, api::Patch};
use serde_json::json;

use super::{
    Order,
    cluster::{CANARY, DECISION, Objects, annotation},
    event,
    plan::Problem,
};

/// Tells a Canary the verdict. Says what was done.
pub(super) async fn act(client: &Client, order: &Order<'_>) -> Result<String, Problem> {
    let objects = Objects::new(client, &CANARY, &order.workload.namespace);
    let name = &order.workload.name;
    let canary = objects.get(name).await?;
    let decision = order.notice.decision.as_str();
    if annotation(&canary, DECISION) != Some(decision) {
        let mark = json!({ "metadata": { "annotations": { DECISION: decision } } });
        objects.patch(name, &Patch::Merge(mark)).await?;
    }
    event::tell(client, &CANARY, &canary, order, "").await?;
    Ok("told by an Event; Flagger asks its gates by itself".to_owned())
}
