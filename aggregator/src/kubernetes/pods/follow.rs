//! Follows the pods of one namespace, or of all: lists them, and then hears of each change.
//!
//! ```text
//!   list, in pages ──► watch from that version ──► watch from the last version that was heard of ──► ...
//!        ▲                      │                                   │
//!        └── after a pause ─────┴── anything that goes wrong ───────┘
//! ```
//!
//! The API server ends each watch after [`WATCH_SECONDS`]; that the next one is taken is a sign of life, also where no
//! pod ever changes. Each call has its time, so that a connection which is dead in silence is found out. What makes
//! watches in `kube-runtime` gives no such sign.

use std::{collections::BTreeSet, convert::Infallible, pin::pin, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{ListParams, WatchEvent, WatchParams},
    runtime::watcher::DefaultBackoff,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    MAX_PODS, News,
    read::{Found, read},
};
use crate::client;

/// The pods that are measured.
const SELECTOR: &str = "coalmine.dev/arm in (canary,baseline,flagger)";

/// Pods in one page of a list.
const PAGE: u32 = 500;

/// How long the API server may take for a page, or to take a watch.
const ANSWER: Duration = Duration::from_secs(20);

/// For how long a watch is asked.
const WATCH_SECONDS: u32 = 20;

/// How much later than asked it may end.
const LATE: Duration = Duration::from_secs(5);

/// A watch that ends sooner is not followed by another one at once.
const SHORTEST: Duration = Duration::from_secs(1);

/// The longest pause after something went wrong.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Pods that were left out, beyond which it is forgotten which were spoken of.
const MAX_TOLD: usize = 1_000;

/// Most characters of what the API server says.
const MAX_CAUSE: usize = 500;

/// HTTP statuses that are told apart.
const EXPIRED: u16 = 410;
const UNAUTHORIZED: u16 = 401;
const FORBIDDEN: u16 = 403;

/// Follows the pods of one place.
pub(super) struct Follower {
    api: Api<Pod>,
    /// As in "in all namespaces".
    place: String,
    /// Who it is to the one who is told.
    number: usize,
    news: mpsc::Sender<(usize, News)>,
    /// The trouble that was told of last, for as long as it lasts.
    trouble: Option<String>,
    /// Why pods were left out.
    left_out: BTreeSet<String>,
}

/// Why the pods have to be listed anew.
enum Trouble {
    /// The version to go on from is no longer known, as happens.
    Expired,
    /// Anything else.
    Failed(String),
}

/// What is wrong with more pods than are kept.
pub(super) fn too_many() -> String {
    format!(
        "more than {MAX_PODS} pods have the label coalmine.dev/arm, and no more are kept; watch fewer namespaces"
    )
}

impl Follower {
    pub(super) fn new(
        api: Api<Pod>,
        place: String,
        number: usize,
        news: mpsc::Sender<(usize, News)>,
    ) -> Self {
        Self {
            api,
            place,
            number,
            news,
            trouble: None,
            left_out: BTreeSet::new(),
        }
    }

    /// Follows for as long as it is polled.
    pub(super) async fn run(mut self) {
        // Begins again with short pauses once all went well for two minutes.
        let mut pauses = DefaultBackoff::default();
        loop {
            let Err(trouble) = self.follow().await;
            match trouble {
                Trouble::Expired => tracing::debug!(place = self.place, "the pods are listed anew"),
                Trouble::Failed(text) => self.complain(text),
            }
            sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    async fn follow(&mut self) -> Result<Infallible, Trouble> {
        let mut version = self.list().await?;
        loop {
            version = self.watch(version).await?;
        }
    }

    /// Lists the pods, tells of them, and says which version they have together.
    async fn list(&mut self) -> Result<String, Trouble> {
        let mut params = ListParams::default().labels(SELECTOR).limit(PAGE);
        let mut found = Vec::new();
        let mut seen: usize = 0;
        loop {
            let page = timeout(ANSWER, self.api.list(&params)).await;
            let page = page
                .map_err(|_| self.silent("list"))?
                .map_err(|error| self.failed("list", &error))?;
            seen = seen.saturating_add(page.items.len());
            if seen > MAX_PODS {
                return Err(Trouble::Failed(too_many()));
            }
            for pod in &page.items {
                found.extend(self.read(pod));
            }
            if let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) {
                params = params.continue_token(&token);
                continue;
            }
            let version = self.version(page.metadata.resource_version)?;
            self.tell(News::Listed(found)).await;
            return Ok(version);
        }
    }

    /// Tells of each change since a version, until the API server ends it. Says which version comes after.
    async fn watch(&mut self, mut version: String) -> Result<String, Trouble> {
        let params = WatchParams::default().labels(SELECTOR).timeout(WATCH_SECONDS);
        let began = Instant::now();
        let events = timeout(ANSWER, self.api.watch(&params, &version)).await;
        let events = events
            .map_err(|_| self.silent("watch"))?
            .map_err(|error| self.failed("watch", &error))?;
        let mut events = pin!(events);
        self.recovered();
        self.tell(News::InSync(began)).await;
        let end = Instant::now() + Duration::from_secs(WATCH_SECONDS.into()) + LATE;
        loop {
            let event = timeout_at(end, events.next()).await;
            match event.map_err(|_| self.silent("go on to watch"))? {
                None => break,
                Some(Err(error)) => return Err(self.failed("watch", &error)),
                Some(Ok(WatchEvent::Error(status))) => {
                    return Err(self.refused("watch", status.code, &status.message));
                }
                Some(Ok(WatchEvent::Bookmark(mark))) => {
                    version = self.version(Some(mark.metadata.resource_version))?;
                }
                Some(Ok(WatchEvent::Added(pod) | WatchEvent::Modified(pod))) => {
                    let found = self.read(&pod);
                    version = self.version(pod.metadata.resource_version)?;
                    let uid = pod.metadata.uid.unwrap_or_default();
                    let news = found.map_or(News::Gone(uid), |found| News::Put(Box::new(found)));
                    self.tell(news).await;
                }
                Some(Ok(WatchEvent::Deleted(pod))) => {
                    version = self.version(pod.metadata.resource_version)?;
                    self.tell(News::Gone(pod.metadata.uid.unwrap_or_default())).await;
                }
            }
        }
        sleep_until(began + SHORTEST).await;
        Ok(version)
    }

    /// Reads a pod, and says once why one does not count that should.
    fn read(&mut self, pod: &Pod) -> Option<Found> {
        read(pod).unwrap_or_else(|why| {
            if !self.left_out.contains(&why) {
                if self.left_out.len() >= MAX_TOLD {
                    self.left_out.clear();
                }
                tracing::warn!("a pod is in no rollout, and is not missed in any: {why}");
                self.left_out.insert(why);
            }
            None
        })
    }

    async fn tell(&self, news: News) {
        // An error means that nobody wants to know any more: all of this is about to be dropped.
        self.news.send((self.number, news)).await.ok();
    }

    fn version(&self, version: Option<String>) -> Result<String, Trouble> {
        version.filter(|version| !version.is_empty()).ok_or_else(|| {
            let place = &self.place;
            Trouble::Failed(format!("the API server told of pods {place} without a version"))
        })
    }

    /// Says what is wrong, unless it was said before.
    fn complain(&mut self, text: String) {
        if self.trouble.as_ref() == Some(&text) {
            return;
        }
        tracing::error!(problem = text, "the pods are not watched, trying again");
        self.trouble = Some(text);
    }

    fn recovered(&mut self) {
        if self.trouble.take().is_some() {
            tracing::info!("the pods {} are watched again", self.place);
        }
    }

    fn silent(&self, verb: &str) -> Trouble {
        Trouble::Failed(format!(
            "cannot {verb} the pods {}: the API server does not answer in time",
            self.place
        ))
    }

    fn failed(&self, verb: &str, error: &kube::Error) -> Trouble {
        match error {
            kube::Error::Api(status) => self.refused(verb, status.code, &status.message),
            other => self.refused(verb, 0, &client::cause(other)),
        }
    }

    fn refused(&self, verb: &str, code: u16, cause: &str) -> Trouble {
        if code == EXPIRED {
            return Trouble::Expired;
        }
        let remedy = match code {
            FORBIDDEN => format!("; give the aggregator's account the verb {verb} on pods"),
            UNAUTHORIZED => "; the aggregator's own token or certificate is not accepted".to_owned(),
            _ => String::new(),
        };
        let visible = |c: char| if c.is_control() { ' ' } else { c };
        let cause: String = cause.chars().take(MAX_CAUSE).map(visible).collect();
        Trouble::Failed(format!("cannot {verb} the pods {}: {cause}{remedy}", self.place))
    }
}
