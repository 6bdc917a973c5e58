//! The deploy tools as clients: each one's rule by which it reads our answers, restated, over real requests.
//!
//! Where a tool's source says so, a rule is as odd here as it is there: what a tool makes of an answer decides what
//! becomes of a rollout, not what the answer means. Nothing here waits between two attempts; the tools do.

pub mod argo;
pub mod ci;
pub mod flagger;
pub mod orca;

use std::{net::SocketAddr, sync::mpsc, thread, time::Duration};

use serde_json::Value;

use crate::http::{Answer, request};

/// What a tool does because of one poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// It goes on, or promotes.
    Goes,
    /// It stays where it is and asks again.
    Holds,
    /// It goes back.
    Stops,
    /// It asks again, and counts that: after too many of them it goes back.
    Errors(String),
}

impl Reading {
    /// The word for it, as in a table.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Goes => "goes",
            Self::Holds => "holds",
            Self::Stops => "stops",
            Self::Errors(_) => "errors",
        }
    }
}

/// One poll.
#[derive(Debug, Clone)]
pub struct Poll {
    /// What the tool makes of it.
    pub reading: Reading,
    /// What came with it, as far as the tool gets it: a body, warnings, the output of a command.
    pub came: String,
}

impl Poll {
    /// One that came to nothing.
    pub fn failed(why: String) -> Self {
        Self {
            reading: Reading::Errors(why),
            came: String::new(),
        }
    }
}

/// What is asked about, in the words of every tool.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The service; the Canary of Flagger is named so too.
    pub service: String,
    /// The version on trial.
    pub version: String,
    /// The namespace of the Canary.
    pub namespace: String,
}

/// Whom a tool asks, and as whom.
#[derive(Debug, Clone)]
pub struct Server {
    /// The API.
    pub http: SocketAddr,
    /// The token, if the tool has one.
    pub token: Option<String>,
    /// How long a test lets a tool wait, where the tool would wait longer.
    pub patience: Duration,
}

impl Server {
    /// One request, no longer than `limit`; else why there is no answer.
    fn ask(
        &self,
        limit: Duration,
        method: &'static str,
        path: &str,
        headers: &[(&'static str, String)],
        body: &str,
    ) -> Result<Answer, String> {
        let limit = limit.min(self.patience);
        let (answers, answer) = mpsc::channel();
        let (http, path) = (self.http, path.to_owned());
        let (headers, body) = (headers.to_vec(), body.to_owned());
        // Whoever has waited long enough goes away, whatever becomes of the connection.
        thread::spawn(move || {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, &**value)).collect();
            answers.send(request(http, method, &path, &headers, &body)).ok();
        });
        let answered = answer.recv_timeout(limit);
        let answered = answered.map_err(|_| format!("no answer within {} ms", limit.as_millis()))?;
        answered.map_err(|error| error.to_string())
    }

    /// The header of a client that can send one.
    fn bearer(&self) -> Vec<(&'static str, String)> {
        let token = self.token.iter();
        token
            .map(|token| ("authorization", format!("Bearer {token}")))
            .collect()
    }

    /// A path for a client that can send no header: the token is in front.
    fn prefixed(&self, path: &str) -> String {
        let token = self.token.as_ref();
        token.map_or_else(|| path.to_owned(), |token| format!("/t/{token}{path}"))
    }
}

/// The header of a JSON body.
fn json_body() -> (&'static str, String) {
    ("content-type", "application/json".to_owned())
}

/// Escapes a word for a query, a form, or one part of a path.
fn escape(word: &str) -> String {
    let escaped = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    word.bytes().map(escaped).collect()
}

/// A body as JSON.
fn parse(body: &str) -> Result<Value, String> {
    serde_json::from_str(body).map_err(|error| format!("{error} in {body:?}"))
}
