//! The door before every route: who asks, whether too often, and under which id the request is known.
//!
//! A token is presented in one of three ways, since each tool can send another: before the path, as in
//! `/t/TOKEN/gate/check`; as `Authorization: Bearer TOKEN`; or as the password of Basic, whatever the user's name is,
//! which is what an address like `http://any:TOKEN@host` becomes. A token in the path is taken off before a route is
//! looked for. Tokens in the body of a request are for the faces that have one ([`Caller::or_token`]).
//!
//! Whoever presents nothing comes in as `anonymous`; what a caller may do is asked by each route.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::problem::Problem;
use crate::{
    access::{Access, Caller, Denied},
    clock,
    metrics::Metrics,
};

/// How callers may say who they are; goes with every 401.
const CHALLENGE: &str = "Bearer, Basic realm=\"coalmine\"";

const REQUEST_ID_HEADER: &str = "x-request-id";

/// Longest id of a request that is taken from its caller, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 64;

/// Longest `Authorization` that is read: a token of 512 bytes with a user's name, in Base64.
const MAX_AUTHORIZATION_BYTES: usize = 1_024;

tokio::task_local! {
    /// The id of the request that is being answered.
    static REQUEST_ID: String;
}

/// The id of the request that is being answered; a new one where that is not known.
pub(super) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_else(|_| new_id())
}

fn new_id() -> String {
    static REQUESTS: AtomicU64 = AtomicU64::new(0);
    format!(
        "{:x}-{:x}",
        clock::now_ms(),
        REQUESTS.fetch_add(1, Ordering::Relaxed)
    )
}

/// The caller's id of the request, if it can stand in a header and a log.
fn given_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID_HEADER)?.as_bytes();
    let fits = (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
    fits.then(|| String::from_utf8_lossy(id).into_owned())
}

/// Puts the door before all routes of `inner`, the fallback too.
pub(super) fn admit(access: Arc<Access>, metrics: Arc<Metrics>, inner: Router) -> Router {
    let door = Door { access, metrics };
    // A layer of `inner` itself would run after its route was found, which is too late to change the path.
    let outer = Router::new().fallback_service(inner);
    outer.layer(middleware::from_fn_with_state(door, pass))
}

#[derive(Clone)]
struct Door {
    access: Arc<Access>,
    metrics: Arc<Metrics>,
}

async fn pass(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let id = given_id(request.headers()).unwrap_or_else(new_id);
    let id_header = HeaderValue::from_str(&id);
    let admitted = door.caller(&mut request);
    let answer = async {
        match admitted {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                next.run(request).await
            }
            Err(refusal) => refusal.into_response(),
        }
    };
    let mut response = REQUEST_ID.scope(id, answer).await;
    door.count(&response);
    let unauthorized = response.status() == StatusCode::UNAUTHORIZED;
    let headers = response.headers_mut();
    if let Ok(id) = id_header {
        headers.insert(REQUEST_ID_HEADER, id);
    }
    if unauthorized {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(CHALLENGE));
    }
    response
}

impl Door {
    /// Who asks.
    fn caller(&self, request: &mut Request) -> Result<Caller, Refusal> {
        let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
        let peer = peer.map(|peer| peer.0.ip());
        let caller =
            presented(request).and_then(|token| self.access.caller(token.as_deref(), peer, clock::now_ms()));
        let taken = match &caller {
            Ok(caller) => self.access.take(caller),
            Err(_) => self.access.take_unknown(peer),
        };
        taken.map_err(Refusal::TooFast)?;
        caller.map_err(Refusal::Denied)
    }

    /// Counts a refusal. A verdict of Flagger's face is a 403 too, and no problem document.
    fn count(&self, response: &Response) {
        let kind = response.headers().get(header::CONTENT_TYPE);
        let is_problem = kind.is_some_and(|kind| kind == "application/problem+json");
        let reason = match response.status() {
            StatusCode::UNAUTHORIZED => "unauthenticated",
            StatusCode::FORBIDDEN if is_problem => "forbidden",
            StatusCode::TOO_MANY_REQUESTS => "rate_limited",
            _ => return,
        };
        self.metrics.request_refused(reason);
    }
}

/// Why a request comes to no route.
enum Refusal {
    Denied(Denied),
    /// It has to wait so long.
    TooFast(Duration),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Denied(denied) => Problem::from(denied).into_response(),
            Self::TooFast(wait) => {
                let seconds = whole_seconds(wait);
                let detail = format!("there are too many requests of this caller; ask again in {seconds} s");
                let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, detail);
                ([(header::RETRY_AFTER, HeaderValue::from(seconds))], problem).into_response()
            }
        }
    }
}

/// Rounded up, so that whoever waits so long is let in.
fn whole_seconds(wait: Duration) -> u64 {
    let more = u64::from(wait.subsec_nanos() > 0);
    wait.as_secs().saturating_add(more).max(1)
}

/// The token that a request presents, if any; taken off its path.
fn presented(request: &mut Request) -> Result<Option<String>, Denied> {
    match off_the_path(request.uri_mut()) {
        Some(token) => Ok(Some(token)),
        None => authorization(request.headers()),
    }
}

fn off_the_path(uri: &mut Uri) -> Option<String> {
    let (token, rest) = split(uri.path_and_query()?.as_str())?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(rest.parse().ok()?);
    *uri = Uri::from_parts(parts).ok()?;
    Some(token)
}

/// A path with a token before it, as that token and the path, with the query.
fn split(path: &str) -> Option<(String, String)> {
    let path = path.strip_prefix("/t/")?;
    let end = path.find(['/', '?']).unwrap_or(path.len());
    let (token, rest) = path.split_at(end);
    let slash = if rest.starts_with('/') { "" } else { "/" };
    Some((token.to_owned(), format!("{slash}{rest}")))
}

fn authorization(headers: &HeaderMap) -> Result<Option<String>, Denied> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = given.next() else {
        return Ok(None);
    };
    let token = value
        .to_str()
        .ok()
        .filter(|value| value.len() <= MAX_AUTHORIZATION_BYTES);
    let token = token.and_then(credentials).filter(|token| !token.is_empty());
    if token.is_none() || given.next().is_some() {
        let problem = "the Authorization header cannot be read; send it once, as `Bearer TOKEN` or as Basic with the \
                       token as the password";
        return Err(Denied::Unknown(problem.to_owned()));
    }
    Ok(token)
}

/// The token in the value of `Authorization`.
fn credentials(value: &str) -> Option<String> {
    let (scheme, text) = value.split_once(' ')?;
    let text = text.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(text.to_owned());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let pair = String::from_utf8(STANDARD.decode(text).ok()?).ok()?;
    let (_, password) = pair.split_once(':')?;
    Some(password.to_owned())
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller
            .ok_or_else(|| Problem::internal("it is not known who asks", &"the route is not behind the door"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_taken_off_the_path() {
        for (path, token, rest) in [
            ("/t/cmt_a/gate/check", "cmt_a", "/gate/check"),
            (
                "/t/cmt_a/api/v1/query?query=vector(1)",
                "cmt_a",
                "/api/v1/query?query=vector(1)",
            ),
            ("/t/cmt_a", "cmt_a", "/"),
            ("/t/cmt_a/", "cmt_a", "/"),
            ("/t/cmt_a?x=/y", "cmt_a", "/?x=/y"),
            ("/t//v1/rollouts", "", "/v1/rollouts"),
            ("/t/cmt_a/t/cmt_b/x", "cmt_a", "/t/cmt_b/x"),
            ("/t/cmt_a//x", "cmt_a", "//x"),
        ] {
            for before in ["", "http://127.0.0.1:8080"] {
                let mut uri: Uri = format!("{before}{path}").parse().unwrap();
                assert_eq!(off_the_path(&mut uri).as_deref(), Some(token), "{path}");
                assert_eq!(uri.to_string(), format!("{before}{rest}"), "{path}");
            }
        }
        for path in ["/", "/t", "/tt/x", "/v1/t/x", "/?x=/t/y", "*"] {
            let mut uri: Uri = path.parse().unwrap();
            assert_eq!(off_the_path(&mut uri), None, "{path}");
            assert_eq!(uri.to_string(), path);
        }
    }

    #[test]
    fn a_token_is_read_from_the_header() {
        let long = format!("Bearer {}", "x".repeat(MAX_AUTHORIZATION_BYTES));
        let read = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(
                    header::AUTHORIZATION,
                    HeaderValue::from_bytes(value.as_bytes()).unwrap(),
                );
            }
            authorization(&headers)
        };
        assert_eq!(read(&[]), Ok(None));
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for value in [
            "Bearer cmt_a",
            "bearer cmt_a",
            "BEARER  cmt_a ",
            &basic("any:cmt_a"),
            &basic(":cmt_a").replace("Basic", "basic"),
        ] {
            assert_eq!(read(&[value]), Ok(Some("cmt_a".to_owned())), "{value}");
        }
        assert_eq!(read(&[&basic("any:a:b")]), Ok(Some("a:b".to_owned())));
        for value in [
            "",
            "cmt_a",
            "Bearer",
            "Bearer ",
            "Token cmt_a",
            "Basic cmt_a",
            "Basic ?",
            &basic("cmt_a"),
            &basic("cmt_a:"),
            "Bearer ü",
            &long,
        ] {
            match read(&[value]) {
                Err(Denied::Unknown(problem)) => assert!(problem.contains("Bearer TOKEN"), "{problem}"),
                other => panic!("{value}: {other:?}"),
            }
        }
        assert!(read(&["Bearer cmt_a", "Bearer cmt_a"]).is_err(), "which of them?");
    }

    #[test]
    fn ids_of_requests() {
        let long = "x".repeat(MAX_REQUEST_ID_BYTES + 1);
        for (given, taken) in [
            ("a-1", true),
            ("{\"x\"}", true),
            (&long[1..], true),
            (&*long, false),
            ("", false),
            ("a b", false),
            ("ü", false),
        ] {
            let value = HeaderValue::from_bytes(given.as_bytes()).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID_HEADER, value);
            assert_eq!(given_id(&headers).as_deref(), taken.then_some(given));
        }
        assert_eq!(given_id(&HeaderMap::new()), None);
        assert_ne!(request_id(), request_id(), "out of a request each is new");
    }

    #[tokio::test]
    async fn the_same_id_all_along_a_request() {
        let seen = async { (request_id(), request_id()) };
        let (one, two) = REQUEST_ID.scope("a-1".to_owned(), seen).await;
        assert_eq!((&*one, &*two), ("a-1", "a-1"));
    }

    #[test]
    fn whoever_waits_as_told_is_let_in() {
        for (millis, seconds) in [(0, 1), (1, 1), (999, 1), (1_000, 1), (1_001, 2)] {
            assert_eq!(whole_seconds(Duration::from_millis(millis)), seconds);
        }
    }
}
