//! What was said of tokens, for a while. Bounded; time comes as an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use coalmine_judge::chain::Hash;

use super::Presenter;

/// Longest time that a token is believed without asking again.
const BELIEVED_FOR: Duration = Duration::from_secs(60);

/// How long one is refused without asking again.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// Most tokens that are remembered.
const MAX_TOKENS: usize = 10_000;

/// Verdicts by the token's SHA-256.
#[derive(Default)]
pub(super) struct Memory {
    verdicts: BTreeMap<Hash, (Instant, Result<Presenter, String>)>,
    /// The same, by when each is to be forgotten.
    ends: BTreeSet<(Instant, Hash)>,
}

impl Memory {
    /// Who presents a token, or why it is refused; none if it must be asked.
    pub(super) fn get(&self, key: &Hash, now: Instant) -> Option<&Result<Presenter, String>> {
        let (end, verdict) = self.verdicts.get(key)?;
        Some(verdict).filter(|_| now < *end)
    }

    /// Remembers a token that is believed, for as long as it is valid and not for long.
    pub(super) fn believe(&mut self, key: Hash, presenter: Presenter, left: Option<Duration>, now: Instant) {
        let time = left.map_or(BELIEVED_FOR, |left| left.min(BELIEVED_FOR));
        self.put(key, Ok(presenter), now + time, now);
    }

    /// Remembers one that is not, and why.
    pub(super) fn refuse(&mut self, key: Hash, why: String, now: Instant) {
        self.put(key, Err(why), now + REFUSED_FOR, now);
    }

    fn put(&mut self, key: Hash, verdict: Result<Presenter, String>, end: Instant, now: Instant) {
        if let Some((before, _)) = self.verdicts.insert(key, (end, verdict)) {
            self.ends.remove(&(before, key));
        }
        self.ends.insert((end, key));
        // Those that are over, and of too many the ones that soon will be: so bad tokens cannot drive out good ones.
        while let Some((end, key)) = self.ends.first().copied()
            && (end <= now || self.ends.len() > MAX_TOKENS)
        {
            self.ends.remove(&(end, key));
            self.verdicts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Hash {
        Hash::of(&number.to_be_bytes())
    }

    fn presenter() -> Presenter {
        Presenter {
            namespace: "shop".to_owned(),
            account: "checkout".to_owned(),
            pod: None,
        }
    }

    fn after(begun: Instant, ms: u64) -> Instant {
        begun + Duration::from_millis(ms)
    }

    #[test]
    fn a_verdict_is_remembered_for_a_while() {
        let begun = Instant::now();
        let mut memory = Memory::default();
        assert_eq!(memory.get(&key(1), begun), None);

        memory.believe(key(1), presenter(), None, begun);
        memory.believe(key(2), presenter(), Some(Duration::from_secs(3_600)), begun);
        memory.believe(key(3), presenter(), Some(Duration::from_secs(30)), begun);
        memory.believe(key(4), presenter(), Some(Duration::ZERO), begun);
        memory.refuse(key(5), "no".to_owned(), begun);
        for (number, ms) in [(1, 60_000), (2, 60_000), (3, 30_000), (5, 10_000)] {
            assert!(
                memory.get(&key(number), after(begun, ms - 1)).is_some(),
                "{number}"
            );
            assert!(memory.get(&key(number), after(begun, ms)).is_none(), "{number}");
        }
        assert_eq!(memory.get(&key(4), begun), None);
        assert_eq!(memory.get(&key(1), begun), Some(&Ok(presenter())));
        assert_eq!(memory.get(&key(5), begun), Some(&Err("no".to_owned())));
    }

    #[test]
    fn the_last_verdict_holds() {
        let begun = Instant::now();
        let mut memory = Memory::default();
        memory.refuse(key(1), "no".to_owned(), begun);
        memory.believe(key(1), presenter(), None, after(begun, 5_000));
        assert_eq!(memory.get(&key(1), after(begun, 11_000)), Some(&Ok(presenter())));
        memory.refuse(key(1), "gone".to_owned(), after(begun, 20_000));
        assert_eq!(
            memory.get(&key(1), after(begun, 20_000)),
            Some(&Err("gone".to_owned()))
        );
        assert_eq!((memory.verdicts.len(), memory.ends.len()), (1, 1));
        memory.refuse(key(2), "no".to_owned(), after(begun, 60_000));
        assert_eq!((memory.verdicts.len(), memory.ends.len()), (1, 1));
    }

    #[test]
    fn bad_tokens_drive_out_no_good_one() {
        let begun = Instant::now();
        let mut memory = Memory::default();
        memory.believe(key(0), presenter(), None, begun);
        for number in 1..=2 * MAX_TOKENS {
            memory.refuse(key(number), "no".to_owned(), begun);
        }
        assert_eq!(memory.verdicts.len(), MAX_TOKENS);
        assert_eq!(memory.ends.len(), MAX_TOKENS);
        assert_eq!(memory.get(&key(0), begun), Some(&Ok(presenter())));
    }
}
