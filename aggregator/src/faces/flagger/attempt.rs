//! Attempts: which rollout a Canary's hooks are about, when it is over, and what is remembered of a Canary beside that.
//!
//! Flagger's checksum names a revision and not an attempt: v2, v3 and v2 again send the same one twice. So a rollout's key
//! counts the attempts of a checksum:
//!
//! ```text
//! flagger/NAMESPACE/NAME/CHECKSUM/N            the N-th attempt
//! flagger/NAMESPACE/NAME/CHECKSUM/N/unknown    the same, while no agent says which version it is
//! ```
//!
//! Where that is too long for a key, one hash stands for NAMESPACE/NAME/CHECKSUM.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use coalmine_judge::{chain::Hash, record::Workload};
use coalmine_proto::names::MAX_NAME_BYTES;

use crate::book::Canary;

/// Who begins and ends attempts.
pub(super) const ACTOR: &str = "flagger";

/// The version of a canary that nobody has named yet. It is on trial all the same: the HOLD has its deadline.
pub(super) const UNKNOWN: &str = "unknown";

/// The longest that follows the beginning of a key.
const MAX_ENDING_BYTES: usize = "/18446744073709551615/unknown".len();

/// So long a canary's first traffic stays granted, so that a hook that is called again hears the same. Flagger's shortest
/// interval is 10 s: one grant opens one increase.
const GRANT_STANDS: Duration = Duration::from_secs(8);

/// Canaries that are remembered; the one that was silent for longest is forgotten.
const MAX_CANARIES: usize = 10_000;

/// A revision of a Canary: what the keys of its attempts have in common.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Revision(String);

impl Revision {
    pub(super) fn new(canary: &Workload, checksum: &str) -> Self {
        let name = format!("{}/{}/{checksum}", canary.namespace, canary.name);
        let plain = format!("{ACTOR}/{name}");
        if plain.len() + MAX_ENDING_BYTES <= MAX_NAME_BYTES {
            Self(plain)
        } else {
            Self(format!("{ACTOR}/{}", Hash::of(name.as_bytes())))
        }
    }

    /// The key of an attempt.
    pub(super) fn key(&self, number: u64, is_version_known: bool) -> String {
        let ending = if is_version_known { "" } else { "/unknown" };
        format!("{}/{number}{ending}", self.0)
    }

    /// Which attempt of this revision a key belongs to, if any.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        let ending = key.strip_prefix(&self.0)?.strip_prefix('/')?;
        ending.strip_suffix("/unknown").unwrap_or(ending).parse().ok()
    }

    /// The number of the attempt that comes after all of these.
    pub(super) fn next_number<'k>(&self, keys: impl Iterator<Item = &'k str>) -> u64 {
        let last = keys.filter_map(|key| self.number(key)).max();
        last.unwrap_or(0).saturating_add(1)
    }
}

/// Whether a key is that of an attempt.
pub(super) fn is_attempt(key: &str) -> bool {
    key.strip_prefix(ACTOR).is_some_and(|rest| rest.starts_with('/'))
}

/// The open rollout of a Canary.
#[derive(Debug, Clone, Copy)]
pub(super) struct Open<'a> {
    pub(super) key: &'a str,
    pub(super) version: &'a str,
    /// Whether it was begun here; what others began is theirs to end.
    pub(super) is_ours: bool,
    /// Whether it is rolled back, or a person has decided.
    pub(super) is_settled: bool,
}

/// What a hook that may begin an attempt says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) revision: &'a Revision,
    /// Whether a checksum says which revision it is; a gate that is asked by hand has none.
    pub(super) has_checksum: bool,
    /// The canary's version, where it is known.
    pub(super) version: Option<&'a str>,
}

/// What follows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The open rollout is meant.
    Take,
    /// The open rollout ends for this reason, and another begins: with this number if it is the same attempt, else with
    /// the next, since it is of another revision.
    Replace { reason: String, number: Option<u64> },
}

/// What follows from a hook that may begin an attempt, while a rollout is open.
pub(super) fn next(open: Open<'_>, asked: Asked<'_>) -> Next {
    if !open.is_ours {
        return Next::Take;
    }
    let replace = |reason: String, number| Next::Replace { reason, number };
    let Some(number) = asked.revision.number(open.key) else {
        return if asked.has_checksum {
            replace("Flagger tries a new revision".to_owned(), None)
        } else {
            Next::Take
        };
    };
    match asked.version {
        Some(version) if open.version == UNKNOWN && !open.is_settled => {
            let reason = format!("the canary's version is known now: {version}");
            replace(reason, Some(number))
        }
        _ => Next::Take,
    }
}

/// The version of the canary's agents, if they agree.
pub(super) fn only_version(canaries: &[Canary]) -> Option<&str> {
    let mut versions = canaries
        .iter()
        .filter(|canary| canary.connected)
        .map(|canary| canary.version.as_str());
    let first = versions.next()?;
    (first != UNKNOWN && versions.all(|version| version == first)).then_some(first)
}

/// The agents of a version that are connected.
fn of_version<'c>(canaries: &'c [Canary], version: &'c str) -> impl Iterator<Item = &'c Canary> {
    canaries
        .iter()
        .filter(move |canary| canary.connected && canary.version == version)
}

/// How many agents of a version are connected, if there are some.
pub(super) fn connected(canaries: &[Canary], version: &str) -> Option<u64> {
    let count = u64::try_from(of_version(canaries, version).count()).ok()?;
    (count > 0).then_some(count)
}

/// The same, if none of them has counted a request.
pub(super) fn untouched(canaries: &[Canary], version: &str) -> Option<u64> {
    let has_none = of_version(canaries, version).all(|agent| agent.requests == 0);
    connected(canaries, version).filter(|_| has_none)
}

/// What is remembered of Canaries while the process lives. Rollouts survive it, this does not need to.
#[derive(Debug, Default)]
pub struct Attempts(Mutex<Memories>);

#[derive(Debug, Default)]
struct Memories {
    canaries: BTreeMap<Workload, Memory>,
    uses: u64,
}

#[derive(Debug, Default)]
struct Memory {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The rollout of which a hook has last shown whether traffic is led to the canary, and whether none was.
    at_zero: Option<(String, bool)>,
    /// The rollout that was granted its first traffic, and when.
    granted: Option<(String, Instant)>,
    /// The last use, by number.
    used: u64,
}

/// What became of a rollout's first traffic in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grant {
    /// Nothing yet.
    None,
    /// It was granted just now.
    Stands,
    /// It was granted, and that is over.
    Over,
}

impl Memories {
    fn of(&mut self, canary: &Workload) -> &mut Memory {
        if self.canaries.len() >= MAX_CANARIES && !self.canaries.contains_key(canary) {
            let oldest = self.canaries.iter().min_by_key(|(_, memory)| memory.used);
            if let Some(oldest) = oldest.map(|(oldest, _)| oldest.clone()) {
                self.canaries.remove(&oldest);
            }
        }
        self.uses = self.uses.saturating_add(1);
        let memory = self.canaries.entry(canary.clone()).or_default();
        memory.used = self.uses;
        memory
    }
}

impl Attempts {
    fn locked(&self) -> MutexGuard<'_, Memories> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever begins or ends a Canary's attempt holds this meanwhile.
    pub(super) fn turn(&self, canary: &Workload) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(&self.locked().of(canary).turn)
    }

    /// Notes what a hook shows: Flagger calls `pre-rollout` only while it leads no traffic to the canary, in the same tick
    /// before it asks for the first increase, and `rollout` only after that. Called again, `pre-rollout` shows that a grant
    /// was of no use.
    pub(super) fn shows(&self, canary: &Workload, rollout: &str, is_at_zero: bool) {
        let mut memories = self.locked();
        let memory = memories.of(canary);
        memory.at_zero = Some((rollout.to_owned(), is_at_zero));
        if is_at_zero {
            memory.granted = None;
        }
    }

    /// Whether no traffic is led to the canary yet; none where no hook has shown it.
    pub(super) fn is_at_zero(&self, canary: &Workload, rollout: &str) -> Option<bool> {
        let memories = self.locked();
        let (of, is_at_zero) = memories.canaries.get(canary)?.at_zero.as_ref()?;
        (of == rollout).then_some(*is_at_zero)
    }

    /// Notes that a rollout was granted its first traffic.
    pub(super) fn grant(&self, canary: &Workload, rollout: &str, now: Instant) {
        self.locked().of(canary).granted = Some((rollout.to_owned(), now));
    }

    /// What became of that.
    pub(super) fn granted(&self, canary: &Workload, rollout: &str, now: Instant) -> Grant {
        let memories = self.locked();
        let granted = memories
            .canaries
            .get(canary)
            .and_then(|memory| memory.granted.as_ref());
        match granted {
            Some((of, at)) if of == rollout => {
                if now.saturating_duration_since(*at) < GRANT_STANDS {
                    Grant::Stands
                } else {
                    Grant::Over
                }
            }
            _ => Grant::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use coalmine_proto::names::check_name;

    use super::*;

    fn canary(name: &str) -> Workload {
        Workload {
            kind: "Canary".to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_key_names_revision_and_attempt() {
        let revision = Revision::new(&canary("checkout"), "7f9c");
        assert_eq!(revision.key(1, true), "flagger/shop/checkout/7f9c/1");
        assert_eq!(revision.key(2, false), "flagger/shop/checkout/7f9c/2/unknown");
        let long = Revision::new(&canary(&"x".repeat(253)), &"c".repeat(64));
        for revision in [&revision, &long, &Revision::new(&canary("checkout"), "")] {
            for is_known in [true, false] {
                let key = revision.key(u64::MAX, is_known);
                assert_eq!(check_name(key.as_bytes()), Ok(key.as_str()));
                assert_eq!(revision.number(&key), Some(u64::MAX));
                assert!(is_attempt(&key));
            }
        }
        for other in [
            "flagger/shop/checkout/7f9c",
            "flagger/shop/checkout/7f9c/",
            "flagger/shop/checkout/7f9c/one",
            "flagger/shop/checkout/7f9c0/1",
            "flagger/shop/cart/7f9c/1",
            "checkout-v2-1",
        ] {
            assert_eq!(revision.number(other), None, "{other}");
        }
        assert!(!is_attempt("flaggers/1") && !is_attempt("flagger"));
    }

    #[test]
    fn attempts_are_counted() {
        let revision = Revision::new(&canary("checkout"), "a");
        let keys = [
            "flagger/shop/checkout/a/1",
            "flagger/shop/checkout/b/7",
            "flagger/shop/checkout/a/3/unknown",
            "by hand",
        ];
        assert_eq!(revision.next_number([].into_iter()), 1);
        assert_eq!(revision.next_number(keys.into_iter()), 4);
    }

    #[test]
    fn what_follows_from_a_hook() {
        let (this, before) = (
            Revision::new(&canary("checkout"), "a"),
            Revision::new(&canary("checkout"), "b"),
        );
        let known = this.key(2, true);
        let unknown = this.key(2, false);
        let older = before.key(1, true);
        let replaces = |reason: &str, number| Next::Replace {
            reason: reason.to_owned(),
            number,
        };
        let revision = "Flagger tries a new revision";
        let found = "the canary's version is known now: v2";
        // The open rollout: key, version, ours, settled. Then whether there is a checksum, and the version that is known.
        for ((key, version, is_ours, is_settled), has_checksum, known_version, expected) in [
            ((&known, "v2", true, false), true, None, Next::Take),
            ((&known, "v2", true, false), true, Some("v3"), Next::Take),
            // Flagger has not heard yet that it is to go back.
            ((&known, "v2", true, true), true, None, Next::Take),
            ((&older, "v1", true, true), true, None, replaces(revision, None)),
            ((&older, "v1", true, false), true, None, replaces(revision, None)),
            // Whoever asks by hand does not say that it is another revision.
            ((&older, "v1", true, false), false, Some("v2"), Next::Take),
            ((&unknown, UNKNOWN, true, false), true, None, Next::Take),
            (
                (&unknown, UNKNOWN, true, false),
                true,
                Some("v2"),
                replaces(found, Some(2)),
            ),
            // What was decided is not undone.
            ((&unknown, UNKNOWN, true, true), true, Some("v2"), Next::Take),
            // What others have begun is theirs.
            ((&older, "v1", false, false), true, Some("v2"), Next::Take),
            ((&unknown, UNKNOWN, false, false), true, Some("v2"), Next::Take),
        ] {
            let open = Open {
                key,
                version,
                is_ours,
                is_settled,
            };
            let asked = Asked {
                revision: &this,
                has_checksum,
                version: known_version,
            };
            assert_eq!(next(open, asked), expected, "{open:?} {asked:?}");
        }
    }

    fn agent(version: &str, connected: bool, requests: u64) -> Canary {
        Canary {
            instance: String::new(),
            version: version.to_owned(),
            connected,
            requests,
        }
    }

    #[test]
    fn agents_say_which_version_it_is_and_whether_it_had_traffic() {
        let v2 = || agent("v2", true, 0);
        for (agents, version, there, without_traffic) in [
            (vec![], None, None, None),
            (vec![agent("v2", false, 0)], None, None, None),
            (vec![v2()], Some("v2"), Some(1), Some(1)),
            (
                vec![v2(), v2(), agent("v3", false, 5)],
                Some("v2"),
                Some(2),
                Some(2),
            ),
            (vec![v2(), agent("v3", true, 5)], None, Some(1), Some(1)),
            (vec![v2(), agent("v2", true, 1)], Some("v2"), Some(2), None),
            (vec![agent(UNKNOWN, true, 0)], None, None, None),
        ] {
            assert_eq!(only_version(&agents), version, "{agents:?}");
            assert_eq!(connected(&agents, "v2"), there, "{agents:?}");
            assert_eq!(untouched(&agents, "v2"), without_traffic, "{agents:?}");
        }
    }

    #[test]
    fn a_grant_stands_for_a_while_and_for_one_rollout() {
        let (attempts, canary, now) = (Attempts::default(), canary("checkout"), Instant::now());
        assert_eq!(attempts.granted(&canary, "r1", now), Grant::None);
        attempts.grant(&canary, "r1", now);
        assert_eq!(
            attempts.granted(&canary, "r1", now + Duration::from_secs(7)),
            Grant::Stands
        );
        assert_eq!(attempts.granted(&canary, "r1", now + GRANT_STANDS), Grant::Over);
        assert_eq!(attempts.granted(&canary, "r2", now), Grant::None);
    }

    #[test]
    fn hooks_show_whether_traffic_is_led_to_a_canary() {
        let (attempts, canary, now) = (Attempts::default(), canary("checkout"), Instant::now());
        assert_eq!(attempts.is_at_zero(&canary, "r1"), None);
        attempts.grant(&canary, "r1", now);
        // Flagger comes again as it came at first: the grant was of no use to it.
        attempts.shows(&canary, "r1", true);
        assert_eq!(attempts.is_at_zero(&canary, "r1"), Some(true));
        assert_eq!(attempts.granted(&canary, "r1", now), Grant::None);
        attempts.grant(&canary, "r1", now);
        attempts.shows(&canary, "r1", false);
        assert_eq!(attempts.is_at_zero(&canary, "r1"), Some(false));
        assert_eq!(attempts.granted(&canary, "r1", now), Grant::Stands);
        assert_eq!(attempts.is_at_zero(&canary, "r2"), None);
    }

    #[test]
    fn canaries_that_are_silent_for_longest_are_forgotten() {
        let attempts = Attempts::default();
        let shows = |name: &str| attempts.shows(&canary(name), "r", true);
        for number in 0..MAX_CANARIES {
            shows(&format!("c{number}"));
        }
        shows("c0");
        shows("one-more");
        let knows = |name: &str| attempts.is_at_zero(&canary(name), "r").is_some();
        assert!(knows("c0") && !knows("c1") && knows("c2") && knows("one-more"));
        assert_eq!(attempts.locked().canaries.len(), MAX_CANARIES);
    }
}
