//! What Flagger posts, and its bounds. Fields that are not known here are Flagger's own affair.

use std::collections::BTreeMap;

use axum::{Json, extract::rejection::JsonRejection, http::StatusCode};
use coalmine_judge::record::Workload;
use coalmine_proto::names::check_name;
use serde::Deserialize;
use utoipa::ToSchema;

use crate::{faces::problem::Problem, rollouts::is_subdomain};

/// Longest phase and checksum, in bytes.
const MAX_WORD_BYTES: usize = 64;

/// Most entries of the metadata, and the longest key and value.
const MAX_ENTRIES: usize = 64;
const MAX_ENTRY_BYTES: usize = 4 << 10;

/// Longest reason that goes on record, in bytes.
const MAX_REASON_BYTES: usize = 1_000;

/// Longest name of an actor, in bytes: the token's name goes before it.
const MAX_ACTOR_BYTES: usize = 60;

/// What Flagger says of a Canary when it calls a hook.
#[derive(Clone, Deserialize, ToSchema)]
#[schema(as = FlaggerPayload)]
pub(super) struct Payload {
    /// Name of the Canary.
    name: String,
    /// Its namespace.
    namespace: String,
    /// Where its rollout stands, such as `Progressing`.
    #[serde(default)]
    phase: String,
    /// Tells one revision from another.
    #[serde(default)]
    checksum: String,
    /// Of the webhook in the Canary. `service`, `version` and `rollout` say what is meant where the Canary's name does not,
    /// `token` who asks; `actor` and `reason` are for gates that a person opens and closes. An event adds `eventMessage`.
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
}

impl Payload {
    /// Takes it if all of it is within bounds.
    pub(super) fn read(payload: Result<Json<Self>, JsonRejection>) -> Result<Self, Problem> {
        let Json(payload) = payload?;
        let checked = payload.check();
        checked.map_err(|detail| Problem::new(StatusCode::BAD_REQUEST, detail))?;
        Ok(payload)
    }

    fn check(&self) -> Result<(), String> {
        for (field, name) in [("name", &self.name), ("namespace", &self.namespace)] {
            if !is_subdomain(name) {
                return Err(format!(
                    "{field} is {:?}; give the {field} of the Canary as Kubernetes has it",
                    excerpt(name)
                ));
            }
        }
        for (field, word) in [("phase", &self.phase), ("checksum", &self.checksum)] {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if word.len() > MAX_WORD_BYTES || !word.bytes().all(is_plain) {
                return Err(format!(
                    "{field} is {:?}; at most {MAX_WORD_BYTES} letters, digits and - _ . are allowed",
                    excerpt(word)
                ));
            }
        }
        self.check_metadata()
    }

    fn check_metadata(&self) -> Result<(), String> {
        let entries = self.metadata.as_ref();
        let count = entries.map_or(0, BTreeMap::len);
        if count > MAX_ENTRIES {
            return Err(format!(
                "metadata has {count} entries; at most {MAX_ENTRIES} are allowed"
            ));
        }
        for (key, value) in entries.into_iter().flatten() {
            let bytes = key.len().max(value.len());
            if bytes > MAX_ENTRY_BYTES {
                return Err(format!(
                    "metadata has {bytes} bytes at {:?}; at most {MAX_ENTRY_BYTES} are allowed for a key or a value",
                    excerpt(key)
                ));
            }
        }
        for key in ["service", "version", "actor"] {
            if let Some(name) = self.get(key) {
                check_name(name.as_bytes()).map_err(|error| format!("metadata.{key} {error}"))?;
            }
        }
        for (key, most) in [("actor", MAX_ACTOR_BYTES), ("reason", MAX_REASON_BYTES)] {
            let bytes = self.get(key).map_or(0, str::len);
            if bytes > most {
                return Err(format!(
                    "metadata.{key} is {bytes} bytes long; at most {most} are allowed"
                ));
            }
        }
        Ok(())
    }

    /// An entry of the metadata; none if it is empty, as a template that is not filled in leaves it.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let value = self.metadata.as_ref()?.get(key)?;
        (!value.is_empty()).then_some(value.as_str())
    }

    /// The service that is judged: it is named, or is called like the Canary.
    pub(super) fn service(&self) -> &str {
        self.get("service").unwrap_or(&self.name)
    }

    pub(super) fn phase(&self) -> &str {
        &self.phase
    }

    pub(super) fn checksum(&self) -> &str {
        &self.checksum
    }

    /// The Canary.
    pub(super) fn canary(&self) -> Workload {
        Workload {
            kind: "Canary".to_owned(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

/// The beginning of what may be long.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(body: Value) -> Payload {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn what_flagger_sends_is_taken() {
        let payload = read(json!({
            "name": "checkout", "namespace": "shop", "phase": "Progressing", "checksum": "7f9c5d66bd", "later": [1],
            "metadata": { "service": "cart", "version": "", "eventMessage": "Starting canary analysis for cart.shop" },
        }));
        assert_eq!(payload.check(), Ok(()));
        assert_eq!((payload.service(), payload.phase()), ("cart", "Progressing"));
        assert_eq!((payload.get("version"), payload.get("rollout")), (None, None));
        // By hand, as the load tester's gates are opened.
        let bare = read(json!({ "name": "checkout", "namespace": "shop" }));
        assert_eq!(bare.check(), Ok(()));
        assert_eq!((bare.service(), bare.checksum()), ("checkout", ""));
        let empty = read(json!({ "name": "checkout", "namespace": "shop", "metadata": null }));
        assert_eq!(empty.check(), Ok(()));
    }

    #[test]
    fn everything_has_its_bounds() {
        let many: BTreeMap<_, _> = (0..=MAX_ENTRIES).map(|number| (number.to_string(), "")).collect();
        let (long, huge) = ("x".repeat(200), "x".repeat(MAX_ENTRY_BYTES + 1));
        for (field, value, says) in [
            ("name", json!("Check out"), "name is"),
            ("name", json!(""), "name is"),
            ("namespace", json!("a/b"), "namespace is"),
            ("namespace", json!("x".repeat(254)), "namespace is"),
            ("phase", json!(long), "phase is"),
            ("checksum", json!("a/b"), "checksum is"),
            ("metadata", json!(many), "65 entries"),
            ("metadata", json!({ "a": huge }), "4097 bytes at \"a\""),
            ("metadata", json!({ "service": "two words" }), "metadata.service"),
            ("metadata", json!({ "version": long }), "metadata.version"),
            ("metadata", json!({ "actor": "x".repeat(61) }), "metadata.actor"),
            (
                "metadata",
                json!({ "reason": "x".repeat(1_001) }),
                "metadata.reason",
            ),
        ] {
            let mut body = json!({ "name": "checkout", "namespace": "shop" });
            body[field] = value;
            let refused = read(body).check().unwrap_err();
            assert!(refused.contains(says) && refused.len() < 300, "{refused}");
        }
    }
}
