//! What the application uses of its host: processor, memory and open files, as context for a decision.
//!
//! Whose figures can be had depends on where the agent runs:
//!
//! | the agent sees | figures |
//! |---|---|
//! | the pod's control group (the host's is mounted) | the pod's, as the kubelet counts them, with its limits |
//! | the processes of other containers (`shareProcessNamespace: true`) | sums over the processes; no limits |
//! | only its own container, with others in it (one container for both) | the container's, with its limits |
//! | only its own container, alone in it (a plain sidecar) | none: its own would pass for the application's |
//! | no container | the machine's, with its size as the limit |
//!
//! A container has a name space of control groups, or is given only its own group, so a plain sidecar
//! cannot find out what the pod uses. Sums over processes count memory that processes share more than
//! once, and miss what a process used between the last look and its end. With the machine's process name
//! space in a container of Docker, the sum is over all containers.
//!
//! Open files are those of the processes that are seen, at most 200 of them. Linux 6.2 and
//! later tells their number of every process, earlier ones only of processes of the agent's own user, of
//! which up to 4,096 each are counted.

mod cgroup;
mod machine;
mod processes;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use coalmine_proto::v1;

use cgroup::{Group, Owner};
use machine::Machine;

/// Looks are a second apart, whatever a window's length; a little less, so that a look for each window of
/// a second is never put off to the next.
const SHORTEST: Duration = Duration::from_millis(900);

/// The files that are read are shorter.
const LONGEST_TEXT: u64 = 64 * 1024;

/// Reads what the application uses.
#[derive(Debug)]
pub(crate) struct Host {
    root: PathBuf,
    group: Option<Group>,
    /// None where the system's own figures are not to be had.
    machine: Option<Machine>,
    looked: Option<Instant>,
    source: Source,
    usage: Usage,
    open_files: u64,
}

/// Whose figures are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The pod's or the container's control group.
    Group,
    Processes,
    Machine,
    Nobody,
}

/// What is used. What is not known is 0, as on the wire; only of processor time that is kept apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    /// Processor time since some moment that stays the same.
    cpu_us: Option<u64>,
    cpu_limit_milli: u64,
    memory_bytes: u64,
    memory_limit_bytes: u64,
}

// === impl Host ===

impl Host {
    /// The host that the agent runs on. What was used before is not of the first window.
    pub(crate) fn new() -> Self {
        Self::with(PathBuf::from("/"), Machine::new())
    }

    /// A host whose files are below this directory, and that has no others.
    #[cfg(test)]
    fn at(root: &Path) -> Self {
        Self::with(root.to_owned(), None)
    }

    fn with(root: PathBuf, machine: Option<Machine>) -> Self {
        let mut host = Self {
            group: Group::find(&root),
            root,
            machine,
            looked: None,
            source: Source::Nobody,
            usage: Usage::default(),
            open_files: 0,
        };
        host.look(Instant::now());
        host
    }

    /// Fills in what the application uses, and the processor time since it was last filled in. Within a
    /// second of the last look, that is none, and the rest is what was seen then. Never fails: what cannot
    /// be known is 0.
    pub(crate) fn read(&mut self, into: &mut v1::HostContext) {
        self.read_at(Instant::now(), into);
    }

    fn read_at(&mut self, now: Instant, into: &mut v1::HostContext) {
        let is_fresh = |looked| now.saturating_duration_since(looked) < SHORTEST;
        into.cpu_us = if self.looked.is_some_and(is_fresh) {
            0
        } else {
            self.look(now)
        };
        into.cpu_limit_milli = self.usage.cpu_limit_milli;
        into.memory_bytes = self.usage.memory_bytes;
        into.memory_limit_bytes = self.usage.memory_limit_bytes;
        into.open_files = self.open_files;
    }

    /// Looks, and gives the processor time since the last look; 0 where that was not at the same.
    fn look(&mut self, now: Instant) -> u64 {
        self.looked = Some(now);
        let before = (self.source, self.usage.cpu_us);
        (self.source, self.usage) = self.figures(now);
        match (before, self.usage.cpu_us) {
            ((source, Some(before)), Some(now)) if source == self.source => now.saturating_sub(before),
            _ => 0,
        }
    }

    fn figures(&mut self, now: Instant) -> (Source, Usage) {
        let Self {
            root,
            group,
            machine,
            open_files,
            ..
        } = self;
        let Some(group) = group.as_ref().filter(|group| group.owner() != Owner::Machine) else {
            *open_files = processes::all_open_files(root);
            return match machine {
                Some(machine) => (Source::Machine, machine.whole(now)),
                None => (Source::Nobody, Usage::default()),
            };
        };
        let seen = processes::look(root, group);
        let is_alone = seen.pids.len() <= 1;
        *open_files = if is_alone { 0 } else { seen.open_files };
        match (group.owner(), machine) {
            (Owner::Container, _) if is_alone => (Source::Nobody, Usage::default()),
            (Owner::Container, Some(machine)) if seen.has_siblings => {
                (Source::Processes, machine.of(&seen.pids, now))
            }
            // The container is a part of what is seen, and none can be taken for the other.
            (Owner::Container, None) if seen.has_siblings => (Source::Nobody, Usage::default()),
            _ => (Source::Group, group.usage(root)),
        }
    }
}

/// A small file's text.
fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(LONGEST_TEXT).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests;
