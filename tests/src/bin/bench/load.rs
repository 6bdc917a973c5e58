//! The clients: keep-alive connections that send the next request when the answer is whole.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::sample::tenant;

/// Tenants that the requests are of, where their number is not what is measured.
pub(crate) const TENANTS: usize = 200;

/// How long the last answers of a slice may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Room for the head of an answer.
pub(crate) const HEAD_ROOM: usize = 4096;

/// How many clients there are, and what they ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) connections: usize,
    pub(crate) answer_bytes: usize,
    pub(crate) tenants: usize,
}

/// So many connections, asking for so many bytes.
pub(crate) const fn shape(connections: usize, answer_bytes: usize) -> Shape {
    Shape {
        connections,
        answer_bytes,
        tenants: TENANTS,
    }
}

/// All connections to one target.
#[derive(Debug)]
pub(crate) struct Load {
    target: SocketAddr,
    shape: Shape,
    connections: Vec<Connection>,
    requests: Arc<[Vec<u8>]>,
}

/// What a slice brought.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Length of an answer with its head, once the first was read.
    whole: Option<usize>,
    /// The tenant of the next request.
    next: usize,
}

// === impl Shape ===

impl Shape {
    /// The requests of all tenants.
    pub(crate) fn requests(self) -> Arc<[Vec<u8>]> {
        let request = |number| request(self.answer_bytes, &tenant(number));
        (0..self.tenants).map(request).collect()
    }
}

// === impl Load ===

impl Load {
    /// Opens the connections.
    pub(crate) async fn open(target: SocketAddr, shape: Shape) -> anyhow::Result<Self> {
        let mut load = Self {
            target,
            shape,
            connections: Vec::with_capacity(shape.connections),
            requests: shape.requests(),
        };
        load.reopen().await?;
        Ok(load)
    }

    /// Closes all connections and opens as many again.
    pub(crate) async fn reopen(&mut self) -> anyhow::Result<()> {
        let Shape {
            connections, tenants, ..
        } = self.shape;
        let first = self.connections.first().map_or(0, |connection| connection.next);
        self.connections.clear();
        for number in 0..connections {
            let stream = TcpStream::connect(self.target).await?;
            stream.set_nodelay(true)?;
            self.connections.push(Connection {
                stream,
                buffer: vec![0; HEAD_ROOM + self.shape.answer_bytes],
                whole: None,
                next: first + number * tenants / connections,
            });
        }
        Ok(())
    }

    /// Keeps the connections; the answers have so many bytes from now on.
    pub(crate) fn ask_for(&mut self, answer_bytes: usize) {
        self.shape.answer_bytes = answer_bytes;
        self.requests = self.shape.requests();
        for connection in &mut self.connections {
            connection.buffer.resize(HEAD_ROOM + answer_bytes, 0);
            connection.whole = None;
        }
    }

    /// Sends one request on each connection, one after the other; gives how many.
    pub(crate) async fn once(&mut self) -> anyhow::Result<u64> {
        let all = async {
            for connection in &mut self.connections {
                connection.ask(&self.requests).await?;
            }
            Ok::<_, anyhow::Error>(self.connections.len() as u64)
        };
        timeout(PATIENCE, all).await.context("an answer does not come")?
    }

    /// Keeps all connections busy for a while.
    pub(crate) async fn run(&mut self, length: Duration) -> anyhow::Result<Slice> {
        let begun = Instant::now();
        let mut clients = JoinSet::new();
        for connection in self.connections.drain(..) {
            let requests = Arc::clone(&self.requests);
            clients.spawn(connection.run(requests, begun + length));
        }
        let mut sum = 0;
        let finished = async {
            while let Some(client) = clients.join_next().await {
                let (connection, requests) = client??;
                self.connections.push(connection);
                sum += requests;
            }
            Ok::<_, anyhow::Error>(())
        };
        let finished = timeout(length + PATIENCE, finished).await;
        finished.context("an answer does not come")??;
        Ok(Slice {
            requests: sum,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }
}

// === impl Connection ===

impl Connection {
    async fn run(mut self, requests: Arc<[Vec<u8>]>, until: Instant) -> anyhow::Result<(Self, u64)> {
        let mut sent = 0;
        while Instant::now() < until {
            self.ask(&requests).await?;
            sent += 1;
        }
        Ok((self, sent))
    }

    /// Sends the next request and reads its answer to the end.
    async fn ask(&mut self, requests: &[Vec<u8>]) -> anyhow::Result<()> {
        let request = &requests[self.next % requests.len()];
        self.next += 1;
        self.stream.write_all(request).await?;
        let mut read = 0;
        loop {
            let more = self.stream.read(&mut self.buffer[read..]).await?;
            ensure!(more > 0, "the connection was closed within an answer");
            read += more;
            if is_whole(&self.buffer[..read], &mut self.whole)? {
                return Ok(());
            }
        }
    }
}

/// A request for an answer of so many bytes.
pub(crate) fn request(answer_bytes: usize, tenant: &str) -> Vec<u8> {
    format!(
        "GET /{answer_bytes} HTTP/1.1\r\nhost: bench.local\r\nuser-agent: coalmine-bench\r\naccept: */*\r\n\
         x-request-id: 6f1c1d0e-6a51-4a3c-9f6e-0d3f5a2b7c11\r\nx-tenant-id: {tenant}\r\n\r\n"
    )
    .into_bytes()
}

/// Whether an answer is complete. All answers of a connection have the same length, which is found in the first.
pub(crate) fn is_whole(bytes: &[u8], whole: &mut Option<usize>) -> anyhow::Result<bool> {
    if whole.is_none() {
        *whole = whole_length(bytes)?;
    }
    let Some(whole) = *whole else { return Ok(false) };
    if bytes.len() < whole {
        return Ok(false);
    }
    ensure!(
        bytes.len() == whole && bytes.starts_with(b"HTTP/1.1 200"),
        "an answer is not the expected one: {:?}",
        String::from_utf8_lossy(&bytes[..bytes.len().min(80)])
    );
    Ok(true)
}

/// The length of an answer whose head is there, with its body; none before that.
fn whole_length(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length
        .context("an answer without Content-Length")?
        .trim()
        .parse()?;
    Ok(Some(end + 4 + length))
}
