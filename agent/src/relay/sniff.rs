//! Finds out whether a client speaks HTTP/2, before any of its bytes are passed on.
//!
//! Two things make this more than a look at the first bytes. They may come one by one. And a server of
//! HTTP/2 may say its SETTINGS before the client has said anything; these must then not go to the
//! client, because hyper will say its own, but to hyper as the first bytes of the application. What
//! cannot be SETTINGS is passed on at once: there are protocols in which the server speaks first.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

use crate::{
    http2::{self, Sniffed},
    proxy::Proxy,
};

/// What was read of both sides before the protocol was clear.
#[derive(Debug, Default)]
pub(super) struct Sniff {
    pub(super) client: Vec<u8>,
    pub(super) upstream: Vec<u8>,
    /// The application did not say SETTINGS, so its bytes are passed on.
    upstream_is_plain: bool,
}

impl Sniff {
    /// Reads the client until it is clear whether it speaks HTTP/2. An error or a close is left for
    /// the relay to find again.
    pub(super) fn poll_client(
        &mut self,
        cx: &mut Context<'_>,
        proxy: &Proxy,
        client: &mut TcpStream,
    ) -> Poll<Sniffed> {
        loop {
            let read = ready!(read_some(cx, proxy, client, &mut self.client));
            match http2::sniff(&self.client) {
                Sniffed::Unclear if read => {}
                Sniffed::Unclear => return Poll::Ready(Sniffed::Other),
                clear => return Poll::Ready(clear),
            }
        }
    }

    /// Reads the application while it may be saying its SETTINGS; ready when it says something else.
    pub(super) fn poll_upstream(
        &mut self,
        cx: &mut Context<'_>,
        proxy: &Proxy,
        upstream: &mut TcpStream,
    ) -> Poll<()> {
        while !self.upstream_is_plain {
            match may_be_settings(&self.upstream) {
                // The client must speak before anything else can happen.
                Some(true) => return Poll::Pending,
                Some(false) => self.upstream_is_plain = true,
                None => {
                    let read = ready!(read_some(cx, proxy, upstream, &mut self.upstream));
                    self.upstream_is_plain = !read;
                }
            }
        }
        Poll::Ready(())
    }
}

/// Whether a server's first bytes are the head of a SETTINGS frame; none if there are too few.
fn may_be_settings(bytes: &[u8]) -> Option<bool> {
    // Three bytes of length, then type 4, no flags, stream 0 (RFC 9113, section 4.1).
    const HEAD: [u8; 6] = [4, 0, 0, 0, 0, 0];
    let seen = bytes.get(3..).unwrap_or_default();
    match seen.get(..HEAD.len()) {
        Some(head) => Some(head == HEAD),
        None if HEAD.starts_with(seen) => None,
        None => Some(false),
    }
}

/// Appends what can be read; false at the end or after an error.
fn read_some(cx: &mut Context<'_>, proxy: &Proxy, from: &mut TcpStream, bytes: &mut Vec<u8>) -> Poll<bool> {
    let mut shared = proxy.buffer.borrow_mut();
    let mut buffer = ReadBuf::new(&mut shared);
    let read = ready!(Pin::new(from).poll_read(cx, &mut buffer));
    bytes.extend_from_slice(buffer.filled());
    Poll::Ready(read.is_ok() && !buffer.filled().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_told_from_greetings() {
        let settings = [0, 0, 18, 4, 0, 0, 0, 0, 0, 0, 3];
        for end in 0..9 {
            assert_eq!(may_be_settings(&settings[..end]), None);
        }
        assert_eq!(may_be_settings(&settings), Some(true));
        assert_eq!(may_be_settings(b"220 smtp"), Some(false));
        assert_eq!(may_be_settings(b"SSH-2.0"), Some(false));
        assert_eq!(may_be_settings(&[0x4a, 0, 0, 0, 0x0a]), Some(false), "MySQL");
    }
}
