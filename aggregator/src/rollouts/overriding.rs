//! What somebody has decided in the judge's place.

use coalmine_judge::{record::Override, v1::Verdict};

use super::view::View;
use crate::clock;

/// A change of who decides, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(super) change: Override,
    /// The hash of its record, once it is on record.
    pub(super) hash: Option<String>,
    /// When it took effect.
    pub(super) at_ms: u64,
}

impl Changed {
    /// Takes effect now.
    pub(super) fn now(change: &Override, hash: Option<String>) -> Self {
        Self {
            change: change.clone(),
            hash,
            at_ms: clock::now_ms(),
        }
    }

    pub(super) fn approves(&self) -> bool {
        self.hash.is_some() && self.change.verdict.as_deref() == Some(Verdict::Approve.as_str())
    }
}

/// Who decides.
#[derive(Debug, Clone, Default)]
pub(super) struct Overriding {
    /// The last change, as long as it counts: one that gives the decision back, until the judge decides.
    last: Option<Changed>,
    /// Whether somebody has approved at any time.
    approved: bool,
    /// The time in the name of the last change.
    named_ms: u64,
}

impl Overriding {
    pub(super) fn restored(last: Option<Changed>) -> Self {
        Self {
            last,
            ..Self::default()
        }
    }

    /// A name for the next change. With a number, one that was never recorded and was acted on would give its name away.
    pub(super) fn name(&mut self, rollout: &str) -> String {
        self.named_ms = clock::now_ms().max(self.named_ms.saturating_add(1));
        override_id(rollout, self.named_ms)
    }

    /// What is shown of a view that is the judge's.
    pub(super) fn shown(&self, view: &View) -> View {
        let mut view = view.clone();
        view.approved |= self.approved;
        match &self.last {
            Some(changed) => view.with(changed),
            None => view,
        }
    }

    pub(super) fn take(&mut self, changed: Changed) {
        self.approved |= changed.approves();
        self.last = Some(changed);
    }

    /// The judge has decided: what was given back is settled.
    pub(super) fn judged(&mut self) {
        self.last = self.last.take().filter(|last| last.change.verdict.is_some());
    }
}

/// The name of a change.
pub(super) fn override_id(rollout: &str, at_ms: u64) -> String {
    format!("{rollout}{OVERRIDE}{at_ms}")
}

/// Between the rollout and the time, in the name of a change.
const OVERRIDE: &str = "-override-";

/// Whether a decision is somebody's, and not the judge's.
pub(crate) fn is_override(rollout: &str, decision: &str) -> bool {
    let rest = decision.strip_prefix(rollout);
    rest.is_some_and(|rest| rest.starts_with(OVERRIDE))
}

#[cfg(test)]
mod tests {
    use coalmine_judge::{chain::Hash, record::RolloutStart};

    use super::*;
    use crate::rollouts::State;

    fn judges(verdict: Verdict) -> View {
        let mut view = View::new(&RolloutStart {
            rollout: "r".to_owned(),
            key: "r".to_owned(),
            service: "checkout".to_owned(),
            canary_version: "v2".to_owned(),
            baseline_version: None,
            policy: Hash::ZERO,
            history: None,
            judge: String::new(),
            max_windows: 1,
            window_ms: 1_000,
            start_ms: 1_000,
            actor: String::new(),
            workload: None,
        });
        view.verdict = verdict.as_str().to_owned();
        view.decision_id = Some("r-1".to_owned());
        view.reason = "because".to_owned();
        if verdict == Verdict::Rollback {
            view.state = State::Halted;
        }
        view
    }

    fn changed(verdict: Option<Verdict>, id: &str, hash: Option<&str>) -> Changed {
        Changed {
            change: Override {
                id: id.to_owned(),
                rollout: "r".to_owned(),
                verdict: verdict.map(|verdict| verdict.as_str().to_owned()),
                judged: "HOLD".to_owned(),
                decision: None,
                actor: "alice".to_owned(),
                reason: "I say so".to_owned(),
            },
            hash: hash.map(str::to_owned),
            at_ms: 5_000,
        }
    }

    #[test]
    fn what_was_taken_back_is_not_shown_whatever_became_of_the_judge() {
        for judged in Verdict::ALL {
            for decided in Verdict::ALL {
                for is_broken in [false, true] {
                    let mut shown = judges(judged).with(&changed(Some(decided), "r-o-1", Some("hash")));
                    if is_broken {
                        shown.broken("it has no judge");
                    }
                    let case = format!("{judged} {decided} {is_broken}");
                    // Harm that was found stays found; all else is a HOLD without a judge.
                    let left = match (is_broken, judged) {
                        (true, Verdict::Approve | Verdict::Hold) => Verdict::Hold,
                        _ => judged,
                    };
                    assert_eq!(shown.standing(), decided, "{case}");
                    assert_eq!(shown.decision_id.as_deref(), Some("r-o-1"), "{case}");
                    assert_eq!(shown.decided_ms, 5_000, "{case}");
                    let overridden = shown.overridden.clone().unwrap();
                    assert_eq!(overridden.judged, left.as_str(), "{case}");
                    assert!(
                        shown
                            .reason
                            .starts_with("alice has decided: I say so (the judge says"),
                        "{case}"
                    );

                    let given_back = shown.judges().with(&changed(None, "r-o-2", Some("hash")));
                    assert_eq!(given_back.standing(), left, "{case}");
                    assert_eq!(given_back.overridden, None, "{case}");
                    assert_eq!(given_back.decision_id.as_deref(), Some("r-o-2"), "{case}");
                }
            }
        }
    }

    #[test]
    fn a_decision_counts_until_it_is_given_back_and_the_judge_has_decided() {
        let view = judges(Verdict::Hold);
        let mut overriding = Overriding::default();
        assert_eq!(overriding.shown(&view).decision_id.as_deref(), Some("r-1"));
        overriding.take(changed(Some(Verdict::Approve), "r-o-1", None));
        let shown = overriding.shown(&view);
        assert!(!shown.recorded && !shown.approved, "it is not on record");
        overriding.take(changed(Some(Verdict::Approve), "r-o-1", Some("hash")));
        overriding.judged();
        assert_eq!(overriding.shown(&view).standing(), Verdict::Approve);
        overriding.take(changed(None, "r-o-2", Some("hash")));
        assert_eq!(overriding.shown(&view).decision_id.as_deref(), Some("r-o-2"));
        overriding.judged();
        let shown = overriding.shown(&view);
        assert_eq!(shown.decision_id.as_deref(), Some("r-1"));
        assert!(shown.approved, "it was approved once");
    }

    #[test]
    fn names_are_of_their_time_and_no_two_are_the_same() {
        let mut overriding = Overriding::default();
        let names: Vec<_> = (0..100).map(|_| overriding.name("r")).collect();
        assert!(
            names.is_sorted() && names.windows(2).all(|two| two[0] != two[1]),
            "{names:?}"
        );
    }
}
