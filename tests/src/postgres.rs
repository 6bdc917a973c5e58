//! A real PostgreSQL 15 for one test: started on a free port, killed as a crash would, started again on the same data.
//!
//! It syncs as in production. PostgreSQL refuses to run as root; where the tests do, it runs as the user `postgres`,
//! which its package makes. The cluster that Debian's package makes at installation is not touched.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, getuid, kill_process};

use crate::{
    eventually,
    process::{Process, free_addresses},
    tools::{certify, tool},
};

/// Where Debian puts the programs, which are not on the PATH.
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

/// Debian's package.
const PACKAGE: &str = "postgresql-15";

/// The user who may do everything.
pub const SUPERUSER: &str = "postgres";

/// The database that every server has.
pub const DATABASE: &str = "coalmine";

/// The user who is asked for a password, once a test has made the role.
pub const WITH_PASSWORD: &str = "with_password";

/// How long a server may take to stop, or to end in order, when nothing waits for it any more.
const PATIENCE: Duration = Duration::from_secs(5);

/// Rows of fields, as text.
pub type Rows = Vec<Vec<String>>;

/// A server with its data; it can be killed and started again.
#[derive(Debug)]
pub struct Postgres {
    process: Option<Process>,
    /// Where it listens.
    pub address: SocketAddr,
    directory: PathBuf,
    settings: Vec<String>,
    /// User and group that it runs as, if not as ourselves.
    account: Option<(u32, u32)>,
}

impl Postgres {
    /// Makes a cluster under `directory`, which becomes passable for others, and starts it.
    pub fn start(directory: &Path) -> Self {
        let mut postgres = Self::prepare(directory);
        postgres.begin();
        postgres
    }

    /// The same with TLS as an offer. Gives the file with the root of its certificate, which names 127.0.0.1 alone.
    ///
    /// # Panics
    /// When there is no certificate to be had.
    pub fn start_tls(directory: &Path) -> (Self, PathBuf) {
        let mut postgres = Self::prepare(directory);
        certify(directory, "IP:127.0.0.1");
        let secret = directory.join("server.key");
        fs::set_permissions(&secret, Permissions::from_mode(0o600)).expect("the key is secret");
        postgres.hand_over(&secret);
        postgres.settings = vec![
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", directory.join("server.pem").display()),
            format!("ssl_key_file={}", secret.display()),
        ];
        postgres.begin();
        (postgres, directory.join("authority.pem"))
    }

    /// Makes a cluster and starts nothing.
    fn prepare(directory: &Path) -> Self {
        tool(&format!("{PROGRAMS}/postgres"), PACKAGE);
        let account = account();
        if account.is_some() {
            let passable = Permissions::from_mode(0o711);
            fs::set_permissions(directory, passable).expect("the directory is made passable");
        }
        let [address] = free_addresses();
        let postgres = Self {
            process: None,
            address,
            directory: directory.to_owned(),
            settings: Vec::new(),
            account,
        };
        let data = postgres.data();
        fs::create_dir(&data).expect("a directory for PostgreSQL");
        postgres.hand_over(&data);
        let mut initdb = postgres.command("initdb");
        initdb
            .arg("-D")
            .arg(&data)
            .args(["-U", SUPERUSER, "-A", "trust", "--encoding=UTF8", "--locale=C"])
            .args(["--no-sync", "--no-instructions"])
            .stdin(Stdio::null());
        let output = initdb.output().expect("initdb starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "initdb: {said}");
        let rules = format!(
            "host all {WITH_PASSWORD} 127.0.0.1/32 scram-sha-256\n\
             host all all 127.0.0.1/32 trust\n"
        );
        fs::write(data.join("pg_hba.conf"), rules).expect("the rules of access are written");
        postgres
    }

    fn begin(&mut self) {
        self.launch();
        let maintenance = self.url(SUPERUSER, "postgres");
        psql(&maintenance, &[&format!("CREATE DATABASE {DATABASE}")])
            .unwrap_or_else(|error| panic!("the database is not made: {error}"));
    }

    fn data(&self) -> PathBuf {
        self.directory.join("pg")
    }

    /// Gives a file to the user that the server runs as.
    fn hand_over(&self, path: &Path) {
        if let Some((user, group)) = self.account {
            chown(path, Some(user), Some(group)).expect("the file changes its owner");
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(Path::new(PROGRAMS).join(program));
        // Where the test is may be closed to the other user.
        command.current_dir(&self.directory);
        if let Some((user, group)) = self.account {
            command.uid(user).gid(group);
        }
        command
    }

    /// Starts the server on its data and waits until it takes connections.
    ///
    /// # Panics
    /// When it does not.
    pub fn launch(&mut self) {
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data());
        let port = format!("port={}", self.address.port());
        let settings = [
            "fsync=on",
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            &port,
            // Small: several servers may run at a time.
            "shared_buffers=16MB",
            "max_connections=50",
        ];
        for setting in settings
            .into_iter()
            .chain(self.settings.iter().map(String::as_str))
        {
            command.args(["-c", setting]);
        }
        let mut process = Process::start(command, &self.directory.join("postgres.log"));
        let url = self.url(SUPERUSER, "postgres");
        eventually("PostgreSQL takes connections", || {
            assert!(process.ended().is_none(), "PostgreSQL ended: {}", process.said());
            psql(&url, &["SELECT 1"]).ok()
        });
        self.process = Some(process);
    }

    /// Kills the server with all its processes. What the system has in its buffers survives that.
    ///
    /// # Panics
    /// When a process of it survives.
    pub fn kill_9(&mut self) {
        let Some(process) = self.process.take() else {
            return;
        };
        let postmaster = self.postmaster();
        // Stopped, it makes no more processes.
        process.signal(Signal::STOP);
        let deadline = Instant::now() + PATIENCE;
        while look(postmaster).is_some_and(|(state, _)| !matches!(state, 'T' | 'Z')) {
            assert!(Instant::now() < deadline, "PostgreSQL does not stop");
            std::thread::yield_now();
        }
        let children = children(postmaster);
        children.iter().copied().for_each(kill);
        process.kill_9();
        // One that still holds the shared memory would keep the next server from starting.
        eventually("every process of PostgreSQL is gone", || {
            let gone = |pid: &u32| look(*pid).is_none_or(|(state, _)| matches!(state, 'Z' | 'X'));
            children.iter().all(gone).then_some(())
        });
    }

    /// Ends the server at once, without a checkpoint; it recovers when it is started again.
    pub fn stop_immediate(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::QUIT);
            eventually("PostgreSQL ends after SIGQUIT", || process.ended());
        }
    }

    /// The process that all others are children of.
    fn postmaster(&self) -> u32 {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).expect("PostgreSQL wrote its pid");
        let first = text.lines().next().and_then(|line| line.trim().parse().ok());
        first.expect("postmaster.pid begins with the pid")
    }

    /// How a user reaches a database.
    pub fn url(&self, user: &str, database: &str) -> String {
        url_at(self.address, user, database)
    }

    /// Runs a statement as the superuser in [`DATABASE`].
    ///
    /// # Panics
    /// When it fails.
    pub fn query(&self, sql: &str) -> Rows {
        psql(&self.url(SUPERUSER, DATABASE), &[sql]).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// The same for a statement that gives one field.
    ///
    /// # Panics
    /// When it fails or gives anything else.
    pub fn value(&self, sql: &str) -> String {
        let rows = self.query(sql);
        match rows.as_slice() {
            [row] if row.len() == 1 => row.concat(),
            _ => panic!("{sql}: not one field: {rows:?}"),
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Killed, it could not give its shared memory back to the system.
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::QUIT);
            let deadline = Instant::now() + PATIENCE;
            while process.ended().is_none() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// How a user reaches a database behind an address, without TLS.
pub fn url_at(address: SocketAddr, user: &str, database: &str) -> String {
    format!("postgres://{user}@{address}/{database}?sslmode=disable")
}

/// Runs statements in one session, each sent by itself, and gives the rows of all; the error is what psql says. A field
/// must have no line break.
///
/// # Panics
/// When psql cannot be started.
pub fn psql(url: &str, statements: &[&str]) -> Result<Rows, String> {
    const BETWEEN: &str = "\u{1f}";
    let mut command = Command::new(Path::new(PROGRAMS).join("psql"));
    command
        .args(["-X", "-A", "-t", "-q", "-F", BETWEEN, "-v", "ON_ERROR_STOP=1"])
        .args(statements.iter().flat_map(|statement| ["-c", *statement]))
        .args(["-d", url])
        .stdin(Stdio::null());
    let output = command.output().expect("psql starts");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let row = |line: &str| line.split(BETWEEN).map(str::to_owned).collect();
    Ok(text.lines().map(row).collect())
}

/// User and group of the account `postgres`, where we are root.
fn account() -> Option<(u32, u32)> {
    if !getuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("the system's users are readable");
    let line = users.lines().find(|line| line.starts_with("postgres:"));
    let line = line.expect("PostgreSQL's package makes a user postgres");
    let mut numbers = line.split(':').skip(2).map_while(|field| field.parse().ok());
    numbers.next().zip(numbers.next())
}

/// The state of a process, and its parent.
fn look(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses before may have anything in it.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

fn children(parent: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("the system shows its processes");
    all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| look(*pid).is_some_and(|(_, of)| of == parent))
        .collect()
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        kill_process(pid, Signal::KILL).ok();
    }
}
