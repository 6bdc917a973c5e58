//! `coalmine judge`: evidence in, verdicts out.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter},
    path::PathBuf,
    sync::Arc,
};

use coalmine_judge::{
    evidence::{MAX_LINE_BYTES, Window},
    v1::{Judge, Outcome},
};
use coalmine_proto::names::TenantName;

use super::{Exit, Failure, policy::history_for, tell};
use crate::server::read_policy;

/// What `coalmine judge` is asked.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The SLA baseline
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// The history that limits may follow
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    /// Planned number of windows; by default what fits before the policy's hold deadline
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    max_windows: Option<u32>,
    /// At the end, show on standard error how the last verdict came about: policy, alpha, thresholds, evidence, states
    #[arg(long)]
    explain: bool,
    /// With --explain, show this tenant too, whatever its state
    #[arg(long, value_name = "NAME", requires = "explain", value_parser = super::tenant)]
    tenant: Option<TenantName>,
    /// Evidence, one window a line; - for standard input
    #[arg(default_value = "-", value_name = "FILE")]
    windows: PathBuf,
}

pub(super) fn run(options: &Options) -> Result<Exit, Failure> {
    let policy = read_policy(&options.policy).map_err(Failure::usage)?;
    let history = history_for(options.history.as_deref(), &policy)?.map(Arc::new);
    let (max_windows, windows) = (options.max_windows, &*options.windows);
    let mut judge =
        Judge::new(policy, history, max_windows).map_err(|error| Failure::usage(error.to_string()))?;
    let name = if windows.as_os_str() == "-" {
        "standard input".into()
    } else {
        windows.display().to_string()
    };
    let mut input: Box<dyn BufRead> = if windows.as_os_str() == "-" {
        Box::new(BufReader::new(io::stdin()))
    } else {
        let file = File::open(windows)
            .map_err(|error| Failure::usage(format!("cannot read the evidence {name}: {error}")))?;
        Box::new(BufReader::new(file))
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let mut last = None;
    let judged = judge_lines(
        &mut judge,
        &mut *input,
        &name,
        windows.as_os_str() == "-",
        &mut out,
        &mut last,
    );
    if let Some(outcome) = last.filter(|_| options.explain) {
        for line in judge.explain(&outcome, options.tenant.as_ref()) {
            tell(&line);
        }
    }
    match judged {
        // A reader that has seen enough, as `head` has, is no failure.
        Err(Stop::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Good),
        Err(Stop::Output(error)) => Err(error.into()),
        Err(Stop::Input(failure)) => Err(failure),
        Ok(()) if judge.last_window().is_none() => Err(Failure::usage(format!("{name} has no window"))),
        Ok(()) => Ok(Exit::Good),
    }
}

/// Why judging ends early.
enum Stop {
    Input(Failure),
    Output(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// Judges line by line. With `live` input each verdict is shown at once.
fn judge_lines(
    judge: &mut Judge,
    input: &mut dyn BufRead,
    name: &str,
    live: bool,
    out: &mut impl io::Write,
    last: &mut Option<Outcome>,
) -> Result<(), Stop> {
    let mut line = Vec::new();
    let mut warned = false;
    for number in 1_u64.. {
        line.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let read = io::Read::take(&mut *input, limit)
            .read_until(b'\n', &mut line)
            .map_err(|error| {
                Stop::Input(Failure::new(
                    Exit::Unknown,
                    format!("cannot read {name}: {error}"),
                ))
            })?;
        if read == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let fail = |problem: String| Failure::usage(format!("{name}:{number}: {problem}"));
        let text = std::str::from_utf8(line.trim_ascii())
            .map_err(|_| Stop::Input(fail("the line is not UTF-8".into())))?;
        let outcome = Window::from_json(text)
            .map_err(|error| fail(error.to_string()))
            .and_then(|window| {
                let wanted = judge.policy().window_ms();
                if window.len_ms != wanted && !warned {
                    warned = true;
                    tell(&format_args!(
                        "coalmine: {name}:{number}: the window has {} ms, and the policy's judge_window {wanted} ms",
                        window.len_ms
                    ));
                }
                judge.step(&window).map_err(|error| fail(error.to_string()))
            });
        // What was judged before the mistake is printed before the complaint.
        match outcome {
            Ok(outcome) => {
                writeln!(out, "{}", outcome.to_json())?;
                *last = Some(outcome);
            }
            Err(failure) => {
                out.flush()?;
                return Err(Stop::Input(failure));
            }
        }
        if live {
            out.flush()?;
        }
    }
    Ok(out.flush()?)
}
