//! Server-sent events: a rollout's gate, now and whenever it changes.
//!
//! ```text
//! event: verdict            at once, and whenever verdict, reason, decision or state change
//! id: DECISION/VERDICT      left out before the first decision
//! data: what the gate says
//!
//! event: end                once, when the rollout is over; the stream ends with it
//! ```
//!
//! Who comes back with the last id as Last-Event-ID is told the same again only if the rollout is over. An approval that is
//! held back has the same decision and another id. The stream ends without `end` when the server stops, or when the token
//! that it was asked for with is not good for it any more.

use std::{convert::Infallible, future, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::HeaderMap,
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
    access::{Caller, MAX_STREAMS, Scope},
    faces::{Faces, problem::Problem},
    ingest::drained,
    rollouts::{State as RolloutState, View},
};

/// How many may watch at a time.
const MAX_WATCHERS: usize = 1_000;

static PLACES: Semaphore = Semaphore::const_new(MAX_WATCHERS);

/// How often a stream says that it is alive, when there is nothing else to say, and at least how often it is looked at
/// whether the caller may still have it.
const ALIVE_EVERY: Duration = Duration::from_secs(15);

/// When somebody may ask again for whom there was no place, in seconds.
const AGAIN: u64 = 15;

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default().routes(routes!(watch))
}

/// Watch a rollout's verdict, as server-sent events.
///
/// An event `verdict` comes at once and whenever verdict, reason, decision or state change; its data is the gate's
/// answer, its id that of the decision with the verdict. An event `end` comes when the rollout is over. Whoever sends the
/// last id as Last-Event-ID is told only what is new. A comment comes each 15 seconds. A caller has 50 streams at most.
#[utoipa::path(
    get,
    path = "/v1/rollouts/{rollout}/watch",
    tag = "rollouts",
    params(
        ("rollout" = String, Path, description = "The rollout"),
        ("last-event-id" = Option<String>, Header, description = "The id of the event that was seen last"),
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
    let service = permitted(&faces, &caller, Scope::Gate, &rollout)?.service.clone();
    let place = PLACES.try_acquire().map_err(|_| full("all", MAX_WATCHERS))?;
    let own = caller
        .stream()
        .ok_or_else(|| full("this caller's", MAX_STREAMS))?;
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
    let watcher = Watcher { caller, service };
    let looked_at = watcher.clone();
    let stopped = async move {
        tokio::select! {
            () = drained(&mut stopping) => {}
            () = looked_at.refused() => {}
        }
    };
    let events = verdicts
        .chain(end.filter_map(future::ready))
        .take_while(move |_| future::ready(watcher.may_watch()))
        .take_until(stopped)
        .map(move |event| {
            // The places are held as long as the stream is.
            let _held = (&place, &own);
            Ok::<_, Infallible>(event)
        });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(ALIVE_EVERY)))
}

fn full(whose: &str, most: usize) -> Problem {
    let detail = format!("{whose} {most} streams are open already; ask the rollout's gate instead");
    Problem::too_many(detail, AGAIN)
}

/// Who watches a rollout of this service.
#[derive(Debug, Clone)]
struct Watcher {
    caller: Caller,
    service: String,
}

impl Watcher {
    /// Whether the token is still good for it.
    fn may_watch(&self) -> bool {
        let caller = self.caller.again();
        caller.is_ok_and(|caller| caller.may(Scope::Gate, &self.service).is_ok())
    }

    /// Resolves when it is not.
    async fn refused(self) {
        let mut look = tokio::time::interval(ALIVE_EVERY);
        while self.may_watch() {
            look.tick().await;
        }
    }
}

/// What whoever watches was told.
#[derive(Debug)]
struct Told {
    /// The event that was seen before, until the first view is compared with it.
    seen: Option<String>,
    last: Option<Arc<View>>,
}

impl Told {
    /// The event that tells of a view, if there is anything new in it.
    fn news(&mut self, view: Arc<View>) -> Option<Event> {
        let known = match &self.last {
            Some(last) => !last.differs(&view),
            // The end is told in any case: it has the id of the last verdict too.
            None => {
                let seen = self.seen.take();
                view.state != RolloutState::Ended && seen.is_some() && id(&view) == seen
            }
        };
        let event = (!known).then(|| event("verdict", &view)).flatten();
        self.last = Some(view);
        event
    }
}

/// The id of the events that tell this.
fn id(view: &View) -> Option<String> {
    let decision = view.decision_id.as_ref()?;
    Some(format!("{decision}/{}", view.verdict))
}

fn event(kind: &str, view: &View) -> Option<Event> {
    let event = Event::default().event(kind);
    let event = match id(view) {
        Some(id) => event.id(id),
        None => event,
    };
    event.json_data(Gate::of(view)).ok()
}
