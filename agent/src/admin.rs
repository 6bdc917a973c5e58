//! `/livez`, `/readyz` and `/metrics`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::sleep,
};

use coalmine_proto::exposition::CONTENT_TYPE;

use crate::metrics::Metrics;

const TEXT: &str = "text/plain; charset=utf-8";

/// A client that says nothing for so long is sent away: those that wait may be a prober with little patience.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Most connections at a time; further ones wait.
pub(crate) const MAX_CONNECTIONS: usize = 128;

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, metrics: Metrics, draining: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept an admin connection");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (metrics, draining) = (metrics.clone(), draining.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&request, &metrics, *draining.borrow());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an admin connection ended");
            }
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, metrics: &Metrics, is_draining: bool) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/livez" => text(StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/readyz" if is_draining => text(StatusCode::SERVICE_UNAVAILABLE, TEXT, "stopping\n".to_owned()),
        "/readyz" => text(StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/metrics" => match metrics.text() {
            Ok(body) => text(StatusCode::OK, CONTENT_TYPE, body),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        },
        _ => {
            let paths = "there are /livez, /readyz and /metrics\n";
            text(StatusCode::NOT_FOUND, TEXT, paths.to_owned())
        }
    }
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}
