//! Ports on loopback for processes that are about to start.
//!
//! A port that the kernel chose is free only until it chooses it again, for anybody's connection, and a process that
//! starts later, or for a second time, finds it taken. So these come from outside the range from which it chooses, and
//! none comes again before all others have.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    process,
    sync::atomic::{AtomicUsize, Ordering},
};

/// The first port that is given; many known services are below.
const FIRST: u16 = 10_000;

/// The range of Linux where it does not say another, ip(7).
const KERNELS: RangeInclusive<u16> = 32_768..=60_999;

/// How far apart processes with neighbouring numbers begin; a prime.
const APART: usize = 7_919;

/// Gives `N` addresses that nobody listens on.
///
/// # Errors
/// When every port is taken, or no socket can be had.
pub fn free_addresses<const N: usize>() -> io::Result<[SocketAddr; N]> {
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    let ports = ports(&kernels());
    let start = (process::id() as usize).wrapping_mul(APART);
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for address in &mut addresses {
        let mut tries = ports.len();
        loop {
            let at = start.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % ports.len();
            address.set_port(ports[at]);
            tries -= 1;
            match TcpListener::bind(*address) {
                Ok(_) => break,
                Err(error) if tries == 0 || error.kind() != io::ErrorKind::AddrInUse => return Err(error),
                Err(_) => {}
            }
        }
    }
    Ok(addresses)
}

/// The ports from which the kernel chooses.
fn kernels() -> RangeInclusive<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = range.split_whitespace().map_while(|end| end.parse().ok());
    match (ends.next(), ends.next()) {
        (Some(first), Some(last)) => first..=last,
        _ => KERNELS,
    }
}

/// The ports outside that range; all of them if nothing is left.
fn ports(kernels: &RangeInclusive<u16>) -> Vec<u16> {
    let outside: Vec<_> = (FIRST..=u16::MAX)
        .filter(|port| !kernels.contains(port))
        .collect();
    if outside.is_empty() {
        return (FIRST..=u16::MAX).collect();
    }
    outside
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_address_is_given_twice_or_comes_from_where_the_kernel_chooses() {
        let kernels = kernels();
        let given: BTreeSet<SocketAddr> = (0..50).flat_map(|_| free_addresses::<4>().unwrap()).collect();
        assert_eq!(given.len(), 200);
        if *kernels.start() > FIRST {
            assert!(given.iter().all(|address| !kernels.contains(&address.port())));
        }
    }

    #[test]
    fn a_port_that_is_listened_on_is_passed_over() {
        let [held, _] = free_addresses().unwrap();
        let _listener = TcpListener::bind(held).unwrap();
        let all = ports(&kernels()).len();
        for _ in 0..all / 64 {
            assert!(!free_addresses::<64>().unwrap().contains(&held));
        }
        assert!(!free_addresses::<64>().unwrap().contains(&held));
    }

    #[test]
    fn where_the_kernel_has_all_ports_any_will_do() {
        assert_eq!(
            ports(&(1_024..=u16::MAX)).len(),
            usize::from(u16::MAX - FIRST) + 1
        );
        let outside = ports(&KERNELS);
        assert_eq!((outside[0], outside.last()), (FIRST, Some(&u16::MAX)));
        assert!(!outside.contains(&40_000));
    }
}
