//! One call of a hook: who asks about which Canary, and what the answer is.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::rejection::JsonRejection,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use coalmine_judge::v1::Verdict;

use super::{
    attempt::{Grant, Next, connected, untouched},
    hook::Hook,
    open::Found,
    payload::Payload,
};
use crate::{
    access::{Caller, Scope},
    faces::{
        Faces,
        problem::Problem,
        recorded::{Waiting, recorded},
    },
    rollouts::{RolloutError, View},
};

/// How long a call waits for others about the same Canary, and again for the decision log. A hook that Flagger calls has
/// 10 s, of which less is left when it is called again.
pub(super) const WITHIN: Duration = Duration::from_secs(4);

/// What Flagger's event begins with when it begins with a revision, or begins anew because there is a newer one.
const NEW_REVISION: &str = "New revision detected";

/// What a hook is answered.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    text: String,
}

impl Answer {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }

    fn passed(text: impl Into<String>) -> Self {
        Self::new(StatusCode::OK, text)
    }

    /// What is shown of a rollout, as a success or a failure of the hook. A verdict is never any other status: Flagger calls
    /// a hook again on 5xx, and does not show its text.
    fn of(view: &View, passes: bool) -> Self {
        let status = if passes {
            StatusCode::OK
        } else {
            StatusCode::FORBIDDEN
        };
        Self::new(status, told(view))
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let kind = [
            (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
            (header::CACHE_CONTROL, "no-store"),
        ];
        (self.status, kind, self.text).into_response()
    }
}

fn told(view: &View) -> String {
    let decision = view.decision_id.as_deref().unwrap_or(&view.id);
    format!("{} ({decision}): {}\n", view.verdict, view.reason)
}

/// One call.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) faces: Faces,
    pub(super) caller: Caller,
    pub(super) payload: Payload,
}

impl Call {
    pub(super) fn new(
        faces: Faces,
        caller: &Caller,
        payload: Result<Json<Payload>, JsonRejection>,
    ) -> Result<Self, Problem> {
        let payload = Payload::read(payload)?;
        let caller = caller.or_token(payload.get("token"))?;
        Ok(Self {
            faces,
            caller,
            payload,
        })
    }

    pub(super) async fn answer(self, hook: Hook) -> Result<Answer, Problem> {
        match hook {
            Hook::ConfirmRollout => self.confirm_rollout(),
            Hook::PostRollout => {
                let phase = self.payload.phase().to_owned();
                self.close(format!("Flagger says that the canary is {phase}"))
                    .await
            }
            Hook::Event => self.event().await,
            Hook::PreRollout
            | Hook::Rollout
            | Hook::ConfirmTrafficIncrease
            | Hook::ConfirmPromotion
            | Hook::Rollback => self.check(hook).await,
        }
    }

    /// Answers the load tester's gate, which is asked before a canary is tried and before it is promoted.
    pub(super) async fn gate(self) -> Result<Answer, Problem> {
        let hook = Hook::of_gate(self.payload.phase());
        self.answer(hook).await
    }

    /// Answers by the verdict, and begins an attempt where there is none.
    pub(super) async fn check(self, hook: Hook) -> Result<Answer, Problem> {
        let scope = if hook == Hook::PreRollout {
            Scope::Rollout
        } else {
            Scope::Gate
        };
        self.caller.may(scope, "")?;
        let found = self.find()?;
        let service = self.service(&found).to_owned();
        let is_named = self.payload.get("rollout").is_some();
        self.caller.may(scope, &service)?;
        let is_tried = !is_named && hook.begins(self.payload.phase());
        let begins = is_tried && self.caller.may(Scope::Rollout, &service).is_ok();
        let view = match found {
            Found::Open(view) if !is_tried => view,
            Found::Open(view) => match self.next(&view) {
                Next::Take => view,
                Next::Replace { .. } if begins => self.attempt().await?,
                // It is the same attempt, of a version that nobody knew when it began.
                Next::Replace { number: Some(_), .. } => view,
                // The verdict on one revision must not pass for that on another.
                Next::Replace { number: None, .. } => return Err(self.of_another_revision(&view)),
            },
            Found::Other { view, version } => return Err(self.conflict(&view, version.as_deref())),
            Found::None if begins => self.attempt().await?,
            Found::None => return Err(self.nothing_open(&service)),
        };
        self.note(hook, &view);
        if hook == Hook::ConfirmTrafficIncrease
            && let Some(answer) = self.first_traffic(&view).await?
        {
            return Ok(answer);
        }
        Ok(Answer::of(&view, hook.passes(view.standing())))
    }

    /// Remembers what a hook shows of the canary's traffic, if it is from somebody who may change something.
    fn note(&self, hook: Hook, view: &View) {
        if self.caller.may(Scope::Rollout, &view.service).is_err() {
            return;
        }
        if matches!(hook, Hook::PreRollout | Hook::Rollout) {
            let is_at_zero = hook == Hook::PreRollout;
            let canary = self.payload.canary();
            self.faces.flagger.shows(&canary, &view.id, is_at_zero);
        }
    }

    /// A canary may be tried unless a person holds what is open of it. That the one before is to go back is no reason.
    fn confirm_rollout(&self) -> Result<Answer, Problem> {
        self.caller.may(Scope::Gate, "")?;
        let found = self.find()?;
        self.caller.may(Scope::Gate, self.service(&found))?;
        let is_held = |view: &View| {
            let overridden = view.overridden.as_ref();
            overridden.is_some_and(|overridden| overridden.verdict == Verdict::Hold.as_str())
        };
        match found {
            Found::Open(view) if is_held(&view) => Ok(Answer::of(&view, false)),
            _ => Ok(Answer::passed("nobody holds this canary\n")),
        }
    }

    async fn event(self) -> Result<Answer, Problem> {
        let message = self.payload.get("eventMessage").unwrap_or_default();
        tracing::debug!(canary = self.name(), message, "Flagger tells an event");
        if message.starts_with(NEW_REVISION) {
            return self.close("Flagger has found a new revision".to_owned()).await;
        }
        self.caller.may(Scope::Rollout, self.payload.service())?;
        Ok(Answer::passed("noted\n"))
    }

    /// Ends the attempt, if one is open.
    async fn close(self, reason: String) -> Result<Answer, Problem> {
        if self.payload.get("rollout").is_some() {
            self.caller.may(Scope::Rollout, self.payload.service())?;
            return Ok(Answer::passed("metadata.rollout is not Flagger's to end\n"));
        }
        self.caller.may(Scope::Rollout, "")?;
        let found = self.find()?;
        self.caller.may(Scope::Rollout, self.service(&found))?;
        let Some(id) = found.ours().map(|view| view.id.clone()) else {
            return Ok(Answer::passed("there is no attempt to end\n"));
        };
        let turn = self.turn().await?;
        recorded(UNANSWERED, async move {
            // Another call may have ended it meanwhile, and begun one more, which is not meant.
            self.end(&id, reason).await?;
            drop(turn);
            Ok::<_, Problem>(Answer::passed("the attempt is ended\n"))
        })
        .await
    }

    /// Decides in the judge's place; without a verdict, takes back that it is to be rolled back.
    pub(super) async fn decide(self, verdict: Option<Verdict>, gate: &str) -> Result<Answer, Problem> {
        self.caller.may(Scope::Override, "")?;
        let found = self.find()?;
        self.caller.may(Scope::Override, self.service(&found))?;
        let view = match found {
            Found::Open(view) => view,
            Found::Other { view, version } => return Err(self.conflict(&view, version.as_deref())),
            Found::None => {
                return Err(Problem::not_found(format!(
                    "no rollout of the Canary {} is open, so nothing can be decided; its hooks begin one, or `coalmine \
                     rollout start --workload Canary/{0}`",
                    self.name()
                )));
            }
        };
        let is_ordered = view.overridden.is_some() && view.standing() == Verdict::Rollback;
        if verdict.is_none() && !is_ordered {
            return Ok(Answer::new(StatusCode::ACCEPTED, told(&view)));
        }
        let caller = self.caller.name();
        let actor = self.payload.get("actor");
        let actor = actor.map_or_else(|| caller.to_owned(), |actor| format!("{caller}/{actor}"));
        let reason = self.payload.get("reason");
        let reason = reason.map_or_else(|| format!("asked for at {gate}"), str::to_owned);
        let rollouts = self.faces.rollouts;
        recorded(UNANSWERED, async move {
            let decided = rollouts
                .override_verdict(&view.id, verdict, actor, reason)
                .await?;
            Ok::<_, Problem>(Answer::new(StatusCode::ACCEPTED, told(&decided)))
        })
        .await
    }

    /// The Canary, as people write it.
    pub(super) fn name(&self) -> String {
        let canary = self.payload.canary();
        format!("{}/{}", canary.namespace, canary.name)
    }

    /// Flagger asks before a canary has any traffic, and without traffic there is nothing to judge: the first increase is
    /// granted where an agent waits for it. What a test has sent to the canary before is no reason against it.
    async fn first_traffic(&self, view: &View) -> Result<Option<Answer>, Problem> {
        if view.standing() != Verdict::Hold || view.overridden.is_some() {
            return Ok(None);
        }
        let canary = self.payload.canary();
        let shown = self.faces.flagger.is_at_zero(&canary, &view.id);
        // Most calls end here, and need not wait for the book.
        if shown.is_some_and(|is_at_zero| !is_at_zero || view.worst.is_some()) {
            return Ok(None);
        }
        let canaries = self.faces.book().canaries(&view.service);
        let agents = match shown {
            Some(_) => connected(&canaries, &view.canary_version),
            None => untouched(&canaries, &view.canary_version),
        };
        let Some(agents) = agents else {
            return Ok(None);
        };
        match self.faces.flagger.granted(&canary, &view.id, Instant::now()) {
            Grant::Stands => {}
            Grant::Over => return Ok(None),
            Grant::None => {
                // On record already, it may be that nobody has heard of it: the process was another one.
                if !view.bootstrapped && !self.record_first_traffic(view, agents).await? {
                    return Ok(None);
                }
                self.faces.flagger.grant(&canary, &view.id, Instant::now());
            }
        }
        Ok(Some(Answer::passed(format!(
            "BOOTSTRAP ({}): no traffic is led to {} yet (agents connected: {agents}), so its first is granted\n",
            view.id, view.canary_version
        ))))
    }

    /// Whether it is on record; not so where the rollout cannot go on.
    async fn record_first_traffic(&self, view: &View, agents: u64) -> Result<bool, Problem> {
        let (rollouts, id) = (self.faces.rollouts.clone(), view.id.clone());
        recorded(UNANSWERED, async move {
            let hook = Hook::ConfirmTrafficIncrease.as_str();
            match rollouts.bootstrap(&id, agents, hook).await {
                Ok(_) => Ok::<_, Problem>(true),
                Err(RolloutError::Conflict(problem)) => {
                    tracing::debug!(rollout = id, problem, "no first traffic is granted");
                    Ok(false)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }
}

/// Where the decision log, or the turn, does not come in time.
pub(super) const UNANSWERED: Waiting =
    Waiting::new("the hook cannot be answered", "ask again").within(WITHIN);
