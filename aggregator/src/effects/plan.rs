//! What is to be done next on a target: a function of the last decision and of what is on record. Without I/O.

use std::{collections::BTreeSet, time::Duration};

use coalmine_judge::{
    record::{Actuation, Workload},
    v1::Verdict,
};

use crate::rollouts::{View, is_override};

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// So often a webhook is tried again: after 1, 2, 4, 8, 16 and 32 seconds, and then each minute for an hour.
const WEBHOOK_RETRIES: u32 = 6 + 60;

/// How far apart a HOLD is told when nothing but its reason changes: its numbers do so by the second.
const NEWS_APART: Duration = Duration::from_secs(10 * 60);

/// After so long a HOLD that is the same is told again: an API server forgets an Event after an hour.
const LASTS: Duration = Duration::from_secs(50 * 60);

/// Who stops a rollout in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Halt {
    /// Argo Rollouts: the Rollout is aborted.
    Argo,
    /// Flagger: the Canary is told why; Flagger asks its gates by itself.
    Flagger,
    /// The Deployment is paused, and its former template is put back.
    Deployment,
}

/// Where a verdict acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Argo,
    Flagger,
    Deployment,
    Webhook,
}

impl Target {
    /// The name in metrics.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Argo => "argo",
            Self::Flagger => "flagger",
            Self::Deployment => "deployment",
            Self::Webhook => "webhook",
        }
    }

    /// Whether a HOLD that goes on is told again: nothing else is done about one there, and an Event does not last.
    pub(super) const fn is_reminded(self) -> bool {
        matches!(self, Self::Argo | Self::Flagger)
    }

    /// The name in records.
    pub(super) fn name(self, workload: Option<&Workload>) -> String {
        match (self, workload) {
            (Self::Webhook, _) | (_, None) => self.as_str().to_owned(),
            (_, Some(workload)) => format!("{} {}/{}", workload.kind, workload.namespace, workload.name),
        }
    }
}

/// The targets of a rollout: what is enabled and fits the kind of its workload, and the webhook for all.
pub(super) fn targets(halts: &BTreeSet<Halt>, has_webhook: bool, workload: Option<&Workload>) -> Vec<Target> {
    let halt = workload.and_then(|workload| match workload.kind.as_str() {
        "Rollout" => Some((Halt::Argo, Target::Argo)),
        "Canary" => Some((Halt::Flagger, Target::Flagger)),
        "Deployment" => Some((Halt::Deployment, Target::Deployment)),
        _ => None,
    });
    let halt = halt
        .filter(|(halt, _)| halts.contains(halt))
        .map(|(_, target)| target);
    halt.into_iter()
        .chain(has_webhook.then_some(Target::Webhook))
        .collect()
}

/// How far an act has come, as records say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Begun,
    Done,
    Failed,
}

impl Stage {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// The word for lifting the pause of a hold at the end of a rollout, in records and metrics.
pub(super) const RELEASE: &str = "release";

/// The word for acting on a verdict, in records and metrics.
pub(super) const fn act(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Approve => "approve",
        Verdict::Hold => "hold",
        Verdict::Rollback => "rollback",
    }
}

/// A verdict to act on, and the decision that it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) decision: String,
    pub(super) verdict: Verdict,
}

impl Step {
    /// What a rollout stands at, if anything may follow from it: nothing does before the first decision, nor from an
    /// approval that is not on record.
    pub(super) fn of(view: &View) -> Option<Self> {
        let verdict = Verdict::ALL
            .into_iter()
            .find(|verdict| verdict.as_str() == view.verdict)?;
        if verdict == Verdict::Approve && !view.recorded {
            return None;
        }
        Some(Self {
            decision: view.decision_id.clone()?,
            verdict,
        })
    }

    /// Whether a record is about this step.
    pub(super) fn is_told_by(&self, record: &Actuation) -> bool {
        record.decision == self.decision && record.act == act(self.verdict)
    }
}

/// What was told of a HOLD, or would be now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// The decision, if it is a person's that is in force.
    pub(super) order: Option<String>,
    pub(super) reason: String,
}

impl Told {
    /// What is told of a step, while this is shown.
    pub(super) fn of(step: &Step, reason: &str, view: &View) -> Self {
        let is_ordered = view.overridden.is_some() && view.decision_id.as_ref() == Some(&step.decision);
        Self {
            order: is_ordered.then(|| step.decision.clone()),
            reason: reason.to_owned(),
        }
    }

    /// For how long this is enough where `standing` would be told now: not at all once a person's HOLD begins or ends.
    pub(super) fn lasts(&self, standing: &Self) -> Duration {
        if self.order != standing.order {
            Duration::ZERO
        } else if self.reason != standing.reason {
            NEWS_APART
        } else {
            LASTS
        }
    }
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing.
    Rest,
    /// A step is to be taken, or taken to its end.
    Act {
        step: Step,
        /// Whether it is on record that it has begun.
        begun: bool,
        /// What was begun before and is not to be ended any more.
        dropped: Option<Step>,
    },
}

/// Says what follows on one target, from what the rollout stands at and what is on record about the target, in order.
///
/// As long as the verdict stays, a step that has begun is taken to its end under the decision that it began with. An
/// approval that was held back for a while does not follow after all; a hold follows also from a decision that was an
/// approval, and a rollback is never held up by what was done before. After a rollback nothing else follows: the log may
/// have lost its decision, and what was done stays done; but what a person has decided is told and done all the same.
pub(super) fn next(standing: Option<&Step>, is_ordered: bool, records: &[Actuation]) -> Next {
    let Some(standing) = standing else {
        return Next::Rest;
    };
    let is_done = |record: &Actuation| record.stage == Stage::Done.as_str() && standing.is_told_by(record);
    // The judge does not take a rollback back; a person may.
    let is_rollback = |record: &Actuation| {
        record.act == act(Verdict::Rollback) && !is_override(&record.rollout, &record.decision)
    };
    let may_follow = standing.verdict == Verdict::Rollback || is_ordered;
    let is_rolled_back = !may_follow && records.iter().any(is_rollback);
    if is_rolled_back || records.iter().any(is_done) {
        return Next::Rest;
    }
    let last = last_step(records);
    let unfinished = match last {
        Some((step, stage)) if step.verdict == standing.verdict => {
            return if stage == Stage::Done {
                Next::Rest
            } else {
                Next::Act {
                    step,
                    begun: true,
                    dropped: None,
                }
            };
        }
        Some((step, stage)) => (stage != Stage::Done).then_some(step),
        None => None,
    };
    let has_acted = |record: &Actuation| match standing.verdict {
        Verdict::Approve => record.decision == standing.decision,
        Verdict::Hold => standing.is_told_by(record),
        Verdict::Rollback => false,
    };
    if records.iter().any(has_acted) {
        return Next::Rest;
    }
    Next::Act {
        step: standing.clone(),
        begun: false,
        dropped: unfinished,
    }
}

/// By what others know a step again: its decision, and the verdict too if the decision was acted on before as another one.
pub(super) fn key(step: &Step, records: &[Actuation]) -> String {
    let mut before = records.iter().take_while(|record| !step.is_told_by(record));
    if before.any(|record| record.decision == step.decision) {
        format!("{}/{}", step.decision, act(step.verdict))
    } else {
        step.decision.clone()
    }
}

/// The hold that a rollout is left with, if it is: nothing was done since that ends it. What was to be rolled back is not
/// to go on, whether that was done or not.
pub(super) fn held<'r>(records: impl IntoIterator<Item = &'r Actuation>) -> Option<Step> {
    let mut held = None;
    for record in records {
        let is_done = record.stage == Stage::Done.as_str();
        let is_hold = record.act == act(Verdict::Hold);
        // Its record says what a person has to do.
        let is_given_up = record.act == RELEASE && record.stage == Stage::Failed.as_str();
        if is_hold && record.stage == Stage::Begun.as_str() {
            held = Some(Step {
                decision: record.decision.clone(),
                verdict: Verdict::Hold,
            });
        } else if record.act == act(Verdict::Rollback) || (is_done && !is_hold) || is_given_up {
            held = None;
        }
    }
    held
}

/// Whether a step is a HOLD that goes on: one was done on the target, and nothing was begun there since.
pub(super) fn goes_on(step: &Step, records: &[Actuation]) -> bool {
    let is_told = |(last, stage): (Step, Stage)| last.verdict == Verdict::Hold && stage == Stage::Done;
    step.verdict == Verdict::Hold && last_step(records).is_some_and(is_told)
}

/// The step that was begun last, and how far it has come.
fn last_step(records: &[Actuation]) -> Option<(Step, Stage)> {
    let begun = |record: &&Actuation| record.stage == Stage::Begun.as_str();
    let step = records.iter().rev().filter(begun).find_map(|record| {
        let mut verdicts = Verdict::ALL.into_iter();
        Some(Step {
            decision: record.decision.clone(),
            verdict: verdicts.find(|verdict| act(*verdict) == record.act)?,
        })
    })?;
    let is_done = |record: &Actuation| record.stage == Stage::Done.as_str() && step.is_told_by(record);
    let stage = if records.iter().any(is_done) {
        Stage::Done
    } else {
        Stage::Begun
    };
    Some((step, stage))
}

/// Whether what went wrong may go right later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Somebody else has changed the object meanwhile.
    AtOnce,
    /// It may pass.
    Soon,
    /// Somebody must do something first.
    Slowly,
    /// It will not.
    Never,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) text: String,
    pub(super) again: Again,
}

impl Problem {
    pub(super) fn new(text: impl Into<String>, again: Again) -> Self {
        let text = text.into();
        Self { text, again }
    }
}

/// How long to wait after so many tries that failed; none if that was the last.
pub(super) fn pause(target: Target, again: Again, tries: u32) -> Option<Duration> {
    match again {
        Again::Never => None,
        _ if target == Target::Webhook && tries > WEBHOOK_RETRIES => None,
        Again::Slowly => Some(LONGEST_PAUSE),
        // At once was not soon enough.
        Again::Soon | Again::AtOnce => {
            let doubled = Duration::from_secs(1_u64 << tries.saturating_sub(1).min(6));
            Some(doubled.min(LONGEST_PAUSE))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(decision: &str, verdict: Verdict) -> Step {
        Step {
            decision: decision.to_owned(),
            verdict,
        }
    }

    fn record(decision: &str, verdict: Verdict, stage: Stage) -> Actuation {
        Actuation {
            rollout: "r".to_owned(),
            decision: decision.to_owned(),
            target: "webhook".to_owned(),
            act: act(verdict).to_owned(),
            stage: stage.as_str().to_owned(),
            detail: String::new(),
        }
    }

    fn acts(step: Step, begun: bool, dropped: Option<Step>) -> Next {
        Next::Act { step, begun, dropped }
    }

    #[test]
    fn what_is_enabled_and_fits_is_a_target() {
        let all = BTreeSet::from([Halt::Argo, Halt::Flagger, Halt::Deployment]);
        let of = |kind: &str| Workload {
            kind: kind.to_owned(),
            namespace: "shop".to_owned(),
            name: "checkout".to_owned(),
        };
        for (halts, webhook, kind, expected) in [
            (&all, false, Some("Rollout"), vec![Target::Argo]),
            (&all, true, Some("Canary"), vec![Target::Flagger, Target::Webhook]),
            (&all, false, Some("Deployment"), vec![Target::Deployment]),
            (&all, false, Some("StatefulSet"), vec![]),
            (&all, true, None, vec![Target::Webhook]),
            (&BTreeSet::from([Halt::Argo]), false, Some("Deployment"), vec![]),
        ] {
            let workload = kind.map(of);
            assert_eq!(targets(halts, webhook, workload.as_ref()), expected, "{kind:?}");
        }
        assert_eq!(Target::Argo.name(Some(&of("Rollout"))), "Rollout shop/checkout");
        assert_eq!(Target::Webhook.name(Some(&of("Rollout"))), "webhook");
    }

    #[test]
    fn a_verdict_is_acted_on_when_it_changes() {
        use Stage::{Begun, Done, Failed};
        use Verdict::{Approve, Hold, Rollback};
        let now = |decision, verdict| Some(step(decision, verdict));
        for (standing, records, expected) in [
            (None, vec![], Next::Rest),
            (now("1", Hold), vec![], acts(step("1", Hold), false, None)),
            // The same verdict again.
            (
                now("2", Hold),
                vec![record("1", Hold, Begun), record("1", Hold, Done)],
                Next::Rest,
            ),
            // Another one.
            (
                now("3", Rollback),
                vec![record("1", Hold, Begun), record("1", Hold, Done)],
                acts(step("3", Rollback), false, None),
            ),
            // A restart after the beginning, and one after a failure: on with the decision that it began with.
            (
                now("2", Hold),
                vec![record("1", Hold, Begun)],
                acts(step("1", Hold), true, None),
            ),
            (
                now("2", Hold),
                vec![record("1", Hold, Begun), record("1", Hold, Failed)],
                acts(step("1", Hold), true, None),
            ),
            // It succeeded after it had failed.
            (
                now("2", Hold),
                vec![
                    record("1", Hold, Begun),
                    record("1", Hold, Failed),
                    record("1", Hold, Done),
                ],
                Next::Rest,
            ),
            // Overtaken before it was done.
            (
                now("2", Approve),
                vec![record("1", Hold, Begun), record("1", Hold, Failed)],
                acts(step("2", Approve), false, Some(step("1", Hold))),
            ),
            // An approval that was held back for a while is not acted on twice, ...
            (now("1", Approve), vec![record("1", Hold, Begun)], Next::Rest),
            // ... one that is a hold now, since the rollout cannot be judged any more, is, ...
            (
                now("1", Hold),
                vec![record("1", Approve, Begun), record("1", Approve, Done)],
                acts(step("1", Hold), false, None),
            ),
            (
                now("1", Hold),
                vec![record("1", Hold, Begun), record("2", Approve, Begun)],
                Next::Rest,
            ),
            // ... and a rollback is held up by nothing.
            (
                now("1", Rollback),
                vec![record("1", Hold, Begun)],
                acts(step("1", Rollback), false, Some(step("1", Hold))),
            ),
            // The log has lost the decision of a rollback, and not what was done: nothing else follows, ...
            (
                now("2", Hold),
                vec![
                    record("1", Approve, Begun),
                    record("1", Approve, Done),
                    record("3", Rollback, Begun),
                    record("3", Rollback, Done),
                ],
                Next::Rest,
            ),
            (now("2", Approve), vec![record("3", Rollback, Begun)], Next::Rest),
            // ... nor does it again; what was only begun is ended.
            (
                now("3", Rollback),
                vec![
                    record("3", Rollback, Begun),
                    record("3", Rollback, Done),
                    record("2", Hold, Begun),
                ],
                Next::Rest,
            ),
            (
                now("3", Rollback),
                vec![record("3", Rollback, Begun)],
                acts(step("3", Rollback), true, None),
            ),
        ] {
            assert_eq!(
                next(standing.as_ref(), false, &records),
                expected,
                "{standing:?} {records:?}"
            );
        }
    }

    #[test]
    fn a_step_keeps_its_key_and_shares_it_with_no_other() {
        use Stage::{Begun, Done};
        use Verdict::{Approve, Hold};
        let hold = step("2", Hold);
        let mut records = vec![record("1", Hold, Begun), record("1", Hold, Done)];
        assert_eq!(key(&hold, &records), "2");
        records.extend([record("2", Approve, Begun), record("2", Approve, Done)]);
        assert_eq!(key(&step("2", Approve), &records), "2");
        assert_eq!(key(&hold, &records), "2/hold");
        records.push(record("2", Hold, Begun));
        assert_eq!(key(&hold, &records), "2/hold");
        assert_eq!(key(&step("2", Approve), &records), "2");
    }

    #[test]
    fn a_rollout_is_left_with_a_hold_until_something_ends_it() {
        use Stage::{Begun, Done, Failed};
        use Verdict::{Approve, Hold, Rollback};
        assert_eq!(held(&[]), None);
        let mut records = vec![record("1", Hold, Begun)];
        assert_eq!(held(&records), Some(step("1", Hold)));
        records.push(record("1", Hold, Failed));
        assert_eq!(held(&records), Some(step("1", Hold)));
        records.push(record("2", Approve, Begun));
        assert_eq!(held(&records), Some(step("1", Hold)));
        records.push(record("2", Approve, Done));
        assert_eq!(held(&records), None);
        records.extend([record("3", Hold, Begun), record("3", Hold, Done)]);
        assert_eq!(held(&records), Some(step("3", Hold)));
        for (stage, left) in [(Begun, Some(step("3", Hold))), (Done, None), (Failed, None)] {
            let mut released = records.clone();
            released.push(Actuation {
                act: RELEASE.to_owned(),
                ..record("3", Hold, stage)
            });
            assert_eq!(held(&released), left);
        }
        records.push(record("4", Rollback, Begun));
        assert_eq!(held(&records), None);
    }

    #[test]
    fn a_hold_goes_on_when_it_was_done_and_nothing_was_begun_since() {
        use Stage::{Begun, Done, Failed};
        use Verdict::{Approve, Hold, Rollback};
        let held = [record("1", Hold, Begun), record("1", Hold, Done)];
        for (standing, since, expected) in [
            (step("1", Hold), vec![], true),
            (step("2", Hold), vec![], true),
            (step("r-override-1", Hold), vec![], true),
            (step("2", Approve), vec![], false),
            (step("2", Rollback), vec![], false),
            (step("3", Hold), vec![record("2", Approve, Begun)], false),
            (
                step("3", Hold),
                vec![record("2", Rollback, Begun), record("2", Rollback, Done)],
                false,
            ),
            // Told by the act itself, once that succeeds.
            (
                step("4", Hold),
                vec![
                    record("2", Approve, Begun),
                    record("2", Approve, Done),
                    record("3", Hold, Begun),
                    record("3", Hold, Failed),
                ],
                false,
            ),
        ] {
            let records = [&held[..], &since[..]].concat();
            assert_eq!(goes_on(&standing, &records), expected, "{standing:?} {since:?}");
        }
        assert!(!goes_on(&step("1", Hold), &[]));
    }

    #[test]
    fn a_hold_is_told_again_when_a_person_decides_or_its_reason_changes_and_before_it_is_forgotten() {
        let told = |order: Option<&str>, reason: &str| Told {
            order: order.map(str::to_owned),
            reason: reason.to_owned(),
        };
        let judges = told(None, "100 requests so far");
        let persons = told(Some("r-override-1"), "alice has decided");
        let minutes = |was: &Told, is: &Told| was.lasts(is).as_secs() / 60;
        assert_eq!(minutes(&judges, &judges), 50);
        assert_eq!(minutes(&judges, &told(None, "200 requests so far")), 10);
        // A person's HOLD begins, another one follows it, and it ends.
        assert_eq!(minutes(&judges, &persons), 0);
        assert_eq!(
            minutes(&persons, &told(Some("r-override-2"), "alice has decided")),
            0
        );
        assert_eq!(minutes(&persons, &judges), 0);
        assert_eq!(
            minutes(&persons, &told(Some("r-override-1"), "and the judge")),
            10
        );
        assert_eq!(minutes(&persons, &persons), 50);
    }

    /// Lets every act be cut off before and after it, and the process start again from its records.
    #[test]
    fn no_crash_makes_a_decision_act_under_two_beginnings() {
        let verdicts = [
            Verdict::Hold,
            Verdict::Hold,
            Verdict::Approve,
            Verdict::Hold,
            Verdict::Rollback,
        ];
        for crashes in 0_u32..1 << verdicts.len() {
            let (mut records, mut effects) = (Vec::new(), Vec::new());
            for (number, verdict) in verdicts.into_iter().enumerate() {
                let standing = step(&number.to_string(), verdict);
                while let Next::Act { step, begun, .. } = next(Some(&standing), false, &records) {
                    if !begun {
                        records.push(record(&step.decision, step.verdict, Stage::Begun));
                    }
                    // The target tells a decision that it has seen, so it counts once.
                    if effects.last() != Some(&step) {
                        effects.push(step.clone());
                    }
                    if !begun && crashes & (1 << number) != 0 {
                        continue;
                    }
                    records.push(record(&step.decision, step.verdict, Stage::Done));
                }
            }
            let expected = [
                step("0", Verdict::Hold),
                step("2", Verdict::Approve),
                step("3", Verdict::Hold),
                step("4", Verdict::Rollback),
            ];
            assert_eq!(effects, expected, "{crashes:b}");
            for stage in [Stage::Begun, Stage::Done] {
                let told = records.iter().filter(|record| record.stage == stage.as_str());
                assert_eq!(told.count(), expected.len(), "{crashes:b}");
            }
        }
    }

    #[test]
    fn what_a_person_decides_follows_a_rollback_too() {
        use Stage::{Begun, Done, Failed};
        use Verdict::{Approve, Hold, Rollback};
        let rolled_back = vec![record("3", Rollback, Begun), record("3", Rollback, Done)];
        let trying = vec![record("3", Rollback, Begun), record("3", Rollback, Failed)];
        for verdict in [Approve, Hold] {
            let ordered = step("r-override-1", verdict);
            let next_of = |is_ordered, records: &[Actuation]| next(Some(&ordered), is_ordered, records);
            assert_eq!(next_of(false, &rolled_back), Next::Rest);
            assert_eq!(next_of(true, &rolled_back), acts(ordered.clone(), false, None));
            let dropped = Some(step("3", Rollback));
            assert_eq!(next_of(true, &trying), acts(ordered.clone(), false, dropped));
        }
        // Given back: the judge's rollback is done again, under the name of that.
        let approved = [
            record("r-override-1", Approve, Begun),
            record("r-override-1", Approve, Done),
        ];
        let records = [&rolled_back[..], &approved].concat();
        let given_back = step("r-override-2", Rollback);
        assert_eq!(
            next(Some(&given_back), false, &records),
            acts(given_back.clone(), false, None)
        );
        // A person's rollback that is given back is none.
        let ordered = [
            record("r-override-1", Rollback, Begun),
            record("r-override-1", Rollback, Done),
        ];
        let approved_since = step("9", Approve);
        assert_eq!(
            next(Some(&approved_since), false, &ordered),
            acts(approved_since.clone(), false, None)
        );
        // And a hold.
        let records = [
            &[record("1", Hold, Begun), record("1", Hold, Done)][..],
            &approved,
        ]
        .concat();
        let given_back = step("r-override-2", Hold);
        assert_eq!(
            next(Some(&given_back), false, &records),
            acts(given_back.clone(), false, None)
        );
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        let seconds = |target, again| -> Vec<Option<u64>> {
            let pause = |tries| pause(target, again, tries).map(|pause| pause.as_secs());
            (1..=9).chain([66, 67, 1_000]).map(pause).collect()
        };
        let some = |seconds: [u64; 10]| seconds.map(Some).to_vec();
        let doubling = some([1, 2, 4, 8, 16, 32, 60, 60, 60, 60]);
        assert_eq!(
            seconds(Target::Webhook, Again::Soon),
            [doubling.clone(), vec![None, None]].concat()
        );
        assert_eq!(
            seconds(Target::Argo, Again::Soon),
            [doubling, vec![Some(60), Some(60)]].concat()
        );
        assert_eq!(
            seconds(Target::Argo, Again::AtOnce),
            seconds(Target::Argo, Again::Soon)
        );
        assert_eq!(seconds(Target::Argo, Again::Slowly), vec![Some(60); 12]);
        assert_eq!(seconds(Target::Webhook, Again::Never), vec![None; 12]);
    }
}
