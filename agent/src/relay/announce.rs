//! Tells the application who the client is, where that is wanted: the header of the PROXY protocol, version 2
//! (haproxy.org, doc/proxy-protocol.txt, section 2.2), before the first byte of the client.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use tokio::net::TcpStream;

/// Begins every header: no other protocol begins so.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2, and the command: the connection of a client. The other command (LOCAL) would say that the agent is
/// the client, and is never sent: an application may trust it more.
const PROXY: u8 = 0x21;

/// TCP over IPv4 and over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// The header for the connection of a client that was accepted from this address.
pub(crate) fn header(from: SocketAddr, client: &TcpStream) -> io::Result<Vec<u8>> {
    Ok(header_of(from, client.local_addr()?))
}

fn header_of(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (source, destination) = (from.ip().to_canonical(), to.ip().to_canonical());
    let mut header = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = begun(TCP4, 12);
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => {
            let mut header = begun(TCP6, 36);
            header.extend(as_v6(source).octets());
            header.extend(as_v6(destination).octets());
            header
        }
    };
    header.extend(from.port().to_be_bytes());
    header.extend(to.port().to_be_bytes());
    header
}

fn begun(family: u8, length: u16) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.extend([PROXY, family]);
    header.extend(length.to_be_bytes());
    header
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(from: &str, to: &str, family: u8, addresses: &[u8]) {
        let header = header_of(from.parse().unwrap(), to.parse().unwrap());
        assert_eq!(header[..12], SIGNATURE);
        assert_eq!(header[12..14], [0x21, family]);
        assert_eq!(
            usize::from(header[14]) << 8 | usize::from(header[15]),
            addresses.len()
        );
        assert_eq!(&header[16..], addresses);
    }

    #[test]
    fn headers_are_those_of_the_protocol() {
        let v4 = [192, 0, 2, 1, 10, 0, 0, 9, 0x30, 0x39, 0, 80];
        check("192.0.2.1:12345", "10.0.0.9:80", TCP4, &v4);
        check("[::ffff:192.0.2.1]:12345", "[::ffff:10.0.0.9]:80", TCP4, &v4);
        let mut v6 = vec![0; 36];
        (v6[0], v6[1], v6[15]) = (0x20, 1, 1);
        (v6[16], v6[17], v6[31]) = (0x20, 1, 2);
        v6[32..].copy_from_slice(&[0, 1, 0, 2]);
        check("[2001::1]:1", "[2001::2]:2", TCP6, &v6);
    }
}
