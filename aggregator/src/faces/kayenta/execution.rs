//! An execution: which rollout is asked about, and between which thresholds a score says what.
//!
//! ```text
//! id      ROLLOUT.PASS.MARGINAL, as in checkout-v2-1700000000.95.75
//!
//! verdict                            complete  status     score
//! APPROVE                            true      succeeded  100
//! ROLLBACK                           true      succeeded  0
//! HOLD                               false     running    none
//! HOLD past its deadline             true      succeeded  halfway between marginal and pass
//! HOLD when the rollout was ended    true      terminal   halfway, with the reason as the exception
//! HOLD that can be judged no more    true      terminal   the same
//! APPROVE at the end, held back      false     running    none
//! ```
//!
//! An id says all that a poll needs, so nothing is kept of an execution, and it outlives a restart. A score is a whole
//! number and never equal to marginal, which Argo and Orca take differently: Argo fails below marginal, Orca at it.

use coalmine_judge::v1::Verdict;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::rollouts::{State, View};

/// The score of APPROVE; no threshold is higher.
const BEST: u8 = 100;

/// The score of ROLLBACK; each threshold is higher.
const WORST: u8 = 0;

/// From which scores on a canary passes, and is at least not failed. There is a whole number between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Thresholds {
    pass: u8,
    marginal: u8,
}

/// What an execution's id says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Execution {
    pub(super) rollout: String,
    pub(super) thresholds: Thresholds,
}

/// How far an execution is, as Orca calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Running,
    Succeeded,
    Terminal,
}

/// A verdict as a caller of Kayenta reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) status: Status,
    /// None while the execution runs.
    pub(super) score: Option<Score>,
}

/// A score and what it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Score {
    pub(super) score: u8,
    pub(super) classification: &'static str,
}

/// Whether a rollout cannot be judged any more, and nobody has decided for it.
pub(super) fn is_dead(view: &View) -> bool {
    waits_for_nothing(view.state, view.waits_for_ms, view.overridden.is_some())
}

/// What a person says instead of the judge may change.
fn waits_for_nothing(state: State, waits_for_ms: Option<u64>, is_overridden: bool) -> bool {
    state == State::Running && waits_for_ms.is_none() && !is_overridden
}

// === impl Thresholds ===

impl Thresholds {
    /// Reads them from a request. Argo and Orca send whole numbers, other callers send what Kayenta takes for one too.
    pub(super) fn read(pass: Option<&Value>, marginal: Option<&Value>) -> Result<Self, String> {
        Self::new(
            whole("thresholds.pass", pass)?,
            whole("thresholds.marginal", marginal)?,
        )
    }

    pub(super) fn new(pass: i64, marginal: i64) -> Result<Self, String> {
        if pass > i64::from(BEST) {
            return Err(format!(
                "thresholds.pass is {pass}, and the best score is {BEST}: nothing could pass; give at most {BEST}"
            ));
        }
        if marginal < 1 {
            return Err(format!(
                "thresholds.marginal is {marginal}, and ROLLBACK has the score {WORST}: nothing could fail; give 1 or more"
            ));
        }
        if pass.saturating_sub(marginal) < 2 {
            return Err(format!(
                "thresholds.pass is {pass} and thresholds.marginal is {marginal}; a HOLD that is over has a whole number \
                 between them as its score, so pass must be at least marginal + 2"
            ));
        }
        match (u8::try_from(pass), u8::try_from(marginal)) {
            (Ok(pass), Ok(marginal)) => Ok(Self { pass, marginal }),
            _ => Err("thresholds.pass and thresholds.marginal must be from 1 to 100".to_owned()),
        }
    }

    pub(super) const fn is_passed_by(self, score: u8) -> bool {
        score >= self.pass
    }

    /// The score of what neither passes nor fails.
    const fn between(self) -> u8 {
        self.marginal + (self.pass - self.marginal) / 2
    }
}

/// A whole number, also as a text, or with a fraction that is zero.
fn whole(field: &str, value: Option<&Value>) -> Result<i64, String> {
    let number = match value {
        None | Some(Value::Null) => return Err(format!("{field} is missing; give a whole number")),
        Some(Value::Number(number)) => number
            .as_i64()
            .or_else(|| number.as_f64().and_then(without_fraction)),
        Some(Value::String(text)) => {
            let text = text.trim();
            let fraction = || text.parse().ok().and_then(without_fraction);
            text.parse().ok().or_else(fraction)
        }
        Some(_) => None,
    };
    number.ok_or_else(|| format!("{field} is no whole number; scores are whole, and so are thresholds"))
}

fn without_fraction(number: f64) -> Option<i64> {
    // Far more than a threshold can be, and exact.
    let is_whole = number.fract() == 0.0 && number.abs() <= 1e9;
    is_whole.then_some(number as i64)
}

// === impl Execution ===

impl Execution {
    pub(super) fn id(&self) -> String {
        let Thresholds { pass, marginal } = self.thresholds;
        format!("{}.{pass}.{marginal}", self.rollout)
    }

    /// Reads an id; none is what no execution is called.
    pub(super) fn parse(id: &str) -> Option<Self> {
        let mut parts = id.rsplitn(3, '.');
        let (marginal, pass, rollout) = (parts.next()?, parts.next()?, parts.next()?);
        let execution = Self {
            rollout: rollout.to_owned(),
            thresholds: Thresholds::new(pass.parse().ok()?, marginal.parse().ok()?).ok()?,
        };
        // One execution has one name: no zeros before a number, and no sign.
        (!rollout.is_empty() && execution.id() == id).then_some(execution)
    }
}

// === impl Status ===

impl Status {
    pub(super) const fn is_complete(self) -> bool {
        !matches!(self, Self::Running)
    }

    /// As it stands in the answers about a canary.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Terminal => "terminal",
        }
    }

    /// The same as the name of a constant, as it stands in the answers of a standalone analysis.
    pub(super) const fn constant(self) -> &'static str {
        match self {
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Terminal => "TERMINAL",
        }
    }
}

// === impl Reading ===

impl Reading {
    /// `has_expired`: the HOLD has reached its deadline and goes on. `is_over`: nothing more comes.
    pub(super) fn of(verdict: Verdict, has_expired: bool, is_over: bool, thresholds: Thresholds) -> Self {
        let score = |score, classification| {
            Some(Score {
                score,
                classification,
            })
        };
        let marginal = score(thresholds.between(), "Marginal");
        let (status, score) = match verdict {
            Verdict::Approve => (Status::Succeeded, score(BEST, "Pass")),
            Verdict::Rollback => (Status::Succeeded, score(WORST, "Fail")),
            Verdict::Hold if is_over => (Status::Terminal, marginal),
            Verdict::Hold if has_expired => (Status::Succeeded, marginal),
            Verdict::Hold => (Status::Running, None),
        };
        Self { status, score }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn thresholds(pass: i64, marginal: i64) -> Thresholds {
        Thresholds::new(pass, marginal).unwrap()
    }

    /// What a caller does next.
    #[derive(Debug, PartialEq, Eq)]
    enum Does {
        GoesOn,
        Waits,
        AsksSomebody,
        Stops,
    }

    /// Argo 1.9: `complete` first, then the score, whatever the status is.
    fn argo(reading: Reading, pass: i64, marginal: i64) -> Does {
        if !reading.status.is_complete() {
            return Does::Waits;
        }
        match i64::from(reading.score.unwrap().score) {
            score if score >= pass => Does::GoesOn,
            score if score >= marginal => Does::AsksSomebody,
            _ => Does::Stops,
        }
    }

    /// Orca: the status first, and the score only of what has succeeded; the last interval's has to pass.
    fn orca(reading: Reading, pass: i64, marginal: i64, is_last: bool) -> Does {
        match reading.status {
            Status::Running => Does::Waits,
            Status::Terminal => Does::Stops,
            Status::Succeeded => match i64::from(reading.score.unwrap().score) {
                score if score <= marginal => Does::Stops,
                score if score < pass && is_last => Does::Stops,
                _ => Does::GoesOn,
            },
        }
    }

    #[test]
    fn argo_and_orca_read_the_verdict_whatever_the_thresholds() {
        for pass in 3..=100 {
            for marginal in 1..=pass - 2 {
                let limits = thresholds(pass, marginal);
                let read = |verdict, has_expired, is_ended| {
                    let reading = Reading::of(verdict, has_expired, is_ended, limits);
                    let score = reading.score.map(|score| i64::from(score.score));
                    assert_ne!(score, Some(marginal), "{limits:?}");
                    assert_eq!(
                        score.is_some_and(|score| score >= pass),
                        reading
                            .score
                            .is_some_and(|score| limits.is_passed_by(score.score))
                    );
                    [
                        argo(reading, pass, marginal),
                        orca(reading, pass, marginal, false),
                        orca(reading, pass, marginal, true),
                    ]
                };
                for ended in [false, true] {
                    for expired in [false, true] {
                        let go = [Does::GoesOn, Does::GoesOn, Does::GoesOn];
                        assert_eq!(read(Verdict::Approve, expired, ended), go, "{limits:?}");
                        let stop = [Does::Stops, Does::Stops, Does::Stops];
                        assert_eq!(read(Verdict::Rollback, expired, ended), stop, "{limits:?}");
                    }
                }
                let hold = |expired, ended| read(Verdict::Hold, expired, ended);
                assert_eq!(hold(false, false), [Does::Waits, Does::Waits, Does::Waits]);
                assert_eq!(
                    hold(true, false),
                    [Does::AsksSomebody, Does::GoesOn, Does::Stops],
                    "{limits:?}"
                );
                let ended = [Does::AsksSomebody, Does::Stops, Does::Stops];
                assert_eq!(hold(false, true), ended, "{limits:?}");
                assert_eq!(hold(true, true), ended, "{limits:?}");
            }
        }
    }

    #[test]
    fn a_rollout_is_dead_when_it_waits_for_no_window_and_nobody_has_decided() {
        for (state, waits_for_ms, is_overridden, expected) in [
            (State::Running, Some(1_000), false, false),
            (State::Running, Some(1_000), true, false),
            (State::Running, None, false, true),
            (State::Running, None, true, false),
            (State::Halted, None, false, false),
            (State::Ended, None, false, false),
        ] {
            let found = waits_for_nothing(state, waits_for_ms, is_overridden);
            assert_eq!(found, expected, "{state:?} {waits_for_ms:?} {is_overridden}");
        }
    }

    #[test]
    fn thresholds_leave_room_for_each_verdict() {
        for (pass, marginal, problem) in [
            (101, 50, "thresholds.pass is 101"),
            (i64::MAX, 50, "thresholds.pass is 9223372036854775807"),
            (95, 0, "thresholds.marginal is 0"),
            (95, i64::MIN, "thresholds.marginal is -9223372036854775808"),
            (0, 0, "thresholds.marginal is 0"),
            (75, 75, "at least marginal + 2"),
            (75, 74, "at least marginal + 2"),
            (50, 75, "at least marginal + 2"),
            (i64::MIN, 1, "at least marginal + 2"),
        ] {
            let refused = Thresholds::new(pass, marginal).unwrap_err();
            assert!(refused.contains(problem), "{pass} {marginal}: {refused}");
        }
    }

    #[test]
    fn a_threshold_is_a_whole_number_however_it_is_written() {
        for pass in [json!(95), json!(95.0), json!("95"), json!(" 95.0 ")] {
            let read = Thresholds::read(Some(&pass), Some(&json!(75)));
            assert_eq!(read, Ok(thresholds(95, 75)), "{pass}");
        }
        for (pass, problem) in [
            (None, "thresholds.pass is missing"),
            (Some(Value::Null), "thresholds.pass is missing"),
            (Some(json!(95.5)), "no whole number"),
            (Some(json!("95.5")), "no whole number"),
            (Some(json!("much")), "no whole number"),
            (Some(json!("NaN")), "no whole number"),
            (Some(json!("inf")), "no whole number"),
            (Some(json!(1e300)), "no whole number"),
            (Some(json!(u64::MAX)), "no whole number"),
            (Some(json!([95])), "no whole number"),
            (Some(json!(true)), "no whole number"),
        ] {
            let refused = Thresholds::read(pass.as_ref(), Some(&json!(75))).unwrap_err();
            assert!(refused.contains(problem), "{pass:?}: {refused}");
        }
    }

    #[test]
    fn an_id_is_read_as_it_is_written_and_no_other_is() {
        for rollout in ["checkout-v2-1700000000", "checkout-1.2.3-1700000000", "a.95.75"] {
            let execution = Execution {
                rollout: rollout.to_owned(),
                thresholds: thresholds(95, 75),
            };
            assert_eq!(Execution::parse(&execution.id()), Some(execution));
        }
        for bad in [
            "",
            "..",
            "checkout",
            "checkout.95",
            ".95.75",
            "checkout.95.",
            "checkout..75",
            "checkout.75.95",
            "checkout.95.095",
            "checkout.+95.75",
            "checkout.95.75 ",
            "checkout.95.-1",
            "checkout.101.75",
            "checkout.99999999999999999999.75",
        ] {
            assert_eq!(Execution::parse(bad), None, "{bad:?}");
        }
    }
}
