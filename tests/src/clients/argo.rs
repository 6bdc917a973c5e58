//! Argo Rollouts 1.9.1: what its providers make of an answer, and what it makes of many measurements.
//!
//! Read in `analysis/analysis.go`, `utils/evaluate/evaluate.go` and `metricproviders`.

pub mod job;
pub mod kayenta;
pub mod prometheus;
pub mod web;

use super::{Poll, Reading};

/// How a measurement went, and in the end a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// It is not known yet: it is looked at again.
    Running,
    /// The canary may go on.
    Successful,
    /// The rollout is aborted.
    Failed,
    /// Neither condition is met. A metric that ends so pauses the rollout until a person comes.
    Inconclusive,
    /// It could not be measured. A metric that ends so aborts the rollout.
    Error(String),
}

impl Phase {
    /// By both conditions, each of which may be impossible to evaluate.
    fn of(success: Result<bool, String>, failure: Result<bool, String>) -> Self {
        match (success, failure) {
            (Err(why), _) | (_, Err(why)) => Self::Error(why),
            (_, Ok(true)) => Self::Failed,
            (Ok(true), Ok(false)) => Self::Successful,
            (Ok(false), Ok(false)) => Self::Inconclusive,
        }
    }

    fn poll(self, came: String) -> Poll {
        let reading = match self {
            Self::Successful => Reading::Goes,
            Self::Running | Self::Inconclusive => Reading::Holds,
            Self::Failed => Reading::Stops,
            Self::Error(why) => Reading::Errors(why),
        };
        Poll { reading, came }
    }
}

impl From<&Reading> for Phase {
    /// A measurement that is over.
    fn from(reading: &Reading) -> Self {
        match reading {
            Reading::Goes => Self::Successful,
            Reading::Holds => Self::Inconclusive,
            Reading::Stops => Self::Failed,
            Reading::Errors(why) => Self::Error(why.clone()),
        }
    }
}

/// The limits of a metric with an interval: it is measured until one of them is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Failed measurements that are let pass.
    pub failure: u32,
    /// Inconclusive ones.
    pub inconclusive: u32,
    /// Errors in a row.
    pub consecutive_error: u32,
    /// Successes in a row after which it is successful.
    pub consecutive_success: Option<u32>,
    /// Measurements without an error after which it is over.
    pub count: Option<u32>,
}

impl Limits {
    /// Those of a metric that says nothing of them.
    pub const DEFAULT: Self = Self {
        failure: 0,
        inconclusive: 0,
        consecutive_error: 4,
        consecutive_success: None,
        count: None,
    };

    /// Those that we ship: HOLD is waited for, an outage of ours of five minutes aborts nothing, and one ROLLBACK does.
    pub const PATIENT: Self = Self {
        failure: 0,
        inconclusive: 5_000,
        consecutive_error: 30,
        consecutive_success: Some(2),
        count: Some(5_000),
    };
}

/// A metric while it is measured.
#[derive(Debug, Clone)]
pub struct Metric {
    limits: Limits,
    measured: u32,
    failed: u32,
    inconclusive: u32,
    errors_in_a_row: u32,
    successes_in_a_row: u32,
}

impl Metric {
    /// One that was not measured yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            measured: 0,
            failed: 0,
            inconclusive: 0,
            errors_in_a_row: 0,
            successes_in_a_row: 0,
        }
    }

    /// Takes a measurement; says what the metric is after it.
    pub fn measured(&mut self, phase: Phase) -> Phase {
        let is_error = matches!(phase, Phase::Error(_));
        match phase {
            Phase::Running => return Phase::Running,
            Phase::Successful => self.successes_in_a_row += 1,
            Phase::Failed => self.failed += 1,
            Phase::Inconclusive => self.inconclusive += 1,
            Phase::Error(_) => self.errors_in_a_row += 1,
        }
        if !is_error {
            self.measured += 1;
            self.errors_in_a_row = 0;
        }
        if phase != Phase::Successful {
            self.successes_in_a_row = 0;
        }
        self.assess()
    }

    /// Of several limits that are passed the first one here decides.
    fn assess(&self) -> Phase {
        let limits = self.limits;
        if self.errors_in_a_row > limits.consecutive_error {
            return Phase::Error(format!("{} errors in a row", self.errors_in_a_row));
        }
        if self.inconclusive > limits.inconclusive {
            return Phase::Inconclusive;
        }
        if self.failed > limits.failure {
            return Phase::Failed;
        }
        let enough = limits.consecutive_success;
        if enough.is_some_and(|enough| self.successes_in_a_row >= enough) {
            return Phase::Successful;
        }
        if limits.count.is_none_or(|count| self.measured < count) {
            return Phase::Running;
        }
        // Where successes in a row are wanted, all measurements without them show neither.
        match enough {
            Some(_) => Phase::Inconclusive,
            None => Phase::Successful,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A metric after measurements: `+` successful, `-` failed, `?` inconclusive, `!` an error, `.` still running.
    fn after(limits: Limits, measurements: &str) -> Phase {
        let mut metric = Metric::new(limits);
        let mut phase = Phase::Running;
        for measurement in measurements.chars() {
            assert_eq!(
                phase,
                Phase::Running,
                "it is over before the end of {measurements}"
            );
            phase = metric.measured(match measurement {
                '+' => Phase::Successful,
                '-' => Phase::Failed,
                '?' => Phase::Inconclusive,
                '!' => Phase::Error("away".to_owned()),
                _ => Phase::Running,
            });
        }
        phase
    }

    #[test]
    fn five_errors_in_a_row_are_too_many_and_holds_are_waited_for_only_where_that_is_said() {
        let (default, patient) = (Limits::DEFAULT, Limits::PATIENT);
        for (limits, measurements, wanted) in [
            (default, "!!!!", Phase::Running),
            (default, "!!!!+!!!!", Phase::Running),
            (default, "!!!!.", Phase::Running),
            (default, "!!!!!", Phase::Error("5 errors in a row".to_owned())),
            (default, "++++++", Phase::Running),
            (default, "?", Phase::Inconclusive),
            (default, "-", Phase::Failed),
            (patient, "!!!!!!!!!!", Phase::Running),
            (patient, "??????+?+", Phase::Running),
            (patient, "??+!+", Phase::Running),
            (patient, "??????++", Phase::Successful),
            (patient, "?+-", Phase::Failed),
        ] {
            assert_eq!(after(limits, measurements), wanted, "{measurements} {limits:?}");
        }
        let counted = Limits {
            count: Some(3),
            ..default
        };
        assert_eq!(after(counted, "+!+"), Phase::Running);
        assert_eq!(after(counted, "+!++"), Phase::Successful);
        let mixed = "+?".repeat(2_500);
        assert_eq!(after(patient, &mixed[1..]), Phase::Running);
        assert_eq!(after(patient, &mixed), Phase::Inconclusive);
        let long = "!".repeat(31);
        assert_eq!(after(patient, &long[1..]), Phase::Running);
        assert!(matches!(after(patient, &long), Phase::Error(_)));
    }

    #[test]
    fn a_failure_goes_before_a_success_and_neither_is_inconclusive() {
        let broken = || Err("no such field".to_owned());
        for (success, failure, wanted) in [
            (Ok(true), Ok(false), Phase::Successful),
            (Ok(false), Ok(true), Phase::Failed),
            (Ok(true), Ok(true), Phase::Failed),
            (Ok(false), Ok(false), Phase::Inconclusive),
            (broken(), Ok(false), Phase::Error("no such field".to_owned())),
            (Ok(true), broken(), Phase::Error("no such field".to_owned())),
        ] {
            assert_eq!(Phase::of(success, failure), wanted);
        }
    }
}
