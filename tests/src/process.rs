//! Processes that never outlive the test.

use std::{
    ffi::OsStr,
    fs::File,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::OnceLock,
};

use coalmine_aggregator::demo::ports;
use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;

/// A running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command; all that it says goes to `log`, appended.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("the log opens");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("the log is shared"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        Self {
            child,
            log: log.to_owned(),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself; whoever waits sees how.
            kill_process(pid, signal).ok();
        }
    }

    /// Kills the process as a crash would: no cleaning up.
    pub fn kill_9(mut self) {
        self.signal(Signal::KILL);
        self.child.wait().ok();
    }

    /// Asks the process to end and waits until it has.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        eventually("the process ends after SIGTERM", || {
            self.child.try_wait().ok().flatten()
        })
    }

    /// The status, if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// What the process said so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let said = self.said();
            let tail: Vec<_> = said.lines().rev().take(15).collect();
            eprintln!("--- the end of {}", self.log.display());
            tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// The directory of this build's programs.
///
/// # Panics
/// When the test does not run from a cargo target directory.
pub fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows where it is");
    test.parent()
        .and_then(Path::parent)
        .expect("the test is in target/PROFILE/deps")
        .to_owned()
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn build(profile: &[&str]) {
    let status = Command::new(env!("CARGO"))
        .current_dir(repository())
        .args([
            "build",
            "--quiet",
            "--locked",
            "-p",
            "coalmine-agent",
            "-p",
            "coalmine-aggregator",
            "--bins",
        ])
        .args(profile)
        .status()
        .expect("cargo starts");
    assert!(status.success(), "the programs do not build");
}

/// The path of one of our programs in this build, built if need be.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        if cfg!(debug_assertions) {
            build(&[])
        } else {
            build(&["--release"])
        }
    });
    target_directory().join(name)
}

/// The path of one of our programs as users run it, optimised; built if need be.
pub fn release_program(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| build(&["--release"]));
    target_directory().with_file_name("release").join(name)
}

/// The path of the unoptimised program; built if need be.
pub fn debug_program(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| build(&[]));
    target_directory().with_file_name("debug").join(name)
}

/// The path of the static program, as it goes into an image; none where Rust has no such target.
///
/// # Panics
/// When it cannot be built.
pub fn static_program(name: &str) -> Option<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-musl";
    static BUILT: OnceLock<bool> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let mut rustc = Command::new("rustc");
        let sysroot = rustc
            .args(["--print", "target-libdir", "--target", TARGET])
            .output();
        let libraries = PathBuf::from(String::from_utf8_lossy(&sysroot.expect("rustc runs").stdout).trim());
        let has_target = libraries.is_dir();
        if has_target {
            build(&["--release", "--target", TARGET]);
        }
        has_target
    });
    let directory = target_directory().with_file_name(TARGET).join("release");
    built.then(|| directory.join(name))
}

/// Runs `coalmine` to its end.
///
/// # Panics
/// When it cannot be started.
pub fn coalmine<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new(program("coalmine"));
    command.args(arguments).stdin(Stdio::null());
    command.output().expect("coalmine starts")
}

/// Addresses on loopback that nobody listens on, and that the kernel gives to nobody.
///
/// # Panics
/// When there are none.
pub fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    ports::free_addresses().expect("free ports")
}

/// Waits until something listens.
///
/// # Panics
/// When nothing does in time, or the process ends.
pub fn wait_for_listener(process: &mut Process, address: SocketAddr) {
    eventually(&format!("something listens on {address}"), || {
        assert!(process.ended().is_none(), "the process ended: {}", process.said());
        TcpStream::connect(address).ok()
    });
}
