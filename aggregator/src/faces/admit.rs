//! The door before every route: who asks, whether too often, and under which id the request is known.
//!
//! A token is presented in one of three ways, since each tool can send another: before the path, as in
//! `/t/TOKEN/gate/check`; as `Authorization: Bearer TOKEN`; or as the password of Basic, whatever the user's name is,
//! which is what an address like `http://any:TOKEN@host` becomes. A token in the path is taken off before a route is
//! looked for. Tokens in the body of a request are for the faces that have one ([`Caller::or_token`]).
//!
//! Whoever presents nothing comes in as `anonymous`; what a caller may do is asked by each route. What callers on this
//! machine may do is not for the pages that somebody looks at there, which can send here too. A browser says of itself
//! that it sends for a page (`Origin`, `Sec-Fetch-Site`), and a page whose own name was made to lead here names that
//! (`Host`). Without a token, pages change nothing at all, whatever everybody may do.

mod slow;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request::Parts, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::problem::Problem;
use crate::{
    access::{Access, Caller, Denied, Refusal, Sender},
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
    outer
        .layer(middleware::from_fn(slow::in_time))
        .layer(middleware::from_fn_with_state(door, pass))
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
            Err(refusal) => Problem::from(refusal).into_response(),
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
        let is_for_a_page = is_for_a_page(request.headers());
        let sender = Sender {
            peer,
            may_be_near: !is_for_a_page && names_this_machine(request.uri(), request.headers()),
        };
        let changes = !matches!(request.method(), &Method::GET | &Method::HEAD);
        let is_remembered = is_basic(request.headers());
        let caller = presented(request).and_then(|token| {
            // A browser adds the password that it has been told to whatever a page asks for.
            if (token.is_none() || is_remembered) && is_for_a_page && changes {
                return Err(Denied::Forbidden(
                    "a browser sends this for a page, and pages change nothing here: present a token, or ask with \
                     another program"
                        .to_owned(),
                ));
            }
            self.access.caller(token.as_deref(), sender, clock::now_ms())
        });
        self.access.count(caller, peer)
    }

    /// Counts a refusal. A verdict of Flagger's face is a 403 too, and no problem document.
    fn count(&self, response: &Response) {
        let kind = response.headers().get(header::CONTENT_TYPE);
        let is_problem = kind.is_some_and(|kind| kind == "application/problem+json");
        let reason = match response.status() {
            StatusCode::UNAUTHORIZED => "unauthenticated",
            StatusCode::FORBIDDEN if is_problem => "forbidden",
            StatusCode::REQUEST_TIMEOUT => "too_slow",
            StatusCode::TOO_MANY_REQUESTS => "rate_limited",
            _ => return,
        };
        self.metrics.request_refused(reason);
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Denied(denied) => denied.into(),
            Refusal::TooFast(wait) => {
                let seconds = whole_seconds(wait);
                let detail = format!("there are too many requests of this caller; ask again in {seconds} s");
                Self::too_many(detail, seconds)
            }
        }
    }
}

/// Rounded up, so that whoever waits so long is let in.
fn whole_seconds(wait: Duration) -> u64 {
    let more = u64::from(wait.subsec_nanos() > 0);
    wait.as_secs().saturating_add(more).max(1)
}

/// Whether a browser says that it sends this for a page. There are none here that it could be for.
fn is_for_a_page(headers: &HeaderMap) -> bool {
    let mut sites = headers.get_all("sec-fetch-site").iter();
    headers.contains_key(header::ORIGIN) || sites.any(|site| site != "none" && site != "same-origin")
}

/// Whether a password is presented, which a browser remembers.
fn is_basic(headers: &HeaderMap) -> bool {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    given.any(|value| {
        let scheme = value.as_bytes().split(|byte| *byte == b' ').next();
        scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic"))
    })
}

/// Whether the request names this machine as only programs on it do.
fn names_this_machine(uri: &Uri, headers: &HeaderMap) -> bool {
    if let Some(host) = uri.host() {
        return is_this_machine(host);
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let host = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
    host.is_some_and(|host| is_this_machine(host.host()))
}

fn is_this_machine(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let address = address.unwrap_or(host).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address| address.to_canonical().is_loopback())
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

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for &(name, value) in lines {
            headers.append(name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn only_programs_on_this_machine_name_it_so() {
        for (host, is_near) in [
            ("localhost", true),
            ("LocalHost:8080", true),
            ("127.0.0.1:8080", true),
            ("127.9.9.9", true),
            ("[::1]:8080", true),
            ("[::ffff:127.0.0.1]", true),
            ("evil.example", false),
            ("evil.example:8080", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("localhost@evil.example", false),
            ("coalmine.coalmine:8080", false),
            ("192.0.2.1:8080", false),
            ("0.0.0.0:8080", false),
            ("[2001:db8::1]", false),
            ("", false),
            ("local host", false),
        ] {
            let named = headers(&[("host", host)]);
            assert_eq!(
                names_this_machine(&Uri::from_static("/x"), &named),
                is_near,
                "{host}"
            );
        }
        let uri = Uri::from_static("/x");
        assert!(!names_this_machine(&uri, &HeaderMap::new()), "nothing is named");
        let twice = headers(&[("host", "localhost"), ("host", "evil.example")]);
        assert!(!names_this_machine(&uri, &twice), "which of them?");
        // What stands in the request's first line counts before the header.
        let whole = Uri::from_static("http://evil.example/x");
        assert!(!names_this_machine(&whole, &headers(&[("host", "localhost")])));
        let whole = Uri::from_static("http://[::1]:8080/x");
        assert!(names_this_machine(&whole, &HeaderMap::new()));
    }

    #[test]
    fn a_browser_says_that_it_sends_for_a_page() {
        for (name, values, wanted) in [
            ("sec-fetch-site", &["none"][..], false),
            ("sec-fetch-site", &["same-origin"][..], false),
            ("sec-fetch-site", &["same-site"][..], true),
            ("sec-fetch-site", &["cross-site"][..], true),
            ("sec-fetch-site", &["whatever"][..], true),
            ("sec-fetch-site", &["none", "cross-site"][..], true),
            ("origin", &["http://evil.example"][..], true),
            ("origin", &["null"][..], true),
            ("origin", &["http://localhost:8080"][..], true),
        ] {
            let lines: Vec<_> = values.iter().map(|value| (name, *value)).collect();
            assert_eq!(is_for_a_page(&headers(&lines)), wanted, "{lines:?}");
        }
        assert!(!is_for_a_page(&HeaderMap::new()), "another program");
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
