//! A client connection as it is counted and observed.

use std::rc::Rc;

use coalmine_proto::names::Outcome;

use crate::{gate::Ticket, observer::Http1, proxy::Proxy, recorder::Recorder};

/// A client connection, counted and observed until it is dropped.
pub(crate) struct Watched {
    pub(crate) proxy: Rc<Proxy>,
    pub(crate) ticket: Ticket,
    pub(super) observer: Http1,
}

impl Watched {
    /// Counts a connection from now on, so that a burst cannot exceed --max-connections.
    pub(crate) fn new(proxy: Rc<Proxy>) -> Self {
        proxy.recorder.borrow_mut().connection_opened();
        Self {
            ticket: proxy.gate.enter(),
            observer: Http1::new(),
            proxy,
        }
    }

    pub(super) fn observe(&mut self, tell: impl FnOnce(&mut Http1, u64, &mut Recorder)) {
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
