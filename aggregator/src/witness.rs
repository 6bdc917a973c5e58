//! A witness, both sides of C2SP tlog-witness: the server that cosigns checkpoints of logs which only grow, and the
//! client with which a log asks one.
//!
//! ```text
//! POST /add-checkpoint     a request as in `coalmine_judge::witness`; 200 with the cosignature's line, text/plain;
//!                          409 with the size of the latest cosigned checkpoint, text/x.tlog.size; every other refusal
//!                          is one line of text/plain that says why
//! GET  /<hash>/checkpoint  the latest cosigned checkpoint of the log with that SHA-256 of its name
//! GET  /logs/<name>        the same, by the log's name, percent-encoded
//! GET  /                   what this is, with the key that checks cosignatures
//! ```
//!
//! Anybody may ask: what counts is who has signed the checkpoint. A witness is worth something only where those who can
//! change the log cannot change the witness: run it in another account, on another machine.

mod client;
mod memory;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{self, DefaultBodyLimit, FromRequest as _, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Args;
use coalmine_judge::{
    note::{self, Kind, VerifierKey},
    witness::Refusal,
};
use tokio::{net::TcpListener, sync::watch};

pub use self::client::{Cosigned, Witness, WitnessError};
use self::memory::{Memory, NotCosigned};
use crate::server::StartError;

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// How long the body of a request may take to arrive.
const BODY_WITHIN: Duration = Duration::from_secs(10);

/// How long open requests may take after a signal to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Most characters of a reason.
const MAX_REASON: usize = 1_000;

const TEXT: &str = "text/plain; charset=utf-8";

/// Settings of a witness.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Directory of the witness's key and of what it has cosigned; to lose it is to forget all logs
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Name of the witness, which stands in its signatures, such as witness.example/w1; it cannot change later
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Key of a log that is cosigned, as the aggregator announced it when it began the log (NAME+ID+BASE64); repeat it for
    /// several logs, and for several keys of one log
    #[arg(long = "log", value_name = "KEY", required = true)]
    pub logs: Vec<VerifierKey>,
}

/// The key that checks the cosignatures of the witness with this directory.
pub fn verifier_key(data: &Path) -> Result<VerifierKey, StartError> {
    let key = memory::read_key(data)?.ok_or_else(|| {
        StartError::Usage(format!(
            "there is no key in {}; the first start of `coalmine witness serve` makes one",
            data.display()
        ))
    })?;
    Ok(key.verifier())
}

/// Runs a witness until `stop` resolves.
pub async fn serve(
    settings: Settings,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> Result<(), StartError> {
    if !note::is_name(&settings.name) {
        return Err(StartError::Usage(format!(
            "--name {:?} cannot stand in a signature; it must have no space and no plus sign, and 1 to 255 bytes",
            settings.name
        )));
    }
    if let Some(key) = settings.logs.iter().find(|key| key.kind() != Kind::Ed25519) {
        return Err(StartError::Usage(format!(
            "--log {key} is the key of a witness, not of a log"
        )));
    }
    let memory = Memory::open(&settings.data, &settings.name, &settings.logs)?;
    let failed = |error: std::io::Error| StartError::Failed(error.to_string());
    let address = listener.local_addr().map_err(failed)?;
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "listening beyond this machine: anybody there may ask for cosignatures");
    }
    tracing::info!(data = %settings.data.display(), %address, key = %memory.key(), "ready");

    let (drain, mut draining) = watch::channel(false);
    let stopping = async move {
        // An error means that the sender is gone: stop as well.
        drop(draining.wait_for(|draining| *draining).await);
    };
    let server = axum::serve(listener, routes(memory)).with_graceful_shutdown(stopping);
    let server = async { server.await };
    tokio::pin!(server, stop);
    tokio::select! {
        result = &mut server => return result.map_err(failed),
        () = &mut stop => {}
    }
    tracing::info!("stopping");
    drain.send_replace(true);
    drop(tokio::time::timeout(STOP_WITHIN, server).await);
    Ok(())
}

fn routes(memory: Memory) -> Router {
    Router::new()
        .route("/", get(about))
        .route("/add-checkpoint", post(add))
        .route("/{hash}/checkpoint", get(latest_by_hash))
        .route("/logs/{origin}", get(latest))
        .fallback(|| async {
            answer(
                StatusCode::NOT_FOUND,
                "there is no such route; checkpoints are cosigned at POST /add-checkpoint",
            )
        })
        .method_not_allowed_fallback(|| async {
            answer(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route does not have that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(Arc::new(memory))
}

/// An answer of one line.
fn answer(status: StatusCode, text: &str) -> Response {
    let line: String = text.chars().take(MAX_REASON).collect();
    (status, [(header::CONTENT_TYPE, TEXT)], line + "\n").into_response()
}

async fn about(State(memory): State<Arc<Memory>>) -> Response {
    let key = memory.key();
    let line = format!(
        "coalmine witness: cosigns checkpoints of the logs that it knows at POST /add-checkpoint (C2SP tlog-witness); its \
         key is {key}"
    );
    answer(StatusCode::OK, &line)
}

async fn add(State(memory): State<Arc<Memory>>, request: Request) -> Response {
    let body = match tokio::time::timeout(BODY_WITHIN, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return answer(error.status(), &error.body_text()),
        Err(_) => return answer(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"),
    };
    // A caller that goes away must not leave half of it behind, and the sync must not hold up others.
    let added = tokio::task::spawn_blocking(move || match std::str::from_utf8(&body) {
        Ok(body) => memory.add(body),
        Err(_) => Err(Refusal::Malformed("it is not UTF-8".to_owned()).into()),
    });
    let refusal = match added.await {
        Ok(Ok(line)) => return ([(header::CONTENT_TYPE, TEXT)], line).into_response(),
        Ok(Err(NotCosigned::Refused(refusal))) => refusal,
        Ok(Err(NotCosigned::Failed(problem))) => return internal(&problem),
        Err(error) => return internal(&error),
    };
    let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::BAD_REQUEST);
    if let Refusal::Conflict { size } = refusal {
        // How a log finds out where to begin: nothing is wrong.
        tracing::debug!(size, "a request began elsewhere");
        let kind = [(header::CONTENT_TYPE, "text/x.tlog.size")];
        return (status, kind, format!("{size}\n")).into_response();
    }
    tracing::info!(status = status.as_u16(), %refusal, "request refused");
    answer(status, &refusal.to_string())
}

/// An error that is ours: the cause goes to the log.
fn internal(cause: &dyn std::fmt::Display) -> Response {
    tracing::error!(%cause, "request failed");
    answer(
        StatusCode::INTERNAL_SERVER_ERROR,
        "the witness cannot answer now; its log says why",
    )
}

async fn latest(State(memory): State<Arc<Memory>>, extract::Path(origin): extract::Path<String>) -> Response {
    found(move || memory.latest(&origin)).await
}

async fn latest_by_hash(
    State(memory): State<Arc<Memory>>,
    extract::Path(hash): extract::Path<String>,
) -> Response {
    found(move || memory.latest_by_hash(&hash)).await
}

/// Answers with a checkpoint; looking for it may have to wait until another one is on disk.
async fn found(look: impl FnOnce() -> Option<String> + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(look).await {
        Ok(Some(note)) => ([(header::CONTENT_TYPE, TEXT)], note).into_response(),
        Ok(None) => answer(
            StatusCode::NOT_FOUND,
            "this witness has cosigned no checkpoint of that log",
        ),
        Err(error) => internal(&error),
    }
}

#[cfg(test)]
mod tests;
