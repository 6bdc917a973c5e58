//! What deploy tools poll: one small object, read off the last published view.

use axum::{
    Json,
    extract::State,
    http::{HeaderName, header},
};
use coalmine_judge::note::Proof;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    PROVE_WITHIN,
    input::{Asked, Named, Parameters},
    permitted, records,
};
use crate::{
    access::{Caller, Scope},
    faces::{Faces, problem::Problem},
    rollouts::{Overridden, Question, State as RolloutState, View},
};

/// How much of a reason is shown, in bytes of JSON. With names of the greatest length all the rest takes 1,400 bytes,
/// and a gate's answer without a proof is never larger than 2 KiB.
const REASON_BYTES: usize = 512;

/// The same of a reason to decide in the judge's place, which stands in the reason too.
const OVERRIDE_BYTES: usize = 192;

/// The same of who decided.
const ACTOR_BYTES: usize = 128;

pub(super) fn routes() -> OpenApiRouter<Faces> {
    OpenApiRouter::default()
        .routes(routes!(gate))
        .routes(routes!(gate_of_service))
}

/// The verdict on a rollout.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Gate {
    /// APPROVE, HOLD or ROLLBACK.
    verdict: String,
    /// Health score from 0 to 1.
    score: f64,
    /// The decision that this is, if there was one.
    decision_id: Option<String>,
    /// Why, in one sentence; what is longer than half a KiB is cut.
    reason: String,
    /// The tenant to look at first, if anything is suspected.
    worst_tenant: Option<String>,
    /// The score in parts per million.
    score_ppm: u32,
    /// The hash of the decision's record, if it is in the log.
    decision_hash: Option<String>,
    /// Whether the decision is in the log.
    recorded: bool,
    /// Where the rollout stands.
    state: RolloutState,
    /// The rollout.
    rollout: String,
    /// The decision in the judge's place, if one is in force.
    overridden: Option<Overridden>,
    /// Whether the canary was let have its first traffic although nothing could be judged.
    bootstrapped: bool,
    /// The decision's record as it stands in the log; only if a proof is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    /// The proof that it stands there, in the form of C2SP tlog-proof; only if it is asked for and can be had at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    proof: Option<String>,
}

impl Gate {
    /// What is shown of a rollout, without a proof.
    pub(super) fn of(view: &View) -> Self {
        let overridden = view.overridden.as_ref().map(|overridden| Overridden {
            verdict: overridden.verdict.clone(),
            actor: cut(&overridden.actor, ACTOR_BYTES),
            reason: cut(&overridden.reason, OVERRIDE_BYTES),
            judged: overridden.judged.clone(),
        });
        Self {
            verdict: view.verdict.clone(),
            score: view.score,
            decision_id: view.decision_id.clone(),
            reason: cut(&view.reason, REASON_BYTES),
            worst_tenant: view.worst_tenant.clone(),
            score_ppm: view.score_ppm,
            decision_hash: view.decision_hash.clone(),
            recorded: view.recorded,
            state: view.state,
            rollout: view.id.clone(),
            overridden,
            bootstrapped: view.bootstrapped,
            record: None,
            proof: None,
        }
    }

    fn with_proof(self, proof: &Proof) -> Self {
        let line = proof.extra.clone();
        Self {
            record: line.and_then(|line| String::from_utf8(line).ok()),
            proof: Some(proof.to_string()),
            ..self
        }
    }
}

/// The beginning of a text that takes so many bytes in JSON, if all of it takes more.
fn cut(text: &str, most: usize) -> String {
    const ELLIPSIS: char = '…';
    let mut taken = 0;
    let mut keep = 0;
    for (at, character) in text.char_indices() {
        if taken + ELLIPSIS.len_utf8() <= most {
            keep = at;
        }
        taken += json_bytes(character);
        if taken > most {
            return format!("{}{ELLIPSIS}", &text[..keep]);
        }
    }
    text.to_owned()
}

/// What a character takes in a string of JSON.
const fn json_bytes(character: char) -> usize {
    match character {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        '\0'..='\u{1f}' => 6,
        other => other.len_utf8(),
    }
}

/// A gate as it is answered.
type Answer = ([(HeaderName, &'static str); 1], Json<Gate>);

async fn answer(faces: &Faces, view: &View, with_proof: bool) -> Answer {
    let gate = Gate::of(view);
    let decision = view.decision_id.as_deref();
    let gate = match decision.filter(|_| with_proof && view.recorded) {
        // The verdict does not wait for its proof.
        Some(decision) => {
            let proof = tokio::time::timeout(PROVE_WITHIN, records::proof_of(faces, decision)).await;
            match proof {
                Ok(Ok(proof)) => gate.with_proof(&proof),
                _ => gate,
            }
        }
        None => gate,
    };
    ([(header::CACHE_CONTROL, "no-store")], Json(gate))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct GateQuery {
    /// Whether the decision's record and the proof that it is in the log are wanted too; needs the scope audit as well.
    #[serde(default)]
    proof: bool,
}

impl Parameters for GateQuery {
    const WHICH: &'static str = "the only parameter is proof, true or false";
}

/// Ask for the verdict on a rollout.
///
/// Reads what was last decided, and computes and writes nothing, so it can be asked as often as a tool likes.
#[utoipa::path(
    get,
    path = "/v1/rollouts/{rollout}/gate",
    tag = "rollouts",
    params(("rollout" = String, Path, description = "The rollout"), GateQuery),
    responses(
        (status = 200, description = "The verdict", body = Gate),
        (status = 404, description = "There is no such rollout"),
    )
)]
async fn gate(
    caller: Caller,
    State(faces): State<Faces>,
    Named(rollout): Named,
    Asked(query): Asked<GateQuery>,
) -> Result<Answer, Problem> {
    let view = permitted(&faces, &caller, Scope::Gate, &rollout)?;
    if query.proof {
        caller.may(Scope::Audit, &view.service)?;
    }
    Ok(answer(&faces, &view, query.proof).await)
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ServiceQuery {
    /// The service.
    service: String,
    /// The version on trial.
    version: Option<String>,
    /// The namespace of what is rolled out.
    namespace: Option<String>,
    /// The name of what is rolled out.
    workload: Option<String>,
    /// Whether the decision's record and the proof that it is in the log are wanted too; needs the scope audit as well.
    #[serde(default)]
    proof: bool,
}

impl Parameters for ServiceQuery {
    const WHICH: &'static str =
        "the parameters are service, version, namespace, workload, and proof, which is true or false";
}

/// Ask for the verdict on a service's rollout.
///
/// All that is given must match. Of several open rollouts the one with the worst verdict is answered, and named. If none is
/// open it is HOLD, and the newest that is over is named.
#[utoipa::path(
    get,
    path = "/v1/gate",
    tag = "rollouts",
    params(ServiceQuery),
    responses(
        (status = 200, description = "The verdict", body = Gate),
        (status = 404, description = "No rollout matches"),
    )
)]
async fn gate_of_service(
    caller: Caller,
    State(faces): State<Faces>,
    Asked(query): Asked<ServiceQuery>,
) -> Result<Answer, Problem> {
    caller.may(Scope::Gate, &query.service)?;
    if query.proof {
        caller.may(Scope::Audit, &query.service)?;
    }
    let question = Question {
        service: Some(query.service),
        version: query.version,
        namespace: query.namespace,
        workload: query.workload,
        ..Question::default()
    };
    let views = faces.rollouts.find(&question);
    // The newest of those that are equally bad.
    let worst = views.iter().rev().max_by_key(|view| view.standing());
    let view = worst.ok_or_else(|| nothing_matches(&question))?;
    Ok(answer(&faces, view, query.proof).await)
}

fn nothing_matches(question: &Question) -> Problem {
    let asked = [
        ("service", &question.service),
        ("version", &question.version),
        ("namespace", &question.namespace),
        ("workload", &question.workload),
    ];
    let asked = asked.into_iter().filter_map(|(name, value)| {
        let value: String = value.as_deref()?.chars().take(128).collect();
        Some(format!("{name} {value:?}"))
    });
    Problem::not_found(format!(
        "no rollout matches {}; begin one with POST /v1/rollouts, or with `coalmine rollout start`",
        asked.collect::<Vec<_>>().join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_to_what_it_takes_in_json() {
        for text in [
            "",
            "short",
            &"x".repeat(16),
            &"x".repeat(17),
            &"\u{1}".repeat(9),
            &"\"\\".repeat(9),
            &"ä€😀".repeat(9),
        ] {
            for most in 3..40 {
                let shown = cut(text, most);
                let json = serde_json::to_string(&shown).unwrap();
                assert!(json.len() - 2 <= most, "{text:?} in {most}: {json}");
                let fits = serde_json::to_string(text).unwrap().len() - 2 <= most;
                assert_eq!(shown == text, fits, "{text:?} in {most}: {shown:?}");
                let kept = shown.strip_suffix('…').unwrap_or(&shown);
                assert!(text.starts_with(kept), "{text:?} in {most}: {shown:?}");
            }
        }
        assert_eq!(cut(&"x".repeat(17), 16), format!("{}…", "x".repeat(13)));
    }

    #[test]
    fn an_answer_stays_small_whatever_is_in_it() {
        let name = "x".repeat(128);
        let rollout = format!("{name}-{name}-1700000000");
        let gate = Gate {
            verdict: "ROLLBACK".to_owned(),
            score: 0.123_456_789,
            decision_id: Some(format!("{rollout}-override-at-1700000000000")),
            reason: cut(&"\u{1}€".repeat(5_000), REASON_BYTES),
            worst_tenant: Some(name.clone()),
            score_ppm: 1_000_000,
            decision_hash: Some("f".repeat(71)),
            recorded: false,
            state: RolloutState::Running,
            rollout,
            overridden: Some(Overridden {
                verdict: "ROLLBACK".to_owned(),
                actor: cut(&"\u{1}".repeat(999), ACTOR_BYTES),
                reason: cut(&"\"".repeat(999), OVERRIDE_BYTES),
                judged: "ROLLBACK".to_owned(),
            }),
            bootstrapped: false,
            record: None,
            proof: None,
        };
        let bytes = serde_json::to_string(&gate).unwrap().len();
        assert!(bytes <= 2_048, "{bytes}");
    }
}
