//! Serves one client connection: passes bytes on in both directions, unchanged and as they come, and
//! lets the observer watch.
//!
//! Each client connection has its own connection to the application, so nothing of one client ever
//! reaches another. Bytes are written first and observed after, whatever they are: no byte waits for the
//! observer. What the other side cannot take yet is kept, at most one buffer of it, and nothing more is
//! read: back-pressure is the kernel's.
//!
//! The connection to the application is elastic: when the application closes it between two requests
//! and accepts another, the client does not notice. Otherwise the client would meet a close that is one
//! hop older than it need be, and lose the race against it three times as often.

mod announce;
mod close;
mod half;
mod pipes;
mod refuse;
mod renew;
mod socket;
mod watched;

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use coalmine_proto::names::Outcome;
use rustix::io::Errno;
use tokio::{
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::{gate::Stage, observer::Observer, proxy::Proxy, system};
pub(crate) use announce::header as proxy_header;
use half::{Half, Stop, Watch};
pub(crate) use pipes::Pipes;
use renew::Renewed;
use socket::peek;
pub(crate) use watched::Watched;

/// After this long without a byte, it is asked whether the application has closed before a request is sent.
const STALE_NS: u64 = 10_000_000;

/// Read at first of an answer, so that what follows the head of a long one can stay in the kernel.
const HEAD_ROOM: usize = 4 * 1024;

/// How long a client may keep a connection on which the application has said its last answer.
const LAST_CLOSE: Duration = Duration::from_secs(60);

/// How often it is asked whether a side that has closed its direction is still there. Nothing is read from it any more,
/// so nothing else tells that it has reset since.
const LOOK: Duration = Duration::from_secs(1);

/// How long a client's first request is waited for when the agent stops, or when the application accepts no
/// connection, so that the failure counts for its tenant.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// How relaying ended.
enum End {
    /// Both directions are closed, or the agent stops.
    Closed,
    /// One side broke off; so must the other.
    Reset,
    /// The application closed between two requests.
    Idle,
}

/// Both connections, and what is on its way between them.
struct Relay {
    watched: Watched,
    client: TcpStream,
    /// The client's address, which a socket that was reset does not tell any more.
    from: SocketAddr,
    /// None while it is opened, and at the end.
    upstream: Option<TcpStream>,
    up: Half,
    down: Half,
    renewed: Renewed,
    /// The application has closed after its last answer.
    is_last: bool,
    /// Runs once one side has closed, or the application has a connection on which nothing is asked, or the agent
    /// stops before the first request.
    last_close: Option<Pin<Box<Sleep>>>,
}

/// What goes from the client to the application.
struct Up<'w> {
    observer: &'w mut Observer,
    proxy: &'w Proxy,
    active_ns: &'w mut u64,
    renewed: &'w mut Renewed,
}

/// What goes from the application to the client.
struct Down<'w> {
    observer: &'w mut Observer,
    proxy: &'w Proxy,
    active_ns: &'w mut u64,
}

/// Serves a client until either side is done. What happens once or seldom is boxed: a connection's task has
/// room for the relay and no more.
pub(crate) fn serve(client: TcpStream, from: SocketAddr, watched: Watched) -> impl Future<Output = ()> {
    let mut relay = Relay::new(client, from, watched);
    async move {
        system::tune(&relay.client);
        if let Err(error) = Box::pin(relay.open()).await {
            return Box::pin(relay.refuse(error)).await;
        }
        loop {
            let mut end = poll_fn(|cx| relay.poll(cx)).await;
            if matches!(end, End::Idle) {
                match Box::pin(relay.renew()).await {
                    None => continue,
                    Some(other) => end = other,
                }
            }
            match end {
                End::Closed | End::Idle => return Box::pin(relay.linger()).await,
                End::Reset => return relay.reset(),
            }
        }
    }
}

// === impl Up, impl Down ===

impl Watch for Up<'_> {
    const STAMPS_READ: bool = true;

    fn seen(&mut self, bytes: &[u8], read_ns: u64) {
        (*self.active_ns, *self.renewed) = ((*self.active_ns).max(read_ns), Renewed::No);
        let mut recorder = self.proxy.recorder.borrow_mut();
        self.observer.on_request(bytes, read_ns, &mut *recorder);
        recorder.passed(bytes.len() as u64, 0);
    }

    fn left(&self) -> u64 {
        self.observer.request_body_left()
    }

    fn skipped(&mut self, count: u64) {
        *self.active_ns = self.proxy.now_ns();
        self.observer.skip_request(count);
        self.proxy.recorder.borrow_mut().passed(count, 0);
    }

    fn moved(&mut self, now_ns: u64) {
        *self.active_ns = now_ns;
    }
}

impl Watch for Down<'_> {
    const STAMPS_READ: bool = false;

    fn seen(&mut self, bytes: &[u8], _: u64) {
        let now_ns = self.proxy.now_ns();
        *self.active_ns = now_ns;
        let mut recorder = self.proxy.recorder.borrow_mut();
        self.observer.on_response(bytes, now_ns, &mut *recorder);
        recorder.passed(0, bytes.len() as u64);
    }

    fn left(&self) -> u64 {
        self.observer.response_body_left()
    }

    fn skipped(&mut self, count: u64) {
        let now_ns = self.proxy.now_ns();
        *self.active_ns = now_ns;
        let mut recorder = self.proxy.recorder.borrow_mut();
        self.observer.skip_response(count, now_ns, &mut *recorder);
        recorder.passed(0, count);
    }

    fn answer_of(&self, bytes: &[u8]) -> Option<(usize, u64)> {
        self.observer.answer_of(bytes)
    }

    fn room(&self) -> usize {
        if self.observer.awaits_answer() {
            HEAD_ROOM
        } else {
            usize::MAX
        }
    }
}

// === impl Relay ===

impl Relay {
    fn new(client: TcpStream, from: SocketAddr, watched: Watched) -> Self {
        Self {
            up: Half::new(&watched.proxy),
            down: Half::new(&watched.proxy),
            watched,
            client,
            from,
            upstream: None,
            renewed: Renewed::No,
            is_last: false,
            last_close: None,
        }
    }

    /// Opens the connection to the application.
    async fn open(&mut self) -> io::Result<()> {
        self.upstream = Some(self.watched.proxy.dial(&self.client, self.from).await?);
        self.watched.active_ns = self.watched.proxy.now_ns();
        Ok(())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let stage = self.watched.proxy.gate.watch(&mut self.watched.ticket, cx);
        if stage == Stage::Closed {
            // What is cut off must not look complete.
            return Poll::Ready(if self.is_quiet() { End::Closed } else { End::Reset });
        }
        // First what the application did: it may have closed before the next request is sent.
        let active_ns = self.watched.active_ns;
        if let Some(end) = self.poll_down(cx) {
            return Poll::Ready(end);
        }
        // Whoever has answered in this turn is there.
        if self.watched.active_ns == active_ns && self.is_stale() {
            return Poll::Ready(End::Idle);
        }
        if let Some(end) = self.poll_up(cx) {
            return Poll::Ready(end);
        }
        if self.is_silent_for_long() {
            return Poll::Ready(self.timed_out());
        }
        if stage == Stage::Draining && self.is_last {
            return Poll::Ready(End::Closed);
        }
        // Only now: what either side has said already is part of what is under way.
        if stage == Stage::Draining && self.is_quiet() && !self.has_unread() {
            if !self.watched.observer.is_untouched() {
                return Poll::Ready(End::Closed);
            }
            // A client that was accepted a moment ago is about to ask.
            self.last_close
                .get_or_insert_with(|| Box::pin(sleep(FIRST_REQUEST)));
        }
        if self.down.is_done() && self.watched.observer.pending() > 0 {
            // What the client has asked after the application had closed will have no answer.
            self.watched
                .observe(|o, now_ns, sink| o.upstream_reset(now_ns, sink));
        }
        if self.up.is_done() && self.down.is_done() {
            return Poll::Ready(End::Closed);
        }
        let last_close = self.last_close.as_mut();
        if last_close.is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready()) {
            self.last_close = None;
            if let Some(end) = self.ends_in_time(stage) {
                return Poll::Ready(end);
            }
            // It may need to be asked again.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// How the connection, of which a direction is open, ends now that its time is over; none if it goes on.
    fn ends_in_time(&mut self, stage: Stage) -> Option<End> {
        if self.down.is_done() {
            return self.ends_without_answers();
        }
        let is_unused = self.renewed == Renewed::Idle || stage == Stage::Draining;
        if is_unused && self.is_quiet() && !self.has_unread() {
            return Some(End::Closed);
        }
        if self.up.is_finished() {
            if self.client.peer_addr().is_err() {
                return Some(self.client_lost());
            }
            self.last_close = Some(Box::pin(sleep(LOOK)));
        }
        None
    }

    /// How the connection ends when the application has closed its direction.
    fn ends_without_answers(&mut self) -> Option<End> {
        if self.is_last {
            return Some(End::Closed);
        }
        let upstream = self.upstream.as_ref();
        if upstream.is_some_and(|upstream| upstream.peer_addr().is_ok()) {
            // It may have closed its direction only, and want the rest of the request.
            self.last_close = Some(Box::pin(sleep(LOOK)));
            return None;
        }
        let silent_ns = self.watched.proxy.now_ns().saturating_sub(self.watched.active_ns);
        if Duration::from_nanos(silent_ns) < LAST_CLOSE {
            return Some(self.upstream_lost());
        }
        // After so long it may be the kernel's keep-alive that has learnt of an ordinary close.
        Some(End::Closed)
    }

    /// Nothing is under way in either direction.
    fn is_quiet(&self) -> bool {
        self.watched.observer.is_quiet() && self.up.is_empty() && self.down.is_empty()
    }

    /// Whether nothing was passed on for longer than is allowed; asked when the gate wakes all.
    fn is_silent_for_long(&mut self) -> bool {
        let Watched {
            proxy,
            ticket,
            active_ns,
            ..
        } = &mut self.watched;
        let limit_ns = proxy.idle_timeout_ns;
        limit_ns > 0
            && proxy.gate.is_roll_call(ticket)
            && proxy.now_ns().saturating_sub(*active_ns) > limit_ns
    }

    /// Whether the client has sent something that is not read yet, because the runtime has not said so.
    fn has_unread(&self) -> bool {
        matches!(peek(&self.client), Ok(count) if count > 0)
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if self.down.is_done() {
            return None;
        }
        // Nothing was asked on it: it says that it will close (408), and the client must not take that
        // for the answer to its next request.
        if self.renewed == Renewed::Idle && matches!(peek(self.upstream.as_ref()?), Ok(count) if count > 0) {
            return Some(End::Idle);
        }
        let Watched {
            proxy,
            observer,
            active_ns,
            ..
        } = &mut self.watched;
        let mut watch = Down {
            observer,
            proxy,
            active_ns,
        };
        let (from, to) = (self.upstream.as_ref()?, &self.client);
        match half::pump(cx, proxy, &mut self.down, from, to, &mut watch) {
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
        self.is_last = is_last;
        // Polled below, in this turn.
        let time = if is_last { LAST_CLOSE } else { LOOK };
        self.last_close = Some(Box::pin(sleep(time)));
        None
    }

    /// Whether nothing was begun on the connection to the application that another could not take over.
    fn is_renewable(&self) -> bool {
        self.watched.observer.is_between_requests() && self.up.is_open()
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Option<End> {
        if self.up.is_done() {
            return None;
        }
        let Watched {
            proxy,
            observer,
            active_ns,
            ..
        } = &mut self.watched;
        let mut watch = Up {
            observer,
            proxy,
            active_ns,
            renewed: &mut self.renewed,
        };
        let (from, to) = (&self.client, self.upstream.as_ref()?);
        match half::pump(cx, proxy, &mut self.up, from, to, &mut watch) {
            Poll::Pending => None,
            Poll::Ready(Stop::Closed) => {
                self.watched.observer.client_closed();
                self.up.finish(cx, self.upstream.as_mut()?);
                // Polled below, in this turn.
                self.last_close.get_or_insert_with(|| Box::pin(sleep(LOOK)));
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
        let Watched { proxy, active_ns, .. } = &self.watched;
        if !self.is_renewable() || !self.up.is_empty() || proxy.now_ns().saturating_sub(*active_ns) < STALE_NS
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

    fn timed_out(&mut self) -> End {
        tracing::debug!("a connection was silent for longer than --idle-timeout");
        let observer = &self.watched.observer;
        let end = match observer.pending() {
            0 => End::Closed,
            _ => End::Reset,
        };
        // A client that takes no more of its answer, or sends no more of its request, is no fault of the service.
        let is_clients = !self.down.is_empty() || (self.up.is_empty() && observer.owes_request());
        let outcome = if is_clients {
            Outcome::ClientAbort
        } else {
            Outcome::Timeout
        };
        self.watched
            .observe(|o, now_ns, sink| o.end_all(outcome, now_ns, sink));
        end
    }

    fn client_lost(&mut self) -> End {
        self.watched
            .observe(|o, now_ns, sink| o.client_reset(now_ns, sink));
        End::Reset
    }
}
