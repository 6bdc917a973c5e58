//! Asks the application for its metrics, once a window.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::Incoming,
    client::conn::http1::{Builder, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{
    CustomMetric, Pools, Reading, ScrapeUrl, exposition::Reader, mapping::Mapping, reading::Collector,
};
use crate::config::Config;

const ACCEPT: &str = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";

const USER_AGENT: &str = concat!("coalmine-agent/", env!("CARGO_PKG_VERSION"));

/// The application is not asked more often than this.
const SHORTEST_PERIOD: Duration = Duration::from_secs(1);

/// No answer is waited for longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Largest answer that is read.
const MAX_BODY_BYTES: usize = 8 << 20;

/// Largest head of an answer.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Changes are not logged more often than this, should a trouble come and go.
const QUIET: Duration = Duration::from_secs(60);

/// Asks, and puts what it learns into the shared [`Pools`].
#[derive(Debug)]
pub struct Scraper {
    url: ScrapeUrl,
    mapping: Mapping,
    period: Duration,
    pools: Arc<Pools>,
    /// The connection of the last scrape.
    link: Option<Link>,
    news: News,
}

/// A connection that can be used again.
#[derive(Debug)]
struct Link {
    requests: SendRequest<Empty<Bytes>>,
    connection: JoinHandle<()>,
}

/// What is wrong with a scrape: what it says, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Trouble {
    #[error("cannot connect: {0}; does the application expose its metrics there, over plain HTTP?")]
    Connect(String),
    #[error("the connection broke: {0}; does the application speak HTTP/1 there?")]
    Broken(String),
    #[error("no whole answer within {} ms; let it answer faster, or make --window longer", .0.as_millis())]
    Slow(Duration),
    #[error("it leads elsewhere with status {0}; give the address that it leads to")]
    Redirect(u16),
    #[error("it answers with status {0}; check the path, and that no login is needed")]
    Status(u16),
    #[error("the answer is compressed though that was not asked for; switch it off for the metrics")]
    Compressed,
    #[error("the answer has more than {} MiB; expose fewer metrics", MAX_BODY_BYTES >> 20)]
    TooLarge,
    #[error("the answer ends without # EOF, so that a part of it is missing")]
    Incomplete,
    #[error("no metric of a pool is known there; name the metrics by --pool-metric")]
    NoPool,
}

/// Sees to it that a trouble is told once, and not each second.
#[derive(Debug, Default)]
struct News {
    told: Option<Trouble>,
    next: Option<Instant>,
}

// === impl Scraper ===

impl Scraper {
    /// As the configuration says; none if it names nothing to scrape.
    pub(crate) fn of(config: &Config, pools: Arc<Pools>) -> Option<Self> {
        let url = config.pool_scrape.clone()?;
        Some(Self::new(url, &config.pool_metrics, config.window, pools))
    }

    /// Asks at `url` each `period`.
    pub fn new(url: ScrapeUrl, custom: &[CustomMetric], period: Duration, pools: Arc<Pools>) -> Self {
        Self {
            url,
            mapping: Mapping::new(custom),
            period: period.max(SHORTEST_PERIOD),
            pools,
            link: None,
            news: News::default(),
        }
    }

    /// Goes on until it is dropped.
    pub async fn run(mut self) {
        let mut ticks = interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            self.scrape().await;
        }
    }

    async fn scrape(&mut self) {
        let wait = (self.period.saturating_mul(4) / 5).min(LONGEST_WAIT);
        let outcome = match timeout(wait, self.ask()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Trouble::Slow(wait)),
        };
        let trouble = match outcome {
            Ok(readings) => {
                self.pools.add(&readings);
                readings.is_empty().then_some(Trouble::NoPool)
            }
            Err(trouble) => {
                self.pools.fail();
                Some(trouble)
            }
        };
        if self.news.is_news(trouble.as_ref(), Instant::now()) {
            match trouble {
                Some(trouble) => {
                    tracing::warn!(url = %self.url, %trouble, "the application's pools are not known");
                }
                None => tracing::info!(url = %self.url, "the application's pools are known again"),
            }
        }
    }

    async fn ask(&mut self) -> Result<Vec<Reading>, Trouble> {
        // The application may have closed the kept connection. Then a new one is tried at once.
        if let Some(mut link) = self.link.take() {
            match link.get(&self.url).await {
                Ok(answer) => return self.read(link, answer).await,
                Err(error) => tracing::debug!(%error, "the kept connection to the metrics ended"),
            }
        }
        let mut link = Link::dial(&self.url).await?;
        let answer = link.get(&self.url).await.map_err(|error| broken(&error))?;
        self.read(link, answer).await
    }

    async fn read(&mut self, link: Link, answer: Response<Incoming>) -> Result<Vec<Reading>, Trouble> {
        check(&answer)?;
        let must_be_marked = is_open_metrics(&answer);
        let mut collector = Collector::new(&self.mapping);
        let mut reader = Reader::default();
        let mut body = answer.into_body();
        let mut bytes = 0_usize;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| broken(&error))?;
            let Some(data) = frame.data_ref() else { continue };
            bytes = bytes.saturating_add(data.len());
            if bytes > MAX_BODY_BYTES {
                return Err(Trouble::TooLarge);
            }
            reader.feed(data, &mut collector);
        }
        let end = reader.finish();
        if must_be_marked && !end.is_marked {
            return Err(Trouble::Incomplete);
        }
        if end.skipped > 0 || collector.ignored() > 0 {
            let (skipped, ignored) = (end.skipped, collector.ignored());
            tracing::debug!(skipped, ignored, "a part of the pools' metrics was not read");
        }
        let readings = collector.finish();
        self.link = Some(link);
        Ok(readings)
    }
}

// === impl Link ===

impl Link {
    async fn dial(url: &ScrapeUrl) -> Result<Self, Trouble> {
        let stream = TcpStream::connect(url.address()).await;
        let stream = stream.map_err(|error| Trouble::Connect(error.to_string()))?;
        let (requests, connection) = Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to the metrics ended");
            }
        });
        Ok(Self { requests, connection })
    }

    async fn get(&mut self, url: &ScrapeUrl) -> hyper::Result<Response<Incoming>> {
        self.requests.ready().await?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = Uri::from(url.path().clone());
        let headers = request.headers_mut();
        headers.insert(header::HOST, url.authority().clone());
        headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        self.requests.send_request(request).await
    }
}

impl Drop for Link {
    /// An answer that did not come in time is not waited for.
    fn drop(&mut self) {
        self.connection.abort();
    }
}

// === impl Trouble ===

fn broken(error: &hyper::Error) -> Trouble {
    Trouble::Broken(error.to_string())
}

fn check(answer: &Response<Incoming>) -> Result<(), Trouble> {
    let status = answer.status();
    if status.is_redirection() {
        return Err(Trouble::Redirect(status.as_u16()));
    }
    if status != StatusCode::OK {
        return Err(Trouble::Status(status.as_u16()));
    }
    match answer.headers().get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => Err(Trouble::Compressed),
        _ => Ok(()),
    }
}

fn is_open_metrics(answer: &Response<Incoming>) -> bool {
    let kind = answer.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/openmetrics-text"))
}

// === impl News ===

impl News {
    /// Whether this differs from what was told last, and may be told now.
    fn is_news(&mut self, trouble: Option<&Trouble>, now: Instant) -> bool {
        if self.told.as_ref() == trouble || self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.told = trouble.cloned();
        self.next = Some(now + QUIET);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_once() {
        let (mut news, start) = (News::default(), Instant::now());
        let refused = Trouble::Connect("connection refused".to_owned());
        let slow = Trouble::Slow(Duration::from_millis(800));
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!news.is_news(None, at(0)), "that all is well is no news");
        assert!(news.is_news(Some(&refused), at(1)));
        assert!(!news.is_news(Some(&refused), at(2)));
        // It comes and goes.
        assert!(!news.is_news(None, at(3)));
        assert!(!news.is_news(Some(&slow), at(4)));
        // It stays.
        assert!(news.is_news(Some(&slow), at(61)));
        assert!(!news.is_news(Some(&slow), at(500)));
        assert!(news.is_news(None, at(501)));
        assert!(!news.is_news(None, at(600)));
    }

    #[test]
    fn troubles_say_what_to_do() {
        let slow = Trouble::Slow(Duration::from_millis(800));
        assert_eq!(
            slow.to_string(),
            "no whole answer within 800 ms; let it answer faster, or make --window longer"
        );
        assert_eq!(
            Trouble::TooLarge.to_string(),
            "the answer has more than 8 MiB; expose fewer metrics"
        );
    }

    #[test]
    fn the_application_is_not_asked_too_often() {
        let url: ScrapeUrl = "http://app/metrics".parse().unwrap();
        let period = |window| {
            let pools = Arc::new(Pools::default());
            Scraper::new(url.clone(), &[], Duration::from_millis(window), pools).period
        };
        assert_eq!(period(10), SHORTEST_PERIOD);
        assert_eq!(period(10_000), Duration::from_secs(10));
    }
}
