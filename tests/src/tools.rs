//! Programs from the distribution that the tests run against.

use std::{
    fs,
    path::{Path, PathBuf},
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

/// Runs openssl in a directory.
///
/// # Panics
/// When it fails.
pub fn openssl(directory: &Path, arguments: &str) {
    let mut command = Command::new(tool("openssl", "openssl"));
    command
        .args(arguments.split_whitespace())
        .current_dir(directory)
        .stdin(Stdio::null());
    let output = command.output().expect("openssl starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {arguments}: {said}");
}

/// Makes `server.pem` and `server.key` for these names, as in `IP:127.0.0.1,DNS:localhost`, and `authority.pem`, which
/// has signed them.
///
/// # Panics
/// When openssl fails.
pub fn certify(directory: &Path, names: &str) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout";
    openssl(
        directory,
        &format!("req -x509 {key} authority.key -out authority.pem -subj /CN=authority -days 2"),
    );
    openssl(
        directory,
        &format!("req {key} server.key -out server.csr -subj /CN=server"),
    );
    let extensions =
        format!("basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\nsubjectAltName={names}\n");
    fs::write(directory.join("server.ext"), extensions).expect("the extensions are written");
    openssl(
        directory,
        "x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 \
         -extfile server.ext -out server.pem",
    );
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(["/usr/sbin", "/usr/local/sbin", "/sbin"]);
    directories
        .map(|directory| PathBuf::from(directory).join(program))
        .find(|path| path.is_file())
}
