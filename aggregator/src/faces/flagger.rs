//! The Flagger face: its hooks by type, and the gates of its own load tester at their paths, so that a Canary needs another
//! host, and a post-rollout hook that ends its attempts.
//!
//! ```text
//! POST /v1/flagger/HOOK     which answers what to which verdict: `flagger/hook.rs`
//! POST /gate/check          as confirm-rollout before a canary is tried (by the phase), else as confirm-promotion
//! POST /rollback/check      as rollback
//! POST /gate/open|close     a person's APPROVE or HOLD in the judge's place; on record
//! POST /rollback/open|close a person's ROLLBACK, or the judge's decision again
//! POST /gate/approve|halt   200 and 403, whatever is asked
//! ```
//!
//! A verdict is 200 or 403 and nothing else. On 5xx, which says that nothing is known, Flagger waits and does not roll
//! back, but the `rollout` hooks count it as a failed check. It shows a refusal's text for some hooks only, so the reason
//! is in the Canary's Events as well (`effects`).
//!
//! The hooks begin and end rollouts by themselves (`flagger/attempt.rs`). A rollout that somebody else has begun for the
//! service or the Canary is taken as it is, and left to whoever began it.

mod attempt;
mod call;
mod hook;
mod open;
mod payload;

pub use self::attempt::Attempts;

use axum::{
    Json,
    body::Bytes,
    extract::{
        Path, State,
        rejection::{BytesRejection, JsonRejection, PathRejection},
    },
    http::StatusCode,
};
use coalmine_judge::v1::Verdict;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    call::{Answer, Call},
    hook::Hook,
    payload::{Payload, excerpt},
};
use super::{Faces, problem::Problem};
use crate::access::Caller;

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(hook))
        .routes(routes!(gate))
        .routes(routes!(rollback))
}

/// A hook of Flagger, by its type in the Canary.
#[utoipa::path(
    post,
    path = "/v1/flagger/{hook}",
    tag = "flagger",
    params((
        "hook" = String, Path,
        description = "confirm-rollout, pre-rollout, rollout, confirm-traffic-increase, confirm-promotion, post-rollout, \
                       rollback or event"
    )),
    request_body = Payload,
    responses(
        (status = 200, description = "Go on; for rollback: go back now.", body = String, content_type = "text/plain"),
        (status = 403, description = "Do not go on; for rollback: do not go back. Or the token may not ask.",
            content((String = "text/plain"), (Problem = "application/problem+json"))),
        (status = 404, description = "There is no such hook, or no policy for the service."),
        (status = 409, description = "The service's open rollout is of something else."),
        (status = 503, description = "Nothing is known of this Canary, or the decision log does not answer."),
    )
)]
async fn hook(
    caller: Caller,
    State(faces): State<Faces>,
    name: Result<Path<String>, PathRejection>,
    payload: Result<Json<Payload>, JsonRejection>,
) -> Result<Answer, Problem> {
    let Path(name) = name?;
    let Some(hook) = Hook::parse(&name) else {
        return Err(no_route("hook", &name, &Hook::names()));
    };
    Call::new(faces, &caller, payload)?.answer(hook).await
}

/// The gate of Flagger's load tester: what confirm-rollout and confirm-promotion ask, and what a person opens and closes.
#[utoipa::path(
    post,
    path = "/gate/{act}",
    tag = "flagger",
    params(("act" = String, Path, description = "check, open, close, approve or halt")),
    request_body = Payload,
    responses(
        (status = 200, description = "Approved.", body = String, content_type = "text/plain"),
        (status = 202, description = "What a person has decided is on record.", body = String, content_type = "text/plain"),
        (status = 403, description = "Not approved, or the token may not ask.",
            content((String = "text/plain"), (Problem = "application/problem+json"))),
        (status = 404, description = "There is no such gate, no policy for the service, or no open rollout to decide on."),
        (status = 409, description = "The service's open rollout is of something else, or is over."),
        (status = 503, description = "Nothing is known of this Canary, or the decision log does not answer."),
    )
)]
async fn gate(
    caller: Caller,
    State(faces): State<Faces>,
    act: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Answer, Problem> {
    let Path(act) = act?;
    let verdict = match act.as_str() {
        "approve" => return Ok(Answer::new(StatusCode::OK, "OK\n")),
        "halt" => return Ok(Answer::new(StatusCode::FORBIDDEN, "Forbidden\n")),
        "check" => {
            let call = undeclared(faces, &caller, body)?;
            return call.gate().await;
        }
        "open" => Verdict::Approve,
        "close" => Verdict::Hold,
        _ => return Err(no_route("gate", &act, "check, open, close, approve, halt")),
    };
    let call = undeclared(faces, &caller, body)?;
    call.decide(Some(verdict), &format!("/gate/{act}")).await
}

/// The way back of Flagger's load tester: what rollback asks, and what a person opens and closes.
#[utoipa::path(
    post,
    path = "/rollback/{act}",
    tag = "flagger",
    params(("act" = String, Path, description = "check, open or close")),
    request_body = Payload,
    responses(
        (status = 200, description = "Go back now.", body = String, content_type = "text/plain"),
        (status = 202, description = "What a person has decided is on record.", body = String, content_type = "text/plain"),
        (status = 403, description = "Do not go back, or the token may not ask.",
            content((String = "text/plain"), (Problem = "application/problem+json"))),
        (status = 404, description = "There is no such gate, no policy for the service, or no open rollout to decide on."),
        (status = 409, description = "The service's open rollout is of something else, or is over."),
        (status = 503, description = "Nothing is known of this Canary, or the decision log does not answer."),
    )
)]
async fn rollback(
    caller: Caller,
    State(faces): State<Faces>,
    act: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Answer, Problem> {
    let Path(act) = act?;
    let verdict = match act.as_str() {
        "check" => {
            let call = undeclared(faces, &caller, body)?;
            return call.check(Hook::Rollback).await;
        }
        "open" => Some(Verdict::Rollback),
        "close" => None,
        _ => return Err(no_route("rollback gate", &act, "check, open, close")),
    };
    let call = undeclared(faces, &caller, body)?;
    call.decide(verdict, &format!("/rollback/{act}")).await
}

/// A call whose body need not be declared as JSON: the load tester's gates are opened with a bare `curl -d`.
fn undeclared(faces: Faces, caller: &Caller, body: Result<Bytes, BytesRejection>) -> Result<Call, Problem> {
    Call::new(faces, caller, Json::from_bytes(&body?))
}

fn no_route(what: &str, given: &str, known: &str) -> Problem {
    let given = excerpt(given);
    Problem::not_found(format!("there is no {what} {given:?}; there are: {known}"))
}
