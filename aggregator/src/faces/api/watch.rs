//! Server-sent events: a rollout's gate, now and whenever it changes.
//!
//! ```text
//! event: verdict            at once, and whenever verdict, reason, decision or state change
//! id: the decision          left out before the first
//! data: what the gate says
//!
//! event: end                once, when the rollout is over; the stream ends with it
//! ```
//!
//! Who comes back with the decision's name as Last-Event-ID is told it again only if the rollout is over. The stream ends
//! without `end` when the server stops.

use std::{convert::Infallible, future, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::sync::Semaphore;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{gate::Gate, input::Named, permitted};
use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
    rollouts::{State as RolloutState, View},
};

/// How many may watch at a time.
const MAX_WATCHERS: usize = 1_000;

static PLACES: Semaphore = Semaphore::const_new(MAX_WATCHERS);

/// How often a stream says that it is alive, when there is nothing else to say.
const ALIVE_EVERY: Duration = Duration::from_secs(15);

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default().routes(routes!(watch))
}

/// Watch a rollout's verdict, as server-sent events.
///
/// An event `verdict` comes at once and whenever verdict, reason, decision or state change; its data is the gate's
/// answer, its id the decision's. An event `end` comes when the rollout is over. Whoever sends the last id as
/// Last-Event-ID is told only what is new. A comment comes each 15 seconds.
#[utoipa::path(
    get,
    path = "/v1/rollouts/{rollout}/watch",
    tag = "rollouts",
    params(
        ("rollout" = String, Path, description = "The rollout"),
        ("last-event-id" = Option<String>, Header, description = "The decision that was seen last"),
    ),
    responses(
        (status = 200, description = "Events `verdict` and `end`", body = String, content_type = "text/event-stream"),
        (status = 404, description = "There is no such rollout"),
    )
)]
async fn watch(
    caller: Caller,
    State(faces): State<Faces>,
    Named(rollout): Named,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Problem> {
    permitted(&faces, &caller, Scope::Gate, &rollout)?;
    let place = PLACES.try_acquire().map_err(|_| {
        Problem::new(
            StatusCode::TOO_MANY_REQUESTS,
            format!("{MAX_WATCHERS} streams are open already; ask the rollout's gate instead"),
        )
    })?;
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let mut told = Told {
        seen: seen.map(str::to_owned),
        last: None,
    };
    let views: BoxStream<'static, Arc<View>> = faces.rollouts.watch(&rollout)?.boxed();
    let verdicts = views.filter_map(move |view| future::ready(told.news(view)));
    let (rollouts, mut stopping) = (faces.rollouts, faces.stopping);
    let end = stream::once(async move {
        let view = rollouts.view(&rollout).ok()?;
        event("end", &view)
    });
    let stopped = async move {
        // An error means that nobody can say so any more: stop as well.
        drop(stopping.wait_for(|stopping| *stopping).await);
    };
    let events = verdicts
        .chain(end.filter_map(future::ready))
        .take_until(stopped)
        .map(move |event| {
            // The place is held as long as the stream is.
            let _held = &place;
            Ok::<_, Infallible>(event)
        });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(ALIVE_EVERY)))
}

/// What whoever watches was told.
#[derive(Debug)]
struct Told {
    /// The decision that was seen before, until the first view is compared with it.
    seen: Option<String>,
    last: Option<Arc<View>>,
}

impl Told {
    /// The event that tells of a view, if there is anything new in it.
    fn news(&mut self, view: Arc<View>) -> Option<Event> {
        let known = match &self.last {
            Some(last) => is_told(last, &view),
            // The end is told in any case: it has the id of the last decision too.
            None => {
                let seen = self.seen.take();
                view.state != RolloutState::Ended && seen.is_some() && view.decision_id == seen
            }
        };
        let event = (!known).then(|| event("verdict", &view)).flatten();
        self.last = Some(view);
        event
    }
}

/// Whether one who was told of `last` knows what there is to know of `view`.
fn is_told(last: &View, view: &View) -> bool {
    last.verdict == view.verdict
        && last.reason == view.reason
        && last.decision_id == view.decision_id
        && last.state == view.state
}

fn event(kind: &str, view: &View) -> Option<Event> {
    let event = Event::default().event(kind);
    let event = match &view.decision_id {
        Some(id) => event.id(id),
        None => event,
    };
    event.json_data(Gate::of(view)).ok()
}
