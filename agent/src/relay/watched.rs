//! A client connection as it is counted and observed.

use std::rc::Rc;

use coalmine_proto::names::Outcome;

use crate::{gate::Ticket, observer::Observer, proxy::Proxy, recorder::Recorder};

/// A client connection, counted and observed until it is dropped.
pub(crate) struct Watched {
    pub(crate) proxy: Rc<Proxy>,
    pub(crate) ticket: Ticket,
    pub(super) observer: Observer,
    /// When a byte was last passed on in either direction.
    pub(super) active_ns: u64,
}

impl Watched {
    /// Counts a connection from now on, so that a burst cannot exceed --max-connections.
    pub(crate) fn new(proxy: Rc<Proxy>) -> Self {
        proxy.recorder.borrow_mut().connection_opened();
        Self {
            ticket: proxy.gate.enter(),
            observer: Observer::new(),
            active_ns: proxy.now_ns(),
            proxy,
        }
    }

    pub(super) fn observe(&mut self, tell: impl FnOnce(&mut Observer, u64, &mut Recorder)) {
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
