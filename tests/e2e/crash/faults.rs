//! Faults at every step: each call that touches the data directory fails once, or is where the process is killed.
//!
//! The idea is that of Tessera's test of its POSIX storage, and the tool is the same: strace. It counts the calls of
//! each thread for itself, so a fault that is meant for the n-th call of one thread would hit the n-th calls of all
//! others, too: their sockets, their terminal, the pipes by which a runtime wakes itself. Therefore only one thread is
//! traced at a time:
//!
//! * the main thread, from the program's first call on: it begins a log (`Begin`), and it mends and reads one that was
//!   torn by a crash (`Mend`);
//! * the thread that writes the log, attached to by its number while it waits for work: the log itself (`Log`) and the
//!   evidence that stands beside it (`Evidence`);
//! * the thread that writes windows, likewise (`Windows`).
//!
//! The same play is performed for all: a rollout is started by its key, agents send windows until three decisions are
//! recorded, the rollout is ended, the process is asked to stop. A first performance of each target has no fault and
//! gives the numbers of the calls that touch the directory. Writing threads also write to wake the runtime, but not in
//! every run equally often. So strace looks at the paths of the recording only (-P), and counts only those. Evidence
//! has new names in each run; its calls are counted among all that the thread makes after the rollout has begun, where
//! its write is the first.
//!
//! A fault is EIO, ENOSPC, or SIGKILL in place of the call; calls that only look get EIO. By default a spread is run in
//! which each call meets each fault, in each target that makes it, at its first, middle or last time;
//! `COALMINE_FAULTS=all` runs every single one.
//!
//! After each the aggregator is started again without strace, and held to all that it had said, and to every request
//! that the agents counted. One that lives through a fault must have gone on as if there had been none.

mod aim;

mod stage;

use std::{
    collections::BTreeSet,
    env, fmt,
    os::unix::process::ExitStatusExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Instant,
};

use self::{
    aim::{Aim, CHANGE, Target},
    stage::{Performance, Stage, Template},
};

/// Performances at a time: most of one is waiting for windows.
const LANES: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error(&'static str),
    Kill,
    /// The call fails, and the process is killed when it takes back what it may have written.
    KillAtTruncate,
}

static FAULTS: [Fault; 3] = [Fault::Error("EIO"), Fault::Error("ENOSPC"), Fault::Kill];

fn faults_of(call: &str) -> &'static [Fault] {
    if CHANGE.contains(&call) {
        &FAULTS
    } else {
        &FAULTS[..1]
    }
}

/// One fault at one call.
struct Case<'a> {
    aim: &'a Aim,
    call: &'a str,
    number: u64,
    fault: Fault,
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            aim,
            call,
            number,
            fault,
        } = self;
        write!(f, "{:?}: {fault:?} at {call} number {number}", aim.target)
    }
}

impl Case<'_> {
    fn options(&self, data: &str) -> Vec<String> {
        let Self { call, number, .. } = self;
        let paths = self
            .aim
            .paths
            .iter()
            .map(|path| format!("--trace-path={data}{path}"));
        let inject = match self.fault {
            Fault::Error(error) => vec![format!("--inject={call}:error={error}:when={number}")],
            Fault::Kill => vec![format!("--inject={call}:signal=KILL:when={number}")],
            Fault::KillAtTruncate => vec![
                format!("--inject={call}:error=EIO:when={number}"),
                "--inject=ftruncate:signal=KILL:when=1".to_owned(),
            ],
        };
        paths.chain(inject).collect()
    }

    /// Performs it; says whether the fault came about at a call that touches the directory.
    fn run(&self, template: &Template) -> bool {
        let mut stage = Stage::new(self.aim.target, Some(template));
        let data = stage.data();
        let performance = stage.perform(self.aim.target, &self.options(&data));
        let struck = performance.is_struck(&data);
        if struck {
            self.judge(&performance);
        }
        stage.aftermath();
        struck
    }

    /// A process ends as it should, or it goes on as if nothing had been.
    fn judge(&self, performance: &Performance) {
        let Performance {
            complete,
            ended,
            status,
            ..
        } = performance;
        let code = ended.and_then(|ended| ended.code());
        match self.fault {
            Fault::Kill | Fault::KillAtTruncate => assert_eq!(status.signal(), Some(9), "{status}"),
            Fault::Error(_) if matches!(self.call, "fsync" | "fdatasync") => {
                assert_eq!(code, Some(1), "a failed sync must end the process: {status}");
            }
            // The standard library panics where a directory that it has listed cannot be closed.
            Fault::Error(_) if ended.is_some() && self.call == "close" => {
                assert!(matches!(code, Some(1 | 101)), "{status}");
            }
            Fault::Error(_) if ended.is_some() => assert_eq!(code, Some(1), "{status}"),
            Fault::Error(_) => assert!(
                *complete && status.success(),
                "it went on and did not recover: {status}"
            ),
        }
    }
}

/// A performance without a fault, which shows what there is to hit.
fn record(target: Target, template: &Template) -> Aim {
    let mut stage = Stage::new(target, Some(template));
    let performance = stage.perform(target, &[]);
    let Performance {
        complete,
        status,
        trace,
        ..
    } = performance;
    assert!(
        complete && status.success(),
        "{target:?} without a fault: {status}"
    );
    let aim = Aim::read(target, &trace, &stage.data());
    stage.aftermath();
    aim
}

/// Every fault at every call.
fn all(aims: &[Aim]) -> Vec<Case<'_>> {
    let mut cases = Vec::new();
    for aim in aims {
        for (call, numbers) in &aim.hits {
            let call = call.as_str();
            for number in numbers {
                cases.extend(faults_of(call).iter().map(|fault| Case {
                    aim,
                    call,
                    number: *number,
                    fault: *fault,
                }));
            }
        }
    }
    cases
}

/// Every call with each of its faults, in each target that makes it, and at its first, middle or last time in turn.
fn spread(aims: &[Aim]) -> Vec<Case<'_>> {
    let names: BTreeSet<&str> = aims
        .iter()
        .flat_map(|aim| aim.hits.keys().map(String::as_str))
        .collect();
    let mut cases = Vec::new();
    for (turn, call) in names.into_iter().enumerate() {
        let hit: Vec<_> = aims
            .iter()
            .filter_map(|aim| Some((aim, aim.hits.get(call)?)))
            .collect();
        let faults = faults_of(call);
        for step in 0..hit.len().max(faults.len()) {
            let (aim, numbers) = hit[step % hit.len()];
            let places = [0, numbers.len() / 2, numbers.len() - 1];
            cases.push(Case {
                aim,
                call,
                number: numbers[places[(step + step / 3 + turn) % 3]],
                fault: faults[step % faults.len()],
            });
        }
    }
    cases
}

/// Runs them in lanes; gives how many faults came about, and those after which something was wrong.
fn run(cases: &[Case<'_>], template: &Template) -> (usize, Vec<String>) {
    let (next, struck, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let lane = || {
        while let Some(case) = cases.get(next.fetch_add(1, Relaxed)) {
            match catch_unwind(AssertUnwindSafe(|| case.run(template))) {
                Ok(hit) => {
                    struck.fetch_add(usize::from(hit), Relaxed);
                }
                Err(_) => {
                    eprintln!("that was {case}");
                    failed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(case.to_string());
                }
            }
        }
    };
    thread::scope(|scope| (0..LANES).for_each(|_| drop(scope.spawn(lane))));
    (
        struck.into_inner(),
        failed.into_inner().unwrap_or_else(PoisonError::into_inner),
    )
}

#[test]
fn a_fault_at_any_step_makes_nothing_untrue() {
    let begun = Instant::now();
    let template = &Template::new();
    let aims: Vec<Aim> = thread::scope(|scope| {
        let recordings = Target::ALL.map(|target| scope.spawn(move || record(target, template)));
        recordings.into_iter().map(|aim| aim.join().unwrap()).collect()
    });
    for aim in &aims {
        assert!(
            !aim.hits.is_empty(),
            "{:?} makes no call that can be hit",
            aim.target
        );
        let begins = |start: &str| aim.paths.iter().filter(|path| path.starts_with(start)).count();
        match aim.target {
            Target::Log => assert!(begins("/decisions-0") > 0, "no segment was sealed"),
            Target::Windows => assert!(begins("/windows/wal-") > 1, "no windows were rolled up"),
            Target::Begin | Target::Mend | Target::Evidence => {}
        }
    }
    let every = env::var("COALMINE_FAULTS").is_ok_and(|which| which == "all");
    let mut cases = if every { all(&aims) } else { spread(&aims) };
    cases.extend(aims.iter().filter(|aim| aim.target.is_narrow()).map(|aim| Case {
        aim,
        call: "write",
        number: 1,
        fault: Fault::KillAtTruncate,
    }));
    let (struck, failed) = run(&cases, template);
    eprintln!(
        "{} faults, {struck} at a call that touched the directory, in {:.0} s",
        cases.len(),
        begun.elapsed().as_secs_f64()
    );
    assert!(
        failed.is_empty(),
        "{} of {}:\n{}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
    assert!(
        struck * 10 >= cases.len() * 9,
        "{struck} of {} faults came about",
        cases.len()
    );
}
