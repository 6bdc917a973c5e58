//! Processes that never outlive the run.
//!
//! All are started through the bench itself (`bench launch`), which keeps to its core and asks the kernel to be
//! killed with its parent before it becomes the program.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

/// How long a process may take until it listens.
const START_WITHIN: Duration = Duration::from_secs(15);

/// A process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    name: &'static str,
    process: process::Child,
    log: PathBuf,
}

impl Child {
    /// Runs the bench itself as one of its programs.
    pub(crate) fn own(name: &'static str, directory: &Path, arguments: &[String]) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let process = Command::new(std::env::current_exe()?)
            .args(arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, process, log })
    }

    /// Runs another program, on one core.
    pub(crate) fn program(
        name: &'static str,
        core: usize,
        directory: &Path,
        program: &Path,
        arguments: &[String],
    ) -> anyhow::Result<Self> {
        let mut all = vec!["launch".to_owned(), core.to_string()];
        all.push(program.display().to_string());
        all.extend_from_slice(arguments);
        Self::own(name, directory, &all)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the process accepts connections.
    pub(crate) async fn listening(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        while TcpStream::connect(address).await.is_err() {
            if let Some(status) = self.process.try_wait()? {
                bail!("{} ended with {status}: {}", self.name, self.last_words());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} does not listen on {address}: {}",
                    self.name,
                    self.last_words()
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        said.lines().last().unwrap_or("it said nothing").to_owned()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A program of the workspace, which cargo puts beside this one.
pub(crate) fn beside(program: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(program);
    if !path.is_file() {
        bail!(
            "{} is missing; run `make bench`, or `cargo build --release` first",
            path.display()
        );
    }
    Ok(path)
}

/// A program that the machine may have.
pub(crate) fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    places
        .map(|place| place.join(program))
        .find(|path| path.is_file())
}
