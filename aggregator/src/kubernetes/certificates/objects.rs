//! The two objects in the cluster: the Secret, and the webhook configuration that must trust what the Secret holds.
//!
//! What is needed: `get` and `update` on the one Secret, `get` and `patch` on the one configuration.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::Uri;
use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::{MutatingWebhookConfiguration, WebhookClientConfig},
        core::v1::Secret,
    },
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{Names, plan::Data};
use crate::client::cause;

/// Since when the newest CA has been in the webhook configuration, and which CA that is.
const PUBLISHED: &str = "coalmine.dev/ca-published";

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request was not answered with an object.
pub(super) enum Failure {
    /// Somebody else has changed the object since it was read.
    Conflict,
    /// Everything else; the text names object and verb.
    Other(String),
}

pub(super) struct Objects {
    names: Names,
    secrets: Api<Secret>,
    configurations: Api<MutatingWebhookConfiguration>,
}

impl Objects {
    pub(super) fn new(client: Client, names: Names) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), &names.namespace),
            configurations: Api::all(client),
            names,
        }
    }

    pub(super) async fn secret(&self) -> Result<Secret, Failure> {
        call("get", &self.secret_name(), self.secrets.get(&self.names.secret)).await
    }

    /// Writes the Secret, unless it was changed since it was read.
    pub(super) async fn replace(&self, secret: &Secret) -> Result<Secret, Failure> {
        let params = PostParams {
            field_manager: Some("coalmine".to_owned()),
            ..PostParams::default()
        };
        let replaced = self.secrets.replace(&self.names.secret, &params, secret);
        call("update", &self.secret_name(), replaced).await
    }

    pub(super) async fn configuration(&self) -> Result<MutatingWebhookConfiguration, Failure> {
        let found = self.configurations.get(&self.names.configuration);
        call("get", &self.configuration_name(), found).await
    }

    /// Writes the CAs into these webhooks of the configuration, unless it was changed since it was read.
    pub(super) async fn publish(
        &self,
        configuration: &MutatingWebhookConfiguration,
        webhooks: &[String],
        bundle: &str,
    ) -> Result<(), Failure> {
        let params = PatchParams {
            field_manager: Some("coalmine".to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Strategic(publication(configuration, webhooks, bundle));
        let patched = self
            .configurations
            .patch(&self.names.configuration, &params, &patch);
        call("patch", &self.configuration_name(), patched).await.map(drop)
    }

    pub(super) fn names(&self) -> &Names {
        &self.names
    }

    pub(super) fn secret_name(&self) -> String {
        format!("Secret {}/{}", self.names.namespace, self.names.secret)
    }

    pub(super) fn configuration_name(&self) -> String {
        format!("MutatingWebhookConfiguration {}", self.names.configuration)
    }
}

/// A patch of nothing but `caBundle` of these webhooks. A strategic merge finds list entries by their names and keeps
/// all that it does not mention.
fn publication(
    configuration: &MutatingWebhookConfiguration,
    webhooks: &[String],
    bundle: &str,
) -> serde_json::Value {
    let bundle = STANDARD.encode(bundle);
    let webhooks: Vec<_> = webhooks
        .iter()
        .map(|name| json!({ "name": name, "clientConfig": { "caBundle": bundle } }))
        .collect();
    json!({
        "metadata": { "resourceVersion": configuration.metadata.resource_version },
        "webhooks": webhooks,
    })
}

/// The webhooks of the configuration that call us, and whether each has these CAs.
pub(super) fn our_webhooks(
    configuration: &MutatingWebhookConfiguration,
    names: &Names,
    bundle: &str,
) -> Vec<(String, bool)> {
    let webhooks = configuration.webhooks.iter().flatten();
    webhooks
        .filter(|webhook| calls_us(&webhook.client_config, names))
        .map(|webhook| {
            let held = webhook.client_config.ca_bundle.as_ref();
            let current = held.is_some_and(|held| held.0 == bundle.as_bytes());
            (webhook.name.clone(), current)
        })
        .collect()
}

fn calls_us(client: &WebhookClientConfig, names: &Names) -> bool {
    if let Some(service) = &client.service {
        return service.namespace == names.namespace && service.name == names.service;
    }
    let uri: Option<Uri> = client.url.as_ref().and_then(|url| url.parse().ok());
    let host = uri.as_ref().and_then(Uri::host);
    // An address of IPv6 stands in brackets.
    let host = host.map(|host| host.trim_start_matches('[').trim_end_matches(']'));
    host.is_some_and(|host| names.others.iter().any(|name| name == host))
}

/// What the Secret holds.
pub(super) fn data(secret: &Secret) -> Data {
    let fields = secret.data.iter().flatten();
    fields
        .map(|(key, value)| (key.clone(), value.0.clone()))
        .collect()
}

/// Puts what is ours into the Secret; other keys stay.
pub(super) fn put(secret: &mut Secret, data: Data) {
    let held = secret.data.get_or_insert_default();
    held.extend(data.into_iter().map(|(key, value)| (key, ByteString(value))));
}

/// The mark on the Secret.
pub(super) fn mark(secret: &Secret) -> Option<&str> {
    let annotations = secret.metadata.annotations.as_ref()?;
    annotations.get(PUBLISHED).map(String::as_str)
}

/// Marks the Secret, or takes the mark away.
pub(super) fn set_mark(secret: &mut Secret, mark: Option<String>) {
    match (mark, &mut secret.metadata.annotations) {
        (Some(mark), annotations) => {
            annotations
                .get_or_insert_default()
                .insert(PUBLISHED.to_owned(), mark);
        }
        (None, Some(annotations)) => {
            annotations.remove(PUBLISHED);
        }
        (None, None) => {}
    }
}

/// Waits for an answer; `verb` is what the role must allow.
async fn call<T>(
    verb: &str,
    object: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    let Ok(answer) = tokio::time::timeout(TIMEOUT, request).await else {
        return Err(Failure::Other(format!(
            "cannot {verb} {object}: the API server has not answered for {} s",
            TIMEOUT.as_secs()
        )));
    };
    answer.map_err(|error| {
        let (said, advice) = match &error {
            kube::Error::Api(status) if status.is_conflict() => return Failure::Conflict,
            kube::Error::Api(status) if status.is_not_found() => (
                status.message.clone(),
                "; apply deploy/components/webhook, which makes it".to_owned(),
            ),
            kube::Error::Api(status) if status.is_forbidden() => (
                status.message.clone(),
                format!(
                    "; allow the aggregator's service account to {verb} it, as deploy/components/webhook does"
                ),
            ),
            kube::Error::Api(status) => (format!("{} ({})", status.message, status.code), String::new()),
            other => (cause(other), String::new()),
        };
        Failure::Other(format!("cannot {verb} {object}: {said}{advice}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            namespace: "coalmine".to_owned(),
            secret: "coalmine-webhook".to_owned(),
            configuration: "coalmine".to_owned(),
            service: "coalmine".to_owned(),
            others: vec!["127.0.0.1".to_owned(), "::1".to_owned()],
        }
    }

    fn configuration() -> MutatingWebhookConfiguration {
        let webhook = |name: &str, client: serde_json::Value| {
            json!({
                "name": name,
                "clientConfig": client,
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
            })
        };
        let service = |namespace: &str, name: &str| json!({ "namespace": namespace, "name": name });
        serde_json::from_value(json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": { "name": "coalmine", "resourceVersion": "7" },
            "webhooks": [
                webhook("current", json!({ "service": service("coalmine", "coalmine"), "caBundle": "Q0E=" })),
                webhook("none", json!({ "service": service("coalmine", "coalmine") })),
                webhook("other", json!({ "service": service("coalmine", "coalmine"), "caBundle": "Q0I=" })),
                webhook("elsewhere", json!({ "service": service("other", "coalmine") })),
                webhook("else", json!({ "service": service("coalmine", "other") })),
                webhook("address", json!({ "url": "https://127.0.0.1:8443/inject" })),
                webhook("v6", json!({ "url": "https://[::1]:8443/inject" })),
                webhook("stranger", json!({ "url": "https://127.0.0.2:8443/inject" })),
            ],
        }))
        .unwrap()
    }

    #[test]
    fn only_webhooks_that_call_us_are_ours() {
        let ours = our_webhooks(&configuration(), &names(), "CA");
        let expected = [
            ("current", true),
            ("none", false),
            ("other", false),
            ("address", false),
            ("v6", false),
        ];
        let expected: Vec<_> = expected.map(|(name, current)| (name.to_owned(), current)).into();
        assert_eq!(ours, expected);
    }

    #[test]
    fn the_patch_names_nothing_but_ca_bundles() {
        let patch = publication(&configuration(), &["none".to_owned()], "CA");
        assert_eq!(
            patch,
            json!({
                "metadata": { "resourceVersion": "7" },
                "webhooks": [{ "name": "none", "clientConfig": { "caBundle": "Q0E=" } }],
            })
        );
    }

    #[test]
    fn what_is_not_ours_in_the_secret_stays() {
        let mut secret = Secret::default();
        put(&mut secret, Data::from([("theirs".to_owned(), b"1".to_vec())]));
        put(&mut secret, Data::from([("tls.crt".to_owned(), b"2".to_vec())]));
        assert_eq!(data(&secret).len(), 2);
        assert_eq!(mark(&secret), None);
        set_mark(&mut secret, None);
        set_mark(&mut secret, Some("5 ab".to_owned()));
        assert_eq!(mark(&secret), Some("5 ab"));
        set_mark(&mut secret, None);
        assert_eq!(mark(&secret), None);
    }
}
