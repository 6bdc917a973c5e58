//! Another connection to the application, after it has closed one between two requests.
//!
//! It is opened at once and not only when a request needs it: whether the application still accepts
//! connections decides whether the client learns of the close. An application that only tidies up
//! takes the new connection, and the client does not notice. One that stops refuses it, or closes it
//! unused, and then the client must be told before it sends what nobody would answer.

use rustix::{io::Errno, net::RecvFlags};

use std::time::Duration;

use coalmine_proto::names::Outcome;
use tokio::time::sleep;

use super::{End, Half, Relay};
use crate::{gate::Stage, system};

/// How long the application is kept busy with a connection on which nothing is asked. The race of a close
/// and a request, for which it was opened, is over long before; then the client is told of the close.
const UNUSED: Duration = Duration::from_secs(5);

/// Why the connection to the application is not the client's first, until it has taken something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Renewed {
    /// It is the first, or has taken something of the client.
    #[default]
    No,
    /// The one before was closed, and no request had come.
    Idle,
    /// The one before took nothing of the request that is waiting.
    ForRequest,
}

/// What the client has sent and nobody has read yet.
#[derive(Debug, PartialEq, Eq)]
enum Unread {
    Taken,
    Nothing,
    Reset,
}

impl Relay {
    /// Opens another connection to the application; or says how the client's ends.
    pub(super) async fn renew(&mut self) -> Option<End> {
        self.upstream = None;
        self.down = Half::new(&self.watched.proxy);
        if self.take_unread() == Unread::Reset {
            return Some(End::Reset);
        }
        let has_request = !self.up.is_empty();
        match (self.renewed, has_request) {
            (_, false) if self.watched.proxy.gate.stage() > Stage::Open => return Some(End::Closed),
            (Renewed::Idle, false) => return Some(End::Closed),
            (Renewed::ForRequest, _) => return Some(self.upstream_lost()),
            _ => {}
        }
        match self.watched.proxy.dial(&self.client, self.from).await {
            Ok(upstream) => {
                self.upstream = Some(upstream);
                self.renewed = if has_request {
                    Renewed::ForRequest
                } else {
                    self.last_close = Some(Box::pin(sleep(UNUSED)));
                    Renewed::Idle
                };
                self.watched.active_ns = self.watched.proxy.now_ns();
                None
            }
            Err(error) => {
                tracing::debug!(%error, "the application accepts no other connection");
                // A request may have come meanwhile.
                match self.take_unread() {
                    Unread::Nothing if self.up.is_empty() => return Some(End::Closed),
                    Unread::Reset => {}
                    _ if system::is_exhausted(&error) => {}
                    _ => self.not_accepted(),
                }
                Some(End::Reset)
            }
        }
    }

    /// The application broke off. What the client has sent by then was meant for it, and counts.
    pub(super) fn upstream_lost(&mut self) -> End {
        let is_client_gone = self.take_unread() == Unread::Reset;
        let sent = self.up.take();
        self.watched.observe(|observer, now_ns, recorder| {
            observer.on_request(&sent, now_ns, recorder);
            if is_client_gone {
                observer.client_reset(now_ns, recorder);
            }
            observer.upstream_reset(now_ns, recorder);
        });
        End::Reset
    }

    /// The request that should have opened another connection fails.
    fn not_accepted(&mut self) {
        let sent = self.up.take();
        self.watched.observe(|observer, now_ns, recorder| {
            observer.on_request(&sent, now_ns, recorder);
            observer.end_all(Outcome::ConnectFailure, now_ns, recorder);
        });
    }

    /// Reads what the client has sent, past the runtime, which may not know of it yet.
    fn take_unread(&mut self) -> Unread {
        let proxy = &self.watched.proxy;
        let mut shared = proxy.buffer.borrow_mut();
        match rustix::net::recv(&self.client, &mut shared[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => {
                self.up.append(&shared[..count], proxy.now_ns());
                Unread::Taken
            }
            // A close is found again by the relay.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Unread::Nothing,
            Err(_) => Unread::Reset,
        }
    }
}
