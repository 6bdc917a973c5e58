//! Real connections on loopback, in every state that can be brought about, counted exactly.

use std::{
    io::Write,
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// A server, its clients, and the looks at them, each a second after the one before.
struct Database {
    listener: TcpListener,
    clients: Vec<TcpStream>,
    servers: Vec<TcpStream>,
    sockets: Sockets,
    now: Instant,
}

impl Database {
    /// A server to whose port nobody is connected: what earlier tests left is in the kernel's table.
    fn new(address: SocketAddr) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut sockets = Sockets::new(port).unwrap();
            assert_eq!(sockets.source, Source::Netlink, "netlink is refused here");
            if sockets.read().is_ok_and(|seen| seen == v1::Sockets::default()) {
                return Self {
                    listener,
                    clients: Vec::new(),
                    servers: Vec::new(),
                    sockets,
                    now: Instant::now(),
                };
            }
            assert!(Instant::now() < deadline, "every port has connections");
        }
    }

    fn connect(&mut self, address: SocketAddr) {
        let client = TcpStream::connect(address).unwrap();
        client.set_nodelay(true).unwrap();
        self.clients.push(client);
        self.servers.push(self.listener.accept().unwrap().0);
    }

    fn look(&mut self) -> v1::Sockets {
        // Longer than any pause after a look.
        self.now += Duration::from_secs(600);
        self.sockets.read_at(self.now).unwrap()
    }

    /// Repeats until there are so many connections that await an answer.
    #[track_caller]
    fn until_awaiting(&mut self, awaiting: u32, mut again: impl FnMut(&mut Self)) -> v1::Sockets {
        let deadline = Instant::now() + PATIENCE;
        loop {
            again(self);
            let seen = self.look();
            if seen.awaiting == awaiting {
                return seen;
            }
            assert!(Instant::now() < deadline, "{seen:?}");
            thread::yield_now();
        }
    }

    /// Established ones and others.
    #[track_caller]
    fn expect(&mut self, established: u32, other: u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.look();
            if (seen.established, seen.other) == (established, other) {
                return;
            }
            assert!(Instant::now() < deadline, "{seen:?}");
            thread::yield_now();
        }
    }
}

fn connections_are_counted(listen: SocketAddr, connect: impl Fn(u16) -> SocketAddr) {
    let mut database = Database::new(listen);
    let address = connect(database.listener.local_addr().unwrap().port());
    for _ in 0..5 {
        database.connect(address);
    }
    let seen = database.look();
    assert!(seen.rtt_us > 0, "{seen:?}");
    let expected = v1::Sockets {
        established: 5,
        rtt_us: seen.rtt_us,
        ..v1::Sockets::default()
    };
    assert_eq!(seen, expected);

    // The kernel's clock has steps, so one question may come within the step of the connection.
    let seen = database.until_awaiting(1, |database| database.clients[0].write_all(b"?").unwrap());
    assert_eq!((seen.established, seen.other), (5, 0));
    database.until_awaiting(2, |database| database.clients[4].write_all(b"?").unwrap());
    database.until_awaiting(1, |database| database.servers[0].write_all(b"!").unwrap());
    database.until_awaiting(0, |database| database.servers[4].write_all(b"!").unwrap());

    // FIN_WAIT2 and CLOSE_WAIT.
    database.clients[1].shutdown(Shutdown::Write).unwrap();
    database.expect(4, 1);
    database.servers[2].shutdown(Shutdown::Write).unwrap();
    database.expect(3, 2);
    // TIME_WAIT.
    drop((database.clients.remove(3), database.servers.remove(3)));
    database.expect(2, 2);

    database.sockets.source = Source::Table;
    let expected = v1::Sockets {
        established: 2,
        other: 2,
        ..v1::Sockets::default()
    };
    assert_eq!(database.look(), expected);
}

#[test]
fn connections_over_ipv4_are_counted() {
    let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    connections_are_counted(address(0), address);
}

#[test]
fn connections_over_ipv6_are_counted() {
    if !Path::new("/proc/net/if_inet6").exists() {
        // A kernel without IPv6.
        return;
    }
    // Both, so that no other test takes the same port of IPv4.
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    connections_are_counted(any, |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
    connections_are_counted(any, |port| SocketAddr::from((mapped, port)));
}

#[test]
fn looks_are_a_second_apart() {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut database = Database::new(address);
    let address = database.listener.local_addr().unwrap();
    database.connect(address);
    assert_eq!(database.look().established, 1);
    database.connect(address);
    let soon = database.now + Duration::from_millis(10);
    assert_eq!(database.sockets.read_at(soon).unwrap().established, 1);
    assert_eq!(database.look().established, 2);
}

fn looking(source: Source) -> Sockets {
    Sockets {
        port: 5432,
        source,
        asked: None,
        seen: None,
        resent: None,
        buffer: vec![0; BUFFER_BYTES],
    }
}

/// A look at connections with these cookies, which have sent so many segments again.
fn tally(connections: &[(u64, u32)]) -> Tally {
    let mut tally = Tally::default();
    for (cookie, resent) in connections {
        tally.add(Connection {
            state: ESTABLISHED,
            cookie: *cookie,
            info: Some(Info {
                since_sent_ms: 4,
                since_received_ms: 4,
                rtt_us: 100,
                resent: *resent,
            }),
        });
    }
    tally
}

#[test]
fn segments_that_were_sent_again_are_those_since_the_last_look() {
    let mut sockets = looking(Source::Netlink);
    for (connections, expected) in [
        (&[(1, 10), (2, 0), (3, 5)][..], 0),
        (&[(1, 12), (2, 1), (3, 5)][..], 3),
        // One is new, one has gone.
        (&[(1, 12), (2, 4), (4, 2)][..], 5),
        // A number that goes back is another connection's.
        (&[(1, 2), (2, 4)][..], 0),
        (&[(1, 3), (2, 4)][..], 1),
    ] {
        let seen = sockets.note(tally(connections));
        assert_eq!(seen.retransmits, expected, "{connections:?}");
    }
    assert_eq!(sockets.again().unwrap().retransmits, 0, "they were said");
}

#[test]
fn a_refusal_is_final_and_other_errors_are_not() {
    let mut sockets = looking(Source::Netlink);
    let refused = io::Error::from(Errno::ACCESS);
    assert!(is_refused(&refused) && sockets.falls_back(&refused));
    assert_eq!(sockets.source, Source::Table);
    assert!(sockets.falls_back(&refused));
    assert_eq!(sockets.source, Source::Nobody);
    assert!(!sockets.falls_back(&refused));
    let error = sockets.read_at(Instant::now()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    for errno in [Errno::AGAIN, Errno::NOBUFS, Errno::NOMEM, Errno::MFILE] {
        assert!(!is_refused(&errno.into()), "{errno}");
    }
    assert!(Sockets::new(0).is_err());
}
