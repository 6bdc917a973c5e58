//! The aggregator's host: what the server puts together, over a simulated disk and network.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use coalmine_aggregator::{
    book::{Book, Patience},
    ingest::{Configs, Ingest, MAX_MESSAGE_BYTES, Rebuild},
    metrics::Metrics,
    store::{Entry, Store},
};
use coalmine_proto::v1::{Config, telemetry_server::TelemetryServer};
use tokio::{sync::watch, time::interval};
use tonic::transport::Server;
use turmoil::net::TcpListener;

use crate::{
    account::Account,
    disk::{Disk, Done},
    faults::Clock,
    network::{PORT, clock, clock_ahead, incoming},
    random::Trace,
};

/// The service that everything is about.
pub(crate) const SERVICE: &str = "checkout";

const EVICT_EVERY: Duration = Duration::from_secs(5);

/// The aggregator's place: what outlives its process. Cloning gives another handle to the same one.
#[derive(Clone)]
pub(crate) struct Place {
    /// Its disk.
    pub(crate) disk: Disk,
    /// What it was given to store.
    pub(crate) account: Arc<Mutex<Account>>,
    /// The process that runs.
    pub(crate) running: Arc<Mutex<Option<Running>>>,
    /// What its clock says.
    pub(crate) clock: Arc<Mutex<Clock>>,
    /// What happens.
    pub(crate) trace: Trace,
}

/// What can be seen of the process.
pub(crate) struct Running {
    /// What it counts.
    pub(crate) book: Arc<Mutex<Book>>,
    /// Tells it that it is about to stop.
    pub(crate) drain: watch::Sender<bool>,
}

/// Reads the book back from the disk.
pub(crate) fn restore(disk: &Disk, now_ms: u64) -> Result<Book, String> {
    let mut book = Book::new(Patience::default(), now_ms);
    book.keep_only(now_ms, &BTreeMap::new());
    let mut rebuild = Rebuild::default();
    disk.open(|entry| rebuild.take(&mut book, entry, now_ms))?;
    if rebuild.refused > 0 {
        return Err(format!("{} stored entries do not apply", rebuild.refused));
    }
    book.disconnect_all(now_ms);
    Ok(book)
}

impl Running {
    /// Has the log begun anew with all that the book holds, as the server does when the log has become long.
    pub(crate) fn roll_up(&self, disk: &Disk) {
        let frames = Arc::new(Mutex::new(Vec::new()));
        let encoded = Arc::clone(&frames);
        let encoder = Store::with_log(Box::new(move |frame: Vec<u8>, _: Done| {
            encoded.lock().unwrap().extend(frame);
        }));
        let book = self.book.lock().unwrap();
        for piece in book.image() {
            encoder.append(Entry::Piece(piece), || {});
        }
        let frames = std::mem::take(&mut *frames.lock().unwrap());
        disk.roll_up(frames);
    }
}

/// One life of the aggregator's process.
pub(crate) async fn serve(place: Place) -> turmoil::Result {
    let book = restore(&place.disk, clock())?;
    // What is on disk will be called durable, even if the process before told nobody.
    let mut kept = Account::default();
    place.disk.read_all(|entry| {
        kept.take(&entry);
    })?;
    place.account.lock().unwrap().promise_all(&kept);
    let book = Arc::new(Mutex::new(book));
    let (drain, draining) = watch::channel(false);
    let limits = Config {
        version: 1,
        default_limit_us: 100_000,
        ..Config::default()
    };
    let ingest = Ingest::new(
        Arc::clone(&book),
        Store::with_log(log(&place)),
        Configs::from([(SERVICE.to_owned(), limits)]),
        Arc::new(Metrics::new()),
        draining,
    );
    let ingest = ingest.with_clock(match *place.clock.lock().unwrap() {
        Clock::Right => clock,
        Clock::Ahead => clock_ahead,
    });
    *place.running.lock().unwrap() = Some(Running {
        book: Arc::clone(&book),
        drain,
    });
    place.trace.note("aggregator: serves");
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let telemetry = TelemetryServer::new(ingest).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let server = Server::builder()
        .initial_stream_window_size(1_u32 << 20)
        .initial_connection_window_size(4_u32 << 20)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(telemetry)
        .serve_with_incoming(incoming(listener));
    tokio::select! {
        biased;
        served = server => served?,
        () = place.disk.work() => {}
        () = evict(&book) => {}
    }
    Err("the aggregator ended by itself".into())
}

/// The log under the store: each frame is read by the account and goes to the disk.
fn log(place: &Place) -> Box<dyn FnMut(Vec<u8>, Done) + Send> {
    let Place {
        disk, account, trace, ..
    } = place.clone();
    Box::new(move |frame: Vec<u8>, done: Done| {
        let batch = account.lock().unwrap().read(&frame);
        let (account, trace) = (Arc::clone(&account), trace.clone());
        if let Some((epoch, seq)) = batch {
            trace.note(&format!("aggregator: takes {epoch:016x}/{seq}"));
        }
        let told = move || {
            if let Some((epoch, seq)) = batch {
                account.lock().unwrap().promise(epoch, seq);
                trace.note(&format!("aggregator: stored {epoch:016x}/{seq}"));
            }
            done();
        };
        disk.append(frame, Box::new(told));
    })
}

async fn evict(book: &Mutex<Book>) {
    let mut every = interval(EVICT_EVERY);
    loop {
        every.tick().await;
        book.lock().unwrap().evict(clock(), |_| None);
    }
}
