//! The application behind everything: a process that answers HTTP/1.1 and HTTP/2 with as many bytes as the path says.

use std::{net::SocketAddr, path::Path};

use coalmine_tests::process::free_addresses;
use h2::server;
use http::Response;
use prost::bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::child::Child;

/// The longest request that is read.
const MAX_REQUEST: usize = 4096;

/// The longest answer.
const MAX_ANSWER: usize = 1 << 20;

/// Streams of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 256;

/// The process, and where it listens.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    _child: Child,
}

impl Upstream {
    /// Starts it on one core.
    pub(crate) async fn start(name: &'static str, core: usize, directory: &Path) -> anyhow::Result<Self> {
        let [address] = free_addresses();
        let arguments = ["upstream".to_owned(), core.to_string(), address.to_string()];
        let mut child = Child::own(name, directory, &arguments)?;
        child.listening(address).await?;
        Ok(Self {
            address,
            _child: child,
        })
    }
}

/// What the process runs.
pub(crate) async fn serve(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (client, _) = listener.accept().await?;
        client.set_nodelay(true)?;
        tokio::spawn(answer(client));
    }
}

/// Whoever speaks HTTP/2 says so with `PRI`; the others ask by GET.
async fn answer(client: TcpStream) -> anyhow::Result<()> {
    let mut first = [0];
    client.peek(&mut first).await?;
    if first == *b"P" {
        answer_http2(client).await
    } else {
        answer_http1(client).await
    }
}

/// Answers one request after the other; the answer is made once for all of a connection with the same path.
async fn answer_http1(mut client: TcpStream) -> anyhow::Result<()> {
    let mut buffer = vec![0; MAX_REQUEST];
    let mut read = 0;
    let mut made = (0, Vec::new());
    loop {
        let more = client.read(&mut buffer[read..]).await?;
        if more == 0 {
            return Ok(());
        }
        read += more;
        let request = &buffer[..read];
        if !request.ends_with(b"\r\n\r\n") {
            continue;
        }
        let bytes = number_in_path(request.strip_prefix(b"GET ").unwrap_or_default());
        if made.0 != bytes || made.1.is_empty() {
            let mut response = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {bytes}\r\n\r\n"
            )
            .into_bytes();
            response.resize(response.len() + bytes, b'x');
            made = (bytes, response);
        }
        client.write_all(&made.1).await?;
        read = 0;
    }
}

/// Answers each stream as soon as its request is there.
async fn answer_http2(client: TcpStream) -> anyhow::Result<()> {
    let connection = server::Builder::new()
        .max_concurrent_streams(MAX_STREAMS)
        .handshake::<_, Bytes>(client);
    let mut connection = connection.await?;
    let mut body = Bytes::new();
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let bytes = number_in_path(request.uri().path().as_bytes());
        if body.len() != bytes {
            body = Bytes::from(vec![b'x'; bytes]);
        }
        let head = Response::builder()
            .header("content-type", "application/octet-stream")
            .header("content-length", bytes)
            .body(())?;
        let mut stream = respond.send_response(head, false)?;
        stream.send_data(body.clone(), true)?;
    }
    Ok(())
}

/// The number after the slash.
fn number_in_path(path: &[u8]) -> usize {
    let digits = path.strip_prefix(b"/").unwrap_or_default().iter();
    let digits = digits.take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| {
        (number * 10 + usize::from(digit - b'0')).min(MAX_ANSWER)
    })
}
