//! Who may ask for what, and how often.
//!
//! A caller is found once for each request (`faces/admit.rs`), by the token that it presents or, without one, by what
//! whoever presents none may do:
//!
//! ```text
//!                           from this machine    from another
//! nothing is configured     everything           nothing
//! --anonymous only          everything           what --anonymous says
//! --tokens                  what --anonymous says, and nothing without it
//! ```
//!
//! From this machine is what comes over its loopback, names it as such, and is not sent for a page in a browser: any page
//! that somebody looks at can send there.
//!
//! Tokens are in a file (`access/file.rs`), of which only hashes are known here. It is read again while running: a token
//! that was taken out is unknown two seconds later, and a file that cannot be used changes nothing.

pub(crate) mod file;
mod limits;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use clap::Args;
use coalmine_judge::chain::Hash;
use coalmine_proto::names::MAX_NAME_BYTES;
use governor::clock::MonotonicClock;
use serde::Serialize;
use tokio::time::MissedTickBehavior;

use self::{
    file::Grant,
    limits::{Held, Holder, Key, Limiter},
};
use crate::clock;

/// How often the file of tokens is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Requests a second of one address with tokens that are not known.
const UNKNOWN_A_SECOND: u32 = 10;

/// Connections that one address may have open at a time.
const MAX_CONNECTIONS: usize = 1_024;

/// Streams of one caller at a time.
pub(crate) const MAX_STREAMS: usize = 50;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Ask for verdicts, and see rollouts.
    Gate,
    /// Start rollouts and end them.
    Rollout,
    /// Decide in the judge's place.
    Override,
    /// Read decisions, evidence and proofs.
    Audit,
}

impl Scope {
    const ALL: [Self; 4] = [Self::Gate, Self::Rollout, Self::Override, Self::Audit];

    /// The scope's name in files, on the command line and in answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Rollout => "rollout",
            Self::Override => "override",
            Self::Audit => "audit",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == text)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who may ask.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Access")]
#[group(id = "access")]
pub struct Settings {
    /// Who may ask, as `coalmine token create` writes it; read again when it changes
    #[arg(long, env = "COALMINE_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// What whoever presents no token may do; repeat it for several scopes
    #[arg(long, env = "COALMINE_ANONYMOUS", value_name = "SCOPE", value_delimiter = ',')]
    pub anonymous: Vec<Scope>,
    /// Requests a second of one caller
    #[arg(long, env = "COALMINE_RATE_LIMIT", value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate_limit: u32,
}

/// Why a caller is refused, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// It is not known who asks (401).
    #[error("{0}")]
    Unknown(String),
    /// It is known, and may not (403).
    #[error("{0}")]
    Forbidden(String),
}

/// Why a request is not answered, whatever it asks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Denied(Denied),
    /// Its caller asks too fast, and has to wait so long.
    TooFast(Duration),
}

type Tokens = BTreeMap<Hash, Arc<Grant>>;

/// What was found in the file when it was last looked at, so that it is told once: the hash of its content, or why it
/// cannot be read.
type Seen = Result<Hash, String>;

/// What is known of the file.
#[derive(Debug)]
struct Looked {
    seen: Seen,
    /// A content that lacks tokens and was found once. Whoever writes the file where it stands has it cut short for a
    /// moment, which takes nobody's token.
    doubted: Option<Hash>,
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sender {
    /// The address of the other side.
    pub(crate) peer: Option<IpAddr>,
    /// Whether the request itself does not speak against that it was sent on this machine, and for nobody else: see
    /// `faces/admit.rs`.
    pub(crate) may_be_near: bool,
}

impl Sender {
    fn is_near(self) -> bool {
        self.may_be_near && self.peer.is_some_and(|peer| peer.to_canonical().is_loopback())
    }
}

/// Who may ask for what, and how often.
pub struct Access {
    file: Option<PathBuf>,
    /// What callers without a token may do, on this machine and elsewhere.
    local: Arc<Grant>,
    elsewhere: Arc<Grant>,
    tokens: RwLock<Tokens>,
    looked: Mutex<Looked>,
    callers: Limiter<MonotonicClock>,
    unknown: Limiter<MonotonicClock>,
    streams: Arc<Holder>,
    /// Connections that are open, by the address that they come from.
    connections: Arc<Holder>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// Why a file of tokens cannot be used.
struct Unusable {
    problem: String,
    missing: bool,
}

/// Reads the file of tokens.
fn read(path: &Path) -> (Seen, Result<String, Unusable>) {
    match file::read(path) {
        Ok(text) => (Ok(Hash::of(text.as_bytes())), Ok(text)),
        Err(error) => {
            let problem = format!("cannot read the tokens {}: {error}", path.display());
            let missing = error.kind() == io::ErrorKind::NotFound;
            (Err(problem.clone()), Err(Unusable { problem, missing }))
        }
    }
}

fn parse(path: &Path, text: &str) -> Result<Tokens, Unusable> {
    let entries = file::parse(text).map_err(|(line, problem)| Unusable {
        problem: format!("{}:{line}: {problem}", path.display()),
        missing: false,
    })?;
    let known = entries.into_iter();
    Ok(known.map(|entry| (entry.hash, Arc::new(entry.grant))).collect())
}

impl Access {
    /// Reads the tokens. A file that is missing is an error, unless it is said what everybody may do: then there are no
    /// tokens yet, as with a Secret that somebody may add later.
    pub(crate) fn open(settings: &Settings) -> Result<Arc<Self>, String> {
        let (mut seen, mut tokens) = (Err(String::new()), Tokens::new());
        if let Some(path) = &settings.tokens {
            let (found, text) = read(path);
            seen = found;
            match text.and_then(|text| parse(path, &text)) {
                Ok(known) => tokens = known,
                Err(unusable) if unusable.missing && !settings.anonymous.is_empty() => {
                    tracing::warn!(file = %path.display(), "there are no tokens yet; they are read when the file appears");
                }
                Err(unusable) if unusable.missing => {
                    return Err(format!(
                        "{}; make it with `coalmine token create --file`",
                        unusable.problem
                    ));
                }
                Err(unusable) => return Err(unusable.problem),
            }
        }
        let said: BTreeSet<_> = settings.anonymous.iter().copied().collect();
        let local = match &settings.tokens {
            Some(_) => said.clone(),
            None => Scope::ALL.into(),
        };
        Ok(Arc::new(Self {
            file: settings.tokens.clone(),
            local: Arc::new(Grant::anonymous(local)),
            elsewhere: Arc::new(Grant::anonymous(said)),
            tokens: RwLock::new(tokens),
            looked: Mutex::new(Looked { seen, doubted: None }),
            callers: Limiter::new(settings.rate_limit, MonotonicClock),
            unknown: Limiter::new(UNKNOWN_A_SECOND, MonotonicClock),
            streams: Arc::new(Holder::new(MAX_STREAMS)),
            connections: Arc::new(Holder::new(MAX_CONNECTIONS)),
        }))
    }

    /// Reads the file of tokens again whenever it changes; ends only if there is none.
    pub(crate) async fn follow(self: Arc<Self>) {
        if self.file.is_none() {
            return;
        }
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            let access = Arc::clone(&self);
            // A disk that does not answer holds up nobody who asks.
            if let Err(error) = tokio::task::spawn_blocking(move || access.look()).await {
                tracing::error!(%error, "the file of tokens could not be looked at");
            }
        }
    }

    /// Takes what is in the file, if that has changed and can be used. The content is compared, since a second change
    /// within one tick of the file system's clock does not show in a file's times. Tokens are given up only when the
    /// next look finds the same.
    fn look(&self) {
        let Some(path) = &self.file else { return };
        let (found, text) = read(path);
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let doubted = looked.doubted.take();
        if looked.seen == found {
            return;
        }
        let parsed = text.and_then(|text| parse(path, &text));
        if let (Ok(known), Ok(content)) = (&parsed, &found)
            && doubted != Some(*content)
            && self.loses(known)
        {
            looked.doubted = Some(*content);
            return;
        }
        looked.seen = found;
        match parsed {
            Ok(known) => {
                tracing::info!(file = %path.display(), tokens = known.len(), "the tokens were read again");
                let before = std::mem::replace(
                    &mut *self.tokens.write().unwrap_or_else(PoisonError::into_inner),
                    known,
                );
                // Whoever asks does not wait for that.
                drop(before);
            }
            Err(unusable) => {
                tracing::warn!(problem = unusable.problem, "the tokens stay as they were");
            }
        }
    }

    /// Whether there is a token that is not among these.
    fn loses(&self, known: &Tokens) -> bool {
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        tokens.keys().any(|token| !known.contains_key(token))
    }

    /// Who asks at this time, from there, with this token or with none.
    pub(crate) fn caller(
        self: &Arc<Self>,
        token: Option<&str>,
        sender: Sender,
        now_ms: u64,
    ) -> Result<Caller, Denied> {
        let token = token.map(hash).transpose()?;
        let grant = match &token {
            Some(token) => self.find(token, now_ms)?,
            None if sender.is_near() => Arc::clone(&self.local),
            None => Arc::clone(&self.elsewhere),
        };
        Ok(Caller {
            grant,
            token,
            sender,
            access: Arc::clone(self),
        })
    }

    fn find(&self, token: &Hash, now_ms: u64) -> Result<Arc<Grant>, Denied> {
        let grant = {
            let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
            tokens.get(token).cloned()
        };
        let grant = grant.ok_or_else(|| {
            let problem = match &self.file {
                Some(_) => "the token is not known; it was revoked, or it is another aggregator's",
                None => "the token is not known: the aggregator runs without --tokens",
            };
            Denied::Unknown(problem.to_owned())
        })?;
        if let Some(until) = grant.until.filter(|_| grant.has_expired(now_ms)) {
            return Err(Denied::Unknown(format!(
                "the token {} has expired at {until}; make another with `coalmine token create`",
                grant.name
            )));
        }
        Ok(grant)
    }

    /// Counts a request of whoever was found to send it. One with a token that is not known counts for its address, and
    /// apart: known ones from there are not held up by it.
    pub(crate) fn count(
        &self,
        caller: Result<Caller, Denied>,
        peer: Option<IpAddr>,
    ) -> Result<Caller, Refusal> {
        let taken = match &caller {
            Ok(caller) => self.callers.take(&caller.key()),
            Err(_) => self.unknown.take(&Key::of_peer(peer)),
        };
        taken.map_err(Refusal::TooFast)?;
        caller.map_err(Refusal::Denied)
    }

    /// A place for a connection from an address; none where as many are open as one may have.
    pub(crate) fn connection(&self, peer: IpAddr) -> Option<Held> {
        self.connections.take(Key::of_peer(Some(peer)))
    }

    /// What to tell somebody who presents no token and needs one.
    fn invitation(&self, scope: Scope) -> String {
        if self.file.is_none() {
            return "without --tokens only programs on this machine that call it localhost may do this, and whoever else asks \
                    what --anonymous says: give the aggregator --tokens, or say so with --anonymous"
                .to_owned();
        }
        format!(
            "this needs a token with the scope {scope}; send it as `Authorization: Bearer TOKEN`, as the password of \
             Basic, or before the path as /t/TOKEN"
        )
    }
}

/// The hash of a token, if this is one.
fn hash(token: &str) -> Result<Hash, Denied> {
    if file::is_token(token) {
        return Ok(Hash::of(token.as_bytes()));
    }
    let problem = "what was presented is no token: one is cmt_ and 43 letters, digits, - and _, as \
                   `coalmine token create` prints it";
    Err(Denied::Unknown(problem.to_owned()))
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    grant: Arc<Grant>,
    token: Option<Hash>,
    sender: Sender,
    access: Arc<Access>,
}

impl Caller {
    /// The token's name, or `anonymous`.
    pub(crate) fn name(&self) -> &str {
        &self.grant.name
    }

    /// Whether the name says something: it is a token's, or says that none was presented where others have one.
    pub(crate) fn is_named(&self) -> bool {
        self.token.is_some() || self.access.file.is_some()
    }

    /// The same caller by what is known now: its token may have been revoked, or have expired, or say something else.
    pub(crate) fn again(&self) -> Result<Self, Denied> {
        let grant = match &self.token {
            Some(token) => self.access.find(token, clock::now_ms())?,
            None => Arc::clone(&self.grant),
        };
        Ok(Self {
            grant,
            ..self.clone()
        })
    }

    /// A place for a stream; none where the caller has as many as one may have.
    pub(crate) fn stream(&self) -> Option<Held> {
        self.access.streams.take(self.key())
    }

    /// Whether the caller may do this to this service. Where it is not known yet which service is meant, that is the
    /// empty one, and the scope alone counts.
    pub(crate) fn may(&self, scope: Scope, service: &str) -> Result<(), Denied> {
        let grant = &self.grant;
        if !grant.scopes.contains(&scope) {
            if self.token.is_none() {
                return Err(Denied::Unknown(self.access.invitation(scope)));
            }
            return Err(Denied::Forbidden(format!(
                "the token {} has the scopes {}, and this needs {scope}",
                grant.name,
                file::join(&grant.scopes)
            )));
        }
        if service.is_empty() || grant.is_for(service) {
            return Ok(());
        }
        let service: String = service.chars().take(MAX_NAME_BYTES).collect();
        Err(Denied::Forbidden(format!(
            "the token {} is for {}, and not for service {service:?}",
            grant.name,
            file::join(&grant.services)
        )))
    }

    /// The same caller, or who the token in a request's body names, if it names one. The request then counts for that one
    /// too: until its body was read, nobody knew of the token.
    pub(crate) fn or_token(&self, token: Option<&str>) -> Result<Self, Refusal> {
        if token.is_none() {
            return Ok(self.clone());
        }
        let named = self.access.caller(token, self.sender, clock::now_ms());
        self.access.count(named, self.sender.peer)
    }

    /// Whose requests are counted together: those of a token, whatever they come from, or of an address.
    fn key(&self) -> Key {
        if self.token.is_some() {
            Key::Token(Arc::clone(&self.grant.name))
        } else {
            Key::of_peer(self.sender.peer)
        }
    }
}

#[cfg(test)]
mod tests;
