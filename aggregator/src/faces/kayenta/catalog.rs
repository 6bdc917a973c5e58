//! What there is before anything is asked: an account, a judge, and the canary configs.

use axum::{
    Json,
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    answer::JUDGE,
    config::{CanaryConfig, CanaryConfigSummary},
    no_config, only, visible,
};
use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
};

/// The routes.
pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::new()
        .routes(only(routes!(health)))
        .routes(only(routes!(credentials)))
        .routes(only(routes!(judges)))
        .routes(only(routes!(configs)))
        .routes(only(routes!(config)))
}

#[derive(Debug, Serialize, ToSchema)]
struct KayentaHealth {
    /// `UP`.
    status: &'static str,
}

/// That somebody answers.
#[utoipa::path(
    get, path = "/kayenta/health", tag = "kayenta",
    responses((status = 200, description = "It is up", body = KayentaHealth))
)]
async fn health() -> Json<KayentaHealth> {
    Json(KayentaHealth { status: "UP" })
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct KayentaAccount {
    name: &'static str,
    r#type: &'static str,
    supported_types: Vec<&'static str>,
}

/// The only account, for whatever an account is needed.
#[utoipa::path(
    get, path = "/kayenta/credentials", tag = "kayenta",
    responses(
        (status = 200, description = "The only account", body = Vec<KayentaAccount>),
    )
)]
async fn credentials(
    caller: Caller,
    State(faces): State<Faces>,
) -> Result<Json<[KayentaAccount; 1]>, Problem> {
    visible(&faces, &caller)?;
    Ok(Json([KayentaAccount {
        name: JUDGE,
        r#type: JUDGE,
        supported_types: vec!["METRICS_STORE", "CONFIGURATION_STORE", "OBJECT_STORE"],
    }]))
}

#[derive(Debug, Serialize, ToSchema)]
struct KayentaJudge {
    name: &'static str,
    visible: bool,
}

/// The only judge.
#[utoipa::path(
    get, path = "/kayenta/judges", tag = "kayenta",
    responses(
        (status = 200, description = "The only judge", body = Vec<KayentaJudge>),
    )
)]
async fn judges(caller: Caller, State(faces): State<Faces>) -> Result<Json<[KayentaJudge; 1]>, Problem> {
    visible(&faces, &caller)?;
    Ok(Json([KayentaJudge {
        name: JUDGE,
        visible: true,
    }]))
}

#[derive(Debug, Deserialize)]
struct ConfigsQuery {
    application: Option<String>,
}

/// The canary configs: one for each policy that the caller may ask about.
#[utoipa::path(
    get, path = "/kayenta/canaryConfig", tag = "kayenta",
    params(("application" = Option<String>, Query, description = "Only those of this application, which is the service")),
    responses(
        (status = 200, description = "The canary configs", body = Vec<CanaryConfigSummary>),
    )
)]
async fn configs(
    caller: Caller,
    State(faces): State<Faces>,
    query: Result<Query<ConfigsQuery>, QueryRejection>,
) -> Result<Json<Vec<CanaryConfigSummary>>, Problem> {
    let application = query?.0.application;
    let asked = |service: &&str| {
        application
            .as_deref()
            .is_none_or(|application| application == *service)
    };
    let services = visible(&faces, &caller)?.into_iter().filter(asked);
    Ok(Json(services.map(CanaryConfigSummary::of).collect()))
}

/// One canary config.
#[utoipa::path(
    get, path = "/kayenta/canaryConfig/{id}", tag = "kayenta",
    params(("id" = String, Path, description = "The service")),
    responses(
        (status = 200, description = "The canary config", body = CanaryConfig),
        (status = 404, description = "There is no policy for this service"),
    )
)]
async fn config(
    caller: Caller,
    State(faces): State<Faces>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<CanaryConfig>, Problem> {
    let Path(id) = id?;
    caller.may(Scope::Gate, &id)?;
    let policy = faces.rollouts.policies().get(&id);
    let policy = policy.ok_or_else(|| no_config(&faces, &caller, &id))?;
    Ok(Json(CanaryConfig::of(policy)))
}
