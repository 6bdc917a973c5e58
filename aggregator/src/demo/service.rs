//! The service that is rolled out: answers a small JSON body after a realistic time.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::traffic::Random;
use crate::{
    cli::{Exit, Failure},
    clock,
};

/// Median and spread of the latency.
const MEDIAN_MS: f64 = 6.0;
const SIGMA: f64 = 0.6;

/// Share of requests that fail on every instance.
const BACKGROUND_ERRORS: f64 = 0.001;

/// Share of the failing tenant's requests that fail.
const FAULT: f64 = 0.15;

/// What the service takes.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
    /// Seed of the chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The tenant that fails
    #[arg(long, requires = "fail_at_ms")]
    fail: Option<String>,
    /// When it begins to fail, milliseconds since the Unix epoch
    #[arg(long)]
    fail_at_ms: Option<u64>,
}

struct App {
    random: Mutex<Random>,
    fail: Option<(String, u64)>,
}

impl App {
    /// How long the answer takes, and whether it is an error.
    fn draw(&self, tenant: &str) -> (Duration, bool) {
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let latency = random.lognormal(MEDIAN_MS, SIGMA).min(1_000.0);
        let failing = self
            .fail
            .as_ref()
            .is_some_and(|(name, at)| name == tenant && clock::now_ms() >= *at);
        let share = if failing { FAULT } else { BACKGROUND_ERRORS };
        (Duration::from_secs_f64(latency / 1_000.0), random.unit() < share)
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let tenant = request
            .headers()
            .get("x-tenant-id")
            .and_then(|value| value.to_str().ok())
            .unwrap_or("");
        let (latency, failed) = self.draw(tenant);
        tokio::time::sleep(latency).await;
        let (status, body) = if failed {
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                r#"{"error":"internal"}"#.to_owned(),
            )
        } else {
            (StatusCode::OK, format!(r#"{{"items":"{}"}}"#, "x".repeat(1_000)))
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("application/json"),
        );
        Ok(response)
    }
}

pub(super) async fn run(options: Options) -> Result<Exit, Failure> {
    let fail = |error: std::io::Error| {
        Failure::new(
            Exit::Unknown,
            format!("cannot listen on {}: {error}", options.listen),
        )
    };
    let listener = TcpListener::bind(options.listen).await.map_err(fail)?;
    let app = Arc::new(App {
        random: Mutex::new(Random::new(options.seed)),
        fail: options.fail.clone().zip(options.fail_at_ms),
    });
    let serve = async {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            stream.set_nodelay(true).ok();
            let app = Arc::clone(&app);
            tokio::spawn(async move {
                let service = service_fn(move |request| Arc::clone(&app).answer(request));
                // A client that breaks off is its own affair.
                hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await
                    .ok();
            });
        }
    };
    tokio::select! {
        () = serve => {}
        () = crate::server::stop_signal() => {}
    }
    Ok(Exit::Good)
}
