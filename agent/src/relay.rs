//! Serves one client connection: passes bytes on in both directions, unchanged and as they come, and
//! lets the observer watch.
//!
//! Each client connection has its own connection to the application, so nothing of one client ever
//! reaches another. Bytes are written first and observed after. What the other side cannot take yet is
//! kept, at most one buffer of it, and nothing more is read: back-pressure is the kernel's.
//!
//! The connection to the application is elastic: when the application closes it between two requests
//! and accepts another, the client does not notice. Otherwise the client would meet a close that is one
//! hop older than it need be, and lose the race against it three times as often.

mod close;
mod half;
mod refuse;
mod renew;
mod sniff;
mod watched;

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustix::{io::Errno, net::RecvFlags};
use tokio::{
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::{
    gate::Stage,
    http2::{self, Prefixed, Sniffed},
    system,
};
use half::{Half, Stamp, Stop};
use renew::Renewed;
use sniff::Sniff;
pub(crate) use watched::Watched;

/// After this long without a byte, it is asked whether the application has closed before a request is sent.
const STALE_NS: u64 = 10_000_000;

/// How long a client may keep a connection on which the application has said its last answer.
const LAST_CLOSE: Duration = Duration::from_secs(60);

/// How relaying ended.
enum End {
    /// Both directions are closed, or the agent stops.
    Closed,
    /// One side broke off; so must the other.
    Reset,
    /// The application closed between two requests.
    Idle,
    /// The client speaks HTTP/2; these bytes were read.
    Http2(Sniff),
}

/// Both connections, and what is on its way between them.
struct Relay<'w> {
    watched: &'w mut Watched,
    client: TcpStream,
    /// None while another is opened, and at the end.
    upstream: Option<TcpStream>,
    up: Half,
    down: Half,
    /// The first bytes, until it is clear which protocol the client speaks.
    sniffing: Option<Sniff>,
    active_ns: u64,
    renewed: Renewed,
    /// Runs once the application has closed after its last answer.
    last_close: Option<Pin<Box<Sleep>>>,
}

/// Serves a client until either side is done.
pub(crate) async fn serve(client: TcpStream, mut watched: Watched) {
    system::tune(&client);
    let upstream = match watched.proxy.dial().await {
        Ok(upstream) => upstream,
        Err(error) => return Box::pin(refuse::refuse(client, watched, &error)).await,
    };
    let mut relay = Relay::new(client, upstream, &mut watched);
    loop {
        let mut end = poll_fn(|cx| relay.poll(cx)).await;
        if matches!(end, End::Idle) {
            match relay.renew().await {
                None => continue,
                Some(other) => end = other,
            }
        }
        match end {
            End::Closed | End::Idle => return relay.linger().await,
            End::Reset => return relay.reset(),
            End::Http2(first) => {
                let Relay { client, upstream, .. } = relay;
                let client = Prefixed::new(first.client, client);
                let upstream = upstream.map(|upstream| Prefixed::new(first.upstream, upstream));
                return Box::pin(http2::serve(client, upstream, watched)).await;
            }
        }
    }
}

// === impl Relay ===

impl<'w> Relay<'w> {
    fn new(client: TcpStream, upstream: TcpStream, watched: &'w mut Watched) -> Self {
        Self {
            active_ns: watched.proxy.now_ns(),
            watched,
            client,
            upstream: Some(upstream),
            up: Half::default(),
            down: Half::default(),
            sniffing: Some(Sniff::default()),
            renewed: Renewed::No,
            last_close: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let stage = self.watched.proxy.gate.watch(&mut self.watched.ticket, cx);
        if stage == Stage::Closed {
            return Poll::Ready(End::Closed);
        }
        // First what the application did: it may have closed before the next request is sent.
        if let Some(end) = self.poll_down(cx) {
            return Poll::Ready(end);
        }
        if let Some(end) = self.poll_up(cx) {
            return Poll::Ready(end);
        }
        // Only now: what either side has said already is part of what is under way.
        if stage == Stage::Draining && self.is_quiet() && !self.has_unread() {
            return Poll::Ready(End::Closed);
        }
        let last_close = self.last_close.as_mut();
        if last_close.is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(End::Closed);
        }
        match (self.up.is_done(), self.down.is_done()) {
            (true, true) => Poll::Ready(End::Closed),
            _ => Poll::Pending,
        }
    }

    /// Nothing is under way in either direction.
    fn is_quiet(&self) -> bool {
        let nothing_held = self.sniffing.as_ref().is_none_or(|first| first.client.is_empty());
        nothing_held && self.watched.observer.is_quiet() && self.up.is_empty() && self.down.is_empty()
    }

    /// Whether the client has sent something that is not read yet, because the runtime has not said so.
    fn has_unread(&self) -> bool {
        matches!(peek(&self.client), Ok(count) if count > 0)
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if self.down.is_done() {
            return None;
        }
        let Watched { proxy, observer, .. } = &mut *self.watched;
        if let Some(first) = &mut self.sniffing {
            let upstream = self.upstream.as_mut()?;
            match first.poll_upstream(cx, proxy, upstream) {
                Poll::Pending => return None,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Some(self.upstream_lost()),
            }
            if !first.upstream.is_empty() {
                self.down
                    .keep(std::mem::take(&mut first.upstream), proxy.now_ns());
            }
        }
        // Nothing was asked on it: it says that it will close (408), and the client must not take that
        // for the answer to its next request.
        if self.renewed == Renewed::Idle && matches!(peek(self.upstream.as_ref()?), Ok(count) if count > 0) {
            return Some(End::Idle);
        }
        let active_ns = &mut self.active_ns;
        let seen = |bytes: &[u8], now_ns| {
            *active_ns = now_ns;
            observer.on_response(bytes, now_ns, &mut *proxy.recorder.borrow_mut());
        };
        let (from, to) = (self.upstream.as_mut()?, &mut self.client);
        let stop = half::pump(cx, proxy, &mut self.down, from, to, Stamp::Written, seen);
        match stop {
            Poll::Pending => None,
            Poll::Ready(Stop::Closed) => self.upstream_closed(cx),
            // Some applications close idle connections with a reset.
            Poll::Ready(Stop::SourceLost) if self.is_renewable() => Some(End::Idle),
            Poll::Ready(Stop::SourceLost) => Some(self.upstream_lost()),
            Poll::Ready(Stop::DestinationLost) => Some(self.client_lost()),
        }
    }

    fn upstream_closed(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if self.is_renewable() {
            return Some(End::Idle);
        }
        let observer = &self.watched.observer;
        let (answered, is_last) = (observer.is_quiet(), observer.ends_with_close());
        self.watched
            .observe(|o, now_ns, sink| o.upstream_closed(now_ns, sink));
        if self.up.is_broken() && !answered {
            // It did not take what the client sent: that is a reset, whatever the last read says.
            return Some(End::Reset);
        }
        self.down.finish(cx, &mut self.client);
        if is_last {
            // Polled below, in this turn.
            self.last_close = Some(Box::pin(sleep(LAST_CLOSE)));
        }
        None
    }

    /// Whether nothing was begun on the connection to the application that another could not take over.
    fn is_renewable(&self) -> bool {
        self.watched.observer.is_between_requests() && self.up.is_open()
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if let Some(first) = &mut self.sniffing {
            match first.poll_client(cx, &self.watched.proxy, &mut self.client) {
                Poll::Pending => return None,
                Poll::Ready(Ok(Sniffed::Http2)) => {
                    return Some(End::Http2(std::mem::take(first)));
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return Some(self.client_lost()),
            }
            let first = std::mem::take(first);
            let now_ns = self.watched.proxy.now_ns();
            self.up.keep(first.client, now_ns);
            if !first.upstream.is_empty() {
                self.down.keep(first.upstream, now_ns);
            }
            self.sniffing = None;
            // From now on the application's bytes are passed on, those that were held back too.
            cx.waker().wake_by_ref();
        }
        if self.up.is_done() {
            return None;
        }
        if self.is_stale() {
            return Some(End::Idle);
        }
        let Watched { proxy, observer, .. } = &mut *self.watched;
        let (active_ns, renewed) = (&mut self.active_ns, &mut self.renewed);
        let seen = |bytes: &[u8], now_ns| {
            (*active_ns, *renewed) = (now_ns, Renewed::No);
            observer.on_request(bytes, now_ns, &mut *proxy.recorder.borrow_mut());
        };
        let (from, to) = (&mut self.client, self.upstream.as_mut()?);
        match half::pump(cx, proxy, &mut self.up, from, to, Stamp::Read, seen) {
            Poll::Pending => None,
            Poll::Ready(Stop::Closed) => {
                self.watched.observer.client_closed();
                self.up.finish(cx, self.upstream.as_mut()?);
                None
            }
            Poll::Ready(Stop::SourceLost) => Some(self.client_lost()),
            // It took nothing of the request, so another connection may.
            Poll::Ready(Stop::DestinationLost) if self.is_renewable() => Some(End::Idle),
            Poll::Ready(Stop::DestinationLost) => {
                let refused = self.up.break_off();
                self.watched
                    .observe(|o, now_ns, sink| o.on_request(&refused, now_ns, sink));
                // There may still be an answer to read: a refusal of a large upload, for example.
                cx.waker().wake_by_ref();
                None
            }
        }
    }

    /// Whether the application has closed an idle connection without our being told yet.
    fn is_stale(&mut self) -> bool {
        let Watched { proxy, observer, .. } = &*self.watched;
        if !observer.is_between_requests()
            || !self.up.is_empty()
            || proxy.now_ns().saturating_sub(self.active_ns) < STALE_NS
        {
            return false;
        }
        self.upstream
            .as_ref()
            .is_some_and(|upstream| match peek(upstream) {
                Ok(count) => count == 0,
                Err(error) => !matches!(error, Errno::AGAIN | Errno::INTR),
            })
    }

    fn client_lost(&mut self) -> End {
        self.watched
            .observe(|o, now_ns, sink| o.client_reset(now_ns, sink));
        End::Reset
    }
}

/// Looks for a byte, past the runtime, which may not know of it yet.
fn peek(stream: &TcpStream) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    rustix::net::recv(stream, &mut [0_u8; 1][..], flags).map(|(_, count)| count)
}
