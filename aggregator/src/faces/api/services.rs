//! What was counted of a service.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use coalmine_proto::names::{Arm, Outcome};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::input::Named;
use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
};

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default().routes(routes!(show))
}

/// What the book holds of a service since the beginning: the other half of every conservation check.
#[derive(Debug, Serialize, ToSchema)]
struct ServiceCounts {
    service: String,
    /// Windows that agents have sent.
    windows: u64,
    /// Batches that came again.
    duplicates: u64,
    totals: Vec<TenantTotal>,
    /// By `canary` and `baseline`.
    arms: BTreeMap<String, MissingRequests>,
}

/// Requests of a tenant to one build.
#[derive(Debug, Serialize, ToSchema)]
struct TenantTotal {
    /// `canary` or `baseline`.
    arm: String,
    version: String,
    tenant: String,
    /// Requests by outcome.
    outcomes: BTreeMap<String, u64>,
}

/// Requests that are in no window that was judged.
#[derive(Debug, Serialize, ToSchema)]
struct MissingRequests {
    /// In windows that an agent had to drop.
    gap_requests: u64,
    /// In windows that came after their slot was judged.
    late_requests: u64,
}

/// Show what was counted of a service since the beginning.
#[utoipa::path(
    get,
    path = "/v1/services/{service}",
    tag = "decisions",
    params(("service" = String, Path, description = "The service")),
    responses(
        (status = 200, description = "The counts", body = ServiceCounts),
        (status = 404, description = "No agent of the service has connected"),
    )
)]
async fn show(
    caller: Caller,
    State(faces): State<Faces>,
    Named(name): Named,
) -> Result<Json<ServiceCounts>, Problem> {
    caller.may(Scope::Audit, &name)?;
    let counted = counted(&faces, name);
    counted
        .map(Json)
        .map_err(|name| Problem::not_found(format!("no agent of service {name:?} has connected")))
}

/// The counts of a service; its name where there are none.
fn counted(faces: &Faces, name: String) -> Result<ServiceCounts, String> {
    let book = faces.book();
    let Some(service) = book.get(&name) else {
        return Err(name);
    };
    let counts = service.totals().filter(|(_, _, outcomes)| !outcomes.is_empty());
    let totals = counts.map(|(build, tenant, outcomes)| TenantTotal {
        arm: build.arm.as_str().to_owned(),
        version: build.version.clone(),
        tenant: tenant.as_str().to_owned(),
        outcomes: Outcome::ALL
            .into_iter()
            .map(|outcome| (outcome.as_str().to_owned(), outcomes.get(outcome)))
            .collect(),
    });
    let arms = Arm::ALL.into_iter().map(|arm| {
        let (_, gap_requests, late_requests) = service.arm_totals(arm);
        let missing = MissingRequests {
            gap_requests,
            late_requests,
        };
        (arm.as_str().to_owned(), missing)
    });
    let (windows, _, duplicates) = service.received();
    Ok(ServiceCounts {
        windows,
        duplicates,
        totals: totals.collect(),
        arms: arms.collect(),
        service: name,
    })
}
