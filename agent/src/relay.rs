//! Serves one client connection: passes bytes on in both directions, unchanged and as they come, and
//! lets the observer watch.
//!
//! Each client connection has its own connection to the application, so nothing of one client ever
//! reaches another. Bytes are written first and observed after. What the other side cannot take yet is
//! kept, at most one buffer of it, and nothing more is read: back-pressure is the kernel's.
//!
//! The connection to the application is elastic: when the application closes it between two requests,
//! the client does not notice, and the next request opens another. Otherwise the client would meet a
//! close that is one hop older than it need be, and lose the race against it three times as often.

mod half;
mod refuse;
mod sniff;

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

use crate::{
    gate::{Stage, Ticket},
    http2::{self, Prefixed, Sniffed},
    observer::Http1,
    proxy::Proxy,
    recorder::Recorder,
};
use coalmine_proto::names::Outcome;
use half::{Half, Stamp, Stop};
use sniff::Sniff;

/// After this long without a byte, it is asked whether the application has closed before a request is sent.
const STALE_NS: u64 = 10_000_000;

/// A client connection, counted and observed until it is dropped.
pub(crate) struct Watched {
    pub(crate) proxy: Rc<Proxy>,
    pub(crate) ticket: Ticket,
    observer: Http1,
}

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
    /// None while the client is idle and the application has closed its end.
    upstream: Option<TcpStream>,
    up: Half,
    down: Half,
    /// The first bytes, until it is clear which protocol the client speaks.
    sniffing: Option<Sniff>,
    active_ns: u64,
}

/// Serves a client until either side is done.
pub(crate) async fn serve(client: TcpStream, proxy: Rc<Proxy>) {
    let mut watched = Watched::new(proxy);
    no_delay(&client);
    let upstream = match watched.proxy.dial().await {
        Ok(upstream) => upstream,
        Err(error) => {
            tracing::debug!(%error, "the application accepts no connection");
            return Box::pin(refuse::refuse(client, watched)).await;
        }
    };
    let mut relay = Relay {
        active_ns: watched.proxy.now_ns(),
        watched: &mut watched,
        client,
        upstream: Some(upstream),
        up: Half::default(),
        down: Half::default(),
        sniffing: Some(Sniff::default()),
    };
    loop {
        match poll_fn(|cx| relay.poll(cx)).await {
            End::Closed => return,
            End::Reset => return relay.reset(),
            End::Idle => {
                if !relay.wait_for_request().await {
                    return;
                }
                match relay.watched.proxy.dial().await {
                    Ok(upstream) => relay.upstream = Some(upstream),
                    Err(error) => {
                        tracing::debug!(%error, "the application accepts no connection");
                        relay.not_accepted();
                        return relay.reset();
                    }
                }
            }
            End::Http2(first) => {
                let Relay { client, upstream, .. } = relay;
                let client = Prefixed::new(first.client, client);
                let upstream = upstream.map(|upstream| Prefixed::new(first.upstream, upstream));
                return Box::pin(http2::serve(client, upstream, watched)).await;
            }
        }
    }
}

// === impl Watched ===

impl Watched {
    fn new(proxy: Rc<Proxy>) -> Self {
        proxy.recorder.borrow_mut().connection_opened();
        Self {
            ticket: proxy.gate.enter(),
            observer: Http1::new(),
            proxy,
        }
    }

    fn observe(&mut self, tell: impl FnOnce(&mut Http1, u64, &mut Recorder)) {
        let now_ns = self.proxy.now_ns();
        let mut recorder = self.proxy.recorder.borrow_mut();
        tell(&mut self.observer, now_ns, &mut recorder);
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Nothing is pending unless the agent was told to stop at once: that says nothing about the service.
        self.observe(|observer, now_ns, recorder| {
            observer.end_all(Outcome::ClientAbort, now_ns, recorder);
            recorder.connection_closed();
        });
        self.proxy.gate.leave(&self.ticket);
    }
}

// === impl Relay ===

impl Relay<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let stage = self.watched.proxy.gate.watch(&mut self.watched.ticket, cx);
        if stage > Stage::Open && (stage == Stage::Closed || self.is_quiet()) {
            return Poll::Ready(End::Closed);
        }
        // First what the application did: it may have closed before the next request is sent.
        if let Some(end) = self.poll_down(cx) {
            return Poll::Ready(end);
        }
        if let Some(end) = self.poll_up(cx) {
            return Poll::Ready(end);
        }
        if stage == Stage::Draining && self.is_quiet() {
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

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if self.down.is_done() {
            return None;
        }
        let Watched { proxy, observer, .. } = &mut *self.watched;
        if let Some(first) = &mut self.sniffing {
            let upstream = self.upstream.as_mut()?;
            if first.poll_upstream(cx, proxy, upstream).is_pending() {
                return None;
            }
            if !first.upstream.is_empty() {
                self.down
                    .keep(std::mem::take(&mut first.upstream), proxy.now_ns());
            }
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
            Poll::Ready(Stop::SourceLost) => {
                self.watched
                    .observe(|o, now_ns, sink| o.upstream_reset(now_ns, sink));
                Some(End::Reset)
            }
            Poll::Ready(Stop::DestinationLost) => {
                self.watched
                    .observe(|o, now_ns, sink| o.client_reset(now_ns, sink));
                Some(End::Reset)
            }
        }
    }

    fn upstream_closed(&mut self, cx: &mut Context<'_>) -> Option<End> {
        let observer = &self.watched.observer;
        if observer.is_between_requests() && self.up.is_open() && self.up.is_empty() {
            return Some(End::Idle);
        }
        let answered = observer.is_quiet();
        self.watched
            .observe(|o, now_ns, sink| o.upstream_closed(now_ns, sink));
        if self.up.is_broken() && !answered {
            // It did not take what the client sent: that is a reset, whatever the last read says.
            return Some(End::Reset);
        }
        self.down.finish(cx, &mut self.client);
        None
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if let Some(first) = &mut self.sniffing {
            match first.poll_client(cx, &self.watched.proxy, &mut self.client) {
                Poll::Pending => return None,
                Poll::Ready(Sniffed::Http2) => {
                    return Some(End::Http2(std::mem::take(first)));
                }
                Poll::Ready(_) => {}
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
        let active_ns = &mut self.active_ns;
        let seen = |bytes: &[u8], now_ns| {
            *active_ns = now_ns;
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
            Poll::Ready(Stop::SourceLost) => {
                self.watched
                    .observe(|o, now_ns, sink| o.client_reset(now_ns, sink));
                Some(End::Reset)
            }
            Poll::Ready(Stop::DestinationLost) => {
                // There may still be an answer to read: a refusal of a large upload, for example.
                self.up.break_off();
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
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        self.upstream.as_ref().is_some_and(|upstream| {
            let peeked = rustix::net::recv(upstream, &mut [0_u8; 1][..], flags);
            matches!(peeked, Ok((_, 0)))
        })
    }

    /// Waits, without a connection to the application, for the client's next bytes; false if it is gone.
    async fn wait_for_request(&mut self) -> bool {
        self.upstream = None;
        self.down = Half::default();
        poll_fn(|cx| {
            let stage = self.watched.proxy.gate.watch(&mut self.watched.ticket, cx);
            if stage > Stage::Open {
                return Poll::Ready(false);
            }
            let mut buffer = self.watched.proxy.buffer.borrow_mut();
            let mut buffer = ReadBuf::new(&mut buffer);
            let read = ready!(Pin::new(&mut self.client).poll_read(cx, &mut buffer));
            let bytes = buffer.filled();
            if read.is_err() || bytes.is_empty() {
                return Poll::Ready(false);
            }
            let now_ns = self.watched.proxy.now_ns();
            self.up.keep(bytes.to_vec(), now_ns);
            Poll::Ready(true)
        })
        .await
    }

    /// The request that should have opened another connection fails.
    fn not_accepted(&mut self) {
        let bytes = self.up.take();
        self.watched.observe(|observer, now_ns, recorder| {
            observer.on_request(&bytes, now_ns, recorder);
            observer.end_all(Outcome::ConnectFailure, now_ns, recorder);
        });
    }

    /// Closes both connections with a reset, as one of them was.
    fn reset(&self) {
        for stream in [Some(&self.client), self.upstream.as_ref()].into_iter().flatten() {
            if let Err(error) = stream.set_zero_linger() {
                tracing::debug!(%error, "a reset cannot be passed on");
            }
        }
    }
}

/// Small messages are sent at once.
pub(crate) fn no_delay(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY cannot be set");
    }
}
