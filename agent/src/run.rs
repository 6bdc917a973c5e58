//! Puts the agent together: two threads, each with its own runtime, and the channels between them.
//!
//! ```text
//!   data thread (the caller's)                      control thread
//!   accept, relay, observe, close windows  --windows-->  ring, gRPC session
//!                                          <--settings-
//!                                          --draining->  /livez /readyz /metrics
//! ```

use std::{io, net::SocketAddr, sync::Arc, thread};

use tokio::{
    net::TcpListener,
    runtime::{Builder, LocalOptions, LocalRuntime},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    admin,
    config::Config,
    context::Context,
    handover::Inherited,
    metrics::Metrics,
    pool::{Pools, Scraper},
    proxy::{self, Channels},
    recorder::Settings,
    session::{Session, Surroundings},
    system,
};

/// Closed windows that wait for the control thread; when it takes none, windows become longer. They take memory beside
/// the ring, one of many tenants some MiB.
const WAITING_WINDOWS: usize = 3;

/// Look-ups of the application's name at a time, each on a thread of its own; further ones wait.
const LOOK_UPS: usize = 4;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {why}; {remedy} {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What is wrong with it.
        why: String,
        /// What to do.
        remedy: &'static str,
        /// The flag that gave it.
        flag: &'static str,
    },
    /// The system refuses something that every process needs.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// An agent that has its addresses and serves nobody yet.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    listener: std::net::TcpListener,
    admin: std::net::TcpListener,
}

impl Bound {
    /// Takes both addresses.
    pub fn new(config: Config) -> Result<Self, StartError> {
        Self::with(config, Inherited::default())
    }

    /// Takes the addresses that no supervisor has taken for it.
    pub fn with(mut config: Config, inherited: Inherited) -> Result<Self, StartError> {
        config.max_connections = system::max_connections(config.max_connections);
        let listener = inherited
            .listen
            .map_or_else(|| bind(config.listen, "--listen"), Ok)?;
        let admin = inherited
            .admin
            .map_or_else(|| bind(config.admin, "--admin"), Ok)?;
        Ok(Self {
            config,
            listener,
            admin,
        })
    }

    /// Where clients are accepted.
    pub fn listen_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Where the admin server is.
    pub fn admin_address(&self) -> io::Result<SocketAddr> {
        self.admin.local_addr()
    }

    /// Serves until told to stop, and then until everything is delivered or time is up. Told once more,
    /// it does not wait for requests under way.
    pub fn run(self, stop: mpsc::Receiver<()>) -> Result<(), StartError> {
        on_data_runtime(|data| self.serve(data, stop))
    }

    /// Serves until SIGTERM or SIGINT.
    pub fn run_until_signal(self) -> Result<(), StartError> {
        on_data_runtime(|data| {
            let stop = data.block_on(async { signals() })?;
            self.serve(data, stop)
        })
    }

    fn serve(self, data: &LocalRuntime, stop: mpsc::Receiver<()>) -> Result<(), StartError> {
        let Self {
            config,
            listener,
            admin,
        } = self;
        let (windows, sealed) = mpsc::channel(WAITING_WINDOWS);
        let (set_settings, settings) = watch::channel(Arc::new(Settings::default()));
        let (draining, is_draining) = watch::channel(false);
        let channels = Channels {
            windows,
            settings,
            draining,
        };
        let pools = Arc::new(Pools::default());
        let metrics = Metrics::new(&config, pools.clone());
        let control = Builder::new_current_thread().enable_all().build()?;
        let admin = control.block_on(async { TcpListener::from_std(admin) })?;
        let listener = data.block_on(async { TcpListener::from_std(listener) })?;
        thread::scope(|scope| {
            let config = &config;
            let controlled = thread::Builder::new().name("control".to_owned());
            controlled.spawn_scoped(scope, move || {
                let scraper = Scraper::of(config, pools.clone());
                let process = Surroundings::of_process(Context::new(config, pools));
                let session = Session::new(config, sealed, set_settings, metrics.clone(), process);
                control.block_on(async {
                    tokio::select! {
                        () = session.run() => {}
                        () = scrape(scraper) => {}
                        () = admin::serve(admin, metrics, is_draining) => {}
                    }
                });
                // A look-up of a name that hangs must not keep the process.
                control.shutdown_background();
            })?;
            data.block_on(proxy::run(config, listener, channels, stop));
            Ok(())
        })
    }
}

/// Scrapes the application's pool, where there is one to scrape.
async fn scrape(scraper: Option<Scraper>) {
    match scraper {
        Some(scraper) => scraper.run().await,
        None => std::future::pending().await,
    }
}

/// Does the data thread's work on a runtime of its own.
fn on_data_runtime(work: impl FnOnce(&LocalRuntime) -> Result<(), StartError>) -> Result<(), StartError> {
    let data = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(LOOK_UPS)
        .build_local(LocalOptions::default())?;
    let done = work(&data);
    // A look-up of a name that hangs must not keep the process.
    data.shutdown_background();
    done
}

/// Says each time that the process is asked to stop.
fn signals() -> io::Result<mpsc::Receiver<()>> {
    let (asked, stop) = mpsc::channel(2);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::task::spawn_local(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if asked.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(stop)
}

fn bind(address: SocketAddr, flag: &'static str) -> Result<std::net::TcpListener, StartError> {
    let bound = std::net::TcpListener::bind(address).and_then(|listener| {
        // The standard library's backlog is too short for a burst of clients.
        rustix::net::listen(&listener, BACKLOG)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| {
        let (why, remedy) = match error.kind() {
            io::ErrorKind::AddrInUse => (
                "address in use".to_owned(),
                "stop the other process or choose another",
            ),
            io::ErrorKind::AddrNotAvailable => (
                "this machine does not have the address".to_owned(),
                "choose another",
            ),
            io::ErrorKind::PermissionDenied => ("not permitted".to_owned(), "choose a port above 1023 in"),
            _ => (error.to_string(), "choose another"),
        };
        StartError::Listen {
            address,
            why,
            remedy,
            flag,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::on_data_runtime;

    #[test]
    fn a_look_up_that_hangs_does_not_keep_the_data_thread() {
        let (answer, hangs) = mpsc::channel::<()>();
        let (has_begun, begun) = mpsc::channel();
        let (has_ended, ended) = mpsc::channel();
        thread::spawn(move || {
            let done = on_data_runtime(|data| {
                data.spawn_blocking(move || {
                    has_begun.send(()).unwrap();
                    hangs.recv().ok();
                });
                begun.recv().unwrap();
                Ok(())
            });
            has_ended.send(done.is_ok()).unwrap();
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok(true));
        drop(answer);
    }
}
