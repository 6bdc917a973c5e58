//! What a proxy of these tests does to one message: it cuts the connection, or holds the message until the test lets go.

use std::{
    io,
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

/// How long a test waits for what is to be held.
const PATIENCE: Duration = Duration::from_secs(60);

/// On which side of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The server does not have it yet.
    Before,
    /// The server has done it, and the client does not know.
    After,
}

/// What is to happen to a message.
#[derive(Debug)]
pub(crate) enum Action {
    Cut,
    /// Say so, and wait until the test lets go.
    Hold(Sender<()>, Receiver<()>),
}

/// A request, or the answer to one, that is held until this is dropped.
#[derive(Debug)]
pub struct Held {
    what: String,
    arrived: Receiver<()>,
    _release: Sender<()>,
}

impl Held {
    /// Waits until it is there.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn wait(&self) {
        let arrived = self.arrived.recv_timeout(PATIENCE);
        arrived.unwrap_or_else(|_| panic!("no {} comes through the proxy", self.what));
    }
}

impl Action {
    /// To hold something, and what the test waits for and lets go.
    pub(crate) fn hold(what: String) -> (Self, Held) {
        let (arrive, arrived) = channel();
        let (release, released) = channel();
        let held = Held {
            what,
            arrived,
            _release: release,
        };
        (Self::Hold(arrive, released), held)
    }

    /// Waits if it is to; an error if the connection is to be cut.
    pub(crate) fn act(self) -> io::Result<()> {
        let Self::Hold(arrive, released) = self else {
            return Err(io::ErrorKind::ConnectionAborted.into());
        };
        // An error means that the test has let go already.
        arrive.send(()).ok();
        released.recv().ok();
        Ok(())
    }
}
