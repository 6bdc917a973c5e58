//! Reads and writes of a socket, straight to the kernel: the C library's are points where a thread may be cancelled,
//! which costs a request's observer a tenth of what it has.

use std::{
    io,
    os::fd::AsFd,
    task::{Context, Poll, ready},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};
use tokio::{io::Interest, net::TcpStream};

/// Reads what is there; zero bytes are the end.
pub(super) fn poll_recv(cx: &mut Context<'_>, from: &TcpStream, room: &mut [u8]) -> Poll<io::Result<usize>> {
    let asked = room.len();
    loop {
        ready!(from.poll_read_ready(cx))?;
        let receive = || rustix::net::recv(from, &mut *room, RecvFlags::empty()).map(|(_, count)| count);
        if let Some(result) = attempt(from, Interest::READABLE, asked, receive) {
            return Poll::Ready(result);
        }
    }
}

/// Writes what there is room for.
pub(super) fn poll_send(cx: &mut Context<'_>, to: &TcpStream, bytes: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(to.poll_write_ready(cx))?;
        let send = || rustix::net::send(to, bytes, SendFlags::NOSIGNAL);
        if let Some(result) = attempt(to, Interest::WRITABLE, bytes.len(), send) {
            return Poll::Ready(result);
        }
    }
}

/// Looks for a byte, past the runtime, which may not know of it yet.
pub(super) fn peek(stream: impl AsFd) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    rustix::net::recv(stream, &mut [0_u8; 1][..], flags).map(|(_, count)| count)
}

/// Does it if the runtime holds it to be possible; none if it is not. Less than was asked for means that the next
/// attempt would be in vain: the runtime learns that as it would from a refusal, and waits for the kernel's word.
fn attempt(
    stream: &TcpStream,
    interest: Interest,
    asked: usize,
    act: impl FnOnce() -> Result<usize, Errno>,
) -> Option<io::Result<usize>> {
    let mut moved = None;
    let result = stream.try_io(interest, || {
        let count = act()?;
        moved = Some(count);
        if (1..asked).contains(&count) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    });
    match (moved, result) {
        (Some(count), _) => Some(Ok(count)),
        (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Some(Err(error)),
        (None, _) => None,
    }
}
