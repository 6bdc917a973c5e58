//! A script of a CI system: it runs `coalmine gate` and looks at the exit code.

use std::process::{Command, Stdio};

use super::{Poll, Reading, Server, Subject};
use crate::process::program;

/// Runs the gate; gives the exit code and what was said.
///
/// # Panics
/// When it cannot be started.
pub(super) fn gate(server: &Server, subject: &Subject, more: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(program("coalmine"));
    command
        .args(["gate", "--output", "json", "--service", &subject.service])
        .args(["--server", &format!("http://{}", server.http)])
        .args(more)
        .env_remove("COALMINE_TOKEN")
        .stdin(Stdio::null());
    if let Some(token) = &server.token {
        command.env("COALMINE_TOKEN", token);
    }
    let output = command.output().expect("coalmine starts");
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    (output.status.code(), said.concat())
}

/// What a script does by an exit code: 0 goes on, 1 goes back, 2 tries later. Nothing else is a verdict.
fn reading(code: Option<i32>) -> Reading {
    match code {
        Some(0) => Reading::Goes,
        Some(1) => Reading::Stops,
        Some(2) => Reading::Holds,
        code => Reading::Errors(format!("exit code {code:?}")),
    }
}

/// Asks once.
pub fn ask(server: &Server, subject: &Subject) -> Poll {
    let (code, came) = gate(server, subject, &[]);
    Poll {
        reading: reading(code),
        came,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_verdict_never_counts_as_approved() {
        for (code, wanted) in [
            (Some(0), "goes"),
            (Some(1), "stops"),
            (Some(2), "holds"),
            (Some(3), "errors"),
            (Some(64), "errors"),
            (None, "errors"),
        ] {
            assert_eq!(reading(code).word(), wanted, "{code:?}");
        }
    }
}
