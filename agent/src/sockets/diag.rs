//! Asks the kernel for connections: NETLINK_SOCK_DIAG, as sock_diag(7) and the kernel's
//! `linux/inet_diag.h`, `linux/netlink.h` and `linux/tcp.h` describe it.
//!
//! ```text
//! message      length u32, kind u16, flags u16, sequence u32, sender u32, body; padded to 4 bytes
//! request      family u8, protocol u8, extensions u8, pad u8, states u32, identity
//! connection   family u8, state u8, timer u8, retries u8, identity, 20 bytes, attributes
//! identity     local port u16, remote port u16 (both big-endian), local address 16 bytes,
//!              remote address 16 bytes, interface u32, cookie 2 x u32
//! attribute    length u16 (with these 4 bytes), kind u16, value; padded to 4 bytes
//! ```
//!
//! Numbers are in the machine's byte order unless said otherwise. A kernel that knows more than this puts
//! it at the end of a value, and one that knows less leaves it away.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect,
        netlink::{self, SocketAddrNetlink},
        recv, send, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{COUNTED, Connection, Info};

/// The kernel answers at once; longer than this and it is not asked again before the next look.
const PATIENCE: Duration = Duration::from_millis(100);

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// Kinds of messages.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Flags of messages.
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
/// The table changed in a way that the answer does not show.
const NLM_F_DUMP_INTR: u16 = 0x10;

/// The attribute that holds `struct tcp_info`; a request asks for it with the bit below its number.
const INET_DIAG_INFO: u16 = 2;
/// The upper bits of an attribute's kind say something else.
const KIND_MASK: u16 = 0x3fff;

const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// A connection without its attributes.
const CONNECTION_BYTES: usize = 72;
/// A `struct tcp_info` up to the last field that is read.
const INFO_BYTES: usize = 104;

/// A message of the kernel.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// Whether more follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// Gives each connection of this network namespace to the port. IPv6 has those with mapped IPv4 addresses.
pub(super) fn dump(port: u16, buffer: &mut [u8], mut each: impl FnMut(Connection)) -> io::Result<()> {
    // A socket of its own for each look: what is left of an answer that was given up cannot come later.
    let socket = open()?;
    ask(&socket, AF_INET, port, buffer, &mut each)?;
    match ask(&socket, AF_INET6, port, buffer, &mut each) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn open() -> io::Result<OwnedFd> {
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    // Only the kernel, whose number is 0, can send to it then.
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    Ok(socket)
}

fn ask(
    socket: &OwnedFd,
    family: u8,
    port: u16,
    buffer: &mut [u8],
    each: &mut impl FnMut(Connection),
) -> io::Result<()> {
    let sequence = u32::from(family);
    send(socket, &request(family, sequence, port), SendFlags::empty())?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // With TRUNC, the length is that of the answer, whether it fits or not.
        let received = retry_on_intr(|| recv(socket, &mut *buffer, RecvFlags::TRUNC));
        let (_, length) = match received {
            Err(Errno::AGAIN) => return Err(late("the kernel does not answer")),
            received => received?,
        };
        let Some(answer) = buffer.get(..length) else {
            return Err(invalid("an answer is longer than the kernel promises"));
        };
        if read_answer(answer, sequence, port, each)? == Progress::Done {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(late("the kernel has too many connections to list in time"));
        }
    }
}

fn request(family: u8, sequence: u32, port: u16) -> Vec<u8> {
    let states = COUNTED.iter().fold(0_u32, |mask, state| mask | (1_u32 << state));
    let extensions = 1 << (INET_DIAG_INFO - 1);
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, IPPROTO_TCP, extensions, 0]);
    bytes.extend(states.to_ne_bytes());
    // The kernel leaves out connections to other ports.
    bytes.extend(0_u16.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.resize(REQUEST_BYTES, 0);
    bytes
}

/// Reads what one receive gave, which may be several messages.
fn read_answer(
    bytes: &[u8],
    sequence: u32,
    port: u16,
    each: &mut impl FnMut(Connection),
) -> io::Result<Progress> {
    let mut left = bytes;
    while !left.is_empty() {
        let Some((message, rest)) = Message::split(left) else {
            return Err(invalid("an answer of the kernel cannot be read"));
        };
        left = rest;
        if message.sequence != sequence {
            continue;
        }
        if message.flags & NLM_F_DUMP_INTR != 0 {
            let text = "connections changed while they were listed";
            return Err(io::Error::new(io::ErrorKind::Interrupted, text));
        }
        match message.kind {
            SOCK_DIAG_BY_FAMILY => {
                if let Some(connection) = connection(message.body, port) {
                    each(connection);
                }
            }
            NLMSG_DONE => return message.status().map(|()| Progress::Done),
            NLMSG_ERROR => message.status()?,
            NLMSG_OVERRUN => return Err(invalid("a part of the kernel's answer is lost")),
            _ => {}
        }
    }
    Ok(Progress::More)
}

fn late(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}

fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

// === impl Message ===

impl<'a> Message<'a> {
    /// The first message, and what follows it.
    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let message = Self {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            body: bytes.get(HEADER_BYTES..length)?,
        };
        Some((message, after(bytes, length)))
    }

    /// What the kernel says about the request: an error's number, negative, or nothing.
    fn status(&self) -> io::Result<()> {
        match u32_at(self.body, 0).map_or(0, u32::cast_signed) {
            error @ ..0 => Err(io::Error::from_raw_os_error(error.saturating_neg())),
            _ => Ok(()),
        }
    }
}

fn connection(body: &[u8], port: u16) -> Option<Connection> {
    let remote_port = u16::from_be_bytes(*body.get(6..)?.first_chunk()?);
    let state = *body.get(1)?;
    if remote_port != port || !COUNTED.contains(&state) {
        return None;
    }
    let cookie = [u32_at(body, 44)?, u32_at(body, 48)?].map(u64::from);
    Some(Connection {
        state,
        cookie: cookie[0] | (cookie[1] << 32),
        info: info(body.get(CONNECTION_BYTES..)?),
    })
}

/// Finds the attribute with the `struct tcp_info`.
fn info(attributes: &[u8]) -> Option<Info> {
    let mut left = attributes;
    while !left.is_empty() {
        let length = usize::from(u16_at(left, 0)?);
        let value = left.get(4..length)?;
        if u16_at(left, 2)? & KIND_MASK == INET_DIAG_INFO {
            return tcp_info(value);
        }
        left = after(left, length);
    }
    None
}

fn tcp_info(value: &[u8]) -> Option<Info> {
    let value = value.first_chunk::<INFO_BYTES>()?;
    Some(Info {
        since_sent_ms: u32_at(value, 44)?,
        since_received_ms: u32_at(value, 52)?,
        rtt_us: u32_at(value, 68)?,
        resent: u32_at(value, 100)?,
    })
}

/// What follows something of this length and its padding.
fn after(bytes: &[u8], length: usize) -> &[u8] {
    bytes.get(length.next_multiple_of(4)..).unwrap_or_default()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 5432;

    /// A message with this body.
    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((HEADER_BYTES as u32 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(1_u32.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A connection with an attribute before the one that counts, whose value has this length.
    fn body(state: u8, port: u16, info_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; CONNECTION_BYTES];
        bytes[0] = AF_INET;
        bytes[1] = state;
        bytes[6..8].copy_from_slice(&port.to_be_bytes());
        bytes[44..48].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(&1_u32.to_ne_bytes());
        // INET_DIAG_SHUTDOWN, one byte and its padding.
        bytes.extend([5_u16.to_ne_bytes(), 8_u16.to_ne_bytes()].as_flattened());
        bytes.extend([0; 4]);
        let length = u16::try_from(4 + info_bytes).unwrap();
        bytes.extend([length.to_ne_bytes(), INET_DIAG_INFO.to_ne_bytes()].as_flattened());
        let mut value = vec![0; 280];
        for (at, number) in [(44, 24_u32), (52, 44), (68, 310), (100, 3)] {
            value[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        value.resize(info_bytes, 0);
        bytes.extend(value);
        bytes
    }

    fn read(bytes: &[u8]) -> (io::Result<Progress>, Vec<Connection>) {
        let mut seen = Vec::new();
        let progress = read_answer(bytes, 1, PORT, &mut |connection| seen.push(connection));
        (progress, seen)
    }

    fn full() -> Connection {
        Connection {
            state: 1,
            cookie: 7 | (1 << 32),
            info: Some(Info {
                since_sent_ms: 24,
                since_received_ms: 44,
                rtt_us: 310,
                resent: 3,
            }),
        }
    }

    #[test]
    fn connections_are_read() {
        let mut answer = message(SOCK_DIAG_BY_FAMILY, 2, &body(1, PORT, 280));
        answer.extend(message(SOCK_DIAG_BY_FAMILY, 2, &body(1, 5433, 280)));
        // TIME_WAIT.
        answer.extend(message(SOCK_DIAG_BY_FAMILY, 2, &body(6, PORT, 280)));
        let (progress, seen) = read(&answer);
        assert_eq!(progress.unwrap(), Progress::More);
        assert_eq!(seen, [full()]);
        answer.extend(message(NLMSG_DONE, 2, &0_u32.to_ne_bytes()));
        assert_eq!(read(&answer).0.unwrap(), Progress::Done);
    }

    #[test]
    fn kernels_know_more_or_less() {
        // Linux 2.6.16 had 104 bytes, Linux 6.18 has 280.
        for (info_bytes, info) in [(104, full().info), (280, full().info), (100, None), (0, None)] {
            let answer = message(SOCK_DIAG_BY_FAMILY, 2, &body(1, PORT, info_bytes));
            let (_, seen) = read(&answer);
            assert_eq!(seen, [Connection { info, ..full() }], "{info_bytes} bytes");
        }
    }

    #[test]
    fn errors_are_the_kernels() {
        let refused = message(NLMSG_ERROR, 0, &(-1_i32).to_ne_bytes());
        assert_eq!(read(&refused).0.unwrap_err().raw_os_error(), Some(1));
        let failed = message(NLMSG_DONE, 2, &(-12_i32).to_ne_bytes());
        assert_eq!(read(&failed).0.unwrap_err().raw_os_error(), Some(12));
        let changed = message(SOCK_DIAG_BY_FAMILY, 2 | NLM_F_DUMP_INTR, &body(1, PORT, 280));
        let (progress, seen) = read(&changed);
        assert_eq!(progress.unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(seen.is_empty());
        let overrun = message(NLMSG_OVERRUN, 0, &[]);
        assert_eq!(read(&overrun).0.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn what_is_cut_off_or_wrong_is_an_error_or_nothing() {
        let answer = message(SOCK_DIAG_BY_FAMILY, 2, &body(1, PORT, 280));
        for end in 1..answer.len() {
            assert!(read(&answer[..end]).0.is_err(), "{end} bytes");
        }
        for at in 0..answer.len() {
            for value in [0, 1, 3, 0x7f, 0xff] {
                let mut wrong = answer.clone();
                wrong[at] = value;
                // Whatever it says, reading ends.
                let (_, seen) = read(&wrong);
                assert!(seen.len() <= 1, "byte {at} is {value}");
            }
        }
        for length in 0..16_u32 {
            assert!(read(&length.to_ne_bytes().repeat(8)).0.is_err(), "{length}");
        }
    }

    #[test]
    fn requests_are_as_the_kernel_reads_them() {
        let bytes = request(AF_INET6, 10, PORT);
        assert_eq!(bytes.len(), 72);
        assert_eq!(bytes[16..20], [10, 6, 2, 0]);
        // All states but TIME_WAIT (6), CLOSE (7), LISTEN (10) and those above CLOSING (11).
        assert_eq!(u32_at(&bytes, 20), Some(0b1011_0011_1110));
        assert_eq!(bytes[24..28], [0, 0, 0x15, 0x38]);
    }
}
