//! What is known of the pod beside its requests, put into each window that was closed: the application's
//! pools, its connections to the database, and what the pod uses of its machine.
//!
//! All of it is read on the control thread. None of it can hold up a window for longer than a few
//! milliseconds: a scrape is under way by itself, and the kernel's answers come at once.

use std::sync::Arc;

use crate::{config::Config, host::Host, pool::Pools, sockets::Sockets, window::Window};

/// Reads what is known of the pod.
#[derive(Debug)]
pub(crate) struct Context {
    pools: Arc<Pools>,
    sockets: Option<Sockets>,
    host: Host,
}

impl Context {
    /// Of the pod in which this process runs.
    pub(crate) fn new(config: &Config, pools: Arc<Pools>) -> Self {
        let sockets = (config.pool_port > 0).then(|| Sockets::new(config.pool_port));
        Self {
            pools,
            sockets: sockets.and_then(Result::ok),
            host: Host::new(),
        }
    }

    /// Adds to a window what was read since the one before.
    pub(crate) fn add_to(&mut self, window: &mut Window) {
        window.pools = self.pools.take();
        self.host.read(&mut window.host);
        window.host.database = self.sockets.as_mut().and_then(|sockets| sockets.read().ok());
    }
}
