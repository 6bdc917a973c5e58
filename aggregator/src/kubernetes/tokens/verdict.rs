//! What a review of a token says. Without I/O.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use serde_json::Value;

use super::{PodIdentity, Presenter};

/// What the user name of a service account begins with; a namespace, a colon and a name follow.
const ACCOUNT: &str = "system:serviceaccount:";

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Who presents a token that was reviewed for an audience, or why it is not believed.
pub(super) fn presenter(status: &TokenReviewStatus, audience: &str) -> Result<Presenter, String> {
    let error = status.error.as_deref().filter(|error| !error.is_empty());
    if status.authenticated != Some(true) || error.is_some() {
        let why = error.unwrap_or("it is not valid, or has expired, or its pod is gone");
        return Err(format!("the API server does not believe it: {why}"));
    }
    // One that knows nothing of audiences believes a token that is meant for somebody else, and says nothing of them.
    let audiences = status.audiences.as_deref().unwrap_or_default();
    if audiences.is_empty() {
        return Err(format!(
            "the API server believes it, and does not say that it is meant for the audience {audience}"
        ));
    }
    if !audiences.iter().any(|it| it == audience) {
        let audiences = audiences.join(", ");
        return Err(format!(
            "it is meant for the audience {audiences}, not for {audience}"
        ));
    }
    let user = status
        .user
        .as_ref()
        .ok_or("the API server does not say whose it is")?;
    let name = user.username.as_deref().unwrap_or_default();
    let (namespace, account) =
        account(name).ok_or_else(|| format!("it is of the user {name:?}, which is no service account"))?;
    Ok(Presenter {
        namespace: namespace.to_owned(),
        account: account.to_owned(),
        pod: pod(user),
    })
}

fn account(user: &str) -> Option<(&str, &str)> {
    let (namespace, account) = user.strip_prefix(ACCOUNT)?.split_once(':')?;
    let is_name = |text: &str| !text.is_empty() && !text.contains(':');
    (is_name(namespace) && is_name(account)).then_some((namespace, account))
}

/// The pod, if both its name and its uid are there, and once.
fn pod(user: &UserInfo) -> Option<PodIdentity> {
    let extra = user.extra.as_ref()?;
    let only = |key: &str| match extra.get(key)?.as_slice() {
        [value] if !value.is_empty() => Some(value.clone()),
        _ => None,
    };
    Some(PodIdentity {
        name: only(POD_NAME)?,
        uid: only(POD_UID)?,
    })
}

/// When a token says that it expires, in seconds since the Unix epoch. Nothing is verified: this may only make the time
/// shorter for which it is believed.
pub(super) fn expires(token: &str) -> Option<u64> {
    let mut parts = token.split('.');
    let (_head, payload, _signature) = (parts.next()?, parts.next()?, parts.next()?);
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let payload: Value = serde_json::from_slice(&payload).ok()?;
    payload.get("exp")?.as_u64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const UID: &str = "6c1f8c1e-0f6b-4c38-8f2d-0d2f3c6f4a11";

    fn review(status: Value) -> Result<Presenter, String> {
        presenter(&serde_json::from_value(status).unwrap(), "coalmine")
    }

    /// A status that is believed, with one field replaced.
    fn with(field: &str, value: Value) -> Value {
        let mut status = json!({
            "authenticated": true,
            "audiences": ["coalmine"],
            "user": {
                "username": "system:serviceaccount:shop:checkout",
                "uid": "1",
                "groups": ["system:serviceaccounts", "system:authenticated"],
                "extra": {
                    "authentication.kubernetes.io/node-name": ["n1"],
                    "authentication.kubernetes.io/pod-name": ["checkout-1"],
                    "authentication.kubernetes.io/pod-uid": [UID],
                },
            },
        });
        status[field] = value;
        status
    }

    #[test]
    fn a_pod_is_who_its_token_says() {
        let expected = Presenter {
            namespace: "shop".to_owned(),
            account: "checkout".to_owned(),
            pod: Some(PodIdentity {
                name: "checkout-1".to_owned(),
                uid: UID.to_owned(),
            }),
        };
        assert_eq!(review(with("error", json!(""))), Ok(expected.clone()));
        assert_eq!(
            review(with("audiences", json!(["other", "coalmine"]))),
            Ok(expected)
        );
    }

    #[test]
    fn a_token_that_is_not_ours_is_refused() {
        let user = |name: &str| json!({ "username": name });
        for (field, value, part) in [
            (
                "authenticated",
                json!(false),
                "does not believe it: it is not valid",
            ),
            ("authenticated", Value::Null, "does not believe it"),
            (
                "error",
                json!("token lookup failed"),
                "does not believe it: token lookup failed",
            ),
            (
                "audiences",
                json!([]),
                "does not say that it is meant for the audience coalmine",
            ),
            ("audiences", Value::Null, "does not say that it is meant"),
            (
                "audiences",
                json!(["vault"]),
                "for the audience vault, not for coalmine",
            ),
            ("audiences", json!(["coalmine2"]), "not for coalmine"),
            ("user", Value::Null, "whose it is"),
            ("user", user("alice"), "\"alice\", which is no service account"),
            ("user", user("system:serviceaccount:shop"), "no service account"),
            (
                "user",
                user("system:serviceaccount::checkout"),
                "no service account",
            ),
            ("user", user("system:serviceaccount:shop:"), "no service account"),
            ("user", user("system:serviceaccount:a:b:c"), "no service account"),
        ] {
            let error = review(with(field, value.clone())).unwrap_err();
            assert!(error.contains(part), "{field} {value}: {error}");
        }
    }

    #[test]
    fn a_token_of_no_pod_names_none() {
        let extras = [
            json!({}),
            json!({ POD_NAME: ["checkout-1"] }),
            json!({ POD_UID: [UID] }),
            json!({ POD_NAME: ["checkout-1"], POD_UID: [UID, "another"] }),
            json!({ POD_NAME: ["checkout-1"], POD_UID: [] }),
            json!({ POD_NAME: ["checkout-1"], POD_UID: [""] }),
        ];
        for extra in extras {
            let user = json!({ "username": "system:serviceaccount:shop:checkout", "extra": extra });
            let presenter = review(with("user", user)).unwrap();
            assert_eq!(presenter.pod, None, "{extra}");
        }
    }

    #[test]
    fn the_end_of_a_token_is_read() {
        let token = |payload: &str| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload));
        assert_eq!(
            expires(&token(r#"{"exp":1700000000,"aud":["coalmine"]}"#)),
            Some(1_700_000_000)
        );
        let others = [r#"{"exp":-1}"#, r#"{"exp":"soon"}"#, "{}", "[]", "nothing"];
        for payload in others {
            assert_eq!(expires(&token(payload)), None, "{payload}");
        }
        for token in ["", "opaque", "a.b", "a.!.c"] {
            assert_eq!(expires(token), None, "{token}");
        }
    }
}
