//! What the kernel is told and what it allows: options of sockets, and the limit of open files.

use std::{io, time::Duration};

use rustix::{
    io::Errno,
    net::sockopt,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::net::TcpStream;

use crate::admin;

/// A peer that vanished without a close is noticed after about two minutes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Open files that are no relayed connections: those of the admin server, of which each may be taken; listeners, the
/// session, scrapes, the runtimes.
const OTHER_FILES: u64 = admin::MAX_CONNECTIONS as u64 + 64;

/// Small messages are sent at once, and peers that vanish are noticed.
pub(crate) fn tune(stream: &TcpStream) {
    let tuned = stream.set_nodelay(true).and_then(|()| Ok(keep_alive(stream)?));
    if let Err(error) = tuned {
        tracing::debug!(%error, "a socket's options cannot be set");
    }
}

fn keep_alive(stream: &TcpStream) -> Result<(), Errno> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)
}

/// Whether a connection could not be opened for want of something on this side.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    let ours = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::ADDRNOTAVAIL,
        Errno::NOMEM,
        Errno::NOBUFS,
    ];
    Errno::from_io_error(error).is_some_and(|errno| ours.contains(&errno))
}

/// Raises the limit of open files as far as it may be raised, and gives the most connections that can
/// be relayed under it: each takes two files, and one in eight a pipe.
pub(crate) fn max_connections(wanted: usize) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let mut limit = current;
    if current.is_some() && current != maximum {
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => limit = maximum,
            Err(error) => tracing::warn!(%error, "the limit of open files cannot be raised"),
        }
    }
    let possible = limit.map_or(wanted, connections_within);
    if possible < wanted {
        tracing::warn!(
            open_files = limit,
            max_connections = possible,
            "--max-connections is lowered to what the limit of open files allows"
        );
    }
    possible.min(wanted)
}

fn connections_within(open_files: u64) -> usize {
    let possible = open_files.saturating_sub(OTHER_FILES).saturating_mul(4) / 9;
    usize::try_from(possible).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_exhausted_here_is_not_the_applications_doing() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOMEM] {
            assert!(is_exhausted(&errno.into()), "{errno}");
        }
        for errno in [Errno::CONNREFUSED, Errno::TIMEDOUT, Errno::HOSTUNREACH] {
            assert!(!is_exhausted(&errno.into()), "{errno}");
        }
        assert!(!is_exhausted(&io::ErrorKind::TimedOut.into()));
    }

    #[tokio::test]
    async fn vanished_peers_are_noticed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        tune(&stream);
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), KEEPALIVE_IDLE);
        assert!(stream.nodelay().unwrap());
    }

    #[test]
    fn connections_fit_into_the_open_files() {
        assert_eq!(connections_within(1024), 369);
        assert_eq!(connections_within(10), 1);
        for open_files in [256, 1024, 65_536] {
            // Four connections take nine files.
            let left = open_files - connections_within(open_files) as u64 * 9 / 4;
            assert!(left >= 128 + 64, "{left} of {open_files} for all others");
        }
        assert_eq!(max_connections(1), 1);
        let now = getrlimit(Resource::Nofile);
        assert_eq!(now.current, now.maximum, "raised");
    }
}
