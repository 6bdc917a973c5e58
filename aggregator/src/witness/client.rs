//! Asks a witness to cosign a checkpoint.

use std::{slice, str::FromStr, time::Duration};

use bytes::Bytes;
use coalmine_judge::{
    chain::Hash,
    note::{Kind, Note, VerifierKey},
    witness::AddCheckpoint,
};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};

use crate::client::{cause, segment};

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Most characters of a refusal that are passed on.
const MAX_DETAIL: usize = 500;

/// A witness: where it answers, and the key that checks what it signs.
#[derive(Debug, Clone)]
pub struct Witness {
    url: String,
    key: VerifierKey,
    http: HttpClient<HttpConnector, Full<Bytes>>,
}

/// What a witness has added to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cosigned {
    /// The signature lines of its key, checked; appended to the checkpoint's note they are part of it.
    pub lines: String,
}

/// Why there is no cosignature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WitnessError {
    /// The latest checkpoint that it has cosigned is another one than the request said.
    #[error("the witness has cosigned another checkpoint last: it has size {size}")]
    Conflict {
        /// Its size; 0 if there is none.
        size: u64,
    },
    /// To the witness this is another log than the one that it has cosigned before.
    #[error("the witness does not find the checkpoint consistent with what it has cosigned: {0}")]
    Inconsistent(String),
    /// It refuses for another reason.
    #[error("the witness refuses ({status}): {detail}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// What the witness says.
        detail: String,
    },
    /// It cannot be reached, or is no witness.
    #[error("cannot ask the witness: {0}; check that it runs and that its address is right")]
    Unreachable(String),
    /// What it answered is not a cosignature of its key on this checkpoint.
    #[error("the witness answered without a valid cosignature of its key; check that the key is right")]
    BadCosignature,
}

impl FromStr for Witness {
    type Err = String;

    /// Reads `URL KEY`.
    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "write a witness as its address, a space and its key, such as \
                            \"http://127.0.0.1:7444 witness.example/w1+1234abcd+BASE64\"";
        let (url, key) = text
            .trim()
            .split_once(char::is_whitespace)
            .ok_or_else(|| format!("{text:?} is not an address and a key; {FORM}"))?;
        let key = VerifierKey::parse(key.trim_start()).map_err(|error| format!("its key {error}"))?;
        if key.kind() != Kind::Cosignature {
            return Err(format!(
                "{key} is the key of a log, not of a witness; `coalmine witness key` prints a witness's"
            ));
        }
        let url = url.trim_end_matches('/');
        let uri: Uri = url
            .parse()
            .map_err(|error| format!("{url:?} is not a URL: {error}; {FORM}"))?;
        match (uri.scheme_str(), uri.host(), uri.query()) {
            (Some("http"), Some(_), None) => {}
            (Some("https"), ..) => {
                return Err(
                    "a witness with https is not supported yet; use http on this machine or through a tunnel"
                        .to_owned(),
                );
            }
            _ => return Err(format!("{url:?} is not an address; {FORM}")),
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        Ok(Self {
            url: url.to_owned(),
            key,
            http: HttpClient::builder(TokioExecutor::new()).build(connector),
        })
    }
}

impl Witness {
    /// Where it answers.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The key that checks its cosignatures.
    pub fn key(&self) -> &VerifierKey {
        &self.key
    }

    /// Asks for a cosignature on a checkpoint, given as the signed note that the log publishes. `old` is the size of the
    /// checkpoint that the witness has cosigned last, 0 if it has none, and `path` the proof of consistency from there
    /// (none from 0). After `Conflict` ask again from the size that it names.
    pub async fn add(&self, old: u64, path: Vec<Hash>, note: &str) -> Result<Cosigned, WitnessError> {
        let request = AddCheckpoint {
            old,
            path,
            checkpoint: note.to_owned(),
        };
        let (status, is_size, body) = self
            .ask(Method::POST, "/add-checkpoint", request.to_string())
            .await?;
        if status == StatusCode::OK {
            return self.cosigned(note, &body).ok_or(WitnessError::BadCosignature);
        }
        if status == StatusCode::CONFLICT
            && is_size
            && let Some(size) = size(&body)
        {
            return Err(WitnessError::Conflict { size });
        }
        let detail = detail(&body);
        Err(if status == StatusCode::UNPROCESSABLE_ENTITY {
            WitnessError::Inconsistent(detail)
        } else {
            WitnessError::Refused { status, detail }
        })
    }

    /// The latest checkpoint of a log that it has cosigned, as it has signed it. What the log's own key says is not
    /// checked here.
    pub async fn latest(&self, origin: &str) -> Result<String, WitnessError> {
        let path = format!("/logs/{}", segment(origin));
        let (status, _, body) = self.ask(Method::GET, &path, String::new()).await?;
        if status != StatusCode::OK {
            let detail = detail(&body);
            return Err(WitnessError::Refused { status, detail });
        }
        let note = String::from_utf8(body.to_vec()).map_err(|_| WitnessError::BadCosignature)?;
        let signed = Note::parse(&note).and_then(|note| note.verify(slice::from_ref(&self.key)).map(drop));
        signed.map_err(|_| WitnessError::BadCosignature)?;
        Ok(note)
    }

    /// Status, whether the body is the size of a tree, body.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<(StatusCode, bool, Bytes), WitnessError> {
        let unreachable = |cause: String| WitnessError::Unreachable(format!("{}: {cause}", self.url));
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(header::CONTENT_TYPE, "text/plain; charset=utf-8")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreachable(error.to_string()))?;
        let answer = async {
            let response = self.http.request(request).await.map_err(|error| cause(&error))?;
            let status = response.status();
            let kind = response.headers().get(header::CONTENT_TYPE);
            let is_size = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/x.tlog.size"));
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok::<_, String>((status, is_size, body))
        };
        match tokio::time::timeout(TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(unreachable),
            Err(_) => Err(unreachable(format!("no answer within {} s", TIMEOUT.as_secs()))),
        }
    }

    /// The lines of the witness's key; none if there are none, or one that is not good.
    fn cosigned(&self, note: &str, answer: &[u8]) -> Option<Cosigned> {
        let text = Note::parse(note).ok()?.unverified();
        let whole = format!("{text}\n{}", std::str::from_utf8(answer).ok()?);
        let whole = Note::parse(&whole).ok()?;
        let keys = slice::from_ref(&self.key);
        // An answer with a text of its own would move the place where the signatures begin.
        let signed = whole.verify(keys).ok()?;
        (signed == text).then(|| Cosigned {
            lines: whole.signatures_of(keys).concat(),
        })
    }
}

fn size(body: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(body).ok()?.strip_suffix('\n')?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// The first line of a refusal.
fn detail(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return "it gave no reason".to_owned();
    }
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    line.chars().take(MAX_DETAIL).map(visible).collect()
}
