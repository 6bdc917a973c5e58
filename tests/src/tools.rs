//! Programs from the distribution that the tests run against.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    sync::Mutex,
};

/// Finds a program; installs its package where that is possible, and says so.
///
/// # Panics
/// When it is missing and cannot be installed, with the command that installs it.
pub fn tool(program: &str, package: &str) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _installing = ONE_AT_A_TIME.lock();
    if let Some(path) = find(program) {
        return path;
    }
    eprintln!("{program} is missing; installing the package {package}");
    let install = Command::new("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends", package])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    find(program).unwrap_or_else(|| {
        panic!(
            "{program} is missing and could not be installed ({install:?}); run: \
             sudo apt-get update && sudo apt-get install -y --no-install-recommends {package}"
        )
    })
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(["/usr/sbin", "/usr/local/sbin", "/sbin"]);
    directories
        .map(|directory| PathBuf::from(directory).join(program))
        .find(|path| path.is_file())
}
