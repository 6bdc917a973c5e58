//! Accepts clients, closes windows at their borders, and stops in order: the data thread.

use std::{
    cell::RefCell,
    io,
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use crate::{
    config::{Config, Target},
    gate::{Gate, Stage},
    recorder::{Limits, Recorder, Sealed},
    relay,
    sealer::Sealer,
};

/// Room for what one read takes; all connections of the thread share it.
const BUFFER_BYTES: usize = 64 * 1024;

/// What all connections share.
pub(crate) struct Proxy {
    upstream: Target,
    connect_timeout: Duration,
    started: Instant,
    pub(crate) recorder: RefCell<Recorder>,
    pub(crate) buffer: RefCell<Box<[u8]>>,
    pub(crate) gate: Gate,
}

/// The data thread's ends of the channels to the control thread.
pub(crate) struct Channels {
    pub(crate) windows: mpsc::Sender<Sealed>,
    pub(crate) limits: watch::Receiver<Limits>,
    pub(crate) draining: watch::Sender<bool>,
}

// === impl Proxy ===

impl Proxy {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            upstream: config.upstream.clone(),
            connect_timeout: config.connect_timeout,
            started: Instant::now(),
            recorder: RefCell::new(Recorder::new(config.tenant.clone(), config.max_tenants)),
            buffer: RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice()),
            gate: Gate::new(),
        }
    }

    /// Nanoseconds since the proxy started; never goes back.
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Opens a connection to the application.
    pub(crate) async fn dial(&self) -> io::Result<TcpStream> {
        let stream = timeout(self.connect_timeout, self.upstream.connect()).await??;
        relay::no_delay(&stream);
        Ok(stream)
    }
}

/// Milliseconds on the wall clock.
pub(crate) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Serves until told to stop, then lets requests end, and hands over the last window.
pub(crate) async fn run(
    config: &Config,
    listener: TcpListener,
    channels: Channels,
    mut stop: mpsc::Receiver<()>,
) {
    let proxy = Rc::new(Proxy::new(config));
    let Channels {
        windows,
        limits,
        draining,
    } = channels;
    let mut sealer = Sealer::new(config.window, now_unix_ms(), windows, limits);
    tokio::select! {
        () = accept(&proxy, &listener, config.max_connections) => {}
        () = close_windows(&proxy, &mut sealer) => {}
        _ = stop.recv() => {}
    }
    drop(listener);
    draining.send_replace(true);
    tracing::info!(
        connections = proxy.gate.open(),
        deadline_s = config.drain.as_secs(),
        "stopping: no new connections, waiting for requests under way"
    );
    proxy.gate.advance(Stage::Draining);
    tokio::select! {
        () = proxy.gate.below(1) => {}
        () = close_windows(&proxy, &mut sealer) => {}
        () = sleep(config.drain) => tracing::warn!(
            connections = proxy.gate.open(),
            "requests did not end in time; closing their connections"
        ),
        Some(()) = stop.recv() => tracing::warn!("told to stop again; closing all connections"),
    }
    proxy.gate.advance(Stage::Closed);
    if timeout(Duration::from_secs(1), proxy.gate.below(1))
        .await
        .is_err()
    {
        tracing::error!(connections = proxy.gate.open(), "connections do not end");
    }
    let mut recorder = proxy.recorder.borrow_mut();
    sealer.finish(&mut recorder, now_unix_ms());
}

async fn close_windows(proxy: &Proxy, sealer: &mut Sealer) {
    loop {
        sleep(sealer.wait(now_unix_ms())).await;
        sealer.tick(&mut proxy.recorder.borrow_mut(), now_unix_ms());
    }
}

async fn accept(proxy: &Rc<Proxy>, listener: &TcpListener, max_connections: usize) {
    let (mut is_failing, mut is_full) = (false, false);
    loop {
        if proxy.gate.open() >= max_connections {
            if !is_full {
                tracing::warn!(max_connections, "too many connections; further ones wait");
            }
            is_full = true;
            proxy.gate.below(max_connections).await;
        }
        match listener.accept().await {
            Ok((client, _)) => {
                is_failing = false;
                tokio::task::spawn_local(relay::serve(client, proxy.clone()));
            }
            // The client gave up while it waited.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !is_failing {
                    tracing::warn!(%error, "cannot accept connections; trying on");
                }
                is_failing = true;
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
