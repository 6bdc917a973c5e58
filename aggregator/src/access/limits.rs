//! How often a caller may ask and how much it may hold, counted for each caller in memory that is bounded.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::DashMapStateStore,
};

/// After so many requests, callers that have been quiet are forgotten. Between two times as many can be added at most.
const FORGET_EVERY: u32 = 4_096;

/// Upper half of an IPv6 address: whoever has one address of a network has them all.
const NETWORK: u128 = !0 << 64;

/// Whose requests are counted together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Key {
    /// Those that present the token of this name.
    Token(Arc<str>),
    /// Those that come from this address, or from this IPv6 network.
    Address(IpAddr),
}

impl Key {
    /// Of an address; whoever has none shares one key.
    pub(super) fn of_peer(peer: Option<IpAddr>) -> Self {
        Self::Address(match peer.map(|peer| peer.to_canonical()) {
            Some(IpAddr::V6(address)) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & NETWORK)),
            Some(address) => address,
            None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        })
    }
}

/// So many requests a second of each caller, and as many at once.
pub(super) struct Limiter<C: Clock> {
    callers: RateLimiter<Key, DashMapStateStore<Key>, C, NoOpMiddleware<C::Instant>>,
    asked: AtomicU32,
}

impl<C: Clock> Limiter<C> {
    pub(super) fn new(a_second: u32, clock: C) -> Self {
        let a_second = NonZeroU32::new(a_second).unwrap_or(NonZeroU32::MIN);
        Self {
            callers: RateLimiter::dashmap_with_clock(Quota::per_second(a_second), clock),
            asked: AtomicU32::new(0),
        }
    }

    /// Counts a request; else how long the caller has to wait.
    pub(super) fn take(&self, key: &Key) -> Result<(), Duration> {
        if self
            .asked
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(FORGET_EVERY)
        {
            self.callers.retain_recent();
        }
        let taken = self.callers.check_key(key);
        taken.map_err(|until| until.wait_time_from(self.callers.clock().now()))
    }
}

/// What callers hold at a time, of which each may have so much.
#[derive(Debug)]
pub(super) struct Holder {
    most: usize,
    /// Those that hold something.
    held: Mutex<BTreeMap<Key, usize>>,
}

impl Holder {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            held: Mutex::default(),
        }
    }

    /// One more, until it is dropped.
    pub(super) fn take(self: &Arc<Self>, key: Key) -> Option<Held> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.get(&key).copied().unwrap_or(0);
        if count >= self.most {
            return None;
        }
        held.insert(key.clone(), count.saturating_add(1));
        Some(Held {
            holder: Arc::clone(self),
            key,
        })
    }
}

/// What a caller holds.
#[derive(Debug)]
pub(crate) struct Held {
    holder: Arc<Holder>,
    key: Key,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.holder.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                held.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    fn limiter(a_second: u32) -> (Limiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (Limiter::new(a_second, clock.clone()), clock)
    }

    fn address(text: &str) -> Key {
        Key::of_peer(Some(text.parse().unwrap()))
    }

    #[test]
    fn a_caller_waits_and_others_do_not() {
        let (limiter, clock) = limiter(4);
        let (fast, other) = (Key::Token("fast".into()), Key::Token("other".into()));
        for _ in 0..4 {
            assert_eq!(limiter.take(&fast), Ok(()));
        }
        assert_eq!(limiter.take(&fast), Err(Duration::from_millis(250)));
        assert_eq!(limiter.take(&other), Ok(()), "each is counted alone");
        clock.advance(Duration::from_millis(250));
        assert_eq!(limiter.take(&fast), Ok(()));
        assert!(limiter.take(&fast).is_err());
    }

    #[test]
    fn each_caller_holds_so_much_and_what_is_given_back_is_free() {
        let holder = Arc::new(Holder::new(2));
        let take = |name: &str| holder.take(Key::Token(name.into()));
        let (first, second) = (take("a").unwrap(), take("a").unwrap());
        assert!(take("a").is_none());
        let other = take("b").unwrap();
        drop(first);
        let third = take("a").unwrap();
        assert!(take("a").is_none());
        drop((second, third, other));
        assert!(holder.held.lock().unwrap().is_empty(), "nobody is remembered");
    }

    #[test]
    fn addresses_of_one_network_are_one_caller() {
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:192.0.2.1"), address("192.0.2.1"));
        assert_ne!(address("192.0.2.1"), address("192.0.2.2"));
        assert_ne!(address("192.0.2.1"), Key::of_peer(None));
    }

    #[test]
    fn callers_that_are_quiet_are_forgotten() {
        let (limiter, clock) = limiter(1_000);
        for number in 0..100_000_u32 {
            let caller = Key::Address(IpAddr::V4(Ipv4Addr::from_bits(number)));
            assert_eq!(limiter.take(&caller), Ok(()));
            clock.advance(Duration::from_millis(1));
        }
        let bound = usize::try_from(FORGET_EVERY).unwrap() + 2;
        assert!(limiter.callers.len() <= bound, "{}", limiter.callers.len());
    }
}
