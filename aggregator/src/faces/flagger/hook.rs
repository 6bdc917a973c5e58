//! The hooks that Flagger calls, and what each verdict answers to each of them.
//!
//! ```text
//!                            APPROVE   HOLD   ROLLBACK
//! pre-rollout, rollout       200       200    403        a refusal counts as a failed check, so HOLD is none
//! confirm-traffic-increase   200       403    403        a refusal keeps the weight
//! confirm-promotion          200       403    403        a refusal waits
//! rollback                   403       403    200        200 goes back at once
//! ```
//!
//! confirm-rollout asks before a canary is tried, so no verdict is about it: it is 403 while a person's HOLD is in force.

use coalmine_judge::v1::Verdict;

/// A hook, by its type in a Canary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    ConfirmRollout,
    PreRollout,
    Rollout,
    ConfirmTrafficIncrease,
    ConfirmPromotion,
    PostRollout,
    Rollback,
    Event,
}

/// The phases in which a canary is judged.
const JUDGED: [&str; 2] = ["Progressing", "WaitingPromotion"];

/// The phases in which no canary is tried, and Flagger asks whether one may be.
const BEFORE: [&str; 4] = ["Initialized", "Waiting", "Succeeded", "Failed"];

impl Hook {
    const ALL: [Self; 8] = [
        Self::ConfirmRollout,
        Self::PreRollout,
        Self::Rollout,
        Self::ConfirmTrafficIncrease,
        Self::ConfirmPromotion,
        Self::PostRollout,
        Self::Rollback,
        Self::Event,
    ];

    /// The type as it is written.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::ConfirmRollout => "confirm-rollout",
            Self::PreRollout => "pre-rollout",
            Self::Rollout => "rollout",
            Self::ConfirmTrafficIncrease => "confirm-traffic-increase",
            Self::ConfirmPromotion => "confirm-promotion",
            Self::PostRollout => "post-rollout",
            Self::Rollback => "rollback",
            Self::Event => "event",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.as_str() == name)
    }

    /// What the load tester's gate is asked as: Flagger's users have it as either hook, and both must be able to open.
    pub(super) fn of_gate(phase: &str) -> Self {
        if BEFORE.contains(&phase) {
            Self::ConfirmRollout
        } else {
            Self::ConfirmPromotion
        }
    }

    /// All of them, for whoever asked for another.
    pub(super) fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    /// Whether Flagger is to take the verdict for a success of the hook.
    pub(super) const fn passes(self, verdict: Verdict) -> bool {
        match self {
            Self::PreRollout | Self::Rollout => !matches!(verdict, Verdict::Rollback),
            Self::ConfirmTrafficIncrease | Self::ConfirmPromotion => matches!(verdict, Verdict::Approve),
            Self::Rollback => matches!(verdict, Verdict::Rollback),
            // They are no questions about the canary.
            Self::ConfirmRollout | Self::PostRollout | Self::Event => true,
        }
    }

    /// Whether an attempt may begin with it: Flagger tries a canary then, and the checksum is that canary's.
    pub(super) fn begins(self, phase: &str) -> bool {
        match self {
            Self::PreRollout => true,
            Self::Rollout | Self::ConfirmTrafficIncrease | Self::ConfirmPromotion | Self::Rollback => {
                JUDGED.contains(&phase)
            }
            // The checksum is still that of the revision before, or the attempt is over.
            Self::ConfirmRollout | Self::PostRollout | Self::Event => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verdict_has_its_answer_to_each_hook() {
        use Hook::{ConfirmPromotion, ConfirmTrafficIncrease, PreRollout, Rollback, Rollout};
        for (hook, expected) in [
            (PreRollout, [true, true, false]),
            (Rollout, [true, true, false]),
            (ConfirmTrafficIncrease, [true, false, false]),
            (ConfirmPromotion, [true, false, false]),
            (Rollback, [false, false, true]),
        ] {
            let found = Verdict::ALL.map(|verdict| hook.passes(verdict));
            assert_eq!(found, expected, "{hook:?}: APPROVE, HOLD, ROLLBACK");
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for hook in Hook::ALL {
            assert_eq!(Hook::parse(hook.as_str()), Some(hook));
            assert!(Hook::names().contains(hook.as_str()));
        }
        for other in ["", "Rollout", "roll", "confirm_rollout"] {
            assert_eq!(Hook::parse(other), None);
        }
    }

    #[test]
    fn a_gate_is_asked_before_a_canary_is_tried_and_before_it_is_promoted() {
        for (phase, expected) in [
            ("Initialized", Hook::ConfirmRollout),
            ("Waiting", Hook::ConfirmRollout),
            ("Succeeded", Hook::ConfirmRollout),
            ("Failed", Hook::ConfirmRollout),
            ("Progressing", Hook::ConfirmPromotion),
            ("WaitingPromotion", Hook::ConfirmPromotion),
            ("Promoting", Hook::ConfirmPromotion),
            ("waiting", Hook::ConfirmPromotion),
            ("", Hook::ConfirmPromotion),
        ] {
            assert_eq!(Hook::of_gate(phase), expected, "{phase:?}");
        }
    }

    #[test]
    fn an_attempt_begins_while_a_canary_is_tried() {
        for (hook, phase, expected) in [
            (Hook::PreRollout, "", true),
            (Hook::Rollback, "Progressing", true),
            (Hook::Rollback, "WaitingPromotion", true),
            (Hook::Rollback, "Waiting", false),
            (Hook::Rollback, "Promoting", false),
            (Hook::Rollout, "Progressing", true),
            (Hook::ConfirmTrafficIncrease, "Progressing", true),
            (Hook::ConfirmPromotion, "Progressing", true),
            (Hook::ConfirmPromotion, "progressing", false),
            (Hook::ConfirmRollout, "Progressing", false),
            (Hook::PostRollout, "Progressing", false),
            (Hook::Event, "Progressing", false),
        ] {
            assert_eq!(hook.begins(phase), expected, "{hook:?} in {phase:?}");
        }
    }
}
