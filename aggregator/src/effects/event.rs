//! Events on an object, for whoever asks why its rollout stands still. One act makes one Event, whatever happens: its name
//! follows from the key of what is told.

use coalmine_judge::{chain::Hash, v1::Verdict};
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client,
    api::{DynamicObject, ObjectMeta, PostParams},
};

use super::{
    Order,
    cluster::{self, FIELD_MANAGER, Kind, Objects},
    notice::Notice,
    plan::{Problem, act},
};
use crate::clock;

/// Longest part of an Event's name that is the object's; the whole may have 253 characters.
const MAX_NAME: usize = 200;

/// Writes an Event on a workload to which nothing else is done.
pub(super) async fn tell_only(
    client: &Client,
    kind: &'static Kind,
    order: &Order<'_>,
) -> Result<(), Problem> {
    let objects = Objects::new(client, kind, &order.workload.namespace);
    let object = objects.get(&order.workload.name).await?;
    tell(client, kind, &object, order, "").await
}

/// Writes an Event on an object.
pub(super) async fn tell(
    client: &Client,
    kind: &Kind,
    object: &DynamicObject,
    order: &Order<'_>,
    done: &str,
) -> Result<(), Problem> {
    let namespace = &order.workload.namespace;
    let event = event(kind, object, namespace, order.notice, done, clock::now_ms());
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    let created = async {
        match api.create(&params, &event).await {
            // It was written before.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => other.map(drop),
        }
    };
    cluster::ask("create", "events", namespace, created).await
}

/// Writes an Event about something that was done, which stays done without it.
pub(super) async fn told(
    client: &Client,
    kind: &Kind,
    object: &DynamicObject,
    order: &Order<'_>,
    done: String,
) -> String {
    match tell(client, kind, object, order, &done).await {
        Ok(()) => done,
        Err(problem) => format!("{done}; but without an Event: {}", problem.text),
    }
}

fn event(
    kind: &Kind,
    object: &DynamicObject,
    namespace: &str,
    notice: &Notice,
    done: &str,
    now_ms: u64,
) -> Event {
    let name = object.metadata.name.clone().unwrap_or_default();
    let (class, reason) = match notice.verdict {
        Verdict::Approve => ("Normal", "CoalmineApprove"),
        Verdict::Hold => ("Normal", "CoalmineHold"),
        Verdict::Rollback => ("Warning", "CoalmineRollback"),
    };
    let digest = Hash::of(format!("{} {}", notice.key, act(notice.verdict)).as_bytes()).to_string();
    let stem: String = name.chars().take(MAX_NAME).collect();
    let stem = stem.trim_end_matches(['-', '.']);
    let now = i64::try_from(now_ms).ok();
    let now = now
        .and_then(|now| jiff::Timestamp::from_millisecond(now).ok())
        .map(Time);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{stem}.{digest:.16}")),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some(kind.api_version()),
            kind: Some(kind.kind.to_owned()),
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            uid: object.metadata.uid.clone(),
            resource_version: object.metadata.resource_version.clone(),
            field_path: None,
        },
        type_: Some(class.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(notice.message(done)),
        first_timestamp: now.clone(),
        last_timestamp: now,
        count: Some(1),
        source: Some(EventSource {
            component: Some(FIELD_MANAGER.to_owned()),
            host: None,
        }),
        reporting_component: Some(FIELD_MANAGER.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::effects::{cluster::ROLLOUT, notice::tests::notice};

    fn made(name: &str, decision: &str, verdict: Verdict) -> Event {
        made_of(name, &notice(decision, verdict))
    }

    fn made_of(name: &str, notice: &Notice) -> Event {
        let object = DynamicObject {
            types: None,
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                uid: Some("u-1".to_owned()),
                ..ObjectMeta::default()
            },
            data: Value::Null,
        };
        event(&ROLLOUT, &object, "shop", notice, "aborted", 1_700_000_000_000)
    }

    #[test]
    fn an_event_is_about_the_object_and_says_why() {
        let event = serde_json::to_value(made("checkout", "r-7", Verdict::Rollback)).unwrap();
        let of = |pointer: &str| event.pointer(pointer).and_then(Value::as_str);
        for (pointer, expected) in [
            ("/type", "Warning"),
            ("/reason", "CoalmineRollback"),
            ("/involvedObject/kind", "Rollout"),
            ("/involvedObject/apiVersion", "argoproj.io/v1alpha1"),
            ("/involvedObject/uid", "u-1"),
            ("/involvedObject/namespace", "shop"),
            ("/metadata/namespace", "shop"),
            ("/firstTimestamp", "2023-11-14T22:13:20Z"),
            ("/source/component", "coalmine"),
        ] {
            assert_eq!(of(pointer), Some(expected), "{pointer}");
        }
        assert!(
            of("/message")
                .unwrap()
                .starts_with("ROLLBACK: aborted; score 0.412")
        );
        assert_eq!(
            made("checkout", "r-8", Verdict::Hold).type_.as_deref(),
            Some("Normal")
        );
    }

    #[test]
    fn the_name_follows_from_the_act_and_is_a_name() {
        let name = |event: Event| event.metadata.name.unwrap();
        let first = name(made("checkout", "r-7", Verdict::Rollback));
        assert_eq!(first, name(made("checkout", "r-7", Verdict::Rollback)));
        assert_ne!(first, name(made("checkout", "r-8", Verdict::Rollback)));
        assert_ne!(first, name(made("checkout", "r-7", Verdict::Hold)));
        let mut again = notice("r-7", Verdict::Rollback);
        again.key.push_str("/1700000000000");
        assert_ne!(first, name(made_of("checkout", &again)));
        let long = format!("{}-{}", "a".repeat(199), "b".repeat(50));
        let long = name(made(&long, "r-7", Verdict::Rollback));
        assert!(
            long.len() <= 253 && long.starts_with(&format!("{}.", "a".repeat(199))),
            "{long}"
        );
    }
}
