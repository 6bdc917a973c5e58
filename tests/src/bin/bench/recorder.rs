//! What a request costs in the agent's tables.
//!
//! Every variant does the same requests in the same random order, in the same rounds. The floor is what the
//! memory alone costs: one counter of a tenant that is chosen at random.

mod http2;

use std::hint::black_box;

use anyhow::{Context as _, ensure};
use coalmine_agent::{
    observer::{Http1, Sink as _, Times},
    recorder::Recorder,
    tenant::{Head, Header},
};
use coalmine_proto::{histogram::Histogram, names::Outcome};

use crate::{
    Plan,
    cpu::thread_ns,
    report::{Budget, Report, Spread, Table},
    sample::{Random, Traffic, tenant},
};

/// Requests before the order repeats.
const ORDER: usize = 1 << 16;

const FEW: usize = 200;
const MANY: usize = 10_000;

/// Length of an answer's body.
const BODY_BYTES: usize = 1024;

/// A request's head of which only the tenant is known.
struct Named<'a>(&'a str);

impl Head for Named<'_> {
    fn header(&self, _: &str) -> Header<'_> {
        Header::Value(self.0.as_bytes())
    }

    fn host(&self) -> Header<'_> {
        Header::Missing
    }

    fn target(&self) -> &[u8] {
        b"/"
    }
}

/// A short name, in place.
struct Name {
    bytes: [u8; 23],
    length: u8,
}

impl Name {
    fn new(name: &str) -> Self {
        let mut bytes = [0; 23];
        for (place, byte) in bytes.iter_mut().zip(name.bytes()) {
            *place = byte;
        }
        let length = u8::try_from(name.len().min(23)).unwrap_or(0);
        Self { bytes, length }
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or("")
    }
}

/// Requests of so many tenants, and everything that counts them.
struct Bench {
    names: Vec<String>,
    /// The name in each request, one after the other as they come from a socket: what the reading of scattered
    /// names costs is not the agent's.
    asked: Vec<Name>,
    heads: Vec<Vec<u8>>,
    answer: Vec<u8>,
    /// Tenant and latency of each request.
    order: Vec<(usize, u64)>,
    counters: Vec<u64>,
    histogram: Histogram,
    histograms: Vec<Histogram>,
    recorder: Recorder,
    observer: Http1,
    http2: http2::Connection,
}

/// Nanoseconds a request, and milliseconds for closing a window, of each round.
#[derive(Debug, Default)]
struct Costs {
    floor: Vec<f64>,
    histogram: Vec<f64>,
    histograms: Vec<f64>,
    whole: Vec<f64>,
    observed: Vec<f64>,
    observed_http2: Vec<f64>,
    seal_ms: Vec<f64>,
}

pub(crate) async fn measure(plan: Plan, report: &mut Report) -> anyhow::Result<()> {
    report.title("Recorder: nanoseconds to record a request into its window");
    let repeats = if plan.quick { 4 } else { 16 };
    report.note(&format!(
        "Tenants uniformly at random; CPU time of one thread; {} rounds of {} requests. The floor adds 1 to a u64 \
         of a Vec.",
        plan.rounds,
        repeats * ORDER
    ));
    let mut benches = [Bench::new(FEW)?, Bench::new(MANY)?];
    let mut costs = [Costs::default(), Costs::default()];
    for bench in &mut benches {
        bench.round(1, &mut Costs::default())?;
    }
    for _ in 0..plan.rounds {
        for (bench, costs) in benches.iter_mut().zip(&mut costs) {
            bench.round(repeats, costs)?;
            // A signal to stop is heard here.
            tokio::task::yield_now().await;
        }
    }
    let mut table = Table::new(["", "ns median (min-max)", "of the floor", "budget", ""]);
    let mut seals = Table::new(["", "ms median (min-max)", "ns a tenant"]);
    for (bench, costs) in benches.iter().zip(&costs) {
        let tenants = bench.names.len();
        let mut row = |what: String, values: &[f64], budget| {
            let spread = Spread::of(values.iter().copied());
            let ratio = Spread::of_ratios(values, &costs.floor);
            let held = report.held(&what, spread.median, budget, 0);
            table.row([what, spread.cell(1), ratio.cell(1)].into_iter().chain(held));
        };
        let of = |what: &str| format!("{what}, {tenants} tenants");
        row(of("floor"), &costs.floor, Budget::None);
        if tenants == FEW {
            row("one histogram".to_owned(), &costs.histogram, Budget::AtMost(6.0));
        }
        row(of("a histogram for each"), &costs.histograms, Budget::None);
        row(
            of("whole: rule, look-up, window"),
            &costs.whole,
            Budget::AtMost(100.0),
        );
        row(
            of("whole, with parsing both heads"),
            &costs.observed,
            Budget::None,
        );
        row(
            of("whole, with both sides of an HTTP/2 stream"),
            &costs.observed_http2,
            Budget::None,
        );
        let seal = Spread::of(costs.seal_ms.iter().copied());
        let each = seal.times(1e6 / tenants as f64);
        let what = format!("closing a window of {tenants} tenants (stops the data thread)");
        seals.row([what, seal.cell(3), each.cell(0)]);
    }
    table.print();
    report.note("");
    seals.print();
    Ok(())
}

impl Bench {
    fn new(tenants: usize) -> anyhow::Result<Self> {
        let mut random = Random::new(7);
        let mut traffic = Traffic::new(8, 20.0, 0.5);
        let names: Vec<String> = (0..tenants).map(tenant).collect();
        let head = |name: &String| {
            format!(
                "GET /orders HTTP/1.1\r\nhost: bench.local\r\nuser-agent: coalmine-bench\r\naccept: */*\r\n\
                 x-request-id: 6f1c1d0e-6a51-4a3c-9f6e-0d3f5a2b7c11\r\nx-tenant-id: {name}\r\n\r\n"
            )
            .into_bytes()
        };
        let mut answer =
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1024\r\n\r\n".to_vec();
        answer.resize(answer.len() + BODY_BYTES, b'x');
        let rule = "header:x-tenant-id".parse().context("the rule is refused")?;
        let mut recorder = Recorder::new(vec![rule], tenants);
        let http2 = http2::Connection::open(&names, BODY_BYTES, &mut recorder);
        let order: Vec<(usize, u64)> = (0..ORDER)
            .map(|_| (random.below(tenants), traffic.latency_ns()))
            .collect();
        Ok(Self {
            asked: order
                .iter()
                .map(|(tenant, _)| Name::new(&names[*tenant]))
                .collect(),
            heads: names.iter().map(head).collect(),
            names,
            answer,
            order,
            counters: vec![0; tenants],
            histogram: Histogram::new(),
            histograms: vec![Histogram::new(); tenants],
            recorder,
            observer: Http1::new(),
            http2,
        })
    }

    fn round(&mut self, repeats: usize, costs: &mut Costs) -> anyhow::Result<()> {
        let Self {
            names: _,
            asked,
            heads,
            answer,
            order,
            counters,
            histogram,
            histograms,
            recorder,
            observer,
            http2,
        } = self;
        costs.floor.push(timed(repeats, order, |tenant, _| {
            counters[tenant] += 1;
        }));
        black_box(counters);
        costs.histogram.push(timed(repeats, order, |_, latency_ns| {
            histogram.record(latency_ns);
        }));
        black_box(histogram);
        costs.histograms.push(timed(repeats, order, |tenant, latency_ns| {
            histograms[tenant].record(latency_ns);
        }));
        black_box(histograms);
        // What was left over from before.
        black_box(recorder.seal(0, 1_000));
        let mut asked = asked.iter().cycle();
        costs.whole.push(timed(repeats, order, |_, latency_ns| {
            let name = asked.next().map_or("", Name::as_str);
            let id = recorder.begin(&Named(name));
            let times = Times {
                total_ns: latency_ns,
                first_byte_ns: Some(latency_ns),
                is_stream: false,
            };
            recorder.end(id, Outcome::Success, times);
        }));
        let begun = thread_ns();
        let window = recorder.seal(0, 1_000);
        costs.seal_ms.push((thread_ns() - begun) / 1e6);
        black_box(window);
        let mut now_ns = 0;
        costs.observed.push(timed(repeats, order, |tenant, latency_ns| {
            observer.on_request(&heads[tenant], now_ns, recorder);
            now_ns += latency_ns;
            observer.on_response(answer, now_ns, recorder);
        }));
        all_counted(recorder, repeats, "HTTP/1")?;
        costs
            .observed_http2
            .push(timed(repeats, order, |tenant, latency_ns| {
                let asked_ns = now_ns;
                now_ns += latency_ns;
                http2.exchange(tenant, asked_ns, now_ns, recorder);
            }));
        all_counted(recorder, repeats, "HTTP/2")
    }
}

/// An observer that loses its way is fast.
fn all_counted(recorder: &mut Recorder, repeats: usize, protocol: &str) -> anyhow::Result<()> {
    let (sent, counted) = (repeats * ORDER, recorder.seal(0, 1_000).sums().requests);
    ensure!(
        counted == sent as u64,
        "the observer of {protocol} has counted {counted} of {sent} requests"
    );
    Ok(())
}

/// Nanoseconds that each call takes.
fn timed(repeats: usize, order: &[(usize, u64)], mut each: impl FnMut(usize, u64)) -> f64 {
    let begun = thread_ns();
    for _ in 0..repeats {
        for (tenant, latency_ns) in order {
            each(*tenant, *latency_ns);
        }
    }
    (thread_ns() - begun) / (repeats * order.len()) as f64
}
