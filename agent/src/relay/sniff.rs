//! Finds out whether a client speaks HTTP/2, before any of its bytes are passed on.
//!
//! Two things make this more than a look at the first bytes. They may come one by one. And a server of
//! HTTP/2 may say its SETTINGS before the client has said anything; these must then not go to the
//! client, because hyper will say its own, but to hyper as the first bytes of the application. What
//! cannot be SETTINGS is passed on at once: there are protocols in which the server speaks first. And
//! a client that stops in the middle of what may be HTTP/2's preface has said all it has to say.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::{
    http2::{self, Sniffed},
    proxy::Proxy,
};

/// A pause within HTTP/2's preface, which is one small write, after which it is none.
const PAUSE: Duration = Duration::from_millis(50);

/// What was read of both sides before the protocol was clear.
#[derive(Debug, Default)]
pub(super) struct Sniff {
    pub(super) client: Vec<u8>,
    pub(super) upstream: Vec<u8>,
    /// The application did not say SETTINGS, so its bytes are passed on.
    upstream_is_plain: bool,
    /// Runs once the client has said something that is not clear.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Sniff {
    /// Reads the client until it is clear whether it speaks HTTP/2. A close is left for the relay to
    /// find again; an error is not there a second time.
    pub(super) fn poll_client(
        &mut self,
        cx: &mut Context<'_>,
        proxy: &Proxy,
        client: &mut TcpStream,
    ) -> Poll<io::Result<Sniffed>> {
        loop {
            let Poll::Ready(read) = read_some(cx, proxy, client, &mut self.client) else {
                return self.poll_pause(cx).map(Ok);
            };
            let read = read?;
            match http2::sniff(&self.client) {
                Sniffed::Unclear if read => {}
                Sniffed::Unclear => return Poll::Ready(Ok(Sniffed::Other)),
                clear => return Poll::Ready(Ok(clear)),
            }
        }
    }

    fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<Sniffed> {
        if self.client.is_empty() {
            return Poll::Pending;
        }
        let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
        pause.as_mut().poll(cx).map(|()| Sniffed::Other)
    }

    /// Reads the application while it may be saying its SETTINGS; ready when it says something else.
    pub(super) fn poll_upstream(
        &mut self,
        cx: &mut Context<'_>,
        proxy: &Proxy,
        upstream: &mut TcpStream,
    ) -> Poll<io::Result<()>> {
        while !self.upstream_is_plain {
            match may_be_settings(&self.upstream) {
                // The client must speak before anything else can happen.
                Some(true) => return Poll::Pending,
                Some(false) => self.upstream_is_plain = true,
                None => {
                    let read = ready!(read_some(cx, proxy, upstream, &mut self.upstream));
                    self.upstream_is_plain = !read?;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Whether a server's first bytes are the head of a SETTINGS frame; none if there are too few.
fn may_be_settings(bytes: &[u8]) -> Option<bool> {
    // Three bytes of length, then type 4, no flags, stream 0 (RFC 9113, section 4.1).
    const HEAD: [u8; 6] = [4, 0, 0, 0, 0, 0];
    // A length of 65536 or more, or of 256 or more, is no server's first SETTINGS: six bytes a setting.
    if bytes.iter().take(2).any(|byte| *byte != 0) {
        return Some(false);
    }
    let seen = bytes.get(3..).unwrap_or_default();
    match seen.get(..HEAD.len()) {
        Some(head) => Some(head == HEAD),
        None if HEAD.starts_with(seen) => None,
        None => Some(false),
    }
}

/// Appends what can be read; false at the end.
fn read_some(
    cx: &mut Context<'_>,
    proxy: &Proxy,
    from: &mut TcpStream,
    bytes: &mut Vec<u8>,
) -> Poll<io::Result<bool>> {
    let mut shared = proxy.buffer.borrow_mut();
    let mut buffer = ReadBuf::new(&mut shared);
    ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
    bytes.extend_from_slice(buffer.filled());
    Poll::Ready(Ok(!buffer.filled().is_empty()))
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
        for prompt in [&b">"[..], b"> ", &[0x4a], &[0, 1]] {
            assert_eq!(may_be_settings(prompt), Some(false), "{prompt:?}");
        }
        assert_eq!(may_be_settings(b"220 smtp"), Some(false));
        assert_eq!(may_be_settings(b"SSH-2.0"), Some(false));
        assert_eq!(may_be_settings(&[0x4a, 0, 0, 0, 0x0a]), Some(false), "MySQL");
    }
}
