//! How long to wait before the next attempt to connect.

use std::time::Duration;

/// The longest wait.
pub const LONGEST: Duration = Duration::from_secs(30);

const FIRST: Duration = Duration::from_millis(500);

/// The wait before an attempt: 0.5 s for attempt 0, doubling to 30 s, of which a hash of the instance
/// and the attempt takes up to a half. So agents that lost the same aggregator come back spread out,
/// and one agent always does the same.
pub fn delay(instance: &str, attempt: u32) -> Duration {
    let nominal = FIRST.saturating_mul(1 << attempt.min(16)).min(LONGEST);
    let half_us = u64::try_from(nominal.as_micros() / 2).unwrap_or(u64::MAX);
    Duration::from_micros(half_us + hash(instance, attempt) % (half_us + 1))
}

/// FNV-1a with the finish of SplitMix64: simple, well spread, and the same for ever.
fn hash(instance: &str, attempt: u32) -> u64 {
    let bytes = instance.bytes().chain(attempt.to_le_bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_the_same_for_ever() {
        let waits: Vec<u128> = (0..9).map(|n| delay("pod-1", n).as_micros()).collect();
        assert_eq!(waits, VECTOR);
    }

    const VECTOR: [u128; 9] = [
        477_508, 861_258, 1_177_870, 3_414_375, 7_984_802, 14_801_581, 18_141_762, 22_239_407, 22_440_554,
    ];

    #[test]
    fn waits_double_and_are_spread() {
        for attempt in 0..200 {
            let nominal = FIRST * (1 << attempt.min(6));
            let nominal = nominal.min(LONGEST);
            let wait = delay("pod-2", attempt);
            assert!(nominal / 2 <= wait && wait <= nominal, "{attempt}: {wait:?}");
        }
        let quarter = Duration::from_millis(375);
        let early = (0..1000).filter(|n| delay(&format!("pod-{n}"), 0) < quarter);
        let early = early.count();
        assert!((400..600).contains(&early), "{early} of 1000 in the first half");
    }
}
