//! Argo's job provider: a Job of ours that waits for the verdict, with no retry of its own.

use super::Phase;
use crate::clients::{Poll, Server, Subject, ci::gate};

/// A measurement at the end of the Job's time. A Job has succeeded or failed, and what is no success aborts.
pub fn measure(server: &Server, subject: &Subject) -> Poll {
    let (code, said) = gate(server, subject, &["--wait", "--timeout", "1s"]);
    let phase = if code == Some(0) {
        Phase::Successful
    } else {
        Phase::Failed
    };
    phase.poll(said)
}
