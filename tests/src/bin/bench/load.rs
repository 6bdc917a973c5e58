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

/// Connections to one target.
pub(crate) const CONNECTIONS: usize = 32;

/// Tenants that the requests are of.
pub(crate) const TENANTS: usize = 200;

/// How long the last answers of a slice may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Room for the head of an answer.
const HEAD_ROOM: usize = 4096;

/// All connections to one target.
#[derive(Debug)]
pub(crate) struct Load {
    connections: Vec<Connection>,
    requests: Arc<Vec<Vec<u8>>>,
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

impl Load {
    /// Opens the connections; the answers will have so many bytes.
    pub(crate) async fn open(target: SocketAddr, answer_bytes: usize) -> anyhow::Result<Self> {
        let request = |number| {
            let tenant = tenant(number);
            format!(
                "GET /{answer_bytes} HTTP/1.1\r\nhost: bench.local\r\nuser-agent: coalmine-bench\r\naccept: */*\r\n\
                 x-request-id: 6f1c1d0e-6a51-4a3c-9f6e-0d3f5a2b7c11\r\nx-tenant-id: {tenant}\r\n\r\n"
            )
            .into_bytes()
        };
        let mut connections = Vec::with_capacity(CONNECTIONS);
        for number in 0..CONNECTIONS {
            let stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            connections.push(Connection {
                stream,
                buffer: vec![0; HEAD_ROOM + answer_bytes],
                whole: None,
                next: number * TENANTS / CONNECTIONS,
            });
        }
        Ok(Self {
            connections,
            requests: Arc::new((0..TENANTS).map(request).collect()),
        })
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

impl Connection {
    async fn run(mut self, requests: Arc<Vec<Vec<u8>>>, until: Instant) -> anyhow::Result<(Self, u64)> {
        let mut sent = 0;
        while Instant::now() < until {
            let request = &requests[self.next % requests.len()];
            self.next += 1;
            self.stream.write_all(request).await?;
            self.answer().await?;
            sent += 1;
        }
        Ok((self, sent))
    }

    /// Reads one answer to its end.
    async fn answer(&mut self) -> anyhow::Result<()> {
        let mut read = 0;
        loop {
            let more = self.stream.read(&mut self.buffer[read..]).await?;
            ensure!(more > 0, "the connection was closed within an answer");
            read += more;
            let bytes = &self.buffer[..read];
            if self.whole.is_none() {
                self.whole = whole_length(bytes)?;
            }
            let Some(whole) = self.whole else { continue };
            if read >= whole {
                ensure!(
                    read == whole && bytes.starts_with(b"HTTP/1.1 200"),
                    "an answer is not the expected one: {:?}",
                    String::from_utf8_lossy(&bytes[..bytes.len().min(80)])
                );
                return Ok(());
            }
        }
    }
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
