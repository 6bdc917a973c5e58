//! Children that never outlive the demonstration.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::cli::{Exit, Failure};

/// How long a child may take to stop after SIGTERM.
const STOP_WITHIN: Duration = Duration::from_secs(8);

/// A process of the demonstration; killed when dropped.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program that lies beside this one; what it says goes to a file.
    pub(super) fn start(
        program: &str,
        name: &str,
        arguments: &[String],
        logs: &Path,
    ) -> Result<Self, Failure> {
        let path = beside(program)?;
        let log = logs.join(format!("{name}.log"));
        let failed =
            |error: io::Error| Failure::new(Exit::Bad, format!("cannot start {}: {error}", path.display()));
        let output = File::create(&log).map_err(failed)?;
        let child = Command::new(&path)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output)
            // Ctrl-C in a terminal reaches the whole group; the demonstration stops its children in order itself.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// An error if the process has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last = said.lines().last().unwrap_or("it said nothing");
                Err(Failure::new(
                    Exit::Bad,
                    format!("{} ended with {status}: {last}", self.name),
                ))
            }
            Err(error) => Err(Failure::new(
                Exit::Bad,
                format!("cannot watch {}: {error}", self.name),
            )),
        }
    }

    /// Asks the process to stop, and makes it after a while.
    pub(super) async fn stop(&mut self) {
        if let Some(pid) = self
            .child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw)
        {
            kill_process(pid, Signal::TERM).ok();
        }
        if tokio::time::timeout(STOP_WITHIN, self.child.wait())
            .await
            .is_err()
        {
            self.child.kill().await.ok();
        }
    }
}

/// The path of a program in the directory of this one.
fn beside(program: &str) -> Result<PathBuf, Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::new(Exit::Bad, format!("cannot tell where this program is: {error}")))?;
    let path = own.with_file_name(program);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::usage(format!(
        "{} is missing; the demo needs coalmine, coalmine-aggregator and coalmine-agent side by side: \
         run `make demo`, or `cargo build --release` first",
        path.display()
    )))
}
