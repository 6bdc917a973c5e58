//! Asks an aggregator over HTTP.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// An aggregator.
#[derive(Debug, Clone)]
pub struct Client {
    server: String,
    http: HttpClient<HttpConnector, Full<Bytes>>,
    authorization: Option<HeaderValue>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The server cannot be reached, or did not say what was expected.
    #[error("cannot ask {server}: {cause}; check that the aggregator runs and that --server is right")]
    Unreachable {
        /// Whom we asked.
        server: String,
        /// What happened.
        cause: String,
    },
    /// The server refuses.
    #[error("{detail}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// What the server says.
        detail: String,
    },
}

impl Client {
    /// A client of the aggregator at `server`, such as `http://127.0.0.1:8080`, that presents this token.
    pub fn new(server: &str, token: Option<&str>) -> Result<Self, ClientError> {
        let server = server.trim_end_matches('/');
        let uri: Uri = server
            .parse()
            .map_err(|error| ClientError::Usage(format!("--server {server:?} is not a URL: {error}")))?;
        match (uri.scheme_str(), uri.host()) {
            (Some("http"), Some(_)) => {}
            (Some("https"), _) => {
                return Err(ClientError::Usage(
                    "--server with https is not supported yet; use http on this machine or through a tunnel"
                        .to_owned(),
                ));
            }
            _ => {
                return Err(ClientError::Usage(format!(
                    "--server {server:?} is not an address; write it like http://127.0.0.1:8080"
                )));
            }
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        Ok(Self {
            authorization: token.map(bearer).transpose()?,
            server: server.to_owned(),
            http: HttpClient::builder(TokioExecutor::new()).build(connector),
        })
    }

    /// GET, as JSON.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.ask(Method::GET, path, None).await
    }

    /// POST, as JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let unreachable = |cause: String| ClientError::Unreachable {
            server: self.server.clone(),
            cause,
        };
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.server))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(
                body.map(|body| Bytes::from(body.to_string())).unwrap_or_default(),
            ))
            .map_err(|error| ClientError::Usage(format!("{path:?} cannot be asked for: {error}")))?;
        if let Some(value) = &self.authorization {
            request.headers_mut().insert(header::AUTHORIZATION, value.clone());
        }
        let answer = async {
            let response = self.http.request(request).await.map_err(|error| cause(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await;
            Ok::<_, String>((status, body.map_err(|error| error.to_string())?.to_bytes()))
        };
        let (status, body) = match tokio::time::timeout(TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(unreachable)?,
            Err(_) => return Err(unreachable(format!("no answer within {} s", TIMEOUT.as_secs()))),
        };
        let value: Value = serde_json::from_slice(&body).map_err(|_| {
            unreachable(format!(
                "the answer ({status}) is not JSON, so it is no aggregator"
            ))
        })?;
        if status.is_success() {
            return Ok(value);
        }
        let detail = value
            .get("detail")
            .and_then(Value::as_str)
            .unwrap_or("the server gave no detail");
        Err(ClientError::Refused {
            status,
            detail: detail.to_owned(),
        })
    }
}

fn bearer(token: &str) -> Result<HeaderValue, ClientError> {
    let value = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut value =
        value.map_err(|_| ClientError::Usage("the token has characters that cannot be sent".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The innermost cause, which is what a person needs.
pub(crate) fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Escapes a name for use as one segment of a path.
pub fn segment(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}
