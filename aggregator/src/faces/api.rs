//! The JSON API. What a caller may do is asked in one way: whether it has the scope at all, then whether it has it for
//! the service, so that who has no scope learns no names.

mod audit;
mod decisions;
mod gate;
mod input;
mod records;
mod rollouts;
mod services;
mod watch;

use std::{sync::Arc, time::Duration};

use utoipa_axum::router::OpenApiRouter;

use super::{Faces, problem::Problem};
use crate::{
    access::{Caller, Scope},
    rollouts::View,
};

/// What proofs and checkpoints are: text that is read as it is.
const TEXT: &str = "text/plain; charset=utf-8";

/// How long an answer waits for what goes with it and can be left out: the gate's proof, what was done outside.
const PROVE_WITHIN: Duration = Duration::from_secs(1);

/// The API's routes.
pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .merge(rollouts::routes())
        .merge(gate::routes())
        .merge(watch::routes())
        .merge(decisions::routes())
        .merge(audit::routes())
        .merge(services::routes())
}

/// The rollout of this name, if the caller may do this to it.
fn permitted(faces: &Faces, caller: &Caller, scope: Scope, rollout: &str) -> Result<Arc<View>, Problem> {
    caller.may(scope, "")?;
    let view = faces.rollouts.view(rollout)?;
    caller.may(scope, &view.service)?;
    Ok(view)
}
