//! What a pod needs as a whole (`spec.resources`, on by default from Kubernetes 1.34 on), with the agent in it.
//!
//! An API server refuses a pod that
//!
//! - asks for less than its containers do together, native sidecars among them, or
//! - has a lower limit than one of its containers, native sidecars not among them, or
//! - asks for more than its limit.
//!
//! So the agent's own amounts are added wherever the pod has one, and what is left for the application stays as it was.

use serde_json::{Map, Value, json};

use super::{Refusal, Setting, patch::Operation, ports::Container, quantity, setting::Chosen, text_of};

/// What a pod can have an amount of, and the settings of the agent's request and limit.
const RESOURCES: [(&str, Setting, Setting); 2] = [
    ("cpu", Setting::CpuRequest, Setting::CpuLimit),
    ("memory", Setting::MemoryRequest, Setting::MemoryLimit),
];

const REQUESTS: &str = "/spec/resources/requests";
const LIMITS: &str = "/spec/resources/limits";

/// Adds what the agent needs to what the pod says that it needs.
pub(super) fn make_room(
    spec: &Value,
    containers: &[Container<'_>],
    chosen: &Chosen,
    patch: &mut Vec<Operation>,
) -> Result<(), Refusal> {
    let Some(resources) = map_in(spec.get("resources"), "resources of the pod's spec")? else {
        return Ok(());
    };
    let requests = map_in(resources.get("requests"), "requests of the pod's resources")?;
    let limits = map_in(resources.get("limits"), "limits of the pod's resources")?;
    let mut filled_in = Map::new();
    for (name, request, limit) in RESOURCES {
        let asked = chosen.amount(request).unwrap_or_default();
        // Without a limit of its own the agent gets what it asks for: the pod must not ask for more than its limit.
        let most = chosen.amount(limit).unwrap_or(asked);
        let own_limit = limits.and_then(|limits| limits.get(name));
        if let Some(own) = own_limit {
            let sum = raised("limits", name, own, most)?;
            patch.push(Operation::replace(format!("{LIMITS}/{name}"), sum));
        }
        match (requests.and_then(|requests| requests.get(name)), own_limit) {
            (Some(own), _) => {
                let sum = raised("requests", name, own, asked)?;
                patch.push(Operation::replace(format!("{REQUESTS}/{name}"), sum));
            }
            // The pod would ask for as much as its limit, and with the agent in it for no more than the agent does.
            (None, Some(own)) if !containers.iter().any(|container| container.asks_for(name)) => {
                filled_in.insert(name.to_owned(), raised("limits", name, own, asked)?);
            }
            _ => {}
        }
    }
    fill_in(requests.is_some(), filled_in, patch);
    Ok(())
}

/// Adds what API servers would have filled in without the agent.
fn fill_in(has_requests: bool, amounts: Map<String, Value>, patch: &mut Vec<Operation>) {
    if !has_requests && !amounts.is_empty() {
        patch.push(Operation::add(REQUESTS, Value::Object(amounts)));
        return;
    }
    let amounts = amounts.into_iter();
    patch.extend(amounts.map(|(name, amount)| Operation::add(format!("{REQUESTS}/{name}"), amount)));
}

/// The pod's own amount with more to it.
fn raised(group: &str, name: &str, own: &Value, more: u128) -> Result<Value, Refusal> {
    // Numbers stand in manifests; what API servers send is text.
    let own = text_of(own);
    // A limit of zero is none, and would become one.
    let is_none = group == "limits" && quantity::parse(&own) == Ok(0);
    let sum = quantity::add(&own, more).filter(|_| !is_none);
    sum.map(|sum| json!(sum)).ok_or_else(|| Refusal::PodResources {
        place: format!("{group}.{name}"),
        amount: own,
    })
}

/// A map; absent and null are none.
fn map_in<'p>(value: Option<&'p Value>, what: &str) -> Result<Option<&'p Map<String, Value>>, Refusal> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(Refusal::malformed(format!("{what} is no map"))),
    }
}
