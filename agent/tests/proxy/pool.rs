//! The scraper against an application whose metrics misbehave in every way that it has to withstand.
//!
//! Each bad answer has a pool in it that would be taken if what is wrong with the answer were overlooked.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use coalmine_proto::v1;

use crate::{
    aggregator::Aggregator,
    support::{Agent, Upstream, client, eventually, is_open, read_all, read_exactly},
};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nX-Tenant: a\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

const PLAIN: &str = "Content-Type: text/plain; version=0.0.4\r\n";
const OPEN_METRICS: &str = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";

/// A pool that must not be taken.
const BAD_POOL: &str = "bb8_connections{pool=\"bad\"} 1\nbb8_max_size{pool=\"bad\"} 1\n";

/// The good pool at first, and after seven acquires of which two waited and one timed out.
const BEFORE: &str = "# TYPE bb8_connections gauge
bb8_connections{pool=\"good\"} 5
bb8_idle_connections{pool=\"good\"} 2
app_pool_max{pool=\"good\"} 10
bb8_pending_gets{pool=\"good\"} 0
# TYPE bb8_get_started counter
bb8_get_started_total{pool=\"good\"} 100
bb8_get_waited_total{pool=\"good\"} 20
bb8_get_timed_out_total{pool=\"good\"} 4
bb8_get_wait_time_seconds_total{pool=\"good\"} 1.5
# EOF
";
const AFTER: &str = "# TYPE bb8_connections gauge
bb8_connections{pool=\"good\"} 6
bb8_idle_connections{pool=\"good\"} 1
app_pool_max{pool=\"good\"} 10
bb8_pending_gets{pool=\"good\"} 3
# TYPE bb8_get_started counter
bb8_get_started_total{pool=\"good\"} 107
bb8_get_waited_total{pool=\"good\"} 22
bb8_get_timed_out_total{pool=\"good\"} 5
bb8_get_wait_time_seconds_total{pool=\"good\"} 1.75
# EOF
";

/// The application's metrics when they are in order: each scrape is answered with the text of now.
#[derive(Clone)]
struct Good {
    text: Arc<Mutex<&'static str>>,
    connections: Arc<AtomicU64>,
    answers: Arc<AtomicU64>,
}

impl Good {
    fn serve(metrics: Upstream) -> Self {
        let good = Self {
            text: Arc::new(Mutex::new(BEFORE)),
            connections: Arc::default(),
            answers: Arc::default(),
        };
        let served = good.clone();
        thread::spawn(move || {
            loop {
                let mut stream = metrics.accept();
                served.connections.fetch_add(1, Ordering::Relaxed);
                while head(&mut stream).is_ok() {
                    let text = *served.text.lock().unwrap();
                    let answer = answer("200 OK", OPEN_METRICS, text);
                    // The agent may have given up waiting.
                    stream.write_all(&answer).ok();
                    served.answers.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        good
    }
}

/// An answer that says how long it is.
fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// The head of a request, to its empty line.
fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    Ok(String::from_utf8(bytes).unwrap())
}

/// The next scrape, which waits for its answer.
fn scrape(metrics: &Upstream) -> TcpStream {
    let mut stream = metrics.accept();
    let head = head(&mut stream).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("get /app/metrics?all=1 http/1.1\r\n"), "{head}");
    let host = format!("\r\nhost: {}\r\n", metrics.address());
    assert!(head.contains(&host), "{head}");
    assert!(
        head.contains("\r\naccept: application/openmetrics-text;"),
        "{head}"
    );
    assert!(!head.contains("\r\naccept-encoding:"), "{head}");
    stream
}

fn failed(agent: &Agent) -> u64 {
    agent.metric("pool_scrapes_failed_total").unwrap()
}

fn windows(agent: &Agent) -> u64 {
    agent.metric("windows_sealed_total").unwrap()
}

/// A request goes through the agent, and windows are closed.
fn goes_on(agent: &Agent, upstream: &Upstream) {
    let before = windows(agent);
    let mut client = client(agent);
    client.write_all(REQUEST).unwrap();
    let mut server = upstream.accept_next(REQUEST);
    server.write_all(OK).unwrap();
    assert_eq!(read_exactly(&mut client, OK.len()), OK);
    drop(client);
    assert_eq!(read_all(&mut server).unwrap(), b"");
    eventually("windows go on", || windows(agent) > before);
}

/// All rows of pools that the aggregator has.
fn pools(aggregator: &Aggregator) -> Vec<v1::Pool> {
    let told = aggregator.told();
    told.applied
        .iter()
        .flat_map(|batch| batch.pools.clone())
        .collect()
}

#[test]
fn metrics_that_misbehave_disturb_nothing() {
    let (upstream, metrics, aggregator) = (Upstream::new(), Upstream::new(), Aggregator::start());
    let mut agent = Agent::with(upstream.address(), |config| {
        config.aggregator = aggregator.url();
        let url = format!("http://{}/app/metrics?all=1", metrics.address());
        config.pool_scrape = Some(url.parse().unwrap());
        config.pool_metrics = vec!["max=app_pool_max".parse().unwrap()];
    });
    let mut requests = 0;

    // It hangs. The agent gives up by itself, and so only an attempt counts in which it has not yet.
    let mut hanging = None;
    eventually("all goes on while a scrape hangs", || {
        let stream = scrape(&metrics);
        goes_on(&agent, &upstream);
        requests += 1;
        let is_open = is_open(&stream);
        hanging = Some(stream);
        is_open
    });
    assert_eq!(read_all(&mut hanging.unwrap()).unwrap(), b"", "it is given up");
    eventually("a failed scrape", || failed(&agent) > 0);

    // 9 MiB in lines of 1 KiB, where the agent reads no more than 8 MiB.
    let line = format!("# {}\n", "x".repeat(1021));
    let large = format!("{BAD_POOL}{}", line.repeat(9 << 10));
    let elsewhere = format!("Location: http://{}/elsewhere\r\n{PLAIN}", metrics.address());
    let mut cut = answer("200 OK", PLAIN, &format!("{BAD_POOL}bb8_idle_connections"));
    cut.truncate(cut.len() - "_connections".len());
    let cut_off = "an answer that is cut off";
    for (what, bytes) in [
        ("a redirect", answer("302 Found", &elsewhere, BAD_POOL)),
        ("an answer that is too large", answer("200 OK", PLAIN, &large)),
        // Not compressed in truth, so that it could be read.
        (
            "a compressed answer",
            answer("200 OK", &format!("Content-Encoding: gzip\r\n{PLAIN}"), BAD_POOL),
        ),
        (cut_off, cut),
        ("no # EOF", answer("200 OK", OPEN_METRICS, BAD_POOL)),
    ] {
        let before = failed(&agent);
        let mut stream = scrape(&metrics);
        // The agent may go before it has all.
        stream.write_all(&bytes).ok();
        // The others stay open: what is wrong with them is not that they end.
        if what == cut_off {
            stream.shutdown(Shutdown::Write).ok();
        }
        goes_on(&agent, &upstream);
        requests += 1;
        eventually(what, || failed(&agent) > before);
    }

    let good = Good::serve(metrics);
    eventually("the pool is known", || !pools(&aggregator).is_empty());
    *good.text.lock().unwrap() = AFTER;
    let sum = |count: fn(&v1::Pool) -> u64| pools(&aggregator).iter().map(count).sum::<u64>();
    eventually("what it did is known", || sum(|pool| pool.acquires) == 7);
    goes_on(&agent, &upstream);
    requests += 1;
    agent.stop();
    agent.join();
    // No request of those that went through is taken for one to the pool, and no counter of before the first look.
    let events = [
        sum(|pool| pool.acquires),
        sum(|pool| pool.waits),
        sum(|pool| pool.timeouts),
        sum(|pool| pool.wait_ns),
    ];
    assert_eq!(events, [7, 3, 1, 250_000_000], "who gave up has waited");
    let pools = pools(&aggregator);
    assert!(pools.iter().all(|pool| pool.name == "good"), "{pools:?}");
    let states: Vec<_> = [pools.first(), pools.last()]
        .into_iter()
        .flatten()
        .map(|pool| (pool.used, pool.idle, pool.max, pool.waiters))
        .collect();
    assert_eq!(states, [(3, 2, 10, 0), (5, 1, 10, 3)]);
    // Its connection is kept.
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert!(count(&good.connections) < count(&good.answers));
    assert_eq!(aggregator.totals().requests, requests);
    assert_eq!(aggregator.told().requests["a"], requests);
}
