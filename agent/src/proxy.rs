//! Accepts clients, closes windows at their borders, and stops in order: the data thread.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
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
    recorder::{Recorder, Sealed, Settings},
    relay::{self, Pipes, Watched},
    sealer::Sealer,
    system,
};

/// Room for what one read takes; all connections of the thread share it.
const BUFFER_BYTES: usize = 64 * 1024;

/// What all connections share.
pub(crate) struct Proxy {
    upstream: Target,
    connect_timeout: Duration,
    /// Whether the application is told who the client is.
    announces_client: bool,
    /// Connections that were silent for longer are ended; zero for none.
    pub(crate) idle_timeout_ns: u64,
    started: Instant,
    pub(crate) recorder: RefCell<Recorder>,
    pub(crate) buffer: RefCell<Box<[u8]>>,
    pub(crate) gate: Gate,
    pub(crate) pipes: Pipes,
    /// Bytes that were read and could not be written yet, of all connections.
    pub(crate) held: Rc<Cell<usize>>,
    /// Whether the last connection failed for want of something on this side.
    is_exhausted: Cell<bool>,
}

/// The data thread's ends of the channels to the control thread.
pub(crate) struct Channels {
    pub(crate) windows: mpsc::Sender<Sealed>,
    pub(crate) settings: watch::Receiver<Arc<Settings>>,
    pub(crate) draining: watch::Sender<bool>,
}

// === impl Proxy ===

impl Proxy {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            upstream: config.upstream.clone(),
            connect_timeout: config.connect_timeout,
            announces_client: config.proxy_protocol,
            idle_timeout_ns: u64::try_from(config.idle_timeout.as_nanos()).unwrap_or(u64::MAX),
            started: Instant::now(),
            recorder: RefCell::new(Recorder::new(config.tenant.clone(), config.max_tenants)),
            buffer: RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice()),
            gate: Gate::new(),
            pipes: Pipes::new(config.max_connections),
            held: Rc::default(),
            is_exhausted: Cell::new(false),
        }
    }

    /// Nanoseconds since the proxy started; never goes back.
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Opens a connection to the application, for this client.
    pub(crate) async fn dial(&self, client: &TcpStream, from: SocketAddr) -> io::Result<TcpStream> {
        let dialled = timeout(self.connect_timeout, async {
            let stream = self.upstream.connect().await?;
            if self.announces_client {
                announce(&stream, &relay::proxy_header(from, client)?).await?;
            }
            Ok(stream)
        });
        let dialled = dialled.await;
        let dialled = dialled.unwrap_or_else(|elapsed| Err(elapsed.into()));
        self.note(dialled.as_ref().err());
        let stream = dialled?;
        system::tune(&stream);
        Ok(stream)
    }

    /// Notes whether a connection failed for want of something on this side, and says it when that changes.
    fn note(&self, error: Option<&io::Error>) {
        let exhausted = error.filter(|error| system::is_exhausted(error));
        if exhausted.is_some() {
            self.recorder.borrow_mut().dial_exhausted();
        }
        let was_exhausted = self.is_exhausted.replace(exhausted.is_some());
        match exhausted {
            Some(error) if !was_exhausted => tracing::warn!(
                %error,
                "the agent cannot open connections to the application; clients are reset, and not counted"
            ),
            None if was_exhausted => tracing::info!("connections to the application can be opened again"),
            _ => {}
        }
    }
}

/// Writes the first bytes of a connection, which always has room for them.
async fn announce(stream: &TcpStream, header: &[u8]) -> io::Result<()> {
    stream.writable().await?;
    match stream.try_write(header) {
        Ok(count) if count == header.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) => Err(error),
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
        settings,
        draining,
    } = channels;
    let mut sealer = Sealer::new(config.window, now_unix_ms(), windows, settings);
    tokio::select! {
        () = accept(&proxy, &listener, config.max_connections) => {}
        () = close_windows(&proxy, &mut sealer) => {}
        () = call_roll(&proxy, config.idle_timeout) => {}
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

/// Lets all connections look at the clock, often enough that none is silent for much longer than it may be.
async fn call_roll(proxy: &Proxy, idle_timeout: Duration) {
    if idle_timeout.is_zero() {
        return std::future::pending().await;
    }
    loop {
        sleep((idle_timeout / 8).max(Duration::from_millis(10))).await;
        proxy.gate.call_roll();
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
            Ok((client, from)) => {
                is_failing = false;
                let watched = Watched::new(proxy.clone());
                tokio::task::spawn_local(relay::serve(client, from, watched));
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::Command;

    #[test]
    fn a_connection_counts_from_its_acceptance_on() {
        let proxy = Rc::new(proxy());
        let watched = Watched::new(proxy.clone());
        // Never polled, as in a burst of clients.
        let served = async move { drop(watched) };
        assert_eq!(proxy.gate.open(), 1);
        drop(served);
        assert_eq!(proxy.gate.open(), 0);
    }

    #[tokio::test]
    async fn a_connections_task_is_small() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let from = client.local_addr().unwrap();
        let task = relay::serve(client, from, Watched::new(Rc::new(proxy())));
        assert!(size_of_val(&task) <= 640, "{}", size_of_val(&task));
    }

    #[test]
    fn exhaustion_is_counted_and_ends() {
        let proxy = proxy();
        let exhausted = io::Error::from(rustix::io::Errno::MFILE);
        proxy.note(Some(&exhausted));
        proxy.note(Some(&exhausted));
        assert!(proxy.is_exhausted.get());
        proxy.note(Some(&io::ErrorKind::ConnectionRefused.into()));
        assert!(!proxy.is_exhausted.get());
        let mut recorder = proxy.recorder.borrow_mut();
        let window = recorder.seal(0, 1);
        assert_eq!(recorder.sealed(window).totals.dial_exhausted, 2);
    }

    pub(crate) fn proxy() -> Proxy {
        let args = [
            "a",
            "--aggregator=http://a:1",
            "--service=s",
            "--version=v",
            "--arm=canary",
        ];
        match Command::parse(args.map(Into::into)) {
            Ok(Command::Run(config)) => Proxy::new(&config),
            other => panic!("{other:?}"),
        }
    }
}
