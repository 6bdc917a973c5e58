//! Reviews of new pods (`admission.k8s.io/v1`): an API server's question in, its answer out, without I/O.
//!
//! ```text
//! {"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{
//!   "uid":"…","operation":"CREATE","kind":{"group":"","version":"v1","kind":"Pod"},
//!   "namespace":"shop","dryRun":false,"object":{ the pod }}}
//!
//! {"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{
//!   "uid":"…","allowed":true,"patchType":"JSONPatch","patch":"base64 of the operations","warnings":["…"]}}
//! ```
//!
//! A pod is always allowed. One that asks for an agent and cannot have one stays as it is, and whoever makes it gets
//! the reason as warnings; that it has no agent is found out where rollouts are judged.
//!
//! The review is read twice: first without the pod, so that also a pod that cannot be read is answered.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Injected, Refusal, Settings, Unchanged, inject, refusal::clipped, shown};

/// Largest review. API servers take no request beyond this size themselves.
pub(crate) const MAX_REVIEW_BYTES: usize = 3 << 20;

/// Most characters of a pod's name that are told; Kubernetes has at most 253.
const MAX_NAME: usize = 253;

/// Most lists, maps and their items in a review. What an API server can store, 1.5 MiB, has fewer; many small ones
/// would take a hundred times their text in memory.
const MAX_VALUES: usize = 200_000;

/// Longest name of a review that is answered; API servers send UUIDs.
const MAX_UID_BYTES: usize = 128;

/// Longest warning: API servers cut what is longer.
const MAX_WARNING_BYTES: usize = 256;

/// Most warnings, so that no text of a pod fills a terminal.
const MAX_WARNINGS: usize = 4;

/// What the first warning begins with, and the ones that go on with its sentence.
const WARNING: &str = "coalmine: no agent: ";
const WARNING_GOES_ON: &str = "coalmine: ";

/// Most characters of why something is no review.
const MAX_WHY: usize = 300;

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";

/// What became of the pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Admitted {
    /// It gets an agent.
    Patched,
    /// There is nothing to do.
    Unchanged(Unchanged),
    /// It asks for an agent and cannot have one.
    Refused(Refusal),
}

/// An answer, ready to be sent.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The review with its response, as JSON.
    pub(crate) body: Vec<u8>,
    /// What it says.
    pub(crate) admitted: Admitted,
    /// Whom it is about.
    pub(crate) about: About,
}

/// Whom an answer is about, as a log shows it.
#[derive(Debug)]
pub(crate) struct About {
    /// The pod's namespace.
    pub(crate) namespace: String,
    /// The pod's name, or what its name will begin with.
    pub(crate) name: String,
    /// Whether the pod is only tried, and will not be made.
    pub(crate) is_dry_run: bool,
}

/// A review without its pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Option<Request>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    operation: String,
    kind: ObjectKind,
    namespace: Option<String>,
    dry_run: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct ObjectKind {
    group: String,
    version: String,
    kind: String,
}

/// A review's pod alone.
#[derive(Debug, Deserialize)]
struct ReviewOfPod {
    request: RequestOfPod,
}

#[derive(Debug, Deserialize)]
struct RequestOfPod {
    #[serde(default)]
    object: Value,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reply<'r> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'r>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'r> {
    uid: &'r str,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// The answer to an AdmissionReview; an error is no review and says what is wrong.
pub(crate) fn answer(review: &[u8], settings: &Settings) -> Result<Answer, String> {
    let request = read(review)?;
    let mut about = About {
        namespace: clipped(request.namespace.as_deref().unwrap_or_default(), MAX_NAME),
        name: String::new(),
        is_dry_run: request.dry_run == Some(true),
    };
    let injected = if request.makes_a_pod() {
        match pod_of(review) {
            Ok(pod) => {
                about.name = clipped(name_of(&pod), MAX_NAME);
                inject(&pod, settings)
            }
            Err(refusal) => Injected::Refused(refusal),
        }
    } else {
        Injected::Unchanged(Unchanged::NotANewPod)
    };
    let written = |error: serde_json::Error| format!("the answer cannot be written: {error}");
    let (patch, admitted) = match injected {
        Injected::Patch(patch) => {
            let patch = serde_json::to_vec(&patch).map_err(written)?;
            (Some(STANDARD.encode(patch)), Admitted::Patched)
        }
        Injected::Unchanged(why) => (None, Admitted::Unchanged(why)),
        Injected::Refused(refusal) => (None, Admitted::Refused(refusal)),
    };
    let warnings = match &admitted {
        Admitted::Refused(refusal) => warnings(&refusal.to_string()),
        _ => Vec::new(),
    };
    let reply = Reply {
        api_version: API_VERSION,
        kind: KIND,
        response: Response {
            uid: &request.uid,
            allowed: true,
            patch_type: patch.is_some().then_some("JSONPatch"),
            patch,
            warnings,
        },
    };
    let body = serde_json::to_vec(&reply).map_err(written)?;
    Ok(Answer {
        body,
        admitted,
        about,
    })
}

/// Reads a review without its pod.
fn read(review: &[u8]) -> Result<Request, String> {
    let review: Review = serde_json::from_slice(review).map_err(|error| {
        // The error may quote the review.
        let why: String = error.to_string().chars().take(MAX_WHY).collect();
        format!("not an {KIND} of {API_VERSION}: {why}")
    })?;
    if (review.api_version.as_str(), review.kind.as_str()) != (API_VERSION, KIND) {
        let (version, kind) = (shown(&review.api_version), shown(&review.kind));
        return Err(format!(
            "the body is {kind} of {version}; send an {KIND} of {API_VERSION}"
        ));
    }
    let request = review
        .request
        .ok_or_else(|| format!("the {KIND} has no request"))?;
    if request.uid.is_empty() || request.uid.len() > MAX_UID_BYTES {
        return Err(format!(
            "the request's uid is empty or has more than {MAX_UID_BYTES} bytes"
        ));
    }
    Ok(request)
}

/// Reads the pod of what is known to be a review.
fn pod_of(review: &[u8]) -> Result<Value, Refusal> {
    if values(review) > MAX_VALUES {
        return Err(Refusal::malformed(format!(
            "the pod has more than {MAX_VALUES} values"
        )));
    }
    let review: ReviewOfPod = serde_json::from_slice(review)
        .map_err(|error| Refusal::malformed(format!("the pod cannot be read: {error}")))?;
    Ok(review.request.object)
}

/// How many lists, maps and further items of them there are in a JSON text.
fn values(json: &[u8]) -> usize {
    let (mut count, mut in_text, mut is_escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_text => is_escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' | b',' if !in_text => count = count.saturating_add(1),
            _ => {}
        }
    }
    count
}

fn name_of(pod: &Value) -> &str {
    let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
    match text("/metadata/name") {
        "" => text("/metadata/generateName"),
        name => name,
    }
}

/// A sentence as warnings: lines of ASCII, each of which says whose it is.
fn warnings(sentence: &str) -> Vec<String> {
    let sentence = plain(sentence);
    let (mut rest, mut begin) = (sentence.as_str(), WARNING);
    let mut lines = Vec::new();
    while !rest.is_empty() && lines.len() < MAX_WARNINGS {
        let (line, after) = first_line(rest, MAX_WARNING_BYTES.saturating_sub(begin.len()));
        lines.push(format!("{begin}{line}"));
        (rest, begin) = (after, WARNING_GOES_ON);
    }
    lines
}

/// What of a text of ASCII has room on a line, up to a space if it has any, and what follows.
fn first_line(text: &str, room: usize) -> (&str, &str) {
    let Some((line, after)) = text.split_at_checked(room).filter(|(_, after)| !after.is_empty()) else {
        return (text, "");
    };
    match line.rsplit_once(' ') {
        // What follows the space is as long as the word that was cut off, and the rest.
        Some((whole, cut)) if !whole.is_empty() => {
            let next = text.len().saturating_sub(after.len()).saturating_sub(cut.len());
            (whole, text.get(next..).unwrap_or_default())
        }
        _ => (line, after.trim_start()),
    }
}

/// A text in ASCII, on one line: a warning travels in a header.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => plain.push(c),
            c if c.is_control() => plain.push(' '),
            c => plain.extend(c.escape_unicode()),
        }
    }
    plain
}

// === impl Request ===

impl Request {
    fn makes_a_pod(&self) -> bool {
        let ObjectKind { group, version, kind } = &self.kind;
        self.operation == "CREATE" && (group.as_str(), version.as_str(), kind.as_str()) == ("", "v1", "Pod")
    }
}
