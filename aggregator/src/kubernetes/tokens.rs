//! Whose token an agent presents: asks the API server, and remembers for a while what it said.
//!
//! A pod's token is projected for our audience, so that it is of no use elsewhere, and it names the pod. It is reviewed
//! by the API server (`TokenReview`), which also knows whether the pod is there still. What a review says is read
//! without I/O (`verdict`). A token is remembered by its SHA-256 only (`memory`), and stands in no log and in no error.

mod memory;
mod verdict;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use coalmine_judge::chain::Hash;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{
    Client,
    client::Body,
    core::{Status, response::StatusSummary},
};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use self::memory::Memory;
use crate::{client::cause, clock};

/// Longest token, in bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Largest answer to a review, in bytes: the token comes back in it.
const MAX_ANSWER_BYTES: usize = 256 << 10;

/// How long the API server may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Reviews at a time; others wait for their turn, within the time that an answer may take.
const AT_A_TIME: usize = 32;

/// Tokens that may be under review.
const MAX_UNDER_REVIEW: usize = 10_000;

/// Most characters of what the API server says.
const MAX_CAUSE: usize = 300;

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

/// Reviews tokens.
#[derive(Clone)]
pub(crate) struct Reviewer(Arc<Inner>);

struct Inner {
    client: Client,
    audience: String,
    turns: Semaphore,
    desk: Mutex<Desk>,
}

/// What is known of tokens, by their SHA-256.
struct Desk {
    memory: Memory,
    /// Those under review; a verdict comes to all who wait for it.
    under_review: BTreeMap<Hash, watch::Receiver<Option<Verdict>>>,
}

type Verdict = Result<Presenter, NotBelieved>;

/// The answer to a question about a token.
enum Asked {
    Known(Verdict),
    /// It is under review; the verdict will come here.
    UnderReview(watch::Receiver<Option<Verdict>>),
}

/// Who presents a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Presenter {
    /// The namespace of the service account.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) account: String,
    /// The pod that the token was made for, if it was made for one.
    pub(crate) pod: Option<PodIdentity>,
}

/// A pod, as a token names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodIdentity {
    /// Its name.
    pub(crate) name: String,
    /// Its uid.
    pub(crate) uid: String,
}

/// Why a token is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotBelieved {
    /// It is the token.
    #[error("the token is refused: {0}")]
    Refused(String),
    /// It could not be reviewed; another time it may be.
    #[error("the token cannot be reviewed now: {0}")]
    Unavailable(String),
}

// === impl Reviewer ===

impl Reviewer {
    /// Reviews tokens that are meant for an audience.
    pub(crate) fn new(client: Client, audience: String) -> Self {
        Self(Arc::new(Inner {
            client,
            audience,
            turns: Semaphore::new(AT_A_TIME),
            desk: Mutex::new(Desk {
                memory: Memory::default(),
                under_review: BTreeMap::new(),
            }),
        }))
    }

    /// Who presents the token; an error says why it is not believed, and whether it was the token or the API server.
    pub(crate) async fn review(&self, token: &str) -> Result<Presenter, NotBelieved> {
        check_form(token).map_err(NotBelieved::Refused)?;
        let mut told = match self.ask(token) {
            Asked::Known(verdict) => return verdict,
            Asked::UnderReview(told) => told,
        };
        let verdict = match told.wait_for(Option::is_some).await {
            Ok(verdict) => verdict.clone(),
            Err(_) => None,
        };
        verdict.unwrap_or_else(|| Err(NotBelieved::Unavailable("the review was broken off".to_owned())))
    }

    /// Looks up a token, and has it reviewed if nothing is known of it. One is under review once, whoever asks.
    fn ask(&self, token: &str) -> Asked {
        let key = Hash::of(token.as_bytes());
        let mut desk = self.0.desk();
        if let Some(known) = desk.memory.get(&key, Instant::now()) {
            return Asked::Known(known.clone().map_err(NotBelieved::Refused));
        }
        // An error would mean that its review ended without a verdict.
        let pending = desk
            .under_review
            .get(&key)
            .filter(|told| told.has_changed().is_ok());
        if let Some(told) = pending {
            return Asked::UnderReview(told.clone());
        }
        if desk.under_review.len() >= MAX_UNDER_REVIEW {
            let why = format!("{MAX_UNDER_REVIEW} tokens are under review already");
            return Asked::Known(Err(NotBelieved::Unavailable(why)));
        }
        let (tell, told) = watch::channel(None);
        desk.under_review.insert(key, told.clone());
        // A task of its own: whoever asked first may go away, and others wait too.
        let (inner, token) = (Arc::clone(&self.0), token.to_owned());
        tokio::spawn(async move {
            let verdict = inner.review(&token).await;
            inner.settle(key, &token, &verdict);
            tell.send_replace(Some(verdict));
        });
        Asked::UnderReview(told)
    }
}

impl fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reviewer")
            .field("audience", &self.0.audience)
            .finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    /// A panic in another holder leaves nothing half done that matters: at worst a token is reviewed anew.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a verdict.
    fn settle(&self, key: Hash, token: &str, verdict: &Verdict) {
        let mut desk = self.desk();
        desk.under_review.remove(&key);
        let now = Instant::now();
        match verdict {
            Ok(presenter) => {
                let left = verdict::expires(token).map(|end| {
                    let left_ms = end.saturating_mul(1_000).saturating_sub(clock::now_ms());
                    Duration::from_millis(left_ms)
                });
                desk.memory.believe(key, presenter.clone(), left, now);
            }
            Err(NotBelieved::Refused(why)) => desk.memory.refuse(key, why.clone(), now),
            Err(NotBelieved::Unavailable(_)) => {}
        }
    }

    async fn review(&self, token: &str) -> Verdict {
        let answer = timeout(ANSWER, self.request(token)).await;
        let seconds = ANSWER.as_secs();
        let status = answer
            .unwrap_or_else(|_| Err(format!("the API server does not answer within {seconds} s")))
            .map_err(|why| NotBelieved::Unavailable(shown(&why, token)))?;
        let presenter = verdict::presenter(&status, &self.audience);
        presenter.map_err(|why| NotBelieved::Refused(shown(&why, token)))
    }

    /// Asks by hand: an answer has the token in it, and the client logs the text of an answer that it cannot read.
    async fn request(&self, token: &str) -> Result<TokenReviewStatus, String> {
        let turn = self.turns.acquire().await;
        let _turn = turn.map_err(|error| error.to_string())?;
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.audience.clone()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let body = serde_json::to_vec(&review).map_err(|error| error.to_string())?;
        let request = Request::post(REVIEWS)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(Body::from(body))
            .map_err(|error| error.to_string())?;
        let response = self.client.send(request).await.map_err(|error| cause(&error))?;
        let code = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        let body = body.await.map_err(|error| error.to_string())?.to_bytes();
        if !code.is_success() {
            return Err(refusal(code, &body));
        }
        let unreadable = || "the API server's answer is no TokenReview".to_owned();
        let review: TokenReview = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        review.status.ok_or_else(unreadable)
    }
}

// === impl Presenter ===

impl fmt::Display for Presenter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namespace,
            account,
            pod,
        } = self;
        write!(f, "the account {namespace}/{account}")?;
        match pod {
            Some(PodIdentity { name, uid }) => write!(f, " of the pod {name} ({uid})"),
            None => f.write_str(" of no pod"),
        }
    }
}

/// Checks what can be seen of a token without asking.
fn check_form(token: &str) -> Result<(), String> {
    if token.is_empty() {
        return Err("it is empty".to_owned());
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(format!("it is longer than {MAX_TOKEN_BYTES} bytes"));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("it has a character that no token has".to_owned());
    }
    Ok(())
}

/// What an answer says that is no review.
fn refusal(code: StatusCode, body: &[u8]) -> String {
    let status: Option<Status> = serde_json::from_slice(body).ok();
    let status = status.filter(|status| status.status == Some(StatusSummary::Failure));
    let message = status.map_or_else(|| "without a reason".to_owned(), |status| status.message);
    let remedy = match code {
        StatusCode::FORBIDDEN => {
            "; give the aggregator's account the verb create on tokenreviews.authentication.k8s.io"
        }
        StatusCode::UNAUTHORIZED => "; the aggregator's own token or certificate is not accepted",
        _ => "",
    };
    format!(
        "the API server refuses to review it ({}): {message}{remedy}",
        code.as_u16()
    )
}

/// Text from elsewhere, made fit for a line, and without the token whatever it says.
fn shown(text: &str, token: &str) -> String {
    let text = text.replace(token, "(the token)");
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MAX_CAUSE).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_a_form() {
        assert_eq!(check_form("a.b-c_d.e"), Ok(()));
        let long = "x".repeat(MAX_TOKEN_BYTES + 1);
        assert_eq!(check_form(&long[1..]), Ok(()));
        for token in ["", "a b", "a\n", "\u{fc}", "\u{7f}", long.as_str()] {
            assert!(check_form(token).is_err(), "{token:.20?}");
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        let text = shown("bad token a.b.c\n\u{1b}[31m in a.b.c", "a.b.c");
        assert_eq!(text, "bad token (the token)  [31m in (the token)");
        assert_eq!(shown(&"x".repeat(1_000), "a.b.c").len(), MAX_CAUSE);
    }

    #[test]
    fn what_is_missing_is_named() {
        let body = br#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","code":403,
            "message":"tokenreviews.authentication.k8s.io is forbidden","reason":"Forbidden"}"#;
        let text = refusal(StatusCode::FORBIDDEN, body);
        assert!(
            text.contains("is forbidden") && text.contains("the verb create on"),
            "{text}"
        );
        let text = refusal(StatusCode::BAD_GATEWAY, b"<html>");
        assert!(text.contains("(502): without a reason"), "{text}");
    }
}
