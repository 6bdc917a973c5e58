//! Which rollout a call is about: the open one is found, and where there is none an attempt begins.

use std::sync::Arc;

use axum::http::StatusCode;
use coalmine_judge::{record::Workload, v1::Verdict};
use tokio::{sync::OwnedMutexGuard, time::timeout};

use super::{
    attempt::{self, ACTOR, Asked, Next, Open, Revision, UNKNOWN, only_version},
    call::{Call, WITHIN, recorded, slow},
    hook::Hook,
};
use crate::{
    book::locked,
    faces::problem::Problem,
    rollouts::{Question, RolloutError, StartRequest, State, View},
};

/// Which rollout is meant.
pub(super) enum Found {
    /// This one, which is open.
    Open(Arc<View>),
    /// None; the service's open rollout is of something else.
    Other(Arc<View>),
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
            Found::Open(view) => &view.service,
            Found::Other(_) | Found::None => self.payload.service(),
        }
    }

    pub(super) fn find(&self) -> Result<Found, Problem> {
        let rollouts = &self.faces.rollouts;
        if let Some(id) = self.payload.get("rollout") {
            let view = rollouts.view(id)?;
            return Ok(if is_open(&view) {
                Found::Open(view)
            } else {
                Found::None
            });
        }
        let canary = self.payload.canary();
        let mut of_canary = rollouts.find(&Question {
            service: self.payload.get("service").map(str::to_owned),
            namespace: Some(canary.namespace.clone()),
            workload: Some(canary.name.clone()),
            ..Question::default()
        });
        of_canary.retain(|view| is_open(view) && view.workload.as_ref() == Some(&canary));
        if let Some(view) = of_canary.into_iter().next() {
            return Ok(Found::Open(view));
        }
        let mut of_service = rollouts.find(&Question {
            service: Some(self.payload.service().to_owned()),
            ..Question::default()
        });
        of_service.retain(|view| is_open(view));
        Ok(match of_service.into_iter().next() {
            Some(view) if may_be_of(&view, &canary) => Found::Open(view),
            Some(view) => Found::Other(view),
            None => Found::None,
        })
    }

    /// What follows from a hook that may begin an attempt while a rollout is open.
    pub(super) fn next(&self, hook: Hook, view: &View) -> Next {
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
            version: version.as_deref(),
            is_anew: hook == Hook::PreRollout && self.faces.flagger.is_rolled_back(&canary, &view.id),
        };
        attempt::next(open, asked)
    }

    /// The canary's version, if the metadata or the agents say it.
    fn version(&self, service: &str) -> Option<String> {
        let given = self.payload.get("version").filter(|version| *version != UNKNOWN);
        given.map(str::to_owned).or_else(|| {
            let canaries = locked(&self.faces.ingest.book).canaries(service);
            only_version(&canaries).map(str::to_owned)
        })
    }

    /// The attempt that a hook is about: the open one, or one that begins.
    pub(super) async fn attempt(&self, hook: Hook) -> Result<Arc<View>, Problem> {
        let turn = self.turn().await?;
        let call = self.clone();
        // A caller that goes away must not leave half a start behind.
        recorded(async move {
            let view = call.begin(hook).await;
            drop(turn);
            view
        })
        .await
    }

    async fn begin(&self, hook: Hook) -> Result<Arc<View>, Problem> {
        let open = match self.find()? {
            Found::Open(view) => Some(view),
            Found::Other(view) => return Err(self.conflict(&view)),
            Found::None => None,
        };
        let Some(view) = open else {
            return self.start(self.payload.service(), None).await;
        };
        match self.next(hook, &view) {
            Next::Replace { reason, number } => {
                self.end(&view, reason).await?;
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
                Found::Other(view) => Err(self.conflict(&view)),
                Found::None => Err(Problem::new(StatusCode::CONFLICT, detail)),
            },
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn end(&self, view: &View, reason: String) -> Result<(), Problem> {
        let rollouts = &self.faces.rollouts;
        rollouts.end(&view.id, ACTOR.to_owned(), reason).await?;
        Ok(())
    }

    /// Lets one call after the other begin and end a Canary's attempts.
    pub(super) async fn turn(&self) -> Result<OwnedMutexGuard<()>, Problem> {
        let turn = self.faces.flagger.turn(&self.payload.canary());
        timeout(WITHIN, turn.lock_owned()).await.map_err(|_| slow())
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

    fn no_policy(&self, service: &str) -> Problem {
        let known: Vec<_> = self
            .faces
            .rollouts
            .policies()
            .keys()
            .map(String::as_str)
            .collect();
        Problem::not_found(format!(
            "there is no policy for service {service:?} (there is one for: {}); say in the webhook's metadata.service which \
             service the Canary {} rolls out, or start the aggregator with its --policy",
            known.join(", "),
            self.name()
        ))
    }

    fn conflict(&self, view: &View) -> Problem {
        let of = view.workload.as_ref().map_or_else(String::new, |workload| {
            format!(" of {} {}/{}", workload.kind, workload.namespace, workload.name)
        });
        Problem::new(
            StatusCode::CONFLICT,
            format!(
                "rollout {}{of} is still open for service {}, so none begins for the Canary {}; end it with `coalmine rollout \
                 end {0}`, or say in the webhook's metadata.service which service this Canary rolls out",
                view.id,
                view.service,
                self.name()
            ),
        )
    }
}

fn is_open(view: &View) -> bool {
    view.state != State::Ended
}

/// Whether a rollout may be of a Canary: whoever began it did not say what is rolled out, or said it of the Deployment that
/// the Canary is for, as the pods' labels do.
fn may_be_of(view: &View, canary: &Workload) -> bool {
    let workload = view.workload.as_ref();
    workload.is_none_or(|workload| workload.kind == "Deployment" && workload.namespace == canary.namespace)
}

/// Whether a rollout was begun here; what others began is theirs to end.
fn is_ours(view: &View) -> bool {
    view.actor == ACTOR && attempt::is_attempt(&view.key)
}
