//! The play that is performed under strace, and what must be true after it.

use std::{
    ffi::OsString,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use coalmine_tests::{
    components::Aggregator, eventually, http::get, process::Process, speaker::Speaker, tools::tool, within,
};
use tempfile::TempDir;

use super::super::{Agents, POLICY, Promises, Traffic, conserves, end, start};
use super::aim::{CHANGE, LOOK, Target};

/// Seals after two decisions, and rolls windows up every second or two.
const SMALL: [&str; 4] = ["--segment-bytes", "4096", "--windows-bytes", "65536"];

const TRAFFIC: Traffic = Traffic {
    tenants: 600,
    requests: 20,
    length_ms: 250,
};

const DECISIONS: usize = 3;

/// How long a step of the play may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of a play.
pub(super) struct Performance {
    /// Whether everything in it came about.
    pub(super) complete: bool,
    /// The status, if the process ended by itself.
    pub(super) ended: Option<ExitStatus>,
    /// The status in the end.
    pub(super) status: ExitStatus,
    pub(super) trace: String,
}

impl Performance {
    pub(super) fn is_struck(&self, data: &str) -> bool {
        let killed = self.trace.contains("+++ killed by SIGKILL +++");
        let last_killed = |line: &&str| killed && line.ends_with("= ?");
        let line = self.trace.lines().rev().find(last_killed);
        let line = line.or_else(|| self.trace.lines().find(|line| line.contains("(INJECTED)")));
        line.is_some_and(|line| line.contains(data))
    }
}

/// A data directory that a crash has torn, and who must find everything in it again.
pub(super) struct Template {
    directory: TempDir,
    promises: Promises,
    speakers: Mutex<Vec<Speaker>>,
}

impl Template {
    pub(super) fn new() -> Self {
        let mut stage = Stage::new(Target::Begin, None);
        stage.aggregator.launch();
        let rollout = start(stage.aggregator.http, "play").unwrap();
        stage.promises.started("play", &rollout);
        stage.decisions(&rollout).expect("decisions are recorded");
        stage.aggregator.kill_9();

        let data = stage.aggregator.data.clone();
        let tear = |file: PathBuf, torn: &[u8]| {
            let mut file = fs::File::options().create(true).append(true).open(file).unwrap();
            file.write_all(torn).unwrap();
        };
        tear(data.join("decisions.jsonl"), br#"{"body":{"actor":"api","rea"#);
        let files = fs::read_dir(data.join("windows"))
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let windows = files.filter(|file| file.extension().is_none()).max().unwrap();
        tear(windows, &[9, 0, 0, 0, 0xf6]);

        let Stage {
            directory,
            promises,
            agents,
            ..
        } = stage;
        Self {
            directory,
            promises,
            speakers: Mutex::new(agents.speakers),
        }
    }
}

/// One aggregator with its agents. The process goes before the directory.
pub(super) struct Stage {
    strace: Option<Process>,
    aggregator: Aggregator,
    agents: Agents,
    promises: Promises,
    directory: TempDir,
}

impl Stage {
    pub(super) fn new(target: Target, template: Option<&Template>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let aggregator = Aggregator::prepare_with(directory.path(), POLICY).with_arguments(&SMALL);
        let template = template.filter(|_| target == Target::Mend);
        let (agents, promises) = match template {
            None => (Agents::new(1, TRAFFIC), Promises::default()),
            Some(template) => {
                copy(&template.directory.path().join("data"), &aggregator.data);
                let speakers = template.speakers.lock().unwrap_or_else(PoisonError::into_inner);
                (Agents::of(speakers.clone(), TRAFFIC), template.promises.clone())
            }
        };
        Self {
            strace: None,
            aggregator,
            agents,
            promises,
            directory,
        }
    }

    pub(super) fn data(&self) -> String {
        self.aggregator.data.display().to_string()
    }

    fn trace(&self) -> PathBuf {
        self.directory.path().join("trace")
    }

    /// strace with what is common to all uses.
    fn strace(&self, options: &[String]) -> Vec<OsString> {
        // A call that this machine does not have is no error, with the question mark.
        let known: Vec<_> = CHANGE
            .iter()
            .chain(&LOOK)
            .map(|call| format!("?{call}"))
            .collect();
        let mut words: Vec<OsString> = vec![tool("strace", "strace").into(), "-y".into(), "-s0".into()];
        words.push(format!("--output={}", self.trace().display()).into());
        words.push(format!("--trace={}", known.join(",")).into());
        words.extend(options.iter().map(OsString::from));
        words
    }

    /// Performs the play with a target under strace.
    pub(super) fn perform(&mut self, target: Target, options: &[String]) -> Performance {
        if target.thread().is_some() {
            self.aggregator.launch();
            // All that belongs to the start has been written when this is answered.
            let before = start(self.aggregator.http, "before").unwrap();
            end(self.aggregator.http, &before).unwrap();
        } else {
            let mut command = self.strace(options);
            // The program is our child then, and strace is not in the way of signals.
            command.push("-D".into());
            self.aggregator.run_by(command);
            self.aggregator.spawn();
            self.aggregator.run_by(Vec::new());
        }
        let complete = self.play(target, options).is_some();
        let ended = self.aggregator.ended();
        let status = self.aggregator.finish();
        let trace = eventually("strace has written everything", || {
            let trace = fs::read_to_string(self.trace()).unwrap_or_default();
            trace.contains("+++ ").then_some(trace)
        });
        self.strace = None;
        Performance {
            complete,
            ended,
            status,
            trace,
        }
    }

    fn play(&mut self, target: Target, options: &[String]) -> Option<()> {
        if target.is_narrow() {
            self.attach(target, options);
        }
        let rollout = self.until("the rollout is started", |stage| {
            start(stage.aggregator.http, "play")
        })?;
        self.promises.started("play", &rollout);
        if target == Target::Evidence {
            self.attach(target, options);
        }
        if target.thread().is_some() {
            self.decisions(&rollout)?;
        }
        self.promises.ask_gate(self.aggregator.http, &rollout);
        self.until("the rollout is ended", |stage| {
            end(stage.aggregator.http, &rollout)
        })?;
        self.promises.ended.insert(rollout);
        Some(())
    }

    fn decisions(&mut self, rollout: &str) -> Option<()> {
        self.until("decisions are recorded", |stage| {
            let http = stage.aggregator.http;
            stage.agents.turn(stage.aggregator.grpc, false);
            stage.promises.ask_gate(http, rollout);
            stage.promises.ask_records(http, rollout);
            (stage.promises.decisions.len() >= DECISIONS).then_some(())
        })
    }

    /// Tries until it works; none if the process ends or it takes too long.
    fn until<T>(&mut self, what: &str, mut step: impl FnMut(&mut Self) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        within(2 * PATIENCE, what, || {
            if self.aggregator.ended().is_some() || Instant::now() > deadline {
                return Some(None);
            }
            step(self).map(Some)
        })
    }

    /// Lets strace see a thread that is running.
    fn attach(&mut self, target: Target, options: &[String]) {
        // The file of the checkpoint may follow a moment later; nothing else is written without being asked.
        let file = self.aggregator.data.join("checkpoint");
        eventually("the thread that writes the log has nothing to do", || {
            let published = get(self.aggregator.http, "/v1/audit/checkpoint").ok()?.body;
            (fs::read_to_string(&file).ok()? == published).then_some(())
        });
        let thread = target.thread().and_then(|name| self.aggregator.thread(name));
        let thread = thread.expect("the aggregator has a thread of that name");
        let mut words = self.strace(options).into_iter();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("-p").arg(thread.to_string());
        let mut strace = Process::start(command, &self.directory.path().join("strace.log"));
        eventually("strace is attached", || {
            let said = strace.said();
            assert!(
                strace.ended().is_none(),
                "it must be allowed to trace (run this as root): {said}"
            );
            said.contains("attached").then_some(())
        });
        self.strace = Some(strace);
    }

    /// Starts again without any fault. Everything is there, and everything goes on.
    pub(super) fn aftermath(mut self) {
        self.aggregator.launch();
        let http = self.aggregator.http;
        self.agents.flush(self.aggregator.grpc);
        conserves(&self.aggregator, &self.agents.made());
        for key in ["play", "after"] {
            let rollout = eventually("a rollout is started", || start(http, key));
            self.promises.started(key, &rollout);
            eventually("the rollout is ended", || end(http, &rollout));
            self.promises.ask_gate(http, &rollout);
            self.promises.ended.insert(rollout);
        }
        self.promises.hold(&mut self.aggregator);
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (
            entry.as_ref().unwrap().path(),
            to.join(entry.unwrap().file_name()),
        );
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}
