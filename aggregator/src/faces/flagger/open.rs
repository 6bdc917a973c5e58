//! Which rollout a call is about: the open one is found, and where there is none an attempt begins.

use std::sync::Arc;

use axum::http::StatusCode;
use coalmine_judge::v1::Verdict;
use tokio::{sync::OwnedMutexGuard, time::timeout};

use super::{
    attempt::{self, ACTOR, Asked, Next, Open, Revision, UNKNOWN, only_version},
    call::{Call, UNANSWERED, WITHIN},
};
use crate::{
    access::Scope,
    faces::{problem::Problem, recorded::recorded},
    rollouts::{Question, RolloutError, StartRequest, State, View},
};

/// Which rollout is meant.
pub(super) enum Found {
    /// This one, which is open.
    Open(Arc<View>),
    /// None; the open rollout is of something else.
    Other {
        view: Arc<View>,
        /// The canary's version, if that is what is another one.
        version: Option<String>,
    },
    None,
}

impl Found {
    /// The open rollout, if it was begun here.
    pub(super) fn ours(&self) -> Option<&View> {
        match self {
            Self::Open(view) if is_ours(view) => Some(view),
            _ => None,
        }
    }
}

impl Call {
    /// The service that a rollout is of, or would be.
    pub(super) fn service<'a>(&'a self, found: &'a Found) -> &'a str {
        match found {
            Found::Open(view) | Found::Other { view, .. } => &view.service,
            Found::None => self.payload.service(),
        }
    }

    pub(super) fn find(&self) -> Result<Found, Problem> {
        let rollouts = &self.faces.rollouts;
        if let Some(id) = self.payload.get("rollout") {
            let view = rollouts.view(id)?;
            return Ok(match view.state {
                State::Ended => Found::None,
                State::Running | State::Halted => Found::Open(view),
            });
        }
        let of_service = self.open(&Question {
            service: Some(self.payload.service().to_owned()),
            ..Question::default()
        });
        let view = match of_service.into_iter().next() {
            Some(view) if !self.may_be_of(&view) => return Ok(Found::Other { view, version: None }),
            Some(view) => Some(view),
            None => self.elsewhere(),
        };
        let Some(view) = view else {
            return Ok(Found::None);
        };
        if is_ours(&view) {
            return Ok(Found::Open(view));
        }
        // The verdict on one version must not pass for that on another.
        let version = self.version(&view.service);
        Ok(match version.filter(|version| *version != view.canary_version) {
            None => Found::Open(view),
            version => Found::Other { view, version },
        })
    }

    /// The open rollouts that are meant, newest first.
    fn open(&self, question: &Question) -> Vec<Arc<View>> {
        let mut views = self.faces.rollouts.find(question);
        views.retain(|view| view.state != State::Ended);
        views
    }

    /// The open rollout that names the Canary, where the Canary is not called like a service; of several the worst, since
    /// anybody who may begin a rollout of some service may name any Canary.
    fn elsewhere(&self) -> Option<Arc<View>> {
        let is_known = self
            .faces
            .rollouts
            .policies()
            .contains_key(self.payload.service());
        if is_known || self.payload.get("service").is_some() {
            return None;
        }
        let canary = self.payload.canary();
        let mut views = self.open(&Question {
            namespace: Some(canary.namespace.clone()),
            workload: Some(canary.name.clone()),
            ..Question::default()
        });
        views.retain(|view| view.workload.as_ref() == Some(&canary));
        views.into_iter().rev().max_by_key(|view| view.standing())
    }

    /// Whether the open rollout of the service may be of the Canary: whoever began it did not say what is rolled out, or
    /// said it of the Deployment that the Canary is for, as the pods' labels do.
    fn may_be_of(&self, view: &View) -> bool {
        let Some(workload) = &view.workload else {
            return true;
        };
        let canary = self.payload.canary();
        let is_named_alike = workload.name == canary.name || self.payload.get("service").is_some();
        let is_its_deployment =
            workload.kind == "Deployment" && workload.namespace == canary.namespace && is_named_alike;
        *workload == canary || is_its_deployment
    }

    /// What follows from a hook that may begin an attempt while a rollout is open.
    pub(super) fn next(&self, view: &View) -> Next {
        let canary = self.payload.canary();
        let revision = Revision::new(&canary, self.payload.checksum());
        let version = if view.canary_version == UNKNOWN {
            self.version(&view.service)
        } else {
            None
        };
        let open = Open {
            key: &view.key,
            version: &view.canary_version,
            is_ours: is_ours(view),
            is_settled: view.overridden.is_some() || view.standing() == Verdict::Rollback,
        };
        let asked = Asked {
            revision: &revision,
            has_checksum: !self.payload.checksum().is_empty(),
            version: version.as_deref(),
        };
        attempt::next(open, asked)
    }

    /// The canary's version, if the metadata or the agents say it.
    fn version(&self, service: &str) -> Option<String> {
        let given = self.payload.get("version").filter(|version| *version != UNKNOWN);
        given.map(str::to_owned).or_else(|| {
            let canaries = self.faces.book().canaries(service);
            only_version(&canaries).map(str::to_owned)
        })
    }

    /// The attempt that a hook is about: the open one, or one that begins.
    pub(super) async fn attempt(&self) -> Result<Arc<View>, Problem> {
        let turn = self.turn().await?;
        let call = self.clone();
        // A caller that goes away must not leave half a start behind.
        recorded(UNANSWERED, async move {
            let view = call.begin().await;
            drop(turn);
            view
        })
        .await
    }

    async fn begin(&self) -> Result<Arc<View>, Problem> {
        let view = match self.find()? {
            Found::Open(view) => view,
            Found::Other { view, version } => return Err(self.conflict(&view, version.as_deref())),
            Found::None => return self.start(self.payload.service(), None).await,
        };
        match self.next(&view) {
            Next::Replace { reason, number } => {
                self.end(&view.id, reason).await?;
                self.start(&view.service, number).await
            }
            Next::Take => Ok(view),
        }
    }

    async fn start(&self, service: &str, number: Option<u64>) -> Result<Arc<View>, Problem> {
        let rollouts = &self.faces.rollouts;
        if !rollouts.policies().contains_key(service) {
            return Err(self.no_policy(service));
        }
        let canary = self.payload.canary();
        let revision = Revision::new(&canary, self.payload.checksum());
        let number = number.unwrap_or_else(|| {
            let views = rollouts.list();
            revision.next_number(views.iter().map(|view| view.key.as_str()))
        });
        let version = self.version(service);
        let request = StartRequest {
            service: service.to_owned(),
            key: Some(revision.key(number, version.is_some())),
            canary_version: version.unwrap_or_else(|| UNKNOWN.to_owned()),
            baseline_version: None,
            actor: Some(ACTOR.to_owned()),
            workload: Some(canary),
        };
        match rollouts.start(request).await {
            Ok((view, _)) => Ok(view),
            // Somebody else may have begun one at the same moment.
            Err(RolloutError::Conflict(detail)) => match self.find()? {
                Found::Open(view) => Ok(view),
                Found::Other { view, version } => Err(self.conflict(&view, version.as_deref())),
                Found::None => Err(Problem::new(StatusCode::CONFLICT, detail)),
            },
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn end(&self, id: &str, reason: String) -> Result<(), Problem> {
        let rollouts = &self.faces.rollouts;
        rollouts.end(id, ACTOR.to_owned(), reason).await?;
        Ok(())
    }

    /// Lets one call after the other begin and end a Canary's attempts.
    pub(super) async fn turn(&self) -> Result<OwnedMutexGuard<()>, Problem> {
        let turn = self.faces.flagger.turn(&self.payload.canary());
        timeout(WITHIN, turn.lock_owned())
            .await
            .map_err(|_| UNANSWERED.over())
    }

    pub(super) fn nothing_open(&self, service: &str) -> Problem {
        if !self.faces.rollouts.policies().contains_key(service) {
            return self.no_policy(service);
        }
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "no rollout of the Canary {} is open; one begins with its hooks in phase Progressing, if the token may begin \
                 rollouts, or with `coalmine rollout start --workload Canary/{0}`",
                self.name()
            ),
        )
    }

    /// Says that what is open is over as soon as somebody calls who may begin another.
    pub(super) fn of_another_revision(&self, view: &View) -> Problem {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "rollout {} is of another revision of the Canary {}; one of this revision begins with its hooks, if the token \
                 may begin rollouts",
                view.id,
                self.name()
            ),
        )
    }

    fn no_policy(&self, service: &str) -> Problem {
        let services = self.faces.rollouts.policies().keys();
        // Those that the caller may not see are none of its business.
        let known: Vec<_> = services
            .filter(|known| self.caller.may(Scope::Gate, known).is_ok())
            .map(String::as_str)
            .collect();
        Problem::not_found(format!(
            "there is no policy for service {service:?} (there is one for: {}); say in the webhook's metadata.service which \
             service the Canary {} rolls out, or start the aggregator with its --policy",
            known.join(", "),
            self.name()
        ))
    }

    /// Says what is in the way. `version` is the canary's, where that is what is another one.
    pub(super) fn conflict(&self, view: &View, version: Option<&str>) -> Problem {
        let (id, name) = (&view.id, self.name());
        let detail = if let Some(version) = version {
            format!(
                "rollout {id} is of {} {}, and the Canary {name} is {version}; end it with `coalmine rollout end {id}`, so \
                 that one begins for {version}",
                view.service, view.canary_version
            )
        } else {
            let of = view.workload.as_ref().map_or_else(String::new, |workload| {
                format!(" of {} {}/{}", workload.kind, workload.namespace, workload.name)
            });
            format!(
                "rollout {id}{of} is still open for service {}, so none begins for the Canary {name}; end it with `coalmine \
                 rollout end {id}`, or say in the webhook's metadata.service which service this Canary rolls out",
                view.service
            )
        };
        Problem::new(StatusCode::CONFLICT, detail)
    }
}

/// Whether a rollout was begun here; what others began is theirs to end.
fn is_ours(view: &View) -> bool {
    view.actor == ACTOR && attempt::is_attempt(&view.key)
}
